# SPDX-License-Identifier: Apache-2.0
"""Readers: pages from files into kv memory, many requests at a time."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
import errno as errno_codes
import functools
import itertools
import logging
import os
from pathlib import Path
import queue
import threading
import time
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
    """Reads on their way. Made by `Reader.start`."""

    def __init__(self, reader: "Reader", requests: list[Read]):
        self.nbytes = sum(request.nbytes for request in requests)
        self._reader, self._requests = reader, requests
        self._left = set(range(len(requests)))
        self._of_drive = Counter(request.window for request in requests)
        self._error: FlashError | None = None
        self._error_index = len(requests)

    def _done(self, index: int, error: FlashError | None) -> None:
        """A request has ended. Called by one thread at a time."""
        # The first in the order of the request, so that the same fault gives the same error.
        if error is not None and index < self._error_index:
            self._error, self._error_index = error, index
        self._left.discard(index)
        window = self._requests[index].window
        self._of_drive[window] -= 1
        if window is not None and not self._of_drive[window]:
            window.end(self)

    @property
    def arrived(self) -> bool:
        """Whether every read has ended, well or not."""
        self._reader._until(lambda: not self._left, timeout_s=0)
        return not self._left

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every read has ended.

        Raises
        ------
        FlashError
            The first that a read raised.
        LateError
            Naming what has not arrived.
        """
        self._reader._until(lambda: not self._left, timeout_s)
        late = sorted(self._left)
        if late:
            first = self._requests[late[0]]
            raise LateError(
                f"after {timeout_s:g} s, {len(late)} of {len(self._requests)} reads have not "
                f"arrived, among them {first.page} ({first.path} at byte {first.offset}); "
                "is the drive alive?",
                first.page,
                first.path,
            )
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
    """

    DEPTH: ClassVar[int] = 8  # a thread each; more of them compete with the host for Python's lock

    def __init__(self, memory: KvMemory, depth: int | None = None):
        depth = self.DEPTH if depth is None else depth
        if depth < 1:
            raise ValueError(f"the depth of reads must be at least 1, not {depth}")
        self.depth, self._memory = depth, memory
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loads: set[Load] = set()  # that have not arrived
        self._closed = False
        self._change = threading.Condition(threading.RLock())

    def start(self, reads: list[Read]) -> Load:
        """Ask for pages; returns at once."""
        requests = [piece for read in reads for piece in pieces(read)]
        load = Load(self, requests)
        with self._change:
            if self._closed:
                raise ValueError("the reader is closed")
            if requests:
                self._loads.add(load)
        for window in list(load._of_drive):
            mine = [(load, i, r) for i, r in enumerate(requests) if r.window is window]
            if window is None:
                self._go(mine)
                continue
            join = functools.partial(
                self._until, lambda window=window: not load._of_drive[window], None
            )
            window.begin(load, join, functools.partial(self._go, mine))
        return load

    def close(self) -> None:
        """End the reading and every load, without waiting for a drive that does not answer.

        What is with the drive may still be written to kv memory.
        """
        with self._change:
            self._closed = True
        for _ in self._threads:
            self._requests.put(None)
        self._end_all()

    def _go(self, requests: list[tuple[Load, int, Read]]) -> None:
        """Begin to read."""
        if self._closed:
            return
        while len(self._threads) < min(self.depth, len(requests)):
            thread = threading.Thread(target=self._work, name="nearkv-read", daemon=True)
            thread.start()
            self._threads.append(thread)
        for request in requests:
            self._requests.put(request)

    def _until(self, finished: Callable[[], bool], timeout_s: float | None) -> None:
        """Read on until `finished`, or until the time is up."""
        with self._change:
            self._change.wait_for(finished, timeout_s)

    def _finish(self, load: Load, index: int, error: FlashError | None) -> None:
        """A request has ended. Called with the lock."""
        if index not in load._left:
            return  # given up
        load._done(index, error)
        if not load._left:
            self._loads.discard(load)
        if not load._of_drive[load._requests[index].window]:
            self._change.notify_all()

    def _end_all(self) -> None:
        """Give up what has not arrived."""
        with self._change:
            for load in list(self._loads):
                for index in sorted(load._left):
                    request = load._requests[index]
                    error = FlashError(
                        "a read was given up: the card was closed or reset", page=request.page,
                        filename=request.path, offset=request.offset,
                    )  # fmt: skip
                    self._finish(load, index, error)

    def _work(self) -> None:
        while (work := self._requests.get()) is not None:
            load, index, request = work
            try:
                read_into(request, self._memory)
                error = None
            except FlashError as problem:
                error = problem
            except Exception as problem:  # a thread that dies would let its load wait for ever
                error = FlashError(
                    f"cannot read a KV page: {problem!r}", page=request.page,
                    filename=request.path, offset=request.offset,
                )  # fmt: skip
            with self._change:
                self._finish(load, index, error)
            del work, load, request, error


class UringReader(Reader):
    """Reads by io_uring: one thread gives the kernel what is asked for, and takes what has arrived.

    Not whoever asks: the kernel interrupts the one who submitted, who has a card to run.

    Raises
    ------
    OSError
        If io_uring cannot be used.
    """

    # What has arrived is replaced when this thread gets Python's lock, some requests later. With 8 at
    # once the drive had too few by then: decode got 0.87 to 0.96 of it, with 32 0.90 to 1.07.
    DEPTH = 32

    _lost: ClassVar[list] = []  # kv memories into which reads of closed readers may still write

    def __init__(self, memory: KvMemory, depth: int | None = None):
        super().__init__(memory, depth)
        self._ring = Uring(self.depth)
        self._address = memory.address
        self._keys = itertools.count()
        self._waiting: deque[tuple[Load, int, Read, int]] = deque()  # and how much has arrived
        self._sent: dict[int, tuple[Load, int, Read, int]] = {}  # by key, on their way

    def close(self) -> None:
        with self._change:
            if self._closed:
                return
            self._closed = True
            self._ring.wake()
        if self._threads:
            self._threads.pop().join()
        self._end_all()
        self._ring.close()

    def _go(self, requests) -> None:
        with self._change:
            if self._closed:
                return
            self._waiting.extend((*request, 0) for request in requests)
            if not self._threads:
                thread = threading.Thread(target=self._work, name="nearkv-read", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._ring.wake()

    def _work(self) -> None:
        try:
            while not self._closed:
                self._submit()
                self._ring.wait(None)
                self._reap()
            deadline = time.monotonic() + 0.1
            while self._sent and (left := deadline - time.monotonic()) > 0:
                self._ring.wait(left)
                self._reap()
        except Exception as error:  # or its loads would wait for ever
            log.error("io_uring failed: %r", error)
            self._closed = True
        if self._sent:
            self._lost.append(self._memory)
        self._end_all()

    def _submit(self) -> None:
        while self._waiting and len(self._sent) < self.depth:
            load, index, request, done = work = self._waiting.popleft()
            key = next(self._keys)
            self._sent[key] = work
            self._ring.read(
                key, request.fd, request.offset + done,
                self._address + request.kv_offset + done, request.nbytes - done,
            )  # fmt: skip
        self._ring.submit()

    def _reap(self) -> None:
        with self._change:
            for key, result in self._ring.completions():
                load, index, request, done = self._sent.pop(key)
                error, again = None, result in (-errno_codes.EINTR, -errno_codes.EAGAIN)
                try:
                    if result >= 0:
                        done = _advance(request, done, result)
                        again = done < request.nbytes
                    elif not again:
                        error = _failed(request, done, -result)
                except FlashError as problem:
                    error = problem
                if again:
                    self._waiting.appendleft((load, index, request, done))
                else:
                    self._finish(load, index, error)


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
    return reader_kind(kind)(memory, depth)


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
