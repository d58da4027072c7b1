# SPDX-License-Identifier: Apache-2.0
"""What the bus masters ask for, and the control registers."""

from amaranth import Cat, Mux
import pytest

from nearkv_hw import abi, axi
from nearkv_hw.axi import Control, ReadMaster, WriteMaster
from nearkv_hw.config import OUTSTANDING_BURSTS
from nearkv_hw.shapes import BURST_BEATS

CONFIG_HASH = 0x12345678


def follow_span(b, dut, burst):
    """What of the span that is being served was asked for so far.

    Returns (its address, its beats, beats asked for), and claims that bursts follow one another
    from its address, do not cross 4096 bytes, and are as long as they may be.
    """
    m = b.m
    address, beats, asked = (b.ghost(n, name) for n, name in
                             ((64, "span_address"), (16, "span_beats"), (17, "span_asked")))  # fmt: skip
    taken = dut.spans.valid & dut.spans.ready
    burst_beats = burst.p.beats_less_1 + 1
    issued = burst.valid & burst.ready
    with m.If(taken):
        m.d.sync += [address.eq(dut.spans.p.address), beats.eq(dut.spans.p.beats), asked.eq(0)]
    with m.Elif(issued):
        m.d.sync += asked.eq(asked + burst_beats)
    b.assume(dut.spans.p.beats != 0, when=dut.spans.valid)
    b.assume_stream(dut.spans)
    b.claim(asked == beats, when=taken & b.counter(taken, bits=1, name="any_span"))
    b.claim(burst.p.address == (address + (asked << 6))[:64], when=burst.valid)
    b.claim(burst.p.address[6:12] + burst_beats <= BURST_BEATS, when=burst.valid)
    b.claim(asked + burst_beats <= beats, when=burst.valid)
    b.cover(issued & (burst.p.address[6:12] + burst_beats == BURST_BEATS)
            & (asked + burst_beats < beats))  # fmt: skip
    return address, beats, asked


# As the jobs' port and the kv port have it.
@pytest.mark.parametrize(("depth", "max_burst"), [(128, 64), (1024, 64)])
def test_reads_follow_the_span_and_never_outgrow_the_reserved_space_by_induction(
    bench, depth, max_burst
):
    """Bursts stay within 4096 bytes, their beats add up to the span's, what is asked for and not
    yet freed never exceeds the queue behind, and no more bursts are under way than announced; for
    any memory that answers only what was asked.
    """
    b = bench
    dut = b.add(ReadMaster(depth, max_burst))
    issued = dut.ar.valid & dut.ar.ready
    burst_beats = dut.ar.p.beats_less_1 + 1
    on_the_way = b.counter(Mux(issued, burst_beats, 0), dut.r.valid, name="on_the_way")
    queued = b.counter(dut.r.valid, dut.freed, name="queued")
    b.assume(on_the_way != 0, when=dut.r.valid)
    b.assume(queued != 0, when=dut.freed)
    flying = b.counter(issued, dut.r.valid & dut.r.p.last, name="flying")
    b.assume(flying != 0, when=dut.r.valid)
    b.claim(flying + dut.ar.valid <= OUTSTANDING_BURSTS)
    b.claim(flying == dut.inside("flying"))

    address, beats, asked = follow_span(b, dut, dut.ar)
    b.claim_stream(dut.ar)
    b.claim(burst_beats <= max_burst, when=dut.ar.valid)
    b.claim(on_the_way + queued + Mux(dut.ar.valid, burst_beats, 0) <= depth)
    b.claim(dut.r.ready)
    b.claim(dut.o.valid == dut.r.valid)
    b.claim(dut.o.p == dut.r.p)
    b.claim(dut.issued == issued)
    b.cover(on_the_way + queued == depth)

    left, size = dut.inside("left"), dut.inside("beats")
    idle, sized = dut.state("Take Span"), dut.state("Reserve", "Issue Burst")
    b.claim(dut.inside("reserved") == on_the_way + queued + Mux(dut.ar.valid, size, 0))
    b.claim((size <= dut.inside("room")) & (flying != OUTSTANDING_BURSTS),
            when=dut.inside("fits") & dut.state("Reserve"))  # fmt: skip
    b.claim(dut.states())
    b.claim((asked + left == beats) & (left != 0), when=~idle)
    b.claim(dut.inside("address") == (address + (asked << 6))[:64], when=~idle)
    b.claim((size != 0) & (size <= left) & (size <= max_burst)
            & (dut.inside("address")[6:12] + size <= BURST_BEATS), when=sized)  # fmt: skip
    b.claim(asked == beats, when=idle)
    b.prove(reach=4 * depth // max_burst + 8)


def test_writes_follow_the_span_and_are_answered_by_induction(bench, monkeypatch):
    """Bursts stay within 4096 bytes; each has the data it announces, with `last` on the last beat
    alone and no pause, whether AW or W is taken first; no beat is sent that no span asks for; idle
    means that all is answered."""
    monkeypatch.setattr(axi, "BEAT_BITS", 8)  # nothing depends on the data
    b, m = bench, bench.m
    dut = b.add(WriteMaster())
    most = WriteMaster.MAX_BURST
    issued, sends = dut.aw.valid & dut.aw.ready, dut.w.valid & dut.w.ready
    ends = sends & dut.w.p.last
    burst_beats = dut.aw.p.beats_less_1 + 1
    address, beats, asked = follow_span(b, dut, dut.aw)
    b.assume_stream(dut.i)
    b.claim_stream(dut.aw, dut.w)
    b.claim(burst_beats <= most, when=dut.aw.valid)
    b.claim_queue(dut, "queue")

    # The burst under way: its address went out, its data went out, and how many beats.
    named, filled = b.ghost(1, "named"), b.ghost(1, "filled")
    length, data = b.ghost(8, "length"), b.ghost(8, "data")
    done = (named | issued) & (filled | ends)
    m.d.sync += [named.eq((named | issued) & ~done), filled.eq((filled | ends) & ~done)]
    m.d.sync += data.eq(Mux(done, 0, data + sends))
    with m.If(issued):
        m.d.sync += length.eq(burst_beats)
    b.claim(~named & ~(sends & filled), when=issued)
    b.claim(~filled, when=sends)
    b.claim(data + sends == burst_beats, when=issued & (filled | ends))
    b.claim(data + 1 == length, when=ends & named)
    b.claim(data + 1 < length, when=sends & ~ends & named)
    b.cover(done & issued & filled & (asked == 3))
    b.cover(done & named & ends & (data == 2))

    # The data itself: as it comes, as much as the spans ask for.
    written = b.ghost(17, "written")  # of this span
    with m.If(dut.spans.valid & dut.spans.ready):
        m.d.sync += written.eq(0)
    with m.Elif(sends):
        m.d.sync += written.eq(written + 1)
    b.claim(written < beats, when=dut.w.valid)
    queue = dut.inside("queue")
    b.claim(queue.o.valid & (dut.w.p.data == queue.o.payload), when=dut.w.valid)
    b.claim((queue.o.valid & queue.o.ready) == sends)

    # Answers: one for each burst, after its address and its last beat.
    unanswered = b.counter(done, dut.b.valid & dut.b.ready, name="unanswered")
    b.assume(unanswered != 0, when=dut.b.valid)
    b.claim(dut.b.ready)
    idle = dut.state("Take Span")
    quiet = (unanswered == 0) & ~named & ~filled & (data == 0)
    b.claim(dut.idle == b.before(idle & quiet & (queue.level == 0) & ~dut.spans.valid))
    b.claim(idle & quiet, when=dut.idle)
    b.claim((asked == beats) & (written == beats), when=idle)
    b.cover(b.ago(dut.b.valid, 2) & dut.idle)

    bad = dut.b.valid & (dut.b.payload != 0)
    b.claim(dut.error, when=b.before(bad))
    b.claim(dut.error == b.before(dut.error & ~dut.clear), when=~b.before(bad))

    left, size, sent = dut.inside("left"), dut.inside("beats"), dut.inside("sent")
    sending = dut.state("Send")
    b.claim(dut.states())
    b.claim(dut.inside("waiting") == unanswered + named)
    b.claim(unanswered + named <= OUTSTANDING_BURSTS)
    b.claim(unanswered != OUTSTANDING_BURSTS, when=sending)
    b.claim((sent == 0) & ~dut.inside("asked"), when=dut.state("Gather"))
    b.claim((queue.level >= size) & (unanswered != OUTSTANDING_BURSTS),
            when=dut.state("Gather") & dut.inside("whole"))  # fmt: skip
    b.claim(~named & ~filled & (data == 0), when=~sending)
    b.claim((dut.inside("asked") == named) & (data == sent) & (filled == (sent == size))
            & ~(named & filled) & (sent <= size) & (queue.level >= size - sent)
            & ((length == size) | ~named), when=sending)  # fmt: skip
    burst_asked, burst_written = Mux(named, size, 0), Mux(sending, sent, 0)
    b.claim((asked - burst_asked + left == beats) & (left != 0)
            & (asked - burst_asked == written - burst_written), when=~idle)  # fmt: skip
    b.claim(dut.inside("address") == (address + (asked - burst_asked << 6))[:64], when=~idle)
    b.claim((size != 0) & (size <= left) & (size <= most)
            & (dut.inside("address")[6:12] + size <= BURST_BEATS),
            when=dut.state("Gather", "Send"))  # fmt: skip
    b.prove(reach=16)


def test_control_starts_once_per_request_and_reports_each_end_once_by_induction(bench):
    """ap_ctrl_hs (UG1393). A run is from `start` to `done`; a request, a write of ap_start.

    Each request outside a run gives one `start`, one or two cycles after it; requests during a run
    give none. Each `done` is seen as ap_done and ap_ready by exactly one read of CTRL, the next
    one. ap_idle is high exactly when there is neither a run nor a request. The arguments of a run
    are those written before its `start`, and stay until the next one. `interrupt` is GIER and any
    of IP_ISR that IP_IER enables; a `done` in the cycle of a write to IP_ISR is kept.
    """
    b, m = bench, bench.m
    dut = b.add(Control(CONFIG_HASH))
    bus = dut.bus
    b.assume_stream(bus.aw, bus.w, bus.ar)
    b.claim_stream(bus.b, bus.r)

    running, requested = b.ghost(1, "running"), b.ghost(1, "requested")
    writes, reads = bus.aw.valid & bus.aw.ready, bus.ar.valid & bus.ar.ready
    b.claim((bus.w.valid & bus.w.ready) == writes)
    b.assume(running & ~dut.start, when=dut.done)
    requests = writes & (bus.aw.payload[2:] == 0) & bus.w.p.strb[0] & bus.w.p.data[0]
    begins = b.ghost(1, "begins")  # the cycle before `start`
    m.d.comb += begins.eq(requested & ~running)
    m.d.sync += [running.eq((running | begins) & ~dut.done),
                 requested.eq((requested | requests) & ~dut.done)]  # fmt: skip
    b.claim(dut.start == b.before(begins))
    b.claim(running, when=dut.start)
    b.claim(requested, when=running)
    b.cover(dut.start & (b.counter(dut.start, name="starts") == 1))
    b.cover(dut.done & requests)

    # CTRL, read.
    news = b.ghost(1, "news")  # an end that was not read yet
    ctrl = reads & (bus.ar.payload[2:] == abi.REG_CTRL >> 2)
    m.d.sync += news.eq((news & ~ctrl) | dut.done)
    expected = Cat(requested, news, ~running & ~requested, news)
    b.claim(bus.r.p.data == b.before(expected), when=b.before(ctrl))
    b.claim(bus.r.p.resp == 0)
    b.claim(bus.b.payload == 0)
    b.cover(ctrl & news)
    b.cover(ctrl & dut.done & news)

    # Interrupts.
    lane_0 = writes & bus.w.p.strb[0]
    enables = {}
    for offset, bits in ((abi.REG_GIER, 1), (abi.REG_IER, 2), (abi.REG_ISR, 2)):
        enables[offset] = value = b.ghost(bits, f"register_{offset}")
        given = bus.w.p.data[:bits]
        with m.If(lane_0 & (bus.aw.payload[2:] == offset >> 2)):
            m.d.sync += value.eq(value ^ given if offset == abi.REG_ISR else given)
        b.claim(bus.r.p.data == b.before(value),
                when=b.before(reads & (bus.ar.payload[2:] == offset >> 2)))  # fmt: skip
    for bit in range(2):
        with m.If(dut.done & enables[abi.REG_IER][bit]):
            m.d.sync += enables[abi.REG_ISR][bit].eq(1)
    wanted = enables[abi.REG_GIER] & (enables[abi.REG_IER] & enables[abi.REG_ISR]).any()
    b.claim(dut.interrupt == b.before(wanted))
    b.cover(dut.interrupt & lane_0 & (bus.aw.payload[2:] == abi.REG_ISR >> 2) & dut.done)
    for name, offset in (("global_enable", abi.REG_GIER), ("enable", abi.REG_IER),
                         ("pending", abi.REG_ISR)):  # fmt: skip
        b.claim(dut.inside(name) == enables[offset])

    # Each write and each read is answered once.
    writes_open = b.counter(writes, bus.b.valid & bus.b.ready, name="writes_open")
    reads_open = b.counter(reads, bus.r.valid & bus.r.ready, name="reads_open")
    b.claim(writes_open == bus.b.valid)
    b.claim(reads_open == bus.r.valid)

    # Arguments: one arbitrary byte.
    written, address = b.ghost(8, "written"), b.constant(12, "address")
    lane = b.constant(2, "lane")
    lanes = [bus.w.p.data.word_select(lane, 8), bus.w.p.strb.bit_select(lane, 1)]
    with m.If(writes & (bus.aw.payload[2:] == address[2:]) & lanes[1]):
        m.d.sync += written.eq(lanes[0])
    reads_it = reads & (bus.ar.payload[2:] == address[2:])
    for register in abi.REGISTERS:
        for word in range(register.bits // 32):
            here = address[2:] == register.offset // 4 + word
            if not register.writable:
                value = {"abi_version": abi.ABI_VERSION, "config_hash": CONFIG_HASH}[register.name]
                b.claim(bus.r.p.data == value, when=b.before(reads_it) & here)
                continue
            byte = dut.args[register.name][32 * word : 32 * word + 32].word_select(lane, 8)
            same = byte == b.before(byte, "arg")
            b.claim(byte == b.before(written, "written_then"), when=here & dut.start)
            b.claim(same | dut.start, when=here & b.begun)
            b.claim(bus.r.p.data.word_select(lane, 8) == b.before(written, "written_then"),
                    when=b.before(reads_it) & here)  # fmt: skip
            held = dut.inside("words")[register.offset + 4 * word].word_select(lane, 8)
            b.claim(held == written, when=here)

    busy, ap_start = dut.inside("busy"), dut.inside("ap_start")
    b.claim((busy == running) & (ap_start == requested))
    b.claim((dut.inside("ap_done") == news) & (dut.inside("ap_ready") == news))
    b.prove(reach=12)
