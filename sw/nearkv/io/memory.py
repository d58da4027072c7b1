# SPDX-License-Identifier: Apache-2.0
"""The two memories of a card, by kind, so that a mistake cannot reach the wrong one.

    KvMemory    where drives deliver pages. On a real card a peer-to-peer BAR in one memory bank: it
                can be the target of a read and nothing else. The processor does not look into it.
    JobMemory   what host and card share: jobs, page tables, queries, partials.

Each is either this process' own (given a size), or *foreign* (given an address as well): mapped device
memory that belongs to somebody else. Into foreign kv memory the processor must not write, and foreign
memory cannot be abandoned: whoever has asked for something to be written there must wait until it is.
A card whose own memory is not the host's overrides `sync_to_device` and `sync_from_device`.

Memories start on a page boundary and have whole pages, as O_DIRECT and P2P DMA want. They are types of
their own and no arrays: neither can be passed where the other is meant.
"""

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np

from nearkv_hw.abi import PAGE_ALIGN_BYTES

_WIPE_ON_FORK = 18  # Ref: madvise(2), MADV_WIPEONFORK


class _Memory:
    """Parameters, for both kinds

    nbytes : int
        A multiple of 4096.
    address : int, optional
        Where foreign memory is mapped in this process, a multiple of 4096.
    keep : optional
        Kept as long as the memory is in use: what has mapped it.
    """

    _WHAT = ""

    def __init__(self, nbytes: int, *, address: int | None = None, keep: Any = None):
        if nbytes <= 0 or nbytes % PAGE_ALIGN_BYTES:
            raise ValueError(
                f"{self._WHAT} must be a positive multiple of {PAGE_ALIGN_BYTES}, not {nbytes}"
            )
        if address is not None and (address <= 0 or address % PAGE_ALIGN_BYTES):
            raise ValueError(
                f"memory must start at a multiple of {PAGE_ALIGN_BYTES} (O_DIRECT, P2P), "
                f"not at {address:#x}"
            )
        self.nbytes, self.foreign = nbytes, address is not None
        if address is None:
            own = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # A forked process gets zeros: pages that both had would be copied when either writes, and
            # what a drive is writing meanwhile would go to one of the copies only.
            with contextlib.suppress(OSError):
                own.madvise(_WIPE_ON_FORK)
            self._own, self._view = own, memoryview(own)
        else:
            array = (ctypes.c_ubyte * nbytes).from_address(address)
            array.keep = keep  # type: ignore[attr-defined]
            self._own, self._view = None, memoryview(array).cast("B")

    @property
    def address(self) -> int:
        """Where it starts in this process."""
        return np.frombuffer(self._view, np.uint8).ctypes.data

    def renewed(self):
        """Memory to use in place of this one, into which something may still be written.

        Foreign memory is not replaced here, as a card waits for what is on its way; it may do so in a
        card's own kind of memory.
        """
        return self if self.foreign else type(self)(self.nbytes)

    def release(self) -> None:
        """Called when the card is closed and nothing is on its way here: foreign memory may go back."""

    def sync_to_device(self, offset: int, nbytes: int) -> None:
        """Let the card see these bytes. Nothing to do where card and host look at one memory."""


class KvMemory(_Memory):
    """The target of reads from flash."""

    _WHAT = "kv_bytes"

    def __init__(self, nbytes: int, *, address: int | None = None, keep: Any = None):
        super().__init__(nbytes, address=address, keep=keep)
        # The kernel pins the target of every O_DIRECT read: one page of 2 MiB instead of 512.
        if self._own is not None and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._own.madvise(mmap.MADV_HUGEPAGE)

    def __array__(self, *args, **kwargs):
        raise TypeError("kv memory belongs to the card: the host can only direct reads into it")

    def check(self, offset: int, nbytes: int) -> None:
        """Raise ValueError unless a read may go there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"a read of {nbytes} bytes to kv offset {offset} leaves the {self.nbytes} bytes of "
                "kv memory"
            )
        if offset % PAGE_ALIGN_BYTES:
            raise ValueError(
                f"kv offset {offset} is not a multiple of {PAGE_ALIGN_BYTES} (O_DIRECT, P2P)"
            )

    def target(self, offset: int, nbytes: int) -> memoryview:
        """The place that a read fills. For readers alone."""
        return self._view[offset : offset + nbytes]

    def simulated(self) -> np.ndarray:
        """The bytes, for a card that is a program: uint8 (nbytes,), read-only."""
        view = np.frombuffer(self._view, np.uint8)
        view.flags.writeable = False
        return view


class JobMemory(_Memory):
    """What host and card both read and write.

    Attributes
    ----------
    bytes : uint8 (nbytes,)
        As the host sees it.
    """

    _WHAT = "job_bytes"

    def __init__(self, nbytes: int, *, address: int | None = None, keep: Any = None):
        super().__init__(nbytes, address=address, keep=keep)
        self.bytes = np.frombuffer(self._view, np.uint8)

    def sync_from_device(self, offset: int, nbytes: int) -> None:
        """Let the host see what the card has written there."""

    def check(self, offset: int, nbytes: int) -> None:
        """Raise ValueError unless the bytes lie inside."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"{nbytes} bytes at offset {offset} leave the {self.nbytes} bytes of job memory"
            )
