# SPDX-License-Identifier: Apache-2.0
"""Where pages live between the step that writes them and the steps that attend to them.

store.py     KvStore: append, arrange, drop, save, and the reads of a card
tables.py    block tables and owners: the state, without files
space.py     free places in a page file
writer.py    packing, checksums, bursts of writes
journal.py   every change of a persistent store
home.py      directories, page files, descriptions, locks
"""

from .store import DELAYED_BYTES, KvStore

__all__ = ["KvStore", "DELAYED_BYTES"]
