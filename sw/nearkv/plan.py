# SPDX-License-Identifier: Apache-2.0
"""`nearkv plan`: what a model would do on a machine, and why; and how far to trust it.

The arithmetic is `nearkv_sim.system`, loaded when the command runs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import re
import shlex
import tempfile
import textwrap

from . import extras
from .arguments import MOST, amount, existing_directory, whole

ACCURACY = {"exact": 0.0, "8bit": 0.01, "4bit": 0.2}
BAR = 30
# Places that the runtime can serve a share of the context from: cards (the twin is the CPUs') and host.
RUNTIME_TIERS = ("card", "flash_cpu", "dram_cpu")


def tokens(text: str) -> int:
    """ "128k", "1M" or "4096" as a number of tokens; k and M are powers of 1024.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    match = re.fullmatch(r"([0-9]{1,18})([kKmM]?)", text)
    if not match or not int(match[1]):
        raise ValueError(f"a number of tokens such as 4096, 128k or 1M, not {text!r}")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


# Options with a value, and what they are where they are not given.
_DEFAULTS = {
    "model": "qwen2.5-32b", "machine": "smartssd-x16", "context": 32768, "batch": 16, "output": 64,
    "accuracy": "exact", "min_drive_years": 0.0, "kv_dir": None,
}  # fmt: skip
_WORK = ("model", "machine", "context", "batch", "output")
_PLAN = (*_WORK, "accuracy", "sparse", "min_drive_years", "events", "json")
# What each thing to do, of which there is one at a time, takes into account.
_TAKES = {
    "list": ("json",),
    "reproduce": ("json",),
    "leave_one_out": ("json",),
    "measure": ("kv_dir", "json"),
    "scale": (*_WORK, "events", "json"),
    "sweep": _WORK,
}


def _tokens(text: str) -> int:
    try:
        value = tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {error}") from None
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, not {text}")
    return value


def add_arguments(parser) -> None:
    """Add the options of `nearkv plan` to an argparse parser."""
    add = parser.add_argument
    default = _DEFAULTS
    add("--model", metavar="M", help=f"name or .toml file ({default['model']})")
    add("--machine", metavar="M", help=f"name or .toml file ({default['machine']})")
    add("--context", type=_tokens, metavar="N", help="tokens, such as 128k (32k)")
    add("--batch", type=whole(), metavar="N", help=f"sequences ({default['batch']})")
    add("--output", type=whole(), metavar="N", help=f"tokens to generate ({default['output']})")
    add("--accuracy", choices=ACCURACY, help=f"how K and V may be stored ({default['accuracy']})")
    add("--sparse", action="store_true", help="permit reading only half of the pages")
    add("--min-drive-years", type=amount, metavar="Y", help="years drives have to last (0)")
    add("--events", action="store_true", help="also simulate the step, or cluster, event by event")
    add(
        "--kv-dir",
        type=existing_directory,
        metavar="DIR",
        help="on the drive to profile (temporary files')",
    )
    add("--json", action="store_true", help="print JSON")
    add = parser.add_argument_group("instead of a plan").add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="models and machines that come with the package")
    add("--reproduce", action="store_true", help="published results beside what the model predicts")
    add("--leave-one-out", action="store_true", help="fit without each system, then predict it")
    add("--scale", action="store_true", help="hosts x drives, and where more stop helping")
    add(
        "--measure",
        type=_new_machine,
        metavar="FILE",
        help="profile this machine into a machine file",
    )
    add("--sweep", type=Path, metavar="DIR", help="write sweep.csv, report.html and report.png")


def _new_machine(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".toml":
        raise argparse.ArgumentTypeError(f"a machine file is called NAME.toml, not {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent} for {path.name}")
    return path


def run(args) -> int:
    """Run `nearkv plan` with parsed arguments; the exit status.

    Raises
    ------
    ValueError
        If a name, a number, the options together or the work as a whole are not possible; the message
        says what is.
    ModuleNotFoundError
        If the extra that it needs is not installed.
    """
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    mode = next((mode for mode in _TAKES if mode in given), None)
    takes = _TAKES[mode] if mode else (*_PLAN,)
    for name in (*_PLAN, "kv_dir"):
        if name in given and name not in takes:
            what = f"--{mode.replace('_', '-')}" if mode else "a plan"
            options = ", ".join(f"--{one.replace('_', '-')}" for one in takes)
            raise ValueError(
                f"--{name.replace('_', '-')} makes no difference to {what}; what does: {options}"
            )
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.measure:
        return _measure(args)
    with extras.needed_by("nearkv plan"):
        return _run(args)


def _run(args) -> int:
    from nearkv_sim.system import describe

    if args.list:
        return _list(args, describe)
    if args.reproduce:
        return _reproduce(args)
    if args.leave_one_out:
        return _leave_one_out(args)
    model, machine = describe.load_model(args.model), describe.load_machine(args.machine)
    work = describe.Work(batch=args.batch, context=args.context, output=args.output)
    if args.sweep:
        from nearkv_sim.system import report

        for path in report.write(model, machine, work, args.sweep):
            print(path)
        return 0
    if args.scale:
        return _scale(args, model, machine, work)
    return _what_if(args, model, machine, work)


def _measure(args) -> int:
    extras.require("nearkv plan --measure", "torch", "transformers")
    from . import measure

    directory = args.kv_dir or Path(tempfile.gettempdir())
    profile = measure.measure(directory)
    args.measure.write_text(profile.toml(str(directory)), encoding="utf-8")
    if args.json:
        print(json.dumps(profile.as_dict(), indent=1))
    else:
        text = args.measure.read_text(encoding="utf-8")
        print(f"{text}\nplan with it: nearkv plan --machine {shlex.quote(str(args.measure))}")
    return 0


@dataclass(frozen=True)
class RuntimePlan:
    """What the optimiser says of a run, in the terms of `nearkv.NearStorageCache`.

    Attributes
    ----------
    page_tokens, spill_pages : int
        A page is written when full, so the spill interval is their product, in tokens.
    kv_dtype : str
        Of those that `kv_dtypes` permits.
    weights : tuple of float, optional
        How fast each card is, where rates were given.
    budget_bytes : int, optional
        What goes to flash, where host memory is to hold the rest; None: everything may.
    batch : int
        Sequences at a time; the others are better served after them.
    tokens_per_s : float
        Predicted.
    bottleneck : str
    shares : dict
        Tier -> share of the context.
    """

    page_tokens: int
    spill_pages: int
    kv_dtype: str
    weights: tuple[float, ...] | None
    budget_bytes: int | None
    batch: int
    tokens_per_s: float
    bottleneck: str
    shares: dict[str, float]

    def describe(self) -> str:
        """One line for a person."""
        from nearkv_sim.system.policy import TIERS

        parts = "; ".join(f"{share:.0%} {TIERS[tier]}" for tier, share in self.shares.items())
        return f"{parts}; {self.tokens_per_s:.3g} tokens/s by the system model, bound by {self.bottleneck}"

    def cache_arguments(self) -> dict:
        """Keyword arguments for `NearStorageCache`."""
        found = {"page_tokens": self.page_tokens, "spill_pages": self.spill_pages,
                 "kv_dtype": self.kv_dtype, "weights": self.weights}  # fmt: skip
        if self.budget_bytes is not None:
            found |= {"budget_bytes": self.budget_bytes, "beyond_budget": "keep"}
        return found


def for_runtime(
    config,
    machine,
    *,
    batch: int,
    context: int,
    output: int = 64,
    kv_dtypes: Sequence[str] = ("fp16",),
    card_rates: Sequence[float] | None = None,
) -> RuntimePlan:
    """Plan a run of a model on a machine, with the optimiser that `nearkv plan` uses.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    machine : str, path or nearkv_sim.system.describe.Machine
        A name, a machine file such as `nearkv plan --measure` writes, or the machine itself.
    batch, context, output : int
        Sequences, tokens of each, tokens to generate.
    kv_dtypes : sequence of str
        Types that the caller can store; the plan takes the fastest.
    card_rates : sequence of float, optional
        Bytes/s of each card, for the shares of several cards.

    Raises
    ------
    ValueError
        If nothing fits, or the machine is unknown; the message says what does.
    """
    from nearkv_sim.system import describe, optimise

    model = describe.model_of(config.get_text_config(decoder=True))
    if not isinstance(machine, describe.Machine):
        machine = describe.load_machine(str(machine))
    work = describe.Work(batch=batch, context=context, output=output)
    best = optimise.optimise(model, machine, work, optimise.Limits(types=tuple(kv_dtypes)),
                             tiers=RUNTIME_TIERS)  # fmt: skip
    shares = {k: float(v) for k, v in best.shares.items() if v > 0}
    on_flash = sum(shares.get(t, 0.0) for t in optimise.ON_FLASH)
    budget = None
    # What waits for its page to fill is in memory anyway; less than a page more is no plan.
    if not on_flash or (1 - on_flash) * context > best.policy.page_tokens:
        stored = float(best.batch) * (context + output) * model.kv_bytes(best.policy.kv_type)
        budget = int(on_flash * stored)
    return RuntimePlan(
        page_tokens=best.policy.page_tokens,
        spill_pages=1,  # a page is written in one piece: gathering more of them gains nothing
        kv_dtype=best.policy.kv_type,
        weights=tuple(card_rates) if card_rates else None,
        budget_bytes=budget,
        batch=int(best.batch),
        tokens_per_s=float(best.tokens_per_s),
        bottleneck=best.bottleneck,
        shares=shares,
    )


def energy_joules(figures, machine, seconds: float, gpu_seconds: float = 0.0) -> float:
    """Energy of a run, from what the engine counted and the watts of the machine's description.

    Parameters
    ----------
    figures : nearkv.attention.Figures
        Of the run.
    machine : str, path or nearkv_sim.system.describe.Machine
    seconds : float
        That the run took.
    gpu_seconds : float
        That the GPU worked.
    """
    from nearkv_sim.system import closed_form, describe

    if not isinstance(machine, describe.Machine):
        machine = describe.load_machine(str(machine))
    own = figures.attend_s - figures.load_s - figures.run_s  # of the host, beside drives and cards
    busy = {
        "drive": figures.kv_bytes / float(machine.flash_read_bytes_per_s),
        "gpu": gpu_seconds,
        "cpu": own if machine.has_cards else own + figures.run_s,
        "card": figures.run_s if machine.has_cards else 0.0,
    }
    return float(closed_form.power(machine, busy, seconds, buffered=False)) * seconds


def _list(args, describe) -> int:
    found = {kind: describe.names(kind) for kind in ("models", "machines")}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name in found["models"]:
        m = describe.load_model(name)
        print(f"{name:20} {m.parameters / 1e9:7.1f} B  {m.kv_bytes():>9,.0f} KV bytes/token")
    for name in found["machines"]:
        print(f"{name:20} {describe.load_machine(name).source}")
    return 0


def _reproduce(args) -> int:
    from nearkv_sim.system import describe, published, report

    verdicts = published.reproduce()
    p = describe.parameters()
    if args.json:
        print(json.dumps({
            "fitted": {n: {"value": v, "anchor": p.entries[n]["anchor"]} for n, v in p.fitted.items()},
            "choices": published.choices(),
            "rows": [v.as_dict() for v in verdicts],
            "summary": report.summary(verdicts),
            "leave_one_out": published.leave_one_out(),
        }, indent=1))  # fmt: skip
        return 0
    print(f"{'':2}{'row':26}{'published':>14}{'predicted':>16}{'error':>9}{'8K-128K':>14}  claim")
    for v in verdicts:
        row = v.row.values
        mark = "*" if row.get("headline") else ""
        mark += "o" if row.get("circular") else ""
        got = (
            "-" if v.low is None else report.number(v.high if v.low == v.high else (v.low, v.high))
        )
        error = "" if v.error is None else f"{v.error:+.1%}"
        span = report.number(v.span) if v.span else ""
        print(f"{mark:2}{row['id']:26}{report.number(row['published']):>14}{got:>16}{error:>9}{span:>14}"
              f"  {row['claim']}")  # fmt: skip
        if not v.hit and row.get("why"):
            for line in textwrap.wrap(row["why"], 90):
                print(f"{'':28}{line}")
    print(f"\n* headline   o circular: does not count\n{report.summary(verdicts)}")
    for text in published.choices():
        print(textwrap.fill(text, 100, initial_indent="chosen: ", subsequent_indent="        "))
    for name, value in p.fitted.items():
        print(f"fitted: {name} = {value:g}, for {p.entries[name]['anchor']}")
    print("\nwith the parameters fitted to the other systems alone (nearkv plan --leave-one-out)")
    for system, got in published.leave_one_out().items():
        print(f"  {system:10} median error {got['median_error']:.0%}, {got['within_10_percent']} of "
              f"{got['rows']} rows within 10%")  # fmt: skip
    return 0


def _leave_one_out(args) -> int:
    from nearkv_sim.system import published

    found = published.leave_one_out()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for system, got in found.items():
        print(f"{system}: {got['within_10_percent']} of {got['rows']} rows within 10%, median error "
              f"{got['median_error']:.0%}, from the other systems alone")  # fmt: skip
        for name, value in got["parameters"].items():
            silent = "  (no other system depends on it: neutral)" if name in got["neutral"] else ""
            print(f"    {name} = {value:.4g}{silent}")
        for row, error in got["errors"].items():
            print(f"    {row:26}{error:+8.1%}")
    return 0


def _scale(args, model, machine, work) -> int:
    from nearkv_sim.system import scale

    points = scale.scale(model, machine, work)
    simulated = [scale.simulate(p, model.n_layers) if args.events else None for p in points]
    if args.json:
        rows = zip(points, simulated, strict=True)
        print(json.dumps([{**vars(p), "simulated_tokens_per_s": s} for p, s in rows], indent=1))
        return 0
    print(f"{model.name} on hosts of {machine.name}: batch {args.batch}, context {args.context:,}, "
          f"output {args.output}\n")  # fmt: skip
    extra = f"{'simulated':>11}" if args.events else ""
    print(f"{'hosts':>6}{'drives':>7}  {'spread':10}{'tokens/s':>10}{extra}{'per host':>10}"
          "  bottleneck")  # fmt: skip
    for p, s in zip(points, simulated, strict=True):
        extra = f"{s:11.3g}" if args.events else ""
        print(f"{p.hosts:6}{p.drives:7}  {p.mode:10}{p.tokens_per_s:10.3g}{extra}"
              f"{p.efficiency:10.0%}  {p.bottleneck}")  # fmt: skip
    print(
        "\ndrives: of each host, with their cards. per host: against the fewest hosts with as many."
    )
    for name in dict.fromkeys(p.bottleneck for p in points):
        print(f"{name}: {scale.WHY[name]}")
    return 0


def _as_dict(name: str, e) -> dict:
    def plain(values) -> dict:
        return {k: float(v) for k, v in values.items()}

    return {
        "system": name,
        "feasible": bool(e.feasible),
        "tokens_per_s": float(e.tokens_per_s),
        "end_to_end_tokens_per_s": float(e.end_to_end_tokens_per_s),
        "step_seconds": float(e.step_seconds),
        "prefill_seconds": float(e.prefill_seconds),
        "batch": float(e.batch),
        "bottleneck": e.bottleneck,
        "busy_seconds": plain(e.loads.busy),
        "serial_seconds": plain(e.loads.serial),
        "step_bytes": plain(e.loads.bytes),
        "watts": float(e.watts),
        "joules_per_token": float(e.joules_per_token),
        "usd_per_million_tokens": float(e.usd_per_million_tokens),
        "drive_years": float(e.drive_years),
        "kv_type": e.policy.kv_type,
        "page_tokens": e.policy.page_tokens if e.policy.abi_jobs else None,
        "shares": {k: float(v) for k, v in e.shares.items() if v > 0},
        "weights": plain(e.weights),
    }


def _what_if(args, model, machine, work) -> int:
    from nearkv_sim.system import closed_form, optimise, policy, report

    limits = optimise.Limits(
        max_error=ACCURACY[args.accuracy],
        sparse=args.sparse,
        min_drive_years=args.min_drive_years,
    )
    best = optimise.optimise(model, machine, work, limits)
    found = [_as_dict("nearkv", best)]
    found[0]["micro_batches"] = optimise.micro_batches(model, work, best)
    for name in policy.SYSTEMS:
        chosen = policy.system(name, model, machine, work)
        found.append(_as_dict(name, closed_form.estimate(model, machine, work, chosen)))
        found[-1]["lacks"] = policy.lacks(chosen, machine)
    if args.events and not machine.has_cards:
        raise ValueError(f"--events simulates cards, and {machine.name} has none; try --scale")
    if args.events:
        found[0]["simulated"] = _simulate(model, machine, work, best)
    if args.json:
        clean = json.loads(json.dumps(found), parse_constant=lambda _: None)
        print(json.dumps({"model": model.name, "machine": machine.name, "batch": args.batch,
                          "context": args.context, "output": args.output, "systems": clean},
                         indent=1))  # fmt: skip
        return 0
    print(f"{model.name} on {machine.name}: batch {args.batch}, context {args.context:,}, output "
          f"{args.output}\n{machine.source}\n")  # fmt: skip
    print(f"{'system':16}{'batch':>5}{'tokens/s':>10}{'in all':>9}{'step':>9}{'J/token':>9}"
          f"{'USD/M':>8}{'drives':>8}  bottleneck")  # fmt: skip
    for e in found:
        if not e["feasible"]:
            print(f"{e['system']:16}  {e.get('lacks') or 'does not fit'}")
            continue
        years = f"{e['drive_years']:.3g} y" if e["drive_years"] < 1000 else "> 1 ky"
        print(f"{e['system']:16}{e['batch']:5.0f}{e['tokens_per_s']:10.3g}"
              f"{e['end_to_end_tokens_per_s']:9.3g}{e['step_seconds']:7.3g} s"
              f"{report.number(e['joules_per_token']):>9}"
              f"{report.number(e['usd_per_million_tokens']):>8}{years:>8}  {e['bottleneck']}")  # fmt: skip
    print("in all: with prefill. USD/M: of a million tokens. drives: until they are worn out")
    plan = found[0]
    print(f"\nnearkv stores K and V in {plan['kv_type']}, pages of {plan['page_tokens']} tokens, "
          f"{plan['micro_batches']} micro-batch(es)")  # fmt: skip
    for tier, share in plan["shares"].items():
        print(f"  {share:7.1%}  {policy.TIERS[tier]}")
    held = {"gpu": "GPU memory", "dram": "host memory", "flash": "flash"}
    print(
        "  weights: " + ", ".join(f"{v:.0%} in {held[k]}" for k, v in plan["weights"].items() if v)
    )
    print("\nbusy in a step")
    times = {**plan["busy_seconds"], **plan["serial_seconds"]}
    longest = max(times.values())
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        about = closed_form.RESOURCES.get(name, "host work that nothing hides")
        bar = "#" * round(BAR * seconds / longest)
        print(f"  {name:9}{seconds:10.4f} s  {bar:{BAR}}  {about}")
    print("\nmoved in a step")
    for name, size in plan["step_bytes"].items():
        print(f"  {name:13}{size / 1e9:12.3f} GB")
    if simulated := plan.get("simulated"):
        print("\nthe cards' part of the step, event by event")
        for parts, row in simulated.items():
            print(f"  {parts} micro-batches: {row['equal']:.3f} s for equal contexts, "
                  f"{row['ragged']:.3f} s for contexts from none to twice the mean")  # fmt: skip
    return 0


def _simulate(model, machine, work, estimate) -> dict:
    """Seconds of the step for 1, 2 and 4 micro-batches, contexts equal and ragged."""
    import numpy as np

    from nearkv_sim.system import events

    batch, mean = int(estimate.batch), float(work.mean_context)
    ragged = np.linspace(0, 2, batch + 2)[1:-1] * mean
    return {
        parts: {
            name: events.simulate_plan(
                model, machine, contexts, estimate, micro_batches=parts, most_extents=8
            ).seconds
            for name, contexts in (("equal", np.full(batch, mean)), ("ragged", ragged))
        }
        for parts in (1, 2, 4)
        if parts <= batch
    }
