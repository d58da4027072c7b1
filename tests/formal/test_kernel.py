# SPDX-License-Identifier: Apache-2.0
"""What a block or tile reserves is enough: no result meets a full queue."""

from types import SimpleNamespace

from amaranth import Elaboratable, Module, Mux, Signal
from amaranth.lib import stream

from nearkv_hw.align import Align
from nearkv_hw.array import MacArray
from nearkv_hw.config import preset
from nearkv_hw.kernel import Kernel
from nearkv_hw.merge import v_layout
from nearkv_hw.shapes import LANES
from nearkv_hw.softmax import P_BANKS, TileHead, raw_layout


class Results(Elaboratable):
    """Aligner, array and what `Kernel` puts behind them; softmax and merge are left to the proof."""

    def __init__(self):
        self.config = preset("tiny")
        rows = self.config.rows
        self.align, self.array = Align(), MacArray(rows)
        self.softmax = SimpleNamespace(
            i_raw=stream.Signature(raw_layout(rows)).flip().create(path=("raw",)),
            i_head=stream.Signature(TileHead).flip().create(path=("head",)),
            p_ready=Signal(),
        )
        self.merge = SimpleNamespace(
            i_v=stream.Signature(v_layout(rows)).flip().create(path=("v",))
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.align, m.submodules.array = self.align, self.array
        m.d.comb += self.array.step.eq(self.align.o_step)
        kernel = Kernel(self.config)
        kernel._MustUse__used = True  # only this part of it
        kernel._results(m, self.align, self.array, self.softmax, self.merge)
        self.probes = kernel.probes
        return m


def test_sums_of_a_begun_block_find_room_by_induction(bench):
    """K sums, V sums, tile heads and what goes with them never meet a full queue; each sum leaves
    with its own block's shift and lanes, K and V not confused; for any softmax and merge."""
    b, m = bench, bench.m
    dut = b.add(Results())
    align, block = dut.align, dut.align.i_block
    array, softmax, merge = dut.array, dut.softmax, dut.merge
    for name, signal in (
        ("block", block.payload), ("block_valid", block.valid), ("p_ready", softmax.p_ready),
        ("raw_ready", softmax.i_raw.ready), ("head_ready", softmax.i_head.ready),
        ("v_ready", merge.i_v.ready),
    ):  # fmt: skip
        b.port(name, signal)
    b.assume_stream(block)
    lanes, is_v = block.p.lanes, block.p.is_v
    b.assume((block.p.rows != 0) & (block.p.rows <= 256) & (lanes <= LANES), when=block.valid)

    raw, v, heads, leaving = (dut.inside(name) for name in ("raw", "v", "heads", "leaving"))
    for queue in (raw, v, heads, leaving):
        b.claim(queue.i.ready, when=queue.i.valid)
    b.claim(leaving.o.valid, when=array.o_valid)
    b.cover(raw.i.valid & (array.o_lane == 1))

    # The last two ends determine what is on the way: cycles since each, up to 63.
    def older(age, restart, value):
        after = Mux(age == 63, 63, age + 1)
        m.d.sync += age.eq(Mux(restart, value, after))
        return after

    last, before = b.ghost(6, "last", init=63), b.ghost(6, "before", init=63)
    older(before, align.end, older(last, align.end, 1))
    drain = Align.latency + MacArray.latency
    oldest = Mux(before < drain + LANES, before, last)
    draining = (oldest >= drain) & (oldest < drain + LANES)
    b.claim((before >= last + LANES - 1) | (before == 63))
    b.claim(array.o_valid == draining)
    b.claim(array.o_lane == oldest - drain, when=draining)
    b.claim(leaving.level == (last < drain + LANES) + (before < drain + LANES))
    b.claim((last != 0) & (before != 0))
    active = (oldest >= drain - 1) & (oldest < drain + LANES - 1)
    b.claim(
        dut.inside("array.active") == (active | ((last >= drain - 1) & (last < drain + LANES - 1)))
    )
    second = (last >= drain - 1) & (last < drain + LANES - 1)
    b.claim(dut.inside("array.lane") == Mux(second, last, oldest)[:6] - (drain - 1),
            when=dut.inside("array.active"))  # fmt: skip

    row, gap = dut.inside("align.row"), dut.inside("align.gap")
    age = Mux(last > 33, 33, last)
    b.claim(gap == 33 - age)
    b.claim((row < block.p.rows) & block.valid & (age + block.p.rows >= 33 + row), when=row != 0)

    # What is reserved: by the block that is being issued, by those that are leaving, and in queue.
    b.claim_queue(dut, "leaving")
    k_due = Mux((row != 0) & ~is_v, lanes, 0)
    v_due = Mux((row != 0) & is_v, LANES, 0)
    out = Mux(draining, array.o_lane, 0)
    for n in range(2):
        word = b.entry(dut, "leaving", n, leaving.o.p.shape())
        done = out if n == 0 else 0
        there = leaving.level > n
        b.claim(word.lanes <= LANES, when=there)
        left = Mux(word.lanes > done, word.lanes - done, 0)
        k_due += Mux(there & ~word.is_v, left, 0)
        v_due += Mux(there & word.is_v, LANES - done, 0)
    b.claim(dut.inside("raw_held") == k_due + raw.level)
    b.claim(dut.inside("v_held") == v_due + v.level)
    for queue, name in ((raw, "raw"), (v, "v")):
        b.claim_queue(dut, name)
        b.claim(dut.inside(f"{name}_held") <= queue.depth)
    b.claim_queue(dut, "heads")

    # p: a V pass begins only when its weights are there; the softmax has that many banks.
    taken = align.begin & is_v & block.p.pass_first
    ready = b.counter(softmax.p_ready, taken, bits=8, name="ready")
    b.assume(ready < P_BANKS, when=softmax.p_ready)
    b.claim(ready != 0, when=taken)
    b.claim(dut.inside("p_ready") == ready)
    b.claim(ready <= P_BANKS)
    b.prove(depth=drain + 1, reach=16)
