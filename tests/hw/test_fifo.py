# SPDX-License-Identifier: Apache-2.0
"""Queues keep order and content, hold what they promise, and obey the stream rules."""

from amaranth.back import rtlil
from amaranth.hdl import Fragment
from amaranth.lib import data
import pytest

from nearkv_hw.fifo import Queue
from nearkv_hw.primitives import FAMILIES


@pytest.mark.parametrize("depth, ram", [(1, None), (4, None), (32, None), (33, None), (40, "lut")])
def test_queue_gives_back_what_it_was_given_in_order(bench, pauses, rng, depth, ram):
    dut = Queue(data.StructLayout({"a": 7, "b": 9}), depth, ram)
    items = [int(x) for x in rng.integers(1 << 16, size=200)]
    run = bench(dut)
    run.source(dut.i, items, pauses(0))
    out = run.sink(dut.o, pauses(1))
    levels = run.tap(1, dut.level)
    run.run(lambda: len(out) == len(items), extra=5)
    assert out.items == items
    assert max(level for (level,) in levels.items) <= depth + 1
    assert levels.items[-1] == (0,)


@pytest.mark.parametrize("depth, ram", [(8, None), (65, None), (65, "lut"), (65, "ultra")])
def test_queue_accepts_an_entry_every_cycle_and_passes_it_on_two_cycles_later(bench, depth, ram):
    dut = Queue(8, depth, ram)
    run = bench(dut)
    source, out = run.source(dut.i, range(100)), run.sink(dut.o)
    run.run(lambda: len(out) == 100)
    assert source.cycles == list(range(100))
    assert out.cycles == [cycle + 2 for cycle in source.cycles]


@pytest.mark.parametrize("depth", [1, 32, 33])
def test_queue_holds_depth_entries_and_one_at_its_output(bench, depth):
    dut = Queue(8, depth)
    run = bench(dut)
    source = run.source(dut.i, range(100))
    run.run(lambda: run.cycle == 80)
    assert len(source.cycles) == depth + 1


def test_queue_of_nothing_is_refused(refuses):
    with refuses("at least 1 entry, not 0"):
        Queue(8, 0)


def test_only_a_family_with_ultra_ram_is_asked_for_it():
    for family, ram, asked in (
        ("ultrascale_plus", "ultra", 1), ("generic", "ultra", 0), ("ultrascale_plus", "block", 0),
    ):  # fmt: skip
        dut = Queue(8, 65, ram)
        text = rtlil.convert(Fragment.get(dut, FAMILIES[family]), ports=[dut.level])
        assert text.count('attribute \\ram_style "ultra"') == asked
