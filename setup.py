# SPDX-License-Identifier: Apache-2.0
"""Compiles the native parts of the card `twin` and of the host; everything else is in pyproject.toml."""

import importlib.util
from pathlib import Path
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "hw"), str(ROOT / "sim")]

from nearkv_sim import twin  # noqa: E402, its constants come from the gateware's

# By itself: the package nearkv imports more than a build has.
spec = importlib.util.spec_from_file_location("native", ROOT / "sw/nearkv/attention/native.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

HEADERS = {
    "nearkv_sim.twin._native": ("twin_constants.h", twin.header),
    "nearkv.attention._native": ("native_constants.h", native.header),
}


class BuildNative(build_ext):
    """Writes the constants first, in a place of their own."""

    def build_extension(self, ext):
        name, header = HEADERS[ext.name]
        folder = Path(self.build_temp) / "constants"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(header())
        ext.include_dirs.append(str(folder))
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "nearkv_sim.twin._native",
            [f"sim/nearkv_sim/twin/{name}" for name in twin.SOURCES],
            depends=[f"sim/nearkv_sim/twin/{name}" for name in (*twin.HEADERS, "__init__.py")]
            + ["hw/nearkv_hw/abi.py", "hw/nearkv_hw/number.py"],
            # Each source says itself which instructions it may use.
            # GCC 12's own headers read vectors that they leave undefined on purpose.
            extra_compile_args=["-std=c++20", "-O3", "-Wno-psabi", "-Wno-uninitialized"],
            language="c++",
            # Without a compiler everything but this card works; it says so when it is opened.
            optional=True,
        ),
        Extension(
            "nearkv.attention._native",
            ["sw/nearkv/attention/native.cpp"],
            depends=[f"sw/nearkv/attention/{name}" for name in ("native.cpp", "native.py")]
            + ["hw/nearkv_hw/abi.py", "hw/nearkv_hw/number.py"],
            extra_compile_args=native.COMPILE_ARGS,
            language="c++",
            optional=True,  # numpy takes its place
        ),
    ],
)
