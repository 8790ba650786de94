"""Every Triton kernel compiles to machine code for the served architectures and keeps to its budget."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_resources
import pytest
from gpu_resources import Resources

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_spills(architecture, tmp_path):
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "EVKERNELS_BACKEND": "reference"}
    process = subprocess.run(
        [sys.executable, str(script), str(architecture)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    found: dict[tuple[str, int], Resources] = {}
    for name, registers, spilled in re.findall(
        r"^sm_\d+ (\w+): (\d+) registers, (\d+) bytes spilled$", process.stdout, re.MULTILINE
    ):
        resources = Resources(int(registers), spilled=int(spilled))
        found[name, architecture] = resources.largest(found.get((name, architecture), Resources()))
    assert ("lstm_gates_forward_kernel", architecture) in found
    assert {key: resources.spilled for key, resources in found.items() if resources.spilled} == {}
    budgets = gpu_resources.budgets()
    version = budgets["versions"]["triton"]
    if not triton.__version__.startswith(f"{version}."):
        pytest.skip(f"no spills; the budgets are those of triton {version}, this is {triton.__version__}")
    assert gpu_resources.exceeded(found, budgets["triton"]) == []
