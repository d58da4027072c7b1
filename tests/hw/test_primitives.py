# SPDX-License-Identifier: Apache-2.0
"""Instances are only made where the values fit. What they compute: tests/sim/test_primitives.py."""

from amaranth import Module, Signal, signed

from nearkv_hw.primitives import ADD_NONE, Dsp48e2, Mult18x18d


def test_a_value_too_wide_for_a_port_is_refused(refuses):
    with refuses("28 signed bits do not fit a port of 27"):
        Dsp48e2(Module(), "dsp", a=Signal(27), b=Signal(17), add=ADD_NONE)
    with refuses("24 signed bits do not fit a port of 18"):
        Mult18x18d(Module(), "multiply", a=Signal(signed(24)), b=Signal(signed(18)))
