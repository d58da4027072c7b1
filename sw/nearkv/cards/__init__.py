# SPDX-License-Identifier: Apache-2.0
"""Cards: what brings pages from flash to where they are attended, and runs jobs on them.

card.py      Card: two memories, a reader, an executor, and every state these can be in
executor.py  what a kind of card supplies, and how a program becomes one
engines.py   cards that have several engines
opening.py   open_card("twin")
xrt.py       cards behind XRT; installed.py  where that is; pairing.py  which drive belongs to which
turns.py     whose pages are in a card's memory
"""

from .card import Card, CardRun, check_summary
from .engines import Engines, engines_of
from .errors import CardError
from .executor import Executor, Run, Simulated
from .opening import DEFAULT_CARD, KV_BYTES, engine_names, open_card, open_cards
from .pairing import warn_if_far
from .turns import Tenancy, Turns

__all__ = [
    "Card", "CardError", "CardRun", "Engines", "Executor", "Run", "Simulated", "Tenancy", "Turns",
    "engine_names", "engines_of", "open_card", "open_cards", "check_summary", "DEFAULT_CARD", "KV_BYTES",
    "warn_if_far",
]  # fmt: skip
