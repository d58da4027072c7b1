# SPDX-License-Identifier: Apache-2.0
"""The measured machine, and the runtime's plan on it."""

import argparse
import json

import pytest

from nearkv import measure, plan
from nearkv_sim.system import describe, optimise

PROFILE = measure.Profile(
    cores=8,
    memory_bytes=32e9,
    memory_bytes_per_s=60e9,
    twin_bytes_per_s=20e9,
    torch_bytes_per_s=12e9,
    flops=0.5e12,
    layer_seconds=1e-3,
    drive_read_bytes_per_s=6e9,
    drive_write_bytes_per_s=4e9,
    drive_latency_seconds=80e-6,
    drive_free_bytes=1e12,
    gpu=None,
)


@pytest.fixture
def machine(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(PROFILE.toml("/mnt/ssd0"))
    return path


@pytest.fixture
def config():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=1000,
    )  # fmt: skip


def test_a_profile_is_a_machine_file(machine):
    found = describe.load_machine(str(machine))
    assert not found.has_gpu
    assert not found.has_cards
    assert found.host.twin_bytes_per_s == PROFILE.twin_bytes_per_s
    assert found.host.layer_seconds == PROFILE.layer_seconds
    assert found.drives.read_bytes_per_s == PROFILE.drive_read_bytes_per_s
    assert found.host.flops * describe.parameters().gemm_efficiency == pytest.approx(
        PROFILE.flops, rel=1e-3
    )


def test_a_profile_with_a_gpu_is_a_machine_with_one(tmp_path):
    gpu = {"count": 1, "flops": 3e14, "memory_bytes": 8e10, "memory_bytes_per_s": 2e12,
           "link_bytes_per_s": 2.5e10}  # fmt: skip
    path = tmp_path / "gpu.toml"
    path.write_text(measure.Profile(**{**PROFILE.as_dict(), "gpu": gpu}).toml("/mnt"))
    assert describe.load_machine(str(path)).gpu == describe.Gpu(**gpu)


@pytest.mark.parametrize("where", ["/a b", '/a"b', "/a\\b", "/a\nb", "/caf\u00e9\x7f", "/\udce9"])
def test_a_profile_loads_whatever_the_directory_is_called(tmp_path, where):
    path = tmp_path / "here.toml"
    path.write_text(PROFILE.toml(where), encoding="utf-8")
    assert describe.load_machine(str(path)).source.startswith("measured: 8 cores, drive behind /")


@pytest.mark.slow
def test_this_machine_can_be_measured_and_planned_for(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    short = measure.measure
    monkeypatch.setattr(measure, "measure", lambda directory: short(directory, mib=16))
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    path = tmp_path / "here.toml"
    words = ["--measure", str(path), "--kv-dir", str(tmp_path), "--json"]
    try:
        assert plan.run(parser.parse_args(words)) == 0
    except OSError as error:
        pytest.skip(f"no direct I/O in {tmp_path}: {error}")
    found = json.loads(capsys.readouterr().out)
    assert all(value is None or value > 0 for key, value in found.items() if key != "gpu")
    words = ["--machine", str(path), "--model", "smollm2-135m", "--context", "8k", "--batch", "4"]
    assert plan.run(parser.parse_args(words)) == 0
    assert "nearkv stores K and V in fp16" in capsys.readouterr().out


def test_the_runtimes_plan_is_the_optimisers(machine, config):
    got = plan.for_runtime(config, machine, batch=8, context=65536)
    model = describe.model_of(config)
    best = optimise.optimise(
        model, describe.load_machine(str(machine)), describe.Work(batch=8, context=65536),
        optimise.Limits(types=("fp16",)), tiers=plan.RUNTIME_TIERS,
    )  # fmt: skip
    assert got.tokens_per_s == float(best.tokens_per_s)
    assert set(got.shares) <= set(plan.RUNTIME_TIERS)
    assert sum(got.shares.values()) == pytest.approx(1)
    stored = 8 * (65536 + 64) * model.kv_bytes()
    assert got.budget_bytes == pytest.approx(got.shares["flash_cpu"] * stored, rel=1e-6)


def test_a_cache_takes_the_runtimes_plan(machine, config, tmp_path):
    from nearkv.hf.cache import NearStorageCache

    got = plan.for_runtime(
        config, machine, batch=2, context=4096, kv_dtypes=("fp16", "bf16"), card_rates=(2.0, 1.0)
    )
    with NearStorageCache(
        config, tmp_path, card=["model", "model"], **got.cache_arguments()
    ) as cache:
        assert cache.store.layout.page_tokens == got.page_tokens


def test_energy_of_a_run_is_what_its_parts_draw_for_the_time_they_work():
    from nearkv.attention import Figures

    machine = describe.load_machine("smartssd-x4")
    idle = plan.energy_joules(Figures(), machine, 10.0)
    parts = machine.host.other_watts + machine.chassis_watts + machine.host.cpu_idle_watts
    parts += machine.gpu.idle_watts
    parts += 4 * (machine.drives.idle_watts + machine.cards.idle_watts)
    assert idle == pytest.approx(10 * parts)
    work = Figures(attend_s=9.0, run_s=5.0, load_s=3.0, kv_bytes=int(60e9))  # 5 s of four drives
    got = plan.energy_joules(work, machine, 10.0) - idle
    expect = 1.0 * (machine.host.cpu_watts - machine.host.cpu_idle_watts)
    expect += 5.0 * 4 * (machine.drives.watts - machine.drives.idle_watts)
    expect += 5.0 * 4 * (machine.cards.watts - machine.cards.idle_watts)
    assert got == pytest.approx(expect)
    twin = plan.energy_joules(work, "nvme-twin-cpu", 10.0)
    host = describe.load_machine("nvme-twin-cpu").host
    assert twin > 10 * (host.other_watts + host.cpu_idle_watts)


def test_types_that_the_caller_cannot_store_are_not_planned(machine, config):
    got = plan.for_runtime(config, machine, batch=8, context=65536, kv_dtypes=("bf16",))
    assert got.kv_dtype == "bf16"
    quick = plan.for_runtime(config, machine, batch=8, context=65536, kv_dtypes=("fp16", "int8"))
    assert quick.kv_dtype == "int8"
    with pytest.raises(ValueError, match=r"unknown types \['fp12'\]"):
        plan.for_runtime(config, machine, batch=8, context=65536, kv_dtypes=("fp12",))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("OPTConfig", 0.125e9), ("LlamaConfig", 6.74e9), ("MixtralConfig", 46.7e9)],
)
def test_a_models_shape_is_read_from_its_configuration(name, parameters):
    """Each default is that of a published model."""
    transformers = pytest.importorskip("transformers")
    got = describe.model_of(getattr(transformers, name)())
    assert got.parameters == pytest.approx(parameters, rel=0.02)
