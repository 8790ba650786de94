"""Every Triton kernel compiles to machine code for the served architectures, without spilling registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_spills(architecture, tmp_path):
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "EVKERNELS_BACKEND": "reference"}
    process = subprocess.run(
        [sys.executable, str(script), str(architecture)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    kernels = re.findall(r"^sm_\d+ (\w+): (\d+) registers, (\d+) bytes spilled$", process.stdout, re.MULTILINE)
    assert {"lstm_gates_forward_kernel", "lstm_gates_backward_kernel"} <= {name for name, _, _ in kernels}
    assert [line for line in kernels if line[2] != "0"] == []
