# SPDX-License-Identifier: Apache-2.0
"""Attention to the newest tokens of each sequence, which are in host memory.

The *tail* of a sequence are the tokens that do not fill a page yet. New tokens come behind it; they are
queries and keys at once. A few of them are attended in float64 from the 16-bit elements as they are stored, in
one order, so that the result of a query depends on nothing but its own sequence, and is the same on every
machine. Many of them, a prompt behind a past, are attended in float32 by matrix products.
"""

from collections.abc import Sequence
from ctypes import c_int64
import math

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import KvType
from nearkv_hw.pages import is_torch

from . import native
from .elementary import exp2, log2
from .native import LANES, address

_LOG2_E = math.log2(math.e)
FEW_TOKENS = (
    16  # new ones of a sequence, up to which the order is kept; it costs as much as matrices there
)
_TOKENS_AT_ONCE = 256  # whose scores are held


def stored_form(k, v, kv_type: KvType, channels: int) -> tuple[np.ndarray, bool]:
    """New K and V as they are stored.

    Parameters
    ----------
    k, v : numpy or torch floating-point (batch, n_kv_heads, n_new, head_dim)
    kv_type : KvType
    channels : int
        Of the result; those beyond head_dim are zero.

    Returns
    -------
    patterns : uint16 (2, batch, n_kv_heads, n_new, channels)
        Those of K, then those of V; see `nearkv_hw.pages`.
    finite : bool
        Whether no element is Inf or NaN, or became Inf because it is too large.

    Raises
    ------
    ValueError
        If K and V differ in shape, or have more channels than there are.
    """
    batch, n_heads, n_new, head_dim = k.shape
    if k.shape != v.shape or head_dim > channels:
        raise ValueError(
            f"K {tuple(k.shape)} and V {tuple(v.shape)} do not fit {channels} channels"
        )
    patterns = np.empty((2, batch, n_heads, n_new, channels), np.uint16)
    library = native.library()
    if library is not None and n_new <= FEW_TOKENS:
        elements = _floats(k), _floats(v)
        if elements[0] is not None and elements[1] is not None:
            finite = library.native_patterns(
                *elements[0], *elements[1], batch, n_heads, n_new, head_dim, channels, kv_type,
                address(patterns),
            )  # fmt: skip
            return patterns, bool(finite)
    for mine, its in zip(patterns, (k, v), strict=True):
        mine[..., :head_dim] = pages.to_patterns(its, kv_type)
    patterns[..., head_dim:] = 0
    return patterns, pages.first_non_finite(patterns, kv_type) is None


class Tail:
    """Tails of a batch in one layer.

    Parameters
    ----------
    k, v : uint16 (batch, n_kv_heads, capacity, head_dim), the last axis contiguous
        Patterns, see `nearkv_hw.pages`; head_dim a multiple of LANES. Whoever owns them writes new tokens
        in place. Not copied: it must not be moved.
    kv_type : KvType

    Raises
    ------
    ValueError
        If the arrays are not such.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray, kv_type: KvType):
        if k.ndim != 4 or k.shape != v.shape or k.shape[3] % LANES:
            raise ValueError(
                f"tails of shapes {k.shape} and {v.shape} must be alike, (batch, n_kv_heads, capacity, "
                f"head_dim), with head_dim a multiple of {LANES}"
            )
        for x in (k, v):
            if x.dtype != np.uint16 or (x.size and x.strides[3] != 2):
                raise ValueError(f"tails must be uint16 with contiguous channels, not {x.dtype}")
        self._k, self._v, self._kv_type = k, v, kv_type
        self._elements = (*_elements(k), *_elements(v))

    def attend(
        self,
        q: np.ndarray,
        tokens: Sequence[int],
        k: np.ndarray,
        v: np.ndarray,
        valid: np.ndarray | None,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attend to tail and new tokens, causally.

        A query sees the tail, the new tokens before its own that are valid, and its own.

        Parameters
        ----------
        q : float32 (batch, n_kv_heads, group * n_new, head_dim)
            Rows: the query heads of a group, each with its n_new tokens.
        tokens : (batch,) ints
            How many there are in each tail.
        k, v : uint16 (batch, n_kv_heads, n_new, head_dim), the last axis contiguous
            Patterns of the new tokens.
        valid : bool (batch, n_new), optional
            Which of them are tokens, not padding. Default: all.
        scale : float
            Of the softmax.

        Returns
        -------
        out : float64 (batch, n_kv_heads, group * n_new, head_dim)
        lse_log2 : float64 (batch, n_kv_heads, group * n_new)
            log2 of the sum of exponentials. `Partial.combine` puts both together with what comes before
            the tail.

        Raises
        ------
        ValueError
            If the shapes do not belong together, or a tail has more tokens than room.
        """
        library, n_new = native.library(), k.shape[2]
        few = n_new <= FEW_TOKENS
        if library is not None and few:
            return self._native(library, q, tokens, k, v, valid, scale)
        self._check(q, tokens, k, v, valid)
        out, lse_log2 = np.empty(q.shape), np.empty(q.shape[:3])
        for row, past in enumerate(tokens):
            keys, values = (
                pages.to_float32(
                    np.ascontiguousarray(np.concatenate([tail[row, :, :past], new[row]], axis=1)),
                    self._kv_type,
                )
                for tail, new in ((self._k, k), (self._v, v))
            )
            mine = np.ones(n_new, bool) if valid is None else valid[row]
            attend = _attend if few else _attend_many
            out[row], lse_log2[row] = attend(q[row], keys, values, mine, scale)
        return out, lse_log2

    def _native(self, library, q, tokens, k, v, valid, scale):
        self._check(q, tokens, k, v, valid)
        batch, n_heads, n_rows, head_dim = q.shape
        n_new = k.shape[2]
        q = np.ascontiguousarray(q, np.float32)
        if valid is not None:
            valid = np.ascontiguousarray(valid, np.bool_)
        out, lse_log2 = np.empty(q.shape), np.empty(q.shape[:3])
        scratch = np.empty(n_rows * (max(tokens) + n_new + 1 + head_dim) + head_dim)
        library.native_attend(
            address(q), *self._elements, *_elements(k), *_elements(v), (c_int64 * batch)(*tokens),
            None if valid is None else address(valid),
            batch, n_heads, n_rows // n_new, n_new, head_dim, self._kv_type, scale * _LOG2_E,
            address(scratch), address(out), address(lse_log2),
        )  # fmt: skip
        return out, lse_log2

    def _check(self, q, tokens, k, v, valid) -> None:
        batch, n_heads, capacity, head_dim = self._k.shape
        n_new = k.shape[2]
        new = (batch, n_heads, n_new, head_dim)
        if (
            k.shape != new or v.shape != new or k.strides[3] != 2 or v.strides[3] != 2 or not n_new
            or q.shape != (batch, n_heads, q.shape[2], head_dim) or q.shape[2] % n_new
            or len(tokens) != batch or (valid is not None and valid.shape != (batch, n_new))
        ):  # fmt: skip
            raise ValueError(
                f"q {q.shape}, k {k.shape}, v {v.shape}, {len(tokens)} lengths and what is valid do not "
                f"belong to tails of shape {self._k.shape}"
            )
        if min(tokens) < 0 or max(tokens) > capacity:
            raise ValueError(f"tails have room for {capacity} tokens, not for {list(tokens)}")


def _elements(x: np.ndarray) -> tuple[int, ...]:
    """What the native part wants to know of an array: where it is, and its strides."""
    return (address(x), *x.strides[:3])


def _floats(x) -> tuple[int, ...] | None:
    """The same of a numpy array or torch tensor of float32 on the host, with contiguous channels.

    None of any other.
    """
    if is_torch(x):
        if x.is_cpu and x.is_floating_point() and x.element_size() == 4 and x.stride(3) == 1:
            return (x.data_ptr(), *(4 * step for step in x.stride()[:3]))
    elif x.dtype == np.float32 and x.strides[3] == 4:
        return _elements(x)
    return None


def _seen(past: int, valid: np.ndarray, queries: slice) -> np.ndarray:
    """Which tokens some of the new ones see: bool (queries, past + valid tokens up to the last query)."""
    query, own = np.arange(len(valid))[queries, None], np.arange(queries.stop)
    seen = np.ones((len(query), past + queries.stop), bool)
    seen[:, past:] = (own < query) & valid[: queries.stop] | (own == query)
    return seen


def _attend(q, keys, values, valid, scale):
    """Attention of one sequence, in the order in which the native part does it.

    q (heads, rows, head_dim), keys, values : float32 (heads, tokens, head_dim); valid : bool (n_new,)
    """
    n_new = len(valid)
    seen = _seen(keys.shape[1] - n_new, valid, slice(0, n_new))
    seen = np.tile(seen, (q.shape[1] // n_new, 1))
    values = values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of K or V that are Inf or NaN, which others refuse
        scores = np.where(seen, _products(q, keys) * (scale * _LOG2_E), -np.inf)
        largest = scores.max(axis=-1, keepdims=True)
        p = exp2(scores - largest)
        total, sums = np.zeros(p.shape[:2]), np.zeros(q.shape)
        for t in range(p.shape[2]):
            total += p[:, :, t]
            sums += p[:, :, t, None] * values[:, None, t]
        return sums / total[..., None], largest[..., 0] + log2(total)


def _attend_many(q, keys, values, valid, scale):
    """The same for many new tokens, in float32."""
    (n_heads, _, head_dim), n_new = q.shape, len(valid)
    past = keys.shape[1] - n_new
    grouped = q.reshape(n_heads, -1, n_new, head_dim)
    out, lse_log2 = np.empty(grouped.shape), np.empty(grouped.shape[:3])
    for at in range(0, n_new, _TOKENS_AT_ONCE):
        queries = slice(at, min(at + _TOKENS_AT_ONCE, n_new))
        seen = _seen(past, valid, queries)
        some = grouped[:, :, queries].reshape(n_heads, -1, head_dim) * np.float32(scale)
        with np.errstate(invalid="ignore"):
            scores = some @ keys[:, : past + queries.stop].swapaxes(1, 2)
            scores = scores.reshape(n_heads, -1, *seen.shape)
            np.copyto(scores, -np.inf, where=~seen)
            largest = scores.max(axis=-1, keepdims=True)
            p = np.exp(scores - largest)
        total = p.sum(axis=-1, dtype=np.float64)
        sums = p.reshape(n_heads, -1, p.shape[3]) @ values[:, : past + queries.stop]
        out[:, :, queries] = sums.reshape(*total.shape, head_dim) / total[..., None]
        lse_log2[:, :, queries] = (largest[..., 0] + np.log(total)) * _LOG2_E
    return out.reshape(q.shape), lse_log2.reshape(q.shape[:2])


def _products(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scalar products (heads, rows, tokens), in LANES sums, of which halves are added up."""
    products = q[:, :, None].astype(np.float64) * keys[:, None].astype(np.float64)
    lanes = np.zeros((*products.shape[:3], LANES))
    for c in range(0, products.shape[3], LANES):
        lanes += products[..., c : c + LANES]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]
