# SPDX-License-Identifier: Apache-2.0
"""KV on flash for Hugging Face models: `NearStorageCache` and the attention that goes with it.

transformers calls `cache.update(k, v, layer)` first and hands what it returns to the attention
function, which is not given the cache. So `update` returns handles: tensors that carry their layer,
and refuse every operation, so that no other attention function can use them by mistake.

What a layer holds of a sequence: full pages on flash, and a *tail* of fewer than page_tokens tokens
in host memory, both rounded to the KV type. New tokens are attended first and stored afterwards:

    pages on flash   by the card, for every query row    \
    tail, new tokens   on the host, causally              / merged
"""

from collections.abc import Sequence
import errno
import logging
import math
import tempfile
from typing import cast
import weakref

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from nearkv_hw import pages
from nearkv_hw.abi import KvType, PageLayout

from ..attention import Figures, PageAttention, Partial, check_card, measure_cards, merge
from ..cards import Card, CardError, open_cards
from ..io import FlashError, PageId
from ..store import DELAYED_BYTES, KvStore

log = logging.getLogger("nearkv")

_TORCH_TYPES = {KvType.FP16: torch.float16, KvType.BF16: torch.bfloat16}
_ROWS_AT_ONCE = 256  # query tokens whose scores the host holds at once


class NearStorageCache(Cache):
    """A transformers cache whose K and V lie in page files and are attended by a card.

    Pass it as `past_key_values=` to `generate` or `forward` of a model that was loaded with
    `attn_implementation="nearkv"`. Its pages live in a new directory inside `directory`, removed by
    `close` (or at the latest when the process ends). A context manager.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model: full attention, head_dim a multiple of 32 that the card supports.
    directory : path, or a sequence of them, optional
        Where pages go: a directory on the drive to use, or one for each card. Default: that for
        temporary files.
    card : Card, str, or a sequence of them, optional
        Names are opened and closed with the cache. Several cards share every step's work. Default:
        as `open_card`.
    page_tokens : int
        32, 64, 96 or a multiple of 128.
    kv_dtype : "fp16" or "bf16", optional
        What K and V are rounded to. Default bf16 for bf16 models, otherwise fp16.
    spill_pages : int
        How many full pages of a head gather in host memory before they are written. Until then the
        host attends to them. Processor time for a token, measured over 520 tokens behind 4096 (twin,
        4 layers, 4 kv heads of 64 channels, groups of 3), with page_tokens x spill_pages: 32 x 1
        13.0 ms, 32 x 4 12.0, 128 x 1 10.3, 128 x 4 9.8, 512 x 1 11.3. Pages of 128 matter, gathering
        them hardly does.
    weights : sequence of float, or "measure", optional
        How fast the cards are, in any unit: a slow one gets less. "measure" finds out, with the pages'
        own drives, which takes a fraction of a second. Default: all alike. No result depends on it.
    budget_bytes : int, optional
        Limit on what is written to flash.
    beyond_budget : "raise" or "keep"
        What to do with pages beyond it: FlashError, or keep them in host memory.
    on_fault : "raise" or "drop"
        What a fault does that belongs to one sequence: a page that is damaged, missing, or cannot be
        read or written; K or V that are Inf or NaN. "raise" ends the call. "drop" takes the sequence
        out and goes on with the others, whose results are the same bits as without the fault: its
        pages are deleted, its attention is zero from then on, and `faults` tells why. Give
        `logits_processor` and `stopping_criteria` to `generate`, so that its row ends there.

    Attributes
    ----------
    figures : nearkv.attention.Figures
        What the card and the host have done so far.
    faults : dict of int to Exception
        By row of the batch: why it was dropped. FlashError and CardError have `page` and `filename`.

    Raises
    ------
    ValueError
        If model or card do not fit; nothing has been written then.
    FlashError
        If the directory cannot be written.
    CardError
        If the card cannot be opened.
    """

    def __init__(
        self,
        config,
        directory=None,
        card: Card | str | Sequence[Card | str] | None = None,
        page_tokens: int = 128,
        kv_dtype=None,
        *,
        spill_pages: int = 1,
        weights: Sequence[float] | str | None = None,
        budget_bytes: int | None = None,
        beyond_budget: str = "raise",
        on_fault: str = "raise",
    ):
        if spill_pages < 1:
            raise ValueError(f"spill_pages must be at least 1, not {spill_pages}")
        if beyond_budget not in ("raise", "keep"):
            raise ValueError(f'beyond_budget must be "raise" or "keep", not {beyond_budget!r}')
        if on_fault not in ("raise", "drop"):
            raise ValueError(f'on_fault must be "raise" or "drop", not {on_fault!r}')
        config = config.get_text_config(decoder=True)
        if kv_dtype is None:
            kv_dtype = pages.default_kv_dtype(config.dtype)
        head_dim, n_kv_heads = _check_model(config)
        try:
            layout = PageLayout(head_dim, page_tokens, pages.parse_kv_type(kv_dtype))
        except ValueError as error:
            raise ValueError(f"model {_name(config)} cannot use nearkv: {error}") from None
        self.cards, owned = open_cards(card)
        try:
            for one in self.cards:
                check_card(one, layout)
            directory = tempfile.gettempdir() if directory is None else directory
            if isinstance(weights, str):
                if weights != "measure":
                    raise ValueError(f'weights must be numbers or "measure", not {weights!r}')
                weights = measure_cards(self.cards, directory, layout, n_kv_heads)
            self.store = KvStore(
                directory, layout, n_kv_heads, temporary=True, n_shards=len(self.cards),
                weights=weights, delayed_bytes=DELAYED_BYTES, budget_bytes=budget_bytes,
            )  # fmt: skip
            self._pages = PageAttention(self.cards, self.store)
        except BaseException:
            for one in owned:
                one.close()
            raise
        self._finalizer = weakref.finalize(self, _close, self._pages, self.store, owned)
        self.faults: dict[int, Exception] = {}
        tokens = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        # What a dropped row goes on with. Any token does: nobody is to read it.
        self._filler = next((token for token in tokens if isinstance(token, int)), 0)
        super().__init__(
            layers=[
                _Layer(
                    self._pages,
                    index,
                    spill_pages,
                    beyond_budget == "keep",
                    on_fault == "drop",
                    self.faults,
                )  # fmt: skip
                for index in range(config.num_hidden_layers)
            ]
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def figures(self) -> Figures:
        return self._pages.figures

    @property
    def card(self) -> Card:
        """The first card."""
        return self.cards[0]

    def fill(self, past) -> None:
        """Put K and V behind what there is, without attention: those of a prefill made elsewhere.

        Parameters
        ----------
        past : sequence of (k, v)
            By layer: (batch, n_kv_heads, n_tokens, head_dim) each.
        """
        for layer, (k, v) in zip(self.layers, past, strict=True):
            cast(_Layer, layer).fill(k, v)

    @property
    def logits_processor(self) -> LogitsProcessorList:
        """For `generate`: rows that were dropped go on with padding, whatever the model computes."""
        return LogitsProcessorList([_FillDropped(self.faults, self._filler)])

    @property
    def stopping_criteria(self) -> StoppingCriteriaList:
        """For `generate`: rows that were dropped are finished."""
        return StoppingCriteriaList([_StopDropped(self.faults)])

    def close(self) -> None:
        """Delete the pages. May be called twice."""
        self._finalizer()


class _FillDropped(LogitsProcessor):
    def __init__(self, faults: dict[int, Exception], filler: int):
        self._faults, self._filler = faults, filler

    def __call__(self, input_ids, scores):
        rows = list(self._faults)
        if rows:
            scores = scores.clone()
            scores[rows] = -torch.inf
            scores[rows, self._filler] = 0
        return scores


class _StopDropped(StoppingCriteria):
    def __init__(self, faults: dict[int, Exception]):
        self._faults = faults

    def __call__(self, input_ids, scores, **kwargs):
        stop = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        stop[list(self._faults)] = True
        return stop


class _Handle(torch.Tensor):
    """New K or V on its way to `attention_forward`, with the layer it belongs to."""

    layer: "_Layer"
    plain: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, layer: "_Layer") -> "_Handle":
        handle = x.as_subclass(cls)
        handle.layer, handle.plain = layer, x
        return handle

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device, ...
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            "K and V of a NearStorageCache are on flash, only the nearkv attention can use them: "
            'load the model with attn_implementation="nearkv", or call '
            'model.set_attn_implementation("nearkv")'
        )


class _Layer(CacheLayerMixin):
    """K and V of one layer for a batch of sequences; row b of the batch is sequence b."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        attention: PageAttention,
        index: int,
        spill_pages: int,
        keep: bool,
        drop: bool,
        faults: dict[int, Exception],
    ):
        super().__init__()
        self._drop, self._faults = drop, faults  # of the whole cache
        self._spill_tokens = spill_pages * attention.store.layout.page_tokens
        self._keep = keep  # in host memory, what is beyond the write budget
        self._may_write = True
        self._attention, self._store, self._index = attention, attention.store, index
        self._dtype = _TORCH_TYPES[self._store.layout.kv_type]
        self._positions = 0  # including padding
        self._pending = 0  # positions given to `update` and not yet attended

    # --- what transformers calls --------------------------------------------------------------

    def lazy_initialization(self, key_states, value_states) -> None:
        layout, (batch, heads, _, head_dim) = self._store.layout, key_states.shape
        if heads != self._store.n_kv_heads or key_states.shape != value_states.shape or (
            head_dim != layout.head_dim
        ):  # fmt: skip
            raise ValueError(
                f"layer {self._index} has K {tuple(key_states.shape)} and V "
                f"{tuple(value_states.shape)}; the cache was made for {self._store.n_kv_heads} kv "
                f"heads of {layout.head_dim} channels"
            )
        self.batch_size = batch
        # (K or V, sequence, kv head, token, channel)
        shape = (2, batch, heads, self._spill_tokens, head_dim)
        self._tail = torch.zeros(shape, dtype=self._dtype)
        self._tail_tokens = [0] * batch
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._pending:
            raise RuntimeError(
                f"layer {self._index} was updated twice without attention; "
                'load the model with attn_implementation="nearkv"'
            )
        if len(key_states) != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences and was given {len(key_states)}; "
                "make a new cache"
            )
        self._pending = key_states.shape[2]
        self._positions += self._pending
        k, v = (x.detach().to("cpu", self._dtype) for x in (key_states, value_states))
        return _Handle.of(k, self), _Handle.of(v, self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._positions + query_length, 0

    def get_seq_length(self) -> int:
        return self._positions

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._faults.clear()
        if self.is_initialized:
            for sequence in range(self.batch_size):
                if self._store.n_pages(sequence, self._index):
                    self._store.truncate(sequence, self._index, 0)
            self._tail_tokens = [0] * self.batch_size
        self._positions = self._pending = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; a page that is cut becomes the tail."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, not {tokens_to_remove}"
            )
        if not tokens_to_remove or not self.is_initialized:
            return
        page_tokens = self._store.layout.page_tokens
        for sequence in range(self.batch_size):
            n_pages = self._store.n_pages(sequence, self._index)
            left = n_pages * page_tokens + self._tail_tokens[sequence] + tokens_to_remove
            left = max(left, 0)
            keep = min(left // page_tokens, n_pages)
            if keep < n_pages:
                self._take_back(sequence, keep)
                self._store.truncate(sequence, self._index, keep)
            self._tail_tokens[sequence] = left - keep * page_tokens
        self._positions += tokens_to_remove

    def offload(self) -> None:
        """Nothing to do: the tail is in host memory already."""

    prefetch = offload

    def reorder_cache(self, beam_idx) -> None:
        raise NotImplementedError("pages on flash cannot be reordered: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("pages on flash cannot be repeated: repeat the prompt instead")

    def batch_select_indices(self, indices) -> None:
        raise NotImplementedError("pages on flash cannot be selected: make a cache for each batch")

    def fill(self, k, v) -> None:
        """Put K and V behind what there is, without attention: (batch, kv heads, tokens, head_dim)."""
        k, v = (handle.plain for handle in self.update(k, v))
        self._commit(k, v, None)
        self._pending = 0

    # --- attention ----------------------------------------------------------------------------

    def attend(self, module, query, k, v, padding, scale: float) -> torch.Tensor:
        """Attend to all there is, then store what is new.

        Parameters
        ----------
        query : (batch, n_q_heads, n_new, head_dim)
        k, v : (batch, n_kv_heads, n_new, head_dim), on the host, in the KV type
        padding : bool (batch, positions) or None
            Which positions are tokens. Default: all.

        Returns
        -------
        (batch, n_new, n_q_heads, head_dim), dtype and device of query
        """
        batch, n_q_heads, n_new, head_dim = query.shape
        valid = None if padding is None else padding[:, -n_new:].cpu()
        stored = [self._store.n_pages(sequence, self._index) for sequence in range(batch)]
        if self._positions == n_new:  # prefill: nothing but new tokens
            mask = None if valid is None else _causal(valid, n_new).to(query.device)
            k_here, v_here = (x.to(query.device, query.dtype) for x in (k, v))
            out, _ = sdpa_attention_forward(
                module, query, k_here, v_here, mask, scaling=scale, is_causal=True
            )
            self.figures.prefill_tokens += batch * n_q_heads * n_new * (n_new + 1) // 2
        else:
            out = self._attend_past(query.detach().float().cpu(), k, v, valid, stored, scale)
            out = out.to(query.device, query.dtype)
        self._commit(k, v, valid)
        self._pending = 0
        if self._faults:
            out[list(self._faults)] = 0
        return out

    def _attend_past(self, query, k, v, valid, stored, scale) -> torch.Tensor:
        batch, n_q_heads, n_new, head_dim = query.shape
        n_kv_heads = k.shape[1]
        # Query heads of a group, then their tokens: all share a kv head's pages.
        rows = query.reshape(batch, n_kv_heads, -1, head_dim)
        out, lse_ln = self._attend_host(rows, k, v, valid, n_new, scale)
        alive, partial = self._attend_pages(rows.numpy(), scale, stored)
        if partial is not None:
            card_out, lse_log2 = partial.normalise()
            merged, _ = merge(
                np.stack([out[alive].numpy(), card_out]),
                np.stack([lse_ln[alive].numpy(), lse_log2 * math.log(2)]),
            )
            out = out.double()
            out[alive] = torch.from_numpy(merged).double()
        return out.reshape(batch, n_q_heads, n_new, head_dim).transpose(1, 2).contiguous()

    def _attend_pages(self, rows, scale, stored) -> tuple[list[int], Partial | None]:
        """The rows of the batch that were not dropped, and their partial if they have pages."""
        while True:
            alive = [row for row in range(len(rows)) if row not in self._faults]
            if not any(stored[row] for row in alive):
                return alive, None
            try:
                return alive, self._attention.attend(
                    self._index, alive, rows[alive], scale, [stored[row] for row in alive]
                )
            except (FlashError, CardError) as error:
                if error.page is None:  # it is nobody's in particular
                    raise
                self._take_out(error.page.sequence, error)

    def _take_out(self, sequence: int, error: Exception) -> None:
        """Go on without a sequence; or raise the error, if that is what is wanted."""
        if not self._drop:
            raise error
        log.warning("row %d of the batch is dropped: %s", sequence, error)
        self._faults[sequence] = error
        self._attention.discard()  # reads of its files may be on their way
        if sequence in self._store.sequences():
            self._store.drop(sequence)

    def _attend_host(self, rows, k, v, valid, n_new, scale):
        """Tail and new tokens: out (batch, kv heads, rows, head_dim), lse_ln (without the last)."""
        longest = max(self._tail_tokens)
        tail_k, tail_v = self._tail[:, :, :, :longest]
        keys = torch.cat([tail_k, k], dim=2).float()
        values = torch.cat([tail_v, v], dim=2).float()
        tail_valid = torch.arange(longest) < torch.tensor(self._tail_tokens)[:, None]
        valid = torch.ones(k.shape[0], n_new, dtype=torch.bool) if valid is None else valid
        mask = _causal(torch.cat([tail_valid, valid], dim=1), n_new)  # (batch, 1, n_new, keys)
        self.figures.host_tokens += int(mask.sum()) * k.shape[1] * (rows.shape[2] // n_new)
        batch, heads, _, head_dim = rows.shape
        grouped = rows.view(batch, heads, -1, n_new, head_dim)
        outs, lses = [], []
        for at in range(0, n_new, _ROWS_AT_ONCE):
            some = slice(at, at + _ROWS_AT_ONCE)
            scores = (grouped[:, :, :, some] * scale) @ keys[:, :, None].transpose(-1, -2)
            scores = scores.masked_fill(~mask[:, :, None, some], -torch.inf)
            lse = scores.logsumexp(-1)
            outs.append((scores - lse[..., None]).exp() @ values[:, :, None])
            lses.append(lse)
        out = torch.cat(outs, dim=3).reshape(batch, heads, -1, head_dim)
        return out, torch.cat(lses, dim=3).reshape(batch, heads, -1)

    @property
    def figures(self) -> Figures:
        return self._attention.figures

    # --- storing ------------------------------------------------------------------------------

    def _commit(self, k, v, valid) -> None:
        """Tokens move to the tail, and from there to flash whenever they fill pages."""
        self._check_finite(k, v)
        for sequence in range(self.batch_size):
            if sequence not in self._faults:
                try:
                    self._commit_one(sequence, k, v, valid)
                except FlashError as error:
                    self._take_out(sequence, error)

    def _commit_one(self, sequence: int, k, v, valid) -> None:
        page_tokens = self._store.layout.page_tokens
        new = torch.stack([k[sequence], v[sequence]])  # (K or V, kv head, token, channel)
        if valid is not None:
            new = new[:, :, valid[sequence]]
        have, n_new = self._tail_tokens[sequence], new.shape[2]
        if have + n_new >= self._spill_tokens and self._may_write:
            tokens = torch.cat([self._tail[:, sequence, :, :have], new], dim=2)
            full = (have + n_new) // page_tokens * page_tokens
            if self._spill(sequence, tokens[:, :, :full]):
                have, new = 0, tokens[:, :, full:]
        self._grow_tail(have + new.shape[2])
        self._tail[:, sequence, :, have : have + new.shape[2]] = new
        self._tail_tokens[sequence] = have + new.shape[2]

    def _spill(self, sequence: int, tokens) -> bool:
        """Give full pages to the store, unless it may not write them and they are to be kept."""
        try:
            self._store.append(sequence, self._index, *tokens)
        except FlashError as error:
            if not self._keep or error.errno != errno.EDQUOT:
                raise
            self._may_write = False
        return self._may_write

    def _grow_tail(self, tokens: int) -> None:
        missing = tokens - self._tail.shape[3]
        if missing > 0:
            missing = -(-missing // self._spill_tokens) * self._spill_tokens
            self._tail = torch.nn.functional.pad(self._tail, (0, 0, 0, missing))

    def _check_finite(self, k, v) -> None:
        for name, x in (("K", k), ("V", v)):
            finite = torch.isfinite(x)
            if finite.all():
                continue
            for sequence in torch.nonzero(~finite.flatten(1).all(1)).flatten().tolist():
                if sequence in self._faults:
                    continue
                head, token, _ = torch.nonzero(~finite[sequence])[0].tolist()
                token += self._positions - x.shape[2]
                error = ValueError(
                    f"Inf or NaN in {name} of layer {self._index}, sequence {sequence}, kv head "
                    f"{head}, token {token}: either the model computed it, or it is too large for "
                    f"{self._store.layout.kv_type.name.lower()} (kv_dtype='bf16' reaches further)"
                )
                self._take_out(sequence, error)

    def _take_back(self, sequence: int, page: int) -> None:
        """Read a page from flash into the tail."""
        layout = self._store.layout
        for head in range(self._store.n_kv_heads):
            data = self._store.read_pages(PageId(self._index, sequence, head, page), 1)
            for which, patterns in enumerate(pages.unpack(layout, data)):
                values = torch.from_numpy(patterns.view(np.int16)).view(self._dtype)
                self._tail[which, sequence, head, : layout.page_tokens] = values


def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                      **kwargs):  # fmt: skip
    """The attention function "nearkv" of transformers.

    With K and V of a NearStorageCache, attends to pages, tail and new tokens; with any others, does
    what "sdpa" does.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"nearkv attention has no {name}; load the model with another attn_implementation"
            )
    if not isinstance(key, _Handle):
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = _causal(attention_mask, query.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            "NearStorageCache knows causal attention with padding, no 4-dimensional masks"
        )
    if dropout or not kwargs.get("is_causal", True):
        raise NotImplementedError("NearStorageCache knows causal attention without dropout only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = key.layer.attend(module, query, key.plain, value.plain, attention_mask, scale)
    return out, None


def padding_mask(*, kv_length, mask_function=causal_mask_function, attention_mask=None, q_length,
                 q_offset=0, kv_offset=0, **kwargs):  # fmt: skip
    """The mask function of "nearkv": bool (batch, positions), or None where all are tokens.

    Causality needs no mask; only padding does. Anything but plain causal attention becomes the mask
    that "sdpa" would get.
    """
    if mask_function is not causal_mask_function or kv_offset:
        return sdpa_mask(
            kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask,
            q_length=q_length, q_offset=q_offset, kv_offset=kv_offset, **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        # torch's is_causal aligns to the first position; queries behind a past need a mask.
        if 1 < q_length < kv_length:
            return torch.ones(kwargs["batch_size"], kv_length, dtype=torch.bool)
        return None
    missing = kv_length - attention_mask.shape[1]
    mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)), value=False)
    mask = mask[:, :kv_length]
    return None if mask.all() and not 1 < q_length < kv_length else mask


def _causal(valid: torch.Tensor, n_queries: int) -> torch.Tensor:
    """bool (batch, 1, n_queries, keys): the last n_queries keys are the queries' own tokens.

    valid : bool (batch, keys). A query that is padding attends to itself, so that nothing is NaN.
    """
    n_keys = valid.shape[1]
    own = torch.arange(n_keys - n_queries, n_keys, device=valid.device)[:, None]
    position = torch.arange(n_keys, device=valid.device)
    return ((position <= own) & valid[:, None, None]) | (position == own)


def _check_model(config) -> tuple[int, int]:
    """head_dim and kv heads of a model that nearkv supports.

    Raises
    ------
    ValueError
        If it is of another kind, naming what.
    """
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"model {_name(config)} has layers of {', '.join(sorted(kinds))}; "
            "NearStorageCache supports full attention only"
        )
    for name in ("attn_logit_softcapping", "kv_lora_rank", "attention_sinks"):
        if getattr(config, name, None):
            raise ValueError(f"model {_name(config)} has {name}, which nearkv does not support")
    n_q_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_q_heads
    return head_dim, getattr(config, "num_key_value_heads", None) or n_q_heads


def _name(config) -> str:
    return config.name_or_path or config.model_type


def _close(attention: PageAttention, store: KvStore, owned: list[Card]) -> None:
    attention.close()
    store.close()
    for card in owned:
        card.close()
