"""Block masks against their definitions, written out block by block."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from dataclasses import replace

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
from tests.programs import run_python

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
    assert torch.equal(dense_heads(3, BLOCKS, 1, num_kv_heads=1), torch.ones(3, BLOCKS, BLOCKS).tril().bool())
    assert not dense_heads(4, BLOCKS, 0, num_kv_heads=2).any()


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


@pytest.mark.parametrize(("heads", "stride", "step"), [(3, 7, 2), (8, 4, 1), (2, 4, 2)], ids=str)
def test_default_step(heads: int, stride: int, step: int) -> None:
    ranges = ((1, 1), (None, stride))
    expected = range_strides(heads, BLOCKS, ranges, head_sliding_step=step)
    assert torch.equal(range_strides(heads, BLOCKS, ranges), expected)


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
    assert torch.equal(mask.to_dense(BLOCKS), dense)
    assert torch.equal(mask.to_dense(5), dense[:, :5, :5])
    assert torch.equal(mask.select([2, 0, 2]).to_dense(), dense[[2, 0, 2]])


def test_csr_counts_in_64_bits_where_there_are_too_many_block_pairs() -> None:
    no_lists = torch.empty(0, dtype=torch.int32)
    for pairs, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64)):
        runs = torch.tensor([[[[0, 0], [0, pairs]]]])
        crow = BlockMask(16, pairs, no_lists, runs, (0,), is_causal=False, first_row=0).crow
        assert crow.dtype == dtype
        assert crow.tolist() == [[0, pairs]]


@pytest.mark.parametrize(("rows", "columns"), [(4, BLOCKS), (BLOCKS, BLOCKS), (1, 1)], ids=str)
def test_a_causal_mask_may_know_the_last_rows_only(rows: int, columns: int) -> None:
    dense = random_causal_mask(2, columns, 0.5)[:, columns - rows :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = BlockMask.from_dense(dense, 16)
    assert (mask.num_query_blocks, mask.num_blocks, mask.first_row) == (columns, columns, columns - rows)
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.dense_rows(columns - 1, columns), dense[:, -1:])
    assert not mask.dense_rows(0, columns - rows).any()
    assert mask.crow.shape == (2, rows + 1)
    assert torch.equal(mask.select([1]).to_dense(), dense[1:])


def test_a_causal_mask_may_know_no_row() -> None:
    mask = BlockMask.from_dense(torch.zeros(2, 0, 3, dtype=torch.bool), 16)
    assert (mask.num_query_blocks, mask.first_row) == (3, 3)
    assert mask.to_dense().shape == (2, 0, 3)


@pytest.mark.parametrize(("rows", "columns"), [(4, BLOCKS), (BLOCKS, 4), (0, 3)], ids=str)
def test_a_mask_that_is_not_causal(rows: int, columns: int) -> None:
    dense = torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = BlockMask.from_dense(dense, 16, causal=False)
    assert (mask.num_query_blocks, mask.num_blocks, mask.first_row) == (rows, columns, 0)
    assert not mask.is_causal
    assert torch.equal(mask.to_dense(), dense)
    for head in range(3):
        of_head = torch.cat([dense[head, i].nonzero().flatten() for i in range(rows)] or [torch.empty(0)])
        assert mask.col[head, : mask.crow[head, -1]].tolist() == of_head.tolist()


def test_heads_of_several_masks() -> None:
    pattern = S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=3)
    s2, window = BlockMask.from_pattern(pattern, BLOCKS), BlockMask.from_dense(local_window(BLOCKS, 3), 16)
    both = BlockMask.of_heads([s2, window, s2])
    expected = torch.cat([s2.to_dense(), window.to_dense(), s2.to_dense()])
    assert torch.equal(both.to_dense(), expected)
    assert torch.equal(both.select([8, 4, 0]).to_dense(), expected[[8, 4, 0]])
    assert torch.equal(BlockMask.of_heads([s2]).to_dense(), s2.to_dense())
    for other in (
        BlockMask.from_pattern(pattern, BLOCKS + 1),
        BlockMask.from_dense(local_window(BLOCKS, 3), 32),
        BlockMask.from_dense(local_window(BLOCKS, 3), 16, causal=False),
    ):
        with pytest.raises(ValueError, match=r"^masks: "):
            BlockMask.of_heads([s2, other])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(("first", "count", "keys"), [(0, 77, 77), (50, 1, 60), (64, 40, 104)], ids=str)
def test_token_mask(first: int, count: int, keys: int, causal: bool) -> None:
    dense = random_causal_mask(2, 7, 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = BlockMask.from_dense(dense, 16, causal=causal).token_mask(first, count, keys)
    assert mask.shape == (2, count, keys)
    for row in range(count):
        for key in range(keys):
            visible = dense[:, (first + row) // 16, key // 16] & (not causal or key <= first + row)
            assert torch.equal(mask[:, row, key], visible)


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


@pytest.mark.parametrize("num_sinks", [0, 1, 3])
@pytest.mark.parametrize("vert_stride", [None, 2, 5], ids=["streaming", "stride2", "stride5"])
def test_masks_of_kinds_of_heads(vert_stride: int | None, num_sinks: int) -> None:
    """Two query heads of each KV head, of which one is full."""
    pattern = S2Pattern.build(
        6, 3, local_blocks=2, vert_stride=vert_stride, sink_blocks=num_sinks, full_heads=[1]
    )
    dense = BlockMask.from_pattern(pattern, BLOCKS).to_dense()
    assert torch.equal(dense, pattern.block_mask(BLOCKS))
    assert torch.equal(dense[2:4], torch.ones(2, BLOCKS, BLOCKS).tril().bool())
    assert not dense[4:].tril(-2).all()


def test_pattern_mask_is_made_once_for_lengths_that_differ_little() -> None:
    pattern = S2Pattern.build(2, 2, block_size=16, local_blocks=2)
    masks = [pattern_block_mask(pattern, tokens) for tokens in (129, 200, 256)]
    assert masks[0] is masks[1] is masks[2]
    assert masks[0].max_tokens == 256
    assert pattern_block_mask(pattern, 257).max_tokens == 512
    assert pattern_block_mask(pattern, 0).max_tokens == 16
    assert pattern_block_mask(replace(pattern, block_size=1), 1).max_tokens == 1


def peak_mebibytes(program: str) -> float:
    """What a program's memory grows by while it runs, after it has imported torch and the masks."""
    start = """
import resource
import torch
from s2_kernels.attention import s2_attention
from s2_kernels.contiguous.visits import merge_rows
from s2_kernels.masks import *
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
"""
    printed = run_python("-c", f"{start}{program}\nprint(peak() - before)", without="TRITON_INTERPRET")
    return float(printed)


def test_a_million_tokens_of_a_pattern_fit_a_small_machine() -> None:
    """268 million block pairs for each residue. The mask, the kernel's table, and attention on the CPU."""
    program = """
pattern = S2Pattern.build(8, 2, block_size=16, local_blocks=64, pattern_heads="query")
merge_rows(pattern_block_mask(pattern, 1 << 20), 4, 4, torch.device("cpu"))
two_heads = S2Pattern.build(2, 1, block_size=16, local_blocks=64, pattern_heads="query")
q, k = torch.ones(1, 3, 2, 4), torch.ones(1, 1 << 20, 1, 4)
out = s2_attention(q, k, k, two_heads)
torch.testing.assert_close(out, q, atol=1e-2, rtol=0)
"""
    assert peak_mebibytes(program) < 1024


def test_a_dense_mask_is_not_copied_to_a_wider_type() -> None:
    """64 MiB of block pairs: a few of them while the mask is made, and its sparse form."""
    program = """
mask = S2Pattern.build(1, 1, block_size=16, local_blocks=2).block_mask(8192)
BlockMask.from_dense(mask | local_window(8192, 3) | sink_blocks(8192, 1), 16)
"""
    assert peak_mebibytes(program) < 450


def test_a_long_mask_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found in parts of three rows is what is found at once."""
    monkeypatch.setattr("s2_kernels.masks._CHUNK", 3 * BLOCKS)
    dense = random_causal_mask(2, BLOCKS, 0.4)
    dense[0] = torch.ones(BLOCKS, BLOCKS).tril()
    first = returning_blocks(dense[1], 0)[0]
    with pytest.warns(UserWarning, match=f"key block {first} leaves the set of head 1 and returns"):
        mask = BlockMask.from_dense(dense, 16)
    assert torch.equal(mask.to_dense(), dense)
    later = local_window(BLOCKS, 2).clone()
    later[0, 10, 12] = True
    with pytest.raises(
        ValueError, match=r"^mask: query block 10 of head 0 attends to the later key block 12"
    ):
        BlockMask.from_dense(later, 16)


def returning_blocks(mask: torch.Tensor, first_row: int) -> list[int]:
    """The key blocks of a head's mask, of query blocks from `first_row` on, that leave its set and return."""
    returning = []
    for j in range(mask.shape[1]):
        known = mask[max(0, j - first_row) :, j].tolist()
        if False in known and True in known[known.index(False) :]:
            returning.append(j)
    return returning


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 3, BLOCKS])
def test_the_first_block_that_returns_is_named(rows: int, seed: int) -> None:
    dense = random_causal_mask(2, BLOCKS, 0.8, seed)[:, BLOCKS - rows :]
    dense[0] = local_window(BLOCKS, 3)[0, BLOCKS - rows :]
    returning = returning_blocks(dense[1], BLOCKS - rows)
    assert bool(returning) == (rows > 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BlockMask.from_dense(dense, 16)
    named = [f"key block {block} leaves the set of head 1 and returns" for block in returning[:1]]
    assert [name in str(warning.message) for name, warning in zip(named, caught, strict=True)] == [
        True
    ] * len(named)
    assert all(warning.filename == __file__ for warning in caught)


def test_csr_form_makes_the_same_mask() -> None:
    """Any kind of mask, and the rows of several heads of different lengths."""
    for dense, causal in (
        (random_causal_mask(3, BLOCKS, 0.4), True),
        (random_causal_mask(3, BLOCKS, 0.4)[:, 9:], True),
        (torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(0)) < 0.5, False),
        (torch.zeros(2, 0, 7, dtype=torch.bool), False),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = BlockMask.from_dense(dense, 16, causal=causal)
            again = BlockMask.from_csr(mask.crow, mask.col, 16, num_blocks=dense.shape[2], causal=causal)
        assert torch.equal(again.to_dense(), dense)
        assert (again.is_causal, again.first_row) == (mask.is_causal, mask.first_row)
    with pytest.warns(UserWarning, match="key block 0 leaves the set of head 0 and returns"):
        BlockMask.from_csr(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0]]), 16)


def test_wrong_csr_forms_are_named() -> None:
    def make(crow: list[list[int]], col: list[list[int]], **arguments: int) -> BlockMask:
        return BlockMask.from_csr(torch.tensor(crow), torch.tensor(col), 16, **arguments)

    with pytest.raises(ValueError, match=r"^crow: shape \(1, 3\), expected .* for col's shape \(2, 1\)"):
        make([[0, 1, 1]], [[0], [0]])
    for crow, col in (([0], [[0]]), ([[0, 1]], [0]), ([[]], [[0]])):
        with pytest.raises(ValueError, match=r"^crow: shape .*, expected \[heads, query blocks \+ 1\] for"):
            BlockMask.from_csr(torch.tensor(crow), torch.tensor(col), 16)
    for crow in ([[1, 1]], [[0, 2]], [[0, 1, 0]], [[0, 1, 2]]):
        with pytest.raises(ValueError, match=r"^crow: \[\[.*, expected ascending values from 0 to 1"):
            make(crow, [[0]])
    wrong = r"^col: {} for query block 1 of head 1, expected ascending values in \[0, 2\)"
    for row, value in (([0, 1, 0], 0), ([0, 0, 0], 0), ([0, 0, 2], 2), ([0, -1, 1], -1)):
        with pytest.raises(ValueError, match=wrong.format(value)):
            make([[0, 1, 3], [0, 1, 3]], [[0, 0, 1], row])
    with pytest.raises(ValueError, match=r"^mask: query block 0 of head 0 attends to the later key block 1"):
        make([[0, 2, 3]], [[0, 1, 1]])
    with pytest.raises(
        ValueError, match=r"^crow: 2 query blocks, expected at most as many as key blocks \(1\)"
    ):
        make([[0, 1, 2]], [[0, 0]], num_blocks=1)


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
    expected = r"expected torch.bool \[heads, query blocks, at least as many key blocks\]"
    with pytest.raises(ValueError, match=rf"^mask: torch.bool \(1, 4, 3\), {expected}$"):
        BlockMask.from_dense(mask[..., :3], 16)
    assert BlockMask.from_dense(mask, 1).max_tokens == 4
    with pytest.raises(
        ValueError, match=r"^mask: torch.bool \(4, 3\), .* \[heads, query blocks, key blocks\]$"
    ):
        BlockMask.from_dense(mask[0, :, :3], 16, causal=False)
    later = mask.clone()
    later[0, 1, 3] = True
    with pytest.raises(ValueError, match=r"^mask: query block 1 of head 0 attends to the later key block 3"):
        BlockMask.from_dense(later, 16)
    with pytest.raises(ValueError, match=r"^num_kv_heads: 3"):
        dense_heads(4, 4, 1, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"^num_dense: 3"):
        dense_heads(4, 4, 3, num_kv_heads=2)
    for ranges in ((), ((0, 2),), ((4, 0),), ((None, 2), (2, 4)), ((4, 2), (None, 2), (2, 4))):
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
        again = mask.to_dense()
    assert torch.equal(again, dense)
    crow, col = mask.crow, mask.col
    with torch.device("meta"):
        mask = BlockMask.from_csr(crow, col, 16)
    assert torch.equal(mask.to_dense(), dense)
    assert whole.col.device.type == "cpu"


def test_a_handle_is_of_one_mask_while_it_lives() -> None:
    mask = BlockMask.from_dense(local_window(4, 2), 16)
    copies = [pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.select([0, 0])]
    for other in (mask, *copies):
        assert BlockMask.is_handle(other.handle)
        assert BlockMask.from_handle(other.handle) is other
    assert len({other.handle for other in (mask, *copies)}) == 4
    assert torch.equal(copies[0].to_dense(), mask.to_dense())
    assert "handle" not in repr(mask)
    handle = mask.handle
    del mask, other
    gc.collect()
    with pytest.raises(ValueError, match=r"^handle: ") as caught:
        BlockMask.from_handle(handle)
    assert str(caught.value) == f"handle: {handle!r}, expected that of a block mask which is still in use"
    assert not BlockMask.is_handle(S2Pattern.build(2, 1).handle)
