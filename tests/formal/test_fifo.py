# SPDX-License-Identifier: Apache-2.0
"""The queue gives out what it took, in order, and never holds more than it may."""

import pytest

from nearkv_hw.fifo import Queue

BITS = 4


@pytest.mark.parametrize("depth", [1, 4, 12, 32, 128, 1024])
def test_queue_keeps_order_and_never_overflows_by_induction(bench, depth):
    """One arbitrary entry is followed from when it goes in, behind `ahead` others, until it leaves:
    just after those, unchanged. There is room for `depth` entries, and one more at the output."""
    b, m = bench, bench.m
    dut = b.add(Queue(BITS, depth))
    puts, gets = dut.i.valid & dut.i.ready, dut.o.valid & dut.o.ready
    held = b.counter(puts, gets)
    b.claim_stream(dut.o)
    b.claim(dut.level == held)
    b.claim(held <= depth + 1)
    b.claim(~dut.i.ready, when=held == depth + 1)
    b.claim(dut.i.ready, when=held < depth)
    b.claim(~dut.o.valid, when=held == 0)
    b.claim(dut.o.valid, when=held > 1)

    following, ahead = b.ghost(1, "following"), b.ghost(16, "ahead")
    followed = b.ghost(BITS, "followed")
    leaves = following & gets & (ahead == 0)
    with m.If(puts & ~following & b.free(1, "follow")):
        m.d.sync += [following.eq(1), ahead.eq(held - gets), followed.eq(dut.i.payload)]
    with m.If(following & gets):
        m.d.sync += ahead.eq(ahead - 1)
    with m.If(leaves):
        m.d.sync += following.eq(0)
    b.claim(dut.o.payload == followed, when=leaves)
    b.cover(leaves & (followed == 5))
    if depth <= 12:
        b.cover(held == depth + 1)

    # Where it lies meanwhile.
    level, oldest, _ = b.claim_queue(dut)
    at_output = dut.o.valid
    first = following & at_output & (ahead == 0)
    b.claim(dut.o.payload == followed, when=first)
    b.claim(held == level + at_output)
    b.claim(ahead < held, when=following)
    word = dut.word("storage", (oldest + ahead - at_output)[: len(oldest)])
    b.claim(word == followed, when=following & ~first)
    b.prove(reach=2 * depth + 4 if depth <= 12 else 8)
