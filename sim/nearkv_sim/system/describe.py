# SPDX-License-Identifier: Apache-2.0
"""What a plan is made for: models, machines, work, and the numbers common to all.

Models and machines are TOML files, `models/*.toml` and `machines/*.toml`, beside this file; a path
to a file of one's own works wherever a name does. Units are in the names: bytes, bytes per second,
seconds, watts, USD. Any number of a `Machine` or of `Work` may be a numpy array: the model is written
with array operations, so one call evaluates a whole sweep.

The annotations of `Model` and of the parts of a `Machine` say what a file may hold; what does not
fit is refused with the names of file and key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
import math
import os
from pathlib import Path
import tomllib
from typing import Annotated, Any

import numpy as np

HERE = Path(__file__).parent
Number = Any  # float or ndarray


@dataclass(frozen=True)
class Kind:
    """What a value in a file has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Beyond this, products of a few rates and sizes leave the range of float64.
    return type(value) in (int, float) and (value == 0 or 1e-30 < abs(value) < 1e30)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= 2**53


TEXT = Kind("a text", lambda x: isinstance(x, str))
TABLE = Kind("a table", lambda x: isinstance(x, dict))
TRUTH = Kind("true or false", lambda x: isinstance(x, bool))
_KINDS = {str: TEXT, bool: TRUTH}

Count = Annotated[int, Kind("a whole number of at least 1", lambda x: _is_whole(x) and x > 0)]
CountOrNone = Annotated[
    int, Kind("a whole number of at least 0", lambda x: _is_whole(x) and x >= 0)
]
Positive = Annotated[Number, Kind("a number above 0", lambda x: _is_number(x) and x > 0)]
Amount = Annotated[Number, Kind("a number of at least 0", lambda x: _is_number(x) and x >= 0)]
Endurance = Annotated[
    Number, Kind("a number above 0, or inf", lambda x: x == math.inf or _is_number(x) and x > 0)
]
Sizes = Annotated[
    Sequence[float],
    Kind(
        "a list of rising numbers above 0",
        lambda x: (
            isinstance(x, list)
            and all(map(_is_number, x))
            and all(low < high for low, high in zip([0, *x], x, strict=False))
        ),
    ),
]
Rates = Annotated[
    Sequence[float],
    Kind(
        "a list of numbers above 0",
        lambda x: isinstance(x, list) and all(_is_number(y) and y > 0 for y in x),
    ),
]


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
    n_layers: Count
    hidden: Count
    n_q_heads: Count
    n_kv_heads: Count
    head_dim: Count
    ffn: Count
    ffn_matrices: Count
    vocabulary: Count
    tied_embeddings: bool
    rope: bool
    max_positions: Count
    n_experts: Count = 1
    experts_per_token: Count = 1
    moe_every: Count = 1

    def __post_init__(self):
        if self.n_q_heads % self.n_kv_heads:
            raise ValueError(
                f"n_q_heads ({self.n_q_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.experts_per_token > self.n_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must be at most n_experts "
                f"({self.n_experts})"
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

    count: CountOrNone = 0
    flops: Amount = 0.0
    memory_bytes: Amount = 0.0
    memory_bytes_per_s: Amount = 0.0
    link_bytes_per_s: Amount = 0.0
    watts: Amount = 0.0
    idle_watts: Amount = 0.0
    usd: Amount = 0.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """CPUs, memory and the chassis.

    attention_bytes_per_s : K and V, as fp16, that the CPUs attend to with a tensor library
    twin_bytes_per_s : the same with the software twin, for nearkv alone, if that is faster
    flops : of the CPUs in large matrix products, for machines without a GPU
    layer_seconds : of the host's program in a layer, which nothing hides; None: as of FlexGen
    """

    memory_bytes: Positive
    memory_bytes_per_s: Positive
    attention_bytes_per_s: Positive
    twin_bytes_per_s: Amount = 0.0
    flops: Amount = 0.0
    layer_seconds: Amount | None = None
    cpu_watts: Amount = 230.0
    cpu_idle_watts: Amount = 70.0
    other_watts: Amount = 100.0
    usd: Amount = 0.0


@dataclass(frozen=True, kw_only=True)
class Drives:
    """All drives of a host. Rates, bytes and watts are of one drive; the uplink is shared by all.

    latency_seconds : of one small read, alone; what sets the rate of few or small requests
    request_bytes, request_bytes_per_s : the measured rate of one read at a time, where there is one
    raid : a striped volume, which the kernel reads ahead by twice its stripe
    """

    count: Count
    read_bytes_per_s: Positive
    latency_seconds: Positive = 80e-6
    request_bytes: Sizes = ()
    request_bytes_per_s: Rates = ()
    write_bytes_per_s: Positive
    capacity_bytes: Positive
    write_endurance_bytes: Endurance
    uplink_bytes_per_s: Positive
    raid: bool = True
    watts: Amount = 13.0
    idle_watts: Amount = 5.0
    usd: Amount = 0.0


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All accelerators of a host. Rates, bytes and watts are of one.

    ingest : what one card takes from flash. engine : K and V that it attends to out of its memory,
    fp16 as stored. behind_uplink : True if flash reaches the card over the drives' uplink (a card in
    another slot), False if beside the flash. The software twin on the host's CPUs is no card here but
    a tier, `flash_cpu`.
    """

    count: CountOrNone = 0
    ingest_bytes_per_s: Amount = 0.0
    engine_bytes_per_s: Amount = 0.0
    memory_bytes: Amount = 0.0
    behind_uplink: bool = False
    watts: Amount = 0.0
    idle_watts: Amount = 0.0
    usd: Amount = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One host with its drives; GPUs and cards, if it has any."""

    name: str
    source: str
    host: Host
    drives: Drives
    gpu: Gpu = field(default_factory=Gpu)
    cards: Cards = field(default_factory=Cards)
    chassis_usd: Amount = 0.0
    chassis_watts: Amount = 0.0

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


def names(kind: str) -> list[str]:
    """Names of the descriptions that come with the package; `kind` is "models" or "machines"."""
    return sorted(path.stem for path in (HERE / kind).glob("*.toml"))


def _file_of(kind: str, name: str, folder: Path) -> Path:
    """The file of a name; paths count from `folder`."""
    if name in (known := names(kind)):
        return HERE / kind / f"{name}.toml"
    path = folder / name
    if path.suffix != ".toml":
        raise ValueError(
            f"no {kind[:-1]} {name!r}; give the path of a .toml file, or one of: {', '.join(known)}"
        )
    if not os.path.isfile(path):  # no error, whatever the name is
        raise ValueError(f"no {kind[:-1]} {str(path)!r}: there is no such file")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def _said(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "this list" if value else "an empty list"
    if isinstance(value, int) and value.bit_length() > 100:  # Python may refuse to write it out
        return "a number of more than 30 digits"
    return str(value)


def _kind(annotation: Any) -> Kind:
    for one in (annotation, *getattr(annotation, "__args__", ())):  # those of `X | None`
        if hasattr(one, "__metadata__"):
            return one.__metadata__[0]
    return _KINDS.get(annotation, TABLE)


def _check(cls, values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless every value is one that this field of the class may have."""
    known = {f.name: f.type for f in fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}unknown key {name!r}; known are {', '.join(known)}")
        kind = _kind(known[name])
        if not kind.holds(value):
            remedy = ""
            if isinstance(value, str):
                remedy = "; write it without quotes"
            elif isinstance(value, float) and not _is_number(value):
                remedy = "; the range of numbers is 1e-30 to 1e30"
            raise ValueError(f"{where}{name} must be {kind.words}, not {_said(value)}{remedy}")


def _build(cls, values: Mapping[str, Any], where: str):
    required = {f.name: f.type for f in fields(cls) if f.default is f.default_factory is MISSING}
    for name in required:
        if name not in values:
            raise ValueError(f"{where}{name} is missing: {_kind(required[name]).words}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def load_model(name: str) -> Model:
    """A model by name or by the path of a TOML file.

    Raises
    ------
    ValueError
        If there is none, or if a value is missing, unknown or impossible; the message names the file.
    """
    path = _file_of("models", name, Path())
    data, where = _read(path), f"model file {path}: "
    _check(Model, data, where)
    return _build(Model, {"name": path.stem, **data}, where)


def model_of(config) -> Model:
    """The shape of a transformers configuration of a decoder.

    Raises
    ------
    ValueError
        If the configuration does not say something that a plan needs, or not as one number.
    """

    def get(*names: str, default: Any = None) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), default)

    kind = get("model_type", default="model")
    heads, hidden = get("num_attention_heads", "n_head"), get("hidden_size", "n_embd")
    whole = type(heads) is int and type(hidden) is int and heads > 0
    values = {
        "n_layers": get("num_hidden_layers", "n_layer"),
        "hidden": hidden,
        "n_q_heads": heads,
        "n_kv_heads": get("num_key_value_heads", default=heads),
        "head_dim": get("head_dim", default=hidden // heads if whole else None),
        "ffn": get(
            "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner",
            default=4 * hidden if whole else None,
        ),
        "vocabulary": get("vocab_size"),
        "max_positions": get("max_position_embeddings", default=1 << 20),
        "n_experts": get("num_local_experts", "num_experts", default=1) or 1,
        "experts_per_token": get("num_experts_per_tok", default=1) or 1,
    }  # fmt: skip
    where = f"the plan of a model of type {kind!r}: "
    _check(Model, values, where)
    rest = {
        "name": kind,
        "source": "a transformers configuration",
        "ffn_matrices": 2 if kind in ("opt", "gpt2") else 3,
        "tied_embeddings": bool(get("tie_word_embeddings")),
        "rope": get("rope_parameters", "rope_theta") is not None,
    }
    return _build(Model, values | rest, where)


_PARTS = {"gpu": Gpu, "host": Host, "drives": Drives, "cards": Cards}
# Numbers that a part which is there has to have.
_NEEDED = {
    "gpu": ("flops", "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s"),
    "cards": ("ingest_bytes_per_s", "engine_bytes_per_s"),
}


def load_machine(name: str) -> Machine:
    """A machine by name or by the path of a TOML file.

    `base = "other"` inherits what the file does not say: from a name, or from a file, whose path
    counts from the folder of the file that says so.

    Raises
    ------
    ValueError
        If there is none, or if a value is missing, unknown or impossible; the message names the file.
    """
    path = _file_of("machines", name, Path())
    chain = [path.resolve()]
    files = [_read_machine(path)]
    while base := files[-1].pop("base", None):
        try:
            one = _file_of("machines", base, chain[-1].parent)
        except ValueError as error:
            raise ValueError(f"machine file {chain[-1]}: base: {error}") from None
        if one.resolve() in chain:
            way = " -> ".join(file.name for file in [*chain, one])
            raise ValueError(f"machine file {path}: base leads in a circle: {way}")
        chain.append(one.resolve())
        files.append(_read_machine(one))
        files[-1].pop("name", None)
    data: dict[str, Any] = {"name": path.stem}
    for one in reversed(files):
        for key, value in one.items():
            data[key] = {**data.get(key, {}), **value} if key in _PARTS else value
    where = f"machine file {path}: "
    for key, cls in _PARTS.items():
        if key in data:
            data[key] = _build(cls, data[key], f"{where}[{key}] ")
    machine = _build(Machine, data, where)
    for key, needed in _NEEDED.items():
        part = getattr(machine, key)
        for value in needed:
            if part.count and not getattr(part, value):
                raise ValueError(f"{where}[{key}] {value} is missing: a number above 0")
    if not machine.has_gpu and not machine.host.flops:
        raise ValueError(f"{where}[host] flops is missing: a number above 0, where there is no GPU")
    drives = machine.drives  # without request_bytes, inherited rates mean nothing
    if drives.request_bytes and len(drives.request_bytes) != len(drives.request_bytes_per_s):
        raise ValueError(
            f"{where}[drives] request_bytes and request_bytes_per_s must be lists of the same length"
        )
    return machine


def _read_machine(path: Path) -> dict[str, Any]:
    """What a file says itself, checked as far as it goes."""
    data, where = _read(path), f"machine file {path}: "
    plain = {}
    for key, value in data.items():
        if key in _PARTS:
            if not TABLE.holds(value):
                raise ValueError(f"{where}{key} must be a table, [{key}], not {_said(value)}")
            _check(_PARTS[key], value, f"{where}[{key}] ")
        elif key == "base":
            if not TEXT.holds(value) or not value:
                raise ValueError(f"{where}base must be the name of a machine, not {_said(value)}")
        else:
            plain[key] = value
    _check(Machine, plain, where)
    return data
