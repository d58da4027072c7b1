# SPDX-License-Identifier: Apache-2.0
"""Which drive belongs to which card, on trees of sysfs as such machines have them."""

import os
from pathlib import Path

import numpy as np
import pytest

from nearkv.attention import PageAttention
from nearkv.cards import open_card
from nearkv.cards.pairing import warn_if_far
from nearkv.io.pci import Nearness, drives, drives_behind, nearness
from nearkv.store import KvStore
from nearkv_hw.abi import PageLayout


class Machine:
    """A tree with sysfs in it."""

    def __init__(self, root: Path):
        self.tree, self.root = root, root / "sys"
        root = self.root
        for folder in ("bus/pci/devices", "class/nvme", "dev/block"):
            (root / folder).mkdir(parents=True)

    def device(self, *path: str, vendor="0x8086") -> Path:
        """A device below these bridges; its address is the last part of the path."""
        place = self.root / "devices/pci0000:00" / "/".join(path)
        place.mkdir(parents=True)
        (place / "vendor").write_text(vendor + "\n")
        (self.root / "bus/pci/devices" / path[-1]).symlink_to(place)
        return place

    def drive(self, number: int, *path: str, subsystem=False) -> Path:
        """A drive with a controller of that number; its block device."""
        controller = self.device(*path, vendor="0x144d") / f"nvme/nvme{number}"
        controller.mkdir(parents=True)
        (controller / "device").symlink_to("../..")
        (self.root / f"class/nvme/nvme{number}").symlink_to(controller)
        where = controller
        if subsystem:
            where = self.root / f"devices/virtual/nvme-subsystem/nvme-subsys{number}"
            where.mkdir(parents=True)
            (where / controller.name).symlink_to(controller)
            (self.root / "class/nvme-subsystem").mkdir(exist_ok=True)
            (self.root / f"class/nvme-subsystem/nvme-subsys{number}").symlink_to(where)
        block = where / f"nvme{number}n1"
        block.mkdir()
        return block

    def mount(self, directory: Path, block: Path) -> None:
        """A directory lies on a block device."""
        number = os.stat(directory).st_dev
        link = self.root / f"dev/block/{os.major(number)}:{os.minor(number)}"
        link.unlink(missing_ok=True)
        link.symlink_to(block)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "sys")


def _smartssd(machine: Machine, number: int, bus: int, **how) -> tuple[str, Path]:
    """A SmartSSD below root port `number`: the address of its FPGA, and its block device."""
    root = f"0000:00:{number + 1:02x}.0"
    switch, to_drive, to_fpga = (
        f"0000:{bus + at:02x}:{n:02x}.0" for at, n in ((0, 0), (1, 0), (1, 1))
    )
    drive, fpga = f"0000:{bus + 2:02x}:00.0", f"0000:{bus + 3:02x}:00.1"
    machine.device(root, switch, vendor="0x10ee")
    machine.device(root, switch, to_drive, vendor="0x10ee")
    machine.device(root, switch, to_fpga, vendor="0x10ee")
    block = machine.drive(number, root, switch, to_drive, drive, **how)
    machine.device(root, switch, to_fpga, fpga, vendor="0x10ee")
    return fpga, block


@pytest.mark.parametrize("subsystem", [False, True])
def test_a_smartssds_drive_is_the_one_in_it(machine, subsystem):
    cards = [_smartssd(machine, n, 0x10 + 0x10 * n, subsystem=subsystem)[0] for n in (0, 1)]
    found = drives(machine.tree)
    assert [list(drive.blocks) for drive in found] == [["nvme0n1"], ["nvme1n1"]]
    near = [[nearness(card, it.address, machine.tree) for it in found] for card in cards]
    own, far = Nearness.OWN, Nearness.ROOT_COMPLEX
    assert near == [[own, far], [far, own]]


def test_a_directory_lies_on_a_partition_of_a_volume_on_drives(machine, tmp_path):
    assert drives_behind(tmp_path, machine.tree) == []  # nothing that sysfs knows
    _, block = _smartssd(machine, 0, 0x10)
    _, other = _smartssd(machine, 1, 0x20)
    partition = block / "nvme0n1p2"
    partition.mkdir()
    (partition / "partition").write_text("2")
    machine.mount(tmp_path, partition)
    assert [it.name for it in drives_behind(tmp_path, machine.tree)] == ["nvme0"]
    raid = machine.root / "devices/virtual/block/md0"
    (raid / "slaves").mkdir(parents=True)
    for slave in (partition, other):
        (raid / "slaves" / slave.name).symlink_to(slave)
    machine.mount(tmp_path, raid)
    assert [it.name for it in drives_behind(tmp_path, machine.tree)] == ["nvme0", "nvme1"]


def test_an_alveo_has_the_drive_below_its_switch_near_and_one_elsewhere_far(machine, tmp_path):
    card = "0000:04:00.1"
    machine.device("0000:00:01.0", "0000:01:00.0", vendor="0x10b5")  # a switch of somebody else
    elsewhere = machine.drive(0, "0000:00:02.0", "0000:05:00.0")
    beside = machine.drive(1, "0000:00:01.0", "0000:01:00.0", "0000:02:00.0", "0000:03:00.0")
    machine.device("0000:00:01.0", "0000:01:00.0", "0000:02:01.0", card, vendor="0x10ee")
    machine.mount(tmp_path, beside)
    assert warn_if_far("xrt:0", card, tmp_path, machine.tree) == ""
    machine.mount(tmp_path, elsewhere)
    warn_if_far.cache_clear()
    assert "has nvme1 below the same PCIe switch" in warn_if_far(
        "xrt:0", card, tmp_path, machine.tree
    )


def test_an_alveo_that_has_no_drive_near_is_content_with_any(machine, tmp_path):
    machine.mount(tmp_path, machine.drive(0, "0000:00:02.0", "0000:05:00.0"))
    machine.device("0000:00:01.0", "0000:04:00.1", vendor="0x10ee")
    assert warn_if_far("xrt:0", "0000:04:00.1", tmp_path, machine.tree) == ""


def test_pages_on_another_drive_than_the_cards_are_said_once(machine, tmp_path, caplog):
    card, block = _smartssd(machine, 0, 0x10)
    _, other = _smartssd(machine, 1, 0x20)
    machine.mount(tmp_path, block)
    assert warn_if_far("xrt:0", card, tmp_path, machine.tree) == ""
    machine.mount(tmp_path, other)
    warn_if_far.cache_clear()
    for _ in range(2):
        warn_if_far("xrt:0", card, tmp_path, machine.tree)
    (record,) = caplog.records
    assert (
        f"'xrt:0' ({card}) has nvme0 inside the card, and {tmp_path} lies on nvme1:"
        in record.message
    )
    assert record.message.endswith("Choose a directory on nvme0")


def test_attention_tells_of_each_cards_own_shards(machine, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "nearkv.attention.scheduler.warn_if_far", lambda *arguments: asked.append(arguments)
    )
    directories = [tmp_path / name for name in "ab"]
    for directory in directories:
        directory.mkdir()
    with (
        open_card("model", config="tiny", kv_bytes=1 << 20, job_bytes=1 << 18) as first,
        open_card("model", config="tiny", kv_bytes=1 << 20, job_bytes=1 << 18) as second,
        KvStore(directories, PageLayout(32, 32), 2, temporary=True, n_shards=2) as store,
    ):
        first.pci_address, second.pci_address = "0000:13:00.1", None
        attention = PageAttention([first, second], store)
        k = np.zeros((2, 32, 32), np.float16)
        store.append(0, 0, k, k)
        attention.close()
        first.name, first.pci_address = "xrt:0/0", "0000:13:00.1"
        second.pci_address = first.pci_address  # another engine of that card
        with KvStore(directories[0], PageLayout(32, 32), 2, temporary=True, n_shards=2) as store:
            PageAttention([first, second], store).close()
    where = "0000:13:00.1", str(directories[0])
    assert asked == [("model", *where), ("xrt:0/0", *where)]
