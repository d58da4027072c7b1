# SPDX-License-Identifier: Apache-2.0
"""The files and commands that turn the Verilog into an xclbin for one board.

All paths in them are relative to the folder in which they run, so a recipe is the same wherever it
was made, and works there by hand: `vivado -mode batch -source package.tcl`, then the v++ command.

# Ref: Xilinx/Vitis_Accel_Examples, rtl_kernels/rtl_vadd_hw_debug/scripts/package_kernel.tcl, and the
#   package_kernel.tcl that the RTL kernel wizard of Vitis writes: the order of the packaging steps,
#   parameters of the masters, fields of CTRL
# Ref: Xilinx/Vitis-Tutorials, bottom_up_rtl_kernel: clock and reset inferred by name
# Ref: AMD UG1393, "package_xo Command", "Vitis Compiler Configuration File", "--connectivity Options",
#   "--vivado Options", "v++ General Options"; UG1702 has the same for later versions
# Ref: Xilinx/finn, transformation/fpgadataflow/vitis_build.py: v++ with RTL kernels on these boards;
#   its steps of physical optimisation
"""

from dataclasses import dataclass
import re

from .. import abi
from ..config import Config
from .boards import Board
from .interface import (
    CLOCK,
    CONTROL,
    INTERRUPT,
    LIBRARY,
    NAME,
    PROTOCOL,
    RESET,
    VENDOR,
    VERSION,
    VLNV,
    Interface,
    Kernel,
    arguments,
)  # fmt: skip

TARGETS = ("hw", "hw_emu")
VERILOG, CONSTRAINTS, PACKAGE, KERNEL_XML, LINK = (
    f"{NAME}.v", f"{NAME}_ooc.xdc", "package.tcl", "kernel.xml", "link.cfg",
)  # fmt: skip
XO = f"{NAME}.xo"
REPORTS, LOGS = "reports", "logs"

BURST_BEATS = abi.BURST_BYTES // abi.BEAT_BYTES
MOST_OUTSTANDING = 32  # bursts in flight that a master may announce, as the RTL kernel wizard does

# Bit, name, whether the host writes it. UG1393, "Control Requirements for XRT-Managed Kernels".
_CTRL_FIELDS = (
    (0, 1, "AP_START", True),
    (1, 1, "AP_DONE", False),
    (2, 1, "AP_IDLE", False),
    (3, 1, "AP_READY", False),
    (4, 28, "RESERVED", False),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that is needed to build for one board and target, but the Verilog.

    Attributes
    ----------
    files : dict of str to str
        Text of each file, by name.
    host : dict
        What a host program needs to address the card; part of the manifest.
    """

    board: Board
    target: str
    interface: Interface
    files: dict[str, str]
    host: dict

    @property
    def xclbin(self) -> str:
        return f"{NAME}.{self.target}.xclbin"

    @property
    def package_command(self) -> list[str]:
        return ["vivado", "-mode", "batch", "-notrace", "-nojournal", "-log",
                f"{LOGS}/package.log", "-source", PACKAGE]  # fmt: skip

    def link_command(self, platform: str) -> list[str]:
        """`platform` is the path of the platform's .xpfm file."""
        return ["v++", "--link", "--target", self.target, "--platform", platform, "--config", LINK,
                "--temp_dir", "link", "--log_dir", LOGS, "--report_dir", REPORTS, "--save-temps",
                "--output", self.xclbin, XO]  # fmt: skip

    def emulation_command(self, platform: str) -> list[str]:
        """Describes the card to XRT's emulation; for hw_emu only."""
        return ["emconfigutil", "--platform", platform, "--od", "."]

    def summary(self) -> dict:
        """The part of the recipe that is the same whatever the gateware: `recipe.json`."""
        return {
            "board": self.board.name,
            "title": self.board.title,
            "platform": self.board.platform,
            "part": self.board.part,
            "vitis": list(self.board.vitis),
            "config": self.board.config,
            "kernel_mhz": self.board.kernel_mhz,
            **self.host,
            "link": self.files[LINK].splitlines(),
            "commands": {
                "package": " ".join(self.package_command),
                "link": " ".join(self.link_command(f"{self.board.platform}.xpfm")),
            },
        }


def make(board: Board, target: str, interface: Interface, config: Config) -> Recipe:
    """The recipe of one board and target for a kernel with these ports.

    Raises
    ------
    ValueError
        If the target is none of TARGETS, or a file that was written does not read back.
    """
    if target not in TARGETS:
        raise ValueError(f"TARGET must be {' or '.join(TARGETS)}, not {target!r}; RTL kernels have "
                         "no software emulation")  # fmt: skip
    kernel = Kernel.of(interface)
    files = {
        KERNEL_XML: kernel.xml(),
        CONSTRAINTS: _constraints(board),
        PACKAGE: _package(board, interface, config),
        LINK: _link(board, target),
    }
    if Kernel.from_xml(files[KERNEL_XML]) != kernel:
        raise ValueError(f"{KERNEL_XML} does not read back as it was written")
    wanted = _connections(board)
    if (got := read_link(files[LINK])["connectivity"]) != wanted:
        raise ValueError(f"{LINK} reads back as {got}, not as {wanted}")
    return Recipe(board, target, interface, files, host(board))


def compute_units(board: Board) -> list[str]:
    """Their names, in the order of the engines. What v++ names them by itself: the separator of
    given names changed between its versions ('.' up to UG1393 2023.2, ',' in UG1702 2024.2)."""
    return [f"{NAME}_{i + 1}" for i in range(len(board.engines))]


def host(board: Board) -> dict:
    """What a host needs: compute units with their memories, arguments, and where to read what
    the card is. A board of several engines is one card of as many shards: pages of a sequence and
    KV head go to one of them, each has buffers of its own, and the partials are merged."""
    return {
        "kernel": NAME,
        "vlnv": VLNV,
        "control_protocol": PROTOCOL,
        "abi_version": abi.ABI_VERSION,
        "compute_units": [
            {
                "name": name,
                "xrt_name": f"{NAME}:{{{name}}}",
                "shard": shard,
                "memory": engine.memory,
                "memory_bytes": engine.memory_mib << 20,
                "slr": engine.slr,
            }
            for shard, (name, engine) in enumerate(
                zip(compute_units(board), board.engines, strict=True)
            )
        ],
        "arguments": [
            {
                "index": index,
                "name": argument.name,
                "kind": "buffer" if argument.pointer else "scalar",
                "port": argument.port,
                "offset": argument.offset,
                "bytes": argument.size,
            }
            for index, argument in enumerate(arguments())
        ],
        "constants": {r.name: r.offset for r in abi.REGISTERS if not r.writable},
    }


# --- v++ ----------------------------------------------------------------------------------------


def _connections(board: Board) -> dict[str, list[str]]:
    units = compute_units(board)
    pairs = list(zip(units, board.engines, strict=True))
    ports = list(dict.fromkeys(r.port for r in abi.REGISTERS if r.port != CONTROL))
    lines = {
        "nk": [f"{NAME}:{len(units)}"],
        "sp": [f"{unit}.{port}:{engine.memory}" for unit, engine in pairs for port in ports],
        "slr": [f"{unit}:SLR{engine.slr}" for unit, engine in pairs if engine.slr is not None],
    }
    return {key: values for key, values in lines.items() if values}


def _link(board: Board, target: str) -> str:
    lines = [
        f"# {board.title}: {len(board.engines)} x {NAME}. Written by nearkv_hw.vitis.",
        # Clock 0 is the one of ap_clk; v++ lowers it where timing is missed.
        f"kernel_frequency=0:{board.kernel_mhz}",
        "",
        "[connectivity]",
    ]
    lines += [f"{key}={value}" for key, values in _connections(board).items() for value in values]
    if target == "hw":
        lines += ["", "[vivado]"]
        lines += [
            f"prop=run.impl_1.STEPS.{step}"
            for step in (
                "OPT_DESIGN.ARGS.DIRECTIVE=Explore",
                "PLACE_DESIGN.ARGS.DIRECTIVE=Explore",
                "PHYS_OPT_DESIGN.IS_ENABLED=true",
                "PHYS_OPT_DESIGN.ARGS.DIRECTIVE=Explore",
                "ROUTE_DESIGN.ARGS.DIRECTIVE=Explore",
            )
        ]
    return "\n".join(lines) + "\n"


def read_link(text: str) -> dict[str, dict[str, list[str]]]:
    """A v++ configuration as {section: {key: values}}; what stands before the first section is
    section "".

    Raises
    ------
    ValueError
        On a line that is neither a comment, a section nor key=value.
    """
    sections: dict[str, dict[str, list[str]]] = {"": {}}
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
            sections.setdefault(section, {})
        elif match := re.fullmatch(r"([\w.]+)\s*=\s*(.+)", line):
            sections[section].setdefault(match[1], []).append(match[2])
        else:
            raise ValueError(f"{LINK}, line {number}: neither a section nor key=value: {line}")
    return sections


# --- Vivado -------------------------------------------------------------------------------------


def _constraints(board: Board) -> str:
    """The clock for a synthesis of the kernel alone; in the card the platform constrains it."""
    return (
        "# Out of context only: in the card, the platform constrains the clock.\n"
        f"create_clock -name {CLOCK} -period {1000 / board.kernel_mhz:.3f} [get_ports {CLOCK}]\n"
    )


def _package(board: Board, interface: Interface, config: Config) -> str:
    """The Tcl that packages the Verilog as an IP, and the IP as a kernel object."""
    lines = [
        f"# Packages {VERILOG} as the Vitis kernel {VLNV}. Written by nearkv_hw.vitis.",
        f"create_project -force {NAME}_package ./project -part {board.part}",
        f"add_files -norecurse ./{VERILOG}",
        f"add_files -fileset constrs_1 -norecurse ./{CONSTRAINTS}",
        f"set_property USED_IN {{synthesis implementation out_of_context}} [get_files {CONSTRAINTS}]",
        f"set_property top {NAME} [current_fileset]",
        "update_compile_order -fileset sources_1",
        f"ipx::package_project -root_dir ./ip -vendor {VENDOR} -library {LIBRARY} "
        "-taxonomy /KernelIP -import_files -set_current false",
        "ipx::unload_core ./ip/component.xml",
        "ipx::edit_ip_in_project -upgrade true -name edit -directory ./ip ./ip/component.xml",
        "set core [ipx::current_core]",
        f"set_property name {NAME} $core",
        f"set_property version {VERSION} $core",
        "set_property core_revision 1 $core",
        "foreach parameter [ipx::get_user_parameters] {",
        "  ipx::remove_user_parameter [get_property NAME $parameter] $core",
        "}",
        "",
        "# Clock, reset and interrupt have one wire each; buses are found by the names of their wires.",
        f"ipx::infer_bus_interface {CLOCK} xilinx.com:signal:clock_rtl:1.0 $core",
        f"ipx::infer_bus_interface {RESET} xilinx.com:signal:reset_rtl:1.0 $core",
    ]
    if interface.interrupt:
        lines.append(
            f"ipx::infer_bus_interface {INTERRUPT} xilinx.com:signal:interrupt_rtl:1.0 $core"
        )
    lines.append(f"ipx::associate_bus_interfaces -clock {CLOCK} -reset {RESET} $core")
    for bus in interface.buses:
        lines.append(f"ipx::associate_bus_interfaces -busif {bus.name} -clock {CLOCK} $core")
    lines += [
        f"set parameter [ipx::add_bus_parameter -quiet FREQ_HZ [ipx::get_bus_interfaces {CLOCK} "
        "-of_objects $core]]",
        f"set_property value {board.kernel_mhz * 1_000_000} $parameter",
        "set_property value_resolve_type user $parameter",
    ]
    for bus in interface.masters:
        lines += [
            "",
            f"set bus [ipx::get_bus_interfaces {bus.name} -of_objects $core]",
            "foreach {name value} {"
            + " ".join(f"{k} {v}" for k, v in bus_parameters(bus, config).items())
            + "} {",
            "  set parameter [ipx::add_bus_parameter -quiet $name $bus]",
            "  set_property value $value $parameter",
            "  set_property value_source constant $parameter",
            "}",
        ]
    lines += [
        "",
        f"set map [ipx::add_memory_map {CONTROL} $core]",
        "set block [ipx::add_address_block reg0 $map]",
        f"set_property range 0x{abi.CONTROL_BYTES:X} $block",
        f"set_property slave_memory_map_ref {CONTROL} [ipx::get_bus_interfaces {CONTROL} "
        "-of_objects $core]",
    ]
    lines += _registers(interface)
    lines += [
        "",
        "set_property supported_families {} $core",
        "set_property auto_family_support_level level_2 $core",
        "set_property sdx_kernel true $core",
        "set_property sdx_kernel_type rtl $core",
        "set_property ipi_drc {ignore_freq_hz true} $core",
        f"set_property vitis_drc {{ctrl_protocol {PROTOCOL}}} $core",
        "ipx::create_xgui_files $core",
        "ipx::update_checksums $core",
        "ipx::check_integrity -kernel $core",
        "ipx::save_core $core",
        "close_project -delete",
        f"package_xo -force -xo_path ./{XO} -kernel_name {NAME} -ip_directory ./ip "
        f"-kernel_xml ./{KERNEL_XML}",
    ]
    return "\n".join(lines) + "\n"


def bus_parameters(bus, config: Config) -> dict[str, int]:
    """What the interconnect should know of a master: AMD PG373 and PG247, "SmartConnect".

    The kv port asks for whole bursts as long as its FIFO has room for them; bursts of half the
    length, of short pages, are as many again.
    """
    values = {"MAX_BURST_LENGTH": BURST_BEATS, "SUPPORTS_NARROW_BURST": 0}
    if bus.reads:
        bursts = 2 * config.beat_fifo_beats // BURST_BEATS
        values["NUM_READ_OUTSTANDING"] = min(MOST_OUTSTANDING, bursts)
    if bus.writes:
        values["NUM_WRITE_OUTSTANDING"] = MOST_OUTSTANDING
    return values


def _registers(interface: Interface) -> list[str]:
    """The register map of the control bus, from the ABI."""
    lines = []

    def register(name, offset, bits, what):
        lines.extend(
            [
                "",
                f"set register [ipx::add_register {name} $block]",
                f"set_property description {{{what}}} $register",
                f"set_property address_offset 0x{offset:03X} $register",
                f"set_property size {bits} $register",
            ]
        )

    register("CTRL", abi.REG_CTRL, 32, "Control signals")
    for bit, bits, name, writable in _CTRL_FIELDS:
        lines += [
            f"set field [ipx::add_field {name} $register]",
            f"set_property access {'read-write' if writable else 'read-only'} $field",
            f"set_property bit_offset {bit} $field",
            f"set_property bit_width {bits} $field",
            f"set_property {'modified_write_value' if writable else 'read_action'} modify $field",
        ]
    if interface.interrupt:
        register("GIER", abi.REG_GIER, 32, "Global interrupt enable")
        register("IP_IER", abi.REG_IER, 32, "Interrupt enable")
        register("IP_ISR", abi.REG_ISR, 32, "Interrupt status")
    for argument, source in zip(arguments(), [r for r in abi.REGISTERS if r.writable], strict=True):
        register(argument.name, argument.offset, 8 * argument.size, source.doc)
        if argument.pointer:
            lines += [
                "set parameter [ipx::add_register_parameter ASSOCIATED_BUSIF $register]",
                f"set_property value {argument.port} $parameter",
            ]
    return lines
