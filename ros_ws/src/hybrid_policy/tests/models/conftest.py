"""The tiny checkpoint that LeRobot 0.6.1 wrote, and small ones that the tests make."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hybrid_policy.models.config import GemmaConfig, Pi05Config, VisionConfig
from hybrid_policy.models.pi05 import Pi05

FIXTURES = Path(__file__).parent / "fixtures"

torch.set_num_threads(1)


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def tiny() -> Path:
    return FIXTURES / "lerobot_pi05_tiny"


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def randomize(model: Pi05, seed: int = 0) -> Pi05:
    """Every parameter drawn anew: zero-initialised adaptive norms hide errors in time conditioning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_config(kind: str = "pi05", **changes: object) -> Pi05Config:
    return Pi05Config(
        kind=kind,  # type: ignore[arg-type]
        vision=VisionConfig(24, 2, 40, 3, 7),
        prefix=GemmaConfig(32, 3, 48, 6, 2, 8),
        expert=GemmaConfig(20, 3, 28, 4, 2, 8),
        vocab_size=300,
        image_size=30,
        cameras=("front", "wrist", "side"),
        max_action_dim=9,
        action_dim=5,
        max_state_dim=8,
        state_dim=5,
        horizon=6,
        max_token_len=11,
        num_steps=4,
        state_in_prompt=kind == "pi05",
    ).replace(**changes)


@pytest.fixture(params=["pi05", "pi0"])
def small_model(request: pytest.FixtureRequest) -> Pi05:
    return randomize(Pi05(make_config(request.param))).eval()


class Batch:
    """Random inputs of a model: two rows, the second without its middle camera and with a short prompt."""

    def __init__(self, config: Pi05Config, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        views, size = len(config.cameras), config.image_size
        self.images = torch.rand(2, views, 3, size, size, generator=g) * 2 - 1
        self.image_mask = torch.ones(2, views, dtype=torch.bool)
        self.image_mask[1, 1] = False
        self.tokens = torch.randint(1, config.vocab_size, (2, config.max_token_len), generator=g)
        self.token_count = torch.tensor([config.max_token_len, 4])
        self.noise = torch.randn(2, config.horizon, config.max_action_dim, generator=g)
        state = torch.randn(2, config.max_state_dim, generator=g)
        self.state = state if config.kind == "pi0" else None

    @property
    def prefix(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.images, self.image_mask, self.tokens, self.token_count


@pytest.fixture
def make_batch() -> type[Batch]:
    return Batch


@pytest.fixture
def statistics() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    low, high = rng.normal(size=5) - 2, rng.normal(size=5) + 2
    one = {"q01": low, "q99": high, "mean": low + 1, "std": high - low, "min": low - 1, "max": high + 1}
    return {"state": one, "action": {k: v * 2 for k, v in one.items()}}
