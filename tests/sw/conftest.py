# SPDX-License-Identifier: Apache-2.0
"""Cards for the host's tests."""

import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as nearkv.cli does, and why is said there

import pytest
import torch

import nearkv
from nearkv.io import uring
from nearkv.io.uring import Uring


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


class Drive:
    """Makes reads of page files fail, however they are made.

    `fate(file name, offset, nbytes)` says what becomes of a read: None, or a dict with any of
    delay (s), errno, short (bytes that arrive).
    """

    def __init__(self, monkeypatch):
        self.fate = lambda name, offset, nbytes: None
        self.reads = []  # (file name, offset, nbytes)
        preadv, read, wait = os.preadv, Uring.read, Uring.wait
        completions = Uring.completions
        fates, held = {}, []  # by (ring, key); (due, key, result)

        def ask(fd, offset, nbytes):
            name = file_name(f"/proc/self/fd/{fd}")
            self.reads.append((name, offset, nbytes))
            return self.fate(name, offset, nbytes) or {}

        def faulty_preadv(fd, buffers, offset):
            fate = ask(fd, offset, len(buffers[0]))
            time.sleep(fate.get("delay", 0))
            if "errno" in fate:
                raise OSError(fate["errno"], os.strerror(fate["errno"]))
            return preadv(fd, [buffers[0][: fate.get("short")]], offset)

        def faulty_read(ring, key, fd, offset, address, nbytes):
            fates[ring, key] = fate = ask(fd, offset, nbytes)
            read(ring, key, fd, offset, address, fate.get("short", nbytes))

        def faulty_wait(ring, timeout_s):
            left = [due - time.monotonic() for whose, due, *_ in held if whose is ring]
            limits = [max(min(left), 0)] if left else []
            limits += [] if timeout_s is None else [timeout_s]
            wait(ring, min(limits, default=None))

        def faulty_completions(ring):
            for key, result in completions(ring):
                fate = fates.pop((ring, key))
                due = time.monotonic() + fate.get("delay", 0)
                held.append((ring, due, key, -fate["errno"] if "errno" in fate else result))
            for work in [work for work in held if work[0] is ring and work[1] <= time.monotonic()]:
                held.remove(work)
                yield work[2:]

        monkeypatch.setattr(os, "preadv", faulty_preadv)
        monkeypatch.setattr(Uring, "read", faulty_read)
        monkeypatch.setattr(Uring, "wait", faulty_wait)
        monkeypatch.setattr(Uring, "completions", faulty_completions)


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


@pytest.fixture
def drive(monkeypatch):
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
