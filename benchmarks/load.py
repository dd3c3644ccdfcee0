"""Load to first action at full size: a checkpoint of random weights on a local disk, a fresh process a recipe.

    python benchmarks/load.py --folder /tmp/full --recipes bf16,h100 --out results/

The checkpoint (bf16, 6.7 GB) is written once; before each load its pages are dropped from the operating system's cache,
so that they come from the disk. The clock starts before the process does: imports, reading, packing, compiling the
kernels and capturing every prompt length's graph are in it, until the first actions are on the host.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import json, sys, time
start = float(sys.argv[3])
import numpy as np
from hybrid_policy.models.observation import Observation
from hybrid_policy.runtime.engine import Engine
import torch
if torch.cuda.is_available():
    torch.cuda.init()
imported = time.time()
engine = Engine.from_checkpoint(sys.argv[1], sys.argv[2], "auto", timing=False, progress=True)
loaded = time.time()
spec = engine.spec
images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in spec.cameras}
chunk = engine.infer(Observation(images=images, state=np.zeros(spec.state_dim, np.float32), prompt="pick up the cube"))
first = time.time()
print(json.dumps({"imports_s": imported - start, "load_s": loaded - imported, "first_action_s": first - loaded,
    "total_s": first - start, "allocated_gb": torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0,
    "finite": bool(np.isfinite(chunk.actions).all())}))
"""


def write_checkpoint(folder: Path, *, small: bool = False) -> None:
    """Random weights, drawn on the GPU where there is one, under the names that our checkpoints have."""
    import torch
    from hybrid_policy.models.checkpoint_writer import save_checkpoint
    from hybrid_policy.models.config import PI05_FULL, small_config
    from hybrid_policy.models.pi05 import Pi05
    from hybrid_policy.runtime.random_policy import byte_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = PI05_FULL.replace(cameras=PI05_FULL.cameras[:2], state_dim=7, action_dim=7)
    if small:
        config = small_config(cameras=config.cameras, state_dim=7, action_dim=7, vocab_size=512, max_token_len=256)
    with torch.device("meta"):
        model = Pi05(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 400
        value *= fan_in**-0.5 * (0.3 if "norm.dense" in name else 1.0)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(folder / "tokenizer.json")
    statistics = {key: {"q01": [-1.0] * 7, "q99": [1.0] * 7} for key in ("state", "action")}
    save_checkpoint(folder, model, config, statistics, folder / "tokenizer.json", dtype=torch.bfloat16)


def drop_from_cache(folder: Path) -> None:
    """Written out, and no longer in the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(path: Path) -> float:
    """Bytes/s of reading the first GB, not cached."""
    begin, count = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while count < 1 << 30 and (block := file.read(1 << 24)):
            count += len(block)
    return count / (time.perf_counter() - begin)


def main() -> int:
    """Write, then load in one process after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/hybrid_policy_full"), help="where there are 7 GB")
    parser.add_argument("--recipes", default="bf16,h100")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a policy of 10 M parameters, to try this script")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    args = parser.parse_args()
    if not (args.folder / "model.safetensors").exists():
        begin = time.perf_counter()
        # in a process of its own: this one must hold neither the weights nor the device
        command = [sys.executable, __file__, "--write", str(args.folder), *(["small"] if args.small else [])]
        subprocess.run(command, check=True)
        print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
    weights = args.folder / "model.safetensors"
    drop_from_cache(args.folder)
    about = {"gigabytes": weights.stat().st_size / 1e9, "disk_gb_per_s": disk_rate(weights) / 1e9}
    rows = []
    for recipe in args.recipes.split(","):
        drop_from_cache(args.folder)
        command = [sys.executable, "-c", CHILD, str(args.folder), recipe, str(time.time())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(f"{recipe}: exit {done.returncode}", flush=True)
            continue
        rows.append({"recipe": recipe, **json.loads(done.stdout.splitlines()[-1]), **about})
        print(json.dumps(rows[-1]), flush=True)
    if args.out and rows:
        import torch

        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "load.csv").open("w", newline="") as file:
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            device = {"device": name, "date": time.strftime("%Y-%m-%d")}
            writer = csv.DictWriter(file, [*rows[0], *device])
            writer.writeheader()
            writer.writerows({**row, **device} for row in rows)
    if not args.keep:
        shutil.rmtree(args.folder)
    return 0 if rows else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]), small=sys.argv[3:] == ["small"])
        sys.exit(0)
    sys.exit(main())
