# SPDX-License-Identifier: Apache-2.0
"""Functional coverage of the kernel's runs: which combinations a set of runs has met."""

from collections import Counter
import itertools

import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.number import LIMB_STEP, N_LIMBS, RUN_MAX_EMPTY

from .workload import Memories

WINDOW_BITS = N_LIMBS * LIMB_STEP

# Properties of a job; each falls into one bin of each.
BINS = {
    "type": ("fp16", "bf16"),
    "tail": ("empty", "1", "2..30", "31", "whole block"),
    "extent": ("one tile", "tiles of one page", "pages", "pages of tiles"),
    "bus": ("ideal", "pauses", "mostly paused"),
    "switch": (
        "first",
        "same shape",
        "other group",
        "other head_dim",
        "other type",
        "after failure",
    ),
}
# How the maximum moves from tile to tile; a job may meet several. A jump of more than the window's
# bits makes one side vanish.
JUMPS = ("equal", "up", "up out of the window", "down", "down out of the window", "from nothing")


class Coverage:
    """Counts bins, and pairs of bins of different properties."""

    def __init__(self):
        self.bins, self.pairs, self.jumps = Counter(), Counter(), Counter()
        self.n_jobs = 0

    def __iadd__(self, other: "Coverage") -> "Coverage":
        self.bins += other.bins
        self.pairs += other.pairs
        self.jumps += other.jumps
        self.n_jobs += other.n_jobs
        return self

    def add(self, memories: Memories, job: np.ndarray, tile_maxima: list, stalls: float) -> None:
        """Note a run.

        Parameters
        ----------
        memories : Memories
        job : uint8 (n,)
            Job memory after the run.
        tile_maxima : list of int (tiles, rows)
            Of each legal job, see `ModelCard.tile_maxima`.
        stalls : float
            Share of cycles in which each channel paused.
        """
        maxima = iter(tile_maxima)
        before = None
        for i in range(memories.n_jobs):
            record, status = memories.record(i), memories.partial(job, i)["status"]
            if status & Status.ILLEGAL_JOB and memories.partial(job, i)["n_tokens"] == 0:
                if memories.partial(job, i)["bad_page"] != abi.NO_PAGE:
                    next(maxima, None)
                before = None
                continue
            self._count(memories, i, record, stalls, before)
            for rows in next(maxima, np.zeros((0, 0))).T:
                self._jumps(rows)
            before = record if status == Status.DONE else None

    def _count(self, memories, i, record, stalls, before) -> None:
        lens = [memories.entry(i, page)["page_len"] for page in range(record["n_pages"])]
        layout = PageLayout(record["head_dim"], record["page_tokens"], KvType(record["kv_type"]))
        rest = lens[-1] % abi.BLOCK_TOKENS
        tail = {0: "whole block" if lens[-1] else "empty", 1: "1", 31: "31"}.get(rest, "2..30")
        many = max(len(layout.tiles(n)) for n in lens) > 1
        extent = (BINS["extent"][2:] if len(lens) > 1 else BINS["extent"])[many]
        if before is None:
            switch = "after failure" if i else "first"
        elif before["kv_type"] != record["kv_type"]:
            switch = "other type"
        elif before["head_dim"] != record["head_dim"]:
            switch = "other head_dim"
        elif before["group_size"] != record["group_size"]:
            switch = "other group"
        else:
            switch = "same shape"
        met = {
            "type": KvType(record["kv_type"]).name.lower(),
            "tail": tail,
            "extent": extent,
            "bus": BINS["bus"][0 if stalls == 0 else 1 if stalls < 0.5 else 2],
            "switch": switch,
        }
        self.n_jobs += 1
        self.bins.update(met.items())
        self.pairs.update(itertools.combinations(met.items(), 2))

    def _jumps(self, maxima) -> None:
        run_max = RUN_MAX_EMPTY
        for tile_max in (int(m) for m in maxima):
            if tile_max == RUN_MAX_EMPTY:
                continue
            jump = tile_max - run_max
            if run_max == RUN_MAX_EMPTY:
                name = "from nothing"
            elif jump == 0:
                name = "equal"
            else:
                name = "up" if jump > 0 else "down"
                name += " out of the window" if abs(jump) > WINDOW_BITS else ""
            self.jumps[name] += 1
            run_max = max(run_max, tile_max)

    def report(self) -> list[str]:
        """Lines for a person: what was met how often, and every hole."""
        lines = [f"{self.n_jobs} jobs"]
        for name, values in BINS.items():
            counts = ", ".join(f"{value} {self.bins[name, value]}" for value in values)
            lines.append(f"{name:8} {counts}")
        lines.append("maximum  " + ", ".join(f"{name} {self.jumps[name]}" for name in JUMPS))
        # A job whose only page is empty has one tile.
        impossible = {(("tail", "empty"), ("extent", "tiles of one page"))}
        pairs = [
            ((a, x), (b, y))
            for a, b in itertools.combinations(BINS, 2)
            for x in BINS[a]
            for y in BINS[b]
            if ((a, x), (b, y)) not in impossible
        ]
        holes = [pair for pair in pairs if not self.pairs[pair]]
        lines.append(f"pairs    {len(pairs) - len(holes)} of {len(pairs)} met")
        lines += [f"hole     {a} {x}, {b} {y}" for (a, x), (b, y) in holes]
        return lines
