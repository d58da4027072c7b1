# SPDX-License-Identifier: Apache-2.0
"""The command, the sweep and the report."""

import argparse
import csv
import json
import re
import time

import pytest

from nearkv import plan
from nearkv_sim.system import closed_form, events, policy, report, scale
from nearkv_sim.system.describe import Work, load_machine, load_model, parameters


def call(*words) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args(words))


@pytest.mark.slow
def test_ten_thousand_points_take_no_more_calls_than_ten(monkeypatch):
    """The model works with arrays: what a sweep takes does not grow with its points, call by call."""
    model, machine = load_model("opt-66b"), load_machine("smartssd-x16")
    calls, loads = [], closed_form.loads
    monkeypatch.setattr(closed_form, "loads", lambda *a, **k: (calls.append(1), loads(*a, **k))[1])

    def n_calls(contexts, batches, cards):
        calls.clear()
        table = report.sweep(model, machine, contexts, batches=batches, cards=cards)
        n_points = len(contexts) * len(batches) * len(cards)
        assert len({(r["cards"], r["batch"], r["context"]) for r in table}) == n_points
        assert {r["system"] for r in table} == {*policy.SYSTEMS, "nearkv", "nearkv int8"}
        return len(calls)

    begin = time.process_time()
    many = n_calls([1024 * k for k in range(4, 129)], range(1, 11), range(1, 9))
    print(f"10,000 points: {time.process_time() - begin:.1f} s of the processor")
    assert many == n_calls([8192, 65536], range(1, 6), [4])


def test_nearkv_leads_every_exact_system_at_every_point_of_a_sweep():
    table = report.sweep(
        load_model("opt-66b"), load_machine("smartssd-x16"), [4096, 32768, 262144],
        batches=(1, 16), cards=(1, 4, 16),
    )  # fmt: skip
    best = {}
    for row in table:
        point = row["cards"], row["batch"], row["context"]
        if row["system"] == "nearkv":
            best[point] = row["tokens_per_s"]
    for row in table:
        if row["system"] != "instinfer-sparf":
            point = row["cards"], row["batch"], row["context"]
            assert best[point] >= row["tokens_per_s"] * (1 - 1e-6) or row["system"] == "nearkv int8"


@pytest.mark.slow
def test_the_report_needs_no_network(tmp_path):
    assert call("--model", "opt-30b", "--sweep", str(tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    assert not re.search(r"""(src|href)=["'](?!#)|<script|@import|url\((?!#)""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in set(re.findall(r'(?:href="|url\()#([^")]+)', page)):
        assert target in ids
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert tuple(rows[0]) == report.COLUMNS


@pytest.mark.slow
def test_gains_over_the_best_other_system_are_never_below_one():
    for row in report.gains(load_machine("smartssd-x16")):
        other = row["others"][row["best"]]
        assert row["int8"] >= row["fp16"] * (1 - 1e-6)
        assert row["fp16"] >= other * (1 - 1e-6), row["model"]


def test_what_if_answers_every_question(capsys):
    assert call("--context", "128k", "--batch", "16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 131072
    systems = {e["system"]: e for e in found["systems"]}
    assert set(systems) == {"nearkv", *policy.SYSTEMS}
    keys = {"tokens_per_s", "busy_seconds", "bottleneck", "step_bytes", "joules_per_token",
            "usd_per_million_tokens", "drive_years"}  # fmt: skip
    assert all(keys <= set(e) for e in systems.values())
    assert call("--model", "qwen2.5-7b", "--machine", "smartssd-x4", "--events") == 0
    assert "event by event" in capsys.readouterr().out
    assert call("--context", "128k") == 0
    text = capsys.readouterr().out
    for part in ("bottleneck", "busy in a step", "moved in a step"):
        assert part in text


@pytest.mark.slow
def test_reproduce_prints_every_row_and_its_reason(capsys):
    assert call("--reproduce") == 0
    text = capsys.readouterr().out
    assert "hilos-best" in text
    assert "fitted: small_write_seconds" in text
    assert call("--reproduce", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["fitted"]) == 3
    assert all("error" in row for row in data["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "gpt-9"), "no model 'gpt-9'"),
        (("--machine", "abacus"), "no machine 'abacus'"),
        (("--list", "--batch", "2"), "--batch makes no difference to --list; what does: --json$"),
        (("--scale", "--accuracy", "8bit"), "--accuracy makes no difference to --scale; .*--batch"),
        (("--scale", "--sparse"), "--sparse makes no difference to --scale"),
        (("--sweep", "x", "--json"), "--json makes no difference to --sweep"),
        (("--reproduce", "--model", "opt-13b"), "--model makes no difference to --reproduce"),
        (("--leave-one-out", "--min-drive-years", "0"), "--min-drive-years makes no difference"),
        (("--measure", "x.toml", "--machine", "y"), "--machine makes no difference to --measure"),
        (
            ("--kv-dir", "."),
            "--kv-dir makes no difference to a plan; what does: --model, --machine",
        ),
        (("--machine", "abacus.toml"), r"no machine 'abacus\.toml': there is no such file"),
        (("--machine", "nvme-twin-cpu", "--model", "qwen2.5-7b", "--events"), "simulates cards"),
        (("--model", "opt-175b", "--machine", "nvme-twin", "--context", "16M"), "no plan fits"),
    ],
)
def test_a_wrong_question_is_refused_in_words(words, message):
    with pytest.raises(ValueError, match=message):
        call(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--list", "--scale"), "--scale: not allowed with argument --list"),
        (("--measure", "x.json"), r"a machine file is called NAME.toml, not x\.json"),
        (("--measure", "no/such/x.toml"), r"there is no directory no/such for x\.toml"),
        (("--batch", "0"), "--batch: must be a whole number of at least 1, not '0'"),
    ],
)
def test_a_wrong_option_is_refused_in_words(words, message, capsys):
    with pytest.raises(SystemExit):
        call(*words)
    assert re.search(message, capsys.readouterr().err)


def test_lengths_are_read_as_people_write_them():
    assert plan.tokens("128k") == 131072
    assert plan.tokens("1M") == 1 << 20
    assert plan.tokens("4096") == 4096
    for bad in ("0", "-1", "1.5k", "k", "", "\u0664k", "9" * 5000):
        with pytest.raises(ValueError, match="a number of tokens such as"):
            plan.tokens(bad)


def test_scaling_stops_and_says_why():
    model, machine = load_model("qwen2.5-32b"), load_machine("smartssd-x16")
    work = Work(batch=16, context=1 << 20)
    points = scale.scale(model, machine, work, hosts=(1, 4, 64), drives=(16,))
    assert [p.hosts for p in points] == [1, 4, 64]
    rates = [p.tokens_per_s for p in points]
    assert rates == sorted(rates)
    assert points[-1].efficiency < 0.5
    assert points[-1].bottleneck == "weights"


@pytest.mark.parametrize(
    ("hosts", "mode"), [(1, "data"), (4, "data"), (4, "pipeline"), (8, "pipeline"), (4, "context")]
)
def test_a_simulated_cluster_agrees_with_the_closed_form_where_that_is_right(hosts, mode):
    """Without host time they agree; with it, the closed form hides none and the simulation some."""
    model, machine = load_model("opt-30b"), load_machine("smartssd-x16")
    work, p = Work(batch=64, context=131072), parameters()
    bare = scale.spread(
        model, machine, work, hosts, mode, p=p.with_(layer_seconds=0.0, job_seconds=0.0)
    )
    got = scale.simulate(bare, model.n_layers, micro_batches=4)
    assert got == pytest.approx(bare.tokens_per_s, rel=0.005)
    point = scale.spread(model, machine, work, hosts, mode, p=p)
    parts = point.parts
    longest = max(parts["dense"], parts["attention"], parts["layers"] + parts["jobs"])
    got = scale.simulate(point, model.n_layers, micro_batches=4)
    assert 0.97 * point.tokens_per_s <= got <= 1.01 * work.batch / longest / parts["waves"]


def test_a_simulated_cluster_shows_what_the_closed_form_hides():
    """Bubbles of a pipeline with too few micro-batches; the wait for the host with the longest span."""
    args = {"dense": 1.0, "attention": 1.0, "host": 0.0, "network": 0.0}
    full = events.simulate_cluster("pipeline", 4, 8, 12, **args)
    few = events.simulate_cluster("pipeline", 4, 8, 2, **args)
    assert full / 12 == pytest.approx(2.0)  # a host's two layers, GPU and store at once
    assert few / 2 == pytest.approx(8.0)  # two micro-batches leave most of four hosts idle
    one = events.simulate_cluster("context", 4, 8, 1, **args)
    two = events.simulate_cluster("context", 4, 8, 2, **args)
    assert one == pytest.approx(8 * 2.0)
    assert two == pytest.approx(2 * 8 * 1.0, rel=0.01)
    uneven = events.simulate_cluster("context", 4, 8, 2, **args, load=[1.6, 0.8, 0.8, 0.8])
    assert uneven == pytest.approx(1.6 * two, rel=0.01)


def test_network_time_of_a_cluster_is_on_its_ports():
    args = {"dense": 0.1, "attention": 0.1, "host": 0.0}
    assert events.simulate_cluster("context", 2, 4, 2, **args, network=1.0) == pytest.approx(8.0)
    assert events.simulate_cluster("data", 2, 4, 2, **args, network=1.0) == pytest.approx(0.8)
    hops = events.simulate_cluster("pipeline", 2, 4, 8, **args, network=1.0)
    assert hops == pytest.approx(8.0)  # eight micro-batches leave each host once


def test_a_cluster_cannot_have_more_pipeline_stages_than_layers_or_more_hosts_than_sequences():
    model, machine = load_model("qwen2.5-7b"), load_machine("smartssd-x4")
    work = Work(batch=8, context=32768)
    assert scale.spread(model, machine, work, 16, "data") is None
    assert scale.spread(model, machine, work, 16, "pipeline") is None
    assert scale.spread(model, machine, work, 16, "context") is not None
