# SPDX-License-Identifier: Apache-2.0
"""Delayed writeback: nothing is lost, nothing is read before it is written, errors have a name."""

import errno
import os
import threading

import numpy as np
import pytest

from nearkv.io import FlashError, PageId
from nearkv.store import KvStore
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
    write = KvStore._write_window
    monkeypatch.setattr(
        KvStore,
        "_write_window",
        lambda self, writes: (windows.append(len(writes)), write(self, writes)),
    )
    monkeypatch.setattr("nearkv.store.store.GATHER_S", 5)
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
            assert store._waiting_bytes <= 4 * LAYOUT.page_bytes
        got = _keys(store, 1, 0, 1)
        np.testing.assert_array_equal(got[:32], _kv(32, 3)[0][1])


def test_a_write_that_fails_is_raised_by_the_next_call_and_tried_again(tmp_path, monkeypatch):
    real, broken = os.pwrite, [True]

    def pwrite(fd, data, offset):
        if broken[0] and os.readlink(f"/proc/self/fd/{fd}").endswith("sequence-000001.kv"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, data, offset)

    with _delayed(tmp_path) as store:
        for sequence in range(3):
            store.append(sequence, 5, *_kv(32, sequence))
        store.flush()
        monkeypatch.setattr(os, "pwrite", pwrite)
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
            store.append(1, 5, *_kv(32, 20))
        broken[0] = False
        np.testing.assert_array_equal(
            _keys(store, 5, 1, 0), np.concatenate([_kv(32, 1)[0][0], _kv(32, 11)[0][0]])
        )
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert [store.n_pages(sequence, 5) for sequence in range(3)] == [2, 2, 2]


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
        assert [path.name for path in tmp_path.glob("*.kv")] == ["sequence-000001.kv"]


def test_what_was_written_is_counted(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.write_amplification == 0
        store.append(0, 0, *_kv(64))
        assert store.bytes_given == store.bytes_written == 4 * LAYOUT.page_bytes
        assert store.index_bytes_written == 4 * 64
        assert store.write_amplification == 1 + 64 / LAYOUT.page_bytes
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
def test_the_drive_keeps_pages_before_the_index_that_names_them(
    tmp_path, calls, delayed_bytes, ending
):
    calls, _ = calls
    path = tmp_path / "store"
    store = KvStore(path, LAYOUT, 2, n_shards=2, delayed_bytes=delayed_bytes)
    for sequence in range(2):
        store.append(sequence, 0, *_kv(32 * 40, sequence))
    getattr(store, ending)()
    kept = [name for call, name in calls if call == "fsync"]
    pages = {f"sequence-00000{sequence}{part}.kv" for sequence in (0, 1) for part in ("", ".1")}
    assert set(kept[:4]) == pages
    assert kept[4:] == ["sequence-000000.index", "sequence-000001.index", "store.json", "store"]
    written = [at for at, (call, _) in enumerate(calls) if call == "pwrite"]
    assert max(written) < calls.index(("fsync", kept[0]))
    # Not before: nobody waits for the drive while tokens are decoded.
    assert all(call == "pwrite" for call, _ in calls[: max(written) + 1])
    calls.clear()
    store.close()
    assert calls == []  # nothing new


def test_what_the_drive_does_not_keep_is_said_and_tried_again(tmp_path, calls):
    calls, failing = calls
    store = _delayed(tmp_path)
    store.append(0, 0, *_kv(32))
    failing.append("000000.kv")
    with pytest.raises(FlashError, match="may not keep .*000000.kv.*Input/output.*compute them"):
        store.flush()
    failing.clear()
    store.flush()
    assert ("fsync", "sequence-000000.index") in calls
    store.append(0, 0, *_kv(32))
    failing.append(".index")
    with pytest.raises(FlashError, match="may not keep .*000000.index"):
        store.close()


def test_temporary_stores_do_not_wait_for_the_drive(tmp_path, calls):
    calls, _ = calls
    with _delayed(tmp_path, temporary=True) as store:
        store.append(0, 0, *_kv(64))
        store.flush()
    assert not [call for call, _ in calls if call == "fsync"]
