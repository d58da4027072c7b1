# SPDX-License-Identifier: Apache-2.0
"""Flash: which page, how to read and write it, and what to say when the drive fails.

The only code that opens page files. They are opened past the page cache (O_DIRECT) where the file
system allows it: pages are read once per token, by the card, and would push out everything else.
"""

import errno as errno_codes
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nearkv_hw.abi import PAGE_ALIGN_BYTES


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


class Read(NamedTuple):
    """Consecutive pages of one file on their way into kv memory. Files outlive their reads."""

    fd: int
    path: Path
    offset: int  # in the file, a multiple of 4096
    nbytes: int
    kv_offset: int
    page: PageId  # the first
    page_bytes: int

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


def read_into(read: Read, memory: np.ndarray) -> None:
    """Carry out one read into uint8 `memory`, whose start is aligned to 4096 bytes.

    Raises
    ------
    FlashError
        If the drive reports an error, or the file ends before the read does.
    """
    view = memory.data[read.kv_offset : read.kv_offset + read.nbytes]
    done = 0
    while done < read.nbytes:
        try:
            got = os.preadv(read.fd, [view[done:]], read.offset + done)
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
