"""nvcc compiles every CUDA source for each supported architecture, and every kernel keeps to its budget."""

import re
import subprocess

import gpu_resources
import pytest
from emulation import build
from gpu_resources import Resources

CUDA_HOME = build.find_cuda_home()
UNITS = [build.HERE / "saxpy" / "cuda.cu", build.HERE / "faults_nvcc.cu", *build.sources()]

pytestmark = pytest.mark.skipif(
    CUDA_HOME is None, reason="no CUDA toolkit: no nvcc with include/cuda_runtime.h (CUDA_HOME, /usr/local/cuda, PATH)"
)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}-{unit.stem}")
def test_compiles_without_spills(unit):
    found = gpu_resources.parse(build.compile_cuda(unit, CUDA_HOME))
    assert {str(architecture) for _, architecture in found} == set(build.ARCHITECTURES)
    assert {key: resources.spilled for key, resources in found.items() if resources.spilled} == {}


def test_kernels_keep_to_their_budgets():
    version = re.search(
        r"release (\S+),", subprocess.check_output([CUDA_HOME / "bin" / "nvcc", "--version"], text=True)
    )
    budgets = gpu_resources.budgets()
    if version[1] != budgets["versions"]["nvcc"]:
        pytest.skip(f"the budgets are those of nvcc {budgets['versions']['nvcc']}; this one is {version[1]}")
    assert gpu_resources.exceeded(gpu_resources.measure(CUDA_HOME), budgets["cuda"]) == []


def test_packs_move_in_one_instruction():
    ptx = build.compile_ptx(build.HERE / "faults_nvcc.cu", CUDA_HOME)
    kernel = re.search(r"\.entry \w*copy_kernel.*?\n}", ptx, re.DOTALL).group()
    assert re.findall(r"(?:ld|st)\.global[.\w]*", kernel) == ["ld.global.nc.v4.u32", "st.global.cs.v4.u32"]


def test_resources_are_read_from_the_report():
    report = ""
    for types, registers in (("ff", 30), ("dd", 90), ("f6__half", 36)):
        report += (
            f"ptxas info    : Compiling entry function '_Z8a_kernelI{types}EvPT_PT0_' for 'sm_80'\n"
            "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
            f"ptxas info    : Used {registers} registers, used 1 barriers, 512 bytes smem, 416 bytes cmem[0]\n"
        )
    assert gpu_resources.parse(report) == {("a_kernel", 80): Resources(registers=36, shared=512, spilled=16)}


def test_a_kernel_above_its_budget_is_named():
    found = {("a", 80): Resources(33, 64, 8), ("b", 90): Resources(10)}
    allowed = {"a": {"registers": {"sm_80": 32}, "shared": 64}, "c": {"registers": {}}}
    assert gpu_resources.exceeded(found, allowed) == [
        "b: no budget in gpu_budgets.toml",
        "c: has a budget and does not exist",
        "a sm_80: registers at most 32, is 33",
        "a sm_80: spilled at most 0, is 8",
    ]
    assert gpu_resources.exceeded({("a", 80): Resources(32, 64)}, {"a": allowed["a"]}) == []


def test_occupancy_of_known_kernels():
    # NVIDIA's occupancy calculator: 32 registers fill the multiprocessor, 40 leave 6 of 8 blocks, 72 leave 3.
    assert gpu_resources.occupancy(Resources(32), 256, 80) == 1.0
    assert gpu_resources.occupancy(Resources(40), 256, 80) == 0.75
    assert gpu_resources.occupancy(Resources(72), 256, 80) == 0.375
    assert gpu_resources.occupancy(Resources(32, shared=40 << 10), 256, 80) == 0.5
