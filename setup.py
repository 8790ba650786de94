"""Builds evkernels._C (LibTorch stable ABI; CPU, and CUDA where nvcc is found) and evkernels._host (pybind11).

Environment: EVKERNELS_CUDA=0 leaves CUDA out; FORCE_CUDA=1 fails without nvcc; CUDA_HOME, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, DEBUG=1 as elsewhere. Without a C++ compiler the package installs as pure Python and says so in
`evkernels.status()`.
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch.utils.cpp_extension as cpp_extension
except ImportError:
    sys.exit(
        "evkernels builds against the installed torch: install torch >= 2.13 first, then "
        "`pip install --no-build-isolation .`"
    )

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020d000000000000ULL", "-DTORCH_STABLE_ONLY"]


def find_cuda_home() -> str | None:
    """The first toolkit that has both nvcc and its headers (an nvcc on PATH may be a wrapper without them)."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return home
    return None


def extensions() -> list:
    if not shutil.which(os.environ.get("CXX", "c++")):
        print("evkernels: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
        return []
    cuda_home = None if os.environ.get("EVKERNELS_CUDA") == "0" else find_cuda_home()
    if os.environ.get("FORCE_CUDA") == "1" and cuda_home is None:
        sys.exit("FORCE_CUDA=1, but no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found; set CUDA_HOME")
    # torch only looks for a toolkit when it is itself a CUDA build.
    cpp_extension.CUDA_HOME = cuda_home
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    # No -ffast-math: NaN and infinities must pass through the kernels. Vector types wider than the baseline never
    # cross a function boundary, so the ABI warning about them is moot.
    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-fno-math-errno", "-fno-trapping-math"]
    cxx = [*optimise, "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    cuda = cuda_home is not None
    kernels = cpp_extension.CppExtension(
        "evkernels._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/*/cpu.cpp"))
        + (sorted(glob("csrc/*/cuda.cu")) if cuda else []),
        include_dirs=[os.path.abspath("csrc")] + ([f"{cuda_home}/include"] if cuda else []),
        library_dirs=[f"{cuda_home}/lib64", f"{cuda_home}/lib"] if cuda else [],
        libraries=["cudart_static", "dl", "rt", "pthread"] if cuda else [],
        extra_compile_args={
            "cxx": [*cxx, *STABLE_ABI],
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", *STABLE_ABI],
        },
        extra_link_args=["-Wl,--as-needed"] + ([] if os.environ.get("DEBUG") == "1" else ["-s"]),
        py_limited_api=True,
    )
    import pybind11.setup_helpers as pybind11

    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""
    host = pybind11.Pybind11Extension(
        "evkernels._host",
        sorted(glob("csrc/host/*.cpp")),
        cxx_std=17,
        extra_compile_args=cxx,
        define_macros=[("EVKERNELS_CUDA_ARCHS", f'"{archs}"')],
    )
    return [kernels, host]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
