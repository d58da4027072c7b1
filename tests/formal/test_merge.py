# SPDX-License-Identifier: Apache-2.0
"""The merge reads no sum that is still on its way into memory, and loses none on the way out."""

from amaranth import Value
import pytest

from nearkv_hw.merge import Accumulate, Merge


def heads_of_jobs(b, head, transfer, pairs, parts):
    """Assume of a stream of tiles: parameters within what is built, the same for a whole job."""
    params = Value.cast(head.params)
    before, open_ = b.ghost(len(params), "params"), b.ghost(1, "job_open")
    with b.m.If(transfer):
        b.m.d.sync += [before.eq(params), open_.eq(~head.job_last)]
    within = (head.params.pairs != 0) & (head.params.pairs <= pairs)
    within &= (head.params.parts != 0) & (head.params.parts <= parts)
    return within & (head.job_first == ~open_) & (~open_ | (params == before))


@pytest.mark.parametrize(("rows", "parts"), [(2, 1), (2, 2), (8, 8)])
def test_merge_reads_only_sums_that_were_written_by_induction(bench, rows, parts):
    """A step reads its old sum and top while no earlier step that will change them is under way.
    Results find room in the queues of results, which are the outputs (their stream rules: see
    `Queue`)."""
    b = bench
    dut = b.add(Merge(rows, 32 * parts))
    tile, head = dut.i_tile, dut.i_tile.p.head
    b.assume_stream(dut.i_tile, dut.i_v)
    takes = tile.valid & tile.ready
    b.assume(heads_of_jobs(b, head, takes, rows // 2, parts), when=tile.valid)

    places = dut.inside("places")
    fresh = b.before(head.job_first)
    reads, *under_way = places[1:]
    for step in under_way:
        same = (step.address == reads.address) & (step.in_sums == reads.in_sums)
        b.claim(~same, when=reads.valid & ~fresh & step.valid)
    b.cover(reads.valid & ~reads.in_sums & under_way[-1].valid & under_way[-1].in_sums)
    # Tops, at one arbitrary address: steps that change it, less its writes.
    writes, address = dut.inside("tops_write"), b.constant(len(reads.top_address), "address")
    here = reads.valid & (reads.top_address == address)
    written = writes.en & (writes.addr == address)
    unwritten = b.counter(here & reads.block_end, written, bits=3, name="unwritten")
    b.claim(unwritten == 0, when=here & ~fresh)
    b.claim(unwritten == sum((step.valid & step.block_end & (step.top_address == address)
                              for step in under_way[:-1]), start=0))  # fmt: skip

    # Results: as many as are reserved, and never more than the queue holds.
    out, ends = dut.inside("out"), dut.inside("ends")
    b.claim(out.i.ready, when=out.i.valid)
    b.claim(ends.i.ready, when=ends.i.valid)
    on_the_way = sum((step.valid & step.out for step in places[1:]), start=0)
    b.claim(dut.inside("held") == on_the_way + out.level)
    b.claim(dut.inside("held") <= out.depth)
    b.claim_queue(dut, "out")
    b.claim_queue(dut, "ends")

    # Where the counters and the steps may be.
    in_sums, second = dut.inside("in_sums"), dut.inside("second")
    channel, pair = dut.inside("channel"), dut.inside("pair")
    started = ~in_sums | second | (pair != 0)
    b.claim((pair == 0) | (pair < head.params.pairs))
    b.claim(tile.valid, when=started)
    b.claim(channel < head.params.parts << 5, when=~in_sums)
    b.prove(depth=Accumulate.latency + 2, reach=12)
