# SPDX-License-Identifier: Apache-2.0
"""Attention of one token, from arrays to arrays."""

from collections.abc import Sequence
import math
import tempfile

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import KvType, PageLayout
from nearkv_hw.number import score_scale

from ..cards import Card, Engines, open_cards
from ..store import KvStore
from .scheduler import PageAttention, check_card


def attend(
    q,
    k,
    v,
    card: Card | Engines | str | Sequence[Card | Engines | str] | None = None,
    scale=None,
    kv_dtype=None,
    page_tokens=128,
    directory=None,
):
    """Decode attention of one token over a context, through real pages in a temporary store.

    Parameters
    ----------
    q : (n_q_heads, head_dim)
        Query head h belongs to kv head h // (n_q_heads // n_kv_heads). Up to 256 channels, fewer
        than the card is built for.
    k, v : (kv_len, n_kv_heads, head_dim)
        numpy or torch, like q: float16, bfloat16, float32 or float64. Rounded to `kv_dtype`.
    card : Card, Engines, str, or a sequence of them, optional
        Names are opened for this call. Several share the work. Default: as `open_card`.
    scale : float, optional
        Of the softmax: positive. Default 1/sqrt(head_dim).
    kv_dtype : "fp16" or "bf16", optional
        Default bf16 for bf16 K, otherwise fp16.
    page_tokens : int
    directory : path, or a sequence of them, optional
        Where the pages go: as for `KvStore`, with a shard for each card. Default: the system's
        directory for temporary files.

    Returns
    -------
    out : float32 (n_q_heads, head_dim)
    lse_ln : float32 (n_q_heads,)
        Natural logarithm of the sum of exponentials of the scaled scores. -inf if kv_len is 0.
        torch tensors on q's device if q is one.

    Raises
    ------
    TypeError
        If q, k or v are not floating-point numbers.
    ValueError
        If shapes or scale do not fit, or an element is Inf or NaN. Nothing has been written then.
    FlashError, CardError
        If pages cannot be stored or read, or the card does not succeed.

    >>> attend(np.ones((4, 64)), np.ones((10, 2, 64)), np.ones((10, 2, 64)))[0].shape
    (4, 64)
    """
    q, k, v = (x if pages.is_torch(x) else np.asarray(x) for x in (q, k, v))
    _check(q, k, v)
    n_q_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    kv_type = pages.parse_kv_type(pages.default_kv_dtype(k.dtype) if kv_dtype is None else kv_dtype)
    layout = PageLayout(pages.page_channels(head_dim), page_tokens, kv_type)
    scale = head_dim**-0.5 if scale is None else float(scale)
    score_scale(scale, kv_type)  # raises if there is no such scale
    directory = tempfile.gettempdir() if directory is None else directory
    k, v = (_patterns(name, x, kv_type) for name, x in (("K", k), ("V", v)))
    missing = layout.head_dim - head_dim  # channels that are zero change no score
    rows = to_numpy(q).reshape(1, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    if missing:
        k, v = (np.pad(x, ((0, 0), (0, 0), (0, missing))) for x in (k, v))
        rows = np.pad(rows, ((0, 0), (0, 0), (0, 0), (0, missing)))
    cards, opened = open_cards(card)
    try:
        for one in cards:
            check_card(one, layout)
        with KvStore(directory, layout, n_kv_heads, temporary=True, n_shards=len(cards)) as store:
            store.append(0, 0, k, v, ragged=True)
            attention = PageAttention(cards, store)
            try:
                partial = attention.attend(0, [0], rows, scale, [store.n_pages(0, 0)])
            finally:
                attention.close()
    finally:
        for one in opened:
            one.close()
    out, lse_log2 = partial.normalise()
    out = out.reshape(n_q_heads, layout.head_dim)[:, :head_dim].astype(np.float32)
    lse_ln = (lse_log2.reshape(n_q_heads) * math.log(2)).astype(np.float32)
    if not isinstance(q, np.ndarray):
        import torch

        return tuple(torch.from_numpy(x).to(torch.as_tensor(q).device) for x in (out, lse_ln))
    return out, lse_ln


def _check(q, k, v) -> None:
    """Raise unless these are floating-point arrays whose shapes belong together."""
    shapes = {"q": "(n_q_heads, head_dim)", "k": "(kv_len, n_kv_heads, head_dim)"}
    shapes["v"] = shapes["k"]
    for name, x in (("q", q), ("k", k), ("v", v)):
        pages.check_real(x, name)
        if x.ndim != shapes[name].count(",") + 1:
            raise ValueError(f"{name} must have shape {shapes[name]}, not {tuple(x.shape)}")
    n_q_heads, n_kv_heads = q.shape[0], k.shape[1]
    if tuple(v.shape) != tuple(k.shape):
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, not {tuple(v.shape)}")
    if not n_q_heads or not n_kv_heads:
        raise ValueError(f"q and k need at least one head, not {n_q_heads} and {n_kv_heads}")
    if n_q_heads % n_kv_heads:
        raise ValueError(f"{n_q_heads} query heads cannot share {n_kv_heads} kv heads evenly")
    if q.shape[1] != k.shape[2]:
        raise ValueError(f"q has head_dim {q.shape[1]} and k {k.shape[2]}")


def _patterns(name: str, x, kv_type: KvType) -> np.ndarray:
    """Finite patterns, heads first, of K or V with tokens first."""
    patterns = pages.to_patterns(x, kv_type)
    at = pages.first_non_finite(patterns, kv_type)
    if at is not None:
        token, head, channel = at
        raise ValueError(
            f"Inf or NaN in {name}, token {token}, kv head {head}, channel {channel}: "
            f"{pages.cause_of_non_finite(x, at, kv_type)}"
        )
    return patterns.transpose(1, 0, 2)


def to_numpy(x) -> np.ndarray:
    """A numpy array of at least fp32 precision from numpy or torch, of any real dtype."""
    if pages.is_torch(x):
        return x.detach().float().cpu().numpy()
    x = np.asarray(x)
    return x if x.dtype.itemsize >= 4 else x.astype(np.float32)
