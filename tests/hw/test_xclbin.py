# SPDX-License-Identifier: Apache-2.0
"""xclbin files: written, read again, and read by the parsers of others."""

import ctypes
import ctypes.util
import dataclasses
import json
import uuid

from hypothesis import given
from hypothesis import strategies as st
import pytest

from nearkv import cli
from nearkv.xclbin import describe
from nearkv_hw import xclbin
from nearkv_hw.vitis import boards
from nearkv_hw.vitis.interface import VLNV, Kernel
from nearkv_hw.xclbin import (
    Clock,
    ClockType,
    Connection,
    Control,
    Kind,
    Memory,
    MemoryType,
    Section,
    Unit,
    Xclbin,
    XclbinError,
)

_XRT = ctypes.util.find_library("xrt_coreutil")
_needs_xrt = pytest.mark.skipif(
    _XRT is None, reason="XRT is not installed: apt-get install libxrt1 libxrt-dev uuid-dev"
)

SMARTSSD = boards.load("smartssd")


@pytest.mark.parametrize("name", boards.names())
def test_what_was_written_is_read(name):
    board = boards.load(name)
    made = xclbin.simulated(board)
    read = Xclbin.unpack(made.pack())
    assert read == made
    assert read.platform == board.platform
    assert [memory.tag for memory in read.memories] == [it.memory for it in board.engines]
    assert [memory.nbytes >> 20 for memory in read.memories] == [
        it.memory_mib for it in board.engines
    ]
    assert [unit.name for unit in read.units] == [
        f"nearkv_{n + 1}" for n in range(len(board.engines))
    ]
    assert [read.banks_of(unit, 0) for unit in read.units] == [
        [n] for n in range(len(board.engines))
    ]
    assert not any(read.banks_of(unit, 2) for unit in read.units)  # a number
    assert read.clocks == [Clock("DATA_CLK", ClockType.DATA, board.kernel_mhz)]


def test_the_kernel_is_the_one_of_kernel_xml():
    """Which is checked against the Verilog elsewhere."""
    (kernel,) = Xclbin.unpack(xclbin.simulated(SMARTSSD).pack()).kernels
    assert kernel == Kernel.from_xml(kernel.xml()) == xclbin.kernel_of_abi()


def test_the_same_content_has_the_same_uuid_and_another_another():
    assert xclbin.simulated(SMARTSSD).uuid == xclbin.simulated(SMARTSSD).uuid
    faster = dataclasses.replace(SMARTSSD, kernel_mhz=299)
    assert xclbin.simulated(SMARTSSD).uuid != xclbin.simulated(faster).uuid


def test_units_keep_their_properties():
    units = [
        Unit("nearkv", "a", 0x1000),
        Unit("other", "b", 0x2000, Control.AP_CTRL_CHAIN, 3),
        Unit("other", "c", 0x3000, Control.AP_CTRL_NONE, 0),
    ]
    made = Xclbin("p", uuid.uuid4(), [Section(Kind.IP_LAYOUT, xclbin.pack_units(units))])
    assert Xclbin.unpack(made.pack()).units == units


def test_sections_that_are_not_understood_stay_as_they_are():
    made = xclbin.simulated(SMARTSSD)
    made.sections.append(Section(4711, b"odd bytes", "odd"))
    made.sections.append(Section(Kind.BITSTREAM, bytes(1001)))
    read = Xclbin.unpack(made.pack())
    assert read.sections == made.sections
    assert xclbin.kind_name(4711) == "kind 4711"


def test_grouped_banks_come_before_those_without_groups():
    """As XRT does: its memory groups count in GROUP_TOPOLOGY."""
    made = xclbin.simulated(SMARTSSD)
    grouped = [Memory("group", MemoryType.DDR4, 0, 1 << 30), *xclbin.memories_of(SMARTSSD)]
    made.sections += [
        Section(Kind.GROUP_TOPOLOGY, xclbin.pack_memories(grouped)),
        Section(Kind.GROUP_CONNECTIVITY, xclbin.pack_connections([Connection(0, 0, 1)])),
    ]
    assert made.memories == grouped
    assert made.banks_of(made.units[0], 0) == [1]


@given(st.data())
def test_a_damaged_file_is_an_error_of_one_kind(data):
    """Cut off anywhere, or with any byte changed: read, or refused; never anything else."""
    raw = bytearray(xclbin.simulated(SMARTSSD).pack())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        with pytest.raises(XclbinError):
            Xclbin.unpack(bytes(raw))
        return
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Xclbin.unpack(bytes(raw))
        describe(read)
    except XclbinError:
        pass


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(XclbinError, match="must be shorter than 16 bytes"):
        xclbin.pack_memories([Memory("a" * 16, MemoryType.DDR4, 0, 1024)])


# --- the parsers of others -------------------------------------------------------------------------------


@_needs_xrt
@pytest.mark.parametrize("name", boards.names())
def test_xrt_reads_what_was_written(tmp_path, name):
    board = boards.load(name)
    made = xclbin.simulated(board)
    made.write(tmp_path / "x.xclbin")
    lib = ctypes.CDLL(_XRT)
    lib.xrtXclbinAllocFilename.restype = ctypes.c_void_p
    for name in ("GetNumKernels", "GetNumKernelComputeUnits"):
        function = getattr(lib, f"xrtXclbin{name}")
        function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    handle = lib.xrtXclbinAllocFilename(bytes(tmp_path / "x.xclbin"))
    assert handle
    assert lib.xrtXclbinGetNumKernels(handle) == len(made.kernels)
    assert lib.xrtXclbinGetNumKernelComputeUnits(handle) == len(board.engines)
    name, size = ctypes.create_string_buffer(64), ctypes.c_int()
    argument = ctypes.c_void_p(handle)
    assert lib.xrtXclbinGetXSAName(argument, name, 64, ctypes.byref(size)) == 0
    assert name.value.decode() == made.platform
    identity = ctypes.create_string_buffer(16)
    assert lib.xrtXclbinGetUUID(argument, identity) == 0
    assert identity.raw == made.uuid.bytes
    lib.xrtXclbinFreeHandle(argument)


def test_pynq_reads_what_was_written(tmp_path):
    parser = pytest.importorskip(
        "pynq.pl_server.xclbin_parser", reason="PYNQ is not installed: pip install 'nearkv[pynq]'"
    )
    made = xclbin.simulated(SMARTSSD)
    made.write(tmp_path / "x.xclbin")
    read = parser.XclBin(str(tmp_path / "x.xclbin"))
    (unit,) = made.units
    theirs = read.ip_dict[unit.name]
    assert theirs["phys_addr"] == unit.base
    assert theirs["type"] == VLNV
    assert theirs["cu_name"] == f"{unit.kernel}:{unit.name}"
    assert theirs["xclbin_uuid"] == made.uuid.hex
    (kernel,) = made.kernels
    for argument in kernel.arguments:
        register = theirs["registers"][argument.name]
        assert register["address_offset"] == argument.offset
        assert register["size"] == 8 * argument.size
        assert register.get("memory") == ("bank0" if argument.pointer else None)
    for memory in made.memories:
        bank = read.mem_dict[memory.tag]
        assert (bank["base_address"], bank["size"]) == (memory.base, memory.nbytes)
        assert bool(bank["used"]) == memory.used
    assert [it["frequency"] for it in read.clock_dict.values()] == [it.mhz for it in made.clocks]


# --- nearkv xclbin info ------------------------------------------------------------------------------------


def test_the_command_tells_all_of_it(tmp_path, capsys):
    made = xclbin.simulated(SMARTSSD)
    made.write(tmp_path / "x.xclbin")
    assert cli.main(["xclbin", "info", str(tmp_path / "x.xclbin")]) == 0
    text = capsys.readouterr().out
    for word in (
        str(made.uuid), made.platform, "fits this version of nearkv", "0x001c job", "kv in bank0",
        "nearkv:nearkv_1 at 0x1810000", "4096 MiB at 0x4000000000", f"{SMARTSSD.kernel_mhz} MHz", "MEM_TOPOLOGY",
    ):  # fmt: skip
        assert word in text
    assert cli.main(["xclbin", "info", "--json", str(tmp_path / "x.xclbin")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["uuid"] == str(made.uuid)
    assert about["kernels"][0]["fits"] is True
    assert about["units"][0]["banks"] == {"kv": ["bank0"], "job": ["bank0"]}


def test_the_command_tells_a_kernel_of_another_version(tmp_path, capsys):
    made = xclbin.simulated(SMARTSSD)
    made.sections[0] = made.sections[0]._replace(
        data=made.sections[0].data.replace(b"0x028", b"0x02C")
    )
    made.write(tmp_path / "x.xclbin")
    assert cli.main(["xclbin", "info", str(tmp_path / "x.xclbin")]) == 0
    assert "is of another version of nearkv" in capsys.readouterr().out


def test_the_command_refuses_other_files_in_one_line(tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"\x7fELF")
    for name, message in (("x", "x: no xclbin: it must begin with"), ("y", "No such file")):
        assert cli.main(["xclbin", "info", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
