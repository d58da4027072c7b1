# SPDX-License-Identifier: Apache-2.0
"""Cards: what loads pages from flash and runs jobs on them. `open_card` is the way to get one."""

from .card import (
    DEFAULT_CARD,
    KV_BYTES,
    Card,
    CardError,
    MemoryCard,
    check_summary,
    open_card,
    open_cards,
)

__all__ = [
    "Card", "CardError", "MemoryCard", "open_card", "open_cards", "check_summary", "DEFAULT_CARD",
    "KV_BYTES",
]  # fmt: skip
