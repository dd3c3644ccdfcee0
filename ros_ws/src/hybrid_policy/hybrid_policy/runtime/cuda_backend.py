"""The engine on a GPU: inputs in by one copy, captured graphs, actions out by one copy."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.device_model import DeviceModel
from hybrid_policy.runtime.device_weights import DeviceWeights
from hybrid_policy.runtime.input_blob import InputBlob
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.stages import StageTable

log = logging.getLogger(__name__)

# The expert's loop kernel holds the device's multiprocessors and waits for all of its own blocks: two at once, of two
# engines in one process (a shadow check), could each hold some and wait for ever. So engines of a device take turns.
_TURNS: dict[int, threading.Lock] = defaultdict(threading.Lock)

CACHE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def row_buckets(views: int, image_tokens: int, max_token_len: int, step: int = 48) -> tuple[int, ...]:
    """How many prefix rows the captured graphs compute: all views, and prompts in steps of 48 tokens.

    Any graph serves any prompt that fits; the smallest that fits is replayed.
    """
    lengths = [*range(step, max_token_len, step), max_token_len]
    return tuple(views * image_tokens + length for length in lengths)


def bucket_of(buckets: tuple[int, ...], rows: int) -> int:
    """The smallest of `row_buckets` that takes so many prefix rows."""
    return next(bucket for bucket in buckets if bucket >= rows)


@dataclass
class _Graphs:
    """One graph for all, or one a stage where stages are timed."""

    parts: tuple[torch.cuda.CUDAGraph, ...]


class CudaBackend:
    """Owns the device's buffers and graphs of one engine."""

    def __init__(
        self,
        weights: DeviceWeights,
        table: StageTable,
        rtc: RealTimeChunking,
        cache: str,
        *,
        name: str,
        timing: bool = True,
        float_images: bool = False,
        buckets: tuple[int, ...] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        config = weights.config
        device = weights.embedding.device
        self._device = device
        self._timing = timing
        views = len(config.cameras)
        self._blob = InputBlob(config, views, device, float_images=float_images)
        self.model = DeviceModel(weights, table, rtc, CACHE_DTYPES[cache], views)
        self._out = torch.zeros(self.model.x.shape, dtype=torch.float32, pin_memory=True)
        self._out_view = self._out.numpy()
        self._buckets = buckets or row_buckets(views, config.image_tokens, config.max_token_len)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._stream = torch.cuda.Stream(device)
        properties = torch.cuda.get_device_properties(device)
        routes = "; ".join(f"{part}: {route}" for part, route in sorted(weights.routes.items()))
        self._description = (
            f"cuda: {properties.name} (sm_{properties.major}{properties.minor}), recipe {name}, stages: "
            f"{table.describe()}; {routes}"
        )
        # graphs never run at once and share nothing but the model's buffers, so their scratch may overlap
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = {rows: self._capture(rows, report) for rows in self._buckets}

    @property
    def description(self) -> str:
        """Device, stages and routes."""
        return self._description

    def memory_bytes(self) -> int:
        """What the caching allocator holds for tensors and graphs."""
        return torch.cuda.memory_allocated(self._device)

    def close(self) -> None:
        """Drop graphs and weights."""
        self._graphs.clear()
        del self.model
        torch.cuda.empty_cache()

    def run(
        self, inputs: ModelInputs, noise: NDArray[np.float32], guidance: Guidance | None
    ) -> tuple[NDArray[np.float32], Mapping[str, float]]:
        """See `Backend.run`; on the calling thread's current stream. Stages are empty where timing is off."""
        rows = self._blob.fill(inputs, noise, guidance)
        graphs = self._graphs[bucket_of(self._buckets, rows)]
        with _TURNS[self._device.index or 0]:
            # Graphs run on whatever stream is current: to change it and back, and to wait for an event, took 70 us.
            # What torch is asked comes behind the launch, where it can.
            if self._timing:
                stream = torch.cuda.current_stream(self._device)
                self._events[0].record(stream)
                for part, event in zip(graphs.parts, self._events[1:], strict=True):
                    part.replay()
                    event.record(stream)
            else:
                graphs.parts[0].replay()
            torch.cuda.current_stream(self._device).synchronize()
        result = self._out_view.copy()
        if not self._timing:
            return result, {}
        seconds = [a.elapsed_time(b) * 1e-3 for a, b in zip(self._events, self._events[1:])]
        return result, dict(zip(("vision", "prefix", "denoise"), seconds, strict=True))

    def _capture(self, rows: int, report: Callable[[str], None]) -> _Graphs:
        model, inputs = self.model, self._blob.inputs

        def vision() -> None:
            self._blob.send()
            model.run_vision(inputs)

        def prefix() -> None:
            model.run_prefix(inputs, rows)

        def denoise() -> None:
            model.run_denoise(inputs)
            self._out.copy_(model.x, non_blocking=True)

        stages = (vision, prefix, denoise)
        inputs.valid.fill_(rows)
        with _TURNS[self._device.index or 0], torch.cuda.stream(self._stream), torch.inference_mode():
            for stage in stages:  # compiles kernels, fills library handles and workspaces
                stage()
            self._stream.synchronize()
            parts = []
            for group in [(s,) for s in stages] if self._timing else [stages]:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    for stage in group:
                        stage()
                parts.append(graph)
        report(f"graph of {rows} rows")
        return _Graphs(tuple(parts))
