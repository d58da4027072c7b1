# SPDX-License-Identifier: Apache-2.0
"""Last stage: adds tiles into the running sums of a job, and writes the partial.

All sums are `number.Wide`: four limbs under a moving top. A tile's contribution is shifted by less
than 16 bits to reach the limb grid; older sums only move by whole limbs. So there is no rescaling
multiplier and no rounding that depends on order.
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from . import abi, shapes
from .axi import BEATS, ControlArgs, Span
from .fifo import Queue, delay, is_last
from .jobs import Faults, JobInfo, small_product
from .number import (
    ACC_BITS,
    EXPONENT_BITS,
    LIMB_BITS,
    LIMB_STEP,
    N_LIMBS,
    PLACE_BITS,
    RUN_MAX_EMPTY,
    SUM_SHIFT,
    TILE_MAX_BITS,
    TOP_BITS,
    WINDOW_TOP,
)
from .shapes import BEAT_BITS, BEAT_LOG2, LANES, LANES_LOG2
from .softmax import tile_sum_layout

V_QUEUE_CHANNELS = 512
_LIMB_LOG2 = exact_log2(LIMB_STEP)

Limbs = data.ArrayLayout(signed(LIMB_BITS), N_LIMBS)


class WideNumber(data.Struct):
    """A `number.Wide` as it is written to memory."""

    limbs: Limbs
    top: signed(8 * abi.WIDE_BYTES - N_LIMBS * LIMB_BITS)


def v_layout(rows: int) -> data.StructLayout:
    """The array's sums for one channel of a V block, and the exponent of each row."""
    return data.StructLayout(
        {
            "sums": data.ArrayLayout(signed(ACC_BITS), rows),
            "exponents": data.ArrayLayout(signed(EXPONENT_BITS), rows),
        }
    )


def job_end_layout(rows: int) -> data.StructLayout:
    """What is known of a job when its last tile has been added."""
    return data.StructLayout(
        {"run_max": data.ArrayLayout(signed(TILE_MAX_BITS), rows), "saturated": 1}
    )


class Accumulate(wiring.Component):
    """limbs/top (old) + o * 2^exponent, or the latter alone. Always ready.

    Members
    -------
    o : In(48 signed), |o| < 2^47; exponent : In(18 signed)
    fresh : In(1), there is no old sum
    old_top : In(14 signed), one cycle later; old : In(Limbs), two cycles later
    top : Out(14 signed) of the sum, limbs : Out(Limbs)
    early_top : Out(14 signed), top one cycle earlier

    Timing: `latency` cycles from o to limbs and top.
    """

    latency = 4

    def __init__(self):
        super().__init__(
            {
                "o": In(signed(ACC_BITS)),
                "exponent": In(signed(PLACE_BITS)),
                "fresh": In(1),
                "old_top": In(signed(TOP_BITS)),
                "old": In(Limbs),
                "top": Out(signed(TOP_BITS)),
                "early_top": Out(signed(TOP_BITS)),
                "limbs": Out(Limbs),
            }
        )

    def elaborate(self, platform):
        m = Module()

        def register(value, name):
            out = Signal.like(value, name=name, reset_less=True)
            m.d.sync += out.eq(value)
            return out

        # 1: where the number lies.
        o = register(self.o, "o")
        place = register(self.exponent + WINDOW_TOP, "place")
        fresh = register(self.fresh, "fresh_1")
        # 2: onto the limb grid.
        z = Signal(signed(N_LIMBS * LIMB_STEP), reset_less=True)
        m.d.sync += z.eq((o << place[:_LIMB_LOG2]) << 1)
        own_top = register((place >> _LIMB_LOG2)[:TOP_BITS].as_signed(), "own_top")
        old_top = register(self.old_top, "old_top_2")
        fresh = register(fresh, "fresh_2")
        # 3: limbs that each operand moves down, at most all four.
        ahead = Signal(signed(TOP_BITS + 1))
        m.d.comb += ahead.eq(own_top - old_top)
        behind = ahead[-1]
        few = Mux(behind, ahead[2:].all() & ahead[:2].any(), ~ahead[2:].any())  # 1..3, or 0..3
        top = Signal(signed(TOP_BITS))
        m.d.comb += top.eq(Mux(fresh | ~behind, own_top, old_top))
        own_steps = register(
            Mux(fresh | ~behind, 0, Mux(few, (-ahead[:2])[:2], N_LIMBS)), "own_steps"
        )
        old_steps = register(
            Mux(fresh, N_LIMBS, Mux(behind, 0, Mux(few, ahead[:2], N_LIMBS))), "old_steps"
        )
        old = register(self.old, "old")
        z = register(z, "z_3")
        top = register(top, "top_3")
        # 4: add.
        own_limbs = [z[LIMB_STEP * j :][:LIMB_STEP] for j in range(N_LIMBS - 1)]
        own_limbs.append(z[LIMB_STEP * (N_LIMBS - 1) :].as_signed())
        old_limbs = [old[j] for j in range(N_LIMBS)]
        for j in range(N_LIMBS):
            terms = []
            for name, limbs, down in (("own", own_limbs, own_steps), ("old", old_limbs, old_steps)):
                term = Signal(signed(LIMB_BITS), name=f"{name}_{j}")
                with m.Switch(down):
                    for step in range(N_LIMBS - j):
                        with m.Case(step):
                            m.d.comb += term.eq(limbs[j + step])
                    with m.Default():
                        m.d.comb += term.eq(0)
                terms.append(term)
            total = Signal(signed(LIMB_BITS), name=f"limb_{j}", reset_less=True)
            m.d.sync += total.eq(terms[0] + terms[1])
            m.d.comb += self.limbs[j].eq(total)
        m.d.comb += [self.early_top.eq(top), self.top.eq(register(top, "top_4"))]
        return m


class Merge(wiring.Component):
    """Adds the V sums and the two denominators of tile after tile; two query heads a cycle.

    Parameters
    ----------
    rows, max_head_dim : int

    Members
    -------
    i_tile : In(stream), see `softmax.tile_sum_layout`
    i_v : In(stream), head_dim channels of each tile
    o : Out(stream of 2 WideNumber), the finished sums of a job: for run_sum, run_sum_wide and each
        channel, the rows in pairs
    o_end : Out(stream), once a job

    Timing: one pair of rows a cycle. A job's sums leave while its last tile is added.
    """

    def __init__(self, rows: int, max_head_dim: int):
        self._rows, self._max_head_dim = rows, max_head_dim
        super().__init__(
            {
                "i_tile": In(stream.Signature(tile_sum_layout(rows))),
                "i_v": In(stream.Signature(v_layout(rows))),
                "o": Out(stream.Signature(data.ArrayLayout(WideNumber, 2))),
                "o_end": Out(stream.Signature(job_end_layout(rows))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        pairs = self._rows // abi.ROW_STEP
        pair_bits = (pairs - 1).bit_length()
        tile, head, v = self.i_tile.p, self.i_tile.p.head, self.i_v.p
        m.submodules.out = out = Queue(data.ArrayLayout(WideNumber, 2), 32)
        m.submodules.ends = ends = Queue(job_end_layout(self._rows), 4)
        wiring.connect(m, out.o, wiring.flipped(self.o))
        wiring.connect(m, ends.o, wiring.flipped(self.o_end))

        # One step: a pair of rows of one element. Elements: 2 denominators, then the channels.
        go = Signal()
        in_sums, second = Signal(init=1), Signal()
        channel, pair = Signal(shapes.CHANNEL), Signal(range(max(pairs, 2)))
        held = Signal(range(out.depth + 1))
        pair_end = is_last(pair, head.params.pairs)
        block_end = Mux(in_sums, second, channel[:LANES_LOG2] == LANES - 1)
        tile_end = Signal()
        m.d.comb += [
            tile_end.eq(
                ~in_sums & pair_end & channel[:LANES_LOG2].all()
                & is_last(channel[LANES_LOG2:], head.params.parts)
            ),
            go.eq(
                self.i_tile.valid & (in_sums | self.i_v.valid)
                & (~head.job_last | (held != out.depth))
                & (~(tile_end & head.job_last) | ends.i.ready)
            ),
            self.i_v.ready.eq(go & ~in_sums & pair_end),
            self.i_tile.ready.eq(go & tile_end),
        ]  # fmt: skip
        m.d.sync += held.eq(held + (go & head.job_last) - (out.o.valid & out.o.ready))
        with m.If(go):
            m.d.sync += pair.eq(pair + 1)
            with m.If(pair_end):
                m.d.sync += pair.eq(0)
                with m.If(in_sums):
                    m.d.sync += [second.eq(1), in_sums.eq(~second), channel.eq(0)]
                with m.Else():
                    m.d.sync += channel.eq(channel + 1)
                with m.If(tile_end):
                    m.d.sync += [in_sums.eq(1), second.eq(0)]

        # Tops of the parts, then of the denominators.
        part = Mux(in_sums, shapes.MAX_PARTS, channel[LANES_LOG2:])
        place = Signal(
            data.StructLayout(
                {
                    "valid": 1,
                    "in_sums": 1,
                    "address": len(channel) + pair_bits,
                    "top_address": len(part) + pair_bits,
                    "block_end": 1,
                    "out": 1,
                }
            )
        )
        m.d.comb += [
            place.valid.eq(go),
            place.in_sums.eq(in_sums),
            place.address.eq(Cat(pair[:pair_bits], Mux(in_sums, second, channel))),
            place.top_address.eq(Cat(pair[:pair_bits], part)),
            place.block_end.eq(block_end),
            place.out.eq(head.job_last),
        ]
        later = [delay(m, place, n, f"place_{n}") for n in range(Accumulate.latency + 1)]

        # Sums of the running job. The two denominators have a small memory of their own, so that
        # the channels fill theirs exactly. A place is used again after 34 steps at the earliest,
        # long after it was written.
        row = data.ArrayLayout(Limbs, 2)
        m.submodules.channels = channels = Memory(
            shape=row, depth=self._max_head_dim << pair_bits, init=[]
        )
        m.submodules.denominators = denominators = Memory(shape=row, depth=2 << pair_bits, init=[])
        tops_row = data.ArrayLayout(signed(TOP_BITS), 2)
        m.submodules.tops = tops = Memory(shape=tops_row, depth=1 << len(part) + pair_bits, init=[])
        reads = []
        units = []
        for i in range(2):
            m.submodules[f"accumulate_{i}"] = unit = Accumulate()
            o, exponent = Signal(signed(ACC_BITS), name=f"o_{i}"), Signal(signed(PLACE_BITS))

            def pick(values, i=i):
                return Array(values[2 * j + i] for j in range(pairs))[pair]

            m.d.comb += [
                o.eq(
                    Mux(in_sums,
                        Mux(second, pick(tile.tile_wide), pick(tile.tile_sum)) << SUM_SHIFT,
                        pick(v.sums))
                ),
                exponent.eq(pick(tile.tile_max) + Mux(in_sums, 0, pick(v.exponents))),
                unit.o.eq(o),
                unit.exponent.eq(exponent),
                unit.fresh.eq(head.job_first),
            ]  # fmt: skip
            units.append(unit)
        for memory in (channels, denominators):
            read = memory.read_port()
            m.d.comb += read.addr.eq(later[1].address)
            reads.append(read)
        tops_read = tops.read_port(domain="comb")
        m.d.comb += tops_read.addr.eq(later[1].top_address)
        old = Mux(later[2].in_sums, reads[1].data, reads[0].data)
        old = row(old)
        new, new_tops = Signal(row), Signal(tops_row)
        for i, unit in enumerate(units):
            m.d.comb += [
                unit.old_top.eq(tops_read.data[i]),
                unit.old.eq(old[i]),
                new[i].eq(unit.limbs),
                new_tops[i].eq(unit.early_top),
                out.i.p[i].limbs.eq(unit.limbs),
                out.i.p[i].top.eq(unit.top),
            ]
        done = later[Accumulate.latency]
        for memory, in_sums_memory in ((channels, 0), (denominators, 1)):
            write = memory.write_port()
            m.d.comb += [
                write.addr.eq(done.address),
                write.data.eq(new),
                write.en.eq(done.valid & (done.in_sums == in_sums_memory)),
            ]
        # The top belongs to a whole block: its old value serves until the last channel. A tile of one
        # block and one pair reads it again three steps later, for which it is there just in time.
        early = later[Accumulate.latency - 1]
        tops_write = tops.write_port()
        m.d.comb += [
            tops_write.addr.eq(early.top_address),
            tops_write.data.eq(new_tops),
            tops_write.en.eq(early.valid & early.block_end),
            out.i.valid.eq(done.valid & done.out),
        ]

        saturated = Signal()
        any_saturated = tile.saturated | (saturated & ~head.job_first)
        m.d.comb += [
            ends.i.p.saturated.eq(any_saturated),
            ends.i.valid.eq(go & tile_end & head.job_last),
        ]
        with m.If(go & tile_end):
            m.d.sync += saturated.eq(any_saturated)
        for r in range(self._rows):
            run_max = Signal(signed(TILE_MAX_BITS), name=f"run_max_{r}")
            largest = Signal(signed(TILE_MAX_BITS), name=f"largest_{r}")
            m.d.comb += [
                largest.eq(
                    Mux(head.job_first | (tile.tile_max[r] > run_max), tile.tile_max[r], run_max)
                ),
                ends.i.p.run_max[r].eq(Mux(r >> 1 < head.params.pairs, largest, RUN_MAX_EMPTY)),
            ]
            with m.If(go & tile_end):
                m.d.sync += run_max.eq(largest)
        self.probes = {
            "places": later, "tops_write": tops_write, "held": held, "in_sums": in_sums,
            "second": second, "channel": channel, "pair": pair,
        }  # fmt: skip
        return m


class PartialWriter(wiring.Component):
    """Writes each job's partial, its header last, and the summary when all jobs are answered.

    Members
    -------
    start : In(1), done : Out(1); args : In(ControlArgs)
    finished, n_jobs, queue_error : In, see `JobReader`
    i_job, i_faults_k, i_faults_v, i_end : In(streams), one transfer a job (illegal jobs send only
        the first)
    i : In(stream of 2 WideNumber)
    spans, o : Out(streams) to the `WriteMaster`; idle, error : In, from it
    counters : In, the summary's counter fields, name -> Signal
    """

    COUNTERS = ("cycles", "kv_beats", "stream_cycles", "starved_cycles", "stalled_cycles",
                "kv_bursts")  # fmt: skip

    def __init__(self, rows: int, config_hash: int):
        self._rows, self._config_hash = rows, config_hash
        super().__init__(
            {
                "start": In(1),
                "done": Out(1),
                "args": In(ControlArgs),
                "finished": In(1),
                "n_jobs": In(ControlArgs["n_jobs"].shape),
                "queue_error": In(1),
                "i_job": In(stream.Signature(JobInfo)),
                "i_faults_k": In(stream.Signature(Faults)),
                "i_faults_v": In(stream.Signature(Faults)),
                "i_end": In(stream.Signature(job_end_layout(rows))),
                "i": In(stream.Signature(data.ArrayLayout(WideNumber, 2))),
                "spans": Out(stream.Signature(Span)),
                "o": Out(stream.Signature(BEAT_BITS)),
                "idle": In(1),
                "error": In(1),
                "counters": In(data.StructLayout(dict.fromkeys(self.COUNTERS, shapes.COUNTER))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        job, end = self.i_job.p, self.i_end.p
        written, failed = Signal(len(self.n_jobs)), Signal(len(self.n_jobs))
        beats_left, beats_out = Signal(BEATS), Signal(shapes.COUNTER)
        half, low = Signal(), Signal(BEAT_BITS // 2, reset_less=True)
        span = Signal(Span)  # what is asked for next
        # Header or summary as it is written; the counters must not move meanwhile.
        record_out, fails = Signal(8 * abi.SUMMARY.bytes, reset_less=True), Signal()
        m.d.comb += [self.spans.p.eq(span), self.o.payload.eq(record_out[:BEAT_BITS])]

        def record(layout, **values):
            """The record's bytes as one value; scalars and lists of signals by field name."""
            bits = Signal(8 * layout.bytes, name=layout.name)
            for name, value in values.items():
                field = layout[name]
                items = value if isinstance(value, list) else [value]
                for i, item in enumerate(items):
                    at = 8 * field.offset + i * field.bits
                    m.d.comb += bits[at : at + field.bits].eq(item)
            return bits

        # Faults of all stages; the first page blamed is the smallest of theirs.
        faults = [job.faults, self.i_faults_k.p, self.i_faults_v.p]
        page_bits = abi.PARTIAL_HEADER["bad_page"].bits
        bad_page = Const(abi.NO_PAGE, page_bits)
        for n, fault in enumerate(faults):
            page = Signal(page_bits, name=f"page_{n}")
            use = fault.page_known & (job.legal if n else 1)
            m.d.comb += page.eq(Mux(use & (fault.page < bad_page), fault.page, bad_page))
            bad_page = page

        def either(name):
            return Cat(getattr(fault, name) for fault in faults).any()

        status = Signal(abi.PARTIAL_HEADER["status"].bits)
        m.d.comb += status.eq(abi.Status.DONE | Mux(job.faults.illegal, abi.Status.ILLEGAL_JOB, 0))
        with m.If(job.legal):
            m.d.comb += status.eq(
                abi.Status.DONE
                | Mux(self.i_faults_k.p.bad_crc, abi.Status.BAD_CRC_K, 0)
                | Mux(self.i_faults_v.p.bad_crc, abi.Status.BAD_CRC_V, 0)
                | Mux(job.faults.illegal, abi.Status.ILLEGAL_JOB, 0)
                | Mux(either("bus_error"), abi.Status.BUS_ERROR, 0)
                | Mux(either("non_finite"), abi.Status.NON_FINITE, 0)
                | Mux(end.saturated, abi.Status.SATURATED, 0)
            )
        run_max = [
            Mux(job.legal, end.run_max[r], RUN_MAX_EMPTY) if r < self._rows else RUN_MAX_EMPTY
            for r in range(abi.PARTIAL_HEADER["run_max"].count)
        ]
        header = record(
            abi.PARTIAL_HEADER, status=status, bad_page=bad_page, tag=job.tag, n_tokens=job.tokens,
            run_max=run_max,
        )  # fmt: skip
        summary = record(
            abi.SUMMARY, abi_version=abi.ABI_VERSION, config_hash=self._config_hash,
            n_jobs=written, n_failed=failed, partial_beats=beats_out,
            error=Mux(self.queue_error | self.error, abi.Status.BUS_ERROR, 0),
            **{name: self.counters[name] for name in self.COUNTERS},
        )  # fmt: skip

        with m.FSM():
            with m.State("Idle"):
                with m.If(self.start):
                    m.d.sync += [written.eq(0), failed.eq(0), beats_out.eq(0), half.eq(0)]
                    m.next = "Next Job"
            with m.State("Next Job"):
                # (32 parts + 2) elements of 16 bytes, in pairs of rows: two to a beat.
                beats = small_product((job.parts << LANES_LOG2 - 1) + 1, job.pairs)
                m.d.sync += [
                    span.address.eq(job.address + Mux(job.legal, abi.PARTIAL_HEADER.bytes, 0)),
                    span.beats.eq(Mux(job.legal, beats, 1)),
                ]
                with m.If(self.i_job.valid):
                    m.next = "Ask Header"
                    with m.If(job.legal):
                        m.next = "Ask Elements"
                with m.Elif(self.finished & (written == self.n_jobs)):
                    m.next = "Drain"
            with m.State("Ask Elements"):
                m.d.comb += self.spans.valid.eq(1)
                m.d.sync += beats_left.eq(span.beats)
                with m.If(self.spans.ready):
                    m.next = "Write Elements"
            with m.State("Write Elements"):
                m.d.comb += [
                    self.o.payload.eq(Cat(low, self.i.p)),
                    self.o.valid.eq(self.i.valid & half),
                    self.i.ready.eq(~half | self.o.ready),
                ]
                m.d.sync += [span.address.eq(job.address), span.beats.eq(1)]
                with m.If(self.i.valid & self.i.ready):
                    m.d.sync += [low.eq(self.i.p), half.eq(~half)]
                    with m.If(half):
                        m.d.sync += [beats_left.eq(beats_left - 1), beats_out.eq(beats_out + 1)]
                        with m.If(beats_left == 1):
                            m.next = "Ask Header"
            with m.State("Ask Header"):
                known = self.i_end.valid & self.i_faults_k.valid & self.i_faults_v.valid
                m.d.comb += self.spans.valid.eq(known | ~job.legal)
                m.d.sync += [record_out.eq(header), fails.eq(status != abi.Status.DONE)]
                with m.If(self.spans.valid & self.spans.ready):
                    m.next = "Write Header"
            with m.State("Write Header"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(self.o.ready):
                    m.d.comb += [
                        self.i_job.ready.eq(1),
                        self.i_end.ready.eq(job.legal),
                        self.i_faults_k.ready.eq(job.legal),
                        self.i_faults_v.ready.eq(job.legal),
                    ]
                    m.d.sync += [
                        written.eq(written + 1),
                        failed.eq(failed + fails),
                        beats_out.eq(beats_out + 1),
                    ]
                    m.next = "Next Job"
            with m.State("Drain"):
                m.d.sync += [
                    # Whole beats only; the low bits of a misaligned offset do not count.
                    span.address.eq(self.args.job + (self.args.summary[BEAT_LOG2:] << BEAT_LOG2)),
                    span.beats.eq(abi.SUMMARY.bytes // abi.BEAT_BYTES),
                ]
                with m.If(self.idle):
                    m.next = "Ask Summary"
            with m.State("Ask Summary"):
                m.d.comb += self.spans.valid.eq(1)
                m.d.sync += record_out.eq(summary)
                with m.If(self.spans.ready):
                    m.next = "Write Summary"
            with m.State("Write Summary"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(self.o.ready):
                    m.d.sync += [record_out.eq(record_out >> BEAT_BITS), half.eq(~half)]
                    with m.If(half):
                        m.next = "Finish"
            with m.State("Finish"):
                with m.If(self.idle):
                    m.d.comb += self.done.eq(1)
                    m.next = "Idle"
        self.probes = {"half": half, "beats_left": beats_left, "written": written, "span": span}
        return m
