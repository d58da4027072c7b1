# SPDX-License-Identifier: Apache-2.0
"""Cards for the host's tests."""

import errno
import gc
import mmap
import os
import queue
import sys
import threading
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as nearkv.cli does, and why is said there

import numpy as np
import pytest
import torch

import nearkv
from nearkv.cards import Card
from nearkv.io import JobMemory, KvMemory, uring
from nearkv.io.uring import Uring
from nearkv_hw.config import preset
from nearkv_sim.model import ModelCard


@pytest.fixture(scope="module")
def one_thread():
    """Small models are faster on one thread, and do not suffer when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rounded_cache():
    """transformers' own cache, holding what nearkv stores."""
    from transformers import DynamicCache

    class RoundedCache(DynamicCache):
        def __init__(self, config, kind=torch.float16):
            super().__init__(config=config)
            self.kind = kind

        def update(self, k, v, *args, **kwargs):
            return super().update(*(x.to(self.kind).to(x) for x in (k, v)), *args, **kwargs)

    return RoundedCache


def _save_tokenizer(directory, template: str | None = None) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(100)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def save_tokenizer():
    """save_tokenizer(directory, template=None): one of the words w0 .. w99, a token each."""
    return _save_tokenizer


@pytest.fixture(scope="session")
def save_model():
    """save_model(directory, head_dim=32, template=None, **config): a small Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(directory, head_dim: int = 32, template: str | None = None, **more):
        _save_tokenizer(directory, template)
        torch.manual_seed(0)
        shape = {
            "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim,
            "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 100, "initializer_range": 0.2,
            "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip
        config = LlamaConfig(**shape | more)
        LlamaForCausalLM(config).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_model(save_model, tmp_path_factory):
    """The directory of a small model; nothing may change it."""
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def card():
    with nearkv.open_card("model") as card:
        yield card


@pytest.fixture
def simulate(monkeypatch):
    """simulate(...) is a nearkv_sim.xrt.Simulation in whose environment this process is."""
    from nearkv_sim.xrt import Simulation

    opened = []

    def start(*args, **options):
        opened.append(Simulation(*args, **{"config": "tiny"} | options))
        for name, value in opened[-1].environment.items():
            monkeypatch.setenv(name, value)
        return opened[-1]

    yield start
    if pynq := sys.modules.get("pynq"):
        pynq.Clocks.set_device(None)  # which PYNQ would keep
    gc.collect()  # cards that a failed test has left open
    for simulation in opened:
        simulation.close()


class Drive:
    """Makes reads of page files fail, however they are made.

    `fate(file name, offset, nbytes)` says what becomes of a read: None, or a dict with any of
    delay (s), until (an event, for the read to arrive), errno, short (bytes that arrive).
    """

    def __init__(self, monkeypatch):
        self.fate = lambda name, offset, nbytes: None
        self.reads = []  # (file name, offset, nbytes)
        preadv, read, wait = os.preadv, Uring.read, Uring.wait
        completions = Uring.completions
        fates, held = {}, []  # by (ring, key); (ring, due, fate, key, result)

        def ask(fd, offset, nbytes):
            name = file_name(f"/proc/self/fd/{fd}")
            self.reads.append((name, offset, nbytes))
            return self.fate(name, offset, nbytes) or {}

        def faulty_preadv(fd, buffers, offset):
            fate = ask(fd, offset, len(buffers[0]))
            time.sleep(fate.get("delay", 0))
            if "until" in fate:
                fate["until"].wait(60)
            if "errno" in fate:
                raise OSError(fate["errno"], os.strerror(fate["errno"]))
            return preadv(fd, [buffers[0][: fate.get("short")]], offset)

        def faulty_read(ring, key, fd, offset, address, nbytes):
            fates[ring, key] = fate = ask(fd, offset, nbytes)
            read(ring, key, fd, offset, address, fate.get("short", nbytes))

        def faulty_wait(ring, timeout_s, *, completions=True):
            left = [
                0.005 if "until" in fate else due - time.monotonic()
                for whose, due, fate, *_ in held
                if whose is ring
            ]
            wait(ring, max(min([timeout_s, *left]), 0), completions=completions)

        def faulty_completions(ring):
            for key, result in completions(ring):
                fate = fates.pop((ring, key))
                due = time.monotonic() + fate.get("delay", 0)
                result = -fate["errno"] if "errno" in fate else result
                held.append((ring, due, fate, key, result))
            for work in list(held):
                whose, due, fate, key, result = work
                late = due > time.monotonic() or ("until" in fate and not fate["until"].is_set())
                if whose is ring and not late:
                    held.remove(work)
                    yield key, result

        self._monkeypatch = monkeypatch
        monkeypatch.setattr(os, "preadv", faulty_preadv)
        monkeypatch.setattr(Uring, "read", faulty_read)
        monkeypatch.setattr(Uring, "wait", faulty_wait)
        monkeypatch.setattr(Uring, "completions", faulty_completions)

    def break_ring(self, point, after=0, error=None):
        """Make a method of every ring raise, after so many calls that go well."""
        method, left = getattr(Uring, point), [after]

        def broken(ring, *args, **kwargs):
            if left[0] <= 0:
                raise error or OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            left[0] -= 1
            return method(ring, *args, **kwargs)

        self._monkeypatch.setattr(Uring, point, broken)


def file_name(path) -> str:
    """The name of an open file of a store, as `Drive` tells it; files without one have a number."""
    return os.path.basename(os.readlink(path).removesuffix(" (deleted)"))


def places(store, sequence) -> set[tuple[str, int]]:
    """(file name, offset) of every page that a sequence has by now."""
    store.flush()
    names = [file_name(path) for path in store.page_files()]
    return {
        (names[entry["shard"]], int(entry["offset"]))
        for layer in store.layers(sequence)
        for entry in store.stored(sequence, layer).reshape(-1)
    }


class Faults(dict):
    """{sequence: fate}, for `Drive`: what befalls reads of the pages that a sequence has by then."""

    def __init__(self, store=None):
        self.store = store
        self._places = {}

    def __setitem__(self, sequence, fate):
        self._places[sequence] = places(self.store, sequence)
        super().__setitem__(sequence, fate)

    def __call__(self, name, offset, nbytes):
        for sequence, fate in list(self.items()):
            if sequence not in self.store.sequences():
                continue  # dropped: its places are somebody else's
            page_bytes = self.store.layout.page_bytes
            touched = ((name, at) for at in range(offset, offset + nbytes, page_bytes))
            if any(place in self._places[sequence] for place in touched):
                return fate
        return None


class Board:
    """Hardware to make a card of, with memories of its own, in a thread that stands in for another device.

    `kv` is mapped into the host as a BAR would be; `job` is not, so that a forgotten sync shows. It
    computes as the card `model` does. `before(number)` is called before each run is carried out, and may
    wait, raise, or return "skip".
    """

    def __init__(self, kv_bytes=1 << 20, job_bytes=1 << 18, config="tiny"):
        self.model = ModelCard(preset(config))
        self.rows, self.max_head_dim = self.model.config.rows, self.model.config.max_head_dim
        self.config_hash = self.model.config.hash32
        fd = os.memfd_create("kv")
        os.ftruncate(fd, kv_bytes)
        self.bar, self.kv = (np.frombuffer(mmap.mmap(fd, kv_bytes), np.uint8) for _ in range(2))
        os.close(fd)
        self.job = np.zeros(job_bytes, np.uint8)
        self.before = lambda number: None
        self.runs, self.resets, self.stops, self.closed = 0, 0, 0, False
        self._queue = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while (run := self._queue.get()) is not None:
            try:
                if self.before(run.number) != "skip":
                    self.model.execute(self.kv, self.job, *run.arguments)
            except RuntimeError as error:
                run.error = error
            self._idle.set()
            run.ended.set()

    # --- what an executor does

    def attach(self, kv, job):
        assert kv.address == self.bar.ctypes.data

    def start(self, *arguments):
        assert self._idle.is_set(), "one run at a time"
        self._idle.clear()
        run = BoardRun(self.runs, arguments)
        self.runs += 1
        self._queue.put(run)
        return run

    def stop(self):
        self.stops += 1

    def reset(self, timeout_s):
        if not self._idle.wait(timeout_s):
            raise TimeoutError("the board still computes")
        self.resets += 1

    def close(self, timeout_s):
        if not self._idle.wait(timeout_s):
            raise TimeoutError("the board still computes")
        self.closed = True
        self._queue.put(None)


class BoardRun:
    def __init__(self, number, arguments):
        self.number, self.arguments = number, arguments
        self.ended, self.error = threading.Event(), None

    def wait(self, timeout_s):
        if not self.ended.wait(timeout_s):
            raise TimeoutError("the board does not answer")
        if self.error is not None:
            raise self.error


class BoardJob(JobMemory):
    """The host's copy of a board's job memory."""

    def __init__(self, board):
        super().__init__(len(board.job))
        self.board = board

    def renewed(self):
        return self  # a reset board uses nothing of it

    def sync_to_device(self, offset, nbytes):
        self.board.job[offset : offset + nbytes] = self.bytes[offset : offset + nbytes]

    def sync_from_device(self, offset, nbytes):
        self.bytes[offset : offset + nbytes] = self.board.job[offset : offset + nbytes]


def board_card(board, **options):
    kv = KvMemory(len(board.bar), address=board.bar.ctypes.data, keep=board)
    return Card("board", kv, BoardJob(board), board, **options)


@pytest.fixture
def open_board():
    """Opens boards: (board, card)."""
    opened = []

    def open_board(board=None, **options):
        opened.append(board or Board())
        card = board_card(opened[-1], **options)
        opened.append(card)
        return opened[-2:]

    yield open_board
    for card in opened[1::2]:
        card.close()


@pytest.fixture
def drive(monkeypatch):
    uring.refusal()  # found out by a read, once; it is none of the test's
    return Drive(monkeypatch)


@pytest.fixture
def faults_of(drive):
    """`faults_of(store)` is a dict {sequence: fate} of what befalls reads of its pages."""

    def make(store=None):
        drive.fate = Faults(store)
        return drive.fate

    return make


@pytest.fixture(params=["uring", "threads"])
def reader_kind(request):
    if request.param == "uring" and uring.refusal():
        pytest.skip(uring.refusal())
    return request.param
