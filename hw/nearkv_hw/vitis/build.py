# SPDX-License-Identifier: Apache-2.0
"""Build the xclbin of a board with Vivado and v++: what `make bitstream` runs.

    python -m nearkv_hw.vitis --board smartssd --target hw

1 tools      looks for Vivado, v++ and the platform; a version that does not know it ends here
2 verilog    emits the kernel
3 recipe     reads its ports; writes and checks kernel.xml, package.tcl, link.cfg and constraints
4 package    Vivado: the Verilog becomes a kernel object (.xo)
5 link       v++: synthesis, placement, routing, bitstream (hours)
6 reports    timing and utilisation are read, and the manifest is written

Without Vitis it does 2 and 3, says what is missing and how to get it, and fails.

# Ref: AMD UG1393, "Output Directories of the v++ Command", "Packaging for Data Center Platforms"
#   (no v++ --package for these cards); UG906, "Report Timing Summary"
"""

import argparse
import contextlib
from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TextIO

from .. import number
from ..config import Config, preset
from ..emit import manifest as emit_manifest
from ..emit import verilog
from . import boards, recipe
from .boards import Board
from .interface import NAME, Interface, read_ports

STAGES = ("tools", "verilog", "recipe", "package", "link", "reports")
# Lines of the tools that say how far they are.
_PROGRESS = re.compile(
    r"Run vpl: Step \w+: \w+|Finished \w+ of \w+ tasks?.*|(?:Block|Top)-level synthesis in progress.*"
    r"|Phase \d+ .*|Starting \w+ (?:Placer|Routing|Placement|Optimization).*"
)
_ERROR = re.compile(r"^\s*(?:\[[\d:]+\]\s*)?(?:ERROR|FATAL)\b")
_POLL_S = 0.2
_PLATFORMS = Path("/opt/xilinx/platforms")


class BuildError(RuntimeError):
    """The build cannot go on; the message says why and what to do."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# --- tools --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """What was found. `missing`: the first thing that was not, and how to get it."""

    versions: dict[str, str]
    platform: Path | None
    missing: str | None


def find_tools(board: Board, target: str) -> Tools:
    """Look for the tools and the platform, and check versions.

    Raises
    ------
    BuildError
        If a tool is there but of a version that does not know the platform, or does not run.
    """
    oldest, newest = board.vitis
    get = (
        f"install Vitis {newest} (AMD Unified Installer, https://www.xilinx.com/support/download.html), "
        f"then: source <where it is>/Vitis/{newest}/settings64.sh"
    )
    versions = {}
    names = ["vivado", "v++"] + (["emconfigutil"] if target == "hw_emu" else [])
    for tool in names:
        if shutil.which(tool) is None:
            return Tools(
                versions,
                None,
                f"{tool} of Vitis {oldest} to {newest} is not on PATH\n  to get it: {get}",
            )
        if tool == "emconfigutil":  # comes with v++
            continue
        option = "-version" if tool == "vivado" else "--version"
        versions[tool] = version = _version(tool, option)
        if not oldest <= version <= newest:
            raise BuildError(
                f"{tool} is {version}, but {board.platform} is built with Vitis {oldest} to {newest}; "
                f"{get}. If you know that {version} works, say so in {boards.FOLDER / board.name}.toml"
            )
    if versions["vivado"] != versions["v++"]:
        raise BuildError(
            f"vivado is {versions['vivado']} and v++ is {versions['v++']}; they must come from one "
            f"installation: source its Vitis/<version>/settings64.sh in a new shell"
        )
    platform = _find_platform(board.platform)
    if platform is None:
        return Tools(
            versions, None,
            f"the platform {board.platform} is in none of {', '.join(map(str, _platform_folders()))}\n"
            "  to get it: install its development package (the card's page on https://www.xilinx.com, "
            "'Getting Started'), or name its folder in PLATFORM_REPO_PATHS",
        )  # fmt: skip
    return Tools(versions, platform, None)


def _version(tool: str, option: str) -> str:
    try:
        done = subprocess.run([tool, option], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{tool} {option} does not run: {error}") from error
    match = re.search(r"\bv(20\d\d\.\d)", done.stdout)
    if match is None:
        line = (done.stdout + done.stderr).strip().splitlines()
        raise BuildError(
            f"{tool} {option} names no version; it says: {line[-1] if line else 'nothing'}"
        )
    return match[1]


def _platform_folders() -> list[Path]:
    given = os.environ.get("PLATFORM_REPO_PATHS", "").split(":")
    return [*(Path(path) for path in given if path), _PLATFORMS]


def _find_platform(name: str) -> Path | None:
    for folder in _platform_folders():
        for path in (folder / name / f"{name}.xpfm", folder / f"{name}.xpfm"):
            if path.is_file():
                return path.resolve()
    return None


# --- stages -------------------------------------------------------------------------------------


def run_stage(stage: str, command: list[str], folder: Path, log: Path, expected: Path,
              timeout_s: float) -> None:  # fmt: skip
    """Run one tool, show its progress, and keep all it prints.

    Raises
    ------
    BuildError
        If it cannot start, fails, takes longer than `timeout_s` or leaves `expected` unmade; with
        its last error and the path of the log.
    """
    expected.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"  {' '.join(command)}")
    started = time.monotonic()
    errors: list[str] = []
    begun = told = ""  # a line whose end is still to come; what was said last

    def follow(lines: TextIO) -> None:
        """Tell how far it is; keep its errors."""
        nonlocal begun, told
        *whole, begun = (begun + lines.read()).split("\n")
        for line in whole:
            if _ERROR.search(line):
                errors.append(line.strip())
            elif (match := _PROGRESS.search(line)) and match[0] != told:
                told = match[0]
                say(f"  [{(time.monotonic() - started) / 60:5.0f} min] {told}")

    # Into a file, not through a pipe: a pipe stays open as long as any process that the tool leaves
    # behind.
    with log.open("w") as file, log.open(errors="replace") as lines:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BuildError(f"{command[0]} does not start: {error}") from error
        try:
            status = None
            while status is None:
                if time.monotonic() - started > timeout_s:
                    raise BuildError(
                        f"{stage}: {command[0]} has not ended after {timeout_s / 3600:g} hours; more "
                        f"time with --timeout-hours. Log: {log}"
                    )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=_POLL_S)
                follow(lines)
        finally:
            _end(process)
    if status == 0 and expected.is_file() and expected.stat().st_size:
        return
    if not errors:
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][
            -1:
        ]
    how = f"ended with status {status}" if status else f"did not write {expected.name}"
    # The first error is often the cause, the last one what became of it.
    said = "\n  ".join(dict.fromkeys(errors[:1] + errors[-1:])) or "nothing was printed"
    raise BuildError(f"{stage}: {command[0]} {how}:\n  {said}\n  log: {log}")


def _end(process: subprocess.Popen) -> None:
    """A tool that still runs is ended with all that it started."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, what)
            process.wait(timeout=20)


# --- reports ------------------------------------------------------------------------------------


def read_timing(text: str) -> dict[str, float]:
    """The figures of a timing summary: wns_ns, tns_ns, whs_ns, ths_ns and failing endpoints.

    Raises
    ------
    ValueError
        If the text has no such table.
    """
    lines = text.splitlines()
    at = next(
        (i for i, line in enumerate(lines) if re.match(r"\s*WNS\(ns\)\s+TNS\(ns\)", line)), None
    )
    if at is None or at + 2 >= len(lines):
        raise ValueError("no 'Design Timing Summary' in it")
    # Column titles are separated by two blanks or more, at least in their rule of dashes.
    spans = [match.span() for match in re.finditer(r"-+", lines[at + 1])]
    titles = [lines[at][begin:end].strip() for begin, end in spans]
    values = lines[at + 2].split()
    if len(values) != len(titles):
        raise ValueError(f"its table has {len(titles)} columns and {len(values)} values")
    row = dict(zip(titles, values, strict=True))
    names = {
        "wns_ns": "WNS(ns)", "tns_ns": "TNS(ns)", "setup_failing_endpoints": "TNS Failing Endpoints",
        "whs_ns": "WHS(ns)", "ths_ns": "THS(ns)", "hold_failing_endpoints": "THS Failing Endpoints",
    }  # fmt: skip
    try:
        return {
            key: int(row[title]) if "endpoints" in key else float(row[title])
            for key, title in names.items()
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"its table is not understood: {error}") from error


def read_utilisation(text: str) -> dict[str, dict[str, int]]:
    """Resources by row of `kernel_util_routed.rpt`: the platform, the budget, what of it is used,
    the kernel, and each compute unit; columns lut, lut_memory, register, bram36, uram, dsp.

    Raises
    ------
    ValueError
        If the text has no such table.
    """
    columns = {"LUT": "lut", "LUTAsMem": "lut_memory", "REG": "register", "BRAM": "bram36",
               "URAM": "uram", "DSP": "dsp"}  # fmt: skip
    rows: dict[str, dict[str, int]] = {}
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "Name":
            titles = cells[1:]
        elif titles and len(cells) == len(titles) + 1:
            found = [re.match(r"\d+", cell) for cell in cells[1:]]
            if all(found):
                rows[cells[0]] = {
                    columns[title]: int(match[0])
                    for title, match in zip(titles, found, strict=True)
                    if match and title in columns
                }
    if not rows:
        raise ValueError("no table of resources in it")
    return rows


def read_clock_mhz(text: str) -> float | None:
    """The kernel's clock as it came out, from the .info file beside an xclbin; None if it does not
    say."""
    for block in re.split(r"^\s*Name:", text, flags=re.M)[1:]:
        name = block.split(None, 1)[0] if block.split() else ""
        match = re.search(r"Achieved Freq:\s*([\d.]+)\s*MHz", block)
        # Clock 0 of the platforms here: ulp_ucs_aclk_kernel_00, blp_s_aclk_kernel_ref_clk_00, ...
        if match and name.endswith("_00") and "SCALABLE" in block:
            return float(match[1])
    return None


def _read(path: Path | None, reader):
    """What a report says; None, and a note, if it is not there or not understood."""
    if path is None:
        return None
    try:
        return reader(path.read_text())
    except ValueError as error:
        say(f"  note: {path} is not understood: {error}")
        return None


def _report(folder: Path, *patterns: str) -> Path | None:
    """The newest file that the first fitting pattern finds, in the report folder or the run's."""
    for pattern in patterns:
        found = [
            path for place in (recipe.REPORTS, "link") for path in (folder / place).rglob(pattern)
        ]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    return None


# --- manifest -----------------------------------------------------------------------------------


def identity(board: Board, target: str, config: Config, text: str, interface: Interface) -> dict:
    """What identifies a build before the tools run."""
    emitted = emit_manifest(config, family(target), text)
    return {
        "board": board.name,
        "platform": board.platform,
        "part": board.part,
        "target": target,
        **recipe.host(board),
        "interrupt": interface.interrupt,
        "config": emitted["config"],
        "config_hash": emitted["config_hash"],
        "numerics_hash": number.contract_hash(),
        "family": emitted["family"],
        "verilog_sha256": emitted["verilog_sha256"],
        "tools": emitted["tools"],
    }


def family(target: str) -> str:
    """What the Verilog may instantiate. For emulation nothing: any simulator can read that."""
    return "ultrascale_plus" if target == "hw" else "generic"


def _results(board: Board, target: str, folder: Path, made: recipe.Recipe) -> dict:
    """Clocks, timing and utilisation of what v++ built."""
    clocks: dict = {"requested_mhz": board.kernel_mhz}
    if target != "hw":
        return {"clocks": clocks}
    timing = _read(
        _report(folder, "*timing_summary_postroute_physopted.rpt", "*timing_summary_routed.rpt"),
        read_timing,
    )
    if timing is None:
        raise BuildError(
            f"reports: v++ left no timing report that can be read in {folder / recipe.REPORTS}; whether "
            f"{folder / made.xclbin} keeps its timing is not known, so it is not used"
        )
    used = _read(_report(folder, "*kernel_util_routed.rpt"), read_utilisation)
    info = folder / f"{made.xclbin}.info"
    achieved = read_clock_mhz(info.read_text()) if info.is_file() else None
    clocks["achieved_mhz"] = achieved
    if timing["wns_ns"] < 0 and (achieved is None or achieved >= board.kernel_mhz):
        raise BuildError(
            f"reports: timing is missed by {-timing['wns_ns']:g} ns and v++ did not lower the clock of "
            f"{board.kernel_mhz} MHz: this xclbin is not used. Lower kernel_mhz in "
            f"{boards.FOLDER / board.name}.toml"
        )
    return {"clocks": clocks, "timing": timing, "utilisation": used}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


# --- all of it ----------------------------------------------------------------------------------


def build(board: Board, target: str, work: Path, results: Path, timeout_s: float) -> Path:
    """Build the xclbin of a board.

    Parameters
    ----------
    work : Path
        Folder of everything that is generated; kept, so that a failure can be looked at.
    results : Path
        Folder of the recipe, the manifest and the xclbin.
    timeout_s : float
        For each tool.

    Returns
    -------
    Path of the manifest.

    Raises
    ------
    BuildError
        With what is missing or failed, and what to do.
    """
    config = preset(board.config)

    def stage(name: str) -> None:
        say(f"{STAGES.index(name) + 1}/{len(STAGES)} {name}")

    stage("tools")
    tools = find_tools(board, target)
    say("  " + (", ".join(f"{k} {v}" for k, v in tools.versions.items()) or "none found"))

    stage("verilog")
    try:
        text = verilog(config, family(target))
    except RuntimeError as error:  # Yosys is missing
        raise BuildError(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)
    _write(work / recipe.VERILOG, text)

    stage("recipe")
    try:
        interface = Interface.of(read_ports(text))
        made = recipe.make(board, target, interface, config)
    except ValueError as error:
        raise BuildError(f"recipe: {error}") from error
    for name, content in made.files.items():
        _write(work / name, content)
    _write(results / "recipe.json", _json(made.summary()))
    known = identity(board, target, config, text, interface)
    _write(work / "identity.json", _json(known))
    say(f"  {work}: {', '.join((recipe.VERILOG, *made.files))}")

    if tools.missing:
        raise BuildError(
            f"all that comes before the vendor's tools is made and checked\n"
            f"  missing: {tools.missing}\n"
            f"  then: make bitstream BOARD={board.name} TARGET={target}"
        )
    assert tools.platform is not None
    logs = work / recipe.LOGS
    for stale in (recipe.REPORTS, "link"):
        shutil.rmtree(work / stale, ignore_errors=True)
    stage("package")
    run_stage(
        "package", made.package_command, work, logs / "package.out", work / recipe.XO, timeout_s
    )
    stage("link")
    command = made.link_command(str(tools.platform))
    run_stage("link", command, work, logs / "link.out", work / made.xclbin, timeout_s)
    if target == "hw_emu":
        command = made.emulation_command(str(tools.platform))
        run_stage("link", command, work, logs / "emconfig.out", work / "emconfig.json", timeout_s)

    stage("reports")
    measured = _results(board, target, work, made)
    manifest = {
        **known,
        **measured,
        "tools": known["tools"] | tools.versions,
        "recipe_sha256": {name: _sha256(work / name) for name in made.files},
        "xclbin": made.xclbin,
        "xclbin_bytes": (work / made.xclbin).stat().st_size,
        "xclbin_sha256": _sha256(work / made.xclbin),
    }
    for name in [made.xclbin] + (["emconfig.json"] if target == "hw_emu" else []):
        part = results / f"{name}.part"
        shutil.copyfile(work / name, part)
        part.replace(results / name)
    path = results / f"manifest.{target}.json"
    _write(path, _json(manifest))
    _tell(manifest, results / made.xclbin, path)
    return path


def _tell(manifest: dict, xclbin: Path, path: Path) -> None:
    """Sum up for the person who waited."""
    if "timing" in manifest:
        clocks, timing = manifest["clocks"], manifest["timing"]
        came = clocks["achieved_mhz"]
        say(f"  clock: {clocks['requested_mhz']} MHz asked, "
            f"{f'{came:g} MHz' if came is not None else 'not told'}; "
            f"worst slack: setup {timing['wns_ns']:g} ns, hold {timing['whs_ns']:g} ns")  # fmt: skip
        if manifest["utilisation"] is None:
            say("  note: v++ left no report of utilisation; the manifest has none")
        for row, values in (manifest["utilisation"] or {}).items():
            if row.startswith(NAME):
                say(f"  {row}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    say(f"{xclbin}\n{path}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="nearkv_hw.vitis", description="Build the xclbin of a board with Vivado and v++."
    )
    known = ", ".join(boards.names())
    parser.add_argument("--board", default="", help=f"one of {known}")
    parser.add_argument(
        "--target", default="hw", help=" or ".join(recipe.TARGETS) + " (default: hw)"
    )
    parser.add_argument("--work", type=Path, help="folder of generated files and logs "
                        "(default: build/bitstream/BOARD-TARGET)")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder of recipe, manifest and xclbin "
                        "(default: bitstreams/BOARD)")  # fmt: skip
    parser.add_argument(
        "--timeout-hours", type=float, default=48, help="for each tool (default: 48)"
    )
    args = parser.parse_args(argv)
    if not args.board:
        parser.error(f"which board? one of {known}, as in: make bitstream BOARD=smartssd")
    if args.target not in recipe.TARGETS:
        parser.error(f"TARGET must be {' or '.join(recipe.TARGETS)}, not {args.target!r}")
    if not args.timeout_hours > 0:
        parser.error(f"--timeout-hours must be above 0, not {args.timeout_hours:g}")
    try:
        board = boards.load(args.board)
    except ValueError as error:
        parser.error(str(error))
    work = args.work or Path("build/bitstream") / f"{board.name}-{args.target}"
    results = args.results or Path("bitstreams") / board.name
    try:
        build(board, args.target, work, results, 3600 * args.timeout_hours)
    except BuildError as error:
        sys.stdout.flush()
        sys.stderr.write(f"make bitstream: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"make bitstream: cannot write: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("make bitstream: interrupted\n")
        return 130
    return 0
