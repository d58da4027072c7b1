# SPDX-License-Identifier: Apache-2.0
"""The reader and the drive's windows: bursts, faults, and slow drives."""

import errno
import logging
import mmap
import os
import re
import threading

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
    ReaderError,
    UringReader,
    Window,
    open_reader,
    uring,
)
from nearkv.io import reader as flash
from nearkv.io.uring import Uring

MIB = 1 << 20


@pytest.fixture
def big(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 5 * MIB + 4096, dtype=np.uint8)
    path = tmp_path / "pages"
    path.write_bytes(data.tobytes())
    fd = os.open(path, os.O_RDONLY)
    yield (
        data,
        lambda offset, nbytes, at=0, window=None, direct=True: Read(
            fd, path, offset, nbytes, at, PageId(1, 2, 3, offset // 4096), 4096, window, direct
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
    arrives = threading.Event()
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    load = opened(KvMemory(2 * MIB)).start([read(0, 2 * MIB)])
    with pytest.raises(TimeoutError, match=r"0\.05 s, 2 of 2 reads .*page 0 of layer 1.*at byte 0"):
        load.wait(0.05)
    assert not load.arrived
    arrives.set()
    load.wait(30)
    assert load.arrived


def test_a_bug_in_a_reader_is_an_error_and_no_hang(big, monkeypatch):
    _, read = big
    monkeypatch.setattr(flash, "read_into", lambda *_: 1 / 0)
    reader = Reader(KvMemory(4096))
    with pytest.raises(FlashError, match="ZeroDivisionError.*page 0 of layer 1"):
        reader.start([read(0, 4096)]).wait(10)
    reader.close()


def test_a_reader_that_is_closed_ends_its_loads_and_lets_writers_go_on(big, opened, drive):
    _, read = big
    asked, arrives = [threading.Event(), threading.Event()], threading.Event()

    def fate(name, offset, nbytes):
        asked[offset // MIB].set()
        return {"until": arrives}

    drive.fate = fate
    memory, window = KvMemory(4 * MIB), Window()
    reader = opened(memory, 2)
    load = reader.start([read(0, 4 * MIB, window=window)])
    assert all(one.wait(30) for one in asked)
    reader.close()
    assert not reader.drained(0.05)  # what is with the drive may still be written
    with pytest.raises(FlashError, match="given up: the card was closed or reset .page 0 of layer"):
        load.wait(1)
    with window.writing():  # nobody is waited for
        pass
    arrives.set()
    assert reader.drained(30)
    assert len(drive.reads) == 2  # nothing more was asked for
    reader = opened(memory, 2)
    with window.writing():
        held = reader.start([read(0, MIB, window=window)])
        reader.close()
    with pytest.raises(FlashError, match="given up"):
        held.wait(1)
    with pytest.raises(ValueError, match="closed"):
        reader.start([])


# --- readers that fail -------------------------------------------------------------------------


@pytest.fixture
def probe():
    """Looks anew whether io_uring can be used, and forgets the answer afterwards."""

    def forget():
        for cached in (uring.refusal, flash._no_uring):
            cached.cache_clear()

    forget()
    yield uring.refusal
    forget()


def _refuse(*_):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    ("point", "stand_in", "why"),
    [
        ("__init__", _refuse, "io_uring_setup: Operation not permitted"),
        ("submit", _refuse, "io_uring_enter: Operation not permitted"),
        # Linux 5.4 has rings, and no IORING_OP_READ.
        ("completions", "EINVAL", "IORING_OP_READ: Invalid argument .it needs Linux 5.6."),
        ("completions", "nothing", "nothing came within 0.05 s"),
    ],
)
def test_without_io_uring_threads_read_and_it_is_said_once(
    big, probe, monkeypatch, caplog, point, stand_in, why
):
    data, read = big
    memory = KvMemory(MIB)
    completions = Uring.completions
    if stand_in == "EINVAL":
        stand_in = lambda ring: ((key, -errno.EINVAL) for key, _ in completions(ring))  # noqa: E731
    elif stand_in == "nothing":
        stand_in = lambda ring: ()  # noqa: E731
        monkeypatch.setattr(uring, "_PROBE_S", 0.05)
    monkeypatch.setattr(Uring, point, stand_in)
    with caplog.at_level(logging.DEBUG, "nearkv"):
        for _ in range(2):
            reader = open_reader(memory)
            assert type(reader) is Reader
            reader.start([read(0, MIB)]).wait(10)
            reader.close()
    np.testing.assert_array_equal(memory.simulated(), data[:MIB])
    assert caplog.text.count("pages are read by threads") == 1
    assert re.search(f"pages are read by threads: .*{why}", caplog.text)
    with pytest.raises(ValueError, match='"auto", "uring" or "threads", not \'nvme\''):
        open_reader(memory, kind="nvme")


def test_a_ring_that_is_too_large_for_the_system_is_replaced_by_threads(monkeypatch, caplog):
    def small(ring, entries):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(flash, "_no_uring", lambda: "")
    monkeypatch.setattr(Uring, "__init__", small)
    assert type(open_reader(KvMemory(4096))) is Reader
    assert "Cannot allocate memory; pages are read by threads" in caplog.text
    with pytest.raises(OSError, match="Cannot allocate memory"):
        open_reader(KvMemory(4096), kind="uring")


@pytest.fixture
def ring():
    if uring.refusal():
        pytest.skip(uring.refusal())
    readers = []

    def ring(memory, depth=None):
        readers.append(open_reader(memory, depth, "uring"))
        return readers[-1]

    yield ring
    for reader in readers:
        reader.close()


def test_threads_take_over_what_the_ring_will_not_read(big, ring, drive, caplog):
    data, read = big
    fates = [None, {"errno": errno.EOPNOTSUPP}]

    def fate(name, offset, nbytes):
        return fates.pop() if fates else None

    drive.fate = fate
    memory = KvMemory(8 * MIB)
    reader = ring(memory, 2)
    reader.start([read(0, 5 * MIB)]).wait(10)
    np.testing.assert_array_equal(memory.simulated()[: 5 * MIB], data[: 5 * MIB])
    assert caplog.text.count("io_uring answers Operation not supported for page ") == 1
    assert "pages are read by threads from now on" in caplog.text
    drive.break_ring("read")  # it is not used again
    reader.start([read(0, MIB, 7 * MIB)]).wait(10)
    np.testing.assert_array_equal(memory.simulated()[7 * MIB :], data[:MIB])
    assert reader.failure is None


def test_what_a_drive_answers_is_no_reason_to_give_up_the_ring(big, ring, drive, caplog):
    _, read = big
    drive.fate = lambda name, offset, nbytes: {"errno": errno.EIO}
    reader = ring(KvMemory(MIB))
    with pytest.raises(FlashError, match="Input/output"):
        reader.start([read(0, MIB)]).wait(10)
    assert caplog.text == ""
    # And if neither ring nor threads can, it is the drive's fault after all.
    drive.fate = lambda name, offset, nbytes: {"errno": errno.EINVAL}
    with pytest.raises(FlashError, match="Invalid argument"):
        reader.start([read(0, MIB)]).wait(10)


@pytest.mark.parametrize("nbytes", [MIB, 5 * MIB])  # in passing, and by the thread
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("point", ["read", "submit", "wait", "completions", "wake"])
def test_wherever_the_ring_breaks_its_loads_end_and_say_so(
    big, ring, drive, caplog, monkeypatch, point, after, nbytes
):
    _, read = big
    monkeypatch.setattr(UringReader, "FEW", 2)
    drive.fate = lambda name, offset, nbytes: {"delay": 0.02}
    memory, window = KvMemory(16 * MIB), Window()
    reader = ring(memory, 4)
    drive.break_ring(point, after)
    ended = 0
    for at in range(6):
        try:
            reader.start([read(0, nbytes, 5 * MIB * (at % 3), window)]).wait(10)
        except ReaderError:
            ended += 1
    if reader.failure is not None:
        assert ended
        assert re.search("io_uring failed: OSError.*No such device", caplog.text)
        with pytest.raises(ReaderError):
            reader.start([read(0, MIB)])
    with window.writing():  # nothing is left behind that holds others up
        pass
    reader.close()
    # Whether it can be said that nothing is on its way depends on where it broke.
    drained = reader.drained(0.5)
    assert drained == (reader not in UringReader._lost)
    if point in ("read", "submit"):
        assert drained
    if reader in UringReader._lost:
        UringReader._lost.remove(reader)


def test_a_ring_that_answers_what_was_not_asked_is_not_believed(big, ring, monkeypatch):
    _, read = big
    completions = Uring.completions
    monkeypatch.setattr(
        Uring, "completions", lambda ring: ((key + 7, got) for key, got in completions(ring))
    )
    reader = ring(KvMemory(MIB))
    with pytest.raises(ReaderError, match="request 7 was answered and not made"):
        reader.start([read(0, MIB)]).wait(10)


def test_what_the_kernel_did_not_take_is_on_nobodys_way(big, ring, monkeypatch):
    """Half of the requests are taken, and then no more."""
    data, read = big
    calls, real = [], uring._call

    def call(number, fd, n, *arguments):
        calls.append(n)
        if len(calls) == 1:
            return real(number, fd, n // 2, *arguments)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    memory = KvMemory(8 * MIB)
    reader = ring(memory)
    monkeypatch.setattr(uring, "_call", call)
    load = reader.start([read(0, 4 * MIB)])
    assert calls == [4, 2]
    with pytest.raises(ReaderError, match="No such device"):
        load.wait(10)
    assert reader.drained(10)
    np.testing.assert_array_equal(memory.simulated()[: 2 * MIB], data[: 2 * MIB])


def test_threads_that_cannot_be_started_are_an_error_and_no_hang(big, opened, monkeypatch):
    _, read = big
    monkeypatch.setattr(UringReader, "FEW", 0)
    reader, window = opened(KvMemory(MIB)), Window()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with window.writing():
        held = reader.start([read(0, MIB, window=window)])
    with pytest.raises(ReaderError, match="can't start new thread"):
        held.wait(1)
    with window.writing():
        pass
    assert reader.drained(1)


def test_requests_of_a_thread_that_has_ended_are_made_again(big, ring, drive):
    data, read = big
    left = [errno.ECANCELED, errno.ECANCELED]
    drive.fate = lambda name, offset, nbytes: {"errno": left.pop()} if left else None
    memory = KvMemory(2 * MIB)
    loads = []
    reader = ring(memory)
    thread = threading.Thread(target=lambda: loads.append(reader.start([read(0, 2 * MIB)])))
    thread.start()
    thread.join(10)
    loads[0].wait(10)
    np.testing.assert_array_equal(memory.simulated(), data[: 2 * MIB])


# --- memory of a card --------------------------------------------------------------------------


def _foreign(nbytes):
    """Memory that is mapped from elsewhere: as KvMemory, and as its owner sees it."""
    fd = os.memfd_create("kv")
    os.ftruncate(fd, nbytes)
    maps = [mmap.mmap(fd, nbytes) for _ in range(2)]
    os.close(fd)
    ours, theirs = (np.frombuffer(one, np.uint8) for one in maps)
    return KvMemory(nbytes, address=ours.ctypes.data, keep=ours), theirs


def test_foreign_memory_is_filled_past_the_processor_or_not_at_all(tmp_path, opened):
    data = np.random.default_rng(0).integers(0, 256, 3 * MIB, dtype=np.uint8)
    path = tmp_path / "pages"
    path.write_bytes(data.tobytes())
    memory, theirs = _foreign(4 * MIB)
    assert memory.foreign
    assert memory.renewed() is memory
    reader = opened(memory)
    read = Read(-1, path, 0, 3 * MIB, MIB, PageId(1, 2, 3, 0), 4096, None, False)
    with pytest.raises(FlashError, match="page 0 of layer 1.*no O_DIRECT; choose a directory"):
        reader.start([read])
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT here")
    reader.start([read._replace(fd=fd, direct=True)]).wait(10)
    np.testing.assert_array_equal(theirs[MIB:], data)
    os.close(fd)


def test_memory_is_not_shared_with_a_forked_process():
    """Pages that both had would be copied when either writes, under a drive that is writing."""
    memory = KvMemory(4096)
    job = JobMemory(4096)
    memory.target(0, 1)[0] = 7
    job.bytes[0] = 7
    child = os.fork()
    if not child:
        os._exit(int(memory.simulated()[0]) + int(job.bytes[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memory.simulated()[0] == job.bytes[0] == 7


# --- windows -----------------------------------------------------------------------------------


def test_nobody_waits_for_the_drive_for_ever(big, opened, drive):
    data, read = big
    window, arrives = Window(timeout_s=0.05), threading.Event()
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    memory = KvMemory(2 * MIB)
    reader = opened(memory)
    load = reader.start([read(0, MIB, window=window)])
    with pytest.raises(FlashError, match=r"waited 0\.05 s for the end of reads.*page 0 of layer 1"):
        with window.writing():
            pass
    later = reader.start([read(MIB, MIB, MIB, window=window)])  # not held up by who has given up
    arrives.set()
    for one in (load, later):
        one.wait(10)
    np.testing.assert_array_equal(memory.simulated(), data[: 2 * MIB])
    with window.writing():
        caught = []

        def wait(what):
            with pytest.raises(FlashError) as error, what():
                pass
            caught.append(str(error.value))

        for what in (window.reading, window.writing):
            thread = threading.Thread(target=wait, args=(what,))
            thread.start()
            thread.join(10)
        assert "waited 0.05 s for the end of writes to the drive" in caught[0]
        assert "waited 0.05 s for the end of another write" in caught[1]
    with window.reading(), pytest.raises(FlashError, match="pages that are read for the host"):
        with window.writing():
            pass
    with window.writing(), pytest.raises(FlashError, match="writes"), window.reading():
        pass
    with window.writing():
        pass


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
