# SPDX-License-Identifier: Apache-2.0
"""The memories of a card, by kind, so that a mistake cannot reach the wrong one.

    KvMemory    where drives deliver pages. On a real card a peer-to-peer BAR in one memory bank: it
                can be the target of a read and nothing else. The processor does not look into it.
    JobMemory   a host buffer that card and host share: jobs, page tables, queries, partials.

Both start on a page boundary and have whole pages, as O_DIRECT and P2P DMA want. They are types of
their own and no arrays: neither can be passed where the other is meant.
"""

import contextlib
import mmap

import numpy as np

from nearkv_hw.abi import PAGE_ALIGN_BYTES


class KvMemory:
    """The target of P2P reads.

    Parameters
    ----------
    nbytes : int
        A multiple of 4096.
    """

    def __init__(self, nbytes: int):
        self.nbytes = _checked("kv_bytes", nbytes)
        self._map = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The kernel pins the target of every O_DIRECT read: one page of 2 MiB instead of 512.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)

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
        """The place that a read fills. For `nearkv.flash` alone."""
        return memoryview(self._map)[offset : offset + nbytes]

    @property
    def address(self) -> int:
        """Where it starts in this process. For `nearkv.flash` alone."""
        return np.frombuffer(self._map, np.uint8).ctypes.data

    def simulated(self) -> np.ndarray:
        """The bytes, for a card that is a program: uint8 (nbytes,), read-only."""
        view = np.frombuffer(self._map, np.uint8)
        view.flags.writeable = False
        return view


class JobMemory:
    """What host and card both read and write.

    Parameters
    ----------
    nbytes : int
        A multiple of 4096.
    """

    def __init__(self, nbytes: int):
        self.nbytes = _checked("job_bytes", nbytes)
        self.bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)

    def check(self, offset: int, nbytes: int) -> None:
        """Raise ValueError unless the bytes lie inside."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"{nbytes} bytes at offset {offset} leave the {self.nbytes} bytes of job memory"
            )


def _checked(what: str, nbytes: int) -> int:
    if nbytes <= 0 or nbytes % PAGE_ALIGN_BYTES:
        raise ValueError(f"{what} must be a positive multiple of {PAGE_ALIGN_BYTES}, not {nbytes}")
    return nbytes
