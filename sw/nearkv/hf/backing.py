# SPDX-License-Identifier: Apache-2.0
"""What a NearStorageCache and its copies share: cards and store."""

from collections import deque
from collections.abc import Sequence
import os
import threading

from ..cards import Card
from ..store import KvStore


class Backing:
    """Counts the caches that use it, and is closed with the last of them.

    Parameters
    ----------
    cards : sequence of Card
    owned : sequence of Card
        Those that are closed with it.
    store : KvStore

    Attributes
    ----------
    cards, store
    """

    def __init__(self, cards: Sequence[Card], owned: Sequence[Card], store: KvStore):
        self.cards, self.store = cards, store
        self._owned = owned
        self._pid = os.getpid()
        self._users = 0
        self._next = max(store.sequences(), default=-1) + 1
        # Of caches that are gone. The garbage collector ends those, in the midst of anything.
        self._retired: deque[int] = deque()
        self._lock = threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether this process opened it; what was forked from that one leaves it alone."""
        return os.getpid() == self._pid

    def join(self) -> None:
        """One more cache."""
        with self._lock:
            self._users += 1

    def leave(self, sequences: Sequence[int]) -> None:
        """A cache is gone, with its sequences of the store; with the last cache, everything."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if not last:
            self._retired.extend(sequences)
            return
        self.store.close()
        for card in self._owned:
            card.close()

    def take(self, count: int) -> list[int]:
        """Sequences that nobody has, for new rows."""
        with self._lock:
            first = self._next
            self._next += count
        return [*range(first, first + count)]

    def reserve(self, sequences: Sequence[int]) -> None:
        """These have an owner from now on: `take` gives others."""
        with self._lock:
            self._next = max([self._next, *(sequence + 1 for sequence in sequences)])

    def collect(self) -> None:
        """Give back the pages of caches that are gone."""
        while self._retired:
            self.drop([self._retired.popleft()])

    def drop(self, sequences: Sequence[int]) -> None:
        """Forget those of the sequences that have pages."""
        for sequence in {*self.store.sequences()} & {*sequences}:
            self.store.drop(sequence)
