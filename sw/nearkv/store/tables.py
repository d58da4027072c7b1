# SPDX-License-Identifier: Apache-2.0
"""Block tables: which pages a sequence has, and who else has them.

A *block* is `page_tokens` tokens of one layer: a page for each kv head. A sequence's *table* of a layer
is a list of blocks. A block counts the tables that name it and is freed with the last of them, so
forks, beams, shared prefixes and snapshots are all the same thing: several tables that name one block.

This is the state of a store without any file. The journal (`journal.py`) records its changes, and
reopening a store makes the same changes again.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, field

import numpy as np

# What the store knows of one page: what `abi.PAGE_ENTRY` needs, and where it lies.
STORED_PAGE = np.dtype(
    [("offset", "<i8"), ("page_len", "<u4"), ("crc_k", "<u4"), ("crc_v", "<u4"), ("shard", "<u2")]
)


class Blocks:
    """The blocks of one layer.

    Attributes
    ----------
    pages : STORED_PAGE (n_kv_heads, capacity)
        By block.
    owners : int32 (capacity,)
        How many tables name a block; 0 if it is free.
    n_pages_of : int64 (n_shards,)
        Pages on each shard.
    """

    def __init__(self, n_kv_heads: int, n_shards: int):
        self.pages = np.zeros((n_kv_heads, 0), STORED_PAGE)
        self.owners = np.zeros(0, np.int32)
        self.n_pages_of = np.zeros(n_shards, np.int64)
        self._free: list[int] = []

    def add(self, pages: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """Take new blocks, with one owner each, for pages STORED_PAGE (n_kv_heads, n_blocks).

        `ids` says which blocks, when a journal is read; the result says which they are.

        Raises
        ------
        ValueError
            If a block that was named is in use.
        """
        count = pages.shape[1]
        if ids is None:
            ids = np.array([self._take() for _ in range(count)], np.int64)
        else:
            self._grow(int(ids.max(initial=-1)) + 1)
            if len(np.unique(ids)) < count or self.owners[ids].any():
                raise ValueError("a block is written while it is in use")
        self.pages[:, ids] = pages
        self.owners[ids] = 1
        self._count(pages, 1)
        return ids

    def own(self, ids: np.ndarray) -> None:
        """One more table names these blocks.

        Raises
        ------
        ValueError
            If one of them is free.
        """
        if not self.owned(ids):
            raise ValueError("a table names a block that is free")
        np.add.at(self.owners, ids, 1)

    def owned(self, ids: np.ndarray) -> bool:
        """Whether all of these are blocks that a table names."""
        return not ids.size or bool(
            ids.min() >= 0 and ids.max() < len(self.owners) and self.owners[ids].all()
        )

    def disown(self, ids: np.ndarray) -> np.ndarray:
        """One table less; the pages that are free now: STORED_PAGE (n,)."""
        np.subtract.at(self.owners, ids, 1)
        free = np.unique(ids[self.owners[ids] == 0])
        pages = self.pages[:, free].reshape(-1)
        self._count(pages, -1)
        self._free.extend(free[::-1].tolist())
        return pages

    def collect(self) -> None:
        """Find the free blocks again, after a journal was read."""
        self._free = np.flatnonzero(self.owners == 0)[::-1].tolist()

    def used(self) -> np.ndarray:
        """The blocks that tables name."""
        return np.flatnonzero(self.owners)

    def _take(self) -> int:
        if not self._free:
            first = len(self.owners)
            self._grow(first + 1)
            self._free = list(range(len(self.owners) - 1, first - 1, -1))
        return self._free.pop()

    def _grow(self, count: int) -> None:
        have = len(self.owners)
        if count > have:
            more = max(count - have, have // 2, 8)
            self.owners = np.concatenate([self.owners, np.zeros(more, np.int32)])
            blank = np.zeros((len(self.pages), more), STORED_PAGE)
            self.pages = np.concatenate([self.pages, blank], axis=1)

    def _count(self, pages: np.ndarray, sign: int) -> None:
        shards = pages["shard"].reshape(-1)
        self.n_pages_of += sign * np.bincount(shards, minlength=len(self.n_pages_of))


class Table:
    """The blocks of one (sequence, layer), in the order of their tokens.

    Attributes
    ----------
    room : list, by kv head, of lists of [shard, first slot, slots]
        Space that is reserved for pages to come, so that they lie together.
    n_waiting : int
        Spills among its blocks that are not written yet.
    """

    def __init__(self, n_kv_heads: int):
        self._ids = np.zeros(8, np.int64)
        self._n = 0
        self._pages: np.ndarray | None = None
        self.room: list[list[list[int]]] = [[] for _ in range(n_kv_heads)]
        self.n_waiting = 0

    def __len__(self) -> int:
        return self._n

    @property
    def ids(self) -> np.ndarray:
        """The blocks: int64 (n,), a view."""
        return self._ids[: self._n]

    @property
    def known(self) -> np.ndarray | None:
        """What `pages` gave, if the table has not changed since."""
        return self._pages

    def pages(self, blocks: Blocks) -> np.ndarray:
        """What is known of its pages: STORED_PAGE (n_kv_heads, n). Not to be changed.

        Only when all of them are written: before that their checksums are not known.
        """
        if self._pages is None:
            self._pages = blocks.pages[:, self.ids]
        return self._pages

    def replace(self, position: int, ids: np.ndarray) -> np.ndarray:
        """Put `ids` from `position` on, in the place of all there is; the blocks that were there."""
        before = self.ids[position:].copy()
        need = position + len(ids)
        if need > len(self._ids):
            grown = np.zeros(max(need, 2 * len(self._ids)), np.int64)
            grown[: self._n] = self.ids
            self._ids = grown
        self._ids[position:need] = ids
        self._n = need
        self._pages = None
        return before


@dataclass
class Change:
    """From `position` on, the table of (layer, sequence) becomes `ids`."""

    layer: int
    sequence: int
    position: int
    ids: np.ndarray


@dataclass
class Snapshot:
    """Tables as they were saved, and what was saved with them: `about` describes a file."""

    about: dict
    tables: dict[tuple[int, int], np.ndarray] = field(
        default_factory=dict
    )  # (sequence, layer): ids


class Tables:
    """All tables of a store, and the blocks of all layers."""

    def __init__(self, n_kv_heads: int, n_shards: int):
        self._n_kv_heads, self._n_shards = n_kv_heads, n_shards
        self.layers: dict[int, Blocks] = {}
        self.of: dict[int, dict[int, Table]] = {}  # sequence -> layer -> table
        self.snapshot: Snapshot | None = None

    def blocks(self, layer: int) -> Blocks:
        if layer not in self.layers:
            self.layers[layer] = Blocks(self._n_kv_heads, self._n_shards)
        return self.layers[layer]

    def find(self, sequence: int, layer: int) -> Table | None:
        return self.of.get(sequence, {}).get(layer)

    def get(self, sequence: int, layer: int) -> Table:
        """The table, made if there is none."""
        layers = self.of.setdefault(sequence, {})
        if layer not in layers:
            layers[layer] = Table(self._n_kv_heads)
        return layers[layer]

    @contextlib.contextmanager
    def growing(self, sequence: int, layer: int) -> Iterator[Table]:
        """The table, to be appended to. One that was not there is not there after an error."""
        known = self.find(sequence, layer) is not None
        try:
            yield self.get(sequence, layer)
        except BaseException:
            if not known:
                del self.of[sequence][layer]
                if not self.of[sequence]:
                    del self.of[sequence]
            raise

    def append(self, sequence, layer, position, pages, ids=None) -> np.ndarray:
        """New blocks at the end of a table; which they are.

        Raises
        ------
        ValueError
            If the table does not end at `position`, or a block is in use.
        """
        table = self.get(sequence, layer)
        if len(table) != position:
            raise ValueError(
                f"block {position} of layer {layer}, sequence {sequence} follows block {len(table)}"
            )
        ids = self.blocks(layer).add(pages, ids)
        table.replace(position, ids)
        return ids

    def apply(self, changes: Sequence[Change]) -> list[np.ndarray]:
        """Carry out changes, all at once; the pages that are free afterwards.

        Raises
        ------
        ValueError
            If a change names a free block, or begins behind the end of its table.
        """
        for change in changes:
            if change.position > len(self.get(change.sequence, change.layer)):
                raise ValueError(
                    f"layer {change.layer}, sequence {change.sequence} changes from block "
                    f"{change.position} on, behind its end"
                )
            self.blocks(change.layer).own(change.ids)
        freed = []
        for change in changes:
            table = self.get(change.sequence, change.layer)
            freed.append((change.layer, table.replace(change.position, change.ids)))
        return [self.blocks(layer).disown(ids) for layer, ids in freed]

    def drop(self, sequence: int) -> list[np.ndarray]:
        """Forget a sequence; the pages that are free afterwards."""
        tables = self.of.pop(sequence, {})
        return [self.blocks(layer).disown(table.ids.copy()) for layer, table in tables.items()]

    def current(self) -> dict[tuple[int, int], np.ndarray]:
        """Copies of all tables, by (sequence, layer)."""
        return {
            (sequence, layer): table.ids.copy()
            for sequence, tables in self.of.items()
            for layer, table in tables.items()
        }

    def save(self, about: dict, tables: Mapping[tuple[int, int], np.ndarray]) -> list[np.ndarray]:
        """Make `tables` the snapshot, in the place of the one before; the pages that are free then.

        No `about`: there is no snapshot then.

        Raises
        ------
        ValueError
            If a table names a free block.
        """
        return self.disown(self.exchange_snapshot(about, tables))

    def exchange_snapshot(
        self, about: dict, tables: Mapping[tuple[int, int], np.ndarray]
    ) -> Snapshot | None:
        """The same, but the pages of the snapshot before it stay owned; `disown` that later."""
        for (_, layer), ids in tables.items():
            self.blocks(layer).own(ids)
        before, self.snapshot = self.snapshot, Snapshot(about, dict(tables)) if about else None
        return before

    def disown(self, snapshot: Snapshot | None) -> list[np.ndarray]:
        """Nobody can want a snapshot back any more; the pages that are free then."""
        tables = {} if snapshot is None else snapshot.tables
        return [self.blocks(layer).disown(ids) for (_, layer), ids in tables.items()]

    def restore(self) -> list[np.ndarray]:
        """Make all tables what the snapshot says; the pages that are free afterwards."""
        assert self.snapshot is not None
        for (_, layer), ids in self.snapshot.tables.items():
            self.blocks(layer).own(ids)
        freed = [pages for sequence in list(self.of) for pages in self.drop(sequence)]
        for (sequence, layer), ids in self.snapshot.tables.items():
            self.get(sequence, layer).replace(0, ids)
        return freed
