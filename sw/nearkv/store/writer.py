# SPDX-License-Identifier: Apache-2.0
"""Writing pages: packing, checksums, and the bursts in which a drive takes them."""

from collections.abc import Sequence
import mmap
from typing import NamedTuple

import numpy as np

from nearkv_hw import pages
from nearkv_hw.abi import PageLayout

from ..io import File, PageId, Window
from .space import runs_of
from .tables import Table

STAGING_BYTES = 8 << 20  # pages packed at once, and written in one window


class Spill(NamedTuple):
    """Tokens on their way to flash, for which places are reserved."""

    sequence: int
    layer: int
    position: int  # of the first block in the table
    ids: np.ndarray  # of the blocks
    k: np.ndarray  # uint16 (n_kv_heads, n_tokens, head_dim)
    v: np.ndarray
    pages: np.ndarray  # STORED_PAGE (n_kv_heads, n_blocks); `PageWriter` puts the checksums in
    table: Table

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class PageWriter:
    """Writes spills to the page files of a store. Of one thread: it has one staging buffer.

    Parameters
    ----------
    layout : PageLayout
    files : sequence of File, by shard
    windows : sequence of Window, by shard
        Shards on one drive have the same.
    """

    def __init__(self, layout: PageLayout, files: Sequence[File], windows: Sequence[Window]):
        self._layout, self._files, self._windows = layout, files, windows
        self.path = files[0].path  # for messages
        self._staging: mmap.mmap | None = None
        self.written_bytes = 0

    def write(self, spills: Sequence[Spill]) -> None:
        """Pack, checksum and write the pages of some spills.

        Raises
        ------
        FlashError
            If a drive fails. Pages that are written by then are in nobody's table.
        """
        heads, page_bytes = len(spills[0].pages), self._layout.page_bytes
        step = max(1, STAGING_BYTES // (heads * page_bytes))
        if self._staging is None:
            # Anonymous memory starts on a page boundary, as O_DIRECT wants.
            self._staging = mmap.mmap(-1, max(STAGING_BYTES, heads * page_bytes))
        staging = np.frombuffer(self._staging, np.uint8)
        runs, used = [], 0
        for spill in spills:
            for at in range(0, spill.pages.shape[1], step):
                count = min(step, spill.pages.shape[1] - at)
                nbytes = heads * count * page_bytes
                if used + nbytes > len(staging):
                    self._write_window(runs)
                    runs, used = [], 0
                data = staging[used : used + nbytes].reshape(heads, count, page_bytes)
                used += nbytes
                runs += self._pack(spill, at, count, data)
        self._write_window(runs)

    def _pack(self, spill: Spill, at: int, count: int, data: np.ndarray) -> list[tuple]:
        """Pages `at` .. of a spill into `data`; what goes where: (shard, offset, bytes, first page)."""
        layout = self._layout
        tokens = slice(at * layout.page_tokens, (at + count) * layout.page_tokens)
        pages.pack(layout, spill.k[:, tokens], spill.v[:, tokens], data)
        entries = spill.pages[:, at : at + count]
        runs = []
        for head in range(len(data)):
            for i in range(count):
                entry = entries[head, i]
                crcs = pages.checksums(layout, data[head, i], int(entry["page_len"]))
                entry["crc_k"], entry["crc_v"] = crcs
            for a, b in runs_of(entries[head], layout.page_bytes):
                first = PageId(spill.layer, spill.sequence, head, spill.position + at + a)
                where = int(entries["shard"][head, a]), int(entries["offset"][head, a])
                runs.append((*where, data[head, a:b], first))
        return runs

    def _write_window(self, runs: list[tuple]) -> None:
        """Write runs of pages while their drives do not read."""
        for window in dict.fromkeys(self._windows):
            mine = [run for run in runs if self._windows[run[0]] is window]
            if mine:
                with window.writing():
                    for shard, offset, data, first in mine:
                        self._files[shard].write(offset, data, first)
                        self.written_bytes += data.nbytes
