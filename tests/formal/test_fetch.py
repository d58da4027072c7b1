# SPDX-License-Identifier: Apache-2.0
"""The fetch loses no beat and no block."""

from amaranth import Mux

from nearkv_hw import fetch
from nearkv_hw.fetch import Block, KvFetch, Pass
from nearkv_hw.fifo import Queue
from nearkv_hw.jobs import Tile


def test_beats_and_blocks_find_room_by_induction(bench, monkeypatch):
    """Beats, blocks, and tiles that wait for their V pass never meet a full queue; `o_beat` and
    `o_block` are queues' outputs (their stream rules: see `Queue`). For any tiles within the
    limits, any well-behaved memory and any consumer.

    That a beat comes only for an announced pass is assumed. To prove it takes the sum of
    rows * blocks over a queue, which the solver does not settle in minutes; for the same reason it
    is left to the simulations that all beats of an announced block are there.
    """
    b, depth = bench, 512
    # As many passes and blocks as the largest pass allows, for a short proof; built with 16 and 32.
    depths = {Pass: 4, Block: 8}
    monkeypatch.setattr(fetch, "Queue", lambda shape, n: Queue(shape, depths.get(shape, n)))
    dut = b.add(KvFetch(256, depth, 3))
    beats, blocks, passes, waiting = (
        dut.inside(name) for name in ("beats", "blocks", "passes", "waiting")
    )

    def within(tile):
        parts = tile.params.parts
        return (tile.tokens <= 128) & (parts != 0) & (parts <= 8)

    b.assume_stream(dut.i_tile)
    b.assume(within(dut.i_tile.p), when=dut.i_tile.valid)
    issued, burst_beats = dut.ar.valid & dut.ar.ready, dut.ar.p.beats_less_1 + 1
    on_the_way = b.counter(Mux(issued, burst_beats, 0), dut.r.valid, name="on_the_way")
    b.assume(on_the_way != 0, when=dut.r.valid)
    b.assume(passes.o.valid, when=dut.r.valid)
    b.claim_stream(dut.ar, passes.i, dut.inside("master").spans)
    for queue in (beats, blocks, waiting):
        b.claim(queue.i.ready, when=queue.i.valid)
    b.cover(beats.o.valid)

    # The order of passes, and what is announced.
    b.claim(dut.states(fsm="order") & dut.states("master"))
    b.claim(within(dut.inside("tile")), when=dut.state("Keep", "Announce", "Ask", fsm="order"))
    b.claim(waiting.level <= 3, when=dut.state("Keep", fsm="order"))
    for kept, there in b.entries(dut, "waiting", Tile):
        b.claim(within(kept), when=there)
    announced = 0
    for pass_, there in b.entries(dut, "passes", Pass):
        b.claim((pass_.rows != 0) & (pass_.blocks != 0) & (pass_.blocks <= 8), when=there)
        announced += Mux(there, pass_.blocks, 0)
    now, row, block = passes.o, dut.inside("row"), dut.inside("block")
    b.claim((row < now.p.rows) & (block < now.p.blocks), when=now.valid)
    b.claim((row == 0) & (block == 0), when=~now.valid)

    # Beats: asked for, registered, queued.
    left, size = dut.inside("master.left"), dut.inside("master.beats")
    place, reserved = dut.inside("place"), dut.inside("master.reserved")
    b.claim((left != 0) | dut.state("master.Take Span"))
    b.claim((size != 0) & (size <= left) & (size <= 64),
            when=dut.state("master.Reserve", "master.Issue Burst"))  # fmt: skip
    issuing = Mux(dut.state("master.Issue Burst"), size, 0)
    b.claim(reserved == on_the_way + place.valid + beats.level + issuing)
    b.claim(reserved <= depth)
    b.claim_queue(dut, "beats")

    # Blocks: announced, on the way through the pipeline, queued.
    coming = dut.inside("block_valid")
    for stage in (place, *dut.delayed("place", 4, place.shape())):
        coming += stage.valid & stage.block_end
    b.claim(dut.inside("reserved") == announced - block + coming + blocks.level)
    b.claim(dut.inside("reserved") <= blocks.depth)
    b.claim_queue(dut, "blocks")
    b.prove(depth=1, reach=12)
