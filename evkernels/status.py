"""What runs where and why, as text made for bug reports: `evkernels.status()`, `python -m evkernels status`."""

import ctypes
import importlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import evkernels
from evkernels import backends
from evkernels.ops.registration import schemas

SWITCHES = (
    "EVKERNELS_BACKEND",
    "EVKERNELS_CPU_ISA",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
# The backends that can ever serve tensors on a device, in the order in which they are preferred.
CANDIDATES = {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}


def status() -> str:
    """Versions, processor, build, devices, and for every op which backend serves it and why the others do not.

    Returns:
        Several lines of text without a trailing newline. Nothing is computed and no CUDA context is created.
    """
    build = _build_info()
    facts = {
        "evkernels": f"{evkernels.__version__} in {Path(evkernels.__file__).parent}",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"),
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "instruction set": _instruction_set(),
        "threads": str(torch.get_num_threads()),
        "compiled": backends.compiled_error or "evkernels._C loaded",
        "build": build if isinstance(build, str) else _describe(build),
        "CUDA driver": _cuda_driver(),
        "CUDA device": _cuda_device(),
        "triton": _triton(),
        "backend": f"{backends.chosen()} chosen for all ops" if backends.chosen() else "left to PyTorch's dispatcher",
        "environment": ", ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
        or "no switch set",
    }
    lines = [f"{name:<16} {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", *_table(), "", *_reasons("cpu"), *_reasons("cuda")])


def _table() -> list[str]:
    rows = [("op", "CPU tensors", "CUDA tensors")]
    for op in schemas:
        rows.append((op, *(_served_by(op, device) for device in CANDIDATES)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in rows]


def _served_by(op: str, device: str) -> str:
    name, has_kernel = backends.serving(op, device)
    return name if has_kernel else f"raises: no {name} kernel"


def _reasons(device: str) -> list[str]:
    """For each backend that leaves some ops on `device` to another, the reasons and the ops they hold for."""
    lines = []
    for name in CANDIDATES[device]:
        ops_by_reason: dict[str, list[str]] = {}
        for op in schemas:
            if backends.serving(op, device) != (name, True):
                ops_by_reason.setdefault(_why_not(name, op, device), []).append(op)
        for reason, ops in ops_by_reason.items():
            some = "" if len(ops) == len(schemas) else f" ({', '.join(ops)})"
            lines.append(f"  {name:<10} {reason}{some}")
    absent = backends.why_no_gpu() if device == "cuda" else None
    where = f"{device.upper()} tensors" + (f" (none here: {absent})" if absent else "")
    return [f"{where} are not served by", *lines] if lines else []


def _why_not(name: str, op: str, device: str) -> str:
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "takes CPU tensors only with TRITON_INTERPRET=1"
    reason = backends.unavailable(name)
    if reason:
        return reason
    if name in ("cpu", "cuda") and not backends.has_compiled_kernel(op, name):
        return "no kernel of this op"
    server, _ = backends.serving(op, device)
    how = "is chosen" if server == backends.chosen() else f"is preferred; use_backend({name!r}) chooses the other"
    return f"{server} {how}"


def _build_info() -> dict | str:
    try:
        return importlib.import_module("evkernels._host").build_info()
    except ImportError as error:
        return f"evkernels._host is not built or does not load: {error}"


def _describe(build: dict) -> str:
    archs = f"CUDA archs {build['cuda_archs']}" if build["cuda_archs"] else "no CUDA kernels"
    return f"{build['compiler']}, against torch {build['torch']}, {archs}{', debug' if build['debug'] else ''}"


def _processor() -> str:
    """The model as the kernel names it; the bare architecture where it names none (ARM, other systems)."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _instruction_set() -> str:
    if backends.compiled_error:
        return "of torch's own kernels: " + torch.backends.cpu.get_cpu_capability()
    return f"{torch.ops.evkernels.cpu_isa()} in use, best of this processor: {torch.ops.evkernels.best_cpu_isa()}"


def _cuda_driver() -> str:
    """The newest CUDA that the driver supports, asked from the driver itself: a CPU build of torch cannot tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "absent: libcuda.so.1 is not found"
    number = ctypes.c_int()
    error = driver.cuDriverGetVersion(ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}" if error == 0 else f"fails with error {error}"


def _cuda_device() -> str:
    absent = backends.why_no_gpu()
    return f"none: {absent}" if absent else ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))


def _triton() -> str:
    absent = backends.why_no_triton()
    mode = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiler"
    return absent or f"{version('triton')}, {mode}"
