# SPDX-License-Identifier: Apache-2.0
"""NearStorageCache in a small random Llama, against transformers' own cache with rounded K/V."""

import errno
import gc
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import nearkv
from nearkv import NearStorageCache
from nearkv.cards import CardError, open_cards
from nearkv.io import FlashError

pytestmark = pytest.mark.usefixtures("one_thread")
# Of the largest logit. Any difference, however small, lets some K or V round to its neighbour, and
# that is what is seen: two units in the last place of fp16.
LOGIT_BOUND = 2 * 2.0**-11


def _config(**changes):
    values = {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 300, "pad_token_id": 0,
        "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(**values | changes)


def _model(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def model():
    return _model(_config())


@pytest.fixture
def cache(model, card, tmp_path):
    with NearStorageCache(model.config, tmp_path, card, page_tokens=32) as cache:
        yield cache


def _ids(*shape, seed=1):
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(seed))


def _generate(model, cache, ids, attention, n=40, **options):
    model.set_attn_implementation(attention)
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=n, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def _same(rounded_cache, model, cache, ids, n=40, **options):
    ours = _generate(model, cache, ids, "nearkv", n, **options)
    reference = rounded_cache(model.config, cache._batch.dtype)
    theirs = _generate(model, reference, ids, "sdpa", n, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    ours, theirs = torch.stack(ours.logits), torch.stack(theirs.logits)
    bound = LOGIT_BOUND if reference.kind == torch.float16 else 8 * LOGIT_BOUND
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def _logits(model, cache, ids, attention, mask=None):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("n_prompt", [1, 31, 32, 33, 100])
def test_generate_equals_transformers_own_cache(model, cache, n_prompt, rounded_cache):
    _same(rounded_cache, model, cache, _ids(1, n_prompt))
    figures, n_pages = cache.figures, (n_prompt + 39) // 32
    assert cache.store.n_pages(0, 0) == cache.store.n_pages(0, 1) == n_pages
    assert figures.card_tokens > 0
    assert figures.kv_bytes == figures.pages * cache.store.layout.page_bytes
    assert cache.get_seq_length() == n_prompt + 39


@pytest.mark.slow
def test_a_batch_of_equal_lengths(model, cache, rounded_cache):
    _same(rounded_cache, model, cache, _ids(3, 50))
    assert [cache.store.n_pages(sequence, 1) for sequence in range(3)] == [2, 2, 2]


def test_a_batch_with_left_padding_stores_no_padding(model, cache, rounded_cache):
    ids, mask = _ids(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, padded in enumerate((0, 40, 69)):
        ids[row, :padded], mask[row, :padded] = 0, 0
    _same(rounded_cache, model, cache, ids, attention_mask=mask)
    assert [cache.store.n_pages(sequence, 1) for sequence in range(3)] == [3, 2, 1]


def test_several_tokens_behind_a_past(model, cache, rounded_cache):
    ids, reference = _ids(2, 150), rounded_cache(model.config)
    for a, b in ((0, 70), (70, 71), (71, 120), (120, 150)):
        ours = _logits(model, cache, ids[:, a:b], "nearkv")
        theirs = _logits(model, reference, ids[:, a:b], "sdpa")
        assert (ours - theirs).abs().max() <= LOGIT_BOUND * theirs.abs().max()


def test_a_second_turn_of_a_conversation(model, cache, rounded_cache):
    reference = rounded_cache(model.config)
    first = _generate(model, cache, _ids(1, 50), "nearkv", 20).sequences
    _generate(model, reference, _ids(1, 50), "sdpa", 20)
    ids = torch.cat([first, _ids(1, 45, seed=7)], dim=1)
    ours = _generate(model, cache, ids, "nearkv", 20)
    theirs = _generate(model, reference, ids, "sdpa", 20)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_padded_continuation(model, cache, rounded_cache):
    ids, mask, reference = _ids(2, 90), torch.ones(2, 90), rounded_cache(model.config)
    ids[1, :40], mask[1, :40] = 0, 0
    for a, b in ((0, 60), (60, 90)):
        ours = _logits(model, cache, ids[:, a:b], "nearkv", mask[:, :b])
        theirs = _logits(model, reference, ids[:, a:b], "sdpa", mask[:, :b])
        real = mask[:, a:b].bool()
        assert (ours - theirs)[real].abs().max() <= LOGIT_BOUND * theirs.abs().max()


@pytest.mark.parametrize("removed", [1, 20, 60, 99, 100])
def test_crop_takes_tokens_back_from_flash(model, cache, removed, rounded_cache):
    ids, reference = _ids(1, 130), rounded_cache(model.config)
    for attention, of in (("nearkv", cache), ("sdpa", reference)):
        _logits(model, of, ids[:, :100], attention)
        of.crop(-removed)
        assert of.get_seq_length() == 100 - removed
    ours = _logits(model, cache, ids[:, 100:], "nearkv")
    theirs = _logits(model, reference, ids[:, 100:], "sdpa")
    assert (ours - theirs).abs().max() <= LOGIT_BOUND * theirs.abs().max()
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_reset_starts_again(model, cache, rounded_cache):
    _generate(model, cache, _ids(1, 50), "nearkv", 5)
    cache.reset()
    _same(rounded_cache, model, cache, _ids(1, 60, seed=3))


def test_bf16_models_store_bf16(card, tmp_path, rounded_cache):
    model = _model(_config(dtype="bfloat16"))
    ids, reference = _ids(1, 40), rounded_cache(model.config, torch.bfloat16)
    with NearStorageCache(model.config, tmp_path, card, page_tokens=32) as cache:
        assert cache.store.layout.kv_type.name == "BF16"
        model = model.to(torch.bfloat16)
        ours = _generate(model, cache, ids, "nearkv", 10)
        theirs = _generate(model, reference, ids, "sdpa", 10)
    # The model's own rounding to 8 bits of mantissa is what differs.
    difference = (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max()
    assert difference <= 2.0**-5 * torch.stack(theirs.logits).abs().max()


def test_bf16_kv_in_a_float32_model(model, card, tmp_path, rounded_cache):
    with NearStorageCache(model.config, tmp_path, card, 32, kv_dtype="bf16") as cache:
        _same(rounded_cache, model, cache, _ids(1, 50))


def test_groups_larger_than_the_card(tmp_path, rounded_cache):
    model = _model(_config(hidden_size=384, num_attention_heads=12))
    with NearStorageCache(
        model.config, tmp_path, nearkv.open_card("model", config="tiny"), 32
    ) as c:
        _same(rounded_cache, model, c, _ids(1, 40), 10)


def test_without_its_cache_the_attention_is_ordinary(model):
    ids, mask = _ids(2, 20), torch.ones(2, 20)
    ids[1, :7], mask[1, :7] = 0, 0
    for of in (lambda: None, lambda: DynamicCache(config=model.config)):
        ours, theirs = of(), of()
        for some in (ids, ids[:, :3], ids[:, :1]):
            if ours is None or ours.get_seq_length() == 0:
                seen = mask[:, : some.shape[1]]
            else:
                seen = torch.cat(
                    [mask, torch.ones(2, ours.get_seq_length() + some.shape[1] - 20)], 1
                )
            torch.testing.assert_close(
                _logits(model, ours, some, "nearkv", seen)[0],
                _logits(model, theirs, some, "sdpa", seen)[0],
            )


# --- cards, splits, spills -------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(model, rounded_cache):
    """Tokens and logits of a batch of three lengths, from transformers' own cache."""
    ids, mask = _ids(3, 600), torch.ones(3, 600, dtype=torch.long)
    for row, padded in enumerate((0, 150, 530)):
        ids[row, :padded], mask[row, :padded] = 0, 0
    cache = rounded_cache(model.config)
    return ids, mask, _generate(model, cache, ids, "sdpa", 30, attention_mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cards", "options"),
    [
        (1, {"page_tokens": 32}),
        (1, {"page_tokens": 128}),
        (1, {"page_tokens": 512}),
        (2, {"page_tokens": 32}),
        (4, {"page_tokens": 32}),
        (2, {"page_tokens": 128, "weights": [2, 1]}),
        (2, {"page_tokens": 32, "weights": "measure"}),
        (1, {"page_tokens": 32, "spill_pages": 4}),
        (2, {"page_tokens": 32, "spill_pages": 16}),
        (1, {"page_tokens": 32, "budget_bytes": 1 << 20, "beyond_budget": "keep"}),
    ],
)
def test_cards_splits_and_spills_change_no_token(
    model, expected, tmp_path, monkeypatch, cards, options
):
    monkeypatch.setattr("nearkv.store.space.READ_BYTES", 16 << 10)
    ids, mask, theirs = expected
    with NearStorageCache(model.config, tmp_path, ["model"] * cards, **options) as cache:
        ours = _generate(model, cache, ids, "nearkv", 30, attention_mask=mask)
        assert torch.equal(ours.sequences, theirs.sequences)
        a, b = torch.stack(ours.logits), torch.stack(theirs.logits)
        assert (a - b).abs().max() <= LOGIT_BOUND * b.abs().max()
        assert cache.store.bytes_written <= options.get("budget_bytes", 1 << 30)
        cache.store.flush()
        if options.get("weights") != "measure":  # or it depends on the machine who gets how much
            assert len(np.unique(cache.store.stored(0, 1)["shard"])) == cards
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.slow
@pytest.mark.parametrize("cards", [["twin"], ["twin", "twin"]])
def test_the_twins_change_no_token(model, expected, tmp_path, cards):
    ids, mask, theirs = expected
    for threads in (1, 2):
        try:
            opened, _ = open_cards(cards, threads=threads)
        except CardError as error:
            pytest.skip(str(error))
        with NearStorageCache(model.config, tmp_path, opened, 32) as cache:
            ours = _generate(model, cache, ids, "nearkv", 30, attention_mask=mask)
        assert torch.equal(ours.sequences, theirs.sequences)
        for card in opened:
            card.close()


@pytest.mark.parametrize("removed", [20, 70, 300])
def test_crop_with_a_long_tail(model, card, tmp_path, removed, rounded_cache):
    ids, reference = _ids(1, 400), rounded_cache(model.config)
    with NearStorageCache(model.config, tmp_path, card, 32, spill_pages=3) as cache:
        for attention, of in (("nearkv", cache), ("sdpa", reference)):
            _logits(model, of, ids[:, :350], attention)
            of.crop(-removed)
        for a, b in ((350, 390), (390, 391), (391, 400)):
            ours = _logits(model, cache, ids[:, a:b], "nearkv")
            theirs = _logits(model, reference, ids[:, a:b], "sdpa")
            assert (ours - theirs).abs().max() <= LOGIT_BOUND * theirs.abs().max()


def test_a_write_budget_ends_storing_with_an_error_or_keeps_pages_in_memory(model, tmp_path):
    with NearStorageCache(model.config, tmp_path, "model", 32, budget_bytes=1 << 15) as cache:
        with pytest.raises(FlashError, match="layer 1, sequence 0.*write budget"):
            _generate(model, cache, _ids(1, 100), "nearkv", 3)
    for wrong in ({"beyond_budget": "drop"}, {"spill_pages": 0}, {"weights": "guess"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NearStorageCache(model.config, tmp_path, "model", 32, **wrong)


# --- errors ----------------------------------------------------------------------------------


def test_another_attention_cannot_use_the_handles(model, cache):
    for attention in ("sdpa", "eager"):
        with pytest.raises(RuntimeError, match='attn_implementation="nearkv"'):
            _generate(model, cache, _ids(1, 40), attention, 3)
        cache.reset()


def _refused(tmp_path, match, card="model", **changes):
    with pytest.raises(ValueError, match=match):
        NearStorageCache(_config(**changes), tmp_path, card)
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    _refused(
        tmp_path,
        "llama cannot use nearkv: heads of 260 channels fit no page: .*up to 256",
        head_dim=260,
    )
    _refused(tmp_path, "layers of sliding_attention; .* full attention only", sliding_window=64)
    _refused(tmp_path, "soft-capped scores.*attn_logit_softcapping", attn_logit_softcapping=30.0)
    with nearkv.open_card("model", config="tiny") as tiny:
        _refused(tmp_path, "built for head_dim up to 64, not 128", tiny, head_dim=128)


def test_masks_of_four_dimensions_are_refused(model, cache):
    with pytest.raises(NotImplementedError, match="causal attention with padding"):
        _logits(model, cache, _ids(1, 4), "nearkv", torch.ones(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("head_dim", [20, 80, 112])
def test_heads_of_any_size_are_filled_up_with_zeros(card, tmp_path, rounded_cache, head_dim):
    model = _model(_config(hidden_size=64, head_dim=head_dim))
    with NearStorageCache(model.config, tmp_path, card, page_tokens=32) as cache:
        assert cache.store.layout.head_dim == -(-head_dim // 32) * 32
        ids, mask = _ids(2, 70), torch.ones(2, 70, dtype=torch.long)
        ids[1, :30], mask[1, :30] = 0, 0
        _same(rounded_cache, model, cache, ids, 10, attention_mask=mask)
        cache.reset()
        reference = rounded_cache(model.config)
        for attention, of in (("nearkv", cache), ("sdpa", reference)):
            _logits(model, of, ids, attention, mask)
            of.crop(-21)  # takes a page back
        ours = _logits(model, cache, ids[:, 49:], "nearkv", mask)
        theirs = _logits(model, reference, ids[:, 49:], "sdpa", mask)
        assert (ours - theirs).abs().max() <= LOGIT_BOUND * theirs.abs().max()


def test_another_batch_needs_another_cache(model, cache):
    _logits(model, cache, _ids(1, 4), "nearkv")
    with pytest.raises(
        ValueError,
        match=r"holds 1 sequences and was given 2; call batch_repeat_interleave\(2\) first",
    ):
        _logits(model, cache, _ids(2, 4), "nearkv")


def test_nan_in_k_is_named(model, cache):
    _logits(model, cache, _ids(1, 40), "nearkv")
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([37]), torch.nan)
    )
    try:
        with pytest.raises(ValueError, match="K of layer 1, sequence 0, kv head 1, token 40"):
            _logits(model, cache, _ids(1, 1), "nearkv")
    finally:
        hook.remove()


def test_a_full_disk_while_generating_is_named(model, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FlashError, match="page 0 of layer 0, sequence 0.*No space left.*--kv-dir"):
        _generate(model, cache, _ids(1, 20), "nearkv")


def test_pages_disappear_with_the_cache(model, card, tmp_path):
    cache = NearStorageCache(model.config, tmp_path, card, page_tokens=32)
    _logits(model, cache, _ids(1, 40), "nearkv")
    (path,) = cache.store.page_files()
    assert os.path.getsize(path) > 4096
    assert list(tmp_path.iterdir()) == []  # it never had a name
    fd = int(path.name)
    inode = os.fstat(fd).st_ino
    del cache
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        assert os.fstat(fd).st_ino == inode
