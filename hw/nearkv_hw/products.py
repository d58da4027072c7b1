# SPDX-License-Identifier: Apache-2.0
"""Between fetch and align: what the largest product p * v of a V block is, for every query head.

Integers with one exponent per block keep what is large in it. In a V block that must not be the largest v
and the largest p, for they may belong to different tokens: an attention sink has nearly all of p and
nearly no v. So a block is scaled by its largest *product*, and by that of each row (query head) of its
own, because heads that share V need not agree on where they look.
"""

import numpy as np

from .number import DEPTH_MAX, EXPONENT_FLOOR


def model(mantissa, halvings, field):
    """Array weights of V blocks, bit for bit as the gateware makes them.

    Parameters
    ----------
    mantissa, halvings : int64 (..., rows, tokens)
        The weights p of a tile, see `softmax.model`.
    field : int32 (..., tokens)
        Largest exponent field of each token's elements that are not 0, see `align.fields`; 0 if all are.

    Returns
    -------
    weight : int64 (..., rows, tokens)
        17 bits, not negative: the array multiplies x with it.
    exponent : int64 (..., rows)
        E, the largest exponent of a product of the row; EXPONENT_FLOOR if it has no weight.
    base : int64 (..., tokens)
        For `align.model`: what an element of exponent field 0 is shifted right by.
    """
    there = (mantissa > 0) & (field > 0)[..., None, :]
    product = np.where(there, field[..., None, :] - halvings, EXPONENT_FLOOR)
    exponent = product.max(axis=-1, initial=EXPONENT_FLOOR)
    depth = np.where(there, np.minimum(exponent[..., None] - product, DEPTH_MAX), DEPTH_MAX)
    common = depth.min(axis=-2)
    weight = np.where(there, ((mantissa << 1) >> (depth - common[..., None, :])) + 1 >> 1, 0)
    return weight, exponent, common + field
