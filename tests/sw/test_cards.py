# SPDX-License-Identifier: Apache-2.0
"""Several cards and drives: any split gives the same bits, and all have as much to do."""

import errno
import os
import threading

import numpy as np
import pytest

import nearkv
from nearkv.attention import PageAttention, measure_cards
from nearkv.cards import CardError, open_card, open_cards, opening
from nearkv.io import FlashError, PageId
from nearkv.store import KvStore
from nearkv.store import space as store_module
from nearkv_hw.abi import PageLayout

LAYOUT = PageLayout(32, 32)
LENGTHS = (29, 3, 11, 0)  # pages


@pytest.fixture
def small_extents(monkeypatch):
    monkeypatch.setattr(store_module, "READ_BYTES", 4 * LAYOUT.page_bytes)


def _fill(store, lengths=LENGTHS, layers=(0, 1, 2), seed=0):
    rng = np.random.default_rng(seed)
    for layer in layers:
        for sequence, n_pages in enumerate(lengths):
            k, v = rng.standard_normal((2, 2, n_pages * 32, 32)).astype(np.float16)
            store.append(sequence, layer, k, v)
    return rng.standard_normal((len(lengths), 2, 3, 32))


def _attend(attention, layer, sequences, q, scale):
    """Attend to all pages there are."""
    n_pages = [attention.store.n_pages(sequence, layer) for sequence in sequences]
    return attention.attend(layer, sequences, q, scale, n_pages)


def _bits(partial):
    return [partial.run_max, partial.sums.pack()]


def _same(a, b):
    for mine, its in zip(_bits(a), _bits(b), strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.fixture
def expected(tmp_path, card):
    with KvStore(tmp_path / "whole", LAYOUT, 2) as store:
        q = _fill(store)
        attention = PageAttention(card, store, ahead=False)
        yield q, [_attend(attention, layer, range(4), q, 0.2) for layer in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("n_cards", "n_shards"), [(1, 1), (1, 3), (2, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("slots", [1, 5, 1000])
def test_any_split_over_cards_shards_and_segments_gives_the_same_bits(
    tmp_path, small_extents, expected, n_cards, n_shards, slots
):
    q, whole = expected
    cards, _ = open_cards(["model"] * n_cards, kv_bytes=slots * LAYOUT.page_bytes)
    with KvStore(tmp_path / "split", LAYOUT, 2, n_shards=n_shards) as store:
        _fill(store)
        attention = PageAttention(cards, store)
        for _ in range(2):  # the second time around, pages are there before they are asked for
            for layer in range(3):
                _same(_attend(attention, layer, range(4), q, 0.2), whole[layer])
        figures = attention.figures
        assert figures.kv_bytes == 2 * 3 * 2 * sum(LENGTHS) * LAYOUT.page_bytes
        assert figures.wasted_bytes == 0
        attention.close()
    for one in cards:
        one.close()


def test_wrong_guesses_cost_nothing_but_the_reads(tmp_path, expected, card):
    q, whole = expected
    with KvStore(tmp_path / "again", LAYOUT, 2) as store:
        _fill(store)
        attention = PageAttention(card, store)
        for layer in (0, 1, 2, 0, 2, 1, 1, 0):
            _same(_attend(attention, layer, range(4), q, 0.2), whole[layer])
            _same(_attend(attention, layer, [2], q[[2]], 0.2), whole[layer][[2]])
        assert attention.figures.wasted_bytes > 0
        # Pages that were fetched ahead, and then taken back and written anew.
        for layer in (0, 1, 2, 0):
            _attend(attention, layer, range(4), q, 0.2)
        store.truncate(0, 1, 0)
        k, v = np.random.default_rng(9).standard_normal((2, 2, 29 * 32, 32)).astype(np.float16)
        store.append(0, 1, k, v)
        changed = _attend(attention, 1, range(4), q, 0.2)
        fresh = PageAttention(card, store, ahead=False)
        _same(changed, _attend(fresh, 1, range(4), q, 0.2))
        _same(changed[[1, 2]], whole[1][[1, 2]])
        fresh.close()


def test_a_short_context_stays_in_the_same_places(tmp_path, card, monkeypatch):
    """As many segments as are on their way and in work at once, however many steps there are."""
    places = set()
    start_load = card.start_load

    def recording(reads):
        places.update(read.kv_offset for read in reads)
        return start_load(reads)

    monkeypatch.setattr(card, "start_load", recording)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = np.random.default_rng(0).standard_normal((2, 2, 32, 32)).astype(np.float16)
        for layer in range(4):
            store.append(0, layer, k, v)
        attention = PageAttention(card, store)
        for _ in range(5):
            for layer in range(4):
                _attend(attention, layer, [0], np.ones((1, 2, 3, 32)), 0.2)
        attention.close()
    assert attention._rings[0].room.segment_pages > 2  # there are others
    assert len(places) == 2 * 2  # segments, kv heads


def test_several_stores_take_turns_with_a_card(tmp_path, expected, card):
    q, whole = expected
    with KvStore(tmp_path / "a", LAYOUT, 2) as a, KvStore(tmp_path / "b", LAYOUT, 2) as b:
        both = []
        for seed, store in enumerate((a, b)):
            _fill(store, seed=seed)
            both.append(PageAttention(card, store))
        other = [_attend(both[1], layer, range(4), q, 0.2) for layer in range(3)]
        for _ in range(3):
            for layer in range(3):  # each while pages of the other's next layer are on their way
                _same(_attend(both[0], layer, range(4), q, 0.2), whole[layer])
                _same(_attend(both[1], layer, range(4), q, 0.2), other[layer])
        _attend(both[1], 0, range(4), q, 0.2)
        wasted = both[1].figures.wasted_bytes
        both[0].discard()  # of what is the other's, nothing is given up
        _attend(both[1], 1, range(4), q, 0.2)
        assert both[1].figures.wasted_bytes == wasted
        for attention in both:
            attention.close()


def _placed(store, layer=0):
    """Bytes on each shard."""
    shards = [store.stored(s, layer)["shard"].ravel() for s in range(len(LENGTHS))]
    return np.bincount(np.concatenate(shards), minlength=store.n_shards) * LAYOUT.page_bytes


def test_shards_have_equal_bytes_whatever_the_lengths(tmp_path, small_extents):
    with KvStore(tmp_path, LAYOUT, 2, n_shards=3) as store:
        _fill(store)
        placed = _placed(store)
        assert placed.sum() == 2 * sum(LENGTHS) * LAYOUT.page_bytes
        assert placed.max() - placed.min() <= 4 * LAYOUT.page_bytes
        long = store.stored(0, 0)["shard"]
        assert len(np.unique(long[0])) == 3  # one sequence, one head, three cards


def test_a_slow_card_gets_less(tmp_path, small_extents):
    with KvStore(tmp_path, LAYOUT, 2, n_shards=2, weights=[3, 1]) as store:
        _fill(store)
        fast, slow = _placed(store)
        assert fast / slow == pytest.approx(3, rel=0.3)
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
            KvStore(tmp_path, LAYOUT, 2, n_shards=2, weights=weights)


@pytest.mark.slow
def test_cards_are_measured_and_the_slow_one_gets_less(
    tmp_path, small_extents, expected, monkeypatch
):
    """What a measurement gives says more of the machine than of us: only that it is used is tested."""
    q, whole = expected
    cards, _ = open_cards(["model", "model"])
    measured, rates = [], PageAttention.rates

    def slow(attention):
        measured.append(rates(attention))
        return (
            np.array([4e9, 1e9]) if len(measured) % 4 else np.array([1e9, 9e9])
        )  # one in four is off

    monkeypatch.setattr(PageAttention, "rates", slow)
    weights = measure_cards(cards, tmp_path, LAYOUT, 2)
    assert weights == [4e9, 1e9]
    assert np.all(np.array(measured) > 0)
    assert list(tmp_path.glob("nearkv-*")) == []
    with KvStore(tmp_path / "kv", LAYOUT, 2, n_shards=2, weights=weights) as store:
        _fill(store)
        fast, slow = _placed(store)
        assert fast / slow == pytest.approx(weights[0] / weights[1], rel=0.4)
        _same(_attend(PageAttention(cards, store), 1, range(4), q, 0.2), whole[1])


def test_each_shard_can_have_a_drive_of_its_own(tmp_path, small_extents, expected):
    q, whole = expected
    drives = [tmp_path / "ssd0", tmp_path / "ssd1"]
    cards, _ = open_cards(["model", "model"])
    with KvStore(drives, LAYOUT, 2) as store:
        _fill(store)
        assert [len(list(drive.glob("*.kv"))) for drive in drives] == [1, 1]
    with KvStore(drives, LAYOUT, 2) as store:
        _same(_attend(PageAttention(cards, store), 1, range(4), q, 0.2), whole[1])
        path, _ = store.locate(PageId(1, 0, 0, 28))
        shard = store.stored(0, 1)["shard"][0, 28]
        assert path.parent == drives[shard]
    with pytest.raises(ValueError, match="holds a store with"):
        KvStore(drives[::-1], LAYOUT, 2)
    with pytest.raises(ValueError, match="a directory of its own"):
        KvStore([drives[0], drives[0]], LAYOUT, 2)
    with pytest.raises(ValueError, match="1 shards need from one directory to 1, not 2"):
        KvStore(drives, LAYOUT, 2, n_shards=1)
    fewer = [tmp_path / "fewer" / name for name in "ab"]
    for drive in fewer:
        drive.mkdir(parents=True)
    for _ in range(2):  # made, and opened again
        with KvStore(fewer, LAYOUT, 2, n_shards=3) as store:
            if not store.sequences():
                _fill(store)
            assert [len(list(drive.glob("*.kv"))) for drive in fewer] == [2, 1]
            attention = PageAttention(cards, store)
            _same(_attend(attention, 1, range(4), q, 0.2), whole[1])
            attention.close()
    with KvStore(drives, LAYOUT, 2, temporary=True) as store:
        _fill(store)
    assert not [path for drive in drives for path in drive.glob("*") if "nearkv" in path.name]


def test_attend_takes_several_cards():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((4, 64), (700, 2, 64), (700, 2, 64)))
    one = nearkv.attend(q, k, v, card="model")
    for got in (nearkv.attend(q, k, v, card=["model", "model", "model"]), nearkv.attend(q, k, v)):
        for mine, its in zip(got, one, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_cards_that_were_opened_are_closed_again_if_one_cannot_be(monkeypatch):
    closed = []
    monkeypatch.setattr(opening.Card, "close", lambda self: closed.append(self.name))
    with pytest.raises(CardError, match="no card 'nope'"):
        open_cards(["model", "nope"])
    assert closed == ["model"]
    with pytest.raises(ValueError, match="at least one card"):
        open_cards([])


def test_without_the_native_part_the_default_is_the_model_and_it_is_said(monkeypatch, caplog):
    def missing(name, unit, **options):
        raise CardError("the native part is not compiled; make setup")

    monkeypatch.setitem(opening._FAMILIES, "twin", missing)
    with open_card(threads=1, kv_bytes=1 << 20) as card:
        assert (card.name, card.kv_bytes) == ("model", 1 << 20)
    assert "make setup; going on with the card model" in caplog.text


# --- faults ----------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path, faults_of, reader_kind):
    """A store, attention, and a place for faults of its sequences."""
    faults = faults_of()
    with (
        open_card("model", reader=reader_kind) as card,
        KvStore(tmp_path / "kv", LAYOUT, 2) as store,
    ):
        faults.store = store
        q = _fill(store)
        attention = PageAttention(card, store)
        for layer in (0, 1, 2):
            _attend(attention, layer, range(4), q, 0.2)
        good = [_attend(attention, layer, [1, 2], q[[1, 2]], 0.2) for layer in range(3)]
        yield store, attention, q, faults

        faults.clear()
        for layer in range(3):  # nothing stored is lost, and the other sequences go on
            _same(_attend(attention, layer, [1, 2], q[[1, 2]], 0.2), good[layer])
        attention.close()


def test_a_drive_that_fails_names_the_page_and_other_sequences_go_on(faulty):
    store, attention, q, faults = faulty
    faults[0] = {"errno": errno.EIO}
    for layer in (0, 1):
        match = rf"page 0 of layer {layer}, sequence 0, kv head 0, file .*pages-0.kv.*Input/output"
        with pytest.raises(FlashError, match=match):
            _attend(attention, layer, range(4), q, 0.2)
        _attend(attention, layer, [1, 2], q[[1, 2]], 0.2)


def test_a_file_truncated_or_deleted_while_it_is_used(faulty):
    store, attention, q, faults = faulty
    path, offset = store.locate(PageId(1, 0, 1, 20))
    before = _attend(attention, 1, range(4), q, 0.2)
    data = path.read_bytes()
    path.unlink()  # what is open stays readable
    _same(_attend(attention, 1, range(4), q, 0.2), before)
    (open_path,) = store.page_files()
    os.truncate(open_path, offset)
    with pytest.raises(FlashError, match="truncated.*page 20 of layer 1, sequence 0, kv head 1"):
        _attend(attention, 1, range(4), q, 0.2)
    with open(open_path, "r+b") as file:
        file.seek(offset)
        file.write(data[offset:])


def test_a_drive_a_hundred_times_slower_is_waited_for(faulty):
    store, attention, q, faults = faulty
    before = _attend(attention, 0, range(4), q, 0.2)
    faults[0] = {"delay": 0.05}
    _same(_attend(attention, 0, range(4), q, 0.2), before)
    attention.close()


def test_a_load_that_is_late_names_the_page_and_the_card_is_reset(faulty, monkeypatch, caplog):
    store, attention, q, faults = faulty
    attention.close()
    before = _attend(attention, 2, range(4), q, 0.2)
    attention.close()
    arrives = threading.Event()
    faults[0] = {"until": arrives, "errno": errno.EIO}
    with monkeypatch.context() as patch:
        patch.setattr(attention.card, "timeout_s", 0.1)
        match = r"0\.1 s.*page 0 of layer 2, sequence 0, .*pages-0.kv"
        with pytest.raises(CardError, match=match):
            _attend(attention, 2, range(4), q, 0.2)
    arrives.set()
    assert "the card is reset and the work done again" in caplog.text
    _attend(attention, 2, [1], q[[1]], 0.2)  # whatever has not arrived
    faults.clear()
    _same(_attend(attention, 2, range(4), q, 0.2), before)


@pytest.mark.slow
def test_late_reads_cannot_reach_what_comes_after_a_reset(faulty, monkeypatch):
    store, attention, q, faults = faulty
    attention.close()
    before = _attend(attention, 1, range(4), q, 0.2)
    attention.close()
    arrives = threading.Event()
    faults[0] = {"until": arrives}
    with monkeypatch.context() as patch:
        patch.setattr(attention.card, "timeout_s", 0.1)
        with pytest.raises(CardError, match=r"0\.1 s"):
            _attend(attention, 0, [0], q[[0]], 0.2)
    faults.clear()
    for number in range(20):  # while pages of layer 0 arrive
        _same(_attend(attention, 1, range(4), q, 0.2), before)
        if number == 2:
            arrives.set()
