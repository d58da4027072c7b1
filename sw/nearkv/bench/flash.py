# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench flash`: pages from the drive into card memory, beside a plain reader.

Writes page files, then reads them in turns: through the path that decoding uses (the store's runs of
pages, requests of up to 1 MiB, a ring of segments in kv memory), and with the simplest program there
is, threads that read the same bytes of the same files in order with O_DIRECT, as many at once and as
large. It reads into as much memory as the cards' ring has (raw), and also into one buffer for each
request (raw, small), which stay in the processor's caches: that is faster where a processor copies the
data, as for a virtual drive, and no different where the drive does. Turns come in random order, so that
whatever else the drive does hits all alike.
"""

from collections import deque
from collections.abc import Callable
import functools
import itertools
import os
from pathlib import Path
import platform
import statistics
import tempfile
import threading
import time

import numpy as np

from nearkv_hw.abi import PageLayout

from ..arguments import existing_directory, whole
from ..attention import RING_BYTES, SEGMENTS
from ..io import READ_BYTES, KvMemory, PageId, Read, Reader, open_reader
from ..io.uring import refusal
from ..store import KvStore
from . import check_context, check_plot, in_turns, machine, plot_bars, quartiles_of_ratio, to_json


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
    parser.add_argument(
        "--directory",
        type=existing_directory,
        help="on the drive to measure (default: temporary files')",
    )
    parser.add_argument("--mib", type=whole(), default=768, help="to read (default: %(default)s)")
    parser.add_argument(
        "--depth", type=whole(), action="append",
        help="requests at once (default: 8, 16, 32)",
    )  # fmt: skip
    parser.add_argument("--head-dim", type=whole(), default=128, help="default: %(default)s")
    parser.add_argument(
        "--context", type=whole(), default=32768, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--ring-mib",
        type=whole(),
        default=RING_BYTES >> 20,
        help="kv memory (default: %(default)s MiB)",
    )
    parser.add_argument("--rounds", type=whole(), default=25, help="turns of each (default: 25)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw them: .png, .svg or .html")


def run(args) -> int:
    if args.plot:
        check_plot(args.plot)
    layout = PageLayout(args.head_dim)
    check_context(args.context, layout.page_tokens)
    directory = Path(args.directory or tempfile.gettempdir())
    kinds = ["threads"] if refusal() else ["uring", "threads"]
    rows = []
    with KvStore(directory, layout, 8, temporary=True) as store:
        per_layer = 8 * args.context * 4 * args.head_dim
        fill(store, 1, max(1, (args.mib << 20) // per_layer), args.context)
        paths = store.page_files()
        nbytes = sum(os.path.getsize(path) for path in paths)
        memory = KvMemory(args.ring_mib << 20)
        batches = ring_reads(store, memory.nbytes)
        for depth in args.depth or (8, 16, 32):
            row = _measure(batches, paths, nbytes, memory, depth, kinds, args.rounds)
            rows.append(row)
            if not args.json:
                _print(row)
    here = where(directory)
    if args.json:
        head = {"arguments": arguments(args), "machine": here, "bytes": nbytes}
        print(to_json("nearkv bench flash --json", head, rows))
    if args.plot:
        plot_bars(
            args.plot,
            "Pages from the drive into card memory",
            [f"{row['depth']} requests at once" for row in rows],
            {name: [row["rates"][name] / 1e9 for row in rows] for name in (*kinds, *_RAW)},
            unit="GB/s",
            note=f"{here['cores']} cores, load {here['load']:.1f}, Linux {here['kernel']}. raw: threads "
            "that read the same bytes, and nothing else",
        )
    return 0


_RAW = ("raw", "raw, small")


def _measure(batches, paths, nbytes: int, memory: KvMemory, depth: int, kinds, rounds: int) -> dict:
    """bytes/s of the plain reader and of each kind of ours."""
    readers = {kind: open_reader(memory, depth, kind) for kind in kinds}

    def ours(reader):
        begin = time.perf_counter()
        read_pages(batches, reader)
        return time.perf_counter() - begin

    turns: dict[str, Callable[[], float]] = {
        "raw": lambda: read_raw(paths, depth, memory.nbytes),
        "raw, small": lambda: read_raw(paths, depth),
    }
    turns |= {kind: functools.partial(ours, reader) for kind, reader in readers.items()}
    rates = in_turns(
        {name: lambda turn=turn: nbytes / turn() for name, turn in turns.items()}, rounds
    )
    for reader in readers.values():
        reader.close()
    return {
        "depth": depth,
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "of_raw": {kind: quartiles_of_ratio(rates[kind], rates["raw"]) for kind in kinds},
        "of_raw_small": {
            kind: quartiles_of_ratio(rates[kind], rates["raw, small"]) for kind in kinds
        },
    }


def _print(row: dict) -> None:
    rates = row["rates"]
    line = f"depth {row['depth']:2}: raw {rates['raw'] / 1e9:.2f} GB/s, "
    line += f"into small buffers {rates['raw, small'] / 1e9:.2f}"
    for kind, (low, median, high) in row["of_raw"].items():
        line += f"; {kind} {rates[kind] / 1e9:.2f}: {median:.1%} of raw (quartiles {low:.0%} .. {high:.0%}), "
        line += f"{row['of_raw_small'][kind][1]:.1%} of small"
    print(f"{line}; goal 95%", flush=True)
