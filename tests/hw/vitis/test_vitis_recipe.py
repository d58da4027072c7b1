# SPDX-License-Identifier: Apache-2.0
"""What is made for Vitis: boards, ports, kernel.xml, link configuration, the host's contract."""

import json
from pathlib import Path
import re
import subprocess

import pytest

from nearkv_hw import abi, number
from nearkv_hw.config import preset
from nearkv_hw.vitis import boards, build, recipe
from nearkv_hw.vitis.interface import Interface, Kernel, Port, read_ports

from .conftest import CARDS

ROOT = Path(__file__).parents[3]


# --- boards ---


def test_the_boards_are_those_that_are_promised():
    assert boards.names() == sorted(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_engines_share_out_the_memory_of_the_card(name):
    memories, regions, gib = CARDS[name]
    board = boards.load(name)
    assert sum(engine.memory_mib for engine in board.engines) == gib << 10
    assert all((engine.slr or 0) < regions for engine in board.engines)
    named = []
    for engine in board.engines:
        span = re.fullmatch(r"(\w+)\[(\d+):(\d+)\]", engine.memory)
        named += (
            [f"{span[1]}[{i}]" for i in range(int(span[2]), int(span[3]) + 1)]
            if span
            else [engine.memory]
        )
    assert len(set(named)) == len(named)
    assert set(named) <= set(memories)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"xilinx_u250_gen3x16_xdma_4_1_202210_1"', '"u250"', "platform must be the name"),
        ("xcu250-figd2104-2L-e", "u250", "part must be"),
        ('"2022.1", "2024.2"', '"2024.2", "2022.1"', "oldest and the newest"),
        ('["2022.1", "2024.2"]', '"2022.1"', "vitis must be two versions"),
        ('"2022.1"', "2022.1", "two versions"),
        ('config = "smartssd"', 'config = "huge"', "config must be one of tiny, smartssd"),
        ("kernel_mhz = 250", "kernel_mhz = 2500", "whole number of MHz"),
        ("kernel_mhz = 250", "kernel_mhz = 250.0", "whole number of MHz"),
        ("kernel_mhz = 250", "kernel_mhz = 250\nclock = 1", "unknown: clock"),
        ("kernel_mhz = 250", "", "missing: kernel_mhz"),
        ("kernel_mhz = 250", "kernel_mhz = ", "not TOML"),
        ('"DDR[1]"', '"DDR1"', "memory of an engine must be a tag"),
        ('"DDR[1]"', '"DDR[0]"', "named twice"),
        ("slr = 1", "slr = -1", "slr of DDR"),
        ("slr = 1", "region = 1", "unknown: region"),
        ("memory_mib = 16384\nslr = 1", "memory_mib = 0\nslr = 1", "whole number of MiB"),
    ],
)
def test_a_wrong_board_is_refused_by_key(old, new, message):
    text = (boards.FOLDER / "u250.toml").read_text()
    assert boards.parse("u250", text) == boards.load("u250")
    assert old in text
    with pytest.raises(ValueError, match=f"u250.*{re.escape(message)}"):
        boards.parse("u250", text.replace(old, new, 1))


def test_an_unknown_board_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="smartssd, u200, u250, u280, u50, u55c"):
        boards.load("vck5000")


# --- ports of the Verilog ---

BOTH_STYLES = {
    "in the body": """
        // module nearkv(x); in a comment
        module other(a); input [3:0] a; wire nearkv; endmodule
        (* keep *) module nearkv(ap_clk, \\data , q, w1);
          (* mark *) input ap_clk;
          wire ap_clk;
          /* input [3:0] q; */ input wire [63:0] \\data ;
          output reg [7:0] q, w1;
          initial $display("input x; endmodule");
          always @(*) if (ap_clk) q = 1;
          function f; input [1:0] inner; f = inner[0]; endfunction
          always @* begin q = 2; end
        endmodule""",
    "in the header": """
        module nearkv (input ap_clk, input wire [63:0] data,
                       output reg [7:0] q, w1); assign x = 1; endmodule
        module later(input other); endmodule""",
}


@pytest.mark.parametrize("style", BOTH_STYLES)
def test_ports_are_read_from_both_styles_of_declaration(style):
    assert read_ports(BOTH_STYLES[style]) == {
        "ap_clk": Port("input", 1), "data": Port("input", 64), "q": Port("output", 8),
        "w1": Port("output", 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("module other(a); input a; endmodule", "no module 'nearkv'"),
        ("module nearkv(a); endmodule", "not both: a"),
        ("module nearkv(a); input a; input b; endmodule", "not both: b"),
        ("module nearkv(a, a); input a; endmodule", "lists twice"),
        ("module nearkv #(parameter W = 2) (input [W:0] a); endmodule", "has parameters"),
        ("module nearkv(input [W:0] a); endmodule", "no plain number"),
        ("module nearkv(a); input [3:0] a", "the Verilog ends"),
        ("module nearkv(input 3); endmodule", "not understood"),
    ],
)
def test_ports_that_are_not_understood_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_ports(text)


@pytest.mark.verilog
def test_a_simulator_reads_the_same_ports(emitted, tmp_path):
    from nearkv_sim import rtl

    try:
        environment = rtl.verilator_environment()
    except rtl.BuildError as error:
        pytest.skip(str(error))
    text = emitted("generic")
    (tmp_path / "nearkv.v").write_text(text)
    subprocess.run(
        ["verilator", "--json-only", "--top-module", "nearkv", "-Wno-fatal", "nearkv.v"],
        cwd=tmp_path, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    tree = json.loads((tmp_path / "obj_dir" / "Vnearkv.tree.json").read_text())
    types = {}

    def gather(node):
        for inner in node.values() if isinstance(node, dict) else node:
            if isinstance(inner, dict | list):
                gather(inner)
        if isinstance(node, dict) and "addr" in node:
            types[node["addr"]] = node

    gather(tree["miscsp"])
    (top,) = (module for module in tree["modulesp"] if module["name"] == "nearkv")
    ports = {}
    for node in top["stmtsp"]:
        if node.get("direction") in ("INPUT", "OUTPUT"):
            high, _, low = types[node["dtypep"]].get("range", "0:0").partition(":")
            ports[node["name"]] = Port(node["direction"].lower(), int(high) - int(low) + 1)
    assert read_ports(text) == ports


# --- the interface ---


@pytest.mark.slow
def test_the_emitted_kernel_is_one_that_vitis_takes(text):
    ports = read_ports(text)
    interface = Interface.of(ports)
    assert [bus.name for bus in interface.buses] == ["s_axi_control", "m_axi_kv", "m_axi_job"]
    assert [(bus.reads, bus.writes) for bus in interface.buses] == [
        (True, True), (True, False), (True, True)
    ]  # fmt: skip
    assert interface.interrupt == ("interrupt" in ports)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ap_clk": None}, "ap_clk is missing"),
        ({"ap_rst_n": Port("output", 1)}, "ap_rst_n must be an input of 1 bit"),
        ({"interrupt": Port("input", 1)}, "interrupt must be an output"),
        ({"interrupt": Port("output", 2)}, "interrupt must be an output of 1 bit"),
        ({"led": Port("output", 1)}, "led belongs to no interface"),
        ({"m_axi_kv_arvalid": None}, "m_axi_kv_arvalid is missing"),
        ({"m_axi_kv_rlast": None}, "m_axi_kv_rlast is missing"),
        ({"m_axi_kv_arlen": Port("output", 4)}, "m_axi_kv_arlen must have 8 bits, not 4"),
        ({"m_axi_kv_araddr": Port("output", 40)}, "addresses of 64 bits, not 40"),
        ({"m_axi_kv_rdata": Port("input", 500)}, "power of two"),
        ({"m_axi_kv_rdata": Port("input", 256)}, "m_axi_kv must be 512 bits wide"),
        ({"m_axi_kv_rready": Port("input", 1)}, "m_axi_kv_rready must be an output"),
        ({"m_axi_kv_rid": None}, "arid and rid must be there together"),
        ({"m_axi_kv_arlook": Port("output", 1)}, "m_axi_kv_arlook is no signal of AXI4"),
        ({"m_axi_job_wstrb": Port("output", 32)}, "m_axi_job_wstrb must have a bit for each byte"),
        ({"m_axi_job_wdata": Port("output", 256)}, "data has different widths"),
        ({"m_axi_job_bready": None}, "m_axi_job_bready is missing"),
        ({"m_axi_more_arvalid": Port("output", 1)}, "the AXI4 masters must be"),
        ({"s_axi_control_awaddr": Port("input", 5), "s_axi_control_araddr": Port("input", 5)},
         "4096 bytes of addresses"),
        ({"s_axi_control_wdata": Port("input", 64)}, "s_axi_control_wdata must have 32 bits"),
        ({"s_axi_control_arlen": Port("input", 8)}, "no signal of AXI4-Lite"),
        ({"s_axi_more_arvalid": Port("input", 1)}, "the one AXI4-Lite slave"),
    ],
)  # fmt: skip
def test_ports_that_vitis_would_not_take_are_named(text, change, message):
    ports = read_ports(text) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        Interface.of({name: port for name, port in ports.items() if port})


# --- kernel.xml ---


def test_kernel_xml_says_what_the_abi_says(made):
    kernel = Kernel.from_xml(made.files["kernel.xml"])
    assert (kernel.name, kernel.protocol) == ("nearkv", "ap_ctrl_hs")
    writable = [register for register in abi.REGISTERS if register.writable]
    assert [(a.name, a.offset, 8 * a.size, a.port) for a in kernel.arguments] == [
        (r.name, r.offset, r.bits, r.port) for r in writable
    ]
    assert [a.pointer for a in kernel.arguments] == [r.port != "s_axi_control" for r in writable]
    assert {p.name: (p.mode, p.data_bits, p.range_bytes) for p in kernel.ports} == {
        "s_axi_control": ("slave", 32, abi.CONTROL_BYTES),
        "m_axi_kv": ("master", 512, 2**64 - 1),
        "m_axi_job": ("master", 512, 2**64 - 1),
    }
    # What XRT and PYNQ find behind the arguments: every word is inside of the register block.
    assert max(a.offset + a.size for a in kernel.arguments) <= abi.CONTROL_BYTES


@pytest.mark.parametrize(
    "old, new",
    [
        ('offset="0x01C"', 'offset="0x020"'), ('size="0x4"', 'size="0x8"'),
        ('id="1"', 'id="7"'), ('port="m_axi_job"', 'port="m_axi_kv"'),
        ('addressQualifier="1"', 'addressQualifier="0"'), ('dataWidth="512"', 'dataWidth="256"'),
        ('mode="slave"', 'mode="master"'), ('range="0x1000"', 'range="0x10000"'),
        ('interrupt="', 'interrupt="maybe'), ("ap_ctrl_hs", "ap_ctrl_chain"),
        ('name="queue"', 'name="q"'), ('vlnv="nearkv:', 'vlnv="other:'), ("<args>", "<arguments>"),
        ('hostSize="0x8"', 'hostSize="0x4"'), ("uint", "unsigned long"),
    ],
)  # fmt: skip
def test_a_change_of_kernel_xml_is_noticed(made, old, new):
    text = made.files["kernel.xml"]
    assert old in text
    right = Kernel.from_xml(text)
    assert right == Kernel.of(made.interface)
    try:
        got = Kernel.from_xml(text.replace(old, new, 1))
    except ValueError:
        return  # noticed while reading it
    assert got != right


def test_an_interrupt_port_comes_in_by_itself(with_interrupt, without_interrupt, board):
    for text, there in ((with_interrupt, True), (without_interrupt, False)):
        made = recipe.make(board, "hw", Interface.of(read_ports(text)), preset("tiny"))
        assert Kernel.from_xml(made.files["kernel.xml"]).interrupt == there
        for word in ("infer_bus_interface interrupt", "IP_ISR", "IP_IER", "GIER"):
            assert (word in made.files["package.tcl"]) == there


# --- link configuration and the host ---


@pytest.mark.parametrize("name", CARDS)
def test_every_engine_is_connected_to_its_own_memory(name, text):
    board = boards.load(name)
    made = recipe.make(board, "hw", Interface.of(read_ports(text)), preset("tiny"))
    sections = recipe.read_link(made.files["link.cfg"])
    assert sections[""] == {"kernel_frequency": [f"0:{board.kernel_mhz}"]}
    connectivity = sections["connectivity"]
    assert connectivity["nk"] == [f"nearkv:{len(board.engines)}"]
    memory = {unit["name"]: unit["memory"] for unit in made.host["compute_units"]}
    assert list(memory.values()) == [engine.memory for engine in board.engines]
    assert sorted(connectivity["sp"]) == sorted(
        f"{unit}.{port}:{tag}" for unit, tag in memory.items() for port in ("m_axi_kv", "m_axi_job")
    )
    regions = {unit["name"]: unit["slr"] for unit in made.host["compute_units"]}
    assert connectivity.get("slr", []) == [
        f"{unit}:SLR{slr}" for unit, slr in regions.items() if slr is not None
    ]
    assert [unit["shard"] for unit in made.host["compute_units"]] == list(range(len(memory)))


@pytest.mark.parametrize("name", CARDS)
def test_the_host_is_told_what_kernel_xml_says(name, text):
    made = recipe.make(boards.load(name), "hw", Interface.of(read_ports(text)), preset("tiny"))
    kernel = Kernel.from_xml(made.files["kernel.xml"])
    assert [
        (a["index"], a["name"], a["kind"] == "buffer", a["port"], a["bytes"], a["offset"])
        for a in made.host["arguments"]
    ] == [
        (i, a.name, a.pointer, a.port, a.size, a.offset) for i, a in enumerate(kernel.arguments)
    ]  # fmt: skip
    assert made.host["constants"] == {r.name: r.offset for r in abi.REGISTERS if not r.writable}
    units = made.host["compute_units"]
    assert sum(unit["memory_bytes"] for unit in units) == CARDS[name][2] << 30
    assert [unit["xrt_name"] for unit in units] == [f"nearkv:{{{unit['name']}}}" for unit in units]


def test_emulation_is_linked_without_steps_of_implementation(text, board):
    interface = Interface.of(read_ports(text))
    hw, emulated = (recipe.make(board, t, interface, preset("tiny")) for t in recipe.TARGETS)
    assert "vivado" in recipe.read_link(hw.files["link.cfg"])
    assert "vivado" not in recipe.read_link(emulated.files["link.cfg"])
    with pytest.raises(ValueError, match="TARGET must be hw or hw_emu"):
        recipe.make(board, "sw_emu", interface, preset("tiny"))


def test_a_line_that_is_no_configuration_is_refused():
    with pytest.raises(ValueError, match="line 2"):
        recipe.read_link("[connectivity]\nnk nearkv\n")


def test_the_masters_announce_what_they_do(made):
    masters = {bus.name: bus for bus in made.interface.masters}
    kv = recipe.bus_parameters(masters["m_axi_kv"], preset("smartssd"))
    assert kv["MAX_BURST_LENGTH"] == abi.BURST_BYTES // abi.BEAT_BYTES
    assert kv["SUPPORTS_NARROW_BURST"] == 0
    # Enough that the FIFO can be filled by bursts of a page's length.
    assert kv["NUM_READ_OUTSTANDING"] * 64 >= preset("smartssd").beat_fifo_beats
    assert "NUM_WRITE_OUTSTANDING" not in kv
    assert recipe.bus_parameters(masters["m_axi_job"], preset("tiny"))["NUM_WRITE_OUTSTANDING"]


@pytest.mark.parametrize("name", CARDS)
def test_the_recorded_recipe_is_the_one_that_is_made(name, text):
    board = boards.load(name)
    made = recipe.make(board, "hw", Interface.of(read_ports(text)), preset(board.config))
    recorded = json.loads((ROOT / "bitstreams" / name / "recipe.json").read_text())
    assert recorded == made.summary(), f"run: make bitstream BOARD={name}"


# --- reports ---

TIMING = """
------------------------------------------------------------------------------------------------
| Design Timing Summary
| ---------------------
------------------------------------------------------------------------------------------------

    WNS(ns)      TNS(ns)  TNS Failing Endpoints  TNS Total Endpoints      WHS(ns)      THS(ns)  THS Failing Endpoints  THS Total Endpoints     WPWS(ns)     TPWS(ns)  TPWS Failing Endpoints  TPWS Total Endpoints  
    -------      -------  ---------------------  -------------------      -------      -------  ---------------------  -------------------     --------     --------  ----------------------  --------------------  
     -0.134       -5.128                     78                35323        0.010        0.000                      0                35323        2.050        0.000                       0                116980  


Timing constraints are not met.
"""  # noqa: W291, as Vivado writes it
UTILISATION = """
+---------------------+------------------+------------------+-------------------+----------------+---------------+----------------+
| Name                | LUT              | LUTAsMem         | REG               | BRAM           | URAM          | DSP            |
+---------------------+------------------+------------------+-------------------+----------------+---------------+----------------+
| Platform            |  96960 [ 11.14%] |  12130 [  3.01%] |  144105 [  8.27%] |  133 [  9.90%] |   0 [  0.00%] |    4 [  0.07%] |
| User Budget         | 773760 [100.00%] | 390590 [100.00%] | 1599255 [100.00%] | 1211 [100.00%] | 640 [100.00%] | 5948 [100.00%] |
|    Used Resources   | 170364 [ 22.02%] |   7681 [  1.97%] |  192009 [ 12.01%] |   63 [  5.20%] |   0 [  0.00%] |  160 [  2.69%] |
| nearkv              | 170364 [ 22.02%] |   7681 [  1.97%] |  192009 [ 12.01%] |   63 [  5.20%] |   0 [  0.00%] |  160 [  2.69%] |
|    nearkv_1         |  70364 [ 22.02%] |   3681 [  1.97%] |   92009 [ 12.01%] |   33 [  5.20%] |   0 [  0.00%] |   60 [  2.69%] |
+---------------------+------------------+------------------+-------------------+----------------+---------------+----------------+
"""


def test_timing_is_read():
    assert build.read_timing(TIMING) == {
        "wns_ns": -0.134, "tns_ns": -5.128, "setup_failing_endpoints": 78,
        "whs_ns": 0.010, "ths_ns": 0.0, "hold_failing_endpoints": 0,
    }  # fmt: skip


def test_utilisation_is_read():
    rows = build.read_utilisation(UTILISATION)
    assert rows["nearkv_1"] == {
        "lut": 70364, "lut_memory": 3681, "register": 92009, "bram36": 33, "uram": 0, "dsp": 60,
    }  # fmt: skip
    assert list(rows) == ["Platform", "User Budget", "Used Resources", "nearkv", "nearkv_1"]


@pytest.mark.parametrize("reader", [build.read_timing, build.read_utilisation])
@pytest.mark.parametrize(
    "text", ["", "WNS(ns)  TNS(ns)\n", "  WNS(ns)  TNS(ns)\n  -----  -----\n  1.0\n"]
)
def test_a_report_without_its_table_is_refused(reader, text):
    with pytest.raises(ValueError, match="in it|columns"):
        reader(text)


def test_the_clock_is_that_of_ap_clk():
    info = "".join(
        f"   Name: {name}\n   Type: {kind}\n   Requested Freq: 250 MHz\n   Achieved Freq: {mhz} MHz\n\n"
        for name, kind, mhz in (
            ("ii_level0_wire_ulp_m_aclk_ctrl_00", "FIXED", "50"),
            ("ulp_ucs_aclk_kernel_01", "SCALABLE", "500"),
            ("ulp_ucs_aclk_kernel_00", "SCALABLE", "221.5"),
        )
    )
    assert build.read_clock_mhz(info) == 221.5
    assert build.read_clock_mhz("Clocks: none") is None


def test_the_hash_of_the_numbers_changes_with_each_of_them(monkeypatch):
    hashes = {number.contract_hash()}
    assert hashes == {number.contract_hash()}
    for name, value in (("P_BITS", 16), ("EXP2_SEGMENTS", 8), ("MAX_TILES", 1024)):
        monkeypatch.setattr(number, name, value)
        hashes.add(number.contract_hash())
    monkeypatch.undo()
    monkeypatch.setattr(number, "exp2", lambda fraction: fraction)
    hashes.add(number.contract_hash())
    assert len(hashes) == 5
