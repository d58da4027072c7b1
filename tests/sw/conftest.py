# SPDX-License-Identifier: Apache-2.0
"""Cards for the host's tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as nearkv.cli does, and why is said there

import pytest
import torch

import nearkv


@pytest.fixture(scope="module")
def one_thread():
    """Small models are faster on one thread, and do not suffer when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def card():
    with nearkv.open_card("model") as card:
        yield card
