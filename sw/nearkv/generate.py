# SPDX-License-Identifier: Apache-2.0
"""`nearkv generate`: text from a language model whose KV cache lies on flash."""

from collections.abc import Iterator
import contextlib
import sys
import threading
import time
from typing import Any

from . import extras
from .arguments import existing_directory, whole

PROMPT = """\
The lighthouse at Cape Arrow was built in 1871 by Maria Lindqvist, an engineer from Gothenburg. \
The first tower was made of oak and burned down in a storm after only nine years. The second \
tower, which still stands today, is made of grey granite that was brought by boat from a quarry \
forty miles to the north. It is thirty-two metres tall and has one hundred and sixty-eight steps. \
For most of its life the lamp burned whale oil, and a keeper had to climb the stairs three times \
every night to trim the wick. In 1924 the lamp was changed to electricity, and the keeper's work \
became much easier.

The last keeper was Thomas Brandt. He lived at the lighthouse for thirty-one years with his dog \
and a small garden behind the tower, where he grew potatoes, beans and yellow roses. Every \
morning he wrote the weather, the wind and the names of passing ships into a blue notebook. When \
the light was made automatic in 1986, he gave the forty blue notebooks to the museum in the \
harbour, where visitors can read them. Scientists later found that his notes were the most \
complete record of storms anywhere on that coast, and they used them to show how the winters had \
changed.

What is the second tower made of, and how tall is it?"""
# Of a model's own generation settings, those that greedy decoding of one sequence keeps.
_KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings",
)  # fmt: skip
_LONGEST_MESSAGE = 500


def add_arguments(parser) -> None:
    """Add the options of `nearkv generate` to an argparse parser."""
    add = parser.add_argument
    add("--model", help="directory, .gguf file or name of a model (default: SmolLM2-135M-Instruct)")
    add("--prompt", default=PROMPT, help="text, or - for standard input (default: built in)")
    add("--raw", action="store_true", help="continue the prompt itself, without a chat template")
    add("--max-new-tokens", type=whole(), default=64, metavar="N", help="default: %(default)s")
    add("--card", help="model, twin or rtl; several with commas (default: twin)")
    add("--card-config", metavar="NAME", help="build of a simulated card (default: smartssd)")
    add(
        "--kv-dir",
        type=existing_directory,
        action="append",
        metavar="DIR",
        help="where page files go; may be repeated, once for each card (default: for temporary files)",
    )
    add("--kv-dtype", choices=("fp16", "bf16"), help="of stored K and V (default: by the model)")
    add("--page-tokens", type=whole(), metavar="N", help="default: 128, or as planned")
    add(
        "--machine",
        metavar="M",
        help="plan what goes to flash and how, for a machine: a name of `nearkv plan --list`, or a file "
        "that `nearkv plan --measure FILE` wrote",
    )


def run(options) -> int:
    """Run `nearkv generate` with parsed arguments; the exit status.

    Raises
    ------
    ValueError, OSError, ImportError, nearkv.CardError
        If something that was asked for is not there or does not fit; the message says what.
    """
    # What is quick to check comes first: nobody should wait for a card or a model to learn of a slip.
    extras.require("nearkv generate", "torch", "transformers", "safetensors")
    prompt = _prompt(options.prompt)
    names = options.card.split(",") if options.card else [None]
    directories = options.kv_dir or [None]
    if len(directories) not in (1, len(names)):
        raise ValueError(
            f"--kv-dir is given {len(directories)} times, and there are {len(names)} in --card; "
            "give it once, or once for each card"
        )
    machine = _machine(options.machine)
    from .hf import models

    found = models.find(options.model, say=_say)
    with contextlib.ExitStack() as closing:
        cards = _open_cards(names, options.card_config, closing)
        from .hf.cache import NearStorageCache

        model, tokenizer = models.load(found, say=_say)
        with _answerable(model, "be prompted"):
            inputs = _tokens(tokenizer, prompt, options.raw)
        n_prompt = inputs["input_ids"].shape[1]
        if not n_prompt:
            raise ValueError("the tokenizer makes no tokens of this prompt")
        _check_positions(model, n_prompt + options.max_new_tokens)
        given = {"page_tokens": options.page_tokens, "kv_dtype": options.kv_dtype}
        arguments = {name: value for name, value in given.items() if value is not None}
        if machine is not None:
            arguments = _plan(model, machine, n_prompt, options) | arguments
        if len(cards) > 1:
            arguments["weights"] = "measure"
        where = directories[0] if len(directories) == 1 else directories
        with _answerable(model, "have its cache on flash"):
            cache = NearStorageCache(model.config, where, cards, **arguments)
        with cache:
            start = time.perf_counter()
            times = _generate(model, tokenizer, cache, inputs, options.max_new_tokens)
            for line in _report(cache, n_prompt, start, times):
                _say(line)
    return 0


def _say(line: str) -> None:
    """Tell the user something that is no part of the answer."""
    print(line, file=sys.stderr)


def _prompt(text: str) -> str:
    """The prompt of the option, or of standard input without the newline that ends its last line."""
    if text == "-":
        if sys.stdin is None:
            raise ValueError("--prompt - reads standard input, which is closed")
        data = sys.stdin.buffer.read()
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"standard input is not UTF-8: byte {data[error.start]:#04x} at position "
                f"{error.start}, in line {line}; convert it first, such as with: "
                "iconv -f LATIN1 -t UTF-8"
            ) from None
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes that Python could not decode
            raise ValueError(
                f"--prompt is not UTF-8, at character {error.start}; convert it first, such as with: "
                "iconv -f LATIN1 -t UTF-8"
            ) from None
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _machine(name: str | None):
    if name is None:
        return None
    extras.require("nearkv generate --machine", "scipy")
    from nearkv_sim.system import describe

    return describe.load_machine(name)


def _open_cards(names: list, config: str | None, closing: contextlib.ExitStack) -> list:
    from .cards import open_cards

    patience = f"opening card {names[0] or 'twin'}; the first time, this can take some minutes"
    timer = threading.Timer(3, _say, (patience,))
    timer.start()
    try:
        cards, _ = open_cards(names, **({"config": config} if config else {}))
    finally:
        timer.cancel()
    for card in cards:
        closing.enter_context(card)
    return cards


def _tokens(tokenizer, prompt: str, raw: bool) -> dict[str, Any]:
    """input_ids and attention_mask of the prompt, in the model's chat template if it has one."""
    if raw or not tokenizer.chat_template:
        found = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


def _check_positions(model, n_tokens: int) -> None:
    """See that the model has positions for so many tokens; the last is never put into it.

    Raises
    ------
    ValueError
        If its positions are a table that ends before. Computed positions go on, with a warning.
    """
    from torch import nn

    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or n_tokens - 1 <= limit:
        return
    tables = [m.weight for m in model.modules()
              if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]  # fmt: skip
    # Some tables begin with a few rows for padding.
    if any(
        limit <= len(table) <= limit + 8 for table in [*tables, *model.buffers()] if table.ndim == 2
    ):
        raise ValueError(
            f"prompt and new tokens are {n_tokens} tokens together, and {_class(model)} has learned "
            f"{limit} positions; shorten the prompt, or lower --max-new-tokens"
        )
    _say(
        f"warning: prompt and new tokens are {n_tokens} tokens together, and {_class(model)} was "
        f"trained for {limit}; expect poor answers"
    )


def _class(model) -> str:
    return type(model).__name__


@contextlib.contextmanager
def _answerable(model, what: str) -> Iterator[None]:
    """Report whatever a model's code raises as an error of one line that names the model's class."""
    try:
        yield
    except Exception as error:
        if _is_ours(error):
            raise
        if isinstance(error, RuntimeError) and _raised_by(error).startswith("nearkv.hf"):
            # What is in the cache was touched by others than nearkv's attention.
            raise ValueError(
                f"{_class(model)} has attention code of its own, which nearkv cannot replace"
            ) from error
        text = " ".join(str(error).split()) or "no message"
        if len(text) > _LONGEST_MESSAGE:
            text = text[:_LONGEST_MESSAGE] + " ..."
        raise ValueError(
            f"{_class(model)} cannot {what}: {type(error).__name__}: {text}"
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether nearkv itself refuses something, or its card, its drive or its reader failed."""
    from .cards import CardError

    refuses = isinstance(error, (NotImplementedError, ValueError))
    return isinstance(error, (CardError, OSError, MemoryError)) or (
        refuses and _raised_by(error).startswith("nearkv")
    )


def _raised_by(error: Exception) -> str:
    """The name of the module whose code raised an error."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at.tb_frame.f_globals.get("__name__", "") if at is not None else ""


def _plan(model, machine, n_prompt: int, options) -> dict:
    """Arguments of the cache that the optimiser chooses for a machine."""
    from nearkv_hw import pages

    from . import plan

    own = pages.default_kv_dtype(model.dtype)
    chosen = plan.for_runtime(
        model.config, machine, batch=1, context=n_prompt, output=options.max_new_tokens,
        kv_dtypes=(options.kv_dtype or own,),
    )  # fmt: skip
    _say(f"plan: {chosen.describe()}")
    return chosen.cache_arguments()


def _generate(model, tokenizer, cache, inputs: dict, max_new_tokens: int) -> list[float]:
    """Print what the model says; when each token came."""
    from transformers import GenerationConfig, TextStreamer

    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in _KEPT}
    model.generation_config = GenerationConfig(
        **{name: value for name, value in kept.items() if value is not None},
        do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
    )  # fmt: skip
    if model.generation_config.pad_token_id is None:  # asked for, but there is nothing to pad
        model.generation_config.pad_token_id = tokenizer.pad_token_id or 0
    times: list[float] = []
    with _answerable(model, "be run with nearkv"), _progress(model) as prefilled:

        class Stream(TextStreamer):
            def put(self, value):
                is_prompt = self.next_tokens_are_prompt
                super().put(value)
                if not is_prompt:
                    times.append(time.perf_counter())

            def on_finalized_text(self, text, stream_end=False):
                prefilled()
                super().on_finalized_text(text, stream_end)

        streamer = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, past_key_values=cache, streamer=streamer, tokenizer=tokenizer)
    return times


@contextlib.contextmanager
def _progress(model):
    """Show how many layers have seen the prompt, until the function that this yields is called."""
    from torch.nn import ModuleList
    from tqdm import tqdm

    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    # Whatever it is called, the list of the layers is the first of this length.
    lists = (m for m in model.modules() if isinstance(m, ModuleList) and len(m) == n_layers)
    layers = next(lists, [])
    bar = tqdm(total=len(layers), desc="prefill", unit=" layers", leave=False, disable=None)
    hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]

    def done() -> None:
        while hooks:
            hooks.pop().remove()
        bar.close()

    try:
        yield done
    finally:
        done()


def _report(cache, n_prompt: int, start: float, times: list[float]) -> Iterator[str]:
    """The closing lines of figures."""
    figures, store = cache.figures, cache.store
    decode_s = times[-1] - times[0]
    rate = f"{(len(times) - 1) / decode_s:.2f} tokens/s" if len(times) > 1 else "-"
    attended = figures.card_tokens + figures.host_tokens
    cycles = f" in {figures.cycles:,} cycles" if figures.cycles else ""
    share = f"{100 * figures.card_tokens / attended:.0f}%" if attended else "-"
    yield ""
    yield (
        f"prompt {n_prompt} tokens in {times[0] - start:.2f} s; "
        f"{len(times)} new tokens, {rate}; card {', '.join(card.name for card in cache.cards)}"
    )
    yield (
        f"KV written {store.bytes_written / 2**20:.1f} MiB, read {figures.kv_bytes / 2**20:.1f} MiB "
        f"in {figures.pages} pages ({figures.load_s:.2f} s); card {figures.run_s:.2f} s for "
        f"{figures.jobs} jobs{cycles}; {share} of decode attention by the card"
    )
