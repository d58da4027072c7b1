# SPDX-License-Identifier: Apache-2.0
"""From the Verilog to an xclbin for an AMD card: `make bitstream`.

    boards.py      what a card is: one TOML file each in ../boards
    interface.py   the ports of the emitted Verilog, read as Vitis reads them; kernel.xml
    recipe.py      packaging Tcl, link configuration, constraints, and what the host must know
    build.py       runs Vivado and v++, reads their reports, writes the manifest

Nothing here repeats what `nearkv_hw.abi` or a board's file says.
"""
