# SPDX-License-Identifier: Apache-2.0
"""A card may be closed, collected, forked or used by two threads at any time: errors, no crash.

Everything that a fault would turn into a crash or a hang runs in a process of its own.
"""

import re
import subprocess
import sys
import threading

import pytest

from nearkv_sim.lifetime import ClosedError, Lifetime

# A card, and a run that takes minutes. `written` waits until the run has answered a job.
PREAMBLE = """
import os, signal, threading, time
import numpy as np
from nearkv_hw.config import preset
from nearkv_sim import workload
from nearkv_sim.lifetime import ClosedError

config = preset("tiny")
rng = np.random.default_rng(0)
memories = workload.place(
    [workload.random_job(rng, config, n_tokens=8000, head_dim=64, group_size=2)], rng
)
quick, memories = memories, memories.repeated(30_000)
job = memories.job.copy()
partial = memories.record(0)["partial"]

def execute():
    card.execute(memories.kv, job, memories.queue, memories.n_jobs, memories.summary)

def start(daemon=False):
    raised = []
    def run():
        try:
            execute()
        except Exception as error:
            raised.append(error)
    thread = threading.Thread(target=run, daemon=daemon)
    job[partial : partial + 4] = 0
    thread.start()
    return thread, raised

def written():
    deadline = time.monotonic() + 600
    while not job[partial]:
        assert time.monotonic() < deadline, "no job was answered"
        time.sleep(0.001)

def refused(error, call):
    try:
        call()
    except error as got:
        print("refused:", got)
    else:
        raise SystemExit(f"{call} was not refused")
"""
CARDS = {
    "twin": "from nearkv_sim.twin import TwinCard as Card\n"
    "options = {'threads': 2, 'path': 'portable'}",
    "model": "from nearkv_sim.model import ModelCard as Card; options = {}",
    "rtl": "from nearkv_sim.rtl import RtlCard as Card; options = {}",
}


@pytest.fixture(params=["twin", "model", pytest.param("rtl", marks=pytest.mark.sim)])
def process(request):
    """Runs statements with a `card` in a fresh interpreter; what it printed."""
    if request.param == "rtl":
        request.getfixturevalue("tools")

    def run(statements: str) -> str:
        code = f"{PREAMBLE}\n{CARDS[request.param]}\ncard = Card(config, **options)\n{statements}"
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code],
            capture_output=True, text=True, timeout=1200,  # only a hang takes as long
        )  # fmt: skip
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_closing_a_card_stops_the_run_in_another_thread(process):
    """When `close` returns, nothing touches the card's memories any more."""
    out = process("""
for _ in range(10):
    card = Card(config, **options)
    thread, raised = start()
    written()
    card.close()
    then = job.copy()
    thread.join(600)
    assert not thread.is_alive()
    assert type(raised[0]) is ClosedError, raised
    np.testing.assert_array_equal(job, then)
    card.close()
    refused(ValueError, execute)
print(raised[0])
""")
    assert "refused: the card is closed; open another" in out
    assert "the card was closed while it ran" in out


def test_a_signal_handler_may_close_the_card_that_it_interrupts(process):
    process("""
signal.signal(signal.SIGUSR1, lambda *_: card.close())
def interrupt():
    written()
    os.kill(os.getpid(), signal.SIGUSR1)
job[partial : partial + 4] = 0
helper = threading.Thread(target=interrupt)
helper.start()
refused(ClosedError, execute)
helper.join()
refused(ValueError, execute)
""")


def test_a_second_thread_is_refused_and_the_first_goes_on(process):
    out = process("""
thread, raised = start()
written()
refused(RuntimeError, execute)
assert thread.is_alive() and not raised
card.close()
thread.join(600)
assert type(raised[0]) is ClosedError, raised
""")
    assert "one run at a time" in out


def test_a_process_may_end_during_a_run(process):
    process("""
start(daemon=True)
written()
card = None
""")


def test_a_forked_process_is_told_to_open_its_own_card(process):
    out = process("""
want = quick.execute(card)
child = os.fork()
if not child:
    status = 1
    try:
        refused(RuntimeError, execute)
        card.close()
        del card
        status = 0
    finally:
        os.write(1, b"child ended\\n")
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
np.testing.assert_array_equal(quick.untimed(quick.execute(card)), quick.untimed(want))
card.close()
""")
    assert "child ended" in out


def test_what_is_never_closed_is_freed_once():
    freed = []
    lifetime = Lifetime(free=lambda: freed.append(1))
    lifetime.abandon()
    lifetime.abandon()
    lifetime.close()
    assert freed == [1]


def test_a_run_that_does_not_stop_is_named_and_frees_the_card_itself():
    freed, asked, done, began = [], [], threading.Event(), threading.Event()
    lifetime = Lifetime(free=lambda: freed.append(1), stop=lambda: asked.append(1))

    def run():
        with lifetime, lifetime:
            began.set()
            done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait()
    with pytest.raises(TimeoutError, match=re.escape("has not stopped within 0.01 s")):
        lifetime.close(timeout_s=0.01)
    assert asked
    assert not freed
    with pytest.raises(ClosedError):
        lifetime.check()
    done.set()
    thread.join()
    assert freed == [1]
    with pytest.raises(ValueError, match="closed"), lifetime:
        pass
