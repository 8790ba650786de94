"""nvcc compiles every CUDA source for each supported architecture, and no kernel spills registers."""

import re

import pytest
from emulation import build

CUDA_HOME = build.find_cuda_home()
UNITS = [build.HERE / "saxpy" / "cuda.cu", build.HERE / "faults_nvcc.cu", *build.sources()]

pytestmark = pytest.mark.skipif(
    CUDA_HOME is None, reason="no CUDA toolkit: no nvcc with include/cuda_runtime.h (CUDA_HOME, /usr/local/cuda, PATH)"
)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}-{unit.stem}")
def test_compiles_without_spills(unit):
    report = build.compile_cuda(unit, CUDA_HOME)
    spills = resources(report)
    for architecture in build.ARCHITECTURES:
        assert any(name.endswith(f"sm_{architecture}") for name in spills), f"no kernel for sm_{architecture}"
    assert {name: spill for name, spill in spills.items() if spill != (0, 0)} == {}


def test_packs_move_in_one_instruction():
    ptx = build.compile_ptx(build.HERE / "faults_nvcc.cu", CUDA_HOME)
    kernel = re.search(r"\.entry \w*copy_kernel.*?\n}", ptx, re.DOTALL).group()
    assert re.findall(r"(?:ld|st)\.global[.\w]*", kernel) == ["ld.global.nc.v4.u32", "st.global.cs.v4.u32"]


def test_resources_sees_spills():
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\n"
        "ptxas info    : Function properties for k\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    )
    assert resources(report) == {"k sm_80": (4, 12)}


def resources(report):
    """{"kernel architecture": (bytes of spill stores, bytes of spill loads)} from the assembler's report."""
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
        re.DOTALL,
    )
    return {f"{name} {architecture}": (int(stores), int(loads)) for name, architecture, stores, loads in entries}
