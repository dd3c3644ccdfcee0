"""CUDA C++ compiled at load by NVRTC, which every CUDA build of torch brings, and launched by the driver.

No toolkit and no compiler need be installed. Launches take the current stream and may be captured; the one option is
programmatic dependent launch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from hybrid_policy.errors import InputError


class CudaError(RuntimeError):
    """A call of the driver or of NVRTC failed; the message names it."""


def kernel_sources(*names: str) -> tuple[Path, ...]:
    """The files of one kernel: ``cuda_common.cu``, which all share, then ``<name>.cu`` each, beside this module."""
    return tuple(Path(__file__).with_name(f"{name}.cu") for name in ("cuda_common", *names))


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library beside torch, else the system's."""
    major = (torch.version.cuda or "0").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    found = [p for root in map(Path, sys.path) for p in sorted(root.glob(f"nvidia/**/libnvrtc.so.{major}"))]
    errors = []
    for name in [*map(str, found), *names, f"/usr/local/cuda/lib64/libnvrtc.so.{major}"]:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise InputError(f"NVRTC {major}: not found (it comes with torch's CUDA wheels): {'; '.join(errors)}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def compile_cubin(source: str, name: str, arch: str, macros: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of ``source`` for ``arch`` (``sm_90``) with integer macros.

    Raises:
        CudaError: the compiler's log.
    """
    lib = _nvrtc()
    program = ctypes.c_void_p()
    _nvrtc_check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), "create")
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-lineinfo", *(f"-D{key}={value}" for key, value in macros)]
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    if lib.nvrtcCompileProgram(program, len(options), array) != 0:
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise CudaError(f"{name}: {log.value.decode(errors='replace')}")
    size = ctypes.c_size_t()
    _nvrtc_check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "cubin size")
    cubin = ctypes.create_string_buffer(size.value)
    _nvrtc_check(lib.nvrtcGetCUBIN(program, cubin), "cubin")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def _nvrtc_check(code: int, what: str) -> None:
    if code != 0:
        raise CudaError(f"NVRTC {what}: error {code}")


def _check(code: int, what: str) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what}: CUDA error {code}, {(text.value or b'?').decode()}")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Kernel:
    """One function of one compiled configuration, on the current device; ``sources`` are read as one file.

    specific: compile for this architecture alone (``sm_90a``), which wgmma and setmaxnreg need.
    prelude: text before the sources.
    """

    def __init__(
        self,
        sources: tuple[Path, ...],
        function: str,
        macros: dict[str, int],
        *,
        threads: int,
        shared: int,
        pdl: bool,
        specific: bool = False,
        prelude: str = "",
    ) -> None:
        torch.cuda.current_stream()  # makes torch's context the current one
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}{'a' if specific else ''}"
        self._module, self._function = _load(
            sources, function, arch, tuple(sorted(macros.items())), torch.cuda.current_device(), prelude
        )
        self._threads, self._shared, self._pdl = threads, shared, pdl
        _check(
            _driver().cuFuncSetAttribute(self._function, _SHARED_LIMIT, shared),
            f"{function}: shared memory {shared}",
        )

    def __call__(self, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """Launch with one structure by value, on the current stream."""
        attribute = _Attribute(id=_PDL)
        attribute.value[0] = 1
        config = _Config(
            grid=(ctypes.c_uint * 3)(grid[0], grid[1], 1),
            block=(ctypes.c_uint * 3)(self._threads, 1, 1),
            shared=self._shared,
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            count=1 if self._pdl else 0,
        )
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, parameters, None), "launch")

    def active_clusters(self, grid: tuple[int, int], cluster: int) -> int:
        """How many clusters of ``cluster`` blocks the empty device holds at once; the kernel declares their size."""
        config = _Config(
            grid=(ctypes.c_uint * 3)(grid[0], grid[1], 1),
            block=(ctypes.c_uint * 3)(self._threads, 1, 1),
            shared=self._shared,
        )
        count = ctypes.c_int()
        code = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self._function, ctypes.byref(config))
        _check(code, f"clusters of {cluster}")
        return count.value


@functools.cache
def _load(
    sources: tuple[Path, ...],
    function: str,
    arch: str,
    macros: tuple[tuple[str, int], ...],
    device: int,
    prelude: str,
) -> tuple[Any, Any]:
    # with the names and lines of the files, for compile errors, sanitizers and profilers
    parts = [f'#line 1 "{source.name}"\n{source.read_text(encoding="utf-8")}' for source in sources]
    text = "\n".join([prelude, *parts])
    cubin = compile_cubin(text, sources[-1].name, arch, macros)
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "module")
    _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, function.encode()), function)
    return module, handle


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors; none on a CPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 0
