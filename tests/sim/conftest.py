# SPDX-License-Identifier: Apache-2.0
"""Simulated cards and the model they must equal."""

import numpy as np
import pytest

from nearkv_hw.config import preset
from nearkv_sim import rtl
from nearkv_sim.model import ModelCard
from nearkv_sim.workload import Memories


@pytest.fixture(scope="session")
def tools():
    """Skips where the simulator, or what it needs, is not installed."""
    try:
        return rtl.verilator_environment()
    except rtl.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def open_rtl(tools):
    """RtlCard(preset name, options), closed after the test."""
    cards = []

    def opener(name="smartssd", **options):
        cards.append(rtl.RtlCard(preset(name), **options))
        return cards[-1]

    yield opener
    for card in cards:
        card.close()


@pytest.fixture
def assert_equals_model(request):
    """Runs a queue on a card and on the model: every byte of job memory must be the same."""

    def check(card, memories: Memories) -> np.ndarray:
        model = ModelCard(card.config)
        want = memories.untimed(memories.execute(model))
        got = memories.execute(card, timeout_s=1800)  # only a hang takes as long
        for i in range(memories.n_jobs):
            assert memories.partial(got, i) == memories.partial(want, i), f"job {i}"
        summary = memories.summary_of(memories.untimed(got))
        assert summary == memories.summary_of(want)
        np.testing.assert_array_equal(memories.untimed(got), want)
        if isinstance(card, rtl.RtlCard):
            request.config.coverage.add(memories, got, model.tile_maxima, card.stalls)
        return got

    return check
