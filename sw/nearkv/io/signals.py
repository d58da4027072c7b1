# SPDX-License-Identifier: Apache-2.0
"""Signals wait while something is changed that must not be left half done.

Python calls the handler of a signal between any two steps of the main thread, and most handlers raise:
KeyboardInterrupt for Ctrl-C, often SystemExit for SIGTERM. Inside a change of a store that would leave
a lock taken, a file open, or memory and journal at odds. So handlers are called when the change is over,
which takes as long as the drive takes, or where it waits for something (`deliver`, every SLICE_S).
"""

from collections.abc import Iterator
import contextlib
import signal
import threading

# The same functions without enums, which take ten times as long: decoding comes here.
try:
    import _signal as quick  # pyright: ignore[reportMissingImports]
except ImportError:  # another Python
    quick = signal

_NUMBERS = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
SLICE_S = 0.05

_main = threading.main_thread()
_depth = 0  # of `waiting` in the main thread; the others are never interrupted
_handlers = {}  # that are to be called, by signal
_came = {}  # the frame that a signal interrupted, by signal


def _note(number, frame):
    """Stands in for the handlers."""
    if _depth:
        _came[number] = frame
    else:  # `waiting` itself was interrupted while it began or ended
        _handlers[number](number, frame)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Signals that have a handler in Python wait until the end of this. May be nested."""
    global _depth
    if threading.current_thread() is not _main:
        yield
        return
    if not _depth:
        for number in _NUMBERS:
            handler = quick.getsignal(number)
            if callable(handler) and handler is not _note:
                _handlers[number] = handler
                quick.signal(number, _note)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _restore()
            deliver()


def deliver() -> None:
    """Call the handlers of signals that have come. They may raise."""
    if threading.current_thread() is _main:
        while _came:
            number, frame = _came.popitem()
            _handlers[number](number, frame)


def forked() -> None:
    """In a process that was forked, perhaps while the main thread was in the middle of something."""
    global _depth, _main
    _main, _depth = threading.main_thread(), 0
    _came.clear()
    _restore()


def _restore() -> None:
    for number, handler in _handlers.items():
        if quick.getsignal(number) is _note:
            quick.signal(number, handler)
