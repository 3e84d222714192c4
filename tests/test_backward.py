"""The gradients that every implementation computes, against autograd of masked attention in float64.

What a backward pass is given, the output and its log-sum-exp included, is from float64 as well, and never
from our own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from s2_kernels.contiguous import torch_path
from s2_kernels.contiguous.block_sparse_bwd import block_sparse_bwd_configs
from s2_kernels.contiguous.dispatch import run_backward
from s2_kernels.contiguous.key_tiles import KeyTiles, key_tiles
from s2_kernels.contiguous.sequences import Span
from s2_kernels.launch.choice import Impl
from s2_kernels.launch.configs import trial
from s2_kernels.masks import BlockMask, dense_heads, local_window, pattern_block_mask, sink_blocks
from s2_kernels.pattern import S2Pattern
from tests.contiguous import expected_gradients, random_causal_mask, spelt_out
from tests.paged import DEVICE, DTYPE_NAMES, DTYPES
from tests.test_block_sparse import HEADS, KINDS, KV_HEADS, VISITED, block_mask, random_mask

IMPLS: list[Impl] = ["triton", "torch", "reference"]
TOLERANCES = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
GAP = 3
# (past, queries) of each sequence, for blocks of 16 tokens.
PROMPTS = [(0, 1), (0, 55)]
CHUNKS = [(75, 20), (37, 12), (5, 0)]
NAN, INF = float("nan"), float("inf")


@dataclass
class Case:
    """Sequences packed with a gap after each. In the gaps everything is NaN.

    Attributes:
        q, k, v, out, lse, d_out, d_lse: of the backward pass, [1, tokens, heads, head_size] and
            [1, heads, tokens].
        scale: factor on the logits.
        spans: the sequences.
        expected: of each, the gradients of q, k and v, float64.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    d_out: torch.Tensor
    d_lse: torch.Tensor
    scale: float
    spans: tuple[Span, ...]
    expected: list[tuple[torch.Tensor, ...]]

    def rows(self, span: Span) -> slice:
        return slice(span.query_start, span.query_start + span.num_queries)

    def keys(self, span: Span) -> slice:
        return slice(span.key_start, span.key_start + span.num_keys)

    def gradients(self, mask: S2Pattern | BlockMask, impl: Impl) -> tuple[torch.Tensor, ...]:
        """What `impl` writes over NaN, in memory of other strides than the inputs'."""
        outputs = tuple(strided(x.shape[1:], x.dtype, not n) for n, x in enumerate((self.q, self.k, self.v)))
        run_backward(
            self.q,
            self.k,
            self.v,
            mask,
            self.spans,
            self.scale,
            self.out,
            self.lse,
            self.d_out,
            self.d_lse,
            *outputs,
            impl,
        )
        return outputs

    def check(self, mask: S2Pattern | BlockMask, impl: Impl) -> None:
        outputs = self.gradients(mask, impl)
        tolerance = TOLERANCES[self.q.dtype]
        for span, expected in zip(self.spans, self.expected, strict=True):
            tokens = (self.rows(span), self.keys(span), self.keys(span))
            for name, output, some, gradient in zip("qkv", outputs, tokens, expected, strict=True):
                torch.testing.assert_close(
                    output[0, some].double(),
                    gradient.double(),
                    atol=tolerance,
                    rtol=tolerance,
                    msg=lambda message, name=name: f"d{name}: {message}",
                )
                output[0, some] = torch.nan
        assert all(output.isnan().all() for output in outputs), "tokens of no sequence were written"


def strided(shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool) -> torch.Tensor:
    """NaN [1, *shape], in memory with gaps between the heads."""
    tokens, heads, head_size = shape
    if heads_first:
        memory = torch.full((1, heads + 1, tokens, head_size), torch.nan, dtype=dtype, device=DEVICE)
        return memory.transpose(1, 2)[:, :, :heads]
    return torch.full((1, tokens, heads + 1, head_size), torch.nan, dtype=dtype, device=DEVICE)[:, :, :heads]


def build_case(
    dense: torch.Tensor,
    block_size: int,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_size: int = 24,
    causal: bool = True,
) -> Case:
    """Random sequences of (past, queries) tokens."""
    spans, queries, keys = [], 0, GAP
    for past, count in sequences:
        spans.append(Span(0, queries, count, keys, past + count))
        queries, keys = queries + count + GAP, keys + past + count + GAP
    q, out = (strided((queries, heads, head_size), dtype, False) for _ in range(2))
    d_out = strided((queries, heads, head_size), dtype, True)
    k, v = (strided((keys, kv_heads, head_size), dtype, heads_first) for heads_first in (True, False))
    lse, d_lse = torch.full((2, 1, heads, queries), torch.nan, device=DEVICE)
    case = Case(q, k, v, out, lse, d_out, d_lse, 1.5 * head_size**-0.5, tuple(spans), [])
    fill = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for span in spans:
        rows, of_span = case.rows(span), case.keys(span)
        for tensor, some in ((q, rows), (d_out, rows), (k, of_span), (v, of_span)):
            tensor[0, some] = fill(tensor[0, some].shape).to(tensor)
        d_lse[0, :, rows] = fill(heads, span.num_queries).to(d_lse)
        mask = spelt_out(dense, block_size, heads, span.num_queries, span.num_keys, causal=causal)
        out[0, rows], lse[0, :, rows], gradients = expected_gradients(
            q[0, rows],
            k[0, of_span],
            v[0, of_span],
            mask.to(DEVICE),
            case.scale,
            d_out[0, rows],
            d_lse[0, :, rows],
        )
        case.expected.append(gradients)
    return case


def check_every_implementation(dense: torch.Tensor, block_size: int, case: Case, causal: bool = True) -> None:
    mask = block_mask(dense, block_size, causal=causal)
    for impl in IMPLS:
        case.check(mask, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str, impl: Impl) -> None:
    layouts, dtypes = [PROMPTS, CHUNKS], DTYPES
    if DEVICE == "cpu" and impl == "triton":  # the interpreter takes long, with float32 most of all
        layouts, dtypes = [layouts[list(KINDS).index(kind) % 2]], [torch.float16]
    for sequences in layouts:
        for dtype in dtypes:
            build_case(KINDS[kind], 16, sequences, dtype).check(block_mask(KINDS[kind], 16), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("pattern_heads", ["kv", "query"])
@pytest.mark.parametrize("impl", IMPLS)
def test_patterns(impl: Impl, pattern_heads: str, dtype: torch.dtype) -> None:
    """As they are, with the query heads of a KV head of one pattern, and each of its own."""
    pattern = S2Pattern.build(
        4, 2, block_size=16, local_blocks=2, vert_stride=4, head_sliding_offset=1, pattern_heads=pattern_heads
    )
    build_case(pattern.block_mask(4), 16, [(0, 61)], dtype).check(pattern, impl)


def test_queries_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "_QUERIES_AT_A_TIME", 20)
    case = build_case(KINDS["s2"], 16, [(13, 50), (0, 20)], torch.float32)
    case.check(block_mask(KINDS["s2"], 16), "torch")


TILE_SHAPES = [(16, 16, 64), (16, 64, 16), (32, 64, 32), (64, 32, 64), (64, 64, 32), (128, 64, 64)]
if DEVICE == "cuda":
    TILE_SHAPES += [(16, 64, 128), (32, 16, 128), (64, 128, 128), (128, 64, 32)]


@pytest.mark.parametrize(("block_size", "block_m", "block_n"), TILE_SHAPES)
def test_tiles_of_several_blocks_and_several_in_a_block(block_size: int, block_m: int, block_n: int) -> None:
    """Masks in which dropped blocks return, and blocks that the same heads keep share a tile."""
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    blocks = 2 + 110 // block_size
    pattern = S2Pattern.build(2, 1, block_size=block_size, local_blocks=1, vert_stride=2)
    random = random_causal_mask(1, blocks, 0.5, seed=block_size)
    for dense in (pattern.block_mask(blocks), random):
        case = build_case(dense, block_size, [(0, 40), (83, 27)], torch.float16, heads=2, kv_heads=1)
        with trial("block_sparse_bwd_dq", options), trial("block_sparse_bwd_dkdv", options):
            case.check(block_mask(dense, block_size), "triton")


@pytest.mark.parametrize("blocks", [(5, 5), (5, 3), (2, 6)], ids=["square", "tall", "wide"])
def test_not_causal(blocks: tuple[int, int]) -> None:
    """Any number of queries, from the first on, and keys; one query of a square mask is the last token."""
    query_blocks, key_blocks = blocks
    dense = random_mask(2, query_blocks, key_blocks)
    sequences = [
        (keys - queries, queries)
        for queries, keys in ((query_blocks * 16 - 7, key_blocks * 16 - 5), (1, key_blocks * 16 - 3))
    ]
    case = build_case(dense, 16, sequences, torch.float16, heads=2, kv_heads=1, causal=False)
    check_every_implementation(dense, 16, case, causal=False)
    # Tiles of a single row, which are after some of their key blocks: the last of those may not be whole.
    options = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    with trial("block_sparse_bwd_dq", options), trial("block_sparse_bwd_dkdv", options):
        case.check(block_mask(dense, 16, causal=False), "triton")


def test_fewer_query_blocks_than_key_blocks() -> None:
    """The rows are the last ones of a square mask, whose first ones are not known."""
    dense = random_causal_mask(2, 7, 0.6)[:, 4:]
    case = build_case(dense, 16, [(64, 29), (69, 1), (64, 48)], torch.float16, heads=2, kv_heads=1)
    check_every_implementation(dense, 16, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("block_size", [16, 64] if DEVICE == "cpu" else [16, 32, 64, 128])
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 192, 256])
def test_head_sizes(head_size: int, block_size: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and (block_size == 16) != (dtype == torch.float16) and head_size != 64:
        # All combinations would take Triton's interpreter too long.
        pytest.skip("every head size with one of both on the CPU, and head size 64 with all")
    dense = random_causal_mask(3, 5, 0.6, seed=head_size)
    case = build_case(dense, block_size, [(20, 23)], dtype, heads=3, kv_heads=1, head_size=head_size)
    for impl in ("triton", "torch"):
        case.check(block_mask(dense, block_size), impl)


def test_sequences_of_a_batch_and_no_gradient_of_the_log_sum_exp() -> None:
    pattern = S2Pattern.build(2, 1, block_size=16, local_blocks=1, vert_stride=3)
    q, d_out = torch.randn(2, 3, 40, 2, 16, device=DEVICE).half()
    k, v = torch.randn(2, 3, 50, 1, 16, device=DEVICE).half()
    spans = tuple(Span(n, 0, 40, 0, 50) for n in range(3))
    mask = spelt_out(pattern.block_mask(4), 16, 2, 40, 50).to(DEVICE)
    of_batch = [expected_gradients(q[n], k[n], v[n], mask, 0.3, d_out[n], None) for n in range(3)]
    out = torch.stack([out for out, _, _ in of_batch]).half()
    lse = torch.stack([lse for _, lse, _ in of_batch]).float()
    for impl in IMPLS:
        outputs = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
        run_backward(q, k, v, pattern, spans, 0.3, out, lse, d_out, None, *outputs, impl)
        for n, output in enumerate(outputs):
            expected = torch.stack([gradients[n] for _, _, gradients in of_batch])
            torch.testing.assert_close(output.double(), expected, atol=6e-3, rtol=6e-3)


def test_sequences_without_queries_have_zero_gradients() -> None:
    case = build_case(local_window(4, 2), 16, [(50, 0), (0, 0), (0, 17)], torch.float16)
    assert (case.expected[0][1] == 0).all()
    for impl in IMPLS:
        case.check(block_mask(local_window(4, 2), 16), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_call_gives_the_same_bits(impl: Impl) -> None:
    pattern = S2Pattern.build(4, 1, block_size=16, local_blocks=2, vert_stride=2)
    case = build_case(pattern.block_mask(3), 16, [(0, 45)], torch.float16, kv_heads=1)
    first, second = (case.gradients(pattern, impl) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


LEAKS = {
    "s2-16": S2Pattern.build(2, 1, block_size=16, local_blocks=1, vert_stride=3).block_mask(6),
    "arbitrary-16": random_causal_mask(2, 6, 0.5),
    "s2-64": S2Pattern.build(2, 1, local_blocks=1, vert_stride=2).block_mask(2),
}


def spoil(case: Case, where: str, mask: torch.Tensor, spoilt: torch.Tensor, value: float) -> torch.Tensor:
    """Put `value` into some tokens. Returns bool [heads, queries]: whose outputs or gradients are spoilt."""
    (span,) = case.spans
    is_reached = torch.zeros_like(mask[..., 0])
    if where in ("queries", "gradients"):
        is_reached[:, spoilt] = True
        case.d_out[0, case.rows(span)][spoilt] = value
    if where == "queries":
        case.q[0, case.rows(span)][spoilt] = value
    elif where != "gradients":
        is_reached |= mask[:, :, spoilt].any(dim=2)
        (case.k if where == "keys" else case.v)[0, case.keys(span)][spoilt] = value
    if where != "gradients":
        for head, rows in enumerate(is_reached):
            case.out[0, case.rows(span), head][rows] = torch.nan
            case.lse[0, head, case.rows(span)][rows] = torch.nan
    return is_reached


@pytest.mark.parametrize("where", ["keys", "values", "queries", "gradients"])
@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, NAN) for name in LEAKS), ("arbitrary-16", INF), ("arbitrary-16", -1e4)],
)
def test_what_nobody_attends_to_changes_nothing(name: str, where: str, value: float) -> None:
    """The values of some tokens are spoilt, and so the gradients of who attends to them, and no others.

    That goes for other tokens of a spoilt token's block as well, and for rows and keys in one tile with it.
    """
    dense, block_size = LEAKS[name], int(name.split("-")[-1])
    case = build_case(dense, block_size, [(0, 90)], torch.float16, heads=2, kv_heads=1, head_size=16)
    (span,) = case.spans
    mask = spelt_out(dense, block_size, 2, 90, 90).to(DEVICE)
    spoilt = torch.tensor([20, 40], device=DEVICE)
    is_reached = spoil(case, where, mask, spoilt, value)
    is_read = (mask & is_reached[..., None]).any(dim=1).any(dim=0)
    assert not is_reached.all()
    of_rows = where in ("queries", "gradients")
    assert is_read[spoilt].any() if of_rows else is_read[spoilt].all()
    assert not of_rows or not is_read.all()
    dq_expected, dk_expected, dv_expected = case.expected[0]
    for impl in ("triton", "torch"):
        dq, dk, dv = case.gradients(block_mask(dense, block_size), impl)
        close = partial(torch.testing.assert_close, atol=6e-3, rtol=6e-3)
        for head, rows in enumerate(~is_reached):
            close(dq[0, case.rows(span), head][rows].double(), dq_expected[:, head][rows])
        for output, expected in ((dk, dk_expected), (dv, dv_expected)):
            close(output[0, case.keys(span)][~is_read].double(), expected[~is_read])
        if value != value:
            has_keys = mask.any(dim=2)
            assert dq[0, case.rows(span)].transpose(0, 1)[is_reached & has_keys].isnan().all()
            assert not of_rows or dk[0, case.keys(span)][is_read].isnan().all()
            assert not of_rows or dv[0, case.keys(span)][is_read].isnan().all()


def test_keys_that_nobody_attends_to_have_zero_gradients() -> None:
    """Whatever they hold, and whatever steps their tile makes for its other blocks."""
    dense = random_causal_mask(2, 3, 0.9)
    dense[:, :, 1] = False
    case = build_case(dense, 16, [(0, 45)], torch.float16, heads=2, kv_heads=1, head_size=16)
    (span,) = case.spans
    case.k[0, case.keys(span)][16:32] = case.v[0, case.keys(span)][16:32] = NAN
    assert (case.expected[0][1][16:32] == 0).all()
    for impl in ("triton", "torch"):
        case.check(block_mask(dense, 16), impl)


def test_an_infinite_key_of_no_weight_spoils_who_attends_to_it() -> None:
    """Its logits are -inf, which leaves the outputs finite. Their gradients are zero times infinity."""
    dense = S2Pattern.build(2, 1, block_size=16, local_blocks=1, vert_stride=3).block_mask(4)
    case = build_case(dense, 16, [(0, 60)], torch.float16, heads=2, kv_heads=1, head_size=16)
    (span,) = case.spans
    case.q[0, case.rows(span), :, 3] = -1
    case.k[0, case.keys(span)][20, :, 3] = INF
    is_reached = spelt_out(dense, 16, 2, 60, 60)[:, :, 20].to(DEVICE)
    for impl in ("triton", "torch"):
        dq, _, _ = case.gradients(block_mask(dense, 16), impl)
        is_finite = dq[0, case.rows(span)].isfinite().all(dim=2).T
        assert torch.equal(is_finite, ~is_reached)


def test_sequences_with_common_keys_are_refused() -> None:
    case = build_case(local_window(2, 2), 16, [(10, 10)], torch.float16)
    (span,) = case.spans
    case.spans = (span, span._replace(num_keys=5))
    for impl in IMPLS:
        with pytest.raises(ValueError, match=r"^spans: Span\(.*num_keys=5\) and Span\(.*without common keys"):
            case.gradients(S2Pattern.build(4, 2, block_size=16), impl)


def test_what_the_kernels_do_not_take_is_named() -> None:
    case = build_case(local_window(2, 2), 16, [(0, 20)], torch.float16)
    with pytest.raises(ValueError, match=r"^q: tokens between its sequences, .* \(impl 'hopper'\)$"):
        case.gradients(S2Pattern.build(4, 2, block_size=16), "hopper")
    with pytest.raises(ValueError, match=r"^block_size: 8, expected at least 16"):
        case.gradients(S2Pattern.build(4, 2, block_size=8), "triton")
    case.d_out = case.d_out.mT.contiguous().mT
    with pytest.raises(ValueError, match=r"^d_out: strides"):
        case.gradients(S2Pattern.build(4, 2, block_size=16), "triton")


def visits_of_tiles(tables: KeyTiles, pair: int) -> Iterator[tuple[int, dict[int, int], set[int]]]:
    """(tile, {query block's first token: row bits}, those that need no mask) of a pair's tiles."""
    of_pair = tables.visits.view(-1, tables.num_tiles, 5)[pair].tolist()
    for tile, (shared, num_shared, own, num_unmasked, num_own) in enumerate(of_pair):
        starts = [*range(shared, shared + num_shared), *range(own, own + num_own)]
        bits = [-1] * num_shared + tables.row_bits[own : own + num_own].tolist()
        visits = dict(zip(tables.starts[starts].tolist(), bits, strict=True))
        assert len(visits) == num_shared + num_own, "a query block is visited twice"
        yield tile, visits, set(list(visits)[: num_shared + num_unmasked])


@pytest.mark.parametrize("visits_per_step", [1, 4])
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("kind", VISITED)
def test_visits_are_those_of_the_sequences(kind: str, blocks: int, visits_per_step: int) -> None:
    """Of whole sequences, and of chunks that begin and end within a block, or have no queries."""
    mask = VISITED[kind]
    first = mask.first_row * 16
    lengths = [(first + 96, 96), (first + 77, 50), (first + 33, 0), (315, 200)]
    spans = tuple(Span(n, 5, queries, 7 * n, keys) for n, (keys, queries) in enumerate(lengths))
    heads = mask.num_heads
    tables = key_tiles(mask, spans, heads, heads, blocks, visits_per_step, torch.device("cpu"))
    dense = mask.dense_rows(0, mask.num_query_blocks)
    any_unmasked = False
    for head in range(heads):
        of_class, pair = int(tables.class_of_kv_head[head]), int(tables.pair_of_head[head])
        tiles = tables.tiles.view(-1, tables.num_tiles, 6)[of_class].tolist()
        key_starts = tables.key_starts.view(-1, tables.num_tiles, blocks)[of_class].tolist()
        seen: list[tuple[int, int]] = []
        for tile, visits, unmasked in visits_of_tiles(tables, pair):
            n, query_start, key_start, begin, end, num_keys = tiles[tile]
            queries = lengths[n][1]
            assert (query_start, key_start, num_keys) == (5, 7 * n, lengths[n][0])
            assert (begin, end) == ((num_keys - queries if mask.is_causal else 0), begin + queries)
            key_blocks = [start // 16 for start in key_starts[tile] if start < num_keys]
            seen += [(n, block) for block in key_blocks]
            whole = range(-(-begin // 16), end // 16)
            attended = dense[head, begin // 16 : -(-end // 16) if queries else 0][:, key_blocks]
            for row, of_row in enumerate(attended.tolist(), start=begin // 16):
                bits = visits.pop(row * 16, 0)
                assert [bool(bits >> r & 1) for r in range(len(of_row))] == of_row
                is_unmasked = all(of_row) and row in whole and (row > max(key_blocks) or not mask.is_causal)
                assert (row * 16 in unmasked) == is_unmasked
                any_unmasked |= is_unmasked
            assert not visits
        assert sorted(seen) == [(n, j) for n, (keys, _) in enumerate(lengths) for j in range(-(-keys // 16))]
    assert any_unmasked or blocks == 8
    assert (tables.visits[:, 1] % visits_per_step == 0).all()


def test_tables_of_a_pattern_are_small() -> None:
    """A quarter of a million tokens: 17 million block pairs for each residue, of which few are listed."""
    pattern = S2Pattern.build(8, 2, block_size=16, local_blocks=8, pattern_heads="query")
    mask, num_blocks = pattern_block_mask(pattern, 1 << 18), 1 << 14
    span = Span(0, 0, 1 << 18, 0, 1 << 18)
    for blocks in (1, 4):
        tables = key_tiles(mask, (span,), 8, 2, blocks, 4, torch.device("cpu"))
        assert sum(len(x.flatten()) for x in tables[:7]) < 200 * num_blocks
        assert tables.visits[:, 1].max() > num_blocks - 64
        assert tables.visits.dtype == torch.int64


def test_blocks_that_a_head_keeps_share_a_tile() -> None:
    pattern = S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4)
    tables = key_tiles(
        BlockMask.from_pattern(pattern, 64), (Span(0, 0, 1024, 0, 1024),), 2, 2, 4, 1, torch.device("cpu")
    )
    longest = tables.key_starts.view(2, tables.num_tiles, 4)[:, 0] // 16
    assert longest[tables.class_of_kv_head.long()].tolist() == [[0, 4, 8, 12], [2, 6, 10, 14]]


def test_tables_are_kept_for_some_lengths() -> None:
    mask = block_mask(local_window(8, 2) | sink_blocks(8, 1), 16)
    make = partial(key_tiles, mask, num_heads=2, num_kv_heads=1, blocks=1, visits_per_step=1)
    of_length = {n: make((Span(0, 0, n, 0, n),), device=torch.device("cpu")) for n in range(1, 18)}
    assert make((Span(0, 0, 17, 0, 17),), device=torch.device("cpu")) is of_length[17]
    assert make((Span(0, 0, 1, 0, 1),), device=torch.device("cpu")) is not of_length[1]


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_padded", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_NAMES.get)
def test_tiles_have_few_enough_blocks_for_their_bits(
    dtype: torch.dtype, head_padded: int, block_size: int
) -> None:
    for config in block_sparse_bwd_configs(head_padded, dtype, block_size):
        assert max(config["BLOCK_M"], config["BLOCK_N"]) // block_size < 31


def test_a_dense_head_beside_a_pattern_needs_no_lists() -> None:
    """Their columns are a stretch each, whatever lists the rows are parts of."""
    everything = S2Pattern(16, 512, 1, (0,), 1)
    sparse = S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4)
    mask = BlockMask.of_heads([BlockMask.from_pattern(p, 512) for p in (sparse, everything)])
    tables = key_tiles(mask, (Span(0, 0, 8192, 0, 8192),), 3, 3, 1, 1, torch.device("cpu"))
    assert len(tables.row_bits) == 3 * 512, "of each tile the block of its keys"
    of_dense = dense_heads(1, 512, 1)
    listed = key_tiles(
        block_mask(of_dense, 16), (Span(0, 0, 8192, 0, 8192),), 1, 1, 1, 1, torch.device("cpu")
    )
    assert len(listed.row_bits) == 512
