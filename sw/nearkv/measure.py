# SPDX-License-Identifier: Apache-2.0
"""A short profile of the machine at hand, written as a machine file: `nearkv plan --measure FILE`.

What is measured is what the plan depends on: the drive behind a directory, host memory, and the rates
at which the CPUs attend to K and V, with the twin and with torch. What cannot be measured here, watts
and prices, keeps its default; the file says so and is meant to be edited.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
import json
import os
from pathlib import Path
import random
import tempfile
import time

import numpy as np

from nearkv_sim.system.describe import parameters

LATENCY_READS = 200
GEMM_EFFICIENCY = parameters().gemm_efficiency  # the model takes this share of `flops`


@dataclass(frozen=True)
class Profile:
    """Rates in bytes or floating point operations per second, sizes in bytes.

    `gpu` holds fields of `describe.Gpu`; None without one.
    """

    cores: int
    memory_bytes: float
    memory_bytes_per_s: float
    twin_bytes_per_s: float
    torch_bytes_per_s: float
    flops: float
    layer_seconds: float
    drive_read_bytes_per_s: float
    drive_write_bytes_per_s: float
    drive_latency_seconds: float
    drive_free_bytes: float
    gpu: dict | None

    def toml(self, where: str) -> str:
        """A machine file."""
        gpu = "".join(f"{name} = {value:.4g}\n" for name, value in (self.gpu or {}).items())
        source = f"measured: {self.cores} cores, drive behind {where}"
        # A JSON text is one of TOML, but for these: bytes that are not UTF-8, and DEL.
        source = source.encode(errors="replace").decode().replace("\x7f", "?")
        return f"""\
source = {json.dumps(source, ensure_ascii=False)}

[host]
memory_bytes = {self.memory_bytes:.4g}
memory_bytes_per_s = {self.memory_bytes_per_s:.4g}
attention_bytes_per_s = {self.torch_bytes_per_s:.4g}  # torch
twin_bytes_per_s = {self.twin_bytes_per_s:.4g}
flops = {self.flops / GEMM_EFFICIENCY:.4g}  # {self.flops:.4g} measured, over gemm_efficiency
layer_seconds = {self.layer_seconds:.4g}
# Not measured: cpu_watts, cpu_idle_watts, other_watts, usd.

[drives]
count = 1
read_bytes_per_s = {self.drive_read_bytes_per_s:.4g}
write_bytes_per_s = {self.drive_write_bytes_per_s:.4g}
latency_seconds = {self.drive_latency_seconds:.4g}
capacity_bytes = {self.drive_free_bytes:.4g}  # free
uplink_bytes_per_s = {self.drive_read_bytes_per_s:.4g}
raid = false
write_endurance_bytes = 1e15  # not measured: see the drive's data sheet
# Not measured: watts, idle_watts, usd.
""" + (f"\n[gpu]\n{gpu}# Not measured: watts, idle_watts, usd.\n" if gpu else "")

    def as_dict(self) -> dict:
        return asdict(self)


def _best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some rounds; one more, first, warms up."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def drive(directory: Path, nbytes: int) -> tuple[float, float, float]:
    """(read, write, latency) of the drive behind a directory: bytes/s, bytes/s, seconds.

    Past the page cache, with as many requests at once as nearkv's own reader has.
    """
    from .bench.flash import read_raw
    from .io import KvMemory, reader_kind

    block = 8 << 20
    memory = KvMemory(block)
    data = memory.target(0, block)
    data[:] = random.Random(0).randbytes(block)
    with tempfile.TemporaryDirectory(dir=directory, prefix="nearkv-measure-") as name:
        path = Path(name) / "data"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        begin = time.perf_counter()
        for _ in range(nbytes // block):
            os.write(file, data)
        os.fsync(file)
        write = nbytes // block * block / (time.perf_counter() - begin)
        os.close(file)
        read = path.stat().st_size / _best(lambda: read_raw([path], reader_kind().DEPTH), 2)
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        page, seconds = memory.target(0, 4096), []
        for at in random.Random(0).sample(range(0, nbytes // block * block, 4096), LATENCY_READS):
            begin = time.perf_counter()
            os.preadv(file, [page], at)
            seconds.append(time.perf_counter() - begin)
        os.close(file)
    return read, write, float(np.median(seconds))


def memory_rate(cores: int, rounds: int = 3) -> float:
    """Bytes/s read and written when every core copies."""
    pairs = [(np.zeros(32 << 20, np.uint8), np.ones(32 << 20, np.uint8)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = _best(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)), rounds)
    return cores * 2 * (32 << 20) / seconds


def matrix_flops(size: int = 1024, rounds: int = 3) -> float:
    """Floating point operations per second of a matrix product in torch, fp32."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    return 2 * size**3 / _best(lambda: a @ b, rounds)


def layer_seconds(directory: Path, n_layers: int = 8, n_tokens: int = 8) -> float:
    """Seconds of the host's program in a layer of decoding: of a model too small to compute for long."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from . import NearStorageCache

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_hidden_layers=n_layers, intermediate_size=64, vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="nearkv").eval()
    token = torch.zeros(1, 1, dtype=torch.long)
    with NearStorageCache(config, directory) as cache, torch.inference_mode():
        return _best(lambda: model(token, past_key_values=cache), n_tokens) / n_layers


def gpus(size: int = 4096, rounds: int = 5) -> dict | None:
    """What torch's CUDA devices deliver, as fields of `describe.Gpu`; None if there are none."""
    import torch

    if not (count := torch.cuda.device_count()):
        return None
    a = torch.rand(size, size, device="cuda", dtype=torch.float16)
    there = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    here = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)

    def done(work):
        work()
        torch.cuda.synchronize()

    product = _best(lambda: done(lambda: a @ a), rounds)
    copy = _best(lambda: done(there.clone), rounds)
    across = _best(lambda: done(lambda: there.copy_(here, non_blocking=True)), rounds)
    return {
        "count": count,
        "flops": count * 2 * size**3 / product / GEMM_EFFICIENCY,
        "memory_bytes": float(sum(torch.cuda.mem_get_info(i)[0] for i in range(count))),
        "memory_bytes_per_s": count * 2 * there.nbytes / copy,
        "link_bytes_per_s": count * there.nbytes / across,
    }


def available_memory() -> float:
    """Bytes of host memory that a program can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def attention_rates(group_size: int, head_dim: int, cores: int, kv_mib: int) -> tuple[float, float]:
    """Bytes/s of fp16 K and V that the twin, and torch, attend to on all cores."""
    from nearkv_hw.abi import KvType

    from .bench import twin as bench_twin

    found = bench_twin.measure(KvType.FP16, head_dim, group_size, path="auto", threads=cores,
                               kv_mib=kv_mib, rounds=2, with_torch=True)  # fmt: skip
    return found.twin, found.torch or found.twin


def measure(
    directory: Path, *, mib: int = 512, group_size: int = 4, head_dim: int = 128
) -> Profile:
    """Measure this machine in a few seconds.

    Parameters
    ----------
    directory : Path
        On the drive that pages will go to; written to for a moment.
    mib : int
        Bytes written and read, in MiB. More than the drive's own cache says more.
    group_size, head_dim : int
        Of the model that the CPUs will attend for.

    Raises
    ------
    OSError
        If the directory cannot be written, or its file system has no direct I/O.
    """
    cores = len(os.sched_getaffinity(0))
    read, write, latency = drive(directory, mib << 20)
    twin, by_torch = attention_rates(group_size, head_dim, cores, min(mib, 64))
    free = os.statvfs(directory)
    return Profile(
        cores=cores,
        memory_bytes=available_memory(),
        memory_bytes_per_s=memory_rate(cores),
        twin_bytes_per_s=twin,
        torch_bytes_per_s=by_torch,
        flops=matrix_flops(),
        layer_seconds=layer_seconds(directory),
        drive_read_bytes_per_s=read,
        drive_write_bytes_per_s=write,
        drive_latency_seconds=latency,
        drive_free_bytes=float(free.f_bavail * free.f_frsize),
        gpu=gpus(),
    )
