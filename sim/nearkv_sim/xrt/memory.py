# SPDX-License-Identifier: Apache-2.0
"""Files in memory, for the memories of simulated cards.

A drive fills one page of 2 MiB much faster than 512 of 4 KiB: into a plain memfd, reads were half as fast as
into a program's own memory. Files of a tmpfs have huge pages if it was mounted so, which a process may do in
a namespace of its own, usually without being root. What it has mounted lives on in whoever has a file of it.

    python nearkv_sim/xrt/memory.py SOCKET    sends such a directory through a socket that it inherits
"""

import contextlib
import ctypes
import functools
import mmap
import os
import socket
import subprocess
import sys
import tempfile

HUGE_BYTES = 2 << 20
_TIMEOUT_S = 60.0
# Ref: unshare(2), mount(2)
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_PRIVATE = 0x4000 | 0x40000


def new_file(nbytes: int) -> int:
    """File descriptor of a file of so many bytes, in huge pages where the system lets us."""
    directory = _directory()
    if directory is None:
        fd = os.memfd_create("nearkv-card", os.MFD_CLOEXEC)
    else:
        fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
    os.ftruncate(fd, nbytes)
    return fd


@functools.cache
def _directory() -> int | None:
    """Of a tmpfs with huge pages, as a file descriptor; once for this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [sys.executable, "-I", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], check=True, timeout=_TIMEOUT_S, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ours.setblocking(False)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if fds:
            os.set_inheritable(fds[0], False)
            return fds[0]
    return None


def map_file(fd: int, nbytes: int) -> mmap.mmap:
    """The whole file, with huge pages where they are to be had for the asking."""
    mapped = mmap.mmap(fd, nbytes)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _main() -> int:
    theirs = socket.socket(fileno=int(sys.argv[1]))
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWNS):
        if libc.unshare(_NEWNS | _NEWUSER):
            return 1
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"),
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    place = os.fsencode(tempfile.gettempdir())
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None) or libc.mount(
        b"nearkv", place, b"tmpfs", ctypes.c_ulong(0), b"huge=always,mode=700"
    ):
        return 1
    socket.send_fds(theirs, [b"x"], [os.open(place, os.O_RDONLY | os.O_DIRECTORY)])
    return 0


if __name__ == "__main__":
    sys.exit(_main())
