# SPDX-License-Identifier: Apache-2.0
"""Attention next to storage: the host runtime of the nearkv accelerator.

    open_card(name)           a card: "twin", "model", "rtl", "xrt:0", "pynq:0"
    attend(q, k, v, card)     attention of one token over a context, through real pages
    merge(outs, lses)         parts of attention into the whole
    NearStorageCache          `past_key_values=` of a model with attn_implementation="nearkv"

Importing it needs numpy only. transformers learns the attention implementation "nearkv" as soon as
both are imported, in whichever order.
"""

from typing import TYPE_CHECKING

from . import extras
from .attention import attend, merge
from .cards import CardError, open_card
from .hf import registration
from .io import FlashError

if TYPE_CHECKING:
    from .hf.cache import NearStorageCache

__all__ = ["attend", "merge", "open_card", "NearStorageCache", "CardError", "FlashError"]

registration.install()


def __getattr__(name):
    if name == "NearStorageCache":  # needs torch and transformers
        with extras.needed_by("NearStorageCache"):
            from .hf.cache import NearStorageCache

        return NearStorageCache
    if name == "__version__":
        from importlib.metadata import version

        return version("nearkv")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
