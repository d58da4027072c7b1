# SPDX-License-Identifier: Apache-2.0
"""nearkv xrt-sim: run a program that was written for XRT, with simulated cards."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys

from .arguments import whole
from .cards import CardError


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--card", default="twin", choices=("twin", "model", "rtl"), help="default: %(default)s")
    add("--cards", type=whole(), default=1, help="how many (default: %(default)s)")
    add("--board", default="smartssd", help="which, as for make bitstream (default: %(default)s)")
    add("--config", help="the build that is on them (default: the board's)")
    add(
        "--threads", type=whole(), help="of each twin (default: its share of the processor's cores)"
    )
    add(
        "--fault", action="append", default=[], metavar="KIND[:SECONDS][@RUN]",
        help="what goes wrong on purpose: hang (a run does not end), wedge (none does any more), error, "
        "late:SECONDS, no-p2p, busy, other-build; without @RUN in every run. May be repeated",
    )  # fmt: skip
    add("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...", help="what is run")


def run(args) -> int:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise ValueError("which program? nearkv xrt-sim [options] -- PROGRAM [its arguments]")
    xrt = importlib.import_module("nearkv_sim.xrt")
    faults = [xrt.Fault.parse(text) for text in args.fault]
    options = {"threads": args.threads} if args.threads and args.card == "twin" else {}
    try:
        simulation = xrt.Simulation(
            args.card, args.cards,
            board=args.board, config=args.config, faults=faults, **options,
        )  # fmt: skip
    except RuntimeError as error:
        raise CardError(f"cards cannot be simulated: {error}") from error
    with simulation:
        status = _run(program, os.environ | simulation.environment)
    for card in simulation.cards:
        for complaint in card.complaints:
            print(f"nearkv xrt-sim: card {card.index}: {complaint}", file=sys.stderr)
    return status


def _run(program: list[str], environment: dict[str, str]) -> int:
    """Its exit status, as a shell tells it."""
    try:
        process = subprocess.Popen(program, env=environment)
    except OSError as error:
        raise ValueError(f"cannot run {program[0]}: {error.strerror}") from error
    # Ctrl-C reaches the program by itself; of a request to end it is told.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
