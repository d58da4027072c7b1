# SPDX-License-Identifier: Apache-2.0
"""Executors: what runs a queue of jobs, given the two memories of a card.

`Executor` is what a kind of hardware supplies; `Simulated` makes one of a program, as nearkv_sim has.
"""

from collections.abc import Callable
import contextlib
import threading
import time
from typing import Any, Protocol

from ..io import JobMemory, KvMemory


class Run(Protocol):
    """A queue that an executor has begun."""

    def wait(self, timeout_s: float) -> None:
        """Return when the run has ended. May be called again, and from several threads.

        Raises
        ------
        TimeoutError
            After `timeout_s`, with what is known of the run. It goes on.
        RuntimeError
            If it failed, and has ended. Jobs that failed are no reason: their partials say so.
        """


class Executor(Protocol):
    """What a kind of card does differently from the others.

    Nothing here has to be checked or made safe for threads, unless it says so: `Card` has one run at a
    time, calls `start` with offsets that lie in job memory, and calls nothing after `close`.
    """

    rows: int  # query heads of one job, at most
    max_head_dim: int
    config_hash: int  # of the build, `nearkv_hw.config.Config.hash32`

    def attach(self, kv: KvMemory, job: JobMemory) -> None:
        """Use these memories from now on: when the card is opened, and after every reset of it."""

    def start(self, queue: int, n_jobs: int, summary: int) -> Run:
        """Begin a run, and return at once.

        Parameters
        ----------
        queue, summary : int
            Offsets in job memory.

        Raises
        ------
        RuntimeError
            If it cannot be started.
        """
        ...

    def stop(self) -> None:
        """Ask the run that is under way to end soon, where the hardware can. From any thread."""

    def reset(self, timeout_s: float) -> None:
        """Become usable after a run that failed or is late.

        When this returns, nothing of an earlier run touches memory that is still in use. Memory that is
        not foreign will not be: the card attaches other.

        Raises
        ------
        TimeoutError
            If an earlier run still goes on after `timeout_s` and its memory cannot be abandoned.
        RuntimeError
            If it cannot be made usable.
        """

    def close(self, timeout_s: float) -> None:
        """Give the hardware back. Called when no run is under way.

        Raises
        ------
        TimeoutError
            If that takes longer than `timeout_s`.
        """


class Simulated:
    """An executor that is a program.

    A run is executed by whoever waits for it: a thread for it made short runs slower and long ones no
    faster. A backend that has threads of its own may begin before that.

    Parameters
    ----------
    open_backend : callable
        Makes a backend, now and after runs that did not end well. It has `config`
        (`nearkv_hw.config.Config`), `execute(kv, job, queue, n_jobs, summary, timeout_s)`, which does
        with the two uint8 arrays what the hardware would, raises TimeoutError if it takes too long and
        RuntimeError if the program breaks; and `close()`, which any thread may call at any time, and
        which ends a run that is under way with a RuntimeError. It may have `begin(kv, job, queue,
        n_jobs)`, which begins at once with what `execute` will finish, and never raises.

    Raises
    ------
    RuntimeError
        If the backend cannot be made.
    """

    def __init__(self, open_backend: Callable[[], Any]):
        self._open, self.backend = open_backend, open_backend()
        config = self.backend.config
        self.rows, self.max_head_dim = config.rows, config.max_head_dim
        self.config_hash = config.hash32
        self.stopped = False
        self.busy = threading.Lock()  # held while the backend executes

    def attach(self, kv: KvMemory, job: JobMemory) -> None:
        self._memories = kv.simulated(), job.bytes

    def start(self, queue: int, n_jobs: int, summary: int) -> "_SimulatedRun":
        begin = getattr(self.backend, "begin", None)
        if begin is not None and self.busy.acquire(blocking=False):  # or a late run is not over
            try:
                begin(*self._memories, queue, n_jobs)
            finally:
                self.busy.release()
        return _SimulatedRun(self, *self._memories, queue, n_jobs, summary)

    def stop(self) -> None:
        self.stopped = True  # whoever has a run that is not begun will not begin it
        if self.busy.locked():
            with contextlib.suppress(TimeoutError):  # it is waited for elsewhere
                self.backend.close()

    def reset(self, timeout_s: float) -> None:
        with _held(self.busy, timeout_s, "the run that is under way"):
            self.backend.close()
            self.backend = self._open()
            self.stopped = False

    def close(self, timeout_s: float) -> None:
        self.backend.close()


class _SimulatedRun:
    def __init__(self, executor: Simulated, *arguments):
        self._executor, self._arguments = executor, arguments
        self._lock = threading.RLock()  # a signal handler may close the card that runs
        self._ended = False
        self._error: Exception | None = None

    def wait(self, timeout_s: float) -> None:
        begin = time.monotonic()
        with _held(self._lock, timeout_s, "another thread, which waits for the same run"):
            if not self._ended:
                self._execute(timeout_s - (time.monotonic() - begin))
        if self._error is not None:
            raise self._error

    def _execute(self, timeout_s: float) -> None:
        executor = self._executor
        with _held(executor.busy, timeout_s, "an earlier run"):
            if executor.stopped:
                raise RuntimeError("it is closed")
            self._ended = True
            self._error = RuntimeError("the run was interrupted")
            try:
                executor.backend.execute(*self._arguments, timeout_s)
                self._error = None
            except TimeoutError as error:
                self._error = RuntimeError(f"the run was given up: {error}")
                raise
            except Exception as error:
                self._error = error


class _held:
    """A lock, for a `with`; TimeoutError if it is not to be had in time."""

    def __init__(self, lock, timeout_s: float, what: str):
        self._lock, self._timeout_s, self._what = lock, timeout_s, what

    def __enter__(self):
        if not self._lock.acquire(timeout=max(self._timeout_s, 0)):
            raise TimeoutError(f"waited {self._timeout_s:g} s for {self._what}")

    def __exit__(self, *exception):
        self._lock.release()
