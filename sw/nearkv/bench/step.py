# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench step`: a decode step of the demo model, and what the host itself does in it.

Decodes token after token behind a context of random K and V, in turns with nearkv's cache, whose pages are on
the drive, and with transformers' own, which is in memory. Turns come in random order and their tokens/s are
compared round by round, so that whatever else the machine does hits both. Of nearkv's step it tells, for
each layer:

    attention   from `cache.update` to the attention's output, all included
    drive       of it, waiting for pages
    card        of it, the card's run
    host        the rest: the host's own time

and what attention takes with transformers' cache, the same from `update` to the output. A figure is the median
of all rounds; of the host's own time the quartiles are told as well.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

from .. import extras
from ..arguments import existing_directory, whole
from ..attention import Figures
from . import in_turns, quartiles_of_ratio, to_json
from .flash import arguments, where

HOST_GOAL_MS = 0.5
RATIO_GOALS = {500: 0.85, 4000: 1.1}  # by context


def add_arguments(parser) -> None:
    add = parser.add_argument
    add(
        "--directory",
        type=existing_directory,
        help="on the drive to use (default: temporary files')",
    )
    add(
        "--context", type=whole(), action="append",
        help="tokens; may be given more than once (default: 500 and 4000)",
    )  # fmt: skip
    add("--tokens", type=whole(), default=6, help="of a turn (default: %(default)s)")
    add("--rounds", type=whole(), default=15, help="turns of each (default: %(default)s)")
    add("--card", default="twin", help="default: %(default)s")
    add("--json", action="store_true", help="figures as JSON")


def run(args) -> int:
    extras.require("nearkv bench step", "torch", "transformers")
    directory = Path(args.directory or tempfile.gettempdir())
    contexts = args.context or list(RATIO_GOALS)
    rows = [
        measure(directory, context, card=args.card, rounds=args.rounds, n_new=args.tokens)
        for context in contexts
    ]
    if args.json:
        head = {"arguments": arguments(args), "machine": where(directory)}
        print(to_json("nearkv bench step --json", head, rows))
        return 0
    for row in rows:
        for line in describe(row):
            print(line)
    return 0


def measure(directory: Path, context: int, *, card: str, rounds: int, n_new: int) -> dict[str, Any]:
    """Figures of the demo model behind a context; all times in ms.

    Raises
    ------
    ModuleNotFoundError
        If the demo model is not installed; the message gives the command.
    """
    import torch
    from transformers import DynamicCache

    from ..hf import models
    from ..hf.cache import NearStorageCache

    model, _ = models.load()
    config = model.config
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    n_layers = config.num_hidden_layers
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, context, head_dim)
    generator = torch.Generator().manual_seed(0)
    # What the values are makes no difference to the time.
    k, v = (torch.randn(shape, generator=generator) for _ in "kv")
    own = DynamicCache(config=config)
    for layer in range(n_layers):
        own.update(k, v, layer)
    parts: dict[str, list[float]] = {
        name: [] for name in ("attention", "drive", "card", "host", "attention, own")
    }

    with NearStorageCache(config, directory, card) as near, torch.no_grad():
        near.fill([(k, v)] * n_layers)
        near.store.flush()

        def turn(cache, name) -> tuple[float, float]:
            """tokens/s, and ms of attention for a layer and step."""
            model.set_attn_implementation(name)
            ids = torch.zeros(1, 1, dtype=torch.long)
            with _clocked(name, cache) as clock:
                begin = time.perf_counter()
                for _ in range(n_new):
                    ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                seconds = time.perf_counter() - begin
            return n_new / seconds, clock() / (n_new * n_layers) * 1e3

        def nearkv() -> float:
            before = Figures(**vars(near.figures))
            rate, attention = turn(near, "nearkv")
            drive, run = (
                (getattr(near.figures, name) - getattr(before, name)) / (n_new * n_layers) * 1e3
                for name in ("load_s", "run_s")
            )
            values = (attention, drive, run, attention - drive - run)
            for name, value in zip(parts, values, strict=False):
                parts[name].append(value)
            return rate

        def transformers() -> float:
            rate, attention = turn(own, "sdpa")
            parts["attention, own"].append(attention)
            return rate

        rates = in_turns({"nearkv": nearkv, "transformers": transformers}, rounds)
    parts = {name: values[-rounds:] for name, values in parts.items()}  # without the first round
    host = parts["host"]
    return {
        "name": Path(config.name_or_path).name,
        "context": context,
        "kv_bytes": 2 * 2 * n_layers * context * config.num_key_value_heads * head_dim,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "of_transformers": quartiles_of_ratio(rates["nearkv"], rates["transformers"]),
        "ratio_goal": RATIO_GOALS.get(context),
        "ms_a_layer": {name: statistics.median(values) for name, values in parts.items()},
        "host_ms_a_layer": quartiles_of_ratio(host, [1.0] * len(host)),
        "host_goal_ms": HOST_GOAL_MS,
        "tokens_per_s_by_round": rates,
    }


def describe(row: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    low, ratio, high = row["of_transformers"]
    goal = "" if row["ratio_goal"] is None else f"goal {row['ratio_goal']}x; "
    ours, own = (row["tokens_per_s"][name] for name in ("nearkv", "transformers"))
    yield (
        f"{row['name']} behind {row['context']} tokens ({row['kv_bytes'] / 2**20:.0f} MiB of KV): "
        f"{ours:.1f} tokens/s with KV on the drive, {own:.1f} with transformers' cache in memory: "
        f"{ratio:.2f}x ({goal}quartiles {low:.2f} .. {high:.2f})"
    )
    ms = row["ms_a_layer"]
    low, _, high = row["host_ms_a_layer"]
    yield (
        f"  attention of a layer {ms['attention']:.2f} ms: waits for the drive {ms['drive']:.2f}, the "
        f"card runs {ms['card']:.2f}, the host itself {ms['host']:.2f} (goal {row['host_goal_ms']}; "
        f"quartiles {low:.2f} .. {high:.2f}); with transformers' cache {ms['attention, own']:.2f} ms"
    )


@contextlib.contextmanager
def _clocked(name: str, cache) -> Iterator[Callable[[], float]]:
    """Adds up the seconds that a cache's updates and the attention of this name take."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seconds = 0.0

    def clocked(function):
        def call(*args, **kwargs):
            nonlocal seconds
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds += time.perf_counter() - begin
            return result

        return call

    # Both are places where transformers lets one put something else, for one object only.
    ALL_ATTENTION_FUNCTIONS[name] = clocked(ALL_ATTENTION_FUNCTIONS[name])
    cache.update = clocked(cache.update)
    try:
        yield lambda: seconds
    finally:
        del ALL_ATTENTION_FUNCTIONS[name], cache.update
