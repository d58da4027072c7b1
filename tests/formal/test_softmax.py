# SPDX-License-Identifier: Apache-2.0
"""The softmax loses no score, no maximum and no sum, and leaves a p bank alone until it is free."""

from nearkv_hw import abi
from nearkv_hw.softmax import P_BANKS, SCORE_QUEUE_PAIRS, Exp2, Softmax


def test_results_find_room_and_banks_stay_until_free_by_induction(bench):
    """Whatever is in the pipelines has its place in the queue behind; a bank of the p store is not
    written from when it is complete until its last weight was read, which is up to
    `Exp2.latency` cycles after `p_free`."""
    b, m = bench, bench.m
    rows = 4
    dut = b.add(Softmax(rows))
    head = dut.i_head.p
    b.assume_stream(dut.i_head, dut.i_raw)
    b.assume((head.params.pairs != 0) & (head.params.pairs <= rows // 2)
             & (head.tokens <= abi.TILE_TOKENS), when=dut.i_head.valid)  # fmt: skip
    complete = b.counter(dut.p_ready, dut.p_free, bits=8, name="complete")
    b.assume(complete != 0, when=dut.p_free)

    scores, maxima, sums = (dut.inside(name) for name in ("scores", "maxima", "sums"))
    for name, queue in (("scores", scores), ("maxima", maxima), ("sums", sums)):
        b.claim(queue.i.ready, when=queue.i.valid)
        b.claim_queue(dut, name)
    b.cover(sums.o.valid)
    b.cover(dut.inside("weigh_place").valid)

    # First pass.
    go, place = dut.inside("score_go"), dut.inside("score_place")
    steps = sum((s.valid for s in dut.inside("scores_due")), start=0)
    b.claim(dut.inside("scores_held") == steps + scores.level)
    b.claim(dut.inside("scores_held") <= SCORE_QUEUE_PAIRS)
    tiles = sum((s.end for s in dut.inside("maxima_due")), start=0)
    b.claim(dut.inside("tiles_held") == tiles + maxima.level)
    b.claim(dut.inside("tiles_held") <= maxima.depth)
    b.claim(dut.i_head.ready == (go & place.end))

    # Second pass.
    stages = dut.inside("weights_due")
    written = stages[-1]
    sums_due = sum((s.end for s in dut.inside("sums_due")), start=0)
    b.claim(dut.inside("sums_held") == sums_due + sums.level)
    b.claim(dut.inside("sums_held") <= sums.depth)

    # Banks, in turn: `free` is the oldest that is not free yet.
    free, begun = b.ghost(2, "free"), dut.inside("begun")
    m.d.sync += free.eq(free + dut.p_free)
    used, bank = dut.inside("banks_used"), dut.inside("bank")
    b.claim(used == complete + sums_due + begun)
    b.claim((used <= P_BANKS) & (complete <= P_BANKS))
    b.claim(complete < P_BANKS, when=dut.p_ready)
    b.claim((free + used - begun)[:2] == bank)
    frees = [(dut.p_free, free)]
    for _ in range(Exp2.latency):
        frees.append(tuple(b.before(value, "freed") for value in frees[-1]))
    ends = 0  # of tiles, issued with or after a stage: so many banks it is behind
    for n, stage in enumerate(stages):
        into = stage.address[7:9]
        ends = ends + stage.end
        b.claim(into == (bank - ends)[:2], when=stage.valid)
        b.claim(begun | (ends != 0), when=stage.valid)
        for freed, which in frees[: n + 2]:  # a bank is free from the next cycle on
            b.claim(into != which, when=stage.valid & freed)
    into = written.address[7:9]
    b.claim((into - free)[:2] >= complete, when=written.valid)
    b.claim(complete < P_BANKS, when=written.valid)
    assert len(stages) + 1 == len(frees)  # so a write is a stage that all of `frees` were held to
    b.cover(dut.p_free & (complete == 1))
    b.prove(depth=2, reach=40)
