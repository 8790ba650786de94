"""Runs pytest on CPU kernels and emulated CUDA kernels that were built with ASan and UBSan.

Run by test_sanitizers.py in a process that was started with the sanitizers' libraries preloaded. The sanitized
library takes the place of evkernels._C before the package is imported.
"""

import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["EVKERNELS_SANITIZE"] = "1"

import pytest
import torch
from emulation import build


def build_cpu_kernels() -> Path:
    """The CPU kernels as setup.py builds them, but sanitized; one library, compiled where sources changed."""
    folder = build.ROOT / "build" / "sanitized"
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-O1", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
    flags += [*build.DEFINES, *build.INCLUDES, *build.SANITIZE_FLAGS]
    csrc = build.ROOT / "csrc"
    sources = sorted(csrc.glob("*/cpu.cpp")) + sorted(csrc.glob("common/*.cpp"))
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]
    with build.locked(folder), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        commands = (["g++", *flags, "-c", str(source)] for source in sources)
        list(pool.map(build.compile_cached, commands, objects))
        library = folder / "cpu_kernels.so"
        link = ["g++", "-shared", "-fsanitize=address,undefined", *map(str, objects), f"-L{build.TORCH / 'lib'}"]
        build.run([*link, "-ltorch_cpu", "-lc10", "-o", str(library)])
    return library


torch.ops.load_library(build_cpu_kernels())
sys.modules["evkernels._C"] = types.ModuleType("evkernels._C")
sys.exit(pytest.main(sys.argv[1:]))
