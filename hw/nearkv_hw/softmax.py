# SPDX-License-Identifier: Apache-2.0
"""Fourth stage: one tile of raw scores becomes weights p, a maximum and two sums per query head."""

from amaranth import Array, C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
import numpy as np

from . import abi, number, shapes
from .fifo import Queue, delay, is_last, stages
from .jobs import Params, present, small_product
from .number import (
    EXP2_FRAC_BITS,
    EXP2_U_BITS,
    HALVINGS_BITS,
    HALVINGS_MAX,
    P_BITS,
    P_DROP_BITS,
    P_MAX,
    POWER_FRAC_BITS,
    RAW_BITS,
    RAW_SHIFT,
    RUN_MAX_EMPTY,
    SCALE_BITS,
    SCORE_BITS,
    SCORE_FRAC_BITS,
    SCORE_LIMIT,
    SCORE_SHIFT_MAX,
    SUM_FRAC_BITS,
    TILE_MAX_BITS,
    TILE_SUM_BITS,
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
    mantissa, halvings : int64 (..., tokens)
        2^(score - tile_max) = mantissa * 2^(-16 - halvings), the mantissa in [2^16, 2^17). Where there
        is no token, or the weight is below 2^-63, the mantissa is 0 and halvings is HALVINGS_MAX.
    tile_max : int64 (...)
        Smallest integer not below any valid score; RUN_MAX_EMPTY if none is valid.
    tile_sum, tile_wide : int64 (...)
        Sum of the weights; sum of 2^(score - tile_max) before it is rounded to a mantissa of 17
        bits. 30 fraction bits, each term truncated to them.
    """
    unit = 1 << SCORE_FRAC_BITS
    valid = np.broadcast_to(valid, score.shape)
    ceiling = -(-score >> SCORE_FRAC_BITS)
    tile_max = np.where(valid, ceiling, RUN_MAX_EMPTY).max(axis=-1)
    below = np.where(valid, score - tile_max[..., None] * unit, 0)
    power = number.exp2(below & (unit - 1))
    halvings = -(below >> SCORE_FRAC_BITS)
    some = valid & (halvings <= HALVINGS_MAX)
    halvings = np.where(some, halvings, HALVINGS_MAX)
    power = np.where(some, power, 0)
    mantissa = np.minimum((power + _HALF) >> P_DROP_BITS, P_MAX)
    sums = (
        ((value << SUM_FRAC_BITS - bits) >> halvings).sum(axis=-1)
        for value, bits in ((mantissa, P_BITS - 1), (power, POWER_FRAC_BITS))
    )
    return mantissa, halvings, tile_max, *sums


RAW_QUEUE_TOKENS = 512
SCORE_QUEUE_PAIRS = 1024
MAXIMA_QUEUE_TILES = SUMS_QUEUE_TILES = 4
P_BANKS = 4
P_ADDRESS = range(P_BANKS * abi.TILE_TOKENS)


class Halvings(data.Struct):
    """The exponent of a weight, as the p store keeps it."""

    halvings: HALVINGS_BITS
    none: 1  # there is no weight


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
            "tile_wide": data.ArrayLayout(TILE_SUM_BITS, rows),
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


class PowerLayout(data.Struct):
    """A weight: mantissa * 2^(-16 - halvings), and what it adds to the tile's sums."""

    mantissa: P_BITS
    halvings: HALVINGS_BITS
    none: 1  # there is no weight: mantissa 0, halvings HALVINGS_MAX
    rounded: SUM_FRAC_BITS + 1  # the weight with 30 fraction bits
    wide: SUM_FRAC_BITS + 1  # the same before it was rounded to 17 bits


class Exp2(wiring.Component):
    """2^(score - tile_max). Always ready; a result `latency` cycles later.

    Members
    -------
    score : In(36 signed), tile_max : In(16 signed), not below score
    absent : In(1), the weight is none, whatever the score
    o : Out(PowerLayout)
    """

    latency = 10

    def __init__(self):
        super().__init__(
            {
                "score": In(signed(SCORE_BITS)),
                "tile_max": In(signed(TILE_MAX_BITS)),
                "absent": In(1),
                "o": Out(PowerLayout),
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
        absent = register(self.absent, "absent")
        # 2: whether that is too many.
        none = Signal(reset_less=True)
        n = Signal(HALVINGS_BITS, reset_less=True)
        beyond = absent | (halvings > HALVINGS_MAX)
        m.d.sync += [none.eq(beyond), n.eq(Mux(beyond, HALVINGS_MAX, halvings))]
        # 2: which segment, and where in it: (a2 u + a1) u + a0.
        segment, u = fraction[EXP2_U_BITS:], fraction[:EXP2_U_BITS]
        drop = EXP2_FRAC_BITS - POWER_FRAC_BITS
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
        power = Signal(POWER_FRAC_BITS + 1)
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
        # 8: the mantissa.
        none, n = delay(m, none, 5, "none"), delay(m, n, 5, "n")
        rounded = (power + _HALF) >> P_DROP_BITS
        mantissa = Signal(P_BITS, reset_less=True)
        m.d.sync += mantissa.eq(Mux(none, 0, Mux(rounded > P_MAX, P_MAX, rounded)))
        power = register(Mux(none, 0, power), "power_8")
        none, n = register(none, "none_8"), register(n, "n_8")
        # 9, 10: halve, by eights, then by ones; 32 times leave nothing.
        terms = []
        for name, value, bits in (
            ("rounded", mantissa, P_BITS - 1), ("wide", power, POWER_FRAC_BITS)
        ):  # fmt: skip
            coarse = Signal(SUM_FRAC_BITS + 1, name=f"{name}_9", reset_less=True)
            m.d.sync += coarse.eq(Mux(n[5], 0, (value << SUM_FRAC_BITS - bits) >> (n[3:5] << 3)))
            terms.append(register(coarse >> delay(m, n[:3], 1, f"{name}_n"), f"{name}_10"))
        m.d.comb += [
            self.o.mantissa.eq(delay(m, mantissa, 2, "mantissa")),
            self.o.halvings.eq(delay(m, n, 2, "n_out")),
            self.o.none.eq(delay(m, none, 2, "none_out")),
            self.o.rounded.eq(terms[0]),
            self.o.wide.eq(terms[1]),
        ]
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
    mantissa_address : In(9), bank and token; mantissas : Out(rows x 17 bits), one cycle later
    scan_address, issue_address : In(9); scan, issue : Out(rows x Halvings), one cycle later
    p_ready : Out(1), high once for each tile whose bank is complete
    p_free : In(1), high when a bank is done with: its first new weight is written
        `Exp2.latency` + 1 cycles later at the earliest
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
                "mantissa_address": In(P_ADDRESS),
                "mantissas": Out(data.ArrayLayout(P_BITS, rows)),
                "scan_address": In(P_ADDRESS),
                "scan": Out(data.ArrayLayout(Halvings, rows)),
                "issue_address": In(P_ADDRESS),
                "issue": Out(data.ArrayLayout(Halvings, rows)),
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
                row = 2 * j + i
                here = present(ended.head.params, row) & ~ended.empty
                m.d.comb += maxima.i.p.tile_max[row].eq(Mux(here, largest, RUN_MAX_EMPTY))
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
                exp2.absent.eq(head.params.odd & pair_end if i else 0),
            ]
            units.append(exp2.o)
        for j in range(pairs):
            mine = later.valid & (later.pair == j)
            m.submodules[f"p_{j}"] = mantissas = Memory(
                shape=data.ArrayLayout(P_BITS, 2), depth=len(P_ADDRESS), init=[]
            )
            m.submodules[f"halvings_{j}"] = halvings = Memory(
                shape=data.ArrayLayout(Halvings, 2), depth=len(P_ADDRESS), init=[]
            )
            read = mantissas.read_port()
            reads = {name: halvings.read_port() for name in ("scan", "issue")}
            m.d.comb += read.addr.eq(self.mantissa_address)
            for name, port in reads.items():
                m.d.comb += port.addr.eq(getattr(self, f"{name}_address"))
            for memory in (mantissas, halvings):
                write = memory.write_port()
                m.d.comb += [write.addr.eq(later.address), write.en.eq(mine)]
                for i, unit in enumerate(units):
                    m.d.comb += (
                        write.data[i].eq(unit.mantissa)
                        if memory is mantissas
                        else [write.data[i].halvings.eq(unit.halvings),
                              write.data[i].none.eq(unit.none)]
                    )  # fmt: skip
            for i, unit in enumerate(units):
                row = 2 * j + i
                total = Signal(TILE_SUM_BITS, name=f"sum_{row}", reset_less=True)
                wide = Signal(TILE_SUM_BITS, name=f"wide_{row}", reset_less=True)
                with m.If(mine):
                    m.d.sync += [
                        total.eq(Mux(later.first, 0, total) + unit.rounded),
                        wide.eq(Mux(later.first, 0, wide) + unit.wide),
                    ]
                m.d.comb += [
                    self.mantissas[row].eq(read.data[i]),
                    *(getattr(self, name)[row].eq(port.data[i]) for name, port in reads.items()),
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
