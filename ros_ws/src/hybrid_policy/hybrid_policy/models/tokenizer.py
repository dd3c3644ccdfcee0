"""Tokenizers: a SentencePiece ``.model`` (PaliGemma's, which the user supplies) or a ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hybrid_policy.errors import InputError

#: looked for in a checkpoint directory, in this order
NAMES = ("tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model")

ABSENT = (
    "no tokenizer: expected {names} in {directory}, or the parameter `tokenizer`. pi0.5's is PaliGemma's: "
    "paligemma_tokenizer.model from https://storage.googleapis.com/big_vision/paligemma_tokenizer.model, or "
    "tokenizer.json of https://huggingface.co/google/paligemma-3b-pt-224 (after accepting Google's licence); "
    "put the file into the checkpoint directory."
)


class Tokenizer(Protocol):
    """Text to token ids."""

    path: Path

    @property
    def size(self) -> int:
        """Ids are below this."""
        ...

    def encode(self, text: str, newline_apart: bool = False) -> list[int]:
        """Ids with the beginning-of-sequence token first; ``newline_apart`` adds a newline, encoded alone."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model, used as openpi uses it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self.size = int(self._model.vocab_size())
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not a SentencePiece model: {error}") from error

    def encode(self, text: str, newline_apart: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        ids = list(self._model.encode(text, add_bos=True))
        return ids + list(self._model.encode("\n")) if newline_apart else ids


class JsonTokenizer:
    """A ``tokenizer.json``; its own post-processor adds the beginning-of-sequence token, if it has one."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a tokenizer.json: {error}") from error
        self._model.no_padding()
        self._model.no_truncation()
        self.size = int(self._model.get_vocab_size())

    def encode(self, text: str, newline_apart: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        ids = list(self._model.encode(text).ids)
        return ids + list(self._model.encode("\n", add_special_tokens=False).ids) if newline_apart else ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer file by its suffix: ``.model`` or ``.json``.

    Raises:
        InputError: no such file, another suffix, or broken.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{file}: no such tokenizer file")
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    if file.suffix == ".json":
        return JsonTokenizer(file)
    raise InputError(f"{file}: expected a SentencePiece .model or a tokenizer.json")


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's own tokenizer, or None."""
    for name in NAMES:
        if (directory / name).is_file():
            return load_tokenizer(directory / name)
    return None


def absent(directory: Path) -> str:
    """What to tell the user who has none."""
    return ABSENT.format(names=" or ".join(NAMES), directory=directory)
