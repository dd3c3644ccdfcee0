"""Kernels as machine code, without a GPU: what CUDA C++ compiles to, and how long its loop is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(folder, sources, macros, *, prelude="", epilogue="", arch="90a"):
    """The cubin's path; without a stack, without spills, without products that wait for each other."""
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text("\n".join([prelude, *(part.read_text() for part in sources), epilogue]))
    command = ["nvcc", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-Xptxas", "-v"]
    command += [f"-D{key}={value}" for key, value in macros.items()] + ["-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "serialized" not in done.stderr
    assert "Potential Performance Loss" not in done.stderr
    return cubin


def disassembled(cubin):
    """A line an instruction."""
    return subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout


def loop_instructions(code):
    """Instructions of the smallest loop that holds the most tensor-core instructions."""
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1))
    loops = []
    for index, text in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", text)
        if target and labels.get(target.group(1), index) < index:
            body = instructions[labels[target.group(1)] : index + 1]
            loops.append((-sum("MMA" in t for t in body), len(body)))
    return min(loops)[1]
