"""Builds evkernels._C (LibTorch stable ABI; CPU, and CUDA where nvcc is found) and evkernels._host (pybind11).

Environment: EVKERNELS_CUDA=0 leaves CUDA out; FORCE_CUDA=1 fails without nvcc; CUDA_HOME, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, CXX, DEBUG=1 as elsewhere. Without a C++ compiler the package installs as pure Python and says so in
`evkernels.status()`.
"""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    import torch.utils.cpp_extension as cpp_extension
    from pybind11.setup_helpers import Pybind11Extension
except ImportError as error:
    sys.exit(
        f"evkernels builds against the installed torch ({error}): install torch >= 2.13, setuptools, pybind11 and "
        "ninja first, then `pip install --no-build-isolation .`"
    )

DEBUG = os.environ.get("DEBUG") == "1"
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020d000000000000ULL", "-DTORCH_STABLE_ONLY"]


def find_cuda_home() -> str | None:
    """The first toolkit that has both nvcc and its headers (an nvcc on PATH may be a wrapper without them)."""
    if os.environ.get("EVKERNELS_CUDA") == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return home
    return None


def default_architectures(cuda_home: str) -> str:
    """sm_80, sm_90 and sm_100 as far as this nvcc knows them, and portable code for what comes after the last."""
    known = subprocess.check_output([f"{cuda_home}/bin/nvcc", "--list-gpu-arch"], text=True).split()
    return ";".join(a for a in ("8.0", "9.0", "10.0") if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def extensions() -> list:
    cuda_home = find_cuda_home()
    compiler = shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])
    if FORCE_CUDA and not (cuda_home and compiler):
        lacking = "C++ compiler (set CXX)" if cuda_home else "nvcc with include/cuda_runtime.h (set CUDA_HOME)"
        sys.exit(f"FORCE_CUDA=1, but there is no {lacking}, or EVKERNELS_CUDA=0 is set")
    if compiler is None:
        print("evkernels: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
        return []
    # torch only looks for a toolkit when it is itself a CUDA build.
    cpp_extension.CUDA_HOME = cuda_home
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(cuda_home)) if cuda_home else ""
    # No -ffast-math: NaN and infinities must pass through the kernels. Vector types wider than the baseline never
    # cross a function boundary, so the ABI warning about them is moot. -g0 undoes Python's own -g, which takes up
    # to two fifths of a unit's time for symbols that the linker drops.
    optimise = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    cxx = [*optimise, "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    link = ["-Wl,--as-needed", *([] if DEBUG else ["-s"])] if sys.platform == "linux" else []
    kernels = cpp_extension.CppExtension(
        "evkernels._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/*/cpu.cpp"))
        + (sorted(glob("csrc/*/cuda.cu")) if cuda_home else []),
        include_dirs=[os.path.abspath("csrc")] + ([f"{cuda_home}/include"] if cuda_home else []),
        library_dirs=[f"{cuda_home}/lib64", f"{cuda_home}/lib"] if cuda_home else [],
        libraries=["cudart_static", "dl", "rt", "pthread"] if cuda_home else [],
        extra_compile_args={
            "cxx": [*cxx, *STABLE_ABI],
            "nvcc": [*(["-O0", "-g"] if DEBUG else ["-O3"]), "-Xcompiler", "-fvisibility=hidden", *STABLE_ABI],
        },
        extra_link_args=link,
        py_limited_api=True,
    )
    host = Pybind11Extension(
        "evkernels._host",
        sorted(glob("csrc/host/*.cpp")),
        include_dirs=[os.path.abspath("csrc")],
        cxx_std=17,
        extra_compile_args=cxx,
        define_macros=[("EVKERNELS_CUDA_ARCHS", f'"{archs}"'), ("EVKERNELS_TORCH", f'"{torch.__version__}"')],
    )
    return [kernels, host]


setup(ext_modules=extensions(), cmdclass={"build_ext": cpp_extension.BuildExtension})
