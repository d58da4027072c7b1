# SPDX-License-Identifier: Apache-2.0
"""Fault campaign: break stores in thousands of ways, and see that no answer is ever wrong.

Every trial does something to a store (damages its files, kills its process, takes the power away,
fills the drive, ...) and compares what it shows afterwards with the truth beside it. It comes out

    correct   everything is there, or what must be there after a kill
    refused   an error said which file is meant and what to do about it
    failure   anything else: a wrong or shorter answer, another exception, a hang, a crash, or a change
              of something that does not belong to the store

The trial of a kind and a seed is always the same, as far as the system allows:

    python tests/faults.py                         # all kinds; exit status 1 on any failure
    python tests/faults.py --only kill --seed 17   # one trial again
"""

import argparse
from collections import Counter, deque
from collections.abc import Iterator
import contextlib
import json
import logging
import os
from pathlib import Path
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from faults import accidents, damage, sabotage
from faults.damage import Kind
from faults.world import Refused

KINDS = {kind.name: kind for kind in (*damage.KINDS, *accidents.KINDS)}
TRIALS = 12000
LIMIT_S = 90.0  # of one trial; a trial that takes longer hangs
DISK_BYTES = 5 << 20


# --- one batch, in a process of its own -----------------------------------------------------------


def run_batch(kind: type[Kind], seeds: list[int], root: Path, send) -> None:
    """Run the trials of some seeds, which share their preparations; `send(seed, outcome, text)`."""
    logging.disable(logging.CRITICAL)
    prepared = None
    for seed in seeds:
        send(seed, "begun", "")
        place = root / f"trial-{seed}"
        place.mkdir()
        try:
            if prepared is None:
                rng = random.Random(f"{kind.name}, batch {seed // kind.batch}")
                prepared = kind(rng, root / "batch")
            prepared.trial(random.Random(f"{kind.name}, {seed}"), place)
            outcome, text = "correct", ""
        except Refused as error:
            outcome, text = "refused", str(error)
        except Exception as error:
            outcome, text = "failure", "".join(traceback.format_exception_only(error)).strip()
            if "Failure: " not in text:
                text = traceback.format_exc()
        printed = _printed()
        if "Traceback" in printed and kind.name != "interrupts":  # where Python itself prints some
            outcome, text = "failure", f"printed a traceback: {printed}"
        shutil.rmtree(place, ignore_errors=True)
        send(seed, outcome, text)


def _printed() -> str:
    """What came on stderr, which is a file, since the last call."""
    sys.stderr.flush()
    text = os.pread(2, 1 << 20, 0).decode(errors="replace")
    os.ftruncate(2, 0)
    return text


class Batch:
    """A forked process that runs trials, and which of them are left."""

    def __init__(self, kind: type[Kind], seeds: list[int], base: Path, slot: int):
        self.kind, self.left, self.slot = kind, deque(seeds), slot
        self.since = time.monotonic()
        self.root = Path(tempfile.mkdtemp(dir=base))
        self.pipe, write = os.pipe()
        self._text = b""
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            os.setpgid(0, 0)
            log = os.open(self.root / "stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 2)

            def send(*message):
                os.write(write, json.dumps(message).encode() + b"\n")

            with contextlib.suppress(BaseException):
                run_batch(kind, seeds, self.root, send)
            os._exit(0)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)
        os.close(write)

    def messages(self) -> Iterator[tuple[int, str, str]] | None:
        """Outcomes that have come; None when the process has ended."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            return None
        *lines, self._text = (self._text + data).split(b"\n")
        return iter([tuple(json.loads(line)) for line in lines])

    def end(self) -> int:
        """Make sure that it has ended, with all that it started; its status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        shutil.rmtree(self.root, ignore_errors=True)
        return status


# --- all of them -------------------------------------------------------------------------------------


class Campaign:
    """Runs batches side by side and counts what comes of them."""

    def __init__(self, base: Path, jobs: int, disks: list[Path], limit_s: float = LIMIT_S):
        self._base, self._jobs, self._disks, self._limit_s = base, jobs, disks, limit_s
        self.failures: list[str] = []
        self.quiet = False
        self.counts: dict[str, Counter] = {}
        self.seconds: Counter = Counter()

    def run(self, work: list[tuple[str, list[int]]], *, until_failure: bool = False) -> None:
        """Carry out batches: (kind, seeds)."""
        waiting, running = deque(work), {}
        slots = list(range(self._jobs))
        with selectors.DefaultSelector() as selector:
            while waiting or running:
                if until_failure and self.failed:
                    for batch in running.values():
                        batch.end()
                    return
                while waiting and slots:
                    name, seeds = waiting.popleft()
                    batch = self._start(name, seeds, slots.pop(0))
                    running[batch.pipe] = batch
                    selector.register(batch.pipe, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(1.0)}
                for pipe, batch in list(running.items()):
                    over = not self._listen(batch) if pipe in ready else False
                    late = time.monotonic() - batch.since > self._limit_s
                    if not over and not late:
                        continue
                    selector.unregister(pipe)
                    status = batch.end()
                    del running[pipe]
                    slots.append(batch.slot)
                    if batch.left:
                        what = f"hangs: more than {self._limit_s:g} s" if late else (
                            f"the process ended with status {status:#x}"
                        )  # fmt: skip
                        self._count(batch.kind, batch.left.popleft(), "failure", what)
                    if batch.left:
                        waiting.appendleft((batch.kind.name, list(batch.left)))

    def _start(self, name: str, seeds: list[int], slot: int) -> Batch:
        if self._disks:
            accidents.FullDisk.disk = self._disks[slot]
        return Batch(KINDS[name], seeds, self._base, slot)

    def _listen(self, batch: Batch) -> bool:
        messages = batch.messages()
        if messages is None:
            return False
        for seed, outcome, text in messages:
            if outcome != "begun":
                batch.left.popleft()
                self._count(batch.kind, seed, outcome, text)
                self.seconds[batch.kind.name] += time.monotonic() - batch.since
            batch.since = time.monotonic()
        return True

    def _count(self, kind: type[Kind], seed: int, outcome: str, text: str) -> None:
        counts = self.counts.setdefault(kind.name, Counter())
        counts["trials"] += 1
        counts[outcome] += 1
        if outcome == "failure":
            self.failures.append(text)
        if outcome == "failure" and not self.quiet:
            print(f"FAILURE {kind.name} {seed}: {text[-3000:]}")
            print(f"    again: python tests/faults.py --only {kind.name} --seed {seed}", flush=True)

    def table(self, *, seconds: bool = False) -> str:
        """What came of it, a line for each kind."""
        columns = ("trials", "correct", "refused", "failure")
        lines = [f"{'kind':12} {'':52}" + "".join(f"{name:>9}" for name in columns)]
        total: Counter = Counter()
        for name, kind in KINDS.items():
            if counts := self.counts.get(name):
                total += counts
                what = (kind.__doc__ or "").split(":")[0].split("\n")[0].split(",")[0].rstrip(".")
                if seconds:
                    what = f"{1000 * self.seconds[name] / counts['trials']:.0f} ms a trial"
                lines.append(f"{name:12} {what:52}" + "".join(f"{counts[c]:9}" for c in columns))
        lines.append(f"{'total':65}" + "".join(f"{total[c]:9}" for c in columns))
        return "\n".join(lines)

    @property
    def failed(self) -> bool:
        return any(counts["failure"] for counts in self.counts.values())


def plan(names: list[str], trials: int, first: int) -> list[tuple[str, list[int]]]:
    """Batches of trials, in proportion to the kinds' shares; kinds in turns."""
    whole = sum(KINDS[name].share for name in names)
    batches = []
    for name in names:
        kind = KINDS[name]
        seeds = range(first, first + max(1, round(trials * kind.share / whole)))
        by_batch: dict[int, list[int]] = {}
        for seed in seeds:
            by_batch.setdefault(seed // kind.batch, []).append(seed)
        for i, mine in enumerate(by_batch.values()):
            batches.append((i / len(by_batch), name, mine))
    return [(name, seeds) for _, name, seeds in sorted(batches)]


@contextlib.contextmanager
def small_disks(base: Path, count: int) -> Iterator[tuple[list[Path], str]]:
    """File systems that are soon full, and of which kind they are; none where mounting is forbidden."""
    disks: list[Path] = []
    what = "ENOSPC injected"
    try:
        for i in range(count):
            image, mount = base / f"disk-{i}.img", base / f"disk-{i}"
            mount.mkdir()
            for kind in ("ext4 in a file", "tmpfs"):
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    if kind == "tmpfs":
                        size = f"size={DISK_BYTES}"
                        _quietly("mount", "-t", "tmpfs", "-o", size, "tmpfs", mount)
                    else:
                        with open(image, "wb") as file:
                            file.truncate(DISK_BYTES)
                        _quietly(
                            "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-N", "256", image
                        )
                        _quietly("mount", "-o", "loop", image, mount)
                    disks.append(mount)
                    what = kind
                    break
        yield (disks if len(disks) == count else []), what
    finally:
        for mount in disks:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _quietly("umount", "--lazy", mount)


def _quietly(*command) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60)


def check_sabotages(
    names: list[str], trials: int, base: Path, jobs: int, disks: list[Path]
) -> bool:
    """Break the store in every way that is known, and see that the campaign notices."""
    good = True
    for name in names:
        broken = sabotage.SABOTAGES[name]
        read, write = os.pipe()
        if not (pid := os.fork()):
            broken.apply()
            campaign = Campaign(base, jobs, disks, limit_s=40.0)
            campaign.quiet = True
            campaign.run(plan([broken.kind], trials, 0), until_failure=True)
            n_trials = sum(counts["trials"] for counts in campaign.counts.values())
            os.write(write, json.dumps([n_trials, campaign.failures[:1]]).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        with os.fdopen(read) as file:
            n_trials, failures = json.loads(file.read())
        what = f"noticed after {n_trials} trials of {broken.kind}" if failures else (
            f"not noticed in {n_trials} trials of {broken.kind}"
            + (f": {broken.unnoticed}" if broken.unnoticed else ", AND IT SHOULD BE")
        )  # fmt: skip
        print(f"{name:36} {what}", flush=True)
        for text in failures:
            print(f"    {text.strip().splitlines()[-1][:110]}", flush=True)
        good = good and bool(failures or broken.unnoticed)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, help=f"of all kinds together; default {TRIALS}")
    parser.add_argument("--seed", type=int, help="the first; with --only, one trial alone")
    parser.add_argument("--only", choices=KINDS, help="trials of this kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument(
        "--directory", type=Path, help="where the stores lie; default memory or TMPDIR"
    )
    parser.add_argument("--times", action="store_true", help="show how long the kinds take")
    parser.add_argument(
        "--sabotage", nargs="+", choices=[*sabotage.SABOTAGES, "all"], metavar="NAME",
        help="break the store on purpose first, in some ways or in all; each must be noticed",
    )  # fmt: skip
    args = parser.parse_args()
    names = [args.only] if args.only else list(KINDS)
    again = args.only and args.seed is not None
    trials = args.trials or (1 if again else TRIALS)
    directory = args.directory or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    begin = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="nearkv-faults-", dir=directory))
    try:
        with small_disks(base, args.jobs) as (disks, what):
            if args.sabotage:
                chosen = [n for n in sabotage.SABOTAGES if {n, "all"} & set(args.sabotage)]
                good = check_sabotages(chosen, args.trials or 400, base, args.jobs, disks)
                return 0 if good else 1
            campaign = Campaign(base, args.jobs, disks)
            campaign.run(plan(names, trials, args.seed or 0))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(campaign.table(seconds=args.times))
    print(
        f"{time.monotonic() - begin:.0f} s with {args.jobs} jobs, seeds from {args.seed or 0}; "
        f"full disk: {what}"
    )
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    sys.exit(main())
