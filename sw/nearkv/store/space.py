# SPDX-License-Identifier: Apache-2.0
"""Where pages lie in the page files, and which places are free."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import errno
import itertools
import mmap

import numpy as np

from ..io import File, FlashError, PageId
from .home import HEADER_BYTES
from .tables import STORED_PAGE, Blocks, Table

READ_BYTES = 1 << 20  # that lie together at least, where a sequence is long enough
GROWTH_BYTES = 16 << 20  # reserved ahead for a head's pages, at most


class Slots:
    """The places of one page each in a shard's file. Slot i lies behind slot i - 1.

    Space is handed out in runs of consecutive slots, so that what belongs together is read together.
    A run comes from the smallest free run that is long enough, otherwise from the end of the file: a
    file may have holes, but they cost no space on the drive.

    Parameters
    ----------
    used : iterable of int
        Slots that are taken already, each named once.
    """

    def __init__(self, used: Iterable[int] = ()):
        self.end = 0
        self._count: dict[int, int] = {}  # of each free run, by its first slot
        self._first: dict[int, int] = {}  # of each free run, by the slot behind it
        self._by_count: dict[int, dict[int, None]] = {}  # first slots, a dict for its order
        for slot in sorted(used):
            if slot > self.end:
                self._add(self.end, slot - self.end)
            self.end = slot + 1

    @property
    def n_free(self) -> int:
        """Free slots before the end."""
        return sum(self._count.values())

    def take(self, count: int) -> int:
        """The first of `count` consecutive slots, which are taken now."""
        best = min((size for size in self._by_count if size >= count), default=None)
        if best is not None:
            first = next(reversed(self._by_count[best]))
            self._remove(first)
            if best > count:
                self._add(first + count, best - count)
            return first
        first = self._first.get(self.end, self.end)  # what is free before the end is part of it
        if first < self.end:
            self._remove(first)
        self.end = first + count
        return first

    def give(self, first: int, count: int) -> None:
        """Make slots free that were taken."""
        if (before := self._first.get(first)) is not None:
            count += self._remove(before)
            first = before
        if first + count in self._count:
            count += self._remove(first + count)
        self._add(first, count)

    def _add(self, first: int, count: int) -> None:
        self._count[first] = count
        self._first[first + count] = first
        self._by_count.setdefault(count, {})[first] = None

    def _remove(self, first: int) -> int:
        count = self._count.pop(first)
        del self._first[first + count]
        firsts = self._by_count[count]
        del firsts[first]
        if not firsts:
            del self._by_count[count]
        return count


class Space:
    """Places for the pages of all shards.

    Parameters
    ----------
    files : sequence of File, by shard
    page_bytes : int
    weights : float (n_shards,)
        How much of every layer each shard gets.
    sync : callable
        Makes the drive keep the journal and calls `settle_limbo`. Called when a drive is full.
    """

    def __init__(
        self,
        files: Sequence[File],
        page_bytes: int,
        weights: np.ndarray,
        sync: Callable[[], object],
    ):
        self._files, self._page_bytes, self._weights, self._sync = files, page_bytes, weights, sync
        self._slots = [Slots() for _ in files]
        self._limbo: list[np.ndarray] = []
        self._n_limbo = 0

    def occupy(self, pages: np.ndarray) -> bool:
        """Take the places of pages STORED_PAGE (n,), of a store that was opened, and no others.

        False if two of them lie in one place.
        """
        for shard in range(len(self._files)):
            offsets = pages["offset"][pages["shard"] == shard]
            used = np.unique((offsets - HEADER_BYTES) // self._page_bytes)
            if len(used) < len(offsets):
                return False
            self._slots[shard] = Slots(used.tolist())
        return True

    @property
    def limbo_bytes(self) -> int:
        """Of pages that are to be free later."""
        return self._n_limbo * self._page_bytes

    def free_later(self, freed: np.ndarray) -> None:
        """Pages STORED_PAGE (n,) that nobody has, but that the journal on the drive still names.

        Their places must not be used before `settle_limbo`: a loss of power would bring the pages
        back, with somebody else's bytes.
        """
        self._limbo.append(freed)
        self._n_limbo += len(freed)

    def settle_limbo(self) -> None:
        """The drive keeps the journal: what was to be free later is free."""
        limbo, self._limbo, self._n_limbo = self._limbo, [], 0
        for freed in limbo:
            self.give(freed, punch=True)

    def give(self, freed: np.ndarray, *, punch: bool = False) -> None:
        """Make the slots of pages STORED_PAGE (n,) free, and their space that of the drive."""
        for shard, first, count in self._runs(freed):
            self._slots[shard].give(first, count)
            if punch:
                self._files[shard].punch(self._offset(first), count * self._page_bytes)

    def _runs(self, freed: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(shard, first slot, slots) of pages that lie together."""
        freed = freed[np.lexsort((freed["offset"], freed["shard"]))]
        for a, b in runs_of(freed, self._page_bytes) if len(freed) else ():
            first = (int(freed["offset"][a]) - HEADER_BYTES) // self._page_bytes
            yield int(freed["shard"][a]), first, b - a

    def _offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._page_bytes

    def give_room(self, table: Table) -> None:
        for runs in table.room:
            for shard, first, count in runs:
                self._slots[shard].give(first, count)
                self._files[shard].punch(self._offset(first), count * self._page_bytes)
            runs.clear()

    def erase(self, freed: list[np.ndarray]) -> None:
        """Overwrite pages with zeros, and wait until the drive has them."""
        zeros = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
        shards = set()
        for one in freed:
            for shard, first, count in self._runs(one):
                nbytes = count * self._page_bytes
                self._files[shard].erase(self._offset(first), nbytes, zeros)
                shards.add(shard)
        for shard in shards:
            self._files[shard].sync()

    def place(self, table: Table, blocks: Blocks, n_new: int, page: PageId) -> np.ndarray:
        """Places for `n_new` more pages of every head: STORED_PAGE (n_kv_heads, n_new)."""
        have_room = sum(count for _, _, count in table.room[0])
        if n_new > have_room:
            more = n_new - have_room
            # A quarter of what there is, so that a sequence that grows page by page has runs that
            # grow with it, and no more than a quarter of its space is empty.
            ahead = min(len(table) // 4, GROWTH_BYTES // self._page_bytes)
            self._grow(table, blocks, max(more, ahead), page)
        new = np.zeros((len(table.room), n_new), STORED_PAGE)
        for head, runs in enumerate(table.room):
            at = 0
            while at < n_new:
                shard, first, count = runs[0]
                taken = min(count, n_new - at)
                slots = first + np.arange(taken, dtype=np.int64)
                new["offset"][head, at : at + taken] = HEADER_BYTES + slots * self._page_bytes
                new["shard"][head, at : at + taken] = shard
                at += taken
                if taken == count:
                    del runs[0]
                else:
                    runs[0][1:] = first + taken, count - taken
        return new

    def _grow(self, table: Table, blocks: Blocks, more: int, page: PageId) -> None:
        """Reserve `more` pages for every head, on the drives and in the table's room."""
        runs = self._share_out(blocks, more, len(table.room))
        taken: list[tuple[int, int, int]] = []
        room = [
            [[shard, self._slots[shard].take(count), count] for shard, count in mine]
            for mine in runs
        ]
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for shard, first, count in (tuple(run) for mine in room for run in mine):
            taken.append((shard, first, count))
            by_shard.setdefault(shard, []).append((first, count))
        try:
            for shard, parts in by_shard.items():
                for first, count in _joined(parts):
                    self._reserve(shard, first, count, page)
        except FlashError:
            for shard, first, count in taken:
                self._slots[shard].give(first, count)
                self._files[shard].punch(self._offset(first), count * self._page_bytes)
            raise
        for runs_of_head, mine in zip(table.room, room, strict=True):
            runs_of_head.extend(mine)

    def _reserve(self, shard: int, first: int, count: int, page: PageId) -> None:
        nbytes = count * self._page_bytes
        try:
            self._files[shard].reserve(self._offset(first), nbytes, page)
        except FlashError as error:
            if error.errno != errno.ENOSPC or not self._limbo:
                raise
            self._sync()  # what was freed since the last flush is to be had now
            self._files[shard].reserve(self._offset(first), nbytes, page)

    def _share_out(self, blocks: Blocks, more: int, heads: int) -> list[list[tuple[int, int]]]:
        """On which shards each head's next `more` pages go: lists of (shard, pages)."""
        if len(self._files) == 1:
            return [[(0, more)] for _ in range(heads)]
        unit = -(-READ_BYTES // self._page_bytes)
        placed = blocks.n_pages_of.astype(float)
        out = []
        for _ in range(heads):
            mine: list[tuple[int, int]] = []
            for at in range(0, more, unit):
                count = min(unit, more - at)
                shard = int(np.argmin((placed + count) / self._weights))
                placed[shard] += count
                if mine and mine[-1][0] == shard:
                    mine[-1] = (shard, mine[-1][1] + count)
                else:
                    mine.append((shard, count))
            out.append(mine)
        return out


def _joined(parts: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs of slots (first, count), those that touch made one."""
    first = count = 0
    for start, more in sorted(parts):
        if count and start == first + count:
            count += more
            continue
        if count:
            yield first, count
        first, count = start, more
    if count:
        yield first, count


def runs_of(entries: np.ndarray, page_bytes: int) -> list[tuple[int, int]]:
    """Which pages lie together: (first, behind the last) of each run of STORED_PAGE (n,)."""
    offsets, shards = entries["offset"], entries["shard"]
    apart = (np.diff(offsets) != page_bytes) | (np.diff(shards) != 0)
    return list(itertools.pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(entries)]))
