# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench twin` runs and says what it measured; not how fast this machine is."""

from dataclasses import fields
import json
from pathlib import Path
import sys

import pytest

from nearkv import bench, cli
from nearkv.bench import twin as bench_twin
from nearkv_sim import twin

RECORD = Path(__file__).parents[1] / "bench" / "twin.json"


def run(*arguments: str) -> int:
    return cli.main(["bench", "twin", "--kv-mib", "1", "--rounds", "1", *arguments])


@pytest.mark.slow
def test_json_has_every_shape_beside_its_peers(capsys):
    pytest.importorskip("torch")
    shapes = ("--group", "1", "--group", "3", "--head-dim", "64", "--kv-dtype", "bf16")
    assert run("--json", "--threads", "1", "--threads", "2", *shapes) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["crc"]) == set(twin.supported_paths())
    of = figures["error"]["bf16"]
    assert of["twin"] < 1e-4 < of["torch"] < of["matmul"] < 0.1
    shapes = [(run["threads"], run["group_size"]) for run in figures["runs"]]
    assert shapes == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for run_ in figures["runs"]:
        assert run_["path"] == twin.supported_paths()[0]
        assert run_["cores"] > 0
        # One turn, so the ratio is that of the rates.
        assert run_["of_torch"] == pytest.approx(run_["twin"] / run_["torch"], rel=1e-4)
        assert run_["of_matmul"] == pytest.approx(run_["twin"] / run_["matmul"], rel=1e-4)
        assert run_["of_read"] == pytest.approx(run_["twin"] / run_["read"], rel=1e-4)


def test_the_table_names_the_goal_where_there_is_one(capsys):
    assert (
        run(
            "--no-torch", "--group", "8", "--kv-dtype", "bf16", "--path", "portable",
            "--threads", "1",
        ) == 0
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:4] == ["bf16", "64", "8", "1"]
    assert lines[-2].endswith("-")
    assert lines[-1].split()[-2] == "2"
    assert lines[-1].split()[-1] in ("met", "missed")


def test_the_record_is_of_this_bench_and_meets_the_goals():
    record = json.loads(RECORD.read_text())
    assert record["command"] == "nearkv bench twin --json"
    names = {field.name for field in fields(bench_twin.Figures)}
    alone = [run for run in record["runs"] if run["threads"] == 1]
    shapes = {(run["kv_type"], run["head_dim"], run["group_size"]) for run in alone}
    assert len(shapes) == len(alone) == 2 * 2 * 5
    for run in record["runs"]:
        assert set(run) == names
    for run in alone:
        assert run["of_torch"] >= 1
        assert run["goal"] is None or run["twin"] >= run["goal"]
    for path, rate in record["crc"].items():
        assert path == "portable" or rate >= bench_twin.CRC_GOAL


@pytest.mark.parametrize("suffix", bench.PLOT_SUFFIXES)
def test_the_figures_can_be_plotted(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="pip install 'nearkv[plan]'")
    path = tmp_path / f"twin{suffix}"
    assert run("--no-torch", "--group", "1", "--threads", "1", "--plot", str(path)) == 0
    beginning = {".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!doctype html>"}[suffix]
    assert path.read_bytes().startswith(beginning)


def test_a_plot_names_what_is_missing(tmp_path, monkeypatch):
    def plot(name="x.png", values=(1.0,)):
        bench.plot_bars(tmp_path / name, "title", ["group"], {"twin": values}, unit="GB/s")

    with pytest.raises(ValueError, match=r"\.png, \.svg, \.html, not 'x\.pdf'"):
        plot("x.pdf")
    with pytest.raises(ValueError, match="'twin' has 2 values for 1 groups"):
        plot(values=(1.0, 2.0))
    with pytest.raises(ValueError, match="no folder .*missing"):
        plot("missing/x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'nearkv\[plan\]'"):
        plot()
