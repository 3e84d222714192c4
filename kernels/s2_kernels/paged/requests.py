"""Requests whose keys and values are in the two paged tiers: what every paged operation is called with."""

from __future__ import annotations

from typing import NamedTuple

import torch

UNALIGNED = ("window_table", "strided_table", "query_start_loc", "seq_lens")
"""Arguments of the prefill kernels by whose alignment Triton must not tell kernels apart.

An engine's prefills follow its decodes: where their lengths and tables begin differs from step to step, and
a server would compile while requests wait.
"""


class PagedRequests(NamedTuple):
    """A batch's requests, where their keys and values are, and how many there are.

    A request's queries are the last tokens of its sequence, and their own keys and values are in the caches
    already. A request may have no query.

    Attributes:
        window_cache, strided_cache: [pages, num_kv_heads, page_slots, 2 * head_size], any strides (on a GPU
            with a contiguous last dimension); a slot has a key and then its value.
        window_table, strided_table: int32 [requests, *], page of each span of a tier's page tokens.
        query_start_loc: int32 [requests + 1], where each request's queries start.
        seq_lens: int32 [requests], context and queries.
    """

    window_cache: torch.Tensor
    strided_cache: torch.Tensor
    window_table: torch.Tensor
    strided_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    def first(self, count: int) -> PagedRequests:
        """The first `count` of these requests."""
        return self._replace(
            window_table=self.window_table[:count],
            strided_table=self.strided_table[:count],
            query_start_loc=self.query_start_loc[: count + 1],
            seq_lens=self.seq_lens[:count],
        )

    def after(self, count: int, query_start_loc: torch.Tensor) -> PagedRequests:
        """The requests after the first `count`, whose queries start at `query_start_loc`."""
        return self._replace(
            window_table=self.window_table[count:],
            strided_table=self.strided_table[count:],
            query_start_loc=query_start_loc,
            seq_lens=self.seq_lens[count:],
        )
