# SPDX-License-Identifier: Apache-2.0
"""Page files: round trips, and every way in which a drive can fail us."""

import contextlib
import errno
import fcntl
import functools
import gc
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys
import threading

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from nearkv.io import Directory, FlashError, PageId
from nearkv.store import KvStore
from nearkv.store.space import Slots
from nearkv.store.tables import Tables
from nearkv.store.writer import PageWriter
from nearkv_hw import pages
from nearkv_hw.abi import KvType, PageLayout

LAYOUT = PageLayout(64, 32)


def _kv(n_tokens, n_heads=2, layout=LAYOUT, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_heads, n_tokens, layout.head_dim)
    return [rng.standard_normal(shape).astype(np.float16) for _ in "kv"]


def _read(store, layer, sequence, head):
    n_pages = store.n_pages(sequence, layer)
    data = store.read_pages(PageId(layer, sequence, head, 0), n_pages)
    return [x.view(np.float16) for x in pages.unpack(store.layout, data)]


def test_what_was_appended_is_read_back(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(20 * 32)
        for a, b in ((0, 64), (64, 96), (96, k.shape[1])):
            for layer in (0, 5):
                for sequence in (0, 9):
                    store.append(sequence, layer, k[:, a:b] + layer, v[:, a:b] - sequence)
        for layer in (0, 5):
            for sequence in (0, 9):
                assert store.n_pages(sequence, layer) == 20
                for head in range(2):
                    got_k, got_v = _read(store, layer, sequence, head)
                    np.testing.assert_array_equal(got_k, k[head] + np.float16(layer))
                    np.testing.assert_array_equal(got_v, v[head] - np.float16(sequence))
        numbers = np.array([3, 4, 5, 6, 10, 11])
        reads = store.reads(PageId(5, 9, 1, 0), numbers, 4096)
        assert [read.nbytes // LAYOUT.page_bytes for read in reads] == [4, 2]
        assert [read.page for read in reads] == [PageId(5, 9, 1, 3), PageId(5, 9, 1, 10)]
        assert reads[1].kv_offset == 4096 + 4 * LAYOUT.page_bytes
        assert all(read.offset % 4096 == 0 for read in reads)


def test_sequences_are_composed_of_blocks_that_others_have(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2, delayed_bytes=1 << 20) as store:
        k, v = _kv(4 * 32)
        for sequence in (0, 1):
            for layer in (0, 3):
                store.append(sequence, layer, k + sequence, v - layer)
        with pytest.raises(ValueError, match="wait to be written"):
            store.compose(7, {0: store.blocks(0, 0)})
        store.flush()
        blocks = {layer: [store.blocks(sequence, layer) for sequence in (0, 1)] for layer in (0, 3)}
        mixed = {layer: np.array([a[0], b[1], a[2]]) for layer, (a, b) in blocks.items()}
        store.compose(7, mixed)
        store.drop(0)
        got_k, got_v = _read(store, 3, 7, 1)
        want = np.concatenate([k[1, :32], k[1, 32:64] + np.float16(1), k[1, 64:96]])
        np.testing.assert_array_equal(got_k, want)
        np.testing.assert_array_equal(got_v, v[1, :96] - np.float16(3))
        with pytest.raises(ValueError, match="is free"):
            store.compose(8, {0: blocks[0][0][1:2]})
        assert 8 not in store.sequences()
        store.compose(7, {0: mixed[0][:1]})
        assert [store.n_pages(7, layer) for layer in (0, 3)] == [1, 3]
        assert store.n_blocks(0) == 5
    with KvStore(tmp_path, LAYOUT, 2) as store:  # the journal says the same
        np.testing.assert_array_equal(store.blocks(7, 3), mixed[3])
        np.testing.assert_array_equal(_read(store, 3, 7, 1)[0], want)


def test_pages_of_a_head_lie_together_and_little_space_is_reserved_ahead(tmp_path):
    layout = PageLayout(64, 128)
    with KvStore(tmp_path, layout, 3) as store:
        k, v = _kv(128, 3, layout)
        for _ in range(200):  # as decoding does it, page by page, two layers in turn
            for layer in (0, 1):
                store.append(0, layer, k, v)
        file = tmp_path / "pages-0.kv"
        assert file.stat().st_blocks * 512 <= 1.3 * store.bytes_written
        for layer in (0, 1):
            reads = store.reads(PageId(layer, 0, 1, 0), np.arange(200), 0)
            # Runs grow with the sequence: to 1 MiB by the time it has 4 MiB.
            assert len(reads) <= 24
            assert max(read.nbytes for read in reads) >= 1 << 20
        store.append(1, 0, *(x.repeat(60, axis=1) for x in (k, v)))
        (read,) = store.reads(PageId(0, 1, 2, 0), np.arange(60), 0)
        assert read.nbytes == 60 * layout.page_bytes


def test_64_sequences_of_1000_tokens_take_little_more_than_their_pages(tmp_path):
    layout = PageLayout(64, 128)
    with KvStore(tmp_path, layout, 3) as store:
        k, v = _kv(896, 3, layout)
        for sequence in range(64):
            store.append(sequence, 0, k[:, :640], v[:, :640])
            for at in (640, 768):
                store.append(sequence, 0, k[:, at : at + 128], v[:, at : at + 128])
        on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
        assert on_disk <= 1.3 * 64 * 7 * 3 * layout.page_bytes


@pytest.mark.slow
def test_thousands_of_sequences_need_a_handful_of_descriptors(tmp_path):
    k, v = _kv(32)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[1]), limits[1]))
    try:
        with KvStore(tmp_path, LAYOUT, 2) as store:
            before = len(os.listdir("/proc/self/fd"))
            for sequence in range(2000):
                store.append(sequence, 0, k, v)
            assert len(os.listdir("/proc/self/fd")) <= before
            np.testing.assert_array_equal(_read(store, 0, 1999, 1)[0], k[1])
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert len(store.sequences()) == 2000
            np.testing.assert_array_equal(_read(store, 0, 1234, 1)[0], k[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_ragged_page_ends_its_table(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(40)
        with pytest.raises(ValueError, match="written full: 32 tokens each, not 40"):
            store.append(0, 0, k, v)
        assert store.n_pages(0, 0) == 0
        store.append(0, 0, k, v, ragged=True)
        assert store.stored(0, 0)["page_len"].tolist() == [[32, 8], [32, 8]]
        with pytest.raises(ValueError, match="layer 0, sequence 0 is ragged"):
            store.append(0, 0, *_kv(32))


def test_shapes_are_checked(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        with pytest.raises(ValueError, match=r"n_kv_heads=2, n_tokens, head_dim=64\), not \(3, 32"):
            store.append(0, 0, *_kv(32, n_heads=3))


@pytest.mark.parametrize(("name", "value"), [("K", np.nan), ("V", np.inf), ("V", -np.inf)])
def test_non_finite_elements_are_refused_by_name_before_anything_is_written(tmp_path, name, value):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(3, 1, *_kv(32))
        k, v = _kv(64)
        (k if name == "K" else v)[1, 40, 7] = value
        with pytest.raises(
            ValueError, match=f"{name} of layer 1, sequence 3, kv head 1, token 72, channel 7"
        ):
            store.append(3, 1, k, v)
        assert store.n_pages(3, 1) == 1
        assert store.bytes_written == 2 * LAYOUT.page_bytes


def test_what_overflows_fp16_is_refused_with_bf16_as_the_remedy(tmp_path):
    k, v = (x.astype(np.float32) for x in _kv(32))
    k[0, 3, 4] = 70000.0
    with KvStore(tmp_path / "a", LAYOUT, 2) as store:
        with pytest.raises(ValueError, match=r"70000\.0 is beyond fp16.*bf16"):
            store.append(0, 0, k, v)
    with KvStore(tmp_path / "b", PageLayout(64, 32, KvType.BF16), 2) as store:
        store.append(0, 0, k, v)


def test_a_flipped_bit_is_found_when_the_host_reads(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 4, *_kv(96))
        path, offset = store.locate(PageId(4, 0, 1, 2))
        _flip(path, offset + 100)
        store.read_pages(PageId(4, 0, 1, 0), 2)
        with pytest.raises(FlashError, match="CRC-32C.*page 2 of layer 4, sequence 0, kv head 1"):
            store.read_pages(PageId(4, 0, 1, 0), 3)


def test_a_truncated_file_names_the_first_missing_page(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(96))
        path, offset = store.locate(PageId(0, 0, 1, 1))
        for cut in (offset, offset + 5000):
            os.truncate(path, cut)
            with pytest.raises(FlashError, match="truncated") as caught:
                store.read_pages(PageId(0, 0, 1, 0), 3)
            assert caught.value.page == PageId(0, 0, 1, 1)
            assert caught.value.filename == str(path)
            assert str(path) in str(caught.value)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(FlashError, match="cannot write to the KV directory.*file.*--kv-dir"):
        KvStore(blocker, LAYOUT, 2, temporary=True)
    with pytest.raises(FlashError, match="cannot write to the KV directory"):
        KvStore("/proc/nearkv", LAYOUT, 2, temporary=True)


def test_no_permission_to_write_is_named(tmp_path, monkeypatch):
    # Root may write anywhere, so the refusal is staged.
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FlashError, match="Permission denied") as caught:
        KvStore(tmp_path, LAYOUT, 2, temporary=True)
    assert caught.value.errno == errno.EACCES


def test_a_missing_parent_is_not_made(tmp_path):
    for temporary in (False, True):
        with pytest.raises(FlashError, match="there is no .*nosuch; is the drive mounted"):
            KvStore(tmp_path / "nosuch" / "kv", LAYOUT, 2, temporary=temporary)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_is_stored(tmp_path, monkeypatch):
    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(64)
        store.append(0, 0, k, v)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(FlashError, match="no room for .*layer 1.*No space left") as caught:
            store.append(0, 1, k, v)
        assert caught.value.errno == errno.ENOSPC
        assert store.n_pages(0, 1) == 0
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], k[1])
        monkeypatch.undo()
        store.append(0, 1, v, k)
        np.testing.assert_array_equal(_read(store, 1, 0, 1)[0], v[1])


def test_a_file_size_limit_is_noticed_by_the_preallocation(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(FlashError, match="no room") as caught:
                store.append(0, 1, *_kv(32 * 80))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG
        _read(store, 0, 0, 0)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", mount]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs takes root")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.parametrize("temporary", [True, False])
def test_a_disk_that_is_really_full(small_disk, temporary):
    path = small_disk if temporary else small_disk / "kv"
    with KvStore(path, LAYOUT, 2, temporary=temporary) as store:
        k, v = _kv(32 * 100)
        store.append(0, 0, k, v)
        for _ in range(2):
            with pytest.raises(FlashError, match="No space left on device"):
                store.append(1, 1, k, v)
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[1], v[1])
        store.drop(0)  # what is freed can be used, although the journal was not flushed since
        store.append(1, 1, v, k)
        np.testing.assert_array_equal(_read(store, 1, 1, 1)[1], k[1])


def test_without_o_direct_pages_go_through_the_page_cache_and_it_is_said_once(
    tmp_path, monkeypatch, caplog
):
    real = os.open

    def no_direct(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", no_direct)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(32)
        for sequence in range(3):
            store.append(sequence, 0, k, v)
        np.testing.assert_array_equal(_read(store, 0, 2, 0)[0], k[0])
    assert sum("no O_DIRECT" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("temporary", [True, False])
def test_dropped_sequences_give_their_space_back(tmp_path, temporary):
    with KvStore(tmp_path, LAYOUT, 2, temporary=temporary) as store:
        (file,) = store.page_files()
        for sequence in range(2):
            store.append(sequence, 0, *_kv(32 * 64))
        used = os.stat(file).st_blocks
        assert store.drop(0) == 0
        store.flush()
        assert os.stat(file).st_blocks <= 0.6 * used
        with pytest.raises(FlashError, match="no sequence 7"):
            store.drop(7)
        assert store.n_pages(0, 0) == 0
        size = os.stat(file).st_size
        store.append(2, 0, *_kv(32 * 64))
        assert os.stat(file).st_size == size  # in the same place
        np.testing.assert_array_equal(_read(store, 0, 1, 1)[0], _kv(32 * 64)[0][1])


def test_a_temporary_store_never_has_a_name(tmp_path):
    store = KvStore(tmp_path, LAYOUT, 2, temporary=True)
    store.append(0, 0, *_kv(32))
    assert list(tmp_path.iterdir()) == []
    (file,) = store.page_files()
    assert os.stat(file).st_nlink == 0
    store.close()
    store.close()
    assert not file.exists()


def test_a_temporary_store_beside_a_persistent_one_touches_nothing(tmp_path):
    KvStore(tmp_path / "nearkv-kept", LAYOUT, 2).close()
    before = sorted(tmp_path.rglob("*"))
    KvStore(tmp_path, LAYOUT, 2, temporary=True).close()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_system_without_nameless_files(tmp_path, monkeypatch):
    real = os.open

    def no_tmpfile(path, flags, *rest, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", no_tmpfile)
    with KvStore(tmp_path, LAYOUT, 2, temporary=True) as store:
        store.append(0, 0, *_kv(32))
        left_over = [path for path in tmp_path.rglob("*") if path.is_file()]
        # One that was made by somebody who could not lock it; anybody takes it.
        assert [
            path for path in left_over if path.name != "store.json" or path.stat().st_size
        ] == []
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], _kv(32)[0][1])


def test_a_killed_process_leaves_nothing_of_a_temporary_store(tmp_path):
    code = (
        "import os, signal, sys, numpy as np; from nearkv.store import KvStore\n"
        "from nearkv_hw.abi import PageLayout\n"
        "store = KvStore(sys.argv[1], PageLayout(64), 1, temporary=True)\n"
        "store.append(0, 0, *np.ones((2, 1, 128, 64), np.float16))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_store_has_one_user(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2):
        with pytest.raises(FlashError, match="in use.*choose another directory"):
            KvStore(tmp_path, LAYOUT, 2)
    KvStore(tmp_path, LAYOUT, 2).close()


def test_truncated_tables_are_written_again(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        first, second = _kv(96), _kv(64, seed=1)
        store.append(0, 0, *first)
        store.truncate(0, 0, 1)
        store.append(0, 0, *second)
        np.testing.assert_array_equal(
            _read(store, 0, 0, 1)[0], np.concatenate([first[0][1, :32], second[0][1]])
        )


def test_a_store_is_reopened_with_its_pages(tmp_path):
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        store.append(0, 2, v, k)
        before = store.stored(0, 2).copy()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(store.stored(0, 2), before)
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], k[1])
        store.append(0, 0, k, v)
        store.append(0, 1, k, v)
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], np.concatenate([k[1], k[1]]))
        np.testing.assert_array_equal(_read(store, 2, 0, 1)[0], v[1])
    with pytest.raises(ValueError, match="holds a store with"):
        KvStore(tmp_path, PageLayout(64, 64), 2)


def test_truncating_and_dropping_last(tmp_path):
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for sequence in range(3):
            store.append(sequence, 0, k, v)
        store.truncate(0, 0, 1)
        store.drop(1)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.sequences() == [0, 2]
        assert store.n_pages(0, 0) == 1
        np.testing.assert_array_equal(_read(store, 0, 2, 1)[0], k[1])


# --- sharing -----------------------------------------------------------------------------------


def test_a_shared_prefix_is_stored_once_and_outlives_its_first_owner(tmp_path):
    prefix, own = _kv(128), [_kv(64, seed=s) for s in range(8)]
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for layer in (0, 1):
            store.append(0, layer, *prefix)
        written = store.bytes_written
        store.arrange(dict.fromkeys(range(1, 8), 0))
        assert store.bytes_written == written
        assert store.n_blocks(0) == store.n_blocks(1) == 4
        for sequence in range(8):
            for layer in (0, 1):
                store.append(sequence, layer, *own[sequence])
        assert store.n_blocks(1) == 4 + 8 * 2
        store.drop(0)
        store.truncate(1, 0, 2)
        store.append(1, 0, *own[3])
        store.flush()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for sequence in range(2, 8):
            expected = np.concatenate([prefix[0][1], own[sequence][0][1]])
            np.testing.assert_array_equal(_read(store, 1, sequence, 1)[0], expected)
        expected = np.concatenate([prefix[0][0][:64], own[3][0][0]])
        np.testing.assert_array_equal(_read(store, 0, 1, 0)[0], expected)
        for sequence in range(1, 8):
            store.drop(sequence)
        assert store.n_blocks(0) == store.n_blocks(1) == 0


def test_sequences_change_places_all_at_once(tmp_path):
    kept = [_kv(64, seed=s)[0] for s in range(3)]
    with KvStore(tmp_path, LAYOUT, 2, delayed_bytes=1 << 20) as store:
        for sequence in range(3):
            for layer in (0, 1):
                store.append(sequence, layer, kept[sequence], kept[sequence])
        epoch = store.epoch
        store.arrange({0: 0, 1: 1})
        assert store.epoch == epoch
        store.arrange({0: 2, 1: 0, 2: 0}, layer=1)
        for sequence, source in ((0, 2), (1, 0), (2, 0)):
            np.testing.assert_array_equal(_read(store, 1, sequence, 1)[0], kept[source][1])
            np.testing.assert_array_equal(_read(store, 0, sequence, 1)[0], kept[sequence][1])
        store.arrange({5: 1}, n_pages=1)
        assert (store.n_pages(5, 0), store.n_pages(5, 1)) == (1, 1)
        with pytest.raises(FlashError, match="no sequence 9"):
            store.arrange({0: 9})
        with pytest.raises(ValueError, match="numbered from 0"):
            store.arrange({-1: 0})


def test_a_sequence_that_grows_beside_its_copy_does_not_disturb_it(tmp_path):
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        store.arrange({1: 0})
        store.truncate(0, 0, 2)
        store.append(0, 0, v[:, :32], k[:, :32])
        np.testing.assert_array_equal(_read(store, 0, 1, 1)[0], k[1])
        expected = np.concatenate([k[1, :64], v[1, :32]])
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], expected)


def test_erased_pages_are_gone_from_the_drive_unless_others_own_them(tmp_path):
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        store.arrange({1: 0}, n_pages=1)
        path = tmp_path / "pages-0.kv"
        secret = np.full(64, k[1, 90, 3]).tobytes()  # a K row of block 2, where it is repeated
        store.append(2, 0, *(np.full((2, 32, 64), 3.25, np.float16),) * 2)
        secret = np.full(512, 3.25, np.float16).tobytes()
        assert secret in path.read_bytes()
        assert store.drop(2, erase=True) == 0
        assert secret not in path.read_bytes()
        assert store.drop(0, erase=True) == 2
        np.testing.assert_array_equal(_read(store, 0, 1, 1)[0], k[1, :32])


# --- snapshots ---------------------------------------------------------------------------------


def test_a_snapshot_keeps_its_pages_whatever_becomes_of_the_sequences(tmp_path):
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.saved() is None
        with pytest.raises(FlashError, match="nothing was saved"):
            store.restore()
        store.append(0, 0, k, v)
        store.append(4, 0, v, k)
        store.save(b"first")
        store.truncate(0, 0, 1)
        store.append(0, 0, *_kv(64, seed=5))
        store.drop(4)
        store.append(6, 0, k, v)
    for _ in range(2):  # opening and using it does not change what is saved
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert store.sequences() == [0, 6] if not _ else [0, 4]
            assert store.saved() == b"first"
            store.restore()
            assert store.sequences() == [0, 4]
            np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], k[1])
            np.testing.assert_array_equal(_read(store, 0, 4, 1)[0], v[1])
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.drop(4)
        store.save(b"second" * 1000)
        assert store.n_blocks(0) == 3
        assert [path.name for path in tmp_path.glob("state-*")] == ["state-1"]
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.saved() == b"second" * 1000
        (tmp_path / "state-1").write_bytes(b"third")
        with pytest.raises(FlashError, match="saved with the store is damaged.*state-1"):
            store.saved()
    with KvStore(tmp_path, LAYOUT, 2, temporary=True) as store:
        with pytest.raises(ValueError, match="temporary store cannot be saved"):
            store.save(b"")


@pytest.mark.parametrize("n_failures", [1, 3])
def test_a_snapshot_that_the_drive_may_not_keep_is_taken_back(tmp_path, monkeypatch, n_failures):
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for before in (None, b"first"):
            if before:
                store.append(0, 0, k, v)
                store.save(before)
            store.append(1, 0, k, v)
            with monkeypatch.context() as patch:
                _fail_fsync_and_then(patch, n_failures - 1)
                with pytest.raises(FlashError, match="may not keep"):
                    store.save(b"never")
            assert store.saved() == before
            store.flush()
            assert store.saved() == before
            copy = tmp_path.parent / f"{tmp_path.name}-{before}"
            shutil.copytree(tmp_path, copy)
            with KvStore(copy, LAYOUT, 2) as other:
                assert other.saved() == before
                if before:
                    other.restore()
                    assert other.sequences() == [0, 1]


def _fail_fsync_and_then(patch, n_writes):
    """The next fsync of the journal fails, and so many writes of it after that."""
    left, pwrite, fsync = [n_writes + 1], os.pwrite, os.fsync

    def failing(real, begun, fd, *rest):
        if begun() and left[0] and os.readlink(f"/proc/self/fd/{fd}").endswith("journal"):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    patch.setattr(os, "fsync", functools.partial(failing, fsync, lambda: True))
    patch.setattr(os, "pwrite", functools.partial(failing, pwrite, lambda: left[0] <= n_writes))


def test_a_snapshot_is_kept_although_the_one_before_cannot_be_removed(tmp_path, monkeypatch):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.save(b"one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", _full)
            store.save(b"two")
        assert store.saved() == b"two"
    assert len(list(tmp_path.glob("state-*"))) == 2
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.saved() == b"two"
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-1"]


def test_what_could_not_be_erased_is_said(tmp_path, monkeypatch):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        real = os.pwrite

        def fail(fd, data, offset):
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".kv"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(FlashError, match="could not be overwritten .*pages-0.kv.*fstrim"):
            store.drop(0, erase=True)
        assert store.sequences() == []


def test_a_snapshot_that_was_taken_back_after_its_record_is_read_so(tmp_path, monkeypatch):
    """Reopening once refused this: the first snapshot's pages had no owner between the records."""
    k, v = _kv(64)
    real = os.fsync

    def fail(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("pages-0.kv"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        store.save(b"first")
        store.drop(0)
        store.append(1, 0, v, k)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(FlashError, match="may not keep"):
            store.save(b"second")
        monkeypatch.setattr(os, "fsync", real)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.saved() == b"first"
        store.restore()
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], k[1])


# --- what a reopened store believes --------------------------------------------------------------


@pytest.mark.parametrize("lost_bytes", [1, 40, 100])
def test_a_torn_tail_is_cut_off_and_that_is_said(tmp_path, lost_bytes, caplog):
    k, v = _kv(32)
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, k, v)
    store.flush()
    store.append(0, 0, v, k)
    journal = tmp_path / "journal"
    data = journal.read_bytes()  # as a killed process leaves it: nothing is flushed any more
    end = (tmp_path / "journal.end").read_bytes()
    store.close()
    journal.write_bytes(data[:-lost_bytes])
    (tmp_path / "journal.end").write_bytes(end)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        (notice,) = store.notices
        assert "journal" in notice
        assert "cut off" in notice
        assert notice in caplog.text
        assert store.n_pages(0, 0) == 1
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], k[1])
        store.append(0, 0, k, v)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.notices == []
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], np.concatenate([k[1], k[1]]))


def test_what_was_not_flushed_may_be_there_in_any_part(tmp_path):
    """A drive that loses power may keep later bytes and lose earlier ones."""
    k, v = _kv(32)
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, k, v)
    store.save(b"kept")
    size = (tmp_path / "journal").stat().st_size
    for _ in range(3):
        store.append(0, 0, v, k)
    store._home.close()  # as kill -9 would
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for at, count in ((size, 20), (size + 40, 90), (size + 200, 30), (size + 2, 1)):
        data = bytearray(whole["journal"])
        data[at : at + count] = bytes(count)
        for name, content in whole.items():
            (tmp_path / name).write_bytes(data if name == "journal" else content)
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert "cut off" in store.notices[0]
            assert 1 <= store.n_pages(0, 0) < 4
            assert store.saved() == b"kept"
            np.testing.assert_array_equal(_read(store, 0, 0, 1)[0][:32], k[1])
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert store.notices == []
    # Up to the mark all must be right.
    data = bytearray(whole["journal"])
    data[size - 1] ^= 1
    for name, content in whole.items():
        (tmp_path / name).write_bytes(data if name == "journal" else content)
    with pytest.raises(FlashError, match="journal is damaged"):
        KvStore(tmp_path, LAYOUT, 2)


def test_a_journal_that_was_written_anew_is_whole_although_its_mark_is_not_there_yet(
    tmp_path, monkeypatch
):
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for layer in range(5):
            store.append(0, layer, k, v)
        store.flush()
        mark = (tmp_path / "journal.end").read_bytes()
        monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 0)
        for _ in range(30):
            store.arrange({1: 0})
            store.drop(1)
    (tmp_path / "journal.end").write_bytes(mark)  # of the journal before
    data = (tmp_path / "journal").read_bytes()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.layers(0) == list(range(5))
    for cut in (len(data) - 1, len(data) // 2, 400):
        (tmp_path / "journal.end").write_bytes(mark)
        (tmp_path / "journal").write_bytes(data[:cut])
        with pytest.raises(FlashError, match="journal is damaged|ends .* before what was flushed"):
            KvStore(tmp_path, LAYOUT, 2)


def test_a_journal_that_ends_before_what_was_flushed_is_refused(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        sizes = [(tmp_path / "journal").stat().st_size]
        for _ in range(3):
            store.append(0, 0, *_kv(32))
            sizes.append((tmp_path / "journal").stat().st_size)
    for size in (sizes[2], sizes[2] + 7, sizes[0], 3, 0):
        data = (tmp_path / "journal").read_bytes()
        os.truncate(tmp_path / "journal", size)
        with pytest.raises(FlashError, match=r"journal.*flushed.*put the file back|damaged"):
            KvStore(tmp_path, LAYOUT, 2)
        assert (tmp_path / "journal").stat().st_size == size  # nothing was touched
        (tmp_path / "journal").write_bytes(data)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == 3


def test_any_changed_byte_of_what_describes_the_store_is_named(tmp_path):
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for sequence in range(3):
            store.append(sequence, 0, k, v)
        store.save(b"state")
    rng = np.random.default_rng(0)
    for name in ("journal", "store.json", "pages-0.kv"):
        path = tmp_path / name
        whole = path.read_bytes()
        size = 4096 if name == "pages-0.kv" else len(whole)
        for at in [0, size - 1, *rng.integers(0, size, 25).tolist()]:
            changed = bytearray(whole)
            changed[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises((FlashError, ValueError), match=name):
                KvStore(tmp_path, LAYOUT, 2)
            assert path.read_bytes() == changed
        path.write_bytes(whole)
    KvStore(tmp_path, LAYOUT, 2).close()


def test_records_cannot_be_missing_repeated_or_exchanged(tmp_path):
    journal = tmp_path / "journal"
    with KvStore(tmp_path, LAYOUT, 2) as store:
        edges = [0, journal.stat().st_size]
        for _ in range(4):
            store.append(0, 0, *_kv(32))
            edges.append(journal.stat().st_size)
    whole = journal.read_bytes()
    records = [whole[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    for order in ([0, 1, 3, 4], [0, 1, 2, 2, 3, 4], [0, 1, 3, 2, 4], [1, 2, 3, 4], [0, 1, 2, 4]):
        journal.write_bytes(b"".join(records[i] for i in order))
        with pytest.raises(FlashError, match="journal"):
            KvStore(tmp_path, LAYOUT, 2)
    journal.write_bytes(whole)
    KvStore(tmp_path, LAYOUT, 2).close()


@pytest.mark.parametrize(
    "name", ["journal", "journal.end", "pages-0.kv", "pages-1.kv", "store.json"]
)
def test_a_missing_or_exchanged_file_is_named_and_nothing_is_made_in_its_place(tmp_path, name):
    for path in (tmp_path / "a", tmp_path / "b"):
        with KvStore(path, LAYOUT, 2, n_shards=2) as store:
            store.append(0, 0, *_kv(32 * 100))
    file = tmp_path / "a" / name
    file.rename(tmp_path / "away")
    with pytest.raises(FlashError, match=name):
        KvStore(tmp_path / "a", LAYOUT, 2, n_shards=2)
    assert not file.exists()
    if name != "journal.end":  # a mark says nothing of which store it belongs to, only how far
        file.write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(FlashError, match=name.split(".")[0]):
            KvStore(tmp_path / "a", LAYOUT, 2, n_shards=2)
        file.unlink()
    (tmp_path / "away").rename(file)
    with KvStore(tmp_path / "a", LAYOUT, 2, n_shards=2) as store:
        assert store.n_pages(0, 0) == 100


def test_page_files_that_changed_places_are_told_apart(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2, n_shards=2) as store:
        store.append(0, 0, *_kv(32 * 100))
    one, two = tmp_path / "pages-0.kv", tmp_path / "pages-1.kv"
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(FlashError, match="not the page file of shard 0.*it is shard 1"):
        KvStore(tmp_path, LAYOUT, 2, n_shards=2)


def test_a_store_that_was_killed_while_it_was_made_is_made_again(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2):
        pass
    (tmp_path / "store.json").write_bytes(b"")
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
    (tmp_path / "store.json").write_bytes(b"")  # but not one that has pages
    with pytest.raises(FlashError, match=r"no store\.json that belongs to them"):
        KvStore(tmp_path, LAYOUT, 2)


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_making_a_store_may_be_killed_at_any_call_and_is_made_again(tmp_path, several):
    """Every state that a killed process leaves behind is a store, or made into one."""
    outside = sorted(tmp_path.iterdir())
    for n in range(200):
        home = tmp_path / f"{n}"
        home.mkdir()
        paths = [home / "a", home / "b"] if several else [home / "a"]
        child = os.fork()
        if not child:
            left = [n]
            for name in ("open", "mkdir", "pwrite", "fsync", "unlink", "ftruncate"):
                setattr(os, name, _dying(getattr(os, name), left))
            KvStore(paths, LAYOUT, 2).close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        with KvStore(paths, LAYOUT, 2) as store:
            store.append(0, 0, *_kv(32))
        assert not (home / "a" / "store.new").exists()
        with KvStore(paths, LAYOUT, 2) as store:
            assert store.n_pages(0, 0) == 1
        if not status:
            break
    assert n > 15
    assert outside == []


def _dying(real, left):
    """Kills this process at its n-th call."""

    def call(*args, **kwargs):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("several", [False, True])
def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, several):
    paths = [tmp_path / "a", tmp_path / "b"] if several else [tmp_path / "a"]
    for n in range(200):
        left = [n]
        with monkeypatch.context() as patch:
            for name in ("open", "pwrite", "fsync", "posix_fallocate"):
                patch.setattr(os, name, _failing_once(getattr(os, name), left))
            try:
                KvStore(paths, LAYOUT, 2).close()
            except FlashError as problem:
                error = problem
            else:
                break
        assert error.errno == errno.EIO
        assert str(tmp_path) in str(error)
        left_over = [path for path in tmp_path.rglob("*") if path.is_file()]
        # One that was made by somebody who could not lock it; anybody takes it.
        assert [
            path for path in left_over if path.name != "store.json" or path.stat().st_size
        ] == []
    assert n > 10


def _failing_once(real, left):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    return call


def test_the_names_of_a_new_store_are_kept_before_it_is_used(tmp_path, monkeypatch):
    """A directory that its parent has forgotten took a flushed store with it."""
    synced, real = [], os.fsync

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    KvStore([tmp_path / "a", tmp_path / "b"], LAYOUT, 2).close()
    first = synced.index(str(tmp_path / "b" / "store.json"))
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b")} <= set(synced[:first])


def test_a_part_of_another_store_is_not_cleared_for_a_new_one(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    with KvStore([a, b], LAYOUT, 1, weights=[1000, 1]) as store:
        store.append(0, 0, *_kv(32, 1))  # all of it in the first
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for paths in ([c, b], [b, c], [b, a], [c, a]):
        with pytest.raises((FlashError, ValueError), match="directories|directory"):
            KvStore(paths, LAYOUT, 1)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not c.exists()
    # A description that is gone: no directory is cleared before all were looked at.
    (a / "store.json").write_bytes(b"")
    (b / "store.json").write_bytes(b"")
    (a / "pages-0.kv").rename(b / "pages-7.kv")
    names = sorted(tmp_path.rglob("*"))
    with pytest.raises(FlashError, match="no store.json that belongs to them.*pages-7.kv"):
        KvStore([a, b], LAYOUT, 1)
    assert sorted(tmp_path.rglob("*")) == names


def test_whoever_waits_for_a_store_that_is_being_made_does_not_take_it_away(tmp_path, monkeypatch):
    """The one that was refused once removed the description of the one that was faster."""
    monkeypatch.setattr("nearkv.store.home._LOCK_S", 0.05)
    other, create = [], Directory.create

    def slow_create(directory, name, **options):
        file = create(directory, name, **options)
        if name == "store.json" and not other:
            other.append(True)
            other.append(KvStore(tmp_path, LAYOUT, 2))  # before this one has locked it
        return file

    monkeypatch.setattr(Directory, "create", slow_create)
    with pytest.raises(FlashError, match="in use"):
        KvStore(tmp_path, LAYOUT, 2)
    other[1].append(0, 0, *_kv(32))
    other[1].close()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == 1


def test_a_description_that_was_removed_while_somebody_waited_for_it_is_made_again(
    tmp_path, monkeypatch
):
    real, first = fcntl.flock, []

    def flock(fd, how):
        if not first:
            first.append(True)
            (tmp_path / "store.json").unlink()  # whoever made it has given up
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        store.flush()  # sees that it still has its name
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == 1


def test_things_that_are_not_the_stores_do_not_end_in_a_raw_error(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        store.save(b"one")
    (tmp_path / "state-9").mkdir()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.save(b"two")
        assert store.saved() == b"two"
    (tmp_path / "journal.new").mkdir()
    with pytest.raises(FlashError, match="cannot remove .*journal.new.*directory"):
        KvStore(tmp_path, LAYOUT, 2)


def test_a_mark_of_another_journal_is_told_from_ones_own(tmp_path):
    for name, n_tokens in (("a", 32), ("b", 96)):
        with KvStore(tmp_path / name, LAYOUT, 2) as store:
            for _ in range(3):
                store.append(0, 0, *_kv(n_tokens))
    mark = (tmp_path / "a" / "journal.end").read_bytes()
    (tmp_path / "b" / "journal.end").write_bytes(mark)
    with pytest.raises(FlashError, match="journal is damaged.*not the record|another journal"):
        KvStore(tmp_path / "b", LAYOUT, 2)


def test_a_mark_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    real = os.pwrite
    with KvStore(tmp_path, LAYOUT, 2) as store:

        def half(fd, data, offset):
            if not os.readlink(f"/proc/self/fd/{fd}").endswith("journal.end"):
                return real(fd, data, offset)
            real(fd, data[:20], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        store.append(0, 0, *_kv(32))
        store.flush()
        for _ in range(2):
            store.append(0, 0, *_kv(32))
            monkeypatch.setattr(os, "pwrite", half)
            with pytest.raises(FlashError, match=r"journal\.end.*Input/output"):
                store.flush()
            monkeypatch.undo()
            for path in tmp_path.iterdir():  # as a killed process would leave it
                copy = tmp_path.parent / f"{tmp_path.name}-copy"
                copy.mkdir(exist_ok=True)
                (copy / path.name).write_bytes(path.read_bytes())
            for path in copy.iterdir():
                path.chmod(0o600)
            with KvStore(copy, LAYOUT, 2) as other:
                assert other.n_pages(0, 0) == store.n_pages(0, 0)


def test_a_store_that_was_killed_keeps_what_it_has_before_freed_places_are_used(
    tmp_path, monkeypatch
):
    """Or a loss of power after that could bring a sequence back with somebody else's bytes."""
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, *_kv(32))
    store.flush()
    store.drop(0)
    store._home.close()  # as kill -9 would
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))
    )
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert str(tmp_path / "journal") in synced
        synced.clear()
    assert synced == []
    KvStore(tmp_path, LAYOUT, 2).close()
    assert synced == []  # all was kept already


def test_a_journal_is_written_anew_when_it_has_grown_far_beyond_its_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 4096)
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(1, 3, k, v)
        store.arrange({2: 1})
        store.save(b"kept")
        for i in range(100):
            store.append(0, 0, k, v)
            store.drop(0)
            if i % 30 == 0:
                store.flush()
        store.append(2, 3, v, k)
    assert (tmp_path / "journal").stat().st_size < 4096
    assert not (tmp_path / "journal.new").exists()
    for _ in range(2):
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert store.sequences() == [1, 2]
            np.testing.assert_array_equal(_read(store, 3, 2, 0)[0], np.concatenate([k[0], v[0]]))
            assert store.saved() == b"kept"
            store.append(9, 0, k, v)
            store.drop(9)


def test_blocks_of_a_journal_that_was_written_anew_are_used_again(tmp_path, monkeypatch):
    """They once had an owner too many until the journal's end, and a store could not be opened."""
    monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 0)
    k, v = _kv(96)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        for _ in range(30):
            store.append(1, 0, k, v)
            store.drop(1)
        store.flush()
        assert (tmp_path / "journal").stat().st_size < 1000
        monkeypatch.undo()
        store.drop(0)
        store.append(2, 0, v, k)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.sequences() == [2]
        np.testing.assert_array_equal(_read(store, 0, 2, 1)[0], v[1])


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    k, v = _kv(32)
    real = os.pwrite
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)

        def full(fd, data, offset):
            if os.readlink(f"/proc/self/fd/{fd}").endswith("journal"):
                if len(data) > 10:
                    return real(fd, data[:10], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data, offset)

        def short(fd, data, offset):
            if os.readlink(f"/proc/self/fd/{fd}").endswith("journal"):
                monkeypatch.setattr(os, "pwrite", fail)
                return real(fd, data[:10], offset)
            return real(fd, data, offset)

        def fail(fd, data, offset):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", short)
        with pytest.raises(FlashError, match="write the journal.*No space left"):
            store.append(0, 0, v, k)
        assert store.n_pages(0, 0) == 1
        monkeypatch.setattr(os, "pwrite", real)
        store.append(0, 0, k, v)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], np.concatenate([k[1], k[1]]))


def test_a_new_sequence_whose_first_pages_fail_is_not_known(tmp_path, monkeypatch):
    k, v = _kv(32)
    for name in ("posix_fallocate", "pwrite"):
        with KvStore(tmp_path, LAYOUT, 2) as store:
            with monkeypatch.context() as patch:
                patch.setattr(os, name, _full)
                with pytest.raises(FlashError, match="No space left"):
                    store.append(4, 0, k, v)
            assert store.sequences() == []
            with pytest.raises(FlashError, match="no sequence 4"):
                store.arrange({5: 4})
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(1, 0, k, v)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", _full)
            with pytest.raises(FlashError, match="write the journal"):
                store.arrange({7: 1})
        assert store.sequences() == [1]


def test_numbers_that_mean_nothing_are_refused_before_anything_changes(tmp_path):
    k, v = _kv(64)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, k, v)
        for call in (
            lambda: store.append(0, -1, k, v),
            lambda: store.append(1 << 63, 0, k, v),
            lambda: store.append(0, 1 << 32, k, v),
            lambda: store.truncate(0, 0, -1),
            lambda: store.arrange({1: 0}, n_pages=-1),
            lambda: store.arrange({1: 0}, layer=-1),
        ):
            with pytest.raises(ValueError, match="numbered from 0|is 0 or more"):
                call()
        assert store.sequences() == [0]
        assert store.n_pages(0, 0) == 2


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with KvStore(tmp_path, LAYOUT, 2) as store:
        size = (tmp_path / "journal").stat().st_size
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(FlashError, match="cannot write KV pages.*kv head 0.*Input/output"):
            store.append(0, 0, *_kv(32))
        assert (tmp_path / "journal").stat().st_size == size
        assert store.n_pages(0, 0) == 0
        monkeypatch.undo()


def test_an_interrupt_between_record_and_memory_ends_the_store_and_not_what_is_stored(
    tmp_path, monkeypatch
):
    k, v = _kv(64)
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, k, v)
    real = Tables.apply

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tables, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.truncate(0, 0, 1)
    monkeypatch.setattr(Tables, "apply", real)
    with pytest.raises(FlashError, match="interrupted in the middle.*close it and open it again"):
        store.append(0, 0, k, v)
    store.close()
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == 1
        store.append(0, 0, k, v)


def test_a_sequence_whose_pages_cannot_be_written_can_be_dropped_and_leaves_nothing(
    tmp_path, monkeypatch
):
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2, delayed_bytes=1 << 20) as store:
        store.append(0, 0, k, v)
        store.flush()
        monkeypatch.setattr(PageWriter, "write", _no_space)
        store.append(0, 0, v, k)
        store.append(1, 0, v, k)
        for sequence in (0, 1):
            with pytest.raises(FlashError, match="No space left"):
                store.settle(sequence, 0)
        assert store.drop(1) == 0
        monkeypatch.undo()
    # Closing says what it could not write; what was written before is there.
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.sequences() == [0]
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0][:32], k[1])


def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_space(writer, spills):
    raise FlashError("cannot write KV pages", errno=errno.ENOSPC)


# --- who may do what -----------------------------------------------------------------------------


def test_a_closed_store_raises(tmp_path):
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, *_kv(32))
    store.close()
    store.close()
    assert store.closed
    with KvStore(tmp_path, LAYOUT, 2) as other:
        for call in (
            lambda: store.append(0, 0, *_kv(32)),
            lambda: store.stored(0, 0),
            lambda: store.n_pages(0, 0),
            lambda: store.read_pages(PageId(0, 0, 0, 0), 1),
            lambda: store.truncate(0, 0, 0),
            lambda: store.drop(0),
            store.flush,
            store.sequences,
        ):
            with pytest.raises(FlashError, match="the KV store is closed"):
                call()
        assert other.n_pages(0, 0) == 1


def test_a_store_whose_directory_is_taken_away_says_so(tmp_path):
    store = KvStore(tmp_path / "kv", LAYOUT, 2)
    store.append(0, 0, *_kv(32))
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    with pytest.raises(FlashError, match=r"removed, or another one.*kv/store\.json"):
        store.flush()
    with KvStore(tmp_path / "kv", LAYOUT, 2) as other:
        with pytest.raises(FlashError, match="removed, or another one"):
            store.close()
        assert other.sequences() == []


def test_what_is_not_there_raises(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(64))
        with pytest.raises(FlashError, match="3 pages of layer 0, sequence 0.*the store has 2"):
            store.stored(0, 0, 3)
        with pytest.raises(FlashError, match="1 pages of layer 0, sequence 4.*the store has 0"):
            store.stored(4, 0, 1)
        for call in (store.layers, lambda s: store.truncate(s, 0, 0), lambda s: store.blocks(s, 0)):
            with pytest.raises(FlashError, match="no sequence 4"):
                call(4)
        with pytest.raises(FlashError, match="the store has 2"):
            store.read_pages(PageId(0, 0, 0, 1), 2)
        assert store.stored(4, 0).shape == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("temporary", [True, False])
def test_a_forked_process_has_no_store_and_its_end_disturbs_nothing(tmp_path, temporary):
    code = """if True:
        import os, sys, gc
        import numpy as np
        from nearkv.io import FlashError, PageId
        from nearkv.store import KvStore
        from nearkv_hw.abi import PageLayout
        k = np.ones((2, 32, 64), np.float16)
        store = KvStore(sys.argv[1], PageLayout(64, 32), 2, temporary=sys.argv[2] == "True",
                        delayed_bytes=1 << 20)
        store.append(0, 0, k, k)
        child = os.fork()
        if not child:
            try:
                store.append(0, 0, k, k)
            except FlashError as error:
                assert "which was forked from it" in str(error)
            else:
                os._exit(1)
            store.close()
            del store
            gc.collect()
            sys.exit(0)  # finalizers and all
        assert os.waitpid(child, 0)[1] == 0
        store.append(0, 0, k, k)
        assert store.n_pages(0, 0) == 2
        store.read_pages(PageId(0, 0, 0, 0), 2)
        store.close()
    """
    subprocess.run([sys.executable, "-c", code, tmp_path, str(temporary)], check=True)
    if not temporary:
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert store.n_pages(0, 0) == 2


def test_a_forked_process_that_lives_on_does_not_hold_the_lock(tmp_path):
    store = KvStore(tmp_path, LAYOUT, 2)
    begun, begins = os.pipe()
    child = os.fork()
    if not child:
        os.write(begins, b"x")
        signal.pause()
    os.read(begun, 1)
    os.close(begun)
    os.close(begins)
    try:
        store.close()
        KvStore(tmp_path, LAYOUT, 2).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_files_are_this_users_alone_whatever_the_umask(tmp_path):
    for umask in (0, 0o277):
        before = os.umask(umask)
        path = tmp_path / f"kv{umask}"
        try:
            with KvStore(path, LAYOUT, 2) as store:
                store.append(0, 0, *_kv(32))
                store.save(b"")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["journal", "journal.end", "pages-0.kv", "store.json", "state-0"])
@pytest.mark.parametrize("kind", ["symbolic", "hard", "directory", "fifo"])
def test_no_planted_link_is_followed(tmp_path, name, kind):
    store = tmp_path / "kv"
    with KvStore(store, LAYOUT, 2) as one:
        one.append(0, 0, *_kv(32))
        one.save(b"secret")
    victim = tmp_path / "victim"
    victim.write_bytes((store / name).read_bytes())
    os.chmod(victim, 0o600)
    (store / name).unlink()
    if kind == "symbolic":
        (store / name).symlink_to(victim)
    elif kind == "hard":
        os.link(victim, store / name)
    elif kind == "directory":
        (store / name).mkdir()
    else:
        os.mkfifo(store / name)
    before = victim.read_bytes()
    with pytest.raises(FlashError, match=name):
        with KvStore(store, LAYOUT, 2) as one:
            one.saved()
    assert victim.read_bytes() == before


def test_a_link_planted_before_a_store_is_made_is_not_followed(tmp_path):
    store, victim = tmp_path / "kv", tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("store.json", "journal", "pages-0.kv", "journal.end"):
        store.mkdir()
        (store / name).symlink_to(victim)
        with pytest.raises(FlashError, match="symbolic link"):
            KvStore(store, LAYOUT, 2)
        assert victim.read_bytes() == b"precious"
        assert [path.name for path in store.iterdir()] == [name]
        (store / name).unlink()
        store.rmdir()


# A signal may also come while a store that nobody has any more is being forgotten.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_a_change_is_over(tmp_path, monkeypatch, number):
    """Between any two lines of a change, Ctrl-C once left memory and journal at odds."""
    k, v = _kv(32)
    monkeypatch.setattr("nearkv.store.journal.COMPACT_BYTES", 0)
    handler = signal.signal(number, _interrupt)
    try:
        store, n_pages, n = None, 0, 0
        while n < 400:
            n += 7 if n < 100 else 31
            for call in ("open", "append", "save", "close"):
                try:
                    with _raised_at_line(number, n):
                        if call == "open":
                            store = KvStore(tmp_path, LAYOUT, 2)
                        elif call == "append":
                            store.append(0, 0, k, v)
                        elif call == "save":
                            store.save(b"saved")
                        else:
                            store.close()
                except KeyboardInterrupt:
                    if call == "open" and (store is None or store.closed):
                        store = KvStore(tmp_path, LAYOUT, 2)  # nobody has it
                if call == "append":  # before it, or after it
                    assert store.n_pages(0, 0) in (n_pages, n_pages + 1)
                    n_pages = store.n_pages(0, 0)
                elif call == "save":
                    assert store.saved() in (None, b"saved")
            store.close()
            assert store.closed
        with KvStore(tmp_path, LAYOUT, 2) as store:
            assert store.n_pages(0, 0) == n_pages
            store.read_pages(PageId(0, 0, 1, 0), n_pages)
        assert signal.getsignal(number) is _interrupt
    finally:
        signal.signal(number, handler)


def _interrupt(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def _raised_at_line(number, n):
    """A signal at the n-th line of the store's code from here on, or at the end."""
    left = [n]

    def trace(frame, event, arg):
        if "/nearkv/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)
        return trace

    before = sys.gettrace()
    gc.disable()  # what is raised in a finalizer is not raised to anybody
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


def test_a_process_that_was_forked_in_the_middle_of_a_change_hears_its_signals(tmp_path):
    # What is started in the background of a script ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        store = KvStore(tmp_path, LAYOUT, 2)
        with store._turn("to be in the middle of it"):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:
                    os._exit(0)
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        store.close()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_process_that_was_forked_while_a_file_was_closed_closes_the_rest(tmp_path):
    store = KvStore(tmp_path, LAYOUT, 2)
    child = os.fork()
    if not child:
        # As another thread leaves it in the middle of `close`. The hook has closed all here already.
        file = store._home.files[0]
        file.fd = 1 << 20
        store._home.close()
        os._exit(0 if file.fd < 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    store.close()


def test_a_store_that_was_forgotten_leaves_its_lock(tmp_path):
    store = KvStore(tmp_path, LAYOUT, 2)
    store.append(0, 0, *_kv(32))
    del store
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == 1


def test_threads_take_turns(tmp_path):
    """Two threads in `append` once shared a staging buffer: pages were wrong with valid checksums."""
    with KvStore(tmp_path, LAYOUT, 2) as store:
        errors = []

        def work(sequence):
            try:
                for at in range(20):
                    x = np.full((2, 32, 64), sequence * 100 + at, np.float16)
                    store.append(sequence, 0, x, x)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for sequence in range(4):
            got = _read(store, 0, sequence, 1)[0].reshape(20, -1)
            expected = np.broadcast_to(sequence * 100 + np.arange(20)[:, None], got.shape)
            np.testing.assert_array_equal(got, expected)


def test_a_call_that_waits_too_long_for_another_says_so(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2, timeout_s=0.05) as store:
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with store._turn("to hold it"):
                entered.set()
                leave.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(20)
        try:
            with pytest.raises(FlashError, match="waited 0.05 s for another call on this store"):
                store.append(0, 0, *_kv(32))
        finally:
            leave.set()
            thread.join()


# --- free space, by itself -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1 << 30)), max_size=60))
def test_slots_are_never_given_to_two(steps):
    slots, taken = Slots(), {}
    for count, choice in steps:
        if choice % 3 and taken:
            first = sorted(taken)[choice % len(taken)]
            slots.give(first, taken.pop(first))
            continue
        first = slots.take(count)
        mine = range(first, first + count)
        assert not any(set(mine) & set(range(a, a + n)) for a, n in taken.items())
        taken[first] = count
    used = [slot for first, count in taken.items() for slot in range(first, first + count)]
    assert slots.end - slots.n_free == len(used)
    again = Slots(used)
    assert again.end - again.n_free == len(used)
    first = again.take(3)
    assert not {first, first + 1, first + 2} & set(used)


def _flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
