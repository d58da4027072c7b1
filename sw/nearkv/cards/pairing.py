# SPDX-License-Identifier: Apache-2.0
"""Whether a card's pages lie on a drive that is near to it, as sysfs tells (`..io.pci`)."""

from collections.abc import Sequence
import functools
import logging
import os
from pathlib import Path

from ..io import fpga, pci

log = logging.getLogger("nearkv")


def nearer(
    address: str, drives: Sequence[pci.Drive], root: Path = pci.ROOT
) -> tuple[pci.Nearness, pci.Drive] | None:
    """The drive that is nearest to a card, if pages on these drives lie farther from it; otherwise None.

    Parameters
    ----------
    address : str
        Where the card is on PCIe: "0000:04:00.1".
    drives : sequence of Drive
        On which the pages lie. Those that are nowhere on PCIe do not count.
    root : Path
        Of a recorded tree.
    """
    ways = [pci.nearness(address, drive.address, root) for drive in drives if drive.address]
    nearest = fpga.nearest_drive(address, root)
    return nearest if ways and nearest is not None and min(ways) < nearest[0] else None


@functools.lru_cache(maxsize=1024)
def warn_if_far(
    card: str, address: str, directory: str | os.PathLike, root: Path = pci.ROOT
) -> str:
    """Say, once, that pages lie farther from a card than another drive is; what was said, or "".

    Parameters
    ----------
    card : str
        Its name.
    address : str
        Where it is on PCIe: "0000:04:00.1".
    directory : path
        Where the pages are.
    root : Path
        Of a recorded tree.
    """
    drives = pci.drives_behind(directory, root)
    found = nearer(address, drives, root)
    if found is None:
        return ""
    nearness, drive = found
    names = ", ".join(it.name for it in drives)
    said = (
        f"card {card!r} ({address}) has {drive.name} {nearness.words}, and {directory} lies on {names}: "
        f"its pages take the way through the host. Choose a directory on {drive.name}"
    )
    log.warning("%s", said)
    return said
