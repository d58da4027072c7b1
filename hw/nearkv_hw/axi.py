# SPDX-License-Identifier: Apache-2.0
"""The accelerator's side of the AXI buses: control registers, read bursts, write bursts.

# Ref: ARM IHI 0022 (AXI4), A3.2 (handshake), A3.4.1 (bursts, the 4096-byte boundary)
# Ref: AMD UG1393, "Control Requirements for XRT-Managed Kernels"

Inside, each channel is a stream. `kernel.Top` gives the wires their AXI names and ties the fields
that never change: full-width INCR bursts, one ID.
"""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from . import abi
from .config import OUTSTANDING_BURSTS
from .fifo import Queue
from .shapes import ADDRESS, BEAT_BITS, BEAT_LOG2, BURST_BEATS, BURST_LOG2

_CONTROL_ADDRESS = exact_log2(abi.CONTROL_BYTES)
BEATS = 16  # of a span
RESP = 2


class Burst(data.Struct):
    """Payload of AR and AW."""

    address: ADDRESS
    beats_less_1: 8


class ReadBeat(data.Struct):
    """Payload of R."""

    data: BEAT_BITS
    resp: RESP
    last: 1


class WriteBeat(data.Struct):
    """Payload of W; every byte is written."""

    data: BEAT_BITS
    last: 1


class Span(data.Struct):
    """Consecutive beats of memory: what a stage asks for, however many bursts it takes."""

    address: ADDRESS
    beats: BEATS


# Arguments as they stood when the run began.
ControlArgs = data.StructLayout(
    {register.name: register.bits for register in abi.REGISTERS if register.writable}
)


class AxiLite(wiring.Signature):
    """AXI4-Lite as streams, seen from the manager."""

    def __init__(self):
        super().__init__(
            {
                "aw": Out(stream.Signature(_CONTROL_ADDRESS)),
                "w": Out(stream.Signature(data.StructLayout({"data": 32, "strb": 4}))),
                "b": In(stream.Signature(RESP)),
                "ar": Out(stream.Signature(_CONTROL_ADDRESS)),
                "r": In(stream.Signature(data.StructLayout({"data": 32, "resp": RESP}))),
            }
        )


class Control(wiring.Component):
    """Registers of an XRT-managed kernel (`ap_ctrl_hs`).

    CTRL at 0x00: ap_start reads back 1 until the run ends; ap_done and ap_ready rise together at
    its end and fall when CTRL is read; ap_idle. Writing ap_start during a run changes nothing.
    Arguments, from `abi.REGISTERS`, are taken over when a run begins, so that writing them during a
    run touches only the next one. Words without a meaning read 0 and accept writes: XRT writes
    every word of the argument range.

    GIER, IP_IER and IP_ISR as HLS makes them: the end of a run sets the two bits of IP_ISR that
    IP_IER enables; a write to IP_ISR inverts the bits that are 1 in it, so writing back what was
    read clears them.

    Members
    -------
    bus : In(AxiLite)
    interrupt : Out(1), high while GIER is set and a bit of IP_ISR that IP_IER enables
    start : Out(1), one cycle at the beginning of a run
    done : In(1), one cycle at its end
    args : Out(ControlArgs), valid from `start` to `done`
    """

    def __init__(self, config_hash: int):
        self._constants = {"abi_version": abi.ABI_VERSION, "config_hash": config_hash}
        super().__init__(
            {"bus": In(AxiLite()), "start": Out(1), "done": In(1), "args": Out(ControlArgs),
             "interrupt": Out(1)}
        )  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        bus = self.bus
        ap_start, ap_done, ap_ready = Signal(), Signal(), Signal()
        busy = Signal()
        global_enable, enable, pending = Signal(), Signal(2), Signal(2)
        words = {}  # word offset -> Signal that holds an argument's word
        args = {}
        for register in abi.REGISTERS:
            if register.writable:
                parts = []
                for i in range(register.bits // 32):
                    word = Signal(32, name=f"arg_{register.name}_{i}")
                    words[register.offset + 4 * i] = word
                    parts.append(word)
                args[register.name] = Cat(parts)

        # Write: address and data are taken together.
        write = Signal()
        m.d.comb += [
            write.eq(bus.aw.valid & bus.w.valid & ~bus.b.valid),
            bus.aw.ready.eq(write),
            bus.w.ready.eq(write),
            bus.b.payload.eq(0),
        ]
        with m.If(bus.b.ready):
            m.d.sync += bus.b.valid.eq(0)
        with m.If(write):
            m.d.sync += bus.b.valid.eq(1)
            with m.Switch(bus.aw.payload[2:]):
                for offset, word in words.items():
                    with m.Case(offset >> 2):
                        for lane in range(4):
                            with m.If(bus.w.p.strb[lane]):
                                m.d.sync += word.word_select(lane, 8).eq(
                                    bus.w.p.data.word_select(lane, 8)
                                )
                with m.Case(abi.REG_CTRL >> 2):
                    with m.If(bus.w.p.strb[0] & bus.w.p.data[0]):
                        m.d.sync += ap_start.eq(1)
                for offset, bits, value in (
                    (abi.REG_GIER, global_enable, bus.w.p.data[0]),
                    (abi.REG_IER, enable, bus.w.p.data[:2]),
                    (abi.REG_ISR, pending, pending ^ bus.w.p.data[:2]),
                ):
                    with m.Case(offset >> 2):
                        with m.If(bus.w.p.strb[0]):
                            m.d.sync += bits.eq(value)

        read = Signal()
        m.d.comb += [
            read.eq(bus.ar.valid & ~bus.r.valid),
            bus.ar.ready.eq(read),
            bus.r.p.resp.eq(0),
        ]
        with m.If(bus.r.ready):
            m.d.sync += bus.r.valid.eq(0)
        with m.If(read):
            m.d.sync += [bus.r.valid.eq(1), bus.r.p.data.eq(0)]
            with m.Switch(bus.ar.payload[2:]):
                with m.Case(abi.REG_CTRL >> 2):
                    m.d.sync += [
                        bus.r.p.data.eq(Cat(ap_start, ap_done, ~busy & ~ap_start, ap_ready)),
                        ap_done.eq(0),
                        ap_ready.eq(0),
                    ]
                readable = {abi.REG_GIER: global_enable, abi.REG_IER: enable, abi.REG_ISR: pending}
                for offset, word in (readable | words).items():
                    with m.Case(offset >> 2):
                        m.d.sync += bus.r.p.data.eq(word)
                for register in abi.REGISTERS:
                    if not register.writable:
                        with m.Case(register.offset >> 2):
                            m.d.sync += bus.r.p.data.eq(self._constants[register.name])

        m.d.sync += self.start.eq(0)
        with m.If(ap_start & ~busy):
            m.d.sync += [busy.eq(1), self.start.eq(1)]
            m.d.sync += [getattr(self.args, name).eq(value) for name, value in args.items()]
        # Last, so that a done in the cycle of a CTRL read, or of a write to IP_ISR, is not lost.
        with m.If(self.done):
            m.d.sync += [busy.eq(0), ap_start.eq(0), ap_done.eq(1), ap_ready.eq(1)]
            for bit in range(2):
                with m.If(enable[bit]):
                    m.d.sync += pending[bit].eq(1)
        m.d.sync += self.interrupt.eq(global_enable & (enable & pending).any())
        self.probes = {
            "busy": busy, "words": words,
            "ap_start": ap_start, "ap_done": ap_done, "ap_ready": ap_ready,
            "global_enable": global_enable, "enable": enable, "pending": pending,
        }  # fmt: skip
        return m


class ReadMaster(wiring.Component):
    """Turns spans into AXI read bursts and passes the data on, in order.

    A burst is issued only when the queue behind has room for all of it, counting what is still on
    its way: R is always ready, and the bus never waits for the datapath. At most
    `OUTSTANDING_BURSTS` are under way.

    Parameters
    ----------
    depth : int
        Beats the queue behind holds.
    max_burst : int
        Beats of the longest burst, at most 64. No burst crosses 4096 bytes.

    Members
    -------
    spans : In(stream of Span); `beats` at least 1
    ar : Out(stream of Burst), r : In(stream of ReadBeat)
    o : Out(stream of ReadBeat), always ready
    freed : In(1), high for each beat that left the queue behind
    issued : Out(1), high for each burst
    """

    def __init__(self, depth: int, max_burst: int = BURST_BEATS):
        if not 1 <= max_burst <= min(BURST_BEATS, depth):
            raise ValueError(f"max_burst must be 1 .. min(64, depth = {depth}), not {max_burst}")
        self._depth, self._max_burst = depth, max_burst
        super().__init__(
            {
                "spans": In(stream.Signature(Span)),
                "ar": Out(stream.Signature(Burst)),
                "r": In(stream.Signature(ReadBeat)),
                "o": Out(stream.Signature(ReadBeat, always_ready=True)),
                "freed": In(1),
                "issued": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        address, left, beats = Signal(ADDRESS), Signal(BEATS), Signal(range(BURST_BEATS + 1))
        room = Signal(range(self._depth + 1), init=self._depth)  # not reserved
        freed = Signal()
        flying = Signal(range(OUTSTANDING_BURSTS + 1))
        fits, reserve = Signal(), Signal()
        m.d.comb += [
            self.r.ready.eq(1),
            self.o.p.eq(self.r.p),
            self.o.valid.eq(self.r.valid),
            self.ar.p.address.eq(address),
            self.ar.p.beats_less_1.eq(beats - 1),
        ]
        m.d.sync += [
            freed.eq(self.freed),
            room.eq(room + freed - Mux(reserve, beats, 0)),
            flying.eq(flying + self.issued - (self.r.valid & self.r.p.last)),
        ]
        may_fly = flying != OUTSTANDING_BURSTS
        with m.FSM():
            with m.State("Take Span"):
                m.d.comb += self.spans.ready.eq(1)
                m.d.sync += [address.eq(self.spans.p.address), left.eq(self.spans.p.beats)]
                with m.If(self.spans.valid):
                    m.next = "Size Burst"
            with m.State("Size Burst"):
                to_boundary = BURST_BEATS - address[BEAT_LOG2:BURST_LOG2]
                limit = Signal(range(BURST_BEATS + 1))
                m.d.comb += limit.eq(Mux(to_boundary < self._max_burst, to_boundary,
                                         self._max_burst))  # fmt: skip
                # Both may turn out to be the size.
                m.d.sync += [
                    beats.eq(Mux(left < limit, left, limit)),
                    fits.eq(Mux(left < limit, left <= room, limit <= room) & may_fly),
                ]
                m.next = "Reserve"
            with m.State("Reserve"):
                m.d.sync += fits.eq((beats <= room) & may_fly)
                with m.If(fits):
                    m.d.comb += reserve.eq(1)
                    m.next = "Issue Burst"
            with m.State("Issue Burst"):
                m.d.comb += self.ar.valid.eq(1)
                with m.If(self.ar.ready):
                    m.d.comb += self.issued.eq(1)
                    m.d.sync += [address.eq(address + (beats << BEAT_LOG2)), left.eq(left - beats)]
                    with m.If(left == beats):
                        m.next = "Take Span"
                    with m.Else():
                        m.next = "Size Burst"
        self.probes = {
            "address": address, "left": left, "beats": beats, "flying": flying,
            "room": room, "fits": fits, "reserved": (self._depth - room - freed)[: len(room)],
        }  # fmt: skip
        return m


class WriteMaster(wiring.Component):
    """Writes spans: each span's beats follow on `i`, in order.

    A burst is issued when all its data is here, so W never pauses within a burst.

    Members
    -------
    spans : In(stream of Span); `beats` at least 1
    i : In(stream of 512 bits)
    aw, w, b : the AXI write channels
    idle : Out(1), everything that came until the cycle before was written and answered
    error : Out(1), a response was not OKAY; cleared by `clear`
    clear : In(1)
    """

    MAX_BURST = 16

    def __init__(self):
        super().__init__(
            {
                "spans": In(stream.Signature(Span)),
                "i": In(stream.Signature(BEAT_BITS)),
                "aw": Out(stream.Signature(Burst)),
                "w": Out(stream.Signature(WriteBeat)),
                "b": In(stream.Signature(RESP)),
                "idle": Out(1),
                "error": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = Queue(BEAT_BITS, 2 * self.MAX_BURST)
        address, left = Signal(ADDRESS), Signal(BEATS)
        beats, sent = Signal(range(self.MAX_BURST + 1)), Signal(range(self.MAX_BURST + 1))
        waiting = Signal(range(OUTSTANDING_BURSTS + 1))  # bursts without a response
        issue, asked, whole = Signal(), Signal(), Signal()
        wiring.connect(m, wiring.flipped(self.i), queue.i)
        m.d.comb += [
            self.aw.p.address.eq(address),
            self.aw.p.beats_less_1.eq(beats - 1),
            self.w.p.data.eq(queue.o.payload),
            self.w.p.last.eq(sent == beats - 1),
            self.b.ready.eq(1),
        ]
        m.d.sync += [waiting.eq(waiting + issue - self.b.valid), self.idle.eq(0)]
        with m.If(self.clear):
            m.d.sync += self.error.eq(0)
        with m.If(self.b.valid & self.b.payload.any()):
            m.d.sync += self.error.eq(1)
        with m.FSM():
            with m.State("Take Span"):
                m.d.comb += self.spans.ready.eq(1)
                m.d.sync += [
                    address.eq(self.spans.p.address),
                    left.eq(self.spans.p.beats),
                    self.idle.eq(~self.spans.valid & (waiting == 0) & (queue.level == 0)),
                ]
                with m.If(self.spans.valid):
                    m.next = "Size Burst"
            with m.State("Size Burst"):
                to_boundary = BURST_BEATS - address[BEAT_LOG2:BURST_LOG2]
                limit = Signal(range(BURST_BEATS + 1))
                m.d.comb += limit.eq(Mux(to_boundary < self.MAX_BURST, to_boundary,
                                         self.MAX_BURST))  # fmt: skip
                m.d.sync += [beats.eq(Mux(left < limit, left, limit)), sent.eq(0),
                             asked.eq(0), whole.eq(0)]  # fmt: skip
                m.next = "Gather"
            with m.State("Gather"):
                m.d.sync += whole.eq((queue.level >= beats) & (waiting != OUTSTANDING_BURSTS))
                with m.If(whole):
                    m.next = "Send"
            with m.State("Send"):
                # Neither channel waits for the other (IHI 0022, A3.3.1).
                all_sent = sent == beats
                m.d.comb += [
                    self.aw.valid.eq(~asked),
                    issue.eq(~asked & self.aw.ready),
                    self.w.valid.eq(~all_sent),
                    queue.o.ready.eq(~all_sent & self.w.ready),
                ]
                with m.If(issue):
                    m.d.sync += asked.eq(1)
                with m.If(self.w.valid & self.w.ready):
                    m.d.sync += sent.eq(sent + 1)
                with m.If((asked | issue) & (all_sent | (self.w.ready & self.w.p.last))):
                    m.d.sync += [address.eq(address + (beats << BEAT_LOG2)), left.eq(left - beats)]
                    with m.If(left == beats):
                        m.next = "Take Span"
                    with m.Else():
                        m.next = "Size Burst"
        self.probes = {
            "address": address, "left": left, "beats": beats, "sent": sent,
            "waiting": waiting, "asked": asked, "whole": whole,
        }  # fmt: skip
        return m
