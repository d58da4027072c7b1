# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench twin` runs and says what it measured; not how fast this machine is."""

import json

import pytest

from nearkv import cli
from nearkv_sim import twin


def bench(*arguments: str) -> int:
    return cli.main(["bench", "twin", "--kv-mib", "1", "--rounds", "1", *arguments])


def test_json_has_every_shape_beside_its_peers(capsys):
    pytest.importorskip("torch")
    assert bench("--json", "--group", "1", "--group", "3", "--head-dim", "64") == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["crc"]) == set(twin.supported_paths())
    assert [run["group_size"] for run in figures["runs"]] == [1, 3]
    for run in figures["runs"]:
        assert run["path"] == twin.supported_paths()[0]
        assert run["of_torch"] == pytest.approx(run["twin"] / run["torch"])
        assert run["of_read"] == pytest.approx(run["twin"] / run["read"])


def test_the_table_names_the_goal_where_there_is_one(capsys):
    assert bench("--no-torch", "--group", "8", "--kv-dtype", "bf16", "--path", "portable") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:3] == ["bf16", "64", "8"]
    assert lines[-2].endswith("-")
    assert lines[-1].split()[-2] == "2"
