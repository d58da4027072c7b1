# SPDX-License-Identifier: Apache-2.0
"""The decode step event by event, for what a maximum over resources cannot see.

The closed form lets every resource run for the whole step. In truth a layer waits for the one before
it, a card for its page slots, and the merge for the slowest card. This simulation has those waits:

    dense stage of (layer, micro-batch) -> q to the cards -> every card attends to its jobs \
      (QKV, shares on the GPU,          -> q to the CPUs  -> tail and their share             -> merge
       weights over its link)                                                                 -> spill
    each card: flash reads run ahead of q as far as its ring of page slots reaches, and yield to spills

It agrees with the closed form where that is right (tests), and shows the difference for few
micro-batches, short rings, ragged contexts, and fewer jobs than cards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import heapq

import numpy as np
import simpy

from . import closed_form
from .describe import Machine, Model


@dataclass(frozen=True)
class Trace:
    """What a simulated step took, seconds; `card_busy` and `flash_busy` per card."""

    seconds: float
    dense_busy: float
    flash_busy: tuple[float, ...]
    card_busy: tuple[float, ...]


def card_seconds(n_pages: int, load: float, compute: float, slots: int) -> float:
    """One card streaming pages through a ring of slots; seconds from the first read to the last sum.

    A slot is taken while a page loads and computes. One slot: load, then compute. Two or more: both
    at once, `load + compute + (n - 1) * max(load, compute)`.
    """
    env = simpy.Environment()
    ring = simpy.Container(env, capacity=slots, init=slots)
    ready = simpy.Store(env)

    def read():
        for _ in range(n_pages):
            yield ring.get(1)
            yield env.timeout(load)
            yield ready.put(None)

    def attend():
        for _ in range(n_pages):
            yield ready.get()
            yield env.timeout(compute)
            yield ring.put(1)

    env.process(read())
    env.run(env.process(attend()))
    return env.now


def deal(job_bytes: np.ndarray, n_cards: int) -> list[float]:
    """Bytes each card gets when jobs are dealt to the least loaded card, longest job first."""
    load = [(0.0, card) for card in range(n_cards)]
    heapq.heapify(load)
    total = [0.0] * n_cards
    for size in sorted(map(float, job_bytes), reverse=True):
        have, card = heapq.heappop(load)
        total[card] = have + size
        heapq.heappush(load, (total[card], card))
    return total


def simulate(
    n_layers: int,
    micro_batches: int,
    dense: float,
    bytes_per_card: list[list[float]],
    load_bytes_per_s: float,
    engine_bytes_per_s: float,
    *,
    ring_bytes: float,
    extent_bytes: float,
    serial_card: bool = False,
    merge: float = 0.0,
    cpu: float = 0.0,
    spill: float = 0.0,
) -> Trace:
    """One decode step.

    Parameters
    ----------
    n_layers, micro_batches : int
    dense : float
        Seconds of the dense stage per layer and micro-batch.
    bytes_per_card : list of lists
        K and V bytes per micro-batch and card, for one layer.
    load_bytes_per_s, engine_bytes_per_s : float
        Of one card: flash to slots, slots through the engine.
    ring_bytes, extent_bytes : float
        Card memory for pages; what one read brings.
    serial_card : bool
        A card waits for q, loads all its extents, and computes each when loaded (HILOS, INF2).
    merge : float
        Seconds on the host from the last partial to the next dense stage.
    cpu : float
        Seconds of the CPUs per layer and micro-batch: tail and share, while the cards attend.
    spill : float
        Seconds that every card's drive writes per layer and micro-batch, behind the merge.
    """
    env = simpy.Environment()
    gpu, cpus = simpy.Resource(env), simpy.Resource(env)
    n_cards = len(bytes_per_card[0])
    queries = [[env.event() for _ in range(micro_batches)] for _ in range(n_layers)]
    left = [[n_cards] * micro_batches for _ in range(n_layers)]
    merged = [[env.event() for _ in range(micro_batches)] for _ in range(n_layers)]
    slots = 1 if serial_card else max(1, int(ring_bytes // extent_bytes))
    drives = [simpy.Resource(env) for _ in range(n_cards)]
    busy = {"dense": 0.0, "flash": [0.0] * n_cards, "card": [0.0] * n_cards}

    def extents(micro, card):
        size = bytes_per_card[micro][card]
        count = max(1, round(size / extent_bytes)) if size else 0
        return count, size / count if count else 0.0

    def hold(resource, seconds):
        with resource.request() as turn:
            yield turn
            yield env.timeout(seconds)

    def layers(micro):
        for layer in range(n_layers):
            yield from hold(gpu, dense)
            busy["dense"] += dense
            queries[layer][micro].succeed()
            if cpu:
                yield from hold(cpus, cpu)
            yield merged[layer][micro]
            if merge:
                yield env.timeout(merge)
            if spill:
                for drive in drives:
                    env.process(hold(drive, spill))

    def read(card, ring, ready):
        for layer in range(n_layers):
            for micro in range(micro_batches):
                count, size = extents(micro, card)
                if serial_card and count:
                    yield queries[layer][micro]
                for _ in range(count):
                    yield ring.get(1)
                    yield from hold(drives[card], size / load_bytes_per_s)
                    busy["flash"][card] += size / load_bytes_per_s
                    yield ready.put(None)

    def attend(card, ring, ready):
        for layer in range(n_layers):
            for micro in range(micro_batches):
                yield queries[layer][micro]
                count, size = extents(micro, card)
                for _ in range(count):
                    yield ready.get()
                    yield env.timeout(size / engine_bytes_per_s)
                    busy["card"][card] += size / engine_bytes_per_s
                    yield ring.put(1)
                left[layer][micro] -= 1
                if not left[layer][micro]:
                    merged[layer][micro].succeed()

    for card in range(n_cards):
        ring, ready = simpy.Container(env, capacity=slots, init=slots), simpy.Store(env)
        env.process(read(card, ring, ready))
        env.process(attend(card, ring, ready))
    done = env.all_of([env.process(layers(micro)) for micro in range(micro_batches)])
    env.run(done)
    return Trace(env.now, busy["dense"], tuple(busy["flash"]), tuple(busy["card"]))


def simulate_layers(dense: float, attention: float, micro_batches: int, n_layers: int) -> float:
    """Two stages in turn, for `closed_form.pipeline_seconds`: seconds of the step.

    dense, attention : float
        Seconds of the whole step in each stage.
    """
    parts = n_layers * micro_batches
    return simulate(
        n_layers, micro_batches, dense / parts, [[attention / parts]] * micro_batches,
        1e30, 1.0, ring_bytes=1e30, extent_bytes=1e30,
    ).seconds  # fmt: skip


def simulate_plan(
    model: Model,
    machine: Machine,
    contexts: np.ndarray,
    estimate: closed_form.Estimate,
    *,
    micro_batches: int = 2,
    extent_bytes: float = 4 << 20,
    most_extents: int = 32,
) -> Trace:
    """A step of a planned policy for sequences of given (ragged) contexts.

    The GPU's and the CPUs' shares are those of the estimate. Sequences are put into micro-batches in turn; their heads are dealt to cards as `deal` does. To
    bound the number of events, a card reads at most `most_extents` extents a layer and micro-batch.
    """
    share = float(np.ravel(estimate.shares["card"])[0]) * estimate.policy.read_share
    head = model.kv_bytes(estimate.policy.kv_type) / model.n_layers / model.n_kv_heads
    n_cards = int(machine.cards.count)
    order = np.argsort(-np.asarray(contexts))
    parts = [np.asarray(contexts)[order[m::micro_batches]] for m in range(micro_batches)]
    dealt = [deal(np.repeat(c * head * share, model.n_kv_heads), n_cards) for c in parts]
    largest = max(map(max, dealt))
    busy = {k: float(np.ravel(v)[0]) for k, v in estimate.loads.busy.items()}
    dense = max((busy[k] for k in closed_form.DENSE if k in busy), default=0.0)
    flash = float(machine.flash_read_bytes_per_s) / n_cards
    layer = float(np.ravel(estimate.loads.serial["layers"])[0]) / model.n_layers
    written = float(np.ravel(estimate.loads.bytes["flash write"])[0])
    written /= float(machine.flash_write_bytes_per_s)
    return simulate(
        model.n_layers,
        micro_batches,
        dense / model.n_layers / micro_batches,
        dealt,
        min(flash, float(machine.cards.ingest_bytes_per_s)),
        float(machine.cards.engine_bytes_per_s),
        ring_bytes=float(machine.cards.memory_bytes) / 2,
        extent_bytes=max(extent_bytes, largest / most_extents),
        serial_card=estimate.policy.serial_card,
        merge=layer / micro_batches,
        cpu=busy["cpu"] / model.n_layers / micro_batches,
        spill=written / model.n_layers / micro_batches,
    )


def simulate_cluster(
    mode: str,
    hosts: int,
    n_layers: int,
    micro_batches: int,
    *,
    dense: float,
    attention: float,
    host: float,
    network: float,
    load: Sequence[float] = (),
    steps: int = 3,
) -> float:
    """Seconds of a decode step of a cluster: the mean of some steps between a first and a last one.

    A host has a GPU, a store (its flash, cards and CPUs), a thread that drives them and a network
    port; a layer of a micro-batch takes them in turn, and each serves one micro-batch at a time, the
    oldest first. (In turns by layer, all would move from host to host in one convoy.)

    Parameters
    ----------
    mode : "data", "pipeline" or "context"
        As in `scale`. "data": each host has `micro_batches` of its own. "context": every host works at
        every layer of every micro-batch, and the next layer waits for the slowest.
    n_layers : int
        Of the model.
    micro_batches : int
        In flight.
    dense, attention, host : float
        Seconds of GPU, store and thread, per layer and micro-batch of one host.
    network : float
        Seconds of a port: per hop to the next host in a pipeline, per layer otherwise.
    load : sequence of float
        Of each host, relative to the mean: how uneven their spans or sequences are.
    """
    env = simpy.Environment()
    meet = mode == "context" and hosts > 1
    if not load and mode != "pipeline":
        hosts = 1  # all do the same at the same time
    load = load or [1.0] * hosts
    parts = [[simpy.PriorityResource(env) for _ in range(4)] for _ in range(hosts)]
    ends = [0.0] * (steps + 2)

    def hold(resource, age, seconds):
        with resource.request(priority=age) as turn:
            yield turn
            yield env.timeout(seconds)

    def layer_on(at, age, hops):
        gpu, store, thread, port = parts[at]
        yield from hold(gpu, age, dense)
        yield from hold(store, age, attention * load[at])
        yield from hold(thread, age, host)
        if hops and network:
            yield from hold(port, age, network)

    def owner(layer):
        return layer * hosts // n_layers

    def walk(micro, layer_of):
        for step in range(steps + 2):
            for layer in range(n_layers):
                yield from layer_of(layer, step * micro_batches + micro)
            ends[step] = max(ends[step], env.now)

    def piped(layer, age):
        last = owner(layer) != owner((layer + 1) % n_layers)
        yield from layer_on(owner(layer), age, last)

    def together(layer, age):
        yield env.all_of([env.process(layer_on(at, age, meet)) for at in range(hosts)])

    for micro in range(micro_batches):
        if mode == "data":
            for at in range(hosts):
                env.process(walk(micro, lambda layer, age, at=at: layer_on(at, age, False)))
        else:
            env.process(walk(micro, piped if mode == "pipeline" else together))
    env.run()
    return (ends[-2] - ends[0]) / steps
