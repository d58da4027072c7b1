# SPDX-License-Identifier: Apache-2.0
"""Attention to the newest tokens of each sequence, which are in host memory.

The *tail* of a sequence are the tokens that do not fill a page yet. New tokens come behind it; they are
queries and keys at once. Computed in float64 from the 16-bit elements as they are stored, in one order, so
that the result of a query depends on nothing but its own sequence, and is the same on every machine.
"""

import math

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import KvType

from . import native
from .elementary import exp2, log2
from .native import LANES

_LOG2_E = math.log2(math.e)


def attend(
    q: np.ndarray,
    tail_k: np.ndarray,
    tail_v: np.ndarray,
    tail_tokens: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    valid: np.ndarray | None,
    scale: float,
    kv_type: KvType,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend to tail and new tokens, causally.

    A query sees the tail, the new tokens before its own that are valid, and its own.

    Parameters
    ----------
    q : float32 (batch, n_kv_heads, group * n_new, head_dim)
        Rows: the query heads of a group, each with its n_new tokens. head_dim a multiple of LANES.
    tail_k, tail_v : uint16 (batch, n_kv_heads, capacity, head_dim), the last axis contiguous
        Patterns; see `nearkv_hw.pages`.
    tail_tokens : int64 (batch,)
        How many tokens of each tail there are.
    k, v : uint16 (batch, n_kv_heads, n_new, head_dim), the last axis contiguous
        Patterns of the new tokens.
    valid : bool (batch, n_new), optional
        Which of them are tokens, not padding. Default: all.
    scale : float
        Of the softmax.
    kv_type : KvType

    Returns
    -------
    out : float64 (batch, n_kv_heads, group * n_new, head_dim)
    lse_log2 : float64 (batch, n_kv_heads, group * n_new)
        log2 of the sum of exponentials.

    Raises
    ------
    ValueError
        If the shapes do not belong together, or a tail has more tokens than room.
    """
    batch, n_heads, n_rows, head_dim = q.shape
    n_new = k.shape[2]
    shapes = (batch, n_heads, tail_k.shape[2], head_dim), (batch, n_heads, n_new, head_dim)
    if (
        (tail_k.shape, k.shape) != shapes or (tail_v.shape, v.shape) != shapes
        or not n_new or n_rows % n_new or head_dim % LANES or tail_tokens.shape != (batch,)
        or (valid is not None and valid.shape != (batch, n_new))
    ):  # fmt: skip
        raise ValueError(
            f"q {q.shape}, tails {tail_k.shape} and {tail_v.shape} with {tail_tokens.shape} lengths, "
            f"k {k.shape}, v {v.shape} and valid do not belong together; head_dim must be a multiple "
            f"of {LANES}"
        )
    most = int(tail_tokens.max(initial=0))
    if tail_tokens.min(initial=0) < 0 or most > tail_k.shape[2]:
        raise ValueError(f"tails have room for {tail_k.shape[2]} tokens, not for {tail_tokens}")
    scale *= _LOG2_E
    q = np.ascontiguousarray(q, np.float32)
    library = native.library()
    if library is None:
        return _attend(q, tail_k, tail_v, tail_tokens, k, v, valid, scale, kv_type)
    out, lse_log2 = np.empty(q.shape), np.empty(q.shape[:3])
    scratch = np.empty(n_rows * (most + n_new + 1 + head_dim) + head_dim)
    tail_tokens = np.ascontiguousarray(tail_tokens, np.int64)
    elements = []
    for x in (tail_k, tail_v, k, v):
        if x.dtype != np.uint16 or x.strides[3] != 2:
            x = np.ascontiguousarray(x, np.uint16)
        elements += [x.ctypes.data, *x.strides[:3]]
    if valid is not None:
        valid = np.ascontiguousarray(valid, np.bool_)
    library.native_attend(
        q.ctypes.data, *elements, tail_tokens.ctypes.data,
        None if valid is None else valid.ctypes.data,
        batch, n_heads, n_rows // n_new, n_new, head_dim, kv_type, scale,
        scratch.ctypes.data, out.ctypes.data, lse_log2.ctypes.data,
    )  # fmt: skip
    return out, lse_log2


def _attend(q, tail_k, tail_v, tail_tokens, k, v, valid, scale, kv_type):
    out, lse_log2 = np.empty(q.shape), np.empty(q.shape[:3])
    n_new = k.shape[2]
    for b, past in enumerate(tail_tokens):
        keys, values = (
            pages.to_float32(
                np.ascontiguousarray(np.concatenate([tail[b, :, :past], new[b]], axis=1)), kv_type
            ).astype(np.float64)
            for tail, new in ((tail_k, k), (tail_v, v))
        )
        query, own = np.arange(n_new)[:, None], np.arange(n_new)
        seen = np.ones((n_new, past + n_new), bool)
        seen[:, past:] = (own < query) & (True if valid is None else valid[b]) | (own == query)
        seen = np.tile(seen, (q.shape[2] // n_new, 1))
        with np.errstate(invalid="ignore"):  # of K or V that are Inf or NaN, which others refuse
            scores = np.where(seen, _products(q[b], keys) * scale, -np.inf)
            largest = scores.max(axis=-1, keepdims=True)
            p = exp2(scores - largest)
            total, sums = np.zeros(p.shape[:2]), np.zeros(q[b].shape)
            for t in range(p.shape[2]):
                total += p[:, :, t]
                sums += p[:, :, t, None] * values[:, None, t]
            out[b] = sums / total[..., None]
            lse_log2[b] = largest[..., 0] + log2(total)
    return out, lse_log2


def _products(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scalar products (heads, rows, tokens), in LANES sums, of which halves are added up."""
    products = q[:, :, None].astype(np.float64) * keys[:, None]
    lanes = np.zeros((*products.shape[:3], LANES))
    for c in range(0, products.shape[3], LANES):
        lanes += products[..., c : c + LANES]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]
