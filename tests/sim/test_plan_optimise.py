# SPDX-License-Identifier: Apache-2.0
"""The optimiser: optimal, within its limits, never worse than what is published."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from nearkv_sim.system import closed_form, optimise, policy
from nearkv_sim.system.describe import (
    Cards,
    Drives,
    Gpu,
    Host,
    Machine,
    Model,
    Work,
    load_machine,
    load_model,
    names,
)


def log(low, high):
    return st.floats(np.log(low), np.log(high)).map(lambda v: float(np.exp(v)))


@st.composite
def machines(draw):
    n_drives = draw(st.integers(1, 64))
    read = draw(log(1e9, 15e9))
    # A shared link below a tenth of the flash behind it is no storage system anyone builds.
    uplink = n_drives * read * draw(st.floats(0.1, 1.0))
    return Machine(
        name="random",
        source="drawn",
        gpu=Gpu()
        if draw(st.integers(0, 4)) == 0
        else Gpu(
            count=1,
            flops=draw(log(50e12, 2e15)),
            memory_bytes=draw(log(16e9, 200e9)),
            memory_bytes_per_s=draw(log(0.3e12, 8e12)),
            link_bytes_per_s=draw(log(8e9, 100e9)),
        ),
        host=Host(
            memory_bytes=draw(log(128e9, 4e12)),
            memory_bytes_per_s=draw(log(50e9, 500e9)),
            attention_bytes_per_s=draw(log(10e9, 200e9)),
            twin_bytes_per_s=draw(log(1e9, 200e9)),
            flops=draw(log(0.1e12, 20e12)),
        ),
        drives=Drives(
            count=n_drives,
            read_bytes_per_s=read,
            write_bytes_per_s=read * draw(st.floats(0.3, 1.0)),
            capacity_bytes=8e12,
            write_endurance_bytes=7e15,
            uplink_bytes_per_s=uplink,
            raid=draw(st.booleans()),
        ),
        cards=Cards()
        if draw(st.integers(0, 4)) == 0
        else Cards(
            count=n_drives,
            ingest_bytes_per_s=read * draw(st.floats(0.5, 1.5)),
            engine_bytes_per_s=draw(log(2e9, 120e9)),
            memory_bytes=draw(log(2e9, 16e9)),
        ),
    )


@st.composite
def models(draw):
    n_kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    group = draw(st.sampled_from([1, 2, 4, 5, 8]))
    head_dim = draw(st.sampled_from([64, 96, 128]))
    experts = draw(st.sampled_from([1, 1, 8]))
    return Model(
        name="random",
        source="drawn",
        n_layers=draw(st.integers(4, 100)),
        hidden=n_kv_heads * group * head_dim,
        n_q_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn=4 * n_kv_heads * group * head_dim,
        ffn_matrices=draw(st.sampled_from([2, 3])),
        vocabulary=32000,
        tied_embeddings=False,
        rope=draw(st.booleans()),
        max_positions=1 << 20,
        n_experts=experts,
        experts_per_token=min(2, experts),
    )


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(machines(), models(), st.integers(1, 64), st.integers(11, 19), st.integers(16, 512))
def test_never_worse_than_a_published_policy(machine, model, batch, context_log2, output):
    work = Work(batch=batch, context=2**context_log2, output=output)
    exact = sparse = None
    for name in policy.SYSTEMS:
        other = closed_form.estimate(
            model, machine, work, policy.system(name, model, machine, work)
        )
        if not other.feasible:
            continue
        if name == "instinfer-sparf":
            sparse = sparse or optimise.optimise(model, machine, work, optimise.Limits(sparse=True))
            mine = sparse
        else:
            exact = exact or optimise.optimise(model, machine, work)
            mine = exact
        assert mine.feasible
        assert mine.tokens_per_s >= other.tokens_per_s * (1 - 1e-6), name


@pytest.mark.parametrize(("name", "system"), [("opt-66b", "hilos"), ("qwen2.5-32b", "instinfer")])
def test_without_the_tiers_of_a_system_the_plan_would_be_worse(name, system):
    """So the property has something to say: it does not hold for any plan."""
    model, machine = load_model(name), load_machine("smartssd-x16")
    work = Work(batch=16, context=131072)
    other = closed_form.estimate(
        model, machine, work, policy.system(system, model, machine, work)
    ).tokens_per_s
    tiers = {"flash_kv", "flash_cpu", "dram_kv", "dram_cpu"}
    assert optimise.optimise(model, machine, work, tiers=tiers).tokens_per_s < other
    assert optimise.optimise(model, machine, work).tokens_per_s >= other


@pytest.mark.slow
@pytest.mark.parametrize("name", names("machines"))
def test_never_worse_on_the_machines_that_come_with_the_package(name):
    machine = load_machine(name)
    for model_name in ("opt-30b", "qwen2.5-32b", "mixtral-8x7b"):
        model, work = load_model(model_name), Work(batch=8, context=8192)
        mine = optimise.optimise(model, machine, work)
        for system in policy.SYSTEMS:
            chosen = policy.system(system, model, machine, work)
            other = closed_form.estimate(model, machine, work, chosen)
            if other.feasible and system != "instinfer-sparf":
                assert mine.tokens_per_s >= other.tokens_per_s * (1 - 1e-6), (model_name, system)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["opt-66b", "qwen2.5-32b", "mixtral-8x7b", "falcon-7b"])
@pytest.mark.parametrize("machine_name", ["smartssd-x16", "nvme-twin", "hilos-a100-ssd4"])
def test_all_at_once_equals_one_at_a_time(model_name, machine_name):
    rng = np.random.default_rng(7)
    model, machine = load_model(model_name), load_machine(machine_name)
    work = Work(batch=rng.integers(1, 64, 60), context=rng.integers(2048, 1 << 20, 60))
    lp = optimise.programme(model, machine, work, policy.nearkv(), optimise.Limits())
    many = optimise.solve_many(lp)
    for i in range(60):
        one = optimise.solve(optimise.Programme(lp.cost[i], lp.upper[i], lp.bound[i], lp.equal))
        if one is None:
            assert np.isnan(many[i]).all()
        else:
            assert lp.cost[i] @ many[i] == pytest.approx(lp.cost[i] @ one, rel=1e-6)


def test_the_plan_keeps_to_every_memory():
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    work = Work(batch=16, context=65536)
    plan = optimise.optimise(model, machine, work)
    kv = float(plan.batch) * (work.context + work.output) * model.kv_bytes()
    share, weights = plan.shares, plan.weights
    dram = kv * (share["dram_kv"] + share["dram_cpu"] + model.rho * share["dram_x"])
    assert dram + weights["dram"] * model.weight_bytes <= machine.host.memory_bytes * (1 + 1e-6)
    gpu = kv * share["gpu"] + weights["gpu"] * model.weight_bytes
    assert gpu <= 0.7 * machine.gpu.memory_bytes * (1 + 1e-6)
    assert sum(share.values()) == pytest.approx(1)
    # What waits for its page to fill is in some memory.
    in_memory = sum(share[t] for t in optimise.IN_MEMORY)
    assert in_memory >= plan.policy.page_tokens / 2 / work.mean_context * (1 - 1e-6)


def test_drive_years_are_a_limit():
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    work = Work(batch=16, context=32768)
    free = optimise.optimise(model, machine, work)
    years = 3 * float(free.drive_years)
    kept = optimise.optimise(model, machine, work, optimise.Limits(min_drive_years=years))
    assert kept.drive_years >= years * (1 - 1e-3)
    assert kept.tokens_per_s < free.tokens_per_s


def test_a_type_of_kv_is_used_only_if_its_error_is_permitted():
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    work = Work(batch=16, context=131072)
    chosen = {
        limit: optimise.optimise(model, machine, work, optimise.Limits(max_error=limit))
        for limit in (0.0, 0.01, 0.2)
    }
    assert [chosen[k].policy.kv_type for k in chosen] == ["fp16", "int8", "int4"]
    rates = [float(e.tokens_per_s) for e in chosen.values()]
    assert rates == sorted(rates)


def test_what_does_not_fit_is_refused_with_sizes():
    with pytest.raises(ValueError, match="no plan fits: K and V in fp16 are .* TB"):
        optimise.optimise(
            load_model("opt-175b"), load_machine("nvme-twin"), Work(batch=64, context=1 << 24)
        )


def test_x_is_left_alone_where_it_is_larger_than_k_and_v():
    model, machine = load_model("qwen2.5-32b"), load_machine("smartssd-x16")
    plan = optimise.optimise(model, machine, Work(batch=16, context=131072))
    assert model.rho > 1
    assert plan.shares["flash_x"] == 0
    assert plan.shares["dram_x"] == 0


def test_two_micro_batches_overlap_two_stages():
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    work = Work(batch=16, context=32768)
    plan = optimise.optimise(model, machine, work)
    dense, attention = optimise.stages(plan)
    parts = optimise.micro_batches(model, work, plan)
    together = closed_form.pipeline_seconds(dense, attention, parts, model.n_layers)
    assert 2 <= parts <= 4
    assert together <= 1.01 * max(dense, attention)
