# SPDX-License-Identifier: Apache-2.0
"""The self-test: what passes on a good card, and what it finds on bad ones."""

import json

import numpy as np
import pytest

from nearkv import cli, selftest
from nearkv.cards import Card, CardError, Simulated, open_card, opening
from nearkv.io import JobMemory, KvMemory
from nearkv_hw import abi
from nearkv_hw.abi import Status
from nearkv_hw.config import preset
from nearkv_sim.model import ModelCard

_KV_BYTES, _JOB_BYTES = 24 << 20, 4 << 20
TINY = preset("tiny")


class Backend(ModelCard):
    """The model, of which subclasses do something wrong."""

    def __init__(self):
        super().__init__(TINY)

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s=None):
        super().execute(kv, job, queue, n_jobs, summary, timeout_s)
        for i in range(n_jobs):
            record = abi.JOB.unpack(job[queue + i * abi.JOB.bytes :])
            self.spoil(job[record["partial"] :], record, i)
        self.spoil_summary(job[summary:])

    def spoil(self, partial, record, i):
        pass

    def spoil_summary(self, summary):
        pass


def _status(partial) -> int:
    return int(partial[:4].view("<u4")[0])


def _set_status(partial, status) -> None:
    partial[:4] = np.frombuffer(int(status).to_bytes(4, "little"), np.uint8)


class OneBitOff(Backend):
    """Of one sum, with one shape."""

    def spoil(self, partial, record, i):
        if (
            record["head_dim"] == 64
            and record["group_size"] == 2
            and _status(partial) == Status.DONE
        ):
            partial[abi.PARTIAL_HEADER.bytes] ^= 1


class NoCrc(Backend):
    def spoil(self, partial, record, i):
        _set_status(partial, _status(partial) & ~(Status.BAD_CRC_K | Status.BAD_CRC_V))


class AllLegal(Backend):
    def spoil(self, partial, record, i):
        _set_status(partial, _status(partial) & ~Status.ILLEGAL_JOB)


class NoBusError(Backend):
    def spoil(self, partial, record, i):
        _set_status(partial, _status(partial) & ~Status.BUS_ERROR)


class WritesBeside(Backend):
    """A byte of what belongs to nothing."""

    def spoil(self, partial, record, i):
        if _status(partial) == Status.DONE and record["page_tokens"] == 96:
            partial[abi.partial_bytes(record["head_dim"], record["group_size"])] ^= 0xFF


class WrongBeats(Backend):
    def spoil_summary(self, summary):
        summary[abi.SUMMARY["kv_beats"].offset] ^= 1


class CountsCycles(Backend):
    """And contradicts itself."""

    def spoil_summary(self, summary):
        for name in ("cycles", "stream_cycles"):
            at = abi.SUMMARY[name].offset
            summary[at : at + 8] = np.frombuffer((10**9).to_bytes(8, "little"), np.uint8)


class StuckBit(Backend):
    """Of kv memory, somewhere in its middle."""

    def execute(self, kv, job, *arguments):
        kv = kv.copy()
        kv[12345678] |= 8
        super().execute(kv, job, *arguments)


class BreaksDown(Backend):
    def execute(self, *arguments):
        raise RuntimeError("the board has caught fire")


class Surprises(Backend):
    def spoil(self, partial, record, i):
        if _status(partial) & Status.NON_FINITE:
            raise KeyError("no such\nthing")


def _opener(backend, memory=JobMemory, fails=None):
    def opener(name, unit, **options):
        if fails:
            raise fails
        return Card(name, KvMemory(_KV_BYTES), memory(_JOB_BYTES), Simulated(backend), timeout_s=30)

    return opener


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the self-test on a card: exit status, output, checks by name, the whole report."""

    def run(backend=Backend, **options):
        monkeypatch.setitem(opening._FAMILIES, "odd", _opener(backend, **options))
        path = tmp_path / "report.json"
        arguments = ["--card", "odd", "--kv-dir", str(tmp_path), "--report", str(path)]
        status = cli.main(["selftest", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        report = json.loads(path.read_text())
        return status, out, {it["name"]: it for it in report["checks"]}, report

    return run


@pytest.mark.slow
def test_a_card_that_does_as_the_model_passes(run):
    status, out, checks, report = run()
    assert status == 0, out
    assert report["passed"]
    assert {it["result"] for it in checks.values()} <= {"pass", "below", "skipped"}
    assert checks["cycles"]["result"] == "skipped"
    for name in (
        "every shape, fp16",
        "every shape, bf16",
        "CRC-32C",
        "illegal jobs",
        "pages out of reach",
    ):
        assert checks[name]["result"] == "pass"
        assert checks[name]["measured"] == checks[name]["target"] != ""
    assert [it["config_hash"] for it in report["card"]["engines"]] == [TINY.hash32]
    assert report["doctor"]["findings"]
    assert "PASSED" in out
    for check in checks.values():
        assert check["name"] in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "failed", "text"),
    [
        (OneBitOff, "every shape, bf16", "head_dim 64, group_size 2, "),
        (NoCrc, "CRC-32C", "status is 1 instead of"),
        (AllLegal, "illegal jobs", "status is 1 instead of 9"),
        (NoBusError, "pages out of reach", "job 0 of 4"),
        (WritesBeside, "every shape, fp16", "bytes of job memory that belong to nothing were changed"),
        (WrongBeats, "beats counted", "summary differs in kv_beats"),
        (CountsCycles, "cycles", "contradict each other"),
        (StuckBit, "kv memory", "differs from the model: status is"),
    ],
)  # fmt: skip
def test_a_defect_is_found_and_named(run, backend, failed, text):
    status, out, checks, report = run(backend)
    assert status == 1
    assert not report["passed"]
    assert checks[failed]["result"] == "FAIL"
    assert text in checks[failed]["note"]
    assert "FAILED" in out
    assert checks["job memory"]["result"] == checks["close"]["result"] == "pass"


@pytest.mark.slow
def test_the_native_card_passes(capsys):
    _passes(capsys, "twin")


@pytest.mark.sim
@pytest.mark.smoke
def test_the_simulated_gateware_passes_and_takes_the_cycles_that_were_predicted(capsys):
    try:
        open_card("rtl", config="tiny").close()
    except CardError as error:
        pytest.skip(str(error))
    checks = _passes(capsys, "rtl")
    assert checks["cycles"]["result"] == "pass"


def _passes(capsys, card: str) -> dict:
    status = cli.main(
        ["selftest", "--card", card, "--card-config", "tiny", "--kv-mib", "24", "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report["checks"]
    return {it["name"]: it for it in report["checks"]}


def test_what_card_and_model_agree_on_must_be_the_target_too(run, monkeypatch):
    """A defect that both have."""
    found = selftest._Found("23 of 24", "24 of 24")
    monkeypatch.setattr(selftest.Selftest, "_all", lambda self: [("CRC-32C", lambda: found)])
    status, _, checks, _ = run()
    assert status == 1
    assert checks["CRC-32C"]["result"] == "FAIL"
    assert checks["CRC-32C"]["measured"] == "23 of 24"


def test_a_goal_for_speed_that_is_missed_is_no_failure(run, monkeypatch):
    found = selftest._Found("1 GB/s", "3 GB/s", reached=False)
    monkeypatch.setattr(selftest.Selftest, "_all", lambda self: [("card", lambda: found)])
    status, out, checks, _ = run()
    assert status == 0
    assert checks["card"]["result"] == "below"
    assert "1 below" in out


@pytest.mark.slow
def test_a_forgotten_copy_of_job_memory_shows(run):
    class Forgets(JobMemory):
        """Another memory than the host's, to which nothing is ever copied."""

        def sync_from_device(self, offset, nbytes):
            self.bytes[offset : offset + nbytes] = 0

    status, _, checks, _ = run(memory=Forgets)
    assert status == 1
    assert checks["job memory"]["result"] == "FAIL"
    assert "bytes of 4194304 differ" in checks["job memory"]["note"]


@pytest.mark.slow
def test_a_card_that_breaks_down_is_reset_and_fails_row_by_row(run):
    status, _, checks, _ = run(BreaksDown)
    assert status == 1
    assert checks["job memory"]["result"] == "pass"
    for name in ("kv memory", "every shape, fp16", "attend", "card"):
        assert checks[name]["result"] == "FAIL"
        assert "the board has caught fire" in checks[name]["note"]
        assert "--report" in checks[name]["note"]
    assert checks["the drive"]["result"] in ("pass", "skipped")  # which needs no run


def test_a_card_that_cannot_be_reset_is_left_alone(run):
    class Hopeless(BreaksDown):
        made = 0

        def __init__(self):
            type(self).made += 1
            if self.made > 1:
                raise RuntimeError("not again")
            super().__init__()

    status, _, checks, _ = run(Hopeless)
    assert status == 1
    assert checks["kv memory"]["result"] == "FAIL"
    assert checks["attend"]["result"] == "skipped"
    assert "could not be reset" in checks["attend"]["note"]
    assert "not again" in checks["attend"]["note"]


def test_a_card_that_hangs_is_not_waited_for_again_and_again(run):
    class Hangs(Backend):
        def execute(self, *arguments):
            raise TimeoutError("it does not answer")

    status, _, checks, _ = run(Hangs)
    assert status == 1
    results = [it["result"] for it in checks.values()]
    assert results == ["pass", "pass", "FAIL", "FAIL", *["skipped"] * (len(results) - 5), "pass"]
    assert "it does not answer" in checks["kv memory"]["note"]
    assert "in time 2 times" in checks["attend"]["note"]


@pytest.mark.slow
def test_an_unexpected_error_is_a_row_with_its_text(run):
    status, out, checks, _ = run(Surprises)
    assert status == 1
    assert checks["Inf and NaN"]["result"] == "FAIL"
    assert checks["Inf and NaN"]["note"].startswith("KeyError: 'no such")
    assert checks["CRC-32C"]["result"] == "pass"
    assert "attach" in out


@pytest.mark.parametrize(
    "error", [CardError("no XRT here; install it"), OSError(5, "Input/output error"), KeyError("x")]
)
def test_a_card_that_cannot_be_opened_is_reported_with_what_the_doctor_says(run, error):
    status, out, checks, report = run(fails=error)
    assert status == 1
    assert list(checks) == ["open"]
    assert str(error.args[-1]) in checks["open"]["note"]
    assert report["doctor"]["findings"]
    assert "FAILED: 1 FAIL" in out


def test_a_doctor_that_fails_does_not_hide_the_checks(run, monkeypatch):
    monkeypatch.setattr(selftest.doctor, "examine", lambda **options: 1 // 0)
    status, _, checks, report = run(fails=CardError("none"))
    assert status == 1
    assert report["doctor"] == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert checks["open"]["result"] == "FAIL"


def test_what_was_found_until_ctrl_c_is_kept(monkeypatch, tmp_path, capsys):
    class Interrupted(Backend):
        def execute(self, *arguments):
            raise KeyboardInterrupt

    monkeypatch.setitem(opening._FAMILIES, "odd", _opener(Interrupted))
    path = tmp_path / "report.json"
    status = cli.main(["selftest", "--card", "odd", "--report", str(path), "--json"])
    assert status == 130
    found = json.loads(path.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert [it["name"] for it in found["checks"]] == ["open", "job memory", "close"]
    assert not found["passed"]


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_tested(capsys, tmp_path):
    for path in (tmp_path / "missing" / "report.json", tmp_path):
        assert cli.main(["selftest", "--card", "model", "--report", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("nearkv: error: --report ")
        assert err.count("\n") == 1


def test_a_directory_for_pages_that_cannot_be_written_to_is_refused_too(capsys):
    assert cli.main(["selftest", "--card", "model", "--kv-dir", "/proc"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pages cannot be written to /proc (" in err
    assert "--kv-dir DIRECTORY" in err
    assert err.count("\n") == 1


def test_more_memory_than_there_is_has_a_message_of_its_own(capsys):
    assert cli.main(["selftest", "--card", "twin", "--kv-mib", str(1 << 30)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "bytes of kv memory and" in text
    assert "choose a smaller kv_bytes" in text


def test_measured_and_target_stand_in_columns_of_their_own():
    checks = [
        selftest.Check("cycles", "pass", "44,100", "44,000 +5%", seconds=1),
        selftest.Check("the drive", "pass", "2.1 GB/s"),
        selftest.Check("card", "below", "", "3 GB/s", note="a note of several words " * 8),
    ]
    head = selftest._head("odd").splitlines()[-1]
    for check in checks:
        line, *notes = selftest.to_text(check, 80, colour=False).splitlines()
        assert line[head.index("measured") : head.index("*target*")].strip() == check.measured
        assert line[head.index("*target*") : head.index("time") - 4].strip() == check.target
        assert max(map(len, [line, *notes])) <= 80
        assert "\x1b" not in line
    assert "\x1b[33mbelow\x1b[0m" in selftest.to_text(checks[2], 80, colour=True)
