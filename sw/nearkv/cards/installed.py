# SPDX-License-Identifier: Apache-2.0
"""XRT on this machine: where it is, and whether this environment lets it find its driver.

Cards ask before they load it, and the doctor says the same of a machine. Files alone are looked at.

Source: github.com/Xilinx/XRT, 2022.1, src/runtime_src/core/common/module_loader.cpp: which driver is
loaded, and that the process ends where there is none.
"""

from collections.abc import Mapping
import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from ..io import pci

LIBRARY = "libxrt_coreutil.so.2"
PREFIX = Path("/opt/xilinx/xrt")  # of AMD's packages
INSTALL = (
    "install AMD's packages of XRT (2021.2 to 2023.1) and of the card's platform (xilinx.com, the card's "
    "page, Getting Started), then: sudo modprobe xocl"
)
SIMULATE = "to simulate one: apt-get install libxrt1 libxrt-dev uuid-dev"
# XCL_EMULATION_MODE -> the driver that XRT loads.
_DRIVERS = {None: "xrt_core", "hw_emu": "xrt_hwemu", "sw_emu": "xrt_swemu", "noop": "xrt_noop"}


class Trouble(NamedTuple):
    what: str
    remedy: str


def libraries(environment: Mapping[str, str]) -> list[str]:
    """Where the library may be, for the system's loader: by its name alone first."""
    return [LIBRARY, *(str(prefix / "lib" / LIBRARY) for prefix in _prefixes(environment))]


def find(environment: Mapping[str, str], root: Path = pci.ROOT) -> tuple[str, str]:
    """Version of XRT, and the directory it is in; "" if it is not installed."""
    for prefix in _prefixes(environment):
        text = pci.read(_below(root, prefix) / "version.json")
        with contextlib.suppress(ValueError, AttributeError):
            if version := json.loads(text).get("BUILD_VERSION"):
                return str(version), str(prefix)
    for library in sorted(root.glob(f"usr/lib/*/{LIBRARY}.*")):
        return library.name.partition(".so.")[2], f"/{library.parent.relative_to(root)}"
    return "", ""


def trouble(environment: Mapping[str, str], root: Path = pci.ROOT) -> Trouble | None:
    """Why XRT would find no driver in this environment, and end the process; None if it will find one."""
    mode = environment.get("XCL_EMULATION_MODE")
    if mode not in _DRIVERS:
        return Trouble(
            f"XCL_EMULATION_MODE is {mode!r}, which XRT does not know",
            "for a card: unset XCL_EMULATION_MODE",
        )
    name = f"lib{_DRIVERS[mode]}.so.2"
    remedy = f"source {PREFIX}/setup.sh"
    if mode is not None:
        remedy = (
            "for a simulated card: nearkv xrt-sim -- PROGRAM; for a card: unset XCL_EMULATION_MODE"
        )
    elif not (_below(root, PREFIX) / "lib" / name).is_file():
        remedy = INSTALL
    prefix = environment.get("XILINX_XRT")
    if not prefix:
        return Trouble("XILINX_XRT is not set, by which XRT finds its driver", remedy)
    there = (_below(root, Path(prefix)) / "lib" / name).is_file()
    if not there and not _names_another_driver(mode, environment):
        return Trouble(f"XILINX_XRT is {prefix}, where there is no lib/{name}", remedy)
    return None


def _prefixes(environment: Mapping[str, str]) -> list[Path]:
    named = environment.get("XILINX_XRT")
    return [*dict.fromkeys([*([Path(named)] if named else []), PREFIX])]


def _below(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def _names_another_driver(mode: str | None, environment: Mapping[str, str]) -> bool:
    """Whether XRT's settings do."""
    settings = Path(environment.get("XRT_INI_PATH") or "xrt.ini")
    try:
        return mode is not None and "_em_driver" in settings.read_text()
    except OSError:
        return False
