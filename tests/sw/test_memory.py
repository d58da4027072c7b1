# SPDX-License-Identifier: Apache-2.0
"""Host memory: a long context on flash does not take it up."""

import subprocess
import sys

import pytest

# 32 k tokens of a model with 256 MiB of K and V a layer, 1.5 GiB in all. The prompt's K and V come layer
# by layer, as a prefill brings them; then 3 tokens are decoded. Prints the peak in KiB above the start.
_PROGRAM = """
import resource, sys, types
import torch
from transformers import LlamaConfig
import nearkv

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

layers, heads, head_dim, context = 6, 16, 128, 32768
config = LlamaConfig(hidden_size=64, num_attention_heads=heads, num_key_value_heads=heads,
                     head_dim=head_dim, num_hidden_layers=layers, intermediate_size=64,
                     vocab_size=64, dtype="float16")
before = peak_kib()
with nearkv.NearStorageCache(config, sys.argv[1], "twin") as cache:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, heads, context, head_dim, generator=generator, dtype=torch.float16)
    for at in range(0, context, 1024):  # a chunk at a time, as chunked prefill does
        some = k[:, :, at : at + 1024]
        cache.fill([(some, some)] * layers)
    given = k.nbytes
    del k
    module = types.SimpleNamespace(is_causal=True, training=False)
    for token in range(3):
        for layer in cache.layers:
            q, k, v = (torch.randn(1, heads, 1, head_dim, generator=generator).half() for _ in "qkv")
            layer.update(k, v)
            out = layer.attend(module, q, None, head_dim ** -0.5)
            assert torch.isfinite(out).all()
    assert cache.store.bytes_written >= 3 << 29
    assert cache.figures.kv_bytes >= 3 * (3 << 29)
    print((peak_kib() - before - given // 1024), cache.cards[0].kv_bytes)
"""


@pytest.mark.slow
def test_a_32_k_context_of_1500_mib_decodes_in_less_than_1_gib(tmp_path):
    command = [sys.executable, "-c", _PROGRAM, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    if "native part" in done.stderr:
        pytest.skip("the card twin is not compiled: make setup")
    assert done.returncode == 0, done.stderr
    peak_kib, card_bytes = map(int, done.stdout.split())
    print(f"{peak_kib >> 10} MiB above the start and the prompt's own tensor")
    assert peak_kib < 1 << 20
    assert card_bytes == 64 << 20
