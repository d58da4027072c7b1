# SPDX-License-Identifier: Apache-2.0
"""Adds up the partials that a card leaves in job memory."""

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import PageLayout, Status
from nearkv_hw.number import N_LIMBS, Wide

from . import native
from .native import address
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
        self._kv_type, self._shape = layout.kv_type, (n_jobs, width, layout.head_dim)
        self._partial: Partial | None = None  # until there is something in it
        self._addresses: tuple[int, ...] = ()

    def add(self, where: np.ndarray, data: np.ndarray) -> bool:
        """Add the partials of a run, whose jobs are numbered by their tags.

        Parameters
        ----------
        where : int64 (n_partials,)
            Which job each belongs to.
        data : uint8 (n_partials, bytes), rows contiguous
            As the card has written them: `abi.partial_bytes`.

        Returns
        -------
        False, and nothing was added, if the status of one is not DONE alone, or its tag not its number.

        Raises
        ------
        IndexError
            If there is no such job; nothing was added then.
        """
        n_jobs, width, head_dim = self._shape
        library, fresh = native.library(), self._partial is None
        if library is None:
            return self._add(where, data)
        if fresh:
            elements = (n_jobs, width, 2 + head_dim)
            run_max, top = np.empty((n_jobs, width), np.int16), np.empty(elements, np.int64)
            limbs = np.empty((*elements, N_LIMBS), np.int64)
            self._partial = Partial(self._kv_type, run_max, Wide(limbs, top))
            self._addresses = address(run_max), address(limbs), address(top)
        where = np.ascontiguousarray(where, np.int64)
        answer = library.native_fold(
            address(data), data.strides[0], address(where), len(where), fresh, *self._shape,
            *self._addresses,
        )  # fmt: skip
        if answer < 0:
            raise IndexError(f"jobs must be among {n_jobs}, not {where.min()} .. {where.max()}")
        return bool(answer)

    def total(self) -> Partial:
        """(n_jobs, width); the identity where there was nothing."""
        if self._partial is None:
            n_jobs, width, head_dim = self._shape
            self._partial = Partial.empty(self._kv_type, (n_jobs, width), head_dim)
        return self._partial

    def _add(self, where: np.ndarray, data: np.ndarray) -> bool:
        total, n_jobs = self.total(), self._shape[0]
        if len(where) and not 0 <= where.min() <= where.max() < n_jobs:
            raise IndexError(f"jobs must be among {n_jobs}, not {where.min()} .. {where.max()}")
        header = np.ascontiguousarray(data[:, : _HEADER.itemsize]).view(_HEADER)[:, 0]
        if (header["status"] != Status.DONE).any() or (header["tag"] != np.arange(len(data))).any():
            return False
        parts = _unpack(data, header, total)
        # One of each job at a time: the n-th of each in turn n.
        order = np.argsort(where, kind="stable")
        counts = np.bincount(where, minlength=n_jobs)
        turn = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
        for n in range(counts.max(initial=0)):
            some = order[turn == n]
            total[where[some]] += parts[some]
        return True


def _unpack(data: np.ndarray, header: np.ndarray, like: Partial) -> Partial:
    """The partials in a card's bytes: uint8 (n_partials, bytes)."""
    width = like.run_max.shape[-1]
    rows, elements = abi.partial_rows(width), 2 + like.head_dim
    nbytes = elements * rows * abi.WIDE_BYTES
    words = np.ascontiguousarray(data[:, _HEADER.itemsize : _HEADER.itemsize + nbytes])
    wide = Wide.unpack(words.view(np.uint64).reshape(len(data), elements, rows, 2))
    return Partial(
        like.kv_type,
        header["run_max"][:, :width].astype(np.int16),
        Wide(*(np.swapaxes(x[:, :, :width], 1, 2) for x in (wide.limbs, wide.top))),
    )
