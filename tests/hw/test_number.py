# SPDX-License-Identifier: Apache-2.0
"""The numbers keep what they promise: exp2, the weights of q, the scale, and exact wide sums."""

from fractions import Fraction
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from nearkv_hw import number
from nearkv_hw.abi import MAX_TILES, TILE_TOKENS, KvType
from nearkv_hw.number import KV_FORMATS, LIMB_BITS, WEIGHT_BITS, WEIGHT_MAX, Wide

# --- K and V --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", KvType)
def test_an_aligned_element_is_worth_what_the_format_says(kv_type):
    """Every finite element is x * 2^(E - unit), with x its significand shifted by align_bits."""
    form = KV_FORMATS[kv_type]
    patterns = np.arange(1 << 15)
    field = patterns >> form.mantissa_bits
    finite = field != form.exponent_max
    significand = (patterns & ((1 << form.mantissa_bits) - 1)) | np.where(
        field > 0, 1 << form.mantissa_bits, 0
    )
    x = significand << form.align_bits
    assert x.max() < 1 << (number.KV_BITS - 1)
    if kv_type == KvType.FP16:
        want = patterns.astype(np.uint16).view(np.float16)
    else:
        want = (patterns.astype(np.uint32) << 16).view(np.float32)
    exponent = np.maximum(field, 1)
    got = np.ldexp(x.astype(np.float64), exponent - form.unit)
    np.testing.assert_array_equal(got[finite], want[finite].astype(np.float64))
    assert not np.isfinite(want[~finite]).any()


# --- q --------------------------------------------------------------------------------------------


def test_q_is_exact_for_fp16_heads_within_6_binades(rng):
    q = rng.integers(1 << 10, 1 << 11, (8, 4000)) * rng.choice([-1, 1], (8, 4000))
    q = np.ldexp(q.astype(np.float64), rng.integers(-6, 1, (8, 4000)) + rng.integers(-10, 4, 4000))
    assert (q.astype(np.float16) == q).all()
    weight, exponent = number.quantize_q(q.astype(np.float16))
    assert weight.dtype == exponent.dtype == np.int32
    np.testing.assert_array_equal(np.ldexp(weight, exponent - 17), q)


def test_q_weights_are_rounded_to_half_a_unit_and_stay_in_range(rng):
    q = rng.standard_normal((5, 3000)) * 2.0 ** rng.integers(-600, 500, 3000)
    weight, exponent = number.quantize_q(q)
    assert np.abs(weight).max() <= WEIGHT_MAX == (1 << (WEIGHT_BITS - 1)) - 1
    assert exponent.min() >= number.Q_EXPONENT_MIN
    assert exponent.max() <= number.Q_EXPONENT_MAX
    error = np.abs(np.ldexp(q, 17 - exponent) - weight)
    clipped = np.abs(weight) == WEIGHT_MAX
    assert error[~clipped].max() <= 0.5
    assert error.max() <= 1


@settings(max_examples=200)
@given(st.floats(min_value=-(2.0**511), max_value=2.0**511, exclude_min=True, exclude_max=True))
def test_one_q_comes_back_within_2_to_the_minus_17_of_itself(value):
    weight, exponent = number.quantize_q([[value]])
    error = abs(
        Fraction(int(weight[0, 0])) * Fraction(2) ** (int(exponent[0]) - 17) - Fraction(value)
    )
    # A weight of 2^17 would not fit: the largest is half a unit less than it may be.
    assert error <= Fraction(2) ** -17 * max(abs(Fraction(value)), Fraction(2) ** -513)


def test_a_channel_of_zeros_has_the_least_exponent():
    weight, exponent = number.quantize_q(np.zeros((3, 2)))
    assert not weight.any()
    assert (exponent == number.Q_EXPONENT_MIN).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_q_that_is_not_finite_is_refused_by_place(bad):
    q = np.zeros((3, 32))
    q[2, 7] = bad
    with pytest.raises(ValueError, match="head 2, channel 7 is"):
        number.quantize_q(q)


def test_q_beyond_the_exponent_range_is_refused():
    number.quantize_q(np.full((1, 1), np.nextafter(2.0**511, 0)))
    with pytest.raises(ValueError, match=r"below 2\^511"):
        number.quantize_q(np.full((1, 1), 2.0**511))


# --- scale ----------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.floats(min_value=1e-30, max_value=1e30),
    st.sampled_from(list(KvType)),
    st.integers(-600, 600),
)
def test_scale_turns_sums_into_log2_units_within_2_to_the_minus_24(scale, kv_type, exponent):
    mantissa, shift = number.score_scale(scale, kv_type)
    assert 1 << 23 <= mantissa < 1 << 24
    # S counts 2^(E - unit - 17); the score (S >> 13) * mantissa >> (shift - E) counts 2^-20.
    got = Fraction(mantissa) / Fraction(2) ** (13 + shift - exponent) / Fraction(2) ** 20
    unit = Fraction(2) ** (exponent - KV_FORMATS[kv_type].unit - 17)
    want = unit * Fraction(scale) * Fraction(math.log2(math.e))
    assert abs(got / want - 1) < Fraction(2) ** -24 + Fraction(2) ** -50


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="scale must be positive and below"):
        number.score_scale(scale, KvType.FP16)


# --- exp2 -----------------------------------------------------------------------------------------


def test_exp2_of_all_inputs_is_within_its_bound_in_range_and_never_falls():
    fraction = np.arange(1 << 20)
    got = number.exp2(fraction)
    exact = np.exp2(fraction / 2.0**20) * 2.0**22  # to 2^-52: exact enough by far
    worst = np.abs(got / exact - 1).max()
    print(f"worst relative error 2^{np.log2(worst):.3f}")
    assert worst < 2.0**-20.5
    assert got.min() >= 1 << 22
    assert got.max() < 1 << 23
    assert (np.diff(got) >= 0).all()
    assert got[0] == (1 << 22) + 2


def test_exp2_table_comes_out_of_decimal_arithmetic_with_the_same_bits_everywhere():
    table = number.exp2_table()
    assert table.shape == (16, 3)
    # A spread sample; the whole table is checked through the values above.
    exact = 2.0 ** (np.arange(16) / 16) * 2.0**26
    assert np.abs(table[:, 0] - exact).max() < 2.0**26 * 2.0**-19
    # The products of the gateware fit its registers.
    assert table[:, 0].max() < 1 << 27
    assert (table[:, 1] + (table[:, 2] * 0xFFFF >> 16)).max() < 1 << 24


# --- wide sums ------------------------------------------------------------------------------------

MANTISSA = (1 << number.WINDOW_TOP) - 1
# As in the accelerator: tile_max 16 bits, and E.
terms = st.tuples(st.integers(-MANTISSA, MANTISSA), st.integers(-33792, 33791))
# Close together, so that limbs meet, and a few far away.
near = st.tuples(st.integers(-MANTISSA, MANTISSA), st.integers(-70, 70))
sums = st.lists(st.one_of(near, near, terms), min_size=1, max_size=12)


def exact(wide) -> Fraction:
    base = Fraction(2) ** (16 * (int(wide.top) - 3))
    return base * sum(int(limb) << 16 * j for j, limb in enumerate(wide.limbs))


def bits_of(wide):
    return (*(int(limb) for limb in wide.limbs), int(wide.top))


def fold(items, cuts):
    """Adds in some association: `cuts` picks, time after time, which neighbours to add."""
    parts = [Wide.of(m, e) for m, e in items]
    cuts = iter(cuts)
    while len(parts) > 1:
        i = next(cuts) % (len(parts) - 1)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0]


@given(terms)
def test_a_number_is_held_exactly(term):
    mantissa, exponent = term
    wide = Wide.of(mantissa, exponent)
    assert exact(wide) == Fraction(mantissa) * Fraction(2) ** exponent
    assert all(0 <= limb < 1 << 16 for limb in wide.limbs[:3])
    assert -(1 << 15) <= wide.limbs[3] < 1 << 15


@settings(max_examples=100)
@given(sums, st.data())
def test_any_order_and_association_of_additions_gives_the_same_bits(items, data):
    cuts = st.lists(st.integers(0, 100), min_size=len(items), max_size=len(items))
    one = fold(items, data.draw(cuts))
    other = fold(data.draw(st.permutations(items)), data.draw(cuts))
    assert bits_of(one) == bits_of(other)
    arrays = Wide.of(*np.array(items, np.int64).T)
    assert bits_of(arrays.sum(0)) == bits_of(one)


@settings(max_examples=100)
@given(sums, st.integers(0, 12))
def test_any_split_into_two_sums_merges_to_the_same_bits(items, cut):
    arrays = Wide.of(*np.array(items, np.int64).T)
    cut %= len(items)
    whole = arrays.sum(-1)
    if cut:
        left = Wide(arrays.limbs[:cut], arrays.top[:cut]).sum(0)
        right = Wide(arrays.limbs[cut:], arrays.top[cut:]).sum(0)
        assert bits_of(left + right) == bits_of(right + left) == bits_of(whole)


@settings(max_examples=100)
@given(sums)
def test_a_sum_loses_less_than_one_unit_of_the_largest_term_for_each_term(items):
    wide = Wide.of(*np.array(items, np.int64).T).sum(0)
    want = sum(Fraction(m) * Fraction(2) ** e for m, e in items)
    largest = max(e for _, e in items)
    assert abs(exact(wide) - want) <= len(items) * Fraction(2) ** largest


@settings(max_examples=100)
@given(st.lists(near, min_size=1, max_size=12))
def test_a_sum_of_terms_within_one_limb_is_exact(items):
    items = [(m, e % 16 + 1) for m, e in items]  # the same top for all
    wide = Wide.of(*np.array(items, np.int64).T).sum(0)
    assert exact(wide) == sum(Fraction(m) * 2**e for m, e in items)


@settings(max_examples=100)
@given(sums)
def test_pack_and_unpack_are_inverse(items):
    arrays = Wide.of(*np.array(items, np.int64).T)
    for wide in (arrays, arrays.sum(0)):
        words = wide.pack()
        assert words.dtype == np.uint64
        assert words.shape == (*wide.top.shape, 2)
        again = Wide.unpack(words)
        np.testing.assert_array_equal(again.limbs, wide.limbs)
        np.testing.assert_array_equal(again.top, wide.top)


def test_pack_puts_limbs_and_top_where_the_abi_says():
    limbs, top = [-1, 2, -(1 << 27), (1 << 27) - 1], -2110
    low, high = (int(word) for word in Wide(np.array(limbs), np.array(top)).pack())
    value = low | high << 64
    for j, limb in enumerate(limbs):
        assert value >> LIMB_BITS * j & (1 << LIMB_BITS) - 1 == limb % (1 << LIMB_BITS)
    assert value >> 112 == top % (1 << 16)


@settings(max_examples=100)
@given(sums)
def test_to_float_rounds_once(items):
    wide = Wide.of(*np.array(items, np.int64).T).sum(0)
    mantissa, exponent = wide.to_float()
    want = exact(wide) / Fraction(2) ** int(exponent)
    assert want.denominator == 1
    assert float(mantissa) == float(int(want))  # int to float rounds correctly


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("spread", [0, 1, 15, 16, 40, 64])
def test_the_longest_job_overflows_no_limb(rng, sign, spread):
    """MAX_TILES tiles of the largest sums, at every place on the limb grid."""
    for place in range(16):
        exponent = place - rng.integers(0, spread + 1, MAX_TILES)
        exponent[0] = place
        # Magnitudes that fill all limbs, and the largest one.
        for mantissa in (MANTISSA, MANTISSA - 1, MANTISSA // 3):
            wide = Wide.of(np.full(MAX_TILES, sign * mantissa), exponent).sum(0)
            assert np.abs(wide.limbs).max() < 1 << (LIMB_BITS - 1)
            np.testing.assert_array_equal(Wide.unpack(wide.pack()).limbs, wide.limbs)


def test_the_largest_sums_of_a_tile_fit_the_window():
    x_max, p_max = 1 << 22, number.P_MAX
    assert TILE_TOKENS * x_max * p_max <= MANTISSA
    # A weight of the maximum is 1, or 1 + 2^-21 before it is rounded; all others are halved at least once.
    one = int(number.exp2(np.array([0]))[0])
    sums = TILE_TOKENS * (one << number.SUM_FRAC_BITS - number.POWER_FRAC_BITS)
    assert TILE_TOKENS << number.SUM_FRAC_BITS <= sums < 1 << number.TILE_SUM_BITS
    assert sums << number.SUM_SHIFT <= MANTISSA
    assert number.SUM_UNIT == number.SUM_FRAC_BITS + number.SUM_SHIFT
    assert 1 << number.OUT_UNIT == (number.P_MAX + 1) // 2  # the least mantissa
    # K: 256 channels of the largest weight and element.
    assert 256 * WEIGHT_MAX * x_max < 1 << (number.ACC_BITS - 1)
