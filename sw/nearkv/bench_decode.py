# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench decode`: attention of a decode step with K and V on the drive.

Fills a drive with the K and V of a batch at one context length and attends to all of it, layer after
layer, as decoding one token does; nothing else of a model is computed. Rates are bytes of 16-bit K and
V over seconds. What each is held against, in the same run and in turns:

    drive       threads that read the same page files in order, O_DIRECT, same depth and size
    twin        the card alone, pages in its memory already
    no ahead, no ring   nearkv without fetching the next layer's pages early; loading, then computing
    FlexGen     its disk path: K and V of a layer as token-major memory-mapped files; threads copy a
                layer into host buffers, through the page cache, while torch attends to the one before.
                Its copy threads, the type torch computes in and torch's threads are tuned first. The
                page cache is emptied of the files before each step, as a context larger than memory does
    memory      torch's attention with K and V in host memory, as transformers' own cache has it
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import itertools
import json
import mmap
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

import numpy as np

from nearkv_hw.abi import PageLayout

from .attention import RING_BYTES, SEGMENTS, PageAttention
from .bench_flash import fill, machine, read_raw
from .card import KV_BYTES, open_cards
from .flash import READS_IN_FLIGHT
from .store import KvStore


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
    """torch's attention over token-major K and V: (tokens, sequences * kv heads, head_dim)."""
    import torch

    keys, values = (torch.from_numpy(x).to(kind).transpose(0, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values)


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--directory", help="on the drive to measure (default: temporary files')")
    add("--context", type=int, default=32768, help="tokens (default: %(default)s)")
    add("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    add("--layers", type=int, default=6, help="default: %(default)s")
    add("--kv-heads", type=int, default=8, help="default: %(default)s")
    add("--head-dim", type=int, default=128, help="default: %(default)s")
    add("--group", type=int, default=4, help="query heads of a kv head (default: %(default)s)")
    add("--page-tokens", type=int, default=128, help="default: %(default)s")
    add("--card", default="twin", help="default: %(default)s")
    add("--cards", type=int, default=1, help="how many (default: %(default)s)")
    add("--kv-mib", type=int, default=KV_BYTES >> 20, help="kv memory of a card (default: 64)")
    add("--ring-mib", type=int, default=RING_BYTES >> 20, help="of it used (default: %(default)s)")
    add("--segments", type=int, default=SEGMENTS, help="of the ring (default: %(default)s)")
    add("--depth", type=int, default=READS_IN_FLIGHT, help="reads at once (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    add("--no-peers", action="store_true", help="leave FlexGen and memory out")
    add("--json", action="store_true", help="figures as JSON")


def run(args) -> int:
    layout = PageLayout(args.head_dim, args.page_tokens)
    directory = Path(args.directory or tempfile.gettempdir())
    cards, _ = open_cards(
        [args.card] * args.cards, kv_bytes=args.kv_mib << 20, reads_in_flight=args.depth
    )
    rng = np.random.default_rng(1)
    q = rng.standard_normal((args.batch, args.kv_heads, args.group, args.head_dim))
    with (
        tempfile.TemporaryDirectory(prefix="nearkv-bench-", dir=directory) as temporary,
        KvStore(temporary, layout, args.kv_heads, temporary=True, n_shards=args.cards) as store,
    ):
        fill(store, args.batch, args.layers, args.context)
        figures = _measure(args, cards, store, q, Path(temporary))
        figures["machine"] = machine(directory)
    for card in cards:
        card.close()
    if args.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        _print(figures)
    return 0


def _measure(args, cards, store: KvStore, q, temporary: Path) -> dict:
    scale = args.head_dim**-0.5
    shape = (args.batch, args.kv_heads, args.head_dim)
    kv_bytes = 4 * args.layers * args.context * args.batch * args.kv_heads * args.head_dim
    ways = {
        "nearkv": PageAttention(
            cards, store, segments=args.segments, ring_bytes=args.ring_mib << 20
        ),
        "no ahead": PageAttention(
            cards, store, ahead=False, segments=args.segments, ring_bytes=args.ring_mib << 20
        ),
        "no ring": PageAttention(
            cards, store, ahead=False, segments=1,
            ring_bytes=(args.ring_mib << 20) // args.segments,
        ),
    }  # fmt: skip

    def step(attention):
        for layer in range(args.layers):
            attention.attend(layer, range(args.batch), q, scale)

    paths = sorted(store.directory.glob("*.kv"))
    file_bytes = sum(os.path.getsize(path) for path in paths)
    turns: dict[str, Callable[[], float]] = {
        "drive": lambda: file_bytes / read_raw(paths, args.depth * args.cards),
        "twin": lambda: _card_alone(cards[0], store, q[:1, :1], scale) * args.cards,
    }
    counters = {name: [] for name in ways}

    def timed(name, attention):
        before = dict(vars(attention.figures))
        begin = time.perf_counter()
        step(attention)
        seconds = time.perf_counter() - begin
        after = vars(attention.figures)
        counters[name].append(
            {what: (after[what] - before[what]) / seconds for what in ("load_s", "run_s")}
        )
        return kv_bytes / seconds

    for name, attention in ways.items():
        turns[name] = lambda name=name, attention=attention: timed(name, attention)
    tuned = None
    if not args.no_peers:
        import torch

        peer = FlexGen(temporary, args.layers, args.context, shape)
        grouped = q.reshape(-1, args.group, args.head_dim)
        tuned = _tune(peer, grouped)
        kind, copy_threads = getattr(torch, tuned["kind"]), tuned["copy_threads"]
        torch_threads = tuned["torch_threads"]
        query = torch.from_numpy(grouped).to(kind)
        resident = torch.randn(2, *peer.shape).half().numpy()

        def flexgen():
            peer.forget()
            torch.set_num_threads(torch_threads)
            begin = time.perf_counter()
            peer.step(query, copy_threads, kind, tuned["sequential"])
            return peer.kv_bytes / (time.perf_counter() - begin)

        def memory():
            keys, values = (torch.from_numpy(x).to(kind).transpose(0, 1) for x in resident)
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            begin = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(query, keys, values)
            return resident.nbytes / (time.perf_counter() - begin)

        turns |= {"FlexGen": flexgen, "memory": memory}
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for round in range(args.rounds + 1):
        for name, turn in turns.items():
            rate = turn()
            if round:  # the first warms up
                rates[name].append(rate)
    for attention in ways.values():
        attention.close()
    median = {name: statistics.median(values) for name, values in rates.items()}
    bounds = [min(a, b) for a, b in zip(rates["drive"], rates["twin"], strict=True)]
    return {
        "kv_bytes": kv_bytes,
        "card_kv_bytes": args.kv_mib << 20,
        "arguments": {key: value for key, value in vars(args).items() if value is not None},
        "rates": median,
        "rates_by_round": rates,
        "of_bound": median["nearkv"] / min(median["drive"], median["twin"]),
        "of_bound_by_round": [
            rate / bound for rate, bound in zip(rates["nearkv"], bounds, strict=True)
        ],
        "of_flexgen": median["nearkv"] / median["FlexGen"] if tuned else None,
        "flexgen_tuned": tuned,
        "shares_of_time": {
            name: {
                what: statistics.median(row[what] for row in rows[1:])
                for what in ("load_s", "run_s")
            }
            for name, rows in counters.items()
        },
        "write_amplification": store.write_amplification,
    }


def _card_alone(card, store: KvStore, q, scale: float) -> float:
    """bytes/s of a card whose pages are there: runs only, of one head at a time."""
    attention = PageAttention(card, store, ahead=False, segments=1)
    pages = min(attention.span_pages, store.n_pages(0, 0))
    only = q.repeat(store.n_kv_heads, axis=1)
    for _ in range(2):
        attention.attend(0, [0], only, scale, [pages])
    attention.close()
    return attention.figures.kv_bytes / attention.figures.run_s


def _tune(peer: FlexGen, q) -> dict:
    """The fastest way to run the peer on this machine."""
    import torch

    best, found = 0.0, {}
    cores = len(os.sched_getaffinity(0))
    choices = itertools.product(
        ("float32", "bfloat16"), (1, 4, 8), sorted({1, cores}), (False, True)
    )  # 4 copy threads and no advice are FlexGen's own
    for kind, copy_threads, torch_threads, sequential in choices:
        query = torch.from_numpy(q).to(getattr(torch, kind))
        torch.set_num_threads(torch_threads)
        peer.forget()
        begin = time.perf_counter()
        peer.step(query, copy_threads, getattr(torch, kind), sequential)
        rate = peer.kv_bytes / (time.perf_counter() - begin)
        if rate > best:
            best = rate
            found = {
                "kind": kind, "copy_threads": copy_threads, "torch_threads": torch_threads,
                "sequential": sequential,
            }  # fmt: skip
    return found


def _print(figures: dict) -> None:
    rates = figures["rates"]
    print(f"{figures['kv_bytes'] / 2**20:.0f} MiB of K and V for a token, cards with "
          f"{figures['card_kv_bytes'] >> 20} MiB")  # fmt: skip
    for name, rate in rates.items():
        shares = figures["shares_of_time"].get(name)
        share = ""
        if shares:
            share = f"  waits for the drive {shares['load_s']:.0%}, card runs {shares['run_s']:.0%}"
        print(f"{name:>10} {rate / 1e9:6.2f} GB/s  {rates['nearkv'] / rate:5.2f}x{share}")
    by_round = figures["of_bound_by_round"]
    print(f"of min(drive, twin): {figures['of_bound']:.1%} (goal 90%; rounds "
          f"{min(by_round):.0%} .. {max(by_round):.0%})")  # fmt: skip
    if figures["of_flexgen"]:
        print(f"of FlexGen's path: {figures['of_flexgen']:.2f}x (goal 4x at 32 k tokens); tuned to "
              f"{figures['flexgen_tuned']}")  # fmt: skip
