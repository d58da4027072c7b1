# SPDX-License-Identifier: Apache-2.0
"""`nearkv generate`: text from a language model whose KV cache lies on flash."""

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import inspect
import json
import shlex
import sys
import threading
import time
from typing import Any
import uuid

from . import extras
from .arguments import amount, existing_directory, own_directory, share, whole

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
_OWN = (
    "bos_token_id", "eos_token_id", "pad_token_id", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings",
)  # fmt: skip
_LONGEST_MESSAGE = 500
_LONGEST_ECHO = 1200  # characters of a prompt that are shown
# Tokens of a kept text that decide how the next ones are written: spaces, and what is not ASCII.
_CONTEXT = 16


def add_arguments(parser) -> None:
    """Add the options of `nearkv generate` to an argparse parser."""
    add = parser.add_argument
    add("--model", help="directory, .gguf file or name of a model (default: SmolLM2-135M-Instruct)")
    add("--prompt", help="text, or - for standard input (default: built in)")
    add("--raw", action="store_true", help="continue the prompt itself, without a chat template")
    add(
        "--chat", action="store_true",
        help="a conversation: each line of standard input is a turn, and its KV stays; Ctrl-D ends it",
    )  # fmt: skip
    add(
        "--max-new-tokens", type=whole(0), default=64, metavar="N",
        help="default: %(default)s; 0 only reads the prompt, for --keep",
    )  # fmt: skip
    add(
        "--temperature", type=amount, metavar="T",
        help="of random answers; 0: the likeliest tokens (default; 1 where --top-p or --top-k is given)",
    )  # fmt: skip
    add(
        "--top-p", type=share, metavar="P", help="only the likeliest tokens, up to this probability"
    )
    add("--top-k", type=whole(), metavar="K", help="only so many of the likeliest tokens")
    add(
        "--seed", type=whole(0), default=0, metavar="N",
        help="of random answers: the same again with the same seed (default: %(default)s)",
    )  # fmt: skip
    add(
        "--json",
        action="store_true",
        help="answer and figures as JSON, when the answer is complete",
    )
    add_card_arguments(add)
    add("--page-tokens", type=whole(), metavar="N", help="default: 128, or as planned")
    add(
        "--machine",
        metavar="M",
        help="plan what goes to flash and how, for a machine: a name of `nearkv plan --list`, or a file "
        "that `nearkv plan --measure FILE` wrote",
    )
    add(
        "--keep", type=own_directory, action="append", metavar="DIR",
        help="keep the text and its KV cache in a directory of its own; may be repeated as --kv-dir",
    )  # fmt: skip
    add(
        "--resume", type=existing_directory, action="append", metavar="DIR",
        help="go on behind what was kept there with the same model, with --prompt as the next turn. What "
        "is kept stays as it is, unless --keep names the same directory",
    )  # fmt: skip


def add_card_arguments(add) -> None:
    """Add the arguments that say where pages go and what attends to them, as `open_cards` wants them."""
    add("--card", help="model, twin, rtl, xrt:0 or pynq:0; several with commas (default: twin)")
    add("--card-config", metavar="NAME", help="build of a simulated card (default: smartssd)")
    add(
        "--kv-dir", type=existing_directory, action="append", metavar="DIR",
        help="where page files go; may be repeated, up to once for each card, or engine of a card "
        "(default: for temporary files)",
    )  # fmt: skip
    add("--kv-dtype", choices=("fp16", "bf16"), help="of stored K and V (default: by the model)")


def run(options) -> int:
    """Run `nearkv generate` with parsed arguments; the exit status.

    Raises
    ------
    ValueError, OSError, ImportError, nearkv.CardError
        If something that was asked for is not there or does not fit; the message says what.
    """
    # What is quick to check comes first: nobody should wait for a card or a model to learn of a slip.
    extras.require("nearkv generate", "torch", "transformers", "safetensors")
    cards = options.card.split(",") if options.card else [None]
    where = _directories(options, count_cards(cards))
    _check_chat(options)
    prompt = None if options.prompt is None else _prompt(options.prompt)
    machine = _machine(options.machine)
    from .hf import models

    found = models.find(options.model, say=say)
    with contextlib.ExitStack() as closing:
        cards = open_cards(cards, options.card_config, closing)
        with _status(f"loading {options.model or models.DEMO_NAME}"):
            model, tokenizer = models.load(found, say=say)
        who = {"model": models.fingerprint(model), "tokenizer": tokenizer}
        cache: Any = None
        ids: Any = None
        if options.resume:
            cache, ids = _resume(model, cards, where, who)
            closing.enter_context(cache)
        turns: list[_Turn] = []
        for text in _turns(options, prompt):
            if ids is None:
                assert text is not None
                # A text without an answer waits for more: the turn of the answer is not opened.
                ids = _tokens(model, tokenizer, text, options.raw, bool(options.max_new_tokens))
            else:
                ids = _go_on(model, tokenizer, cache, ids, text, options.raw)
            if not ids.shape[1]:
                raise ValueError("the tokenizer makes no tokens of this prompt")
            _check_positions(model, ids.shape[1] + options.max_new_tokens)
            if cache is None:
                cache = closing.enter_context(
                    _new_cache(model, cards, where, ids.shape[1], machine, options)
                )
            if text is not None and not options.chat:
                say(_echo(text))
            ids = _answer(model, tokenizer, cache, ids, text, options, turns)
        if not turns:
            return 0
        figures = _figures(cache, turns)
        if options.json:
            print(json.dumps({"prompt": text, "answer": turns[-1].text} | figures, indent=2))
        for line in () if options.json else _report(figures):
            say(line)
        if options.keep:
            cache.save(ids, **who)
            say(f"kept {ids.shape[1]} tokens; go on with: nearkv generate "
                 f"{f'--model {shlex.quote(options.model)} ' if options.model else ''}"
                 f"{' '.join(f'--resume {shlex.quote(str(one))}' for one in options.keep)}")  # fmt: skip
    return 0


@dataclass
class _Turn:
    """A prompt and its answer.

    Attributes
    ----------
    n_read, n_kept : int
        Tokens of the prompt; of what the cache had before.
    read_s : float
        Until the first new token, or until the prompt was read.
    times : list of float
        When each new token came.
    text : str
        The answer.
    """

    n_read: int
    n_kept: int
    read_s: float
    times: list[float]
    text: str


def _answer(model, tokenizer, cache, ids, text: str | None, options, turns: list[_Turn]):
    """Let the model answer tokens (1, n), or only read them; all tokens, the answer's too."""
    n_kept, start, times, said = cache.get_seq_length(), time.perf_counter(), [], []
    n_read = ids.shape[1] - n_kept
    if options.max_new_tokens:
        ids, times, said = _generate(model, tokenizer, cache, ids, options, text)
    else:
        _read(model, cache, ids)
    read = times[0] if times else time.perf_counter()
    turns.append(_Turn(n_read, n_kept, read - start, times, "".join(said)))
    return ids


def _check_chat(options) -> None:
    """Raise ValueError if options do not go with a conversation."""
    if not options.chat:
        return
    if options.json:
        raise ValueError("--json does not go with --chat, which answers turn by turn")
    if options.prompt == "-":
        raise ValueError("--prompt - does not go with --chat, which reads its turns from there")
    if not options.max_new_tokens:
        raise ValueError("--max-new-tokens 0 does not go with --chat")


def _turns(options, prompt: str | None) -> Iterator[str | None]:
    """What is said to the model; None: it goes on where it was."""
    if not options.chat:
        yield PROMPT if prompt is None and not options.resume else prompt
        return
    if prompt is not None:
        yield prompt
    if sys.stdin is None:
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _echo(prompt: str) -> str:
    """A prompt as it is shown above its answer."""
    if len(prompt) > _LONGEST_ECHO:
        half = _LONGEST_ECHO // 2
        left_out = f"\n... {len(prompt) - 2 * half:,} characters ...\n"
        prompt = prompt[:half] + left_out + prompt[-half:]
    return "\n".join(f"> {line}".rstrip() for line in prompt.splitlines()) + "\n"


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Show on a terminal what takes long, as long as it does."""
    from tqdm import tqdm

    with tqdm(bar_format="{desc}", desc=text, leave=False, disable=None) as bar:
        bar.refresh()
        yield


def _directories(options, n_cards: int) -> list | None:
    """Where pages go: directories, one for each card at most; None: where temporary files do.

    Raises
    ------
    ValueError
        If the options do not belong together.
    """
    if options.resume and options.keep and options.resume != options.keep:
        raise ValueError(
            "--keep with --resume saves the longer text in the same directory; to have both, copy the "
            f"directory first, and resume the copy: cp -r {shlex.quote(str(options.resume[0]))} COPY"
        )
    fixed = ("kv_dir", "kv_dtype", "page_tokens", "machine") if options.resume else ()
    for name in fixed or (("kv_dir",) if options.keep else ()):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with --{'resume' if fixed else 'keep'}, whose "
                "directory holds the pages" + (" and says how they are made" if fixed else "")
            )
    if not options.max_new_tokens and not options.keep:
        raise ValueError("--max-new-tokens 0 only reads the prompt; it goes with --keep")
    if options.keep and not options.resume:
        _check_not_kept(options.keep)
    name = "resume" if options.resume else "keep" if options.keep else "kv_dir"
    given = getattr(options, name)
    if not options.resume:
        check_once_for_each(name.replace("_", "-"), given, n_cards)
    return given


def check_once_for_each(option: str, given: list | None, n_cards: int) -> None:
    """Raise ValueError if there are more directories than cards to serve them."""
    if given and len(given) > n_cards:
        raise ValueError(
            f"--{option} is given {len(given)} times, and --card has {n_cards} to serve them; give it once "
            "for each at most"
        )


def count_cards(names: list) -> int:
    """How many cards, or engines of cards, there will be."""
    from .cards import engine_names

    return sum(len(engine_names(name)) if name else 1 for name in names)


def _check_not_kept(where: list) -> None:
    """Raise ValueError if something is kept in these directories."""
    from .io import FlashError
    from .store import KvStore

    try:
        layout, n_kv_heads, n_shards = KvStore.describe(where)
    except FlashError:
        return  # none, or a damaged one, of which the cache will say what is wrong
    with KvStore(where, layout, n_kv_heads, n_shards=n_shards) as store:
        if store.saved() is not None:
            raise ValueError(
                f"something is kept in {where[0]}: go on with it by --resume, and --keep the longer "
                "text there too if you like; or choose another directory"
            )


def say(line: str) -> None:
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


def open_cards(names: list, config: str | None, closing: contextlib.ExitStack) -> list:
    """Cards of these names, or of this build, until `closing` ends; says so if that takes long."""
    from . import cards as known

    patience = f"opening card {names[0] or 'twin'}; the first time, this can take some minutes"
    timer = threading.Timer(3, say, (patience,))
    timer.start()
    try:
        cards, _ = known.open_cards(names, **({"config": config} if config else {}))
    finally:
        timer.cancel()
    for card in cards:
        closing.enter_context(card)
    return cards


def _new_cache(model, cards: list, where, n_prompt: int, machine, options):
    """An empty cache as the options, and the plan for the machine, want it."""
    from .hf.cache import NearStorageCache

    given = {"page_tokens": options.page_tokens, "kv_dtype": options.kv_dtype}
    arguments: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
    if machine is not None:
        arguments = _plan(model, machine, n_prompt, options) | arguments
    if options.keep:
        arguments["persistent"] = True
    if len(cards) > 1:
        arguments["weights"] = "measure"
    with _answerable(model, "have its cache on flash"):
        return NearStorageCache(model.config, _one(where), cards, **arguments)


def _resume(model, cards: list, where, who: dict):
    """The cache that was kept in a directory, and its tokens (1, n)."""
    from .hf.cache import NearStorageCache

    weights = "measure" if len(cards) > 1 else None
    with _answerable(model, "have its cache on flash"):
        cache = NearStorageCache.open(_one(where), model.config, cards, weights=weights, **who)
    kept = cache.token_ids
    if kept is None or len(kept) != 1:
        cache.close()
        raise ValueError(f"{where[0]}: what is saved there was not kept by nearkv generate")
    return cache, kept


def _one(where: list | None):
    return where[0] if where and len(where) == 1 else where


def _tokens(model, tokenizer, prompt: str, raw: bool, opens_answer: bool):
    """Tokens (1, n) of a prompt, in the model's chat template if it has one."""
    with _answerable(model, "be prompted"):
        if raw or not tokenizer.chat_template:
            return tokenizer(prompt, return_tensors="pt")["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens_answer, return_tensors="pt", return_dict=True
        )["input_ids"]


def _go_on(model, tokenizer, cache, kept, prompt: str | None, raw: bool):
    """Tokens (1, n) of the kept text and the next turn; without a prompt, of the kept text.

    Raises
    ------
    ValueError
        If there is nothing to go on with.
    """
    import torch

    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    # The last token of an answer was said, and not yet seen.
    answered = kept.shape[1] > cache.get_seq_length()
    ended = answered and kept[0, -1].item() in ends
    if prompt is None:
        if ended or not answered:
            what = "has come to its end" if ended else "is a prompt alone"
            raise ValueError(f"the kept text {what}; add to it with --prompt")
        return kept
    if ended:  # what follows says itself how a turn ends
        kept = kept[:, :-1]
    with _answerable(model, "be prompted"):
        if not raw and tokenizer.chat_template:
            prompt = _turn(tokenizer, prompt, answered)
        turn = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not turn.shape[1]:
        raise ValueError("the tokenizer makes no tokens of this prompt")
    return torch.cat([kept, turn.to(kept.dtype)], dim=1)


def _turn(tokenizer, prompt: str, behind_answer: bool) -> str:
    """A turn in the model's chat template, without what begins a conversation.

    behind_answer : whether an answer is still to be closed.
    """
    answer = uuid.uuid4().hex
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    turn = {"role": "user", "content": prompt}
    text = tokenizer.apply_chat_template(before, tokenize=False)
    longer = tokenizer.apply_chat_template(
        [*before, turn], tokenize=False, add_generation_prompt=True
    )
    if longer.count(answer) != 1 or not longer.startswith(text):
        raise ValueError("its chat template has no further turns; --raw does without it")
    return longer.partition(answer)[2] if behind_answer else longer.removeprefix(text)


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
    say(
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
    say(f"plan: {chosen.describe()}")
    return chosen.cache_arguments()


def _read(model, cache, ids) -> None:
    """Let the model read tokens that the cache does not hold yet."""
    import torch

    new = ids[:, cache.get_seq_length() :]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with _answerable(model, "be run with nearkv"), _progress(model), torch.no_grad():
        model(input_ids=new, attention_mask=torch.ones_like(ids), **options)


def _sampling(options) -> dict[str, Any]:
    """Settings of transformers for how tokens are chosen."""
    given = options.temperature, options.top_p, options.top_k
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if given == (None, None, None) else 1.0
    if not temperature:
        return {"do_sample": False}
    return {
        "do_sample": True, "temperature": temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p, "top_k": options.top_k or 0,
    }  # fmt: skip


def _generate(model, tokenizer, cache, ids, options, prompt: str | None):
    """Print what the model says, unless it is to be JSON.

    Parameters
    ----------
    prompt : str or None
        None if the answer goes on in the middle.

    Returns
    -------
    tokens (1, n) in all, when each new one came, and the answer in pieces
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    own = {name: getattr(model.generation_config, name, None) for name in _OWN}
    model.generation_config = GenerationConfig(
        **{name: value for name, value in own.items() if value is not None},
        **_sampling(options), max_new_tokens=options.max_new_tokens, use_cache=True,
    )  # fmt: skip
    torch.manual_seed(options.seed + ids.shape[1])  # a turn is not the one before
    if model.generation_config.pad_token_id is None:  # asked for, but there is nothing to pad
        model.generation_config.pad_token_id = tokenizer.pad_token_id or 0
    times: list[float] = []
    said: list[str] = []
    with _answerable(model, "be run with nearkv"), _progress(model) as prefilled:

        class Stream(TextStreamer):
            def put(self, value):
                is_prompt = self.next_tokens_are_prompt
                super().put(value)
                if not is_prompt:
                    times.append(time.perf_counter())
                elif prompt is None:
                    self.token_cache = value[0, -_CONTEXT:].tolist()
                    self.print_len = len(tokenizer.decode(self.token_cache, **self.decode_kwargs))

            def on_finalized_text(self, text, stream_end=False):
                prefilled()
                said.append(text)
                if not options.json:
                    super().on_finalized_text(text, stream_end)

        streamer = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
            streamer=streamer, tokenizer=tokenizer,
        )  # fmt: skip
    return ids, times, said


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


def _figures(cache, turns: list[_Turn]) -> dict[str, Any]:
    """What the answers took."""
    figures, store = cache.figures, cache.store
    decode_s = sum(turn.times[-1] - turn.times[0] for turn in turns if turn.times)
    n_decoded = sum(len(turn.times) - 1 for turn in turns if turn.times)
    attended = figures.card_tokens + figures.host_tokens
    return {
        "turns": len(turns),
        "prompt_tokens": sum(turn.n_read for turn in turns),
        "kept_tokens": turns[0].n_kept,
        "prompt_s": sum(turn.read_s for turn in turns),
        "new_tokens": sum(len(turn.times) for turn in turns),
        "tokens_per_s": n_decoded / decode_s if n_decoded and decode_s else None,
        "cards": [card.name for card in cache.cards],
        "bytes_written": store.bytes_written,
        "bytes_read": figures.kv_bytes,
        "pages_read": figures.pages,
        "load_s": figures.load_s,
        "card_s": figures.run_s,
        "card_jobs": figures.jobs,
        "card_cycles": figures.cycles,
        "card_share": figures.card_tokens / attended if attended else None,
        "page_tokens": store.layout.page_tokens,
        "tokens": cache.get_seq_length(),
    }


def _report(figures: dict[str, Any]) -> Iterator[str]:
    """The closing lines of figures."""
    n_new, rate, share = figures["new_tokens"], figures["tokens_per_s"], figures["card_share"]
    behind = f" behind {figures['kept_tokens']}" if figures["kept_tokens"] else ""
    new = f"{n_new} new tokens, {f'{rate:.2f} tokens/s' if rate else '-'}" if n_new else "no answer"
    turns = f"{figures['turns']} turns: " if figures["turns"] > 1 else ""
    if n_new:
        yield ""
    yield (
        f"{turns}prompt {figures['prompt_tokens']} tokens{behind} in {figures['prompt_s']:.2f} s; {new}; "
        f"card {', '.join(figures['cards'])}"
    )
    cycles = f" in {figures['card_cycles']:,} cycles" if figures["card_cycles"] else ""
    yield (
        f"KV written {figures['bytes_written'] / 2**20:.1f} MiB, read {figures['bytes_read'] / 2**20:.1f} "
        f"MiB in {figures['pages_read']} pages ({figures['load_s']:.2f} s); card {figures['card_s']:.2f} s "
        f"for {figures['card_jobs']} jobs{cycles}; "
        f"{'-' if share is None else f'{100 * share:.0f}%'} of decode attention by the card"
    )
    if share == 0 and figures["tokens"] < figures["page_tokens"]:
        yield (
            f"0% because a page is written when {figures['page_tokens']} tokens fill it, and these were "
            f"{figures['tokens']}; until then the host attends to them"
        )
