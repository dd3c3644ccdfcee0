"""Which OpenGL MuJoCo renders with, chosen before ``mujoco`` is imported.

MuJoCo reads ``MUJOCO_GL`` once, when it is imported, so everything in this room imports it through
:func:`load_mujoco`.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import logging
import os
import subprocess
import sys
from typing import Any

from hybrid_policy.errors import InputError

_LOG = logging.getLogger(__name__)
_PROBE = "import mujoco; c = mujoco.GLContext(16, 16); c.make_current(); c.free()"


def _works(backend: str) -> bool:
    """Whether a context of this kind opens, tried in another process (a failed one cannot be undone)."""
    library = {"egl": "EGL", "osmesa": "OSMesa"}[backend]
    if ctypes.util.find_library(library) is None:
        return False
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60, check=False
    )
    return probe.returncode == 0


def choose_gl() -> str:
    """Set ``MUJOCO_GL`` to what works here (EGL, else OSMesa) and return it; a value given is respected.

    Raises:
        InputError: neither opens; the message names the package to install.
    """
    given = os.environ.get("MUJOCO_GL")
    if given:
        return given
    for backend in ("egl", "osmesa"):
        if _works(backend):
            os.environ["MUJOCO_GL"] = backend
            _LOG.info("rendering with MUJOCO_GL=%s (set MUJOCO_GL to choose another)", backend)
            return backend
    raise InputError(
        "MUJOCO_GL: neither egl nor osmesa opens an off-screen context here, expected one of them: "
        "install Mesa (Debian, Ubuntu: apt install libegl1 libgl1-mesa-dri, or libosmesa6)"
    )


def load_mujoco() -> Any:
    """The ``mujoco`` module, imported after the OpenGL has been chosen.

    Raises:
        InputError: MuJoCo is not installed, or no OpenGL works.
    """
    if "mujoco" not in sys.modules:
        if importlib.util.find_spec("mujoco") is None:
            raise InputError("mujoco: not installed, expected the simulator (pip install mujoco==3.8.1)")
        choose_gl()
        if importlib.util.find_spec("triton") is not None:
            # Mesa and Triton each bring an LLVM: a process that has rendered crashes when it then loads Triton,
            # while the other order works. So whoever renders has Triton loaded first.
            importlib.import_module("triton")
    return importlib.import_module("mujoco")
