# SPDX-License-Identifier: Apache-2.0
"""Cards: what loads pages from flash and runs jobs on them. `open_card` is the way to get one.

A card has two memories. *kv memory* receives pages straight from flash; on a real card it is a
peer-to-peer BAR, so the host neither reads nor writes it. *job memory* is a host buffer: jobs, page
tables, query blocks, partials and the summary (`nearkv_hw.abi`). Nothing above this module can tell
one card from another.
"""

from collections.abc import Callable, Sequence
import functools
import importlib
import logging
import os
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import Status

from ..io import JobMemory, KvMemory, LateError, Load, PageId, Read, open_reader

log = logging.getLogger("nearkv")

DEFAULT_CARD = "twin"
KV_BYTES = 64 << 20
JOB_BYTES = 16 << 20


class CardError(RuntimeError):
    """A card could not be opened, did not answer in time, or refused a job.

    Attributes
    ----------
    status : Status or None
        Of the partial that is not good.
    counters : dict or None
        Fields of the summary (`abi.SUMMARY`), if the run came to its end.
    page : PageId or None
        What the error is about, if it is about one sequence.
    filename : str or None
        Of that page.
    recoverable : bool
        Whether `Card.reset` is likely to help.
    """

    def __init__(
        self,
        message: str,
        *,
        status: Status | None = None,
        counters: dict | None = None,
        page: PageId | None = None,
        filename: str | None = None,
        recoverable: bool = False,
    ):
        super().__init__(message)
        self.status, self.counters = status, counters
        self.page, self.filename, self.recoverable = page, filename, recoverable


@runtime_checkable
class Card(Protocol):
    """What the host needs of a card. A context manager; `close` may be called twice."""

    name: str
    rows: int  # query heads of one job, at most
    max_head_dim: int
    kv_bytes: int  # size of kv memory
    job_bytes: int  # size of job memory

    def start_load(self, reads: list[Read]) -> Load:
        """Ask for pages to be brought from flash to kv memory. Returns at once.

        Raises ValueError if they would leave kv memory.
        """
        ...

    def finish_load(self, load: Load, timeout_s: float | None = None) -> None:
        """Wait until all have arrived.

        Raises FlashError if a file is short or the drive fails, CardError after `timeout_s`.
        """

    def write_job(self, offset: int, data) -> None:
        """Copy bytes into job memory."""
        ...

    def read_job(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of job memory: uint8 (nbytes,), a copy."""
        ...

    def run(
        self, queue: int, n_jobs: int, summary: int, timeout_s: float | None = None
    ) -> dict[str, int]:
        """Run the queue at job-memory offset `queue`; the fields of the summary.

        Raises CardError after `timeout_s`, if the queue could not be read, or if what answered is
        not the build that was opened. Jobs that failed are for the caller to find in their partials.
        """
        ...

    def reset(self) -> None:
        """Give up what is on its way and make the card usable again, after a time-out.

        What its memories held is lost. Raises CardError if that does not help.
        """
        ...

    def close(self) -> None:
        """Release the card and its memories."""

    def __enter__(self) -> "Card": ...

    def __exit__(self, *exception) -> None: ...


class MemoryCard:
    """A card without hardware: both memories are this process' own, and a backend runs the jobs.

    The memories start on a page boundary, so that O_DIRECT reads go straight into kv memory.

    Parameters
    ----------
    name : str
    backend
        Has `config` (`nearkv_hw.config.Config`), `close()` and `execute(kv, job, queue, n_jobs,
        summary, timeout_s)`, which does with the two uint8 arrays what the hardware would and raises
        TimeoutError if it takes too long.
    kv_bytes, job_bytes : int
    reads_in_flight : int, optional
        Requests that the drive has at once, of up to 1 MiB each. Default: the reader's.
    reader : "auto", "uring" or "threads"
        How they are made: `nearkv.flash.open_reader`.
    timeout_s : float
        For a load or a run that does not bring its own.
    reopen : callable, optional
        Makes another backend, for `reset` after a run that did not end well.
    """

    def __init__(
        self,
        name: str,
        backend,
        *,
        kv_bytes: int = KV_BYTES,
        job_bytes: int = JOB_BYTES,
        reads_in_flight: int | None = None,
        reader: str = "auto",
        timeout_s: float = 60.0,
        reopen: Callable[[], Any] | None = None,
    ):
        self.name, self._backend, self.timeout_s = name, backend, timeout_s
        self._reopen = reopen
        self.rows, self.max_head_dim = backend.config.rows, backend.config.max_head_dim
        self.kv_bytes, self.job_bytes = kv_bytes, job_bytes
        self._config_hash = backend.config.hash32
        self._job = JobMemory(job_bytes)
        self._depth, self._reader_kind = reads_in_flight, reader
        self._new_kv_memory()
        self._broken = ""

    def _new_kv_memory(self) -> None:
        self._kv = KvMemory(self.kv_bytes)
        self._kv_seen = self._kv.simulated()
        self._reader = open_reader(self._kv, self._depth, self._reader_kind)
        self._late: list[Load] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        if self._broken != "closed":
            self._broken = "closed"
            self._reader.close()
            self._backend.close()

    def reset(self) -> None:
        if self._broken == "closed":
            raise CardError(f"card {self.name!r} is closed; open it again")
        # Late reads may still write to the old memory, at any time; nobody looks at it any more.
        self._reader.close()
        self._new_kv_memory()
        if self._broken:
            if self._reopen is None:
                raise CardError(f"card {self.name!r} is {self._broken}")
            self._backend.close()
            try:
                self._backend = self._reopen()
            except RuntimeError as error:
                raise CardError(f"card {self.name!r} cannot be opened again: {error}") from error
            self._broken = ""

    def start_load(self, reads: list[Read]) -> Load:
        self._check_open()
        for read in reads:
            self._kv.check(read.kv_offset, read.nbytes)
        return self._reader.start(reads)

    def finish_load(self, load: Load, timeout_s: float | None = None) -> None:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            load.wait(timeout_s)
        except LateError as error:
            # The late reads may still write to kv memory, at any time.
            self._late.append(load)
            raise CardError(
                f"card {self.name!r}: {error}", page=error.page, filename=str(error.path),
                recoverable=True,
            ) from error  # fmt: skip

    def load(self, reads: list[Read], timeout_s: float | None = None) -> None:
        """`start_load` and `finish_load` in one."""
        self.finish_load(self.start_load(reads), timeout_s)

    def write_job(self, offset: int, data) -> None:
        self._check_open()
        data = np.frombuffer(data, np.uint8)
        self._job.check(offset, len(data))
        self._job.bytes[offset : offset + len(data)] = data

    def read_job(self, offset: int, nbytes: int) -> np.ndarray:
        self._check_open()
        self._job.check(offset, nbytes)
        return self._job.bytes[offset : offset + nbytes].copy()

    def run(
        self, queue: int, n_jobs: int, summary: int, timeout_s: float | None = None
    ) -> dict[str, int]:
        self._check_open()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self._job.check(queue, n_jobs * abi.JOB.bytes)
        self._job.check(summary, abi.SUMMARY.bytes)
        job = self._job.bytes
        job[summary : summary + abi.SUMMARY.bytes] = 0
        try:
            self._backend.execute(self._kv_seen, job, queue, n_jobs, summary, timeout_s)
        except TimeoutError as error:
            self._broken = "unusable after a run that timed out; reset it, or open it again"
            raise CardError(
                f"card {self.name!r}: {n_jobs} jobs did not end within {timeout_s:g} s: {error}",
                recoverable=True,
            ) from error
        except RuntimeError as error:
            self._broken = "unusable after a run that failed; reset it, or open it again"
            raise CardError(f"card {self.name!r}: {error}", recoverable=True) from error
        counters = abi.SUMMARY.unpack(job[summary : summary + abi.SUMMARY.bytes])
        check_summary(self.name, counters, n_jobs, self._config_hash)
        return counters

    def _check_open(self) -> None:
        if self._broken:
            raise CardError(f"card {self.name!r} is {self._broken}")
        self._late = [load for load in self._late if not load.arrived]
        if self._late:
            raise CardError(
                f"card {self.name!r} is unusable after a load that timed out, until its reads have "
                "arrived; reset it, or open it again"
            )


def check_summary(name: str, counters: dict, n_jobs: int, config_hash: int) -> None:
    """Raise CardError unless a summary is of this ABI, this build and this queue."""
    expected = {
        "abi_version": abi.ABI_VERSION, "config_hash": config_hash, "error": 0, "n_jobs": n_jobs,
    }  # fmt: skip
    for field, want in expected.items():
        if counters[field] == want:
            continue
        meaning = {
            "abi_version": "host and card are of different versions of nearkv",
            "config_hash": "the card is not the build that was asked for",
            "error": f"queue: {Status(counters['error'] | Status.DONE).describe()}",
            "n_jobs": "the card stopped early",
        }[field]
        raise CardError(
            f"card {name!r}: {meaning} ({field} is {counters[field]:#x}, not {want:#x}); "
            f"counters: {counters}",
            counters=counters,
        )


def _simulated(module: str, attribute: str, timeout_s: float) -> Callable[..., Card]:
    """The opener of a card that nearkv_sim imitates."""

    def opener(name, unit, *, config="smartssd", kv_bytes=KV_BYTES, job_bytes=JOB_BYTES,
               reads_in_flight=None, reader="auto", timeout_s=timeout_s, **options):  # fmt: skip
        if unit:
            raise CardError(f"card {name!r}: there is one of its kind, without a number")
        try:
            from nearkv_hw.config import Config, preset

            backend = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or module).split(".")[0]
            raise CardError(
                f"card {name!r} needs the package {package}; install it with: pip install {package}"
            ) from error
        config = config if isinstance(config, Config) else preset(config)
        reopen = functools.partial(backend, config, **options)
        try:
            backend = reopen()
        except RuntimeError as error:
            raise CardError(f"card {name!r} cannot be opened: {error}") from error
        return MemoryCard(
            name, backend, kv_bytes=kv_bytes, job_bytes=job_bytes,
            reads_in_flight=reads_in_flight, reader=reader, timeout_s=timeout_s,
            reopen=reopen,
        )  # fmt: skip

    return opener


_MEMORY_OPTIONS = ("config", "kv_bytes", "job_bytes", "reads_in_flight", "reader", "timeout_s")
# family -> opener(name, unit, **options); "xrt:0" is unit "0" of family "xrt".
_FAMILIES: dict[str, Callable[..., Card]] = {
    "model": _simulated("nearkv_sim.model", "ModelCard", timeout_s=60.0),
    "twin": _simulated("nearkv_sim.twin", "TwinCard", timeout_s=60.0),
    "rtl": _simulated("nearkv_sim.rtl", "RtlCard", timeout_s=600.0),
}


def open_card(name: str | None = None, **options) -> Card:
    """Open a card. Use it as a context manager, or close it.

    Parameters
    ----------
    name : str, optional
        "model": the bit-exact model in numpy. "twin": the same bits, native and fast. "rtl": the
        emitted Verilog in Verilator. Default: "twin", or "model" with a warning where the native part
        cannot be used.
    config : str or nearkv_hw.config.Config
        The build to imitate. Default "smartssd".
    kv_bytes, job_bytes : int
        Sizes of the card's memories.
    timeout_s : float
        How long a load or a run may take, unless it brings its own limit.
    **options
        Passed to the card's backend.

    Raises
    ------
    CardError
        If there is no such card (the message lists those there are), or a package is missing (the
        message gives the command that installs it).

    >>> with open_card("model") as card:
    ...     card.rows
    8
    """
    if name is None:
        try:
            return open_card(DEFAULT_CARD, **options)
        except CardError as error:
            log.warning("%s; going on with the card model, which is slow", error)
            options = {key: options[key] for key in options if key in _MEMORY_OPTIONS}
            return open_card("model", **options)
    family, _, unit = name.partition(":")
    if family not in _FAMILIES:
        known = ", ".join(repr(known) for known in _FAMILIES)
        raise CardError(f"no card {name!r}; there are {known}")
    return _FAMILIES[family](name, unit, **options)


def open_cards(
    card: "str | Card | Sequence[str | Card] | None" = None, **options
) -> tuple[list[Card], list[Card]]:
    """Open one card or several, sharing the processor's cores among those that are programs.

    Parameters
    ----------
    card : str, Card, or a sequence of them, optional
        Cards that are open already stay as they are. Default: as `open_card`.
    **options
        As for `open_card`; of every card that is opened.

    Returns
    -------
    cards : list of Card
    opened : list of Card
        Those of them that this call opened, for the caller to close.

    Raises
    ------
    ValueError
        If there is no card among them.
    CardError
        As `open_card`; none stays open then.
    """
    wanted = list(card) if isinstance(card, Sequence) and not isinstance(card, str) else [card]
    if not wanted:
        raise ValueError("at least one card is needed")
    twins = wanted.count("twin")
    cards: list[Card] = []
    opened: list[Card] = []
    try:
        for one in wanted:
            if one is None or isinstance(one, str):
                more = dict(options)
                if twins > 1 and one == "twin":
                    cores = len(os.sched_getaffinity(0))
                    more.setdefault("threads", max(1, cores // twins))
                opened.append(open_card(one, **more))
                one = opened[-1]
            cards.append(one)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return cards, opened
