# SPDX-License-Identifier: Apache-2.0
"""The closed form: how long each resource is busy in a decode step, and what follows from it.

    step = max over resources of busy seconds + what nothing can hide

The maximum holds when layers of one part of the batch compute while those of another load (FlexGen's
block schedule, which all systems here build on); `events` shows where it does not. Every load is linear
in the shares of the context and of the weights, so `optimise` gets its linear programme by evaluating
`loads` at the corners. All arithmetic is on numpy arrays: a sweep is one call.
"""

from dataclasses import dataclass

import numpy as np

from . import traffic
from .describe import Drives, Machine, Model, Number, Parameters, Work, parameters
from .policy import TIERS, Policy, lacks, weight_shares

RESOURCES = {
    "drive": "flash reads and writes",
    "path": "flash through page cache and copy",
    "p2p": "flash into card memory",
    "engine": "attention on the cards",
    "card": "cards: load, then compute",
    "uplink": "link shared by the drives",
    "gpu link": "host to GPU link",
    "gpu": "GPU arithmetic",
    "hbm": "GPU memory",
    "cpu": "the host's CPUs",
    "compute": "CPUs, then GPU",
    "link first": "host to GPU link, before the rest",
    "dram": "host memory",
}
DENSE = ("gpu link", "gpu", "hbm")  # busy with the layers outside attention


@dataclass(frozen=True)
class Loads:
    """Busy seconds of each resource, seconds that nothing hides, bytes on each link; one step."""

    busy: dict[str, Number]
    serial: dict[str, Number]
    bytes: dict[str, Number]

    @property
    def step_seconds(self) -> Number:
        return maximum(self.busy.values()) + sum(self.serial.values())


def maximum(values) -> Number:
    values = list(values)
    result = values[0]
    for value in values[1:]:
        result = np.maximum(result, value)
    return result


def drive_bytes_per_s(drives: Drives, request_bytes: Number, in_flight: Number) -> Number:
    """Rate of one drive by Little's law: requests in flight over the time that one takes alone."""
    if drives.request_bytes:
        sizes = np.log2(drives.request_bytes)
        alone = request_bytes / np.interp(np.log2(request_bytes), sizes, drives.request_bytes_per_s)
    else:
        alone = drives.latency_seconds + request_bytes / drives.read_bytes_per_s
    return np.minimum(drives.read_bytes_per_s, in_flight * request_bytes / alone)


def path_seconds_per_byte(machine: Machine, p: Parameters) -> Number:
    """FlexGen's disk path: a read-ahead window at a time is read, then copied.

    The window is the kernel's 128 KiB for a plain drive and twice a stripe for a RAID-0.
    """
    drives = machine.drives
    raw = np.minimum(machine.flash_read_bytes_per_s if drives.raid else drives.read_bytes_per_s,
                     drives.uplink_bytes_per_s)  # fmt: skip
    window = np.where(drives.raid, 2 * drives.count * p.raid_chunk_bytes, p.flexgen_readahead_bytes)
    return 1 / raw + p.nvme_latency_seconds / window + 1 / p.flexgen_copy_bytes_per_s


@dataclass(frozen=True)
class _Job:
    """What the host hands to a card for a KV head of a sequence and layer, and takes back.

    `tail_bytes` : K of tokens that wait in host memory, whose scores the CPUs compute for the card
    `records` : transfers, each of which costs the host time
    `passes` : times the card goes through its K and V
    """

    bytes: Number
    tail_bytes: Number
    records: Number
    passes: int


def _job(model: Model, policy: Policy, context: Number) -> _Job:
    group, row = model.group_size, 2 * model.head_dim
    if policy.abi_jobs:
        down, up, _ = traffic.job_bytes(
            model.head_dim, group, policy.page_tokens, context, policy.rows
        )
        return _Job(down + up, 0.0, 1, -(-group // policy.rows))
    # q, k, v down and out up, in fp16; with each waiting token its V and the scores of its K.
    waiting = np.asarray(policy.writeback_steps) / 2 * policy.resend_tail
    moved = row * (2 * group + 2) + waiting * (row + 2 * group)
    return _Job(moved, waiting * row, 1 + waiting, 1)


def loads(
    model: Model,
    machine: Machine,
    work: Work,
    policy: Policy,
    shares: dict[str, Number],
    weights: dict[str, Number],
    p: Parameters | None = None,
) -> Loads:
    """Loads of the mean decode step.

    Parameters
    ----------
    shares : dict
        Tier -> share of the context (see `policy.TIERS`).
    weights : dict
        "gpu", "dram", "flash" -> share of the weights that lie there.

    Returns
    -------
    Loads
        Linear in `shares` and `weights`, except that per-job costs scale with the cards' shares.
    """
    p = p or parameters()
    share = {tier: np.asarray(shares.get(tier, 0.0), float) for tier in TIERS}
    batch, context = np.asarray(work.batch, float), work.mean_context
    heads = batch * model.n_layers * model.n_kv_heads
    kv = batch * context * model.kv_bytes(policy.kv_type)
    rho = model.x_bytes(policy.kv_type) / model.kv_bytes(policy.kv_type)
    gpu, host, drives, cards = machine.gpu, machine.host, machine.drives, machine.cards

    active = model.active_weight_bytes(batch)
    streamed = active * policy.weight_passes
    w_dram, w_flash = streamed * weights["dram"], streamed * weights["flash"]
    card_read = kv * share["card"] * policy.read_share
    x_read, kv_read = kv * rho * share["flash_x"], kv * share["flash_kv"]
    host_read = kv * share["flash_cpu"] * policy.read_share
    flash_read = card_read + x_read + kv_read + host_read + w_flash
    on_flash = share["card"] + share["flash_kv"] + share["flash_cpu"] + rho * share["flash_x"]
    token = batch * model.kv_bytes(policy.kv_type)
    flash_write = token * on_flash * policy.write_copies
    on_card = share["card"] + share["card_dram"]

    job = _job(model, policy, context)
    on_cards = heads * on_card
    records = on_cards * job.bytes
    tail = on_cards * job.tail_bytes / host.attention_bytes_per_s

    flash_rate, n_cards = machine.flash_read_bytes_per_s, np.maximum(cards.count, 1e-9)
    beside = drives.count / n_cards  # drives that a card reads
    ingest = beside * drive_bytes_per_s(drives, policy.p2p_request_bytes, p.p2p_reads_in_flight)
    ingest = np.minimum(ingest, cards.ingest_bytes_per_s)
    p2p = card_read / np.maximum(np.minimum(flash_rate, n_cards * ingest), 1.0)
    attended = (card_read + kv * share["card_dram"]) * job.passes
    engine = attended / np.maximum(n_cards * cards.engine_bytes_per_s, 1.0)

    drive = flash_read / flash_rate + flash_write / machine.flash_write_bytes_per_s
    n_writes = 2 * heads * share["card"] / policy.writeback_steps * policy.sync_writes
    blocked = n_writes * p.small_write_seconds / drives.count
    uplink = x_read + kv_read + host_read + w_flash + flash_write + records
    if cards.behind_uplink:
        uplink = uplink + card_read
    from_dram = kv * (share["dram_kv"] + rho * share["dram_x"])
    link = x_read + kv_read + w_flash + w_dram + from_dram if machine.has_gpu else 0.0 * kv
    x_share = share["flash_x"] + share["dram_x"]
    x_flops = min(model.reproject_flops(), model.absorb_flops()) if policy.absorb else (
        model.reproject_flops())  # fmt: skip
    kv_share = share["flash_kv"] + share["dram_kv"] + share["gpu"]
    flops = batch * model.token_flops + batch * context * (
        x_share * x_flops + (x_share + kv_share) * model.attention_flops()
    )
    hbm = active + kv * (kv_share + x_share * (2 if not policy.absorb else 2 * rho))
    cpu_read = kv * share["dram_cpu"]
    dram = cpu_read + from_dram + w_dram + 2 * host_read
    # CPUs unpack to fp16 first: their rate is one of elements, whatever the type.
    as_fp16 = model.kv_bytes("fp16") / model.kv_bytes(policy.kv_type)
    twin = np.maximum(host.attention_bytes_per_s, host.twin_bytes_per_s * policy.abi_jobs)
    on_cpu = cpu_read * as_fp16 / host.attention_bytes_per_s + host_read * as_fp16 / twin + tail
    dense = flops / np.maximum(machine.dense_flops * p.gemm_efficiency, 1.0)
    busy = {"drive": drive + blocked, "uplink": uplink / drives.uplink_bytes_per_s}
    if machine.has_gpu:
        busy["gpu link"] = link / gpu.link_bytes_per_s
        busy["gpu"] = dense
        busy["hbm"] = hbm / gpu.memory_bytes_per_s
    else:
        on_cpu = on_cpu + dense
    busy["cpu"] = on_cpu
    if policy.buffered:
        staged = kv_read + host_read + x_read + w_flash
        busy["path"] = staged * path_seconds_per_byte(machine, p)
        dram = dram + 2 * staged  # through the copy: read and written once more
    busy["dram"] = dram / host.memory_bytes_per_s
    if policy.serial_card:
        busy["card"] = p2p + engine + blocked
        if policy.x_after_cards and machine.has_gpu:
            x_work = batch * context * share["dram_x"] * x_flops
            busy["card"] = busy["card"] + kv * rho * share["dram_x"] / gpu.link_bytes_per_s
            busy["card"] = busy["card"] + x_work / (gpu.flops * p.gemm_efficiency)
    else:
        busy["p2p"], busy["engine"] = p2p, engine
    layer_seconds = p.layer_seconds if host.layer_seconds is None else host.layer_seconds
    serial = {
        "layers": model.n_layers * layer_seconds + 0 * batch,
        "jobs": on_cards * job.records * p.job_seconds,
    }
    if policy.in_turn and machine.has_gpu:
        serial["link first"] = busy.pop("gpu link")
        busy["compute"] = busy["cpu"] + busy["gpu"]
    moved = {
        "flash read": flash_read,
        "flash write": flash_write,
        "uplink": uplink,
        "gpu link": link,
        "weights": w_dram + w_flash,
        "card memory": card_read + attended,
        "host memory": dram,
    }
    return Loads(busy, serial, moved)


def pipeline_seconds(dense: Number, attention: Number, micro_batches: Number, n_layers: int):
    """A step whose layers alternate between a dense stage and attention, in seconds.

    A micro-batch needs its own attention before its next dense stage, so one alone overlaps nothing
    and two overlap everything only if the stages are equal. `dense`, `attention`: seconds of the
    whole step. `events.simulate_layers` is the same pipeline, event by event.
    """
    fill = np.minimum(dense, attention) / (micro_batches * n_layers)
    steady = np.maximum(np.maximum(dense, attention), (dense + attention) / micro_batches)
    return np.where(np.asarray(micro_batches) > 1, steady + fill, dense + attention)


@dataclass(frozen=True)
class Estimate:
    """What a policy does with a piece of work on a machine. Seconds, bytes, joules, USD, years."""

    policy: Policy
    shares: dict[str, Number]
    weights: dict[str, Number]
    loads: Loads
    batch: Number
    feasible: Number
    step_seconds: Number
    prefill_seconds: Number
    tokens_per_s: Number
    end_to_end_tokens_per_s: Number
    watts: Number
    joules_per_token: Number
    usd_per_million_tokens: Number
    drive_years: Number
    flash_bytes_per_request: Number

    @property
    def bottleneck(self) -> str:
        """What is busy longest, all that come within 1% of it; of the first point of many."""
        times = {**self.loads.busy, **self.loads.serial}
        first = {name: float(np.ravel(seconds)[0]) for name, seconds in times.items()}
        longest = max(first.values())
        return ", ".join(name for name, seconds in first.items() if seconds >= 0.99 * longest)


def power(machine: Machine, busy: dict[str, Number], step: Number, buffered: bool) -> Number:
    """Mean watts of the machine: idle power, and the rest in proportion to the time at work."""

    def used(*names) -> Number:
        return np.minimum(1.0, maximum([0.0, *(busy[n] for n in names if n in busy)]) / step)

    gpu, host, drives, cards = machine.gpu, machine.host, machine.drives, machine.cards
    # A thread that waits for a page fault still burns its core: the buffered path keeps CPUs busy.
    cpu = used("cpu", "path") if buffered else used("cpu")
    return (
        host.other_watts
        + machine.chassis_watts
        + host.cpu_idle_watts
        + cpu * (host.cpu_watts - host.cpu_idle_watts)
        + gpu.count * (gpu.idle_watts + used("gpu", "hbm") * (gpu.watts - gpu.idle_watts))
        + drives.count * (drives.idle_watts + used("drive") * (drives.watts - drives.idle_watts))
        + cards.count
        * (cards.idle_watts + used("card", "engine", "p2p") * (cards.watts - cards.idle_watts))
    )


def prefill_seconds(
    model: Model, machine: Machine, batch: Number, work: Work, on_flash: Number, policy: Policy,
    p: Parameters,
) -> Number:  # fmt: skip
    """Layers and causal attention on the GPU (or CPUs), K and V to flash; the longer of the two."""
    context = np.asarray(work.context, float)
    flops = batch * context * (model.token_flops + model.attention_flops() * context / 2)
    stored = batch * context * model.kv_bytes(policy.kv_type) * on_flash * policy.write_copies
    rate = np.minimum(machine.flash_write_bytes_per_s, machine.drives.uplink_bytes_per_s)
    return np.maximum(flops / (machine.dense_flops * p.gemm_efficiency), stored / rate)


def estimate(
    model: Model,
    machine: Machine,
    work: Work,
    policy: Policy,
    *,
    weights: dict[str, Number] | None = None,
    p: Parameters | None = None,
) -> Estimate:
    """Evaluate a policy whose shares are known; any number may be an array.

    Raises
    ------
    ValueError
        If the policy has no shares (use `optimise.optimise`).
    """
    p = p or parameters()
    if policy.shares is None:
        raise ValueError("the policy leaves its shares open; call optimise.optimise")
    if weights is None:
        weights = weight_shares(model, machine, policy.big_weights_on_flash, p.working_share)
    shares = policy.shares
    rho = model.x_bytes(policy.kv_type) / model.kv_bytes(policy.kv_type)
    length = np.asarray(work.context, float) + work.output
    token = model.kv_bytes(policy.kv_type)
    in_dram = shares.get("dram_kv", 0.0) + rho * shares.get("dram_x", 0.0)
    in_dram = in_dram + shares.get("dram_cpu", 0.0)
    room = machine.host.memory_bytes - weights["dram"] * model.weight_bytes
    batch = np.asarray(work.batch, float)
    if policy.shrink_batch:
        batch = np.minimum(batch, np.floor(room / (length * token)))
    on_flash = sum(shares.get(t, 0.0) for t in ("card", "flash_kv", "flash_cpu"))
    on_flash = on_flash + rho * shares.get("flash_x", 0.0)
    stored = batch * length * token * on_flash * policy.write_copies
    capacity = machine.drives.count * machine.drives.capacity_bytes
    feasible = (
        (batch >= 1)
        & (stored + weights["flash"] * model.weight_bytes <= capacity * (1 + 1e-6))
        & (batch * length * token * in_dram <= room + 1e-6 * machine.host.memory_bytes)
    )
    feasible = feasible & (not lacks(policy, machine))
    safe = Work(batch=np.maximum(batch, 1), context=work.context, output=work.output)
    result = loads(model, machine, safe, policy, shares, weights, p)
    step = result.step_seconds
    rate = np.where(feasible, safe.batch / step, np.nan)
    prefill = prefill_seconds(model, machine, safe.batch, work, on_flash, policy, p)
    total = prefill + step * np.asarray(work.output, float)
    watts = power(machine, result.busy, step, policy.buffered)
    joules = watts / rate
    end_to_end = rate * step * np.asarray(work.output, float) / total
    usd_per_s = machine.usd / (p.lifetime_years * 365.25 * 86400)
    usd_per_s = usd_per_s + watts / 3.6e6 * p.energy_usd_per_kwh
    per_request = length * token * on_flash * policy.write_copies
    per_s = per_request * safe.batch / total
    endurance = machine.drives.count * machine.drives.write_endurance_bytes
    years = np.where(per_s > 0, endurance / np.maximum(per_s, 1e-9), np.inf) / (365.25 * 86400)
    return Estimate(
        policy=policy,
        shares=shares,
        weights=weights,
        loads=result,
        batch=batch,
        feasible=feasible,
        step_seconds=step,
        prefill_seconds=prefill,
        tokens_per_s=rate,
        end_to_end_tokens_per_s=end_to_end,
        watts=watts,
        joules_per_token=joules,
        usd_per_million_tokens=usd_per_s / np.where(end_to_end > 0, end_to_end, np.nan) * 1e6,
        drive_years=years,
        flash_bytes_per_request=per_request,
    )
