"""Builds and loads the CUDA ops as CPU code, and compiles them with nvcc where it is present.

Every ``csrc/<op>/cuda.cu`` is compiled as C++ against ``cuda_emulation.h`` and registered as
``torch.ops.evkernels_emulated.<op>`` for the CPU. g++ is called directly and needs torch's headers only. Each object is
kept under ``build/`` beside a digest of its command and of the files it included, so only what changed is compiled.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulation"
NAMESPACE = "evkernels_emulated"

TORCH = Path(torch.__file__).resolve().parent
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(TORCH / "include")]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020d000000000000ULL", "-DTORCH_STABLE_ONLY"]
# No contraction: nvcc's __fmul_rn and friends promise it, and results stay the same on every processor.
CXX_FLAGS = ["-x", "c++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DEVKERNELS_EMULATE"]
# Recoverable, so that the environment decides whether the first error ends the process.
SANITIZE_FLAGS = ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZE_FLAGS += ["-fsanitize-recover=address,undefined"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills", "-Xcompiler", "-fPIC,-fvisibility=hidden", *DEFINES]
# The compiler takes as long for each: the test suite takes one, `make gpu-check` all.
IS_THOROUGH = os.environ.get("EVKERNELS_CHECK_ALL_GPUS") == "1"
ARCHITECTURES = ("80", "90", "100") if IS_THOROUGH else ("90",)
# An op that has all that host code calls of CUDA. nvcc compiles the host code of it alone, which takes two thirds of
# the time: that of the others is checked while their kernels are compiled, and compiled and linked by the emulation.
WITH_HOST_CODE = "event_histogram"

_libraries: list[torch.library.Library] = []
_loaded: set[Path] = set()


def sources() -> list[Path]:
    """The ``cuda.cu`` of every op."""
    return sorted((ROOT / "csrc").glob("*/cuda.cu"))


@functools.cache
def load(sanitize: bool = False) -> Path:
    """Builds all CUDA ops for the CPU, declares their schemas and loads them, once per process.

    Args:
        sanitize: build with the address and undefined-behaviour sanitizers. The process must have been started with
            the environment of :func:`sanitizer_environment`.

    Returns:
        Path of the shared library.
    """
    path = build(sources(), "ops", sanitize)
    define_schemas(evkernels_schemas())
    return load_library(path)


def load_library(path: Path) -> Path:
    """Loads a library of ops into torch, once per process."""
    if path not in _loaded:
        torch.ops.load_library(path)
        _loaded.add(path)
    return path


def define_schemas(schemas: Iterable[str]) -> None:
    """Declares operators such as ``"saxpy(float a, Tensor x, Tensor y) -> Tensor"`` in ``evkernels_emulated``."""
    if not _libraries:
        _libraries.append(torch.library.Library(NAMESPACE, "DEF"))
    defined = set(torch._C._dispatch_get_all_op_names())
    for schema in schemas:
        name = f"{NAMESPACE}::{schema.split('(')[0]}"
        if name not in defined:
            _libraries[0].define(schema)
            defined.add(name)


def evkernels_schemas() -> list[str]:
    """The schemas of all operators that ``evkernels.ops`` declares; importing it first is the caller's business."""
    schemas = []
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.startswith("evkernels::"):
            name, _, overload = qualified.partition(".")
            schemas.append(str(torch._C._get_schema(name, overload)).removeprefix("evkernels::"))
    return sorted(schemas)


def sanitizer_environment(halt_on_error: bool = True) -> dict[str, str]:
    """Environment in which a Python process can load a sanitized library."""
    # libstdc++ comes along, because the sanitizer resolves __cxa_throw before torch brings it in.
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [run(["g++", f"-print-file-name={name}"]).strip() for name in names]
    halt = f"halt_on_error={int(halt_on_error)}"
    options = {"ASAN_OPTIONS": f"detect_leaks=0:{halt}", "UBSAN_OPTIONS": f"print_stacktrace=1:{halt}"}
    return {**os.environ, **options, "LD_PRELOAD": ":".join(found)}


def build(units: list[Path], name: str, sanitize: bool = False, optimize: str = "-O1") -> Path:
    """Compiles emulated CUDA sources into one shared library and returns its path."""
    folder = BUILD / (f"{name}-sanitized" if sanitize else name)
    flags = [*CXX_FLAGS, *DEFINES, *INCLUDES, optimize, *(SANITIZE_FLAGS if sanitize else [])]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    objects = [folder / f"{unit.parent.name}-{unit.stem}.o" for unit in units]
    # Other test processes wait for the lock meanwhile, and leave their cores to these compilers.
    with locked(folder), ThreadPoolExecutor(os.cpu_count()) as compilers:
        commands = [["g++", *flags, "-c", str(unit)] for unit in units]
        list(compilers.map(compile_cached, commands, objects))
        command = ["g++", "-shared", *(["-fsanitize=address,undefined"] if sanitize else []), *map(str, objects)]
        command += [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        # Nothing that neither an op nor torch defines. The sanitizers' own functions come with the process.
        command += [] if sanitize else ["-Wl,-z,defs"]
        # Content-addressed, because a library that a process has loaded must not be overwritten.
        key = digest([*command, *(Path(f"{target}.key").read_text() for target in objects)], [])
        library = folder / f"{name}-{key[:16]}.so"
        if not library.exists():
            for stale in folder.glob("*.so"):
                stale.unlink()
            partial = library.with_suffix(".partial")
            run([*command, "-o", str(partial)])
            partial.rename(library)
    return library


def compile_cuda(unit: Path, cuda_home: Path) -> str:
    """Compiles one CUDA source with nvcc for ARCHITECTURES; returns what the assembler reported."""
    kept = _kept(unit)
    kind, target = ("-c", cuda_object(unit)) if unit in with_host_code() else ("-cubin", kept / f"{unit.stem}.cubin")
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    nvcc = [str(cuda_home / "bin" / "nvcc"), *NVCC_FLAGS, *architectures, *INCLUDES]
    with locked(kept):
        return compile_cached([*nvcc, "--keep", "--keep-dir", str(kept), kind, str(unit)], target)


def with_host_code() -> list[Path]:
    """The ops that compile_cuda makes whole objects of; of the others, kernels alone."""
    return [unit for unit in sources() if IS_THOROUGH or unit.parent.name == WITH_HOST_CODE]


def cuda_object(unit: Path) -> Path:
    """What compile_cuda makes of a source with its host code."""
    return _kept(unit).with_suffix(".o")


def _kept(unit: Path) -> Path:
    """The folder of what compile_cuda leaves on the way."""
    return ROOT / "build" / "cuda_check" / f"{unit.parent.name}-{unit.stem}"


def intermediate(unit: Path, architecture: str, kind: str) -> Path:
    """A file that compile_cuda left on the way: "ptx", the assembly text, or "cubin", the machine code."""
    # nvcc leaves the architecture out of the name where there is one.
    name = f"{unit.stem}.compute_{architecture}" if len(ARCHITECTURES) > 1 else unit.stem
    return _kept(unit) / f"{name}.{kind}"


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: nvcc together with its headers. A wrapper script on PATH alone does not count."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def compile_cached(command: list[str], target: Path) -> str:
    """Runs a compiler unless ``target`` is up to date; returns its messages, those of the first time if it is."""
    dependencies, key_file, log = (Path(f"{target}{suffix}") for suffix in (".d", ".key", ".log"))
    complete = target.exists() and dependencies.exists() and key_file.exists()
    if complete and key_file.read_text() == digest(command, included_files(dependencies)):
        return log.read_text()
    key_file.unlink(missing_ok=True)
    messages = run([*command, "-MD", "-MF", str(dependencies), "-o", str(target)])
    log.write_text(messages)
    key_file.write_text(digest(command, included_files(dependencies)))
    return messages


def included_files(dependencies: Path) -> list[Path]:
    """The project's own files named by a compiler's dependency file; those of torch are covered by its version."""
    words = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return sorted(path for path in map(Path, words) if path.resolve().is_relative_to(ROOT))


def digest(command: list[str], files: list[Path]) -> str:
    """Digest of a command, torch's version and the contents of files."""
    state = hashlib.sha256("\0".join([torch.__version__, *command]).encode())
    for path in files:
        state.update(path.read_bytes() if path.exists() else b"missing")
    return state.hexdigest()


def run(command: list[str]) -> str:
    """Runs a command; its output, or RuntimeError with it."""
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\nexit code {process.returncode}\n{process.stdout}")
    return process.stdout


@contextmanager
def locked(folder: Path):
    """One process at a time in a build folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
