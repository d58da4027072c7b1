# SPDX-License-Identifier: Apache-2.0
"""Cards behind XRT: a SmartSSD or an Alveo with nearkv's xclbin, or a simulated one (`nearkv xrt-sim`).

XRT is used by its C API, through ctypes: it takes arguments of any width, has registers, and other
threads run while it waits. Kv memory is one P2P buffer, into whose mapping drives write; job memory is a
normal buffer, of which ranges are copied to and from the card.

What XRT does not check is checked here: a library that is not there ends the process, a buffer in another
bank is copied without a word, a wait without a limit lasts for ever.

Sources: /usr/include/xrt/{xrt_device,xrt_bo,xrt_kernel}.h (libxrt-dev); XRT 2022.1, github.com/Xilinx/XRT,
src/runtime_src/core/common/module_loader.cpp and api/xrt_bo.cpp, xrt_kernel.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
from pathlib import Path
import tempfile
import threading
import time
from typing import Any, NamedTuple, TypeVar
import weakref

import numpy as np

from nearkv_hw import abi, xclbin
from nearkv_hw.config import PRESETS, Config, preset
from nearkv_hw.vitis.interface import NAME

from ..io import JobMemory, KvMemory, fpga, pci
from . import installed
from .errors import CardError

log = logging.getLogger("nearkv")

# Of a buffer. Ref: xrt_mem.h
P2P = 1 << 30
TO_DEVICE, FROM_DEVICE = 0, 1
# Ref: ert.h, enum ert_cmd_state
_COMPLETED, _TIMEOUT = 4, 8
_STATES = {1: "NEW", 2: "QUEUED", 3: "RUNNING", 5: "ERROR", 6: "ABORT", 7: "SUBMITTED",
           9: "NORESPONSE"}  # fmt: skip
_SLICE_S = 0.1  # Python sees Ctrl-C in between
_ARGUMENTS = tuple(register for register in abi.REGISTERS if register.writable)
_INDEX = {register.name: index for index, register in enumerate(_ARGUMENTS)}
_OFFSET = {register.name: register.offset for register in abi.REGISTERS}


class Refused(Exception):
    """XRT did not do it."""

    def __init__(self, what: str, number: int, said: str):
        reason = said or (os.strerror(number) if number else "no reason given")
        super().__init__(f"{what}: {reason}")
        self.errno, self.said = number, said


class Library:
    """XRT's C functions. What returns no handle, or not 0, raises.

    Raises
    ------
    CardError
        If there is no XRT here, or its environment would end the process.
    """

    def __init__(self):
        self._lib = _load()
        if trouble := installed.trouble(os.environ):  # XRT would end the process
            raise CardError("; ".join(trouble))
        self._functions: dict[str, Any] = {}
        handle, integer = ctypes.c_void_p, ctypes.c_int
        size, word = ctypes.c_size_t, ctypes.c_uint32
        uuid = ctypes.c_char_p  # 16 bytes
        types: dict[str, tuple[Any, list]] = {
            "DeviceOpen": (handle, [ctypes.c_uint]),
            "DeviceOpenByBDF": (handle, [ctypes.c_char_p]),
            "DeviceClose": (integer, [handle]),
            "DeviceLoadXclbinFile": (integer, [handle, ctypes.c_char_p]),
            "DeviceGetXclbinUUID": (integer, [handle, ctypes.c_char_p]),
            "PLKernelOpenExclusive": (handle, [handle, uuid, ctypes.c_char_p]),
            "KernelClose": (integer, [handle]),
            "KernelArgGroupId": (integer, [handle, integer]),
            "KernelArgOffset": (word, [handle, integer]),
            "KernelReadRegister": (integer, [handle, word, ctypes.POINTER(word)]),
            "KernelWriteRegister": (integer, [handle, word, word]),
            "BOAlloc": (handle, [handle, size, ctypes.c_uint64, word]),
            "BOFree": (integer, [handle]),
            "BOMap": (handle, [handle]),
            "BOAddress": (ctypes.c_uint64, [handle]),
            "BOSync": (integer, [handle, integer, size, size]),
            "RunOpen": (handle, [handle]),
            "RunClose": (integer, [handle]),
            "RunStart": (integer, [handle]),
            "RunWaitFor": (integer, [handle, ctypes.c_uint]),
            "RunState": (integer, [handle]),
        }
        for name, (result, arguments) in types.items():
            function = getattr(self._lib, f"xrt{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        # Of variable arguments; these are what nearkv's kernel has.
        self.set_word = self._lib["xrtRunSetArg"]
        self.set_word.argtypes = [handle, integer, word]
        self.set_buffer = self._lib["xrtRunSetArg"]
        self.set_buffer.argtypes = [handle, integer, handle]
        self._messages = _keep_messages(self._lib)

    def get(self, name: str):
        """A function that is called as it is."""
        return self._functions[name]

    def call(self, name: str, *arguments) -> int:
        """A function that returns a handle, or 0 for success."""
        function = self._functions[name]
        ctypes.set_errno(0)
        result = function(*arguments)
        if result is None or function.restype is ctypes.c_int and result != 0:
            raise Refused(f"xrt{name}", ctypes.get_errno(), self.said())
        return result

    def pci_address(self, device: int) -> str | None:
        """Where a device is on PCIe: "0000:04:00.1"; None of one that is nowhere."""
        self._lib.xrtDeviceToXclDevice.restype = ctypes.c_void_p
        low_level = self._lib.xrtDeviceToXclDevice(ctypes.c_void_p(device))
        info = _DeviceInfo()
        # Of the driver, which XRT has loaded by now, for everybody.
        ask = getattr(ctypes.CDLL(None), "xclGetDeviceInfo2", None)
        if ask is None or ask(ctypes.c_void_p(low_level), ctypes.byref(info)) or not info.pci_slot:
            return None
        slot = info.pci_slot
        return f"{slot >> 16:04x}:{slot >> 8 & 0xFF:02x}:{slot >> 3 & 0x1F:02x}.{slot & 7}"

    def said(self) -> str:
        """The last error that XRT has told since the last question; "" where it tells others."""
        if self._messages is None:
            return ""
        errors = [line for line in self._messages.read().splitlines() if " ERROR: " in line]
        return errors[-1].partition(" ERROR: ")[2].strip() if errors else ""


@functools.cache
def library() -> Library:
    """XRT's library; loaded once, as it has one state for the whole process."""
    return Library()


def _load() -> ctypes.CDLL:
    for place in installed.libraries(os.environ):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place, use_errno=True)
    raise CardError(
        f"XRT is not installed: there is no {installed.LIBRARY}. For a card, {installed.INSTALL}; "
        f"{installed.SIMULATE}"
    )


def _keep_messages(lib: ctypes.CDLL):
    """Let XRT write its messages to a file, which errors quote; None where somebody set it otherwise."""
    if os.environ.get("XRT_INI_PATH") or Path("xrt.ini").exists():
        return None
    file = tempfile.NamedTemporaryFile("r", prefix="nearkv-xrt-", suffix=".log")
    lib.xrtIniStringSet.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    if lib.xrtIniStringSet(b"Runtime.runtime_log", os.fsencode(file.name)):
        return None  # it has told something already, elsewhere
    return file


class Handle:
    """Something of XRT's that is closed once: by `close`, or when nobody has it any more.

    What it `needs` is closed later: XRT uses a device that was closed before its buffers.
    """

    def __init__(self, library: Library, value: int, closer: str, *needs: Handle):
        self.value = value
        self.close = weakref.finalize(self, _close, library, value, closer, os.getpid(), needs)


def _close(library: Library, handle: int, closer: str, process: int, needs) -> None:
    if os.getpid() != process:
        return  # it is a parent's
    try:
        library.call(closer, handle)
    except Refused as error:
        log.warning("%s", error)


class Buffer:
    """A buffer on the card, mapped here. It is freed when nobody has it any more."""

    def __init__(self, library: Library, device: Handle, nbytes: int, flags: int, group: int):
        self.nbytes, self.group, self._library = nbytes, group, library
        value = library.call("BOAlloc", device.value, nbytes, flags, group)
        self._handle = Handle(library, value, "BOFree", device)
        self.handle = value
        self.mapped = library.call("BOMap", value)
        self.address: int = library.get("BOAddress")(value)

    def sync(self, direction: int, offset: int, nbytes: int) -> None:
        if nbytes:
            self._library.call("BOSync", self.handle, direction, nbytes, offset)


class _Kv(KvMemory):
    """The page ring: a P2P buffer, mapped from a BAR."""

    def __init__(self, executor: Executor, buffer: Buffer):
        super().__init__(buffer.nbytes, address=buffer.mapped, keep=buffer)
        self._executor = executor

    def renewed(self) -> KvMemory:
        return self._executor.kv

    def release(self) -> None:
        self._view = memoryview(b"")  # the buffer goes when the last part of it that is in use goes


class _Job(JobMemory):
    """The host's copy of a buffer."""

    def __init__(self, executor: Executor, buffer: Buffer):
        super().__init__(buffer.nbytes, address=buffer.mapped, keep=buffer)
        self._executor = executor
        self._buffer: Buffer | None = buffer

    def renewed(self) -> JobMemory:
        return self._executor.job

    def release(self) -> None:
        self._view, self.bytes, self._buffer = memoryview(b""), np.empty(0, np.uint8), None

    def sync_to_device(self, offset: int, nbytes: int) -> None:
        self._sync(TO_DEVICE, offset, nbytes)

    def sync_from_device(self, offset: int, nbytes: int) -> None:
        self._sync(FROM_DEVICE, offset, nbytes)

    def _sync(self, direction: int, offset: int, nbytes: int) -> None:
        buffer = self._buffer
        if buffer is None:
            raise CardError(f"card {self._executor.name!r} is closed; open it again")
        try:
            buffer.sync(direction, offset, nbytes)
        except Refused as error:
            raise CardError(
                f"card {self._executor.name!r}: job memory cannot be copied: {error}; see the kernel's "
                f"log (dmesg), then reset the card", recoverable=True
            ) from error  # fmt: skip


class _DeviceInfo(ctypes.Structure):
    """The beginning of xclDeviceInfo2. Ref: xrt.h"""

    _short, _long = ctypes.c_ushort, ctypes.c_ulonglong
    _fields_ = [
        ("magic", ctypes.c_uint), ("name", ctypes.c_char * 256), ("ids", _short * 7),
        ("memory", ctypes.c_size_t * 4), ("clocks", _short * 13), ("current", ctypes.c_float),
        ("clocks_and_fan", _short * 2), ("calibrated", ctypes.c_bool), ("firmware", _long * 2),
        ("rails", _short * 2), ("currents", _long * 2), ("sensors", _short * 21), ("driver", _long),
        ("pci_slot", ctypes.c_uint), ("rest", ctypes.c_byte * 1024),
    ]  # fmt: skip


def offset_of(name: str) -> int:
    """Of a register of `abi.REGISTERS`, or of "control"."""
    return abi.REG_CTRL if name == "control" else _OFFSET[name]


def card_error(name: str, what: str, remedy: str) -> CardError:
    return CardError(f"card {name!r}: {what}; {remedy}")


def open_device(library: Library, name: str, where: str) -> Handle:
    """A device by its number or PCI address, for the card of that name. Raises CardError."""
    try:
        if where.isdigit():
            value = library.call("DeviceOpen", int(where))
        else:
            value = library.call("DeviceOpenByBDF", where.encode())
    except Refused as error:
        raise card_error(
            name, f"XRT has no device {where} ({error})", "xbutil examine lists those there are"
        ) from error
    return Handle(library, value, "DeviceClose")


def load_xclbin(library: Library, name: str, device: Handle, path: Path, platform: str) -> None:
    """Load an xclbin, which is for that platform. Raises CardError."""
    try:
        library.call("DeviceLoadXclbinFile", device.value, os.fsencode(path))
    except Refused as error:
        raise card_error(
            name, f"XRT does not load {path}, which is for platform {platform} ({error})",
            "xbutil examine shows the card's platform, and whether another process uses the card",
        ) from error  # fmt: skip


def open_unit(library: Library, name: str, device: Handle, uuid: bytes, unit: str) -> Handle:
    """A compute unit, "kernel:{unit}", of the xclbin that is loaded, for us alone. Raises CardError."""
    try:
        value = library.call("PLKernelOpenExclusive", device.value, uuid, unit.encode())
    except Refused as error:
        raise card_error(
            name, f"kernel {unit} is in use by another process ({error})",
            "end that process (xbutil examine --report dynamic-regions shows the kernel's users), or "
            "choose another card",
        ) from error  # fmt: skip
    return Handle(library, value, "KernelClose", device)


class _Opened(NamedTuple):
    """What is open of a device."""

    device: Handle
    kernel: Handle
    run: Handle


class Executor:
    """Runs queues on a card behind XRT: `nearkv.cards.executor.Executor`.

    Parameters
    ----------
    name : str
        Of the card.
    unit : str
        "0": number of the device as XRT counts them, or its PCI address "0000:04:00.1"; with "/1": its
        second engine, which is a compute unit of the xclbin.
    path : path
        Of the xclbin.
    config : Config or None
        The build that must be on it. None: any that this version of nearkv knows.
    kv_bytes, job_bytes : int
    timeout_s : float
        How long a run of somebody else may still be on the card.

    Raises
    ------
    CardError
        If the card, XRT or the xclbin is not what it must be. Each has a message of its own, with what
        to do.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        path: Path,
        config: Config | None,
        kv_bytes: int,
        job_bytes: int,
        timeout_s: float,
    ):
        self.name, self._path, self._config = name, path, config
        self._where, engine = split(name, unit)
        self.pci_address: str | None = None
        self._sizes, self._timeout_s = (kv_bytes, job_bytes), timeout_s
        self._xclbin, units = read_xclbin(name, path)
        if (engine or 0) >= len(units):
            raise self._error(
                f"there is no engine {engine} in {path}, only {len(units)}",
                f"choose one of 0 to {len(units) - 1}",
            )
        self._unit = units[engine or 0]
        self._library = library()
        self._lock = threading.Lock()  # of who waits for a run
        self._run: Run | None = None  # the last one
        self._open_device()
        self.rows, self.max_head_dim = self._built.rows, self._built.max_head_dim
        self.config_hash = self._built.hash32

    @property
    def _unit_name(self) -> str:
        """As XRT wants it."""
        return f"{self._unit.kernel}:{{{self._unit.name}}}"

    @property
    def _bdf(self) -> str:
        """As xbutil wants it."""
        return self.pci_address or self._where

    # --- what an executor does -----------------------------------------------------------------------

    def attach(self, kv: KvMemory, job: JobMemory) -> None:
        assert (kv, job) == (self.kv, self.job), "the memories of another card"

    def start(self, queue: int, n_jobs: int, summary: int) -> Run:
        run = self._opened.run.value
        for name, value in (("queue", queue), ("n_jobs", n_jobs), ("summary", summary)):
            if self._library.set_word(run, _INDEX[name], value):
                raise RuntimeError(f"XRT does not take argument {name}: {self._library.said()}")
        try:
            self._library.call("RunStart", run)
        except Refused as error:
            raise RuntimeError(f"the kernel cannot be started: {error}") from error
        self._run = Run(self._library, run, self._lock, self._bdf)
        return self._run

    def stop(self) -> None:
        """Nothing: XRT cannot end a run."""

    def reset(self, timeout_s: float) -> None:
        self._close_device()
        self._timeout_s = timeout_s
        try:
            self._open_device()
        except CardError as error:
            raise RuntimeError(str(error)) from error

    def close(self, timeout_s: float) -> None:
        self._close_device()
        del self._opened, self.kv, self.job

    # --- opening -------------------------------------------------------------------------------------

    def _open_device(self) -> None:
        library, call = self._library, self._library.call
        device = open_device(library, self.name, self._where)
        self.pci_address = library.pci_address(device.value)
        load_xclbin(library, self.name, device, self._path, self._xclbin.platform)
        kernel = open_unit(library, self.name, device, self._xclbin.uuid.bytes, self._unit_name)
        value = kernel.value
        try:
            group = self._check_arguments(value)
            self._built = self._check_build(value)
            self._check_idle(value)
            kv, job = self._allocate(device, group)
            run = Handle(library, call("RunOpen", value), "RunClose", kernel)
            for name, buffer in (("kv", kv), ("job", job)):
                if library.set_buffer(run.value, _INDEX[name], buffer.handle):
                    raise self._error(
                        f"XRT does not take argument {name}: {library.said()}", _BUILD
                    )
        except BaseException:
            kernel.close()
            raise
        self._opened = _Opened(device, kernel, run)
        self.kv, self.job = self._memories_of(kv, job)

    def _memories_of(self, kv: Buffer, job: Buffer) -> tuple[KvMemory, JobMemory]:
        return _Kv(self, kv), _Job(self, job)

    def _close_device(self) -> None:
        """Close the kernel. Its buffers, and the device, stay for as long as somebody has them."""
        if self._run is not None:
            self._run.given_up = True
        with self._lock:
            self._opened.run.close()
            self._opened.kernel.close()

    def _check_arguments(self, kernel: int) -> int:
        """Argument offsets and banks, as XRT sees them; the bank that both memories go to."""
        for name, index in _INDEX.items():
            offset = self._library.get("KernelArgOffset")(kernel, index)
            if offset != _OFFSET[name]:
                raise self._error(
                    f"XRT has argument {name} at {offset:#x}, not at {_OFFSET[name]:#x}", _BUILD
                )
        groups = {}
        for name in ("kv", "job"):
            group = self._library.get("KernelArgGroupId")(kernel, _INDEX[name])
            if group < 0 or group >= len(self._xclbin.memories):
                raise self._error(
                    f"argument {name} of {self._path} is connected to no memory bank", _BUILD
                )
            groups[name] = group
        memory = self._xclbin.memories[groups["kv"]]
        if memory.type not in (
            xclbin.MemoryType.DDR4,
            xclbin.MemoryType.HBM,
            xclbin.MemoryType.DRAM,
        ):
            raise self._error(
                f"{self._path} connects kv to {memory.tag}, which has no P2P memory", _BUILD
            )
        self._groups = groups
        return groups["kv"]

    def _check_build(self, kernel: int) -> Config:
        """What the kernel says of itself."""
        version = self._read_register(kernel, "abi_version")
        if version != abi.ABI_VERSION:
            raise self._error(
                f"host and card are of different versions of nearkv (abi_version is {version}, not "
                f"{abi.ABI_VERSION})", _BUILD
            )  # fmt: skip
        identity = self._read_register(kernel, "config_hash")
        known = [self._config] if self._config is not None else list(PRESETS.values())
        for config in known:
            if config.hash32 == identity:
                return config
        names = ", ".join(config.name for config in known)
        raise self._error(
            f"the card is not the build that was asked for (config_hash is {identity:#x}, that of none of "
            f"{names})", _BUILD
        )  # fmt: skip

    def _read_register(self, kernel: int, name: str) -> int:
        offset = offset_of(name)
        value = ctypes.c_uint32()
        try:
            self._library.call("KernelReadRegister", kernel, offset, ctypes.byref(value))
        except Refused as error:
            raise self._error(
                f"register {name} cannot be read: {error}",
                f"reset the card (sudo xbutil reset --device {self._bdf})",
            ) from error
        return value.value

    def _allocate(self, device: Handle, group: int) -> tuple[Buffer, Buffer]:
        kv_bytes, job_bytes = self._sizes
        tag = self._xclbin.memories[group].tag
        try:
            kv = self._buffer(device, kv_bytes, P2P, group)
        except Refused as error:
            raise self._no_p2p(device, group, error) from error
        try:
            job = self._buffer(device, job_bytes, 0, self._groups["job"])
        except Refused as error:
            raise self._error(
                f"{job_bytes} bytes of job memory cannot be allocated in {tag}: {error}",
                "choose a smaller job_bytes, or end the programs that use the card",
            ) from error
        for name, buffer in (("kv", kv), ("job", job)):
            bank = self._xclbin.memories[buffer.group]
            if not bank.base <= buffer.address <= bank.base + bank.nbytes - buffer.nbytes:
                raise self._error(
                    f"{name} memory is at {buffer.address:#x}, outside of bank {bank.tag} at "
                    f"{bank.base:#x}", "is the xclbin the one that is on the card? Load it again"
                )  # fmt: skip
            if buffer.mapped % abi.PAGE_ALIGN_BYTES:
                raise self._error(
                    f"XRT maps {name} memory at {buffer.mapped:#x}, which is no page: drives cannot "
                    "write there", "use a driver with P2P memory (the noop driver has none)"
                )  # fmt: skip
        return kv, job

    def _buffer(self, device: Handle, nbytes: int, flags: int, group: int) -> Buffer:
        return Buffer(self._library, device, nbytes, flags, group)

    def _no_p2p(self, device: Handle, group: int, error: Refused) -> CardError:
        """Why a P2P buffer was refused: is P2P off, or memory short?"""
        kv_bytes, _ = self._sizes
        tag = self._xclbin.memories[group].tag
        try:
            self._buffer(device, kv_bytes, 0, group)
        except Refused:
            return self._error(
                f"{kv_bytes} bytes of kv memory cannot be allocated in {tag}: {error}",
                "choose a smaller kv_bytes, or end the programs that use the card",
            )
        state = fpga.P2p.UNKNOWN
        if self.pci_address is not None:
            state, _ = fpga.p2p(pci.function(self.pci_address).folder)
        if state == fpga.P2p.ENABLED:
            return self._error(
                f"no {kv_bytes} bytes of the P2P window are free, and {tag} has them ({error})",
                "choose a smaller kv_bytes, or end the programs that use the card",
            )
        if state == fpga.P2p.UNKNOWN:  # the driver does not say, and this does
            state = fpga.P2p.DISABLED
        what, remedy = fpga.p2p_trouble(state, self._bdf)
        return self._error(
            f"P2P is {what} ({tag} gives normal memory; of P2P memory XRT says: {error})", remedy
        )

    def _check_idle(self, kernel: int) -> None:
        """CardError if a run is on the card that nobody waits for any more."""
        until = time.monotonic() + self._timeout_s
        while not self._read_register(kernel, "control") & abi.CTRL_IDLE:
            if time.monotonic() > until:
                raise self._error(
                    f"its kernel still runs, and has not ended within {self._timeout_s:g} s",
                    f"sudo xbutil reset --device {self._bdf}",
                )
            time.sleep(0.01)

    def _error(self, what: str, remedy: str) -> CardError:
        return card_error(self.name, what, remedy)


_BUILD = "build it with: make bitstream BOARD=..., with this version of nearkv"


class Run:
    """A run that was started, as `nearkv.cards.executor.Run`.

    XRT's run is used again and again, for one of these after the other; `lock` is held by whoever waits
    for it, or closes it. `device` is where it runs, as xbutil wants it.
    """

    def __init__(self, library: Library, handle: int, lock: threading.Lock, device: str):
        self._library, self._handle, self._lock, self._device = library, handle, lock, device
        self._state = 0
        self.given_up = False  # its handle is closed

    def wait(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._state in (0, _TIMEOUT):
            left = until - time.monotonic()
            if self._state and left <= 0:
                raise TimeoutError(self._describe())
            with self._lock:
                if self.given_up:
                    raise RuntimeError("it was given up when the card was reset")
                wait_for = self._library.get("RunWaitFor")
                # 0 would be for ever.
                milliseconds = max(1, math.ceil(1000 * min(_SLICE_S, left)))
                if self._state in (0, _TIMEOUT):  # nobody has seen its end
                    self._state = wait_for(self._handle, milliseconds)
        if self._state != _COMPLETED:
            name = _STATES.get(self._state, str(self._state))
            raise RuntimeError(
                f"XRT says that the run has ended as {name}; see the kernel's log (dmesg)"
            )

    def _describe(self) -> str:
        state = self._library.get("RunState")(self._handle)
        return (
            f"XRT says it is {_STATES.get(state, state)}; if a reset does not help: sudo xbutil reset "
            f"--device {self._device}"
        )


def split(name: str, unit: str) -> tuple[str, int | None]:
    """Where a card is, and which of its engines is meant; None: all. Raises CardError."""
    where, slash, engine = unit.partition("/")
    family = name.partition(":")[0]
    if not where or slash and not engine.isdigit():
        raise CardError(
            f"no card {name!r}; say which: '{family}:0', '{family}:0000:04:00.1', or '{family}:0/1' for "
            "its second engine"
        )
    return where, int(engine) if engine else None


def count_engines(name: str, unit: str, given: str | os.PathLike | None) -> int:
    """Of the card that a name stands for. Raises CardError."""
    _, engine = split(name, unit)
    return 1 if engine is not None else len(read_xclbin(name, find_xclbin(name, given))[1])


def read_xclbin(name: str, path: Path) -> tuple[xclbin.Xclbin, list[xclbin.Unit]]:
    """As `check_xclbin`, for the card of that name. Raises CardError."""
    try:
        return check_xclbin(path)
    except OSError as error:
        raise card_error(name, f"cannot read {path}: {error.strerror}", _BUILD) from error
    except xclbin.XclbinError as error:
        raise card_error(name, f"xclbin {error}", _BUILD) from error


def check_xclbin(path: Path) -> tuple[xclbin.Xclbin, list[xclbin.Unit]]:
    """What v++ says that it linked; the compute units of nearkv's kernel.

    Raises
    ------
    OSError
    XclbinError
        If it is damaged, or has not the kernel of this version of nearkv. The message begins with the
        path.
    """
    found = xclbin.Xclbin.read(path)
    try:
        kernels = {kernel.name: kernel for kernel in found.kernels}
        units = [unit for unit in found.units if unit.kernel == NAME]
    except xclbin.XclbinError as error:
        raise xclbin.XclbinError(f"{path}: {error}") from error
    kernel = kernels.get(NAME)
    if kernel is None or not units:
        raise xclbin.XclbinError(f"{path}: it has no kernel {NAME}: {sorted(kernels)}")
    theirs = [(it.name, it.offset, 8 * it.size) for it in kernel.arguments]
    ours = [(it.name, it.offset, it.bits) for it in _ARGUMENTS]
    if theirs != ours:
        odd = next((it for it in ours if it not in theirs), theirs[-1])
        raise xclbin.XclbinError(
            f"{path}: it is of another version of nearkv: its arguments are {theirs}, and {odd} is "
            "expected among them"
        )
    return found, units


def find_xclbin(name: str, given: str | os.PathLike | None) -> Path:
    """The xclbin that is asked for: the one given, or that NEARKV_XCLBIN names."""
    path = given if given is not None else os.environ.get("NEARKV_XCLBIN")
    if path is None:
        raise CardError(
            f"card {name!r} needs its xclbin: open_card({name!r}, xclbin=FILE), or set NEARKV_XCLBIN to the "
            "file; make bitstream BOARD=... builds it"
        )
    return Path(path)


E = TypeVar("E", bound=Executor)


def open_executor(
    name: str,
    unit: str,
    *,
    config: str | Config | None,
    kv_bytes: int,
    job_bytes: int,
    timeout_s: float,
    path: str | os.PathLike | None,
    kind: type[E] = Executor,
) -> E:
    """An executor, by the unit's name: `Executor` says how it is built."""
    config = preset(config) if isinstance(config, str) else config
    return kind(name, unit, find_xclbin(name, path), config, kv_bytes, job_bytes, timeout_s)
