# SPDX-License-Identifier: Apache-2.0
"""What a plan is made for: models, machines, work, and the numbers common to all.

Models and machines are TOML files, `models/*.toml` and `machines/*.toml`, beside this file; a path
to a file of one's own works wherever a name does. Units are in the names: bytes, bytes per second,
seconds, watts, USD. Any number of a `Machine` or of `Work` may be a numpy array: the model is written
with array operations, so one call evaluates a whole sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
import tomllib
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Number = Any  # float or ndarray


@dataclass(frozen=True)
class KvFormat:
    """How K and V (and X) are stored: bytes per element, and per token and head for scales.

    `error` is the relative rms error that storing in this type adds to a normal element, derived as
    step / sqrt(12): a bound for what planning may choose, not a measurement.
    """

    element_bytes: float
    scale_bytes: float
    error: float


KV_FORMATS = {
    "fp16": KvFormat(2, 0, 0.0),
    "bf16": KvFormat(2, 0, 0.0),
    "int8": KvFormat(1, 2, 4 / 127 / 12**0.5),  # per-token scales: one fp16 for K, one for V
    "fp8": KvFormat(1, 2, 2**-4 / 3**0.5),
    "int4": KvFormat(0.5, 2, 4 / 7 / 12**0.5),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Shape of a decoder-only transformer."""

    name: str
    source: str
    n_layers: int
    hidden: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    ffn_matrices: int
    vocabulary: int
    tied_embeddings: bool
    rope: bool
    max_positions: int
    n_experts: int = 1
    experts_per_token: int = 1
    moe_every: int = 1

    def __post_init__(self):
        if self.n_q_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.name}: n_q_heads ({self.n_q_heads}) must be a multiple of "
                f"n_kv_heads ({self.n_kv_heads})"
            )

    @property
    def group_size(self) -> int:
        return self.n_q_heads // self.n_kv_heads

    @property
    def moe_layers(self) -> int:
        return self.n_layers // self.moe_every if self.n_experts > 1 else 0

    @property
    def dense_parameters(self) -> int:
        """Parameters that every token uses: attention, dense FFN, output head."""
        attention = 2 * self.hidden * self.head_dim * (self.n_q_heads + self.n_kv_heads)
        ffn = self.ffn_matrices * self.hidden * self.ffn
        dense_ffn = (self.n_layers - self.moe_layers) * ffn
        return self.n_layers * attention + dense_ffn + self.vocabulary * self.hidden

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all layers."""
        return self.moe_layers * self.n_experts * self.ffn_matrices * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        embedding = 0 if self.tied_embeddings else self.vocabulary * self.hidden
        return self.dense_parameters + self.expert_parameters + embedding

    @property
    def weight_bytes(self) -> int:
        """fp16 weights that decoding reads; the input embedding is a gather and left out."""
        return 2 * (self.dense_parameters + self.expert_parameters)

    def active_weight_bytes(self, tokens: Number) -> Number:
        """Bytes of weights that a step of so many tokens touches (experts drawn independently)."""
        missed = (1 - self.experts_per_token / self.n_experts) ** np.asarray(tokens, float)
        return 2 * (self.dense_parameters + self.expert_parameters * (1 - missed))

    @property
    def token_flops(self) -> float:
        """Floating point operations per token outside attention over the context."""
        used = self.expert_parameters * self.experts_per_token / self.n_experts
        return 2 * (self.dense_parameters + used)

    def kv_bytes(self, kv_type: str = "fp16") -> float:
        """K and V of one token over all layers, bytes."""
        f = KV_FORMATS[kv_type]
        head = 2 * (self.head_dim * f.element_bytes + f.scale_bytes)
        return self.n_layers * self.n_kv_heads * head

    def x_bytes(self, kv_type: str = "fp16") -> float:
        """The layer inputs X of one token over all layers, bytes."""
        f = KV_FORMATS[kv_type]
        return self.n_layers * (self.hidden * f.element_bytes + f.scale_bytes)

    @property
    def rho(self) -> float:
        """X bytes over K and V bytes, fp16. Below 1 for multi-head attention alone."""
        return self.x_bytes() / self.kv_bytes()

    def reproject_flops(self) -> float:
        """K and V of one token from its X, all layers."""
        return 4.0 * self.n_layers * self.hidden * self.n_kv_heads * self.head_dim

    def absorb_flops(self) -> float:
        """Attention over one token straight on X, with the projections moved to q and out.

        q.(X Wk) = (q Wk').X, and p.(X Wv) = (p.X) Wv: no K or V is ever formed. With rotary
        positions K has to be formed before it is rotated; V can still be absorbed.
        """
        straight = 2.0 * self.n_layers * self.hidden * self.n_q_heads
        return straight + (self.reproject_flops() / 2 if self.rope else straight)

    def attention_flops(self) -> float:
        """q.K and p.V over one token of context, all layers and query heads."""
        return 4.0 * self.n_layers * self.n_q_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """All GPUs of a host together: rates and bytes are sums, watts and USD are of one."""

    count: int = 0
    flops: Number = 0.0
    memory_bytes: Number = 0.0
    memory_bytes_per_s: Number = 0.0
    link_bytes_per_s: Number = 0.0
    watts: Number = 0.0
    idle_watts: Number = 0.0
    usd: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """CPUs, memory and the chassis.

    attention_bytes_per_s : K and V, as fp16, that the CPUs attend to with a tensor library
    twin_bytes_per_s : the same with the software twin, for nearkv alone, if that is faster
    flops : of the CPUs in large matrix products, for machines without a GPU
    layer_seconds : of the host's program in a layer, which nothing hides; None: as of FlexGen
    """

    memory_bytes: Number
    memory_bytes_per_s: Number
    attention_bytes_per_s: Number
    twin_bytes_per_s: Number = 0.0
    flops: Number = 0.0
    layer_seconds: float | None = None
    cpu_watts: Number = 230.0
    cpu_idle_watts: Number = 70.0
    other_watts: Number = 100.0
    usd: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class Drives:
    """All drives of a host. Rates, bytes and watts are of one drive; the uplink is shared by all.

    latency_seconds : of one small read, alone; what sets the rate of few or small requests
    request_bytes, request_bytes_per_s : the measured rate of one read at a time, where there is one
    raid : a striped volume, which the kernel reads ahead by twice its stripe
    """

    count: Number
    read_bytes_per_s: Number
    latency_seconds: Number = 80e-6
    request_bytes: Sequence[float] = ()
    request_bytes_per_s: Sequence[float] = ()
    write_bytes_per_s: Number
    capacity_bytes: Number
    write_endurance_bytes: Number
    uplink_bytes_per_s: Number
    raid: bool = True
    watts: Number = 13.0
    idle_watts: Number = 5.0
    usd: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All accelerators of a host. Rates, bytes and watts are of one.

    ingest : what one card takes from flash. engine : K and V that it attends to out of its memory,
    fp16 as stored. behind_uplink : True if flash reaches the card over the drives' uplink (a card in
    another slot), False if beside the flash. The software twin on the host's CPUs is no card here but
    a tier, `flash_cpu`.
    """

    count: Number = 0
    ingest_bytes_per_s: Number = 0.0
    engine_bytes_per_s: Number = 0.0
    memory_bytes: Number = 0.0
    behind_uplink: bool = False
    watts: Number = 0.0
    idle_watts: Number = 0.0
    usd: Number = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One host with its drives; GPUs and cards, if it has any."""

    name: str
    source: str
    host: Host
    drives: Drives
    gpu: Gpu = field(default_factory=Gpu)
    cards: Cards = field(default_factory=Cards)
    chassis_usd: float = 0.0
    chassis_watts: float = 0.0

    @property
    def usd(self) -> Number:
        return (
            self.host.usd
            + self.chassis_usd
            + self.gpu.count * self.gpu.usd
            + self.drives.count * self.drives.usd
            + self.cards.count * self.cards.usd
        )

    @property
    def flash_read_bytes_per_s(self) -> Number:
        return self.drives.count * self.drives.read_bytes_per_s

    @property
    def flash_write_bytes_per_s(self) -> Number:
        return self.drives.count * self.drives.write_bytes_per_s

    @property
    def has_gpu(self) -> bool:
        return self.gpu.count > 0

    @property
    def dense_flops(self) -> Number:
        """Of whatever runs the layers outside attention: the GPUs, or else the CPUs."""
        return self.gpu.flops if self.has_gpu else self.host.flops

    @property
    def has_cards(self) -> bool:
        return bool(np.all(np.asarray(self.cards.count) > 0))

    def with_(self, **sections) -> "Machine":
        """A copy with some values replaced: `machine.with_(drives={"count": 8})`."""
        changes = {
            name: replace(getattr(self, name), **value) if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked: `batch` sequences of `context` tokens each, `output` tokens generated."""

    batch: Number = 16
    context: Number = 32768
    output: Number = 64

    @property
    def mean_context(self) -> Number:
        """Tokens attended in the mean decode step."""
        return np.asarray(self.context, float) + np.asarray(self.output, float) / 2


@dataclass(frozen=True)
class Parameters:
    """Numbers common to all models and machines: `parameters.toml`, with their sources."""

    values: dict
    entries: dict

    def __getattr__(self, name):
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"no parameter {name!r}") from None

    def with_(self, **values) -> "Parameters":
        unknown = set(values) - set(self.values)
        if unknown:
            raise ValueError(f"unknown parameters {sorted(unknown)}")
        return Parameters({**self.values, **values}, self.entries)

    @property
    def fitted(self) -> dict:
        """The fitted parameters by name, with their values."""
        return {k: self.values[k] for k, e in self.entries.items() if e["kind"] == "fitted"}


@cache
def parameters() -> Parameters:
    entries = tomllib.loads((HERE / "parameters.toml").read_text())
    return Parameters({name: entry["value"] for name, entry in entries.items()}, entries)


def _read(kind: str, name: str) -> tuple[str, dict]:
    path = Path(name)
    if path.suffix != ".toml":
        path = HERE / kind / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(names(kind))
        raise ValueError(
            f"no {kind[:-1]} {name!r}; give the path of a .toml file, or one of: {known}"
        )
    return path.stem, tomllib.loads(path.read_text())


def names(kind: str) -> list[str]:
    """Names of the descriptions that come with the package; `kind` is "models" or "machines"."""
    return sorted(path.stem for path in (HERE / kind).glob("*.toml"))


def _build(cls, values: dict, where: str):
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{where}: unknown {sorted(unknown)}; known are {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def load_model(name: str) -> Model:
    """A model by name or by the path of a TOML file.

    Raises
    ------
    ValueError
        If there is none, or if a value is missing or unknown.
    """
    stem, data = _read("models", name)
    return _build(Model, {"name": stem, **data}, f"model {stem}")


def model_of(config) -> Model:
    """The shape of a transformers configuration of a decoder."""

    def get(*names: str, default: Any = None) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), default)

    heads = get("num_attention_heads", "n_head")
    hidden = get("hidden_size", "n_embd")
    return Model(
        name=get("model_type", default="model"),
        source="a transformers configuration",
        n_layers=get("num_hidden_layers", "n_layer"),
        hidden=hidden,
        n_q_heads=heads,
        n_kv_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=hidden // heads),
        ffn=get("moe_intermediate_size", "intermediate_size", "ffn_dim", default=4 * hidden),
        ffn_matrices=2 if get("model_type") in ("opt", "gpt2") else 3,
        vocabulary=config.vocab_size,
        tied_embeddings=bool(get("tie_word_embeddings")),
        rope=get("rope_parameters", "rope_theta") is not None,
        max_positions=get("max_position_embeddings", default=1 << 20),
        n_experts=get("num_local_experts", "num_experts", default=1),
        experts_per_token=get("num_experts_per_tok", default=1),
    )


def load_machine(name: str) -> Machine:
    """A machine by name or by the path of a TOML file. `base = "other"` inherits from another.

    Raises
    ------
    ValueError
        If there is none, or if a value is missing or unknown.
    """
    stem, data = _read("machines", name)
    while "base" in data:
        _, base = _read("machines", data.pop("base"))
        for key, value in base.items():
            own = data.get(key)
            data[key] = (
                {**value, **(own or {})} if isinstance(value, dict) else data.get(key, value)
            )
    parts = {"gpu": Gpu, "host": Host, "drives": Drives, "cards": Cards}
    for key, cls in parts.items():
        if key in data:
            data[key] = _build(cls, data[key], f"machine {stem}, [{key}]")
    return _build(Machine, {"name": stem, **data}, f"machine {stem}")
