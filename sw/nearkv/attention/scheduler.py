# SPDX-License-Identifier: Apache-2.0
"""Attention over stored pages: one call, shared out over cards.

A `PageAttention` splits a query over jobs (one for each kv head, group of at most `card.rows` query heads
and some of the pages), has each card run those on its shards, and adds their partials up. The sums are
exact (`number.Wide`), so how the work was split, over jobs, runs and cards, changes no bit of the result.

    planning.py   which pages go into which run
    runs.py       where a run lies in job memory
    ring.py       a card at work: loads ahead, runs, and what they give

Each card also fetches what the next call will want, which is the next layer's pages as the layers of a
model always come in the same order: before the query is known.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
import os
import time

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import PageLayout

from ..cards import Card, CardError, Engines, Turns, engines_of, warn_if_far
from ..io import FlashError, shards_of
from ..store import KvStore
from .partial import Partial
from .planning import Plan, cut, pages_of
from .ring import RING_BYTES, SEGMENTS, Figures, Ring
from .runs import Query, query_of

MEASURE_BYTES = 8 << 20  # for each card, to find out how fast it is


class PageAttention:
    """Attends to the pages of one store with one card or several.

    Any thread may call it; calls take turns. Several may share cards, which then serve them in turn. In a
    process that was forked from its own it raises, and closing it does nothing.

    Parameters
    ----------
    card : Card, Engines, or a sequence of them
        Card i serves the shards i, i + n_cards, .. of the store (`io.shards_of`). Every engine counts.
    store : KvStore
    ahead : bool
        Fetch what the next call will want while the host is busy elsewhere.
    segments, ring_bytes : int
        How kv memory is used: how many parts at most, and how much of it. 1 segment loads, then
        computes.

    Attributes
    ----------
    job_pages : int
        Pages of one job, at most.
    figures : Figures

    Raises
    ------
    ValueError
        If a card cannot handle the store's heads or hold one of its pages.
    """

    def __init__(
        self,
        card: Card | Sequence[Card | Engines],
        store: KvStore,
        *,
        ahead: bool = True,
        segments: int = SEGMENTS,
        ring_bytes: int = RING_BYTES,
    ):
        self.cards = engines_of(card)
        self.store, self.ahead = store, ahead
        self.figures = Figures()
        for one in self.cards:
            check_card(one, store.layout)
        _check_drives(self.cards, store)
        self._rings = [Ring(one, store, segments, ring_bytes) for one in self.cards]
        self.job_pages = min(ring.room.job_pages for ring in self._rings)
        # Jobs of all cards are alike, so that a query is cut once.
        self._rows = min(one.rows for one in self.cards)
        self._follows: dict[int, int] = {}  # layer -> the layer that was asked for after it
        self._last: int | None = None
        self._process = os.getpid()
        self._turns = Turns(
            "a turn to attend to these pages, which another thread does",
            lambda: sum(one.tenancy.progress for one in self.cards),
            lambda: max(one.timeout_s for one in self.cards),
        )
        self._pool: ThreadPoolExecutor | None = None
        if len(self.cards) > 1:
            self._pool = ThreadPoolExecutor(len(self.cards), thread_name_prefix="nearkv-card")

    @property
    def card(self) -> Card:
        """The first card."""
        return self.cards[0]

    def attend(
        self,
        layer: int,
        sequences: Sequence[int],
        q: np.ndarray,
        scale: float,
        n_pages: Sequence[int],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Partial:
        """Attend to stored pages.

        Parameters
        ----------
        layer : int
        sequences : (n_sequences,) ints
        q : (n_sequences, n_kv_heads, n_rows, head_dim) real, finite
            Rows are whatever shares the kv head and its pages: query heads, query tokens.
        scale : float
            Of the softmax.
        n_pages : (n_sequences,) ints
            How many pages of each sequence, from its first. A sequence that has fewer is an error, so
            that a context never is shorter than the caller thinks.
        meanwhile : callable
            What the host has to do itself, called while the cards work: once, or again where a card has
            to do its work again.

        Returns
        -------
        Partial (n_sequences, n_kv_heads, n_rows)

        Raises
        ------
        FlashError
            If a sequence has fewer pages, one of them cannot be read, or an earlier write of one of these
            sequences has failed.
        CardError
            If the card reports anything but success, naming job, page and cause. A card that is late
            or fails is reset first, and the work done again.
        ValueError
            If shapes do not fit.
        """
        self._check_process()
        with self._turns:
            return self._attend(layer, sequences, q, scale, n_pages, meanwhile)

    def rates(self) -> np.ndarray:
        """KV bytes/s of each card in the last `attend`, waiting for its drive included; 0 if idle."""
        return np.array([ring.rate for ring in self._rings])

    def discard(self) -> None:
        """Give up what was fetched ahead, and wait until no read is on its way."""
        if os.getpid() != self._process:
            return  # where nothing is on its way, and locks may be held for ever
        for ring in self._rings:
            ring.close()

    def close(self) -> None:
        """`discard`, and end the threads."""
        self.discard()
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(wait=True)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise CardError(
                f"the cards belong to process {self._process}, not to {os.getpid()}, which was forked "
                "from it; open cards and a store of its own in each process"
            )

    def _attend(self, layer, sequences, q, scale, n_pages, meanwhile) -> Partial:
        begin = time.perf_counter()
        layout = self.store.layout
        sequences = tuple(int(sequence) for sequence in sequences)
        if q.ndim != 4 or q.shape[0] != len(sequences) or len(n_pages) != len(sequences):
            raise ValueError(
                f"q of shape {q.shape} and {len(n_pages)} page counts do not belong to "
                f"{len(sequences)} sequences"
            )
        n_sequences, n_heads, n_rows, head_dim = q.shape
        if (n_heads, head_dim) != (self.store.n_kv_heads, layout.head_dim):
            raise ValueError(
                f"q has {n_heads} kv heads of {head_dim} channels, and the store "
                f"{self.store.n_kv_heads} of {layout.head_dim}"
            )
        stored = [
            self.store.stored(sequence, layer, int(n))
            for sequence, n in zip(sequences, n_pages, strict=True)
        ]
        query = query_of(layout, n_sequences, n_heads, n_rows, self._rows, scale)
        n_padded = query.shape[2] * query.width
        q = _pad_rows(q, n_padded).reshape(query.n_jobs, query.width, head_dim)
        plans = self._plans(layer, sequences, stored, query)
        if self._last is not None:
            self._follows[self._last] = layer
        self._last = layer
        following = self._guess(layer, sequences, query)
        if self._pool is None:
            self._rings[0].figures = self.figures
        try:
            total = self._on_cards(plans, following, q, meanwhile)
        finally:
            if self._pool is not None:  # each in a thread of its own
                for ring in self._rings:
                    self.figures += ring.figures
                    ring.figures = Figures()
        self.figures.card_tokens += plans[0].n_tokens * n_heads * n_rows
        self.figures.attend_s += time.perf_counter() - begin
        total = total.reshape(n_sequences, n_heads, n_padded)
        return total if n_padded == n_rows else total[:, :, :n_rows]

    def _on_cards(self, plans, following, q, meanwhile) -> Partial:
        if self._pool is None:
            return self._rings[0].attend(plans[0], following[0], q, meanwhile)
        futures = [
            self._pool.submit(ring.attend, plan, ahead, q)
            for ring, plan, ahead in zip(self._rings, plans, following, strict=True)
        ]
        try:
            meanwhile()
        finally:  # every wait in there has an end of its own
            wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        total = futures[0].result()
        for future in futures[1:]:
            total = total + future.result()
        return total

    def _plans(self, layer, sequences, stored, query: Query) -> list[Plan]:
        """Each card's share of a call; made anew only when something about it has changed."""
        counts = tuple(entries.shape[1] for entries in stored)
        key = (sequences, counts, query, self.store.epoch)
        plans = []
        for position, ring in enumerate(self._rings):
            plan = ring.plans.get(layer)
            if plan is None or plan.key != key:
                numbers = pages_of(stored, position, len(self.cards), self.store.n_shards)
                runs = cut(numbers, query, ring.room)
                n_tokens = sum(int(entries["page_len"][:1].sum()) for entries in stored)
                plan = Plan(key, layer, sequences, stored, query, n_tokens, runs)
                ring.plans[layer] = plan
            plans.append(plan)
        return plans

    def _guess(self, layer, sequences, query: Query) -> list[Plan | None]:
        """What the next call will probably want, if it is there already."""
        nothing: list[Plan | None] = [None] * len(self.cards)
        following = self._follows.get(layer) if self.ahead else None
        if following is None or following == layer:
            return nothing
        if not all(self.store.settled(sequence, following) for sequence in sequences):
            return nothing
        try:
            stored = [self.store.stored(sequence, following) for sequence in sequences]
        except FlashError:  # whoever asks for it will hear
            return nothing
        return [*self._plans(following, sequences, stored, query)]


def check_card(card: Card, layout: PageLayout) -> None:
    """Raise ValueError unless the card can attend to pages of this layout."""
    if layout.head_dim > card.max_head_dim:
        raise ValueError(
            f"card {card.name!r} is built for head_dim up to {card.max_head_dim}, "
            f"not {layout.head_dim}; choose another configuration"
        )
    if card.kv_bytes < layout.page_bytes:
        raise ValueError(
            f"a page has {layout.page_bytes} bytes and the card {card.kv_bytes} bytes of kv "
            "memory; lower page_tokens or raise kv_bytes"
        )


def _check_drives(cards: Sequence[Card], store: KvStore) -> None:
    """Say of a card that is in one device with a drive if its pages lie on another one."""
    told = set()
    for position, card in enumerate(cards):
        for shard in shards_of(position, len(cards), store.n_shards):
            directory = str(store.directories[shard % len(store.directories)])
            # The engines of a card are in one place.
            if card.pci_address is not None and (card.pci_address, directory) not in told:
                told.add((card.pci_address, directory))
                warn_if_far(card.name, card.pci_address, directory)


def measure_cards(
    cards: Sequence[Card], directory, layout: PageLayout, n_kv_heads: int
) -> list[float]:
    """How fast each card attends to pages from its drive while the others do the same.

    Writes some MiB for each into temporary files, and attends to them for about 0.2 s.

    Parameters
    ----------
    cards, directory, layout, n_kv_heads
        As for `PageAttention` and `KvStore`.

    Returns
    -------
    bytes/s of each, for `weights` of a store

    Raises
    ------
    FlashError, CardError
        If a drive or a card fails.
    """
    n_pages = -(-len(cards) * MEASURE_BYTES // (n_kv_heads * layout.page_bytes))
    rng = np.random.default_rng(0)
    some = rng.standard_normal((n_kv_heads, layout.page_tokens, layout.head_dim), np.float32)
    patterns = np.tile(pages.to_patterns(some, layout.kv_type), (1, n_pages, 1))
    q = np.zeros((1, n_kv_heads, 1, layout.head_dim))
    rates = []
    with KvStore(directory, layout, n_kv_heads, temporary=True, n_shards=len(cards)) as store:
        store.append(0, 0, patterns, patterns)
        attention = PageAttention(cards, store, ahead=False)
        try:
            attention.attend(0, [0], q, 1.0, [1])  # what takes long the first time
            end = time.perf_counter() + 0.2
            while not rates or time.perf_counter() < end:
                attention.attend(0, [0], q, 1.0, [n_pages])
                rates.append(attention.rates())
        finally:
            attention.close()
    return np.median(rates, axis=0).tolist()


def _pad_rows(q: np.ndarray, n_rows: int) -> np.ndarray:
    missing = n_rows - q.shape[2]
    return np.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q
