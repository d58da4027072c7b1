# SPDX-License-Identifier: Apache-2.0
"""Runs engines of vLLM one after the other: python engine.py IN.json OUT.json

IN    a list of {"llm": arguments of LLM, "rounds": [[[prompt token ids, max_tokens], ..], ..]}
OUT   for each a dict: "rounds", of each prompt {"tokens", "logprobs" (of the chosen tokens), "best" (of the best
      five, by token), "cached"};
      "resumed", how many requests were taken up again after a preemption; and of nearkv's pool, if that
      is on, what it holds at the end

In a process of its own, because vLLM's plug-ins belong to a process, and NEARKV=off decides about ours.
"""

import gc
import json
import os
from pathlib import Path
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or the pool would be in another process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.worker.gpu_worker import Worker

resumed: list[str] = []


def _counting(method):
    def execute_model(self, scheduler_output):
        resumed.extend(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        return method(self, scheduler_output)

    return execute_model


def _run(llm: LLM, prompts: list) -> list[dict]:
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in prompts],
        [
            SamplingParams(
                temperature=0, max_tokens=n, logprobs=5, ignore_eos=True, detokenize=False
            )
            for _, n in prompts
        ],
        use_tqdm=False,
    )
    return [
        {
            "tokens": [*one.outputs[0].token_ids],
            "logprobs": [
                step[token].logprob
                for token, step in zip(
                    one.outputs[0].token_ids, one.outputs[0].logprobs, strict=True
                )
            ],
            "best": [
                {token: entry.logprob for token, entry in step.items()}
                for step in one.outputs[0].logprobs
            ],
            "cached": one.num_cached_tokens,
        }
        for one in outputs
    ]


def _pool(config) -> dict:
    from nearkv.vllm import _pools

    pool = _pools[id(config)].pool
    n_blocks = config.cache_config.num_gpu_blocks
    figures = pool.attention.figures
    return {
        "stored": pool.n_stored, "in_memory": pool.n_in_memory, "written": pool.store.bytes_written,
        "block_bytes": pool.block_bytes, "n_blocks": n_blocks, "card_tokens": figures.card_tokens,
        "sequences": len(pool.store.sequences()),
    }  # fmt: skip


def main(source: str, target: str) -> None:
    Worker.execute_model = _counting(Worker.execute_model)
    results = []
    for engine in json.loads(Path(source).read_text()):
        resumed.clear()
        llm = LLM(
            dtype="float32", enforce_eager=True, disable_log_stats=True,
            kv_cache_memory_bytes=engine["llm"].pop("kv_cache_memory_bytes", 64 << 20),
            **engine["llm"],
        )  # fmt: skip
        result: dict = {"rounds": [_run(llm, prompts) for prompts in engine["rounds"]]}
        result["resumed"] = len(resumed)
        config = llm.llm_engine.vllm_config
        if os.environ.get("NEARKV") != "off":
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            result["pool"] = _pool(config)
            result["pool"]["memory"] = sum(x.nbytes for x in runner.kv_caches)
            del runner
        results.append(result)
        del llm, config
        cleanup_dist_env_and_memory()
        gc.collect()
    Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
