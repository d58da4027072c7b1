# SPDX-License-Identifier: Apache-2.0
"""Measure the simulated kernel: `python -m nearkv_sim.bench_rtl [--json]`.

Two kinds of figures: how many cycles a second this machine simulates, and, from the kernel's own
counters, how many cycles it needs for its work, which is the same on every machine.
"""

import argparse
import json
import sys

import numpy as np

from nearkv_hw import abi
from nearkv_hw.config import PRESETS, Config, preset

from . import rtl, workload

# (head_dim, group_size, tokens of each job)
CASES = (
    (128, 8, [4096]),
    (128, 4, [4096]),
    (128, 1, [4096]),
    (64, 8, [4096]),
    (64, 3, [4096]),
    (128, 8, [500, 3500, 2000, 1000, 4000, 2000, 3000, 100]),
    (64, 3, [500, 512, 384, 500, 512, 384]),
)


def measure(config: Config, head_dim: int, group_size: int, lengths: list[int]) -> dict:
    """Run one queue; its figures.

    used : share of the cycles from the first to the last beat in which a beat was used
    cycles_per_token : of those cycles, for each token and KV head
    """
    rng = np.random.default_rng(0)
    jobs = [
        workload.random_job(rng, config, n_tokens=n, head_dim=head_dim, group_size=group_size,
                            page_tokens=128, kv_type=abi.KvType.FP16)
        for n in lengths
    ]  # fmt: skip
    memories = workload.place(jobs, rng)
    with rtl.RtlCard(config) as card:
        summary = memories.summary_of(memories.execute(card))
        run = card.last_run
    if summary["n_failed"]:
        raise RuntimeError(f"{summary['n_failed']} jobs failed")
    return {
        "head_dim": head_dim,
        "group_size": group_size,
        "jobs": len(lengths),
        "tokens": sum(lengths),
        **{name: summary[name] for name in (*workload.TIMING_FIELDS, "kv_beats")},
        "used": summary["kv_beats"] / summary["stream_cycles"],
        "cycles_per_token": summary["stream_cycles"] / sum(lengths),
        "simulated_cycles_per_s": run["cycle"] / run["seconds"],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="nearkv_sim.bench_rtl")
    parser.add_argument("--config", default="smartssd", choices=PRESETS)
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    args = parser.parse_args(argv)
    config = preset(args.config)
    rows = [
        measure(config, *case)
        for case in CASES
        if case[0] <= config.max_head_dim and case[1] <= config.rows
    ]
    if args.json:
        print(json.dumps({"config": config.name, "abi": abi.ABI_VERSION, "runs": rows}, indent=2))
        return 0
    print(
        f"preset {config.name}, fp16, pages of 128 tokens; 8 cycles per token are the bus at d=128"
    )
    print(
        "head_dim group jobs tokens  beats used  starved stalled  cycles/token  simulated cycles/s"
    )
    for row in rows:
        print(
            f"{row['head_dim']:8} {row['group_size']:5} {row['jobs']:4} {row['tokens']:6} "
            f"{row['used']:10.2%} {row['starved_cycles']:8} {row['stalled_cycles']:7} "
            f"{row['cycles_per_token']:13.2f} {row['simulated_cycles_per_s']:19,.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
