# SPDX-License-Identifier: Apache-2.0
"""Attention over stored pages: who computes what, and how the parts become the whole."""

from .attend import attend
from .partial import Partial, merge
from .ring import RING_BYTES, SEGMENTS, Figures
from .scheduler import PageAttention, check_card, measure_cards

__all__ = [
    "attend", "merge", "Partial", "PageAttention", "Figures", "check_card", "measure_cards",
    "RING_BYTES", "SEGMENTS",
]  # fmt: skip
