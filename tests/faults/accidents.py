# SPDX-License-Identifier: Apache-2.0
"""Kinds of trials that disturb a store at work: kills, lost power, full drives, forks, threads, signals."""

from collections.abc import Callable
import contextlib
import errno
import gc
import mmap
import os
from pathlib import Path
import pickle
import random
import shutil
import signal
import struct
import sys
import threading
import time
import traceback

from nearkv.io import FlashError, PageId
from nearkv.store import KvStore

from .damage import Kind, verify
from .system import Call, Disk, System
from .world import (
    TIMEOUT_S,
    TOKENS,
    Beside,
    Failure,
    Op,
    Page,
    Refused,
    Runner,
    Setting,
    Truth,
    check_error,
    contents,
    draw,
    matches,
    observe,
    perform,
    read_table,
    script,
    write_tree,
)


class Progress:
    """Where a process is that may be killed: operations begun and done. Shared by a fork."""

    def __init__(self):
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    begun = property(lambda self: struct.unpack_from("<q", self._memory, 0)[0])
    done = property(lambda self: struct.unpack_from("<q", self._memory, 8)[0])

    def begin(self, i: int) -> None:
        struct.pack_into("<q", self._memory, 0, i + 1)

    def end(self, i: int) -> None:
        struct.pack_into("<q", self._memory, 8, i + 1)


class Child:
    """A forked process that runs a function and tells what came of it."""

    def __init__(self, function: Callable[[], object]):
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(read)
            outcome: object = None
            try:
                outcome = function()
            except BaseException as error:
                outcome = _portable(error)
            os.write(write, pickle.dumps(outcome))
            os._exit(0)
        os.close(write)
        self._pipe = read

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, *, killed: bool = False) -> object:
        """What the function returned; its Failure or Refused is raised.

        `killed` says that it may have been killed; None then.
        """
        with os.fdopen(self._pipe, "rb") as file:
            data = file.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status) or not data:
            if killed and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM):
                return None
            raise Failure(f"a process ended with status {status:#x}")
        outcome = pickle.loads(data)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _portable(error: BaseException) -> Exception:
    if isinstance(error, (Failure, Refused)):
        return type(error)(str(error))
    return Failure("".join(traceback.format_exception(error)))


def retried(runner: Runner, root: Path, refusals: list[str]) -> None:
    """Write what waits: each failed write is told once, and tried again."""
    assert runner.store is not None
    for _ in range(60):
        try:
            runner.store.flush()
        except FlashError as error:
            refusals.append(check_error(error, root))
        else:
            return
    raise Failure(f"flush goes on failing without a fault: {refusals[-1]}")


class _Accident(Kind):
    """Trials beside a second store."""

    def __init__(self, rng: random.Random, root: Path):
        self.beside = Beside(root / "beside")
        self.prepare(rng, root)

    def prepare(self, rng: random.Random, root: Path) -> None:
        """What the trials of a batch share."""

    def trial(self, rng: random.Random, root: Path) -> None:
        try:
            self.accident(rng, root)
        finally:
            self.beside.check()

    def accident(self, rng: random.Random, root: Path) -> None:
        raise NotImplementedError


# --- kill -9 -----------------------------------------------------------------------------------------


class Kill(_Accident):
    """kill -9 before, in the middle of and after every call that changes something."""

    name, share = "kill", 2.6
    length = 26

    def prepare(self, rng, root):
        self.setting = Setting.draw(rng)
        self.ops, self.truths = script(rng, self.length, self.setting.delayed)
        self.calls: list[tuple[str, Call]] = []  # with the operation that makes each
        root = root / "rehearsal"
        root.mkdir()
        with (system := System()).installed(), Runner(self.setting, root) as runner:
            for i, op in enumerate(self.ops):
                runner.do(op, self.truths[i])
                new = system.calls[len(self.calls) :]
                self.calls += [(op.name if i else "create", call) for call in new]

    def accident(self, rng, root):
        # Operations alike, however many calls they make.
        of_op: dict[str, list[Call]] = {}
        for name, call in self.calls:
            of_op.setdefault(name, []).append(call)
        call = rng.choice(of_op[rng.choice(sorted(of_op))])
        how = rng.choice(
            ("before", "middle", "after") if call.name == "pwrite" else ("before", "after")
        )
        progress = Progress()

        def work():
            system = System(lambda made: how if made.n == call.n else None)
            with system.installed():
                runner = Runner(self.setting, root)
                for i, op in enumerate(self.ops):
                    progress.begin(i)
                    runner.do(op, self.truths[i])
                    progress.end(i)

        Child(work).wait(killed=True)
        truths = [self.truths[i] for i in sorted({progress.done, progress.begun})]
        # Half a description is refused: nothing is stored by then.
        half = (call.name, call.about, how) == ("pwrite", "store.json", "middle")
        verify(self.setting, root, truths, rng=rng, refusals=[] if half else None)


class KillMaking(Kill):
    """The same while a store is made or opened again."""

    name, share = "kill-making", 0.8
    length = 1

    def prepare(self, rng, root):
        super().prepare(rng, root)
        self.setting = self.setting._replace(delayed=False)


class KillAtAnyTime(Kill):
    """SIGKILL or SIGTERM from outside, at any time."""

    name, share = "kill-anytime", 0.5

    def prepare(self, rng, root):
        begin = time.perf_counter()
        super().prepare(rng, root)
        self.seconds = time.perf_counter() - begin

    def accident(self, rng, root):
        progress = Progress()
        temporary = rng.random() < 0.2

        def work():
            runner = Runner(self.setting, root, temporary=temporary)
            for i, op in enumerate(self.ops):
                if temporary and op.name in ("save", "restore", "open") and i:
                    continue  # what it holds then does not matter
                progress.begin(i)
                if temporary and op.name == "read":
                    continue
                with contextlib.suppress(FlashError) if temporary else contextlib.nullcontext():
                    runner.do(op, self.truths[i])
                progress.end(i)

        child = Child(work)
        time.sleep(rng.uniform(0, self.seconds * 1.5))
        child.kill(rng.choice((signal.SIGKILL, signal.SIGTERM)))
        child.wait(killed=True)
        if temporary:
            if left := [path for path in root.rglob("*") if not path.is_dir()]:
                raise Failure(f"a temporary store has left {left}")
            return
        truths = [self.truths[i] for i in sorted({progress.done, progress.begun})]
        verify(self.setting, root, truths, rng=rng)


# --- loss of power -----------------------------------------------------------------------------------


class Power(_Accident):
    """Loss of power: what was written since the last fsync may be there or not, in any part."""

    name, share = "power", 2.0
    batch = 60

    def prepare(self, rng, root):
        self.setting = Setting.draw(rng, delayed=rng.random() < 0.2)
        self.ops, self.truths = script(rng, 26, self.setting.delayed)
        if not self.setting.delayed:  # some processes are killed: nothing is flushed then
            self.ops = [
                Op("abandon") if i and op.name == "open" and rng.random() < 0.6 else op
                for i, op in enumerate(self.ops)
            ]
        self.events: list[tuple] = []
        root = root / "recording"
        root.mkdir()
        self.parent = root.stat().st_ino
        system = System(after=self.events.append)
        with system.installed(), Runner(self.setting, root) as runner:
            for i, op in enumerate(self.ops):
                self.events.append(("begin", i))
                if op.name == "abandon":
                    assert runner.store is not None
                    runner.store._closed = True
                    runner.store._home.close()
                    runner.store = None
                    op = Op("open")
                runner.do(op, self.truths[i])
                self.events.append(("end", i))
        self.directories = {
            path.stat().st_ino: str(path.relative_to(root)) for path in self.setting.paths(root)
        }

    def accident(self, rng, root):
        at = rng.randrange(len(self.events))
        if rng.random() < 0.4:  # where order matters most
            names = ("rename", "unlink", "cut", "create", "sync")
            kind = rng.choice(names[: rng.randrange(1, len(names) + 1)])
            there = [i for i, event in enumerate(self.events) if event[0] == kind] or [at]
            at = min(rng.choice(there) + rng.randrange(3), len(self.events) - 1)
        disk, barrier, begun = Disk(), 0, 0
        for event in self.events[: at + 1]:
            if event[0] == "begin":
                begun = event[1] + 1
            elif event[0] == "end":
                if self.ops[event[1]].name in ("flush", "save", "open", "erase"):
                    barrier = event[1] + 1
            else:
                disk.play(event, self.directories, self.parent)
        files = disk.crash(rng, self.directories)
        write_tree(root, files)
        refusals: list[str] = []
        try:
            found = verify(self.setting, root, self.truths[barrier : begun + 1], refusals=refusals)
        except Refused as error:
            raise Failure(f"cannot be opened any more: {error}") from error
        safe = self.truths[barrier].safe_keys()
        lost = found.unread & safe
        if lost:
            raise Failure(f"pages {sorted(lost)} were flushed and cannot be read: {refusals[0]}")
        if refusals:
            raise Refused(refusals[0])


# --- drives that fail or are full --------------------------------------------------------------------


class Errors(_Accident):
    """Writes, fsync and the like fail: once, for a while or from then on."""

    name, share = "errors", 2.0

    def accident(self, rng, root):
        setting = Setting.draw(rng)
        names = rng.choice(
            [("pwrite",), ("fsync",), ("posix_fallocate", "fallocate"), ("ftruncate",), ("rename",),
             ("unlink",), ("open", "mkdir"), ("pwrite", "fsync"), System._NAMES + ("fallocate",),
             System._NAMES + ("fallocate",)]
        )  # fmt: skip
        code = rng.choice(
            (errno.EIO, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
        )
        n_calls, first, count = (
            0,
            int(rng.expovariate(1 / 25)),
            rng.choice((1, 1, 1, 2, 4, 20, 10000)),
        )
        partly = rng.random() < 0.3

        def fate(call):
            nonlocal n_calls
            if not self.armed or call.name not in names:
                return None
            n_calls += 1
            if not first < n_calls <= first + count:
                return None
            return ("short", code) if partly and call.name == "pwrite" else code

        def work():
            with System(fate).installed():
                self.run(rng, root, setting)

        Child(work).wait()

    armed = True
    retries = True  # whether what has failed succeeds when nothing is injected

    def mend(self) -> None:
        """From here on the drive is as it should be."""

    def run(self, rng: random.Random, root: Path, setting: Setting, length: int = 40) -> None:
        """Operations of which some fail; whatever fails changes nothing."""
        truth, refusals = Truth(setting.delayed), []
        runner = Runner(setting, root)
        self.owing: Truth | None = None
        self.unsure = (
            False  # what waited to be written when a store could not be closed may be gone
        )
        for _ in range(length):
            op = self.next_op(rng, truth) if runner.store is not None else Op("open")
            try:
                runner.do(op, truth)
            except FlashError as error:
                refusals.append(check_error(error, root))
                truth = self.after_error(op, truth, runner, rng, refusals)
            else:
                if op.name == "open" and self.unsure:
                    assert runner.store is not None
                    truth, self.unsure = matches(runner.store, self.possible(truth), root), False
                truth.apply(op)
                if op.name not in ("read", "flush"):
                    self.owing = None
        truths, clean = [truth], False
        if runner.store is not None and rng.random() < 0.6:
            self.armed = False
            self.mend()
            if not self.broken(runner):
                retried(runner, root, refusals)
                truth.settle()
                clean = True
            runner.store.close()
        elif runner.store is not None:
            try:
                runner.store.close()
            except FlashError as error:
                refusals.append(check_error(error, root))
                truths += [self.owing] if self.owing else []
        self.armed = False
        self.mend()
        # What could not be written when it was closed is not there, and that was said.
        verify(setting, root, truths, rng=rng, clean=clean)
        if refusals:
            raise Refused(refusals[0])

    def possible(self, truth: Truth) -> list[Truth]:
        """The truth, and the one in which a `save` that raised is there."""
        return [truth, self.owing] if self.owing else [truth]

    def next_op(self, rng, truth) -> Op:
        return draw(rng, truth)

    def broken(self, runner: Runner) -> bool:
        """Whether a store has said that it cannot go on before it is opened again."""
        assert runner.store is not None
        try:
            runner.store.sequences()
        except FlashError:
            return True
        journal = runner.store._home.journal
        return journal is not None and bool(journal._broken)

    def after_error(self, op, truth, runner, rng, refusals) -> Truth:
        """The truth after an operation that raised."""
        truths, root = [truth], runner.root
        if op.name in (
            "erase",
            "save",
        ):  # dropped, but not erased; recorded, but not taken back yet
            done = truth.copy()
            done.apply(op)
            if op.name == "erase":
                truths.append(done)
            else:
                self.owing = done
        if truth.written and not self.retries:
            self.unsure = self.unsure or op.name == "open"
            return truth
        if len(truths) == 1 and rng.random() < 0.5 and op.name != "open":
            return truth
        armed, self.armed = self.armed, False
        if runner.store is not None and not self.broken(runner):
            retried(runner, root, refusals)
            self.owing = None
        else:
            if runner.store is not None:
                with contextlib.suppress(FlashError):
                    runner.store.close()
                runner.store = None
            with contextlib.suppress(FlashError):  # a drive that is full
                runner.do(Op("open"), truth)
            if self.owing:
                truths.append(self.owing)
        if runner.store is not None:
            truth = matches(runner.store, truths, root)
        self.armed = armed
        return truth


class FullDisk(Errors):
    """A drive that is really full, time and again."""

    name, share = "full-disk", 0.8
    disk: Path | None = None  # a small file system, where there is one

    def accident(self, rng, root):
        assert self.disk is not None
        where = self.disk / root.name
        where.mkdir()
        setting = Setting.draw(rng)
        status = os.statvfs(self.disk)
        free = status.f_bavail * status.f_frsize
        self.filler = where / "filler"
        fd = os.open(self.filler, os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(fd, 0, max(1, free - rng.randrange(60_000, 900_000)))
        os.close(fd)
        try:
            if rng.random() < 0.7:
                Child(lambda: self.run(rng, where, setting)).wait()
            else:
                Child(lambda: self._fill(rng, where, setting)).wait()
        finally:
            shutil.rmtree(where)

    def _fill(self, rng, root, setting) -> None:
        """Fill the drive again and again: what is dropped leaves as much room as there was."""
        refusals: list[str] = []
        before = 0
        with Runner(setting, root) as runner:
            try:
                runner.do(Op("open"), Truth())
            except FlashError as error:
                raise Refused(check_error(error, root)) from error
            store = runner.store
            assert store is not None
            for turn in range(4):
                truth, n_pages = Truth(), 0
                while len(refusals) <= turn:
                    op = Op(
                        "append", rng.randrange(3), 0, (Page(truth.next_key),) * rng.choice((1, 4))
                    )
                    try:
                        runner.do(op, truth)
                        store.settle(op.sequence, 0)
                        truth.apply(op)
                        n_pages += len(op.pages)
                    except FlashError as error:
                        refusals.append(check_error(error, root))
                matches(store, [truth], root) if not setting.delayed else None
                if before >= 20 and n_pages < 0.7 * before:
                    raise Failure(f"{before} pages fitted before all was dropped, then {n_pages}")
                before = max(before, n_pages)
                for sequence in store.sequences():
                    store.drop(sequence)
                if rng.random() < 0.5:
                    store.flush()
        raise Refused(refusals[0])

    retries = False

    def mend(self):
        self.filler.unlink(missing_ok=True)

    def next_op(self, rng, truth) -> Op:
        if rng.random() < 0.5 and truth.n_pages < 400:
            count = rng.choice((5, 20, 60))
            pages = tuple(Page(truth.next_key + i) for i in range(count))
            op = Op("append", 20 + rng.randrange(6), rng.choice((0, 1)), pages)
            return op
        return draw(rng, truth)

    def after_error(self, op, truth, runner, rng, refusals):
        truth = super().after_error(op, truth, runner, rng, refusals)
        if runner.store is not None and truth.tables and rng.random() < 0.5:
            # A sequence can be dropped on a full drive, or it would stay full.
            drop = Op("drop", rng.choice(sorted(truth.tables)))
            runner.do(drop, truth)
            truth.apply(drop)
        return truth


# --- forks and processes -----------------------------------------------------------------------------


class Fork(_Accident):
    """Processes that are forked from the store's: they use it, close it, end or are killed."""

    name, share = "fork", 0.6

    def accident(self, rng, root):
        Child(lambda: self._parent(rng, root)).wait()

    def _parent(self, rng, root):
        setting = Setting.draw(rng)
        truth = Truth(setting.delayed)
        runner = Runner(setting, root)
        runner.do(Op("open"), truth)
        children: dict[int, str] = {}  # and what each does
        stop = threading.Event()
        forker = None
        if rng.random() < 0.4:  # by another thread, in the middle of whatever happens
            seed = rng.random()

            def forks():
                mine = random.Random(seed)
                while not stop.wait(mine.uniform(0, 0.004)) and len(children) < 8:
                    children.update([self._fork(mine, runner)])

            forker = threading.Thread(target=forks)
            forker.start()
        for _ in range(14):
            op = draw(rng, truth, but=("open",) if forker else ())
            runner.do(op, truth)
            truth.apply(op)
            if forker is None and rng.random() < 0.3:
                children.update([self._fork(rng, runner)])
        stop.set()
        if forker is not None:
            forker.join()
        assert runner.store is not None
        runner.store.close()
        truth.settle()
        verify(setting, root, [truth], rng=rng, clean=True)
        for child, how in children.items():
            if how == "linger" or rng.random() < 0.3:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if status not in (0, signal.SIGKILL):
                raise Failure(f"a forked process ended with status {status:#x}")

    def _fork(self, rng, runner) -> tuple[int, str]:
        how = rng.choice(("use", "close", "leave", "linger", "exit"))
        pid = os.fork()
        if pid:
            return pid, how
        status = 1
        try:
            store, runner.store = runner.store, None
            if how == "use":
                for call in (
                    lambda: store.append(0, 0, *contents([Page(1)])),
                    lambda: store.read_pages(PageId(0, 0, 0, 0), 1),
                    lambda: store.drop(0),
                    store.flush,
                    lambda: store.save(b"wrong"),
                ):
                    try:
                        call()
                    except FlashError as error:
                        check_error(error, runner.root)
                    else:
                        os._exit(3)
            elif how == "close":
                store.close()
            elif how == "linger":
                time.sleep(20)
            elif how == "exit":
                del store
                gc.collect()
            status = 0
        finally:
            os._exit(status)


class Processes(_Accident):
    """Several processes want one store, also while it is made, and while they are killed."""

    name, share = "processes", 0.6

    def accident(self, rng, root):
        setting = Setting.draw(rng, delayed=False)
        if rng.random() < 0.5:
            setting.open(root).close()
        go = mmap.mmap(-1, mmap.PAGESIZE)
        seeds = [rng.random() for _ in range(rng.choice((2, 2, 3)))]
        killed = rng.random() < 0.5
        progress = [Progress() for _ in seeds]
        children = [
            Child(lambda i=i, seed=seed: self._work(i, seed, setting, root, go, progress[i]))
            for i, seed in enumerate(seeds)
        ]
        go[0] = 1
        if killed:
            time.sleep(rng.uniform(0, 0.03))
            victim = rng.randrange(len(children))
            children[victim].kill()
        outcomes = [child.wait(killed=killed) for child in children]
        refused = [text for texts in outcomes if texts for text in texts]  # type: ignore[union-attr]
        with setting.open(root) as store:
            table = read_table(store, 0, 0, root, [])
        # Everything that an append returned for is there, once, in the order of each process.
        for i, mine in enumerate(progress):
            keys = [page.key for page in table if page.key // 1000 == i]
            expected = [1000 * i + n for n in range(len(keys))]
            if keys != expected or not mine.done <= len(keys) <= mine.begun:
                raise Failure(
                    f"process {i} has appended {mine.done} pages, begun {mine.begun}, and {keys} are there"
                )
        if len(table) != sum(page.key // 1000 < len(seeds) and page.key >= 0 for page in table):
            raise Failure("there are pages that nobody has appended")
        verify(setting, root, [self._truth(table)], rng=rng)
        if refused:
            raise Refused(refused[0])

    def _truth(self, table) -> Truth:
        truth = Truth()
        if table:
            truth.apply(Op("append", 0, 0, tuple(table)))
        return truth

    def _work(self, number, seed, setting, root, go, progress) -> list[str]:
        rng, refused, n = random.Random(seed), [], 0
        while not go[0]:
            pass
        end = time.monotonic() + TIMEOUT_S
        for _ in range(rng.choice((1, 2, 4))):
            time.sleep(rng.choice((0, 0, rng.uniform(0, 0.01))))
            try:
                store = setting.open(root)
            except FlashError as error:
                refused.append(check_error(error, root))
                if "in use" not in refused[-1]:
                    raise Failure(refused[-1]) from error
                if time.monotonic() > end:
                    break
                continue
            with store:
                if rng.random() < 0.04:  # longer than others wait
                    time.sleep(0.7)
                for _ in range(rng.choice((0, 1, 3))):
                    progress.begin(n)
                    store.append(0, 0, *contents([Page(1000 * number + n)]))
                    progress.end(n)
                    n += 1
        return refused


# --- threads -------------------------------------------------------------------------------------------


class Threads(_Accident):
    """Two or four threads use one store; each has sequences of its own, and some are everybody's."""

    name, share = "threads", 0.8
    batch = 20

    SHARED, CROWD = 500, 501  # a source for all; a sequence that all append to

    def accident(self, rng, root):
        Child(lambda: self._run(rng, root)).wait()

    def _run(self, rng, root):
        sys.setswitchinterval(rng.choice((1e-6, 1e-5, 1e-4)))
        setting = Setting.draw(rng, delayed=rng.random() < 0.7)
        if rng.random() < 0.6:
            _slow_drive(random.Random(rng.random()))
        runner = Runner(setting, root)
        truth = Truth()
        runner.do(Op("open"), truth)
        store = runner.store
        assert store is not None
        shared = Op("append", self.SHARED, 0, tuple(Page(10_000 + i) for i in range(6)))
        k, v = contents(shared.pages)
        store.append(shared.sequence, 0, k, v)
        rough = rng.random() < 0.5
        workers = [
            _Worker(i, rng.random(), store, root, rough) for i in range(rng.choice((2, 2, 4)))
        ]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        before = observe(store, root)
        self._judge(before, workers)
        data = store.saved()
        if rng.random() < 0.5:
            store.flush()
        store.close()
        # Whatever the order was, memory and journal agree on it.
        with setting._replace(delayed=False).open(root) as store:
            after = observe(store, root)
            if _solid(before) != _solid(after):
                raise Failure("what was closed and what was opened again differ")
            if store.saved() != data:
                raise Failure("what was saved differs after opening again")
            if data is not None:
                store.restore()
                self._judge_snapshot(observe(store, root), data, workers)

    def _judge(self, seen, workers) -> None:
        for worker in workers:
            mine = {s: of for s, of in seen.items() if s // 10 == worker.number}
            if difference := worker.truth.differs(mine):
                raise Failure(f"thread {worker.number}: {difference}")
        crowd = seen.get(self.CROWD, {}).get(0, [])
        for worker in workers:
            keys = [page.key for page in crowd if page.key // 1000 == worker.number]
            if not worker.rough and keys != worker.crowd:
                raise Failure(
                    f"thread {worker.number} appended {worker.crowd}, and {keys} is there"
                )
        if seen[self.SHARED][0] != [Page(10_000 + i) for i in range(6)]:
            raise Failure("the shared source has changed")

    def _judge_snapshot(self, seen, data: bytes, workers) -> None:
        """Every thread's sequences are in a snapshot as they were at one time while it was made."""
        number, n = data.decode().split()
        saver = workers[int(number)]
        first, last = saver.saves[int(n)]
        for worker in workers:
            mine = {s: of for s, of in seen.items() if s // 10 == worker.number}
            states = worker.history[first[worker.number] : last[worker.number] + 1]
            if not any(not state.differs(mine) for state in states):
                raise Failure(f"the snapshot has thread {worker.number} as it never was")


def _slow_drive(rng: random.Random) -> None:
    """From here on writes of this process take their time, so that others have their turn meanwhile."""
    pwrite = os.pwrite

    def slow(*args):
        time.sleep(rng.choice((0, 0, 0.001)))
        return pwrite(*args)

    os.pwrite = slow


class _Worker:
    """One thread's operations, on sequences number * 10 .."""

    everyone: "list[_Worker]" = []

    def __init__(self, number: int, seed: float, store: KvStore, root: Path, rough: bool):
        self.number, self.store, self.root, self.rough = number, store, root, rough
        self.rng = random.Random(seed)
        self.truth, self.crowd = Truth(), []
        self.truth.next_key = 1000 * number
        self.history = [self.truth.copy()]
        self.saves: dict[int, tuple] = {}
        self.error: Exception | None = None
        if number == 0:
            type(self).everyone = []
        self.everyone.append(self)

    def run(self) -> None:
        try:
            for n in range(25):
                self._step(n)
        except Failure as error:
            self.error = error
        except Exception as error:
            self.error = Failure("".join(traceback.format_exception(error)))

    def _step(self, n: int) -> None:
        rng, truth, store = self.rng, self.truth, self.store
        what = rng.random()
        if what < 0.15:
            page = Page(truth.next_key)
            truth.next_key += 1
            self.crowd.append(page.key)
            with self._rough():
                store.append(Threads.CROWD, 0, *contents([page]))
        elif what < 0.22:
            first = [max(0, len(worker.history) - 2) for worker in self.everyone]
            number = len(self.saves)
            self.saves[number] = first, None
            store.save(f"{self.number} {number}".encode())
            self.saves[number] = first, [len(worker.history) for worker in self.everyone]
        elif what < 0.3:
            store.flush()
        elif what < 0.4:
            # Nothing that only looks may trip over what others do.
            for sequence in store.sequences():
                with contextlib.suppress(FlashError):
                    store.layers(sequence)
                    store.blocks(sequence, 0)
                store.n_pages(sequence, 0)
                store.settled(sequence, 0)
            store.n_blocks(0)
        elif what < 0.5 and self.rough:
            with self._rough():
                call = rng.randrange(3)
                if call == 0:
                    store.truncate(Threads.CROWD, 0, rng.randrange(4))
                elif call == 1:
                    store.drop(Threads.CROWD, erase=rng.random() < 0.3)
                else:
                    store.arrange({Threads.CROWD: Threads.SHARED}, n_pages=rng.randrange(6))
        elif what < 0.6:
            target = self.number * 10 + rng.randrange(4)
            count = rng.randrange(1, 7)
            after = truth.copy()
            of = after.tables.setdefault(target, {})
            for layer in {*of, 0}:
                of[layer] = [Page(10_000 + i) for i in range(count)] if layer == 0 else []
            self.history.append(after)
            store.arrange({target: Threads.SHARED}, n_pages=count)
            self.truth = after
        else:
            op = draw(rng, truth, but=("open", "flush", "save", "restore"))
            change = {"sequence": self.number * 10 + op.sequence % 4}
            if op.name == "arrange":
                targets = {self.number * 10 + target % 4: source for target, source in op.sources}
                change = {"sources": tuple(targets.items())}
            elif op.name != "append":
                change = {}
            op = op._replace(**change)
            table = truth.table(op.sequence, op.layer or 0)
            if op.name == "append" and table and table[-1].n_tokens < TOKENS:
                return
            if op.name == "read":
                got = read_table(store, op.sequence, op.layer or 0, self.root, [])
                if got != table:
                    raise Failure(f"read {got}, not {table}")
                return
            after = truth.copy()
            after.apply(op)
            self.history.append(after)  # before, so that a snapshot by another may have it
            perform(store, op)
            self.truth = after

    @contextlib.contextmanager
    def _rough(self):
        """Others may have dropped the sequence by now."""
        if not self.rough:
            yield
            return
        try:
            yield
        except FlashError as error:
            text = check_error(error, self.root)
            if "no sequence" not in text:
                raise Failure(text) from error


def _solid(tables):
    return {s: {layer: t for layer, t in of.items() if t} for s, of in tables.items()}


# --- signals -------------------------------------------------------------------------------------------


class Interrupts(_Accident):
    """KeyboardInterrupt, or SystemExit as a SIGTERM handler raises it, anywhere in the store's code."""

    name, share = "interrupts", 1.6

    def accident(self, rng, root):
        Child(lambda: self._run(rng, root)).wait()

    def _run(self, rng, root):
        setting = Setting.draw(rng)
        truth = Truth(setting.delayed)
        runner = Runner(setting, root)
        runner.do(Op("open"), truth)
        kind = rng.choice((KeyboardInterrupt, KeyboardInterrupt, SystemExit))
        signal.signal(signal.SIGINT, lambda *_: (_ for _ in ()).throw(kind()))
        exact = rng.random() < 0.6
        left = rng.choice((1, 2, 3))
        for _ in range(30):
            op = draw(rng, truth) if runner.store is not None else Op("open")
            strike = left and rng.random() < 0.25
            if not strike:
                self._plain(runner, op, truth, rng)
                truth.apply(op)
                continue
            before, after = truth.copy(), truth.copy()
            after.apply(op)
            struck = False
            arm = _trace(int(rng.expovariate(1 / 120))) if exact else _timer(rng)
            store = runner.store
            try:
                with arm:
                    runner.do(op, truth)
            except kind:
                struck = True
            except FlashError as error:
                raise Failure(f"refused without a reason: {check_error(error, root)}") from error
            if not struck:
                truth = after
                continue
            left -= 1
            truth = self._settled(runner, store, op, before, after, rng, root)
        if runner.store is not None:
            self._close(runner.store, root)
        verify(setting, root, [truth], rng=rng)

    def _plain(self, runner, op, truth, rng) -> None:
        try:
            runner.do(op, truth)
        except FlashError as error:
            raise Failure(f"refused without a reason: {error}") from error

    def _settled(self, runner, store, op, before, after, rng, root) -> Truth:
        """The truth after an interrupt: before or after the operation, and no other."""
        if op.name == "open":
            # Closing or opening was interrupted: what is open still is closed now.
            if store is not None and not store.closed:
                self._close(store, root)
            gc.collect()
            runner.store = None
            runner.do(op, before)
            before.settle()
            return before
        if rng.random() < 0.3:  # closed, as at the end of a program
            self._close(store, root)
            runner.store = None
            runner.do(Op("open"), before)
            return matches(runner.store, [before, after], root)
        try:
            store.sequences()
        except FlashError as error:  # it says that it has to be opened again
            check_error(error, root)
            self._close(store, root)
            runner.store = None
            runner.do(Op("open"), before)
        else:
            try:
                store.flush()
            except FlashError as error:
                raise Failure(f"refused without a reason: {error}") from error
            before.settle()
            after.settle()
        return matches(runner.store, [before, after], root)

    def _close(self, store, root) -> None:
        try:
            store.close()
        except FlashError as error:
            raise Failure(f"close raised: {error}") from error


@contextlib.contextmanager
def _trace(n: int):
    """SIGINT at the n-th line of the store's code from here on."""
    left = n
    done = False

    def trace(frame, event, arg):
        nonlocal left, done
        name = frame.f_code.co_filename
        if "/nearkv/store/" not in name and "/nearkv/io/" not in name and "contextlib" not in name:
            return None
        if event == "line" and not done:
            left -= 1
            if left < 0:
                done = True
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _timer(rng):
    """SIGINT some microseconds from here, unless this ends before."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, rng.choice((1e-5, 1e-4, 1e-3, 5e-3)) * rng.uniform(0.1, 2))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


KINDS = (
    Kill, KillMaking, KillAtAnyTime, Power, Errors, FullDisk, Fork, Processes, Threads, Interrupts,
)  # fmt: skip
