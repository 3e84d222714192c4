"""Phi-3-small-128k on one GPU, as it is and with every layer dense: latency, and how many requests fit.

    python -m benchmarks.phi3_small

Both models have the published sizes and random weights, and run in vLLM's default mode. Times are those of
vLLM's own request statistics: the time to the first token (TTFT) from arrival, the time per output token
(TPOT) over all tokens after the first. Every prompt is new, so that nothing of it is in the prefix cache,
except in the batch: its prompts have been there once, so that its requests decode together from the start.
`--tiny` runs the same steps on a CPU with a model of no size.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results_file import write_results
from s2_kernels.config import find_config
from s2_vllm.cli import positive_int

PHI3_SMALL_128K: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "ff_intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 8192,
    "rope_embedding_base": 1000000,
    # The published factors differ, which no time depends on.
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0] * 64,
        "long_factor": [1.0 + n / 4 for n in range(64)],
        "original_max_position_embeddings": 8192,
    },
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
}

TINY = PHI3_SMALL_128K | {
    "torch_dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "ff_intermediate_size": 256,
    "max_position_embeddings": 2048,
    "rope_scaling": None,
    "blocksparse_block_size": 16,
    "blocksparse_num_local_blocks": 4,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "phi3-small": {},
    "every layer dense": {"dense_attention_every_n_layers": 1},
}
"""What each changes in the config."""


@dataclass(frozen=True)
class Workload:
    """What is measured of each variant.

    Attributes:
        config: the model's config.json.
        max_model_len: of the engine.
        prompts: length of a prompt, and how many of that length are served one after the other.
        batch: (requests, length) that decode together.
        output_tokens: of every request.
        options: further engine options.
    """

    config: dict[str, Any]
    max_model_len: int
    prompts: dict[int, int]
    batch: tuple[int, int]
    output_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


FULL = Workload(PHI3_SMALL_128K, 131072, {32768: 3, 130944: 2}, (8, 32768), 96)

SMOKE = Workload(
    TINY,
    1024,
    {200: 2, 900: 1},
    (2, 200),
    4,
    {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28},
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Phi-3-small-128k, as it is and with every layer dense")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--max-num-batched-tokens", type=positive_int, help="tokens per step (vLLM's default)"
    )
    parser.add_argument("--tiny", action="store_true", help="a model of no size, on a CPU; needs --output")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/phi3-small.json")
    options = parser.parse_args(arguments)
    if options.tiny and options.output is None:
        parser.error("--output: missing, expected a file with --tiny: its figures mean nothing")
    output = options.output or Path("benchmarks/results/phi3-small.json")
    records = []
    for variant in options.variants:
        record = measure(variant, SMOKE if options.tiny else FULL, options.max_num_batched_tokens)
        records.append(record)
        print(json.dumps(record), flush=True)
        # At once: a run that ends early leaves what it has measured.
        write_results(output, records)
    print(table(records))


def measure(variant: str, workload: Workload, batched_tokens: int | None) -> dict[str, Any]:
    """Start an engine, serve the workload, and record what vLLM reports.

    Args:
        variant: a key of VARIANTS.
        workload: what to serve.
        batched_tokens: the most tokens of a step; None for vLLM's default.
    """
    import torch
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        with tempfile.TemporaryDirectory() as folder:
            config = workload.config | VARIANTS[variant]
            Path(folder, "config.json").write_text(json.dumps(config))
            llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=workload.max_model_len,
                max_num_batched_tokens=batched_tokens,
                disable_log_stats=False,
                **workload.options,
            )
        try:
            stored = _stored_fraction(config, workload.max_model_len)
            measured = {**_capacity(llm), **_latencies(llm, workload)}
            return {"variant": variant, "stored_fraction": stored, **measured}
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stored_fraction(config: dict[str, Any], length: int) -> float:
    """Tokens that the model stores at a context of `length`, as a fraction of what dense layers store."""
    layers = config["num_hidden_layers"]
    found = find_config(config, layers)
    if found is None:
        return 1.0
    pattern = found.pattern(config["num_attention_heads"], config["num_key_value_heads"])
    dense = len(found.dense_layers)
    return (dense + (layers - dense) * pattern.stored_fraction(length)) / layers


def _capacity(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    return {
        "max_model_len": config.model_config.max_model_len,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
        "concurrent_requests": config.cache_config.kv_cache_max_concurrency,
    }


def _latencies(llm: Any, workload: Workload) -> dict[str, Any]:
    """Medians of TTFT and TPOT in milliseconds, by prompt length; and TPOT of the batch."""
    generator = random.Random(0)
    vocabulary = range(workload.config["vocab_size"])

    def prompts(count: int, length: int) -> list[list[int]]:
        return [generator.choices(vocabulary, k=length) for _ in range(count)]

    # The first requests compile kernels.
    shortest = min(workload.prompts)
    _serve(llm, prompts(2, shortest), workload.output_tokens)

    alone = {}
    for length, repetitions in workload.prompts.items():
        times = [_serve(llm, prompts(1, length), workload.output_tokens)[0] for _ in range(repetitions)]
        alone[length] = {
            "repetitions": repetitions,
            "ttft_ms": median(ttft for ttft, _ in times),
            "tpot_ms": median(tpot for _, tpot in times),
        }

    requests, length = workload.batch
    batch = prompts(requests, length)
    _serve(llm, batch, 1)
    together = _serve(llm, batch, workload.output_tokens)
    return {
        "output_tokens": workload.output_tokens,
        "single_request": alone,
        "batch": {"requests": requests, "length": length, "tpot_ms": median(tpot for _, tpot in together)},
    }


def _serve(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[tuple[float, float]]:
    """(TTFT, TPOT) in milliseconds of each prompt, all served at the same time; TPOT 0 for one token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    times = []
    for output in outputs:
        assert len(output.outputs[0].token_ids) == num_tokens
        metrics = output.metrics
        decoding = metrics.last_token_ts - metrics.first_token_ts
        times.append((1000 * metrics.first_token_latency, 1000 * decoding / max(1, num_tokens - 1)))
    return times


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, a column per variant."""
    lines = [
        f"| | {' | '.join(r['variant'] for r in records)} |",
        f"|---|{'---|' * len(records)}",
        _row("tokens stored, of a dense model's", [f"{r['stored_fraction']:.0%}" for r in records]),
        _row(
            f"requests of {records[0]['max_model_len']} tokens that fit",
            [f"{r['concurrent_requests']:.2f}" for r in records],
        ),
    ]
    for length in records[0]["single_request"]:
        cells = [r["single_request"][length] for r in records]
        lines.append(_row(f"TTFT, prompt of {length}", [f"{c['ttft_ms'] / 1000:.2f} s" for c in cells]))
        lines.append(_row("TPOT after it, one request", [f"{c['tpot_ms']:.1f} ms" for c in cells]))
    batch = records[0]["batch"]
    name = f"TPOT, {batch['requests']} requests of {batch['length']}"
    lines.append(_row(name, [f"{r['batch']['tpot_ms']:.1f} ms" for r in records]))
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
