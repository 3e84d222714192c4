"""The capacity benchmark: its records, and its table, also of engines that would not start."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.geometries import GEOMETRIES
from benchmarks.kv_capacity import GIB, VARIANTS, measure, table


@pytest.mark.parametrize("variant", VARIANTS)
def test_record(variant: str) -> None:
    record = measure(GEOMETRIES["hhst-8b"], variant, 20 * GIB)
    # A block is 2 pages of 4 MiB; a request has those of the window, 256 strided ones and 128 dense ones.
    blocks = 20 * GIB // 2**23
    window_pages = {
        "s2": (1023 + 2 * 16384 + 63) // 64 + 1,
        "s2, short steps": (1023 + 2 * 2048 + 63) // 64 + 1,
    }
    if variant == "dense":
        counts = 1.25, 1.25
    else:
        counts = blocks / (window_pages[variant] + 256 + 128), blocks / (17 + 256 + 128)
    assert (record["concurrent_requests"], record["concurrent_requests_decoding"]) == counts
    assert record["kv_cache_groups"] == (1 if variant == "dense" else 3)
    assert record["kv_cache_tokens"] == int(counts[0] * 131072)


def test_memory_for_less_than_one_request() -> None:
    record = measure(GEOMETRIES["s2-7b"], "dense", 40 * GIB)
    assert record["concurrent_requests"] is None
    assert record["reason"].startswith(
        "To serve at least one request with the model's max seq len (131072), (64.0 GiB"
    )


def test_table_of_what_does_not_fit() -> None:
    facts: dict[str, Any] = {"geometry": "hhst-8b", "stored_fraction_sparse_layer": 0.132}
    records = [{**facts, "variant": variant, "concurrent_requests": None} for variant in VARIANTS]
    records[1] |= {"concurrent_requests": 5.613, "concurrent_requests_decoding": 12.768, "kv_cache_groups": 3}
    lines = table(records).splitlines()
    assert lines[0].endswith("| S2, vLLM's count, steps of 16384 tokens | of 2048 |")
    assert lines[2] == "| hhst-8b | 3 | 13.2% | not even one | 12.77 | 5.61 | not even one |"
