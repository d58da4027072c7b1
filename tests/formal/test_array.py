# SPDX-License-Identifier: Apache-2.0
"""The array hands out the sums of each block, whole and in order."""

from amaranth import Mux, Signal, signed

from nearkv_hw import array

LANES, BITS = 4, 3


def test_every_block_leaves_once_with_its_own_sums_by_induction(bench, monkeypatch):
    """Lane n of a block leaves n cycles after lane 0, with the sum of that block's products and of
    nothing else, when blocks end at least as many cycles apart as there are lanes.

    With 4 lanes and 3-bit factors; neither number has a part in the argument.
    """
    monkeypatch.setattr(array, "LANES", LANES)
    monkeypatch.setattr(array, "ALIGNED_BITS", BITS)
    monkeypatch.setattr(array, "WEIGHT_BITS", BITS)
    monkeypatch.setattr(array, "ACC_BITS", 2 * BITS + 2)
    b, m = bench, bench.m
    dut = b.add(array.MacArray(1))
    step, latency = dut.step, array.MacArray.latency
    ends = step.valid & step.last

    age = b.ghost(4, "age", init=LANES)
    m.d.sync += age.eq(Mux(ends, 1, Mux(age == LANES, LANES, age + 1)))
    b.assume(age == LANES, when=ends)

    leaves = 0
    for lane in range(LANES):
        now, total = Signal(signed(2 * BITS + 2)), b.ghost(signed(2 * BITS + 2), "total")
        m.d.comb += now.eq(Mux(step.first, 0, total) + dut.w[0] * dut.x[lane])
        with m.If(step.valid):
            m.d.sync += total.eq(now)
        out_now = b.ago(ends, latency + lane)
        leaves |= out_now
        b.claim(dut.o_valid & (dut.o_lane == lane), when=out_now)
        b.claim(dut.o_sum[0] == b.ago(now, latency + lane), when=out_now)
        # The accumulator follows, as far behind as its lane.
        b.claim(dut.inside("p")[0][lane] == b.ago(total, array.Mac.latency - 1 + lane))
    b.claim(dut.o_valid == leaves)
    b.cover(dut.o_valid & (dut.o_lane == 0) & b.before(dut.o_valid & (dut.o_lane == LANES - 1)))
    b.prove(depth=latency + 2 * LANES + 2, reach=20)
