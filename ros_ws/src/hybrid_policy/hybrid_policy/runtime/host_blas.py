"""The matrix products of the CPU's backend: PyTorch's, or numpy's OpenBLAS where PyTorch's are MKL's on another
maker's processor.

MKL is tuned for Intel's processors. On an EPYC with two inferences at once, one of
the shipped policy took 0.84 to 0.91 of the time with OpenBLAS (medians, interleaved). With more than one thread
PyTorch's are taken, so that one pool of threads serves everything. What is taken follows from processor,
installation and threads, never from a timing: the same machine gives the same bits each time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: what OpenBLAS calls it, by how it was built: numpy's wheels, then a distribution's
_SETTERS = tuple(f"{before}openblas_set_num_threads{after}" for before in ("scipy_", "") for after in ("64_", ""))
#: parts of paths of wheels that carry an OpenBLAS of their own, which numpy does not use
_OTHERS = ("opencv", "cv2", "scipy.libs", "torch")


def matmul(a: Floats, b: Floats, out: Floats) -> None:
    """a [..., M, K] times b [..., K, N] into ``out``; any of them may be a transpose or a slice."""
    if by_numpy():
        np.matmul(a, b, out=out)
    else:
        torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def affine(x: Floats, weight: Floats, bias: Floats | None, out: Floats) -> None:
    """x [M, K] times weight [K, N] (+ bias [N]) into ``out``."""
    if by_numpy():
        np.matmul(x, weight, out=out)
        if bias is not None:
            out += bias
        return
    given, result = torch.from_numpy(x), torch.from_numpy(out)
    if bias is None:
        torch.mm(given, torch.from_numpy(weight), out=result)
    else:
        torch.addmm(torch.from_numpy(bias), given, torch.from_numpy(weight), out=result)


def keep_to_one_thread() -> None:
    """Let numpy's products run in the calling thread, where they may be taken; OpenBLAS would take every core."""
    if _better_by_numpy():
        for setter in _openblas():
            setter(1)


def name() -> str:
    """Whose products they are."""
    return "numpy's OpenBLAS" if by_numpy() else "PyTorch's BLAS"


def by_numpy() -> bool:
    """Whether numpy's products are taken."""
    return torch.get_num_threads() == 1 and _better_by_numpy()


@lru_cache(maxsize=1)
def _better_by_numpy() -> bool:
    """Whether PyTorch has MKL, the processor is not Intel's, and numpy has an OpenBLAS whose threads can be set."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return False
    return "GenuineIntel" not in processor and bool(_openblas())


@lru_cache(maxsize=1)
def _openblas() -> tuple[Callable[[int], None], ...]:
    """What sets the number of threads of each OpenBLAS that this process has loaded for numpy."""
    try:
        mapped = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ()
    paths = {line[line.index("/") :] for line in mapped if "blas" in line and "/" in line}
    found: list[Callable[[int], None]] = []
    for path in sorted(path for path in paths if not any(other in path for other in _OTHERS)):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        known = next((known for known in _SETTERS if hasattr(library, known)), None)
        if known is not None:
            setter = getattr(library, known)
            setter.argtypes, setter.restype = [ctypes.c_int], None
            found.append(setter)
    return tuple(found)
