# SPDX-License-Identifier: Apache-2.0
"""nearkv's plan: which share of the context is served from where, at the shortest decode step.

A linear programme. Variables: the share of each tier, the share of the weights in GPU memory, host
memory and flash, and the step time. Rows: each resource is busy no longer than the step; each memory
holds what is put there; what waits for a page to fill stays in memory; the drives live long enough.
The coefficients come from `closed_form.loads` at the corners, so plan and prediction cannot differ.
Integers (type of K and V, page length, micro-batches) are few and are enumerated.

One programme is solved by scipy. A sweep has thousands of the same shape: `solve_many` pivots
all of them at a time.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from . import closed_form
from .describe import KV_FORMATS, Machine, Model, Parameters, Work, parameters
from .policy import ON_CARDS, ON_GPU, TIERS, Policy, nearkv

WEIGHTS = ("gpu", "dram", "flash")
IN_MEMORY = ("dram_x", "dram_kv", "dram_cpu", "gpu", "card_dram")
ON_FLASH = ("card", "flash_x", "flash_kv", "flash_cpu")
PAGE_TOKENS = (128, 64, 32)
CHUNK = 256  # programmes iterated together


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan has to keep to.

    max_error : relative rms error that the type of K and V may add (see `KvFormat.error`);
        0 permits fp16 and bf16 only, 0.01 also int8, 0.2 also int4
    min_drive_years : years that the drives have to last under this work, day and night
    sparse : permit reading only half the pages, chosen by a filter (no longer exact attention)
    types : types to choose from, instead of those within `max_error`
    """

    max_error: float = 0.0
    min_drive_years: float = 0.0
    sparse: bool = False
    types: tuple[str, ...] = ()

    @property
    def kv_types(self) -> list[str]:
        if unknown := set(self.types) - set(KV_FORMATS):
            raise ValueError(f"unknown types {sorted(unknown)}; there are {', '.join(KV_FORMATS)}")
        if self.types:
            return list(self.types)
        return [n for n, f in KV_FORMATS.items() if f.error <= self.max_error and n != "bf16"]


@dataclass(frozen=True)
class Programme:
    """minimise cost.x, subject to upper @ x <= bound and equal @ x == 1, x >= 0.

    Leading axes, if any, are those of the sweep. x: tiers, weights, step seconds.
    """

    cost: np.ndarray
    upper: np.ndarray
    bound: np.ndarray
    equal: np.ndarray


def programme(
    model: Model,
    machine: Machine,
    work: Work,
    policy: Policy,
    limits: Limits,
    p: Parameters | None = None,
    tiers: Collection[str] = tuple(TIERS),
) -> Programme:
    """The linear programme of a policy with open shares, over `tiers`; numbers may be arrays."""
    p = p or parameters()
    names = [*TIERS, *WEIGHTS]

    def at(share: str | None = None, weight: str | None = None):
        shares = {share: 1.0} if share else {}
        weights = {w: float(w == weight) for w in WEIGHTS}
        return closed_form.loads(model, machine, work, policy, shares, weights, p)

    base = at()
    corners = [at(share=tier) for tier in TIERS] + [at(weight=w) for w in WEIGHTS]
    rows, bounds = [], []

    def row(coefficients, step, bound):
        rows.append([*coefficients, step])
        bounds.append(bound)

    for resource, idle in base.busy.items():
        row([c.busy[resource] - idle for c in corners], -1.0, -idle)
    fixed = sum(base.serial.values())
    cost = [sum(c.serial.values()) - fixed for c in corners] + [1.0]

    batch = np.asarray(work.batch, float)
    length = np.asarray(work.context, float) + work.output
    token, x_token = model.kv_bytes(policy.kv_type), model.x_bytes(policy.kv_type)
    whole, rho, total = batch * length * token, x_token / token, model.weight_bytes
    size = {tier: whole * (rho if tier.endswith("_x") else 1.0) for tier in TIERS}

    def memory(tiers, weight, room):
        used = [size[n] / room if n in tiers else 0.0 for n in TIERS]
        held = [total / room if n == weight else 0.0 for n in WEIGHTS]
        row([*used, *held], 0.0, 1.0)

    gpu, drives, cards = machine.gpu, machine.drives, machine.cards
    memory(("gpu",), "gpu", np.maximum((1 - p.working_share) * gpu.memory_bytes, 1.0))
    memory(("dram_x", "dram_kv", "dram_cpu"), "dram", machine.host.memory_bytes)
    memory(ON_FLASH, "flash", drives.count * drives.capacity_bytes)
    memory(("card_dram",), None, np.maximum(cards.count * cards.memory_bytes / 2, 1.0))
    # A page is half full in the mean; its tokens are in memory, on whichever side.
    waiting = np.minimum(1.0, policy.page_tokens / 2 / work.mean_context)
    row([-1.0 * (n in IN_MEMORY) for n in TIERS] + [0.0] * 3, 0.0, -waiting)
    absent = set(TIERS) - set(tiers)
    absent |= set(() if machine.has_cards else ON_CARDS) | set(() if machine.has_gpu else ON_GPU)
    if absent:
        row([1.0 * (n in absent) for n in TIERS] + [0.0] * 3, 0.0, 0.0)
    if limits.min_drive_years:
        seconds = limits.min_drive_years * 365.25 * 86400
        rate = drives.count * drives.write_endurance_bytes / seconds
        compute = model.token_flops + model.attention_flops() * np.asarray(work.context) / 2
        prefill = batch * work.context * compute / (machine.dense_flops * p.gemm_efficiency)
        written = [size[n] / rate if n in ON_FLASH else 0.0 for n in TIERS]
        paid = [-work.output * c for c in cost[:-1]]
        used = [w + s for w, s in zip([*written, 0.0, 0.0, 0.0], paid, strict=True)]
        row(used, -work.output, prefill + work.output * fixed)
    shape = np.broadcast_shapes(*(np.shape(v) for r in rows for v in r), *map(np.shape, bounds))

    def pack(values):
        return np.stack([np.broadcast_to(v, shape) for v in values], axis=-1).astype(float)

    n = len(names) + 1
    equal = np.zeros((2, n))
    equal[0, : len(TIERS)], equal[1, len(TIERS) : -1] = 1.0, 1.0
    return Programme(pack(cost), np.stack([pack(r) for r in rows], axis=-2), pack(bounds), equal)


def _scaled(lp: Programme):
    """(cost, upper, bound, unit): time in units of the best single tier, so that all is near one.

    Coefficients above 10^5 units are cut off there: such a tier has no part in an optimum.
    """
    m, n = lp.upper.shape[-2:]
    upper, bound = lp.upper.reshape(-1, m, n).copy(), lp.bound.reshape(-1, m).copy()
    timed = upper[0, :, -1] == -1.0
    unit = np.maximum(upper[:, timed, : len(TIERS)].max(axis=1).min(axis=1), 1e-12)
    upper[:, timed, :-1] = np.minimum(upper[:, timed, :-1] / unit[:, None, None], 1e5)
    bound[:, timed] /= unit[:, None]
    # The row of drive life is in seconds as well, with `output` of them to a step.
    cost = lp.cost.reshape(-1, n).copy()
    cost[:, :-1] /= unit[:, None]
    other = np.flatnonzero(~timed & (upper[0, :, -1] != 0))
    upper[:, other, :-1] /= unit[:, None, None]
    bound[:, other] /= unit[:, None]
    return cost, upper, bound, unit


def solve(lp: Programme) -> np.ndarray | None:
    """x of one programme by scipy's HiGHS; None if nothing is feasible."""
    cost, upper, bound, unit = (v[0] for v in _scaled(lp))
    found = linprog(cost, upper, bound, lp.equal, np.ones(2), method="highs")
    if found.status:
        return None
    return np.append(found.x[:-1], found.x[-1] * unit)


def solve_many(lp: Programme, most_pivots: int = 200) -> np.ndarray:
    """x of many programmes, shape (..., n): the simplex method on all tableaus at once.

    The start is everything on flash, attended by the CPUs, and a step longer than that takes. Dantzig's
    rule; right-hand sides are perturbed by 1e-10 against cycling. NaN where nothing is feasible.
    """
    shape, (m, n) = lp.upper.shape[:-2], lp.upper.shape[-2:]
    if lp.upper.size > CHUNK * m * n:  # what is worked on stays in the cache
        cost, upper = lp.cost.reshape(-1, n), lp.upper.reshape(-1, m, n)
        bound = lp.bound.reshape(-1, m)
        parts = [slice(i, i + CHUNK) for i in range(0, len(cost), CHUNK)]
        found = [
            solve_many(Programme(cost[i], upper[i], bound[i], lp.equal), most_pivots) for i in parts
        ]
        return np.concatenate(found).reshape(*shape, n)
    cost, upper, bound, unit = _scaled(lp)
    points, start = len(upper), [list(TIERS).index("flash_cpu"), n - 2]
    timed = upper[0, :, -1] < 0
    # step = longest - slack: a variable that may start at zero.
    longest = 10 * (upper[:, timed][:, :, start].sum(2) - bound[:, timed]).max(axis=1) + 1
    bound = bound - upper[:, :, -1] * longest[:, None]
    upper[:, :, -1] *= -1
    norm = np.maximum(np.abs(upper).max(axis=2), 1e-12)
    width = n + m + m + 1  # variables, slacks, artificials, right-hand side
    t = np.zeros((points, m + 3, width))
    t[:, :m, :n], t[:, :m, -1] = (
        upper / norm[:, :, None],
        bound / norm + 1e-10 * np.arange(1, m + 1),
    )
    t[:, :m, n : n + m] = np.eye(m)
    t[:, m : m + 2, :n], t[:, m : m + 2, -1] = lp.equal, 1.0
    t[:, -1, :n], t[:, -1, n - 1] = cost, -cost[:, -1]
    for row, column in enumerate(start, m):
        t -= t[:, :, column, None] * t[:, row, None, :] * (np.arange(m + 3) != row)[:, None]
    negative = t[:, :m, -1] < 0
    t[:, :m] *= np.where(negative, -1.0, 1.0)[:, :, None]
    t[:, :m, n + m : -1] = np.eye(m) * negative[:, :, None]
    t[:, -1] -= 1e4 * (t[:, :m] * negative[:, :, None]).sum(axis=1)
    t[:, -1, n + m : -1] = 0.0
    basis = np.where(negative, n + m + np.arange(m), n + np.arange(m))
    basis = np.concatenate([basis, np.broadcast_to(start, (points, 2))], axis=1)

    left = np.arange(points)
    for _ in range(most_pivots):
        price = t[left, -1, : n + m]
        left = left[price.min(axis=1) < -1e-9]
        if not len(left):
            break
        work = t[left]
        entering = work[:, -1, : n + m].argmin(axis=1)
        column = np.take_along_axis(work, entering[:, None, None], axis=2)[:, :, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(column[:, :-1] > 1e-11, work[:, :-1, -1] / column[:, :-1], np.inf)
        leaving = ratio.argmin(axis=1)
        one = np.arange(len(left))
        pivot = work[one, leaving] / column[one, leaving, None]
        work -= column[:, :, None] * pivot[:, None, :]
        work[one, leaving] = pivot
        t[left], basis[left, leaving] = work, entering
    value = np.zeros((points, width - 1))
    np.put_along_axis(value, basis, t[:, :-1, -1], axis=1)
    result = value[:, :n]
    result[:, -1] = (longest - result[:, -1]) * unit
    result[(value[:, n + m :] > 1e-7).any(axis=1)] = np.nan
    result[left] = np.nan
    return result.reshape(*shape, n)


def _split(x: np.ndarray) -> tuple[dict, dict]:
    """Shares and weight shares out of x, cleaned of rounding and adding up to one."""
    x = np.where(x < 1e-7, 0.0, x)
    tiers, weights = x[..., : len(TIERS)], x[..., len(TIERS) : -1]
    tiers = tiers / tiers.sum(axis=-1, keepdims=True)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (
        {name: tiers[..., i] for i, name in enumerate(TIERS)},
        {name: weights[..., i] for i, name in enumerate(WEIGHTS)},
    )


def _batches(model, machine, work, kv_type, limits, p) -> list:
    """Batches to try: all sequences, and as many as host memory holds (the rest wait their turn).

    Few sequences at memory speed can beat many at the speed of flash. Exact steps of one sequence
    would find no more: between the two, time grows in proportion to what is on flash.
    """
    weights = closed_form.weight_shares(model, machine, True, p.working_share)["dram"]
    room = machine.host.memory_bytes - weights * model.weight_bytes
    length = np.asarray(work.context, float) + work.output
    held = np.floor(room / (length * model.kv_bytes(kv_type)))
    whole = np.asarray(work.batch)
    return [whole, np.clip(held, 1, whole), np.maximum(whole // 2, 1)]


def optimise(
    model: Model,
    machine: Machine,
    work: Work,
    limits: Limits | None = None,
    p: Parameters | None = None,
    tiers: Collection[str] = tuple(TIERS),
) -> closed_form.Estimate:
    """The best plan of nearkv for one piece of work on one machine, over `tiers`.

    Returns
    -------
    Estimate
        Its `policy` holds the chosen shares, type of K and V and page length.

    Raises
    ------
    ValueError
        If no plan keeps to the limits; the message says which memory is short.
    """
    limits, p = limits or Limits(), p or parameters()
    best = None
    read_share = p.page_filter if limits.sparse else 1.0
    for kv_type in limits.kv_types:
        for batch in _batches(model, machine, work, kv_type, limits, p):
            part = replace(work, batch=batch)
            for page_tokens in PAGE_TOKENS:
                policy = nearkv(kv_type=kv_type, page_tokens=page_tokens, read_share=read_share)
                x = solve(programme(model, machine, part, policy, limits, p, tiers))
                if x is None:
                    continue
                shares, weights = _split(x)
                found = closed_form.estimate(
                    model, machine, part, replace(policy, shares=shares), weights=weights, p=p
                )
                if best is None or found.tokens_per_s > best.tokens_per_s * (1 + 1e-6):
                    best = found
    if best is None:
        need = float(np.max(work.batch * (work.context + work.output) * model.kv_bytes()))
        raise ValueError(
            f"no plan fits: K and V in fp16 are {need / 1e12:.2f} TB, weights "
            f"{model.weight_bytes / 1e9:.0f} GB; flash holds "
            f"{machine.drives.count * machine.drives.capacity_bytes / 1e12:.2f} TB and host memory "
            f"{machine.host.memory_bytes / 1e9:.0f} GB. Lower batch, context or the limits"
        )
    return best


def optimise_many(
    model: Model,
    machine: Machine,
    work: Work,
    limits: Limits | None = None,
    p: Parameters | None = None,
    **facts,
) -> closed_form.Estimate:
    """As `optimise`, for arrays of work or machines: 128-token pages, the smallest permitted type.

    `facts` go to `policy.nearkv`. Points at which nothing fits are NaN.
    """
    limits, p = limits or Limits(), p or parameters()
    kv_type = min(limits.kv_types, key=lambda n: KV_FORMATS[n].element_bytes)
    policy = nearkv(kv_type=kv_type, **facts)
    plans, rates = [], []
    batches = _batches(model, machine, work, kv_type, limits, p)
    for batch in batches:
        part = replace(work, batch=batch)
        x = solve_many(programme(model, machine, part, policy, limits, p))
        rate = batch / (x[..., -1] + _serial(model, machine, part, policy, x, p))
        plans.append(x)
        rates.append(np.where(np.isnan(rate), -1.0, rate))
    batches = np.stack([np.broadcast_to(batch, rates[0].shape) for batch in batches])
    first = np.argmax(rates, axis=0)[None]
    chosen = np.take_along_axis(batches, first, axis=0)[0]
    x = np.take_along_axis(np.stack(plans), first[..., None], axis=0)[0]
    shares, weights = _split(x)
    return closed_form.estimate(
        model, machine, replace(work, batch=chosen), replace(policy, shares=shares),
        weights=weights, p=p,
    )  # fmt: skip


def _serial(model, machine, work, policy, x, p):
    """Seconds that nothing hides, of a programme's solution."""
    shares, weights = _split(x)
    return sum(closed_form.loads(model, machine, work, policy, shares, weights, p).serial.values())


def micro_batches(model: Model, work: Work, estimate: closed_form.Estimate) -> int:
    """Fewest parts of the batch with which the layers overlap to within 1% of all they can."""
    dense, attention = stages(estimate)
    for parts in range(1, int(np.max(work.batch)) + 1):
        now = closed_form.pipeline_seconds(dense, attention, parts, model.n_layers)
        if now <= 1.01 * max(dense, attention):
            return parts
    return int(np.max(work.batch))


def stages(estimate: closed_form.Estimate) -> tuple[float, float]:
    """Seconds of a step in the dense stage (GPU, its link) and in attention (everything else).

    Without a GPU both share the CPUs, so nothing overlaps: the first is 0.
    """
    busy = {k: float(np.ravel(v)[0]) for k, v in estimate.loads.busy.items()}
    dense = max((busy[k] for k in closed_form.DENSE if k in busy), default=0.0)
    return dense, max(v for k, v in busy.items() if k not in closed_form.DENSE)
