# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench accuracy`: its data is what it says, its peers round what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

import nearkv
from nearkv import cli
from nearkv.bench import accuracy
from nearkv_sim import reference

RECORD = Path(__file__).parents[1] / "bench" / "accuracy.json"


@pytest.mark.parametrize("nats", [4, 20])
def test_peaks_are_as_far_above_the_others_as_they_say(nats):
    kinds = {}
    for case in accuracy.sink_cases(nats):
        scores = case.k[:, 0].astype(np.float64) @ case.q.T.astype(np.float64) / 128**0.5
        top = np.sort(scores, axis=0)[-1]
        kinds.setdefault(case.name, []).append(np.abs(top - nats) < 1e-3)
    assert set(kinds) == {f"sink {nats}", f"mixed {nats}", f"peaks {nats}"}
    sees = {name: np.concatenate(seen) for name, seen in kinds.items()}
    assert sees[f"sink {nats}"].all() or nats == 4  # where another token may lie higher by chance
    assert sees[f"peaks {nats}"].all() or nats == 4
    if nats == 20:
        assert sees["mixed 20"].sum() == len(kinds["mixed 20"])  # one head of each group


def test_rounded_weights_are_all_that_is_wrong_with_the_peers(monkeypatch):
    rng = np.random.default_rng(3)
    q = rng.standard_normal((6, 64), np.float32)
    k, v = (rng.standard_normal((300, 2, 64), np.float32) for _ in "kv")
    want, _ = reference.attention(q, k, v)

    def error(p_dtype):
        return np.linalg.norm(
            accuracy.with_rounded_weights(q, k, v, p_dtype) - want
        ) / np.linalg.norm(want)

    # Half a unit in the last place of each weight: 2^-12 and 2^-9, and no more.
    assert 2**-16 < error("fp16") < 2**-11
    assert 2**-13 < error("bf16") < 2**-8
    monkeypatch.setattr(accuracy, "rounded", lambda x, dtype: x)
    assert error("fp16") < 1e-6


def test_lines_count_heads_that_are_worse_than_a_peer_and_say_which_goals_are_missed():
    ours = np.array([1e-5, 7e-5, 2e-6])
    peers = {"fp16-P": np.array([2e-5, 1e-5, 1e-6])}
    errors = accuracy.Errors("x", "fp16", 9, 6e-5, True, ours, peers)
    assert errors.worse_than("fp16-P") == 2
    assert errors.worst_ratio("fp16-P") == pytest.approx(7)
    assert len(errors.misses()) == 3
    good = accuracy.Errors("x", "fp16", 9, 6e-5, True, ours[:1], {"fp16-P": peers["fp16-P"][:1]})
    assert good.misses() == []


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
def test_gaussian_data_meets_its_goal(kv_dtype):
    with nearkv.open_card("twin") as card:
        (errors,) = accuracy.measure(iter([accuracy.gaussian_case()]), kv_dtype, card)
    assert errors.misses() == []
    assert errors.ours.shape == (32,)
    assert (errors.ours < errors.peers["fp16-P"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("nats", [12, 14, 20])
def test_sinks_meet_the_goal_of_all_other_data(nats, kv_dtype):
    """Groups of 3, 8 and 14 heads, of which all, one, or each on its own sees a sink."""
    with nearkv.open_card("twin") as card:
        lines = list(accuracy.measure(accuracy.sink_cases(nats), kv_dtype, card))
    assert [line.ours.shape for line in lines] == [(50,)] * 3
    for line in lines:
        assert line.ours.max() <= accuracy.GOAL, line.name
        assert (line.ours < line.peers["fp16-P"]).all(), line.name


def test_the_record_is_of_this_bench_and_says_what_it_misses():
    record = json.loads(RECORD.read_text())
    assert record["command"] == "nearkv bench accuracy --json"
    assert record["card"] == "twin"
    lines = {(run["name"], run["kv_dtype"]): run for run in record["runs"]}
    model = [name for name, _ in lines if name.startswith("model")]
    assert model == ["model, 1,000", "model, 8,000"] * 2
    assert len(lines) == len(record["runs"]) == 2 * (2 + 1 + 3 * len(accuracy.NATS) + 2)
    for (name, kv_dtype), run in lines.items():
        ours, peer = np.array(run["ours"]), np.array(run["fp16-P"])
        assert ours.max() <= accuracy.GOAL
        real = name in model
        errors = accuracy.Errors(
            name, kv_dtype, run["tokens"], run["goal"], real, ours, {"fp16-P": peer}
        )
        assert run["missed"] == errors.misses()
        if real:
            assert len(ours) == 270
            assert errors.worse_than("fp16-P") <= 1
    # One head whose answer is nearly one token's: the others share what bits that token leaves them.
    missed = {line: run["missed"] for line, run in lines.items() if run["missed"]}
    assert missed == {("model, 8,000", "bf16"): ["a head worse than fp16-P by more than 1.5"]}


@pytest.mark.slow
def test_the_command_prints_a_table_and_every_head_as_json(capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "NATS", (4,))
    options = ["bench", "accuracy", "--kv-dtype", "fp16", "--model-context", "0"]
    assert cli.main(options) == 0
    table = capsys.readouterr().out
    for name in ("gaussian", "sink 4", "mixed 4", "peaks 4", "outliers", "drift"):
        assert f"\n{name} " in table
    assert "goals: every head" in table
    assert cli.main([*options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    heads = {run["name"]: len(run["ours"]) for run in figures["runs"]}
    assert heads == {"gaussian": 32, "sink 4": 50, "mixed 4": 50, "peaks 4": 50, "outliers": 24,
                     "drift": 8}  # fmt: skip
    assert all(len(run["SDPA"]) == len(run["ours"]) for run in figures["runs"])


@pytest.mark.model
def test_heads_of_the_demo_model_are_those_of_its_layers():
    cases = list(accuracy.model_cases(40))
    assert len(cases) == 30
    assert all(
        case.q.shape == (9, 64) and case.k.shape == case.v.shape == (40, 3, 64) for case in cases
    )
