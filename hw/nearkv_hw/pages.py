# SPDX-License-Identifier: Apache-2.0
"""The bytes of pages: 16-bit patterns, packing into the card's layout, checksums.

K and V travel as *patterns*: uint16 arrays that hold fp16 or bf16 bit for bit, because numpy has no
bf16. `abi.PageLayout` says where each element lies and in what order the card reads it; this module
does it to whole arrays.
"""

import sys

import google_crc32c
import numpy as np

from .abi import BLOCK_TOKENS, KvType, PageLayout, Record, check_head_dim
from .number import KV_FORMATS


def record_dtype(record: Record) -> np.dtype:
    """The numpy structured type of an ABI record, so that many are read or written at once."""
    return np.dtype(
        {
            "names": [field.name for field in record.fields],
            "formats": [
                ("<" + field.code, (field.count,)) if field.count > 1 else "<" + field.code
                for field in record.fields
            ],
            "offsets": [field.offset for field in record.fields],
            "itemsize": record.bytes,
        }
    )


def parse_kv_type(kv_dtype) -> KvType:
    """KvType of a name ("fp16", "float16", "bf16", "bfloat16"), a KvType or a 16-bit float dtype.

    Raises
    ------
    ValueError
        If it is none of these; the message lists the names.
    """
    if isinstance(kv_dtype, KvType):
        return kv_dtype
    name = str(kv_dtype).removeprefix("torch.")
    names = {
        "fp16": KvType.FP16, "float16": KvType.FP16, "half": KvType.FP16,
        "bf16": KvType.BF16, "bfloat16": KvType.BF16,
    }  # fmt: skip
    if name not in names:
        raise ValueError(f'kv_dtype must be "fp16" or "bf16", not {kv_dtype!r}')
    return names[name]


def default_kv_dtype(dtype) -> str:
    """How K and V of a numpy or torch dtype are stored unless something else is asked for."""
    return "bf16" if str(dtype).endswith("bfloat16") else "fp16"


def page_channels(head_dim: int) -> int:
    """Channels that a page has for heads of this size: filled up with zeros, which change no score.

    Raises
    ------
    ValueError
        If no page has room for such heads.
    """
    channels = -(-head_dim // BLOCK_TOKENS) * BLOCK_TOKENS
    try:
        check_head_dim(channels)
    except ValueError as error:
        raise ValueError(f"heads of {head_dim} channels fit no page: {error}") from None
    return channels


def is_torch(x) -> bool:
    """Whether x is a torch tensor. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def check_real(x, name: str) -> None:
    """Raise TypeError unless x is an array of floating-point numbers, numpy's or torch's."""
    if is_torch(x):
        if x.is_floating_point():
            return
    elif x.dtype.kind == "f" or x.dtype.name == "bfloat16":
        return
    raise TypeError(
        f"{name} must be floating-point numbers (float16, bfloat16, float32, float64), not "
        f"{x.dtype}; convert it first"
    )


def to_patterns(x, kv_type: KvType, *, patterns: bool = False) -> np.ndarray:
    """Real numbers as fp16 or bf16 bit patterns, rounded to nearest, ties to even.

    Parameters
    ----------
    x : numpy (float16, float32, float64, ml_dtypes.bfloat16) or torch floating-point tensor
        Any shape; on any device.
    kv_type : KvType
    patterns : bool
        x may be patterns already: uint16 arrays are returned as they are.

    Returns
    -------
    uint16, the shape of x
        Not necessarily a copy. NaN stays NaN; what is too large becomes Inf. `first_non_finite`
        finds both.

    Raises
    ------
    TypeError
        If x is of another type.
    """
    if is_torch(x):
        import torch

        check_real(x, "x")
        kind = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}[kv_type]
        return x.detach().to("cpu", kind).contiguous().view(torch.int16).numpy().view(np.uint16)
    x = np.asarray(x)
    if patterns and x.dtype == np.uint16:
        return x
    check_real(x, "x")
    if x.dtype.name == "bfloat16" and kv_type == KvType.BF16:
        return x.view(np.uint16)
    if kv_type == KvType.FP16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def to_float32(patterns: np.ndarray, kv_type: KvType) -> np.ndarray:
    """The real numbers of fp16 or bf16 patterns, exactly: float32."""
    if kv_type == KvType.FP16:
        return patterns.view(np.float16).astype(np.float32)
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def first_non_finite(patterns: np.ndarray, kv_type: KvType) -> tuple[int, ...] | None:
    """Index of the first Inf or NaN, or None if every pattern is finite."""
    form = KV_FORMATS[kv_type]
    mask = np.uint16(form.exponent_max << form.mantissa_bits)
    bad = (patterns & mask) == mask
    if not bad.any():
        return None
    return tuple(int(i) for i in np.argwhere(bad)[0])


def cause_of_non_finite(x, at: tuple[int, ...], kv_type: KvType) -> str:
    """Why element `at` of x has become Inf or NaN in this type, and what to do about it.

    x : as for `to_patterns`, before it was rounded
    """
    value = None if x.dtype == np.uint16 else float(x[at])
    if value is None or not np.isfinite(value):
        return "the model computed it; nothing was written"
    if kv_type == KvType.BF16:
        return f"{value} is beyond bf16 (3.39e38); scale K and V down; nothing was written"
    return f"{value} is beyond fp16 (65504); store K and V as bf16: kv_dtype='bf16'"


def pack(layout: PageLayout, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
    """Lay K and V out as the card reads them.

    Parameters
    ----------
    layout : PageLayout
    k, v : uint16 (n_kv_heads, n_tokens, head_dim)
        Patterns. What is missing of the last page is filled with zeros.
    out : uint8 (n_kv_heads, n_pages, page_bytes), overwritten
    """
    n_heads, n_tokens, head_dim = k.shape
    page_tokens = layout.page_tokens
    n_pages = -(-n_tokens // page_tokens)
    missing = n_pages * page_tokens - n_tokens
    if missing:
        k, v = (np.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (k, v))
    words = out.view(np.uint16)
    part = layout.part_bytes // 2
    blocks, columns = page_tokens // BLOCK_TOKENS, head_dim // BLOCK_TOKENS
    # K: [block][token][channel] becomes [block][channel][token]
    k_part = words[..., :part].reshape(n_heads, n_pages, blocks, head_dim, BLOCK_TOKENS)
    k_part[...] = k.reshape(n_heads, n_pages, blocks, BLOCK_TOKENS, head_dim).swapaxes(3, 4)
    # V: [token][column][channel] becomes [column][token][channel]
    v_part = words[..., part:].reshape(n_heads, n_pages, columns, page_tokens, BLOCK_TOKENS)
    v_part[...] = v.reshape(n_heads, n_pages, page_tokens, columns, BLOCK_TOKENS).swapaxes(2, 3)


def unpack(layout: PageLayout, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`.

    Parameters
    ----------
    data : uint8 (n_pages, page_bytes)

    Returns
    -------
    k, v : uint16 (n_pages * page_tokens, head_dim)
    """
    words = data.view(np.uint16)
    part, head_dim = layout.part_bytes // 2, layout.head_dim
    k = words[:, :part].reshape(-1, head_dim, BLOCK_TOKENS).swapaxes(1, 2)
    v = words[:, part:].reshape(-1, head_dim // BLOCK_TOKENS, layout.page_tokens, BLOCK_TOKENS)
    return k.reshape(-1, head_dim), v.swapaxes(1, 2).reshape(-1, head_dim)


def checksums(layout: PageLayout, page: np.ndarray, page_len: int) -> tuple[int, int]:
    """CRC-32C of the K bytes and of the V bytes that the card reads, in the order it reads them.

    Parameters
    ----------
    page : uint8 (page_bytes,)
    page_len : int
        Valid tokens.
    """
    if page_len == layout.page_tokens == layout.tile_tokens:  # one tile, full: no gaps
        part = layout.part_bytes
        return google_crc32c.value(page[:part]), google_crc32c.value(page[part:])
    crcs = []
    for spans in (layout.k_spans(page_len), layout.v_spans(page_len)):
        crc = 0
        for offset, size in spans:
            crc = google_crc32c.extend(crc, page[offset : offset + size])
        crcs.append(crc)
    return crcs[0], crcs[1]
