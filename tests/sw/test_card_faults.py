# SPDX-License-Identifier: Apache-2.0
"""Cards that hang, fail, are late, are closed or belong to somebody else: the same for all kinds."""

import contextlib
import errno
import functools
import itertools
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from nearkv.attention import PageAttention
from nearkv.cards import CardError, Turns, open_card
from nearkv.io import FlashError, PageId, Read, uring
from nearkv.store import KvStore
from nearkv_hw.abi import PageLayout

LAYOUT = PageLayout(32, 32)
LENGTHS = (13, 3, 6)  # pages
SLOTS = 16 * LAYOUT.page_bytes  # kv memory in which layers take several runs


def _fill(store, layers=(0, 1)):
    rng = np.random.default_rng(0)
    for layer in layers:
        for sequence, n_pages in enumerate(LENGTHS):
            k, v = rng.standard_normal((2, 2, n_pages * 32, 32)).astype(np.float16)
            store.append(sequence, layer, k, v)
    return rng.standard_normal((len(LENGTHS), 2, 2, 32))


def _attend(attention, layer, q):
    return attention.attend(layer, range(len(LENGTHS)), q, 0.2, LENGTHS)


def _same(a, b):
    np.testing.assert_array_equal(a.run_max, b.run_max)
    np.testing.assert_array_equal(a.sums.pack(), b.sums.pack())


@pytest.fixture
def stored(tmp_path, card):
    """A store, a query, and what attending to layers 0 and 1 gives."""
    with KvStore(tmp_path / "kv", LAYOUT, 2) as store:
        q = _fill(store)
        attention = PageAttention(card, store, ahead=False)
        whole = [_attend(attention, layer, q) for layer in (0, 1)]
        attention.close()
        yield store, q, whole


class Impatient:
    """Makes one method of a card wait only a moment, until the card is reset."""

    def __init__(self, monkeypatch, card, method):
        real, reset = getattr(card, method), card.reset
        patches = pytest.MonkeyPatch()
        monkeypatch.setattr(card, "reset", lambda: (patches.undo(), reset()))
        patches.setattr(card, method, lambda what, timeout_s=None: real(what, 0.05))


def _in_thread(what):
    """Starts a thread; `join` gives what came of it: a result or an exception."""
    out = []

    def work():
        try:
            out.append(what())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def join():
        thread.join(30)
        assert not thread.is_alive(), "it hangs"
        return out[0]

    return join


# --- a card of foreign memory ------------------------------------------------------------------


@pytest.fixture(params=["uring", "threads"])
def board(request, open_board, stored):
    """A board, its card, and attention on it."""
    if request.param == "uring" and uring.refusal():
        pytest.skip(uring.refusal())
    board, card = open_board(reader=request.param)
    attention = PageAttention(card, stored[0], ring_bytes=SLOTS)
    yield board, card, attention
    attention.close()


def test_a_card_of_foreign_memory_gives_the_same_bits(board, stored):
    board, card, attention = board
    _, q, whole = stored
    for layer in (0, 1, 0, 1):
        _same(_attend(attention, layer, q), whole[layer])
    assert attention.figures.runs > 4 * 4
    assert attention.figures.runs == board.runs
    assert attention.figures.wasted_bytes == 0


@pytest.mark.parametrize("forgotten", ["sync_to_device", "sync_from_device"])
def test_a_forgotten_sync_is_noticed(board, stored, monkeypatch, forgotten):
    board, card, attention = board
    _, q, _ = stored
    monkeypatch.setattr(card._job, forgotten, lambda offset, nbytes: None)
    with pytest.raises(CardError, match="no status was written|different versions|not the build"):
        _attend(attention, 0, q)


def test_kv_memory_of_which_the_card_has_a_copy_is_synced_when_pages_have_arrived(
    board, stored, monkeypatch
):
    board, card, attention = board
    _, q, whole = stored
    copy = board.kv
    board.kv = np.zeros_like(copy)

    def sync(offset, nbytes):
        board.kv[offset : offset + nbytes] = copy[offset : offset + nbytes]

    monkeypatch.setattr(card._kv, "sync_to_device", sync)
    for layer in (0, 1):
        _same(_attend(attention, layer, q), whole[layer])


def test_the_next_run_is_assembled_while_one_is_on_the_card(board, stored, monkeypatch):
    board, card, attention = board
    _, q, whole = stored
    _same(_attend(attention, 0, q), whole[0])
    n_runs = board.runs
    written = [threading.Event() for _ in range(n_runs)]
    coming, write_job = iter(written), card.write_job

    def write(offset, data):
        write_job(offset, data)
        next(coming).set()

    def before(number):  # a run ends when the next one is in job memory
        if number + 1 < 2 * n_runs and not written[number + 1 - n_runs].wait(20):
            raise RuntimeError("the host waits for this run to end before it writes the next")

    monkeypatch.setattr(card, "write_job", write)
    board.before = before
    _same(_attend(attention, 0, q), whole[0])
    assert board.runs == 2 * n_runs
    assert board.resets == 0


def test_job_memory_for_one_run_at_a_time_will_do(open_board, stored, monkeypatch):
    store, q, whole = stored
    board, card = open_board()
    monkeypatch.setattr(card, "job_bytes", 4096)
    attention = PageAttention(card, store, ring_bytes=SLOTS)
    for layer in (0, 1):
        _same(_attend(attention, layer, q), whole[layer])
    assert {run.buffer for run in attention._rings[0].plans[0].runs} == {0}
    monkeypatch.setattr(card, "job_bytes", 8192)
    attention = PageAttention(card, store, ring_bytes=SLOTS)
    _same(_attend(attention, 0, q), whole[0])
    assert {run.buffer for run in attention._rings[0].plans[0].runs} == {0, 4096}


def test_pages_through_the_page_cache_are_refused(board, stored, monkeypatch):
    board, card, attention = board
    store, q, _ = stored
    reads = store.reads
    monkeypatch.setattr(
        store, "reads", lambda *args: [read._replace(direct=False) for read in reads(*args)]
    )
    with pytest.raises(FlashError, match="no O_DIRECT; choose a directory on one that has"):
        _attend(attention, 0, q)


def test_what_an_earlier_run_has_left_is_not_taken_for_an_answer(board, stored):
    board, card, attention = board
    _, q, whole = stored
    for layer in (0, 0):  # both halves of job memory hold good summaries and partials
        _same(_attend(attention, layer, q), whole[layer])
    for number in range(3):
        skipped = board.runs + number
        board.before = lambda at, skipped=skipped: "skip" if at == skipped else None
        with pytest.raises(CardError, match="different versions of nearkv .abi_version is 0x0"):
            _attend(attention, 0, q)
    board.before = lambda number: None
    _same(_attend(attention, 1, q), whole[1])


# --- runs that hang, fail, or come late --------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_run_that_hangs_is_done_again_after_a_reset(board, stored, monkeypatch, caplog, number):
    board, card, attention = board
    _, q, whole = stored
    Impatient(monkeypatch, card, "finish_run")
    released, reset = threading.Event(), board.reset

    def release(timeout_s):  # it comes to its end late, while the card is being reset
        released.set()
        reset(timeout_s)

    board.reset = release
    board.before = lambda at: at != number or released.wait(30)
    _same(_attend(attention, 0, q), whole[0])
    assert (board.resets, board.stops) == (1, 1)
    assert (
        "jobs did not end within 0.05 s: the board does not answer; the card is reset"
        in caplog.text
    )
    _same(_attend(attention, 1, q), whole[1])


def test_memory_of_a_run_that_still_goes_on_is_not_used_for_another(board, stored, monkeypatch):
    board, card, attention = board
    _, q, whole = stored
    released = threading.Event()
    board.before = lambda number: released.wait(30)
    monkeypatch.setattr(card, "timeout_s", 0.2)
    finish_load = card.finish_load
    monkeypatch.setattr(card, "finish_load", lambda load, timeout_s=None: finish_load(load, 30))
    for _ in range(2):
        with pytest.raises(
            CardError, match=r"cannot be reset yet: waited 0\.2 s, and the board still computes"
        ):
            _attend(attention, 0, q)
    assert board.runs == 1
    monkeypatch.undo()
    released.set()
    _same(_attend(attention, 0, q), whole[0])


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_run_that_fails_is_done_again_after_a_reset(board, stored, caplog, number):
    board, card, attention = board
    _, q, whole = stored

    def fail(at):
        if at == number:
            raise RuntimeError("bus error 0x18")

    board.before = fail
    for layer in (0, 1):
        _same(_attend(attention, layer, q), whole[layer])
    assert board.resets == 1
    assert "card 'board': bus error 0x18; the card is reset and the work done again" in caplog.text


def test_a_card_that_cannot_be_reset_says_so_and_may_be_asked_again(board, stored, monkeypatch):
    board, card, attention = board
    _, q, whole = stored

    def fail(*_):
        raise RuntimeError("the device has gone")

    board.before = fail
    monkeypatch.setattr(board, "reset", fail)
    with pytest.raises(CardError, match="'board' cannot be opened again: the device has gone"):
        _attend(attention, 0, q)
    with pytest.raises(CardError, match="'board' is not reset yet"):
        card.start_run(128, 0, 0)
    monkeypatch.undo()
    board.before = lambda number: None
    _same(_attend(attention, 0, q), whole[0])


def test_a_run_that_nobody_has_waited_for_is_waited_for_by_the_next(open_board):
    board, card = open_board()
    released = threading.Event()
    board.before = lambda number: number or released.wait(30)
    first = card.start_run(128, 0, 0)
    second = _in_thread(lambda: card.run(8192, 0, 4096))
    released.set()
    assert second()["n_jobs"] == 0
    assert card.finish_run(first)["n_jobs"] == 0
    assert board.runs == 2


def test_an_interrupted_run_leaves_the_card_usable(stored):
    store, q, whole = stored
    with open_card("model") as card:
        execute, left = card.executor.backend.execute, [KeyboardInterrupt()]

        def interrupted(*args):
            if left:
                raise left.pop()
            execute(*args)

        card.executor.backend.execute = interrupted
        attention = PageAttention(card, store, ring_bytes=SLOTS)
        with pytest.raises(KeyboardInterrupt):
            _attend(attention, 0, q)
        _same(_attend(attention, 0, q), whole[0])
        attention.close()


# --- reads that are late -----------------------------------------------------------------------


def test_a_reset_waits_for_reads_into_memory_that_cannot_be_abandoned(
    board, stored, drive, monkeypatch
):
    board, card, attention = board
    _, q, whole = stored
    arrives, kv, reader, waited = threading.Event(), card._kv, card._reader, []
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    Impatient(monkeypatch, card, "finish_load")
    drained = reader.drained

    def wait(timeout_s):
        waited.append(drained(0))
        arrives.set()
        waited.append(drained(timeout_s))
        return waited[-1]

    reader.drained = wait
    _same(_attend(attention, 0, q), whole[0])
    assert waited == [False, True]
    assert card._kv is kv


def test_a_reset_does_not_wait_for_ever_and_is_tried_again(board, stored, drive, monkeypatch):
    board, card, attention = board
    _, q, whole = stored
    arrives = threading.Event()
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    monkeypatch.setattr(card, "timeout_s", 0.05)
    for _ in range(2):
        with pytest.raises(CardError, match=r"cannot be reset yet: waited 0\.05 s, and reads into"):
            _attend(attention, 0, q)
    arrives.set()
    monkeypatch.setattr(card, "timeout_s", 30)
    _same(_attend(attention, 0, q), whole[0])
    assert board.resets == 0  # the executor had nothing to do with it


def test_memory_of_the_host_is_replaced_and_late_reads_go_to_the_old(
    stored, drive, monkeypatch, reader_kind
):
    store, q, whole = stored
    with open_card("model", reader=reader_kind) as card:
        attention = PageAttention(card, store, ring_bytes=SLOTS)
        arrives = threading.Event()
        drive.fate = lambda name, offset, nbytes: {"until": arrives}
        Impatient(monkeypatch, card, "finish_load")
        kv, reader, reset = card._kv, card._reader, card.reset
        monkeypatch.setattr(
            card, "reset", lambda: (setattr(drive, "fate", lambda *_: None), reset())
        )
        _same(_attend(attention, 0, q), whole[0])
        assert card._kv is not kv
        assert not reader.drained(0)
        arrives.set()
        assert reader.drained(30)
        _same(_attend(attention, 1, q), whole[1])
        attention.close()


# --- readers that fail -------------------------------------------------------------------------


@pytest.fixture
def ring_card(open_board, stored):
    """`ring_card(foreign)`: attention on a card that reads by io_uring."""
    if uring.refusal():
        pytest.skip(uring.refusal())
    opened = contextlib.ExitStack()

    def ring_card(foreign):
        if foreign:
            _, card = open_board(reader="uring")
        else:
            card = opened.enter_context(open_card("model", reader="uring"))
        attention = PageAttention(card, stored[0], ring_bytes=SLOTS)
        opened.callback(attention.close)
        return card, attention

    with opened:
        yield ring_card


@pytest.mark.slow
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("few", [0, 8])  # requests by the thread, and in passing
@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize("point", ["read", "submit"])
def test_when_the_ring_breaks_threads_take_over(
    ring_card, stored, drive, monkeypatch, caplog, point, after, few, foreign
):
    _, q, whole = stored
    monkeypatch.setattr("nearkv.io.reader.UringReader.FEW", few)
    card, attention = ring_card(foreign)
    drive.break_ring(point, after)
    for layer in (0, 1, 0):
        _same(_attend(attention, layer, q), whole[layer])
    assert "io_uring failed: OSError(6, 'No such device or address')" in caplog.text
    assert caplog.text.count("pages are read by threads from now on") == 1
    assert caplog.text.count("the card is reset and the work done again") == 1


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("point", ["wait", "completions"])
def test_a_ring_that_cannot_tell_what_has_arrived_costs_the_host_its_memory(
    ring_card, stored, drive, monkeypatch, point, after
):
    _, q, whole = stored
    monkeypatch.setattr("nearkv.io.reader.UringReader.FEW", 0)
    card, attention = ring_card(False)
    kv = card._kv
    drive.break_ring(point, after)
    for layer in (0, 1, 0, 1):
        _same(_attend(attention, layer, q), whole[layer])
    assert card._kv is not kv or card._reader.failure is None
    card._reader._lost.clear() if hasattr(card._reader, "_lost") else None


def test_a_ring_that_cannot_tell_what_has_arrived_makes_foreign_memory_useless(
    ring_card, stored, drive, monkeypatch
):
    _, q, whole = stored
    monkeypatch.setattr("nearkv.io.reader.UringReader.FEW", 0)
    card, attention = ring_card(True)
    drive.break_ring("completions")
    for _ in range(2):
        with pytest.raises(CardError, match="reads into its kv memory are still on their way"):
            _attend(attention, 0, q)
    reader, fate = card._reader, drive.fate
    reader._lost.remove(reader)  # as if it could be told after all
    monkeypatch.undo()
    drive.fate = fate
    _same(_attend(attention, 0, q), whole[0])


def test_single_errors_of_the_ring_need_no_reset(ring_card, stored, drive, caplog):
    _, q, whole = stored
    card, attention = ring_card(True)
    fates = [{"errno": errno.EINVAL}]
    drive.fate = lambda name, offset, nbytes: fates.pop() if fates else None
    for layer in (0, 1):
        _same(_attend(attention, layer, q), whole[layer])
    assert "io_uring answers Invalid argument for page 0 of layer 0" in caplog.text
    assert "the card is reset" not in caplog.text


def test_io_uring_that_is_demanded_and_not_there_names_the_remedy(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("nearkv.io.reader.Uring", refuse)
    with pytest.raises(
        CardError, match='Operation not permitted.*read by threads: reader="threads"'
    ):
        open_card("model", reader="uring")


# --- closing -----------------------------------------------------------------------------------


def test_closing_a_card_ends_a_load_that_is_waited_for(stored, drive, reader_kind):
    store, q, _ = stored
    arrives = threading.Event()
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    card = open_card("model", reader=reader_kind)
    attention = PageAttention(card, store)
    waiting, finish_load = threading.Event(), card.finish_load
    card.finish_load = lambda *args: waiting.set() or finish_load(*args)
    got = _in_thread(lambda: _attend(attention, 0, q))
    assert waiting.wait(30)
    card.close()
    error = got()
    assert isinstance(error, CardError)
    assert "card 'model' was closed during a load; open it again" in str(error)
    with pytest.raises(CardError, match="is closed"):
        _attend(attention, 0, q)
    arrives.set()
    attention.close()


def test_a_closed_card_says_when_its_foreign_memory_is_still_written_to(board, drive, tmp_path):
    board, card, _ = board
    path = tmp_path / "pages"
    path.write_bytes(bytes(8192))
    asked, arrives = threading.Event(), threading.Event()
    drive.fate = lambda name, offset, nbytes: asked.set() or {"until": arrives}
    fd = os.open(path, os.O_RDONLY)
    load = card.start_load([Read(fd, path, 0, 8192, 0, PageId(0, 0, 0, 0), 4096)])
    assert asked.wait(30)
    card.timeout_s = 0.05
    with pytest.raises(CardError, match="is closed, but waited 0.05 s for reads that are on their"):
        card.close()
    with pytest.raises(CardError, match="closed during a load"):
        card.finish_load(load)
    card.timeout_s = 30
    arrives.set()
    card.close()
    os.close(fd)


def test_closing_a_card_ends_a_run_that_is_waited_for(board, stored):
    board, card, attention = board
    _, q, _ = stored
    begun, released = threading.Event(), threading.Event()
    board.before = lambda number: begun.set() or released.wait(30)
    got = _in_thread(lambda: _attend(attention, 0, q))
    assert begun.wait(30)
    card.timeout_s = 0.05
    with pytest.raises(CardError, match="closed, but waited 0.05 s for the run that is under way"):
        card.close()
    assert board.stops == 1
    assert not board.closed
    card.timeout_s = 30
    released.set()
    error = got()
    assert isinstance(error, CardError)
    assert re.search("was closed during|is closed", str(error))
    card.close()
    assert board.closed


class Endless:
    """A backend whose runs end when it is closed; or not even then, until they are released."""

    def __init__(self, config, obeys):
        self.config, self.obeys = config, obeys
        self.begun, self.released, self.ended = (threading.Event() for _ in range(3))

    def execute(self, *arguments):
        self.begun.set()
        assert self.released.wait(30)
        self.ended.set()
        raise RuntimeError("closed during a run")

    def close(self):
        if self.obeys:
            self.released.set()
        if not self.ended.wait(0.05):
            raise TimeoutError("it does not stop")


def test_a_program_that_runs_is_ended_by_closing_its_card(stored):
    store, q, _ = stored
    card = open_card("model")
    card.executor.backend = endless = Endless(card.executor.backend.config, obeys=True)
    attention = PageAttention(card, store)
    got = _in_thread(lambda: _attend(attention, 0, q))
    assert endless.begun.wait(30)
    card.close()
    assert endless.ended.is_set()
    error = got()
    assert isinstance(error, CardError)
    assert "card 'model' was closed during a run of 6 jobs; open it again" in str(error)


def test_a_program_that_does_not_end_is_not_waited_for_for_ever(stored):
    store, q, _ = stored
    card = open_card("model")
    card.executor.backend = endless = Endless(card.executor.backend.config, obeys=False)
    attention = PageAttention(card, store)
    got = _in_thread(lambda: _attend(attention, 0, q))
    assert endless.begun.wait(30)
    card.timeout_s = 0.05
    with pytest.raises(CardError, match="closed, but waited 0.05 s for the run that is under way"):
        card.close()
    endless.released.set()
    assert "was closed during a run of 6 jobs" in str(got())
    card.close()


def test_a_signal_handler_may_close_the_card_that_runs(stored):
    store, q, _ = stored
    card = open_card("model")
    execute = card.executor.backend.execute

    def interrupted(*arguments):
        card.close()  # in the same thread
        execute(*arguments)

    card.executor.backend.execute = interrupted
    attention = PageAttention(card, store)
    with pytest.raises(CardError, match="was closed during a run of 6 jobs"):
        _attend(attention, 0, q)


def test_a_run_that_ended_well_is_of_no_use_when_the_card_is_closed(board):
    board, card, _ = board
    run = card.start_run(128, 0, 0)
    run._run.wait(30)
    card.close()
    with pytest.raises(CardError, match="was closed during a run of 0 jobs"):
        card.finish_run(run)


@pytest.mark.parametrize("name", ["model", "twin"])
def test_cards_may_be_closed_at_any_moment(stored, name):
    store, q, whole = stored
    for _ in range(5):
        card = open_card(name)
        attention = PageAttention(card, store, ring_bytes=SLOTS)
        attended = threading.Event()

        def attend(attention=attention, attended=attended):
            for layer in itertools.cycle((0, 1)):
                _same(_attend(attention, layer, q), whole[layer])
                attended.set()

        got = _in_thread(attend)
        assert attended.wait(30)
        card.close()
        assert isinstance(got(), CardError)
        attention.close()


# --- several threads ---------------------------------------------------------------------------


def test_threads_take_turns_with_an_attention(stored, card):
    store, q, whole = stored
    attention = PageAttention(card, store, ring_bytes=SLOTS)
    start = threading.Barrier(3)

    def attend(which):
        start.wait(30)
        for layer in (0, 1) * 3:
            _same(_attend(attention, layer, q), whole[layer])
            n_pages = [LENGTHS[which]]
            some = attention.attend(layer, [which], q[[which]], 0.2, n_pages)
            _same(some, whole[layer][[which]])
        return "done"

    joins = [_in_thread(functools.partial(attend, which)) for which in range(3)]
    assert [join() for join in joins] == ["done"] * 3
    attention.close()


@pytest.mark.parametrize("other", ["the same attention", "another store"])
def test_nobody_waits_for_a_turn_for_ever(open_board, stored, tmp_path, monkeypatch, other):
    store, q, whole = stored
    board, card = open_board()
    attention = PageAttention(card, store)
    begun, released = threading.Event(), threading.Event()
    board.before = lambda number: begun.set() or released.wait(30)
    finish_run = card.finish_run
    monkeypatch.setattr(card, "finish_run", lambda run, timeout_s=None: finish_run(run, 30))
    first = _in_thread(lambda: _attend(attention, 0, q))
    assert begun.wait(30)
    monkeypatch.setattr(card, "timeout_s", 0.05)
    if other == "another store":
        second = KvStore(tmp_path / "other", LAYOUT, 2)
        _fill(second)
        late, what = PageAttention(card, second), "a turn with card 'board'"
    else:
        late, what = attention, "a turn to attend to these pages"
    with pytest.raises(CardError, match=rf"waited 0\.05 s for {what}.*where nothing moves"):
        _attend(late, 0, q)
    monkeypatch.setattr(card, "timeout_s", 30)
    released.set()
    _same(first(), whole[0])
    _same(_attend(late, 0, q), whole[0])
    if other == "another store":
        late.close()
        second.close()
    attention.close()


def test_one_waits_as_long_as_somebody_makes_progress():
    progress = itertools.count()
    turns = Turns("a turn", lambda: next(progress), lambda: 0.01)
    with turns:
        waiting = _in_thread(lambda: turns.__enter__() or "mine")
        while next(progress) < 20:  # it has asked many times
            threading.Event().wait(0.01)
        with turns:  # a finalizer may run in the thread whose turn it is
            pass
    assert waiting() == "mine"


# --- what the caller states --------------------------------------------------------------------


def test_the_attended_page_count_is_checked(stored, card):
    store, q, whole = stored
    attention = PageAttention(card, store)
    with pytest.raises(FlashError, match="4 pages of layer 1, sequence 1 are asked for.*has 3"):
        attention.attend(1, [0, 1], q[:2], 0.2, [13, 4])
    with pytest.raises(FlashError, match="1 pages of layer 1, sequence 7 are asked for.*has 0"):
        attention.attend(1, [7], q[:1], 0.2, [1])
    with pytest.raises(ValueError, match="3 sequences"):
        attention.attend(1, range(3), q, 0.2, [13, 3])
    with pytest.raises(ValueError, match="3 kv heads of 32 channels, and the store 2 of 32"):
        attention.attend(1, [0], np.zeros((1, 3, 2, 32)), 0.2, [13])
    with pytest.raises(TypeError, match="n_pages"):
        attention.attend(1, [0], q[:1], 0.2)
    some = attention.attend(1, [0, 1], q[:2], 0.2, [0, 3])
    assert not some[0].normalise()[0].any()
    _same(some[[1]], whole[1][[1]])
    attention.close()


# --- forks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "twin"])
def test_a_forked_process_has_no_card_and_its_end_disturbs_nothing(tmp_path, name, reader_kind):
    code = """if True:
        import os, sys, gc, threading
        import numpy as np
        from nearkv.attention import PageAttention
        from nearkv.cards import CardError, open_card
        from nearkv.store import KvStore
        from nearkv_hw.abi import PageLayout
        card = open_card(sys.argv[2], reader=sys.argv[3])
        store = KvStore(sys.argv[1], PageLayout(64, 32), 1, temporary=True)
        for layer in (0, 1):
            store.append(0, layer, *np.ones((2, 1, 320, 64), np.float16))
        attention = PageAttention(card, store)
        q = np.ones((1, 1, 1, 64))
        attend = lambda layer: attention.attend(layer, [0], q, 1.0, [10]).normalise()[0]
        before = [attend(layer) for layer in (0, 1, 0, 1)]
        # Locks that another thread has are held for ever in a forked process.
        held, forked = threading.Event(), threading.Event()
        def hold():
            with attention._turns, card.tenancy.turn(attention._rings[0]), card._lock:
                with card._reader._change:
                    held.set()
                    assert forked.wait(30)
        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(30)
        child = os.fork()
        if not child:
            for use in (lambda: attend(0), lambda: card.start_load([]), lambda: card.start_run(128, 0, 0),
                        lambda: card.read_job(0, 1), card.reset):
                try:
                    use()
                except CardError as error:
                    assert "forked from it; open" in str(error), error
                else:
                    raise AssertionError("the card of another process was used")
            attention.discard()
            attention.close()
            card.close()
            del attention, card, attend
            gc.collect()
            sys.exit(7)
        forked.set()
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        for layer in (0, 1, 0):
            np.testing.assert_array_equal(attend(layer), before[layer])
        attention.close()
        card.close()
        store.close()
        print("undisturbed")
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), name, reader_kind],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout == "undisturbed\n", done.stderr
