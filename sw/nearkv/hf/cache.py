# SPDX-License-Identifier: Apache-2.0
"""KV on flash for Hugging Face models: `NearStorageCache`.

The cache opens cards and store and owns them; `layer` says what a layer of it holds, `attention` how
the model comes to attend to that, `support` which models can.
"""

from collections.abc import Sequence
import os
import tempfile
from typing import cast
import weakref

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from nearkv_hw import pages

from ..attention import Figures, PageAttention, check_card, measure_cards
from ..cards import Card, open_cards
from ..store import DELAYED_BYTES, KvStore
from .layer import Batch, Layer
from .support import check_model, decoder_config, layout_for


class NearStorageCache(Cache):
    """A transformers cache whose K and V lie in page files and are attended by a card.

    Pass it as `past_key_values=` to `generate` or `forward` of a model that was loaded with
    `attn_implementation="nearkv"`. Its pages live in a new directory inside `directory`, removed by
    `close` (or at the latest when the process ends). A context manager.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model: a decoder with full causal attention and heads of up to 256 channels.
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
        kv_type = None if kv_dtype is None else pages.parse_kv_type(kv_dtype)
        config = decoder_config(config)
        if kv_type is None:
            kv_type = pages.parse_kv_type(pages.default_kv_dtype(config.dtype))
        shape = check_model(config)
        layout = layout_for(config, shape.head_dim, page_tokens, kv_type)
        self.cards, owned = open_cards(card)
        try:
            for one in self.cards:
                check_card(one, layout)
            directory = tempfile.gettempdir() if directory is None else directory
            if isinstance(weights, str):
                if weights != "measure":
                    raise ValueError(f'weights must be numbers or "measure", not {weights!r}')
                weights = measure_cards(self.cards, directory, layout, shape.n_kv_heads)
            self.store = KvStore(
                directory, layout, shape.n_kv_heads, temporary=True, n_shards=len(self.cards),
                weights=weights, delayed_bytes=DELAYED_BYTES, budget_bytes=budget_bytes,
            )  # fmt: skip
            self._pages = PageAttention(self.cards, self.store)
        except BaseException:
            for one in owned:
                one.close()
            raise
        self._batch = Batch(
            self._pages, shape.head_dim, spill_pages=spill_pages, keep=beyond_budget == "keep",
            drop=on_fault == "drop",
        )  # fmt: skip
        self._finalizer = weakref.finalize(
            self, _close, os.getpid(), self._batch, self._pages, self.store, owned
        )
        self.faults = self._batch.faults
        tokens = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        # What a dropped row goes on with. Any token does: nobody is to read it.
        self._filler = next((token for token in tokens if isinstance(token, int)), 0)
        layers = [Layer(self._batch, index) for index in range(shape.n_layers)]
        self._batch.layers = layers
        super().__init__(layers=[*layers])

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
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"the cache was made for {len(self.layers)} layers, and the model has a layer "
                f"{layer_idx}; make it with the config of this model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

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
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, not {tokens_to_remove}"
            )
        self._batch.crop(-tokens_to_remove)

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


def _close(pid: int, batch: Batch, attention: PageAttention, store: KvStore, owned) -> None:
    batch.closed = True
    if os.getpid() != pid:  # a fork ends; all of this belongs to its parent
        return
    attention.close()
    store.close()
    for card in owned:
        card.close()
