# SPDX-License-Identifier: Apache-2.0
"""Runs: what a card is handed at once, and where all of it lies in job memory.

A *run* is one queue of jobs. It comes out of planning, is written into job memory when its pages are on
their way into a segment of kv memory, and its partials are read back from there. `JobMap` is the only
place that knows in which order the records lie; planning asks it how much fits.

Job memory is used as two buffers, where it is large enough, so that a run is written into one while the
card works on the other.
"""

from dataclasses import dataclass
import functools
import math
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import PageLayout
from nearkv_hw.number import score_scale

from ..io import Read
from .query import query_records

_JOB = pages.record_dtype(abi.JOB)
_ENTRY = pages.record_dtype(abi.PAGE_ENTRY)


@dataclass(frozen=True, eq=False)
class Query:
    """What the jobs of a call have in common. `query_of` makes it, once for all calls that are alike."""

    job: np.ndarray  # abi.JOB: what is the same in all of them
    shape: tuple[int, int, int]  # sequences, kv heads, slices of a head's query rows

    @functools.cached_property
    def n_jobs(self) -> int:
        """Query blocks of the call; a block has a job for each part of its pages."""
        return math.prod(self.shape)

    @functools.cached_property
    def width(self) -> int:
        """Query rows of a job."""
        return int(self.job["group_size"])

    @functools.cached_property
    def head_dim(self) -> int:
        return int(self.job["head_dim"])

    @functools.cached_property
    def page_bytes(self) -> int:
        kv_type = abi.KvType(int(self.job["kv_type"]))
        return abi.PageLayout(self.head_dim, int(self.job["page_tokens"]), kv_type).page_bytes


@functools.lru_cache(maxsize=256)
def query_of(
    layout: PageLayout, n_sequences: int, n_heads: int, n_rows: int, most_rows: int, scale: float
) -> Query:
    """The query of calls with n_rows query rows for each kv head, of which a job takes most_rows.

    Raises
    ------
    ValueError
        If the scale is not positive and finite.
    """
    n_slices = max(1, -(-n_rows // most_rows))
    mantissa, shift = score_scale(scale, layout.kv_type)
    job = np.zeros((), _JOB)
    job["group_size"] = -(-n_rows // n_slices)
    job["kv_type"], job["head_dim"] = layout.kv_type, layout.head_dim
    job["page_tokens"] = layout.page_tokens
    job["score_mantissa"], job["score_shift"] = mantissa, shift
    return Query(job, (n_sequences, n_heads, n_slices))


class Work(NamedTuple):
    """Jobs over the same pages of one kv head: slices `first_slice` .. of its query rows."""

    sequence: int  # position in the call
    kv_head: int
    pages: np.ndarray  # their numbers, ascending
    first_slice: int
    n_slices: int


class JobMap(NamedTuple):
    """Where the records of a run lie, in bytes from the start of its buffer.

    summary | jobs | page tables | query blocks | partials
    """

    query_bytes: int  # of a job
    partial_bytes: int
    n_jobs: int = 0
    table_bytes: int = 0  # of all page tables

    @classmethod
    def of(cls, query: Query) -> "JobMap":
        """Of a run without jobs."""
        return cls(
            query.head_dim * abi.Q_RECORD.bytes, abi.partial_bytes(query.head_dim, query.width)
        )

    def plus(self, n_jobs: int, n_pages: int) -> "JobMap":
        """With more jobs, which have a page table in common, behind those there are."""
        table_bytes = _beats(n_pages * abi.PAGE_ENTRY.bytes)
        return self._replace(
            n_jobs=self.n_jobs + n_jobs, table_bytes=self.table_bytes + table_bytes
        )

    @property
    def summary(self) -> int:
        return 0

    @property
    def queue(self) -> int:
        return self.summary + abi.SUMMARY.bytes

    @property
    def tables(self) -> int:
        return self.queue + self.n_jobs * abi.JOB.bytes

    @property
    def queries(self) -> int:
        return self.tables + self.table_bytes

    @property
    def partials(self) -> int:
        return self.queries + self.n_jobs * self.query_bytes

    @property
    def nbytes(self) -> int:
        return self.partials + self.n_jobs * self.partial_bytes


class Run:
    """One queue of jobs. Made once, used for every token.

    Parameters
    ----------
    query : Query
    works : list of Work
    buffer : int
        Where in job memory it goes, a multiple of 64.

    Attributes
    ----------
    where : int (n_jobs,)
        Of its jobs among those of the call.
    n_pages : int
        That it loads.
    queue, summary, partials : int
        Offsets in job memory.
    """

    def __init__(self, query: Query, works: list[Work], buffer: int = 0):
        self.works, self.buffer, self._query = works, buffer, query
        self._map = JobMap.of(query)
        for work in works:
            self._map = self._map.plus(work.n_slices, len(work.pages))
        self.n_jobs = self._map.n_jobs
        self.n_pages = sum(len(work.pages) for work in works)
        self.queue, self.summary = buffer + self._map.queue, buffer + self._map.summary
        self.partials = buffer + self._map.partials
        self.partial_bytes = self._map.partial_bytes
        self.where = np.concatenate(
            [
                np.ravel_multi_index((work.sequence, work.kv_head, work.first_slice), query.shape)
                + np.arange(work.n_slices)
                for work in works
            ]
        )
        self._fronts: dict[int, np.ndarray] = {}  # by kv offset
        self.reads: dict[int, list[Read]] = {}  # by segment; for the ring

    def image(self, kv_offset: int, stored: list[np.ndarray], q: np.ndarray) -> np.ndarray:
        """What is written at `queue`: everything but the summary, uint8.

        Parameters
        ----------
        kv_offset : int
            Where in kv memory its pages are.
        stored : list of STORED_PAGE (n_kv_heads, n_pages)
            By position in the call.
        q : real (n_jobs of the call, width, head_dim)
            The queries of the call.

        Raises
        ------
        ValueError
            If one of them is not finite or too large for a card.
        """
        front = self._fronts.get(kv_offset)
        if front is None:
            front = self._fronts[kv_offset] = self._front(kv_offset, stored)
        places = self._map
        queries, partials = places.queries - places.queue, places.partials - places.queue
        image = np.empty(places.nbytes - places.queue, np.uint8)
        image[:queries] = front
        records = image[queries:partials].view(np.int32)
        query_records(q, self.where, records.reshape(self.n_jobs, self._query.head_dim, -1))
        image[partials:] = 0  # clears every status word
        return image

    def work_of(self, job: int) -> Work:
        """What a job is about."""
        ends = np.cumsum([work.n_slices for work in self.works])
        return self.works[int(np.searchsorted(ends, job, "right"))]

    def _front(self, address: int, stored: list[np.ndarray]) -> np.ndarray:
        """Jobs and page tables, which stay the same for every token."""
        query, places = self._query, self._map
        jobs = np.repeat(query.job, self.n_jobs)
        jobs["tag"] = np.arange(self.n_jobs)
        tables, page_bytes, before = [], query.page_bytes, JobMap.of(query)
        for work in self.works:
            n_pages = len(work.pages)
            entries = stored[work.sequence][work.kv_head][work.pages]
            table = np.zeros(_beats(n_pages * _ENTRY.itemsize) // _ENTRY.itemsize, _ENTRY)
            mine = table[:n_pages]
            mine["address"] = address + np.arange(n_pages) * page_bytes
            for name in ("page_len", "crc_k", "crc_v"):
                mine[name] = entries[name]
            tables.append(table)
            address += n_pages * page_bytes
            those = jobs[before.n_jobs : before.n_jobs + work.n_slices]
            those["page_table"] = self.buffer + places.tables + before.table_bytes
            those["n_pages"] = n_pages
            before = before.plus(work.n_slices, n_pages)
        each = np.arange(self.n_jobs)
        jobs["q"] = self.buffer + places.queries + each * places.query_bytes
        jobs["partial"] = self.partials + each * places.partial_bytes
        return np.concatenate([part.view(np.uint8) for part in (jobs, *tables)])


def _beats(nbytes: int) -> int:
    """Rounded up to whole beats."""
    return -(-nbytes // abi.BEAT_BYTES) * abi.BEAT_BYTES
