# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M through the model card against transformers' own cache holding fp16 K and V.

The bound on logits. Each attention output may differ by the relative L2 error that attention is
allowed (REL_L2_BOUND, met in test_attention.py), in any direction, and a difference of any size lets
some K or V round to its neighbour. What that does to the logits of this model is measured: the
reference runs again with random errors of just that size added to every attention output. The
largest change seen, doubled because a few random directions are not the worst ones, is the bound.
"""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from nearkv import CardError, NearStorageCache, generate
from nearkv.cards import open_cards
from nearkv.hf import models

pytestmark = pytest.mark.model
REL_L2_BOUND = 6e-5
NEW_TOKENS = 64
_LICENSE = Path(__file__).parents[2] / "LICENSE"


class Fp16Cache(DynamicCache):
    def update(self, k, v, *args, **kwargs):
        return super().update(k.half().float(), v.half().float(), *args, **kwargs)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = models.load()
    model.generation_config.max_length = None
    return model, tokenizer


def _ids(model, tokenizer, text):
    return generate._tokens(model, tokenizer, text, raw=False, opens_answer=True)


def _prompts(tokenizer):
    """Built in; a list of facts; and more than 1,500 tokens of a licence with a question."""
    facts = "\n".join(f"{n} times {n + 3} is {n * (n + 3)}." for n in range(1, 13))
    licence = tokenizer(_LICENSE.read_text())["input_ids"][:1600]
    return {
        "built in": generate.PROMPT,
        "facts": f"{facts}\n\nContinue this list with three more lines.",
        "long": tokenizer.decode(licence) + "\n\nWhat kind of document is this? Explain.",
    }


def _noisy(seed):
    """Register and name an attention whose outputs are off by REL_L2_BOUND."""
    generator = torch.Generator().manual_seed(seed)

    def attention(*args, **kwargs):
        out, _ = sdpa_attention_forward(*args, **kwargs)
        noise = torch.randn(out.shape, generator=generator)
        size = out.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return out + noise * size * REL_L2_BOUND, None

    AttentionInterface.register("noisy", attention)
    AttentionMaskInterface.register("noisy", sdpa_mask)
    return "noisy"


@torch.no_grad()
def _logits(model, attention, cache, ids, cuts=()):
    """Logits of every position; ids are given in pieces."""
    model.set_attn_implementation(attention)
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat(
        [
            model(ids[:, a:b], past_key_values=cache).logits
            for a, b in zip(edges, edges[1:], strict=False)
        ],
        dim=1,
    )


def _bound(model, ids, reference, n_seeds=3):
    worst = 0.0
    for seed in range(n_seeds):
        changed = _logits(model, _noisy(seed), Fp16Cache(config=model.config), ids)
        worst = max(worst, (changed - reference)[:, -256:].abs().max().item())
    return 2 * worst


def _greedy(model, attention, cache, ids):
    model.set_attn_implementation(attention)
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return result.sequences[0, ids.shape[1] :], torch.cat(result.logits)


@pytest.mark.parametrize(
    "which", [pytest.param("built in", marks=pytest.mark.smoke), "facts", "long"]
)
def test_greedy_decoding_equals_transformers_own_cache(
    loaded, card, tmp_path, which, record_property
):
    model, tokenizer = loaded
    ids = _ids(model, tokenizer, _prompts(tokenizer)[which])
    assert ids.shape[1] >= (1500 if which == "long" else 128)
    expected, logits = _greedy(model, "sdpa", Fp16Cache(config=model.config), ids)
    with NearStorageCache(model.config, tmp_path, card) as cache:
        got, _ = _greedy(model, "nearkv", cache, ids)
        n_pages = (ids.shape[1] + NEW_TOKENS - 1) // 128
        assert cache.store.n_pages(0, 0) == n_pages
        assert cache.figures.pages >= (NEW_TOKENS - 1) * 30 * 3 * (ids.shape[1] // 128)
    if torch.equal(got, expected):
        return
    at = int((got != expected).nonzero()[0])
    whole = torch.cat([ids, expected[None]], dim=1)
    bound = _bound(model, whole, _logits(model, "sdpa", Fp16Cache(config=model.config), whole))
    gap = (logits[at, expected[at]] - logits[at, got[at]]).item()
    record_property("near_tie", f"token {at}: gap {gap:.2e}, bound {bound:.2e}")
    # Both logits may move by the bound.
    assert gap <= 2 * bound, (
        f"token {at} differs and its logits are {gap:.2e} apart, bound {bound:.2e}"
    )


@pytest.mark.smoke
def test_teacher_forced_logits_over_256_positions(loaded, card, tmp_path, record_property):
    model, tokenizer = loaded
    ids = tokenizer(_LICENSE.read_text(), return_tensors="pt")["input_ids"][:, :512]
    reference = _logits(model, "sdpa", Fp16Cache(config=model.config), ids)
    bound = _bound(model, ids, reference)
    # 200 positions in one piece behind a past, then one by one, across the page at 384 and 512.
    with NearStorageCache(model.config, tmp_path, card) as cache:
        got = _logits(model, "nearkv", cache, ids, [256, *range(456, 512)])
        assert cache.store.n_pages(0, 29) == 4
    difference = (got - reference)[:, 256:].abs().max().item()
    record_property("logits", f"largest difference {difference:.2e}, bound {bound:.2e}")
    assert difference <= bound
    assert bound < 0.1 * reference.std().item()  # or it would bound nothing


@torch.no_grad()
def _continue(model, cache, past, ids, n):
    """n greedy tokens behind a past whose K and V are given; ids : (1, 1), the token after it."""
    model.set_attn_implementation("nearkv")
    cache.fill([(theirs.keys, theirs.values) for theirs in past.layers])
    tokens = []
    for _ in range(n):
        ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids.item())
    return tokens


@torch.no_grad()
def test_cards_splits_spills_and_threads_change_no_token(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("nearkv.store.space.READ_BYTES", 64 << 10)  # or one card would have it all
    model, tokenizer = loaded
    ids = tokenizer(_LICENSE.read_text(), return_tensors="pt")["input_ids"][:, :701]
    model.set_attn_implementation("sdpa")
    past = Fp16Cache(config=model.config)
    model.model(ids[:, :-1], past_key_values=past)
    expected = None
    for n_cards, threads, page_tokens, spill_pages, weights in (
        (1, 1, 128, 1, None),
        (1, 2, 32, 1, None),  # spilt every 32 tokens
        (1, 1, 512, 1, None),  # every 512
        (2, 1, 32, 4, None),  # every 128
        (2, 2, 128, 4, [3, 1]),
        (4, 1, 32, 16, None),
        (4, 2, 128, 1, "measure"),
    ):
        try:
            cards, _ = open_cards(["twin"] * n_cards, threads=threads)
        except CardError as error:
            pytest.skip(str(error))
        with NearStorageCache(
            model.config, tmp_path, cards, page_tokens, spill_pages=spill_pages, weights=weights
        ) as cache:
            got = _continue(model, cache, past, ids[:, -1:], 6)
            shards = {*cache.store.stored(0, 0)["shard"].ravel().tolist()}
            if weights != "measure":  # or it depends on the machine who gets how much
                assert shards == set(range(n_cards))
        for card in cards:
            card.close()
        expected = expected or got
        assert got == expected
