# SPDX-License-Identifier: Apache-2.0
"""PCI functions, NVMe drives, and how near a drive is to a card: what sysfs says.

Read from files alone, without XRT and without rights. `root` is "/" everywhere; tests pass a recorded
tree.

# Ref: Documentation/ABI/testing/sysfs-bus-pci and sysfs-class-nvme of the Linux kernel;
# Documentation/filesystems/proc.rst, section 3.5 (mountinfo)
"""

from dataclasses import dataclass
from enum import IntEnum
import os
from pathlib import Path
import re

_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
ROOT = Path("/")


class Nearness(IntEnum):
    """What lies between a drive and a card. The larger, the shorter the way.

    On the way of `SWITCH` and `OWN` what a drive writes into a card's memory passes no root complex,
    which is where an IOMMU slows it down, and where some systems let nothing through.
    Ref: XRT documentation, "PCIe Peer-to-Peer (P2P)"
    """

    APART = 0  # they hang on different host bridges
    ROOT_COMPLEX = 1
    SWITCH = 2
    OWN = 3  # the switch between them is the card's own: a SmartSSD and its flash

    @property
    def words(self) -> str:
        """Where the drive is."""
        return _WORDS[self]


_WORDS = {
    Nearness.APART: "on another host bridge",
    Nearness.ROOT_COMPLEX: "by way of the root complex",
    Nearness.SWITCH: "below the same PCIe switch",
    Nearness.OWN: "inside the card",
}


@dataclass(frozen=True)
class Function:
    """A PCI function.

    Attributes
    ----------
    address : str
        "0000:04:00.1"
    vendor, device, kind : int
        `kind` is the class code, 24 bits.
    driver : str
        The kernel's driver of it; "" without one.
    folder : Path
        Its directory in sysfs, without links.
    """

    address: str
    vendor: int
    device: int
    kind: int
    driver: str
    folder: Path


@dataclass(frozen=True)
class Drive:
    """An NVMe drive.

    Attributes
    ----------
    name : str
        Of its controller, "nvme0".
    address : str
        Of its PCI function; "" for one that is reached over a network.
    model : str
    blocks : dict of str to int
        Its namespaces: name of the block device ("nvme0n1"), and bytes.
    state : str
        "live", or what else the kernel says of it; "" where it says nothing.
    """

    name: str
    address: str
    model: str
    blocks: dict[str, int]
    state: str = ""


@dataclass(frozen=True)
class Mount:
    """A mounted file system.

    Attributes
    ----------
    where : str
    kind : str
        "ext4"
    source : str
        "/dev/nvme0n1p1"
    number : str
        Of the device, as the kernel counts: "259:1".
    """

    where: str
    kind: str
    source: str
    number: str


def read(path: Path) -> str:
    """The text of a small file; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def functions(root: Path = ROOT) -> list[Function]:
    """All PCI functions, in the order of their addresses."""
    folder = root / "sys/bus/pci/devices"
    return [function(name, root) for name in names(folder) if _ADDRESS.fullmatch(name)]


def function(address: str, root: Path = ROOT) -> Function:
    """One PCI function. What sysfs does not say of it is 0 or empty."""
    folder = (root / "sys/bus/pci/devices" / address).resolve()
    driver = folder / "driver"
    return Function(
        address=address,
        vendor=_number(read(folder / "vendor")),
        device=_number(read(folder / "device")),
        kind=_number(read(folder / "class")),
        driver=os.path.basename(os.readlink(driver)) if driver.is_symlink() else "",
        folder=folder,
    )


def lanes(folder: Path) -> tuple[int, int]:
    """PCIe lanes that a function uses, and that it has; 0 where that is not known."""
    current, most = (_number(read(folder / f"{it}_link_width")) for it in ("current", "max"))
    return current, most


def drives(root: Path = ROOT) -> list[Drive]:
    """All NVMe drives, in the order of their numbers."""
    folder = root / "sys/class/nvme"
    found = []
    for name in names(folder):
        controller = (folder / name).resolve()
        blocks = {block.name: _bytes_of(block) for block in _namespaces(controller, root)}
        address = _last_address(controller)
        model, state = read(controller / "model"), read(controller / "state")
        found.append(Drive(name, address, model, blocks, state))
    return found


def mounts(root: Path = ROOT) -> list[Mount]:
    """What is mounted, in this process' view."""
    found = []
    for line in read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, of_system = left.split(), right.split()
        if len(fields) >= 5 and len(of_system) >= 2:
            where, source = (_unescaped(text) for text in (fields[4], of_system[1]))
            found.append(Mount(where, of_system[0], source, fields[2]))
    return found


def blocks_of(mount: Mount, root: Path = ROOT) -> set[str]:
    """Names of the disks ("nvme0n1") that a mounted file system lies on; RAID and LVM are seen through."""
    device = root / "sys/dev/block" / mount.number
    if not device.exists():  # btrfs and others have numbers of their own
        device = root / "sys/class/block" / os.path.basename(mount.source)
    return _disks(device.resolve()) if device.exists() else set()


def drives_behind(directory: str | os.PathLike, root: Path = ROOT) -> list[Drive]:
    """The NVMe drives that a directory lies on; none if it lies on something else, or that is not known.

    Raises
    ------
    OSError
        If there is no such directory.
    """
    number = os.stat(directory).st_dev
    number = f"{os.major(number)}:{os.minor(number)}"
    mount = next((it for it in mounts(root) if it.number == number), Mount("", "", "", number))
    disks = blocks_of(mount, root)
    return [drive for drive in drives(root) if disks & drive.blocks.keys()]


def nearness(card: str, drive: str, root: Path = ROOT) -> Nearness:
    """What lies between two PCI functions, given by address.

    SmartSSD: host -> 10ee:9134 (a bridge in the FPGA) -> 10ee:9234 -> the drive; and 10ee:9134 ->
    10ee:9434 -> the FPGA. So the nearest bridge that both have is one of AMD's, and no other card's.
    Ref: an lspci listing in github.com/Defibrilator/smartssd-setup, logs/
    """
    ours, theirs = (_way(function(address, root).folder) for address in (card, drive))
    common = os.path.commonprefix([ours, theirs])
    if not common:
        return Nearness.APART
    if len(common) == 1:  # the host bridge, "pci0000:00"
        return Nearness.ROOT_COMPLEX
    bridge = function(common[-1], root)
    if bridge.vendor == AMD_FPGA and len(ours) == len(theirs) == len(common) + 2:
        return Nearness.OWN
    return Nearness.SWITCH


AMD_FPGA = 0x10EE  # once Xilinx


def _way(folder: Path) -> list[str]:
    """From the host bridge to a function: "pci0000:00", "0000:00:03.1", ..."""
    parts = folder.parts
    first = next((n for n, part in enumerate(parts) if part.startswith("pci")), len(parts))
    return list(parts[first:])


def _last_address(folder: Path) -> str:
    return next((part for part in reversed(folder.parts) if _ADDRESS.fullmatch(part)), "")


def _namespaces(controller: Path, root: Path) -> list[Path]:
    """Block devices of an NVMe controller. Of a drive with several ways to it, they are its subsystem's."""
    subsystems = root / "sys/class/nvme-subsystem"
    shared = [
        it for it in map(subsystems.joinpath, names(subsystems)) if (it / controller.name).exists()
    ]
    return [
        folder / name
        for folder in (controller, *shared)
        for name in names(folder)
        if re.fullmatch(r"nvme\d+n\d+", name)
    ]


def _bytes_of(block: Path) -> int:
    return 512 * _number(read(block / "size"))  # whatever its own blocks are


def _disks(block: Path) -> set[str]:
    """Of a block device: what it is part of, or made of."""
    if (block / "partition").exists():
        return _disks(block.parent)
    under = names(block / "slaves")
    if not under:
        return {block.name}
    return set().union(*(_disks((block / "slaves" / name).resolve()) for name in under))


def names(folder: Path) -> list[str]:
    """What is in a directory; nothing where there is none."""
    try:
        found = os.listdir(folder)
    except OSError:
        return []
    return sorted(found, key=lambda name: (len(name), name))  # nvme10 after nvme9


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0


def _unescaped(text: str) -> str:
    r"""A path of mountinfo, where a blank is \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
