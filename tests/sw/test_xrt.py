# SPDX-License-Identifier: Apache-2.0
"""Cards behind the real XRT library, with simulated hardware under it."""

import ctypes
import gc
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import nearkv
from nearkv.attention import PageAttention
from nearkv.cards import CardError, installed, open_card
from nearkv.cards import xrt as xrt_card
from nearkv.io import fpga
from nearkv.store import KvStore
from nearkv_hw import abi, xclbin
from nearkv_hw.abi import PageLayout
from nearkv_hw.vitis.boards import load
from nearkv_sim import xrt
from nearkv_sim.xrt import Fault, server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(xrt.missing()), reason=xrt.missing()),
]

LAYOUT = PageLayout(32, 32)
SMALL = {"kv_bytes": 1 << 20, "job_bytes": 1 << 18}


def _inputs(tokens=100, heads=2, kv_heads=1, head_dim=64, kind=np.float16):
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((heads, head_dim)).astype(kind)
    k, v = rng.standard_normal((2, tokens, kv_heads, head_dim)).astype(kind)
    return q, k, v


def _check_attend(card, **shape):
    """That a card's attention is the twin's, bit for bit."""
    inputs = _inputs(**shape)
    with open_card("twin", config="tiny") as twin:
        expected = nearkv.attend(*inputs, card=twin)
    for ours, theirs in zip(nearkv.attend(*inputs, card=card), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", ["twin", "model"])
def test_a_card_behind_xrt_answers_as_its_backend(simulate, backend, reader_kind):
    simulation = simulate(backend)
    with open_card("xrt:0", reader=reader_kind, **SMALL) as card:
        assert (card.rows, card.max_head_dim) == (2, 64)  # it said itself which build it is
        for shape in (
            {},
            {"tokens": 1, "head_dim": 32},
            {"tokens": 700, "heads": 8, "kv_heads": 2},
        ):
            _check_attend(card, **shape)
    assert simulation.cards[0].units[0].runs > 3
    assert not simulation.cards[0].complaints


def test_pages_go_straight_into_the_cards_memory(simulate, tmp_path):
    """What the drive delivers is in the simulated bank without any copy by the host."""
    (card_memory,) = simulate().cards
    data = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    path = tmp_path / "pages"
    path.write_bytes(data.tobytes())
    from nearkv.io import PageId, Read

    with open_card("xrt:0", **SMALL) as card:
        fd = os.open(path, os.O_RDONLY)
        card.load([Read(fd, path, 0, 8192, 4096, PageId(0, 0, 0, 0), 4096)])
        os.close(fd)
        (kv, _) = (it for it in card_memory.buffers.values() if it.bytes is not None)
        np.testing.assert_array_equal(kv.bytes[4096:12288], data)


def test_only_ranges_of_job_memory_are_copied(simulate, monkeypatch):
    simulate()
    copied, sync = [], xrt_card.Buffer.sync
    monkeypatch.setattr(
        xrt_card.Buffer, "sync", lambda *args: (copied.append(args[3]), sync(*args))[1]
    )
    with open_card("xrt:0", **SMALL) as card:
        _check_attend(card)
    assert 0 < sum(copied) < SMALL["job_bytes"] / 2


@pytest.mark.parametrize("direction", ["sync_to_device", "sync_from_device"])
def test_a_forgotten_copy_shows(simulate, monkeypatch, direction):
    simulate()
    monkeypatch.setattr(xrt_card._Job, direction, lambda self, offset, nbytes: None)
    with open_card("xrt:0", **SMALL) as card, pytest.raises(CardError):
        nearkv.attend(*_inputs(), card=card)


def test_a_card_knows_where_it_is_on_pcie(simulate):
    (simulated,) = simulate().cards
    with open_card("xrt:0", **SMALL) as card:
        assert card.pci_address is None
    simulated.pci_slot = 0x1_05_00 | 0x1F << 3 | 1
    with open_card("xrt:0", **SMALL) as card:
        assert card.pci_address == "0001:05:1f.1"
    simulated.faults.append(Fault("no-p2p"))
    _refused("sudo xbutil configure --device 0001:05:1f.1 --p2p enable")


def test_a_kernel_can_be_started_by_its_registers(simulate):
    """As whoever does without XRT's commands starts it: arguments, start, poll until done."""
    simulate()
    with open_card("xrt:0", **SMALL) as card:
        lib, kernel = xrt_card.library()._lib, card.executor._opened.kernel.value
        lib.xrtKernelWriteRegister.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
        value = ctypes.c_uint32()

        def read(offset):
            xrt_card.library().call("KernelReadRegister", kernel, offset, ctypes.byref(value))
            return value.value

        def write(offset, value):
            assert lib.xrtKernelWriteRegister(kernel, offset, value) == 0

        card.run(1024, 0, 0)  # which leaves the addresses of both memories in the registers
        assert read(abi.REG_CTRL) & abi.CTRL_DONE
        assert read(abi.REG_CTRL) == abi.CTRL_IDLE  # done was cleared by reading
        write(_offset("queue"), 2048)
        write(_offset("summary"), 4096)
        assert read(_offset("queue")) == 2048
        write(_offset("abi_version"), 77)  # a constant
        assert read(_offset("abi_version")) == abi.ABI_VERSION
        write(abi.REG_IER, 1)
        card.write_job(4096, bytes(abi.SUMMARY.bytes))
        write(abi.REG_CTRL, abi.CTRL_START)
        while not read(abi.REG_CTRL) & abi.CTRL_DONE:
            pass
        assert read(abi.REG_ISR) == 1
        write(abi.REG_ISR, 1)  # toggles
        assert read(abi.REG_ISR) == 0
        summary = abi.SUMMARY.unpack(card.read_job(4096, abi.SUMMARY.bytes))
        assert summary["config_hash"] == card.executor.config_hash


def _offset(name) -> int:
    return next(register.offset for register in abi.REGISTERS if register.name == name)


def test_two_cards_in_one_process_are_two_cards(simulate):
    simulation = simulate(n_cards=2)
    with open_card("xrt:0", **SMALL) as first, open_card("xrt:1", **SMALL) as second:
        _check_attend(second)
        _check_attend(first)
        runs = [card.units[0].runs for card in simulation.cards]
        assert runs[0] == runs[1] > 0


@pytest.mark.slow
def test_a_batch_over_sixteen_cards_has_the_same_bits_as_on_one(simulate, tmp_path):
    simulation = simulate(n_cards=16)
    n_sequences, n_pages = 16, 6
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, n_sequences, 2, n_pages * 32, 32)).astype(np.float16)
    q = rng.standard_normal((n_sequences, 2, 2, 32))
    directories = [tmp_path / f"ssd{n}" for n in range(16)]
    for directory in directories:
        directory.mkdir()
    partials = {}
    for n in (1, 16):
        cards = [open_card(f"xrt:{number}", **SMALL) for number in range(n)]
        with KvStore(directories[:n], LAYOUT, 2, temporary=True, n_shards=n) as store:
            for sequence in range(n_sequences):
                store.append(sequence, 0, k[sequence], v[sequence])
            attention = PageAttention(cards, store)
            lengths = [n_pages] * n_sequences
            partials[n] = attention.attend(0, range(n_sequences), q, 0.2, lengths)
            attention.close()
        for card in cards:
            card.close()
    np.testing.assert_array_equal(partials[1].run_max, partials[16].run_max)
    np.testing.assert_array_equal(partials[1].sums.pack(), partials[16].sums.pack())
    assert [card.units[0].runs > 0 for card in simulation.cards] == 16 * [True]


def test_a_thousand_runs_leave_nothing_behind(simulate):
    (simulated,) = simulate().cards
    with open_card("xrt:0", **SMALL) as card:
        card.run(1024, 0, 0)
        before = len(simulated.buffers), len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            card.run(1024, 0, 0)
        assert (len(simulated.buffers), len(os.listdir("/proc/self/fd"))) == before


def test_a_closed_card_gives_all_of_it_back(simulate):
    simulation = simulate()
    open_card("xrt:0", **SMALL).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with open_card("xrt:0", **SMALL) as card:
            card.run(1024, 0, 0)
        assert not simulation.cards[0].buffers
    gc.collect()
    end = time.monotonic() + 60  # a reader's thread gives its ring back when it has woken up
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_was_in_a_buffer_is_gone_for_the_next_who_gets_it(simulate):
    (simulated,) = simulate().cards
    for _ in range(2):
        with open_card("xrt:0", **SMALL) as card:
            for buffer in simulated.buffers.values():
                if buffer.bytes is not None:
                    assert not buffer.bytes.any()
            card.write_job(0, b"secret")


# --- what goes wrong while it works ------------------------------------------------------------------


def test_a_run_that_hangs_is_given_up_and_done_again(simulate, monkeypatch, caplog):
    (simulated,) = simulate(faults=[Fault("hang", 0)]).cards
    with open_card("xrt:0", **SMALL) as card:
        finish, reset = card.finish_run, card.reset
        with monkeypatch.context() as patch:  # it waits a moment only, until it is reset
            patch.setattr(card, "finish_run", lambda run: finish(run, 0.2))
            patch.setattr(card, "reset", lambda: (patch.undo(), reset()))
            _check_attend(card)
        assert "did not end within 0.2 s: XRT says it is " in caplog.text
        assert simulated.units[0].runs > 1
        _check_attend(card, tokens=300)


def test_while_a_run_hangs_other_threads_go_on_and_the_card_says_so(simulate):
    simulate(faults=[Fault("hang")])
    with open_card("xrt:0", **SMALL) as card:
        run = card.start_run(1024, 0, 0)
        errors = []

        def wait():
            try:
                card.finish_run(run, 0.5)
            except CardError as error:
                errors.append(error)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        card.write_job(4096, bytes(64))  # the interpreter is not held up
        for thread in threads:
            thread.join()
        assert len(errors) == 2
        assert all("did not end within 0.5 s" in str(error) for error in errors)
        with pytest.raises(CardError, match="unusable after a run that timed out"):
            card.run(1024, 0, 0)
        card.reset()


def test_a_wedged_card_names_the_reset_that_takes_root(simulate):
    simulate(faults=[Fault("wedge", 1)])
    with open_card("xrt:0", **SMALL) as card:
        card.run(1024, 0, 0)
        with pytest.raises(CardError, match=r"did not end within 0\.3 s"):
            card.run(1024, 0, 0, timeout_s=0.3)
        card.timeout_s = 0.3
        with pytest.raises(CardError, match="still runs.*sudo xbutil reset --device 0"):
            card.reset()
    with pytest.raises(CardError, match="still runs.*sudo xbutil reset --device 0"):
        open_card("xrt:0", timeout_s=0.3, **SMALL)


def test_a_run_that_fails_says_how_and_the_next_one_succeeds(simulate):
    simulate(faults=[Fault("error", 0)])
    with open_card("xrt:0", **SMALL) as card:
        with pytest.raises(CardError, match=r"the run has ended as ERROR; see.*dmesg") as caught:
            card.run(1024, 0, 0)
        assert caught.value.recoverable
        card.reset()
        card.run(1024, 0, 0)


def test_a_run_that_is_late_is_waited_for(simulate, monkeypatch):
    simulate(faults=[Fault("late", None, 0.01)])
    due, compute = threading.Event(), server.Unit._compute
    monkeypatch.setattr(
        server.Unit, "_compute", lambda self, *args: (due.wait(60), compute(self, *args))[1]
    )
    with open_card("xrt:0", **SMALL) as card:
        run = card.start_run(1024, 0, 0)
        with pytest.raises(TimeoutError, match="XRT says it is"):
            run._run.wait(0.01)
        due.set()
        card.finish_run(run)


def test_a_card_that_vanishes_ends_the_run(simulate):
    simulation = simulate(faults=[Fault("hang")])
    card = open_card("xrt:0", **SMALL)
    run = card.start_run(1024, 0, 0)
    simulation._server.close()
    with pytest.raises(CardError, match="ended as ABORT"):
        card.finish_run(run)
    with pytest.raises(CardError, match="cannot be opened again"):
        card.reset()
    card.close()


def test_a_pointer_into_nowhere_ends_as_an_error(simulate):
    (simulated,) = simulate().cards
    with open_card("xrt:0", **SMALL) as card:
        unit = simulated.units[0]
        device = server._Device(simulated, 0, -1)
        for name, value in (("kv", 0x1000), ("n_jobs", 1)):
            unit.write(_offset(name), value, device)
            unit.write(_offset(name) + 4, 0, device)
        assert unit._run(device) == server._ERROR
        assert "argument kv is 0x1000, which is in no buffer" in simulated.complaints[0]
        card.run(1024, 0, 0)


def test_a_forked_process_does_not_touch_its_parents_card(simulate):
    (simulated,) = simulate().cards
    with open_card("xrt:0", **SMALL) as card:
        buffers = [card._job._buffer.handle]
        pid = os.fork()
        if not pid:
            try:
                card.close()
                with pytest.raises(CardError, match="belongs to process"):
                    card.run(1024, 0, 0)
                del card
                gc.collect()
                # Nor do XRT's own functions, which know nothing of processes.
                xrt_card.library().get("BOFree")(buffers[0])
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert len([it for it in simulated.buffers.values() if it.bytes is not None]) == 2
        _check_attend(card)


# --- what is wrong when it is opened -----------------------------------------------------------------


def _refused(match, name="xrt:0", **options):
    with pytest.raises(CardError, match=f"card '{name}': .*{match}") as caught:
        open_card(name, **SMALL | options)
    return caught.value


def _xclbin(tmp_path, change) -> Path:
    """An xclbin with something else in it; `change` gets the bytes of its XML."""
    made = xclbin.simulated(load("smartssd"))
    made.sections[0] = made.sections[0]._replace(data=change(made.sections[0].data))
    made.write(tmp_path / "other.xclbin")
    return tmp_path / "other.xclbin"


def test_p2p_that_is_off_is_told_from_memory_that_is_short(simulate):
    simulate(faults=[Fault("no-p2p")])
    _refused(
        r"P2P is disabled: .*bank0 gives normal memory.*sudo xbutil configure --device 0 --p2p enable"
    )
    simulate()
    _refused(
        r"8589934592 bytes of kv memory cannot be.*choose a smaller kv_bytes", kv_bytes=8 << 30
    )
    _refused(r"4294967296 bytes of job memory cannot be.*smaller job_bytes", job_bytes=4 << 30)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (fpga.P2p.ENABLED, r"no 1048576 bytes of the P2P window are free, .*choose a smaller kv_bytes"),
        (fpga.P2p.REBOOT, r"P2P is enabled, but the window has no room.*'Above 4G decoding' must be on"),
        (fpga.P2p.UNSUPPORTED, r"P2P is missing: the platform on the card has no P2P window.*xbmgmt"),
    ],
)  # fmt: skip
def test_why_there_is_no_p2p_memory_is_what_the_driver_says(simulate, monkeypatch, state, match):
    (simulated,) = simulate(faults=[Fault("no-p2p")]).cards
    simulated.pci_slot = 0x05 << 8 | 1
    monkeypatch.setattr(fpga, "p2p", lambda folder: (state, 1 << 30))
    _refused(match)


def test_a_card_that_another_process_has_is_busy(simulate):
    (simulated,) = simulate().cards
    with open_card("xrt:0", **SMALL) as card:
        _refused("in use by another process.*xbutil examine")
        card.run(1024, 0, 0)
    with open_card("xrt:0", **SMALL):
        pass
    simulated.faults.append(Fault("busy"))
    _refused("in use by another process.*Device or resource busy")


def test_a_device_that_is_not_there_and_names_that_are_none(simulate):
    simulate()
    _refused("XRT has no device 3 .*xbutil examine lists", "xrt:3")
    for name in ("xrt", "xrt:", "xrt:0/x"):
        with pytest.raises(CardError, match=f"no card '{name}'; say which: 'xrt:0'"):
            open_card(name)


def test_the_build_on_the_card_must_be_the_one_that_was_asked_for(simulate):
    simulate()
    _refused(
        r"not the build that was asked for.*none of smartssd.*make bitstream", config="smartssd"
    )
    simulate(faults=[Fault("other-build")])
    _refused(r"different versions of nearkv \(abi_version is 0, not 1\)")


def test_an_xclbin_of_another_version_or_of_something_else_is_refused(simulate, tmp_path):
    simulate()
    other = _xclbin(tmp_path, lambda data: data.replace(b'"0x028"', b'"0x02C"'))
    _refused(r"of another version of nearkv.*\('queue', 40, 32\) is expected", xclbin=other)
    other = _xclbin(tmp_path, lambda data: data.replace(b'name="nearkv"', b'name="vadd"'))
    _refused(r"has no kernel nearkv: \['vadd'\]", xclbin=other)
    _refused(r"no xclbin: it must begin with.*make bitstream", xclbin=__file__)
    _refused(r"cannot read .*nowhere: No such file", xclbin=tmp_path / "nowhere")


def test_argument_offsets_are_asked_of_xrt_too(simulate, monkeypatch):
    simulate()
    monkeypatch.setitem(xrt_card._OFFSET, "queue", 0x2C)
    _refused("XRT has argument queue at 0x28, not at 0x2c; build it with: make bitstream")


def test_without_an_xclbin_the_card_says_how_to_get_one(simulate, monkeypatch):
    simulate()
    monkeypatch.delenv("NEARKV_XCLBIN")
    with pytest.raises(CardError, match="needs its xclbin.*NEARKV_XCLBIN.*make bitstream"):
        open_card("xrt:0")


def test_an_xclbin_for_another_platform_is_not_loaded(simulate, tmp_path):
    simulate()
    xclbin.simulated(load("u280")).write(tmp_path / "u280.xclbin")
    _refused(
        "does not load .*for platform xilinx_u280_.*xbutil examine", "xrt:0/0",
        xclbin=tmp_path / "u280.xclbin",
    )  # fmt: skip


def test_banks_without_p2p_memory_and_arguments_without_a_bank_are_refused(simulate, tmp_path):
    simulate(memories=[xclbin.Memory("uram", xclbin.MemoryType.URAM, 0, 1 << 20)])
    _refused("connects kv to uram, which has no P2P memory")
    simulate()
    made = xclbin.simulated(load("smartssd"))
    made.sections[2] = made.sections[2]._replace(data=xclbin.pack_connections([]))
    made.write(tmp_path / "loose.xclbin")
    _refused("argument kv .*is connected to no memory bank", xclbin=tmp_path / "loose.xclbin")


def test_memory_outside_its_bank_is_refused(simulate, monkeypatch):
    """XRT copies a buffer from a wrong bank to the right one without an error."""
    (simulated,) = simulate().cards
    simulated.banks[0].memory = xclbin.Memory("bank0", xclbin.MemoryType.DDR4, 0x1000, 4 << 30)
    _refused("kv memory is at 0x.*outside of bank bank0 at 0x4000000000.*Load it again")


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"XILINX_XRT": None}, "XILINX_XRT is not set.*nearkv xrt-sim"),
        ({"XILINX_XRT": "/nowhere"}, "XILINX_XRT is /nowhere, where there is no lib/libxrt_hwemu.so.2"),
        ({"XCL_EMULATION_MODE": "hw"}, "XCL_EMULATION_MODE is 'hw'.*unset XCL_EMULATION_MODE"),
        (
            {"XCL_EMULATION_MODE": None, "XILINX_XRT": None},
            "XILINX_XRT is not set.*(source /opt/xilinx/xrt/setup.sh|install AMD's packages of XRT)",
        ),
    ],
)  # fmt: skip
def test_an_environment_in_which_xrt_would_end_the_process_is_refused(
    simulate, monkeypatch, environment, match
):
    simulate()
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    xrt_card.library.cache_clear()
    try:
        with pytest.raises(CardError, match=match):
            open_card("xrt:0")
    finally:
        xrt_card.library.cache_clear()


def test_a_missing_xrt_is_named_with_the_command_that_installs_it(simulate, monkeypatch):
    simulate()
    monkeypatch.setattr(installed, "LIBRARY", "libxrt_of_nobody.so.9")
    xrt_card.library.cache_clear()
    try:
        with pytest.raises(CardError, match="XRT is not installed.*apt-get install libxrt1"):
            open_card("xrt:0")
    finally:
        xrt_card.library.cache_clear()


def test_the_packages_that_simulate_a_card_are_named_alike():
    assert xrt.APT in installed.SIMULATE


# --- the noop driver, which XRT brings -----------------------------------------------------------------

_NOOP = """
import sys
import numpy as np
from nearkv.cards import CardError, open_card, xrt
from nearkv_hw import abi
from nearkv_hw.config import preset

calls, call = [], xrt.Library.call
xrt.Library.call = lambda self, name, *args: (calls.append(name), call(self, name, *args))[1]
how, path = sys.argv[1:]
if how != "registers":  # which it has not
    xrt.Executor._check_build = lambda self, kernel: preset("smartssd")
    xrt.Executor._check_idle = lambda self, timeout_s: None
if how == "run":
    xrt.P2P = 0  # those are not aligned
try:
    with open_card("xrt:0", xclbin=path) as card:
        card.run(1024, 0, 0)
except CardError as error:
    print(error)
print(*calls)
"""


def _noop(tmp_path, how) -> tuple[str, list[str]]:
    """What opening a card on the noop driver says, and which of XRT's functions were called."""
    (tmp_path / "lib").symlink_to("/usr/lib/x86_64-linux-gnu")
    # Its buffers all are at 0xdeadbeef.
    memories = (xclbin.Memory("bank0", xclbin.MemoryType.DDR4, 0, 4 << 30),)
    xclbin.simulated(load("smartssd"), memories).write(tmp_path / "x.xclbin")
    environment = os.environ | {"XILINX_XRT": str(tmp_path), "XCL_EMULATION_MODE": "noop"}
    done = subprocess.run(
        [sys.executable, "-c", _NOOP, how, str(tmp_path / "x.xclbin")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, calls = done.stdout.splitlines()
    return said, calls.split()


_OPENED = ["DeviceOpen", "DeviceLoadXclbinFile", "PLKernelOpenExclusive"]
_ALLOCATED = ["BOAlloc", "BOMap", "BOAlloc", "BOMap"]


def test_a_driver_without_registers_is_refused_and_all_is_closed_again(tmp_path):
    said, calls = _noop(tmp_path, "registers")
    assert "register abi_version cannot be read" in said
    assert calls == [*_OPENED, "KernelReadRegister", "KernelClose", "DeviceClose"]


def test_p2p_memory_that_no_drive_can_write_to_is_refused(tmp_path):
    said, calls = _noop(tmp_path, "alignment")
    assert "which is no page: drives cannot write there" in said
    assert calls[: len(_OPENED + _ALLOCATED)] == _OPENED + _ALLOCATED
    assert sorted(calls[len(_OPENED + _ALLOCATED) :]) == [
        "BOFree",
        "BOFree",
        "DeviceClose",
        "KernelClose",
    ]
    assert calls[-1] == "DeviceClose"  # XRT uses a device that was closed before its buffers


def test_the_order_of_calls_and_a_run_that_did_nothing(tmp_path):
    """The noop driver says that a run has ended well, which did not run."""
    said, calls = _noop(tmp_path, "run")
    assert "different versions of nearkv (abi_version is 0x0" in said
    run = ["BOSync", "RunStart", "BOSync"]
    close = ["RunClose", "KernelClose", "BOFree", "BOFree", "DeviceClose"]
    assert calls == [*_OPENED, *_ALLOCATED, "RunOpen", *run, *close]
