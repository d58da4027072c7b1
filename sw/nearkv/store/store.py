# SPDX-License-Identifier: Apache-2.0
"""KV pages in files.

One file per sequence and shard. A *shard* is what one card serves, on one drive: a directory each, or
several shards in one directory. Inside a file every (layer, kv head) owns extents of at least 1 MiB,
preallocated so that its pages lie together on the drive and a full disk is noticed before anything is
written. Extents are also the unit of sharing: a new one goes to the shard that is behind in bytes of
its layer, because the cards work on one layer at a time. So heads, sequences and parts of long
sequences spread over the cards, whatever their lengths.

Beside the first shard's page files lie the indexes: one 64-byte record per page, with its own
checksum, written after the page's bytes. `KvStore(directory, ...)` on an existing directory reads it
back and stops at the first record that is torn. That is enough when a process is killed. Against the
loss of power, `flush` and `close` make the drive keep the pages, then the indexes, then the names of
new files. What is written after that may be lost, or an index may outlive the bytes of its page: then
the checksum tells, as for any damaged page. Temporary stores are not worth it.

With `delayed_bytes`, pages are packed, checksummed and written by a thread of their own, in windows in
which the drive does not read. Whoever asks for pages that are not written yet waits for them; what went
wrong is raised by the next call for that sequence, and the call after that tries again.
"""

from collections import deque
from collections.abc import Sequence
import contextlib
from dataclasses import dataclass, field
import errno
import fcntl
import itertools
import json
import logging
import mmap
import os
from pathlib import Path
import shutil
import tempfile
import threading
from typing import NamedTuple

import google_crc32c
import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import ABI_VERSION, PAGE_ALIGN_BYTES, Field, PageLayout, Record

from ..io import (
    FlashError,
    PageId,
    Read,
    Window,
    open_pages,
    read_into,
    reserve,
    write_from,
)

log = logging.getLogger("nearkv")

EXTENT_BYTES = 1 << 20  # at least; a drive reads an extent at its full rate
STAGING_BYTES = 8 << 20  # pages packed at once, and written in one window
DELAYED_BYTES = 128 << 20  # of K and V that may wait to be written
GATHER_S = 0.05  # how long the first of them waits for more, unless somebody asks for it
INDEX_ENTRY = Record(
    "index_entry",
    64,
    (
        Field("layer", 0, "I", ""),
        Field("kv_head", 4, "I", ""),
        Field("page", 8, "I", "number of the page within (layer, sequence, kv head)"),
        Field("page_len", 12, "I", "valid tokens"),
        Field("offset", 16, "Q", "of the page in its file"),
        Field("crc_k", 24, "I", "CRC-32C as in the page table"),
        Field("crc_v", 28, "I", ""),
        Field("shard", 32, "H", "whose file the page is in"),
        Field("check", 60, "I", "CRC-32C of the 60 bytes before"),
    ),
)
_INDEX = pages.record_dtype(INDEX_ENTRY)
# What the store knows of one page: what `abi.PAGE_ENTRY` needs, and where it lies.
STORED_PAGE = np.dtype(
    [("offset", "<i8"), ("page_len", "<u4"), ("crc_k", "<u4"), ("crc_v", "<u4"), ("shard", "<u2")]
)
_STORED_FIELDS = ("offset", "page_len", "crc_k", "crc_v", "shard")


@dataclass
class _Span:
    """The pages of one (layer, sequence), for all its kv heads."""

    pages: np.ndarray  # STORED_PAGE (n_kv_heads, capacity)
    n_pages: int = 0
    n_waiting: int = 0  # of these: spills that are not written yet
    placed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # bytes by shard


class _File:
    """The page files and the index file of one sequence."""

    def __init__(self, paths: list[Path], fds: list[int], index_fd: int):
        self.paths, self.fds, self.index_fd = paths, fds, index_fd
        self.index_path = paths[0].with_suffix(".index")
        self.spans: dict[int, _Span] = {}
        self.end_bytes = [0] * len(fds)  # of the extents
        self.index_bytes = 0
        self.unsafe = True  # there may be something that a loss of power would take
        self.error: FlashError | None = None  # of a spill, to be raised

    def close(self):
        for fd in (*self.fds, self.index_fd):
            os.close(fd)


class _Spill(NamedTuple):
    """Tokens on their way to flash."""

    file: _File
    span: _Span
    layer: int
    sequence: int
    first: int  # page
    k: np.ndarray  # uint16 (n_kv_heads, n_tokens, head_dim)
    v: np.ndarray


class KvStore:
    """Pages of K and V on flash, with what the card needs to know about each.

    Parameters
    ----------
    directory : path, or a sequence of them
        One for each shard, or one for all. Made if missing. An existing store with the same layout is
        opened with the pages it has. With `temporary`, the store lives in new directories inside,
        removed by `close`.
    layout : PageLayout
        head_dim, page_tokens and KV type of every page.
    n_kv_heads : int
    temporary : bool
    n_shards : int, optional
        Default: as many as there are directories.
    weights : sequence of float, optional
        How fast each shard is, in any unit; pages are shared out accordingly. Default: all alike.
    delayed_bytes : int
        How much K and V may wait to be written while others go on. 0: `append` writes.
    budget_bytes : int, optional
        Limit on what is written to flash in the life of this store.

    Attributes
    ----------
    bytes_given, bytes_written, index_bytes_written : int
        K and V of the tokens that were appended; bytes of pages and of indexes written for them.

    Raises
    ------
    FlashError
        If a directory cannot be written.
    ValueError
        If it holds a store of another layout.
    """

    def __init__(
        self,
        directory,
        layout: PageLayout,
        n_kv_heads: int,
        *,
        temporary: bool = False,
        n_shards: int | None = None,
        weights: Sequence[float] | None = None,
        delayed_bytes: int = 0,
        budget_bytes: int | None = None,
    ):
        self.layout, self.n_kv_heads = layout, n_kv_heads
        self.temporary, self.budget_bytes = temporary, budget_bytes
        several = not isinstance(directory, (str, os.PathLike))
        directories = [Path(one) for one in directory] if several else [Path(directory)]
        self.n_shards = len(directories) if n_shards is None else n_shards
        if len(directories) not in (1, self.n_shards) or self.n_shards < 1:
            raise ValueError(
                f"{self.n_shards} shards need one directory or {self.n_shards}, "
                f"not {len(directories)}"
            )
        if len({one.resolve() for one in directories}) < len(directories):
            raise ValueError("each shard needs a directory of its own, or all one directory")
        self.weights = np.ones(self.n_shards) if weights is None else np.asarray(weights, float)
        if self.weights.shape != (self.n_shards,) or not (self.weights > 0).all():
            raise ValueError(f"weights must be {self.n_shards} positive numbers, not {weights}")
        self.extent_pages = -(-EXTENT_BYTES // layout.page_bytes)
        self.bytes_given = self.bytes_written = self.index_bytes_written = 0
        self.epoch = 0  # how often pages have been taken back
        self._files: dict[int, _File] = {}
        self._direct = hasattr(os, "O_DIRECT")
        self._staging: mmap.mmap | None = None
        self._lock_fds: list[int] = []
        self._closed = False
        self._spills: deque[_Spill] = deque()
        self._delayed_bytes = delayed_bytes
        self._waiting_bytes = 0
        self._hurry = False  # somebody waits for the spills
        self._change = threading.Condition()
        self._writer: threading.Thread | None = None
        self.directories: list[Path] = []
        for path in directories:
            try:
                path.mkdir(parents=True, exist_ok=True)
                if temporary:
                    path = Path(tempfile.mkdtemp(prefix="nearkv-", dir=path))
                    _sweep(path.parent)
                self.directories.append(path)
                fd = os.open(path / "store.json", os.O_RDWR | os.O_CREAT, 0o644)
                self._lock_fds.append(fd)
            except OSError as error:
                self.close()
                raise FlashError(
                    "cannot write to the KV directory", errno=error.errno, filename=path,
                    remedy="choose another with directory= (--kv-dir)",
                ) from error  # fmt: skip
        self.directory = self.directories[0]
        windows: dict[int, Window] = {}  # one per drive
        self._windows = [
            windows.setdefault(os.fstat(fd).st_dev, Window()) for fd in self._lock_fds
        ] * (self.n_shards // len(self._lock_fds))
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Close every file; remove them all if the store is temporary. May be called twice.

        Raises
        ------
        FlashError
            If tokens that were to stay could not be written.
        """
        if self._closed:
            return
        self._closed = True
        with self._change:
            if self.temporary:
                self._forget(lambda spill: True)
            self._change.notify_all()
        if self._writer is not None:
            self._writer.join()  # it writes what it has
        failed = [file.error for file in self._files.values() if file.error is not None]
        try:
            self._keep()
        except FlashError as error:
            failed.append(error)
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._staging = None
        if self.temporary:
            for directory in self.directories:
                shutil.rmtree(directory, ignore_errors=True)
        for fd in self._lock_fds:
            os.close(fd)
        self._lock_fds = []
        if failed and not self.temporary:
            raise failed[0]

    # --- writing ----------------------------------------------------------------------------

    def append(self, sequence: int, layer: int, k, v, *, ragged: bool = False) -> None:
        """Write tokens behind those that (layer, sequence) has, for all kv heads.

        Either all of it is stored or, after an error, none.

        Parameters
        ----------
        k, v : (n_kv_heads, n_tokens, head_dim)
            Anything `pages.to_patterns` takes, uint16 patterns among it.
        ragged : bool
            Allow a last page that is not full. Nothing can be appended behind it.

        Raises
        ------
        ValueError
            If the shape is wrong or an element is Inf or NaN, naming the first.
        FlashError
            If the disk is full or fails.
        """
        page_tokens = self.layout.page_tokens
        self._raise_failed(sequence)
        k, v = self._patterns(k, v, sequence, layer)
        n_tokens = k.shape[1]
        if n_tokens % page_tokens and not ragged:
            raise ValueError(f"pages are written full: {page_tokens} tokens each, not {n_tokens}")
        n_new = -(-n_tokens // page_tokens)
        if n_new == 0:
            return
        file = self._file(sequence)
        span = self._span(file, layer)
        first = span.n_pages
        if first and span.pages[0, first - 1]["page_len"] < page_tokens:
            raise ValueError(f"the last page of layer {layer}, sequence {sequence} is ragged")
        self._check_budget(n_new, PageId(layer, sequence, 0, first))
        self._reserve(file, span, PageId(layer, sequence, 0, first), first + n_new)
        lengths = np.full(n_new, page_tokens)
        lengths[-1] = n_tokens - (n_new - 1) * page_tokens
        span.pages["page_len"][:, first : first + n_new] = lengths
        if self._delayed_bytes:
            self._delay(_Spill(file, span, layer, sequence, first, k.copy(), v.copy()))
        else:
            self._write([_Spill(file, span, layer, sequence, first, k, v)])
            span.n_pages = first + n_new
        self.bytes_given += k.nbytes + v.nbytes

    def truncate(self, sequence: int, layer: int, n_pages: int) -> None:
        """Forget the pages from `n_pages` on; their space is used again. Not kept in the index."""
        self.settle(sequence, layer)
        span = self._span(self._file(sequence), layer)
        if n_pages < span.n_pages:
            span.n_pages = n_pages
            self.epoch += 1

    def drop(self, sequence: int) -> None:
        """Delete a sequence and its files."""
        file = self._files.get(sequence)
        if file is None:
            return

        def gone():
            self._forget(lambda spill: spill.file is file)
            return not any(span.n_waiting for span in file.spans.values())

        with self._change:
            self._change.wait_for(gone)
        del self._files[sequence]
        self.epoch += 1
        file.close()
        for path in (*file.paths, file.index_path):
            path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Write everything that waits to be written, and make the drive keep it.

        Raises
        ------
        FlashError
            The first thing that went wrong.
        """
        for sequence, file in list(self._files.items()):
            for layer in list(file.spans):
                self.settle(sequence, layer)
        self._keep()

    def settle(self, sequence: int, layer: int) -> None:
        """Wait until every page of (layer, sequence) is written.

        Raises
        ------
        FlashError
            If that failed. The next call tries again.
        """
        file = self._files.get(sequence)
        if file is None:
            return
        self._raise_failed(sequence)
        span = file.spans.get(layer)
        if span is None or not span.n_waiting:
            return
        with self._change:
            self._hurry = True
            self._change.notify_all()
            self._change.wait_for(lambda: not span.n_waiting or file.error is not None)
        self._raise_failed(sequence)

    def settled(self, sequence: int, layer: int) -> bool:
        """Whether every page of (layer, sequence) is written."""
        file = self._files.get(sequence)
        span = file.spans.get(layer) if file else None
        return span is None or not span.n_waiting

    @property
    def write_amplification(self) -> float:
        """Bytes written for each byte of K and V that was given. 0 before the first."""
        written = self.bytes_written + self.index_bytes_written
        return written / self.bytes_given if self.bytes_given else 0.0

    # --- reading ----------------------------------------------------------------------------

    def sequences(self) -> list[int]:
        """Those that have pages."""
        return sorted(self._files)

    def layers(self, sequence: int) -> list[int]:
        """Those that have pages of a sequence."""
        return sorted(self._files[sequence].spans)

    def n_pages(self, sequence: int, layer: int) -> int:
        """Pages that each kv head of (layer, sequence) has."""
        file = self._files.get(sequence)
        span = file.spans.get(layer) if file else None
        return span.n_pages if span else 0

    def stored(self, sequence: int, layer: int) -> np.ndarray:
        """What is known of the pages: STORED_PAGE (n_kv_heads, n_pages), a view.

        Waits until they are written; raises FlashError if that failed.
        """
        self.settle(sequence, layer)
        if self.n_pages(sequence, layer) == 0:
            return np.zeros((self.n_kv_heads, 0), STORED_PAGE)
        span = self._files[sequence].spans[layer]
        return span.pages[:, : span.n_pages]

    def reads(self, page: PageId, numbers: np.ndarray, kv_offset: int) -> list[Read]:
        """The reads that bring pages to kv memory, one behind the other.

        One read per run of pages that lie together in the file, 1 MiB or more where they fill
        their extents.

        Parameters
        ----------
        page : PageId
            Layer, sequence and kv head are what counts.
        numbers : ints, ascending
            Which of its pages.
        kv_offset : int
        """
        file = self._files[page.sequence]
        page_bytes = self.layout.page_bytes
        numbers = np.asarray(numbers)
        entries = file.spans[page.layer].pages[page.kv_head][numbers]
        offsets, shards = entries["offset"], entries["shard"]
        apart = (np.diff(offsets) != page_bytes) | (np.diff(numbers) != 1) | (np.diff(shards) != 0)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(numbers)]
        reads = []
        for a, b in itertools.pairwise(edges):
            shard = int(shards[a])
            reads.append(
                Read(file.fds[shard], file.paths[shard], int(offsets[a]), (b - a) * page_bytes,
                     kv_offset + a * page_bytes, page._replace(page=int(numbers[a])), page_bytes,
                     self._windows[shard])
            )  # fmt: skip
        return reads

    def read_pages(self, page: PageId, n_pages: int) -> np.ndarray:
        """Pages as the host sees them, for tests and for taking tokens back: checked by CRC.

        Returns
        -------
        uint8 (n_pages, page_bytes)

        Raises
        ------
        FlashError
            If the file is shorter than it should be, or a checksum differs.
        """
        page_bytes = self.layout.page_bytes
        buffer = mmap.mmap(-1, n_pages * page_bytes)
        data = np.frombuffer(buffer, np.uint8)
        self.settle(page.sequence, page.layer)
        for read in self.reads(page, np.arange(page.page, page.page + n_pages), 0):
            with read.window.reading() if read.window else contextlib.nullcontext():
                read_into(read, data)
        data = data.reshape(n_pages, page_bytes)
        stored = self.stored(page.sequence, page.layer)[page.kv_head, page.page :][:n_pages]
        for i, entry in enumerate(stored):
            crcs = pages.checksums(self.layout, data[i], int(entry["page_len"]))
            if crcs != (entry["crc_k"], entry["crc_v"]):
                raise FlashError(
                    "the page's bytes have changed: CRC-32C mismatch",
                    page=page._replace(page=page.page + i),
                    filename=self._files[page.sequence].paths[entry["shard"]],
                    offset=int(entry["offset"]),
                )  # fmt: skip
        return data

    def locate(self, page: PageId) -> tuple[Path, int]:
        """File and byte offset of a page, for error messages."""
        entry = self.stored(page.sequence, page.layer)[page.kv_head, page.page]
        return self._files[page.sequence].paths[entry["shard"]], int(entry["offset"])

    # --- inside -----------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write, or compare with, the store's description; read what it has."""
        about = {
            "format": 1, "abi_version": ABI_VERSION, "head_dim": self.layout.head_dim,
            "page_tokens": self.layout.page_tokens, "kv_type": self.layout.kv_type.name,
            "n_kv_heads": self.n_kv_heads, "n_shards": self.n_shards,
        }  # fmt: skip
        for position, (fd, directory) in enumerate(
            zip(self._lock_fds, self.directories, strict=True)
        ):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FlashError(
                    "the KV store is in use", filename=directory, remedy="choose another directory"
                ) from None
            text = os.pread(fd, 1 << 16, 0)
            mine = {**about, "directory": position}
            if not text:
                os.pwrite(fd, json.dumps(mine, indent=1).encode(), 0)
            elif (found := json.loads(text)) != mine:
                raise ValueError(
                    f"{directory} holds a store with {found}, not {mine}; choose another directory"
                )
        for index in sorted(self.directory.glob("sequence-*.index")):
            self._reopen(int(index.stem.removeprefix("sequence-")))

    def _patterns(self, k, v, sequence, layer):
        kv_type = self.layout.kv_type
        shape = (self.n_kv_heads, k.shape[1] if len(k.shape) == 3 else -1, self.layout.head_dim)
        if tuple(k.shape) != shape or tuple(v.shape) != shape:
            raise ValueError(
                f"k and v must have shape (n_kv_heads={self.n_kv_heads}, n_tokens, "
                f"head_dim={self.layout.head_dim}), not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        done = int(self.stored(sequence, layer)[0]["page_len"].sum())
        out = []
        for name, x in (("K", k), ("V", v)):
            patterns = pages.to_patterns(x, kv_type, patterns=True)
            at = pages.first_non_finite(patterns, kv_type)
            if at is not None:
                head, token, channel = at
                raise ValueError(
                    f"Inf or NaN in {name} of layer {layer}, sequence {sequence}, kv head {head}, "
                    f"token {done + token}, channel {channel}: "
                    f"{pages.cause_of_non_finite(x, at, kv_type)}"
                )
            out.append(patterns)
        return out

    def _file(self, sequence: int, *, create: bool = True) -> _File:
        file = self._files.get(sequence)
        if file is not None:
            return file
        paths = []
        for shard in range(self.n_shards):
            directory = self.directories[shard % len(self.directories)]
            part = f".{shard}" if shard else ""
            paths.append(directory / f"sequence-{sequence:06d}{part}.kv")
        with contextlib.ExitStack() as opened:
            fds = []
            for path in paths:
                fd, direct = open_pages(path, create=create, direct=self._direct)
                opened.callback(os.close, fd)
                fds.append(fd)
                if self._direct and not direct:
                    self._direct = False
                    log.warning(
                        "%s: the file system has no O_DIRECT; pages go through the page cache",
                        path.parent,
                    )
            index_fd, _ = open_pages(paths[0].with_suffix(".index"), create=create, direct=False)
            opened.pop_all()
        file = self._files[sequence] = _File(paths, fds, index_fd)
        return file

    def _span(self, file: _File, layer: int) -> _Span:
        if layer not in file.spans:
            file.spans[layer] = _Span(
                np.zeros((self.n_kv_heads, 0), STORED_PAGE),
                placed=np.zeros(self.n_shards, np.int64),
            )
        return file.spans[layer]

    def _check_budget(self, n_new: int, page: PageId) -> None:
        if self.budget_bytes is None:
            return
        nbytes = n_new * self.n_kv_heads * self.layout.page_bytes
        used = self.bytes_written + self._waiting_bytes
        if used + nbytes > self.budget_bytes:
            raise FlashError(
                f"{used} of {self.budget_bytes} bytes that may be written are used, and "
                f"{nbytes} more are needed", page=page, errno=errno.EDQUOT, filename=self.directory,
                remedy="what is stored already is untouched; raise the write budget",
            )  # fmt: skip

    def _reserve(self, file: _File, span: _Span, page: PageId, n_pages: int) -> None:
        """Give every kv head the extents for `n_pages` pages, on the disk and in the table."""
        heads, page_bytes = self.n_kv_heads, self.layout.page_bytes
        have = span.pages.shape[1] // self.extent_pages
        need = -(-n_pages // self.extent_pages) - have
        if need <= 0:
            return
        extent_bytes = self.extent_pages * page_bytes
        # Of this layer, in all sequences: what the cards attend to together.
        placed = np.zeros(self.n_shards, np.int64)
        for other in self._files.values():
            if page.layer in other.spans:
                placed += other.spans[page.layer].placed
        shards = np.zeros((heads, need), np.int64)
        added = np.zeros(self.n_shards, np.int64)
        for head in range(heads):
            for extent in range(need):
                nbytes = page_bytes * min(
                    self.extent_pages, n_pages - (have + extent) * self.extent_pages
                )
                shard = int(np.argmin((placed + added + nbytes) / self.weights))
                shards[head, extent] = shard
                added[shard] += nbytes
        ends = list(file.end_bytes)
        starts = np.zeros((heads, need), np.int64)
        for shard in range(self.n_shards):
            mine = shards == shard
            count = int(mine.sum())
            if count:
                reserve(file.fds[shard], file.paths[shard], ends[shard], count * extent_bytes, page)
                starts[mine] = ends[shard] + np.arange(count) * extent_bytes
                ends[shard] += count * extent_bytes
        file.end_bytes = ends
        span.placed = span.placed + added
        grown = np.zeros((heads, (have + need) * self.extent_pages), STORED_PAGE)
        grown[:, : span.pages.shape[1]] = span.pages
        new = grown[:, span.pages.shape[1] :]
        within = np.arange(self.extent_pages, dtype=np.int64) * page_bytes
        new["offset"] = (starts[..., None] + within).reshape(heads, -1)
        new["shard"] = shards.repeat(self.extent_pages, axis=1)
        span.pages = grown

    # --- writing pages, perhaps later ---------------------------------------------------------

    def _delay(self, spill: _Spill) -> None:
        nbytes = spill.k.nbytes + spill.v.nbytes
        with self._change:
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write_delayed, name="nearkv-write", daemon=True
                )
                self._writer.start()
            fits = lambda: (  # noqa: E731
                not self._spills
                or self._waiting_bytes + nbytes <= self._delayed_bytes
                or spill.file.error is not None
            )
            if not fits():
                self._hurry = True
                self._change.notify_all()
                self._change.wait_for(fits)
            spill.span.n_waiting += 1
            spill.span.n_pages += -(-spill.k.shape[1] // self.layout.page_tokens)
            self._spills.append(spill)
            self._waiting_bytes += nbytes
            self._change.notify_all()

    def _forget(self, which) -> None:
        """Drop spills that the writer has not begun. Called with the lock."""
        for spill in [spill for spill in self._spills if which(spill)]:
            self._spills.remove(spill)
            spill.span.n_waiting -= 1
            self._waiting_bytes -= spill.k.nbytes + spill.v.nbytes

    def _keep(self) -> None:
        """Make the drives keep what is written: pages before the indexes that name them."""
        unsafe = [file for file in self._files.values() if file.unsafe]
        if self.temporary or not unsafe:
            return
        for file in unsafe:
            file.unsafe = False  # what is written from now on needs another time
        kept = [
            (fd, path) for file in unsafe for fd, path in zip(file.fds, file.paths, strict=True)
        ]
        kept += [(file.index_fd, file.index_path) for file in unsafe]
        kept += zip(self._lock_fds, self.directories, strict=True)
        try:
            for fd, path in kept:
                _keep_file(fd, path)
            for path in self.directories:
                fd = os.open(path, os.O_RDONLY)
                try:
                    _keep_file(fd, path)
                finally:
                    os.close(fd)
        except FlashError:
            for file in unsafe:
                file.unsafe = True
            raise

    def _raise_failed(self, sequence: int) -> None:
        """Raise what went wrong with this sequence, once; the writer tries again then."""
        file = self._files.get(sequence)
        if file is not None and file.error is not None:
            with self._change:
                error, file.error = file.error, None
                self._change.notify_all()
            raise error

    def _write_delayed(self) -> None:
        """The writer's thread."""
        while spills := self._next_spills():
            outcomes = self._attempt(spills)
            with self._change:
                for spill, error in reversed(outcomes):
                    if error is None:
                        spill.span.n_waiting -= 1
                        self._waiting_bytes -= spill.k.nbytes + spill.v.nbytes
                    else:
                        spill.file.error = error
                        self._spills.appendleft(spill)
                self._change.notify_all()

    def _next_spills(self) -> list[_Spill]:
        """Wait for spills that are worth a window; none when the store is closed."""

        def ready():
            # Those of a sequence that failed wait until somebody has heard of it.
            return [spill for spill in self._spills if spill.file.error is None]

        with self._change:
            while True:
                self._change.wait_for(lambda: ready() or self._closed)
                self._change.wait_for(
                    lambda: self._hurry or self._closed or self._waiting_bytes >= STAGING_BYTES,
                    GATHER_S,
                )
                self._hurry = False
                spills = ready()
                for spill in spills:
                    self._spills.remove(spill)
                if spills or self._closed:
                    return spills
                # Their sequence was dropped meanwhile; others will come.

    def _attempt(self, spills: list[_Spill]) -> list[tuple[_Spill, FlashError | None]]:
        """Write spills together; if that fails one by one, so that only the broken ones suffer."""
        outcomes: list[tuple[_Spill, FlashError | None]] = []
        failed: dict[int, FlashError] = {}  # by file: what comes behind a gap is not written
        for batch in [spills] if len(spills) == 1 else [spills, *([spill] for spill in spills)]:
            spill = batch[0]
            error = failed.get(id(spill.file)) if len(batch) == 1 else None
            if error is None:
                try:
                    self._write(batch)
                    if len(batch) == len(spills):
                        return [(spill, None) for spill in spills]
                except FlashError as problem:
                    error = problem
                except Exception as problem:  # or everybody would wait for ever
                    error = FlashError(
                        f"cannot write KV pages: {problem!r}",
                        page=PageId(spill.layer, spill.sequence, 0, spill.first),
                        filename=spill.file.paths[0],
                    )
            if len(batch) == 1:
                outcomes.append((spill, error))
                if error is not None:
                    failed[id(spill.file)] = error
        return outcomes

    def _write(self, spills: list[_Spill]) -> None:
        """Pack, checksum and write; then the index entries."""
        heads, page_bytes = self.n_kv_heads, self.layout.page_bytes
        step = max(1, STAGING_BYTES // (heads * page_bytes))
        if self._staging is None:
            # Anonymous memory starts on a page boundary, as O_DIRECT wants.
            self._staging = mmap.mmap(-1, max(STAGING_BYTES, heads * page_bytes))
        staging = np.frombuffer(self._staging, np.uint8)
        writes, used = [], 0
        for spill in spills:
            n_new = -(-spill.k.shape[1] // self.layout.page_tokens)
            for at in range(0, n_new, step):
                count = min(step, n_new - at)
                nbytes = heads * count * page_bytes
                if used + nbytes > len(staging):
                    self._write_window(writes)
                    writes, used = [], 0
                data = staging[used : used + nbytes].reshape(heads, count, page_bytes)
                used += nbytes
                writes += self._pack(spill, at, count, data)
        self._write_window(writes)
        for spill in spills:
            n_new = -(-spill.k.shape[1] // self.layout.page_tokens)
            self._write_index(
                spill.file, spill.span, spill.layer, spill.sequence, spill.first, n_new
            )

    def _pack(self, spill: _Spill, at: int, count: int, data: np.ndarray) -> list[tuple]:
        """Pages `at` .. of a spill into `data`; which runs of them go where, as (shard, what)."""
        layout, file = self.layout, spill.file
        tokens = slice(at * layout.page_tokens, (at + count) * layout.page_tokens)
        pages.pack(layout, spill.k[:, tokens], spill.v[:, tokens], data)
        first = spill.first + at
        entries = spill.span.pages[:, first : first + count]
        runs = []
        for head in range(self.n_kv_heads):
            for i in range(count):
                entry = entries[head, i]
                crcs = pages.checksums(layout, data[head, i], int(entry["page_len"]))
                entry["crc_k"], entry["crc_v"] = crcs
            # Runs of pages that lie together: a head's extents may be apart.
            offsets, shards = entries["offset"][head], entries["shard"][head]
            apart = (np.diff(offsets) != layout.page_bytes) | (np.diff(shards) != 0)
            for a, b in itertools.pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), count]):
                shard, page = int(shards[a]), PageId(spill.layer, spill.sequence, head, first + a)
                what = (file.fds[shard], file.paths[shard], int(offsets[a]), data[head, a:b], page)
                runs.append((shard, what))
        return runs

    def _write_window(self, writes: list[tuple]) -> None:
        """Write runs of pages while their drives do not read."""
        for window in dict.fromkeys(self._windows):
            mine = [what for shard, what in writes if self._windows[shard] is window]
            if mine:
                with window.writing():
                    for what in mine:
                        write_from(*what)
                        self.bytes_written += what[3].nbytes

    def _write_index(self, file, span, layer, sequence, first, count) -> None:
        """Append the records of new pages; the pages themselves are in their file by now."""
        entries = np.zeros((self.n_kv_heads, count), _INDEX)
        stored = span.pages[:, first : first + count]
        entries["layer"] = layer
        entries["kv_head"] = np.arange(self.n_kv_heads)[:, None]
        entries["page"] = first + np.arange(count)
        for name in _STORED_FIELDS:
            entries[name] = stored[name]
        records = entries.reshape(-1)
        raw = records.view(np.uint8).reshape(-1, INDEX_ENTRY.bytes)
        records["check"] = [google_crc32c.value(row[:60].tobytes()) for row in raw]
        page = PageId(layer, sequence, 0, first)
        write_from(file.index_fd, file.index_path, file.index_bytes, raw, page)
        file.index_bytes += raw.nbytes
        file.unsafe = True
        self.index_bytes_written += raw.nbytes

    def _reopen(self, sequence: int) -> None:
        """Rebuild the table of a sequence from its index."""
        file = self._file(sequence, create=False)
        raw = np.fromfile(file.index_path, np.uint8)
        raw = raw[: len(raw) // INDEX_ENTRY.bytes * INDEX_ENTRY.bytes]
        entries = raw.view(_INDEX)
        rows = raw.reshape(-1, INDEX_ENTRY.bytes)
        checks = [google_crc32c.value(row[:60].tobytes()) for row in rows]
        good = np.array(checks, np.uint32) == entries["check"]
        entries = entries[: len(entries) if good.all() else int(np.argmin(good))]
        file.index_bytes = entries.nbytes  # what is torn is overwritten
        heads, page_bytes = self.n_kv_heads, self.layout.page_bytes
        for layer in np.unique(entries["layer"]):
            mine = entries[entries["layer"] == layer]
            span = self._span(file, int(layer))
            # A torn append may have left pages of some heads only: count what all heads have.
            complete = [len(np.unique(mine["page"][mine["kv_head"] == h])) for h in range(heads)]
            span.n_pages = min(complete)
            n_extents = -(-span.n_pages // self.extent_pages)
            span.pages = np.zeros((heads, n_extents * self.extent_pages), STORED_PAGE)
            mine = mine[mine["page"] < span.n_pages]
            for name in _STORED_FIELDS:
                span.pages[name][mine["kv_head"], mine["page"]] = mine[name]
            used = span.pages["shard"][:, : span.n_pages]
            span.placed += np.bincount(used.ravel(), minlength=self.n_shards) * page_bytes
            extents = span.pages[:, :: self.extent_pages].copy()
            within = np.arange(self.extent_pages, dtype=np.int64) * page_bytes
            span.pages["offset"] = (extents["offset"][..., None] + within).reshape(heads, -1)
            span.pages["shard"] = extents["shard"].repeat(self.extent_pages, axis=1)
        for shard, fd in enumerate(file.fds):
            # Behind everything, what was reserved and not used among it.
            end = os.fstat(fd).st_size
            for span in file.spans.values():
                theirs = span.pages["offset"][span.pages["shard"] == shard]
                end = max(end, int(theirs.max(initial=-page_bytes)) + page_bytes)
            file.end_bytes[shard] = -(-end // PAGE_ALIGN_BYTES) * PAGE_ALIGN_BYTES


def _keep_file(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise FlashError(
            "the drive may not keep what was written since the last flush", errno=error.errno,
            filename=path, remedy="keep the sequences' tokens, to compute them again if need be",
        ) from error  # fmt: skip


def _sweep(directory: Path) -> None:
    """Remove temporary stores whose process has ended without closing them."""
    for about in directory.glob("nearkv-*/store.json"):
        try:
            fd = os.open(about, os.O_RDWR)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Empty: its process is between making the file and locking it.
            if os.fstat(fd).st_size:
                shutil.rmtree(about.parent, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(fd)
