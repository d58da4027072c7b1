# SPDX-License-Identifier: Apache-2.0
"""Whether a card's pages lie on a drive that is near to it, as sysfs tells (`..io.pci`)."""

import functools
import logging
import os
from pathlib import Path

from ..io import fpga, pci

log = logging.getLogger("nearkv")

_WHERE = {
    pci.Nearness.OWN: "in it",
    pci.Nearness.SWITCH: "below the same switch",
    pci.Nearness.ROOT_COMPLEX: "on the same root complex",
}


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
    drives = [drive for drive in pci.drives_behind(directory, root) if drive.address]
    nearest = fpga.nearest_drive(address, root)
    if not drives or nearest is None:
        return ""
    nearness, drive = nearest
    farthest = min(pci.nearness(address, it.address, root) for it in drives)
    if farthest >= nearness:
        return ""
    names = ", ".join(it.name for it in drives)
    said = (
        f"card {card!r} ({address}) has {drive.name} {_WHERE[nearness]}, and {directory} lies on {names}: "
        f"its pages take the way through the host. Choose a directory on {drive.name}"
    )
    log.warning("%s", said)
    return said
