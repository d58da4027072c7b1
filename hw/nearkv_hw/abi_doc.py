# SPDX-License-Identifier: Apache-2.0
"""Writes `hw/ABI.md` from `abi`: `python -m nearkv_hw.abi_doc > hw/ABI.md`."""

from . import abi

_TYPES = {"B": "uint8", "H": "uint16", "I": "uint32", "Q": "uint64",
          "b": "int8", "h": "int16", "i": "int32", "q": "int64"}  # fmt: skip

_RECORDS = {
    abi.JOB: "One attention of a query group over a list of pages. `queue` points at `n_jobs` of them.",
    abi.PAGE_ENTRY: "One entry of a job's page table.",
    abi.Q_RECORD: "One channel of the query block: `head_dim` of these, one behind the other.",
    abi.PARTIAL_HEADER: "Head of a partial. The wide numbers follow, see below.",
    abi.SUMMARY: "Written once, after the last partial.",
}


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


def _record(record: abi.Record, what: str) -> list[str]:
    rows = []
    for field in record.fields:
        kind = _TYPES[field.code] + (f"[{field.count}]" if field.count > 1 else "")
        rows.append([f"0x{field.offset:02x}", f"`{field.name}`", kind, field.doc])
    title = f"### `{record.name}`, {record.bytes} bytes"
    return [title, "", what, "", *_table(["offset", "field", "type", "meaning"], rows), ""]


def page() -> str:
    """The page, in Markdown."""
    lines = [
        "# What host and card agree on",
        "",
        "Generated from `hw/nearkv_hw/abi.py` by `make abi-page`; change it there. "
        f"ABI version {abi.ABI_VERSION}.",
        "",
        "Everything is little-endian. Bytes that belong to no field are zero. A beat is "
        f"{abi.BEAT_BYTES} bytes. The card reads pages from *kv memory* (`m_axi_kv`) and everything "
        "else from *job memory* (`m_axi_job`), where it also writes; offsets count from the base of "
        "their memory. No burst crosses "
        f"{abi.BURST_BYTES} bytes.",
        "",
        "## Registers (`s_axi_control`)",
        "",
        "Control as `ap_ctrl_hs` wants it: `CTRL` at 0x00 with start (bit 0), done (bit 1, cleared by "
        "reading), idle (bit 2), ready (bit 3). Words up to the last argument accept writes without "
        "side effects.",
        "",
        "Interrupts: `GIER` at 0x04 (bit 0), `IP_IER` at 0x08 and `IP_ISR` at 0x0c (bit 0 done, bit 1 "
        "ready). The end of a run sets the bits of `IP_ISR` that `IP_IER` enables; writing 1 inverts a "
        "bit, so the driver writes back what it read. The wire `interrupt` is high while `GIER` is set "
        "and an enabled bit of `IP_ISR` is.",
        "",
        *_table(
            ["offset", "name", "bits", "access", "port", "meaning"],
            [
                [f"0x{r.offset:02x}", f"`{r.name}`", str(r.bits),
                 "read, write" if r.writable else "read", f"`{r.port}`", r.doc]
                for r in abi.REGISTERS
            ],
        ),
        "",
        "## Pages (kv memory)",
        "",
        f"A page holds `page_tokens` tokens of one KV head: 32, 64, 96 or a multiple of "
        f"{abi.TILE_TOKENS}. The K part comes first, as mini-pages `[head_dim][{abi.BLOCK_TOKENS}]` "
        f"for each {abi.BLOCK_TOKENS} tokens; the V part lies right behind it, as "
        f"`[head_dim/{abi.BLOCK_TOKENS}][page_tokens][{abi.BLOCK_TOKENS}]`. No header. Pages start "
        f"at multiples of {abi.PAGE_ALIGN_BYTES}. A card reads only rows of valid tokens, and the "
        "CRCs of the page table entry cover what it reads, in the order it reads it "
        "(`PageLayout.k_spans`, `v_spans`).",
        "",
        *_table(
            ["head_dim", "page_tokens", "type", "bytes of a page"],
            [
                [str(d), str(t), kv_type.name.lower(), str(abi.PageLayout(d, t, kv_type).page_bytes)]
                for d, t, kv_type in (
                    (64, 128, abi.KvType.FP16),
                    (128, 128, abi.KvType.FP16),
                    (128, 1024, abi.KvType.BF16),
                    (256, 128, abi.KvType.FP16),
                )
            ],
        ),
        "",
        "KV types: " + ", ".join(f"{t.value} {t.name.lower()}" for t in abi.KvType) + ".",
        "",
        "## Records (job memory)",
        "",
    ]  # fmt: skip
    for record, what in _RECORDS.items():
        lines += _record(record, what)
    lines += [
        "### Wide numbers of a partial",
        "",
        "Behind the header: `[2 + head_dim][rows]` numbers of "
        f"{abi.WIDE_BYTES} bytes, `rows` being `group_size` rounded up to even. The first is "
        "`run_sum` (of the rounded weights; it normalises `out`), the second `run_sum_wide` (for the "
        "log-sum-exp), then `out`. Padded with zeros to whole beats. Limb j (28 bits, signed, at bit "
        "28 j, j = 0..3) counts 2^(16 (top - 3 + j)); bits 112..127 hold `top`, signed "
        "(`number.Wide`).",
        "",
        "## Status",
        "",
        "A partial is good if and only if its status is exactly `DONE`. The host clears the word "
        "before it starts the card.",
        "",
        *_table(
            ["value", "flag", "meaning"],
            [
                [str(flag.value), f"`{flag.name}`",
                 "the card has written this partial" if flag is abi.Status.DONE
                 else (abi.Status.DONE | flag).describe()]
                for flag in abi.Status
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
