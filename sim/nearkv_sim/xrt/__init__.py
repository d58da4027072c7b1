# SPDX-License-Identifier: Apache-2.0
"""Simulated cards behind the real XRT.

The XRT library of Debian or AMD loads a driver by name. driver.cpp is such a driver; it is linked with
the archive of XRT's own classes that Debian's libxrt-dev brings, on first use, and kept in a cache. With
it, programs that were written for XRT run without a card and without being changed: they get the
accelerator's results from a backend, and device memory that is not the host's.

    with Simulation("twin") as simulation:
        subprocess.run(["./program"], env=os.environ | simulation.environment)

driver.cpp   what XRT loads; server.py  the cards; protocol.py  what they say to each other;
memory.py    of the cards

Tried with XRT 2022.1 (2.13.466, Debian 12). Another version of XRT has another archive: this one is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import ctypes.util
import functools
import hashlib
import importlib
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
from typing import Any

from nearkv_hw import xclbin
from nearkv_hw.config import Config, preset
from nearkv_hw.vitis.boards import Board, load

from ..rtl import cache_directory, locked
from . import protocol
from .memory import new_file
from .server import FAULTS, Card, Fault, Server

__all__ = [
    "APT", "BACKENDS", "FAULTS", "BuildError", "Card", "Fault", "Simulation", "build", "missing",
]  # fmt: skip

APT = "apt-get install libxrt1 libxrt-dev uuid-dev"
BACKENDS = {
    "twin": ("nearkv_sim.twin", "TwinCard"),
    "model": ("nearkv_sim.model", "ModelCard"),
    "rtl": ("nearkv_sim.rtl", "RtlCard"),
}
_VERSION = "2.13"  # of XRT, whose archive driver.cpp was written for
_DRIVER = Path(__file__).with_name("driver.cpp")
_INCLUDE = Path("/usr/include/xrt")
# The archive's member that makes devices is wanted by nobody else in here.
_LINK = (
    "-Wl,-u,_ZN8xrt_core5hwemu17get_userpf_deviceEPvj", "-Wl,-Bsymbolic", "-Wl,--no-undefined",
    "-l:libxrt_hwemu.a", "-lxrt_coreutil", "-ldl", "-lpthread", "-luuid",
)  # fmt: skip
_COMPILE = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-deprecated-declarations")


class BuildError(RuntimeError):
    """The driver cannot be built here; the message has the command that mends it."""


def missing() -> str:
    """What the driver needs and this machine has not, with the command that brings it; or ""."""
    if ctypes.util.find_library("xrt_coreutil") is None or not (_INCLUDE / "xrt.h").exists():
        return f"simulated XRT cards need XRT's library and headers; install them with: {APT}"
    if not Path("/usr/include/uuid/uuid.h").exists():
        return f"simulated XRT cards need libuuid's headers; install them with: {APT}"
    if shutil.which("g++") is None:
        return "simulated XRT cards need g++; install it with: apt-get install g++"
    version = _version()
    if not version.startswith(_VERSION + "."):
        return (
            f"simulated XRT cards need XRT {_VERSION} (2022.1), as Debian 12 has; here is {version}"
        )
    return ""


def _version() -> str:
    """Of the XRT whose headers are installed."""
    text = (_INCLUDE / "version.h").read_text()
    found = re.search(r'xrt_build_version\[\]\s*=\s*"([^"]+)"', text)
    return found[1] if found else "of unknown version"


def build() -> Path:
    """The directory for XILINX_XRT: the driver is in its lib/. Compiled if the cache does not hold it.

    Raises
    ------
    BuildError
    """
    if reason := missing():
        raise BuildError(reason)
    identity = [_DRIVER.read_text(), protocol.header(), repr((_COMPILE, _LINK)), _version()]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    root = cache_directory() / f"xrt-{key}"
    with locked(root):
        if not root.exists():
            _compile(root)
    return root


def _compile(root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        folder = Path(temporary)
        (folder / "xrt_constants.h").write_text(protocol.header())
        part = folder / "part"
        (part / "lib").mkdir(parents=True)
        command = [
            "g++", *_COMPILE, f"-I{folder}", f"-I{_INCLUDE}", str(_DRIVER),
            "-o", str(part / "lib" / "libxrt_hwemu.so.2"), *_LINK,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log = root.with_suffix(".log")
            log.write_text(done.stderr)
            errors = [
                line for line in done.stderr.splitlines() if "error" in line or "undefined" in line
            ]
            first = errors[0] if errors else f"g++ ended with {done.returncode}"
            raise BuildError(f"the XRT driver cannot be compiled: {first} (all of it: {log})")
        part.rename(root)


class Simulation:
    """Simulated cards, and the environment in which a program finds them. A context manager.

    Parameters
    ----------
    backend : str
        What computes: "twin", "model" or "rtl".
    n_cards : int
    board : str or Board
        Which card: a name of `nearkv_hw.vitis.boards`. There is a compute unit for each of its engines.
    config : str or Config, optional
        The build that is on them. Default: the board's.
    memories : sequence of Memory, optional
        Banks, as for `nearkv_hw.xclbin.simulated`.
    faults : sequence of Fault
        Of every card.
    **options
        Of the backend.

    Attributes
    ----------
    cards : list of Card
    environment : dict
        What a program's environment must have for XRT to find the cards.
    xclbin : Path
        What the cards want loaded.

    Raises
    ------
    BuildError
        If the driver cannot be built.
    """

    def __init__(
        self,
        backend: str = "twin",
        n_cards: int = 1,
        *,
        board: str | Board = "smartssd",
        config: str | Config | None = None,
        memories: Sequence[xclbin.Memory] | None = None,
        faults: Sequence[Fault] = (),
        **options,
    ):
        root = build()
        board = load(board) if isinstance(board, str) else board
        config = preset(board.config) if config is None else config
        memories = xclbin.memories_of(board) if memories is None else memories
        self._folder = tempfile.TemporaryDirectory(prefix="nearkv-xrt-")
        folder = Path(self._folder.name)
        open_backend = _opener(backend, config, n_cards * len(board.engines), options)
        nbytes = sum(memory.nbytes for memory in memories)
        self.cards = [
            Card(
                index, new_file(nbytes), open_backend,
                platform=board.platform, memories=memories, faults=faults,
            )
            for index in range(n_cards)
        ]  # fmt: skip
        self.xclbin = folder / "simulated.xclbin"
        xclbin.simulated(board, memories).write(self.xclbin)
        socket = folder / "cards"
        self._server = Server(self.cards, socket)
        self.environment = {
            "XILINX_XRT": str(root),
            "XCL_EMULATION_MODE": "hw_emu",
            "NEARKV_XCLBIN": str(self.xclbin),
            protocol.SOCKET: str(socket),
            protocol.CARDS: str(n_cards),
        }

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        self._server.close()
        self._folder.cleanup()


def _opener(backend: str, config: str | Config, n_units: int, options: dict) -> Callable[[], Any]:
    """Makes backends; their share of the processor's cores is like that of as many cards."""
    if backend not in BACKENDS:
        raise ValueError(f"the backend must be {', '.join(BACKENDS)}, not {backend!r}")
    config = preset(config) if isinstance(config, str) else config
    module, name = BACKENDS[backend]
    options = dict(options)
    if backend == "twin":
        options.setdefault("threads", max(1, len(os.sched_getaffinity(0)) // n_units))
    return functools.partial(getattr(importlib.import_module(module), name), config, **options)
