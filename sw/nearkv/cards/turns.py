# SPDX-License-Identifier: Apache-2.0
"""Taking turns: several stores share a card's memory, and several threads an attention."""

from collections.abc import Callable
import threading
from typing import Protocol

from .errors import CardError


class Turns:
    """One thread at a time. The others wait as long as it makes progress.

    A context manager, for as long as the turn lasts; entering it raises CardError if whoever has the turn
    makes no progress. (No generator: each call enters several, and those take longer.)

    Parameters
    ----------
    what : str
        What they wait for, for the error's message.
    progress : callable
        Returns a number that changes when the one whose turn it is gets on.
    timeout_s : callable
        Returns how long it may take to get on.
    """

    def __init__(self, what: str, progress: Callable[[], int], timeout_s: Callable[[], float]):
        self._what, self._progress, self._timeout_s = what, progress, timeout_s
        self._lock = threading.RLock()  # a finalizer may run in the thread whose turn it is

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        seen, limit = self._progress(), self._timeout_s()
        while not self._lock.acquire(timeout=limit):
            if self._progress() == seen:
                raise CardError(
                    f"waited {limit:g} s for {self._what}, where nothing moves; is it a thread that "
                    "hangs?"
                )
            seen = self._progress()

    def __exit__(self, *exception) -> None:
        self._lock.release()


class Tenant(Protocol):
    """Whoever has pages in a card's kv memory."""

    def leave(self) -> None:
        """Give up what is on its way; return when nothing is. Does not raise."""


class Tenancy:
    """Whose pages a card's kv memory holds at the moment. Every card has one.

    Parameters
    ----------
    name : str
        Of the card.
    timeout_s : callable
        Returns how long a load or a run of the card may take.
    """

    def __init__(self, name: str, timeout_s: Callable[[], float]):
        self.progress = 0
        self._tenant: Tenant | None = None
        what = f"a turn with card {name!r}, which another thread attends with"
        self._turns = Turns(what, lambda: self.progress, timeout_s)

    def turn(self, tenant: Tenant) -> "_Turn":
        """Have the card for oneself, in a `with`. Whoever had it before leaves first.

        Raises
        ------
        CardError
            If another thread has it and makes no progress.
        """
        return _Turn(self, tenant)

    def _begin(self, tenant: Tenant) -> None:
        self._turns.__enter__()
        before, self._tenant = self._tenant, tenant
        if before is not None and before is not tenant:
            try:
                before.leave()
            except BaseException:
                self._end()
                raise

    def _end(self) -> None:
        self._turns.__exit__()

    def moved(self) -> None:
        """A load has arrived, or a run has ended: those who wait may go on doing so."""
        self.progress += 1

    def end(self, tenant: Tenant) -> None:
        """Let a tenant leave. Whoever has the card meanwhile is waited for, and keeps it.

        Raises
        ------
        CardError
            If another thread has the card and makes no progress.
        """
        with self._turns:
            tenant.leave()
            if self._tenant is tenant:
                self._tenant = None


class _Turn:
    """`Tenancy.turn`."""

    def __init__(self, tenancy: Tenancy, tenant: Tenant):
        self._tenancy, self._tenant = tenancy, tenant

    def __enter__(self) -> None:
        self._tenancy._begin(self._tenant)

    def __exit__(self, *exception) -> None:
        self._tenancy._end()
