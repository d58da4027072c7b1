# SPDX-License-Identifier: Apache-2.0
"""Byte accounting: the same arithmetic as the ABI, to the byte."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from nearkv.attention import PageAttention
from nearkv.cards import CardError, open_card
from nearkv.store import KvStore
from nearkv_hw import abi
from nearkv_hw.config import preset
from nearkv_sim import perf
from nearkv_sim.system import closed_form, policy, traffic
from nearkv_sim.system.describe import Work, load_machine, load_model, parameters

SHAPES = st.tuples(
    st.sampled_from([32, 64, 96, 128, 256]),
    st.sampled_from([32, 64, 96, 128, 256, 1024]),
    st.sampled_from(list(abi.KvType)),
)


@given(SHAPES, st.integers(1, 40), st.integers(1, 14), st.data())
def test_one_job_moves_its_records_and_its_pages(shape, n_pages, group, data):
    layout = abi.PageLayout(*shape)
    last = data.draw(st.integers(0, layout.page_tokens))
    lens = [layout.page_tokens] * (n_pages - 1) + [last]
    got = traffic.head_traffic(layout, lens, group, rows=14)
    assert got.n_jobs == 1
    assert got.flash_read_bytes == n_pages * layout.page_bytes
    partial = abi.partial_bytes(layout.head_dim, group)
    table = 64 * ((n_pages + 1) // 2)  # whole beats
    assert got.down_bytes == 64 + table + 64 * layout.head_dim + partial
    assert got.up_bytes == partial
    # Whole K blocks, and V rows of valid tokens only; a page without tokens still costs one of each.
    blocks = sum(max(1, -(-n // 32)) for n in lens)
    rows = sum(max(1, n) for n in lens)
    assert got.kv_bytes == 64 * (blocks * layout.head_dim + rows * layout.head_dim // 32)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 8),
)
def test_a_step_is_the_sum_of_its_jobs(pages, n_layers, n_kv_heads, group):
    layout = abi.PageLayout(64)
    got = traffic.decode_traffic(
        layout, pages, n_layers=n_layers, n_q_heads=n_kv_heads * group, n_kv_heads=n_kv_heads
    )
    expect = traffic.Traffic()
    for _ in range(n_layers * n_kv_heads):
        for count in pages:
            expect += traffic.head_traffic(layout, [layout.page_tokens] * count, group)
    assert got == expect
    assert got.kv_bytes == got.flash_read_bytes == sum(pages) * n_layers * n_kv_heads * 32768


def test_spills_and_summaries_are_counted():
    layout = abi.PageLayout(128)
    got = traffic.decode_traffic(
        layout, [2], n_layers=2, n_q_heads=8, n_kv_heads=4, n_launches=6, spilled_pages=3
    )
    assert got.summary_bytes == 6 * abi.SUMMARY.bytes
    assert got.flash_write_bytes == 3 * 65536


def test_groups_wider_than_the_array_read_card_memory_again_but_not_flash():
    layout = abi.PageLayout(64)
    one = traffic.head_traffic(layout, [128] * 5, 8)
    many = traffic.head_traffic(layout, [128] * 5, 20)
    assert many.n_jobs == 3  # of seven heads each
    assert many.entry_bytes == one.entry_bytes
    assert many.flash_read_bytes == one.flash_read_bytes
    assert many.kv_bytes == 3 * one.kv_bytes


def test_more_pages_than_a_job_has_take_several():
    layout = abi.PageLayout(128)
    limit = traffic.pages_per_job(128)
    assert limit * 128 == 262144
    assert traffic.head_traffic(layout, [128] * limit, 8).n_jobs == 1
    assert traffic.head_traffic(layout, [128] * (limit + 1), 8).n_jobs == 2


@pytest.mark.parametrize("name", ["opt-30b", "qwen2.5-32b", "llama-3.1-70b", "smollm2-135m"])
@pytest.mark.parametrize("context", [4096, 65536])
def test_the_closed_form_moves_exactly_what_the_accounting_says(name, context):
    """A step of full pages: flash, uplink and records of the model, to the byte."""
    model, machine, batch = load_model(name), load_machine("smartssd-x16"), 4
    layout = abi.PageLayout(model.head_dim)
    chosen = policy.nearkv(shares={"card": 1.0})
    work = Work(batch=batch, context=context, output=0)
    weights = {"gpu": 0.0, "dram": 1.0, "flash": 0.0}
    got = closed_form.loads(model, machine, work, chosen, chosen.shares, weights)
    expect = traffic.decode_traffic(
        layout,
        [context // layout.page_tokens] * batch,
        n_layers=model.n_layers,
        n_q_heads=model.n_q_heads,
        n_kv_heads=model.n_kv_heads,
    )
    assert got.bytes["flash read"] == expect.flash_read_bytes
    spilled = got.bytes["flash write"]
    assert got.bytes["uplink"] - spilled == expect.down_bytes + expect.up_bytes
    # Each sequence fills a page every page_tokens steps.
    pages = batch * model.n_layers * model.n_kv_heads
    assert spilled * layout.page_tokens == pages * layout.page_bytes


class CountingCard:
    """A card that counts what crosses its boundary, and asks its summaries for the rest."""

    def __init__(self, card):
        self._card = card
        self.loaded = self.written = self.read = self.runs = self.jobs = 0
        self.kv_beats = self.partial_beats = 0

    def __getattr__(self, name):
        return getattr(self._card, name)

    def start_load(self, reads):
        self.loaded += sum(read.nbytes for read in reads)
        return self._card.start_load(reads)

    def write_job(self, offset, data):
        self.written += len(data)
        return self._card.write_job(offset, data)

    def read_job(self, offset, nbytes):
        self.read += nbytes
        return self._card.read_job(offset, nbytes)

    def finish_run(self, *args, **kwargs):
        counters = self._card.finish_run(*args, **kwargs)
        self.runs += 1
        self.jobs += counters["n_jobs"]
        self.kv_beats += counters["kv_beats"]
        self.partial_beats += counters["partial_beats"]
        return counters


@pytest.mark.parametrize(
    ("head_dim", "group", "page_tokens", "kv_bytes", "pages"),
    [
        (64, 3, 128, 4 << 20, (3, 1)),
        (128, 8, 128, 4 << 20, (2, 5)),
        (32, 1, 32, 4 << 20, (4, 4)),
        (64, 20, 64, 4 << 20, (3, 0)),  # a group wider than the array
        (64, 4, 128, 128 << 10, (9, 2)),  # more pages than card memory holds
    ],
)
@pytest.mark.parametrize("card_name", ["model", "twin"])
def test_the_engine_moves_exactly_the_bytes_of_the_model(
    tmp_path, card_name, head_dim, group, page_tokens, kv_bytes, pages
):
    check_bytes(tmp_path, card_name, head_dim, group, page_tokens, pages, kv_bytes=kv_bytes)


@pytest.mark.sim
@pytest.mark.parametrize(
    ("head_dim", "group", "page_tokens", "pages"),
    [(32, 1, 32, (2, 1)), (32, 2, 64, (1, 2)), (32, 5, 32, (3, 0))],
)
def test_the_simulated_hardware_moves_exactly_the_bytes_of_the_model(
    tmp_path, head_dim, group, page_tokens, pages
):
    """The counters are those of the emitted Verilog."""
    try:
        open_card("rtl", config="tiny").close()
    except CardError as error:
        pytest.skip(str(error))
    check_bytes(tmp_path, "rtl", head_dim, group, page_tokens, pages, config="tiny")


def check_bytes(directory, card_name, head_dim, group, page_tokens, pages, **options):
    """A decode step through store, host and card: every counter, to the byte."""
    n_layers, n_kv_heads = 2, 2
    layout = abi.PageLayout(head_dim, page_tokens)
    rng = np.random.default_rng(3)
    with (
        open_card(card_name, **options) as card,
        KvStore(directory, layout, n_kv_heads) as store,
    ):
        for layer in range(n_layers):
            for sequence, count in enumerate(pages):
                if count:
                    shape = (n_kv_heads, count * page_tokens, head_dim)
                    k, v = rng.standard_normal((2, *shape)).astype(np.float16).view(np.uint16)
                    store.append(sequence, layer, k, v)
        spilled = store.bytes_written
        counting = CountingCard(card)
        attention = PageAttention(counting, store)
        for layer in range(n_layers):
            q = rng.standard_normal((len(pages), n_kv_heads, group, head_dim))
            attention.attend(layer, range(len(pages)), q, head_dim**-0.5, pages)
    expect = traffic.decode_traffic(
        layout,
        pages,
        n_layers=n_layers,
        n_q_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        rows=card.rows,
        job_pages=attention.job_pages,
        n_launches=counting.runs,
        spilled_pages=n_layers * n_kv_heads * sum(pages),
    )
    assert counting.jobs == expect.n_jobs
    assert counting.loaded == expect.flash_read_bytes
    assert 64 * counting.kv_beats == expect.kv_bytes
    assert counting.written == expect.down_bytes
    assert 64 * counting.partial_beats == counting.read == expect.partial_bytes
    assert spilled == expect.flash_write_bytes


@pytest.mark.parametrize("group", [1, 4, 8])
def test_the_engines_rate_is_that_of_the_cycle_model(group):
    """One beat a cycle at 296 MHz, within half a percent over 8 k tokens."""
    got = perf.predict(preset("smartssd"), [perf.JobShape(128, group, 8192)])
    rate = got.efficiency * abi.BEAT_BYTES * 296e6
    assert rate == pytest.approx(parameters().engine_bytes_per_s, rel=5e-3)
