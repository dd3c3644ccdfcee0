"""Where the package's own files lie: robot files, recipes, profiles, the shipped checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hybrid_policy.errors import InputError


def share_path(relative: str) -> Path:
    """The package's file or folder ``relative``, e.g. ``config/robots/sim_aloha.yaml``.

    Looked for in the source tree (editable installs), the environment's ``share/hybrid_policy``
    (pip) and every prefix of ``AMENT_PREFIX_PATH`` (colcon), in this order.

    Raises:
        InputError: it is in none of them.
    """
    roots = [Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "hybrid_policy"]
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    roots += [Path(prefix) / "share" / "hybrid_policy" for prefix in prefixes if prefix]
    for root in roots:
        if (root / relative).exists():
            return root / relative
    looked = ", ".join(str(root) for root in roots)
    raise InputError(f"{relative}: not found among the package's files (looked in {looked})")


def resolve(name_or_path: str, folder: str, suffix: str = ".yaml") -> Path:
    """A user's file, or one of ours by its name: ``seed`` -> ``config/recipes/seed.yaml``.

    Raises:
        InputError: neither exists; the message lists the names that ship.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    shipped = share_path(folder)
    if (shipped / f"{name_or_path}{suffix}").exists():
        return shipped / f"{name_or_path}{suffix}"
    names = ", ".join(sorted(p.name.removesuffix(suffix) for p in shipped.glob(f"*{suffix or ''}")))
    raise InputError(f"{name_or_path}: no such file, and not one of the names in {folder}: {names}")
