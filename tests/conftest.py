# SPDX-License-Identifier: Apache-2.0
"""Options and reports of the test runs."""

from pathlib import Path
import pickle

from hypothesis import HealthCheck, settings
import pytest

from nearkv_sim.coverage import Coverage

_ALLOWED_SKIPS = Path(__file__).parent / "data" / "allowed_skips.txt"

# The same examples in every run, however long they take: no test depends on luck or on the load.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help=f"fail when a test is skipped for a reason that {_ALLOWED_SKIPS.name} does not list",
    )
    parser.addoption(
        "--allow-skips",
        action="append",
        default=[],
        metavar="TEXT",
        help="allow skips whose reason has this text, beside those",
    )


class _StrictSkips:
    """Fails the run on a skip nobody expected: a test that never runs proves nothing."""

    def __init__(self, allowed: list[str]):
        self.allowed = allowed
        self.unexpected: list[str] = []

    def pytest_runtest_logreport(self, report):
        self._look(report)

    def pytest_collectreport(self, report):
        self._look(report)

    def _look(self, report):
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(text in reason for text in self.allowed):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.unexpected:
            terminalreporter.section("unexpected skips", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)


def pytest_configure(config):
    config.coverage = Coverage()  # of the simulated kernel, see tests/sim
    if config.getoption("--strict-skips"):
        lines = _ALLOWED_SKIPS.read_text().splitlines()
        allowed = [line for line in lines if line and not line.startswith("#")]
        allowed += config.getoption("--allow-skips")
        config.pluginmanager.register(_StrictSkips(allowed))


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what it has counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["coverage"] = pickle.dumps(session.config.coverage)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error is None:
        node.config.coverage += pickle.loads(node.workeroutput["coverage"])


def pytest_terminal_summary(terminalreporter, config):
    # Of a part of the simulations, the holes would say nothing.
    if config.coverage.n_jobs and config.option.markexpr == "sim":
        terminalreporter.section("functional coverage of the simulated kernel")
        for line in config.coverage.report():
            terminalreporter.line(line)
