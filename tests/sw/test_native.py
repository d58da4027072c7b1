# SPDX-License-Identifier: Apache-2.0
"""What the host computes natively: the bits of numpy, whatever the instructions; and what both must be."""

import ctypes
import importlib.util
import math
from pathlib import Path
import shutil
import subprocess
import sysconfig

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from nearkv.attention import Partial, elementary, native, query
from nearkv.attention.fold import Sums
from nearkv.attention.tail import FEW_TOKENS, Tail, stored_form
from nearkv_hw import abi, number, pages
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.number import Wide
from nearkv_sim.reference import attention as reference


def both(function):
    """Calls a function natively, then in numpy; the bits must be the same. Returns the result."""
    if native.library() is None:
        pytest.skip("the native part of nearkv.attention is not compiled: make setup")
    got = function()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        want = function()
    _assert_same_bits(got, want)
    return want


def _assert_same_bits(a, b):
    if isinstance(a, bool):
        assert a == b
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            _assert_same_bits(x, y)
    elif isinstance(a, Partial):
        _assert_same_bits(
            (a.run_max, a.sums.limbs, a.sums.top), (b.run_max, b.sums.limbs, b.sums.top)
        )
    else:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)
        same = a.view(np.uint8) == b.view(np.uint8)  # signs of zero as well
        assert (same.reshape(*a.shape, -1).all(-1) | (a != a)).all()


# --- elementary functions --------------------------------------------------------------------


def _call(name, x):
    library = native.library()
    if library is None:
        pytest.skip("the native part of nearkv.attention is not compiled: make setup")
    x = np.ascontiguousarray(x, np.float64)
    out = np.empty_like(x)
    getattr(library, f"native_{name}")(x.ctypes.data, x.size, out.ctypes.data)
    return out


def test_exp2_is_accurate_and_exact_for_integers():
    x = -np.concatenate(
        [np.random.default_rng(0).uniform(0, 1000, 10000), np.logspace(-20, 3, 999)]
    )
    got, want = elementary.exp2(x), np.exp2(x.astype(np.longdouble))
    assert (np.abs(got - want) <= want * 2.0**-51).all()
    whole = np.arange(0.0, -1001, -1)
    np.testing.assert_array_equal(elementary.exp2(whole), np.ldexp(1.0, whole.astype(int)))
    np.testing.assert_array_equal(
        elementary.exp2(np.array([-1000.5, -np.inf, np.nan, -0.0])), [0, 0, np.nan, 1]
    )


def test_log2_is_accurate_and_exact_for_powers_of_two():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0.5, 2, 10000), 2.0 ** rng.uniform(-1000, 1000, 10000)])
    got, want = elementary.log2(x), np.log2(x.astype(np.longdouble))
    assert (np.abs(got - want) <= np.maximum(1, np.abs(want)) * 2.0**-51).all()
    # Close to 1 it is accurate beside its own size, too.
    near = 1 + rng.uniform(-1e-3, 1e-3, 1000)
    want = np.log2(near.astype(np.longdouble))
    assert (np.abs(elementary.log2(near) - want) <= np.abs(want) * 2.0**-50).all()
    whole = np.arange(-1022.0, 1024)
    np.testing.assert_array_equal(elementary.log2(2.0**whole), whole)
    np.testing.assert_array_equal(elementary.log2(np.array([0.0, np.nan])), [-np.inf, np.nan])


def test_elementary_functions_have_the_same_bits_natively():
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [-rng.uniform(0, 1100, 100000), -(2.0 ** rng.uniform(-60, 11, 10000)),
         -np.arange(0, 1010, 0.25), [-np.inf, np.nan, -0.0, -1e300]]
    )  # fmt: skip
    _assert_same_bits(_call("exp2", x), elementary.exp2(x))
    x = np.concatenate(
        [2.0 ** rng.uniform(-1074, 1023, 10000), rng.uniform(0, 4, 100000), [0.0, np.nan]]
    )
    _assert_same_bits(_call("log2", x), elementary.log2(x))


# --- queries ---------------------------------------------------------------------------------


def _records(q):
    """int32 (n_queries, head_dim, 16)"""
    image = query.job_image(np.zeros(0, np.uint8), q, np.arange(len(q)), 0)
    return image.view(np.int32).reshape(len(q), q.shape[2], 16)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), n_jobs=st.integers(0, 4), width=st.integers(1, 14),
    head_dim=st.sampled_from([32, 64, 160]), dtype=st.sampled_from(["f2", "f4", "f8"]),
    spread=st.sampled_from([0, 3, 20, 600]),
)  # fmt: skip
def test_query_records_are_those_of_quantize_q(seed, n_jobs, width, head_dim, dtype, spread):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        q = rng.standard_normal((n_jobs, width, head_dim))
        q = q * 2.0 ** rng.integers(-spread, spread + 1, q.shape)
        q = np.clip(q, -(2.0**510), 2.0**510)
        q[rng.random(q.shape) < 0.2] = 0
        q[..., : head_dim // 8] = 0  # whole channels
        q = q.astype(dtype)
    if np.isinf(q).any():
        q = np.where(np.isinf(q), np.finfo(dtype).max, q).astype(dtype)
    records = _records(q)
    for job, its in zip(q, records, strict=True):
        weight, exponent = number.quantize_q(job)
        np.testing.assert_array_equal(its[:, :width], weight.T)
        np.testing.assert_array_equal(its[:, width:15], 0)
        np.testing.assert_array_equal(its[:, 15], exponent)


def test_the_image_of_jobs_has_a_front_and_zeros(monkeypatch):
    q = np.random.default_rng(0).standard_normal((6, 5, 32))
    where, front = np.array([5, 0, 5, 2]), np.arange(64, dtype=np.uint8)
    for _ in "native", "numpy":
        image = query.job_image(front, q, where, 100)
        np.testing.assert_array_equal(image[:64], front)
        np.testing.assert_array_equal(image[64:-100].view(np.int32), _records(q)[where].reshape(-1))
        np.testing.assert_array_equal(image[-100:], 0)
        for wrong in ([0, 6], [-1, 0]):
            with pytest.raises(IndexError, match="queries must be among 6"):
                query.job_image(front, q, np.array(wrong), 0)
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**511, -(2.0**700)])
def test_queries_that_no_card_can_take_are_refused(bad, monkeypatch):
    q = np.ones((2, 3, 32))
    q[1, 2, 5] = bad
    for _ in "native", "numpy":
        with pytest.raises(ValueError, match=r"q must be (finite|below 2\^511)"):
            _records(q)
        monkeypatch.setattr(native, "library", lambda: None)
    q[1, 2, 5] = -np.nextafter(2.0**511, 0)
    assert _records(q)[1, 5, 15] == number.Q_EXPONENT_MAX


# --- partials --------------------------------------------------------------------------------


def _card_bytes(rng, n_partials, width, head_dim, *, empty=0.1, spread=3, first_top=-40):
    """Partials as a card could leave them: limbs of any sign, tops that differ."""
    rows, elements = abi.partial_rows(width), 2 + head_dim
    data = np.zeros((n_partials, abi.partial_bytes(head_dim, width)), np.uint8)
    run_max = rng.integers(-32768, 32768, (n_partials, 16))
    limbs = rng.integers(-(2**27), 2**27, (n_partials, elements, rows, number.N_LIMBS))
    limbs[rng.random(limbs.shape) < 0.2] = 0
    limbs[:, :2, :, 3] = rng.integers(0, 2**16, limbs[:, :2, :, 3].shape)  # sums of p are positive
    top = first_top + rng.integers(-spread, spread + 1, (n_partials, elements, rows))
    none = rng.random(n_partials) < empty
    limbs[none], top[none], run_max[none] = 0, -(1 << 15), number.RUN_MAX_EMPTY
    header = abi.PARTIAL_HEADER["run_max"].offset
    data[:, header : header + 32] = run_max.astype("<i2").view(np.uint8)
    packed = Wide(limbs, top).pack().view(np.uint8)
    packed = packed.reshape(n_partials, elements * rows * abi.WIDE_BYTES)
    fields = {"status": Status.DONE, "tag": np.arange(n_partials)}
    for name, values in fields.items():
        data.view("<u4")[:, abi.PARTIAL_HEADER[name].offset // 4] = values
    start = abi.PARTIAL_HEADER.bytes
    data[:, start : start + packed.shape[1]] = packed
    return data, run_max[:, :width].astype(np.int16), Wide(limbs[:, :, :width], top[:, :, :width])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), n_jobs=st.integers(1, 5), width=st.integers(1, 14),
    counts=st.lists(st.integers(0, 9), max_size=4), spread=st.sampled_from([0, 1, 3, 6]),
)  # fmt: skip
def test_sums_are_those_of_wide_however_the_partials_come(seed, n_jobs, width, counts, spread):
    rng = np.random.default_rng(seed)
    layout = PageLayout(32)
    runs = [
        (rng.integers(0, n_jobs, count), *_card_bytes(rng, count, width, 32, spread=spread))
        for count in counts
    ]

    def fold():
        sums = Sums(layout, n_jobs, width)
        for where, data, *_ in runs:
            assert sums.add(where, data)
        return sums.total()

    got = both(fold)
    for job in range(n_jobs):
        want = Partial.empty(layout.kv_type, (width,), 32)
        for where, _, run_max, wide in runs:
            for i in np.flatnonzero(where == job):
                its = Wide(wide.limbs[i].swapaxes(0, 1), wide.top[i].swapaxes(0, 1))
                want = want + Partial(layout.kv_type, run_max[i], its)
        _assert_same_bits(got[job], want)


def test_a_partial_of_no_job_is_refused_and_nothing_added(monkeypatch):
    data, *_ = _card_bytes(np.random.default_rng(0), 2, 3, 32)
    for _ in "native", "numpy":
        sums = Sums(PageLayout(32), 2, 3)
        for wrong in -1, 2:
            with pytest.raises(IndexError, match="among 2, not"):
                sums.add(np.array([0, wrong]), data)
        _assert_same_bits(sums.total(), Partial.empty(KvType.FP16, (2, 3), 32))
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("status", 0), ("status", Status.DONE | Status.BAD_CRC_K), ("tag", 0), ("tag", 1 << 31)],
)
def test_partials_are_added_only_if_all_are_good(monkeypatch, field, value):
    data, *_ = _card_bytes(np.random.default_rng(0), 3, 3, 32)
    data.view("<u4")[2, abi.PARTIAL_HEADER[field].offset // 4] = value
    for _ in "native", "numpy":
        sums = Sums(PageLayout(32), 2, 3)
        assert not sums.add(np.array([0, 1, 0]), data)
        _assert_same_bits(sums.total(), Partial.empty(KvType.FP16, (2, 3), 32))
        assert sums.add(np.array([0, 1]), data[:2])
        monkeypatch.setattr(native, "library", lambda: None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), first_top=st.sampled_from([-2040, -70, -3, 60, 2000]),
    spread=st.sampled_from([0, 2, 100]), kv_type=st.sampled_from(list(KvType)),
    without=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_normalised_and_combined_partials_have_the_same_bits(
    seed, first_top, spread, kv_type, without
):
    rng = np.random.default_rng(seed)
    layout = PageLayout(32, 128, kv_type)
    data, *_ = _card_bytes(rng, 4, 3, 32, empty=without, spread=spread, first_top=first_top)
    sums = Sums(layout, 4, 3)
    sums.add(np.arange(4), data)
    whole = sums.total()
    # A part of the rows, and parts that do not lie behind each other.
    for some in (whole, whole[:, :2], whole.reshape(2, 2, 3)[:, 1], whole + whole):
        with np.errstate(all="ignore"):  # some are far from what a card gives
            _, lse_log2 = both(some.normalise)
            other = lse_log2 + rng.uniform(-60, 60, lse_log2.shape)
            other = np.where(np.isneginf(other), rng.uniform(-60, 60, other.shape), other)
            other[rng.random(other.shape) < without] = -np.inf
            values = rng.standard_normal((*other.shape, 32))
            both(lambda some=some, values=values, other=other: some.combine(values, other))


def test_combine_is_the_merge_of_both_parts():
    rng = np.random.default_rng(0)
    n_tokens, head_dim = 300, 32
    q, k, v = (
        rng.standard_normal(shape) for shape in ((2, 32), (n_tokens, 1, 32), (n_tokens, 1, 32))
    )
    out, lse = (
        np.array(x)
        for x in zip(
            *(reference(q, k[a:b], v[a:b]) for a, b in ((0, 200), (200, 300))), strict=True
        )
    )
    # A partial whose normalised form is the first part.
    lse_log2 = lse / math.log(2)
    unit = number.KV_FORMATS[KvType.FP16].unit + number.OUT_UNIT
    weight = 2.0 ** (lse_log2[0] - np.ceil(lse_log2[0]))

    def wide(value, unit, top):
        mantissa = np.rint(value * 2.0**45).astype(np.int64)
        return Wide.of(mantissa, top.astype(np.int64) + unit - 45)

    top = np.ceil(lse_log2[0])
    elements = [wide(weight, number.SUM_UNIT, top), wide(weight, number.SUM_UNIT, top)]
    elements += [wide(out[0, :, c] * weight, unit, top) for c in range(head_dim)]
    sums = Wide(np.stack([w.limbs for w in elements], 1), np.stack([w.top for w in elements], 1))
    part = Partial(KvType.FP16, top.astype(np.int16), sums)
    got = part.combine(out[1], lse_log2[1])
    want, _ = reference(q, k, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-7 * np.abs(want).max())
    nothing = Partial.empty(KvType.FP16, (2,), head_dim)
    np.testing.assert_array_equal(nothing.combine(out[1], lse_log2[1]), out[1].astype(np.float32))
    none = np.full(2, -np.inf)
    np.testing.assert_array_equal(
        part.combine(out[1], none), part.normalise()[0].astype(np.float32)
    )
    np.testing.assert_array_equal(
        nothing.combine(out[1], none), np.zeros((2, head_dim), np.float32)
    )
    with pytest.raises(ValueError, match="do not belong to a partial of shape"):
        part.combine(out[1][:1], lse_log2[1])


# --- tail and new tokens ---------------------------------------------------------------------


def _tail(
    rng, tail_tokens, n_new, kv_type=KvType.FP16, n_heads=2, group=3, head_dim=32, magnitude=1.0
):
    """Arguments of _attend, with Inf behind the tails' ends."""
    batch, capacity = len(tail_tokens), max([*tail_tokens, 1]) + 2

    def patterns(*shape):
        return pages.to_patterns(rng.standard_normal(shape) * magnitude, kv_type)

    tails = [patterns(batch, n_heads, capacity, head_dim) for _ in "kv"]
    for x in tails:
        for b, n in enumerate(tail_tokens):
            x[b, :, n:] = 0x7F80 if kv_type == KvType.BF16 else 0x7C00
    new = [patterns(batch, n_new, n_heads, head_dim).swapaxes(1, 2) for _ in "kv"]
    q = (rng.standard_normal((batch, n_heads, group * n_new, head_dim)) * magnitude).astype(
        np.float32
    )
    valid = rng.random((batch, n_new)) < 0.7
    return [q, *tails, np.array(tail_tokens), *new, valid, head_dim**-0.5, kv_type]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), kv_type=st.sampled_from(list(KvType)), n_new=st.integers(1, 3),
    channels=st.sampled_from([24, 32]), scale=st.integers(-30, 20), odd=st.booleans(),
)  # fmt: skip
def test_new_k_and_v_are_stored_as_their_nearest_patterns(
    seed, kv_type, n_new, channels, scale, odd
):
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((2, n_new, 3, 24)) * 2.0**scale for _ in "kv")
    k, v = (x.astype(np.float32).swapaxes(1, 2) for x in (k, v))  # as models have them
    if odd:
        k, v = (np.repeat(x, 2, axis=3)[..., ::2] for x in (k, v))
    patterns, finite = both(lambda: stored_form(k, v, kv_type, channels))
    want = np.stack([pages.to_patterns(x, kv_type) for x in (k, v)])
    np.testing.assert_array_equal(patterns[..., :24], want)
    np.testing.assert_array_equal(patterns[..., 24:], 0)
    assert finite == (pages.first_non_finite(want, kv_type) is None)
    by_torch = [torch.from_numpy(x) for x in (k, v)]
    _assert_same_bits(both(lambda: stored_form(*by_torch, kv_type, channels)), (patterns, finite))
    doubles = [x.double() for x in by_torch]
    _assert_same_bits(both(lambda: stored_form(*doubles, kv_type, channels)), (patterns, finite))


@pytest.mark.parametrize("kv_type", KvType)
def test_every_rounding_is_to_the_nearest_pattern(kv_type):
    """Every pattern, what lies halfway to the next, and the closest beside that."""
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    exact = pages.to_float32(every[_finite(every, kv_type)], kv_type)
    exact = np.sort(exact)
    with np.errstate(over="ignore"):
        halves = (exact[:-1].astype(np.float64) + exact[1:]) / 2
        halves = halves[halves.astype(np.float32) == halves].astype(np.float32)
        some = [exact, halves, *(np.nextafter(halves, np.float32(x)) for x in (-np.inf, np.inf))]
        some += [np.float32([65519.99, 65520, 65536, 1e38, 3.4e38, np.inf, -np.inf, np.nan, 1e-45])]
        x = np.concatenate(some)
        x = np.resize(x, (-(-len(x) // 8), 1, 1, 8)).astype(np.float32)
        patterns, finite = both(lambda: stored_form(x, x, kv_type, 8))
    assert not finite
    good = np.isfinite(x)
    np.testing.assert_array_equal(patterns[0][good], pages.to_patterns(x, kv_type)[good])
    for value in (np.inf, -np.inf, np.nan):
        for which in range(2):
            two = [np.ones((2, 1, 1, 8), np.float32) for _ in "kv"]
            assert both(lambda two=two: stored_form(*two, kv_type, 8))[1]
            two[which][1, 0, 0, 5] = value
            assert not both(lambda two=two: stored_form(*two, kv_type, 8))[1]


def _finite(patterns, kv_type):
    form = number.KV_FORMATS[kv_type]
    return (patterns >> form.mantissa_bits) & form.exponent_max != form.exponent_max


def _attend(q, tail_k, tail_v, tail_tokens, k, v, valid, scale, kv_type):
    return Tail(tail_k, tail_v, kv_type).attend(q, tail_tokens, k, v, valid, scale)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), tail_tokens=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    n_new=st.integers(1, 5), kv_type=st.sampled_from(list(KvType)), group=st.integers(1, 4),
    head_dim=st.sampled_from([32, 96]), magnitude=st.sampled_from([1e-5, 1.0, 30.0]),
    masked=st.booleans(),
)  # fmt: skip
def test_the_tail_has_the_same_bits_natively(
    seed, tail_tokens, n_new, kv_type, group, head_dim, magnitude, masked
):
    arguments = _tail(
        np.random.default_rng(seed), tail_tokens, n_new, kv_type,
        group=group, head_dim=head_dim, magnitude=magnitude,
    )  # fmt: skip
    if not masked:
        arguments[6] = None
    both(lambda: _attend(*arguments))


@pytest.mark.parametrize("kv_type", KvType)
def test_every_element_reads_as_what_it_is(kv_type):
    """One token: the result is its V, bit for bit; of K, one channel is the score."""
    finite = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    finite = finite[_finite(finite, kv_type)]
    patterns = np.resize(finite, (-(-len(finite) // 32), 1, 1, 32))
    batch = len(patterns)
    q = np.zeros((batch, 1, 1, 32), np.float32)
    none = np.zeros((batch, 1, 0, 32), np.uint16)
    out, lse_log2 = both(
        lambda: _attend(
            q, none, none, np.zeros(batch, np.int64), patterns, patterns, None, 1.0, kv_type
        )
    )
    np.testing.assert_array_equal(out, pages.to_float32(patterns, kv_type))
    np.testing.assert_array_equal(lse_log2, 0)
    q[..., 3] = 1
    _, lse_log2 = both(
        lambda: _attend(
            q, none, none, np.zeros(batch, np.int64), patterns, patterns, None, 1.0, kv_type
        )
    )
    want = pages.to_float32(patterns, kv_type)[..., 3].astype(np.float64) * math.log2(math.e)
    np.testing.assert_array_equal(lse_log2, want)


@pytest.mark.parametrize("n_new", [1, 4, FEW_TOKENS + 1, 300])
@pytest.mark.parametrize("kv_type", KvType)
def test_the_tail_is_attended_as_torch_does_it(kv_type, n_new):
    rng = np.random.default_rng(2)
    q, tail_k, tail_v, tail_tokens, k, v, valid, scale, _ = arguments = _tail(
        rng, [0, 5, 60], n_new, kv_type
    )
    out, lse_log2 = _attend(*arguments)
    for b, past in enumerate(tail_tokens):
        keys, values = (
            torch.from_numpy(
                pages.to_float32(np.concatenate([old[b, :, :past], new[b]], axis=1), kv_type)
            ).double()
            for old, new in ((tail_k, k), (tail_v, v))
        )
        mask = torch.ones(n_new, past + n_new, dtype=torch.bool).tril(past)
        mask[:, past:] &= torch.from_numpy(valid[b])
        mask[:, past:] |= torch.eye(n_new, dtype=torch.bool)
        rows = torch.from_numpy(q[b]).double().view(2, 3, n_new, 32)
        want = torch.nn.functional.scaled_dot_product_attention(
            rows, keys[:, None], values[:, None], mask, scale=scale
        )
        bound = 1e-13 if n_new <= FEW_TOKENS else 2e-6
        np.testing.assert_allclose(out[b], want.view(2, -1, 32).numpy(), rtol=0, atol=bound)
        scores = rows @ keys[:, None].transpose(-1, -2) * scale
        lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).view(2, -1).numpy()
        np.testing.assert_allclose(lse_log2[b] * math.log(2), lse, rtol=bound, atol=bound)


def test_what_a_query_sees_depends_on_nothing_else():
    """A sequence alone gives the bits it has in a batch; tokens given at once those one by one."""
    arguments = _tail(np.random.default_rng(3), [7, 0, 40], 3)
    out, lse_log2 = _attend(*arguments)
    for b in range(3):
        alone = [x[b : b + 1] if isinstance(x, np.ndarray) else x for x in arguments]
        _assert_same_bits(_attend(*alone), (out[b : b + 1], lse_log2[b : b + 1]))
    q, tail_k, tail_v, tail_tokens, k, v, _, scale, kv_type = arguments
    out, _ = _attend(q, tail_k, tail_v, tail_tokens, k, v, None, scale, kv_type)
    grown_k, grown_v = (
        np.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0)))
        for x in (tail_k, tail_v)
    )  # fmt: skip
    rows = q.reshape(3, 2, 3, 3, 32)
    for at in range(3):
        one = slice(at, at + 1)
        got, _ = _attend(
            np.ascontiguousarray(rows[:, :, :, at]), grown_k, grown_v, tail_tokens + at,
            k[:, :, one], v[:, :, one], None, scale, kv_type,
        )  # fmt: skip
        _assert_same_bits(got, np.ascontiguousarray(out.reshape(3, 2, 3, 3, 32)[:, :, :, at]))
        for b, past in enumerate(tail_tokens):
            grown_k[b, :, past + at], grown_v[b, :, past + at] = k[b, :, at], v[b, :, at]


def test_inf_and_nan_stay_visible():
    for which, value in ((0, np.nan), (0, np.inf), (4, 0x7C00), (5, 0x7E00)):
        arguments = _tail(np.random.default_rng(4), [6], 1)
        arguments[which] = arguments[which].copy()
        arguments[which][0, 1, 0, 3] = value
        got = _attend(*arguments)
        assert not np.isfinite(got[0][0, 1, 0]).all()
        assert np.isfinite(got[0][0, 0]).all()


def test_what_is_stored_and_what_is_not_become_one():
    rng = np.random.default_rng(7)
    q, tail_k, tail_v, tail_tokens, *rest = _tail(rng, [3, 0], 2)
    *rest, kv_type = rest
    data, *_ = _card_bytes(rng, 4, 6, 32, empty=0.3)
    sums = Sums(PageLayout(32), 4, 6)
    sums.add(np.arange(4), data)
    stored = sums.total().reshape(2, 2, 6)
    tails = Tail(tail_k, tail_v, kv_type)
    out, lse_log2 = tails.attend(q, tail_tokens, *rest)
    with np.errstate(all="ignore"):
        whole = both(lambda: stored.combine(*tails.attend(q, tail_tokens, *rest)))
        _assert_same_bits(whole, stored._combine(out, lse_log2))
    with pytest.raises(ValueError, match="do not belong"):
        stored[:1].combine(out, lse_log2)


def test_tails_that_do_not_fit_are_refused():
    good = _tail(np.random.default_rng(5), [6, 2], 2)
    q, tail_k, _, tail_tokens, k, *_ = good
    for at, wrong, message in (
        (0, q[:, :1], "do not belong"), (0, q[:, :, :5], "do not belong"),
        (1, tail_k[:1], "must be alike"), (2, tail_k[..., :16], "must be alike"),
        (1, tail_k.astype(np.int32), "must be uint16"), (3, tail_tokens[:1], "do not belong"),
        (4, k[:, :, :1], "do not belong"), (5, k[:, :1], "do not belong"),
        (5, np.repeat(k, 2, axis=3)[..., ::2], "do not belong"),
        (6, np.ones((2, 3), bool), "do not belong"),
        (3, [9, 2], "room for 8 tokens"), (3, [6, -1], "room for 8 tokens"),
    ):  # fmt: skip
        arguments = list(good)
        arguments[at] = wrong
        with pytest.raises(ValueError, match=message):
            _attend(*arguments)
    with pytest.raises(ValueError, match="multiple of 8"):
        Tail(tail_k[..., :12], tail_k[..., :12], KvType.FP16)


# --- the native part -------------------------------------------------------------------------


def test_a_native_part_that_is_missing_or_stale_is_not_used(monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with caplog.at_level("INFO", logger="nearkv"):
            assert native.library.__wrapped__() is None
        assert "pip install" in caplog.text
    if native.library() is not None:
        monkeypatch.setattr(native, "identity", lambda: "another")
        assert native.library.__wrapped__() is None
        assert "of other sources" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["-mtune=generic", "-mavx2", "-mavx2 -mfma", "-O0"])
def test_the_bits_are_the_same_with_any_instructions(instructions, tmp_path, monkeypatch):
    """The loader chooses among several; here each is compiled alone, and held against what it chose."""
    compiler = shutil.which("g++")
    if compiler is None or native.library() is None:
        pytest.skip("the native part of nearkv.attention is not compiled: make setup")
    machine = sysconfig.get_platform()
    if "-m" in instructions and not machine.endswith("x86_64"):
        pytest.skip(f"these instructions are those of x86, not of {machine}")
    flags = Path("/proc/cpuinfo").read_text().split()
    if any(name[2:] not in flags for name in instructions.split() if name.startswith("-mavx")):
        pytest.skip("this processor does not have AVX2")
    (tmp_path / "native_constants.h").write_text(native.header())
    library = tmp_path / "native.so"
    subprocess.run(
        [compiler, *native.COMPILE_ARGS, *instructions.split(), "-DVECTORS=", "-shared", "-fPIC",
         "-I", tmp_path, "-o", library, Path(native.__file__).parent / "native.cpp"],
        check=True,
    )  # fmt: skip
    rng = np.random.default_rng(6)
    x = -rng.uniform(0, 1010, 9999)
    arguments = [_tail(rng, [70, 3], 2, kv_type, head_dim=96) for kv_type in KvType]
    data, *_ = _card_bytes(rng, 6, 3, 96)

    def results():
        sums = Sums(PageLayout(96), 3, 3)
        sums.add(np.arange(6) % 3, data)
        total = sums.total()
        yield _records(arguments[0][0][:, 0])
        yield from (_attend(*some) for some in arguments)
        yield from (total, total.normalise(), _call("exp2", x), _call("log2", -x))
        yield total.combine(rng.standard_normal((3, 3, 96)), total.normalise()[1] + 1.5)

    state = rng.bit_generator.state
    want = list(results())
    rng.bit_generator.state = state
    other = ctypes.CDLL(library)
    native.declare(other)
    monkeypatch.setattr(native, "library", lambda: other)
    for a, b in zip(results(), want, strict=True):
        _assert_same_bits(a, b)
