# SPDX-License-Identifier: Apache-2.0
"""The emitted Verilog leaves the same bytes in job memory as the model, whatever the bus does.

The harness (`card.cpp`) checks the rules of AXI4 and where the kernel writes, in every run.
"""

import numpy as np
import pytest

from nearkv_hw import abi
from nearkv_hw.abi import KvType, Status
from nearkv_hw.config import preset
from nearkv_sim import rtl, workload
from nearkv_sim.workload import KINDS, extreme_job, random_job

pytestmark = pytest.mark.sim

# (stalls, read latency): an ideal memory, a slow one, and ones that pause on every channel
BUSES = ((0.0, 1), (0.0, 300), (0.1, 100), (0.3, 40), (0.6, 100), (0.9, 10))
CONFIG = preset("smartssd")


def small(rng, **choices):
    return random_job(rng, CONFIG, **{"n_tokens": 100, "head_dim": 64, **choices})


@pytest.mark.smoke
def test_a_short_queue_equals_the_model_bit_for_bit(open_rtl, assert_equals_model):
    rng = np.random.default_rng(7)
    jobs = [random_job(rng, CONFIG, kind=kind, max_tokens=300) for kind in KINDS]
    assert_equals_model(open_rtl(stalls=0.2, seed=7), workload.place(jobs, rng))


@pytest.mark.parametrize("seed", range(20))
def test_ten_random_jobs_equal_the_model_bit_for_bit(open_rtl, assert_equals_model, seed):
    """Twenty times ten jobs: d 64 and 128, all group sizes, 1 .. 2,000 tokens, fp16 and bf16."""
    rng = np.random.default_rng(seed)
    stalls, latency = BUSES[seed % len(BUSES)]
    card = open_rtl(stalls=stalls, read_latency=latency, seed=seed)
    kinds = [KINDS[(seed + i) % len(KINDS)] for i in range(10)]
    jobs = [random_job(rng, card.config, kind=kind) for kind in kinds]
    got = assert_equals_model(card, workload.place(jobs, rng))
    assert len(got)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_numbers_equals_the_model(open_rtl, assert_equals_model, kind, kv_type):
    rng = np.random.default_rng(100 + KINDS.index(kind))
    jobs = [small(rng, kind=kind, kv_type=kv_type, n_tokens=200) for _ in range(3)]
    assert_equals_model(open_rtl(), workload.place(jobs, rng))


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("name", ["tiny", "smartssd"])
def test_numbers_at_the_ends_of_their_ranges(open_rtl, assert_equals_model, name, kv_type):
    rng = np.random.default_rng(21)
    card = open_rtl(name)
    for _ in range(20):
        jobs = [extreme_job(rng, card.config, kv_type=kv_type) for _ in range(6)]
        assert_equals_model(card, workload.place(jobs, rng))


def test_any_bits_in_the_query_block(open_rtl, assert_equals_model):
    rng = np.random.default_rng(22)
    card = open_rtl()
    for _ in range(10):
        jobs = [small(rng) for _ in range(4)]
        for job in jobs:
            job.query = rng.bytes(job.q.shape[1] * abi.Q_RECORD.bytes)
            job.fields = {"score_shift": int(rng.integers(1000, 1100))}
        assert_equals_model(card, workload.place(jobs, rng))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 224, 256])
def test_every_length_around_tile_and_page_edges(open_rtl, assert_equals_model, head_dim):
    rng = np.random.default_rng(head_dim)
    jobs = [
        small(rng, head_dim=head_dim, n_tokens=n_tokens, page_tokens=page_tokens)
        for page_tokens in (32, 96, 128, 256)
        for n_tokens in (1, 31, 32, 33, 127, 128, 129, 255, 256, 257)
    ]
    assert_equals_model(open_rtl(stalls=0.1, seed=head_dim), workload.place(jobs, rng))


@pytest.mark.parametrize("stalls", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["rising", "outliers", "mixed"])
def test_the_shortest_tiles_back_to_back(open_rtl, assert_equals_model, kind, stalls):
    """One block, one pair of rows: each station meets its own results again as soon as it may."""
    rng = np.random.default_rng(11)
    jobs = [
        small(rng, kind=kind, head_dim=32, group_size=group, page_tokens=32, n_tokens=n_tokens)
        for group in (1, 2)
        for n_tokens in (33, 300, 700)
    ]
    assert_equals_model(open_rtl(stalls=stalls), workload.place(jobs, rng))


@pytest.mark.parametrize("name", ["tiny", "smartssd"])
def test_every_group_size_in_one_queue(open_rtl, assert_equals_model, name):
    rng = np.random.default_rng(3)
    card = open_rtl(name)
    jobs = [
        random_job(rng, card.config, group_size=g, max_tokens=400, head_dim=head_dim)
        for head_dim in (32, 64)
        for g in range(1, card.config.rows + 1)
    ]
    assert_equals_model(card, workload.place(jobs, rng))


def test_many_jobs_of_one_token(open_rtl, assert_equals_model):
    rng = np.random.default_rng(4)
    jobs = [small(rng, n_tokens=1) for _ in range(40)]
    assert_equals_model(open_rtl(), workload.place(jobs, rng))


def test_runs_follow_each_other_without_reset(open_rtl, assert_equals_model):
    rng = np.random.default_rng(5)
    card = open_rtl(stalls=0.1)
    for n_jobs in (1, 3, 0, 2, 1):
        jobs = [small(rng, n_tokens=int(rng.integers(1, 300))) for _ in range(n_jobs)]
        # A queue without jobs is not a place() of none: it has a record that must not be read.
        memories = workload.place(jobs or [small(rng)], rng)
        memories.n_jobs = n_jobs
        assert_equals_model(card, memories)


def test_the_same_queue_gives_the_same_bytes_on_every_bus(open_rtl):
    rng = np.random.default_rng(6)
    memories = workload.place([random_job(rng, CONFIG, max_tokens=300) for _ in range(4)], rng)
    results = [
        memories.untimed(memories.execute(open_rtl(stalls=stalls, read_latency=latency, seed=9)))
        for stalls, latency in BUSES
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("kv_type", KvType)
def test_a_partial_ignores_what_lies_past_page_len(open_rtl, kv_type):
    partials = []
    for tail in (0x0000, 0x7FFF, 0xFFFF, 0x7F80, 0xFC00, 0x7BFF):
        rng = np.random.default_rng(8)
        job = small(rng, n_tokens=45, kv_type=kv_type)
        job.tail = tail
        memories = workload.place([job], rng)
        got = memories.execute(open_rtl())
        at = memories.record(0)["partial"]
        partials.append(got[at : at + abi.partial_bytes(64, len(job.q))])
    for partial in partials[1:]:
        np.testing.assert_array_equal(partial, partials[0])


def test_pages_without_tokens_add_nothing(open_rtl, assert_equals_model):
    rng = np.random.default_rng(9)
    lens = ([0], [0, 0], [128, 0, 5], [0, 17], [128, 128, 0])
    jobs = [small(rng, n_tokens=sum(x), page_tokens=128) for x in lens]
    for job, page_lens in zip(jobs, lens, strict=True):
        job.page_lens = page_lens
    memories = workload.place(jobs, rng)
    got = assert_equals_model(open_rtl(), memories)
    for i in range(len(lens)):
        assert memories.partial(got, i)["status"] == Status.DONE


@pytest.mark.parametrize("stalls", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("tail", [0, 1, 15, 31, 32])
def test_every_pair_of_circumstances(open_rtl, assert_equals_model, tail, stalls):
    """A queue for each kind of tail and of bus; it fills what chance leaves of the coverage."""
    rng = np.random.default_rng([tail, round(10 * stalls)])
    extents = {  # page_tokens, page_lens
        "one tile": (64, [tail]),
        "tiles of one page": (256, [128 + tail]),
        "pages": (64, [64, tail]),
        "pages of tiles": (256, [200, tail]),
    }
    shapes = [{}, {"group_size": 3}, {"head_dim": 128}, {"kv_type": KvType.BF16}]
    jobs = []
    for failure in (False, True):
        for shape in shapes:
            for page_tokens, page_lens in extents.values():
                if page_lens == [128]:
                    continue
                choices = {"group_size": 2, "kv_type": KvType.FP16, **shape}
                for _ in range(1 if failure else 2):
                    jobs.append(small(rng, n_tokens=sum(page_lens), **choices))
                    jobs[-1].page_tokens, jobs[-1].page_lens = page_tokens, page_lens
                if failure:
                    jobs.append(small(rng, n_tokens=1))
                    jobs[-1].fields = {"group_size": 0}
    # Another extent is first in each queue; the failures stay between the jobs they were put.
    first = int(rng.integers(2 * len(extents)))
    assert_equals_model(open_rtl(stalls=stalls, seed=tail), workload.place(jobs[first:], rng))


def surrounded(rng, **choices):
    """A good job, one with four pages (job 1), and a good job: the neighbours must not notice."""
    jobs = [small(rng, n_tokens=150) for _ in range(3)]
    jobs[1] = small(rng, **{"n_tokens": 450, "page_tokens": 128, **choices})
    return workload.place(jobs, rng)


def assert_one_failed(memories, job, status, bad_page):
    for i in (0, 2):
        assert memories.partial(job, i)["status"] == Status.DONE
    header = memories.partial(job, 1)
    assert Status(header["status"]) == Status.DONE | status
    assert header["bad_page"] == bad_page
    assert memories.summary_of(job)["n_failed"] == 1


@pytest.mark.parametrize("page", range(4))
@pytest.mark.parametrize("part", ["K", "V"])
def test_a_flipped_bit_is_reported_with_its_page(open_rtl, assert_equals_model, part, page):
    rng = np.random.default_rng(10 + page)
    memories = surrounded(rng)
    layout = abi.PageLayout(64)
    offset = int(rng.integers(64)) + (layout.part_bytes if part == "V" else 0)
    memories.kv[memories.page_addresses[1][page] + offset] ^= 1 << int(rng.integers(8))
    got = assert_equals_model(open_rtl(), memories)
    assert Status(memories.partial(got, 1)["status"]) & Status[f"BAD_CRC_{part}"]
    assert memories.partial(got, 1)["bad_page"] == page


def test_a_wrong_crc_in_the_table_is_reported(open_rtl, assert_equals_model):
    memories = surrounded(np.random.default_rng(11))
    memories.set_entry(1, 3, crc_k=memories.entry(1, 3)["crc_k"] ^ 1 << 31)
    memories.set_entry(1, 2, crc_v=memories.entry(1, 2)["crc_v"] ^ 1)
    got = assert_equals_model(open_rtl(stalls=0.2), memories)
    assert_one_failed(memories, got, Status.BAD_CRC_K | Status.BAD_CRC_V, 2)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("bits", ["infinity", "nan"])
def test_inf_and_nan_among_tokens_are_reported(open_rtl, assert_equals_model, kv_type, part, bits):
    rng = np.random.default_rng(12)
    job = small(rng, n_tokens=450, page_tokens=128, kv_type=kv_type)
    infinity = 0x7C00 if kv_type == KvType.FP16 else 0x7F80
    getattr(job, part)[300, 17] = infinity + (bits == "nan")
    memories = workload.place([small(rng), job, small(rng)], rng)
    got = assert_equals_model(open_rtl(), memories)
    # An Inf or NaN in K may saturate scores as well.
    also = Status(memories.partial(got, 1)["status"]) & Status.SATURATED
    assert_one_failed(memories, got, Status.NON_FINITE | also, 2)


ILLEGAL = {
    "no heads": {"group_size": 0},
    "too many heads": {"group_size": CONFIG.rows + 1},
    "unknown type": {"kv_type": 2},
    "type 255": {"kv_type": 255},
    "head_dim 0": {"head_dim": 0},
    "head_dim 48": {"head_dim": 48},
    "head_dim 288": {"head_dim": 288},
    "page_tokens 0": {"page_tokens": 0},
    "page_tokens 160": {"page_tokens": 160},
    "page_tokens 33": {"page_tokens": 33},
    "no pages": {"n_pages": 0},
    "too many pages": {"n_pages": abi.MAX_TILES + 1},
    "far too many pages": {"n_pages": 0xFFFFFFFF},
    "too many tiles": {"n_pages": abi.MAX_TILES // 2 + 1, "page_tokens": 256},
}


@pytest.mark.parametrize("fields", ILLEGAL.values(), ids=ILLEGAL)
def test_an_illegal_job_is_refused_and_the_next_one_runs(open_rtl, assert_equals_model, fields):
    memories = surrounded(np.random.default_rng(13))
    memories.set_record(1, **fields)
    got = assert_equals_model(open_rtl(), memories)
    assert_one_failed(memories, got, Status.ILLEGAL_JOB, abi.NO_PAGE)


@pytest.mark.parametrize("preset_name", ["tiny", "smartssd"])
def test_every_limit_of_the_abi_is_kept(open_rtl, assert_equals_model, preset_name):
    """But for the partial's: a header is written there before anybody can refuse it."""
    card = open_rtl(preset_name)
    memories, names, want = workload.walk_limits(card.config, skip=("partial",))
    job = assert_equals_model(card, memories)
    for i, (name, status) in enumerate(zip(names, want, strict=True)):
        assert memories.partial(job, i)["status"] == status, name


@pytest.mark.parametrize("name", ["page_table", "q"])
def test_a_record_that_is_not_aligned_is_refused(open_rtl, assert_equals_model, name):
    memories = surrounded(np.random.default_rng(14))
    memories.set_record(1, **{name: memories.record(1)[name] + 32})
    got = assert_equals_model(open_rtl(), memories)
    assert_one_failed(memories, got, Status.ILLEGAL_JOB, abi.NO_PAGE)


@pytest.mark.parametrize("fields", [{"page_len": 129}, {"page_len": 1 << 31}, {"address": 64}])
def test_an_illegal_page_entry_is_reported_with_its_page(open_rtl, assert_equals_model, fields):
    memories = surrounded(np.random.default_rng(15))
    memories.set_entry(1, 1, **fields)
    got = assert_equals_model(open_rtl(), memories)
    assert_one_failed(memories, got, Status.ILLEGAL_JOB, 1)


def test_a_page_beyond_kv_memory_is_a_bus_error(open_rtl):
    memories = surrounded(np.random.default_rng(16))
    memories.set_entry(1, 2, address=1 << 40)
    got = memories.execute(open_rtl())
    # What came instead of the page's bytes has another CRC.
    also = Status.BAD_CRC_K | Status.BAD_CRC_V
    assert_one_failed(memories, got, Status.BUS_ERROR | also, 2)


@pytest.mark.parametrize("offset", [0, 4096, 8192, 16384, 28672])
def test_a_bus_error_anywhere_in_a_page_is_reported(open_rtl, offset):
    memories = surrounded(np.random.default_rng(17))
    card = open_rtl(stalls=0.1)
    begin = memories.page_addresses[1][1] + offset
    card.inject_bus_error(begin, begin + 64)
    assert_one_failed(memories, memories.execute(card), Status.BUS_ERROR, 1)
    card.inject_bus_error(0, 0)
    assert memories.summary_of(memories.execute(card))["n_failed"] == 0


@pytest.mark.parametrize("name", ["page_table", "q"])
def test_a_record_in_a_hole_is_a_bus_error_of_its_job_alone(open_rtl, name):
    memories = surrounded(np.random.default_rng(20))
    right = memories.record(1)[name]
    memories.set_record(1, **{name: 0xFFFF_0000})
    card = open_rtl()
    got = memories.execute(card)
    for i in (0, 2):
        assert memories.partial(got, i)["status"] == Status.DONE
    assert Status(memories.partial(got, 1)["status"]) & Status.BUS_ERROR
    assert memories.summary_of(got)["n_failed"] == 1
    memories.set_record(1, **{name: right})
    assert memories.summary_of(memories.execute(card))["n_failed"] == 0


def test_a_queue_beyond_job_memory_is_reported(open_rtl):
    memories = surrounded(np.random.default_rng(18))
    card = open_rtl()
    job = memories.job.copy()
    with pytest.raises(ValueError, match="queue"):
        card.execute(memories.kv, job, len(job), 1, memories.summary)


def test_counters_of_the_stream_add_up(open_rtl):
    rng = np.random.default_rng(19)
    for stalls in (0.0, 0.4):
        memories = workload.place([random_job(rng, CONFIG) for _ in range(4)], rng)
        card = open_rtl(stalls=stalls)
        summary = memories.summary_of(memories.execute(card))
        busy = summary["kv_beats"] + summary["starved_cycles"] + summary["stalled_cycles"]
        assert busy == summary["stream_cycles"]
        assert summary["stream_cycles"] < summary["cycles"] <= card.last_run["cycle"]
        assert summary["kv_bursts"] == card.last_run["kv_bursts"]


def test_a_run_that_takes_too_long_says_what_it_waited_for(open_rtl):
    rng = np.random.default_rng(20)
    memories = workload.place([random_job(rng, CONFIG, n_tokens=2000, head_dim=128)], rng)
    card = open_rtl(stalls=0.9)
    with pytest.raises(TimeoutError, match=r"no ap_done after \d+ cycles .*kv_bursts"):
        memories.execute(card, timeout_s=0.0)
    assert memories.summary_of(memories.execute(card))["n_failed"] == 0  # it was reset


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(rtl.BuildError, match=r"g\+\+ is not installed.*apt install"):
        rtl.verilator_environment()


def test_a_failed_build_names_its_log(monkeypatch, tmp_path, tools):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rtl, "emitted", lambda config: "module nearkv(input ap_clk; endmodule")
    with pytest.raises(rtl.BuildError, match=r"syntax error.*log: .*\.log"):
        rtl.build(preset("tiny"))
