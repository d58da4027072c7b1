# SPDX-License-Identifier: Apache-2.0
"""Cycles of a run, from the configuration and the shapes of the jobs alone.

The accelerator is a chain of stations, each of which takes its steps in a fixed order, one a cycle at
best. So the time of a step is the largest of a few earlier times plus a constant (max-plus algebra):
the step before, its operand's arrival, and the release of the place its result needs. `predict`
works through these recurrences, block by block for the array and tile by tile for the stations
behind it. It simulates no cycle and no data. `nearkv bench stream` holds it against the RTL.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nearkv_hw import abi, products
from nearkv_hw.array import MacArray
from nearkv_hw.axi import WriteMaster
from nearkv_hw.config import OUTSTANDING_BURSTS, Config
from nearkv_hw.jobs import Q_BANKS, READ_AHEAD_BEATS
from nearkv_hw.kernel import TILE_QUEUE
from nearkv_hw.merge import V_QUEUE_CHANNELS
from nearkv_hw.products import BLOCK_QUEUE, SLOTS
from nearkv_hw.shapes import BURST_BEATS, LANES
from nearkv_hw.softmax import (
    MAXIMA_QUEUE_TILES,
    P_BANKS,
    RAW_QUEUE_TOKENS,
    SCORE_QUEUE_PAIRS,
    SUMS_QUEUE_TILES,
    Exp2,
    Score,
)

# From the last beat of a block at the bus to its announcement: registers, five stages of exponents,
# and the way through the queue of blocks.
_INSPECT = 9
# From a beat that leaves the beat queue to the address of the burst that takes its place.
_ASK = 6
_BURST_OVERHEAD = 4  # the read master takes so many cycles per burst
# From a request of the job reader to its first burst, and from a beat at the bus to the reader.
_REQUEST, _ARRIVE = 6, 2
_ENTRY = 3  # the job reader takes so many cycles for a page table entry and its first tile
# From a tile's emission to the address of its first burst.
_CHOOSE = 10
# From the last use of a job's bank of the q store to the request that takes it.
_BANK = 4
# From the last step of a block's scan to the aligner.
_SCANNED = 5
# From a tile's last score to its maxima, from its last weight to its V pass.
_MAXIMA = Score.latency + 4
_P_READY = Exp2.latency + 2


@dataclass(frozen=True)
class JobShape:
    """A job as far as its cycles go."""

    head_dim: int
    group_size: int
    n_tokens: int
    page_tokens: int = abi.TILE_TOKENS


@dataclass(frozen=True)
class Dram:
    """Timings of one DRAM behind both ports of the card, in cycles of the kernel.

    At best it moves one beat a cycle, for reads and writes together.

    Attributes
    ----------
    refresh_interval, refresh_cycles : int
        tREFI and tRFC: so often nothing moves for so long.
    row_bytes, banks : int
        Consecutive rows lie in consecutive banks.
    activate_cycles : int
        tRP + tRCD: closing one row and opening another.
    row_cycle_cycles : int
        tRC: from one opening of a bank to the next.
    turnaround_cycles : int
        Between reads and writes, each way.
    """

    refresh_interval: int
    refresh_cycles: int
    row_bytes: int
    banks: int
    activate_cycles: int
    row_cycle_cycles: int
    turnaround_cycles: int

    def after(self, start: float, beats: float) -> float:
        """When the last of `beats` beats moves if the first may at `start`."""
        free = self.refresh_interval - self.refresh_cycles
        # Count time in which the memory works: whole intervals, then the rest.
        whole, rest = divmod(start, self.refresh_interval)
        whole, rest = divmod(whole * free + max(0, rest - self.refresh_cycles) + beats - 1, free)
        return whole * self.refresh_interval + self.refresh_cycles + rest


# The SmartSSD's DDR4-2400, 64 bits of data from four x16 chips of 8 Gbit, seen from a kernel clock of
# 300 MHz, at which a beat a cycle is its peak of 19.2 GB/s. Times from JEDEC JESD79-4, speed bin
# DDR4-2400R: tREFI 7.8 us, tRFC 350 ns, tRP = tRCD = 13.32 ns, tRC 45.32 ns, turnarounds of 8 to 10
# clocks of 0.833 ns and the write latency; 4 x 2 KiB rows, 2 x 4 banks.
DDR4_2400 = Dram(
    refresh_interval=2340, refresh_cycles=105, row_bytes=8192, banks=8, activate_cycles=8,
    row_cycle_cycles=14, turnaround_cycles=5,
)  # fmt: skip
READ_LATENCY = 100  # of the simulated memories, as of a real controller behind an interconnect


@dataclass(frozen=True)
class Prediction:
    """Counters of the summary as the model expects them."""

    kv_beats: int
    stream_cycles: int
    starved_cycles: int
    stalled_cycles: int

    @property
    def efficiency(self) -> float:
        """Share of the stream's cycles in which a beat of K or V was used."""
        return self.kv_beats / self.stream_cycles


@dataclass
class _Tile:
    """What a V pass needs to know when its turn comes."""

    parts: int
    pairs: int
    tokens: int
    p_ready: float


class _Steps:
    """A station that takes one step a cycle, and when it took each."""

    def __init__(self):
        self.times = array("d")

    def at(self, step: int) -> float:
        """Time of a step; -inf for steps before the first."""
        return self.times[step] if step >= 0 else -np.inf

    def run(self, not_before: np.ndarray) -> np.ndarray:
        """Take more steps, none before its time; when they were taken."""
        index = np.arange(1, len(not_before) + 1)
        last = self.at(len(self.times) - 1)
        done = np.maximum(np.maximum.accumulate(not_before - index), last) + index
        self.times.extend(done)
        return done


def predict(
    config: Config,
    jobs: list[JobShape],
    dram: Dram | None = None,
    read_latency: int = READ_LATENCY,
) -> Prediction:
    """Counters of a run over these jobs.

    Parameters
    ----------
    config : Config
    jobs : list of JobShape
    dram : Dram, optional
        Default: a bus for each port that always moves a beat a cycle.
    read_latency : int
        Cycles from an accepted address to its first beat, on both ports.
    """
    return _Run(config, dram, read_latency).through(jobs)


class _Run:
    """The state of all stations, as far as the passes have been worked through."""

    def __init__(self, config: Config, dram: Dram | None, latency: int):
        self.config, self.dram, self.latency = config, dram, latency
        self.read_beats, self.read_end = 0, -1.0  # arrival of the last beat
        self.flying = deque([-np.inf] * OUTSTANDING_BURSTS, OUTSTANDING_BURSTS)  # ends of bursts
        # The job reader: when it has time, when the next record is there, when each tile of the
        # queue behind it was taken, when each job's last K pass ended.
        self.reader, self.record = 0.0, _REQUEST + latency + _ARRIVE
        self.chosen = deque([-np.inf] * TILE_QUEUE, TILE_QUEUE)
        self.k_ends = deque([-np.inf] * Q_BANKS, Q_BANKS)
        # Rows are issued so long before their x. From a block's last row to its first result at the head of the
        # queue behind the array.
        self.align = products.latency(config.rows)
        self.leave = self.align + MacArray.latency + 2
        # The scan of products: when it has time; when each block, and each V block, was issued to its end.
        self.scan = -np.inf
        self.block_ends = deque([-np.inf] * BLOCK_QUEUE, BLOCK_QUEUE)
        self.slot_ends = deque([-np.inf] * SLOTS, SLOTS)
        self.array = _Steps()
        self.starved = self.stalled = 0.0
        self.score, self.weigh, self.merge = _Steps(), _Steps(), _Steps()
        # When the place of each token in the raw queue, of each channel in the V queue is free again.
        self.raw_freed, self.v_freed = _Steps(), _Steps()
        self.raw_taken = self.v_taken = 0
        # Ends of tiles: second pass of the softmax, V pass, merge.
        self.weigh_ends, self.v_ends, self.merge_ends = [], [], []

    def through(self, jobs: list[JobShape]) -> Prediction:
        waiting: list[_Tile] = []
        for job in jobs:
            self._share(job)
            self._query(job)
            layout = abi.PageLayout(job.head_dim, job.page_tokens)
            pairs = -(-job.group_size // abi.ROW_STEP)
            for first in range(0, job.n_tokens, job.page_tokens):
                self.reader += _ENTRY
                for _, tokens in layout.tiles(min(job.page_tokens, job.n_tokens - first)):
                    self.reader = max(self.reader, self.chosen[0]) + 1
                    if len(waiting) > self.config.lookahead_tiles:
                        self._v_pass(waiting.pop(0))
                    waiting.append(self._k_pass(job.head_dim, pairs, tokens))
            self.k_ends.append(self.array.times[-1])
            self.reader += 1
        for tile in waiting:
            self._v_pass(tile)
        times = self.array.times
        return Prediction(
            kv_beats=len(times),
            stream_cycles=round(times[-1] - times[0]) + 1,
            starved_cycles=round(self.starved),
            stalled_cycles=round(self.stalled),
        )

    def _query(self, job: JobShape) -> None:
        """When the reader has the job's query block and the beginning of its page table, which it
        asks for at once with the next job's record."""
        ask = max(self.reader, self.record) + 3
        ask = max(ask, self.k_ends[0] + self.align + _BANK) + _REQUEST
        entries = -(-job.n_tokens // job.page_tokens) * abi.PAGE_ENTRY.bytes
        arrived = array("d")  # when each beat is there
        for span in (job.head_dim, min(-(-entries // abi.BEAT_BYTES), READ_AHEAD_BEATS), 1):
            for begin in range(0, span, BURST_BEATS):
                beats = min(BURST_BEATS, span - begin)
                # What arrived of the query block has made room.
                full = len(arrived) + beats - READ_AHEAD_BEATS
                if full > 0:
                    ask = max(ask, arrived[full - 1] + _ASK)
                start = max(ask + self.latency, arrived[-1] + 1 if arrived else 0)
                arrived.extend(start + n for n in range(beats))
                ask += _BURST_OVERHEAD
        self.reader = arrived[job.head_dim - 1] + _ARRIVE
        self.record = arrived[-1] + _ARRIVE

    def _read(self, blocks: int, rows: int, not_before: float = -np.inf) -> Iterator[float]:
        """When each block of a pass can be issued, as far as reading goes.

        Reading a block may need the room of the one before it: issue each before the next. The
        first address comes not before the time given.
        """
        for _ in range(blocks):
            for begin in range(0, rows, BURST_BEATS):
                beats = min(BURST_BEATS, rows - begin)
                # A burst is asked for when the beat queue has room for all of it, and not too many
                # are under way.
                full = self.read_beats + beats - self.config.beat_fifo_beats
                asked = self.array.at(full - 1) + _ASK if full > 0 else -np.inf
                asked = max(asked, self.flying[0] + _ASK, not_before)
                start = max(self.read_end + 1, asked + self.latency)
                self._move(start, max(beats, _BURST_OVERHEAD))
                self.flying.append(self.read_end)
                self.read_beats += beats
            yield self.read_end + _INSPECT

    def _move(self, start: float, beats: float) -> None:
        """The kv port reads, or in vain, for as long as the memory is busy with something else."""
        if self.dram:
            self.read_end = self.dram.after(start, beats)
        else:
            self.read_end = start + beats - 1

    def _share(self, job: JobShape) -> None:
        """What a job's query block, page table and partial take from the one memory."""
        if not self.dram:
            return
        pages = -(-job.n_tokens // job.page_tokens)
        reads = 1 + job.head_dim + -(-pages * abi.PAGE_ENTRY.bytes // abi.BEAT_BYTES)
        writes = abi.partial_bytes(job.head_dim, job.group_size) // abi.BEAT_BYTES
        bursts = -(-(writes - 1) // WriteMaster.MAX_BURST) + 1
        turns = 2 * self.dram.turnaround_cycles * bursts
        self._move(self.read_end + 1, reads + writes + turns)

    def _scanned(self, ready: float, steps: int = 0) -> float:
        """When the aligner can have a block that the fetch has ready; a V block is scanned row by row."""
        begin = max(ready, self.scan, self.block_ends[0] + 1)
        if steps:
            begin = max(begin, self.slot_ends[0] + 1)
        self.scan = begin + max(steps, 1)
        return self.scan - 1 + _SCANNED

    def _issue(self, rows: int, ready: float, room: float) -> float:
        """Issue a block; when its last row was issued."""
        before = self.array.at(len(self.array.times) - 1)
        earliest = max(before + 1, room, before + LANES + 1 - rows)
        begin = max(ready, earliest)
        if np.isfinite(before):
            idle = begin - before - 1
            starved = min(idle, max(0.0, ready - before - 1))
            self.starved += starved
            self.stalled += idle - starved
        end = self.array.run(np.full(rows, begin) + np.arange(rows))[-1]
        self.block_ends.append(end)
        return end

    def _k_pass(self, head_dim: int, pairs: int, tokens: int) -> _Tile:
        tiles = len(self.weigh_ends)
        asked = self.reader + _CHOOSE
        for n, ready in enumerate(self._read(-(-tokens // LANES), head_dim, asked)):
            if n == 0:  # about when the tile left the queue of tiles
                self.chosen.append(self.read_end - self.latency - head_dim - _CHOOSE)
            lanes = min(LANES, tokens - n * LANES)
            room = self.raw_freed.at(self.raw_taken + LANES - RAW_QUEUE_TOKENS - 1) + 1
            end = self._issue(head_dim, self._scanned(ready), room)
            self.raw_taken += lanes
            steps = np.repeat(end + self.leave + np.arange(lanes), pairs)
            # A score takes its place in the queue from one a queue's length before it.
            at = len(self.score.times) - SCORE_QUEUE_PAIRS
            for i in range(max(0, -at), len(steps)):
                if at + i < len(self.weigh.times):
                    steps[i] = max(steps[i], self.weigh.times[at + i] + 1)
            if n == 0 and tiles >= MAXIMA_QUEUE_TILES:
                steps[0] = max(steps[0], self.weigh_ends[tiles - MAXIMA_QUEUE_TILES] + 1)
            self.raw_freed.times.extend(self.score.run(steps)[pairs - 1 :: pairs])
        # Weights: when the maxima are known, a bank of the p store is free, and so is a place for
        # the sums.
        start = self.score.times[-1] + _MAXIMA
        if tiles >= P_BANKS:
            start = max(start, self.v_ends[tiles - P_BANKS] + 1)
        if tiles >= SUMS_QUEUE_TILES:
            start = max(start, self.merge_ends[tiles - SUMS_QUEUE_TILES] + 1)
        done = self.weigh.run(np.full(tokens * pairs, start))[-1]
        self.weigh_ends.append(done)
        return _Tile(head_dim // LANES, pairs, tokens, done + _P_READY)

    def _v_pass(self, tile: _Tile) -> None:
        self.merge.run(np.full(2 * tile.pairs, tile.p_ready))
        for ready in self._read(tile.parts, tile.tokens):
            freed = self.v_freed.at(self.v_taken + LANES - V_QUEUE_CHANNELS - 1) + 1
            scanned = self._scanned(max(ready, tile.p_ready), tile.tokens)
            end = self._issue(tile.tokens, scanned, freed)
            self.slot_ends.append(end)
            self.v_taken += LANES
            steps = np.repeat(end + self.leave + np.arange(LANES), tile.pairs)
            self.v_freed.times.extend(self.merge.run(steps)[tile.pairs - 1 :: tile.pairs])
        self.v_ends.append(self.array.times[-1])
        self.merge_ends.append(self.merge.times[-1])
