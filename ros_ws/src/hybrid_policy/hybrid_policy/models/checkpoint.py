"""Checkpoints in: LeRobot's and openpi's directories, and our own, which is LeRobot's with ``dims.json``.

``open_checkpoint`` maps and checks everything and reads no weight; ``load_checkpoint`` builds the model,
tensor by tensor, straight on the device in the wanted dtype. The host never holds more than the tensor
being copied.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint_config import (
    EMBEDDING,
    HEAD,
    UNUSED_HEAD,
    Description,
    canonical,
    describe,
)
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.observation import PolicySpec
from hybrid_policy.models.pi05 import Pi05, keeps_float32
from hybrid_policy.models.processors import Processors
from hybrid_policy.models.processors_in import read_processors
from hybrid_policy.models.skeleton import skeleton
from hybrid_policy.models.tensor_files import TensorStore

#: ModelOpt's list of quantised layers, beside the weights
QUANT_CONFIG = "hf_quant_config.json"

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A checked checkpoint of which no weight has been read.

    names: canonical name (the model's parameter) -> name in the files.
    notes: what the user may want to know and need not change.
    """

    directory: Path
    description: Description
    processors: Processors
    store: TensorStore
    names: dict[str, str]
    packed_sites: frozenset[str] = field(default_factory=frozenset)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Pi05Config:
        """Every dimension."""
        return self.description.config

    @property
    def spec(self) -> PolicySpec:
        """What a robot file is held against."""
        config = self.config
        return PolicySpec(
            name=self.directory.resolve().name,
            cameras=config.cameras,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            max_action_dim=config.max_action_dim,
            horizon=config.horizon,
        )

    def tensor(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One tensor by its canonical name, copied straight to ``device`` in ``dtype``."""
        return self.store.load(self.names[name], torch.device(device), dtype)

    def sites(self) -> list[str]:
        """Every linear layer by its checkpoint name, in the order of the model."""
        model = _skeleton(self.config, self.directory)
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def tensors(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every parameter one after the other; norms and time stay float32 (``keeps_float32``)."""
        for name in self.names:
            yield name, self.tensor(name, device, torch.float32 if keeps_float32(name) else dtype)


@dataclass
class LoadedPolicy:
    """A model with what surrounds it."""

    model: Pi05
    config: Pi05Config
    processors: Processors
    spec: PolicySpec
    checkpoint: Checkpoint


def open_checkpoint(
    path: str | Path, tokenizer: str | Path | None = None, packed_sites: Collection[str] = ()
) -> Checkpoint:
    """Map a checkpoint directory and check all that can be checked without reading weights.

    Args:
        path: the directory.
        tokenizer: a ``.model`` or ``tokenizer.json``, where the directory has none.
        packed_sites: linear layers that the caller loads itself (quantised); their tensors, but for a bias, are
            neither checked nor listed.

    Raises:
        InputError: one error that names the file and lists every missing, unexpected or misshapen tensor.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise InputError(f"{directory}: not a checkpoint directory")
    if not packed_sites and (directory / QUANT_CONFIG).exists():
        raise InputError(
            f"{directory / QUANT_CONFIG}: a quantised checkpoint; the engine runs it, this needs plain "
            "weights (verify the checkpoint that it was made from)"
        )
    store = TensorStore.open(directory)
    packed = frozenset(packed_sites)
    held = _canonical_names(store, packed)
    shapes = {name: store.info(stored).shape for name, stored in held.items()}
    description = describe(directory, shapes)
    names = _match(directory, store, held, description, packed)
    processors = read_processors(directory, description, tokenizer)
    description = dataclasses.replace(description, config=processors.config)
    notes = _notes(store, held)
    for note in notes:
        log.warning("%s: %s", directory, note)
    return Checkpoint(directory, description, processors, store, names, packed, notes)


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
    packed_sites: Collection[str] = (),
) -> LoadedPolicy:
    """Build the model of a checkpoint directory on ``device``.

    Transformers are in ``dtype``; norms, time and action projections stay float32. Parameters do not
    require gradients (``model.requires_grad_()`` to train further). ``packed_sites`` stay on the meta
    device, for the caller to replace.

    Raises:
        InputError: see ``open_checkpoint``; or a weight that is not finite.
    """
    checkpoint = open_checkpoint(path, tokenizer, packed_sites)
    model = _skeleton(checkpoint.config, checkpoint.directory)
    for name, tensor in checkpoint.tensors(device, dtype):
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    return LoadedPolicy(model.eval(), checkpoint.config, checkpoint.processors, checkpoint.spec, checkpoint)


def _skeleton(config: Pi05Config, directory: Path) -> Pi05:
    """The model on the meta device: names and shapes, no data."""
    try:
        return skeleton(config)
    except RuntimeError as error:  # dimensions whose product no tensor can have
        raise InputError(f"{directory}: dimensions that no model can have: {error}") from error


def _of_packed(name: str, packed: frozenset[str]) -> bool:
    """Whether a tensor is the caller's to load: a packed site's, but for its bias, which is as it always is."""
    owner, _, leaf = name.rpartition(".")
    return owner in packed and leaf != "bias"


def _canonical_names(store: TensorStore, packed: frozenset[str]) -> dict[str, str]:
    """Canonical name -> stored name, without packed sites and the head that nothing uses."""
    held: dict[str, str] = {}
    for stored in store:
        name = canonical(stored)
        if _of_packed(name, packed):
            continue
        if name in held:
            raise InputError(f"{store.info(stored).file}: {stored} and {held[name]} name the same tensor")
        held[name] = stored
    return held


def _match(
    directory: Path,
    store: TensorStore,
    held: dict[str, str],
    description: Description,
    packed: frozenset[str],
) -> dict[str, str]:
    """Parameter -> stored name, every difference listed in one error."""
    model = _skeleton(description.config, directory)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wanted = {name: shape for name, shape in wanted.items() if not _of_packed(name, packed)}
    problems: list[str] = []
    names: dict[str, str] = {}
    if HEAD in held and EMBEDDING in held:
        head, embedding = store.info(held[HEAD]), store.info(held[EMBEDDING])
        if head.shape != embedding.shape or head.dtype != embedding.dtype:
            problems.append(f"{HEAD}: {head.shape} {head.dtype}, but tied to {embedding.shape} {embedding.dtype}")
    for name, shape in wanted.items():
        stored = held.get(name, held.get(HEAD) if name == EMBEDDING else None)
        if stored is None:
            problems.append(f"{name}: missing, expected {shape}")
            continue
        info = store.info(stored)
        if info.shape != shape:
            problems.append(f"{name}: {info.shape} given, expected {shape}")
        if not info.floating:
            problems.append(f"{name}: {info.dtype} given, expected F32, BF16, F16 or F64")
        names[name] = stored
    problems += [f"{name}: unexpected" for name in held if name not in wanted and name not in (HEAD, UNUSED_HEAD)]
    if problems:
        wrong = f"{len(problems)} of {len(wanted)} tensors"
        hint = ""
        if len(problems) > len(wanted) // 4:
            hint = "\n  (many differ: does dims.json give this checkpoint's dimensions?)"
        files = ", ".join(sorted({file.path.name for file in store.files}))
        raise InputError(f"{directory} ({files}): {wrong} do not fit:\n  " + "\n  ".join(problems) + hint)
    return names


def _notes(store: TensorStore, held: dict[str, str]) -> list[str]:
    """Things that are worth a line and no error.

    LeRobot's training leaves the head behind while the embedding learns; its loader takes the embedding
    where a file has both, and so do we. The two are compared at their beginning, middle and end.
    """
    if HEAD not in held or EMBEDDING not in held:
        return []
    head, embedding = (store.read(held[n]).view(torch.uint8).flatten() for n in (HEAD, EMBEDDING))
    piece, size = 1 << 20, head.numel()
    starts = {0, size // 2, max(0, size - piece)}
    if all(torch.equal(head[i : i + piece], embedding[i : i + piece]) for i in starts):
        return []
    return [f"{HEAD} differs from {EMBEDDING}; the latter is used, as LeRobot does"]
