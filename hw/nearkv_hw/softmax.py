# SPDX-License-Identifier: Apache-2.0
"""Fourth stage: one tile of raw scores becomes weights p, a maximum and two sums per query head."""

from amaranth import Array, C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
import numpy as np

from . import abi, number, shapes
from .fifo import Queue, delay, is_last, stages
from .jobs import Params, small_product
from .number import (
    EXP2_FRAC_BITS,
    EXP2_U_BITS,
    P_BITS,
    P_DROP_BITS,
    P_MAX,
    P_WIDE_FRAC_BITS,
    RAW_BITS,
    RAW_SHIFT,
    RUN_MAX_EMPTY,
    SCALE_BITS,
    SCORE_BITS,
    SCORE_FRAC_BITS,
    SCORE_LIMIT,
    SCORE_SHIFT_MAX,
    TILE_MAX_BITS,
    TILE_SUM_BITS,
    TILE_WIDE_BITS,
)
from .primitives import ADD_C, ADD_NONE, ADD_PCIN_17, Dsp48e2, UltraScalePlus

_HALF = 1 << (P_DROP_BITS - 1)


def score_model(raw, mantissa, shift):
    """Scores of array sums: int64 with 20 fraction bits, and whether one left the range.

    raw : int64 (...), the sums S of the array
    mantissa, shift : the job's score_mantissa; score_shift minus the block's exponent
    """
    product = (np.asarray(raw, np.int64) >> RAW_SHIFT) * np.int64(mantissa)
    shift = np.minimum(shift, SCORE_SHIFT_MAX)
    score = ((product >> np.maximum(shift - 1, 0)) + 1) >> 1
    beyond = np.where(product < 0, -SCORE_LIMIT - 1, np.where(product > 0, SCORE_LIMIT + 1, 0))
    score = np.where(shift >= 1, score, beyond)
    return np.clip(score, -SCORE_LIMIT, SCORE_LIMIT), np.abs(score) > SCORE_LIMIT


def model(score, valid):
    """Weights, maximum and sums of tiles, bit for bit as the gateware does.

    Parameters
    ----------
    score : int64 (..., tokens)
        Scores in log2 units with 20 fraction bits.
    valid : bool, broadcastable to score
        False where there is no token.

    Returns
    -------
    p : int64 (..., tokens)
        2^(score - tile_max), 17 bits; 0 where there is no token.
    tile_max : int64 (...)
        Smallest integer not below any valid score; RUN_MAX_EMPTY if none is valid.
    tile_sum, tile_wide : int64 (...)
        Sum of p; sum of 2^(score - tile_max) with 22 fraction bits, not rounded to 17 bits first.
    """
    unit = 1 << SCORE_FRAC_BITS
    valid = np.broadcast_to(valid, score.shape)
    ceiling = -(-score >> SCORE_FRAC_BITS)
    tile_max = np.where(valid, ceiling, RUN_MAX_EMPTY).max(axis=-1)
    below = np.where(valid, score - tile_max[..., None] * unit, 0)
    power = number.exp2(below & (unit - 1))
    wide = power >> np.minimum(-(below >> SCORE_FRAC_BITS), P_WIDE_FRAC_BITS + 1)
    wide = np.where(valid, wide, 0)
    p = np.minimum((wide + _HALF) >> P_DROP_BITS, P_MAX)
    return p, tile_max, p.sum(axis=-1), wide.sum(axis=-1)


RAW_QUEUE_TOKENS = 512
SCORE_QUEUE_PAIRS = 1024
MAXIMA_QUEUE_TILES = SUMS_QUEUE_TILES = 4
P_BANKS = 4


class TileHead(data.Struct):
    """What the softmax and the merge must know of a tile."""

    params: Params
    tokens: shapes.TOKENS
    job_first: 1
    job_last: 1


def raw_layout(rows: int) -> data.StructLayout:
    """The array's sums for one token, and the shift that makes them scores."""
    return data.StructLayout(
        {"sums": data.ArrayLayout(signed(RAW_BITS), rows), "shift": range(SCORE_SHIFT_MAX + 1)}
    )


def tile_sum_layout(rows: int) -> data.StructLayout:
    """What the merge needs of a tile besides its V sums."""
    return data.StructLayout(
        {
            "head": TileHead,
            "tile_max": data.ArrayLayout(signed(TILE_MAX_BITS), rows),
            "tile_sum": data.ArrayLayout(TILE_SUM_BITS, rows),
            "tile_wide": data.ArrayLayout(TILE_WIDE_BITS, rows),
            "saturated": 1,
        }
    )


class Score(wiring.Component):
    """One raw sum becomes a score. Always ready; a result `latency` cycles later.

    Members
    -------
    raw : In(35 signed), mantissa : In(24), shift : In(6)
        shift 0 stands for every shift below 1: what is not zero is out of range.
    o : Out(36 signed), saturated : Out(1)
    """

    latency = 10

    def __init__(self):
        super().__init__(
            {
                "raw": In(signed(RAW_BITS)),
                "mantissa": In(SCALE_BITS),
                "shift": In(range(SCORE_SHIFT_MAX + 1)),
                "o": Out(signed(SCORE_BITS)),
                "saturated": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()

        def register(value, name):
            out = Signal.like(value, name=name, reset_less=True)
            m.d.sync += out.eq(value)
            return out

        # 1..4: the product, from two DSPs: the low one's operands have 17 bits, so that both fit.
        raw_low, raw_high = self.raw[:17], self.raw[17:].as_signed()
        if isinstance(platform, UltraScalePlus):
            low = Dsp48e2(m, "low", a=self.mantissa, b=raw_low, add=ADD_NONE)
            high = Dsp48e2(
                m, "high", a=self.mantissa, b=raw_high, depth=2, add=ADD_PCIN_17, pcin=low.pcout
            )
            low_bits, high_bits = register(low.p[:17], "low_bits"), high.p
        else:
            mantissa = register(self.mantissa, "mantissa")
            low = register(register(raw_low, "low_1") * mantissa, "low_2")
            low = register(low, "low_3")
            high = delay(m, raw_high, 2, "high") * register(mantissa, "mantissa_2")
            high = register(high, "high_3")
            low_bits = register(low[:17], "low_bits")
            high_bits = register(high + (low >> 17), "high_4")
        product = Cat(low_bits, high_bits)[: RAW_BITS + SCALE_BITS].as_signed()
        shift = delay(m, self.shift, 4, "shift")
        # 5..7: shift by 16s, 4s and 1s, one bit less than asked: that bit rounds.
        less = Signal(range(SCORE_SHIFT_MAX + 1))
        m.d.comb += less.eq(Mux(shift == 0, 0, shift - 1))
        value = product
        for stage, at in enumerate((4, 2, 0)):
            amount = delay(m, less[at : at + 2], stage, f"amount_{at}")
            value = register((value >> (amount << at)), f"shifted_{at}")
        # 8: what is far out of range, cut to where the rounding cannot overflow.
        negative = delay(m, product[-1], 3, "negative")
        beyond = delay(m, (shift == 0) & (product != 0), 3, "beyond")
        far = beyond | ~((value[SCORE_BITS:] == 0) | value[SCORE_BITS:].all())
        cut = register(
            Mux(far, Mux(negative, -(1 << SCORE_BITS), (1 << SCORE_BITS) - 1),
                value[: SCORE_BITS + 1].as_signed()),
            "cut",
        )  # fmt: skip
        # 9, 10: round, clip.
        rounded = register((cut + 1) >> 1, "rounded")
        out = Signal(signed(SCORE_BITS), reset_less=True)
        saturated = Signal(reset_less=True)
        above, below = rounded > SCORE_LIMIT, rounded < -SCORE_LIMIT
        m.d.sync += [
            out.eq(Mux(above, SCORE_LIMIT, Mux(below, -SCORE_LIMIT, rounded))),
            saturated.eq(above | below),
        ]
        m.d.comb += [self.o.eq(out), self.saturated.eq(saturated)]
        return m


class Exp2(wiring.Component):
    """2^(score - tile_max). Always ready; a result `latency` cycles later.

    Members
    -------
    score : In(36 signed), tile_max : In(16 signed), not below score
    p : Out(17), wide : Out(23): the power with 17 and with 22 fraction bits
    """

    latency = 9

    def __init__(self):
        super().__init__(
            {
                "score": In(signed(SCORE_BITS)),
                "tile_max": In(signed(TILE_MAX_BITS)),
                "p": Out(P_BITS),
                "wide": Out(P_WIDE_FRAC_BITS + 1),
            }
        )

    def elaborate(self, platform):
        m = Module()

        def register(value, name):
            out = Signal.like(value, name=name, reset_less=True)
            m.d.sync += out.eq(value)
            return out

        # 1: how many whole powers of two below the maximum.
        halvings = Signal(signed(TILE_MAX_BITS + 1), reset_less=True)
        m.d.sync += halvings.eq(self.tile_max - self.score[SCORE_FRAC_BITS:].as_signed())
        fraction = register(self.score[:SCORE_FRAC_BITS], "fraction")
        # 2: that number within bounds; which segment, where in it.
        most = P_WIDE_FRAC_BITS + 1
        n = Signal(range(most + 1), reset_less=True)
        m.d.sync += n.eq(Mux(halvings > most, most, halvings))
        # 2: which segment, and where in it: (a2 u + a1) u + a0.
        segment, u = fraction[EXP2_U_BITS:], fraction[:EXP2_U_BITS]
        drop = EXP2_FRAC_BITS - P_WIDE_FRAC_BITS
        table = number.exp2_table() + [1 << (drop - 1), 0, 0]  # a0 rounds, too

        def coefficient(i):
            bits = int(table[:, i].max()).bit_length()
            out = Signal(bits, name=f"a{i}_table")
            m.d.comb += out.eq(Array(C(int(a), bits) for a in table[:, i])[segment])
            return out

        a0, a1, a2 = (register(coefficient(i), f"a{i}") for i in range(3))
        u = register(u, "u")
        # 3..7: Horner. The first product is small: without DSP, by halves.
        half = EXP2_U_BITS // 2
        low = register(small_product(a2, u[:half]), "curve_low")
        high = register(small_product(a2, u[half:]), "curve_high")
        curve = low + (high << half)
        # The table has room for it.
        slope = (delay(m, a1, 1, "a1") + (curve >> EXP2_U_BITS))[: len(a1)]
        slope = register(slope, "slope")
        power = Signal(P_WIDE_FRAC_BITS + 1)
        if isinstance(platform, UltraScalePlus):
            line = Dsp48e2(
                m, "line", a=slope, b=delay(m, u, 2, "u"),
                add=ADD_C, c=Cat(C(0, EXP2_U_BITS), delay(m, a0, 3, "a0")),
            )  # fmt: skip
            m.d.comb += power.eq(line.p[EXP2_U_BITS + drop :])
        else:
            line = register(register(slope, "slope_5") * delay(m, u, 3, "u"), "line")
            total = delay(m, a0, 4, "a0") + (line >> EXP2_U_BITS)
            m.d.comb += power.eq(register(total >> drop, "power"))
        # 8: halve; 9: round to 17 bits.
        wide = register(power >> delay(m, n, 5, "n"), "wide")
        rounded = (wide + _HALF) >> P_DROP_BITS
        p = Signal(P_BITS, reset_less=True)
        m.d.sync += p.eq(Mux(rounded > P_MAX, P_MAX, rounded))
        m.d.comb += [self.p.eq(p), self.wide.eq(delay(m, wide, 1, "wide"))]
        return m


class Softmax(wiring.Component):
    """Scores and weights of one tile after the other, two query heads a cycle.

    First pass over a tile: raw sums to scores, into a queue, and their maxima. Second pass, with
    the maxima known: weights into a bank of the p store, and their sums. The passes work on
    different tiles at once, without a gap between tiles.

    Parameters
    ----------
    rows : int
        Query heads, even.

    Members
    -------
    i_head : In(stream of TileHead); i_raw : In(stream), `tokens` of each tile's head
    o_sum : Out(stream), once a tile
    p_address : Out side reads: In(9) bank and token; p : Out(rows x 17 bits), one cycle later
    p_ready : Out(1), high once for each tile whose bank is complete
    p_free : In(1), high when a bank was read for the last time
    """

    def __init__(self, rows: int):
        if rows % abi.ROW_STEP or rows <= 0:
            raise ValueError(f"rows must be even and positive, not {rows}")
        self._rows = rows
        super().__init__(
            {
                "i_head": In(stream.Signature(TileHead)),
                "i_raw": In(stream.Signature(raw_layout(rows))),
                "o_sum": Out(stream.Signature(tile_sum_layout(rows))),
                "p_address": In(range(P_BANKS * abi.TILE_TOKENS)),
                "p": Out(data.ArrayLayout(P_BITS, rows)),
                "p_ready": Out(1),
                "p_free": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        rows, pairs = self._rows, self._rows // 2
        scores_layout = data.ArrayLayout(signed(SCORE_BITS), 2)
        m.submodules.scores = scores = Queue(scores_layout, SCORE_QUEUE_PAIRS)
        maxima_layout = data.StructLayout(
            {
                "head": TileHead,
                "tile_max": data.ArrayLayout(signed(TILE_MAX_BITS), rows),
                "saturated": 1,
            }
        )
        m.submodules.maxima = maxima = Queue(maxima_layout, MAXIMA_QUEUE_TILES)
        m.submodules.sums = sums = Queue(tile_sum_layout(rows), SUMS_QUEUE_TILES)
        wiring.connect(m, sums.o, wiring.flipped(self.o_sum))
        self.probes = {}
        self._score(m, pairs, scores, maxima)
        self._weigh(m, pairs, scores, maxima, sums)
        return m

    @staticmethod
    def _walk(m, head, go, name):
        """Count through the (token, pair) steps of a tile; an empty tile takes one step.

        Returns (pair, first token, last pair of the token, last step of the tile).
        """
        token = Signal(range(abi.TILE_TOKENS), name=f"{name}_token")
        pair = Signal(range(shapes.MAX_PAIRS), name=f"{name}_pair")
        pair_end, tile_end = Signal(name=f"{name}_pair_end"), Signal(name=f"{name}_tile_end")
        m.d.comb += [
            pair_end.eq(is_last(pair, head.params.pairs)),
            tile_end.eq((pair_end & (token + 1 == head.tokens)) | (head.tokens == 0)),
        ]
        with m.If(go):
            m.d.sync += pair.eq(pair + 1)
            with m.If(pair_end):
                m.d.sync += [pair.eq(0), token.eq(token + 1)]
            with m.If(tile_end):
                m.d.sync += [pair.eq(0), token.eq(0)]
        return token, pair, pair_end, tile_end

    def _score(self, m, pairs, scores, maxima):
        head, raw = self.i_head.p, self.i_raw.p
        empty = head.tokens == 0
        go = Signal()
        # Results come out of a fixed pipeline, so their places are reserved when they go in.
        held, held_tiles = Signal(range(SCORE_QUEUE_PAIRS + 1)), Signal(range(maxima.depth + 1))
        token, pair, pair_end, tile_end = self._walk(m, head, go, "score")
        m.d.comb += [
            go.eq(
                self.i_head.valid & (empty | self.i_raw.valid)
                & (held != SCORE_QUEUE_PAIRS) & (held_tiles != maxima.depth)
            ),
            self.i_raw.ready.eq(go & pair_end & ~empty),
            self.i_head.ready.eq(go & tile_end),
        ]  # fmt: skip
        m.d.sync += [
            held.eq(held + (go & ~empty) - (scores.o.valid & scores.o.ready)),
            held_tiles.eq(held_tiles + (go & tile_end) - (maxima.o.valid & maxima.o.ready)),
        ]
        place = Signal(
            data.StructLayout(
                {
                    "valid": 1,
                    "first": 1,
                    "pair": shapes.PAIRS,
                    "end": 1,
                    "empty": 1,
                    "head": TileHead,
                }
            )
        )
        m.d.comb += [
            place.valid.eq(go & ~empty),
            place.first.eq(token == 0),
            place.pair.eq(pair),
            place.end.eq(go & tile_end),
            place.empty.eq(empty),
            place.head.eq(head),
        ]
        scores_due = stages(m, place, Score.latency, "scored")
        scored = scores_due[-1]
        later = delay(m, scored, 1, "ceiled")
        ended = delay(m, later, 1, "ended")
        self.probes |= {
            "score_go": go, "score_place": place, "scores_due": scores_due,
            "maxima_due": [*scores_due, later, ended],
            "scores_held": held, "tiles_held": held_tiles,
        }  # fmt: skip
        saturated, any_saturated = Signal(), Signal()
        for i in range(2):
            m.submodules[f"score_{i}"] = score = Score()
            m.d.comb += [
                score.raw.eq(Array(raw.sums[2 * j + i] for j in range(pairs))[pair]),
                score.mantissa.eq(head.params.mantissa),
                score.shift.eq(raw.shift),
                scores.i.p[i].eq(score.o),
            ]
            with m.If(scored.valid & score.saturated):
                m.d.comb += saturated.eq(1)
            # The smallest integer not below the score, and the largest of these per head.
            ceiling = Signal(signed(TILE_MAX_BITS), name=f"ceiling_{i}", reset_less=True)
            m.d.sync += ceiling.eq(
                score.o[SCORE_FRAC_BITS:].as_signed() + score.o[:SCORE_FRAC_BITS].any()
            )
            for j in range(pairs):
                largest = Signal(signed(TILE_MAX_BITS), name=f"max_{2 * j + i}", reset_less=True)
                with m.If(later.valid & (later.pair == j)):
                    with m.If(later.first | (ceiling > largest)):
                        m.d.sync += largest.eq(ceiling)
                m.d.comb += maxima.i.p.tile_max[2 * j + i].eq(
                    Mux(ended.empty, RUN_MAX_EMPTY, largest)
                )
        m.d.comb += scores.i.valid.eq(scored.valid)
        # `saturated` runs two stages ahead of `ended`.
        saturated_later = delay(m, saturated, 1, "saturated")
        with m.If(ended.end):
            m.d.sync += any_saturated.eq(saturated_later)
        with m.Elif(saturated_later):
            m.d.sync += any_saturated.eq(1)
        m.d.comb += [
            maxima.i.p.head.eq(ended.head),
            maxima.i.p.saturated.eq(any_saturated),
            maxima.i.valid.eq(ended.end),
        ]

    def _weigh(self, m, pairs, scores, maxima, sums):
        head, tile_max = maxima.o.p.head, maxima.o.p.tile_max
        empty = head.tokens == 0
        go = Signal()
        banks_used, held = Signal(range(P_BANKS + 1)), Signal(range(sums.depth + 1))
        bank = Signal(range(P_BANKS))
        begun = Signal()  # this tile has its bank
        token, pair, pair_end, tile_end = self._walk(m, head, go, "weigh")
        m.d.comb += [
            go.eq(
                maxima.o.valid & (empty | scores.o.valid)
                & (begun | (banks_used != P_BANKS)) & (held != sums.depth)
            ),
            scores.o.ready.eq(go & ~empty),
            maxima.o.ready.eq(go & tile_end),
        ]  # fmt: skip
        m.d.sync += [
            banks_used.eq(banks_used + (go & ~begun) - self.p_free),
            held.eq(held + (go & tile_end) - (sums.o.valid & sums.o.ready)),
        ]
        with m.If(go):
            m.d.sync += begun.eq(~tile_end)
            with m.If(tile_end):
                m.d.sync += bank.eq(bank + 1)
        place = Signal(
            data.StructLayout(
                {
                    "valid": 1,
                    "first": 1,
                    "pair": shapes.PAIRS,
                    "address": range(P_BANKS * abi.TILE_TOKENS),
                    "end": 1,
                    "empty": 1,
                }
            )
        )
        m.d.comb += [
            place.valid.eq(go & ~empty),
            place.first.eq(token == 0),
            place.pair.eq(pair),
            place.address.eq(Cat(token, bank)),
            place.end.eq(go & tile_end),
            place.empty.eq(empty),
        ]
        weights_due = stages(m, place, Exp2.latency, "weighed")
        later = weights_due[-1]
        ended = delay(m, later, 1, "summed")
        self.probes |= {
            "weigh_place": place, "weights_due": weights_due, "sums_due": [*weights_due, ended],
            "sums_held": held, "banks_used": banks_used, "bank": bank, "begun": begun,
        }  # fmt: skip
        units = []
        for i in range(2):
            m.submodules[f"exp2_{i}"] = exp2 = Exp2()
            m.d.comb += [
                exp2.score.eq(scores.o.p[i]),
                exp2.tile_max.eq(Array(tile_max[2 * j + i] for j in range(pairs))[pair]),
            ]
            units.append(exp2)
        for j in range(pairs):
            memory = m.submodules[f"p_{j}"] = Memory(
                shape=2 * P_BITS, depth=P_BANKS * abi.TILE_TOKENS, init=[]
            )
            write, read = memory.write_port(), memory.read_port()
            mine = later.valid & (later.pair == j)
            m.d.comb += [
                write.addr.eq(later.address),
                write.data.eq(Cat(exp2.p for exp2 in units)),
                write.en.eq(mine),
                read.addr.eq(self.p_address),
            ]
            for i, exp2 in enumerate(units):
                row = 2 * j + i
                total = Signal(TILE_SUM_BITS, name=f"sum_{row}", reset_less=True)
                wide = Signal(TILE_WIDE_BITS, name=f"wide_{row}", reset_less=True)
                with m.If(mine):
                    m.d.sync += [
                        total.eq(Mux(later.first, 0, total) + exp2.p),
                        wide.eq(Mux(later.first, 0, wide) + exp2.wide),
                    ]
                m.d.comb += [
                    self.p[row].eq(read.data[P_BITS * i : P_BITS * (i + 1)]),
                    sums.i.p.tile_sum[row].eq(Mux(ended.empty, 0, total)),
                    sums.i.p.tile_wide[row].eq(Mux(ended.empty, 0, wide)),
                ]
        cycles = Exp2.latency + 1
        m.d.comb += [
            sums.i.p.head.eq(delay(m, head, cycles, "head")),
            sums.i.p.tile_max.eq(delay(m, tile_max, cycles, "tile_max")),
            sums.i.p.saturated.eq(delay(m, maxima.o.p.saturated, cycles, "saturated_tile")),
            sums.i.valid.eq(ended.end),
            self.p_ready.eq(ended.end),
        ]
