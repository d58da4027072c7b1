# SPDX-License-Identifier: Apache-2.0
"""The journal of a persistent store: every change of its tables, in order.

A record is a header, a payload and a checksum:

    magic    4 bytes   b"nkvJ"
    kind     u16       `Kind`
    -        u16       0
    length   u32       of the payload
    serial   u64       0, 1, 2, ...
    before   u32       checksum of the record before, so that none can be missing or exchanged
    head     u32       CRC-32C of the 24 bytes above: tells a damaged length from a short file
    payload
    check    u32       CRC-32C of everything above

The first record says which store this is. A store that is flushed also notes in `journal.end` how far
the drive is known to keep the journal. Up to that mark everything must be right, or opening is refused,
with the place. Behind it is what was not flushed: a drive that loses power keeps any part of it, a
process that is killed perhaps half a record. Reopening takes what is whole, cuts the rest off, and says
so; then it flushes, so that this is decided once. A journal that has grown far beyond what it describes
is written anew beside the old one, which it then replaces.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum
import json
import struct
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ..io import Directory, File, FlashError
from .tables import STORED_PAGE, Change

NAME, NEW_NAME, END_NAME = "journal", "journal.new", "journal.end"
COMPACT_BYTES = 1 << 20  # a journal below this is never written anew
# Set aside behind the last record, so that a sequence can be dropped on a drive that is full.
SPARE_BYTES = 64 << 10
_HEAD = struct.Struct("<4sHHIQI")
_HEAD_BYTES = _HEAD.size + 4
_MAGIC = b"nkvJ"
_END = struct.Struct("<8sQQQI")  # magic, generation, bytes, serial of the last record, its checksum
_END_MAGIC = b"nkv-end\0"
_END_BYTES = 512  # of each of two copies, written in turns: a sector, so that one is always whole
_PAGE = np.dtype(
    [("offset", "<u8"), ("page_len", "<u4"), ("crc_k", "<u4"), ("crc_v", "<u4"), ("shard", "<u4")]
)  # of a page in a record


class Kind(IntEnum):
    """What a record says."""

    STORE = 1  # JSON: which store this is
    APPEND = 2  # new blocks at the end of a table
    CHANGE = 3  # tables become others
    DROP = 4  # a sequence is forgotten
    SAVE = 5  # a snapshot of tables, and the file that was saved with it
    RESTORE = 6  # all tables become the snapshot's
    BLOCKS = 7  # blocks that a SAVE and a CHANGE behind it name; written anew only


class Entry(NamedTuple):
    """A record, decoded: `values` are the fields of its kind."""

    kind: Kind
    values: tuple


def encode_append(sequence: int, layer: int, position: int, ids, pages) -> bytes:
    """Payload of APPEND: pages STORED_PAGE (n_kv_heads, n_blocks)."""
    head = struct.pack("<qIII", sequence, layer, position, len(ids))
    return head + np.asarray(ids, "<u4").tobytes() + _pack_pages(pages)


def encode_change(changes: Sequence[Change]) -> bytes:
    """Payload of CHANGE."""
    return _pack_tables((c.sequence, c.layer, c.position, c.ids) for c in changes)


def encode_drop(sequence: int) -> bytes:
    """Payload of DROP."""
    return struct.pack("<q", sequence)


def encode_save(about: dict, tables: dict[tuple[int, int], np.ndarray]) -> bytes:
    """Payload of SAVE."""
    text = json.dumps(about).encode()
    packed = _pack_tables((s, layer, 0, ids) for (s, layer), ids in tables.items())
    return struct.pack("<I", len(text)) + text + packed


def encode_blocks(layer: int, ids, pages) -> bytes:
    """Payload of BLOCKS: pages STORED_PAGE (n_kv_heads, n_blocks)."""
    head = struct.pack("<II", layer, len(ids))
    return head + np.asarray(ids, "<u4").tobytes() + _pack_pages(pages)


def decode(kind: int, payload: bytes, n_kv_heads: int) -> Entry:
    """The fields of a record, in the order of the arguments of its `encode_...`.

    Raises
    ------
    ValueError
        If the payload is not one of its kind.
    """
    try:
        kind = Kind(kind)
        if kind == Kind.STORE:
            return Entry(kind, (json.loads(payload),))
        if kind == Kind.APPEND:
            *place, count = struct.unpack_from("<qIII", payload)
            return Entry(kind, (*place, *_unpack_blocks(payload, 20, count, n_kv_heads)))
        if kind == Kind.BLOCKS:
            layer, count = struct.unpack_from("<II", payload)
            return Entry(kind, (layer, *_unpack_blocks(payload, 8, count, n_kv_heads)))
        if kind == Kind.DROP:
            return Entry(kind, struct.unpack("<q", payload))
        if kind == Kind.CHANGE:
            return Entry(kind, ([Change(b, a, at, ids) for a, b, at, ids in _tables(payload, 0)],))
        if kind == Kind.SAVE:
            (length,) = struct.unpack_from("<I", payload)
            about = json.loads(payload[4 : 4 + length])
            tables = {(a, b): ids for a, b, _, ids in _tables(payload, 4 + length)}
            return Entry(kind, (about, tables))
        return Entry(kind, ())
    except (struct.error, ValueError, KeyError) as error:
        raise ValueError(f"its contents make no sense: {error}") from error


class _Place(NamedTuple):
    """Where the next record goes, and what it says of the one before. Replaced as a whole."""

    nbytes: int
    serial: int
    check: int


class Journal:
    """An open journal.

    Attributes
    ----------
    nbytes : int
        Of its records.
    written_bytes : int
        Since it was opened, what is written anew included.
    n_records : int
    cut_bytes : int
        What was found on opening behind the last record that is whole.
    unflushed : bool
        Whether there were records on opening that the drive was not known to keep.
    """

    def __init__(self, directory: Directory, file: File, end_file: File):
        self._directory, self._file, self._end_file = directory, file, end_file
        self.written_bytes = self.cut_bytes = 0
        self._at = _Place(0, 0, 0)
        self._reserved_bytes = 0
        self.unflushed = False
        self._generation = 0
        self._end_turn = 0
        self._renamed = False  # and the drive may not keep the name yet
        self._broken = ""
        self._about: dict[str, Any] = {}

    @property
    def path(self):
        return self._file.path

    @property
    def nbytes(self) -> int:
        return self._at.nbytes

    @property
    def n_records(self) -> int:
        return self._at.serial

    # --- opening --------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Directory, about: dict) -> "Journal":
        """A new journal of the store that `about` describes, kept by the drive already."""
        journal = cls(directory, directory.create(NAME), directory.create(END_NAME))
        journal._about = about
        journal._generation = 1
        journal.append(Kind.STORE, json.dumps(about | {"generation": 1}).encode())
        journal.sync()
        return journal

    @classmethod
    def open(cls, directory: Directory) -> "Journal":
        """The journal of a directory; call `read` next.

        Raises
        ------
        FlashError
            If it is missing or cannot be opened.
        """
        file = directory.open(NAME)
        try:
            end_file = directory.open(END_NAME)
        except BaseException:
            file.close()
            raise
        return cls(directory, file, end_file)

    def read(self, n_kv_heads: int) -> Iterator[tuple[Entry, int]]:
        """Every record, with its byte offset. Afterwards `cut`, then the journal can be appended to.

        Raises
        ------
        FlashError
            At the first record that is damaged, of those that were flushed.
        """
        data = self._file.read(0, self._file.nbytes)
        end_generation, end_bytes, end_serial, end_check = self._read_end()
        at = n_whole = 0  # bytes that were read; records that a journal written anew began with
        while at < len(data):
            try:
                kind, payload, size, check = self._record(data, at)
            except FlashError:
                if at < end_bytes or self._at.serial < n_whole:
                    raise
                break
            try:
                entry = decode(kind, payload, n_kv_heads)
            except ValueError as error:
                raise self.damaged(at, str(error)) from None
            if entry.kind == Kind.STORE:
                if at:
                    raise self.damaged(at, "a second beginning")
                (self._about,) = entry.values
                self._generation = self._about.pop("generation", 0)
                n_whole = self._about.pop("records", 0)
                if self._generation < end_generation:
                    raise self.damaged(
                        at, "it is older than its mark journal.end; a copy was put back"
                    )
                if self._generation > end_generation:  # the mark was to follow
                    end_bytes = end_check = 0
            elif not at:
                raise self.damaged(at, "it does not begin with the store's description")
            if at + size == end_bytes:
                if (self._at.serial, check) != (end_serial, end_check):
                    raise self.damaged(at, "it is not the record that was flushed")
            elif at < end_bytes < at + size:
                raise self.damaged(at, "its mark journal.end is of another journal")
            yield entry, at
            at += size
            self._at = _Place(at, self._at.serial + 1, check)
        if at < end_bytes or self._at.serial < max(n_whole, 1):
            raise FlashError(
                f"the journal ends {max(end_bytes - at, 1)} bytes before what was flushed",
                filename=self.path, offset=at,
                remedy="put the file back from a copy, or delete the store and compute its sequences "
                "again",
            )  # fmt: skip
        self.cut_bytes = len(data) - at
        self.unflushed = at > end_bytes or bool(self.cut_bytes)

    def cut(self) -> None:
        """Cut a torn tail off, and what was left of a journal that was being written anew."""
        if self.cut_bytes:
            self._file.cut(self.nbytes)
        self._directory.remove(NEW_NAME)

    def _record(self, data: bytes, at: int) -> tuple[int, bytes, int, int]:
        """(kind, payload, bytes, checksum) of the record at `at`.

        Raises
        ------
        FlashError
            If it is not whole.
        """
        left = len(data) - at
        if left < _HEAD_BYTES:
            raise self.damaged(at, "it ends in the middle of it")
        magic, kind, _, length, serial, before = _HEAD.unpack_from(data, at)
        (head_check,) = struct.unpack_from("<I", data, at + _HEAD.size)
        if head_check != google_crc32c.value(data[at : at + _HEAD.size]) or magic != _MAGIC:
            raise self.damaged(at, "the header's checksum differs")
        if (serial, before) != (self._at.serial, self._at.check):
            raise self.damaged(
                at, f"record {serial} stands where {self._at.serial} should; one is missing"
            )
        size = _HEAD_BYTES + length + 4
        if left < size:
            raise self.damaged(at, "it ends in the middle of it")
        (check,) = struct.unpack_from("<I", data, at + size - 4)
        if check != google_crc32c.value(data[at : at + size - 4]):
            raise self.damaged(at, "the checksum differs")
        return kind, data[at + _HEAD_BYTES : at + size - 4], size, check

    @property
    def about(self) -> dict:
        """What the first record says of the store."""
        return self._about

    def damaged(self, at: int, what: str) -> FlashError:
        """The error of a record that is wrong."""
        return FlashError(
            f"the journal is damaged in record {self._at.serial}: {what}", filename=self.path, offset=at,
            remedy="nothing was changed; put the file back from a copy, or delete the store and "
            "compute its sequences again",
        )  # fmt: skip

    # --- writing --------------------------------------------------------------------------------

    def append(self, kind: Kind, payload: bytes) -> None:
        """Write a record behind the last. After an error there is nothing of it.

        Raises
        ------
        FlashError
            If the drive fails.
        """
        if self._broken:
            raise FlashError(
                f"the journal cannot be written any more: {self._broken}", filename=self.path,
                remedy="what was recorded before is untouched; close the store and open it again",
            )  # fmt: skip
        record = _encode(kind, payload, self._at.serial, self._at.check)
        self._set_aside(kind, len(record))
        try:
            self._file.write(self.nbytes, record, what="write the journal of the KV store")
        except FlashError as error:
            try:
                self._file.cut(self.nbytes)
            except FlashError:
                self._broken = f"a record was left incomplete ({error})"
            raise
        self.written_bytes += len(record)
        (check,) = struct.unpack_from("<I", record, len(record) - 4)
        self._at = _Place(self.nbytes + len(record), self._at.serial + 1, check)

    def _set_aside(self, kind: Kind, nbytes: int) -> None:
        """Keep SPARE_BYTES reserved behind a record; what adds pages is refused without them."""
        need = self.nbytes + nbytes + SPARE_BYTES
        if need <= self._reserved_bytes:
            return
        try:
            self._file.set_aside(self.nbytes, nbytes + 2 * SPARE_BYTES)
        except FlashError:
            if kind in (Kind.APPEND, Kind.SAVE):
                raise
        else:
            self._reserved_bytes = need + SPARE_BYTES

    def sync(self) -> None:
        """Make the drive keep every record, and note that it does.

        Raises
        ------
        FlashError
            If it may not.
        """
        self._file.sync()
        if self._renamed:
            self._directory.sync()
            self._renamed = False
        end = _END.pack(
            _END_MAGIC, self._generation, self.nbytes, self._at.serial - 1, self._at.check
        )
        end += struct.pack("<I", google_crc32c.value(end))
        turn = 1 - self._end_turn  # the other copy is whole, whatever becomes of this one
        self._end_file.write(
            turn * _END_BYTES, end.ljust(_END_BYTES, b"\0"),
            what="write the journal of the KV store",
        )  # fmt: skip
        self._end_file.sync()
        self._end_turn = turn

    def due(self, used_bytes: int) -> bool:
        """Whether it has become far longer than the `used_bytes` that it would take."""
        return self.nbytes > max(COMPACT_BYTES, 4 * used_bytes)

    def rewrite(self, records: Sequence[tuple[Kind, bytes]]) -> None:
        """Write the journal anew: the description, then `records`.

        The old one stays until the new one is whole and kept by the drive.

        Raises
        ------
        FlashError
            If the drive fails; the old journal goes on then.
        """
        about = self._about | {"generation": self._generation + 1, "records": len(records) + 1}
        file = None
        try:
            self._directory.remove(NEW_NAME)
            file = self._directory.create(NEW_NAME)
            check = at = 0
            for serial, (kind, payload) in enumerate(
                [(Kind.STORE, json.dumps(about).encode()), *records]
            ):
                record = _encode(kind, payload, serial, check)
                file.write(at, record, what="write the journal of the KV store")
                at += len(record)
                (check,) = struct.unpack_from("<I", record, len(record) - 4)
            file.sync()
            self._directory.rename(NEW_NAME, NAME)
        except BaseException:
            if file is not None:
                file.close()
            self._directory.remove(NEW_NAME)
            raise
        self._file.close()
        file.path = self._file.path
        self._file = file
        self._generation += 1
        self._at = _Place(at, len(records) + 1, check)
        self.written_bytes += at
        self._reserved_bytes = 0
        self._broken = ""
        self._renamed = True
        self.sync()

    def close(self) -> None:
        self._file.close()
        self._end_file.close()

    def _read_end(self) -> tuple[int, int, int, int]:
        """(generation, bytes, serial, checksum) of what is known to be kept.

        Of two copies one may be torn; the other is then as old as the flush before.
        """
        data = self._end_file.read(0, 2 * _END_BYTES)
        found = []
        for turn in range(2):
            end = data[turn * _END_BYTES :][: _END.size]
            check = data[turn * _END_BYTES + _END.size :][:4]
            if len(check) == 4 and struct.unpack("<I", check)[0] == google_crc32c.value(end):
                magic, *mark = _END.unpack(end)
                if magic == _END_MAGIC:
                    found.append((tuple(mark), turn))
        if not found:
            raise FlashError(
                "the mark of how far the journal was flushed is damaged",
                filename=self._end_file.path,
                remedy="put the file back from a copy, or delete the store and compute its sequences "
                "again",
            )  # fmt: skip
        mark, self._end_turn = max(found)
        return mark


def _encode(kind: Kind, payload: bytes, serial: int, before: int) -> bytes:
    head = _HEAD.pack(_MAGIC, kind, 0, len(payload), serial, before)
    record = head + struct.pack("<I", google_crc32c.value(head)) + payload
    return record + struct.pack("<I", google_crc32c.value(record))


def _pack_pages(pages: np.ndarray) -> bytes:
    packed = np.zeros(pages.shape, _PAGE)
    for name in _PAGE.names or ():
        packed[name] = pages[name]
    return packed.tobytes()


def _unpack_blocks(payload: bytes, at: int, count: int, n_kv_heads: int):
    ids = np.frombuffer(payload, "<u4", count, at).astype(np.int64)
    packed = np.frombuffer(payload, _PAGE, n_kv_heads * count, at + 4 * count)
    if at + 4 * count + packed.nbytes != len(payload):
        raise ValueError(f"{len(payload)} bytes for {count} blocks of {n_kv_heads} heads")
    pages = np.zeros((n_kv_heads, count), STORED_PAGE)
    for name in _PAGE.names or ():
        pages[name] = packed[name].reshape(n_kv_heads, count)
    return ids, pages


def _pack_tables(tables) -> bytes:
    parts = []
    for sequence, layer, position, ids in tables:
        parts.append(struct.pack("<qIII", sequence, layer, position, len(ids)))
        parts.append(np.asarray(ids, "<u4").tobytes())
    return b"".join(parts)


def _tables(payload: bytes, at: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    while at < len(payload):
        sequence, layer, position, count = struct.unpack_from("<qIII", payload, at)
        ids = np.frombuffer(payload, "<u4", count, at + 20).astype(np.int64)
        yield sequence, layer, position, ids
        at += 20 + 4 * count
