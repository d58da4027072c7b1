# SPDX-License-Identifier: Apache-2.0
"""The card `model` against attention from its definition, within the derived bound."""

import math

import numpy as np
import pytest

from nearkv_hw import number
from nearkv_sim import reference


def bf16(x):
    """float32 rounded to bf16 values."""
    import torch

    return torch.tensor(x, dtype=torch.float32).bfloat16().float().numpy()


def round_to(x, kv_dtype):
    return x.astype(np.float16) if kv_dtype == "fp16" else bf16(x)


def normal(rng, *shape):
    return rng.standard_normal(shape)


def outliers(rng, *shape):
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 1e-3, 100, 1)


def channel_scales(rng, *shape):
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 4, shape[-1:])


CASES = [
    (kind, kv_dtype, head_dim, group, kv_len)
    for kind in (normal, outliers, channel_scales)
    for kv_dtype in ("fp16", "bf16")
    for head_dim, group, kv_len in ((64, 3, 700), (128, 8, 1024), (256, 1, 333), (32, 5, 1))
]


@pytest.mark.parametrize("kind, kv_dtype, head_dim, group, kv_len", CASES)
def test_model_is_within_the_derived_bound_of_the_reference(
    kind, kv_dtype, head_dim, group, kv_len
):
    import nearkv

    rng = np.random.default_rng([head_dim, group, kv_len])
    q = round_to(normal(rng, group, head_dim), kv_dtype)
    k = round_to(kind(rng, kv_len, 1, head_dim), kv_dtype)
    v = round_to(kind(rng, kv_len, 1, head_dim), kv_dtype)
    with nearkv.open_card("model") as card:
        out, lse_ln = nearkv.attend(q, k, v, card=card, kv_dtype=kv_dtype)
    want_out, want_lse = reference.attention(q, k, v)
    product_max = (
        np.abs(q).max(axis=0) * np.abs(k[:, 0]).max(axis=0)
    ).max() * head_dim**-0.5 * math.log2(math.e)  # fmt: skip
    bound = number.error_bound(head_dim, kv_len, float(product_max))
    # What leaves `attend` is rounded to float32 once.
    rounding = 2.0**-24
    assert np.abs(out - want_out).max() <= (bound.out + rounding) * np.abs(v).max()
    assert np.abs(lse_ln - want_lse).max() <= bound.lse_ln + rounding * np.abs(want_lse).max()


def test_bound_is_far_below_what_would_hide_a_wrong_bit():
    bound = number.error_bound(128, 4096, 16 * 128**-0.5 * 1.4427, q_exact=True)
    assert bound.out < 5e-3
    assert bound.lse_ln < 2e-4


def test_reference_agrees_with_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    q, k, v = normal(rng, 6, 32), normal(rng, 50, 2, 32), normal(rng, 50, 2, 32)
    out, lse_ln = reference.attention(q, k, v)
    heads = [torch.tensor(x.swapaxes(0, 1)[None]) for x in (q[None], k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    np.testing.assert_allclose(out, want[0, :, 0].numpy(), rtol=0, atol=1e-14)
    scores = torch.einsum("hd,thd->ht", torch.tensor(q), heads[1][0].mT.mT.permute(1, 0, 2)
                          .repeat_interleave(3, dim=1)) * 32**-0.5  # fmt: skip
    np.testing.assert_allclose(lse_ln, torch.logsumexp(scores, dim=1).numpy(), atol=1e-13)


def test_error_is_half_of_a_gpu_style_fp16_kernel_and_below_6e_5():
    """DESIGN goal: relative L2 error at most 6e-5, and half of a kernel that rounds P to fp16."""
    import nearkv

    rng = np.random.default_rng(7)
    q = normal(rng, 32, 128).astype(np.float16)
    k, v = (normal(rng, 4096, 8, 128).astype(np.float16) for _ in range(2))
    want, want_lse = reference.attention(q, k, v)
    with nearkv.open_card("model") as card:
        out, lse_ln = nearkv.attend(q, k, v, card=card)

    def gpu_style(h):
        scores = (k[:, h // 4].astype(np.float32) @ q[h].astype(np.float32)) * np.float32(128**-0.5)
        p = np.exp(scores - scores.max())
        rounded = p.astype(np.float16).astype(np.float32)
        return (rounded @ v[:, h // 4].astype(np.float32)) / p.sum()

    emulated = np.stack([gpu_style(h) for h in range(32)])
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    gpu_error = np.linalg.norm(emulated - want) / np.linalg.norm(want)
    print(f"relative L2 error {error:.2e}, GPU-style emulation {gpu_error:.2e}")
    assert error <= 6e-5
    assert error <= gpu_error / 2
    assert np.abs(lse_ln - want_lse).max() <= 1e-4
