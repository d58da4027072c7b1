# SPDX-License-Identifier: Apache-2.0
"""With DSP48E2 cells a component does what it does without, in every cycle.

The cell is our model of it, `nearkv_sim/rtl/dsp48e2.v`; tests/sim/test_primitives.py says how that was
compared with the vendor's.
"""

from pathlib import Path

import pytest

from nearkv_hw.array import Mac
from nearkv_hw.primitives import FAMILIES
from nearkv_hw.softmax import Exp2, Score
import nearkv_sim

DSP48E2 = Path(nearkv_sim.__file__).with_name("rtl") / "dsp48e2.v"


@pytest.fixture
def both(bench):
    """A function: a component for any chip and for UltraScale+, with the same inputs."""
    bench.cells.append(DSP48E2)

    def add(make):
        generic = bench.add(make(), "generic")
        return generic, bench.add(make(), "dsp", FAMILIES["ultrascale_plus"], beside=generic)

    return add


@pytest.mark.parametrize("cascaded", [False, True])
def test_a_mac_is_the_same_by_induction(bench, both, cascaded):
    """From the first product of the first sum on."""
    b = bench
    generic, dsp = both(lambda: Mac(cascaded))
    filled = b.ago(b.begun, Mac.latency)
    started = b.ghost(1, "started")
    with b.m.If(filled & generic.valid & b.before(generic.first)):
        b.m.d.sync += started.eq(1)
    b.claim(dsp.w_next == generic.w_next, when=filled)
    b.claim(dsp.p == generic.p, when=started)
    b.prove(depth=Mac.latency + 2)


@pytest.mark.parametrize("make", [Score, Exp2])
def test_a_pipeline_is_the_same(bench, both, make):
    """Without feedback: what comes out depends on the last `latency` cycles only, so as many are
    all."""
    b = bench
    generic, dsp = both(make)
    filled = b.ago(b.begun, make.latency)
    for port, member in generic.signature.members.items():
        if member.flow.name == "Out":
            b.claim(getattr(dsp, port) == getattr(generic, port), when=filled)
    b.bound(make.latency + 2)
