# SPDX-License-Identifier: Apache-2.0
"""io_uring, as much of it as reading pages needs, by system calls.

Pages travel from flash to kv memory as reads of this ring where the system allows it (`refusal`), and
otherwise as system calls of threads.

Not the package `liburing`: it reads into bytearrays only, which cannot be aligned for O_DIRECT, holds
Python's lock in every call and asks for Linux 6.14. Here calls leave the lock, and Linux 5.6 will do.

# Ref: io_uring_setup(2), io_uring_enter(2)
"""

from collections.abc import Iterator
import contextlib
import ctypes
import errno
import functools
import mmap
import os
import select
import struct
import threading
import time

_SETUP, _ENTER = 425, 426  # the same on every architecture but alpha
_OP_READ = 22
_SINGLE_MMAP = 1  # feature: both queues in one mapping, from Linux 5.4
_SQES_AT = 0x10000000  # mmap offset of the submissions
_SUBMIT_S = 10.0  # how long the kernel may have no memory for a request
_PROBE_S = 10.0
_ADDRESSES = (1 << 32) - 1  # of positions in the queues, which only ever count up
# opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data; the rest is zero
_SQE = struct.Struct("<BBHiQQIIQ24x")
_CQE = struct.Struct("<QiI")
_libc = ctypes.CDLL(None, use_errno=True)


class Uring:
    """A ring. One thread at a time may use it; while it is in `wait`, another one, and any may `wake` it.

    Parameters
    ----------
    entries : int
        Reads on their way at once, at most.

    Raises
    ------
    OSError
        If the kernel has no io_uring, or does not allow it.
    """

    def __init__(self, entries: int):
        parameters = (ctypes.c_uint32 * 30)()
        self.fd = _call(_SETUP, entries, parameters)
        try:
            n_sqes, n_cqes, features = parameters[0], parameters[1], parameters[5]
            if not features & _SINGLE_MMAP:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            sq, cq = parameters[10:20], parameters[20:30]
            nbytes = max(sq[6] + 4 * n_sqes, cq[5] + _CQE.size * n_cqes)
            self._queues = mmap.mmap(self.fd, nbytes)
            self._sqes = mmap.mmap(self.fd, _SQE.size * n_sqes, offset=_SQES_AT)
        except BaseException:
            os.close(self.fd)
            raise
        self._sq_mask, self._cq_mask, self._cqes_at = n_sqes - 1, n_cqes - 1, cq[5]
        self._sq_tail, self._cq_head, self._cq_tail = (
            ctypes.c_uint32.from_buffer(self._queues, at) for at in (sq[1], cq[0], cq[1])
        )
        # Submission i is always in place i.
        struct.pack_into(f"<{n_sqes}I", self._queues, sq[6], *range(n_sqes))
        self._queued: list[int] = []
        self._barrier = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll, self._poll_wake = select.poll(), select.poll()
        self._poll.register(self.fd, select.POLLIN)
        for poll in (self._poll, self._poll_wake):
            poll.register(self._wake, select.POLLIN)

    def read(self, key: int, fd: int, offset: int, address: int, nbytes: int) -> None:
        """Queue a read of a file into memory, for the next `submit`."""
        place = (self._sq_tail.value + len(self._queued)) & self._sq_mask
        _SQE.pack_into(
            self._sqes, place * _SQE.size, _OP_READ, 0, 0, fd, offset, address, nbytes, 0, key
        )
        self._queued.append(key)

    def submit(self) -> None:
        """Give the kernel what was queued: one system call.

        Raises
        ------
        OSError
            If it does not take it.
        """
        keys, self._queued = self._queued, []
        if not keys:
            return
        left = len(keys)
        self._sq_tail.value = (self._sq_tail.value + left) & _ADDRESSES
        try:
            deadline = time.monotonic() + _SUBMIT_S
            while left:
                try:
                    left -= _call(_ENTER, self.fd, left, 0, 0, None, 0)
                except InterruptedError:
                    pass
                except BlockingIOError:  # no memory for it at the moment
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(1e-3)
        except BaseException:
            # The kernel looks at the queue in the system call only: what it has not taken is ours.
            self._sq_tail.value = (self._sq_tail.value - left) & _ADDRESSES
            self._queued = keys[len(keys) - left :]
            raise

    def forget(self) -> list[int]:
        """Take back what is queued and was not submitted, or not taken by the kernel; the keys."""
        keys, self._queued = self._queued, []
        return keys

    def wait(self, timeout_s: float, *, completions: bool = True) -> None:
        """Wait until something has completed (if asked for), somebody calls `wake`, or the time is up."""
        poll = self._poll if completions else self._poll_wake
        poll.poll(max(timeout_s, 0) * 1e3)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def wake(self) -> None:
        """End a `wait`, now or the next. From any thread."""
        if self.fd >= 0:
            os.eventfd_write(self._wake, 1)

    def completions(self) -> Iterator[tuple[int, int]]:
        """What has completed by now: key, and bytes read or a negative errno."""
        head, tail = self._cq_head.value, self._cq_tail.value
        with self._barrier:  # entries are read after the tail, on processors that would not wait
            pass
        while head != tail:
            at = self._cqes_at + (head & self._cq_mask) * _CQE.size
            key, result, _ = _CQE.unpack_from(self._queues, at)
            head = (head + 1) & _ADDRESSES
            self._cq_head.value = head
            yield key, result

    def close(self) -> None:
        """Give the ring back. What is on its way may still be written to memory."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._wake)
            self.fd = -1


@functools.cache
def refusal() -> str:
    """Why this process cannot read by io_uring; empty if it can.

    Tried, not asked for: on Linux 5.4 and 5.5 there are rings, and they know no IORING_OP_READ; and
    containers forbid one system call or another.
    """
    forbidden = "(see /proc/sys/kernel/io_uring_disabled; containers often forbid it)"
    try:
        ring = Uring(1)
    except OSError as error:
        return f"io_uring_setup: {os.strerror(error.errno or 0)} {forbidden}"
    fd = -1
    try:
        fd = os.memfd_create("nearkv-probe")
        os.write(fd, b"nearkv")
        buffer = (ctypes.c_char * 8)()
        ring.read(1, fd, 0, ctypes.addressof(buffer), 6)
        ring.submit()
        deadline = time.monotonic() + _PROBE_S
        while (left := deadline - time.monotonic()) > 0:
            ring.wait(left)
            for _, result in ring.completions():
                if result < 0:
                    return f"IORING_OP_READ: {os.strerror(-result)} (it needs Linux 5.6)"
                if buffer.value != b"nearkv":
                    return f"IORING_OP_READ gave {buffer.value!r} instead of what was written"
                return ""
        _kept.append(buffer)  # it may still be written to
        return f"IORING_OP_READ: nothing came within {_PROBE_S:g} s"
    except OSError as error:
        return f"io_uring_enter: {os.strerror(error.errno or 0)} {forbidden}"
    finally:
        ring.close()
        if fd >= 0:
            os.close(fd)


_kept: list = []


def _call(number: int, *arguments) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
