# SPDX-License-Identifier: Apache-2.0
"""The page store: what is written where, who owns it, and what survives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import errno
import logging
import mmap
import os
from pathlib import Path
import threading
import time
import weakref

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import ABI_VERSION, KvType, PageLayout

from ..io import FlashError, PageId, Read, Window, read_into, signals
from .behind import WriteBehind
from .home import Home, read_about
from .journal import (
    Kind,
    encode_append,
    encode_blocks,
    encode_change,
    encode_drop,
    encode_save,
)
from .space import Space, runs_of
from .tables import STORED_PAGE, Change, Snapshot, Table, Tables
from .writer import PageWriter, Spill

log = logging.getLogger("nearkv")

DELAYED_BYTES = 128 << 20  # of K and V that may wait to be written
TIMEOUT_S = 60.0
# What a store that is never flushed may come to: pages whose places are not free yet, its journal.
LIMBO_BYTES = 256 << 20
LONG_BYTES = 16 << 20


class KvStore:
    """Pages of K and V on flash, with what the card needs to know about each.

    A page holds `page_tokens` tokens of one kv head of one layer. The pages of all kv heads for the
    same tokens are a *block*; a sequence has a table of blocks for each layer, and a block belongs to
    any number of sequences (`arrange`). A *shard* is what one card serves, on one drive: a page file in
    a directory. Pages of one head are placed together, in runs of 1 MiB and more when there are that
    many, and spread over the shards by bytes, layer by layer, because the cards work on one layer at a
    time.

    With `delayed_bytes`, pages are packed, checksummed and written by a thread of their own, in windows
    in which the drive does not read. Whoever asks for pages that are not written yet waits for them;
    what went wrong is raised by the next call for that sequence, and the call after that tries again.

    A temporary store has files without names: nothing is left of it, whatever ends its process. A
    persistent store records every change in a journal. When its process is killed, what was written by
    then is there when it is opened again; what `append` raised is not. Against the loss of power,
    `flush`, `save` and `close` make the drive keep pages, then journal, then names.

    Any thread may call any method; calls take turns. A process that was forked has no store: every
    method raises there, and its end disturbs nothing.

    Parameters
    ----------
    directory : path, or a sequence of them
        One for each shard, or fewer, which shards go round (`io.shards_of`). The last component is made if it is missing. A persistent
        store that is there already is opened with what it has.
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
        Limit on what is written to flash in the life of this object.
    timeout_s : float
        How long a call waits for a drive that makes no progress.

    Attributes
    ----------
    bytes_given, bytes_written, journal_bytes_written : int
        K and V of the tokens that were appended; bytes of pages and of the journal written for them.
    epoch : int
        Changes whenever pages that were there are taken back or take another place.
    notices : list of str
        What was found on opening that the user should know: a torn tail that was cut off.

    Raises
    ------
    FlashError
        If a directory cannot be written, or a store in it is damaged or in use.
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
        timeout_s: float = TIMEOUT_S,
    ):
        self.layout, self.n_kv_heads = layout, n_kv_heads
        self.temporary, self.budget_bytes, self.timeout_s = temporary, budget_bytes, timeout_s
        several = not isinstance(directory, (str, os.PathLike))
        paths = [Path(one) for one in directory] if several else [Path(directory)]
        self.n_shards = len(paths) if n_shards is None else n_shards
        if not 1 <= len(paths) <= self.n_shards:
            raise ValueError(
                f"{self.n_shards} shards need from one directory to {self.n_shards}, not {len(paths)}"
            )
        if len({one.resolve() for one in paths}) < len(paths):
            raise ValueError("each shard needs a directory of its own, or all one directory")
        self.weights = np.ones(self.n_shards) if weights is None else np.asarray(weights, float)
        if self.weights.shape != (self.n_shards,) or not (self.weights > 0).all():
            raise ValueError(f"weights must be {self.n_shards} positive numbers, not {weights}")
        self.directories = paths
        self.bytes_given = 0
        self.epoch = 0
        self.notices: list[str] = []
        self._tables = Tables(n_kv_heads, self.n_shards)
        self._unsafe = False  # there is something that a loss of power would take
        self._closed = False
        self._broken = ""
        self._long_bytes = LONG_BYTES
        self._owed: bytes | None = None  # a SAVE that takes back another, not recorded yet
        self._pid = os.getpid()
        self._change = threading.Condition(threading.RLock())
        about = {
            "abi_version": ABI_VERSION, "head_dim": layout.head_dim,
            "page_tokens": layout.page_tokens, "kv_type": layout.kv_type.name,
            "page_bytes": layout.page_bytes, "n_kv_heads": n_kv_heads, "n_shards": self.n_shards,
            "n_directories": len(paths),
        }  # fmt: skip
        # A signal's handler may raise when all is open, and nobody would have the store to close it.
        with contextlib.ExitStack() as opened:
            with signals.waiting():
                self._home = Home(paths, about, temporary=temporary)
                opened.callback(self._home.close)
                self._open(paths, delayed_bytes)
                # Of a store that is forgotten without having been closed.
                weakref.finalize(self, self._home.close).atexit = False
            opened.pop_all()

    def _open(self, paths: list[Path], delayed_bytes: int) -> None:
        files = self._home.files
        if not all(file.direct for file in files):
            log.warning(
                "%s: the file system has no O_DIRECT; pages go through the page cache", paths[0]
            )
        windows: dict[int, Window] = {}  # one for each drive
        self._windows = [
            windows.setdefault(self._home.directory_of(shard).device, Window(self.timeout_s))
            for shard in range(self.n_shards)
        ]
        self._space = Space(files, self.layout.page_bytes, self.weights, self._sync)
        self._writer = PageWriter(self.layout, files, self._windows)
        self._delayed = delayed_bytes > 0
        self._behind = WriteBehind(
            PageWriter(self.layout, files, self._windows), self._change,
            limit_bytes=delayed_bytes, wait=self._wait, record=self._finish,
        )  # fmt: skip
        if not self._home.is_new:
            self._replay()

    @staticmethod
    def describe(directory) -> tuple[PageLayout, int, int]:
        """Layout, kv heads and shards of the persistent store in a directory, without opening it.

        Raises
        ------
        FlashError
            If there is none, or its description is damaged.
        ValueError
            If it is of another format.
        """
        first = directory if isinstance(directory, (str, os.PathLike)) else directory[0]
        about = read_about(Path(first))
        layout = PageLayout(about["head_dim"], about["page_tokens"], KvType[about["kv_type"]])
        return layout, about["n_kv_heads"], about["n_shards"]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Write what waits, make the drive keep it, and close every file. May be called again.

        A temporary store writes nothing more, and is gone afterwards.

        Raises
        ------
        FlashError
            If tokens that were to stay could not be written.
        """
        if os.getpid() != self._pid:
            return
        errors: list[FlashError] = []
        with signals.waiting():
            with self._entered("to close the store"):
                if not self._closed:
                    self._end(errors)
            end = time.monotonic() + self.timeout_s
            while not self._behind.join(signals.SLICE_S) and time.monotonic() < end:
                signals.deliver()
            if self._behind.join(0):  # a thread that hangs in a write needs its files
                with self._change:
                    self._home.close()
        if errors and not self.temporary:
            raise errors[0]

    def _end(self, errors: list[FlashError]) -> None:
        """What `close` does in its turn."""
        with _collecting(errors):
            if self.temporary:
                with self._behind.giving_up(_Everything()):
                    pass
            self._behind.end()
            self._wait(lambda: self._behind.idle, "the last pages")
        errors += self._behind.failed.values()
        if not self.temporary:
            with _collecting(errors):
                self._sync()
                if not errors and not self._broken:  # or the tables name pages that are not there
                    self._compact()
        self._closed = True

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
        _check_numbers([sequence], layer)
        with self._turn("to append pages"):
            self._behind.raise_failed(sequence)
            k, v = self._patterns(k, v, sequence, layer)
            page_tokens, n_tokens = self.layout.page_tokens, k.shape[1]
            if n_tokens % page_tokens and not ragged:
                raise ValueError(
                    f"pages are written full: {page_tokens} tokens each, not {n_tokens}"
                )
            n_new = -(-n_tokens // page_tokens)
            if n_new == 0:
                return
            if self._delayed:  # others may have their turn meanwhile
                self._behind.make_room(k.nbytes + v.nbytes, sequence)
            self._tidy()
            table = self._tables.find(sequence, layer)
            position = len(table) if table else 0
            page = PageId(layer, sequence, 0, position)
            if table and position and self._last_len(table, layer) < page_tokens:
                raise ValueError(f"the last page of layer {layer}, sequence {sequence} is ragged")
            self._check_budget(n_new, page)
            with self._tables.growing(sequence, layer) as table:
                new = self._space.place(table, self._tables.blocks(layer), n_new, page)
                new["page_len"] = page_tokens
                new["page_len"][:, -1] = n_tokens - (n_new - 1) * page_tokens
                ids = np.zeros(0, np.int64)
                if self._delayed:
                    k, v = k.copy(), v.copy()
                    ids = self._tables.append(sequence, layer, position, new)
                    self._behind.put(Spill(sequence, layer, position, ids, k, v, new, table))
                else:
                    self._append_now(Spill(sequence, layer, position, ids, k, v, new, table))
            self.bytes_given += k.nbytes + v.nbytes

    def _append_now(self, spill: Spill) -> None:
        """Write pages, then record them; after an error there is nothing of them."""
        sequence, layer, position, new = spill.sequence, spill.layer, spill.position, spill.pages
        try:
            self._writer.write([spill])
        except BaseException:
            self._space.give(new.reshape(-1), punch=True)
            raise
        with self._changing():
            ids = self._tables.append(sequence, layer, position, new)
            try:
                self._record(Kind.APPEND, encode_append(sequence, layer, position, ids, new))
            except FlashError:
                self._tables.apply([Change(layer, sequence, position, ids[:0])])
                self._space.give(new.reshape(-1), punch=True)
                raise

    def truncate(self, sequence: int, layer: int, n_pages: int) -> None:
        """Forget the pages from `n_pages` on; their space is used again.

        Raises
        ------
        FlashError
            If there is no such sequence.
        """
        _check_numbers([sequence], layer, n_pages)
        with self._turn("to take pages back"):
            self._known(sequence)
            self._settle(sequence, layer)
            self._known(sequence)  # others had their turn meanwhile
            table = self._tables.find(sequence, layer)
            if table is not None and n_pages < len(table):
                self._space.give_room(table)
                nothing = np.zeros(0, np.int64)
                self._apply([Change(layer, sequence, n_pages, nothing)])

    def arrange(
        self,
        sources: Mapping[int, int],
        *,
        layer: int | None = None,
        n_pages: int | None = None,
    ) -> None:
        """Give sequences the pages of others, all at once: for forks, beams and shared prefixes.

        No page is copied: it has one more owner. Every target is afterwards what its source was
        before the call; sequences that are no target stay as they are.

        Parameters
        ----------
        sources : mapping of target to source
        layer : int, optional
            Of this layer alone. Default: all layers.
        n_pages : int, optional
            How many pages of the source at most. Default: all.

        Raises
        ------
        FlashError
            If a source is unknown, or its pages could not be written.
        """
        _check_numbers([*sources, *sources.values()], layer, n_pages)
        with self._turn("to share pages"):
            while True:  # others have their turn while it waits
                for source in sources.values():
                    self._known(source)
                involved = [
                    (sequence, one)
                    for sequence in {*sources, *sources.values()}
                    for one in self._layers(sequence, layer)
                ]
                if all(self.settled(*one) for one in involved):
                    break
                for one in involved:
                    self._settle(*one)
            self._tidy()
            changes = []
            for target, source in sources.items():
                for one in sorted({*self._layers(target, layer), *self._layers(source, layer)}):
                    theirs = self._tables.find(source, one)
                    ids = theirs.ids[:n_pages].copy() if theirs else np.zeros(0, np.int64)
                    mine = self._tables.find(target, one)
                    old = mine.ids if mine else np.zeros(0, np.int64)
                    same = min(len(ids), len(old))
                    differ = np.flatnonzero(ids[:same] != old[:same])
                    start = int(differ[0]) if len(differ) else same
                    if mine is None or start < max(len(ids), len(old)):
                        changes.append(Change(one, target, start, ids[start:]))
            if changes:
                for change in changes:
                    if (table := self._tables.find(change.sequence, change.layer)) is not None:
                        self._space.give_room(table)
                self._apply(changes)

    def compose(self, sequence: int, blocks: Mapping[int, np.ndarray]) -> None:
        """Make a sequence of blocks that others have: for the block tables of an engine.

        No page is copied: it has one more owner.

        Parameters
        ----------
        sequence : int
        blocks : mapping of layer to ints (n_pages,)
            As `blocks` names them. The layer's table is these afterwards, whatever it was before; the
            tables of other layers stay as they are.

        Raises
        ------
        ValueError
            If a block is free, or waits to be written.
        FlashError
            If that could not be recorded.
        """
        _check_numbers([sequence], None)
        with self._turn("to compose a sequence"):
            for layer in blocks:
                _check_numbers([], layer)
                self._settle(sequence, layer)
            self._tidy()
            changes = []
            for layer, ids in blocks.items():
                ids = np.array(ids, np.int64)
                if self._behind.has(layer, ids):
                    raise ValueError(
                        f"blocks of layer {layer} wait to be written; settle them first"
                    )
                if not self._tables.blocks(layer).owned(ids):
                    raise ValueError(f"a block of layer {layer} is free, and cannot be had")
                table = self._tables.find(sequence, layer)
                if table is not None:
                    self._space.give_room(table)
                changes.append(Change(layer, sequence, 0, ids))
            if changes:
                self._apply(changes)

    def drop(self, sequence: int, *, erase: bool = False) -> int:
        """Forget a sequence. Pages that nobody else has give their space back.

        Parameters
        ----------
        erase : bool
            Overwrite those pages, wait until the drive has done so, and discard them. What a drive
            keeps of overwritten data in its spare blocks is beyond the reach of any program.

        Returns
        -------
        int
            Pages that stay, because other sequences or the snapshot own them too.

        Raises
        ------
        FlashError
            If there is no such sequence, or it could not be erased.
        """
        with self._turn("to drop a sequence"):
            self._known(sequence)
            with self._behind.giving_up({sequence}), self._changing():
                tables = self._known(sequence)  # others had their turn meanwhile
                n_pages = sum(len(table) for table in tables.values()) * self.n_kv_heads
                self._record(Kind.DROP, encode_drop(sequence))
                for table in tables.values():
                    self._space.give_room(table)
                freed = self._tables.drop(sequence)
            try:
                if erase:
                    self._sync()  # or a loss of power could bring it back, without its bytes
                    self._space.erase(freed)
            except FlashError as error:
                raise FlashError(
                    "the sequence is forgotten, but its pages could not be overwritten",
                    errno=error.errno, filename=error.filename, offset=error.offset,
                    remedy="to be sure that nothing is left of it, delete the store and discard the "
                    "drive's free space (fstrim)",
                ) from error  # fmt: skip
            finally:
                self._release(freed)
            if erase:
                self._unsafe = True
                self._sync()
            return n_pages - sum(len(pages) for pages in freed)

    def flush(self) -> None:
        """Write everything that waits to be written, and make the drive keep it.

        Raises
        ------
        FlashError
            The first thing that went wrong.
        """
        with self._turn("to flush the store"):
            self._settle_all()
            if not self.temporary:
                self._sync()
                self._compact()

    def settle(self, sequence: int, layer: int) -> None:
        """Wait until every page of (layer, sequence) is written.

        Raises
        ------
        FlashError
            If that failed. The next call tries again.
        """
        with self._turn("for pages to be written"):
            self._settle(sequence, layer)

    def settled(self, sequence: int, layer: int) -> bool:
        """Whether every page of (layer, sequence) is written."""
        self._check()
        table = self._tables.find(sequence, layer)
        return table is None or not table.n_waiting

    @property
    def write_amplification(self) -> float:
        """Bytes written for each byte of K and V that was given. 0 before the first."""
        written = self.bytes_written + self.journal_bytes_written
        return written / self.bytes_given if self.bytes_given else 0.0

    @property
    def bytes_written(self) -> int:
        return self._writer.written_bytes + self._behind.writer.written_bytes

    @property
    def journal_bytes_written(self) -> int:
        return self._home.journal.written_bytes if self._home.journal else 0

    # --- snapshots ----------------------------------------------------------------------------

    def save(self, data: bytes) -> None:
        """Make a snapshot of all tables, with any bytes that belong to it, in place of the last.

        It owns its pages: whatever becomes of the sequences, `restore` brings them back, in this
        process or in the next. When this returns the drive keeps it; when it raises or is
        interrupted, the snapshot before it is whole.

        Raises
        ------
        FlashError
            If a page or `data` could not be written.
        ValueError
            If the store is temporary.
        """
        if self.temporary:
            raise ValueError("a temporary store cannot be saved; make it persistent")
        with self._turn("to save the store"):
            self._settle_all()
            about = self._home.write_state(data)
            tables, before = self._tables.current(), self._tables.snapshot or Snapshot({})
            with self._changing():
                self._record(Kind.SAVE, encode_save(about, tables))
                try:
                    self._sync()
                except FlashError:
                    self._take_back(before)
                    raise
                self._release(self._tables.save(about, tables))
                self._space.settle_limbo()
            self._home.remove_states(about["number"])
            self._compact()

    def _take_back(self, before: Snapshot) -> None:
        """The drive may not keep a snapshot that was recorded: the one before it is recorded again."""
        self._owed = encode_save(before.about, before.tables)
        with contextlib.suppress(FlashError):  # or as soon as the drive takes a record
            self._record_owed()

    def saved(self) -> bytes | None:
        """What was given to the last `save`; None if there was none.

        Raises
        ------
        FlashError
            If it is damaged.
        """
        with self._turn("to read what was saved"):
            snapshot = self._tables.snapshot
            return None if snapshot is None else self._home.read_state(snapshot.about)

    def restore(self) -> None:
        """Make every sequence what it was at the last `save`, and forget those that are newer.

        Raises
        ------
        FlashError
            If nothing was saved.
        """
        with self._turn("to restore the store"):
            if self._tables.snapshot is None:
                raise FlashError(
                    "nothing was saved in this KV store", filename=self.directories[0],
                    remedy="save it first",
                )  # fmt: skip
            with self._behind.giving_up(_Everything()), self._changing():
                self._record(Kind.RESTORE, b"")
                for tables in self._tables.of.values():
                    for table in tables.values():
                        self._space.give_room(table)
                self._release(self._tables.restore())

    # --- reading ----------------------------------------------------------------------------

    def sequences(self) -> list[int]:
        """Those that are known."""
        self._check()
        return sorted(self._tables.of)

    def layers(self, sequence: int) -> list[int]:
        """Those that have pages of a sequence."""
        with self._turn("to look at the tables"):
            return sorted(layer for layer, table in self._known(sequence).items() if len(table))

    def n_pages(self, sequence: int, layer: int) -> int:
        """Pages that each kv head of (layer, sequence) has; 0 of a sequence that is not known."""
        self._check()
        table = self._tables.find(sequence, layer)
        return len(table) if table else 0

    def n_blocks(self, layer: int) -> int:
        """Blocks of a layer that are stored, each counted once, however many sequences have it."""
        with self._turn("to look at the tables"):
            return len(self._tables.layers[layer].used()) if layer in self._tables.layers else 0

    def blocks(self, sequence: int, layer: int) -> np.ndarray:
        """The block table of (layer, sequence): int64 (n_pages,)."""
        with self._turn("to look at the tables"):
            table = self._known(sequence).get(layer)
            return np.zeros(0, np.int64) if table is None else table.ids.copy()

    def stored(self, sequence: int, layer: int, n_pages: int | None = None) -> np.ndarray:
        """What is known of the pages: STORED_PAGE (n_kv_heads, n_pages), not to be changed.

        Waits until they are written.

        Parameters
        ----------
        n_pages : int, optional
            How many the caller relies on. Default: all there are.

        Raises
        ------
        FlashError
            If there are fewer than that, or one could not be written.
        """
        # Asked for each layer of each step: what is known already takes no turn.
        self._check()
        table = self._tables.find(sequence, layer)
        known = None if table is None else table.known
        if known is not None and not self._behind.has_failed(sequence):
            if n_pages is None or 0 <= n_pages <= known.shape[1]:
                return known[:, :n_pages]
        with self._turn("for pages to be written"):
            self._settle(sequence, layer)
            table = self._tables.find(sequence, layer)
            have = len(table) if table else 0
            if n_pages is not None and not 0 <= n_pages <= have:
                raise FlashError(
                    f"{n_pages} pages of layer {layer}, sequence {sequence} are asked for, and the "
                    f"store has {have}", filename=self.directories[0],
                    remedy="the sequence has to be computed again",
                )  # fmt: skip
            if table is None or not have:
                return np.zeros((self.n_kv_heads, 0), STORED_PAGE)
            return table.pages(self._tables.blocks(layer))[:, :n_pages]

    def reads(self, page: PageId, numbers: np.ndarray, kv_offset: int) -> list[Read]:
        """The reads that bring pages to kv memory, one behind the other.

        One read for each run of pages that lie together in the file.

        Parameters
        ----------
        page : PageId
            Layer, sequence and kv head are what counts.
        numbers : ints, ascending
            Which of its pages.
        kv_offset : int
        """
        page_bytes = self.layout.page_bytes
        numbers = np.asarray(numbers)
        n_pages = int(numbers.max(initial=-1)) + 1
        entries = self.stored(page.sequence, page.layer, n_pages)[page.kv_head][numbers]
        edges = {edge for run in runs_of(entries, page_bytes) for edge in run}
        # A read names its first page; the others have the numbers that follow.
        edges |= {int(at) + 1 for at in np.flatnonzero(np.diff(numbers) != 1)}
        edges = sorted(edges)
        reads = []
        for a, b in zip(edges, edges[1:], strict=False):
            file = self._home.files[entries["shard"][a]]
            reads.append(
                Read(file.fd, file.path, int(entries["offset"][a]), (b - a) * page_bytes,
                     kv_offset + a * page_bytes, page._replace(page=int(numbers[a])), page_bytes,
                     self._windows[entries["shard"][a]], file.direct)
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
            If there are not that many, the file is shorter than it should be, or a checksum differs.
        """
        page_bytes = self.layout.page_bytes
        stored = self.stored(page.sequence, page.layer, page.page + n_pages)
        stored = stored[page.kv_head, page.page :]
        if not n_pages:
            return np.zeros((0, page_bytes), np.uint8)
        buffer = mmap.mmap(-1, n_pages * page_bytes)
        data = np.frombuffer(buffer, np.uint8)
        for read in self.reads(page, np.arange(page.page, page.page + n_pages), 0):
            with read.window.reading() if read.window else contextlib.nullcontext():
                read_into(read, data)
        data = data.reshape(n_pages, page_bytes)
        for i, entry in enumerate(stored):
            crcs = pages.checksums(self.layout, data[i], int(entry["page_len"]))
            if crcs != (entry["crc_k"], entry["crc_v"]):
                raise FlashError(
                    "the page's bytes have changed: CRC-32C mismatch",
                    page=page._replace(page=page.page + i),
                    filename=self._home.files[entry["shard"]].path,
                    offset=int(entry["offset"]),
                    remedy="the sequence has to be computed again",
                )  # fmt: skip
        return data

    def locate(self, page: PageId) -> tuple[Path, int]:
        """File and byte offset of a page, for error messages."""
        entry = self.stored(page.sequence, page.layer, page.page + 1)[page.kv_head, page.page]
        return self._home.files[entry["shard"]].path, int(entry["offset"])

    def page_files(self) -> list[Path]:
        """Paths by which this process reaches the page file of each shard, those without a name too."""
        self._check()
        return [Path(f"/proc/self/fd/{file.fd}") for file in self._home.files]

    # --- who may call, and how long that may take ---------------------------------------------------

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise FlashError(
                f"the KV store belongs to process {self._pid}, not to {os.getpid()}, which was forked "
                "from it", filename=self.directories[0],
                remedy="open a store of its own in each process",
            )  # fmt: skip
        if self._closed:
            raise FlashError(
                "the KV store is closed", filename=self.directories[0], remedy="open it again"
            )
        if self._broken:
            raise FlashError(
                f"the KV store was interrupted in the middle of a change ({self._broken})",
                filename=self.directories[0],
                remedy="close it and open it again: what was recorded before is untouched",
            )  # fmt: skip

    @contextlib.contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """One call at a time, for an open store. Signals wait until it is over."""
        self._check()
        with self._entered(what):
            self._check()
            yield

    @contextlib.contextmanager
    def _entered(self, what: str) -> Iterator[None]:
        with signals.waiting():
            end = time.monotonic() + self.timeout_s
            while not self._change.acquire(timeout=min(signals.SLICE_S, self.timeout_s)):
                signals.deliver()
                if time.monotonic() >= end:
                    raise self._late(f"another call on this store, {what}")
            try:
                yield
            finally:
                self._change.release()

    def _wait(self, done: Callable[[], object], what: str) -> None:
        """Wait, in one's turn, until `done`; give up when the drive makes no progress."""
        writer, since = self._behind.writer, time.monotonic()
        seen = writer.written_bytes
        while not done():
            left = since + self.timeout_s - time.monotonic()
            if left <= 0:
                raise self._late(what)
            self._behind.hurry()
            self._change.wait(min(left, signals.SLICE_S))
            signals.deliver()
            if writer.written_bytes != seen:
                seen, since = writer.written_bytes, time.monotonic()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """What is recorded and what is in memory change together, or the store cannot go on.

        An error of the drive comes before anything has changed. An interrupt (Ctrl-C) may come
        between the two; then the journal is right and memory is not.
        """
        try:
            yield
        except FlashError:
            raise
        except BaseException as error:
            self._broken = type(error).__name__
            raise

    def _late(self, what: str) -> FlashError:
        return FlashError(
            f"waited {self.timeout_s:g} s for {what}; the drive makes no progress",
            errno=errno.ETIMEDOUT, filename=self.directories[0],
            remedy="is the drive alive? See the kernel's log",
        )  # fmt: skip

    # --- inside: tables and space -------------------------------------------------------------------

    def _known(self, sequence: int) -> dict[int, Table]:
        """The tables of a sequence, by layer."""
        if sequence not in self._tables.of:
            raise FlashError(
                f"there is no sequence {sequence} in the KV store", filename=self.directories[0],
                remedy="it was dropped, or never stored; compute it again",
            )  # fmt: skip
        return self._tables.of[sequence]

    def _layers(self, sequence: int, layer: int | None) -> list[int]:
        return list(self._tables.of.get(sequence, {})) if layer is None else [layer]

    def _last_len(self, table: Table, layer: int) -> int:
        return int(self._tables.blocks(layer).pages[0, table.ids[-1]]["page_len"])

    def _apply(self, changes: list[Change]) -> None:
        with self._changing():
            self._record(Kind.CHANGE, encode_change(changes))
            self._release(self._tables.apply(changes))

    def _record(self, kind: Kind, payload: bytes) -> None:
        if self._home.journal is not None:
            self._record_owed()
            try:
                self._home.journal.append(kind, payload)
            except FlashError as error:
                if error.errno != errno.ENOSPC or not self._space.limbo_bytes:
                    raise
                self._sync()  # what was freed since the last flush is to be had now
                self._home.journal.append(kind, payload)
            self._unsafe = True

    def _record_owed(self) -> None:
        if self._owed is not None and self._home.journal is not None:
            self._home.journal.append(Kind.SAVE, self._owed)
            self._owed, self._unsafe = None, True

    def _release(self, freed: list[np.ndarray]) -> None:
        """Take note of pages that nobody has any more."""
        self.epoch += 1
        for one in freed:
            if not len(one):
                continue
            if self.temporary:
                self._space.give(one, punch=True)
            else:
                self._space.free_later(one)

    # --- inside: checks -----------------------------------------------------------------------------

    def _patterns(self, k, v, sequence, layer):
        kv_type = self.layout.kv_type
        shape = (self.n_kv_heads, k.shape[1] if len(k.shape) == 3 else -1, self.layout.head_dim)
        if tuple(k.shape) != shape or tuple(v.shape) != shape:
            raise ValueError(
                f"k and v must have shape (n_kv_heads={self.n_kv_heads}, n_tokens, "
                f"head_dim={self.layout.head_dim}), not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        out = []
        for name, x in (("K", k), ("V", v)):
            patterns = pages.to_patterns(x, kv_type, patterns=True)
            at = pages.first_non_finite(patterns, kv_type)
            if at is not None:
                head, token, channel = at
                done = self.n_pages(sequence, layer) * self.layout.page_tokens
                raise ValueError(
                    f"Inf or NaN in {name} of layer {layer}, sequence {sequence}, kv head {head}, "
                    f"token {done + token}, channel {channel}: "
                    f"{pages.cause_of_non_finite(x, at, kv_type)}"
                )
            out.append(patterns)
        return out

    def _check_budget(self, n_new: int, page: PageId) -> None:
        if self.budget_bytes is None:
            return
        nbytes = n_new * self.n_kv_heads * self.layout.page_bytes
        used = self.bytes_written + self._behind.waiting_bytes
        if used + nbytes > self.budget_bytes:
            raise FlashError(
                f"{used} of {self.budget_bytes} bytes that may be written are used, and "
                f"{nbytes} more are needed", page=page, errno=errno.EDQUOT,
                filename=self.directories[0],
                remedy="what is stored already is untouched; raise the write budget",
            )  # fmt: skip

    # --- inside: writing ------------------------------------------------------------------------------

    def _settle(self, sequence: int, layer: int) -> None:
        """Wait until the table that is there then has no pages that wait to be written."""
        table = self._tables.find(sequence, layer)
        while table is not None:
            self._behind.settle(table, sequence, layer)
            before, table = table, self._tables.find(sequence, layer)
            if table is before:  # or somebody has dropped it meanwhile, and begun another
                return

    def _settle_all(self) -> None:
        """Wait until nothing waits to be written; raise the first thing that went wrong."""
        self._wait(lambda: self._behind.idle, "pages to be written")
        for sequence in self._behind.failed:
            self._behind.raise_failed(sequence)

    def _finish(self, spill: Spill) -> None:
        """Record pages that were written behind. Of the thread, which no signal interrupts."""
        payload = encode_append(
            spill.sequence, spill.layer, spill.position, spill.ids, spill.pages
        )  # fmt: skip
        self._record(Kind.APPEND, payload)
        self._tables.blocks(spill.layer).pages[:, spill.ids] = spill.pages  # checksums and all

    # --- inside: what lasts ---------------------------------------------------------------------------

    def _sync(self) -> None:
        """Make the drives keep what is written: pages before the journal that names them."""
        journal = self._home.journal
        if journal is None or not self._unsafe:
            return
        self._home.check_in_place()
        self._record_owed()
        self._home.sync_pages()
        journal.sync()
        self._unsafe = False
        self._space.settle_limbo()

    def _tidy(self) -> None:
        """Sync now and then when nobody flushes, or space to be freed and the journal would only grow.

        Before a change, so that an error leaves nothing half done.
        """
        journal = self._home.journal
        if journal is None:
            return
        if self._space.limbo_bytes >= LIMBO_BYTES:
            self._sync()
        if journal.nbytes >= self._long_bytes and self._behind.idle:
            self._sync()
            self._compact()
            self._long_bytes = max(LONG_BYTES, 2 * journal.nbytes)

    def _compact(self) -> None:
        """Write the journal anew if it has become far longer than what it describes.

        Nothing may wait to be written then: the tables would name pages that are not there yet.
        """
        journal = self._home.journal
        assert journal is not None
        n_pages = sum(len(blocks.used()) for blocks in self._tables.layers.values())
        if not journal.due(n_pages * self.n_kv_heads * 32):
            return
        try:
            self._rewrite()
        except FlashError as error:  # the old one goes on
            log.warning("%s; the journal stays long", error)

    def _rewrite(self) -> None:
        journal = self._home.journal
        assert journal is not None
        records = []
        for layer, blocks in self._tables.layers.items():
            used = blocks.used()
            records.append((Kind.BLOCKS, encode_blocks(layer, used, blocks.pages[:, used])))
        if (snapshot := self._tables.snapshot) is not None:
            records.append((Kind.SAVE, encode_save(snapshot.about, snapshot.tables)))
        changes = [
            Change(layer, sequence, 0, ids)
            for (sequence, layer), ids in self._tables.current().items()
        ]
        records.append((Kind.CHANGE, encode_change(changes)))  # always there, and the last
        journal.rewrite(records)

    def _replay(self) -> None:
        """Make the tables what the journal says, and the space what they leave."""
        journal, tables = self._home.journal, self._tables
        assert journal is not None
        fresh: list[tuple[int, np.ndarray]] = []  # blocks that no table names yet
        before: Snapshot | None = None  # which the next record may bring back (`_take_back`)
        for (kind, values), at in journal.read(self.n_kv_heads):
            try:
                if kind != Kind.SAVE:
                    tables.disown(before)
                    before = None
                if kind == Kind.APPEND:
                    sequence, layer, position, ids, new = values
                    tables.append(sequence, layer, position, new, ids)
                elif kind == Kind.BLOCKS:
                    layer, ids, new = values
                    tables.blocks(layer).add(new, ids)
                    fresh.append((layer, ids))
                elif kind == Kind.CHANGE:
                    tables.apply(*values)
                    for layer, ids in fresh:
                        tables.blocks(layer).disown(ids)
                    fresh.clear()
                elif kind == Kind.DROP:
                    tables.drop(*values)
                elif kind == Kind.SAVE:
                    older, before = before, tables.exchange_snapshot(*values)
                    tables.disown(older)
                elif kind == Kind.RESTORE:
                    if tables.snapshot is None:
                        raise ValueError("there is no snapshot to go back to")
                    tables.restore()
            except (ValueError, IndexError) as error:
                raise journal.damaged(at, str(error)) from None
        tables.disown(before)
        self._home.check_identity()
        nothing = np.zeros(0, STORED_PAGE)
        used = [b.pages[:, b.used()].reshape(-1) for b in tables.layers.values()]
        if not self._space.occupy(np.concatenate([nothing, *used])):
            raise journal.damaged(journal.nbytes, "two pages lie in one place")
        for blocks in tables.layers.values():
            blocks.collect()
        journal.cut()
        if journal.cut_bytes:
            self._notice(
                f"{journal.path}: {journal.cut_bytes} bytes that were not written to their end were cut "
                "off: the last changes before the process or the power ended are not there"
            )
        number = tables.snapshot.about.get("number") if tables.snapshot else None
        self._home.remove_states(number)
        if journal.unflushed:  # or what is free by it could be used while the drive still knows it
            self._unsafe = True
            self._sync()

    def _notice(self, text: str) -> None:
        self.notices.append(text)
        log.warning("%s", text)


class _Everything:
    """The set of all sequences."""

    def __contains__(self, sequence) -> bool:
        return True


def _check_numbers(sequences, layer: int | None, n_pages: int | None = None) -> None:
    for sequence in sequences:
        if not 0 <= sequence < 1 << 63:
            raise ValueError(f"sequences are numbered from 0 to 2^63 - 1, not {sequence}")
    if layer is not None and not 0 <= layer < 1 << 32:
        raise ValueError(f"layers are numbered from 0 to 2^32 - 1, not {layer}")
    if n_pages is not None and n_pages < 0:
        raise ValueError(f"a number of pages is 0 or more, not {n_pages}")


@contextlib.contextmanager
def _collecting(errors: list[FlashError]) -> Iterator[None]:
    try:
        yield
    except FlashError as error:
        errors.append(error)
