"""Benchmarks of the engine: latency, throughput and serving, with the pattern and dense, side by side.

- `workloads`: what is measured, at which lengths.
- `checkpoint`: models of the reference geometries' sizes, without weights.
- `offline`: a process with one engine, vLLM's `LLM`, that does all of its latency and throughput.
- `serving`: a process with vLLM's OpenAI server; `client`: one with the traffic of `vllm bench serve`.
- `kv_cache`: what an engine has set up, asked of its workers; whether it is the plan's, and what fits.
- `processes`: processes that are watched, and whose last lines are kept.
- `records`: what is written, and how a run adds to an older one's file.
- `table`, `figures`: what is shown of it.
- `options`: of the command.
"""
