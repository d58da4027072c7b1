# SPDX-License-Identifier: Apache-2.0
"""Delayed writeback: nothing is lost, nothing is read before it is written, errors have a name."""

import contextlib
import errno
import os
import signal
import threading

import numpy as np
import pytest

from nearkv.io import FlashError, PageId
from nearkv.store import KvStore
from nearkv.store.behind import WriteBehind
from nearkv.store.journal import Journal
from nearkv.store.writer import PageWriter
from nearkv_hw import pages
from nearkv_hw.abi import PageLayout

LAYOUT = PageLayout(64, 32)


def _kv(n_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, n_tokens, 64)).astype(np.float16) for _ in "kv"]


def _keys(store, layer, sequence, head):
    data = store.read_pages(PageId(layer, sequence, head, 0), store.n_pages(sequence, layer))
    return pages.unpack(store.layout, data)[0].view(np.float16)


@pytest.fixture
def held(monkeypatch):
    """Lets writes through only when told."""
    gate, real = threading.Event(), os.pwrite

    def pwrite(*arguments):
        assert gate.wait(20)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return gate


def _delayed(path, **options):
    return KvStore(path, LAYOUT, 2, **{"delayed_bytes": 1 << 20} | options)


def test_append_returns_before_the_drive_has_written_and_readers_wait(tmp_path, held):
    held.set()
    with _delayed(tmp_path) as store:
        held.clear()
        k, v = _kv(64)
        store.append(0, 3, k, v)
        k[:] = 0  # the store has its own
        assert store.n_pages(0, 3) == 2
        assert not store.settled(0, 3)
        assert store.settled(0, 2)
        threading.Timer(0.2, held.set).start()
        np.testing.assert_array_equal(_keys(store, 3, 0, 1), _kv(64)[0][1])
        assert store.settled(0, 3)


def test_spills_are_written_together(tmp_path, monkeypatch):
    windows = []
    write = PageWriter._write_window
    monkeypatch.setattr(
        PageWriter,
        "_write_window",
        lambda self, writes: (windows.append(len(writes)), write(self, writes)),
    )
    monkeypatch.setattr("nearkv.store.behind.GATHER_S", 5)
    with _delayed(tmp_path) as store:
        for layer in range(6):
            store.append(0, layer, *_kv(32, layer))
        store.flush()
        for layer in range(6):
            np.testing.assert_array_equal(_keys(store, layer, 0, 0), _kv(32, layer)[0][0])
    assert windows == [12]


def test_more_than_may_wait_is_waited_for(tmp_path):
    with _delayed(tmp_path, delayed_bytes=4 * LAYOUT.page_bytes) as store:
        for n in range(40):
            store.append(n % 3, n % 2, *_kv(32, n))
            assert store._behind.waiting_bytes <= 4 * LAYOUT.page_bytes
        got = _keys(store, 1, 0, 1)
        np.testing.assert_array_equal(got[:32], _kv(32, 3)[0][1])


@pytest.fixture
def failing(monkeypatch):
    """{sequence: errno}: writing its pages fails."""
    failing, real = {}, PageWriter.write

    def write(writer, spills):
        for spill in spills:
            if spill.sequence in failing:
                page = PageId(spill.layer, spill.sequence, 0, spill.position)
                raise FlashError(
                    "cannot write KV pages", page=page, errno=failing[spill.sequence],
                    filename="pages",
                )  # fmt: skip
        return real(writer, spills)

    monkeypatch.setattr(PageWriter, "write", write)
    return failing


def test_a_write_that_fails_is_raised_by_the_next_call_and_tried_again(tmp_path, failing):
    with _delayed(tmp_path) as store:
        for sequence in range(3):
            store.append(sequence, 5, *_kv(32, sequence))
        store.flush()
        failing[1] = errno.EIO
        for sequence in range(3):
            store.append(sequence, 5, *_kv(32, 10 + sequence))
        match = (
            "cannot write KV pages .page 1 of layer 5, sequence 1, kv head 0, file .*Input/output"
        )
        with pytest.raises(FlashError, match=match) as caught:
            store.stored(1, 5)
        assert caught.value.errno == errno.EIO
        for sequence in (0, 2):  # the others were in the same window
            expected = np.concatenate([_kv(32, sequence)[0][1], _kv(32, 10 + sequence)[0][1]])
            np.testing.assert_array_equal(_keys(store, 5, sequence, 1), expected)
        with pytest.raises(FlashError, match=match):
            store.settle(1, 5)  # tried again, and failed again
        del failing[1]
        with contextlib.suppress(FlashError):
            store.append(1, 5, *_kv(32, 20))  # says what the last try came to
        np.testing.assert_array_equal(
            _keys(store, 5, 1, 0)[:64], np.concatenate([_kv(32, 1)[0][0], _kv(32, 11)[0][0]])
        )
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert [store.n_pages(sequence, 5) >= 2 for sequence in range(3)] == [True] * 3


def test_a_failed_write_leaves_the_budget_and_hurts_only_its_own_sequence(tmp_path, failing):
    """The failed spill once kept the queue's budget, and `append` of another waited for ever."""
    nbytes = 2 * LAYOUT.page_bytes
    with _delayed(tmp_path, delayed_bytes=nbytes, timeout_s=20) as store:
        failing[0] = errno.ENOSPC
        store.append(0, 0, *_kv(32))
        for n in range(10):
            store.append(1, 0, *_kv(32, n))
        np.testing.assert_array_equal(_keys(store, 0, 1, 0)[-32:], _kv(32, 9)[0][0])
        with pytest.raises(FlashError, match="sequence 0.*No space left"):
            store.flush()
        assert store.drop(0) == 0
        store.flush()
        assert store._behind.waiting_bytes == 0


def test_a_drive_that_hangs_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    gate, real = threading.Event(), os.pwrite

    def pwrite(*arguments):
        gate.wait(60)
        return real(*arguments)

    for temporary in (True, False):
        gate.clear()
        store = _delayed(tmp_path, timeout_s=0.1, temporary=temporary)
        monkeypatch.setattr(os, "pwrite", pwrite)
        store.append(0, 3, *_kv(32))
        match = r"waited 0.1 s for pages of layer 3, sequence 0 to be written.*Is the drive|alive"
        with pytest.raises(FlashError, match=match) as caught:
            store.stored(0, 3)
        assert caught.value.errno == errno.ETIMEDOUT
        with pytest.raises(FlashError, match="waited 0.1 s"):
            store.flush()
        if temporary:
            store.close()
        else:
            with pytest.raises(FlashError, match="waited 0.1 s for the last pages"):
                store.close()
        gate.set()
        monkeypatch.undo()


def test_closing_writes_what_waits_and_says_what_it_could_not(tmp_path, monkeypatch):
    store = _delayed(tmp_path)
    store.append(0, 0, *_kv(96))
    store.close()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), _kv(96)[0][1])
    store = _delayed(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
    store.append(0, 0, *_kv(32))
    with pytest.raises(FlashError, match="page 3 of layer 0, sequence 0"):
        store.close()


def test_sequences_can_be_dropped_and_taken_back_while_they_are_written(tmp_path, held):
    held.set()
    with _delayed(tmp_path) as store:
        held.clear()
        for sequence in range(2):
            store.append(sequence, 0, *_kv(96, sequence))
        threading.Timer(0.2, held.set).start()
        store.drop(0)
        assert store.n_pages(0, 0) == 0
        store.truncate(1, 0, 1)
        store.append(1, 0, *_kv(32, 7))
        expected = np.concatenate([_kv(96, 1)[0][0][:32], _kv(32, 7)[0][0]])
        np.testing.assert_array_equal(_keys(store, 0, 1, 0), expected)
        assert store.sequences() == [1]


def _in_threads(*calls):
    """Run calls side by side; what they raised."""
    errors = []

    def run(call):
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    return threads, errors


def test_what_others_do_while_a_call_waits_is_not_overlooked(tmp_path, held):
    """A snapshot, a fork or a truncation once was of tables as they were before the wait."""
    held.set()
    with _delayed(tmp_path) as store:
        for sequence in (0, 1):
            store.append(sequence, 0, *_kv(96, sequence))
        store.flush()
        held.clear()
        store.append(0, 0, *_kv(32, 7))
        threads, errors = _in_threads(
            lambda: store.save(b""),
            lambda: store.arrange({5: 0, 6: 1}),
            lambda: store.truncate(0, 0, 3),
            lambda: store.drop(0),
        )
        for n in range(3):
            store.append(1, 0, *_kv(32, n))
        held.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert [error for error in errors if "no sequence 0" not in str(error)] == []
        store.flush()
        before = {s: store.n_pages(s, 0) for s in store.sequences()}
        assert before[1] == 6
        got = _keys(store, 0, 1, 1)
    with KvStore(tmp_path, LAYOUT, 2) as store:  # memory and journal agree
        assert {s: store.n_pages(s, 0) for s in store.sequences()} == before
        np.testing.assert_array_equal(_keys(store, 0, 1, 1), got)
        store.restore()


def test_a_table_that_others_replace_while_a_call_waits_is_waited_for_too(
    tmp_path, held, monkeypatch
):
    held.set()
    with _delayed(tmp_path) as store:
        real, others = WriteBehind.settle, []

        def settle(*args):
            real(*args)
            if not others:  # have their turn before the call goes on
                others.append(True)
                store.drop(0)
                held.clear()
                store.append(0, 0, *_kv(96, 5))
                threading.Timer(0.2, held.set).start()

        store.append(0, 0, *_kv(96))
        monkeypatch.setattr(WriteBehind, "settle", settle)
        store.truncate(0, 0, 2)
        assert store.n_pages(0, 0) == 2
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), _kv(96, 5)[0][1][:64])


@pytest.mark.parametrize("call", ["drop", "restore"])
def test_a_change_that_cannot_be_recorded_gives_no_waiting_page_up(
    tmp_path, held, monkeypatch, call
):
    """The page was lost, and the next took its place."""
    held.set()
    real = Journal.append

    def full(journal, kind, payload):
        if kind.name.lower() == call:
            raise FlashError("no room", errno=errno.ENOSPC, filename=tmp_path)
        real(journal, kind, payload)

    with _delayed(tmp_path) as store:
        store.save(b"")
        monkeypatch.setattr("nearkv.store.behind.GATHER_S", 5)
        store.append(0, 0, *_kv(32))
        monkeypatch.setattr(Journal, "append", full)
        with pytest.raises(FlashError, match="no room"):
            store.drop(0) if call == "drop" else store.restore()
        store.append(0, 0, *_kv(32, 1))
        expected = np.concatenate([_kv(32)[0][1], _kv(32, 1)[0][1]])
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), expected)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), expected)


def test_pages_that_are_given_up_are_not_in_a_snapshot(tmp_path, held):
    held.set()
    with _delayed(tmp_path) as store:
        held.clear()
        store.append(0, 0, *_kv(32))
        while not store._behind._writing:  # the thread has it
            store._behind.hurry() if store._change.acquire() else None
            store._change.release()
        store.append(0, 0, *_kv(32))
        store.append(1, 0, *_kv(32))
        threads, errors = _in_threads(lambda: store.drop(0), lambda: store.save(b"kept"))
        threading.Timer(0.2, held.set).start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert errors == []
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.sequences() == [1]
        store.restore()
        for sequence in store.sequences():
            _keys(store, 0, sequence, 1)


def test_a_thread_that_cannot_be_started_is_said_and_nothing_claims_pages(tmp_path, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with _delayed(tmp_path) as store:
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(FlashError, match="cannot start the thread.*ulimit -u"):
            store.append(0, 0, *_kv(32))
        monkeypatch.undo()
        assert store.sequences() == []
        store.append(0, 0, *_kv(32))
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), _kv(32)[0][1])


def test_a_signal_ends_a_wait(tmp_path, held):
    held.set()
    with _delayed(tmp_path) as store:
        held.clear()
        store.append(0, 0, *_kv(32))
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                store.settle(0, 0)
        finally:
            signal.signal(signal.SIGALRM, handler)
            held.set()
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), _kv(32)[0][1])


def test_what_was_written_is_counted(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.write_amplification == 0
        store.append(0, 0, *_kv(64))
        assert store.bytes_given == store.bytes_written == 4 * LAYOUT.page_bytes
        written = store.journal_bytes_written
        assert 0 < written <= (tmp_path / "journal").stat().st_size
        assert store.write_amplification == 1 + written / store.bytes_given
        store.append(0, 1, *_kv(1), ragged=True)
        assert store.write_amplification > 1.4


@pytest.mark.parametrize("delayed_bytes", [0, 1 << 20])
def test_a_write_budget_is_kept(tmp_path, delayed_bytes):
    budget = 5 * LAYOUT.page_bytes
    with _delayed(tmp_path, budget_bytes=budget, delayed_bytes=delayed_bytes) as store:
        store.append(0, 0, *_kv(64))
        with pytest.raises(
            FlashError, match="page 0 of layer 1, sequence 0.*write budget"
        ) as caught:
            store.append(0, 1, *_kv(32))
        assert caught.value.errno == errno.EDQUOT
        assert store.n_pages(0, 1) == 0
        np.testing.assert_array_equal(_keys(store, 0, 0, 1), _kv(64)[0][1])
        assert store.bytes_written <= budget


@pytest.fixture
def calls(monkeypatch):
    """(call, file name) of writes and of what makes the drive keep them, in order."""
    calls, failing = [], []

    def watch(name):
        real = getattr(os, name)

        def watched(fd, *arguments):
            path = os.readlink(f"/proc/self/fd/{fd}")
            calls.append((name, os.path.basename(path)))
            if name == "fsync" and failing and path.endswith(failing[0]):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, watched)

    watch("pwrite")
    watch("fsync")
    calls.clear()
    return calls, failing


@pytest.mark.parametrize("delayed_bytes", [0, 1 << 20])
@pytest.mark.parametrize("ending", ["flush", "close"])
def test_the_drive_keeps_pages_before_the_journal_that_names_them(
    tmp_path, calls, delayed_bytes, ending
):
    calls, _ = calls
    path = tmp_path / "store"
    store = KvStore(path, LAYOUT, 2, n_shards=2, delayed_bytes=delayed_bytes)
    calls.clear()  # of making it
    for sequence in range(2):
        store.append(sequence, 0, *_kv(32 * 40, sequence))
    getattr(store, ending)()
    kept = [name for call, name in calls if call == "fsync"]
    assert kept == ["pages-0.kv", "pages-1.kv", "journal", "journal.end"]
    written = [at for at, what in enumerate(calls) if what != ("pwrite", "journal.end")]
    written = [at for at in written if calls[at][0] == "pwrite"]
    assert max(written) < calls.index(("fsync", kept[0]))
    assert calls.index(("fsync", "journal")) < calls.index(("pwrite", "journal.end"))
    # Not before: nobody waits for the drive while tokens are decoded.
    assert all(call == "pwrite" for call, _ in calls[: max(written) + 1])
    calls.clear()
    store.close()
    assert calls == []  # nothing new


def test_what_the_drive_does_not_keep_is_said_and_tried_again(tmp_path, calls):
    calls, failing = calls
    store = _delayed(tmp_path)
    store.append(0, 0, *_kv(32))
    failing.append("pages-0.kv")
    with pytest.raises(FlashError, match="may not keep .*pages-0.kv.*Input/output.*compute them"):
        store.flush()
    failing.clear()
    calls.clear()
    store.flush()
    assert ("fsync", "journal") in calls
    store.append(0, 0, *_kv(32))
    failing.append("journal")
    with pytest.raises(FlashError, match="may not keep .*journal"):
        store.close()


def test_freed_places_are_not_used_before_the_drive_has_forgotten_them(tmp_path):
    """Or a loss of power could bring a sequence back with somebody else's bytes."""
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        store.flush()
        place = store.stored(0, 0)["offset"].tolist()
        store.drop(0)
        store.append(1, 0, *_kv(32))
        assert store.stored(1, 0)["offset"].tolist() != place
        store.flush()
        store.append(2, 0, *_kv(32))
        assert set(store.stored(2, 0)["offset"].ravel()) <= set(np.ravel(place))


def test_a_store_that_nobody_flushes_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 4000)
    monkeypatch.setattr("nearkv.store.store.LONG_BYTES", 8000)
    monkeypatch.setattr("nearkv.store.store.LIMBO_BYTES", 20 * LAYOUT.page_bytes)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(1, 0, *_kv(64))
        for n in range(200):
            store.append(0, 0, *_kv(64, n))
            store.arrange({2: 0, 3: 1} if n % 2 else {2: 1, 3: 0})
            store.drop(0)
        assert (tmp_path / "journal").stat().st_size < 20000
        assert (tmp_path / "pages-0.kv").stat().st_size < 80 * LAYOUT.page_bytes
        np.testing.assert_array_equal(_keys(store, 0, 2, 1), _kv(64, 199)[0][1])
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(_keys(store, 0, 2, 1), _kv(64, 199)[0][1])
        assert store.sequences() == [1, 2, 3]


def test_a_full_drive_gives_the_journal_what_was_freed(tmp_path, monkeypatch):
    real = Journal.append
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        store.append(1, 0, *_kv(32))
        store.drop(0)

        def full(journal, kind, payload):
            if store._space.limbo_bytes:
                raise FlashError("no room", errno=errno.ENOSPC, filename=tmp_path)
            real(journal, kind, payload)

        monkeypatch.setattr(Journal, "append", full)
        store.append(1, 0, *_kv(32, 5))
        np.testing.assert_array_equal(_keys(store, 0, 1, 0)[32:], _kv(32, 5)[0][0])


def test_the_drive_keeps_the_name_of_a_journal_before_its_mark(tmp_path, calls, monkeypatch):
    """A mark of a journal whose name is not kept says that the old one is too old."""
    calls, failing = calls
    monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 0)
    path = tmp_path / "store"
    with KvStore(path, LAYOUT, 2) as store:
        for _ in range(3):
            store.append(0, 0, *_kv(32))
            store.arrange({1: 0})
            store.drop(1)
        failing.append("/store")
        calls.clear()
        store.flush()  # the journal stays as it is, and that is not an error
        assert ("fsync", "store") in calls
        assert ("pwrite", "journal.end") not in calls[calls.index(("fsync", "store")) :]
        failing.clear()
        calls.clear()
        store.append(0, 0, *_kv(32))
        store.flush()
        kept = [name for call, name in calls if call == "fsync"]
        assert kept[:3] == ["pages-0.kv", "journal", "store"]


def test_temporary_stores_do_not_wait_for_the_drive(tmp_path, calls):
    calls, _ = calls
    with _delayed(tmp_path, temporary=True) as store:
        store.append(0, 0, *_kv(64))
        store.flush()
    assert not [call for call, _ in calls if call == "fsync"]
