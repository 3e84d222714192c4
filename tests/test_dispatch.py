"""Which implementation takes a call: the fastest that can, or the one asked for, or a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2_kernels import hopper, paged
from s2_kernels.attention import s2_attention
from s2_kernels.launch import limits
from s2_kernels.launch.choice import Impl, choose
from s2_kernels.layout import TierLayout
from s2_kernels.paged import PagedRequests, dispatch
from s2_kernels.pattern import S2Pattern
from tests.paged import Geometry, PagedBatch, build_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Geometry(S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4))
IMPLS: list[Impl] = ["reference", "torch", "triton", "hopper"]


def takes() -> None:
    return None


def refuses() -> str:
    return "q: dtype float8, expected float16"


@pytest.mark.parametrize(
    ("device", "hopper_takes", "chosen"),
    [(CPU, True, "torch"), (CPU, False, "torch"), (GPU, True, "hopper"), (GPU, False, "triton")],
    ids=["cpu-hopper", "cpu", "gpu-hopper", "gpu"],
)
def test_the_fastest_that_takes_the_call(device: torch.device, hopper_takes: bool, chosen: Impl) -> None:
    refusals = dict.fromkeys(IMPLS, takes) | {"hopper": takes if hopper_takes else refuses}
    assert choose(None, device, refusals) == chosen


def test_on_a_gpu_what_no_kernel_takes_is_an_error() -> None:
    refusals: dict[Impl, Callable[[], str | None]] = {"torch": takes, "triton": refuses, "hopper": refuses}
    with pytest.raises(ValueError, match=r"^q: dtype float8, expected float16$"):
        choose(None, GPU, refusals)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_one_asked_for_or_its_reason(impl: Impl) -> None:
    assert choose(impl, CPU, dict.fromkeys(IMPLS, takes)) == impl
    with pytest.raises(ValueError, match=rf"^q: dtype float8, expected float16 \(impl '{impl}'\)$"):
        choose(impl, GPU, dict.fromkeys(IMPLS, refuses))


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"^impl: 'cuda', expected None or one of 'torch', 'triton'"):
        choose("cuda", CPU, {"torch": takes, "triton": takes})  # type: ignore[arg-type]


def run(batch: PagedBatch, impl: Impl | None, max_query_len: int | None = None) -> torch.Tensor:
    out = batch.poisoned_output()
    paged.attend(
        batch.q, batch.requests, batch.pattern, batch.scale, out, max_query_len=max_query_len, impl=impl
    )
    return out


@pytest.mark.parametrize("impl", [None, "reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("requests", "max_query_len"),
    [([(37, 25), (96, 1), (0, 0)], None), ([(37, 1), (0, 0), (96, 1)], 1)],
    ids=["prefill", "decode"],
)
def test_every_implementation_of_attend(
    requests: list[tuple[int, int]], max_query_len: int | None, impl: Impl | None
) -> None:
    batch = build_batch(SMALL, requests, padding_tokens=3)
    batch.check(run(batch, impl, max_query_len))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_default_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's environment says: its interpreter runs when it is asked for."""
    calls: list[str] = []
    monkeypatch.setattr("s2_kernels.paged.torch_path.paged_attention", lambda *_: calls.append("attend"))
    monkeypatch.setattr("s2_kernels.paged.torch_path.write_cache", lambda *_: calls.append("write"))
    batch = build_batch(SMALL, [(0, 20)])
    run(batch, None)
    caches = batch.window_cache, batch.strided_cache
    slots = batch.window_slots, batch.strided_slots
    paged.write(batch.key, batch.value, *caches, *slots, batch.pattern)
    assert calls == ["attend", "write"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_kernels_that_need_a_gpu_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = build_batch(SMALL, [(0, 20)])
    q, k, v = (x[None] for x in (batch.q, batch.k, batch.v))
    with pytest.raises(ValueError, match=r"^device: cpu, expected a GPU of compute capability 9.0 \(impl"):
        run(batch, "hopper")
    with pytest.raises(ValueError, match=r"^device: cpu, expected a GPU of compute capability 9.0 \(impl"):
        s2_attention(q, k, v, batch.pattern, impl="hopper")
    monkeypatch.setattr(limits, "_interprets", lambda: False)
    expected = r"^device: cpu, expected a GPU, or Triton's interpreter \(impl 'triton'\)"
    with pytest.raises(ValueError, match=expected):
        run(batch, "triton")
    with pytest.raises(ValueError, match=expected):
        run(batch, "triton", max_query_len=1)
    with pytest.raises(ValueError, match=expected):
        s2_attention(q, k, v, batch.pattern, impl="triton")


def test_what_the_hopper_kernel_takes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    pattern = S2Pattern.build(2, 2)
    q = torch.zeros(3, 2, 64, dtype=torch.float16)
    apart = torch.zeros(3, 2, 64, 256, dtype=torch.float16)[..., ::2]
    for arguments, tensors, reason in (
        ((SMALL.pattern, q), {}, "block_size: 16, expected 64"),
        ((pattern, q[..., :48]), {}, "q: head size 48, expected one of (64, 128)"),
        ((pattern, q.float()), {}, "q: dtype torch.float32, expected one of "),
        ((pattern, q), {"window_cache": apart}, "window_cache: shape (3, 2, 64, 128) and strides "),
    ):
        assert (hopper.refusal(*arguments, **tensors) or "").startswith(reason)
    assert hopper.refusal(pattern, q) is None


@pytest.mark.parametrize(
    ("heads", "page_slots", "residue_slots", "reason"),
    [
        ({}, 64, 64, None),
        ({"sink_blocks": 1}, 64, 64, None),
        ({"full_heads": [1]}, 64, 64, None),
        ({"vert_stride": None}, 64, 64, None),
        ({}, 64, 128, None),
        ({"sink_blocks": 1}, 96, 64, "window_cache: 96 slots in a page, expected a multiple of 64"),
    ],
    ids=["plain", "sinks", "full", "streaming", "other-pages", "half-blocks"],
)
def test_the_hopper_kernel_takes_heads_of_several_kinds(
    heads: dict[str, Any],
    page_slots: int,
    residue_slots: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    layout = TierLayout(S2Pattern.build(2, 2, **heads), page_slots, residue_slots)
    rows, slots = layout.strided_shape
    requests = PagedRequests(
        torch.zeros(5, 2, page_slots, 128, dtype=torch.float16),
        torch.zeros(5, rows, slots, 128, dtype=torch.float16),
        *torch.zeros(2, 1, 4, dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
    )
    q = torch.zeros(3, 2, 64, dtype=torch.float16)
    assert dispatch._hopper_refusal(q, requests, layout.pattern) == reason
    assert limits.num_kept(layout) == (1 if layout.is_even else limits.VARYING)
    if rows:
        apart = requests._replace(strided_cache=requests.strided_cache.repeat(1, 1, 1, 2)[..., ::2])
        refusal = dispatch._hopper_refusal(q, apart, layout.pattern) or ""
        assert refusal.startswith("strided_cache: shape ")
