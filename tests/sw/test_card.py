# SPDX-License-Identifier: Apache-2.0
"""Opening cards, their memories, and what they say when something is wrong."""

import os
import sys
import threading
import time

import numpy as np
import pytest

from nearkv.cards import Card, CardError, Simulated, open_card, opening
from nearkv.io import FlashError, JobMemory, KvMemory, PageId, Read
from nearkv_hw import abi
from nearkv_hw.config import PRESETS, preset


class Backend:
    """Answers queues as told."""

    def __init__(self, config=PRESETS["tiny"], **summary):
        self.config, self.summary, self.closed = config, summary, 0

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s):
        values = dict.fromkeys((field.name for field in abi.SUMMARY.fields), 0)
        values |= {
            "abi_version": abi.ABI_VERSION,
            "config_hash": self.config.hash32,
            "n_jobs": n_jobs,
        } | self.summary
        data = np.frombuffer(abi.SUMMARY.pack(**values), np.uint8)
        job[summary : summary + len(data)] = data

    def close(self):
        self.closed += 1


def _card(open_backend=Backend, **options):
    kv, job = KvMemory(1 << 16), JobMemory(1 << 16)
    return Card("test", kv, job, Simulated(open_backend), **options)


def test_open_card_gives_the_build_that_was_asked_for():
    for config in ("tiny", preset("tiny")):
        with open_card("model", config=config, kv_bytes=1 << 20, job_bytes=1 << 16) as card:
            assert isinstance(card, Card)
            assert (card.name, card.rows, card.max_head_dim) == ("model", 2, 64)
            assert (card.kv_bytes, card.job_bytes) == (1 << 20, 1 << 16)
    with pytest.raises(ValueError, match="choose one of tiny, smartssd"):
        open_card("model", config="huge")


def test_unknown_cards_are_answered_with_those_there_are():
    for name in ("modell", "", "gpu:0"):
        with pytest.raises(CardError, match=f"no card '{name}'; there are 'model', ") as caught:
            open_card(name)
        assert all(repr(known) in str(caught.value) for known in opening._FAMILIES)
    with pytest.raises(CardError, match="'model:1'.*without a number"):
        open_card("model:1")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(opening._FAMILIES, "odd", opening._simulated("not_there.card", "Card", 1.0))
    with pytest.raises(CardError, match="needs the package not_there.*pip install not_there"):
        open_card("odd")


def test_memory_sizes_are_pages():
    with pytest.raises(ValueError, match="kv_bytes must be a positive multiple of 4096, not 100"):
        open_card("model", kv_bytes=100)


def test_job_memory_keeps_what_was_written_and_guards_its_ends():
    with _card() as card:
        card.write_job(128, b"abc")
        assert card.read_job(127, 5).tobytes() == b"\0abc\0"
        for offset, nbytes in ((-1, 4), (65533, 4)):
            with pytest.raises(ValueError, match="65536 bytes of job memory"):
                card.read_job(offset, nbytes)
            with pytest.raises(ValueError, match="65536 bytes of job memory"):
                card.write_job(offset, bytes(nbytes))


def _read(path, nbytes=4096, kv_offset=0):
    return Read(os.open(path, os.O_RDONLY), path, 0, nbytes, kv_offset, PageId(1, 2, 3, 4), 4096)


def test_loads_arrive_where_they_should(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    (tmp_path / "pages").write_bytes(data.tobytes())
    with _card() as card:
        card.load([_read(tmp_path / "pages", 8192, 12288), _read(tmp_path / "pages")])
        np.testing.assert_array_equal(card._kv.simulated()[12288:20480], data)
        np.testing.assert_array_equal(card._kv.simulated()[:4096], data[:4096])
        card.load([])
        with pytest.raises(ValueError, match="kv memory"):
            card.load([_read(tmp_path / "pages", 8192, 61440)])


def test_a_short_file_fails_the_load_and_leaves_the_card_usable(tmp_path):
    (tmp_path / "pages").write_bytes(bytes(4096))
    with _card() as card:
        with pytest.raises(FlashError, match="truncated.*page 5 of layer 1, sequence 2, kv head 3"):
            card.load([_read(tmp_path / "pages"), _read(tmp_path / "pages", 8192)])
        card.load([_read(tmp_path / "pages")])


def test_a_load_that_hangs_says_what_it_waited_for(tmp_path, drive, reader_kind):
    (tmp_path / "pages").write_bytes(bytes(4096))
    arrives = threading.Event()
    drive.fate = lambda name, offset, nbytes: {"until": arrives}
    with _card(reader=reader_kind) as card:
        with pytest.raises(CardError, match=r"0\.05 s, 1 of 1 reads.*page 4 of layer 1.*pages"):
            card.load([_read(tmp_path / "pages")], timeout_s=0.05)
        with pytest.raises(CardError, match="unusable after a load"):
            card.load([])
        (late,) = card._late
        arrives.set()
        late.wait(30)
        card.load([])


def test_a_run_that_takes_too_long_says_so():
    class Slow(Backend):
        def execute(self, kv, job, queue, n_jobs, summary, timeout_s):
            time.sleep(timeout_s)
            raise TimeoutError("12 beats read")

    with _card(Slow, timeout_s=0.01) as card:
        with pytest.raises(CardError, match=r"3 jobs did not end within 0\.01 s: 12 beats read"):
            card.run(0, 3, 1024)
        with pytest.raises(CardError, match="open it again"):
            card.run(0, 3, 1024)
        memories = card._kv, card._job
        card.reset()
        # Whoever still has the old ones may write there as long as he likes.
        assert not {id(card._kv), id(card._job)} & {id(memory) for memory in memories}


def test_a_backend_that_breaks_is_a_card_error():
    class Broken(Backend):
        def execute(self, *args):
            raise RuntimeError("burst crosses 4096 bytes")

    with _card(Broken) as card, pytest.raises(CardError, match="'test': burst crosses 4096"):
        card.run(0, 1, 1024)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"abi_version": 99}, "different versions of nearkv.*0x63"),
        ({"config_hash": 1}, "not the build that was asked for"),
        ({"n_jobs": 1}, "stopped early"),
        ({"error": 16}, "AXI bus error"),
    ],
)
def test_a_summary_that_does_not_fit_is_refused(wrong, message):
    with _card(lambda: Backend(**wrong)) as card, pytest.raises(CardError, match=message) as caught:
        card.run(0, 2, 1024)
    assert caught.value.counters["n_jobs"] == wrong.get("n_jobs", 2)


def test_the_summary_is_returned():
    with _card(lambda: Backend(cycles=77)) as card:
        assert card.run(0, 2, 1024)["cycles"] == 77
        with pytest.raises(ValueError, match="job memory"):
            card.run(65536, 1, 0)


def test_closed_cards_refuse_work():
    backend = Backend()
    with _card(lambda: backend) as card:
        pass
    card.close()
    assert backend.closed == 1
    with pytest.raises(CardError, match="is closed"):
        card.read_job(0, 1)


def test_runs_that_were_not_begun_when_a_card_was_closed_are_not():
    backend = Backend()
    card = _card(lambda: backend)
    run = card.start_run(0, 2, 1024)
    backend.execute = None
    card.close()
    with pytest.raises(CardError, match="was closed during a run of 2 jobs"):
        card.finish_run(run)


def test_opening_a_card_is_what_loads_the_simulation():
    assert "nearkv_sim.model" in sys.modules or open_card("model").close() is None
