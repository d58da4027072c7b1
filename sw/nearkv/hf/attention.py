# SPDX-License-Identifier: Apache-2.0
"""The attention "nearkv" of transformers, and how it knows whose K and V it is given.

A model builds its mask first, then calls `cache.update(k, v, layer)` and hands what that returns to
the attention function. Neither the mask function nor the attention function is told which cache is
used. So what a NearStorageCache hands out carries a mark, and the marks meet again here:

    cache.get_mask_sizes -> Length -> mask_function      -> Padding \\
    cache.update         -> Handle                                   > attention_forward

Without a mark, both functions do exactly what "sdpa" does. A mark that arrives without its
counterpart, and every use of a marked tensor elsewhere, is an error.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

if TYPE_CHECKING:
    from .layer import Layer


_F = TypeVar("_F", bound=Callable)


def uncompiled(function: _F) -> _F:
    """Keep a function out of compiled graphs."""
    return cast(_F, torch.compiler.disable(function))


class Length(int):
    """How many positions a NearStorageCache will have: tells the mask function whose they are."""


class _Marked:
    """What only `attention_forward` may use. It has a shape and a type; any use is an error.

    Not a torch.Tensor, so that no operation goes past it, and a compiler leaves it alone.
    """

    def __init__(self, plain: torch.Tensor):
        self.plain = plain
        self.shape, self.ndim, self.dtype = plain.shape, plain.ndim, plain.dtype
        self.device = plain.device

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        raise cls._misused(name)

    def __getattr__(self, name: str):
        if name.startswith("__"):  # asked for by copy and the like
            raise AttributeError(name)
        raise self._misused(name)

    @classmethod
    def _misused(cls, operation: str) -> RuntimeError:
        return RuntimeError(f"{cls.complaint} (the operation was {operation})")

    complaint = ""


def _forbid(name: str):
    def misuse(self, *args, **kwargs):
        raise self._misused(name)

    return misuse


for _name in (
    "add and array bool eq floordiv ge getitem gt invert iter le lt matmul mod mul ne neg or pow radd "
    "rmatmul rmul rpow rsub rtruediv setitem sub truediv xor"
).split():
    setattr(_Marked, f"__{_name}__", _forbid(f"__{_name}__"))


class Handle(_Marked):
    """New K or V on its way to `attention_forward`, with the layer it belongs to."""

    complaint = (
        "K and V of a NearStorageCache lie on flash, and only the nearkv attention can use them: load "
        'the model with attn_implementation="nearkv", or call '
        'model.set_attn_implementation("nearkv"); if it has that already, its attention does more '
        "with K and V than nearkv supports, and it needs another cache"
    )

    def __init__(self, plain: torch.Tensor, layer: "Layer"):
        super().__init__(plain)
        self.layer = layer


class Padding(_Marked):
    """bool (batch, positions): which positions of a NearStorageCache are tokens."""

    complaint = (
        "the mask of a NearStorageCache says which positions are padding, and only the nearkv "
        "attention can use it; this model changes its masks, and needs another cache"
    )

    def to(self, *args, **kwargs) -> "Padding":
        """Models on several devices move masks; this one is read on the host."""
        return self


class OtherMask(_Marked):
    """Stands for a mask that a NearStorageCache does not know.

    A model may build masks that none of its layers uses, so nothing is wrong before one is used.
    """

    complaint = (
        "NearStorageCache knows causal attention with padding, and this model asks for another mask "
        "(a window, chunks, a prefix, blocks, or no causality); use another cache"
    )

    def __init__(self):
        super().__init__(torch.empty(0))


def mask_function(*args, **kwargs) -> torch.Tensor | Padding | OtherMask | None:
    """The mask function "nearkv" of transformers; the arguments are those of `sdpa_mask`.

    Returns
    -------
    `Padding` for a NearStorageCache, or None if all its positions are tokens: causality needs no
    mask. `OtherMask` if it were more than that. For any other cache what "sdpa" gets.
    """
    kv_length = kwargs.get("kv_length")
    if not isinstance(kv_length, Length):
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        return OtherMask()
    attention_mask = kwargs.get("attention_mask")
    if attention_mask is None:
        return None
    # What is missing on the right is padding, as with "sdpa".
    missing = kv_length - attention_mask.shape[1]
    mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)), value=False)
    mask = mask[:, :kv_length]
    return None if mask.all() else Padding(mask)


def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                      **kwargs):  # fmt: skip
    """The attention function "nearkv" of transformers.

    With K and V of a NearStorageCache, attends to pages, tail and new tokens, and stores what is
    new; with any others, does what "sdpa" does.

    Raises
    ------
    NotImplementedError
        If a NearStorageCache is used with what it does not support. Nothing has been stored then.
    """
    for name, what in (("s_aux", "attention sinks"), ("softcap", "soft-capped scores")):
        if kwargs.get(name) is not None:  # not every "sdpa" refuses them
            raise NotImplementedError(
                f"nearkv attention has no {what} ({name}); load the model with another "
                "attn_implementation"
            )
    if not isinstance(key, Handle) and not isinstance(value, Handle):
        if isinstance(attention_mask, _Marked):
            raise RuntimeError(
                "the mask was made for a NearStorageCache, but K and V do not come from it; this "
                "model needs another cache"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return _attend(module, query, key, value, attention_mask, scaling, dropout, kwargs), None


@uncompiled
def _attend(module, query, key, value, mask, scaling, dropout: float, options: dict):
    """Attention to K and V of a NearStorageCache."""
    if not (isinstance(key, Handle) and isinstance(value, Handle)) or key.layer is not value.layer:
        raise NotImplementedError(
            "NearStorageCache needs K and V of one layer together; this model mixes them, and needs "
            "another cache"
        )
    layer = key.layer
    try:
        layer.check_pending(query, key.plain, value.plain)
        _check_plain(module, query, mask, dropout, options)
    except BaseException:
        layer.forget()
        raise
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = layer.attend(module, query.detach(), None if mask is None else mask.plain, scale)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(query, out)
    return out


def _check_plain(module, query, mask, dropout: float, options: dict) -> None:
    """Raise unless this is plain causal attention."""
    for name in ("sliding_window", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"NearStorageCache has no {name}, which this model uses; use another cache"
            )
    if isinstance(mask, OtherMask):
        raise NotImplementedError(OtherMask.complaint)
    if mask is not None and not isinstance(mask, Padding):
        raise NotImplementedError(
            "NearStorageCache knows causal attention with padding, no "
            f"{mask.ndim}-dimensional masks; pass attention_mask of (batch, positions), or use "
            "another cache"
        )
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and query.shape[2] > 1 and not causal:
        raise NotImplementedError(
            "NearStorageCache knows causal attention only, and this layer is not; use another cache"
        )
    if dropout:
        raise NotImplementedError(
            "NearStorageCache has no attention dropout; call model.eval(), or use another cache"
        )
    if options.get("output_attentions"):
        raise NotImplementedError(
            "NearStorageCache cannot return attention weights, they never exist as a whole; use "
            'another cache and attn_implementation="eager" for output_attentions'
        )


class _NoGradient(torch.autograd.Function):
    """Passes the attention's output on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, query, out):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "a NearStorageCache keeps no gradients; train with use_cache=False"
        )


def causal_mask(valid: torch.Tensor, n_queries: int) -> torch.Tensor:
    """bool (batch, 1, n_queries, keys): the last n_queries keys are the queries' own tokens.

    valid : bool (batch, keys). A query that is padding attends to itself, so that nothing is NaN.
    """
    n_keys = valid.shape[1]
    own = torch.arange(n_keys - n_queries, n_keys, device=valid.device)[:, None]
    position = torch.arange(n_keys, device=valid.device)
    return ((position <= own) & valid[:, None, None]) | (position == own)
