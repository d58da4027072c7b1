# SPDX-License-Identifier: Apache-2.0
"""Which places of a page file are free."""

from collections.abc import Iterable


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
