# SPDX-License-Identifier: Apache-2.0
"""Attention of one token, from arrays to arrays."""

from collections.abc import Sequence
import math
import tempfile

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import PageLayout

from ..cards import Card, open_cards
from ..store import KvStore
from .scheduler import PageAttention, check_card


def attend(
    q,
    k,
    v,
    card: Card | str | Sequence[Card | str] | None = None,
    scale=None,
    kv_dtype=None,
    page_tokens=128,
    directory=None,
):
    """Decode attention of one token over a context, through real pages in a temporary store.

    Parameters
    ----------
    q : (n_q_heads, head_dim)
        Query head h belongs to kv head h // (n_q_heads // n_kv_heads).
    k, v : (kv_len, n_kv_heads, head_dim)
        numpy or torch, like q; any real dtype. Stored as `kv_dtype`.
    card : Card, str, or a sequence of them, optional
        Names are opened for this call. Several share the work. Default: as `open_card`.
    scale : float, optional
        Default 1/sqrt(head_dim).
    kv_dtype : "fp16" or "bf16", optional
        Default bf16 for bf16 K, otherwise fp16.
    page_tokens : int
    directory : path, optional
        Where the pages go. Default: the system's directory for temporary files.

    Returns
    -------
    out : float32 (n_q_heads, head_dim)
    lse_ln : float32 (n_q_heads,)
        Natural logarithm of the sum of exponentials of the scaled scores. -inf if kv_len is 0.
        torch tensors on q's device if q is one.

    Raises
    ------
    ValueError
        If shapes do not fit, or an element of K or V is Inf or NaN.
    FlashError, CardError
        If pages cannot be stored or read, or the card does not succeed.

    >>> attend(np.ones((4, 64)), np.ones((10, 2, 64)), np.ones((10, 2, 64)))[0].shape
    (4, 64)
    """
    n_q_heads, head_dim = q.shape
    kv_len, n_kv_heads, _ = k.shape
    if n_q_heads % n_kv_heads:
        raise ValueError(f"{n_q_heads} query heads cannot share {n_kv_heads} kv heads evenly")
    if q.shape[1] != k.shape[2]:
        raise ValueError(f"q has head_dim {q.shape[1]} and k {k.shape[2]}")
    if kv_dtype is None:
        kv_dtype = pages.default_kv_dtype(k.dtype)
    layout = PageLayout(head_dim, page_tokens, pages.parse_kv_type(kv_dtype))
    scale = head_dim**-0.5 if scale is None else scale
    directory = tempfile.gettempdir() if directory is None else directory
    heads_first = (1, 0, 2)
    k, v = (x.permute(heads_first) if pages.is_torch(x) else np.transpose(x, heads_first)
            for x in (k, v))  # fmt: skip
    rows = to_numpy(q).reshape(1, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    cards, opened = open_cards(card)
    try:
        for one in cards:
            check_card(one, layout)
        with KvStore(directory, layout, n_kv_heads, temporary=True, n_shards=len(cards)) as store:
            store.append(0, 0, k, v, ragged=True)
            attention = PageAttention(cards, store)
            try:
                partial = attention.attend(0, [0], rows, scale)
            finally:
                attention.close()
    finally:
        for one in opened:
            one.close()
    out, lse_log2 = partial.normalise()
    out = out.reshape(n_q_heads, head_dim).astype(np.float32)
    lse_ln = (lse_log2.reshape(n_q_heads) * math.log(2)).astype(np.float32)
    if pages.is_torch(q):
        import torch

        return torch.from_numpy(out).to(q.device), torch.from_numpy(lse_ln).to(q.device)
    return out, lse_ln


def to_numpy(x) -> np.ndarray:
    """A numpy array of at least fp32 precision from numpy or torch, of any real dtype."""
    if pages.is_torch(x):
        return x.detach().float().cpu().numpy()
    x = np.asarray(x)
    return x if x.dtype.itemsize >= 4 else x.astype(np.float32)
