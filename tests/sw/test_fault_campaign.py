# SPDX-License-Identifier: Apache-2.0
"""A short run of the fault campaign (`make faults`), and whether it would notice a broken store."""

from pathlib import Path
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
_SCRIPT = Path(__file__).parents[1] / "faults.py"


def _campaign(*arguments) -> str:
    done = subprocess.run(
        [sys.executable, _SCRIPT, "--jobs", "2", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_no_fault_gives_a_wrong_answer():
    last = _campaign("--trials", "320").strip().splitlines()[-2].split()
    assert last[0] == "total"
    trials, correct, refused, failures = map(int, last[1:])
    assert failures == 0
    assert trials == correct + refused > 300
    assert correct > 100
    assert refused > 50


@pytest.mark.parametrize(
    "defect",
    ["pages-not-synced", "checksums-ignored", "read-before-written", "shared-blocks-not-counted"],
)
def test_a_store_that_is_broken_on_purpose_is_noticed(defect):
    assert "noticed after" in _campaign("--sabotage", defect, "--trials", "60")
