# SPDX-License-Identifier: Apache-2.0
"""Cards with several engines, behind the real XRT library and PYNQ: one card for whoever attends."""

import dataclasses
import gc
import json
import os
import re
import time

import numpy as np
import pytest

import nearkv
from nearkv import NearStorageCache, cli
from nearkv.cards import CardError, Engines, engine_names, open_card, open_cards
from nearkv.store import space
from nearkv_hw.abi import PageLayout
from nearkv_hw.vitis.boards import load
from nearkv_sim import xrt
from nearkv_sim.xrt import Fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(xrt.missing()), reason=xrt.missing()),
]

SMALL = {"kv_bytes": 1 << 20, "job_bytes": 1 << 18}
# An Alveo with so many engines, each with a memory channel of its own.
U50 = load("u50")
BOARDS = {n: dataclasses.replace(U50, engines=U50.engines[:n]) for n in (2, 4)}


@pytest.fixture(params=["xrt", "pynq"])
def family(request):
    if request.param == "pynq":
        pytest.importorskip("pynq", reason="needs PYNQ: pip install 'nearkv[pynq]'")
    return request.param


def _inputs(seed=0, tokens=700):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((8, 64)).astype(np.float16)
    k, v = rng.standard_normal((2, tokens, 2, 64)).astype(np.float16)
    return q, k, v


def _attend(card, directory=None, **options):
    return nearkv.attend(*_inputs(**options), card=card, page_tokens=32, directory=directory)


@pytest.fixture(scope="module")
def expected():
    with open_card("twin", config="tiny") as twin:
        return _attend(twin)


@pytest.fixture(autouse=True)
def small_extents(monkeypatch):
    """Few pages are enough for all shards."""
    monkeypatch.setattr(space, "READ_BYTES", 2 * PageLayout(64, 32).page_bytes)


def _same(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("n_engines", BOARDS)
@pytest.mark.parametrize("n_directories", ["one", "some", "each"])
def test_all_engines_of_a_card_work_and_have_the_twins_bits(
    simulate, family, tmp_path, expected, n_engines, n_directories
):
    (simulated,) = simulate(board=BOARDS[n_engines]).cards
    n = {"one": 1, "some": n_engines - 1, "each": n_engines}[n_directories]
    directories = [tmp_path / f"ssd{number}" for number in range(n)]
    for one in directories:
        one.mkdir()
    with open_card(f"{family}:0", **SMALL) as card:
        assert isinstance(card, Engines)
        assert [one.name for one in card] == [f"{family}:0/{i}" for i in range(n_engines)]
        _same(_attend(card, directories), expected)
        # Each has memories of its own, in its own bank.
        banks = [it.address // simulated.memories[0].nbytes for it in simulated.buffers.values()
                 if it.bytes is not None]  # fmt: skip
        assert sorted(banks) == sorted([*range(len(card))] * 2)
    assert all(unit.runs > 0 for unit in simulated.units)
    _same(_attend(f"{family}:0", directories), expected)  # by its name
    assert not simulated.complaints
    del card
    gc.collect()
    assert not simulated.buffers


@pytest.mark.sim
def test_engines_of_the_simulated_verilog_have_the_twins_bits(simulate):
    (simulated,) = simulate("rtl", board=BOARDS[2]).cards
    with open_card("twin", config="tiny") as twin:
        want = _attend(twin, tokens=70)
    _same(_attend("xrt:0", tokens=70), want)
    assert all(unit.runs > 0 for unit in simulated.units)


def test_one_engine_by_its_number_is_a_card_of_its_own(simulate, family, expected):
    (simulated,) = simulate(board=BOARDS[4]).cards
    with open_card(f"{family}:0/1", **SMALL) as second:
        _same(_attend(second), expected)
        assert [unit.runs > 0 for unit in simulated.units] == [False, True, False, False]
        with open_card(f"{family}:0/3", **SMALL) as fourth:
            _same(_attend([fourth, second]), expected)
    with pytest.raises(CardError, match=r"no engine 4 in .*; choose one of 0 to 3"):
        open_card(f"{family}:0/4", **SMALL)


def test_engines_and_other_cards_together(simulate, expected):
    simulate(board=BOARDS[2], n_cards=2)
    with (
        open_card("xrt:0", **SMALL) as first,
        open_card("xrt:1", **SMALL) as second,
        open_card("twin", config="tiny") as twin,
    ):
        _same(_attend([first, twin, second]), expected)
    cards, opened = open_cards(["xrt:0", "xrt:1/1"], **SMALL)
    assert cards == opened
    assert [card.name for card in cards] == ["xrt:0/0", "xrt:0/1", "xrt:1/1"]
    for card in cards:
        card.close()


def test_a_name_says_how_many_engines_it_stands_for_without_xrt(simulate, family, monkeypatch):
    simulation = simulate(board=BOARDS[4])
    for name in ("XILINX_XRT", "XCL_EMULATION_MODE"):
        monkeypatch.delenv(name)
    name = f"{family}:0000:04:00.1"
    assert engine_names(name) == [f"{name}/{i}" for i in range(4)]
    assert engine_names(f"{family}:3/2") == [f"{family}:3/2"]
    assert engine_names("twin") == ["twin"]
    monkeypatch.delenv("NEARKV_XCLBIN")
    assert engine_names(f"{family}:0", simulation.xclbin) == [f"{family}:0/{i}" for i in range(4)]
    with pytest.raises(CardError, match=r"set NEARKV_XCLBIN"):
        engine_names(f"{family}:0")
    for unit in ("", "/1", "0/", "0/x"):
        with pytest.raises(CardError, match=f"no card '{family}:{unit}'; say which"):
            engine_names(f"{family}:{unit}")
    with pytest.raises(CardError, match=r"no card 'xrx:0'; there are"):
        engine_names("xrx:0")


def test_an_engine_that_is_busy_is_named_and_the_others_are_given_back(simulate, family):
    (simulated,) = simulate(board=BOARDS[4]).cards
    with open_card("xrt:0/2", **SMALL):
        mine = len(simulated.buffers)
        with pytest.raises(
            CardError, match=rf"'{family}:0/2': kernel nearkv:{{nearkv_3}} is in use"
        ) as caught:
            open_card(f"{family}:0", **SMALL)
        # Whoever keeps the error, and with it all that the call had, has no engine.
        assert [len(unit.users) for unit in simulated.units] == [0, 0, 1, 0]
        del caught
        gc.collect()
        assert len(simulated.buffers) == mine
    open_card(f"{family}:0", **SMALL).close()


def test_a_run_that_hangs_on_one_engine_is_done_again_there(simulate, family, expected, caplog):
    (simulated,) = simulate(board=BOARDS[2]).cards
    with open_card(f"{family}:0", timeout_s=0.5, **SMALL) as card:
        simulated.faults.append(Fault("hang", 0))  # the first run of each
        simulated.units[1].runs = 1  # is over already
        _same(_attend(card), expected)
    assert [f"{family}:0/{n}'" in caplog.text for n in range(2)] == [True, False]
    assert "the card is reset and the work done again" in caplog.text


def test_an_engine_that_fails_for_good_is_named_and_the_card_can_be_closed(simulate, family):
    (simulated,) = simulate(board=BOARDS[2]).cards
    with open_card(f"{family}:0", timeout_s=0.5, **SMALL) as card:
        broken, execute = simulated.units[1], simulated.units[1].execute
        broken.execute = lambda image, device: 5  # ERT_CMD_STATE_ERROR
        with pytest.raises(CardError, match=f"card '{family}:0/1': XRT says .* ended as ERROR"):
            _attend(card)
        broken.execute = execute
        _attend(card)  # once it is well again
    assert not any(unit.users for unit in simulated.units)


def test_closing_gives_all_of_it_back(simulate, family):
    (simulated,) = simulate(board=BOARDS[4]).cards
    open_card(f"{family}:0", **SMALL).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with open_card(f"{family}:0", **SMALL) as card:
            for engine in card:
                engine.run(1024, 0, 0)
        card.close()  # again
        del card, engine
        gc.collect()
        assert not simulated.buffers
        assert not any(unit.users for unit in simulated.units)
    end = time.monotonic() + 60  # a reader's thread gives its ring back when it has woken up
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_every_engine_is_closed_though_one_does_not_end(simulate):
    (simulated,) = simulate(board=BOARDS[2]).cards
    card = open_card("xrt:0", timeout_s=0.2, **SMALL)
    simulated.faults.append(Fault("hang", 0))
    card[1].start_run(1024, 0, 0)
    with pytest.raises(CardError, match=r"'xrt:0/1' is closed, but waited"):
        card.close()
    assert not simulated.units[0].users
    for engine in card:
        with pytest.raises(CardError, match="is closed"):
            engine.run(1024, 0, 0)
    simulated.faults.clear()
    card[1]._run._run.given_up = True  # as when XRT gives the run up at last
    card.close()
    assert not simulated.units[1].users


@pytest.mark.parametrize("n_directories", [1, 2])
def test_a_model_answers_on_engines_as_on_the_twin(
    simulate, family, tmp_path, tiny_model, one_thread, n_directories
):
    import torch
    from transformers import AutoModelForCausalLM

    (simulated,) = simulate(board=BOARDS[2]).cards
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="nearkv").eval()
    ids = torch.randint(100, (3, 200), generator=torch.Generator().manual_seed(0))
    directories = [tmp_path / f"ssd{n}" for n in range(n_directories)]
    for one in directories:
        one.mkdir()

    def logits(card, directories=directories):
        with torch.no_grad(), NearStorageCache(model.config, directories, card, 32) as cache:
            done = model.generate(
                ids, past_key_values=cache, max_new_tokens=8, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return torch.stack(done.logits)

    with open_card("twin", config="tiny") as twin:
        want = logits(twin, directories[0])
    assert torch.equal(logits(f"{family}:0"), want)
    assert all(unit.runs > 0 for unit in simulated.units)
    with open_card(f"{family}:0", **SMALL) as card:
        assert torch.equal(logits(card), want)


def test_generate_counts_the_directories_that_engines_can_have(
    simulate, family, tmp_path, tiny_model, capsys
):
    (simulated,) = simulate(board=BOARDS[2]).cards
    text = " ".join(f"w{n % 90}" for n in range(100))

    def run(card, n_directories, **options):
        directories = [tmp_path / f"ssd{n}" for n in range(n_directories)]
        for one in directories:
            one.mkdir(exist_ok=True)
        command = ["generate", "--model", tiny_model, "--prompt", text, "--max-new-tokens", "6",
                   "--page-tokens", "32", "--card", card]  # fmt: skip
        status = cli.main([*command, *(f"--kv-dir={one}" for one in directories)])
        return status, *capsys.readouterr()

    status, want, _ = run("twin", 1)
    assert status == 0
    for n in (0, 1, 2):
        assert run(f"{family}:0", n)[:2] == (0, want)
    assert all(unit.runs > 0 for unit in simulated.units)
    status, _, error = run(f"{family}:0", 3)
    assert status == 2
    assert "--kv-dir is given 3 times, and --card has 2 to serve them" in error


def test_the_selftest_tests_every_engine_and_all_of_them_together(
    simulate, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    (simulated,) = simulate(board=BOARDS[2]).cards
    command = ["selftest", "--card", "xrt:0", "--kv-mib", "2", "--kv-dir", str(tmp_path)]
    assert cli.main(command) == 0
    out, _ = capsys.readouterr()
    parts = out.split("\n\n")
    heads = [part.partition("\n")[0] for part in parts[2:5]]
    assert heads == ["engine xrt:0/0", "engine xrt:0/1", "card xrt:0"]
    for part in parts[2:4]:
        assert len(re.findall(" pass | below ", part)) > 10  # speed depends on what else runs
        assert "FAIL" not in part
    assert re.search(r"^attend, all engines +pass +2 at work +2 at work", parts[4], re.M)
    assert max(map(len, out.splitlines())) <= 80

    simulated.faults.append(Fault("error"))  # of an engine
    simulated.units[0].card = Healthy(simulated)
    report = tmp_path / "report.json"
    assert cli.main([*command, "--report", str(report)]) == 1
    checks = json.loads(report.read_text())["checks"]
    failed = {it["engine"] for it in checks if it["result"] == "FAIL"}
    assert failed == {"xrt:0/1", ""}
    assert "Traceback" not in "".join(capsys.readouterr())


class Healthy:
    """A simulated card, to one of its units, without its faults."""

    def __init__(self, card):
        self._card = card

    def __getattr__(self, name):
        return getattr(self._card, name)

    def fault(self, kind, run=None):
        return None
