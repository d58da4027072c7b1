# SPDX-License-Identifier: Apache-2.0
"""The command `nearkv`."""

import argparse
import contextlib
import os
import select
import signal
import sys

from .arguments import Parser

# What a shell reports of a program that wrote to a pipe whose reader had gone.
_NO_READER = 128 + signal.SIGPIPE


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status. Errors of use and of the machine are one line on stderr."""
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # of standard output or standard error
        for stream in (sys.stdout, sys.stderr):
            _give_up_if_broken(stream)
        if isinstance(error, BrokenPipeError):
            return _NO_READER
        return _say(f"cannot write to standard output: {error.strerror}")


def _give_up_if_broken(stream) -> None:
    """Drop what cannot be written: the interpreter would try again at its end, and complain."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # not a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _run(arguments: list[str] | None) -> int:
    # A model may answer with what the terminal cannot show.
    if hasattr(sys.stdout, "reconfigure"):
        getattr(sys.stdout, "reconfigure")(errors="replace")  # noqa: B009
    # Before torch is loaded: by default its threads spin between the pieces of a layer, on the cores
    # that the card's model and the readers need. On a busy machine that costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .cards import CardError

    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except (CardError, ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        if options.traceback or isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise
        return _say(str(error) or type(error).__name__)


def _say(message: str) -> int:
    """Print an error; the exit status."""
    print(f"nearkv: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output or standard error any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or not a file
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class _Version(argparse.Action):
    """Prints the version. Looking it up takes time, so only when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        from . import __version__

        print(f"nearkv {__version__}")
        parser.exit()


def _parser() -> Parser:
    from . import batch, bench, doctor, generate, plan, selftest, xclbin, xrt_sim

    parser = Parser("nearkv", description="Attention next to storage.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser(
        "generate",
        help="stream text from a model whose KV cache lies on flash",
        description="Stream text from a language model. Its KV cache lies in page files and is "
        "attended by a card. Without arguments: a built-in prompt, a small model, the card twin.",
    )
    generate.add_arguments(add)
    add.set_defaults(run=generate.run)
    add = commands.add_parser(
        "batch",
        help="answer a file of prompts, whatever interrupts it",
        description="Answer the prompts of a file in the OpenAI batch format. Results are appended as they come; "
        "after a kill, or a loss of power, the same command goes on. The exit status is 0 if every line has "
        "an answer, 1 if some have an error instead, 3 if --write-budget left some for another time.",
    )
    batch.add_arguments(add)
    add.set_defaults(run=batch.run)
    add = commands.add_parser("bench", help="measure, beside the limit or a peer")
    bench.add_arguments(add)
    add.set_defaults(run=bench.run)
    add = commands.add_parser("plan", help="what a model would do on a machine, and why")
    plan.add_arguments(add)
    add.set_defaults(run=plan.run)
    add = commands.add_parser(
        "doctor",
        help="what this machine has for nearkv, what is missing, and how to mend it",
        description="Look at cards, drives, their pairing, tools and the kernel, and say what is missing "
        "and the command that mends it. The exit status is 0 if what this machine needs is there.",
    )
    doctor.add_arguments(add)
    add.set_defaults(run=doctor.run)
    add = commands.add_parser(
        "selftest",
        help="everything a card must do, measured and target side by side",
        description="Run everything that a card must do, compare it byte for byte with the bit-exact model, "
        "and print what was measured beside what it should be. The exit status is 1 if something fails.",
    )
    selftest.add_arguments(add)
    add.set_defaults(run=selftest.run)
    add = commands.add_parser("xclbin", help="what is in an xclbin file")
    xclbin.add_arguments(add)
    add.set_defaults(run=xclbin.run)
    add = commands.add_parser(
        "xrt-sim",
        help="run a program with simulated cards behind the real XRT",
        description="Run a program that was written for XRT, unchanged, with simulated cards behind the "
        "real XRT library. NEARKV_XCLBIN names the file that it is to load.",
    )
    xrt_sim.add_arguments(add)
    add.set_defaults(run=xrt_sim.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
