# SPDX-License-Identifier: Apache-2.0
"""Kinds of trials that damage the files of a store while nobody uses it."""

from collections.abc import Callable, Sequence
import errno
import os
from pathlib import Path
import random
import struct

import numpy as np

from nearkv.attention import PageAttention
from nearkv.cards import Card, CardError, open_card
from nearkv.io import FlashError
from nearkv.io.uring import Uring
from nearkv.store import KvStore

from .world import (
    HEADS,
    LAYOUT,
    Beside,
    Failure,
    Op,
    Refused,
    Runner,
    Setting,
    Truth,
    check_error,
    check_kept,
    draw,
    matches,
    script,
    tree,
    write_tree,
)

HEADER_BYTES = 4096


class Kind:
    """Trials of one kind. A batch of them has its preparations in common.

    Parameters
    ----------
    rng : random.Random
        Of the batch.
    root : Path
        For what the batch prepares.
    """

    name = ""
    share = 1.0  # of all trials
    batch = 40  # trials that share their preparations

    def __init__(self, rng: random.Random, root: Path):
        raise NotImplementedError

    def trial(self, rng: random.Random, root: Path) -> None:
        """One trial in a new directory: returns, raises Refused, or anything else as a failure."""
        raise NotImplementedError


def verify(
    setting: Setting,
    root: Path,
    truths: Sequence[Truth],
    *,
    refusals: list[str] | None = None,
    rng: random.Random | None = None,
    cut: bool = False,
    clean: bool = False,
    look: Callable[[KvStore, Truth], None] | None = None,
) -> Truth:
    """Open a store and compare it, its snapshot and what becomes of it with what it may be.

    Parameters
    ----------
    truths : what it may hold; the last is what it would hold if nothing had happened
    refusals : what was refused goes here. None: nothing may be
    rng : carry on with it, close it and open it again
    cut : whether it has to say so when it does not hold the last of the truths
    clean : whether it was closed as it should be, and has nothing to say
    look : looks at the open store as well

    Raises
    ------
    Refused
        If it cannot be opened, and says why. Nothing has changed then.
    """
    setting = setting._replace(delayed=False)
    before = tree(root)
    try:
        store = setting.open(root)
    except (FlashError, ValueError) as error:
        text = check_error(error, root)
        if refusals is None:
            raise Failure(f"refused without a reason: {text}") from error
        if (now := tree(root)) != before:
            names = {name for name in {*now, *before} if now.get(name) != before.get(name)}
            raise Failure(f"refused, but changed {sorted(names)}: {text}") from error
        raise Refused(text) from error
    with store:
        found = matches(store, truths, root, refusals)
        if cut and not store.notices and truths[-1].differs(found.tables):
            raise Failure("something is missing, and nothing was said")
        for text in store.notices:
            if clean:
                raise Failure(f"a notice without a reason: {text}")
            if str(root) not in text:
                raise Failure(f"a notice without a name: {text}")
        if look is not None:
            look(store, found)
        if rng is None or refusals or rng.random() < 0.5:
            found = found.copy()
            check_kept(store, found, root, refusals)
    if rng is not None and not refusals:
        carry_on(setting, root, found, rng)
    return found


def carry_on(setting: Setting, root: Path, truth: Truth, rng: random.Random) -> None:
    """What was survived goes on as if nothing had happened."""
    with setting.open(root) as store:
        truth = matches(store, [truth], root)
    with Runner(setting, root) as runner:
        runner.do(Op("open"), truth)
        for _ in range(rng.randrange(1, 6)):
            op = draw(rng, truth)
            runner.do(op, truth)
            truth.apply(op)
    with setting.open(root) as store:
        matches(store, [truth], root)
        if store.notices:
            raise Failure(f"a notice without a reason: {store.notices[0]}")


class Template:
    """A store that was closed, or copied while it was in use, and how it came to be.

    Attributes
    ----------
    files : as `world.tree`
    truth : what it holds
    older : copies that were taken on the way, with their truths
    unflushed : a copy while it was in use, with the truths from the last flush on
    """

    def __init__(self, rng: random.Random, root: Path, setting: Setting, length: int = 30):
        self.setting = setting
        ops, truths = script(rng, length, setting.delayed)
        self.older: list[tuple[dict, Truth]] = []
        self.unflushed: tuple[dict, list[Truth]] | None = None
        barrier, at = 0, rng.randrange(length // 2, length)
        root.mkdir(parents=True)
        with Runner(setting, root) as runner:
            for i, op in enumerate(ops):
                runner.do(op, truths[i])
                if op.name in ("open", "flush", "save", "erase"):
                    barrier = i + 1
                    self.older.append((tree(root), truths[i + 1]))
                if i == at and not setting.delayed:
                    self.unflushed = tree(root), truths[barrier : i + 2]
        self.truth = truths[-1]
        self.truth.settle()
        self.files = tree(root)
        with setting.open(root) as store:  # does not change it
            self.places = _places(store)

    def page_files(self) -> list[str]:
        return [name for name in self.files if name.endswith(".kv")]


def _places(store: KvStore) -> list[tuple[int, int]]:
    """(shard, offset) of every page."""
    places = set()
    for sequence in store.sequences():
        for layer in store.layers(sequence):
            for entry in store.stored(sequence, layer).reshape(-1):
                places.add((int(entry["shard"]), int(entry["offset"])))
    return sorted(places)


class _Damage(Kind):
    """Trials on copies of a template, beside a second store."""

    def __init__(self, rng: random.Random, root: Path):
        setting = Setting.draw(rng)
        self.template = Template(rng, root / "template", setting)
        self.beside = Beside(root / "beside")
        self.attention = Attention(root / "card", self.template)

    def spread(self, files: dict[str, tuple], root: Path, rng: random.Random) -> None:
        """Make the store's files, and decide whether a card is to look at it."""
        write_tree(root, files)
        self.attends = rng.random() < 0.1
        if self.attends:
            self.attention.prepare()

    def judge(self, root: Path, rng: random.Random, truths=None, *, carry=0.2, **options) -> None:
        """Refused or right; what lies beside is as it was. `carry`: how often it goes on."""
        refusals: list[str] = []
        truths = [self.template.truth] if truths is None else truths
        look = self.attention.look if self.attends else None
        go_on = rng if rng.random() < carry else None
        try:
            verify(
                self.template.setting,
                root,
                truths,
                refusals=refusals,
                rng=go_on,
                look=look,
                **options,
            )
        finally:
            self.beside.check()
        if refusals:
            raise Refused(refusals[0])


class Attention:
    """The same attention on a damaged and on an undamaged store, by a card."""

    def __init__(self, root: Path, template: Template):
        self._root, self._template = root, template
        self._card: Card | None = None
        self._expected: dict[tuple[int, int], bytes] = {}

    def prepare(self) -> None:
        """Attend to the undamaged store, the first time."""
        if self._card is None:
            self._card = open_card("twin", threads=1)
            write_tree(self._root, self._template.files)
            with self._template.setting._replace(delayed=False).open(self._root) as whole:
                for place, n_pages in self._tables(self._template.truth):
                    self._expected[place] = self._attend(whole, place, n_pages)

    def look(self, store: KvStore, truth: Truth) -> None:
        """Every table: right bit for bit, or refused by name."""
        root = store.directories[0].parent
        for place, n_pages in self._tables(truth):
            if truth.table(*place) != self._template.truth.table(*place):
                continue
            try:
                got = self._attend(store, place, n_pages)
            except (FlashError, CardError) as error:
                check_error(error, root)
                continue
            if got != self._expected[place]:
                raise Failure(f"attention to sequence {place[0]}, layer {place[1]} differs")
            try:
                self._attend(store, place, n_pages + 1)
            except (FlashError, CardError) as error:
                check_error(error, root)
            else:
                raise Failure("attended to more pages than there are, and nothing was said")

    def _tables(self, truth: Truth):
        return [
            ((sequence, layer), len(table))
            for sequence, of in truth.tables.items()
            for layer, table in of.items()
            if table
        ]

    def _attend(self, store: KvStore, place: tuple[int, int], n_pages: int) -> bytes:
        assert self._card is not None
        q = np.random.default_rng(0).standard_normal((1, HEADS, 2, LAYOUT.head_dim))
        attention = PageAttention([self._card] * 1, store, ahead=False)
        try:
            partial = attention.attend(place[1], [place[0]], q, 1.0, n_pages=[n_pages])
        finally:
            attention.close()
        out, lse = partial.normalise()
        return out.tobytes() + lse.tobytes()


# --- pages -----------------------------------------------------------------------------------------


class Pages(_Damage):
    """Bytes of pages and of page files: changed, zeroed, exchanged, cut off, punched out."""

    name, share = "pages", 1.6

    def trial(self, rng, root):
        files = dict(self.template.files)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            name, at = self._place(rng)
            data = bytearray(files[name][1])
            page = LAYOUT.page_bytes
            how = rng.randrange(9)
            if how <= 1 and data:
                i = min(at + rng.randrange(page), len(data) - 1)
                data[i] ^= 1 << rng.randrange(8)
            elif how == 2:
                data[at : at + 512] = bytes(len(data[at : at + 512]))
            elif how == 3:
                data[at : at + page] = bytes(len(data[at : at + page]))
            elif how == 4:  # two pages change places
                other, there = self._place(rng)
                theirs = bytearray(files[other][1])
                mine = bytes(data[at : at + page])
                if other != name and len(mine) == page and len(theirs) >= there + page:
                    data[at : at + page], theirs[there : there + page] = (
                        theirs[there : there + page], mine,
                    )  # fmt: skip
                    files[other] = "file", bytes(theirs)
                elif len(mine) == page and len(data) >= there + page:
                    data[at : at + page], data[there : there + page] = (
                        data[there : there + page], mine,
                    )  # fmt: skip
            elif how == 5:
                del data[rng.choice((at, at + rng.randrange(page), rng.randrange(len(data) + 1))) :]
            elif how == 6:
                data[at : at + page] = rng.randbytes(len(data[at : at + page]))
            elif how == 7:
                data += rng.randbytes(rng.choice((1, 512, 4096)))
            elif data:  # the header
                data[rng.randrange(min(HEADER_BYTES, len(data)))] ^= 1 << rng.randrange(8)
            files[name] = "file", bytes(data)
        self.spread(files, root, rng)
        if rng.random() < 0.1:
            name, at = self._place(rng)
            with open(root / name, "r+b") as file:
                _punch(file.fileno(), at, LAYOUT.page_bytes * rng.randrange(1, 4))
        self.judge(root, rng)

    def _place(self, rng) -> tuple[str, int]:
        names = self.template.page_files()
        if not self.template.places or rng.random() < 0.1:
            name = rng.choice(names)
            size = len(self.template.files[name][1])
            return name, rng.randrange(size) // 4096 * 4096
        shard, offset = rng.choice(self.template.places)
        return next(name for name in names if name.endswith(f"pages-{shard}.kv")), offset


def _punch(fd: int, offset: int, nbytes: int) -> None:
    from nearkv.io import files

    files._libc.fallocate(fd, 3, offset, nbytes)


# --- the journal -------------------------------------------------------------------------------------


def edges(data: bytes) -> list[int]:
    """Where the records of a journal begin, and the end of the last."""
    at, found = 0, [0]
    while at + 28 <= len(data) and data[at : at + 4] == b"nkvJ":
        (length,) = struct.unpack_from("<I", data, at + 8)
        at += 28 + length + 4
        if at > len(data):
            break
        found.append(at)
    return found


class Journal(_Damage):
    """The journal: bytes, cuts, zeros, records that are missing, repeated, exchanged or foreign."""

    name, share = "journal", 2.0

    def __init__(self, rng, root):
        super().__init__(rng, root)
        other = Setting.draw(rng)._replace(
            **self.template.setting._replace(compact=False)._asdict()
        )
        self.foreign = Template(rng, root / "foreign", other, length=20)

    def trial(self, rng, root):
        truths, files, cut = [self.template.truth], dict(self.template.files), False
        if self.template.unflushed and rng.random() < 0.4:
            files, truths = self.template.unflushed
            files, cut = dict(files), True
        name = "kv0/journal"
        data = files[name][1]
        where = edges(data)
        how = rng.randrange(10)
        if how <= 1:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.choice(
                    (rng.randrange(len(data)), rng.choice(where[:-1]) + rng.randrange(28))
                )
                changed[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            data = bytes(changed)
        elif how == 2:
            at = rng.choice(
                (rng.randrange(len(data)), rng.choice(where), len(data) - rng.randrange(64))
            )
            data, cut = data[:at], at not in where
        elif how == 3:  # as after a loss of power
            at = rng.randrange(len(data))
            data = data[:at] + bytes(rng.choice((len(data) - at, rng.randrange(1, 9000))))
        elif how == 4:
            data += rng.randbytes(rng.randrange(1, 200))
        elif how == 5:
            at, count = rng.randrange(len(data)), rng.randrange(1, 600)
            data = data[:at] + rng.randbytes(count) + data[at + count :]
        else:
            records = [data[a:b] for a, b in zip(where, where[1:], strict=False)]
            i, j = rng.randrange(len(records)), rng.randrange(len(records))
            if how == 6:
                del records[i]
                cut = cut and i < len(records)
            elif how == 7:
                records.insert(j, records[i])
            elif how == 8:
                records[i], records[j] = records[j], records[i]
            else:
                theirs = self.foreign.files["kv0/journal"][1]
                edge = edges(theirs)
                k = rng.randrange(len(edge) - 1)
                records[i : i + rng.randrange(2)] = [theirs[edge[k] : edge[k + 1]]]
            data = b"".join(records)
        files[name] = "file", data
        self.spread(files, root, rng)
        self.judge(root, rng, truths, cut=cut)


class OldCopies(_Damage):
    """Files of an older state of the same store, put back: all, or some of them."""

    name, share = "old-copies", 1.0

    def trial(self, rng, root):
        older, then = rng.choice(self.template.older)
        files = dict(self.template.files)
        how = rng.randrange(6)
        truths = [self.template.truth]
        if how == 0:
            files, truths = dict(older), [then]
        elif how == 1:
            files["kv0/journal"] = older["kv0/journal"]
        elif how == 2:
            files["kv0/journal.end"] = older["kv0/journal.end"]
        elif how == 3:
            for name in ("kv0/journal", "kv0/journal.end"):
                files[name] = older[name]
            truths = [then]
        elif how == 4:
            name = rng.choice(self.template.page_files())
            files[name] = older.get(name, files[name])
        else:
            for name in list(files):
                if name in older and rng.random() < 0.5:
                    files[name] = older[name]
            mark = files["kv0/journal.end"] == older["kv0/journal.end"]
            if mark and files["kv0/journal"] == older["kv0/journal"]:
                truths = [then]
        for truth in truths:
            truth = truth.copy()
            truth.settle()
        self.spread(files, root, rng)
        self.judge(root, rng, truths)


# --- what describes a store ----------------------------------------------------------------------------


class Description(_Damage):
    """store.json, the mark journal.end and what was saved: changed, cut, emptied, exchanged."""

    name, share = "description", 1.0

    def __init__(self, rng, root):
        super().__init__(rng, root)
        other = self.template.setting
        self.foreign = Template(rng, root / "foreign", other, length=12)

    def trial(self, rng, root):
        files = dict(self.template.files)
        names = [
            name
            for name in files
            if Path(name).name in ("store.json", "journal.end")
            or Path(name).name.startswith("state-")
        ]
        name = rng.choice(names)
        data = bytearray(files[name][1])
        how = rng.randrange(7)
        if how <= 1 and data:
            for _ in range(rng.choice((1, 1, 3))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 2:
            del data[rng.randrange(len(data) + 1) :]
        elif how == 3:
            data = bytearray(rng.choice((0, len(data), 7)))
        elif how == 4:
            data += rng.choice((b"\n", b"}", b"\0" * 100, rng.randbytes(20)))
        elif how == 5:
            at = rng.randrange(len(data) + 1)
            data[at : at + 16] = rng.randbytes(16)
        else:
            theirs = self.foreign.files.get(name) or self.foreign.files["kv0/store.json"]
            data = bytearray(theirs[1])
        files[name] = "file", bytes(data)
        self.spread(files, root, rng)
        self.judge(root, rng)


class Names(_Damage):
    """Files and directories that are gone, renamed, exchanged, or something else altogether."""

    name, share = "names", 1.4

    def __init__(self, rng, root):
        super().__init__(rng, root)
        self.foreign = Template(rng, root / "foreign", self.template.setting, length=12)

    def trial(self, rng, root):
        self.spread(self.template.files, root, rng)
        write_tree(root / "elsewhere", self.foreign.files)
        files = [name for name, what in self.template.files.items() if what[0] == "file"]
        directories = sorted(
            name for name, what in self.template.files.items() if what[0] != "file"
        )
        path = root / rng.choice(files)
        how = rng.randrange(13)
        beside = root / "precious"
        beside.write_bytes(path.read_bytes())
        os.chmod(beside, 0o600)
        if how == 0:
            path.unlink()
        elif how == 1:
            path.rename(path.with_name(rng.choice(("x", "pages-9.kv", "journal.new", "state-7"))))
        elif how == 2:  # two files change places
            other = root / rng.choice(files)
            self._exchange(path, other)
        elif how == 3:  # with another store
            other = root / "elsewhere" / path.relative_to(root)
            if other.exists():
                self._exchange(path, other)
        elif how == 4:
            path.unlink()
            path.symlink_to(rng.choice((beside, root / "nowhere", path)))
        elif how == 5:
            path.unlink()
            os.link(beside, path)
        elif how == 6:
            path.unlink()
            path.mkdir()
        elif how == 7:
            path.unlink()
            os.mkfifo(path)
        elif how == 8:  # something that is not the store's
            name = rng.choice(("journal.new", "state-9", "state-x", "pages-7.kv", "notes"))
            other = path.with_name(name)
            if not other.exists():
                self._plant(rng, other, beside)
        elif how == 9 and len(directories) > 1:  # directories in another order
            one, two = rng.sample(directories, 2)
            self._exchange(root / one, root / two)
        elif how == 10:
            directory = root / rng.choice(directories)
            directory.rename(root / "away")
            if rng.random() < 0.6:
                directory.mkdir(mode=0o700)
        elif how == 11:
            directory = rng.choice(directories)
            self._exchange(root / directory, root / "elsewhere" / directory)
        else:
            path.unlink()
            directory = rng.choice(directories)
            if rng.random() < 0.5:
                for name in (root / directory).iterdir():
                    name.unlink()
        before = tree(root / "elsewhere"), beside.read_bytes()
        truths = [self.template.truth]
        if how == 11 and len(directories) == 1:
            truths = [self.foreign.truth]
        if len(directories) == 1 and not any((root / "kv0").glob("*")):
            truths = [Truth()]  # nothing is left of it, and a new one is made there
        try:
            self.judge(root, rng, truths)
        finally:
            if how != 11 and (tree(root / "elsewhere"), beside.read_bytes()) != before:
                raise Failure("changed what lies outside the store")

    def _exchange(self, one: Path, two: Path) -> None:
        if one == two:
            return
        between = one.with_name("between")
        one.rename(between)
        two.rename(one)
        between.rename(two)

    def _plant(self, rng, path: Path, beside: Path) -> None:
        what = rng.randrange(4)
        if what == 0:
            path.mkdir()
        elif what == 1:
            path.symlink_to(beside)
        elif what == 2:
            os.link(beside, path)
        else:
            path.write_bytes(rng.randbytes(100))


# --- reads ---------------------------------------------------------------------------------------------


class Reads(_Damage):
    """Reads that fail or bring less than was asked for."""

    name, share = "reads", 1.0

    def trial(self, rng, root):
        self.spread(self.template.files, root, rng)
        first, left = rng.randrange(60), rng.choice((1, 1, 3, 1000))
        count = 0
        kind = rng.choice(("errno", "short", "odd", "nothing"))
        code = rng.choice((errno.EIO, errno.ENODATA, errno.EBADMSG))

        def fate():
            nonlocal count
            count += 1
            return kind if first <= count < first + left else ""

        preadv, pread, read, completions = os.preadv, os.pread, Uring.read, Uring.completions
        failing = set()

        def faulty_preadv(fd, buffers, offset):
            what = fate()
            if what == "errno":
                raise OSError(code, os.strerror(code))
            view = memoryview(buffers[0]).cast("B")
            most = {"short": len(view) // 2 // 512 * 512, "odd": 1000, "nothing": 0}
            return preadv(fd, [view[: most.get(what, len(view))]], offset)

        def faulty_pread(fd, nbytes, offset):
            what = fate()
            if what == "errno":
                raise OSError(code, os.strerror(code))
            return pread(fd, {"short": nbytes // 2, "odd": 7}.get(what, nbytes), offset)

        def faulty_read(ring, key, fd, offset, address, nbytes):
            what = fate()
            if what == "errno":
                failing.add((ring, key))
            most = {"short": max(512, nbytes // 2 // 512 * 512), "odd": 512}.get(what, nbytes)
            read(ring, key, fd, offset, address, most)

        def faulty_completions(ring):
            for key, result in completions(ring):
                if (ring, key) in failing:
                    failing.remove((ring, key))
                    result = -code
                yield key, result

        os.preadv, os.pread = faulty_preadv, faulty_pread
        Uring.read, Uring.completions = faulty_read, faulty_completions
        try:
            self.judge(root, rng, carry=0)
        finally:
            os.preadv, os.pread = preadv, pread
            Uring.read, Uring.completions = read, completions


KINDS = (Pages, Journal, OldCopies, Description, Names, Reads)
