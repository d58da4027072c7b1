# SPDX-License-Identifier: Apache-2.0
"""What is saved of a NearStorageCache beside its pages, and which model it belongs to.

The store keeps pages and block tables; this is the rest: rows, padding, tails, tokens, faults, and what
the model was. As bytes it is a safetensors file, whose entry "about" is JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
import hashlib
import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..cards import CardError
from ..io import FlashError

_FORMAT = 1
# Of a config: what changes no K and no V.
_IRRELEVANT = {
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "dtype", "eos_token_id", "id2label", "initializer_range", "label2id", "model_type_name",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_FAULTS = {kind.__name__: kind for kind in (FlashError, CardError, ValueError)}


@dataclass(frozen=True)
class Identity:
    """Which model and tokenizer a cache belongs to.

    Attributes
    ----------
    config : dict
        What the model's config says beyond its defaults.
    model, tokenizer : str
        Their names; empty where they are not known.
    """

    config: dict[str, Any]
    model: str = ""
    tokenizer: str = ""

    @classmethod
    def of(cls, config, model: str, tokenizer) -> "Identity":
        """Of a model's config, the name of its weights and its tokenizer."""
        facts = json.loads(json.dumps(config.to_diff_dict(), sort_keys=True, default=str))
        facts = {key: value for key, value in facts.items() if key not in _IRRELEVANT}
        return cls(facts, str(model), _tokenizer_identity(tokenizer))

    def check(self, other: "Identity", where) -> None:
        """Raise ValueError if what was saved is of another model than `other`, saying what differs."""
        keys = sorted({*self.config, *other.config}, key=lambda key: (key != "model_type", key))
        differ = [
            f"{key} {self.config.get(key)!r}, not {other.config.get(key)!r}"
            for key in keys
            if self.config.get(key) != other.config.get(key)
        ]
        if differ and differ[0].startswith("model_type "):
            del differ[1:]  # the rest follows from it
        for what in ("model", "tokenizer"):
            theirs, mine = getattr(self, what), getattr(other, what)
            if theirs and mine and theirs != mine:
                differ.append(f"{what} {theirs!r}, not {mine!r}")
        if differ:
            raise ValueError(
                f"what is saved in {where} is of another model: {'; '.join(differ)}; open it with its "
                "own model, or choose another directory"
            )


def _tokenizer_identity(tokenizer) -> str:
    """A tokenizer's class and a hash of its vocabulary; a name is taken as it is."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer or ""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return f"{type(tokenizer).__name__} {hashlib.sha256(vocabulary).hexdigest()[:16]}"


@dataclass
class State:
    """A cache between two calls, without its pages.

    Attributes
    ----------
    positions : ints (n_layers,)
        That each layer holds, padding included.
    sequences : ints (n_rows,)
        Of the store, by row.
    n_pages : ints (n_layers, n_rows)
        That each kv head has in the store.
    valid : bool (n_rows, positions)
        Which positions are tokens.
    tails : uint16 (n_layers, K or V, n_rows, n_kv_heads, longest tail, channels)
    tail_tokens : ints (n_layers, n_rows)
    faults : dict of int to Exception
    """

    positions: list[int]
    sequences: list[int]
    n_pages: list[list[int]]
    valid: np.ndarray
    tails: np.ndarray
    tail_tokens: list[list[int]]
    faults: dict[int, Exception] = field(default_factory=dict)


def to_bytes(state: State, identity: Identity, token_ids: np.ndarray | None) -> bytes:
    """What `from_bytes` reads."""
    faults = {
        row: [
            next((name for name, kind in _FAULTS.items() if isinstance(error, kind)), ""),
            str(error),
        ]
        for row, error in state.faults.items()
    }
    about = {
        "format": _FORMAT, "identity": asdict(identity), "positions": state.positions,
        "sequences": state.sequences, "n_pages": state.n_pages, "tail_tokens": state.tail_tokens,
        "faults": faults,
    }  # fmt: skip
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "valid": state.valid,
        "tails": np.ascontiguousarray(state.tails),
    }
    if token_ids is not None:
        arrays["token_ids"] = np.ascontiguousarray(token_ids, np.int64)
    return save(arrays)


def from_bytes(data: bytes, where) -> tuple[State, Identity, np.ndarray | None]:
    """State, identity and token ids (n_rows, n) of what `to_bytes` made.

    Raises
    ------
    FlashError
        If it is not that; `where` says where it was.
    """
    try:
        arrays: Mapping[str, np.ndarray] = load(data)
        about = json.loads(arrays["about"].tobytes())
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']}, not {_FORMAT}")
        faults: dict[int, Exception] = {
            int(row): _FAULTS.get(kind, RuntimeError)(text)
            for row, (kind, text) in about["faults"].items()
        }
        state = State(
            about["positions"], about["sequences"], about["n_pages"], arrays["valid"],
            arrays["tails"], about["tail_tokens"], faults,
        )  # fmt: skip
        return state, Identity(**about["identity"]), arrays.get("token_ids")
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise FlashError(
            f"what is saved is no state of a NearStorageCache: {error}", filename=where,
            remedy="was it saved by another version or program? Choose another directory",
        ) from None  # fmt: skip
