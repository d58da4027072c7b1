# SPDX-License-Identifier: Apache-2.0
"""Third stage: the outer-product array, 32 lanes x rows of multiply-accumulate cells.

    acc[row][lane] += w[row] * x[lane]        once per beat, from the first to the last of a block

For a K block the beat is one channel of 32 tokens, w the query heads' weights in that channel, and
acc ends as the scores of 32 tokens. For a V block the beat is one token of 32 channels, w the
softmax weights of that token, and acc ends as 32 channels of output. No adder trees.

Lanes are skewed: lane n works n cycles after lane 0, the weights walking from cell to cell. So the
lanes of a block finish one after the other, and results leave through one multiplexer per row,
without a register to capture them, while the next block is already accumulating. That multiplexer
reaches across all cells, so it works in two steps, and each row has selects of its own.
"""

from amaranth import Array, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2
import numpy as np

from .align import Step
from .fifo import delay
from .number import ACC_BITS, ALIGNED_BITS, WEIGHT_BITS
from .primitives import ADD_NONE, ADD_P, Dsp48e2, Ecp5, Mult18x18d, UltraScalePlus
from .shapes import LANES


class Mac(wiring.Component):
    """One multiply-accumulate cell: p = w * x + (0 or p). One DSP48E2, all its registers used.

    Parameters
    ----------
    cascaded : bool
        w is the `w_next` of another cell and nothing else: it comes over dedicated wires.
    x_bits : int
        Of x. An ECP5 has multipliers of 18 x 18 bits, and no cell for more.

    Members
    -------
    x : In(x_bits signed), w : In(18 signed)
    w_next : Out(18 signed), w one cycle later, for the next lane
    first : In(1), one cycle after x and w
    valid : In(1), two cycles after x and w; p keeps its value without it
    p : Out(48 signed)

    Timing: p includes x * w three cycles after they were given.
    """

    latency = 3

    def __init__(self, cascaded: bool = False, x_bits: int = ALIGNED_BITS):
        self._cascaded, self._x_bits = cascaded, x_bits
        super().__init__(
            {
                "x": In(signed(x_bits)),
                "w": In(signed(WEIGHT_BITS)),
                "w_next": Out(signed(WEIGHT_BITS)),
                "first": In(1),
                "valid": In(1),
                "p": Out(signed(ACC_BITS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        if isinstance(platform, UltraScalePlus):
            dsp = Dsp48e2(
                m, "dsp", a=self.x, b=self.w, cascaded=self._cascaded,
                add=Mux(self.first, ADD_NONE, ADD_P), enable=self.valid,
            )  # fmt: skip
            m.d.comb += [self.w_next.eq(dsp.bcout), self.p.eq(dsp.p)]
            return m
        w = Signal(signed(WEIGHT_BITS), reset_less=True)
        product = Signal(signed(self._x_bits + WEIGHT_BITS), reset_less=True)
        first = Signal(reset_less=True)
        p = Signal(signed(ACC_BITS), reset_less=True)
        m.d.sync += [w.eq(self.w), first.eq(self.first)]
        if isinstance(platform, Ecp5):
            m.d.comb += product.eq(Mult18x18d(m, "multiply", a=self.x, b=self.w).p)
        else:
            x = Signal(signed(self._x_bits), reset_less=True)
            m.d.sync += [x.eq(self.x), product.eq(x * w)]
        with m.If(self.valid):
            m.d.sync += p.eq(Mux(first, 0, p) + product)
        m.d.comb += [self.w_next.eq(w), self.p.eq(p)]
        return m


class MacArray(wiring.Component):
    """The cells, their skew, and the way out.

    Parameters
    ----------
    rows : int
        Query heads. At least 1.
    x_bits : int
        Of an aligned element.

    Members
    -------
    x : In(32 x x_bits), w : In(rows x 18 bits), step : In(Step)
    o_valid : Out(1), o_lane : Out(5), o_sum : Out(rows x 48 bits)
        Sums of the last ended block, lane 0 to 31 in consecutive cycles; always taken.

    Timing: lane 0 leaves `latency` cycles after the step with `last`. Blocks must end at least 32
    cycles apart.
    """

    latency = Mac.latency + 2

    def __init__(self, rows: int, x_bits: int = ALIGNED_BITS):
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self._rows, self._x_bits = rows, x_bits
        super().__init__(
            {
                "x": In(data.ArrayLayout(signed(x_bits), LANES)),
                "w": In(data.ArrayLayout(signed(WEIGHT_BITS), rows)),
                "step": In(Step),
                "o_valid": Out(1),
                "o_lane": Out(range(LANES)),
                "o_sum": Out(data.ArrayLayout(signed(ACC_BITS), rows)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        x = [delay(m, self.x[lane], lane, f"x_{lane}") for lane in range(LANES)]
        # The accumulator sees a step two cycles after the cell saw its x.
        steps = [Signal(Step, name=f"step_{cycle}") for cycle in range(LANES + 1)]
        for before, after in zip([self.step, *steps], steps, strict=False):
            m.d.sync += after.eq(before)
        p = [[] for _ in range(self._rows)]
        for row in range(self._rows):
            w = self.w[row]
            for lane in range(LANES):
                m.submodules[f"mac_{row}_{lane}"] = mac = Mac(lane > 0, self._x_bits)
                m.d.comb += [
                    mac.x.eq(x[lane]),
                    mac.w.eq(w),
                    mac.first.eq(steps[lane].first),
                    mac.valid.eq(steps[lane + 1].valid),
                ]
                w = mac.w_next
                p[row].append(mac.p)

        lane, active, begin = Signal(range(LANES)), Signal(), Signal()
        m.d.comb += begin.eq(steps[1].valid & steps[1].last)
        with m.If(begin):
            m.d.sync += active.eq(1)
        with m.Elif(lane == LANES - 1):
            m.d.sync += active.eq(0)
        m.d.sync += lane.eq(Mux(begin, 0, lane + 1))
        m.d.comb += [
            self.o_valid.eq(delay(m, active, 2, "active")),
            self.o_lane.eq(delay(m, lane, 2, "lane")),
        ]
        # First one lane of each group, then one of the groups.
        group = 1 << (exact_log2(LANES) + 1) // 2
        for row in range(self._rows):
            # Each row counts by itself: synthesis would share copies of one counter.
            own = Signal(range(LANES), name=f"lane_{row}", reset_less=True)
            m.d.sync += own.eq(Mux(begin, 0, own + 1))
            groups = []
            for n, first in enumerate(range(0, LANES, group)):
                of_group = Signal(signed(ACC_BITS), name=f"group_{row}_{n}", reset_less=True)
                m.d.sync += of_group.eq(Array(p[row][first : first + group])[own % group])
                groups.append(of_group)
            out = Signal(signed(ACC_BITS), name=f"sum_{row}", reset_less=True)
            which = delay(m, own // group, 1, f"which_{row}")
            m.d.sync += out.eq(Array(groups)[which])
            m.d.comb += self.o_sum[row].eq(out)
        self.probes = {"p": p, "lane": lane, "active": active}
        return m

    @staticmethod
    def model(x, w):
        """Sums of whole blocks: x int (..., n, 32), w int (..., rows, n) -> int64 (..., rows, 32).

        Computed in float64, which is exact: no sum reaches 2^53.
        """
        return (np.asarray(w, np.float64) @ np.asarray(x, np.float64)).astype(np.int64)
