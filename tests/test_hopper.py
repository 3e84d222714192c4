"""When the Hopper kernels take a call, and how they cut their work; the kernels' results are tested where
they are called from.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s2_kernels import hopper
from s2_kernels.hopper.prefill import heads_per_section
from s2_kernels.pattern import S2Pattern

PATTERN = S2Pattern.build(4, 2)
BY_QUERY = S2Pattern.build(32, 8, head_sliding_offset=1, pattern_heads="query")
F16, BF16 = torch.float16, torch.bfloat16
SECTION_BYTES = 8 * 2**20


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every device were a Hopper GPU."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)


def takes(pattern: S2Pattern, q: torch.Tensor, *keys_and_values: torch.Tensor) -> bool:
    named = {f"tensor{n}": tensor for n, tensor in enumerate(keys_and_values)}
    return hopper.refusal(pattern, q, **named) is None


def packed(head_size: int = 64, dtype: torch.dtype = F16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, [tokens, heads, head_size], parts of one tensor."""
    q, k, v = torch.zeros(10, 8, head_size, dtype=dtype).split([4, 2, 2], dim=1)
    return q, k, v


def test_not_on_a_cpu() -> None:
    assert not takes(PATTERN, *packed())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("head_size", [64, 128])
def test_packed_tensors(head_size: int, dtype: torch.dtype) -> None:
    assert takes(PATTERN, *packed(head_size, dtype))
    assert takes(PATTERN, *(x.contiguous() for x in packed(head_size, dtype)))


@pytest.mark.usefixtures("everywhere")
def test_pages_with_heads_in_regions_of_their_own() -> None:
    q, _, _ = packed()
    pool = torch.zeros(3, 2, 128, 128, dtype=F16)
    assert takes(PATTERN, q, pool, pool)
    several_layers = torch.zeros(3, 8, 128, 128, dtype=F16)[:, 4:6]
    assert takes(PATTERN, q, pool, several_layers)


@pytest.mark.usefixtures("everywhere")
def test_not_token_major_pages() -> None:
    """A slot's heads side by side: another head's slots are no rows apart."""
    q, _, _ = packed()
    pool = torch.zeros(3, 128, 2, 128, dtype=F16).transpose(1, 2)
    assert not takes(PATTERN, q, pool, pool)


@pytest.mark.usefixtures("everywhere")
def test_not_pages_off_the_grid_of_rows() -> None:
    q, _, _ = packed()
    pool = torch.zeros(3, 2, 128, 128, dtype=F16)
    with_gap_per_page = torch.zeros(3, 2 * 128 * 128 + 8, dtype=F16)[:, :-8].view(pool.shape)
    with_columns_apart = torch.zeros(3, 2, 128, 256, dtype=F16)[..., ::2]
    no_pages = pool[:0]
    one_slot = pool[:, :, :1].expand(pool.shape)
    for irregular in (with_gap_per_page, with_columns_apart, no_pages, one_slot):
        assert not takes(PATTERN, q, pool, irregular)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("head_size", "dtype"), [(96, F16), (256, F16), (64, torch.float32)], ids=str)
def test_not_other_heads(head_size: int, dtype: torch.dtype) -> None:
    assert not takes(PATTERN, *packed(head_size, dtype))


@pytest.mark.usefixtures("everywhere")
def test_not_other_blocks() -> None:
    assert not takes(S2Pattern.build(4, 2, block_size=32), *packed())


def with_gap_per_head(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 8))[..., :-8]


def with_dimensions_apart(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=2)[..., ::2]


def misaligned(x: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(x.numel() + 4, dtype=x.dtype)
    return memory[4:].view(x.shape)


def with_rows_misaligned(x: torch.Tensor) -> torch.Tensor:
    tokens, heads, size = x.shape
    return torch.zeros(tokens, heads * size + 4, dtype=x.dtype)[:, :-4].view(tokens, heads, size)


def with_one_row(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize(
    "change", [with_gap_per_head, with_dimensions_apart, misaligned, with_rows_misaligned, with_one_row]
)
def test_not_memory_that_tma_cannot_load(change: Callable[[torch.Tensor], torch.Tensor], place: int) -> None:
    tensors = list(packed())
    tensors[place] = change(tensors[place])
    assert tensors[place].shape == packed()[place].shape
    assert not takes(PATTERN, *tensors)


@pytest.mark.parametrize("pattern", [S2Pattern.build(24, 12, vert_stride=16), BY_QUERY], ids=["kv", "query"])
def test_sections_hold_whole_groups_and_fit_the_cache(pattern: S2Pattern) -> None:
    """The longer the sequence, the fewer heads at a time; together, their old keys and values fit."""
    sizes = [heads_per_section(pattern, 1 << n, 128, SECTION_BYTES) for n in range(6, 24)]
    assert sizes[0] == pattern.num_heads
    assert sizes[-1] == pattern.group_size
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    for n, size in zip(range(6, 24), sizes, strict=True):
        assert pattern.num_heads % size == 0
        kv_heads, rest = divmod(size, pattern.group_size)
        assert rest == 0
        stored = (1 << n) * pattern.num_kept / pattern.vert_stride * 2 * 128 * 2
        assert kv_heads == 1 or kv_heads * stored <= SECTION_BYTES
        more = [c for c in range(kv_heads + 1, pattern.num_kv_heads + 1) if pattern.num_kv_heads % c == 0]
        assert not more or more[0] * stored > SECTION_BYTES
