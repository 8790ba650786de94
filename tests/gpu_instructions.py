"""Which instructions the compiler made of every CUDA kernel: PTX always, machine code where a disassembler is found.

A kernel stands for all its instantiations for 16- and 32-bit types, as in gpu_resources.py, with the largest count of
each class among them. benchmarks/gpu_budgets.toml says which counts must be reached (16-byte accesses, tensor cores)
and which not exceeded.
"""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from emulation import build

# What a budget may name, as it looks in PTX and in machine code. Generic atomics name no state space.
PTX = {
    "loads_16": r"\bld\.global[.\w]*\.(?:v4\.\w32|v2\.\w64)\b",
    "stores_16": r"\bst\.global[.\w]*\.(?:v4\.\w32|v2\.\w64)\b",
    "tensor": r"\b(?:mma|wmma\.mma|wgmma\.mma_async)\.sync\b",
    "special": r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx\b",
    "shuffles": r"\bshfl\.sync\b",
    "atomics": r"(?<!\.)\b(?:atom|red)\.(?!shared)(?!async)",
    "shared_atomics": r"\b(?:atom|red)\.shared\b",
}
SASS = {
    # They begin with their letters, which are found many times as fast in tens of megabytes.
    "loads_16": r"LDG\.E\.128\b",
    "stores_16": r"STG\.E\.(?:EF\.)?128\b",
    "tensor": r"\b[HQI]G?MMA\b",
}
AT_LEAST = ("loads_16", "stores_16", "tensor")


def count(text: str, split: str, patterns: dict[str, str]) -> dict[str, dict[str, int]]:
    """{kernel: {class: count}} of a listing in which `split` matches before each kernel and captures its name."""
    _, *parts = re.split(split, text)
    names, bodies = parts[::2], parts[1::2]
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found: dict[str, dict[str, int]] = {}
    for name, body in zip(demangled, bodies, strict=True):
        if "double" in name.partition("(")[0]:
            continue
        kernel = re.search(r"(\w+)(<|\()", name.replace("(anonymous namespace)::", ""))[1]
        counts = found.setdefault(kernel, dict.fromkeys(patterns, 0))
        for group, pattern in patterns.items():
            counts[group] = max(counts[group], len(re.findall(pattern, body)))
    return found


def in_ptx(text: str) -> dict[str, dict[str, int]]:
    return count(text, r"\.entry (\w+)", PTX)


def in_machine_code(listing: str) -> dict[str, dict[str, int]]:
    return count(listing, r"Function : (\w+)", SASS)


def find_disassembler(cuda_home: Path) -> Path | None:
    """Cuobjdump of the toolkit, of the wheel `nvidia-cuda-cuobjdump`, on PATH, or Triton's; beside nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump")
    candidates = [cuda_home / "bin" / "cuobjdump", *wheels, *filter(None, [shutil.which("cuobjdump")])]
    if triton := importlib.util.find_spec("triton"):
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((Path(path) for path in candidates if (Path(path).parent / "nvdisasm").exists()), None)


def disassemble(unit: Path, architecture: str, disassembler: Path) -> str:
    cubin = build.intermediate(unit, architecture, "cubin")
    environment = {"PATH": f"{disassembler.parent}:/usr/bin:/bin"}
    return subprocess.run(
        [disassembler, "-sass", cubin], capture_output=True, text=True, check=True, env=environment
    ).stdout


def differences(kernel: str, where: str, counts: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """One line for each class of instructions that a kernel has too few or too many of."""
    lines = []
    for group, value in counts.items():
        limit = allowed.get(group, 0)
        if group in AT_LEAST and value < limit:
            lines.append(f"{kernel} {where}: {group} at least {limit}, is {value}")
        if group not in AT_LEAST and value > limit:
            lines.append(f"{kernel} {where}: {group} at most {limit}, is {value}")
    return lines
