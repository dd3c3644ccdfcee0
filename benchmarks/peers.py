"""Other engines beside ours, from a copy of their source that the user brings; nothing of it is kept here."""

from __future__ import annotations

import importlib
import sys
import time
import types
from pathlib import Path

import torch


def time_realtime_vla(source: Path, views: int, tokens: int, horizon: int, replays: int) -> list[float]:
    """Seconds of each inference of realtime-vla (github.com/Dexmal/realtime-vla), page-locked copies included.

    source: a folder with its ``pi05_infer.py`` and ``pi0_infer.py``. Weights are random, as ours: its own are
    uninitialised memory without a checkpoint.
    """
    if "transformers" not in sys.modules:
        try:
            importlib.import_module("transformers")
        except ImportError:  # it asks for a tokenizer's class by name, and for a tokenizer only where prompts are text
            stand_in = types.ModuleType("transformers")
            stand_in.AutoTokenizer = None  # type: ignore[attr-defined]
            sys.modules["transformers"] = stand_in
    sys.path.insert(0, str(source))
    try:
        peer = importlib.import_module("pi05_infer")
    finally:
        sys.path.remove(str(source))
    prompt = torch.randn(tokens, 2048, dtype=torch.bfloat16)
    with torch.inference_mode():
        model = peer.Pi05Inference({"language_embeds": prompt}, views, horizon, discrete_state_input=False)
        for weight in model.weights.values():
            if weight.is_floating_point():
                weight.normal_(std=weight.shape[-2] ** -0.5 if weight.dim() > 1 else 0.02)
        images = torch.randn(views, 224, 224, 3).bfloat16().pin_memory()
        noise = torch.randn(horizon, 32).bfloat16().pin_memory()
        seconds = []
        for _ in range(replays + 3):
            begin = time.perf_counter()
            out = model.forward(images.to("cuda", non_blocking=True), noise.to("cuda", non_blocking=True))
            out.float().cpu()
            seconds.append(time.perf_counter() - begin)
    return seconds[3:]
