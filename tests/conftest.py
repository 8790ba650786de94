"""Fixtures of the whole suite: one `backend` per way to run the ops, poisoned memory, seeds, the recordings.

A test that takes `backend` runs once per way that works here: reference, the compiled CPU kernels at every instruction
set of this processor (AMX in files that say WITH_AMX = True, of ops that have a form for it), the CUDA kernels executed
on the CPU by the emulation layer, the Triton kernels in the interpreter, and on a machine with a GPU the real CUDA and
Triton kernels. Of the others, test_backends.py says why they do not.
"""

import functools
import gc
import importlib
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when torch starts its threads: those that wait must not spin, or they starve the others on few or busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor would start another process to compile in beside every test process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Must be set before the Triton kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
# Order of threads and blocks of emulated CUDA kernels: another one in every session, repeatable with the printed seed.
os.environ.setdefault("EVKERNELS_EMULATION_SEED", str(random.randrange(2**32)))
sys.path.insert(0, str(Path(__file__).parent))

import emulation

from evkernels import backends

if not backends.why_no_triton():
    # Decides once between interpreter and compiler: before a test takes the switch away for a moment.
    importlib.import_module("evkernels.triton_kernels")
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("triton_interpreter").patch_once()

ISAS = ("baseline", "avx2", "avx512", "amx")
BACKENDS = ("reference", *(f"cpu-{isa}" for isa in ISAS), "cuda-emulated", "triton", "cuda")


@dataclass(frozen=True)
class Backend:
    """One way to run the ops, and the device whose tensors it takes."""

    name: str
    device: str

    @property
    def is_slow(self) -> bool:
        """Emulated and interpreted kernels run thousands of times slower than real ones: keep their inputs small."""
        return self.device == "cpu" and self.name in ("cuda-emulated", "triton")


@functools.cache
def why_not(name: str) -> str | None:
    """None if the backend can run here, else the reason."""
    if name.startswith("cpu-"):
        return backends.compiled_error or _why_not_isa(name.removeprefix("cpu-"))
    if name == "cuda-emulated":
        return None if shutil.which("g++") else "no g++ to compile the kernels with"
    return backends.unavailable(name)


def _why_not_isa(isa: str) -> str | None:
    best = torch.ops.evkernels.best_cpu_isa()
    return None if ISAS.index(isa) <= ISAS.index(best) else f"this processor's best instruction set is {best}"


@contextmanager
def activated(name: str) -> Iterator[Backend]:
    """Ops run on the named backend inside this context."""
    if name == "cuda-emulated":
        emulation.load(sanitize=os.environ.get("EVKERNELS_SANITIZE") == "1")
        backends.add_backend(name, "cpu", _emulated_kernel)
    isa = name.removeprefix("cpu-") if name.startswith("cpu-") else None
    with backends.use_backend("cpu" if isa else name):
        previous = torch.ops.evkernels.set_cpu_isa(isa) if isa else None
        try:
            on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
            yield Backend(name, "cuda" if on_gpu else "cpu")
        finally:
            if isa:
                torch.ops.evkernels.set_cpu_isa(previous)


def _emulated_kernel(op: str):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{emulation.NAMESPACE}::{op}", "CPU"):
        return None
    return getattr(getattr(torch.ops, emulation.NAMESPACE), op).default


@pytest.fixture
def backend(request) -> Iterator[Backend]:
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with activated(request.param) as value:
        yield value


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    """Uninitialised memory reads as NaN (or the largest integer), so an unwritten output element shows up."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real recordings beside the project, named by EVKERNELS_DATA or ../shared/data."""
    folder = Path(os.environ.get("EVKERNELS_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not (folder / "npz").is_dir():
        pytest.skip(f"no recordings at {folder}: set EVKERNELS_DATA to a folder that has npz/ and original/")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """A million objects that stay until the end: to look through them for garbage takes a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure(config):
    """What is left at the end is Python's to find."""
    gc.unfreeze()


def pytest_report_header(config) -> list[str]:
    ways = [f"{name}: {why_not(name) or 'runs'}" for name in BACKENDS]
    return ["backends  " + "; ".join(ways), f"EVKERNELS_EMULATION_SEED={os.environ['EVKERNELS_EMULATION_SEED']}"]


def pytest_generate_tests(metafunc):
    from contract import pytest_generate_contract

    pytest_generate_contract(metafunc)
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in chosen:
        with_amx = getattr(metafunc.module, "WITH_AMX", False)
        names = [name for name in BACKENDS if (with_amx or name != "cpu-amx") and not why_not(name)]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def same_threads_after():
    """The number of threads as it was, after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
