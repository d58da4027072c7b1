# SPDX-License-Identifier: Apache-2.0
"""io_uring, as much of it as reading pages needs, by system calls.

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

_SETUP, _ENTER = 425, 426  # the same on every architecture but alpha
_OP_READ = 22
_SINGLE_MMAP = 1  # feature: both queues in one mapping, from Linux 5.4
_SQES_AT = 0x10000000  # mmap offset of the submissions
_ADDRESSES = (1 << 32) - 1  # of positions in the queues, which only ever count up
# opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data; the rest is zero
_SQE = struct.Struct("<BBHiQQIIQ24x")
_CQE = struct.Struct("<QiI")
_libc = ctypes.CDLL(None, use_errno=True)


class Uring:
    """A ring, of one thread; any other may `wake` it.

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
        self._queued = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        for fd in (self.fd, self._wake):
            self._poll.register(fd, select.POLLIN)

    def read(self, key: int, fd: int, offset: int, address: int, nbytes: int) -> None:
        """Queue a read of a file into memory, for the next `submit`."""
        place = (self._sq_tail.value + self._queued) & self._sq_mask
        _SQE.pack_into(
            self._sqes, place * _SQE.size, _OP_READ, 0, 0, fd, offset, address, nbytes, 0, key
        )
        self._queued += 1

    def submit(self) -> None:
        """Give the kernel what was queued: one system call.

        Raises
        ------
        OSError
            If it does not take it.
        """
        left, self._queued = self._queued, 0
        if not left:
            return
        self._sq_tail.value = (self._sq_tail.value + left) & _ADDRESSES
        while left:
            try:
                left -= _call(_ENTER, self.fd, left, 0, 0, None, 0)
            except BlockingIOError:  # no memory for it at the moment
                self._poll.poll(1)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until something has completed, somebody calls `wake`, or the time is up."""
        self._poll.poll(None if timeout_s is None else max(timeout_s, 0) * 1e3)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def wake(self) -> None:
        """End a `wait`, now or the next. From any thread."""
        if self.fd >= 0:
            os.eventfd_write(self._wake, 1)

    def completions(self) -> Iterator[tuple[int, int]]:
        """What has completed: key, and bytes read or a negative errno. Call it after `wait`."""
        # The system call in `wait` orders the reads of the tail and of the entries.
        head, tail = self._cq_head.value, self._cq_tail.value
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
    """Why this process cannot use io_uring; empty if it can."""
    try:
        Uring(1).close()
    except OSError as error:
        return (
            f"io_uring_setup: {os.strerror(error.errno or 0)} "
            "(see /proc/sys/kernel/io_uring_disabled; containers often forbid it)"
        )
    return ""


def _call(number: int, *arguments) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
