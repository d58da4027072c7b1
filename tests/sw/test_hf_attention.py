# SPDX-License-Identifier: Apache-2.0
"""The attention "nearkv": with caches that are not ours it is "sdpa", with ours it is exact or refused."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    MistralConfig,
    QuantizedCache,
    Qwen2Config,
    StaticCache,
    cache_utils,
)
from transformers.masking_utils import create_causal_mask

from nearkv import NearStorageCache
from nearkv.hf.attention import Handle, OtherMask, Padding, attention_forward

pytestmark = pytest.mark.usefixtures("one_thread")
LOGIT_BOUND = 2 * 2.0**-11  # as in test_cache.py
COMMON = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 200, "pad_token_id": 0,
    "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "full": lambda: LlamaConfig(**COMMON),
    "sliding": lambda: MistralConfig(**COMMON, sliding_window=12),
    "hybrid": lambda: Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
}
CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
} | (
    {"fp8": lambda config: QuantizedCache("fp8", config)}
    if hasattr(cache_utils, "Fp8QuantizedLayer")  # not in older transformers
    else {}
)


def _model(kind="full", **changes):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.update(changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def models():
    return {kind: _model(kind) for kind in CONFIGS}


@pytest.fixture
def model(models):
    return models["full"]


@pytest.fixture
def cache(model, card, tmp_path):
    with NearStorageCache(model.config, tmp_path, card, page_tokens=32) as cache:
        yield cache


def _ids(*shape, seed=1):
    return torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(seed))


def _padded(rows=3, n=40):
    """Ids and mask of rows with 0, 9, 18, .. positions of padding on the left."""
    ids, mask = _ids(rows, n), torch.ones(rows, n, dtype=torch.long)
    for row in range(rows):
        ids[row, : 9 * row], mask[row, : 9 * row] = 0, 0
    return ids, mask


@torch.no_grad()
def _steps(model, attention, cache, ids, mask, cuts, **options):
    """Logits of every position, given in pieces."""
    model.set_attn_implementation(attention)
    logits, edges = [], [0, *cuts, ids.shape[1]]
    for a, b in zip(edges, edges[1:], strict=False):
        if cache is None:
            a = 0
        seen = None if mask is None else mask[:, :b]
        logits.append(
            model(ids[:, a:b], attention_mask=seen, past_key_values=cache, **options).logits
        )
    return torch.cat(logits, dim=1)


# --- caches that are not ours ------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("layers", "kind"),
    [(layers, kind) for layers in CONFIGS for kind in CACHES if layers == "full" or kind != "fp8"],
)
def test_any_other_cache_gets_what_sdpa_gets(models, layers, kind, padded):
    model = models[layers]
    ids, mask = _padded()
    mask = mask if padded else None
    cuts = (20, 31, 32, 33)  # prefill, a chunk behind a past, single tokens, a chunk
    outputs = [
        _steps(model, attention, CACHES[kind](model.config), ids, mask, cuts)
        for attention in ("nearkv", "sdpa")
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind",
    ["static", "dynamic", "offloaded_static", "offloaded"] + ["quantized"] * ("fp8" in CACHES),
)
def test_generate_with_another_cache_gives_the_tokens_of_sdpa(models, kind):
    model = models["sliding"] if kind == "dynamic" else models["full"]
    options = {"cache_implementation": kind, "disable_compile": True}
    if kind == "quantized":
        options["cache_config"] = {"backend": "fp8"}
    ids, mask = _padded()
    results = []
    for attention in ("nearkv", "sdpa"):
        model.set_attn_implementation(attention)
        try:
            results.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=20,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    **options,
                )  # fmt: skip
            )
        except (RuntimeError, AssertionError) as error:  # offloading wants an accelerator
            results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
        return
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=0, atol=0)


def test_encoders_and_cross_attention_get_what_sdpa_gets():
    torch.manual_seed(0)
    config = BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=200,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    ids, mask = _padded()
    logits = []
    for attention in ("nearkv", "sdpa"):
        model.set_attn_implementation(attention)
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False,
            num_beams=1, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_packed_sequences_get_what_sdpa_gets(model):
    ids, positions = _ids(2, 30), torch.cat([torch.arange(11), torch.arange(19)])[None]
    logits = []
    for attention in ("nearkv", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_masks_of_four_dimensions_and_bidirectional_models_get_what_sdpa_gets(model):
    ids, logits = _ids(2, 30), []
    mask = torch.rand(2, 1, 30, 30, generator=torch.Generator().manual_seed(3)) > 0.3
    mask |= torch.eye(30, dtype=torch.bool)
    both_ways = _model(is_causal=False)
    for attention in ("nearkv", "sdpa"):
        logits.append(
            (
                _steps(model, attention, None, ids, None, ()),
                _steps(model, attention, None, ids, mask, ()),
                _steps(both_ways, attention, None, ids, None, ()),
            )
        )
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert not torch.allclose(logits[0][0], logits[0][1])


def test_training_without_our_cache_has_the_gradients_of_sdpa(model):
    gradients = []
    ids, mask = _padded()
    for attention in ("nearkv", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_sinks_and_caps_are_refused_with_any_cache(model):
    q = torch.zeros(1, 4, 3, 32)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        attention_forward(model, q, q, q, None, s_aux=torch.zeros(4))
    with pytest.raises(NotImplementedError, match="soft-capped scores"):
        attention_forward(model, q, q, q, None, softcap=50.0)


# --- our cache: what is not plain causal attention ---------------------------------------------


def _untouched(model, cache, n=20):
    """The cache is as it was: it goes on as if the refused call had not been."""
    with NearStorageCache(model.config, None, cache.card, page_tokens=32) as fresh:
        results = [_steps(model, "nearkv", of, _ids(1, n), None, (5,)) for of in (cache, fresh)]
    assert torch.equal(*results)


def test_gradients_stop_at_the_cache_with_an_error(model, cache):
    model.set_attn_implementation("nearkv")
    out = model(_ids(1, 20), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="keeps no gradients; train with use_cache=False"):
        out.logits.sum().backward()


def test_dropout_is_refused(cache, tmp_path):
    model = _model(attention_dropout=0.1).train()
    model.set_attn_implementation("nearkv")
    with pytest.raises(NotImplementedError, match="dropout; call model.eval"):
        model(_ids(1, 20), past_key_values=cache)
    model.eval()
    _untouched(model, cache)


def test_attention_weights_are_refused(model, cache):
    model.set_attn_implementation("nearkv")
    with pytest.raises((NotImplementedError, ValueError), match="attention"), torch.no_grad():
        model(_ids(1, 20), past_key_values=cache, output_attentions=True)
    cache.reset()
    _untouched(model, cache)


def test_models_that_look_both_ways_are_refused(cache):
    model = _model(is_causal=False)
    model.set_attn_implementation("nearkv")
    for mask in (None, torch.ones(1, 20)):
        with pytest.raises(NotImplementedError, match="or no causality"), torch.no_grad():
            model(_ids(1, 20), past_key_values=cache, attention_mask=mask)
    model = _model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("nearkv")
    with pytest.raises(NotImplementedError, match="causal attention only"), torch.no_grad():
        model(_ids(1, 20), past_key_values=cache)
    _untouched(_model(), cache)


def test_custom_masks_are_refused(model, cache):
    def prefix(batch, head, q, kv):
        return kv < 5

    config = copy.deepcopy(model.config)
    config._attn_implementation = "nearkv"
    embeds, x, q = torch.zeros(1, 20, 64), torch.zeros(1, 2, 20, 32), torch.zeros(1, 4, 20, 32)
    for options in ({"or_mask_function": prefix}, {"and_mask_function": prefix},
                    {"block_sequence_ids": torch.zeros(1, 20, dtype=torch.long)}):  # fmt: skip
        mask = create_causal_mask(config, embeds, None, cache, **options)
        assert isinstance(mask, OtherMask)
        with pytest.raises(NotImplementedError, match="asks for another mask"):
            attention_forward(model, q, *cache.update(x, x, 0), mask)
        with pytest.raises(RuntimeError, match="asks for another mask"):
            mask[0]
    model.set_attn_implementation("nearkv")
    for mask in (torch.ones(1, 1, 20, 20, dtype=torch.bool), torch.zeros(1, 1, 20, 20)):
        with pytest.raises(NotImplementedError, match="no 4-dimensional masks"), torch.no_grad():
            model(_ids(1, 20), past_key_values=cache, attention_mask=mask)
    _untouched(model, cache)


def test_packed_sequences_behind_our_cache_are_what_sdpa_makes_of_them(model, cache, rounded_cache):
    positions = torch.cat([torch.arange(11), torch.arange(9)])[None]
    ours, theirs = (
        _steps(model, attention, of, _ids(1, 20), None, (), position_ids=positions)
        for attention, of in (("nearkv", cache), ("sdpa", rounded_cache(model.config)))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGIT_BOUND * theirs.abs().max().item())


def test_an_attention_function_cannot_mix_layers_or_caches(model, cache):
    x = torch.zeros(1, 2, 3, 32)
    q = torch.zeros(1, 4, 3, 32)
    module = model.model.layers[0].self_attn
    k0, v0 = cache.update(x, x, 0)
    with pytest.raises(NotImplementedError, match="mixes them"):
        attention_forward(module, q, k0, x, None)
    with pytest.raises(RuntimeError, match="updated twice without attention"):
        cache.update(x, x, 0)
    with pytest.raises(NotImplementedError, match="not those of its last update"):
        attention_forward(module, q, v0, k0, None)
    k0, v0 = cache.update(x, x, 0)
    with pytest.raises(NotImplementedError, match=r"queries of shape \(1, 4, 2, 32\)"):
        attention_forward(module, q[:, :, :2], k0, v0, None)
    padding = Padding(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="made for a NearStorageCache"):
        attention_forward(module, q, x, x, padding)
    _untouched(model, cache)


def test_handles_and_masks_can_be_looked_at_and_nothing_else(cache):
    k, _ = cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
    assert isinstance(k, Handle)
    assert (k.shape, k.size(2), k.dim(), k.dtype) == ((1, 2, 3, 32), 3, 4, torch.float32)
    one = torch.ones(1)
    for use in (
        lambda: k + 1, lambda: one + k, lambda: k[:, 0], lambda: k.clone(), lambda: -k,
        lambda: torch.stack([k, k]), lambda: k.to(torch.float32), lambda: k.tolist(),
        lambda: np.asarray(k), lambda: k == 0, lambda: one @ k, lambda: bool(k), lambda: list(k),
        lambda: torch.nn.functional.scaled_dot_product_attention(one, k, k), lambda: k.plane,
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="only the nearkv attention can use them"):
            use()
    padding = Padding(torch.ones(1, 3, dtype=torch.bool))
    assert padding.to("cpu") is padding
    with pytest.raises(RuntimeError, match="this model changes its masks"):
        padding[:, None, None, :2]


@pytest.mark.parametrize("shapes", [((1, 2, 3, 48),) * 2, ((1, 3, 3, 32),) * 2,
                                    ((1, 2, 3, 32), (1, 2, 2, 32))])  # fmt: skip
def test_k_and_v_of_other_shapes_are_refused_whenever_they_come(cache, shapes):
    k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="made for 2 kv heads of 32 channels"):
        cache.update(k, v, 0)  # the first
    x = torch.zeros(1, 2, 5, 32)
    cache.fill([(x, x)] * len(cache.layers))
    with pytest.raises(ValueError, match="made for 2 kv heads of 32 channels"):
        cache.update(k, v, 0)  # a later one
    assert cache.get_seq_length() == 5


def test_layers_have_no_tensors_and_say_so(cache):
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match="lie on flash"):
            getattr(cache.layers[0], name)


# --- compiled models -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about functions of Python's own
def test_compiled_models_keep_the_cache_out_of_their_graphs(model, cache, tmp_path):
    ids, cuts = _ids(1, 60), (40, 41)
    expected = _steps(model, "nearkv", cache, ids, None, cuts)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with NearStorageCache(model.config, tmp_path, cache.card, 32) as ours:
        got = _steps(compiled, "nearkv", ours, ids, None, cuts)
        assert ours.figures.card_tokens > 0
    assert (got - expected).abs().max() <= LOGIT_BOUND * expected.abs().max()
    torch._dynamo.reset()  # or what was found out above would do
    whole = torch.compile(model, backend="eager", fullgraph=True)
    cache.reset()
    with pytest.raises(Exception, match="a NearStorageCache cannot be part of a compiled graph"):
        _steps(whole, "nearkv", cache, ids, None, ())
    _untouched(model, cache)
    for of in (lambda: None, lambda: DynamicCache(config=model.config)):  # others may be
        torch._dynamo.reset()
        got = _steps(whole, "nearkv", of(), ids, None, ())
        torch.testing.assert_close(got, _steps(model, "sdpa", of(), ids, None, ()))
