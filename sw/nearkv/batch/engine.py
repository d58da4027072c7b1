# SPDX-License-Identifier: Apache-2.0
"""Answers many prompts with one transformers model and one NearStorageCache.

The cache's rows are slots. A step gives every row its next token; rows that are done leave, and new prompts are
read beside the others, in a copy of the cache, and join. What prompts share at their beginning is read once, and
its pages have as many owners as there are prompts.

What a line's answer depends on: on its own prompt, parameters and random numbers, and on the order in which
matrix products add up, which changes with the rows beside it. In fp32 that is the last bits of the logits: greedy
tokens are those of the prompt alone unless two tokens were as good as equal. In bf16 such ties are common.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
import copy
from dataclasses import dataclass, field
import errno
import inspect
from typing import Any

import numpy as np
import torch

from ..attention import Figures
from ..hf.cache import NearStorageCache
from ..io import FlashError
from .prefixes import Prefix, shared_prefixes
from .requests import COMPLETION, Choice, Request
from .sampling import Sampler

DEEPEST = 7  # prefixes within prefixes: each holds a row
_CONTEXT = 16  # tokens of a prompt that decide how the next ones are written
# A byte is at most a token, and a tokenizer may write a space that is not there.
_TOKENS_OF_A_CHARACTER, _TOKENS_MORE = 4, 4
# What has no room or must not be written now will not be written on a second try.
_NOT_OF_ONE_SEQUENCE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG)


@dataclass(eq=False)
class Job:
    """A prompt to be answered.

    Attributes
    ----------
    request : Request
    tokens : int32 (n_tokens,)
        Of the prompt.
    max_tokens : int
    """

    request: Request
    tokens: np.ndarray
    max_tokens: int
    failures: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)


@dataclass
class _Group:
    """Jobs whose first tokens, so many, a cache has; the shortest first."""

    cache: NearStorageCache
    length: int
    jobs: deque[Job]


@dataclass(eq=False)
class _Row:
    """A row of the cache: one choice of a job. `tokens` are those of the answer so far."""

    job: Job
    choice: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Answers jobs; once.

    Parameters
    ----------
    model, tokenizer
        As `hf.models.load` gives them.
    cache : NearStorageCache
        Empty, made with on_fault="drop".
    slots : int
        Rows at most.
    chunk_tokens : int
        Positions of a prefill in one call of the model, of all its rows together.
    seed : int
        See `Sampler`.
    write_budget : int, optional
        Bytes: no prompt is taken whose pages would exceed it. Whoever makes the cache gives it the same
        budget and beyond_budget="keep", so that answers that are under way keep to it.

    Attributes
    ----------
    prompt_tokens, shared_tokens, answer_tokens : int
        Read; not read again, because another prompt had read them; said.
    retried : int
        Prompts that were computed once more.
    out_of_budget : bool
        Whether prompts were left for another run.
    steps, rows_stepped : int
        Decode steps, and rows of all of them.
    """

    def __init__(self, model, tokenizer, cache: NearStorageCache, *, slots: int,
                 chunk_tokens: int, seed: int = 0, write_budget: int | None = None):  # fmt: skip
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._slots, self._chunk_tokens, self._seed = slots, chunk_tokens, seed
        self._write_budget = write_budget
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1
        ends = model.generation_config.eos_token_id
        self._ends = {*ends} if isinstance(ends, list) else {ends}
        self._empty = copy.deepcopy(cache)
        self._rows: list[_Row] = []
        self._lengths: list[int] = []  # tokens of each row that the cache has
        self._again: deque[Job] = deque()
        self._group = _Group(self._empty, 0, deque())
        self._figures = Figures()
        self.prompt_tokens = self.shared_tokens = self.answer_tokens = 0
        self.retried = self.steps = self.rows_stepped = 0
        self.out_of_budget = False

    @property
    def figures(self) -> Figures:
        """What cards and host have done so far."""
        total = Figures(**vars(self._figures))
        total += self._cache.figures
        return total

    @torch.no_grad()
    def run(
        self,
        jobs: Sequence[Job],
        answered: Callable[[Job, list[Choice]], None],
        failed: Callable[[Job, Exception], None],
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        """Answer jobs, in an order that suits the machine.

        Parameters
        ----------
        answered : callable
            Given each job with its choices as soon as it is done.
        failed : callable
            Given a job whose K and V were damaged twice, and what happened.
        stepped : callable
            Called after every step.
        """
        self._answered, self._failed = answered, failed
        self._groups = self._grouped(jobs)
        try:
            while True:
                self._refill()
                if not self._rows and not self._more():
                    break
                self._step()
                stepped()
        finally:
            self._groups.close()
            self._empty.close()

    # --- prompts ------------------------------------------------------------------------------

    def _more(self) -> bool:
        """Whether there are prompts to be read; if so, in `_again` or in `_group`."""
        while not self._again and not self._group.jobs:
            following = next(self._groups, None)
            if following is None:
                return False
            self._group = following
        return not self.out_of_budget

    def _grouped(self, jobs: Sequence[Job]) -> Generator["_Group"]:
        """Jobs by what they share. A group is of use until the next one is asked for."""
        prompts = [job.tokens for job in jobs]
        page_tokens = self._cache.store.layout.page_tokens
        path: list[NearStorageCache] = []
        try:
            for prefix in shared_prefixes(prompts, page_tokens, DEEPEST):
                while len(path) > prefix.depth:
                    self._close(path.pop())
                path.append(self._read(prefix, prompts[prefix.of], path))
                # A prefix that was damaged is of no use; its prompts are read as they are.
                length = prefix.length if not path[-1].faults else 0
                members = deque(jobs[number] for number in prefix.members)
                yield _Group(path[-1] if length else self._empty, length, members)
        finally:
            while path:
                self._close(path.pop())

    def _read(self, prefix: Prefix, tokens: np.ndarray, path: list) -> NearStorageCache:
        """A copy of the last cache of a path, with the tokens of a prefix behind it."""
        cache = copy.deepcopy(path[-1] if path else self._empty)
        have = cache.get_seq_length()
        if prefix.length and not cache.faults:
            self._forward(cache, have, [tokens[have : prefix.length]])
            self.prompt_tokens += prefix.length - have
        return cache

    def _close(self, cache: NearStorageCache) -> None:
        self._figures += cache.figures
        cache.close()

    def _refill(self) -> None:
        """Read as many new prompts as there is room for, as soon as that is worth a call of the model."""
        free = self._slots - len(self._rows)
        if self._rows and free < max(1, self._slots // 4):
            return
        while free > 0 and self._more():
            group, jobs = self._take(free)
            if not jobs:
                break
            self._prefill(group, jobs)
            free = self._slots - len(self._rows)

    def _take(self, free: int) -> tuple["_Group", list[Job]]:
        """The next prompts that can be read in one call."""
        group = self._group
        if self._again:  # by itself: what was damaged may be what it shared with others
            group = _Group(self._empty, 0, self._again)
        jobs: list[Job] = []
        while group.jobs:
            job = group.jobs[0]
            # The longest comes last.
            n_positions = (len(job.tokens) - group.length) * (len(jobs) + 1)
            if jobs and (n_positions > self._chunk_tokens or group.jobs is self._again):
                break
            free -= job.request.n
            if free < 0 or not self._within_budget([*jobs, job], group.length):
                break
            jobs.append(group.jobs.popleft())
        return group, jobs

    def _within_budget(self, jobs: Sequence[Job], length: int) -> bool:
        if self._write_budget is None:
            return True
        layout, store = self._cache.store.layout, self._cache.store
        n_pages = sum((len(job.tokens) - length) // layout.page_tokens for job in jobs)
        n_bytes = n_pages * layout.page_bytes * store.n_kv_heads * len(self._cache.layers)
        self.out_of_budget = store.bytes_written + n_bytes > self._write_budget
        return not self.out_of_budget

    def _prefill(self, group: "_Group", jobs: list[Job]) -> None:
        """Read prompts and take their rows in."""
        length, cache = group.length, copy.deepcopy(group.cache)
        try:
            if length and len(jobs) > 1:
                cache.batch_repeat_interleave(len(jobs))
            logits = self._forward(cache, length, [job.tokens[length:] for job in jobs])
            self.prompt_tokens += sum(len(job.tokens) - length for job in jobs)
            self.shared_tokens += length * len(jobs)
            for row, error in cache.faults.items():
                self._fault(jobs[row], error)
            rows = [
                (at, _Row(job, choice, Sampler(job.request, choice, self._seed)))
                for at, job in enumerate(jobs)
                if at not in cache.faults
                for choice in range(job.request.n)
            ]
            stay = [(at, row) for at, row in rows if not self._said(row, logits[at])]
            if stay:
                cache.batch_select_indices(torch.tensor([at for at, _ in stay]))
                self._cache.join(cache)
                self._rows += [row for _, row in stay]
                self._lengths += [len(row.job.tokens) for _, row in stay]
        finally:
            self._close(cache)

    def _forward(self, cache: NearStorageCache, past: int, new: list[np.ndarray]) -> torch.Tensor:
        """Read tokens behind `past` others that every row has; logits behind the last: (rows, vocabulary)."""
        longest = max(map(len, new))
        ids = torch.zeros(len(new), longest, dtype=torch.long)
        valid = torch.zeros(len(new), past + longest, dtype=torch.long)
        valid[:, :past] = 1
        for row, tokens in enumerate(new):
            ids[row, longest - len(tokens) :] = torch.from_numpy(tokens.astype(np.int64))
            valid[row, past + longest - len(tokens) :] = 1
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        chunk, logits = max(1, self._chunk_tokens // len(new)), None
        for at in range(0, longest, chunk):
            part = slice(past + at, past + min(at + chunk, longest))
            logits = self._call(
                cache, ids[:, at : at + chunk], valid[:, : part.stop], positions[:, part]
            )
        assert logits is not None
        return logits

    def _call(self, cache, ids, mask, positions) -> torch.Tensor:
        device = self._model.device
        options = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = positions.to(device)
        out = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            **options,
        )
        return out.logits[:, -1].float().cpu()

    # --- answers ------------------------------------------------------------------------------

    def _step(self) -> None:
        """Give every row its next token."""
        if not self._rows:
            return
        end = self._cache.get_seq_length() + 1
        lengths = torch.tensor(self._lengths)[:, None]
        logits = self._call(
            self._cache,
            torch.tensor([[row.tokens[-1]] for row in self._rows]),
            (torch.arange(end) >= end - 1 - lengths).long(),
            lengths,
        )
        self.steps += 1
        self.rows_stepped += len(self._rows)
        self._lengths = [length + 1 for length in self._lengths]
        faults = {self._rows[at].job: error for at, error in self._cache.faults.items()}
        for job, error in faults.items():
            self._fault(job, error)
        # All choices of a job are computed again together.
        gone = {
            at
            for at, row in enumerate(self._rows)
            if row.job in faults or self._said(row, logits[at])
        }
        self._leave(gone)

    def _leave(self, gone: set[int]) -> None:
        stay = [at for at in range(len(self._rows)) if at not in gone]
        if not stay:
            self._cache.reset()
        elif gone:
            self._cache.batch_select_indices(torch.tensor(stay))
        self._rows = [self._rows[at] for at in stay]
        self._lengths = [self._lengths[at] for at in stay]

    def _fault(self, job: Job, error: Exception) -> None:
        """K or V of a job are lost."""
        if isinstance(error, FlashError) and error.errno in _NOT_OF_ONE_SEQUENCE:
            raise error
        job.failures += 1
        job.choices.clear()
        if job.failures > 1:
            self._failed(job, error)
        else:
            self.retried += 1
            self._again.append(job)

    def _said(self, row: _Row, logits: torch.Tensor) -> bool:
        """Take a row's next token; whether its answer is complete."""
        token = row.sampler.draw(logits)
        row.tokens.append(token)
        self.answer_tokens += 1
        job = row.job
        if token in self._ends:
            reason, text = "stop", self._text(job, row.tokens[:-1])
        elif (text := self._stopped(row)) is not None:
            reason = "stop"
        elif len(row.tokens) == job.max_tokens:
            reason, text = "length", self._text(job, row.tokens)
        else:
            return False
        job.choices[row.choice] = Choice(text, len(row.tokens), reason)
        if len(job.choices) == job.request.n:
            self._answered(job, [job.choices[choice] for choice in range(job.request.n)])
        return True

    def _stopped(self, row: _Row) -> str | None:
        """The text before the first stop, if there is one."""
        stop = row.job.request.stop
        if not stop:
            return None
        # In the last tokens first: decoding all of them, for each of them, takes too long.
        n = max(map(len, stop)) * _TOKENS_OF_A_CHARACTER + _TOKENS_MORE
        if _cut(self._decode(row.tokens[-n:]), stop) is None:
            return None
        return _cut(self._text(row.job, row.tokens), stop)

    def _text(self, job: Job, tokens: list[int]) -> str:
        """An answer in words. That of a completion goes on where the prompt ends."""
        if job.request.url == COMPLETION:
            before = job.tokens[-_CONTEXT:].tolist()
            text, whole = self._decode(before), self._decode([*before, *tokens])
            if whole.startswith(text):
                return whole[len(text) :]
        return self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """A text up to the first of the stops that is in it; None if there is none."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else None
