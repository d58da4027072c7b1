# SPDX-License-Identifier: Apache-2.0
"""Patterns, packing and checksums against the definitions in nearkv_hw.abi."""

import google_crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from nearkv_hw import pages
from nearkv_hw.abi import BLOCK_TOKENS, JOB, KvType, PageLayout

_LAYOUTS = [(32, 32), (64, 128), (96, 64), (128, 128), (64, 256), (256, 384)]


def _random(layout, n_heads, n_tokens, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_heads, n_tokens, layout.head_dim)
    return (rng.integers(0, 0x7C00, shape, dtype=np.uint16) for _ in "kv")


@pytest.mark.parametrize(("head_dim", "page_tokens"), _LAYOUTS)
def test_pack_puts_every_element_where_the_abi_says(head_dim, page_tokens):
    layout = PageLayout(head_dim, page_tokens)
    n_tokens = page_tokens + page_tokens // 2
    k, v = _random(layout, 2, n_tokens)
    out = np.empty((2, 2, layout.page_bytes), np.uint8)
    pages.pack(layout, k, v, out)
    words, part = out.view(np.uint16), layout.part_bytes // 2
    rng = np.random.default_rng(1)
    for _ in range(2000):
        head, token, channel = rng.integers((2, n_tokens, head_dim))
        page, t = divmod(token, page_tokens)
        block, lane = divmod(t, BLOCK_TOKENS)
        column, c = divmod(channel, BLOCK_TOKENS)
        at_k = (block * head_dim + channel) * BLOCK_TOKENS + lane
        at_v = part + (column * page_tokens + t) * BLOCK_TOKENS + c
        assert words[head, page, at_k] == k[head, token, channel]
        assert words[head, page, at_v] == v[head, token, channel]
    last_k, last_v = pages.unpack(layout, out[0, 1:])
    assert not last_k[n_tokens - page_tokens :].any()
    assert not last_v[n_tokens - page_tokens :].any()


@pytest.mark.parametrize(("head_dim", "page_tokens"), _LAYOUTS)
def test_unpack_is_the_inverse_of_pack(head_dim, page_tokens):
    layout = PageLayout(head_dim, page_tokens)
    k, v = _random(layout, 1, 2 * page_tokens)
    out = np.empty((1, 2, layout.page_bytes), np.uint8)
    pages.pack(layout, k, v, out)
    got_k, got_v = pages.unpack(layout, out[0])
    np.testing.assert_array_equal(got_k, k[0])
    np.testing.assert_array_equal(got_v, v[0])


@pytest.mark.parametrize(("head_dim", "page_tokens"), _LAYOUTS)
def test_checksums_cover_what_the_card_reads_in_its_order(head_dim, page_tokens):
    layout = PageLayout(head_dim, page_tokens)
    page = np.random.default_rng(2).integers(0, 256, layout.page_bytes, dtype=np.uint8)
    for page_len in (1, 31, 33, page_tokens - 1, page_tokens):
        expected = tuple(
            google_crc32c.value(b"".join(page[at : at + size].tobytes() for at, size in spans))
            for spans in (layout.k_spans(page_len), layout.v_spans(page_len))
        )
        assert pages.checksums(layout, page, page_len) == expected


@given(st.floats(width=32))
@settings(max_examples=500)
def test_bf16_patterns_round_as_torch_does(x):
    ours = pages.to_patterns(np.array([x], np.float32), KvType.BF16)
    torchs = pages.to_patterns(torch.tensor([x], dtype=torch.float32), KvType.BF16)
    if np.isnan(x):
        assert pages.first_non_finite(ours, KvType.BF16) == (0,)
        assert pages.first_non_finite(torchs, KvType.BF16) == (0,)
    else:
        assert ours == torchs


def test_patterns_of_all_families_agree():
    x = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    for kv_type in KvType:
        a = pages.to_patterns(x, kv_type)
        np.testing.assert_array_equal(a, pages.to_patterns(torch.from_numpy(x), kv_type))
        np.testing.assert_array_equal(a, pages.to_patterns(a, kv_type, patterns=True))
        np.testing.assert_array_equal(pages.to_patterns(pages.to_float32(a, kv_type), kv_type), a)
    assert pages.to_patterns(np.float32([1e5]), KvType.FP16) == 0x7C00
    assert pages.to_patterns(np.array([1e300]), KvType.BF16) == 0x7F80


def test_numbers_that_are_not_floating_point_are_refused():
    for x in (np.ones(3, np.uint16), np.ones(3, np.int64), np.ones(3, bool), np.ones(3, complex),
              torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.bool)):  # fmt: skip
        with pytest.raises(TypeError, match="must be floating-point numbers .*; convert it first"):
            pages.to_patterns(x, KvType.FP16)
    with pytest.raises(TypeError, match="not uint8"):
        pages.to_patterns(np.ones(3, np.uint8), KvType.FP16, patterns=True)


def test_kv_types_have_names():
    assert pages.parse_kv_type("fp16") == pages.parse_kv_type(torch.float16) == KvType.FP16
    assert pages.parse_kv_type("bf16") == pages.parse_kv_type(torch.bfloat16) == KvType.BF16
    with pytest.raises(ValueError, match='"fp16" or "bf16", not'):
        pages.parse_kv_type("int3")


def test_record_dtype_reads_what_the_record_packs():
    values = {field.name: 7 * n + 1 for n, field in enumerate(JOB.fields)}
    record = np.frombuffer(JOB.pack(**values), pages.record_dtype(JOB))[0]
    assert {name: record[name] for name in values} == values
