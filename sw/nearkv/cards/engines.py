# SPDX-License-Identifier: Apache-2.0
"""Cards that have several engines, each with a memory channel of its own."""

from collections.abc import Iterable, Sequence
import contextlib

from .card import Card


class Engines(Sequence[Card]):
    """The engines of one card, opened together: a `Card` each. A context manager.

    Whoever attends takes them as one card, and shares the pages out among them, a shard each. Loads and
    runs are an engine's own: `engines[0].run(...)`.

    Parameters
    ----------
    name : str
        Of the card: "xrt:0". Its engines are "xrt:0/0", "xrt:0/1", ...
    cards : iterable of Card
        Opened one after the other. If that fails, those before are closed.

    Attributes
    ----------
    name : str
    """

    def __init__(self, name: str, cards: Iterable[Card]):
        self.name = name
        with contextlib.ExitStack() as opened:
            self._cards = [opened.enter_context(card) for card in cards]
            opened.pop_all()  # `close` closes them

    def __getitem__(self, index):
        return self._cards[index]

    def __len__(self) -> int:
        return len(self._cards)

    def __repr__(self):
        return f"<card {self.name!r} with {len(self)} engines>"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Close every engine. May be called twice.

        Raises
        ------
        CardError
            As `Card.close`; the others are closed nevertheless.
        """
        with contextlib.ExitStack() as left:
            for card in self._cards:
                left.callback(card.close)


def engines_of(card: "Card | Sequence[Card | Engines]") -> list[Card]:
    """All engines of a card, or of several, in their order. Shard i is the i-th one's."""
    if not isinstance(card, Sequence):
        return [card]
    return [engine for one in card for engine in engines_of(one)]
