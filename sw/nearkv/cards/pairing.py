# SPDX-License-Identifier: Apache-2.0
"""Which drive belongs to which card, by where they are on PCIe, as sysfs tells.

A SmartSSD is a switch with an FPGA and a drive below it, so that pages go from one to the other without
passing the host:

    host -- upstream port (10ee:9134) -- downstream port (10ee:9234) -- drive
                                      -- downstream port (10ee:9434) -- FPGA

An Alveo has no drive of its own; one below the same switch is next to it. Every function takes the place
where sysfs is mounted, for recorded trees.

Source: the lspci log of a SmartSSD host, github.com/Defibrilator/smartssd-setup, logs/.
"""

from collections.abc import Iterator
import functools
import logging
import os
from pathlib import Path
import re
from typing import NamedTuple

log = logging.getLogger("nearkv")

SYSFS = Path("/sys")
_XILINX = "0x10ee"
_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class Drive(NamedTuple):
    name: str  # of the block device, "nvme0n1"
    address: str  # on PCIe, "0000:05:00.0"


def drives(sysfs: Path = SYSFS) -> list[Drive]:
    """All NVMe drives of the machine, by name."""
    found = []
    for controller in sorted((sysfs / "class/nvme").glob("nvme*")):
        address = _address(controller / "device")
        if address:
            # With multipath the block device is the subsystem's, and named after it.
            names = [*controller.glob("nvme*n*"), *controller.glob("subsystem/nvme*n*")]
            names = [it.name for it in names if re.fullmatch(r"nvme\d+n\d+", it.name)]
            found += [Drive(name, address) for name in sorted(set(names))]
    return found


def drives_of(directory: str | os.PathLike, sysfs: Path = SYSFS) -> list[Drive]:
    """The NVMe drives that a directory lies on; none if it lies on something else, or none can tell."""
    device = os.stat(directory).st_dev
    block = sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        return []
    names = {_whole(name) for name in _parts(block.resolve())}
    return [drive for drive in drives(sysfs) if drive.name in names]


def _parts(block: Path) -> Iterator[str]:
    """Names of the devices that a block device consists of: of a RAID, or a logical volume, several."""
    slaves = sorted((block / "slaves").glob("*"))
    if not slaves:
        yield block.name
    for slave in slaves:
        yield from _parts(slave.resolve())


def _whole(name: str) -> str:
    """The drive of a partition."""
    return re.sub(r"^(nvme\d+n\d+)p\d+$", r"\1", name)


def drives_in(card: str, sysfs: Path = SYSFS) -> list[Drive]:
    """The drives that are one device with a card: a SmartSSD's. None for an Alveo.

    Parameters
    ----------
    card : str
        Its address on PCIe: "0000:04:00.1".
    """
    switch = _switch(card, sysfs)
    if switch is None or _read(switch / "vendor") != _XILINX:
        return []
    return [drive for drive in drives(sysfs) if _switch(drive.address, sysfs) == switch]


def drives_beside(card: str, sysfs: Path = SYSFS) -> list[Drive]:
    """The drives that are nearest to a card: in it, or below the switch that is nearest to it."""
    inside = drives_in(card, sysfs)
    if inside:
        return inside
    ours = _path(card, sysfs)
    common = {
        drive: len(os.path.commonprefix([ours, _path(drive.address, sysfs)]))
        for drive in drives(sysfs)
    }
    # What only the root complex has in common is not beside each other.
    nearest = max(common.values(), default=0)
    return [drive for drive, length in common.items() if length == nearest > 1]


@functools.lru_cache(maxsize=1024)
def warn_if_far(card: str, address: str, directory: str, sysfs: Path = SYSFS) -> str:
    """Say, once, that a directory lies on another drive than the card's; what was said, or ""."""
    theirs, beside = drives_of(directory, sysfs), drives_beside(address, sysfs)
    if not theirs or not beside or set(theirs) <= set(beside):
        return ""
    where = "in it" if drives_in(address, sysfs) else "below the same switch"
    said = (
        f"card {card!r} ({address}) has {_names(beside)} {where}, and {directory} lies on "
        f"{_names(theirs)}: its pages take the way through the host. Choose a directory on "
        f"{_names(beside)}"
    )
    log.warning("%s", said)
    return said


def _names(some: list[Drive]) -> str:
    return ", ".join(drive.name for drive in some)


def _path(address: str, sysfs: Path) -> list[str]:
    """The bridges on the way to a device, the root's first."""
    place = (sysfs / "bus/pci/devices" / address).resolve()
    return [part for part in place.parts if part.startswith("pci") or _ADDRESS.fullmatch(part)][:-1]


def _switch(address: str, sysfs: Path) -> Path | None:
    """The upstream port of the switch below which a device is."""
    place = (sysfs / "bus/pci/devices" / address).resolve()
    switch = place.parent.parent
    return switch if _ADDRESS.fullmatch(switch.name) else None


def _address(link: Path) -> str:
    name = link.resolve().name
    return name if _ADDRESS.fullmatch(name) else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
