# SPDX-License-Identifier: Apache-2.0
"""Published results of the four systems, and how well this model predicts them.

`published.toml` holds the results; each names a predictor below. Three parameters are fitted, each to
one row (its anchor), which is then circular and does not count. `leave_one_out` fits them without a
system's rows and predicts that system from the others.
"""

from dataclasses import dataclass
from functools import cache
import math
import tomllib

import numpy as np
from scipy.optimize import least_squares

from . import closed_form, policy
from .describe import HERE, Machine, Model, Parameters, Work, load_machine, load_model, parameters

# Fitted parameter -> the row whose published value it is solved for.
ANCHORS = {name: parameters().entries[name]["anchor"] for name in parameters().fitted}
# Values that switch a fitted effect off: what is left when no row of another system speaks of it.
NEUTRAL = {
    "flexgen_copy_bytes_per_s": 100e9,
    "small_write_seconds": 25.6e-6,  # one 4 KiB P2P write of the Vitis log
    "job_seconds": 0.0,
}
TOLERANCE = 0.10
SPAN = (8192, 16384, 32768, 65536, 131072)  # contexts over which an assumed one is varied


@cache
def _data() -> dict:
    return tomllib.loads((HERE / "published.toml").read_text())


def choices() -> list[str]:
    """What no source settles and was chosen with the rows in view."""
    return [choice["text"] for choice in _data()["choice"]]


@dataclass(frozen=True)
class Row:
    """One published result. See the head of `published.toml` for the fields."""

    values: dict

    def __getattr__(self, name):
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name, default=None):
        return self.values.get(name, default)

    @property
    def low(self) -> float:
        return float(self.published[0] if isinstance(self.published, list) else self.published)

    @property
    def high(self) -> float:
        return float(self.published[1] if isinstance(self.published, list) else self.published)


@dataclass(frozen=True)
class Verdict:
    """A row with its prediction. `error` is signed and relative; 0 inside a published range.

    `span` is what the same row gives from 8K to 128K, where its context is assumed.
    """

    row: Row
    low: float | None
    high: float | None
    error: float | None
    at: str
    span: tuple[float, float] | None = None

    @property
    def counts(self) -> bool:
        return self.error is not None and not self.row.get("circular", False)

    @property
    def hit(self) -> bool:
        return self.error is not None and abs(self.error) <= TOLERANCE + 1e-12

    def as_dict(self) -> dict:
        row = self.row
        predicted = None if self.low is None else (
            self.high if self.low == self.high else [self.low, self.high]
        )  # fmt: skip
        return {
            "id": row.id,
            "system": row.system,
            "claim": row.claim,
            "grade": row.grade,
            "published": row.published,
            "predicted": predicted,
            "error": self.error,
            "headline": row.get("headline", False),
            "circular": row.get("circular", False),
            "counts": self.counts,
            "at": self.at,
            "8K-128K": self.span,
            "why": row.get("why") if not self.hit else None,
        }


@cache
def rows() -> tuple[Row, ...]:
    return tuple(Row(row) for row in _data()["row"])


@cache
def _machine(name: str) -> Machine:
    return load_machine(name)


@cache
def _model(name: str) -> Model:
    return load_model(name)


def _side(side: dict, model: str, context: int, batch: int, output: int, p: Parameters):
    options = dict(side)
    machine = _machine(options.pop("machine"))
    if host_bytes := options.pop("host_bytes", None):
        machine = machine.with_(host={"memory_bytes": host_bytes})
    if card_watts := options.pop("card_watts", None):
        machine = machine.with_(cards={"watts": card_watts})
    weights = options.pop("weights", None)
    work = Work(batch=options.pop("batch", batch), context=context, output=output)
    shape = _model(model)
    chosen = policy.system(options.pop("system"), shape, machine, work, **options)
    return closed_form.estimate(shape, machine, work, chosen, weights=weights, p=p), machine


def _grid(row: Row, p: Parameters, value) -> list[tuple[float, str]]:
    """The value at each operating point of a row, with the point's name; impossible ones left out."""
    found = []
    for model in row.models:
        for context in row.contexts:
            for batch in row.batches:
                output = row.get("output", 64)
                sides = [
                    _side(row.values[k], model, context, batch, output, p)
                    for k in ("a", "b")
                    if k in row.values
                ]
                got = float(value(*sides))
                if math.isfinite(got):
                    found.append((got, f"{model}, {context // 1024 or context}K, batch {batch}"))
    return found


def _kv_share(estimate) -> float:
    seconds = {**estimate.loads.busy}
    attention = max(float(seconds[k]) for k in ("path", "card", "p2p", "engine") if k in seconds)
    return attention / float(estimate.step_seconds)


def _ratio(row: Row, p: Parameters):
    def value(a, b):
        (a, machine_a), (b, machine_b) = a, b
        speedup = a.tokens_per_s / b.tokens_per_s
        match row.get("quantity", "speedup"):
            case "speedup":
                return speedup
            case "per_usd":
                return speedup * machine_b.usd / machine_a.usd
            case "upgrade":  # per USD of what was added: drives to `a`, GPUs to `b`
                drives_usd = machine_a.drives.count * machine_a.drives.usd
                return speedup * machine_b.gpu.count * machine_b.gpu.usd / drives_usd
            case "energy_saved":
                return 1 - a.joules_per_token / b.joules_per_token
            case "loss":
                return 1 - speedup
        raise ValueError(f"{row.id}: unknown quantity {row.quantity!r}")

    return _grid(row, p, value)


def _absolute(row: Row, p: Parameters):
    end = row.get("quantity") == "end_to_end"
    return _grid(row, p, lambda a: a[0].end_to_end_tokens_per_s if end else a[0].tokens_per_s)


def _kv_cut(row: Row, p: Parameters):
    def value(a, b):
        return 1 - _kv_share(a[0]) * a[0].step_seconds / (_kv_share(b[0]) * b[0].step_seconds)

    return _grid(row, p, value)


def _traffic_saved(row: Row, p: Parameters):
    """Bytes read over the drives' shared link: K, V, X and weights that lie on storage."""

    def read(estimate) -> float:
        return estimate.loads.bytes["uplink"] - estimate.loads.bytes["flash write"]

    return _grid(row, p, lambda a, b: 1 - read(a[0]) / read(b[0]))


def _alpha_rates(p: Parameters, alphas, model: str = "opt-30b"):
    """Equivalent KV rate of HILOS in GB/s at each alpha, all but flash, cards and link hidden."""
    shape, machine = _model(model), _machine("hilos-a100-x16")
    work = Work(batch=16, context=131072, output=0)
    chosen = policy.hilos(shape, machine, alpha=np.asarray(alphas))
    shares = chosen.shares or {}
    weights = {"gpu": 1.0, "dram": 0.0, "flash": 0.0}
    bare = p.with_(small_write_seconds=0.0, layer_seconds=0.0, job_seconds=0.0)
    got = closed_form.loads(shape, machine, work, chosen, shares, weights, bare)
    slowest = closed_form.maximum(got.busy[k] for k in ("drive", "card", "uplink"))
    return 16 * 131072 * shape.kv_bytes() / slowest / 1e9


def _requests(alpha: float, length: int = 8192 + 350) -> float:
    shape, machine = _model("opt-175b"), _machine("hilos-a100-x16")
    written = length * ((1 - alpha) * shape.kv_bytes() + alpha * shape.x_bytes())
    return machine.drives.count * machine.drives.write_endurance_bytes / written


def _single(value: float, at: str = "") -> list[tuple[float, str]]:
    return [(float(value), at)]


def _interconnect(row: Row, p: Parameters):
    """Per token and layer: 4sh + 4h down to 2h + 6h."""
    hidden = _model("opt-66b").hidden
    return _single((4 * row.context * hidden + 4 * hidden) / (2 * hidden + 6 * hidden))


def _tokens_endured(row: Row, p: Parameters):
    drives = _machine("instinfer-1").drives
    endured = 4 * drives.write_endurance_bytes / _model(row.model).kv_bytes()
    return _single(endured / 1e9)


FORWARD = ("ratio", "absolute", "path_rate", "kv_share")  # what `leave_one_out` fits to
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PREDICTORS = {
    "ratio": _ratio,
    "absolute": _absolute,
    "kv_cut": _kv_cut,
    "kv_share": lambda row, p: _grid(row, p, lambda a: _kv_share(a[0])),
    "traffic_saved": _traffic_saved,
    "alpha_rate": lambda row, p: _single(_alpha_rates(p, [row.alpha])[0]),
    "alpha_best": lambda row, p: _single(ALPHAS[int(_alpha_rates(p, ALPHAS).argmax())]),
    "alpha_rule": lambda row, p: _single(policy.hilos_alpha(_machine("hilos-a100-x16"))),
    "requests": lambda row, p: _single(_requests(row.alpha) / 1e6),
    "requests_gain": lambda row, p: _single(_requests(row.alpha) / _requests(0.0)),
    "device_watts": lambda row, p: _single(
        _machine("hilos-a100-x16").cards.count * _machine("hilos-a100-x16").cards.watts
    ),
    "interconnect": _interconnect,
    "tokens_endured": _tokens_endured,
    "path_rate": lambda row, p: _single(
        1e-9 / closed_form.path_seconds_per_byte(_machine(row.machine), p)
    ),
}


def judge(row: Row, p: Parameters | None = None) -> Verdict:
    """Predict one row. A range is compared end by end; a single value against the nearest end."""
    p = p or parameters()
    if "predict" not in row.values:
        return Verdict(row, None, None, None, row.get("at", ""))
    found = PREDICTORS[row.predict](row, p)
    if not found:
        return Verdict(row, None, None, None, "no operating point is feasible")
    reduce = row.get("reduce", "at")
    at = row.get("at", "")
    if reduce == "range":
        low, high = min(found)[0], max(found)[0]
        error = max(low / row.low - 1, high / row.high - 1, key=abs)
        return Verdict(row, low, high, error, at)
    got, where = max(found) if reduce == "max" else found[0]
    if row.low <= got <= row.high:
        error = 0.0
    else:
        error = got / (row.low if got < row.low else row.high) - 1
    span = None
    if at.startswith("assumed") and row.contexts[0] >= SPAN[0]:
        spread = PREDICTORS[row.predict](Row({**row.values, "contexts": SPAN}), p)
        span = min(spread)[0], max(spread)[0]
    return Verdict(row, got, got, error, at or where, span)


def reproduce(p: Parameters | None = None) -> list[Verdict]:
    """All rows, judged."""
    return [judge(row, p) for row in rows()]


def _with(p: Parameters, logs, names) -> Parameters:
    return p.with_(**{n: float(np.exp(v)) for n, v in zip(names, logs, strict=True)})


def fit(p: Parameters | None = None) -> Parameters:
    """Solve the fitted parameters for their anchor rows: as many equations as parameters."""
    p = p or parameters()
    by_id = {row.id: row for row in rows()}

    def residual(logs):
        trial = _with(p, logs, ANCHORS)
        verdicts = [judge(by_id[i], trial) for i in ANCHORS.values()]
        middles = [math.log(math.sqrt(v.row.low * v.row.high)) for v in verdicts]
        return [math.log(v.high or 1e-9) - m for v, m in zip(verdicts, middles, strict=True)]

    start = [math.log(p.values[name]) for name in ANCHORS]
    found = least_squares(residual, start, x_scale=0.1, diff_step=1e-4)
    return _with(p, found.x, ANCHORS)


@cache
def leave_one_out() -> dict[str, dict]:
    """For each system: parameters fitted on the other systems' ratios alone, and its errors then.

    A fitted parameter that no other system's row depends on takes its neutral value.
    """
    p = parameters()
    result = {}
    for system in dict.fromkeys(row.system for row in rows()):
        others = [row for row in rows() if row.system != system and row.get("predict") in FORWARD]

        def residual(logs, names, others=others):
            trial = _with(p.with_(**NEUTRAL), logs, names)
            errors = []
            for row in others:
                v = judge(row, trial)
                if v.error is not None and v.error > -1:
                    errors.append(math.log1p(v.error))
            return np.array(errors)

        neutral = p.with_(**NEUTRAL)
        names = [n for n in ANCHORS if _matters(n, others, p)]
        start = [math.log(p.values[n]) for n in names]
        # Absolute deviations, softly: a row the model cannot explain should not bend the rest.
        found = least_squares(residual, start, args=(names,), loss="soft_l1", f_scale=0.1,
                              x_scale=0.1, diff_step=1e-3, ftol=1e-4, xtol=1e-3)  # fmt: skip
        fitted = _with(neutral, found.x, names)
        # An anchor is a prediction here; what only repeats arithmetic is not.
        own = [row for row in rows() if row.system == system]
        own = [r for r in own if r.id in ANCHORS.values() or not r.get("circular", False)]
        verdicts = [judge(row, fitted) for row in own]
        errors = [v.error for v in verdicts if v.error is not None]
        result[system] = {
            "parameters": {n: fitted.values[n] for n in ANCHORS},
            "neutral": [n for n in ANCHORS if n not in names],
            "errors": {v.row.id: v.error for v in verdicts if v.error is not None},
            "median_error": float(np.median(np.abs(errors))) if errors else None,
            "within_10_percent": sum(v.hit for v in verdicts),
            "rows": len(errors),
        }
    return result


def _matters(name: str, some: list[Row], p: Parameters) -> bool:
    """Whether any of these rows changes with the parameter."""
    other = p.with_(**{name: p.values[name] * 2})
    pairs = ((judge(row, p).high, judge(row, other).high) for row in some)
    return any(a and b and abs(a / b - 1) > 1e-3 for a, b in pairs)


def settle_traffic(target: float = 0.88, tolerance: float = 0.01) -> list[dict]:
    """Operating points of INF2 at which the interconnect carries `target` less read traffic.

    Two places can be meant by the interconnect: the drives' shared link, and the GPU's. The first
    carries the weights that lie on storage, the second X and all weights that the GPU does not hold.
    """
    found = []
    for model in ("opt-30b", "opt-66b", "opt-175b"):
        for context in (4096, 8192, 16384, 32768):
            for batch in (16, 32):
                for x in (False, True):
                    a, _ = _side({"system": "inf2", "machine": "inf2-a100-x16", "x": x},
                                 model, context, batch, 64, parameters())  # fmt: skip
                    b, _ = _side({"system": "flexgen-ssd", "machine": "inf2-a100-ssd"},
                                 model, context, batch, 64, parameters())  # fmt: skip
                    for link in ("uplink", "gpu link"):

                        def read(e, link=link):
                            spill = e.loads.bytes["flash write"] if link == "uplink" else 0.0
                            return float(e.loads.bytes[link] - spill)

                        saved = 1 - read(a) / read(b)
                        if abs(saved - target) <= tolerance:
                            found.append({"model": model, "context": context, "batch": batch,
                                          "x_cache": x, "link": link, "saved": saved})  # fmt: skip
    return found
