# SPDX-License-Identifier: Apache-2.0
"""The merge law: what attending to a part of the context gives, and how parts become the whole.

It is the only interface between those who attend (card, host, other cards), so any split of the
work is merged alike. `Partial` is the exact form that cards return, `merge` is for normalised parts.
"""

from dataclasses import dataclass

import numpy as np

from nearkv_hw.abi import KvType
from nearkv_hw.number import KV_FORMATS, N_LIMBS, OUT_UNIT, RUN_MAX_EMPTY, SUM_UNIT, Wide
from nearkv_hw.pages import is_torch

from . import native
from .elementary import exp2, log2
from .native import EMPTY_TOP, address

_UNITS = {kind: SUM_UNIT - (form.unit + OUT_UNIT) for kind, form in KV_FORMATS.items()}


@dataclass(frozen=True)
class Partial:
    """What attending to a part of the context gives, unnormalised and exact.

    `a + b` is the partial of both parts. It is associative and commutative, bit for bit.

    Attributes
    ----------
    kv_type : KvType
    run_max : int16 (...)
        Integer maximum of the scores, log2 units; RUN_MAX_EMPTY without tokens.
    sums : Wide (..., 2 + head_dim)
        The sum of p as used for out, and with more bits for the log-sum-exp, both in units of
        2^-SUM_UNIT; then out, in units of 2^-(KvFormat.unit + OUT_UNIT).
    """

    kv_type: KvType
    run_max: np.ndarray
    sums: Wide

    @classmethod
    def empty(cls, kv_type: KvType, shape: tuple[int, ...], head_dim: int) -> "Partial":
        """The partial of no tokens at all, the identity of `+`."""
        elements = (*shape, 2 + head_dim)
        sums = Wide(np.zeros((*elements, N_LIMBS), np.int64), np.full(elements, EMPTY_TOP))
        return cls(kv_type, np.full(shape, RUN_MAX_EMPTY, np.int16), sums)

    @property
    def head_dim(self) -> int:
        return self.sums.top.shape[-1] - 2

    def __add__(self, other: "Partial") -> "Partial":
        run_max = np.maximum(self.run_max, other.run_max)
        return Partial(self.kv_type, run_max, self.sums + other.sums)

    def sum(self, axis: int) -> "Partial":
        """The sum along one of the leading axes."""
        axis %= self.run_max.ndim
        return Partial(self.kv_type, self.run_max.max(axis), self.sums.sum(axis))

    def __getitem__(self, index) -> "Partial":
        """Index the leading axes."""
        sums = Wide(self.sums.limbs[index], self.sums.top[index])
        return Partial(self.kv_type, self.run_max[index], sums)

    def __setitem__(self, index, value: "Partial") -> None:
        self.run_max[index] = value.run_max
        self.sums.limbs[index], self.sums.top[index] = value.sums.limbs, value.sums.top

    def reshape(self, *shape: int) -> "Partial":
        """Reshape the leading axes."""
        limbs, top = self.sums.limbs, self.sums.top
        sums = Wide(limbs.reshape(*shape, *limbs.shape[-2:]), top.reshape(*shape, top.shape[-1]))
        return Partial(self.kv_type, self.run_max.reshape(shape), sums)

    def normalise(self) -> tuple[np.ndarray, np.ndarray]:
        """Attention over the part alone.

        Returns
        -------
        out : float64 (..., head_dim)
            0 without tokens.
        lse_log2 : float64 (...)
            log2 of the sum of 2^score; -inf without tokens.
        """
        library = native.library()
        if library is None:
            return self._normalise()
        shape = self.run_max.shape
        out, lse_log2 = np.empty((*shape, self.head_dim)), np.empty(shape)
        limbs, top = (np.ascontiguousarray(x) for x in (self.sums.limbs, self.sums.top))
        library.native_normalise(
            address(limbs), address(top), lse_log2.size, self.head_dim, self.unit,
            address(out), address(lse_log2),
        )  # fmt: skip
        return out, lse_log2

    def combine(self, out: np.ndarray, lse_log2: np.ndarray) -> np.ndarray:
        """Attention over this part and another one, which is there normalised.

        Parameters
        ----------
        out : float64 (..., head_dim)
        lse_log2 : float64 (...)
            Of the other part, as `normalise` and `tail.attend` give them.

        Returns
        -------
        float32 (..., head_dim)
            0 where neither part has a token.

        Raises
        ------
        ValueError
            If the shapes differ from those of this part.
        """
        shape = self.run_max.shape
        if lse_log2.shape != shape or out.shape != (*shape, self.head_dim):
            raise ValueError(
                f"out {out.shape} and lse_log2 {lse_log2.shape} do not belong to a partial of shape "
                f"{shape} and head_dim {self.head_dim}"
            )
        library = native.library()
        if library is None:
            return self._combine(out, lse_log2)
        both = np.empty(out.shape, np.float32)
        limbs, top = (np.ascontiguousarray(x) for x in (self.sums.limbs, self.sums.top))
        out, lse_log2 = (np.ascontiguousarray(x, np.float64) for x in (out, lse_log2))
        library.native_combine(
            address(limbs), address(top), lse_log2.size, self.head_dim, self.unit,
            address(out), address(lse_log2), address(both),
        )  # fmt: skip
        return both

    @property
    def unit(self) -> int:
        """The quotient of out and run_sum counts 2^unit."""
        return _UNITS[self.kv_type]

    def _normalise(self) -> tuple[np.ndarray, np.ndarray]:
        # Mantissas and exponents apart: run_max alone may be +-32768.
        mantissa, exponent = self.sums.to_float()
        total, wide, out = mantissa[..., 0], mantissa[..., 1], mantissa[..., 2:]
        some = total > 0
        quotient = out / np.where(some, total, 1.0)[..., None]
        places = exponent[..., 2:] - exponent[..., :1] + self.unit
        out = np.where(some[..., None], np.ldexp(quotient, places.astype(np.int32)), 0.0)
        some = wide > 0
        lse_log2 = log2(np.where(some, wide, 1.0)) + (exponent[..., 1] - SUM_UNIT)
        return out, np.where(some, lse_log2, -np.inf)

    def _combine(self, other_out: np.ndarray, other_lse: np.ndarray) -> np.ndarray:
        out, lse_log2 = self._normalise()
        largest = np.maximum(lse_log2, other_lse)
        largest = np.where(np.isneginf(largest), 0.0, largest)
        mine, its = (exp2(x - largest)[..., None] for x in (lse_log2, other_lse))
        total = mine + its
        both = (out * mine + other_out * its) / np.where(total == 0, 1.0, total)
        return np.where(total == 0, 0.0, both).astype(np.float32)


def merge(outs, lses):
    """Merge normalised parts of attention, each over its own part of the context.

    Parameters
    ----------
    outs : (n_parts, ..., head_dim) or a sequence of (..., head_dim)
        numpy or torch.
    lses : (n_parts, ...) or a sequence of (...)
        Natural logarithm of each part's sum of exponentials; -inf of a part without tokens.

    Returns
    -------
    out : (..., head_dim), lse_ln : (...)
        The family and dtype of the parts; computed in float64. Without any token 0 and -inf.

    >>> merge([[[1.0]], [[3.0]]], [[0.0], [0.0]])[0]
    array([[2.]])
    """
    if not len(outs):
        raise ValueError("merge needs at least one part")
    if is_torch(outs[0]):
        import torch

        parts = [torch.stack(tuple(x)).detach() for x in (outs, lses)]
        out, lse_ln = merge(*(x.cpu().double().numpy() for x in parts))
        return torch.from_numpy(out).to(parts[0]), torch.from_numpy(lse_ln).to(parts[1])
    outs, lses = np.asarray(outs), np.asarray(lses)
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {outs.shape} and lses {lses.shape} do not belong together")
    largest = lses.max(axis=0)
    shift = np.where(np.isneginf(largest), 0.0, largest)
    weights = np.exp(lses.astype(np.float64) - shift)
    total = weights.sum(axis=0)
    some = total > 0
    divisor = np.where(some, total, 1.0)
    weighted = np.where(weights[..., None] > 0, outs * weights[..., None], 0.0)
    out = weighted.sum(axis=0) / divisor[..., None]
    lse_ln = np.where(some, np.log(divisor) + shift, -np.inf)
    return out.astype(outs.dtype), lse_ln.astype(lses.dtype)
