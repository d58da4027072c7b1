# SPDX-License-Identifier: Apache-2.0
"""The figures of `make footprint`, from netlists small enough to count by hand."""

import copy
import json
from pathlib import Path
import re

import pytest

from nearkv_hw.config import PRESETS
from nearkv_hw.footprint import (
    COMPONENTS,
    GOAL,
    LIMIT_PS,
    Timing,
    count,
    growth,
    owner,
    split,
    stub,
    unbracket,
)

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
    (ps, component, path), *_ = timing.worst()
    assert (ps, component) == (77 + 50 + 154 + 25, "kernel")
    assert "kernel: start[0]" in path[0]
    (levels, *_), *_ = timing.worst(cells=0, wire=1)
    assert levels == 1  # the rest stays in the slice
    assert timing.worst(cells=1.2, wire=300)[0][0] == round(1.2 * ps + 300)


def test_an_end_belongs_to_the_component_whose_register_it_is():
    inside = netlist([register(20, 21)], {"i": [20]})
    box = cell("nearkv.kernel.align", {"i": [10]}, {})
    outside = netlist([register("0", 10), register(10, 12), box])
    timing = Timing(
        {"kernel": ("nearkv", outside), "align": ("nearkv.kernel.align", inside)}, "kernel"
    )
    assert sorted(component for _, component, _ in timing.worst(None)) == ["align", "kernel"]


def test_the_widest_net_and_control_sets_are_counted():
    cells = [register("0", 10), register(10, 11), register(10, 12)]
    cells[1]["connections"]["CE"] = [10]
    timing = Timing({"kernel": ("nearkv", netlist(cells, names=[("start", 10)]))}, "kernel")
    assert timing.fan_out() == (3, "kernel: start[0]")
    assert timing.control_sets() == 2


def test_names_that_look_like_bits_are_rewritten():
    assert unbracket(r"wire [3:0] \sums[1] ; assign \sums[1] [0] = x[2];") == (
        r"wire [3:0] \sums<1> ; assign \sums<1> [0] = x[2];"
    )


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


def test_one_late_end_more_is_seen_and_an_earlier_one_that_is_not_late_is_not():
    old = json.loads(RECORDED.read_text())["smartssd"]
    old["components"]["array"] |= {"routed_ps": 2_000, "late": 0}
    new = copy.deepcopy(old)
    new["components"]["array"]["routed_ps"] = LIMIT_PS
    assert growth(old, new) == []
    new["components"]["array"] |= {"routed_ps": LIMIT_PS + 1, "late": 1}
    assert growth(old, new) == ["array routed_ps: 2000 -> 3001", "array late: 0 -> 1"]


def test_the_record_meets_the_goals():
    """What the CRC costs does not count. Where this fails, so does `make footprint`."""
    cost = json.loads(RECORDED.read_text())["smartssd"]
    assert set(cost["components"]) == {*COMPONENTS, "kernel"}
    crc = cost["components"]["fetch.crc"]
    for key, limit in GOAL.items():
        assert cost["total"][key] - (0 if key == "delay_ps" else crc[key]) <= limit, key
