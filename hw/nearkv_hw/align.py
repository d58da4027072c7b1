# SPDX-License-Identifier: Apache-2.0
"""Second stage: from 16-bit floating point to integers that share one exponent per block."""

import numpy as np

from .abi import KvType
from .number import EXPONENT_FLOOR, KV_BITS, KV_FORMATS


def unpack(elements, kv_type: KvType):
    """Sign, magnitude (22 bits, significand on top) and exponent field (at least 1) of elements."""
    form = KV_FORMATS[kv_type]
    elements = np.asarray(elements).astype(np.int32)
    field = (elements >> form.mantissa_bits) & form.exponent_max
    significand = elements & ((1 << form.mantissa_bits) - 1) | (
        (field > 0).astype(np.int32) << form.mantissa_bits
    )
    return elements >> 15 & 1, significand << form.align_bits, np.maximum(field, 1)


def model(elements, kv_type: KvType, channel_exponent, keep):
    """Align whole blocks, bit for bit as the gateware does.

    Parameters
    ----------
    elements : uint16 (..., rows, 32)
        One block in the last two axes: K `[channel][token]` or V `[token][channel]`.
    kv_type : KvType
    channel_exponent : int (..., rows), or 0
        For K the exponent of the query weights of each channel; for V zero.
    keep : bool, broadcastable to elements
        False where an element lies beyond the valid tokens: it counts as zero, whatever its bits.

    Returns
    -------
    x : int32 (..., rows, 32)
        |x| <= 2^22, rounded half away from zero. Beyond `align_bits` binades below the block's
        largest exponent bits are lost, at most half a unit each.
    exponent : int32 (...)
        Largest exponent of the block, EXPONENT_FLOOR if nothing is kept.
    non_finite : bool (...)
        An Inf or NaN among the kept elements.
    """
    elements = np.asarray(elements)
    sign, magnitude, field = unpack(elements, kv_type)
    total = field + np.asarray(channel_exponent, np.int32)[..., None]
    keep = np.broadcast_to(keep, elements.shape)
    exponent = np.where(keep, total, EXPONENT_FLOOR).max(axis=(-2, -1), initial=EXPONENT_FLOOR)
    shift = np.clip(exponent[..., None, None] - total, 0, KV_BITS)
    rounded = (((magnitude << 1) >> shift) + 1) >> 1
    x = np.where(keep, np.where(sign, -rounded, rounded), 0)
    non_finite = (keep & (field == KV_FORMATS[kv_type].exponent_max)).any(axis=(-2, -1))
    return x, exponent, non_finite
