"""nvcc compiles every CUDA source, and every kernel keeps to its budget: on sm_90, in `make gpu-check` on all."""

import json
import re
import subprocess
import sys

import gpu_instructions
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


REGISTRATION = """
import json, sys, torch
library = torch.library.Library("evkernels", "DEF")
schemas, path = json.load(sys.stdin)
for schema in schemas:
    library.define(schema)
torch.ops.load_library(path)
registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
print(*sorted(name for name in registered if name.startswith("evkernels::")))
"""


def test_links_without_torch_for_cuda_and_registers(tmp_path):
    """With the libraries of setup.py, beside a torch that knows no GPU and on a machine without a driver."""
    units, library = build.with_host_code(), tmp_path / "cuda.so"
    for unit in units:
        build.compile_cuda(unit, CUDA_HOME)
    objects = [str(build.cuda_object(unit)) for unit in units]
    cudart = [f"-L{CUDA_HOME / 'lib64'}", f"-L{CUDA_HOME / 'lib'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    torch_libraries = [f"-L{build.TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    build.run(["g++", "-shared", "-Wl,-z,defs", *objects, *cudart, *torch_libraries, "-o", str(library)])
    given = json.dumps([build.evkernels_schemas(), str(library)])
    done = subprocess.run([sys.executable, "-c", REGISTRATION], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = re.findall(r'm\.impl\("(\w+)"', "".join(unit.read_text() for unit in units))
    assert done.stdout.split() == sorted(f"evkernels::{name}" for name in names)


def skip_other_compilers():
    version = re.search(
        r"release (\S+),", subprocess.check_output([CUDA_HOME / "bin" / "nvcc", "--version"], text=True)
    )
    budgets = gpu_resources.budgets()
    if version[1] != budgets["versions"]["nvcc"]:
        pytest.skip(f"the budgets are those of nvcc {budgets['versions']['nvcc']}; this one is {version[1]}")
    return budgets["cuda"]


def test_kernels_keep_to_their_budgets():
    budgets = skip_other_compilers()
    assert gpu_resources.exceeded(gpu_resources.measure(CUDA_HOME), budgets) == []


def test_kernels_have_the_instructions_that_they_intend():
    """16-byte accesses in one piece, tensor cores where they are meant, no more atomics or special functions."""
    budgets = skip_other_compilers()
    lines = []
    for unit in build.sources():
        build.compile_cuda(unit, CUDA_HOME)
        for architecture in build.ARCHITECTURES:
            counts = gpu_instructions.in_ptx(build.intermediate(unit, architecture, "ptx").read_text())
            for kernel, found in counts.items():
                allowed = budgets.get(kernel, {}).get("instructions", {})
                lines += gpu_instructions.differences(kernel, f"sm_{architecture}", found, allowed)
    assert lines == []


def test_machine_code_has_the_instructions_that_its_kernels_intend():
    """The assembler must not split what the compiler left whole."""
    budgets = skip_other_compilers()
    disassembler = gpu_instructions.find_disassembler(CUDA_HOME)
    if disassembler is None:
        pytest.skip("no cuobjdump with nvdisasm beside it: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    lines = []
    for unit in build.sources():
        build.compile_cuda(unit, CUDA_HOME)
        for architecture in build.ARCHITECTURES:
            listing = gpu_instructions.disassemble(unit, architecture, disassembler)
            for kernel, found in gpu_instructions.in_machine_code(listing).items():
                allowed = budgets.get(kernel, {}).get("instructions", {})
                # The assembler unrolls and merges: what matters is that none are gone.
                allowed = {group: min(1, number) for group, number in allowed.items()}
                lines += gpu_instructions.differences(kernel, f"sm_{architecture} machine code", found, allowed)
    assert lines == []


def test_packs_move_in_one_instruction():
    unit = build.HERE / "faults_nvcc.cu"
    build.compile_cuda(unit, CUDA_HOME)
    ptx = build.intermediate(unit, build.ARCHITECTURES[0], "ptx").read_text()
    kernel = re.search(r"\.entry \w*copy_kernel.*?\n}", ptx, re.DOTALL).group()
    assert re.findall(r"(?:ld|st)\.global[.\w]*", kernel) == ["ld.global.nc.v4.u32", "st.global.cs.v4.u32"]


def test_a_split_store_is_noticed():
    """What nvcc 13 makes of a plain 16-byte store of four floats, beside what it makes of __stcs."""
    split = ".visible .entry _Z8a_kernelPf(\n{\n" + "st.global.f32 [%rd1], %f1;\n" * 4 + "}"
    whole = ".visible .entry _Z8a_kernelPf(\n{\nst.global.cs.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};\n}"
    allowed = {"stores_16": 1}
    differ = [gpu_instructions.in_ptx(text)["a_kernel"] for text in (whole, split)]
    assert gpu_instructions.differences("a_kernel", "sm_80", differ[0], allowed) == []
    assert gpu_instructions.differences("a_kernel", "sm_80", differ[1], allowed) == [
        "a_kernel sm_80: stores_16 at least 1, is 0"
    ]


def test_instructions_are_told_apart():
    ptx = """.entry _Z8a_kernelPf(
        ld.global.nc.v4.u32 {}; ld.global.nc.v2.u32 {}; ld.global.v2.b64 {}; st.global.v4.u16 {};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {}; ex2.approx.ftz.f32 %f1, %f2; shfl.sync.bfly.b32 %r1;
        atom.global.add.u32 %r1; red.global.add.u32 %r1; atom.shared.cas.b32 %r1; rcp.rn.f32 %f1;"""
    assert gpu_instructions.in_ptx(ptx) == {
        "a_kernel": {
            "loads_16": 2, "stores_16": 0, "tensor": 1, "special": 1, "shuffles": 1, "atomics": 2, "shared_atomics": 1
        }
    }  # fmt: skip
    code = "Function : _Z8a_kernelPf\n LDG.E.128.CONSTANT R4 ;\n LDG.E.64 R2 ;\n STG.E.EF.128 [R2] ;\n HMMA.16816.F32 ;"
    assert gpu_instructions.in_machine_code(code) == {"a_kernel": {"loads_16": 1, "stores_16": 1, "tensor": 1}}
    assert gpu_instructions.differences("k", "sm_90", {"atomics": 2}, {"atomics": 1}) == [
        "k sm_90: atomics at most 1, is 2"
    ]


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
    crowded = {"a": {**allowed["a"], "threads": 256, "dynamic": 81 << 10, "occupancy": {"sm_80": 25}}}
    assert gpu_resources.exceeded({("a", 80): Resources(32, 64)}, crowded) == [
        "a sm_80: occupancy at least 25 %, is 12 %"
    ]


def test_occupancy_of_known_kernels():
    # NVIDIA's occupancy calculator: 32 registers fill the multiprocessor, 40 leave 6 of 8 blocks, 72 leave 3.
    assert gpu_resources.occupancy(Resources(32), 256, 80) == 1.0
    assert gpu_resources.occupancy(Resources(40), 256, 80) == 0.75
    assert gpu_resources.occupancy(Resources(72), 256, 80) == 0.375
    assert gpu_resources.occupancy(Resources(32, shared=40 << 10), 256, 80) == 0.5
    assert gpu_resources.occupancy(Resources(32), 256, 80, dynamic=40 << 10) == 0.5
