# SPDX-License-Identifier: Apache-2.0
"""The real PYNQ on the real XRT, with simulated cards under them."""

import gc

import numpy as np
import pytest

import nearkv
from nearkv.cards import open_card
from nearkv_sim import xrt
from nearkv_sim.xrt import Simulation

pytest.importorskip("pynq", reason="needs PYNQ; install it with: pip install 'nearkv[pynq]'")
pytestmark = pytest.mark.skipif(bool(xrt.missing()), reason=xrt.missing())
SMALL = {"kv_bytes": 1 << 20, "job_bytes": 1 << 18}


@pytest.fixture
def simulate(monkeypatch):
    """simulate(...) is a Simulation in whose environment this process is."""
    opened = []

    def start(*args, **options):
        opened.append(Simulation(*args, **{"config": "tiny"} | options))
        for name, value in opened[-1].environment.items():
            monkeypatch.setenv(name, value)
        return opened[-1]

    yield start
    gc.collect()  # cards that a failed test has left open
    for simulation in opened:
        simulation.close()


def _inputs(tokens=100, heads=2, kv_heads=1, head_dim=64, kind=np.float16):
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((heads, head_dim)).astype(kind)
    k, v = rng.standard_normal((2, tokens, kv_heads, head_dim)).astype(kind)
    return q, k, v


def test_the_card_pynq_answers_as_the_twin(simulate, reader_kind):
    (simulated,) = simulate().cards
    with (
        open_card("twin", config="tiny") as twin,
        open_card("pynq:0", reader=reader_kind, **SMALL) as card,
    ):
        assert (card.rows, card.max_head_dim) == (2, 64)
        for shape in ({}, {"tokens": 700, "heads": 8, "kv_heads": 2}):
            inputs = _inputs(**shape)
            expected = nearkv.attend(*inputs, card=twin)
            for ours, theirs in zip(nearkv.attend(*inputs, card=card), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert simulated.units[0].runs >= 2
    assert not simulated.complaints
