# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench twin`: the card twin, beside torch and the memory, per core and on all of them.

Every row attends one query token, a group of heads for each of 8 KV heads, to the same K and V, over and
over: the twin (CRC-32C of every page included); torch's scaled_dot_product_attention; two matrix
multiplications with a softmax between them in torch; a plain read of the bytes. Torch gets K and V as it
likes them best, prepared beforehand: head by head, in the stored type and in fp32, K transposed and not,
a group as tokens of one query and as heads with enable_gqa. The fastest form counts. All memory is in
huge pages.

They take turns, so that whatever else the machine does hits all alike. Rates are medians over the turns,
ratios are medians of each turn's ratio. A rate is bytes of 16-bit K and V over seconds, also for torch
in fp32: seconds of the processor with one thread, because a figure per core must not depend on who else
waits for it; of the wall clock with more, beside how many cores the twin really got.

The matrix multiplications in a 16-bit type round scores and weights to it; what that costs is shown as
errors against float64.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import mmap
import os
import statistics
import time

import numpy as np

import nearkv
from nearkv import bench, extras
from nearkv.arguments import whole
from nearkv_hw import abi, pages
from nearkv_hw.abi import KvType
from nearkv_hw.config import Config
from nearkv_sim import reference, twin, workload

N_KV_HEADS = 8
# Rates of a SmartSSD's flash, which the twin must keep up with: up to this group size, bytes/s.
GOALS = {4: 3e9, 8: 2e9}
CRC_GOAL = 10e9
# Forms of torch that are slower than the fastest by this factor when warm are not timed.
HOPELESS = 2.5


@dataclass
class Figures:
    """Of one shape. Rates are bytes/s of K and V in their stored type.

    Attributes
    ----------
    cores : float
        Processor seconds a second that the twin got for its threads.
    torch, matmul : float or None
        Of scaled_dot_product_attention, and of multiplications written out.
    torch_as, matmul_as : str
        The form that was fastest.
    of_torch, of_matmul, of_read : float or None
        The twin's rate over theirs.
    goal : float or None
    """

    kv_type: str
    head_dim: int
    group_size: int
    path: str
    threads: int
    cores: float
    twin: float
    torch: float | None
    torch_as: str
    of_torch: float | None
    matmul: float | None
    matmul_as: str
    of_matmul: float | None
    read: float
    of_read: float
    goal: float | None

    @property
    def shape(self) -> str:
        return f"{self.kv_type} d={self.head_dim} g={self.group_size}"


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
    kv = _huge(memories.kv)
    parts = np.array_split(kv.view(np.uint64), threads)
    config = Config(name="bench", rows=max(8, group_size + group_size % 2))
    with (
        twin.TwinCard(config, threads=threads, path=path) as card,
        ThreadPoolExecutor(threads) as pool,
    ):
        job = memories.job.copy()

        def run_twin():
            card.execute(kv, job, memories.queue, memories.n_jobs, memories.summary)

        peers: dict[str, Callable] = {
            "twin": run_twin,
            "read": lambda: list(pool.map(np.bitwise_or.reduce, parts)),
        }
        if threads == 1:
            peers["read"] = lambda: np.bitwise_or.reduce(parts[0])
        if with_torch:
            peers |= _torch_peers(q, k, v, kv_type, threads)
        turns = _take_turns(peers, rounds, threads)
        path = card.path
    if n_failed := memories.summary_of(job)["n_failed"]:
        raise RuntimeError(f"{n_failed} of {len(jobs)} jobs failed")
    kv_bytes = k.nbytes + v.nbytes
    rate = {name: kv_bytes / statistics.median(of.seconds) for name, of in turns.items()}
    rate["read"] *= kv.nbytes / kv_bytes  # unused slots of kv memory are read as well

    def beside(kind: str) -> tuple[float | None, str, float | None]:
        """Rate and form of torch's fastest of a kind, and the twin's rate over it."""
        name = max((n for n in rate if n.startswith(kind)), key=lambda n: rate[n], default="")
        if not name:
            return None, "", None
        return rate[name], name.removeprefix(kind), turns["twin"].over(turns[name])

    torch, torch_as, of_torch = beside("sdpa ")
    matmul, matmul_as, of_matmul = beside("matmul ")
    goals = [goal for largest, goal in GOALS.items() if group_size <= largest and head_dim == 128]
    return Figures(
        kv_type=kv_type.name.lower(), head_dim=head_dim, group_size=group_size, path=path,
        threads=threads, cores=turns["twin"].cores, twin=rate["twin"], torch=torch, torch_as=torch_as, of_torch=of_torch,
        matmul=matmul, matmul_as=matmul_as, of_matmul=of_matmul, read=rate["read"],
        of_read=rate["twin"] / rate["read"], goal=goals[0] if goals else None,
    )  # fmt: skip


def _huge(data: np.ndarray) -> np.ndarray:
    """A copy in memory as a card has it: huge pages, aligned to them."""
    memory = mmap.mmap(-1, data.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, data.dtype).reshape(data.shape)
    copy[:] = data
    return copy


@dataclass
class _Turns:
    """Seconds of the turns of one peer, and of all its threads on the processor."""

    seconds: list[float]
    busy: list[float]

    @property
    def cores(self) -> float:
        return statistics.median(b / s for b, s in zip(self.busy, self.seconds, strict=True))

    def over(self, other: "_Turns") -> float:
        """How many times as fast as the other, turn by turn."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def _take_turns(peers: dict[str, Callable], rounds: int, threads: int = 1) -> dict[str, _Turns]:
    """The first two turns warm up, torch's compiler included, and do not count."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    busy_clock = time.thread_time if threads == 1 else time.process_time

    def turn(peer: Callable) -> tuple[float, float]:
        if threads > 1:
            time.sleep(0.02)  # torch's threads spin for some time after their turn
        start, busy = clock(), busy_clock()
        peer()
        return clock() - start, busy_clock() - busy

    first = {name: min(turn(peer)[0] for _ in range(2)) for name, peer in peers.items()}
    for kind in ("sdpa ", "matmul "):
        forms = {name: first[name] for name in first if name.startswith(kind)}
        for name in forms:
            if forms[name] > HOPELESS * min(forms.values()):
                del first[name]
    turns = {name: _Turns([], []) for name in first}
    for _ in range(rounds):
        for name, so_far in turns.items():
            seconds, busy = turn(peers[name])
            so_far.seconds.append(seconds)
            so_far.busy.append(busy)
    return turns


def _torch_peers(q, k, v, kv_type: KvType, threads: int) -> dict[str, Callable]:
    """Ways to compute the same with torch: name -> call."""
    import torch

    torch.set_num_threads(threads)
    dtype = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}[kv_type]
    group = torch.from_numpy(q)[None]  # (1, kv head, head of the group, channel)
    transposed = k.transpose(0, 2, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    peers = {}
    for name, a_type in ((kv_type.name.lower(), dtype), ("fp32", torch.float32)):

        def place(patterns, a_type=a_type):
            x = torch.from_numpy(np.ascontiguousarray(patterns)).view(dtype)[None]
            if a_type is dtype:
                return torch.from_numpy(_huge(x.view(torch.int16).numpy())).view(dtype)
            return torch.from_numpy(_huge(x.to(a_type).numpy()))

        tokens, a_k, a_k_t, a_v = group.to(a_type), place(k), place(transposed), place(v)
        heads = tokens.reshape(1, -1, 1, q.shape[2])
        peers |= {
            f"sdpa {name} tokens": lambda x=(tokens, a_k, a_v): attend(*x),
            f"sdpa {name} heads": lambda x=(heads, a_k, a_v): attend(*x, enable_gqa=True),
            f"matmul {name} K": lambda x=(tokens, a_k.mT, a_v): _by_matmul(*x),
            f"matmul {name} K^T": lambda x=(tokens, a_k_t, a_v): _by_matmul(*x),
        }
    return peers


def _by_matmul(q, k_t, v):
    """As transformers' "eager" attention does it, less its copies of K and V for each head."""
    import torch

    scores = torch.matmul(q * q.shape[-1] ** -0.5, k_t)
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


def errors(kv_type: KvType, head_dim: int = 128, n_tokens: int = 8192) -> dict[str, float]:
    """Relative L2 error against float64 of the twin and of torch's forms in the stored type."""
    import torch

    dtype = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}[kv_type]
    rng = np.random.default_rng(1)
    q, k, v = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)
        for shape in ((8, head_dim), (n_tokens, 1, head_dim), (n_tokens, 1, head_dim))
    )
    want = reference.attention(*(x.double().numpy() for x in (q, k, v)))[0]
    heads_first = q[None, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    found = {
        "twin": nearkv.attend(q, k, v, card="twin")[0],
        "torch": torch.nn.functional.scaled_dot_product_attention(*heads_first),
        "matmul": _by_matmul(heads_first[0], heads_first[1].mT, heads_first[2]),
    }
    norm = np.linalg.norm(want)
    return {
        name: float(np.linalg.norm(torch.as_tensor(x).double().reshape(want.shape) - want) / norm)
        for name, x in found.items()
    }


def crc_rates(rounds: int) -> dict[str, float]:
    """Bytes/s of CRC-32C on each path, over memory that fits the cache."""
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    peers = {path: lambda path=path: twin.crc32c(path, data) for path in twin.supported_paths()}
    turns = _take_turns(peers, 4 * rounds)
    return {path: data.nbytes / statistics.median(of.seconds) for path, of in turns.items()}


def add_arguments(parser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--kv-dtype", choices=("fp16", "bf16"), action="append", help="default: both"
    )
    parser.add_argument(
        "--head-dim", type=whole(), action="append",
        help="default: 64 and 128; 128 with several threads",
    )  # fmt: skip
    parser.add_argument("--group", type=whole(), action="append", help="default: 1, 2, 3, 4 and 8")
    parser.add_argument("--path", choices=("auto", *twin.PATHS), default="auto")
    parser.add_argument(
        "--threads", type=whole(), action="append",
        help=f"of twin, torch and plain read (default: 1, then all: {cores})",
    )  # fmt: skip
    parser.add_argument(
        "--kv-mib", type=whole(), default=64, help="K and V (default: %(default)s MiB)"
    )
    parser.add_argument("--rounds", type=whole(), default=10, help="turns of each (default: 10)")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="figures as bars: .png, .svg or .html")


def run(args) -> int:
    if args.plot:
        bench.check_plot(args.plot)
    if not args.no_torch:
        extras.require("nearkv bench twin without --no-torch", "torch")
    for head_dim in args.head_dim or ():
        abi.check_head_dim(head_dim)
    if max(args.group or [1]) > abi.MAX_ROWS:
        raise ValueError(f"--group must be at most {abi.MAX_ROWS}, not {max(args.group)}")
    where = bench.machine()
    crc = crc_rates(args.rounds)
    types = [pages.parse_kv_type(name) for name in args.kv_dtype or ("fp16", "bf16")]
    error = {} if args.no_torch else {t.name.lower(): errors(t) for t in types}
    if not args.json:
        print(f"{where['processor']}, {where['cores']} cores, load {where['load']}")
        print("CRC-32C, GB/s: " + ", ".join(f"{path} {r / 1e9:.1f}" for path, r in crc.items()))
        for name, of in error.items():
            print(f"error, {name}: " + ", ".join(f"{who} {e:.1e}" for who, e in of.items()))
        print(f"GB/s of K and V, CRC included; {args.kv_mib} MiB")
        print(_FORM.format("type", "d", "g", "threads", "cores", "twin", "torch", "", "ratio", "matmul", "",
                           "ratio", "plain read", "of read", "goal"))  # fmt: skip
    rows = []
    for kv_type, head_dim, group, threads in _shapes(args, types):
        row = measure(
            kv_type, head_dim, group, path=args.path, threads=threads, kv_mib=args.kv_mib,
            rounds=args.rounds, with_torch=not args.no_torch,
        )  # fmt: skip
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
    if args.json:
        head = {"machine": where, "kv_mib": args.kv_mib, "crc": crc, "error": error}
        print(bench.to_json("nearkv bench twin --json", head, [vars(row) for row in rows]))
    if args.plot:
        plot(args.plot, rows, where)
    return 0


def _shapes(args, types: list[KvType]) -> Iterator[tuple[KvType, int, int, int]]:
    for threads in args.threads or sorted({1, len(os.sched_getaffinity(0))}):
        for kv_type in types:
            for head_dim in args.head_dim or ((64, 128) if threads == 1 else (128,)):
                for group in args.group or (1, 2, 3, 4, 8):
                    yield kv_type, head_dim, group, threads


def plot(path: str, rows: list[Figures], where: dict) -> None:
    """The rows of the fewest threads as bars."""
    threads = min(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    series = {
        "twin, exact, CRC checked": [row.twin for row in rows],
        "torch SDPA": [row.torch for row in rows],
        "torch matmul": [row.matmul for row in rows],
    }
    bench.plot_bars(
        path, "Attention over K and V in memory", [row.shape for row in rows],
        {name: [x and x / 1e9 for x in rates] for name, rates in series.items() if any(rates)},
        unit="GB/s of 16-bit K and V",
        limit=("plain read of the bytes", statistics.median(row.read for row in rows) / 1e9),
        note=f"{where['processor']}, {threads} thread(s), path {rows[0].path}: nearkv bench twin",
    )  # fmt: skip


_FORM = (
    "{:>5} {:>4} {:>3} {:>7} {:>5} {:>6} {:>6} {:>11} {:>5} {:>6} {:>8} {:>5} {:>10} {:>7} {:>8}"
)


def _line(row: Figures) -> str:
    goal = "-"
    if row.goal:
        goal = f"{row.goal / 1e9:.0f} {'met' if row.twin >= row.goal else 'missed'}"

    def rate(x: float | None) -> str:
        return f"{x / 1e9:.2f}" if x else "-"

    def ratio(x: float | None) -> str:
        return f"{x:.2f}" if x else "-"

    return _FORM.format(
        row.kv_type, row.head_dim, row.group_size, row.threads, f"{row.cores:.2f}", rate(row.twin), rate(row.torch),
        row.torch_as, ratio(row.of_torch), rate(row.matmul), row.matmul_as, ratio(row.of_matmul),
        rate(row.read), f"{row.of_read:.0%}", goal,
    )  # fmt: skip
