# SPDX-License-Identifier: Apache-2.0
"""How many rows and how many tokens of a prompt at once a host's memory has room for."""

from typing import NamedTuple

from nearkv_hw.abi import PageLayout

from ..hf.support import check_model
from ..store import DELAYED_BYTES
from .engine import DEEPEST

SLOTS = 32  # by default: more add little to the speed of a small model
CHUNK_TOKENS = 4096  # at most; longer calls of a model gain nothing
_LEAST_CHUNK = 256


class Sizes(NamedTuple):
    """Of an engine, and what they come to: rows, positions of a prefill at once, bytes."""

    slots: int
    chunk_tokens: int
    n_bytes: int


def sizes(config, layout: PageLayout, host_bytes: int, slots: int | None) -> Sizes:
    """What fits into host memory, beside the model and what a card keeps for itself.

    Counted are the tails of all rows (twice those of rows that join, and one for each prefix that is held), the
    logits, K and V that wait to be written, and what a call of the model holds for each position of a
    prefill.

    Parameters
    ----------
    config
        Of a model's decoder.
    layout : PageLayout
    host_bytes : int
    slots : int, optional
        Rows that are asked for. Default: `SLOTS`, or as many as fit.

    Raises
    ------
    ValueError
        If they do not fit; the message says what would.
    """
    shape = check_model(config)
    tail = 2 * shape.n_layers * shape.n_kv_heads * layout.page_tokens * layout.head_dim * 2
    row = 2 * tail + 2 * config.vocab_size * 4
    fixed = DELAYED_BYTES + (DEEPEST + 1) * tail
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    queries = config.num_attention_heads * shape.head_dim
    # float32: the stream and its norms, the MLP, q, k and v, their 16-bit copies; partials in 128 bits; a mask.
    position = 4 * (6 * hidden + 3 * inner + 4 * queries) + 24 * queries + 4 * CHUNK_TOKENS
    least = fixed + (slots or 1) * row + _LEAST_CHUNK * position
    if least > host_bytes:
        raise ValueError(
            f"{slots or 1} prompts at once of this model take {_mib(least)} of host memory, and "
            f"--host-memory allows {_mib(host_bytes)}; raise it"
            + (", or lower --batch-size" if (slots or 1) > 1 else "")
        )
    left = host_bytes - fixed - _LEAST_CHUNK * position
    slots = slots or min(SLOTS, left // row)
    chunk = min(CHUNK_TOKENS, _LEAST_CHUNK + (left - slots * row) // position)
    return Sizes(slots, chunk, fixed + slots * row + chunk * position)


def _mib(n_bytes: int) -> str:
    return f"{-(-n_bytes // 2**20):,} MiB"
