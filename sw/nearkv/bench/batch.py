# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench batch`: many prompts by the engine of `nearkv batch`, beside padded batches in memory.

Short prompts first: passages of Python's own manual with a request, answered greedily by the demo model. In turns,
the engine of `nearkv batch` with KV on the drive, and transformers' `generate` with its own cache in memory, on
batches of as many prompts, the shortest first, padded on the left. Their tokens/s are compared round by round, and
so are the tokens for a second of processor time, which tell more on a machine that is busy with other things; and
the texts with each other, of which some may differ: what is stored is rounded to 16 bits, what is in memory is not.

Then more KV than there is memory: a model with random weights and large heads, in a process that may have only
so much data (RLIMIT_DATA), each of both ways.
"""

from collections.abc import Iterator, Sequence
import json
import os
from pathlib import Path
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from .. import extras
from ..arguments import existing_directory, size, whole
from . import quartiles_of_ratio, to_json
from .flash import arguments, where

RATIO_GOAL = 0.9
_SHORTEST, _LONGEST = 20, 120  # words of a passage
# Of the second part: 64 KiB of K and V a token in fp32, and little to compute.
_LARGE = {
    "hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 1000, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def add_arguments(parser) -> None:
    add = parser.add_argument
    add(
        "--directory",
        type=existing_directory,
        help="on the drive to use (default: temporary files')",
    )
    add("--prompts", type=whole(), default=200, help="default: %(default)s")
    add("--tokens", type=whole(), default=32, help="of an answer (default: %(default)s)")
    add("--batch-size", type=whole(), default=32, help="default: %(default)s")
    add("--rounds", type=whole(), default=3, help="turns of each (default: %(default)s)")
    add("--card", default="twin", help="default: %(default)s")
    add("--memory", type=size, default=2 << 30, help="limit of the second part (default: 2G)")
    add(
        "--long", type=whole(0), default=64, metavar="N",
        help="prompts of 1,024 tokens in the second part; 0: without it (default: %(default)s)",
    )  # fmt: skip
    add("--json", action="store_true", help="figures as JSON")


def run(args) -> int:
    extras.require("nearkv bench batch", "torch", "transformers")
    directory = Path(args.directory or tempfile.gettempdir())
    rows = [measure(directory, args)]
    if args.long:
        rows.append(measure_memory(directory, args))
    if args.json:
        head = {"arguments": arguments(args), "machine": where(directory)}
        print(to_json("nearkv bench batch --json", head, rows))
        return 0
    for line in (*describe(rows[0]), *(describe_memory(rows[1]) if args.long else ())):
        print(line)
    return 0


def _requests(n: int, n_tokens: int) -> list:
    """Requests about passages of Python's manual."""
    from pydoc_data.topics import topics

    from ..batch.requests import read_batch

    names, rng = sorted(topics), random.Random(0)
    lines = []
    for number in range(n):
        words = topics[names[number % len(names)]].split()
        n_words = min(rng.randrange(_SHORTEST, _LONGEST), len(words))
        start = rng.randrange(len(words) - n_words + 1)
        text = " ".join(words[start : start + n_words]) + "\n\nExplain this in simple words."
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": n_tokens,
            "temperature": 0,
        }
        line = {"custom_id": str(number), "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line))
    return read_batch("\n".join(lines).encode())


def measure(directory: Path, args) -> dict[str, Any]:
    """Figures of the first part.

    Raises
    ------
    ModuleNotFoundError
        If the demo model is not installed; the message gives the command.
    """
    import numpy as np
    import torch

    from ..batch.engine import Engine, Job
    from ..batch.memory import CHUNK_TOKENS
    from ..hf import models
    from ..hf.cache import NearStorageCache

    model, tokenizer = models.load()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model.generation_config.max_length = None
    requests = _requests(args.prompts, args.tokens)
    prompts = [
        tokenizer.apply_chat_template(one.prompt, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for one in requests
    ]
    said: dict[str, dict[str, str]] = {}
    figures: dict[str, Any] = {}

    def nearkv(n: int) -> int:
        model.set_attn_implementation("nearkv")
        jobs = [
            Job(request, np.array(tokens, np.int32), args.tokens)
            for request, tokens in zip(requests[:n], prompts, strict=False)
        ]
        said["nearkv"] = texts = {}
        with NearStorageCache(model.config, directory, args.card, on_fault="drop") as cache:
            engine = Engine(
                model, tokenizer, cache, slots=args.batch_size, chunk_tokens=CHUNK_TOKENS
            )
            engine.run(
                jobs, lambda job, choices: texts.update({job.request.custom_id: choices[0].text}),
                _raise,
            )  # fmt: skip
        figures["rows_per_step"] = engine.rows_stepped / max(engine.steps, 1)
        return engine.answer_tokens

    def transformers(n: int) -> int:
        model.set_attn_implementation("sdpa")
        said["transformers"] = texts = {}
        order, n_tokens = sorted(range(n), key=lambda one: len(prompts[one])), 0
        for at in range(0, n, args.batch_size):
            mine = order[at : at + args.batch_size]
            answers = _padded(model, [prompts[one] for one in mine], args.tokens)
            for number, tokens in zip(mine, answers, strict=True):
                n_tokens += len(tokens)
                texts[str(number)] = tokenizer.decode(tokens, skip_special_tokens=True)
        return n_tokens

    ways = {"nearkv": nearkv, "transformers": transformers}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu_rates: dict[str, list[float]] = {name: [] for name in ways}
    for answer in ways.values():
        answer(min(2, args.prompts))  # what takes long the first time
    for round in range(args.rounds):
        for name in [*ways][:: 1 if round % 2 else -1]:
            begin, cpu = time.perf_counter(), time.process_time()
            n_tokens = ways[name](args.prompts)
            rates[name].append(n_tokens / (time.perf_counter() - begin))
            cpu_rates[name].append(n_tokens / (time.process_time() - cpu))
    return {
        "name": "short",
        "prompts": args.prompts,
        "prompt_tokens": sum(map(len, prompts)),
        "batch_size": args.batch_size,
        "tokens_per_s": rates,
        "tokens_per_cpu_s": cpu_rates,
        "of_transformers": quartiles_of_ratio(rates["nearkv"], rates["transformers"]),
        "of_transformers_cpu": quartiles_of_ratio(cpu_rates["nearkv"], cpu_rates["transformers"]),
        "ratio_goal": RATIO_GOAL,
        "rows_per_step": figures["rows_per_step"],
        "texts_that_differ": sum(
            said["nearkv"][name] != text for name, text in said["transformers"].items()
        ),
    }


def _raise(job, error: Exception) -> None:
    raise error


def _padded(model, prompts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
    """Greedy answers of a padded batch, up to the end of each."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=n_tokens, pad_token_id=0
    )
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    answers = out[:, longest:].tolist()
    for answer in answers:
        end = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
        del answer[end + 1 :]
    return answers


def describe(row: dict[str, Any]) -> Iterator[str]:
    """The first part in words."""
    low, ratio, high = row["of_transformers"]
    ours, own = (max(row["tokens_per_s"][name]) for name in ("nearkv", "transformers"))
    yield (
        f"{row['prompts']} prompts of {row['prompt_tokens'] / row['prompts']:.0f} tokens, "
        f"{row['batch_size']} at once: at best {ours:.1f} tokens/s with KV on the drive, {own:.1f} in padded "
        f"batches in memory: {ratio:.2f}x (goal {row['ratio_goal']}x; quartiles {low:.2f} .. {high:.2f})"
    )
    yield (
        f"  tokens for a second of processor time: {row['of_transformers_cpu'][1]:.2f}x; "
        f"{row['rows_per_step']:.1f} rows a step; {row['texts_that_differ']} of {row['prompts']} texts differ"
    )


# --- more KV than memory ---------------------------------------------------------------------------


def measure_memory(directory: Path, args) -> dict[str, Any]:
    """Figures of the second part: each way in a process of its own."""
    row: dict[str, Any] = {
        "name": "long",
        "prompts": args.long,
        "memory_bytes": args.memory,
        "kv_bytes": args.long * 1024 * _bytes_per_token(),
    }
    for way in ("transformers", "nearkv"):
        command = [
            sys.executable, "-m", "nearkv.bench.batch", way, str(directory), args.card,
            str(args.long), str(args.memory),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 2):
            raise RuntimeError(f"{way} ended with {done.returncode}: {done.stderr[-2000:]}")
        row[way] = json.loads(done.stdout)
    return row


def _bytes_per_token() -> int:
    return 2 * 4 * _LARGE["num_hidden_layers"] * _LARGE["num_key_value_heads"] * _LARGE["head_dim"]


def describe_memory(row: dict[str, Any]) -> Iterator[str]:
    """The second part in words."""
    yield (
        f"{row['prompts']} prompts of 1,024 tokens, {row['kv_bytes'] / 2**30:.1f} GiB of K and V in fp32, in "
        f"{row['memory_bytes'] / 2**30:.1f} GiB: " + "; ".join(
            f"{way} {row[way]['tokens_per_s']:.1f} tokens/s, at most {row[way]['peak_bytes'] / 2**30:.2f} GiB"
            if "tokens_per_s" in row[way] else f"{way} has no room ({row[way]['error']})"
            for way in ("nearkv", "transformers")
        )
    )  # fmt: skip


def _one_way(way: str, directory: str, card: str, n_prompts: int, memory: int) -> dict[str, Any]:
    """Answer long prompts within a limit of memory."""
    import resource

    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .. import NearStorageCache
    from ..batch.engine import Engine, Job
    from ..batch.memory import sizes
    from ..batch.requests import COMPLETION, Request

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_LARGE)).eval()
    rng, n_new = np.random.default_rng(0), 4
    prompts = rng.integers(1, 1000, (n_prompts, 1024), np.int32)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    begin = time.perf_counter()
    try:
        if way == "transformers":
            n_tokens = sum(map(len, _padded(model, prompts.tolist(), n_new)))
        else:
            model.set_attn_implementation("nearkv")
            with NearStorageCache(model.config, directory, card, on_fault="drop") as cache:
                chosen = sizes(model.config, cache.store.layout, memory // 2, None)
                engine = Engine(
                    model, _NoWords(), cache, slots=chosen.slots, chunk_tokens=chosen.chunk_tokens
                )
                jobs = [
                    Job(Request(at, str(at), COMPLETION, "", [], n_new, 0.0, 1.0, 0, None, (), 1),
                        prompt, n_new)
                    for at, prompt in enumerate(prompts)
                ]  # fmt: skip
                engine.run(jobs, lambda job, choices: None, _raise)
                n_tokens = engine.answer_tokens
    except (MemoryError, RuntimeError) as error:
        return {"error": " ".join(str(error).split())[-100:] or type(error).__name__}
    # Not ru_maxrss, which begins with what the parent had.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"tokens_per_s": n_tokens / (time.perf_counter() - begin), "peak_bytes": peak}


class _NoWords:
    """A tokenizer of a model without words."""

    def decode(self, tokens, **options) -> str:
        return ""


if __name__ == "__main__":
    way, directory, card, n_prompts, memory = sys.argv[1:]
    print(json.dumps(_one_way(way, directory, card, int(n_prompts), int(memory))))
