"""What nvcc's assembler reports of every CUDA kernel, and the theoretical occupancy that follows.

`python tests/gpu_resources.py` prints the table; `make gpu-check` holds it to benchmarks/gpu_budgets.toml. A kernel
stands for all its instantiations for 16- and 32-bit types: the table has the largest figure among them. Those for
float64 exist for checking gradients and are left out.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from emulation import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGETS = build.ROOT / "benchmarks" / "gpu_budgets.toml"
# Per multiprocessor: threads, registers, bytes of shared memory (CUDA C++ Programming Guide, compute capabilities).
MULTIPROCESSORS = {80: (2048, 65536, 164 << 10), 90: (2048, 65536, 228 << 10), 100: (2048, 65536, 228 << 10)}


@dataclass(frozen=True)
class Resources:
    registers: int = 0  # per thread
    shared: int = 0  # static bytes per block
    spilled: int = 0  # bytes stored and loaded per thread

    def largest(self, other: "Resources") -> "Resources":
        return Resources(*(max(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))


def budgets() -> dict[str, dict]:
    return tomllib.loads(BUDGETS.read_text())


def parse(report: str) -> dict[tuple[str, int], Resources]:
    """{(kernel, architecture): its largest resources} from the assembler's report."""
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(entry[0] for entry in entries), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found: dict[tuple[str, int], Resources] = {}
    for name, (_, architecture, stores, loads, registers, rest) in zip(demangled, entries, strict=True):
        if "double" in name.partition("(")[0]:
            continue
        kernel = re.search(r"(\w+)(<|\()", name.replace("(anonymous namespace)::", ""))[1]
        shared = re.search(r"(\d+) bytes smem", rest)
        resources = Resources(int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
        key = (kernel, int(architecture))
        found[key] = resources.largest(found.get(key, Resources()))
    return found


def measure(cuda_home: Path) -> dict[tuple[str, int], Resources]:
    """The resources of all kernels of the package; compiles what changed since the last time."""
    found = {}
    for unit in build.sources():
        found |= parse(build.compile_cuda(unit, cuda_home))
    return found


def exceeded(found: dict[tuple[str, int], Resources], allowed: dict[str, dict]) -> list[str]:
    """One line for every kernel that takes more than its budget, has none, or is gone."""
    lines = [f"{kernel}: no budget in {BUDGETS.name}" for kernel in sorted({k for k, _ in found} - allowed.keys())]
    lines += [f"{kernel}: has a budget and does not exist" for kernel in sorted(allowed.keys() - {k for k, _ in found})]
    for (kernel, architecture), resources in sorted(found.items()):
        budget = allowed.get(kernel, {})
        limits = Resources(budget.get("registers", {}).get(f"sm_{architecture}", 0), budget.get("shared", 0))
        for name in Resources.__dataclass_fields__ if budget else ():
            limit, value = getattr(limits, name), getattr(resources, name)
            if value > limit:
                lines.append(f"{kernel} sm_{architecture}: {name} at most {limit}, is {value}")
        least = budget.get("occupancy", {}).get(f"sm_{architecture}", 0)
        share = int(100 * occupancy(resources, budget.get("threads", 32), architecture, budget.get("dynamic", 0)))
        if share < least:
            lines.append(f"{kernel} sm_{architecture}: occupancy at least {least} %, is {share} %")
    return lines


def occupancy(resources: Resources, threads: int, architecture: int, dynamic: int = 0) -> float:
    """The share of a multiprocessor's threads that its registers and shared memory leave room for."""
    all_threads, all_registers, all_shared = MULTIPROCESSORS[architecture]
    # Registers are handed out to warps in units of 256, and each block takes 1 KiB of shared memory for the system.
    warp_registers = -(-resources.registers * 32 // 256) * 256
    blocks = min(
        all_threads // threads,
        all_registers // (warp_registers * (threads // 32)),
        all_shared // (resources.shared + dynamic + 1024),
    )
    return blocks * threads / all_threads


def table(cuda_home: Path) -> str:
    """Markdown: one row per kernel, the architectures side by side."""
    architectures = [int(architecture) for architecture in build.ARCHITECTURES]
    found, allowed = measure(cuda_home), budgets()["cuda"]
    lines = [
        "| kernel | threads | shared bytes | " + " | ".join(f"sm_{a}" for a in architectures) + " | bytes moved |",
        "|---|---|---|" + "---|" * len(architectures) + "---|",
    ]
    for kernel in sorted({kernel for kernel, _ in found}):
        budget = allowed[kernel]
        threads, dynamic = budget["threads"], budget.get("dynamic", 0)
        cells = [
            f"{found[kernel, a].registers} registers, {occupancy(found[kernel, a], threads, a, dynamic):.0%}"
            for a in architectures
        ]
        shared = f"{found[kernel, architectures[0]].shared:,}" + (f" + {dynamic:,}" if dynamic else "")
        name, moved = kernel.removesuffix("_kernel"), budget["bytes"]
        lines.append(f"| {name} | {threads} | {shared} | " + " | ".join(cells) + f" | {moved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    home = build.find_cuda_home()
    if home is None:
        sys.exit("no CUDA toolkit: set CUDA_HOME to a folder with bin/nvcc and include/cuda_runtime.h")
    print(table(home))
