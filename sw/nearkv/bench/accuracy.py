# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench accuracy`: how far answers lie from attention as it is defined, in float64.

The error of a head is the relative L2 error of its answer: |ours - exact| / |exact|. It is computed of

    model      every head of the demo model, at the last token of real text (Python's own documentation)
    gaussian   q, K and V of normal distribution
    sink N     one token of a group's context N nats above the others, whose V is nothing, or small: real
               models have it, and answers then come from what little weight the other tokens have
    mixed N    the same where one head of the group sees the sink and the others attend evenly
    peaks N    each head of a group has its own token, N nats above the others
    outliers   a few channels of K and V that are 50 times as large as the others
    drift      K and V that grow 64-fold along the context

and held against the errors of other kernels on the same data, head by head:

    fp16-P, bf16-P  scores, sums and accumulation in fp32, and the weights P rounded to 16 bits in
                    between, as fused kernels on GPUs do it (emulated)
    SDPA            torch's scaled_dot_product_attention in the type of K and V, on the GPU where there is
                    one; it rounds its answer to 16 bits

q, K and V are rounded to the type of K and V beforehand; every kernel and the reference get the same.
Nothing here depends on the machine but the last column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
import pydoc_data.topics
from typing import Any

import numpy as np

from nearkv_hw import pages
from nearkv_sim import reference

from .. import extras
from ..arguments import whole
from ..attention import attend
from ..cards import open_card
from . import machine, to_json

# Relative L2 errors. A head may be worse than fp16-P, but few may, and not by much.
GOAL, GOAL_BEYOND_14_NATS = 6e-5, 1e-3
MOST_WORSE, WORST_RATIO = 0.02, 1.5
NATS = (4, 8, 12, 14, 17, 20)
GROUPS = (3, 8, 14)
TOKENS, HEAD_DIM = 1000, 128
_OUTLIER = 50


@dataclass(frozen=True)
class Case:
    """Attention of one token, as `nearkv.attend` takes it.

    Attributes
    ----------
    name : str
        Cases of one name share a line of the table.
    q, k, v : float32, as of `nearkv.attend`
    nats : float
        How far a token lies above the others.
    real : bool
        Whether they come from a model.
    """

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    nats: float = 0
    real: bool = False


@dataclass
class Errors:
    """Of all heads of a line; relative L2. One array each: (heads,)."""

    name: str
    kv_dtype: str
    tokens: int
    goal: float
    real: bool
    ours: np.ndarray
    peers: dict[str, np.ndarray]  # name -> errors

    def worse_than(self, peer: str) -> int:
        return int((self.ours > self.peers[peer]).sum())

    def worst_ratio(self, peer: str) -> float:
        return float((self.ours / self.peers[peer]).max())

    def misses(self) -> list[str]:
        """Which goals are missed, in words."""
        missed = []
        if (beyond := int((self.ours > self.goal).sum())) > 0:
            missed.append(f"{beyond} heads beyond {self.goal:g}")
        if self.real:
            if self.worse_than("fp16-P") > MOST_WORSE * len(self.ours):
                missed.append(f"more than {MOST_WORSE:.0%} of heads worse than fp16-P")
            if self.worst_ratio("fp16-P") > WORST_RATIO:
                missed.append(f"a head worse than fp16-P by more than {WORST_RATIO:g}")
        return missed


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--card", default="twin", help="default: %(default)s")
    add(
        "--kv-dtype", choices=("fp16", "bf16"), action="append",
        help="may be given more than once (default: both)",
    )  # fmt: skip
    add(
        "--model-context", type=whole(0), action="append", metavar="TOKENS",
        help="of real text; 0 leaves the model out; may be given more than once "
        "(default: 1000 and 8000)",
    )  # fmt: skip
    add("--json", action="store_true", help="every head's error as JSON")


def run(args) -> int:
    extras.require("nearkv bench accuracy", "torch")
    contexts = args.model_context or [1000, 8000]
    contexts = [n for n in contexts if n]
    dtypes = args.kv_dtype or ["fp16", "bf16"]
    peer = _sdpa_device()
    rows: list[Errors] = []
    data = list(cases(contexts))  # 0.4 GB for 8,000 tokens of the demo model
    with open_card(args.card) as card:
        if not args.json:
            print(f"card {card.name}; SDPA on {peer}; errors relative to float64, L2, each head")
            print(_HEADER)
        for dtype in dtypes:
            for errors in measure(iter(data), dtype, card):
                rows.append(errors)
                if not args.json:
                    print(_line(errors), flush=True)
    if args.json:
        head = {"card": args.card, "sdpa": peer, "machine": machine()}
        print(to_json("nearkv bench accuracy --json", head, [_record(row) for row in rows]))
    else:
        print(_verdict(rows))
    return 0


def cases(model_contexts: list[int]) -> Iterator[Case]:
    """All of them, line by line; the model's first."""
    for n_tokens in model_contexts:
        yield from model_cases(n_tokens)
    yield gaussian_case()
    for nats in NATS:
        yield from sink_cases(nats)
    yield from outlier_cases()
    yield drift_case()


def measure(cases: Iterator[Case], kv_dtype: str, card) -> Iterator[Errors]:
    """Errors of cases, those of one name together.

    Parameters
    ----------
    cases : iterator of Case
        Those of one name must follow each other.
    kv_dtype : "fp16" or "bf16"
    card : Card
    """
    line: list[tuple[Case, np.ndarray, dict[str, np.ndarray]]] = []
    for case in cases:
        if line and line[0][0].name != case.name:
            yield _joined(line, kv_dtype)
            line = []
        line.append((case, *_errors(case, kv_dtype, card)))
    if line:
        yield _joined(line, kv_dtype)


def _joined(line, kv_dtype: str) -> Errors:
    cases = [case for case, _, _ in line]
    goal = GOAL if max(case.nats for case in cases) <= 14 else GOAL_BEYOND_14_NATS
    return Errors(
        name=cases[0].name, kv_dtype=kv_dtype, tokens=len(cases[0].k), goal=goal, real=cases[0].real,
        ours=np.concatenate([ours for _, ours, _ in line]),
        peers={peer: np.concatenate([peers[peer] for _, _, peers in line]) for peer in line[0][2]},
    )  # fmt: skip


def _errors(case: Case, kv_dtype: str, card) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Relative L2 error of each head: ours, and those of peers."""
    q, k, v = (rounded(x, kv_dtype) for x in (case.q, case.k, case.v))
    exact, _ = reference.attention(q, k, v)
    size = np.linalg.norm(exact, axis=1)

    def error(out: np.ndarray) -> np.ndarray:
        return np.linalg.norm(out - exact, axis=1) / size

    ours = np.asarray(attend(q, k, v, card=card, kv_dtype=kv_dtype)[0])
    peers = {
        "fp16-P": error(with_rounded_weights(q, k, v, "fp16")),
        "bf16-P": error(with_rounded_weights(q, k, v, "bf16")),
        "SDPA": error(_sdpa(q, k, v, kv_dtype)),
    }
    return error(ours), peers


# --- kernels to compare with --------------------------------------------------------------------------


def rounded(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """float32 numbers rounded to 16 bits and back."""
    kind = pages.parse_kv_type(kv_dtype)
    return pages.to_float32(pages.to_patterns(x, kind), kind)


def with_rounded_weights(q, k, v, p_dtype: str) -> np.ndarray:
    """Attention in fp32 but for the weights exp(score - max), which are rounded to 16 bits.

    Fused kernels do so to multiply P and V with the tensor cores' 16-bit inputs; the sum of the weights
    they take before rounding.

    Returns
    -------
    float32 (n_q_heads, head_dim)
    """
    group = len(q) // k.shape[1]
    out = np.empty(q.shape, np.float32)
    for head in range(len(q)):
        keys, values = k[:, head // group], v[:, head // group]
        score = (keys @ q[head]) * np.float32(q.shape[1] ** -0.5)
        p = np.exp(score - score.max())
        out[head] = (rounded(p, p_dtype) @ values) / p.sum()
    return out


def _sdpa_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _sdpa(q, k, v, kv_dtype: str) -> np.ndarray:
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kv_dtype]

    def heads_first(x):
        return torch.from_numpy(np.ascontiguousarray(x)).to(_sdpa_device(), dtype)[None]

    out = torch.nn.functional.scaled_dot_product_attention(
        heads_first(q[:, None]), heads_first(k.swapaxes(0, 1)), heads_first(v.swapaxes(0, 1)),
        enable_gqa=True,
    )  # fmt: skip
    return out[0, :, 0].float().cpu().numpy()


# --- data ---------------------------------------------------------------------------------------------


def gaussian_case() -> Case:
    """32 heads over 8, 4,096 tokens."""
    rng = np.random.default_rng(7)
    q = _normal(rng, 32, HEAD_DIM)
    k, v = (_normal(rng, 4096, 8, HEAD_DIM) for _ in "kv")
    return Case("gaussian", q, k, v)


def sink_cases(nats: float) -> Iterator[Case]:
    """Groups whose heads all see a sink, of which one does, and whose heads have one each."""
    rng = np.random.default_rng(int(nats))
    for value in (0.0, 2.0**-6):
        for group in GROUPS:
            yield _with_peaks(rng, f"sink {nats:g}", [0] * group, nats, value)
    for value in (0.0, 2.0**-6):
        for group in GROUPS:
            first = [0] + [None] * (group - 1)
            yield _with_peaks(rng, f"mixed {nats:g}", first, nats, value)
    for value in (0.0, 2.0**-6):
        for group in GROUPS:
            yield _with_peaks(rng, f"peaks {nats:g}", list(range(group)), nats, value)


def _with_peaks(rng, name: str, peaks: list[int | None], nats: float, value: float) -> Case:
    """A group of heads, each with the token that it sees `nats` above the others, or None.

    Head r and token r have a direction in common, which nobody else has any of, so that the score is
    what was asked for; V of such a token is `value` times that of the others.
    """
    tokens = sorted({peak for peak in peaks if peak is not None})
    n = len(tokens)
    q, k = _normal(rng, len(peaks), HEAD_DIM), _normal(rng, TOKENS, HEAD_DIM)
    v = _normal(rng, TOKENS, HEAD_DIM)
    q[:, :n] = k[:, :n] = 0
    amount = np.sqrt(nats * HEAD_DIM**0.5)  # in both q and k
    for i, token in enumerate(tokens):
        place = 3 + 7 * i  # anywhere in the first tile
        k[place] = 0
        k[place, i] = amount
        v[place] *= value
        for head, peak in enumerate(peaks):
            if peak == token:
                q[head, i] = amount
    return Case(name, q, k[:, None], v[:, None], nats)


def outlier_cases() -> Iterator[Case]:
    """Channels that are larger than others in K, in V, and in both."""
    rng = np.random.default_rng(11)
    for in_k, in_v in ((True, False), (False, True), (True, True)):
        q = _normal(rng, 8, HEAD_DIM)
        k, v = (_normal(rng, TOKENS, 2, HEAD_DIM) for _ in "kv")
        channels = rng.choice(HEAD_DIM, 4, replace=False)
        if in_k:
            k[..., channels] *= _OUTLIER
            q[:, channels] /= _OUTLIER  # or the scores would be those of an argmax
        if in_v:
            v[..., channels] *= _OUTLIER
        yield Case("outliers", q, k, v)


def drift_case() -> Case:
    """K and V grow from token to token: maxima rise from tile to tile, and so do exponents."""
    rng = np.random.default_rng(13)
    q = _normal(rng, 8, HEAD_DIM)
    k, v = (_normal(rng, TOKENS, 2, HEAD_DIM) for _ in "kv")
    growth = np.exp2(np.linspace(-4, 2, TOKENS, dtype=np.float32))[:, None, None]
    return Case("drift", q, k * growth, v * growth)


def _normal(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def model_cases(n_tokens: int) -> Iterator[Case]:
    """q, K and V of the demo model's layers at the last of n_tokens tokens of text.

    Raises
    ------
    ModuleNotFoundError
        If the demo model or transformers is not installed; the message gives the command.
    """
    extras.require("nearkv bench accuracy", "transformers")
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from ..hf import models

    seen: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def listen(module, q, k, v, mask, **options):
        # (batch, heads, tokens, channels); of q the last token
        q_last, k_all, v_all = q[0, :, -1], k[0].transpose(0, 1), v[0].transpose(0, 1)
        seen[module.layer_idx] = tuple(x.float().numpy() for x in (q_last, k_all, v_all))
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    name = "nearkv-accuracy"
    AttentionInterface.register(name, listen)
    AttentionMaskInterface.register(name, sdpa_mask)
    model, tokenizer = models.load()
    model.set_attn_implementation(name)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :n_tokens]
    if ids.shape[1] < n_tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, not {n_tokens}")
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    for layer in sorted(seen):
        yield Case(f"model, {n_tokens:,}", *seen.pop(layer), real=True)


# --- what is said -------------------------------------------------------------------------------------

_HEADER = (
    f"{'':14} {'KV':4} {'heads':>6} {'median':>8} {'99%':>8} {'max':>8} {'*goal*':>7}   worse than "
    f"{'fp16-P':>7} {'by':>6} {'bf16-P':>7} {'SDPA':>6}"
)


def _line(errors: Errors) -> str:
    ours = errors.ours
    worse = [errors.worse_than(peer) for peer in ("fp16-P", "bf16-P", "SDPA")]
    return (
        f"{errors.name:14} {errors.kv_dtype:4} {len(ours):6} {np.median(ours):8.1e} "
        f"{np.quantile(ours, 0.99):8.1e} {ours.max():8.1e} {errors.goal:7.0e}   {'':10} "
        f"{worse[0]:7} {errors.worst_ratio('fp16-P'):5.2f}x {worse[1]:7} {worse[2]:6}"
    )


def _verdict(rows: list[Errors]) -> str:
    missed = [
        f"missed: {row.name}, {row.kv_dtype}: {what}" for row in rows for what in row.misses()
    ]
    goals = (
        f"goals: every head within its goal; of the model's heads at most {MOST_WORSE:.0%} worse than "
        f"fp16-P, none by more than {WORST_RATIO:g}x"
    )
    return "\n".join([goals, *(missed or ["all met"])])


def _record(errors: Errors) -> dict[str, Any]:
    """For JSON: three digits tell all there is to know of an error."""

    def brief(values: np.ndarray) -> list[float]:
        return [float(f"{value:.2e}") for value in values]

    return {
        "name": errors.name, "kv_dtype": errors.kv_dtype, "tokens": errors.tokens,
        "goal": errors.goal, "missed": errors.misses(), "ours": brief(errors.ours),
        **{peer: brief(values) for peer, values in errors.peers.items()},
    }  # fmt: skip
