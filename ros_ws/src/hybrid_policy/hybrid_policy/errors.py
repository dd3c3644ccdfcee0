"""The one error that bad input gives: it names the thing, the value and what was expected."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Bad input from a user: a file, a parameter or a message that cannot be used.

    ``str(error)`` is one line (or one line a problem), meant to be printed as it is. Command lines
    print it and exit with 2; nodes log it and drop the message or refuse to configure.
    """

    @classmethod
    def at(cls, source: str | Path, key: str, value: object, expected: str) -> InputError:
        """The usual form: ``robot.yaml: joints[3].min: 'low' given, expected a number (rad)``."""
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        return cls(f"{source}: {key}: {shown} given, expected {expected}")
