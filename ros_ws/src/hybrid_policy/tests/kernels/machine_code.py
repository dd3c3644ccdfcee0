"""Kernels as machine code, without a GPU: what CUDA C++ compiles to, and how long its loop is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(folder, sources, macros, *, prelude="", epilogue="", arch="90a", most_stack=0):
    """The cubin's path; without a stack (of more bytes), without products that wait for each other, without writes to
    registers that products under way read."""
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text("\n".join([prelude, *(part.read_text() for part in sources), epilogue]))
    command = ["nvcc", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-Xptxas", "-v"]
    command += [f"-D{key}={value}" for key, value in macros.items()] + ["-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(int, re.findall(r"(\d+) bytes stack frame", done.stderr))) <= most_stack
    assert "serialized" not in done.stderr
    assert "Potential Performance Loss" not in done.stderr
    assert arch != "90a" or overwritten_operands(disassembled(cubin)) == []
    return cubin


def disassembled(cubin):
    """A line an instruction."""
    return subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout


def instructions_and_loops(code):
    """Instructions, and the loops as pairs (first, last) of their places."""
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
            loops.append((labels[target.group(1)], index))
    return instructions, loops


def loop_instructions(code):
    """Instructions of the smallest loop that holds the most tensor-core instructions."""
    instructions, loops = instructions_and_loops(code)
    bodies = (instructions[first : last + 1] for first, last in loops)
    return min((-sum("MMA" in text for text in body), len(body)) for body in bodies)[1]


def overwritten_operands(code):
    """Instructions that write a register which a product under way reads.

    The assembler minds such registers up to the next branch alone, and the hardware not at all. Followed in the order
    of the text, and each loop twice over.
    """
    instructions, loops = instructions_and_loops(code)
    bodies = [instructions, *(2 * instructions[first : last + 1] for first, last in loops)]
    found = []
    for body in bodies:
        groups, current = [], set()  # registers read by committed groups, oldest first; by the one that is open
        for text in body:
            if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", text):
                groups = groups[max(0, len(groups) - int(wait.group(1), 16)) :]
            elif "GMMA" in text:
                if operand := re.search(r"GMMA\S* R\d+, R(\d+), gdesc", text):
                    current |= set(range(int(operand.group(1)), int(operand.group(1)) + 4))
                if "gsb0" in text:
                    groups.append(current)
                    current = set()
            elif written := re.match(r"(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+) (?:P\d, )?R(\d+)\b", text):
                width = 4 if ".128" in written.group(1) else 2 if re.search(r"\.64|WIDE|CS2R", written.group(1)) else 1
                place = int(written.group(2))
                stores = re.match(r"ST|RED|ATOM|SYNCS|BAR|R2UR|MATCH|ISETP|FSETP", written.group(1))
                if not stores and set(range(place, place + width)) & current.union(*groups):
                    found.append(text)
    return found
