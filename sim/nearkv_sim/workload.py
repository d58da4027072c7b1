# SPDX-License-Identifier: Apache-2.0
"""Card memories filled with jobs: what tests and benches feed to every card alike.

Unlike the host's own job builder it scatters everything: pages lie in random slots, in any order,
records in random places, and every byte between them is a sentinel.
"""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.config import Config
from nearkv_hw.number import (
    KV_FORMATS,
    Q_EXPONENT_MAX,
    Q_EXPONENT_MIN,
    SCALE_BITS,
    SCORE_SHIFT_MAX,
    WEIGHT_BITS,
    WEIGHT_MAX,
    KvFormat,
    quantize_q,
    score_scale,
)

T = TypeVar("T")

# Fields of the summary that count cycles, and so are the simulated hardware's alone.
TIMING_FIELDS = ("cycles", "stream_cycles", "starved_cycles", "stalled_cycles")


@dataclass
class Job:
    """One job in terms of its numbers.

    Attributes
    ----------
    q : float (group_size, head_dim)
    k, v : uint16 (n_tokens, head_dim)
        Patterns of `kv_type`.
    tail : int
        Pattern of the elements of the last page that belong to no token. NaN by default: they must
        not matter.
    page_lens : list of int, optional
        Valid tokens of each page, instead of full pages and one ragged one.
    fields : dict
        Job fields to overwrite, for illegal jobs and for scales that no softmax has.
    query : bytes, optional
        The query block, instead of what `quantize_q` makes of q.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_type: KvType = KvType.FP16
    page_tokens: int = 128
    scale: float | None = None
    tag: int = 0
    tail: int = 0x7FFF
    page_lens: list[int] | None = None
    fields: dict = field(default_factory=dict)
    query: bytes | None = None

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.q.shape[1], self.page_tokens, self.kv_type)

    def packed(self) -> tuple[np.ndarray, list[int]]:
        """uint8 (n_pages, page_bytes) and the valid tokens of each page."""
        layout, n_tokens = self.layout, len(self.k)
        lens = self.page_lens
        if lens is None:
            full, rest = divmod(n_tokens, layout.page_tokens)
            lens = [layout.page_tokens] * full + [rest] * (rest > 0 or full == 0)
        shape = (len(lens), layout.page_tokens, layout.head_dim)
        k, v = np.full(shape, self.tail, np.uint16), np.full(shape, self.tail, np.uint16)
        first = 0
        for n, page_len in enumerate(lens):
            k[n, :page_len] = self.k[first : first + page_len]
            v[n, :page_len] = self.v[first : first + page_len]
            first += page_len
        out = np.empty((1, len(lens), layout.page_bytes), np.uint8)
        flat = (1, shape[0] * shape[1], shape[2])
        pages.pack(layout, k.reshape(flat), v.reshape(flat), out)
        return out[0], lens


@dataclass
class Memories:
    """The two memories of a card, with a queue in them.

    Attributes
    ----------
    kv, job : uint8 (n,)
    queue, n_jobs, summary : int
        Arguments of a run.
    page_addresses : list of list of int
        kv-memory offsets of each job's pages.
    """

    kv: np.ndarray
    job: np.ndarray
    queue: int
    n_jobs: int
    summary: int
    page_addresses: list[list[int]]

    def execute(self, card, timeout_s: float | None = None) -> np.ndarray:
        """Run the queue on a card, on a copy; the job memory it leaves behind."""
        job = self.job.copy()
        card.execute(self.kv, job, self.queue, self.n_jobs, self.summary, timeout_s)
        return job

    def repeated(self, times: int) -> "Memories":
        """The same jobs over and over in one queue: a run that takes that much longer."""
        end = self.queue + self.n_jobs * abi.JOB.bytes
        jobs = np.tile(self.job[self.queue : end], times)
        at = -(-len(self.job) // abi.BEAT_BYTES) * abi.BEAT_BYTES
        job = np.concatenate([self.job, np.zeros(at - len(self.job), np.uint8), jobs])
        return replace(
            self, job=job, queue=at, n_jobs=self.n_jobs * times,
            page_addresses=self.page_addresses * times,
        )  # fmt: skip

    def record(self, i: int) -> dict:
        """Fields of job i."""
        return abi.JOB.unpack(self.job[self.queue + i * abi.JOB.bytes :])

    def set_record(self, i: int, **values) -> None:
        """Overwrite fields of job i."""
        self._put(self.queue + i * abi.JOB.bytes, abi.JOB.pack(**{**self.record(i), **values}))

    def entry(self, i: int, page: int) -> dict:
        """Fields of a page table entry of job i."""
        at = self.record(i)["page_table"] + page * abi.PAGE_ENTRY.bytes
        return abi.PAGE_ENTRY.unpack(self.job[at:])

    def set_entry(self, i: int, page: int, **values) -> None:
        """Overwrite fields of a page table entry of job i."""
        at = self.record(i)["page_table"] + page * abi.PAGE_ENTRY.bytes
        self._put(at, abi.PAGE_ENTRY.pack(**{**self.entry(i, page), **values}))

    def partial(self, job: np.ndarray, i: int) -> dict:
        """Header of job i's partial in a job memory that `execute` returned."""
        return abi.PARTIAL_HEADER.unpack(job[self.record(i)["partial"] :])

    def summary_of(self, job: np.ndarray) -> dict:
        """Fields of the summary in a job memory that `execute` returned."""
        return abi.SUMMARY.unpack(job[self.summary :])

    def untimed(self, job: np.ndarray) -> np.ndarray:
        """A copy of a job memory without the fields of the summary that count cycles."""
        job = job.copy()
        for name in TIMING_FIELDS:
            summary_field = abi.SUMMARY[name]
            at = self.summary + summary_field.offset
            job[at : at + summary_field.bits // 8] = 0
        return job

    def _put(self, offset: int, data: bytes) -> None:
        self.job[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def place(jobs: list[Job], rng: np.random.Generator) -> Memories:
    """Lay jobs out in memories, everything at random places.

    What belongs to no record holds sentinels, so that a write beside a partial shows.
    """
    packed = [job.packed() for job in jobs]
    # kv memory: slots of the largest page, a third of them unused.
    slot = max(job.layout.page_bytes for job in jobs)
    n_pages = sum(len(lens) for _, lens in packed)
    slots = rng.permutation(n_pages + n_pages // 2 + 1)
    kv = np.full((len(slots), slot), 0xFF, np.uint8)
    entries, page_addresses = [], []
    used = 0
    for job, (data, lens) in zip(jobs, packed, strict=True):
        table, addresses = b"", []
        for page, page_len in zip(data, lens, strict=True):
            at = int(slots[used])
            used += 1
            kv[at, : page.nbytes] = page
            crc_k, crc_v = pages.checksums(job.layout, page, page_len)
            addresses.append(at * slot)
            table += abi.PAGE_ENTRY.pack(
                address=at * slot, page_len=page_len, crc_k=crc_k, crc_v=crc_v
            )
        entries.append(table)
        page_addresses.append(addresses)

    # job memory: records in random order with gaps of a few beats.
    queue_bytes = len(jobs) * abi.JOB.bytes
    pieces = {("queue", 0): queue_bytes, ("summary", 0): abi.SUMMARY.bytes}
    for i, job in enumerate(jobs):
        group_size, head_dim = job.q.shape
        pieces["page_table", i] = len(entries[i])
        pieces["q", i] = head_dim * abi.Q_RECORD.bytes
        pieces["partial", i] = abi.partial_bytes(head_dim, group_size)
    names = list(pieces)
    offsets, at = {}, 0
    for n in rng.permutation(len(names)):
        at += abi.BEAT_BYTES * int(rng.integers(1, 5))
        offsets[names[n]] = at
        at += -(-pieces[names[n]] // abi.BEAT_BYTES) * abi.BEAT_BYTES
    memory = rng.integers(1, 256, at + 4 * abi.BEAT_BYTES, dtype=np.uint8)
    result = Memories(
        kv.reshape(-1), memory, offsets["queue", 0], len(jobs), offsets["summary", 0],
        page_addresses,
    )  # fmt: skip
    for i, job in enumerate(jobs):
        group_size, head_dim = job.q.shape
        scale = head_dim**-0.5 if job.scale is None else job.scale
        mantissa, shift = score_scale(scale, job.kv_type)
        values = {
            "page_table": offsets["page_table", i], "n_pages": len(packed[i][1]),
            "q": offsets["q", i], "partial": offsets["partial", i], "group_size": group_size,
            "kv_type": job.kv_type, "head_dim": head_dim, "page_tokens": job.page_tokens,
            "score_mantissa": mantissa, "score_shift": shift, "tag": job.tag,
        }  # fmt: skip
        record = abi.JOB.pack(**{**values, **job.fields})
        result._put(result.queue + i * abi.JOB.bytes, record)
        result._put(offsets["page_table", i], entries[i])
        result._put(offsets["q", i], query_block(job.q) if job.query is None else job.query)
        result._put(offsets["partial", i], bytes(4))  # the host clears the status
    return result


def query_block(q: np.ndarray) -> bytes:
    """The query block of a group: q is (group_size, head_dim), real and finite."""
    return query_records(*quantize_q(q))


def query_records(weight: np.ndarray, exponent: np.ndarray) -> bytes:
    """The query block of weights int (rows, head_dim) and exponents int (head_dim,)."""
    words = np.zeros((weight.shape[1], abi.Q_RECORD.bytes // 4), "<i4")
    words[:, : len(weight)] = weight.T
    words[:, -1] = exponent
    return words.tobytes()


KINDS = ("normal", "outliers", "equal", "rising", "tiny", "mixed", "saturating", "sinks")


def random_job(
    rng: np.random.Generator,
    config: Config,
    *,
    kind: str = "normal",
    n_tokens: int | None = None,
    head_dim: int | None = None,
    group_size: int | None = None,
    kv_type: KvType | None = None,
    page_tokens: int | None = None,
    max_tokens: int = 2000,
) -> Job:
    """A job with numbers of a kind; what is not given is drawn.

    Parameters
    ----------
    kind : str
        normal: N(0, 1). outliers: one element of K and V in 500 a thousandfold. saturating: of q as
        well, so that most scores leave the range. equal: every score the same.
        rising: each token scores higher than all before it. tiny: subnormal numbers. mixed: scales
        over 12 binades, channel by channel and token by token. sinks: a token in ten lies up to 90
        binades above the others for some of the heads, and its V is nothing, small, or large.
    """

    def draw(value, choices):
        return _one_of(rng, *choices) if value is None else value

    head_dim = draw(head_dim, [d for d in (64, 128) if d <= config.max_head_dim])
    group_size = draw(group_size, range(1, config.rows + 1))
    kv_type = draw(kv_type, list(KvType))
    page_tokens = draw(page_tokens, [32, 64, 96, 128, 128, 128, 256, 1024])
    if n_tokens is None:
        n_tokens = int(rng.integers(1, max_tokens + 1))
    q = rng.standard_normal((group_size, head_dim))
    k, v = rng.standard_normal((2, n_tokens, head_dim))
    if kind in ("outliers", "saturating"):
        for x in (k, v) if kind == "outliers" else (q, k, v):
            x[rng.random(x.shape) < 0.002] *= 1000
    elif kind == "equal":
        k[:] = k[:1]
    elif kind == "rising":
        k = np.abs(q[:1]) * np.linspace(0, 4, n_tokens)[:, None] / head_dim**0.5
        q = np.abs(q)
    elif kind == "tiny":
        k, v = k * 2.0**-22, v * 2.0**-22
    elif kind == "mixed":
        k *= 2.0 ** rng.integers(-8, 4, (1, head_dim))
        v *= 2.0 ** rng.integers(-8, 4, (n_tokens, 1))
        q *= 2.0 ** rng.integers(-8, 2, (1, head_dim))
    elif kind == "sinks":
        sinks = np.flatnonzero(rng.random(n_tokens) < 0.1)
        k[sinks, :8] = 0
        k[sinks, rng.integers(0, 8, len(sinks))] = rng.integers(-4, 16, len(sinks))
        q[:, :8] = rng.integers(0, 5, (group_size, 8)) * (head_dim / 128) ** 0.5 * 11
        q[:, 4:8] /= 8
        v[sinks] *= rng.choice((0, 2.0**-20, 2.0**-10, 2.0**10), (len(sinks), 1))
    k, v = (pages.to_patterns(np.clip(x, -60000, 60000), kv_type) for x in (k, v))
    # NaN, -Inf, or the largest finite number
    form = KV_FORMATS[kv_type]
    infinity = form.exponent_max << form.mantissa_bits
    tail = (0x7FFF, 0x8000 | infinity, infinity - 1)[int(rng.integers(3))]
    return Job(q, k, v, kv_type, page_tokens, tag=int(rng.integers(1 << 32)), tail=tail)


def extreme_job(
    rng: np.random.Generator,
    config: Config,
    *,
    kv_type: KvType | None = None,
    head_dim: int | None = None,
    max_tokens: int = 160,
) -> Job:
    """A legal job at the ends of every range, in random combinations.

    K and V: subnormal numbers, the largest finite ones, zeros, Inf and NaN now and then, in blocks,
    rows and lanes of their own. Query exponents and weights from least to largest; scales that put
    the scores in range, far below it and far beyond; ragged and empty pages.

    Parameters
    ----------
    kv_type, head_dim : optional
        What is not given is drawn.
    max_tokens : int
        At most so many; usually fewer.
    """
    if kv_type is None:
        kv_type = _one_of(rng, *KvType)
    if head_dim is None:
        head_dim = _one_of(
            rng, *(d for d in (32, 64, 96, config.max_head_dim) if d <= config.max_head_dim)
        )
    group_size = int(rng.integers(1, config.rows + 1))
    page_tokens = _one_of(rng, 32, 64, 96, 128, 256)
    left, page_lens = int(rng.integers(max_tokens + 1)), []
    while left or not page_lens:
        page_len = _one_of(rng, 0, 1, 31, 33, page_tokens - 1, page_tokens, page_tokens)
        page_lens.append(min(left, page_len, page_tokens))
        left -= page_lens[-1]
    form = KV_FORMATS[kv_type]
    finite = form.exponent_max - 1
    largest = int(_one_of(rng, finite, finite, finite - 1, rng.integers(1, finite + 1), 1, 0))
    k, v = (_extreme_patterns(rng, form, (sum(page_lens), head_dim), largest) for _ in range(2))

    middle = _one_of(rng, Q_EXPONENT_MIN, Q_EXPONENT_MAX, 0, rng.integers(-40, 40))
    spread = _one_of(rng, 0, 12, 15, 25, 300, 2000)
    exponents = middle + rng.integers(-spread, spread + 1, head_dim)
    exponents = exponents.clip(Q_EXPONENT_MIN, Q_EXPONENT_MAX)
    weights = rng.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, (group_size, head_dim))
    weights >>= _one_of(rng, 0, 0, WEIGHT_BITS - 3)
    picked = rng.random(weights.shape) < _one_of(rng, 0, 0.1, 1)
    weights = np.where(picked, _one_of(rng, 0, 1, WEIGHT_MAX, -WEIGHT_MAX), weights)
    # What little is left of small channels shows where large ones have no weight.
    if rng.random() < 0.5:
        weights[:, exponents > rng.integers(exponents.min(), exponents.max() + 1)] = 0

    least, most = 1 << (SCALE_BITS - 1), (1 << SCALE_BITS) - 1
    # A block's scores are in range for a shift of about 30 above its exponent.
    near = int(exponents.max()) + largest + int(rng.integers(-2, SCORE_SHIFT_MAX + 3))
    fields = {
        "score_mantissa": _one_of(rng, least, most, int(rng.integers(least, most + 1))),
        "score_shift": _one_of(rng, -(1 << 15), (1 << 15) - 1, *[near] * 8),
    }
    infinity = form.exponent_max << form.mantissa_bits
    tail = _one_of(rng, 0, 1, 0x7FFF, 0xFFFF, infinity, infinity - 1, 0x8000 | (infinity - 1))
    return Job(
        np.zeros((group_size, head_dim)), k, v, kv_type, page_tokens,
        tag=int(rng.integers(1 << 32)), tail=tail, page_lens=page_lens, fields=fields,
        query=query_records(weights, exponents),
    )  # fmt: skip


def walk_limits(
    config: Config, *, skip: tuple[str, ...] = ()
) -> tuple[Memories, list[str], list[Status]]:
    """A queue that steps over every limit of a job and of a page table entry, one at a time.

    The values of a field are those at its limits and at its steps, and beside them; everything else
    is legal. Pages are empty or zeros; queries are zeros.

    Parameters
    ----------
    config : Config
        The build, which sets some of the limits.
    skip : tuple of str
        Names of limits to leave out.

    Returns
    -------
    memories : Memories
    names : list of str
        Of each job: what is walked there, and its value.
    want : list of Status
        Of each job's partial, by `abi.JOB_LIMITS` and `abi.PAGE_ENTRY_LIMITS`.
    """
    build = {"rows": config.rows, "max_head_dim": config.max_head_dim}
    # One query block and one table of empty pages for all jobs, with a beat to spare.
    table = (abi.MAX_HEAD_DIM + 1) * abi.Q_RECORD.bytes
    base = {
        "page_table": table, "n_pages": 1, "q": 0, "group_size": 1, "kv_type": KvType.FP16,
        "head_dim": abi.BLOCK_TOKENS, "page_tokens": abi.BLOCK_TOKENS,
        "score_mantissa": 1 << (SCALE_BITS - 1), "score_shift": 0,
    }  # fmt: skip
    most_pages = abi.MAX_TILES // abi.n_tiles(1, abi.MAX_PAGE_TOKENS)
    fields = [
        {"page_tokens": abi.MAX_PAGE_TOKENS, "n_pages": n} for n in (most_pages, most_pages + 1)
    ]
    for limit in abi.JOB_LIMITS:
        if limit.name not in ("n_tiles", *skip):
            bits = abi.JOB[limit.name].bits
            fields += [{limit.name: value} for value in _beside(limit, bits, build)]
    entries = [
        {"address": 0, "page_len": 1, limit.name: value}
        for limit in abi.PAGE_ENTRY_LIMITS
        for value in _beside(limit, abi.PAGE_ENTRY[limit.name].bits, base)
    ]

    # Then, for each job, a table of one page and a partial; the summary; the queue.
    at = table + abi.MAX_TILES * abi.PAGE_ENTRY.bytes + abi.BEAT_BYTES
    stride = 2 * abi.BEAT_BYTES + abi.partial_bytes(config.max_head_dim, config.rows)
    n_jobs = len(fields) + len(entries)
    summary = at + n_jobs * stride
    queue = summary + abi.SUMMARY.bytes
    layout = PageLayout(base["head_dim"], abi.MAX_PAGE_TOKENS)
    memories = Memories(
        np.zeros(layout.page_bytes, np.uint8),
        np.zeros(queue + n_jobs * abi.JOB.bytes, np.uint8),
        queue, n_jobs, summary, [[0]] * n_jobs,
    )  # fmt: skip
    layout = PageLayout(base["head_dim"], base["page_tokens"])
    page = memories.kv[: layout.page_bytes]
    want = []
    for i in range(n_jobs):
        own = at + i * stride
        record = {**base, "partial": own + abi.BEAT_BYTES, "tag": i}
        if i < len(fields):
            for name, value in fields[i].items():
                offset = name in ("q", "page_table", "partial")
                record[name] = record[name] + value if offset else value
            broken = abi.broken_job_limit(record, **build)
        else:
            entry = entries[i - len(fields)]
            record["page_table"] = own
            page_len = min(entry["page_len"], layout.page_tokens)
            crc_k, crc_v = pages.checksums(layout, page, page_len)
            memories._put(own, abi.PAGE_ENTRY.pack(**entry, crc_k=crc_k, crc_v=crc_v))
            broken = abi.broken_page_entry_limit(entry, page_tokens=base["page_tokens"])
        memories._put(queue + i * abi.JOB.bytes, abi.JOB.pack(**record))
        want.append(Status.DONE | (Status.ILLEGAL_JOB if broken else Status(0)))
    return memories, [str(walked) for walked in (*fields, *entries)], want


def _beside(limit: abi.Limit, bits: int, given: dict[str, int]) -> list[int]:
    """Values at and beside the ends and steps of a limit that fit a field."""
    most, step = limit.largest(given), limit.step
    if most is None:  # of offsets; no memory is as large as the field
        return [0, 1, step // 2, step - 1, step]
    edges = {0, limit.least, most, limit.coarse or 0, (1 << bits) - 1}
    steps = {1, step, limit.coarse or 1}
    values = {edge + sign * n for edge in edges for n in steps for sign in (-1, 0, 1)}
    return sorted(value for value in values if 0 <= value < 1 << bits)


def _extreme_patterns(
    rng: np.random.Generator, form: KvFormat, shape: tuple[int, int], largest: int
) -> np.ndarray:
    """K or V of an extreme job: uint16 (n_tokens, head_dim), exponent fields up to `largest`."""
    spread = _one_of(rng, 0, 2, form.align_bits + form.sig_bits + 3, form.exponent_max)
    exponent = np.maximum(largest - rng.integers(0, spread + 1, shape), 0)
    # Whole tokens and channels that are small, or zero, beside large ones.
    for of_axis in ((shape[0], 1), (1, shape[1])):
        small = rng.random(of_axis) < _one_of(rng, 0, 0.2, 0.95)
        limit = np.minimum(exponent, _one_of(rng, 0, 1, largest // 2))
        exponent = np.where(small, limit, exponent)
    mantissa = rng.integers(0, 1 << form.mantissa_bits, shape)
    picked = rng.random(shape) < 0.3
    mantissa[picked] = _one_of(rng, 0, 1, (1 << form.mantissa_bits) - 1)
    if exponent.size and rng.random() < 0.1:
        exponent[tuple(rng.integers(shape))] = form.exponent_max
    x = exponent << form.mantissa_bits | mantissa | rng.integers(0, 2, shape) << 15
    x[rng.random(shape) < _one_of(rng, 0, 0, 0.9, 1)] = _one_of(rng, 0, 0x8000)
    return x.astype(np.uint16)


def _one_of(rng: np.random.Generator, *choices: T) -> T:
    return choices[int(rng.integers(len(choices)))]
