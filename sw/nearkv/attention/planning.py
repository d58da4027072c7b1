# SPDX-License-Identifier: Apache-2.0
"""Planning: which pages of a call go into which run of a card.

A call asks for pages of sequences; a card serves those on its shards. They are cut into *jobs* (pages of
one kv head, attended by a group of its query rows) and these are gathered into *runs*, which fit a
segment of kv memory and a buffer of job memory. The sums that runs give are exact, so how the work was
cut changes no bit of the result, and a plan is made anew only when something about a call has changed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import PageLayout

from ..io import shards_of
from .runs import JobMap, Query, Run, Work


class Room(NamedTuple):
    """What a card has room for."""

    segment_pages: int  # in a segment: of one run, at most
    job_pages: int  # of one job, at most
    job_bytes: int  # job memory

    @classmethod
    def of(cls, layout: PageLayout, segment_pages: int, job_bytes: int) -> "Room":
        tiles = -(-layout.page_tokens // layout.tile_tokens)
        return cls(segment_pages, min(abi.MAX_TILES // tiles, segment_pages), job_bytes)


class Plan(NamedTuple):
    """What one card does in one call."""

    key: tuple  # a plan with the same key is the same
    layer: int
    sequences: tuple[int, ...]
    stored: list[np.ndarray]  # STORED_PAGE (n_kv_heads, n_pages) of each
    query: Query
    n_tokens: int  # in the pages of the call, whichever card serves them
    runs: list[Run]


def pages_of(
    stored: Sequence[np.ndarray], card: int, n_cards: int, n_shards: int
) -> list[list[np.ndarray]]:
    """The page numbers that a card serves, by sequence and kv head.

    Parameters
    ----------
    stored : sequence of STORED_PAGE (n_kv_heads, n_pages)
    card, n_cards, n_shards : int
        Card `card` of `n_cards` serves `io.shards_of`.
    """
    if n_cards == 1:
        return [[np.arange(entries.shape[1])] * len(entries) for entries in stored]
    mine = np.zeros(n_shards, bool)
    mine[list(shards_of(card, n_cards, n_shards))] = True
    return [[np.flatnonzero(mine[head["shard"]]) for head in entries] for entries in stored]


def cut(numbers: list[list[np.ndarray]], query: Query, room: Room) -> list[Run]:
    """Cut the pages of a call into runs.

    No run has two jobs of the same query block, so its partials have distinct places.

    Parameters
    ----------
    numbers : as `pages_of` gives them

    Raises
    ------
    ValueError
        If job memory cannot hold a single job.
    """
    longest = max((len(head) for heads in numbers for head in heads), default=0)
    if not longest:
        return []
    n_slices = query.shape[2]
    table_pages = min(room.job_pages, longest)
    half = room.job_bytes // 2 // abi.BEAT_BYTES * abi.BEAT_BYTES
    most = _most_slices(query, table_pages, half)
    buffers = [0, half]
    if most < n_slices:
        # A head's pages would have to be loaded more often: rather one buffer, twice as large.
        most, buffers = _most_slices(query, table_pages, room.job_bytes), [0]
    if most < 1:
        needed = JobMap.of(query).plus(1, table_pages).nbytes
        raise ValueError(f"job_bytes must hold a job of {needed} bytes, not {room.job_bytes}")
    budget = room.job_bytes if len(buffers) == 1 else half
    runs = []
    for works in _gather(numbers, query, room, min(most, n_slices), budget):
        runs.append(Run(query, works, buffers[len(runs) % len(buffers)]))
    return runs


def _most_slices(query: Query, n_pages: int, job_bytes: int) -> int:
    """Jobs over the same pages that fit."""
    none, one = (JobMap.of(query).plus(n_jobs, n_pages).nbytes for n_jobs in (0, 1))
    return (job_bytes - none) // (one - none)


def _gather(numbers, query: Query, room: Room, most: int, job_bytes: int) -> Iterator[list[Work]]:
    """Works, as many at a time as fit."""
    n_slices = query.shape[2]
    longest = max(len(head) for heads in numbers for head in heads)
    for first in range(0, longest, room.job_pages):
        works, n_pages, places = [], 0, JobMap.of(query)
        for sequence, heads in enumerate(numbers):
            for kv_head, mine in enumerate(heads):
                taken = mine[first : first + room.job_pages]
                if not len(taken):
                    continue
                for at in range(0, n_slices, most):
                    slices = min(most, n_slices - at)
                    full = n_pages + len(taken) > room.segment_pages
                    if works and (full or places.plus(slices, len(taken)).nbytes > job_bytes):
                        yield works
                        works, n_pages, places = [], 0, JobMap.of(query)
                    works.append(Work(sequence, kv_head, taken, at, slices))
                    n_pages, places = n_pages + len(taken), places.plus(slices, len(taken))
        if works:
            yield works
