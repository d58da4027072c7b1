# SPDX-License-Identifier: Apache-2.0
"""Break the gateware on purpose, and see that a test fails: `make mutants`.

Each mutant replaces one piece of text in a copy of the sources and runs the tests that ought to
notice, cheapest first: those of the mutated module, then those of the whole kernel in Amaranth's
simulator, then the compiled RTL against the model. A mutant that no test notices survives, and the
script ends with status 1. A piece of text that is not there exactly once is an error: the list must
follow the code.
"""

import argparse
from dataclasses import dataclass
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file` of nearkv_hw, `old` becomes `new`."""

    file: str
    old: str
    new: str
    what: str


MUTANTS = (
    # --- bus
    Mutant("axi.py", "fits.eq((beats <= room) & may_fly)", "fits.eq((beats <= room + 1) & may_fly)",
           "credit: a burst one beat longer than the room"),
    Mutant("axi.py", "to_boundary < self._max_burst, to_boundary,", "0, to_boundary,",
           "read bursts ignore the 4096-byte boundary"),
    Mutant("axi.py", "self.w.p.last.eq(sent == beats - 1)", "self.w.p.last.eq(sent == beats)",
           "WLAST one beat late"),
    Mutant("axi.py", "idle.eq(~self.spans.valid & (waiting == 0) & (queue.level == 0))",
           "idle.eq(~self.spans.valid & (queue.level == 0))", "done before the last write response"),
    Mutant("axi.py", "ap_done.eq(0),", "ap_done.eq(ap_done),", "ap_done is not cleared on read"),
    Mutant("axi.py", "with m.If(ap_start & ~busy):", "with m.If(ap_start):",
           "a start while busy starts again"),
    Mutant("axi.py", "may_fly = flying != OUTSTANDING_BURSTS", "may_fly = 1",
           "more reads under way than announced"),
    Mutant("axi.py", "& (waiting != OUTSTANDING_BURSTS)", "& ~waiting.all()",
           "more writes under way than announced"),
    Mutant("axi.py", "pending ^ bus.w.p.data[:2]", "pending & ~bus.w.p.data[:2]",
           "IP_ISR cleared by ones, not inverted"),
    Mutant("axi.py", "global_enable & (enable & pending).any()", "(enable & pending).any()",
           "interrupts without GIER"),
    Mutant("axi.py", "with m.If(enable[bit]):", "with m.If(1):",
           "IP_ISR set although IP_IER does not enable it"),
    # --- jobs
    Mutant("jobs.py", "terms.append(value <= most)", "terms.append(value <= most + 1)",
           "upper limits of a job one too high"),
    Mutant("jobs.py", "(value < limit.coarse) | (value[:coarse] == 0)", "value != 0",
           "pages may end with a short tile"),
    Mutant("jobs.py", "with m.If(q_used != Q_BANKS):", "with m.If(1):",
           "q bank switch: the next query block overwrites weights in use"),
    Mutant("jobs.py", "asked.eq(request(job_address, 1))", "asked.eq(request(job_address, 2))",
           "the record of the next job is read twice"),
    Mutant("jobs.py", "(pages_left + 1)[1:])", "pages_left[1:])",
           "half an entry of an odd page table is not asked for"),
    Mutant("jobs.py", "last = tokens_left <= abi.TILE_TOKENS", "last = tokens_left < abi.TILE_TOKENS",
           "a full last tile is followed by an empty one"),
    Mutant("jobs.py", "(params.parts << TILE_LOG2 + BEAT_LOG2)",
           "(params.parts << TILE_LOG2 + BEAT_LOG2 - 1)",
           "second tile of a page at the wrong address"),
    Mutant("jobs.py", "beats.o.ready.eq(second | (pages_left == 1))", "beats.o.ready.eq(second)",
           "odd page tables leave an entry behind"),
    # --- fetch
    Mutant("fetch.py", "(abi.CRC_POLYNOMIAL if", "(0xEDB88320 if",
           "CRC-32 in place of CRC-32C"),
    Mutant("fetch.py", "crc.first.eq(place.pass_.page_first & place.pass_first)",
           "crc.first.eq(place.pass_first)", "CRC begins anew at each tile of a page"),
    Mutant("fetch.py", 'delay(m, later.pass_.crc, 1, "want")', "later.pass_.crc",
           "the CRC of one pass compared with that of the next"),
    Mutant("fetch.py", "crc.series.eq(place.pass_.is_v)", "crc.series.eq(0)",
           "CRCs of K and V mixed"),
    Mutant("fetch.py", "valid = lane < place.lanes", "valid = lane <= place.lanes",
           "mask: the exponent of a lane past the tail counts"),
    Mutant("fetch.py", "EXPONENT_FLOOR, fields[0] + q_exponent)", "EXPONENT_FLOOR, fields[0])",
           "exponent of K without that of q"),
    Mutant("fetch.py", "valid & (~place.pass_.is_v | (element != 0))", "valid",
           "zeros of V count as large as subnormal numbers"),
    Mutant("fetch.py", "valid & (~place.pass_.is_v | (element != 0))", "valid & (element != 0)",
           "zeros of K do not count"),
    Mutant("fetch.py", "o_field.valid.eq(later.valid & later.pass_.is_v)",
           "o_field.valid.eq(later.valid)", "beats of K give fields, too"),
    Mutant("fetch.py", "m.d.sync += running.eq(largest)", "m.d.sync += running.eq(exponent)",
           "largest exponent of the last two rows only"),
    Mutant("fetch.py", "(waiting.level <= self._lookahead)", "(waiting.level < self._lookahead)",
           "order: one K tile less ahead"),
    Mutant("fetch.py", "Mux(tile.tokens == 0, 1, tile.tokens), tile.params.parts << LANES_LOG2",
           "Mux(tile.tokens == 0, 1, tile.tokens - 1), tile.params.parts << LANES_LOG2",
           "V passes lose their last token"),
    # --- align
    Mutant("align.py", "Mux(distance > KV_BITS, KV_BITS, distance[: len(shift)])",
           "distance[: len(shift)]",
           "shift distance wraps"),
    Mutant("align.py", "+ (sign ^ fine[0])", "+ sign", "rounding dropped"),
    Mutant("align.py", "gap.eq(LANES)", "gap.eq(LANES - 1)",
           "blocks 31 cycles apart: two leave at once"),
    Mutant("align.py", "Mux(e == 0, 1, e)", "e", "subnormal numbers one binade off"),
    Mutant("align.py", "base.eq(Mux(then.is_v, self.base, then.exponent - self.q_exponent))",
           "base.eq(Mux(taken.is_v, self.base, then.exponent - self.q_exponent))",
           "the base of a row chosen by what the next one is"),
    Mutant("align.py", "delay(m, taken.q_address, 5,", "delay(m, taken.q_address, 4,",
           "weights of q a cycle early"),
    Mutant("align.py", "self.taken.eq(self.o_step.valid & self.o_step.last & ~self.o_is_v)",
           "self.taken.eq(self.end & ~block.is_v)",
           "a q bank is free before its last weights were read"),
    # --- products
    Mutant("products.py", "waiting.i.p.exponents[row].eq(Mux(some, largest, EXPONENT_FLOOR))",
           "waiting.i.p.exponents[row].eq("
           "waiting.i.p.exponents[row - 1] if row % 2 else Mux(some, largest, EXPONENT_FLOOR))",
           "one largest product for two rows"),
    Mutant("products.py", "later[1].first | ~some | (there & (product > largest))",
           "~some | (there & (product > largest))",
           "a block's largest product begins with that of the last"),
    Mutant("products.py", "some.eq(there | (some & ~later[1].first))", "some.eq(there | some)",
           "a row without a weight keeps the exponent of the last block"),
    Mutant("products.py", "later[1].first | ~some | (there & (product > largest))",
           "later[1].first | ~some | (product > largest)",
           "tokens without a weight count for the largest product"),
    Mutant("products.py", "register(present(params, row) & ~weight.none & (field != 0)",
           "register(~weight.none & (field != 0)",
           "what lies in rows beyond the group counts for what is common"),
    Mutant("products.py", "~weight.none & (field != 0))", "~weight.none)",
           "a token whose V is 0 counts for the largest product"),
    Mutant("products.py", "Mux(pair[0] < pair[1], *pair)", "Mux(pair[0] > pair[1], *pair)",
           "common is the largest depth of the rows"),
    Mutant("products.py", "~there | (below > DEPTH_MAX), DEPTH_MAX,", "~there, DEPTH_MAX,",
           "depth wraps"),
    Mutant("products.py", "Mux(rest > most, most, rest)", "rest", "the rest of a depth wraps"),
    Mutant("products.py", "weight.eq((fine + 1) >> 1)", "weight.eq(fine >> 1)",
           "array weights truncated"),
    Mutant("products.py", "~block.pass_first | (tiles_ready != 0)", "1",
           "a scan begins before the weights are there"),
    Mutant("products.py", "(slots_used != SLOTS)", "1",
           "fields overwritten while the aligner still reads them"),
    Mutant("products.py", "(held != BLOCK_QUEUE)", "1", "blocks lost behind their scan"),
    Mutant("products.py", "bank.eq(bank + block.pass_last)", "bank.eq(bank)",
           "every tile scanned with the weights of the first bank"),
    Mutant("products.py", "slot.eq(slot + 1), ", "slot.eq(slot + block.pass_last), ",
           "blocks of a pass share a slot"),
    Mutant("products.py", "due.o.ready.eq(go & block.is_v)", "due.o.ready.eq(go)",
           "K blocks use up fields"),
    # --- array
    Mutant("array.py", "own.eq(Mux(begin, 0, own + 1))", "own.eq(own + 1)",
           "a row's count of lanes does not begin with the block"),
    Mutant("array.py", "which = delay(m, own // group, 1, f\"which_{row}\")",
           "which = own // group", "the second step of a row's way out is a cycle early"),
    Mutant("array.py", "Mux(first, 0, p) + product", "p + product",
           "accumulators never begin anew"),
    # --- softmax
    Mutant("softmax.py", "with m.If(later.first | (ceiling > largest)):",
           "with m.If(later.first | (ceiling < largest)):", "tile minimum for tile maximum"),
    Mutant("softmax.py", "score.o[:SCORE_FRAC_BITS].any()", "0", "floor for ceiling"),
    Mutant("softmax.py", "present(ended.head.params, row) & ~ended.empty",
           "present(ended.head.params, row)", "an empty tile keeps the maximum of the one before"),
    Mutant("softmax.py", "Mux(rounded > P_MAX, P_MAX, rounded)", "rounded", "p = 1 wraps to 0"),
    Mutant("softmax.py", "(begun | (banks_used != P_BANKS))", "1",
           "p bank switch: weights in use are overwritten"),
    Mutant("softmax.py", "absent | (halvings > HALVINGS_MAX)", "absent",
           "small weights wrap to large ones"),
    Mutant("softmax.py", "rounded = (power + _HALF) >> P_DROP_BITS",
           "rounded = power >> P_DROP_BITS", "p truncated"),
    Mutant("softmax.py", "head.params.odd & pair_end if i else 0", "0",
           "the row of padding attends"),
    Mutant("softmax.py", "present(ended.head.params, row) & ~ended.empty", "~ended.empty",
           "the row of padding has a maximum"),
    Mutant("softmax.py", "write.data[i].halvings.eq(unit.halvings)",
           "write.data[i].halvings.eq(units[0].halvings)",
           "both rows of a pair have the exponents of the first"),
    Mutant("softmax.py", "eq(Mux(n[5], 0, ", "eq(Mux(0, 0, ",
           "weights of 32 halvings and more count in the sums"),
    # --- merge
    Mutant("merge.py", "top.eq(Mux(fresh | ~behind, own_top, old_top))", "top.eq(own_top)",
           "rescale: a smaller tile lowers the top"),
    Mutant("merge.py", "ahead[2:].all() & ahead[:2].any()", "ahead[2:].all()",
           "rescale: four limbs down counts as none"),
    Mutant("merge.py", "unit.fresh.eq(head.job_first)", "unit.fresh.eq(0)",
           "a job begins with the sums of the one before"),
    Mutant("merge.py", "z.eq((o << place[:_LIMB_LOG2]) << 1)",
           "z.eq(o << place[:_LIMB_LOG2])",
           "contributions one bit low"),
    Mutant("merge.py", "pick(tile.tile_max) + Mux(in_sums, 0, pick(v.exponents))",
           "pick(tile.tile_max) + pick(v.exponents)", "denominators scaled like V"),
    Mutant("merge.py", "Mux(in_sums, 0, pick(v.exponents))", "Mux(in_sums, 0, v.exponents[0])",
           "every row placed by the exponent of the first"),
    Mutant("merge.py", "early.valid & early.block_end", "early.valid",
           "a block's top moves with its first channel"),
    Mutant("merge.py", "tile.saturated | (saturated & ~head.job_first)", "tile.saturated",
           "saturation of an early tile forgotten"),
    # --- kernel
    Mutant("kernel.py", "v_held <= V_QUEUE_CHANNELS - LANES", "1",
           "V sums overrun their queue when the writer stalls"),
    Mutant("kernel.py", "leaving.i.p.exponents.eq(exponents)",
           "[leaving.i.p.exponents[row].eq(exponents[0]) for row in range(rows)]",
           "every row leaves with the exponent of the first"),
    Mutant("kernel.py", "v.i.p.exponents.eq(leaving.o.p.exponents)", "v.i.p.exponents.eq(exponents)",
           "V sums leave with the exponents of the block that is issued then"),
    Mutant("kernel.py", "Mux(align.o_is_v, products.weights[row], read.data[row].as_signed())",
           "Mux(block.block.is_v, products.weights[row], read.data[row].as_signed())",
           "weights chosen by the block that is issued, not by the one that is multiplied"),
    Mutant("kernel.py", "products.done.eq(align.end & block.block.is_v)",
           "products.done.eq(align.end & block.block.is_v & block.block.pass_last)",
           "a slot is free only at the end of its pass"),
    Mutant("kernel.py", "(array.o_lane < leaving.o.p.lanes)", "1",
           "tail lanes reach the softmax"),
)  # fmt: skip


def tests_for(mutant: Mutant) -> list[list[str]]:
    """pytest arguments, cheapest first."""
    module = f"tests/hw/test_{mutant.file}"
    stages = [[module]] if (ROOT / module).exists() else []
    return [*stages, ["tests/hw/test_kernel.py"], ["tests/sim/test_rtl.py", "-m", "sim"]]


def pytest(folder: Path, *arguments: str) -> int:
    """Exit status of pytest in the copy, stopping at the first failure."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(str(folder / part) for part in ("hw", "sw", "sim"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL, timeout=1200,
    ).returncode  # fmt: skip


def run(mutant: Mutant, folder: Path) -> str:
    """The tests that noticed; empty if none did."""
    path = folder / "hw" / "nearkv_hw" / mutant.file
    original = path.read_text()
    count = original.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} is there {count} times, not once")
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        for arguments in tests_for(mutant):
            status = pytest(folder, *arguments)
            if status == 1:
                return arguments[0]
            if status != 0:
                raise RuntimeError(f"pytest {' '.join(arguments)} ended with status {status}")
    finally:
        path.write_text(original)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="mutants whose file or description contains this text")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or args.only in m.file + " " + m.what]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("hw", "sw", "sim", "tests"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for file in ("pyproject.toml", "LICENSE"):
            shutil.copy(ROOT / file, folder)
        # A test that fails by itself would kill every mutant.
        for file in sorted({arguments[0] for m in chosen for arguments in tests_for(m)}):
            if status := pytest(folder, file):
                print(f"{file} fails without a mutant (status {status})")
                return 2
        for mutant in chosen:
            start = time.monotonic()
            killer = run(mutant, folder)
            seconds = time.monotonic() - start
            verdict = f"killed by {killer}" if killer else "SURVIVED"
            print(f"{mutant.file:11} {mutant.what:62} {verdict} ({seconds:.0f} s)", flush=True)
            if not killer:
                survivors.append(mutant)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
