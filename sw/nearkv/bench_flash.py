# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench flash`: pages from the drive into card memory, beside a plain reader.

Writes page files, then reads them in turns: through the path that decoding uses (the store's runs of
pages, requests of up to 1 MiB, a ring of segments in kv memory), and with the simplest program there
is, threads that read the same bytes of the same files in order with O_DIRECT, as many at once and as
large. It reads into one buffer for each request, which stay in the processor's caches, and then also
over as much memory as the cards' ring has: a virtual drive, whose data a processor copies, is faster the
first way; the second is what ours is compared with. Turns alternate, so that whatever else the drive
does hits all alike.
"""

from collections import deque
import itertools
import json
import os
from pathlib import Path
import platform
import statistics
import sys
import tempfile
import threading
import time

import numpy as np

from nearkv_hw.abi import PageLayout

from .attention import RING_BYTES, SEGMENTS
from .bench import machine, plot_bars
from .buffers import KvMemory
from .flash import READ_BYTES, PageId, Read, Reader, open_reader
from .store import KvStore
from .uring import refusal


def where(directory: Path) -> dict:
    """What a figure of a drive depends on."""
    about = os.statvfs(directory)
    return machine() | {
        "kernel": platform.release(),
        "file_system_bytes_free": about.f_bavail * about.f_frsize,
    }


def arguments(args) -> dict:
    """Those that a figure depends on."""
    no_matter = ("directory", "json", "plot")
    return {key: value for key, value in vars(args).items() if value and key not in no_matter}


def fill(store: KvStore, n_sequences: int, n_layers: int, n_tokens: int) -> None:
    """Store random K and V, the same 1 Ki tokens over and over."""
    rng = np.random.default_rng(0)
    page_tokens = store.layout.page_tokens
    step = max(1, 1024 // page_tokens) * page_tokens
    shape = (store.n_kv_heads, step, store.layout.head_dim)
    k, v = rng.standard_normal((2, *shape), np.float32).astype(np.float16).view(np.uint16)
    for sequence in range(n_sequences):
        for layer in range(n_layers):
            repeats = -(-n_tokens // step)
            store.append(
                sequence, layer, *(np.tile(x, (1, repeats, 1))[:, :n_tokens] for x in (k, v))
            )
    store.flush()


def read_raw(paths: list[Path], depth: int, over_bytes: int = 0, nbytes: int = READ_BYTES) -> float:
    """Seconds that threads need to read files in order, past the page cache.

    Into one buffer each, again and again; or going round in `over_bytes` of memory.
    """
    requests = [(path, at) for path in paths for at in range(0, os.path.getsize(path), nbytes)]
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
    each = max(1, over_bytes // (depth * nbytes))
    # Huge pages, as the cards have: they are worth 30%. Smaller mappings do not get them.
    memory = KvMemory(max(depth * each, 16) * nbytes)
    buffers = [memory.target(at, nbytes) for at in range(0, depth * each * nbytes, nbytes)]
    coming, lock = iter(requests), threading.Lock()

    def work(mine):
        for buffer in itertools.cycle(mine):
            with lock:
                path, at = next(coming, (None, 0))
            if path is None:
                return
            os.preadv(files[path], [buffer], at)

    threads = [threading.Thread(target=work, args=(buffers[i::depth],)) for i in range(depth)]
    for buffer in buffers:
        buffer[:] = bytes(nbytes)
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    for fd in files.values():
        os.close(fd)
    return seconds


def ring_reads(store: KvStore, kv_bytes: int, segments: int = SEGMENTS) -> list[list[Read]]:
    """The reads of every page, by segment of a ring in turn, as `PageAttention` asks for them."""
    page_bytes = store.layout.page_bytes
    pages = kv_bytes // segments // page_bytes
    spans = [
        (sequence, layer, head)
        for sequence in store.sequences()
        for layer in store.layers(sequence)
        for head in range(store.n_kv_heads)
    ]
    batches = []
    for sequence, layer, head in spans:
        count = store.n_pages(sequence, layer)
        for first in range(0, count, pages):
            at = len(batches) % segments * pages * page_bytes
            numbers = np.arange(first, min(first + pages, count))
            batches.append(store.reads(PageId(layer, sequence, head, 0), numbers, at))
    return batches


def read_pages(batches: list[list[Read]], reader: Reader, segments: int = SEGMENTS) -> int:
    """Read them, a segment again as soon as what was in it has arrived; the bytes."""
    loads = deque()
    for reads in batches:
        if len(loads) == segments:
            loads.popleft().wait(60)
        loads.append(reader.start(reads))
    for load in loads:
        load.wait(60)
    return sum(read.nbytes for reads in batches for read in reads)


def add_arguments(parser) -> None:
    parser.add_argument("--directory", help="on the drive to measure (default: temporary files')")
    parser.add_argument("--mib", type=int, default=1024, help="to read (default: %(default)s)")
    parser.add_argument(
        "--depth", type=int, action="append",
        help="requests at once (default: 4, 8, 16)",
    )  # fmt: skip
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=32768, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--ring-mib",
        type=int,
        default=RING_BYTES >> 20,
        help="kv memory (default: %(default)s MiB)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw them: .png, .svg or .html")


def run(args) -> int:
    layout = PageLayout(args.head_dim)
    directory = Path(args.directory or tempfile.gettempdir())
    kinds = ["threads"] if refusal() else ["uring", "threads"]
    rows = []
    with KvStore(directory, layout, 8, temporary=True) as store:
        per_layer = 8 * args.context * 4 * args.head_dim
        fill(store, 1, max(1, (args.mib << 20) // per_layer), args.context)
        paths = sorted(store.directory.glob("*.kv"))
        nbytes = sum(os.path.getsize(path) for path in paths)
        memory = KvMemory(args.ring_mib << 20)
        batches = ring_reads(store, memory.nbytes)
        for depth in args.depth or (4, 8, 16):
            row = _measure(batches, paths, nbytes, memory, depth, kinds, args.rounds)
            rows.append(row)
            if not args.json:
                _print(row)
    here = where(directory)
    row_names = (*kinds, "raw, same memory", "raw")
    if args.json:
        figures = {"command": "nearkv bench flash --json", "arguments": arguments(args)}
        figures |= {"machine": here, "bytes": nbytes, "runs": rows}
        json.dump(figures, sys.stdout, indent=1)
        print()
    if args.plot:
        plot_bars(
            args.plot,
            "Pages from the drive into card memory",
            [f"{row['depth']} requests at once" for row in rows],
            {name: [row["rates"][name] / 1e9 for row in rows] for name in row_names},
            unit="GB/s",
            note=f"{here['cores']} cores, load {here['load']:.1f}, Linux {here['kernel']}. raw: threads "
            "that read the same bytes, and nothing else",
        )
    return 0


def _measure(batches, paths, nbytes: int, memory: KvMemory, depth: int, kinds, rounds: int) -> dict:
    """bytes/s of the plain reader and of each kind of ours."""
    rates: dict[str, list[float]] = {name: [] for name in ("raw", "raw, same memory", *kinds)}
    readers = {kind: open_reader(memory, depth, kind) for kind in kinds}
    for round in range(rounds + 1):
        seconds = {
            "raw": read_raw(paths, depth),
            "raw, same memory": read_raw(paths, depth, memory.nbytes),
        }
        for kind, reader in readers.items():
            begin = time.perf_counter()
            read_pages(batches, reader)
            seconds[kind] = time.perf_counter() - begin
        if round:  # the first warms up
            for name, taken in seconds.items():
                rates[name].append(nbytes / taken)
    for reader in readers.values():
        reader.close()
    of_raw = {
        kind: [ours / raw for ours, raw in zip(rates[kind], rates["raw, same memory"], strict=True)]
        for kind in kinds
    }
    return {
        "depth": depth,
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        # Of the turns' ratios: what disturbs one turn disturbs its neighbour.
        "of_raw": {kind: statistics.median(values) for kind, values in of_raw.items()},
        "of_raw_quartiles": {
            kind: statistics.quantiles(values, n=4)[::2] for kind, values in of_raw.items()
        },
    }


def _print(row: dict) -> None:
    line = (
        f"depth {row['depth']:2}: raw {row['rates']['raw'] / 1e9:.2f} GB/s, over the same memory "
    )
    line += f"{row['rates']['raw, same memory'] / 1e9:.2f} GB/s"
    for kind, ratio in row["of_raw"].items():
        low, high = row["of_raw_quartiles"][kind]
        line += (
            f"; {kind} {row['rates'][kind] / 1e9:.2f} GB/s: {ratio:.1%} "
            f"(quartiles {low:.0%} .. {high:.0%})"
        )
    print(f"{line}; goal 95%", flush=True)
