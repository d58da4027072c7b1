# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of one drive, kept apart: the store writes pages when no card is being filled."""

from collections.abc import Callable
import contextlib
import errno
import threading
import time

from . import signals
from .errors import FlashError

TIMEOUT_S = 60.0


class Window:
    """Keeps reads and writes of one drive apart: many readers, or one writer, who goes first.

    A drive that does both at once does both badly (bursts of reads lose more than half their rate),
    so writes gather until they are worth a window of their own. Nobody blocks to read: a burst that
    comes while somebody writes begins when the writing ends.

    Parameters
    ----------
    timeout_s : float
        How long `reading` and `writing` wait for their turn.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._writers = 0  # that write or wait
        self._bursts: dict[object, Callable[[float], str]] = {}
        self._held: list[tuple[object, Callable[[float], str], Callable[[], object]]] = []

    def begin(self, burst: object, join: Callable[[float], str], go: Callable[[], object]) -> None:
        """Call `go` to read, now or when the writing ends, perhaps in the writer's thread.

        Parameters
        ----------
        burst : any key, for `end`
        join : callable
            `join(timeout_s)` waits until the burst has ended, and returns "", or what is missing when
            the time is up.
        go : callable
            Must not raise: nobody is there who could know what to do about it.
        """
        with signals.waiting():  # or writers would wait for a burst that never ends
            with self._lock:
                if self._writers:
                    self._held.append((burst, join, go))
                    return
                self._bursts[burst] = join
            go()

    def end(self, burst: object) -> None:
        """The burst has ended; or will not begin, if it has not."""
        with signals.waiting(), self._lock:
            self._bursts.pop(burst, None)
            self._held = [held for held in self._held if held[0] is not burst]

    @contextlib.contextmanager
    def reading(self):
        """A burst that the caller's own thread reads.

        Raises
        ------
        FlashError
            If writers have the drive until the time is up.
        """
        begun, ended = threading.Event(), threading.Event()

        def join(timeout_s: float) -> str:
            return "" if ended.wait(timeout_s) else "pages that are read for the host"

        with signals.waiting():
            self.begin(ended, join, begun.set)
            try:
                deadline = time.monotonic() + self.timeout_s
                while not begun.wait(signals.SLICE_S):
                    signals.deliver()
                    if time.monotonic() > deadline:
                        what = "the end of writes to the drive, to read from it"
                        raise _late(self.timeout_s, what)
                yield
            finally:
                self.end(ended)
                ended.set()

    @contextlib.contextmanager
    def writing(self):
        """The drive for the caller alone.

        Raises
        ------
        FlashError
            If reads do not end, or another writer does not, until the time is up.
        """
        deadline = time.monotonic() + self.timeout_s
        with self._lock:
            self._writers += 1
            bursts = list(self._bursts.values())
        try:
            for join in bursts:
                if missing := join(max(0.0, deadline - time.monotonic())):
                    what = f"the end of reads from the drive, to write to it: {missing}"
                    raise _late(self.timeout_s, what)
            if not self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise _late(self.timeout_s, "the end of another write to the drive")
            try:
                yield
            finally:
                self._writing.release()
        finally:
            held = []
            with self._lock:
                self._writers -= 1
                if not self._writers:
                    held, self._held = self._held, []
                    self._bursts.update((burst, join) for burst, join, _ in held)
            for _, _, go in held:
                go()


def _late(timeout_s: float, what: str) -> FlashError:
    return FlashError(
        f"waited {timeout_s:g} s for {what}", errno=errno.ETIMEDOUT,
        remedy="is the drive alive? See the kernel's log",
    )  # fmt: skip
