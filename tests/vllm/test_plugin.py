# SPDX-License-Identifier: Apache-2.0
"""What the plug-in tells vLLM, without an engine."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def plugin():
    from nearkv import vllm

    return vllm


def test_other_versions_of_vllm_are_refused_with_the_command_that_helps(plugin):
    plugin.check_version("0.32.7+cpu")
    for version in ("0.31.0", "0.33.0", "1.32.0"):
        with pytest.raises(RuntimeError, match=r"pip install 'vllm==0.32.\*'.*NEARKV=off"):
            plugin.check_version(version)


def test_settings_come_from_the_config_first_and_from_variables_then(plugin, tmp_path):
    environment = {
        "NEARKV_DIRECTORY": "/a:/b", "NEARKV_CARD": "twin,model", "NEARKV_CAPACITY": "1000", "NEARKV_KV_DTYPE": ""
    }  # fmt: skip
    settings = plugin.Settings.read({"capacity": 5000}, environment)
    assert settings.directory == ["/a", "/b"]
    assert settings.card == ["twin", "model"]
    assert settings.capacity == 5000
    assert settings.most_blocks(700) == 7
    assert settings.kv_dtype is None
    settings = plugin.Settings.read({"directory": str(tmp_path)}, {})
    assert settings.directories == [tmp_path]
    assert settings.most_blocks(1 << 20) > 0
    assert plugin.Settings.read({}, {}).directories[0].is_dir()
    with pytest.raises(ValueError, match="no setting 'dir'; there are directory, card"):
        plugin.Settings.read({"dir": "/a"}, {})
    with pytest.raises(ValueError, match="write_budget is a number of bytes, not 'much'"):
        plugin.Settings.read({}, {"NEARKV_WRITE_BUDGET": "much"})


def test_blocks_cost_almost_nothing_of_vllms_memory(plugin):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    like = {"block_size": 128, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
    specs = [
        plugin.Backend.customize_spec(spec)
        for spec in (FullAttentionSpec(**like), SlidingWindowSpec(**like, sliding_window=512))
    ]
    assert specs[0] == specs[1]  # one table of blocks for layers of both kinds
    assert specs[0].page_size_bytes == FullAttentionSpec(**like).page_size_bytes // 1024


@pytest.mark.parametrize(
    "wanted",
    [
        {"alibi_slopes": [1.0]}, {"logits_soft_cap": 30.0}, {"sinks": torch.ones(4)},
        {"attn_type": "encoder_only"}, {"kv_sharing_target_layer_name": "layer.0"},
        {"kv_cache_dtype": "fp8_e4m3"},
    ],
    ids=lambda wanted: next(iter(wanted)),
)  # fmt: skip
def test_attention_of_other_kinds_is_refused_by_name(plugin, wanted):
    impl = plugin.Impl.__new__(plugin.Impl)
    with pytest.raises(NotImplementedError, match="nearkv's attention has no .*NEARKV=off"):
        plugin.Impl.__init__(impl, 8, 64, 0.125, 2, **wanted)


class Pool:
    def __init__(self):
        self.released = []

    def release(self, blocks):
        self.released.append(sorted(blocks))


def _step(finished=(), new=(), cached=(), resumed=()):
    return SimpleNamespace(
        finished_req_ids=set(finished), preempted_req_ids=None, kv_cache_block_copies=None,
        scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=(ids,)) for name, ids in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached], resumed_req_ids=set(resumed),
            new_block_ids=[None if ids is None else (ids,) for _, ids in cached],
        ),
    )  # fmt: skip


def test_blocks_are_released_with_the_last_request_that_has_them(plugin):
    pool = Pool()
    requests = plugin.Requests(pool)
    requests.follow(_step(new=[("a", [1, 2]), ("b", [1, 3])]))
    requests.follow(_step(cached=[("a", [4]), ("b", None)]))
    requests.follow(_step(finished="a"))
    assert pool.released == [[2, 4]]
    # b is preempted, of which nobody tells; c has its block 3 then; b comes back with other blocks.
    requests.follow(_step(new=[("c", [3])]))
    requests.follow(_step(cached=[("b", [1, 7])], resumed="b"))
    assert pool.released == [[2, 4]] + [[1]]
    requests.follow(_step(finished="bc"))
    assert sorted(sum(pool.released[2:], [])) == [1, 3, 7]


def test_models_with_several_tables_are_refused(plugin):
    new = SimpleNamespace(req_id="a", block_ids=([1], [2]))
    step = _step()
    step.scheduled_new_reqs = [new]
    with pytest.raises(NotImplementedError, match="one table of blocks"):
        plugin.Requests(Pool()).follow(step)
