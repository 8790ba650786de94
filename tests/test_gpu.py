"""What needs a real device: CUDA graphs, streams, a second device, compute-sanitizer, tensors beyond 2^31 elements.

The calls themselves are tried on the CPU everywhere, so that this file is known to be right before it meets a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from evkernels import backends, ops
from evkernels.testing import tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no GPU: {backends.why_no_gpu()}")
BACKENDS = ("cuda", "triton")


def histogram_events(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, size, (5000,), generator=generator).to(torch.int16) for size in (64, 48))
    t = torch.randint(0, 10_000, (5000,), generator=generator).sort().values
    return x, y, t, torch.randint(0, 2, (5000,), generator=generator).to(torch.uint8)


def gates(seed):
    return tensor(2, 32, 9, 11, seed=seed), tensor(2, 8, 9, 11, seed=seed + 1)


def convolution(seed, dtype=torch.float32):
    weights = (tensor(32, 1, 3, 3, seed=2), tensor(40, 32, 1, 1, seed=3), tensor(32, seed=4), tensor(40, seed=5))
    return tuple(value.to(dtype) for value in (tensor(2, 32, 20, 37, seed=seed), *weights))


# name: (inputs for a seed, the call). All of one call's inputs may change between replays of a graph.
CALLS = {
    "lstm_gates": (gates, ops.lstm_gates),
    "gru_reset": (lambda s: (tensor(2, 16, 9, 11, seed=s), tensor(2, 8, 9, 11, seed=s + 1)), ops.gru_reset),
    "gru_update": (lambda s: tuple(tensor(2, 8, 9, 11, seed=s + k) for k in range(3)), ops.gru_update),
    "depthwise_conv2d": (
        lambda s: (tensor(2, 8, 9, 11, seed=s), tensor(8, 1, 3, 3, seed=s + 1), tensor(8, seed=s + 2)),
        ops.depthwise_conv2d,
    ),
    "separable_conv2d": (convolution, ops.separable_conv2d),
    "separable_conv2d bfloat16": (lambda s: convolution(s, torch.bfloat16), ops.separable_conv2d),
    "event_histogram": (histogram_events, lambda *e: ops.event_histogram(*e, bins=5, height=48, width=64)),
    "voxel_grid": (histogram_events, lambda *e: ops.voxel_grid(*e, bins=5, height=48, width=64)),
    "time_surface": (histogram_events, lambda *e: ops.time_surface(*e, height=48, width=64)),
}


def on(device, values):
    return tree_map_only(torch.Tensor, lambda value: value.to(device), values)


def assert_same(actual, expected):
    for a, b in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        # Atomic additions of floats come in any order.
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5 if a.dtype.itemsize > 2 else 2e-2, atol=1e-5)


@pytest.fixture(params=BACKENDS)
def on_gpu(request):
    reason = backends.unavailable(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    # NaN-filled memory is for finding unwritten output; filling it is not what is captured here.
    torch.use_deterministic_algorithms(False)
    with backends.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_right(name):
    inputs, call = CALLS[name]
    assert all(value.isfinite().all() for value in tree_flatten(call(*inputs(0)))[0])


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_captured_and_replayed(on_gpu, name):
    """A graph replays on new inputs in the same memory: no host synchronisation, no allocation outside of torch."""
    inputs, call = CALLS[name]
    static = on("cuda", inputs(0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*static)
    for seed in (0, 10, 20):
        fresh = on("cuda", inputs(seed))
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(captured, call(*fresh))


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_current_stream(on_gpu, name):
    """Inputs arrive late on a stream of their own: a kernel on any other stream would read what was there before."""
    inputs, call = CALLS[name]
    late, expected = on("cuda", inputs(1)), call(*on("cuda", inputs(1)))
    static = on("cuda", inputs(0))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(static, late, strict=True):
            old.copy_(new)
        result = call(*static)
    stream.synchronize()
    assert_same(result, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_device_of_its_tensors(on_gpu, name):
    inputs, call = CALLS[name]
    result = call(*on("cuda:1", inputs(0)))
    assert all(value.device == torch.device("cuda:1") for value in tree_flatten(result)[0])
    assert torch.cuda.current_device() == 0
    assert_same(result, call(*on("cuda:0", inputs(0))))


@needs_gpu
def test_tensors_beyond_32_bits(on_gpu):
    c_elements = 2**29 + 4096
    if torch.cuda.mem_get_info()[0] < 20 * c_elements:
        pytest.skip("needs 11 GB of free GPU memory")
    packed = torch.zeros(1, 4, 1, c_elements, dtype=torch.float16, device="cuda")
    c = torch.zeros(1, 1, 1, c_elements, dtype=torch.float16, device="cuda")
    packed[0, 3, 0, -1], c[0, 0, 0, -1] = 1.0, 2.0
    h, c_next = ops.lstm_gates(packed, c)
    assert packed.numel() > 2**31
    expected = ops.lstm_gates(packed[..., -8:].cpu(), c[..., -8:].cpu())
    assert_same((h[..., -8:], c_next[..., -8:]), expected)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool):
    """The value tests of every op, of few dtypes and layouts, under NVIDIA's checker."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    tests = Path(__file__).parent
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if "OpContract):" in path.read_text()]
    selection = "test_values and cuda and not emulated and (float32 or bfloat16) and contiguous"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *files]
    # One allocation per tensor, so that accesses beyond its end are seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parent)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
