# SPDX-License-Identifier: Apache-2.0
"""`nearkv generate --keep` and `--resume`: what one process kept, others go on with."""

import shutil
import signal
import subprocess
import sys

import pytest

from nearkv import cli, generate
from nearkv.hf import models

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = " ".join(f"w{7 * n % 97 + 1}" for n in range(70))
_NEARKV = [sys.executable, "-m", "nearkv.cli", "generate"]


@pytest.fixture
def run(capsys, tiny_model):
    """run(option, ...): words of the answer, and stderr, of a command that must succeed."""

    def run(*options):
        capsys.readouterr()
        code = cli.main(["generate", "--model", tiny_model, *map(str, options)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out.split(), err

    return run


@pytest.fixture
def refused(capsys, tiny_model):
    """refused(option, ...): the line that says why."""

    def refused(*options, model=tiny_model):
        capsys.readouterr()
        assert cli.main(["generate", "--model", str(model), *map(str, options)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return refused


@pytest.fixture
def kept(run, tmp_path):
    """A directory with PROMPT and 12 tokens behind it; and these."""
    directory = tmp_path / "kept"
    words, err = run("--prompt", PROMPT, "--max-new-tokens", 12, "--page-tokens", 32,
                     "--keep", directory)  # fmt: skip
    assert "kept 82 tokens; go on with: nearkv generate --model " in err
    assert f"--resume {directory}\n" in err
    return directory, words


@pytest.mark.slow
def test_a_kept_text_goes_on_as_if_it_had_not_been_interrupted(run, kept):
    directory, words = kept
    whole, _ = run("--prompt", PROMPT, "--max-new-tokens", 40, "--page-tokens", 32)
    assert words == whole[:12]
    for _ in range(2):  # what is kept stays as it was
        more, err = run("--resume", directory, "--max-new-tokens", 28)
        assert more == whole[12:]
        assert "prompt 1 tokens behind 81 in" in err
    more, err = run("--resume", directory, "--keep", directory, "--max-new-tokens", 18)
    assert more == whole[12:30]
    assert "kept 100 tokens" in err
    assert run("--resume", directory, "--max-new-tokens", 10)[0] == whole[30:]


@pytest.mark.slow
def test_it_goes_on_in_another_process_and_behind_a_kill(run, kept, tiny_model):
    directory, words = kept
    whole, _ = run("--prompt", PROMPT, "--max-new-tokens", 40, "--page-tokens", 32)
    resume = [*_NEARKV, "--model", tiny_model, "--resume", directory]
    # Killed while it writes pages that nobody saves.
    running = subprocess.Popen([*resume, "--max-new-tokens", "400"], stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.read(20)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    done = subprocess.run([*resume, "--max-new-tokens", "28"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == whole[12:]


def test_a_prefix_serves_many_prompts(run, kept, tmp_path):
    """As if they had been one prompt, as far as rounding in the prefill lets it."""
    directory, words = kept
    answers = {}
    for prompt in ("w1 w2 w3", "w50 w60", "w1 w2 w3"):
        answer, err = run("--resume", directory, "--prompt", prompt, "--max-new-tokens", 6)
        n_new = len(prompt.split()) + 1  # the last token of the answer was not read yet
        assert f"prompt {n_new} tokens behind 81 in" in err
        assert answers.setdefault(prompt, answer) == answer
        together = " ".join([PROMPT, *words, prompt])
        assert run("--prompt", together, "--max-new-tokens", 6)[0][0] == answer[0]
    assert answers["w1 w2 w3"] != answers["w50 w60"]


def test_a_prompt_alone_can_be_kept(run, refused, tmp_path):
    directory = tmp_path / "prefix"
    words, err = run("--prompt", PROMPT, "--max-new-tokens", 0, "--keep", directory)
    assert words == []
    assert "prompt 70 tokens in" in err
    assert "no answer" in err
    assert "kept 70 tokens" in err
    assert "a prompt alone; add to it with --prompt" in refused("--resume", directory)
    first, err = run("--resume", directory, "--prompt", "w5", "--max-new-tokens", 4)
    assert "prompt 1 tokens behind 70 in" in err
    assert first[0] == run("--prompt", f"{PROMPT} w5", "--max-new-tokens", 1)[0][0]
    more = ["--resume", directory, "--keep", directory, "--prompt", "w5", "--max-new-tokens", 0]
    assert "kept 71 tokens" in run(*more)[1]
    assert "goes with --keep" in refused("--prompt", "w1", "--max-new-tokens", 0)


def test_a_copy_of_the_directory_is_a_second_text(run, kept, tmp_path):
    directory, _ = kept
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    expected = run("--resume", directory, "--max-new-tokens", 8)[0]
    assert run("--resume", copy, "--keep", copy, "--max-new-tokens", 4)[0] == expected[:4]
    assert run("--resume", copy, "--max-new-tokens", 4)[0] == expected[4:]
    assert run("--resume", directory, "--max-new-tokens", 8)[0] == expected


@pytest.mark.slow
def test_several_cards_keep_in_several_directories(run, tmp_path):
    both = [tmp_path / "a", tmp_path / "b"]
    cards = ["--card", "model,model"]
    keep = [word for one in both for word in ("--keep", one)]
    resume = [word for one in both for word in ("--resume", one)]
    words, _ = run("--prompt", PROMPT, "--max-new-tokens", 6, "--page-tokens", 32, *keep, *cards)
    more, _ = run(*resume, "--max-new-tokens", 6, *cards)
    whole, _ = run("--prompt", PROMPT, "--max-new-tokens", 12, "--page-tokens", 32)
    assert words + more == whole
    assert run(*resume, "--max-new-tokens", 6)[0] == more  # and one card is enough


def test_what_cannot_be_resumed_is_refused(refused, kept, tmp_path, save_model, capsys):
    directory, _ = kept
    model = save_model(tmp_path / "other", rope_theta=5000.0)
    assert "of another model: rope" in refused("--resume", directory, model=model)
    model = save_model(tmp_path / "same shape", initializer_range=0.3)
    assert "of another model: model 'LlamaForCausalLM " in refused(
        "--resume", directory, model=model
    )
    assert "something is kept in" in refused("--keep", directory, "--prompt", "w1")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused("--resume", empty)
    for option, value in (("--page-tokens", 32), ("--kv-dtype", "fp16"), ("--kv-dir", empty),
                          ("--machine", "nvme-twin")):  # fmt: skip
        assert f"{option} does not go with --resume" in refused(
            "--resume", directory, option, value
        )
    assert "--kv-dir does not go with --keep" in refused("--keep", empty, "--kv-dir", empty)
    assert "cp -r" in refused("--resume", directory, "--keep", empty)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--keep", str(tmp_path / "no" / "such")])
    assert "there is no directory" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_what_was_never_saved_can_be_begun_again(run, refused, tmp_path, tiny_model):
    directory = tmp_path / "kept"
    command = [*_NEARKV, "--model", tiny_model, "--prompt", PROMPT, "--keep", directory]
    running = subprocess.Popen([*command, "--max-new-tokens", "400"], stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.read(20)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert "no cache is saved here" in refused("--resume", directory)
    words, _ = run("--prompt", PROMPT, "--max-new-tokens", 3, "--keep", directory)
    assert len(words) == 3


# --- chat ------------------------------------------------------------------------------------

CHAT = (
    "{% if messages[0]['role'] != 'system' %}w90 w91 {% endif %}"
    "{% for m in messages %}w9{{ 2 if m.role == 'user' else 3 }} {{ m.content }} w99 {% endfor %}"
    "{% if add_generation_prompt %}w93 {% endif %}"
)


def _ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.fixture
def chat(save_model, tmp_path):
    return models.load(str(save_model(tmp_path / "chat", template=CHAT, eos_token_id=99)))


class _Cache:
    def __init__(self, n_tokens):
        self.get_seq_length = lambda: n_tokens


def _next(chat, kept: str, n_seen: int, prompt: str | None, raw: bool = False) -> list[int]:
    import torch

    ids = torch.tensor([_ids(kept)])
    return generate._go_on(*chat, _Cache(n_seen), ids, prompt, raw)[0].tolist()


def test_a_turn_closes_the_answer_before_it_once(chat):
    cut = "w90 w91 w92 w5 w99 w93 w7 w8"  # by --max-new-tokens
    want = _ids(f"{cut} w99 w92 w6 w99 w93")
    assert _next(chat, cut, 7, "w6") == want
    assert _next(chat, f"{cut} w99", 8, "w6") == want  # ended by itself
    assert _next(chat, cut, 7, "w6", raw=True) == _ids(f"{cut} w6")
    assert _next(chat, f"{cut} w99", 8, "w6", raw=True) == _ids(f"{cut} w6")
    assert _next(chat, cut, 7, None) == _ids(cut)
    with pytest.raises(ValueError, match="has come to its end; add to it with --prompt"):
        _next(chat, f"{cut} w99", 8, None)


def test_a_turn_behind_a_prompt_alone_closes_nothing(chat):
    alone = "w90 w91 w92 w5 w99"
    assert generate._tokens(*chat, "w5", False, False)[0].tolist() == _ids(alone)
    assert _next(chat, alone, 5, "w6") == _ids(f"{alone} w92 w6 w99 w93")
    with pytest.raises(ValueError, match="is a prompt alone"):
        _next(chat, alone, 5, None)


def test_a_template_without_further_turns_is_refused(chat):
    model, tokenizer = chat
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="has no further turns; --raw does without it"):
            _next(chat, "w1 w2", 1, "w6")
