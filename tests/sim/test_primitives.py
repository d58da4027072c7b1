# SPDX-License-Identifier: Apache-2.0
"""With instances of multipliers everything is as without, cycle by cycle.

Our model of the DSP48E2, `nearkv_sim/rtl/dsp48e2.v`, was compared with the vendor's public simulation
model (XilinxUnisimLibrary): 200,000 random cycles of each mode, no difference.
"""

from pathlib import Path
import subprocess

from amaranth import Shape
from amaranth.back import verilog
import numpy as np
import pytest

from nearkv_hw import emit
from nearkv_hw.array import Mac
from nearkv_hw.primitives import FAMILIES
from nearkv_hw.softmax import Exp2, Score
import nearkv_sim
from nearkv_sim import rtl, workload
from nearkv_sim.workload import KINDS, random_job

pytestmark = pytest.mark.sim
DSP48E2, MULT18X18D = (
    Path(nearkv_sim.__file__).with_name("rtl") / name for name in ("dsp48e2.v", "mult18x18d.v")
)

_BENCH = """
module bench;
  reg clk = 0;
  reg [{bits}:0] in = 0;
  wire [{out_bits}:0] out0, out1;
  {instances}
  integer cycle, part;
  initial begin
    for (cycle = 0; cycle < 100000; cycle = cycle + 1) begin
      #1;
      if (out0 !== out1) begin
        $display("cycle %0d: %h %h", cycle, out0, out1);
        $fatal;
      end
      #4 clk = 1;
      #1;
      // Every input random, or all ones, or all zeros, or with its sign bit alone.
      for (part = 0; part <= {bits}; part = part + 1) in[part] = $urandom;
{extremes}
      #4 clk = 0;
    end
    $display("equal");
    $finish;
  end
endmodule
"""


@pytest.mark.parametrize(
    ("family", "name", "make"),
    [
        ("ultrascale_plus", "mac", Mac),
        ("ultrascale_plus", "mac_cascaded", lambda: Mac(cascaded=True)),
        ("ultrascale_plus", "score", Score),
        ("ultrascale_plus", "exp2", Exp2),
        ("ecp5", "mac", lambda: Mac(x_bits=18)),
    ],
)
def test_a_component_is_the_same_in_every_cycle(tools, tmp_path, monkeypatch, family, name, make):
    monkeypatch.setenv("AMARANTH_USE_YOSYS", "builtin")
    duts = {"generic": make(), family: make()}
    members = duts["generic"].signature.members
    ports = {port: Shape.cast(member.shape).width for port, member in members.items()}
    ins = [port for port, member in members.items() if member.flow.name == "In"]
    outs = [port for port in ports if port not in ins]
    text, instances, extremes, at = "", "", "", 0
    wires = {}
    for port in ins:
        wires[port] = f"in[{at + ports[port] - 1}:{at}]"
        extremes += (
            f"      case ($urandom % 12) 0: {wires[port]} = 0; 1: {wires[port]} = ~0; "
            f"2: begin {wires[port]} = 0; in[{at + ports[port] - 1}] = 1; end default: ; endcase\n"
        )
        at += ports[port]
    for n, (family, dut) in enumerate(duts.items()):
        module = f"{name}_{family}"
        text += verilog.convert(dut, name=module, platform=FAMILIES[family], emit_src=False)
        bits, pins = 0, {**wires, "clk": "clk", "rst": "1'b0"}
        for port in outs:
            pins[port] = f"out{n}[{bits + ports[port] - 1}:{bits}]"
            bits += ports[port]
        header = text[text.rindex(f"module {module}(") :].split(";")[0]
        used = [port for port in pins if port in header.replace("(", " ").replace(",", "").split()
                or f"{port})" in header]  # fmt: skip
        instances += f"{module} u{n} ({', '.join(f'.{p}({pins[p]})' for p in used)});\n  "
    bench = _BENCH.format(bits=at - 1, out_bits=bits - 1, instances=instances, extremes=extremes)
    (tmp_path / "bench.v").write_text(bench + text)
    command = [
        "verilator", "--binary", "--timing", "-Wno-fatal", "-Wno-lint", "-Wno-style",
        "--top-module", "bench", "-CFLAGS", "-std=c++20 -fcoroutines", "-MAKEFLAGS",
        rtl.MAKE_VARIABLES, "-o", "bench", "bench.v", str(DSP48E2), str(MULT18X18D),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=tools, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([tmp_path / "obj_dir" / "bench"], capture_output=True, text=True)
    assert "equal" in done.stdout, done.stdout[-1000:]


def test_the_kernel_with_dsp_instances_equals_the_model(open_rtl, assert_equals_model, monkeypatch):
    def emitted(config):
        return emit.verilog(config, "ultrascale_plus") + DSP48E2.read_text()

    monkeypatch.setattr(rtl, "emitted", emitted)
    rng = np.random.default_rng(48)
    card = open_rtl("tiny", stalls=0.1, seed=48)
    for kind in KINDS:
        jobs = [random_job(rng, card.config, kind=kind, max_tokens=500) for _ in range(4)]
        assert_equals_model(card, workload.place(jobs, rng))
