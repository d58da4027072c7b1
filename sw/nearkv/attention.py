# SPDX-License-Identifier: Apache-2.0
"""Attention over stored pages by a card.

A `PageAttention` splits a query over jobs (one per kv head, group of at most `card.rows` query heads
and span of pages), runs them, and adds their partials up. The sums are exact (`number.Wide`), so how
the work was split changes no bit of the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
import math
import tempfile
import time
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import PageLayout, Status
from nearkv_hw.number import Wide, quantize_q, score_scale

from . import pages
from .card import Card, CardError, open_card
from .flash import PageId
from .partial import Partial
from .store import KvStore

_JOB = pages.record_dtype(abi.JOB)
_ENTRY = pages.record_dtype(abi.PAGE_ENTRY)
_HEADER = pages.record_dtype(abi.PARTIAL_HEADER)


@dataclass
class Figures:
    """What has been done so far. Seconds are wall-clock time of the host."""

    runs: int = 0
    jobs: int = 0
    pages: int = 0  # loaded from flash
    kv_bytes: int = 0  # the same in bytes
    load_s: float = 0.0
    run_s: float = 0.0
    # (query row, token) pairs attended: by the card, by the host beside it, by the host in prefill
    card_tokens: int = 0
    host_tokens: int = 0
    prefill_tokens: int = 0
    cycles: int = 0  # of the card, where it counts them


class _Work(NamedTuple):
    """Jobs over one span of pages of one kv head: slices `first_slice` .. of its query rows."""

    sequence: int  # position in the call
    kv_head: int
    first_page: int
    n_pages: int
    first_slice: int
    n_slices: int


@dataclass
class PageAttention:
    """Attends to the pages of one store with one card.

    Parameters
    ----------
    card : Card
    store : KvStore

    Raises
    ------
    ValueError
        If the card cannot handle the store's heads or hold one of its pages.
    """

    card: Card
    store: KvStore
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self):
        layout, card = self.store.layout, self.card
        check_card(card, layout)
        tiles = -(-layout.page_tokens // layout.tile_tokens)
        self._span_pages = min(abi.MAX_TILES // tiles, card.kv_bytes // layout.page_bytes)

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
            If a page cannot be read.
        CardError
            If the card reports anything but success, naming job, page and cause.
        """
        layout, card = self.store.layout, self.card
        n_sequences, n_heads, n_rows, head_dim = q.shape
        stored = [self.store.stored(sequence, layer) for sequence in sequences]
        if n_pages is not None:
            stored = [entries[:, :n] for entries, n in zip(stored, n_pages, strict=True)]
        n_slices = max(1, -(-n_rows // card.rows))
        width = -(-n_rows // n_slices)
        q = _pad_rows(q, n_slices * width).reshape(n_sequences, n_heads, n_slices, width, head_dim)
        shape = (n_sequences, n_heads, n_slices)
        mantissa, shift = score_scale(scale, layout.kv_type)
        job = np.zeros((), _JOB)
        job["group_size"], job["kv_type"], job["head_dim"] = width, layout.kv_type, head_dim
        job["page_tokens"] = layout.page_tokens
        job["score_mantissa"], job["score_shift"] = mantissa, shift

        total = Partial.empty(layout.kv_type, (math.prod(shape), width), head_dim)
        records = _q_records(q)
        counts = [entries.shape[1] for entries in stored]
        for batch in self._batches(counts, shape, width):
            where = np.concatenate(
                [
                    np.ravel_multi_index((work.sequence, work.kv_head, work.first_slice), shape)
                    + np.arange(work.n_slices)
                    for work in batch
                ]
            )
            part = self._run(layer, sequences, batch, stored, records[where], job)
            if len(where) == len(total.run_max) and max(counts) <= self._span_pages:
                total = part[np.argsort(where)]  # one batch answers everything
            else:
                total[where] = total[where] + part
        for entries in stored:
            if entries.shape[1]:
                tokens = int(entries["page_len"][0].sum())
                self.figures.card_tokens += tokens * n_heads * n_rows
        return total.reshape(n_sequences, n_heads, n_slices * width)[:, :, :n_rows]

    def _batches(self, counts, shape, width) -> Iterator[list[_Work]]:
        """Cut the work into runs that fit the card's memories.

        No run holds two spans of the same pages' rows, so its partials have distinct places.
        """
        layout, card = self.store.layout, self.card
        _, n_heads, n_slices = shape
        page_bytes = layout.page_bytes
        slice_bytes = abi.JOB.bytes + layout.head_dim * abi.Q_RECORD.bytes
        slice_bytes += abi.partial_bytes(layout.head_dim, width)
        span = min(self._span_pages, max(counts, default=0))
        table_bytes = _beats(span * abi.PAGE_ENTRY.bytes)
        most_slices = (card.job_bytes - abi.SUMMARY.bytes - table_bytes) // slice_bytes
        if most_slices < 1:
            raise ValueError(
                f"job_bytes must hold a job of {table_bytes + slice_bytes + abi.SUMMARY.bytes} "
                f"bytes, not {card.job_bytes}"
            )
        for first in range(0, max(counts, default=0), self._span_pages):
            batch, kv_used, job_used = [], 0, abi.SUMMARY.bytes
            for sequence, count in enumerate(counts):
                taken = min(self._span_pages, count - first)
                if taken <= 0:
                    continue
                for kv_head in range(n_heads):
                    for at in range(0, n_slices, most_slices):
                        slices = min(most_slices, n_slices - at)
                        kv_need = taken * page_bytes
                        job_need = slices * slice_bytes + _beats(taken * abi.PAGE_ENTRY.bytes)
                        full = kv_used + kv_need > card.kv_bytes
                        if batch and (full or job_used + job_need > card.job_bytes):
                            yield batch
                            batch, kv_used, job_used = [], 0, abi.SUMMARY.bytes
                        batch.append(_Work(sequence, kv_head, first, taken, at, slices))
                        kv_used, job_used = kv_used + kv_need, job_used + job_need
            if batch:
                yield batch

    def _run(self, layer, sequences, batch, stored, q_records, template) -> Partial:
        """Load the pages of a batch, run its jobs, return their partials: (n_jobs, width)."""
        layout, card = self.store.layout, self.card
        head_dim, width = layout.head_dim, int(template["group_size"])
        n_jobs = len(q_records)
        jobs = np.repeat(template, n_jobs)
        jobs["tag"] = np.arange(n_jobs)
        queue = abi.SUMMARY.bytes
        at = queue + n_jobs * abi.JOB.bytes
        tables, reads = [], []
        kv_used = job = n_pages = 0
        for work in batch:
            entries = stored[work.sequence][work.kv_head][work.first_page :][: work.n_pages]
            table = np.zeros(_beats(work.n_pages * _ENTRY.itemsize) // _ENTRY.itemsize, _ENTRY)
            mine = table[: work.n_pages]
            mine["address"] = kv_used + np.arange(work.n_pages) * layout.page_bytes
            for name in ("page_len", "crc_k", "crc_v"):
                mine[name] = entries[name]
            tables.append(table)
            page = PageId(layer, sequences[work.sequence], work.kv_head, work.first_page)
            reads += self.store.reads(page, work.n_pages, kv_used)
            kv_used += work.n_pages * layout.page_bytes
            n_pages += work.n_pages
            those = jobs[job : job + work.n_slices]
            those["page_table"], those["n_pages"] = at, work.n_pages
            at += table.nbytes
            job += work.n_slices
        q_bytes = head_dim * abi.Q_RECORD.bytes
        jobs["q"] = at + np.arange(n_jobs) * q_bytes
        at += n_jobs * q_bytes
        partial_bytes = abi.partial_bytes(head_dim, width)
        partials, size = at, n_jobs * partial_bytes
        jobs["partial"] = partials + np.arange(n_jobs) * partial_bytes

        start = time.perf_counter()
        card.load(reads)
        loaded = time.perf_counter()
        # One copy; the zeros at its end clear every status word.
        image = [part.tobytes() for part in (jobs, *tables, q_records)]
        card.write_job(queue, b"".join([*image, bytes(size)]))
        counters = card.run(queue, n_jobs, 0)
        data = card.read_job(partials, size).reshape(n_jobs, partial_bytes)
        figures = self.figures
        figures.load_s += loaded - start
        figures.run_s += time.perf_counter() - loaded
        figures.runs += 1
        figures.jobs += n_jobs
        figures.pages += n_pages
        figures.kv_bytes += kv_used
        figures.cycles += counters["cycles"]
        header = data[:, : _HEADER.itemsize].view(_HEADER)[:, 0]
        self._check(layer, sequences, batch, header, counters)

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

    def _check(self, layer, sequences, batch, header, counters) -> None:
        """Raise CardError for the first partial that is not good."""
        good = (header["status"] == Status.DONE) & (header["tag"] == np.arange(len(header)))
        if good.all():
            return
        job = int(np.argmin(good))
        work = batch[int(np.searchsorted(np.cumsum([w.n_slices for w in batch]), job, "right"))]
        status, bad_page = Status(int(header["status"][job])), int(header["bad_page"][job])
        page = PageId(layer, sequences[work.sequence], work.kv_head, work.first_page)
        where = f"layer {page.layer}, sequence {page.sequence}, kv head {page.kv_head}"
        if status & Status.DONE and bad_page < work.n_pages:
            page = page._replace(page=work.first_page + bad_page)
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
    q, k, v, card: Card | str = "model", scale=None, kv_dtype=None, page_tokens=128, directory=None
):
    """Decode attention of one token over a context, through real pages in a temporary store.

    Parameters
    ----------
    q : (n_q_heads, head_dim)
        Query head h belongs to kv head h // (n_q_heads // n_kv_heads).
    k, v : (kv_len, n_kv_heads, head_dim)
        numpy or torch, like q; any real dtype. Stored as `kv_dtype`.
    card : Card or str
        Or the name of one, opened for this call.
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
    if isinstance(card, str):
        with open_card(card) as opened:
            return attend(q, k, v, opened, scale, kv_dtype, page_tokens, directory)
    layout = PageLayout(head_dim, page_tokens, pages.parse_kv_type(kv_dtype))
    check_card(card, layout)
    scale = head_dim**-0.5 if scale is None else scale
    directory = tempfile.gettempdir() if directory is None else directory
    heads_first = (1, 0, 2)
    k, v = (x.permute(heads_first) if pages.is_torch(x) else np.transpose(x, heads_first)
            for x in (k, v))  # fmt: skip
    rows = to_numpy(q).reshape(1, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    with KvStore(directory, layout, n_kv_heads, temporary=True) as store:
        store.append(0, 0, k, v, ragged=True)
        partial = PageAttention(card, store).attend(0, [0], rows, scale)
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
