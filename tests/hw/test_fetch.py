# SPDX-License-Identifier: Apache-2.0
"""Pages stream in the right order, with their blocks' exponents, and their faults are found."""

from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import pytest

from nearkv_hw import align
from nearkv_hw.abi import KvType, PageLayout
from nearkv_hw.fetch import Block, Crc, KvFetch
from nearkv_hw.jobs import Q_BANKS, Faults, Tile
from nearkv_hw.number import EXPONENT_FLOOR, KV_FORMATS
from nearkv_hw.shapes import LANES

# --- CRC ------------------------------------------------------------------------------------------


def test_crc_model_is_crc_32c(rng):
    assert Crc.model(b"") == 0
    for n in (1, 2, 7):
        data = rng.bytes(64 * n)
        assert Crc.model(data) == google_crc32c.value(data)
        # Continued, as over the tiles of a page.
        assert Crc.model(data[64:], Crc.model(data[:64])) == google_crc32c.value(data)
    assert Crc.model(bytes(64)) == google_crc32c.value(bytes(64))
    assert Crc.model(b"\xff" * 64) == google_crc32c.value(b"\xff" * 64)


def test_crc_follows_two_interleaved_series_with_gaps(bench, pauses, rng):
    dut = Crc()
    run = bench(dut)
    n = 120
    data = [rng.bytes(64) for _ in range(n)]
    series, first = rng.integers(0, 2, n), rng.random(n) < 0.15
    first[0] = first[int(np.flatnonzero(series != series[0])[0])] = True
    garbage, pause = run.garbage(512), pauses(1)

    def feed():
        for i in range(n):
            while next(pause):
                yield [(dut.valid, 0), (dut.data, next(garbage)), (dut.series, next(garbage) & 1),
                       (dut.first, next(garbage) & 1)]  # fmt: skip
            yield [(dut.valid, 1), (dut.data, int.from_bytes(data[i], "little")),
                   (dut.series, int(series[i])), (dut.first, int(first[i]))]  # fmt: skip
        while True:
            yield [(dut.valid, 0)]

    run.script([], feed())
    valid = run.tap(dut.valid)
    crc = run.tap(1, dut.crc)
    run.run(lambda: len(valid) == n, extra=Crc.latency)
    state = {}
    for i, cycle in enumerate(valid.cycles):
        which = series[i]
        state[which] = google_crc32c.extend(0 if first[i] else state[which], data[i])
        assert crc.items[cycle + Crc.latency] == (state[which],)


# --- pages ----------------------------------------------------------------------------------------

Q_CHANNELS = 256
KV_BASE = 0x2_0000_0000


@dataclass
class Page:
    """A page: its bytes, valid tokens, CRCs as its table entry has them, and bus errors.

    `responses`: byte offset of a beat -> what the bus answers with it.
    """

    data: np.ndarray
    page_len: int
    crcs: list
    responses: dict = field(default_factory=dict)


@dataclass
class Job:
    layout: PageLayout
    pages: list
    q_bank: int = 0

    @property
    def parts(self):
        return self.layout.head_dim // 32


def infinity(kv_type):
    form = KV_FORMATS[kv_type]
    return form.exponent_max << form.mantissa_bits


def make_page(rng, layout, page_len):
    """Finite numbers of all sizes among the tokens; beyond them Inf and NaN."""
    form = KV_FORMATS[layout.kv_type]
    words = layout.page_bytes // 2

    def finite(n):
        x = rng.integers(0, 1 << 16, n)
        spoiled = (x & infinity(layout.kv_type)) == infinity(layout.kv_type)
        return np.where(spoiled, x & ~(1 << form.mantissa_bits), x)

    k = finite(words // 2).reshape(-1, layout.head_dim, LANES)
    v = finite(words // 2).reshape(-1, layout.page_tokens, LANES)
    k[::2] &= 0x8FFF  # blocks of small numbers
    k[1::2, rng.random(layout.head_dim) < 0.3] &= 0x8000  # channels of zeros
    k[:, 9] &= 0x8000  # where q's exponent is largest: zeros of K count
    v[:, rng.random(layout.page_tokens) < 0.3] &= 0x8000  # tokens of zeros: those of V do not
    tokens = np.arange(len(k) * LANES).reshape(len(k), 1, LANES)
    k = np.where(tokens < page_len, k, infinity(layout.kv_type) + rng.integers(0, 9, k.shape))
    v[:, page_len:] = 0xFFFF
    data = np.concatenate([k.reshape(-1), v.reshape(-1)]).astype("<u2").view(np.uint8)
    page = Page(data, page_len, [0, 0])
    sum_up(layout, page)
    return page


def sum_up(layout, page):
    """The CRCs that the page's bytes have now. Those of a page without tokens mean nothing."""
    if page.page_len == 0:
        page.crcs = [0xDEADBEEF, 0x12345678]
        return
    for part, spans in enumerate((layout.k_spans(page.page_len), layout.v_spans(page.page_len))):
        page.crcs[part] = 0
        for at, size in spans:
            page.crcs[part] = google_crc32c.extend(
                page.crcs[part], page.data[at : at + size].tobytes()
            )


def make_jobs(rng, shapes):
    """Jobs of (head_dim, page_tokens, page_lens), types and banks in turn."""
    jobs = []
    for n, (head_dim, page_tokens, lens) in enumerate(shapes):
        layout = PageLayout(head_dim, page_tokens, KvType(n % 2))
        jobs.append(
            Job(layout, [make_page(rng, layout, page_len) for page_len in lens], n % Q_BANKS)
        )
    return jobs


class Fetch:
    """Jobs through `KvFetch`: what goes in, what must come out, and one simulation."""

    def __init__(self, rng, jobs, lookahead=2):
        self.jobs, self.lookahead = jobs, lookahead
        self.memory, self.tiles, self.responses = bytearray(), [], {}
        self.q_exponents = rng.integers(-40, 40, (Q_BANKS, Q_CHANNELS))
        self.q_exponents[:, 5], self.q_exponents[1, 9] = -512, 511
        # (tile, is_v) -> list of (Block fields, beats, exponent of K, fields of V rows)
        self.passes = {}
        for job in jobs:
            tiles_of_job = [
                (n, page, at, first, tokens)
                for n, (page, at) in enumerate([(p, self._place(p)) for p in job.pages])
                for first, tokens in job.layout.tiles(page.page_len)
            ]
            for i, (n, page, at, first, tokens) in enumerate(tiles_of_job):
                layout = job.layout
                ends = {
                    "job_first": int(i == 0), "job_last": int(i == len(tiles_of_job) - 1),
                    "q_bank": job.q_bank,
                }  # fmt: skip
                params = {"kv_type": int(layout.kv_type), "parts": job.parts, "pairs": 1}
                k_at, v_at = first // 32 * layout.head_dim * 64, layout.part_bytes + first * 64
                self._blocks(job, page, len(self.tiles), k_at, v_at, tokens,
                             {**ends, "params": params, "tokens": tokens})  # fmt: skip
                self.tiles.append(
                    {
                        "params": params, "k_address": at + k_at, "v_address": at + v_at,
                        "v_stride": layout.page_tokens, "tokens": tokens, "page": n,
                        "page_first": int(first == 0),
                        "page_last": int(first + tokens == page.page_len),
                        "check": int(page.page_len > 0), "crc_k": page.crcs[0],
                        "crc_v": page.crcs[1], **ends,
                    }
                )  # fmt: skip

    def _place(self, page):
        at = len(self.memory)
        self.memory += page.data.tobytes()
        self.responses |= {at + offset: value for offset, value in page.responses.items()}
        return KV_BASE + at

    def _blocks(self, job, page, tile, k_at, v_at, tokens, common):
        """The blocks of both passes of a tile, by `align.model` and the page layout."""
        layout, words = job.layout, page.data.view("<u2")
        head_dim, kv_type = layout.head_dim, layout.kv_type
        n_blocks = max(1, -(-tokens // 32))
        for is_v in (0, 1):
            blocks = []
            for b in range(job.parts if is_v else n_blocks):
                at = v_at + b * layout.page_tokens * 64 if is_v else k_at + b * head_dim * 64
                rows = max(1, tokens) if is_v else head_dim
                lanes = LANES * (tokens > 0) if is_v else min(LANES, tokens - 32 * b)
                elements = words[at // 2 : at // 2 + rows * LANES].reshape(rows, LANES)
                there = np.arange(LANES) < lanes
                if is_v:  # zeros have no product
                    there = there & (elements & 0x7FFF != 0)
                row_fields, _ = align.fields(elements, kv_type, there)
                channels = self.q_exponents[job.q_bank, :rows]
                exponent = None if is_v else align.block_exponent(row_fields, channels)
                beats = [int.from_bytes(row.tobytes(), "little") for row in elements]
                last = b == (job.parts if is_v else n_blocks) - 1
                blocks.append(
                    ({**common, "is_v": is_v, "rows": rows, "lanes": lanes,
                      "pass_first": int(b == 0), "pass_last": int(last)},
                     beats, exponent if exponent is None else int(exponent),
                     row_fields.tolist() if is_v else [])
                )  # fmt: skip
            self.passes[tile, is_v] = blocks

    def order(self):
        """K0 K1 .. K(lookahead) V0 K(lookahead + 1) V1 ..., and at the end the V passes left."""
        n, order = len(self.tiles), []
        for tile in range(n):
            order.append((tile, 0))
            if tile >= self.lookahead:
                order.append((tile - self.lookahead, 1))
        return order + [(tile, 1) for tile in range(max(0, n - self.lookahead), n)]

    def simulate(self, bench, pauses=None, *, depth=256, max_head_dim=96,
                 may_take=lambda run, taken: True, latency=9):  # fmt: skip
        pause = pauses or (lambda side: None)
        dut = KvFetch(max_head_dim, depth, self.lookahead)
        self.run = run = bench(dut)
        source = run.source(dut.i_tile, [bench.bits(Tile, tile) for tile in self.tiles], pause(1))

        def read(address):
            at = address - KV_BASE
            assert 0 <= at <= len(self.memory) - 64
            return bytes(self.memory[at : at + 64])

        self.memory_agent = run.read_memory(
            dut.ar, dut.r, read, pause(3), pause(3), latency=latency,
            error=lambda address: self.responses.get(address - KV_BASE, 0),
        )  # fmt: skip
        got, self.begun = [], []
        rest = pause(3)
        row_fields = run.tap(dut.o_field.valid, dut.o_field.payload)

        def q_store_and_flush():
            sets = []
            while True:
                (address,) = yield [*sets, (dut.flush, int(source.done))]
                exponent = self.q_exponents[address // Q_CHANNELS, address % Q_CHANNELS]
                sets = [(dut.q_exponent, int(exponent))]

        def consumer():
            # As the aligner: a block, once begun, takes a beat every cycle and ends with the last.
            block_ready, beat_ready, v_rows = dut.o_block.ready, dut.o_beat.ready, 0
            while True:
                valid, value, *_ = yield [(block_ready, 0), (beat_ready, 0)]
                if not valid or (rest and next(rest)) or not may_take(run, len(got)):
                    continue
                rows, beats = bench.fields(Block, value).rows, []
                self.begun.append(run.cycle)
                # The fields of a V block are there when it is announced.
                v_rows += rows * bench.fields(Block, value).is_v
                assert len(row_fields) >= v_rows
                for row in range(rows):
                    sets = [(block_ready, int(row == rows - 1)), (beat_ready, 1)]
                    valid, same, beat_valid, beat = yield sets
                    assert (valid, same) == (1, value)
                    assert beat_valid, "a block was announced before all its beats were there"
                    beats.append(beat)
                got.append((value, beats))

        run.script([dut.q_address], q_store_and_flush())
        run.script(
            [dut.o_block.valid, dut.o_block.p.as_value(), dut.o_beat.valid, dut.o_beat.payload],
            consumer(),
        )
        faults = [run.sink(dut.o_faults_k, pause(0)), run.sink(dut.o_faults_v, pause(2))]
        bursts = run.tap(dut.burst)
        want = [block for key in self.order() for block in self.passes[key]]
        run.run(
            lambda: len(got) == len(want) and all(len(sink) == len(self.jobs) for sink in faults),
            extra=25,
        )
        assert len(bursts) == len(self.memory_agent.bursts)
        assert len(got) == len(want)
        names = list(want[0][0])
        assert [item[0] for item in row_fields.items] == [at for *_, rows in want for at in rows]
        for (value, beats), (block, want_beats, exponent, _) in zip(got, want, strict=True):
            view = bench.fields(Block, value)
            assert exponent is None or view.exponent == exponent
            fields = {name: view[name] for name in names if name != "params"}
            assert fields == {name: block[name] for name in fields}
            assert {n: view.params[n] for n in block["params"]} == block["params"]
            assert beats == want_beats
        return [
            [bench.fields(Faults, value) for value in sink.items] for sink in faults
        ]  # (K of each job, V of each job)

    def read_addresses(self):
        """kv-memory offsets of all beats read, in order."""
        return [
            address - KV_BASE + 64 * i
            for _, address, beats in self.memory_agent.bursts
            for i in range(beats)
        ]


def assert_clean(faults):
    for fault in faults[0] + faults[1]:
        assert fault.as_bits() == 0


# Several jobs, of several pages and tiles; ragged, empty, one token; both types.
SHAPES = (
    (64, 32, [32, 5]),
    (32, 256, [129]),
    (96, 32, [0]),
    (32, 64, [33, 0, 2]),
    (32, 32, [1]),
)


@pytest.mark.slow
def test_passes_run_on_across_jobs_in_their_order(bench, pauses, rng):
    fetch = Fetch(rng, make_jobs(rng, SHAPES))
    assert_clean(fetch.simulate(bench, pauses))


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_every_lookahead_gives_its_order(bench, rng, lookahead):
    lens = [(32, 32, [9, 5, 1]), (32, 64, [33]), (32, 32, [2])]
    fetch = Fetch(rng, make_jobs(rng, lens), lookahead)
    order = fetch.order()
    assert order[: lookahead + 2] == [(n, 0) for n in range(lookahead + 1)] + [(0, 1)]
    assert_clean(fetch.simulate(bench))


def test_one_tile_alone_is_flushed(bench, rng):
    fetch = Fetch(rng, make_jobs(rng, [(32, 32, [7])]), 3)
    assert_clean(fetch.simulate(bench))


@pytest.mark.slow
def test_only_the_spans_of_the_abi_are_read(bench, rng):
    """K rows of blocks with a token, V rows of tokens, each once: what the CRCs cover."""
    jobs = make_jobs(rng, [(32, 256, [130, 1]), (96, 32, [7, 0])])
    fetch = Fetch(rng, jobs)
    fetch.simulate(bench)
    want, base = [], 0
    for job in jobs:
        for page in job.pages:
            spans = job.layout.k_spans(page.page_len) + job.layout.v_spans(page.page_len)
            want += [base + at + i for at, size in spans for i in range(0, size, 64)]
            base += job.layout.page_bytes
    assert sorted(fetch.read_addresses()) == sorted(want)


@pytest.mark.slow
def test_the_stream_has_no_gap_once_it_flows(bench, rng):
    """A queue of 512 beats covers a latency of 40 cycles, and V blocks of 128 rows.

    These are announced when all their rows are there: once, at the first, that takes a while.
    """
    fetch = Fetch(rng, make_jobs(rng, [(32, 128, [128, 128, 128])]), 1)
    fetch.simulate(bench, depth=512, latency=40)
    rows = [len(beats) for key in fetch.order() for _, beats, *_ in fetch.passes[key]]
    first_v = rows.index(128)
    # The test's consumer needs one cycle to see the next block.
    assert np.diff(fetch.begun[first_v:]).tolist() == [n + 1 for n in rows[first_v:-1]]
    assert {32, 128} == set(rows[first_v:])


@pytest.mark.slow
def test_short_blocks_never_overrun_the_queue_of_blocks(bench, rng):
    """Four V passes of eight one-row blocks, while the consumer rests at the K block before."""
    fetch = Fetch(rng, make_jobs(rng, [(256, 32, [1, 1, 1, 1])]), 3)

    def may_take(run, taken):
        return taken != 3 or run.cycle > 1400

    assert_clean(fetch.simulate(bench, depth=512, max_head_dim=256, may_take=may_take))


# --- faults ---------------------------------------------------------------------------------------


def element_at(layout, kind, token, channel):
    """Index of an element of K (0) or V (1) among a page's 16-bit words."""
    if kind == 0:
        block, lane = divmod(token, 32)
        return (block * layout.head_dim + channel) * 32 + lane
    part, lane = divmod(channel, 32)
    return layout.part_bytes // 2 + (part * layout.page_tokens + token) * 32 + lane


def wrong_crc(job, kind, page, bit):
    job.pages[page].crcs[kind] ^= 1 << bit


def flipped_bit(job, kind, page, token, channel):
    """The least bit of a mantissa: the number stays finite, whatever it is."""
    words = job.pages[page].data.view("<u2")
    words[element_at(job.layout, kind, token, channel)] ^= 1


def spoiled(job, kind, page, token, channel, extra=0):
    """An Inf or NaN, with a CRC that covers it."""
    words = job.pages[page].data.view("<u2")
    words[element_at(job.layout, kind, token, channel)] = infinity(job.layout.kv_type) + extra
    sum_up(job.layout, job.pages[page])


def bus_error(job, kind, page, token, channel, response=2):
    at = 2 * element_at(job.layout, kind, token, channel) // 64 * 64
    job.pages[page].responses[at] = response


# (what is done to a job, kind, page, further arguments, the flag that must be set): each job has
# two pages of 32 tokens, with 32 and 20 valid ones, or one page of two tiles, of 128 and 3 tokens.
BAD_CRC, NON_FINITE, BUS_ERROR, NOTHING = "bad_crc", "non_finite", "bus_error", None
FAULTS = (
    (wrong_crc, 0, 0, (0,), BAD_CRC),
    (wrong_crc, 0, 1, (31,), BAD_CRC),
    (wrong_crc, 1, 0, (15,), BAD_CRC),
    (wrong_crc, 1, 1, (16,), BAD_CRC),
    (flipped_bit, 0, 0, (0, 0), BAD_CRC),
    (flipped_bit, 0, 1, (19, 31), BAD_CRC),
    (flipped_bit, 0, 1, (20, 31), BAD_CRC),  # the card reads whole rows of K
    (flipped_bit, 1, 0, (0, 0), BAD_CRC),
    (flipped_bit, 1, 1, (19, 31), BAD_CRC),
    (flipped_bit, 1, 1, (20, 0), NOTHING),  # but no row of V beyond the tokens
    (spoiled, 0, 0, (0, 0), NON_FINITE),
    (spoiled, 0, 1, (19, 31, 1), NON_FINITE),
    (spoiled, 0, 1, (20, 31, 1), NOTHING),
    (spoiled, 1, 0, (31, 0, 0x8000), NON_FINITE),
    (spoiled, 1, 1, (19, 31, 0x8001), NON_FINITE),
    (spoiled, 1, 1, (20, 7, 0), NOTHING),
    (bus_error, 0, 0, (0, 0), BUS_ERROR),
    (bus_error, 0, 1, (0, 31, 3), BUS_ERROR),
    (bus_error, 0, 1, (0, 31, 1), NOTHING),  # EXOKAY is no error
    (bus_error, 1, 0, (0, 0, 3), BUS_ERROR),
    (bus_error, 1, 1, (19, 0), BUS_ERROR),
    (bus_error, 1, 1, (20, 0), NOTHING),
)
TWO_TILES = (
    (flipped_bit, 0, 0, (127, 31), BAD_CRC),
    (flipped_bit, 0, 0, (130, 0), BAD_CRC),
    (flipped_bit, 1, 0, (128, 3), BAD_CRC),
    (flipped_bit, 1, 0, (131, 3), NOTHING),
    (spoiled, 0, 0, (130, 5), NON_FINITE),
)


def spoil(rng, page_tokens, lens, faults):
    """A job for each fault, and a good one behind each: nothing of the fault may be left over."""
    good = (32, 32, [1])
    jobs = make_jobs(rng, [shape for _ in faults for shape in ((32, page_tokens, lens), good)])
    for job, (act, kind, page, arguments, _) in zip(jobs[::2], faults, strict=True):
        act(job, kind, page, *arguments)
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    "page_tokens, lens, faults", [(32, [32, 20], FAULTS), (256, [131], TWO_TILES)]
)
def test_each_fault_is_reported_once_with_its_page_and_its_job(
    bench, rng, page_tokens, lens, faults
):
    got = Fetch(rng, spoil(rng, page_tokens, lens, faults)).simulate(bench)
    for n, (act, kind, page, arguments, flag) in enumerate(faults):
        want = [{}, {}]
        if flag:
            want[kind] = {flag: 1, "page": page, "page_known": 1}
        for which in (0, 1):
            fault = bench.bits(Faults, want[which])
            place = (act.__name__, "KV"[kind], page, *arguments)
            assert got[which][2 * n].as_bits() == fault, place
            assert got[which][2 * n + 1].as_bits() == 0, f"behind {place}"


@pytest.mark.slow
def test_of_several_faults_the_first_page_is_blamed_and_every_kind_is_named(bench, pauses, rng):
    jobs = make_jobs(rng, [(32, 32, [3]), (32, 32, [5, 7, 9]), (32, 32, [2])])
    job = jobs[1]
    spoiled(job, 0, 1, 5, 5)
    spoiled(job, 1, 2, 5, 5)
    for kind in (0, 1):
        wrong_crc(job, kind, 2, 7)
    bus_error(job, 1, 1, 0, 0)
    faults = Fetch(rng, jobs).simulate(bench, pauses)
    k = {"bad_crc": 1, "non_finite": 1, "page": 1, "page_known": 1}
    v = {**k, "bus_error": 1}
    assert [fault.as_bits() for fault in faults[0]] == [0, bench.bits(Faults, k), 0]
    assert [fault.as_bits() for fault in faults[1]] == [0, bench.bits(Faults, v), 0]


def test_inf_and_nan_beyond_the_tokens_are_not_looked_at(bench, rng):
    """`make_page` poisons every tail. Here all that lies beyond one token, and an empty page."""
    jobs = make_jobs(rng, [(32, 128, [1, 0]), (32, 128, [0, 1])])
    for job in jobs:
        for page in job.pages:
            words = page.data.view("<u2").reshape(2, -1, 32)
            words[0, :, page.page_len :] = 0xFFFF
            words[0, 32:] = 0xFFFF
            words[1, page.page_len :] = 0x7FFF
            sum_up(job.layout, page)
    fetch = Fetch(rng, jobs)
    assert_clean(fetch.simulate(bench))
    ((_, _, exponent, _),) = fetch.passes[1, 0]  # of a page without tokens
    ((_, _, _, row_fields),) = fetch.passes[1, 1]
    assert (exponent, row_fields) == (EXPONENT_FLOOR, [0])
