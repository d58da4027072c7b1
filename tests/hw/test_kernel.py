# SPDX-License-Identifier: Apache-2.0
"""The whole kernel under Amaranth's simulator: what only shows when all stages work together."""

from amaranth.hdl import Fragment
import numpy as np
import pytest

from nearkv_hw import abi
from nearkv_hw.config import preset
from nearkv_hw.kernel import Kernel, Top
from nearkv_sim import workload
from nearkv_sim.model import ModelCard

KV_BASE, JOB_BASE = 0x1_2345_6000, 0x7_FFFF_F000


class KernelCard:
    """A card that runs `Kernel` between two memories. Offers what `Memories.execute` wants."""

    def __init__(self, config, bench):
        self.config, self._bench = config, bench

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s=None):
        dut = Kernel(self.config)
        run = self._bench(dut)

        def reader(memory, base):
            def read(address):
                return memory[address - base : address - base + abi.BEAT_BYTES].tobytes()

            return read

        run.read_memory(dut.kv_ar, dut.kv_r, reader(kv, KV_BASE), latency=9)
        run.read_memory(dut.job_ar, dut.job_r, reader(job, JOB_BASE), latency=9)

        def write(address, data):
            at = address - JOB_BASE
            assert 0 <= at <= len(job) - abi.BEAT_BYTES
            job[at : at + abi.BEAT_BYTES] = np.frombuffer(data, np.uint8)

        run.write_memory(dut.job_aw, dut.job_w, dut.job_b, write)
        values = {
            "kv": KV_BASE, "job": JOB_BASE, "queue": queue, "n_jobs": n_jobs, "summary": summary,
        }  # fmt: skip
        writes = [
            (register.offset + 4 * i, values[register.name] >> 32 * i & 0xFFFFFFFF)
            for register in abi.REGISTERS
            if register.writable
            for i in range(register.bits // 32)
        ]
        writes.append((abi.REG_CTRL, abi.CTRL_START))
        w_shape = dut.control.w.payload.shape()
        run.source(dut.control.aw, [offset for offset, _ in writes])
        run.source(
            dut.control.w, [run.bits(w_shape, {"data": word, "strb": 15}) for _, word in writes]
        )
        run.sink(dut.control.b)
        run.source(dut.control.ar, [])
        run.sink(dut.control.r)
        # The summary is the last thing written.
        job[summary : summary + abi.SUMMARY.bytes] = 0
        run.run(lambda: job[summary] != 0, limit=3000, extra=30)


@pytest.fixture
def card(bench):
    return KernelCard(preset("tiny"), bench)


def assert_equals_model(card, memories):
    want = memories.untimed(memories.execute(ModelCard(card.config)))
    got = memories.untimed(memories.execute(card))
    for i in range(memories.n_jobs):
        assert memories.partial(got, i) == memories.partial(want, i), f"job {i}"
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_illegal_jobs_behind_a_short_one_do_not_stop_the_queue(card, rng):
    jobs = [workload.random_job(rng, card.config, n_tokens=4, head_dim=32) for _ in range(10)]
    memories = workload.place(jobs, rng)
    for i in range(1, 9):
        memories.set_record(i, group_size=0)
    assert_equals_model(card, memories)


def test_top_names_every_wire_of_the_buses_once():
    top = Top(preset("tiny"))
    Fragment.get(top, None)
    widths = {name: len(signal) for name, (signal, _) in top.ports.items()}
    assert widths["ap_clk"] == widths["ap_rst_n"] == 1
    for prefix in ("m_axi_kv_ar", "m_axi_job_ar", "m_axi_job_aw"):
        assert widths[prefix + "addr"] == 64
        assert widths[prefix + "len"] == 8
        assert (widths[prefix + "size"], widths[prefix + "burst"]) == (3, 2)
    for name in ("m_axi_kv_rdata", "m_axi_job_rdata", "m_axi_job_wdata"):
        assert widths[name] == 8 * abi.BEAT_BYTES
    assert widths["m_axi_job_wstrb"] == abi.BEAT_BYTES
    assert (widths["s_axi_control_awaddr"], widths["s_axi_control_wdata"]) == (12, 32)
