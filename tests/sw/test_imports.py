# SPDX-License-Identifier: Apache-2.0
"""What importing nearkv may bring along."""

import doctest
import importlib
from pathlib import Path
import subprocess
import sys

import numpy
import pytest

import nearkv

_MODULES = sorted(path.stem for path in Path(nearkv.__file__).parent.glob("*.py"))
_NEVER = ("amaranth", "pyxrt", "pynq", "nearkv_sim")
_ONLY_CACHE = ("torch", "transformers")


def _loaded(statements: str) -> list[str]:
    """Top-level packages loaded after the statements, in a fresh interpreter."""
    code = f"{statements}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_parts_without_torch_import_without_it():
    modules = [f"nearkv.{name}" for name in _MODULES if name not in ("cache", "__init__")]
    loaded = _loaded("import nearkv, " + ", ".join(modules))
    assert not {*_NEVER, *_ONLY_CACHE} & set(loaded)


@pytest.mark.slow
def test_no_module_imports_gateware_simulation_or_drivers():
    loaded = _loaded("import " + ", ".join(f"nearkv.{name}" for name in _MODULES))
    assert not set(_NEVER) & set(loaded)
    assert set(_ONLY_CACHE) <= set(loaded)  # or the test above proves nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import nearkv; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import nearkv",
    ],
)
def test_transformers_knows_nearkv_whichever_is_imported_first(imports):
    loaded = _loaded(
        f"{imports}\n"
        "from transformers import LlamaConfig\n"
        "config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1,\n"
        "    intermediate_size=64, vocab_size=64)\n"
        "AutoModelForCausalLM.from_config(config, attn_implementation='nearkv')\n"
    )
    assert "nearkv" in loaded


@pytest.mark.parametrize("name", ["attention", "card", "partial"])
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(f"nearkv.{name}")
    result = doctest.testmod(module, extraglobs={"np": numpy})
    assert result.attempted > 0
    assert result.failed == 0


def test_unknown_attributes_are_refused():
    with pytest.raises(AttributeError, match="NearStorage"):
        _ = nearkv.NearStorage
    assert nearkv.__version__
