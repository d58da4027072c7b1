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

_EMPTY_TOP = -(1 << 15)  # below every top a card can send


@dataclass(frozen=True)
class Partial:
    """What attending to a part of the context gives, unnormalised and exact.

    `a + b` is the partial of both parts. It is associative and commutative, bit for bit.

    Attributes
    ----------
    kv_type : KvType
    run_max : int16 (...)
        Integer maximum of the scores, log2 units; RUN_MAX_EMPTY without tokens.
    run_sum, run_sum_wide : Wide (...)
        Sums of p as used for out, and with more bits for the log-sum-exp; unit 2^-SUM_UNIT.
    out : Wide (..., head_dim)
        Unit 2^-(KvFormat.unit + OUT_UNIT).
    """

    kv_type: KvType
    run_max: np.ndarray
    run_sum: Wide
    run_sum_wide: Wide
    out: Wide

    @classmethod
    def empty(cls, kv_type: KvType, shape: tuple[int, ...], head_dim: int) -> "Partial":
        """The partial of no tokens at all, the identity of `+`."""

        def zeros(shape):
            return Wide(np.zeros((*shape, N_LIMBS), np.int64), np.full(shape, _EMPTY_TOP))

        run_max = np.full(shape, RUN_MAX_EMPTY, np.int16)
        return cls(kv_type, run_max, zeros(shape), zeros(shape), zeros((*shape, head_dim)))

    def __add__(self, other: "Partial") -> "Partial":
        return Partial(
            self.kv_type,
            np.maximum(self.run_max, other.run_max),
            self.run_sum + other.run_sum,
            self.run_sum_wide + other.run_sum_wide,
            self.out + other.out,
        )

    def sum(self, axis: int) -> "Partial":
        """The sum along one of the leading axes."""
        axis %= self.run_max.ndim
        total, wide, out = (part.sum(axis) for part in self._wides())
        return Partial(self.kv_type, self.run_max.max(axis), total, wide, out)

    def with_identity(self) -> "Partial":
        """One more partial behind the last of the first axis: that of no tokens."""
        shape = (1, *self.run_max.shape[1:])
        none = Partial.empty(self.kv_type, shape, self.out.top.shape[-1])
        total, wide, out = (
            Wide(np.concatenate([a.limbs, b.limbs]), np.concatenate([a.top, b.top]))
            for a, b in zip(self._wides(), none._wides(), strict=True)
        )
        return Partial(self.kv_type, np.concatenate([self.run_max, none.run_max]), total, wide, out)

    def __getitem__(self, index) -> "Partial":
        """Index the leading axes."""
        total, wide, out = (Wide(w.limbs[index], w.top[index]) for w in self._wides())
        return Partial(self.kv_type, self.run_max[index], total, wide, out)

    def __setitem__(self, index, value: "Partial") -> None:
        self.run_max[index] = value.run_max
        for mine, its in zip(self._wides(), value._wides(), strict=True):
            mine.limbs[index], mine.top[index] = its.limbs, its.top

    def reshape(self, *shape: int) -> "Partial":
        """Reshape the leading axes."""

        def reshaped(wide, *last):
            limbs = wide.limbs.reshape(*shape, *last, N_LIMBS)
            return Wide(limbs, wide.top.reshape(*shape, *last))

        return Partial(
            self.kv_type,
            self.run_max.reshape(shape),
            reshaped(self.run_sum),
            reshaped(self.run_sum_wide),
            reshaped(self.out, self.out.top.shape[-1]),
        )

    def normalise(self) -> tuple[np.ndarray, np.ndarray]:
        """Attention over the part alone.

        Returns
        -------
        out : float64 (..., head_dim)
            0 without tokens.
        lse_log2 : float64 (...)
            log2 of the sum of 2^score; -inf without tokens.
        """
        # Mantissas and exponents apart: run_max alone may be +-32768.
        total, total_exponent = self.run_sum.to_float()
        wide, wide_exponent = self.run_sum_wide.to_float()
        out, out_exponent = self.out.to_float()
        some = total > 0
        exponent = out_exponent - total_exponent[..., None]
        exponent += SUM_UNIT - (KV_FORMATS[self.kv_type].unit + OUT_UNIT)
        quotient = out / np.where(some, total, 1.0)[..., None]
        out = np.where(some[..., None], np.ldexp(quotient, exponent.astype(np.int32)), 0.0)
        some = wide > 0
        lse_log2 = np.log2(np.where(some, wide, 1.0)) + (wide_exponent - SUM_UNIT)
        return out, np.where(some, lse_log2, -np.inf)

    def _wides(self):
        return self.run_sum, self.run_sum_wide, self.out


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
