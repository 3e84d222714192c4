"""The benchmark of an eager layer: both ways do the same, and it names a machine that it is not for."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager_layer
from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern
from tests.paged import DEVICE

PATTERN = S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=4)
REQUESTS = {
    "prefill": [(0, 50)],
    "decodes": [(70, 1), (90, 1)],
    "mixed": [(70, 1), (90, 1), (0, 50)],
}


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_both_ways_attend_alike(requests: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_layer, "PAGES", 16)
    monkeypatch.setattr(eager_layer, "LAYERS", 3)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        batch = eager_layer.make_batch(requests, TierLayout(PATTERN, 16))
        layers = [eager_layer.make_layer(PATTERN, len(batch.window_slots)) for _ in range(2)]
        ways = [
            way(batch, layers, PATTERN, requests)
            for way in (eager_layer.each_call, eager_layer.prepared_step)
        ]
    results = []
    for run in ways:
        for layer in layers:
            layer.out.fill_(torch.nan)
        run()
        results.append([layer.out.clone() for layer in layers])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(*results[0])


def test_a_machine_without_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["eager_layer"])
    assert eager_layer.main() == 2
    assert capsys.readouterr().err == "benchmarks.eager_layer: no CUDA GPU found, expected one\n"


def test_the_table() -> None:
    record = {"geometry": "s2-7b", "batch": "decodes", "each_call_us": 99.6, "step_us": 20.2}
    lines = eager_layer.table([record | {"dense_us": 12.0}, record | {"dense_us": None}]).splitlines()
    assert lines[2:] == [
        "| s2-7b | decodes | 100 µs | 20 µs | 12 µs |",
        "| s2-7b | decodes | 100 µs | 20 µs | - |",
    ]
