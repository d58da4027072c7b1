# SPDX-License-Identifier: Apache-2.0
"""Who has which shard: shards go round the drives of a store, and round the cards that attend."""


def shards_of(position: int, n: int, n_shards: int) -> range:
    """The shards of drive, or of card, `position` of `n`.

    >>> list(shards_of(1, 2, 5))
    [1, 3]
    """
    return range(position, n_shards, n)
