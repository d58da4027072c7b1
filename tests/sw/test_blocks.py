# SPDX-License-Identifier: Apache-2.0
"""A pool of blocks under an engine: what rows attend to, whoever had the blocks before."""

import errno

import numpy as np
import pytest
import torch

import nearkv
from nearkv.attention import blocks
from nearkv.attention.blocks import BlockPool
from nearkv.io import FlashError
from nearkv_hw.number import error_bound

LAYERS, HEADS, GROUP, DIM, SIZE = 2, 2, 3, 32, 32
N_TOKENS, N_POSITIONS = 1000, 3000
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def twin():
    with nearkv.open_card("twin") as card:
        yield card


@pytest.fixture
def pool_of(twin, tmp_path):
    """pool_of(...): a pool of 64 blocks of 32 tokens on two layers, closed afterwards."""
    pools = []

    def make(n_blocks=64, windows=(None,) * LAYERS, head_dim=DIM, **options):
        options = {"directory": tmp_path, "card": twin, "page_tokens": SIZE} | options
        pools.append(BlockPool(n_blocks, windows, HEADS, head_dim, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class Engine:
    """Does to a pool what an engine does, and knows what must come out.

    Sequences are lists of tokens; K and V of a token depend on nothing but its number and position, as
    in an engine that shares blocks of equal prefixes.
    """

    def __init__(self, pool: BlockPool, seed: int = 0):
        self.pool, self.rng = pool, np.random.default_rng(seed)
        self.free = [*range(1, len(pool._state))]
        self.tokens: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}  # tokens in blocks
        self.blocks: dict[int, list[int]] = {}
        self.owners: dict[int, int] = {}
        self.tables: dict[tuple[int, int], np.ndarray] = {}
        self.head_dim = pool.head_dim

    def kv(self, layer: int, tokens: list[int], first: int, which: int) -> np.ndarray:
        key = layer, which
        if key not in self.tables:
            rng = np.random.default_rng(key)
            shape = (2, max(N_TOKENS, N_POSITIONS), HEADS, self.head_dim)
            self.tables[key] = rng.standard_normal(shape, np.float32)
        of_token, of_position = self.tables[key]
        rows = of_token[tokens] + of_position[first : first + len(tokens)]
        return rows.astype(np.float16).astype(np.float32)

    def start(self, name: int, tokens: list[int], like: int | None = None, n_shared: int = 0):
        """A sequence, whose first blocks are those of another one."""
        self.tokens[name] = [*tokens]
        self.blocks[name] = self.blocks[like][:n_shared] if like is not None else []
        self.done[name] = n_shared * SIZE
        for block in self.blocks[name]:
            self.owners[block] += 1

    def allocate(self, name: int, end: int) -> None:
        """Blocks for so many tokens."""
        while len(self.blocks[name]) * SIZE < end:
            block = self.free.pop(int(self.rng.integers(len(self.free))))
            self.blocks[name].append(block)
            self.owners[block] = 1

    def stop(self, name: int, release: bool = True) -> list[int]:
        """The sequence is gone; which blocks are free now."""
        gone = []
        for block in self.blocks.pop(name):
            self.owners[block] -= 1
            if not self.owners[block]:
                gone.append(block)
        self.free += gone
        del self.tokens[name], self.done[name]
        if release:
            self.pool.release(gone)
        return gone

    def step(self, lengths: dict[int, int]) -> float:
        """New tokens of some sequences, attended in every layer: the largest error over its bound."""
        rows = list(lengths)
        for name in rows:
            self.allocate(name, self.done[name] + lengths[name])
        tables = np.zeros((len(rows), max(len(self.blocks[name]) for name in rows)), np.int64)
        for i, name in enumerate(rows):
            tables[i, : len(self.blocks[name])] = self.blocks[name]
        contexts = [self.done[name] for name in rows]
        self.pool.begin(tables, np.array(contexts), np.array([lengths[name] for name in rows]))
        worst = 0.0
        for layer, window in enumerate(self.pool.windows):
            new = [
                torch.from_numpy(
                    np.concatenate(
                        [
                            self.kv(layer, self.tokens[name][at : at + lengths[name]], at, which)
                            for name, at in zip(rows, contexts, strict=True)
                        ]
                    )
                )
                for which in (0, 1)
            ]
            self.pool.write(layer, *new)
            q = torch.from_numpy(
                self.rng.standard_normal((len(new[0]), HEADS * GROUP, self.head_dim), np.float32)
            )
            out = self.pool.attend(layer, q, SCALE).numpy()
            row = 0
            for name, at in zip(rows, contexts, strict=True):
                end = at + lengths[name]
                k, v = (self.kv(layer, self.tokens[name][:end], 0, which) for which in (0, 1))
                for position in range(at, end):
                    first = 0 if window is None else max(0, position - window + 1)
                    worst = max(
                        worst,
                        _error(
                            q[row].numpy(), *(x[first : position + 1] for x in (k, v)), out[row]
                        ),
                    )
                    row += 1
        for name in rows:
            self.done[name] += lengths[name]
        return worst


def _error(q, k, v, out) -> float:
    """The largest error against float64, over its bound: float32 on the host errs less than a card."""
    worst = 0.0
    for head in range(HEADS):
        mine = q[head * GROUP : (head + 1) * GROUP].astype(np.float64)
        keys, values = (x[:, head].astype(np.float64) for x in (k, v))
        scores = mine @ keys.T * SCALE
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = p @ values / p.sum(axis=1, keepdims=True)
        product = (np.abs(mine).max(axis=0) * np.abs(keys)).max() * SCALE / np.log(2)
        bound = error_bound(q.shape[1], len(k), product).out * np.abs(values).max()
        got = out[head * GROUP : (head + 1) * GROUP]
        worst = max(worst, np.abs(got - want).max() / bound)
    return worst


def _tokens(rng, count):
    return rng.integers(0, N_TOKENS, count).tolist()


def _settle(pool):
    """Wait until what is being written is on flash."""
    for one in pool._writing:
        for layer in range(len(pool.windows)):
            pool.store.settle(one.sequence, layer)


def test_a_prompt_in_chunks_and_the_tokens_behind_it(pool_of):
    pool = pool_of()
    engine = Engine(pool)
    engine.start(0, _tokens(engine.rng, 300))
    for n in (70, 1, 100, 1, 1, 64, 20, 1):
        assert engine.step({0: n}) <= 1
        _settle(pool)
    assert engine.step({0: 1}) <= 1
    assert pool.n_stored == engine.done[0] // SIZE == 8
    assert pool.n_in_memory == 1
    assert pool.attention.figures.card_tokens > 0


def test_rows_of_all_kinds_share_a_batch(pool_of):
    pool = pool_of()
    engine = Engine(pool, 1)
    for name, n in enumerate((5, 200, 90, 33)):
        engine.start(name, _tokens(engine.rng, 400))
        assert engine.step({name: n}) <= 1
    _settle(pool)
    for _ in range(3):
        assert engine.step({3: 1, 0: 1, 1: 40, 2: 1}) <= 1
        assert engine.step({1: 2, 2: 2, 0: 1}) <= 1
        _settle(pool)


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_that_are_used_again_show_nothing_of_their_past(pool_of, caching):
    pool = pool_of(12, caching=caching)
    engine = Engine(pool, 2)
    for name in range(30):
        engine.start(name, _tokens(engine.rng, 300))
        for n in (int(engine.rng.integers(1, 150)), 1, 1, int(engine.rng.integers(1, 60)), 1):
            assert engine.step({name: n}) <= 1
        if name % 3 == 0:
            _settle(pool)
        engine.stop(name, release=name % 2 == 0)  # an engine may forget to say so
    if not caching:
        pool.release(range(12))
        assert not pool.n_stored
        assert not pool.n_in_memory


def test_a_shared_prefix_is_shared_pages(pool_of):
    pool = pool_of()
    engine = Engine(pool, 3)
    prefix = _tokens(engine.rng, 4 * SIZE)
    engine.start(0, prefix + _tokens(engine.rng, 50))
    assert engine.step({0: 4 * SIZE + 5}) <= 1
    assert engine.step({0: 1}) <= 1
    _settle(pool)
    assert engine.step({0: 1}) <= 1
    stored = pool.store.n_blocks(0)
    for name in (1, 2):
        engine.start(name, prefix + _tokens(engine.rng, 50), like=0, n_shared=4)
    assert engine.step({0: 1, 1: 7, 2: 3}) <= 1
    assert pool.store.n_blocks(0) == stored == 4
    engine.stop(0)
    assert engine.step({1: 1, 2: 1}) <= 1


def test_a_prefix_is_attended_before_and_after_it_is_on_flash(pool_of):
    """Its blocks stay in host memory until then, also when nobody has them for a while."""
    pool = pool_of()
    engine = Engine(pool, 4)
    prefix = _tokens(engine.rng, 2 * SIZE)
    engine.start(0, prefix)
    assert engine.step({0: 2 * SIZE}) <= 1
    engine.start(1, prefix + _tokens(engine.rng, 20), like=0, n_shared=2)
    engine.stop(0, release=False)
    assert engine.step({1: 4}) <= 1
    pool.release([])
    _settle(pool)
    assert engine.step({1: 4}) <= 1
    assert pool.n_stored == 2


def test_rows_share_blocks_that_are_written_in_the_same_batch(pool_of):
    """An engine knows what a block will hold as soon as somebody has it."""
    pool = pool_of()
    engine = Engine(pool, 13)
    prefix = _tokens(engine.rng, 3 * SIZE)
    engine.start(0, prefix + _tokens(engine.rng, 20))
    assert engine.step({0: SIZE + 5}) <= 1
    engine.allocate(0, 3 * SIZE)  # of which one has some tokens, and one none
    engine.start(1, prefix + _tokens(engine.rng, 30), like=0, n_shared=3)
    assert engine.step({1: 4, 0: 2 * SIZE}) <= 1
    _settle(pool)
    assert engine.step({1: 4, 0: 1}) <= 1
    _settle(pool)
    assert engine.step({1: 4, 0: 1}) <= 1
    assert pool.n_stored == 3


def test_windows_are_attended_beside_layers_that_see_all(pool_of):
    pool = pool_of(windows=(40, None, 7))
    engine = Engine(pool, 5)
    engine.start(0, _tokens(engine.rng, 400))
    engine.start(1, _tokens(engine.rng, 400))
    for lengths in ({0: 150}, {0: 1, 1: 40}, {0: 1, 1: 1}, {1: 90, 0: 3}, {0: 1, 1: 1}):
        assert engine.step(lengths) <= 1
        _settle(pool)
    # Of a prefix that was shared, what the window shows is read back.
    read = pool.figures.blocks_read
    engine.start(2, engine.tokens[0][:96] + _tokens(engine.rng, 60), like=0, n_shared=3)
    engine.stop(0)
    assert engine.step({2: 5}) <= 1
    assert pool.figures.blocks_read > read
    assert pool.n_in_memory <= 2 * 3 + 1


def test_heads_that_fill_no_page_are_filled_up(pool_of):
    pool = pool_of(head_dim=40)
    engine = Engine(pool, 6)
    engine.start(0, _tokens(engine.rng, 200))
    for n in (100, 1, 1):
        assert engine.step({0: n}) <= 1
        _settle(pool)


def test_devices_attend_as_the_host_does(monkeypatch):
    """What runs on a GPU, on the CPU; float32 sums of 32 products and 300 weights are off by few ulps."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, GROUP, 9, DIM, generator=generator)
    k, v = (torch.randn(2, 300, HEADS, DIM, generator=generator).half() for _ in "kv")
    k = k.transpose(1, 3).contiguous().transpose(1, 3)  # as pages have it
    want = blocks._attend(q, k, v, None, SCALE)
    monkeypatch.setattr(blocks, "_SCORES", 7000)  # in several steps
    got = blocks._attend_in_steps(q, k, v, None, SCALE)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_copies_on_the_host_leave_what_is_there():
    x, y = torch.ones(3), torch.zeros(2, dtype=torch.float16)
    copies = blocks.HostCopies()(x, y)
    assert copies[0] is x
    assert copies[1] is y


def test_tokens_that_are_taken_back_are_written_anew(pool_of):
    """As speculation does it: a batch writes more than is accepted."""
    pool = pool_of()
    engine = Engine(pool, 7)
    engine.start(0, _tokens(engine.rng, 200))
    assert engine.step({0: 60}) <= 1
    assert engine.step({0: 8}) <= 1  # fills a block
    engine.done[0] -= 6  # of which little was right
    engine.tokens[0][62:] = _tokens(engine.rng, 100)
    assert engine.step({0: 3}) <= 1
    _settle(pool)
    assert engine.step({0: 1}) <= 1


def test_a_block_that_was_never_written_is_not_attended(pool_of):
    pool = pool_of()
    with pytest.raises(RuntimeError, match="only 0 were written"):
        pool.begin(np.array([[3, 4]]), np.array([33]), np.array([1]))
    engine = Engine(pool, 8)
    engine.start(0, _tokens(engine.rng, 20))
    engine.step({0: 10})
    block = engine.blocks[0][0]
    with pytest.raises(RuntimeError, match=f"of its block {block} only 10 were written"):
        pool.begin(np.array([[block]]), np.array([11]), np.array([1]))


def test_what_is_not_finite_is_refused(pool_of):
    pool = pool_of()
    pool.begin(np.array([[1]]), np.array([0]), np.array([1]))
    k = torch.zeros(1, HEADS, DIM)
    with pytest.raises(ValueError, match="Inf or NaN in V of layer 1.*bf16"):
        pool.write(1, k, k + 1e6)


def test_host_memory_is_bounded_by_waiting_for_the_drive(pool_of):
    pool = pool_of(200, host_bytes=0)
    engine = Engine(pool, 9)
    engine.start(0, _tokens(engine.rng, 3000))
    for _ in range(12):
        assert engine.step({0: 2 * SIZE}) <= 1
    assert pool._kv[0].shape[1] < 20
    assert pool.n_stored > 15


def test_beyond_the_write_budget_blocks_stay_in_memory(pool_of):
    pool = pool_of(page_tokens=SIZE, budget_bytes=3 * HEADS * LAYERS * 4096)
    engine = Engine(pool, 10)
    engine.start(0, _tokens(engine.rng, 300))
    for n in (40, 1, 40, 1, 60, 1, 60, 1):
        assert engine.step({0: n}) <= 1
        _settle(pool)
    assert pool.store.bytes_written <= 3 * HEADS * LAYERS * 4096
    small = pool_of(budget_bytes=0, host_bytes=0)
    engine = Engine(small, 11)
    engine.start(0, _tokens(engine.rng, 2000))
    engine.step({0: 500})  # 16 blocks, which there is room for in any case
    with pytest.raises(FlashError, match="write budget") as error:
        engine.step({0: 600})
    assert error.value.errno == errno.EDQUOT


def test_an_engine_at_random(pool_of):
    """Sequences come, share prefixes, are preempted and end in any order."""
    pool = pool_of(60)
    engine = Engine(pool, 12)
    rng, names = engine.rng, iter(range(1000))
    for _ in range(60):
        live = list(engine.tokens)
        if len(live) < 5 and len(engine.free) > 20:
            name = next(names)
            whole = [one for one in live if engine.done[one] >= SIZE]
            if whole and rng.random() < 0.6:
                like = int(rng.choice(whole))
                n_shared = int(rng.integers(1, engine.done[like] // SIZE + 1))
                shared = engine.tokens[like][: n_shared * SIZE]
                engine.start(name, shared + _tokens(rng, 150), like=like, n_shared=n_shared)
            else:
                engine.start(name, _tokens(rng, 200))
        elif len(live) > 1 and rng.random() < 0.3:
            engine.stop(int(rng.choice(live)), release=rng.random() < 0.8)
        lengths = {}
        for name in engine.tokens:
            left = len(engine.tokens[name]) - engine.done[name]
            if left and rng.random() < 0.8:
                lengths[name] = 1 if rng.random() < 0.6 else int(rng.integers(1, min(left, 70) + 1))
        for name in [
            name for name in engine.tokens if engine.done[name] == len(engine.tokens[name])
        ]:
            engine.stop(name)
            lengths.pop(name, None)
        if lengths:
            assert engine.step(lengths) <= 1
        if rng.random() < 0.3:
            _settle(pool)
