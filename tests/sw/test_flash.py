# SPDX-License-Identifier: Apache-2.0
"""The reader and the drive's windows: bursts, faults, and slow drives."""

import errno
import os
import threading
import time

import numpy as np
import pytest

from nearkv import flash
from nearkv.buffers import JobMemory, KvMemory
from nearkv.flash import READ_BYTES, FlashError, PageId, Read, Reader, Window

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


@pytest.mark.parametrize("depth", [1, 2, 16])
def test_reads_arrive_whole_at_every_depth(big, depth):
    data, read = big
    memory, reader = KvMemory(16 * MIB), Reader(KvMemory(4096), depth)
    reader = Reader(memory, depth)
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
    reader.close()


def test_no_more_requests_than_the_depth_are_with_the_drive(big, monkeypatch):
    _, read = big
    at_once, most, sizes, lock, real = [0], [0], [], threading.Lock(), os.preadv

    def preadv(fd, buffers, offset):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            sizes.append(len(buffers[0]))
        time.sleep(0.002)
        try:
            return real(fd, buffers, offset)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(os, "preadv", preadv)
    reader = Reader(KvMemory(16 * MIB), 3)
    reader.start([read(0, 5 * MIB), read(0, 5 * MIB, 5 * MIB)]).wait(10)
    assert most[0] == 3
    assert set(sizes) == {READ_BYTES}
    reader.close()


def test_the_first_fault_of_a_load_is_raised_and_other_loads_go_on(big, monkeypatch):
    data, read = big
    real = os.preadv

    def preadv(fd, buffers, offset):
        if offset in (MIB, 3 * MIB):
            time.sleep(0.05 if offset == MIB else 0)  # the later request fails first
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    memory = KvMemory(16 * MIB)
    reader = Reader(memory, 4)
    bad, good = reader.start([read(0, 4 * MIB)]), reader.start([read(4 * MIB, MIB, 8 * MIB)])
    good.wait(10)
    np.testing.assert_array_equal(memory.simulated()[8 * MIB : 9 * MIB], data[4 * MIB : 5 * MIB])
    with pytest.raises(FlashError, match="page 256 of layer 1, sequence 2.*Input/output") as caught:
        bad.wait(10)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, MIB)
    reader.close()


def test_short_reads_are_continued_and_an_early_end_is_an_error(big, monkeypatch):
    data, read = big
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, [b[0][:8192]], at))
    memory = KvMemory(8 * MIB)
    reader = Reader(memory)
    reader.start([read(0, MIB)]).wait(10)
    np.testing.assert_array_equal(memory.simulated()[:MIB], data[:MIB])
    with pytest.raises(FlashError, match="truncated"):
        reader.start([read(5 * MIB, 8192)]).wait(10)
    reader.close()


def test_a_bug_in_a_reader_is_an_error_and_no_hang(big, monkeypatch):
    _, read = big
    monkeypatch.setattr(flash, "read_into", lambda *_: 1 / 0)
    reader = Reader(KvMemory(4096))
    with pytest.raises(FlashError, match="ZeroDivisionError.*page 0 of layer 1"):
        reader.start([read(0, 4096)]).wait(10)
    reader.close()


def test_writes_have_the_drive_to_themselves(big):
    _, read = big
    window, log, lock = Window(), [], threading.Lock()
    reading, writing = [0], [0]

    def reader_thread():
        for _ in range(200):
            window.begin_read()
            with lock:
                reading[0] += 1
                log.append((reading[0], writing[0]))
            with lock:
                reading[0] -= 1
            window.end_read()

    def writer_thread():
        for _ in range(50):
            with window.writing():
                with lock:
                    writing[0] += 1
                    log.append((reading[0], writing[0]))
                with lock:
                    writing[0] -= 1

    threads = [threading.Thread(target=reader_thread) for _ in range(3)]
    threads += [threading.Thread(target=writer_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(log) == 3 * 200 + 2 * 50
    assert all(writers == 0 or (readers, writers) == (0, 1) for readers, writers in log)


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
