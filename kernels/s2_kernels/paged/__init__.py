"""The served path: storing new tokens in the two paged tiers of a KV cache, and attending to them there."""

from s2_kernels.paged.dispatch import attend, write
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.paged.step import LayerHeads, PagedStep

__all__ = ["LayerHeads", "PagedRequests", "PagedStep", "attend", "write"]
