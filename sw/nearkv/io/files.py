# SPDX-License-Identifier: Apache-2.0
"""Directories and files of a store: the only code that opens, extends, writes and erases them.

Everything inside a directory is opened relative to the directory's descriptor, belongs to this user
alone (0600, whatever the umask), and is never reached through a symbolic link. Page files are opened
past the page cache (O_DIRECT) where the file system allows it: pages are read once per token, by the
card, and would push out everything else.
"""

import contextlib
import ctypes
import errno as errno_codes
import os
from pathlib import Path
import secrets
import stat

import numpy as np

from .errors import FlashError, PageId

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # Ref: fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_ERASE_BYTES = 1 << 20


class Directory:
    """A directory that holds files of a store.

    Parameters
    ----------
    path : Path
        May be a symbolic link itself. Its last component is made (0700) if it is missing; a missing
        parent is an error, because it usually is a drive that is not mounted.

    Attributes
    ----------
    device : int
        Number of the drive behind it.

    Raises
    ------
    FlashError
        If it cannot be opened or written to.
    """

    def __init__(self, path: Path):
        self.path, self.fd, self._made = path, -1, False
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
                self._made = True
                os.chmod(path, 0o700)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno_codes.EACCES, "")
        except OSError as error:
            self.close()
            self.unmake()
            remedy = "choose another with directory= (--kv-dir)"
            if not path.parent.exists():
                remedy = (
                    f"there is no {path.parent}; is the drive mounted? Create it first, or {remedy}"
                )
            raise FlashError(
                "cannot write to the KV directory", errno=error.errno, filename=path, remedy=remedy
            ) from error
        self.device = os.fstat(self.fd).st_dev

    def exists(self, name: str) -> bool:
        """Whether there is anything of that name, a dangling link included."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failed("look for a file of the KV store", error, name) from error
        return True

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.fd))
        except OSError as error:
            raise self._failed("list the KV directory", error) from error

    def create(self, name: str, *, direct: bool = False) -> "File":
        """Make a file that must not exist yet.

        Raises
        ------
        FlashError
            If there is one, or it cannot be made.
        """
        return self._open(name, os.O_CREAT | os.O_EXCL, direct)

    def open(self, name: str, *, direct: bool = False) -> "File":
        """Open a file that is there.

        Raises
        ------
        FlashError
            If it is missing, is a link or anything but a plain file, has a second name, or belongs to
            another user.
        """
        return self._open(name, 0, direct)

    def temporary(self, label: str, *, direct: bool = False) -> "File":
        """Make a file without a name, which disappears with its last descriptor.

        `label` stands for its name in messages.
        """
        path = self.path / f"{label} (no name)"
        try:
            fd, got_direct = _open_direct(
                lambda flags: os.open(
                    ".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags, 0o600, dir_fd=self.fd
                ),
                direct,
            )
        except OSError as error:
            if error.errno not in (errno_codes.EOPNOTSUPP, errno_codes.EISDIR, errno_codes.ENOENT):
                raise FlashError(
                    "cannot write to the KV directory", errno=error.errno, filename=self.path,
                    remedy="choose another with directory= (--kv-dir)",
                ) from error  # fmt: skip
            # A file system that knows no O_TMPFILE: its name lives for an instant.
            name = f".nearkv-{secrets.token_hex(8)}"
            file = self.create(name, direct=direct)
            self.remove(name)
            file.path = path
            return file
        os.fchmod(fd, 0o600)
        return File(fd, path, got_direct)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, taking the place of what has it now."""
        try:
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            raise self._failed("rename a file of the KV store", error, old) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failed("remove a file of the KV store", error, name) from error

    def holds(self, name: str, file: "File") -> bool:
        """Whether it is this file that has a name, not another or none."""
        try:
            there = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(file.fd))

    def sync(self) -> None:
        """Make the drive keep the names."""
        _sync(self.fd, self.path)

    def sync_own_name(self) -> None:
        """Make the drive keep the directory's own name, where its parent can be opened."""
        try:
            parent = os.open(self.path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:
            return
        except OSError as error:
            raise self._failed("open what the KV directory is in", error) from error
        try:
            _sync(parent, self.path)
        finally:
            os.close(parent)

    def unmake(self) -> None:
        """Remove it again, if it was made here and nothing is in it."""
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def close(self) -> None:
        if self.fd >= 0:
            _close(self.fd)
            self.fd = -1

    def _failed(self, what: str, error: OSError, name: str = "") -> FlashError:
        return FlashError(f"cannot {what}", errno=error.errno, filename=self.path / name)

    def _open(self, name: str, flags: int, direct: bool) -> "File":
        path = self.path / name
        flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd, got_direct = _open_direct(
                lambda more: os.open(name, flags | more, 0o600, dir_fd=self.fd), direct
            )
        except OSError as error:
            raise self._failed("open a file of the KV store", error, name) from error
        about = os.fstat(fd)
        wrong = (
            "is not a plain file" if not stat.S_ISREG(about.st_mode)
            else "has another name elsewhere (a hard link)" if about.st_nlink > 1
            else f"belongs to user {about.st_uid}" if about.st_uid != os.geteuid()
            else ""
        )  # fmt: skip
        if wrong:
            os.close(fd)
            raise FlashError(
                f"a file of the KV store {wrong}", filename=path,
                remedy="somebody else put it there; choose another directory",
            )  # fmt: skip
        if flags & os.O_CREAT:
            try:
                os.fchmod(fd, 0o600)
            except OSError as error:
                os.close(fd)
                raise self._failed("keep a file of the KV store private", error, name) from error
        return File(fd, path, got_direct)


class File:
    """An open file of a store. `path` is for messages; `direct` says that it is past the page cache."""

    def __init__(self, fd: int, path: Path, direct: bool):
        self.fd, self.path, self.direct = fd, path, direct

    @property
    def nbytes(self) -> int:
        return os.fstat(self.fd).st_size

    def reserve(self, offset: int, nbytes: int, page: PageId) -> None:
        """Make the drive set bytes aside for pages from `page` on.

        Raises
        ------
        FlashError
            If it has no room.
        """
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            raise FlashError(
                f"no room for {_size(nbytes)} more of KV pages", page=page, errno=error.errno,
                filename=self.path, offset=offset,
                remedy="what is stored already is untouched; free some space or choose another "
                "directory (--kv-dir)",
            ) from error  # fmt: skip

    def set_aside(self, offset: int, nbytes: int) -> None:
        """Reserve space behind the end of the file, whose size stays. Nothing where that is unknown.

        Raises
        ------
        FlashError
            If the drive has no room.
        """
        if _libc.fallocate(self.fd, _KEEP_SIZE, offset, nbytes):
            code = ctypes.get_errno()
            if code in (errno_codes.ENOSPC, errno_codes.EDQUOT):
                raise FlashError(
                    f"no room for {_size(nbytes)} more of the journal", errno=code,
                    filename=self.path, offset=offset,
                    remedy="what is stored already is untouched; free some space or choose another "
                    "directory (--kv-dir)",
                )  # fmt: skip

    def write(
        self, offset: int, data, page: PageId | None = None, *, what: str = "write KV pages"
    ) -> None:
        """Write all of `data` (contiguous; aligned to 4096 bytes for a direct file).

        Raises
        ------
        FlashError
            If the drive fails.
        """
        view = memoryview(data).cast("B") if not isinstance(data, np.ndarray) else data.data
        view = view if view.ndim == 1 and view.format == "B" else view.cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                raise FlashError(
                    f"cannot {what}", page=page, errno=error.errno, filename=self.path,
                    offset=offset + done, remedy="what is stored already is untouched",
                ) from error  # fmt: skip

    def read(self, offset: int, nbytes: int) -> bytes:
        """At most `nbytes` bytes of a file that is not direct; fewer at its end."""
        parts = []
        try:
            while nbytes and (part := os.pread(self.fd, min(nbytes, 1 << 30), offset)):
                parts.append(part)
                offset, nbytes = offset + len(part), nbytes - len(part)
        except OSError as error:
            raise FlashError(
                "cannot read a file of the KV store", errno=error.errno, filename=self.path,
                offset=offset,
            ) from error  # fmt: skip
        return b"".join(parts)

    def cut(self, nbytes: int) -> None:
        """Make the file end after `nbytes` bytes."""
        try:
            os.ftruncate(self.fd, nbytes)
        except OSError as error:
            raise FlashError(
                "cannot shorten a file of the KV store", errno=error.errno, filename=self.path,
                offset=nbytes,
            ) from error  # fmt: skip

    def punch(self, offset: int, nbytes: int) -> bool:
        """Give the space of some bytes back to the drive; False if the file system cannot."""
        return not _libc.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes)

    def erase(self, offset: int, nbytes: int, zeros) -> None:
        """Overwrite bytes with `zeros` (aligned, ERASE_BYTES or more), not yet made durable."""
        for at in range(0, nbytes, _ERASE_BYTES):
            some = memoryview(zeros)[: min(_ERASE_BYTES, nbytes - at)]
            self.write(offset + at, some, what="erase KV pages")

    def sync(self) -> None:
        """Make the drive keep what was written.

        Raises
        ------
        FlashError
            If it may not.
        """
        _sync(self.fd, self.path)

    def close(self) -> None:
        if self.fd >= 0:
            _close(self.fd)
            self.fd = -1


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        # A process that was forked while another thread was here, between these two lines.
        if error.errno != errno_codes.EBADF:
            raise


def _open_direct(opener, direct: bool) -> tuple[int, bool]:
    """(descriptor, whether it is past the page cache) of what `opener(more flags)` opens."""
    if direct and _O_DIRECT:
        try:
            return opener(_O_DIRECT), True
        except OSError as error:
            if error.errno != errno_codes.EINVAL:
                raise
    return opener(0), False


def _sync(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise FlashError(
            "the drive may not keep what was written since the last flush", errno=error.errno,
            filename=path, remedy="keep the sequences' tokens, to compute them again if need be",
        ) from error  # fmt: skip


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
