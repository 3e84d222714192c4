"""The kernels benchmark: what it counts, what it accepts as right, what it writes and what it draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plot
from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.kernels import __main__ as command
from benchmarks.kernels import cases, check, implementations, report, work
from benchmarks.kernels.cases import GRADIENT_OPS, Case
from benchmarks.kernels.check_gradients import check_gradients, expected_gradients
from benchmarks.kernels.flex import flex_block_mask
from benchmarks.kernels.inputs import DENSE_PAGE_TOKENS, random_inputs
from benchmarks.kernels.run import run_case
from benchmarks.results_file import REPOSITORY, write_results
from s2_kernels import dkernel
from s2_kernels.config import S2Config
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference, token_mask

CPU = torch.device("cpu")
TINY = {
    "tiny": Geometry(1, 4, 2, 32, S2Config(2, 4, block_size=16)),
    "tiny-query": Geometry(
        1, 4, 2, 32, S2Config(2, 4, block_size=16, pattern_heads="query", head_sliding_offset=1)
    ),
    "tiny-streaming": Geometry(1, 6, 3, 32, S2Config(2, None, block_size=16, sink_blocks=1, full_heads=(1,))),
    "tiny-mixed": Geometry(1, 6, 3, 32, S2Config(2, 4, block_size=16, sink_blocks=2, full_heads=(0,))),
}
CASES = [
    Case("cache_write", "tiny", 1, 200),
    Case("decode", "tiny-query", 3, 300),
    Case("chunked_prefill", "tiny-query", 1, 200),
    Case("prefill", "tiny", 1, 256),
    Case("cache_write", "tiny-mixed", 1, 200),
    Case("decode", "tiny-streaming", 3, 300),
    Case("chunked_prefill", "tiny-mixed", 1, 200),
    Case("prefill", "tiny-streaming", 1, 256),
]
# (context, new tokens): whole blocks, inside a block, across blocks, within the window.
SPANS = [(0, 256), (0, 77), (128, 64), (100, 41), (299, 1), (3, 2)]


@pytest.fixture(autouse=True)
def tiny_geometries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cases, "CHUNK_TOKENS", 40)
    for name, geometry in TINY.items():
        monkeypatch.setitem(GEOMETRIES, name, geometry)
    yield
    cases._pattern.cache_clear()


def pattern_of(name: str) -> S2Pattern:
    return Case("prefill", name, 1, 16).pattern


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("context", "new"), SPANS)
def test_pairs_are_those_of_the_token_mask(name: str, context: int, new: int) -> None:
    pattern = pattern_of(name)
    positions = torch.arange(context, context + new)
    mask = token_mask(pattern, positions, context + new)
    # The diagonal of a causal mask has half a pair per query more than half a block.
    half_diagonals = pattern.num_heads * new / 2
    assert work.attended_pairs(pattern, context, new) == int(mask.sum()) - half_diagonals
    causal = torch.arange(context + new) <= positions[:, None]
    heads = pattern.num_heads
    assert work.dense_pairs(heads, context, new) == heads * int(causal.sum()) - half_diagonals


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("context", "new"), SPANS)
def test_visible_tokens_are_those_of_the_token_mask(name: str, context: int, new: int) -> None:
    pattern = pattern_of(name)
    mask = token_mask(pattern, torch.arange(context, context + new), context + new)
    per_kv_head = mask.unflatten(0, (pattern.num_kv_heads, -1)).any(dim=2).any(dim=1)
    assert work.visible_tokens(pattern, context, new) == int(per_kv_head.sum())


def test_attended_work_agrees_with_the_pattern() -> None:
    case = Case("prefill", "s2-7b", 1, 32768)
    fraction = work.flop(case, dense=False) / work.flop(case, dense=True)
    assert fraction == pytest.approx(case.pattern.attended_fraction(32768))


def test_bytes_of_a_decode_step() -> None:
    case = Case("decode", "hhst-8b", 16, 32768)
    # 16 window blocks and 496 / 8 strided ones, K and V in two bytes, of 8 heads; q and out of 32.
    tokens = (16 + 62) * 64
    assert work.required_bytes(case, dense=False) == 16 * (8 * tokens * 2 + 2 * 32) * 128 * 2
    assert work.required_bytes(case, dense=True) == 16 * (8 * 32768 * 2 + 2 * 32) * 128 * 2
    assert work.rate(case, dense=True, ms=1.0).keys() == {"gbps"}


def test_bytes_of_a_cache_write() -> None:
    # Read once, written to the window tier once, and one block in eight to the strided tier.
    expected = 2 * 8192 * 8 * 128 * 2 * (1 + 1 + 1 / 8)
    assert work.required_bytes(Case("cache_write", "hhst-8b", 1, 8192), dense=False) == expected


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("seq_len", [128, 256, 400])
@pytest.mark.parametrize("key_block", [16, 128])
def test_flex_mask_is_the_pattern(name: str, seq_len: int, key_block: int) -> None:
    pattern = pattern_of(name)
    mask = flex_block_mask(pattern, seq_len, CPU, key_block)
    assert (128, key_block) == mask.BLOCK_SIZE
    expected = token_mask(pattern, torch.arange(seq_len), seq_len)
    rows, keys = mask.BLOCK_SIZE
    tokens = torch.arange(seq_len)
    dense = torch.zeros_like(expected)
    for head in range(pattern.num_heads):
        by_token = mask.mask_mod(torch.tensor(0), torch.tensor(head), tokens[:, None], tokens)
        for tile in range(mask.kv_num_blocks.shape[2]):
            row = slice(tile * rows, (tile + 1) * rows)
            for block in mask.kv_indices[0, head, tile, : mask.kv_num_blocks[0, head, tile]].tolist():
                column = slice(block * keys, (block + 1) * keys)
                dense[head, row, column] = by_token[row, column]
            for block in mask.full_kv_indices[
                0, head, tile, : mask.full_kv_num_blocks[0, head, tile]
            ].tolist():
                dense[head, row, block * keys : (block + 1) * keys] = True
    assert torch.equal(dense, expected)
    # Without full heads no block of 128 keys is full here: the window has 32 tokens.
    has_full_blocks = key_block == 16 or len(pattern.full_heads) > 0
    assert (mask.full_kv_num_blocks.sum() > 0) == (seq_len > rows and has_full_blocks)


def test_flex_mask_is_where_it_is_wanted() -> None:
    mask = flex_block_mask(pattern_of("tiny"), 400, torch.device("meta"))
    assert {mask.kv_indices.device.type, mask.full_kv_indices.device.type} == {"meta"}


@pytest.mark.parametrize("name", TINY)
def test_sampled_reference_is_the_reference(name: str) -> None:
    inputs = random_inputs(Case("chunked_prefill", name, 2, 150), torch.float32, CPU)
    expected = check.expected_rows(inputs, dense=False)
    starts = inputs.query_start_loc.tolist(), inputs.key_start_loc.tolist()
    reference = attention_reference(inputs.q, inputs.k, inputs.v, inputs.case.pattern, inputs.scale, *starts)
    torch.testing.assert_close(expected.values, reference[expected.rows])
    assert expected.rows.tolist() == list(range(2 * inputs.case.new_tokens))

    wide = replace(inputs.case.pattern, local_blocks=100)
    reference = attention_reference(inputs.q, inputs.k, inputs.v, wide, inputs.scale, *starts)
    expected = check.expected_rows(inputs, dense=True)
    torch.testing.assert_close(expected.values, reference[expected.rows])


def test_sampled_positions_include_the_edges() -> None:
    case = Case("prefill", "s2-7b", 1, 131072)
    positions = check.sampled_positions(case).tolist()
    window = case.pattern.window_tokens
    assert {0, 63, 64, 127, 128, window - 1, window, 131071} <= set(positions)
    assert len(positions) <= check.SAMPLED_ROWS


def test_a_missing_block_is_refused() -> None:
    case = Case("prefill", "tiny", 1, 4096)
    inputs = random_inputs(case, torch.float32, CPU)
    expected = check.expected_rows(inputs, dense=False)
    out = torch.zeros_like(inputs.q)
    out[expected.rows] = expected.values
    assert check.check_attention(out, expected) == 0.0

    positions = expected.rows
    no_first_block = replace(case.pattern, residues=tuple((r + 1) % 4 for r in case.pattern.residues))
    out[positions] = check.attention_of_rows(
        inputs.q[positions], inputs.k, inputs.v, positions, no_first_block, inputs.scale
    )
    with pytest.raises(check.CheckFailed, match="max_rel_err"):
        check.check_attention(out, expected)


def test_one_block_of_the_longest_dense_context_shows() -> None:
    torch.manual_seed(0)
    positions = torch.tensor([131071])
    q, k, v = (torch.randn(tokens, 1, 32) for tokens in (1, 131072, 131072))
    right = check.attention_of_rows(q, k, v, positions, None, 32**-0.5)
    wrong = check.attention_of_rows(q, k[64:], v[64:], positions, None, 32**-0.5)
    with pytest.raises(check.CheckFailed, match="max_rel_err"):
        check.check_attention(wrong, check.Expected(torch.tensor([0]), right))


def test_an_unwritten_row_is_refused() -> None:
    inputs = random_inputs(Case("prefill", "tiny", 1, 512), torch.float32, CPU)
    expected = check.expected_rows(inputs, dense=False)
    unsampled = next(row for row in range(512) if row not in expected.rows)
    out = torch.zeros_like(inputs.q)
    out[expected.rows] = expected.values
    out[unsampled, 2] = torch.nan
    with pytest.raises(check.CheckFailed, match="NaN in 1 of 512 rows"):
        check.check_attention(out, expected)


@pytest.mark.parametrize("damage", ["window", "strided", "stray", "missing"])
def test_a_wrong_cache_is_refused(damage: str) -> None:
    inputs = random_inputs(Case("cache_write", "tiny", 1, 200), torch.float32, CPU)
    cache = implementations.prepare_s2_cache_write(inputs)()
    assert check.check_cache(cache, inputs) == 0.0
    last_page, first_page = cache.window_table[0, -1], cache.strided_table[0, 0]
    if damage == "window":
        cache.window_cache[last_page, 0, 7, 3] += 1
    elif damage == "strided":
        cache.strided_cache[first_page, :, :, 40] += 1
    elif damage == "stray":
        cache.window_cache[0, 0, 0] = 1
    else:
        cache.window_cache[cache.window_table[0, 5], 1, 3] = torch.nan
    with pytest.raises(check.CheckFailed):
        check.check_cache(cache, inputs)


def test_evicted_pages_are_poisoned() -> None:
    inputs = random_inputs(Case("decode", "tiny", 2, 300), torch.float32, CPU)
    cache = inputs.two_tier
    window_first_page = 299 // 16 - 1
    assert (cache.window_table[:, :window_first_page] == 0).all()
    assert (cache.window_table[:, window_first_page:] > 0).all()
    assert cache.window_cache[0].isnan().all()


def test_dense_pages_hold_the_keys() -> None:
    inputs = random_inputs(Case("decode", "tiny", 2, 300), torch.float32, CPU)
    cache = inputs.dense_paged
    for request in range(2):
        pages = cache.block_table[request].tolist()
        for paged, packed in ((cache.k_cache, inputs.k), (cache.v_cache, inputs.v)):
            tokens = paged[pages].flatten(0, 1)
            assert torch.equal(tokens[:300], packed[request * 300 : (request + 1) * 300])
    assert len(pages) == -(-300 // DENSE_PAGE_TOKENS)


def run(case: Case, *impls: str) -> list[dict[str, Any]]:
    return run_case(case, impls, CPU, torch.float32, lambda launches, in_graph: 2.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_s2_is_checked_and_timed(case: Case) -> None:
    (record,) = run(case, "s2")
    unit = "tflops" if "prefill" in case.op else "gbps"
    assert record.keys() == {"op", "geometry", "batch", "seq_len", "impl", "ms", unit, "max_rel_err"}
    assert record["ms"] == 2.0
    assert record["max_rel_err"] < 1e-5


def test_peers_are_checked_against_their_own_reference() -> None:
    records = {r["impl"]: r for r in run(Case("prefill", "tiny-query", 1, 256), "s2", "fa2", "s2_contiguous")}
    assert all(record["max_rel_err"] < 1e-5 for record in records.values())
    assert records.keys() == {"s2", "fa2", "s2_contiguous"}


@pytest.mark.parametrize("op", GRADIENT_OPS)
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_checked_and_timed(op: str, name: str) -> None:
    for record in run(Case(op, name, 1, 200), "s2", "fa2"):
        assert record.keys() == {"op", "geometry", "batch", "seq_len", "impl", "ms", "tflops", "max_rel_err"}
        assert record["max_rel_err"] < 1e-4


@pytest.mark.parametrize("peer", ["dkernel", "fa4"])
def test_a_peer_that_does_not_run_has_a_reason(peer: str) -> None:
    """Not installed, or not for a CPU."""
    (record,) = run(Case("backward", "tiny", 1, 200), peer)
    assert record["reason"]
    assert record.keys().isdisjoint({"ms", "error"})


@pytest.mark.parametrize("name", ["tiny", "tiny-query"])
def test_dkernels_gradients_are_asked_for_as_it_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its interface on our kernels."""
    monkeypatch.setitem(sys.modules, "dkernel", dkernel)
    (record,) = run(Case("forward_backward", name, 1, 200), "dkernel")
    assert record["max_rel_err"] < 1e-4


def test_dkernel_is_not_asked_for_heads_of_several_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dkernel", dkernel)
    (record,) = run(Case("prefill", "tiny-mixed", 1, 200), "dkernel")
    assert record["reason"] == pattern_of("tiny-mixed").kinds


@pytest.mark.parametrize("which", range(3), ids=["dq", "dk", "dv"])
def test_a_wrong_gradient_is_found(which: int) -> None:
    inputs = random_inputs(Case("backward", "tiny", 1, 200), torch.float32, CPU)
    expected = expected_gradients(inputs, dense=False)
    found = list(implementations.IMPLEMENTATIONS["s2"].ops["backward"](inputs)())
    check_gradients(tuple(found), expected)
    found[which] = found[which].clone()
    found[which][int(expected.rows[3]), 0] *= 1.1
    with pytest.raises(check.CheckFailed, match=f"of {('dq', 'dk', 'dv')[which]} "):
        check_gradients(tuple(found), expected)
    found[which][0, 1] = torch.nan
    with pytest.raises(check.CheckFailed, match="NaN in"):
        check_gradients(tuple(found), expected)


def test_a_rounded_output_makes_no_wrong_gradient() -> None:
    """Large logits: a row attends to one key all but alone, and its gradient is all but the rounding's."""
    torch.manual_seed(0)
    case = Case("backward", "hhst-8b", 1, 200)
    inputs = random_inputs(case, torch.bfloat16, CPU)
    inputs.q.mul_(2)
    expected = expected_gradients(inputs, dense=False)
    found = implementations.IMPLEMENTATIONS["s2"].ops["backward"](inputs)()
    assert check_gradients(found, expected) < 0.02
    with pytest.raises(check.CheckFailed, match="of dq "):
        check_gradients(found, replace(expected, dq_rounding=torch.zeros(())))


def test_products_of_a_backward_pass() -> None:
    forward, backward, both = (
        work.flop(Case(op, "tiny", 1, 256), False) for op in ("prefill", "backward", "forward_backward")
    )
    assert (backward, both) == (2.5 * forward, 3.5 * forward)


def test_an_implementation_skips_what_it_does_not_do() -> None:
    assert run(Case("cache_write", "tiny", 1, 200), "fa2", "flex") == []


def _wrong(inputs: Any) -> Any:
    return lambda: torch.ones_like(inputs.q)


def _missing(inputs: Any) -> Any:
    raise implementations.Unavailable("not installed")


def _broken(inputs: Any) -> Any:
    raise RuntimeError("out of luck\nand more")


@pytest.mark.parametrize(
    ("preparation", "is_ours", "key", "text"),
    [
        (_wrong, False, "error", "max_rel_err"),
        (_missing, False, "reason", "not installed"),
        (_broken, False, "reason", "RuntimeError: out of luck"),
        (_broken, True, "error", "RuntimeError: out of luck"),
    ],
)
def test_no_time_without_a_right_output(
    monkeypatch: pytest.MonkeyPatch, preparation: Any, is_ours: bool, key: str, text: str
) -> None:
    """That a peer does not run is a fact about this machine; that ours does not is an error."""
    implementation = implementations.Implementation(True, {"prefill": preparation}, is_ours)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "fa2", implementation)
    (record,) = run(Case("prefill", "tiny", 1, 64), "fa2")
    assert record.keys() == {"op", "geometry", "batch", "seq_len", "impl", key}
    assert record[key].startswith(text)
    assert record[key] in report.table("prefill", [record])


def test_ours_are_known_as_ours() -> None:
    ours = {
        name for name, implementation in implementations.IMPLEMENTATIONS.items() if implementation.is_ours
    }
    assert ours == {"s2", "s2_contiguous", "s2_triton"}


def test_default_cases() -> None:
    selected = cases.select_cases()
    assert Case("prefill", "s2-70b", 1, 131072) in selected
    assert Case("decode", "hhst-8b", 16, 32768) in selected
    assert Case("decode", "hhst-8b", 64, 8192) in selected
    assert Case("decode", "hhst-8b", 1, 131072) in selected
    assert Case("chunked_prefill", "hhst-8b", 1, 131072) in selected
    assert Case("cache_write", "hhst-8b", 1, 8192) in selected
    assert len(cases.select_cases(quick=True)) < len(selected) / 3
    assert cases.select_cases(["decode"], ["s2-7b"], [4096]) == [Case("decode", "s2-7b", 128, 4096)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "sideways"], "--ops: invalid choice: 'sideways'"),
        (["--geometries", "llama"], "--geometries: invalid choice: 'llama'"),
        (["--impls", "fa9"], "--impls: invalid choice: 'fa9'"),
        (["--seq-lens", "0"], "--seq-lens: '0', expected a positive integer"),
    ],
)
def test_bad_arguments_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def synthetic_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"op": "copy", "impl": "torch", "ms": 1.0, "gbps": 4000.0},
        {"op": "matmul", "impl": "torch", "ms": 1.0, "tflops": 700.0},
    ]
    for seq_len in (8192, 32768):
        for impl, ms in (("s2", 1.0), ("fa2", 10.0), ("fa3", 5.0)):
            case = Case("prefill", "s2-7b", 1, seq_len)
            rate = work.rate(case, impl != "s2", ms)
            records.append({**case.facts, "impl": impl, "ms": ms, **rate, "max_rel_err": 1e-3})
    decode = Case("decode", "hhst-8b", 16, 32768)
    rate = work.rate(decode, False, 0.1)
    records.append({**decode.facts, "impl": "s2", "ms": 0.1, **rate, "max_rel_err": 1e-3})
    records.append({**decode.facts, "impl": "xformers", "reason": "not installed"})
    return records


def test_tables_compare_with_the_same_run() -> None:
    records = synthetic_records()
    (row,) = [x for x in report.table("prefill", records).splitlines() if "| 8192 | s2 |" in x]
    assert "| 10.00x | 5.00x |" in row
    decode = report.table("decode", records)
    fraction = work.required_bytes(Case("decode", "hhst-8b", 16, 32768), dense=False) / 1e-4 / 4e12
    assert f"| {fraction:.2f} |" in decode
    assert "not installed" in decode
    assert "fa3" not in decode.splitlines()[-2]


def test_plot_draws_both_figures(tmp_path: Path) -> None:
    results = tmp_path / "kernels-gpu.json"
    write_results(results, synthetic_records())
    assert plot.main([str(results), "--output", str(tmp_path / "figures")]) == 0
    for name in ("speedup", "roofline"):
        image = (tmp_path / "figures" / f"kernels-gpu-{name}.svg").read_text()
        assert image.startswith("<?xml")


def test_the_results_that_are_here_can_be_drawn(tmp_path: Path) -> None:
    folder = REPOSITORY / "benchmarks" / "results"
    results = [path for pattern in plot.PATTERNS for path in sorted(folder.glob(pattern))]
    assert len(results) > len(plot.PATTERNS)
    assert plot.main([*map(str, results), "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) >= len(results)


def test_plotted_points() -> None:
    records = synthetic_records()
    assert plot.speedups(records, "fa2") == {"s2-7b": [(8192, 10.0), (32768, 10.0)]}
    intensity = {p[0]["op"]: p[1] for p in plot.roofline_points(records) if p[0]["impl"] == "s2"}
    # A decode step reads two bytes for each of K and V and multiplies each four times: two FLOP a byte,
    # for each of four query heads.
    assert intensity["decode"] == pytest.approx(4, rel=0.01)
    assert intensity["prefill"] > 200
    tflops = [point[2] for point in plot.roofline_points(records) if point[0]["op"] == "prefill"]
    rates = [record["tflops"] for record in records if record["op"] == "prefill" and record["impl"] != "fa2"]
    assert tflops == pytest.approx(rates, abs=0.06)


def test_plot_refuses_other_results(tmp_path: Path) -> None:
    other = tmp_path / "phi3-small.json"
    write_results(other, [{"variant": "phi3-small"}])
    with pytest.raises(SystemExit, match=r"phi3-small\.json: expected a file from benchmarks\.kernels"):
        plot.main([str(other)])


def test_plot_names_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.main(["nowhere.json"])
    assert "results: nowhere.json, expected a file" in capsys.readouterr().err
