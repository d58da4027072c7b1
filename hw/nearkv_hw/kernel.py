# SPDX-License-Identifier: Apache-2.0
"""The whole accelerator: the stages in a row, and the wires with their AXI names.

s_axi_control -> Control -> JobReader --tiles--> KvFetch -----------beats-----> Align -> MacArray
                              |  m_axi_job         m_axi_kv \\--> Products --blocks--^ ^     ^  |  |
                              |                               ^  \\----p's weights--------+  |  |
                              +--q--> q store (four banks) ---|----------weights------+     |  |
                                             p store (four banks)                           |  |
                                                    ^                                       |  |
                                                 Softmax <------------ K sums --------------+  |
                                                    |  tile_max, tile_sum                      |
                                                  Merge <------------- V sums -----------------+
                                                    |
                                        PartialWriter -> m_axi_job
"""

from amaranth import (
    Cat,
    ClockDomain,
    ClockSignal,
    Elaboratable,
    Module,
    Mux,
    ResetSignal,
    Signal,
    signed,
)
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from . import abi, shapes
from .align import Align
from .array import MacArray
from .axi import RESP, AxiLite, Burst, Control, ReadBeat, WriteBeat, WriteMaster
from .config import Config
from .fetch import KvFetch
from .fifo import Queue, delay
from .jobs import Q_BANKS, JobInfo, JobReader, Tile
from .merge import V_QUEUE_CHANNELS, Merge, PartialWriter, v_layout
from .number import EXPONENT_BITS, Q_EXPONENT_BITS, RAW_SHIFT, SCORE_SHIFT_MAX, WEIGHT_BITS
from .products import Products
from .shapes import BEAT_LOG2, LANES
from .softmax import RAW_QUEUE_TOKENS, Softmax, TileHead, raw_layout

RESET_CYCLES = 32  # longer than any delay line
TILE_QUEUE = 8  # tiles between the job reader and the fetch


class Kernel(wiring.Component):
    """The accelerator behind its buses.

    Parameters
    ----------
    config : Config

    Members
    -------
    control : In(AxiLite)
    kv_ar, kv_r : the read channels of `m_axi_kv`
    job_ar, job_r, job_aw, job_w, job_b : the channels of `m_axi_job`
    interrupt : Out(1), see `Control`

    Timing: from `ap_start` to `ap_done` one run of the job queue. In a run, K and V beats are
    consumed at one a cycle as long as the bus supplies them; the summary's counters tell how long
    it did not, and how long the datapath was not ready.
    """

    def __init__(self, config: Config):
        self._config = config
        super().__init__(
            {
                "control": In(AxiLite()),
                "kv_ar": Out(stream.Signature(Burst)),
                "kv_r": In(stream.Signature(ReadBeat)),
                "job_ar": Out(stream.Signature(Burst)),
                "job_r": In(stream.Signature(ReadBeat)),
                "job_aw": Out(stream.Signature(Burst)),
                "job_w": Out(stream.Signature(WriteBeat)),
                "job_b": In(stream.Signature(RESP)),
                "interrupt": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, rows = self._config, self._config.rows
        flipped, connect = wiring.flipped, wiring.connect

        m.submodules.control = control = Control(config.hash32)
        m.submodules.jobs = jobs = JobReader(rows, config.max_head_dim)
        m.submodules.tiles = tiles = Queue(Tile, TILE_QUEUE)
        m.submodules.job_infos = job_infos = Queue(JobInfo, 8)
        m.submodules.fetch = fetch = KvFetch(
            config.max_head_dim, config.beat_fifo_beats, config.lookahead_tiles
        )
        m.submodules.products = products = Products(rows, config.beat_fifo_beats)
        m.submodules.align = align = Align(rows)
        m.submodules.array = array = MacArray(rows)
        m.submodules.softmax = softmax = Softmax(rows)
        m.submodules.merge = merge = Merge(rows, config.max_head_dim)
        m.submodules.writer = writer = PartialWriter(rows, config.hash32)
        m.submodules.master = master = WriteMaster()

        connect(m, flipped(self.control), control.bus)
        connect(m, jobs.ar, flipped(self.job_ar))
        connect(m, flipped(self.job_r), jobs.r)
        connect(m, fetch.ar, flipped(self.kv_ar))
        connect(m, flipped(self.kv_r), fetch.r)
        connect(m, master.aw, flipped(self.job_aw))
        connect(m, master.w, flipped(self.job_w))
        connect(m, flipped(self.job_b), master.b)

        connect(m, jobs.o_tile, tiles.i)
        connect(m, tiles.o, fetch.i_tile)
        connect(m, jobs.o_job, job_infos.i)
        connect(m, job_infos.o, writer.i_job)
        connect(m, fetch.o_block, products.i_block)
        connect(m, fetch.o_field, products.i_field)
        connect(m, products.o_block, align.i_block)
        connect(m, fetch.o_beat, align.i_beat)
        connect(m, fetch.o_faults_k, writer.i_faults_k)
        connect(m, fetch.o_faults_v, writer.i_faults_v)
        connect(m, softmax.o_sum, merge.i_tile)
        connect(m, merge.o, writer.i)
        connect(m, merge.o_end, writer.i_end)
        connect(m, writer.spans, master.spans)
        connect(m, writer.o, master.i)
        m.d.comb += [
            jobs.start.eq(control.start),
            jobs.args.eq(control.args),
            writer.start.eq(control.start),
            writer.args.eq(control.args),
            control.done.eq(writer.done),
            self.interrupt.eq(control.interrupt),
            writer.finished.eq(jobs.finished & ~control.start),
            writer.n_jobs.eq(jobs.n_jobs),
            writer.queue_error.eq(jobs.error),
            writer.idle.eq(master.idle),
            writer.error.eq(master.error),
            master.clear.eq(control.start),
            # Also when the reader waits for the writer, which may be waiting for a V pass.
            fetch.flush.eq(jobs.finished | (jobs.o_job.valid & ~jobs.o_job.ready)),
        ]
        self._weights(m, jobs, fetch, products, align, array, softmax)
        self._results(m, align, array, softmax, merge)
        self._count(m, control, fetch, align, writer)
        return m

    def _weights(self, m, jobs, fetch, products, align, array, softmax):
        """The q store, the p store's readers, and the choice between q and p as weights."""
        rows = self._config.rows
        depth = Q_BANKS * abi.MAX_HEAD_DIM
        weights_shape = data.ArrayLayout(WEIGHT_BITS, rows)
        m.submodules.q_weights = weights = Memory(shape=weights_shape, depth=depth, init=[])
        m.submodules.q_exponents = exponents = Memory(shape=Q_EXPONENT_BITS, depth=depth, init=[])
        address = Cat(jobs.o_q.p.channel, jobs.o_q.p.bank)
        for memory, value in ((weights, jobs.o_q.p.weights), (exponents, jobs.o_q.p.exponent)):
            write = memory.write_port()
            m.d.comb += [write.addr.eq(address), write.en.eq(jobs.o_q.valid)]
            m.d.comb += (
                [write.data[row].eq(value[row]) for row in range(rows)]
                if memory is weights
                else [write.data.eq(value)]
            )
        for reader in (fetch, align):
            read = exponents.read_port()
            m.d.comb += [
                read.addr.eq(reader.q_address),
                reader.q_exponent.eq(read.data.as_signed()),
            ]
        read = weights.read_port()
        block = align.i_block.p
        m.d.comb += [
            read.addr.eq(align.weight_address),
            softmax.scan_address.eq(products.scan_address),
            products.scan.eq(softmax.scan),
            softmax.issue_address.eq(products.issue_address),
            products.issue.eq(softmax.issue),
            softmax.mantissa_address.eq(products.mantissa_address),
            products.mantissas.eq(softmax.mantissas),
            products.p_ready.eq(softmax.p_ready),
            products.place.eq(align.place),
            products.exponents.eq(block.exponents),
            products.params.eq(block.block.params),
            products.done.eq(align.end & block.block.is_v),
            align.base.eq(products.base),
            array.x.eq(align.o_x),
            array.step.eq(align.o_step),
        ]
        for row in range(rows):
            m.d.comb += array.w[row].eq(
                Mux(align.o_is_v, products.weights[row], read.data[row].as_signed())
            )
        # A bank of the q store is free when its last weights were read, which is later than its block ends.
        last = delay(m, block.block.pass_last & block.block.job_last, align.latency, "job_taken")
        m.d.comb += [
            jobs.q_free.eq(align.taken & last),
            # Its last weights are read some cycles later, see `Products`.
            softmax.p_free.eq(align.end & block.block.is_v & block.block.pass_last),
        ]

    def _results(self, m, align, array, softmax, merge):
        """Where the array's sums go, and whether there will be room for those of the next block."""
        rows = self._config.rows
        block, exponents = align.i_block.p.block, align.i_block.p.exponents
        m.submodules.raw = raw = Queue(raw_layout(rows), RAW_QUEUE_TOKENS)
        m.submodules.v = v = Queue(v_layout(rows), V_QUEUE_CHANNELS)
        m.submodules.heads = heads = Queue(TileHead, 8)
        wiring.connect(m, raw.o, softmax.i_raw)
        wiring.connect(m, v.o, merge.i_v)
        wiring.connect(m, heads.o, softmax.i_head)

        # Results come out of a fixed pipeline, so their places are reserved when a block starts.
        raw_held, v_held = Signal(range(RAW_QUEUE_TOKENS + 1)), Signal(range(V_QUEUE_CHANNELS + 1))
        begin_k, begin_v = align.begin & ~block.is_v, align.begin & block.is_v
        m.d.sync += [
            raw_held.eq(raw_held + Mux(begin_k, block.lanes, 0) - (raw.o.valid & raw.o.ready)),
            v_held.eq(v_held + Mux(begin_v, LANES, 0) - (v.o.valid & v.o.ready)),
        ]
        m.d.comb += [
            align.may_start.eq(
                Mux(
                    block.is_v,
                    v_held <= V_QUEUE_CHANNELS - LANES,
                    (raw_held <= RAW_QUEUE_TOKENS - LANES) & (~block.pass_first | heads.i.ready),
                )
            ),
            heads.i.p.params.eq(block.params),
            heads.i.p.tokens.eq(block.tokens),
            heads.i.p.job_first.eq(block.job_first),
            heads.i.p.job_last.eq(block.job_last),
            heads.i.valid.eq(begin_k & block.pass_first),
        ]

        self.probes = {"raw_held": raw_held, "v_held": v_held}

        # What the results of an ended block need to know; at most two blocks are on their way.
        leaving_layout = data.StructLayout(
            {
                "is_v": 1,
                "lanes": shapes.VALID_LANES,
                "shift": range(SCORE_SHIFT_MAX + 1),
                "exponents": data.ArrayLayout(signed(EXPONENT_BITS), rows),
            }
        )
        m.submodules.leaving = leaving = Queue(leaving_layout, 4)
        shift = block.params.shift - block.exponent
        shift_bits = len(leaving.i.p.shift)
        m.d.comb += [
            leaving.i.p.is_v.eq(block.is_v),
            leaving.i.p.lanes.eq(block.lanes),
            leaving.i.p.exponents.eq(exponents),
            leaving.i.p.shift.eq(
                Mux(shift < 0, 0, Mux(shift > SCORE_SHIFT_MAX, SCORE_SHIFT_MAX, shift[:shift_bits]))
            ),
            leaving.i.valid.eq(align.end),
            leaving.o.ready.eq(array.o_valid & (array.o_lane == LANES - 1)),
            raw.i.valid.eq(array.o_valid & ~leaving.o.p.is_v & (array.o_lane < leaving.o.p.lanes)),
            raw.i.p.shift.eq(leaving.o.p.shift),
            v.i.valid.eq(array.o_valid & leaving.o.p.is_v),
            v.i.p.exponents.eq(leaving.o.p.exponents),
        ]
        for row in range(rows):
            m.d.comb += [
                raw.i.p.sums[row].eq(array.o_sum[row][RAW_SHIFT:].as_signed()),
                v.i.p.sums[row].eq(array.o_sum[row]),
            ]

    def _count(self, m, control, fetch, align, writer):
        """Performance counters. Those of the stream stand still between its beats, and catch up
        with the next one: what lies before the first and after the last beat does not count."""
        counters = Signal(data.StructLayout(dict.fromkeys(PartialWriter.COUNTERS, shapes.COUNTER)))
        m.d.comb += writer.counters.eq(counters)
        m.d.sync += [
            counters.cycles.eq(counters.cycles + 1),
            counters.kv_beats.eq(counters.kv_beats + align.issued),
            counters.kv_bursts.eq(counters.kv_bursts + fetch.burst),
        ]
        streaming = Signal()
        for name, event in (
            ("stream_cycles", 1), ("starved_cycles", align.starved),
            ("stalled_cycles", align.stalled),
        ):  # fmt: skip
            running = Signal(shapes.COUNTER, name=f"{name}_running")
            with m.If(streaming | align.issued):
                m.d.sync += running.eq(running + event)
            with m.If(align.issued):
                m.d.sync += counters[name].eq(running + event)
            with m.If(control.start):
                m.d.sync += running.eq(0)
        with m.If(align.issued):
            m.d.sync += streaming.eq(1)
        with m.If(control.start):
            m.d.sync += [counters.eq(0), streaming.eq(0)]


class Top(Elaboratable):
    """`Kernel` with the port names that Vitis and Vivado recognise.

    `ports` maps each name to (signal, direction), as `amaranth.back.verilog.convert` wants it.
    """

    NAME = "nearkv"

    def __init__(self, config: Config):
        self._kernel = Kernel(config)
        self._clk, self._rst_n = Signal(name="ap_clk"), Signal(name="ap_rst_n")
        self._wires = []  # (port signal, "i" or "o", inner value)
        kernel, axi = self._kernel, self._axi
        bus = kernel.control
        for channel, fields in (
            ("aw", {"addr": bus.aw.payload}),
            ("w", {"data": bus.w.p.data, "strb": bus.w.p.strb}),
            ("ar", {"addr": bus.ar.payload}),
        ):
            axi("s_axi_control", channel, getattr(bus, channel), fields, "i")
        axi("s_axi_control", "b", bus.b, {"resp": bus.b.payload}, "o")
        axi("s_axi_control", "r", bus.r, {"data": bus.r.p.data, "resp": bus.r.p.resp}, "o")
        for prefix, ar, r in (
            ("m_axi_kv", kernel.kv_ar, kernel.kv_r),
            ("m_axi_job", kernel.job_ar, kernel.job_r),
        ):
            axi(prefix, "ar", ar, self._burst(ar.p), "o")
            axi(prefix, "r", r,
                {"id": Signal(1), "data": r.p.data, "resp": r.p.resp, "last": r.p.last}, "i")  # fmt: skip
        axi("m_axi_job", "aw", kernel.job_aw, self._burst(kernel.job_aw.p), "o")
        w = kernel.job_w.p
        strobes = Signal(abi.BEAT_BYTES, init=(1 << abi.BEAT_BYTES) - 1)
        axi("m_axi_job", "w", kernel.job_w, {"data": w.data, "strb": strobes, "last": w.last}, "o")
        axi("m_axi_job", "b", kernel.job_b,
            {"id": Signal(1), "resp": kernel.job_b.payload}, "i")  # fmt: skip
        self._wires.append((Signal(name="interrupt"), "o", kernel.interrupt))
        self.ports = {"ap_clk": (self._clk, None), "ap_rst_n": (self._rst_n, None)}
        self.ports |= {wire.name: (wire, None) for wire, _, _ in self._wires}

    @staticmethod
    def _burst(payload):
        """AXI fields of a burst: full-width beats (2^size bytes), INCR."""
        return {
            "id": Signal(1),
            "addr": payload.address,
            "len": payload.beats_less_1,
            "size": Signal(3, init=BEAT_LOG2),
            "burst": Signal(2, init=1),
        }

    def _axi(self, prefix, channel, inner, fields, direction):
        """Name the wires of one channel; `direction` is that of its payload."""
        back = "o" if direction == "i" else "i"
        for field, value, way in (
            *((name, value, direction) for name, value in fields.items()),
            ("valid", inner.valid, direction),
            ("ready", inner.ready, back),
        ):
            wire = Signal(len(value), name=f"{prefix}_{channel}{field}")
            self._wires.append((wire, way, value))

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        # A short reset is stretched, until what lies in delay lines without a reset has left them.
        released = Signal(reset_less=True)
        hold = Signal(range(RESET_CYCLES), init=RESET_CYCLES - 1, reset_less=True)
        reset = Signal(init=1, reset_less=True)
        m.d.comb += [ClockSignal().eq(self._clk), ResetSignal().eq(reset)]
        m.d.sync += [released.eq(self._rst_n), reset.eq(~released | (hold != 0))]
        with m.If(~released):
            m.d.sync += hold.eq(RESET_CYCLES - 1)
        with m.Elif(hold != 0):
            m.d.sync += hold.eq(hold - 1)
        m.submodules.kernel = self._kernel
        for wire, way, value in self._wires:
            if way == "i":
                m.d.comb += value.eq(wire)
            elif wire.name.endswith(("valid", "ready")):
                # IHI 0022, A3.1.2: no valid from the first cycle of a reset. And nothing is taken
                # until the reset inside is over.
                m.d.comb += wire.eq(value & self._rst_n & ~reset)
            else:
                m.d.comb += wire.eq(value)
        return m
