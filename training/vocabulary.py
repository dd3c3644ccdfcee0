"""The small policy's tokenizer: words of the prompts, and the state's numbers apart for each joint.

pi0.5 writes the state as numbers from 0 to 255 into the prompt. In a large language model one token
serves a number wherever it stands; a small network trained from nothing learns far quicker when the
fourth joint's 17 is another token than the fifth's. The tokenizer marks the k-th number after ``State:``
with a private character (k-th of the Unicode private use area) and looks up ``mark + number``. It is an
ordinary tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hybrid_policy.sim.scene import COLOURS
from hybrid_policy.sim.tasks import PROMPTS
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

BINS = 256
_MARK = 0xE000  # private use area

SPECIAL = ["<pad>", "<bos>", "<unk>"]
BEGIN = 1


def words() -> list[str]:
    """Every word of the prompts, ``Task:`` and ``Action:`` among them, sorted."""
    found = {"task", "action"}
    for phrase in PROMPTS:
        found |= {word for colour in COLOURS for word in phrase.format(colour).split()}
    # words that users are likely to say; they cost one row each
    found |= {"get", "me", "please", "box", "fetch", "move", "put", "down", "hold", "a", "and", "to"}
    return sorted(found)


def mark(joint: int) -> str:
    """The private character of the state's k-th number."""
    return chr(_MARK + joint)


def _phrases() -> list[normalizers.Normalizer]:
    """A phrase that was not trained on becomes ``pick up the <colour> cube``, where it names a colour.

    A network of this size knows the phrases that it was trained with and no other English.
    """
    colours = "|".join(COLOURS)
    known = "|".join(phrase.format(f"(?:{colours})") for phrase in PROMPTS)
    told = "|".join(f"(?<=^task: pick up the {colour})" for colour in COLOURS)
    return [
        normalizers.Replace(
            Regex(rf"^task: (?!(?:{known})(?:, state|$)).*?(?=\b(?:{colours})\b)"), "task: pick up the "
        ),
        normalizers.Replace(Regex(rf"(?:{told})(?! (?:cube|block)(?:, state|$)).*?(?=, state|$)"), " cube"),
    ]


def build(state_dim: int) -> Tokenizer:
    """The tokenizer for a state of ``state_dim`` numbers."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words()])}
    for joint in range(state_dim):
        for number in [*range(BINS), -1]:  # a state below the statistics' range gives -1
            vocabulary[f"{mark(joint)}{number}"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    steps: list[normalizers.Normalizer] = [
        normalizers.Lowercase(),
        *_phrases(),
        normalizers.Replace(Regex(r",?\s*state:\s*"), mark(0)),
    ]
    for joint in range(1, state_dim):
        before = mark(joint - 1)
        ends = "|".join(f"(?<={before}{digits})" for digits in (r"-1", r"\d", r"\d\d", r"\d\d\d"))
        steps.append(normalizers.Replace(Regex(rf"(?:{ends}) "), mark(joint)))
    tokenizer.normalizer = normalizers.Sequence(steps)
    marks = f"[{mark(0)}-{mark(state_dim - 1)}]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[\s;:,.!?]+|(?={marks})"), behavior="removed"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair=None, special_tokens=[("<bos>", BEGIN)]
    )
    return tokenizer


class PromptIds:
    """Token ids of prompts and state bins by table lookup: the tokenizer's, for many rows at once."""

    def __init__(self, tokenizer: Tokenizer, state_dim: int, length: int) -> None:
        vocabulary = tokenizer.get_vocab()
        self.length = length
        self._action = vocabulary["action"]
        self._numbers = np.array([[vocabulary[f"{mark(j)}{n}"] for n in [*range(BINS), -1]] for j in range(state_dim)])
        self._prompts: dict[str, list[int]] = {}
        self._tokenizer = tokenizer

    def __call__(self, prompts: list[str], bins: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompts and bins [n, state_dim] (-1 allowed) -> ids [n, length], right-padded, and counts [n]."""
        ids = np.zeros((len(prompts), self.length), np.int64)
        counts = np.zeros(len(prompts), np.int64)
        joints = np.arange(bins.shape[1])
        numbers = self._numbers[joints, bins]  # -1 is the last column
        for row, prompt in enumerate(prompts):
            if prompt not in self._prompts:
                self._prompts[prompt] = self._tokenizer.encode(f"Task: {prompt}").ids
            head = self._prompts[prompt]
            count = len(head) + bins.shape[1] + 1
            ids[row, : len(head)] = head
            ids[row, len(head) : count - 1] = numbers[row]
            ids[row, count - 1] = self._action
            counts[row] = count
        return ids, counts


def smooth_rows(tokenizer: Tokenizer, state_dim: int, width: int, seed: int) -> dict[int, NDArray[np.float32]]:
    """First embeddings of the state's numbers: near numbers near each other, each joint on its own.

    A joint's number n is a random projection of the cosines of (n / 256) pi f, f = 0...7, with weights
    1 / (1 + f); rows have the standard deviation of the model's other embeddings (width ** -0.5).
    """
    random = np.random.default_rng(seed)
    vocabulary = tokenizer.get_vocab()
    rows = {}
    for joint in range(state_dim):
        projection = random.standard_normal((8, width)) / (1.0 + np.arange(8)[:, None])
        for number in [*range(BINS), -1]:
            wave = np.cos(np.pi * np.arange(8) * (number + 0.5) / BINS)
            row = wave @ projection
            rows[vocabulary[f"{mark(joint)}{number}"]] = row / row.std() * width**-0.5
    return {token: row.astype(np.float32) for token, row in rows.items()}


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json on few lines, the same bytes for the same tokenizer."""
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=True, separators=(",", ":")) + "\n")
