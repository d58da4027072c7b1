# SPDX-License-Identifier: Apache-2.0
"""KV blocks of an engine that does its own paging: vLLM's block ids are pages here.

An engine numbers its blocks, gives each sequence a table of them, shares blocks between sequences, takes
them back at any time and uses their numbers again. A `BlockPool` keeps what the blocks hold:

    filling   some tokens, in host memory; more may come
    writing   full, and on its way to flash; in host memory until it is there
    stored    a page for each layer and kv head on flash

and attends to them: stored blocks by the cards, the others on the host, in one `attend` for a layer and a
batch. The blocks of a row (a sequence in a batch) from its first to the last of those that are stored
without a gap are its *pages*, the rest its *tail*.

A block is written from its first token on by whoever gets it; what it held before is gone with that, so no
row ever sees the bytes of a block's last owner.
"""

from collections import deque
from collections.abc import Sequence
import contextlib
from dataclasses import dataclass, field
import errno
import tempfile
from typing import NamedTuple
import weakref

import numpy as np
import torch

from nearkv_hw import pages
from nearkv_hw.abi import KvType, PageLayout

from ..cards import Card, open_cards
from ..io import FlashError, PageId
from ..store import DELAYED_BYTES, KvStore
from .scheduler import PageAttention, check_card

TORCH_TYPES = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}
HOST_BYTES = 1 << 30  # of blocks in host memory, beyond which writing them is waited for
# Query rows for each kv head, in passes of the card, from which on the host attends to pages itself: it
# reads them once, and a card computes on them once for each pass.
HOST_PASSES = 8
_READ_PAGES = 16  # of each head, that the host attends to at once
_SCORES = 1 << 23  # that the host holds at once

# A store numbers sequences. Blocks have the number of the block, what is being written and the rows of a
# batch those from here on.
_WRITING, _ROWS = 1 << 40, 1 << 41

FILLING, WRITING, STORED = 1, 2, 3  # of a block; 0 of one that holds nothing


class Writing(NamedTuple):
    """Full blocks on their way to flash, as one sequence of the store."""

    sequence: int
    blocks: np.ndarray  # int64 (n,)
    versions: np.ndarray  # int64 (n,), of the blocks when they were written


@dataclass
class Group:
    """Rows of a batch with equally many new tokens: what they attend to.

    Attributes
    ----------
    tokens : int64 (n_rows, n_new)
        Where their new tokens are in the batch.
    sequences, n_pages : lists (n_rows,)
        Of the store: where a row's pages are, and how many.
    at : int64 (n_rows, n_tail)
        Where their tails are in host memory, new tokens included; anywhere beyond a tail's end.
    first : int64 (n_rows,)
        Position of the first of these.
    ends : int64 (n_rows,)
        Positions of a row, new ones included.
    """

    tokens: torch.Tensor
    sequences: list[int]
    n_pages: list[int]
    at: torch.Tensor
    first: torch.Tensor
    ends: torch.Tensor
    page_tokens: int
    _hidden: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def n_new(self) -> int:
        return self.tokens.shape[1]

    @property
    def has_pages(self) -> bool:
        return any(self.n_pages)

    def hidden(self, window: int | None) -> torch.Tensor:
        """Which tokens of the tail a query does not see: bool (n_rows, n_new, n_tail)."""
        hidden = self._hidden.get(window)
        if hidden is None:
            own = (self.ends[:, None] - self.n_new + torch.arange(self.n_new))[:, :, None]
            position = (self.first[:, None] + torch.arange(self.at.shape[1]))[:, None]
            if window is None:  # what is in pages is attended there
                seen = position >= torch.tensor(self.n_pages)[:, None, None] * self.page_tokens
            else:
                seen = position > own - window
            hidden = self._hidden[window] = ~(seen & (position <= own))
        return hidden


@dataclass
class Figures:
    """What a pool has done so far; more is in `PageAttention.figures`."""

    steps: int = 0
    begin_s: float = 0.0
    write_s: float = 0.0
    attend_s: float = 0.0
    blocks_written: int = 0
    blocks_read: int = 0  # back into host memory


class HostCopies:
    """Tensors of a device in host memory, copied by a stream of their own.

    The buffers are pinned and used again: what a call gave is good until the next. Tensors that are in
    host memory stay where they are.

    Never run on a GPU yet.
    """

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The same elements, in host memory when this returns."""
        if all(x.device.type == "cpu" for x in tensors):
            return [*tensors]
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        self._stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        copies = []
        with torch.cuda.stream(self._stream):
            for number, x in enumerate(tensors):
                copies.append(self._room(number, x).copy_(x, non_blocking=True))
                x.record_stream(self._stream)
        self._stream.synchronize()
        return copies

    def _room(self, number: int, x: torch.Tensor) -> torch.Tensor:
        key = number, x.dtype
        have = self._buffers.get(key)
        if have is None or have.numel() < x.numel():
            pin = x.device.type == "cuda"
            have = self._buffers[key] = torch.empty(x.numel(), dtype=x.dtype, pin_memory=pin)
        return have[: x.numel()].view(x.shape)


class BlockPool:
    """K and V of an engine's blocks. Of one thread.

    For each batch of the engine `begin` once, then for each layer `write` and `attend`.

    Parameters
    ----------
    n_blocks : int
        Blocks are numbered from 0 to n_blocks - 1.
    windows : sequence of (int or None), by layer
        How many positions, its own included, a token of the layer sees. None: all. Layers with a window
        are attended on the host, which keeps as many blocks of each row in memory.
    n_kv_heads, head_dim : int
    page_tokens : int
        Of a block: 32, 64, 96 or a multiple of 128.
    kv_dtype : "fp16" or "bf16"
    directory, card
        As for `nearkv.attend`; the store is temporary.
    caching : bool
        Whether the engine may come back to full blocks that no sequence has: prefix caching.
    host_bytes : int
        Of blocks in host memory, beyond which `begin` waits until full ones are written. What does not
        fill a block stays in memory in any case.
    budget_bytes : int, optional
        Limit on what is written to flash. Beyond it full blocks stay in host memory, up to host_bytes.

    Attributes
    ----------
    store : KvStore
    attention : PageAttention
    figures : Figures

    Raises
    ------
    ValueError
        If layout and cards do not fit.
    FlashError, CardError
        If directory or card cannot be used.
    """

    def __init__(
        self,
        n_blocks: int,
        windows: Sequence[int | None],
        n_kv_heads: int,
        head_dim: int,
        *,
        page_tokens: int = 128,
        kv_dtype="fp16",
        directory=None,
        card=None,
        caching: bool = True,
        host_bytes: int = HOST_BYTES,
        budget_bytes: int | None = None,
        delayed_bytes: int = DELAYED_BYTES,
    ):
        kv_type = pages.parse_kv_type(kv_dtype)
        layout = PageLayout(pages.page_channels(head_dim), page_tokens, kv_type)
        self.layout, self.head_dim, self.n_kv_heads = layout, head_dim, n_kv_heads
        self.windows, self.caching, self.host_bytes = [*windows], caching, host_bytes
        self._window = max((w for w in windows if w is not None), default=0)
        self.figures = Figures()
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            cards, owned = open_cards(card)
            for one in owned:
                opened.callback(one.close)
            for one in cards:
                check_card(one, layout)
            self.store = opened.enter_context(
                KvStore(
                    tempfile.gettempdir() if directory is None else directory,
                    layout,
                    n_kv_heads,
                    temporary=True,
                    n_shards=len(cards),
                    delayed_bytes=delayed_bytes,
                    budget_bytes=budget_bytes,
                )  # fmt: skip
            )
            self.attention = PageAttention(cards, self.store)
            opened.callback(self.attention.close)
            self._closing = opened.pop_all()
        self._host_rows = HOST_PASSES * min(one.rows for one in cards)
        self.cards: list[Card] = cards
        # Of each block. A version is a number that no other content ever has.
        self._state = np.zeros(n_blocks, np.uint8)
        self._fill = np.zeros(n_blocks, np.int64)  # tokens
        self._version = np.full(n_blocks, -1, np.int64)
        self._buffer = np.full(n_blocks, -1, np.int64)
        self._at = np.zeros((len(windows), n_blocks), np.int64)  # blocks of the store, if stored
        self._versions = 0
        # K and V in host memory: (layer, buffer, token, kv head, channel)
        self._kv: tuple[torch.Tensor, torch.Tensor]
        self._free: list[int] = []
        self._grow(0)
        self._writing: deque[Writing] = deque()
        self._n_writing = self._n_rows = 0
        self._rows: dict[bytes, int] = {}  # sequences of the store, by versions of their blocks
        self._may_write = True
        self._groups: list[Group] = []
        self._on_host = HostCopies()
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._finalizer = weakref.finalize(self, self._closing.close)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Forget everything. May be called again."""
        self._finalizer()

    # --- what an engine calls ---------------------------------------------------------------------

    def begin(self, tables: np.ndarray, contexts: np.ndarray, lengths: np.ndarray) -> None:
        """A batch comes: who has which blocks, and how many tokens are new.

        Parameters
        ----------
        tables : ints (n_rows, at least the blocks of the longest)
            The blocks of each row, those of its new tokens included.
        contexts : ints (n_rows,)
            Tokens that a row has in its blocks. Some may be written in this very batch, by another row.
        lengths : ints (n_rows,)
            Tokens that are new, at least 1. They lie row by row in the batch.

        Raises
        ------
        RuntimeError
            If a row is to see tokens that were never written.
        FlashError
            If full blocks cannot be written or read, and host memory is full.
        """
        self.figures.steps += 1
        tables, contexts, lengths = (np.asarray(x, np.int64) for x in (tables, contexts, lengths))
        size = self.layout.page_tokens
        self._settle()
        full, ends = contexts // size, contexts + lengths
        row = np.repeat(np.arange(len(lengths)), lengths)
        within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = contexts[row] + within
        blocks, token = tables[row, position // size], position % size
        self._spill(tables, full, blocks)
        self._renew(blocks[token == 0])
        # Nobody else writes to a block that a row goes on with.
        own = tables[np.arange(len(full)), full]
        self._check(contexts, own[:, None], np.array([contexts % size]).T)
        np.maximum.at(self._fill, blocks, token + 1)
        column = np.arange(int(full.max(initial=0)))
        self._check(contexts, tables[:, : len(column)], (column < full[:, None]) * size)
        n_pages = self._stored_from_the_first(tables, full)
        first = self._first_in_memory(tables, contexts, ends, n_pages)
        self._slots = torch.from_numpy(self._buffer[blocks] * size + token)
        sequences = self._compose(tables, n_pages)
        self._groups = [
            self._group(
                np.flatnonzero(lengths == n), tables, lengths, ends, n_pages, first, sequences
            )
            for n in np.unique(lengths)
        ]
        # Reading ahead guesses that a layer is asked for once.
        self.attention.ahead = sum(group.has_pages for group in self._groups) == 1

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the new K and V of a layer where they belong.

        Parameters
        ----------
        k, v : floating-point (n_tokens, n_kv_heads, head_dim)
            Of all new tokens, in their order in the batch. Rounded to the KV type.

        Raises
        ------
        ValueError
            If one of them is Inf or NaN, or too large for the KV type.
        """
        kv_type = TORCH_TYPES[self.layout.kv_type]
        here = self._on_host(k.detach(), v.detach())
        for name, mine, new in zip("KV", self._kv, here, strict=True):
            new = new.to(kv_type)
            if not torch.isfinite(new).all():
                bf16 = "" if self.layout.kv_type == KvType.BF16 else ", or it needs kv_dtype bf16"
                raise ValueError(
                    f"Inf or NaN in {name} of layer {layer}: the model computed it{bf16}"
                )
            rows = mine[layer].view(-1, self.n_kv_heads, self.layout.head_dim)
            if self.head_dim < self.layout.head_dim:
                rows = rows[..., : self.head_dim]  # the channels beyond are zero for ever
            rows[self._slots] = new

    def attend(
        self, layer: int, q: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend to everything that the rows of the batch have, causally.

        Parameters
        ----------
        q : floating-point (n_tokens, n_q_heads, head_dim)
            Of the new tokens, on any device.
        scale : float
            Of the softmax.
        out : (n_tokens, n_q_heads, head_dim), optional
            Overwritten.

        Returns
        -------
        out, or a new tensor like q

        Raises
        ------
        FlashError, CardError
            If pages cannot be read, or a card does not succeed.
        """
        out = torch.empty_like(q) if out is None else out
        if not any(self._is_many(group, q.shape[1]) for group in self._groups):
            # A few rows cost less on the host than a way to the device and back.
            [q] = self._on_host(q)
        for group in self._groups:
            n_rows, n_new = group.tokens.shape
            mine = q[group.tokens.reshape(-1)]
            # Rows, kv heads, query heads of a group, their tokens, channels.
            mine = mine.view(n_rows, n_new, self.n_kv_heads, -1, self.head_dim)
            mine = mine.permute(0, 2, 3, 1, 4)
            many = self._is_many(group, q.shape[1])
            mine = mine.float() if many else mine.float().cpu()
            mine = torch.nn.functional.pad(mine, (0, self.layout.head_dim - self.head_dim))
            if self.windows[layer] is None and group.has_pages:
                attended = self._attend_both(layer, group, mine, scale, many)
            else:
                attended, _ = self._attend_tail(layer, group, mine, scale)
            attended = attended[..., : self.head_dim].permute(0, 3, 1, 2, 4)
            out[group.tokens.reshape(-1)] = attended.reshape(-1, *q.shape[1:]).to(out)
        return out

    def release(self, blocks: Sequence[int]) -> None:
        """No sequence has these blocks any more.

        Full ones are kept for sequences to come if the engine caches prefixes: on flash.
        """
        those = np.unique(np.asarray(blocks, np.int64))
        full = (self._fill[those] == self.layout.page_tokens) & (self._state[those] > 0)
        if self.caching:
            # One by one: what a later row will have of them, nobody knows.
            for block in those[full & (self._state[those] == FILLING)]:
                self._spill_run(np.array([block]))
            those = those[~full]
        self._forget(those)

    @property
    def n_in_memory(self) -> int:
        """Blocks in host memory."""
        return int((self._buffer >= 0).sum())

    @property
    def n_stored(self) -> int:
        """Blocks on flash."""
        return int((self._state == STORED).sum())

    @property
    def block_bytes(self) -> int:
        """Of a block, all layers together."""
        return len(self.windows) * self.n_kv_heads * self.layout.page_bytes

    # --- blocks come and go -----------------------------------------------------------------------

    def _renew(self, blocks: np.ndarray) -> None:
        """These are written from their first token on: they get a new version and a buffer."""
        self._forget(blocks)
        if len(blocks) > len(self._free):
            self._find_room(len(blocks) - len(self._free))
        for block in blocks:
            self._buffer[block] = self._free.pop()
        self._state[blocks] = FILLING
        self._version[blocks] = self._versions + np.arange(len(blocks))
        self._versions += len(blocks)

    def _forget(self, blocks: np.ndarray) -> None:
        """What blocks hold is gone."""
        for block in blocks[self._state[blocks] == STORED]:
            self.store.drop(int(block))
        self._give_buffers(blocks)
        self._state[blocks] = self._fill[blocks] = 0
        self._version[blocks] = -1  # what is being written of them will be dropped

    def _give_buffers(self, blocks: np.ndarray) -> None:
        some = blocks[self._buffer[blocks] >= 0]
        self._free.extend(self._buffer[some].tolist())
        self._buffer[some] = -1

    def _find_room(self, missing: int) -> None:
        """More buffers: by waiting for the drive, or by more memory."""
        have = self._kv[0].shape[1]
        allowed = self.host_bytes // self.block_bytes - have
        while missing > 0 and missing > allowed and self._writing:
            before = len(self._free)
            one = self._writing[0]
            for layer in range(len(self.windows)):
                self.store.settle(one.sequence, layer)
            self._settle()
            missing -= len(self._free) - before
        if missing > 0:
            if not self._may_write and missing > allowed:
                raise FlashError(
                    f"{self.host_bytes} bytes of host memory are full of blocks that the write budget "
                    "does not allow to be written", errno=errno.EDQUOT,
                    filename=self.store.directories[0],
                    remedy="raise the write budget, or the host memory",
                )  # fmt: skip
            self._grow(max(missing, min(have // 2, max(allowed, 0)), 16))

    def _grow(self, more: int) -> None:
        layers, have = len(self.windows), 0 if not hasattr(self, "_kv") else self._kv[0].shape[1]
        shape = (
            layers,
            have + more,
            self.layout.page_tokens,
            self.n_kv_heads,
            self.layout.head_dim,
        )
        grown = []
        for which in range(2):
            # Zeros cost no memory before they are written, and channels beyond head_dim stay zero.
            x = torch.from_numpy(np.zeros(shape, np.int16)).view(TORCH_TYPES[self.layout.kv_type])
            if have:
                x[:, :have] = self._kv[which]
            grown.append(x)
        self._kv = grown[0], grown[1]
        self._free.extend(range(have + more - 1, have - 1, -1))

    def _check(self, contexts: np.ndarray, blocks: np.ndarray, needed: np.ndarray) -> None:
        """Raise unless in blocks (n_rows, n) so many tokens (n_rows, n) were written."""
        missing = self._fill[blocks] < needed
        if missing.any():
            row, at = np.argwhere(missing)[0]
            raise RuntimeError(
                f"row {row} has {contexts[row]} tokens, but of its block {blocks[row, at]} only "
                f"{self._fill[blocks[row, at]]} were written; the engine and nearkv have come apart"
            )

    # --- to flash ---------------------------------------------------------------------------------

    def _spill(self, tables: np.ndarray, full: np.ndarray, written: np.ndarray) -> None:
        """Begin to write the blocks that contexts fill, but for those that are written in this batch.

        Not before: an engine that speculates writes tokens which it takes back.
        """
        column = np.arange(int(full.max(initial=0)))
        ready = self._state == FILLING
        ready[written] = False
        due = ready[tables[:, : len(column)]] & (column < full[:, None])
        for row in np.flatnonzero(due.any(axis=1)):
            columns = np.flatnonzero(due[row])
            for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
                blocks = tables[row, run]
                blocks = blocks[self._state[blocks] == FILLING]  # not those of a row before
                if len(blocks):
                    self._spill_run(blocks)

    def _spill_run(self, blocks: np.ndarray) -> None:
        """Begin to write blocks that follow one another, so that they lie together."""
        if not self._may_write:
            return
        sequence = _WRITING + self._n_writing
        self._n_writing += 1
        at = torch.from_numpy(self._buffer[blocks])
        try:
            for layer in range(len(self.windows)):
                k, v = (
                    x[layer, at]
                    .view(torch.int16)
                    .flatten(0, 1)
                    .transpose(0, 1)
                    .contiguous()
                    .numpy()
                    for x in self._kv
                )
                self.store.append(sequence, layer, k.view(np.uint16), v.view(np.uint16))
        except FlashError as error:
            if sequence in self.store.sequences():
                self.store.drop(sequence)
            if error.errno != errno.EDQUOT:
                raise
            self._may_write = False
            return
        self._state[blocks] = WRITING
        self._writing.append(Writing(sequence, blocks.copy(), self._version[blocks]))
        self.figures.blocks_written += len(blocks)

    def _settle(self) -> None:
        """Blocks that have been written are stored."""
        layers = range(len(self.windows))
        while self._writing and all(
            self.store.settled(self._writing[0].sequence, layer) for layer in reversed(layers)
        ):
            sequence, blocks, versions = self._writing.popleft()
            good = self._version[blocks] == versions
            at = np.stack([self.store.blocks(sequence, layer) for layer in layers])
            for block, mine in zip(blocks[good], at[:, good].T, strict=True):
                self.store.compose(int(block), {layer: mine[layer : layer + 1] for layer in layers})
            self.store.drop(sequence)
            blocks = blocks[good]
            self._at[:, blocks] = at[:, good]
            self._state[blocks] = STORED
            if not self._window:
                self._give_buffers(blocks)

    # --- a batch ----------------------------------------------------------------------------------

    def _stored_from_the_first(self, tables: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Pages of each row: int64 (n_rows,)."""
        column = np.arange(int(full.max(initial=0)) + 1)
        stored = np.zeros((len(tables), len(column)), bool)
        stored[:, :-1] = self._state[tables[:, : len(column) - 1]] == STORED
        stored &= column < full[:, None]
        return stored.argmin(axis=1)  # the last column is False

    def _first_in_memory(self, tables, contexts, ends, n_pages) -> np.ndarray:
        """The column from which on a row has its blocks in host memory: int64 (n_rows,).

        Those that are stored are read back if need be: for layers with a window, and the few that come
        behind a block that is not stored yet.
        """
        size = self.layout.page_tokens
        first = n_pages
        if self._window:
            first = np.minimum(n_pages, np.maximum(contexts - self._window + 1, 0) // size)
        column = np.arange(-(-int(ends.max()) // size))
        needed = (column >= first[:, None]) & (column * size < ends[:, None])
        needed = np.unique(tables[:, : len(column)][needed])
        rest = np.flatnonzero((self._state == STORED) & (self._buffer >= 0))
        self._give_buffers(np.setdiff1d(rest, needed, assume_unique=True))
        missing = needed[self._buffer[needed] < 0]
        if len(missing) > len(self._free):
            self._find_room(len(missing) - len(self._free))
        for block in missing:
            self._buffer[block] = self._free.pop()
            for layer in range(len(self.windows)):
                for mine, x in zip(self._kv, self._read(layer, int(block), 0, 1), strict=True):
                    mine[layer, self._buffer[block]] = x
        return first

    def _read(self, layer: int, sequence: int, first: int, count: int) -> list[torch.Tensor]:
        """K and V of some pages: (count * page_tokens, n_kv_heads, channels) of the KV type."""
        heads = [
            pages.unpack(
                self.layout,
                self.store.read_pages(PageId(layer, sequence, head, first), count),
            )
            for head in range(self.n_kv_heads)
        ]
        self.figures.blocks_read += count
        return [
            torch.from_numpy(np.stack(x, axis=1).view(np.int16)).view(
                TORCH_TYPES[self.layout.kv_type]
            )
            for x in zip(*heads, strict=True)
        ]

    def _compose(self, tables: np.ndarray, n_pages: np.ndarray) -> list[int]:
        """The sequences of the store that have the pages of each row, made if there is none."""
        before, self._rows = self._rows, {}
        for row, count in enumerate(n_pages):
            blocks = tables[row, :count]
            key = self._version[blocks].tobytes()
            if key not in self._rows:
                sequence = before.pop(key, None)
                if sequence is None:
                    sequence = _ROWS + self._n_rows
                    self._n_rows += 1
                    if count:
                        at = self._at[:, blocks]
                        self.store.compose(sequence, dict(enumerate(at)))
                self._rows[key] = sequence
        for key, sequence in before.items():
            if key:
                self.store.drop(sequence)
        keys = (self._version[tables[row, :n]].tobytes() for row, n in enumerate(n_pages))
        return [self._rows[key] for key in keys]

    def _group(self, rows, tables, lengths, ends, n_pages, first, sequences) -> Group:
        size = self.layout.page_tokens
        n_blocks = -(-ends[rows] // size) - first[rows]
        column = first[rows, None] + np.arange(int(n_blocks.max()))
        column = np.minimum(column, (-(-ends[rows] // size) - 1)[:, None])
        buffers = self._buffer[tables[rows[:, None], column]]
        at = (buffers[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)
        longest = int((ends[rows] - first[rows] * size).max())
        starts = (np.cumsum(lengths) - lengths)[rows]
        return Group(
            torch.from_numpy(starts[:, None] + np.arange(lengths[rows[0]])),
            [sequences[row] for row in rows],
            n_pages[rows].tolist(),
            torch.from_numpy(at[:, :longest].copy()),
            torch.from_numpy(first[rows] * size),
            torch.from_numpy(ends[rows]),
            size,
        )

    def _is_many(self, group: Group, n_q_heads: int) -> bool:
        """Whether there are so many query rows that the host attends to pages itself."""
        return n_q_heads // self.n_kv_heads * group.n_new > self._host_rows

    def _attend_both(self, layer, group: Group, q, scale: float, many: bool) -> torch.Tensor:
        """Pages and tail: (n_rows, n_kv_heads, group, n_new, channels)."""
        if many:
            return self._attend_here(layer, group, q, scale)
        tail = []
        rows = q.flatten(2, 3).numpy()
        partial = self.attention.attend(
            layer, group.sequences, rows, scale, group.n_pages,
            meanwhile=lambda: tail or tail.append(self._attend_tail(layer, group, q, scale)),
        )  # fmt: skip
        out, lse = tail[0]
        lse_log2 = lse.double() / np.log(2)
        both = partial.combine(out.flatten(2, 3).double().numpy(), lse_log2.flatten(2, 3).numpy())
        return torch.from_numpy(both).view(q.shape)

    def _attend_here(self, layer, group: Group, q, scale: float) -> torch.Tensor:
        """The same on the host, or the device where q is: pages are read back."""
        out, lse = self._attend_tail(layer, group, q, scale)
        for row, (sequence, n_pages) in enumerate(zip(group.sequences, group.n_pages, strict=True)):
            for at in range(0, n_pages, _READ_PAGES):
                k, v = self._read(layer, sequence, at, min(_READ_PAGES, n_pages - at))
                more = _attend(q[row : row + 1], k[None], v[None], None, scale)
                out[row : row + 1], lse[row : row + 1] = _merge(
                    (out[row : row + 1], lse[row : row + 1]), more
                )
        return out

    def _attend_tail(self, layer, group: Group, q, scale: float):
        """What is in host memory, new tokens included: out like q, lse (natural) without channels."""
        k, v = (
            x[layer].view(-1, self.n_kv_heads, self.layout.head_dim)[group.at] for x in self._kv
        )
        return _attend(q, k, v, group.hidden(self.windows[layer]), scale)


def _attend(q, k, v, hidden: torch.Tensor | None, scale: float):
    """Attention in float32, on q's device. Every query sees something.

    Parameters
    ----------
    q : float32 (n_rows, n_kv_heads, group, n_new, channels)
    k, v : (n_rows, n_tokens, n_kv_heads, channels)
    hidden : bool (n_rows, n_new, n_tokens), optional
        What is not seen.

    Returns
    -------
    out : float32, like q
    lse : float32 (n_rows, n_kv_heads, group, n_new)
        Natural logarithm of the sum of exponentials.
    """
    if hidden is None and q.device.type == "cpu":
        # torch's own kernel, which gives the logarithm on CPUs only: nearly twice as fast. It takes
        # channels to be contiguous, which K of a page is not, and does not check.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.flatten(2, 3), *(x.float().transpose(1, 2).contiguous() for x in (k, v)), scale=scale
        )
        return out.reshape(q.shape), lse.reshape(q.shape[:4])
    return _attend_in_steps(q, k, v, hidden, scale)


def _attend_in_steps(q, k, v, hidden: torch.Tensor | None, scale: float):
    """The same on any device, with or without a mask, some queries at a time."""
    n_rows, n_heads, group, n_new, channels = q.shape
    keys = k.to(q.device, torch.float32).permute(0, 2, 3, 1)
    values = v.to(q.device, torch.float32).transpose(1, 2)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4])
    step = max(1, _SCORES // max(1, n_rows * n_heads * group * keys.shape[3]))
    for at in range(0, n_new, step):
        some = q[:, :, :, at : at + step]
        scores = torch.matmul(some.flatten(2, 3) * scale, keys)
        scores = scores.view(n_rows, n_heads, group, some.shape[3], -1)
        if hidden is not None:
            mask = hidden[:, at : at + step].to(q.device)[:, None, None]
            scores.masked_fill_(mask, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        p = scores.sub_(largest).exp_()
        total = p.sum(-1)
        sums = torch.matmul(p.flatten(2, 3), values).view(some.shape)
        out[:, :, :, at : at + step] = sums / total[..., None]
        lse[:, :, :, at : at + step] = largest[..., 0] + total.log()
    return out, lse


def _merge(one, other):
    """`nearkv.merge` of two parts, in torch: each (out, lse)."""
    lse = torch.logaddexp(one[1], other[1])
    weights = [(part[1] - lse).exp()[..., None] for part in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], lse
