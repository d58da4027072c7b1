# SPDX-License-Identifier: Apache-2.0
"""The real PYNQ on the real XRT, with simulated cards under them."""

import gc
import os
from pathlib import Path
import subprocess
import sys
import time

import numpy as np
import pytest

import nearkv
from nearkv.cards import CardError, open_card
from nearkv_hw import abi
from nearkv_hw.config import preset
from nearkv_sim import workload, xrt
from nearkv_sim.model import ModelCard
from nearkv_sim.twin import TwinCard
from nearkv_sim.xrt import Fault, Simulation

pynq = pytest.importorskip("pynq", reason="needs PYNQ; install it with: pip install 'nearkv[pynq]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(xrt.missing()), reason=xrt.missing()),
]

SMALL = {"kv_bytes": 1 << 20, "job_bytes": 1 << 18}
NOTEBOOK = Path(__file__).parents[2] / "examples" / "pynq_attention.ipynb"


@pytest.fixture
def load(simulate):
    """load(...) is the simulated card, and the overlay on it."""
    from nearkv.cards.pynq import XrtCard

    def start(*args, **options):
        simulation = simulate(*args, **options)
        return simulation.cards[0], pynq.Overlay(str(simulation.xclbin), device=XrtCard("0"))

    return start


@pytest.fixture
def jobs():
    """Three jobs, laid out in memory."""
    rng = np.random.default_rng(7)
    config = preset("tiny")
    shapes = [(1, 32, 40), (2, 64, 128), (2, 64, 300)]
    return workload.place(
        [
            workload.Job(
                rng.standard_normal((group, head_dim)),
                *rng.standard_normal((2, tokens, head_dim)).astype(np.float16).view(np.uint16),
                tag=tag,
            )
            for tag, (group, head_dim, tokens) in enumerate(shapes)
            if group <= config.rows and head_dim <= config.max_head_dim
        ],
        rng,
    )


def _allocate(overlay, memories):
    kv = pynq.allocate(memories.kv.shape, "u1", target=overlay.bank0, p2p=True)
    job = pynq.allocate(memories.job.shape, "u1", target=overlay.bank0)
    kv[:], job[:] = memories.kv, memories.job
    return kv, job


def _of_device(card):
    """Buffers in a simulated card's memory, without XRT's own for its commands."""
    return [it for it in card.buffers.values() if it.bytes is not None]


def _arguments(memories):
    return memories.queue, memories.n_jobs, memories.summary


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


# --- PYNQ's own interface ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, reference", [("twin", TwinCard), ("model", ModelCard)], ids=["twin", "model"]
)
def test_a_call_leaves_in_memory_what_the_backend_does(load, jobs, backend, reference):
    card, overlay = load(backend)
    kv, job = _allocate(overlay, jobs)
    job.sync_to_device()
    overlay.nearkv_1.call(kv, job, *_arguments(jobs))
    job.sync_from_device()
    expected = jobs.execute(reference(preset("tiny")))
    np.testing.assert_array_equal(jobs.untimed(np.asarray(job)), jobs.untimed(expected))
    assert (job != jobs.job).any()
    assert card.units[0].runs == 1
    assert not card.complaints


def test_arguments_by_name_and_a_run_that_is_waited_for_later(load, jobs):
    _, overlay = load()
    kernel = overlay.nearkv_1
    assert list(kernel.signature.parameters) == ["kv", "job", "queue", "n_jobs", "summary"]
    kv, job = _allocate(overlay, jobs)
    job.sync_to_device()
    run = kernel.start(
        kv, job=job, queue=jobs.queue, summary=jobs.summary, n_jobs=np.uint32(jobs.n_jobs)
    )
    run.wait()
    run.wait()  # again
    job.sync_from_device()
    assert jobs.summary_of(job)["n_jobs"] == jobs.n_jobs


def test_memory_that_was_not_copied_is_not_on_the_card(load, jobs):
    """Both ways, and for a part of an array only."""
    _, overlay = load()
    kv, job = _allocate(overlay, jobs)
    overlay.nearkv_1.call(kv, job, 0, 0, 0)  # on the card job memory is zero
    before = job.copy()
    end = jobs.summary + abi.SUMMARY.bytes
    job[jobs.summary : end].sync_to_device()
    overlay.nearkv_1.call(kv, job, 0, 0, jobs.summary)
    np.testing.assert_array_equal(job, before)
    part = job[jobs.summary : end]
    part.sync_from_device()
    assert abi.SUMMARY.unpack(bytes(part))["abi_version"] == abi.ABI_VERSION
    job[jobs.summary : end] = before[jobs.summary : end]
    np.testing.assert_array_equal(job, before)  # nothing else has come
    job[:] = 7
    job[4096:8192].sync_to_device()
    job[:] = 0
    job.sync_from_device()
    assert (job[4096:8192] == 7).all()
    assert not job[8192:].any()


def test_registers_by_name_and_by_offset(load):
    _, overlay = load()
    kernel = overlay.nearkv_1
    names = {it.name: it for it in abi.REGISTERS}
    assert kernel.read(names["config_hash"].offset) == preset("tiny").hash32
    registers = kernel.register_map
    assert registers.CTRL.AP_IDLE == 1
    registers.queue = 4096
    assert (int(registers.queue), kernel.read(names["queue"].offset)) == (4096, 4096)
    kernel.write(names["kv"].offset, (0x12_3456_7800).to_bytes(8, "little"))
    assert int(registers.kv) == 0x12_3456_7800


def test_a_kernel_started_by_its_register_map(load, jobs):
    """As the first tutorial of PYNQ does it, without `call`."""
    _, overlay = load()
    kv, job = _allocate(overlay, jobs)
    job.sync_to_device()
    registers = overlay.nearkv_1.register_map
    registers.kv, registers.job = kv.device_address, job.device_address
    registers.queue, registers.n_jobs, registers.summary = _arguments(jobs)
    registers.CTRL.AP_START = 1
    end = time.monotonic() + 60
    while not registers.CTRL.AP_IDLE:
        assert time.monotonic() < end, "the kernel does not become idle"
    job.sync_from_device()
    expected = jobs.execute(TwinCard(preset("tiny")))
    np.testing.assert_array_equal(jobs.untimed(np.asarray(job)), jobs.untimed(expected))


def test_what_a_drive_reads_into_p2p_memory_is_on_the_card(load, tmp_path):
    card, overlay = load()
    data = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    (tmp_path / "pages").write_bytes(data.tobytes())
    kv = pynq.allocate((4, 4096), "u1", target=overlay.bank0, p2p=True)
    assert kv.virtual_address % abi.PAGE_ALIGN_BYTES == 0
    with open(tmp_path / "pages", "rb") as file:
        assert os.preadv(file.fileno(), [kv[1:3]], 0) == len(data)
    (buffer,) = _of_device(card)
    np.testing.assert_array_equal(buffer.bytes[4096:12288], data)


def test_memory_goes_back_when_the_last_part_of_it_goes(load):
    card, overlay = load()

    def buffers():
        gc.collect()
        return len(card.buffers)

    before = buffers()
    array = pynq.allocate((16, 64), "u2", target=overlay.bank0)
    assert (array.shape, array.dtype, array.device_address % 4096) == ((16, 64), np.uint16, 0)
    assert array[3].device_address == array.device_address + 3 * 128
    part = np.asarray(array)[3]
    del array
    assert buffers() == before + 1
    part[:] = 1
    del part
    assert buffers() == before


def test_the_only_bank_is_the_default_and_of_several_one_is_named(load):
    _, overlay = load()
    assert pynq.allocate(16, target=overlay.device).device is overlay.device
    _, overlay = load(board="u250")
    with pytest.raises(ValueError, match=r"has 4 banks in use: .*; say which: pynq.allocate"):
        pynq.allocate(16, target=overlay.device)


def test_devices_are_found_in_a_fresh_process(simulate):
    simulation = simulate(n_cards=3)
    code = f"""
import nearkv.cards.pynq, pynq
print([it.name for it in pynq.Device.devices])
print(type(pynq.Overlay({str(simulation.xclbin)!r}).nearkv_1).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['xrt:0', 'xrt:1', 'xrt:2']", "Kernel"]


def test_a_kernel_without_a_driver_has_registers_for_as_long_as_its_overlay(load):
    _, overlay = load()
    description = overlay.ip_dict["nearkv_1"] | {"driver": pynq.DefaultIP}
    kernel = pynq.DefaultIP(description)
    gc.collect()
    assert kernel.register_map.CTRL.AP_IDLE == 1
    overlay.download()
    with pytest.raises(CardError, match="no compute unit that is open"):
        kernel.read(0)


@pytest.mark.parametrize("root", [None, "/nowhere"])
def test_without_xrt_there_are_no_devices_and_it_is_said_why(simulate, root):
    environment = os.environ | simulate().environment
    environment.pop("XILINX_XRT")
    if root is not None:
        environment["XILINX_XRT"] = root  # XRT itself would end the process
    code = "import nearkv.cards.pynq, pynq; print(pynq.Device.devices)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
    assert "PYNQ finds no cards: XILINX_XRT is" in done.stderr
    assert "nearkv xrt-sim -- PROGRAM" in done.stderr


# --- what goes wrong ---------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_named(load, jobs):
    _, overlay = load()
    kernel = overlay.nearkv_1
    kv, job = _allocate(overlay, jobs)
    with pytest.raises(TypeError, match="missing a required argument: 'summary'"):
        kernel.call(kv, job, 0, 0)
    with pytest.raises(
        TypeError, match=r"argument kv must be an array of pynq.allocate.*not ndarray"
    ):
        kernel.call(np.zeros(4096, np.uint8), job, 0, 0, 0)
    with pytest.raises(ValueError, match="argument job must be a whole array .* at byte 64"):
        kernel.call(kv, job[64:], 0, 0, 0)
    for bad in (-1, 1 << 32, 0.5):
        with pytest.raises(ValueError, match=f"argument queue must be a whole number .* not {bad}"):
            kernel.call(kv, job, bad, 0, 0)


def test_a_run_that_hangs_times_out_and_says_so(load, jobs):
    card, overlay = load(faults=[Fault("hang", 0)])
    kv, job = _allocate(overlay, jobs)
    run = overlay.nearkv_1.start(kv, job, 0, 0, 0)
    with pytest.raises(TimeoutError, match="XRT says it is"):
        run.wait(0.2)
    with pytest.raises(RuntimeError, match="cannot be started: .*; wait for the run"):
        overlay.nearkv_1.start(kv, job, 0, 0, 0)
    del kv, job
    gc.collect()
    assert len(_of_device(card)) == 2  # the card may still use them
    overlay.nearkv_1.close()
    with pytest.raises(RuntimeError, match="it was given up"):
        run.wait(0.2)
    del run
    gc.collect()
    assert not _of_device(card)


def test_a_run_that_fails_says_how(load, jobs):
    _, overlay = load(faults=[Fault("error", 0)])
    kv, job = _allocate(overlay, jobs)
    with pytest.raises(RuntimeError, match="ended as ERROR"):
        overlay.nearkv_1.call(kv, job, 0, 0, 0)
    overlay.nearkv_1.call(kv, job, 0, 0, 0)


def test_p2p_that_is_off_has_its_remedy(load):
    _, overlay = load(faults=[Fault("no-p2p")])
    with pytest.raises(CardError, match="4096 bytes of P2P memory in bank0 .* --p2p enable"):
        pynq.allocate(4096, "u1", target=overlay.bank0, p2p=True)
    pynq.allocate(4096, "u1", target=overlay.bank0)


def test_a_unit_belongs_to_one_device_at_a_time(load, simulate):
    _, overlay = load()
    _ = overlay.nearkv_1
    with pytest.raises(CardError, match="kernel nearkv:{nearkv_1} is in use"):
        open_card("pynq:0", **SMALL)
    del overlay, _
    gc.collect()
    open_card("pynq:0", **SMALL).close()


def test_registers_of_a_unit_that_is_not_open(load):
    _, overlay = load()
    address = overlay.ip_dict["nearkv_1"]["phys_addr"]
    with pytest.raises(CardError, match="no compute unit that is open .*overlay.nearkv_1"):
        overlay.device.read_registers(address, 4)


# --- the card pynq:0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["twin", "model"])
def test_the_card_answers_as_the_twin(simulate, backend, reader_kind):
    (simulated,) = simulate(backend).cards
    with open_card("pynq:0", reader=reader_kind, **SMALL) as card:
        assert (card.rows, card.max_head_dim) == (2, 64)  # it said itself which build it is
        for shape in (
            {},
            {"tokens": 1, "head_dim": 32},
            {"tokens": 700, "heads": 8, "kv_heads": 2},
        ):
            _check_attend(card, **shape)
    assert simulated.units[0].runs > 3
    assert not simulated.complaints
    assert not simulated.buffers


def test_a_card_that_hangs_is_reset_and_goes_on(simulate):
    simulate(faults=[Fault("hang", 0)])
    with open_card("pynq:0", **SMALL) as card:
        with pytest.raises(CardError, match=r"did not end within 0\.2 s: XRT says it is"):
            card.run(1024, 0, 0, timeout_s=0.2)
        card.reset()
        _check_attend(card)


def test_a_closed_card_gives_all_of_it_back(simulate):
    simulation = simulate()
    open_card("xrt:0", **SMALL).close()
    pynq.Clocks.set_device(None)  # of an earlier test
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with open_card("pynq:0", **SMALL) as card:
            card.run(1024, 0, 0)
        assert not simulation.cards[0].buffers
    del card
    gc.collect()
    end = time.monotonic() + 60  # a reader's thread gives its ring back when it has woken up
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def _refused(match, **options):
    with pytest.raises(CardError, match=match):
        open_card(options.pop("name", "pynq:0"), **SMALL | options)


def test_what_cannot_be_opened_is_said_as_behind_xrt(simulate):
    simulate(faults=[Fault("no-p2p")])
    _refused("card 'pynq:0': P2P is disabled: .*bank0 gives normal memory.*sudo xbutil configure")
    _refused("card 'pynq:7': XRT has no device 7", name="pynq:7")
    _refused("say which: 'pynq:0', 'pynq:0000:04:00.1'", name="pynq")
    _refused("the card is not the build that was asked for", config="smartssd")


def test_an_xclbin_of_another_platform_is_refused(simulate):
    simulate()
    other = Simulation(board="u50", config="tiny")
    _refused(r"XRT does not load .*, which is for platform xilinx_u50", xclbin=other.xclbin)
    other.close()


def test_a_machine_without_pynq_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nearkv.cards.pynq", None)
    monkeypatch.delitem(sys.modules, "nearkv.cards.pynq")
    monkeypatch.setitem(sys.modules, "pynq", None)
    with pytest.raises(CardError, match=r"needs the package pynq; .*pip install 'nearkv\[pynq\]'"):
        open_card("pynq:0")


# --- the notebook ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny", "smartssd"])
def test_the_notebook_runs_attention_as_the_twin_does(simulate, config):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    simulate(config=config)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check = (
        "import nearkv\n"
        f"with nearkv.open_card('twin', config={config!r}) as twin:\n"
        "    theirs, _ = nearkv.attend(q, k, v, card=twin)\n"
        "np.testing.assert_array_equal(out, theirs)\n"
        "'the same bits'"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert "the same bits" in str(notebook.cells[-1].outputs)


def test_the_notebook_is_kept_without_output():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    cells = [it for it in nbformat.read(NOTEBOOK, as_version=4).cells if it.cell_type == "code"]
    assert cells
    assert all(not it.outputs and it.execution_count is None for it in cells)
