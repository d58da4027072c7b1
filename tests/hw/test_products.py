# SPDX-License-Identifier: Apache-2.0
"""Weights and bases of V blocks: definition, model and gateware agree."""

from fractions import Fraction

from amaranth import Value
import numpy as np
import pytest

from nearkv_hw import abi, products
from nearkv_hw.abi import KvType
from nearkv_hw.fetch import Block
from nearkv_hw.number import DEPTH_MAX, EXPONENT_FLOOR, HALVINGS_MAX, P_BITS, P_MAX
from nearkv_hw.products import (
    BLOCK_QUEUE,
    SLOTS,
    Place,
    Products,
    base_latency,
    latency,
    scanned_layout,
)
from nearkv_hw.softmax import P_BANKS, Exp2, Halvings

TILE = abi.TILE_TOKENS

# --- the model ------------------------------------------------------------------------------------


def by_definition(mantissa, halvings, field):
    """(weight, exponent, base) of one block, token by token."""
    rows, tokens = mantissa.shape
    weight, base = np.zeros((rows, tokens), int), []
    exponent = [
        max(
            (int(field[t] - halvings[r, t]) for t in range(tokens) if mantissa[r, t] and field[t]),
            default=EXPONENT_FLOOR,
        )
        for r in range(rows)
    ]
    for t in range(tokens):
        below = [
            min(exponent[r] - int(field[t] - halvings[r, t]), DEPTH_MAX)
            if mantissa[r, t] and field[t] else DEPTH_MAX
            for r in range(rows)
        ]  # fmt: skip
        base.append(min(below) + int(field[t]))
        for r in range(rows):
            if mantissa[r, t] and field[t]:
                exact = Fraction(int(mantissa[r, t]), 2 ** (below[r] - min(below)))
                weight[r, t] = int(exact + Fraction(1, 2))
    return weight, exponent, base


def random_tile(rng, rows, tokens, kind):
    """mantissa, halvings int (rows, tokens) of a tile."""
    mantissa = rng.integers(1 << P_BITS - 1, P_MAX + 1, (rows, tokens))
    mantissa[rng.random((rows, tokens)) < 0.1] = P_MAX
    if kind == "near":
        halvings = rng.integers(0, 4, (rows, tokens))
    elif kind == "sinks":  # of each row another token, or none
        halvings = rng.integers(18, 40, (rows, tokens))
        halvings[np.arange(rows), rng.integers(0, max(tokens, 1), rows) % max(tokens, 1)] = 0
    else:
        halvings = rng.integers(0, HALVINGS_MAX + 1, (rows, tokens))
    none = rng.random((rows, tokens)) < (0.3 if kind == "far" else 0.02)
    if kind == "far":
        none[rng.integers(rows)] = True
    return np.where(none, 0, mantissa), np.where(none, HALVINGS_MAX, halvings)


KINDS = ("near", "sinks", "far")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [30, 255])
def test_model_equals_the_definition(rng, kind, most):
    for tokens in (1, 7, 40):
        mantissa, halvings = random_tile(rng, 3, tokens, kind)
        field = rng.integers(1, most, tokens) * (rng.random(tokens) < 0.9)
        got = products.model(mantissa, halvings, field)
        for value, want in zip(got, by_definition(mantissa, halvings, field), strict=True):
            np.testing.assert_array_equal(value, want)


def test_a_row_keeps_its_bits_whatever_its_neighbour_sees():
    """One row attends evenly, the other to one token 30 binades above the rest, whose V is nothing."""
    mantissa = np.full((2, 5), 1 << P_BITS - 1)
    halvings = np.array([[0] * 5, [0, 30, 30, 30, 30]])
    field = np.array([0, 15, 15, 15, 15])  # V of the first token is 0
    weight, exponent, base = products.model(mantissa, halvings, field)
    assert exponent.tolist() == [15, -15]
    assert weight.tolist() == [[0, *[1 << P_BITS - 1] * 4]] * 2
    assert base.tolist()[1:] == [15] * 4


def test_no_token_has_no_product():
    weight, exponent, base = products.model(
        *(np.zeros((2, 0), int) for _ in range(2)), np.zeros(0, int)
    )
    assert exponent.tolist() == [EXPONENT_FLOOR] * 2
    assert weight.size == base.size == 0


# --- gateware -------------------------------------------------------------------------------------


class Stream:
    """Blocks of tiles in a random order that the fetch could give: K passes, V passes behind them.

    Attributes
    ----------
    blocks : list of dict
        Fields of `Block`.
    fields : list of int
        Of all V rows.
    tiles : list of (mantissa, halvings), each (rows, tokens)
    want : list of (exponents, weight, base, bank, field) of each V block, None of a K block
    """

    def __init__(self, rng, rows, sizes):
        self.rows, self.blocks, self.fields, self.tiles, self.want = rows, [], [], [], []
        for n, (tokens, parts, group) in enumerate(sizes):
            kind = KINDS[n % len(KINDS)]
            kv_type = KvType(n % 2)
            mantissa, halvings = random_tile(rng, rows, tokens, kind)
            params = {"kv_type": int(kv_type), "pairs": (group + 1) // 2, "odd": group % 2}
            self.tiles.append((mantissa, halvings))
            # What is in rows that do not belong to the group, of whatever job it was, must not count.
            mantissa, halvings = mantissa.copy(), halvings.copy()
            mantissa[group:], halvings[group:] = 0, HALVINGS_MAX
            common = {"params": params, "tokens": tokens}
            for _ in range(int(rng.integers(1, 5))):
                self.blocks.append({**common, "is_v": 0, "rows": 32, "lanes": 32,
                                    "exponent": int(rng.integers(-500, 500))})  # fmt: skip
                self.want.append(None)
            for b in range(parts):
                field = rng.integers(1, 256 if kv_type else 32, tokens)
                field[rng.random(tokens) < 0.1] = 0
                self.blocks.append({**common, "is_v": 1, "rows": max(tokens, 1), "lanes": 32,
                                    "pass_first": int(b == 0), "pass_last": int(b == parts - 1)})  # fmt: skip
                self.fields += field.tolist() if tokens else [0]
                weight, exponent, base = products.model(mantissa, halvings, field)
                self.want.append((exponent[:group], weight[:group], base, n % P_BANKS, field))


def simulate(bench, stream, pauses=None, ready_after=0):
    """Runs all blocks through; an agent reads as the p store does, another issues as the aligner does.

    `ready_after`: cycles between the weights of one tile and those of the next.
    """
    pause = pauses or (lambda side: iter(lambda: False, None))
    rows = stream.rows
    dut = Products(rows, 512)
    run = bench(dut)
    run.source(dut.i_block, [bench.bits(Block, block) for block in stream.blocks], pause(0))
    run.source(dut.i_field, stream.fields)
    kept = {}  # (bank, token, row) -> (mantissa, Halvings)
    written, freed, issued = [], [], []

    def softmax():
        """Banks are written one after the other, and again when they were freed, which takes time."""
        for n, (mantissa, halvings) in enumerate(stream.tiles):
            while n - len(freed) >= P_BANKS or (
                n >= P_BANKS and run.cycle < freed[n - P_BANKS] + Exp2.latency
            ):
                yield [(dut.p_ready, 0)]
            for _ in range(ready_after):
                yield [(dut.p_ready, 0)]
            for r, t in np.ndindex(mantissa.shape):
                word = {"halvings": int(halvings[r, t]), "none": int(mantissa[r, t] == 0)}
                kept[n % P_BANKS, t, r] = int(mantissa[r, t]), bench.bits(Halvings, word)
            written.append(run.cycle)
            yield [(dut.p_ready, 1)]
        while True:
            yield [(dut.p_ready, 0)]

    def store(address, ports, which):
        ports = [Value.cast(ports[r]) for r in range(rows)]

        def agent():
            sets = []
            while True:
                (at,) = yield sets
                bank, token = divmod(at, TILE)
                sets = [
                    (port, kept.get((bank, token, r), (0, 0))[which])
                    for r, port in enumerate(ports)
                ]

        run.script([address], agent())

    store(dut.scan_address, dut.scan, 1)
    store(dut.issue_address, dut.issue, 1)
    store(dut.mantissa_address, dut.mantissas, 0)
    rest = pause(1)
    layout = scanned_layout(rows)

    def aligner():
        ready = dut.o_block.ready
        idle = [(ready, 0), (dut.done, 0)]
        n = 0
        while True:
            valid, value = yield idle
            if not valid or next(rest):
                continue
            block = bench.fields(layout, value)
            v, count = block.block.is_v, block.block.rows
            assert n not in issued
            for row in range(count):
                end = int(row == count - 1)
                place = bench.bits(Place, {"row": row if v else 0, "bank": block.place.bank,
                                           "slot": block.place.slot})  # fmt: skip
                sets = [(ready, end), (dut.done, end & v), (dut.place.as_value(), place)]
                sets += [(dut.params.as_value(), block.block.params.as_bits())]
                sets += [(dut.exponents[r], block.exponents[r]) for r in range(rows)]
                yield sets
                issued.append((n, row, run.cycle))
            if v and block.block.pass_last:
                freed.append(run.cycle)
            n += 1

    run.script([], softmax())
    run.script([dut.o_block.valid, dut.o_block.p.as_value()], aligner())
    scanned = run.tap(dut.o_block.valid & dut.o_block.ready, dut.o_block.p.as_value())
    out = run.tap(1, dut.base, *dut.weights)
    n_rows = sum(block["rows"] for block in stream.blocks)
    run.run(lambda: len(issued) == n_rows, extra=latency(rows) + 4, limit=200 * len(stream.blocks))
    assert len(issued) == n_rows

    values = [bench.fields(layout, value) for (value,) in scanned.items]
    assert len(values) == len(stream.blocks)
    for value, block, want in zip(values, stream.blocks, stream.want, strict=True):
        fields = {name: value.block[name] for name in block if name not in ("params", "exponent")}
        assert fields == {name: block[name] for name in fields}
        if want is None:
            assert value.block.exponent == block["exponent"]
        else:
            got = [value.exponents[r] for r in range(len(want[0]))]
            assert got == want[0].tolist()
            assert value.place.bank == want[3]
    for n, row, cycle in issued:
        want = stream.want[n]
        if want is None or not want[2].size:
            continue
        group = len(want[0])
        base = out.items[cycle + base_latency(rows)][0]
        weights = out.items[cycle + latency(rows)][1:]
        assert base == want[2][row]
        if want[4][row]:  # else x is 0, and the weights are anything
            assert list(weights[:group]) == want[1][:, row].tolist()
    return written, issued


SIZES = (
    (5, 2, 4),
    (1, 1, 1),
    (0, 2, 3),
    (128, 1, 4),
    (33, 3, 2),
    (2, 8, 3),
    (64, 2, 4),
    (1, 1, 2),
    (7, 2, 1),
)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_products_equal_their_model(bench, pauses, rng, rows):
    sizes = [(tokens, parts, min(group, rows)) for tokens, parts, group in SIZES]
    simulate(bench, Stream(rng, rows, sizes), pauses)


def test_rows_beyond_the_group_do_not_count(bench, rng):
    """Not the padding of an odd group, and not what an earlier job left in the p store."""
    simulate(bench, Stream(rng, 6, [(20, 2, group) for group in (6, 1, 3, 2, 5, 4)]))


def test_scans_wait_for_weights_and_for_slots(bench, rng):
    stream = Stream(rng, 2, [(9, 6, 2), (3, 2, 2), (9, 1, 2)])
    written, issued = simulate(bench, stream, ready_after=90)
    firsts = [n for n, block in enumerate(stream.blocks) if block["is_v"] and block["pass_first"]]
    for tile, n in enumerate(firsts):
        assert min(cycle for block, _, cycle in issued if block == n) > written[tile]
    # While the aligner takes nothing, no more than so many V blocks are scanned.
    slow = iter([True] * 300 + [False] * 10000)
    never = iter(lambda: False, None)
    simulate(bench, Stream(rng, 2, [(9, SLOTS + 3, 2)]), lambda side: slow if side else never)


def test_no_block_is_lost_while_the_aligner_rests(bench, rng):
    stream = Stream(rng, 2, [(3, 1, 2)])
    k = stream.blocks[0]
    stream.blocks[:0] = [{**k, "exponent": n} for n in range(2 * BLOCK_QUEUE)]
    stream.want[:0] = [None] * (2 * BLOCK_QUEUE)
    slow = iter([True] * 100 + [False] * 10000)
    never = iter(lambda: False, None)
    simulate(bench, stream, lambda side: slow if side else never)
