# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench twin`: the card twin on one core, beside torch, beside the memory.

Every row attends one query token, a group of heads for each of 8 KV heads, to the same K and V three
times over: the twin (CRC-32C of every page included), torch's scaled_dot_product_attention (the best of
fp16 or bf16 and fp32, and of two ways to say that heads share K and V), and a plain read of the bytes.
The three take turns, so that whatever else the machine does hits all alike; each counts with its best
turn. A rate is bytes of 16-bit K and V over seconds, also for torch in fp32: seconds of the processor
with one thread, because a figure per core must not depend on who else waits for it; of the wall clock
with more.
"""

from collections.abc import Callable
from dataclasses import dataclass
import json
import mmap
import os
from pathlib import Path
import platform
import sys
import time

import numpy as np

from nearkv import pages
from nearkv_hw import abi
from nearkv_hw.abi import KvType
from nearkv_hw.config import Config

from . import twin, workload

N_KV_HEADS = 8
# Rates of a SmartSSD's flash, which the twin must keep up with: up to this group size, bytes/s.
GOALS = {4: 3e9, 8: 2e9}


@dataclass
class Figures:
    """Of one shape. Rates are bytes/s of K and V in their stored type.

    Attributes
    ----------
    of_torch, of_read : float
        The twin's rate over theirs.
    torch_as : str
        What torch was fastest with.
    goal : float or None
    """

    kv_type: str
    head_dim: int
    group_size: int
    path: str
    threads: int
    twin: float
    torch: float | None
    torch_as: str
    read: float
    of_torch: float | None
    of_read: float
    goal: float | None


def measure(
    kv_type: KvType, head_dim: int, group_size: int, *, path: str, threads: int, kv_mib: int,
    rounds: int, with_torch: bool,
) -> Figures:  # fmt: skip
    """Measure one shape.

    Raises
    ------
    RuntimeError
        If a job fails.
    """
    rng = np.random.default_rng(0)
    n_tokens = (kv_mib << 20) // (4 * head_dim * N_KV_HEADS)
    n_tokens -= n_tokens % abi.TILE_TOKENS
    k, v = (
        pages.to_patterns(
            rng.standard_normal((N_KV_HEADS, n_tokens, head_dim), np.float32), kv_type
        )
        for _ in range(2)
    )
    q = rng.standard_normal((N_KV_HEADS, group_size, head_dim)).astype(np.float16)
    jobs = [workload.Job(q[h], k[h], v[h], kv_type) for h in range(N_KV_HEADS)]
    memories = workload.place(jobs, rng)
    # numpy's own arrays start 16 bytes past a cache line; a card's memory starts on a page.
    memory = mmap.mmap(-1, memories.kv.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    kv = np.frombuffer(memory, np.uint8)
    kv[:] = memories.kv
    words = kv.view(np.uint64)
    config = Config(name="bench", rows=max(8, group_size + group_size % 2))
    with twin.TwinCard(config, threads=threads, path=path) as card:
        job = memories.job.copy()

        def run_twin():
            card.execute(kv, job, memories.queue, memories.n_jobs, memories.summary)

        peers: dict[str, Callable] = {
            "twin": run_twin,
            "read": lambda: np.bitwise_or.reduce(words),
        }
        if with_torch:
            peers |= _torch_peers(q, k, v, kv_type, threads)
        best = _take_turns(peers, rounds, threads)
        path = card.path
    if n_failed := memories.summary_of(job)["n_failed"]:
        raise RuntimeError(f"{n_failed} of {len(jobs)} jobs failed")
    kv_bytes = k.nbytes + v.nbytes
    rate = {name: kv_bytes / seconds for name, seconds in best.items()}
    rate["read"] *= words.nbytes / kv_bytes  # unused slots of kv memory are read as well
    peers_of_torch = [name for name in rate if name not in ("twin", "read")]
    torch_as = max(peers_of_torch, key=lambda name: rate[name], default="")
    goals = [goal for largest, goal in GOALS.items() if group_size <= largest and head_dim == 128]
    return Figures(
        kv_type=kv_type.name.lower(), head_dim=head_dim, group_size=group_size, path=path,
        threads=threads, twin=rate["twin"], torch=rate.get(torch_as), torch_as=torch_as,
        read=rate["read"], of_torch=rate["twin"] / rate[torch_as] if torch_as else None,
        of_read=rate["twin"] / rate["read"], goal=goals[0] if goals else None,
    )  # fmt: skip


def _take_turns(peers: dict[str, Callable], rounds: int, threads: int = 1) -> dict[str, float]:
    """Seconds of each one's best turn. The first turn warms up and does not count."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(peers, float("inf"))
    for turn in range(rounds + 1):
        for name, peer in peers.items():
            start = clock()
            peer()
            seconds = clock() - start
            if turn:
                best[name] = min(best[name], seconds)
    return best


def _torch_peers(q, k, v, kv_type: KvType, threads: int) -> dict[str, Callable]:
    """Ways to compute the same with torch: name -> call."""
    import torch

    torch.set_num_threads(threads)
    dtype = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}[kv_type]
    stored_k, stored_v = (torch.from_numpy(x).view(dtype)[None] for x in (k, v))
    stored_q = torch.from_numpy(q)[None]  # (1, kv head, group, channel)
    attend = torch.nn.functional.scaled_dot_product_attention
    peers = {}
    for name, a_type in ((kv_type.name.lower(), dtype), ("fp32", torch.float32)):
        tensors = [x.to(a_type) for x in (stored_q, stored_k, stored_v)]
        # The heads of a group as tokens of one query, or as heads that torch spreads K and V over.
        peers[f"{name} tokens"] = lambda tensors=tensors: attend(*tensors)
        heads = [tensors[0].reshape(1, -1, 1, q.shape[2]), *tensors[1:]]
        peers[f"{name} heads"] = lambda heads=heads: attend(*heads, enable_gqa=True)
    return peers


def crc_rates(rounds: int) -> dict[str, float]:
    """Bytes/s of CRC-32C on each path, over memory that fits the cache."""
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    peers = {path: lambda path=path: twin.crc32c(path, data) for path in twin.supported_paths()}
    return {path: data.nbytes / s for path, s in _take_turns(peers, 4 * rounds).items()}


def machine() -> dict:
    """What the figures were measured on."""
    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    load = os.getloadavg()[0]
    return {"processor": name, "cores": os.cpu_count(), "load": round(load, 2)}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--kv-dtype", choices=("fp16", "bf16"), action="append", help="default: fp16"
    )
    parser.add_argument("--head-dim", type=int, action="append", help="default: 64 and 128")
    parser.add_argument("--group", type=int, action="append", help="default: 1, 2, 3, 4 and 8")
    parser.add_argument("--path", choices=("auto", *twin.PATHS), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of twin and torch (default: 1)")
    parser.add_argument("--kv-mib", type=int, default=64, help="K and V (default: %(default)s MiB)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: 10)")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument("--json", action="store_true", help="figures as JSON")


def run(args) -> int:
    where = machine()
    crc = crc_rates(args.rounds)
    form = "{:>5} {:>4} {:>3} {:>9} {:>11} {:>14} {:>11} {:>9} {:>8} {:>11}"
    if not args.json:
        print(f"{where['processor']}, {where['cores']} cores, load {where['load']}")
        print(f"GB/s of K and V with {args.threads} thread(s), CRC included; {args.kv_mib} MiB")
        print("CRC-32C: " + ", ".join(f"{path} {rate / 1e9:.1f}" for path, rate in crc.items()))
        print(form.format("type", "d", "g", "twin", "torch", "", "plain read", "of torch",
                          "of read", "goal"))  # fmt: skip
    rows = []
    for kv_dtype in args.kv_dtype or ("fp16",):
        for head_dim in args.head_dim or (64, 128):
            for group in args.group or (1, 2, 3, 4, 8):
                row = measure(
                    pages.parse_kv_type(kv_dtype), head_dim, group, path=args.path,
                    threads=args.threads, kv_mib=args.kv_mib, rounds=args.rounds,
                    with_torch=not args.no_torch,
                )  # fmt: skip
                rows.append(row)
                if not args.json:
                    print(_line(form, row), flush=True)
    if args.json:
        figures = {"machine": where, "crc": crc, "runs": [vars(row) for row in rows]}
        json.dump(figures, sys.stdout, indent=2)
        print()
    return 0


def _line(form: str, row: Figures) -> str:
    goal = "-"
    if row.goal:
        goal = f"{row.goal / 1e9:.0f} {'met' if row.twin >= row.goal else 'missed'}"
    return form.format(
        row.kv_type, row.head_dim, row.group_size, f"{row.twin / 1e9:.2f}",
        f"{row.torch / 1e9:.2f}" if row.torch else "-", f"({row.torch_as})" if row.torch else "",
        f"{row.read / 1e9:.2f}", f"{row.of_torch:.2f}" if row.of_torch else "-",
        f"{row.of_read:.0%}", goal,
    )  # fmt: skip
