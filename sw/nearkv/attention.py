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
import math
import tempfile
import time
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import PageLayout, Status
from nearkv_hw.number import Wide, quantize_q, score_scale

from . import pages
from .card import Card, CardError, open_cards
from .flash import FlashError, Load, PageId
from .partial import Partial
from .store import KvStore

SEGMENTS = 4  # of kv memory: one is computed while the others fill
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


class _Plan(NamedTuple):
    """What one card does in one call."""

    key: tuple
    layer: int
    sequences: tuple[int, ...]
    stored: list[np.ndarray]
    batches: list[list[_Work]]  # one run each


class _Loading(NamedTuple):
    """A batch on its way into a segment."""

    plan: _Plan
    batch: int
    segment: int
    load: Load


class _Query(NamedTuple):
    """What the jobs of a call have in common, and their query blocks."""

    job: np.ndarray  # the template
    records: np.ndarray  # (n_jobs, head_dim, 16)
    shape: tuple[int, int, int]  # sequences, kv heads, slices
    width: int


class PageAttention:
    """Attends to the pages of one store with one card or several.

    Parameters
    ----------
    card : Card or a sequence of them
        Card i serves the shards i, i + n_cards, .. of the store.
    store : KvStore
    ahead : bool
        Fetch what the next call will want while the host is busy elsewhere.

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

    def __init__(self, card: Card | Sequence[Card], store: KvStore, *, ahead: bool = True):
        self.cards = list(card) if isinstance(card, Sequence) else [card]
        self.store, self.ahead = store, ahead
        self.figures = Figures()
        for one in self.cards:
            check_card(one, store.layout)
        self._rings = [_Ring(one, store) for one in self.cards]
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
            If the card reports anything but success, naming job, page and cause.
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
        plans = self._plans(layer, sequences, stored, n_slices, width)
        query = _Query(job, _q_records(q), shape, width)
        if self._last is not None:
            self._follows[self._last] = layer
        self._last = layer
        following = self._guess(layer, sequences, n_slices, width)
        try:
            total = self._attend(plans, following, query)
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

    def close(self) -> None:
        """Give up what was fetched ahead, and wait until no read is on its way."""
        for ring in self._rings:
            ring.discard()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _attend(self, plans, following, query) -> Partial:
        if self._pool is None:
            return self._rings[0].attend(plans[0], following[0], query)
        futures = [
            self._pool.submit(ring.attend, plan, ahead, query)
            for ring, plan, ahead in zip(self._rings, plans, following, strict=True)
        ]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        total = futures[0].result()
        for future in futures[1:]:
            total = total + future.result()
        return total

    def _plans(self, layer, sequences, stored, n_slices, width) -> list[_Plan]:
        """Each card's share of a call."""
        counts = tuple(entries.shape[1] for entries in stored)
        key = (layer, sequences, counts, n_slices, width, self.store.epoch)
        plans, n_cards = [], len(self.cards)
        for position, ring in enumerate(self._rings):
            if ring.planned is not None and ring.planned.key == key:
                plans.append(ring.planned)
                continue
            numbers = [[np.arange(entries.shape[1])] * len(entries) for entries in stored]
            if n_cards > 1:
                numbers = [
                    [np.flatnonzero(head["shard"] % n_cards == position) for head in entries]
                    for entries in stored
                ]
            batches = list(ring.batches(numbers, n_slices, width))
            plans.append(_Plan(key, layer, sequences, stored, batches))
        return plans

    def _guess(self, layer, sequences, n_slices, width) -> list[_Plan | None]:
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
        plans = self._plans(following, sequences, stored, n_slices, width)
        for ring, plan in zip(self._rings, plans, strict=True):
            ring.planned = plan
        return [*plans]


class _Ring:
    """One card, its kv memory in segments, and what is on its way into them."""

    def __init__(self, card: Card, store: KvStore):
        self.card, self.store = card, store
        self.figures = Figures()  # since they were last taken
        self.planned: _Plan | None = None  # for the next call
        layout = store.layout
        slots = card.kv_bytes // layout.page_bytes
        n_segments = min(SEGMENTS, slots)
        self.segment_pages = slots // n_segments
        self._segment_bytes = self.segment_pages * layout.page_bytes
        tiles = -(-layout.page_tokens // layout.tile_tokens)
        self.span_pages = min(abi.MAX_TILES // tiles, self.segment_pages)
        self._free = list(range(n_segments))
        self._loading: deque[_Loading] = deque()

    def batches(self, numbers, n_slices, width) -> Iterator[list[_Work]]:
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
        slice_bytes += abi.partial_bytes(layout.head_dim, width)
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

    def attend(self, plan: _Plan, following: _Plan | None, query: _Query) -> Partial:
        """Carry out a plan and begin to fetch the one that follows."""
        layout = self.store.layout
        n_jobs = math.prod(query.shape)
        total = Partial.empty(layout.kv_type, (n_jobs, query.width), layout.head_dim)
        if self._loading and self._loading[0].plan is not plan:
            self.discard()
        coming = iter(
            [(plan, i) for i in range(len(self._loading), len(plan.batches))]
            + ([(following, i) for i in range(len(following.batches))] if following else [])
        )
        wanted = next(coming, None)
        try:
            for batch in plan.batches:
                wanted = self._start(wanted, coming)
                loading = self._loading[0]
                waited = time.perf_counter()
                self.card.finish_load(loading.load)
                self.figures.load_s += time.perf_counter() - waited
                self._loading.popleft()
                where = np.concatenate(
                    [
                        np.ravel_multi_index((work.sequence, work.kv_head, work.first_slice),
                                             query.shape)
                        + np.arange(work.n_slices)
                        for work in batch
                    ]
                )  # fmt: skip
                try:
                    part = self._run(plan, batch, loading, query, where)
                finally:
                    self._free.append(loading.segment)
                if len(where) == n_jobs and len(plan.batches) == 1:
                    total = part[np.argsort(where)]  # one batch answers everything
                else:
                    total[where] = total[where] + part
            self._start(wanted, coming)
        except BaseException:
            self.discard()
            raise
        return total

    def _start(self, wanted, coming):
        """Ask for batches while segments are free; the one that found none."""
        while wanted is not None and self._free:
            plan, index = wanted
            segment = self._free.pop(0)
            at, reads = segment * self._segment_bytes, []
            try:
                for work in plan.batches[index]:
                    page = PageId(plan.layer, plan.sequences[work.sequence], work.kv_head, 0)
                    reads += self.store.reads(page, work.pages, at)
                    at += len(work.pages) * self.store.layout.page_bytes
                load = self.card.start_load(reads)
            except BaseException:
                self._free.append(segment)
                raise
            self._loading.append(_Loading(plan, index, segment, load))
            wanted = next(coming, None)
        return wanted

    def discard(self) -> None:
        """Give up what is on its way; its segments are free when it has arrived."""
        while self._loading:
            loading = self._loading.popleft()
            try:
                self.card.finish_load(loading.load)
            except (FlashError, CardError):
                pass  # nobody wants it; a card that is late says so itself, until all has arrived
            self.figures.wasted_bytes += loading.load.nbytes
            self._free.append(loading.segment)

    def _run(self, plan: _Plan, batch, loading: _Loading, query: _Query, where) -> Partial:
        """Run the jobs of a batch that has arrived; their partials: (n_jobs, width)."""
        layout, card = self.store.layout, self.card
        head_dim, width = layout.head_dim, query.width
        q_records = query.records[where]
        n_jobs = len(q_records)
        jobs = np.repeat(query.job, n_jobs)
        jobs["tag"] = np.arange(n_jobs)
        queue = abi.SUMMARY.bytes
        at = queue + n_jobs * abi.JOB.bytes
        tables, job = [], 0
        address = first_address = loading.segment * self._segment_bytes
        for work in batch:
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
        q_bytes = head_dim * abi.Q_RECORD.bytes
        jobs["q"] = at + np.arange(n_jobs) * q_bytes
        at += n_jobs * q_bytes
        partial_bytes = abi.partial_bytes(head_dim, width)
        partials, size = at, n_jobs * partial_bytes
        jobs["partial"] = partials + np.arange(n_jobs) * partial_bytes

        start = time.perf_counter()
        # One copy; the zeros at its end clear every status word.
        image = [part.tobytes() for part in (jobs, *tables, q_records)]
        card.write_job(queue, b"".join([*image, bytes(size)]))
        counters = card.run(queue, n_jobs, 0)
        data = card.read_job(partials, size).reshape(n_jobs, partial_bytes)
        figures = self.figures
        figures.run_s += time.perf_counter() - start
        figures.runs += 1
        figures.jobs += n_jobs
        figures.pages += (address - first_address) // layout.page_bytes
        figures.kv_bytes += address - first_address
        figures.cycles += counters["cycles"]
        header = data[:, : _HEADER.itemsize].view(_HEADER)[:, 0]
        self._check(plan, batch, header, counters)

        rows = abi.partial_rows(width)
        words = data[:, _HEADER.itemsize :].view(np.uint64)[:, : (2 + head_dim) * rows * 2]
        wide = Wide.unpack(words.reshape(n_jobs, 2 + head_dim, rows, 2))
        limbs, top = wide.limbs[:, :, :width], wide.top[:, :, :width]
        return Partial(
            layout.kv_type,
            header["run_max"][:, :width].astype(np.int16),
            Wide(limbs[:, 0], top[:, 0]),
            Wide(limbs[:, 1], top[:, 1]),
            Wide(limbs[:, 2:].swapaxes(1, 2), top[:, 2:].swapaxes(1, 2)),
        )

    def _check(self, plan: _Plan, batch, header, counters) -> None:
        """Raise CardError for the first partial that is not good."""
        good = (header["status"] == Status.DONE) & (header["tag"] == np.arange(len(header)))
        if good.all():
            return
        job = int(np.argmin(good))
        work = batch[int(np.searchsorted(np.cumsum([w.n_slices for w in batch]), job, "right"))]
        status, bad_page = Status(int(header["status"][job])), int(header["bad_page"][job])
        page = PageId(plan.layer, plan.sequences[work.sequence], work.kv_head, 0)
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


def attend(
    q,
    k,
    v,
    card: Card | str | Sequence[Card | str] = "model",
    scale=None,
    kv_dtype=None,
    page_tokens=128,
    directory=None,
):
    """Decode attention of one token over a context, through real pages in a temporary store.

    Parameters
    ----------
    q : (n_q_heads, head_dim)
        Query head h belongs to kv head h // (n_q_heads // n_kv_heads).
    k, v : (kv_len, n_kv_heads, head_dim)
        numpy or torch, like q; any real dtype. Stored as `kv_dtype`.
    card : Card, str, or a sequence of them
        Names are opened for this call. Several share the work.
    scale : float, optional
        Default 1/sqrt(head_dim).
    kv_dtype : "fp16" or "bf16", optional
        Default bf16 for bf16 K, otherwise fp16.
    page_tokens : int
    directory : path, optional
        Where the pages go. Default: the system's directory for temporary files.

    Returns
    -------
    out : float32 (n_q_heads, head_dim)
    lse_ln : float32 (n_q_heads,)
        Natural logarithm of the sum of exponentials of the scaled scores. -inf if kv_len is 0.
        torch tensors on q's device if q is one.

    Raises
    ------
    ValueError
        If shapes do not fit, or an element of K or V is Inf or NaN.
    FlashError, CardError
        If pages cannot be stored or read, or the card does not succeed.

    >>> attend(np.ones((4, 64)), np.ones((10, 2, 64)), np.ones((10, 2, 64)))[0].shape
    (4, 64)
    """
    n_q_heads, head_dim = q.shape
    kv_len, n_kv_heads, _ = k.shape
    if n_q_heads % n_kv_heads:
        raise ValueError(f"{n_q_heads} query heads cannot share {n_kv_heads} kv heads evenly")
    if q.shape[1] != k.shape[2]:
        raise ValueError(f"q has head_dim {q.shape[1]} and k {k.shape[2]}")
    if kv_dtype is None:
        kv_dtype = "bf16" if str(k.dtype).endswith("bfloat16") else "fp16"
    layout = PageLayout(head_dim, page_tokens, pages.parse_kv_type(kv_dtype))
    scale = head_dim**-0.5 if scale is None else scale
    directory = tempfile.gettempdir() if directory is None else directory
    heads_first = (1, 0, 2)
    k, v = (x.permute(heads_first) if pages.is_torch(x) else np.transpose(x, heads_first)
            for x in (k, v))  # fmt: skip
    rows = to_numpy(q).reshape(1, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    cards, opened = open_cards(card)
    try:
        for one in cards:
            check_card(one, layout)
        with KvStore(directory, layout, n_kv_heads, temporary=True, n_shards=len(cards)) as store:
            store.append(0, 0, k, v, ragged=True)
            attention = PageAttention(cards, store)
            try:
                partial = attention.attend(0, [0], rows, scale)
            finally:
                attention.close()
    finally:
        for one in opened:
            one.close()
    out, lse_log2 = partial.normalise()
    out = out.reshape(n_q_heads, head_dim).astype(np.float32)
    lse_ln = (lse_log2.reshape(n_q_heads) * math.log(2)).astype(np.float32)
    if pages.is_torch(q):
        import torch

        return torch.from_numpy(out).to(q.device), torch.from_numpy(lse_ln).to(q.device)
    return out, lse_ln


def to_numpy(x) -> np.ndarray:
    """A numpy array of at least fp32 precision from numpy or torch, of any real dtype."""
    if pages.is_torch(x):
        return x.detach().float().cpu().numpy()
    x = np.asarray(x)
    return x if x.dtype.itemsize >= 4 else x.astype(np.float32)


def _q_records(q: np.ndarray) -> np.ndarray:
    """Query blocks of all jobs: int32 (n_jobs, head_dim, 16) from q (..., width, head_dim)."""
    width, head_dim = q.shape[-2:]
    q = q.reshape(-1, width, head_dim)
    # Channels of all jobs side by side: each has its own exponent.
    weight, exponent = quantize_q(q.swapaxes(0, 1).reshape(width, -1))
    records = np.zeros((len(q) * head_dim, abi.Q_RECORD.bytes // 4), np.int32)
    records[:, :width] = weight.T
    records[:, -1] = exponent
    return records.reshape(len(q), head_dim, -1)


def _pad_rows(q: np.ndarray, n_rows: int) -> np.ndarray:
    missing = n_rows - q.shape[2]
    return np.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q


def _beats(nbytes: int) -> int:
    """Rounded up to whole beats."""
    return -(-nbytes // abi.BEAT_BYTES) * abi.BEAT_BYTES
