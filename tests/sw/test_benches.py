# SPDX-License-Identifier: Apache-2.0
"""The benches run, small, and their records have what the README quotes."""

import json
from pathlib import Path

import pytest

from nearkv import cli

_RECORDS = Path(__file__).parents[1] / "bench"


def _run(capsys, *arguments):
    assert cli.main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("twin --head-dim 48", "head_dim must be a multiple of 32"),
        ("twin --group 99", "--group must be at most 14, not 99"),
        ("flash --head-dim 48", "head_dim must be a multiple of 32"),
        ("flash --context 100", "--context must be a multiple of a page's 128 tokens, not 100"),
        ("decode --context 100", "--context must be a multiple of a page's 128 tokens, not 100"),
        ("decode --page-tokens 100 --context 200", "page_tokens must be 32, 64, 96 or a multiple"),
        ("decode --card nosuch", "no card 'nosuch'; there are 'model', 'twin', 'rtl'"),
        ("stream --head-dim 48", "head_dim must be a multiple of 32"),
        ("stream --group 0", "--group must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(capsys, arguments, message):
    assert cli.main(["bench", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_bench_flash(capsys, tmp_path):
    figures = _run(
        capsys, "flash", "--directory", str(tmp_path), "--mib", "4", "--context", "1024",
        "--depth", "2", "--rounds", "2", "--ring-mib", "4",
    )  # fmt: skip
    assert set(figures["runs"][0]["rates"]) >= {"raw", "raw, small", "threads"}
    record = json.loads((_RECORDS / "flash.json").read_text())
    assert set(record) == set(figures)
    assert set(record["runs"][0]) == set(figures["runs"][0])
    assert "directory" not in record["arguments"]


def test_bench_decode(capsys, tmp_path):
    pytest.importorskip("torch")
    figures = _run(
        capsys, "decode", "--directory", str(tmp_path), "--context", "1024", "--layers", "2",
        "--rounds", "1", "--no-peers", "--model-context", "0", "--card", "model", "--kv-heads", "1",
    )  # fmt: skip
    names = {row["name"] for row in figures["runs"]}
    assert names >= {"drive", "twin", "nearkv", "no ring", "two cards", "spilling"}
    for name in ("decode", "decode_memory_drive"):
        record = json.loads((_RECORDS / f"{name}.json").read_text())
        assert set(record) == set(figures)
        assert "directory" not in record["arguments"]


@pytest.mark.model
def test_bench_batch(capsys, tmp_path):
    arguments = ["--directory", str(tmp_path), "--prompts", "3", "--tokens", "3", "--batch-size", "2",
                 "--rounds", "1"]  # fmt: skip
    figures = _run(capsys, "batch", *arguments, "--long", "2", "--memory", "2G")
    short, long = figures["runs"]
    assert short["prompts"] == 3
    assert short["texts_that_differ"] == 0
    assert set(short["tokens_per_s"]) == {"nearkv", "transformers"}
    assert long["kv_bytes"] == 2 * 1024 * 65536
    assert long["nearkv"]["peak_bytes"] < 2 << 30
    assert cli.main(["bench", "batch", *arguments, "--long", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 prompts of" in lines[0]
    assert "goal 0.9x" in lines[0]
    assert "0 of 3 texts differ" in lines[1]


@pytest.mark.model
def test_bench_step(capsys, tmp_path):
    arguments = ["--directory", str(tmp_path), "--context", "150", "--tokens", "2", "--rounds", "2"]
    figures = _run(capsys, "step", *arguments)
    (row,) = figures["runs"]
    assert row["context"] == 150
    parts = row["ms_a_layer"]
    assert set(parts) == {"attention", "drive", "card", "host", "attention, own"}
    assert 0 < parts["card"] < parts["attention"]
    assert 0 < parts["host"] < parts["attention"]
    assert len(row["tokens_per_s_by_round"]["nearkv"]) == 2
    assert cli.main(["bench", "step", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "behind 150 tokens" in lines[0]
    assert "the host itself" in lines[1]
    assert "goal 0.5" in lines[1]
