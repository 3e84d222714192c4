"""DKernel's interface on these kernels: all that `import dkernel` offers, after a changed import.

    from s2_kernels.dkernel import LocalStrideSparseAttention, SparseAttention
    from s2_kernels.dkernel import combine_attn_partitions, get_sparse_attn_mask

The interface is that of github.com/linxihui/dkernel at commit 0d4e90e: its README, dkernel/interface.py and
`get_sparse_attn_mask` of dkernel/utils.py; for padding ops/sparse_attn_inference.py, for the log-sum-exp
ops/sparse_attn_fwd.py. What differs: mistakes raise ValueError, a past may be of any length under any number
of queries, a query without keys gets zeros, and packed and padded inputs may be non-causal, return the
log-sum-exp and be differentiated too. The helpers of dkernel/utils.py for DKernel's own kernels are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from s2_kernels.attention import attend
from s2_kernels.contiguous.checks import check_shapes
from s2_kernels.contiguous.operators import Spans, read_packed, read_padded
from s2_kernels.contiguous.partitions import combine_attn_partitions
from s2_kernels.contiguous.sequences import longest
from s2_kernels.dkernel_masks import get_sparse_attn_mask
from s2_kernels.masks import BlockMask
from s2_kernels.pattern import S2Pattern

__all__ = [
    "LocalStrideSparseAttention",
    "SparseAttention",
    "combine_attn_partitions",
    "get_sparse_attn_mask",
]

_MIN_BLOCK_SIZE = 16
_MIN_SEQ_MULTIPLE = 64


class SparseAttention(torch.nn.Module):
    """Attention with an arbitrary block mask, per head or one for all."""

    def __init__(
        self,
        block_size: int,
        sparse_pattern: torch.Tensor | BlockMask,
        *,
        causal: bool = True,
        seq_dim: int | None = None,
        block_m: int | None = None,
        block_n: int | None = None,
        out: torch.Tensor | None = None,
        d_splits: int | None = None,
        inference: bool | None = None,
    ) -> None:
        """Make the module for one mask.

        Args:
            block_size: tokens per block, a power of two of at least 16.
            sparse_pattern: [query blocks, key blocks] or [heads, query blocks, key blocks] of any dtype,
                nonzero where a block attends to another. Its heads are 1, the KV heads or the query heads of
                the inputs. Or a `BlockMask` of that block size and of the same kind, causal or not.
            causal: whether a token attends to no later one. If so the pattern is lower triangular, and with
                fewer query blocks than key blocks its rows are the last ones; one that is not KV-efficient
                gets a warning. If not, its rows start with that of the first query; but a single query is
                the sequence's last token if the pattern is square, as when decoding.
            seq_dim: dimension of the tokens in 4-D inputs, 1 (the default) or 2.
            block_m, block_n, d_splits, inference: accepted for DKernel's sake. They tune its kernels; these
                choose their tiles themselves.
            out: tensor to write every call's result to, in q's shape and dtype. Calls then have no gradient:
                an input that requires one is refused.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value; the message names it.
        """
        super().__init__()
        _check_sizes(block_size, block_m, block_n)
        if seq_dim not in (None, 1, 2):
            raise ValueError(f"seq_dim: {seq_dim}, expected None, 1 or 2")
        self.mask = _block_mask(sparse_pattern, block_size, causal)
        self.pattern: S2Pattern | None = None
        self.block_size = block_size
        self.max_seqlen = max(self.mask.num_query_blocks, self.mask.num_blocks) * block_size
        self.seq_dim = seq_dim
        self.out = out

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        sm_scale: float | None = None,
        *,
        cu_seqlen_k: torch.Tensor | None = None,
        cu_seqlen_q: torch.Tensor | None = None,
        left_paddings: torch.Tensor | None = None,
        seqlens: torch.Tensor | None = None,
        return_lse: bool = False,
        split_qkv: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of a batch: equally long sequences, packed ones, or padded ones.

        The queries of a sequence are its last tokens; the keys before them are a past. (If not causal, see
        `causal` above.)

        Args:
            q, k, v: [batch, tokens, heads, head_size], or [batch, heads, tokens, head_size] with seq_dim 2,
                or packed, [tokens, heads, head_size]. GQA: k and v may have fewer heads. Without v,
                `split_qkv` makes k and v of k; without k and v, all three of q.
            sm_scale: factor on the logits; None for head_size ** -0.5.
            cu_seqlen_k: [sequences + 1], where each packed sequence's keys start, and the total; needed for
                packed inputs.
            cu_seqlen_q: the same for queries. Without it every sequence has one query when q has as many
                tokens as there are sequences, and otherwise as many as it has keys.
            left_paddings: [batch], tokens before each sequence in 4-D inputs. A sequence's blocks are counted
                from its first token.
            seqlens: [batch], real tokens of each sequence in 4-D inputs; without it all after the left
                padding. With either of the two q has as many tokens as k, or one: the sequence's last.
            return_lse: whether to return the log-sum-exp as well.
            split_qkv: takes packed inputs apart.

        Returns:
            As q; zeros for padding. With `return_lse` also float32 [batch, heads, tokens], or [heads, tokens]
            for packed inputs: the natural log-sum-exp of the scaled logits, -inf for padding.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value; the message names it.
            NotImplementedError: a gradient of a gradient is asked for, which no kernel computes.
        """
        q, k, v = _split(q, k, v, split_qkv)
        is_packed = q.dim() == 3
        if is_packed:
            _refuse(q, "4 dimensions", left_paddings=left_paddings, seqlens=seqlens)
        else:
            _refuse(q, "3 dimensions", cu_seqlen_q=cu_seqlen_q, cu_seqlen_k=cu_seqlen_k)
        q, k, v = self._tokens_first(q), self._tokens_first(k), self._tokens_first(v)
        check_shapes(q, k, v)
        num_queries, num_keys = q.shape[1], k.shape[1]
        out = None if self.out is None else self._tokens_first(self.out)
        spans: Spans = None
        if is_packed:
            spans = _packed_spans(num_queries, num_keys, cu_seqlen_q, cu_seqlen_k, self.mask.is_causal)
        elif left_paddings is not None or seqlens is not None:
            spans = read_padded(left_paddings, seqlens, q.shape[0], num_queries, num_keys)
            if out is not None:
                out.zero_()
        # Lengths that an operator reads are not known here.
        num_tokens = num_keys if spans is None else longest(spans) if isinstance(spans, tuple) else 0
        if num_tokens > self.mask.max_tokens:
            raise ValueError(f"k: a sequence of {num_tokens} tokens, expected at most {self.mask.max_tokens}")
        pattern = self._pattern_for(q.shape[2], k.shape[2])
        out, lse = attend(q, k, v, pattern, spans, scale=sm_scale, out=out, return_lse=return_lse)
        if is_packed:
            out, lse = out[0], None if lse is None else lse[0]
        elif self.seq_dim == 2:
            out = out.transpose(1, 2)
        return out if lse is None else (out, lse)

    def _pattern_for(self, num_heads: int, num_kv_heads: int) -> S2Pattern | BlockMask:
        """The S2 pattern, for which there are faster kernels, where it is one and for these heads."""
        heads = (num_heads, num_kv_heads)
        if self.pattern and (self.pattern.num_heads, self.pattern.num_kv_heads) == heads:
            return self.pattern
        return self.mask

    def _tokens_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [batch, tokens, heads, head_size] of an input, in any of the layouts of `forward`."""
        if tensor.dim() == 3:
            return tensor[None]
        return tensor.transpose(1, 2) if self.seq_dim == 2 else tensor


class LocalStrideSparseAttention(SparseAttention):
    """Attention with the local-stride pattern of S2-Attention (arXiv 2407.17678, section 3)."""

    def __init__(
        self,
        num_heads: int,
        max_seq_len: int,
        block_size: int,
        local_blocks: int,
        vert_stride: int,
        *,
        homo_head: bool = False,
        num_dense_heads: int = 0,
        num_kv_heads: int | None = None,
        active_head_range: tuple[int, int] | None = None,
        head_sliding_offset: int = 0,
        block_m: int | None = None,
        block_n: int | None = None,
        causal: bool = True,
        seq_dim: int | None = None,
        out: torch.Tensor | None = None,
        d_splits: int | None = None,
        inference: bool | None = None,
    ) -> None:
        """Make the module for one pattern; modules with the same pattern share its mask.

        KV head h attends to every older block j with (j + h * step + head_sliding_offset) mod vert_stride
        == 0, step = max(1, vert_stride // num_heads): the query heads decide the step, as in
        `S2Pattern.build`. If not causal, a query block attends to those nearer than `local_blocks` on either
        side and to one in `vert_stride` of the others, counted from that window's edges, in every head: see
        `get_sparse_attn_mask`.

        Args:
            num_heads: query heads.
            max_seq_len: the longest sequence; rounded up to a multiple of 64 and of every block size.
            block_size: tokens per block, a power of two of at least 16.
            local_blocks: blocks of the local window, the query's own included.
            vert_stride: each head attends to one older block in every so many.
            homo_head: give every head the first one's pattern.
            num_dense_heads: KV heads, the last ones, that attend to everything; 0 with `homo_head`.
            num_kv_heads: KV heads; the query heads of each share a pattern. None for `num_heads`.
            active_head_range: first query head, and the one after the last, of this rank's inputs; ignored
                with `homo_head`.
            head_sliding_offset: shift of the first head's blocks.
            block_m, block_n, causal, seq_dim, out, d_splits, inference: as in `SparseAttention`.

        Raises:
            ValueError: an argument has a wrong value; the message names it.
        """
        _check_sizes(block_size, block_m, block_n)
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len: {max_seq_len}, expected a positive integer")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        if homo_head and num_dense_heads:
            raise ValueError(f"num_dense_heads: {num_dense_heads}, expected 0 with homo_head")
        multiple = max(block_size, block_m or 1, block_n or 1, _MIN_SEQ_MULTIPLE)
        max_seq_len = -(-max_seq_len // multiple) * multiple
        head_range = None if homo_head or active_head_range is None else tuple(active_head_range)
        make_mask = _local_stride if causal else _local_stride_both_ways
        mask, pattern = make_mask(
            num_heads,
            num_kv_heads,
            max_seq_len // block_size,
            block_size,
            local_blocks,
            vert_stride,
            homo_head,
            num_dense_heads,
            head_sliding_offset,
            head_range,
        )
        super().__init__(
            block_size,
            mask,
            causal=causal,
            seq_dim=seq_dim,
            block_m=block_m,
            block_n=block_n,
            out=out,
            d_splits=d_splits,
            inference=inference,
        )
        self.pattern = pattern
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.local_blocks = local_blocks
        self.vert_stride = vert_stride
        self.homo_head = homo_head
        self.num_dense_heads = num_dense_heads


def _check_sizes(block_size: int, block_m: int | None, block_n: int | None) -> None:
    for name, size in (("block_size", block_size), ("block_m", block_m), ("block_n", block_n)):
        if size is not None and (size < _MIN_BLOCK_SIZE or size & (size - 1)):
            raise ValueError(f"{name}: {size}, expected a power of two of at least {_MIN_BLOCK_SIZE}")


def _block_mask(sparse_pattern: torch.Tensor | BlockMask, block_size: int, causal: bool) -> BlockMask:
    if isinstance(sparse_pattern, BlockMask):
        if sparse_pattern.block_size != block_size:
            raise ValueError(
                f"block_size: {block_size}, expected {sparse_pattern.block_size} as in sparse_pattern"
            )
        if sparse_pattern.is_causal != causal:
            raise ValueError(f"causal: {causal}, expected {sparse_pattern.is_causal} as in sparse_pattern")
        return sparse_pattern
    if sparse_pattern.dim() not in (2, 3) or (causal and sparse_pattern.shape[-2] > sparse_pattern.shape[-1]):
        expected = "[query blocks, key blocks] or [heads, query blocks, key blocks]"
        if causal:
            expected += ", with at most as many query blocks as key blocks"
        raise ValueError(f"sparse_pattern: shape {tuple(sparse_pattern.shape)}, expected {expected}")
    per_head = sparse_pattern[None] if sparse_pattern.dim() == 2 else sparse_pattern
    return BlockMask.from_dense(per_head != 0, block_size, causal=causal)


@lru_cache(maxsize=16)
def _local_stride(
    num_heads: int,
    num_kv_heads: int,
    num_blocks: int,
    block_size: int,
    local_blocks: int,
    vert_stride: int,
    homo_head: bool,
    num_dense_heads: int,
    head_sliding_offset: int,
    head_range: tuple[int, ...] | None,
) -> tuple[BlockMask, S2Pattern | None]:
    """One mask for all heads with `homo_head`, else one for each query head in `head_range`; and the heads'
    S2 pattern, unless the range cuts the query heads of a KV head apart.
    """
    first, end = _check_head_range(num_heads, num_kv_heads, head_range)
    if not 0 <= num_dense_heads <= num_kv_heads:
        raise ValueError(f"num_dense_heads: {num_dense_heads}, expected a value in [0, {num_kv_heads}]")
    of_all_heads = S2Pattern.build(
        num_heads,
        num_kv_heads,
        block_size=block_size,
        local_blocks=local_blocks,
        vert_stride=vert_stride,
        homo_head=homo_head,
        head_sliding_offset=head_sliding_offset,
        full_heads=range(num_kv_heads - num_dense_heads, num_kv_heads),
    )
    heads = range(1) if homo_head else range(first, end)
    mask = BlockMask.from_pattern(of_all_heads, num_blocks).select(heads)
    group = num_heads // num_kv_heads
    pattern = None if first % group or end % group else of_all_heads.of_heads(first, end)
    return mask, pattern


@lru_cache(maxsize=16)
def _local_stride_both_ways(
    num_heads: int,
    num_kv_heads: int,
    num_blocks: int,
    block_size: int,
    local_blocks: int,
    vert_stride: int,
    homo_head: bool,
    num_dense_heads: int,
    head_sliding_offset: int,
    head_range: tuple[int, ...] | None,
) -> tuple[BlockMask, None]:
    """The mask of attention that is not causal: one for all heads, or for each query head in `head_range`."""
    first, end = _check_head_range(num_heads, num_kv_heads, head_range)
    _, dense, _ = get_sparse_attn_mask(
        num_heads,
        num_blocks * block_size,
        block_size,
        local_blocks,
        vert_stride,
        homo_head=homo_head,
        num_kv_heads=num_kv_heads,
        num_dense_heads=num_dense_heads,
        head_sliding_offset=head_sliding_offset,
        dtype=torch.bool,
        device="cpu",
        causal=False,
    )
    if len(dense) > 1:
        dense = dense[first:end]
    return BlockMask.from_dense(dense, block_size, causal=False), None


def _check_head_range(
    num_heads: int, num_kv_heads: int, head_range: tuple[int, ...] | None
) -> tuple[int, int]:
    """The first of the query heads, and the one after the last."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads}, expected a divisor of num_heads ({num_heads})")
    head_range = head_range or (0, num_heads)
    first, end = head_range[0], head_range[-1]
    if len(head_range) != 2 or not 0 <= first < end <= num_heads:
        raise ValueError(f"active_head_range: {head_range}, expected a part of [0, {num_heads})")
    return first, end


def _split(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    split_qkv: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if k is not None and v is not None:
        return q, k, v
    if v is not None:
        raise ValueError("k: None, expected keys with v")
    if split_qkv is None:
        raise ValueError("split_qkv: None, expected a function that takes packed inputs apart, without v")
    if k is None:
        q, k, v = split_qkv(q)
    else:
        k, v = split_qkv(k)
    return q, k, v


def _refuse(q: torch.Tensor, expected: str, **arguments: torch.Tensor | None) -> None:
    """Raise ValueError when an argument is given that goes with another layout of q."""
    for name, argument in arguments.items():
        if argument is not None:
            raise ValueError(f"q: shape {tuple(q.shape)}, expected {expected} with {name}")


def _packed_spans(
    num_queries: int,
    num_keys: int,
    cu_seqlen_q: torch.Tensor | None,
    cu_seqlen_k: torch.Tensor | None,
    causal: bool,
) -> Spans:
    """Spans of packed inputs; without `cu_seqlen_q`, of one query per sequence or of all tokens."""
    if cu_seqlen_k is None:
        raise ValueError("cu_seqlen_k: None, expected where each sequence of the packed k starts")
    num_sequences = cu_seqlen_k.shape[0] - 1
    if cu_seqlen_q is None:
        if num_queries == num_sequences:
            cu_seqlen_q = torch.arange(num_sequences + 1)
        elif num_queries == num_keys:
            cu_seqlen_q = cu_seqlen_k
        else:
            raise ValueError(
                f"cu_seqlen_q: None, expected where each sequence's queries start: {num_queries} queries are "
                f"neither one for each of {num_sequences} sequences nor as many as keys ({num_keys})"
            )
    return read_packed(cu_seqlen_q, cu_seqlen_k, num_queries, num_keys, causal)
