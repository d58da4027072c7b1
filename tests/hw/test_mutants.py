# SPDX-License-Identifier: Apache-2.0
"""The list of mutants follows the gateware: what each of them replaces is there once."""

from pathlib import Path
import runpy

import nearkv_hw


def test_each_mutant_replaces_one_piece_of_text():
    mutants = runpy.run_path(str(Path(__file__).parents[1] / "mutants.py"))["MUTANTS"]
    folder = Path(nearkv_hw.__file__).parent
    for mutant in mutants:
        count = (folder / mutant.file).read_text().count(mutant.old)
        assert count == 1, f"{mutant.file}: {mutant.old!r} is there {count} times"
