# SPDX-License-Identifier: Apache-2.0
"""Exact bytes of one decode step of the nearkv engine, per link, out of the ABI alone.

What the model charges and what the engine counts is the same arithmetic: integers, no estimate. The
runtime and its tests call `decode_traffic` with the pages they hold; the closed form calls
`job_bytes` for the mean step.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from nearkv_hw import abi


@dataclass(frozen=True)
class Traffic:
    """Bytes (and counts) of a step; traffics add.

    n_jobs : jobs answered by cards
    n_pages : pages attended to
    n_launches : times a queue was started; each writes one summary
    flash_read_bytes : whole pages from flash into card slots
    kv_bytes : read on `m_axi_kv`; equals 64 x the summary's `kv_beats`
    job_bytes, entry_bytes, q_bytes : records the host writes into job memory; page tables in beats
    cleared_bytes : zeros the host writes where partials will be, so that no old status is believed
    partial_bytes : written on `m_axi_job`; equals 64 x the summary's `partial_beats`
    summary_bytes : one summary a launch
    flash_write_bytes : full pages spilled from host memory
    """

    n_jobs: int = 0
    n_pages: int = 0
    n_launches: int = 0
    flash_read_bytes: int = 0
    kv_bytes: int = 0
    job_bytes: int = 0
    entry_bytes: int = 0
    q_bytes: int = 0
    cleared_bytes: int = 0
    partial_bytes: int = 0
    summary_bytes: int = 0
    flash_write_bytes: int = 0

    @property
    def down_bytes(self) -> int:
        """Host to cards."""
        return self.job_bytes + self.entry_bytes + self.q_bytes + self.cleared_bytes

    @property
    def up_bytes(self) -> int:
        """Cards to host."""
        return self.partial_bytes + self.summary_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))


def pages_per_job(page_tokens: int) -> int:
    """Most pages of one job: a limb of the accumulator has room for `abi.MAX_TILES` tiles."""
    return abi.MAX_TILES * abi.TILE_TOKENS // max(page_tokens, abi.TILE_TOKENS)


def slices(group_size: int, rows: int) -> tuple[int, int]:
    """(jobs, query heads of each) that a group takes on an array of so many rows."""
    count = -(-group_size // rows)
    return count, -(-group_size // count)


def _table_bytes(n_pages):
    return -(-n_pages * abi.PAGE_ENTRY.bytes // abi.BEAT_BYTES) * abi.BEAT_BYTES


def head_traffic(
    layout: abi.PageLayout,
    page_lens: Iterable[int],
    group_size: int,
    rows: int = 8,
    job_pages: int | None = None,
) -> Traffic:
    """One KV head of one sequence and layer, attended by its group of query heads.

    Parameters
    ----------
    layout : abi.PageLayout
    page_lens : iterable of int
        Valid tokens of each page the card attends to.
    group_size : int
        Query heads that share the KV head. More than `rows` take several jobs over one page table;
        the pages are read from flash once, since they stay in their slots.
    rows : int
        Rows of the built array, `nearkv_hw.config.Config.rows`.
    job_pages : int, optional
        Most pages of a job, if the card's memory holds fewer than `pages_per_job`.
    """
    page_lens = list(page_lens)
    if not page_lens:
        return Traffic()
    limit = min(pages_per_job(layout.page_tokens), job_pages or len(page_lens))
    spans = [len(page_lens[at : at + limit]) for at in range(0, len(page_lens), limit)]
    count, width = slices(group_size, rows)
    n_jobs = len(spans) * count
    kv = sum(n for length in page_lens for _, n in layout.k_spans(length) + layout.v_spans(length))
    partial = n_jobs * abi.partial_bytes(layout.head_dim, width)
    return Traffic(
        n_jobs=n_jobs,
        n_pages=len(page_lens),
        flash_read_bytes=len(page_lens) * layout.page_bytes,
        kv_bytes=kv * count,
        job_bytes=n_jobs * abi.JOB.bytes,
        entry_bytes=sum(map(_table_bytes, spans)),
        q_bytes=n_jobs * layout.head_dim * abi.Q_RECORD.bytes,
        cleared_bytes=partial,
        partial_bytes=partial,
    )


def decode_traffic(
    layout: abi.PageLayout,
    stored_pages: Iterable[int],
    *,
    n_layers: int,
    n_q_heads: int,
    n_kv_heads: int,
    rows: int = 8,
    job_pages: int | None = None,
    n_launches: int = 0,
    spilled_pages: int = 0,
) -> Traffic:
    """One decode step over all layers, with every stored page full and attended by a card.

    Parameters
    ----------
    layout : abi.PageLayout
    stored_pages : iterable of int
        Full pages of each sequence (per layer and KV head).
    n_layers, n_q_heads, n_kv_heads : int
        Shape of the model.
    rows, job_pages : int
        As for `head_traffic`.
    n_launches : int
        Queues started in the step: one a layer and card if a layer's pages fit the card's memory.
    spilled_pages : int
        Pages written in this step, all layers, sequences and heads together.

    Returns
    -------
    Traffic
        Exact; `tests` compare it with the counters of a run.
    """
    total = Traffic(
        n_launches=n_launches,
        summary_bytes=n_launches * abi.SUMMARY.bytes,
        flash_write_bytes=spilled_pages * layout.page_bytes,
    )
    for pages in stored_pages:
        lens, group = [layout.page_tokens] * pages, n_q_heads // n_kv_heads
        head = head_traffic(layout, lens, group, rows, job_pages)
        heads = n_layers * n_kv_heads
        total += Traffic(*(heads * getattr(head, f.name) for f in fields(Traffic)))
    return total


def job_bytes(head_dim: int, group_size: int, page_tokens: int, context, rows: int = 8):
    """Host to card and card to host bytes of a KV head in the mean step; `context` may be an array.

    Returns
    -------
    (down, up, jobs)
        Bytes down, bytes up, jobs, per (sequence, layer, KV head). Fractional pages are allowed.
    """
    head_dim = -(-head_dim // abi.BLOCK_TOKENS) * abi.BLOCK_TOKENS
    count, width = slices(group_size, rows)
    pages = context / page_tokens
    spans = -(-pages // pages_per_job(page_tokens))
    jobs = spans * count
    up = jobs * abi.partial_bytes(head_dim, width)
    down = jobs * (abi.JOB.bytes + head_dim * abi.Q_RECORD.bytes) + _table_bytes(pages) + up
    return down, up, jobs
