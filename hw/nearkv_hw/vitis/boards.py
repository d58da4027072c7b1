# SPDX-License-Identifier: Apache-2.0
"""The cards that `make bitstream` knows: one TOML file each in `nearkv_hw/boards`.

title, platform, part    of the card, as Vitis names them
vitis                    oldest and newest version that knows the platform
config                   a preset of nearkv_hw.config
kernel_mhz               clock asked for; v++ lowers it where timing is missed
[[engine]]               one compute unit each, with a memory channel of its own:
    memory               what v++ connects it to (`sp` tag): bank0, DDR[1], HBM[0:7]
    memory_mib           how much there is
    slr                  super logic region to place it in; left out on a chip of one region
"""

from dataclasses import dataclass, fields
from pathlib import Path
import re
import tomllib

from ..config import PRESETS

FOLDER = Path(__file__).parents[1] / "boards"

# UG1702, "--connectivity Options": sp=<compute unit>.<port or argument>:<tag>
MEMORY_TAG = re.compile(r"bank\d+|(?:DDR|PLRAM)\[\d+\]|HBM\[\d+(?::\d+)?\]")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One compute unit and the memory that both of its AXI masters reach."""

    memory: str
    memory_mib: int
    slr: int | None = None


@dataclass(frozen=True, kw_only=True)
class Board:
    """One card; see the module.

    Raises
    ------
    ValueError
        If a value is not what the module says; names the board, the key and what was expected.
    """

    name: str
    title: str
    platform: str
    part: str
    vitis: tuple[str, str]
    config: str
    kernel_mhz: int
    engines: tuple[Engine, ...]

    def __post_init__(self):
        def require(key, expected, good):
            if not good:
                raise ValueError(f"board {self.name}: {key} must be {expected}, not "
                                 f"{getattr(self, key)!r}")  # fmt: skip

        for key, expected, form in (
            ("platform", "the name of a Vitis platform (xilinx_...)", r"xilinx_\w+"),
            ("part", "a part of the UltraScale+ family (xc...)", r"xc[a-z0-9]+-\w+-\w+-\w"),
            ("config", f"one of {', '.join(PRESETS)}", "|".join(PRESETS)),
        ):
            value = getattr(self, key)
            require(key, expected, isinstance(value, str) and re.fullmatch(form, value))
        require("title", "text", isinstance(self.title, str) and self.title)
        require(
            "vitis",
            "two versions, the oldest and the newest, such as '2022.1'",
            len(self.vitis) == 2
            and all(isinstance(v, str) and re.fullmatch(r"20\d\d\.[12]", v) for v in self.vitis)
            and self.vitis[0] <= self.vitis[1],
        )
        require("kernel_mhz", "a whole number of MHz, 50 to 600",
                type(self.kernel_mhz) is int and 50 <= self.kernel_mhz <= 600)  # fmt: skip
        require("engines", "one [[engine]] or more", self.engines)
        tags = [engine.memory for engine in self.engines]
        for engine in self.engines:
            if not (isinstance(engine.memory, str) and MEMORY_TAG.fullmatch(engine.memory)):
                raise ValueError(f"board {self.name}: memory of an engine must be a tag such as "
                                 f"bank0, DDR[1] or HBM[0:7], not {engine.memory!r}")  # fmt: skip
            if type(engine.memory_mib) is not int or engine.memory_mib < 1:
                raise ValueError(f"board {self.name}: memory_mib of {engine.memory} must be a "
                                 f"whole number of MiB, not {engine.memory_mib!r}")  # fmt: skip
            if engine.slr is not None and (type(engine.slr) is not int or engine.slr < 0):
                raise ValueError(f"board {self.name}: slr of {engine.memory} must be a number from "
                                 f"0, or left out, not {engine.slr!r}")  # fmt: skip
        if twice := {tag for tag in tags if tags.count(tag) > 1}:
            raise ValueError(f"board {self.name}: each engine needs a memory of its own; "
                             f"{', '.join(sorted(twice))} is named twice")  # fmt: skip


def names() -> list[str]:
    """The boards there are, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Board:
    """The board of a name.

    Raises
    ------
    ValueError
        If there is none, or its file is not as the module says.
    """
    if name not in names():
        raise ValueError(f"no board {name!r}; choose one of {', '.join(names())}")
    return parse(name, (FOLDER / f"{name}.toml").read_text())


def parse(name: str, text: str) -> Board:
    """A board from the text of its file; errors as for `load`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"board {name}: not TOML: {error}") from error
    engines = values.pop("engine", [])
    if not (isinstance(engines, list) and all(isinstance(engine, dict) for engine in engines)):
        raise ValueError(f"board {name}: engines are written as [[engine]] tables")
    _check_keys(name, values, {f.name for f in fields(Board)} - {"name", "engines"}, set())
    for engine in engines:
        _check_keys(f"{name}, engine", engine, {"memory", "memory_mib"}, {"slr"})
    if not isinstance(values["vitis"], list):
        raise ValueError(f"board {name}: vitis must be two versions, not {values['vitis']!r}")
    values["vitis"] = tuple(values["vitis"])
    return Board(name=name, engines=tuple(Engine(**engine) for engine in engines), **values)


def _check_keys(where: str, table: dict, wanted: set[str], optional: set[str]) -> None:
    missing, unknown = wanted - table.keys(), table.keys() - wanted - optional
    if missing or unknown:
        what = [f"missing: {', '.join(sorted(missing))}"] if missing else []
        what += [f"unknown: {', '.join(sorted(unknown))}"] if unknown else []
        raise ValueError(f"board {where}: {'; '.join(what)}")
