# SPDX-License-Identifier: Apache-2.0
"""Between fetch and align: what the largest product p * v of a V block is, for every query head.

Integers with one exponent per block keep what is large in it. In a V block that must not be the largest v
and the largest p, for they may belong to different tokens: an attention sink has nearly all of p and
nearly no v. So a block is scaled by its largest *product*, and by that of each row (query head) of its
own, because heads that share V need not agree on where they look.

    blocks, fields --scan--> largest exponents --> blocks for the aligner
                                                     | row by row, as it issues them
    halvings, fields, largest exponents --issue--> base for x, weights for the array

A V block is scanned while the array works on what comes before it. K blocks pass by, in order.
"""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
import numpy as np

from . import shapes
from .abi import TILE_TOKENS
from .fetch import Block
from .fifo import Queue, delay
from .jobs import Params, present
from .number import (
    DEPTH_BITS,
    DEPTH_MAX,
    EXPONENT_BITS,
    EXPONENT_FLOOR,
    FIELD_BITS,
    HALVINGS_BITS,
    P_BITS,
)
from .shapes import TILE_LOG2
from .softmax import P_ADDRESS, P_BANKS, Exp2, Halvings

# V blocks between the begin of their scan and the last row that the aligner issues.
SLOTS = 4
# Blocks that wait for the aligner: the K blocks of a tile, and V blocks behind them.
BLOCK_QUEUE = 16
PRODUCT_BITS = max(FIELD_BITS, HALVINGS_BITS) + 1  # of field - halvings, signed


def model(mantissa, halvings, field):
    """Array weights of V blocks, bit for bit as the gateware makes them.

    Parameters
    ----------
    mantissa, halvings : int64 (..., rows, tokens)
        The weights p of a tile, see `softmax.model`.
    field : int32 (..., tokens)
        Largest exponent field of each token's elements that are not 0, see `align.fields`; 0 if all are.

    Returns
    -------
    weight : int64 (..., rows, tokens)
        17 bits, not negative: the array multiplies x with it.
    exponent : int64 (..., rows)
        E, the largest exponent of a product of the row; EXPONENT_FLOOR if it has no weight.
    base : int64 (..., tokens)
        For `align.model`: what an element of exponent field 0 is shifted right by.
    """
    there = (mantissa > 0) & (field > 0)[..., None, :]
    product = np.where(there, field[..., None, :] - halvings, EXPONENT_FLOOR)
    exponent = product.max(axis=-1, initial=EXPONENT_FLOOR)
    depth = np.where(there, np.minimum(exponent[..., None] - product, DEPTH_MAX), DEPTH_MAX)
    common = depth.min(axis=-2)
    weight = np.where(there, ((mantissa << 1) >> (depth - common[..., None, :])) + 1 >> 1, 0)
    return weight, exponent, common + field


def base_latency(rows: int) -> int:
    """Cycles from a V row that is issued to its base: a read, two subtractions, the minimum over the
    rows, a sum."""
    return 4 + (rows - 1).bit_length()


def latency(rows: int) -> int:
    """Cycles from a V row that is issued to its weights: then a read, two steps of a shift, a rounding, and
    one to meet x."""
    return base_latency(rows) + 5


class Place(data.Struct):
    """Where the weights and the field of a V row lie."""

    row: range(TILE_TOKENS)
    bank: range(P_BANKS)
    slot: range(SLOTS)


def scanned_layout(rows: int) -> data.StructLayout:
    """A block for the aligner. Of V: the exponent of each row; of K: `block.exponent` says it."""
    return data.StructLayout(
        {
            "block": Block,
            "exponents": data.ArrayLayout(signed(EXPONENT_BITS), rows),
            "place": Place,  # of its first row
        }
    )


class Products(wiring.Component):
    """Finds the largest product of each V block, and makes the array's weights of p.

    Parameters
    ----------
    rows : int
        Query heads.
    max_fields : int
        Fields that may wait: as many as beats.

    Members
    -------
    i_block, i_field : In(streams), see `KvFetch`
    p_ready : In(1), see `Softmax`
    o_block : Out(stream of `scanned_layout`)
    done : In(1), the last row of a V block is issued
    scan_address, issue_address, mantissa_address : Out; scan, issue, mantissas : In, one cycle later:
        read ports of the p store, see `Softmax`
    place : In(Place), exponents : In, params : In(Params): a V row that is issued
    base : Out(signed), `base_latency(rows)` cycles later, see `model`
    weights : Out(rows x 17 bits), `latency(rows)` cycles later
    """

    def __init__(self, rows: int, max_fields: int):
        self._rows, self._max_fields = rows, max_fields
        exponents = data.ArrayLayout(signed(EXPONENT_BITS), rows)
        halvings = data.ArrayLayout(Halvings, rows)
        super().__init__(
            {
                "i_block": In(stream.Signature(Block)),
                "i_field": In(stream.Signature(FIELD_BITS)),
                "p_ready": In(1),
                "o_block": Out(stream.Signature(scanned_layout(rows))),
                "done": In(1),
                "scan_address": Out(P_ADDRESS),
                "scan": In(halvings),
                "issue_address": Out(P_ADDRESS),
                "issue": In(halvings),
                "mantissa_address": Out(P_ADDRESS),
                "mantissas": In(data.ArrayLayout(P_BITS, rows)),
                "place": In(Place),
                "exponents": In(exponents),
                "params": In(Params),
                "base": Out(signed(EXPONENT_BITS + 1)),
                "weights": Out(data.ArrayLayout(P_BITS, rows)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fields = fields = Memory(shape=FIELD_BITS, depth=SLOTS * TILE_TOKENS, init=[])
        self.probes = {}
        self._scan(m, fields.write_port())
        self._issue(m, fields.read_port())
        return m

    def _scan(self, m, write):
        rows, block = self._rows, self.i_block.p
        scanned = scanned_layout(rows)
        m.submodules.waiting = waiting = Queue(scanned, BLOCK_QUEUE)
        m.submodules.fields_due = due = Queue(FIELD_BITS, self._max_fields)
        wiring.connect(m, wiring.flipped(self.i_field), due.i)
        wiring.connect(m, waiting.o, wiring.flipped(self.o_block))

        # Places in the queue of blocks are reserved when a scan begins, for it ends in a pipeline.
        held = Signal(range(BLOCK_QUEUE + 1))
        tiles_ready = Signal(range(P_BANKS + 1))
        slots_used, slot = Signal(range(SLOTS + 1)), Signal(range(SLOTS))
        bank = Signal(range(P_BANKS))
        token = Signal(shapes.TOKENS)
        may_begin, go, end, begin = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            may_begin.eq(
                (held != BLOCK_QUEUE)
                & (~block.is_v
                   | ((slots_used != SLOTS) & (~block.pass_first | (tiles_ready != 0))))
            ),
            begin.eq(go & (token == 0)),
            go.eq(
                self.i_block.valid & ((token != 0) | may_begin) & (~block.is_v | due.o.valid)
            ),
            end.eq(go & (~block.is_v | (token + 1 == block.rows))),
            self.i_block.ready.eq(end),
            due.o.ready.eq(go & block.is_v),
        ]  # fmt: skip
        m.d.sync += [
            held.eq(held + begin - (self.o_block.valid & self.o_block.ready)),
            tiles_ready.eq(tiles_ready + self.p_ready - (begin & block.is_v & block.pass_first)),
            slots_used.eq(slots_used + (begin & block.is_v) - self.done),
        ]
        with m.If(go):
            m.d.sync += token.eq(Mux(end, 0, token + 1))
        with m.If(end & block.is_v):
            m.d.sync += [slot.eq(slot + 1), bank.eq(bank + block.pass_last)]
        m.d.comb += [
            self.scan_address[:TILE_LOG2].eq(token),
            self.scan_address[TILE_LOG2:].eq(bank),
            write.addr[:TILE_LOG2].eq(token),
            write.addr[TILE_LOG2:].eq(slot),
            write.data.eq(due.o.payload),
            write.en.eq(go & block.is_v),
        ]

        # 1: halvings and field are there. 2: their difference. 3: the largest so far.
        step = Signal(data.StructLayout({"valid": 1, "first": 1, "end": 1, "out": scanned}))
        m.d.comb += [
            step.valid.eq(go), step.first.eq(token == 0), step.end.eq(end),
            step.out.block.eq(block), step.out.place.bank.eq(bank), step.out.place.slot.eq(slot),
        ]  # fmt: skip
        later = [delay(m, step, cycles, f"step_{cycles}") for cycles in (1, 2, 3)]
        field = delay(m, due.o.payload, 1, "field")
        m.d.comb += [
            waiting.i.valid.eq(later[2].valid & later[2].end),
            waiting.i.p.block.eq(later[2].out.block),
            waiting.i.p.place.eq(later[2].out.place),
        ]
        for row in range(rows):
            weight = self.scan[row]
            there = Signal(name=f"there_{row}", reset_less=True)
            product = Signal(signed(PRODUCT_BITS), name=f"product_{row}", reset_less=True)
            m.d.sync += [
                there.eq(present(later[0].out.block.params, row) & ~weight.none & (field != 0)),
                product.eq(field - weight.halvings),
            ]
            some = Signal(name=f"some_{row}", reset_less=True)
            largest = Signal(signed(PRODUCT_BITS), name=f"largest_{row}", reset_less=True)
            with m.If(later[1].valid):
                m.d.sync += some.eq(there | (some & ~later[1].first))
                with m.If(later[1].first | ~some | (there & (product > largest))):
                    m.d.sync += largest.eq(product)
            m.d.comb += waiting.i.p.exponents[row].eq(Mux(some, largest, EXPONENT_FLOOR))
        self.probes |= {
            "held": held, "tiles_ready": tiles_ready, "slots_used": slots_used, "token": token,
            "slot": slot, "scan_bank": bank, "later": later,
        }  # fmt: skip

    def _issue(self, m, read):
        rows, place = self._rows, self.place

        def register(value, name):
            out = Signal.like(value, name=name, reset_less=True)
            m.d.sync += out.eq(value)
            return out

        m.d.comb += [
            self.issue_address[:TILE_LOG2].eq(place.row),
            self.issue_address[TILE_LOG2:].eq(place.bank),
            read.addr[:TILE_LOG2].eq(place.row),
            read.addr[TILE_LOG2:].eq(place.slot),
        ]
        # 1: halvings and field are there; 2: the product's exponent; 3: how far it lies below the largest.
        field = read.data
        exponents = delay(m, self.exponents, 2, "exponents")
        params = delay(m, self.params, 1, "params")
        depths = []
        for row in range(rows):
            weight = self.issue[row]
            there = register(present(params, row) & ~weight.none & (field != 0), f"to_{row}")
            product = Signal(signed(PRODUCT_BITS), name=f"of_{row}", reset_less=True)
            m.d.sync += product.eq(field - weight.halvings)
            below = Signal(signed(EXPONENT_BITS + 1), name=f"below_{row}")
            m.d.comb += below.eq(exponents[row] - product)
            depth = Signal(DEPTH_BITS, name=f"depth_{row}", reset_less=True)
            m.d.sync += depth.eq(Mux(~there | (below > DEPTH_MAX), DEPTH_MAX, below[:DEPTH_BITS]))
            depths.append(depth)
        # What all rows have in common, two rows at a time.
        common, levels = depths, 0
        while len(common) > 1:
            levels += 1
            common = [
                register(
                    Mux(pair[0] < pair[1], *pair) if len(pair) == 2 else pair[0],
                    f"common_{levels}_{i}",
                )
                for i, pair in enumerate(common[at : at + 2] for at in range(0, len(common), 2))
            ]
        assert 4 + levels == base_latency(rows)
        m.d.sync += self.base.eq(common[0] + delay(m, field, 2 + levels, "field_common"))

        # The rest is taken off each row's mantissa; beyond its bits nothing is left.
        most = P_BITS + 1
        start = base_latency(rows) + 1  # cycle in which mantissa and shift are there
        address = delay(m, self.issue_address, start - 1, "mantissa_address")
        m.d.comb += self.mantissa_address.eq(address)
        # The softmax does not write into a bank until its last weight was read.
        assert start < Exp2.latency + 1
        for row in range(rows):
            rest = Signal(DEPTH_BITS, name=f"rest_{row}")
            m.d.comb += rest.eq(delay(m, depths[row], levels, f"depth_{row}_late") - common[0])
            shift = Signal(range(most + 1), name=f"shift_{row}", reset_less=True)
            m.d.sync += shift.eq(Mux(rest > most, most, rest))
            shift = register(shift, f"shift_{row}_read")
            # One bit more below: the half that decides the rounding.
            coarse = Signal(P_BITS + 1, name=f"coarse_{row}", reset_less=True)
            m.d.sync += coarse.eq((self.mantissas[row] << 1) >> (shift[2:] << 2))
            fine = Signal(P_BITS + 1, name=f"fine_{row}", reset_less=True)
            m.d.sync += fine.eq(coarse >> delay(m, shift[:2], 1, f"shift_{row}_fine"))
            weight = Signal(P_BITS, name=f"weight_{row}", reset_less=True)
            m.d.sync += weight.eq((fine + 1) >> 1)
            m.d.comb += self.weights[row].eq(register(weight, f"weight_{row}_out"))
        self.probes |= {"depths": depths}
