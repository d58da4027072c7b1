# SPDX-License-Identifier: Apache-2.0
"""What stands between a store and the operating system: it counts, kills, fails, shortens and records."""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import os
from pathlib import Path
import random
import signal
import threading
from typing import NamedTuple

from nearkv.io import files

SECTOR_BYTES = 512
_PUNCH_HOLE = 2


class Call(NamedTuple):
    """A system call that changes something."""

    n: int
    name: str
    about: str  # name of the file


class System:
    """Replaces the calls by which a store changes something, while `installed`.

    `fate(call)` is asked before each: None lets it happen, "before", "middle" and "after" kill this
    process there ("middle" writes the first half), a number is the errno that it fails with, and
    ("short", errno) writes half and fails then. `after(event)` is told of each that has happened.
    """

    _NAMES = (
        "open", "mkdir", "pwrite", "ftruncate", "fsync", "rename", "unlink", "posix_fallocate",
    )  # fmt: skip

    def __init__(
        self,
        fate: Callable[[Call], object] = lambda call: None,
        after: Callable[[tuple], object] | None = None,
    ):
        self.fate, self.after = fate, after
        self.calls: list[Call] = []
        self._ids: dict[int, int] = {}  # of files by inode, which a file system uses again
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in self._NAMES}

    @contextlib.contextmanager
    def installed(self) -> Iterator["System"]:
        libc = files._libc
        for name in self._NAMES:
            setattr(os, name, self._replacement(name))
        files._libc = _Libc(self, libc)  # type: ignore[assignment]
        try:
            yield self
        finally:
            files._libc = libc
            for name, real in self._real.items():
                setattr(os, name, real)

    def _replacement(self, name: str):
        real = self._real[name]

        def replaced(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with self._lock:  # one at a time, so that a record of them is in order
                self._begin(name, real, args)
                unlinked = None
                if self.after is not None and name in ("unlink", "rename"):
                    unlinked = _directory(kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
                result = real(*args, **kwargs)
                if self.after is not None:
                    self._tell(name, args, kwargs, result, unlinked)
                self._end()
            return result

        return replaced

    def _begin(self, name: str, real, args) -> None:
        call = Call(len(self.calls), name, _about(args[0]))
        self.calls.append(call)
        fate = self.fate(call)
        self._pending = None
        if fate is None:
            return
        if fate in ("before", "middle"):
            if fate == "middle" and name == "pwrite":
                fd, data, offset = args
                real(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "after":
            self._pending = fate
            return
        if isinstance(fate, tuple):
            if name == "pwrite":
                fd, data, offset = args
                if half := len(data) // 2:
                    half = half // SECTOR_BYTES * SECTOR_BYTES or half
                    with contextlib.suppress(OSError):
                        real(fd, data[:half], offset)
            fate = fate[1]
        assert isinstance(fate, int)
        raise OSError(fate, os.strerror(fate))

    def _end(self) -> None:
        if self._pending == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    def file(self, fd: int) -> int:
        """What stands for a file or directory in events."""
        inode = os.fstat(fd).st_ino
        return self._ids.get(inode, inode)

    def _tell(self, name, args, kwargs, result, directory) -> None:
        assert self.after is not None
        if name == "open":
            self._ids[os.fstat(result).st_ino] = -1 - len(self.calls)
            self.after(("create", _directory(kwargs["dir_fd"]), args[0], self.file(result)))
        elif name == "mkdir":
            self.after(("mkdir", Path(args[0]).name))
        elif name == "pwrite":
            self.after(("write", self.file(args[0]), args[2], bytes(memoryview(args[1])[:result])))
        elif name == "ftruncate":
            self.after(("cut", self.file(args[0]), args[1]))
        elif name == "fsync":
            self.after(("sync", self.file(args[0])))
        elif name == "rename":
            self.after(("rename", directory, args[0], args[1]))
        elif name == "unlink":
            self.after(("unlink", directory, args[0]))
        else:
            self.after(("reserve", self.file(args[0]), args[1], args[2], True))


class _Libc:
    """fallocate, as `nearkv.io.files` calls it."""

    def __init__(self, system: System, real):
        self._system, self._real = system, real

    def fallocate(self, fd, mode, offset, nbytes):
        system = self._system
        with system._lock:
            try:
                system._begin("fallocate", None, (fd,))
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            result = self._real.fallocate(fd, mode, offset, nbytes)
            if system.after is not None and not result:
                if mode & _PUNCH_HOLE:
                    system.after(("punch", system.file(fd), offset, nbytes))
                else:
                    system.after(("reserve", system.file(fd), offset, nbytes, False))
            system._end()
        return result


def _about(what) -> str:
    if isinstance(what, int):
        return os.path.basename(os.readlink(f"/proc/self/fd/{what}"))
    return os.path.basename(what)


def _directory(fd: int | None) -> int:
    """Directories are never removed while a store is used, so that their inodes stand for them."""
    return -1 if fd is None else os.fstat(fd).st_ino


# --- loss of power ---------------------------------------------------------------------------------


class Disk:
    """What a drive would hold after a loss of power.

    A recording of calls (`System(after=...)`) is played to it up to some point. What was written since
    the last fsync of a file, and which names were made, removed or changed since that of a directory,
    may be there or not: `crash` draws which.
    """

    def __init__(self):
        self._kept: dict[int, bytearray] = {}  # by file: what is there for certain
        self._loose: dict[int, list[tuple]] = {}  # by file: changes that may be there
        self._names: dict[int, dict[str, int]] = {}  # by directory: files by name, for certain
        self._name_changes: dict[int, list[tuple]] = {}
        self._root: list[str] = []  # directories that were made and may be gone

    def copy(self) -> "Disk":
        other = Disk()
        other._kept = {file: bytearray(data) for file, data in self._kept.items()}
        other._loose = {file: list(changes) for file, changes in self._loose.items()}
        other._names = {d: dict(names) for d, names in self._names.items()}
        other._name_changes = {d: list(changes) for d, changes in self._name_changes.items()}
        other._root = list(self._root)
        return other

    def play(self, event: tuple, directories: dict[int, str], root: int) -> None:
        """One more call that has happened."""
        kind, *what = event
        if kind == "mkdir":
            self._root.append(what[0])
        elif kind == "sync" and what[0] == root:
            self._root.clear()
        elif kind == "sync" and what[0] in directories:
            names = self._names.setdefault(what[0], {})
            for change in self._name_changes.pop(what[0], []):
                _rename(names, change)
        elif kind == "sync":
            data = self._kept.setdefault(what[0], bytearray())
            for change in self._loose.pop(what[0], []):
                _change(data, change)
        elif kind == "create":
            self._name_changes.setdefault(what[0], []).append(event)
            self._kept.setdefault(what[2], bytearray())
        elif kind in ("unlink", "rename"):
            self._name_changes.setdefault(what[0], []).append(event)
        else:
            self._loose.setdefault(what[0], []).append(event)

    def crash(self, rng: random.Random, directories: dict[int, str]) -> dict[str, tuple]:
        """A tree (`world.write_tree`) that may be found when the power is back."""
        how = rng.choice(("all gone", "all there", "in order", "some", "torn"))
        tree: dict[str, tuple] = {}
        for inode, directory in directories.items():
            if directory in self._root and how in ("all gone", "some", "in order"):
                continue
            tree[directory] = ("directory",)
            names = dict(self._names.get(inode, {}))
            changes = self._name_changes.get(inode, [])
            n_kept = {"all gone": 0, "all there": len(changes)}.get(
                how, rng.randrange(len(changes) + 1)
            )
            for change in changes[:n_kept]:
                _rename(names, change)
            for name, file in names.items():
                data = bytearray(self._kept.get(file, b""))
                for change in self._drawn(self._loose.get(file, []), how, rng):
                    _change(data, change)
                tree[f"{directory}/{name}"] = ("file", bytes(data))
        return tree

    def _drawn(self, changes: list[tuple], how: str, rng: random.Random) -> Iterator[tuple]:
        """Which changes of a file are there."""
        if how == "all there":
            yield from changes
        elif how == "in order":
            yield from changes[: rng.randrange(len(changes) + 1)]
        elif how in ("some", "torn"):
            for change in changes:
                kind, file, *rest = change
                if how == "torn" and kind == "write" and rng.random() < 0.5:
                    offset, data = rest
                    at = 0
                    while at < len(data):
                        end = min(len(data), at + SECTOR_BYTES - (offset + at) % SECTOR_BYTES)
                        if rng.random() < 0.5:
                            yield kind, file, offset + at, data[at:end]
                        at = end
                elif rng.random() < 0.6:
                    yield change


def _change(data: bytearray, change: tuple) -> None:
    kind, _, *rest = change
    if kind == "write":
        offset, new = rest
        if offset > len(data):
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(new)] = new
    elif kind == "cut":
        (nbytes,) = rest
        del data[nbytes:]
        data.extend(bytes(nbytes - len(data)))
    elif kind == "reserve":
        offset, nbytes, longer = rest
        if longer and offset + nbytes > len(data):
            data.extend(bytes(offset + nbytes - len(data)))
    elif kind == "punch":
        offset, nbytes = rest
        end = min(offset + nbytes, len(data))
        if end > offset:
            data[offset:end] = bytes(end - offset)


def _rename(names: dict[str, int], change: tuple) -> None:
    kind, _, *rest = change
    if kind == "create":
        name, file = rest
        names[name] = file
    elif kind == "unlink":
        names.pop(rest[0], None)
    else:
        old, new = rest
        if old in names:
            names[new] = names.pop(old)
