# SPDX-License-Identifier: Apache-2.0
"""Compiles the native part of the card `twin`; everything else is in pyproject.toml."""

from pathlib import Path
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "hw"), str(ROOT / "sim")]

from nearkv_sim import twin  # noqa: E402, its constants come from the gateware's


class BuildTwin(build_ext):
    """Writes the constants first, in a place of its own."""

    def build_extension(self, ext):
        folder = Path(self.build_temp) / "twin"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "twin_constants.h").write_text(twin.header())
        ext.include_dirs.append(str(folder))
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildTwin},
    ext_modules=[
        Extension(
            "nearkv_sim.twin._native",
            [f"sim/nearkv_sim/twin/{name}" for name in twin.SOURCES],
            depends=[f"sim/nearkv_sim/twin/{name}" for name in (*twin.HEADERS, "__init__.py")]
            + ["hw/nearkv_hw/abi.py", "hw/nearkv_hw/number.py"],
            # Each source says itself which instructions it may use.
            extra_compile_args=["-std=c++20", "-O3", "-Wno-psabi", "-Wno-maybe-uninitialized"],
            language="c++",
            # Without a compiler everything but this card works; it says so when it is opened.
            optional=True,
        )
    ],
)
