# SPDX-License-Identifier: Apache-2.0
"""Scores, exponentials and the softmax of tiles: definition, model and gateware agree."""

from collections import deque

import numpy as np
import pytest

from nearkv_hw import abi, number, softmax
from nearkv_hw.number import (
    HALVINGS_MAX,
    P_BITS,
    P_MAX,
    POWER_FRAC_BITS,
    RAW_BITS,
    RAW_SHIFT,
    RUN_MAX_EMPTY,
    SCORE_FRAC_BITS,
    SCORE_LIMIT,
    SUM_FRAC_BITS,
)
from nearkv_hw.products import base_latency
from nearkv_hw.softmax import (
    P_BANKS,
    Exp2,
    Halvings,
    PowerLayout,
    Score,
    Softmax,
    TileHead,
    raw_layout,
    score_model,
    tile_sum_layout,
)

UNIT = 1 << SCORE_FRAC_BITS
RAW_MAX = (1 << (RAW_BITS - 1)) - 1

# --- scores ---------------------------------------------------------------------------------------


def score_by_definition(raw, mantissa, shift):
    """Half a unit rounds up; what leaves the range is clipped, and said so."""
    if shift >= 1:
        score = (raw * mantissa + (1 << (shift - 1))) >> shift
    else:
        score = raw * mantissa << -shift
        # Shifts below 1 are beyond what a sensible scale needs: all but 0 counts as out of range.
        score = score and (SCORE_LIMIT + 1 if score > 0 else -SCORE_LIMIT - 1)
    return max(-SCORE_LIMIT, min(SCORE_LIMIT, score)), abs(score) > SCORE_LIMIT


def score_cases(rng, n=1500):
    """Raw sums, mantissas and shifts: extremes, ties, the edges of the range, and random ones."""
    cases = []
    for raw in (0, 1, -1, 2, -2, RAW_MAX, -RAW_MAX - 1, 1 << 17, -(1 << 17), (1 << 17) - 1):
        for mantissa in (1 << 23, (1 << 24) - 1, 0xB8AA3B):
            cases += [
                (raw, mantissa, s) for s in (-70, -1, 0, 1, 2, 22, 23, 24, 57, 58, 63, 64, 99)
            ]
    for score in (SCORE_LIMIT, -SCORE_LIMIT):  # just inside, on and beyond the edge
        for mantissa, shift in ((1 << 23, 22), (1 << 23, 19), (7 << 21, 22), (7 << 21, 20)):
            raw = (score << shift) // mantissa  # exact
            cases += [(raw + d, mantissa, shift) for d in range(-3, 4)]
    for _ in range(n):
        bits = int(rng.integers(1, RAW_BITS))
        raw = int(rng.integers(-(1 << (bits - 1)), 1 << (bits - 1)))
        cases.append((raw, int(rng.integers(1 << 23, 1 << 24)), int(rng.integers(-3, 70))))
    return cases


def test_score_model_equals_the_definition(rng):
    cases = score_cases(rng)
    raw, mantissa, shift = np.array(cases).T
    score, saturated = score_model(raw << RAW_SHIFT, mantissa, shift)
    want = [score_by_definition(*case) for case in cases]
    np.testing.assert_array_equal(score, [s for s, _ in want])
    np.testing.assert_array_equal(saturated, [s for _, s in want])
    # The bits below RAW_SHIFT are dropped.
    again, _ = score_model((raw << RAW_SHIFT) + (1 << RAW_SHIFT) - 1, mantissa, shift)
    np.testing.assert_array_equal(again, score)


def test_score_equals_its_model_every_cycle_after_its_latency(bench, rng):
    cases = score_cases(rng, 800)
    dut = Score()
    run = bench(dut)

    def feed():
        for raw, mantissa, shift in cases:
            clipped = min(max(shift, 0), number.SCORE_SHIFT_MAX)  # as the kernel does
            yield [(dut.raw, raw), (dut.mantissa, mantissa), (dut.shift, clipped)]
        while True:
            yield []

    run.script([], feed())
    out = run.tap(1, dut.o, dut.saturated)
    run.run(lambda: len(out) == len(cases) + Score.latency)
    raw, mantissa, shift = np.array(cases).T
    score, saturated = score_model(raw << RAW_SHIFT, mantissa, shift)
    got = np.array(out.items[Score.latency :])
    np.testing.assert_array_equal(got[:, 0], score)
    np.testing.assert_array_equal(got[:, 1], saturated)


# --- exp2 -----------------------------------------------------------------------------------------


def powers(score, tile_max):
    """mantissa, halvings and both terms of scores under a given tile_max, by the model: in a tile with
    one more token."""
    tile = np.stack([score, tile_max * UNIT], axis=-1)
    mantissa, halvings, largest, *sums = softmax.model(tile, True)
    np.testing.assert_array_equal(largest, tile_max)
    _, _, _, *of_one = softmax.model(np.zeros((1, 1), np.int64), True)
    terms = [total - int(one[0]) for total, one in zip(sums, of_one, strict=True)]
    return mantissa[:, 0], halvings[:, 0], *terms


def power_cases(rng, n=800):
    tile_max = rng.integers(-32767, 32768, n)
    below = rng.integers(0, rng.choice([26, 70], n) * UNIT)
    below[:40] = np.arange(40) * UNIT // 4  # whole and quarter halvings
    below[40:60] = np.arange(20)  # just below the maximum
    tile_max[60:70], below[60:70] = 32767, 2 * SCORE_LIMIT - np.arange(10)  # as far as it goes
    tile_max[70:80], below[70:80] = -32767 + 20, 20 * UNIT - np.arange(10)
    below[80:120] = np.arange(44, 64).repeat(2) * UNIT + np.tile(
        [0, 1], 20
    )  # the last that is a weight
    below[120:140] = np.arange(20, 40) * UNIT  # the last that adds to the sums
    score = tile_max * UNIT - below
    inside = np.abs(score) <= SCORE_LIMIT
    return score[inside], tile_max[inside]


def test_exp2_equals_its_model_every_cycle_after_its_latency(bench, rng):
    score, tile_max = power_cases(rng)
    absent = rng.random(len(score)) < 0.1
    dut = Exp2()
    run = bench(dut)

    def feed():
        for s, m, none in zip(score, tile_max, absent, strict=True):
            # Of a row that is not there the maximum is anything, and so is its distance from the score.
            m = rng.integers(-32768, 32768) if none else m
            yield [(dut.score, int(s)), (dut.tile_max, int(m)), (dut.absent, int(none))]
        while True:
            yield []

    run.script([], feed())
    out = run.tap(1, dut.o)
    run.run(lambda: len(out) == len(score) + Exp2.latency)
    mantissa, halvings, rounded, wide = powers(score, tile_max)
    got = [bench.fields(PowerLayout, item[0]) for item in out.items[Exp2.latency :]]
    for name, values in {
        "mantissa": np.where(absent, 0, mantissa), "halvings": np.where(absent, HALVINGS_MAX, halvings),
        "none": absent | (mantissa == 0), "rounded": np.where(absent, 0, rounded),
        "wide": np.where(absent, 0, wide),
    }.items():  # fmt: skip
        np.testing.assert_array_equal([getattr(it, name) for it in got], values, err_msg=name)


def test_weights_are_within_their_bounds_of_the_exact_power(rng):
    score, tile_max = power_cases(rng, 20000)
    mantissa, halvings, rounded, wide = powers(score, tile_max)
    exact = np.exp2((score - tile_max * UNIT) / UNIT)
    p = np.ldexp(mantissa.astype(float), -(P_BITS - 1) - halvings)
    # The curve, and half a unit of a mantissa of at least 2^16.
    share = (2.0**-20.5 + 2.0**-P_BITS) * exact
    some = mantissa > 0
    assert (np.abs(p - exact) <= share)[some].all()
    assert (exact[~some] < 2.0**-HALVINGS_MAX).all()
    assert mantissa[some].min() == 1 << P_BITS - 1
    assert mantissa.max() == P_MAX
    unit = 2.0**-SUM_FRAC_BITS
    assert (np.abs(rounded * unit - exact) <= share + unit).all()
    assert (np.abs(wide * unit - exact) <= 2.0**-20.5 * exact + unit).all()


def test_model_of_a_tile_equals_the_definition(rng):
    score = rng.integers(-40 * UNIT, 40 * UNIT, (6, 50))
    score[1] = 3 * UNIT  # whole numbers: the maximum is not rounded up
    score[2] = -3 * UNIT + 1
    valid = rng.random((6, 50)) < 0.5
    valid[3] = False
    valid[1:3] = True
    p, n, tile_max, tile_sum, tile_wide = softmax.model(score, valid)
    assert tile_max[1:4].tolist() == [3, -2, RUN_MAX_EMPTY]
    for tile in range(6):
        scores = [int(s) for s in score[tile][valid[tile]]]
        assert tile_max[tile] == max((-(-s // UNIT) for s in scores), default=RUN_MAX_EMPTY)
        weights, sums = [], [0, 0]
        for s in scores:
            halvings, fraction = divmod(s - int(tile_max[tile]) * UNIT, UNIT)
            power, drop = int(number.exp2(np.array([fraction]))[0]), POWER_FRAC_BITS - 16
            mantissa = min((power + (1 << drop - 1)) >> drop, P_MAX)
            if halvings < -63:
                mantissa, power, halvings = 0, 0, -63
            weights.append((mantissa, -halvings))
            sums[0] += mantissa << SUM_FRAC_BITS - 16 >> -halvings
            sums[1] += power << SUM_FRAC_BITS - POWER_FRAC_BITS >> -halvings
        assert list(zip(p[tile], n[tile], strict=True)) == [
            weights.pop(0) if there else (0, HALVINGS_MAX) for there in valid[tile]
        ]
        assert [tile_sum[tile], tile_wide[tile]] == sums


# --- the component --------------------------------------------------------------------------------


KINDS = ("far", "equal", "near", "first saturates", "shallow", "saturating")


class Tiles:
    """Tiles with random raw sums, what the model makes of them, and the payloads for the bench."""

    def __init__(self, rng, rows, sizes, kinds=KINDS):
        self.rows, self.heads, self.raw, self.want = rows, [], [], []
        for n, (tokens, pairs) in enumerate(sizes):
            kind = kinds[n % len(kinds)]
            mantissa = int(rng.integers(1 << 23, 1 << 24))
            used, odd = 2 * pairs, int(n % 3 == 1)
            # One shift for each K block of 32 tokens.
            shift = np.repeat(rng.integers(29, 34, 4), 32)[:tokens]
            raw = rng.integers(-RAW_MAX - 1, RAW_MAX + 1, (tokens, rows))
            if kind == "near":  # scores of a few units
                raw >>= 6
            elif kind == "equal":
                raw[:] = raw[:1] >> 8
                shift[:] = shift[:1]
            elif kind == "saturating":
                shift = shift - 14
                shift[::3] = 0
                raw[1::5] = 0
            elif kind == "first saturates":
                raw >>= 6
                raw[:1] = RAW_MAX
                shift[:1] = 3
            elif kind == "shallow":
                shift = np.minimum(shift + 31, number.SCORE_SHIFT_MAX)
            score, saturated = score_model(
                raw[:, :used].T << RAW_SHIFT, mantissa, shift[None, :]
            )  # (used, tokens)
            empty = np.full((used, 1), 0)  # the model wants a token, if only to ignore it
            there = np.broadcast_to(np.arange(tokens + 1) < tokens, (used, tokens + 1)).copy()
            if odd:  # the last row is padding
                there[-1] = False
            p, halvings, tile_max, tile_sum, tile_wide = softmax.model(
                np.concatenate([score, empty], axis=1), there
            )
            weights = (p[:, :tokens], halvings[:, :tokens])
            self.want.append((weights, tile_max, tile_sum, tile_wide, bool(saturated.any())))
            self.heads.append(
                {
                    "params": {"pairs": pairs, "odd": odd, "mantissa": mantissa},
                    "tokens": tokens, "job_first": n % 3 == 0, "job_last": n % 3 == 2,
                }
            )  # fmt: skip
            self.raw.append(
                [
                    {"sums": [int(x) for x in raw[token]], "shift": int(shift[token])}
                    for token in range(tokens)
                ]
            )

    def __len__(self):
        return len(self.heads)

    def check_sum(self, n, value, bench):
        got = bench.fields(tile_sum_layout(self.rows), value)
        _, tile_max, tile_sum, tile_wide, saturated = self.want[n]
        head = self.heads[n]
        assert got.head.tokens == head["tokens"]
        assert got.head.params.pairs == head["params"]["pairs"]
        assert (got.head.job_first, got.head.job_last) == (head["job_first"], head["job_last"])
        used = 2 * head["params"]["pairs"]
        np.testing.assert_array_equal([got.tile_max[r] for r in range(used)], tile_max)
        np.testing.assert_array_equal([got.tile_sum[r] for r in range(used)], tile_sum)
        np.testing.assert_array_equal([got.tile_wide[r] for r in range(used)], tile_wide)
        assert got.saturated == saturated


def simulate(bench, tiles, pause_head=None, pause_raw=None, pause_sum=None, hold=0, wait=None):
    """Runs all tiles through; an agent reads each bank as the V pass does and frees it.

    `hold`: cycles that the agent lets pass before it reads a bank. `wait`: it begins only when
    this is true.
    """
    dut = Softmax(tiles.rows)
    run = bench(dut)
    run.source(dut.i_head, [bench.bits(TileHead, head) for head in tiles.heads], pause_head)
    raw = [
        bench.bits(raw_layout(tiles.rows), token) for tokens in tiles.raw for token in tokens
    ]  # fmt: skip
    run.source(dut.i_raw, raw, pause_raw)
    sums = run.sink(dut.o_sum, pause_sum)
    ready = run.tap(dut.p_ready)
    freed = []

    def reader():
        pending = deque()

        def cycle(*sets):
            ready, *p = yield [(dut.p_free, 0), *sets]
            if ready:
                pending.append(run.cycle)
            return p

        for n, head in enumerate(tiles.heads):
            while not pending or run.cycle < pending[0] + hold or (wait and not wait(run)):
                yield from cycle()
            pending.popleft()
            rows, got = max(head["tokens"], 1), []
            # As `Products` does: the bank is free with the last row that is issued, and that
            # row's mantissas are read some cycles later. The memory takes one cycle more.
            delay = base_latency(tiles.rows)
            bank = n % P_BANKS * abi.TILE_TOKENS
            for i in range(rows + delay + 1):
                sets = [(dut.p_free, int(i == rows - 1))]
                if i < rows:
                    sets += [(dut.scan_address, bank + rows - 1 - i), (dut.issue_address, bank + i)]
                if delay <= i:
                    sets.append((dut.mantissa_address, bank + min(i - delay, rows - 1)))
                got.append((yield from cycle(*sets)))
            tokens, used = head["tokens"], 2 * head["params"]["pairs"]
            got = np.array(got)[1:].T.reshape(3, tiles.rows, -1)[:, :used]
            mantissa, halvings = tiles.want[n][0]
            np.testing.assert_array_equal(got[0, :, delay : delay + tokens], mantissa)
            kept = [[bench.bits(Halvings, {"halvings": int(h), "none": int(p == 0)})
                     for h, p in zip(*row, strict=True)]
                    for row in zip(halvings, mantissa, strict=True)]  # fmt: skip
            kept = np.array(kept).reshape(used, tokens)
            np.testing.assert_array_equal(got[2, :, :tokens], kept)
            np.testing.assert_array_equal(got[1, :, rows - tokens : rows][:, ::-1], kept)
            freed.append(run.cycle)
        while True:
            yield [(dut.p_free, 0)]

    run.script(
        [dut.p_ready, *dut.mantissas, *(kept for port in (dut.scan, dut.issue) for kept in port)],
        reader(),
    )
    run.run(lambda: len(sums) == len(freed) == len(tiles), extra=20)
    for n, value in enumerate(sums.items):
        tiles.check_sum(n, value, bench)
    assert len(ready) == len(sums) == len(freed) == len(tiles)
    return ready, sums, freed


SIZES = ((70, 2), (0, 2), (1, 1), (33, 1), (128, 2), (0, 1), (0, 2), (1, 2), (96, 1), (128, 1))


def test_softmax_equals_its_model_for_full_ragged_single_and_empty_tiles(bench, pauses, rng):
    tiles = Tiles(rng, 4, SIZES)
    simulate(bench, tiles, pauses(0), pauses(1), pauses(3))


@pytest.mark.parametrize("rows", [2, 6, 8])
def test_softmax_serves_every_number_of_pairs(bench, rng, rows):
    sizes = [(int(rng.integers(1, 40)), pairs) for pairs in range(1, rows // 2 + 1)]
    simulate(bench, Tiles(rng, rows, [*sizes, *reversed(sizes)]))


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 2])
def test_softmax_has_no_gap_between_tiles(bench, rng, pairs):
    """One pair of rows a cycle, on and on: a tile takes tokens * pairs cycles."""
    sizes = [(tokens, pairs) for tokens in (128, 96, 128, 64, 128, 128)]
    ready, sums, _ = simulate(bench, Tiles(rng, 4, sizes))
    want = [tokens * pairs for tokens, _ in sizes[1:]]
    assert np.diff(ready.cycles).tolist() == want
    assert np.diff(sums.cycles).tolist() == want


def test_softmax_stops_when_all_banks_are_full_and_keeps_what_is_in_them(bench, rng):
    tiles = Tiles(rng, 2, [(20, 1)] * 7)
    held_until = 600
    ready, _, _ = simulate(bench, tiles, wait=lambda run: run.cycle > held_until)
    assert len([cycle for cycle in ready.cycles if cycle < held_until]) == P_BANKS


def test_softmax_waits_for_a_merge_that_takes_no_sums(bench, rng):
    tiles = Tiles(rng, 2, [(9, 1)] * 9)
    pause = (cycle < 500 for cycle in range(100000))
    ready, sums, _ = simulate(bench, tiles, pause_sum=pause)
    early = [cycle for cycle in ready.cycles if cycle < 500]
    assert P_BANKS <= len(early) < len(tiles)
    assert min(sums.cycles) >= 500


@pytest.mark.slow
def test_softmax_is_slowed_but_not_disturbed_by_slow_readers(bench, pauses, rng):
    simulate(bench, Tiles(rng, 2, [(30, 1)] * 6), pauses(1), pauses(0), pauses(2), hold=45)


@pytest.mark.parametrize("rows", [0, 3, -2])
def test_rows_come_in_pairs(refuses, rows):
    with refuses(f"rows must be even and positive, not {rows}"):
        Softmax(rows)
