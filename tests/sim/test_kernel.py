# SPDX-License-Identifier: Apache-2.0
"""The cocotb benches of `nearkv_sim.rtl.bench_kernel`, one pytest test each."""

import pytest

from nearkv_hw.config import preset

bench_kernel = pytest.importorskip(
    "nearkv_sim.rtl.bench_kernel",
    reason="cocotb is not installed; install it with: pip install 'nearkv[hardware]'",
    exc_type=ImportError,
)

pytestmark = pytest.mark.sim
SMOKE = ("control_follows_ap_ctrl_hs",)


@pytest.mark.parametrize(
    "test",
    [pytest.param(x, marks=pytest.mark.smoke if x in SMOKE else ()) for x in bench_kernel.TESTS],
)
def test_kernel(tools, tmp_path, test):
    bench_kernel.run(test, preset("tiny"), tmp_path)
