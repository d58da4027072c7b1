# SPDX-License-Identifier: Apache-2.0
"""attend and merge: accuracy, exact laws, and errors that name their page."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

import nearkv
from nearkv.attention import PageAttention, Partial
from nearkv.cards import CardError
from nearkv.io import FlashError, PageId
from nearkv.store import KvStore
from nearkv_hw import abi
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_sim.reference import attention as reference

REL_L2_BOUND = 6e-5
LSE_BOUND = 1e-4


def _qkv(kv_len, n_q_heads=4, n_kv_heads=2, head_dim=64, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_q_heads, head_dim))
    k, v = (rng.standard_normal((kv_len, n_kv_heads, head_dim)) for _ in "kv")
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def _check(got, q, k, v, scale=None):
    out, lse_ln = got
    expected, expected_lse = reference(q, k, v, scale)
    error = np.linalg.norm(np.asarray(out) - expected) / np.linalg.norm(expected)
    assert error <= REL_L2_BOUND
    # Scores far from 0 are scaled by 24 bits and returned in float32.
    bound = LSE_BOUND + 2.0**-23 * np.abs(expected_lse)
    assert (np.abs(np.asarray(lse_ln) - expected_lse) <= bound).all()


def test_attend_is_accurate_at_4096_tokens_of_32_heads_over_8(card):
    q, k, v = _qkv(4096, 32, 8, 128)
    _check(nearkv.attend(q, k, v, card=card), q, k, v)


@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("page_tokens", [32, 96, 128, 256])
def test_attend_is_accurate_at_every_length(card, kv_len, page_tokens):
    q, k, v = _qkv(kv_len, seed=kv_len)
    _check(nearkv.attend(q, k, v, card=card, page_tokens=page_tokens), q, k, v)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 160, 256])
def test_attend_serves_every_head_dim(card, head_dim):
    q, k, v = _qkv(200, 3, 1, head_dim)
    _check(nearkv.attend(q, k, v, card=card, scale=0.2), q, k, v, 0.2)


@pytest.mark.parametrize("group", [1, 2, 7, 8, 9, 20])
def test_groups_larger_than_the_card_take_several_jobs(card, group):
    q, k, v = _qkv(150, group, 1)
    _check(nearkv.attend(q, k, v, card=card), q, k, v)


def test_attend_stores_what_kv_dtype_says(card):
    q, k, v = _qkv(150, dtype=np.float32)
    half = [x.astype(np.float16) for x in (k, v)]
    _check(nearkv.attend(q, k, v, card=card), q, *half)
    bf16 = [torch.from_numpy(x).bfloat16() for x in (k, v)]
    rounded = [x.float().numpy() for x in bf16]
    _check(nearkv.attend(q, k, v, card=card, kv_dtype="bf16"), q, *rounded)
    # bf16 tensors are stored as they are.
    q16 = torch.from_numpy(q).bfloat16()
    out, lse_ln = nearkv.attend(q16, *bf16, card=card)
    assert out.dtype == lse_ln.dtype == torch.float32
    _check((out, lse_ln), q16.float().numpy(), *rounded)


def test_attend_returns_the_family_it_was_given(card):
    q, k, v = _qkv(40)
    out, lse_ln = nearkv.attend(q, k, v, card=card)
    assert out.dtype == lse_ln.dtype == np.float32
    assert (out.shape, lse_ln.shape) == ((4, 64), (4,))
    torch_out, torch_lse = nearkv.attend(*(torch.from_numpy(x) for x in (q, k, v)), card=card)
    np.testing.assert_array_equal(torch_out.numpy(), out)
    np.testing.assert_array_equal(torch_lse.numpy(), lse_ln)
    by_name, _ = nearkv.attend(q, k, v, card="model")
    np.testing.assert_array_equal(by_name, out)


def test_no_tokens_give_the_identity_of_merge(card):
    q, k, v = _qkv(0)
    out, lse_ln = nearkv.attend(q, k, v, card=card)
    assert not out.any()
    assert np.isneginf(lse_ln).all()
    merged, lse = nearkv.merge([out, out + 3], [lse_ln, lse_ln + np.inf * 0])
    assert not np.isnan(nearkv.merge([out, out], [lse_ln, lse_ln])[0]).any()
    q, k, v = _qkv(40)
    some = nearkv.attend(q, k, v, card=card)
    merged, lse = nearkv.merge([some[0], out], [some[1], lse_ln])
    np.testing.assert_array_equal(merged, some[0])
    np.testing.assert_array_equal(lse, some[1])


def test_attend_refuses_what_does_not_fit(card):
    q, k, v = _qkv(40)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 kv heads"):
        nearkv.attend(q, *(np.zeros((4, 3, 64)) for _ in "kv"), card=card)
    with pytest.raises(ValueError, match="heads of 260 channels fit no page"):
        nearkv.attend(*_qkv(40, head_dim=260), card=card)
    with nearkv.open_card("model", config="tiny") as tiny:
        with pytest.raises(ValueError, match="built for head_dim up to 64, not 128"):
            nearkv.attend(*_qkv(40, head_dim=128), card=tiny)
        _check(nearkv.attend(q, k, v, card=tiny), q, k, v)
    k[3, 1, 5] = np.nan
    with pytest.raises(
        ValueError, match="Inf or NaN in K, token 3, kv head 1, channel 5: the model computed it"
    ):
        nearkv.attend(q, k, v, card=card)
    with pytest.raises(ValueError, match="q must be finite"):
        nearkv.attend(q * np.float16(np.inf), v, v, card=card)


@pytest.mark.parametrize("head_dim", [1, 20, 80, 112, 250])
def test_heads_of_any_size_are_filled_up_with_zeros(card, head_dim):
    q, k, v = _qkv(200, 4, 2, head_dim)
    out, lse_ln = nearkv.attend(q, k, v, card=card)
    assert out.shape == (4, head_dim)
    _check((out, lse_ln), q, k, v)
    # Channels of zeros change no bit.
    wide = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -head_dim % 32)]) for x in (q, k, v)]
    wide_out, wide_lse = nearkv.attend(*wide, card=card, scale=head_dim**-0.5)
    np.testing.assert_array_equal(wide_out[:, :head_dim], out)
    np.testing.assert_array_equal(wide_lse, lse_ln)


def test_attend_says_what_is_wrong_with_its_arrays(card, tmp_path):
    q, k, v = _qkv(40)

    def refused(match, *qkv, kind=ValueError, **options):
        with pytest.raises(kind, match=match):
            nearkv.attend(*qkv, card=card, directory=tmp_path / "none", **options)
        assert not list(tmp_path.iterdir())

    refused(r"q must have shape \(n_q_heads, head_dim\), not \(1, 4, 64\)", q[None], k, v)
    refused(r"k must have shape \(kv_len, n_kv_heads, head_dim\), not \(40, 64\)", q, k[:, 0], v)
    refused(r"v must have the shape of k, \(40, 2, 64\), not \(39, 2, 64\)", q, k, v[1:])
    refused(r"v must have the shape of k", q, k, v[..., :32])
    refused("need at least one head, not 4 and 0", q, k[:, :0], v[:, :0])
    refused("need at least one head, not 0 and 2", q[:0], k, v)
    refused("q has head_dim 64 and k 32", q, k[..., :32], v[..., :32])
    for scale in (0, -1.0, np.nan, np.inf, 1.7e308):
        refused("scale must be positive and below 1.2e308", q, k, v, scale=scale)
    for x in (k.view(np.uint16), k.astype(np.int32), k > 0, torch.from_numpy(k.view(np.int16))):
        refused("k must be floating-point numbers", q, x, v, kind=TypeError)
        refused("v must be floating-point numbers", q, k, x, kind=TypeError)
    refused("q must be floating-point numbers", q.astype(np.int8), k, v, kind=TypeError)
    large = k.astype(np.float64)
    large[3, 1, 5] = 1e5
    refused(r"K, token 3, kv head 1, channel 5: 100000.0 is beyond fp16 \(65504\); store .* as bf16",
            q, large, v)  # fmt: skip
    large[3, 1, 5] = 3.4e38
    refused(
        r"3.4e\+38 is beyond bf16 \(3.39e38\); scale K and V down", q, v, large, kv_dtype="bf16"
    )
    refused(r"beyond bf16", torch.from_numpy(q), torch.from_numpy(large), torch.from_numpy(v),
            kv_dtype="bf16")  # fmt: skip


# --- merge -----------------------------------------------------------------------------------


def test_merging_parts_gives_the_whole(card):
    q, k, v = _qkv(300)
    cuts = [0, 7, 130, 300]
    parts = [
        nearkv.attend(q, k[a:b], v[a:b], card=card) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    outs, lses = zip(*parts, strict=True)
    _check(nearkv.merge(outs, lses), q, k, v)
    _check(nearkv.merge(np.stack(outs), np.stack(lses)), q, k, v)
    out, lse_ln = nearkv.merge(
        [torch.from_numpy(x) for x in outs], [torch.from_numpy(x) for x in lses]
    )
    assert out.dtype == torch.float32
    _check((out, lse_ln), q, k, v)


def test_merge_keeps_far_apart_parts_finite():
    out, lse = nearkv.merge([[[1.0]], [[2.0]]], [[-5000.0], [5000.0]])
    assert (out, lse) == (2.0, 5000.0)
    with pytest.raises(ValueError, match="do not belong together"):
        nearkv.merge(np.zeros((2, 3, 4)), np.zeros((2, 4)))


# --- exact laws ------------------------------------------------------------------------------


def _stored(store, kv_len, seed=0, sequence=0, magnitude=1.0):
    rng = np.random.default_rng(seed)
    shape = (store.n_kv_heads, kv_len, store.layout.head_dim)
    k, v = (rng.standard_normal(shape) * magnitude for _ in "kv")
    store.append(sequence, 0, k.astype(np.float16), v.astype(np.float16), ragged=True)
    return rng.standard_normal((1, store.n_kv_heads, 3, store.layout.head_dim))


def _assert_same_bits(a: Partial, b: Partial):
    np.testing.assert_array_equal(a.run_max, b.run_max)
    np.testing.assert_array_equal(a.sums.pack(), b.sums.pack())


def _attend(attention, layer, sequences, q, scale):
    """Attend to all pages there are."""
    n_pages = [attention.store.n_pages(sequence, layer) for sequence in sequences]
    return attention.attend(layer, sequences, q, scale, n_pages)


class _ShortJobs(PageAttention):
    """Pages cut into jobs of a given length."""

    def __init__(self, card, store, job_pages):
        super().__init__(card, store)
        for ring in self._rings:
            ring.room = ring.room._replace(job_pages=min(ring.room.job_pages, job_pages))


@settings(max_examples=25, deadline=None)
@given(
    kv_len=st.integers(1, 400), job_pages=st.integers(1, 13), seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([1e-3, 1.0, 5.0, 30.0]),
)  # fmt: skip
def test_splitting_at_page_boundaries_changes_no_bit(
    card, tmp_path_factory, kv_len, job_pages, seed, magnitude
):
    with KvStore(tmp_path_factory.mktemp("kv"), PageLayout(32, 32), 1, temporary=True) as store:
        q = _stored(store, kv_len, seed, magnitude=magnitude)
        whole = _attend(PageAttention(card, store), 0, [0], q, 0.2)
        split = _attend(_ShortJobs(card, store, job_pages), 0, [0], q, 0.2)
        _assert_same_bits(whole, split)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(4)))
def test_partials_add_up_in_any_order_and_grouping(card, tmp_path_factory, seed, order):
    with KvStore(tmp_path_factory.mktemp("kv"), PageLayout(32, 32), 2, temporary=True) as store:
        attention, parts = PageAttention(card, store), []
        for part in range(4):
            q = _stored(store, 40 * part + 1, seed + part, sequence=part, magnitude=4.0**part)
        for part in range(4):
            parts.append(_attend(attention, 0, [part], q, 0.2))
        a, b, c, d = parts
        w, x, y, z = (parts[i] for i in order)
        _assert_same_bits((a + b) + (c + d), ((w + x) + y) + z)
        empty = Partial.empty(KvType.FP16, a.run_max.shape, 32)
        _assert_same_bits(a + empty, a)
        _assert_same_bits(empty + a, a)


@pytest.mark.parametrize("factor", [2.0**-6, 8.0, 2.0**10])
def test_scaling_v_by_a_power_of_two_scales_out_exactly(card, factor):
    q, k, v = _qkv(200)
    k[17] *= 4  # some heads see much of it, others next to nothing
    v[np.abs(v) < 2.0**-7] = 0  # nothing becomes subnormal
    v[17] = 0
    out, lse_ln = nearkv.attend(q, k, v, card=card)
    scaled, same = nearkv.attend(q, k, v * np.float16(factor), card=card)
    np.testing.assert_array_equal(scaled, out * factor)
    np.testing.assert_array_equal(same, lse_ln)


def test_extreme_scores_neither_overflow_nor_lose_the_largest(card):
    q, k, v = _qkv(100)
    for sign in (1, -1):
        big_k = np.full_like(k, 100.0 * sign)
        big_q = np.full_like(q, 20.0)
        _check(nearkv.attend(big_q, big_k, v, card=card), big_q, big_k, v)


def test_small_memories_take_several_runs_and_change_no_bit(card, tmp_path):
    layout = PageLayout(64, 32)
    with KvStore(tmp_path, layout, 2) as store:
        rng = np.random.default_rng(5)
        for sequence, n_pages in enumerate((5, 0, 3)):
            shape = (2, n_pages * 32, 64)
            store.append(sequence, 3, *(rng.standard_normal(shape) for _ in "kv"))
        q = rng.standard_normal((3, 2, 21, 64))
        big = PageAttention(card, store)
        whole = _attend(big, 3, range(3), q, 0.125)
        assert big.figures.runs == 1
        needed = abi.partial_bytes(64, 8) + 64 * 64 + 64 + 1024
        with nearkv.open_card(
            "model", kv_bytes=3 * layout.page_bytes, job_bytes=-(-2 * needed // 4096) * 4096
        ) as small_card:
            small = PageAttention(small_card, store)
            _assert_same_bits(_attend(small, 3, range(3), q, 0.125), whole)
            assert small.figures.runs > 6
            some = small.attend(3, [0, 2], q[[0, 2]], 0.125, [2, 3])
        _assert_same_bits(big.attend(3, [0, 2], q[[0, 2]], 0.125, [2, 3]), some)
        out, lse_log2 = whole.normalise()
        assert not out[1].any()
        assert np.isneginf(lse_log2[1]).all()
        k, v = (
            x.reshape(2, 160, 64)
            for x in np.swapaxes(
                [_tokens(store, 3, 0, head) for head in range(2)], 0, 1
            )
        )  # fmt: skip
        _check(
            (out[0].reshape(-1, 64), lse_log2[0].reshape(-1) * math.log(2)),
            q[0].reshape(-1, 64), k.swapaxes(0, 1), v.swapaxes(0, 1), 0.125,
        )  # fmt: skip


def _tokens(store, layer, sequence, head):
    from nearkv_hw import pages

    data = store.read_pages(PageId(layer, sequence, head, 0), store.n_pages(sequence, layer))
    return [pages.to_float32(x, KvType.FP16) for x in pages.unpack(store.layout, data)]


def test_memories_that_are_too_small_are_named(card, tmp_path):
    with KvStore(tmp_path, PageLayout(64, 128), 1) as store:
        q = _stored(store, 128)
        with nearkv.open_card("model", kv_bytes=4096) as small:
            with pytest.raises(ValueError, match="4096 bytes of kv memory.*kv_bytes"):
                PageAttention(small, store)
        with nearkv.open_card("model", job_bytes=4096) as small:
            with pytest.raises(ValueError, match="job_bytes must hold a job of"):
                _attend(PageAttention(small, store), 0, [0], q, 1.0)


# --- errors ----------------------------------------------------------------------------------


def _flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x04]))


@pytest.mark.parametrize("part", ["K", "V"])
def test_a_flipped_bit_in_a_page_file_is_a_card_error_that_names_the_page(card, tmp_path, part):
    layout = PageLayout(64, 32)
    with KvStore(tmp_path, layout, 2) as store:
        k, v = (np.random.default_rng(0).standard_normal((2, 160, 64)) for _ in "kv")
        store.append(1, 6, k, v)
        path, offset = store.locate(PageId(6, 1, 1, 3))
        _flip(path, offset + 77 + (layout.part_bytes if part == "V" else 0))
        q = np.ones((1, 2, 3, 64))
        with pytest.raises(CardError, match=f"CRC-32C mismatch in a {part} part") as caught:
            _attend(_ShortJobs(card, store, 2), 6, [1], q, 0.125)
        message = str(caught.value)
        assert "page 3 of layer 6, sequence 1, kv head 1" in message
        assert str(path) in message
        assert "computed again" in message
        assert caught.value.status & (Status.BAD_CRC_K | Status.BAD_CRC_V)
        assert caught.value.counters["n_failed"] == 1
        # The rest of the store is served as before.
        PageAttention(card, store).attend(6, [1], q, 0.125, [3])


def test_a_truncated_page_file_is_a_flash_error_that_names_the_page(card, tmp_path):
    with KvStore(tmp_path, PageLayout(64, 32), 1) as store:
        q = _stored(store, 160)
        path, offset = store.locate(PageId(0, 0, 0, 2))
        with open(path, "r+b") as file:
            file.truncate(offset)
        with pytest.raises(FlashError, match="page 2 of layer 0, sequence 0, kv head 0.*truncated|"
                           "truncated.*page 2 of layer 0, sequence 0, kv head 0"):  # fmt: skip
            _attend(PageAttention(card, store), 0, [0], q, 0.125)


def test_inf_that_got_past_the_store_is_reported(card, tmp_path, monkeypatch):
    monkeypatch.setattr("nearkv_hw.pages.first_non_finite", lambda *_: None)
    with KvStore(tmp_path, PageLayout(64, 32), 1) as store:
        k = np.ones((1, 64, 64), np.float16)
        k[0, 40, 3] = np.inf
        store.append(0, 0, np.ones_like(k), k)
        with pytest.raises(CardError, match="page 1 of layer 0.*Inf or NaN in K or V"):
            _attend(PageAttention(card, store), 0, [0], np.ones((1, 1, 1, 64)), 1.0)


def test_scores_out_of_range_are_an_error(card):
    q, k, v = (np.full(shape, 1000.0) for shape in ((2, 64), (40, 2, 64), (40, 2, 64)))
    with pytest.raises(CardError, match="score out of range.*softmax scale"):
        nearkv.attend(q, k, v, card=card, scale=1.0)


def test_a_job_without_an_answer_is_an_error(tmp_path):
    with nearkv.open_card("model") as silent, KvStore(tmp_path, PageLayout(64, 32), 1) as store:
        execute = silent.executor.backend.execute

        def forget(kv, job, *args):
            before = job.copy()
            execute(kv, job, *args)
            job[abi.SUMMARY.bytes :] = before[abi.SUMMARY.bytes :]

        q = _stored(store, 32)
        _attend(PageAttention(silent, store), 0, [0], q, 0.125)  # which leaves good partials behind
        silent.executor.backend.execute = forget
        with pytest.raises(
            CardError, match="layer 0, sequence 0, kv head 0: no status was written"
        ):
            _attend(PageAttention(silent, store), 0, [0], q, 0.125)


# --- the simulated hardware ------------------------------------------------------------------


@pytest.fixture
def rtl_card():
    try:
        return nearkv.open_card("rtl", config="tiny")
    except CardError as error:
        pytest.skip(str(error))


@pytest.mark.sim
def test_the_rtl_card_gives_the_bits_of_the_model_card(rtl_card, tmp_path):
    with rtl_card, nearkv.open_card("model", config="tiny") as model_card:
        with KvStore(tmp_path, PageLayout(64, 32), 2) as store:
            q = _stored(store, 75)
            partials = [
                _attend(PageAttention(card, store), 0, [0], q, 0.125)
                for card in (rtl_card, model_card)
            ]
            _assert_same_bits(*partials)
            path, offset = store.locate(PageId(0, 0, 1, 1))
            _flip(path, offset)
            with pytest.raises(CardError, match="page 1 of layer 0, sequence 0, kv head 1"):
                _attend(PageAttention(rtl_card, store), 0, [0], q, 0.125)


@pytest.mark.parametrize("n_cards", [1, 2])
def test_the_host_does_its_own_part_while_the_cards_work(tmp_path, n_cards):
    kv = np.random.default_rng(3).standard_normal((2, 4, 640, 64)).astype(np.float16)
    q = np.ones((1, 4, 2, 64))
    cards = [nearkv.open_card("model") for _ in range(n_cards)]
    with KvStore(tmp_path, PageLayout(64, 32), 4, temporary=True, n_shards=n_cards) as store:
        store.append(0, 0, *kv)
        attention = PageAttention(cards, store)
        calls = []

        def meanwhile():
            calls.append(cards[0]._run is not None and not cards[0]._run._ended)

        def fail():
            raise ArithmeticError("of the host's part")

        whole = attention.attend(0, [0], q, 1.0, [20])
        with pytest.raises(ArithmeticError):
            attention.attend(0, [0], q, 1.0, [20], fail)
        again = attention.attend(0, [0], q, 1.0, [20], meanwhile)
        np.testing.assert_array_equal(again.sums.limbs, whole.sums.limbs)
        assert len(calls) == 1
        if n_cards == 1:  # with several it is done beside the threads that drive them
            assert calls == [True]
        attention.close()
    for card in cards:
        card.close()
