# SPDX-License-Identifier: Apache-2.0
"""KV pages in files.

One file per sequence. Inside it every (layer, kv head) owns extents of at least 1 MiB, preallocated
so that its pages lie together on the drive and a full disk is noticed before anything is written.

Beside each page file lies its index: one 64-byte record per page, with its own checksum, written
after the page's bytes. `KvStore(directory, ...)` on an existing directory reads it back and stops at
the first record that is torn.
"""

from dataclasses import dataclass
import fcntl
import itertools
import json
import logging
import mmap
import os
from pathlib import Path
import shutil
import tempfile

import google_crc32c
import numpy as np

from nearkv_hw.abi import ABI_VERSION, PAGE_ALIGN_BYTES, Field, PageLayout, Record

from . import pages
from .flash import FlashError, PageId, Read, open_pages, read_into, reserve, write_from

log = logging.getLogger("nearkv")

EXTENT_BYTES = 1 << 20  # at least; a drive reads an extent at its full rate
STAGING_BYTES = 8 << 20  # pages packed at once
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
        Field("check", 60, "I", "CRC-32C of the 60 bytes before"),
    ),
)
_INDEX = pages.record_dtype(INDEX_ENTRY)
# What the store knows of one page: what `abi.PAGE_ENTRY` needs, and where it lies.
STORED_PAGE = np.dtype([("offset", "<i8"), ("page_len", "<u4"), ("crc_k", "<u4"), ("crc_v", "<u4")])


_STORED_FIELDS = ("offset", "page_len", "crc_k", "crc_v")


@dataclass
class _Span:
    """The pages of one (layer, sequence), for all its kv heads."""

    pages: np.ndarray  # STORED_PAGE (n_kv_heads, capacity)
    extents: np.ndarray  # int64 (n_kv_heads, n_extents): file offsets
    n_pages: int = 0


class _File:
    """The page file and index file of one sequence."""

    def __init__(self, path: Path, fd: int, index_fd: int):
        self.path, self.fd, self.index_fd = path, fd, index_fd
        self.spans: dict[int, _Span] = {}
        self.end_bytes = 0  # of the extents
        self.index_bytes = 0

    def close(self):
        os.close(self.fd)
        os.close(self.index_fd)


class KvStore:
    """Pages of K and V on flash, with what the card needs to know about each.

    Parameters
    ----------
    directory : path
        Made if missing. An existing store with the same layout is opened with the pages it has.
        With `temporary`, the store lives in a new directory inside it, removed by `close`.
    layout : PageLayout
        head_dim, page_tokens and KV type of every page.
    n_kv_heads : int
    temporary : bool

    Raises
    ------
    FlashError
        If the directory cannot be written.
    ValueError
        If it holds a store of another layout.
    """

    def __init__(self, directory, layout: PageLayout, n_kv_heads: int, *, temporary: bool = False):
        self.layout, self.n_kv_heads = layout, n_kv_heads
        self.temporary = temporary
        page_bytes = layout.page_bytes
        self.extent_pages = -(-EXTENT_BYTES // page_bytes)
        self.bytes_written = 0
        self._files: dict[int, _File] = {}
        self._direct = hasattr(os, "O_DIRECT")
        self._staging: mmap.mmap | None = None
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if temporary:
                directory = Path(tempfile.mkdtemp(prefix="nearkv-", dir=directory))
                _sweep(directory.parent)
            self.directory = directory
            self._lock_fd = os.open(directory / "store.json", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FlashError(
                "cannot write to the KV directory", errno=error.errno, filename=directory,
                remedy="choose another with directory= (--kv-dir)",
            ) from error  # fmt: skip
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
        """Close every file; remove them all if the store is temporary. May be called twice."""
        if self._lock_fd < 0:
            return
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._staging = None
        if self.temporary:
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

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
        layout, page_tokens = self.layout, self.layout.page_tokens
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
        self._reserve(file, span, PageId(layer, sequence, 0, first), first + n_new)
        step = max(1, STAGING_BYTES // (self.n_kv_heads * layout.page_bytes))
        for at in range(0, n_new, step):
            count = min(step, n_new - at)
            tokens = slice(at * page_tokens, (at + count) * page_tokens)
            self._write_pages(file, span, layer, sequence, first + at, k[:, tokens], v[:, tokens])
        self._write_index(file, span, layer, sequence, first, n_new)
        span.n_pages = first + n_new

    def truncate(self, sequence: int, layer: int, n_pages: int) -> None:
        """Forget the pages from `n_pages` on; their space is used again. Not kept in the index."""
        span = self._span(self._file(sequence), layer)
        span.n_pages = min(span.n_pages, n_pages)

    def drop(self, sequence: int) -> None:
        """Delete a sequence and its files."""
        file = self._files.pop(sequence, None)
        if file is not None:
            file.close()
            file.path.unlink(missing_ok=True)
            file.path.with_suffix(".index").unlink(missing_ok=True)

    # --- reading ----------------------------------------------------------------------------

    def n_pages(self, sequence: int, layer: int) -> int:
        """Pages that each kv head of (layer, sequence) has."""
        file = self._files.get(sequence)
        span = file.spans.get(layer) if file else None
        return span.n_pages if span else 0

    def stored(self, sequence: int, layer: int) -> np.ndarray:
        """What is known of the pages: STORED_PAGE (n_kv_heads, n_pages), a view."""
        if self.n_pages(sequence, layer) == 0:
            return np.zeros((self.n_kv_heads, 0), STORED_PAGE)
        span = self._files[sequence].spans[layer]
        return span.pages[:, : span.n_pages]

    def reads(self, page: PageId, n_pages: int, kv_offset: int) -> list[Read]:
        """The reads that bring `n_pages` pages from `page` on to kv memory, one behind the other.

        One read per run of pages that lie together in the file, 1 MiB or more where they fill
        their extents.
        """
        file = self._files[page.sequence]
        page_bytes = self.layout.page_bytes
        offsets = file.spans[page.layer].pages["offset"][
            page.kv_head, page.page : page.page + n_pages
        ]
        starts = np.flatnonzero(np.diff(offsets) != page_bytes) + 1
        edges = [0, *starts.tolist(), n_pages]
        return [
            Read(file.fd, file.path, int(offsets[a]), (b - a) * page_bytes,
                 kv_offset + a * page_bytes, page._replace(page=page.page + a), page_bytes)
            for a, b in itertools.pairwise(edges)
        ]  # fmt: skip

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
        for read in self.reads(page, n_pages, 0):
            read_into(read, data)
        data = data.reshape(n_pages, page_bytes)
        stored = self.stored(page.sequence, page.layer)[page.kv_head, page.page :][:n_pages]
        for i, entry in enumerate(stored):
            crcs = pages.checksums(self.layout, data[i], int(entry["page_len"]))
            if crcs != (entry["crc_k"], entry["crc_v"]):
                raise FlashError(
                    "the page's bytes have changed: CRC-32C mismatch",
                    page=page._replace(page=page.page + i),
                    filename=self._files[page.sequence].path, offset=int(entry["offset"]),
                )  # fmt: skip
        return data

    def locate(self, page: PageId) -> tuple[Path, int]:
        """File and byte offset of a page, for error messages."""
        entry = self.stored(page.sequence, page.layer)[page.kv_head, page.page]
        return self._files[page.sequence].path, int(entry["offset"])

    # --- inside -----------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write, or compare with, the store's description; read what it has."""
        about = {
            "format": 1, "abi_version": ABI_VERSION, "head_dim": self.layout.head_dim,
            "page_tokens": self.layout.page_tokens, "kv_type": self.layout.kv_type.name,
            "n_kv_heads": self.n_kv_heads,
        }  # fmt: skip
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlashError(
                "the KV store is in use", filename=self.directory, remedy="choose another directory"
            ) from None
        text = os.pread(self._lock_fd, 1 << 16, 0)
        if not text:
            os.pwrite(self._lock_fd, json.dumps(about, indent=1).encode(), 0)
            return
        found = json.loads(text)
        if found != about:
            raise ValueError(
                f"{self.directory} holds a store with {found}, not {about}; choose another directory"
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
            patterns = pages.to_patterns(x, kv_type)
            at = pages.first_non_finite(patterns, kv_type)
            if at is not None:
                head, token, channel = at
                value = float(x[at]) if getattr(x, "dtype", None) != np.uint16 else None
                remedy = (
                    f"{value} is beyond fp16 (65504); store K and V as bf16: kv_dtype='bf16'"
                    if value is not None and np.isfinite(value)
                    else "the model computed it; nothing was written"
                )
                raise ValueError(
                    f"Inf or NaN in {name} of layer {layer}, sequence {sequence}, kv head {head}, "
                    f"token {done + token}, channel {channel}: {remedy}"
                )
            out.append(patterns)
        return out

    def _file(self, sequence: int, *, create: bool = True) -> _File:
        file = self._files.get(sequence)
        if file is None:
            path = self.directory / f"sequence-{sequence:06d}.kv"
            fd, direct = open_pages(path, create=create, direct=self._direct)
            if self._direct and not direct:
                self._direct = False
                log.warning(
                    "%s: the file system has no O_DIRECT; pages go through the page cache",
                    self.directory,
                )
            try:
                index = path.with_suffix(".index")
                index_fd, _ = open_pages(index, create=create, direct=False)
            except FlashError:
                os.close(fd)
                raise
            file = self._files[sequence] = _File(path, fd, index_fd)
        return file

    def _span(self, file: _File, layer: int) -> _Span:
        if layer not in file.spans:
            heads = self.n_kv_heads
            file.spans[layer] = _Span(
                np.zeros((heads, 0), STORED_PAGE), np.zeros((heads, 0), np.int64)
            )
        return file.spans[layer]

    def _reserve(self, file: _File, span: _Span, page: PageId, n_pages: int) -> None:
        """Give every kv head the extents for `n_pages` pages, on the disk and in the table."""
        have = span.extents.shape[1]
        need = -(-n_pages // self.extent_pages) - have
        if need <= 0:
            return
        extent_bytes = self.extent_pages * self.layout.page_bytes
        heads = self.n_kv_heads
        nbytes = need * heads * extent_bytes
        reserve(file.fd, file.path, file.end_bytes, nbytes, page)
        starts = file.end_bytes + np.arange(heads * need, dtype=np.int64) * extent_bytes
        file.end_bytes += nbytes
        span.extents = np.concatenate([span.extents, starts.reshape(heads, need)], axis=1)
        grown = np.zeros((heads, span.extents.shape[1] * self.extent_pages), STORED_PAGE)
        grown[:, : span.pages.shape[1]] = span.pages
        within = np.arange(self.extent_pages, dtype=np.int64) * self.layout.page_bytes
        grown["offset"] = (span.extents[..., None] + within).reshape(heads, -1)
        span.pages = grown

    def _write_pages(self, file, span, layer, sequence, first, k, v) -> None:
        layout = self.layout
        heads, n_tokens, _ = k.shape
        count = -(-n_tokens // layout.page_tokens)
        nbytes = heads * count * layout.page_bytes
        if self._staging is None or len(self._staging) < nbytes:
            # Anonymous memory starts on a page boundary, as O_DIRECT wants.
            self._staging = mmap.mmap(-1, max(nbytes, STAGING_BYTES))
        data = np.frombuffer(self._staging, np.uint8)[:nbytes].reshape(heads, count, -1)
        pages.pack(layout, k, v, data)
        entries = span.pages[:, first : first + count]
        entries["page_len"] = layout.page_tokens
        if n_tokens % layout.page_tokens:
            entries["page_len"][:, -1] = n_tokens % layout.page_tokens
        for head in range(heads):
            for i in range(count):
                entry = entries[head, i]
                crcs = pages.checksums(layout, data[head, i], int(entry["page_len"]))
                entry["crc_k"], entry["crc_v"] = crcs
            # Runs of pages that lie together: a head's extents may be apart.
            offsets = entries["offset"][head]
            starts = np.flatnonzero(np.diff(offsets) != layout.page_bytes) + 1
            for a, b in itertools.pairwise([0, *starts, count]):
                page = PageId(layer, sequence, head, first + int(a))
                write_from(file.fd, file.path, int(offsets[a]), data[head, a:b], page)
        self.bytes_written += nbytes

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
        path = file.path.with_suffix(".index")
        page = PageId(layer, sequence, 0, first)
        write_from(file.index_fd, path, file.index_bytes, raw, page)
        file.index_bytes += raw.nbytes

    def _reopen(self, sequence: int) -> None:
        """Rebuild the table of a sequence from its index."""
        file = self._file(sequence, create=False)
        raw = np.fromfile(file.path.with_suffix(".index"), np.uint8)
        raw = raw[: len(raw) // INDEX_ENTRY.bytes * INDEX_ENTRY.bytes]
        entries = raw.view(_INDEX)
        rows = raw.reshape(-1, INDEX_ENTRY.bytes)
        checks = [google_crc32c.value(row[:60].tobytes()) for row in rows]
        good = np.array(checks, np.uint32) == entries["check"]
        entries = entries[: len(entries) if good.all() else int(np.argmin(good))]
        file.index_bytes = entries.nbytes  # what is torn is overwritten
        file.end_bytes = os.fstat(file.fd).st_size
        extent_bytes = self.extent_pages * self.layout.page_bytes
        for layer in np.unique(entries["layer"]):
            mine = entries[entries["layer"] == layer]
            span = self._span(file, int(layer))
            # A torn append may have left pages of some heads only: count what all heads have.
            complete = [
                len(np.unique(mine["page"][mine["kv_head"] == head]))
                for head in range(self.n_kv_heads)
            ]
            span.n_pages = min(complete)
            n_extents = -(-span.n_pages // self.extent_pages)
            span.extents = np.zeros((self.n_kv_heads, n_extents), np.int64)
            span.pages = np.zeros((self.n_kv_heads, n_extents * self.extent_pages), STORED_PAGE)
            mine = mine[mine["page"] < span.n_pages]
            for name in _STORED_FIELDS:
                span.pages[name][mine["kv_head"], mine["page"]] = mine[name]
            span.extents[:] = span.pages["offset"][:, :: self.extent_pages]
            within = np.arange(self.extent_pages, dtype=np.int64) * self.layout.page_bytes
            span.pages["offset"] = (span.extents[..., None] + within).reshape(self.n_kv_heads, -1)
            file.end_bytes = max(file.end_bytes, int(span.extents.max(initial=0)) + extent_bytes)
        file.end_bytes = -(-file.end_bytes // PAGE_ALIGN_BYTES) * PAGE_ALIGN_BYTES


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
