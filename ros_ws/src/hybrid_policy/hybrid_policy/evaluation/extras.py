"""What evaluation needs beyond the package's own requirements, asked for by name before any work."""

from __future__ import annotations

import importlib.util

from hybrid_policy.errors import InputError


def require(*modules: str) -> None:
    """Check that the modules of the extra ``eval`` are installed.

    Raises:
        InputError: one is not; the message says how to get it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; pip install 'hybrid_policy[eval]'")
