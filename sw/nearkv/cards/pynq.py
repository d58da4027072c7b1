# SPDX-License-Identifier: Apache-2.0
"""PYNQ over XRT: importing this module brings SmartSSDs and Alveos back to PYNQ 4, which has dropped them.

    import nearkv.cards.pynq
    import pynq

    overlay = pynq.Overlay("nearkv.xclbin", device=pynq.Device.devices[0])
    kv = pynq.allocate((1 << 20,), "u1", target=overlay.bank0, p2p=True)
    job = pynq.allocate((1 << 16,), "u1", target=overlay.bank0)
    overlay.nearkv_1.call(kv, job, queue=0, n_jobs=1, summary=4096)

It does so by what PYNQ offers to those who extend it: a `pynq.Device`, which PYNQ finds by `_probe_`,
memories that `pynq.allocate` takes as its target, and a driver that is bound to the kernel by its VLNV.
The card `pynq:0` is built on these; it differs from `xrt:0` in nothing else.

Sources: PYNQ 4.0.0 (github.com/Xilinx/PYNQ), pynq/pl_server/device.py (what a device must have),
pl_server/xclbin_parser.py, overlay.py, buffer.py, mmio.py. PYNQ 3.0.1, the last release that drove
Alveo, pynq/pl_server/xrt_device.py and overlay.py: what users called, and still do.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import math
import os
from pathlib import Path
import threading
from typing import Any
import weakref

import numpy as np
import pynq
from pynq.buffer import PynqBuffer
from pynq.pl_server.xclbin_parser import XclBin
from pynq.ps import ON_TARGET

from nearkv_hw import xclbin
from nearkv_hw.vitis.interface import VLNV

from ..io import fpga
from . import xrt
from .errors import CardError
from .xrt import count_engines as count_engines  # the same here

log = logging.getLogger("nearkv")

_MOST_DEVICES = 64
_WORD = 4  # bytes of a register
TIMEOUT_S = 60.0


class XrtCard(pynq.Device):
    """A card behind XRT, real or simulated. PYNQ lists them in `pynq.Device.devices`.

    Parameters
    ----------
    where : str
        "0": its number as XRT counts, or its PCI address "0000:04:00.1".
    name : str, optional
        For messages.

    Raises
    ------
    CardError
        If there is no XRT here.
    """

    # One of its own (PYNQ has 40 to 200). The device of the lowest is the active one, unless set.
    _probe_priority_ = 300

    @classmethod
    def _probe_(cls) -> list[XrtCard]:
        if ON_TARGET:
            return []  # a board that PYNQ itself drives, by XRT too
        cards: list[XrtCard] = []
        try:
            xrt.library()
        except CardError as error:
            log.warning("PYNQ finds no cards: %s", error)
            return cards
        try:
            while len(cards) < _MOST_DEVICES:
                card = cls(str(len(cards)))
                card._open()
                card.close()
                cards.append(card)
        except CardError as error:  # XRT's C functions do not say how many there are
            log.debug("%s", error)
        return cards

    def __init__(self, where: str, name: str | None = None):
        super().__init__(f"xrt{where}")
        self.where, self.name = where, name or f"xrt:{where}"
        self.capabilities = {"REGISTER_RW": True}
        self.library = xrt.library()
        self._handle: xrt.Handle | None = None
        # By name. Whoever uses a unit keeps it; XRT gives it to others when nobody does.
        self._units: weakref.WeakValueDictionary[str, Unit] = weakref.WeakValueDictionary()
        self._without_driver: list[Unit] = []

    def _open(self) -> xrt.Handle:
        if self._handle is None:
            self._handle = xrt.open_device(self.library, self.name, self.where)
        return self._handle

    def close(self) -> None:
        """Give the device back, as soon as its units and buffers are no longer in use.

        What uses it next opens it again; for PYNQ keeps the device of the last overlay for ever.
        """
        self._without_driver.clear()
        self._handle = None

    @property
    def pci_address(self) -> str | None:
        """ "0000:04:00.1"; None of one that is nowhere."""
        return self.library.pci_address(self._open().value)

    def __repr__(self):
        return f"<card {self.name!r}>"

    # --- the xclbin: what PYNQ calls --------------------------------------------------------------

    def get_bitfile_metadata(self, bitfile_name: str, partial: bool = False) -> XclBin:
        """What is on the card, as PYNQ's own parser reads it."""
        if partial:
            raise NotImplementedError("cards behind XRT have no partial overlays; load a whole one")
        return XclBin(bitfile_name)

    def download(self, bitstream, parser=None) -> None:
        """Load the xclbin, unless it is on the card. Raises CardError."""
        path = Path(bitstream.bitfile_name)
        try:
            platform = xclbin.Xclbin.read(path).platform
        except (OSError, xclbin.XclbinError) as error:
            raise CardError(f"card {self.name!r} cannot load {path}: {error}") from error
        self._without_driver.clear()
        xrt.load_xclbin(self.library, self.name, self._open(), path, platform)
        self.post_download(bitstream, parser)

    def gen_cache(self, bitstream, parser=None) -> None:
        """Nothing: an xclbin is parsed quickly."""

    # --- compute units ----------------------------------------------------------------------------

    def open_unit(self, description: dict) -> Unit:
        """The compute unit of an IP, opened for this device alone. Raises CardError."""
        name = description["cu_name"]
        unit = self._units.get(name)
        if unit is None:
            unit = self._units[name] = Unit(self, description)
        return unit

    def open_context(self, description: dict, shared: bool = False) -> int:
        """The number of the compute unit; from now on it has registers."""
        unit = self.open_unit(description)
        if not issubclass(description["driver"], Kernel):
            self._without_driver.append(unit)
        return description["cu_index"]

    def read_registers(self, address: int, length: int) -> bytes:
        unit, offset = self._register(address, length)
        return b"".join(unit.read(offset + at) for at in range(0, length, _WORD))

    def write_registers(self, address: int, data: bytes) -> None:
        unit, offset = self._register(address, len(data))
        for at in range(0, len(data), _WORD):
            unit.write(offset + at, bytes(data[at : at + _WORD]))

    def _register(self, address: int, nbytes: int) -> tuple[Unit, int]:
        if nbytes % _WORD or address % _WORD:
            raise ValueError(
                f"registers have {_WORD} bytes; {nbytes} bytes at {address:#x} are none"
            )
        for unit in list(self._units.values()):
            if unit.base <= address <= unit.base + unit.nbytes - nbytes:
                return unit, address - unit.base
        raise CardError(
            f"card {self.name!r}: no compute unit that is open has a register at {address:#x}; load "
            "an overlay and take the unit from it: overlay.nearkv_1"
        )

    # --- memory -----------------------------------------------------------------------------------

    def get_memory(self, desc: dict) -> Memory:
        """A bank, by its entry in `overlay.mem_dict`; `overlay.bank0` is made by this."""
        if desc.get("streaming"):
            raise NotImplementedError(f"{desc['tag']} is a stream, which nearkv has no use for")
        return Memory(self, desc)

    @property
    def default_memory(self) -> Memory:
        """The only bank that is in use. Raises ValueError if there is none or are several."""
        banks = [it for it in getattr(self, "mem_dict", {}).values() if it["used"]]
        if len(banks) != 1:
            raise ValueError(
                f"card {self.name!r} has {len(banks)} banks in use: "
                f"{', '.join(it['tag'] for it in banks) or 'load an overlay first'}; say which: "
                "pynq.allocate(..., target=overlay.bank0)"
            )
        return self.get_memory(banks[0])

    def flush(self, bo: xrt.Buffer, offset: int, ptr: int, size: int) -> None:
        """Copy to the card. Raises CardError."""
        self._sync(bo, xrt.TO_DEVICE, offset, size)

    def invalidate(self, bo: xrt.Buffer, offset: int, ptr: int, size: int) -> None:
        """Copy from the card. Raises CardError."""
        self._sync(bo, xrt.FROM_DEVICE, offset, size)

    def _sync(self, bo: xrt.Buffer, direction: int, offset: int, size: int) -> None:
        try:
            bo.sync(direction, offset, size)
        except xrt.Refused as error:
            raise xrt.card_error(
                self.name, f"memory cannot be copied: {error}",
                "see the kernel's log (dmesg), then reset the card",
            ) from error  # fmt: skip


class Unit:
    """A compute unit that is open. It is closed when nobody has it any more."""

    def __init__(self, card: XrtCard, description: dict):
        name, _, instance = description["cu_name"].partition(":")
        self.base, self.nbytes = description["phys_addr"], description["addr_range"]
        self.name = f"{name}:{{{instance}}}"
        self._card, library = card, card.library
        uuid = bytes.fromhex(description["xclbin_uuid"])
        self.handle = xrt.open_unit(library, card.name, card._open(), uuid, self.name)

    def read(self, offset: int) -> bytes:
        value = ctypes.c_uint32()
        self._call("KernelReadRegister", offset, ctypes.byref(value))
        return bytes(value)

    def write(self, offset: int, data: bytes) -> None:
        self._call("KernelWriteRegister", offset, int.from_bytes(data, "little"))

    def _call(self, function: str, offset: int, value) -> None:
        try:
            self._card.library.call(function, self.handle.value, offset, value)
        except xrt.Refused as error:
            raise xrt.card_error(
                self._card.name, f"register {offset:#x} cannot be reached: {error}",
                f"reset the card (sudo xbutil reset --device {self._card.where})",
            ) from error  # fmt: skip


class Memory:
    """A bank of a card, the target of `pynq.allocate`.

    Attributes
    ----------
    idx : int
        What XRT calls its group. PYNQ counts the banks, and XRT the groups, of which the banks are the
        first.
    tag : str
    base_address, size : int
        In bytes.
    """

    def __init__(self, card: XrtCard, desc: dict):
        self.device, self.idx, self.tag = card, desc["idx"], desc["tag"]
        self.base_address, self.size = desc["base_address"], desc["size"]

    def __repr__(self):
        return f"<{self.tag} of card {self.device.name!r}: {self.size >> 20} MiB>"

    def allocate(self, shape, dtype, *, p2p: bool = False) -> PynqBuffer:
        """An array in this bank. The memory is freed when nobody has it, or a part of it, any more.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : dtype
        p2p : bool
            Map the card's own memory: drives can write into it (`os.preadv` from a file opened with
            O_DIRECT), the processor does so slowly, and nothing is to be copied. Otherwise the array is
            the host's: `sync_to_device` and `sync_from_device` copy it, or a slice of it.

        Raises
        ------
        CardError
            If it cannot be allocated.
        """
        nbytes = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        if nbytes <= 0:
            raise ValueError(f"a buffer must have bytes, unlike one of shape {shape}")
        card = self.device
        flags = xrt.P2P if p2p else 0
        try:
            buffer = xrt.Buffer(card.library, card._open(), nbytes, flags, self.idx)
        except xrt.Refused as error:
            remedy = "allocate less, or delete arrays that are not needed"
            if p2p:
                off = fpga.p2p_trouble(fpga.P2p.DISABLED, card.where)
                remedy += f"; if P2P is off: {off.remedy}"
            what = f"{nbytes} bytes of {'P2P ' if p2p else ''}memory in {self.tag}"
            raise xrt.card_error(
                card.name, f"{what} cannot be allocated: {error}", remedy
            ) from error
        memory = (ctypes.c_ubyte * nbytes).from_address(buffer.mapped)
        return PynqBuffer(
            shape, dtype, buffer=memory,
            device=card, device_address=buffer.address, coherent=p2p,
            bo=buffer,  # type: ignore[arg-type]  # kept by every part of the array
        )  # fmt: skip


class Run(xrt.Run):
    """A run that was started by a kernel's driver; it keeps the buffers that it uses."""

    buffers: tuple[PynqBuffer, ...] = ()

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        """Return when it has ended. May be called again.

        Raises
        ------
        TimeoutError
            After `timeout_s`. The run goes on.
        RuntimeError
            If it failed.
        """
        try:
            super().wait(timeout_s)
        except TimeoutError:
            raise  # it goes on, and uses them
        except RuntimeError:
            self.buffers = ()
            raise
        self.buffers = ()


class Kernel(pynq.DefaultIP):
    """The driver of nearkv's compute units: `overlay.nearkv_1`.

    `signature` shows its arguments. `register_map`, `read` and `write` reach the registers.
    """

    bindto = [VLNV]

    def __init__(self, description: dict):
        card: XrtCard = description["device"]
        if not isinstance(card, XrtCard):
            raise pynq.UnsupportedConfiguration(f"{description['fullpath']} is not behind XRT")
        self.unit = card.open_unit(description)
        super().__init__(description)
        registers = {name: it for name, it in description["registers"].items() if name != "CTRL"}
        self._arguments = sorted(registers.items(), key=lambda item: item[1]["id"])
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._signature = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=it["type"]) for name, it in self._arguments]
        )
        value = card.library.call("RunOpen", self.unit.handle.value)
        self._run = xrt.Handle(card.library, value, "RunClose", self.unit.handle)
        self._lock = threading.Lock()
        self._last: Run | None = None

    def call(self, *args, timeout_s: float = TIMEOUT_S, **kwargs) -> None:
        """Start a run and wait for it; as `start`, and `wait` of what it returns."""
        self.start(*args, **kwargs).wait(timeout_s)

    def start(self, *args, **kwargs) -> Run:
        """Start a run. Its end is waited for by `wait` of what this returns.

        Parameters
        ----------
        kv, job : PynqBuffer
            As `pynq.allocate` returns them, in a bank that the argument is connected to.
        queue, n_jobs, summary : int
            `nearkv_hw.abi` says what they are.

        Raises
        ------
        TypeError, ValueError
            If an argument is missing, unknown or not what the kernel takes.
        RuntimeError
            If XRT does not start it: an earlier run may be under way.
        """
        library, run = self.device.library, self._run.value
        given = self._signature.bind(*args, **kwargs).arguments
        buffers = []
        for index, (name, register) in enumerate(self._arguments):
            value = given[name]
            if "*" in register["type"]:
                buffers.append(value)
                refused = library.set_buffer(run, index, self._buffer(name, value).handle)
            else:
                refused = library.set_word(run, index, _word(name, value))
            if refused:
                raise RuntimeError(f"XRT does not take argument {name}: {library.said()}")
        try:
            library.call("RunStart", run)
        except xrt.Refused as error:
            raise RuntimeError(
                f"the kernel cannot be started: {error}; wait for the run that is under way"
            ) from error
        self._last = Run(library, run, self._lock, self.device.where)
        self._last.buffers = tuple(buffers)
        return self._last

    def _buffer(self, name: str, value: Any) -> xrt.Buffer:
        if not isinstance(value, PynqBuffer) or not isinstance(value.bo, xrt.Buffer):
            raise TypeError(
                f"argument {name} must be an array of pynq.allocate(..., target=overlay.bank0), not "
                f"{type(value).__name__}"
            )
        if value.device is not self.device or value.offset:
            raise ValueError(
                f"argument {name} must be a whole array of this card, not one at byte {value.offset} of "
                f"an array of card {value.device.name!r}"
            )
        return value.bo

    def close(self) -> None:
        """Give the compute unit back; what waits for a run of it is told so."""
        if self._last is not None:
            self._last.given_up = True
        with self._lock:
            self._run.close()
            self.unit.handle.close()
        self._last = None  # and its buffers


def _word(name: str, value: Any) -> int:
    number = value.__index__() if hasattr(value, "__index__") else None
    if number is None or not 0 <= number < 1 << 32:
        raise ValueError(f"argument {name} must be a whole number of 32 bits, not {value!r}")
    return number


# --- the card "pynq:0" --------------------------------------------------------------------------------


class Executor(xrt.Executor):
    """Runs queues through PYNQ's device, memories and driver; what it checks is as behind XRT."""

    def _open_device(self) -> None:
        device = XrtCard(self._where, self.name)
        self.pci_address = device.pci_address
        overlay = pynq.Overlay(str(self._path.resolve()), device=device)
        self._driver: Kernel = getattr(overlay, self._unit.name)
        self._memories: list[PynqBuffer] = []
        try:
            value = self._driver.unit.handle.value
            group = self._check_arguments(value)
            self._built = self._check_build(value)
            self._check_idle(value)
            kv, job = self._allocate(device._open(), group)
        except BaseException:
            self._driver.close()
            raise
        self.kv, self.job = self._memories_of(kv, job)

    def _buffer(self, device: xrt.Handle, nbytes: int, flags: int, group: int) -> xrt.Buffer:
        bank = self._xclbin.memories[group]
        memory = self._driver.device.get_memory(
            {"idx": group, "tag": bank.tag, "base_address": bank.base, "size": bank.nbytes}
        )
        try:
            array = pynq.allocate((nbytes,), "u1", target=memory, p2p=bool(flags & xrt.P2P))
        except CardError as error:
            if isinstance(error.__cause__, xrt.Refused):
                raise error.__cause__ from None  # why, is found out as behind XRT
            raise
        self._memories.append(array)
        return array.bo

    def start(self, queue: int, n_jobs: int, summary: int) -> Run:
        kv, job = self._memories
        return self._driver.start(kv, job, queue, n_jobs, summary)

    def _read_register(self, kernel: int, name: str) -> int:
        return self._driver.read(xrt.offset_of(name))

    def close(self, timeout_s: float) -> None:
        self._close_device()
        del self._driver, self._memories, self.kv, self.job

    def _close_device(self) -> None:
        self._driver.close()
        self._driver.device.close()


def open_executor(name: str, unit: str, *, path: str | os.PathLike | None, **options) -> Executor:
    """As `nearkv.cards.xrt.open_executor`."""
    return xrt.open_executor(name, unit, path=path, kind=Executor, **options)
