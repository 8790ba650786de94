"""The CUDA emulation itself: memory, atomics, limits, conversions, and how ops are built for it."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulation import build
from emulation_faults import FAULTS, SEEDS, block_sums, planted_faults


@pytest.fixture(scope="module")
def faults():
    return planted_faults()


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("EVKERNELS_EMULATION_SEED", str(request.param))
    return request.param


@pytest.fixture(scope="module")
def saxpy():
    build.define_schemas(["saxpy(float a, Tensor x, Tensor y) -> Tensor"])
    build.load_library(build.build([build.HERE / "saxpy" / "cuda.cu"], "saxpy"))
    return torch.ops.evkernels_emulated.saxpy


# --- the layout of an op: kernels.cuh and cuda.cu -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1000, 4096])
def test_op_through_stable_abi(saxpy, dtype, count):
    storage = torch.randn(2, count + 1, dtype=dtype)
    for x, y in [(storage[0, :count], storage[1, :count]), (storage[0, 1:], storage[1, 1:])]:  # aligned or not
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(saxpy(0.5, x, y), (0.5 * x.to(compute) + y.to(compute)).to(dtype))


def test_define_schemas_twice_is_harmless(saxpy):
    build.define_schemas(["saxpy(float a, Tensor x, Tensor y) -> Tensor"])
    x = torch.ones(4)
    assert torch.equal(saxpy(1.0, x, x), x + x)


def test_threads_without_barriers_are_cheap(saxpy):
    x = torch.randn(1080 * 256 + 1)[1:]
    saxpy(1.0, x, x)
    start = time.perf_counter()
    saxpy(1.0, x, x)
    assert time.perf_counter() - start < 1.0


# --- memory ---------------------------------------------------------------------------------------------------------


def test_dynamic_shared_memory_is_poisoned_before_each_block(faults):
    out = torch.zeros(5, 64)
    faults.uninitialised(out)
    assert out.isnan().all()


def test_misaligned_packs_are_reported(faults):
    x, out = torch.randn(65), torch.empty(65)
    faults.copy(x[:64], out[:64])
    assert torch.equal(x[:64], out[:64])
    with pytest.raises(RuntimeError, match=r"copy_kernel.*thread.*packed load of 16 bytes at a misaligned address"):
        faults.copy(x[1:], out[:64])
    with pytest.raises(RuntimeError, match=r"copy_kernel.*thread.*packed store of 16 bytes at a misaligned address"):
        faults.copy(x[:64], out[1:])


SANITIZED = """
import sys, torch
from emulation import build
torch.ops.load_library(sys.argv[1])
ops = torch.ops.evkernels_faults
x, out = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
for fault in range(4):
    print("fault", fault, file=sys.stderr, flush=True)
    ops.rotate(x, out, fault)
    if fault == 0:
        assert torch.equal(out, (x + 3) % 256)
print("no more faults", file=sys.stderr, flush=True)
for fault in (2, 0):
    try:
        ops.block_sum(torch.arange(768, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), fault)
    except RuntimeError as error:
        print("reported", file=sys.stderr, flush=True)
"""


def test_out_of_bounds_by_one_is_found_by_the_address_sanitizer():
    # Instrumented code takes longer to optimise than these few launches to run.
    library = build.build([FAULTS], "faults", sanitize=True, optimize="-O0")
    environment = {**build.sanitizer_environment(halt_on_error=False), "PYTHONPATH": str(build.HERE.parent)}
    process = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    parts = process.stderr.split("fault ")[1:]
    parts[3], rest = parts[3].split("no more faults")
    assert parts[0].split() == ["0"], parts[0]
    kinds = ["heap-buffer-overflow", "heap-buffer-overflow", "global-buffer-overflow"]
    for part, kind in zip(parts[1:], kinds, strict=True):
        assert kind in part, process.stderr
        assert "rotate_kernel" in part, process.stderr
    assert rest.split() == ["reported"], rest


# --- atomics and limits ---------------------------------------------------------------------------------------------


def run_atomics(faults, fault, count=1000):
    x = torch.randint(-100, 1000, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(count)).abs()
    integers = torch.tensor([0, -1, 2**30, 0, 0], dtype=torch.int32)
    floats, doubles = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    wide = torch.zeros(2, dtype=torch.int64)
    faults.atomics(x, integers, floats, doubles, wide, fault)
    return x, integers, floats, doubles, wide


def test_atomics_are_right(faults, seed):
    x, integers, floats, doubles, wide = run_atomics(faults, 0)
    bits = 0
    for value in x.tolist():
        bits |= 1 << (value & 15)
    assert integers.tolist() == [x.sum(), x.max(), x.min(), bits, 255]
    assert floats.item() == doubles.item() == x.sum()  # exact in float32
    assert wide.tolist() == [x.sum() << 32, x.max() << 32]


def test_lost_update_is_found(faults, seed):
    assert run_atomics(faults, 0, count=200)[1][4] == 200
    assert run_atomics(faults, 1, count=200)[1][4] < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((65536, 32, 0, 0), r"grid must be within .*65535.* got \(1, 65536, 1\)"),
        ((0, 32, 0, 0), r"grid must be within .* got \(1, 0, 1\)"),
        ((1, 1025, 0, 0), r"block must be within .* got \(1025, 1, 1\)"),
        ((1, 32, 48 * 1024 + 1, 0), r"dynamic shared memory must be at most 49152 bytes"),
        ((1, 32, 0, 227 * 1024 + 1), r"cudaFuncSetAttribute.*invalid argument"),
    ],
)
def test_launch_limits_are_reported(faults, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        faults.launch_limits(*arguments)


def test_launches_at_the_limits(faults):
    faults.launch_limits(1, 1024, 48 * 1024, 0)
    faults.launch_limits(65535, 1, 0, 0)
    faults.launch_limits(1, 32, 227 * 1024, 227 * 1024)
    faults.launch_limits(1, 32, 0, 48 * 1024)  # back to the default


@pytest.mark.parametrize("extents", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (0, 1, 1), (2**40, 1, 1)])
def test_grid_helper_refuses(faults, extents):
    faults.helper_limits(2**31 - 1, 65535, 65535)
    with pytest.raises(ValueError, match="CUDA grid must be within"):
        faults.helper_limits(*extents)


def test_launch_on_another_stream_is_reported(faults):
    out = torch.zeros(256, dtype=torch.int32)
    faults.on_stream(out, False)
    assert out.tolist() == [256] * 256
    with pytest.raises(RuntimeError, match=r"early_return_kernel.*another stream than the current one"):
        faults.on_stream(out, True)


# --- tensors beyond 2^31 elements, without the memory ---------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 90 * 160, 2**31 - 1, 2**31, 2**33])
@pytest.mark.parametrize("rows", [1, 3, 2**9])
def test_offsets_of_gates(faults, inner, rows):
    total = inner * rows
    for e in {0, 1, inner - 1, inner % total, total // 2, total - 1}:
        row, element = divmod(e, inner)
        assert faults.gate_offset(e, inner, total) == 4 * row * inner + element


def test_first_element_of_a_thread(faults):
    assert faults.row_element(2**31 - 1, 255) == ((2**31 - 1) * 256 + 255) * 4


@pytest.mark.parametrize(("planes", "height", "width", "channels"), [(8, 2**14, 2**14, 64), (2**16, 2**9, 2**9, 1)])
def test_offsets_of_depthwise_convolution(faults, planes, height, width, channels):
    assert planes * height * width * channels > 2**32
    for plane, row, column, channel in [(0, 0, 0, 0), (planes - 1, height - 1, width - 1, channels - 1), (1, 2, 3, 0)]:
        read, written = faults.depthwise_offsets(plane, row, column, channel, planes, height, width, channels)
        assert written == ((plane * height + row) * width + column) * channels + channel
        assert read == ((plane * height + row - 1) * width + column - 1) * channels + channel


# --- conversions and mathematics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_to_float_of_all_patterns(faults, dtype):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    out = torch.empty(65536)
    faults.to_float(bits, out, dtype == torch.float16)
    expected = bits.view(dtype).float()
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), ~numbers)
    assert torch.equal(out.view(torch.int32)[numbers], expected.view(torch.int32)[numbers])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_from_float(faults, dtype):
    patterns = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).int().view(torch.float32)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:].double() + halves[:-1].double()).div(2).float()  # ties, and their neighbours
    infinity = torch.tensor(float("inf"))
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 2.0**-24, 2.0**-25, 2.0**-14, 3.4028235e38, float("nan"), 1e-45])
    ties = [middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    x = torch.cat([patterns, halves, *ties, edges, -edges, infinity[None], -infinity[None]])
    bits = torch.empty(x.numel(), dtype=torch.uint16)
    faults.from_float(x, bits, dtype == torch.float16)
    result, expected = bits.view(dtype), x.to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(result.isnan(), ~numbers)
    assert torch.equal(bits.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_device_mathematics(faults, dtype):
    scale = torch.logspace(-30, 2.5, 20_000, dtype=torch.float64)
    x = torch.cat([scale, -scale, torch.linspace(-1, 1, 20_001, dtype=torch.float64)]).to(dtype)
    limits = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e38, -1e38], dtype=dtype)
    out = torch.empty(3, x.numel(), dtype=dtype)
    faults.math(x, out)
    ulp = torch.finfo(dtype).eps / 2
    for row, function in zip(out, [torch.exp, torch.sigmoid, torch.tanh], strict=True):
        exact = function(x.double())
        # Results below the normal numbers may be flushed, those above the largest are infinite.
        normal = (exact.abs() > torch.finfo(dtype).tiny) & (exact < torch.finfo(dtype).max)
        error = ((row.double() - exact).abs() / exact.abs())[normal].max() / ulp
        assert error <= 4, f"{function.__name__}: {error:.1f} half ulps"
    out = torch.empty(3, limits.numel(), dtype=dtype)
    faults.math(limits, out)
    expected = torch.stack([torch.exp(limits), torch.sigmoid(limits), torch.tanh(limits)])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    assert torch.equal(out.signbit() & ~out.isnan(), expected.signbit() & ~expected.isnan())


# --- the whole way --------------------------------------------------------------------------------------------------


LOAD = """
import torch
from emulation import build
library = torch.library.Library("evkernels", "DEF")
library.define("saxpy(float a, Tensor x, Tensor y) -> Tensor")
build.sources = lambda: [build.HERE / "saxpy" / "cuda.cu"]
compile_and_link = build.build
build.build = lambda units, name, sanitize: compile_and_link(units, "saxpy", sanitize)  # as other tests have built it
path = build.load()
assert build.load() == path
x = torch.arange(9.0)
assert torch.equal(torch.ops.evkernels_emulated.saxpy(2.0, x, x), 3 * x)
library.impl("saxpy", torch.ops.evkernels_emulated.saxpy, "CPU")
torch.library.opcheck(torch.ops.evkernels.saxpy.default, (2.0, x, x), test_utils="test_schema")
"""


def test_load_takes_the_schemas_of_the_package():
    environment = {**os.environ, "PYTHONPATH": str(build.HERE.parent)}
    process = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_only_what_changed_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    header, unit, target = tmp_path / "a.h", tmp_path / "a.cpp", tmp_path / "a.o"
    header.write_text("constexpr int kValue = 1;\n")
    unit.write_text('#include "a.h"\nint value() { return kValue; }\n')
    command = ["g++", "-c", str(unit)]

    def compiled_again():
        before = target.stat().st_mtime_ns
        build.compile_cached(command, target)
        return target.stat().st_mtime_ns != before

    build.compile_cached(command, target)
    assert not compiled_again()
    header.write_text("constexpr int kValue = 2;\n")
    assert compiled_again()
    assert not compiled_again()
    command.append("-O1")
    assert compiled_again()
    header.unlink()
    with pytest.raises(RuntimeError, match="exit code 1"):
        build.compile_cached(command, target)


def test_launches_from_several_python_threads(faults):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: block_sums(faults, 0), range(40)))
        errors = [pool.submit(block_sums, faults, 2) for _ in range(8)]
        assert all(isinstance(error.exception(), RuntimeError) for error in errors)
