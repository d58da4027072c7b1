# SPDX-License-Identifier: Apache-2.0
"""A cache that is saved, and goes on in another process as if nothing had happened."""

import copy
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nearkv import FlashError, NearStorageCache
from nearkv.hf.state import Identity, from_bytes, to_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
VALUES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 200, "pad_token_id": 0,
    "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
CONFIG = LlamaConfig(**VALUES)
_HERE = Path(__file__).parent


def make_model():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**VALUES), attn_implementation="nearkv"
    ).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def _ids(*shape, seed=1):
    return torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(seed))


def _padded():
    """Ids and mask of 3 rows with 0, 40 and 69 positions of padding on the left."""
    ids, mask = _ids(3, 75), torch.ones(3, 75, dtype=torch.long)
    for row, padded in enumerate((0, 40, 69)):
        ids[row, :padded], mask[row, :padded] = 0, 0
    return ids, mask


def go_on(model, cache, ids, n=40):
    """Greedy tokens behind what the cache holds; ids begin with those, and may have more."""
    past = cache.get_seq_length()
    mask = torch.ones_like(ids)
    mask[:, :past] = cache.attention_mask if past else 1
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, do_sample=False
    )


def _cache(directory, **options):
    options = {"card": "model", "page_tokens": 32, "persistent": True} | options
    return NearStorageCache(CONFIG, directory, **options)


def _in_another_process(body: str, *arguments, kill: bool = False):
    """Run some code after the imports of this file; its last line of output, as JSON."""
    code = f"""
        import importlib.util, json, os, signal, sys
        spec = importlib.util.spec_from_file_location("here", {str(_HERE / "test_persistence.py")!r})
        here = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(here)
        import torch
        from nearkv import NearStorageCache
        model, arguments = here.make_model(), sys.argv[1:]
    """
    code = textwrap.dedent(code) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return None if kill else json.loads(done.stdout.splitlines()[-1])


def _states():
    """Ways to fill a cache, with padding, crop, beams and shared prefixes: they return ids."""
    ids, mask = _padded()

    def padded(model, cache):
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, do_sample=False
        )

    def cropped(model, cache):
        out = padded(model, cache)
        cache.crop(-20)
        return out[:, :-20]

    def beams(model, cache):
        return model.generate(
            _ids(1, 50), past_key_values=cache, max_new_tokens=30, num_beams=3,
            num_return_sequences=3, do_sample=False,
        )  # fmt: skip

    def prefix(model, cache):
        with torch.no_grad():
            model(_ids(1, 70), past_key_values=cache)
        cache.batch_repeat_interleave(4)
        return torch.cat([_ids(1, 70).expand(4, -1), _ids(4, 1, seed=2)], dim=1)

    return {"padded": padded, "cropped": cropped, "beams": beams, "prefix": prefix}


@pytest.mark.slow
def test_after_kill_9_another_process_goes_on_with_the_same_tokens(model, tmp_path):
    expected = {}
    for name, fill in _states().items():
        with NearStorageCache(CONFIG, tmp_path, "model", 32) as cache:
            expected[name] = go_on(model, cache, fill(model, cache)).tolist()
    _in_another_process(
        """
        kept = []
        for name, fill in here._states().items():
            cache = here._cache(here.Path(arguments[0]) / name)
            ids = fill(model, cache)
            cache.save(ids)
            here.go_on(model, cache, ids, 50)  # is not saved
            kept.append(cache)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path, kill=True,
    )  # fmt: skip
    resume = """
        tokens = {}
        for name in here._states():
            directory = here.Path(arguments[0]) / name
            with NearStorageCache.open(directory, here.CONFIG, card="model") as cache:
                tokens[name] = here.go_on(model, cache, cache.token_ids).tolist()
        print(json.dumps(tokens))
    """
    for _ in range(2):  # whoever opens it changes nothing of what is saved
        assert _in_another_process(resume, tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", _states())
def test_an_opened_cache_goes_on_with_the_same_tokens(model, tmp_path, name):
    fill = _states()[name]
    with _cache(tmp_path / "kv") as cache:
        ids = fill(model, cache)
        cache.save(ids)
        n_blocks = cache.store.n_blocks(0)
        expected = go_on(model, cache, ids)
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.store.n_blocks(0) == n_blocks  # prefixes are shared as before
        assert torch.equal(go_on(model, cache, cache.token_ids), expected)


@pytest.mark.slow
def test_what_is_opened_is_what_was_saved(model, tmp_path):
    ids, mask = _padded()
    with _cache(tmp_path / "kv") as cache:
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        cache.save(torch.cat([ids, _ids(3, 2)], dim=1))
        pages = [[cache.store.n_pages(row, layer) for row in range(3)] for layer in range(2)]
        expected = go_on(model, cache, torch.cat([ids, _ids(3, 1)], dim=1))
    for _ in range(2):
        with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
            assert torch.equal(cache.token_ids, torch.cat([ids, _ids(3, 2)], dim=1))
            assert torch.equal(cache.attention_mask, mask)
            assert cache.get_seq_length() == 75
            assert (cache.batch_size, cache.store.layout.page_tokens) == (3, 32)
            assert pages == [
                [cache.store.n_pages(s, layer) for s in cache._batch.sequences]
                for layer in range(2)
            ]
            got = go_on(model, cache, torch.cat([ids, _ids(3, 1)], dim=1))
            assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_prefix_that_was_saved_once_serves_many_prompts(model, tmp_path):
    prefix = _ids(1, 70)
    with _cache(tmp_path / "kv") as cache:
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        cache.save(prefix)
    for seed in (3, 4):
        ids = torch.cat([prefix, _ids(1, 9, seed=seed)], dim=1)
        with NearStorageCache(CONFIG, tmp_path, "model", 32) as fresh:
            with torch.no_grad():
                model(prefix, past_key_values=fresh)
            expected = go_on(model, fresh, ids)
        with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
            assert torch.equal(go_on(model, cache, ids), expected)


@pytest.mark.slow
def test_saving_again_replaces_what_was_saved(model, tmp_path):
    with _cache(tmp_path / "kv") as cache:
        first = go_on(model, cache, _ids(1, 40), 30)
        cache.save(first)
        second = go_on(model, cache, first, 40)
        cache.save(second)
        expected = go_on(model, cache, second, 5)
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert torch.equal(cache.token_ids, second)
        assert torch.equal(go_on(model, cache, second, 5), expected)
        cache.crop(-60)
        cache.save(second[:, : cache.get_seq_length()])
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.get_seq_length() == 109 + 5 - 60
        assert cache.token_ids.shape == (1, 54)
        cache.save()
        assert cache.token_ids is None


@pytest.mark.slow
def test_copies_of_an_opened_cache_have_sequences_of_their_own(model, tmp_path):
    ids = _ids(1, 70)
    with _cache(tmp_path / "kv") as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        other.save(ids)
        other.reset()  # the sequence that was saved is not there any more
        other.close()
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        twin = copy.deepcopy(cache)
        assert not {*twin._batch.sequences} & {*cache._batch.sequences}
        more = torch.cat([ids, _ids(1, 40, seed=2)], dim=1)
        a, b = (go_on(model, of, more) for of in (twin, cache))
        assert torch.equal(a, b)
        cache.reset()
        cache.save()
        twin.close()
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.get_seq_length() == 0


@pytest.mark.slow
def test_other_options_and_more_cards_change_no_token(model, tmp_path):
    ids, mask = _padded()
    with _cache(tmp_path / "kv", card=["model"] * 2) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30,
                             do_sample=False)  # fmt: skip
        cache.save(out)
        expected = go_on(model, cache, out)
    for cards, options in (
        ("model", {"spill_pages": 3}), (["model"] * 2, {"weights": [2, 1]}), (["model"] * 3, {}),
    ):  # fmt: skip
        with NearStorageCache.open(tmp_path / "kv", CONFIG, cards, **options) as cache:
            assert torch.equal(go_on(model, cache, out), expected)


@pytest.mark.slow
def test_faults_are_saved(model, tmp_path):
    with _cache(tmp_path / "kv", on_fault="drop") as cache:
        with torch.no_grad():
            model(_ids(3, 40), past_key_values=cache)
            handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(
                lambda module, args, out: out.index_fill(0, torch.tensor([1]), torch.nan)
            )
            try:
                model(_ids(3, 1), past_key_values=cache)
            finally:
                handle.remove()
            cache.save()
            ours = model(_ids(3, 2), past_key_values=cache).logits
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model", on_fault="drop") as cache:
        assert "Inf or NaN in V of layer 0, sequence 1" in str(cache.faults[1])
        assert isinstance(cache.faults[1], ValueError)
        with torch.no_grad():
            assert torch.equal(model(_ids(3, 2), past_key_values=cache).logits, ours)


@pytest.mark.slow
def test_an_empty_cache_can_be_saved(model, tmp_path):
    with _cache(tmp_path / "kv") as cache:
        cache.save()
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.get_seq_length() == 0
        go_on(model, cache, _ids(2, 5), 3)


# --- refusals ----------------------------------------------------------------------------------


def _saved(a_model, directory, **options):
    with _cache(directory) as cache:
        with torch.no_grad():
            a_model(_ids(1, 40), past_key_values=cache)
        cache.save(_ids(1, 40), **options)


@pytest.mark.slow
def test_another_models_config_is_refused_with_both_values(model, tmp_path):
    _saved(model, tmp_path / "kv", model="weights A", tokenizer="tokenizer A")

    def refused(match, config=CONFIG, **options):
        with pytest.raises(ValueError, match=f"of another model: {match}; open it with its own"):
            NearStorageCache.open(tmp_path / "kv", config, "model", **options)

    refused("rms_norm_eps 1e-06, not 0.01", LlamaConfig(**VALUES | {"rms_norm_eps": 1e-2}))
    refused("vocab_size 200, not 201", LlamaConfig(**VALUES | {"vocab_size": 201}))
    refused("head_dim 32, not 64", LlamaConfig(**VALUES | {"head_dim": 64}))
    refused("num_hidden_layers 2, not 3", LlamaConfig(**VALUES | {"num_hidden_layers": 3}))
    refused("model 'weights A', not 'weights B'", model="weights B")
    refused("tokenizer 'tokenizer A', not 'tokenizer B'", tokenizer="tokenizer B")
    for options in ({}, {"model": "weights A"}, {"tokenizer": "tokenizer A"}):
        NearStorageCache.open(tmp_path / "kv", CONFIG, "model", **options).close()
    # What changes no K and no V may differ.
    other = LlamaConfig(**VALUES | {"eos_token_id": 3, "use_cache": False, "dtype": "float16"})
    NearStorageCache.open(tmp_path / "kv", other, "model").close()


@pytest.mark.slow
def test_tokenizers_are_told_apart_by_their_vocabulary():
    class Tokenizer:
        def __init__(self, **vocabulary):
            self.get_vocab = lambda: vocabulary

    a, b, c = (Identity.of(CONFIG, "", t).tokenizer
               for t in (Tokenizer(x=1, y=2), Tokenizer(y=2, x=1), Tokenizer(x=1, y=3)))  # fmt: skip
    assert a == b != c
    assert a.startswith("Tokenizer ")


@pytest.mark.slow
def test_what_was_not_saved_cannot_be_opened(model, tmp_path):
    with pytest.raises(FlashError, match="there is no KV store in this directory"):
        NearStorageCache.open(tmp_path, CONFIG, "model")
    with _cache(tmp_path / "kv") as cache, torch.no_grad():
        model(_ids(1, 40), past_key_values=cache)
    with pytest.raises(FlashError, match=r"no cache is saved here .*ended before save\(\)"):
        NearStorageCache.open(tmp_path / "kv", CONFIG, "model")
    with _cache(tmp_path / "kv") as cache:  # a new one may take its place
        assert cache.store.sequences() == []
        assert cache.get_seq_length() == 0


@pytest.mark.slow
def test_a_saved_cache_is_not_overwritten_by_a_new_one(model, tmp_path):
    _saved(model, tmp_path / "kv")
    with pytest.raises(ValueError, match="a cache is saved in .*kv; go on with it by NearStorage"):
        _cache(tmp_path / "kv")
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.get_seq_length() == 40
        with pytest.raises(FlashError, match="in use by another process or cache"):
            NearStorageCache.open(tmp_path / "kv", CONFIG, "model")


@pytest.mark.slow
def test_temporary_caches_and_wrong_ids_cannot_be_saved(model, tmp_path):
    with NearStorageCache(CONFIG, tmp_path, "model") as cache:
        with pytest.raises(ValueError, match="temporary cache cannot be saved.*persistent=True"):
            cache.save()
    with pytest.raises(ValueError, match="a persistent cache needs a directory of its own"):
        NearStorageCache(CONFIG, card="model", persistent=True)
    with _cache(tmp_path / "kv") as cache, torch.no_grad():
        model(_ids(2, 40), past_key_values=cache)
        for wrong in (_ids(1, 40), _ids(2, 39), _ids(2)):
            with pytest.raises(ValueError, match=r"input_ids must be \(2, 40 or more\)"):
                cache.save(wrong)
        assert cache.store.saved() is None


@pytest.mark.slow
def test_a_cache_in_the_midst_of_a_forward_pass_is_not_saved(tmp_path):
    with _cache(tmp_path / "kv") as cache:
        cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
        with pytest.raises(RuntimeError, match="between a layer's update and its attention"):
            cache.save()


@pytest.mark.slow
def test_a_failed_save_leaves_the_one_before(model, tmp_path, monkeypatch):
    from nearkv.store.home import Home

    with _cache(tmp_path / "kv") as cache, torch.no_grad():
        model(_ids(1, 40), past_key_values=cache)
        cache.save(_ids(1, 40))
        model(_ids(1, 5), past_key_values=cache)

        def full(*args):
            raise FlashError("cannot write", errno=28)

        with monkeypatch.context() as patch:
            patch.setattr(Home, "write_state", full)
            with pytest.raises(FlashError, match="No space left"):
                cache.save(_ids(1, 45))
        assert cache.token_ids.shape == (1, 40)
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        assert cache.get_seq_length() == 40


@pytest.mark.slow
def test_states_that_are_damaged_or_strange_are_named(model, tmp_path):
    _saved(model, tmp_path / "kv")
    with NearStorageCache.open(tmp_path / "kv", CONFIG, "model") as cache:
        data = cache.store.saved()
        state, identity, ids = from_bytes(data, "here")
        for wrong in (b"", b"xy", data[:-5], data[:200], to_bytes(state, identity, ids)[8:]):
            with pytest.raises(FlashError, match="no state of a NearStorageCache.*file here"):
                from_bytes(wrong, "here")
        state.n_pages[1][0] = 2
        cache.store.save(to_bytes(state, identity, ids))
    with pytest.raises(
        FlashError, match="2 pages of layer 1, sequence 0, of which the store has 1"
    ):
        NearStorageCache.open(tmp_path / "kv", CONFIG, "model")
    with pytest.raises(FlashError, match="2 pages of layer 1"):  # and it was closed properly
        NearStorageCache.open(tmp_path / "kv", CONFIG, "model")
