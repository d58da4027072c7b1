# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a drive, and which page it is about."""

import errno as codes
import os
from pathlib import Path
from typing import NamedTuple


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


# What to do about an error of the system, where whoever raises it knows no better.
_REMEDIES = {
    codes.ENOENT: "put it back from a copy, or delete the store and compute its sequences again",
    codes.ENOSPC: "free some space or choose another directory (--kv-dir)",
    codes.EDQUOT: "free some space, or have the quota raised",
    codes.EFBIG: "raise the limit on the size of files (ulimit -f)",
    codes.EMFILE: "raise the limit on open files (ulimit -n)",
    codes.EROFS: "mount the drive writable, or choose another directory (--kv-dir)",
    codes.EACCES: "check who owns the directory and its files",
    codes.EPERM: "check who owns the directory and its files",
    codes.ELOOP: "it is a symbolic link, and a store follows none inside its directory",
    codes.EISDIR: "it is a directory; somebody else put it there, choose another directory",
}
_ANY_REMEDY = "is the drive alive? See the kernel's log"


class FlashError(OSError):
    """Page files could not be written or read.

    `remedy` says what to do about it; by default what helps against `errno`.

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
        remedy = remedy or (errno and _REMEDIES.get(errno, _ANY_REMEDY))
        self.message = f"{what}{' (' + ', '.join(where) + ')' if where else ''}{reason}"
        if remedy:
            self.message += f"; {remedy}"

    def __str__(self):
        return self.message


class LateError(TimeoutError):
    """Pages have not arrived in time. They may do so at any later time.

    Attributes
    ----------
    page : PageId
        The first of them.
    path : Path
        Of its file.
    """

    def __init__(self, message: str, page: PageId, path: Path):
        super().__init__(message)
        self.page, self.path = page, path
