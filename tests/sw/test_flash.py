# SPDX-License-Identifier: Apache-2.0
"""The reader and the drive's windows: bursts, faults, and slow drives."""

import errno
import logging
import os
import threading
import time

import numpy as np
import pytest

from nearkv.io import (
    READ_BYTES,
    FlashError,
    JobMemory,
    KvMemory,
    Load,
    PageId,
    Read,
    Reader,
    Window,
    open_reader,
    uring,
)
from nearkv.io import reader as flash

MIB = 1 << 20


@pytest.fixture
def big(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 5 * MIB + 4096, dtype=np.uint8)
    path = tmp_path / "pages"
    path.write_bytes(data.tobytes())
    fd = os.open(path, os.O_RDONLY)
    yield (
        data,
        lambda offset, nbytes, at=0, window=None: Read(
            fd, path, offset, nbytes, at, PageId(1, 2, 3, offset // 4096), 4096, window
        ),
    )
    os.close(fd)


@pytest.fixture
def opened(reader_kind):
    """Opens readers of either kind, and closes them."""
    readers = []

    def opened(memory, depth=8):
        readers.append(open_reader(memory, depth, reader_kind))
        return readers[-1]

    yield opened
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("depth", [1, 2, 16])
def test_reads_arrive_whole_at_every_depth(big, opened, depth):
    data, read = big
    memory = KvMemory(16 * MIB)
    reader = opened(memory, depth)
    loads = [
        reader.start([read(0, 5 * MIB + 4096), read(8192, MIB, 6 * MIB)]),
        reader.start([]),
        reader.start([read(4096, 3 * MIB, 8 * MIB)]),
    ]
    for load in loads:
        load.wait(10)
        assert load.arrived
    seen = memory.simulated()
    np.testing.assert_array_equal(seen[: len(data)], data)
    np.testing.assert_array_equal(seen[6 * MIB : 7 * MIB], data[8192 : 8192 + MIB])
    np.testing.assert_array_equal(seen[8 * MIB : 11 * MIB], data[4096 : 4096 + 3 * MIB])


def test_no_more_requests_than_the_depth_are_with_the_drive(big, opened, drive, monkeypatch):
    _, read = big
    at_once, most, lock = [0], [0], threading.Lock()

    def count(change):
        with lock:
            at_once[0] += change
            most[0] = max(most[0], at_once[0])

    def fate(name, offset, nbytes):
        count(1)
        return {"delay": 0.002}

    done = Load._done

    def counted(load, index, error):
        count(-1)
        done(load, index, error)

    drive.fate = fate
    monkeypatch.setattr(Load, "_done", counted)
    opened(KvMemory(16 * MIB), 3).start([read(0, 5 * MIB), read(0, 5 * MIB, 5 * MIB)]).wait(10)
    assert most[0] == 3
    assert {nbytes for _, _, nbytes in drive.reads} == {READ_BYTES}


def test_the_first_fault_of_a_load_is_raised_and_other_loads_go_on(big, opened, drive):
    data, read = big
    drive.fate = lambda name, offset, nbytes: {
        MIB: {"errno": errno.EIO, "delay": 0.05},  # the later request fails first
        3 * MIB: {"errno": errno.EIO},
    }.get(offset)
    memory = KvMemory(16 * MIB)
    reader = opened(memory, 4)
    bad, good = reader.start([read(0, 4 * MIB)]), reader.start([read(4 * MIB, MIB, 8 * MIB)])
    good.wait(10)
    np.testing.assert_array_equal(memory.simulated()[8 * MIB : 9 * MIB], data[4 * MIB : 5 * MIB])
    with pytest.raises(FlashError, match="page 256 of layer 1, sequence 2.*Input/output") as caught:
        bad.wait(10)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, MIB)


def test_short_reads_are_continued_and_an_early_end_is_an_error(big, opened, drive):
    data, read = big
    drive.fate = lambda name, offset, nbytes: {"short": 8192}
    memory = KvMemory(8 * MIB)
    reader = opened(memory)
    reader.start([read(0, MIB)]).wait(10)
    np.testing.assert_array_equal(memory.simulated()[:MIB], data[:MIB])
    assert len(drive.reads) == MIB // 8192
    with pytest.raises(FlashError, match="4096 bytes too early; it was truncated.*page 1281"):
        reader.start([read(5 * MIB, 8192)]).wait(10)


def test_interrupted_reads_are_made_again(big, drive):
    if uring.refusal():
        pytest.skip(uring.refusal())
    data, read = big
    left = [errno.EINTR, errno.EAGAIN, errno.EAGAIN]
    drive.fate = lambda name, offset, nbytes: {"errno": left.pop()} if left else None
    memory = KvMemory(MIB)
    reader = open_reader(memory, kind="uring")
    reader.start([read(0, MIB)]).wait(10)
    np.testing.assert_array_equal(memory.simulated(), data[:MIB])
    assert len(drive.reads) == 4
    reader.close()


def test_a_load_that_is_late_is_known_to_have_arrived_later(big, opened, drive):
    _, read = big
    drive.fate = lambda name, offset, nbytes: {"delay": 0.3}
    load = opened(KvMemory(2 * MIB)).start([read(0, 2 * MIB)])
    with pytest.raises(TimeoutError, match=r"0\.05 s, 2 of 2 reads .*page 0 of layer 1.*at byte 0"):
        load.wait(0.05)
    assert not load.arrived
    time.sleep(0.4)
    assert load.arrived
    load.wait(0)


def test_a_bug_in_a_reader_is_an_error_and_no_hang(big, monkeypatch):
    _, read = big
    monkeypatch.setattr(flash, "read_into", lambda *_: 1 / 0)
    reader = Reader(KvMemory(4096))
    with pytest.raises(FlashError, match="ZeroDivisionError.*page 0 of layer 1"):
        reader.start([read(0, 4096)]).wait(10)
    reader.close()


def test_a_reader_that_is_closed_ends_its_loads_and_lets_writers_go_on(big, opened, drive):
    _, read = big
    drive.fate = lambda name, offset, nbytes: {"delay": 3}
    memory, window = KvMemory(4 * MIB), Window()
    reader = opened(memory, 2)
    load = reader.start([read(0, 4 * MIB, window=window)])
    time.sleep(0.05)
    reader.close()
    if type(reader) is flash.UringReader:
        assert any(kept is memory for kept in flash.UringReader._lost)
    with pytest.raises(FlashError, match="given up: the card was closed or reset .page 0 of layer"):
        load.wait(1)
    with window.writing():  # nobody is waited for
        pass
    reader = opened(memory, 2)
    with window.writing():
        held = reader.start([read(0, MIB, window=window)])
        reader.close()
    with pytest.raises(FlashError, match="given up"):
        held.wait(1)
    with pytest.raises(ValueError, match="closed"):
        reader.start([])


def test_without_io_uring_threads_read_and_it_is_said_once(big, monkeypatch, caplog):
    def refuse(entries):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    data, read = big
    memory = KvMemory(MIB)
    try:
        for cached in (uring.refusal, flash._no_uring):
            cached.cache_clear()
        monkeypatch.setattr(uring, "Uring", refuse)
        with caplog.at_level(logging.DEBUG, "nearkv"):
            for _ in range(2):
                reader = open_reader(memory)
                assert type(reader) is Reader
                reader.start([read(0, MIB)]).wait(10)
                reader.close()
    finally:
        for cached in (uring.refusal, flash._no_uring):
            cached.cache_clear()
    np.testing.assert_array_equal(memory.simulated(), data[:MIB])
    assert caplog.text.count("pages are read by threads: io_uring_setup: Operation not per") == 1
    with pytest.raises(ValueError, match='"auto", "uring" or "threads", not \'nvme\''):
        open_reader(memory, kind="nvme")


def test_writes_have_the_drive_to_themselves():
    window, log, lock = Window(), [], threading.Lock()
    reading, writing = [0], [0]

    def note(what, change):
        with lock:
            what[0] += change
            log.append((reading[0], writing[0]))

    def reader_thread():
        for _ in range(200):
            with window.reading():
                note(reading, 1)
                note(reading, -1)

    def writer_thread():
        for _ in range(50):
            with window.writing():
                note(writing, 1)
                note(writing, -1)

    threads = [threading.Thread(target=reader_thread) for _ in range(3)]
    threads += [threading.Thread(target=writer_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(log) == 2 * (3 * 200 + 2 * 50)
    assert all(writers == 0 or (readers, writers) == (0, 1) for readers, writers in log)


def test_a_load_holds_off_writers_until_it_has_arrived_and_waits_for_those_before_it(
    big, opened, drive
):
    data, read = big
    drive.fate = lambda name, offset, nbytes: {"delay": 0.05}
    windows = [Window(), Window()]
    memory = KvMemory(8 * MIB)
    reader = opened(memory)
    first = reader.start([read(0, MIB, window=windows[0]), read(0, MIB, MIB, window=windows[1])])
    with windows[0].writing():  # nobody waits for the load meanwhile
        assert 0 not in first._left
        second = reader.start([read(MIB, 2 * MIB, 2 * MIB, window=windows[0])])
        with pytest.raises(TimeoutError):
            second.wait(0.1)
        assert {offset for _, offset, _ in drive.reads} == {0}
    second.wait(10)
    np.testing.assert_array_equal(memory.simulated()[2 * MIB : 4 * MIB], data[MIB : 3 * MIB])
    first.wait(10)


def test_memories_cannot_be_mistaken_for_each_other():
    kv, job = KvMemory(8192), JobMemory(4096)
    with pytest.raises(TypeError, match="kv memory belongs to the card"):
        np.asarray(kv)
    with pytest.raises(ValueError, match="read-only"):
        kv.simulated()[0] = 1
    for offset, nbytes, what in (
        (0, 12288, "leaves"),
        (-4096, 4096, "leaves"),
        (100, 4096, "4096"),
    ):
        with pytest.raises(ValueError, match=what):
            kv.check(offset, nbytes)
    with pytest.raises(ValueError, match="job memory"):
        job.check(4090, 100)
    assert not hasattr(job, "target")
    for kind in (KvMemory, JobMemory):
        with pytest.raises(ValueError, match="multiple of 4096, not 100"):
            kind(100)
        assert kind(4096).nbytes == 4096
    assert job.bytes.ctypes.data % 4096 == kv.simulated().ctypes.data % 4096 == 0
