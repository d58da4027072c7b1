# SPDX-License-Identifier: Apache-2.0
"""xclbin files: what v++ writes for a card, and XRT loads onto it.

An xclbin is a header and a list of sections. Of these this module knows the ones that say what is on the
card: the kernels and their arguments (XML), the compute units and where their registers are, the memory
banks, which argument reaches which bank, and the clocks. Other sections are kept as bytes.

Source: the structures of `xclbin.h` as XRT publishes them for drivers and tools
(github.com/Xilinx/XRT, src/runtime_src/core/include/xclbin.h, also in Debian's libxrt-dev).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
import enum
import os
from pathlib import Path
import struct
from typing import NamedTuple
import uuid as uuids
from xml.etree import ElementTree

from . import abi
from .vitis.boards import Board
from .vitis.interface import CONTROL, NAME, PROTOCOL, VLNV, Argument, Kernel, KernelPort
from .vitis.interface import arguments as argument_list

_MAGIC = b"xclbin2\0"
# Signature length, 28 reserved bytes, key block, unique id, which come before the header.
_PREFIX = struct.Struct("<8si28s256sQ")
# length, timestamp, feature ROM timestamp, patch, major, minor, mode, action mask, platform's uuid,
# platform's name, uuid, debug file, number of sections
_HEADER = struct.Struct("<QQQHBBHH16s64s16s16sI4x")
_SECTION = struct.Struct("<I16s4xQQ")
_COUNT = struct.Struct("<i4x")
_MEMORY = struct.Struct("<BB6xQQ16s")
_UNIT = struct.Struct("<IIQ64s")
_CONNECTIONS = struct.Struct("<i")
_CONNECTION = struct.Struct("<iii")
_CLOCKS = struct.Struct("<h")
_CLOCK = struct.Struct("<HB5x128s")

_IP_KERNEL = 1  # `m_type` of a compute unit
_INTERRUPT = 1  # of its properties; the number of the interrupt is in bits 1 .. 7
_ALIGN_BYTES = 8  # of sections in the file


class Kind(enum.IntEnum):
    """Of a section: those that are read here, and the others that v++ 2021.1 to 2023.1 write."""

    BITSTREAM = 0
    EMBEDDED_METADATA = 2
    DEBUG_DATA = 4
    MEM_TOPOLOGY = 6
    CONNECTIVITY = 7
    IP_LAYOUT = 8
    DEBUG_IP_LAYOUT = 9
    CLOCK_FREQ_TOPOLOGY = 11
    BUILD_METADATA = 14
    KEYVALUE_METADATA = 15
    USER_METADATA = 16
    PARTITION_METADATA = 20
    EMULATION_DATA = 21
    SYSTEM_METADATA = 22
    GROUP_TOPOLOGY = 26
    GROUP_CONNECTIVITY = 27


class MemoryType(enum.IntEnum):
    DDR3 = 0
    DDR4 = 1
    DRAM = 2
    STREAMING = 3
    PREALLOCATED = 4
    ARE = 5
    HBM = 6
    BRAM = 7
    URAM = 8
    STREAMING_CONNECTION = 9
    HOST = 10


class Control(enum.IntEnum):
    """How a compute unit is started."""

    AP_CTRL_HS = 0
    AP_CTRL_CHAIN = 1
    AP_CTRL_NONE = 2


class ClockType(enum.IntEnum):
    UNUSED = 0
    DATA = 1
    KERNEL = 2
    SYSTEM = 3


class XclbinError(ValueError):
    """A file is not an xclbin, is cut off, or contradicts itself."""


class Section(NamedTuple):
    kind: int  # a `Kind`, or one that is not in there
    data: bytes
    name: str = ""


@dataclass(frozen=True)
class Memory:
    """A bank. Its index is what XRT calls a memory group, and what a buffer is allocated in."""

    tag: str  # at most 15 bytes
    type: MemoryType | int
    base: int
    nbytes: int  # whole KiB
    used: bool = True


@dataclass(frozen=True)
class Unit:
    """A compute unit: one instance of a kernel."""

    kernel: str
    name: str
    base: int  # of its registers
    control: Control | int = Control.AP_CTRL_HS
    interrupt: int | None = None  # its number, if it has one


@dataclass(frozen=True)
class Connection:
    """An argument of a compute unit reaches a bank. All three are indices."""

    argument: int
    unit: int
    memory: int


@dataclass(frozen=True)
class Clock:
    name: str
    type: ClockType | int
    mhz: int


@dataclass
class Xclbin:
    """An xclbin file.

    Attributes
    ----------
    platform : str
        Name of the platform it was linked for (vendor:board:name:version, or with underscores).
    uuid : UUID
        Of this xclbin: XRT loads it only if another one is on the card.
    sections : list of Section
    platform_uuid : UUID
    timestamp : int
        Seconds since 1970.
    version : (major, minor, patch)
        Of the tools.
    """

    platform: str
    uuid: uuids.UUID
    sections: list[Section] = field(default_factory=list)
    platform_uuid: uuids.UUID = uuids.UUID(int=0)
    timestamp: int = 0
    version: tuple[int, int, int] = (2, 13, 0)
    _mode: int = 0  # XCLBIN_FLAT
    _feature_rom: int = 0
    _prefix: tuple[int, bytes, bytes, int] = (-1, b"\xff" * 28, bytes(256), 0)
    _rest: tuple[int, bytes] = (0, bytes(16))  # action mask, name of the debug file

    # --- the file ----------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Xclbin":
        """Read a file.

        Raises
        ------
        OSError
        XclbinError
            If it is not an xclbin, or is damaged; the message names the file.
        """
        try:
            return cls.unpack(Path(path).read_bytes())
        except XclbinError as error:
            raise XclbinError(f"{path}: {error}") from error

    @classmethod
    def unpack(cls, data: bytes) -> "Xclbin":
        """From the bytes of a file. Raises XclbinError."""
        if data[: len(_MAGIC)] != _MAGIC:
            raise XclbinError(
                f"no xclbin: it must begin with {_MAGIC!r}, not {bytes(data[: len(_MAGIC)])!r}"
            )
        if len(data) < _PREFIX.size + _HEADER.size:
            raise XclbinError(f"cut off: {len(data)} bytes do not hold the header of an xclbin")
        _, *prefix = _PREFIX.unpack_from(data)
        (length, timestamp, feature_rom, patch, major, minor, mode, action, platform_uuid, platform,
         uuid, debug, n_sections) = _HEADER.unpack_from(data, _PREFIX.size)  # fmt: skip
        at = _PREFIX.size + _HEADER.size
        if length > len(data) or at + n_sections * _SECTION.size > len(data):
            raise XclbinError(f"cut off: it has {len(data)} of {length} bytes")
        sections = []
        for index in range(n_sections):
            kind, name, offset, nbytes = _SECTION.unpack_from(data, at + index * _SECTION.size)
            if offset + nbytes > len(data):
                raise XclbinError(
                    f"cut off: section {index} ({kind_name(kind)}) ends at byte {offset + nbytes}, the "
                    f"file at {len(data)}"
                )
            sections.append(Section(kind, bytes(data[offset : offset + nbytes]), _text(name)))
        return cls(
            platform=_text(platform),
            uuid=uuids.UUID(bytes=uuid),
            sections=sections,
            platform_uuid=uuids.UUID(bytes=platform_uuid),
            timestamp=timestamp,
            version=(major, minor, patch),
            _mode=mode,
            _feature_rom=feature_rom,
            _prefix=(prefix[0], prefix[1], prefix[2], prefix[3]),
            _rest=(action, debug),
        )

    def pack(self) -> bytes:
        """The bytes of the file."""
        at = _PREFIX.size + _HEADER.size + len(self.sections) * _SECTION.size
        headers, bodies = [], []
        for section in self.sections:
            padding = -at % _ALIGN_BYTES
            bodies += [bytes(padding), section.data]
            at += padding
            headers.append(
                _SECTION.pack(section.kind, _bytes(section.name, 16), at, len(section.data))
            )
            at += len(section.data)
        major, minor, patch = self.version
        action, debug = self._rest
        header = _HEADER.pack(
            at, self.timestamp, self._feature_rom, patch, major, minor, self._mode, action,
            self.platform_uuid.bytes, _bytes(self.platform, 64), self.uuid.bytes, debug,
            len(self.sections),
        )  # fmt: skip
        return b"".join([_PREFIX.pack(_MAGIC, *self._prefix), header, *headers, *bodies])

    def write(self, path: str | os.PathLike) -> None:
        Path(path).write_bytes(self.pack())

    # --- what it says ------------------------------------------------------------------------------

    def section(self, *kinds: Kind) -> bytes | None:
        """The bytes of the first section of the first kind that is there; None if there is none."""
        for kind in kinds:
            for section in self.sections:
                if section.kind == kind:
                    return section.data
        return None

    @property
    def memories(self) -> list[Memory]:
        """The banks, as XRT numbers them: by the grouped section where there is one."""
        data = self.section(Kind.GROUP_TOPOLOGY, Kind.MEM_TOPOLOGY)
        return [
            Memory(_text(tag), _enum(MemoryType, kind), base, size << 10, bool(used))
            for kind, used, size, base, tag in _array(data, _COUNT, _MEMORY, "memory banks")
        ]

    @property
    def units(self) -> list[Unit]:
        """The compute units, by their index in IP_LAYOUT. Other IPs are left out."""
        return [unit for unit in self._units() if unit is not None]

    def _units(self) -> list[Unit | None]:
        found: list[Unit | None] = []
        for kind, properties, base, name in _array(
            self.section(Kind.IP_LAYOUT), _COUNT, _UNIT, "compute units"
        ):
            kernel, _, unit = _text(name).partition(":")
            interrupt = (properties >> 1) & 0x7F if properties & _INTERRUPT else None
            control = _enum(Control, (properties >> 8) & 0xFF)
            found.append(
                Unit(kernel, unit, base, control, interrupt) if kind == _IP_KERNEL else None
            )
        return found

    @property
    def connections(self) -> list[Connection]:
        """Which argument of which unit reaches which bank; `memory` counts as in `memories`."""
        data = self.section(Kind.GROUP_CONNECTIVITY, Kind.CONNECTIVITY)
        found = [Connection(*it) for it in _array(data, _CONNECTIONS, _CONNECTION, "connections")]
        n_memories = len(self.memories)
        for it in found:
            if not 0 <= it.memory < n_memories:
                raise XclbinError(f"a connection to memory bank {it.memory} of {n_memories}")
        return found

    @property
    def clocks(self) -> list[Clock]:
        data = self.section(Kind.CLOCK_FREQ_TOPOLOGY)
        return [
            Clock(_text(name), _enum(ClockType, kind), mhz)
            for mhz, kind, name in _array(data, _CLOCKS, _CLOCK, "clocks")
        ]

    @property
    def kernels(self) -> list[Kernel]:
        """Raises XclbinError if the XML cannot be understood."""
        data = self.section(Kind.EMBEDDED_METADATA)
        if data is None:
            return []
        try:
            root = ElementTree.fromstring(data.rstrip(b"\0"))
            return [_kernel(it) for it in root.findall("platform/device/core/kernel")]
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise XclbinError(f"section EMBEDDED_METADATA cannot be understood: {error}") from error

    def banks_of(self, unit: Unit, argument: int) -> list[int]:
        """Indices of the banks that an argument of a unit reaches. XRT allocates in the last one."""
        index = self._units().index(unit)
        return sorted(
            it.memory for it in self.connections if (it.unit, it.argument) == (index, argument)
        )


def kind_name(kind: int) -> str:
    """Of a section."""
    return Kind(kind).name if kind in set(Kind) else f"kind {kind}"


def _array(data: bytes | None, head: struct.Struct, item: struct.Struct, what: str):
    if data is None:
        return []
    if len(data) < head.size:
        raise XclbinError(f"cut off: the section of {what} has {len(data)} bytes")
    (count,) = head.unpack_from(data)
    if count < 0 or head.size + count * item.size > len(data):
        raise XclbinError(f"the section of {what} has {len(data)} bytes, too few for {count}")
    return [item.unpack_from(data, head.size + index * item.size) for index in range(count)]


def _kernel(element: ElementTree.Element) -> Kernel:
    arguments = {}
    for it in element.findall("arg"):
        if it.attrib["id"]:
            arguments[int(it.attrib["id"], 0)] = Argument(
                name=it.attrib["name"],
                pointer=int(it.attrib["addressQualifier"], 0) == 1,
                port=it.attrib.get("port", ""),
                size=int(it.attrib["size"], 0),
                offset=int(it.attrib["offset"], 0),
                type=it.attrib.get("type", ""),
            )
    name = element.attrib["name"]
    if sorted(arguments) != list(range(len(arguments))):
        raise XclbinError(f"the arguments of kernel {name} are not numbered 0, 1 ..")
    return Kernel(
        name=name,
        vlnv=element.attrib.get("vlnv", ""),
        protocol=element.attrib.get("hwControlProtocol", ""),
        interrupt=element.attrib.get("interrupt") == "true",
        ports=tuple(
            KernelPort(
                it.attrib["name"],
                it.attrib["mode"],
                int(it.attrib["range"], 0),
                int(it.attrib.get("dataWidth", "0"), 0),
            )
            for it in element.findall("port")
        ),
        arguments=tuple(arguments[index] for index in range(len(arguments))),
    )


def _enum(kind: type[enum.IntEnum], value: int) -> int:
    return kind(value) if value in set(kind) else value


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", "replace")


def _bytes(text: str, size: int) -> bytes:
    data = text.encode()
    if len(data) >= size:
        raise XclbinError(f"{text!r} must be shorter than {size} bytes")
    return data


# --- the xclbin of a card that does not exist ---------------------------------------------------------

# Where a SmartSSD has its bank and the registers of its compute units, an xclbin of it says.
_BASE = {"bank0": 0x40_0000_0000}
_UNIT_BASE, _UNIT_BYTES = 0x181_0000, 0x1_0000


def kernel_of_abi() -> Kernel:
    """The kernel as `abi.REGISTERS` has it; what `Kernel.of` reads from the Verilog is the same."""
    registers = [register for register in abi.REGISTERS if register.writable]
    masters = dict.fromkeys(it.port for it in registers if it.port != CONTROL)
    return Kernel(
        name=NAME,
        vlnv=VLNV,
        protocol=PROTOCOL,
        interrupt=True,
        ports=(
            KernelPort(CONTROL, "slave", abi.CONTROL_BYTES, 32),
            *(KernelPort(name, "master", (1 << 64) - 1, 8 * abi.BEAT_BYTES) for name in masters),
        ),
        arguments=argument_list(),
    )


def memories_of(board: Board) -> list[Memory]:
    """The banks of a board's engines, one for each, as far apart as they are large."""
    memories, base = [], 0
    for engine in board.engines:
        kind = MemoryType.HBM if engine.memory.startswith("HBM") else MemoryType.DDR4
        nbytes = engine.memory_mib << 20
        memories.append(Memory(engine.memory, kind, _BASE.get(engine.memory, base), nbytes))
        base += nbytes
    return memories


def simulated(board: Board, memories: Sequence[Memory] | None = None) -> Xclbin:
    """An xclbin without a bitstream, for simulated cards and for tests.

    Parameters
    ----------
    board : Board
        There is a compute unit for each of its engines.
    memories : sequence of Memory, optional
        The bank of each engine, and any number of others. Default: `memories_of(board)`.
    """
    memories = memories_of(board) if memories is None else memories
    n_units = len(board.engines)
    units = [
        Unit(NAME, f"{NAME}_{n + 1}", _UNIT_BASE + n * _UNIT_BYTES, interrupt=n)
        for n in range(n_units)
    ]
    # In an xclbin ports and arguments are not wrapped as in kernel.xml.
    whole = ElementTree.fromstring(kernel_of_abi().xml().encode())[0]
    kernel = ElementTree.Element("kernel", whole.attrib)
    kernel.extend([*whole.iter("port"), *whole.iter("arg")])
    for unit in units:
        instance = ElementTree.SubElement(kernel, "instance", name=unit.name)
        ElementTree.SubElement(
            instance, "addrRemap",
            base=hex(unit.base), range=hex(_UNIT_BYTES), port="S_AXI_CONTROL",
        )  # fmt: skip
    project = ElementTree.Element("project", name=NAME)
    device = ElementTree.SubElement(
        ElementTree.SubElement(project, "platform", vendor="xilinx", name=board.platform),
        "device", name="fpga0", fpgaDevice=board.part,
    )  # fmt: skip
    core = ElementTree.SubElement(
        device, "core", name="OCL_REGION_0", target="hw", type="clc_region"
    )
    clocks = ElementTree.SubElement(core, "kernelClocks")
    ElementTree.SubElement(clocks, "clock", port="KERNEL_CLK", frequency=f"{board.kernel_mhz}MHz")
    core.append(kernel)
    connections = [
        Connection(index, unit, unit)
        for unit in range(n_units)
        for index, argument in enumerate(argument_list())
        if argument.pointer
    ]
    text = ElementTree.tostring(project, xml_declaration=True, encoding="utf-8")
    clock = Clock("DATA_CLK", ClockType.DATA, board.kernel_mhz)
    sections = [
        Section(Kind.EMBEDDED_METADATA, text),
        Section(Kind.MEM_TOPOLOGY, pack_memories(memories), "mem_topology"),
        Section(Kind.CONNECTIVITY, pack_connections(connections), "connectivity"),
        Section(Kind.IP_LAYOUT, pack_units(units), "ip_layout"),
        Section(Kind.CLOCK_FREQ_TOPOLOGY, pack_clocks([clock]), "clocks"),
    ]
    # Another content is another xclbin, as far as XRT is concerned.
    content = b"".join(section.data for section in sections).hex()
    return Xclbin(board.platform, uuids.uuid5(uuids.NAMESPACE_URL, content), sections)


def pack_memories(memories: Sequence[Memory]) -> bytes:
    """Of a section MEM_TOPOLOGY or GROUP_TOPOLOGY."""
    return _COUNT.pack(len(memories)) + b"".join(
        _MEMORY.pack(it.type, it.used, it.nbytes >> 10, it.base, _bytes(it.tag, 16))
        for it in memories
    )


def pack_units(units: Sequence[Unit]) -> bytes:
    """Of a section IP_LAYOUT."""
    return _COUNT.pack(len(units)) + b"".join(
        _UNIT.pack(
            _IP_KERNEL,
            it.control << 8 | (0 if it.interrupt is None else it.interrupt << 1 | _INTERRUPT),
            it.base,
            _bytes(f"{it.kernel}:{it.name}", 64),
        )
        for it in units
    )


def pack_connections(connections: Sequence[Connection]) -> bytes:
    """Of a section CONNECTIVITY or GROUP_CONNECTIVITY."""
    return _CONNECTIONS.pack(len(connections)) + b"".join(
        _CONNECTION.pack(it.argument, it.unit, it.memory) for it in connections
    )


def pack_clocks(clocks: Sequence[Clock]) -> bytes:
    """Of a section CLOCK_FREQ_TOPOLOGY."""
    return _CLOCKS.pack(len(clocks)) + b"".join(
        _CLOCK.pack(it.mhz, it.type, _bytes(it.name, 128)) for it in clocks
    )
