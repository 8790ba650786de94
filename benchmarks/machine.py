"""The machine and the software that numbers were taken on, for the head of every report."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import evkernels
from evkernels import backends


def describe(device: str, threads: int) -> dict[str, str]:
    """What a reader needs to know to judge a number, in the order of printing."""
    facts = {
        "processor": _processor(),
        "instruction set": _instruction_set(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
    }
    if device == "cuda":
        facts["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts | {
        "torch": torch.__version__,
        "compiler": _compiler(),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "evkernels": evkernels.__version__,
        "commit": _commit(),
    }


def one_line(facts: dict[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instruction_set() -> str:
    if backends.compiled_error:
        return f"none ({backends.compiled_error})"
    return torch.ops.evkernels.cpu_isa()


def _compiler() -> str:
    try:
        from evkernels import _host
    except ImportError as error:
        return f"none ({error})"
    return _host.build_info()["compiler"]


def _commit() -> str:
    """The checked-out commit, marked if the tree has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks: no commit to name: {error}", file=sys.stderr)
        return "unknown"
    return answer.stdout.strip()
