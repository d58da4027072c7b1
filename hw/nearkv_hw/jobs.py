# SPDX-License-Identifier: Apache-2.0
"""The control side: reads the job queue from job memory and turns each job into tiles.

    job record -> checks -> query block into the q store -> page table -> tiles, in order

Runs ahead of the datapath by as many jobs as the q store has banks and as many tiles as the queue
behind it holds; so the next job's first tile is known long before this job's last one is done. What a
job needs is asked for at once, and the record of the job behind it too: a job costs one latency of
the memory.
"""

from functools import reduce
from operator import and_

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from . import abi, shapes
from .axi import Burst, ControlArgs, ReadBeat, ReadMaster, Span
from .fifo import Queue
from .number import Q_EXPONENT_BITS, SCALE_BITS, WEIGHT_BITS
from .shapes import BEAT_LOG2, LANES_LOG2, TILE_LOG2

Q_BANKS = 4
Q_BANK = range(Q_BANKS)
READ_AHEAD_BEATS = 128  # asked for and not yet used: the query block of most jobs


class Params(data.Struct):
    """What a job asks for, carried along with each of its tiles."""

    kv_type: shapes.KV_TYPE
    parts: shapes.PARTS
    pairs: shapes.PAIRS
    odd: 1  # the last row of the last pair is padding
    mantissa: SCALE_BITS
    shift: shapes.SHIFT


def present(params, row: int):
    """High if a row belongs to the group: it is neither padding nor beyond the last pair."""
    pair, second = divmod(row, 2)
    if second:
        return (params.pairs > pair + 1) | ((params.pairs == pair + 1) & ~params.odd)
    return params.pairs > pair


class Tile(data.Struct):
    """Up to 128 tokens of one page: one K pass and one V pass of the array."""

    params: Params
    k_address: shapes.ADDRESS
    v_address: shapes.ADDRESS
    v_stride: shapes.PAGE_TOKENS
    tokens: shapes.TOKENS
    page: shapes.PAGE
    page_first: 1  # first tile of its page
    page_last: 1
    check: 1  # the page holds tokens, so its CRCs mean something
    crc_k: shapes.CRC
    crc_v: shapes.CRC
    job_first: 1
    job_last: 1
    q_bank: Q_BANK


class Faults(data.Struct):
    """What went wrong in one job, as far as one stage can see it."""

    bad_crc: 1
    illegal: 1
    bus_error: 1
    non_finite: 1
    page: shapes.PAGE  # first page to blame
    page_known: 1


class JobInfo(data.Struct):
    """What the writer must know of a job; sent once all its tiles are on their way."""

    address: shapes.ADDRESS
    tag: shapes.TAG
    pairs: shapes.PAIRS
    parts: shapes.PARTS
    tokens: shapes.N_TOKENS
    legal: 1
    faults: Faults


def q_layout(rows: int) -> data.StructLayout:
    """One write into the q store."""
    return data.StructLayout(
        {
            "bank": Q_BANK,
            "channel": shapes.CHANNEL,
            "weights": data.ArrayLayout(signed(WEIGHT_BITS), rows),
            "exponent": signed(Q_EXPONENT_BITS),
        }
    )


def small_product(value, factor):
    """value * factor by shifts and adds: too small, or too rare, to spend a DSP on."""
    terms = [Mux(factor[i], value << i, 0) for i in range(len(factor))]
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def within(limits, values, **given):
    """High while all values are within their limits. Steps must be powers of two.

    Parameters
    ----------
    limits : tuple of abi.Limit
    values : dict of str to Value
    given : int
        The limits that have a name.
    """
    terms, aligned = [], []
    for limit in limits:
        value, most, step = values[limit.name], limit.largest(given), exact_log2(limit.step)
        if most is None:
            aligned.append(value[:step])
            continue
        if step:
            terms.append(value[:step] == 0)
        if limit.coarse:
            coarse = exact_log2(limit.coarse)
            terms += [value != 0, (value < limit.coarse) | (value[:coarse] == 0), value <= most]
            continue
        least, most, value = limit.least >> step, most >> step, value[step:]
        if least > 1 and most == 2 * least - 1:  # just one bit is the highest that is set
            terms.append(value[exact_log2(least) :] == 1)
            continue
        if least:
            terms.append(value != 0)
        terms.append(value <= most)
    return reduce(and_, [*terms, ~Cat(aligned).any()])


class JobReader(wiring.Component):
    """Reads jobs one after the other.

    Parameters
    ----------
    rows, max_head_dim : int
        As built; larger jobs are illegal.

    Members
    -------
    start : In(1); args : In(ControlArgs)
    ar, r : AXI read channels of the job port
    o_q : Out(stream), writes into the q store, always taken
    q_free : In(1), high when the array has read a bank for the last time
    o_tile : Out(stream of Tile)
    o_job : Out(stream of JobInfo)
    finished : Out(1), no more tiles will come in this run
    n_jobs : Out(32), jobs that were read; final when `finished`
    error : Out(1), a job record could not be read: the queue was given up there. Also if the
        queue is not aligned to beats: nothing was read then
    """

    def __init__(self, rows: int, max_head_dim: int):
        self._rows, self._max_head_dim = rows, max_head_dim
        super().__init__(
            {
                "start": In(1),
                "args": In(ControlArgs),
                "ar": Out(stream.Signature(Burst)),
                "r": In(stream.Signature(ReadBeat)),
                "o_q": Out(stream.Signature(q_layout(rows), always_ready=True)),
                "q_free": In(1),
                "o_tile": Out(stream.Signature(Tile)),
                "o_job": Out(stream.Signature(JobInfo)),
                "finished": Out(1),
                "n_jobs": Out(ControlArgs["n_jobs"].shape),
                "error": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.master = master = ReadMaster(READ_AHEAD_BEATS)
        m.submodules.beats = beats = Queue(ReadBeat, READ_AHEAD_BEATS, ram="lut")
        m.submodules.spans = spans = Queue(Span, 4)  # of one job at most 3
        wiring.connect(m, spans.o, master.spans)
        wiring.connect(m, master.ar, wiring.flipped(self.ar))
        wiring.connect(m, wiring.flipped(self.r), master.r)
        m.d.comb += [
            beats.i.p.eq(master.o.p),
            beats.i.valid.eq(master.o.valid),
            master.freed.eq(beats.o.valid & beats.o.ready),
        ]
        beat, bus_error = beats.o.p.data, beats.o.p.resp[1]

        def field(record, name, offset=0):
            f = record[name]
            at = 8 * (offset + f.offset)
            value = beat[at : at + f.bits]
            return value.as_signed() if f.code.islower() else value

        bits = {field.name: field.bits for field in (*abi.JOB.fields, *abi.PAGE_ENTRY.fields)}
        job_address, jobs_left = Signal(shapes.ADDRESS), Signal(len(self.args.n_jobs))
        none_left = Signal()  # jobs_left == 0
        tile, info = Signal(Tile), Signal(JobInfo)
        params = tile.params
        page_tokens, group_size = Signal(shapes.PAGE_TOKENS), Signal(bits["group_size"])
        head_dim, kv_type = Signal(bits["head_dim"]), Signal(bits["kv_type"])
        q_offset, table_offset, partial_offset = (
            Signal(shapes.OFFSET),
            Signal(shapes.OFFSET),
            Signal(shapes.OFFSET),
        )
        pages, pages_left = Signal(bits["n_pages"]), Signal(shapes.PAGE)
        channel, last_channel = Signal(shapes.ROWS), Signal(shapes.ROWS)
        m.d.sync += last_channel.eq(head_dim - 1)
        second = Signal()  # the entry in the upper half of the beat is next
        entry_address, page_len = Signal(shapes.ADDRESS), Signal(bits["page_len"])
        entry_lost = Signal()
        tokens_left = Signal(shapes.PAGE_TOKENS)
        q_used = Signal(range(Q_BANKS + 1))
        q_take, q_freed = Signal(), Signal()
        m.d.sync += [q_freed.eq(self.q_free), q_used.eq(q_used + q_take - q_freed)]

        def blame(*flags):
            """Note a fault of the current page; the first page blamed stays."""
            m.d.sync += [flag.eq(1) for flag in flags]
            with m.If(~info.faults.page_known):
                m.d.sync += [info.faults.page.eq(tile.page), info.faults.page_known.eq(1)]

        def request(address, count):
            m.d.comb += [
                spans.i.p.address.eq(address),
                spans.i.p.beats.eq(count),
                spans.i.valid.eq(1),
            ]
            return spans.i.ready

        tiles_per_page = Signal(range(abi.n_tiles(1, abi.MAX_PAGE_TOKENS) + 1))
        n_tiles, v_span = Signal(len(pages_left) + len(tiles_per_page)), Signal(shapes.ADDRESS)
        v_base = Signal(shapes.ADDRESS)  # where V would begin of a page at offset 0
        m.d.sync += v_base.eq(self.args.kv + (v_span << BEAT_LOG2))
        mantissa = Signal(bits["score_mantissa"])
        plausible, legal = Signal(), Signal()
        values = {
            "group_size": group_size, "kv_type": kv_type, "head_dim": head_dim,
            "page_tokens": page_tokens, "score_mantissa": mantissa, "n_pages": pages,
            "n_tiles": n_tiles,
            "q": q_offset, "page_table": table_offset, "partial": partial_offset,
        }  # fmt: skip
        given = {"rows": self._rows, "max_head_dim": self._max_head_dim}
        of_tiles = tuple(limit for limit in abi.JOB_LIMITS if limit.name == "n_tiles")
        others = tuple(limit for limit in abi.JOB_LIMITS if limit.name != "n_tiles")
        m.d.sync += plausible.eq(within(others, values, **given))
        m.d.comb += legal.eq(plausible & within(of_tiles, values, **given))

        with m.FSM():
            with m.State("Idle"):
                with m.If(self.start):
                    m.d.sync += [
                        job_address.eq(self.args.job + self.args.queue),
                        jobs_left.eq(self.args.n_jobs),
                        none_left.eq(self.args.n_jobs == 0),
                        self.n_jobs.eq(0),
                        self.finished.eq(0),
                        self.error.eq(0),
                        tile.q_bank.eq(0),
                    ]
                    m.next = "Ask First Job"
                    with m.If(self.args.queue[:BEAT_LOG2] != 0):
                        m.d.sync += [self.error.eq(1), self.finished.eq(1)]
                        m.next = "Idle"
            with m.State("Ask First Job"):
                with m.If(none_left):
                    m.next = "Finish"
                with m.Else():
                    with m.If(request(job_address, 1)):
                        m.next = "Read Job"
            with m.State("Read Job"):
                m.d.comb += beats.o.ready.eq(1)
                m.d.sync += [
                    table_offset.eq(field(abi.JOB, "page_table")),
                    pages.eq(field(abi.JOB, "n_pages")),
                    q_offset.eq(field(abi.JOB, "q")),
                    partial_offset.eq(field(abi.JOB, "partial")),
                    group_size.eq(field(abi.JOB, "group_size")),
                    kv_type.eq(field(abi.JOB, "kv_type")),
                    head_dim.eq(field(abi.JOB, "head_dim")),
                    page_tokens.eq(field(abi.JOB, "page_tokens")),
                    tiles_per_page.eq(
                        Mux(
                            field(abi.JOB, "page_tokens") < abi.TILE_TOKENS,
                            1,
                            field(abi.JOB, "page_tokens")[TILE_LOG2:],
                        )
                    ),
                    mantissa.eq(field(abi.JOB, "score_mantissa")),
                    params.shift.eq(field(abi.JOB, "score_shift")),
                    info.eq(0),
                    info.tag.eq(field(abi.JOB, "tag")),
                    tile.page.eq(0),
                    tile.job_first.eq(1),
                    channel.eq(0),
                    second.eq(0),
                ]
                with m.If(beats.o.valid):
                    m.d.sync += [
                        job_address.eq(job_address + abi.JOB.bytes),
                        jobs_left.eq(jobs_left - 1),
                        none_left.eq(jobs_left == 1),
                    ]
                    with m.If(bus_error):
                        m.d.sync += [self.error.eq(1), self.finished.eq(1)]
                        m.next = "Idle"
                    with m.Else():
                        m.d.sync += self.n_jobs.eq(self.n_jobs + 1)
                        m.next = "Count Tiles"
            with m.State("Count Tiles"):
                m.d.sync += n_tiles.eq(small_product(pages[: len(pages_left)], tiles_per_page))
                m.next = "Check Job"
            with m.State("Check Job"):
                m.d.sync += [
                    params.kv_type.eq(kv_type),
                    params.mantissa.eq(mantissa),
                    params.parts.eq(head_dim[LANES_LOG2:]),
                    params.pairs.eq((group_size + 1)[1:]),
                    params.odd.eq(group_size[0]),
                    tile.v_stride.eq(page_tokens),
                    v_span.eq(
                        small_product(page_tokens, head_dim[LANES_LOG2:][: len(params.parts)])
                    ),
                    pages_left.eq(pages),
                    info.address.eq(self.args.job + partial_offset),
                    info.pairs.eq((group_size + 1)[1:]),
                    info.parts.eq(head_dim[LANES_LOG2:]),
                    info.legal.eq(legal),
                    info.faults.illegal.eq(~legal),
                ]
                m.next = "Ask Next Job"
                with m.If(legal):
                    m.next = "Ask Query"
            with m.State("Ask Query"):
                with m.If(q_used != Q_BANKS):
                    with m.If(request(self.args.job + q_offset, head_dim)):
                        m.d.comb += q_take.eq(1)
                        m.next = "Ask Pages"
            with m.State("Ask Pages"):
                with m.If(request(self.args.job + table_offset, (pages_left + 1)[1:])):
                    m.next = "Ask Next Job"
            with m.State("Ask Next Job"):
                asked = Signal()
                with m.If(none_left):
                    m.d.comb += asked.eq(1)
                with m.Else():
                    m.d.comb += asked.eq(request(job_address, 1))
                with m.If(asked):
                    m.next = "Report"
                    with m.If(info.legal):
                        m.next = "Read Query"
            with m.State("Read Query"):
                m.d.comb += beats.o.ready.eq(1)
                weights = abi.Q_RECORD["weight"]
                for row in range(self._rows):
                    at = 8 * weights.offset + weights.bits * row
                    m.d.comb += self.o_q.p.weights[row].eq(beat[at : at + WEIGHT_BITS].as_signed())
                m.d.comb += [
                    self.o_q.p.bank.eq(tile.q_bank),
                    self.o_q.p.channel.eq(channel),
                    self.o_q.p.exponent.eq(field(abi.Q_RECORD, "exponent")),
                    self.o_q.valid.eq(beats.o.valid),
                ]
                with m.If(beats.o.valid):
                    m.d.sync += channel.eq(channel + 1)
                    with m.If(bus_error):
                        m.d.sync += info.faults.bus_error.eq(1)
                    with m.If(channel == last_channel):
                        m.next = "Read Page Entry"
            with m.State("Read Page Entry"):
                half = abi.PAGE_ENTRY.bytes

                def entry(name):
                    return Mux(second, field(abi.PAGE_ENTRY, name, half),
                               field(abi.PAGE_ENTRY, name))  # fmt: skip

                m.d.sync += [
                    entry_address.eq(entry("address")),
                    page_len.eq(entry("page_len")),
                    tile.crc_k.eq(entry("crc_k")),
                    tile.crc_v.eq(entry("crc_v")),
                ]
                with m.If(beats.o.valid):
                    # The second entry of the last beat of an odd table is not used.
                    m.d.comb += beats.o.ready.eq(second | (pages_left == 1))
                    m.d.sync += [second.eq(~second), pages_left.eq(pages_left - 1)]
                    m.d.sync += entry_lost.eq(bus_error)
                    with m.If(bus_error):
                        blame(info.faults.bus_error)
                    m.next = "Check Page"
            with m.State("Check Page"):
                # A page that cannot be read counts as one without tokens; the bus still sees a
                # short read, of the first bytes of kv memory.
                # abi.PAGE_ENTRY_LIMITS, the other way round
                misplaced = entry_address[: exact_log2(abi.PAGE_ALIGN_BYTES)] != 0
                illegal = misplaced | (page_len > page_tokens)
                bad = illegal | entry_lost
                address = Mux(bad, 0, entry_address)
                tokens = Mux(bad, 0, page_len)
                m.d.sync += [
                    tile.k_address.eq(self.args.kv + address),
                    tile.v_address.eq(v_base + address),
                    tile.page_first.eq(1),
                    tile.check.eq(tokens != 0),
                    tokens_left.eq(tokens),
                    info.tokens.eq(info.tokens + tokens),
                ]
                with m.If(illegal & ~entry_lost):
                    blame(info.faults.illegal)
                m.next = "Emit Tile"
            with m.State("Emit Tile"):
                last = tokens_left <= abi.TILE_TOKENS
                m.d.comb += [
                    self.o_tile.p.eq(tile),
                    self.o_tile.p.tokens.eq(Mux(last, tokens_left, abi.TILE_TOKENS)),
                    self.o_tile.p.page_last.eq(last),
                    self.o_tile.p.job_last.eq(last & (pages_left == 0)),
                    self.o_tile.valid.eq(1),
                ]
                with m.If(self.o_tile.ready):
                    m.d.sync += [
                        tile.k_address.eq(tile.k_address + (params.parts << TILE_LOG2 + BEAT_LOG2)),
                        tile.v_address.eq(tile.v_address + abi.TILE_TOKENS * abi.BEAT_BYTES),
                        tile.page_first.eq(0),
                        tile.job_first.eq(0),
                        tokens_left.eq(tokens_left - abi.TILE_TOKENS),
                    ]
                    with m.If(last):
                        m.d.sync += tile.page.eq(tile.page + 1)
                        m.next = "Read Page Entry"
                        with m.If(pages_left == 0):
                            m.d.sync += tile.q_bank.eq(tile.q_bank + 1)
                            m.next = "Report"
            with m.State("Report"):
                m.d.comb += [self.o_job.p.eq(info), self.o_job.valid.eq(1)]
                with m.If(self.o_job.ready):
                    m.next = "Read Job"
                    with m.If(none_left):
                        m.next = "Finish"
            with m.State("Finish"):
                m.d.sync += self.finished.eq(1)
                m.next = "Idle"
        self.probes = {
            "tile": tile, "info": info, "head_dim": head_dim, "channel": channel,
            "pages_left": pages_left, "second": second, "q_used": q_used, "jobs_left": jobs_left,
            "none_left": none_left, "q_freed": q_freed, "last_channel": last_channel,
        }  # fmt: skip
        return m
