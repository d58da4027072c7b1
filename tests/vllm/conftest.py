# SPDX-License-Identifier: Apache-2.0
"""vLLM with and without nearkv, and models for both."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch

HERE = Path(__file__).parent
START_S = 600  # a start takes a minute, and longer on a machine that does other things


def environment(nearkv: bool, **more) -> dict[str, str]:
    """Of a process with vLLM."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_", "NEARKV"))
    }
    return kept | {
        "NEARKV": "on" if nearkv else "off",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Small models: threads that wait for each other are slower than one.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **more,
    }


@pytest.fixture(scope="session")
def run_engines(tmp_path_factory):
    """run_engines(engines, nearkv=True, **variables): see engine.py."""

    def run(engines: list[dict], nearkv: bool = True, **variables) -> list[dict]:
        folder = tmp_path_factory.mktemp("engines")
        (folder / "in.json").write_text(json.dumps(engines))
        kv = folder / "kv"
        kv.mkdir()
        done = subprocess.run(
            [sys.executable, HERE / "engine.py", folder / "in.json", folder / "out.json"],
            env=environment(nearkv, NEARKV_DIRECTORY=str(kv), **variables),
            capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert not list(kv.iterdir())  # nothing is left
        return json.loads((folder / "out.json").read_text())

    return run


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """Of a process with vLLM over nearkv."""
    return environment(True)


@pytest.fixture(scope="session")
def demo_model() -> str:
    from nearkv.hf import models

    return str(models.converted(models.demo_gguf()))


def _save(config, directory: Path) -> str:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return str(directory)


TINY = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "vocab_size": 512, "initializer_range": 0.1, "max_position_embeddings": 8192, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> str:
    """Random weights; 3 layers of heads of 64 channels, with norms of q and k."""
    from transformers import Qwen3Config

    config = Qwen3Config(**TINY, head_dim=64, num_hidden_layers=3)
    return _save(config, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory) -> str:
    """Random weights; 5 layers, of which the third and the last see all and the others 200 positions."""
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **TINY, head_dim=64, num_hidden_layers=5, sliding_window=200, query_pre_attn_scalar=64,
        layer_types=[*kinds, kinds[0], kinds[2]],
    )  # fmt: skip
    return _save(config, tmp_path_factory.mktemp("gemma3"))
