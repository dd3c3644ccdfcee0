"""Time GPU calls inside a CUDA graph, over rotated inputs, by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_time_us(calls: Sequence[Callable[[], object]], *, replays: int = 25, least_calls: int = 24) -> float:
    """Median microseconds of one call.

    ``calls`` are the same computation on different weights (enough sets that they do not fit the L2 cache); they are
    captured one after another in one graph, the round repeated until it holds at least ``least_calls``. The median is
    over replays. Buffers are allocated and kernels compiled by a first, uncaptured round.
    """
    rounds = max(1, -(-least_calls // len(calls)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000.0 / (rounds * len(calls)))
    return statistics.median(times)


def weight_sets(bytes_each: int, *, least: int = 3, l2_bytes: int = 50 * 2**20) -> int:
    """How many sets of ``bytes_each`` are rotated: at least three, and more than twice the L2 cache together."""
    return max(least, -(-2 * l2_bytes // max(bytes_each, 1)) + 1)
