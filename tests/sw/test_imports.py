# SPDX-License-Identifier: Apache-2.0
"""What importing nearkv may bring along."""

import ast
import doctest
import importlib
from pathlib import Path
import re
import subprocess
import sys

import numpy
import pytest

import nearkv

_ROOT = Path(nearkv.__file__).parent
_NEVER = ("amaranth", "pyxrt", "pynq", "nearkv_sim")
_ONLY_CACHE = ("torch", "transformers")
# Those that are there for what only simulation, torch or vLLM can do: loaded by name, when asked for.
_ON_DEMAND = (
    "nearkv.bench.", "nearkv.measure", "nearkv.cards.pynq", "nearkv.vllm", "nearkv.hf.attention",
    "nearkv.hf.cache", "nearkv.hf.layer", "nearkv.hf.state", "nearkv.hf.support",
    "nearkv.attention.blocks", "nearkv.batch.engine", "nearkv.batch.memory", "nearkv.batch.sampling",
)  # fmt: skip
# Who may import whom: a package sees itself and what stands before it.
_PACKAGES = ("nearkv_hw", "nearkv_sim", "nearkv")
_PARTS = ("io", "store", "cards", "attention", "hf")


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_MODULES = sorted(_module(path, _ROOT) for path in _ROOT.rglob("*.py"))


def _imported(path: Path, root: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, in functions too."""
    own = path.relative_to(root.parent).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else ()
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # By name, for importlib: "nearkv_sim.twin". Verilog and its settings are files.
            if re.fullmatch(r"nearkv\w*(\.\w+)+(?<!\.v)(?<!\.vlt)", node.value):
                found.add(node.value)
    return found


def test_imports_run_from_gateware_to_simulation_to_host_and_never_back():
    seen = 0
    for at, package in enumerate(_PACKAGES):
        root = Path(importlib.import_module(package).__file__).parent
        later = _PACKAGES[at + 1 :]
        for path in root.rglob("*.py"):
            back = {name for name in _imported(path, root) if name.split(".")[0] in later}
            assert not back, f"{path} imports {sorted(back)}"
            seen += 1
    assert seen > 50


def test_parts_of_the_host_import_only_what_stands_before_them():
    for at, part in enumerate(_PARTS):
        commands = ("batch", "bench", "cli", "doctor", "measure", "plan", "selftest", "vllm")
        later = {f"nearkv.{name}" for name in (*_PARTS[at + 1 :], *commands)}
        for path in (_ROOT / part).rglob("*.py"):
            names = {".".join(name.split(".")[:2]) for name in _imported(path, _ROOT)}
            assert not names & later, f"{path} imports {sorted(names & later)}"


def _loaded(statements: str) -> list[str]:
    """Top-level packages loaded after the statements, in a fresh interpreter."""
    code = f"{statements}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_parts_without_torch_import_without_it():
    modules = [name for name in _MODULES if not name.startswith(_ON_DEMAND)]
    loaded = _loaded("import " + ", ".join(modules))
    assert not {*_NEVER, *_ONLY_CACHE} & set(loaded)


@pytest.mark.slow
def test_no_module_imports_gateware_simulation_or_drivers():
    modules = [name for name in _MODULES if not name.startswith(_ON_DEMAND[:4])]
    loaded = _loaded("import " + ", ".join(modules))
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


@pytest.mark.parametrize(
    "name", ["attention.attend", "cards.opening", "io.shards", "attention.partial"]
)
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(f"nearkv.{name}")
    result = doctest.testmod(module, extraglobs={"np": numpy})
    assert result.attempted > 0
    assert result.failed == 0


def test_unknown_attributes_are_refused():
    with pytest.raises(AttributeError, match="NearStorage"):
        _ = nearkv.NearStorage
    assert nearkv.__version__
