"""Compiles every Triton kernel that the ops launch to machine code for one architecture; no GPU is needed.

Run as `python tests/triton_compile.py 80`, in a process of its own because the test session has the interpreter
switched on. Launches become compilations: the launch functions run on CPU tensors, and each kernel is compiled for
exactly the arguments it would have been launched with. Prints one line per compiled kernel: name, registers and
spilled bytes.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from contract import OpContract, registered_calls
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.nvidia.driver import CudaDriver

from evkernels import backends, triton_kernels
from evkernels.ops.registration import composed_kernels

# float16 differs from bfloat16 in its conversions only; other layouts reach the kernels as copies in one of these.
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")


class _NoDevice(CudaDriver):
    """The CUDA driver without a device: enough of it to compile."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10)


def contracts() -> list[OpContract]:
    """One instance of every op's contract in the test files."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "OpContract)" in path.read_text():
            module = importlib.import_module(path.stem)
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            found += [value() for value in classes if issubclass(value, OpContract) and value.__module__ == path.stem]
    return found


def resources(kernel, architecture: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler reports them."""
    suffix = "a" if architecture >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name=sm_{architecture}{suffix}",
            file.name,
            "-o",
            os.devnull,
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", report))
    return registers, sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def main(architecture: int) -> None:
    triton.runtime.driver.set_active(_NoDevice(architecture))
    compiled = {}

    def compile_instead(kernel, grid):
        def launch(*arguments, **options):
            result = kernel.warmup(*arguments, grid=grid, **options)
            compiled[result.hash] = result

        return launch

    triton.runtime.jit.JITFunction.__getitem__ = compile_instead
    for contract in contracts():
        for dtype in [dtype for dtype in DTYPES if dtype in contract.dtypes] or contract.dtypes[:1]:
            for layout in [layout for layout in LAYOUTS if layout in contract.layouts] or contract.layouts[:1]:
                with backends.use_backend("reference"):
                    arguments = contract.samples(dtype, layout, large=False)[0]
                    calls = registered_calls(contract.op, contract.requiring_grad(arguments))
                for overload, call_arguments in calls:
                    # What is composed of other ops has no kernel of its own: theirs are compiled by their contracts.
                    if overload._opname not in composed_kernels:
                        getattr(triton_kernels, overload._opname)(*call_arguments)
    for kernel in compiled.values():
        registers, spilled = resources(kernel, architecture)
        print(f"sm_{architecture} {kernel.metadata.name}: {registers} registers, {spilled} bytes spilled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
