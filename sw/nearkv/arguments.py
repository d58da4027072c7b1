# SPDX-License-Identifier: Apache-2.0
"""What the commands' arguments have in common: their kinds, and errors of one line."""

import argparse
from collections.abc import Callable
import math
import os
from pathlib import Path
import re
import shlex

MOST = 2**40  # more of anything is a slip of the hand


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def whole(least: int = 1) -> Callable[[str], int]:
    """The kind of a whole number, for `type=`."""

    def kind(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text.strip()) or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        return int(text)

    return kind


def amount(text: str) -> float:
    """The kind of a number of at least 0, for `type=`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def share(text: str) -> float:
    """The kind of a probability above 0, for `type=`."""
    value = amount(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text!r}")
    return value


def size(text: str) -> int:
    """The kind of a number of bytes such as 512M or 1.5G, in powers of 1024, for `type=`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    value = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not 1 <= value <= 2**60:
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes such as 512M or 4G, not {text!r}"
        )
    return value


def own_directory(text: str) -> Path:
    """The kind of a directory that is made where it is missing, for `type=`; its parent has to exist."""
    path = Path(text)
    if os.path.lexists(path) or not path.absolute().parent.is_dir():
        return existing_directory(text)
    return path


def existing_directory(text: str) -> Path:
    """The kind of a directory that pages go to, for `type=`.

    It has to exist: a slip in the name of a mount point must not fill the drive it is mounted on.
    """
    path = Path(text)
    if path.is_dir():
        return path
    if os.path.lexists(path):
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    parts = text.split(",")
    if len(parts) > 1 and all(map(os.path.isdir, parts)):
        raise argparse.ArgumentTypeError(
            f"there is no directory {text}; to give several, repeat the option for each"
        )
    raise argparse.ArgumentTypeError(
        f"there is no directory {text}; if it is the right one, mkdir -p {shlex.quote(text)} makes it"
    )
