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
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

from nearkv import cli
from nearkv.batch import engine as engine_module
from nearkv.batch.engine import Engine
from nearkv.hf import models
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
    return random.Random(seed).choices([token for token in range(8, N_WORDS)], k=n)


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
    ended = [alone(line["body"]["prompt"], line["body"]["max_tokens"])[-1] in ENDS for line in MIXED]
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


def test_a_name_that_two_lines_have_is_answered_once(batch):
    code, results, _ = batch([_line("a", [9]), _line("a", [10]), "", " ", _line("b", [10])])
    assert code == 1
    assert len(results) == 2
    # `_read` keeps the last of a name.


def test_a_line_for_another_model_is_answered_and_told(batch, chat_model):
    _, results, err = batch([_line("a", [9], model="gpt-4"), _line("b", [9], model=chat_model)])
    assert f"note: lines that ask for the model 'gpt-4' are answered by {chat_model}" in err
    assert results["a"]["response"]["body"]["model"] == chat_model
