# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch that are cut, padded, reordered, repeated, selected and copied, as in DynamicCache."""

import copy
import gc
import os
import pickle
import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nearkv import NearStorageCache
from nearkv.io import FlashError
from nearkv.store.writer import PageWriter

pytestmark = pytest.mark.usefixtures("one_thread")
LOGIT_BOUND = 4 * 2.0**-11  # twice that of test_cache.py: many random cases
CONFIG = LlamaConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2,
    intermediate_size=64, vocab_size=200, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa").eval()


@pytest.fixture
def cache(card, tmp_path):
    with NearStorageCache(CONFIG, tmp_path, card, page_tokens=32) as cache:
        yield cache


def _ids(*shape, seed=1):
    return torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _forward(model, attention, cache, ids, mask=None):
    model.set_attn_implementation(attention)
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def _same(model, ours, theirs, ids, mask=None):
    """Both caches take the tokens, and give the same logits wherever they are tokens."""
    a, b = (
        _forward(model, attention, of, ids, mask)
        for attention, of in (("nearkv", ours), ("sdpa", theirs))
    )
    real = slice(None) if mask is None else mask[:, -ids.shape[1] :].bool()
    assert (a - b)[real].abs().max() <= LOGIT_BOUND * b[real].abs().max()


# --- one thing after the other -------------------------------------------------------------------

_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 40), st.integers(0, 2**31)),
        st.tuples(st.just("crop"), st.integers(1, 70)),
        st.tuples(st.just("reorder"), st.integers(0, 2**31)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 2**31)),
        st.tuples(st.just("copy")),
    ),
    min_size=2,
    max_size=9,
)


def _run(model, cache, reference, steps, rows):
    """Carry out the steps on both caches; compare them after every one that puts tokens in."""
    mask, originals = torch.ones(rows, 0, dtype=torch.long), []
    for kind, *args in [("put", 30, 0), *steps, ("put", 3, 1)]:
        rows, positions = mask.shape
        generator = torch.Generator().manual_seed(args[-1] if args else 0)
        if kind == "put":
            # A third of the time padding on the left, on the right, and anywhere.
            new = torch.ones(rows, args[0], dtype=torch.long)
            where = torch.rand(rows, args[0], generator=generator)
            style = args[1] % 4
            if style == 1:
                new[where.cumsum(1) < 3] = 0
            elif style == 2:
                new[where.flip(1).cumsum(1).flip(1) < 3] = 0
            elif style == 3:
                new[where < 0.4] = 0
            new[:, -1] |= ~new.bool().any(dim=1)  # rows of padding alone have nothing to compare
            mask = torch.cat([mask, new], dim=1)
            ids = torch.randint(1, 200, new.shape, generator=generator) * new
            _same(model, cache, reference, ids, mask)
        elif kind == "crop":
            for of in (cache, reference):
                of.crop(-args[0])
            mask = mask[:, : max(positions - args[0], 0)]
            assert cache.get_seq_length() == mask.shape[1]
        elif kind == "copy":
            originals.append((cache, reference, mask))
            cache, reference = copy.deepcopy(cache), copy.deepcopy(reference)
        elif mask.shape[1]:  # DynamicCache ignores these while it is empty
            if kind == "reorder":
                rows = torch.randint(0, rows, (rows,), generator=generator)
                calls = [of.reorder_cache for of in (cache, reference)]
            elif kind == "repeat":
                calls = [
                    lambda n, of=of: of.batch_repeat_interleave(n) for of in (cache, reference)
                ]
                mask = mask.repeat_interleave(args[0], dim=0)
                rows, argument = slice(None), args[0]
            else:
                rows = torch.randperm(rows, generator=generator)[: max(1, rows - 1)]
                calls = [of.batch_select_indices for of in (cache, reference)]
            mask = mask[rows]
            for call in calls:
                call(argument if kind == "repeat" else rows)
        assert torch.equal(cache.attention_mask, mask)
    for of, theirs, mask in originals:  # copies have changed nothing
        more = torch.ones(len(mask), 2, dtype=torch.long)
        _same(model, of, theirs, _ids(len(mask), 2), torch.cat([mask, more], dim=1))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=_steps, rows=st.integers(1, 3), spill_pages=st.integers(1, 2))
def test_any_sequence_of_changes_is_that_of_dynamic_cache(
    model, card, rounded_cache, steps, rows, spill_pages
):
    with NearStorageCache(CONFIG, None, card, page_tokens=32, spill_pages=spill_pages) as cache:
        _run(model, cache, rounded_cache(CONFIG), steps, rows)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=_steps, rows=st.integers(1, 4), spill_pages=st.integers(1, 3))
def test_many_sequences_of_changes_are_those_of_dynamic_cache(
    model, card, rounded_cache, steps, rows, spill_pages
):
    with NearStorageCache(CONFIG, None, card, page_tokens=32, spill_pages=spill_pages) as cache:
        _run(model, cache, rounded_cache(CONFIG), steps, rows)


# --- crop and masks ------------------------------------------------------------------------------


def test_crop_removes_positions_and_not_tokens(model, cache, rounded_cache):
    ids, mask = _ids(3, 70), torch.ones(3, 70, dtype=torch.long)
    mask[0, 60:], mask[1, 30:69], mask[2, :40] = 0, 0, 0
    reference = rounded_cache(CONFIG)
    _same(model, cache, reference, ids, mask)
    for removed in (5, 20, 44):
        for of in (cache, reference):
            of.crop(-removed)
        mask = mask[:, :-removed]
        assert torch.equal(cache.attention_mask, mask)
        new = torch.ones(3, 4, dtype=torch.long)
        mask = torch.cat([mask, new], dim=1)
        _same(model, cache, reference, _ids(3, 4, seed=removed), mask)


def test_cropping_all_or_more_leaves_nothing(model, cache):
    for removed in (50, 400):
        _forward(model, "nearkv", cache, _ids(2, 50))
        cache.crop(-removed)
        assert cache.get_seq_length() == 0
        assert not any(cache.store.n_pages(row, layer) for row in range(2) for layer in range(2))


def test_crop_takes_a_tensor_too(model, cache):
    _forward(model, "nearkv", cache, _ids(1, 50))
    cache.crop(torch.tensor(-7))
    assert type(cache.get_seq_length()) is int
    assert cache.get_seq_length() == 43


def test_a_mask_that_changes_over_stored_positions_is_refused(model, cache):
    ids, mask = _ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    _forward(model, "nearkv", cache, ids, mask)
    more = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    for row, position, before in ((1, 6, "padding"), (1, 7, "a token"), (0, 0, "a token")):
        changed = more.clone()
        changed[row, position] = 1 - changed[row, position]
        with pytest.raises(ValueError, match=f"position {position} of row {row} was {before} when"):
            _forward(model, "nearkv", cache, _ids(2, 3), changed)
    for lost in (None, torch.ones(2, 43), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="attention_mask has changed"):
            _forward(model, "nearkv", cache, _ids(2, 3), lost)
    assert cache.get_seq_length() == 40
    _forward(model, "nearkv", cache, _ids(2, 3), more)  # nothing was lost
    cache.crop(-3)
    assert torch.equal(cache.attention_mask, mask)


def test_a_refused_call_leaves_no_trace_of_its_mask(model, cache):
    _forward(model, "nearkv", cache, _ids(1, 5))
    mask = torch.tensor([[1] * 5 + [0, 1, 1]])
    handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, out: out * torch.nan
    )
    try:
        with pytest.raises(ValueError, match="Inf or NaN in V"):
            _forward(model, "nearkv", cache, _ids(1, 3), mask)
    finally:
        handle.remove()
    cache.crop(-1)
    for positions in (7, 9):
        _forward(model, "nearkv", cache, _ids(1, positions - cache.get_seq_length()))
        assert torch.equal(cache.attention_mask, torch.ones(1, positions, dtype=torch.long))


def test_masks_of_another_shape_are_refused(model, cache):
    _forward(model, "nearkv", cache, _ids(2, 4))
    with pytest.raises(ValueError, match=r"attention_mask is for \(1, 5\) rows and positions"):
        _forward(model, "nearkv", cache, _ids(2, 1), torch.tensor([[1, 1, 0, 1, 1]]))


# --- beams and the like --------------------------------------------------------------------------


def _generate(model, attention, cache, ids, **options):
    model.set_attn_implementation(attention)
    torch.manual_seed(3)
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=40, output_scores=True, output_logits=True,
        return_dict_in_generate=True, **{"do_sample": False} | options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "temperature": 1.2},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 7},
        {"do_sample": True, "num_return_sequences": 4, "top_k": 20},
        {"prompt_lookup_num_tokens": 5},
        {"prefill_chunk_size": 9},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate_give_the_tokens_of_transformers_own_cache(
    model, card, tmp_path, rounded_cache, options
):
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, mask = _ids(rows, 50), torch.ones(rows, 50, dtype=torch.long)
    ids[0, 20:] = ids[0, :30].clone()
    if rows > 1:
        ids[1, :11], mask[1, :11] = 0, 0
    ours, theirs = [], []
    with NearStorageCache(CONFIG, tmp_path, card, page_tokens=32) as cache:
        for attention, of, out in (
            ("nearkv", cache, ours), ("sdpa", rounded_cache(CONFIG), theirs),
        ):  # fmt: skip
            out.append(_generate(model, attention, of, ids, attention_mask=mask, **options))
        assert cache.figures.card_tokens > 0
    assert torch.equal(ours[0].sequences, theirs[0].sequences)


@pytest.mark.slow
def test_assisted_decoding_gives_the_tokens_of_transformers_own_cache(
    model, card, tmp_path, rounded_cache
):
    torch.manual_seed(1)
    assistant = AutoModelForCausalLM.from_config(CONFIG).eval()
    assistant.load_state_dict(model.state_dict())
    with torch.no_grad():  # right most of the time
        assistant.lm_head.weight += 0.3 * torch.randn_like(assistant.lm_head.weight)
    sequences = []
    with NearStorageCache(CONFIG, tmp_path, card, page_tokens=32) as cache:
        for attention, of in (("nearkv", cache), ("sdpa", rounded_cache(CONFIG))):
            out = _generate(model, attention, of, _ids(1, 50), assistant_model=assistant)
            sequences.append(out.sequences)
            plain = _generate(model, "sdpa", rounded_cache(CONFIG), _ids(1, 50)).sequences
            assert torch.equal(out.sequences, plain)
        assert cache.get_seq_length() < 90


@pytest.mark.slow
def test_eight_sequences_over_one_prefix_store_it_once(model, cache, rounded_cache):
    prefix, reference = _ids(1, 96), rounded_cache(CONFIG)
    _same(model, cache, reference, prefix)
    assert cache.store.n_blocks(0) == 3
    for of in (cache, reference):
        of.batch_repeat_interleave(8)
    assert cache.store.n_blocks(0) == cache.store.n_blocks(1) == 3
    ids = torch.cat([prefix, _ids(1, 9)], dim=1)
    ours, theirs = (
        _generate(model, attention, of, ids, do_sample=True, num_return_sequences=8).sequences
        for attention, of in (("nearkv", cache), ("sdpa", reference))
    )
    assert torch.equal(ours, theirs)
    assert len({tuple(row.tolist()) for row in ours}) > 1
    # 96 + 9 + 39 tokens in each: 4 pages, of which 3 are one and the same.
    assert [cache.store.n_pages(row, 1) for row in range(8)] == [4] * 8
    assert cache.store.n_blocks(0) == 3 + 8


@pytest.mark.slow
def test_beams_share_what_they_have_in_common(model, cache):
    _generate(model, "nearkv", cache, _ids(1, 64), num_beams=8)
    assert cache.batch_size == 8
    assert [cache.store.n_pages(row, 0) for row in range(8)] == [3] * 8
    assert cache.store.n_blocks(0) < 8 * 3


def test_a_row_that_becomes_a_short_one_has_no_pages(model, cache, rounded_cache):
    ids, mask, reference = _ids(2, 70), torch.ones(2, 70, dtype=torch.long), rounded_cache(CONFIG)
    mask[1, :60] = 0
    _same(model, cache, reference, ids, mask)
    for of in (cache, reference):
        of.reorder_cache(torch.tensor([1, 1]))
    assert [cache.store.n_pages(row, 0) for row in range(2)] == [0, 0]
    mask = torch.cat([mask[[1, 1]], torch.ones(2, 30, dtype=torch.long)], dim=1)
    _same(model, cache, reference, _ids(2, 30), mask)


def test_rows_that_are_not_there_cannot_be_asked_for(model, cache):
    cache.batch_repeat_interleave(3)  # as with DynamicCache, nothing happens while it is empty
    cache.reorder_cache(torch.tensor([1, 0]))
    _forward(model, "nearkv", cache, _ids(2, 40))
    for rows in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="rows must be among 0 to 1"):
            cache.reorder_cache(torch.tensor(rows))
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([5]))
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.batch_size == 1
    with pytest.raises(NotImplementedError, match="call the method of the cache"):
        cache.layers[0].reorder_cache(torch.tensor([0]))


def test_faults_go_with_their_rows(model, card, tmp_path):
    broken = []

    def hook(module, args, out):
        if broken:
            out = out.clone()
            out[1] = torch.nan
        return out

    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(hook)
    try:
        with NearStorageCache(CONFIG, tmp_path, card, 32, on_fault="drop") as cache:
            faults = cache.faults
            _forward(model, "nearkv", cache, _ids(3, 40))
            broken.append(1)
            _forward(model, "nearkv", cache, _ids(3, 1))
            broken.clear()
            assert list(faults) == [1]
            cache.reorder_cache(torch.tensor([1, 1, 0]))
            assert list(faults) == [0, 1]
            assert "row 1" not in str(faults[0])
            _forward(model, "nearkv", cache, _ids(3, 33))
            assert [cache.store.n_pages(row, 0) for row in range(3)] == [0, 0, 2]
            cache.batch_select_indices(torch.tensor([2]))
            assert faults == {}
            _forward(model, "nearkv", cache, _ids(1, 1))
    finally:
        handle.remove()


def test_a_source_that_could_not_be_written_is_a_fault_of_its_row(
    model, card, tmp_path, monkeypatch
):
    real = PageWriter.write

    def write(writer, spills):
        if any(spill.sequence == 1 for spill in spills):
            raise FlashError("cannot write KV pages", errno=28, page=_page(spills[0], 1))
        return real(writer, spills)

    def _page(spill, sequence):
        from nearkv.io import PageId

        return PageId(spill.layer, sequence, 0, spill.position)

    monkeypatch.setattr(PageWriter, "write", write)
    with NearStorageCache(CONFIG, tmp_path, card, 32, on_fault="drop") as cache:
        _forward(model, "nearkv", cache, _ids(3, 40))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert list(cache.faults) == [2]
        _forward(model, "nearkv", cache, _ids(3, 1))
    with NearStorageCache(CONFIG, tmp_path, card, 32) as cache:
        _forward(model, "nearkv", cache, _ids(3, 40))
        with pytest.raises(FlashError, match="sequence 1"):
            cache.reorder_cache(torch.tensor([2, 0, 1]))
        with pytest.raises(RuntimeError, match=r"call reset\(\), or make a new cache. It was: Fl"):
            _forward(model, "nearkv", cache, _ids(3, 1))
        monkeypatch.setattr(PageWriter, "write", real)
        cache.reset()
        _forward(model, "nearkv", cache, _ids(3, 40))


# --- copies and lifetimes ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_prefix_serves_many_prompts_through_copies(model, cache, rounded_cache):
    prefix = _ids(1, 70)
    _forward(model, "nearkv", cache, prefix)
    for seed in (5, 6, 7):
        ids = torch.cat([prefix, _ids(1, 8, seed=seed)], dim=1)
        reference = rounded_cache(CONFIG)
        _forward(model, "sdpa", reference, prefix)
        ours = _generate(model, "nearkv", copy.deepcopy(cache), ids).sequences
        theirs = _generate(model, "sdpa", reference, ids).sequences
        assert torch.equal(ours, theirs)
        gc.collect()
    assert cache.get_seq_length() == 70
    _forward(model, "nearkv", cache, _ids(1, 1))
    assert cache.store.n_blocks(0) == 2  # copies that are gone have given their pages back


def test_models_that_hold_a_cache_can_be_copied(model, cache):
    _forward(model, "nearkv", cache, _ids(2, 40))
    model.past = cache
    try:
        twin = copy.deepcopy(model)
    finally:
        del model.past
    assert twin.past is not cache
    a = _forward(model, "nearkv", cache, _ids(2, 1))
    b = _forward(twin, "nearkv", twin.past, _ids(2, 1))
    assert torch.equal(a, b)
    twin.past.close()


def test_cards_and_store_are_closed_with_the_last_copy(model, tmp_path):
    cache = NearStorageCache(CONFIG, tmp_path, "model", page_tokens=32)
    _forward(model, "nearkv", cache, _ids(1, 40))
    other = copy.deepcopy(cache)
    cache.close()
    assert not other.store.closed
    _forward(model, "nearkv", other, _ids(1, 1))
    store = other.store
    del other
    gc.collect()
    assert store.closed


def test_pickling_is_refused_with_what_to_do(model, cache):
    for dump in (pickle.dumps, lambda it: torch.save(it, "/dev/null"), copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled.*copy.deepcopy.*save"):
            dump(cache)


def test_a_closed_cache_says_so(model, tmp_path):
    cache = NearStorageCache(CONFIG, tmp_path, "model")
    _forward(model, "nearkv", cache, _ids(1, 40))
    cache.close()
    cache.close()
    for use in (
        cache.get_seq_length, cache.reset, lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])), lambda: copy.deepcopy(cache),
        lambda: cache.update(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32), 0),
        lambda: _forward(model, "nearkv", cache, _ids(1, 1)), lambda: cache.batch_repeat_interleave(2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="this NearStorageCache is closed; make a new one"):
            use()
    assert cache.figures.host_tokens == 0  # can still be read


def test_a_process_that_was_forked_disturbs_nothing(model, cache):
    _forward(model, "nearkv", cache, _ids(2, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        pid = os.fork()
    if not pid:  # the child: whatever it does with the cache, it fails or changes nothing
        code = 1
        try:
            cache.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    cache.store.flush()
    assert cache.store.read_pages(_first_page(), 1).any()
    _forward(model, "nearkv", cache, _ids(2, 30))


def _first_page():
    from nearkv.io import PageId

    return PageId(0, 0, 0, 0)


def test_two_threads_in_one_forward_pass_are_refused(cache):
    x, caught = torch.zeros(1, 2, 3, 32), []

    def other():
        try:
            cache.update(x, x, 1)
        except RuntimeError as error:
            caught.append(error)

    cache.update(x, x, 0)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    (error,) = caught
    assert "two threads use one NearStorageCache at a time" in str(error)


def test_layers_that_come_apart_are_noticed(model, cache):
    _forward(model, "nearkv", cache, _ids(1, 40))
    interrupted = []

    def hook(module, args, out):
        raise interrupted.pop()

    handle = model.model.layers[0].mlp.register_forward_hook(hook)
    try:
        interrupted.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _forward(model, "nearkv", cache, _ids(1, 1))
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match="some hold 40 positions and some 41; call reset"):
        _forward(model, "nearkv", cache, _ids(1, 1))
    with pytest.raises(RuntimeError, match="some hold 40 positions and some 41"):
        cache.crop(-1)
    cache.reset()
    _forward(model, "nearkv", cache, _ids(3, 40))  # of any size


# --- rows of a copy join --------------------------------------------------------------------------


def _alone(model, card, directory, ids, steps):
    """Logits behind a prompt and behind each of the steps."""
    with NearStorageCache(CONFIG, directory, card, page_tokens=32) as cache:
        parts = [ids, *(torch.tensor([[step]]) for step in steps)]
        return torch.cat([_forward(model, "nearkv", cache, part)[:, -1] for part in parts])


@pytest.mark.parametrize("lengths", [(70, 20, 45), (20, 70, 45), (32, 64, 1), (40, 40, 40)])
def test_a_row_that_joins_goes_on_as_if_it_were_alone(model, card, cache, tmp_path, lengths):
    prompts = [_ids(1, n, seed=n) for n in lengths]
    steps = _ids(3, 40, seed=9)
    alone = [_alone(model, card, tmp_path, *one) for one in zip(prompts, steps, strict=True)]
    empty = copy.deepcopy(cache)
    have, done = [], [1, 1, 1]
    for at in range(36):
        if at in (0, 3, 30):
            with copy.deepcopy(empty) as coming:
                _forward(model, "nearkv", coming, prompts[len(have)])
                cache.join(coming)
                assert coming.get_seq_length() == 0
            have.append(lengths[len(have)])
            assert cache.attention_mask.sum(dim=1).tolist() == have
            assert cache.get_seq_length() == max(have)
        mask = torch.nn.functional.pad(cache.attention_mask, (0, 1), value=1)
        rows = range(len(have))
        ids = torch.stack([steps[row, done[row] - 1] for row in rows])[:, None]
        model.set_attn_implementation("nearkv")
        places = torch.tensor(have)[:, None]
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache
            ).logits
        for row in rows:
            expected = alone[row][done[row]]
            assert (logits[row, -1] - expected).abs().max() <= LOGIT_BOUND * expected.abs().max()
            have[row] += 1
            done[row] += 1


def test_only_rows_of_a_copy_can_join(model, card, cache, tmp_path):
    with NearStorageCache(CONFIG, tmp_path, card, page_tokens=32) as other:
        _forward(model, "nearkv", other, _ids(1, 5))
        with pytest.raises(ValueError, match=r"copy\.deepcopy"):
            cache.join(other)
        with pytest.raises(ValueError, match=r"copy\.deepcopy"):
            other.join(other)
        assert other.get_seq_length() == 5
    with copy.deepcopy(cache) as nothing:
        cache.join(nothing)
    assert cache.get_seq_length() == 0
    _forward(model, "nearkv", cache, _ids(2, 5))  # and it can be used


def test_rows_that_left_and_rows_that_joined_leave_no_pages_behind(model, cache):
    for n in range(3):
        with copy.deepcopy(cache) as coming:
            coming.reset()
            _forward(model, "nearkv", coming, _ids(2, 70, seed=n))
            cache.join(coming)
        cache.batch_select_indices(torch.tensor([-2, -1]))
        assert len(cache.store.sequences()) == 2
    cache.reset()
    assert cache.store.sequences() == []
