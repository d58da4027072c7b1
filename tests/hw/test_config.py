# SPDX-License-Identifier: Apache-2.0
"""Configurations that cannot be built are refused, and each has an identity."""

from dataclasses import FrozenInstanceError, fields, replace
import json
import zlib

import pytest

from nearkv_hw import abi, config
from nearkv_hw.config import PRESETS, Config, preset

GOOD = {"name": "x", "rows": 4, "max_head_dim": 128, "beat_fifo_beats": 256, "lookahead_tiles": 2}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"rows": 0}, "rows must be even and 2 .. 14, not 0"),
        ({"rows": -2}, "rows must be even"),
        ({"rows": 3}, "rows must be even.*not 3"),
        ({"rows": 16}, "rows must be even.*not 16"),
        ({"max_head_dim": 100}, "multiple of 32 up to 256, not 100"),
        ({"max_head_dim": 0}, "multiple of 32"),
        ({"max_head_dim": 288}, "multiple of 32"),
        ({"beat_fifo_beats": 300}, "power of two"),
        ({"beat_fifo_beats": 128}, "at least 256 and twice max_head_dim"),
        ({"max_head_dim": 160}, r"twice max_head_dim \(320\), not 256"),
        ({"beat_fifo_beats": 0}, "power of two"),
        ({"lookahead_tiles": 0}, "lookahead_tiles must be"),
        ({"lookahead_tiles": 4}, "lookahead_tiles must be"),
    ],
)
def test_what_cannot_be_built_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Config(**{**GOOD, **change})


def test_limits_themselves_are_legal():
    for rows in range(2, abi.MAX_ROWS + 1, 2):
        Config(**{**GOOD, "rows": rows})
    for head_dim in range(32, 257, 32):
        Config(**{**GOOD, "max_head_dim": head_dim, "beat_fifo_beats": 512})
    for lookahead_tiles in (1, 2, 3):
        Config(**{**GOOD, "lookahead_tiles": lookahead_tiles})


def test_configurations_are_frozen_and_name_their_arguments():
    with pytest.raises(FrozenInstanceError):
        PRESETS["tiny"].rows = 4
    with pytest.raises(TypeError):
        Config("x", 4)


def test_presets_are_found_by_name_and_others_are_refused_with_the_list():
    for name in PRESETS:
        assert preset(name).name == name
    with pytest.raises(ValueError, match="no configuration 'huge'; choose one of .*tiny"):
        preset("huge")


def test_the_hash_is_the_crc32_of_the_canonical_json():
    for chosen in PRESETS.values():
        values = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        text = json.dumps({**values, "abi": abi.ABI_VERSION}, sort_keys=True)
        assert chosen.hash32 == zlib.crc32(text.encode())
        assert 0 <= chosen.hash32 < 1 << 32


def test_the_hash_tells_apart_what_differs_in_any_field_or_in_the_abi(monkeypatch):
    base = Config(**GOOD)
    changes = {"name": "y", "rows": 6, "max_head_dim": 64, "beat_fifo_beats": 512,
               "lookahead_tiles": 1}  # fmt: skip
    assert set(changes) == {field.name for field in fields(Config)}
    hashes = {base.hash32, *(replace(base, **{k: v}).hash32 for k, v in changes.items())}
    assert len(hashes) == 1 + len(changes)
    assert Config(**GOOD).hash32 == base.hash32
    monkeypatch.setattr(config.abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    assert base.hash32 not in hashes
