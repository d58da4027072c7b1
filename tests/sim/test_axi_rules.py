# SPDX-License-Identifier: Apache-2.0
"""The checker of AXI's rules: lets a correct trace pass, and complains of each rule broken in it."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nearkv_hw import abi
from nearkv_hw.config import preset
from nearkv_sim import rtl
from nearkv_sim.rtl import axi_rules
from nearkv_sim.rtl.axi_rules import AxiRules, Limits, Rule, Violation

STROBES = (1 << 64) - 1
BURST = {"addr": 0x1F80, "len": 1, "size": 6, "burst": 1, "id": 0}
FIRST, LAST = ({"id": 0, "data": n, "resp": 0, "last": n} for n in (0, 1))


def cycle(reset_n=1, **channels):
    """Wires of a cycle. Each channel: its payload, taken; (payload, 0) if it waits."""
    wires = {"reset_n": reset_n}
    for channel in axi_rules.FULL:
        offered = channels.get(channel)
        payload, ready = offered if isinstance(offered, tuple) else (offered, 1)
        wires[channel + "valid"], wires[channel + "ready"] = int(payload is not None), ready
        wires |= {channel + field: value for field, value in (payload or {}).items()}
    return wires


def w(last, data=7):
    return {"data": data, "strb": STROBES, "last": last}


def trace():
    """Two reads of two beats, one asked for while the other runs; two writes, data before and after
    the address; every channel waits once."""
    answer = {"id": 0, "resp": 0}
    return [
        cycle(0), cycle(0), cycle(), cycle(),  # 0..3
        cycle(ar=(BURST, 0)), cycle(ar=BURST),  # 4, 5
        cycle(r=(FIRST, 0), w=(w(0), 0)),  # 6
        cycle(r=FIRST, w=w(0), ar=BURST),  # 7
        cycle(r=LAST, aw=(BURST, 0)),  # 8
        cycle(r=FIRST, aw=BURST),  # 9
        cycle(r=LAST, w=w(1)),  # 10
        cycle(b=(answer, 0)), cycle(b=answer),  # 11, 12
        cycle(aw=BURST), cycle(w=w(0)), cycle(w=w(1)), cycle(b=answer), cycle(),  # 13..17
    ]  # fmt: skip


def check(cycles, channels=axi_rules.FULL, limits=Limits(2, 1)):  # noqa: B008
    rules = AxiRules("m", channels, Limits(limits.beats, 2), limits)
    for wires in cycles:
        rules.step(wires["reset_n"], wires.__getitem__)
    rules.finish()
    return rules


def put(at, **wires):
    def mutate(cycles):
        cycles[at] |= wires

    return mutate


def drop(at, n=1):
    def mutate(cycles):
        del cycles[at : at + n]

    return mutate


def insert(at, **channels):
    def mutate(cycles):
        cycles.insert(at, cycle(**channels))

    return mutate


ANSWER = {"id": 0, "resp": 0}
MUTANTS = [
    (Rule.RESET, put(1, arvalid=1)),
    (Rule.RESET, put(0, bvalid=1)),
    (Rule.RESET, put(2, wvalid=1)),  # the first edge after the reset
    (Rule.HOLD_VALID, put(5, arvalid=0)),
    (Rule.HOLD_VALID, put(7, rvalid=0)),
    (Rule.HOLD_VALID, put(7, wvalid=0)),
    (Rule.HOLD_VALID, put(9, awvalid=0)),
    (Rule.HOLD_VALID, put(12, bvalid=0)),
    (Rule.HOLD_PAYLOAD, put(5, araddr=0x1F40)),
    (Rule.HOLD_PAYLOAD, put(5, arlen=0)),
    (Rule.HOLD_PAYLOAD, put(7, wdata=8)),
    (Rule.HOLD_PAYLOAD, put(7, wlast=1)),
    (Rule.HOLD_PAYLOAD, put(7, rdata=8)),
    (Rule.HOLD_PAYLOAD, put(9, awaddr=0)),
    (Rule.HOLD_PAYLOAD, put(12, bresp=2)),
    (Rule.LENGTH, put(7, arlen=2, araddr=0)),
    (Rule.LENGTH, put(13, awlen=2, awaddr=0)),
    (Rule.SIZE, put(7, arsize=5)),
    (Rule.TYPE, put(13, awburst=0)),
    (Rule.ID, put(7, arid=1)),
    (Rule.ALIGNED, put(7, araddr=0x1F90)),
    (Rule.BOUNDARY, put(7, araddr=0x1FC0)),
    (Rule.BOUNDARY, put(13, awaddr=0xFFFF_FFC0)),
    (Rule.OUTSTANDING, insert(6, ar=BURST)),
    (Rule.OUTSTANDING, insert(11, aw=BURST)),
    (Rule.WLAST, put(10, wlast=0)),
    (Rule.WLAST, put(14, wlast=1)),
    (Rule.STROBES, put(14, wstrb=STROBES - 16)),
    (Rule.EARLY_B, insert(4, b=ANSWER)),
    (Rule.EARLY_B, insert(15, b=ANSWER)),  # after the address, before the last beat
    (Rule.EARLY_B, insert(13, b=ANSWER)),  # a second answer
    (Rule.EARLY_B, put(15, bvalid=1, bid=0, bresp=0)),  # with the last beat
    (Rule.EARLY_R, insert(4, r=FIRST)),
    (Rule.EARLY_R, put(5, rvalid=1, rid=0, rdata=0, rresp=0, rlast=0)),  # with the address
    (Rule.EARLY_R, insert(11, r=FIRST)),  # surplus
    (Rule.RLAST, put(8, rlast=0)),
    (Rule.RLAST, put(9, rlast=1)),
    (Rule.RESPONSE_ID, put(8, rid=1)),
    (Rule.RESPONSE_ID, put(16, bid=1)),
    (Rule.RESPONSE, put(8, rresp=1)),
    (Rule.RESPONSE, put(16, bresp=1)),
    (Rule.UNANSWERED, drop(10, 8)),
    (Rule.UNANSWERED, drop(16)),
    (Rule.UNANSWERED, drop(15, 3)),
    (Rule.UNANSWERED, insert(18, w=w(1))),
    (Rule.UNANSWERED, insert(18, ar=(BURST, 0))),
]


def test_a_correct_trace_passes():
    assert check(trace()).bursts == {"ar": 2, "aw": 2}
    # Error responses are legal; so is a reset that forgets what was under way.
    cycles = trace()
    cycles[8] |= {"rresp": 2}
    cycles[16] |= {"bresp": 3}
    check(cycles)
    check(trace()[:8] + [cycle(0), cycle()] + trace())


def test_every_rule_has_a_mutant():
    assert {rule for rule, _ in MUTANTS} == set(Rule)


@pytest.mark.parametrize(("rule", "mutate"), MUTANTS, ids=lambda x: getattr(x, "name", ""))
def test_a_broken_rule_is_named(rule, mutate):
    cycles = trace()
    mutate(cycles)
    with pytest.raises(Violation) as caught:
        check(cycles)
    assert caught.value.rule is rule, caught.value
    assert rule.value in str(caught.value)


def test_registers_are_held_to_the_rules_too():
    ok = {"data": 1, "resp": 0}
    asked = [cycle(), cycle(), cycle(ar={"addr": 16})]
    check([*asked, cycle(r=(ok, 0)), cycle(r=ok)], axi_rules.LITE, Limits())
    for rule, cycles in (
        (Rule.RESPONSE, [*asked, cycle(r={"data": 1, "resp": 2})]),
        (Rule.HOLD_PAYLOAD, [*asked, cycle(r=(ok, 0)), cycle(r={"data": 2, "resp": 0})]),
        (Rule.EARLY_R, [*asked, cycle(r=ok), cycle(r=ok)]),
        (Rule.EARLY_B, [*asked[:2], cycle(aw={"addr": 16}), cycle(b={"resp": 0})]),
        (Rule.OUTSTANDING, [*asked[:2], cycle(aw={"addr": 16}), cycle(aw={"addr": 16})]),
    ):
        with pytest.raises(Violation) as caught:
            check(cycles, axi_rules.LITE, Limits())
        assert caught.value.rule is rule


# Faults of stand_in.v on real wires, through the bench.
FAULTS = {
    1: Rule.BOUNDARY, 2: Rule.SIZE, 3: Rule.TYPE, 4: Rule.ALIGNED, 6: Rule.WLAST,
    7: Rule.HOLD_PAYLOAD, 8: Rule.HOLD_VALID, 13: Rule.RESET, 14: Rule.STROBES,
    15: Rule.HOLD_PAYLOAD, 17: Rule.ID, 18: Rule.EARLY_R,
}  # fmt: skip


@pytest.mark.sim
@pytest.mark.parametrize("fault", [0, *FAULTS])
def test_the_bench_notices_a_kernel_that_breaks_a_rule(tools, tmp_path, monkeypatch, fault):
    bench_kernel = pytest.importorskip(
        "nearkv_sim.rtl.bench_kernel",
        reason="cocotb is not installed; install it with: pip install 'nearkv[hardware]'",
        exc_type=ImportError,
    )
    config = preset("tiny")
    text = (Path(__file__).parent / "stand_in.v").read_text()
    defines = f"`define ABI_VERSION {abi.ABI_VERSION}\n`define CONFIG_HASH 32'd{config.hash32}\n"
    monkeypatch.setattr(rtl, "emitted", lambda config: defines + text)

    def run():
        bench_kernel.run(
            "a_kernel_that_breaks_a_rule_is_noticed", config, tmp_path, NEARKV_FAULT=str(fault)
        )

    if fault == 0:
        run()
        return
    with pytest.raises(SystemExit):
        run()
    results = ElementTree.parse(tmp_path / "results.xml")
    messages = [x.get("error_msg", "") + (x.text or "") for x in results.iter("failure")]
    assert any(FAULTS[fault].value in message for message in messages), messages
