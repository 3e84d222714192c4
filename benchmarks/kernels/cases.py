"""What is run: an operation on a reference geometry, with a batch and a sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from benchmarks.geometries import GEOMETRIES, Geometry, kernel_geometry
from s2_kernels.pattern import S2Pattern

GRADIENT_OPS = ("backward", "forward_backward")
OPS = ("cache_write", "decode", "chunked_prefill", "prefill", *GRADIENT_OPS)
CHUNK_TOKENS = 2048
DECODE_TOKENS = 524288
"""Tokens of a decode batch, all contexts together; a context of LONE_DECODE_TOKENS or more is alone."""
LONE_DECODE_TOKENS = 131072
MAX_BATCH = 256


@dataclass(frozen=True)
class Case:
    """One row of the benchmark, run by several implementations.

    Attributes:
        op: one of OPS.
        geometry: a name in GEOMETRIES or VARIATIONS.
        batch: requests, all of the same length.
        seq_len: prefill, cache_write and gradients: tokens, all of them new. chunked_prefill: tokens in the
            cache before CHUNK_TOKENS new ones. decode: tokens, the new one included.
    """

    op: str
    geometry: str
    batch: int
    seq_len: int

    @property
    def shape(self) -> Geometry:
        return kernel_geometry(self.geometry)

    @property
    def pattern(self) -> S2Pattern:
        return _pattern(self.geometry)

    @property
    def new_tokens(self) -> int:
        """Queries per request (of cache_write: tokens to store)."""
        return {"decode": 1, "chunked_prefill": CHUNK_TOKENS}.get(self.op, self.seq_len)

    @property
    def context_len(self) -> int:
        """Tokens per request that were there before."""
        return {"decode": self.seq_len - 1, "chunked_prefill": self.seq_len}.get(self.op, 0)

    @property
    def total_len(self) -> int:
        """Keys per request."""
        return self.context_len + self.new_tokens

    @property
    def facts(self) -> dict[str, Any]:
        """The part of a record that says what was run."""
        return {"op": self.op, "geometry": self.geometry, "batch": self.batch, "seq_len": self.seq_len}

    def __str__(self) -> str:
        return f"{self.op} {self.geometry} {self.batch} x {self.seq_len}"


@lru_cache
def _pattern(geometry: str) -> S2Pattern:
    shape = kernel_geometry(geometry)
    return shape.config.pattern(shape.num_heads, shape.num_kv_heads)


@dataclass(frozen=True)
class Defaults:
    """What an operation is run on unless told otherwise."""

    geometries: tuple[str, ...]
    seq_lens: tuple[int, ...]


DEFAULTS = {
    "cache_write": Defaults(("hhst-8b",), (8192,)),
    "decode": Defaults(("hhst-8b", "phi3-small"), (8192, 32768, 131072)),
    "chunked_prefill": Defaults(("hhst-8b", "phi3-small"), (131072,)),
    "prefill": Defaults(tuple(GEOMETRIES), (1024, 2048, 4096, 8192, 32768, 131072)),
    **dict.fromkeys(GRADIENT_OPS, Defaults(tuple(GEOMETRIES), (4096, 32768, 131072))),
}
QUICK_DEFAULTS = {
    "cache_write": Defaults(("hhst-8b",), (8192,)),
    "decode": Defaults(("hhst-8b",), (32768,)),
    "chunked_prefill": Defaults(("hhst-8b",), (32768,)),
    "prefill": Defaults(("hhst-8b", "s2-7b"), (8192, 32768)),
    **dict.fromkeys(GRADIENT_OPS, Defaults(("hhst-8b", "s2-7b"), (32768,))),
}


def select_cases(
    ops: Sequence[str] | None = None,
    geometries: Sequence[str] | None = None,
    seq_lens: Sequence[int] | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases to run, shorter ones first; None stands for an operation's defaults."""
    defaults = QUICK_DEFAULTS if quick else DEFAULTS
    return [
        Case(op, geometry, _batch(op, seq_len), seq_len)
        for op in OPS
        if ops is None or op in ops
        for seq_len in sorted(seq_lens or defaults[op].seq_lens)
        for geometry in geometries or defaults[op].geometries
    ]


def _batch(op: str, seq_len: int) -> int:
    if op != "decode" or seq_len >= LONE_DECODE_TOKENS:
        return 1
    return min(MAX_BATCH, max(1, DECODE_TOKENS // seq_len))
