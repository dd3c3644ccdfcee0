"""Runs this folder's kernel tests in Triton's interpreter, in a process of its own: its switch is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: test_glue_interpreted.py does the same for the kernels between the products.
FILES = ["test_stream_kernels.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on already")
@pytest.mark.parametrize("file", FILES)
def test_kernels_pass_in_the_interpreter(file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        str(Path(__file__).with_name(file)),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
