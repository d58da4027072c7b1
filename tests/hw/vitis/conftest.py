# SPDX-License-Identifier: Apache-2.0
"""The emitted kernel, and stand-ins for Vivado and v++ on PATH."""

from functools import cache
import os
from pathlib import Path
import shutil

import pytest

from nearkv_hw.config import preset
from nearkv_hw.emit import verilog
from nearkv_hw.vitis import boards, build, recipe
from nearkv_hw.vitis.interface import Interface, read_ports

STAND_INS = Path(__file__).parent
# What the cards have, from their data sheets: memories to connect to, super logic regions, GiB.
CARDS = {
    "smartssd": (["bank0"], 1, 4),
    "u50": ([f"HBM[{i}]" for i in range(32)], 2, 8),
    "u55c": ([f"HBM[{i}]" for i in range(32)], 3, 16),
    "u200": ([f"DDR[{i}]" for i in range(4)], 3, 64),
    "u250": ([f"DDR[{i}]" for i in range(4)], 4, 64),
    "u280": ([f"HBM[{i}]" for i in range(32)] + ["DDR[0]", "DDR[1]"], 3, 8),
}


@pytest.fixture(scope="session")
def emitted():
    """The Verilog of the preset `tiny` for a family, emitted once."""

    @cache
    def emit(family: str) -> str:
        try:
            return verilog(preset("tiny"), family)
        except RuntimeError as error:
            pytest.skip(str(error))

    return emit


@pytest.fixture
def text(emitted) -> str:
    return emitted("ultrascale_plus")


@pytest.fixture
def with_interrupt(text) -> str:
    """The same kernel with the port `interrupt`, whether the gateware has it yet or not."""
    if "output interrupt;" in text:
        return text
    first = text.index("output m_axi_")
    text = text[:first] + "output interrupt;\n  " + text[first:]
    return text.replace("module nearkv(", "module nearkv(interrupt, ", 1)


@pytest.fixture
def without_interrupt(text) -> str:
    for part in (", interrupt", "  output interrupt;\n"):
        text = text.replace(part, "", 1)
    return text


@pytest.fixture
def board():
    """A card with several memories."""
    return boards.load("u250")


@pytest.fixture
def made(text, board):
    """The recipe of `board` for the emitted kernel."""
    return recipe.make(board, "hw", Interface.of(read_ports(text)), preset("tiny"))


@pytest.fixture
def tiny_builds(emitted, monkeypatch):
    """Builds emit the preset `tiny`, whatever the board asks for: it takes less time."""
    monkeypatch.setattr(build, "verilog", lambda config, family: emitted(family))


@pytest.fixture
def no_tools(tmp_path, monkeypatch):
    """A machine without Vitis."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("PLATFORM_REPO_PATHS", raising=False)
    monkeypatch.setattr(build, "_PLATFORMS", tmp_path / "empty")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Stand-ins for the tools on PATH, and every card's platform. Returns the file of their calls."""
    if shutil.which("tclsh") is None:
        pytest.skip("tclsh is not installed: apt-get install tcl")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vivado", "v++", "emconfigutil"):
        (folder / name).symlink_to(STAND_INS / name)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    platforms = tmp_path / "platforms"
    for name, (memories, regions, _) in CARDS.items():
        platform = boards.load(name).platform
        (platforms / platform).mkdir(parents=True)
        lines = [*memories, f"slr {regions}"]
        (platforms / platform / f"{platform}.xpfm").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PLATFORM_REPO_PATHS", str(platforms))
    monkeypatch.setattr(build, "_PLATFORMS", tmp_path / "none")
    log = tmp_path / "calls"
    monkeypatch.setenv("STANDIN_LOG", str(log))
    for name in ("VERSION", "FAIL", "WNS", "MHZ"):
        monkeypatch.delenv(f"STANDIN_{name}", raising=False)
    return log
