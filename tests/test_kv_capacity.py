"""The capacity benchmark's table, also of engines that did not start."""

from __future__ import annotations

from typing import Any

from benchmarks.kv_capacity import VARIANTS, table


def test_a_variant_whose_engines_did_not_start_keeps_its_column() -> None:
    facts: dict[str, Any] = {"geometry": "hhst-8b", "stored_fraction_sparse_layer": 0.132}
    records = [{**facts, "variant": variant, "concurrent_requests": None} for variant in VARIANTS]
    records[1] |= {"concurrent_requests": 5.613, "max_num_batched_tokens": 16384}
    lines = table(records).splitlines()
    assert lines[0].endswith("| S2, steps of 16384 tokens | S2, no engine started |")
    assert lines[2] == "| hhst-8b | 13.2% | not even one | 5.61 | not even one |"
