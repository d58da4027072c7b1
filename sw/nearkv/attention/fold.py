# SPDX-License-Identifier: Apache-2.0
"""Adds up the partials that a card leaves in job memory."""

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import PageLayout
from nearkv_hw.number import Wide

from . import native
from .partial import Partial

_HEADER = pages.record_dtype(abi.PARTIAL_HEADER)


class Sums:
    """Adds up the partials of one call: those of each job, which may come from several runs.

    Parameters
    ----------
    layout : PageLayout
    n_jobs : int
        Of the call.
    width : int
        Query heads of a job.
    """

    def __init__(self, layout: PageLayout, n_jobs: int, width: int):
        self._partial = Partial.empty(layout.kv_type, (n_jobs, width), layout.head_dim)

    def add(self, where: np.ndarray, data: np.ndarray) -> None:
        """Add the partials of a run.

        Parameters
        ----------
        where : int64 (n_partials,)
            Which job each belongs to.
        data : uint8 (n_partials, bytes), rows contiguous
            As the card has written them: `abi.partial_bytes`.

        Raises
        ------
        IndexError
            If there is no such job; nothing was added then.
        """
        library = native.library()
        if library is None:
            self._add(where, data)
            return
        mine = self._partial
        n_jobs, width = mine.run_max.shape
        where = np.ascontiguousarray(where, np.int64)
        good = library.native_fold(
            data.ctypes.data, data.strides[0], where.ctypes.data, len(where),
            n_jobs, width, mine.head_dim,
            mine.run_max.ctypes.data, mine.sums.limbs.ctypes.data, mine.sums.top.ctypes.data,
        )  # fmt: skip
        if not good:
            raise IndexError(f"jobs must be among {n_jobs}, not {where.min()} .. {where.max()}")

    def total(self) -> Partial:
        """(n_jobs, width); the identity where there was nothing."""
        return self._partial

    def _add(self, where: np.ndarray, data: np.ndarray) -> None:
        n_jobs, width = self._partial.run_max.shape
        if len(where) and not 0 <= where.min() <= where.max() < n_jobs:
            raise IndexError(f"jobs must be among {n_jobs}, not {where.min()} .. {where.max()}")
        parts = _unpack(data, self._partial)
        # One of each job at a time: the n-th of each in turn n.
        order = np.argsort(where, kind="stable")
        counts = np.bincount(where, minlength=n_jobs)
        turn = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
        for n in range(counts.max(initial=0)):
            some = order[turn == n]
            self._partial[where[some]] += parts[some]


def _unpack(data: np.ndarray, like: Partial) -> Partial:
    """The partials in a card's bytes: uint8 (n_partials, bytes)."""
    width = like.run_max.shape[-1]
    header = np.ascontiguousarray(data[:, : _HEADER.itemsize]).view(_HEADER)[:, 0]
    rows, elements = abi.partial_rows(width), 2 + like.head_dim
    nbytes = elements * rows * abi.WIDE_BYTES
    words = np.ascontiguousarray(data[:, _HEADER.itemsize : _HEADER.itemsize + nbytes])
    wide = Wide.unpack(words.view(np.uint64).reshape(len(data), elements, rows, 2))
    return Partial(
        like.kv_type,
        header["run_max"][:, :width].astype(np.int16),
        Wide(*(np.swapaxes(x[:, :, :width], 1, 2) for x in (wide.limbs, wide.top))),
    )
