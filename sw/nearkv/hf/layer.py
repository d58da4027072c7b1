# SPDX-License-Identifier: Apache-2.0
"""One layer of a NearStorageCache, and what its layers have in common.

What a layer holds of a sequence: full pages on flash, and a *tail* of fewer than page_tokens tokens
in host memory (more while they gather, see spill_pages), both rounded to the KV type. New tokens are
attended first and stored afterwards:

    pages on flash     by the card, for every query row    \\
    tail, new tokens   on the host, causally               / merged

Positions that are padding are counted and never stored.
"""

from collections.abc import Callable, Sequence
import errno
import functools
import logging
import threading

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nearkv_hw import pages
from nearkv_hw.abi import KvType

from ..attention import Figures, PageAttention, Partial
from ..attention.blocks import TORCH_TYPES
from ..attention.tail import Tail, stored_form
from ..cards import CardError
from ..io import FlashError, PageId
from .attention import Handle, Length, causal_mask, uncompiled
from .backing import Backing
from .state import State

log = logging.getLogger("nearkv")


class Batch:
    """What the layers of a cache have in common: the rows of the batch, their padding, their faults.

    A forward pass gives every layer the same new positions, one layer after the other. `begin` holds
    the layers to that, so that no result is computed over layers that have come apart.

    Parameters
    ----------
    backing : Backing
    n_layers, head_dim : int
        Of the model; pages may have more channels, which are zero.
    spill_pages : int
        How many full pages of a sequence gather in the tail before they are stored.
    keep : bool
        Keep in host memory what is beyond the store's budget.
    drop : bool
        Take out a sequence that has a fault, instead of raising it.

    Attributes
    ----------
    size : int or None
        Rows; None until the first K and V come.
    sequences : list of int
        Of the store, by row.
    faults : dict of int to Exception
        By row, why it was taken out.
    positions : int
        That all layers hold, padding included; during a forward pass, when it began.
    """

    def __init__(self, backing: Backing, n_layers: int, head_dim: int, *, spill_pages: int,
                 keep: bool, drop: bool):  # fmt: skip
        self.backing, self.store = backing, backing.store
        self.layout, self.n_kv_heads = self.store.layout, self.store.n_kv_heads
        self.dtype = TORCH_TYPES[self.layout.kv_type]
        self.head_dim, self.missing_channels = head_dim, self.layout.head_dim - head_dim
        self.spill_pages, self.keep, self.drop = spill_pages, keep, drop
        self.spill_tokens = spill_pages * self.layout.page_tokens
        self.may_write = True
        self.closed = False
        self.faults: dict[int, Exception] = {}
        self.size: int | None = None
        self.sequences: list[int] = []
        self.layers = [Layer(self, index) for index in range(n_layers)]
        self._clear()
        backing.join()
        try:
            self.attention = PageAttention(backing.cards, self.store)
        except BaseException:
            backing.leave([])
            raise

    def close(self) -> None:
        """Give up the rows. May be called twice; in a process that was forked it does nothing."""
        if self.closed:
            return
        self.closed = True
        if self.backing.is_mine:
            self.attention.close()
            self.backing.leave(self.sequences)

    def _drop(self, sequences: Sequence[int]) -> None:
        """Forget the pages of sequences."""
        self.attention.discard()  # reads of their pages may be on their way
        self.backing.drop(sequences)

    def _clear(self) -> None:
        self.positions = self._end = 0
        self._broken: BaseException | None = None  # what the layers failed with
        self._thread: int | None = None
        # Which positions are tokens: (size, capacity). What is beyond _end is True.
        self._valid: torch.Tensor | None = None
        self._any_padding = False
        self._checked: tuple | None = None  # mask, how many positions it has, what is valid of them

    def set_size(self, size: int) -> None:
        """The first K and V have come."""
        if self.size is None:
            have = self.sequences[:size]  # from before a reset
            self.size, self.sequences = size, have + self.backing.take(size - len(have))

    def reset(self) -> None:
        """Forget every token and fault."""
        self.check_open()
        self._drop(self.sequences)
        self.faults.clear()
        self.size = None
        for layer in self.layers:
            layer.clear()
        self._clear()

    def check_open(self) -> None:
        if self.closed:
            raise ValueError("this NearStorageCache is closed; make a new one")

    def check_whole(self) -> None:
        """Raise unless all layers hold the same positions."""
        if self._broken is not None:
            raise RuntimeError(
                "an earlier call failed while K and V were stored or removed, and what the cache "
                "holds is not whole; call reset(), or make a new cache. It was: "
                f"{self._broken!r}"
            )
        layers = [layer for layer in self.layers if layer.is_initialized]
        lengths = {layer.positions for layer in layers}
        if len(lengths) > 1:
            raise RuntimeError(
                "an earlier call ended between layers: some hold "
                f"{min(lengths)} positions and some {max(lengths)}; call reset(), or make a new cache"
            )

    def begin(self, layer: "Layer", n_new: int) -> None:
        """A layer is about to get n_new positions. Raises if it is out of step with the others."""
        self.check_open()
        within = layer.positions == self.positions and self._end == self.positions + n_new
        if not within or self._broken is not None:
            self.check_whole()
            if layer.positions != self._end:
                raise RuntimeError(
                    f"layer {layer.index} holds {layer.positions} positions and is given {n_new}, "
                    f"while others went from {self.positions} to {self._end}; call reset(), or make "
                    "a new cache"
                )
            self.backing.collect()
            self.positions, self._end = layer.positions, layer.positions + n_new
            self._thread, self._checked = threading.get_ident(), None
        elif self._thread != threading.get_ident():
            raise RuntimeError("two threads use one NearStorageCache at a time; give each its own")

    def abandon(self) -> None:
        """A layer has given up its new positions; if it was the first, nothing has happened."""
        if all(layer.positions == self.positions for layer in self.layers if layer.is_initialized):
            if self._valid is not None:
                self._valid[:, self.positions :] = True
            self._end, self._checked = self.positions, None

    def fail(self, error: BaseException) -> None:
        """Something has failed while the layers changed: they cannot be used until `reset`."""
        self._broken = error

    def take_out(self, row: int, error: Exception) -> None:
        """Go on without a row; or raise the error, if that is what is wanted."""
        if not self.drop:
            raise error
        log.warning("row %d of the batch is dropped: %s", row, error)
        self.faults[row] = error
        self._drop([self.sequences[row]])

    def take_out_of(self, error: FlashError | CardError) -> None:
        """Go on without the row that an error is about; raise it if there is none."""
        if error.page is None or error.page.sequence not in self.sequences:
            raise error
        self.take_out(self.sequences.index(error.page.sequence), error)

    # --- padding ------------------------------------------------------------------------------

    def valid(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of the new positions are tokens, by a mask of all positions.

        Parameters
        ----------
        mask : bool (size, positions and new ones) or None
            Default: all are tokens.

        Returns
        -------
        bool (size, n_new) on the host, or None if all are tokens

        Raises
        ------
        ValueError
            If the mask says of a stored position what it did not say when that was stored.
        """
        checked = self._checked
        if checked is not None and checked[0] is mask and checked[1] == self._end:
            return checked[2]  # all layers of a model are given the same mask
        past, end = self.positions, self._end
        whole = None if mask is None else mask.cpu()
        if whole is not None and whole.shape != (self.size, end):
            raise ValueError(
                f"attention_mask is for {tuple(whole.shape)} rows and positions; the cache has "
                f"{self.size} rows and, with the new ones, {end} positions"
            )
        self._check_past(whole, past)
        new = None if whole is None else whole[:, past:]
        if new is not None and new.all():
            new = None
        self._write(past, end, new)
        self._checked = (mask, end, new)
        return new

    def _check_past(self, mask: torch.Tensor | None, past: int) -> None:
        if not past or (mask is None and not self._any_padding):
            return
        before = self._tokens(past)
        now = torch.ones_like(before) if mask is None else mask[:, :past]
        changed = before != now
        changed[list(self.faults)] = False  # nobody is to read those rows
        if changed.any():
            row, position = torch.nonzero(changed)[0].tolist()
            kinds = ("padding", "a token")
            raise ValueError(
                f"attention_mask has changed: position {position} of row {row} was "
                f"{kinds[int(before[row, position])]} when it was stored and is now "
                f"{kinds[int(now[row, position])]}; pass the mask of all positions, or crop the "
                "cache to where they agree"
            )

    def _tokens(self, n: int) -> torch.Tensor:
        """bool (size, n): which of the first positions are tokens. Not a copy."""
        assert self.size is not None
        if self._valid is None:
            self._valid = torch.ones(self.size, 256, dtype=torch.bool)
        missing = n - self._valid.shape[1]
        if missing > 0:
            grow = max(missing, self._valid.shape[1])
            self._valid = torch.nn.functional.pad(self._valid, (0, grow), value=True)
        return self._valid[:, :n]

    def _write(self, past: int, end: int, new: torch.Tensor | None) -> None:
        if new is not None:
            self._any_padding = True
            self._tokens(end)[:, past:] = new
        elif self._any_padding:
            self._tokens(end)[:, past:] = True

    @property
    def mask(self) -> torch.Tensor:
        """bool (size, positions): which positions are tokens. A copy."""
        if self.size is None:
            return torch.ones(0, 0, dtype=torch.bool)
        return self._tokens(self.positions_now).clone()

    @property
    def positions_now(self) -> int:
        """That the first layer holds."""
        return self.layers[0].positions if self.layers else 0

    # --- between calls ------------------------------------------------------------------------

    def check_idle(self) -> None:
        """Raise unless this is between two calls of the model, and nothing is amiss."""
        self.check_open()
        self.check_whole()
        if any(layer.is_pending for layer in self.layers):
            raise RuntimeError(
                "this came between a layer's update and its attention; after an interruption call "
                "reset()"
            )

    def crop(self, n: int) -> None:
        """Forget the last n positions of all layers, or all there are."""
        self.check_idle()
        end = self.positions_now
        n = min(n, end)
        if not n:
            return
        tokens = [n] * (self.size or 0)
        if self._any_padding:
            last = self._tokens(end)[:, end - n :]
            tokens = last.sum(dim=1).tolist()
            last[:] = True
            self._any_padding = not bool(self._tokens(end).all())
        self.positions = self._end = end - n
        self._checked = None
        try:
            for layer in self.layers:
                layer.remove(n, tokens)
        except BaseException as error:
            self.fail(error)
            raise

    def arrange(self, sources: Sequence[int]) -> None:
        """Row b becomes what row sources[b] is; there may be more rows then, or fewer.

        Pages are shared, not copied; tails are copied.
        """
        self.check_idle()
        if self.size is None or [*sources] == [*range(self.size)]:
            return
        if not sources or min(sources) < 0 or max(sources) >= self.size:
            raise ValueError(f"rows must be among 0 to {self.size - 1}, not {[*sources]}")
        before = self.sequences
        kept = before[: len(sources)]
        after = kept + self.backing.take(len(sources) - len(kept))
        try:
            self._share({mine: before[row] for mine, row in zip(after, sources, strict=True)})
            self._drop(before[len(sources) :])
            for layer in self.layers:
                layer.arrange(sources)
        except BaseException as error:
            self.sequences = [*before, *after[len(kept) :]]  # for `reset` to forget
            self.fail(error)
            raise
        self.size, self.sequences, self._checked = len(sources), after, None
        if self._valid is not None:
            self._valid = self._valid[[*sources]]
        faults = {row: self.faults[of] for row, of in enumerate(sources) if of in self.faults}
        self.faults.clear()
        self.faults.update(faults)

    def join(self, other: "Batch") -> None:
        """Take over the rows of another with the same store, behind its own; the other has none then.

        Padding costs nothing but its place, so it moves: afterwards all of it is on the left, and there is
        no more of it than the lengths of the rows ask for.
        """
        self.check_idle()
        other.check_idle()
        if other.store is not self.store or other is self:
            raise ValueError("only the rows of a copy can join a cache: make it with copy.deepcopy")
        if other.size is None:
            return
        mine = self.size or 0
        tokens = torch.cat([self.mask.sum(dim=1), other.mask.sum(dim=1)])
        try:
            self.size, self.sequences = mine + other.size, self.sequences[:mine] + other.sequences
            self.faults.update({mine + row: error for row, error in other.faults.items()})
            other.sequences = []
            end = int(tokens.max())
            for ours, its in zip(self.layers, other.layers, strict=True):
                ours.join(its, end)
        except BaseException as error:
            self.fail(error)
            raise
        self.positions = self._end = end
        self._checked = None
        self._valid = torch.arange(end) >= end - tokens[:, None]
        self._any_padding = not bool(self._valid.all())
        self.may_write &= other.may_write
        other.reset()

    def _share(self, sources: dict[int, int]) -> None:
        """Give sequences the pages of others; those that have none leave none."""
        while True:
            known = {*self.store.sequences()}
            pages = {a: b for a, b in sources.items() if b in known and a != b}
            if not pages:
                break
            try:
                self.store.arrange(pages)
                break
            except FlashError as error:  # pages of a source were not written
                self.take_out_of(error)
        self._drop([a for a, b in sources.items() if b not in known])

    def fork(self) -> "Batch":
        """A copy that shares every page, and goes its own way from here."""
        self.check_idle()
        self.backing.collect()
        other = Batch(
            self.backing, len(self.layers), self.head_dim, spill_pages=self.spill_pages,
            keep=self.keep, drop=self.drop,
        )  # fmt: skip
        other.may_write = self.may_write
        if self.size is None:
            return other
        other.set_size(self.size)
        try:
            self._share(dict(zip(other.sequences, self.sequences, strict=True)))
        except BaseException:
            other.close()
            raise
        other.faults.update(self.faults)
        other.positions = other._end = self.positions_now
        other._valid = None if self._valid is None else self._valid.clone()
        other._any_padding = self._any_padding
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.copy_to(its)
        return other

    def state(self) -> State:
        """All there is to save beside the pages."""
        self.check_idle()
        size = self.size or 0
        store, layers, sequences = self.store, self.layers, self.sequences[:size]
        longest = max((max(layer.tail_tokens, default=0) for layer in layers), default=0)
        shape = (len(layers), 2, size, self.n_kv_heads, longest, self.layout.head_dim)
        tails = np.zeros(shape, np.uint16)
        for layer, tail in zip(layers, tails, strict=True):
            if layer.is_initialized:
                have = layer.tail[:, :, :, :longest]
                tail[:, :, :, : have.shape[3]] = have
        return State(
            positions=[layer.positions for layer in layers],
            sequences=sequences,
            n_pages=[[store.n_pages(one, layer.index) for one in sequences] for layer in layers],
            valid=self.mask.numpy(),
            tails=tails,
            tail_tokens=[layer.tail_tokens or [0] * size for layer in layers],
            faults=dict(self.faults),
        )

    def resume(self, state: State) -> None:
        """Go on from a state whose pages the store has again.

        Raises
        ------
        FlashError
            If the store has other pages.
        """
        size = len(state.sequences)
        shape = (len(self.layers), 2, size, self.n_kv_heads)
        if state.tails.shape[:4] != shape or state.tails.shape[5] != self.layout.head_dim:
            raise self._not_of_this_store(f"tails of {state.tails.shape} for layers of {shape}")
        for layer, counts in zip(self.layers, state.n_pages, strict=True):
            for sequence, count in zip(state.sequences, counts, strict=True):
                have = self.store.n_pages(sequence, layer.index)
                if have != count:
                    raise self._not_of_this_store(
                        f"{count} pages of layer {layer.index}, sequence {sequence}, of which the "
                        f"store has {have}"
                    )
        self.backing.drop([one for one in self.store.sequences() if one not in state.sequences])
        self.backing.reserve(state.sequences)
        if not size:
            return
        self.size, self.sequences = size, [*state.sequences]
        self.faults.update(state.faults)
        self.positions = self._end = max(state.positions)
        self._valid = torch.from_numpy(state.valid.astype(bool))
        self._any_padding = not bool(self._valid.all())
        for layer in self.layers:
            if state.positions[layer.index]:
                layer.resume(
                    state.positions[layer.index],
                    state.tails[layer.index],
                    state.tail_tokens[layer.index],
                )

    def _not_of_this_store(self, what: str) -> FlashError:
        return FlashError(
            f"the state that was saved and the pages do not belong together: {what}",
            filename=self.store.directories[0],
            remedy="compute the sequences again, in another directory",
        )


class Layer(CacheLayerMixin):
    """K and V of one layer for a batch of sequences; row b of the batch is sequence b.

    Attributes
    ----------
    index : int
    positions : int
        Stored, including padding.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, batch: Batch, index: int):
        # Not CacheLayerMixin's: it sets keys and values, which there are none of here.
        self.is_initialized = False
        self.index, self._batch = index, batch
        self.positions = 0
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None  # K and V to be attended
        # uint16 (K or V, row, kv head, token, channel), with room for more than there are
        self.tail = np.zeros((2, 0, batch.n_kv_heads, 0, batch.layout.head_dim), np.uint16)
        self.tail_tokens: list[int] = []
        self._tail: Tail | None = None  # the same memory

    @property
    def keys(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(
            "K and V of a NearStorageCache lie on flash, its layers have no tensors of them"
        )

    values = keys  # pyright: ignore[reportAssignmentType]

    # --- what transformers calls --------------------------------------------------------------

    def lazy_initialization(self, key_states, value_states) -> None:
        batch = self._batch
        batch.set_size(len(key_states))
        self._make_tail(batch.spill_tokens)
        self.tail_tokens = [0] * self.batch_size
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        if self._batch.size is None:
            raise AttributeError("no K and V have come yet")
        return self._batch.size

    @uncompiled
    def update(self, key_states, value_states, *args, **kwargs):
        batch = self._batch
        batch.check_open()
        if self._pending is not None:
            raise RuntimeError(
                f"layer {self.index} was updated twice without attention; load the model with "
                'attn_implementation="nearkv", and after an interruption call reset()'
            )
        self._check_shapes(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != batch.size:
            raise ValueError(self._other_size(len(key_states)))
        batch.begin(self, key_states.shape[2])
        self._pending = k, v = key_states.detach(), value_states.detach()
        return Handle(k, self), Handle(v, self)

    def _check_shapes(self, k: torch.Tensor, v: torch.Tensor) -> None:
        batch, (_, heads, _, head_dim) = self._batch, k.shape
        if heads != batch.n_kv_heads or head_dim != batch.head_dim or k.shape != v.shape:
            raise ValueError(
                f"layer {self.index} has K {tuple(k.shape)} and V {tuple(v.shape)}; the cache was "
                f"made for {batch.n_kv_heads} kv heads of {batch.head_dim} channels"
            )

    def _other_size(self, given: int) -> str:
        times, rest = divmod(given, self.batch_size)
        repeat = f"call batch_repeat_interleave({times}) first, or " if times and not rest else ""
        return (
            f"the cache holds {self.batch_size} sequences and was given {given}; {repeat}make a new "
            "cache"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return Length(self.get_seq_length() + query_length), 0

    def get_seq_length(self) -> int:
        self._batch.check_open()
        return self.positions + (0 if self._pending is None else self._pending[0].shape[2])

    def get_max_length(self) -> int:
        return -1

    @property
    def is_pending(self) -> bool:
        """Whether K and V wait for attention."""
        return self._pending is not None

    def _together(self, *args, **kwargs):
        raise NotImplementedError(
            "the layers of a NearStorageCache change together: call the method of the cache"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _together

    def offload(self) -> None:
        """Nothing to do: the tail is in host memory already."""

    prefetch = offload

    # --- what the cache calls -----------------------------------------------------------------

    def fill(self, k, v) -> None:
        """Put K and V behind what there is, without attention: (batch, kv heads, tokens, head_dim)."""
        k, v = (handle.plain for handle in self.update(k, v))
        try:
            new = self._stored_form(k, v)
            valid = self._batch.valid(None)
        except BaseException:
            self.forget()
            raise
        self._commit(new, valid)

    def clear(self) -> None:
        """Forget every token; the store has forgotten its pages."""
        self.is_initialized = False
        self.positions, self._pending, self.tail_tokens = 0, None, []

    def remove(self, n_positions: int, n_tokens: list[int]) -> None:
        """Forget the last positions, which are so many tokens of each row.

        A page that is cut becomes the tail.
        """
        if not self.is_initialized:
            return
        batch, page_tokens = self._batch, self._batch.layout.page_tokens
        for row, sequence in enumerate(batch.sequences):
            if row in batch.faults:
                continue
            n_pages = batch.store.n_pages(sequence, self.index)
            left = n_pages * page_tokens + self.tail_tokens[row] - n_tokens[row]
            keep = min(left // page_tokens, n_pages)
            try:
                if keep < n_pages:
                    if left > keep * page_tokens:
                        self._take_back(row, keep)
                    batch.store.truncate(sequence, self.index, keep)
            except FlashError as error:
                batch.take_out(row, error)
            self.tail_tokens[row] = left - keep * page_tokens
        self.positions -= n_positions

    def arrange(self, sources: Sequence[int]) -> None:
        """Row b becomes what row sources[b] was; the store has done so with the pages."""
        if self.is_initialized:
            self.tail_tokens = [self.tail_tokens[row] for row in sources]
            self._set_tail(self.tail[:, [*sources]])

    def join(self, other: "Layer", positions: int) -> None:
        """Hold the rows of another layer too, and so many positions."""
        if not self.is_initialized:
            self.resume(positions, other.tail, other.tail_tokens)
            return
        room = max(self.tail.shape[3], other.tail.shape[3])
        tails = (
            np.pad(x, ((0, 0), (0, 0), (0, 0), (0, room - x.shape[3]), (0, 0)))
            for x in (self.tail, other.tail)
        )
        self._set_tail(np.concatenate([*tails], axis=1))
        self.tail_tokens += other.tail_tokens
        self.positions = positions

    def copy_to(self, other: "Layer") -> None:
        """Make a layer of a fork what this one is."""
        if self.is_initialized:
            other.resume(self.positions, self.tail, self.tail_tokens)

    def resume(self, positions: int, tail: np.ndarray, tail_tokens: list[int]) -> None:
        """Hold so many positions, of which these tokens are not in the store."""
        self.positions, self.tail_tokens = positions, [*tail_tokens]
        self._make_tail(max(self._batch.spill_tokens, tail.shape[3]))
        self.tail[:, :, :, : tail.shape[3]] = tail
        self.is_initialized = True

    def _make_tail(self, room: int) -> None:
        _, _, heads, _, channels = self.tail.shape
        self._set_tail(np.zeros((2, self.batch_size, heads, room, channels), np.uint16))

    def _set_tail(self, tail: np.ndarray) -> None:
        self.tail = tail
        self._tail = Tail(tail[0], tail[1], self._batch.layout.kv_type)

    # --- attention ----------------------------------------------------------------------------

    def check_pending(self, query, k, v) -> None:
        """Raise unless these K and V wait for attention, and the query belongs to them."""
        if self._pending is None or k is not self._pending[0] or v is not self._pending[1]:
            raise NotImplementedError(
                f"K and V of layer {self.index} are not those of its last update; this model needs "
                "another cache"
            )
        size, heads, n_new, _ = k.shape
        batch = self._batch
        if query.shape[0] != size or query.shape[1] % heads or query.shape[2:] != (
            n_new, batch.head_dim
        ):  # fmt: skip
            raise NotImplementedError(
                f"layer {self.index} has queries of shape {tuple(query.shape)} for new K of shape "
                f"{tuple(k.shape)}; NearStorageCache wants a query head dimension and a query for "
                "every new token, and as many query heads for each kv head; use another cache"
            )

    def forget(self) -> None:
        """Give up the K and V that wait for attention."""
        self._pending = None
        self._batch.abandon()

    def attend(self, module, query, mask, scale: float) -> torch.Tensor:
        """Attend to all there is, then store what is new.

        Parameters
        ----------
        query : (batch, n_q_heads, n_new, head_dim)
        mask : bool (batch, positions) or None
            Which positions are tokens. Default: all.
        scale : float

        Returns
        -------
        (batch, n_new, n_q_heads, head_dim), dtype and device of query
        """
        assert self._pending is not None
        size, n_q_heads, n_new, _ = query.shape
        try:
            new = self._stored_form(*self._pending)
            valid = self._batch.valid(mask)
            if not self.positions:  # prefill: nothing but new tokens
                causal = None if valid is None else causal_mask(valid, n_new).to(query.device)
                k_here, v_here = (self._as_stored(x).to(query.device, query.dtype) for x in new)
                out, _ = sdpa_attention_forward(
                    module, query, k_here, v_here, causal, scaling=scale, is_causal=True
                )
                self.figures.prefill_tokens += size * n_q_heads * n_new * (n_new + 1) // 2
            else:
                out = self._attend_past(query.float().cpu(), new, valid, scale)
                out = out.to(query.device, query.dtype)
        except BaseException:
            self.forget()
            raise
        self._commit(new, valid)
        if self._batch.faults:
            out[list(self._batch.faults)] = 0
        return out

    def _attend_past(
        self, query: torch.Tensor, new: np.ndarray, valid, scale: float
    ) -> torch.Tensor:
        """Attend to pages, tail and new tokens: float32 (batch, n_new, n_q_heads, head_dim)."""
        batch, (size, n_q_heads, n_new, _) = self._batch, query.shape
        # Query heads of a group, then their tokens: all share a kv head's pages.
        rows = self._widened(query.numpy())
        rows = rows.reshape(size, batch.n_kv_heads, -1, rows.shape[3])
        valid = None if valid is None else valid.numpy()
        assert self._tail is not None
        tail = functools.partial(
            self._tail.attend, rows, self.tail_tokens, new[0], new[1], valid, scale
        )
        tail = functools.cache(tail)
        stored = self._attend_pages(rows, scale, meanwhile=tail)
        self._count(n_q_heads, n_new, valid)
        out = tail()[0].astype(np.float32) if stored is None else stored.combine(*tail())
        if batch.missing_channels:
            out = out[..., : batch.head_dim]
        plain = torch.from_numpy(out)
        if n_new == 1:  # the usual case, in which the heads are in place
            return plain.reshape(size, 1, n_q_heads, batch.head_dim)
        return plain.reshape(size, n_q_heads, n_new, -1).transpose(1, 2).contiguous()

    def _attend_pages(
        self, rows: np.ndarray, scale: float, meanwhile: Callable[[], object]
    ) -> Partial | None:
        """The partial of all rows over their pages; None if there are no pages."""
        batch, n_rows = self._batch, len(rows)
        stored = [batch.store.n_pages(sequence, self.index) for sequence in batch.sequences]
        while True:
            alive = [row for row in range(n_rows) if row not in batch.faults]
            if not any(stored[row] for row in alive):
                return None
            try:
                partial = batch.attention.attend(
                    self.index,
                    [batch.sequences[row] for row in alive],
                    rows if len(alive) == n_rows else rows[alive],
                    scale,
                    [stored[row] for row in alive],
                    meanwhile,
                )
            except (FlashError, CardError) as error:
                batch.take_out_of(error)
                continue
            if len(alive) == n_rows:
                return partial
            whole = Partial.empty(batch.layout.kv_type, rows.shape[:3], rows.shape[3])
            whole[alive] = partial
            return whole

    def _stored_form(self, k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
        """New K and V as they are stored: uint16 (K or V, row, kv head, token, channel).

        A row with Inf or NaN is taken out.
        """
        layout = self._batch.layout
        new, finite = stored_form(k, v, layout.kv_type, layout.head_dim)
        if not finite:
            self._refuse(new)
        return new

    def _as_stored(self, x: np.ndarray) -> torch.Tensor:
        """K or V as the cards see them, with the channels of the model."""
        plain = torch.from_numpy(x.view(np.int16)).view(self._batch.dtype)
        return plain[..., : self._batch.head_dim]

    def _widened(self, x: np.ndarray) -> np.ndarray:
        """With as many channels as pages have; channels that are zero change no score."""
        missing = self._batch.missing_channels
        return np.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x

    def _count(self, n_q_heads: int, n_new: int, valid: np.ndarray | None) -> None:
        """Pairs of query row and token that the host attends."""
        pairs = n_new * sum(self.tail_tokens)
        if valid is None:
            pairs += self.batch_size * n_new * (n_new + 1) // 2
        else:  # a query that is padding attends to itself
            pairs += int(valid.cumsum(axis=1).sum()) + int((~valid).sum())
        self.figures.host_tokens += pairs * n_q_heads

    @property
    def figures(self) -> Figures:
        return self._batch.attention.figures

    # --- storing ------------------------------------------------------------------------------

    def _commit(self, new: np.ndarray, valid: torch.Tensor | None) -> None:
        """Tokens move to the tail, and from there to flash whenever they fill pages."""
        batch = self._batch
        try:
            for row in range(self.batch_size):
                if row not in batch.faults:
                    mine = new[:, row]
                    if valid is not None:
                        mine = mine[:, :, valid[row].numpy()]
                    try:
                        self._commit_one(row, mine)
                    except FlashError as error:
                        batch.take_out(row, error)
        except BaseException as error:
            batch.fail(error)
            raise
        self.positions += new.shape[3]
        self._pending = None

    def _commit_one(self, row: int, new: np.ndarray) -> None:
        """new : uint16 (K or V, kv head, token, channel)"""
        batch, page_tokens = self._batch, self._batch.layout.page_tokens
        have, n_new = self.tail_tokens[row], new.shape[2]
        if have + n_new >= batch.spill_tokens and batch.may_write:
            tokens = np.concatenate([self.tail[:, row, :, :have], new], axis=2)
            full = (have + n_new) // page_tokens * page_tokens
            if self._spill(row, tokens[:, :, :full]):
                have, new = 0, tokens[:, :, full:]
        end = have + new.shape[2]
        missing = end - self.tail.shape[3]
        if missing > 0:
            room = -(-missing // batch.spill_tokens) * batch.spill_tokens
            self._set_tail(np.pad(self.tail, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))))
        self.tail[:, row, :, have:end] = new
        self.tail_tokens[row] = end

    def _spill(self, row: int, tokens: np.ndarray) -> bool:
        """Give full pages to the store, unless it may not write them and they are to be kept."""
        batch = self._batch
        try:
            batch.store.append(batch.sequences[row], self.index, *tokens)
        except FlashError as error:
            if not batch.keep or error.errno != errno.EDQUOT:
                raise
            batch.may_write = False
        return batch.may_write

    def _refuse(self, new: np.ndarray) -> None:
        """Take out the rows whose new K or V are not finite."""
        batch, kind = self._batch, self._batch.layout.kv_type
        for name, x in zip("KV", new, strict=True):
            reach = "" if kind == KvType.BF16 else " (kv_dtype='bf16' reaches further)"
            for row in range(len(x)):
                where = pages.first_non_finite(x[row], kind)
                if where is None or row in batch.faults:
                    continue
                head, token, _ = where
                error = ValueError(
                    f"Inf or NaN in {name} of layer {self.index}, sequence {row}, kv head {head}, "
                    f"token {self.positions + token}: either the model computed it, or it is too "
                    f"large for {kind.name.lower()}{reach}"
                )
                batch.take_out(row, error)

    def _take_back(self, row: int, page: int) -> None:
        """Read a page from flash into the tail."""
        batch, layout = self._batch, self._batch.layout
        for head in range(batch.n_kv_heads):
            data = batch.store.read_pages(PageId(self.index, batch.sequences[row], head, page), 1)
            for which, patterns in enumerate(pages.unpack(layout, data)):
                self.tail[which, row, head, : layout.page_tokens] = patterns
