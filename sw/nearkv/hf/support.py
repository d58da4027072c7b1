# SPDX-License-Identifier: Apache-2.0
"""Which models can keep their K and V in a NearStorageCache.

What a config says is checked when the cache is made, and what a model class cannot do when it is told
to use the attention "nearkv". What neither tells (a model whose attention does something unusual with
K, V or the mask) is refused by `attention` in the first forward pass, before anything is stored.
"""

from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from nearkv_hw import pages
from nearkv_hw.abi import KvType, PageLayout

# Of a config: what attention is then more than softmax(q k) v.
_UNSUPPORTED = {
    "attn_logit_softcapping": "soft-capped scores",
    "kv_lora_rank": "multi-head latent attention",
    "attention_sinks": "attention sinks",
    "cross_attention_layers": "cross attention",
    "alibi": "position bias (ALiBi)",
    "relative_attention_num_buckets": "relative position bias",
}
_OTHER_CACHE = "use another cache, such as transformers' DynamicCache"


def decoder_config(config):
    """The part of a model's config that describes its decoder.

    Raises
    ------
    TypeError
        If it is no config of transformers.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"NearStorageCache takes the config of a model (model.config), not {type(config).__name__}"
        )
    return config.get_text_config(decoder=True)


class Shape(NamedTuple):
    """What the cache of a model is made of."""

    n_layers: int
    n_kv_heads: int
    head_dim: int


def check_model(config) -> Shape:
    """The layers and heads of a model that nearkv supports.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the decoder.

    Raises
    ------
    ValueError
        If it is of another kind, naming what.
    """
    name = name_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {name} has cross attention; NearStorageCache supports decoders only: "
            f"{_OTHER_CACHE}"
        )
    for model_class in _model_classes(config):
        if problem := class_problem(model_class):
            raise ValueError(f"model {name} cannot use nearkv: {problem}; {_OTHER_CACHE}")
    try:
        layers = _layers(config)
        unsupported = [a for a in _UNSUPPORTED if any(getattr(one, a, None) for one in layers)]
        kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
        heads = {_heads(one) for one in layers}
        n_layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the config of model {name} does not say what its layers and heads are ({error}); "
            f"{_OTHER_CACHE}"
        ) from None
    if unsupported:
        raise ValueError(
            f"model {name} has {_UNSUPPORTED[unsupported[0]]} ({unsupported[0]}), which nearkv does "
            f"not support; {_OTHER_CACHE}"
        )
    if kinds:
        raise ValueError(
            f"model {name} has layers of {', '.join(sorted(kinds))}; "
            f"NearStorageCache supports full attention only: {_OTHER_CACHE}"
        )
    if len(heads) > 1:
        raise ValueError(
            f"model {name} has layers whose heads differ; NearStorageCache supports one size of "
            f"heads only: {_OTHER_CACHE}"
        )
    ((head_dim, n_kv_heads),) = heads
    return Shape(n_layers, n_kv_heads, head_dim)


def _layers(config):
    """Configs of the layers; one stands for all where they are alike."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]


def _heads(config) -> tuple[int, int]:
    """Channels of a head and number of kv heads."""
    # Where encoder and decoder share a config, the other names mean the encoder.
    n_q_heads = getattr(config, "decoder_attention_heads", None)
    n_kv_heads = n_q_heads or getattr(config, "num_key_value_heads", None)
    n_q_heads = n_q_heads or config.num_attention_heads
    if getattr(config, "multi_query", False):
        n_kv_heads = 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_q_heads
    return head_dim, n_kv_heads or n_q_heads


def layout_for(config, head_dim: int, page_tokens: int, kv_type: KvType) -> PageLayout:
    """Of pages for a model. They have channels in multiples of 32; what a head lacks is zero.

    Raises
    ------
    ValueError
        If there are no such pages.
    """
    try:
        return PageLayout(pages.page_channels(head_dim), page_tokens, kv_type)
    except ValueError as error:
        raise ValueError(f"model {name_of(config)} cannot use nearkv: {error}") from None


def class_problem(model_class) -> str | None:
    """Why a model class cannot use the attention "nearkv", or None if nothing is known against it."""
    if not model_class._can_set_attn_implementation():
        return (
            f"{model_class.__name__} computes its attention itself and never calls transformers' "
            "attention interface"
        )
    if not model_class._supports_sdpa:
        return (
            f"{model_class.__name__} is not made for plain attention (_supports_sdpa is False), as "
            "models with attention sinks, soft-capped scores or no attention at all are not"
        )
    return None


def name_of(config) -> str:
    """Of a model, for messages."""
    return config.name_or_path or config.model_type


def _model_classes(config):
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, tuple) else (found,)
            return
