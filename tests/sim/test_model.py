# SPDX-License-Identifier: Apache-2.0
"""The card `model` against attention from its definition, within the derived bound."""

import math

import numpy as np
import pytest

from nearkv_hw import align, number, pages, products
from nearkv_hw.abi import KvType
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


def shares_of_the_bound(q, k, v, kv_dtype, card="model", scale=None):
    """Errors over what the bound allows: of out, its largest element by element; of the log-sum-exp.

    One group: q (group, head_dim); k, v (kv_len, 1, head_dim), rounded already.
    """
    import nearkv

    with nearkv.open_card(card) as opened:
        out, lse_ln = nearkv.attend(q, k, v, card=opened, kv_dtype=kv_dtype, scale=scale)
    want_out, want_lse = reference.attention(q, k, v, scale)
    kv_type = KvType[kv_dtype.upper()]
    head_dim, factor = q.shape[1], (scale or q.shape[1] ** -0.5) * math.log2(math.e)
    product_max = (np.abs(q).max(axis=0) * np.abs(k[:, 0]).max(axis=0)).max() * factor
    bound = number.error_bound(head_dim, len(k), float(product_max))
    keys, values = k[:, 0].astype(np.float64), v[:, 0].astype(np.float64)
    # What leaves `attend` is rounded to float32 once.
    rounding = 2.0**-24
    share = 0.0
    for head in range(len(q)):
        score = keys @ q[head].astype(np.float64) * factor
        allowed = bound.out_error(np.exp2(score - score.max()), values, kv_type)
        v_max = max(np.abs(values).max(), number.KV_FORMATS[kv_type].smallest_normal)
        assert (allowed <= bound.out * v_max * (1 + 1e-9)).all()
        allowed = allowed + rounding * np.abs(want_out[head]) + 2.0**-150
        share = max(share, (np.abs(out[head] - want_out[head]) / allowed).max())
    lse_share = np.abs(lse_ln - want_lse) / (bound.lse_ln + rounding * np.abs(want_lse))
    return share, lse_share.max()


@pytest.mark.parametrize("kind, kv_dtype, head_dim, group, kv_len", CASES)
def test_model_is_within_the_derived_bound_of_the_reference(
    kind, kv_dtype, head_dim, group, kv_len
):
    rng = np.random.default_rng([head_dim, group, kv_len])
    q = round_to(normal(rng, group, head_dim), kv_dtype)
    k = round_to(kind(rng, kv_len, 1, head_dim), kv_dtype)
    v = round_to(kind(rng, kv_len, 1, head_dim), kv_dtype)
    assert max(shares_of_the_bound(q, k, v, kv_dtype)) <= 1


def with_sinks(rng, group, kv_len, seen, nats, value):
    """q, k, v of one group, whose head r sees token seen[r] `nats` above the others (None: no token).

    What V holds there is `value` times that of others.
    """
    q, k = normal(rng, group, 64), normal(rng, kv_len, 64) / 8
    v = normal(rng, kv_len, 64)
    tokens = sorted({token for token in seen if token is not None})
    q[:, : len(tokens)] = k[:, : len(tokens)] = 0
    for i, token in enumerate(tokens):
        k[token] = 0
        k[token, i] = q[[head for head in range(group) if seen[head] == token], i] = (
            8 * nats
        ) ** 0.5
        v[token] *= value
    return q, k[:, None], v[:, None]


SINKS = [(nats, value) for nats in (1, 12, 13, 20, 60) for value in (0.0, 2.0**-12, 1.0, 2.0**8)]


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 3, 8, 14])
def test_sinks_are_within_the_bound_whichever_heads_see_them(group, kv_dtype):
    """All heads, one, each its own; the padding row of an odd group sees nothing."""
    for nats, value in SINKS:
        for seen in ([0] * group, [5] + [None] * (group - 1), list(range(group))):
            rng = np.random.default_rng([group, nats])
            q, k, v = (
                round_to(x, kv_dtype) for x in with_sinks(rng, group, 130, seen, nats, value)
            )
            shares = shares_of_the_bound(q, k, v, kv_dtype, card="twin")
            assert max(shares) <= 1, (nats, value, seen)


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("nats, want", [(12, 0.000780), (13, 0.000287)])
def test_a_sink_takes_nothing_from_its_neighbours(nats, want, kv_dtype):
    """A token far above 127 others and without a value: what they have is what is left."""
    import nearkv

    q, k = np.zeros((1, 32), np.float32), np.zeros((128, 1, 32), np.float32)
    q[0, 0], k[40, 0, 0] = 1, nats
    v = np.ones((128, 1, 32), np.float32)
    v[40] = 0
    for card in ("model", "twin"):
        out, _ = nearkv.attend(q, k, v, card=card, kv_dtype=kv_dtype, scale=1.0)
        exact = 127 / (127 + math.exp(nats))
        assert exact == pytest.approx(want, rel=1e-3)
        np.testing.assert_allclose(out, exact, rtol=2.0**-16)


def errors_of_products(mantissa, halvings, v, kv_type):
    """Of one block: the errors of o over the largest product, and what it is allowed for each token.

    mantissa, halvings int64 (rows, tokens); v uint16 (tokens, 32), normal numbers.
    """
    field, _ = align.fields(v, kv_type, v << 1 != 0)
    weight, exponent, base = products.model(mantissa, halvings, field)
    x = align.model(v, kv_type, base, True)
    unit = exponent - number.KV_FORMATS[kv_type].unit - number.OUT_UNIT
    o = np.ldexp((weight @ x).astype(np.float64), unit[:, None])
    p = np.ldexp(mantissa.astype(np.float64), -16 - halvings)
    values = pages.to_float32(v, kv_type).astype(np.float64)
    largest = (p[:, :, None] * np.abs(values)).max(axis=(1, 2))
    product = number.error_bound(32, 1, 1.0).product
    return np.abs(o - p @ values).max(axis=1) / largest, product * v.shape[0]


def test_the_bound_of_products_is_nearly_reached():
    """All weights of a head end on half a unit, and another head keeps the elements from yielding."""
    rng = np.random.default_rng(3)
    odd = 2 * rng.integers(1, 50, 127) + 1
    mantissa = (1 << 16) + np.stack([np.concatenate([[0], odd]), np.zeros(128, np.int64)])
    halvings = np.zeros((2, 128), np.int64)
    halvings[0, 1:] = 1
    for kv_type, form in number.KV_FORMATS.items():
        one = (1 << (form.exponent_bits - 1)) - 1 << form.mantissa_bits
        v = np.full((128, 32), one | (1 << form.mantissa_bits) - 1, np.uint16)
        v[0] = one
        error, allowed = errors_of_products(mantissa, halvings, v, kv_type)
        assert 0.95 * allowed < error[0] <= allowed
        assert error[1] == 0


@pytest.mark.parametrize("kv_type", KvType)
def test_products_are_within_their_bound(kv_type):
    rng = np.random.default_rng(4)
    form = number.KV_FORMATS[kv_type]
    for i in range(300):
        rows, tokens, spread = rng.integers(1, 9), rng.integers(1, 129), rng.integers(1, 30)
        mantissa = rng.integers(1 << 16, 1 << 17, (rows, tokens))
        halvings = rng.integers(0, 1 + rng.integers(0, 64, (rows, 1)), (rows, tokens))
        field = rng.integers(form.exponent_max - min(spread, 29), form.exponent_max, (tokens, 1))
        field = np.maximum(field - rng.integers(0, spread, (tokens, 32)), 1)
        v = rng.integers(0, 1 << form.mantissa_bits, (tokens, 32)) | field << form.mantissa_bits
        v = (v | rng.integers(0, 2, v.shape) << 15).astype(np.uint16)
        error, allowed = errors_of_products(mantissa, halvings, v, kv_type)
        assert (error <= allowed).all(), i


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
def test_subnormal_and_zero_values_are_within_the_bound(kv_dtype):
    tiny = {"fp16": 2.0**-16, "bf16": 2.0**-128}[kv_dtype]
    rng = np.random.default_rng(8)
    q, k = round_to(normal(rng, 3, 64), kv_dtype), round_to(normal(rng, 200, 1, 64), kv_dtype)
    for kind in ("subnormal", "beside normal", "zero rows", "zero"):
        v = normal(rng, 200, 1, 64) * tiny
        if kind == "beside normal":
            v[::7] /= tiny
        elif kind == "zero rows":
            v[::2], v[::5] = 0, v[::5] / tiny
        elif kind == "zero":
            v[:] = 0
        v = round_to(v, kv_dtype)
        assert max(shares_of_the_bound(q, k, v, kv_dtype, card="twin")) <= 1, kind


def test_values_as_far_apart_as_bf16_allows_are_within_the_bound():
    """A token nobody sees may have the largest product: its value makes up for it, to 63 binades."""
    rng = np.random.default_rng(9)
    for nats in (5, 40, 50):
        q, k, v = with_sinks(rng, 3, 200, [0, None, 1], nats, 2.0**-60)
        v[7::13] *= 2.0**30
        q, k, v = (bf16(x) for x in (q, k, v))
        assert max(shares_of_the_bound(q, k, v, "bf16", card="twin")) <= 1


def test_bound_is_far_below_what_would_hide_a_wrong_bit():
    bound = number.error_bound(128, 4096, 16 * 128**-0.5 * 1.4427, q_exact=True)
    assert bound.out < 5e-3
    assert bound.lse_ln < 2e-4
    assert bound.product < 2e-5
    # Of a sink whose value is nothing: relative to what is left, which a share of |v| would hide.
    weights = np.exp2(np.where(np.arange(128) == 3, 17.3, 0.0))
    v = np.where(np.arange(128) == 3, 0.0, 1.0)[:, None] * np.ones(32)
    out = weights @ v / weights.sum()
    assert (bound.out_error(weights, v, KvType.FP16) < 1e-3 * out).all()


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


def test_error_is_a_tenth_of_a_gpu_style_fp16_kernel():
    """And a quarter of the goal, which is a relative L2 error of 6e-5."""
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
    assert error <= 1.5e-5
    assert error <= gpu_error / 10
    assert np.abs(lse_ln - want_lse).max() <= 1e-4
