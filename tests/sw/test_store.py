# SPDX-License-Identifier: Apache-2.0
"""Page files: round trips, and every way in which a drive can fail us."""

import errno
import os
from pathlib import Path
import resource
import subprocess
import sys

import numpy as np
import pytest

from nearkv.io import FlashError, PageId
from nearkv.store import KvStore
from nearkv.store import store as store_module
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
        per_extent = store.extent_pages
        k, v = _kv((per_extent + 3) * 32)  # into a second extent
        for a, b in ((0, 64), (64, 96), (96, k.shape[1])):
            for layer in (0, 5):
                for sequence in (0, 9):
                    store.append(sequence, layer, k[:, a:b] + layer, v[:, a:b] - sequence)
        for layer in (0, 5):
            for sequence in (0, 9):
                assert store.n_pages(sequence, layer) == per_extent + 3
                for head in range(2):
                    got_k, got_v = _read(store, layer, sequence, head)
                    np.testing.assert_array_equal(got_k, k[head] + np.float16(layer))
                    np.testing.assert_array_equal(got_v, v[head] - np.float16(sequence))
        numbers = np.arange(2, 2 + per_extent)
        reads = store.reads(PageId(5, 9, 1, 2), numbers, 4096)
        assert [read.nbytes // LAYOUT.page_bytes for read in reads] == [per_extent - 2, 2]
        assert reads[1].page == PageId(5, 9, 1, per_extent)
        assert reads[1].kv_offset == 4096 + (per_extent - 2) * LAYOUT.page_bytes
        assert all(read.offset % 4096 == 0 for read in reads)


def test_extents_are_preallocated_and_at_least_one_mib(tmp_path):
    with KvStore(tmp_path, PageLayout(96, 128), 3) as store:
        store.append(0, 0, *_kv(128, 3, store.layout))
        size = (tmp_path / "sequence-000000.kv").stat()
        assert size.st_size == 3 * store.extent_pages * store.layout.page_bytes
        assert size.st_size >= 3 << 20
        assert size.st_blocks * 512 >= size.st_size
        offsets = store.stored(0, 0)["offset"][:, 0]
        assert np.diff(offsets).min() >= 1 << 20


def test_a_ragged_page_ends_its_span(tmp_path):
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
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store_module.tempfile, "mkdtemp", refuse)
    with pytest.raises(FlashError, match="Permission denied") as caught:
        KvStore(tmp_path, LAYOUT, 2, temporary=True)
    assert caught.value.errno == errno.EACCES


def test_a_full_disk_leaves_what_is_stored(tmp_path, monkeypatch):
    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(64)
        store.append(0, 0, k, v)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(FlashError, match="no room for 2 MiB.*layer 1.*No space left") as caught:
            store.append(0, 1, k, v)
        assert caught.value.errno == errno.ENOSPC
        assert store.n_pages(0, 1) == 0
        store.append(0, 0, k, v)  # its extents have room
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[0], np.concatenate([k[1], k[1]]))


def test_a_file_size_limit_is_noticed_by_the_preallocation(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
        try:
            with pytest.raises(FlashError, match="no room") as caught:
                store.append(0, 1, *_kv(32))
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


def test_a_disk_that_is_really_full(small_disk):
    with KvStore(small_disk, LAYOUT, 2, temporary=True) as store:
        k, v = _kv(64)
        store.append(0, 0, k, v)
        with pytest.raises(FlashError, match="No space left on device"):
            store.append(0, 1, k, v)
        np.testing.assert_array_equal(_read(store, 0, 0, 1)[1], v[1])


def test_without_o_direct_pages_go_through_the_page_cache_and_it_is_said_once(
    tmp_path, monkeypatch, caplog
):
    real = os.open

    def no_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        k, v = _kv(32)
        for sequence in range(3):
            store.append(sequence, 0, k, v)
        np.testing.assert_array_equal(_read(store, 0, 2, 0)[0], k[0])
    assert sum("no O_DIRECT" in record.message for record in caplog.records) == 1


def test_dropped_sequences_give_their_files_back(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for sequence in range(2):
            store.append(sequence, 0, *_kv(32))
        store.drop(0)
        store.drop(7)
        assert store.n_pages(0, 0) == 0
        assert sorted(path.name for path in tmp_path.glob("*.kv")) == ["sequence-000001.kv"]


def test_a_temporary_store_leaves_nothing(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2, temporary=True) as store:
        store.append(0, 0, *_kv(32))
        assert store.directory.parent == tmp_path
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    code = (
        "import os, sys; from nearkv.store import KvStore; from nearkv_hw.abi import PageLayout\n"
        "KvStore(sys.argv[1], PageLayout(64), 1, temporary=True); os._exit(0)"
    )
    with KvStore(tmp_path, LAYOUT, 2, temporary=True) as alive:
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
        (tmp_path / "nearkv-unrelated").mkdir()
        assert len(list(tmp_path.iterdir())) == 3
        with KvStore(tmp_path, LAYOUT, 2, temporary=True) as store:
            names = {alive.directory.name, store.directory.name, "nearkv-unrelated"}
            assert {path.name for path in tmp_path.iterdir()} == names


def test_a_store_has_one_user(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2):
        with pytest.raises(FlashError, match="in use.*choose another directory"):
            KvStore(tmp_path, LAYOUT, 2)
    KvStore(tmp_path, LAYOUT, 2).close()


def test_truncated_spans_are_written_again(tmp_path):
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


@pytest.mark.parametrize("lost_bytes", [1, 64, 100, 129])
def test_reopening_stops_at_a_torn_index(tmp_path, lost_bytes):
    k, v = _kv(32)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        for _ in range(3):
            store.append(0, 0, k, v)
    index = tmp_path / "sequence-000000.index"
    os.truncate(index, index.stat().st_size - lost_bytes)
    left = 2 if lost_bytes <= 128 else 1
    with KvStore(tmp_path, LAYOUT, 2) as store:
        assert store.n_pages(0, 0) == left
        store.read_pages(PageId(0, 0, 1, 0), left)
        store.append(0, 0, v, k)
    with KvStore(tmp_path, LAYOUT, 2) as store:
        np.testing.assert_array_equal(
            _read(store, 0, 0, 1)[0], np.concatenate([k[1]] * left + [v[1]])
        )


def test_reopening_without_a_page_file_names_it(tmp_path):
    with KvStore(tmp_path, LAYOUT, 2) as store:
        store.append(0, 0, *_kv(32))
    (tmp_path / "sequence-000000.kv").unlink()
    with pytest.raises(FlashError, match=r"sequence-000000\.kv.*No such file"):
        KvStore(tmp_path, LAYOUT, 2)


def test_an_index_entry_is_written_after_its_pages(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with KvStore(tmp_path, LAYOUT, 2) as store:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(FlashError, match="cannot write KV pages.*kv head 0.*Input/output"):
            store.append(0, 0, *_kv(32))
        assert (tmp_path / "sequence-000000.index").stat().st_size == 0
        assert store.n_pages(0, 0) == 0


def _flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
