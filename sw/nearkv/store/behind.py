# SPDX-License-Identifier: Apache-2.0
"""Writing behind the caller: spills that wait, and the thread that writes them."""

from collections import deque
from collections.abc import Callable, Iterator
import contextlib
import errno
import threading

import numpy as np

from ..io import FlashError, PageId
from .writer import STAGING_BYTES, PageWriter, Spill

GATHER_S = 0.05  # how long the first spill waits for more, unless somebody asks for it


class WriteBehind:
    """A queue of spills and the thread that empties it.

    Every method is to be called with the store's lock, which the thread takes for everything but the
    writing itself. A spill that fails leaves the queue and the bytes that it may hold, so that nobody
    else waits for it. The next call for its sequence raises the error, and the thread tries again.

    Parameters
    ----------
    writer : PageWriter
        Of the thread alone.
    change : threading.Condition
        The store's lock, notified of every change.
    limit_bytes : int
        K and V that may wait, at most.
    wait : callable(done, what)
        Waits, in one's turn, until `done()`; raises FlashError if the drive makes no progress.
    record : callable(spill)
        Records pages that are written; may raise FlashError.
    """

    def __init__(
        self,
        writer: PageWriter,
        change: threading.Condition,
        *,
        limit_bytes: int,
        wait: Callable[[Callable[[], object], str], None],
        record: Callable[[Spill], None],
    ):
        self.writer, self._change, self._limit_bytes = writer, change, limit_bytes
        self._wait, self._record = wait, record
        self._spills: deque[Spill] = deque()
        self._failed: dict[int, list[Spill]] = {}  # by sequence
        self._errors: dict[int, FlashError] = {}  # of these, until somebody has heard of them
        self.waiting_bytes = 0
        self._writing: list[Spill] = []  # that the thread has taken
        self._held: list = []  # sets of sequences whose spills it must not take
        self._hurry = self._ending = False
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is being written; what has failed does neither."""
        return not self._spills and not self._writing

    def has_failed(self, sequence: int) -> bool:
        """Whether something went wrong with a sequence that nobody has heard of. Without the lock."""
        return sequence in self._errors

    def has(self, layer: int, ids: np.ndarray) -> bool:
        """Whether one of these blocks of a layer is not written yet."""
        failed = (spill for spills in self._failed.values() for spill in spills)
        return any(
            spill.layer == layer and np.isin(spill.ids, ids).any()
            for spill in (*self._spills, *self._writing, *failed)
        )

    @property
    def failed(self) -> dict[int, FlashError]:
        """What went wrong and nobody has heard of, by sequence."""
        return dict(self._errors)

    def put(self, spill: Spill) -> None:
        """Let a spill wait. `make_room` first."""
        spill.table.n_waiting += 1
        self._spills.append(spill)
        self.waiting_bytes += spill.nbytes
        self._change.notify_all()

    def make_room(self, nbytes: int, sequence: int) -> None:
        """Wait until so many bytes more may wait.

        Raises
        ------
        FlashError
            If the sequence has failed meanwhile, or the drive makes no progress.
        """
        self._wait(
            lambda: (
                not self.waiting_bytes
                or self.waiting_bytes + nbytes <= self._limit_bytes
                or sequence in self._errors
            ),
            "room for pages that are to be written",
        )
        self.raise_failed(sequence)
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="nearkv-write", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise FlashError(
                    f"cannot start the thread that writes KV pages: {error}",
                    errno=errno.EAGAIN, filename=self.writer.path,
                    remedy="raise the limit on threads (ulimit -u), or store without delay",
                ) from error  # fmt: skip
            self._thread = thread

    def settle(self, spilled, sequence: int, layer: int) -> None:
        """Wait until the pages of a table are written.

        Raises
        ------
        FlashError
            If that failed. The next call tries again.
        """
        self.raise_failed(sequence)
        if spilled.n_waiting:
            self._wait(
                lambda: not spilled.n_waiting or sequence in self._errors,
                f"pages of layer {layer}, sequence {sequence} to be written",
            )
            self.raise_failed(sequence)

    def raise_failed(self, sequence: int) -> None:
        """Raise what went wrong with a sequence, once; the thread tries again then."""
        error = self._errors.pop(sequence, None)
        if error is None:
            return
        spills = self._failed.pop(sequence, [])
        self._spills.extendleft(reversed(spills))
        self.waiting_bytes += sum(spill.nbytes for spill in spills)
        self._change.notify_all()
        raise error

    @contextlib.contextmanager
    def giving_up(self, sequences) -> Iterator[None]:
        """Inside, nothing of some sequences is being written. Afterwards their spills are given up.

        After an error they are not: they wait to be written as before.

        Raises
        ------
        FlashError
            If the drive makes no progress.
        """
        self._held.append(sequences)
        try:
            self._wait(
                lambda: not any(spill.sequence in sequences for spill in self._writing),
                "pages that are being written",
            )
            yield
            given_up = [spill for spill in self._spills if spill.sequence in sequences]
            self._spills = deque(s for s in self._spills if s.sequence not in sequences)
            self.waiting_bytes -= sum(spill.nbytes for spill in given_up)
            for sequence in [sequence for sequence in self._failed if sequence in sequences]:
                given_up += self._failed.pop(sequence)
                self._errors.pop(sequence, None)
            for spill in given_up:
                spill.table.n_waiting -= 1
        finally:
            self._held.remove(sequences)
            self._change.notify_all()

    def hurry(self) -> None:
        """Somebody waits: do not gather more."""
        self._hurry = True
        self._change.notify_all()

    def end(self) -> None:
        """Let the thread end when nothing waits any more."""
        self._ending = True
        self._change.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Without the lock: wait for the thread to end; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # --- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        while spills := self._next():
            outcomes = self._attempt(spills)
            with self._change:
                for spill, error in outcomes:
                    self.waiting_bytes -= spill.nbytes
                    error = error or self._finish(spill)
                    if error is None:
                        spill.table.n_waiting -= 1
                    else:
                        self._failed.setdefault(spill.sequence, []).append(spill)
                        self._errors.setdefault(spill.sequence, error)
                # What came meanwhile behind a gap waits for it.
                for spill in [spill for spill in self._spills if spill.sequence in self._errors]:
                    self._spills.remove(spill)
                    self.waiting_bytes -= spill.nbytes
                    self._failed.setdefault(spill.sequence, []).append(spill)
                self._writing = []
                self._change.notify_all()

    def _next(self) -> list[Spill]:
        """Wait for spills that are worth a window; none when it is time to end."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._free() or (self._ending and not self._spills))
                self._change.wait_for(
                    lambda: self._hurry or self._ending or self.waiting_bytes >= STAGING_BYTES,
                    GATHER_S,
                )
                self._hurry = False
                self._writing = self._free()
                self._spills = deque(spill for spill in self._spills if self._is_held(spill))
                if self._writing or (self._ending and not self._spills):
                    return self._writing
                # Their sequence was dropped meanwhile; others will come.

    def _free(self) -> list[Spill]:
        """Spills that may be taken."""
        return [spill for spill in self._spills if not self._is_held(spill)]

    def _is_held(self, spill: Spill) -> bool:
        return any(spill.sequence in sequences for sequences in self._held)

    def _attempt(self, spills: list[Spill]) -> list[tuple[Spill, FlashError | None]]:
        """Write spills together; if that fails one by one, so that only the broken ones suffer."""
        try:
            self.writer.write(spills)
            return [(spill, None) for spill in spills]
        except Exception as error:  # or everybody would wait for ever
            if len(spills) == 1:
                return [(spills[0], _described(error, spills[0], self.writer.path))]
        outcomes: list[tuple[Spill, FlashError | None]] = []
        failed: dict[int, FlashError] = {}  # by sequence: what comes behind a gap is not written
        for spill in spills:
            error = failed.get(spill.sequence)
            if error is None:
                try:
                    self.writer.write([spill])
                except Exception as problem:
                    error = failed[spill.sequence] = _described(problem, spill, self.writer.path)
            outcomes.append((spill, error))
        return outcomes

    def _finish(self, spill: Spill) -> FlashError | None:
        """Record pages that are written; what went wrong with that."""
        if spill.sequence in self._errors:
            return self._errors[spill.sequence]
        try:
            self._record(spill)
        except Exception as problem:
            return _described(problem, spill, self.writer.path)
        return None


def _described(problem: Exception, spill: Spill, filename) -> FlashError:
    if isinstance(problem, FlashError):
        return problem
    page = PageId(spill.layer, spill.sequence, 0, spill.position)
    return FlashError(
        f"cannot write KV pages: {problem!r}", page=page, filename=filename,
        remedy="what is stored already is untouched",
    )  # fmt: skip
