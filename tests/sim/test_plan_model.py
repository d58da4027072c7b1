# SPDX-License-Identifier: Apache-2.0
"""The closed form and the simulation: the reference values, and each other."""

from dataclasses import replace

import numpy as np
import pytest

from nearkv_sim.system import closed_form, events, optimise, policy
from nearkv_sim.system.describe import (
    Work,
    load_machine,
    load_model,
    names,
    parameters,
)

# KV bytes per token, rho, KV per step at 32K and 128K with batch 16 in TB.
SHAPES = {
    "opt-13b": (819_200, 0.5, 0.43, 1.72),
    "opt-30b": (1_376_256, 0.5, 0.72, 2.89),
    "opt-66b": (2_359_296, 0.5, 1.24, 4.95),
    "opt-175b": (4_718_592, 0.5, 2.47, 9.90),
    "qwen2.5-32b": (262_144, 2.5, 0.14, 0.55),
    "mixtral-8x7b": (131_072, 2.0, 0.07, 0.27),
}
# Parameters as the models' names and papers have them, in units of 1e9.
SIZES = {
    "opt-30b": 30.0, "opt-66b": 65.7, "opt-175b": 174.6, "llama-2-7b": 6.74, "llama-2-70b": 69.0,
    "llama-3.1-8b": 8.03, "llama-3.1-405b": 405.9, "qwen2.5-32b": 32.8, "mixtral-8x7b": 46.7,
    "glam-143b": 143, "smollm2-135m": 0.1345,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_kv_of_a_model_is_as_in_the_reference_table(name):
    token, rho, at_32k, at_128k = SHAPES[name]
    model = load_model(name)
    assert model.kv_bytes() == token
    assert model.rho == rho
    assert 16 * 32768 * token / 1e12 == pytest.approx(at_32k, abs=0.006)
    assert 16 * 131072 * token / 1e12 == pytest.approx(at_128k, abs=0.006)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_add_up_to_the_models_size(name):
    assert load_model(name).parameters / 1e9 == pytest.approx(SIZES[name], rel=0.01)


def test_every_description_loads_and_names_its_source():
    for name in names("models"):
        assert load_model(name).source
    for name in names("machines"):
        assert load_machine(name).source
    for name, entry in parameters().entries.items():
        assert entry["kind"] in ("published", "physical", "assumed", "fitted"), name
        assert entry["source"], name


def test_an_unknown_name_or_key_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="no model 'gpt-9'.*opt-66b"):
        load_model("gpt-9")
    own = tmp_path / "mine.toml"
    own.write_text('base = "smartssd-x16"\nsource = "mine"\n[gpu]\nflop = 1\n')
    with pytest.raises(
        ValueError, match=r"mine\.toml: \[gpu\] unknown key 'flop'; known are count"
    ):
        load_machine(str(own))


def test_a_machine_of_ones_own_inherits(tmp_path):
    own = tmp_path / "mine.toml"
    own.write_text('base = "smartssd-x16"\nsource = "mine"\n[gpu]\nlink_bytes_per_s = 50e9\n')
    machine, base = load_machine(str(own)), load_machine("smartssd-x16")
    assert machine.gpu.link_bytes_per_s == 50e9
    assert machine.gpu.flops == base.gpu.flops
    assert machine.drives == base.drives


@pytest.mark.parametrize(
    ("alpha", "serial", "overlapped"),
    [(0, 38.3, 48.0), (0.25, 51.1, 54.9), (0.5, 64.0, 64.0), (0.75, 42.7, 42.7), (1, 32.0, 32.0)],
)
def test_rates_over_alpha_are_those_of_the_reference_model(alpha, serial, overlapped):
    model, machine = load_model("opt-30b"), load_machine("hilos-a100-x16")
    work = Work(batch=16, context=131072, output=0)
    bare = parameters().with_(small_write_seconds=0.0, layer_seconds=0.0, job_seconds=0.0)
    for overlap, expect in ((False, serial), (True, overlapped)):
        chosen = policy.hilos(model, machine, alpha=alpha, overlap=overlap)
        got = closed_form.loads(
            model, machine, work, chosen, chosen.shares, {"gpu": 1, "dram": 0, "flash": 0}, bare
        )
        storage = [v for k, v in got.busy.items() if k in ("drive", "p2p", "card", "uplink")]
        rate = 16 * 131072 * model.kv_bytes() / closed_form.maximum(storage) / 1e9
        assert rate == pytest.approx(expect, rel=2e-3)


@pytest.mark.parametrize("system", policy.SYSTEMS)
def test_arrays_give_what_single_points_give(system):
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    batches, contexts = np.array([1, 16, 32]), np.array([4096, 32768, 131072])
    work = Work(batch=batches, context=contexts)
    many = closed_form.estimate(model, machine, work, policy.system(system, model, machine, work))
    for i in range(3):
        one = Work(batch=int(batches[i]), context=int(contexts[i]))
        chosen = policy.system(system, model, machine, one)
        single = closed_form.estimate(model, machine, one, chosen)
        for name in ("tokens_per_s", "joules_per_token", "drive_years", "usd_per_million_tokens"):
            np.testing.assert_allclose(getattr(many, name)[i], getattr(single, name), rtol=1e-12)


def test_loads_are_linear_in_the_shares():
    model, machine, work = load_model("opt-66b"), load_machine("smartssd-x16"), Work()
    chosen = policy.nearkv(shares={})

    def at(shares, weights):
        return closed_form.loads(model, machine, work, chosen, shares, weights).busy

    none = at({}, {"gpu": 0, "dram": 0, "flash": 0})
    a = at({"card": 1.0}, {"gpu": 1, "dram": 0, "flash": 0})
    b = at({"dram_x": 1.0}, {"gpu": 0, "dram": 1, "flash": 0})
    mixed = at({"card": 0.3, "dram_x": 0.6}, {"gpu": 0.3, "dram": 0.6, "flash": 0})
    for name in none:
        expect = none[name] + 0.3 * (a[name] - none[name]) + 0.6 * (b[name] - none[name])
        assert mixed[name] == pytest.approx(expect, rel=1e-9, abs=1e-12)


def test_one_read_at_a_time_has_the_rate_of_the_published_log():
    drives = load_machine("smartssd-x16").drives
    assert closed_form.drive_bytes_per_s(drives, 65536, 1) == pytest.approx(0.87e9)
    assert closed_form.drive_bytes_per_s(drives, 1 << 30, 1) == pytest.approx(2.15e9)


def test_reads_in_flight_give_the_published_p2p_rate_at_hilos_blocks():
    drives, p = load_machine("smartssd-x16").drives, parameters()
    rate = closed_form.drive_bytes_per_s(drives, policy.HILOS_BLOCK, p.p2p_reads_in_flight)
    assert rate == pytest.approx(3.0e9, rel=2e-3)


@pytest.mark.parametrize(("size", "published"), [(8192, 0.17e9), (32768, 0.54e9), (131072, 1.21e9)])
def test_littles_law_with_one_latency_gives_the_published_log(size, published):
    """What is done for drives without a log, done for the one that has one: within 20%."""
    drives = replace(load_machine("smartssd-x16").drives, request_bytes=(), latency_seconds=50e-6)
    assert closed_form.drive_bytes_per_s(drives, size, 1) == pytest.approx(published, rel=0.2)


def test_deep_queues_saturate_a_drive_at_its_rated_bandwidth():
    drives = load_machine("alveo-u280-pcie5").drives
    depths = np.array([1, 2, 4, 8, 16, 32])
    rates = closed_form.drive_bytes_per_s(drives, 131072, depths)
    assert (np.diff(rates) >= 0).all()
    assert rates[0] < 0.2 * rates[-1] == pytest.approx(0.2 * drives.read_bytes_per_s)


@pytest.mark.parametrize(("slots", "expect"), [(1, 125.0), (2, 100.25), (8, 100.25)])
def test_a_card_with_two_slots_hides_compute_behind_the_read(slots, expect):
    assert events.card_seconds(100, 1.0, 0.25, slots) == pytest.approx(expect)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [(1, 1), (1, 3), (3, 1), (0.1, 4), (2, 1.7)])
def test_micro_batches_overlap_as_the_closed_form_says(parts, stages):
    dense, attention = stages
    simulated = events.simulate_layers(dense, attention, parts, 12)
    formula = closed_form.pipeline_seconds(dense, attention, parts, 12)
    assert simulated == pytest.approx(float(formula), rel=0.01)


def test_the_simulation_agrees_with_the_closed_form_where_that_is_right():
    """Equal sequences, two micro-batches, many extents: within 5% of the maximum over resources."""
    model, machine = load_model("opt-13b"), load_machine("smartssd-x4")
    work = Work(batch=8, context=32768, output=0)
    for chosen in (policy.nearkv(shares={"card": 1.0}), policy.hilos(model, machine, x=False)):
        e = closed_form.estimate(model, machine, work, chosen)
        trace = events.simulate_plan(model, machine, np.full(8, 32768), e, most_extents=8)
        # Synchronous writes are not simulated.
        written = e.loads.busy["card"] if chosen.serial_card else e.loads.busy["p2p"]
        read = 8 * 32768 * model.kv_bytes()
        rate = 4 * (1 / (1 / 3.0e9 + 1 / 13.0e9)) if chosen.serial_card else 4 * 3.0e9
        assert trace.seconds == pytest.approx(read / rate, rel=0.05)
        assert trace.seconds <= written * 1.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "machine_name", "context"),
    [("opt-30b", "smartssd-x8", 65536), ("llama-3.1-70b", "alveo-u55c-x4", 65536)],
)
def test_a_plan_over_every_tier_takes_in_the_simulation_what_the_closed_form_says(
    name, machine_name, context
):
    """With four micro-batches: all that can overlap does, and of the host's time some more."""
    model, machine = load_model(name), load_machine(machine_name)
    work = Work(batch=16, context=context)
    plan = optimise.optimise(model, machine, work)
    contexts = np.full(int(plan.batch), float(work.mean_context))
    longest = float(closed_form.maximum(plan.loads.busy.values()))

    def seconds(parts):
        return events.simulate_plan(
            model, machine, contexts, plan, micro_batches=parts, most_extents=8
        ).seconds

    assert longest * 0.999 <= seconds(4) <= plan.step_seconds
    assert seconds(1) > 1.5 * seconds(4)  # one alone: GPU, then cards and CPUs


def test_spills_and_the_cpus_take_their_time_in_the_simulation():
    args = {"load_bytes_per_s": 1.0, "engine_bytes_per_s": 4.0, "extent_bytes": 0.25,
            "ring_bytes": 100}  # fmt: skip
    jobs = [[1.0, 1.0]] * 2
    alone = events.simulate(20, 2, 0.1, jobs, **args).seconds
    assert events.simulate(20, 2, 0.1, jobs, cpu=0.5, **args).seconds == pytest.approx(
        alone, rel=0.05
    )
    assert events.simulate(20, 2, 0.1, jobs, cpu=1.5, **args).seconds == pytest.approx(
        20 * 2 * 1.5, rel=0.05
    )
    spilling = events.simulate(20, 2, 0.1, jobs, spill=0.2, **args).seconds
    assert spilling == pytest.approx(1.2 * alone, rel=0.05)


def test_what_a_closed_form_hides_the_simulation_shows():
    """One micro-batch exposes the dense stage unless reads run ahead; ragged jobs leave cards idle."""
    args = {"load_bytes_per_s": 1.0, "engine_bytes_per_s": 4.0, "extent_bytes": 0.25}
    jobs = [[1.0, 1.0]]
    ahead = events.simulate(20, 1, 0.5, jobs, ring_bytes=100, **args).seconds
    short = events.simulate(20, 1, 0.5, jobs, ring_bytes=0.5, **args).seconds
    serial = events.simulate(20, 1, 0.5, jobs, ring_bytes=100, serial_card=True, **args).seconds
    assert ahead == pytest.approx(20, rel=0.05)
    assert ahead < short < serial == pytest.approx(20 * (0.5 + 1.25), rel=0.01)
    ragged = events.simulate(20, 1, 0.5, [[1.6, 0.4]], ring_bytes=100, **args).seconds
    assert ragged == pytest.approx(20 * 1.6, rel=0.05)


def test_jobs_are_dealt_evenly():
    dealt = events.deal(np.array([8, 7, 6, 5, 4, 3, 2, 1]), 4)
    assert sorted(dealt) == [9, 9, 9, 9]
    assert sum(events.deal(np.array([5.0]), 3)) == 5


def test_power_lies_between_idle_and_full():
    model, machine, work = load_model("opt-66b"), load_machine("smartssd-x16"), Work()
    for name in policy.SYSTEMS:
        e = closed_form.estimate(model, machine, work, policy.system(name, model, machine, work))
        low = machine.host.other_watts + machine.host.cpu_idle_watts + machine.gpu.idle_watts
        high = 150 + 60 + 230 + 250 + 16 * 25.1
        assert low < e.watts < high
    best = optimise.optimise(model, machine, work)
    assert low < best.watts < high
