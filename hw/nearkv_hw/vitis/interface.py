# SPDX-License-Identifier: Apache-2.0
"""The kernel as Vitis sees it: the ports of the Verilog, its buses, and kernel.xml.

`read_ports` reads them from the Verilog itself, `Interface` groups them into buses and refuses what
Vitis would refuse hours later, `Kernel` is what kernel.xml says, made from both and `nearkv_hw.abi`.

# Ref: AMD UG1393 and UG1700, "RTL Kernel Interface Requirements": names and kinds of ports; every port
#   belongs to an interface; 64-bit addresses; "Control Requirements for XRT-Managed Kernels"; "Interrupt"
# Ref: AMD UG1702, "RTL Kernel XML File"
# Ref: Xilinx/Vitis_Accel_Examples, rtl_kernels/*: port names, and the same file as v++ 2019.2 took it
# Ref: ARM IHI 0022 (AXI4): which signals a channel has, and how wide they are
"""

from collections import defaultdict
from dataclasses import dataclass
import re
from xml.etree import ElementTree

from .. import abi

NAME = "nearkv"  # of the top module, the IP and the kernel
VENDOR, LIBRARY, VERSION = "nearkv", "kernel", "1.0"
VLNV = f"{VENDOR}:{LIBRARY}:{NAME}:{VERSION}"
PROTOCOL = "ap_ctrl_hs"
CLOCK, RESET, INTERRUPT, CONTROL = "ap_clk", "ap_rst_n", "interrupt", "s_axi_control"


# --- ports of the Verilog -----------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|\(\*(?!\s*\)).*?\*\))  # an attribute, but not @(*)
    |(?P<string>"(?:\\.|[^"\\])*")
    |(?P<word>\\\S+|[A-Za-z_][\w$]*)
    |(?P<other>.)""",
    re.S | re.X,
)
_DIRECTIONS = ("input", "output", "inout")
_KINDS = ("wire", "reg", "logic", "tri", "signed")
# Bodies whose `input` is not the module's.
_INNER = {"function": "endfunction", "task": "endtask"}


@dataclass(frozen=True)
class Port:
    """One port of the top module. `direction` is input, output or inout."""

    direction: str
    bits: int


def read_ports(text: str, module: str = NAME) -> dict[str, Port]:
    """The ports of a module of Verilog-2005, in the order of its header.

    Both styles of port declaration are read. Widths must be plain numbers.

    Raises
    ------
    ValueError
        If the module is not there, or a port's declaration is missing or not understood.
    """
    tokens = _words(text)
    for token in tokens:
        if token == "module" and next(tokens, "").lstrip("\\") == module:
            break
    else:
        raise ValueError(f"the Verilog has no module {module!r}")
    header = _until(tokens, ";")
    if header[:1] == ["#"]:
        raise ValueError(f"module {module} has parameters; a kernel's widths must be plain numbers")
    if header[:1] != ["("] or header[-1:] != [")"]:
        raise ValueError(f"the header of module {module} is not understood: {' '.join(header)}")
    ports: dict[str, Port] = {}
    if any(word in _DIRECTIONS for word in header):
        _declare(header[1:-1], ports)
        return ports
    listed = [word.lstrip("\\") for word in header[1:-1] if word != ","]
    if twice := {name for name in listed if listed.count(name) > 1}:
        raise ValueError(f"the header of module {module} lists twice: {sorted(twice)}")
    start = True
    for token in tokens:
        if token == "endmodule":
            break
        if start and token in _DIRECTIONS:
            _declare([token, *_until(tokens, ";")], ports)
            continue
        if token in _INNER:
            _until(tokens, _INNER[token])
        start = token in (";", "end", *_INNER)
    if missing := set(listed) ^ set(ports):
        raise ValueError(
            f"listed in the header of module {module} or declared in it, but not both: "
            f"{', '.join(sorted(missing))}"
        )
    return {name: ports[name] for name in listed}


def _words(text: str):
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            yield match[0]


def _until(tokens, end: str) -> list[str]:
    """What comes before the next `end`, which is taken too."""
    words = []
    for token in tokens:
        if token == end:
            return words
        words.append(token)
    raise ValueError(f"the Verilog ends where {end!r} is expected")


def _declare(words: list[str], ports: dict[str, Port]) -> None:
    """Read `input [7:0] a, b, output c`."""
    direction, bits = None, 1
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word in _DIRECTIONS:
            direction, bits = word, 1
        elif word == "[":
            end = words.index("]", at)
            # The tokens of `63:0` are its characters.
            plain = re.fullmatch(r"(\d+):(\d+)", "".join(words[at:end]))
            if plain is None:
                raise ValueError(
                    f"the width [{''.join(words[at:end])}] of a port is no plain number"
                )
            bits, at = abs(int(plain[1]) - int(plain[2])) + 1, end + 1
        elif word not in (",", *_KINDS):
            name = word.lstrip("\\")
            if direction is None or not re.fullmatch(r"[A-Za-z_][\w$]*", name) or name in ports:
                raise ValueError(f"the declaration of a port is not understood at {word!r}")
            ports[name] = Port(direction, bits)


# --- buses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bus:
    """One AXI interface of the kernel."""

    name: str
    mode: str  # "slave", the AXI4-Lite control, or "master"
    address_bits: int
    data_bits: int
    reads: bool
    writes: bool


# Field of a channel: whether its source is the manager, the widths allowed (None: any), and
# whether Vitis needs it. AXI4 has more than AXI4-Lite.
_HANDSHAKE = {"valid": (True, (1,), True), "ready": (False, (1,), True)}
_ADDRESS_LITE = {"addr": (True, None, True), "prot": (True, (3,), False), **_HANDSHAKE}
_ADDRESS = {
    **_ADDRESS_LITE,
    "id": (True, None, False), "len": (True, (8,), True), "size": (True, (3,), False),
    "burst": (True, (2,), False), "lock": (True, (1, 2), False), "cache": (True, (4,), False),
    "qos": (True, (4,), False), "region": (True, (4,), False), "user": (True, None, False),
}  # fmt: skip
_BACK = {"valid": (False, (1,), True), "ready": (True, (1,), True)}
_LITE = {
    "aw": _ADDRESS_LITE,
    "w": {"data": (True, (32,), True), "strb": (True, (4,), True), **_HANDSHAKE},
    "b": {"resp": (False, (2,), True), **_BACK},
    "ar": _ADDRESS_LITE,
    "r": {"data": (False, (32,), True), "resp": (False, (2,), True), **_BACK},
}
_FULL = {
    "aw": _ADDRESS,
    "w": {"data": (True, None, True), "strb": (True, None, True), "last": (True, (1,), True),
          "user": (True, None, False), **_HANDSHAKE},
    "b": {"id": (False, None, False), "resp": (False, (2,), True), "user": (False, None, False),
          **_BACK},
    "ar": _ADDRESS,
    "r": {"id": (False, None, False), "data": (False, None, True), "resp": (False, (2,), True),
          "last": (False, (1,), True), "user": (False, None, False), **_BACK},
}  # fmt: skip
_SIGNAL = re.compile(r"(?P<bus>s_axi_\w+?|m_axi_\w+?)_(?P<channel>aw|ar|w|b|r)(?P<field>[a-z]+)",
                     re.I)  # fmt: skip


@dataclass(frozen=True)
class Interface:
    """What the ports of a kernel are to Vitis."""

    control: Bus
    masters: tuple[Bus, ...]
    interrupt: bool

    @property
    def buses(self) -> tuple[Bus, ...]:
        return (self.control, *self.masters)

    @classmethod
    def of(cls, ports: dict[str, Port]) -> "Interface":
        """Group the ports of a kernel.

        Raises
        ------
        ValueError
            With everything that Vitis, or our register map, would not accept.
        """
        wrong: list[str] = []
        rest, signals = {}, defaultdict(lambda: defaultdict(dict))
        for name, port in ports.items():
            match = _SIGNAL.fullmatch(name)
            if match:
                bus, channel, field = match["bus"], match["channel"].lower(), match["field"].lower()
                signals[bus][channel][field] = port
            else:
                rest[name] = port
        for name, direction, needed in (
            (CLOCK, "input", True), (RESET, "input", True), (INTERRUPT, "output", False)
        ):  # fmt: skip
            port = rest.pop(name, None)
            if port is None:
                wrong += [f"{name} is missing"] if needed else []
            elif port != Port(direction, 1):
                wrong.append(f"{name} must be an {direction} of 1 bit, not {port.direction} of "
                             f"{port.bits}")  # fmt: skip
        wrong += [f"{name} belongs to no interface" for name in rest]
        buses = {name: _bus(name, channels, wrong) for name, channels in signals.items()}
        slaves = [name for name in buses if name.startswith("s_axi")]
        if slaves != [CONTROL]:
            wrong.append(f"the one AXI4-Lite slave must be {CONTROL}, not {slaves or 'missing'}")
        elif 1 << buses[CONTROL].address_bits < abi.CONTROL_BYTES:
            wrong.append(f"{CONTROL} needs {abi.CONTROL_BYTES} bytes of addresses")
        masters = {name: bus for name, bus in buses.items() if name not in slaves}
        wanted = {register.port for register in abi.REGISTERS if register.port != CONTROL}
        if masters.keys() != wanted:
            wrong.append(f"the AXI4 masters must be {sorted(wanted)}, not {sorted(masters)}")
        for bus in masters.values():
            if bus.data_bits != 8 * abi.BEAT_BYTES:
                wrong.append(
                    f"{bus.name} must be {8 * abi.BEAT_BYTES} bits wide, not {bus.data_bits}"
                )
            if bus.address_bits != 64:
                wrong.append(f"{bus.name} must have addresses of 64 bits, not {bus.address_bits}")
        if wrong:
            raise ValueError(
                "the Verilog's ports are not a Vitis kernel's:\n  " + "\n  ".join(wrong)
            )
        order = [r.port for r in abi.REGISTERS if r.port in masters]
        return cls(buses[CONTROL], tuple(masters[name] for name in order), INTERRUPT in ports)


def _bus(name: str, channels: dict[str, dict[str, Port]], wrong: list[str]) -> Bus:
    """Check the signals of one bus, and sum them up."""
    master = name.startswith("m_axi")
    rules = _FULL if master else _LITE
    reads, writes = "ar" in channels or "r" in channels, bool({"aw", "w", "b"} & channels.keys())
    wanted = {"aw", "w", "b", "ar", "r"} if not master else set()
    wanted |= {"ar", "r"} if reads else set()
    wanted |= {"aw", "w", "b"} if writes else set()
    for channel in sorted(wanted):
        given, rule = channels.get(channel, {}), rules[channel]
        for field in [f for f, (_, _, needed) in rule.items() if needed and f not in given]:
            wrong.append(f"{name}_{channel}{field} is missing")
        for field, port in given.items():
            if field not in rule:
                wrong.append(
                    f"{name}_{channel}{field} is no signal of AXI4{'' if master else '-Lite'}"
                )
                continue
            by_manager, widths, _ = rule[field]
            direction = "output" if by_manager == master else "input"
            if port.direction != direction:
                wrong.append(f"{name}_{channel}{field} must be an {direction}")
            if widths is not None and port.bits not in widths:
                wrong.append(f"{name}_{channel}{field} must have {' or '.join(map(str, widths))} "
                             f"bits, not {port.bits}")  # fmt: skip

    def bits(field, *of) -> int:
        """The width of a field that these channels share."""
        widths = {channels[c][field].bits for c in of if field in channels.get(c, {})}
        if len(widths) > 1:
            wrong.append(f"{name}: {field} has different widths: {sorted(widths)}")
        return max(widths, default=0)

    data_bits = bits("data", "w", "r")
    if master and data_bits and (data_bits & (data_bits - 1) or not 32 <= data_bits <= 1024):
        wrong.append(f"{name} must be a power of two of 32 to 1024 bits wide, not {data_bits}")
    if "strb" in channels.get("w", {}) and 8 * channels["w"]["strb"].bits != data_bits:
        wrong.append(f"{name}_wstrb must have a bit for each byte of {data_bits} bits")
    for asked, answered in (("ar", "r"), ("aw", "b")):
        ids = {channels[c]["id"].bits if "id" in channels[c] else 0
               for c in (asked, answered) if c in channels}  # fmt: skip
        if len(ids) > 1:
            wrong.append(f"{name}: {asked}id and {answered}id must be there together, equally wide")
    return Bus(name, "master" if master else "slave", bits("addr", "aw", "ar"), data_bits, reads,
               writes)  # fmt: skip


# --- kernel.xml ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelPort:
    """A bus in kernel.xml. `range_bytes`: of addresses behind it."""

    name: str
    mode: str
    range_bytes: int
    data_bits: int


@dataclass(frozen=True)
class Argument:
    """An argument in kernel.xml; its place among them is its index in XRT."""

    name: str
    pointer: bool
    port: str
    size: int  # bytes
    offset: int  # of its register
    type: str


@dataclass(frozen=True)
class Kernel:
    """What kernel.xml says."""

    name: str
    vlnv: str
    protocol: str
    interrupt: bool
    ports: tuple[KernelPort, ...]
    arguments: tuple[Argument, ...]

    @classmethod
    def of(cls, interface: Interface) -> "Kernel":
        """The kernel that these ports and `abi.REGISTERS` make."""
        return cls(
            name=NAME,
            vlnv=VLNV,
            protocol=PROTOCOL,
            interrupt=interface.interrupt,
            ports=tuple(
                KernelPort(
                    bus.name,
                    bus.mode,
                    abi.CONTROL_BYTES if bus.mode == "slave" else (1 << bus.address_bits) - 1,
                    bus.data_bits,
                )
                for bus in interface.buses
            ),  # fmt: skip
            arguments=arguments(),
        )

    def xml(self) -> str:
        """The text of kernel.xml."""
        root = ElementTree.Element("root", versionMajor="1", versionMinor="6")
        kernel = ElementTree.SubElement(
            root, "kernel", name=self.name, language="ip_c", vlnv=self.vlnv, attributes="",
            preferredWorkGroupSizeMultiple="0", workGroupSize="1",
            interrupt="true" if self.interrupt else "false", hwControlProtocol=self.protocol,
        )  # fmt: skip
        ports = ElementTree.SubElement(kernel, "ports")
        for port in self.ports:
            ElementTree.SubElement(
                ports, "port", name=port.name, mode=port.mode, range=f"0x{port.range_bytes:X}",
                dataWidth=str(port.data_bits), portType="addressable", base="0x0",
            )  # fmt: skip
        args = ElementTree.SubElement(kernel, "args")
        for index, argument in enumerate(self.arguments):
            ElementTree.SubElement(
                args, "arg", name=argument.name, addressQualifier=str(int(argument.pointer)),
                id=str(index), port=argument.port, size=f"0x{argument.size:X}",
                offset=f"0x{argument.offset:03X}", type=argument.type, hostOffset="0x0",
                hostSize=f"0x{argument.size:X}",
            )  # fmt: skip
        ElementTree.indent(root)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            + ElementTree.tostring(root, "unicode")
            + "\n"
        )

    @classmethod
    def from_xml(cls, text: str) -> "Kernel":
        """Read kernel.xml back.

        Raises
        ------
        ValueError
            If it is not the file that UG1702 describes.
        """
        try:
            root = ElementTree.fromstring(text.encode())
            (kernel,) = root.findall("kernel")
            (ports,), (args,) = kernel.findall("ports"), kernel.findall("args")
            if [arg.attrib["id"] for arg in args] != [str(i) for i in range(len(args))]:
                raise ValueError("the ids of its arguments do not count from 0")
            if any(arg.attrib["hostSize"] != arg.attrib["size"] for arg in args):
                raise ValueError("an argument has another size for the host")
            return cls(
                name=kernel.attrib["name"],
                vlnv=kernel.attrib["vlnv"],
                protocol=kernel.attrib["hwControlProtocol"],
                interrupt={"true": True, "false": False}[kernel.attrib["interrupt"]],
                ports=tuple(
                    KernelPort(
                        port.attrib["name"], port.attrib["mode"], int(port.attrib["range"], 0),
                        int(port.attrib["dataWidth"]),
                    )
                    for port in ports
                ),
                arguments=tuple(
                    Argument(
                        arg.attrib["name"],
                        {"0": False, "1": True}[arg.attrib["addressQualifier"]],
                        arg.attrib["port"], int(arg.attrib["size"], 0),
                        int(arg.attrib["offset"], 0), arg.attrib["type"],
                    )
                    for arg in args
                ),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"kernel.xml: missing or unknown: {error}") from error
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"kernel.xml: {error}") from error


def arguments() -> tuple[Argument, ...]:
    """The kernel's arguments, as `abi.REGISTERS` has them.

    The types are those that PYNQ's parser knows too: pointers, and `uint` for 32 bits.
    """
    return tuple(
        Argument(
            name=register.name,
            pointer=register.port != CONTROL,
            port=register.port,
            size=register.bits // 8,
            offset=register.offset,
            type="void*" if register.port != CONTROL else "uint",
        )
        for register in abi.REGISTERS
        if register.writable
    )
