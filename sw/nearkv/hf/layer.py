# SPDX-License-Identifier: Apache-2.0
"""One layer of a NearStorageCache, and what its layers have in common.

What a layer holds of a sequence: full pages on flash, and a *tail* of fewer than page_tokens tokens
in host memory (more while they gather, see spill_pages), both rounded to the KV type. New tokens are
attended first and stored afterwards:

    pages on flash     by the card, for every query row    \\
    tail, new tokens   on the host, causally               / merged

Positions that are padding are counted and never stored.
"""

from collections.abc import Sequence
import errno
import logging
import math
import threading

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nearkv_hw import pages
from nearkv_hw.abi import KvType

from ..attention import Figures, PageAttention, Partial, merge
from ..cards import CardError
from ..io import FlashError, PageId
from .attention import Handle, Length, attend_tail, causal_mask

log = logging.getLogger("nearkv")

TORCH_TYPES = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}


class Batch:
    """What the layers of a cache have in common: the rows of the batch, their padding, their faults.

    A forward pass gives every layer the same new positions, one layer after the other. `begin` holds
    the layers to that, so that no result is computed over layers that have come apart.

    Parameters
    ----------
    attention : PageAttention
    head_dim : int
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
        Rows; None until the first K and V come. Row b is sequence b of the store.
    faults : dict of int to Exception
        By row, why it was taken out.
    positions : int
        That all layers hold, padding included; during a forward pass, when it began.
    """

    def __init__(self, attention: PageAttention, head_dim: int, *, spill_pages: int, keep: bool,
                 drop: bool):  # fmt: skip
        self.attention, self.store = attention, attention.store
        self.layout, self.n_kv_heads = self.store.layout, self.store.n_kv_heads
        self.dtype = TORCH_TYPES[self.layout.kv_type]
        self.head_dim, self.missing_channels = head_dim, self.layout.head_dim - head_dim
        self.spill_tokens = spill_pages * self.layout.page_tokens
        self.keep, self.drop = keep, drop
        self.may_write = True
        self.layers: Sequence[Layer] = ()
        self.closed = False
        self.faults: dict[int, Exception] = {}
        self.size: int | None = None
        self._clear()

    def _clear(self) -> None:
        self.positions = self._end = 0
        self._broken: BaseException | None = None  # what the layers failed with
        self._thread: int | None = None
        # Which positions are tokens: (size, capacity). What is beyond _end is True.
        self._valid: torch.Tensor | None = None
        self._any_padding = False
        self._checked: tuple | None = None  # mask, how many positions it has, what is valid of them

    def reset(self) -> None:
        """Forget every token and fault."""
        self.check_open()
        self.faults.clear()
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
            self.positions, self._end = layer.positions, layer.positions + n_new
            self._thread, self._checked = threading.get_ident(), None
        elif self._thread != threading.get_ident():
            raise RuntimeError("two threads use one NearStorageCache at a time; give each its own")

    def abandon(self) -> None:
        """A layer has given up its new positions; if it was the first, nothing has happened."""
        if all(layer.positions == self.positions for layer in self.layers if layer.is_initialized):
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
        self.attention.discard()  # reads of its pages may be on their way
        if row in self.store.sequences():
            self.store.drop(row)

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
        whole = None if mask is None else mask.as_subclass(torch.Tensor).cpu()
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

    def crop(self, n: int) -> None:
        """Forget the last n positions of all layers, or all there are."""
        self.check_open()
        self.check_whole()
        end = self.positions_now
        n = min(n, end)
        if not n:
            return
        if any(layer.is_pending for layer in self.layers):
            raise RuntimeError("crop came between a layer's update and its attention")
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

    @property
    def keys(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(
            "K and V of a NearStorageCache lie on flash, its layers have no tensors of them"
        )

    values = keys  # pyright: ignore[reportAssignmentType]

    # --- what transformers calls --------------------------------------------------------------

    def lazy_initialization(self, key_states, value_states) -> None:
        batch, (size, heads, _, head_dim) = self._batch, key_states.shape
        if heads != batch.n_kv_heads or key_states.shape != value_states.shape or (
            head_dim != batch.head_dim
        ):  # fmt: skip
            raise ValueError(
                f"layer {self.index} has K {tuple(key_states.shape)} and V "
                f"{tuple(value_states.shape)}; the cache was made for {batch.n_kv_heads} kv "
                f"heads of {batch.head_dim} channels"
            )
        if batch.size is None:
            batch.size = size
        self.batch_size = batch.size
        # (K or V, sequence, kv head, token, channel)
        shape = (2, batch.size, heads, batch.spill_tokens, batch.layout.head_dim)
        self._tail = torch.zeros(shape, dtype=batch.dtype)
        self._tail_tokens = [0] * batch.size
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        batch = self._batch
        batch.check_open()
        if self._pending is not None:
            raise RuntimeError(
                f"layer {self.index} was updated twice without attention; load the model with "
                'attn_implementation="nearkv", and after an interruption call reset()'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != batch.size:
            raise ValueError(
                f"the cache holds {batch.size} sequences and was given {len(key_states)}; "
                "make a new cache"
            )
        batch.begin(self, key_states.shape[2])
        k, v = (x.detach().to("cpu", batch.dtype) for x in (key_states, value_states))
        self._pending = k, v
        return Handle.of(k, self), Handle.of(v, self)

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

    def reset(self) -> None:
        raise NotImplementedError("the layers of a NearStorageCache are reset together")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("the layers of a NearStorageCache are cropped together")

    def offload(self) -> None:
        """Nothing to do: the tail is in host memory already."""

    prefetch = offload

    def reorder_cache(self, beam_idx) -> None:
        raise NotImplementedError("pages on flash cannot be reordered: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("pages on flash cannot be repeated: repeat the prompt instead")

    def batch_select_indices(self, indices) -> None:
        raise NotImplementedError("pages on flash cannot be selected: make a cache for each batch")

    # --- what the cache calls -----------------------------------------------------------------

    def fill(self, k, v) -> None:
        """Put K and V behind what there is, without attention: (batch, kv heads, tokens, head_dim)."""
        k, v = (handle.plain for handle in self.update(k, v))
        try:
            valid = self._batch.valid(None)
            self._check_finite(k, v)
        except BaseException:
            self.forget()
            raise
        self._commit(k, v, valid)

    def clear(self) -> None:
        """Forget every token."""
        if self.is_initialized:
            for row in range(self.batch_size):
                if self._batch.store.n_pages(row, self.index):
                    self._batch.store.truncate(row, self.index, 0)
            self._tail_tokens = [0] * self.batch_size
        self.positions, self._pending = 0, None

    def remove(self, n_positions: int, n_tokens: list[int]) -> None:
        """Forget the last positions, which are so many tokens of each row.

        A page that is cut becomes the tail.
        """
        if not self.is_initialized:
            return
        batch, page_tokens = self._batch, self._batch.layout.page_tokens
        for row in range(self.batch_size):
            if row in batch.faults:
                continue
            n_pages = batch.store.n_pages(row, self.index)
            left = n_pages * page_tokens + self._tail_tokens[row] - n_tokens[row]
            keep = min(left // page_tokens, n_pages)
            try:
                if keep < n_pages:
                    if left > keep * page_tokens:
                        self._take_back(row, keep)
                    batch.store.truncate(row, self.index, keep)
            except (FlashError, CardError) as error:
                batch.take_out(row, error)
            self._tail_tokens[row] = left - keep * page_tokens
        self.positions -= n_positions

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
        k, v = self._pending
        size, n_q_heads, n_new, _ = query.shape
        try:
            valid = self._batch.valid(mask)
            self._check_finite(k, v)
            if not self.positions:  # prefill: nothing but new tokens
                causal = None if valid is None else causal_mask(valid, n_new).to(query.device)
                k_here, v_here = (x.to(query.device, query.dtype) for x in (k, v))
                out, _ = sdpa_attention_forward(
                    module, query, k_here, v_here, causal, scaling=scale, is_causal=True
                )
                self.figures.prefill_tokens += size * n_q_heads * n_new * (n_new + 1) // 2
            else:
                out = self._attend_past(query.float().cpu(), k, v, valid, scale)
                out = out.to(query.device, query.dtype)
        except BaseException:
            self.forget()
            raise
        self._commit(k, v, valid)
        if self._batch.faults:
            out[list(self._batch.faults)] = 0
        return out

    def _attend_past(self, query, k, v, valid, scale: float) -> torch.Tensor:
        query, k, v = (self._widened(x) for x in (query, k, v))
        batch, n_q_heads, n_new, channels = query.shape
        # Query heads of a group, then their tokens: all share a kv head's pages.
        rows = query.reshape(batch, k.shape[1], -1, channels)
        tail_k, tail_v = self._tail
        out, lse_ln = attend_tail(rows, tail_k, tail_v, self._tail_tokens, k, v, valid, scale)
        self._count(n_q_heads, n_new, valid)
        alive, partial = self._attend_pages(rows.numpy(), scale)
        if partial is not None:
            card_out, lse_log2 = partial.normalise()
            merged, _ = merge(
                np.stack([out[alive].numpy(), card_out]),
                np.stack([lse_ln[alive].numpy(), lse_log2 * math.log(2)]),
            )
            out = out.double()
            out[alive] = torch.from_numpy(merged).double()
        out = out.reshape(batch, n_q_heads, n_new, channels)[..., : self._batch.head_dim]
        return out.transpose(1, 2).contiguous()

    def _attend_pages(self, rows, scale: float) -> tuple[list[int], Partial | None]:
        """The rows of the batch that were not dropped, and their partial if they have pages."""
        batch = self._batch
        stored = [batch.store.n_pages(row, self.index) for row in range(self.batch_size)]
        while True:
            alive = [row for row in range(len(rows)) if row not in batch.faults]
            if not any(stored[row] for row in alive):
                return alive, None
            try:
                return alive, batch.attention.attend(
                    self.index, alive, rows[alive], scale, [stored[row] for row in alive]
                )
            except (FlashError, CardError) as error:
                if error.page is None:  # it is nobody's in particular
                    raise
                batch.take_out(error.page.sequence, error)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        """With as many channels as pages have; channels that are zero change no score."""
        missing = self._batch.missing_channels
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def _count(self, n_q_heads: int, n_new: int, valid) -> None:
        """Pairs of query row and token that the host attends."""
        pairs = n_new * sum(self._tail_tokens)
        if valid is None:
            pairs += self.batch_size * n_new * (n_new + 1) // 2
        else:  # a query that is padding attends to itself
            pairs += int(valid.cumsum(dim=1).sum()) + int((~valid).sum())
        self.figures.host_tokens += pairs * n_q_heads

    @property
    def figures(self) -> Figures:
        return self._batch.attention.figures

    # --- storing ------------------------------------------------------------------------------

    def _commit(self, k, v, valid) -> None:
        """Tokens move to the tail, and from there to flash whenever they fill pages."""
        batch = self._batch
        try:
            k, v = self._widened(k), self._widened(v)
            for row in range(self.batch_size):
                if row not in batch.faults:
                    try:
                        self._commit_one(row, k, v, valid)
                    except FlashError as error:
                        batch.take_out(row, error)
        except BaseException as error:
            batch.fail(error)
            raise
        self.positions += k.shape[2]
        self._pending = None

    def _commit_one(self, row: int, k, v, valid) -> None:
        page_tokens = self._batch.layout.page_tokens
        new = torch.stack([k[row], v[row]])  # (K or V, kv head, token, channel)
        if valid is not None:
            new = new[:, :, valid[row]]
        have, n_new = self._tail_tokens[row], new.shape[2]
        if have + n_new >= self._batch.spill_tokens and self._batch.may_write:
            tokens = torch.cat([self._tail[:, row, :, :have], new], dim=2)
            full = (have + n_new) // page_tokens * page_tokens
            if self._spill(row, tokens[:, :, :full]):
                have, new = 0, tokens[:, :, full:]
        self._grow_tail(have + new.shape[2])
        self._tail[:, row, :, have : have + new.shape[2]] = new
        self._tail_tokens[row] = have + new.shape[2]

    def _spill(self, row: int, tokens) -> bool:
        """Give full pages to the store, unless it may not write them and they are to be kept."""
        batch = self._batch
        try:
            batch.store.append(row, self.index, *tokens)
        except FlashError as error:
            if not batch.keep or error.errno != errno.EDQUOT:
                raise
            batch.may_write = False
        return batch.may_write

    def _grow_tail(self, tokens: int) -> None:
        missing = tokens - self._tail.shape[3]
        if missing > 0:
            step = self._batch.spill_tokens
            missing = -(-missing // step) * step
            self._tail = torch.nn.functional.pad(self._tail, (0, 0, 0, missing))

    def _check_finite(self, k, v) -> None:
        batch = self._batch
        for name, x in (("K", k), ("V", v)):
            finite = torch.isfinite(x)
            if finite.all():
                continue
            kind = batch.layout.kv_type
            reach = "" if kind == KvType.BF16 else " (kv_dtype='bf16' reaches further)"
            for row in torch.nonzero(~finite.flatten(1).all(1)).flatten().tolist():
                if row in batch.faults:
                    continue
                head, token, _ = torch.nonzero(~finite[row])[0].tolist()
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
            data = batch.store.read_pages(PageId(self.index, row, head, page), 1)
            for which, patterns in enumerate(pages.unpack(layout, data)):
                values = torch.from_numpy(patterns.view(np.int16)).view(batch.dtype)
                self._tail[which, row, head, : layout.page_tokens] = values
