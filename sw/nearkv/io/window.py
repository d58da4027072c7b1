# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of one drive, kept apart."""

from collections.abc import Callable
import contextlib
import threading


class Window:
    """Keeps reads and writes of one drive apart: many readers, or one writer, who goes first.

    A drive that does both at once does both badly (bursts of reads lose more than half their rate),
    so writes gather until they are worth a window of their own. Nobody blocks to read: a burst that
    comes while somebody writes begins when the writing ends.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._writers = 0  # that write or wait
        self._bursts: dict[object, Callable[[], object]] = {}
        self._held: list[tuple[object, Callable[[], object], Callable[[], object]]] = []

    def begin(self, burst: object, join: Callable[[], object], go: Callable[[], object]) -> None:
        """Call `go` to read, now or when the writing ends, perhaps in the writer's thread.

        burst : any key, for `end`
        join : waits until the burst has ended
        """
        with self._lock:
            if self._writers:
                self._held.append((burst, join, go))
                return
            self._bursts[burst] = join
        go()

    def end(self, burst: object) -> None:
        """The burst has ended; or will not begin, if it has not."""
        with self._lock:
            self._bursts.pop(burst, None)
            self._held = [held for held in self._held if held[0] is not burst]

    @contextlib.contextmanager
    def reading(self):
        """A burst that the caller's own thread reads."""
        begun, ended = threading.Event(), threading.Event()
        self.begin(ended, ended.wait, begun.set)
        begun.wait()
        try:
            yield
        finally:
            self.end(ended)
            ended.set()

    @contextlib.contextmanager
    def writing(self):
        with self._lock:
            self._writers += 1
            bursts = list(self._bursts.values())
        try:
            for join in bursts:
                join()
            with self._writing:
                yield
        finally:
            held = []
            with self._lock:
                self._writers -= 1
                if not self._writers:
                    held, self._held = self._held, []
                    self._bursts.update((burst, join) for burst, join, _ in held)
            for _, _, go in held:
                go()
