# SPDX-License-Identifier: Apache-2.0
"""What the pages tell people to type exists, and what they show is what is printed."""

from pathlib import Path
import re
import shlex

import pytest

from nearkv import cli
from nearkv_hw.vitis import boards

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "bitstreams" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Commands of others, with which a page may start a line.
FOREIGN = {"sudo", "source", "export", "mkdir", "pip", "python3.11", "vllm"}


def _names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def _commands(page: Path) -> list[str]:
    """Lines behind a prompt, and commands of ours within the text and its tables."""
    text = page.read_text()
    typed = re.findall(r"^\$ (.+)$", text, re.M)
    quoted = re.findall(r"`((?:nearkv|make|[A-Z]+=\S+ make) [^`\n]+)`", text)
    return typed + quoted


def _check(words: list[str]) -> None:
    """Raise if a command of ours cannot be given so."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
        named = {word for word in words[1:] if "=" not in word}
        assert named <= targets, f"no target {named - targets}"
        boards_named = [word[6:] for word in words[1:] if word.startswith("BOARD=")]
        assert all(name in (*boards.names(), "...") for name in boards_named)
    elif words[0] == "nearkv":
        _parse([word for word in words[1:] if word != "..."])
        if words[1:2] == ["xrt-sim"]:
            rest = words[words.index("--") + 1 :] if "--" in words else []
            if rest and rest[0] in ("nearkv", "make"):
                _check(rest)
    else:
        assert words[0] in FOREIGN, f"{words[0]} is not one of {sorted(FOREIGN)}"


def _parse(arguments: list[str]) -> None:
    """As the command line does; `--help` ends it with 0."""
    code = None
    try:
        cli._parser().parse_args(arguments)
    except SystemExit as ended:
        code = ended.code
    assert not code, f"nearkv {shlex.join(arguments)}"


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            file = page.parent / target.partition("#")[0]
            assert file.exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_what_pages_tell_people_to_type_can_be_typed(page, capsys, tmp_path):
    commands = _commands(page)
    assert commands
    for command in commands:
        words = shlex.split(re.sub(r" [<>] .*", "", command).replace("/mnt/", f"{tmp_path}/"))
        if words[0] == "mkdir" or words[:2] == [
            "sudo",
            "install",
        ]:  # directories must have been made by then
            Path(words[-1]).mkdir(parents=True)
        _check(words)
        if "--keep" in words:
            Path(words[words.index("--keep") + 1]).mkdir()


@pytest.mark.parametrize("command", ["nearkv fly", "make fly", "nearkv doctor --fly", "cp a b"])
def test_what_cannot_be_typed_is_found(command, capsys):
    with pytest.raises(AssertionError):
        _check(command.split())


@pytest.mark.parametrize("name", ["smartssd", "alveo"])
def test_what_the_doctor_is_shown_to_say_it_says(name):
    shown = re.search(r"^\$ nearkv doctor\n(.+?)^```", (ROOT / f"docs/{name}.md").read_text(),
                      re.M | re.S)  # fmt: skip
    assert shown is not None
    assert shown[1] in (ROOT / f"tests/data/machines/{name}.txt").read_text()


def test_pages_name_the_platforms_of_the_boards():
    text = "".join(page.read_text() for page in PAGES[2:])
    for name in boards.names():
        board = boards.load(name)
        first, last = board.vitis
        assert f"`{board.platform}`" in text
        assert f"{first} to {last}" in text
