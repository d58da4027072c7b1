# SPDX-License-Identifier: Apache-2.0
"""One sequence of a batch goes wrong: it is named and taken out, the others do not notice."""

import errno
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria

from nearkv import CardError, FlashError, NearStorageCache
from nearkv.cards import open_card
from nearkv.io import PageId
from nearkv.store.writer import PageWriter

pytestmark = pytest.mark.usefixtures("one_thread")
STEP, NEW_TOKENS, PAD = 10, 36, 3  # of the fault; in all


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=3, intermediate_size=128, vocab_size=300, pad_token_id=PAD,
        eos_token_id=None, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="nearkv").eval()


class _At(StoppingCriteria):
    """Calls something before a step."""

    def __init__(self, step, what):
        self.left, self.what = step, what

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if not self.left:
            self.what()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _generate(model, cache, what=lambda: None, **options):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 300, (4, 90), generator=generator)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((0, 3, 40, 11)):
        ids[row, :padded], mask[row, :padded] = PAD, 0
    torch.manual_seed(5)
    result = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS,
        stopping_criteria=[_At(STEP, what), *cache.stopping_criteria],
        logits_processor=cache.logits_processor, **{"do_sample": False} | options,
    )  # fmt: skip
    return result[:, 90:]


@pytest.fixture
def make(model, tmp_path):
    opened = []

    def make(cards=1, reader="auto", **options):
        mine = [open_card("model", reader=reader) for _ in range(cards)]
        cache = NearStorageCache(model.config, tmp_path, mine, 32, **{"on_fault": "drop"} | options)
        opened.extend([cache, *mine])
        return cache

    yield make
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    with NearStorageCache(model.config, tmp_path_factory.mktemp("kv"), "model", 32) as cache:
        return _generate(model, cache)


def _check(got, expected, cache, dropped):
    """The rows that were dropped are padding from then on, the others are as expected."""
    assert sorted(cache.faults) == dropped
    for row in range(4):
        if row in dropped:
            assert torch.equal(got[row, :STEP], expected[row, :STEP])
            assert (got[row, STEP:] == PAD).all()
            assert cache.store.n_pages(row, 0) == 0
        else:
            assert torch.equal(got[row], expected[row])


@pytest.mark.slow
@pytest.mark.parametrize("cards", [1, 2])
def test_a_row_whose_drive_fails_is_dropped(model, make, expected, faults_of, cards, reader_kind):
    cache = make(cards, reader_kind)
    bad = faults_of(cache.store)
    got = _generate(model, cache, lambda: bad.__setitem__(1, {"errno": errno.EIO}))
    _check(got, expected, cache, [1])
    error = cache.faults[1]
    assert isinstance(error, FlashError)
    assert (error.page.sequence, error.errno) == (1, errno.EIO)
    assert "pages-" in error.filename


@pytest.mark.slow
def test_rows_whose_pages_are_damaged_or_missing_are_dropped(
    model, make, expected, faults_of, caplog
):
    cache = make()
    bad = faults_of(cache.store)

    def damage():
        cache.store.flush()
        (path,) = cache.store.page_files()
        _, offset = cache.store.locate(PageId(1, 0, 1, 1))
        with open(path, "r+b") as file:
            file.seek(offset + 100)
            byte = file.read(1)
            file.seek(offset + 100)
            file.write(bytes([byte[0] ^ 4]))
        bad[2] = {"short": 0}  # as if the file ended there

    got = _generate(model, cache, damage)
    _check(got, expected, cache, [0, 2])
    for row, kind, what in ((0, CardError, "CRC"), (2, FlashError, "truncated")):
        error = cache.faults[row]
        assert isinstance(error, kind)
        assert what in str(error)
        assert error.page.sequence == row
        assert "pages-0.kv" in error.filename
        assert str(error) in caplog.text


@pytest.mark.slow
def test_a_row_with_nan_is_dropped_also_when_tokens_are_drawn(model, make):
    broken = []

    def hook(module, args, out):
        if broken:
            out = out.clone()
            out[3] = torch.nan
        return out

    options = {"do_sample": True, "temperature": 1.3, "top_k": 50}
    whole = _generate(model, make(), **options)
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(hook)
    try:
        cache = make()
        got = _generate(model, cache, lambda: broken.append(1), **options)
    finally:
        handle.remove()
    assert "Inf or NaN in K of layer 1, sequence 3" in str(cache.faults[3])
    # Rows share the random numbers, and the dropped one takes as many of them.
    _check(got, whole, cache, [3])


@pytest.mark.slow
def test_rows_that_cannot_be_written_are_dropped_and_their_space_is_given_back(
    model, make, expected, monkeypatch
):
    cache, real = make(), PageWriter.write

    def write(writer, spills):
        if any(spill.sequence == 3 for spill in spills):
            raise FlashError("cannot write KV pages", errno=errno.ENOSPC,
                             page=PageId(spills[0].layer, 3, 0, spills[0].position))  # fmt: skip
        return real(writer, spills)

    def fill():
        cache.store.flush()
        monkeypatch.setattr(PageWriter, "write", write)

    got = _generate(model, cache, fill)
    assert list(cache.faults) == [3]
    assert cache.faults[3].errno == errno.ENOSPC
    assert 3 not in cache.store.sequences()
    for row in (0, 1, 2):
        assert torch.equal(got[row], expected[row])


def test_when_all_rows_are_dropped_the_call_ends(model, make, drive):
    cache, bad = make(), []
    drive.fate = lambda *_: {"errno": errno.EIO} if bad else None
    got = _generate(model, cache, lambda: bad.append(1))
    assert sorted(cache.faults) == [0, 1, 2, 3]
    assert got.shape[1] == STEP + 1
    cache.reset()
    assert cache.faults == {}


def test_raising_is_the_default(model, make, drive):
    cache, bad = make(on_fault="raise"), []
    drive.fate = lambda *_: {"errno": errno.EIO} if bad else None
    with pytest.raises(FlashError, match=r"page 0 of layer \d, sequence 0"):
        _generate(model, cache, lambda: bad.append(1))
    with pytest.raises(ValueError, match='on_fault must be "raise" or "drop", not \'ignore\''):
        make(on_fault="ignore")


@pytest.mark.slow
def test_a_drive_that_does_not_answer_for_one_row(model, make, expected, faults_of, reader_kind):
    cache = make(reader=reader_kind)
    bad = faults_of(cache.store)

    def hang():
        cache.card.timeout_s = 1.5
        bad[3] = {"until": go_on}

    go_on = threading.Event()
    got = _generate(model, cache, hang)
    go_on.set()
    _check(got, expected, cache, [3])
    assert "1.5 s" in str(cache.faults[3])
    assert cache.faults[3].page.sequence == 3


@pytest.mark.slow
def test_a_run_that_times_out_once_is_done_again(model, make, expected, monkeypatch, caplog):
    cache = make()
    execute = type(cache.card.executor.backend).execute
    hang = []

    def sometimes(backend, *arguments):
        if hang:
            hang.pop()
            raise TimeoutError("it hangs")
        return execute(backend, *arguments)

    monkeypatch.setattr(type(cache.card.executor.backend), "execute", sometimes)
    got = _generate(model, cache, lambda: hang.append(1))
    _check(got, expected, cache, [])
    assert "it hangs; the card is reset and the work done again" in caplog.text
    cache.reset()
    with pytest.raises(CardError, match="it hangs"):
        _generate(model, cache, lambda: hang.extend([1, 1]))
