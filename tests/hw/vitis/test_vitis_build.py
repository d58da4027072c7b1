# SPDX-License-Identifier: Apache-2.0
"""`make bitstream` from end to end: with stand-ins for the vendor's tools, and without any."""

import hashlib
import json
from pathlib import Path
import subprocess
import sys

import pytest

from nearkv_hw import abi, number
from nearkv_hw.config import preset
from nearkv_hw.vitis import boards, build, recipe
from nearkv_hw.vitis.interface import Interface, Kernel, read_ports

from .conftest import CARDS

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command; returns its status, what it wrote, its two folders."""

    def runner(name="u250", target="hw", *more):
        work, results = tmp_path / "work", tmp_path / "results"
        status = build.main(
            ["--board", name, "--target", target, "--work", str(work), "--results", str(results),
             *more]
        )  # fmt: skip
        return status, capsys.readouterr(), work, results

    return runner


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def calls(log: Path) -> list[tuple[str, list[str]]]:
    return [
        (call["command"], call["arguments"])
        for call in map(json.loads, log.read_text().splitlines())
    ]


# --- without Vitis ---


@pytest.mark.parametrize("name", CARDS)
def test_without_vitis_all_is_made_and_the_missing_thing_is_named(name, run, no_tools, tiny_builds):
    status, said, work, results = run(name)
    assert status == 1
    newest = boards.load(name).vitis[1]
    for text in ("missing: vivado", f"install Vitis {newest}", f"Vitis/{newest}/settings64.sh",
                 f"make bitstream BOARD={name} TARGET=hw"):  # fmt: skip
        assert text in said.err
    assert said.err.count("missing") == 1
    assert "Traceback" not in said.err + said.out
    text = (work / recipe.VERILOG).read_text()
    kernel = Kernel.from_xml((work / recipe.KERNEL_XML).read_text())
    assert kernel == Kernel.of(Interface.of(read_ports(text)))
    assert {path.name for path in work.iterdir()} == {
        recipe.VERILOG, recipe.KERNEL_XML, recipe.PACKAGE, recipe.LINK, recipe.CONSTRAINTS,
        "identity.json",
    }  # fmt: skip
    identity = json.loads((work / "identity.json").read_text())
    assert identity["verilog_sha256"] == sha256(work / recipe.VERILOG)
    assert [path.name for path in results.iterdir()] == ["recipe.json"]


@pytest.mark.slow
def test_the_command_needs_nothing_but_its_board(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nearkv_hw.vitis", "--board", "smartssd"],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": str(Path(build.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 1
    assert "missing: vivado" in done.stderr
    assert "Traceback" not in done.stderr
    made = json.loads((tmp_path / "bitstreams/smartssd/recipe.json").read_text())
    assert made["compute_units"][0]["memory"] == "bank0"
    identity = json.loads((tmp_path / "build/bitstream/smartssd-hw/identity.json").read_text())
    assert identity["config_hash"] == f"{preset('smartssd').hash32:08x}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "which board? one of smartssd, u200"),
        (["--board", "u42"], "no board 'u42'; choose one of smartssd"),
        (["--board", "u50", "--target", "sw_emu"], "TARGET must be hw or hw_emu"),
        (["--board", "u50", "--timeout-hours", "0"], "above 0"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        build.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, no_tools, tiny_builds, capsys):
    (tmp_path / "file").write_text("")
    assert build.main(["--board", "u50", "--work", str(tmp_path / "file" / "work")]) == 1
    assert "cannot write" in capsys.readouterr().err


# --- with stand-ins ---


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_with_the_tools_it_runs_to_the_manifest(name, run, stand_ins, tiny_builds):
    status, said, work, results = run(name)
    assert status == 0, said.err
    board = boards.load(name)
    manifest = json.loads((results / "manifest.hw.json").read_text())
    config = preset(board.config)
    assert manifest["verilog_sha256"] == sha256(work / recipe.VERILOG)
    assert manifest["config_hash"] == f"{config.hash32:08x}"
    assert manifest["numerics_hash"] == number.contract_hash()
    assert manifest["abi_version"] == abi.ABI_VERSION
    assert manifest["xclbin_sha256"] == sha256(results / manifest["xclbin"])
    assert manifest["recipe_sha256"] == {n: sha256(work / n) for n in manifest["recipe_sha256"]}
    assert set(manifest["recipe_sha256"]) == {
        recipe.KERNEL_XML, recipe.PACKAGE, recipe.LINK, recipe.CONSTRAINTS
    }  # fmt: skip
    assert manifest["tools"]["vivado"] == manifest["tools"]["v++"] == "2022.2"
    assert (manifest["platform"], manifest["part"]) == (board.platform, board.part)
    assert manifest["clocks"] == {
        "requested_mhz": board.kernel_mhz, "achieved_mhz": board.kernel_mhz
    }  # fmt: skip
    assert manifest["timing"]["wns_ns"] == 0.021
    units = [unit["name"] for unit in manifest["compute_units"]]
    assert len(units) == len(board.engines)
    assert set(units) <= set(manifest["utilisation"])
    # The figures of one compute unit, as the stand-in reports them.
    assert manifest["utilisation"][units[-1]]["dsp"] == 262
    assert manifest["utilisation"]["nearkv"]["dsp"] == 262 * len(units)
    for stage in build.STAGES:
        assert f" {stage}\n" in said.out
    assert "Run vpl: Step impl: Completed" in said.out


def test_emulation_gets_plain_verilog_and_a_description_of_the_card(
    run, stand_ins, tiny_builds, emitted
):
    status, said, work, results = run("u50", "hw_emu")
    assert status == 0, said.err
    assert (work / recipe.VERILOG).read_text() == emitted("generic")
    manifest = json.loads((results / "manifest.hw_emu.json").read_text())
    assert manifest["family"] == "generic"
    assert "timing" not in manifest
    assert (results / "emconfig.json").is_file()
    assert (results / "nearkv.hw_emu.xclbin").is_file()


def packaged(log: Path) -> dict:
    """What a run of package.tcl made of the IP, from its calls alone."""
    ip = {"buses": {}, "clocked": [], "registers": {}, "inferred": {}, "core": {}}
    for command, arguments in calls(log):
        rest = [word for word in arguments if not word.startswith("-")]
        if command == "ipx::infer_bus_interface":
            ip["inferred"][rest[0]] = rest[1]
        elif command == "ipx::associate_bus_interfaces" and "-busif" in arguments:
            ip["clocked"].append(arguments[arguments.index("-busif") + 1])
        elif command == "ipx::add_register":
            ip["registers"][rest[0]] = {}
        elif command == "set_property" and (at := rest[-1].split(":", 1))[0] == "register":
            ip["registers"][at[1]][rest[0]] = rest[1]
        elif command == "set_property" and at[0] == "register_parameter":
            ip["registers"][at[1].split("/")[0]]["bus"] = rest[1]
        elif command == "set_property" and at[0] == "bus_parameter" and rest[0] == "value":
            bus, _, name = at[1].partition("/")
            ip["buses"].setdefault(bus, {})[name] = int(rest[1])
        elif command == "set_property" and at[0] == "core":
            ip["core"][rest[0]] = rest[1]
    return ip


@pytest.mark.parametrize("which", ["with_interrupt", "without_interrupt"])
def test_verilog_kernel_xml_and_tcl_describe_one_kernel(which, request, stand_ins, board, tmp_path):
    text = request.getfixturevalue(which)
    made = package(tmp_path, text, board)
    ports = read_ports(text)
    ip = packaged(stand_ins)
    kernel = Kernel.from_xml((tmp_path / "kernel.xml").read_text())

    buses = [port.name for port in kernel.ports]
    assert ip["clocked"] == buses
    signals = [name for name in ports if not name.startswith(tuple(f"{bus}_" for bus in buses))]
    assert sorted(ip["inferred"]) == sorted(signals)
    assert kernel.interrupt == ("interrupt" in signals) == (which == "with_interrupt")
    for name, kind in (("ap_clk", "clock"), ("ap_rst_n", "reset"), ("interrupt", "interrupt")):
        if name in signals:
            assert ip["inferred"][name] == f"xilinx.com:signal:{kind}_rtl:1.0"

    own = {"CTRL", "GIER", "IP_IER", "IP_ISR"} if kernel.interrupt else {"CTRL"}
    arguments = {argument.name: argument for argument in kernel.arguments}
    assert set(ip["registers"]) == own | set(arguments)
    for name, argument in arguments.items():
        register = ip["registers"][name]
        assert int(register["address_offset"], 0) == argument.offset
        assert int(register["size"]) == 8 * argument.size
        assert register.get("bus", "s_axi_control") == argument.port
    control = {
        "CTRL": abi.REG_CTRL,
        "GIER": abi.REG_GIER,
        "IP_IER": abi.REG_IER,
        "IP_ISR": abi.REG_ISR,
    }
    for name in own:
        assert int(ip["registers"][name]["address_offset"], 0) == control[name]

    for port in kernel.ports:
        if port.mode == "master":
            parameters = ip["buses"][port.name]
            assert parameters["MAX_BURST_LENGTH"] == 64
            assert parameters["SUPPORTS_NARROW_BURST"] == 0
            assert parameters["NUM_READ_OUTSTANDING"] >= 2
            assert ports[f"{port.name}_rdata"].bits == port.data_bits
    assert ip["core"]["sdx_kernel"] == "true"
    assert ip["core"]["vitis_drc"] == f"ctrl_protocol {kernel.protocol}"
    assert f"nearkv:kernel:{ip['core']['name']}:{ip['core']['version']}" == kernel.vlnv
    assert (tmp_path / recipe.XO).read_text() == made.files["kernel.xml"]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"STANDIN_VERSION": "2019.2"}, "vivado is 2019.2, but xilinx_u250"),
        (
            {"STANDIN_VERSION": "2026.1"},
            "is built with Vitis 2022.1 to 2024.2; install Vitis 2024.2",
        ),
        ({"STANDIN_VERSION": "unknown"}, "names no version"),
    ],
)
def test_a_version_that_does_not_know_the_platform_ends_the_build_at_once(
    environment, message, run, stand_ins, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "verilog", None)  # not called
    status, said, work, _ = run()
    assert status == 1
    assert message in said.err
    assert not work.exists()


def test_tools_of_two_installations_are_refused(run, stand_ins, tmp_path):
    tool = tmp_path / "bin" / "v++"
    tool.unlink()
    tool.write_text("#!/bin/sh\necho '****** v++ v2023.1 (64-bit)'\n")
    tool.chmod(0o755)
    status, said, _, _ = run()
    assert status == 1
    assert "vivado is 2022.2 and v++ is 2023.1" in said.err


def test_a_missing_linker_or_platform_is_named(run, stand_ins, tiny_builds, tmp_path, monkeypatch):
    path = tmp_path / "platforms" / boards.load("u250").platform
    (path / f"{path.name}.xpfm").unlink()
    status, said, work, _ = run()
    assert status == 1
    assert f"missing: the platform {path.name} is in none of {tmp_path / 'platforms'}" in said.err
    assert "PLATFORM_REPO_PATHS" in said.err
    assert not (work / recipe.XO).exists()
    (tmp_path / "bin" / "v++").unlink()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    status, said, _, _ = run()
    assert "missing: v++ of Vitis" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, messages",
    [
        ({"STANDIN_FAIL": "impl"},
         ["link: v++ ended with status 1", "ERROR: [VPL 18-1000] Routing results", "link.out"]),
        ({"STANDIN_FAIL": "silent"},
         ["link: v++ did not write nearkv.hw.xclbin", "link.out"]),
        ({"STANDIN_FAIL": "noreport"}, ["no timing report", "it is not used"]),
        ({"STANDIN_WNS": "-0.134"},
         ["timing is missed by 0.134 ns", "did not lower the clock of 250 MHz", "u250.toml"]),
    ],
)  # fmt: skip
def test_a_failure_names_its_stage_the_last_error_and_the_log(
    environment, messages, run, stand_ins, tiny_builds, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, said, work, results = run()
    assert status == 1
    for message in messages:
        assert message in said.err
    assert "Traceback" not in said.err
    assert not (results / "manifest.hw.json").exists()
    assert not (results / "nearkv.hw.xclbin").exists()
    if "link.out" in messages:
        assert str(work / "logs" / "link.out") in said.err
        assert "create_project" in (work / "logs" / "link.out").read_text()


def test_a_clock_that_was_lowered_is_told(run, stand_ins, tiny_builds, monkeypatch):
    monkeypatch.setenv("STANDIN_WNS", "-0.400")
    monkeypatch.setenv("STANDIN_MHZ", "221.5")
    status, said, _, results = run()
    assert status == 0, said.err
    manifest = json.loads((results / "manifest.hw.json").read_text())
    assert manifest["clocks"] == {"requested_mhz": 250, "achieved_mhz": 221.5}
    assert "250 MHz asked, 221.5 MHz" in said.out


@pytest.mark.slow
def test_what_an_earlier_build_left_is_never_taken_for_this_one(
    run, stand_ins, tiny_builds, monkeypatch
):
    status, said, work, _ = run()
    assert status == 0, said.err
    monkeypatch.setenv("STANDIN_FAIL", "silent")
    status, said, _, _ = run()
    assert (status, "did not write" in said.err) == (1, True)
    monkeypatch.setenv("STANDIN_FAIL", "noreport")
    status, said, _, _ = run()
    assert (status, "no timing report" in said.err) == (1, True)
    assert not list((work / "reports").rglob("*.rpt"))


@pytest.mark.slow
def test_a_tool_that_does_not_end_is_ended(tmp_path):
    script = "import os, time; print('ERROR-free', os.getpid(), flush=True); time.sleep(3600)"
    with pytest.raises(build.BuildError, match=r"has not ended after .* --timeout-hours.* Log: "):
        build.run_stage("link", [sys.executable, "-c", script], tmp_path, tmp_path / "log",
                        tmp_path / "none", timeout_s=2)  # fmt: skip
    words = (tmp_path / "log").read_text().split()
    if words:  # else it was ended before it could say
        assert not Path(f"/proc/{words[1]}").exists()


@pytest.mark.slow
def test_an_interrupted_build_ends_its_tool(run, stand_ins, tiny_builds, monkeypatch):
    monkeypatch.setenv("STANDIN_FAIL", "hang")
    started, say, popen = [], build.say, build.subprocess.Popen

    def interrupt(text):
        if "Step impl: Completed" in text:
            raise KeyboardInterrupt
        say(text)

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(build, "say", interrupt)
    monkeypatch.setattr(build.subprocess, "Popen", start)
    status, said, _, _ = run()
    assert status == 130
    assert "interrupted" in said.err
    assert all(process.poll() is not None for process in started)


def test_a_tool_that_cannot_start_is_named(tmp_path):
    with pytest.raises(build.BuildError, match="nosuchtool does not start"):
        build.run_stage(
            "package", ["nosuchtool"], tmp_path, tmp_path / "log", tmp_path / "none", 60
        )


# --- what the stand-ins catch, so that a run to the end says something ---


def package(folder: Path, text: str, board, change=("", "", "")) -> recipe.Recipe:
    """Write the kernel and its recipe, change one of the files, package it. Raises if that fails."""
    made = recipe.make(board, "hw", Interface.of(read_ports(text)), preset("tiny"))
    files = {recipe.VERILOG: text, **made.files}
    name, old, new = change
    if name:
        assert old in files[name], "nothing to change"
        files[name] = files[name].replace(old, new, 1)
    for path, content in files.items():
        (folder / path).write_text(content)
    (folder / recipe.LOGS).mkdir(exist_ok=True)
    build.run_stage(
        "package", made.package_command, folder, folder / "log", folder / recipe.XO, 600
    )
    return made


TCL, XML, VERILOG = recipe.PACKAGE, recipe.KERNEL_XML, recipe.VERILOG
XDC = recipe.CONSTRAINTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new, message",
    [
        (TCL, "create_project -force", "create_project -forced", "unknown option '-forced'"),
        (TCL, "ipx::save_core", "ipx::safe_core", 'invalid command name "ipx::safe_core"'),
        (TCL, "-part xcu250-figd2104-2L-e", "-part u250", "part 'u250' is unknown"),
        (TCL, "add_files -norecurse ./nearkv.v", "add_files -norecurse ./nearkv.sv", "does not exist"),
        (TCL, "set_property top nearkv", "set_property top kernel", "no top module 'kernel'"),
        (TCL, "-fileset sources_1", "-fileset sources_2", "is no fileset"),
        (TCL, "-library kernel ", "", "-library is missing"),
        (TCL, "./ip/component.xml\nset", "./ap/component.xml\nset", "is no packaged IP"),
        (TCL, "clock_rtl", "clok_rtl", "is unknown"),
        (TCL, "ipx::infer_bus_interface ap_rst_n", "ipx::infer_bus_interface ap_rst", "there is no port"),
        (TCL, "-clock ap_clk -reset ap_rst_n", "-clock ap_clk -reset ap_clk", "'ap_clk' is no reset"),
        (TCL, "-busif m_axi_job", "-busif m_axi_jobs", "is no bus"),
        (TCL, "ipx::associate_bus_interfaces -busif m_axi_kv -clock ap_clk $core\n", "",
         "'m_axi_kv' has no clock"),
        (TCL, "ipx::infer_bus_interface ap_rst_n xilinx.com:signal:reset_rtl:1.0 $core\n", "",
         "'ap_rst_n' is no reset"),
        (TCL, "MAX_BURST_LENGTH", "MAX_BURST_LEN", "'MAX_BURST_LEN' is unknown"),
        (TCL, "MAX_BURST_LENGTH 64", "MAX_BURST_LENGTH 640", "must be 1 to 256"),
        (TCL, "value_source constant", "value_sauce constant", "has no property 'VALUE_SAUCE'"),
        (TCL, "value_source constant", "value_source fixed", "is no value for property"),
        (TCL, "address_offset 0x01C", "address_offset 0x020", "the offset of job is '28'"),
        (TCL, "address_offset 0x01C", "address_offset 0x014", "registers overlap"),
        (TCL, "address_offset 0x038", "address_offset 0x1000", "outside of 's_axi_control/reg0'"),
        (TCL, "size 64", "size 32", "must have 64 bits"),
        (TCL, "value m_axi_kv $parameter", "value m_axi_job $parameter", "the port of kv"),
        (TCL, "value m_axi_kv $parameter", "value s_axi_control $parameter", "is no AXI master"),
        (TCL, "add_register queue", "add_register que", "the IP has no register 'queue'"),
        (TCL, "bit_offset 2", "bit_offset 1", "overlap"),
        (TCL, "add_register CTRL", "add_register CONTROL", "register 'CTRL' must lie at"),
        (TCL, "slave_memory_map_ref s_axi_control", "slave_memory_map_ref control", "has no memory map"),
        (TCL, "range 0x1000", "range 0x2000", "the range of s_axi_control"),
        (TCL, "set_property sdx_kernel true $core\n", "", "'SDX_KERNEL'"),
        (TCL, "ctrl_protocol ap_ctrl_hs", "ctrl_protocol ap_ctrl_chain", "the protocol"),
        (TCL, "ctrl_protocol ap_ctrl_hs", "ctrl_protocol ap_ctrl", "is no value for property"),
        (TCL, "set_property version 1.0", "set_property version 1.1", "the VLNV"),
        (TCL, "ipx::check_integrity -kernel $core\n", "", "not checked and saved"),
        (TCL, "ipx::save_core $core\n", "", "not checked and saved"),
        (TCL, "-xo_path ./nearkv.xo", "-xo ./nearkv.xo", "unknown option '-xo'"),
        (TCL, "-xo_path ./nearkv.xo", "-xo_path", "too many positional arguments: 'nearkv'"),
        (TCL, "-kernel_name nearkv", "-kernel_name near", "the name"),
        (TCL, "$core]]\nset_property value", "$core]\nset_property value", "missing close-bracket"),
        (TCL, "ipx::update_checksums $core", "ipx::update_checksums", "expects 1 positional"),
        (TCL, "ipx::update_checksums $core", "ipx::update_checksums $bus", "is no core"),
        (XML, 'offset="0x01C"', 'offset="0x020"', "the offset of job is '32'"),
        (XML, 'size="0x4" offset="0x030"', 'size="0x8" offset="0x030"', "the size of n_jobs"),
        (XML, 'name="m_axi_kv"', 'name="m_axi_gmem"', "a port 'm_axi_gmem', the IP has not"),
        (XML, 'dataWidth="512"', 'dataWidth="256"', "the width of m_axi_kv"),
        (XML, 'mode="slave"', 'mode="master"', "the mode of s_axi_control"),
        (XML, 'range="0x1000"', 'range="0x10000"', "the range of s_axi_control"),
        (XML, 'port="m_axi_job" size', 'port="m_axi_kv" size', "the port of job"),
        (XML, 'addressQualifier="1" id="0"', 'addressQualifier="0" id="0"', "the kind of kv"),
        (XML, 'id="3"', 'id="4"', "the id of n_jobs"),
        (XML, 'name="summary"', 'name="total"', "no register 'total'"),
        (XML, 'vlnv="nearkv:', 'vlnv="other:', "the VLNV"),
        (XML, 'interrupt="', 'interrupt="not ', "interrupt is"),
        (XDC, "-period 4.000", "-periods 4.000", "unknown option '-periods'"),
        (XDC, "-period 4.000", "-period fast", "'fast' is no period"),
        (XDC, "get_ports ap_clk", "get_ports clk", "no port 'clk'"),
        (VERILOG, "  output m_axi_kv_arvalid;\n", "  output m_axi_kv_arwalid;\n",
         "'arvalid' is not there"),
        (VERILOG, "  input ap_rst_n;\n", "  input ap_reset;\n", "there is no port 'ap_rst_n'"),
        (VERILOG, "  input s_axi_control_wvalid;\n", "", "'wvalid' is not there"),
        (VERILOG, "  output [63:0] m_axi_job_araddr;", "  output [31:0] m_axi_job_araddr;",
         "no 64-bit addresses"),
        (VERILOG, "  input [511:0] m_axi_kv_rdata;", "  input [255:0] m_axi_kv_rdata;",
         "the width of m_axi_kv"),
        (VERILOG, "  input ap_clk;\n", "  input ap_clk;\n  output led;\n", "not supported: led"),
    ],
)  # fmt: skip
def test_what_is_broken_on_purpose_does_not_package(
    file, old, new, message, text, board, stand_ins, tmp_path
):
    with pytest.raises(build.BuildError) as failed:
        package(tmp_path, text, board, (file, old, new))
    assert message in (tmp_path / "log").read_text()
    assert "package: vivado ended with status 1" in str(failed.value)
    assert not (tmp_path / recipe.XO).exists()


def test_what_is_not_broken_packages(text, board, stand_ins, tmp_path):
    package(tmp_path, text, board)
    assert (tmp_path / recipe.XO).is_file()


LINK = recipe.LINK


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[connectivity]", "[connections]", "unrecognised section 'connections'"),
        ("[vivado]", "[vivada]", "unrecognised section 'vivada'"),
        ("nk=nearkv:4", "nk=near:4", "there is no kernel 'near'"),
        ("nk=nearkv:4", "nk=nearkv", "is no value for 'nk'"),
        ("nk=nearkv:4", "nk=nearkv:3", "there is no compute unit 'nearkv_4'"),
        ("nk=nearkv:4", "nk=nearkv:5", "no sp for nearkv_5.m_axi_job"),
        ("nk=", "nkernel=", "unrecognised option 'nkernel'"),
        ("sp=nearkv_2.m_axi_kv:DDR[1]\n", "", "no sp for nearkv_2.m_axi_kv"),
        ("m_axi_kv:DDR[1]", "m_axi_kv:DDR[4]", "the platform has no memory 'DDR[4]'"),
        ("m_axi_kv:DDR[1]", "m_axi_kv:DDR 1", "is no value for 'sp'"),
        ("m_axi_kv:DDR[1]", "m_axi_v:DDR[1]", "no memory port 'm_axi_v'"),
        ("sp=nearkv_2.m_axi_kv", "sp=nearkv_1.m_axi_kv", "is connected already"),
        ("slr=nearkv_4:SLR3", "slr=nearkv_4:SLR4", "no such compute unit or region"),
        ("slr=nearkv_4:SLR3", "slr=nearkv_3:SLR3", "placed already"),
        ("slr=nearkv_4:SLR3", "slr=nearkv_4:3", "is no value for 'slr'"),
        ("kernel_frequency=0:250", "kernel_frequency=fast", "is no value for 'kernel_frequency'"),
        ("kernel_frequency", "kernel_freq", "unrecognised option 'kernel_freq'"),
        ("PHYS_OPT_DESIGN.IS_ENABLED", "PHYS_OPT.IS_ENABLED", "is no value for 'prop'"),
        ("PLACE_DESIGN.ARGS.DIRECTIVE=Explore", "PLACE_DESIGN.ARGS.DIRECTIVE=Try", "is no value"),
        ("prop=run", "property=run", "unrecognised option 'property'"),
    ],
)
def test_a_broken_link_configuration_does_not_link(
    old, new, message, made, text, board, stand_ins, tmp_path
):
    package(tmp_path, text, board)
    content = made.files[LINK]
    assert old in content
    (tmp_path / LINK).write_text(content.replace(old, new, 1))
    with pytest.raises(build.BuildError):
        link(tmp_path, made)
    assert message in (tmp_path / "link.log").read_text()


def link(folder: Path, made: recipe.Recipe, change=("", "")) -> None:
    tools = build.find_tools(made.board, "hw")
    command = made.link_command(str(tools.platform))
    command = [
        new for word in command for new in ([word] if word != change[0] else change[1].split())
    ]
    build.run_stage("link", command, folder, folder / "link.log", folder / made.xclbin, 600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, message",
    [
        ("--link", "--lynk", "unrecognised option '--lynk'"),
        ("--link", "--link --compile", "exactly one of"),
        ("--target", "--targets", "unrecognised option"),
        ("hw", "hardware", "is no value for '--target'"),
        ("--temp_dir", "--temp-dir", "unrecognised option '--temp-dir'"),
        ("--save-temps", "--save_temps", "unrecognised option '--save_temps'"),
        ("nearkv.xo", "", "takes kernel objects"),
        ("link.cfg", "lunk.cfg", "configuration 'lunk.cfg' is not found"),
        ("nearkv.hw.xclbin", "nearkv.hw.bit", "is no value for '--output'"),
    ],
)
def test_a_broken_command_line_does_not_link(
    old, new, message, made, text, board, stand_ins, tmp_path
):
    package(tmp_path, text, board)
    link(tmp_path, made)
    with pytest.raises(build.BuildError):
        link(tmp_path, made, (old, new))
    assert message in (tmp_path / "link.log").read_text()
