# SPDX-License-Identifier: Apache-2.0
"""Stores that are broken on purpose: the campaign must notice each of them."""

from collections.abc import Callable
import contextlib
import fcntl
import os
import struct
from typing import Any, NamedTuple

from nearkv.io import Directory, File, signals
from nearkv.store import home, journal, store
from nearkv.store.behind import WriteBehind
from nearkv.store.home import Home
from nearkv.store.journal import Journal
from nearkv.store.space import Space
from nearkv.store.store import KvStore
from nearkv.store.tables import Blocks, Tables


class Sabotage(NamedTuple):
    """A defect: `apply` makes it, trials of `kind` are to notice it; why not, if none can."""

    kind: str
    apply: Callable[[], Any]
    unnoticed: str = ""


SABOTAGES: dict[str, Sabotage] = {}


def _sabotage(kind: str, unnoticed: str = ""):
    def add(function):
        name = function.__name__.strip("_").replace("_", "-")
        SABOTAGES[name] = Sabotage(kind, function, unnoticed)
        return function

    return add


def _nothing(*_, **__):
    return None


@_sabotage("power")
def pages_not_synced():
    Home.sync_pages = _nothing


@_sabotage("power")
def journal_not_synced():
    real = File.sync
    File.sync = lambda self: None if self.path.name == "journal" else real(self)


@_sabotage("power")
def freed_places_used_at_once():
    Space.free_later = lambda self, freed: self.give(freed, punch=True)


@_sabotage("power")
def rewritten_journal_not_synced():
    real = File.sync
    File.sync = lambda self: None if self.path.name == "journal.new" else real(self)


@_sabotage("power")
def names_not_synced():
    Directory.sync = _nothing


@_sabotage("power", "what is not on the drive has another checksum: it is refused, never shown")
def journal_synced_before_pages():
    def sync(self):
        if self._home.journal is not None and self._unsafe:
            self._home.journal.sync()
            self._home.sync_pages()
            self._unsafe = False
            self._space.settle_limbo()

    KvStore._sync = sync


@_sabotage("journal")
def serial_numbers_ignored():
    real = Journal._record

    def record(self, data, at):
        with contextlib.suppress(struct.error):
            *_, serial, before = journal._HEAD.unpack_from(data, at)
            self._at = self._at._replace(serial=serial, check=before)
        return real(self, data, at)

    Journal._record = record


@_sabotage("old-copies")
def mark_ignored():
    Journal._read_end = lambda self: (0, 0, 0, 0)


@_sabotage("kill")
def torn_tail_not_cut():
    Journal.cut = lambda self: self._directory.remove(journal.NEW_NAME)


@_sabotage("kill")
def old_snapshot_removed_first():
    real = Home.write_state

    def write_state(self, data):
        self.remove_states(None)
        return real(self, data)

    Home.write_state = write_state


@_sabotage("kill")
def truncation_not_recorded():
    real = store.encode_change

    def encode(changes):
        return real([change for change in changes if len(change.ids)])

    store.encode_change = encode


@_sabotage("kill-making")
def half_a_store_taken_for_one():
    real = Directory.exists
    Directory.exists = lambda self, name: name != home.MAKING_NAME and real(self, name)


@_sabotage("pages")
def checksums_ignored():
    class Any:
        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

    class Pages:
        def __getattr__(self, name):
            return getattr(real, name)

        def checksums(self, *_):
            return Any()

    real = store.pages
    store.pages = Pages()  # type: ignore[assignment]


@_sabotage("names")
def links_followed():
    os.O_NOFOLLOW = 0  # type: ignore[misc]


@_sabotage("names", "pages that are not this store's have other checksums")
def headers_of_page_files_ignored():
    Home._check_header = _nothing


@_sabotage("names")
def other_stores_cleared():
    real = home._parse

    def parse(file):
        about = real(file)
        return about if about is None or not about["directory"] else None

    home._parse = parse


@_sabotage("errors")
def failed_append_not_taken_back():
    Tables.apply = _unless_empty(Tables.apply)


def _unless_empty(real):
    def apply(self, changes):
        if len(changes) == 1 and not len(changes[0].ids):
            table = self.get(changes[0].sequence, changes[0].layer)
            if table.n_waiting == 0 and changes[0].position == len(table) - 1:
                return []
        return real(self, changes)

    return apply


@_sabotage("errors")
def half_a_record_left():
    File.cut = _nothing


@_sabotage("full-disk")
def room_not_given_back():
    Space.give_room = lambda self, table: [runs.clear() for runs in table.room]


@_sabotage("full-disk")
def nothing_set_aside_for_the_journal():
    Journal._set_aside = _nothing


@_sabotage("fork")
def locks_inherited():
    home._homes = _Forgetful()  # type: ignore[assignment]


class _Forgetful:
    def add(self, _):
        pass

    def __iter__(self):
        return iter(())


@_sabotage("processes")
def no_locks():
    fcntl.flock = _nothing


@_sabotage("threads")
def no_turns():
    @contextlib.contextmanager
    def entered(self, what):
        if self._change.acquire(timeout=0.001):
            self._change.release()
        yield

    real = KvStore._entered

    def choose(self, what):
        return entered(self, what) if "append" in what else real(self, what)

    KvStore._entered = choose


@_sabotage("threads")
def spills_given_up_too_early():
    real = WriteBehind.giving_up

    @contextlib.contextmanager
    def giving_up(self, sequences):
        mine = [spill for spill in self._spills if spill.sequence in sequences]
        for spill in mine:
            self._spills.remove(spill)
            self.waiting_bytes -= spill.nbytes
        self._wait(lambda: not self._writing, "pages")
        self._spills.extend(mine)
        self.waiting_bytes += sum(spill.nbytes for spill in mine)
        with real(self, sequences):
            yield

    WriteBehind.giving_up = giving_up


@_sabotage("errors")
def spills_given_up_for_nothing():
    real = WriteBehind.giving_up

    @contextlib.contextmanager
    def giving_up(self, sequences):
        with real(self, sequences):
            pass
        yield

    WriteBehind.giving_up = giving_up


@_sabotage("kill")
def read_before_written():
    KvStore._settle = _nothing


@_sabotage("interrupts")
def signals_at_once():
    signals._NUMBERS = ()


@_sabotage("kill")
def shared_blocks_not_counted():
    Blocks.own = _nothing


@_sabotage("reads", "what is missing of a page is noticed by its checksum")
def short_reads_taken_for_whole():
    store.read_into.__globals__["os"] = _With(os, preadv=_whole)


def _whole(fd, buffers, offset):
    os.preadv(fd, buffers, offset)
    return len(memoryview(buffers[0]).cast("B"))


class _With:
    """A module of which some functions are others."""

    def __init__(self, module, **others):
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name):
        return getattr(self._module, name)
