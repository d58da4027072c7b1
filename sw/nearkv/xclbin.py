# SPDX-License-Identifier: Apache-2.0
"""nearkv xclbin: what is in an xclbin file."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

from nearkv_hw.vitis.interface import NAME, Kernel, arguments
from nearkv_hw.xclbin import Xclbin, kind_name


def add_arguments(parser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser(
        "info",
        help="kernels, arguments, banks, clocks, uuid",
        description="Say what an xclbin file puts on a card, and whether this version of nearkv fits it.",
    )
    add.add_argument("file", type=Path, metavar="FILE")
    add.add_argument("--json", action="store_true", help="as JSON")


def run(args) -> int:
    about = describe(Xclbin.read(args.file))
    if args.json:
        print(json.dumps(about, indent=2))
    else:
        print(*_lines(about), sep="\n")
    return 0


def describe(xclbin: Xclbin) -> dict[str, Any]:
    """All that is told of an xclbin."""
    memories = xclbin.memories
    kernels = {kernel.name: kernel for kernel in xclbin.kernels}
    return {
        "uuid": str(xclbin.uuid),
        "platform": xclbin.platform,
        "tools": ".".join(map(str, xclbin.version)),
        "kernels": [
            {
                "name": kernel.name,
                "vlnv": kernel.vlnv,
                "control": kernel.protocol,
                "fits": fits(kernel) if kernel.name == NAME else None,
                "arguments": [
                    {"name": it.name, "offset": it.offset, "bits": 8 * it.size, "port": it.port}
                    for it in kernel.arguments
                ],
            }
            for kernel in kernels.values()
        ],
        "units": [
            {
                "name": f"{unit.kernel}:{unit.name}",
                "base": unit.base,
                "interrupt": unit.interrupt,
                "banks": {
                    it.name: [memories[bank].tag for bank in xclbin.banks_of(unit, index)]
                    for index, it in enumerate(kernels[unit.kernel].arguments)
                    if it.pointer
                }
                if unit.kernel in kernels
                else {},
            }
            for unit in xclbin.units
        ],
        "banks": [
            {"tag": it.tag, "type": getattr(it.type, "name", it.type), "base": it.base, "bytes": it.nbytes}
            for it in memories
            if it.used
        ],
        "clocks": [
            {"name": it.name, "type": getattr(it.type, "name", it.type), "mhz": it.mhz}
            for it in xclbin.clocks
        ],
        "sections": [
            {"kind": kind_name(it.kind), "bytes": len(it.data)} for it in xclbin.sections
        ],
    }  # fmt: skip


def fits(kernel: Kernel) -> bool:
    """Whether a kernel has the arguments of this version, where it has them."""
    ours, theirs = (
        [(it.name, it.offset, it.size, it.pointer) for it in these]
        for these in (arguments(), kernel.arguments)
    )
    return ours == theirs


def _lines(about: dict[str, Any]) -> Iterator[str]:
    yield f"uuid      {about['uuid']}"
    yield f"platform  {about['platform']}, tools {about['tools']}"
    for kernel in about["kernels"]:
        version = {True: "fits this version of nearkv", False: "is of another version of nearkv"}
        words = [kernel["control"], kernel["vlnv"], version.get(kernel["fits"], "is not nearkv's")]
        yield f"kernel    {kernel['name']}: {', '.join(word for word in words if word)}"
        for it in kernel["arguments"]:
            yield f"          {it['offset']:#06x} {it['name']:<10} {it['bits']} bits, {it['port']}"
    for unit in about["units"]:
        interrupt = "" if unit["interrupt"] is None else f", interrupt {unit['interrupt']}"
        yield f"unit      {unit['name']} at {unit['base']:#x}{interrupt}"
        for name, banks in unit["banks"].items():
            yield f"          {name} in {', '.join(banks) or 'no bank'}"
    for it in about["banks"]:
        yield f"bank      {it['tag']}: {it['type']}, {it['bytes'] >> 20} MiB at {it['base']:#x}"
    for it in about["clocks"]:
        yield f"clock     {it['name']}: {it['mhz']} MHz, {it['type']}"
    yield "sections  " + ", ".join(f"{it['kind']} {it['bytes']}" for it in about["sections"])
