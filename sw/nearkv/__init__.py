# SPDX-License-Identifier: Apache-2.0
"""Attention next to storage: the host runtime of the nearkv accelerator."""

from .attention import attend, merge
from .card import CardError, open_card
from .store import FlashError

__all__ = ["attend", "merge", "open_card", "CardError", "FlashError"]
