"""Every Triton kernel compiles to machine code and keeps to its budget: on sm_90, in `make gpu-check` on all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_resources
import pytest
from emulation import build
from gpu_resources import Resources

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module", params=map(int, build.ARCHITECTURES), ids=lambda architecture: f"sm_{architecture}")
def compiled(request, tmp_path_factory):
    """The architecture, and what was compiled for it: one dictionary per kernel and kind of arguments."""
    # Test processes that run side by side share the minutes that it takes.
    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    folder = session / f"triton_sm_{request.param}"
    with build.locked(folder):
        output = folder / "output"
        if not output.exists():
            output.write_text(compile_all(request.param))
    kernels = [json.loads(line) for line in output.read_text().splitlines()]
    assert {"lstm_gates_forward_kernel", "conv_lstm_1x1_sequence_kernel"} <= {kernel["kernel"] for kernel in kernels}
    return request.param, kernels


def compile_all(architecture: int) -> str:
    """The lines of triton_compile.py."""
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "EVKERNELS_BACKEND": "reference"}
    process = subprocess.run(
        [sys.executable, str(script), str(architecture)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    # Triton warns where a launch leaves the fusion of a * b + c to a default that changes.
    assert "fp_fusion" not in process.stderr.lower()
    return process.stdout


def test_hardly_spills(compiled):
    """Triton has its assembler trade up to four registers for local memory: the budgets say in which kernels."""
    _, kernels = compiled
    assert [kernel for kernel in kernels if kernel["local"] > 16] == []


def test_addresses_are_computed_in_64_bits(compiled):
    """Tensors of more than 2^31 elements cannot be tried here; their addresses can be read off the compiled kernels."""
    _, kernels = compiled
    assert [(kernel["kernel"], kernel["narrow"]) for kernel in kernels if kernel["narrow"]] == []


def test_keeps_to_budgets(compiled):
    architecture, kernels = compiled
    budgets = gpu_resources.budgets()
    version = budgets["versions"]["triton"]
    if not triton.__version__.startswith(f"{version}."):
        pytest.skip(f"the budgets are those of triton {version}, this is {triton.__version__}")
    assert exceeded(measured(kernels, architecture), architecture, budgets["triton"]) == []


def measured(kernels: list[dict], architecture: int) -> dict[str, dict]:
    """Per kernel the most registers, spilled and shared bytes and the least occupancy of all its compilations.

    And of those for sizes of real networks: the least of the widest accesses to memory, where there are others without
    bfloat16, and the instructions of the matrix units for bfloat16.
    """
    found = {}
    for name in sorted({kernel["kernel"] for kernel in kernels}):
        mine = [kernel for kernel in kernels if kernel["kernel"] == name and kernel["threads"]]
        typical = [kernel for kernel in mine if kernel["typical"]]
        wide = [kernel for kernel in typical if kernel["dtype"] != "bfloat16"]
        found[name] = {
            "registers": max(kernel["registers"] for kernel in mine),
            "local": max(kernel["local"] for kernel in mine),
            "shared": max(kernel["shared"] for kernel in mine),
            "occupancy": min(occupancy(kernel, architecture) for kernel in mine),
            "access": min(kernel["widest"] for kernel in wide or typical),
            # The last step of a gradient has no product.
            "matrix": " ".join(
                sorted({kernel["matrix"] for kernel in typical if kernel["dtype"] == "bfloat16"} - {""})
            ),
        }
    return found


def occupancy(kernel: dict, architecture: int) -> int:
    """Per cent of a multiprocessor's threads."""
    resources = Resources(kernel["registers"], kernel["shared"])
    return round(100 * gpu_resources.occupancy(resources, kernel["threads"], architecture))


def exceeded(found: dict[str, dict], architecture: int, allowed: dict[str, dict]) -> list[str]:
    """One line for every figure that is worse than its budget, and every kernel without a budget or the reverse."""
    lines = [f"{name}: no budget in {gpu_resources.BUDGETS.name}" for name in sorted(found.keys() - allowed.keys())]
    lines += [f"{name}: has a budget and does not exist" for name in sorted(allowed.keys() - found.keys())]
    for name in sorted(found.keys() & allowed.keys()):
        for figure, value in found[name].items():
            limit = allowed[name].get(figure, 0 if figure == "local" else "")
            limit = limit[f"sm_{architecture}"] if isinstance(limit, dict) else limit
            if figure == "matrix":
                wrong, kind = value != limit, "by"
            elif figure in ("registers", "local", "shared"):
                wrong, kind = value > limit, "at most"
            else:
                wrong, kind = value < limit, "at least"
            if wrong:
                lines.append(f"{name} sm_{architecture}: {figure} {kind} {limit}, is {value}")
    return lines


def test_a_worse_figure_is_one_line():
    found = {"k": {"registers": 41, "local": 8, "shared": 0, "occupancy": 50, "access": 8, "matrix": ""}, "other": {}}
    budget = {"registers": {"sm_80": 40}, "shared": 0, "occupancy": {"sm_80": 75}, "access": 16, "matrix": "mma.sync"}
    assert exceeded(found, 80, {"k": budget, "gone": {}}) == [
        "other: no budget in gpu_budgets.toml",
        "gone: has a budget and does not exist",
        "k sm_80: registers at most 40, is 41",
        "k sm_80: local at most 0, is 8",
        "k sm_80: occupancy at least 75, is 50",
        "k sm_80: access at least 16, is 8",
        "k sm_80: matrix by mma.sync, is ",
    ]


PLANTED = """
@triton.jit
def kernel(p, n, BLOCK: tl.constexpr, KIND: tl.constexpr):
    if KIND == "narrow":
        first = tl.program_id(0) * BLOCK
    elif KIND == "wide":
        first = tl.program_id(0).to(tl.int64) * BLOCK
    else:
        first = tl.program_id(0) % n * BLOCK
    element = first + tl.arange(0, BLOCK)
    tl.store(p + element, 1.0, element < n)
"""


def test_a_planted_32_bit_product_is_found(tmp_path):
    folder = Path(__file__).parent
    text = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport torch, triton, triton.language as tl\n"
    text += "from triton_code import NoDevice, narrow_products\n" + PLANTED
    text += "triton.runtime.driver.set_active(NoDevice(80))\n"
    text += "for kind in ('narrow', 'wide', 'remainder'):\n"
    text += "    compiled = kernel.warmup(torch.zeros(64), 60, BLOCK=64, KIND=kind, grid=(1,), enable_fp_fusion=True)\n"
    text += "    print(len(narrow_products(compiled.asm['ttir'])))\n"
    script = tmp_path / "planted.py"
    script.write_text(text)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "EVKERNELS_BACKEND": "reference"}
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert [bool(int(count)) for count in process.stdout.split()] == [True, False, False]


TUNING = """
import importlib, os
kernels = importlib.import_module("evkernels.triton_kernels.conv_lstm_1x1")
for value in "01":
    os.environ["EVKERNELS_TRITON_AUTOTUNE"] = value
    kernel = importlib.reload(kernels).conv_lstm_1x1_step_kernel
    print(len(kernel.configs), kernel.keys, kernel.cache_results)
"""


def test_tuning_can_be_switched_off():
    # Not the switch of the interpreter, which never measures.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "EVKERNELS_BACKEND": "reference"}
    process = subprocess.run([sys.executable, "-c", TUNING], capture_output=True, text=True, env=environment)
    assert process.stdout.splitlines() == [f"{count} ['inputs', 'channels'] True" for count in (1, 2)], process.stderr
