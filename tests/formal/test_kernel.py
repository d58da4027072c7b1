# SPDX-License-Identifier: Apache-2.0
"""What a block or tile reserves is enough: no result meets a full queue, no weight is read too late."""

from types import SimpleNamespace

from amaranth import Elaboratable, Module, Mux, Value
from amaranth.lib import stream

from nearkv_hw.align import Align
from nearkv_hw.array import MacArray
from nearkv_hw.config import preset
from nearkv_hw.fetch import KvFetch
from nearkv_hw.jobs import JobReader
from nearkv_hw.kernel import Kernel
from nearkv_hw.merge import v_layout
from nearkv_hw.products import Products, base_latency
from nearkv_hw.shapes import LANES
from nearkv_hw.softmax import Softmax, TileHead, raw_layout


def only_parts(*components):
    """Components of which only a method, or the signals, have a place in the proof."""
    for component in components:
        component._MustUse__used = True
    return components


def issuing(b, dut, ages=63):
    """Claim of an aligner in `dut` where its counters may be. Cycles since its last end, up to `ages`."""
    align = dut.align
    block, valid = align.i_block.p.block, align.i_block.valid
    last = b.ghost(6, "last", init=ages)
    b.m.d.sync += last.eq(Mux(align.end, 1, Mux(last == ages, ages, last + 1)))
    row, age = dut.inside("align.row"), Mux(last > 33, 33, last)
    b.claim(dut.inside("align.gap") == 33 - age)
    b.claim((row < block.rows) & valid & (age + block.rows >= 33 + row), when=row != 0)
    b.claim(last != 0)
    return last


class Results(Elaboratable):
    """Aligner, array and what `Kernel` puts behind them; softmax and merge are left to the proof."""

    def __init__(self):
        self.config = preset("tiny")
        rows = self.config.rows
        self.align, self.array = Align(rows), MacArray(rows)
        self.softmax = SimpleNamespace(
            i_raw=stream.Signature(raw_layout(rows)).flip().create(path=("raw",)),
            i_head=stream.Signature(TileHead).flip().create(path=("head",)),
        )
        self.merge = SimpleNamespace(
            i_v=stream.Signature(v_layout(rows)).flip().create(path=("v",))
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.align, m.submodules.array = self.align, self.array
        m.d.comb += self.array.step.eq(self.align.o_step)
        (kernel,) = only_parts(Kernel(self.config))
        kernel._results(m, self.align, self.array, self.softmax, self.merge)
        self.probes = kernel.probes
        return m


def test_sums_of_a_begun_block_find_room_by_induction(bench):
    """K sums, V sums, tile heads and what goes with them never meet a full queue; each sum leaves
    with its own block's shift and lanes, K and V not confused; for any softmax and merge."""
    b, m = bench, bench.m
    dut = b.add(Results())
    align, shown = dut.align, dut.align.i_block
    block = shown.p.block
    array, softmax, merge = dut.array, dut.softmax, dut.merge
    for name, signal in (
        ("block", shown.payload), ("block_valid", shown.valid), ("raw_ready", softmax.i_raw.ready), ("head_ready", softmax.i_head.ready),
        ("v_ready", merge.i_v.ready),
    ):  # fmt: skip
        b.port(name, signal)
    b.assume_stream(shown)
    lanes, is_v = block.lanes, block.is_v
    b.assume((block.rows != 0) & (block.rows <= 256) & (lanes <= LANES), when=shown.valid)

    raw, v, heads, leaving = (dut.inside(name) for name in ("raw", "v", "heads", "leaving"))
    for queue in (raw, v, heads, leaving):
        b.claim(queue.i.ready, when=queue.i.valid)
    b.claim(leaving.o.valid, when=array.o_valid)
    b.cover(raw.i.valid & (array.o_lane == 1))

    # The last two ends determine what is on the way: cycles since each, up to 63.
    last, before = issuing(b, dut), b.ghost(6, "before", init=63)
    oldest = Mux(align.end, last, before)
    m.d.sync += before.eq(Mux(oldest == 63, 63, oldest + 1))
    drain = align.latency + MacArray.latency
    oldest = Mux(before < drain + LANES, before, last)
    draining = (oldest >= drain) & (oldest < drain + LANES)
    b.claim((before >= last + LANES - 1) | (before == 63))
    b.claim(array.o_valid == draining)
    b.claim(array.o_lane == oldest - drain, when=draining)
    b.claim(leaving.level == (last < drain + LANES) + (before < drain + LANES))
    b.claim(before != 0)
    active = (oldest >= drain - 2) & (oldest < drain + LANES - 2)
    b.claim(
        dut.inside("array.active") == (active | ((last >= drain - 2) & (last < drain + LANES - 2)))
    )
    second = (last >= drain - 2) & (last < drain + LANES - 2)
    b.claim(dut.inside("array.lane") == Mux(second, last, oldest)[:6] - (drain - 2),
            when=dut.inside("array.active"))  # fmt: skip

    # What they were of.
    of_block = Value.cast(shown.p)
    of_last, of_before = (b.ghost(len(of_block), f"of_{which}") for which in ("last", "before"))
    with m.If(align.end):
        m.d.sync += [of_last.eq(of_block), of_before.eq(of_last)]

    # What is reserved: by the block that is being issued, by those that are leaving, and in queue.
    row, level = dut.inside("align.row"), leaving.level
    b.claim_queue(dut, "leaving")
    k_due = Mux((row != 0) & ~is_v, lanes, 0)
    v_due = Mux((row != 0) & is_v, LANES, 0)
    out = Mux(draining, array.o_lane, 0)
    for n in range(2):
        word = b.entry(dut, "leaving", n, leaving.o.p.shape())
        done = out if n == 0 else 0
        there = level > n
        of = shown.p.shape()(Mux(level == n + 1, of_last, of_before))
        b.claim((word.is_v == of.block.is_v) & (word.lanes == of.block.lanes), when=there)
        b.claim(Value.cast(word.exponents) == Value.cast(of.exponents), when=there)
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
    b.prove(depth=drain + 1, reach=drain + 3)


class Weights(Elaboratable):
    """Aligner, and the memories that `Kernel` puts beside it."""

    def __init__(self):
        self.config = preset("tiny")
        self.align = Align(self.config.rows)

    def elaborate(self, platform):
        m = Module()
        m.submodules.align = self.align
        rows, head_dim = self.config.rows, self.config.max_head_dim
        beats = self.config.beat_fifo_beats
        kernel, jobs, fetch, products, array, softmax = only_parts(
            Kernel(self.config), JobReader(rows, head_dim),
            KvFetch(head_dim, beats, self.config.lookahead_tiles), Products(rows, beats),
            MacArray(rows), Softmax(rows),
        )  # fmt: skip
        kernel._weights(m, jobs, fetch, products, self.align, array, softmax)
        self.probes = {"q_free": jobs.q_free, "p_free": softmax.p_free, "done": products.done}
        return m


def test_query_weights_stay_until_they_are_read_by_induction(bench):
    """A bank of the q store is given back once for each job, and no row of K reads its exponent or its
    weights from a bank that was given back. For any blocks whose K passes come job by job."""
    b, m = bench, bench.m
    dut = b.add(Weights())
    align, shown = dut.align, dut.align.i_block
    block = shown.p.block
    for name, signal in (("block", shown.payload), ("valid", shown.valid), ("go", align.may_start)):
        b.port(name, signal)
    b.assume_stream(shown)
    b.assume((block.rows != 0) & (block.rows <= 256), when=shown.valid)
    issuing(b, dut)

    ended = align.end & ~block.is_v & block.pass_last & block.job_last
    bank = b.ghost(2, "bank")  # of the job whose K blocks come now
    m.d.sync += bank.eq(bank + ended)
    b.assume(block.q_bank == bank, when=shown.valid & ~block.is_v)

    q_free = dut.inside("q_free")
    unfreed = b.counter(ended, q_free, bits=2, name="unfreed")  # jobs ended
    b.claim(unfreed == sum((b.ago(ended, n) for n in range(1, align.latency + 1)), start=0))
    b.claim(unfreed != 0, when=q_free)
    b.cover(q_free)
    for address, cycles in (
        (align.q_address, base_latency(dut.config.rows) - 1),
        (align.weight_address, align.latency - 1),
    ):
        reads = b.ago(align.issued & ~block.is_v, cycles)
        ended_since = (bank - address[-2:])[:2]
        b.claim(ended_since <= unfreed, when=reads)
    b.claim(dut.inside("done") == (align.end & block.is_v))
    b.claim(dut.inside("p_free") == (align.end & block.is_v & block.pass_last))
    b.prove(depth=align.latency + 2, reach=align.latency + 3)
