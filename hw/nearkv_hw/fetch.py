# SPDX-License-Identifier: Apache-2.0
"""First stage: reads pages in stream order, checks them, finds each block's largest exponent.

    tiles -> order of passes -> AXI bursts -> beats -+-> beat queue -----------> o_beat
                                                     +-> largest exponent -----> o_block, o_field
                                                     +-> CRC-32C of K and V ---> o_faults_k, _v

The order K(0) K(1) K(2) K(3) V(0) K(4) V(1) ... runs on across jobs: while the softmax works on a tile,
later K tiles and earlier V tiles keep the array busy. A block is announced on `o_block` only when
all its beats are in the queue, so a block once begun streams without a gap.
"""

from functools import cache

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from . import abi, shapes
from .axi import BEATS, Burst, ReadBeat, ReadMaster
from .fifo import Queue, delay, stages
from .jobs import Q_BANK, Q_BANKS, Faults, Params, Tile, small_product
from .number import EXPONENT_BITS, EXPONENT_FLOOR, FIELD_BITS, KV_FORMATS, Q_EXPONENT_BITS
from .shapes import BEAT_BITS, BEAT_LOG2, ELEMENT_BITS, LANES, LANES_LOG2


class Pass(data.Struct):
    """One half of a tile, as its beats arrive: blocks of `rows` beats each."""

    params: Params
    is_v: 1
    rows: shapes.ROWS
    blocks: shapes.BLOCKS
    tokens: shapes.TOKENS
    page: shapes.PAGE
    page_first: 1
    page_last: 1
    check: 1
    crc: shapes.CRC
    job_first: 1
    job_last: 1
    q_bank: Q_BANK


class Block(data.Struct):
    """A block whose beats are all waiting in the beat queue."""

    params: Params
    is_v: 1
    rows: shapes.ROWS
    lanes: shapes.VALID_LANES  # the others count as zero
    tokens: shapes.TOKENS  # of the tile
    # Of K, the largest with q's. V has one for each row, see `Products`.
    exponent: signed(EXPONENT_BITS)
    pass_first: 1  # first block of its pass
    pass_last: 1
    job_first: 1  # belongs to the first tile of its job
    job_last: 1
    q_bank: Q_BANK


@cache
def crc_matrix() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """CRC-32C of one beat as linear maps over GF(2).

    Returns
    -------
    state : 32 ints
        Bit i of state[j]: the new state's bit j depends on the old state's bit i.
    beat : 32 ints
        The same for the 512 bits of a beat, its first byte in the low bits.
    """

    def shift(state: int, bits: int) -> int:
        for _ in range(bits):
            state = state >> 1 ^ (abi.CRC_POLYNOMIAL if state & 1 else 0)
        return state

    # A bit that enters at position n of the beat is shifted over the remaining 512 - n positions.
    columns = [shift(1 << i, BEAT_BITS) for i in range(32)]
    value, entering = 1, []
    for _ in range(BEAT_BITS):
        value = shift(value, 1)
        entering.append(value)
    entering.reverse()
    state = tuple(sum((columns[i] >> j & 1) << i for i in range(32)) for j in range(32))
    beat = tuple(sum((entering[n] >> j & 1) << n for n in range(BEAT_BITS)) for j in range(32))
    return state, beat


class Crc(wiring.Component):
    """CRC-32C of two interleaved series of beats (K and V), one beat a cycle. No back-pressure.

    Members
    -------
    valid : In(1)
    data : In(512)
    series : In(1), which of the two the beat belongs to
    first : In(1), the series begins anew with this beat
    crc : Out(32), of its series up to the beat given `latency` cycles ago, in that cycle
    """

    latency = 3

    def __init__(self):
        super().__init__(
            {"valid": In(1), "first": In(1), "series": In(1), "data": In(BEAT_BITS),
             "crc": Out(32)}
        )  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        of_state, of_beat = crc_matrix()
        # The beat's part does not depend on the state: two pipeline stages of XORs.
        words = []
        for w in range(BEAT_BITS // 32):
            word = Signal(32, name=f"word_{w}", reset_less=True)
            bits = self.data[32 * w : 32 * w + 32]
            m.d.sync += word.eq(
                Cat((bits & (of_beat[j] >> 32 * w & 0xFFFFFFFF)).xor() for j in range(32))
            )
            words.append(word)
        entering = Signal(32, reset_less=True)
        total = words[0]
        for word in words[1:]:
            total = total ^ word
        m.d.sync += entering.eq(total)
        valid = delay(m, self.valid, 2, "valid")
        first = delay(m, self.first, 2, "first")
        series = delay(m, self.series, 2, "series")
        states, before = [Signal(32, name=f"state_{n}") for n in range(2)], Signal(32)
        m.d.comb += before.eq(Mux(first, 0xFFFFFFFF, Mux(series, states[1], states[0])))
        for n, state in enumerate(states):
            with m.If(valid & (series == n)):
                m.d.sync += state.eq(
                    entering ^ Cat((before & of_state[j]).xor() for j in range(32))
                )
        m.d.comb += self.crc.eq(~Mux(delay(m, series, 1, "series_out"), states[1], states[0]))
        return m

    @staticmethod
    def model(beats: bytes, crc: int = 0) -> int:
        """The same, in software: CRC-32C of whole beats, continuing from `crc`."""
        of_state, of_beat = crc_matrix()
        state = crc ^ 0xFFFFFFFF
        for at in range(0, len(beats), abi.BEAT_BYTES):
            word = int.from_bytes(beats[at : at + abi.BEAT_BYTES], "little")
            state = sum(
                ((state & of_state[j]).bit_count() + (word & of_beat[j]).bit_count() & 1) << j
                for j in range(32)
            )
        return state ^ 0xFFFFFFFF


class KvFetch(wiring.Component):
    """Reads the K and V beats of tiles in stream order.

    Parameters
    ----------
    max_head_dim, beat_fifo_beats, lookahead_tiles : int
        See `Config`.

    Members
    -------
    i_tile : In(stream of Tile)
    flush : In(1), no tile may follow soon: do not wait for one with a V pass
    ar, r : AXI read channels of the kv port
    q_address : Out; q_exponent : In, read port of the q store, one cycle later
    o_beat : Out(stream of 512 bits), o_block : Out(stream of Block)
    o_field : Out(stream), of each V beat the largest exponent field of its elements that are not 0, and
        0 if all are; before the block is announced, and always to be taken
    o_faults_k, o_faults_v : Out(stream of Faults), once a job
    burst : Out(1), high for each burst issued
    """

    def __init__(self, max_head_dim: int, beat_fifo_beats: int, lookahead_tiles: int):
        self._max_head_dim = max_head_dim
        self._depth = beat_fifo_beats
        self._lookahead = lookahead_tiles
        super().__init__(
            {
                "i_tile": In(stream.Signature(Tile)),
                "flush": In(1),
                "ar": Out(stream.Signature(Burst)),
                "r": In(stream.Signature(ReadBeat)),
                "q_address": Out(range(Q_BANKS * abi.MAX_HEAD_DIM)),
                "q_exponent": In(signed(Q_EXPONENT_BITS)),
                "o_beat": Out(stream.Signature(BEAT_BITS)),
                "o_block": Out(stream.Signature(Block)),
                "o_field": Out(stream.Signature(FIELD_BITS)),
                "o_faults_k": Out(stream.Signature(Faults)),
                "o_faults_v": Out(stream.Signature(Faults)),
                "burst": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.master = master = ReadMaster(self._depth)
        m.submodules.passes = passes = Queue(Pass, 32)
        wiring.connect(m, master.ar, wiring.flipped(self.ar))
        wiring.connect(m, wiring.flipped(self.r), master.r)
        m.d.comb += self.burst.eq(master.issued)
        m.submodules.blocks = blocks = Queue(Block, 32)
        wiring.connect(m, blocks.o, wiring.flipped(self.o_block))
        self.probes = {}
        self._order(m, master, passes, blocks)
        self._inspect(m, master, passes, blocks)
        return m

    def _order(self, m, master, passes, blocks):
        """Choose the next pass, announce it, ask for its beats."""
        m.submodules.waiting = waiting = Queue(Tile, 4)  # tiles whose V pass is still to come
        tile = Signal(Tile)
        is_v = Signal()
        # Rows of a block: channels of K, tokens of V. Measured before the pass is announced.
        rows, n_blocks = Signal(shapes.ROWS), Signal(shapes.BLOCKS)
        spans_left, address, beats = Signal(shapes.BLOCKS), Signal(shapes.ADDRESS), Signal(BEATS)
        # Short blocks could overrun the queue of blocks, which cannot push back: reserve room.
        room, freed = Signal(range(blocks.depth + 1), init=blocks.depth), Signal()
        fits, announce = Signal(), Signal()
        m.d.sync += [
            freed.eq(self.o_block.valid & self.o_block.ready),
            room.eq(room + freed - Mux(announce, n_blocks, 0)),
        ]
        m.d.comb += announce.eq(passes.i.valid & passes.i.ready)
        self.probes |= {
            "tile": tile, "is_v": is_v, "spans_left": spans_left, "rows": rows,
            "n_blocks": n_blocks, "room": room, "fits": fits,
            "reserved": (blocks.depth - room - freed)[: len(room)],
        }  # fmt: skip
        k_blocks = Mux(
            tile.tokens == 0, 1, tile.tokens[LANES_LOG2:] + tile.tokens[:LANES_LOG2].any()
        )

        def measure():
            count = Mux(is_v, tile.params.parts, k_blocks)
            m.d.sync += [
                rows.eq(
                    Mux(
                        is_v, Mux(tile.tokens == 0, 1, tile.tokens), tile.params.parts << LANES_LOG2
                    )
                ),
                n_blocks.eq(count),
                fits.eq(count <= room),
            ]

        with m.FSM(name="order"):
            with m.State("Choose"):
                take_k = self.i_tile.valid & (waiting.level <= self._lookahead)
                take_v = (waiting.level > self._lookahead) | (self.flush & ~self.i_tile.valid)
                with m.If(take_k):
                    m.d.comb += self.i_tile.ready.eq(1)
                    m.d.sync += [tile.eq(self.i_tile.p), is_v.eq(0)]
                    m.next = "Keep"
                with m.Elif(take_v & waiting.o.valid):
                    m.d.comb += waiting.o.ready.eq(1)
                    m.d.sync += [tile.eq(waiting.o.p), is_v.eq(1)]
                    m.next = "Measure"
            with m.State("Keep"):
                m.d.comb += [waiting.i.p.eq(tile), waiting.i.valid.eq(1)]
                measure()
                m.next = "Announce"
            with m.State("Measure"):
                measure()
                m.next = "Announce"
            with m.State("Announce"):
                p = passes.i.p
                m.d.comb += [
                    getattr(p, name).eq(getattr(tile, name))
                    for name in ("params", "tokens", "page", "page_first", "page_last", "check",
                                 "job_first", "job_last", "q_bank")
                ]  # fmt: skip
                m.d.comb += [
                    p.is_v.eq(is_v),
                    p.rows.eq(rows),
                    p.blocks.eq(n_blocks),
                    p.crc.eq(Mux(is_v, tile.crc_v, tile.crc_k)),
                    passes.i.valid.eq(fits),
                ]
                # K blocks lie behind one another; each V block is a column of the page.
                m.d.sync += [
                    fits.eq(n_blocks <= room),
                    address.eq(Mux(is_v, tile.v_address, tile.k_address)),
                    spans_left.eq(Mux(is_v, n_blocks, 1)),
                    beats.eq(Mux(is_v, rows, small_product(rows, n_blocks))),
                ]
                with m.If(announce):
                    m.next = "Ask"
            with m.State("Ask"):
                m.d.comb += [
                    master.spans.p.address.eq(address),
                    master.spans.p.beats.eq(beats),
                    master.spans.valid.eq(1),
                ]
                with m.If(master.spans.ready):
                    m.d.sync += [
                        address.eq(address + (tile.v_stride << BEAT_LOG2)),
                        spans_left.eq(spans_left - 1),
                    ]
                    with m.If(spans_left == 1):
                        m.next = "Choose"

    def _inspect(self, m, master, passes, blocks):
        """Follow the beats: queue them, find exponents, check CRCs."""
        m.submodules.beats = beats = Queue(BEAT_BITS, self._depth, ram="ultra")
        wiring.connect(m, beats.o, wiring.flipped(self.o_beat))

        # Stage 0: place of the beat in its pass.
        now = passes.o.p
        row, block = Signal(shapes.ROWS), Signal(shapes.BLOCKS)
        arrives = master.o.valid
        # Adding to the registers, not to what comes out of the queue: that is late in the cycle.
        block_end = (row + 1)[: len(row)] == now.rows
        pass_end = block_end & ((block + 1)[: len(block)] == now.blocks)
        m.d.comb += [
            master.freed.eq(self.o_beat.valid & self.o_beat.ready),
            self.q_address.eq(Cat(row[: shapes.CHANNEL_LOG2], now.q_bank)),
            passes.o.ready.eq(arrives & pass_end),
        ]
        with m.If(arrives):
            m.d.sync += row.eq(row + 1)
            with m.If(block_end):
                m.d.sync += [row.eq(0), block.eq(block + 1)]
            with m.If(pass_end):
                m.d.sync += block.eq(0)

        # Stage 1: beat registered; into the queue, which has room by the master's reservation.
        place = Signal(
            data.StructLayout(
                {
                    "valid": 1,
                    "pass_": Pass,
                    "block_first": 1,
                    "block_end": 1,
                    "pass_first": 1,
                    "pass_end": 1,
                    "first_block": 1,
                    "lanes": shapes.VALID_LANES,
                    "error": 1,
                }
            )
        )
        tokens_here = now.tokens - (block << LANES_LOG2)
        lanes = Mux(now.is_v, Mux(now.tokens != 0, LANES, 0),
                    Mux(tokens_here > LANES, LANES, tokens_here))  # fmt: skip
        beat = Signal(BEAT_BITS, reset_less=True)
        m.d.sync += [
            beat.eq(master.o.p.data),
            place.valid.eq(arrives),
            place.pass_.eq(now),
            place.block_first.eq(row == 0),
            place.block_end.eq(block_end),
            place.pass_first.eq((row == 0) & (block == 0)),
            place.pass_end.eq(pass_end),
            place.first_block.eq(block == 0),
            place.lanes.eq(lanes),
            place.error.eq(master.o.p.resp[1]),
        ]
        m.d.comb += [beats.i.payload.eq(beat), beats.i.valid.eq(place.valid)]

        # Stages 2..5: largest exponent field over the valid lanes, then with q's exponent.
        fp16, bf16 = KV_FORMATS[abi.KvType.FP16], KV_FORMATS[abi.KvType.BF16]
        is_bf16 = place.pass_.params.kv_type == abi.KvType.BF16
        fields, bad = [], []
        for lane in range(LANES):
            at = ELEMENT_BITS * lane
            element = beat[at : at + ELEMENT_BITS - 1]  # without its sign
            valid = lane < place.lanes
            e = Signal(FIELD_BITS, name=f"field_{lane}")
            m.d.comb += e.eq(
                Mux(is_bf16, element[bf16.mantissa_bits :], element[fp16.mantissa_bits :])
            )
            kept = Signal(FIELD_BITS, name=f"kept_{lane}", reset_less=True)
            there = valid & (~place.pass_.is_v | (element != 0))
            m.d.sync += kept.eq(Mux(there, Mux(e == 0, 1, e), 0))
            fields.append(kept)
            bad.append(valid & (e == Mux(is_bf16, bf16.exponent_max, fp16.exponent_max)))
        not_finite = Signal(reset_less=True)
        m.d.sync += not_finite.eq(Cat(bad).any())
        for level in (8, 2, 1):
            step, level_fields = len(fields) // level, []
            for i in range(level):
                largest = fields[step * i]
                for other in fields[step * i + 1 : step * (i + 1)]:
                    pick = Signal(FIELD_BITS, name=f"pick_{level}_{i}_{len(level_fields)}")
                    m.d.comb += pick.eq(Mux(largest > other, largest, other))
                    largest = pick
                kept = Signal(FIELD_BITS, name=f"max_{level}_{i}", reset_less=True)
                m.d.sync += kept.eq(largest)
                level_fields.append(kept)
            fields = level_fields
        q_exponent = delay(m, self.q_exponent, 4, "q_exponent")
        places = stages(m, place, 4, "place")
        later = places[-1]
        not_finite = delay(m, not_finite, 3, "not_finite")
        exponent = Signal(signed(EXPONENT_BITS))
        largest, running = Signal(signed(EXPONENT_BITS)), Signal(signed(EXPONENT_BITS))
        m.d.comb += [
            exponent.eq(Mux(fields[0] == 0, EXPONENT_FLOOR, fields[0] + q_exponent)),
            largest.eq(Mux(~later.block_first & (running > exponent), running, exponent)),
        ]  # fmt: skip
        m.d.comb += [
            self.o_field.payload.eq(fields[0]),
            self.o_field.valid.eq(later.valid & later.pass_.is_v),
        ]
        block_out = Signal(Block)
        block_valid = Signal()
        with m.If(later.valid):
            m.d.sync += running.eq(largest)
        m.d.sync += [
            getattr(block_out, name).eq(getattr(later.pass_, name))
            for name in ("params", "is_v", "rows", "tokens", "job_first", "job_last", "q_bank")
        ]
        m.d.sync += [
            block_valid.eq(later.valid & later.block_end),
            block_out.exponent.eq(largest),
            block_out.lanes.eq(later.lanes),
            block_out.pass_first.eq(later.first_block),
            block_out.pass_last.eq(later.pass_end),
        ]
        m.d.comb += [blocks.i.p.eq(block_out), blocks.i.valid.eq(block_valid)]
        self.probes |= {
            "row": row, "block": block, "places": [place, *places], "block_valid": block_valid,
        }  # fmt: skip

        m.submodules.crc = crc = Crc()
        m.d.comb += [
            crc.data.eq(beat),
            crc.valid.eq(place.valid),
            crc.series.eq(place.pass_.is_v),
            crc.first.eq(place.pass_.page_first & place.pass_first),
        ]
        ended = delay(m, later, 2, "ended")  # 6 stages behind `place`
        bad_crc = Signal(reset_less=True)
        m.d.sync += bad_crc.eq(
            delay(m, crc.crc, 5 - Crc.latency, "crc") != delay(m, later.pass_.crc, 1, "want")
        )
        ended_not_finite = delay(m, not_finite, 2, "ended_not_finite")

        for kind, out in enumerate((self.o_faults_k, self.o_faults_v)):
            m.submodules[f"faults_{'kv'[kind]}"] = queue = Queue(Faults, 16)
            wiring.connect(m, queue.o, wiring.flipped(out))
            faults, after = Signal(Faults), Signal(Faults)
            here = ended.valid & (ended.pass_.is_v == kind)
            events = [
                (after.bus_error, ended.error),
                (after.non_finite, ended_not_finite),
                (after.bad_crc,
                 ended.pass_end & ended.pass_.page_last & ended.pass_.check & bad_crc),
            ]  # fmt: skip
            m.d.comb += after.eq(faults)
            with m.If(Cat(event for _, event in events).any() & ~faults.page_known):
                m.d.comb += [after.page_known.eq(1), after.page.eq(ended.pass_.page)]
            for flag, event in events:
                with m.If(event):
                    m.d.comb += flag.eq(1)
            m.d.comb += queue.i.p.eq(after)
            with m.If(here):
                m.d.sync += faults.eq(after)
                with m.If(ended.pass_end & ended.pass_.job_last):
                    m.d.comb += queue.i.valid.eq(1)
                    m.d.sync += faults.eq(0)
