# SPDX-License-Identifier: Apache-2.0
"""Which prompts begin alike, so that what they share is read and stored once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Prefix:
    """What some prompts have in common at their beginning.

    Attributes
    ----------
    length : int
        In tokens; 0 of the one that all prompts have.
    depth : int
        How many shorter ones it begins with.
    of : int
        The number of a prompt that begins so.
    members : list of int
        Prompts that begin so and share nothing longer, the shortest first.
    """

    length: int
    depth: int
    of: int
    members: list[int] = field(default_factory=list)


def shared_prefixes(prompts: Sequence[np.ndarray], unit: int, deepest: int) -> list[Prefix]:
    """The prefixes that at least two prompts share, each behind the shorter one that it begins with.

    Whoever goes through them in this order needs to hold one prefix of each depth, `deepest` + 1 in all. Every
    prompt is a member of one; at least one of its tokens is not in it.

    Parameters
    ----------
    prompts : sequence of int32 (n_tokens,)
        Each has at least one token.
    unit : int
        Tokens: lengths are multiples of it.
    deepest : int
        Largest depth; longer prefixes are not looked for there.
    """
    if not prompts:
        return []
    # Big-endian bytes sort as the tokens do.
    order = sorted(range(len(prompts)), key=lambda one: prompts[one].astype(">u4").tobytes())
    shared = [
        _shared(prompts[a], prompts[b], unit) for a, b in zip(order, order[1:], strict=False)
    ] + [0]
    root = Prefix(0, 0, order[0])
    found, path = [root], [root]
    for place, prompt in enumerate(order):
        while path[-1].length > (shared[place - 1] if place else 0):
            path.pop()
        # What this prompt shares with those that follow, the longest first.
        longer, at = [], shared[place]
        for following in shared[place:]:
            at = min(at, following)
            if at <= path[-1].length:
                break
            if not longer or at < longer[-1]:
                longer.append(at)
        for length in reversed(longer):
            if path[-1].depth == deepest:
                break
            path.append(Prefix(length, path[-1].depth + 1, prompt))
            found.append(path[-1])
        path[-1].members.append(prompt)
    for prefix in found:
        prefix.members.sort(key=lambda one: len(prompts[one]))
    return found


def _shared(a: np.ndarray, b: np.ndarray, unit: int) -> int:
    """Tokens that two prompts share at their beginning, in whole units, and not all of either."""
    n = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:n] != b[:n])
    n = int(differ[0]) if len(differ) else n
    return n // unit * unit
