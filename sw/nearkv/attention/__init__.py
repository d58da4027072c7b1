# SPDX-License-Identifier: Apache-2.0
"""Attention over stored pages: who computes what, and how the parts become the whole."""

from .attend import attend
from .partial import Partial, merge
from .scheduler import Figures, PageAttention, check_card, measure_cards

__all__ = [
    "attend", "merge", "Partial", "PageAttention", "Figures", "check_card", "measure_cards",
]  # fmt: skip
