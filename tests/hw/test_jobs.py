# SPDX-License-Identifier: Apache-2.0
"""Jobs become tiles, query writes and job infos as the ABI says; illegal ones are refused."""

from dataclasses import dataclass, field
import itertools

import numpy as np
import pytest

from nearkv_hw import abi
from nearkv_hw.config import Config
from nearkv_hw.jobs import Q_BANKS, Faults, JobInfo, JobReader, Params, Tile, q_layout
from nearkv_sim import workload

ROWS, MAX_HEAD_DIM = 4, 96
KV_BASE, JOB_BASE = 0x3_FFFF_E000, 0x7_FFFF_EFC0
NO_FAULT = dict.fromkeys(("bad_crc", "illegal", "bus_error", "non_finite", "page", "page_known"), 0)


@dataclass
class Job:
    """A job as the host writes it. `pages`: (address, page_len) of each."""

    pages: list = field(default_factory=lambda: [(0x4000, 40)])
    group_size: int = 3
    kv_type: int = 1
    head_dim: int = 32
    page_tokens: int = 128
    mantissa: int = 0xB8AA3B
    shift: int = -77
    fields: dict = field(default_factory=dict)  # of the record, to overwrite
    legal: bool = True
    # Filled in when the job is placed.
    tag: int = 0
    offsets: dict = field(default_factory=dict)
    weights: np.ndarray | None = None
    crcs: list | None = None


class Queue:
    """Jobs laid out in job memory, back to back in pieces, and what the reader must make of them."""

    def __init__(self, rng, jobs):
        self.jobs, pieces, at = jobs, {}, 0x1C0
        for n, job in enumerate(jobs):
            for name, size in (
                ("page_table", len(job.pages) * 32), ("q", job.head_dim * 64), ("partial", 64),
            ):  # fmt: skip
                pieces[name, n] = at
                at += -(-size // 64) * 64
        self.queue = at
        at += 64 * len(jobs)
        self.memory = bytearray(rng.bytes(at + 64))
        for n, job in enumerate(jobs):
            job.tag = int(rng.integers(1 << 32))
            job.offsets = {name: pieces[name, n] for name in ("page_table", "q", "partial")}
            words = rng.integers(-(1 << 17) + 1, 1 << 17, (job.head_dim, 16)).astype("<i4")
            words[:, 15] = rng.integers(-512, 512, job.head_dim)
            job.weights = words
            self._put(job.offsets["q"], words.tobytes())
            job.crcs = [[int(x) for x in rng.integers(0, 1 << 32, 2)] for _ in job.pages]
            for i, (address, page_len) in enumerate(job.pages):
                entry = abi.PAGE_ENTRY.pack(
                    address=address, page_len=page_len, crc_k=job.crcs[i][0], crc_v=job.crcs[i][1]
                )
                self._put(job.offsets["page_table"] + 32 * i, entry)
            values = {
                "n_pages": len(job.pages), "group_size": job.group_size, "kv_type": job.kv_type,
                "head_dim": job.head_dim, "page_tokens": job.page_tokens,
                "score_mantissa": job.mantissa, "score_shift": job.shift, "tag": job.tag,
            }  # fmt: skip
            record = abi.JOB.pack(**{**job.offsets, **values, **job.fields})
            self._put(self.queue + 64 * n, record)

    def _put(self, at, data):
        self.memory[at : at + len(data)] = data

    def read(self, address):
        at = address - JOB_BASE
        assert 0 <= at <= len(self.memory) - 64, f"read of {address:#x}, outside of job memory"
        return bytes(self.memory[at : at + 64])

    def expected(self, lost=()):
        """(tiles, q writes, infos); `lost`: job-memory offsets of beats that cannot be read."""
        tiles, q_writes, infos, bank = [], [], [], 0
        for job in self.jobs:
            info = {
                "address": JOB_BASE + job.fields.get("partial", job.offsets["partial"]),
                "tag": job.tag, "tokens": 0, "legal": int(job.legal),
                "faults": {**NO_FAULT, "illegal": int(not job.legal)},
            }  # fmt: skip
            infos.append(info)
            if not job.legal:
                continue
            info |= {"pairs": (job.group_size + 1) // 2, "parts": job.head_dim // 32}
            faults = info["faults"]
            for channel, words in enumerate(job.weights):
                q_writes.append((bank, channel, *words[:ROWS], words[15]))
                if job.offsets["q"] + 64 * channel in lost:
                    faults["bus_error"] = 1
            tiles_of_job = []
            for page, (address, page_len) in enumerate(job.pages):
                beat = (job.offsets["page_table"] + 32 * page) // 64 * 64
                bad = None
                if beat in lost:
                    bad = "bus_error"
                elif address % 4096 or page_len > job.page_tokens:
                    bad = "illegal"
                if bad:
                    faults[bad] = 1
                    if not faults["page_known"]:
                        faults |= {"page": page, "page_known": 1}
                    address, page_len = 0, 0
                layout = abi.PageLayout(job.head_dim, job.page_tokens)
                info["tokens"] += page_len
                pieces = layout.tiles(page_len)
                for n, (first, tokens) in enumerate(pieces):
                    k_offset = first // 32 * job.head_dim * 64
                    tiles_of_job.append(
                        {
                            "params": {
                                "kv_type": job.kv_type, "parts": job.head_dim // 32,
                                "pairs": (job.group_size + 1) // 2, "odd": job.group_size % 2, "mantissa": job.mantissa,
                                "shift": job.shift,
                            },
                            "k_address": KV_BASE + address + k_offset,
                            "v_address": KV_BASE + address + layout.part_bytes + first * 64,
                            "v_stride": job.page_tokens, "tokens": tokens, "page": page,
                            "page_first": int(n == 0), "page_last": int(n == len(pieces) - 1),
                            "check": int(page_len > 0), "crc_k": job.crcs[page][0],
                            "crc_v": job.crcs[page][1], "job_first": 0, "job_last": 0,
                            "q_bank": bank,
                        }
                    )  # fmt: skip
            tiles_of_job[0]["job_first"] = tiles_of_job[-1]["job_last"] = 1
            tiles += tiles_of_job
            bank = (bank + 1) % Q_BANKS
        return tiles, q_writes, infos


def decoded(bench, shape, value):
    """A payload as nested dicts."""
    got = bench.fields(shape, value)

    def plain(view, layout):
        return {
            name: plain(view[name], part.shape.as_shape())
            if part.shape in (Params, Faults)
            else int(view[name])
            for name, part in layout
        }

    return plain(got, shape.as_shape())


class Run:
    """One simulation of the reader, over one or more queues in turn."""

    def __init__(self, bench, queue, pauses=None, *, n_jobs=None, error=None, free=None, limit=9000,
                 latency=7, runs=1, misalign=0, rows=ROWS, max_head_dim=MAX_HEAD_DIM):  # fmt: skip
        self.bench, self.dut = bench, JobReader(rows, max_head_dim)
        dut, pause = self.dut, pauses or (lambda side: None)
        self.run = run = bench(dut)
        lost = error or {}
        self.memory = run.read_memory(
            dut.ar, dut.r, queue.read, pause(0), pause(1), latency=latency,
            error=lambda address: lost.get(address - JOB_BASE, 0),
        )  # fmt: skip
        self.tiles, self.infos = run.sink(dut.o_tile, pause(2)), run.sink(dut.o_job, pause(3))
        q_payload = dut.o_q.p
        self.q = run.tap(dut.o_q.valid, q_payload.bank, q_payload.channel,
                         *(q_payload.weights[r] for r in range(rows)), q_payload.exponent)  # fmt: skip
        self.state = run.tap(1, dut.finished, dut.error, dut.n_jobs)
        args = {
            "kv": KV_BASE, "job": JOB_BASE, "queue": queue.queue + misalign, "summary": 0,
            "n_jobs": len(queue.jobs) if n_jobs is None else n_jobs,
        }  # fmt: skip
        done = []

        def control():
            yield [(dut.args.as_value(), bench.bits(dut.args.shape(), args)), (dut.start, 0)]
            for _ in range(runs):
                yield [(dut.start, 1)]
                yield [(dut.start, 0)]
                finished = 0
                while not finished:
                    (finished,) = yield []
                # Everything given is taken before the next run.
                for _ in range(40):
                    yield []
                done.append(run.cycle)
            while True:
                yield []

        def frees():
            # The array has read a bank for the last time some time after the job's last tile.
            seen, due = 0, []
            while True:
                yield [(dut.q_free, int(bool(due) and due[0] <= run.cycle and bool(due.pop(0))))]
                for value in self.tiles.items[seen:]:
                    if bench.fields(Tile, value).job_last:
                        due.append(run.cycle + 23)
                seen = len(self.tiles.items)

        run.script([dut.finished], control())
        run.script([], free(run, dut) if free else frees())
        run.run(lambda: len(done) == runs, limit=limit, extra=40)

    def check(self, queue, lost=(), repeat=1):
        tiles, q_writes, infos = (part * repeat for part in queue.expected(lost))
        bench = self.bench
        got = [decoded(bench, Tile, value) for value in self.tiles.items]
        assert got == tiles
        np.testing.assert_array_equal(np.array(self.q.items), np.array(q_writes))
        got = [decoded(bench, JobInfo, value) for value in self.infos.items]
        for info, want in zip(got, infos, strict=True):
            assert {name: info[name] for name in want} == want
        assert self.state.items[-1] == (1, 0, len(queue.jobs))


PAGES = (
    [(0x4000, 128)],
    [(0xFFFF_F000, 1), (0, 0)],
    [(0x1_0000_0000, 384), (0x2000, 300), (0xFEDC_BA98_7000, 129)],
    [(0, 0)],
    [(0x7000, 31), (0x7000, 0), (0x8000, 384), (0x9000, 0), (0xA000, 256)],
)


def test_jobs_become_tiles_query_writes_and_infos(bench, pauses, rng):
    """Pages of several tiles, ragged and empty ones, tables of odd and even length."""
    jobs = [
        Job(
            pages=pages, page_tokens=128 if len(pages) < 3 else 384, head_dim=32 * (n % 3 + 1),
            group_size=n % 4 + 1, kv_type=n % 2, shift=(-1) ** n * 1000 * n,
        )
        for n, pages in enumerate(PAGES)
    ]  # fmt: skip
    queue = Queue(rng, jobs)
    Run(bench, queue, pauses).check(queue)


@pytest.mark.parametrize("page_tokens", [32, 64, 96])
def test_short_pages_are_one_tile_each(bench, rng, page_tokens):
    pages = [(0x4000, page_tokens), (0x8000, page_tokens - 1), (0, 0), (0xC000, 1)]
    queue = Queue(rng, [Job(pages=pages, page_tokens=page_tokens, head_dim=96)])
    Run(bench, queue).check(queue)


LEGAL = {
    "one head": {"group_size": 1},
    "all rows": {"group_size": ROWS},
    "fp16": {"kv_type": 0},
    "bf16": {"kv_type": 1},
    "least head_dim": {"head_dim": 32},
    "largest head_dim": {"head_dim": MAX_HEAD_DIM},
    "longest page": {"page_tokens": 32768},
    "pages of 8 x 256 tiles": {"page_tokens": 32768, "pages": [(0, 0)] * 8},
    "least mantissa": {"mantissa": 1 << 23},
    "largest mantissa": {"mantissa": (1 << 24) - 1},
    "least shift": {"shift": -32768},
    "largest shift": {"shift": 32767},
}
ILLEGAL = {
    "no heads": {"group_size": 0},
    "too many heads": {"group_size": ROWS + 1},
    "far too many heads": {"group_size": 255},
    "unknown type": {"kv_type": 2},
    "type 255": {"kv_type": 255},
    "head_dim 0": {"head_dim": 0},
    "head_dim 33": {"head_dim": 33},
    "head_dim 16": {"head_dim": 16},
    "head_dim too large": {"head_dim": MAX_HEAD_DIM + 32},
    "head_dim 544 (32 modulo 512)": {"head_dim": 544},
    "head_dim 65535": {"head_dim": 65535},
    "page_tokens 0": {"page_tokens": 0},
    "page_tokens 16": {"page_tokens": 16},
    "page_tokens 100": {"page_tokens": 100},
    "page_tokens 160": {"page_tokens": 160},
    "page_tokens 129": {"page_tokens": 129},
    "page_tokens 32896": {"page_tokens": 32896},
    "page_tokens 65408": {"page_tokens": 65408},
    "no pages": {"n_pages": 0},
    "too many tiles": {"n_pages": 9, "page_tokens": 32768},
    "too many pages": {"n_pages": abi.MAX_TILES + 1},
    "too many short pages": {"n_pages": abi.MAX_TILES + 1, "page_tokens": 32},
    "4097 pages (1 modulo 4096)": {"n_pages": 4097},
    "far too many pages": {"n_pages": 0xFFFFFFFF},
    "mantissa 0": {"score_mantissa": 0},
    "mantissa of 23 bits": {"score_mantissa": (1 << 23) - 1},
    "mantissa of 25 bits": {"score_mantissa": 1 << 24},
    "mantissa of 32 bits": {"score_mantissa": 0xFFFFFFFF},
}


def test_legal_jobs_at_the_limits_are_accepted(bench, rng):
    queue = Queue(rng, [Job(**fields) for fields in LEGAL.values()])
    Run(bench, queue).check(queue)


@pytest.mark.slow
def test_the_longest_page_table_is_accepted(bench, rng):
    queue = Queue(rng, [Job(pages=[(0, 128)] * abi.MAX_TILES, head_dim=32)])
    run = Run(bench, queue, limit=30000)
    run.check(queue)
    assert len(run.tiles) == abi.MAX_TILES


def test_illegal_jobs_are_refused_and_the_next_one_runs(bench, pauses, rng):
    jobs = [Job(fields=fields, legal=False) for fields in ILLEGAL.values()]
    for at in range(len(jobs), 0, -4):
        jobs.insert(at, Job())
    queue = Queue(rng, jobs)
    Run(bench, queue, pauses, limit=30000).check(queue)


class Walk:
    """`workload.walk_limits` as a queue."""

    def __init__(self):
        config = Config(name="walk", rows=ROWS, max_head_dim=MAX_HEAD_DIM)
        self.memories, self.names, self.want = workload.walk_limits(config)
        self.queue, self.jobs = self.memories.queue, range(self.memories.n_jobs)

    def read(self, address):
        at = address - JOB_BASE
        assert 0 <= at <= len(self.memories.job) - 64
        return self.memories.job[at : at + 64].tobytes()


@pytest.mark.slow
def test_every_limit_of_the_abi_is_kept(bench):
    queue = Walk()
    run = Run(bench, queue, limit=100_000)
    infos = [bench.fields(JobInfo, value) for value in run.infos.items]
    for name, info, status in zip(queue.names, infos, queue.want, strict=True):
        assert info.faults.illegal == bool(status & abi.Status.ILLEGAL_JOB), name


def test_records_that_are_not_aligned_to_beats_are_refused(bench, rng):
    cases = [(name, bit) for name in ("page_table", "q", "partial") for bit in (0, 5)]
    jobs = Queue(rng, [Job() for _ in range(len(cases) + 1)]).jobs
    for job, (name, bit) in zip(jobs, cases, strict=False):
        job.legal, job.fields = False, {name: job.offsets[name] + (1 << bit)}
    queue = Queue(rng, jobs)  # at the same places
    Run(bench, queue).check(queue)


BAD_PAGES = (
    ([(64, 5), (0x1000, 5)], 0),
    ([(0x1000, 128), (0x1800, 5)], 1),
    ([(0x1000, 129), (0x2000, 5)], 0),
    ([(0x1000, 128), (0x2000, 7), (0x2000, 0xFFFFFFFF)], 2),
    ([(0x1000, 1), (0x2800, 300), (0x2000, 1 << 16), (1, 1)], 1),
)


def test_an_illegal_page_counts_as_empty_and_the_first_one_is_blamed(bench, pauses, rng):
    jobs = [job for pages, _ in BAD_PAGES for job in (Job(pages=pages), Job())]
    queue = Queue(rng, jobs)
    run = Run(bench, queue, pauses)
    run.check(queue)
    for (_, first), value in zip(BAD_PAGES, run.infos.items[::2], strict=True):
        faults = bench.fields(JobInfo, value).faults
        assert (faults.illegal, faults.page_known, faults.page) == (1, 1, first)


@pytest.mark.parametrize("response", [2, 3])
def test_a_bus_error_in_a_record_is_noted_in_its_job_alone(bench, rng, response):
    places = [("q", 0), ("q", 31), ("page_table", 0), ("page_table", 1)]
    pages = [(0x1000 * n, 100 + n) for n in range(3)]
    queue = Queue(rng, [job for _ in places for job in (Job(pages=pages), Job())])
    # What is in a lost entry is not looked at.
    queue.jobs[4].pages = [(64, 5), (0x1000, 999), (0x2000, 5)]
    queue.jobs[6].pages = [(0x1000, 5), (0x2000, 5), (1, 1 << 20)]
    queue = Queue(rng, queue.jobs)
    lost = {
        job.offsets[name] + 64 * beat: response
        for job, (name, beat) in zip(queue.jobs[::2], places, strict=True)
    }
    run = Run(bench, queue, error=lost)
    run.check(queue, lost)
    for n, value in enumerate(run.infos.items):
        assert bench.fields(JobInfo, value).faults.bus_error == (n % 2 == 0)


def test_an_exclusive_okay_is_no_error(bench, rng):
    queue = Queue(rng, [Job()])
    Run(bench, queue, error=dict.fromkeys(range(0, len(queue.memory), 64), 1)).check(queue)


def test_a_job_that_cannot_be_read_ends_the_run(bench, rng):
    queue = Queue(rng, [Job(), Job(), Job()])
    run = Run(bench, queue, error={queue.queue + 64: 2})
    assert run.state.items[-1] == (1, 1, 1)
    assert len(run.infos) == 1


def test_a_queue_that_is_not_aligned_is_not_read(bench, rng):
    queue = Queue(rng, [Job(), Job()])
    run = Run(bench, queue, misalign=32)
    assert run.state.items[-1] == (1, 1, 0)
    assert not run.memory.bursts
    assert not len(run.infos)


def test_no_jobs_finish_at_once(bench, rng):
    queue = Queue(rng, [Job()])
    run = Run(bench, queue, n_jobs=0)
    assert run.state.items[-1] == (1, 0, 0)
    assert not run.memory.bursts


def test_runs_follow_each_other_without_reset(bench, pauses, rng):
    queue = Queue(rng, [Job(), Job(fields={"kv_type": 9}, legal=False), Job(group_size=1)])
    Run(bench, queue, pauses, runs=3).check(queue, repeat=3)


def test_an_error_is_forgotten_in_the_next_run(bench, rng):
    queue = Queue(rng, [Job(), Job()])
    lost = {queue.queue: 2}
    run = Run(bench, queue, error=_Once(lost), runs=2)
    errors = [error for _, error, _ in run.state.items]
    assert 1 in errors
    assert run.state.items[-1] == (1, 0, 2)
    assert len(run.infos) == 2


class _Once(dict):
    """Each entry is found once."""

    def get(self, key, default=None):
        return self.pop(key, default)


def test_a_query_waits_for_a_free_bank(bench, rng):
    queue = Queue(rng, [Job(head_dim=32) for _ in range(Q_BANKS + 3)])
    frees = (900, 1500, 1501)

    def free(run, dut):
        while True:
            yield [(dut.q_free, int(run.cycle in frees))]

    run = Run(bench, queue, free=free)
    run.check(queue)
    begun = run.q.cycles[::32]
    assert begun[Q_BANKS - 1] < 900
    # The first bank to come free takes the next job's query, soon; the others likewise.
    assert 900 < begun[Q_BANKS] < 1000
    assert 1500 < begun[Q_BANKS + 1] < 1600
    assert begun[Q_BANKS + 1] < begun[Q_BANKS + 2] < 1800
    assert 1 << q_layout(ROWS)["bank"].width == Q_BANKS


def test_a_job_costs_one_latency_of_the_memory(bench, rng):
    """Query block and page table are asked for together, with the record of the next job."""
    queue = Queue(rng, [Job(head_dim=32) for _ in range(4)])
    latency = 150

    def free(run, dut):
        while True:
            yield [(dut.q_free, 0)]

    run = Run(bench, queue, free=free, latency=latency)
    run.check(queue)
    begun = run.q.cycles[::32]
    assert all(b - a < latency + 60 for a, b in itertools.pairwise(begun))
