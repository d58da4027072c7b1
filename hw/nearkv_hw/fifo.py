# SPDX-License-Identifier: Apache-2.0
"""Queues between the stages."""

from amaranth import Cat, Module, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .primitives import UltraScalePlus

# Ref: AMD UG901, "RAM_STYLE". A tool that cannot do so chooses by itself.
_STYLES = {"lut": "distributed", "ultra": "ultra"}


class Queue(wiring.Component):
    """First in, first out, with full stream rules on both sides.

    `i.ready`, `o.valid` and, but for block RAM and UltraRAM, `o.payload` come out of registers: what
    stands on either side has the cycle for itself.

    Parameters
    ----------
    shape : ShapeLike
        Payload.
    depth : int
        Entries it has room for, at least 1. One more stands at the output, in the output register of
        the RAM, so that a power of two fills the RAM exactly.
    ram : str, optional
        Where they lie. "lut": in LUT RAM. "block": in block RAM. "ultra": in UltraRAM where the
        family has it, else as "block"; for wide queues, since an UltraRAM is 72 bits wide and 4096
        deep whatever is used of it. Default: "lut" up to 32 entries, "block" above.

    Members
    -------
    i, o : streams of `shape`
    level : Out, entries inside, with the one at the output

    Timing: an entry leaves two cycles after it came.
    """

    def __init__(self, shape, depth: int, ram: str | None = None):
        if depth < 1:
            raise ValueError(f"a queue holds at least 1 entry, not {depth}")
        self._depth = depth
        self._ram = ram or ("lut" if depth <= 32 else "block")
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(depth + 2)),
            }
        )

    @property
    def depth(self) -> int:
        return self._depth

    def elaborate(self, platform):
        m = Module()
        ultra = isinstance(platform, UltraScalePlus)
        style = _STYLES.get(self._ram) if self._ram != "ultra" or ultra else None
        entry, first = Value.cast(self.i.payload), Value.cast(self.o.payload)
        # Addresses wrap by themselves.
        size = max(2, 1 << (self._depth - 1).bit_length())
        m.submodules.storage = storage = Memory(
            shape=len(entry), depth=size, init=[], attrs={"ram_style": style} if style else {}
        )
        write, read = storage.write_port(), storage.read_port()
        produce, consume = Signal(range(size)), Signal(range(size))
        held = Signal(range(self._depth + 1))  # in the RAM
        none, full = Signal(init=1), Signal()
        put, take = Signal(), Signal()
        m.d.comb += [
            self.i.ready.eq(~full),
            put.eq(self.i.valid & ~full),
            take.eq(~none & (~self.o.valid | self.o.ready)),
            write.addr.eq(produce),
            write.data.eq(entry),
            write.en.eq(put),
            read.addr.eq(consume),
            read.en.eq(take),
            first.eq(read.data),
            self.level.eq(held + self.o.valid),
        ]
        m.d.sync += self.o.valid.eq(take | (self.o.valid & ~self.o.ready))
        with m.If(put):
            m.d.sync += produce.eq(produce + 1)
        with m.If(take):
            m.d.sync += consume.eq(consume + 1)
        with m.If(put & ~take):
            m.d.sync += held.eq(held + 1)
        with m.If(take & ~put):
            m.d.sync += held.eq(held - 1)
        m.d.sync += [
            none.eq(~put & (none | (take & (held == 1)))),
            full.eq(~take & (full | (put & (held == self._depth - 1)))),
        ]
        self.probes = {
            "produce": produce, "consume": consume, "held": held, "none": none, "full": full,
            "take": take,
        }  # fmt: skip
        return m


def is_last(index, count):
    """index == count - 1, for an index of few bits, without an adder."""
    return Cat((index == n) & (count == n + 1) for n in range(1 << len(index))).any()


def stages(m, signal, cycles: int, name: str) -> list:
    """`signal` as it was 1 .. `cycles` cycles ago; without reset: it becomes shift-register LUTs."""
    line = []
    for i in range(cycles):
        later = Signal.like(signal, name=f"{name}_{i + 1}", reset_less=True)
        m.d.sync += later.eq(signal)
        line.append(later)
        signal = later
    return line


def delay(m, signal, cycles: int, name: str):
    """`signal` as it was some cycles ago, see `stages`."""
    return stages(m, signal, cycles, name)[-1] if cycles else signal
