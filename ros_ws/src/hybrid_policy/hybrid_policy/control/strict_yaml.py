"""Reading YAML strictly: duplicate, unknown and missing keys and wrong types are errors that say where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_policy.errors import InputError

_REQUIRED: Any = object()


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        InputError: it cannot be read, is not YAML, gives a key twice or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected a YAML file") from None
    try:
        document = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise InputError.at(path, "top level", document, "a mapping of keys")
    return document


class Section:
    """One mapping of a file, whose keys are taken one by one; :meth:`end` refuses those left over."""

    def __init__(self, values: Any, source: Path, key: str, optional: bool = False) -> None:
        if values is None and optional:
            values = {}
        if not isinstance(values, dict):
            raise InputError.at(source, key, values, "a mapping of keys")
        self._values, self.source, self._key = dict(values), source, key
        self._known: list[str] = []

    def path(self, key: str) -> str:
        """The full name of a key, e.g. ``joints[3].min``."""
        return f"{self._key}.{key}" if self._key else key

    def error(self, key: str, value: object, expected: str) -> InputError:
        """An error about one key of this section."""
        return InputError.at(self.source, self.path(key), value, expected)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, expected: str, default: Any = _REQUIRED) -> Any:
        """The raw value; the default, or an error, where the key is missing."""
        self._known.append(key)
        if key in self._values:
            return self._values.pop(key)
        if default is _REQUIRED:
            raise InputError(f"{self.source}: {self.path(key)}: missing, expected {expected}")
        return default

    def text(self, key: str, default: Any = _REQUIRED, choices: Sequence[str] = ()) -> str:
        """Non-empty text, one of ``choices`` where they are given; an empty default is allowed."""
        expected = " or ".join(choices) if choices else "text"
        value = self.take(key, expected, default)
        if value is default:
            return value
        if not isinstance(value, str) or not value.strip() or (choices and value not in choices):
            raise self.error(key, value, expected)
        return value

    def number(self, key: str, default: Any = _REQUIRED, above: float = -math.inf, least: float = -math.inf) -> float:
        """A finite number above (or at least) a bound."""
        expected = "a number"
        if above > -math.inf:
            expected = f"a number above {above:g}"
        elif least > -math.inf:
            expected = f"a number of at least {least:g}"
        value = self.take(key, expected, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, value, expected)
        if value <= above or value < least:
            raise self.error(key, value, expected)
        return float(value)

    def names(self, key: str, default: Any = _REQUIRED, choices: Sequence[str] = ()) -> tuple[str, ...]:
        """A list of different names, each one of ``choices`` where they are given."""
        expected = "a list of different names" + (f" of {', '.join(choices)}" if choices else "")
        value = self.take(key, expected, default)
        if value is default:
            return value
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise self.error(key, value, expected)
        for name in value:
            if choices and name not in choices:
                raise self.error(key, name, f"one of {', '.join(choices)}")
            if value.count(name) > 1:
                raise self.error(key, name, "each name once")
        return tuple(value)

    def section(self, key: str, optional: bool = False) -> Section:
        """A mapping below this one; empty where it is optional and missing."""
        value = self.take(key, "a mapping of keys", None if optional else _REQUIRED)
        return Section(value, self.source, self.path(key), optional)

    def sections(self, key: str) -> Iterator[Section]:
        """A non-empty list of mappings below this one."""
        value = self.take(key, "a list of mappings")
        if not isinstance(value, list) or not value:
            raise self.error(key, value, "a list of mappings")
        for index, item in enumerate(value):
            yield Section(item, self.source, f"{self.path(key)}[{index}]")

    def items(self) -> Iterator[tuple[str, Section]]:
        """Every key of this section with the mapping it holds."""
        for key in list(self._values):
            yield key, self.section(key)

    def end(self) -> None:
        """Refuse keys that nobody took."""
        for key, value in self._values.items():
            raise self.error(key, value, f"one of the keys {', '.join(self._known)}")
