# SPDX-License-Identifier: Apache-2.0
"""The command `nearkv`."""

import argparse
import contextlib
import os
from pathlib import Path
import sys
import threading
import time

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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code. Errors of use and of the machine are one line on stderr."""
    options = _parser().parse_args(arguments)
    # Before torch is loaded: by default its threads spin between the pieces of a layer, on the cores
    # that the card's model and the readers need. On a busy machine that costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .cards import CardError

    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (CardError, ImportError, NotImplementedError, OSError, ValueError) as error:
        print(f"nearkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("nearkv", description="Attention next to storage.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="stream text from a model whose KV cache lies on flash",
        description="Stream text from a language model. Its KV cache lies in page files and is "
        "attended by a card. Without arguments: a built-in prompt, a small model, the card twin.",
    )
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("--model", help="directory, .gguf file or name of a model (default: SmolLM2-135M-Instruct)")
    add("--prompt", default=PROMPT, help="text, or - for standard input (default: built in)")
    add("--raw", action="store_true", help="continue the prompt itself, without a chat template")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--card", help="model, twin or rtl; several with commas (default: twin)")
    add("--card-config", metavar="NAME", help="build of a simulated card (default: smartssd)")
    add(
        "--kv-dir",
        metavar="DIR",
        help="where page files go; one for each card with commas (default: for temporary files)",
    )
    add("--kv-dtype", choices=("fp16", "bf16"), help="of stored K and V (default: by the model)")
    add("--page-tokens", type=int, metavar="N", help="default: 128, or as planned")
    add(
        "--machine",
        metavar="M",
        help="plan what goes to flash and how, for a machine: a name of `nearkv plan --list`, or a file "
        "that `nearkv plan --measure FILE` wrote",
    )
    from . import bench, plan

    measure = commands.add_parser("bench", help="measure, beside the limit or a peer")
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.run)
    what_if = commands.add_parser("plan", help="what a model would do on a machine, and why")
    plan.add_arguments(what_if)
    what_if.set_defaults(run=plan.run)
    return parser


def _generate(options) -> int:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    from .cards import open_cards

    card_options = {"config": options.card_config} if options.card_config else {}
    # Before the model, which takes longer: a wrong name should not have to wait for it.
    patience = f"opening card {options.card or 'twin'}; the first time, this can take some minutes"
    timer = threading.Timer(3, print, (patience,), {"file": sys.stderr})
    timer.start()
    try:
        cards, _ = open_cards(options.card.split(",") if options.card else None, **card_options)
    finally:
        timer.cancel()
    directories = options.kv_dir.split(",") if options.kv_dir else None
    if directories and len(directories) == 1:
        (directories,) = directories
    with contextlib.ExitStack() as closing:
        for card in cards:
            closing.enter_context(card)
        from .hf import models
        from .hf.cache import NearStorageCache

        model, tokenizer = models.load(options.model, on_convert=_say_conversion)
        inputs = _tokens(tokenizer, prompt, options.raw)
        planned = _plan(model, inputs["input_ids"].shape[1], options)
        given = {"page_tokens": options.page_tokens, "kv_dtype": options.kv_dtype}
        arguments = planned | {name: value for name, value in given.items() if value is not None}
        if len(cards) > 1:
            arguments["weights"] = "measure"
        with NearStorageCache(model.config, directories, cards, **arguments) as cache:
            streamer = _stream(model, tokenizer)
            start = time.perf_counter()
            # max_length would only bring a warning beside max_new_tokens.
            model.generation_config.max_length = None
            model.generate(
                **inputs, past_key_values=cache, max_new_tokens=options.max_new_tokens,
                do_sample=False, streamer=streamer,
            )  # fmt: skip
            n_prompt = inputs["input_ids"].shape[1]
            for line in _report(cache, n_prompt, start, streamer.times):
                print(line, file=sys.stderr)
    return 0


def _plan(model, n_prompt: int, options) -> dict:
    """Arguments of the cache that the optimiser chooses for --machine; none without it."""
    if options.machine is None:
        return {}
    from nearkv_hw import pages

    from . import plan

    own = pages.default_kv_dtype(model.dtype)
    chosen = plan.for_runtime(
        model.config, options.machine, batch=1, context=n_prompt, output=options.max_new_tokens,
        kv_dtypes=(options.kv_dtype or own,),
    )  # fmt: skip
    print(f"plan: {chosen.describe()}", file=sys.stderr)
    return chosen.cache_arguments()


def _say_conversion(gguf: Path) -> None:
    print(f"converting {gguf.name} once; this takes about half a minute", file=sys.stderr)


def _tokens(tokenizer, prompt: str, raw: bool):
    """input_ids and attention_mask of the prompt, in the model's chat template if it has one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _stream(model, tokenizer):
    """A streamer that prints text, notes when each token came, and shows the prefill's progress."""
    from tqdm import tqdm
    from transformers import TextStreamer

    layers = model.get_decoder().layers
    bar = tqdm(total=len(layers), desc="prefill", unit=" layers", leave=False, disable=None)
    hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]

    class Stream(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times = []

        def put(self, value):
            prompt = self.next_tokens_are_prompt
            super().put(value)
            if not prompt:
                self.times.append(time.perf_counter())

        def on_finalized_text(self, text, stream_end=False):
            if hooks:
                for hook in hooks:
                    hook.remove()
                hooks.clear()
                bar.close()
            super().on_finalized_text(text, stream_end)

    return Stream()


def _report(cache, n_prompt: int, start: float, times: list[float]):
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


if __name__ == "__main__":
    sys.exit(main())
