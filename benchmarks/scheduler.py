"""The host's time for a step in vLLM's scheduler and KV cache manager, S2 against the same model dense.

    python -m benchmarks.scheduler

vLLM's own scheduler, with asynchronous scheduling and prefix caching as on a GPU, serves requests that all
decode: each step is scheduled, and the step before it is settled with a token for each request. There is no
model and no GPU. Both schedulers of a geometry run in one process, taking turns, so that both see the same
noise; times are the thread's on the processor, medians over the turns.
"""

from __future__ import annotations

import argparse
import gc
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import core
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.engine_cache import cache_config, engine_config
from benchmarks.geometries import GEOMETRIES, TRAINED, Geometry
from benchmarks.results_file import write_results
from s2_vllm.cli import positive_int

MIX = "s2-7b, 12 layers"
ROWS: dict[str, Geometry] = {**TRAINED, MIX: replace(GEOMETRIES["s2-7b"], num_layers=12)}
"""The reference geometries, and one with few layers of which two are dense."""

REQUESTS = 256
SHORTEST_PROMPT, LONGEST_PROMPT = 256, 1276
"""Tokens; the requests' are spread evenly between, so that they need new pages in different steps."""
STEPS = 16
REPETITIONS = 60
MAX_MODEL_LEN = 131072
MEMORY = 2**43
"""Bytes: more than any of this needs, and none of it is touched."""


class Decoding:
    """A scheduler whose requests decode, one token each in a step.

    Args:
        geometry: the model's attention.
        sparse: whether it has the pattern.
        requests: how many run.
    """

    def __init__(self, geometry: Geometry, sparse: bool, requests: int) -> None:
        config = engine_config(geometry, sparse, max_model_len=MAX_MODEL_LEN, max_num_seqs=requests)
        cache = cache_config(config, geometry, MEMORY)
        config.cache_config.num_gpu_blocks = cache.num_blocks
        config.cache_config.block_size = min(g.kv_cache_spec.block_size for g in cache.kv_cache_groups)
        core.update_kv_cache_capacity(config, cache)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
        self.num_groups = len(cache.kv_cache_groups)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(hash_block_size, hash_function)
        self._in_flight: deque[SchedulerOutput] = deque()
        for number in range(requests):
            self.scheduler.add_request(self._request(number, requests))
        while len(self.scheduler.running) < requests or any(
            r.is_prefill_chunk for r in self.scheduler.running
        ):
            self.step()

    def _request(self, number: int, requests: int) -> Request:
        length = SHORTEST_PROMPT + (LONGEST_PROMPT - SHORTEST_PROMPT) * number // requests
        return Request(
            f"request-{number}",
            [number] * length,
            SamplingParams(max_tokens=MAX_MODEL_LEN, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def step(self) -> None:
        """Schedule a step, and settle the one before it."""
        self._in_flight.append(self.scheduler.schedule())
        if len(self._in_flight) > 1:
            output = self._in_flight.popleft()
            names = list(output.num_scheduled_tokens)
            index = {name: place for place, name in enumerate(names)}
            tokens = [
                [] if self.scheduler.requests[name].is_prefill_chunk else [place]
                for name, place in index.items()
            ]
            self.scheduler.update_from_output(output, ModelRunnerOutput(names, index, tokens))

    def time(self, steps: int) -> float:
        """Microseconds of a step, over so many of them."""
        start = thread_time()
        for _ in range(steps):
            self.step()
        return (thread_time() - start) / steps * 1e6


def measure(geometry: Geometry, requests: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Median microseconds of a step of both schedulers, which take turns of `steps` steps."""
    schedulers = {"s2": Decoding(geometry, True, requests), "dense": Decoding(geometry, False, requests)}
    # As an engine does once it has started.
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(repetitions):
        for name, scheduler in schedulers.items():
            times[name].append(scheduler.time(steps))
    gc.unfreeze()
    s2, dense = (median(times[name]) for name in ("s2", "dense"))
    return {
        "requests": requests,
        "steps": steps,
        "repetitions": repetitions,
        "kv_cache_groups": schedulers["s2"].num_groups,
        "s2_us": round(s2, 1),
        "dense_us": round(dense, 1),
        "ratio": round(s2 / dense, 3),
    }


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, a line per geometry."""
    lines = ["| geometry | KV cache groups | S2 | dense | S2 / dense |", "|---|---|---|---|---|"]
    for r in records:
        times = f"{r['s2_us'] / 1000:.2f} ms | {r['dense_us'] / 1000:.2f} ms"
        lines.append(f"| {r['geometry']} | {r['kv_cache_groups']} | {times} | {r['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler", description=__doc__)
    parser.add_argument("--geometries", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--requests", type=positive_int, default=REQUESTS)
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="of a turn")
    parser.add_argument("--repetitions", type=positive_int, default=REPETITIONS, help="turns of each")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scheduler.json"))
    arguments = parser.parse_args()
    sizes = arguments.requests, arguments.steps, arguments.repetitions
    records = [{"geometry": name, **measure(ROWS[name], *sizes)} for name in arguments.geometries]
    write_results(arguments.output, records)
    print(table(records))


if __name__ == "__main__":
    main()
