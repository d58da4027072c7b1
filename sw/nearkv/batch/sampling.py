# SPDX-License-Identifier: Apache-2.0
"""The next token of one answer. Each draws from random numbers of its own, whoever is computed beside it."""

import hashlib

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .requests import Request


class Sampler:
    """Draws the tokens of one choice of a request.

    Parameters
    ----------
    request : Request
    choice : int
        Which of its choices.
    seed : int
        Of the run: what requests without a seed take, together with their custom_id.
    """

    def __init__(self, request: Request, choice: int, seed: int):
        self.is_greedy = request.temperature == 0
        own = f"{seed} {request.custom_id}" if request.seed is None else f"= {request.seed}"
        digest = hashlib.sha256(f"{own} {choice}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        self._warpers = LogitsProcessorList()
        if not self.is_greedy:
            self._warpers.append(TemperatureLogitsWarper(request.temperature))
        if request.top_k:
            self._warpers.append(TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            self._warpers.append(TopPLogitsWarper(request.top_p))

    def draw(self, logits: torch.Tensor) -> int:
        """A token, by its logits: float32 (vocabulary,) on the host."""
        if self.is_greedy:
            return int(logits.argmax())
        # transformers' warpers look at scores alone, not at the tokens before.
        scores = self._warpers(torch.LongTensor(1, 0), logits[None])
        p = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(p, 1, generator=self._generator))
