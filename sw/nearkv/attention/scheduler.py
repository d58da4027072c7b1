# SPDX-License-Identifier: Apache-2.0
"""Attention over stored pages by cards.

A `PageAttention` splits a query over jobs (one per kv head, group of at most `card.rows` query heads
and span of pages), runs them, and adds their partials up. The sums are exact (`number.Wide`), so how
the work was split, over jobs, runs and cards, changes no bit of the result.

A card's kv memory is a ring of segments. While the card computes one, the drive fills the others: with
what the same call needs next, and then with what the next call will want, which is the next layer's
pages as the layers of a model always come in the same order. They are fetched before the query is known.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import logging
import math
import threading
import time
from typing import NamedTuple
import weakref

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import PageLayout, Status
from nearkv_hw.number import score_scale

from ..cards import Card, CardError
from ..io import FlashError, Load, PageId, Read
from ..store import KvStore
from .fold import Sums
from .partial import Partial
from .query import query_records

log = logging.getLogger("nearkv")

# Of the ring: one is computed while the others fill, and a reader has up to 32 MiB on their way. On the
# 2 cores and 2.5 GB/s of bench decode, rings of 24 and 32 MiB were 5% slower; segments of 2 MiB cost more
# runs than they hide, of 8 MiB were level (14% faster from a drive in memory, where cores are short).
SEGMENTS = 16
SEGMENT_BYTES = 4 << 20  # at least, where that leaves 4 of them
RING_BYTES = 64 << 20  # of kv memory at most
MEASURE_BYTES = 8 << 20  # for each card, to find out how fast it is
_JOB = pages.record_dtype(abi.JOB)
_ENTRY = pages.record_dtype(abi.PAGE_ENTRY)
_HEADER = pages.record_dtype(abi.PARTIAL_HEADER)


@dataclass
class Figures:
    """What has been done so far. Seconds are wall-clock time of the host, of all cards together.

    What a step takes is, for each card, waiting for the drive, running, and the host's own part.
    """

    runs: int = 0
    jobs: int = 0
    pages: int = 0  # loaded from flash
    kv_bytes: int = 0  # the same in bytes
    wasted_bytes: int = 0  # fetched ahead and not used
    load_s: float = 0.0  # waited for the drive
    run_s: float = 0.0  # the card has worked
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


class _Work(NamedTuple):
    """Jobs over one span of pages of one kv head: slices `first_slice` .. of its query rows."""

    sequence: int  # position in the call
    kv_head: int
    pages: np.ndarray  # their numbers, ascending
    first_slice: int
    n_slices: int


class _Query(NamedTuple):
    """What the jobs of a call have in common."""

    job: np.ndarray  # the template
    shape: tuple[int, int, int]  # sequences, kv heads, slices

    @property
    def n_jobs(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        return int(self.job["group_size"])


class _Batch:
    """One run: which jobs, and where everything lies. Made once, used for every token."""

    def __init__(self, works: list[_Work], query: _Query):
        self.works = works
        self.where = np.concatenate(
            [
                np.ravel_multi_index((work.sequence, work.kv_head, work.first_slice), query.shape)
                + np.arange(work.n_slices)
                for work in works
            ]
        )  # of its jobs among those of the call
        self.n_pages = sum(len(work.pages) for work in works)
        self.reads: dict[int, list[Read]] = {}  # by segment
        self.tables: dict[int, bytes] = {}  # by segment: jobs and page tables


class _Plan(NamedTuple):
    """What one card does in one call."""

    key: tuple
    layer: int
    sequences: tuple[int, ...]
    stored: list[np.ndarray]
    query: _Query
    batches: list[_Batch]


class _Loading(NamedTuple):
    """A batch on its way into a segment."""

    plan: _Plan
    batch: _Batch
    segment: int
    load: Load


class PageAttention:
    """Attends to the pages of one store with one card or several.

    Parameters
    ----------
    card : Card or a sequence of them
        Card i serves the shards i, i + n_cards, .. of the store.
    store : KvStore
    ahead : bool
        Fetch what the next call will want while the host is busy elsewhere.
    segments, ring_bytes : int
        How kv memory is used: how many parts at most, and how much of it. 1 segment loads, then
        computes.

    Attributes
    ----------
    span_pages : int
        Pages of one job, at most.
    figures : Figures

    Raises
    ------
    ValueError
        If a card cannot handle the store's heads or hold one of its pages.
    """

    def __init__(
        self,
        card: Card | Sequence[Card],
        store: KvStore,
        *,
        ahead: bool = True,
        segments: int = SEGMENTS,
        ring_bytes: int = RING_BYTES,
    ):
        self.cards = list(card) if isinstance(card, Sequence) else [card]
        self.store, self.ahead = store, ahead
        self.figures = Figures()
        for one in self.cards:
            check_card(one, store.layout)
        self._rings = [_Ring(one, store, segments, ring_bytes) for one in self.cards]
        self.span_pages = min(ring.span_pages for ring in self._rings)
        # Jobs of all cards are alike, so that a query is cut once.
        self._rows = min(one.rows for one in self.cards)
        self._follows: dict[int, int] = {}  # layer -> the layer that was asked for after it
        self._last: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        if len(self.cards) > 1:
            self._pool = ThreadPoolExecutor(len(self.cards), thread_name_prefix="nearkv-card")

    @property
    def card(self) -> Card:
        """The first card."""
        return self.cards[0]

    def attend(self, layer: int, sequences, q: np.ndarray, scale: float, n_pages=None) -> Partial:
        """Attend to stored pages.

        Parameters
        ----------
        layer : int
        sequences : (n_sequences,) ints
        q : (n_sequences, n_kv_heads, n_rows, head_dim) real, finite
            Rows are whatever shares the kv head and its pages: query heads, query tokens.
        scale : float
            Of the softmax.
        n_pages : (n_sequences,) ints, optional
            How many pages of each sequence; default all it has.

        Returns
        -------
        Partial (n_sequences, n_kv_heads, n_rows)

        Raises
        ------
        FlashError
            If a page cannot be read, or an earlier write of one of these sequences has failed.
        CardError
            If the card reports anything but success, naming job, page and cause. A card that is late
            or fails is reset first, and the work done again.
        """
        begin = time.perf_counter()
        layout = self.store.layout
        n_sequences, n_heads, n_rows, head_dim = q.shape
        sequences = tuple(int(sequence) for sequence in sequences)
        stored = [self.store.stored(sequence, layer) for sequence in sequences]
        if n_pages is not None:
            stored = [entries[:, :n] for entries, n in zip(stored, n_pages, strict=True)]
        n_slices = max(1, -(-n_rows // self._rows))
        width = -(-n_rows // n_slices)
        shape = (n_sequences, n_heads, n_slices)
        q = _pad_rows(q, n_slices * width).reshape(*shape, width, head_dim)
        mantissa, shift = score_scale(scale, layout.kv_type)
        job = np.zeros((), _JOB)
        job["group_size"], job["kv_type"], job["head_dim"] = width, layout.kv_type, head_dim
        job["page_tokens"] = layout.page_tokens
        job["score_mantissa"], job["score_shift"] = mantissa, shift
        query = _Query(job, shape)
        plans = self._plans(layer, sequences, stored, query)
        if self._last is not None:
            self._follows[self._last] = layer
        self._last = layer
        following = self._guess(layer, sequences, query)
        try:
            total = self._attend(plans, following, query_records(q))
        finally:
            for ring in self._rings:
                self.figures += ring.figures
                ring.figures = Figures()
        for entries in stored:
            if entries.shape[1]:
                tokens = int(entries["page_len"][0].sum())
                self.figures.card_tokens += tokens * n_heads * n_rows
        self.figures.attend_s += time.perf_counter() - begin
        return total.reshape(n_sequences, n_heads, n_slices * width)[:, :, :n_rows]

    def rates(self) -> np.ndarray:
        """KV bytes/s of each card in the last `attend`, waiting for its drive included; 0 if idle."""
        return np.array([ring.rate for ring in self._rings])

    def discard(self) -> None:
        """Give up what was fetched ahead, and wait until no read is on its way."""
        for ring in self._rings:
            ring.close()

    def close(self) -> None:
        """`discard`, and end the threads."""
        self.discard()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _attend(self, plans, following, records) -> Partial:
        if self._pool is None:
            return self._rings[0].attend(plans[0], following[0], records)
        futures = [
            self._pool.submit(ring.attend, plan, ahead, records)
            for ring, plan, ahead in zip(self._rings, plans, following, strict=True)
        ]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        total = futures[0].result()
        for future in futures[1:]:
            total = total + future.result()
        return total

    def _plans(self, layer, sequences, stored, query: _Query) -> list[_Plan]:
        """Each card's share of a call; made anew only when something about it has changed."""
        counts = tuple(entries.shape[1] for entries in stored)
        key = (sequences, counts, query.shape, query.job.tobytes(), self.store.epoch)
        plans, n_cards = [], len(self.cards)
        for position, ring in enumerate(self._rings):
            plan = ring.plans.get(layer)
            if plan is None or plan.key != key:
                numbers = [[np.arange(entries.shape[1])] * len(entries) for entries in stored]
                if n_cards > 1:
                    numbers = [
                        [np.flatnonzero(head["shard"] % n_cards == position) for head in entries]
                        for entries in stored
                    ]
                batches = [_Batch(works, query) for works in ring.batches(numbers, query)]
                plan = _Plan(key, layer, sequences, stored, query, batches)
                ring.plans[layer] = plan
            plans.append(plan)
        return plans

    def _guess(self, layer, sequences, query: _Query) -> list[_Plan | None]:
        """What the next call will probably want, if it is there already."""
        nothing: list[_Plan | None] = [None] * len(self.cards)
        following = self._follows.get(layer) if self.ahead else None
        if following is None or following == layer:
            return nothing
        if not all(self.store.settled(sequence, following) for sequence in sequences):
            return nothing
        try:
            stored = [self.store.stored(sequence, following) for sequence in sequences]
        except FlashError:  # whoever asks for it will hear
            return nothing
        return [*self._plans(following, sequences, stored, query)]


class _Tenancy:
    """Whose ring a card's kv memory is at the moment: several stores may take turns with a card."""

    _all: "weakref.WeakKeyDictionary[Card, _Tenancy]" = weakref.WeakKeyDictionary()
    _making = threading.Lock()

    def __init__(self):
        self.lock = threading.Lock()
        self.ring: _Ring | None = None

    @classmethod
    def of(cls, card: Card) -> "_Tenancy":
        with cls._making:
            return cls._all.setdefault(card, cls())


class _Ring:
    """One card, its kv memory in segments, and what is on its way into them."""

    def __init__(self, card: Card, store: KvStore, segments: int, ring_bytes: int):
        self.card, self.store = card, store
        self._tenancy = _Tenancy.of(card)
        self.figures = Figures()  # since they were last taken
        self.rate = 0.0  # bytes/s, of the last call
        self.plans: dict[int, _Plan] = {}  # by layer, of the last call
        layout = store.layout
        used_bytes = max(min(card.kv_bytes, ring_bytes), layout.page_bytes)
        slots = used_bytes // layout.page_bytes
        n_segments = min(segments, slots, max(4, used_bytes // SEGMENT_BYTES))
        self.segment_pages = slots // n_segments
        self._segment_bytes = self.segment_pages * layout.page_bytes
        tiles = -(-layout.page_tokens // layout.tile_tokens)
        self.span_pages = min(abi.MAX_TILES // tiles, self.segment_pages)
        self._free = list(range(n_segments))
        self._loading: deque[_Loading] = deque()

    def batches(self, numbers, query: _Query) -> Iterator[list[_Work]]:
        """Cut work into runs that fit a segment and job memory.

        No run holds two spans of the same pages' rows, so its partials have distinct places.

        Parameters
        ----------
        numbers : list of list of int arrays
            By sequence and kv head, which pages.
        """
        layout, card = self.store.layout, self.card
        longest = max((len(head) for heads in numbers for head in heads), default=0)
        slice_bytes = abi.JOB.bytes + layout.head_dim * abi.Q_RECORD.bytes
        slice_bytes += abi.partial_bytes(layout.head_dim, query.width)
        n_slices = query.shape[2]
        span = min(self.span_pages, longest)
        table_bytes = _beats(span * abi.PAGE_ENTRY.bytes)
        most_slices = (card.job_bytes - abi.SUMMARY.bytes - table_bytes) // slice_bytes
        if most_slices < 1:
            raise ValueError(
                f"job_bytes must hold a job of {table_bytes + slice_bytes + abi.SUMMARY.bytes} "
                f"bytes, not {card.job_bytes}"
            )
        for first in range(0, longest, self.span_pages):
            batch, pages_used, job_used = [], 0, abi.SUMMARY.bytes
            for sequence, heads in enumerate(numbers):
                for kv_head, mine in enumerate(heads):
                    taken = mine[first : first + self.span_pages]
                    if not len(taken):
                        continue
                    for at in range(0, n_slices, most_slices):
                        slices = min(most_slices, n_slices - at)
                        need = slices * slice_bytes + _beats(len(taken) * abi.PAGE_ENTRY.bytes)
                        full = pages_used + len(taken) > self.segment_pages
                        if batch and (full or job_used + need > card.job_bytes):
                            yield batch
                            batch, pages_used, job_used = [], 0, abi.SUMMARY.bytes
                        batch.append(_Work(sequence, kv_head, taken, at, slices))
                        pages_used, job_used = pages_used + len(taken), job_used + need
            if batch:
                yield batch

    def attend(self, plan: _Plan, following: _Plan | None, records: np.ndarray) -> Partial:
        """Carry out a plan and begin to fetch the one that follows.

        records : (n_jobs, head_dim, 16), the query blocks of all jobs of the call
        """
        with self._tenancy.lock:
            before, self._tenancy.ring = self._tenancy.ring, self
            if before is not None and before is not self:
                before._discard()
            begin, loaded = time.perf_counter(), self.figures.kv_bytes
            partial = self._attend_twice(plan, following, records)
            loaded = self.figures.kv_bytes - loaded
            self.rate = loaded / (time.perf_counter() - begin)
            return partial

    def close(self) -> None:
        """Wait for what is on its way, and leave the card to others."""
        with self._tenancy.lock:
            self._discard()
            if self._tenancy.ring is self:
                self._tenancy.ring = None

    def _attend_twice(self, plan, following, records) -> Partial:
        """Attend; once more if the card did not answer."""
        try:
            return self._attend(plan, following, records)
        except CardError as error:
            if not error.recoverable:
                raise
            log.warning("%s; the card is reset and the work done again", error)
            self._reset()
        try:
            return self._attend(plan, None, records)
        except CardError as error:
            if error.recoverable:
                self._reset()  # others may have better luck
            raise

    def _attend(self, plan, following, records) -> Partial:
        if any(loading.plan is not plan for loading in self._loading):
            self._discard()  # the guess was wrong
        coming = iter(
            [(plan, batch) for batch in plan.batches[len(self._loading) :]]
            + ([(following, batch) for batch in following.batches] if following else [])
        )
        wanted = next(coming, None)
        sums = Sums(self.store.layout, plan.query.n_jobs, plan.query.width)
        try:
            for batch in plan.batches:
                wanted = self._start(wanted, coming)
                loading = self._loading[0]
                front = self._front(loading)  # while the drive works
                waited = time.perf_counter()
                self.card.finish_load(loading.load)
                self.figures.load_s += time.perf_counter() - waited
                self._loading.popleft()
                try:
                    sums.add(batch.where, self._run(loading, front, records))
                finally:
                    self._free.append(loading.segment)
            self._start(wanted, coming)
        except BaseException as error:
            if not getattr(error, "recoverable", False):
                self._discard()
            raise
        return sums.total()

    def _reset(self) -> None:
        """Reset the card; nothing is on its way then."""
        while self._loading:
            loading = self._loading.popleft()
            self.figures.wasted_bytes += loading.load.nbytes
            self._free.append(loading.segment)
        self.card.reset()

    def _start(self, wanted, coming):
        """Ask for batches while segments are free; the one that found none."""
        while wanted is not None and self._free:
            plan, batch = wanted
            segment = self._free.pop(0)
            try:
                if segment not in batch.reads:
                    batch.reads[segment] = self._reads(plan, batch, segment)
                load = self.card.start_load(batch.reads[segment])
            except BaseException:
                self._free.append(segment)
                raise
            self._loading.append(_Loading(plan, batch, segment, load))
            wanted = next(coming, None)
        return wanted

    def _reads(self, plan: _Plan, batch: _Batch, segment: int) -> list[Read]:
        at, reads = segment * self._segment_bytes, []
        for work in batch.works:
            page = PageId(plan.layer, plan.sequences[work.sequence], work.kv_head, 0)
            reads += self.store.reads(page, work.pages, at)
            at += len(work.pages) * self.store.layout.page_bytes
        return reads

    def _discard(self) -> None:
        """Give up what is on its way; its segments are free when it has arrived."""
        while self._loading:
            loading = self._loading.popleft()
            try:
                self.card.finish_load(loading.load)
            except (FlashError, CardError):
                pass  # nobody wants it; a card that is late says so itself, until all has arrived
            self.figures.wasted_bytes += loading.load.nbytes
            self._free.append(loading.segment)

    def _front(self, loading: _Loading) -> bytes:
        """The first part of a run's job memory: jobs and page tables."""
        plan, batch, segment, _ = loading
        if segment in batch.tables:
            return batch.tables[segment]
        layout, n_jobs = self.store.layout, len(batch.where)
        jobs = np.repeat(plan.query.job, n_jobs)
        jobs["tag"] = np.arange(n_jobs)
        at = abi.SUMMARY.bytes + n_jobs * abi.JOB.bytes
        tables, job = [], 0
        address = segment * self._segment_bytes
        for work in batch.works:
            n_pages = len(work.pages)
            entries = plan.stored[work.sequence][work.kv_head][work.pages]
            table = np.zeros(_beats(n_pages * _ENTRY.itemsize) // _ENTRY.itemsize, _ENTRY)
            mine = table[:n_pages]
            mine["address"] = address + np.arange(n_pages) * layout.page_bytes
            for name in ("page_len", "crc_k", "crc_v"):
                mine[name] = entries[name]
            tables.append(table)
            address += n_pages * layout.page_bytes
            those = jobs[job : job + work.n_slices]
            those["page_table"], those["n_pages"] = at, n_pages
            at += table.nbytes
            job += work.n_slices
        q_bytes = layout.head_dim * abi.Q_RECORD.bytes
        jobs["q"] = at + np.arange(n_jobs) * q_bytes
        at += n_jobs * q_bytes
        partial_bytes = abi.partial_bytes(layout.head_dim, plan.query.width)
        jobs["partial"] = at + np.arange(n_jobs) * partial_bytes
        front = b"".join(part.tobytes() for part in (jobs, *tables))
        batch.tables[segment] = front
        return front

    def _run(self, loading: _Loading, front: bytes, records: np.ndarray) -> np.ndarray:
        """Run the jobs of a batch that has arrived; their partials: uint8 (n_jobs, bytes)."""
        plan, batch, _, load = loading
        card, head_dim = self.card, self.store.layout.head_dim
        n_jobs, queue = len(batch.where), abi.SUMMARY.bytes
        partial_bytes = abi.partial_bytes(head_dim, plan.query.width)
        partials = queue + len(front) + n_jobs * head_dim * abi.Q_RECORD.bytes
        start = time.perf_counter()
        # One copy; the zeros at its end clear every status word.
        image = [front, records[batch.where].data, bytes(n_jobs * partial_bytes)]
        card.write_job(queue, b"".join(image))
        counters = card.run(queue, n_jobs, 0)
        data = card.read_job(partials, n_jobs * partial_bytes).reshape(n_jobs, partial_bytes)
        figures = self.figures
        figures.run_s += time.perf_counter() - start
        figures.runs += 1
        figures.jobs += n_jobs
        figures.pages += batch.n_pages
        figures.kv_bytes += load.nbytes
        figures.cycles += counters["cycles"]
        self._check(plan, batch, data[:, : _HEADER.itemsize].view(_HEADER)[:, 0], counters)
        return data

    def _check(self, plan: _Plan, batch: _Batch, header, counters) -> None:
        """Raise CardError for the first partial that is not good."""
        good = (header["status"] == Status.DONE) & (header["tag"] == np.arange(len(header)))
        if good.all():
            return
        job = int(np.argmin(good))
        ends = np.cumsum([work.n_slices for work in batch.works])
        work = batch.works[int(np.searchsorted(ends, job, "right"))]
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
        raise CardError(
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


def check_card(card: Card, layout: PageLayout) -> None:
    """Raise ValueError unless the card can attend to pages of this layout."""
    if layout.head_dim > card.max_head_dim:
        raise ValueError(
            f"card {card.name!r} is built for head_dim up to {card.max_head_dim}, "
            f"not {layout.head_dim}; choose another configuration"
        )
    if card.kv_bytes < layout.page_bytes:
        raise ValueError(
            f"a page has {layout.page_bytes} bytes and the card {card.kv_bytes} bytes of kv "
            "memory; lower page_tokens or raise kv_bytes"
        )


def measure_cards(
    cards: Sequence[Card], directory, layout: PageLayout, n_kv_heads: int
) -> list[float]:
    """How fast each card attends to pages from its drive while the others do the same.

    Writes some MiB for each into temporary files, and attends to them for about 0.2 s.

    Parameters
    ----------
    cards, directory, layout, n_kv_heads
        As for `PageAttention` and `KvStore`.

    Returns
    -------
    bytes/s of each, for `weights` of a store

    Raises
    ------
    FlashError, CardError
        If a drive or a card fails.
    """
    n_pages = -(-len(cards) * MEASURE_BYTES // (n_kv_heads * layout.page_bytes))
    rng = np.random.default_rng(0)
    some = rng.standard_normal((n_kv_heads, layout.page_tokens, layout.head_dim), np.float32)
    patterns = np.tile(pages.to_patterns(some, layout.kv_type), (1, n_pages, 1))
    q = np.zeros((1, n_kv_heads, 1, layout.head_dim))
    rates = []
    with KvStore(directory, layout, n_kv_heads, temporary=True, n_shards=len(cards)) as store:
        store.append(0, 0, patterns, patterns)
        attention = PageAttention(cards, store, ahead=False)
        try:
            attention.attend(0, [0], q, 1.0, [1])  # what takes long the first time
            end = time.perf_counter() + 0.2
            while not rates or time.perf_counter() < end:
                attention.attend(0, [0], q, 1.0)
                rates.append(attention.rates())
        finally:
            attention.close()
    return np.median(rates, axis=0).tolist()


def _pad_rows(q: np.ndarray, n_rows: int) -> np.ndarray:
    missing = n_rows - q.shape[2]
    return np.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q


def _beats(nbytes: int) -> int:
    """Rounded up to whole beats."""
    return -(-nbytes // abi.BEAT_BYTES) * abi.BEAT_BYTES
