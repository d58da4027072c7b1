# SPDX-License-Identifier: Apache-2.0
"""`nearkv xrt-sim`: programs that were written for XRT run unchanged, with real results."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
import pytest

import nearkv
from nearkv.cards import open_card
from nearkv_sim import xrt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(xrt.missing()), reason=xrt.missing()),
]

_HERE = Path(__file__).parent
_COMPILERS = {"xrt_host.cpp": ["g++", "-std=c++17"], "xrt_host.c": ["gcc", "-std=c11"]}


@pytest.fixture(scope="session", params=list(_COMPILERS))
def program(request, tmp_path_factory) -> Path:
    """A host program, compiled against XRT and nothing of ours."""
    source = _HERE / request.param
    out = tmp_path_factory.mktemp("host") / source.name.replace(".", "_")
    command = [*_COMPILERS[request.param], "-O1", "-I/usr/include/xrt", str(source), "-o", str(out)]
    subprocess.run([*command, "-lxrt_coreutil", "-luuid", "-pthread"], check=True)
    return out


class Work:
    """Files of a queue, as a program is given them, and what must come of it."""

    def __init__(self, directory: Path, config="tiny"):
        rng = np.random.default_rng(0)
        q = rng.standard_normal((2, 64)).astype(np.float16)
        k, v = rng.standard_normal((2, 300, 1, 64)).astype(np.float16)
        with open_card("twin", config=config, kv_bytes=1 << 20, job_bytes=1 << 18) as card:
            execute = card.executor.backend.execute

            def watch(kv, job, *arguments):
                self.before = kv.copy(), job.copy()
                self.arguments = [str(it) for it in arguments[:3]]
                execute(kv, job, *arguments)
                self.after = job.copy()

            card.executor.backend.execute = watch
            nearkv.attend(q, k, v, card=card)
        self.out = directory / "out"
        self.files = [str(directory / name) for name in ("kv", "job")]
        for path, data in zip(self.files, self.before, strict=True):
            Path(path).write_bytes(data.tobytes())

    def command(self, program: Path, how: str) -> list[str]:
        shell = '"$0" "$NEARKV_XCLBIN" "$@"'  # the file is named by the environment
        return ["sh", "-c", shell, str(program), *self.files, *self.arguments, str(self.out), how]

    def check(self) -> None:
        np.testing.assert_array_equal(np.fromfile(self.out, np.uint8), self.after)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def _xrt_sim(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nearkv.cli", "xrt-sim", "--config", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.mark.parametrize("how", ["p2p", "normal"])
def test_an_unmodified_program_gets_the_twins_bits(program, work, how):
    done = _xrt_sim("--", *work.command(program, how))
    assert (done.returncode, done.stderr) == (0, "")
    work.check()


def test_a_program_on_the_model(program, work):
    done = _xrt_sim("--card", "model", "--", *work.command(program, "p2p"))
    assert (done.returncode, done.stderr) == (0, "")
    work.check()


@pytest.mark.sim
def test_a_program_on_the_simulated_verilog(program, work):
    done = _xrt_sim("--card", "rtl", "--", *work.command(program, "p2p"))
    assert (done.returncode, done.stderr) == (0, "")
    out, want = np.fromfile(work.out, np.uint8), work.after
    # Only the counters of cycles are different ones: they are those of the hardware.
    summary = int(work.arguments[2])
    rest = np.ones(len(out), bool)
    rest[summary + 16 : summary + 128] = False
    np.testing.assert_array_equal(out[rest], want[rest])
    assert out[summary + 16 : summary + 24].view(np.uint64)[0] > 0  # cycles


@pytest.mark.parametrize("program", ["xrt_host.cpp"], indirect=True)
def test_a_program_that_ends_without_closing_anything_ends_well(program, work):
    done = _xrt_sim("--", *work.command(program, "leave"))
    assert done.returncode == 0
    work.check()


@pytest.mark.parametrize("program", ["xrt_host.c"], indirect=True)
def test_a_thousand_runs_take_no_memory(program, work):
    done = _xrt_sim("--", *work.command(program, "many"))
    assert (done.returncode, done.stderr) == (0, "")
    work.check()
    (more,) = re.findall(r"(-?\d+) KiB more", done.stdout)
    assert int(more) < 1000  # a leak of a KiB a run would be as much


def test_a_killed_program_leaves_the_card_to_the_next(program, work):
    """One that dies in the middle of a run, and one after it on the same cards."""
    dies = (
        "import os, nearkv; card = nearkv.open_card('xrt:0'); card.start_run(1024, 0, 0); "
        "os.kill(os.getpid(), 9)"
    )
    lives = " ".join(f"'{it}'" for it in work.command(program, "p2p"))
    shell = f'{sys.executable} -c "{dies}"; exec {lives}'
    done = _xrt_sim("--fault", "hang@0", "--", "sh", "-c", shell)
    assert done.returncode == 0, done.stderr
    work.check()
    assert "a program left 2 buffers and kernel nearkv:nearkv_1 open" in done.stderr


def test_the_card_of_nearkv_itself_runs_under_xrt_sim():
    code = """
import numpy as np, nearkv
rng = np.random.default_rng(0)
q = rng.standard_normal((2, 64)).astype(np.float16)
k, v = rng.standard_normal((2, 300, 1, 64)).astype(np.float16)
with nearkv.open_card("xrt:1") as card, nearkv.open_card("twin", config="tiny") as twin:
    for ours, theirs in zip(nearkv.attend(q, k, v, card=card), nearkv.attend(q, k, v, card=twin)):
        np.testing.assert_array_equal(ours, theirs)
print("equal")
"""
    done = _xrt_sim("--cards", "2", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal\n", "")


@pytest.mark.parametrize("how", ["", "; run = card.start_run(1024, 0, 0)", "; card.close()"])
def test_a_program_may_end_without_closing_its_card(how):
    code = f"import nearkv; card = nearkv.open_card('xrt:0'){how}"
    done = _xrt_sim("--", sys.executable, "-c", code)
    assert done.returncode == 0
    # Buffers that were given back before the card began with its run are complained about.
    said = [line for line in done.stderr.splitlines() if "run 0: argument" not in line]
    assert said == []


def test_xrt_sim_ends_as_its_program_does():
    assert _xrt_sim("--", "sh", "-c", "exit 7").returncode == 7
    assert _xrt_sim("--", "sh", "-c", "kill -KILL $$").returncode == 128 + 9
    done = _xrt_sim("--", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which program? nearkv xrt-sim [options] -- PROGRAM"),
        (("--", "/no/such/program"), "cannot run /no/such/program: No such file"),
        (("--fault", "fire", "--", "true"), "a fault must be hang, wedge, error, late"),
        (("--fault", "hang:3", "--", "true"), "a fault must be hang, wedge, error, late"),
        (("--config", "huge", "--", "true"), "choose one of tiny, smartssd"),
        (("--cards", "0", "--", "true"), "must be a whole number of at least 1"),
    ],
)
def test_wrong_use_is_one_line(arguments, message):
    done = _xrt_sim(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_libxrt_the_command_says_what_to_install(tmp_path):
    """As on a machine without the headers."""
    code = (
        "from pathlib import Path; import sys; import nearkv_sim.xrt as xrt; from nearkv import cli; "
        f"xrt._INCLUDE = Path({str(tmp_path)!r}); sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "xrt-sim", "--", "true"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert xrt.APT in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cards", [("--cards", "2"), ("--board", "u50")])
def test_bench_decode_compares_an_xrt_card_with_a_plain_twin(tmp_path, cards):
    command = [
        sys.executable, "-m", "nearkv.cli", "bench", "decode", "--card", "xrt:0", "--json",
        "--directory", str(tmp_path), "--context", "512", "--layers", "2", "--rounds", "1",
        "--no-peers", "--model-context", "0", "--kv-heads", "1", "--head-dim", "64", "--group", "2",
    ]  # fmt: skip
    done = _xrt_sim(*cards, "--", *command)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {row["name"] for row in figures["runs"]} >= {"nearkv", "plain twin"}
    record = json.loads((_HERE.parent / "bench/decode_xrt.json").read_text())
    assert set(record) == set(figures)
    assert set(record["device"]) == set(figures["device"])
    for row in figures["runs"]:
        assert row.get("waits_for_drive", 0) <= 1
        assert row.get("card_runs", 0) <= 1


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_answers_through_xrt_as_through_the_twin():
    command = [sys.executable, "-m", "nearkv.cli", "generate", "--max-new-tokens", "6"]
    twin = subprocess.run([*command, "--card", "twin"], capture_output=True, text=True, check=True)
    program = [*command, "--card", "xrt:0"]
    done = subprocess.run(
        [sys.executable, "-m", "nearkv.cli", "xrt-sim", "--", *program],
        capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == twin.stdout
