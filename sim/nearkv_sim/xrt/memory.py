# SPDX-License-Identifier: Apache-2.0
"""Files in memory, for the memories of simulated cards.

A drive fills one page of 2 MiB much faster than 512 of 4 KiB: into a plain memfd, reads were half as fast as
into a program's own memory. Files of a tmpfs have huge pages if it was mounted so, which a process may do in
a namespace of its own, usually without being root. The files outlive that process.

    python -m nearkv_sim.xrt.memory SOCKET N    sends N such files through a socket that it inherits
"""

import contextlib
import ctypes
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


def files(n: int, nbytes: int) -> list[int]:
    """File descriptors of n files of so many bytes, in huge pages where the system lets us."""
    fds: list[int] = []
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [sys.executable, "-m", __name__, str(theirs.fileno()), str(n)],
            pass_fds=[theirs.fileno()], check=True, timeout=_TIMEOUT_S, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ours.setblocking(False)
        _, fds, _, _ = socket.recv_fds(ours, 1, n)
    if len(fds) != n:
        fds = [os.memfd_create("nearkv-card", os.MFD_CLOEXEC) for _ in range(n)]
    for fd in fds:
        os.set_inheritable(fd, False)
        os.ftruncate(fd, nbytes)
    return fds


def map_file(fd: int, nbytes: int) -> mmap.mmap:
    """The whole file, with huge pages where they are to be had for the asking."""
    mapped = mmap.mmap(fd, nbytes)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _main() -> int:
    theirs, n = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
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
    fds = [os.open(place, os.O_RDWR | os.O_TMPFILE, 0o600) for _ in range(n)]
    socket.send_fds(theirs, [b"x"], fds)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
