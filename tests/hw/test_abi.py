# SPDX-License-Identifier: Apache-2.0
"""Records, registers and pages lie where the ABI says, and illegal shapes are refused."""

import itertools

import pytest

from nearkv_hw import abi
from nearkv_hw.abi import Field, KvType, PageLayout, Record, Status

RECORDS = (abi.JOB, abi.PAGE_ENTRY, abi.Q_RECORD, abi.PARTIAL_HEADER, abi.SUMMARY)
HEAD_DIMS = range(32, 257, 32)
PAGE_TOKENS = (32, 64, 96, *range(128, 32769, 128))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_fields_of_a_record_do_not_overlap_and_are_aligned(record):
    used = set()
    for field in record.fields:
        size = field.bits // 8
        assert field.offset % size == 0
        place = set(range(field.offset, field.offset + size * field.count))
        assert not place & used
        assert max(place) < record.bytes
        used |= place


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_records_unpack_to_what_was_packed(record, rng):
    values = {}
    for field in record.fields:
        low = -(1 << (field.bits - 1)) if field.code.islower() else 0
        draws = [low + int(rng.integers(1 << 63)) % (1 << field.bits) for _ in range(field.count)]
        draws[0] = low  # the least value of each
        values[field.name] = tuple(draws) if field.count > 1 else draws[0]
    data = record.pack(**values)
    assert len(data) == record.bytes
    assert record.unpack(data) == values
    assert record.unpack(data + b"more") == values
    for field in record.fields:
        first = values[field.name][0] if field.count > 1 else values[field.name]
        size = field.bits // 8
        raw = data[field.offset : field.offset + size]
        assert int.from_bytes(raw, "little", signed=field.code.islower()) == first


def test_records_have_the_sizes_that_the_card_reads():
    assert abi.JOB.bytes == abi.Q_RECORD.bytes == abi.PARTIAL_HEADER.bytes == abi.BEAT_BYTES
    assert abi.PAGE_ENTRY.bytes * 2 == abi.BEAT_BYTES
    assert abi.SUMMARY.bytes % abi.BEAT_BYTES == 0
    assert abi.Q_RECORD["weight"].count >= abi.MAX_ROWS
    assert abi.PARTIAL_HEADER["run_max"].count >= abi.MAX_ROWS


def test_a_value_that_does_not_fit_is_refused_by_name():
    values = dict.fromkeys((field.name for field in abi.PAGE_ENTRY.fields), 0)
    with pytest.raises(ValueError, match="page_entry.page_len must fit 1 x 32 bits, not -1"):
        abi.PAGE_ENTRY.pack(**{**values, "page_len": -1})
    with pytest.raises(ValueError, match="page_entry.crc_v must fit"):
        abi.PAGE_ENTRY.pack(**{**values, "crc_v": 1 << 32})
    with pytest.raises(TypeError, match="missing or unknown.*'extra'"):
        abi.PAGE_ENTRY.pack(**values, extra=1)
    del values["crc_k"]
    with pytest.raises(TypeError, match="missing or unknown.*'crc_k'"):
        abi.PAGE_ENTRY.pack(**values)
    with pytest.raises(KeyError, match="job has no field 'nothing'"):
        abi.JOB["nothing"]


@pytest.mark.parametrize(
    "fields, match",
    [
        ((Field("a", 0, "I", ""), Field("b", 2, "H", "")), "r.b overlaps"),
        ((Field("a", 2, "I", ""),), "r.a is not aligned"),
        ((Field("a", 0, "I", "", 3),), "r is longer than 8 bytes"),
    ],
)
def test_a_record_with_impossible_fields_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Record("r", 8, fields)


def test_registers_do_not_overlap_and_constants_follow_the_arguments():
    used = {abi.REG_CTRL, abi.REG_GIER, abi.REG_IER, abi.REG_ISR}
    for register in abi.REGISTERS:
        words = {register.offset + 4 * i for i in range(register.bits // 32)}
        assert register.offset % 4 == 0
        assert not words & used
        assert max(words) < abi.CONTROL_BYTES
        used |= words
    last_argument = max(r.offset + r.bits // 8 - 4 for r in abi.REGISTERS if r.writable)
    assert all(r.offset > last_argument for r in abi.REGISTERS if not r.writable)
    # Ref: UG1393: user arguments begin at 0x10.
    assert min(r.offset for r in abi.REGISTERS) == 0x10
    assert {r.port for r in abi.REGISTERS} == {"s_axi_control", "m_axi_kv", "m_axi_job"}


def test_page_bytes_are_a_multiple_of_4096_for_every_legal_shape():
    for head_dim, page_tokens, kv_type in itertools.product(HEAD_DIMS, PAGE_TOKENS, KvType):
        layout = PageLayout(head_dim, page_tokens, kv_type)
        assert layout.page_bytes % abi.PAGE_ALIGN_BYTES == 0
        assert layout.page_bytes == 2 * page_tokens * head_dim * kv_type.element_bytes


def lens_of(page_tokens):
    around = (0, 1, 31, 32, 33, 95, 96, 97, 127, 128, 129, 160, 255, 256, 257, page_tokens - 1)
    return sorted({n for n in (*around, page_tokens) if n <= page_tokens})


SHAPES = [(d, t, n) for d in (32, 96, 256) for t in (32, 64, 96, 128, 384) for n in lens_of(t)]


@pytest.mark.parametrize("head_dim, page_tokens, page_len", SHAPES)
def test_spans_cover_the_rows_of_valid_tokens_tile_by_tile(head_dim, page_tokens, page_len):
    layout = PageLayout(head_dim, page_tokens)
    tiles = layout.tiles(page_len)
    assert sum(tokens for _, tokens in tiles) == page_len
    assert [first for first, _ in tiles] == list(range(0, max(page_len, 1), layout.tile_tokens))
    assert all(0 < n <= abi.TILE_TOKENS for _, n in tiles) or tiles == [(0, 0)]

    def rows(spans):
        return [at + i for at, size in spans for i in range(0, size, abi.BEAT_BYTES)]

    # K, by definition: channel c of the 32 tokens from `block * 32` on is the beat at
    # (block * head_dim + c) * 64. All channels of each block with a valid token, one if empty.
    blocks = range(max(1, -(-page_len // 32)))
    k_rows = [(block * head_dim + c) * 64 for block in blocks for c in range(head_dim)]
    assert rows(layout.k_spans(page_len)) == k_rows
    # V: channels 32 c .. of a token are the beat at (c * page_tokens + token) * 64 of the V part.
    v_rows = [
        layout.part_bytes + (c * page_tokens + token) * 64
        for first, tokens in tiles
        for c in range(head_dim // 32)
        for token in range(first, first + max(1, tokens))
    ]
    assert rows(layout.v_spans(page_len)) == v_rows
    assert max(k_rows) < layout.part_bytes
    assert max(v_rows) < layout.page_bytes
    assert len(layout.k_spans(page_len)) == len(tiles)


@pytest.mark.parametrize("head_dim", [0, -32, 31, 33, 48, 288])
def test_head_dims_that_no_page_can_hold_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"multiple of 32 up to 256, not {head_dim}; pad"):
        PageLayout(head_dim)


def test_head_dim_is_held_to_the_built_maximum():
    abi.check_head_dim(64, 64)
    with pytest.raises(ValueError, match="up to 64, not 96"):
        abi.check_head_dim(96, 64)


@pytest.mark.parametrize("page_tokens", [0, -128, 1, 33, 127, 129, 160, 192, 32767, 32896])
def test_page_lengths_that_are_not_whole_tiles_are_refused(page_tokens):
    with pytest.raises(ValueError, match=f"up to 32768, not {page_tokens}"):
        PageLayout(64, page_tokens)


@pytest.mark.parametrize("group_size, rows", [(1, 2), (2, 2), (3, 4), (7, 8), (14, 14)])
def test_a_partial_has_pairs_of_rows_and_whole_beats(group_size, rows):
    assert abi.partial_rows(group_size) == rows
    for head_dim in HEAD_DIMS:
        size = abi.partial_bytes(head_dim, group_size)
        assert size % abi.BEAT_BYTES == 0
        # Header, then run_sum, run_sum_wide and out, each 16 bytes a row. No byte is left over.
        assert size == 64 + (2 + head_dim) * rows * 16


def test_status_is_described_in_words():
    assert Status(0).describe() == "no status was written"
    assert Status.DONE.describe() == "ok"
    assert "K part" in (Status.DONE | Status.BAD_CRC_K).describe()
    everything = Status(sum(Status))
    assert everything.describe().count(",") == len(Status) - 2
    assert sum(1 for flag in Status if flag & (flag - 1)) == 0
