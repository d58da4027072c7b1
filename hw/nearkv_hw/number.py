# SPDX-License-Identifier: Apache-2.0
"""The numbers of the accelerator: formats, constants and their exact arithmetic.

Written once, used by the RTL, the models and the host. Needs numpy only. The chain, for one query
head and one tile of at most 128 tokens:

    weight w[r]    q as an 18-bit signed integer, counts 2^(exponent[r] - 17)
    x[r][token]    K aligned to the block's largest exponent E: 23-bit signed integer
    S[token]       sum over r of w * x, exact, below 2^47
    s[token]       score in log2 units, 20 fraction bits: (S >> 13) * mantissa >> shift
    tile_max       the smallest integer not below any s
    p[token]       2^(s - tile_max) = mantissa * 2^(-16 - halvings): 17 bits and an exponent of its own
    E              of a block of 32 channels of V: the largest exponent of a product p * v
    o[channel]     sum over tokens of p * x, with p and x now scaled so that the products of the tokens
                   have the exponent E in common: below 2^47
    out[channel]   sum over tiles of o * 2^(tile_max + E), exact in a window of 64 bits: `Wide`

Every sum is exact and every rounding depends on one block or one tile alone. Therefore the order of
tokens in a block, of tiles in a job, and of partials in a merge changes no bit.
"""

from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from functools import cache
import hashlib
import json
import math

import numpy as np

from .abi import BLOCK_TOKENS, MAX_TILES, SCALE_BITS, TILE_TOKENS, WIDE_BYTES, KvType

# --- K and V ------------------------------------------------------------------------------------
KV_BITS = 23  # an aligned element: sign and magnitude up to 2^22
ALIGNED_BITS = KV_BITS + 1  # the same as a signed number


@dataclass(frozen=True)
class KvFormat:
    """A 16-bit floating point format of K and V elements.

    Elements read as `sig * 2^(e - unit)`, with sig an integer below 2^sig_bits and e the exponent
    field, at least 1 (subnormal numbers need no special case after that).
    """

    exponent_bits: int
    mantissa_bits: int

    @property
    def sig_bits(self) -> int:
        return self.mantissa_bits + 1

    @property
    def exponent_max(self) -> int:
        """The exponent field of Inf and NaN."""
        return (1 << self.exponent_bits) - 1

    @property
    def unit(self) -> int:
        """An aligned element x of a block with largest exponent E is worth x * 2^(E - unit)."""
        bias = (1 << (self.exponent_bits - 1)) - 1
        return bias + self.mantissa_bits + self.align_bits

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 + (KV_BITS - 2) - self.unit)

    @property
    def align_bits(self) -> int:
        """Zero bits below the significand in the 22-bit magnitude: binades without loss."""
        return KV_BITS - 1 - self.sig_bits


KV_FORMATS = {KvType.FP16: KvFormat(5, 10), KvType.BF16: KvFormat(8, 7)}
FIELD_BITS = max(form.exponent_bits for form in KV_FORMATS.values())

# --- q ------------------------------------------------------------------------------------------
WEIGHT_BITS = 18
WEIGHT_MAX = (1 << (WEIGHT_BITS - 1)) - 1
Q_EXPONENT_MIN, Q_EXPONENT_MAX = -512, 511  # a channel in which every head is zero has the least
Q_EXPONENT_BITS = 11  # as the card takes it from a query record
EXPONENT_BITS = Q_EXPONENT_BITS + 1  # the same plus an element's exponent field
ACC_BITS = 48

# --- scores -------------------------------------------------------------------------------------
RAW_SHIFT = 13  # bits of S dropped: 35 remain, two 18-bit ports of a DSP
RAW_BITS = ACC_BITS - RAW_SHIFT
SCORE_FRAC_BITS = 20
SCORE_INT_MAX = 32767
SCORE_BITS = 36
SCORE_LIMIT = SCORE_INT_MAX << SCORE_FRAC_BITS
SCORE_SHIFT_MAX = 63
# The exponent of a block before its first valid element, below all that an element can have.
EXPONENT_FLOOR = -(1 << (Q_EXPONENT_BITS - 1))
TILE_MAX_BITS = 16
RUN_MAX_EMPTY = -32768  # maximum of no token at all

# --- weights p ----------------------------------------------------------------------------------
# p = mantissa * 2^(-16 - halvings), with a mantissa in [2^16, 2^17) or 0. A weight has its own exponent,
# so a token that takes nearly all of the sum does not cost its neighbours their bits.
P_BITS = 17
P_MAX = (1 << P_BITS) - 1
POWER_FRAC_BITS = 22  # of 2^f before it is rounded to a mantissa
P_DROP_BITS = POWER_FRAC_BITS - (P_BITS - 1)
HALVINGS_BITS = 6
HALVINGS_MAX = (1 << HALVINGS_BITS) - 1  # a smaller weight is 0
# Both denominators of a tile, the sum of p and that of the powers, have so many fraction bits: what is
# cut off a weight is small against the tile's largest, which is at least 1/2.
SUM_FRAC_BITS = 30
TILE_SUM_BITS = SUM_FRAC_BITS + 1 + (TILE_TOKENS - 1).bit_length()
# They enter the accumulator as one more element each, placed as high as o may be.
SUM_SHIFT = 9
SUM_UNIT = SUM_FRAC_BITS + SUM_SHIFT  # both count 2^(tile_max - 39) there
OUT_UNIT = P_BITS - 1  # o counts 2^(tile_max + E - KvFormat.unit - 16)

# --- products p V -------------------------------------------------------------------------------
# A token's product with a V block lies below 2^(field - halvings + 1), of the largest exponent field of
# its 32 elements. The largest of these exponents, E, belongs to one row (query head) and one block.
# How far a token's lies below it is taken off in two steps: what all rows have in common from
# the elements, which lose nothing by the first binades, and the rest from each row's mantissa.
DEPTH_BITS = 6
DEPTH_MAX = (1 << DEPTH_BITS) - 1  # so far below, nothing is left of any product
assert DEPTH_MAX >= KV_BITS + P_BITS

# --- exp2 ---------------------------------------------------------------------------------------
EXP2_SEGMENTS = 16
EXP2_U_BITS = SCORE_FRAC_BITS - (EXP2_SEGMENTS - 1).bit_length()  # of the place in a segment
EXP2_FRAC_BITS = 26  # of the coefficients; the result is rounded to POWER_FRAC_BITS

# --- wide accumulator ---------------------------------------------------------------------------
LIMB_STEP = 16  # one limb counts 2^16 of the limb below
PLACE_BITS = TILE_MAX_BITS + 2  # tile_max + E: what o counts
TOP_BITS = PLACE_BITS - (LIMB_STEP - 1).bit_length()  # the same in limbs
LIMB_BITS = 28  # stored: 2^11 tiles of 16-bit parts, signed
N_LIMBS = 4
WINDOW_TOP = 47  # |o| < 2^47, so o * 2^X stays below 2^(X + 47)
assert MAX_TILES << LIMB_STEP <= 1 << (LIMB_BITS - 1)
assert P_BITS + (KV_BITS - 1) + (TILE_TOKENS - 1).bit_length() < WINDOW_TOP


def quantize_q(q) -> tuple[np.ndarray, np.ndarray]:
    """Turn query heads into integer weights with one exponent per channel.

    Parameters
    ----------
    q : (group_size, head_dim), any real dtype
        Query heads that share a KV head. Finite.

    Returns
    -------
    weight : int32 (group_size, head_dim)
        |weight| < 2^17. Exact for fp16 heads within 6 binades of the channel's largest.
    exponent : int32 (head_dim,)
        weight 1 means 2^(exponent - 17); Q_EXPONENT_MIN where the channel is zero.

    Raises
    ------
    ValueError
        If an element is not finite, or not below 2^511.
    """
    q = np.asarray(q, dtype=np.float64)
    if not np.isfinite(q).all():
        head, channel = np.argwhere(~np.isfinite(q))[0]
        raise ValueError(f"q must be finite; head {head}, channel {channel} is {q[head, channel]}")
    largest = np.abs(q).max(axis=0)
    exponent = np.where(largest > 0, np.frexp(largest)[1], Q_EXPONENT_MIN).astype(np.int32)
    if exponent.max(initial=0) > Q_EXPONENT_MAX:
        raise ValueError(f"q must be below 2^{Q_EXPONENT_MAX}, not {largest.max()}")
    exponent = np.maximum(exponent, Q_EXPONENT_MIN)
    weight = np.rint(np.ldexp(q, (WEIGHT_BITS - 1) - exponent))
    return np.clip(weight, -WEIGHT_MAX, WEIGHT_MAX).astype(np.int32), exponent


def score_scale(scale: float, kv_type: KvType) -> tuple[int, int]:
    """The job's `score_mantissa` and `score_shift` for a softmax scale.

    A block with exponent E turns S into a score by (S >> 13) * mantissa >> (shift - E).

    Raises
    ------
    ValueError
        If scale is not positive, or too large.
    """
    if not (scale > 0 and math.isfinite(scale * math.log2(math.e))):
        raise ValueError(f"scale must be positive and below 1.2e308, not {scale}")
    fraction, exponent = math.frexp(scale * math.log2(math.e))
    mantissa = round(fraction * (1 << SCALE_BITS))
    if mantissa == 1 << SCALE_BITS:
        mantissa, exponent = mantissa >> 1, exponent + 1
    # S counts 2^(E - unit - 17); the score counts 2^-20.
    unit = KV_FORMATS[kv_type].unit + (WEIGHT_BITS - 1) - RAW_SHIFT - SCORE_FRAC_BITS
    return mantissa, unit + SCALE_BITS - exponent


@cache
def exp2_table() -> np.ndarray:
    """Coefficients of 2^f on 16 segments of [0, 1): int64 (16, 3), 26 fraction bits.

    Row i: 2^(i/16 + u/16) ~ a0 + a1 u + a2 u^2 for u in [0, 1), interpolated at the three
    Chebyshev nodes. Computed in decimal arithmetic, so that every machine gets the same bits.
    """
    with localcontext() as context:
        context.prec = 40
        two = Decimal(2)
        # cos(pi/6) = sqrt(3)/2
        nodes = [(1 - c * Decimal(3).sqrt() / 2) / 2 for c in (1, 0, -1)]
        rows = []
        for segment in range(EXP2_SEGMENTS):
            y = [two ** ((segment + u) / EXP2_SEGMENTS) for u in nodes]
            d01 = (y[1] - y[0]) / (nodes[1] - nodes[0])
            d12 = (y[2] - y[1]) / (nodes[2] - nodes[1])
            a2 = (d12 - d01) / (nodes[2] - nodes[0])
            a1 = d01 - a2 * (nodes[0] + nodes[1])
            a0 = y[0] - d01 * nodes[0] + a2 * nodes[0] * nodes[1]
            rows.append([int((a * 2**EXP2_FRAC_BITS).to_integral_value()) for a in (a0, a1, a2)])
    return np.array(rows, dtype=np.int64)


def exp2(fraction: np.ndarray) -> np.ndarray:
    """2^f for f = fraction / 2^20 in [0, 1): integers with 22 fraction bits, in [2^22, 2^23).

    Never falls as f rises. 2^0 comes out as 1 + 2^-21, within the error.

    Relative error below 2^-20.5, checked over all 2^20 inputs in tests/hw/test_number.py.
    """
    a0, a1, a2 = exp2_table().T
    segment, u = fraction >> EXP2_U_BITS, fraction & ((1 << EXP2_U_BITS) - 1)
    slope = a1[segment] + ((a2[segment] * u) >> EXP2_U_BITS)
    value = a0[segment] + ((slope * u) >> EXP2_U_BITS)
    drop = EXP2_FRAC_BITS - POWER_FRAC_BITS
    return (value + (1 << (drop - 1))) >> drop


def contract_hash() -> str:
    """Identity of this arithmetic: SHA-256 over the constants above and over what the functions give
    for fixed inputs. In the manifest of a bitstream; two builds with one hash round alike."""
    constants = {name: value for name, value in globals().items()
                 if name.isupper() and isinstance(value, int)}  # fmt: skip
    formats = {int(kv_type): (form.exponent_bits, form.mantissa_bits, form.unit)
               for kv_type, form in KV_FORMATS.items()}  # fmt: skip
    scales = [
        score_scale(1 / math.sqrt(d), kv_type) for d in (32, 96, 256) for kv_type in KV_FORMATS
    ]
    digest = hashlib.sha256(json.dumps([constants, formats, scales], sort_keys=True).encode())
    probe = np.ldexp(np.arange(-31.0, 32.0).reshape(3, 21) / 37, np.arange(-10, 11))
    for values in (*quantize_q(probe), exp2(np.arange(0, 1 << SCORE_FRAC_BITS, 4093))):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ErrorBound:
    """How far a normalised partial may lie from exact attention over the same stored K and V.

    Attributes
    ----------
    score : float
        Of one score, in log2 units.
    weight : float
        Of one weight p, as a share of it.
    product : float
        Of one product p * v, as a share of the largest of its tile, for its head and 32 channels.
    total : float
        Of the sum of p that out is divided by, as a share of it, beyond the errors of the weights.
    out : float
        Of an element of out, as a share of the largest |v| (at least the smallest normal number),
        whatever the data; `out_error` tells far more where they are known. Infinite where scores
        are so large that their own error may be.
    lse_ln : float
        Of the log-sum-exp, absolute.
    tiles, tile_tokens : int
    """

    score: float
    weight: float
    product: float
    total: float
    out: float
    lse_ln: float
    tiles: int
    tile_tokens: int

    def out_error(self, weights, v, kv_type: KvType) -> np.ndarray:
        """The bound of each element of one head's out.

        With w the exact weights, a = sum of w |v| / sum of w and m the largest w |v| in a tile and a block
        of 32 channels (elements below the smallest normal number count as that there):

        - out is a weighted mean that is normalised by the same weights; so weights that are off by a
          share e, each in its own direction, move it by e / (1 - e) * (a + |out|) at most;
        - each product is off by the share `product` of m, the tokens of a tile by as many times that;
        - each tile may lose a unit of the largest E of all tiles, 2^-37 of the largest m;
        - the sum of p moves out by its own share;
        - of tokens whose weights are so small that they are 0, 2^-62 |v| each is lost.

        Parameters
        ----------
        weights : float64 (kv_len,)
            Exact weights, 2^score in any unit.
        v : float64 (kv_len, head_dim)
            Stored values.
        kv_type : KvType

        Returns
        -------
        float64 (head_dim,)
        """
        weights, v = np.asarray(weights, np.float64), np.asarray(v, np.float64)
        if math.isinf(self.out):
            return np.full(v.shape[1], np.inf)
        total = weights.sum()
        size = np.abs(v)
        mean, out = weights @ size / total, np.abs(weights @ v) / total
        starts = np.arange(0, len(v), self.tile_tokens)
        products = weights[:, None] * np.maximum(size, KV_FORMATS[kv_type].smallest_normal)
        largest = np.maximum.reduceat(products, starts)  # (tiles, head_dim)
        largest = largest.reshape(len(starts), -1, BLOCK_TOKENS).max(axis=2)
        tokens = np.diff(starts, append=len(v))
        lost = self.product * (tokens @ largest) + 2.0**-37 * self.tiles * largest.max(axis=0)
        lost = np.repeat(lost / total, BLOCK_TOKENS)
        lost += 2.0**-62 * self.tile_tokens * size.max(axis=0)
        return self._out_error(mean, out, lost)

    def _out_error(self, mean, out, lost):
        """Of what is lost of the products, as a share of the sum of weights; the other two of |v|."""
        moved = self.weight / (1 - self.weight) * (mean + out)
        # The products are those of the card's own weights, and so is their sum.
        lost = lost * (1 + self.weight) / (1 - self.weight)
        return (moved + lost + self.total * out) / (1 - self.total)


def error_bound(
    head_dim: int, kv_len: int, product_max: float, *, tile_tokens: int = TILE_TOKENS,
    q_exact: bool = False,
) -> ErrorBound:  # fmt: skip
    """The worst case of all roundings, from the formats alone. Nothing in it is fitted.

    Let f bound every |q[r] k[r]| * scale * log2(e) of a block as the card sees it: exponents are
    whole, so f <= 4 * product_max, and f corresponds to 2^39 units of S. Then

    - K is off by half a unit of x and q by half a unit of w (nothing if q_exact), with w <= 2^17 and
      x <= 2^22: S by at most head_dim * (2^16 + 2^21 + 1/4) units; dropping 13 bits: 2^13 more;
    - the scale has 24 bits: 2^-24 of |score| <= head_dim * f; the score is rounded: 2^-21.
    - 2^(score - tile_max) is off by the share 2^score_error * (1 + 2^-20.5) - 1, and its mantissa of 17
      bits by 2^-17 more.
    - A token's product lies `common + rest` binades below the largest of its head and block, E. x loses
      half a unit by the first, against a weight of at most 2^(17 - rest); the weight half a unit by
      the second (nothing if that is 0), against x of at most 2^22. The largest product is at least
      2^16 * 2^21 of these units; so a product is off by 2^-16 + 2^-22 of it.
    - Each term of the sums is cut off to 30 fraction bits. A tile's largest weight is at least 1/2: the
      sum over its T tokens is off by T * 2^-29 of itself. Limbs that are dropped: one unit of the largest
      tile's for each tile, 2^-38 of the sum. Weights below 2^-63 are 0: T * 2^-62.
    - Without knowing the data, the weighted mean of |v| is at most v_max, and T times the largest
      product of each tile at most T v_max times the sum of the weights.

    The worst case is far from the usual one: errors of 128 tokens rarely have one sign.

    Parameters
    ----------
    head_dim, kv_len, tile_tokens : int
    product_max : float
        The largest over channels r and tokens of |q[r]| * |k[r]| * scale * log2(e), |q[r]| being
        the largest over the heads of the group, |k[r]| at least the smallest normal number.
    q_exact : bool
        True if every head's elements are fp16 within 6 binades of their channel's largest.
    """
    full_scale = 4 * product_max
    units = head_dim * (2.0**16 + (0 if q_exact else 2.0**21 + 0.25)) + 2.0**RAW_SHIFT
    score = full_scale * (units * 2.0**-39 + head_dim * 2.0**-SCALE_BITS) + 2.0**-21
    tiles = -(-max(kv_len, 1) // tile_tokens)
    product = 2.0**-16 + 2.0**-22
    total = tile_tokens * (2.0**-29 + 2.0**-62) + tiles * 2.0**-38
    power = 2.0**-20.5
    share = math.expm1(score * math.log(2)) * (1 + power) + power
    weight = share * (1 + 2.0**-P_BITS) + 2.0**-P_BITS
    if weight >= 1 or share + total >= 1:
        return ErrorBound(score, math.inf, product, total, math.inf, math.inf, tiles, tile_tokens)
    lse_ln = -math.log1p(-(share + total))
    bound = ErrorBound(score, weight, product, total, 0.0, lse_ln, tiles, tile_tokens)
    lost = tile_tokens * (product + 2.0**-62) + tiles * 2.0**-37
    return replace(bound, out=bound._out_error(1.0, 1.0, lost))


class Wide:
    """Exact sums of o * 2^X: four limbs at absolute powers of 2^16, under a moving top.

    A value is the sum over j of limb[j] * 2^(16 * (top - 3 + j)). Adding aligns both operands to the
    larger top and drops limbs that fall below the window, whole. What is dropped depends on the
    final top alone, not on the order of additions, so addition is associative and commutative, bit
    for bit. (The idea is that of reproducible summation: Demmel and Nguyen, ARITH 2013.)

    Dropping costs at most one unit of the lowest limb per term: below 2^X_max for the largest X.

    Parameters
    ----------
    limbs : int64 (..., 4)
    top : int64 (...)
    """

    def __init__(self, limbs: np.ndarray, top: np.ndarray):
        self.limbs, self.top = limbs, top

    @classmethod
    def of(cls, mantissa: np.ndarray, exponent: np.ndarray) -> "Wide":
        """mantissa * 2^exponent; |mantissa| < 2^47, shapes broadcast."""
        mantissa, exponent = np.broadcast_arrays(
            np.asarray(mantissa, np.int64), np.asarray(exponent, np.int64)
        )
        place = exponent + WINDOW_TOP
        z = mantissa << ((place & (LIMB_STEP - 1)) + 1)
        mask = (1 << LIMB_STEP) - 1
        limbs = np.stack([z & mask, (z >> 16) & mask, (z >> 32) & mask, z >> 48], axis=-1)
        return cls(limbs, place >> 4)

    def sum(self, axis: int) -> "Wide":
        """The sum along one axis (negative axes count from the last axis of `top`)."""
        axis %= self.top.ndim
        top = self.top.max(axis=axis, keepdims=True)
        limbs = self._at(top).sum(axis=axis)
        return Wide(limbs, np.squeeze(top, axis))

    def __add__(self, other: "Wide") -> "Wide":
        top = np.maximum(self.top, other.top)
        return Wide(self._at(top) + other._at(top), top)

    def _at(self, top: np.ndarray) -> np.ndarray:
        """Limbs under a top that is not below ours."""
        down = np.minimum(top - self.top, N_LIMBS)[..., None]
        source = np.arange(N_LIMBS) + down
        taken = np.take_along_axis(
            np.broadcast_to(self.limbs, np.broadcast_shapes(self.limbs.shape, source.shape)),
            np.minimum(source, N_LIMBS - 1),
            axis=-1,
        )
        return np.where(source < N_LIMBS, taken, 0)

    def to_float(self) -> tuple[np.ndarray, np.ndarray]:
        """(m, e) with value m * 2^e: m float64, rounded once; e int64."""
        limbs = self.limbs
        high = (limbs[..., 3] << 16) + limbs[..., 2]
        low = (limbs[..., 1] << 16) + limbs[..., 0]
        return high * 2.0**32 + low, LIMB_STEP * (self.top - (N_LIMBS - 1))

    def pack(self) -> np.ndarray:
        """As the card writes it: uint64 (..., 2)."""
        mask = np.int64((1 << LIMB_BITS) - 1)
        l0, l1, l2, l3 = (self.limbs[..., j] & mask for j in range(N_LIMBS))
        low = l0 | (l1 << 28) | (l2 << 56)
        high = (l2 >> 8) | (l3 << 20) | (self.top << 48)
        return np.stack([low, high], axis=-1).view(np.uint64)

    @classmethod
    def unpack(cls, words: np.ndarray) -> "Wide":
        """The inverse of `pack`; words is uint64 (..., 2)."""
        low, high = np.moveaxis(np.ascontiguousarray(words).view(np.int64), -1, 0)
        sign = 64 - LIMB_BITS

        def signed(x):
            return (x << sign) >> sign

        unsigned_low = (low >> 56) & 0xFF
        limbs = [signed(low), signed(low >> 28), signed(unsigned_low | (high << 8)),
                 signed(high >> 20)]  # fmt: skip
        return cls(np.stack(limbs, axis=-1), high >> 48)


assert N_LIMBS * LIMB_BITS + 16 == 8 * WIDE_BYTES
