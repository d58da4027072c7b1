# SPDX-License-Identifier: Apache-2.0
"""Many hosts: how far one workload spreads, and what ends it.

Three ways to spread, all exact, since partials merge in any order:

    data      each host has all weights and its share of the sequences
    pipeline  each host has a run of layers; as many micro-batches as hosts are in flight
    context   each host has a span of every sequence; hosts exchange q and partials each layer

`spread` has the closed form; `simulate` has the same cluster event by event, with the bubbles of its
pipeline and the waits for its slowest host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import events, optimise
from .describe import Machine, Model, Number, Parameters, Work, parameters

MODES = ("data", "pipeline", "context")


@dataclass(frozen=True)
class Network:
    """Between hosts: bytes per second of one host's port, seconds for one exchange."""

    bytes_per_s: float = 25e9  # 200 Gb/s
    exchange_seconds: float = 20e-6


@dataclass(frozen=True)
class Point:
    """One size of the cluster.

    drives : of each host, with their cards if it has any
    efficiency : tokens/s per host over that of one host
    parts : seconds of one host's step by what takes them, and the batch it takes at a time, for
        `simulate`
    """

    hosts: int
    drives: int
    mode: str
    tokens_per_s: float
    step_seconds: float
    efficiency: float
    bottleneck: str
    why: str
    parts: dict[str, float]


WHY = {
    "layers": "the host's work per layer does not shrink with its share of the context",
    "weights": "weights stream over each host's GPU link, however small its share of the context",
    "network": "partials cross the network at every layer",
    "uplink": "the drives' shared link is full: more hosts help, more cards do not",
    "flash": "flash and what feeds beside it are full: more cards and more hosts both help",
    "memory": "memories and links of the host are full, flash is not: more hosts help",
}


def _reason(estimate, step: float, layers: float, network: float, link_bytes_per_s: float):
    """Key of `WHY`: what alone takes 40% of the step; otherwise what is full."""
    streamed = float(np.ravel(estimate.loads.bytes["weights"])[0]) / link_bytes_per_s
    alone = {"layers": layers, "weights": streamed, "network": network}
    if (worst := max(alone, key=lambda name: alone[name])) and alone[worst] >= 0.4 * step:
        return worst
    busy = {k: float(np.ravel(v)[0]) for k, v in estimate.loads.busy.items()}
    full = {k for k, v in busy.items() if v >= 0.99 * max(busy.values())}
    if full & {"drive", "p2p", "engine"}:
        return "flash"
    return "uplink" if "uplink" in full else "memory"


def with_drives(machine: Machine, drives: Number) -> Machine:
    """The machine with another number of drives, and their cards; the uplink does not grow.

    Up to the machine's own number the uplink is at most what the drives deliver.
    """
    own = machine.drives.read_bytes_per_s * drives
    uplink = np.minimum(machine.drives.uplink_bytes_per_s, own)
    per_drive = machine.cards.count / machine.drives.count
    return machine.with_(
        drives={"count": drives, "uplink_bytes_per_s": uplink},
        cards={"count": drives * per_drive},
    )


def spread(
    model: Model,
    machine: Machine,
    work: Work,
    hosts: int,
    mode: str,
    network: Network | None = None,
    limits: optimise.Limits | None = None,
    p: Parameters | None = None,
) -> Point | None:
    """One cluster, planned with `optimise`; None if the work does not fit or cannot be spread so."""
    p, network, limits = p or parameters(), network or Network(), limits or optimise.Limits()
    batch, n_layers = int(work.batch), model.n_layers
    # Activations of one sequence between two layers, and what merging a layer takes: q, then partials.
    activation = 2 * model.hidden
    partial = 4 * model.n_q_heads * (model.head_dim + 2) + 2 * model.n_q_heads * model.head_dim
    passes = 1
    if mode == "data":
        if hosts > batch:
            return None
        here, work = model, replace(work, batch=-(-batch // hosts))
        traffic = 0.0
    elif mode == "pipeline":
        if hosts > min(n_layers, batch):
            return None
        here, passes = replace(model, n_layers=-(-n_layers // hosts)), hosts
        traffic = batch * activation / network.bytes_per_s + hosts * network.exchange_seconds
    else:
        here, work = model, replace(work, context=-(-int(work.context) // hosts))
        traffic = batch * n_layers * partial * (hosts - 1) / hosts / network.bytes_per_s
        traffic += 2 * n_layers * network.exchange_seconds
    if hosts == 1:
        traffic = 0.0
    one = replace(work, batch=np.array([work.batch]))
    estimate = optimise.optimise_many(here, machine, one, limits, p, weight_passes=passes)
    # Seconds until every sequence here has its next token, also if the plan takes them in waves.
    step = float(work.batch / estimate.tokens_per_s[0])
    if not np.isfinite(step):
        return None
    # Layers' host time is per micro-batch in a pipeline: every host walks its layers `hosts` times.
    waves = float(work.batch / np.ravel(estimate.batch)[0])
    layers = float(np.ravel(estimate.loads.serial["layers"])[0])
    step += layers * (passes - 1) * waves
    step = step + traffic if mode == "context" else max(step, traffic)
    feeds = machine.gpu.link_bytes_per_s if machine.has_gpu else machine.host.memory_bytes_per_s
    link = float(feeds) / waves
    bottleneck = _reason(estimate, step, layers * passes * waves, traffic, link)
    dense, attention = optimise.stages(estimate)
    parts = {"dense": dense, "attention": attention, "layers": layers * passes, "network": traffic,
             "jobs": float(np.ravel(estimate.loads.serial["jobs"])[0]), "waves": waves}  # fmt: skip
    return Point(
        hosts, int(machine.drives.count), mode, batch / step, step, 0.0, bottleneck,
        WHY[bottleneck], parts,
    )  # fmt: skip


def simulate(
    point: Point, n_layers: int, micro_batches: int = 2, load: Sequence[float] = ()
) -> float:
    """Tokens/s of a point, event by event.

    Parameters
    ----------
    n_layers : int
        Of the model.
    micro_batches : int
        In flight at each host.
    load : sequence of float
        As for `events.simulate_cluster`: how unevenly the hosts are loaded.
    """
    parts = point.parts
    piped = point.mode == "pipeline"
    flying = micro_batches * point.hosts if piped else micro_batches
    # A pipeline's host has a part of the layers, and its loads are those of all that pass through.
    share = -(-n_layers // point.hosts) * flying if piped else n_layers * flying
    network = parts["network"] / (flying if piped else n_layers * flying)
    seconds = events.simulate_cluster(
        point.mode,
        point.hosts,
        n_layers,
        flying,
        dense=parts["dense"] / share,
        attention=parts["attention"] / share,
        host=(parts["layers"] + parts["jobs"]) / share,
        network=network,
        load=load,
    )
    return point.tokens_per_s * point.step_seconds / (seconds * parts["waves"])


def scale(
    model: Model,
    machine: Machine,
    work: Work,
    hosts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    drives: tuple[int, ...] = (1, 4, 16),
    **options,
) -> list[Point]:
    """Every size with its best mode; efficiency is against the smallest size with as many drives."""
    found = []
    for count in drives:
        sized, first = with_drives(machine, count), None
        for n in hosts:
            points = [spread(model, sized, work, n, mode, **options) for mode in MODES]
            points = [point for point in points if point]
            if not points:
                continue
            best = max(points, key=lambda point: point.tokens_per_s)
            first = first or best
            gain = best.tokens_per_s / first.tokens_per_s * first.hosts / best.hosts
            found.append(replace(best, efficiency=gain))
    return found
