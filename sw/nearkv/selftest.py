# SPDX-License-Identifier: Apache-2.0
"""`nearkv selftest`: everything that a card must do, measured and *target* side by side.

Users and laboratories run the same command, on any card that `nearkv.open_card` opens, and through
nothing but the interface of `nearkv.cards.Card`: pages reach kv memory from a file, past the page cache,
and queues run as decoding runs them. What comes back in job memory is compared byte for byte with the
bit-exact model (`nearkv_sim.model`), which computes the same queue on the same bytes.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import contextlib
from dataclasses import asdict, dataclass
import datetime
import functools
import itertools
import json
import os
from pathlib import Path
import statistics
import tempfile
import textwrap
import time
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi, pages
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.config import PRESETS, Config

from . import doctor
from .arguments import existing_directory, whole
from .cards import DEFAULT_CARD, Card, CardError, engines_of, open_card
from .io import FlashError, KvMemory, PageId, Read
from .io.files import Directory, File

PASS, FAIL, BELOW, SKIPPED = "pass", "FAIL", "below", "skipped"
LOAD_GOAL = 0.95  # of what a plain reader gets out of the drive
CYCLES_SLACK = 0.05  # over the cycles that the model predicts, whose memory is never busy elsewhere
_PATTERN_TOKENS = 128
_BLOCK = 4 << 20  # of a file that is written
_ROUNDS = 5
_LATE = 2  # checks that may end with a time-out before the rest is left out
_LENGTHS = 3  # of contexts, for each head_dim and group


@dataclass
class Check:
    """A row of the table.

    Attributes
    ----------
    name : str
    result : "pass", "FAIL", "below" or "skipped"
        below: right, and slower than the target.
    measured, target : str
        Never mixed: what this run has found, and what it should be.
    note : str
        Of a row that has not passed: what happened, and what to do.
    seconds : float
    engine : str
        Name of the engine, of a card that has several; "" of the card as a whole.
    """

    name: str
    result: str
    measured: str = ""
    target: str = ""
    note: str = ""
    seconds: float = 0.0
    engine: str = ""


class _Found(NamedTuple):
    """What a check has found. Without a goal for speed it must be equal to the target.

    Attributes
    ----------
    measured, target : str
    reached : bool or None
        Whether a goal for speed is reached; None where there is no such goal.
    """

    measured: str
    target: str
    reached: bool | None = None


class _Wrong(Exception):
    """The card has done something else than the model."""


class _Skip(Exception):
    """It does not apply to this card."""


class Selftest:
    """Runs all checks on a card, or on one of its engines.

    Parameters
    ----------
    card : Card
    directory : Path
        Where the file goes from which kv memory is filled.
    say : callable
        Is told of every check when it has ended.
    engine : str
        For `Check.engine`.

    Attributes
    ----------
    checks : list of Check
    """

    def __init__(
        self,
        card: Card,
        directory: Path,
        say: Callable[[Check], None] = lambda check: None,
        engine: str = "",
    ):
        self.card, self.directory, self.say, self.engine = card, directory, say, engine
        self.checks: list[Check] = []
        self._unusable, self._late = "", 0

    def run(self) -> list[Check]:
        """All checks, one after the other. None of them raises: what goes wrong is a row that failed."""
        for name, check in self._all():
            self._run(name, check)
        return self.checks

    def _all(self) -> Iterable[tuple[str, Callable[[], _Found]]]:
        yield "job memory", self._job_memory
        yield "kv memory", self._kv_memory
        for kv_type in KvType:
            yield f"every shape, {kv_type.name.lower()}", functools.partial(self._shapes, kv_type)
        yield "extreme numbers", self._extremes
        yield "Inf and NaN", self._non_finite
        yield "CRC-32C", self._damage
        yield "illegal jobs", self._illegal_jobs
        yield "a queue out of line", self._queue_out_of_line
        yield "attend", self._attend
        yield "after a reset", self._reset
        yield "beats counted", self._beats
        yield "cycles", self._cycles
        yield "the drive", self._drive
        yield "drive to kv memory", self._loading
        yield "card", self._speed
        # Last: hardware that is built wrongly may hang here.
        yield "pages out of reach", self._out_of_reach

    def _run(self, name: str, check: Callable[[], _Found]) -> None:
        begin = time.perf_counter()
        row = Check(name, SKIPPED, note=self._unusable)
        if not self._unusable:
            try:
                found = check()
                row = Check(name, PASS, found.measured, found.target)
                if found.reached is False:
                    row.result, row.note = (
                        BELOW,
                        "what it does is right, and slower than the target",
                    )
                elif found.reached is None and found.measured != found.target:
                    row.result, row.note = FAIL, "card and model agree, but that is not the target"
            except _Skip as error:
                row.note = str(error)
            except _Wrong as error:
                row = Check(name, FAIL, note=str(error))
            except Exception as error:  # whatever it is, it is told and not shown as a stack trace
                row = Check(name, FAIL, note=f"{_text(error)}{_ATTACH}")
                self._recover(error)
        row.seconds, row.engine = time.perf_counter() - begin, self.engine
        self.checks.append(row)
        self.say(row)

    def _recover(self, error: Exception) -> None:
        """After an error: a card that cannot be used any more is reset, or the rest is left out."""
        self._late += isinstance(error.__cause__, TimeoutError)
        if self._late >= _LATE:  # a check each would take as long again
            self._unusable = f"left out, as the card has not answered in time {_LATE} times"
            return
        try:
            self.card.check_usable()
        except CardError:
            try:
                self.card.reset()
            except Exception as another:
                self._unusable = f"the card could not be reset after an error: {_text(another)}"

    # --- how a queue runs on the card ---------------------------------------------------------------

    @functools.cached_property
    def _config(self) -> Config:
        identity = self.card.executor.config_hash
        for config in PRESETS.values():
            if config.hash32 == identity:
                return config
        raise _Wrong(f"the card is of a build that is not known here (config_hash {identity:#x})")

    @functools.cached_property
    def _model(self):
        from nearkv_sim.model import ModelCard

        return ModelCard(self._config)

    def _fill(self, kv: np.ndarray) -> None:
        """Bring bytes into kv memory, from its start, by way of a file."""
        with _file_of(self.directory, kv) as file:
            self.card.load([_read_all(file, kv.nbytes)])

    def _execute(self, memories) -> np.ndarray:
        """Run a queue on the card; the job memory that it leaves behind."""
        if memories.kv.nbytes > self.card.kv_bytes or memories.job.nbytes > self.card.job_bytes:
            raise _Skip(
                f"needs {memories.kv.nbytes >> 10} KiB of kv memory and {memories.job.nbytes >> 10} KiB of "
                f"job memory; the card was opened with {self.card.kv_bytes >> 10} and "
                f"{self.card.job_bytes >> 10}"
            )
        self._fill(memories.kv)
        self.card.write_job(0, memories.job)
        self.card.run(memories.queue, memories.n_jobs, memories.summary)
        return self.card.read_job(0, memories.job.nbytes)

    def _compare(self, memories, names: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Run a queue on card and model, and see that both leave the same bytes; these bytes."""
        want = memories.execute(self._model)
        got = self._execute(memories)
        ours, theirs = memories.untimed(got), memories.untimed(want)
        if not np.array_equal(ours, theirs):
            raise _Wrong(_difference(memories, ours, theirs, names))
        return got, want

    # --- memories -----------------------------------------------------------------------------------

    def _job_memory(self) -> _Found:
        nbytes = self.card.job_bytes
        random = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
        for pattern in (random, ~random):
            self.card.write_job(0, pattern)
            got = self.card.read_job(0, nbytes)
            if not np.array_equal(got, pattern):
                at = int(np.flatnonzero(got != pattern)[0])
                raise _Wrong(
                    f"{int((got != pattern).sum())} bytes of {nbytes} differ, the first at {at:#x}: "
                    f"{got[at]:#04x} instead of {pattern[at]:#04x}"
                )
        return _Found(_size(nbytes), _size(nbytes))

    def _kv_memory(self) -> _Found:
        """Every byte, twice, each bit as 0 and as 1: the card's own CRC tells, which the host cannot see."""
        layout = PageLayout(min(abi.MAX_HEAD_DIM, self.card.max_head_dim), _PATTERN_TOKENS)
        count = self.card.kv_bytes // layout.page_bytes
        # Finite numbers, and their complement: no exponent has all bits set. It has bits 10 to 14.
        words = count * layout.page_bytes // 2
        random = np.random.default_rng(2).integers(0, 1 << 16, words, dtype=np.uint16)
        low = random & 0xBFFF | 0x0400
        for pattern in (low, ~low):
            kv = pattern.view(np.uint8)
            self._compare(_over_pages(layout, kv))
        tested = _size(count * layout.page_bytes)  # what is left holds no page
        return _Found(tested, tested)

    # --- numbers and shapes -------------------------------------------------------------------------

    def _shapes(self, kv_type: KvType) -> _Found:
        from nearkv_sim import workload

        rng = np.random.default_rng(3 + kv_type)
        # Of different periods, so that every length meets every kind of page and of numbers.
        lengths = itertools.cycle((1, 31, 32, 33, 127, 128, 129, 257, 300))
        page_tokens, kinds = (
            itertools.cycle((32, 64, 96, 128, 256)),
            itertools.cycle(workload.KINDS),
        )
        total = 0
        for head_dim in range(abi.BLOCK_TOKENS, self.card.max_head_dim + 1, abi.BLOCK_TOKENS):
            jobs, names = [], []
            for group_size in range(1, self.card.rows + 1):
                for _ in range(_LENGTHS):
                    shape = {"head_dim": head_dim, "group_size": group_size,
                             "n_tokens": next(lengths), "page_tokens": next(page_tokens)}  # fmt: skip
                    jobs.append(
                        workload.random_job(
                            rng, self._config, kind=next(kinds), kv_type=kv_type, **shape
                        )
                    )
                    names.append(", ".join(f"{name} {value}" for name, value in shape.items()))
            self._compare(workload.place(jobs, rng), names)
            total += len(jobs)
        return _Found(f"{total} jobs", f"{total} jobs")

    def _extremes(self) -> _Found:
        from nearkv_sim import workload

        rng = np.random.default_rng(5)
        jobs = [workload.extreme_job(rng, self._config) for _ in range(48)]
        self._compare(workload.place(jobs, rng))
        return _Found(f"{len(jobs)} jobs", f"{len(jobs)} jobs")

    def _non_finite(self) -> _Found:
        from nearkv_sim import workload

        rng = np.random.default_rng(6)
        jobs = []
        for kv_type, infinity in ((KvType.FP16, 0x7C00), (KvType.BF16, 0x7F80)):
            for pattern in (infinity, 0x7FFF, 0xFFFF):
                job = workload.random_job(rng, self._config, n_tokens=200, kv_type=kv_type)
                for x in (job.k, job.v):
                    x[int(rng.integers(len(x))), int(rng.integers(x.shape[1]))] = pattern
                jobs.append(job)
        memories = workload.place(jobs, rng)
        got, _ = self._compare(memories)
        return _flagged(memories, got, Status.NON_FINITE, len(jobs))

    # --- what goes wrong ----------------------------------------------------------------------------

    def _damage(self) -> _Found:
        """One bit of K, of V and of both, in pages anywhere."""
        from nearkv_sim import workload

        rng = np.random.default_rng(7)
        jobs = [workload.random_job(rng, self._config, max_tokens=400) for _ in range(24)]
        memories = workload.place(jobs, rng)
        for i, job in enumerate(jobs):
            page = int(rng.integers(len(memories.page_addresses[i])))
            address, entry = memories.page_addresses[i][page], memories.entry(i, page)
            spans = (job.layout.k_spans(entry["page_len"]), job.layout.v_spans(entry["page_len"]))
            for part in ((0,), (1,), (0, 1))[i % 3]:
                offset, nbytes = spans[part][int(rng.integers(len(spans[part])))]
                at = address + offset + int(rng.integers(nbytes))
                memories.kv[at] ^= np.uint8(1 << int(rng.integers(8)))
        got, _ = self._compare(memories)
        return _flagged(memories, got, Status.BAD_CRC_K | Status.BAD_CRC_V, len(jobs))

    def _illegal_jobs(self) -> _Found:
        from nearkv_sim import workload

        memories, names, want = workload.walk_limits(self._config, skip=("partial",))
        got, _ = self._compare(memories, names)
        for i, status in enumerate(want):
            found = Status(memories.partial(got, i)["status"])
            if found != status:
                raise _Wrong(f"{names[i]}: {found.describe()}, not {status.describe()}")
        n_illegal = sum(bool(status & Status.ILLEGAL_JOB) for status in want)
        return _flagged(memories, got, Status.ILLEGAL_JOB, n_illegal)

    def _queue_out_of_line(self) -> _Found:
        from nearkv_sim import workload

        rng = np.random.default_rng(8)
        memories = workload.place([workload.random_job(rng, self._config, n_tokens=64)], rng)
        self._fill(memories.kv)
        self.card.write_job(0, memories.job)
        try:
            self.card.run(memories.queue + 8, 1, memories.summary)
        except CardError as error:
            if error.counters is None or error.counters["error"] != Status.BUS_ERROR:
                raise
            self._compare(memories)  # it goes on
            return _Found("refused", "refused")
        raise _Wrong("a queue that is no multiple of 64 was run")

    def _out_of_reach(self) -> _Found:
        """Pages that no memory of this size has: the bus says so, and the jobs after them go on."""
        from nearkv_sim import workload

        rng = np.random.default_rng(9)
        jobs = [workload.random_job(rng, self._config, n_tokens=n) for n in (100, 100, 300, 100)]
        memories = workload.place(jobs, rng)
        beyond = (0, 2)
        for i in beyond:
            memories.set_entry(i, 0, address=1 << 44)
        got, want = self._execute(memories), memories.execute(self._model)
        for i, job in enumerate(jobs):
            ours, theirs = (memories.partial(it, i) for it in (got, want))
            at, head_dim = memories.record(i)["partial"], job.q.shape[1]
            span = slice(at, at + abi.partial_bytes(head_dim, len(job.q)))
            if i in beyond:  # what comes in place of the bytes may set other flags too: abi.Status
                same = ours["status"] & theirs["status"] == theirs["status"]
                same = same and ours["bad_page"] == theirs["bad_page"]
            else:
                same = np.array_equal(got[span], want[span])
            if not same:
                raise _Wrong(f"job {i} of {len(jobs)}: {ours} instead of {theirs}")
        return _flagged(memories, got, Status.BUS_ERROR, len(beyond))

    def _reset(self) -> _Found:
        from nearkv_sim import workload

        self.card.reset()
        rng = np.random.default_rng(10)
        memories = workload.place([workload.random_job(rng, self._config, n_tokens=200)], rng)
        self._compare(memories)
        return _Found("the same", "the same")

    def _attend(self) -> _Found:
        """Through the page store, with the host's own scheduling."""
        self._attend_with([self.card])
        return _Found("the same", "the same")

    def _attend_with(self, cards: Sequence[Card]) -> None:
        from .attention import attend

        rng = np.random.default_rng(11)
        head_dim, n_heads = min(64, self.card.max_head_dim), max(2, len(cards))
        q = rng.standard_normal((n_heads * self.card.rows, head_dim), np.float32)
        k, v = rng.standard_normal((2, 1000, n_heads, head_dim), np.float32)
        found = attend(q, k, v, card=cards, directory=self.directory)
        with open_card("model", config=self._config) as model:
            want = attend(q, k, v, card=model, directory=self.directory)
        for name, ours, theirs in zip(("out", "lse_ln"), found, want, strict=True):
            if not np.array_equal(ours, theirs):
                raise _Wrong(
                    f"{int((ours != theirs).sum())} of {ours.size} elements of {name} differ"
                )

    # --- counters -----------------------------------------------------------------------------------

    @functools.cached_property
    def _counted(self):
        """Counters of a queue, those of the model, and what the cycle model predicts."""
        from nearkv_sim import perf, workload

        rng = np.random.default_rng(12)
        head_dim, groups = min(128, self.card.max_head_dim), (1, self.card.rows)
        jobs = [
            workload.random_job(rng, self._config, n_tokens=n_tokens, head_dim=head_dim,
                                group_size=group_size, page_tokens=128)
            for group_size in groups for n_tokens in (2048, 700)
        ]  # fmt: skip
        memories = workload.place(jobs, rng)
        got, want = self._compare(memories)
        shapes = [perf.JobShape(head_dim, len(job.q), len(job.k)) for job in jobs]
        predicted = perf.predict(self._config, shapes)
        return memories.summary_of(got), memories.summary_of(want), predicted

    def _beats(self) -> _Found:
        found, want, predicted = self._counted
        if found["kv_beats"] != predicted.kv_beats:
            raise _Wrong(f"{found['kv_beats']} beats, and the cycle model has {predicted.kv_beats}")
        return _Found(f"{found['kv_beats']:,}", f"{want['kv_beats']:,}")

    def _cycles(self) -> _Found:
        found, _, predicted = self._counted
        stream = found["stream_cycles"]
        if not found["cycles"]:
            raise _Skip("this card is a program that counts no cycles")
        busy = found["kv_beats"] + found["starved_cycles"] + found["stalled_cycles"]
        if busy != stream or stream > found["cycles"]:
            raise _Wrong(
                f"the counters contradict each other: {found['kv_beats']} beats, {found['starved_cycles']} "
                f"starved and {found['stalled_cycles']} stalled cycles in a stream of {stream}, of a run "
                f"of {found['cycles']}"
            )
        most = (1 + CYCLES_SLACK) * predicted.stream_cycles
        return _Found(
            f"{stream:,}", f"{predicted.stream_cycles:,} +{CYCLES_SLACK:.0%}", stream <= most
        )

    # --- speed --------------------------------------------------------------------------------------

    @functools.cached_property
    def _rates(self) -> tuple[float, float]:
        """Bytes/s of a plain reader and of loads, in turns."""
        from .bench import in_turns
        from .bench.flash import read_raw
        from .io import reader_kind

        nbytes = self.card.kv_bytes
        data = np.random.default_rng(13).integers(0, 256, nbytes, dtype=np.uint8)
        with _file_of(self.directory, data) as file:
            if not file.direct:
                raise _Skip(
                    f"{self.directory} has no O_DIRECT, so that memory would be measured; choose a "
                    "directory on a drive: --kv-dir"
                )
            path, read = Path(f"/proc/self/fd/{file.fd}"), _read_all(file, nbytes)

            def raw() -> float:
                return nbytes / read_raw([path], reader_kind().DEPTH, nbytes)

            def ours() -> float:
                begin = time.perf_counter()
                self.card.load([read])
                return nbytes / (time.perf_counter() - begin)

            rates = in_turns({"raw": raw, "ours": ours}, _ROUNDS)
        return statistics.median(rates["raw"]), statistics.median(rates["ours"])

    def _drive(self) -> _Found:
        return _Found(_rate(self._rates[0]), "", True)

    def _loading(self) -> _Found:
        raw, ours = self._rates
        return _Found(_rate(ours), _rate(LOAD_GOAL * raw), ours >= LOAD_GOAL * raw)

    def _speed(self) -> _Found:
        """K and V that the card attends to in a second."""
        return _speed([self])

    def prepare_long_run(self):
        """Write a queue that takes about a second; it, and the bytes of K and V it attends to."""
        from nearkv_sim import workload

        group_size = min(4, self.card.rows)
        rng = np.random.default_rng(14)
        head_dim = min(128, self.card.max_head_dim)
        jobs = [
            workload.random_job(rng, self._config, n_tokens=1024, head_dim=head_dim, page_tokens=128,
                                group_size=group_size, kv_type=KvType.FP16)
            for _ in range(4)
        ]  # fmt: skip
        memories = workload.place(jobs, rng)
        self._compare(memories)
        begin = time.perf_counter()
        self.card.run(memories.queue, memories.n_jobs, memories.summary)
        once = time.perf_counter() - begin
        nbytes = sum(4 * len(job.k) * head_dim for job in jobs)
        most = (self.card.job_bytes - memories.job.nbytes) // (len(jobs) * abi.JOB.bytes) - 1
        long = memories.repeated(max(1, min(most, int(1 / once))))
        self.card.write_job(0, long.job)
        return long, nbytes * long.n_jobs // len(jobs)


class _Together(Selftest):
    """What only all engines of a card together can show. Each of them has been tested alone."""

    def __init__(self, engines: Sequence[Selftest]):
        first = engines[0]
        super().__init__(first.card, first.directory, first.say)
        self.engines = engines
        self._unusable = next((it._unusable for it in engines if it._unusable), "")

    def _all(self) -> Iterable[tuple[str, Callable[[], _Found]]]:
        yield "attend, all engines", self._attend
        yield "card, all engines", lambda: _speed(self.engines)

    def _attend(self) -> _Found:
        cards = [it.card for it in self.engines]
        before = [card.tenancy.progress for card in cards]
        self._attend_with(cards)
        moved = sum(card.tenancy.progress > was for card, was in zip(cards, before, strict=True))
        return _Found(f"{moved} at work", f"{len(cards)} at work")

    def _recover(self, error: Exception) -> None:
        for it in self.engines:
            it._recover(error)
        self._unusable = next((it._unusable for it in self.engines if it._unusable), "")


def _speed(engines: Sequence[Selftest]) -> _Found:
    """K and V that engines attend to in a second, all at once, in runs of about a second."""
    from .bench.twin import GOALS

    goal = GOALS[4] * len(engines)
    prepared = [(it.card, *it.prepare_long_run()) for it in engines]
    begin = time.perf_counter()
    started = [(card, card.start_run(long.queue, long.n_jobs, long.summary))
               for card, long, _ in prepared]  # fmt: skip
    for card, run in started:
        card.finish_run(run)
    rate = sum(nbytes for *_, nbytes in prepared) / (time.perf_counter() - begin)
    return _Found(_rate(rate), _rate(goal), rate >= goal)


_ATTACH = "; please attach the file that --report FILE writes to an issue"


def _text(error: BaseException) -> str:
    """An error in one line, with its kind unless it is one that is meant for users."""
    text = " ".join(str(error).split())
    told = isinstance(error, CardError | FlashError | ValueError)
    return text if told and text else f"{type(error).__name__}: {text}"


def _flagged(memories, job: np.ndarray, flag: Status, target: int) -> _Found:
    """How many jobs have one of these flags."""
    found = sum(bool(memories.partial(job, i)["status"] & flag) for i in range(memories.n_jobs))
    return _Found(f"{found} of {memories.n_jobs}", f"{target} of {memories.n_jobs}")


def _difference(memories, got: np.ndarray, want: np.ndarray, names: list[str] | None) -> str:
    """Where two job memories differ, in words."""
    n_bytes = int((got != want).sum())
    for i in range(memories.n_jobs):
        record = memories.record(i)
        head_dim, group_size = record["head_dim"], record["group_size"]
        at = record["partial"]
        nbytes = abi.PARTIAL_HEADER.bytes
        if not abi.broken_job_limit(record, rows=abi.MAX_ROWS, max_head_dim=abi.MAX_HEAD_DIM):
            nbytes = abi.partial_bytes(head_dim, group_size)
        if np.array_equal(got[at : at + nbytes], want[at : at + nbytes]):
            continue
        ours, theirs = (memories.partial(job, i) for job in (got, want))
        what = names[i] if names else f"head_dim {head_dim}, group {group_size}"
        text = f"job {i} of {memories.n_jobs} ({what}) differs from the model"
        fields = [
            f"{name} is {ours[name]} instead of {theirs[name]}"
            for name in ("status", "bad_page", "tag", "n_tokens")
            if ours[name] != theirs[name]
        ]
        return f"{text}: {'; '.join(fields) or 'its sums'}; {n_bytes} bytes in all"
    if memories.summary_of(got) != memories.summary_of(want):
        ours, theirs = (memories.summary_of(job) for job in (got, want))
        odd = [name for name in ours if ours[name] != theirs[name]]
        return f"the summary differs in {', '.join(odd)}: {ours} instead of {theirs}"
    at = int(np.flatnonzero(got != want)[0])
    return (
        f"{n_bytes} bytes of job memory that belong to nothing were changed, the first at {at:#x}"
    )


def _over_pages(layout: PageLayout, kv: np.ndarray):
    """A queue over consecutive pages that fill kv memory."""
    from nearkv_hw.number import score_scale
    from nearkv_sim import workload

    count, most = kv.nbytes // layout.page_bytes, 512
    n_jobs = -(-count // most)
    query = workload.query_block(np.ones((1, layout.head_dim)))
    table = b""
    for at in range(0, kv.nbytes, layout.page_bytes):
        crc_k, crc_v = pages.checksums(layout, kv[at : at + layout.page_bytes], layout.page_tokens)
        table += abi.PAGE_ENTRY.pack(
            address=at, page_len=layout.page_tokens, crc_k=crc_k, crc_v=crc_v
        )
    stride = abi.partial_bytes(layout.head_dim, 1)
    at_table = len(query)
    at_partial = at_table + -(-len(table) // abi.BEAT_BYTES) * abi.BEAT_BYTES
    queue = at_partial + n_jobs * stride
    summary = queue + n_jobs * abi.JOB.bytes
    memories = workload.Memories(
        kv, np.zeros(summary + abi.SUMMARY.bytes, np.uint8), queue, n_jobs, summary, []
    )
    mantissa, shift = score_scale(2.0**-20, KvType.FP16)
    memories.job[: len(query)] = np.frombuffer(query, np.uint8)
    memories.job[at_table : at_table + len(table)] = np.frombuffer(table, np.uint8)
    for i in range(n_jobs):
        record = abi.JOB.pack(
            page_table=at_table + i * most * abi.PAGE_ENTRY.bytes, n_pages=min(most, count - i * most),
            q=0, partial=at_partial + i * stride, group_size=1, kv_type=KvType.FP16,
            head_dim=layout.head_dim, page_tokens=layout.page_tokens, score_mantissa=mantissa,
            score_shift=shift, tag=i,
        )  # fmt: skip
        memories.job[queue + i * len(record) :][: len(record)] = np.frombuffer(record, np.uint8)
    return memories


@contextlib.contextmanager
def _file_of(directory: Path, data: np.ndarray):
    """A file without a name that holds these bytes, filled up to whole pages; open past the page cache."""
    place = Directory(directory)
    file: File | None = None
    try:
        file = place.temporary("nearkv-selftest", direct=True)
        block = np.frombuffer(
            KvMemory(_BLOCK).target(0, _BLOCK), np.uint8
        )  # aligned, as O_DIRECT wants
        for at in range(0, data.nbytes, _BLOCK):
            part = data[at : at + _BLOCK]
            block[: len(part)] = part
            whole = -(-len(part) // abi.PAGE_ALIGN_BYTES) * abi.PAGE_ALIGN_BYTES
            file.write(at, block[:whole])
        file.sync()
        yield file
    finally:
        if file is not None:
            file.close()
        place.close()


def _read_all(file: File, nbytes: int) -> Read:
    nbytes = -(-nbytes // abi.PAGE_ALIGN_BYTES) * abi.PAGE_ALIGN_BYTES
    return Read(
        file.fd,
        file.path,
        0,
        nbytes,
        0,
        PageId(0, 0, 0, 0),
        abi.PAGE_ALIGN_BYTES,
        direct=file.direct,
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:g} MiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


# --- the command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", default=DEFAULT_CARD, help="default: %(default)s")
    parser.add_argument(
        "--card-config", metavar="NAME", help="the build of the card (default: as open_card)"
    )
    parser.add_argument(
        "--kv-mib", type=whole(), metavar="MIB",
        help="of kv memory to use and to test (default: as open_card)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-dir", type=existing_directory, metavar="DIRECTORY",
        help="where pages go; on a card's own drive to measure it (default: temporary files')",
    )  # fmt: skip
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write all that was found as JSON, to attach to an issue",
    )
    parser.add_argument("--json", action="store_true", help="print that instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run `nearkv selftest`; the exit status: 0 if nothing has failed.

    Raises
    ------
    ValueError
        If the report cannot be written where it is wanted, or pages where they are to go. Nothing was
        tested then.
    """
    directory = Path(arguments.kv_dir or tempfile.gettempdir())
    try:
        with _file_of(directory, np.zeros(1, np.uint8)):
            pass
    except FlashError as error:
        raise ValueError(
            f"pages cannot be written to {directory} ({os.strerror(error.errno) if error.errno else error}); choose a directory that "
            "you may write to: --kv-dir DIRECTORY"
        ) from error
    path = arguments.report
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise ValueError(
                f"--report {path}: {error.strerror}; give a file that can be written, in a directory "
                "that exists"
            ) from error
    columns, colour = doctor.terminal()
    quiet = arguments.json
    if not quiet:
        print(_head(arguments.card), flush=True)
    checks: list[Check] = []
    about: dict = {"name": arguments.card}

    def say(check: Check) -> None:
        if not quiet and check.engine != (checks[-1].engine if checks else ""):
            print(f"\n{f'engine {check.engine}' if check.engine else f'card {arguments.card}'}")
        checks.append(check)
        if not quiet:
            print(to_text(check, columns, colour), flush=True)

    passed = False
    try:
        test(arguments, about, say)
        passed = all(check.result != FAIL for check in checks)
    finally:  # after Ctrl-C as well: what was found until then
        report = _report(arguments, about, checks, passed) if path or quiet else None
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")
        if quiet:
            print(json.dumps(report, indent=1))
    if not quiet:
        print(_verdict(checks, path, colour))
    return 0 if passed else 1


def test(arguments: argparse.Namespace, about: dict, say: Callable[[Check], None]) -> None:
    """Open the card and run all checks. Does not raise."""
    options: dict = {"config": arguments.card_config} if arguments.card_config else {}
    if arguments.kv_mib:
        options["kv_bytes"] = arguments.kv_mib << 20
    begin = time.perf_counter()
    row = Check("open", PASS)
    card, engines = None, []
    try:
        card = open_card(arguments.card, **options)
        engines = engines_of(card)
        row.measured = f"{engines[0].rows} rows, d {engines[0].max_head_dim}"
        if len(engines) > 1:
            row.measured = f"{len(engines)} x {row.measured}"
        about["engines"] = [
            {
                "name": it.name, "rows": it.rows, "max_head_dim": it.max_head_dim, "kv_bytes": it.kv_bytes,
                "job_bytes": it.job_bytes, "config_hash": it.executor.config_hash,
            }
            for it in engines
        ]  # fmt: skip
    except Exception as error:
        row = Check("open", FAIL, note=_text(error))
    row.seconds = time.perf_counter() - begin
    say(row)
    if card is None:
        return
    try:
        directory, several = Path(arguments.kv_dir or tempfile.gettempdir()), len(engines) > 1
        tests = [Selftest(it, directory, say, it.name if several else "") for it in engines]
        for one in tests:
            one.run()
        if several:
            _Together(tests).run()
    finally:
        begin, row = time.perf_counter(), Check("close", PASS)
        try:
            card.close()
        except Exception as error:
            row = Check("close", FAIL, note=_text(error) + _ATTACH)
        row.seconds = time.perf_counter() - begin
        say(row)


def _report(arguments, about: dict, checks: list[Check], passed: bool) -> dict:
    from . import __version__

    try:
        directories = [arguments.kv_dir] if arguments.kv_dir else None
        found = doctor.examine(directories=directories).as_dict()
    except Exception as error:
        found = {"error": _text(error)}
    return {
        "nearkv": __version__,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "abi_version": abi.ABI_VERSION,
        "passed": passed,
        "card": about,
        "checks": [asdict(check) for check in checks],
        "doctor": found,
    }


_NAME, _RESULT, _VALUE = 21, 9, 18
_COLOUR = {PASS: "32", FAIL: "31", BELOW: "33", SKIPPED: "33"}


def _head(card: str) -> str:
    names = ("check", "result", "measured", "*target*", "time")
    return f"nearkv selftest of card {card}\n\n{_line(*names)}"


def _line(name: str, result: str, measured: str, target: str, seconds: str) -> str:
    return f"{name:{_NAME}} {result:{_RESULT}} {measured:{_VALUE}} {target:{_VALUE}} {seconds:>7}".rstrip()


def to_text(check: Check, columns: int, colour: bool) -> str:
    """A row, with its note below it."""
    line = _line(check.name, check.result, check.measured, check.target, f"{check.seconds:.1f} s")
    at = _NAME + 1
    mark = doctor.paint(check.result, _COLOUR[check.result], colour)
    lines = [line[:at] + mark + line[at + len(check.result) :]]
    if check.note:
        lines += textwrap.wrap(
            check.note, columns, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip
    return "\n".join(lines)


def _verdict(checks: list[Check], path: Path | None, colour: bool) -> str:
    count = {result: sum(it.result == result for it in checks) for result in _COLOUR}
    parts = [f"{count[result]} {result}" for result in _COLOUR if count[result]]
    text = f"{'FAILED' if count[FAIL] else 'PASSED'}: {', '.join(parts)}"
    text = "\n" + doctor.paint(text, _COLOUR[FAIL if count[FAIL] else PASS], colour)
    if path is not None:
        return f"{text}\nreport: {path}"
    if count[FAIL]:
        return f"{text}\nto tell of it, run it again with --report FILE and attach the file to an issue"
    return text
