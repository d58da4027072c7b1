# SPDX-License-Identifier: Apache-2.0
"""The sums of a job are `number.Wide`, bit for bit, and a partial is written as the ABI says."""

import numpy as np
import pytest

from nearkv_hw import abi
from nearkv_hw.abi import Status
from nearkv_hw.axi import Span
from nearkv_hw.jobs import Faults, JobInfo
from nearkv_hw.merge import (
    Accumulate,
    Limbs,
    Merge,
    PartialWriter,
    WideNumber,
    job_end_layout,
    v_layout,
)
from nearkv_hw.number import (
    EXPONENT_FLOOR,
    LIMB_BITS,
    RUN_MAX_EMPTY,
    SUM_SHIFT,
    TILE_SUM_BITS,
    WINDOW_TOP,
    Wide,
)
from nearkv_hw.softmax import tile_sum_layout

O_MAX = (1 << WINDOW_TOP) - 1


def random_o(rng, shape):
    """Sums of any size and sign, the largest among them."""
    o = rng.integers(-O_MAX, O_MAX + 1, shape) >> rng.integers(0, WINDOW_TOP + 1, shape)
    o = np.where(rng.random(shape) < 0.05, O_MAX, o)
    return np.where(rng.random(shape) < 0.05, -O_MAX, o)


# --- one addition ---------------------------------------------------------------------------------


def test_accumulate_equals_wide_every_cycle_after_its_latency(bench, rng):
    n = 1500
    o, exponent = random_o(rng, n), rng.integers(-33792, 33793, n)
    own = Wide.of(o, exponent)
    fresh = rng.random(n) < 0.1
    # Old sums a few limbs above or below, or anywhere.
    near = own.top + rng.integers(-6, 7, n)
    old_top = np.where(rng.random(n) < 0.8, near, rng.integers(-2112, 2117, n))
    half = 1 << (LIMB_BITS - 2)
    old = Wide(rng.integers(-half, half, (n, 4)), old_top)
    total = old + own
    want = np.where(fresh[:, None], np.c_[own.limbs, own.top], np.c_[total.limbs, total.top])

    dut = Accumulate()
    run = bench(dut)

    def feed():
        for i in range(n + Accumulate.latency):
            now, before, earlier = min(i, n - 1), min(max(i - 1, 0), n - 1), max(i - 2, 0)
            limbs = bench.bits(Limbs, [int(x) for x in old.limbs[min(earlier, n - 1)]])
            yield [
                (dut.o, int(o[now])),
                (dut.exponent, int(exponent[now])),
                (dut.fresh, int(fresh[now])),
                (dut.old_top, int(old.top[before])),
                (dut.old.as_value(), limbs),
            ]

    run.script([], feed())
    out = run.tap(1, *dut.limbs, dut.top)
    run.run(lambda: len(out) == n + Accumulate.latency - 1)
    got = np.array(out.items[Accumulate.latency :])
    np.testing.assert_array_equal(got, want[: len(got)])
    assert len(got) == n - 1


# --- jobs of tiles --------------------------------------------------------------------------------


class Jobs:
    """Random jobs: what the merge gets of each tile, and the sums and maxima it must end with.

    Parameters
    ----------
    shapes : list of (pairs, parts, list of (tile_max, exponent) or number of random tiles)
    """

    def __init__(self, rng, rows, shapes):
        self.rows, self.tiles, self.v = rows, [], []
        self.sums, self.ends = [], []
        for pairs, parts, tiles in shapes:
            if isinstance(tiles, int):
                tiles = [
                    (int(rng.integers(-200, 200)), int(rng.integers(-20, 40))) for _ in range(tiles)
                ]
            used, total, run_max, saturated = 2 * pairs, None, RUN_MAX_EMPTY, False
            for n, (tile_max, exponent) in enumerate(tiles):
                # Each row and each block a little different.
                maxima = np.clip(tile_max + rng.integers(-40, 41, rows), -32768, 32767)
                exponents = exponent + rng.integers(-30, 31, (parts, rows))
                exponents = np.clip(exponents, EXPONENT_FLOOR, 800)
                tile_sum = rng.integers(0, 1 << TILE_SUM_BITS, rows)
                tile_wide = rng.integers(0, 1 << TILE_SUM_BITS, rows)
                if tile_max == RUN_MAX_EMPTY:  # a tile without tokens
                    maxima[:], exponents[:], tile_sum[:], tile_wide[:] = (
                        RUN_MAX_EMPTY, EXPONENT_FLOOR, 0, 0)  # fmt: skip
                o = random_o(rng, (32 * parts, rows))
                if tile_max == RUN_MAX_EMPTY:
                    o[:] = 0
                flag = bool(rng.random() < 0.2)
                head = {
                    "params": {"pairs": pairs, "parts": parts},
                    "job_first": int(n == 0), "job_last": int(n == len(tiles) - 1),
                }  # fmt: skip
                self.tiles.append(
                    {
                        "head": head, "saturated": int(flag), "tile_max": maxima.tolist(),
                        "tile_sum": tile_sum.tolist(), "tile_wide": tile_wide.tolist(),
                    }
                )  # fmt: skip
                self.v += [
                    {"sums": [int(x) for x in o[c]], "exponents": exponents[c // 32].tolist()}
                    for c in range(32 * parts)
                ]
                mantissa = np.concatenate([[tile_sum << SUM_SHIFT, tile_wide << SUM_SHIFT], o])[
                    :, :used
                ]
                place = np.concatenate(
                    [np.tile(maxima, (2, 1)), maxima + np.repeat(exponents, 32, axis=0)]
                )[:, :used]
                part = Wide.of(mantissa, place)
                total = part if total is None else total + part
                run_max = np.maximum(run_max, maxima)
                saturated |= flag
            self.sums.append(np.c_[total.limbs.reshape(-1, 4), total.top.reshape(-1)])
            self.ends.append(
                (*(int(m) if r < used else RUN_MAX_EMPTY for r, m in enumerate(run_max)), saturated)
            )

    def simulate(self, bench, max_head_dim, *pauses):
        dut = Merge(self.rows, max_head_dim)
        run = bench(dut)
        tile, v, out, ends = (*pauses, None, None, None, None)[:4]
        run.source(
            dut.i_tile, [bench.bits(tile_sum_layout(self.rows), t) for t in self.tiles], tile
        )
        run.source(dut.i_v, [bench.bits(v_layout(self.rows), c) for c in self.v], v)
        out, ends = run.sink(dut.o, out), run.sink(dut.o_end, ends)
        n_out = sum(len(sums) for sums in self.sums) // 2
        run.run(lambda: len(out) == n_out and len(ends) == len(self.ends), extra=20)
        assert (len(out), len(ends)) == (n_out, len(self.ends))
        half = WideNumber.as_shape().size
        numbers = [
            bench.fields(WideNumber, value >> half * i & (1 << half) - 1)
            for value in out.items
            for i in range(2)
        ]
        got = np.array([[*(n.limbs[j] for j in range(4)), n.top] for n in numbers])
        np.testing.assert_array_equal(got, np.concatenate(self.sums))
        for value, want in zip(ends.items, self.ends, strict=True):
            end = bench.fields(job_end_layout(self.rows), value)
            assert (*(end.run_max[r] for r in range(self.rows)), bool(end.saturated)) == want
        return out, ends


def test_merge_equals_wide_sums_over_tiles_and_jobs(bench, pauses, rng):
    shapes = [(2, 2, 3), (1, 1, 1), (1, 2, 2), (2, 1, 4)]
    Jobs(rng, 4, shapes).simulate(bench, 64, *(pauses(side) for side in (1, 0, 3, 2)))


@pytest.mark.parametrize("rows", [2, 6, 8])
def test_merge_serves_every_number_of_pairs(bench, rng, rows):
    shapes = [(pairs, 1, 2) for pairs in range(1, rows // 2 + 1)]
    Jobs(rng, rows, [*shapes, *reversed(shapes[:-1])]).simulate(bench, 32)


EMPTY = (RUN_MAX_EMPTY, EXPONENT_FLOOR)


JUMPS = (
    [(0, 0), (100, 0), (32767, 0), (-32000, 0), (0, 0)],
    [(0, -500), (0, 500), (0, -1000), (10, 700)],
    [(k * 17, 0) for k in range(8)],  # ever higher, by a limb and a bit
    [(-k * 17, 0) for k in range(8)],  # ever lower
    [EMPTY],
    [EMPTY, (-3000, 10), EMPTY, EMPTY, (-3020, 12), EMPTY],
    [(-32768, 10), (-32768, 10), (-32700, 10)],
)


def test_merge_follows_tops_that_jump_by_any_number_of_limbs(bench, rng):
    shapes = [(1, 1, tiles[::way]) for tiles in JUMPS for way in (1, -1)]
    Jobs(rng, 2, shapes).simulate(bench, 32)


def test_merge_takes_one_pair_a_cycle_without_a_gap_between_tiles(bench, rng):
    jobs = Jobs(rng, 4, [(2, 2, 1)] * 5)
    out, _ = jobs.simulate(bench, 64)
    assert np.diff(out.cycles).tolist() == [1] * (5 * 66 * 2 - 1)


def test_merge_stops_with_its_output_and_loses_nothing(bench, rng):
    jobs = Jobs(rng, 2, [(1, 1, 2), (1, 1, 1), (1, 1, 1)])
    stalled = (cycle < 400 for cycle in range(100000))
    out, _ = jobs.simulate(bench, 32, None, None, stalled)
    assert out.cycles[0] >= 400


def test_merge_waits_for_ends_that_nobody_takes(bench, rng):
    jobs = Jobs(rng, 2, [(1, 1, 1)] * 7)
    stalled = (cycle < 700 for cycle in range(100000))
    out, ends = jobs.simulate(bench, 32, None, None, None, stalled)
    assert ends.cycles[0] >= 700
    assert len([cycle for cycle in out.cycles if cycle < 690]) < 7 * 34


# --- the writer -----------------------------------------------------------------------------------

HASH = 0x1234ABCD
ARGS = {"kv": 0x11_0000_0000, "job": 0x77_FFFF_F000, "queue": 0, "n_jobs": 9, "summary": 0x5_0040}
COUNTERS = {name: 0x1_0000_0007 * (n + 1) for n, name in enumerate(PartialWriter.COUNTERS)}

ANSWER_CYCLES = 20


def job(tag, *, pairs=1, parts=1, legal=True, tokens=5, saturated=False, **faults):
    """One job for the writer. Faults: job_faults, k, v: dicts of fields of `Faults`."""
    return {
        "tag": tag, "pairs": pairs, "parts": parts, "legal": legal, "tokens": tokens,
        "saturated": saturated, "faults": {name: faults.get(name, {}) for name in ("j", "k", "v")},
    }  # fmt: skip


def at_page(page, **flags):
    return {**flags, "page": page, "page_known": 1}


def header_of(spec, rows, run_max):
    """The header that the ABI asks for."""
    status, faults = Status.DONE, spec["faults"]
    if not spec["legal"]:
        status |= Status.ILLEGAL_JOB
    for flag, where in (
        (Status.ILLEGAL_JOB, faults["j"].get("illegal")),
        (Status.BAD_CRC_K, faults["k"].get("bad_crc")),
        (Status.BAD_CRC_V, faults["v"].get("bad_crc")),
        (Status.BUS_ERROR, any(f.get("bus_error") for f in faults.values())),
        (Status.NON_FINITE, any(f.get("non_finite") for f in faults.values())),
        (Status.SATURATED, spec["legal"] and spec["saturated"]),
    ):
        if where:
            status |= flag
    pages = [f["page"] for f in faults.values() if f.get("page_known")]
    maxima = [*run_max, *[RUN_MAX_EMPTY] * (16 - rows)] if spec["legal"] else [RUN_MAX_EMPTY] * 16
    return status, abi.PARTIAL_HEADER.pack(
        status=status, bad_page=min(pages, default=abi.NO_PAGE), tag=spec["tag"],
        n_tokens=spec["tokens"], run_max=maxima,
    )  # fmt: skip


def write_partials(bench, rng, rows, specs, pauses, *, queue_error=0, bus_error=0):
    """Runs the writer over jobs; returns the bytes it wrote by address, and the summary's."""
    dut = PartialWriter(rows, HASH)
    run = bench(dut)
    infos, faults_k, faults_v, ends, numbers = [], [], [], [], []
    want, failed, beats = {}, 0, 0
    order = []  # addresses in the order of writing
    for n, spec in enumerate(specs):
        address = ARGS["job"] + 0x2040 * n
        run_max = [int(m) for m in rng.integers(-32768, 32768, rows)]
        infos.append(
            bench.bits(
                JobInfo,
                {
                    "address": address, "tag": spec["tag"], "pairs": spec["pairs"],
                    "parts": spec["parts"], "tokens": spec["tokens"], "legal": int(spec["legal"]),
                    "faults": {**spec["faults"]["j"], **({} if spec["legal"] else {"illegal": 1})},
                },
            )
        )  # fmt: skip
        status, header = header_of(spec, rows, run_max)
        failed += status != Status.DONE
        beats += 1
        if spec["legal"]:
            faults_k.append(bench.bits(Faults, spec["faults"]["k"]))
            faults_v.append(bench.bits(Faults, spec["faults"]["v"]))
            end = {"run_max": run_max, "saturated": int(spec["saturated"])}
            ends.append(bench.bits(job_end_layout(rows), end))
            count = (2 + 32 * spec["parts"]) * 2 * spec["pairs"]
            half = 1 << (LIMB_BITS - 1)
            wide = Wide(rng.integers(-half, half, (count, 4)), rng.integers(-2112, 2117, count))
            data = wide.pack().tobytes()
            numbers += [int.from_bytes(data[i : i + 32], "little") for i in range(0, len(data), 32)]
            for i in range(0, len(data), 64):
                want[address + 64 + i] = data[i : i + 64]
                order.append(address + 64 + i)
            beats += len(data) // 64
            assert len(data) + 64 == abi.partial_bytes(32 * spec["parts"], 2 * spec["pairs"])
        want[address] = header
        order.append(address)
    summary = abi.SUMMARY.pack(
        abi_version=abi.ABI_VERSION, config_hash=HASH, n_jobs=len(specs), n_failed=failed,
        partial_beats=beats, error=Status.BUS_ERROR if queue_error or bus_error else 0, **COUNTERS,
    )  # fmt: skip
    at = ARGS["job"] + ARGS["summary"]
    for i in range(0, len(summary), 64):
        want[at + i] = summary[i : i + 64]
        order.append(at + i)

    for stream, items, side in (
        (dut.i_job, infos, 0), (dut.i_faults_k, faults_k, 1), (dut.i_faults_v, faults_v, 2),
        (dut.i_end, ends, 4), (dut.i, numbers, 3),
    ):  # fmt: skip
        run.source(stream, items, pauses(side))
    spans, data = run.sink(dut.spans, pauses(5)), run.sink(dut.o, pauses(6))
    done = run.tap(dut.done)

    def around():
        # The control side: start, then `finished` once all jobs are given; and a write master
        # that is idle some time after the last beat that came.
        sets = [
            (dut.start, 0), (dut.args.as_value(), bench.bits(dut.args.shape(), ARGS)),
            (dut.counters.as_value(), bench.bits(dut.counters.shape(), COUNTERS)),
            (dut.n_jobs, 0), (dut.finished, 0), (dut.queue_error, queue_error),
            (dut.error, bus_error),
        ]  # fmt: skip
        for cycle in range(1 << 20):
            if cycle == 3:
                sets += [(dut.start, 1)]
            if cycle == 4:
                sets += [(dut.start, 0)]
            if cycle == 40:
                sets += [(dut.finished, 1), (dut.n_jobs, len(specs))]
            asked = sum(bench.fields(Span, span).beats for span in spans.items)
            idle = asked == len(data) and run.cycle > max(data.cycles, default=0) + ANSWER_CYCLES
            yield [*sets, (dut.idle, int(idle))]
            sets = []

    run.script([], around())
    run.run(lambda: len(done) == 1, extra=30)
    assert len(done) == 1
    written, addresses = {}, []
    beats = iter(data.items)
    for value in spans.items:
        span = bench.fields(Span, value)
        assert span.beats >= 1
        for i in range(span.beats):
            addresses.append(span.address + 64 * i)
            assert addresses[-1] not in written
            written[addresses[-1]] = next(beats).to_bytes(64, "little")
    assert next(beats, None) is None
    assert written == want
    # Elements before their header, and the summary last: who sees a status sees all.
    assert addresses == order
    # The summary waits for all that was written before it, `done` for the summary itself.
    for cycle, beats in ((spans.cycles[-1], data.cycles[:-2]), (done.cycles[0], data.cycles)):
        assert cycle > max(beats, default=0) + ANSWER_CYCLES
    return written


def test_writer_writes_elements_then_header_then_the_summary(bench, pauses, rng):
    specs = [job(7, pairs=2, parts=2, tokens=300), job(0xFFFFFFFF, tokens=0), job(9, pairs=2)]
    write_partials(bench, rng, 4, specs, pauses)


FAULTS = {
    "nothing": {},
    "illegal": {"legal": False, "tokens": 0},
    "bad K": {"k": at_page(3, bad_crc=1)},
    "bad V": {"v": at_page(2047, bad_crc=1)},
    "both, V first": {"k": at_page(9, bad_crc=1), "v": at_page(4, bad_crc=1)},
    "both, K first": {"k": at_page(4, bad_crc=1), "v": at_page(9, bad_crc=1)},
    "page 0": {"j": at_page(5, illegal=1), "v": at_page(0, non_finite=1)},
    "bad page entry": {"j": at_page(1, illegal=1), "k": at_page(2, bad_crc=1)},
    "bus error in a page entry": {"j": at_page(6, bus_error=1)},
    "bus error in the query": {"j": {"bus_error": 1}},
    "bus error in K": {"k": at_page(6, bus_error=1)},
    "bus error in V": {"v": at_page(7, bus_error=1)},
    "not finite K": {"k": at_page(1, non_finite=1)},
    "not finite V": {"v": at_page(1, non_finite=1)},
    "saturated": {"saturated": True},
    "everything": {
        "saturated": True, "j": at_page(8, illegal=1, bus_error=1),
        "k": at_page(7, bad_crc=1, non_finite=1), "v": at_page(6, bad_crc=1, bus_error=1),
    },
}  # fmt: skip


def test_writer_reports_each_fault_with_the_first_page_to_blame(bench, pauses, rng):
    # In an order in which neighbours differ: nothing of a fault may be left over for the next.
    specs = [job(n, **fault) for n, fault in enumerate(FAULTS.values())] + [job(99)]
    write_partials(bench, rng, 2, specs, pauses)


def test_writer_ignores_what_follows_an_illegal_job_until_a_legal_one(bench, pauses, rng):
    """An illegal job takes nothing from the other streams, even if all of them wait."""
    specs = [job(n, legal=n % 3 == 2, tokens=5 * (n % 3 == 2)) for n in range(9)]
    specs[2] = job(2, saturated=True, k=at_page(0, bad_crc=1), v=at_page(0, bad_crc=1))
    write_partials(bench, rng, 2, specs, pauses)


@pytest.mark.parametrize("errors", [{"queue_error": 1}, {"bus_error": 1}])
def test_summary_tells_of_errors_that_belong_to_no_job(bench, rng, errors):
    write_partials(bench, rng, 2, [job(1)], lambda side: None, **errors)


def test_a_queue_without_jobs_gets_a_summary(bench, pauses, rng):
    write_partials(bench, rng, 2, [], pauses)
