# SPDX-License-Identifier: Apache-2.0
"""The aligner equals its specification, and keeps its blocks whole and apart."""

from amaranth import Cat, Const, Mux, Signal
import pytest

from nearkv_hw.abi import KvType
from nearkv_hw.align import Align
from nearkv_hw.number import KV_BITS, KV_FORMATS
from nearkv_hw.products import base_latency
from nearkv_hw.shapes import LANES

ROWS = 2


def decode(element, form):
    """The significand, as high in its 22 bits as it may be, and the exponent field, at least 1."""
    fraction, field = element[: form.mantissa_bits], element[form.mantissa_bits : 15]
    significand = fraction + Mux(field == 0, 0, 1 << form.mantissa_bits)
    return (significand << form.align_bits)[: KV_BITS - 1], Mux(field == 0, 1, field)


@pytest.mark.parametrize("lane", [0, 13, 31])
def test_aligned_element_is_the_nearest_integer(bench, lane):
    """|x| is the integer nearest to |element| in units of the block, ties away from zero:

        2 |x| - 1  <=  2 * magnitude / 2^shift  <  2 |x| + 1

    with shift what the base exceeds its exponent field by: for V the base that is handed in, for K the
    block's exponent less the channel's. Complete, although it looks at a few cycles only: the pipeline
    has no memory, so its output depends on nothing earlier.
    """
    b = bench
    dut = b.add(Align(ROWS))
    block, later = dut.i_block.p.block, dut.latency
    from_beat = later - (base_latency(ROWS) - 1)  # cycles from a beat that is taken to its x
    element = b.ago(dut.i_beat.payload[16 * lane : 16 * lane + 16], from_beat)
    valid = b.ago(lane < block.lanes, later)
    is_v = b.ago(block.is_v, later)
    is_bf16 = b.ago(block.params.kv_type == KvType.BF16, later)
    of_k = b.ago(block.exponent, later) - b.ago(dut.q_exponent, from_beat - 1)
    base = Mux(is_v, b.ago(dut.base, later - base_latency(ROWS)), of_k)

    magnitude, field = Signal(KV_BITS - 1), Signal(8)
    for is_it, kv_type in ((~is_bf16, KvType.FP16), (is_bf16, KvType.BF16)):
        with b.m.If(is_it):
            value, e = decode(element, KV_FORMATS[kv_type])
            b.m.d.comb += [magnitude.eq(value), field.eq(e)]
    distance = base - field
    shift = Signal(5)
    b.m.d.comb += shift.eq(Mux(distance < 0, 0, Mux(distance > KV_BITS, KV_BITS, distance[:5])))
    x = dut.o_x[lane]
    size = Signal(KV_BITS)
    b.m.d.comb += size.eq(Mux(x < 0, -x, x))
    half = Const(1) << shift  # half a unit, in which the magnitude counts twice
    doubled = (size << shift) << 1
    settled = b.ago(Const(1), later)
    b.claim((magnitude << 1) + half >= doubled, when=settled & valid)
    b.claim((magnitude << 1) < doubled + half, when=settled & valid)
    b.claim((x == 0) | ((x < 0) == element[15]), when=settled & valid)
    b.claim(x == 0, when=settled & ~valid)
    b.claim(size <= 1 << KV_BITS - 1)
    b.cover(settled & (size == 3) & (shift == 20) & (x < 0))
    b.claim(dut.o_is_v == is_v, when=settled)
    b.bound(later + 3, reach=later + 3)


def test_blocks_are_whole_and_end_32_cycles_apart_by_induction(bench):
    """A block once begun issues a beat in each cycle, `rows` of them; any two ends are at least 32
    cycles apart, however short the blocks; steps and addresses come with their beats. If the beats of a
    block are queued before it shows, then one is there whenever one is taken."""
    b, m = bench, bench.m
    dut = b.add(Align(ROWS))
    stream, latency = dut.i_block, dut.latency
    block, wait = stream.p.block, base_latency(ROWS) - 1
    b.assume_stream(stream)
    b.assume((block.rows != 0) & (block.rows <= 256), when=stream.valid)

    age = b.ghost(6, "age", init=33)  # cycles since the last end, up to 33
    m.d.sync += age.eq(Mux(dut.end, 1, Mux(age == 33, 33, age + 1)))
    b.claim(age >= LANES, when=dut.end)
    b.cover(dut.end & (age == LANES) & (block.rows == 1))

    issued = b.ghost(9, "issued")  # beats of this block
    m.d.sync += issued.eq(Mux(dut.end, 0, issued + dut.issued))
    b.claim(dut.issued, when=issued != 0)
    b.claim(dut.end == (dut.issued & (issued + 1 == block.rows)))
    b.claim(dut.begin == (dut.issued & (issued == 0)))
    b.claim(dut.may_start, when=dut.begin)
    b.claim(stream.ready == dut.end)
    b.claim(dut.issued + dut.starved + dut.stalled == 1)
    b.claim(dut.place.row == issued, when=dut.issued & block.is_v & (block.rows <= 128))
    b.claim((dut.place.bank == stream.p.place.bank) & (dut.place.slot == stream.p.place.slot))
    step, is_v = dut.o_step, b.ago(block.is_v, latency)
    b.claim(step.valid == b.ago(dut.issued, latency))
    marks = b.ago(Cat(dut.begin, dut.end), latency)
    b.claim(Cat(step.first, step.last) == marks, when=step.valid)
    b.claim(dut.taken == (step.valid & step.last & ~is_v))
    q_row = Cat(issued[:8], block.q_bank)
    b.claim(dut.q_address == b.ago(q_row, wait))
    b.claim(dut.weight_address == b.ago(q_row, latency - 1))

    # Beats of blocks that were shown, and are not taken yet.
    b.claim(dut.i_beat.ready == b.ago(dut.issued, wait))
    shown = b.ghost(1, "shown")  # the block was there in the cycle before
    m.d.sync += shown.eq(stream.valid & ~stream.ready)
    announced = Mux(stream.valid & ~shown, block.rows, 0)
    untaken = b.counter(announced, dut.i_beat.ready, name="untaken")
    b.assume(dut.i_beat.valid, when=untaken + announced != 0)
    b.claim(dut.i_beat.valid, when=dut.i_beat.ready)
    on_the_way = sum((b.ago(dut.issued, cycles) for cycles in range(1, wait + 1)), start=0)
    b.claim(untaken == on_the_way + Mux(shown, block.rows - issued, 0))

    b.claim(dut.inside("row") == issued)
    b.claim(dut.inside("gap") == 33 - age)
    b.claim((issued < block.rows) & stream.valid & shown, when=issued != 0)
    b.claim(age + block.rows >= 33 + issued, when=issued != 0)
    b.prove(depth=latency + 2, reach=latency + 36)
