# SPDX-License-Identifier: Apache-2.0
"""Model and machine files that are wrong are refused by name, file and key; whatever is in them."""

import random
import re
from types import SimpleNamespace

import pytest

from nearkv_sim.system.describe import HERE, load_machine, load_model, model_of, names

LOAD = {"models": load_model, "machines": load_machine}
MODEL = (HERE / "models" / "opt-66b.toml").read_text()
MACHINE = (HERE / "machines" / "nvme-twin-cpu.toml").read_text()


def _refusal(kind: str, path) -> str:
    with pytest.raises(ValueError) as caught:
        LOAD[kind](str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("n_layers = 64", "n_layers = -80", "n_layers must be a whole number of at least 1, not -80"),
        ("n_layers = 64", 'n_layers = "64"', "not the text '64'; write it without quotes"),
        ("n_layers = 64", "n_layers = 64.5", "n_layers must be a whole number .*, not 64.5"),
        ("n_layers = 64", "n_layers = true", "n_layers must be a whole number .*, not true"),
        ("n_layers = 64", "n_layers = 0x" + "f" * 5000, "not a number of more than 30 digits"),
        ("n_layers = 64", "n_layers = 1979-05-27", "n_layers .*, not 1979-05-27"),
        ("n_layers = 64", "n_layers = []", "n_layers .*, not an empty list"),
        ("n_layers = 64", "n_layers = [64]", "n_layers .*, not this list"),
        ("n_layers = 64", "", "n_layers is missing: a whole number of at least 1"),
        ("n_layers = 64", "n_layer = 64", "unknown key 'n_layer'; known are name, source, n_layers"),
        ("n_layers = 64", "n_layers 64", r"not TOML: .* \(at line \d+, column \d+\)"),
        ("n_layers = 64", "n_layers = 64\nn_layers = 64", "not TOML: Cannot overwrite a value"),
        ("n_layers = 64", "x = " + "[" * 5000, "not TOML"),
        ("n_kv_heads = 72", "n_kv_heads = 70", r"n_q_heads \(72\) must be a multiple of n_kv_heads"),
        ("n_kv_heads = 72", "n_kv_heads = 0", "n_kv_heads must be a whole number of at least 1"),
        ("rope = false", "rope = 0", "rope must be true or false, not 0"),
        ("rope = false", "rope = false\nsource = 7", "not TOML"),
        ("rope = false", "rope = false\nn_experts = 4\nexperts_per_token = 5", "must be at most n_exp"),
    ],
)  # fmt: skip
def test_a_wrong_model_file_is_refused(tmp_path, line, instead, message):
    assert line in MODEL
    path = tmp_path / "mine.toml"
    path.write_text(MODEL.replace(line, instead))
    assert re.search(message, _refusal("models", path))


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("count = 1", "count = 0", r"\[drives\] count must be a whole number of at least 1, not 0"),
        ("count = 1", 'count = "8"', "not the text '8'; write it without quotes"),
        ("count = 1", "count = nan", r"\[drives\] count .*, not nan"),
        ("usd = 180", "usd = nan", r"\[drives\] usd must be a number of at least 0, not nan"),
        ("usd = 180", "usd = inf", r"\[drives\] usd must be a number of at least 0, not inf"),
        ("usd = 180", "usd = 1e300", r"\[drives\] usd must be a number of at least 0, not 1e\+300"),
        ("usd = 180", "price = 180", r"\[drives\] unknown key 'price'; known are count, read_bytes"),
        ("[drives]", "[drive]", "unknown key 'drive'; known are name, source, host, drives"),
        ("[drives]", "[[drives]]", r"drives must be a table, \[drives\], not this list"),
        ("[host]", "gpu = 1\n[host]", r"gpu must be a table, \[gpu\], not 1"),
        ("[host]", "[gpu]\ncount = 1\n[host]", r"\[gpu\] flops is missing: a number above 0"),
        ("[host]", "[cards]\ncount = 1\n[host]", r"\[cards\] ingest_bytes_per_s is missing"),
        ("flops = 1e12", "", r"\[host\] flops is missing: a number above 0, where there is no GPU"),
        ("raid = false", "raid = false\nrequest_bytes = [4096]", "must be lists of the same length"),
        ("raid = false", "raid = false\nrequest_bytes = [8, 4]", "must be a list of rising numbers"),
        ("raid = false", 'raid = "no"', "raid must be true or false, not the text 'no'"),
        ("write_endurance_bytes = 1.2e15", "", r"\[drives\] write_endurance_bytes is missing"),
        ("[host]", "base = 8\n[host]", "base must be the name of a machine, not 8"),
        ("[host]", 'base = "mine.toml"\n[host]', "in a circle: mine.toml -> mine.toml"),
        ("[host]", 'base = "mine"\n[host]', "base: no machine 'mine'; give the path of a .toml file"),
    ],
)  # fmt: skip
def test_a_wrong_machine_file_is_refused(tmp_path, line, instead, message):
    assert line in MACHINE
    path = tmp_path / "mine.toml"
    path.write_text(MACHINE.replace(line, instead))
    assert re.search(message, _refusal("machines", path))


def test_an_unreadable_file_is_refused_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'source = "caf\xe9"\n')
    assert "not UTF-8: invalid continuation byte at byte 13" in _refusal("models", path)
    path.unlink()
    path.mkdir()
    assert "no machine" in _refusal("machines", path)
    assert "there is no such file" in _refusal("machines", "x" * 5000 + ".toml")
    assert "no machine" in _refusal("machines", "../models/opt-66b")


def test_a_base_may_be_a_file_beside_and_is_named_where_it_is_at_fault(tmp_path):
    folder = tmp_path / "machines"
    folder.mkdir()
    (folder / "mine.toml").write_text('base = "theirs.toml"\n[drives]\ncount = 3\n')
    (folder / "theirs.toml").write_text('name = "theirs"\nbase = "smartssd-x4"\n')
    machine = load_machine(str(folder / "mine.toml"))
    assert (machine.name, machine.drives.count, machine.cards.count) == ("mine", 3, 4)
    (folder / "theirs.toml").write_text('base = "smartssd-x4"\n[gpu]\nflops = "1"\n')
    with pytest.raises(ValueError, match=r"theirs\.toml: \[gpu\] flops must be a number"):
        load_machine(str(folder / "mine.toml"))
    (folder / "theirs.toml").write_text('base = "mine.toml"\n')
    with pytest.raises(ValueError, match=r"in a circle: mine\.toml -> theirs\.toml -> mine\.toml"):
        load_machine(str(folder / "mine.toml"))


VALUES = ("0", "-1", "1", '"8"', "true", "[]", "[1, 2]", "{}", "{a = 1}", "nan", "inf", "-inf", "1e400",
          "1e29", "1e-300", str(10**25), "1979-05-27T07:32:00Z", "''", '"\\u0000"')  # fmt: skip


def _mutated(lines: list[str], rng: random.Random) -> bytes:
    """One to three changes to a file: of values, of keys, of lines, of bytes."""
    lines = list(lines)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        key, equals, _ = lines[at].partition(" = ")
        match rng.randrange(6):
            case 0 | 1 if equals:
                lines[at] = f"{key} = {rng.choice(VALUES)}"
            case 2:
                lines[at] = lines[at].replace(
                    key, rng.choice(("count", "base", "host", key + "_")), 1
                )
            case 3:
                del lines[at]
                lines = lines or [""]
            case 4:
                lines.insert(at, rng.choice(lines))
            case _:
                data = bytearray(lines[at].encode("latin-1", "replace") or b"x")
                data[rng.randrange(len(data))] = rng.randrange(256)
                lines[at] = data.decode("latin-1")
    return "\n".join(lines).encode("latin-1", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOAD)
def test_no_file_leads_to_anything_but_a_description_or_a_refusal_that_names_it(tmp_path, kind):
    rng, path, refusals = random.Random(7), tmp_path / "mine.toml", []
    shipped = [(HERE / kind / f"{name}.toml").read_text().splitlines() for name in names(kind)]
    for _ in range(1500):
        path.write_bytes(_mutated(rng.choice(shipped), rng))
        try:
            LOAD[kind](str(path))
        except ValueError as error:
            refusals.append(str(error))
    assert not [message for message in refusals if str(path) not in message]
    assert 300 < len(refusals) < 1500


def test_a_configuration_that_does_not_say_enough_is_refused():
    with pytest.raises(ValueError, match="model of type 'mamba': n_q_heads must be a whole number"):
        model_of(SimpleNamespace(model_type="mamba", hidden_size=64, num_hidden_layers=2))
    config = {"model_type": "x", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}
    with pytest.raises(ValueError, match="model of type 'x': n_q_heads .*, not this list"):
        model_of(SimpleNamespace(**config, num_attention_heads=[4, 2]))
    assert model_of(SimpleNamespace(**config, num_attention_heads=2)).head_dim == 32
