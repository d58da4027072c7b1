# SPDX-License-Identifier: Apache-2.0
"""Card `model`: the whole accelerator in numpy, bit for bit.

It reads the same job memory and kv memory as the RTL and leaves the same bytes in job memory, the
performance counters of the summary excepted: the model knows no cycles. Built from the model of each
stage; whole jobs at a time where the hardware goes beat by beat, which changes no bit because every
sum is exact.
"""

from dataclasses import dataclass
import functools
import operator

import google_crc32c
import numpy as np

from nearkv_hw import abi, align, products, softmax
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.config import Config
from nearkv_hw.number import (
    N_LIMBS,
    Q_EXPONENT_BITS,
    RUN_MAX_EMPTY,
    SUM_SHIFT,
    WEIGHT_BITS,
    Wide,
)

from .lifetime import Lifetime

# Tiles computed at once: enough to hide numpy's call cost, few enough to stay in the cache.
_TILES_AT_ONCE = 16


@dataclass
class _Page:
    """A page table entry, with what the card finds out about the page."""

    layout: PageLayout
    data: np.ndarray  # uint8 (page_bytes,)
    page_len: int
    flags: Status = Status(0)


class ModelCard:
    """Executes job queues with numpy.

    Parameters
    ----------
    config : Config
        The build to imitate: it limits rows and head_dim and identifies itself in the summary.
    """

    def __init__(self, config: Config):
        self.config = config
        # Of each legal job of the last run: maxima of its tiles, int (tiles, rows).
        self.tile_maxima: list[np.ndarray] = []
        self._lifetime = Lifetime(free=lambda: None)

    def close(self) -> None:
        """From any thread: a run under way is stopped first, see `Lifetime`."""
        self._lifetime.close()

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s=None) -> None:
        """Run `n_jobs` jobs from offset `queue`; write partials and the summary into `job`.

        Parameters
        ----------
        kv, job : uint8 (n,)
            The card's two memories. `job` is written in place.
        queue, summary : int
            Offsets in job memory.
        timeout_s : float, optional
            Accepted for the sake of the interface; the model always ends.

        Raises
        ------
        ValueError
            If the card is closed.
        ClosedError
            If it was closed meanwhile.
        RuntimeError
            If it runs in another thread, or belongs to the parent process.
        """
        with self._lifetime:
            self._execute(kv, job, queue, n_jobs, summary)

    def _execute(self, kv, job, queue, n_jobs, summary) -> None:
        failed = kv_beats = partial_beats = kv_bursts = 0
        self.tile_maxima = []
        # A queue or a summary that is not aligned to beats: as the hardware takes it.
        error = Status.BUS_ERROR if queue % abi.BEAT_BYTES else Status(0)
        summary -= summary % abi.BEAT_BYTES
        n_jobs = 0 if error else n_jobs
        for i in range(n_jobs):
            record = abi.JOB.unpack(job[queue + i * abi.JOB.bytes :])
            run = _Job(self.config, kv, job, record, self._lifetime.check)
            status = run.execute()
            if run.tile_maxima:
                self.tile_maxima.append(np.concatenate(run.tile_maxima))
            failed += status != Status.DONE
            kv_beats += run.kv_beats
            kv_bursts += run.kv_bursts
            partial_beats += run.partial_beats
        packed = abi.SUMMARY.pack(
            abi_version=abi.ABI_VERSION, config_hash=self.config.hash32,
            n_jobs=n_jobs, n_failed=failed, cycles=0, kv_beats=kv_beats, stream_cycles=0,
            starved_cycles=0, stalled_cycles=0, kv_bursts=kv_bursts, partial_beats=partial_beats,
            error=error,
        )  # fmt: skip
        job[summary : summary + len(packed)] = np.frombuffer(packed, np.uint8)


class _Job:
    """One job on its way through the model."""

    def __init__(self, config, kv, job, record, check):
        self.config, self.kv, self.job, self.record = config, kv, job, record
        self.check = check  # raises if the run shall end
        self.kv_beats = self.kv_bursts = self.partial_beats = 0
        self.tile_maxima: list[np.ndarray] = []

    def execute(self) -> Status:
        record, config = self.record, self.config
        if abi.broken_job_limit(record, rows=config.rows, max_head_dim=config.max_head_dim):
            self._write_header(Status.DONE | Status.ILLEGAL_JOB, abi.NO_PAGE, 0, [])
            return Status.DONE | Status.ILLEGAL_JOB
        self.kv_type = KvType(record["kv_type"])
        self.layout = PageLayout(record["head_dim"], record["page_tokens"], self.kv_type)
        self.rows = abi.partial_rows(record["group_size"])
        self._load_q()
        pages = self._load_pages()
        flags = Status.DONE
        parts = []
        run_max = np.full(self.rows, RUN_MAX_EMPTY)
        # (page number, first token, tokens) of every tile of the job
        tiles = [
            (n, first, tokens)
            for n, page in enumerate(pages)
            for first, tokens in self.layout.tiles(page.page_len)
        ]
        for at in range(0, len(tiles), _TILES_AT_ONCE):
            self.check()
            part, tile_max, saturated = self._attend(pages, tiles[at : at + _TILES_AT_ONCE])
            parts.append(part)
            run_max = np.maximum(run_max, tile_max.max(axis=0))
            self.tile_maxima.append(tile_max)
            if saturated:
                flags |= Status.SATURATED
        bad_page = abi.NO_PAGE
        for n, page in reversed(list(enumerate(pages))):
            if page.flags:
                flags |= page.flags
                bad_page = n
        n_tokens = sum(page.page_len for page in pages)
        self._write_header(flags, bad_page, n_tokens, run_max)
        self._write_elements(functools.reduce(operator.add, parts))
        return flags

    def _load_q(self) -> None:
        start, head_dim = self.record["q"], self.record["head_dim"]
        words = self.job[start : start + head_dim * abi.Q_RECORD.bytes]
        words = words.view("<i4").reshape(head_dim, 16)
        # (rows, head_dim); any bits are taken as the hardware takes them
        self.weight = _low_bits(words[:, : self.rows], WEIGHT_BITS).T.astype(np.float64)
        self.exponent = _low_bits(words[:, 15], Q_EXPONENT_BITS)

    def _load_pages(self) -> list[_Page]:
        pages = []
        for n in range(self.record["n_pages"]):
            entry = abi.PAGE_ENTRY.unpack(
                self.job[self.record["page_table"] + n * abi.PAGE_ENTRY.bytes :]
            )
            address, page_len, flags = entry["address"], entry["page_len"], Status(0)
            if abi.broken_page_entry_limit(entry, page_tokens=self.layout.page_tokens):
                address, page_len, flags = 0, 0, Status.ILLEGAL_JOB
            data = self.kv[address : address + self.layout.page_bytes]
            if len(data) < self.layout.page_bytes:
                # What lies beyond the memory is answered with an error and no data.
                data = np.zeros(self.layout.page_bytes, np.uint8)
                page_len, flags = 0, flags | Status.BUS_ERROR
            page = _Page(self.layout, data, page_len, flags)
            self._account(address, page_len)
            if page_len:
                for part, spans, bad in (
                    ("crc_k", self.layout.k_spans(page_len), Status.BAD_CRC_K),
                    ("crc_v", self.layout.v_spans(page_len), Status.BAD_CRC_V),
                ):
                    crc = 0
                    for offset, size in spans:
                        crc = google_crc32c.extend(crc, data[offset : offset + size].tobytes())
                    if crc != entry[part]:
                        page.flags |= bad
            pages.append(page)
        return pages

    def _account(self, address: int, page_len: int) -> None:
        """Beats and bursts of reading one page: a burst ends at each 4096-byte boundary."""
        for offset, size in self.layout.k_spans(page_len) + self.layout.v_spans(page_len):
            first = (address + offset) // abi.BURST_BYTES
            last = (address + offset + size - 1) // abi.BURST_BYTES
            self.kv_beats += size // abi.BEAT_BYTES
            self.kv_bursts += last - first + 1

    def _attend(self, pages, tiles):
        """Wide sums (2 + head_dim, rows) of some tiles, their maxima, and any saturation."""
        layout, tile_tokens, head_dim = self.layout, self.layout.tile_tokens, self.layout.head_dim
        blocks, parts = tile_tokens // abi.BLOCK_TOKENS, head_dim // abi.BLOCK_TOKENS
        k = np.empty((len(tiles), blocks, head_dim, abi.BLOCK_TOKENS), np.uint16)
        v = np.empty((len(tiles), parts, tile_tokens, abi.BLOCK_TOKENS), np.uint16)
        for i, (n, first, _) in enumerate(tiles):
            words = pages[n].data.view("<u2")
            k_words, v_words = words[: len(words) // 2], words[len(words) // 2 :]
            at = first * head_dim
            k[i] = k_words[at : at + tile_tokens * head_dim].reshape(k.shape[1:])
            v_all = v_words.reshape(parts, layout.page_tokens, abi.BLOCK_TOKENS)
            v[i] = v_all[:, first : first + tile_tokens]
        tokens = np.array([count for _, _, count in tiles])
        valid = np.arange(tile_tokens) < tokens[:, None]  # (tiles, tile_tokens)

        valid_k = valid.reshape(len(tiles), blocks, 1, abi.BLOCK_TOKENS)
        field, bad_k = align.fields(k, self.kv_type, valid_k)
        exponent = align.block_exponent(field, self.exponent)
        x = align.model(k, self.kv_type, exponent[..., None] - self.exponent, valid_k)
        raw = (self.weight @ x.astype(np.float64)).astype(np.int64)  # (tiles, blocks, rows, 32)
        score, beyond = softmax.score_model(
            raw, self.record["score_mantissa"],
            (self.record["score_shift"] - exponent)[:, :, None, None],
        )  # fmt: skip
        saturated = (beyond & valid_k).any()
        score = score.swapaxes(1, 2).reshape(len(tiles), self.rows, tile_tokens)
        # A group of odd size has a row of padding, which attends to nothing.
        there = valid[:, None] & (np.arange(self.rows) < self.record["group_size"])[:, None]
        mantissa, halvings, tile_max, tile_sum, tile_wide = softmax.model(score, there)

        valid_v = valid[:, None, :, None]
        field, bad_v = align.fields(v, self.kv_type, valid_v & (v << 1 != 0))
        weight, exponent, base = products.model(mantissa[:, None], halvings[:, None], field)
        x = align.model(v, self.kv_type, base, valid_v)
        o = (weight.astype(np.float64) @ x.astype(np.float64)).astype(np.int64)
        # o: (tiles, parts, rows, 32) -> (tiles, head_dim, rows)
        place = tile_max[:, None, :] + exponent  # (tiles, parts, rows)
        place = np.broadcast_to(place[:, :, None], (*place.shape[:2], abi.BLOCK_TOKENS, self.rows))
        o = o.swapaxes(2, 3).reshape(len(tiles), head_dim, self.rows)
        sums = np.stack([tile_sum, tile_wide], axis=1) << SUM_SHIFT
        wide = Wide.of(
            np.concatenate([sums, o], axis=1),
            np.concatenate(
                [np.repeat(tile_max[:, None], 2, axis=1), place.reshape(o.shape)], axis=1
            ),
        )
        for i in np.flatnonzero(bad_k.any(axis=(1, 2)) | bad_v.any(axis=(1, 2))):
            pages[tiles[i][0]].flags |= Status.NON_FINITE
        return wide.sum(0), tile_max, saturated

    def _write_header(self, status, bad_page, n_tokens, run_max) -> None:
        maxima = np.full(16, RUN_MAX_EMPTY)
        maxima[: len(run_max)] = run_max
        header = abi.PARTIAL_HEADER.pack(
            status=status, bad_page=bad_page, tag=self.record["tag"], n_tokens=n_tokens,
            run_max=[int(m) for m in maxima],
        )  # fmt: skip
        start = self.record["partial"]
        self.job[start : start + len(header)] = np.frombuffer(header, np.uint8)
        self.partial_beats += 1

    def _write_elements(self, wide: Wide) -> None:
        data = wide.pack().reshape(-1).view(np.uint8)
        size = abi.partial_bytes(self.record["head_dim"], self.record["group_size"])
        padded = np.zeros(size - abi.PARTIAL_HEADER.bytes, np.uint8)
        padded[: len(data)] = data
        start = self.record["partial"] + abi.PARTIAL_HEADER.bytes
        self.job[start : start + len(padded)] = padded
        self.partial_beats += len(padded) // abi.BEAT_BYTES


def _low_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """The low bits of int32 values as signed numbers."""
    return values << (32 - bits) >> (32 - bits)


assert N_LIMBS * 4 == abi.WIDE_BYTES
