# SPDX-License-Identifier: Apache-2.0
"""Where a store lives: its directories, its page files, and the one process that owns them.

A persistent store:

    store.json     which store this is, in each of its directories; locked by the process that has it
    pages-N.kv     the pages of shard N: a header of 4096 bytes, then a slot for each page
    journal        in the first directory (`journal.py`), with its mark `journal.end`
    state-N        what was saved with the snapshot, in the first directory
    store.new      while the store is being made, in the first directory: which one. What a process
                   that was killed then has left is told from a store by it, and made anew

A temporary store has page files without names and nothing else, so that nothing is left of it whatever
ends its process.
"""

from collections.abc import Sequence
import contextlib
import errno
import fcntl
import gc
import json
import logging
import mmap
import os
from pathlib import Path
import struct
import time
from typing import Any
import uuid
import weakref

import google_crc32c

from nearkv_hw.abi import PAGE_ALIGN_BYTES

from ..io import Directory, File, FlashError, shards_of, signals
from .journal import END_NAME, NAME, NEW_NAME, Journal

log = logging.getLogger("nearkv")

ABOUT_NAME, MAKING_NAME = "store.json", "store.new"
HEADER_BYTES = PAGE_ALIGN_BYTES
_HEADER = struct.Struct("<8s16sII")  # magic, store, shard, page_bytes
_MAGIC = b"nkv-page"
_FORMAT = 2
# A process that was just forked from the owner has the lock until its first instructions.
_LOCK_S = 0.5


class Home:
    """The directories and files of one store, open.

    Parameters
    ----------
    paths : sequence of Path
        One directory for all shards, or one for each.
    about : dict
        What the store must be like (layout, heads, shards), compared with what is there.
    temporary : bool

    Attributes
    ----------
    directories : list of Directory
    files : list of File, by shard
    journal : Journal or None
        None of a temporary store.
    is_new : bool
        Whether there was no store before.

    Raises
    ------
    FlashError
        If a directory cannot be written to, a file of the store is missing, damaged or not this
        user's, or another process has the store.
    ValueError
        If there is a store of another kind.
    """

    def __init__(self, paths: Sequence[Path], about: dict[str, Any], *, temporary: bool):
        self._n_shards = about["n_shards"]
        self.directories: list[Directory] = []
        self.files: list[File] = []
        self.journal: Journal | None = None
        self.is_new = True
        _homes.add(self)
        self._locks: list[File] = []
        self._made: list[tuple[Directory, str]] = []  # what is gone again if it cannot be opened
        try:
            for path in paths:
                self.directories.append(Directory(path))
            if temporary:
                for shard in range(about["n_shards"]):
                    file = self.directory_of(shard).temporary(f"pages-{shard}.kv", direct=True)
                    self.files.append(file)
            else:
                self._open_persistent(about)
        except BaseException:
            self._unmake()
            self.close()
            raise

    def directory_of(self, shard: int) -> Directory:
        """Where the page file of a shard is."""
        n, n_shards = len(self.directories), self._n_shards
        return next(
            directory
            for position, directory in enumerate(self.directories)
            if shard in shards_of(position, n, n_shards)
        )

    def _unmake(self) -> None:
        """Remove what was made; the mark of a store that is being made last, if nothing is left."""
        with contextlib.suppress(FlashError):
            for directory, name in reversed(self._made):
                directory.remove(name)
        for directory in self.directories:
            directory.unmake()

    def close(self) -> None:
        """Close everything, the locks last."""
        if self.journal is not None:
            self.journal.close()
        for one in (*self.files, *self._locks, *self.directories):
            one.close()

    def check_in_place(self) -> None:
        """See that what is written still has a name.

        Raises
        ------
        FlashError
            If a directory was removed, or another store put in its place.
        """
        for directory, lock in zip(self.directories, self._locks, strict=True):
            path = directory.path / ABOUT_NAME
            try:
                there = os.stat(path)
                gone = not os.path.samestat(there, os.fstat(lock.fd))
            except OSError:
                gone = True
            if gone:
                raise FlashError(
                    "the KV store was removed, or another one put in its place, while it was in use",
                    filename=path, remedy="what is written to it is lost when it is closed; make a "
                    "new store and compute the sequences again",
                )  # fmt: skip

    def sync_pages(self) -> None:
        for file in self.files:
            file.sync()

    # --- persistent stores ------------------------------------------------------------------------

    def _open_persistent(self, about) -> None:
        for directory in self.directories:
            self._lock(directory)
        first = self.directories[0]
        if first.exists(MAKING_NAME):
            file = first.open(MAKING_NAME)
            making = file.read(0, 100).decode(errors="replace").strip()
            file.close()
            self._create(about, making if len(making) == 32 else "")
            return
        found = [_parse(file) for file in self._locks]
        if found[0] is None:
            self._create(about, "")
            return
        self.is_new = False
        identity = found[0].get("store", "")
        for position, (directory, theirs) in enumerate(zip(self.directories, found, strict=True)):
            mine = {"format": _FORMAT, "store": identity, **about, "directory": position}
            if theirs is None:
                raise FlashError(
                    f"{ABOUT_NAME} is missing", filename=directory.path,
                    remedy="this directory does not belong to the store in "
                    f"{self.directories[0].path}; name its directories in their order",
                )  # fmt: skip
            if theirs != mine:
                self._explain(directory, theirs, mine)
        self.journal = Journal.open(first)
        for shard in range(about["n_shards"]):
            file = self.directory_of(shard).open(f"pages-{shard}.kv", direct=True)
            self.files.append(file)
            self._check_header(file, identity, shard, about["page_bytes"])

    def check_identity(self) -> None:
        """Compare store.json with what the journal, which has been read, says.

        Raises
        ------
        FlashError
            If they differ: one of them is damaged.
        """
        assert self.journal is not None
        about = _parse(self._locks[0])
        assert about is not None
        about = {name: value for name, value in about.items() if name != "directory"}
        if about != self.journal.about:
            raise FlashError(
                f"{ABOUT_NAME} and the journal describe different stores", filename=self.journal.path,
                remedy="one of them is damaged or was exchanged; put it back from a copy",
            )  # fmt: skip

    def _explain(self, directory: Directory, theirs: dict, mine: dict) -> None:
        """Raise what is wrong with a description that is not as expected."""
        path = directory.path / ABOUT_NAME
        if theirs.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is of a store of format {theirs.get('format')}, and this version of nearkv "
                f"reads format {_FORMAT}; choose another directory"
            )
        if theirs["store"] != mine["store"]:
            raise FlashError(
                "the directories belong to different stores", filename=path,
                remedy=f"it has {theirs['store']}, the first has {mine['store']}; name the directories "
                "of one store, in their order",
            )  # fmt: skip
        differ = {name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name)}
        was = {name: theirs.get(name) for name in sorted(differ)}
        now = {name: mine.get(name) for name in sorted(differ)}
        raise ValueError(
            f"{directory.path} holds a store with {was}, not {now}; choose another directory"
        )

    def _lock(self, directory: Directory) -> None:
        """Take a directory for this process, by its description, which is empty if it is new."""
        patience, collected = time.monotonic() + _LOCK_S, False
        while True:
            made = False
            if not directory.exists(ABOUT_NAME):
                try:
                    directory.create(ABOUT_NAME).close()
                    made = True
                except FlashError as error:
                    if error.errno != errno.EEXIST:  # somebody else was faster
                        raise
            file = directory.open(ABOUT_NAME)
            try:
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if directory.holds(ABOUT_NAME, file):
                    break
                # Whoever had it has given up making a store here, and removed it.
            except BlockingIOError:
                if not collected:  # perhaps a store of this process was forgotten, not closed
                    gc.collect()
                    patience, collected = time.monotonic() + _LOCK_S, True
            except OSError as error:
                file.close()
                raise FlashError(
                    "cannot lock the KV store", errno=error.errno, filename=directory.path,
                    remedy="choose a directory on a file system that knows locks",
                ) from error  # fmt: skip
            file.close()
            if time.monotonic() > patience:
                raise FlashError(
                    "the KV store is in use by another process or cache", filename=directory.path,
                    remedy="close it there, or choose another directory",
                )  # fmt: skip
            time.sleep(0.01)
        self._locks.append(file)
        if made and not file.nbytes:  # or somebody else has made a store before it was locked
            self._made.append((directory, ABOUT_NAME))

    def _create(self, about: dict, making: str) -> None:
        """Make a store.

        `making` is which one was begun here by a process that was killed; empty if there was none.
        """
        first = self.directories[0]
        left = []
        for directory, file in zip(self.directories, self._locks, strict=True):
            try:
                theirs = _parse(file)
            except FlashError:
                if not making:
                    raise
                theirs = None  # half a description
            if theirs is not None and theirs.get("store") != making:
                raise FlashError(
                    "the directory belongs to a store, and the first of the directories to none",
                    filename=file.path,
                    remedy="name the store's directories in their order, or choose others",
                )  # fmt: skip
            left += [(directory, name) for name in self._left(directory)]
        # Gone again if this comes to nothing; the mark last, so that what is left is known by it.
        self._made = [(first, MAKING_NAME), *((one, ABOUT_NAME) for one in self.directories)]
        identity = making or uuid.uuid4().hex
        if not making:
            first.remove(MAKING_NAME)
            file = first.create(MAKING_NAME)
            try:
                file.write(0, identity.encode(), what="make the store")
                file.sync()
            finally:
                file.close()
            first.sync()
        for file in reversed(self._locks):
            if file.nbytes:
                file.cut(0)
        for directory, name in left:
            directory.remove(name)
        for shard in range(about["n_shards"]):
            directory, name = self.directory_of(shard), f"pages-{shard}.kv"
            file = directory.create(name, direct=True)
            self._made.append((directory, name))
            self.files.append(file)
            header = mmap.mmap(-1, HEADER_BYTES)  # aligned, as O_DIRECT wants
            header[:] = _header(identity, shard, about["page_bytes"])
            file.write(0, header)
            file.sync()
        about = {"format": _FORMAT, "store": identity, **about}
        self._made += [(first, NAME), (first, END_NAME)]
        self.journal = Journal.create(first, about)
        for directory in self.directories:
            directory.sync()
            directory.sync_own_name()
        for position in reversed(range(len(self.directories))):
            text = json.dumps(about | {"directory": position}, indent=1)
            check = google_crc32c.value(text.encode())
            file = self._locks[position]
            file.write(0, f"{text}\n{check:08x}\n".encode(), what="write the store's description")
            file.sync()
        first.remove(MAKING_NAME)
        first.sync()
        self._made.clear()

    def _left(self, directory: Directory) -> list[str]:
        """What a process has left that was killed while it made a store in a directory.

        Raises
        ------
        FlashError
            If it may be more than that.
        """
        names = directory.names()
        page_files = [name for name in names if name.startswith("pages-") and name.endswith(".kv")]
        left = [*page_files, *(name for name in (NAME, NEW_NAME, END_NAME) if name in names)]
        for name in left:
            file = directory.open(name)
            empty = file.nbytes <= HEADER_BYTES
            file.close()
            if not empty or any(other.startswith("state-") for other in names):
                raise FlashError(
                    f"there are pages or a journal, but no {ABOUT_NAME} that belongs to them",
                    filename=file.path,
                    remedy="put it back from a copy, name the store's directories in their order, or "
                    "choose another directory",
                )  # fmt: skip
        return left

    def _check_header(self, file: File, identity: str, shard: int, page_bytes: int) -> None:
        memory = mmap.mmap(-1, HEADER_BYTES)
        try:
            got = os.preadv(file.fd, [memory], 0)
        except OSError as error:
            raise FlashError(
                "cannot read a page file", errno=error.errno, filename=file.path
            ) from error
        data = memory[:got]
        if data == _header(identity, shard, page_bytes):
            return
        what = "its header is damaged"
        check = struct.pack("<I", google_crc32c.value(data[: _HEADER.size]))
        if len(data) == HEADER_BYTES and data[_HEADER.size :][:4] == check:
            _, theirs, number, _ = _HEADER.unpack_from(data)
            what = f"it is shard {number} of store {theirs.hex()}"
        raise FlashError(
            f"not the page file of shard {shard} of store {identity}: {what}", filename=file.path,
            remedy="put the right file back, or delete the store and compute its sequences again",
        )  # fmt: skip

    # --- what is saved ------------------------------------------------------------------------------

    def write_state(self, data: bytes) -> dict:
        """Keep bytes in a file of their own; what `read_state` needs to find them."""
        directory = self.directories[0]
        number = 1 + max(self._states(), default=-1)
        name = f"state-{number}"
        file = directory.create(name)
        try:
            file.write(0, data, what="save the state of the KV store")
            file.sync()
        except FlashError:
            directory.remove(name)
            raise
        finally:
            file.close()
        directory.sync()
        return {"number": number, "bytes": len(data), "crc": google_crc32c.value(data)}

    def read_state(self, about: dict) -> bytes:
        """The bytes that `write_state` kept.

        Raises
        ------
        FlashError
            If the file is missing or damaged.
        """
        file = self.directories[0].open(f"state-{about['number']}")
        try:
            data = file.read(0, about["bytes"] + 1)
        finally:
            file.close()
        if len(data) != about["bytes"] or google_crc32c.value(data) != about["crc"]:
            raise FlashError(
                "what was saved with the store is damaged", filename=file.path,
                remedy="put the file back from a copy, or delete the store and compute its sequences "
                "again",
            )  # fmt: skip
        return data

    def remove_states(self, but: int | None) -> None:
        """Remove saved states, all but one. What cannot be removed does no harm."""
        for number in self._states():
            if number != but:
                try:
                    self.directories[0].remove(f"state-{number}")
                except FlashError as error:
                    log.warning("%s", error)

    def _states(self) -> list[int]:
        names = [name.partition("-") for name in self.directories[0].names()]
        return [int(number) for head, _, number in names if head == "state" and number.isdigit()]


_homes: "weakref.WeakSet[Home]" = weakref.WeakSet()


def _forked() -> None:
    """A process that was forked has no store: files and locks are left to its parent."""
    signals.forked()
    for home in list(_homes):
        home.close()


os.register_at_fork(after_in_child=_forked)


def read_about(path: Path) -> dict:
    """The description of the store in a directory, whoever has it.

    Raises
    ------
    FlashError
        If there is none, or it is damaged.
    ValueError
        If it is of another format.
    """
    if not (path / ABOUT_NAME).is_file():
        raise FlashError(
            "there is no KV store in this directory", filename=path,
            remedy="name the directory that it was made in",
        )  # fmt: skip
    directory = Directory(path)
    try:
        file = directory.open(ABOUT_NAME)
        try:
            about = _parse(file)
        finally:
            file.close()
    finally:
        directory.close()
    if about is None or (path / MAKING_NAME).exists():
        raise FlashError(
            "a KV store was not made to its end in this directory", filename=path,
            remedy="make one there, or name the directory of another",
        )  # fmt: skip
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has a store of format {about.get('format')}, and this version of nearkv reads "
            f"format {_FORMAT}; choose another directory"
        )
    return about


def _header(identity: str, shard: int, page_bytes: int) -> bytes:
    head = _HEADER.pack(_MAGIC, bytes.fromhex(identity), shard, page_bytes)
    head += struct.pack("<I", google_crc32c.value(head))
    return head.ljust(HEADER_BYTES, b"\0")


def _parse(file: File) -> dict | None:
    """The description in a store.json; None if it is empty.

    Raises
    ------
    FlashError
        If it is damaged.
    """
    if not file.nbytes:
        return None
    data = file.read(0, 1 << 16)
    try:
        text = data.decode()
        body, _, check = text.rstrip("\n").rpartition("\n")
        about = json.loads(body if len(check) == 8 and body else text)
        if about.get("format") == _FORMAT and int(check, 16) != google_crc32c.value(body.encode()):
            raise ValueError("its checksum differs")
        return about
    except (ValueError, AttributeError) as error:
        raise FlashError(
            f"the description of the KV store is damaged: {error}", filename=file.path,
            remedy="put it back from a copy, or delete the store and compute its sequences again",
        ) from None  # fmt: skip
