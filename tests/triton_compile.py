"""Compiles every Triton kernel that the ops launch to machine code for one architecture; no GPU is needed.

Run as `python tests/triton_compile.py 80`, in a process of its own because the test session has the interpreter
switched on. Launches become compilations: the launch functions run on CPU tensors, and each kernel is compiled for
exactly the arguments it would have been launched with, on all cores: Triton's and NVIDIA's compilers, which take nearly
all of the time, run beside Python. Prints one line of JSON per compiled kernel, a `Compiled`.

Each is compiled for float32 in one layout with one tile and for bfloat16 in the other with all tiles that tuning may
pick; with EVKERNELS_CHECK_ALL_GPUS=1 (`make gpu-check`) for every dtype, layout, precision and tile, in twice the time.

What is compiled for odd sizes and sizes of 1 has another beginning, Triton's own form, which all of it is read in. What
Triton's and NVIDIA's compilers go on to make of that is what they make of even sizes, with more registers: without
EVKERNELS_CHECK_ALL_GPUS=1 they do so where a kernel's budget says that few are left.
"""

import importlib
import itertools
import json
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent))

import gpu_resources
import torch
import triton
from contract import OpContract, registered_calls
from triton_code import NoDevice, matrix_instruction, narrow_products, resources, widest_access

from evkernels import backends, triton_kernels
from evkernels.ops.registration import composed_kernels

# float16 differs from bfloat16 in its conversions only; other layouts reach the kernels as copies in one of these.
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
# The architecture that gets sizes which Triton compiles in: it does so before it knows the architecture, so that one is
# enough.
FOR_ODD_SIZES = 90
# Of 255 registers. Kernels that are allowed as many may spill at odd sizes alone.
MANY_REGISTERS = 200


def contracts() -> list[OpContract]:
    """One instance of every op's contract in the test files."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "OpContract)" in path.read_text():
            module = importlib.import_module(path.stem)
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            found += [value() for value in classes if issubclass(value, OpContract) and value.__module__ == path.stem]
    return found


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel takes and does; what is not compiled to machine code has the last of it alone."""

    kernel: str
    dtype: str  # of the op's arguments
    typical: bool  # compiled for sizes of real networks
    narrow: list[str]  # 32-bit products that reach an address
    threads: int = 0
    registers: int = 0  # per thread
    local: int = 0  # bytes of local memory per thread: where registers spill to
    shared: int = 0  # bytes per block
    widest: int = 0  # bytes of the widest access to global memory by one thread
    matrix: str = ""  # the instruction of the matrix units, or nothing


class _Stages(threading.local):
    """Triton's hook that changes the stages of a compilation, and what it is to do with those of this thread."""

    is_whole = True

    def __call__(self, backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:
            key = "" if self.is_whole else "without machine code"
            return key, key
        if not self.is_whole:
            # Triton's own form of the kernel is the last.
            for stage in list(stages)[list(stages).index("ttgir") + 1 :]:
                del stages[stage]
            # What Triton insists on having in the end.
            stages["cubin"] = lambda module, metadata: metadata.update(name="", shared=0) or b""


def main(architecture: int, is_thorough: bool) -> None:
    triton.runtime.driver.set_active(NoDevice(architecture))
    compilers = ThreadPoolExecutor(os.cpu_count())
    started: list[Future] = []
    hook = triton.knobs.runtime.add_stages_inspection_hook = _Stages()
    budgets = gpu_resources.budgets()["triton"]
    now = {"dtype": "", "typical": False}

    def compile_one(function, arguments, options: dict, is_whole: bool, kind: dict) -> tuple[str, Compiled]:
        hook.is_whole = is_whole
        result = function.warmup(*arguments, grid=(1,), **options)
        return result.hash, read(result, function.__name__, **kind)

    def compile_instead(kernel, grid):
        def launch(*arguments, **options):
            tiles = [config.all_kwargs() for config in kernel.configs] if hasattr(kernel, "configs") else [{}]
            # Sizes that are none of a network's need not be tried with every tile. The matrix units depend on it.
            tiles = tiles if now["typical"] and (is_thorough or now["dtype"] == "bfloat16") else tiles[:1]
            function = kernel.fn if hasattr(kernel, "configs") else kernel
            registers = budgets.get(function.__name__, {}).get("registers", {}).get(f"sm_{architecture}", 0)
            is_whole = is_thorough or now["typical"] or registers >= MANY_REGISTERS
            for tile in tiles:
                started.append(
                    compilers.submit(compile_one, function, arguments, {**options, **tile}, is_whole, now.copy())
                )

        return launch

    triton.runtime.jit.KernelInterface.__getitem__ = compile_instead
    launch_all(architecture, is_thorough, now)
    compilers.shutdown()
    compiled: dict[str, Compiled] = {}
    for future in started:
        compiled.setdefault(*future.result())
    for kernel in compiled.values():
        print(json.dumps(asdict(kernel)))


def launch_all(architecture: int, is_thorough: bool, now: dict) -> None:
    """Launches the kernels of all ops; `now` says what for."""
    for contract in contracts():
        dtypes = [dtype for dtype in DTYPES if dtype in contract.dtypes] or contract.dtypes[:1]
        layouts = [layout for layout in LAYOUTS if layout in contract.layouts] or contract.layouts[:1]
        two_kinds = dict.fromkeys([(dtypes[0], layouts[-1]), (dtypes[-1], layouts[0])])
        for dtype, layout in itertools.product(dtypes, layouts) if is_thorough else two_kinds:
            now.update(dtype=str(dtype).removeprefix("torch."), typical=True)
            precisions = contract.precisions if dtype == torch.float32 else ("highest",)
            for precision in precisions if is_thorough else precisions[:1]:
                torch.set_float32_matmul_precision(precision)
                for arguments in contract.typical(dtype, layout):
                    compile_calls(contract, arguments)
        torch.set_float32_matmul_precision("highest")
        # An odd size, and sizes of 1.
        now.update(dtype=str(dtypes[0]).removeprefix("torch."), typical=False)
        for layout in layouts[: len(layouts) if is_thorough else 1] if architecture == FOR_ODD_SIZES else ():
            for arguments in contract.samples(dtypes[0], layout, large=False)[:2]:
                compile_calls(contract, arguments)


def read(result, kernel: str, dtype: str, typical: bool) -> Compiled:
    """What can be read off a compilation."""
    found = Compiled(kernel, dtype, typical, narrow_products(result.asm["ttir"]))
    if not result.asm["cubin"]:
        return found
    return replace(
        found,
        threads=32 * result.metadata.num_warps,
        **resources(result.asm["cubin"]),
        shared=result.metadata.shared,
        widest=widest_access(result.asm["ptx"]),
        matrix=matrix_instruction(result.asm["ptx"]),
    )


def compile_calls(contract: OpContract, arguments: tuple) -> None:
    with backends.use_backend("reference"):
        calls = registered_calls(contract.op, contract.requiring_grad(arguments))
    for overload, call_arguments in calls:
        launch = getattr(triton_kernels, overload._opname, None)
        # What is composed of other ops has no kernel of its own: theirs are compiled by their contracts.
        if launch or overload._opname not in composed_kernels:
            launch(*call_arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), is_thorough=os.environ.get("EVKERNELS_CHECK_ALL_GPUS") == "1")
