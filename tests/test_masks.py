"""Block masks against their definitions, written out block by block."""

from __future__ import annotations

import warnings

import pytest
import torch

from s2_kernels.masks import (
    BlockMask,
    dense_heads,
    local_window,
    pattern_block_mask,
    range_strides,
    sink_blocks,
)
from s2_kernels.pattern import S2Pattern
from tests.contiguous import random_causal_mask

BLOCKS = 13


def test_local_window() -> None:
    mask = local_window(BLOCKS, 3)
    assert mask.shape == (1, BLOCKS, BLOCKS)
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            assert mask[0, i, j] == (0 <= i - j < 3)


def test_sink_blocks() -> None:
    mask = sink_blocks(BLOCKS, 2)
    assert mask.shape == (1, BLOCKS, BLOCKS)
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            assert mask[0, i, j] == (j <= i and j < 2)


def test_dense_heads_are_those_of_the_last_kv_heads() -> None:
    mask = dense_heads(6, BLOCKS, 1, num_kv_heads=3)
    for head in range(6):
        expected = torch.ones(BLOCKS, BLOCKS).tril() if head >= 4 else torch.zeros(BLOCKS, BLOCKS)
        assert torch.equal(mask[head], expected.bool())
    assert torch.equal(dense_heads(3, BLOCKS, 2).any(dim=2).any(dim=1), torch.tensor([False, True, True]))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("step", "used"), [(None, 2), (1, 1), (0, 0)], ids=str)
def test_range_strides(step: int | None, used: int, offset: int) -> None:
    mask = range_strides(
        3, BLOCKS, ((3, 2), (4, 4), (None, 6)), head_sliding_step=step, head_sliding_offset=offset
    )
    for head in range(3):
        for i in range(BLOCKS):
            for j in range(BLOCKS):
                stride = 2 if i - j < 3 else 4 if i - j < 7 else 6
                assert mask[head, i, j] == (j <= i and (j + head * used + offset) % stride == 0)


def test_last_range_may_end() -> None:
    mask = range_strides(1, BLOCKS, ((2, 1), (4, 2)))
    assert mask[0, 12].nonzero().flatten().tolist() == [8, 10, 11, 12]


def test_csr_lists_the_key_blocks_of_every_row_and_comes_back() -> None:
    dense = random_causal_mask(3, BLOCKS, 0.4)
    dense[1] = False
    with pytest.warns(UserWarning, match="not KV-efficient"):
        mask = BlockMask.from_dense(dense, 16)
    assert mask.crow.dtype == mask.col.dtype == torch.int32
    assert (mask.num_heads, mask.num_blocks, mask.max_tokens) == (3, BLOCKS, 16 * BLOCKS)
    for head in range(3):
        for i in range(BLOCKS):
            row = mask.col[head, mask.crow[head, i] : mask.crow[head, i + 1]]
            assert row.tolist() == [j for j in range(BLOCKS) if dense[head, i, j]]
        assert (mask.col[head, mask.crow[head, -1] :] == -1).all()
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.to_dense(5), dense[:, :5, :5])
    assert torch.equal(mask.select([2, 0, 2]).to_dense(), dense[[2, 0, 2]])


@pytest.mark.parametrize(
    "pattern",
    [
        S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=3),
        S2Pattern.build(
            8, 2, block_size=32, local_blocks=3, vert_stride=8, head_sliding_offset=1, pattern_heads="query"
        ),
        S2Pattern.build(2, 1, block_size=16, local_blocks=1, vert_stride=1, homo_head=True),
    ],
    ids=["kv", "query", "homo"],
)
def test_pattern_in_csr_form(pattern: S2Pattern) -> None:
    mask = BlockMask.from_pattern(pattern, BLOCKS)
    assert mask.block_size == pattern.block_size
    assert torch.equal(mask.to_dense(), pattern.block_mask(BLOCKS))


def test_pattern_mask_is_made_once_for_lengths_that_differ_little() -> None:
    pattern = S2Pattern.build(2, 2, block_size=16, local_blocks=2)
    masks = [pattern_block_mask(pattern, tokens) for tokens in (129, 200, 256)]
    assert masks[0] is masks[1] is masks[2]
    assert masks[0].max_tokens == 256
    assert pattern_block_mask(pattern, 257).max_tokens == 512
    assert pattern_block_mask(pattern, 0).max_tokens == 16


def test_only_a_mask_whose_dropped_blocks_return_is_warned_of() -> None:
    window = local_window(BLOCKS, 2)
    pattern = S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (
            window | range_strides(2, BLOCKS, ((4, 2), (None, 4))),
            pattern.block_mask(BLOCKS) | sink_blocks(BLOCKS, 1) | dense_heads(2, BLOCKS, 1),
        ):
            BlockMask.from_dense(mask, 16)
    returning = window | range_strides(2, BLOCKS, ((4, 4), (None, 2)), head_sliding_step=0)
    with pytest.warns(UserWarning, match="key block 2 leaves the set of head 0 and returns"):
        BlockMask.from_dense(returning, 16)
    only_second = torch.cat([window, returning[1:]])
    with pytest.warns(UserWarning, match="set of head 1"):
        BlockMask.from_dense(only_second, 16)


def test_wrong_arguments_are_named() -> None:
    mask = local_window(4, 2)
    with pytest.raises(ValueError, match=r"^block_size: 24"):
        BlockMask.from_dense(mask, 24)
    with pytest.raises(ValueError, match=r"^mask: torch.float32"):
        BlockMask.from_dense(mask.float(), 16)
    with pytest.raises(ValueError, match=r"^mask: torch.bool \(1, 4, 3\)"):
        BlockMask.from_dense(mask[..., :3], 16)
    later = mask.clone()
    later[0, 1, 3] = True
    with pytest.raises(ValueError, match=r"^mask: query block 1 of head 0 attends to the later key block 3"):
        BlockMask.from_dense(later, 16)
    with pytest.raises(ValueError, match=r"^num_kv_heads: 3"):
        dense_heads(4, 4, 1, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"^num_dense: 3"):
        dense_heads(4, 4, 3, num_kv_heads=2)
    for ranges in ((), ((0, 2),), ((4, 0),), ((None, 2), (2, 4))):
        with pytest.raises(ValueError, match=r"^ranges: "):
            range_strides(2, 4, ranges)
    with pytest.raises(ValueError, match=r"^num_heads: 0"):
        range_strides(0, 4, ((None, 2),))
    with pytest.raises(ValueError, match=r"^num_blocks: 5, expected at most 4"):
        BlockMask.from_dense(mask, 16).to_dense(5)


def test_masks_are_on_the_cpu_whatever_the_default_device_is() -> None:
    pattern = S2Pattern.build(2, 1, block_size=16, local_blocks=3, vert_stride=5)
    with torch.device("meta"):
        dense = pattern.block_mask(8) | sink_blocks(8, 1) | dense_heads(2, 8, 1) | local_window(8, 2)
        dense |= range_strides(2, 8, ((2, 2), (None, 4)))
        mask, whole = BlockMask.from_dense(dense, 16), pattern_block_mask(pattern, 200)
    assert torch.equal(mask.to_dense(), dense)
    assert whole.col.device.type == "cpu"
