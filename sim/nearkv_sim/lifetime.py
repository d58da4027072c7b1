# SPDX-License-Identifier: Apache-2.0
"""Who may use a simulated card, and when what it holds is freed."""

from collections.abc import Callable
import os
import threading

# For a run to stop. It does in a second at most, unless the machine is very busy.
_STOP_TIMEOUT_S = 60.0


class ClosedError(RuntimeError):
    """The card was closed while a run was under way."""


class Lifetime:
    """One thread at a time uses a card; any thread may close it, at any time.

    What the card holds is freed once, when it is closed and nobody uses it: by `close` or, if a run
    was under way, by that run when it has stopped.

    Parameters
    ----------
    free : callable
        Frees it. Not called in a process that was forked later, which has no threads of it.
    stop : callable, optional
        Asks a run under way to end soon. Called from the thread that closes.
    """

    def __init__(self, free: Callable[[], object], stop: Callable[[], object] = lambda: None):
        self._to_free, self._stop = [free], stop
        self._changed = threading.Condition()  # re-entrant: a signal handler may close, too
        self._user: int | None = None  # the thread that uses the card
        self._depth = 0
        self._closing = False
        self._process = os.getpid()

    def use(self) -> "_Use":
        """For as long as the card is needed, in a `with`; may be nested.

        Raises
        ------
        ValueError
            If the card is closed.
        RuntimeError
            If another thread uses it, or if it was opened before this process was forked.
        """
        return _Use(self)

    def _begin(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the card belongs to process {self._process}, from which this one was forked; "
                "open a card of its own here"
            )
        me = threading.get_ident()
        with self._changed:
            if self._closing and self._user != me:
                raise ValueError("the card is closed; open another")
            if self._user not in (None, me):
                raise RuntimeError("another thread uses the card: one run at a time")
            self._user = me
            self._depth += 1

    def _end(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._user = None
                self._free_if_closed()
                self._changed.notify_all()

    def check(self) -> None:
        """Called by a run every now and then.

        Raises
        ------
        ClosedError
            If the card was closed meanwhile.
        """
        if self._closing:
            raise ClosedError("the card was closed while it ran; its partials are not complete")

    def close(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Let no further run begin, stop the one under way, and free what the card holds.

        Returns when that is done. A second call does nothing. Called by the thread that runs, from a
        signal handler, it does not wait: the run ends after it. In a process that was forked after
        the card was opened it does nothing.

        Raises
        ------
        TimeoutError
            If the run has not stopped after `timeout_s`; it frees the card when it does.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            self._free_if_closed()
            if not self._to_free:
                return
            self._stop()
            if self._user == threading.get_ident():
                return
            if not self._changed.wait_for(lambda: not self._to_free, timeout_s):
                raise TimeoutError(
                    f"the run under way in another thread has not stopped within {timeout_s:g} s "
                    "after its card was closed"
                )

    def abandon(self) -> None:
        """`close` for a finalizer: without waiting, and without freeing what is in use."""
        if os.getpid() == self._process:
            with self._changed:
                self._closing = True
                self._free_if_closed()

    def _free_if_closed(self) -> None:
        if self._closing and self._user is None and self._to_free:
            self._to_free.pop()()


class _Use:
    """`Lifetime.use`. A class, as a generator takes longer than a small run can bear."""

    def __init__(self, lifetime: Lifetime):
        self._lifetime = lifetime

    def __enter__(self) -> None:
        self._lifetime._begin()

    def __exit__(self, *exception) -> None:
        self._lifetime._end()
