# SPDX-License-Identifier: Apache-2.0
"""A bench for components under Amaranth's own simulator: streams, pauses, AXI memories.

Everything that acts on a component is an *agent*: it names the signals it looks at, and once a
cycle, given their values at the clock edge, says what to drive from that edge on. So agents behave
like registers, and the order in which they run changes nothing. Cycle n is the time before edge n.
"""

from collections import deque
from contextlib import contextmanager
import gc
import itertools
import zlib

from amaranth import Cat, Module, Signal, Value
from amaranth.hdl import UnusedElaboratable
from amaranth.lib import data
from amaranth.sim import Simulator
import numpy as np
import pytest

from nearkv_hw import abi


def payload_of(stream):
    """A stream's payload as one value."""
    return Value.cast(stream.payload)


class Source:
    """Gives items to a stream, in order. Between them the payload is garbage.

    Attributes
    ----------
    cycles : list of int
        When each item was taken.
    """

    def __init__(self, bench, stream, items, pause):
        self._bench, self._stream, self._items, self._pause = bench, stream, deque(items), pause
        self.watch = [stream.ready]
        self.cycles = []

    @property
    def done(self) -> bool:
        return not self._items

    def give(self, item) -> None:
        """One more item."""
        self._items.append(item)

    def agent(self):
        valid, payload = self._stream.valid, payload_of(self._stream)
        garbage = self._bench.garbage(len(payload))
        while True:
            if not self._items or next(self._pause):
                yield [(valid, 0), (payload, next(garbage))]
                continue
            sets = [(valid, 1), (payload, self._items[0])]
            while True:
                (ready,) = yield sets
                sets = []
                if ready:
                    break
            self._items.popleft()
            self.cycles.append(self._bench.cycle)


class Sink:
    """Takes what a stream gives, and holds it to the stream rules.

    Attributes
    ----------
    items : list of int
    cycles : list of int
        When each item was taken.
    """

    def __init__(self, bench, stream, pause):
        self._bench, self._stream, self._pause = bench, stream, pause
        self.watch = [stream.valid, payload_of(stream)]
        self.items, self.cycles = [], []

    def __len__(self) -> int:
        return len(self.items)

    def agent(self):
        offered = None
        while True:
            ready = not next(self._pause)
            valid, payload = yield [(self._stream.ready, ready)]
            if offered is not None:
                assert valid, f"cycle {self._bench.cycle}: valid fell before ready"
                assert payload == offered, (
                    f"cycle {self._bench.cycle}: payload changed before ready"
                )
            offered = payload if valid and not ready else None
            if valid and ready:
                self.items.append(payload)
                self.cycles.append(self._bench.cycle)


class Tap:
    """Notes values in every cycle in which `valid` is high.

    Attributes
    ----------
    items : list of tuples of int
    cycles : list of int
    """

    def __init__(self, bench, valid, values):
        self._bench = bench
        self.watch = [valid, *values]
        self.items, self.cycles = [], []

    def __len__(self) -> int:
        return len(self.items)

    def agent(self):
        while True:
            valid, *values = yield []
            if valid:
                self.items.append(tuple(values))
                self.cycles.append(self._bench.cycle)


class Script:
    """An agent of a test's own: a generator that yields what to drive and is sent `watch`."""

    def __init__(self, watch, agent):
        self.watch, self._agent = list(watch), agent

    def agent(self):
        return self._agent


class ReadMemory:
    """The subordinate of a pair of AXI read channels, answering in order.

    Attributes
    ----------
    bursts : list of (cycle, address, beats)
    beats : int
        Data transfers so far.
    """

    def __init__(self, bench, ar, r, read, pause_ar, pause_r, latency, error):
        self._bench, self._read, self._latency, self._error = bench, read, latency, error
        bench.sink(ar, pause_ar)
        self.bursts = []
        self._r, self._pause = r, pause_r
        self.watch = [ar.valid, ar.ready, payload_of(ar), r.ready]
        self.beats = 0

    def agent(self):
        due, giving = deque(), False  # (cycle, address, last)
        valid, payload = self._r.valid, payload_of(self._r)
        garbage = self._bench.garbage(len(payload))
        sets = [(valid, 0), (payload, next(garbage))]
        while True:
            ar_valid, ar_ready, burst, r_ready = yield sets
            sets = []
            if ar_valid and ar_ready:
                address, beats = burst & (1 << 64) - 1, (burst >> 64) + 1
                offset = address % abi.BURST_BYTES
                assert address % abi.BEAT_BYTES == 0
                assert offset + beats * abi.BEAT_BYTES <= abi.BURST_BYTES, "crosses 4096 bytes"
                self.bursts.append((self._bench.cycle, address, beats))
                for i in range(beats):
                    due.append((self._bench.cycle + self._latency,
                                address + i * abi.BEAT_BYTES, i == beats - 1))  # fmt: skip
            if giving and r_ready:
                self.beats += 1
                giving = False
            if not giving:
                if due and due[0][0] <= self._bench.cycle and not next(self._pause):
                    _, address, last = due.popleft()
                    beat = int.from_bytes(self._read(address), "little")
                    resp = self._error(address)
                    sets = [(valid, 1), (payload, beat | resp << 512 | last << 514)]
                    giving = True
                else:
                    sets = [(valid, 0), (payload, next(garbage))]


class WriteMemory:
    """The subordinate of AXI write channels. Bursts are answered in order.

    Attributes
    ----------
    bursts : list of (cycle, address, beats)
    beats : list of (cycle, address)
    answers : list of int
        Cycle of each response.
    """

    def __init__(self, bench, aw, w, b, write, pause_aw, pause_w, pause_b, latency, error):
        self._bench, self._write = bench, write
        self._b, self._pause, self._latency, self._error = b, pause_b, latency, error
        bench.sink(aw, pause_aw)
        bench.sink(w, pause_w)
        self.watch = [aw.valid, aw.ready, payload_of(aw), w.valid, w.ready, payload_of(w), b.ready]
        self.bursts, self.beats, self.answers = [], [], []

    def agent(self):
        places, due = deque(), deque()  # (address, last, response); (cycle, response)
        early = deque()  # data that came before its address
        answering = False
        valid, payload = self._b.valid, payload_of(self._b)
        garbage = self._bench.garbage(2)
        sets = [(valid, 0), (payload, next(garbage))]
        while True:
            aw_valid, aw_ready, burst, w_valid, w_ready, beat, b_ready = yield sets
            sets, now = [], self._bench.cycle
            if aw_valid and aw_ready:
                address, beats = burst & (1 << 64) - 1, (burst >> 64) + 1
                assert address % abi.BEAT_BYTES == 0
                assert address % abi.BURST_BYTES + beats * abi.BEAT_BYTES <= abi.BURST_BYTES
                self.bursts.append((now, address, beats))
                response = self._error(address)
                for i in range(beats):
                    places.append((address + i * abi.BEAT_BYTES, i == beats - 1, response))
            if w_valid and w_ready:
                early.append((now, beat))
            while early and places:
                at, beat = early.popleft()
                address, last, response = places.popleft()
                assert beat >> 512 == last, f"cycle {now}: w.last is {beat >> 512}"
                self._write(address, (beat & (1 << 512) - 1).to_bytes(abi.BEAT_BYTES, "little"))
                self.beats.append((at, address))
                if last:
                    due.append((now + self._latency, response))
            if answering and b_ready:
                answering = False
                self.answers.append(now)
            if not answering:
                if due and due[0][0] <= now and not next(self._pause):
                    answering = True
                    sets = [(valid, 1), (payload, due.popleft()[1])]
                else:
                    sets = [(valid, 0), (payload, next(garbage))]


class Bench:
    """Runs one component with agents around it.

    Parameters
    ----------
    dut : Component
    seed : int
        Of the garbage on payloads that are not valid.
    """

    def __init__(self, dut, seed=0):
        self.dut = dut
        self.cycle = 0
        self._agents = []
        self._rng = np.random.default_rng(seed)

    def garbage(self, bits):
        """Endless random values of so many bits: what lies on wires that mean nothing."""
        while True:
            yield int.from_bytes(self._rng.bytes(-(-bits // 8)), "little") & (1 << bits) - 1

    def add(self, agent):
        self._agents.append(agent)
        return agent

    def source(self, stream, items=(), pause=None) -> Source:
        return self.add(Source(self, stream, items, pause or itertools.repeat(False)))

    def sink(self, stream, pause=None) -> Sink:
        return self.add(Sink(self, stream, pause or itertools.repeat(False)))

    def tap(self, valid, *values) -> Tap:
        return self.add(Tap(self, valid, [Value.cast(value) for value in values]))

    def script(self, watch, agent) -> Script:
        return self.add(Script(watch, agent))

    def read_memory(
        self, ar, r, read, pause_ar=None, pause_r=None, latency=1, error=lambda address: 0
    ) -> ReadMemory:
        """`read(address)` gives the 64 bytes there, `error(address)` the response."""
        never = itertools.repeat(False)
        return self.add(
            ReadMemory(self, ar, r, read, pause_ar or never, pause_r or never, latency, error)
        )

    def write_memory(
        self, aw, w, b, write, pause_aw=None, pause_w=None, pause_b=None, latency=3,
        error=lambda address: 0,
    ) -> WriteMemory:  # fmt: skip
        """`write(address, data)` is called for each beat, `error(address)` gives the response."""
        never = itertools.repeat(False)
        return self.add(
            WriteMemory(self, aw, w, b, write, pause_aw or never, pause_w or never,
                        pause_b or never, latency, error)
        )  # fmt: skip

    def run(self, until, limit=20000, extra=0):
        """Until `until()` is true, and some extra cycles, in which nothing more should come.

        Raises
        ------
        AssertionError
            After `limit` cycles; tells how far each agent got.
        """
        running = [agent.agent() for agent in self._agents]
        m = Module()
        m.submodules.dut = self.dut
        # All that is watched in one signal: the simulator takes long over each value it samples.
        watch, places, total = [], [], 0
        for agent in self._agents:
            places.append([])
            for value in map(Value.cast, agent.watch):
                signed = value.shape().signed
                places[-1].append((total, (1 << len(value)) - 1, (signed << len(value)) >> 1))
                watch.append(value)
                total += len(value)
        watched = Signal(total)
        m.d.comb += watched.eq(Cat(watch))
        over = False

        async def process(ctx):
            nonlocal over
            for generator in running:
                for signal, value in next(generator):
                    ctx.set(signal, value)
            left, driven = None, {}
            async for _, _, value in ctx.tick().sample(watched):
                # (x ^ sign) - sign extends the sign of a number whose sign bit is `sign`.
                sets = [
                    generator.send(
                        [((value >> at & mask) ^ sign) - sign for at, mask, sign in mine]
                    )
                    for generator, mine in zip(running, places, strict=True)
                ]
                for signal, value in itertools.chain.from_iterable(sets):
                    if driven.get(id(signal)) != value:
                        ctx.set(signal, value)
                        if isinstance(signal, Signal):
                            driven[id(signal)] = value
                self.cycle += 1
                if left is None and until():
                    left = extra
                if left is not None:
                    if left == 0:
                        break
                    left -= 1
                elif self.cycle >= limit:
                    done = {
                        type(agent).__name__ + str(n): len(agent.cycles)
                        for n, agent in enumerate(self._agents)
                        if hasattr(agent, "cycles")
                    }
                    raise AssertionError(f"not done after {limit} cycles; transfers: {done}")
            over = True

        simulator = Simulator(m)
        simulator.add_clock(1e-8)
        simulator.add_process(process)
        while not over:
            simulator.advance()


def bits(shape, value) -> int:
    """A payload as the bench wants it: `value` (dict, list or number) in a data layout."""
    return shape.const(value).as_bits() if hasattr(shape, "const") else value


def fields(shape, value: int):
    """The inverse of `bits`: a constant with the layout's fields."""
    return data.Const(shape if isinstance(shape, data.Layout) else shape.as_shape(), value)


@pytest.fixture
def bench():
    """The class `Bench`, and its helpers `bits` and `fields` as attributes."""
    Bench.bits, Bench.fields = staticmethod(bits), staticmethod(fields)
    return Bench


@pytest.fixture
def rng(request):
    """A generator with a seed of the test's own, which is printed."""
    seed = zlib.crc32(request.node.name.encode())
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=["no", "periodic", "random"])
def pauses(request, rng):
    """pauses(n): an iterator that says for each cycle whether side n pauses."""

    def of(side: int):
        if request.param == "no":
            return itertools.repeat(False)
        if request.param == "periodic":
            # Even sides pause mostly, odd sides now and then; periods have no common divisor.
            period = (3, 5, 7, 4, 11)[side % 5]
            return itertools.cycle([i != 0 if side % 2 == 0 else i == 0 for i in range(period)])
        share = (0.5, 0.2, 0.8)[side % 3]
        seed = int(rng.integers(1 << 32))
        return (bool(x < share) for x in _uniform(seed))

    of.kind = request.param
    return of


def _uniform(seed):
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.random(256)


@pytest.fixture
def refuses(monkeypatch):
    """refuses(match): within, a component's constructor must raise a ValueError.

    Amaranth warns of components that nothing uses; of one that was refused it need not.
    """
    monkeypatch.setattr(UnusedElaboratable, "_MustUse__silence", True, raising=False)

    @contextmanager
    def check(match):
        with pytest.raises(ValueError, match=match):
            yield

    yield check
    gc.collect()
