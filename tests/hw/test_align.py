# SPDX-License-Identifier: Apache-2.0
"""Alignment is what its definition says, in numpy and, bit for bit, in the gateware."""

from collections import deque
from fractions import Fraction
import itertools

import numpy as np
import pytest

from nearkv_hw import align
from nearkv_hw.abi import KvType
from nearkv_hw.align import Align, Step
from nearkv_hw.jobs import Q_BANKS
from nearkv_hw.number import EXPONENT_FLOOR, KV_BITS, KV_FORMATS
from nearkv_hw.products import Place, base_latency, latency, scanned_layout
from nearkv_hw.shapes import LANES

# --- patterns -------------------------------------------------------------------------------------


def finite(rng, kv_type, shape):
    """Any finite pattern, all exponents alike: a huge spread."""
    form = KV_FORMATS[kv_type]
    low = rng.integers(0, 1 << form.mantissa_bits, shape)
    field = rng.integers(0, form.exponent_max, shape)
    return rng.integers(0, 2, shape) << 15 | field << form.mantissa_bits | low


def close(rng, kv_type, shape):
    """Exponents within a few binades, so that most bits count."""
    form = KV_FORMATS[kv_type]
    field = rng.integers(form.exponent_max // 2 - 5, form.exponent_max // 2 + 3, shape)
    return finite(rng, kv_type, shape) & ~(form.exponent_max << form.mantissa_bits) | (
        field << form.mantissa_bits
    )


def subnormal(rng, kv_type, shape):
    """Subnormal numbers and zeros of both signs, with a few of the least normal ones."""
    form = KV_FORMATS[kv_type]
    pattern = finite(rng, kv_type, shape) & ~(form.exponent_max << form.mantissa_bits)
    pattern = np.where(rng.random(shape) < 0.3, pattern & 0x8000, pattern)
    return np.where(rng.random(shape) < 0.02, pattern | 1 << form.mantissa_bits, pattern)


def ties(rng, kv_type, shape):
    """One large element, and small ones that lie half way between two integers."""
    form = KV_FORMATS[kv_type]
    pattern = finite(rng, kv_type, shape) & 0x8000
    pattern = pattern | (60 if kv_type == KvType.BF16 else 5) << form.mantissa_bits
    pattern |= rng.integers(0, 1 << form.mantissa_bits, shape)
    top = 5 + form.align_bits + 1 + (55 if kv_type == KvType.BF16 else 0)
    pattern.reshape(-1)[0] = top << form.mantissa_bits
    return pattern


def anything(rng, kv_type, shape):
    """Every pattern there is, Inf and NaN included."""
    return rng.integers(0, 1 << 16, shape)


PATTERNS = (finite, close, subnormal, ties, anything)

# --- the definition -------------------------------------------------------------------------------


def value_of(pattern, kv_type) -> Fraction:
    """A pattern's value by IEEE 754; Inf and NaN as if their exponent were an ordinary one."""
    form = KV_FORMATS[kv_type]
    bias = (1 << (form.exponent_bits - 1)) - 1
    field = pattern >> form.mantissa_bits & form.exponent_max
    mantissa = pattern & (1 << form.mantissa_bits) - 1
    if field:
        mantissa += 1 << form.mantissa_bits
    scale = Fraction(2) ** (max(field, 1) - bias - form.mantissa_bits)
    return (-1) ** (pattern >> 15) * mantissa * scale


def by_definition(elements, kv_type, base, valid):
    """x of rows, element by element."""
    form = KV_FORMATS[kv_type]
    x = np.zeros(elements.shape, np.int64)
    for r, n in np.ndindex(elements.shape):
        if valid[r, n]:
            # Magnitude 2^22 is the significand's leading bit; a subnormal number has none.
            units = value_of(int(elements[r, n]), kv_type) * Fraction(2) ** (
                form.unit - int(base[r])
            )
            # Nothing is shifted left.
            field = max(int(elements[r, n]) >> form.mantissa_bits & form.exponent_max, 1)
            units *= Fraction(2) ** min(int(base[r]) - field, 0)
            size = int(abs(units) + Fraction(1, 2))  # half away from zero
            x[r, n] = size if units >= 0 else -size
    return x


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lanes", [32, 5, 0])
def test_model_equals_the_definition(rng, pattern, kv_type, lanes):
    elements = pattern(rng, kv_type, (24, LANES)).astype(np.uint16)
    valid = np.broadcast_to(np.arange(LANES) < lanes, elements.shape)
    base = rng.integers(-6, 30, 24) + elements.max(axis=1) // 4096
    base[3], base[7] = 2000, -2000
    x = align.model(elements, kv_type, base, valid)
    np.testing.assert_array_equal(x, by_definition(elements, kv_type, base, valid))


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lanes", [32, 5, 0])
def test_the_exponents_of_rows_and_blocks_equal_the_definition(rng, pattern, kv_type, lanes):
    form = KV_FORMATS[kv_type]
    elements = pattern(rng, kv_type, (24, LANES)).astype(np.uint16)
    channels = rng.integers(-6, 6, 24)
    channels[3], channels[7] = -512, 40
    valid = np.broadcast_to(np.arange(LANES) < lanes, elements.shape)
    field, non_finite = align.fields(elements, kv_type, valid)
    of_row = [
        [int(element) >> form.mantissa_bits & form.exponent_max for element in row[:lanes]]
        for row in elements
    ]
    assert field.tolist() == [max((max(e, 1) for e in row), default=0) for row in of_row]
    assert non_finite.tolist() == [form.exponent_max in row for row in of_row]
    totals = [max(e, 1) + int(channels[r]) for r, row in enumerate(of_row) for e in row]
    assert align.block_exponent(field, channels) == max(totals, default=EXPONENT_FLOOR)


@pytest.mark.parametrize("kv_type", KvType)
def test_elements_within_align_bits_of_the_largest_are_exact(rng, kv_type):
    form = KV_FORMATS[kv_type]
    field = rng.integers(form.exponent_max - 1 - form.align_bits, form.exponent_max, (64, LANES))
    elements = finite(rng, kv_type, (64, LANES)) & ~(form.exponent_max << form.mantissa_bits)
    elements |= field << form.mantissa_bits
    exponent = int(field.max())
    x = align.model(elements.astype(np.uint16), kv_type, np.full(64, exponent), True)
    assert np.abs(x).max() <= 1 << (KV_BITS - 1)
    for row, lane in np.ndindex(4, LANES):
        exact = value_of(int(elements[row, lane]), kv_type)
        assert int(x[row, lane]) * Fraction(2) ** (exponent - form.unit) == exact


# --- gateware -------------------------------------------------------------------------------------

Q_CHANNELS = 256


ROWS = 2


def random_block(rng, kv_type, pattern, is_v, rows, lanes, q_bank, pass_last, q_exponents):
    """(scanned block, beats, base of each row, x) of one block."""
    elements = pattern(rng, kv_type, (rows, LANES)).astype(np.uint16)
    valid = np.arange(LANES) < lanes
    field, _ = align.fields(elements, kv_type, valid)
    if is_v:
        exponent, base = 0, field + rng.integers(0, 30, rows) * rng.integers(0, 2, rows)
    else:
        channels = q_exponents[q_bank, :rows]
        exponent = align.block_exponent(field, channels)
        base = exponent - channels
    block = {
        "params": {"kv_type": int(kv_type)}, "is_v": int(is_v), "rows": rows, "lanes": lanes,
        "exponent": int(exponent), "pass_last": int(pass_last), "q_bank": q_bank,
    }  # fmt: skip
    place = {"bank": int(rng.integers(4)), "slot": int(rng.integers(4))}
    beats = [int.from_bytes(row.astype("<u2").tobytes(), "little") for row in elements]
    x = align.model(elements, kv_type, base, valid)
    return {"block": block, "place": place}, beats, base, x


def simulate(bench, blocks, q_exponents, pause_block, pause_start):
    """Gives blocks to `Align`, and the base of each V row; returns taps of what came out."""
    dut = Align(ROWS)
    run = bench(dut)
    layout = scanned_layout(ROWS)
    run.source(dut.i_block, [bench.bits(layout, block) for block, *_ in blocks], pause_block)
    # A block is announced when all its beats are in the queue: beats never pause.
    run.source(dut.i_beat, [beat for _, beats, _, _ in blocks for beat in beats])

    def products():
        """The base of a row comes some cycles after it is issued, for one cycle."""
        bases = [int(at) for _, _, base, _ in blocks for at in base]
        due, sets = deque([0] * (base_latency(ROWS) - 1)), []
        for base in itertools.chain(bases, itertools.repeat(0)):
            while True:
                (issued,) = yield sets
                due.append(base if issued else int(rng_of_noise.integers(-900, 900)))
                sets = [(dut.base, due.popleft())]
                if issued:
                    break

    rng_of_noise = np.random.default_rng(5)
    run.script([dut.issued], products())

    def start():
        while True:
            yield [(dut.may_start, int(not next(pause_start)))]

    run.script([], start())

    def q_store():
        sets = []
        while True:
            (address,) = yield sets
            channel, bank = address % Q_CHANNELS, address // Q_CHANNELS
            sets = [(dut.q_exponent, int(q_exponents[bank, channel]))]

    run.script([dut.q_address], q_store())
    steps = run.tap(dut.o_step.valid, dut.o_step, dut.o_is_v, dut.taken, *dut.o_x)
    places = run.tap(dut.issued, dut.place)
    addresses = run.tap(1, dut.weight_address)
    events = run.tap(1, dut.issued, dut.starved, dut.stalled)
    ends = run.tap(dut.end)
    begins = run.tap(dut.begin)
    n_beats = sum(len(beats) for _, beats, _, _ in blocks)
    run.run(lambda: len(steps) == n_beats, extra=10)
    assert len(steps) == n_beats
    return steps, places, addresses, events, begins, ends


def check(bench, blocks, run):
    steps, places, addresses, events, begins, ends = run
    issued = [cycle for cycle, event in enumerate(events.items) if event[0]]
    assert all(sum(event) == 1 for event in events.items)
    assert steps.cycles == [cycle + latency(ROWS) for cycle in issued]
    got = np.array([item[3:] for item in steps.items])
    np.testing.assert_array_equal(got, np.concatenate([x for *_, x in blocks]))
    at = 0
    for n, (scanned, beats, _, _) in enumerate(blocks):
        block, rows = scanned["block"], len(beats)
        for row in range(rows):
            value, is_v, taken = steps.items[at + row][:3]
            step = bench.fields(Step, value)
            assert (step.first, step.last) == (row == 0, row == rows - 1)
            assert is_v == block["is_v"]
            assert taken == (step.last and not is_v)
            if is_v:
                place = bench.fields(Place, places.items[at + row][0])
                where = scanned["place"]
                assert (place.row, place.bank, place.slot) == (row, where["bank"], where["slot"])
            else:
                (address,) = addresses.items[steps.cycles[at + row] - 1]
                assert address == block["q_bank"] * Q_CHANNELS + row
        # Once begun, a block streams without a gap.
        cycles = issued[at : at + rows]
        assert cycles == list(range(cycles[0], cycles[0] + rows))
        assert (begins.cycles[n], ends.cycles[n]) == (cycles[0], cycles[-1])
        at += rows
    assert min(np.diff(ends.cycles), default=LANES) >= LANES


@pytest.mark.parametrize("kv_type", KvType)
def test_align_equals_its_model(bench, pauses, rng, kv_type):
    q_exponents = rng.integers(-8, 8, (Q_BANKS, Q_CHANNELS))
    q_exponents[:, ::17] = -512
    q_exponents[1, ::29] = 511
    blocks = []
    for n, pattern in enumerate((*PATTERNS, *PATTERNS)):
        is_v = bool(n % 2) if n < 5 else bool(rng.integers(2))
        rows = int(rng.integers(1, 70)) if is_v else int(rng.choice([32, 64]))
        lanes = int(rng.choice([32, 32, 0])) if is_v else int(rng.integers(0, 33))
        blocks.append(
            random_block(
                rng, kv_type, pattern, is_v, rows, lanes, n % Q_BANKS, n % 3 != 0, q_exponents
            )
        )
    check(bench, blocks, simulate(bench, blocks, q_exponents, pauses(0), pauses(1)))


def test_short_blocks_end_32_cycles_apart_and_longer_ones_follow_without_a_gap(bench, rng):
    q_exponents = np.zeros((Q_BANKS, Q_CHANNELS), int)
    lengths = [1, 1, 5, 31, 32, 33, 64, 2, 30, 32, 32, 1, 128]
    blocks = [
        random_block(rng, KvType.FP16, close, True, rows, 32, 0, True, q_exponents)
        for rows in lengths
    ]

    def never():
        while True:
            yield False

    run = simulate(bench, blocks, q_exponents, never(), never())
    check(bench, blocks, run)
    ends = run[-1].cycles
    assert np.diff(ends).tolist() == [max(LANES, rows) for rows in lengths[1:]]


def test_a_block_waits_for_may_start_but_then_runs_to_its_end(bench, rng):
    q_exponents = np.zeros((Q_BANKS, Q_CHANNELS), int)
    blocks = [
        random_block(rng, KvType.BF16, close, False, 32, 32, 0, True, q_exponents) for _ in range(3)
    ]

    def never():
        while True:
            yield False

    def rarely():
        for cycle in range(1000):
            yield cycle not in (20, 25, 90, 300)

    run = simulate(bench, blocks, q_exponents, never(), rarely())
    check(bench, blocks, run)
    assert run[4].cycles == [20, 90, 300]
