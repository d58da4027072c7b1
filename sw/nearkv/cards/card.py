# SPDX-License-Identifier: Apache-2.0
"""A card: two memories, a reader that fills one of them from flash, and an executor that runs jobs.

*kv memory* receives pages straight from flash; on a real card it is a peer-to-peer BAR, so the host
neither reads nor writes it. *job memory* is shared by host and card: jobs, page tables, query blocks,
partials and the summary (`nearkv_hw.abi`). Nothing above this module can tell one card from another, and
everything that can go wrong with a card, or be late, is dealt with here, for all kinds of cards alike.
"""

import logging
import os
import threading

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import Status

from ..io import (
    JobMemory,
    KvMemory,
    LateError,
    Load,
    Read,
    ReaderError,
    open_reader,
)
from . import executor as executors
from .errors import CardError
from .turns import Tenancy

log = logging.getLogger("nearkv")


class CardRun:
    """A queue that a card was given. Made by `Card.start_run`."""

    def __init__(self, run: executors.Run, n_jobs: int, summary: int):
        self.n_jobs = n_jobs
        self._run, self._summary = run, summary
        self._ended = False


class Card:
    """What loads pages from flash and runs jobs on them. A context manager.

    A load (`start_load`, `finish_load`) and a run (`start_run`, `finish_run`) are started, and waited for
    later; both may be under way at once, and job memory that a run does not use may be written meanwhile.
    One run is under way at a time: the next waits for it.

    Any thread may call any method. Stores that share a card take turns (`tenancy`). `close` may be called
    while others wait for the card: they get a CardError. In a process that was forked, the card of its
    parent raises; closing it there does nothing.

    A kind of card, such as one behind XRT or PYNQ, consists of

    - kv memory: `KvMemory(nbytes, address=...)` for a mapped BAR or buffer, which makes it foreign: the
      processor does not write there, and `reset` and `close` wait until no read is on its way into it. If
      the card computes on a copy, override `sync_to_device`, which is called for what has arrived; if a
      reset of the hardware ends with other memory, override `renewed` to return that.
    - job memory: `JobMemory(nbytes, address=...)`, `sync_to_device` and `sync_from_device` overridden if
      the card has a copy. They are called with what the host has written, and is about to read.
    - an executor: start, wait, stop, reset, close (`nearkv.cards.executor.Executor`).

    Parameters
    ----------
    name : str
    kv : KvMemory
    job : JobMemory
    executor : Executor
    reads_in_flight : int, optional
        Requests that the drive has at once, of up to 1 MiB each. Default: the reader's.
    reader : "auto", "uring" or "threads"
        How they are made: `nearkv.io.open_reader`.
    timeout_s : float
        For a load or a run that does not bring its own, and for whatever else has to be waited for.
    pci_address : str, optional
        Where it is on PCIe, if it is known: "0000:04:00.1".

    Attributes
    ----------
    rows : int
        Query heads of one job, at most.
    max_head_dim : int
    kv_bytes, job_bytes : int
        Sizes of the memories.
    tenancy : Tenancy
        Whose pages are in kv memory.

    Raises
    ------
    CardError
        If the reader that is asked for cannot be used here.
    """

    def __init__(
        self,
        name: str,
        kv: KvMemory,
        job: JobMemory,
        executor: executors.Executor,
        *,
        reads_in_flight: int | None = None,
        reader: str = "auto",
        timeout_s: float = 60.0,
        pci_address: str | None = None,
    ):
        self.pci_address = pci_address
        self.name, self.executor, self.timeout_s = name, executor, timeout_s
        self.rows, self.max_head_dim = executor.rows, executor.max_head_dim
        self.kv_bytes, self.job_bytes = kv.nbytes, job.nbytes
        self.tenancy = Tenancy(name, lambda: self.timeout_s)
        self._kv, self._job = kv, job
        self._depth, self._reader_kind = reads_in_flight, reader
        self._lock = threading.RLock()  # for what decides together; nothing is waited for with it
        self._process = os.getpid()
        self._closed = self._released = False
        self._broken = ""  # why the executor has to be reset
        self._resetting = ""  # why a reset has not come to its end
        self._run: CardRun | None = None  # that was started last
        self._late: list[Load] = []
        try:
            self._reader = open_reader(kv, reads_in_flight, reader)
        except OSError as error:
            raise CardError(
                f"card {name!r}: io_uring cannot be used ({os.strerror(error.errno or 0)}); "
                'read by threads: reader="threads", or "auto"'
            ) from error
        executor.attach(kv, job)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # --- loads ----------------------------------------------------------------------------------

    def start_load(self, reads: list[Read]) -> Load:
        """Ask for pages to be brought from flash to kv memory. Returns at once.

        Raises
        ------
        ValueError
            If they would leave kv memory.
        FlashError
            If they could come only through the page cache, and kv memory is a card's.
        """
        self.check_usable()
        for read in reads:
            self._kv.check(read.kv_offset, read.nbytes)
        try:
            return self._reader.start(reads)
        except ReaderError as error:
            raise self._reader_failed(error) from error
        except ValueError as error:
            raise CardError(f"card {self.name!r} was closed or reset meanwhile") from error

    def finish_load(self, load: Load, timeout_s: float | None = None) -> None:
        """Wait until all have arrived.

        Raises
        ------
        FlashError
            If a file is short or the drive fails.
        CardError
            After `timeout_s`; if the reader fails; if the card is closed meanwhile.
        """
        self._check_process()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            load.wait(timeout_s)
        except LateError as error:
            with self._lock:
                self._late.append(load)
            raise CardError(
                f"card {self.name!r}: {error}", page=error.page, filename=str(error.path),
                recoverable=True,
            ) from error  # fmt: skip
        except ReaderError as error:
            raise self._reader_failed(error) from error
        except OSError as error:
            if self._closed:
                raise self._was_closed("a load") from error
            raise
        for request in load.requests:
            self._kv.sync_to_device(request.kv_offset, request.nbytes)
        self.tenancy.moved()

    def load(self, reads: list[Read], timeout_s: float | None = None) -> None:
        """`start_load` and `finish_load` in one."""
        self.finish_load(self.start_load(reads), timeout_s)

    # --- jobs -----------------------------------------------------------------------------------

    def write_job(self, offset: int, data) -> None:
        """Copy bytes into job memory. A run that is under way must not use them."""
        self.check_usable()
        data = np.frombuffer(data, np.uint8)
        job = self._job
        job.check(offset, len(data))
        job.bytes[offset : offset + len(data)] = data
        job.sync_to_device(offset, len(data))

    def read_job(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of job memory: uint8 (nbytes,), a copy."""
        self.check_usable()
        job = self._job
        job.check(offset, nbytes)
        job.sync_from_device(offset, nbytes)
        return job.bytes[offset : offset + nbytes].copy()

    def start_run(self, queue: int, n_jobs: int, summary: int) -> CardRun:
        """Begin to run the queue at job-memory offset `queue`; returns at once.

        If a run is under way, it is waited for.

        Raises
        ------
        CardError
            If the run before does not end in time, or this one cannot be started.
        """
        self._check_process()
        job = self._job
        job.check(queue, n_jobs * abi.JOB.bytes)
        job.check(summary, abi.SUMMARY.bytes)
        while True:
            with self._lock:
                self.check_usable()
                before = self._run
                if before is None or before._ended:
                    job.bytes[summary : summary + abi.SUMMARY.bytes] = 0
                    job.sync_to_device(summary, abi.SUMMARY.bytes)
                    try:
                        run = self.executor.start(queue, n_jobs, summary)
                    except RuntimeError as error:
                        raise self._failed(error) from error
                    self._run = CardRun(run, n_jobs, summary)
                    return self._run
            try:
                self._wait(before, self.timeout_s)
            except CardError:
                if not before._ended:
                    raise
                # It failed, which whoever has started it was told, or is.

    def finish_run(self, run: CardRun, timeout_s: float | None = None) -> dict[str, int]:
        """Wait until a run has ended.

        Returns
        -------
        The fields of the summary (`abi.SUMMARY`)

        Raises
        ------
        CardError
            After `timeout_s`; if the queue could not be read; if what answered is not the build that
            was opened; if the card is closed meanwhile. Jobs that failed are for the caller to find in
            their partials.
        """
        self._check_process()
        self._wait(run, self.timeout_s if timeout_s is None else timeout_s)
        if self._closed:
            raise self._was_closed(f"a run of {run.n_jobs} jobs")
        job, summary = self._job, run._summary
        job.sync_from_device(summary, abi.SUMMARY.bytes)
        counters = abi.SUMMARY.unpack(job.bytes[summary : summary + abi.SUMMARY.bytes])
        check_summary(self.name, counters, run.n_jobs, self.executor.config_hash)
        self.tenancy.moved()
        return counters

    def run(
        self, queue: int, n_jobs: int, summary: int, timeout_s: float | None = None
    ) -> dict[str, int]:
        """`start_run` and `finish_run` in one."""
        return self.finish_run(self.start_run(queue, n_jobs, summary), timeout_s)

    def _wait(self, run: CardRun, timeout_s: float) -> None:
        try:
            run._run.wait(timeout_s)
        except TimeoutError as error:
            if self._closed:
                raise self._was_closed(f"a run of {run.n_jobs} jobs") from error
            self._broken = "unusable after a run that timed out; reset it, or open it again"
            raise CardError(
                f"card {self.name!r}: {run.n_jobs} jobs did not end within {timeout_s:g} s: {error}",
                recoverable=True,
            ) from error
        except Exception as error:
            run._ended = True
            if self._closed:
                raise self._was_closed(f"a run of {run.n_jobs} jobs") from error
            if isinstance(error, RuntimeError):
                raise self._failed(error) from error
            raise
        run._ended = True

    # --- the end, and new beginnings --------------------------------------------------------------

    def reset(self) -> None:
        """Give up what is on its way and make the card usable again, after a time-out.

        What its memories held is lost. Memory of this process is replaced, and what is late goes to the
        old one. Foreign memory stays: what is on its way into it is waited for.

        Raises
        ------
        CardError
            If that does not help, or takes longer than `timeout_s`. It may be tried again.
        """
        self._check_open()
        reader, run = self._reader, self._run
        self._resetting = "not reset yet; try again"
        reader.close()
        if self._kv.foreign and not reader.drained(self.timeout_s):
            raise self._not_reset("reads into its kv memory are still on their way")
        if not self._broken and run is not None and not run._ended:
            try:
                self._wait(run, self.timeout_s)
            except CardError:
                pass  # it is broken now
        broken = self._broken
        if broken:
            self.executor.stop()
            try:
                self.executor.reset(self.timeout_s)
            except TimeoutError as error:
                raise self._not_reset(str(error)) from error
            except RuntimeError as error:
                raise CardError(f"card {self.name!r} cannot be opened again: {error}") from error
        if reader.failure is not None and self._reader_kind != "threads":
            log.warning(
                "card %r: %s; pages are read by threads from now on", self.name, reader.failure
            )
            self._reader_kind, self._depth = "threads", None
        kv, job = self._kv.renewed(), self._job.renewed() if broken else self._job
        with self._lock:
            self._check_open()
            self._kv, self._job, self._run, self._late = kv, job, None, []
            self.executor.attach(kv, job)
            self._reader = open_reader(kv, self._depth, self._reader_kind)
            self._broken = self._resetting = ""

    def close(self) -> None:
        """End what is under way and release the card and its memories. May be called twice.

        Raises
        ------
        CardError
            If a run does not end in time, or reads into foreign memory do not, which then is still in
            use. The card is closed nevertheless; another call goes on waiting.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._released:
                return
            self._closed = True
            run = self._run
        self._reader.close()
        late = []
        try:
            self.executor.stop()
            if run is not None and not run._ended:
                try:
                    run._run.wait(self.timeout_s)
                except TimeoutError:
                    raise
                except Exception:
                    pass  # whoever waits for it is told
            self.executor.close(self.timeout_s)
        except TimeoutError as error:
            late.append(f"the run that is under way ({error})")
        if self._kv.foreign and not self._reader.drained(self.timeout_s):
            late.append("reads that are on their way into its kv memory")
        if late:
            raise CardError(
                f"card {self.name!r} is closed, but waited {self.timeout_s:g} s for "
                f"{' and '.join(late)}; its memories must not be used for anything else yet"
            )
        self._released = True
        self._kv.release()
        self._job.release()

    # --- what state it is in ------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise CardError if the card is closed, of another process, or waits for a reset."""
        self._check_open()
        if why := self._resetting or self._broken:
            raise CardError(f"card {self.name!r} is {why}", recoverable=True)
        if not self._late:
            return
        with self._lock:
            self._late = [load for load in self._late if not load.arrived]
            if self._late:
                raise CardError(
                    f"card {self.name!r} is unusable after a load that timed out, until its reads "
                    "have arrived; reset it, or open it again",
                    recoverable=True,
                )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise CardError(f"card {self.name!r} is closed; open it again")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise CardError(
                f"card {self.name!r} belongs to process {self._process}, not to {os.getpid()}, which "
                "was forked from it; open a card of its own in each process"
            )

    def _was_closed(self, what: str) -> CardError:
        return CardError(f"card {self.name!r} was closed during {what}; open it again")

    def _not_reset(self, why: str) -> CardError:
        return CardError(
            f"card {self.name!r} cannot be reset yet: waited {self.timeout_s:g} s, and {why}; its memory "
            "cannot be abandoned. Try again later",
            recoverable=True,
        )

    def _failed(self, error: Exception) -> CardError:
        self._broken = "unusable after a run that failed; reset it, or open it again"
        return CardError(f"card {self.name!r}: {error}", recoverable=True)

    def _reader_failed(self, error: Exception) -> CardError:
        if self._closed:
            return self._was_closed("a load")
        return CardError(
            f"card {self.name!r}: {error}; reset it to read otherwise", recoverable=True
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
