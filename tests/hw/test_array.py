# SPDX-License-Identifier: Apache-2.0
"""The array sums exactly, lane after lane, whatever the gaps between and within blocks."""

import numpy as np
import pytest

from nearkv_hw.align import Step
from nearkv_hw.array import Mac, MacArray
from nearkv_hw.number import KV_BITS, WEIGHT_MAX
from nearkv_hw.shapes import LANES

X_MAX = 1 << (KV_BITS - 1)


def random_block(rng, n, rows):
    """x (n, 32), w (rows, n) up to their limits."""
    x = rng.integers(-X_MAX, X_MAX + 1, (n, LANES))
    return x, rng.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, (rows, n))


def largest_block(sign, n, rows):
    return np.full((n, LANES), X_MAX), np.full((rows, n), sign * WEIGHT_MAX)


def simulate(bench, rows, blocks, pause):
    """Feeds blocks as soon as the gap rule allows, with pauses within them.

    Returns the tap of the results and the cycle of each block's last step.
    """
    dut = MacArray(rows)
    run = bench(dut)
    lasts = []
    garbage = run.garbage(18)

    def feed():
        for x, w in blocks:
            n = len(x)
            # This block's last step may come 32 cycles after the one before, not sooner.
            while lasts and run.cycle + n - lasts[-1] < LANES:
                yield idle()
            for i in range(n):
                while next(pause):
                    yield idle()
                step = {"valid": 1, "first": i == 0, "last": i == n - 1}
                sets = [(dut.step.as_value(), bench.bits(Step, step))]
                sets += [(dut.x[lane], int(x[i, lane])) for lane in range(LANES)]
                sets += [(dut.w[row], int(w[row, i])) for row in range(rows)]
                if i == n - 1:
                    lasts.append(run.cycle + 1)
                yield sets
        while True:
            yield idle()

    def idle():
        # Without `valid` everything else is garbage.
        sets = [(dut.step.as_value(), next(garbage) % 8 & ~1)]
        sets += [(dut.x[lane], next(garbage)) for lane in range(0, LANES, 7)]
        return sets + [(dut.w[row], next(garbage)) for row in range(rows)]

    assert Step.as_shape()["valid"].offset == 0
    run.script([], feed())
    out = run.tap(dut.o_valid, dut.o_lane, *dut.o_sum)
    run.run(lambda: len(out) == LANES * len(blocks), extra=LANES + 5)
    return out, lasts


def check(out, lasts, blocks):
    assert len(out) == LANES * len(blocks)
    lanes = np.array([item[0] for item in out.items])
    np.testing.assert_array_equal(lanes, np.tile(np.arange(LANES), len(blocks)))
    sums = np.array([item[1:] for item in out.items])  # (blocks * 32, rows)
    for n, (x, w) in enumerate(blocks):
        got = sums[LANES * n : LANES * (n + 1)].T
        np.testing.assert_array_equal(got, MacArray.model(x, w))
        first = lasts[n] + MacArray.latency
        assert out.cycles[LANES * n : LANES * (n + 1)] == list(range(first, first + LANES))


@pytest.mark.slow
def test_array_equals_its_model_with_any_gaps_within_and_between_blocks(bench, pauses, rng):
    rows = 2
    lengths = (32, 64, 33, 1, 32, 5, 1, 40)
    blocks = [random_block(rng, n, rows) for n in lengths]
    out, lasts = simulate(bench, rows, blocks, pauses(1))
    check(out, lasts, blocks)


@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_follow_each_other_without_a_gap(bench, rng, rows):
    lengths = [32, 32, 40, 32]
    blocks = [random_block(rng, n, rows) for n in lengths]
    out, lasts = simulate(bench, rows, blocks, iter(lambda: False, None))
    check(out, lasts, blocks)
    assert np.diff(lasts).tolist() == lengths[1:]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_block_does_not_overflow(bench, sign):
    blocks = [largest_block(sign, 256, 1)]
    out, lasts = simulate(bench, 1, blocks, iter(lambda: False, None))
    check(out, lasts, blocks)
    assert out.items[0] == (0, sign * 256 * WEIGHT_MAX * X_MAX)


def test_model_is_exact(rng):
    """In float64 no sum loses a bit: the same in Python's integers."""
    for x, w in (random_block(rng, 256, 3), largest_block(1, 256, 2), largest_block(-1, 256, 2)):
        want = [
            [
                sum(int(a) * int(b) for a, b in zip(w[row], x[:, lane], strict=True))
                for lane in (0, 9)
            ]
            for row in range(len(w))
        ]
        np.testing.assert_array_equal(MacArray.model(x, w)[:, [0, 9]], want)


def test_mac_accumulates_only_valid_products(bench, rng):
    dut = Mac()
    run = bench(dut)
    n = 300
    x = rng.integers(-X_MAX, X_MAX + 1, n)
    w = rng.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, n)
    first, valid = rng.random(n) < 0.1, rng.random(n) < 0.7
    first[0] = valid[0] = True

    def feed():
        for i in range(n + 5):
            sets = [(dut.x, int(x[i % n])), (dut.w, int(w[i % n]))]
            # One and two cycles after x and w.
            for late, signal, values in ((1, dut.first, first), (2, dut.valid, valid)):
                if i >= late:
                    sets.append((signal, int(values[(i - late) % n])))
            yield sets

    run.script([], feed())
    out = run.tap(1, dut.p, dut.w_next)
    run.run(lambda: len(out) == n + 4)
    total = 0
    for i in range(n):
        if valid[i]:
            total = (0 if first[i] else total) + int(x[i]) * int(w[i])
        assert out.items[i + Mac.latency][0] == total
        assert out.items[i + 1][1] == w[i]


def test_an_array_without_rows_is_refused(refuses):
    with refuses("rows must be at least 1, not 0"):
        MacArray(0)
