# SPDX-License-Identifier: Apache-2.0
"""The harness notices when a kernel breaks a rule: every check of `card.cpp`, set off once."""

from pathlib import Path

import numpy as np
import pytest

from nearkv_hw import abi
from nearkv_hw.config import preset
from nearkv_sim import rtl

pytestmark = pytest.mark.sim

N_JOBS = 4
PARTIALS, SUMMARY = 4096, 2048
FAULTS = {
    1: r"m_axi_kv\.ar: burst of 64 beats at \w+ crosses a boundary of 4096",
    2: r"m_axi_kv\.ar: size is 5",
    3: r"m_axi_kv\.ar: burst type is 2",
    4: r"m_axi_kv\.ar: address \w+ is not a multiple of 64",
    5: r"m_axi_job\.w: write to job-memory offset 0x5000, which belongs to no partial",
    6: r"m_axi_job\.w: wlast is 1 with 1 beats of the burst to come",
    7: r"m_axi_kv\.ar: the payload changed while valid waited",
    8: r"m_axi_kv\.ar: valid dropped before ready",
    9: r"ap_done came before the response to the last write",
    10: r"nothing has moved on m_axi_kv and m_axi_job for 50000 cycles",
    11: r"ap_done came with 1 read bursts still under way",
    12: r"m_axi_job\.w: write to 0x1\w+, outside job memory",
    14: r"m_axi_job\.w: not every byte of a beat is written",
    15: r"s_axi_control\.r: the payload changed while valid waited",
    16: r"m_axi_kv\.ar: more than 32 bursts under way",
    17: r"m_axi_kv\.ar: id is 1",
    18: r"s_axi_control\.r: an answer that nothing asked for",
}


@pytest.fixture
def stand_in(tools, monkeypatch):
    """Cards that run stand_in.v instead of the emitted Verilog."""
    config = preset("tiny")
    text = (Path(__file__).parent / "stand_in.v").read_text()
    defines = f"`define ABI_VERSION {abi.ABI_VERSION}\n`define CONFIG_HASH 32'd{config.hash32}\n"
    monkeypatch.setattr(rtl, "emitted", lambda config: defines + text)
    cards = []

    def opener(**options):
        cards.append(rtl.RtlCard(config, **options))
        return cards[-1]

    yield opener
    for card in cards:
        card.close()


def memories(fault: int = 0):
    kv = np.random.default_rng(fault).integers(0, 256, N_JOBS * 4096, np.uint8)
    job = np.full(32768, 0x5A, np.uint8)
    for i in range(N_JOBS):
        record = abi.JOB.pack(
            page_table=0, n_pages=1, q=0, partial=PARTIALS + 128 * i, group_size=0, kv_type=0,
            head_dim=32, page_tokens=32, score_mantissa=0, score_shift=0, tag=fault,
        )  # fmt: skip
        job[i * abi.JOB.bytes :][: len(record)] = np.frombuffer(record, np.uint8)
    return kv, job


def expected(kv, job):
    want = job.copy()
    for i in range(N_JOBS):
        beats = kv[4096 * i :][:4096].reshape(64, 64)
        want[PARTIALS + 128 * i :][:64] = np.bitwise_xor.reduce(beats)
    want[SUMMARY : SUMMARY + 128] = 0
    want[SUMMARY], want[SUMMARY + 64] = 2, 3
    return want


@pytest.mark.parametrize("stalls", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("read_latency", [1, 200])
def test_a_kernel_that_keeps_the_rules_passes(stand_in, stalls, read_latency):
    card = stand_in(stalls=stalls, read_latency=read_latency)
    for _ in range(3):
        kv, job = memories()
        want = expected(kv, job)
        card.execute(kv, job, 0, N_JOBS, SUMMARY, 600)
        np.testing.assert_array_equal(job, want)
        assert card.last_run["kv_beats"] == 64 * N_JOBS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_ends_the_run_and_the_next_run_works(stand_in, fault):
    # A channel must wait for its valid to drop or its payload to change.
    stalls = 0.8 if fault in (7, 8, 15) else 0.0
    card = stand_in(stalls=stalls, write_latency=500, read_latency=500, outstanding=64)
    kv, job = memories(fault)
    with pytest.raises(rtl.SimulationError, match=FAULTS[fault]) as raised:
        card.execute(kv, job, 0, N_JOBS, SUMMARY, 600)
    assert raised.value.state["job_bursts"] >= 1
    kv, job = memories()
    want = expected(kv, job)
    card.execute(kv, job, 0, N_JOBS, SUMMARY, 600)
    np.testing.assert_array_equal(job, want)


def test_a_valid_during_reset_is_noticed(stand_in):
    card = stand_in()
    kv, job = memories(13)
    card.execute(kv, job, 0, N_JOBS, SUMMARY, 600)
    with pytest.raises(rtl.SimulationError, match="a valid is high during reset"):
        card._call("reset")


def test_pauses_take_their_share_of_the_cycles(stand_in):
    cycles = {}
    for stalls in (0.0, 0.5):
        card = stand_in(stalls=stalls, read_latency=1, seed=3)
        for _ in range(20):
            kv, job = memories()
            card.execute(kv, job, 0, N_JOBS, SUMMARY, 600)
            cycles[stalls] = cycles.get(stalls, 0) + card.last_run["cycle"]
    assert 1.5 < cycles[0.5] / cycles[0.0] < 4  # bursts come later as well


def test_memories_that_do_not_fit_are_refused(stand_in):
    card = stand_in()
    kv, job = memories()
    with pytest.raises(ValueError, match="contiguous uint8"):
        card.execute(kv[::2], job, 0, N_JOBS, SUMMARY)
    with pytest.raises(ValueError, match="contiguous uint8"):
        card.execute(kv, job.view(np.uint32), 0, N_JOBS, SUMMARY)
    with pytest.raises(ValueError, match="must lie in job memory"):
        card.execute(kv, job, 0, 10000, SUMMARY)
    with pytest.raises(ValueError, match="stalls must be"):
        stand_in(stalls=1.0)
    card.close()
    with pytest.raises(ValueError, match="closed"):
        card.read_register(0)
    card.close()
