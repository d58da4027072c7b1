# SPDX-License-Identifier: Apache-2.0
"""KV on flash for Hugging Face models: `NearStorageCache`.

cache.py       opens cards and store, and what can be done with the whole
layer.py       what a layer holds, how it is attended and stored; what the layers have in common
attention.py   how a model comes to attend to that: the attention and mask functions "nearkv"
support.py     which models can
state.py       what is saved beside the pages
backing.py     what a cache and its copies share
"""

from collections.abc import Sequence
import tempfile
from typing import cast
import weakref

import numpy as np
import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from nearkv_hw import pages

from ..attention import Figures, check_card, measure_cards
from ..cards import Card, Engines, open_cards
from ..io import FlashError
from ..store import DELAYED_BYTES, KvStore
from .backing import Backing
from .layer import Batch, Layer
from .state import Identity, from_bytes, to_bytes
from .support import check_model, decoder_config, layout_for


class NearStorageCache(Cache):
    """A transformers cache whose K and V lie in page files and are attended by a card.

    Pass it as `past_key_values=` to `generate` or `forward` of a model that was loaded with
    `attn_implementation="nearkv"`. Everything that transformers does with a DynamicCache of full
    attention works: beams, assisted decoding, chunked prefill, `copy.deepcopy` (which shares pages).
    A context manager. One thread at a time may use it; several caches may share a card.

    A temporary cache leaves nothing behind. A persistent one can be saved, and opened again by another
    process, which goes on with the same tokens, bit for bit.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model: a decoder with full causal attention and heads of up to 256 channels.
    directory : path, or a sequence of them, optional
        Where pages go: a directory on the drive to use, or on each of several drives, up to one for
        each card. Default: that for temporary files.
    card : Card, Engines, str, or a sequence of them, optional
        Names are opened and closed with the cache. Several cards share every step's work, as do the
        engines of one. Default: as `open_card`.
    page_tokens : int
        32, 64, 96 or a multiple of 128.
    kv_dtype : "fp16" or "bf16", optional
        What K and V are rounded to. Default bf16 for bf16 models, otherwise fp16.
    persistent : bool
        Whether `save` will be used; the directory then belongs to this cache alone.
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
    cards : list of Card
    store : nearkv.store.KvStore
        Of the pages. Row b of the batch is one of its sequences.
    faults : dict of int to Exception
        By row of the batch: why it was dropped. FlashError and CardError have `page` and `filename`.

    Raises
    ------
    TypeError, ValueError
        If model, card, directory or options do not fit; nothing has been written then.
    FlashError
        If the directory cannot be written, or another process has its store.
    CardError
        If the card cannot be opened.
    """

    def __init__(
        self,
        config,
        directory=None,
        card: Card | Engines | str | Sequence[Card | Engines | str] | None = None,
        page_tokens: int = 128,
        kv_dtype=None,
        *,
        persistent: bool = False,
        spill_pages: int = 1,
        weights: Sequence[float] | str | None = None,
        budget_bytes: int | None = None,
        beyond_budget: str = "raise",
        on_fault: str = "raise",
    ):
        _check_options(spill_pages, weights, beyond_budget, on_fault)
        kv_type = None if kv_dtype is None else pages.parse_kv_type(kv_dtype)
        decoder = decoder_config(config)
        if kv_type is None:
            kv_type = pages.parse_kv_type(pages.default_kv_dtype(decoder.dtype))
        shape = check_model(decoder)
        layout = layout_for(decoder, shape.head_dim, page_tokens, kv_type)
        if directory is None:
            if persistent:
                raise ValueError("a persistent cache needs a directory of its own")
            directory = tempfile.gettempdir()
        backing = _open(
            directory, card, layout, shape.n_kv_heads, None, temporary=not persistent,
            weights=weights, budget_bytes=budget_bytes,
        )  # fmt: skip
        batch = Batch(
            backing, shape.n_layers, shape.head_dim, spill_pages=spill_pages,
            keep=beyond_budget == "keep", drop=on_fault == "drop",
        )  # fmt: skip
        self._adopt(batch, config)
        if persistent:
            try:
                if self.store.saved() is not None:
                    raise ValueError(
                        f"a cache is saved in {self.store.directories[0]}; go on with it by "
                        "NearStorageCache.open, or choose another directory"
                    )
                backing.drop(self.store.sequences())  # of a process that did not come to save them
            except BaseException:
                self.close()
                raise

    @classmethod
    def open(
        cls,
        directory,
        config,
        card: Card | Engines | str | Sequence[Card | Engines | str] | None = None,
        *,
        model: str | None = None,
        tokenizer=None,
        spill_pages: int = 1,
        weights: Sequence[float] | str | None = None,
        budget_bytes: int | None = None,
        beyond_budget: str = "raise",
        on_fault: str = "raise",
    ) -> "NearStorageCache":
        """The cache that was saved in a directory, as it was then.

        Nothing that is saved is changed before the next `save`, so many may be opened from it, one
        after the other.

        Parameters
        ----------
        directory : path, or a sequence of them
            As it was given when the cache was made.
        config : transformers.PreTrainedConfig
            Of the model, which must be the one that the cache was saved with.
        model, tokenizer
            As for `save`. Compared with what was saved, where both are known.
        card, spill_pages, weights, budget_bytes, beyond_budget, on_fault
            As for a new cache; they may differ from those it was saved with, and change no token.

        Raises
        ------
        ValueError
            If it belongs to another model or tokenizer; the message says what differs.
        FlashError
            If nothing is saved there, it is damaged, or another process has it.
        """
        _check_options(spill_pages, weights, beyond_budget, on_fault)
        decoder = decoder_config(config)
        shape = check_model(decoder)
        layout, n_kv_heads, n_shards = KvStore.describe(directory)
        backing = _open(
            directory, card, layout, n_kv_heads, n_shards, temporary=False, weights=weights,
            budget_bytes=budget_bytes,
        )  # fmt: skip
        batch = Batch(
            backing, shape.n_layers, shape.head_dim, spill_pages=spill_pages,
            keep=beyond_budget == "keep", drop=on_fault == "drop",
        )  # fmt: skip
        self = cls.__new__(cls)
        self._adopt(batch, config)
        try:
            where, data = backing.store.directories[0], backing.store.saved()
            if data is None:
                raise FlashError(
                    "no cache is saved here", filename=where,
                    remedy="its process ended before save(); make a new one",
                )  # fmt: skip
            state, saved, token_ids = from_bytes(data, where)
            mine = self._identity_of(model, tokenizer)
            saved.check(mine, where)
            self._identity = Identity(
                mine.config, mine.model or saved.model, mine.tokenizer or saved.tokenizer
            )
            backing.store.restore()
            batch.resume(state)
            self._token_ids = token_ids
        except BaseException:
            self.close()
            raise
        return self

    def _adopt(self, batch: Batch, config) -> None:
        """Become the cache of these rows."""
        self._batch, self._config = batch, config
        self._finalizer = weakref.finalize(self, batch.close)
        self.cards, self.store = list(batch.backing.cards), batch.store
        self.faults = batch.faults
        self._identity: Identity | None = None
        self._token_ids: np.ndarray | None = None
        decoder = decoder_config(config)
        tokens = (getattr(decoder, name, None) for name in ("pad_token_id", "eos_token_id"))
        # What a dropped row goes on with. Any token does: nobody is to read it.
        self._filler = next((token for token in tokens if isinstance(token, int)), 0)
        super().__init__(layers=[*batch.layers])

    def _identity_of(self, model: str | None, tokenizer) -> Identity:
        name = self._config.name_or_path if model is None else model
        return Identity.of(decoder_config(self._config), name or "", tokenizer)

    def __deepcopy__(self, memo) -> "NearStorageCache":
        """A copy that shares every page, and goes its own way from here."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy._adopt(self._batch.fork(), self._config)
        copy._identity, copy._token_ids = self._identity, self._token_ids
        return copy

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a NearStorageCache cannot be pickled, its pages are this process's: use copy.deepcopy, "
            "or make it persistent, save() it and open() it in the other process"
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """For transformers: K and V on their way to the attention "nearkv", which alone can use them.

        Raises
        ------
        ValueError
            If the cache is closed, or was made for another model.
        RuntimeError
            If layers come in another order than in the calls before, or in several threads.
        """
        _not_in_a_graph()
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"the cache was made for {len(self.layers)} layers, and the model has a layer "
                f"{layer_idx}; make it with the config of this model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that a layer holds, padding included."""
        _not_in_a_graph()
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """For transformers: how many positions there will be, and 0."""
        _not_in_a_graph()
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def figures(self) -> Figures:
        """What cards and host have done so far for this cache. Copies begin at 0."""
        return self._batch.attention.figures

    @property
    def card(self) -> Card:
        """The first card."""
        return self.cards[0]

    def fill(self, past) -> None:
        """Put K and V behind what there is, without attention: those of a prefill made elsewhere.

        Parameters
        ----------
        past : sequence of (k, v)
            By layer: (batch, n_kv_heads, n_tokens, head_dim) each. All are tokens, no padding.
        """
        for layer, (k, v) in zip(self.layers, past, strict=True):
            cast(Layer, layer).fill(k, v)

    def reset(self) -> None:
        """Forget every token and fault; the cache can be used again, also after an error."""
        self._batch.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions of every row, whichever of them are padding there.

        Parameters
        ----------
        tokens_to_remove : int
            How many, as a negative number. More than there are removes all.

        Raises
        ------
        FlashError
            If a page that is cut cannot be read back.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers may count in a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, not {tokens_to_remove}"
            )
        self._batch.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx) -> None:
        """Row b becomes what row beam_idx[b] is. No page is copied: it has one more owner."""
        self._batch.arrange([int(row) for row in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes so many; they share their pages."""
        self._batch.arrange([row for row in range(self._batch.size or 0) for _ in range(repeats)])

    def batch_select_indices(self, indices) -> None:
        """Only these rows stay, in this order; `indices` as for a tensor's first dimension."""
        self._batch.arrange(torch.arange(self._batch.size or 0)[indices].tolist())

    def join(self, other: "NearStorageCache") -> None:
        """Take over the rows of a copy, behind its own: prompts that were read beside those being answered.

        No page is read or written. All padding moves to the left, and what all rows have too much of goes:
        `attention_mask` says what is left. The copy is empty afterwards. Where the cache to be filled
        is empty too, `copy.deepcopy` of it makes one that can join.

        Raises
        ------
        ValueError
            If the other is no copy of this one, or of one of its copies.
        """
        self._batch.join(other._batch)

    # --- saving -------------------------------------------------------------------------------

    def save(self, input_ids=None, *, model: str | None = None, tokenizer=None) -> None:
        """Make the drive keep the cache as it is now, in place of what was saved before.

        If it fails, or the process is killed meanwhile, what was saved before is whole.

        Parameters
        ----------
        input_ids : int (batch, n), optional
            The tokens of all positions, and perhaps more behind them: `token_ids` of the cache that
            is opened. Default: none are kept.
        model : str, optional
            A name for the model's weights. Default: what its config was loaded from.
        tokenizer : tokenizer or str, optional
            Whose tokens they are. Default: not known.

        Raises
        ------
        ValueError
            If the cache is temporary, or input_ids do not fit.
        FlashError
            If pages or state could not be written.
        """
        if self.store.temporary:
            raise ValueError(
                "a temporary cache cannot be saved; make it with NearStorageCache(config, "
                "directory=..., persistent=True)"
            )
        state = self._batch.state()
        ids = None if input_ids is None else np.asarray(torch.as_tensor(input_ids).cpu())
        rows, positions = state.valid.shape
        if ids is not None and (ids.ndim != 2 or len(ids) != rows or ids.shape[1] < positions):
            raise ValueError(
                f"input_ids must be ({rows}, {positions} or more) for the rows and positions of the "
                f"cache, not {ids.shape}"
            )
        mine, before = self._identity_of(model, tokenizer), self._identity
        if before is not None:
            mine = Identity(
                mine.config, mine.model or before.model, mine.tokenizer or before.tokenizer
            )
        self.store.save(to_bytes(state, mine, ids))
        self._identity, self._token_ids = mine, ids

    @property
    def token_ids(self) -> torch.Tensor | None:
        """int64 (batch, n): what `save` was given, last or before this cache was opened."""
        return None if self._token_ids is None else torch.from_numpy(self._token_ids.copy())

    @property
    def attention_mask(self) -> torch.Tensor:
        """int64 (batch, positions): 1 where a position is a token, 0 where it is padding."""
        return self._batch.mask.long()

    # --- faults -------------------------------------------------------------------------------

    @property
    def logits_processor(self) -> LogitsProcessorList:
        """For `generate`: rows that were dropped go on with padding, whatever the model computes."""
        return LogitsProcessorList([_FillDropped(self.faults, self._filler)])

    @property
    def stopping_criteria(self) -> StoppingCriteriaList:
        """For `generate`: rows that were dropped are finished."""
        return StoppingCriteriaList([_StopDropped(self.faults)])

    def close(self) -> None:
        """Give the pages up; what was saved stays. May be called twice.

        Cards that were opened by name, and the store, are closed with the last copy of the cache.
        """
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


def _not_in_a_graph() -> None:
    """Keep what touches the cache out of compiled graphs.

    The compiler takes the error for a reason to run the calling function as it is, and compiles what
    that calls; only if it may not (fullgraph=True) does the error reach the user.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "a NearStorageCache cannot be part of a compiled graph: use torch.compile without "
            "fullgraph=True, or another cache"
        )


def _check_options(spill_pages, weights, beyond_budget, on_fault) -> None:
    if spill_pages < 1:
        raise ValueError(f"spill_pages must be at least 1, not {spill_pages}")
    if isinstance(weights, str) and weights != "measure":
        raise ValueError(f'weights must be numbers or "measure", not {weights!r}')
    if beyond_budget not in ("raise", "keep"):
        raise ValueError(f'beyond_budget must be "raise" or "keep", not {beyond_budget!r}')
    if on_fault not in ("raise", "drop"):
        raise ValueError(f'on_fault must be "raise" or "drop", not {on_fault!r}')


def _open(directory, card, layout, n_kv_heads, n_shards, *, temporary, weights, budget_bytes):
    """Open cards and store."""
    cards, owned = open_cards(card)
    store = None
    try:
        for one in cards:
            check_card(one, layout)
        if isinstance(weights, str):
            weights = measure_cards(cards, directory, layout, n_kv_heads)
        store = KvStore(
            directory, layout, n_kv_heads, temporary=temporary,
            n_shards=len(cards) if n_shards is None else n_shards, weights=weights,
            delayed_bytes=DELAYED_BYTES, budget_bytes=budget_bytes,
        )  # fmt: skip
        return Backing(cards, owned, store)
    except BaseException:
        if store is not None:
            store.close()
        for one in owned:
            one.close()
        raise
