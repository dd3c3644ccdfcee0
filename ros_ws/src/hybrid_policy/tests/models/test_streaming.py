"""Loading streams: the host holds one tensor at a time, not the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from hybrid_policy.models.checkpoint_writer import _dims, _lerobot_config
from hybrid_policy.models.config import GemmaConfig, Pi05Config, VisionConfig
from hybrid_policy.models.pi05 import Pi05

SCRIPT = """
import resource, sys, torch
from hybrid_policy.models.checkpoint import open_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
checkpoint = open_checkpoint(sys.argv[1])
before, read = peak(), 0
for name, tensor in checkpoint.tensors("cpu", torch.bfloat16):
    info = checkpoint.store.info(checkpoint.names[name])
    read += info.end - info.begin
print(int(peak() - before), read >> 20)
"""


def sparse_checkpoint(folder: Path, config: Pi05Config, bytes_each: int = 4) -> None:
    """A whole checkpoint of zeros that takes no space on disk."""
    with torch.device("meta"):
        model = Pi05(config)
    header, at = {}, 0
    for name, parameter in model.named_parameters():
        end = at + parameter.numel() * bytes_each
        header["model." + name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(_lerobot_config(config, "quantiles", [], None)))
    (folder / "dims.json").write_text(json.dumps(_dims(config)))


def test_the_host_holds_one_tensor_at_a_time(tmp_path) -> None:
    config = Pi05Config(
        vision=VisionConfig(64, 1, 64, 1, 14),
        prefix=GemmaConfig(256, 6, 8192, 1, 1, 64),
        expert=GemmaConfig(64, 6, 64, 1, 1, 64),
        vocab_size=1000,
        cameras=("a",),
    )
    sparse_checkpoint(tmp_path, config)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, read = (int(word) for word in done.stdout.split())
    largest = 8192 * 256 * 4 >> 20
    assert read > 140
    assert grown < 6 * largest  # one tensor, and a piece of it mapped and checked; a whole load would be `read`
