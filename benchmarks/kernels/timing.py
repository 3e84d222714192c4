"""How long a launch takes on the GPU: medians of CUDA-event times.

A launch shorter than GRAPH_BELOW_MS, which the host may not queue in time, is timed inside a CUDA graph that
holds many, as a serving engine replays its decode steps, and a model that is compiled for training its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

import torch

GRAPH_BELOW_MS = 2.0
GRAPH_MS = 2.0
"""A graph holds about this much work, so that its own launch does not count."""
MIN_REPETITIONS = 5
MAX_REPETITIONS = 1000

Launch = Callable[[], Any]


def median_ms(launches: Sequence[Launch], seconds: float, in_graph: bool = False) -> float:
    """The median time of one launch in milliseconds.

    Args:
        launches: the same launch on different inputs, taken in turn; together they should touch more than
            the L2 cache holds. Each has run before.
        seconds: how long to measure, roughly; slow launches still run MIN_REPETITIONS times.
        in_graph: whether to use a CUDA graph whatever the time.
    """
    launches[0]()
    launch_ms = median(_times_ms(launches, 1))
    if not in_graph and launch_ms >= GRAPH_BELOW_MS:
        rotations = _repetitions(launch_ms * len(launches), seconds)
        return median(_times_ms(launches, rotations))
    count = len(launches) * max(1, ceil(GRAPH_MS / (launch_ms * len(launches))))
    graph = torch.cuda.CUDAGraph()
    # Autograd runs a backward pass on the stream of its forward pass: that one has to be captured.
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=None if stream == torch.cuda.default_stream() else stream):
        for n in range(count):
            launches[n % len(launches)]()
    replay_ms = min(_times_ms([graph.replay], 2))
    return median(_times_ms([graph.replay], _repetitions(replay_ms, seconds))) / count


def _repetitions(ms: float, seconds: float) -> int:
    return min(MAX_REPETITIONS, max(MIN_REPETITIONS, int(seconds * 1e3 / ms)))


def _times_ms(launches: Sequence[Launch], rotations: int) -> list[float]:
    """Times of each launch, `rotations` times over, queued without waiting in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rotations * len(launches) + 1)]
    torch.cuda.synchronize()
    launches[-1]()  # keeps the GPU busy while the first timed one is queued
    events[0].record()
    for n, event in enumerate(events[1:]):
        launches[n % len(launches)]()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]
