# SPDX-License-Identifier: Apache-2.0
"""Readers: pages from files into a card's kv memory, many requests at a time.

A card asks for pages (`Reader.start`) and waits for them later (`Load.wait`). In between they travel
from the drive straight into kv memory: by io_uring, or by threads that make system calls.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
import contextlib
import errno as errno_codes
import functools
import itertools
import logging
import os
from pathlib import Path
import queue
import threading
from typing import ClassVar, NamedTuple

import numpy as np

from nearkv_hw.abi import PAGE_ALIGN_BYTES

from .errors import FlashError, LateError, PageId
from .memory import KvMemory
from .uring import Uring, refusal
from .window import Window

log = logging.getLogger("nearkv")

# Of one request to the drive. Larger ones gain nothing and make the ends of a burst ragged.
READ_BYTES = 1 << 20
TIMEOUT_S = 60.0
_IDLE_S = 10.0  # a thread that has nothing to do looks around once in a while


class ReaderError(RuntimeError):
    """The reader itself has failed; drive and files may be fine. Another reader is needed."""


class Read(NamedTuple):
    """Consecutive pages of one file on their way into kv memory. Files outlive their reads."""

    fd: int
    path: Path
    offset: int  # in the file, a multiple of 4096
    nbytes: int
    kv_offset: int
    page: PageId  # the first
    page_bytes: int
    window: Window | None = None  # of the drive
    direct: bool = True  # the file is open past the page cache: the processor does not copy

    def page_at(self, done_bytes: int) -> PageId:
        """The page that byte `done_bytes` of this read belongs to."""
        return self.page._replace(page=self.page.page + done_bytes // self.page_bytes)


def read_into(read: Read, memory: KvMemory | np.ndarray) -> None:
    """Carry out one read into kv memory, or uint8 host memory whose start is aligned to 4096 bytes.

    Raises
    ------
    FlashError
        If the drive reports an error, or the file ends before the read does.
    """
    if isinstance(memory, KvMemory):
        view = memory.target(read.kv_offset, read.nbytes)
    else:
        view = memory.data[read.kv_offset : read.kv_offset + read.nbytes]
    done = 0
    while done < read.nbytes:
        try:
            got = os.preadv(read.fd, [view[done:] if done else view], read.offset + done)
        except OSError as error:
            raise _failed(read, done, error.errno or errno_codes.EIO) from error
        done = _advance(read, done, got)


def _advance(read: Read, done: int, got: int) -> int:
    """How much of a read has arrived when `got` bytes more have; FlashError if no more will."""
    done += got
    if got == 0 or done % PAGE_ALIGN_BYTES:  # only the end of the file is not aligned
        raise FlashError(
            f"the page file ends {read.nbytes - done} bytes too early; it was truncated",
            page=read.page_at(done), filename=read.path, offset=read.offset + done,
            remedy="the sequence has to be computed again",
        )  # fmt: skip
    return done


def _failed(read: Read, done: int, errno: int) -> FlashError:
    return FlashError(
        "cannot read a KV page", page=read.page_at(done), errno=errno,
        filename=read.path, offset=read.offset + done,
    )  # fmt: skip


def pieces(read: Read) -> Iterator[Read]:
    """A read in requests of at most READ_BYTES, whole pages each where they are not larger."""
    if read.nbytes <= READ_BYTES:
        yield read
        return
    step = max(1, READ_BYTES // read.page_bytes) * read.page_bytes
    for at in range(0, read.nbytes, step):
        yield read._replace(
            offset=read.offset + at,
            nbytes=min(step, read.nbytes - at),
            kv_offset=read.kv_offset + at,
            page=read.page_at(at),
        )


class Load:
    """Reads on their way. Made by `Reader.start`.

    Attributes
    ----------
    requests : list of Read
    nbytes : int
        Of all of them.
    """

    def __init__(self, reader: "Reader", requests: list[Read]):
        self.nbytes = sum(request.nbytes for request in requests)
        self.requests = requests
        self._reader = reader
        self._left = set(range(len(requests)))
        self._of_drive = Counter(request.window for request in requests)
        self._error: Exception | None = None
        self._error_index = len(requests)

    def _done(self, index: int, error: Exception | None) -> None:
        """A request has ended. Called with the reader's lock."""
        # The first in the order of the request, so that the same fault gives the same error.
        if error is not None and index < self._error_index:
            self._error, self._error_index = error, index
        self._left.discard(index)
        window = self.requests[index].window
        self._of_drive[window] -= 1
        if window is not None and not self._of_drive[window]:
            window.end(self)

    @property
    def arrived(self) -> bool:
        """Whether every read has ended, well or not."""
        self._reader._until(lambda: not self._left, 0)
        return not self._left

    def missing(self) -> str:
        """What has not arrived, in words; empty if everything has."""
        left = sorted(self._left)
        if not left:
            return ""
        first = self.requests[left[0]]
        return (
            f"{len(left)} of {len(self.requests)} reads have not arrived, among them {first.page} "
            f"({first.path} at byte {first.offset})"
        )

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until every read has ended.

        Raises
        ------
        FlashError
            The first that a read raised.
        LateError
            Naming what has not arrived.
        ReaderError
            If the reader has failed meanwhile.
        """
        self._reader._until(lambda: not self._left, timeout_s)
        if missing := self.missing():
            first = self.requests[min(self._left)]
            what = f"after {timeout_s:g} s, {missing}; is the drive alive?"
            raise LateError(what, first.page, first.path)
        if self._error is not None:
            raise self._error


class Reader:
    """Reads pages into one card's kv memory, at most `depth` requests at a time.

    Threads with preadv, which leave Python's lock while the drive works. `open_reader` gives a better
    one where the system has it.

    Parameters
    ----------
    memory : KvMemory
    depth : int, optional
        Default: DEPTH.

    Attributes
    ----------
    failure : ReaderError or None
        Why nothing can be read any more. Loads that were on their way have ended with it.
    """

    DEPTH: ClassVar[int] = 8  # a thread each; more of them compete with the host for Python's lock

    def __init__(self, memory: KvMemory, depth: int | None = None):
        depth = self.DEPTH if depth is None else depth
        if depth < 1:
            raise ValueError(f"the depth of reads must be at least 1, not {depth}")
        self.depth, self._memory = depth, memory
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._reading = 0  # threads that are in a system call
        self._loads: set[Load] = set()  # that have not arrived
        self._closed = False
        self.failure: ReaderError | None = None
        self._change = threading.Condition(threading.RLock())

    def start(self, reads: list[Read]) -> Load:
        """Ask for pages; returns at once.

        Raises
        ------
        FlashError
            If a file is open through the page cache and the memory is a card's.
        ReaderError
            If the reader has failed.
        ValueError
            If it is closed.
        """
        if self._memory.foreign:
            for read in reads:
                if not read.direct:
                    raise FlashError(
                        "pages of this file come through the page cache, from where the processor "
                        "would have to write them into the card's memory",
                        page=read.page, filename=read.path, offset=read.offset,
                        remedy="its file system has no O_DIRECT; choose a directory on one that has, "
                        "such as ext4 or XFS (directory=, --kv-dir)",
                    )  # fmt: skip
        requests = [piece for read in reads for piece in pieces(read)]
        load = Load(self, requests)
        with self._change:
            if self._closed:
                raise ValueError("the reader is closed")
            if self.failure is not None:
                raise ReaderError(str(self.failure))
            if requests:
                self._loads.add(load)
        for window in list(load._of_drive):
            mine = [(load, i, r) for i, r in enumerate(requests) if r.window is window]
            if window is None:
                self._go(mine)
                continue

            def join(timeout_s: float, window=window) -> str:
                self._until(lambda: not load._of_drive[window], timeout_s)
                return load.missing() if load._of_drive[window] else ""

            window.begin(load, join, functools.partial(self._go, mine))
        return load

    def close(self) -> None:
        """End the reading and every load, without waiting for a drive that does not answer.

        What is with the drive may still be written to kv memory: see `drained`.
        """
        with self._change:
            self._closed = True
            for _ in self._threads:
                self._requests.put(None)
            self._end_all("the card was closed or reset")

    def drained(self, timeout_s: float) -> bool:
        """Wait, after `close` or a failure, until nothing is with the drive; whether that is so."""
        with self._change:
            return self._change.wait_for(lambda: not self._with_drive(), timeout_s)

    def _with_drive(self) -> int:
        """Requests that may still be written to kv memory. Called with the lock."""
        return self._reading

    def _go(self, requests: list[tuple[Load, int, Read]]) -> None:
        """Begin to read. Does not raise: it may be called by whoever has written to the drive."""
        with self._change:
            if self._closed or self.failure is not None:
                return
            try:
                while len(self._threads) < min(self.depth, len(requests)):
                    thread = threading.Thread(target=self._read_on, name="nearkv-read", daemon=True)
                    thread.start()
                    self._threads.append(thread)
            except RuntimeError as error:
                if not self._threads:
                    self._fail(f"no thread can be started to read pages: {error}")
                    return
            for request in requests:
                self._requests.put(request)

    def _until(self, finished: Callable[[], bool], timeout_s: float) -> None:
        """Read on until `finished`, or until the time is up."""
        with self._change:
            self._change.wait_for(finished, timeout_s)

    def _finish(self, load: Load, index: int, error: Exception | None) -> None:
        """A request has ended. Called with the lock."""
        if index not in load._left:
            return  # given up
        load._done(index, error)
        if not load._left:
            self._loads.discard(load)
        if not load._of_drive[load.requests[index].window]:
            self._change.notify_all()

    def _fail(self, what: str) -> None:
        """Nothing can be read any more; every load ends."""
        with self._change:
            if self.failure is None:
                self.failure = ReaderError(what)
                log.warning("%s", what)
            self._end_all(what)

    def _end_all(self, why: str) -> None:
        """Give up what has not arrived. Called with the lock."""
        for load in list(self._loads):
            for index in sorted(load._left):
                request = load.requests[index]
                error: Exception = FlashError(
                    f"a read was given up: {why}", page=request.page,
                    filename=request.path, offset=request.offset,
                )  # fmt: skip
                self._finish(load, index, ReaderError(why) if self.failure is not None else error)

    def _read_on(self) -> None:
        """A thread's work."""
        while (work := self._requests.get()) is not None:
            self._read_one(*work)
            del work  # or it would be kept until there is another

    def _read_one(self, load: Load, index: int, request: Read) -> None:
        with self._change:
            if index not in load._left:
                return  # given up
            self._reading += 1
        error: Exception | None = None
        try:
            read_into(request, self._memory)
        except FlashError as problem:
            error = problem
        except Exception as problem:  # a thread that dies would let its load wait for ever
            error = FlashError(
                f"cannot read a KV page: {problem!r}", page=request.page,
                filename=request.path, offset=request.offset,
            )  # fmt: skip
        with self._change:
            self._reading -= 1
            self._finish(load, index, error)
            if not self._reading:
                self._change.notify_all()


# What io_uring answers for reasons of its own: it does not know the request, may not make it, or has no
# memory for it. A drive does not answer so, and a system call may still succeed.
_OWN_ERRORS = frozenset(
    {errno_codes.EINVAL, errno_codes.EOPNOTSUPP, errno_codes.ENOSYS, errno_codes.ENOMEM,
     errno_codes.EPERM, errno_codes.EACCES}
)  # fmt: skip
# Interrupted, or made by a thread that has ended since.
_AGAIN = frozenset({errno_codes.EINTR, errno_codes.EAGAIN, errno_codes.ECANCELED})


class UringReader(Reader):
    """Reads by io_uring.

    A few requests are given to the kernel by whoever asks, and what has arrived is taken by whoever
    waits: both in passing. Of more, a thread keeps the drive busy: the kernel interrupts the one who has
    submitted, who should not be the one with a card to run. The thread also takes what arrives while
    somebody waits. Otherwise it sleeps, because it would only compete for Python's lock.

    If the ring fails, all loads end with ReaderError. If it answers single requests with errors of its
    own, threads take them over, and all that come later.

    Raises
    ------
    OSError
        If io_uring cannot be used.
    """

    # What has arrived is replaced when this thread gets Python's lock, some requests later. With 8 at
    # once the drive had too few by then: decode got 0.87 to 0.96 of it, with 32 0.90 to 1.07.
    DEPTH = 32
    FEW = 16  # requests on their way that need no thread

    _lost: ClassVar[list] = []  # readers that cannot learn what is still written to their memory

    def __init__(self, memory: KvMemory, depth: int | None = None):
        super().__init__(memory, depth)
        self._ring = Uring(self.depth)
        self._address = memory.address
        self._keys = itertools.count()
        self._waiting: deque[tuple[Load, int, Read, int]] = deque()  # and how much has arrived
        self._sent: dict[int, tuple[Load, int, Read, int]] = {}  # by key, on their way
        self._thread: threading.Thread | None = None
        # Of who gives requests to the kernel. Without the other lock, which others need meanwhile.
        self._submitting = threading.Lock()
        self._waiters = 0
        self._by_threads = False  # the ring answers with errors of its own

    def close(self) -> None:
        with self._change:
            if self._closed:
                return
            super().close()
            self._waiting.clear()
            if self.failure is None:
                self._in_passing(self._reap)
            self._leave()

    def drained(self, timeout_s: float) -> bool:
        return super().drained(timeout_s) and self not in self._lost

    def _with_drive(self) -> int:
        return super()._with_drive() + len(self._sent)

    def _go(self, requests) -> None:
        with self._change:
            if self._closed or self.failure is not None:
                return
            if self._by_threads:
                super()._go(requests)
                return
            self._waiting.extend((*request, 0) for request in requests)
            few = len(self._waiting) + len(self._sent) <= self.FEW
            mine = few and self._submitting.acquire(blocking=False)
            if mine:
                try:
                    self._in_passing(self._submit)
                finally:
                    self._submitting.release()
            # Who waits already, because a writer was at work, has looked for what arrived before.
            if (not mine or self._waiters) and self.failure is None:
                self._call_thread()

    def _until(self, finished: Callable[[], bool], timeout_s: float) -> None:
        with self._change:
            if self._sent and self.failure is None:
                self._in_passing(self._reap)
            if finished() or timeout_s <= 0:
                return
            self._waiters += 1
            try:
                if self._sent or self._waiting:
                    self._call_thread()
                self._change.wait_for(finished, timeout_s)
            finally:
                self._waiters -= 1

    def _in_passing(self, what: Callable[[], None]) -> None:
        """Do something with the ring that the thread does otherwise. Called with the lock."""
        try:
            what()
        except Exception as error:
            self._break(error)

    def _call_thread(self) -> None:
        """There is work for the thread. Called with the lock."""
        try:
            if self._thread is None and self._ring.fd >= 0:
                thread = threading.Thread(target=self._serve, name="nearkv-read", daemon=True)
                thread.start()
                self._thread = thread
            self._ring.wake()
        except (OSError, RuntimeError) as error:
            self._break(error)

    def _serve(self) -> None:
        """The thread's work; to its end, when nothing is with the drive any more."""
        try:
            while self._ring.fd >= 0:
                with self._submitting:
                    self._submit()
                with self._change:
                    ended = self._closed or self.failure is not None
                    needed = bool(self._waiting or self._waiters or (ended and self._sent))
                self._ring.wait(_IDLE_S, completions=needed)
                with self._change:
                    if needed:
                        self._reap()
                    self._leave()
        except Exception as error:
            with self._change:
                self._thread = None
                self._break(error)

    def _fail(self, what: str) -> None:
        with self._change:
            self._waiting.clear()
            super()._fail(what)
            self._leave()

    def _leave(self) -> None:
        """Give the ring back when nothing is with the drive. Called with the lock, at the end."""
        if not self._closed and self.failure is None:
            return
        mine = self._thread is threading.current_thread()
        if self._sent:
            if not mine:
                self._call_thread()
        elif mine or self._thread is None:
            self._ring.close()
        else:
            with contextlib.suppress(OSError):  # or it notices later
                self._ring.wake()

    def _break(self, error: Exception) -> None:
        """The ring has failed. Called with the lock."""
        for key in self._ring.forget():
            self._sent.pop(key, None)
        if self.failure is None and not self._closed:
            self._fail(f"io_uring failed: {error!r}")  # and learn what arrives of the rest
            return
        if self._sent:
            log.warning(
                "io_uring failed: %r; %d reads into a card's memory may be on their way for ever",
                error, len(self._sent),
            )  # fmt: skip
            self._lost.append(self)
            self._sent.clear()
            self._change.notify_all()
        self._leave()

    def _submit(self) -> None:
        """Give the kernel what waits. Called with `_submitting`."""
        with self._change:
            if self.failure is not None:
                return
            while self._waiting and len(self._sent) < self.depth:
                load, index, request, done = work = self._waiting.popleft()
                if index not in load._left:
                    continue  # given up
                key = next(self._keys)
                self._ring.read(
                    key, request.fd, request.offset + done,
                    self._address + request.kv_offset + done, request.nbytes - done,
                )  # fmt: skip
                self._sent[key] = work
        self._ring.submit()

    def _reap(self) -> None:
        if self._ring.fd < 0:
            return
        for key, result in self._ring.completions():
            if key not in self._sent:
                raise RuntimeError(f"request {key} was answered and not made")
            load, index, request, done = self._sent.pop(key)
            error, again = None, -result in _AGAIN
            try:
                if result >= 0:
                    done = _advance(request, done, result)
                    again = done < request.nbytes
                elif -result in _OWN_ERRORS:
                    self._take_over(load, index, request, -result)
                    continue
                elif not again:
                    error = _failed(request, done, -result)
            except FlashError as problem:
                error = problem
            if again and index in load._left:
                self._waiting.appendleft((load, index, request, done))
            else:
                self._finish(load, index, error)
        if not self._sent:
            self._change.notify_all()

    def _take_over(self, load: Load, index: int, request: Read, errno: int) -> None:
        """Let threads read what the ring will not, and all that comes later."""
        if not self._by_threads:
            self._by_threads = True
            self.depth = min(self.depth, Reader.DEPTH)
            log.warning(
                "io_uring answers %s for %s; pages are read by threads from now on",
                os.strerror(errno), request.page,
            )  # fmt: skip
        waiting = [(load, index, request) for load, index, request, _ in self._waiting]
        self._waiting.clear()
        super()._go([(load, index, request), *waiting])


def open_reader(memory: KvMemory, depth: int | None = None, kind: str = "auto") -> Reader:
    """A reader into kv memory.

    Parameters
    ----------
    memory : KvMemory
    depth : int, optional
        Requests that the drive has at once, at most. Default: what suits the kind of reader.
    kind : "auto", "uring" or "threads"
        "auto": io_uring where the system allows it, otherwise threads.

    Raises
    ------
    ValueError
        If there is no such kind, or the depth is not positive.
    OSError
        If io_uring is demanded and cannot be used.
    """
    made = reader_kind(kind)
    try:
        return made(memory, depth)
    except OSError as error:
        if kind != "auto":
            raise
        log.warning("io_uring: %s; pages are read by threads", os.strerror(error.errno or 0))
        return Reader(memory, depth)


def reader_kind(kind: str = "auto") -> type[Reader]:
    """The reader that `open_reader` opens."""
    if kind not in ("auto", "uring", "threads"):
        raise ValueError(f'the reader must be "auto", "uring" or "threads", not {kind!r}')
    if kind == "uring" or (kind == "auto" and not _no_uring()):
        return UringReader
    return Reader


@functools.cache
def _no_uring() -> str:
    reason = refusal()
    if reason:
        log.debug("pages are read by threads: %s", reason)
    return reason
