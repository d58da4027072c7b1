# SPDX-License-Identifier: Apache-2.0
"""The masters obey AXI4 and move exactly what was asked; the registers obey `ap_ctrl_hs`."""

import itertools

import pytest

from nearkv_hw import abi
from nearkv_hw.axi import Control, ReadMaster, Span, WriteMaster
from nearkv_hw.config import OUTSTANDING_BURSTS

# --- read master ----------------------------------------------------------------------------------

# (address, beats): each side of a 4096-byte boundary, one beat, many bursts, high addresses
SPANS = (
    (0x1000, 64), (0x1FC0, 1), (0x1FC0, 2), (0x2040, 63), (0x2040, 64), (0x3F80, 130),
    (0xFFFF_FFC0, 3), (0xFEDC_BA98_7654_3000, 7), (0x40, 1),
)  # fmt: skip


def random_spans(rng, n):
    return [(int(rng.integers(1 << 20)) * 64, int(rng.integers(1, 80))) for _ in range(n)]


def content(address):
    """64 bytes that tell their address."""
    return b"".join((address + 8 * i).to_bytes(8, "little") for i in range(8))


def beats_of(spans):
    return [
        int.from_bytes(content(address + 64 * i), "little")
        for address, beats in spans
        for i in range(beats)
    ]


def read(bench, dut, spans, depth, pauses, latency=9):
    """Reads spans through a queue of `depth` beats that is emptied with pauses."""
    run = bench(dut)
    source = run.source(
        dut.spans, [bench.bits(Span, {"address": a, "beats": n}) for a, n in spans], pauses(0)
    )
    memory = run.read_memory(dut.ar, dut.r, content, pauses(1), pauses(2), latency)
    arrived = run.tap(dut.o.valid, dut.o.payload)
    issued = run.tap(dut.issued)
    outstanding = []  # beats asked for and not yet freed, each cycle

    def consumer():
        # The queue behind, as a number: it frees what arrived, one beat a cycle at most.
        held, freed = 0, 0
        pause = pauses(3)
        while True:
            (valid,) = yield [(dut.freed, freed)]
            held += valid - freed
            freed = int(held > 0 and not next(pause))
            asked = sum(beats for _, _, beats in memory.bursts)
            outstanding.append(asked - (len(arrived) - held))

    run.script([dut.o.valid], consumer())
    total = sum(beats for _, beats in spans)
    run.run(lambda: len(arrived) == total and source.done and not outstanding[-1], extra=4)
    assert [beat & (1 << 512) - 1 for (beat,) in arrived.items] == beats_of(spans)
    assert max(outstanding) <= depth
    assert len(issued) == len(memory.bursts)
    return memory, arrived


@pytest.mark.slow
@pytest.mark.parametrize("depth, max_burst", [(256, 64), (64, 64), (32, 16), (1, 1)])
def test_read_master_covers_spans_exactly_within_its_room(bench, pauses, rng, depth, max_burst):
    dut = ReadMaster(depth, max_burst)
    spans = [*SPANS, *random_spans(rng, 2)] if depth > 1 else SPANS[1:4]
    memory, _ = read(bench, dut, spans, depth, pauses)
    asked = []
    for address, beats in spans:
        asked += [address + 64 * i for i in range(beats)]
    got = []
    for _, address, beats in memory.bursts:  # the memory itself refuses to cross 4096 bytes
        assert 1 <= beats <= max_burst
        got += [address + 64 * i for i in range(beats)]
    assert got == asked


def test_read_master_uses_the_longest_bursts_there_are(bench, pauses):
    dut = ReadMaster(256)
    memory, _ = read(bench, dut, [(0x1F00, 64 * 3)], 256, pauses)
    assert [beats for _, _, beats in memory.bursts] == [4, 64, 64, 60]


def test_read_master_keeps_the_bus_busy(bench):
    dut = ReadMaster(256)

    def never(side):
        return itertools.repeat(False)

    memory, arrived = read(bench, dut, [(0, 1024)], 256, never, latency=30)
    cycles = arrived.cycles[-1] - arrived.cycles[0] + 1
    assert cycles == 1024, f"{cycles} cycles for 1024 beats"


def test_masters_have_at_most_so_many_bursts_under_way(bench):
    """Short bursts far from the end of the room, and a memory that answers late."""

    def never(side):
        return itertools.repeat(False)

    spans = [(4096 * i, 1) for i in range(3 * OUTSTANDING_BURSTS)]
    memory, arrived = read(bench, ReadMaster(512), spans, 512, never, latency=400)
    asked, came = [at for at, *_ in memory.bursts], arrived.cycles
    under_way = [i + 1 - sum(at < cycle for at in came) for i, cycle in enumerate(asked)]
    assert max(under_way) == OUTSTANDING_BURSTS

    memory, _, _, _ = write(bench, WriteMaster(), spans, never, latency=400)
    under_way = [
        i + 1 - sum(at < cycle for at in memory.answers)
        for i, (cycle, *_) in enumerate(memory.bursts)
    ]
    assert max(under_way) == OUTSTANDING_BURSTS


def test_read_master_passes_responses_on(bench, pauses):
    dut = ReadMaster(64)
    run = bench(dut)
    run.source(dut.spans, [bench.bits(Span, {"address": 0, "beats": 70})])
    run.read_memory(
        dut.ar, dut.r, content, pauses(1), pauses(2), error=lambda at: (at // 64) % 4
    )  # fmt: skip
    arrived = run.tap(dut.o.valid, dut.o.p.resp, dut.o.p.last)

    def free():
        valid = 0
        while True:
            (valid,) = yield [(dut.freed, valid)]

    run.script([dut.o.valid], free())
    run.run(lambda: len(arrived) == 70)
    assert [resp for resp, _ in arrived.items] == [i % 4 for i in range(70)]
    assert [i for i, (_, last) in enumerate(arrived.items) if last] == [63, 69]


@pytest.mark.parametrize("depth, max_burst", [(64, 65), (64, 0), (8, 16)])
def test_read_master_refuses_bursts_it_could_never_issue(refuses, depth, max_burst):
    with refuses("max_burst must be 1 .. min"):
        ReadMaster(depth, max_burst)


# --- write master ---------------------------------------------------------------------------------


class Written(dict):
    """Memory that notes what was written where; nothing may be written twice."""

    def write(self, address, data):
        assert address not in self
        self[address] = data


def write(bench, dut, spans, pauses, latency=5, error=lambda address: 0):
    run = bench(dut)
    data = beats_of(spans)
    run.source(
        dut.spans, [bench.bits(Span, {"address": a, "beats": n}) for a, n in spans], pauses(0)
    )
    run.source(dut.i, data, pauses(2))  # data comes slower than it could leave
    written = Written()
    memory = run.write_memory(
        dut.aw, dut.w, dut.b, written.write, pauses(0), pauses(1), pauses(4), latency, error
    )  # fmt: skip
    w = run.tap(dut.w.valid, dut.w.ready, dut.w.p.last)
    idle = run.tap(dut.idle)
    errors = run.tap(dut.error)
    run.run(
        lambda: len(written) == len(data) and len(idle) and idle.cycles[-1] >= run.cycle - 2,
        extra=3,
    )
    assert written == {
        address + 64 * i: content(address + 64 * i) for address, n in spans for i in range(n)
    }
    return memory, w, idle, errors


def test_write_master_writes_spans_exactly(bench, pauses, rng):
    spans = sorted(
        {a // 0x10000 * 0x10000 + a % 0x1000: n for a, n in random_spans(rng, 5)}.items()
    )
    memory, _, _, errors = write(bench, WriteMaster(), [*spans, (1 << 40 | 0xFC0, 2)], pauses)
    assert all(beats <= WriteMaster.MAX_BURST for _, _, beats in memory.bursts)
    assert not errors.items


def test_write_master_never_pauses_within_a_burst(bench, pauses):
    _, w, _, _ = write(bench, WriteMaster(), [(0, 40), (0x2FC0, 20)], pauses)
    inside = False
    for (cycle, (ready, last)), following in itertools.pairwise(
        zip([*w.cycles, None], [*w.items, (0, 0)], strict=True)
    ):
        inside = not (ready and last)
        if inside:
            assert following[0] == cycle + 1


def test_write_master_is_idle_only_when_all_is_answered(bench, pauses):
    memory, _, idle, _ = write(bench, WriteMaster(), [(0, 33), (0x1FC0, 2)], pauses, latency=40)
    first, last = memory.beats[0][0], memory.answers[-1]
    assert not [cycle for cycle in idle.cycles if first <= cycle <= last]
    assert idle.cycles[-1] > last


@pytest.mark.parametrize("response", [2, 3])
def test_write_master_remembers_an_error_until_cleared(bench, response):
    dut = WriteMaster()
    run = bench(dut)
    run.source(dut.spans, [bench.bits(Span, {"address": 0, "beats": 40})])
    run.source(dut.i, [0] * 40)
    memory = run.write_memory(
        dut.aw, dut.w, dut.b, lambda *_: None, error=lambda at: response if at == 1024 else 0
    )
    errors = run.tap(dut.error)

    def clear():
        while True:
            yield [(dut.clear, int(len(memory.answers) == 3 and run.cycle > 150))]

    run.script([], clear())
    run.run(lambda: run.cycle == 170)
    assert len(memory.answers) == 3
    assert errors.cycles == list(range(memory.answers[1] + 1, 153))


@pytest.mark.parametrize("late", ["aw", "w"])
def test_write_master_lets_neither_channel_wait_for_the_other(bench, late):
    """IHI 0022, A3.3.1: a subordinate may accept AW only once it sees W valid, or the reverse."""
    dut = WriteMaster()
    run = bench(dut)
    run.source(dut.spans, [bench.bits(Span, {"address": 0, "beats": 20})])
    run.source(dut.i, [0] * 20)
    beats = []

    def subordinate():
        first, other = (dut.w, dut.aw) if late == "aw" else (dut.aw, dut.w)
        # Beats of W and bursts of AW, as (taken, taken); the late one needs the other to be seen.
        while True:
            seen, taken, is_last, answer = yield [(first.ready, 1), (other.ready, 0)]
            if seen:
                break
        while True:
            seen, taken, is_last, answer = yield [(first.ready, 1), (other.ready, 1)]
            if taken:
                beats.append(is_last)

    run.script(
        [
            (dut.w if late == "aw" else dut.aw).valid,
            dut.w.valid & dut.w.ready,
            dut.w.p.last,
            dut.b.ready,
        ],
        subordinate(),
    )
    run.run(lambda: len(beats) >= 16, limit=200)


# --- control --------------------------------------------------------------------------------------

OFFSETS = {
    (register.name, i): register.offset + 4 * i
    for register in abi.REGISTERS
    if register.writable
    for i in range(register.bits // 32)
}
HASH = 0x89ABCDEF


class Host:
    """Reads and writes registers one after the other, as a script of tuples.

    ("w", offset, value[, strobes]), ("r", offset), ("done",) for a cycle of `done`,
    ("wait", cycles). `values` are the answers to reads, in order.
    """

    def __init__(self, bench, dut, script, pauses):
        self.dut, self.values, self.finished = dut, [], False
        self.run = bench(dut)
        self.bits = bench.bits
        self.starts = self.run.tap(dut.start, *(getattr(dut.args, n) for n in self.names()))
        self.pauses = [pauses(side) for side in range(5)]
        bus = dut.bus
        self.run.script(
            [bus.aw.ready, bus.w.ready, bus.b.valid, bus.b.payload, bus.ar.ready, bus.r.valid,
             bus.r.p.data, bus.r.p.resp],
            self.agent(script),
        )  # fmt: skip

    @staticmethod
    def names():
        return [register.name for register in abi.REGISTERS if register.writable]

    def agent(self, script):
        bus, dut = self.dut.bus, self.dut
        aw, w, b, ar, r = self.pauses
        for kind, *args in script:
            if kind == "w":
                offset, value, strobes = (*args, 15)[:3]
                word = self.bits(bus.w.payload.shape(), {"data": value, "strb": strobes})
                waiting = {"aw": offset, "w": word}
                asserted, answered = set(), False
                while waiting or not answered:
                    sets = []
                    for name, pause in (("aw", aw), ("w", w)):
                        stream = getattr(bus, name)
                        if name in waiting and (name in asserted or not next(pause)):
                            asserted.add(name)
                            sets += [
                                (stream.valid, 1),
                                (
                                    stream.payload.as_value() if name == "w" else stream.payload,
                                    waiting[name],
                                ),
                            ]
                        else:
                            sets.append((stream.valid, 0))
                    take = not next(b)
                    got = yield [*sets, (bus.b.ready, take)]
                    for name, ready in (("aw", got[0]), ("w", got[1])):
                        if name in asserted and ready:
                            waiting.pop(name, None)
                    if got[2] and take:
                        assert got[3] == 0
                        assert not waiting
                        answered = True
                yield [(bus.aw.valid, 0), (bus.w.valid, 0), (bus.b.ready, 0)]
            elif kind == "r":
                while next(ar):
                    yield []
                sets = [(bus.ar.valid, 1), (bus.ar.payload, args[0])]
                while True:
                    got = yield sets
                    sets = []
                    if got[4]:
                        break
                sets = [(bus.ar.valid, 0)]
                value = None
                while value is None:
                    take = not next(r)
                    got = yield [*sets, (bus.r.ready, take)]
                    sets = []
                    if got[5] and take:
                        assert got[7] == 0
                        value = got[6]
                self.values.append(value)
                yield [(bus.r.ready, 0)]
            elif kind == "done":
                yield [(dut.done, 1)]
                yield [(dut.done, 0)]
            elif kind == "wait":
                for _ in range(args[0]):
                    yield []
        self.finished = True
        while True:
            yield []

    def go(self):
        self.run.run(lambda: self.finished, extra=3)
        return self.values


def arguments(rng):
    return {key: int(rng.integers(1 << 32)) for key in OFFSETS}


def write_all(values):
    return [("w", OFFSETS[key], value) for key, value in values.items()]


def as_args(values):
    """What `args` must show, in the order of the registers."""
    out = []
    for register in abi.REGISTERS:
        if register.writable:
            parts = [values[register.name, i] for i in range(register.bits // 32)]
            out.append(sum(part << 32 * i for i, part in enumerate(parts)))
    return tuple(out)


START = ("w", abi.REG_CTRL, abi.CTRL_START)
CTRL = ("r", abi.REG_CTRL)
RUNNING, IDLE = abi.CTRL_START, abi.CTRL_IDLE
DONE = abi.CTRL_DONE | abi.CTRL_READY | abi.CTRL_IDLE


def test_control_runs_once_per_start_and_clears_done_on_read(bench, pauses, rng):
    values = arguments(rng)
    host = Host(
        bench, Control(HASH),
        [CTRL, *write_all(values), START, CTRL, ("wait", 20), CTRL, ("done",), CTRL, CTRL,
         START, ("wait", 3), ("done",), ("wait", 9), CTRL, CTRL],
        pauses,
    )  # fmt: skip
    assert host.go() == [IDLE, RUNNING, RUNNING, DONE, IDLE, DONE, IDLE]
    assert host.starts.items == [as_args(values)] * 2


def test_control_reads_back_arguments_and_constants(bench, pauses, rng):
    values = arguments(rng)
    reads = [("r", offset) for offset in OFFSETS.values()]
    constants = [("r", r.offset) for r in abi.REGISTERS if not r.writable]
    host = Host(bench, Control(HASH), [*write_all(values), *reads, *constants], pauses)
    assert host.go() == [*values.values(), abi.ABI_VERSION, HASH]


def test_control_takes_arguments_over_when_a_run_begins(bench, pauses, rng):
    first, second = arguments(rng), arguments(rng)
    dut = Control(HASH)
    host = Host(
        bench, dut,
        [*write_all(first), START, *write_all(second), START, ("wait", 5), ("done",), ("wait", 2),
         CTRL, START, ("wait", 3), ("done",)],
        pauses,
    )  # fmt: skip
    args = host.run.tap(1, *(getattr(dut.args, name) for name in host.names()))
    assert host.go() == [DONE]
    assert host.starts.items == [as_args(first), as_args(second)]
    begin, again = host.starts.cycles
    assert set(args.items[begin:again]) == {as_args(first)}


def test_control_heeds_byte_strobes(bench, pauses, rng):
    at = OFFSETS["queue", 0]
    script, want, word = [("w", at, 0)], [], 0
    for _ in range(12):
        value, strobes = int(rng.integers(1 << 32)), int(rng.integers(16))
        mask = sum(0xFF << 8 * i for i in range(4) if strobes >> i & 1)
        word = word & ~mask | value & mask
        script += [("w", at, value, strobes), ("r", at)]
        want.append(word)
    # ap_start lies in byte 0: without its strobe nothing starts.
    script += [("w", abi.REG_CTRL, 1, 0b1110), ("wait", 3), CTRL]
    host = Host(bench, Control(HASH), script, pauses)
    assert host.go() == [*want, IDLE]
    assert not host.starts.items


def test_control_ignores_writes_to_words_without_a_meaning(bench, pauses, rng):
    values = arguments(rng)
    known = {*OFFSETS.values(), abi.REG_CTRL, abi.REG_GIER, abi.REG_IER, abi.REG_ISR}
    constants = {r.offset: r for r in abi.REGISTERS if not r.writable}
    others = [at for at in [*range(0, 0x60, 4), 0x800, 0xFFC] if at not in known]
    host = Host(
        bench, Control(HASH),
        [*write_all(values), *(("w", at, 0xFFFFFFFF) for at in others),
         *(("r", at) for at in others), *(("r", at) for at in OFFSETS.values()), CTRL],
        pauses,
    )  # fmt: skip
    expected = {abi.REGISTERS[-2].offset: abi.ABI_VERSION, abi.REGISTERS[-1].offset: HASH}
    assert set(expected) == set(constants)
    want = [expected.get(at, 0) for at in others]
    assert host.go() == [*want, *values.values(), IDLE]
    assert not host.starts.items


BOTH = abi.IRQ_DONE | abi.IRQ_READY
ISR = ("r", abi.REG_ISR)


def test_control_interrupts_until_the_status_is_written_back(bench, pauses):
    host = Host(
        bench, Control(HASH),
        [("r", abi.REG_GIER), ("r", abi.REG_IER), ISR, START, ("wait", 4), ("done",), ISR, CTRL,
         ("w", abi.REG_GIER, 0xFFFFFFFF), ("w", abi.REG_IER, abi.IRQ_DONE), ("r", abi.REG_GIER),
         ("r", abi.REG_IER), START, ("wait", 4), ("done",), ("wait", 3), ISR, CTRL, ISR,
         ("w", abi.REG_ISR, abi.IRQ_DONE), ISR, ("wait", 3)],
        pauses,
    )  # fmt: skip
    wire = host.run.tap(1, host.dut.interrupt)
    # What ends without being enabled is not kept; reading CTRL clears no interrupt.
    assert host.go() == [0, 0, 0, 0, DONE, 1, 1, 1, DONE, 1, 0]
    levels = [level for (level,) in wire.items]
    assert levels[0] == levels[-1] == 0
    assert sum(a != b for a, b in itertools.pairwise(levels)) == 2


def test_control_interrupt_status_inverts_the_bits_written(bench, pauses):
    host = Host(
        bench, Control(HASH),
        [("w", abi.REG_IER, 0xFFFFFFFF), ("r", abi.REG_IER), START, ("wait", 4), ("done",), ISR,
         ("w", abi.REG_ISR, 0), ISR, ("w", abi.REG_ISR, 0xFFFFFFFF, 0b1110), ISR,
         ("w", abi.REG_ISR, 1), ISR, ("w", abi.REG_ISR, 3), ISR, ("w", abi.REG_ISR, 1), ISR],
        pauses,
    )  # fmt: skip
    wire = host.run.tap(host.dut.interrupt)
    assert host.go() == [BOTH, 3, 3, 3, 2, 1, 0]
    assert not wire.items  # GIER was never set


@pytest.mark.parametrize("offset", range(-4, 5))
def test_control_loses_no_done_to_a_read_in_the_same_cycle(bench, offset):
    """A run ends some cycles before or after CTRL is read: exactly one read says so."""

    def never(side):
        return itertools.repeat(False)

    dut = Control(HASH)
    host = Host(bench, dut, [START, ("wait", 17), *[CTRL] * 6], never)
    reads = host.run.tap(dut.bus.ar.valid & dut.bus.ar.ready)

    def done():
        while True:
            yield [(dut.done, int(host.run.cycle == 25 + offset))]

    host.run.script([], done())
    values = host.go()
    # `done` is high in cycle 26 + offset; some reads lie within the cycles tried.
    assert 26 in reads.cycles
    assert [value for value in values if value & abi.CTRL_DONE] == [DONE]
    assert values[-1] == IDLE
    assert set(values[: values.index(DONE)]) <= {RUNNING}
