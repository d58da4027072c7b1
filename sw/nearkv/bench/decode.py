# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench decode`: attention of a decode step with K and V on the drive.

Fills a drive with the K and V of a batch at one context length and attends to all of it, layer after
layer, as decoding one token does; nothing else of a model is computed. Rates are bytes of 16-bit K and
V over seconds of a step in the steady state: the layer before it has been attended to when the clock
starts, and has used up what was fetched while nothing ran. What each is held against, in the same run
and in random turns:

    drive       threads that read the same page files in order, O_DIRECT, same depth and size, into as
                much memory as the ring has
    drive, small  the same into one buffer for each request: `nearkv bench flash` says why
    twin        the card alone, pages in its memory already
    no ahead    nearkv without fetching the next layer's pages early
    no ring     the same with one segment: loading, then computing
    threads     nearkv with threads instead of io_uring
    two cards   the same cores and drive, shared by two cards
    plain twin  where --card is another: nearkv with as many of the card twin as --card has engines
    spilling, spilling in step
                a page is appended to every head of every layer in each step, 128 times as often as
                decoding does it: written behind the step's back, or before it goes on
    FlexGen     its disk path: K and V of a layer as token-major memory-mapped files; threads copy a
                layer into host buffers, through the page cache, while torch attends to the one before.
                Its copy threads, the type torch computes in and torch's threads are tuned first. The
                page cache is emptied of the files before each step, as a context larger than memory does
    memory      torch's attention with K and V in host memory, tuned likewise

A drive faster than the machine's own can be stood in by memory: `zramctl --find --size 5G`, `mkfs.ext4`
on it, mounted as `--directory`. Its reads cost processor time, as those of a virtual drive do.

Then the demo model as a whole, where it is installed, as `nearkv bench step` measures it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import itertools
import mmap
import os
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from nearkv_hw.abi import PageLayout

from .. import extras
from ..arguments import existing_directory, whole
from ..attention import RING_BYTES, SEGMENTS, Figures, PageAttention
from ..cards import KV_BYTES, CardError, open_cards
from ..io import reader_kind
from ..io.uring import refusal
from ..store import DELAYED_BYTES, KvStore
from . import check_context, check_plot, in_turns, plot_bars, quartiles_of_ratio, step, to_json
from .flash import arguments, fill, read_raw, where

SMARTSSD_RATE = 3e9  # bytes/s from the flash of one, published


class FlexGen:
    """The disk path of FlexGen (ICML'23) with attention on the host (its `cpu_cache_compute`).

    K and V of each layer lie in files of shape (tokens, sequences * kv heads, head_dim). Copy threads
    bring slices of tokens of the next layer from memory maps to host buffers while torch attends.
    """

    def __init__(self, directory: Path, n_layers: int, n_tokens: int, shape: tuple[int, ...]):
        n_sequences, n_heads, head_dim = shape
        self.shape, self.n_layers = (n_tokens, n_sequences * n_heads, head_dim), n_layers
        self._paths = [
            [directory / f"{name}-{layer}.bin" for name in "kv"] for layer in range(n_layers)
        ]
        rng = np.random.default_rng(0)
        some = rng.standard_normal((1024, *self.shape[1:]), np.float32).astype(np.float16)
        for path in itertools.chain(*self._paths):
            with open(path, "wb") as file:
                for at in range(0, n_tokens, 1024):
                    file.write(some[: min(1024, n_tokens - at)].data)
                os.fsync(file.fileno())
        self._buffers = np.zeros((2, 2, *self.shape), np.float16)  # two layers, K and V

    @property
    def kv_bytes(self) -> int:
        return self.n_layers * self._buffers[0].nbytes

    def forget(self) -> None:
        """Empty the page cache of the files."""
        for path in itertools.chain(*self._paths):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def step(self, q, copy_threads: int, kind, sequential: bool) -> None:
        """Attend to every layer. q : (sequences * kv heads, group, head_dim) torch, of `kind`."""
        pieces = np.array_split(np.arange(self.shape[0]), copy_threads * 4)

        def copy(target, source, piece):
            target[piece[0] : piece[-1] + 1] = source[piece[0] : piece[-1] + 1]

        def begin(layer):
            buffers = self._buffers[layer % 2]
            maps = [
                np.memmap(path, dtype=np.float16, mode="r", shape=self.shape)
                for path in self._paths[layer]
            ]
            if sequential:
                for source in maps:
                    getattr(source, "_mmap").madvise(mmap.MADV_SEQUENTIAL)  # noqa: B009
            return [
                pool.submit(copy, target, source, piece)
                for target, source in zip(buffers, maps, strict=True)
                for piece in pieces
            ]

        with ThreadPoolExecutor(copy_threads) as pool:
            coming = begin(0)
            for layer in range(self.n_layers):
                for future in coming:
                    future.result()
                coming = begin(layer + 1) if layer + 1 < self.n_layers else []
                k, v = self._buffers[layer % 2]
                attend_in_memory(q, k, v, kind)


def attend_in_memory(q, k: np.ndarray, v: np.ndarray, kind):
    """torch's attention over token-major K and V: (tokens, sequences * kv heads, head_dim).

    With a leading dimension of 1: torch's fast path wants four.
    """
    import torch

    keys, values = (torch.from_numpy(x).to(kind).transpose(0, 1)[None] for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q[None], keys, values)


def add_arguments(parser) -> None:
    add = parser.add_argument
    add(
        "--directory",
        type=existing_directory,
        help="on the drive to measure (default: temporary files')",
    )
    add("--context", type=whole(), default=32768, help="tokens (default: %(default)s)")
    add("--batch", type=whole(), default=1, help="sequences (default: %(default)s)")
    add("--layers", type=whole(), default=6, help="default: %(default)s")
    add("--kv-heads", type=whole(), default=8, help="default: %(default)s")
    add("--head-dim", type=whole(), default=128, help="default: %(default)s")
    add("--group", type=whole(), default=4, help="query heads of a kv head (default: %(default)s)")
    add("--page-tokens", type=whole(), default=128, help="default: %(default)s")
    add("--card", default="twin", help="default: %(default)s")
    add("--cards", type=whole(), default=1,
        help="how many, each with all its engines (default: %(default)s)")  # fmt: skip
    add("--kv-mib", type=whole(), default=KV_BYTES >> 20, help="kv memory of a card (default: 64)")
    add(
        "--ring-mib",
        type=whole(),
        default=RING_BYTES >> 20,
        help="of it used (default: %(default)s)",
    )
    add("--segments", type=whole(), default=SEGMENTS, help="of the ring (default: %(default)s)")
    add("--depth", type=whole(), help="reads at once (default: as many as nearkv itself has)")
    add("--rounds", type=whole(), default=15, help="turns of each (default: %(default)s)")
    add("--no-peers", action="store_true", help="leave FlexGen and memory out")
    add(
        "--model-context", type=whole(0), default=4096,
        help="of the demo model, tokens; 0 leaves it out (default: %(default)s)",
    )  # fmt: skip
    add("--json", action="store_true", help="figures as JSON")
    add("--plot", metavar="FILE", help="draw them: .png, .svg or .html")


def run(args) -> int:
    if args.plot:
        check_plot(args.plot)
    if not args.no_peers:
        extras.require("nearkv bench decode without --no-peers", "torch")
    if args.model_context:
        extras.require("nearkv bench decode without --model-context 0", "torch", "transformers")
    check_context(args.context, args.page_tokens)
    directory = Path(args.directory or tempfile.gettempdir())
    with contextlib.ExitStack() as opened:
        temporary = Path(
            opened.enter_context(tempfile.TemporaryDirectory(prefix="nearkv-bench-", dir=directory))
        )
        figures, rows = _measure(args, temporary, opened)
    figures["model"] = _measure_model(args, directory) if args.model_context else None
    if args.json:
        head = {"arguments": arguments(args), "machine": where(directory)} | figures
        print(to_json("nearkv bench decode --json", head, rows))
    else:
        _print(figures, rows)
    if args.plot:
        _plot(args, rows, where(directory))
    return 0


def _measure(args, temporary: Path, opened: contextlib.ExitStack) -> tuple[dict, list[dict]]:
    """What is said of the whole, and a row for each of the ways above."""
    layout = PageLayout(args.head_dim, args.page_tokens)
    scale = args.head_dim**-0.5
    shape = (args.batch, args.kv_heads, args.head_dim)
    kv_bytes = 4 * args.layers * args.context * args.batch * args.kv_heads * args.head_dim
    rng = np.random.default_rng(1)
    q = rng.standard_normal((args.batch, args.kv_heads, args.group, args.head_dim))

    depth = args.depth or reader_kind().DEPTH
    ring_bytes = args.ring_mib << 20

    number = itertools.count()

    def cards(n, reader="auto", name=args.card):
        made, _ = open_cards(
            [_numbered(name, next(number)) for _ in range(n)],
            kv_bytes=args.kv_mib << 20, reads_in_flight=args.depth, reader=reader,
        )  # fmt: skip
        for card in made:
            opened.enter_context(card)
        return made

    main = cards(args.cards)
    store = opened.enter_context(
        KvStore(
            temporary,
            layout,
            args.kv_heads,
            temporary=True,
            n_shards=max(2, len(main)),
            delayed_bytes=DELAYED_BYTES,
        )  # fmt: skip
    )
    fill(store, args.batch, args.layers, args.context)
    ring = {"segments": args.segments, "ring_bytes": ring_bytes}
    ways = {
        "nearkv": PageAttention(main, store, **ring),
        "no ahead": PageAttention(main, store, ahead=False, **ring),
        "no ring": PageAttention(
            main, store, ahead=False, segments=1, ring_bytes=ring_bytes // args.segments
        ),
    }
    # Of cards that have numbers there may be too few.
    with contextlib.suppress(*[CardError] if _is_device(args.card) else []):
        if not refusal():
            ways["threads"] = PageAttention(cards(args.cards, "threads"), store, **ring)
        if len(main) == 1:
            ways["two cards"] = PageAttention(cards(2), store, **ring)
    if _is_device(args.card):
        ways["plain twin"] = PageAttention(cards(len(main), name="twin"), store, **ring)
    counters, costs = {name: [] for name in ways}, {name: [] for name in ways}
    paths = store.page_files()
    file_bytes = sum(os.path.getsize(path) for path in paths)
    new = rng.standard_normal((args.kv_heads, args.page_tokens, args.head_dim))
    new = new.astype(np.float16).view(np.uint16)

    def attend(attention, layer):
        n_pages = [store.n_pages(sequence, layer) for sequence in range(args.batch)]
        attention.attend(layer, range(args.batch), q, scale, n_pages)

    def step(attention, append=lambda layer: None):
        """Seconds of a step in the steady state."""
        attend(attention, 0)
        begin = time.perf_counter()
        for layer in [*range(1, args.layers), 0]:
            attend(attention, layer)
            append(layer)
        return time.perf_counter() - begin

    def decode(name):
        attention = ways[name]
        attention.figures = Figures()
        begin, begin_thread = time.process_time(), time.thread_time()
        seconds = step(attention)
        counted = attention.figures  # of the layer before the step, too: only shares are told
        whole, own = time.process_time() - begin, time.thread_time() - begin_thread
        costs[name].append((whole, own, counted.runs, counted.kv_bytes))
        # Cards wait and run side by side, and all of them as long as the step lasts.
        counters[name].append(
            (counted.load_s, counted.run_s, counted.attend_s * len(attention.cards))
        )
        attention.discard()  # the next turn has the drive for itself
        return kv_bytes / seconds

    def spilling(in_step):
        attention, n_pages = ways["nearkv"], store.n_pages(0, 0)

        def append(layer):
            for sequence in range(args.batch):
                store.append(sequence, layer, new, new)
                if in_step:
                    store.settle(sequence, layer)

        seconds = step(attention, append)
        attention.discard()
        store.flush()
        for sequence in range(args.batch):
            for layer in range(args.layers):
                store.truncate(sequence, layer, n_pages)
        return kv_bytes / seconds

    raw_depth = depth * len(main)
    turns: dict[str, Callable[[], float]] = {
        "drive": lambda: file_bytes / read_raw(paths, raw_depth, ring_bytes * len(main)),
        "drive, small": lambda: file_bytes / read_raw(paths, raw_depth),
        "twin": lambda: _card_alone(main[0], store, q[:1, :1], scale) * len(main),
    }
    turns |= {name: functools.partial(decode, name) for name in ways}
    turns["spilling"] = lambda: spilling(in_step=False)
    turns["spilling in step"] = lambda: spilling(in_step=True)
    tuned = None
    if not args.no_peers:
        import torch

        peer = FlexGen(temporary, args.layers, args.context, shape)
        grouped = q.reshape(-1, args.group, args.head_dim)
        resident = torch.randn(2, *peer.shape).half().numpy()
        tuned, in_memory = _tune(peer, grouped), _tune_memory(resident, grouped)

        def flexgen():
            return _flexgen_rate(peer, grouped, **tuned)

        def memory():
            return _memory_rate(resident, grouped, **in_memory)

        turns |= {"FlexGen": flexgen, "memory": memory}
    rates = in_turns(turns, args.rounds)
    for attention in ways.values():
        attention.close()
    rows = []
    for name, by_round in rates.items():
        row: dict[str, Any] = {"name": name, "rate": statistics.median(by_round)}
        if name in counters:
            load, run, total = (sum(column) for column in zip(*counters[name][1:], strict=True))
            row |= {"waits_for_drive": load / total, "card_runs": run / total}
        rows.append(row | {"by_round": by_round})
    ours = rates["nearkv"]
    bounds = {
        drive: [min(pair) for pair in zip(rates[drive], rates["twin"], strict=True)]
        for drive in ("drive", "drive, small")
    }
    figures = {
        "kv_bytes": kv_bytes,
        "card_kv_bytes": args.kv_mib << 20,
        "depth": depth,
        "write_amplification": store.write_amplification,
        "of_bound": {name: quartiles_of_ratio(ours, bound) for name, bound in bounds.items()},
        "of_flexgen": quartiles_of_ratio(ours, rates["FlexGen"]) if tuned else None,
        "drive_of_flexgen": quartiles_of_ratio(rates["drive"], rates["FlexGen"]) if tuned else None,
        "flexgen_tuned": tuned,
    }
    if _is_device(args.card):
        # What a card costs the host, which does not compute itself.
        whole, own, runs, run_bytes = (sum(column) for column in zip(*costs["nearkv"], strict=True))
        figures["device"] = {
            "of_plain_twin": quartiles_of_ratio(ours, rates["plain twin"]),
            "host_s_a_run": whole / runs,
            "thread_s_a_run": own / runs if len(main) == 1 else None,
            "run_bytes": run_bytes / runs,
        }
    return figures, rows


def _is_device(name: str) -> bool:
    """Whether a card is something else than a program in this process."""
    return ":" in name


def _numbered(name: str, number: int) -> str:
    """The name of the next card: of xrt:0 it is xrt:1; a twin has no number."""
    family, _, first = name.partition(":")
    return f"{family}:{int(first) + number}" if first.isdigit() else name


def _card_alone(card, store: KvStore, q, scale: float) -> float:
    """bytes/s of a card whose pages are there: runs only, of one head at a time."""
    attention = PageAttention(card, store, ahead=False, segments=1)
    pages = min(attention.job_pages, store.n_pages(0, 0))
    only = q.repeat(store.n_kv_heads, axis=1)
    for _ in range(2):
        attention.attend(0, [0], only, scale, [pages])
    attention.close()
    return attention.figures.kv_bytes / attention.figures.run_s


def _flexgen_rate(peer: FlexGen, q, kind: str, torch_threads: int, copy_threads: int,
                  sequential: bool) -> float:  # fmt: skip
    """bytes/s of one step of the peer, nothing of its files being in memory."""
    import torch

    query = torch.from_numpy(q).to(getattr(torch, kind))
    torch.set_num_threads(torch_threads)
    peer.forget()
    begin = time.perf_counter()
    peer.step(query, copy_threads, getattr(torch, kind), sequential)
    return peer.kv_bytes / (time.perf_counter() - begin)


def _memory_rate(resident: np.ndarray, q, kind: str, torch_threads: int) -> float:
    """bytes/s of torch's attention to K and V that are in memory in its own type."""
    import torch

    dtype = getattr(torch, kind)
    query = torch.from_numpy(q).to(dtype)[None]
    keys, values = (torch.from_numpy(x).to(dtype).transpose(0, 1)[None] for x in resident)
    torch.set_num_threads(torch_threads)
    begin = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    return resident.nbytes / (time.perf_counter() - begin)


_KINDS = ("float32", "bfloat16", "float16")


def _choices() -> list[dict]:
    threads = sorted({1, len(os.sched_getaffinity(0))})
    return [{"kind": kind, "torch_threads": n} for kind, n in itertools.product(_KINDS, threads)]


def _tune(peer: FlexGen, q) -> dict:
    """The fastest way to run the peer on this machine: how torch computes, then how it copies."""
    own = {"copy_threads": 4, "sequential": False}  # FlexGen's
    first = max((choice | own for choice in _choices()), key=lambda c: _flexgen_rate(peer, q, **c))
    copies = itertools.product((1, 4, 8), (False, True))
    ways = [first | {"copy_threads": n, "sequential": advice} for n, advice in copies]
    return max(ways, key=lambda choice: _flexgen_rate(peer, q, **choice))


def _tune_memory(resident: np.ndarray, q) -> dict:
    return max(_choices(), key=lambda c: max(_memory_rate(resident, q, **c) for _ in range(2)))


def _measure_model(args, directory: Path) -> dict | None:
    """What `nearkv bench step` says of the demo model behind a context; None if it is not there."""
    try:
        return step.measure(directory, args.model_context, card=args.card, rounds=4, n_new=16)
    except ModuleNotFoundError:
        return None


def _print(figures: dict, rows: list[dict]) -> None:
    print(f"{figures['kv_bytes'] / 2**20:.0f} MiB of K and V for a token, cards with "
          f"{figures['card_kv_bytes'] >> 20} MiB, {figures['depth']} reads at once")  # fmt: skip
    ours = next(row["rate"] for row in rows if row["name"] == "nearkv")
    for row in rows:
        share = ""
        if "card_runs" in row:
            share = (f"  waits for the drive {row['waits_for_drive']:.0%}, "
                     f"card runs {row['card_runs']:.0%}")  # fmt: skip
        print(f"{row['name']:>16} {row['rate'] / 1e9:6.2f} GB/s  {ours / row['rate']:5.2f}x{share}")
    for name, (low, median, high) in figures["of_bound"].items():
        print(f"of min({name}; twin): {median:.1%} (goal 90%; quartiles {low:.0%} .. {high:.0%})")
    if "device" in figures:
        _print_device(**figures["device"])
    if figures["of_flexgen"]:
        low, median, high = figures["of_flexgen"]
        print(f"of FlexGen's path: {median:.2f}x (goal 4x at 32 k tokens; quartiles {low:.2f} .. "
              f"{high:.2f}); the drive is {figures['drive_of_flexgen'][1]:.2f}x as fast as that path, "
              f"which is tuned to {figures['flexgen_tuned']}")  # fmt: skip
    if figures.get("model"):
        for line in step.describe(figures["model"]):
            print(line)


def _print_device(of_plain_twin, host_s_a_run, thread_s_a_run, run_bytes) -> None:
    low, median, high = of_plain_twin
    print(f"of a plain twin: {median:.1%} (goal 90%; quartiles {low:.0%} .. {high:.0%})")
    for what, seconds in (
        ("the whole process, reads included", host_s_a_run),
        ("the thread that attends", thread_s_a_run),
    ):
        if seconds is not None:
            print(
                f"host: {seconds * 1e6:.0f} us of processor time a run of {run_bytes / 2**20:.1f} MiB, "
                f"{what}: enough for {run_bytes / SMARTSSD_RATE / seconds:.1f} drives of "
                f"{SMARTSSD_RATE / 1e9:g} GB/s on a core"
            )


def _plot(args, rows: list[dict], here: dict) -> None:
    rates = {row["name"]: row["rate"] for row in rows}
    names = [name for name in rates if not name.startswith("drive") and name != "twin"]
    plot_bars(
        args.plot,
        f"Attending to {args.context:,} tokens of KV on the drive",
        names,
        {"KV bytes read and attended to": [rates[name] / 1e9 for name in names]},
        unit="GB/s",
        limit=("the least of drive and card", min(rates["drive"], rates["twin"]) / 1e9),
        note=f"{here['cores']} cores, load {here['load']:.1f}; {args.layers} layers, {args.kv_heads} KV "
        f"heads of {args.head_dim}, {args.group} query heads each; drive {rates['drive'] / 1e9:.2f}, "
        f"card {args.card} {rates['twin'] / 1e9:.2f} GB/s",
    )
