# SPDX-License-Identifier: Apache-2.0
"""The emitted Verilog: reproducible, free of what tools get wrong, and changed only knowingly."""

import hashlib
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

from nearkv_hw.config import PRESETS, preset

pytestmark = pytest.mark.verilog
RECORDED = Path(__file__).parents[1] / "data" / "verilog.sha256"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """Path of a preset's Verilog, emitted by the command line under a hash seed; once each."""
    done = {}

    def emit(name: str, hash_seed: int = 0) -> Path:
        if (name, hash_seed) not in done:
            folder = tmp_path_factory.mktemp(f"{name}-{hash_seed}")
            command = [sys.executable, "-m", "nearkv_hw.emit", "--config", name, "-o", str(folder)]
            environment = {"PYTHONHASHSEED": str(hash_seed), "PATH": ""}
            if path := os.environ.get("PYTHONPATH"):  # of sources that are not installed
                environment["PYTHONPATH"] = path
            subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
            done[name, hash_seed] = folder / f"nearkv_{name}.v"
        return done[name, hash_seed]

    return emit


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_sources_give_the_same_bytes(emitted, name):
    first, second = emitted(name, 0), emitted(name, 1)
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_bytes() == second.with_suffix(".json").read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_the_verilog_is_the_recorded_one(emitted, name):
    """A change of the hardware shows in the diff."""
    recorded = dict(reversed(line.split()) for line in RECORDED.read_text().splitlines())
    digest = hashlib.sha256(emitted(name).read_bytes()).hexdigest()
    file = f"nearkv_{name}.v"
    assert recorded[file] == digest, "the Verilog changed; if on purpose: make record-verilog"


@pytest.mark.parametrize("name", PRESETS)
def test_the_manifest_identifies_the_verilog(emitted, name):
    manifest = json.loads(emitted(name).with_suffix(".json").read_text())
    assert manifest["verilog_sha256"] == hashlib.sha256(emitted(name).read_bytes()).hexdigest()
    assert manifest["config_hash"] == f"{preset(name).hash32:08x}"
    assert manifest["config"]["name"] == name


@pytest.mark.parametrize("name", PRESETS)
def test_verilator_finds_nothing_wrong(emitted, tools, name):
    """But for what all generated Verilog looks like, and for the name that Vitis wants of the interrupt."""
    style = ("CASEINCOMPLETE", "DECLFILENAME", "PROCASSINIT", "SYMRSVDWORD", "UNUSEDSIGNAL",
             "VARHIDDEN", "WIDTHEXPAND", "WIDTHTRUNC")  # fmt: skip
    command = ["verilator", "--lint-only", "-Wall", "--top-module", "nearkv",
               *(f"-Wno-{warning}" for warning in style), str(emitted(name))]  # fmt: skip
    done = subprocess.run(command, env=tools, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "%Warning" not in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("name", PRESETS)
def test_every_module_has_a_body_and_exists(emitted, name):
    text = emitted(name).read_text()
    bodies = dict(re.findall(r"^module (\S+?)\(.*?\);\n(.*?)^endmodule", text, re.M | re.S))
    assert "nearkv" in bodies
    for module, body in bodies.items():
        assert re.search(r"\b(assign|always|initial)\b|^  \S+ \S+ \($", body, re.M), module


@pytest.mark.parametrize("name", PRESETS)
def test_block_memories_have_plain_synchronous_read_ports(emitted, name):
    """Transparent ports come out as a read outside of the clocked block, and Vivado mis-infers them
    (amaranth issue 1589). Only memories small enough for LUTs may be read without a clock, and the
    one that is meant to lie in them.
    """
    found = 0
    for body in re.split(r"^endmodule", emitted(name).read_text(), flags=re.M):
        for memory, last in re.findall(r"^  reg \[\d+:0\] (\w+) \[(\d+):0\];", body, re.M):
            if "jobs.beats.fifo" in body.partition("(")[0]:
                assert re.search(rf"assign .* = {memory}\[", body)
                assert int(last) < 128
            elif int(last) >= 64:
                assert re.search(rf"<= {memory}\[", body), f"{memory} is not read with a clock"
                assert not re.search(rf"assign .* = {memory}\[", body), memory
                found += 1
    assert found


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_tells_who_emitted_it(emitted, name):
    text = emitted(name).read_text()
    assert "src =" not in text
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
