# SPDX-License-Identifier: Apache-2.0
"""Queues between the stages."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .primitives import UltraScalePlus


class Queue(wiring.Component):
    """First in, first out, with full stream rules on both sides.

    Parameters
    ----------
    shape : ShapeLike
        Payload.
    depth : int
        Entries it holds, at least 1.
    ram : str, optional
        Where they lie. "lut": in LUT RAM. "block": in block RAM; one entry more than a power of two
        fills a block RAM of that power exactly, because the entry at the output sits in the RAM's
        output register. "ultra": in UltraRAM where the family has it, else as "block"; for wide
        queues, since an UltraRAM is 72 bits wide and 4096 deep whatever is used of it. Default:
        "lut" up to 32 entries, "block" above.

    Members
    -------
    i, o : streams of `shape`
    level : Out, entries inside.

    Timing: an entry leaves one cycle after it came, two with block RAM or UltraRAM.
    """

    def __init__(self, shape, depth: int, ram: str | None = None):
        if depth < 1:
            raise ValueError(f"a queue holds at least 1 entry, not {depth}")
        self._shape, self._depth = shape, depth
        self._ram = ram or ("lut" if depth <= 32 else "block")
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(depth + 1)),
            }
        )

    @property
    def depth(self) -> int:
        return self._depth

    def elaborate(self, platform):
        m = Module()
        kind = fifo.SyncFIFO if self._ram == "lut" else fifo.SyncFIFOBuffered
        bits = self.i.payload.as_value() if isinstance(self.i.payload, data.View) else (
            self.i.payload
        )  # fmt: skip
        if self._ram == "ultra" and isinstance(platform, UltraScalePlus):
            kind = _InUltraRam
        m.submodules.fifo = inner = kind(width=len(bits), depth=self._depth)
        out = Signal(len(bits))
        m.d.comb += [
            inner.w_data.eq(bits),
            inner.w_en.eq(self.i.valid),
            self.i.ready.eq(inner.w_rdy),
            out.eq(inner.r_data),
            self.o.p.eq(out),
            self.o.valid.eq(inner.r_rdy),
            inner.r_en.eq(self.o.ready),
            self.level.eq(inner.level),
        ]
        return m


class _InUltraRam(fifo.SyncFIFOBuffered):
    """# Ref: AMD UG901, "RAM_STYLE". A tool that cannot do so falls back to block RAM."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        m.submodules.storage.attrs["ram_style"] = "ultra"
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
