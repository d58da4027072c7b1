# SPDX-License-Identifier: Apache-2.0
"""The OpenAI batch file: its lines as requests, and answers as the lines of its result file.

A line of the input is a JSON object with `custom_id`, `method` "POST", `url` and `body`, which is the body of a
chat completion or of a completion. What a body may say is in `_FIELDS`; anything else is refused by name, because
an answer that ignores half of a question looks like any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import json
import time
from typing import Any

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_ROLES = ("system", "developer", "user", "assistant")
_MOST_CHOICES = 128


@dataclass(frozen=True)
class Request:
    """A line that can be answered.

    Attributes
    ----------
    line : int
        Of the input, from 1.
    custom_id : str
    url : CHAT or COMPLETION
    model : str
        What the line asks for; empty if it does not say.
    prompt : list of dict, str, or list of int
        Messages with "role" and "content" of a chat; text or tokens of a completion.
    max_tokens : int or None
        None where the line does not say.
    temperature, top_p, top_k
        0 is greedy; top_k 0 is no limit.
    seed : int or None
    stop : tuple of str
    n : int
        How many choices are asked for.
    """

    line: int
    custom_id: str
    url: str
    model: str
    prompt: Any
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Refusal:
    """A line that cannot be answered, and why.

    Attributes
    ----------
    line : int
    custom_id : str or None
        None if it has none.
    code, message : str
    status : int
        Of HTTP: 400 if the line is at fault, 500 if the machine is.
    param : str or None
        The field of the body that is at fault.
    """

    line: int
    custom_id: str | None
    message: str
    code: str = "invalid_request"
    status: int = 400
    param: str | None = None


class _Wrong(ValueError):
    """What is wrong with a field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


def read_batch(data: bytes) -> list[Request | Refusal]:
    """The lines of an input file; empty ones are none.

    Parameters
    ----------
    data : bytes
        UTF-8, a JSON object a line.
    """
    found: list[Request | Refusal] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        custom_id = None
        try:
            record = _object(line)
            custom_id = _custom_id(record)
            first = seen.setdefault(custom_id, number)
            if first != number:
                raise _Wrong(f"custom_id {custom_id!r} is that of line {first} too", "custom_id")
            found.append(_request(number, custom_id, record))
        except _Wrong as error:
            found.append(Refusal(number, custom_id, str(error), param=error.param))
    return found


def _object(line: bytes) -> dict:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Wrong(f"the line is not UTF-8, at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"the line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _Wrong("the line is no JSON object")
    return record


def _custom_id(record: Mapping) -> str:
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _Wrong("custom_id must be a text that is not empty", "custom_id")
    return custom_id


def _request(line: int, custom_id: str, record: Mapping) -> Request:
    url, body = record.get("url"), record.get("body")
    if record.get("method", "POST") != "POST":
        raise _Wrong(f"method must be POST, not {record['method']!r}", "method")
    if url not in (CHAT, COMPLETION):
        raise _Wrong(f"url must be {CHAT} or {COMPLETION}, not {url!r}", "url")
    if not isinstance(body, dict):
        raise _Wrong("body must be a JSON object", "body")
    values = {}
    for name, value in body.items():
        field = _FIELDS[url].get(name)
        if field is None:
            raise _Wrong(f"{name} is not supported for {url}", name)
        if value is None:  # as if it were not there
            continue
        try:
            values[name] = field(value)
        except _Wrong as error:
            raise _Wrong(f"{name} {error}", name) from None
    what = "messages" if url == CHAT else "prompt"
    if what not in values:
        raise _Wrong(f"{what} is missing", what)
    return Request(
        line, custom_id, url, values.get("model", ""), values[what],
        values.get("max_completion_tokens", values.get("max_tokens")),
        values.get("temperature", 1.0), values.get("top_p", 1.0), values.get("top_k", 0),
        values.get("seed"), values.get("stop", ()), values.get("n", 1),
    )  # fmt: skip


# --- fields: each takes a JSON value that is not null, and gives what it means or raises _Wrong ------


def _text(value) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"must be a text, not {_short(value)}")
    return value


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[Any], int]:
    def field(value) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _Wrong(f"must be a whole number from {least} to {most}, not {_short(value)}")
        return value

    return field


def _number(least: float, most: float) -> Callable[[Any], float]:
    def field(value) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise _Wrong(f"must be a number from {least:g} to {most:g}, not {_short(value)}")
        return float(value)

    return field


def _stop(value) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise _Wrong(f"must be a text or a list of texts, not {_short(value)}")
    return tuple(stops)


def _messages(value) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Wrong("must be a list of messages")
    return [_message(number, one) for number, one in enumerate(value)]


def _message(number: int, message) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _Wrong(f"[{number}] must be a JSON object")
    for name, what in message.items():
        if name not in ("role", "content", "name", "refusal") and what not in (None, []):
            raise _Wrong(f"[{number}] has {name}, which is not supported")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _Wrong(f"[{number}] has role {_short(role)}, and supported are {', '.join(_ROLES)}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise _Wrong(f"[{number}] has a part of type {_short(kind)}, and supported is text")
        content = "".join(_text(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise _Wrong(f"[{number}] must have a text as content, not {_short(content)}")
    # What OpenAI calls developer is what the templates of models call system.
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompt(value) -> str | list[int]:
    if isinstance(value, str) and value:
        return value
    token = _whole(0)
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return [token(one) for one in value]
    raise _Wrong(f"must be a text or a list of tokens, and not empty, not {_short(value)}")


def _only(*allowed) -> Callable[[Any], Any]:
    """A field that is supported as long as it asks for nothing."""

    def field(value):
        if not any(type(value) in (type(one), int) and value == one for one in allowed):
            raise _Wrong(f"is not supported, except as {allowed[0]!r} (it is {_short(value)})")
        return value

    return field


def _anything(value):
    """A field that concerns OpenAI's service and no answer."""
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_BOTH: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "max_tokens": _whole(1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(0),  # not OpenAI's, but every server's of open models
    "seed": _whole(-(2**63)),
    "stop": _stop,
    "n": _whole(1, _MOST_CHOICES),
    "stream": _only(False),
    "stream_options": _only(None),
    "frequency_penalty": _only(0.0),
    "presence_penalty": _only(0.0),
    "logit_bias": _only({}),
    "logprobs": _only(False),
    "user": _anything,
    "metadata": _anything,
    "store": _anything,
    "service_tier": _anything,
    "safety_identifier": _anything,
    "prompt_cache_key": _anything,
}
_FIELDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    CHAT: _BOTH
    | {
        "messages": _messages,
        "max_completion_tokens": _whole(1),
        "top_logprobs": _only(0),
        "response_format": _only({"type": "text"}),
        "tools": _only([]),
        "tool_choice": _only("none"),
        "parallel_tool_calls": _anything,  # of tools that there are none of
        "functions": _only([]),
        "modalities": _only(["text"]),
    },
    COMPLETION: _BOTH
    | {"prompt": _prompt, "echo": _only(False), "best_of": _only(1), "suffix": _only("")},
}


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """An answer: its text, how many tokens the model said, and whether "stop" or "length" ended it."""

    text: str
    n_tokens: int
    finish_reason: str


def answer_record(
    id: str, request: Request, model: str, n_prompt: int, choices: list[Choice]
) -> dict[str, Any]:
    """The result line of an answer: an OpenAI batch result.

    Parameters
    ----------
    id : str
        Of the result.
    model : str
        That answered.
    n_prompt : int
        Tokens of the prompt.
    choices : list of Choice
    """
    chat = request.url == CHAT
    said = [
        {
            "index": index,
            **(
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if chat
                else {"text": choice.text}
            ),
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    n_said = sum(choice.n_tokens for choice in choices)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": said,
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_said,
            "total_tokens": n_prompt + n_said,
        },
    }
    return _record(id, request.custom_id, 200, body, None)


def refusal_record(id: str, refusal: Refusal) -> dict[str, Any]:
    """The result line of a line that has no answer."""
    kind = "invalid_request_error" if refusal.status == 400 else "server_error"
    error = {
        "message": refusal.message,
        "type": kind,
        "param": refusal.param,
        "code": refusal.code,
    }
    short = {"code": refusal.code, "message": refusal.message}
    return _record(id, refusal.custom_id, refusal.status, {"error": error}, short)


def _record(id: str, custom_id: str | None, status: int, body: dict, error: dict | None) -> dict:
    response = {"status_code": status, "request_id": f"req-{id}", "body": body}
    return {"id": id, "custom_id": custom_id, "response": response, "error": error}
