# SPDX-License-Identifier: Apache-2.0
"""Adds up the partials that a card leaves in job memory."""

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import PageLayout
from nearkv_hw.number import Wide

from .partial import Partial

_HEADER = pages.record_dtype(abi.PARTIAL_HEADER)


class Sums:
    """Adds partials up, many at a time: numpy takes as long for one as for dozens."""

    _AT_ONCE = 256

    def __init__(self, layout: PageLayout, n_jobs: int, width: int):
        self._layout, self._n_jobs, self._width = layout, n_jobs, width
        self._where: list[np.ndarray] = []
        self._data: list[np.ndarray] = []
        self._waiting = 0
        self._sum: Partial | None = None

    def add(self, where: np.ndarray, data: np.ndarray) -> None:
        """Take the partials of a run: uint8 (n_jobs, bytes)."""
        self._where.append(where)
        self._data.append(data)
        self._waiting += len(data)
        if self._waiting >= self._AT_ONCE + self._n_jobs:
            self._fold()

    def total(self) -> Partial:
        """(n_jobs of the call, width); the identity where there was nothing."""
        self._fold()
        if self._sum is None:
            shape = (self._n_jobs, self._width)
            return Partial.empty(self._layout.kv_type, shape, self._layout.head_dim)
        return self._sum

    def _fold(self) -> None:
        if not self._data:
            return
        n_jobs = self._n_jobs
        where, data = np.concatenate(self._where), np.concatenate(self._data)
        self._where, self._data, self._waiting = [], [], 0
        parts = self._unpack(data)
        order = np.argsort(where, kind="stable")
        if len(where) == n_jobs and (where[order] == np.arange(n_jobs)).all():
            folded = parts[order]
        else:
            # (job, its parts), filled up with the identity, which lies behind the last of them.
            counts = np.bincount(where, minlength=n_jobs)
            rank = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
            index = np.full((n_jobs, counts.max()), len(where))
            index[where[order], rank] = order
            folded = parts.with_identity()[index].sum(1)
        self._sum = folded if self._sum is None else self._sum + folded

    def _unpack(self, data: np.ndarray) -> Partial:
        head_dim, width = self._layout.head_dim, self._width
        header = data[:, : _HEADER.itemsize].view(_HEADER)[:, 0]
        rows = abi.partial_rows(width)
        words = data[:, _HEADER.itemsize :].view(np.uint64)[:, : (2 + head_dim) * rows * 2]
        wide = Wide.unpack(words.reshape(len(data), 2 + head_dim, rows, 2))
        limbs, top = wide.limbs[:, :, :width], wide.top[:, :, :width]
        return Partial(
            self._layout.kv_type,
            header["run_max"][:, :width].astype(np.int16),
            Wide(limbs[:, 0], top[:, 0]),
            Wide(limbs[:, 1], top[:, 1]),
            Wide(limbs[:, 2:].swapaxes(1, 2), top[:, 2:].swapaxes(1, 2)),
        )
