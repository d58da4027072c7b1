# SPDX-License-Identifier: Apache-2.0
"""The card `twin` leaves the same bytes in job memory as the model, on every path and with any threads."""

from concurrent.futures import ThreadPoolExecutor
import ctypes
from dataclasses import replace
import importlib.util
import platform
import threading

import google_crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

import nearkv
from nearkv_hw import abi, pages
from nearkv_hw.abi import KvType, PageLayout, Status
from nearkv_hw.config import Config, preset
from nearkv_sim import twin, workload
from nearkv_sim.lifetime import ClosedError
from nearkv_sim.model import ModelCard
from nearkv_sim.twin import PATHS, TwinCard, TwinError
from nearkv_sim.workload import KINDS, extreme_job, random_job

CONFIG = preset("smartssd")
WIDE = Config(name="wide", rows=abi.MAX_ROWS)
THREADS = (1, 2)


@pytest.fixture(scope="module")
def open_twin():
    """A TwinCard for a configuration, path and number of threads; the same for the same."""
    cards = {}

    def opener(config=CONFIG, path="auto", threads=1):
        key = config.name, path, threads
        if key not in cards:
            # Small as the queues are, all threads are to work on them.
            cards[key] = TwinCard(config, path=path, threads=threads, alone_bytes=0)
        return cards[key]

    yield opener
    for card in cards.values():
        card.close()


@pytest.fixture(scope="module")
def assert_twin_equals_model(open_twin):
    """Runs a queue on the model and on a twin of every path and number of threads."""

    def check(memories, config=CONFIG, paths=PATHS, threads=THREADS) -> np.ndarray:
        want = memories.execute(ModelCard(config))
        for path in (path for path in paths if path in twin.supported_paths()):
            for n in threads:
                got = memories.execute(open_twin(config, path, n), timeout_s=600)
                for i in range(memories.n_jobs):
                    got_header, want_header = memories.partial(got, i), memories.partial(want, i)
                    assert got_header == want_header, f"{path}, {n} threads, job {i}"
                np.testing.assert_array_equal(got, want, err_msg=f"{path}, {n} threads")
        return want

    return check


def small(rng, **choices):
    return random_job(rng, CONFIG, **{"n_tokens": 100, "head_dim": 64, **choices})


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_what_was_asked_for(path):
    if path not in twin.supported_paths():
        pytest.skip(f"this processor does not have the instructions of the path {path}")
    with TwinCard(CONFIG, path=path) as card:
        assert card.path == path


def test_auto_is_the_fastest_path_there_is():
    with TwinCard(CONFIG) as card:
        assert card.path == twin.supported_paths()[0]
    assert twin.supported_paths()[-1] == "portable"


@pytest.mark.parametrize("seed", range(4))
def test_random_jobs(assert_twin_equals_model, seed):
    rng = np.random.default_rng(seed)
    jobs = [random_job(rng, CONFIG, kind=kind, max_tokens=600) for kind in KINDS]
    assert_twin_equals_model(workload.place(jobs, rng))


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_numbers(assert_twin_equals_model, kind, kv_type):
    rng = np.random.default_rng(100 + KINDS.index(kind))
    jobs = [small(rng, kind=kind, kv_type=kv_type, n_tokens=n) for n in (200, 1, 129)]
    assert_twin_equals_model(workload.place(jobs, rng))


@pytest.mark.parametrize("group_size", [1, 2])
def test_scores_out_of_range_are_reported(assert_twin_equals_model, group_size):
    rng = np.random.default_rng(25)
    job = small(rng, n_tokens=200, group_size=group_size)
    job.scale = 1e6
    memories = workload.place([small(rng), job, small(rng)], rng)
    got = assert_twin_equals_model(memories)
    assert_one_failed(memories, got, Status.SATURATED, abi.NO_PAGE)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(32, 257, 32))
def test_every_length_around_tile_and_page_edges(assert_twin_equals_model, head_dim):
    rng = np.random.default_rng(head_dim)
    jobs = [
        small(rng, head_dim=head_dim, n_tokens=n_tokens, page_tokens=page_tokens)
        for page_tokens in (32, 64, 96, 128, 256)
        for n_tokens in (1, 31, 32, 33, 127, 128, 129, 255, 256, 257)
    ]
    assert_twin_equals_model(workload.place(jobs, rng))


def test_every_group_size(assert_twin_equals_model):
    rng = np.random.default_rng(3)
    jobs = [
        random_job(rng, WIDE, group_size=g, n_tokens=170, head_dim=head_dim, kv_type=kv_type)
        for head_dim, kv_type in ((32, KvType.FP16), (96, KvType.BF16))
        for g in range(1, WIDE.rows + 1)
    ]
    assert_twin_equals_model(workload.place(jobs, rng), WIDE)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("group_size", [1, 3, 4, 8, 11])
def test_heads_without_weight(assert_twin_equals_model, group_size, kv_type):
    """All scores of a q of zeros are equal. What pads an odd group is no such head: it sees nothing."""
    rng = np.random.default_rng(26)
    jobs = []
    for zeros in {1, group_size // 2, group_size}:
        job = random_job(rng, WIDE, group_size=group_size, n_tokens=301, kv_type=kv_type)
        job.q[group_size - zeros :] = 0
        jobs.append(job)
    assert_twin_equals_model(workload.place(jobs, rng), WIDE)


@pytest.mark.parametrize("page_tokens", [128, 512, 4096])
def test_a_long_job_is_the_same_however_it_is_cut(assert_twin_equals_model, page_tokens):
    """Across units of work, and with one page that several threads share."""
    rng = np.random.default_rng(page_tokens)
    kinds = ("mixed", "rising", "outliers")
    jobs = [
        small(rng, kind=kind, n_tokens=9000, head_dim=32, page_tokens=page_tokens, group_size=3)
        for kind in kinds
    ]
    assert_twin_equals_model(workload.place(jobs, rng), threads=(1, 2, 3, 7))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    head_dim=st.sampled_from(range(32, 257, 32)),
    group_size=st.integers(1, abi.MAX_ROWS),
    kv_type=st.sampled_from(KvType),
    page_tokens=st.sampled_from((32, 64, 96, 128, 256, 384, 512)),
    n_tokens=st.integers(1, 700),
    scale=st.sampled_from((None, 1e-6, 0.3, 1.0, 77.0, 1e30)),
)
def test_any_job(assert_twin_equals_model, seed, scale, **choices):
    rng = np.random.default_rng(seed)
    job = random_job(rng, WIDE, **choices)
    job.scale = scale
    assert_twin_equals_model(workload.place([job], rng), WIDE)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_type=st.sampled_from(KvType),
    spread=st.sampled_from((0, 4, 12, 30)),
    lowest=st.integers(0, 254),
    n_tokens=st.integers(1, 260),
)
def test_any_patterns_of_any_exponents(
    assert_twin_equals_model, seed, kv_type, spread, lowest, n_tokens
):
    """Subnormal numbers, ties, blocks of huge and of tiny numbers, q of any size, Inf and NaN."""
    rng = np.random.default_rng(seed)
    job = random_job(rng, CONFIG, kv_type=kv_type, n_tokens=n_tokens, head_dim=32, group_size=2)
    form = workload.KV_FORMATS[kv_type]
    for x in (job.k, job.v):
        field = rng.integers(lowest, lowest + spread + 1, x.shape) % (form.exponent_max + 1)
        noise = rng.integers(0, 1 << 16, x.shape) & ~(form.exponent_max << form.mantissa_bits)
        x[:] = noise | field << form.mantissa_bits
    job.q = job.q * 2.0 ** rng.integers(-spread, spread + 1, job.q.shape)
    assert_twin_equals_model(workload.place([job], rng))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_type=st.sampled_from(KvType),
    group_size=st.integers(1, abi.MAX_ROWS),
    n_tokens=st.sampled_from((1, 3, 31, 33, 64, 100, 127, 128, 200)),
    binades=st.sampled_from((0, 1, 6, 20, 40, 70)),
    spread=st.sampled_from((0, 1, 12, 30, 254)),
    lowest=st.integers(0, 253),
    zeros=st.sampled_from((0, 0.2, 1)),
)
def test_any_products_of_weights_and_values(
    assert_twin_equals_model, seed, kv_type, group_size, n_tokens, binades, spread, lowest, zeros
):
    """Heads that agree and disagree, about tokens whose V is of any size, or nothing."""
    rng = np.random.default_rng(seed)
    job = random_job(
        rng, WIDE, kv_type=kv_type, n_tokens=n_tokens, head_dim=64, group_size=group_size
    )
    # Scores of up to so many binades: as if each token and each head had a direction.
    k = rng.uniform(-1, 1, job.k.shape) * (rng.random(job.k.shape) < 0.1)
    job.k = pages.to_patterns(k, kv_type)
    job.q = rng.uniform(-1, 1, job.q.shape) * binades
    job.scale = 1.0
    form = workload.KV_FORMATS[kv_type]
    finite = form.exponent_max - 1
    of_token = lowest + rng.integers(0, spread + 1, (n_tokens, 1))
    field = np.clip(of_token - rng.geometric(0.4, job.v.shape), 0, None) % (finite + 1)
    noise = rng.integers(0, 1 << 16, job.v.shape) & ~(form.exponent_max << form.mantissa_bits)
    job.v[:] = noise | field << form.mantissa_bits
    job.v[rng.random(n_tokens) < zeros] &= 0x8000
    assert_twin_equals_model(workload.place([job], rng), WIDE, threads=(1,))


@pytest.mark.parametrize("path", PATHS)
def test_the_order_of_tokens_in_a_tile_changes_no_bit_of_v(open_twin, path):
    """Of blocks, because K is aligned block by block."""
    if path not in twin.supported_paths():
        pytest.skip(f"this processor does not have the instructions of the path {path}")
    rng = np.random.default_rng(31)
    for kv_type in KvType:
        job = small(rng, kv_type=kv_type, kind="sinks", n_tokens=128, group_size=5)
        order = np.concatenate([block * 32 + rng.permutation(32) for block in rng.permutation(4)])
        other = replace(job, k=job.k[order], v=job.v[order])
        memories = workload.place([job, other], np.random.default_rng(0))
        got = memories.execute(open_twin(CONFIG, path))
        assert memories.summary_of(got)["n_failed"] == 0
        partials = [
            got[memories.record(i)["partial"] + abi.PARTIAL_HEADER.bytes :][
                : abi.partial_bytes(64, 5) - abi.PARTIAL_HEADER.bytes
            ]
            for i in range(2)
        ]
        np.testing.assert_array_equal(*partials)


def check_extremes(assert_twin_equals_model, seeds, n_jobs, config=WIDE, threads=(1,), **choices):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        jobs = [extreme_job(rng, config, **choices) for _ in range(n_jobs)]
        try:
            assert_twin_equals_model(workload.place(jobs, rng), config, threads=threads)
        except AssertionError as error:
            error.add_note(f"seed {seed}, {config.name}, {choices}")
            raise


@pytest.mark.parametrize("kv_type", KvType)
def test_numbers_at_the_ends_of_their_ranges(assert_twin_equals_model, kv_type):
    check_extremes(assert_twin_equals_model, range(50), 4, kv_type=kv_type, max_tokens=70)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=lambda config: config.name)
@pytest.mark.parametrize("head_dim", [None, abi.MAX_HEAD_DIM])
@pytest.mark.parametrize("kv_type", KvType)
def test_many_numbers_at_the_ends_of_their_ranges(
    assert_twin_equals_model, kv_type, head_dim, config
):
    choices = {"kv_type": kv_type, "head_dim": head_dim}
    check_extremes(assert_twin_equals_model, range(1000, 1200), 3, config, **choices)
    choices["max_tokens"] = 1500
    check_extremes(assert_twin_equals_model, range(1200, 1220), 3, config, threads=(2,), **choices)


@pytest.mark.parametrize("below", range(16, 26))
def test_channels_far_below_one_that_is_huge(assert_twin_equals_model, below):
    """Elements of 2^126 and more times a factor that is no normal float still round to a unit."""
    rng = np.random.default_rng(below)
    job = small(rng, kv_type=KvType.BF16, head_dim=32, group_size=2)
    job.k[:] = rng.integers(0x7E00, 0x7F80, job.k.shape) | rng.integers(0, 2, job.k.shape) << 15
    # The first channel is so many binades above all others and has no weight, so that theirs show.
    exponent = np.where(np.arange(32) == 0, below, 0)
    weight = np.where(exponent, 0, rng.integers(1, 1 << 17, (2, 32)))
    job.query = workload.query_records(weight, exponent)
    job.fields = {"score_shift": below + 254 + 6}
    assert_twin_equals_model(workload.place([job], rng))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bits_in_the_query_block(assert_twin_equals_model, seed):
    rng = np.random.default_rng(seed)
    jobs = [random_job(rng, CONFIG, n_tokens=70) for _ in range(3)]
    for job in jobs:
        job.query = rng.bytes(job.q.shape[1] * abi.Q_RECORD.bytes)
        job.fields = {"score_shift": int(rng.integers(1000, 1100))}
    assert_twin_equals_model(workload.place(jobs, rng))


FE_UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}


@pytest.mark.parametrize("mode", ["upward", "without subnormal numbers"])
@pytest.mark.parametrize("path", PATHS)
def test_the_callers_floating_point_mode_does_not_matter(path, mode):
    """As torch.set_flush_denormal leaves it, or a library that was compiled with -ffast-math."""
    if path not in twin.supported_paths():
        pytest.skip(f"this processor does not have the instructions of the path {path}")
    machine = platform.machine()
    if machine not in FE_UPWARD or (mode != "upward" and machine != "x86_64"):
        pytest.skip(f"the test does not know how to set this mode on {machine}")
    rng = np.random.default_rng(29)
    memories = workload.place([extreme_job(rng, CONFIG) for _ in range(30)], rng)
    want = memories.execute(ModelCard(CONFIG))
    libc = ctypes.CDLL(None)
    before, changed, after = (ctypes.create_string_buffer(256) for _ in range(3))
    libc.fegetenv(before)
    try:
        if mode == "upward":
            libc.fesetround(FE_UPWARD[machine])
        else:
            libc.fegetenv(changed)
            mxcsr = np.frombuffer(changed, np.uint32)[7:8]  # in glibc's fenv_t
            mxcsr |= 0x8040  # flush to zero, and read subnormal numbers as zero
            libc.fesetenv(changed)
        libc.fegetenv(changed)
        got = []
        for threads in THREADS:  # a new thread inherits the mode
            with TwinCard(CONFIG, path=path, threads=threads, alone_bytes=0) as card:
                got.append(memories.execute(card))
        libc.fegetenv(after)
    finally:
        libc.fesetenv(before)
    assert after.raw == changed.raw, "the caller's mode was changed"
    for one in got:
        np.testing.assert_array_equal(one, want)


@pytest.mark.parametrize("kv_type", KvType)
def test_halves_round_away_from_zero(assert_twin_equals_model, kv_type):
    """Each block has one large element; all others end on half a unit of it, or just beside."""
    rng = np.random.default_rng(21)
    form = workload.KV_FORMATS[kv_type]
    jobs = []
    for binades in range(form.align_bits, min(form.align_bits + form.sig_bits + 2, 27)):
        job = small(rng, n_tokens=128, head_dim=32, kv_type=kv_type)
        for x in (job.k, job.v):
            x[:] = rng.integers(0, 1 << form.mantissa_bits, x.shape) | (1 << form.mantissa_bits)
            x |= rng.integers(0, 2, x.shape).astype(np.uint16) << 15
            x[:, 5] = (1 + binades) << form.mantissa_bits
        job.q = np.ones_like(job.q)
        jobs.append(job)
    assert_twin_equals_model(workload.place(jobs, rng))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), kv_type=st.sampled_from(KvType))
def test_random_bytes_in_kv_memory(assert_twin_equals_model, seed, kv_type):
    rng = np.random.default_rng(seed)
    jobs = [random_job(rng, CONFIG, kv_type=kv_type, max_tokens=300) for _ in range(2)]
    memories = workload.place(jobs, rng)
    memories.kv[:] = rng.integers(0, 256, len(memories.kv), dtype=np.uint8)
    got = assert_twin_equals_model(memories)
    for i in range(2):
        status = Status(memories.partial(got, i)["status"])
        assert status & Status.BAD_CRC_K
        assert status & Status.BAD_CRC_V


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    page=st.integers(0, 3),
    fields=st.dictionaries(
        st.sampled_from([field.name for field in abi.PAGE_ENTRY.fields]),
        st.integers(0, 2**32 - 1) | st.integers(0, 300) | st.integers(0, 12).map(lambda n: n << 12),
    ),
)
def test_any_page_table_entry(assert_twin_equals_model, seed, page, fields):
    memories = surrounded(np.random.default_rng(seed % 8))
    memories.set_entry(1, page, **fields)
    assert_twin_equals_model(memories)


@settings(max_examples=60)
@given(
    st.sampled_from(
        [field.name for field in abi.JOB.fields if field.name not in ("q", "partial", "page_table")]
    ),
    st.integers(0, 2**32 - 1) | st.integers(0, 300) | st.integers(2**23 - 1, 2**24),
)
def test_any_job_field(assert_twin_equals_model, name, value):
    memories = surrounded(np.random.default_rng(30), group_size=CONFIG.rows)
    field = abi.JOB[name]
    value %= 1 << (field.bits - (field.code == "h"))
    # No more than the records have room for; that is another test.
    value = min(value, memories.record(1)[name] if name in ("head_dim", "n_pages") else value)
    memories.set_record(1, **{name: value})
    assert_twin_equals_model(memories)


def surrounded(rng, **choices):
    """A good job, one with four pages (job 1), and a good job: the neighbours must not notice."""
    jobs = [small(rng, n_tokens=150) for _ in range(3)]
    jobs[1] = small(rng, **{"n_tokens": 450, "page_tokens": 128, **choices})
    return workload.place(jobs, rng)


def test_many_jobs_of_one_token(assert_twin_equals_model):
    rng = np.random.default_rng(4)
    jobs = [small(rng, n_tokens=1) for _ in range(40)]
    assert_twin_equals_model(workload.place(jobs, rng))


def test_a_queue_without_jobs(assert_twin_equals_model):
    memories = workload.place([small(rng := np.random.default_rng(5))], rng)
    memories.n_jobs = 0
    assert_twin_equals_model(memories)


@pytest.mark.parametrize("kv_type", KvType)
def test_a_partial_ignores_what_lies_past_page_len(open_twin, kv_type):
    partials = []
    for path in twin.supported_paths():
        for tail in (0x0000, 0x7FFF, 0xFFFF, 0x7F80, 0xFC00, 0x7BFF):
            rng = np.random.default_rng(8)
            job = small(rng, n_tokens=45, kv_type=kv_type)
            job.tail = tail
            memories = workload.place([job], rng)
            got = memories.execute(open_twin(path=path))
            at = memories.record(0)["partial"]
            partials.append(got[at : at + abi.partial_bytes(64, len(job.q))])
    for partial in partials[1:]:
        np.testing.assert_array_equal(partial, partials[0])


def test_pages_without_tokens_add_nothing(assert_twin_equals_model):
    rng = np.random.default_rng(9)
    lens = ([0], [0, 0], [128, 0, 5], [0, 17], [128, 128, 0])
    jobs = [small(rng, n_tokens=sum(x), page_tokens=128) for x in lens]
    for job, page_lens in zip(jobs, lens, strict=True):
        job.page_lens = page_lens
    memories = workload.place(jobs, rng)
    got = assert_twin_equals_model(memories)
    for i in range(len(lens)):
        assert memories.partial(got, i)["status"] == Status.DONE


def assert_one_failed(memories, job, status, bad_page):
    for i in (0, 2):
        assert memories.partial(job, i)["status"] == Status.DONE
    header = memories.partial(job, 1)
    assert Status(header["status"]) == Status.DONE | status
    assert header["bad_page"] == bad_page
    assert memories.summary_of(job)["n_failed"] == 1


@pytest.mark.parametrize("page_tokens", [128, 512])
@pytest.mark.parametrize("part", ["K", "V"])
def test_a_flipped_bit_is_reported_with_its_page(assert_twin_equals_model, part, page_tokens):
    for page in range(2):
        rng = np.random.default_rng(10 + page)
        memories = surrounded(rng, n_tokens=2 * page_tokens - 30, page_tokens=page_tokens)
        layout = PageLayout(64, page_tokens)
        offset = int(rng.integers(layout.part_bytes * 3 // 4))
        if part == "V":
            offset = layout.part_bytes + offset % 64
        memories.kv[memories.page_addresses[1][page] + offset] ^= 1 << int(rng.integers(8))
        got = assert_twin_equals_model(memories)
        assert Status(memories.partial(got, 1)["status"]) & Status[f"BAD_CRC_{part}"]
        assert memories.partial(got, 1)["bad_page"] == page


def test_a_wrong_crc_in_the_table_is_reported(assert_twin_equals_model):
    memories = surrounded(np.random.default_rng(11))
    memories.set_entry(1, 3, crc_k=memories.entry(1, 3)["crc_k"] ^ 1 << 31)
    memories.set_entry(1, 2, crc_v=memories.entry(1, 2)["crc_v"] ^ 1)
    got = assert_twin_equals_model(memories)
    assert_one_failed(memories, got, Status.BAD_CRC_K | Status.BAD_CRC_V, 2)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("bits", ["infinity", "nan"])
def test_inf_and_nan_among_tokens_are_reported(assert_twin_equals_model, kv_type, part, bits):
    rng = np.random.default_rng(12)
    job = small(rng, n_tokens=450, page_tokens=128, kv_type=kv_type)
    infinity = 0x7C00 if kv_type == KvType.FP16 else 0x7F80
    getattr(job, part)[300, 17] = infinity + (bits == "nan")
    memories = workload.place([small(rng), job, small(rng)], rng)
    got = assert_twin_equals_model(memories)
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
    "page_tokens 32896": {"page_tokens": 32896},
    "no scale": {"score_mantissa": 0},
    "scale of 23 bits": {"score_mantissa": (1 << 23) - 1},
    "scale of 25 bits": {"score_mantissa": 1 << 24},
    "no pages": {"n_pages": 0},
    "too many pages": {"n_pages": abi.MAX_TILES + 1},
    "far too many pages": {"n_pages": 0xFFFFFFFF},
    "too many tiles": {"n_pages": abi.MAX_TILES // 2 + 1, "page_tokens": 256},
}


@pytest.mark.parametrize("fields", ILLEGAL.values(), ids=ILLEGAL)
def test_an_illegal_job_is_refused_and_the_next_one_runs(assert_twin_equals_model, fields):
    memories = surrounded(np.random.default_rng(13))
    memories.set_record(1, **fields)
    got = assert_twin_equals_model(memories)
    assert_one_failed(memories, got, Status.ILLEGAL_JOB, abi.NO_PAGE)


@pytest.mark.parametrize("config", [CONFIG, WIDE, preset("tiny")], ids=lambda config: config.name)
def test_every_limit_of_the_abi_is_kept(assert_twin_equals_model, config):
    memories, names, want = workload.walk_limits(config)
    job = assert_twin_equals_model(memories, config)
    for i, (name, status) in enumerate(zip(names, want, strict=True)):
        header = memories.partial(job, i)
        assert header["status"] == status, name
        assert header["tag"] == i, name


@pytest.mark.parametrize("name", ["page_table", "q"])
def test_a_record_that_is_not_aligned_is_refused(assert_twin_equals_model, name):
    memories = surrounded(np.random.default_rng(14))
    memories.set_record(1, **{name: memories.record(1)[name] + 32})
    got = assert_twin_equals_model(memories)
    assert_one_failed(memories, got, Status.ILLEGAL_JOB, abi.NO_PAGE)


@pytest.mark.parametrize("address", [1 << 40, (1 << 64) - 4096, "last"])
def test_a_page_beyond_kv_memory_is_a_bus_error(assert_twin_equals_model, address):
    memories = surrounded(np.random.default_rng(16))
    if address == "last":  # its end is outside
        address = len(memories.kv) // abi.PAGE_ALIGN_BYTES * abi.PAGE_ALIGN_BYTES
        address -= abi.PAGE_ALIGN_BYTES
    memories.set_entry(1, 2, address=address)
    got = assert_twin_equals_model(memories)
    assert_one_failed(memories, got, Status.BUS_ERROR, 2)


def test_a_misaligned_queue_or_summary_is_taken_as_the_model_takes_it(assert_twin_equals_model):
    memories = surrounded(np.random.default_rng(17))
    memories.summary += 8
    assert_twin_equals_model(memories)
    memories.queue += 8
    got = assert_twin_equals_model(memories)
    memories.summary -= 8
    assert memories.summary_of(got)["error"] == Status.BUS_ERROR


@pytest.mark.parametrize("name", ["page_table", "q", "partial"])
def test_a_record_beyond_job_memory_is_named_and_nothing_runs(open_twin, name):
    memories = surrounded(np.random.default_rng(18))
    memories.set_record(1, **{name: len(memories.job) // 64 * 64 - 64})
    job = memories.job.copy()
    with pytest.raises(ValueError, match=f"job 1: {name} .* leaves job memory"):
        open_twin().execute(memories.kv, job, memories.queue, 3, memories.summary)
    np.testing.assert_array_equal(job, memories.job)


def test_a_queue_beyond_job_memory_is_refused(open_twin):
    memories = surrounded(np.random.default_rng(18))
    job = memories.job.copy()
    for queue, summary in ((len(job), 0), (0, len(job)), (-64, 0), (0, -128)):
        with pytest.raises(ValueError, match="queue"):
            open_twin().execute(memories.kv, job, queue, 1, summary)


@pytest.mark.parametrize("threads", THREADS)
def test_a_run_that_takes_too_long_ends_and_the_card_lives_on(open_twin, threads):
    rng = np.random.default_rng(20)
    memories = workload.place([small(rng, n_tokens=2000)], rng)
    card = open_twin(threads=threads)
    with pytest.raises(TimeoutError, match="path .* threads"):
        memories.execute(card, timeout_s=0.0)
    got = memories.execute(card, timeout_s=600)
    np.testing.assert_array_equal(got, memories.execute(ModelCard(CONFIG)))


@pytest.mark.parametrize("threads", THREADS)
def test_a_run_that_has_begun_is_finished_given_up_or_closed(threads):
    rng = np.random.default_rng(31)
    first, second = (
        workload.place([small(rng, n_tokens=n) for _ in range(3)], rng) for n in (3000, 2000)
    )
    want = [memories.execute(ModelCard(CONFIG)) for memories in (first, second)]
    card = TwinCard(CONFIG, threads=threads, alone_bytes=0)

    def arguments(memories):
        job = memories.job.copy()
        return memories.kv, job, memories.queue, memories.n_jobs

    for memories, other, expected in ((first, second, want[0]), (second, first, want[1])) * 3:
        run = arguments(memories)
        card.begin(*arguments(other))  # which nobody waits for
        card.begin(*run)
        card.execute(*run, memories.summary)
        np.testing.assert_array_equal(run[1], expected)
        card.begin(*arguments(other))  # not what is executed
        run = arguments(memories)
        card.execute(*run, memories.summary)
        np.testing.assert_array_equal(run[1], expected)
    kv, job, queue, n_jobs = arguments(first)
    card.begin(kv, job, len(job), n_jobs)
    with pytest.raises(ValueError, match="queue"):
        card.execute(kv, job, len(job), n_jobs, first.summary)
    card.begin(*arguments(first))
    card.close()
    card.begin(*arguments(first))
    with pytest.raises(ValueError, match="closed"):
        card.execute(*arguments(first), first.summary)


def test_other_python_threads_run_during_a_slice(monkeypatch):
    """One of them closes the card: a slice that held the interpreter's lock would end first."""
    monkeypatch.setattr(twin, "_SLICE_S", 600.0)
    rng = np.random.default_rng(27)
    memories = workload.place([small(rng, n_tokens=20_000, group_size=8)], rng).repeated(500)
    with TwinCard(CONFIG, path="portable", threads=1) as card, ThreadPoolExecutor(1) as pool:
        began = threading.Event()

        def run():
            began.set()
            memories.execute(card)

        running = pool.submit(run)
        began.wait()
        card.close()
        # ValueError: closed before the run began
        assert isinstance(running.exception(), ClosedError | ValueError)


def test_cards_run_at_the_same_time():
    rng = np.random.default_rng(22)
    memories = [workload.place([small(rng, n_tokens=3000)], rng) for _ in range(4)]

    def run(one):
        with TwinCard(CONFIG, threads=2) as card:
            return [one.execute(card) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for one, results in zip(memories, pool.map(run, memories), strict=True):
            want = one.execute(ModelCard(CONFIG))
            for got in results:
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_crc_of_any_length(path):
    if path not in twin.supported_paths():
        pytest.skip(f"this processor does not have the instructions of the path {path}")
    rng = np.random.default_rng(23)
    data = rng.integers(0, 256, 40_000, dtype=np.uint8)
    for n in [*range(70), 127, 383, 384, 511, 512, 513, 767, 768, 3071, 3072, 8192, 39_999]:
        part = data[1 : n + 1].copy()
        assert twin.crc32c(path, part) == google_crc32c.value(part.tobytes()), n
        assert twin.crc32c(path, part, 77) == google_crc32c.extend(77, part.tobytes()), n


def test_open_card_opens_it_and_attends_as_the_model_does():
    rng = np.random.default_rng(24)
    q = rng.standard_normal((6, 64)).astype(np.float16)
    k, v = rng.standard_normal((2, 300, 2, 64)).astype(np.float16)
    results = []
    for name in ("model", "twin"):
        with nearkv.open_card(name) as card:
            results.append(nearkv.attend(q, k, v, card=card))
    for twins, models in zip(*results, strict=True):
        np.testing.assert_array_equal(twins, models)


def test_a_missing_native_part_is_named_with_the_command_that_compiles_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TwinError, match="not compiled.*make setup"):
        twin.load.__wrapped__()


def test_a_stale_native_part_is_refused(monkeypatch):
    monkeypatch.setattr(twin, "identity", lambda: "another")
    with pytest.raises(TwinError, match="other sources.*make setup"):
        twin.load.__wrapped__()


@pytest.mark.parametrize("options", [{"threads": 0}, {"path": "sse"}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        TwinCard(CONFIG, **options)
