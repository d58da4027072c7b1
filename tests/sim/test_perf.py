# SPDX-License-Identifier: Apache-2.0
"""The cycle model against the counters of the simulated kernel, and the goals it stands for."""

import pytest

from nearkv_hw.config import preset
from nearkv_sim import perf
from nearkv_sim.rtl import bench_stream

SHORT = ("8 x 4096", "64 x 300")


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 131072])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_predicted_cycles_per_token_meet_the_goal_at_d_128(group, length):
    shape = perf.JobShape(128, group, length)
    got = perf.predict(preset("smartssd"), [shape])
    assert got.stream_cycles / length <= 8.05
    assert got.efficiency >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_predicted_cycles_per_token_meet_the_goal_at_d_64(group):
    shape = perf.JobShape(64, group, 131072)
    assert perf.predict(preset("smartssd"), [shape]).stream_cycles / 131072 <= 4.05


def test_refresh_takes_its_share():
    dram = perf.DDR4_2400
    start, beats = 12345.0, 100_000
    share = 1 - dram.refresh_cycles / dram.refresh_interval
    assert dram.after(start, beats) - start == pytest.approx(beats / share, rel=0.002)
    # Within the working part of an interval it costs nothing.
    assert dram.after(dram.refresh_cycles, 10) == dram.refresh_cycles + 9


@pytest.mark.sim
@pytest.mark.parametrize("memory", bench_stream.NEAR)
@pytest.mark.parametrize("head_dim, group", [(64, 8), (128, 8), (128, 1), (256, 5)])
@pytest.mark.parametrize("queue", SHORT)
def test_model_predicts_the_cycles_of_the_rtl_within_1_percent(queue, head_dim, group, memory):
    row = bench_stream.measure(preset("smartssd"), queue, head_dim, group, memory)
    assert 0.99 <= row.predicted <= 1.01, row
    # The memory never waits for the kernel to ask.
    assert row.of_supply >= 0.995, row
    if memory == "ideal":
        assert row.used >= 0.99, row


@pytest.mark.sim
@pytest.mark.parametrize("head_dim, group", [(64, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("queue, memory", bench_stream.FAR)
def test_a_far_memory_is_read_at_full_rate(queue, memory, head_dim, group):
    row = bench_stream.measure(preset("smartssd"), queue, head_dim, group, memory)
    assert 0.99 <= row.predicted <= 1.01, row
    assert row.used >= (0.99 if head_dim > 64 else 0.95), row


@pytest.mark.sim
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_model_predicts_what_short_jobs_cost_in_front_of_a_far_memory(head_dim):
    """Here the job reader sets the pace."""
    row = bench_stream.measure(preset("smartssd"), "64 x 128", head_dim, 2, "600 cycles")
    assert row.used < 0.9
    assert 0.99 <= row.predicted <= 1.01, row


@pytest.mark.sim
@pytest.mark.parametrize("head_dim, group, page_tokens", [(128, 4, 32), (128, 8, 32), (32, 8, 128)])
def test_model_predicts_what_short_tiles_and_small_heads_cost(head_dim, group, page_tokens):
    """Softmax and merge take two heads a cycle: 8 of them take as long as 64 tokens of 128 channels."""
    config = preset("smartssd")
    row = bench_stream.measure(config, "64 x 300", head_dim, group, page_tokens=page_tokens)
    assert 0.99 <= row.predicted <= 1.01, row
    assert row.used >= (0.95 if group <= 4 else 0.45), row
