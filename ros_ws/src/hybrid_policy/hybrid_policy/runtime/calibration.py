"""Static activation scales and weight importance from observations: bags, npz files, or made-up ones.

Static FP8 scales spare the search for a row's largest value; dynamic ones follow every input. The default is
dynamic; a calibrated checkpoint carries ``input_scale`` for its FP8 sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import Checkpoint, load_checkpoint
from hybrid_policy.models.observation import Observation

E4M3_MAX = 448.0


@dataclass
class ActivationStatistics:
    """Of one site's inputs: largest magnitude, and mean square of each of the K inputs."""

    largest: float = 0.0
    squares: Tensor | None = None
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Count in activations [..., K]."""
        flat = x.detach().float().flatten(0, -2)
        self.largest = max(self.largest, float(flat.abs().max()))
        total = flat.square().sum(0)
        self.squares = total if self.squares is None else self.squares + total
        self.rows += flat.shape[0]

    @property
    def input_scale(self) -> Tensor:
        """float32 []: largest / 448."""
        return torch.tensor(self.largest / E4M3_MAX if self.largest > 0 else 1.0)

    @property
    def importance(self) -> Tensor:
        """float32 [K]: mean square, the diagonal of the Hessian of the site's squared error."""
        assert self.squares is not None
        return self.squares / max(1, self.rows)


@dataclass
class Calibration:
    """Statistics of every site over ``observations`` inferences."""

    statistics: dict[str, ActivationStatistics] = field(default_factory=dict)
    observations: int = 0

    def input_scales(self, precisions: dict[str, str]) -> dict[str, Tensor]:
        """Static scales of the FP8 sites."""
        return {
            s: self.statistics[s].input_scale for s, p in precisions.items() if p == "fp8_w8a8" and s in self.statistics
        }

    def importances(self) -> dict[str, Tensor]:
        """Site -> float32 [K]."""
        return {site: statistics.importance for site, statistics in self.statistics.items()}


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    sites: Iterable[str],
    observations: Iterable[Observation],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Calibration:
    """Run the plain model over observations and keep what each site's inputs look like.

    Raises:
        InputError: no observation, or one that does not fit the checkpoint.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    policy = load_checkpoint(checkpoint.directory, dtype, device)
    policy.processors = checkpoint.processors
    result = Calibration({site: ActivationStatistics() for site in sites})
    handles = []
    for site, statistics in result.statistics.items():
        module = policy.model.get_submodule(site)
        assert isinstance(module, nn.Linear)
        handles.append(module.register_forward_pre_hook(lambda _, args, s=statistics: s.add(args[0].cpu())))
    random = np.random.default_rng(seed)
    config = policy.config
    for observation in observations:
        inputs = policy.processors.prepare(observation)
        noise = random.standard_normal((1, config.horizon, config.max_action_dim), dtype=np.float32)

        def tensor(values: object) -> Tensor:
            return torch.as_tensor(np.asarray(values), device=device)[None]

        policy.model.sample_actions(
            tensor(inputs.images),
            tensor(inputs.image_mask),
            tensor(inputs.tokens),
            tensor(inputs.token_count),
            torch.from_numpy(noise).to(device),
            state=tensor(inputs.state) if config.kind == "pi0" else None,
        )
        result.observations += 1
        step()
    for handle in handles:
        handle.remove()
    if not result.observations:
        raise InputError("calibration: no observation given, expected at least one")
    # the last prefix layer's queries and MLP never run: they get no static scale
    result.statistics = {site: s for site, s in result.statistics.items() if s.rows}
    return result


def read_observations(path: Path, limit: int) -> Iterator[Observation]:
    """Observations from an ``.npz`` file or a folder of them, evenly spaced where there are more than ``limit``.

    A file holds ``state`` [state_dim], ``prompt`` and one uint8 [H, W, 3] image a camera as ``image.<camera>``;
    ``write_observation`` makes one.

    Raises:
        InputError: no such file, or one that lacks a part.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"{path}: no observations (.npz), expected a file or a folder of them")
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, min(limit, len(files)))})
    for index in chosen:
        file = files[index]
        try:
            with np.load(file, allow_pickle=False) as held:
                images = {k.removeprefix("image."): held[k] for k in held.files if k.startswith("image.")}
                yield Observation(images, held["state"].astype(np.float32), str(held["prompt"]))
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{file}: not an observation: {error}") from error


def write_observation(path: Path, observation: Observation) -> None:
    """Write what `read_observations` reads."""
    images = {f"image.{name}": image for name, image in observation.images.items()}
    np.savez_compressed(path, state=observation.state, prompt=np.array(observation.prompt), **images)  # type: ignore[arg-type]


def made_up_observations(checkpoint: Checkpoint, count: int, seed: int = 0) -> Iterator[Observation]:
    """Smooth random images and states within the statistics' range, for where there are no real ones."""
    random = np.random.default_rng(seed)
    config = checkpoint.config
    for _ in range(count):
        images = {}
        for camera in config.cameras:
            coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            images[camera] = coarse.repeat(config.image_size // 8 + 1, 0).repeat(config.image_size // 8 + 1, 1)
        normalisation = checkpoint.processors.state
        unit = random.uniform(-1, 1, config.state_dim)
        state = unit if normalisation is None else normalisation.unnormalize(unit)
        yield Observation(images, np.asarray(state, np.float32), "pick up the object")
