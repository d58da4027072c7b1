# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of transformers, in a tiny form: its own tokens, or a clear refusal."""

import traceback

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nearkv import NearStorageCache
from nearkv.hf.support import check_model, decoder_config

pytestmark = pytest.mark.usefixtures("one_thread")
LOGIT_BOUND = 2 * 2.0**-11  # as in test_cache.py
# Whatever a config has of these becomes as small.
_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 64, "vocab_size": 160, "d_model": 64, "n_embd": 64,
    "n_layer": 2, "n_head": 4, "n_inner": 64, "ffn_dim": 64, "num_layers": 2, "num_heads": 4,
    "n_heads": 4, "n_layers": 2, "dff": 64, "emb_dim": 64, "word_embed_proj_dim": 64,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "ffn_hidden_size": 64, "rotary_dim": 8,
    "embedding_size": 64, "dim_model": 64, "dim_ff": 64, "dim_head": 32, "hidden_dim": 64,
    "lru_width": 64, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "seq_length": 256, "max_seq_len": 256, "type_vocab_size": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_num_experts": 4,
    "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_layer_start_index": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "num_kv_shared_layers": 0,
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16,
}  # fmt: skip
_LEAVE = object()
_SPECIAL = {
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "helium": {"head_dim": 16},
    "prophetnet": {"num_hidden_layers": _LEAVE},
    "zamba": {"layer_types": _LEAVE, "num_hidden_layers": _LEAVE},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
} | {
    name: {"is_decoder": True}
    for name in (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta",
        "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "rembert", "roformer",
        "megatron-bert", "big_bird",
    )
}  # fmt: skip


def _fixed(cls, name, attribute_map=()):
    """Whether a config computes this itself."""
    name = attribute_map[name] if name in attribute_map else name
    found = getattr(cls, name, None)
    return isinstance(found, property) and found.fset is None


def _tiny(config):
    """The same kind of config, as small as it gets; every kind of layer stays."""
    cls, values = type(config), {}
    for name, value in _TINY.items():
        try:
            old = getattr(config, name)
        except (AttributeError, RuntimeError):  # or it differs by layer
            continue
        if (old is None or type(old) in (int, float)) and not _fixed(cls, name):
            values[name] = value
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and not _fixed(cls, "layer_types", config.attribute_map):
        kinds = list(dict.fromkeys(kinds))
        values["layer_types"] = (2 * kinds)[: max(2, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    if isinstance(getattr(config, "mlp_layer_types", None), list):
        values["mlp_layer_types"] = config.mlp_layer_types[: values.get("num_hidden_layers", 2)]
    for name in cls.sub_configs:
        if getattr(config, name, None) is not None:
            values[name] = _tiny(getattr(config, name))
    values |= _SPECIAL.get(config.model_type, {})
    return cls(**{name: value for name, value in values.items() if value is not _LEAVE})


def _generate(model, attention, cache, padded):
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 150, (2, 40), generator=generator), torch.ones(2, 40).long()
    if padded:
        ids[1, :9], mask[1, :9] = 0, 0
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
        num_beams=1, output_logits=True, return_dict_in_generate=True, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip


def _build(config):
    """The model with random weights, and attention that is not flat."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.normal_(0, 1.5 * weights.shape[1] ** -0.5)
    return model


def _refusal(call) -> str | None:
    """The message with which nearkv refuses; None if the call succeeds."""
    try:
        call()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "/nearkv/hf/" not in last or "another cache" not in str(error):
            raise
        return str(error)
    return None


def _outcome(config, card, rounded_cache) -> str:
    """What becomes of a model: how it is refused, or "the same tokens"."""
    refusal = _refusal(lambda: check_model(decoder_config(config)))
    if refusal and not config.is_encoder_decoder:  # those have a decoder that stands alone
        return f"refused by its config: {refusal}"
    try:
        model = _build(config)
    except Exception as error:
        return f"not tried: {error!r}"
    if refusal := _refusal(lambda: check_model(decoder_config(model.config))):
        return f"refused by its config: {refusal}"
    for padded in (False, True):
        try:
            theirs = _generate(model, "sdpa", rounded_cache(model.config), padded)
        except Exception as error:
            return f"not tried: {error!r}"
        ours = []
        with NearStorageCache(model.config, None, card, page_tokens=32) as cache:
            refusal = _refusal(lambda: ours.append(_generate(model, "nearkv", cache, padded)))  # noqa: B023
            if refusal:
                return f"refused by its first forward pass: {refusal}"
            assert cache.figures.card_tokens > 0
        assert torch.equal(ours[0].sequences, theirs.sequences)
        a, b = torch.stack(ours[0].logits), torch.stack(theirs.logits)
        assert (a - b).abs().max() <= LOGIT_BOUND * b.abs().max()
    return "the same tokens"


_NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_GROUPS = 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # some models' own
@pytest.mark.parametrize("group", range(_GROUPS))
def test_every_model_has_its_own_tokens_or_is_refused(group, card, rounded_cache, record_property):
    names, outcomes = _NAMES[group::_GROUPS], {}
    for name in names:
        try:
            config = _tiny(CONFIG_MAPPING[name]())
        except Exception as error:  # a config that wants more than the table gives
            outcomes[name] = f"not tried: {error!r}"
            continue
        outcomes[name] = _outcome(config, card, rounded_cache)
    for name, outcome in outcomes.items():
        record_property(name, outcome)
        print(f"{name:24s} {outcome}"[:200])
    tried = [name for name in names if not outcomes[name].startswith("not tried")]
    assert len(tried) >= 0.75 * len(names), outcomes
    assert "the same tokens" in outcomes.values()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gptj", "GPTJForCausalLM computes its attention itself"),
        ("falcon", "FalconForCausalLM computes its attention itself"),
        ("bloom", "BloomForCausalLM computes its attention itself"),
        ("gpt_oss", "GptOssForCausalLM is not made for plain attention"),
    ],
)
def test_models_without_the_attention_interface_are_refused_when_loaded(name, why, tmp_path):
    config = _tiny(CONFIG_MAPPING[name]())
    with pytest.raises(ValueError, match=f"nearkv.* is not for this model: {why}"):
        AutoModelForCausalLM.from_config(config, attn_implementation="nearkv")
    with pytest.raises(ValueError, match=f"{why}.*use another cache"):
        NearStorageCache(config, tmp_path, "model")
    AutoModelForCausalLM.from_config(_tiny(CONFIG_MAPPING[name]()))  # as it is, it can be used
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "layers of sliding_attention"),
        ("llama4_text", "layers of chunked_attention"),
        ("qwen3_next", "layers of linear_attention"),
        ("deepseek_v3", "multi-head latent attention"),
        ("mllama", "cross attention"),
        ("t5", "cross attention"),
        ("blt", "does not say what its layers and heads are"),
    ],
)
def test_models_with_other_attention_are_refused_by_their_config(name, why, tmp_path):
    with pytest.raises(ValueError, match=f"{why}.*use another cache"):
        NearStorageCache(CONFIG_MAPPING[name](), tmp_path, "model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"takes the config of a model \(model.config\), not dict"):
        NearStorageCache({"hidden_size": 64}, tmp_path, "model")


def test_a_model_with_more_layers_than_the_config_is_refused(card, tmp_path):
    config = _tiny(LlamaConfig(num_hidden_layers=4))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="nearkv").eval()
    few = _tiny(LlamaConfig())
    few.num_hidden_layers = 1
    with NearStorageCache(few, tmp_path, card) as cache, torch.no_grad():
        with pytest.raises(ValueError, match="made for 1 layers, and the model has a layer 1"):
            model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
