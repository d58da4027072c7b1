# SPDX-License-Identifier: Apache-2.0
"""Fourth stage: one tile of raw scores becomes weights p, a maximum and two sums per query head."""

import numpy as np

from . import number
from .number import (
    P_MAX,
    P_WIDE_FRAC_BITS,
    RAW_SHIFT,
    RUN_MAX_EMPTY,
    SCORE_FRAC_BITS,
    SCORE_LIMIT,
    SCORE_SHIFT_MAX,
)


def score_model(raw, mantissa, shift):
    """Scores of array sums: int64 with 20 fraction bits, and whether one left the range.

    raw : int64 (...), the sums S of the array
    mantissa, shift : the job's score_mantissa; score_shift minus the block's exponent
    """
    product = (np.asarray(raw, np.int64) >> RAW_SHIFT) * np.int64(mantissa)
    shift = np.minimum(shift, SCORE_SHIFT_MAX)
    score = ((product >> np.maximum(shift - 1, 0)) + 1) >> 1
    beyond = np.where(product < 0, -SCORE_LIMIT - 1, np.where(product > 0, SCORE_LIMIT + 1, 0))
    score = np.where(shift >= 1, score, beyond)
    return np.clip(score, -SCORE_LIMIT, SCORE_LIMIT), np.abs(score) > SCORE_LIMIT


def model(score, keep):
    """Weights, maximum and sums of tiles, bit for bit as the gateware does.

    Parameters
    ----------
    score : int64 (..., tokens)
        Scores in log2 units with 20 fraction bits.
    keep : bool, broadcastable to score
        False where there is no token.

    Returns
    -------
    p : int64 (..., tokens)
        2^(score - tile_max), 17 bits; 0 where not kept.
    tile_max : int64 (...)
        Smallest integer not below any kept score; RUN_MAX_EMPTY if none is kept.
    tile_sum, tile_wide : int64 (...)
        Sum of p; sum of 2^(score - tile_max) with 22 fraction bits, not rounded to 17 bits first.
    """
    unit = 1 << SCORE_FRAC_BITS
    keep = np.broadcast_to(keep, score.shape)
    ceiling = -(-score >> SCORE_FRAC_BITS)
    tile_max = np.where(keep, ceiling, RUN_MAX_EMPTY).max(axis=-1)
    below = np.where(keep, score - tile_max[..., None] * unit, 0)
    power = number.exp2(below & (unit - 1))
    wide = power >> np.minimum(-(below >> SCORE_FRAC_BITS), P_WIDE_FRAC_BITS + 1)
    wide = np.where(keep, wide, 0)
    p = np.minimum((wide + 16) >> 5, P_MAX)
    return p, tile_max, p.sum(axis=-1), wide.sum(axis=-1)
