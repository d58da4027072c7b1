# SPDX-License-Identifier: Apache-2.0
"""The scan of V blocks reads and keeps what it may, and finds the largest products; their rows are issued
with the model's base and weights."""

from amaranth import Array, Cat, Const, Mux, Signal, Value, signed
import pytest

from nearkv_hw import products
from nearkv_hw.abi import MAX_HEAD_DIM, TILE_TOKENS
from nearkv_hw.jobs import present
from nearkv_hw.number import DEPTH_MAX, EXPONENT_BITS, EXPONENT_FLOOR, P_BITS
from nearkv_hw.products import SLOTS, Products, base_latency, latency, scanned_layout
from nearkv_hw.softmax import P_BANKS, Exp2

# Smaller than it is built, for a short proof: its size has no part in the argument.
ROWS, FIELDS, BLOCKS = 2, 512, 4
# Where a block is, see `Followed`.
NOWHERE, SCANNED, LEAVING, QUEUED, SHOWN, ISSUED = range(6)


def has_rows(block):
    return (block.rows != 0) & (block.rows <= Mux(block.is_v, TILE_TOKENS, MAX_HEAD_DIM))


class Surroundings:
    """What stands around `Products`, as assumptions that other proofs of this folder claim.

    Members
    -------
    of_v : a row of V is scanned; scans : a V block is being scanned, since an earlier cycle
    issue, row : the aligner issues this row of the block at the output
    within, kind : the pass at the input has begun; it is one of V
    fields_ahead : fields given, less the rows of the V blocks that were scanned
    complete, freed : banks of the p store that are; banks that were free again
    """

    def __init__(self, b, dut):
        m, block = b.m, dut.i_block.p
        b.assume_stream(dut.i_block)
        b.assume(has_rows(block), when=dut.i_block.valid)
        ends = dut.i_block.valid & dut.i_block.ready
        self.due, self.token = dut.inside("fields_due"), dut.inside("token")
        self.of_v, self.scans = self.due.o.ready, self.token != 0

        # `KvFetch`: the blocks of a pass come in a row, after their fields.
        self.within, self.kind = b.ghost(1, "within"), b.ghost(1, "kind")
        with m.If(ends):
            m.d.sync += [self.within.eq(~block.pass_last), self.kind.eq(block.is_v)]
        b.assume(block.pass_first == ~self.within, when=dut.i_block.valid)
        b.assume(block.is_v == self.kind, when=dut.i_block.valid & self.within)
        given = dut.i_field.valid
        scanned = Mux(ends & block.is_v, block.rows, 0)
        self.fields_ahead = b.counter(given, scanned, name="fields_ahead")
        b.assume(self.fields_ahead >= block.rows, when=dut.i_block.valid & block.is_v)

        # `Align`: row after row of the block it is shown; and `KvFetch`: so many fields may wait.
        shown = dut.o_block.p
        self.issue, self.row = b.free(1, "issue"), b.ghost(8, "row")
        m.d.sync += self.row.eq(Mux(dut.o_block.ready, 0, self.row + self.issue))
        b.assume(dut.o_block.valid, when=self.issue)
        last = self.row + 1 == shown.block.rows
        b.assume(dut.o_block.ready == (self.issue & last))
        self.untaken = b.counter(given, self.issue & shown.block.is_v, name="untaken")
        b.assume(self.untaken < FIELDS, when=given)

        # `Kernel`, and `Softmax`: no more banks are complete than there are.
        b.assume(dut.done == (dut.o_block.ready & shown.block.is_v))
        self.p_free = dut.done & shown.block.pass_last
        self.complete = b.counter(dut.p_ready, self.p_free, bits=8, name="complete")
        b.assume(self.complete < P_BANKS, when=dut.p_ready)
        self.freed = b.ghost(2, "freed")
        m.d.sync += self.freed.eq(self.freed + self.p_free)


class Followed:
    """One block, whichever the solver chooses, and one row of it, on its way through.

    Members
    -------
    at : NOWHERE .. ISSUED; block : Value of `Block`; row : constant
    slot, bank : where its weights and fields lie; field : of the row, when it was scanned
    leaving : in which stage of the pipeline it is, if it is LEAVING
    place : where it is in the queue of blocks if it is QUEUED; SHOWN, it is at its output
    exponents : what it came into the queue with
    """

    def __init__(self, b, dut):
        m, block, inside = b.m, dut.i_block.p, dut.inside
        self.row = b.constant(7, "followed_row")
        self.at = b.ghost(range(6), "at")
        self.block = b.ghost(len(Value.cast(block)), "block")
        self.slot, self.bank, self.field = (
            b.ghost(bits, name) for bits, name in ((2, "slot"), (2, "bank"), (8, "field"))
        )
        self.place = b.ghost(range(BLOCKS), "place")
        self.exponents = b.ghost(ROWS * EXPONENT_BITS, "exponents")
        waiting, token = inside("waiting"), inside("token")
        row_goes = inside("fields_due").o.ready  # of V
        ends = dut.i_block.valid & dut.i_block.ready
        begins = Mux(block.is_v, row_goes, ends) & (token == 0)
        chosen = b.free(1, "chosen") & begins & (self.at == NOWHERE)
        b.assume(self.row < block.rows, when=chosen)
        b.claim(self.row < block.shape()(self.block).rows, when=self.at != NOWHERE)
        with m.If(chosen):
            m.d.sync += [
                self.block.eq(Value.cast(block)), self.at.eq(SCANNED),
                self.slot.eq(inside("slot")), self.bank.eq(inside("scan_bank")),
            ]  # fmt: skip
        self.here = chosen | (self.at == SCANNED)  # the block at the input is this one
        self.row_goes = self.here & row_goes & (token == self.row)
        with m.If(self.row_goes):
            m.d.sync += self.field.eq(inside("fields_due").o.payload)
        with m.If(self.here & ends):
            m.d.sync += self.at.eq(LEAVING)
        self.leaving = [b.before(self.here & ends, "leaving")]
        for _ in range(2):
            self.leaving.append(b.before(self.leaving[-1], "leaving"))
        with m.If(self.leaving[-1]):
            m.d.sync += [
                self.at.eq(QUEUED), self.place.eq(inside("waiting.produce")),
                self.exponents.eq(Value.cast(waiting.i.p.exponents)),
            ]  # fmt: skip
        b.claim((self.at <= ISSUED) & (self.place < waiting.depth))
        same = (Value.cast(block) == self.block) & (token != 0)
        b.claim(same, when=self.at == SCANNED)
        b.claim(sum(self.leaving) == (self.at == LEAVING))
        taken = inside("waiting.take") & (inside("waiting.consume") == self.place)
        with m.If((self.at == QUEUED) & taken):
            m.d.sync += self.at.eq(SHOWN)
        with m.If((self.at == SHOWN) & waiting.o.valid & waiting.o.ready):
            m.d.sync += self.at.eq(ISSUED)


def is_there(params, weight, field, row):
    """A product of this row's weight that counts."""
    return present(params, row) & ~weight.none & (field != 0)


@pytest.fixture
def scan(bench, monkeypatch):
    """Products in their surroundings, with a queue of few blocks."""

    def make(blocks):
        monkeypatch.setattr(products, "BLOCK_QUEUE", blocks)
        dut = bench.add(Products(ROWS, FIELDS))
        return bench, dut, Surroundings(bench, dut)

    return make


def claim_queue_of_blocks(b, dut, env):
    """Claim that scanned blocks find room in their queue. Returns its entries, the output first, then
    by place: (entry, there, how many are older)."""
    waiting, later = dut.inside("waiting"), dut.inside("later")
    queued, oldest, size = b.claim_queue(dut, "waiting")
    layout, entries = scanned_layout(ROWS), [(waiting.o.p, waiting.o.valid, Const(0))]
    for n in range(size):
        behind = (n - oldest)[: len(oldest)]
        entry = layout(dut.word("waiting.storage", n))
        entries.append((entry, behind < queued, behind + waiting.o.valid))
    b.claim(waiting.i.ready, when=waiting.i.valid)
    held = dut.inside("held")
    b.claim(held == waiting.level + sum(stage.valid & stage.end for stage in later) + env.scans)
    b.claim(held <= waiting.depth)
    block = dut.i_block.p
    b.claim(dut.i_block.valid & block.is_v & (env.token < block.rows), when=env.scans)
    return entries


def claim_counters(b, dut, env):
    """Everything the scan counts, said of what is in the queue and on its way there.

    Returns (entries of the queue of blocks, ends of V blocks in the pipeline, ends of V passes in
    both).
    """
    block, scans = dut.i_block.p, env.scans
    entries = claim_queue_of_blocks(b, dut, env)
    later = dut.inside("later")
    b.claim_queue(dut, "fields_due")
    leaving_v = [stage.valid & stage.end & stage.out.block.is_v for stage in later]

    def queued(count):
        return sum((Mux(there & e.block.is_v, count(e), 0) for e, there, _ in entries), start=0)

    slots = dut.inside("slots_used")
    b.claim(slots == queued(lambda e: 1) + sum(leaving_v) + scans)
    b.claim(slots <= SLOTS)

    # Fields: one for each row of V. That they find room is a proof of its own.
    due = env.due
    b.assume(due.i.ready, when=due.i.valid)
    b.claim(due.level == env.fields_ahead - Mux(scans, env.token, 0))
    b.claim(due.level >= block.rows - env.token, when=dut.i_block.valid & block.is_v)

    # Banks of the p store: those complete are of passes under way, then of passes to come.
    passes = queued(lambda e: e.block.pass_last)
    for end, stage in zip(leaving_v, later, strict=True):
        passes += end & stage.out.block.pass_last
    at_input = scans | (env.within & env.kind)
    ready = dut.inside("tiles_ready")
    b.claim(env.complete == ready + passes + at_input)
    b.claim(env.complete <= P_BANKS)
    b.claim(env.complete != 0, when=env.p_free)
    bank = dut.inside("scan_bank")
    b.claim(bank == (env.freed + passes)[:2])
    b.claim((bank - env.freed)[:2] < env.complete, when=env.of_v)
    return entries, leaving_v, passes


def test_waiting_fields_find_room_by_induction(scan):
    """Rows of V are scanned before they are issued, so that no more fields wait than were given for
    rows not yet issued, which are fewer than the queue has room for.

    Each block carries how many rows had been scanned when it ended, so that no sums are compared.
    """
    b, dut, env = scan(2)
    entries = claim_queue_of_blocks(b, dut, env)
    b.claim(env.due.i.ready, when=env.due.i.valid)
    b.claim_queue(dut, "fields_due")
    m, shown = b.m, dut.o_block.p.block
    waiting, later = dut.inside("waiting"), dut.inside("later")
    scanned, issued = b.counter(env.of_v, bits=12, name="scanned"), b.ghost(12, "issued")
    m.d.sync += issued.eq(issued + (env.issue & shown.is_v))
    row = Mux(shown.is_v, env.row, 0)
    b.claim(env.untaken == env.due.level + (scanned - issued)[:12])
    b.claim((env.row < shown.rows) & dut.o_block.valid, when=env.row != 0)

    def v_rows(block):
        return Mux(block.is_v, block.rows, 0)

    leaving = [b.before((scanned + env.of_v)[:12], "leaving_at")]
    for _ in range(2):
        leaving.append(b.before(leaving[-1], "leaving_at"))
    pushed = b.ghost(12, "pushed_at")  # of the last block that came into the queue
    shown_at, *queued = (b.ghost(12, "queued_at") for _ in entries)
    with m.If(waiting.i.valid):
        m.d.sync += pushed.eq(leaving[-1])
        for n, at in enumerate(queued):
            with m.If(dut.inside("waiting.produce") == n):
                m.d.sync += at.eq(leaving[-1])
    with m.If(dut.inside("waiting.take")):
        m.d.sync += shown_at.eq(Array(queued)[dut.inside("waiting.consume")])
    ends, at = Const(0), pushed
    for stage, then in zip(reversed(later), reversed(leaving), strict=True):
        end = stage.valid & stage.end
        b.claim(has_rows(stage.out.block), when=stage.valid)
        b.claim(then == (at + v_rows(stage.out.block))[:12], when=end)
        at, ends = Mux(end, then, at), ends + end
    b.claim(scanned == (at + Mux(env.scans, env.token, 0))[:12])
    for n, (entry, there, older) in enumerate(entries):
        at = shown_at if n == 0 else queued[n - 1]
        of_older = at if n == 0 else Mux(older == waiting.o.valid, shown_at, queued[n - 2])
        b.claim(has_rows(entry.block), when=there)
        before = (at - v_rows(entry.block))[:12]
        b.claim(before == Mux(older == 0, (issued - row)[:12], of_older), when=there)
        b.claim(at == pushed, when=there & (older + 1 == waiting.level))
        younger = waiting.level - 1 - older + ends
        since = TILE_TOKENS * younger[:4] + Mux(env.scans, env.token, 0)
        b.claim((scanned - at)[:12] <= since, when=there)
    b.claim(issued == pushed, when=waiting.level == 0)
    b.cover(env.issue & shown.is_v & (env.row == 1))
    b.prove(depth=1, reach=12)


def test_scan_waits_for_room_weights_and_fields_by_induction(scan):
    """A scanned block finds room in the queue; of each V block as many fields are used as it has rows;
    a bank of the p store is scanned from when it is complete until it is given back."""
    b, dut, env = scan(BLOCKS)
    claim_counters(b, dut, env)
    b.claim(dut.scan_address == Cat(env.token[:7], dut.inside("scan_bank")), when=env.of_v)
    b.cover(dut.inside("waiting").i.valid & dut.inside("later")[2].out.block.is_v)
    b.prove(depth=1, reach=12)


def test_scanned_blocks_leave_with_their_place_by_induction(scan):
    """Each block leaves as it came. While a V block is issued, the slot it names holds the fields that
    were given for it, and the bank it names has not been given back."""
    b, dut, env = scan(BLOCKS)
    entries, leaving_v, passes = claim_counters(b, dut, env)
    f = Followed(b, dut)
    block = dut.i_block.p.shape()(f.block)
    later, slot = dut.inside("later"), dut.inside("slot")

    def is_mine(scanned):
        return (Value.cast(scanned.block) == f.block) & (
            ~block.is_v | ((scanned.place.slot == f.slot) & (scanned.place.bank == f.bank))
        )

    at = [f.at == where for where in range(6)]
    b.claim((slot == f.slot) & (dut.inside("scan_bank") == f.bank), when=at[SCANNED])
    for here, stage in zip(f.leaving, later, strict=True):
        b.claim(stage.valid & stage.end & is_mine(stage.out), when=here)
    # V blocks that came later, and V passes that ended later.
    younger, passes_younger = Const(0), Const(0)
    waiting = dut.inside("waiting")
    in_queue = at[QUEUED] | at[SHOWN]
    place = (f.place - dut.inside("waiting.consume"))[: len(dut.inside("waiting.consume"))]
    mine_older = Mux(at[SHOWN], 0, place + waiting.o.valid)
    for n, (entry, there, older) in enumerate(entries):
        as_it_came = is_mine(entry) & (Value.cast(entry.exponents) == f.exponents)
        it_is = at[SHOWN] if n == 0 else at[QUEUED] & (f.place == n - 1)
        b.claim(there & as_it_came, when=it_is)
        behind = in_queue & there & entry.block.is_v & (older > mine_older)
        younger += behind
        passes_younger += behind & entry.block.pass_last
    for n, (end, stage) in enumerate(zip(leaving_v, later, strict=True)):
        behind = end & (in_queue | Cat(f.leaving[n + 1 :]).any())
        younger += behind
        passes_younger += behind & stage.out.block.pass_last

    # The slot is so many before the next to be scanned, and of the four none is used twice.
    ended = at[LEAVING] | in_queue
    outstanding = at[SCANNED] | ended
    b.claim(slot == (f.slot + younger + ended)[:2], when=outstanding & block.is_v)
    used = younger + 1 + (ended & env.scans)
    b.claim(used <= dut.inside("slots_used"), when=outstanding & block.is_v)
    scanned = ended | (at[SCANNED] & (env.token > f.row))
    b.claim(dut.word("fields", Cat(f.row, f.slot)) == f.field, when=scanned & block.is_v)

    # The bank is that of the oldest pass that is not over.
    over = ended & block.pass_last
    b.claim(
        f.bank == (env.freed + passes - passes_younger - over)[:2], when=outstanding & block.is_v
    )
    b.claim(over | (passes_younger != 0) | (env.within & env.kind), when=ended & block.is_v)
    b.claim((f.bank - env.freed)[:2] < env.complete, when=outstanding & block.is_v)
    b.cover(at[SHOWN] & block.is_v & (f.row == 1))
    b.prove(depth=2, reach=14)


def test_scan_finds_the_largest_product_of_each_row_by_induction(scan):
    """A scanned block leaves with the largest exponent of a product for each query head, which is not
    below that of any row; EXPONENT_FLOOR where there is none."""
    b, dut, env = scan(2)
    m, block = b.m, dut.i_block.p
    claim_queue_of_blocks(b, dut, env)
    f = Followed(b, dut)
    goes = Mux(block.is_v, env.of_v, dut.i_block.valid & dut.i_block.ready)

    # One cycle later its halvings are there.
    then = b.before(goes)
    first, params, field = (
        b.before(value) for value in (env.token == 0, block.params, env.due.o.payload)
    )
    params = block.params.shape()(params)
    followed_then = b.before(f.row_goes)
    seen = b.ghost(1, "seen")  # the followed row's product
    m.d.sync += seen.eq((f.at != NOWHERE) & (seen | followed_then))
    is_v = block.shape()(f.block).is_v
    in_scan, in_stage = (f.at == SCANNED) & is_v, [here & is_v for here in f.leaving]
    b.claim(seen | followed_then, when=(in_scan & (env.token > f.row)) | in_stage[0])
    b.claim(seen, when=in_stage[1] | in_stage[2])
    for row in range(ROWS):
        weight = dut.scan[row]
        there = is_there(params, weight, field, row)
        product = Mux(there, field - weight.halvings, EXPONENT_FLOOR)
        best = b.ghost(signed(EXPONENT_BITS), f"best_{row}", init=EXPONENT_FLOOR)
        mine = b.ghost(signed(EXPONENT_BITS), f"mine_{row}")
        so_far = Mux(first, EXPONENT_FLOOR, best)
        with m.If(then):
            m.d.sync += best.eq(Mux(product > so_far, product, so_far))
        with m.If(followed_then):
            m.d.sync += mine.eq(product)
        before = b.before(best, init=EXPONENT_FLOOR)
        found = dut.inside("waiting").i.p.exponents[row]
        b.claim(found == before)
        b.claim(best >= mine, when=(seen & (in_scan | in_stage[0])) | in_stage[1])
        b.claim(found >= mine, when=in_stage[2])
    b.cover(in_stage[2] & (dut.inside("waiting").i.p.exponents[0] == -5) & (f.row == 1))
    b.prove(depth=3, reach=14)


@pytest.mark.parametrize("rows", [2, 8])
def test_weights_of_an_issued_row_are_those_of_the_model_by_induction(bench, rows):
    """Base and weights are what `model` says, for every row that the aligner issues. A weight without a
    mantissa stays 0; what is multiplied with a token whose elements are all 0 does not matter.

    The reads come `base_latency` cycles after the issue at the latest, before the softmax may write
    again (see its proof).
    """
    b = bench
    dut = b.add(Products(rows, FIELDS))
    place = dut.place
    b.claim(dut.issue_address == Cat(place.row, place.bank))
    b.claim(dut.mantissa_address == b.ago(dut.issue_address, base_latency(rows)))
    assert base_latency(rows) <= Exp2.latency

    # One cycle after the issue.
    field = b.before(dut.word("fields", Cat(place.row, place.slot)), "field")
    params = dut.params.shape()(b.before(dut.params, "params"))
    depths, there = [], []
    for row in range(rows):
        weight = dut.issue[row]
        there.append(is_there(params, weight, field, row))
        largest = b.before(dut.exponents[row], f"largest_{row}", init=0)
        below = Signal(signed(EXPONENT_BITS + 1), name=f"below_{row}")
        b.m.d.comb += below.eq(largest - (field - weight.halvings))
        b.assume(below >= 0, when=there[-1])  # by what the scan finds
        far = ~there[-1] | (below > DEPTH_MAX)
        depths.append(Mux(far, DEPTH_MAX, below[:6]))
    # When the base is there: it contains what is common to all rows, the least of the depths.
    settled = b.ago(Const(1), latency(rows))
    at_base = base_latency(rows) - 1
    field, *depths = (b.ago(value, at_base) for value in (field, *depths))
    common = dut.base - field
    b.claim(Cat(common == depth for depth in depths).any(), when=settled)
    for depth in depths:
        b.claim(common <= depth, when=settled)
    # One more cycle, and the mantissas are there.
    later = latency(rows) - base_latency(rows) - 1
    for row, depth in enumerate(depths):
        shift, mantissa = b.before((depth - common)[:6]), dut.mantissas[row]
        weight = ((((mantissa << 1) >> shift) + 1) >> 1)[:P_BITS]
        matters = b.ago(there[row], latency(rows) - 1)
        b.claim(dut.weights[row] == b.ago(weight, later), when=settled & matters)
        b.claim(dut.weights[row] == 0, when=settled & (b.ago(mantissa, later) == 0))
    b.cover(settled & (dut.weights[0] == 3) & (dut.base == DEPTH_MAX))
    b.prove(depth=latency(rows) + 2, reach=latency(rows) + 8)
