# SPDX-License-Identifier: Apache-2.0
"""`nearkv batch`: every line of a file is answered once, as if it were alone, whatever comes between."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nearkv import cli
from nearkv.batch.engine import Engine
from nearkv.batch.prefixes import shared_prefixes
from nearkv.batch.results import Results, Run
from nearkv.io import FlashError, PageId

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
N_WORDS = 100
ENDS = [45, 60]  # tokens that end an answer


@pytest.fixture(scope="module")
def chat_model(save_model, tmp_path_factory):
    """The directory of a small model that ends some answers by itself."""
    directory = tmp_path_factory.mktemp("chat")
    return str(save_model(directory, template=TEMPLATE, eos_token_id=ENDS))


@pytest.fixture(scope="module")
def alone(chat_model, rounded_cache):
    """alone(tokens, n): greedy tokens behind a prompt, by transformers' own attention and cache."""
    model = AutoModelForCausalLM.from_pretrained(chat_model, attn_implementation="sdpa").eval()
    known = {}

    def alone(tokens, n):
        key = (*tokens, n)
        if key not in known:
            ids = model.generate(
                torch.tensor([tokens]), past_key_values=rounded_cache(model.config),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                do_sample=False, max_new_tokens=n, pad_token_id=0,
            )  # fmt: skip
            known[key] = ids[0, len(tokens) :].tolist()
        return known[key]

    return alone


def _prompt(seed, n):
    return random.Random(seed).choices(range(8, N_WORDS), k=n)


def _line(name, tokens, **body):
    body = {"prompt": tokens, "max_tokens": 12, "temperature": 0} | body
    return {"custom_id": str(name), "method": "POST", "url": "/v1/completions", "body": body}


def _write(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))


def _read(path):
    """The results by custom_id; each is whole, and there once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["custom_id"]: record for record in records}


def _texts(record):
    assert record["error"] is None, record
    return [choice["text"] for choice in record["response"]["body"]["choices"]]


def _words(tokens):
    """What a completion of these tokens says: not its end, and not the special token 0."""
    said = tokens[:-1] if tokens[-1] in ENDS else tokens
    return "".join(f" w{token}" for token in said if token)


@pytest.fixture
def batch(capsys, chat_model, tmp_path):
    """batch(lines, option, ...): exit status, results by custom_id, and stderr."""

    def batch(lines, *options, output=tmp_path / "out.jsonl"):
        if lines is not None:
            _write(tmp_path / "in.jsonl", lines)
        capsys.readouterr()
        code = cli.main(
            ["batch", str(tmp_path / "in.jsonl"), str(output), "--model", chat_model,
             "--card-config", "tiny", "--page-tokens", "32", *map(str, options)]
        )  # fmt: skip
        return code, _read(output) if output.exists() else {}, capsys.readouterr().err

    return batch


def _check(results, lines, alone):
    """Each greedy line has the answer that its prompt has alone."""
    assert results.keys() == {line["custom_id"] for line in lines}
    for line in lines:
        body = line["body"]
        tokens = alone(body["prompt"], body["max_tokens"])
        record = results[line["custom_id"]]
        assert _texts(record) == [_words(tokens)]
        usage = record["response"]["body"]["usage"]
        assert usage["prompt_tokens"] == len(body["prompt"])
        assert usage["completion_tokens"] == len(tokens)
        reason = record["response"]["body"]["choices"][0]["finish_reason"]
        assert reason == ("stop" if tokens[-1] in ENDS else "length")


# --- answers ---------------------------------------------------------------------------------------

# Short ones, some of a page and of several pages; answers of many lengths.
MIXED = [
    _line(n, _prompt(n, length), max_tokens=1 + 7 * n % 40)
    for n, length in enumerate((1, 3, 90, 31, 32, 33, 64, 65, 5, 100, 70, 12, 40, 3, 9, 50))
]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_greedy_answers_are_those_of_each_prompt_alone(batch, alone, size):
    code, results, err = batch(MIXED, "--batch-size", size)
    assert code == 0
    assert f"16 prompts, {size} at once" in err
    assert "16 lines answered; in" in err
    _check(results, MIXED, alone)


def test_some_answers_end_before_their_limit(alone):
    """Or the tests here would not show that rows leave early."""
    ended = [
        alone(line["body"]["prompt"], line["body"]["max_tokens"])[-1] in ENDS for line in MIXED
    ]
    assert any(ended)
    assert not all(ended)


@pytest.mark.slow
def test_no_answer_depends_on_the_order_of_the_lines_or_on_what_is_beside_it(batch, tmp_path):
    lines = [
        _line(n, _prompt(n, 10 + 9 * n), temperature=1.1, **more)
        for n, more in enumerate(
            (
                {},
                {"seed": 1},
                {"top_p": 0.5},
                {"top_k": 3},
                {"n": 3},
                {"seed": 1},
                {"n": 2, "seed": 4},
            )
        )
    ]
    _, expected, _ = batch(lines, "--batch-size", 8)
    for seed, size in ((1, 3), (2, 8), (3, 4)):
        random.Random(seed).shuffle(lines)
        _, results, _ = batch(lines, "--batch-size", size, output=tmp_path / f"{seed}.jsonl")
        assert {name: _texts(one) for name, one in results.items()} == {
            name: _texts(one) for name, one in expected.items()
        }
    _, results, _ = batch([lines[0]], output=tmp_path / "alone.jsonl")
    (name,) = results
    assert _texts(results[name]) == _texts(expected[name])


def test_random_answers_follow_their_seeds(batch, tmp_path):
    prompt = _prompt(1, 20)
    lines = [
        _line("a", prompt, temperature=1, seed=5),
        _line("b", prompt, temperature=1, seed=5),
        _line("c", prompt, temperature=1, seed=6, n=3),
        _line("d", prompt, temperature=1),
        _line("e", prompt, temperature=1),
        _line("f", prompt, temperature=1, top_k=1),
        _line("g", prompt, temperature=1, top_p=0),
        _line("h", prompt),
    ]
    _, results, _ = batch(lines)
    texts = {name: _texts(one) for name, one in results.items()}
    assert texts["a"] == texts["b"]
    assert len({*texts["c"], *texts["a"]}) == 4
    assert texts["d"] != texts["e"]  # the custom_id is a seed
    assert texts["f"] == texts["g"] == texts["h"]
    usage = results["c"]["response"]["body"]["usage"]
    assert usage["total_tokens"] == 20 + usage["completion_tokens"]
    assert sum(len(text.split()) for text in texts["c"]) <= usage["completion_tokens"] <= 36
    _, again, _ = batch(lines, "--seed", 1, output=tmp_path / "other.jsonl")
    assert _texts(again["d"]) != texts["d"]
    assert _texts(again["a"]) == texts["a"]


def test_shared_prefixes_are_read_and_stored_once(batch, alone):
    root, branch = _prompt("root", 70), _prompt("branch", 40)
    lines = [
        *(_line(f"root {n}", [*root, *_prompt(n, 3 + n)]) for n in range(4)),
        *(_line(f"branch {n}", [*root, *branch, *_prompt(n, 40 - n)]) for n in range(3)),
        _line("other", _prompt("other", 50)),
        _line("the same", [*root, *_prompt(0, 3)]),
    ]
    code, results, err = batch(lines, "--batch-size", 4)
    assert code == 0
    _check(results, lines, alone)
    # 64 tokens of the root and 96 of the branch are whole pages.
    n_all = sum(len(line["body"]["prompt"]) for line in lines)
    n_shared = 5 * 64 + 3 * 96
    n_read = n_all - n_shared + 64 + 32
    assert f"prompts {n_read} tokens, and {n_shared} that others had read" in err


@pytest.mark.parametrize("n_new", [0, 60])
def test_stop_texts_end_an_answer_and_are_not_in_it(batch, alone, n_new):
    prompts = (_prompt(seed, 20 + n_new) for seed in range(100))
    prompt = next(one for one in prompts if not {*alone(one, 30)} & {0, *ENDS})
    tokens = alone(prompt, 30)
    words = [f"w{token}" for token in tokens]
    lines = [
        _line("one", prompt, max_tokens=30, stop=words[5]),
        _line("two", prompt, max_tokens=30, stop=["nothing", f"{words[8]} {words[9]}"]),
        _line("none", prompt, max_tokens=30, stop="nothing"),
        _line("last", prompt, max_tokens=12, stop=words[11]),
        _line("within", prompt, max_tokens=30, stop=words[4][1:]),
    ]
    _, results, _ = batch(lines)
    whole = _words(tokens)
    for name, stop in (
        ("one", words[5]),
        ("two", f"{words[8]} {words[9]}"),
        ("within", words[4][1:]),
    ):
        body = results[name]["response"]["body"]
        assert body["choices"][0] == {
            "index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop",
        }  # fmt: skip
    assert _texts(results["none"]) == [whole]
    last = results["last"]["response"]["body"]["choices"][0]
    assert last["finish_reason"] == "stop"


def test_chats_go_through_the_template(batch, alone):
    said = [_prompt(n, 20) for n in range(3)]
    messages = [
        {"role": role, "content": _words(tokens).strip()}
        for role, tokens in zip(("developer", "user", "assistant"), said, strict=True)
    ]
    messages[1]["content"] = [{"type": "text", "text": messages[1]["content"]}]
    line = _line("chat", None, messages=messages, max_completion_tokens=9, max_tokens=None)
    line["url"] = "/v1/chat/completions"
    del line["body"]["prompt"]
    code, results, _ = batch([line])
    assert code == 0
    body = results["chat"]["response"]["body"]
    tokens = alone([token for part in said for token in (1, *part, 2)], 9)
    assert body["object"] == "chat.completion"
    text = _words(tokens).strip()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert results["chat"]["response"]["status_code"] == 200


@pytest.mark.parametrize(("url", "n_expected"), [("/v1/completions", 16), ("chat", 21)])
def test_lines_that_do_not_say_how_long_get_what_is_usual(batch, tmp_path, url, n_expected):
    """16 of a completion, and of a chat what there are positions for, unless told otherwise."""
    prompt = _prompt(0, 490)
    line = _line("a", _words(prompt).strip(), max_tokens=None, logit_bias={}, stop=None)
    if url == "chat":
        line["url"] = "/v1/chat/completions"
        line["body"]["messages"] = [{"role": "user", "content": line["body"].pop("prompt")}]
    for options, n in (((), n_expected), (("--max-tokens", 5), 5)):
        _, results, _ = batch([line], *options, output=tmp_path / f"{n}.jsonl")
        usage = results["a"]["response"]["body"]["usage"]
        assert usage["completion_tokens"] == n or (
            results["a"]["response"]["body"]["choices"][0]["finish_reason"] == "stop"
            and usage["completion_tokens"] < n
        )


@pytest.mark.model
def test_the_demo_model_answers_a_file_as_it_answers_each_line(capsys, tmp_path, rounded_cache):
    from nearkv.hf import models

    model, tokenizer = models.load()
    model.set_attn_implementation("sdpa")
    model.generation_config.max_length = None
    system = "You are a helpful assistant who answers in one short sentence. " * 12
    questions = ["What is the capital of France?", "Why is the sky blue?", "Name three colours."]
    lines, expected = [], {}
    for n, question in enumerate(questions):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(
            **ids, past_key_values=rounded_cache(model.config), do_sample=False, max_new_tokens=12
        )
        new = out[0, ids["input_ids"].shape[1] :]
        expected[str(n)] = tokenizer.decode(new, skip_special_tokens=True)
        body = {"messages": messages, "max_tokens": 12, "temperature": 0}
        lines.append({"custom_id": str(n), "url": "/v1/chat/completions", "body": body})
    _write(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    assert cli.main(["batch", str(tmp_path / "in.jsonl"), str(output)]) == 0
    assert " that others had read; KV written" in capsys.readouterr().err
    records = _read(output)
    said = {
        name: record["response"]["body"]["choices"][0]["message"]["content"]
        for name, record in records.items()
    }
    assert said == expected
    (model_name,) = {record["response"]["body"]["model"] for record in records.values()}
    assert model_name == models.DEMO_NAME


# --- lines that cannot be answered ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line is not JSON: Expecting property name"),
        ("[1]", "the line is no JSON object"),
        ("[" * 100_000, "the line is not JSON: "),
        ({"custom_id": 3}, "custom_id must be a text that is not empty"),
        (_line("x", [9]) | {"method": "GET"}, "method must be POST, not 'GET'"),
        (_line("x", [9]) | {"url": "/v1/embeddings"}, "url must be /v1/chat/completions or /v1/comp"),
        (_line("x", [9]) | {"body": []}, "body must be a JSON object"),
        (_line("x", None), "prompt is missing"),
        (_line("x", ""), "prompt must be a text or a list of tokens, and not empty, not ''"),
        (_line("x", ["a", "b"]), "prompt must be a text or a list of tokens"),
        (_line("x", [9, True]), "prompt must be a whole number from 0"),
        (_line("x", [9, 100]), "prompt has tokens beyond the model's 100"),
        (_line("x", " "), "the tokenizer makes no tokens of this prompt"),
        (_line("x", [9] * 600), "a prompt of 600 tokens and an answer of 12 do not fit the model's 512"),
        (_line("x", [9], max_tokens=0), "max_tokens must be a whole number from 1"),
        (_line("x", [9], max_tokens=1.5), "max_tokens must be a whole number from 1"),
        (_line("x", [9], max_tokens=513), "do not fit the model's 512 positions"),
        (_line("x", [9], temperature=-1), "temperature must be a number from 0 to 2, not -1"),
        (_line("x", [9], temperature=float("nan")), "temperature must be a number from 0 to 2"),
        (_line("x", [9], top_p="high"), "top_p must be a number from 0 to 1, not 'high'"),
        (_line("x", [9], stop=[""]), "stop must be a text or a list of texts, not ['']"),
        (_line("x", [9], n=0), "n must be a whole number from 1 to 128, not 0"),
        (_line("x", [9], n=9), "n is 9, and 4 answers are computed at once"),
        (_line("x", [9], logprobs=2), "logprobs is not supported, except as False (it is 2)"),
        (_line("x", [9], frequency_penalty=0.5), "frequency_penalty is not supported, except as 0.0"),
        (_line("x", [9], stream=True), "stream is not supported, except as False"),
        (_line("x", [9], beam_width=2), "beam_width is not supported for /v1/completions"),
        (_line("x", [9], messages=[]), "messages is not supported for /v1/completions"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_answered_says_why_and_the_others_go_on(batch, alone, line, message):
    good = [_line("before", _prompt(0, 5)), _line("behind", _prompt(1, 5))]
    code, results, err = batch([good[0], line, good[1]], "--batch-size", 4)
    assert code == 1
    assert "2 lines answered, 1 with an error" in err
    ((name, record),) = (one for one in results.items() if one[0] not in ("before", "behind"))
    assert name == ("x" if isinstance(line, dict) and line["custom_id"] == "x" else None)
    assert record["id"].endswith("-2")
    assert message in record["error"]["message"]
    assert record["response"]["status_code"] == 400
    assert record["response"]["body"]["error"]["message"] == record["error"]["message"]
    _check({name: results[name] for name in ("before", "behind")}, good, alone)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": ["a"]}, "messages [0] must be a JSON object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages [0] has role 'tool', and supported"),
        ({"messages": [{"role": "user"}]}, "messages [0] must have a text as content, not None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages [0] has a part of type 'image_url', and supported is text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
         "messages [0] has tool_calls, which is not supported"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools is not supported"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
         "response_format is not supported, except as {'type': 'text'}"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_answered_says_why(batch, body, message):
    line = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body}
    code, results, _ = batch([line])
    assert code == 1
    assert results["x"]["error"]["message"].startswith(message)


def test_a_chat_needs_a_template(batch, tiny_model):
    line = _line("x", None, messages=[{"role": "user", "content": "w1"}])
    del line["body"]["prompt"]
    line["url"] = "/v1/chat/completions"
    _, results, _ = batch([line, _line("y", [9])], "--model", tiny_model)
    assert "the model has no chat template; use /v1/completions" in results["x"]["error"]["message"]
    assert results["y"]["error"] is None


def test_a_name_that_two_lines_have_is_answered_once(batch, tmp_path):
    code, results, _ = batch([_line("a", [9]), _line("a", [10]), "", " ", _line("b", [10])])
    assert code == 1
    assert results.keys() == {"a", "b"}
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    mine = sorted((one for one in answers if one["custom_id"] == "a"), key=lambda one: one["id"])
    assert mine[0]["error"] is None
    assert mine[1]["error"]["message"] == "custom_id 'a' is that of line 1 too"


def test_a_line_for_another_model_is_answered_and_told(batch, chat_model):
    _, results, err = batch([_line("a", [9], model="gpt-4"), _line("b", [9], model=chat_model)])
    assert f"note: lines that ask for the model 'gpt-4' are answered by {chat_model}" in err
    assert results["a"]["response"]["body"]["model"] == chat_model


# --- prefixes ---------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_prefixes_are_shared_and_come_behind_what_they_begin_with(prompts, unit, deepest):
    prompts = [np.array(one, np.int32) for one in prompts]
    found = shared_prefixes(prompts, unit, deepest)
    path = []
    for prefix in found:
        del path[prefix.depth :]
        assert len(path) == prefix.depth <= deepest
        assert prefix.length % unit == 0
        whole = prompts[prefix.of][: prefix.length]
        assert len(whole) == prefix.length
        for shorter, tokens in path:
            assert shorter < prefix.length
            assert (whole[:shorter] == tokens).all()
        path.append((prefix.length, whole))
        for member in prefix.members:
            assert len(prompts[member]) > prefix.length
            assert (prompts[member][: prefix.length] == whole).all()
        sharing = [one for one in prompts if [*one[: prefix.length]] == [*whole]]
        assert len(sharing) >= 2 or not prefix.depth
        lengths = [len(prompts[member]) for member in prefix.members]
        assert lengths == sorted(lengths)
    assert sorted(member for prefix in found for member in prefix.members) == [*range(len(prompts))]


def test_all_that_two_prompts_share_is_found():
    root, branch = [1] * 8, [2] * 4
    prompts = [[*root, 3], [*root, *branch, 4], [*root, *branch, 5, 6], [7], [*root, 8, 9]]
    found = shared_prefixes([np.array(one, np.int32) for one in prompts], 4, 7)
    assert [(one.length, one.depth, one.members) for one in found] == [
        (0, 0, [3]), (8, 1, [0, 4]), (12, 2, [1, 2]),
    ]  # fmt: skip
    assert shared_prefixes([], 4, 7) == []


# --- whatever interrupts it -------------------------------------------------------------------------

_KILLED = """
import json, os, random, signal, sys
import torch
torch.set_num_threads(1)
from nearkv import cli
from nearkv.batch import engine, results
import transformers.models.llama.modeling_llama  # once, for all children

arguments, seeds = json.loads(sys.argv[1]), range(int(sys.argv[2]))

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(seed):
    # Dies before, within or behind a write of results, or in a step between two of them.
    rng = random.Random(seed)
    left = [rng.randrange(4)]
    write, sync, step = os.write, os.fdatasync, engine.Engine._step
    moment = ("before", "within", "unsynced", "behind", "step")[seed % 5]

    def killing_write(fd, data):
        if not data.startswith(results._BEGIN):
            return write(fd, data)
        left[0] -= 1
        if left[0] >= 0:
            return write(fd, data)
        if moment == "before":
            die()
        if moment == "within":
            write(fd, data[: rng.randrange(1, len(data))])
            die()
        n = write(fd, data)
        return die() if moment == "unsynced" else n

    def killing_sync(fd):
        sync(fd)
        if left[0] < 0 and moment == "behind":
            die()

    def killing_step(self):
        step(self)
        if left[0] < 2 and moment == "step":
            die()

    os.write, os.fdatasync, engine.Engine._step = killing_write, killing_sync, killing_step

for seed in seeds:
    child = os.fork()
    if not child:
        arm(seed)
        os._exit(cli.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_behind_twenty_kills_every_line_is_there_once_and_as_without(batch, chat_model, tmp_path):
    lines = [
        _line(n, _prompt(n % 7, 20 + 9 * (n % 7)), max_tokens=2 + n % 11, temperature=n % 3 / 2)
        for n in range(70)
    ]
    lines.insert(9, "{")
    _, expected, _ = batch(lines, "--batch-size", 5)
    output = tmp_path / "killed.jsonl"
    arguments = ["batch", str(tmp_path / "in.jsonl"), str(output), "--model", chat_model, "--card-config",
                 "tiny", "--page-tokens", "32", "--batch-size", "5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, json.dumps(arguments), "20"], capture_output=True, text=True
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 20, done.stderr
    n_before = output.read_bytes().count(b"\n")
    assert 0 < n_before < len(lines)
    code, results, err = batch(None, "--batch-size", 5, output=output)
    assert code == 1  # of the line that is none
    assert f"has {n_before} of 71 results already" in err
    assert results.keys() == expected.keys()
    for name, record in results.items():
        for one in (record, expected[name]):
            one["response"]["body"].pop("created", None)
        assert record == expected[name]
    before = output.read_bytes()
    assert batch(None, output=output)[0] == 1
    assert output.read_bytes() == before


def test_whatever_a_loss_of_power_leaves_is_cut_at_the_last_whole_line(tmp_path):
    path, run = tmp_path / "out.jsonl", Run("0" * 8, "1" * 8, "2" * 8)
    with Results(path) as results:
        results.begin(run)
        for line in (3, 1):
            results.write({line: {"id": run.id(line), "custom_id": "é", "error": None}})
    whole = path.read_bytes()
    n_first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        for more in (b"", bytes(9)):  # a file may have grown before its bytes arrived
            path.write_bytes(whole[:end] + more)
            with Results(path) as results:
                results.begin(run)
                n_lines = (end >= n_first) + (end == len(whole))
                assert results.done == {*(3, 1)[:n_lines]}
            assert path.read_bytes() == (b"", whole[:n_first], whole)[n_lines]


def test_whatever_is_left_of_the_last_line_is_cut_and_computed_again(batch, tmp_path):
    lines = [_line(n, _prompt(n, 5), max_tokens=2) for n in range(3)]
    _, expected, _ = batch(lines)
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    last = whole[start:]
    for torn in (b"{", last[:9], last[:40], last[:-1], last[:-2] + b"\n", bytes(len(last)),
                 last[:50] + bytes(20), last[:50] + b"\n"):  # fmt: skip
        output.write_bytes(whole[:start] + torn)
        code, results, err = batch(None)
        assert code == 0
        assert f"cut off a torn line of {len(torn)} bytes" in err
        assert {name: _texts(one) for name, one in results.items()} == {
            name: _texts(one) for name, one in expected.items()
        }
    output.write_bytes(b'{"id": "ne')  # of the first line
    assert batch(None)[0] == 0


@pytest.fixture
def refused(batch, capsys, tmp_path):
    """refused(option, ...): the line that says why, of a command that changes no results."""

    def refused(*options, output=tmp_path / "out.jsonl"):
        before = output.read_bytes() if output.is_file() else None
        capsys.readouterr()
        assert cli.main(["batch", str(tmp_path / "in.jsonl"), str(output), *map(str, options)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert (output.read_bytes() if output.is_file() else None) in (before, b"")
        return err.splitlines()[-1]

    return refused


def test_results_of_two_runs_never_mix(batch, refused, chat_model, tiny_model, tmp_path):
    lines = [_line(n, _prompt(n, 5), max_tokens=2) for n in range(3)]
    batch(lines)
    same = ["--model", chat_model, "--card-config", "tiny"]
    assert "results of another model;" in refused("--model", tiny_model)
    assert "results of other settings (--kv-dtype, --max" in refused(*same, "--seed", 1)
    assert "results of other settings" in refused(*same, "--kv-dtype", "bf16")
    _write(tmp_path / "in.jsonl", lines[:2])
    assert "results of another input file" in refused(*same)
    assert (
        "of another input file (or this one, as it was before it was changed) and another model"
        in (refused("--model", tiny_model))
    )
    assert batch(lines, "--batch-size", 2, "--card", "model")[0] == 0  # what changes no answer


def test_files_that_do_not_fit_are_refused_at_once_and_left_alone(batch, refused, tmp_path):
    inputs, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert f"cannot read the input: No such file or directory: '{inputs}'" in refused()
    inputs.write_text("\n\n")
    assert f"{inputs} has no lines" in refused()
    _write(inputs, [_line("a", [9])])
    assert "no file that could be read again" in refused(output=tmp_path)
    assert "is the input file; results go to another one" in refused(output=inputs)
    output.write_text("{}\n")
    assert "holds something else than results of nearkv batch" in refused()
    output.write_text("precious")  # without a newline
    assert "holds something else" in refused()
    output.unlink()
    missing = tmp_path / "missing" / "out.jsonl"
    assert f"cannot write results: No such file or directory: '{missing}'" in refused(
        output=missing
    )
    os.mkfifo(tmp_path / "fifo")
    assert "no file that could be read again" in refused(output=tmp_path / "fifo")
    batch([_line(n, [9 + n], max_tokens=1) for n in range(3)])
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"{\n" + lines[2])
    assert f"{output} is damaged: line 2 is no result" in refused()


def test_two_runs_cannot_write_one_file(batch, refused, tmp_path):
    batch([_line("a", [9])])
    with open(tmp_path / "out.jsonl") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing this file" in refused()


def test_a_full_disk_under_the_results_loses_nothing(
    batch, refused, chat_model, monkeypatch, tmp_path
):
    lines = [_line(n, _prompt(n, 5), max_tokens=2 + n) for n in range(6)]
    _, expected, _ = batch(lines)
    output, write, left = tmp_path / "full.jsonl", os.write, [3]

    def full(fd, data):
        if data.startswith(b'{"id": "nearkv'):
            left[0] -= 1
            if left[0] < 0:
                write(fd, data[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    code, results, err = batch(None, output=output)
    monkeypatch.undo()
    assert code == 2
    assert "3 of 6 results are in" in err
    assert f"cannot write results: No space left on device: '{output}'" in err
    assert len(results) == 3
    assert output.read_bytes().endswith(b"}\n")
    code, results, _ = batch(None, output=output)
    assert code == 0
    assert {name: _texts(one) for name, one in results.items()} == {
        name: _texts(one) for name, one in expected.items()
    }


def test_ctrl_c_says_that_nothing_is_lost(batch, monkeypatch, capsys):
    step, left = Engine._step, [5]

    def interrupted(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "_step", interrupted)
    lines = [_line(n, _prompt(n, 5), max_tokens=2 + n) for n in range(9)]
    code, results, err = batch(lines)
    monkeypatch.undo()
    assert code == 130
    assert re.search(rf"{len(results)} of 9 results are in \S+; the same command goes on", err)
    assert 0 < len(results) < 9
    code, results, err = batch(None)
    assert (code, len(results)) == (0, 9)


# --- damage, budgets --------------------------------------------------------------------------------


def _damage(store, sequence):
    """Change a byte of the first page of a sequence; whether it has one."""
    if not store.n_pages(sequence, 0):
        return False
    store.flush()
    entry = store.stored(sequence, 0)[0, 0]
    fd = os.open(store.page_files()[entry["shard"]], os.O_RDWR)
    byte = os.pread(fd, 1, int(entry["offset"]))
    os.pwrite(fd, bytes([byte[0] ^ 1]), int(entry["offset"]))
    os.close(fd)
    return True


@pytest.fixture
def damaging(monkeypatch):
    """damaging(name, times): a page of this line is damaged; and again when it is computed once more."""

    def damaging(name, times):
        step, left = Engine._step, [times]

        def damaged(self):
            for row, sequence in zip(self._rows, self._cache._batch.sequences, strict=True):
                mine = row.job.request.custom_id == name and row.job.failures == times - left[0]
                if mine and left[0] and len(row.tokens) > 2:
                    left[0] -= _damage(self._cache.store, sequence)
                    break
            step(self)

        monkeypatch.setattr(Engine, "_step", damaged)
        return left

    return damaging


def test_a_damaged_sequence_is_computed_once_more(batch, alone, damaging):
    lines = [_line(n, _prompt(n, 70), max_tokens=12) for n in range(4)]
    left = damaging("2", 1)
    code, results, err = batch(lines)
    assert left == [0]
    assert code == 0
    assert "4 lines answered, 1 computed once more" in err
    _check(results, lines, alone)


def test_a_sequence_that_is_damaged_twice_has_an_error(batch, alone, damaging):
    lines = [_line(n, _prompt(n, 70), max_tokens=12, n=1 + n) for n in range(4)]
    left = damaging("2", 2)
    code, results, err = batch(lines)
    assert left == [0]
    assert code == 1
    assert "3 lines answered, 1 with an error, 1 computed once more" in err
    bad = results.pop("2")
    assert bad["error"]["code"] == "kv_damaged"
    assert "its K and V were damaged twice: " in bad["error"]["message"]
    assert "CRC" in bad["error"]["message"]
    assert bad["response"]["status_code"] == 500
    for name, record in results.items():
        words = _words(alone(lines[int(name)]["body"]["prompt"], 12))
        assert _texts(record) == [words] * (1 + int(name))


def test_what_shares_a_damaged_page_is_computed_once_more_without_it(batch, alone, damaging):
    root = _prompt("root", 64)
    prompts = ([*root, *_prompt(seed, 9 + seed % 4)] for seed in range(100))
    long = [one for one in prompts if not {*alone(one, 9)} & {*ENDS}][:4]
    lines = [_line(n, prompt, max_tokens=9) for n, prompt in enumerate(long)]
    left = damaging("1", 1)
    code, results, err = batch(lines)
    assert left == [0]
    assert code == 0
    assert "4 lines answered, 4 computed once more" in err
    _check(results, lines, alone)


def test_a_full_drive_ends_the_run_and_no_line(batch, monkeypatch):
    """It is not the line's fault, and the next run may have room."""
    from nearkv.store import KvStore

    append, left = KvStore.append, [4]

    def full(self, sequence, layer, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            page = PageId(layer, sequence, 0, 0)
            raise FlashError("the drive is full", page=page, errno=errno.ENOSPC, filename="kv")
        return append(self, sequence, layer, *args, **kwargs)

    monkeypatch.setattr(KvStore, "append", full)
    lines = [_line(n, _prompt(n, 40), max_tokens=2) for n in range(9)]
    code, results, err = batch(lines, "--batch-size", 1)
    monkeypatch.undo()
    assert code == 2
    assert "the drive is full" in err
    assert len(results) == 2
    assert all(record["error"] is None for record in results.values())
    assert batch(None)[0] == 0


def test_a_write_budget_stops_between_prompts_and_the_next_run_goes_on(batch, alone):
    page_bytes = 32 * 32 * 2 * 2  # tokens, channels, K and V, fp16
    per_prompt = 2 * page_bytes * 2 * 2  # pages, layers, kv heads
    lines = [_line(n, _prompt(n, 70), max_tokens=30) for n in range(6)]
    budget, done, code = 3 * per_prompt + page_bytes, 0, 3
    while code == 3:
        code, results, err = batch(lines, "--batch-size", 2, "--write-budget", budget)
        assert float(re.search(r"KV written ([\d.]+) KiB", err)[1]) * 1024 <= budget
        assert len(results) - done in (2, 3)  # answers write pages too
        done = len(results)
        if code:
            assert f"stopped by --write-budget: {6 - done} lines are left; the same comm" in err
    assert code == 0
    _check(results, lines, alone)


def test_a_budget_for_not_one_prompt_says_so(batch):
    code, results, err = batch([_line("a", _prompt(0, 70)), _line("b", [9])], "--write-budget", 1)
    assert code == 3
    assert results.keys() == {"b"}
    assert "stopped by --write-budget: 1 lines are left" in err


def test_host_memory_decides_how_many_prompts_are_at_work(batch, refused, chat_model, tmp_path):
    lines = [_line(n, _prompt(n, 40), max_tokens=3) for n in range(4)]
    sizes = []
    for memory in ("140M", "1G"):
        _, _, err = batch(lines, "--host-memory", memory, output=tmp_path / f"{memory}.jsonl")
        n, mib = re.search(r"4 prompts, (\d+) at once, in ([\d,]+) MiB", err).groups()
        assert int(mib.replace(",", "")) <= (140 if memory == "140M" else 1024)
        sizes.append(int(n))
    assert sizes[0] <= sizes[1] == 32
    options = ["--model", chat_model, "--card-config", "tiny", "--host-memory", "20M"]
    assert "of host memory, and --host-memory allows 20 MiB; raise it" in refused(*options)
    assert "lower --batch-size" in refused(*options, "--batch-size", 100)


def test_the_figures_as_json(capsys, batch, chat_model, tmp_path):
    _write(tmp_path / "in.jsonl", [_line("a", _prompt(0, 70)), "{"])
    arguments = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--json"]
    assert cli.main([*arguments, "--model", chat_model]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert (figures["lines"], figures["answered"], figures["errors"]) == (2, 1, 1)
    assert figures["prompt_tokens_read"] == 70


def test_several_cards_and_drives(batch, alone, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    code, results, err = batch(
        MIXED, "--card", "model,model", "--kv-dir", tmp_path / "a", "--kv-dir", tmp_path / "b"
    )
    assert code == 0
    _check(results, MIXED, alone)
    assert not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]


def test_vllm_is_an_extra(refused, tmp_path, monkeypatch):
    _write(tmp_path / "in.jsonl", [_line("a", [9])])
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "needs the extra 'vllm'; install it with: pip install 'nearkv[vllm]'" in refused(
        "--engine", "vllm"
    )
