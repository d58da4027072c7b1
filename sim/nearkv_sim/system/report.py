# SPDX-License-Identifier: Apache-2.0
"""Sweeps and the report: CSV, one HTML file that needs no network, and the same figures as PNG."""

from collections.abc import Iterator
import csv
from dataclasses import replace
import html
import io
from pathlib import Path
import re

import numpy as np

from nearkv_hw import abi
from nearkv_hw.config import preset

from . import closed_form, optimise, policy, published, scale
from .describe import Machine, Model, Parameters, Work, load_model, parameters

COLOURS = {
    "nearkv int8": "#0a5c36",
    "nearkv": "#12a150",
    "hilos": "#d9822b",
    "inf2": "#b8577d",
    "instinfer": "#3f7cc4",
    "instinfer-sparf": "#8fb6e0",
    "flexgen-dram": "#7d7d7d",
    "flexgen-ssd": "#b9b9b9",
}
FIGURE = r"(> )?[-+]?[\d.,]*(e[-+]\d+)?[%x]?( - [\d.,]+)?"  # also none at all
TIER_COLOURS = dict(zip(policy.TIERS, (
    "#0a5c36", "#d9822b", "#b8577d", "#e0a458", "#3f7cc4", "#5b6b7a", "#12a150", "#7b5ea7", "#2a9d8f",
), strict=True))  # fmt: skip
# Model, batch and context of the scale-out tables: few long contexts, and thousands of sequences.
SCALED = (("qwen2.5-32b", 16, 1 << 20), ("llama-3.1-70b", 4096, 32768))
CARDS = (1, 2, 4, 8, 12, 16, 24, 32)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
EIGHT_BIT = optimise.Limits(max_error=0.01)
COMPARED = ("opt-66b", "opt-175b", "qwen2.5-32b", "mixtral-8x7b")
COLUMNS = (
    "model", "machine", "system", "kv_type", "cards", "batch", "context", "tokens_per_s",
    "end_to_end_tokens_per_s", "step_seconds", "bottleneck", "flash_read_bytes",
    "flash_write_bytes", "uplink_bytes", "gpu_link_bytes", "joules_per_token",
    "usd_per_million_tokens", "drive_years",
)  # fmt: skip


def estimates(
    model: Model, machine: Machine, work: Work, p: Parameters | None = None
) -> Iterator[tuple[str, closed_form.Estimate]]:
    """Every system, nearkv in fp16 and in int8, for arrays of work or machines."""
    p = p or parameters()
    for name in policy.SYSTEMS:
        chosen = policy.system(name, model, machine, work)
        yield name, closed_form.estimate(model, machine, work, chosen, p=p)
    yield "nearkv", optimise.optimise_many(model, machine, work, p=p)
    yield "nearkv int8", optimise.optimise_many(model, machine, work, EIGHT_BIT, p=p)


def sweep(
    model: Model,
    machine: Machine,
    contexts,
    batches=BATCHES,
    cards=CARDS,
    output: int = 64,
    p: Parameters | None = None,
) -> list[dict]:
    """All systems over contexts x batches x cards, one dict a point, keys as `COLUMNS`."""
    axes = np.meshgrid(cards, batches, contexts, indexing="ij")
    n_cards, batch, context = (axis.ravel() for axis in axes)
    machine = scale.with_drives(machine, n_cards)
    work = Work(batch=batch, context=context, output=output)
    table = []
    for system, e in estimates(model, machine, work, p):
        times = {**e.loads.busy, **e.loads.serial}
        order = list(times)
        slowest = np.stack([np.broadcast_to(times[k], batch.shape) for k in order]).argmax(axis=0)
        moved = e.loads.bytes
        numbers = [
            e.tokens_per_s, e.end_to_end_tokens_per_s, e.step_seconds, moved["flash read"],
            moved["flash write"], moved["uplink"], moved["gpu link"], e.joules_per_token,
            e.usd_per_million_tokens, e.drive_years,
        ]  # fmt: skip
        tok, end, step, *rest = (np.broadcast_to(v, batch.shape).tolist() for v in numbers)
        for i in np.flatnonzero(np.broadcast_to(e.feasible, batch.shape)).tolist():
            values = (model.name, machine.name, system, e.policy.kv_type, int(n_cards[i]),
                      int(batch[i]), int(context[i]), tok[i], end[i], step[i], order[slowest[i]],
                      *(v[i] for v in rest))  # fmt: skip
            table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def write_csv(table: list[dict], path: Path) -> None:
    """The sweep as CSV; numbers with six significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in table:
            writer.writerow(
                [f"{v:.6g}" if isinstance(v, float) else v for v in (row[c] for c in COLUMNS)]
            )


def gains(machine: Machine, contexts=(32768, 131072), batch: int = 16) -> list[dict]:
    """By how much nearkv is better than the best other exact system, fp16 and int8."""
    result = []
    for name in COMPARED:
        model = load_model(name)
        for context in contexts:
            work = Work(batch=batch, context=context)
            others = {
                s: float(e.tokens_per_s)
                for s in policy.SYSTEMS
                if s != "instinfer-sparf"
                and (e := closed_form.estimate(
                    model, machine, work, policy.system(s, model, machine, work))).feasible
            }  # fmt: skip
            row = {
                "model": name,
                "context": context,
                "best": max(others, key=lambda name: others[name]),
            }
            row |= {"others": others}
            for label, limits in (("fp16", optimise.Limits()), ("int8", EIGHT_BIT)):
                e = optimise.optimise(model, machine, work, limits)
                row[label] = float(e.tokens_per_s)
                row[f"{label} plan"] = ", ".join(
                    f"{k} {float(v):.0%}" for k, v in e.shares.items() if v > 0.005
                )
                row[f"{label} bottleneck"] = e.bottleneck
                row[f"{label} kv"] = e.policy.kv_type
            result.append(row)
    return result


def ablation(model: Model, machine: Machine, work: Work) -> list[tuple[str, str, float]]:
    """(system, step, tokens/s): what each optimisation of HILOS, then of nearkv, adds."""

    def rate(chosen, limits=None, **facts):
        if limits is not None:
            return float(optimise.optimise(model, machine, work, limits).tokens_per_s)
        return float(
            closed_form.estimate(model, machine, work, replace(chosen, **facts)).tokens_per_s
        )

    near = policy.nearkv(shares={"card": 1.0})
    best = policy.nearkv(shares=None)
    alphas = np.linspace(0, 1, 101)
    shares = {"card": 1 - alphas, "flash_x": alphas}
    mixed = closed_form.estimate(model, machine, work, replace(best, shares=shares))
    return [
        ("flexgen-ssd", "FlexGen\n(SSD)", rate(policy.flexgen_ssd())),
        ("hilos", "near\nstorage", rate(policy.hilos(model, machine, x=False, wb=False))),
        ("hilos", "+ delayed\nwriteback", rate(policy.hilos(model, machine, x=False))),
        ("hilos", "+ X-cache\n= HILOS", rate(policy.hilos(model, machine))),
        ("nearkv", "cards alone:\nload beside\ncompute", rate(near)),
        ("nearkv", "+ X on GPU,\nnever\nprojected", float(np.nanmax(mixed.tokens_per_s))),
        ("nearkv", "+ every tier,\nplanned\n= nearkv", rate(best, optimise.Limits())),
        ("nearkv int8", "+ int8", rate(best, EIGHT_BIT)),
    ]


# ------------------------------------------------------------------------------------------ plots


def _style():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": "#888", "axes.labelcolor": "#333",
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlesize": 11,
        "xtick.color": "#555", "ytick.color": "#555", "axes.grid": True, "grid.color": "#e6e6e6",
        "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "path",
        "svg.hashsalt": "nearkv", "figure.facecolor": "white",
    })  # fmt: skip
    return pyplot


def _tokens(value: float) -> str:
    return f"{value / 1048576:g}M" if value >= 1048576 else f"{value / 1024:g}K"


def _plain(axis):
    """Numbers of a logarithmic axis as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plot_context(axis, table, batch: int, cards: int):
    points = [r for r in table if r["batch"] == batch and r["cards"] == cards]
    for system, colour in COLOURS.items():
        line = sorted((r["context"], r["tokens_per_s"]) for r in points if r["system"] == system)
        if line:
            wide = system.startswith("nearkv")
            axis.plot(*zip(*line, strict=True), color=colour, lw=2.6 if wide else 1.6,
                      ls="--" if system == "instinfer-sparf" else "-", label=system)  # fmt: skip
    contexts = sorted({r["context"] for r in points})
    axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="tokens/s")
    marks = [c for c in contexts if c & (c - 1) == 0]
    axis.set_xticks(marks, [_tokens(c) for c in marks])
    axis.minorticks_off()
    _plain(axis)
    axis.set_title(f"Decode throughput over context: batch {batch}, {cards} drive(s)")
    axis.legend(fontsize=8, ncols=2)


def plot_cards(axis, table, batch: int, context: int):
    points = [r for r in table if r["batch"] == batch and r["context"] == context]
    for system, colour in COLOURS.items():
        line = sorted((r["cards"], r["tokens_per_s"]) for r in points if r["system"] == system)
        if line:
            axis.plot(*zip(*line, strict=True), color=colour, marker="o", ms=3.5,
                      lw=2.6 if system.startswith("nearkv") else 1.6, label=system)  # fmt: skip
    cards = sorted({r["cards"] for r in points})
    axis.set(xscale="log", yscale="log", xlabel="drives (with their cards, if any) behind one uplink",
             ylabel="tokens/s")  # fmt: skip
    axis.set_xticks(cards, [str(c) for c in cards])
    axis.minorticks_off()
    _plain(axis)
    axis.set_title(f"Decode throughput over drives: {_tokens(context)} context, batch {batch}")


def plot_ablation(axis, model, machine, work):
    steps = ablation(model, machine, work)
    names = [label for _, label, _ in steps]
    rates = [rate for _, _, rate in steps]
    bars = axis.bar(range(len(steps)), rates, color=[COLOURS[s] for s, _, _ in steps], width=0.7)
    for i, (bar, rate) in enumerate(zip(bars, rates, strict=True)):
        gain = f"{rate / rates[i - 1]:.2f}x" if i else ""
        axis.annotate(f"{rate:.3g}\n{gain}", (bar.get_x() + bar.get_width() / 2, rate),
                      ha="center", va="bottom", fontsize=8, color="#333")  # fmt: skip
    axis.set_xticks(range(len(steps)), names, fontsize=7.5)
    axis.set_ylim(0, max(rates) * 1.2)
    axis.set_ylabel("tokens/s")
    axis.grid(axis="x", visible=False)
    axis.set_title(
        f"What each step adds: {model.name}, {_tokens(work.context)}, batch {work.batch}"
    )


def plot_roofline(axis, machine: Machine, p: Parameters):
    """Attention of one card: FLOP per byte of K and V is the group size (over two bytes)."""
    rows, lanes = preset("smartssd").rows, abi.BLOCK_TOKENS
    hertz = p.engine_bytes_per_s / abi.BEAT_BYTES
    intensity = np.logspace(-0.5, 5.5, 200, base=2)
    peak = 2 * rows * lanes * hertz
    flash = float(np.ravel(machine.flash_read_bytes_per_s / machine.cards.count)[0])
    memory = float(np.ravel(machine.cards.engine_bytes_per_s)[0])
    for rate, label, colour in (
        (flash, f"flash, {flash / 1e9:.3g} GB/s", "#3f7cc4"),
        (memory, f"card memory, {memory / 1e9:.3g} GB/s", "#d9822b"),
        (p.engine_bytes_per_s, f"engine, {p.engine_bytes_per_s / 1e9:.3g} GB/s", "#12a150"),
    ):
        axis.plot(
            intensity, np.minimum(intensity * rate, peak) / 1e9, color=colour, lw=2, label=label
        )
    axis.axhline(peak / 1e9, color="#888", lw=1, ls=":")
    axis.annotate(f"{rows} rows x {lanes} lanes at {hertz / 1e6:.0f} MHz", (intensity[0], peak / 1e9), fontsize=8,
                  va="bottom", color="#666")  # fmt: skip
    seen: dict[int, list[str]] = {}
    for name in (*COMPARED, "llama-3.1-70b"):
        seen.setdefault(load_model(name).group_size, []).append(name)
    for group, models in seen.items():
        served = min(group * flash, peak) / 1e9
        axis.plot([group], [served], "o", color="#0a5c36", zorder=5)
        axis.annotate("\n".join(models), (group, served), xytext=(5, -5), fontsize=7.5,
                      textcoords="offset points", va="top", color="#333")  # fmt: skip
    axis.set(xscale="log", yscale="log", ylabel="GFLOP/s", ylim=(1, peak / 1e9 * 2),
             xlabel="FLOP per byte of K and V in fp16 = query heads per KV head")  # fmt: skip
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="lower right")
    axis.set_title(f"Roofline of one card of {machine.name}")


def plot_reproduction(axis, verdicts):
    shown = [v for v in verdicts if v.error is not None and v.high > 0 and v.row.low > 0]
    axis.axvspan(-10, 10, color="#e3f4e9", zorder=0)
    axis.axvline(0, color="#888", lw=1)
    heads = [v for v in shown if v.row.get("headline")]
    heads.sort(key=lambda v: abs(v.error))
    for y, v in enumerate(reversed(heads)):
        colour = "#9a9a9a" if not v.counts else "#12a150" if v.hit else "#c0392b"
        error = max(-60.0, min(60.0, 100 * v.error))
        axis.plot([0, error], [y, y], color=colour, lw=2)
        axis.plot([error], [y], "o", color=colour, ms=6)
    axis.set_yticks(range(len(heads)), [
        f"{v.row.id}  {number(v.row.published)} / {number(v.high)}" for v in reversed(heads)
    ], fontsize=7.5)  # fmt: skip
    axis.set(xlim=(-62, 62), xlabel="error, % (green band: 10%; grey: circular, does not count)")
    axis.grid(axis="y", visible=False)
    axis.set_title("Headline results: published / predicted")


def plot_resources(axis, model, machine, work):
    """Busy seconds of each resource: nearkv and HILOS."""
    plans = [("nearkv", optimise.optimise(model, machine, work)),
             ("hilos", closed_form.estimate(model, machine, work,
                                            policy.hilos(model, machine)))]  # fmt: skip
    names = ["drive", "p2p", "engine", "card", "uplink", "gpu link", "gpu", "hbm", "cpu", "dram",
             "layers"]  # fmt: skip
    for i, (name, e) in enumerate(plans):
        times = {**e.loads.busy, **e.loads.serial}
        values = [float(times.get(n, 0.0)) for n in names]
        axis.barh(np.arange(len(names)) + 0.4 * i - 0.2, values, 0.38, color=COLOURS[name],
                  label=f"{name}: {float(e.step_seconds):.3g} s a step")  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("busy seconds in a decode step")
    axis.grid(axis="y", visible=False)
    axis.legend(fontsize=8)
    axis.set_title(f"Time by resource: {model.name}, {_tokens(work.context)}, batch {work.batch}")


# ----------------------------------------------------------------------------------------- report

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.7rem;margin-bottom:.2rem}}h2{{margin-top:2.2rem;border-bottom:1px solid #ddd}}
p.lead{{color:#555;margin-top:0}}figure{{margin:1rem 0}}svg{{max-width:100%;height:auto}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1rem}}
table{{border-collapse:collapse;font-size:.86rem;width:100%}}th{{text-align:left;background:#f4f6f5}}
td,th{{padding:.28rem .5rem;border-bottom:1px solid #e8e8e8;vertical-align:top}}
td.k{{white-space:nowrap;font-weight:600}}
.tiles{{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}}
.tile{{flex:1 1 150px;background:#f4f7f5;border-radius:8px;padding:.6rem .9rem}}
.tile b{{display:block;font-size:1.3rem;white-space:nowrap;color:#0a5c36}}.tile span{{color:#555;font-size:.85rem}}
.bar{{display:flex;height:26px;border-radius:6px;overflow:hidden;font-size:.78rem;color:#fff}}
.bar div{{padding:.2rem .5rem;white-space:nowrap;overflow:hidden}}
td.n,th.n{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
tr.hit td.e{{color:#0a7d3c;font-weight:600}}tr.miss td.e{{color:#b3261e;font-weight:600}}
tr.circular{{color:#888}}small{{color:#666}}
</style></head><body><h1>{title}</h1><p class="lead">{lead}</p>{body}</body></html>"""


def number(value) -> str:
    """Three significant digits; a range for a pair."""
    if isinstance(value, list | tuple):
        return " - ".join(number(v) for v in value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(head: list[str], lines: list[list], classes: list[str] | None = None) -> str:
    right = [
        all(isinstance(v, int | float) or re.fullmatch(FIGURE, str(v)) for v in column)
        for column in zip(*lines, strict=True)
    ]

    brief = max((len(str(line[0])) for line in lines), default=0) < 32

    def cell(value, i):
        text = number(value) if isinstance(value, int | float) else html.escape(str(value))
        kind = "n e" if head[i] == "error" else "n" if right[i] else "k" if not i and brief else ""
        return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"

    out = ["<table><tr>"]
    for title, numeric in zip(head, right, strict=True):
        out.append(f"<th{' class=n' if numeric else ''}>{html.escape(title)}</th>")
    out.append("</tr>")
    for k, line in enumerate(lines):
        out.append(f'<tr class="{classes[k]}">' if classes else "<tr>")
        out += [cell(v, i) for i, v in enumerate(line)]
        out.append("</tr>")
    return "".join([*out, "</table>"])


def _tiles(systems: dict[str, closed_form.Estimate]) -> str:
    """The answer in five numbers."""
    e = systems["nearkv"]
    others = {k: float(v.tokens_per_s) for k, v in systems.items()
              if v.feasible and not k.startswith("nearkv") and k != "instinfer-sparf"}  # fmt: skip
    tiles = [(f"{number(float(e.tokens_per_s))} tokens/s", f"decode, batch {int(e.batch)}"),
             (e.bottleneck.split(", ")[0], "is busy longest"),
             (f"{number(float(e.joules_per_token))} J", "per token"),
             (f"{number(float(e.usd_per_million_tokens))} USD", "per million tokens"),
             ("> 1000 y" if e.drive_years > 1000 else f"{number(float(e.drive_years))} y",
              "until the drives are worn out")]  # fmt: skip
    if others:
        best = max(others, key=lambda name: others[name])
        gain = float(e.tokens_per_s) / others[best]
        tiles.insert(1, (f"{gain:.2f}x", f"the best other exact system, {best}"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in tiles
    ) + "</div>"  # fmt: skip


def _compared(systems: dict[str, closed_form.Estimate], machine: Machine) -> str:
    lines = []
    for name, e in systems.items():
        if not e.feasible:
            lines.append([name, *[""] * 7, policy.lacks(e.policy, machine) or "does not fit"])
            continue
        lines.append([
            name, int(e.batch), *(float(v) for v in (
                e.tokens_per_s, e.end_to_end_tokens_per_s, e.step_seconds, e.joules_per_token,
                e.usd_per_million_tokens)),
            "> 1000" if e.drive_years > 1000 else float(e.drive_years), e.bottleneck,
        ])  # fmt: skip
    return _table(["system", "batch", "tokens/s", "end to end", "step, s", "J/token",
                   "USD/M tokens", "drive life, years", "bottleneck"], lines)  # fmt: skip


def _shares(e: closed_form.Estimate) -> str:
    """The context as a bar, cut by the places it is served from."""
    cuts = [(tier, float(share)) for tier, share in e.shares.items() if share > 0.002]
    bar = "".join(
        f'<div style="flex:{share:.4f};background:{TIER_COLOURS[tier]}" title="{policy.TIERS[tier]}">'
        f"{share:.0%}</div>" for tier, share in cuts
    )  # fmt: skip
    key = " &nbsp; ".join(
        f'<span style="color:{TIER_COLOURS[tier]}">&#9632;</span> {share:.1%} {policy.TIERS[tier]}'
        for tier, share in cuts
    )
    return f'<div class="bar">{bar}</div><p><small>{key}</small></p>'


def _left_out() -> str:
    lines = [
        [name, got["median_error"] and f"{got['median_error']:.0%}", got["within_10_percent"],
         got["rows"], *(number(v) for v in got["parameters"].values())]
        for name, got in published.leave_one_out().items()
    ]  # fmt: skip
    return _table(["system left out", "median error", "rows within 10%", "of", *published.ANCHORS],
                  lines)  # fmt: skip


def figures(model: Model, machine: Machine, work: Work, table: list[dict], p: Parameters):
    """(name, function that draws on an axis, width, height) of each figure."""
    cards = int(np.ravel(machine.drives.count)[0])
    known = sorted({r["cards"] for r in table})
    cards = cards if cards in known else known[-1]
    context = min({r["context"] for r in table}, key=lambda c: abs(c - work.context))
    batch = min({r["batch"] for r in table}, key=lambda b: abs(b - work.batch))
    drawn = [
        ("context", lambda a: plot_context(a, table, batch, cards), 7.2, 4.4),
        ("cards", lambda a: plot_cards(a, table, batch, context), 7.2, 4.4),
    ]
    if machine.has_cards:
        drawn += [
            ("ablation", lambda a: plot_ablation(a, model, machine, work), 7.2, 4.4),
            ("resources", lambda a: plot_resources(a, model, machine, work), 7.2, 4.4),
            ("roofline", lambda a: plot_roofline(a, machine, p), 7.2, 4.4),
        ]
    drawn.append(("reproduction", lambda a: plot_reproduction(a, published.reproduce(p)), 7.2, 5.2))
    return drawn


def write(
    model: Model,
    machine: Machine,
    work: Work,
    directory: Path,
    *,
    contexts=tuple(2**k for k in range(12, 21)),
    p: Parameters | None = None,
) -> list[Path]:
    """sweep.csv, report.html (nothing loaded from elsewhere) and report.png into `directory`."""
    p = p or parameters()
    pyplot = _style()
    directory.mkdir(parents=True, exist_ok=True)
    table = sweep(model, machine, contexts, output=int(work.output), p=p)
    write_csv(table, directory / "sweep.csv")
    parts = figures(model, machine, work, table, p)
    svgs = []
    for name, draw, width, height in parts:
        figure, axis = pyplot.subplots(figsize=(width, height), layout="constrained")
        draw(axis)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        svg = text.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-')
        svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
        svgs.append(f"<figure>{svg}</figure>")
    rows = -(-len(parts) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(17, 5.2 * rows), layout="constrained")
    for axis, (_, draw, _, _) in zip(axes.ravel(), parts, strict=False):
        draw(axis)
    for axis in axes.ravel()[len(parts) :]:
        axis.axis("off")
    figure.suptitle(f"nearkv plan: {model.name} on {machine.name}", fontsize=15, weight="bold")
    figure.savefig(directory / "report.png", dpi=80)
    pyplot.close(figure)

    systems = {"nearkv int8": optimise.optimise(model, machine, work, EIGHT_BIT, p=p),
               "nearkv": optimise.optimise(model, machine, work, p=p)}  # fmt: skip
    for name in reversed(policy.SYSTEMS):
        chosen = policy.system(name, model, machine, work)
        systems[name] = closed_form.estimate(model, machine, work, chosen, p=p)
    body = [
        _tiles(systems),
        "<h2>This work on this machine</h2>",
        _compared(systems, machine),
        "<p>End to end counts the prefill. instinfer-sparf reads half of the pages and is not exact.</p>",
        "<h2>Where nearkv serves the context</h2>",
        *(f"<p>{name}: K and V in {e.policy.kv_type}, pages of {e.policy.page_tokens} tokens</p>"
          f"{_shares(e)}" for name, e in systems.items() if name.startswith("nearkv")),
    ]  # fmt: skip
    body.append('<h2>Figures</h2><div class="grid">' + "".join(svgs) + "</div>")
    if machine.has_cards:
        better = [
            [g["model"], _tokens(g["context"]), g["best"], g["others"][g["best"]], g["fp16"],
             f"{g['fp16'] / g['others'][g['best']]:.2f}x", g["int8"],
             f"{g['int8'] / g['others'][g['best']]:.2f}x", g["fp16 plan"], g["int8 plan"]]
            for g in gains(machine)
        ]  # fmt: skip
        body += [
            "<h2>How much the planned tiers gain</h2><p>Against the best exact published policy on "
            f"{machine.name}, batch 16. int8 permits 1% error in an element of K or V. The plan is what the "
            "hardware permits: beyond cards and the host's tail it assumes paths that the runtime has "
            "to have (X on the GPU, K and V in host memory, int8 pages).</p>",
            _table(["model", "context", "best other", "tokens/s", "nearkv fp16", "gain",
                    "nearkv int8", "gain", "fp16 plan", "int8 plan"], better),
        ]  # fmt: skip
        points = [
            (name, batch, context, q)
            for name, batch, context in SCALED
            for q in scale.scale(load_model(name), machine, Work(batch=batch, context=context),
                                 drives=(int(np.ravel(machine.drives.count)[0]),))
        ]  # fmt: skip
        grown = [
            [f"{name}, {_tokens(context)}, batch {batch:,}", q.hosts, q.mode, q.tokens_per_s,
             scale.simulate(q, load_model(name).n_layers), f"{q.efficiency:.0%}", q.bottleneck]
            for name, batch, context, q in points
        ]  # fmt: skip
        reasons = dict.fromkeys(q.bottleneck for *_, q in points)
        body += ["<h2>Scale-out</h2><p>Hosts of this machine with all its drives; the way of spreading "
                 "that is fastest. Simulated: event by event, two micro-batches in flight at a host. "
                 "Efficiency above 100% comes from host memory, which grows with the hosts and takes over "
                 "from flash.</p>",
                 _table(["work", "hosts", "spread by", "tokens/s", "simulated", "efficiency",
                         "what ends it"], grown),
                 "<p>", "<br>".join(f"<b>{name}</b>: {scale.WHY[name]}" for name in reasons),
                 "</p>"]  # fmt: skip
    verdicts = published.reproduce(p)
    body += ["<h2>Published results, predicted</h2>", f"<p>{html.escape(summary(verdicts))}</p>",
             reproduction_table(verdicts),
             "<h3>With the parameters fitted to the other systems alone</h3>", _left_out(),
             "<p>Chosen, where no source settles it:</p><ul>",
             *(f"<li>{html.escape(text)}</li>" for text in published.choices()), "</ul>"]  # fmt: skip
    constants = [[k, number(p.values[k]), e["kind"], e["source"]]
                 for k, e in p.entries.items()]  # fmt: skip
    body += ["<h2>Parameters</h2>", _table(["name", "value", "kind", "source"], constants)]
    lead = (f"{model.name} on {machine.name} ({machine.source}). Batch {work.batch}, context "
            f"{_tokens(work.context)}, output {work.output} tokens. All figures are predictions of "
            "the system model, none is a measurement.")  # fmt: skip
    page = PAGE.format(
        title=f"nearkv plan: {model.name} on {machine.name}",
        lead=html.escape(lead),
        body="".join(body),
    )
    (directory / "report.html").write_text(page)
    return [directory / name for name in ("sweep.csv", "report.html", "report.png")]


def reproduction_table(verdicts) -> str:
    lines, classes = [], []
    for v in verdicts:
        row = v.row
        note = "; ".join(t for t in (v.at, "" if v.hit else row.get("why", "")) if t)
        error = "" if v.error is None else f"{v.error:+.1%}"
        got = "" if v.low is None else number(v.high if v.low == v.high else (v.low, v.high))
        span = number(v.span) if v.span else ""
        lines.append(
            [f"{row.id}: {row.claim}", row.grade, number(row.published), got, error, span, note]
        )
        circular = row.get("circular", False)
        classes.append("circular" if circular else "" if v.error is None else
                       "hit" if v.hit else "miss")  # fmt: skip
    return _table(["claim", "grade", "published", "predicted", "error", "8K-128K", "note"],
                  lines, classes)  # fmt: skip


def summary(verdicts) -> str:
    """How many rows are predicted how well, in one sentence."""
    counted = [v for v in verdicts if v.counts]
    heads = [v for v in verdicts if v.row.get("headline")]
    good, hits = [v for v in heads if v.counts and v.hit], [v for v in counted if v.hit]
    return (
        f"{len(hits)} of {len(counted)} rows that count are within 10% (median error "
        f"{np.median([abs(v.error) for v in counted]):.1%}); of the {len(heads)} headline rows "
        f"{len(good)} are, {sum(not v.counts for v in heads)} is circular. "
        f"{sum(v.error is None for v in verdicts)} rows are outside the model."
    )
