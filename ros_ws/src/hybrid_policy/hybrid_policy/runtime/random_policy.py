"""A small random policy for a robot: what runs until a trained checkpoint is there, and what tests run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from hybrid_policy.models.checkpoint_writer import save_checkpoint
from hybrid_policy.models.config import Pi05Config, small_config
from hybrid_policy.models.pi05 import Pi05


def random_checkpoint(
    directory: str | Path,
    *,
    cameras: Sequence[str],
    state_range: Sequence[tuple[float, float]],
    action_range: Sequence[tuple[float, float]],
    horizon: int = 16,
    num_steps: int = 5,
    seed: int = 0,
    config: Pi05Config | None = None,
) -> Path:
    """Write a checkpoint directory of random weights with a byte tokenizer; about 10 M parameters.

    Args:
        directory: made if need be.
        cameras: the policy's camera names.
        state_range, action_range: (low, high) of each dimension in the checkpoint's units; the policy's actions
            lie in and somewhat around ``action_range``.
        horizon, num_steps: actions of a chunk, flow steps.
        config: other dimensions than the small ones; cameras and sizes are taken from the arguments.

    Returns:
        The directory.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = small_config(
            cameras=tuple(cameras),
            state_dim=len(state_range),
            action_dim=len(action_range),
            vocab_size=512,
            horizon=horizon,
            num_steps=num_steps,
            max_token_len=256,
        )
    torch.manual_seed(seed)
    model = Pi05(config)
    randomise(model, seed)
    tokenizer = folder / "tokenizer.json"
    byte_tokenizer(tokenizer)
    statistics = {
        key: {"q01": [low for low, _ in limits], "q99": [high for _, high in limits]}
        for key, limits in (("state", state_range), ("action", action_range))
    }
    save_checkpoint(folder, model, config, statistics, tokenizer)
    return folder


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: matrices with variance 1/K, vectors small; adaptive norms too, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            scale = fan_in**-0.5 * (0.3 if "norm.dense" in name else 1.0)
        else:
            scale = 0.05
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def byte_tokenizer(path: Path) -> None:
    """A tokenizer.json that gives each byte a token, with <bos> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    path.write_text(json.dumps(json.loads(tokenizer.to_str())), encoding="utf-8")
