"""The engine at full size on a GPU: correctness first, then stage x recipe x views beside the floor.

Weights are random (the time that a product takes does not depend on their values, as long as they are not zeros),
seeded by name, the same for every recipe and for the plain model in float32 that they are compared with.

    python benchmarks/engine.py --out results/          # everything
    python benchmarks/engine.py --quick --profile       # few replays, and where the time goes, kernel by kernel
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import sys
import time
import traceback
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from engine_floor import H100, stage_floors
from hybrid_policy.models.config import PI05_FULL, Pi05Config
from hybrid_policy.models.flow import step_times
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.cuda_backend import CudaBackend, bucket_of, row_buckets
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.loading import choose_table, device_precisions
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import parse_table
from peers import time_realtime_vla

DEVICE = torch.device("cuda")
CASES = {"2x48": (2, 48), "3x200": (3, 200)}
CAMERAS = PI05_FULL.cameras
OFF = RealTimeChunking("off")


def shapes_of(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Pi05(config).named_parameters()}


class RandomWeights:
    """name -> a random tensor on the device, the same at every call: float32, variance 1/K."""

    def __init__(self, config: Pi05Config) -> None:
        self._shapes = shapes_of(config)

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of one parameter."""
        shape = self._shapes[name]
        generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
        x = torch.randn(shape, generator=generator, device=DEVICE)
        if len(shape) > 1:
            fan_in = x[0].numel()
            return x * fan_in**-0.5 * (0.3 if "norm.dense" in name else 1.0)
        return x * 0.05


def observation(config: Pi05Config, seed: int, tokens: int) -> tuple[ModelInputs, np.ndarray]:
    """Random inputs and noise, the same for a seed."""
    random = np.random.default_rng(seed)
    size, views = config.image_size, len(config.cameras)
    ids = np.zeros(config.max_token_len, np.int64)
    ids[:tokens] = random.integers(0, config.vocab_size, tokens)
    inputs = ModelInputs(
        images=random.integers(0, 256, (views, size, size, 3), dtype=np.uint8),
        image_mask=np.ones(views, np.bool_),
        tokens=ids,
        token_count=tokens,
        state=np.zeros(32, np.float32),
        prompt="",
    )
    return inputs, random.standard_normal((config.horizon, config.max_action_dim), dtype=np.float32)


class PlainModel:
    """The module as it is, in one dtype; ``graph`` captures it: a user's straightforward first try."""

    def __init__(self, config: Pi05Config, source: RandomWeights, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            model = Pi05(config)
        for name, _ in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = source(name).to(dtype)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
        self.model = model.eval()
        self.config = config
        times = step_times(config.num_steps)
        with torch.inference_mode():
            t = torch.tensor(times, device=DEVICE)
            self.steps = [m.contiguous() for m in self.model.modulations(t).unbind(1)]

    @torch.inference_mode()
    def run(self, images, tokens, count, noise):
        """Actions [1, H, A] of device tensors."""
        model = self.model
        embedded, valid = model.embed_prefix(images, None, tokens, count)
        cache = model.prefix_cache(embedded, valid)
        x = noise
        for modulation in self.steps:
            x = x - model.velocity(x, None, cache, modulation) / self.config.num_steps
        return x

    def tensors(self, inputs: ModelInputs, noise: np.ndarray):
        """Inputs on the device, the prompt without its padding."""
        n = inputs.token_count
        return (
            torch.from_numpy(inputs.images)[None].to(DEVICE),
            torch.from_numpy(inputs.tokens[:n])[None].to(DEVICE),
            torch.tensor([n], device=DEVICE),
            torch.from_numpy(noise)[None].to(DEVICE),
        )

    def actions(self, inputs: ModelInputs, noise: np.ndarray) -> np.ndarray:
        """Normalised actions [H, A]."""
        return self.run(*self.tensors(inputs, noise))[0].float().cpu().numpy()

    def time_graph(self, inputs: ModelInputs, noise: np.ndarray, replays: int) -> list[float]:
        """Seconds of each replay of the captured model, copies in and out included."""
        static = self.tensors(inputs, noise)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.run(*static)
        host = [t.cpu().pin_memory() for t in static]
        seconds = []
        for _ in range(replays):
            begin = time.perf_counter()
            for device_tensor, host_tensor in zip(static, host, strict=True):
                device_tensor.copy_(host_tensor, non_blocking=True)
            graph.replay()
            out.float().cpu()
            seconds.append(time.perf_counter() - begin)
        return seconds


def bucket(config: Pi05Config, tokens: int) -> tuple[int, ...]:
    """Rows of the one graph that serves prompts of this length."""
    views = len(config.cameras)
    buckets = row_buckets(views, config.image_tokens, config.max_token_len)
    return (bucket_of(buckets, views * config.image_tokens + tokens),)


def make_backend(config, source, recipe_name, *, timing, tokens, stages=""):
    """A captured backend of the recipe at full size, and its site precisions."""
    recipe = load_recipe(recipe_name)
    precisions = device_precisions(recipe, model_sites(config), DEVICE)
    table = choose_table(OFF, recipe, config, precisions, DEVICE) if not stages else parse_table(stages)
    print(f"  {table.describe()}")
    begin = time.perf_counter()
    with torch.inference_mode():
        weights = build_weights(config, source, precisions, dtype=torch.bfloat16, expert=table.expert, pdl=table.pdl)
        torch.cuda.synchronize()
        built = time.perf_counter()
        backend = CudaBackend(
            weights, table, OFF, recipe.prefix_cache, name=recipe_name, timing=timing, buckets=bucket(config, tokens)
        )
    torch.cuda.synchronize()
    print(f"  built in {built - begin:.1f} s, captured in {time.perf_counter() - built:.1f} s", flush=True)
    return backend, precisions


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ms = np.asarray(seconds) * 1e3
    return {f"p{p}": float(np.percentile(ms, p)) for p in (50, 95, 99)} | {"max": float(ms.max())}


def time_backend(backend, config, tokens, replays, warm=20):
    """Seconds of each run, and the median milliseconds of each stage."""
    inputs, noise = observation(config, 1, tokens)
    seconds, stages = [], defaultdict(list)
    gc.collect()
    gc.disable()
    for i in range(replays + warm):
        begin = time.perf_counter()
        _, timings = backend.run(inputs, noise, None)
        if i >= warm:
            seconds.append(time.perf_counter() - begin)
            for name, value in timings.items():
                stages[name].append(value)
    gc.enable()
    return seconds, {name: float(np.median(values)) * 1e3 for name, values in stages.items()}


def time_graph(backend, config, tokens, replays) -> list[float]:
    """Seconds on the device of each replay of the one graph, with the copies in it, without what the host adds."""
    inputs, noise = observation(config, 1, tokens)
    backend.run(inputs, noise, None)
    graph = next(iter(backend._graphs.values())).parts[0]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    with torch.cuda.stream(backend._stream):
        for begin, end in events:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def profile(backend, config, tokens, top=28):
    """Device time of each kernel of one inference, from the profiler; PDL makes neighbours overlap."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as run_profile

    inputs, noise = observation(config, 1, tokens)
    backend.run(inputs, noise, None)
    with run_profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(3):
            backend.run(inputs, noise, None)
        torch.cuda.synchronize()
    rows = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
    total = sum(e.device_time_total for e in rows) / 3
    print(f"  kernels: {total / 1e3:.3f} ms in sum")
    for e in rows[:top]:
        each = e.device_time_total / e.count
        print(f"  {e.device_time_total / 3e3:8.3f} ms {e.count // 3:5d} x {each:8.2f} us  {e.key[:110]}")
    sys.stdout.flush()


def free() -> None:
    """Give cached device memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def fidelity(expected: dict[int, np.ndarray], backend, config, tokens) -> dict[str, float]:
    """Cosine and relative error of the actions against the plain model in float32; whether replays agree."""
    cosines, errors = [], []
    for seed, reference in expected.items():
        inputs, noise = observation(config, seed, tokens)
        ours = backend.run(inputs, noise, None)[0].astype(np.float64)
        ref = reference.astype(np.float64)
        cosines.append(float((ours * ref).sum() / np.linalg.norm(ours) / np.linalg.norm(ref)))
        errors.append(float(np.linalg.norm(ours - ref) / np.linalg.norm(ref)))
    again = [backend.run(*observation(config, 0, tokens), None)[0] for _ in range(3)]
    return {
        "cosine_min": min(cosines),
        "cosine_mean": float(np.mean(cosines)),
        "error_mean": float(np.mean(errors)),
        "error_max": max(errors),
        "bit_identical": all(np.array_equal(again[0], a) for a in again),
    }


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="bf16,seed,fp8,h100")
    parser.add_argument("--cases", default="2x48,3x200")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--observations", type=int, default=64, help="for the fidelity; 0 leaves it out")
    parser.add_argument("--stages", default="", help="stage table, e.g. expert=split or plain")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--baseline", action="store_true", help="the straightforward graph too")
    parser.add_argument(
        "--realtime-vla", type=Path, metavar="FOLDER", help="its pi05_infer.py and pi0_infer.py: timed too"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.replays, args.observations = 100, min(args.observations, 4)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, object]] = []
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    for case in args.cases.split(","):
        views, tokens = CASES[case]
        config = PI05_FULL.replace(cameras=CAMERAS[:views])
        source = RandomWeights(config)
        expected: dict[int, np.ndarray] = {}
        if args.observations:
            plain = PlainModel(config, source, torch.float32)
            for seed in range(args.observations if case == "2x48" else min(4, args.observations)):
                expected[seed] = plain.actions(*observation(config, seed, tokens))
            del plain
            free()
        if args.baseline:
            try:
                plain = PlainModel(config, source, torch.bfloat16)
                inputs, noise = observation(config, 1, tokens)
                timed = percentiles(plain.time_graph(inputs, noise, min(args.replays, 200)))
                rows.append({"case": case, "recipe": "straightforward bf16 graph", **timed})
                print(f"{case} straightforward bf16 graph {timed}", flush=True)
                del plain
            except Exception:
                traceback.print_exc()
            free()
        for recipe in args.recipes.split(","):
            print(f"{case} {recipe}", flush=True)
            try:
                rows.append(measure(config, source, recipe, case, tokens, views, expected, args))
                print("  " + json.dumps(rows[-1]), flush=True)
                if args.out:  # after each row: what is measured is kept, whatever comes
                    write(args.out, rows, device)
            except Exception:
                traceback.print_exc()
            free()
        if args.realtime_vla:
            try:
                timed = percentiles(time_realtime_vla(args.realtime_vla, views, tokens, config.horizon, args.replays))
                rows.append({"case": case, "recipe": "realtime-vla", **timed})
                print("  " + json.dumps(rows[-1]), flush=True)
                if args.out:
                    write(args.out, rows, device)
            except Exception:
                traceback.print_exc()
            free()
    print_table(rows)
    return 0


def measure(config, source, recipe, case, tokens, views, expected, args) -> dict[str, object]:
    """One row of the table."""
    free()
    base = torch.cuda.memory_reserved()
    backend, precisions = make_backend(config, source, recipe, timing=True, stages=args.stages, tokens=tokens)
    row: dict[str, object] = {"case": case, "recipe": recipe}
    if expected:
        row |= fidelity(expected, backend, config, tokens)
    _, stages = time_backend(backend, config, tokens, min(args.replays, 150))
    row |= {f"{name}_ms": value for name, value in stages.items()}
    floors = stage_floors(config, precisions, views, tokens, H100)
    row |= {f"{name}_floor_ms": value * 1e3 for name, value in floors.items()}
    if args.profile:
        profile(backend, config, tokens)
    weights, table = backend.model.weights, backend.model.table
    backend.close()
    del backend
    free()
    recipe_file = load_recipe(recipe)
    with torch.inference_mode():
        one = CudaBackend(
            weights, table, OFF, recipe_file.prefix_cache, name=recipe, timing=False, buckets=bucket(config, tokens)
        )
    seconds, _ = time_backend(one, config, tokens, args.replays)
    row |= percentiles(seconds)
    row |= {f"device_{key}": value for key, value in percentiles(time_graph(one, config, tokens, args.replays)).items()}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    row["allocated_gb"] = torch.cuda.memory_allocated() / 1e9
    row["reserved_gb"] = (torch.cuda.memory_reserved() - base) / 1e9
    one.close()
    return row


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows, briefly."""
    columns = [
        "case", "recipe", "p50", "p99", "max", "device_p50", "device_p99",
        "vision_ms", "vision_floor_ms", "prefix_ms", "prefix_floor_ms",
        "denoise_ms", "denoise_floor_ms", "allocated_gb", "reserved_gb", "cosine_min", "error_mean", "error_max",
        "bit_identical",
    ]  # fmt: skip
    print("\n" + " | ".join(columns))
    for row in rows:
        cells = [row.get(c, "") for c in columns]
        print(" | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))


def write(out: Path, rows: list[dict[str, object]], device: str) -> None:
    """engine.json and engine.csv in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / "engine.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (out / "engine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*about, *keys])
        writer.writeheader()
        writer.writerows({**about, **row} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
