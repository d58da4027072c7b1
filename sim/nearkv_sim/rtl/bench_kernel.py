# SPDX-License-Identifier: Apache-2.0
"""cocotb bench of the emitted kernel: what the host's driver and the memories see on the wires.

Runs inside the simulator. `run` starts it, from a test; cocotb's own runner ends with status 0 when a
bench failed, except under pytest.
"""

import hashlib
import itertools
import os
from pathlib import Path
import random
import subprocess
from typing import Any
import unittest.mock

import cocotb
from cocotb._decorators import TestGenerator
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout
from cocotb_tools.runner import get_runner
from cocotbext.axi import (
    AxiBus,
    AxiLiteBus,
    AxiLiteMaster,
    AxiRam,
    AxiRamRead,
    AxiReadBus,
    AxiResp,
)
import numpy as np

from nearkv_hw import abi
from nearkv_hw.abi import KvType, Status
from nearkv_hw.axi import WriteMaster
from nearkv_hw.config import OUTSTANDING_BURSTS, Config, preset
from nearkv_hw.shapes import BURST_BEATS
from nearkv_sim import rtl, workload
from nearkv_sim.model import ModelCard
from nearkv_sim.rtl import axi_rules
from nearkv_sim.rtl.axi_rules import AxiRules, Limits

CLOCK_NS = 4
REGISTERS = {register.name: register for register in abi.REGISTERS}
# AxiRam takes addresses modulo its size, so a base is a multiple of that, and bits above 32 count.
MEMORY_BYTES = 1 << 21
KV_BASE, JOB_BASE = 0x123 << 32, 0xFED << 28


class Bench:
    """The kernel between cocotbext-axi's memories and AXI4-Lite manager.

    Every cycle of every bus is held to `axi_rules`.
    """

    def __init__(self, dut):
        self.dut = dut
        self.config = preset(os.environ["NEARKV_CONFIG"])
        self.rng = np.random.default_rng(int(os.environ["NEARKV_SEED"]))
        read_only = {name: axi_rules.FULL[name] for name in ("ar", "r")}
        most = Limits(BURST_BEATS, OUTSTANDING_BURSTS)
        self.rules = {
            "kv": AxiRules("m_axi_kv", read_only, most),
            "job": AxiRules(
                "m_axi_job", axi_rules.FULL, most, Limits(WriteMaster.MAX_BURST, OUTSTANDING_BURSTS)
            ),
            "control": AxiRules("s_axi_control", axi_rules.LITE),
        }

    @property
    def bursts(self) -> dict[str, int]:
        """Bursts so far on each channel for addresses."""
        return {
            f"{name}_{channel}": self.rules[name].bursts[channel]
            for name, channel in (("kv", "ar"), ("job", "ar"), ("job", "aw"))
        }

    async def start(self, pauses=None):
        """Reset the kernel; `pauses()` makes a generator of pauses for each channel."""
        dut = self.dut
        dut.ap_rst_n.value = 0
        Clock(dut.ap_clk, CLOCK_NS, unit="ns").start()
        for rules in self.rules.values():
            cocotb.start_soon(self._hold_to(rules))
        await ClockCycles(dut.ap_clk, 4)
        where = {"clock": dut.ap_clk, "reset": dut.ap_rst_n, "reset_active_level": False}
        kv, job = AxiReadBus.from_prefix(dut, "m_axi_kv"), AxiBus.from_prefix(dut, "m_axi_job")
        control = AxiLiteBus.from_prefix(dut, "s_axi_control")
        # Any: they find out their buses' channels at run time
        self.kv: Any = AxiRamRead(kv, size=MEMORY_BYTES, **where)
        self.job: Any = AxiRam(job, size=MEMORY_BYTES, **where)
        self.control: Any = AxiLiteMaster(control, **where)
        if pauses:
            for channel in (
                self.kv.ar_channel, self.kv.r_channel,
                self.job.read_if.ar_channel, self.job.read_if.r_channel,
                self.job.write_if.aw_channel, self.job.write_if.w_channel,
                self.job.write_if.b_channel,
                self.control.write_if.aw_channel, self.control.write_if.w_channel,
                self.control.write_if.b_channel,
                self.control.read_if.ar_channel, self.control.read_if.r_channel,
            ):  # fmt: skip
                channel.set_pause_generator(pauses())
        await ClockCycles(dut.ap_clk, 4)
        dut.ap_rst_n.value = 1
        await ClockCycles(dut.ap_clk, 16)

    async def read(self, offset: int) -> int:
        response: Any = await with_timeout(self.control.read(offset, 4), 1, "ms")
        assert response.resp == AxiResp.OKAY
        return int.from_bytes(response.data, "little")

    async def write(self, offset: int, value: int) -> None:
        response: Any = await with_timeout(
            self.control.write(offset, value.to_bytes(4, "little")), 1, "ms"
        )
        assert response.resp == AxiResp.OKAY

    async def configure(self, memories: workload.Memories, kv=KV_BASE, job=JOB_BASE) -> None:
        """Fill the memories and write the arguments, as XRT does: every word, in one pass."""
        assert max(len(memories.kv), len(memories.job) + 4096) <= MEMORY_BYTES
        self.kv.write(kv % MEMORY_BYTES, memories.kv.tobytes())
        self.job.write(job % MEMORY_BYTES, memories.job.tobytes() + bytes(4096))
        values = {"kv": kv, "job": job, "queue": memories.queue, "n_jobs": memories.n_jobs,
                  "summary": memories.summary}  # fmt: skip
        words = {}
        for name, value in values.items():
            for part in range(REGISTERS[name].bits // 32):
                words[REGISTERS[name].offset + 4 * part] = value >> 32 * part & 0xFFFFFFFF
        for offset in range(0x10, max(words) + 4, 4):
            await self.write(offset, words.get(offset, 0xFFFFFFFF))

    async def wait_done(self, limit: int = 2000) -> None:
        """Poll CTRL until ap_done, at most `limit` times."""
        for _ in range(limit):
            if await self.read(abi.REG_CTRL) & abi.CTRL_DONE:
                return
            await ClockCycles(self.dut.ap_clk, 20)
        raise AssertionError(f"no ap_done in {limit} polls; bursts so far: {self.bursts}")

    async def run(self, memories: workload.Memories) -> np.ndarray:
        """Configure, start and wait; the job memory that the kernel left behind."""
        await self.configure(memories)
        await self.write(abi.REG_CTRL, abi.CTRL_START)
        await self.wait_done()
        return self.job_memory(memories)

    def job_memory(self, memories, job=JOB_BASE) -> np.ndarray:
        data = self.job.read(job % MEMORY_BYTES, len(memories.job))
        return np.frombuffer(data, np.uint8).copy()

    def check(self, memories: workload.Memories, got: np.ndarray) -> None:
        """Every byte as the model leaves it, sentinels around partials and summary included; and
        nothing is under way on the memories' buses."""
        self.rules["kv"].finish()
        self.rules["job"].finish()
        want = memories.untimed(memories.execute(ModelCard(self.config)))
        for i in range(memories.n_jobs):
            assert memories.partial(got, i) == memories.partial(want, i), f"job {i}"
        np.testing.assert_array_equal(memories.untimed(got), want)
        beyond = self.job.read(JOB_BASE % MEMORY_BYTES + len(memories.job), 4096)
        assert not any(beyond), "the kernel wrote behind job memory"

    def jobs(self, n: int, **choices) -> workload.Memories:
        choices = {"max_tokens": 200, **choices}
        jobs = [workload.random_job(self.rng, self.config, **choices) for _ in range(n)]
        return workload.place(jobs, self.rng)

    async def _hold_to(self, rules: AxiRules):
        handles = {}

        def read(wire):
            if wire not in handles:
                handles[wire] = getattr(self.dut, f"{rules.name}_{wire}")
            return int(handles[wire].value)

        reset_n, edge = self.dut.ap_rst_n, RisingEdge(self.dut.ap_clk)
        while True:
            await edge
            rules.step(int(reset_n.value), read)


def random_pauses(share):
    return lambda: iter(lambda: random.random() < share, None)


@cocotb.test()
async def results_equal_the_model(dut):
    bench = Bench(dut)
    await bench.start()
    for kind in workload.KINDS:
        memories = bench.jobs(2, kind=kind)
        bench.check(memories, await bench.run(memories))


@cocotb.test()
async def results_equal_the_model_under_random_pauses(dut):
    bench = Bench(dut)
    await bench.start(random_pauses(0.3))
    for _ in range(3):
        memories = bench.jobs(3)
        bench.check(memories, await bench.run(memories))


@cocotb.test()
async def results_equal_the_model_under_periodic_pauses(dut):
    bench = Bench(dut)
    periods = iter(range(2, 100))
    await bench.start(lambda: itertools.cycle([0] + [1] * (next(periods) % 5 + 1)))
    for _ in range(3):
        memories = bench.jobs(2)
        bench.check(memories, await bench.run(memories))


@cocotb.test()
async def bursts_stay_inside_4096_bytes_wherever_records_lie(dut):
    """Partials, query blocks and page tables begin at every beat of a 4096-byte block."""
    bench = Bench(dut)
    await bench.start(random_pauses(0.1))
    for _ in range(12):
        memories = bench.jobs(4, max_tokens=40, page_tokens=32)
        bench.check(memories, await bench.run(memories))
    assert all(bench.bursts.values())


@cocotb.test()
async def the_driver_runs_jobs_by_interrupt(dut):
    """XRT's sequence: interrupts on; every argument word in one pass; start; at the interrupt IP_ISR
    is read and written back, then CTRL is read.

    # Ref: XRT 2023.2, src/runtime_src/core/common/drv/cu_hls.c
    """
    bench = Bench(dut)
    await bench.start(random_pauses(0.2))
    await bench.write(abi.REG_GIER, abi.GIER_ENABLE)
    await bench.write(abi.REG_IER, abi.IRQ_DONE)
    for n in range(4):
        memories = bench.jobs(2, page_tokens=32)
        await bench.configure(memories)
        assert not dut.interrupt.value
        await bench.write(abi.REG_CTRL, abi.CTRL_START)
        await with_timeout(RisingEdge(dut.interrupt), 1, "ms")
        if n % 2:  # a late driver loses nothing
            await ClockCycles(dut.ap_clk, 300)
        pending = await bench.read(abi.REG_ISR)
        assert pending == abi.IRQ_DONE
        assert dut.interrupt.value
        await bench.write(abi.REG_ISR, pending)
        await ClockCycles(dut.ap_clk, 2)
        assert not dut.interrupt.value
        assert await bench.read(abi.REG_ISR) == 0
        control = await bench.read(abi.REG_CTRL)
        assert control == abi.CTRL_DONE | abi.CTRL_IDLE | abi.CTRL_READY
        bench.check(memories, bench.job_memory(memories))


@cocotb.test()
async def the_driver_may_poll_and_change_to_interrupts(dut):
    """XRT polls for a while first; what ended meanwhile must not interrupt later unless enabled."""
    bench = Bench(dut)
    await bench.start()
    memories = bench.jobs(1)
    for enable, gier in ((0, 1), (abi.IRQ_READY, 0), (abi.IRQ_DONE | abi.IRQ_READY, 1)):
        await bench.write(abi.REG_IER, enable)
        await bench.write(abi.REG_GIER, gier)
        got = await bench.run(memories)
        assert await bench.read(abi.REG_ISR) == enable
        assert dut.interrupt.value == int(enable != 0 and gier)
        await bench.write(abi.REG_GIER, 1 - gier)  # it follows both enables
        await ClockCycles(dut.ap_clk, 2)
        assert dut.interrupt.value == int(enable != 0 and not gier)
        await bench.write(abi.REG_GIER, 1)
        await bench.write(abi.REG_IER, 0)
        await ClockCycles(dut.ap_clk, 2)
        assert not dut.interrupt.value
        await bench.write(abi.REG_ISR, await bench.read(abi.REG_ISR))
        await bench.write(abi.REG_IER, enable)
        await ClockCycles(dut.ap_clk, 2)
        assert not dut.interrupt.value
        bench.check(memories, got)


@cocotb.test()
async def failing_jobs_do_not_disturb_their_neighbours(dut):
    bench = Bench(dut)
    await bench.start(random_pauses(0.1))
    memories = bench.jobs(5, max_tokens=300, page_tokens=128)
    memories.kv[memories.page_addresses[1][-1]] ^= 16
    memories.set_record(3, group_size=15)
    got = await bench.run(memories)
    bench.check(memories, got)
    failed = [memories.partial(got, i)["status"] != Status.DONE for i in range(5)]
    assert failed == [False, True, False, True, False]


@cocotb.test()
async def a_partial_ignores_tokens_past_page_len(dut):
    bench = Bench(dut)
    await bench.start()
    partials = []
    for tail in (0, 0x7FFF, 0xFC00):
        bench.rng = np.random.default_rng(1)
        job = workload.random_job(
            bench.rng, bench.config, n_tokens=37, group_size=2, head_dim=64, kv_type=KvType.FP16
        )
        job.tail = tail
        memories = workload.place([job], bench.rng)
        got = await bench.run(memories)
        bench.check(memories, got)
        at = memories.record(0)["partial"]
        partials.append(got[at : at + abi.partial_bytes(64, 2)])
    np.testing.assert_array_equal(partials[1], partials[0])
    np.testing.assert_array_equal(partials[2], partials[0])


@cocotb.test()
async def registers_hold_arguments_and_constants(dut):
    bench = Bench(dut)
    await bench.start(random_pauses(0.3))
    assert await bench.read(REGISTERS["abi_version"].offset) == abi.ABI_VERSION
    assert await bench.read(REGISTERS["config_hash"].offset) == bench.config.hash32
    words = {
        register.offset + 4 * part: register.writable
        for register in abi.REGISTERS
        for part in range(register.bits // 32)
    }
    for offset, writable in words.items():
        old = await bench.read(offset)
        await bench.write(offset, 0xA5000000 | offset)
        assert await bench.read(offset) == (0xA5000000 | offset if writable else old)
    for offset in range(0x10, 0x80, 4):  # words without a meaning accept writes
        await bench.write(offset, 0x5A5A5A5A)
        if offset not in words:
            assert await bench.read(offset) == 0
    # One byte lane at a time
    offset = REGISTERS["queue"].offset
    await bench.write(offset, 0)
    await bench.control.write(offset + 2, b"\x77")
    assert await bench.read(offset) == 0x00770000
    assert await bench.read(REGISTERS["abi_version"].offset) == abi.ABI_VERSION
    assert await bench.read(abi.REG_CTRL) == abi.CTRL_IDLE
    assert sum(bench.bursts.values()) == 0


@cocotb.test()
async def control_follows_ap_ctrl_hs(dut):
    """# Ref: UG1399, "Controlling Hardware"; XRT polls ap_done, PYNQ waits on ap_idle."""
    bench = Bench(dut)
    await bench.start()
    memories = bench.jobs(2)
    for _ in range(2):
        assert await bench.read(abi.REG_CTRL) == abi.CTRL_IDLE
        await bench.configure(memories)
        assert await bench.read(abi.REG_CTRL) == abi.CTRL_IDLE  # arguments start nothing
        await bench.write(abi.REG_CTRL, abi.CTRL_START)
        assert await bench.read(abi.REG_CTRL) == abi.CTRL_START
        for _ in range(2000):
            control = await bench.read(abi.REG_CTRL)
            if control != abi.CTRL_START:
                break
            await ClockCycles(dut.ap_clk, 10)
        # Done, ready and idle at once, start gone; done and ready are cleared by this read.
        assert control == abi.CTRL_DONE | abi.CTRL_IDLE | abi.CTRL_READY
        bench.check(memories, bench.job_memory(memories))


@cocotb.test()
async def a_start_during_a_run_and_new_arguments_change_nothing(dut):
    bench = Bench(dut)
    await bench.start()
    memories = bench.jobs(3)
    await bench.configure(memories)
    await bench.write(abi.REG_CTRL, abi.CTRL_START)
    for _ in range(3):
        await bench.write(abi.REG_CTRL, abi.CTRL_START)
        for offset in range(0x10, REGISTERS["summary"].offset + 4, 4):
            await bench.write(offset, 0xFFFFFFC0)
    await bench.wait_done()
    bench.check(memories, bench.job_memory(memories))
    before = dict(bench.bursts)
    await ClockCycles(dut.ap_clk, 500)
    assert bench.bursts == before, "a second run began"
    assert await bench.read(abi.REG_CTRL) == abi.CTRL_IDLE


@cocotb.test()
async def a_reset_during_a_run_leaves_a_working_kernel(dut):
    bench = Bench(dut)
    await bench.start(random_pauses(0.2))
    memories = bench.jobs(3)
    for cycles in (1, 100, 400, 900):
        await bench.configure(memories)
        await bench.write(abi.REG_CTRL, abi.CTRL_START)
        await ClockCycles(dut.ap_clk, cycles)
        dut.ap_rst_n.value = 0
        await ClockCycles(dut.ap_clk, 20)
        dut.ap_rst_n.value = 1
        await ClockCycles(dut.ap_clk, 16)
        assert await bench.read(abi.REG_CTRL) == abi.CTRL_IDLE
    bench.check(memories, await bench.run(memories))


TESTS = [name for name, value in list(globals().items()) if isinstance(value, TestGenerator)]


@cocotb.test()
async def a_kernel_that_breaks_a_rule_is_noticed(dut):
    """Of tests/sim/stand_in.v, with the fault that NEARKV_FAULT names: ends with a Violation."""
    bench = Bench(dut)
    await bench.start()
    record = abi.JOB.pack(
        page_table=0, n_pages=1, q=0, partial=4096, group_size=0, kv_type=0, head_dim=32,
        page_tokens=32, score_mantissa=0, score_shift=0, tag=int(os.environ["NEARKV_FAULT"]),
    )  # fmt: skip
    bench.job.write(JOB_BASE % MEMORY_BYTES, record)
    values = {"kv": KV_BASE, "job": JOB_BASE, "queue": 0, "n_jobs": 1, "summary": 2048}
    for name, value in values.items():
        for part in range(REGISTERS[name].bits // 32):
            word = value >> 32 * part & 0xFFFFFFFF
            await bench.write(REGISTERS[name].offset + 4 * part, word)
    # Some faults show only while a valid waits.
    late = bench.kv.ar_channel, bench.control.read_if.r_channel
    for channel in late:
        channel.pause = True
    await bench.write(abi.REG_CTRL, abi.CTRL_START)
    polling = cocotb.start_soon(bench.wait_done(100))
    await ClockCycles(dut.ap_clk, 100)
    for channel in late:
        channel.pause = False
    await polling
    dut.ap_rst_n.value = 0
    await ClockCycles(dut.ap_clk, 20)


def run(
    test: str, config: Config, work: Path, seed: int = 0, waves: bool = False, **environment: str
) -> None:
    """Run one test of this module in the simulator, from within pytest.

    Parameters
    ----------
    work : Path
        Where the log, the results and, with `waves`, the waveform go.
    environment : str
        Further variables for the simulator's process.

    Raises
    ------
    SystemExit
        If the test fails; the log is printed.
    """
    source = rtl.emitted(config)
    key = hashlib.sha256(source.encode()).hexdigest()[:20]
    build = rtl.cache_directory() / f"cocotb-{config.name}-{key}{'-waves' if waves else ''}"
    tools = {**rtl.verilator_environment(), "MAKEFLAGS": f"-- {rtl.MAKE_VARIABLES}"}
    with unittest.mock.patch.dict(os.environ, tools):
        runner = get_runner("verilator")
        with rtl.locked(build):
            if not (build / "ready").exists():
                _build(runner, build, source, waves)
        runner.test(
            test_module=__name__, testcase=test, hdl_toplevel="nearkv",
            hdl_toplevel_lang="verilog", build_dir=build,
            test_dir=work, results_xml=str(work / "results.xml"), seed=seed, waves=waves,
            extra_env={"NEARKV_CONFIG": config.name, "NEARKV_SEED": str(seed), **environment},
        )  # fmt: skip


def _build(runner, build: Path, source: str, waves: bool) -> None:
    build.mkdir(exist_ok=True)
    verilog, public = build / "nearkv.v", build / "nearkv.vlt"
    verilog.write_text(source)
    # Only the ports need to be seen from Python. The runner makes everything public, which keeps
    # Verilator from optimising.
    public.write_text('`verilator_config\npublic_flat_rw -module "nearkv" -port "*"\n')
    log = build / "build.log"
    try:
        runner.build(
            sources=[public, verilog], hdl_toplevel="nearkv", build_dir=build, always=True,
            timescale=("1ns", "1ps"), waves=waves, log_file=log,
            build_args=["--no-public-flat-rw", *rtl.VERILATOR_FLAGS],
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        last = log.read_text().splitlines()[-1]
        raise rtl.BuildError(f"compiling the bench failed: {last} (log: {log})") from error
    (build / "ready").touch()
