# SPDX-License-Identifier: Apache-2.0
"""`nearkv bench NAME`: the measured figures, each beside its limit or its peer."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import html
import importlib
import io
import json
import os
from pathlib import Path
import platform
import random
import statistics
from typing import Any

from .. import extras
from ..arguments import Parser
from ..cards import CardError

# Name -> (module with `add_arguments(parser)` and `run(arguments) -> exit code`, what it measures).
# Imported when asked for: a bench may need the simulator or torch.
BENCHES = {
    "stream": (
        "nearkv_sim.rtl.bench_stream",
        "the emitted Verilog: beats used of the bus, in cycles",
    ),
    "twin": ("nearkv.bench.twin", "the native card: GB/s a core, beside torch and the memory"),
    "flash": ("nearkv.bench.flash", "pages from the drive into card memory, beside a raw reader"),
    "decode": ("nearkv.bench.decode", "attention with KV on the drive, beside drive, card, peers"),
    "accuracy": (
        "nearkv.bench.accuracy",
        "errors against float64, beside kernels that round P",
    ),
    "batch": ("nearkv.bench.batch", "many prompts, beside padded batches in memory"),
    "step": ("nearkv.bench.step", "a step of the demo model, beside transformers' own cache"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:8} {what}" for name, (_, what) in BENCHES.items())
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see nearkv bench NAME --help")


def run(arguments: argparse.Namespace) -> int:
    """Run `nearkv bench NAME`; the exit status.

    Raises
    ------
    ModuleNotFoundError
        If the extra that it needs is not installed.
    CardError
        If a card, or the simulation of one, cannot do what is measured.
    """
    try:
        with extras.needed_by(f"nearkv bench {arguments.name}"):
            return _run(arguments)
    except RuntimeError as error:  # of simulations, which know no CardError
        raise error if isinstance(error, CardError) else CardError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(BENCHES[arguments.name][0])
    parser = Parser(
        f"nearkv bench {arguments.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments.arguments))


def check_context(context: int, page_tokens: int) -> None:
    """Raise ValueError unless a context fills its pages."""
    if context % page_tokens:
        raise ValueError(
            f"--context must be a multiple of a page's {page_tokens} tokens, not {context}"
        )


def machine() -> dict[str, Any]:
    """What a figure was measured on: processor, cores, load."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def in_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each turn returned in each round. The first round, which warms up, is left out."""
    results: dict[str, list[float]] = {name: [] for name in turns}
    names, order = list(turns), random.Random(0)
    for round in range(rounds + 1):
        for name in names:
            result = turns[name]()
            if round:
                results[name].append(result)
        order.shuffle(names)
    return results


def quartiles_of_ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios of each round.

    What disturbs one turn disturbs its neighbours.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def to_json(command: str, head: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """The figures of a bench as tests/bench keeps them: a line for each run."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(_rounded(value))}"
        for key, value in {"command": command, **head}.items()
    ]
    rows = ",\n".join(f"    {json.dumps(_rounded(run))}" for run in runs)
    return "{\n" + ",\n".join([*lines, f'  "runs": [\n{rows}\n  ]']) + "\n}"


def _rounded(value: Any) -> Any:
    """Floats with six digits; more only tell what is noise."""
    if isinstance(value, Mapping):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


PLOT_SUFFIXES = (".png", ".svg", ".html")
_COLOURS = ("#12a150", "#3f7cc4", "#b9b9b9", "#d9822b", "#b8577d", "#7d7d7d")


def check_plot(path: str | Path) -> Path:
    """See that `plot_bars` can write this file: before minutes of measuring, not after.

    Raises
    ------
    ValueError
        If the suffix is none of `PLOT_SUFFIXES`, or the folder does not exist.
    ImportError
        If matplotlib is not installed; the message has the command that installs it.
    """
    path = Path(path)
    if path.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"a plot is a file {', '.join(PLOT_SUFFIXES)}, not {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} for the plot; create it first")
    extras.require("a plot", "matplotlib")
    return path


def plot_bars(
    path: str | Path,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    unit: str,
    limit: tuple[str, float] | None = None,
    note: str = "",
) -> None:
    """Draw measured figures as horizontal bars, one group below the other.

    Parameters
    ----------
    path : str or Path
        Written; its suffix says how: one of `PLOT_SUFFIXES`. The HTML loads nothing from elsewhere.
    groups : sequence of str
        What was measured; the first is drawn on top.
    series : mapping
        Who was measured -> a value for each group, None where there is none. The first is ours.
    limit : (name, value), optional
        A line across all groups.
    note : str, optional
        Below the title: the machine and the command, without which figures say little.

    Raises
    ------
    ValueError
        If a series has not one value for each group; and what `check_plot` raises.
    """
    path = check_plot(path)
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"{name!r} has {len(values)} values for {len(groups)} groups")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888",
        "axes.grid": True, "axes.grid.axis": "x", "grid.color": "#e6e6e6", "axes.axisbelow": True,
        "legend.frameon": False, "svg.fonttype": "path", "svg.hashsalt": "nearkv",
    }  # fmt: skip
    height = 0.8 / len(series)
    inches = 1.6 + len(groups) * (0.22 + 0.17 * len(series))
    with matplotlib.rc_context():
        matplotlib.rcParams.update(style)
        figure, axis = pyplot.subplots(figsize=(8, inches), layout="constrained")
        for i, (name, values) in enumerate(series.items()):
            present = [(group, value) for group, value in enumerate(values) if value is not None]
            places = [group + (i - (len(series) - 1) / 2) * height for group, _ in present]
            bars = axis.barh(
                places, [value for _, value in present], 0.92 * height, label=name,
                color=_COLOURS[i % len(_COLOURS)],
            )  # fmt: skip
            axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color="#333")
        if limit:
            axis.axvline(limit[1], color="#c0392b", lw=1.5, ls="--", label=limit[0])
        axis.set_yticks(range(len(groups)), groups)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.set_xlabel(unit)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        axis.set_title(note, loc="left", fontsize=8, color="#555")
        figure.legend(loc="outside lower right", ncols=4, fontsize=9)
        if path.suffix == ".html":
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg = text.getvalue()
            path.write_text(
                f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
                + svg[svg.index("<svg") :]
            )
        else:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=120, metadata=metadata)
        pyplot.close(figure)
