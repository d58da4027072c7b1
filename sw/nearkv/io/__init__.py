# SPDX-License-Identifier: Apache-2.0
"""The way to the drive: page files, readers, the memory they fill, and the errors of all of these."""

from . import fpga, pci, signals
from .errors import FlashError, LateError, PageId
from .files import Directory, File
from .memory import JobMemory, KvMemory
from .reader import (
    READ_BYTES,
    Load,
    Read,
    Reader,
    ReaderError,
    UringReader,
    open_reader,
    read_into,
    reader_kind,
)
from .shards import shards_of
from .window import Window

__all__ = [
    "FlashError", "LateError", "ReaderError", "PageId", "Directory", "File", "JobMemory", "KvMemory",
    "READ_BYTES", "Load", "Read", "Reader", "UringReader", "open_reader", "read_into", "reader_kind",
    "shards_of", "fpga", "pci", "signals", "Window",
]  # fmt: skip
