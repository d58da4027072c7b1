# SPDX-License-Identifier: Apache-2.0
"""What is instantiated and not inferred, and for which chips.

The family of a build is the `platform` that Amaranth hands to every `elaborate`: None stands for
any chip and for simulation. A component does the same in every cycle for every family, so the
family is no part of a build's configuration.
"""

from amaranth import C, ClockSignal, Instance, Signal, signed


class UltraScalePlus:
    """AMD UltraScale and UltraScale+: multipliers are DSP48E2 instances."""


class Ecp5:
    """Lattice ECP5, which open tools can route: multipliers of the array are MULT18X18D instances."""


FAMILIES = {"generic": None, "ultrascale_plus": UltraScalePlus(), "ecp5": Ecp5()}

# What a DSP48E2 adds to its product.
# Ref: AMD UG579, "OPMODE": bits 8..7 choose W, 6..4 Z, 3..2 Y, 1..0 X; X = Y = 01 is the product.
ADD_NONE, ADD_P, ADD_C, ADD_PCIN_17 = (z << 4 | 0b0101 for z in (0b000, 0b010, 0b011, 0b101))

_PARAMETERS = {
    # No registers at inputs that are constant.
    **dict.fromkeys(("ADREG", "DREG", "ALUMODEREG", "INMODEREG", "CARRYINREG", "CARRYINSELREG"), 0),
    **dict.fromkeys(("CREG", "MREG", "PREG", "OPMODEREG"), 1),
}
# Inputs that do nothing here, and their widths.
_UNUSED = {
    "ACIN": 30, "ALUMODE": 4, "D": 27, "INMODE": 5, "CARRYIN": 1, "CARRYINSEL": 3,
    "CARRYCASCIN": 1, "MULTSIGNIN": 1, "CEAD": 1, "CED": 1, "CEALUMODE": 1, "CEINMODE": 1,
    "CECARRYIN": 1, "RSTA": 1, "RSTB": 1, "RSTC": 1, "RSTD": 1, "RSTM": 1, "RSTP": 1, "RSTCTRL": 1,
    "RSTALUMODE": 1, "RSTINMODE": 1, "RSTALLCARRYIN": 1,
}  # fmt: skip


def _port(m, name, value, bits: int, width: int) -> Signal:
    """`value` of at most so many signed bits, extended to a port's width.

    Raises
    ------
    ValueError
        If it has more.
    """
    used = len(value) + (not value.shape().signed)
    if used > bits:
        raise ValueError(f"{name}: {used} signed bits do not fit a port of {bits}")
    out = Signal(signed(width), name=name)
    m.d.comb += out.eq(value)
    return out


class Dsp48e2:
    """One DSP48E2: p = a * b + z, with registers at a, b, the product and p.

    Parameters
    ----------
    m : Module
    name : str
        Of the submodule.
    a, b : Value
        At most 27 and 18 bits, signed.
    add : Value or int
        What z is, one of the constants above; given when the product enters its register.
    c : Value, optional
        For ADD_C, given together with it; at most 48 bits, signed.
    pcin : Value, optional
        For ADD_PCIN_17 (that is >> 17): the `pcout` of another, over the dedicated wires.
    cascaded : bool
        b is the `bcout` of another, over the dedicated wires.
    depth : int
        Registers at a and b, 1 or 2.
    enable : Value
        p takes its sum; given when the product is in its register.

    Attributes
    ----------
    p : Signal(signed 48), `depth` + 2 cycles after a and b
    pcout : the same
    bcout : Signal(18), b `depth` cycles later
    """

    def __init__(self, m, name, *, a, b, add, c=None, pcin=None, cascaded=False, depth=1, enable=1):
        self.p = Signal(signed(48), name=f"{name}_p")
        self.pcout, self.bcout = Signal(48, name=f"{name}_pcout"), Signal(18, name=f"{name}_bcout")

        def port(value, bits, width):
            return _port(m, f"{name}_port", value, bits, width)

        opmode = Signal(9, name=f"{name}_opmode")
        m.d.comb += opmode.eq(add)
        inputs = {
            "CLK": ClockSignal(),
            "A": port(a, 27, 30),
            "B": C(0, 18) if cascaded else port(b, 18, 18),
            "BCIN": b if cascaded else C(0, 18),
            "C": C(0, 48) if c is None else port(c, 48, 48),
            "PCIN": C(0, 48) if pcin is None else pcin,
            "OPMODE": opmode,
            **dict.fromkeys(("CEA1", "CEB1"), C(depth == 2, 1)),
            **dict.fromkeys(("CEA2", "CEB2", "CEM", "CECTRL"), C(1, 1)),
            "CEC": C(c is not None, 1),
            "CEP": C(1, 1) if isinstance(enable, int) else enable,
            **{name: C(0, width) for name, width in _UNUSED.items()},
        }
        m.submodules[name] = Instance(
            "DSP48E2",
            **{f"p_{name}": value for name, value in _PARAMETERS.items()},
            **dict.fromkeys(("p_AREG", "p_ACASCREG", "p_BREG", "p_BCASCREG"), depth),
            p_B_INPUT="CASCADE" if cascaded else "DIRECT",
            **{f"i_{name}": value for name, value in inputs.items()},
            o_P=self.p, o_PCOUT=self.pcout, o_BCOUT=self.bcout,
        )  # fmt: skip


class Mult18x18d:
    """One MULT18X18D: p = a * b, with registers at a, b and p.

    Ref: Lattice FPGA-TN-02205, "ECP5 and ECP5-5G sysDSP Usage Guide".

    Parameters
    ----------
    m : Module
    name : str
        Of the submodule.
    a, b : Value
        18 bits at most, signed.

    Attributes
    ----------
    p : Signal(signed 36), two cycles after a and b

    Raises
    ------
    ValueError
        If a or b is wider than 18 bits.
    """

    def __init__(self, m, name, *, a, b):
        self.p = Signal(signed(36), name=f"{name}_p")
        ports = {}
        for port, value in (("A", a), ("B", b)):
            wide = _port(m, f"{name}_{port}", value, 18, 18)
            ports |= {f"i_{port}{bit}": wide[bit] for bit in range(18)}
        registers = {
            f"p_REG_{place}_{pin}": value
            for place in ("INPUTA", "INPUTB", "OUTPUT")
            for pin, value in (("CLK", "CLK0"), ("CE", "CE0"), ("RST", "RST0"))
        }
        m.submodules[name] = Instance(
            "MULT18X18D", **registers, **ports,
            i_SIGNEDA=C(1, 1), i_SIGNEDB=C(1, 1), i_SOURCEA=C(0, 1), i_SOURCEB=C(0, 1),
            i_CLK0=ClockSignal(), i_CE0=C(1, 1), i_RST0=C(0, 1),
            **{f"o_P{bit}": self.p[bit] for bit in range(36)},
        )  # fmt: skip
