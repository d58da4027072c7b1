# SPDX-License-Identifier: Apache-2.0
"""vLLM over nearkv gives what stock vLLM gives.

The bound on log-probabilities. nearkv rounds K and V to fp16, and its attention may be off by the
relative L2 error that it is allowed anywhere (REL_L2_BOUND, as in tests/sw/test_generation.py). What both
do to the logits of a model is measured with transformers: K and V rounded, random errors of just that
size added to every attention output. The largest change seen, doubled because a few random directions
are not the worst ones, is what a logit may move; a log-probability moves by twice as much at most. Where
the two best tokens are nearer to each other than that, either may be chosen.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.vllm
REL_L2_BOUND = 6e-5
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()


def _prompts(rng, vocabulary: int, n_prefixes=4, n_each=8, max_tokens=24) -> list:
    """Prompts of some prefixes, mixed."""
    prompts = []
    for _ in range(n_prefixes):
        prefix = rng.integers(1, vocabulary, int(rng.integers(260, 420))).tolist()
        for _ in range(n_each):
            own = rng.integers(1, vocabulary, int(rng.integers(1, 160))).tolist()
            prompts.append([prefix + own, int(rng.integers(2, max_tokens))])
    return [prompts[i] for i in rng.permutation(len(prompts))]


def _texts(model: str) -> list:
    """The same of words, that a real model has something to say about."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(LICENSE)["input_ids"]
    rng = np.random.default_rng(0)
    prompts = []
    for n in range(4):
        prefix = ids[n * 400 : n * 400 + 270 + 40 * n]
        for _ in range(8):
            at = int(rng.integers(0, len(ids) - 200))
            prompts.append(
                [prefix + ids[at : at + int(rng.integers(1, 120))], int(rng.integers(4, 24))]
            )
    return [prompts[i] for i in rng.permutation(len(prompts))]


def _bound(path: str, sequences: list[list[int]]) -> float:
    """By how much a log-probability may move; see above."""
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    class Rounded(DynamicCache):
        def update(self, k, v, *args, **kwargs):
            return super().update(k.half().float(), v.half().float(), *args, **kwargs)

    generator = torch.Generator().manual_seed(0)

    def noisy(*args, **kwargs):
        out, _ = sdpa_attention_forward(*args, **kwargs)
        noise = torch.randn(out.shape, generator=generator)
        size = out.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return out + noise * size * REL_L2_BOUND, None

    AttentionInterface.register("noisy", noisy)
    AttentionMaskInterface.register("noisy", sdpa_mask)
    worst = 0.0
    for ids in sequences:
        ids = torch.tensor([ids])
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            exact = model(ids, past_key_values=DynamicCache(config=model.config)).logits
            model.set_attn_implementation("noisy")
            for _ in range(2):
                changed = model(ids, past_key_values=Rounded(config=model.config)).logits
                worst = max(worst, (changed - exact)[:, -64:].abs().max().item())
    assert worst < 0.02 * exact.std().item()  # or it would bound nothing
    return 4 * worst


def _compare(ours: list[dict], stock: list[dict], bound: float) -> float:
    """The largest difference of log-probabilities; tokens are the same, but for near ties."""
    worst = 0.0
    for mine, its in zip(ours, stock, strict=True):
        for at, (token, other) in enumerate(zip(mine["tokens"], its["tokens"], strict=True)):
            if token != other:  # the two are a near tie for stock vLLM, or this is an error
                assert its["logprobs"][at] - its["best"][at][str(token)] <= bound
                break  # from here on they answer different texts
            difference = abs(mine["logprobs"][at] - its["logprobs"][at])
            worst = max(worst, difference)
            assert difference <= bound
    return worst


@pytest.mark.parametrize("which", ["demo_model", "qwen3", "gemma3"])
def test_tokens_equal_those_of_stock_vllm(request, run_engines, record_property, which):
    """32 prompts with shared prefixes, in chunks, 8 at once, twice."""
    model = request.getfixturevalue(which)
    demo = which == "demo_model"
    prompts = _texts(model) if demo else _prompts(np.random.default_rng(1), 512)
    assert len(prompts) == 32
    options = {
        "model": model, "max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 256,
        "enable_prefix_caching": True, "skip_tokenizer_init": True,
    }  # fmt: skip
    engine = {"llm": options, "rounds": [prompts, prompts]}
    # Stock vLLM would share less of the prefixes of models with windows.
    more = {"kv_cache_memory_bytes": 2 << 30, "disable_hybrid_kv_cache_manager": True}
    [stock] = run_engines([{**engine, "llm": options | more}], False)
    [ours] = run_engines([engine])
    longest = sorted(range(32), key=lambda i: -len(prompts[i][0]))[: 2 if demo else 6]
    bound = _bound(model, [prompts[i][0] + stock["rounds"][0][i]["tokens"] for i in longest])
    same = total = 0
    for mine, its in zip(ours["rounds"], stock["rounds"], strict=True):
        worst = _compare(mine, its, bound)
        record_property("logprobs", f"largest difference {worst:.2e}, bound {bound:.2e}")
        same += sum(a["tokens"] == b["tokens"] for a, b in zip(mine, its, strict=True))
        total += len(mine)
        assert [a["cached"] for a in mine] == [b["cached"] for b in its]
    record_property("equal", f"{same} of {total} answers token for token")
    assert sum(one["cached"] for one in ours["rounds"][1]) > 32 * 256
    assert ours["pool"]["card_tokens"] > 0
    assert ours["pool"]["memory"] < ours["pool"]["n_blocks"] * ours["pool"]["block_bytes"] / 10


def test_small_pools_many_requests_and_long_contexts(run_engines, qwen3):
    """Preemption loses nothing; contexts are bounded by the drive; no page stays behind."""
    rng = np.random.default_rng(2)
    common = {"model": qwen3, "max_num_seqs": 8, "skip_tokenizer_init": True, "max_model_len": 4096}
    crowd = [[rng.integers(1, 512, 200 + 8 * i).tolist(), 120] for i in range(8)]
    long = [[rng.integers(1, 512, 2600).tolist(), 8] for _ in range(8)]
    short = [[rng.integers(1, 512, int(rng.integers(1, 60))).tolist(), 4] for _ in range(1000)]
    one = [[[1, 2, 3], 2]]
    chunked = {**common, "max_num_batched_tokens": 256}
    engines = [
        {
            "llm": {**chunked, "num_gpu_blocks_override": 17, "max_model_len": 512},
            "rounds": [crowd],
        },
        {"llm": {**common, "kv_cache_memory_bytes": 1 << 20}, "rounds": [long]},
        {"llm": {**common, "enable_prefix_caching": True}, "rounds": [short, one]},
        {"llm": {**chunked, "enable_prefix_caching": False}, "rounds": [crowd, one]},
    ]
    small, far, many, plain = run_engines(engines)
    stock, stock_far = run_engines(
        [
            {"llm": {**chunked, "max_model_len": 512}, "rounds": [crowd]},
            {"llm": {**common, "kv_cache_memory_bytes": 1 << 30}, "rounds": [long]},
        ],
        False,
    )
    assert small["resumed"] > 0
    bound = _bound(
        qwen3,
        [
            prompt + out["tokens"]
            for (prompt, _), out in zip(crowd, stock["rounds"][0], strict=True)
        ],
    )
    _compare(small["rounds"][0], stock["rounds"][0], bound)
    _compare(plain["rounds"][0], stock["rounds"][0], bound)
    pool = far["pool"]
    held = 8 * 2608 / 128 * pool["block_bytes"]
    assert held > 10 * pool["memory"]
    long_bound = _bound(qwen3, [long[0][0] + stock_far["rounds"][0][0]["tokens"]])
    _compare(far["rounds"][0], stock_far["rounds"][0], long_bound)
    assert many["pool"]["written"] == many["pool"]["stored"] == 0
    for after in (many["pool"], plain["pool"]):
        assert after["stored"] == 0
        assert after["in_memory"] <= 1  # of the last request, of whose end no step has told
