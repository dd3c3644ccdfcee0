"""The golden cases of a tiny random policy that LeRobot 0.6.1 itself wrote (models/fixtures)."""

from pathlib import Path

import numpy as np
from hybrid_policy.models.processors import ModelInputs
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent.parent / "models" / "fixtures" / "lerobot_pi05_tiny"
CASES = (0, 1, 2)


def golden_case(i: int) -> tuple[ModelInputs, np.ndarray, np.ndarray]:
    """Inputs (float images in [-1, 1]), noise [16, 32] and actions [16, 7] of one case."""
    held = {k.removeprefix(f"{i}."): v for k, v in load_file(GOLDEN / "golden.safetensors").items() if k[0] == str(i)}
    images = np.stack([held[f"observation.images.cam{c}"][0] for c in range(2)]) * 2 - 1
    count = int(held["observation.language.attention_mask"].sum())
    inputs = ModelInputs(
        images=images.astype(np.float32),
        image_mask=np.ones(2, np.bool_),
        tokens=held["observation.language.tokens"][0],
        token_count=count,
        state=np.zeros(32, np.float32),
        prompt="",
    )
    return inputs, held["noise"][0], held["actions"][0]
