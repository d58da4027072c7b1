# SPDX-License-Identifier: Apache-2.0
"""What host and card agree on, byte for byte: pages, page table, jobs, partials, registers.

This is the only home of these facts. Host, models, RTL, C++ harness and documentation derive from
it. Pure Python. Everything is little-endian. A *beat* is 64 bytes, one AXI data transfer.

    kv memory    a ring of page slots, filled straight from flash; read through `m_axi_kv`
    job memory   jobs, page tables, query blocks, partials, summary; through `m_axi_job`

Offsets in a record are relative to the base of the memory they name, so that the host needs no
physical address and a record cannot point into the wrong bank.
"""

import builtins
from dataclasses import dataclass
from enum import IntEnum, IntFlag
import functools
import struct

ABI_VERSION = 1

BEAT_BYTES = 64
BURST_BYTES = 4096  # AXI4 (IHI 0022, A3.4.1): a burst never crosses this boundary
PAGE_ALIGN_BYTES = 4096  # O_DIRECT reads and P2P DMA both want it
BLOCK_TOKENS = 32  # tokens of a K block (a mini-page row), channels of a V block: one 16-bit beat
TILE_TOKENS = 128  # what the accelerator's softmax handles at once
MAX_HEAD_DIM = 256
MAX_PAGE_TOKENS = 32768
MAX_TILES = 2048  # in one job: the headroom of a limb, see `number`. More tokens take several jobs
ROW_STEP = 2  # the softmax and merge datapaths handle query heads in pairs
MAX_ROWS = 14  # a query-block record has room for 15 weights; pairs make it 14
SCALE_BITS = 24  # of a job's score_mantissa
CRC_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected; RFC 3720, appendix B.4


class KvType(IntEnum):
    """How one element of K or V is stored in a page."""

    FP16 = 0
    BF16 = 1

    @property
    def element_bytes(self) -> int:
        return 2


class Status(IntFlag):
    """Status word of a partial. A partial is good if and only if it equals `DONE`."""

    DONE = 1  # the card has written this partial; the host clears the word beforehand
    BAD_CRC_K = 2  # CRC-32C of a page's K part differs from its page table entry
    BAD_CRC_V = 4
    ILLEGAL_JOB = 8  # a field of the job, or of a page table entry, is out of range
    # An AXI read was answered with SLVERR or DECERR. What came in its place may set other flags of
    # the same page too.
    BUS_ERROR = 16
    NON_FINITE = 32  # an Inf or NaN among the valid elements of K or V
    SATURATED = 64  # a score left the range of the score format (|s| > 32767 in log2 units)

    def describe(self) -> str:
        """The set flags in words, for error messages."""
        names = {
            Status.BAD_CRC_K: "CRC-32C mismatch in a K part",
            Status.BAD_CRC_V: "CRC-32C mismatch in a V part",
            Status.ILLEGAL_JOB: "illegal job or page table entry",
            Status.BUS_ERROR: "AXI bus error",
            Status.NON_FINITE: "Inf or NaN in K or V",
            Status.SATURATED: "score out of range (|s| > 32767 log2 units)",
        }
        if not self & Status.DONE:
            return "no status was written"
        return ", ".join(text for flag, text in names.items() if self & flag) or "ok"


NO_PAGE = 0xFFFFFFFF  # `bad_page` when no page is to blame


@dataclass(frozen=True)
class Field:
    """One little-endian field of a record: byte offset, struct code (B H I Q b h i q), meaning."""

    name: str
    offset: int
    code: str
    doc: str
    count: int = 1

    @property
    def bits(self) -> int:
        return 8 * struct.calcsize("<" + self.code)


@dataclass(frozen=True)
class Record:
    """A fixed-size record in job memory. Bytes that belong to no field are zero."""

    name: str
    bytes: int
    fields: tuple[Field, ...]

    def __post_init__(self):
        end = 0
        for field in self.fields:
            if field.offset < end:
                raise ValueError(f"{self.name}.{field.name} overlaps the field before it")
            if field.offset % (field.bits // 8):
                raise ValueError(f"{self.name}.{field.name} is not aligned to its size")
            end = field.offset + field.count * field.bits // 8
        if end > self.bytes:
            raise ValueError(f"{self.name} is longer than {self.bytes} bytes")

    def __getitem__(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"{self.name} has no field {name!r}")

    @functools.cached_property
    def _whole(self) -> struct.Struct:
        """All fields at once, and what lies between them."""
        code, end = "<", 0
        for field in self.fields:
            code += f"{field.offset - end}x{field.count}{field.code}"
            end = field.offset + field.count * field.bits // 8
        return struct.Struct(f"{code}{self.bytes - end}x")

    def pack(self, **values) -> builtins.bytes:
        """The record as bytes. Every field must be given; a value that does not fit raises."""
        if values.keys() != self._names:
            missing = self._names ^ values.keys()
            raise TypeError(f"{self.name}: fields missing or unknown: {sorted(missing)}")
        items = []
        for field in self.fields:
            items += values[field.name] if field.count > 1 else (values[field.name],)
        try:
            return self._whole.pack(*items)
        except struct.error:
            pass  # of which field
        out = bytearray(self.bytes)
        for field in self.fields:
            value = values[field.name]
            items = value if field.count > 1 else (value,)
            try:
                struct.pack_into(f"<{field.count}{field.code}", out, field.offset, *items)
            except struct.error as error:
                raise ValueError(
                    f"{self.name}.{field.name} must fit {field.count} x {field.bits} bits, "
                    f"not {value!r}"
                ) from error
        return bytes(out)

    def unpack(self, data) -> dict:
        """Field values of a record that starts at the first byte of `data`."""
        items, values, at = self._whole.unpack_from(data), {}, 0
        for field in self.fields:
            values[field.name] = items[at : at + field.count] if field.count > 1 else items[at]
            at += field.count
        return values

    @functools.cached_property
    def _names(self) -> set[str]:
        return {field.name for field in self.fields}


JOB = Record(
    "job",
    64,
    (
        Field("page_table", 0, "I", "job-memory offset of the page table; multiple of 64"),
        Field("n_pages", 4, "I", "page table entries, at least 1"),
        Field("q", 8, "I", "job-memory offset of the query block; multiple of 64"),
        Field("partial", 12, "I", "job-memory offset of the partial; multiple of 64"),
        Field("group_size", 16, "B", "query heads, 1 .. rows built"),
        Field("kv_type", 17, "B", "KvType"),
        Field("head_dim", 18, "H", "multiple of 32, up to the built maximum"),
        Field(
            "page_tokens",
            20,
            "H",
            f"32, 64, 96, or a multiple of {TILE_TOKENS} up to {MAX_PAGE_TOKENS}",
        ),
        Field("score_mantissa", 24, "I", f"scale * log2(e), {SCALE_BITS} bits, leading bit set"),
        Field("score_shift", 28, "h", "see number.score_scale"),
        Field("tag", 32, "I", "returned in the partial"),
    ),
)

PAGE_ENTRY = Record(
    "page_entry",
    32,
    (
        Field("address", 0, "Q", "kv-memory offset of the page; multiple of 4096"),
        Field("page_len", 8, "I", "valid tokens, 0 .. page_tokens; only the last page is ragged"),
        Field(
            "crc_k", 12, "I", "CRC-32C of the K bytes the card reads, in the order it reads them"
        ),
        Field("crc_v", 16, "I", "the same of V"),
    ),
)


@dataclass(frozen=True)
class Limit:
    """The legal values of a field: multiples of `step` from `least` to `most`.

    Attributes
    ----------
    name : str
        Of the field; or `n_tiles`, which is what `n_tiles` makes of n_pages and page_tokens.
    least : int
    most : int, str or None
        A str names what the limit is: `rows` or `max_head_dim` of the build, `page_tokens` of the
        job. None: what the field can hold.
    step : int
    coarse : int, optional
        Values from this one on are multiples of it as well.
    """

    name: str
    least: int = 0
    most: int | str | None = None
    step: int = 1
    coarse: int | None = None

    def largest(self, given: dict[str, int]) -> int | None:
        """`most` as a number; `given` has those that are named."""
        return given[self.most] if isinstance(self.most, str) else self.most

    def allows(self, value: int, given: dict[str, int]) -> bool:
        """Whether a value is legal."""
        largest = self.largest(given)
        step = self.coarse if self.coarse and value >= self.coarse else self.step
        return self.least <= value and (largest is None or value <= largest) and value % step == 0


# What makes a job, and a page table entry, legal. This is the one home of these rules: the gateware's
# logic, the twin's C++ and the functions below are made from them.
JOB_LIMITS = (
    Limit("group_size", 1, "rows"),
    Limit("kv_type", min(KvType), max(KvType)),
    Limit("head_dim", BLOCK_TOKENS, "max_head_dim", step=BLOCK_TOKENS),
    Limit("page_tokens", BLOCK_TOKENS, MAX_PAGE_TOKENS, step=BLOCK_TOKENS, coarse=TILE_TOKENS),
    Limit("score_mantissa", 1 << (SCALE_BITS - 1), (1 << SCALE_BITS) - 1),
    Limit("n_pages", 1, MAX_TILES),
    Limit("n_tiles", 0, MAX_TILES),
    Limit("q", step=BEAT_BYTES),
    Limit("page_table", step=BEAT_BYTES),
    Limit("partial", step=BEAT_BYTES),
)
PAGE_ENTRY_LIMITS = (
    Limit("address", step=PAGE_ALIGN_BYTES),
    Limit("page_len", 0, "page_tokens"),
)


def n_tiles(n_pages: int, page_tokens: int) -> int:
    """Tiles of so many full pages."""
    return n_pages * -(-page_tokens // TILE_TOKENS)


def broken_job_limit(record: dict, *, rows: int, max_head_dim: int) -> Limit | None:
    """The first limit that the fields of a job break; None if the job is legal.

    Parameters
    ----------
    record : dict
        As `JOB.unpack` returns it.
    rows, max_head_dim : int
        Of the build.
    """
    values = {**record, "n_tiles": n_tiles(record["n_pages"], record["page_tokens"])}
    return _broken(JOB_LIMITS, values, {"rows": rows, "max_head_dim": max_head_dim})


def broken_page_entry_limit(entry: dict, *, page_tokens: int) -> Limit | None:
    """The same of a page table entry, in a job with pages of so many tokens."""
    return _broken(PAGE_ENTRY_LIMITS, entry, {"page_tokens": page_tokens})


def _broken(limits: tuple[Limit, ...], values: dict, given: dict[str, int]) -> Limit | None:
    return next((x for x in limits if not x.allows(values[x.name], given)), None)


# One beat per channel r of the query block: the weights of all rows, and what they count in.
Q_RECORD = Record(
    "q_record",
    64,
    (
        Field("weight", 0, "i", "18-bit signed weight of each row; 0 beyond group_size", 15),
        Field("exponent", 60, "i", "-512 .. 511: weight 1 means 2^(exponent - 17), for all rows"),
    ),
)

PARTIAL_HEADER = Record(
    "partial_header",
    64,
    (
        Field("status", 0, "I", "Status"),
        Field("bad_page", 4, "I", "page table index of the first page to blame, or NO_PAGE"),
        Field("tag", 8, "I", "the job's tag"),
        Field("n_tokens", 12, "I", "valid tokens attended"),
        Field("run_max", 16, "h", "integer maximum of each row, log2 units; RUN_MAX_EMPTY if none",
              16),
    ),
)  # fmt: skip

# A number in the card's exact accumulator format, see `number.Wide`: limb j (28 bits, signed, at bit
# 28 * j, j = 0..3) counts 2^(16 * (top - 3 + j)); bits 112..127 hold `top`, signed.
WIDE_BYTES = 16
SUMMARY = Record(
    "summary",
    128,
    (
        Field("abi_version", 0, "I", "ABI_VERSION of the card"),
        Field("config_hash", 4, "I", "configuration hash of the card"),
        Field("n_jobs", 8, "I", "jobs answered"),
        Field("n_failed", 12, "I", "jobs whose status is not DONE alone"),
        Field("cycles", 16, "Q", "from ap_start to the last response on the write channel"),
        Field("kv_beats", 24, "Q", "beats of K and V consumed by the array"),
        Field("stream_cycles", 32, "Q", "from the first K beat to the last V beat, both included"),
        Field("starved_cycles", 40, "Q", "of these: no beat was ready"),
        Field("stalled_cycles", 48, "Q", "of these: a beat was ready and the datapath was not"),
        Field("kv_bursts", 56, "Q", "read bursts issued on m_axi_kv"),
        Field("partial_beats", 64, "Q", "beats written on m_axi_job, the summary not counted"),
        Field("error", 72, "I", "Status flags that belong to no job (queue unreadable)"),
    ),
)


@dataclass(frozen=True)
class Register:
    """One argument or constant in the AXI4-Lite block. `bits` 64 takes two words, low word first."""

    name: str
    offset: int
    bits: int
    doc: str
    port: str = "s_axi_control"
    writable: bool = True


# 0x00..0x0c: the control block of an XRT-managed kernel (UG1393, "Control Requirements").
REG_CTRL, REG_GIER, REG_IER, REG_ISR = 0x00, 0x04, 0x08, 0x0C
CTRL_START, CTRL_DONE, CTRL_IDLE, CTRL_READY = 1, 2, 4, 8
GIER_ENABLE = 1
IRQ_DONE, IRQ_READY = 1, 2  # bits of IP_IER and IP_ISR
REGISTERS = (
    Register("kv", 0x10, 64, "base of kv memory", port="m_axi_kv"),
    Register("job", 0x1C, 64, "base of job memory", port="m_axi_job"),
    Register("queue", 0x28, 32, "job-memory offset of the first job; multiple of 64"),
    Register("n_jobs", 0x30, 32, "jobs in the queue"),
    Register("summary", 0x38, 32, "job-memory offset of the summary; multiple of 64"),
    # XRT writes every word up to the last argument, so constants come after them.
    Register("abi_version", 0x40, 32, "ABI_VERSION", writable=False),
    Register("config_hash", 0x44, 32, "Config.hash32", writable=False),
)
CONTROL_BYTES = 0x1000  # address range of the block


@dataclass(frozen=True)
class PageLayout:
    """Where every element of a page lies.

    K part: for each 32-token block a mini-page `[head_dim][32]`, so K is transposed in blocks.
    V part: `[head_dim/32][page_tokens][32]`. K part first, V part right behind, no header.

    Parameters
    ----------
    head_dim : int
        Channels per head, a multiple of 32.
    page_tokens : int
        Tokens a page holds: 32, 64, 96, or a multiple of 128.
    kv_type : KvType
    """

    head_dim: int
    page_tokens: int = TILE_TOKENS
    kv_type: KvType = KvType.FP16

    def __post_init__(self):
        check_head_dim(self.head_dim)
        check_page_tokens(self.page_tokens)

    @property
    def part_bytes(self) -> int:
        """Bytes of the K part, and of the V part."""
        return self.page_tokens * self.head_dim * self.kv_type.element_bytes

    @property
    def page_bytes(self) -> int:
        """A multiple of 4096 for every legal shape."""
        return 2 * self.part_bytes

    @property
    def tile_tokens(self) -> int:
        """Tokens of a full tile of this page."""
        return min(self.page_tokens, TILE_TOKENS)

    def tiles(self, page_len: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each tile. An empty page is one tile without tokens."""
        step = self.tile_tokens
        return [(at, min(step, page_len - at)) for at in range(0, max(page_len, 1), step)]

    def k_spans(self, page_len: int) -> list[tuple[int, int]]:
        """The spans of K that the card reads, in the order it reads them.

        A span is a run of consecutive bytes: (offset in the page, bytes).
        """
        row = self.head_dim * BEAT_BYTES
        return [
            (first // BLOCK_TOKENS * row, max(1, -(-tokens // BLOCK_TOKENS)) * row)
            for first, tokens in self.tiles(page_len)
        ]

    def v_spans(self, page_len: int) -> list[tuple[int, int]]:
        """The spans of V: only rows of valid tokens are read (one row of an empty page)."""
        return [
            (self.part_bytes + (c * self.page_tokens + first) * BEAT_BYTES,
             max(1, tokens) * BEAT_BYTES)
            for first, tokens in self.tiles(page_len)
            for c in range(self.head_dim // BLOCK_TOKENS)
        ]  # fmt: skip


def partial_rows(group_size: int) -> int:
    """Rows of a partial: the group, rounded up to whole pairs."""
    return -(-group_size // ROW_STEP) * ROW_STEP


def partial_bytes(head_dim: int, group_size: int) -> int:
    """Bytes of a partial, whole beats.

    Header, then Wide numbers `[2 + head_dim][rows]`: run_sum, run_sum_wide, out[0], out[1], ...
    """
    elements = (head_dim + 2) * partial_rows(group_size) * WIDE_BYTES
    return PARTIAL_HEADER.bytes + -(-elements // BEAT_BYTES) * BEAT_BYTES


def check_head_dim(head_dim: int, maximum: int = MAX_HEAD_DIM) -> None:
    """Raise ValueError unless a page can hold heads of this size."""
    if _broken(_only("head_dim"), {"head_dim": head_dim}, {"max_head_dim": maximum}):
        raise ValueError(
            f"head_dim must be a multiple of {BLOCK_TOKENS} up to {maximum}, not {head_dim}; "
            "pad the head with zero channels"
        )


def check_page_tokens(page_tokens: int) -> None:
    """Raise ValueError unless pages of this length are whole tiles or one short tile."""
    if _broken(_only("page_tokens"), {"page_tokens": page_tokens}, {}):
        raise ValueError(
            f"page_tokens must be 32, 64, 96 or a multiple of {TILE_TOKENS} up to "
            f"{MAX_PAGE_TOKENS}, not {page_tokens}"
        )


def _only(name: str) -> tuple[Limit, ...]:
    return tuple(limit for limit in JOB_LIMITS if limit.name == name)
