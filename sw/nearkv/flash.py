# SPDX-License-Identifier: Apache-2.0
"""Flash: which page, how to read and write it, and what to say when the drive fails.

The only code that opens page files. They are opened past the page cache (O_DIRECT) where the file
system allows it: pages are read once per token, by the card, and would push out everything else.
"""

from collections.abc import Iterator
import contextlib
import errno as errno_codes
import os
from pathlib import Path
import queue
import threading
from typing import NamedTuple

import numpy as np

from nearkv_hw.abi import PAGE_ALIGN_BYTES

from .buffers import KvMemory

# Of one request to the drive. Larger ones gain nothing and make the ends of a burst ragged.
READ_BYTES = 1 << 20
READS_IN_FLIGHT = 8


class PageId(NamedTuple):
    """Which page: its (layer, sequence, kv head) and its number within that."""

    layer: int
    sequence: int
    kv_head: int
    page: int

    def __str__(self):
        return (
            f"page {self.page} of layer {self.layer}, sequence {self.sequence}, "
            f"kv head {self.kv_head}"
        )


class FlashError(OSError):
    """Page files could not be written or read.

    Attributes
    ----------
    page : PageId or None
    errno : int or None
        As in OSError.
    filename : str
    offset : int or None
        Byte offset in the file.
    """

    def __init__(self, what, *, page=None, errno=None, filename=None, offset=None, remedy=None):
        super().__init__(errno, what, None if filename is None else str(filename))
        self.page, self.offset = page, offset
        where = [str(page)] if page else []
        if filename is not None:
            where.append(f"file {filename}" + (f" at byte {offset}" if offset is not None else ""))
        reason = f": {os.strerror(errno)}" if errno else ""
        self.message = f"{what}{' (' + ', '.join(where) + ')' if where else ''}{reason}"
        if remedy:
            self.message += f"; {remedy}"

    def __str__(self):
        return self.message


class Window:
    """Keeps reads and writes of one drive apart: many readers, or one writer, who goes first.

    A drive that does both at once does both badly (bursts of reads lose more than half their rate),
    so writes gather until they are worth a window of their own.
    """

    def __init__(self):
        self._change = threading.Condition()
        self._readers = self._writers_waiting = 0
        self._writing = False

    def begin_read(self) -> None:
        with self._change:
            while self._writing or self._writers_waiting:
                self._change.wait()
            self._readers += 1

    def end_read(self) -> None:
        with self._change:
            self._readers -= 1
            if not self._readers and self._writers_waiting:
                self._change.notify_all()

    @contextlib.contextmanager
    def writing(self):
        with self._change:
            self._writers_waiting += 1
            while self._writing or self._readers:
                self._change.wait()
            self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._change:
                self._writing = False
                self._change.notify_all()


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


def open_pages(path: Path, *, create: bool, direct: bool) -> tuple[int, bool]:
    """Open a page file; its descriptor, and whether it is past the page cache.

    Raises
    ------
    FlashError
        If it cannot be opened, or does not exist and `create` is not set.
    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    try:
        if direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o644), True
            except OSError as error:
                if error.errno != errno_codes.EINVAL:
                    raise
        return os.open(path, flags, 0o644), False
    except OSError as error:
        raise FlashError("cannot open a page file", errno=error.errno, filename=path) from error


def reserve(fd: int, path: Path, offset: int, nbytes: int, page: PageId) -> None:
    """Make the drive set `nbytes` at `offset` aside for pages from `page` on.

    Raises
    ------
    FlashError
        If it has no room.
    """
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:
        raise FlashError(
            f"no room for {nbytes >> 20} MiB more of KV pages", page=page, errno=error.errno,
            filename=path, offset=offset,
            remedy="what is stored already is untouched; free some space or choose another "
            "directory (--kv-dir)",
        ) from error  # fmt: skip


def write_from(fd: int, path: Path, offset: int, data: np.ndarray, page: PageId) -> None:
    """Write whole pages: uint8 `data`, aligned to 4096 bytes, contiguous.

    Raises
    ------
    FlashError
        If the drive fails.
    """
    view = data.reshape(-1).data
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            raise FlashError(
                "cannot write KV pages", page=page, errno=error.errno, filename=path,
                offset=offset + done, remedy="what is stored already is untouched",
            ) from error  # fmt: skip


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
    if read.window is None:
        _read_all(read, view)
        return
    read.window.begin_read()
    try:
        _read_all(read, view)
    finally:
        read.window.end_read()


def _read_all(read: Read, view) -> None:
    done = 0
    while done < read.nbytes:
        try:
            got = os.preadv(read.fd, [view[done:] if done else view], read.offset + done)
        except OSError as error:
            raise FlashError(
                "cannot read a KV page", page=read.page_at(done), errno=error.errno,
                filename=read.path, offset=read.offset + done,
            ) from error  # fmt: skip
        done += got
        if got == 0 or done % PAGE_ALIGN_BYTES:  # only the end of the file is not aligned
            raise FlashError(
                f"the page file ends {read.nbytes - done} bytes too early; it was truncated",
                page=read.page_at(done), filename=read.path, offset=read.offset + done,
                remedy="the sequence has to be computed again",
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

    def __init__(self, reads: list[Read]):
        self.nbytes = sum(read.nbytes for read in reads)
        self._left = set(range(len(reads)))
        self._reads = reads
        self._error: FlashError | None = None
        self._error_index = len(reads)
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        if not reads:
            self._arrived.set()

    def _done(self, index: int, error: FlashError | None) -> None:
        with self._lock:
            self._left.discard(index)
            # The first in the order of the request, so that the same fault gives the same error.
            if error is not None and index < self._error_index:
                self._error, self._error_index = error, index
            if not self._left:
                self._arrived.set()

    @property
    def arrived(self) -> bool:
        """Whether every read has ended, well or not."""
        return self._arrived.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every read has ended.

        Raises
        ------
        FlashError
            The first that a read raised.
        TimeoutError
            Naming what has not arrived. It may do so at any later time.
        """
        if not self._arrived.wait(timeout_s):
            with self._lock:
                late = [self._reads[index] for index in sorted(self._left)]
            if late:
                first = late[0]
                raise TimeoutError(
                    f"after {timeout_s:g} s, {len(late)} of {len(self._reads)} reads have not "
                    f"arrived, among them {first.page} ({first.path} at byte {first.offset}); "
                    "is the drive alive?"
                )
        if self._error is not None:
            raise self._error


class Reader:
    """Reads pages into one card's kv memory, at most `depth` requests at a time.

    Threads with preadv, which leave Python's lock while the drive works.
    """

    def __init__(self, memory: KvMemory, depth: int = READS_IN_FLIGHT):
        if depth < 1:
            raise ValueError(f"the depth of reads must be at least 1, not {depth}")
        self.depth, self._memory = depth, memory
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, reads: list[Read]) -> Load:
        """Ask for pages; returns at once."""
        requests = [piece for read in reads for piece in pieces(read)]
        load = Load(requests)
        while len(self._threads) < min(self.depth, len(requests)):
            thread = threading.Thread(target=self._work, name="nearkv-read", daemon=True)
            thread.start()
            self._threads.append(thread)
        for index, request in enumerate(requests):
            self._requests.put((load, index, request))
        return load

    def close(self) -> None:
        """End the threads, without waiting for a drive that does not answer."""
        for _ in self._threads:
            self._requests.put(None)
        self._threads = []

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
            load._done(index, error)
            del work, load, request, error
