# SPDX-License-Identifier: Apache-2.0
"""Second stage: from 16-bit floating point to integers that share one exponent per block."""

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
import numpy as np

from . import shapes
from .abi import MAX_HEAD_DIM, KvType
from .fifo import delay
from .jobs import Q_BANKS
from .number import (
    ALIGNED_BITS,
    EXPONENT_BITS,
    EXPONENT_FLOOR,
    FIELD_BITS,
    KV_BITS,
    KV_FORMATS,
    Q_EXPONENT_BITS,
)
from .products import Place, base_latency, latency, scanned_layout
from .shapes import BEAT_BITS, ELEMENT_BITS, LANES, TILE_LOG2


def unpack(elements, kv_type: KvType):
    """Sign, magnitude (22 bits, significand on top) and exponent field (at least 1) of elements."""
    form = KV_FORMATS[kv_type]
    elements = np.asarray(elements).astype(np.int32)
    field = (elements >> form.mantissa_bits) & form.exponent_max
    significand = elements & ((1 << form.mantissa_bits) - 1) | (
        (field > 0).astype(np.int32) << form.mantissa_bits
    )
    return elements >> 15 & 1, significand << form.align_bits, np.maximum(field, 1)


def fields(elements, kv_type: KvType, valid):
    """The largest exponent field of each row of a block, and whether one means Inf or NaN.

    Parameters
    ----------
    elements : uint16 (..., 32)
        Rows of a block: K `[channel][token]` or V `[token][channel]`.
    kv_type : KvType
    valid : bool, broadcastable to elements

    Returns
    -------
    field : int32 (...)
        At least 1 (as subnormal numbers have it); 0 if nothing in the row is valid.
    non_finite : bool (...)
        An Inf or NaN among the valid elements.
    """
    _, _, field = unpack(elements, kv_type)
    largest = np.where(valid, field, 0).max(axis=-1)
    return largest, largest == KV_FORMATS[kv_type].exponent_max


def block_exponent(field, channel_exponent):
    """The largest exponent of K blocks: int32 (...), EXPONENT_FLOOR if nothing in them is valid.

    field : int32 (..., channels), see `fields`
    channel_exponent : int (channels,), of the query weights
    """
    total = np.where(field > 0, field + np.asarray(channel_exponent, np.int32), EXPONENT_FLOOR)
    return total.max(axis=-1, initial=EXPONENT_FLOOR)


def model(elements, kv_type: KvType, base, valid):
    """Align rows, bit for bit as the gateware does.

    Parameters
    ----------
    elements : uint16 (..., 32)
    kv_type : KvType
    base : int (...)
        What an element of exponent field 0 is shifted right by. For K that is the block's exponent
        less the channel's; for V see `products.model`.
    valid : bool, broadcastable to elements
        False where an element lies beyond the valid tokens: it counts as zero, whatever its bits.

    Returns
    -------
    x : int32 (..., 32)
        |x| <= 2^22, rounded half away from zero. Beyond `align_bits` binades below the largest
        exponent bits are lost, at most half a unit each.
    """
    sign, magnitude, field = unpack(elements, kv_type)
    shift = np.clip(np.asarray(base)[..., None] - field, 0, KV_BITS)
    rounded = (((magnitude << 1) >> shift) + 1) >> 1
    return np.where(valid, np.where(sign, -rounded, rounded), 0)


class Step(data.Struct):
    """What the array does with a beat."""

    valid: 1
    first: 1  # of its block: accumulators begin anew
    last: 1


Q_ADDRESS = range(Q_BANKS * MAX_HEAD_DIM)


class Align(wiring.Component):
    """Issue the beats of one block after the other, aligned to the block's largest exponent.

    A block starts when `may_start` says that everything behind has room for it. Its beats then leave
    one a cycle; blocks end at least 32 cycles apart, so that the array can hand out their results
    one lane a cycle.

    A row is issued some cycles before its beat is taken from the queue, where it surely is: until then
    `Products` works out what a V row is shifted by.

    Parameters
    ----------
    rows : int
        Query heads.

    Members
    -------
    i_block : In(stream), see `Products`; i_beat : In(stream), see `KvFetch`
    may_start : In(1), for the block that `i_block` shows
    begin : Out(1), the block on `i_block` starts; end : Out(1), its last row is issued
    taken : Out(1), the last beat of a K block was taken: what it needs of the q store was read
    place : Out(Place), of a V row when it is issued; base : In, `base_latency(rows)` cycles later
    q_address : Out, q_exponent : In, read port of the q store, one cycle later
    weight_address : Out, row of the q store, one cycle ahead of o_x
    o_is_v : Out(1), with o_x: its weights are those of a V row
    o_x : Out(32 x 24 bits), o_step : Out(Step); always taken
    issued, starved, stalled : Out(1), what happened in this cycle

    Timing: `products.latency(rows)` cycles from a row that is issued to its x, which meets its weights.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self.latency = latency(rows)
        super().__init__(
            {
                "i_block": In(stream.Signature(scanned_layout(rows))),
                "i_beat": In(stream.Signature(BEAT_BITS)),
                "may_start": In(1),
                "begin": Out(1),
                "end": Out(1),
                "taken": Out(1),
                "place": Out(Place),
                "base": In(signed(EXPONENT_BITS + 1)),
                "q_address": Out(Q_ADDRESS),
                "q_exponent": In(signed(Q_EXPONENT_BITS)),
                "weight_address": Out(Q_ADDRESS),
                "o_is_v": Out(1),
                "o_x": Out(data.ArrayLayout(signed(ALIGNED_BITS), LANES)),
                "o_step": Out(Step),
                "issued": Out(1),
                "starved": Out(1),
                "stalled": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        block = self.i_block.p.block
        row, gap = Signal(shapes.ROWS), Signal(range(LANES + 1))
        starting = Signal()
        m.d.comb += [
            starting.eq(row == 0),
            self.issued.eq(
                self.i_block.valid & (~starting | (self.may_start & (gap <= block.rows)))
            ),
            self.starved.eq(~self.i_block.valid),
            self.stalled.eq(self.i_block.valid & ~self.issued),
            self.begin.eq(self.issued & starting),
            self.end.eq(self.issued & (row == block.rows - 1)),
            self.i_block.ready.eq(self.end),
            self.place.eq(self.i_block.p.place),
            self.place.row.eq(row[:TILE_LOG2]),
        ]
        with m.If(gap != 0):
            m.d.sync += gap.eq(gap - 1)
        with m.If(self.issued):
            m.d.sync += row.eq(row + 1)
        with m.If(self.end):
            m.d.sync += [row.eq(0), gap.eq(LANES)]

        # t0: the beat is taken, so that its exponents meet the base from `Products` at t1.
        wait = base_latency(self._rows) - 1
        now = Signal(
            data.StructLayout(
                {
                    "step": Step,
                    "is_v": 1,
                    "is_bf16": 1,
                    "q_address": Q_ADDRESS,
                    "exponent": signed(EXPONENT_BITS),
                    "lanes": shapes.VALID_LANES,
                }
            )
        )
        m.d.comb += [
            now.step.valid.eq(self.issued),
            now.step.first.eq(starting),
            now.step.last.eq(self.end),
            now.is_v.eq(block.is_v),
            now.is_bf16.eq(block.params.kv_type == KvType.BF16),
            now.q_address.eq(Cat(row[: shapes.CHANNEL_LOG2], block.q_bank)),
            now.exponent.eq(block.exponent),
            now.lanes.eq(block.lanes),
        ]
        taken = delay(m, now, wait, "taken")
        m.d.comb += [
            self.i_beat.ready.eq(taken.step.valid),
            self.q_address.eq(taken.q_address),
        ]

        # t1: beat registered; the exponent of q's channel arrives.
        beat = Signal(BEAT_BITS, reset_less=True)
        m.d.sync += beat.eq(self.i_beat.payload)
        then = delay(m, taken, 1, "then")
        is_bf16, lanes = then.is_bf16, then.lanes
        # t2: what an element of exponent field 0 would be shifted by.
        base = Signal(signed(EXPONENT_BITS + 1), reset_less=True)
        m.d.sync += base.eq(Mux(then.is_v, self.base, then.exponent - self.q_exponent))
        fp16, bf16 = KV_FORMATS[KvType.FP16], KV_FORMATS[KvType.BF16]
        for lane in range(LANES):
            element = beat[ELEMENT_BITS * lane : ELEMENT_BITS * (lane + 1)]
            e = Signal(FIELD_BITS, name=f"field_{lane}")
            magnitude = Signal(KV_BITS - 1, name=f"magnitude_{lane}")
            m.d.comb += [
                e.eq(Mux(is_bf16, element[bf16.mantissa_bits : -1],
                         element[fp16.mantissa_bits : -1])),
                magnitude.eq(
                    Mux(is_bf16,
                        Cat(Const(0, bf16.align_bits), element[: bf16.mantissa_bits], e != 0),
                        Cat(Const(0, fp16.align_bits), element[: fp16.mantissa_bits], e != 0))
                ),
            ]  # fmt: skip
            field = Signal(FIELD_BITS, name=f"field_{lane}_2", reset_less=True)
            # One bit more below: the half that decides the rounding.
            wide = Signal(KV_BITS, name=f"wide_{lane}_2", reset_less=True)
            m.d.sync += [
                field.eq(Mux(e == 0, 1, e)),
                wide.eq(Mux(lane < lanes, magnitude << 1, 0)),
            ]
            # t3: distance to the largest exponent; beyond KV_BITS nothing is left.
            distance = Signal(signed(EXPONENT_BITS + 2), name=f"distance_{lane}")
            shift = Signal(range(KV_BITS + 1), name=f"shift_{lane}_3", reset_less=True)
            m.d.comb += distance.eq(base - field)
            m.d.sync += shift.eq(
                Mux(distance < 0, 0, Mux(distance > KV_BITS, KV_BITS, distance[: len(shift)]))
            )
            wide = delay(m, wide, 1, f"wide_{lane}_3")
            # t4, t5: shift by fours, then by ones.
            coarse = Signal(KV_BITS, name=f"coarse_{lane}_4", reset_less=True)
            m.d.sync += coarse.eq(wide >> (shift[2:] << 2))
            fine = Signal(KV_BITS, name=f"fine_{lane}_5", reset_less=True)
            m.d.sync += fine.eq(coarse >> delay(m, shift[:2], 1, f"shift_{lane}_4"))
            # t6: round half away from zero and negate with one adder:
            # -(a + half) = ~a + 1 - half, so the carry is sign XOR half.
            sign = delay(m, element[-1], 4, f"sign_{lane}")
            m.d.sync += self.o_x[lane].eq(
                Cat(fine[1:] ^ sign.replicate(KV_BITS - 1), sign, sign).as_signed()
                + (sign ^ fine[0])
            )

        m.d.comb += [
            self.weight_address.eq(delay(m, taken.q_address, 5, "weight_address")),
            self.o_is_v.eq(delay(m, taken.is_v, 6, "is_v")),
            self.o_step.eq(delay(m, taken.step, 6, "step")),
            self.taken.eq(self.o_step.valid & self.o_step.last & ~self.o_is_v),
        ]
        self.probes = {"row": row, "gap": gap}
        return m
