# SPDX-License-Identifier: Apache-2.0
"""The ring: one card at work, its kv memory in segments that fill while others are attended to.

While the card computes a run, the drive fills segments with the pages of the next: with what the same
call needs, and then with what the next call will want. The host writes the next run into job memory and
adds up the partials of the one before. So drive, card and host work at the same time, and whoever is
slowest is never waited for in vain.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import logging
import time
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import Status

from ..cards import Card, CardError, CardRun
from ..io import FlashError, Load, PageId, Read
from ..store import KvStore
from .fold import Sums
from .partial import Partial
from .planning import Plan, Room
from .runs import Run

log = logging.getLogger("nearkv")

# Of the ring: one is computed while the others fill, and a reader has up to 32 MiB on their way. On the
# 2 cores and 2.5 GB/s of bench decode, rings of 24 and 32 MiB were 5% slower; segments of 2 MiB cost more
# runs than they hide, of 8 MiB were level (14% faster from a drive in memory, where cores are short).
SEGMENTS = 16
SEGMENT_BYTES = 4 << 20  # at least, where that leaves 4 of them
RING_BYTES = 64 << 20  # of kv memory at most
_HEADER = pages.record_dtype(abi.PARTIAL_HEADER)


@dataclass
class Figures:
    """What has been done so far. Seconds are wall-clock time of the host, of all cards together.

    What a step takes is, for each card, waiting for the drive, waiting for the card, and the host's own
    part.
    """

    runs: int = 0
    jobs: int = 0
    pages: int = 0  # loaded from flash
    kv_bytes: int = 0  # the same in bytes
    wasted_bytes: int = 0  # fetched ahead and not used
    load_s: float = 0.0  # waited for the drive
    run_s: float = 0.0  # waited for the card
    attend_s: float = 0.0  # in `attend`, these two included
    # (query row, token) pairs attended: by the card, by the host beside it, by the host in prefill
    card_tokens: int = 0
    host_tokens: int = 0
    prefill_tokens: int = 0
    cycles: int = 0  # of the card, where it counts them

    def __iadd__(self, other: "Figures") -> "Figures":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class _Loading(NamedTuple):
    """A run whose pages are on their way into a segment."""

    plan: Plan
    run: Run
    segment: int
    load: Load


class _OnCard(NamedTuple):
    """A run that the card has begun."""

    loading: _Loading
    started: CardRun


class _Ended(NamedTuple):
    """A run that the card has answered."""

    loading: _Loading
    counters: dict[str, int]
    data: np.ndarray  # its partials: uint8 (n_jobs, bytes)


class Ring:
    """One card, its kv memory in segments, and what is on its way into them.

    Of one thread at a time: everything happens in the ring's turn with its card.

    Parameters
    ----------
    card : Card
    store : KvStore
    segments, ring_bytes : int
        How many segments at most, and of how much kv memory.

    Attributes
    ----------
    room : Room
    figures : Figures
        Since they were last taken.
    rate : float
        KV bytes/s of the last call.
    plans : dict
        The last plan of each layer.
    """

    def __init__(self, card: Card, store: KvStore, segments: int, ring_bytes: int):
        self.card, self.store = card, store
        self.figures = Figures()
        self.rate = 0.0
        self.plans: dict[int, Plan] = {}
        layout = store.layout
        used_bytes = max(min(card.kv_bytes, ring_bytes), layout.page_bytes)
        slots = used_bytes // layout.page_bytes
        n_segments = min(segments, slots, max(4, used_bytes // SEGMENT_BYTES))
        self.room = Room.of(layout, slots // n_segments, card.job_bytes)
        self._segment_bytes = self.room.segment_pages * layout.page_bytes
        # The one that was free last is taken first: it is still in the processor's caches, where a
        # drive writes, and what a run says of its segment is known from the step before.
        self._free = [*reversed(range(n_segments))]
        self._loading: deque[_Loading] = deque()  # in the order of their runs
        self._on_card: _OnCard | None = None
        self._coming: Iterator[tuple[Plan, Run]] = iter(())  # to be loaded when segments are free

    def attend(
        self,
        plan: Plan,
        following: Plan | None,
        q: np.ndarray,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Partial:
        """Carry out a plan and begin to load what follows.

        Parameters
        ----------
        q : real (n_jobs, width, head_dim)
            The queries of the call.
        meanwhile : callable
            Called while the card carries out the last run.

        Returns
        -------
        Partial (n_jobs, width)
        """
        with self.card.tenancy.turn(self):
            begin, loaded = time.perf_counter(), self.figures.kv_bytes
            partial = self._attend_twice(plan, following, q, meanwhile)
            loaded = self.figures.kv_bytes - loaded
            self.rate = loaded / (time.perf_counter() - begin)
            return partial

    def close(self) -> None:
        """Wait for what is on its way, and leave the card to others."""
        self.card.tenancy.end(self)

    def leave(self) -> None:
        """Give up what is on its way; its segments are free when it has ended. Does not raise."""
        self._coming = iter(())
        # A card that is late, or closed, refuses work by itself: once is enough to wait for it.
        limit = None
        on_card, self._on_card = self._on_card, None
        if on_card is not None:
            try:
                self.card.finish_run(on_card.started)
            except Exception as error:
                log.debug("of a run that was given up: %s", error)
                limit = 0.0
            self._free.append(on_card.loading.segment)
        while self._loading:
            loading = self._loading.popleft()
            try:
                self.card.finish_load(loading.load, limit)
            except FlashError as error:
                log.debug("of a load that was given up: %s", error)
            except CardError as error:
                log.debug("of a load that was given up: %s", error)
                limit = 0.0
            self.figures.wasted_bytes += loading.load.nbytes
            self._free.append(loading.segment)

    def _attend_twice(self, plan, following, q, meanwhile) -> Partial:
        """Attend; once more if the card did not answer."""
        try:
            return self._attend(plan, following, q, meanwhile)
        except CardError as error:
            if not error.recoverable:
                raise
            log.warning("%s; the card is reset and the work done again", error)
            self._reset()
        try:
            return self._attend(plan, None, q, meanwhile)
        except CardError as error:
            if error.recoverable:
                self._reset()  # others may have better luck
            raise

    def _attend(self, plan: Plan, following: Plan | None, q: np.ndarray, meanwhile) -> Partial:
        if any(loading.plan is not plan for loading in self._loading):
            self.leave()  # the guess was wrong
        coming = [(plan, run) for run in plan.runs[len(self._loading) :]]
        if following is not None:
            coming += [(following, run) for run in following.runs]
        self._coming = iter(coming)
        sums = Sums(self.store.layout, plan.query.n_jobs, plan.query.width)
        try:
            for run in plan.runs:
                if not self._loading or self._same_buffer(run):
                    self._load()
                    self._add(self._end(), sums)
                    self._load()
                loading = self._loading[0]
                # Whoever is the slower, drive or card, is given work first.
                arrived = loading.load.arrived
                if not arrived:
                    self._load()
                image = run.image(loading.segment * self._segment_bytes, plan.stored, q)
                self.card.write_job(run.queue, image)
                ended = self._end()
                if not arrived:
                    self._load()
                self._arrive(loading)
                self._start(loading)
                self._load()  # this and what follows while the card works
                self._add(ended, sums)
            meanwhile()
            ended = self._end()
            self._load()
            self._add(ended, sums)
        except BaseException as error:
            if not getattr(error, "recoverable", False):
                self.leave()
            raise
        return sums.total()

    def _same_buffer(self, run: Run) -> bool:
        return self._on_card is not None and self._on_card.loading.run.buffer == run.buffer

    def _load(self) -> None:
        """Ask for pages of the runs that come while segments are free."""
        while self._free:
            plan, run = next(self._coming, (None, None))
            if plan is None or run is None:
                return
            segment = self._free.pop()
            try:
                load = self.card.start_load(self._reads_of(plan, run, segment))
            except BaseException:
                self._free.append(segment)
                raise
            self._loading.append(_Loading(plan, run, segment, load))

    def _reads_of(self, plan: Plan, run: Run, segment: int) -> list[Read]:
        reads = run.reads.get(segment)
        if reads is None:
            at, reads = segment * self._segment_bytes, []
            for work in run.works:
                page = PageId(plan.layer, plan.sequences[work.sequence], work.kv_head, 0)
                reads += self.store.reads(page, work.pages, at)
                at += len(work.pages) * self.store.layout.page_bytes
            run.reads[segment] = reads
        return reads

    def _arrive(self, loading: _Loading) -> None:
        begin = time.perf_counter()
        self.card.finish_load(loading.load)
        self.figures.load_s += time.perf_counter() - begin

    def _start(self, loading: _Loading) -> None:
        run = loading.run
        started = self.card.start_run(run.queue, run.n_jobs, run.summary)
        self._loading.popleft()
        self._on_card = _OnCard(loading, started)

    def _end(self) -> _Ended | None:
        """Wait for the run that is on the card, if there is one."""
        if self._on_card is None:
            return None
        begin = time.perf_counter()
        loading, started = self._on_card
        counters = self.card.finish_run(started)
        self._on_card = None
        self._free.append(loading.segment)
        run, figures = loading.run, self.figures
        figures.run_s += time.perf_counter() - begin
        figures.runs += 1
        figures.jobs += run.n_jobs
        figures.pages += run.n_pages
        figures.kv_bytes += loading.load.nbytes
        figures.cycles += counters["cycles"]
        data = self.card.read_job(run.partials, run.n_jobs * run.partial_bytes)
        return _Ended(loading, counters, data.reshape(run.n_jobs, run.partial_bytes))

    def _add(self, ended: _Ended | None, sums: Sums) -> None:
        """Add its partials up; CardError if one is not good."""
        if ended is not None and not sums.add(ended.loading.run.where, ended.data):
            raise self._complaint(ended)

    def _reset(self) -> None:
        """Reset the card; nothing is on its way then."""
        if self._on_card is not None:
            self._free.append(self._on_card.loading.segment)
            self._on_card = None
        while self._loading:
            loading = self._loading.popleft()
            self.figures.wasted_bytes += loading.load.nbytes
            self._free.append(loading.segment)
        self.card.reset()

    def _complaint(self, ended: _Ended) -> CardError:
        """About the first partial that is not good."""
        (plan, run, *_), counters = ended.loading, ended.counters
        header = ended.data[:, : _HEADER.itemsize].view(_HEADER)[:, 0]
        good = (header["status"] == Status.DONE) & (header["tag"] == np.arange(len(header)))
        job = int(np.argmin(good))
        work = run.work_of(job)
        status, bad_page = Status(int(header["status"][job])), int(header["bad_page"][job])
        page = PageId(plan.layer, plan.sequences[work.sequence], work.kv_head, 0)
        path = None
        where = f"layer {page.layer}, sequence {page.sequence}, kv head {page.kv_head}"
        if status & Status.DONE and bad_page < len(work.pages):
            page = page._replace(page=int(work.pages[bad_page]))
            path, offset = self.store.locate(page)
            where = f"{page} (file {path} at byte {offset})"
        if status == Status.DONE:
            what = f"answered job {int(header['tag'][job])} instead of {job}"
        else:
            what = status.describe()
        return CardError(
            f"card {self.card.name!r}, {where}: {what}; {_remedy(status)}; "
            f"{int((~good).sum())} of {len(header)} jobs failed",
            status=status,
            counters=counters,
            page=page,
            filename=None if path is None else str(path),
        )


def _remedy(status: Status) -> str:
    if not status & Status.DONE:
        return "the run ended without answering this job; check that host and card are of one build"
    if status & (Status.BAD_CRC_K | Status.BAD_CRC_V):
        return (
            "the page's bytes differ from what was stored: the file was changed or the drive "
            "returned wrong data; the sequence has to be computed again"
        )
    if status & Status.NON_FINITE:
        return "it was stored without nearkv's check; compute the sequence again"
    if status & Status.SATURATED:
        return "q or K are out of proportion; check the model's weights and the softmax scale"
    return "host and card disagree; check that they are of one build"
