"""The pattern against its definition, written out block by block."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from benchmarks.geometries import GEOMETRIES
from s2_kernels.config import S2Config
from s2_kernels.draw import draw_pattern
from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern, first_returning_block
from tests.contiguous import random_causal_mask

if TYPE_CHECKING:
    from pathlib import Path

REFERENCE = {name: geometry.pattern for name, geometry in GEOMETRIES.items()}
PATTERN = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "residues": (0, 3), "num_kv_heads": 2}


@st.composite
def build_arguments(draw: st.DrawFn) -> dict[str, Any]:
    num_kv_heads = draw(st.integers(1, 6))
    vert_stride = draw(st.integers(1, 9))
    pattern_heads = draw(st.sampled_from(["kv", "query"]))
    group = draw(st.integers(1, min(5, vert_stride) if pattern_heads == "query" else 5))
    return {
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "block_size": draw(st.sampled_from([1, 4, 64])),
        "local_blocks": draw(st.integers(1, 6)),
        "vert_stride": vert_stride,
        "homo_head": draw(st.booleans()),
        "head_sliding_step": draw(st.none() | st.integers(0, 11)),
        "head_sliding_offset": draw(st.integers(-9, 20)),
        "pattern_heads": pattern_heads,
    }


def defined_to_attend(arguments: dict[str, Any], head: int, i: int, j: int) -> bool:
    """The definition, from the parameters as a model's configuration gives them."""
    heads = arguments["num_heads"] if arguments["pattern_heads"] == "query" else arguments["num_kv_heads"]
    step = arguments["head_sliding_step"]
    step = max(1, arguments["vert_stride"] // arguments["num_heads"]) if step is None else step
    step = 0 if arguments["homo_head"] else step
    pattern_head = head * heads // arguments["num_heads"]
    shifted = j + pattern_head * step + arguments["head_sliding_offset"]
    return j <= i and (i - j < arguments["local_blocks"] or shifted % arguments["vert_stride"] == 0)


@given(build_arguments())
def test_build_follows_the_definition(arguments: dict[str, Any]) -> None:
    pattern = S2Pattern.build(**arguments)
    blocks = 20
    expected = torch.tensor(
        [
            [[defined_to_attend(arguments, h, i, j) for j in range(blocks)] for i in range(blocks)]
            for h in range(arguments["num_heads"])
        ]
    )
    assert torch.equal(pattern.block_mask(blocks), expected)
    attends = [
        [[pattern.attends(h, i, j) for j in range(blocks)] for i in range(blocks)]
        for h in range(pattern.num_heads)
    ]
    assert torch.equal(torch.tensor(attends), expected)


def strided_blocks_of_dkernel(
    num_heads: int, num_kv_heads: int, vert_stride: int, offset: int, homo_head: bool
) -> list[list[int]]:
    """The first strided block of every query head, in a list of its own, by DKernel's `get_sparse_attn_mask`.

    It repeats the row of a KV head for its query heads, but takes the step from the number of query heads;
    with `homo_head` it knows one head.
    """
    step = max(1, int(vert_stride / num_heads))
    rows = []
    for query_head in range(num_heads):
        h = 0 if homo_head else query_head // (num_heads // num_kv_heads)
        rows.append([j for j in range(vert_stride) if (j + h * step + offset) % vert_stride == 0])
    return rows


@given(
    num_kv_heads=st.integers(1, 40),
    group=st.integers(1, 12),
    vert_stride=st.integers(1, 70),
    offset=st.integers(0, 90),
    homo_head=st.booleans(),
)
@example(num_kv_heads=2, group=3, vert_stride=5, offset=0, homo_head=False)
@example(num_kv_heads=8, group=4, vert_stride=16, offset=0, homo_head=False)
@example(num_kv_heads=2, group=2, vert_stride=9, offset=3, homo_head=True)
def test_defaults_are_dkernels(
    num_kv_heads: int, group: int, vert_stride: int, offset: int, homo_head: bool
) -> None:
    num_heads = num_kv_heads * group
    by_kv_head = S2Config(16, vert_stride, homo_head=homo_head, head_sliding_offset=offset)
    expected = strided_blocks_of_dkernel(num_heads, num_kv_heads, vert_stride, offset, homo_head)
    assert [[r] for r in by_kv_head.pattern(num_heads, num_kv_heads).residues] == expected
    # DKernel has no query heads with patterns of their own but those of a model without grouped queries.
    assume(homo_head or group <= vert_stride)
    by_query_head = replace(by_kv_head, pattern_heads="query")
    expected = strided_blocks_of_dkernel(num_heads, num_heads, vert_stride, offset, homo_head)
    assert [[r] for r in by_query_head.pattern(num_heads, num_kv_heads).residues] == expected


@pytest.mark.parametrize(
    ("name", "residues"),
    [
        ("phi3-small", [7, 6, 5, 4, 3, 2, 1, 0] * 4),
        ("hhst-8b", [r for r in (0, 7, 6, 5, 4, 3, 2, 1) for _ in range(4)]),
        ("s2-1.3b", [0, 7, 6, 5, 4, 3, 2, 1] * 2),
        ("s2-7b", [0, *range(15, 0, -1)] * 2),
        ("s2-70b", [0, *range(31, 0, -1)] * 2),
    ],
)
def test_residues_of_the_reference_geometries(name: str, residues: list[int]) -> None:
    assert REFERENCE[name].residues == tuple(residues)


@given(build_arguments())
def test_residues_that_a_kv_head_keeps_are_those_of_its_query_heads(arguments: dict[str, Any]) -> None:
    pattern = S2Pattern.build(**arguments)
    group = arguments["num_heads"] // arguments["num_kv_heads"]
    for head in range(pattern.num_heads):
        kept = pattern.kept_residues[head // group]
        assert len(kept) == pattern.num_kept
        assert kept[pattern.residue_ranks[head]] == pattern.residues[head]
    if arguments["pattern_heads"] == "kv":
        assert pattern.num_kept == 1


@given(build_arguments())
def test_dropped_blocks_never_return(arguments: dict[str, Any]) -> None:
    assert first_returning_block(S2Pattern.build(**arguments).block_mask(30)) is None


@given(build_arguments())
def test_union_completeness_is_what_the_oldest_blocks_say(arguments: dict[str, Any]) -> None:
    pattern = S2Pattern.build(**arguments)
    old = pattern.block_mask(40)[:, -1, : 40 - pattern.local_blocks]
    assert pattern.is_union_complete == bool(old.any(dim=0).all())


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ({"vert_stride": 8}, 1),
        ({"vert_stride": 8, "pattern_heads": "query", "sink_blocks": 1}, 2),
        ({"vert_stride": 8, "full_heads": [0, 1]}, 0),
        ({"vert_stride": 8, "pattern_heads": "query", "full_heads": [1]}, 2),
        ({"vert_stride": None}, 0),
    ],
    ids=["kv", "query", "full", "one-full", "streaming"],
)
def test_residues_of_strided_heads(arguments: dict[str, Any], most: int) -> None:
    assert S2Pattern.build(4, 2, **arguments).most_strided == most


def test_phi3_small_residues() -> None:
    pattern = REFERENCE["phi3-small"]
    assert pattern.residues == tuple(-(h + 1) % 8 for h in range(32))
    assert pattern.num_kept == 4
    assert pattern.kept_residues == ((4, 5, 6, 7), (0, 1, 2, 3)) * 4


@st.composite
def kinds_of_heads(draw: st.DrawFn) -> dict[str, Any]:
    """`build_arguments` with sinks, and full heads beside strided or streaming ones."""
    arguments = draw(build_arguments())
    if draw(st.booleans()):
        arguments["vert_stride"], arguments["pattern_heads"] = None, "kv"
    heads = st.lists(st.integers(0, arguments["num_kv_heads"] - 1), unique=True)
    return arguments | {"sink_blocks": draw(st.integers(0, 3)), "full_heads": draw(heads)}


def attends_by_kind(arguments: dict[str, Any], head: int, i: int, j: int) -> bool:
    """The definition again, with the kinds."""
    is_full = head * arguments["num_kv_heads"] // arguments["num_heads"] in arguments["full_heads"]
    if j <= i and (is_full or j < arguments["sink_blocks"]):
        return True
    if arguments["vert_stride"] is None:
        return 0 <= i - j < arguments["local_blocks"]
    return defined_to_attend(arguments, head, i, j)


@given(kinds_of_heads())
def test_kinds_follow_the_definition(arguments: dict[str, Any]) -> None:
    pattern = S2Pattern.build(**arguments)
    blocks = range(17)
    expected = torch.tensor(
        [
            [[attends_by_kind(arguments, h, i, j) for j in blocks] for i in blocks]
            for h in range(pattern.num_heads)
        ]
    )
    assert torch.equal(pattern.block_mask(17), expected)
    found = [[[pattern.attends(h, i, j) for j in blocks] for i in blocks] for h in range(pattern.num_heads)]
    assert torch.equal(torch.tensor(found), expected)
    assert first_returning_block(expected) is None
    assert S2Pattern.from_handle(pattern.handle) == pattern
    plain = not arguments["sink_blocks"] and not arguments["full_heads"] and arguments["vert_stride"]
    assert (pattern.kinds is None) == bool(plain)


@given(kinds_of_heads(), st.integers(1, 16), st.integers(0, 15))
def test_what_kinds_store_and_attend_to(arguments: dict[str, Any], blocks: int, rest: int) -> None:
    """What a later query needs: window and sinks of all heads, a set of its own of each KV head."""
    pattern = S2Pattern.build(**arguments | {"block_size": 16})
    length = 16 * blocks + rest
    window, strided = pattern.stored_tokens(length)
    oldest = length // 16 - pattern.local_blocks + 1
    tokens = range(length)
    assert window == sum(t // 16 >= oldest or t // 16 < pattern.sink_blocks for t in tokens)
    group = pattern.group_size
    kept = [
        set(range(pattern.vert_stride))
        if head in arguments["full_heads"]
        else set(pattern.residues[head * group : (head + 1) * group]) - {-1}
        for head in range(pattern.num_kv_heads)
    ]
    assert pattern.kept_residues == tuple(map(tuple, map(sorted, kept)))
    for head, residue in enumerate(pattern.residues):
        rank = -1 if residue == -1 else sorted(kept[head // group]).index(residue)
        assert pattern.residue_ranks[head] == rank
    old = pattern.block_mask(40 + pattern.local_blocks)[:, -1, pattern.sink_blocks : 40]
    assert pattern.is_union_complete == bool(old.any(dim=0).all())
    assert strided * pattern.num_kv_heads == sum(
        t // 16 % pattern.vert_stride in of_head for of_head in kept for t in tokens
    )
    attended = pattern.block_mask(blocks).sum() - blocks * pattern.num_heads / 2
    fraction = pattern.attended_fraction(16 * blocks)
    assert fraction == pytest.approx(float(attended) / (pattern.num_heads * blocks**2 / 2))


@given(kinds_of_heads(), st.sampled_from([1, 2, 3, 4, 6]))
def test_shards_keep_their_kinds(arguments: dict[str, Any], size: int) -> None:
    pattern = S2Pattern.build(**arguments)
    assume(pattern.num_heads % size == 0)
    assume(pattern.num_kv_heads % size == 0 or size % pattern.num_kv_heads == 0)
    shards = [pattern.shard(rank, size).block_mask(12) for rank in range(size)]
    assert torch.equal(torch.cat(shards), pattern.block_mask(12))


def test_virtual_heads_are_the_kept_residues_of_one_head_after_the_other() -> None:
    pattern = S2Pattern(64, 1, 3, (-1, -1, 1, -1), 4, full_heads=(0,))
    assert pattern.kept_residues == ((0, 1, 2), (), (1,), ())
    assert pattern.num_virtual_heads == 4
    assert pattern.first_virtual_heads == (0, 3, 3, 4)


def test_a_rank_may_have_no_strided_set() -> None:
    pattern = S2Pattern.build(4, 4, vert_stride=3, sink_blocks=1, full_heads=[2, 3])
    assert pattern.shard(1, 2) == S2Pattern(64, 16, 1, (-1, -1), 2, 1, (0, 1))
    assert pattern.shard(0, 2) == S2Pattern(64, 16, 3, (0, 2), 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sink_blocks": -1}, "sink_blocks: -1, expected a number of at least 0"),
        ({"full_heads": (2,)}, r"full_heads: \(2,\), expected KV heads from 0 to 1"),
        ({"full_heads": (0, 0)}, r"full_heads: \(0, 0\), expected every head once, in ascending order"),
        ({"full_heads": (0,)}, r"residues: some of the full heads \[0\], expected -1 for them"),
        ({"residues": (-1, -1)}, "vert_stride: 4, expected 1 where no head has a strided set"),
    ],
    ids=["sinks", "range", "twice", "strided", "stride"],
)
def test_errors_of_kinds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        S2Pattern(**PATTERN | arguments)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ({"sink_blocks": 1}, "sink_blocks: 1"),
        ({"full_heads": (0,), "residues": (-1, 3)}, "full_heads: (0,)"),
        ({"residues": (-1, 3)}, "residues: none of some heads"),
    ],
    ids=["sinks", "full", "streaming"],
)
def test_pages_are_of_strided_sets_alone(kind: dict[str, Any], found: str) -> None:
    expected = f"pattern: {found}, expected a strided set of every head and no more"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        TierLayout(S2Pattern(**PATTERN | kind), 64)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_geometries_are_union_complete(name: str) -> None:
    assert REFERENCE[name].is_union_complete


def test_heads_of_one_pattern_are_not_union_complete() -> None:
    assert not S2Pattern.build(8, 8, homo_head=True).is_union_complete


@pytest.mark.parametrize(
    ("name", "expected"),
    [("phi3-small", 0.51), ("hhst-8b", 0.13), ("s2-1.3b", 0.13), ("s2-7b", 0.07), ("s2-70b", 0.035)],
)
def test_stored_fraction_at_131072_tokens(name: str, expected: float) -> None:
    assert REFERENCE[name].stored_fraction(131072) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("length", [1, 63, 64, 500, 1024, 1087, 5000, 131072])
@pytest.mark.parametrize("name", REFERENCE)
def test_stored_tokens_are_those_that_a_later_query_needs(name: str, length: int) -> None:
    pattern = REFERENCE[name]
    block = torch.arange(length) // 64
    window = (length // 64 - block < pattern.local_blocks).sum().item()
    group = pattern.num_heads // pattern.num_kv_heads
    strided = 0
    for kv_head in range(pattern.num_kv_heads):
        residues = torch.tensor(pattern.residues[kv_head * group : (kv_head + 1) * group])
        strided += torch.isin(block % pattern.vert_stride, residues).sum().item()
    assert pattern.stored_tokens(length) == pytest.approx((window, strided / pattern.num_kv_heads))
    assert pattern.stored_fraction(length) * length == pytest.approx(sum(pattern.stored_tokens(length)))


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("s2-1.3b", 7.6), ("phi3-small", 7.2), ("hhst-8b", 7.2), ("s2-7b", 14.3), ("s2-70b", 25.8)],
)
def test_work_at_131072_tokens(name: str, reduction: float) -> None:
    pattern, blocks = REFERENCE[name], 131072 // 64
    dense = pattern.num_heads * blocks * (blocks + 1) / 2
    assert dense / pattern.block_mask(blocks).sum().item() == pytest.approx(reduction, abs=0.05)
    # Half of a diagonal block is causal: a little more of what the pattern attends to than of all.
    assert 1 / pattern.attended_fraction(131072) == pytest.approx(reduction, rel=0.015)


@pytest.mark.parametrize("length", [64, 640, 2000])
@pytest.mark.parametrize("name", ["phi3-small", "s2-7b"])
def test_attended_fraction_counts_the_mask(name: str, length: int) -> None:
    pattern, blocks = REFERENCE[name], -(-length // 64)
    mask = pattern.block_mask(blocks).double()
    halved = mask.sum() - mask.diagonal(dim1=1, dim2=2).sum() / 2
    dense = pattern.num_heads * blocks * blocks / 2
    assert pattern.attended_fraction(length) == pytest.approx(halved.item() / dense)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", REFERENCE)
def test_shards_are_consecutive_heads(name: str, size: int) -> None:
    pattern = REFERENCE[name]
    shards = [pattern.shard(rank, size) for rank in range(size)]
    assert sum((shard.residues for shard in shards), ()) == pattern.residues
    assert sum((shard.kept_residues for shard in shards), ()) == pattern.kept_residues
    for shard in shards:
        assert (shard.block_size, shard.local_blocks) == (pattern.block_size, pattern.local_blocks)
        assert shard.num_kv_heads == pattern.num_kv_heads // size


def test_kv_heads_are_replicated_over_more_ranks_than_kv_heads() -> None:
    pattern = S2Pattern.build(8, 2, vert_stride=4, pattern_heads="query")
    shards = [pattern.shard(rank, 4) for rank in range(4)]
    assert [shard.num_kv_heads for shard in shards] == [1] * 4
    assert [shard.residues for shard in shards] == [(0, 3), (2, 1), (0, 3), (2, 1)]
    assert [shard.kept_residues for shard in shards] == [((0, 3),), ((1, 2),)] * 2


def test_the_longest_stride() -> None:
    assert S2Pattern(64, 1, 65536, (65535,), 1).residues == (65535,)
    with pytest.raises(ValueError, match=r"^vert_stride: 65537, expected at most 65536$"):
        S2Pattern(64, 1, 65537, (0,), 1)


def test_first_returning_block_finds_a_planted_one() -> None:
    mask = S2Pattern.build(4, 4, local_blocks=3, vert_stride=4).block_mask(16)
    assert not mask[2, 10, 5]
    mask[2, 11, 5] = True
    mask[3, 15, 1] = not mask[3, 15, 1]
    assert first_returning_block(mask) == (2, 5)


@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 12, 100], ids="{}-rows-at-a-time".format)
def test_first_returning_block_of_any_mask(
    rows: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, blocks = 3, 13
    monkeypatch.setattr("s2_kernels.pattern._CHUNK", rows * heads * blocks)
    mask = random_causal_mask(heads, blocks, density)
    mask[0] = torch.ones(blocks, blocks).tril()
    returning = [
        (head, key)
        for head in range(heads)
        for key in range(blocks)
        if any(mask[head, i + 1, key] and not mask[head, i, key] for i in range(key, blocks - 1))
    ]
    assert first_returning_block(mask) == (returning[0] if returning else None)


@pytest.mark.parametrize("rows", [1, 3, 100], ids="{}-rows-at-a-time".format)
def test_first_returning_block_finds_the_only_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 9
    monkeypatch.setattr("s2_kernels.pattern._CHUNK", rows * blocks)
    for key in range(blocks):
        for query in range(key, blocks - 1):
            mask = torch.ones(1, blocks, blocks, dtype=torch.bool).tril()
            mask[0, query, key] = False
            assert first_returning_block(mask) == (0, key)


def test_nothing_returns_where_there_is_nothing() -> None:
    assert first_returning_block(torch.ones(0, 5, 5, dtype=torch.bool)) is None
    assert first_returning_block(torch.ones(2, 0, 0, dtype=torch.bool)) is None


def test_first_returning_block_ignores_what_is_not_causal() -> None:
    assert first_returning_block(torch.ones(2, 6, 6, dtype=torch.bool)) is None
    anticausal = torch.ones(2, 6, 6, dtype=torch.bool).triu(1) | torch.eye(6, dtype=torch.bool)
    assert first_returning_block(anticausal) is None


def test_first_returning_block_refuses_other_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"block_mask: shape \(2, 3, 4\), expected \[heads, blocks, blocks\]"
    ):
        first_returning_block(torch.ones(2, 3, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 48, "block_size: 48, expected a power of two"),
        ("block_size", 0, "block_size: 0, expected a power of two"),
        ("local_blocks", 0, "local_blocks: 0, expected a positive integer"),
        ("vert_stride", -8, "vert_stride: -8, expected a positive integer"),
        ("num_kv_heads", 0, "num_kv_heads: 0, expected a positive integer"),
        ("residues", (), r"residues: 0 query heads, expected a positive multiple of num_kv_heads \(2\)"),
        ("residues", (0, 1, 2), "residues: 3 query heads, expected a positive multiple"),
        ("residues", (0, 4), r"residues: \(0, 4\), expected values in \[0, 4\)"),
        ("residues", (-2, 0), r"residues: \(-2, 0\), expected values in \[0, 4\)"),
        ("residues", (0, 0, 1, 2), r"residues: KV heads keep \[1, 2\] residues, expected the same number"),
    ],
)
def test_errors_of_the_pattern(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2Pattern(**{**PATTERN, field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads: 0, expected a positive integer"),
        ({"num_kv_heads": 0}, "num_kv_heads: 0, expected a positive integer"),
        ({"num_heads": 7}, r"num_heads: 7, expected a multiple of num_kv_heads \(2\)"),
        ({"vert_stride": 0}, "vert_stride: 0, expected a positive integer"),
        ({"pattern_heads": "both"}, "pattern_heads: 'both', expected 'kv' or 'query'"),
        ({"vert_stride": 3, "pattern_heads": "query"}, "vert_stride: 3, expected at least 4"),
    ],
)
def test_errors_of_build(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2Pattern.build(**{"num_heads": 8, "num_kv_heads": 2, **arguments})


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        (2, 2, r"rank: 2, expected a value in \[0, 2\)"),
        (-1, 2, r"rank: -1, expected a value in \[0, 2\)"),
        (0, 5, "tensor-parallel size: 5, expected a divisor of the 12 query heads"),
        (0, 4, "tensor-parallel size: 4, expected a divisor or a multiple of the 6 KV heads"),
    ],
)
def test_errors_of_shard(rank: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2Pattern.build(12, 6).shard(rank, size)


def test_defaults_of_build() -> None:
    assert S2Pattern.build(2, 2) == S2Pattern(64, 16, 8, (0, 4), 2)


def test_tokens_of_a_window_and_of_a_super_block() -> None:
    pattern = S2Pattern(32, 3, 5, (0,), 1)
    assert (pattern.window_tokens, pattern.super_block_tokens) == (96, 160)


def test_block_mask_is_on_the_cpu_whatever_the_default_device_is() -> None:
    pattern = S2Pattern.build(2, 2, local_blocks=2)
    with torch.device("meta"):
        mask = pattern.block_mask(9)
    assert torch.equal(mask, pattern.block_mask(9))


def test_what_is_said_of_kv_heads_that_keep_different_numbers_of_residues() -> None:
    with pytest.raises(ValueError, match="KV heads keep") as caught:
        S2Pattern(16, 2, 4, (0, 0, 1, 2), 2)
    assert str(caught.value) == (
        "residues: KV heads keep [1, 2] residues, expected the same number for every KV head"
    )


@given(arguments=build_arguments())
def test_a_handle_gives_the_pattern_again(arguments: dict[str, Any]) -> None:
    pattern = S2Pattern.build(**arguments)
    again = S2Pattern.from_handle(pattern.handle)
    assert again == pattern
    assert again.handle == pattern.handle
    assert "handle" not in repr(pattern)


@pytest.mark.parametrize(
    "handle",
    [
        "",
        "s2:",
        "s2:16,2,4,2",
        "s2:16,2,4,2,0,3/1",
        "s2:16,2,4,2,0,3//0",
        "16,2,4,2,0,3",
        "S2:16,2,4,2,0,3",
    ],
)
def test_other_text_is_no_handle(handle: str) -> None:
    assert S2Pattern(**PATTERN).handle == "s2:16,2,4,2,0,3"
    with pytest.raises(ValueError, match=r"^handle: ") as caught:
        S2Pattern.from_handle(handle)
    assert str(caught.value) == f"handle: {handle!r}, expected that of a pattern, 's2:' and numbers"


def test_draw(tmp_path: Path) -> None:
    pattern = S2Pattern(**PATTERN)
    pattern.draw(tmp_path / "pattern.png", 9)
    draw_pattern(pattern, tmp_path / "expected.png", 9)
    assert (tmp_path / "pattern.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
