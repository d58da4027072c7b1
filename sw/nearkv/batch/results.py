# SPDX-License-Identifier: Apache-2.0
"""The result file, which is its own journal.

Each line's `id` names the run that it belongs to and the line of the input that it answers:

    nearkv-INPUT-MODEL-SETTINGS-17

so what is done can be read from the file alone, whatever ended the run before, and results of two runs never mix.
Lines are appended whole and the drive has them before more is computed; at most the lines of the last append
can be torn, and these are cut off and computed again.
"""

from collections.abc import Mapping
import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
import re
import stat
from typing import Any, NamedTuple

_ID = re.compile(r"nearkv-([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{8})-([1-9][0-9]*)")
_BEGIN = b'{"id": "nearkv-'  # of every line


class Run(NamedTuple):
    """What makes two runs the same: 8 hexadecimal digits each."""

    input: str
    model: str
    settings: str

    def id(self, line: int) -> str:
        """Of the result of a line."""
        return f"nearkv-{self.input}-{self.model}-{self.settings}-{line}"


class Results:
    """A result file, open for one run. A context manager.

    Parameters
    ----------
    path : path
        Made if it is missing. Nothing in it is changed before `begin`.

    Attributes
    ----------
    done : set of int
        Lines of the input that have a result.
    failed : set of int
        Of these, the lines whose result is an error.
    n_cut : int
        Bytes of torn lines.

    Raises
    ------
    OSError
        If it cannot be written, or another process has it.
    ValueError
        If it holds something else, or is damaged before its end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self._runs: set[Run] = set()
        is_new = not path.exists()
        if not is_new and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no file that could be read again to go on with the run")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise self._cannot("write", error) from None
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(errno.EAGAIN, "another run is writing this file", str(path)) from None
            if is_new:
                _sync_directory(path)
            self._end = self._read()
            self.n_cut = os.fstat(self._fd).st_size - self._end
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Find out what is done; where the last whole line ends."""
        end, torn = 0, 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                found = _id_of(line)
                if found is None:
                    torn = torn or number
                    if not _may_be_torn(line):
                        break
                    continue
                if torn:
                    break
                run, done, failed = found
                self._runs.add(run)
                self._count(done, failed)
                end += len(line)
            else:
                return end
        if not self.done:
            raise ValueError(
                f"{self.path} holds something else than results of nearkv batch; choose another file"
            )
        raise ValueError(
            f"{self.path} is damaged: line {torn} is no result; choose another file, or remove that line "
            "to have it computed again"
        )

    def begin(self, run: Run) -> None:
        """Go on with a run: cut off what is torn.

        Raises
        ------
        ValueError
            If the results are those of another run; the message says what differs.
        OSError
            If the file cannot be written.
        """
        for other in self._runs - {run}:
            what = {
                "input": "another input file (or this one, as it was before it was changed)",
                "model": "another model",
                "settings": "other settings (--kv-dtype, --max-tokens or --seed)",
            }
            names = [
                what[name] for name in run._fields if getattr(run, name) != getattr(other, name)
            ]
            raise ValueError(
                f"{self.path} holds results of {' and '.join(names)}; go on with it as it was begun, or "
                "choose another file"
            )
        self._run = run
        self._cut()

    def id(self, line: int) -> str:
        """Of the result of a line of the input, in the run that was begun."""
        return self._run.id(line)

    def write(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Append results, by line of the input; the drive has them when this returns.

        Raises
        ------
        OSError
            If they could not be written; none of them is there then.
        """
        text = "".join(f"{json.dumps(record)}\n" for record in records.values()).encode()
        try:
            left = text
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            raise self._cannot("write", error) from None
        self._end += len(text)
        for line, record in records.items():
            self._count(line, record["error"] is not None)

    def _count(self, line: int, failed: bool) -> None:
        self.done.add(line)
        if failed:
            self.failed.add(line)

    def _cut(self) -> None:
        if os.fstat(self._fd).st_size != self._end:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)

    def _cannot(self, what: str, error: OSError) -> OSError:
        return OSError(error.errno, f"cannot {what} results: {error.strerror}", str(self.path))

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _id_of(line: bytes) -> tuple[Run, int, bool] | None:
    """Run and line of a result, and whether it is an error; None if this is no whole result."""
    if not line.startswith(_BEGIN) or not line.endswith(b"}\n"):
        return None
    try:
        record = json.loads(line)
        match, failed = _ID.fullmatch(record["id"]), record["error"] is not None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (Run(*match.group(1, 2, 3)), int(match[4]), failed) if match else None


def _may_be_torn(line: bytes) -> bool:
    """Whether this may be what a loss of power left of a line: its beginning, and zeros for the rest."""
    text = line.rstrip(b"\0")
    return text.startswith(_BEGIN[: len(text)])


def _sync_directory(path: Path) -> None:
    """Make the drive keep the name of a new file."""
    fd = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
