"""Prepared calls that are kept."""

from __future__ import annotations

import torch

from s2_kernels.launch.call_cache import CallCache, layouts


def test_the_oldest_goes() -> None:
    cache: CallCache[str] = CallCache(size=2)
    prepared = []

    def get(key: str) -> str:
        def prepare() -> str:
            prepared.append(key)
            return key.upper()

        return cache.get(key, prepare)

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"]
    assert [get(key) for key in "cba"] == ["C", "B", "A"]
    assert prepared == ["a", "b", "c", "a"]


def test_what_a_layout_is() -> None:
    x = torch.randn(4, 8)
    same = layouts(torch.randn(4, 8), None)
    assert layouts(x, None) == same
    others = (x.double(), x.T, x[:2], torch.randn(8, 8)[::2], torch.randn(33)[1:].view(4, 8))
    for other in others:
        assert layouts(other, None) != same
    assert layouts(x, x) != same
