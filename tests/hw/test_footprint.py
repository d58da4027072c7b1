# SPDX-License-Identifier: Apache-2.0
"""The figures of `make footprint`, from netlists small enough to count by hand."""

import copy
import json
from pathlib import Path
import re

import pytest

from nearkv_hw.config import PRESETS
from nearkv_hw.footprint import COMPONENTS, GOAL, Timing, count, growth, owner, split, stub

RECORDED = Path(__file__).parents[1] / "data" / "footprint.json"


def cell(kind, ins, outs):
    directions = dict.fromkeys(ins, "input") | dict.fromkeys(outs, "output")
    return {"type": kind, "port_directions": directions, "connections": {**ins, **outs}}


def netlist(cells, ports=None, names=()):
    return {
        "cells": dict(enumerate(cells)),
        "ports": {name: {"bits": bits} for name, bits in (ports or {}).items()},
        "netnames": {name: {"bits": [bit]} for name, bit in names},
    }


def register(d, q):
    return cell("FDRE", {"C": [1], "D": [d], "R": ["0"], "CE": ["1"]}, {"Q": [q]})


def test_sites_are_counted():
    kinds = ["LUT1", "LUT6", "SRL16E", "RAM32M16", "FDRE", "FDSE", "RAMB18E2", "RAMB36E2", "INV",
             "DSP48E2", "MUXF7"]  # fmt: skip
    got = count(netlist([cell(kind, {}, {}) for kind in kinds]))
    assert got == {"lut": 11, "srl": 1, "lut_ram": 8, "ff": 2, "dsp": 1, "bram36": 1.5, "uram": 0}


def test_the_longest_path_crosses_components():
    # register 10 -> (inside) LUT2's slow pin -> carry -> (outside) register
    carry = cell("CARRY4", {"CI": ["0"], "CYINIT": ["0"], "DI": ["0", "0", "0", "0"],
                            "S": [21, "0", "0", "0"]}, {"CO": [30, 31, 32, 33], "O": [40, 41, 42, 43]})  # fmt: skip
    lut = cell("LUT2", {"I0": [20], "I1": ["1"]}, {"O": [21]})
    inside = netlist([lut, carry], {"i": [20], "o": [43]})
    box = cell("nearkv.kernel.align", {"i": [10]}, {"o": [11]})
    outside = netlist([register("0", 10), box, register(11, 12)], names=[("start", 10)])
    timing = Timing(
        {"kernel": ("nearkv", outside), "align": ("nearkv.kernel.align", inside)}, "kernel"
    )
    (ps, path), *_ = timing.worst()
    assert ps == 77 + 50 + 154 + 25
    assert "kernel: start[0]" in path[0]
    (levels, _), *_ = timing.worst(cells=0, wire=1)
    assert levels == 1  # the rest stays in the slice


def test_a_combinational_loop_is_refused(refuses):
    loop = [cell("LUT1", {"I0": [2]}, {"O": [3]}), cell("LUT1", {"I0": [3]}, {"O": [2]})]
    with refuses("a combinational loop"):
        Timing({"kernel": ("nearkv", netlist(loop))}, "kernel").worst()


def test_a_cell_without_delays_is_refused(refuses):
    unknown = netlist([cell("FIFO36E2", {}, {})])
    with refuses("no delays are known for cell FIFO36E2"):
        Timing({"kernel": ("nearkv", unknown)}, "kernel")


def test_every_module_belongs_to_one_component():
    assert owner("nearkv") == owner("nearkv.kernel") == owner("nearkv.kernel.tiles") == "kernel"
    assert owner("nearkv.kernel.fetch.crc$12") == "fetch.crc"
    assert owner("nearkv.kernel.fetch.master") == "fetch"
    text = "module nearkv(a, b);\n  input a;\n  output b;\n  wire c;\nendmodule\n"
    assert split(text + text.replace("nearkv", r"\\nearkv.kernel ")) == {
        "nearkv": text, "nearkv.kernel": text.replace("nearkv", r"\\nearkv.kernel ")
    }  # fmt: skip
    assert "wire" not in stub(text)
    assert re.findall("input a|output b", stub(text)) == ["input a", "output b"]


@pytest.mark.parametrize("name", PRESETS)
def test_growth_is_seen(name):
    old = json.loads(RECORDED.read_text())[name]
    assert growth(old, old) == []
    new = copy.deepcopy(old)
    new["total"]["lut"] = int(old["total"]["lut"] * 1.031)
    new["components"]["array"]["dsp"] *= 2
    assert [line.split(":")[0] for line in growth(old, new)] == ["total lut", "array dsp"]


def test_the_record_meets_the_goals():
    """What the CRC costs does not count. Where this fails, so does `make footprint`."""
    cost = json.loads(RECORDED.read_text())["smartssd"]
    assert set(cost["components"]) == {*COMPONENTS, "kernel"}
    crc = cost["components"]["fetch.crc"]
    for key, limit in GOAL.items():
        assert cost["total"][key] - (0 if key == "delay_ps" else crc[key]) <= limit, key
