# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench stream`: how close the emitted Verilog comes to a beat a cycle.

Runs the simulated kernel over queues of jobs and prints what its own counters say, beside the cycle
model's prediction. All figures are cycles and therefore the same on every machine, but for the last
column, which says how fast this machine simulates. A beat is 64 bytes of K or V; the bus carries one
a cycle, which is 8 cycles a token and KV head at head_dim 128 in fp16.
"""

from dataclasses import dataclass
import json
import sys

import numpy as np

from nearkv_hw import abi
from nearkv_hw.config import PRESETS, Config, preset

from .. import perf, rtl, workload

# Name of the queue -> tokens of each job. The mixed one has a mean of 2 k, as a batch of documents has.
QUEUES = {
    "131072": [131072],
    "8 x 4096": [4096] * 8,
    "64 mixed": [int(n) for n in np.random.default_rng(5).integers(64, 4000, 64)],
    "64 x 300": [300] * 64,
    "64 x 128": [128] * 64,
}
# Name of the memory -> its timings, and its latency in cycles. The far ones are buses that always
# move a beat a cycle, late.
MEMORIES = {
    "ideal": (None, perf.READ_LATENCY),
    "DDR4-2400": (perf.DDR4_2400, perf.READ_LATENCY),
    "200 cycles": (None, 200),
    "600 cycles": (None, 600),
}
NEAR = ("ideal", "DDR4-2400")
# What far memories are there to show: short jobs, and a long stream.
FAR = (("64 x 128", "200 cycles"), ("8 x 4096", "600 cycles"))


@dataclass
class Figures:
    """Of one run.

    Attributes
    ----------
    used : float
        Beats used over cycles from the first to the last of them.
    of_supply : float
        Beats over those that the memory could have delivered, had it been asked in time.
    tail_beats : int
        Beats of K that carry no valid token, in the last block of a page.
    drain_cycles : int
        Before the first and after the last beat: start, first latency, last softmax, write-back.
    predicted : float
        The cycle model's stream_cycles over the measured ones.
    """

    queue: str
    memory: str
    head_dim: int
    group_size: int
    kv_beats: int
    stream_cycles: int
    cycles_per_token: float
    used: float
    of_supply: float
    starved_cycles: int
    stalled_cycles: int
    tail_beats: int
    drain_cycles: int
    predicted: float
    simulated_cycles_per_s: float


def measure(
    config: Config,
    queue: str,
    head_dim: int,
    group_size: int,
    memory: str = "ideal",
    page_tokens: int = abi.TILE_TOKENS,
) -> Figures:
    """Run one queue through the simulated kernel.

    Raises
    ------
    RuntimeError
        If a job fails.
    """
    lengths, (dram, latency) = QUEUES[queue], MEMORIES[memory]
    rng = np.random.default_rng(0)
    data = rng.standard_normal((2, max(lengths), head_dim)).astype(np.float16).view(np.uint16)
    q = rng.standard_normal((group_size, head_dim))
    jobs = [workload.Job(q, data[0, :n], data[1, :n], page_tokens=page_tokens) for n in lengths]
    memories = workload.place(jobs, rng)
    with rtl.RtlCard(config, read_latency=latency, dram=dram) as card:
        summary = memories.summary_of(memories.execute(card))
        run = card.last_run
    if summary["n_failed"]:
        raise RuntimeError(f"{summary['n_failed']} of {len(jobs)} jobs failed")
    shapes = [perf.JobShape(head_dim, group_size, n, page_tokens) for n in lengths]
    expected = perf.predict(config, shapes, dram, latency)
    stream, beats = summary["stream_cycles"], summary["kv_beats"]
    return Figures(
        queue=queue, memory=memory, head_dim=head_dim, group_size=group_size, kv_beats=beats,
        stream_cycles=stream, cycles_per_token=stream / sum(lengths), used=beats / stream,
        of_supply=beats / (beats + run["kv_idle"]),
        starved_cycles=summary["starved_cycles"], stalled_cycles=summary["stalled_cycles"],
        tail_beats=beats - sum(lengths) * head_dim * 4 // abi.BEAT_BYTES,
        drain_cycles=summary["cycles"] - stream, predicted=expected.stream_cycles / stream,
        simulated_cycles_per_s=run["cycle"] / run["seconds"],
    )  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--config", default="smartssd", choices=PRESETS)
    parser.add_argument("--queue", choices=QUEUES, action="append", help="default: all")
    parser.add_argument(
        "--head-dim", type=int, action="append", help="default: 64, 128 and 256, as far as built"
    )
    parser.add_argument(
        "--group", type=int, action="append", help="default: 1, 4, 5 and 8, as far as built"
    )
    parser.add_argument(
        "--memory", choices=MEMORIES, action="append",
        help=f"default: {' and '.join(NEAR)}, and the far ones for {' and '.join(q for q, _ in FAR)}",
    )  # fmt: skip
    parser.add_argument(
        "--page-tokens", type=int, default=abi.TILE_TOKENS, help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON")


def run(args) -> int:
    config = preset(args.config)
    for head_dim in args.head_dim or ():
        abi.check_head_dim(head_dim)
    abi.check_page_tokens(args.page_tokens)
    if min(args.group or [1]) < 1:
        raise ValueError(f"--group must be at least 1, not {min(args.group)}")
    rows = []
    head = ("queue", "memory", "d", "g", "beats", "cycles", "used", "of supply", "cyc/token",
            "starved", "stalled", "tail", "drain", "predicted", "sim c/s")  # fmt: skip
    form = (
        "{:>9} {:>10} {:>3} {:>2} {:>8} {:>8} {:>7} {:>9} {:>9} {:>7} {:>7} {:>6} {:>5} {:>9} {:>8}"
    )
    if not args.json:
        print(f"preset {config.name}, fp16, pages of {args.page_tokens} tokens; limit: used 100%")
        print(form.format(*head))
    runs = [(q, memory) for q in args.queue or QUEUES for memory in args.memory or NEAR]
    if not args.memory:
        runs += [run for run in FAR if run[0] in (args.queue or QUEUES)]
    for queue, memory in runs:
        for head_dim in args.head_dim or (64, 128, 256):
            for group in args.group or (1, 4, 5, 8):
                if head_dim > config.max_head_dim or group > config.rows:
                    continue
                row = measure(config, queue, head_dim, group, memory, args.page_tokens)
                rows.append(row)
                if not args.json:
                    print(_line(form, row), flush=True)
    if args.json:
        json.dump(
            {"config": config.name, "abi": abi.ABI_VERSION, "page_tokens": args.page_tokens, "runs": [vars(row) for row in rows]},
            sys.stdout, indent=2,
        )  # fmt: skip
        print()
    return 0


def _line(form: str, row: Figures) -> str:
    return form.format(
        row.queue, row.memory, row.head_dim, row.group_size, row.kv_beats, row.stream_cycles,
        f"{row.used:.2%}", f"{row.of_supply:.2%}", f"{row.cycles_per_token:.3f}",
        row.starved_cycles, row.stalled_cycles, row.tail_beats, row.drain_cycles,
        f"{row.predicted:.2%}", f"{row.simulated_cycles_per_s / 1e3:.0f}k",
    )  # fmt: skip
