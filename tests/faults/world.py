# SPDX-License-Identifier: Apache-2.0
"""Operations on a store, the truth beside it, and the comparison of the two.

Every page is filled with one number for each kv head, its key, so that whatever comes back says which
page it is. `Truth` is what a store is to hold, in plain lists of keys. Delayed writes make it a range:
a table whose last pages are not known to be written may be shorter by some of them after a kill.
"""

from collections.abc import Iterable
import contextlib
import os
from pathlib import Path
import random
from typing import NamedTuple

import numpy as np

from nearkv.cards import CardError
from nearkv.io import FlashError, PageId
from nearkv.store import KvStore, journal
from nearkv_hw.abi import PageLayout

LAYOUT = PageLayout(32, 32)  # the smallest pages there are: 4096 bytes
HEADS = 2
TOKENS = LAYOUT.page_tokens
TIMEOUT_S = 20.0  # of a store; nothing in a trial may take that long
_V_PATTERNS = 31000  # fp16 bit patterns below 31744 are finite


class Failure(Exception):
    """What must never happen."""


class Refused(Exception):
    """The store said what is wrong, as it should."""


class Page(NamedTuple):
    key: int
    n_tokens: int = TOKENS


GARBAGE = Page(-1)  # bytes that nobody ever stored
UNREADABLE = Page(-2)  # reading it raised what it should


class Op(NamedTuple):
    """One call of a store, or `open` (close and open again), `read` of a table."""

    name: str
    sequence: int = 0
    layer: int | None = 0
    pages: tuple[Page, ...] = ()
    sources: tuple[tuple[int, int], ...] = ()
    n_pages: int | None = None
    data: bytes = b""


class Setting(NamedTuple):
    """How a store is opened."""

    n_shards: int = 1
    several: bool = False  # a directory for each shard
    delayed: bool = False
    compact: bool = False  # the journal is written anew all the time

    @classmethod
    def draw(cls, rng: random.Random, *, delayed: bool | None = None) -> "Setting":
        shards = rng.choice((1, 1, 2, 3))
        return cls(
            shards,
            shards > 1 and rng.random() < 0.6,
            rng.random() < 0.4 if delayed is None else delayed,
            rng.random() < 0.5,
        )

    def paths(self, root: Path) -> list[Path]:
        return [root / f"kv{i}" for i in range(self.n_shards if self.several else 1)]

    def open(self, root: Path, **options) -> KvStore:
        journal.COMPACT_BYTES = 1200 if self.compact else 1 << 20
        return KvStore(
            self.paths(root), LAYOUT, HEADS, n_shards=self.n_shards,
            **{"delayed_bytes": 1 << 17 if self.delayed else 0, "timeout_s": TIMEOUT_S} | options,
        )  # fmt: skip


# --- the truth -----------------------------------------------------------------------------------

Tables = dict[int, dict[int, list[Page]]]


def _copy(tables: Tables) -> Tables:
    return {s: {layer: list(t) for layer, t in of.items()} for s, of in tables.items()}


class Truth:
    """What a store is to hold.

    Attributes
    ----------
    tables : by sequence and layer, lists of pages
    kept : None, or the bytes and the tables of the last `save`
    written : by (sequence, layer) of tables with delayed pages, how many pages are known to be written
    """

    def __init__(self, delayed: bool = False):
        self.delayed = delayed
        self.tables: Tables = {}
        self.kept: tuple[bytes, Tables] | None = None
        self.written: dict[tuple[int, int], int] = {}
        self.next_key = 0
        self.vague: set[int] = set()  # sequences without pages, which may be known or not
        self.unread: set[int] = set()  # keys that a store could not read, see `matches`

    def copy(self) -> "Truth":
        other = Truth(self.delayed)
        other.tables, other.kept = _copy(self.tables), self.kept  # `kept` is never changed in place
        other.written, other.next_key = dict(self.written), self.next_key
        other.vague, other.unread = set(self.vague), set(self.unread)
        return other

    @property
    def n_pages(self) -> int:
        return sum(len(table) for of in self.tables.values() for table in of.values())

    def safe_keys(self) -> set[int]:
        """Of all pages that are known to be written, the snapshot's too."""
        tables = _copy(self.tables)
        for (sequence, layer), n_pages in self.written.items():
            del tables[sequence][layer][n_pages:]
        everything = [tables, self.kept[1] if self.kept else {}]
        return {
            page.key
            for tables in everything
            for of in tables.values()
            for t in of.values()
            for page in t
        }

    def table(self, sequence: int, layer: int) -> list[Page]:
        return self.tables.get(sequence, {}).get(layer, [])

    def apply(self, op: Op) -> None:
        """What the operation does when it succeeds."""
        if op.name == "append":
            assert op.layer is not None
            table = self.tables.setdefault(op.sequence, {}).setdefault(op.layer, [])
            if self.delayed:
                self.written.setdefault((op.sequence, op.layer), len(table))
            table.extend(op.pages)
            self.next_key = max([self.next_key, *(page.key + 1 for page in op.pages)])
        elif op.name == "truncate":
            assert op.layer is not None
            self.written.pop((op.sequence, op.layer), None)
            del self.tables[op.sequence].setdefault(op.layer, [])[op.n_pages :]
        elif op.name == "arrange":
            before, changed = self.tables, _copy(self.tables)
            for target, source in op.sources:
                theirs, mine = before[source], before.get(target, {})
                layers = {*theirs, *mine} if op.layer is None else {op.layer}
                for layer in layers:
                    self.written.pop((source, layer), None)
                    self.written.pop((target, layer), None)
                    pages = theirs.get(layer, [])[: op.n_pages]
                    changed.setdefault(target, {})[layer] = list(pages)
            self.tables = changed
        elif op.name in ("drop", "erase"):
            del self.tables[op.sequence]
            self.settle(op.sequence)
        elif op.name == "save":
            self.settle()
            self.kept = op.data, _copy(self.tables)
        elif op.name == "restore":
            assert self.kept is not None
            self.settle()
            self.tables = _copy(self.kept[1])
        elif op.name in ("flush", "open"):
            self.settle()
        elif op.name == "read":
            assert op.layer is not None
            self.written.pop((op.sequence, op.layer), None)

    def settle(self, sequence: int | None = None) -> None:
        """Delayed pages are written by now, or gone: of a sequence, or all."""
        for place in list(self.written):
            if sequence in (None, place[0]):
                del self.written[place]

    def differs(self, seen: Tables, *, spare: int | None = None) -> str:
        """What is wrong with tables that a store has shown; nothing if they may be this truth's.

        Pages that could not be read count as right. `spare` is a sequence that is not looked at.
        """
        for sequence in sorted({*seen, *self.tables}):
            if sequence == spare:
                continue
            if sequence not in self.tables:
                return f"sequence {sequence} should not be there"
            mine = self.tables[sequence]
            if sequence not in seen:
                if sequence in self.vague and not any(mine.values()):
                    continue
                if all(
                    not pages or self.written.get((sequence, layer)) == 0
                    for layer, pages in mine.items()
                ):
                    continue
                return f"sequence {sequence} is not there"
            for layer in sorted({*mine, *seen[sequence]}):
                expected, got = mine.get(layer, []), seen[sequence].get(layer, [])
                fewest = self.written.get((sequence, layer), len(expected))
                alike = all(
                    a == b or b == UNREADABLE for a, b in zip(expected, got, strict=False)
                )  # fmt: skip
                if not alike or not fewest <= len(got) <= len(expected):
                    return (
                        f"layer {layer} of sequence {sequence} is {_short(got)} and should be "
                        f"{_short(expected)}"
                        + (f", {fewest} at least" if fewest < len(expected) else "")
                    )
        return ""


def _short(pages: Iterable[Page]) -> str:
    names = {GARBAGE: "garbage", UNREADABLE: "?"}
    return "[" + " ".join(
        names.get(page, f"{page.key}" + (f"/{page.n_tokens}" if page.n_tokens < TOKENS else ""))
        for page in pages
    ) + "]"  # fmt: skip


# --- pages and their keys --------------------------------------------------------------------------


def contents(pages: Iterable[Page]) -> tuple[np.ndarray, np.ndarray]:
    """K and V of pages: uint16 (HEADS, n_tokens, head_dim)."""
    k = []
    for head in range(HEADS):
        parts = [np.full(page.n_tokens, 1 + page.key * HEADS + head, np.uint16) for page in pages]
        k.append(np.concatenate(parts))
    k = np.stack(k)[:, :, None].repeat(LAYOUT.head_dim, axis=2)
    return k, _v_of(k)


def _v_of(k: np.ndarray) -> np.ndarray:
    return (1 + k.astype(np.uint32) * 7919 % _V_PATTERNS).astype(np.uint16)


def decode(data: np.ndarray, lengths: np.ndarray, head: int) -> list[Page]:
    """Which pages uint8 (n, page_bytes) are."""
    half = LAYOUT.page_bytes // 4
    words = np.ascontiguousarray(data).view("<u2").reshape(len(data), 2, half)
    pages = []
    for (k, v), length in zip(words, lengths.tolist(), strict=True):
        # K is [head_dim][32 tokens] and V is [32 tokens][32 channels] in pages of this shape.
        k = k.reshape(LAYOUT.head_dim, TOKENS)[:, :length]
        v = v.reshape(TOKENS, -1)[:length]
        key, theirs = divmod(int(k.flat[0]) - 1, HEADS)
        whole = (k == k.flat[0]).all() and (v == v.flat[0]).all()
        if whole and theirs == head and _v_of(k.flat[:1])[0] == v.flat[0]:
            pages.append(Page(key, length))
        else:
            pages.append(GARBAGE)
    return pages


# --- what a store shows ------------------------------------------------------------------------------


def check_error(error: BaseException, root: Path) -> str:
    """The text of an error that a user may see.

    Raises
    ------
    Failure
        If it is none of those, or does not name a file or directory and a remedy.
    """
    text = str(error)
    if not isinstance(error, (FlashError, CardError, ValueError)):
        raise Failure(f"a raw {type(error).__name__}: {text}") from error
    if str(root) not in text:
        raise Failure(f"an error that names no file: {text}") from error
    what, _, remedy = text.partition("; ")
    if not what or len(remedy) < 10:
        raise Failure(f"an error without a remedy: {text}") from error
    if isinstance(error, FlashError) and f"waited {TIMEOUT_S:g} s" in text:
        raise Failure(f"waited for nothing: {text}") from error
    return text


def read_table(
    store: KvStore, sequence: int, layer: int, root: Path, refusals: list[str]
) -> list[Page]:
    """The pages of a table as they are read, all heads agreeing."""
    n_pages = store.n_pages(sequence, layer)
    if not n_pages:
        return []
    lengths = store.stored(sequence, layer, n_pages)["page_len"]
    heads = []
    for head in range(HEADS):
        page = PageId(layer, sequence, head, 0)
        try:
            heads.append(decode(store.read_pages(page, n_pages), lengths[head], head))
            continue
        except (FlashError, ValueError) as error:
            refusals.append(check_error(error, root))
        mine = []
        for i in range(n_pages):
            try:
                data = store.read_pages(page._replace(page=i), 1)
                mine += decode(data, lengths[head, i : i + 1], head)
            except FlashError as error:
                check_error(error, root)
                mine.append(UNREADABLE)
        heads.append(mine)
    table = []
    for of_page in zip(*heads, strict=True):
        known = {page for page in of_page if page != UNREADABLE}
        table.append(known.pop() if len(known) == 1 else GARBAGE if known else UNREADABLE)
        if UNREADABLE in of_page and table[-1] != GARBAGE:
            table[-1] = UNREADABLE
    return table


def observe(store: KvStore, root: Path, refusals: list[str] | None = None) -> Tables:
    """All tables of a store, every page read. What was refused goes to `refusals`."""
    refused: list[str] = []
    tables = {
        sequence: {
            layer: read_table(store, sequence, layer, root, refused)
            for layer in store.layers(sequence)
        }
        for sequence in store.sequences()
    }
    if refusals is None and refused:
        raise Failure(f"refused without a reason: {refused[0]}")
    if refusals is not None:
        refusals += refused
    return tables


def saved(store: KvStore, root: Path, refusals: list[str] | None = None) -> bytes | None:
    """What a store says was saved."""
    try:
        return store.saved()
    except FlashError as error:
        text = check_error(error, root)
        if refusals is None:
            raise Failure(f"refused without a reason: {text}") from error
        refusals.append(text)
        return b"?"


def matches(
    store: KvStore, truths: Iterable[Truth], root: Path, refusals: list[str] | None = None
) -> Truth:
    """The first of some truths that a store agrees with, its snapshot included.

    Raises
    ------
    Failure
        If there is none.
    """
    refused: list[str] | None = None if refusals is None else []
    seen, data = observe(store, root, refused), saved(store, root, refused)
    if refusals is not None:
        refusals += refused or []
    differences = []
    for truth in truths:
        difference = truth.differs(seen)
        kept = truth.kept[0] if truth.kept else None
        if not difference and data not in (kept, b"?" if refused else kept):
            difference = f"saved was {data!r:.40} and should be {kept!r:.40}"
        if not difference:
            found = truth.copy()
            found.tables = {  # with the lengths that were seen, where they may vary
                s: {layer: t[: len(seen.get(s, {}).get(layer, []))]
                    if (s, layer) in truth.written else list(t) for layer, t in of.items()}
                for s, of in truth.tables.items()
                if s in seen
            }  # fmt: skip
            # What lost all its pages before they were written is known to this process alone.
            found.vague |= {
                s for s, _ in truth.written if not any(found.tables.get(s, {}).values())
            }
            found.written.clear()
            found.unread = {
                truth.tables[s][layer][i].key
                for s, of in seen.items() for layer, table in of.items()
                for i, page in enumerate(table) if page == UNREADABLE
            }  # fmt: skip
            return found
        differences.append(difference)
    raise Failure("; or ".join(dict.fromkeys(differences)))


def check_kept(store: KvStore, truth: Truth, root: Path, refusals: list[str] | None = None) -> None:
    """Go back to the snapshot, which is to be the truth's."""
    if truth.kept is None:
        try:
            store.restore()
        except FlashError as error:
            check_error(error, root)
            return
        raise Failure("there was no snapshot to restore")
    store.restore()
    truth.apply(Op("restore"))
    matches(store, [truth], root, refusals)


# --- operations ----------------------------------------------------------------------------------------

_WEIGHTS = {
    "append": 40, "truncate": 9, "arrange": 14, "drop": 5, "erase": 2, "flush": 8, "save": 6,
    "restore": 2, "open": 4, "read": 8,
}  # fmt: skip
MOST_PAGES = 160


def draw(rng: random.Random, truth: Truth, *, but: tuple[str, ...] = ()) -> Op:
    """An operation that is legal now."""
    weights = {name: weight for name, weight in _WEIGHTS.items() if name not in but}
    known = sorted(truth.tables)
    while True:
        (name,) = rng.choices(list(weights), list(weights.values()))
        if name in ("flush", "open"):
            return Op(name)
        if name == "save":
            data = bytes([rng.randrange(256)]) * rng.choice((0, 10, 900, 5000))
            return Op(name, data=data + str(rng.random()).encode())
        if name == "restore" and truth.kept:
            return Op(name)
        if name == "append" and truth.n_pages < MOST_PAGES:
            sequence = rng.choice((0, 1, 2, 3, 4, 5, 1 << 40))
            layer = rng.choice((0, 1, 7))
            table = truth.table(sequence, layer)
            if not table or table[-1].n_tokens == TOKENS:
                count = rng.choice((1, 1, 1, 2, 3, 5, 12))
                pages = [Page(truth.next_key + i) for i in range(count)]
                if rng.random() < 0.1:
                    pages[-1] = Page(pages[-1].key, rng.randrange(1, TOKENS))
                return Op(name, sequence, layer, tuple(pages))
        if not known:
            continue
        sequence = rng.choice(known)
        if name in ("drop", "erase"):
            return Op(name, sequence)
        layer = rng.choice([*truth.tables[sequence], rng.choice((0, 1, 7))])
        if name == "read":
            return Op(name, sequence, layer)
        if name == "truncate":
            return Op(
                name, sequence, layer, n_pages=rng.randrange(len(truth.table(sequence, layer)) + 2)
            )
        if name == "arrange":
            targets = rng.sample([0, 1, 2, 3, 4, 5, 9, 1 << 40], rng.randrange(1, 5))
            sources = tuple((target, rng.choice(known)) for target in targets)
            n_pages = rng.choice((None, None, None, 0, 1, 3))
            return Op(name, layer=rng.choice((None, None, layer)), sources=sources, n_pages=n_pages)


def perform(store: KvStore, op: Op) -> None:
    """Carry out an operation, `open` and `read` excepted."""
    if op.name == "append":
        k, v = contents(op.pages)
        store.append(op.sequence, op.layer or 0, k, v, ragged=op.pages[-1].n_tokens < TOKENS)
    elif op.name == "truncate":
        assert op.n_pages is not None
        store.truncate(op.sequence, op.layer or 0, op.n_pages)
    elif op.name == "arrange":
        store.arrange(dict(op.sources), layer=op.layer, n_pages=op.n_pages)
    elif op.name in ("drop", "erase"):
        store.drop(op.sequence, erase=op.name == "erase")
    elif op.name == "flush":
        store.flush()
    elif op.name == "save":
        store.save(op.data)
    elif op.name == "restore":
        store.restore()
    else:
        raise ValueError(op.name)


def script(
    rng: random.Random, length: int, delayed: bool, **options
) -> tuple[list[Op], list[Truth]]:
    """Operations that all succeed, the first of which makes the store, and the truth before each."""
    truth, ops, truths = Truth(delayed), [], []
    for i in range(length):
        op = draw(rng, truth, **options) if i else Op("open")
        ops.append(op)
        truths.append(truth.copy())
        truth.apply(op)
    truths.append(truth)
    return ops, truths


class Runner:
    """Carries out operations on a store that it opens, closes and opens again."""

    def __init__(self, setting: Setting, root: Path, **options):
        self.setting, self.root, self.options = setting, root, options
        self.store: KvStore | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.store is not None:
            self.store.close()

    def do(self, op: Op, truth: Truth) -> None:
        """Carry out one operation; what is read is compared with the truth before it."""
        if op.name == "open":
            store, self.store = self.store, None
            if store is not None:
                store.close()
            self.store = self.setting.open(self.root, **self.options)
            return
        assert self.store is not None
        if op.name == "read":
            got = read_table(self.store, op.sequence, op.layer or 0, self.root, refused := [])
            if refused:
                raise Failure(f"refused without a reason: {refused[0]}")
            if got != (expected := truth.table(op.sequence, op.layer or 0)):
                raise Failure(f"read {_short(got)}, not {_short(expected)}")
            return
        perform(self.store, op)


# --- what lies beside a store --------------------------------------------------------------------------


class Beside:
    """A second store and a user's file beside a store: nothing of them may change."""

    def __init__(self, root: Path):
        self.root = root
        self.setting = Setting(n_shards=2)
        root.mkdir(parents=True, exist_ok=True)
        with self.setting.open(root) as store:
            for sequence in range(3):
                perform(
                    store, Op("append", sequence, pages=tuple(Page(9000 + i) for i in range(4)))
                )
            store.save(b"beside")
        (root / "notes.txt").write_text("a file of the user")
        self.before = tree(root)

    def check(self) -> None:
        if (now := tree(self.root)) != self.before:
            names = {
                name for name in {*now, *self.before} if now.get(name) != self.before.get(name)
            }
            raise Failure(f"changed what lies beside the store: {sorted(names)}")


def tree(root: Path) -> dict[str, tuple]:
    """Every file under a directory: its kind and bytes, by name."""
    found = {}
    for entry in sorted(root.rglob("*")):
        name = str(entry.relative_to(root))
        if entry.is_symlink():
            found[name] = ("link", os.readlink(entry))
        elif entry.is_file():
            found[name] = ("file", entry.read_bytes())
        else:
            found[name] = ("directory" if entry.is_dir() else "other",)
    return found


def write_tree(root: Path, files: dict[str, tuple]) -> None:
    """Make what `tree` has found."""
    root.mkdir(parents=True, exist_ok=True)
    for name, (kind, *rest) in files.items():
        if kind == "directory":
            (root / name).mkdir(mode=0o700, exist_ok=True)
        else:
            fd = os.open(root / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            with contextlib.closing(os.fdopen(fd, "wb")) as file:
                file.write(rest[0])
