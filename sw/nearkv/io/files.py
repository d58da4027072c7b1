# SPDX-License-Identifier: Apache-2.0
"""Page files: the only code that opens, extends and writes them.

They are opened past the page cache (O_DIRECT) where the file system allows it: pages are read once per
token, by the card, and would push out everything else.
"""

import errno as errno_codes
import os
from pathlib import Path

import numpy as np

from .errors import FlashError, PageId


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
