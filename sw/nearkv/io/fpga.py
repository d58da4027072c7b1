# SPDX-License-Identifier: Apache-2.0
"""FPGA cards, as their PCI functions and the files of XRT's driver show them. XRT itself is not needed.

Sources, of github.com/Xilinx/XRT: src/runtime_src/core/pcie/driver/linux/xocl/devices.h (PCI ids);
src/runtime_src/core/pcie/linux/pcidev.cpp (files in sysfs, state of P2P).
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
import re
from typing import NamedTuple

from . import pci

# Device ids of the functions that a card shows: (management, user) -> its name for `make bitstream`.
_BOARDS = {
    (0x6987, 0x6988): "smartssd", (0x5000, 0x5001): "u200", (0x5004, 0x5005): "u250",
    (0x500C, 0x500D): "u280", (0x5020, 0x5021): "u50", (0x505C, 0x505D): "u55c",
}  # fmt: skip
_USER = {user: board for (_, user), board in _BOARDS.items()}
_MANAGEMENT = {management: board for (management, _), board in _BOARDS.items()}
# As they come from the factory, without a platform.
_GOLDEN = {0xE987: "smartssd", 0xD000: "u200", 0xD004: "u250", 0xD00C: "u280", 0xD020: "u50"}
_ACCELERATOR = 0x12  # PCI class: processing accelerators


@dataclass(frozen=True)
class Card:
    """An FPGA card.

    Attributes
    ----------
    board : str
        As `make bitstream BOARD=` calls it; for others vendor and device id, "10ee:5045".
    function : pci.Function
        The user function; of a card without a platform, what it shows instead.
    usable : bool
        Whether it shows a user function.
    known : bool
        Whether nearkv has a board description of it.
    """

    board: str
    function: pci.Function
    usable: bool = True
    known: bool = True


def cards(root: Path = pci.ROOT) -> list[Card]:
    """All FPGA cards, in the order of their addresses."""
    ours = [it for it in pci.functions(root) if it.vendor == pci.AMD_FPGA]
    users = {_slot(it): it for it in ours if it.device in _USER or it.driver == "xocl"}
    found = []
    for it in ours:
        name = f"{it.vendor:04x}:{it.device:04x}"
        if it is users.get(_slot(it)):
            found.append(Card(_USER.get(it.device, name), it, known=it.device in _USER))
        elif _slot(it) in users:
            continue
        elif board := _GOLDEN.get(it.device) or _MANAGEMENT.get(it.device):
            found.append(Card(board, it, usable=False))
        elif it.kind >> 16 == _ACCELERATOR:
            found.append(Card(name, it, usable=False, known=False))
    return found


def _slot(function: pci.Function) -> str:
    return function.address.rpartition(".")[0]


def nearest_drive(card: str, root: Path = pci.ROOT) -> tuple[pci.Nearness, pci.Drive] | None:
    """The NVMe drive of this machine that is nearest to a card, given by address; None without one."""
    local = [drive for drive in pci.drives(root) if drive.address]
    near = [(pci.nearness(card, drive.address, root), drive) for drive in local]
    return max(near, key=lambda found: found[0], default=None)


class P2p(Enum):
    """Whether drives can write into a card's memory."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    REBOOT = "reboot"  # enabled, but its window has no addresses before a restart
    ERROR = "error"  # the remapper does not fit the window
    UNSUPPORTED = "unsupported"  # by the platform on the card
    UNKNOWN = "unknown"  # there is no driver to ask


def p2p(folder: Path) -> tuple[P2p, int]:
    """State of P2P and bytes of its window, by XRT's rule, of a user function's directory in sysfs.

    # Ref: pcidev.cpp, check_p2p_config
    """
    folder_of_part = part(folder, "p2p")
    if folder_of_part is None:
        return P2p.UNKNOWN, 0
    config = pci.read(folder_of_part / "config")
    values = {name: int(value) for name, value in re.findall(r"^(\w+):(\d+)\s*$", config, re.M)}
    bar, remap = values.get("bar"), values.get("remap", 0)
    if bar is None:
        return P2p.UNSUPPORTED, 0
    if values.get("rbar", 0) > bar:
        return P2p.REBOOT, bar
    if remap and remap != bar:
        return P2p.ERROR, bar
    return (P2p.ENABLED if bar == values.get("exp_bar") else P2p.DISABLED), bar


class Trouble(NamedTuple):
    what: str  # "P2P is ..."
    remedy: str


def p2p_trouble(state: P2p, card: str) -> Trouble:
    """What is wrong in a state other than ENABLED, of a card given as xbutil wants it."""
    enable = f"sudo xbutil configure --device {card} --p2p enable"
    return {
        P2p.DISABLED: Trouble(
            "disabled: drives cannot write into the card's memory",
            f"{enable}, then restart the machine (warm)",
        ),
        P2p.REBOOT: Trouble(
            "enabled, but the window has no room in the address space yet",
            "restart the machine (warm); 'Above 4G decoding' must be on in its BIOS",
        ),
        P2p.ERROR: Trouble(
            "set up wrongly: the card's P2P remapper does not fit its window",
            f"sudo xbutil configure --device {card} --p2p disable, then {enable}, then restart the machine",
        ),
        P2p.UNSUPPORTED: Trouble(
            "missing: the platform on the card has no P2P window",
            "put a platform with P2P on it: sudo xbmgmt examine lists those installed",
        ),
    }.get(state, Trouble("what the driver does not tell of", f"xbutil examine --device {card}"))


def platform(folder: Path) -> str:
    """Name of the shell on the card, "xilinx_u2_gen3x4_xdma_gc_base_2"; "" where the driver does not say."""
    rom = part(folder, "rom")
    return pci.read(rom / "VBNV") if rom else ""


def render_node(folder: Path) -> str:
    """The device file that XRT opens, in /dev/dri: "renderD128"; "" without one."""
    return next((name for name in pci.names(folder / "drm") if name.startswith("renderD")), "")


def part(folder: Path, name: str) -> Path | None:
    """Directory of a part of the driver: "rom.u.1234", or one whose file `name` says so. Ref: pcidev.cpp"""
    for entry in pci.names(folder):
        said = pci.read(folder / entry / "name")
        if said == name or not said and entry.startswith(f"{name}."):
            return folder / entry
    return None
