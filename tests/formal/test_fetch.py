# SPDX-License-Identifier: Apache-2.0
"""The fetch loses no beat, no block and no field, and gives them in the order that others count on."""

from amaranth import Array, Mux

from nearkv_hw import fetch
from nearkv_hw.fetch import Block, KvFetch, Pass
from nearkv_hw.fifo import Queue
from nearkv_hw.jobs import Tile, small_product


def within(tile):
    """Limits that `JobReader` keeps."""
    parts = tile.params.parts
    return (tile.tokens <= 128) & (parts != 0) & (parts <= 8)


def fetching(b, monkeypatch, n_passes: int, n_beats: int):
    """A KvFetch, its memory, and claims of where its states and counters may be.

    Returns it, and how many beats are on their way. Its queues have room for the largest pass, for a
    short proof; they are built with 32 passes and 32 blocks.
    """
    depths = {Pass: n_passes, Block: 8}
    monkeypatch.setattr(
        fetch, "Queue", lambda shape, n, ram=None: Queue(shape, depths.get(shape, n))
    )
    dut = b.add(KvFetch(256, n_beats, 3))
    b.assume(within(dut.i_tile.p), when=dut.i_tile.valid)
    issued, burst_beats = dut.ar.valid & dut.ar.ready, dut.ar.p.beats_less_1 + 1
    on_the_way = b.counter(Mux(issued, burst_beats, 0), dut.r.valid, name="on_the_way")
    b.assume(on_the_way != 0, when=dut.r.valid)

    b.claim(dut.states(fsm="order") & dut.states("master"))
    b.claim(
        within(dut.inside("tile")),
        when=dut.state("Keep", "Measure", "Announce", "Ask", fsm="order"),
    )
    rows, n_blocks = dut.inside("rows"), dut.inside("n_blocks")
    is_v, asked = dut.inside("is_v"), dut.inside("master").spans.p.beats
    b.claim((rows != 0) & (rows <= Mux(is_v, 128, 256)) & (n_blocks != 0) & (n_blocks <= 8),
            when=dut.state("Announce", "Ask", fsm="order"))  # fmt: skip
    b.claim((asked != 0) & ((asked == rows) | ~is_v), when=dut.state("Ask", fsm="order"))
    b.claim(dut.inside("waiting").level <= 3, when=dut.state("Keep", fsm="order"))
    for kept, there in b.entries(dut, "waiting", Tile):
        b.claim(within(kept), when=there)
    now, row, block = dut.inside("passes").o, dut.inside("row"), dut.inside("block")
    b.claim((row < now.p.rows) & (block < now.p.blocks), when=now.valid)
    b.claim((row == 0) & (block == 0), when=~now.valid)
    left, size = dut.inside("master.left"), dut.inside("master.beats")
    b.claim((left != 0) | dut.state("master.Take Span"))
    b.claim((size != 0) & (size <= left) & (size <= 64),
            when=dut.state("master.Reserve", "master.Issue Burst"))  # fmt: skip
    return dut, on_the_way


def beats_reserved(b, dut, on_the_way, depth):
    """Claim that the master has reserved a place for each beat asked for, registered or queued."""
    places, level = dut.inside("places"), dut.inside("beats").level
    issuing = Mux(dut.state("master.Issue Burst"), dut.inside("master.beats"), 0)
    reserved = dut.inside("master.reserved")
    b.claim(reserved == on_the_way + places[0].valid + level + issuing)
    b.claim(reserved <= depth)
    room, fits = dut.inside("master.room"), dut.inside("master.fits")
    b.claim(room <= depth)
    b.claim(dut.inside("master.beats") <= room, when=fits & dut.state("master.Reserve"))
    b.claim_queue(dut, "beats")


def test_beats_and_blocks_find_room_by_induction(bench, monkeypatch):
    """Beats, blocks, and tiles that wait for their V pass never meet a full queue; `o_beat` and
    `o_block` are queues' outputs (their stream rules: see `Queue`). For any tiles within the
    limits, any well-behaved memory and any consumer.

    That a beat comes only for an announced pass is the next proof.
    """
    b, depth = bench, 512
    dut, on_the_way = fetching(b, monkeypatch, 4, depth)
    beats, blocks, passes, waiting = (
        dut.inside(name) for name in ("beats", "blocks", "passes", "waiting")
    )

    b.assume_stream(dut.i_tile)
    b.assume(passes.o.valid, when=dut.r.valid)
    b.claim_stream(dut.ar, passes.i, dut.inside("master").spans)
    for queue in (beats, blocks, waiting):
        b.claim(queue.i.ready, when=queue.i.valid)
    b.cover(beats.o.valid)

    announced = 0
    for pass_, there in b.entries(dut, "passes", Pass):
        b.claim((pass_.rows != 0) & (pass_.blocks != 0) & (pass_.blocks <= 8), when=there)
        announced += Mux(there, pass_.blocks, 0)

    beats_reserved(b, dut, on_the_way, depth)

    # Blocks: announced, on the way through the pipeline, queued.
    coming = dut.inside("block_valid")
    for stage in dut.inside("places"):
        coming += stage.valid & stage.block_end
    b.claim(dut.inside("reserved") == announced - dut.inside("block") + coming + blocks.level)
    b.claim(dut.inside("reserved") <= blocks.depth)
    room, fits = dut.inside("room"), dut.inside("fits")
    b.claim(room <= blocks.depth)
    b.claim(dut.inside("n_blocks") <= room, when=fits & dut.state("Announce", fsm="order"))
    b.claim_queue(dut, "blocks")
    b.prove(depth=1, reach=12)


def test_the_beats_of_announced_passes_come_by_induction(bench, monkeypatch):
    """As many as rows * blocks of each, in order, and no other."""
    b, m = bench, bench.m
    # Neither number has a part in the argument.
    dut, on_the_way = fetching(b, monkeypatch, 2, 64)
    passes = dut.inside("passes")
    b.claim(passes.o.valid, when=dut.r.valid)
    b.cover(dut.r.valid & (on_the_way == 7))

    # What is still to come of the passes in the queue; products kept, so that sums of products are
    # never compared.
    announce = passes.i.valid & passes.i.ready
    announced = small_product(passes.i.p.rows, passes.i.p.blocks)
    due = 0
    produce, consume, take = (dut.inside(f"passes.{n}") for n in ("produce", "consume", "take"))
    entries = list(b.entries(dut, "passes", Pass))
    products = [b.ghost(12, "pass_beats") for _ in entries]
    for place, ((pass_, there), beats) in enumerate(zip(entries, products, strict=True), -1):
        b.claim((pass_.rows != 0) & (pass_.rows <= 256) & (pass_.blocks != 0) & (pass_.blocks <= 8),
                when=there)  # fmt: skip
        if place < 0:  # at the output
            with m.If(take):
                m.d.sync += beats.eq(Array(products[1:])[consume])
        else:
            with m.If(announce & (produce == place)):
                m.d.sync += beats.eq(announced)
        b.claim(beats == small_product(pass_.rows, pass_.blocks), when=there)
        due += Mux(there, beats, 0)
    now, row, block = passes.o, dut.inside("row"), dut.inside("block")
    arrived = b.ghost(12, "arrived")  # of the oldest
    with m.If(dut.r.valid):
        m.d.sync += arrived.eq(Mux(passes.o.ready, 0, arrived + 1))
    b.claim(arrived == row + small_product(now.p.rows, block), when=now.valid)
    b.claim(arrived == 0, when=~now.valid)

    # The same as spans to ask for, beats to issue, beats on the way.
    spans, spans_left = dut.inside("master").spans, dut.inside("spans_left")
    asking, is_v = dut.state("Ask", fsm="order"), dut.inside("is_v")
    spans_due = b.ghost(12, "spans_due")
    with m.If(announce):
        m.d.sync += spans_due.eq(announced)
    with m.Elif(spans.valid & spans.ready):
        m.d.sync += spans_due.eq(spans_due - spans.p.beats)
    b.claim((spans_left != 0) & (spans_left <= Mux(is_v, 8, 1)), when=asking)
    b.claim(spans_due == small_product(spans.p.beats[:8], spans_left), when=asking & is_v)
    b.claim(spans_due == spans.p.beats, when=asking & ~is_v)
    b.claim(spans_due == 0, when=~asking)
    left = dut.inside("master.left")
    idle = dut.state("master.Take Span")
    b.claim(due == spans_due + Mux(idle, 0, left) + on_the_way + arrived)
    b.prove(depth=1, reach=12)


def test_fields_and_beats_come_before_their_block_by_induction(bench, monkeypatch):
    """What `Products` and `Align` count on. A V block is announced when a field of each of its beats has
    left; the blocks of a pass are announced in a row, the first and the last of them marked. A
    beat whose block may be announced is at the output of its queue. When a field leaves, fewer beats
    than the queue holds had theirs and were not taken: so many fields may wait, whoever takes them
    before the beats.

    For any consumer that takes beats of announced blocks only.
    """
    b, m, depth = bench, bench.m, 64
    dut, on_the_way = fetching(b, monkeypatch, 2, depth)
    beats, blocks, passes = (dut.inside(name) for name in ("beats", "blocks", "passes"))
    b.assume(passes.o.valid, when=dut.r.valid)  # see above
    beats_reserved(b, dut, on_the_way, depth)
    for pass_, there in b.entries(dut, "passes", Pass):
        b.claim((pass_.rows != 0) & (pass_.rows <= 256) & (pass_.blocks != 0), when=there)

    # The pipeline, oldest beat first: how far the blocks and passes are that it belongs to.
    places = dut.inside("places")
    later = places[-1]
    count, open_, kind = b.ghost(9, "count"), b.ghost(1, "open"), b.ghost(1, "kind")
    row, block = dut.inside("row"), dut.inside("block")
    now, inside, of = count, open_, kind
    steps = []
    for stage in reversed(places):
        p = stage.pass_
        b.claim((now < 256) & (stage.block_end == (now + 1 == p.rows)), when=stage.valid)
        b.claim(stage.first_block == ~inside, when=stage.valid)
        b.claim(p.is_v == of, when=stage.valid & (inside | (now != 0)))
        b.claim(stage.block_end, when=stage.valid & stage.pass_end)
        now = Mux(stage.valid, Mux(stage.block_end, 0, now + 1)[:9], now)
        inside = Mux(stage.valid & stage.block_end, ~stage.pass_end, inside)
        of = Mux(stage.valid, p.is_v, of)
        steps.append((now, inside, of))
    m.d.sync += [
        ghost.eq(after) for ghost, after in zip((count, open_, kind), steps[0], strict=True)
    ]
    b.claim((now == row) & (inside == (block != 0)))
    b.claim(passes.o.valid & (of == passes.o.p.is_v), when=(row != 0) | (block != 0))

    # Blocks, one cycle behind the pipeline.
    announced = blocks.i.p
    b.claim(announced.rows == b.before(count + 1), when=blocks.i.valid)
    b.claim((announced.is_v == kind) & (count == 0), when=blocks.i.valid)
    within, within_kind = b.ghost(1, "within"), b.ghost(1, "within_kind")
    with m.If(blocks.i.valid):
        m.d.sync += [within.eq(~announced.pass_last), within_kind.eq(announced.is_v)]
    b.claim(announced.pass_first == ~within, when=blocks.i.valid)
    b.claim(announced.is_v == within_kind, when=blocks.i.valid & within)
    b.claim(open_ == Mux(blocks.i.valid, ~announced.pass_last, within))
    b.claim(kind == Mux(blocks.i.valid, announced.is_v, within_kind), when=open_ | (count == 0))
    b.cover(blocks.i.valid & announced.is_v & announced.pass_last)

    # Fields.
    b.claim(dut.o_field.valid == (later.valid & later.pass_.is_v))
    done = Mux(blocks.i.valid & announced.is_v, announced.rows, 0)
    fields = b.counter(dut.o_field.valid, done, name="fields")
    b.claim(fields >= done)
    b.claim(fields == Mux(kind & (count != 0), count, 0) + done)

    # Beats that had their exponent and are not taken yet.
    untaken = b.counter(later.valid, dut.o_beat.valid & dut.o_beat.ready, name="untaken")
    b.assume(untaken != 0, when=dut.o_beat.ready)
    b.claim(dut.o_beat.valid, when=untaken != 0)
    b.claim(beats.level == untaken + sum(stage.valid for stage in places[1:]))
    b.claim((beats.level <= places[1].valid) | beats.o.valid)
    b.claim(untaken < depth, when=later.valid)
    b.prove(depth=2, reach=52)
