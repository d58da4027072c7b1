# SPDX-License-Identifier: Apache-2.0
"""Cards for the host's tests."""

import pytest

import nearkv


@pytest.fixture(scope="session")
def card():
    with nearkv.open_card("model") as card:
        yield card
