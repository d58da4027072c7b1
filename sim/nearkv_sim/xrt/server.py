# SPDX-License-Identifier: Apache-2.0
"""Simulated cards, as a driver sees them: memory banks, compute units with registers, contexts.

What a unit computes, a backend does: `nearkv_sim.twin.TwinCard`, `nearkv_sim.model.ModelCard` or
`nearkv_sim.rtl.RtlCard`. A card's memory is a file in memory, of which only what is used takes room; the
host's programs map parts of it, as they would a BAR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import errno
import logging
import mmap
import os
from pathlib import Path
import socket
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from nearkv_hw import abi, xclbin
from nearkv_hw.vitis.interface import NAME

from .memory import HUGE_BYTES, map_file
from .protocol import ANY_UNIT, REPLY, REQUEST, Op

log = logging.getLogger("nearkv-xrt-sim")

_PAGE = mmap.PAGESIZE
_READY_S = 60.0  # for the second connection of a program, which it has made when it sends anything
_BANK = 0xFFFF  # of a buffer's flags
_P2P = 1 << 30

# Ref: ert.h, enum ert_cmd_state, and the header of ert_start_kernel_cmd.
_RUNNING, _COMPLETED, _ERROR, _ABORT = 3, 4, 5, 6
_START_CU = 0

FAULTS = ("hang", "wedge", "error", "late", "no-p2p", "busy", "other-build")


class Fault(NamedTuple):
    """Something that goes wrong with a card on purpose.

    Attributes
    ----------
    kind : str
        "hang": a run does not end, until the kernel is closed. "wedge": it and all later ones do not
        end, whoever closes what, as on a card that wants `xbutil reset`. "error": it ends with an error.
        "late": it ends `seconds` later. "no-p2p": the card has no P2P memory. "busy": another process
        has the kernel for itself. "other-build": the kernel is another build than its backend.
    run : int or None
        Which run of the card, from 0; None: every run.
    seconds : float
    """

    kind: str
    run: int | None = None
    seconds: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From KIND[:SECONDS][@RUN], such as "hang@2" or "late:0.5". Raises ValueError."""
        kind, _, run = text.partition("@")
        kind, _, seconds = kind.partition(":")
        try:
            if kind not in FAULTS or seconds and kind != "late":
                raise ValueError
            return cls(kind, int(run) if run else None, float(seconds) if seconds else 1.0)
        except ValueError:
            raise ValueError(
                f"a fault must be {', '.join(FAULTS)}, with @RUN or not, late with :SECONDS, not {text!r}"
            ) from None


class _Refused(Exception):
    """A request cannot be served; `errno`."""

    def __init__(self, number: int, why: str):
        super().__init__(why)
        self.errno = number


class _Buffer(NamedTuple):
    address: int
    offset: int  # in the card's memory
    nbytes: int
    bytes: np.ndarray | None  # of the card's memory; None: of a command
    command: mmap.mmap | None = None


class _Bank:
    """One memory bank, and which parts of it are free."""

    def __init__(self, memory: xclbin.Memory, offset: int):
        self.memory, self.offset = memory, offset
        self._free = [(0, memory.nbytes)]  # ascending, no two of them touch

    def allocate(self, nbytes: int) -> int:
        """Offset in the bank."""
        align = HUGE_BYTES if nbytes >= HUGE_BYTES else _PAGE
        nbytes += -nbytes % _PAGE
        for index, (begin, size) in enumerate(self._free):
            at = begin + -begin % align
            left = begin + size - (at + nbytes)
            if left >= 0:
                parts = [(begin, at - begin), (at + nbytes, left)]
                self._free[index : index + 1] = [part for part in parts if part[1]]
                return at
        raise _Refused(errno.ENOMEM, f"no {nbytes} bytes are free in {self.memory.tag}")

    def free(self, at: int, nbytes: int) -> None:
        nbytes += -nbytes % _PAGE
        parts: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (at, nbytes)]):
            if parts and sum(parts[-1]) == begin:
                parts[-1] = parts[-1][0], parts[-1][1] + size
            else:
                parts.append((begin, size))
        self._free = parts


class Unit:
    """A compute unit: its registers, and the backend that computes what it is started with."""

    def __init__(self, card: Card, unit: xclbin.Unit, backend: Any):
        self.card, self.unit, self.backend = card, unit, backend
        self.runs = 0
        self.users: dict[int, bool] = {}  # device -> whether it shares the unit
        self._lock = threading.Lock()  # of a run
        self._words: dict[int, int] = {}
        self._control = abi.CTRL_IDLE

    def read(self, offset: int) -> int:
        """A register, with what reading it does."""
        if offset == abi.REG_CTRL:
            value = self._control
            self._control &= ~(abi.CTRL_DONE | abi.CTRL_READY)
            return value
        return self._words.get(offset, 0)

    def write(self, offset: int, value: int, device: _Device) -> None:
        """A register, with what writing it does."""
        if offset == abi.REG_CTRL:
            if value & abi.CTRL_START:
                threading.Thread(target=self._started, args=(device,), daemon=True).start()
        elif offset == abi.REG_ISR:
            self._words[offset] = self._words.get(offset, 0) ^ value
        elif offset not in _CONSTANTS:
            self._words[offset] = value

    def execute(self, image: Sequence[int], device: _Device) -> int:
        """Carry out a command with this image of the registers; the state it ends in."""
        with self._lock:
            # As XRT's driver does: every word from the first argument on.
            for index in range(abi.REGISTERS[0].offset // 4, len(image)):
                self.write(4 * index, image[index], device)
            return self._run(device)

    def _started(self, device: _Device) -> None:
        """By a write to the control register."""
        with self._lock:
            self._run(device)

    def _run(self, device: _Device) -> int:
        number, self.runs = self.runs, self.runs + 1
        self._control = abi.CTRL_START
        state = self._compute(number, device)
        if state == _COMPLETED:
            enabled = self._words.get(abi.REG_IER, 0) & (abi.IRQ_DONE | abi.IRQ_READY)
            self._words[abi.REG_ISR] = self._words.get(abi.REG_ISR, 0) | enabled
            self._control = abi.CTRL_DONE | abi.CTRL_IDLE | abi.CTRL_READY
        elif not self.card.wedged:
            self._control = abi.CTRL_IDLE
        return state

    def _compute(self, number: int, device: _Device) -> int:
        if self.card.fault("hang", number):
            device.gone.wait()
            return _ABORT
        if self.card.fault("wedge", number):
            self.card.wedged = True
        if self.card.wedged:
            device.gone.wait()
            return _ABORT
        if late := self.card.fault("late", number):
            device.gone.wait(late.seconds)
        if self.card.fault("error", number):
            return _ERROR
        try:
            kv, job = (self.card.bytes_from(self._argument(name), name) for name in ("kv", "job"))
            queue, n_jobs, summary = (self._argument(x) for x in ("queue", "n_jobs", "summary"))
            self.backend.execute(kv, job, queue, n_jobs, summary, None)
        except Exception as error:  # of a backend: the card goes on, as hardware would
            if not self.card.closing:
                self.card.complain(f"run {number}: {error}")
            return _ERROR
        return _COMPLETED

    def _argument(self, name: str) -> int:
        register = next(it for it in abi.REGISTERS if it.name == name)
        words = [self._words.get(register.offset + at, 0) for at in range(0, register.bits // 8, 4)]
        return sum(word << 32 * index for index, word in enumerate(words))

    def constants(self) -> None:
        """Write what only the hardware writes."""
        for offset, value in zip(
            _CONSTANTS, (abi.ABI_VERSION, self.backend.config.hash32), strict=True
        ):
            self._words[offset] = value ^ (self.card.fault("other-build") is not None)


_CONSTANTS = tuple(it.offset for it in abi.REGISTERS if not it.writable)


class Card:
    """A simulated card.

    Parameters
    ----------
    index : int
    fd : int
        A file for its memory, as large as all its banks together. The card closes it.
    open_backend : callable
        Makes the backend of a compute unit.
    platform : str
        Its name.
    memories : sequence of Memory
        Its banks.
    faults : sequence of Fault

    Attributes
    ----------
    pci_slot : int
        Where it says that it is on PCIe: domain, bus (8 bits), device (5), function (3); 0: nowhere.
    loaded : Xclbin or None
    units : list of Unit
        Of the xclbin that is loaded.
    complaints : list of str
        What programs, or the backend, did wrong.
    """

    def __init__(
        self,
        index: int,
        fd: int,
        open_backend: Callable[[], Any],
        *,
        platform: str,
        memories: Sequence[xclbin.Memory],
        faults: Sequence[Fault] = (),
    ):
        self.index, self.platform, self.faults = index, platform, list(faults)
        self._open_backend = open_backend
        self.pci_slot = 0
        self.loaded: xclbin.Xclbin | None = None
        self.units: list[Unit] = []
        self.complaints: list[str] = []
        self.wedged = self.closing = False
        self.lock = threading.RLock()
        self.memories = list(memories)
        self.banks, end = [], 0
        for memory in memories:
            self.banks.append(_Bank(memory, end))
            end += memory.nbytes
        self.fd = fd
        self._map = map_file(fd, end)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.buffers: dict[int, _Buffer] = {}  # of all programs

    def fault(self, kind: str, run: int | None = None) -> Fault | None:
        """The fault of that kind which concerns a run, or anything."""
        for fault in self.faults:
            if fault.kind == kind and (fault.run is None or fault.run == run):
                return fault
        return None

    def complain(self, what: str) -> None:
        log.info("card %d: %s", self.index, what)
        self.complaints.append(what)

    def load(self, data: bytes, device: _Device) -> None:
        """An xclbin. As on a card, nothing happens if it is there already."""
        try:
            loaded = xclbin.Xclbin.unpack(data)
            kernels = {kernel.name for kernel in loaded.kernels}
        except xclbin.XclbinError as error:
            raise _Refused(errno.EINVAL, str(error)) from error
        with self.lock:
            if self.loaded is not None and loaded.uuid == self.loaded.uuid:
                return
            if any(unit.users for unit in self.units):
                raise _Refused(errno.EBUSY, "another xclbin is in use")
            if loaded.platform != self.platform:
                raise _Refused(
                    errno.EINVAL, f"it is for {loaded.platform}, and this card is {self.platform}"
                )
            if NAME not in kernels:
                raise _Refused(errno.EINVAL, f"it has kernels {sorted(kernels)}, not {NAME}")
            for unit in self.units:
                unit.backend.close()
            self.units = [Unit(self, unit, self._open_backend()) for unit in loaded.units]
            self.loaded = loaded
        for unit in self.units:
            unit.constants()

    def allocate(self, number: int, nbytes: int, flags: int) -> _Buffer:
        if not nbytes:
            raise _Refused(errno.EINVAL, "a buffer must have bytes")
        if flags & _P2P and self.fault("no-p2p"):
            raise _Refused(errno.EINVAL, "p2p is not enabled")
        with self.lock:
            index = flags & _BANK
            if index >= len(self.banks) or not self.banks[index].memory.used:
                raise _Refused(errno.EINVAL, f"there is no memory bank {index} in use")
            bank = self.banks[index]
            at = bank.allocate(nbytes)
            offset = bank.offset + at
            array = self._bytes[offset : offset + nbytes]
            buffer = _Buffer(bank.memory.base + at, offset, nbytes, array)
            self.buffers[number] = buffer
            return buffer

    def free(self, number: int) -> None:
        with self.lock:
            buffer = self.buffers.pop(number, None)
            if buffer is None:
                raise _Refused(errno.ENOENT, f"there is no buffer {number}")
            if buffer.command is not None:
                buffer.command.close()
                return
            size = buffer.nbytes + -buffer.nbytes % _PAGE
            # What it held goes, as the next who gets it must not find it.
            self._map.madvise(mmap.MADV_REMOVE, buffer.offset, size)
            for bank in self.banks:
                if 0 <= buffer.offset - bank.offset < bank.memory.nbytes:
                    bank.free(buffer.offset - bank.offset, buffer.nbytes)

    def offset_of(self, address: int, nbytes: int) -> int:
        """In the card's memory, of an address."""
        for bank in self.banks:
            at = address - bank.memory.base
            if bank.memory.used and 0 <= at and at + nbytes <= bank.memory.nbytes:
                return bank.offset + at
        raise _Refused(errno.EFAULT, f"there is no memory at {address:#x}")

    def bytes_from(self, address: int, name: str) -> np.ndarray:
        """The rest of the buffer in which an address is: uint8."""
        with self.lock:
            for buffer in self.buffers.values():
                at = address - buffer.address
                if buffer.bytes is not None and 0 <= at < buffer.nbytes:
                    return buffer.bytes[at:] if at else buffer.bytes
        raise ValueError(f"argument {name} is {address:#x}, which is in no buffer of this card")

    def stop(self) -> None:
        """End the runs that are under way; there will be no others."""
        self.closing = True
        for unit in self.units:
            unit.backend.close()

    def close(self) -> None:
        self.stop()
        with contextlib.suppress(OSError):
            os.close(self.fd)


class _Device:
    """A card that a program has opened: its two connections, and what it has of the card."""

    def __init__(self, card: Card, number: int, event: int):
        self.card, self.number, self.event = card, number, event
        self.gone = threading.Event()  # its commands are given up
        self.mine: set[int] = set()  # numbers of its buffers
        self.commands: threading.Thread | None = None
        self.ready = threading.Event()  # `commands` is there
        self.command_images: dict[int, memoryview] = {}

    def abort(self) -> None:
        """Give up the commands that are under way, as a driver does for who closes the kernel."""
        gone, self.gone = self.gone, threading.Event()
        gone.set()

    def release(self) -> list[str]:
        """The program has closed it, or has ended; what it had left open."""
        self.gone.set()
        if self.commands is not None and self.commands is not threading.current_thread():
            # A run that is under way ends before its buffers become somebody else's.
            while self.commands.is_alive():
                self.commands.join(0.1)
        left = []
        with self.card.lock:
            n_data = sum(self.card.buffers[number].command is None for number in self.mine)
            if n_data:
                left.append(f"{n_data} buffers")
            for number in self.mine:
                image = self.command_images.pop(number, None)
                if image is not None:
                    image.release()
                self.card.free(number)
            self.mine.clear()
            for unit in self.card.units:
                if unit.users.pop(self.number, None) is not None:
                    left.append(f"kernel {unit.unit.kernel}:{unit.unit.name}")
        os.close(self.event)
        return left


class Server:
    """Serves cards to the drivers of any number of programs. A context manager.

    Parameters
    ----------
    cards : sequence of Card
    path : Path
        Of the socket.
    """

    def __init__(self, cards: Sequence[Card], path: Path):
        self.cards = list(cards)
        self._devices: dict[int, _Device] = {}
        self._numbers = iter(range(1, 1 << 31))
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="xrt-sim", daemon=True)
        self._accepting.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """End every connection, as if the cards were pulled out, and free the cards."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for device in list(self._devices.values()):
            device.gone.set()
        for card in self.cards:
            card.stop()
        for thread in threads:
            thread.join()
        for card in self.cards:
            card.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                self._connections.add(connection)
                self._threads = [it for it in self._threads if it.is_alive()] + [thread]
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        device: _Device | None = None
        try:
            while (message := _receive(connection)) is not None:
                op, a, b, c, text, fd = message
                if op == Op.COMMANDS:
                    commands_of = self._devices.get(a)
                    if commands_of is not None:
                        commands_of.commands = threading.current_thread()
                        commands_of.ready.set()
                        _carry_out(connection, commands_of)
                    return
                try:
                    if op == Op.OPEN:
                        device, reply = self._open(a, fd)
                        fd = -1
                        _send(connection, reply, device.card.fd)
                        continue
                    if device is None:
                        raise _Refused(errno.EPROTO, "no card is open")
                    reply = self._answer(device, op, a, b, c, text, fd)
                except (_Refused, OSError, ValueError) as refused:
                    log.info("refused: %s", refused)
                    reply = (getattr(refused, "errno", None) or errno.EINVAL, 0, 0, 0)
                finally:
                    if fd >= 0:
                        os.close(fd)
                _send(connection, reply)
        except OSError as error:  # the program has ended
            log.debug("%s", error)
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
            if device is not None:
                with self._lock:
                    self._devices.pop(device.number, None)
                left = device.release()
                if left:
                    device.card.complain(f"a program left {' and '.join(left)} open")

    def _open(self, index: int, event: int) -> tuple[_Device, tuple]:
        if index >= len(self.cards):
            raise _Refused(errno.ENODEV, f"there is no card {index}, only {len(self.cards)}")
        with self._lock:
            number = next(self._numbers)
            device = self._devices[number] = _Device(self.cards[index], number, event)
        return device, (0, number, self.cards[index].pci_slot, 0, self.cards[index].platform)

    def _answer(self, device: _Device, op, a, b, c, text, fd) -> tuple[int, ...]:
        card = device.card
        if op == Op.LOAD:
            device.ready.wait(_READY_S)
            card.load(os.pread(fd, b, 0), device)
        elif op == Op.OPEN_CONTEXT:
            self._open_context(device, a, bool(b))
        elif op == Op.CLOSE_CONTEXT:
            if a < len(card.units):  # otherwise it was the whole card's
                card.units[a].users.pop(device.number, None)
                device.abort()
        elif op == Op.ALLOCATE:
            number = self._number()
            buffer = card.allocate(number, b, a)
            device.mine.add(number)
            return (0, number, buffer.address, buffer.offset)
        elif op == Op.ALLOCATE_COMMAND:
            number = self._number()
            command = mmap.mmap(fd, b)
            card.buffers[number] = _Buffer(0, 0, b, None, command)
            device.command_images[number] = memoryview(command).cast("I")
            device.mine.add(number)
            return (0, number, 0, 0)
        elif op == Op.FREE:
            device.mine.discard(a)
            image = device.command_images.pop(a, None)
            if image is not None:
                image.release()
            card.free(a)
        elif op == Op.LOCATE:
            return (0, 0, 0, card.offset_of(b, c))
        elif op in (Op.READ_REGISTER, Op.WRITE_REGISTER):
            unit, offset = _unit_at(card, a, b)
            if op == Op.READ_REGISTER:
                return (0, unit.read(offset), 0, 0)
            unit.write(offset, c & 0xFFFFFFFF, device)
        elif op == Op.UNIT:
            names = [f"{unit.unit.kernel}:{unit.unit.name}" for unit in card.units]
            if text not in names:
                raise _Refused(errno.ENOENT, f"there is no unit {text}, only {names}")
            return (0, names.index(text), 0, 0)
        else:
            raise _Refused(errno.EPROTO, f"request {op} is unknown")
        return (0, 0, 0, 0)

    def _number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def _open_context(self, device: _Device, index: int, shared: bool) -> None:
        card = device.card
        with card.lock:
            if index == ANY_UNIT:
                return  # the xclbin is in use
            if index >= len(card.units):
                raise _Refused(errno.EINVAL, f"there is no unit {index}")
            unit = card.units[index]
            others = [how for number, how in unit.users.items() if number != device.number]
            if card.fault("busy") or others and not (shared and all(others)):
                raise _Refused(errno.EBUSY, f"unit {unit.unit.name} is in use by another process")
            unit.users[device.number] = shared


def _unit_at(card: Card, index: int, offset: int) -> tuple[Unit, int]:
    """The unit that a register belongs to, and its offset there."""
    if index == ANY_UNIT:
        for unit in card.units:
            if 0 <= offset - unit.unit.base < abi.CONTROL_BYTES:
                return unit, offset - unit.unit.base
    elif index < len(card.units) and offset < abi.CONTROL_BYTES:
        return card.units[index], offset
    raise _Refused(errno.EFAULT, f"there is no register at {offset:#x} of unit {index}")


def _carry_out(connection: socket.socket, device: _Device) -> None:
    """Carry out a device's commands, one after the other."""
    while (message := _receive(connection)) is not None:
        number = message[1]
        image = device.command_images.get(number)
        if image is None:
            continue  # freed meanwhile
        state = _execute(image, device)
        with contextlib.suppress(ValueError):  # freed meanwhile: nobody waits for it
            image[0] = image[0] & ~0xF | state
        with contextlib.suppress(OSError):
            os.eventfd_write(device.event, 1)


def _execute(image: memoryview, device: _Device) -> int:
    header = image[0]
    extra, count, opcode = (header >> 10) & 3, (header >> 12) & 0x7FF, (header >> 23) & 0x1F
    masks = image[1 : 2 + extra].tolist()
    chosen = [
        32 * word + bit for word, mask in enumerate(masks) for bit in range(32) if mask >> bit & 1
    ]
    units = [index for index in chosen if index < len(device.card.units)]
    if opcode != _START_CU or not units:
        device.card.complain(f"a command with opcode {opcode} for units {chosen}")
        return _ERROR
    image[0] = header & ~0xF | _RUNNING
    return device.card.units[units[0]].execute(image[2 + extra : 1 + count].tolist(), device)


def _receive(connection: socket.socket):
    """(op, a, b, c, text, file descriptor or -1), or None at the end."""
    data, control, _, _ = connection.recvmsg(REQUEST.size, socket.CMSG_SPACE(4))
    if len(data) != REQUEST.size:
        return None
    fd = -1
    for _, kind, payload in control:
        if kind == socket.SCM_RIGHTS:
            (fd,) = struct.unpack("i", payload[:4])
    op, a, b, c, text = REQUEST.unpack(data)
    return op, a, b, c, text.split(b"\0")[0].decode("utf-8", "replace"), fd


def _send(connection: socket.socket, reply: tuple, fd: int = -1) -> None:
    error, a, b, c, *text = reply
    data = REPLY.pack(error, a, b, c, text[0].encode() if text else b"")
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd >= 0 else []
    connection.sendmsg([data], control)
