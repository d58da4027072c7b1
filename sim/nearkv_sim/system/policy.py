# SPDX-License-Identifier: Apache-2.0
"""The systems, as policies: where the context is served, and how each path works.

A policy is a handful of facts about a system. What they cost on a machine is `closed_form`'s business.
"""

from dataclasses import dataclass, field

import numpy as np

from .describe import Machine, Model, Number, Work, parameters

# Places a share of the context can be served from. X: the layer inputs in place of K and V.
TIERS = {
    "card": "flash, attended by the cards",
    "flash_x": "flash to GPU as X",
    "flash_kv": "flash to GPU as K and V",
    "dram_x": "host memory to GPU as X",
    "dram_kv": "host memory to GPU as K and V",
    "dram_cpu": "host memory, attended by the CPUs",
    "flash_cpu": "flash, attended by the CPUs",
    "gpu": "GPU memory",
    "card_dram": "card memory, attended by the cards",
}
ON_CARDS = ("card", "card_dram")
ON_GPU = ("flash_x", "flash_kv", "dram_x", "dram_kv", "gpu")

# K or V of one head that INF2 (32 tokens) and HILOS (128 tokens) take at a time, fp16, head_dim 128.
INF2_TILE, HILOS_BLOCK = 8192, 32768


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What distinguishes one system from another.

    shares : tier -> share of the context, adding up to 1; None: `nearkv`, to be optimised
    buffered : flash is read through the page cache and a copy (FlexGen), not directly
    in_turn : GPU link first, then the longer of disk and compute; CPUs and GPU compute in turn. So
        FlexGen's own cost model has it: T_gen = cpu->gpu + max(disk->cpu, ..., compute)
    serial_card : a card loads, then computes (HILOS); otherwise both at once
    p2p_request_bytes : what one P2P read brings
    x_after_cards : the GPU attends to its X when the cards are done, not beside them (INF2)
    sync_writes : new K and V are written synchronously every `writeback_steps` steps
    writeback_steps : tokens gathered before they go to flash
    resend_tail : the gathered tokens go to the cards at every step, each by itself (HILOS, INF2)
    abi_jobs : the cards are driven by this project's job records; otherwise by bare q, k, v, out
    absorb : X is attended without forming K and V where the model permits
    read_share : share of the pages that a sparse system reads; 1 is exact
    write_copies : times K and V are written to flash (SparF keeps K twice)
    big_weights_on_flash : models above 100 B parameters keep what the GPU does not hold on flash
    shrink_batch : run the largest batch that host memory holds
    weight_passes : times a step streams the weights that the GPU does not hold
    """

    name: str
    shares: dict[str, Number] | None = field(default_factory=dict)
    buffered: bool = False
    in_turn: bool = False
    serial_card: bool = False
    p2p_request_bytes: Number = 1 << 20
    x_after_cards: bool = False
    sync_writes: bool = False
    writeback_steps: Number = 1
    resend_tail: bool = False
    abi_jobs: bool = False
    absorb: bool = False
    read_share: float = 1.0
    write_copies: float = 1.0
    big_weights_on_flash: bool = True
    shrink_batch: bool = False
    weight_passes: Number = 1
    page_tokens: int = 128
    rows: int = 8
    kv_type: str = "fp16"


def lacks(policy: Policy, machine: Machine) -> str:
    """What the machine would need for the policy's shares; empty if it has it all."""
    used = {tier for tier, share in (policy.shares or {}).items() if np.any(np.asarray(share) > 0)}
    if used & set(ON_CARDS) and not machine.has_cards:
        return "needs cards"
    if used & set(ON_GPU) and not machine.has_gpu:
        return "needs a GPU"
    return ""


def weight_shares(model: Model, machine: Machine, big_on_flash: bool, working: float) -> dict:
    """Where the weights lie, as FlexGen's and HILOS' rules have it: GPU first, then host memory.

    Models above 100 B parameters keep the rest on storage (HILOS), as does one that host memory
    does not hold.
    """
    total = model.weight_bytes
    gpu = np.minimum(1.0, (1 - working) * machine.gpu.memory_bytes / total)  # 0 without a GPU
    rest = 1.0 - gpu
    flash = (big_on_flash and model.parameters > 100e9) | (
        rest * total > 0.9 * machine.host.memory_bytes
    )
    return {"gpu": gpu, "dram": np.where(flash, 0.0, rest), "flash": np.where(flash, rest, 0.0)}


def flexgen_ssd() -> Policy:
    """FlexGen with the KV cache on disk; as in its own benchmarks (`--cpu`), the CPUs attend to it."""
    return Policy(name="flexgen-ssd", shares={"flash_cpu": 1.0}, buffered=True, in_turn=True)


def flexgen_dram() -> Policy:
    """FlexGen with the KV cache in host memory, attended by the CPUs, at the largest batch that fits."""
    return Policy(name="flexgen-dram", shares={"dram_cpu": 1.0}, shrink_batch=True, in_turn=True)


def instinfer(*, sparse: bool = False) -> Policy:
    """InstInfer (InstAttention): dense, or SparF at 1/8, in which half the pages are read."""
    return Policy(
        name="instinfer-sparf" if sparse else "instinfer",
        shares={"card": 1.0},
        read_share=parameters().page_filter if sparse else 1.0,
        write_copies=1.5 if sparse else 1.0,
        writeback_steps=16,  # tokens of a flash page
    )


def inf2(model: Model, machine: Machine, work: Work, *, x: bool = True, wb: bool = True) -> Policy:
    """INF2: attention in the drives; X in as much of host memory as the budget leaves."""
    weights = weight_shares(model, machine, True, parameters().working_share)
    room = machine.host.memory_bytes - weights["dram"] * model.weight_bytes
    whole = (
        np.asarray(work.batch, float) * (np.asarray(work.context) + work.output) * model.x_bytes()
    )
    share = np.clip(room / whole, 0.0, 1.0) if x else 0.0
    return Policy(
        name="inf2",
        shares={"card": 1.0 - share, "dram_x": share},
        serial_card=True,
        p2p_request_bytes=INF2_TILE,
        x_after_cards=True,
        sync_writes=True,
        writeback_steps=2 if wb else 1,
        resend_tail=wb,
    )


def hilos_alpha(machine: Machine) -> Number:
    """HILOS' rule, 2 B_PCI / (B_SSD + B_PCI), rounded to a power of two: down, at most 1.

    The notes say "rounded". Up would leave the cards nothing to do with 8 drives, for which HILOS
    studied what they do; with 4 and fewer the link carries all that flash gives, and X is all.
    """
    pci, ssd = machine.drives.uplink_bytes_per_s, machine.flash_read_bytes_per_s
    return np.minimum(1.0, 2.0 ** np.floor(np.log2(2.0 * pci / (ssd + pci)) + 1e-9))


def hilos(
    model: Model, machine: Machine, *, x: bool = True, wb: bool = True, alpha: Number | None = None,
    writeback_steps: Number | None = None, overlap: bool = False,
) -> Policy:  # fmt: skip
    """HILOS: attention in the drives, X-cache on flash, delayed writeback; each on or off.

    `alpha` overrides the rule. Where X is not smaller than K and V (rho >= 1) the rule gives 0; the
    paper does not say what it does there, and any X would slow it down.
    """
    if alpha is None:
        alpha = hilos_alpha(machine) if x and model.rho < 1 else 0.0
    if writeback_steps is None:
        writeback_steps = parameters().writeback_steps
    return Policy(
        name="hilos",
        shares={"card": 1.0 - np.asarray(alpha, float), "flash_x": np.asarray(alpha, float)},
        serial_card=not overlap,
        p2p_request_bytes=HILOS_BLOCK,
        sync_writes=True,
        writeback_steps=writeback_steps if wb else 1,
        resend_tail=wb,
    )


def nearkv(*, shares=None, kv_type: str = "fp16", page_tokens: int = 128, **facts) -> Policy:
    """This project: cards load and compute at once, pages written full, every tier open."""
    return Policy(
        name="nearkv",
        shares=shares,
        abi_jobs=True,
        absorb=True,
        kv_type=kv_type,
        page_tokens=page_tokens,
        writeback_steps=page_tokens,
        big_weights_on_flash=False,
        **facts,
    )


SYSTEMS = ("flexgen-ssd", "flexgen-dram", "instinfer", "instinfer-sparf", "inf2", "hilos")


def system(name: str, model: Model, machine: Machine, work: Work, **options) -> Policy:
    """The policy of a published system by name; `options` as of its function.

    Raises
    ------
    ValueError
        If there is no such system.
    """
    if name == "flexgen-ssd":
        return flexgen_ssd(**options)
    if name == "flexgen-dram":
        return flexgen_dram(**options)
    if name in ("instinfer", "instinfer-sparf"):
        return instinfer(sparse=name.endswith("sparf"), **options)
    if name == "inf2":
        return inf2(model, machine, work, **options)
    if name == "hilos":
        return hilos(model, machine, **options)
    raise ValueError(f"no system {name!r}; choose one of {', '.join(SYSTEMS)}")
