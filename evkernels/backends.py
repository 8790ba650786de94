"""Which kernels serve the ops: loading the compiled ones, choosing a backend, saying what runs where and why.

PyTorch's dispatcher does the dispatching. A backend is a table of kernels for one dispatch key: "cpu" and "cuda" are
registered by importing `evkernels._C`; "reference" lies under every op; "triton" is registered from Python. Choosing
a backend puts its kernels in front for as long as it is chosen, so compiled graphs and backward passes follow it too.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

import torch

from evkernels.ops.registration import composed_kernels, composed_keys, default_kernels, schemas

NAMES = ("reference", "cpu", "cuda", "triton")

# Kernels to put in front, per device type; None where the backend has no kernel of the op.
Tables = dict[str, dict[str, Callable | None]]

_lock = RLock()
_extra: dict[str, tuple[str, Callable[[str], Callable | None]]] = {}
_overrides: list[torch.library.Library] = []
_tables_in_front: Tables = {}
_chosen: str | None = None


def _load_compiled() -> str | None:
    """Imports evkernels._C; returns None or the reason why there are no compiled kernels."""
    try:
        importlib.import_module("evkernels._C")
    except ImportError as error:
        return f"evkernels._C is not built or does not load: {error}"
    try:
        # The first call reads EVKERNELS_CPU_ISA: a value that cannot be obeyed must not surface in the middle of a run.
        torch.ops.evkernels.cpu_isa()
    except RuntimeError as error:
        raise ValueError(f"EVKERNELS_CPU_ISA={os.environ['EVKERNELS_CPU_ISA']}: {error}") from None
    return None


compiled_error = _load_compiled()
# Taken before any other kernel is put in front: what the extension itself registered.
_compiled_kernels = frozenset(
    (op, device_type)
    for op in schemas
    for device_type in ("cpu", "cuda")
    if device_type.upper() not in composed_keys.get(op, ())
    and torch._C._dispatch_has_kernel_for_dispatch_key(f"evkernels::{op}", device_type.upper())
)


def unavailable(name: str) -> str | None:
    """None if the backend can serve here, else the reason why it cannot."""
    if name in _extra or name == "reference":
        return None
    if name == "cpu":
        return compiled_error
    if name == "cuda":
        return compiled_error or _no_cuda_kernels() or why_no_gpu()
    if name == "triton":
        return why_no_triton() or (None if _triton_interprets() else why_no_gpu())
    raise ValueError(f"backend must be one of {', '.join((*NAMES, *_extra))}, got {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """All ops run on the named backend inside this context, in every thread; nests, and restores what was there.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" or "cuda" (compiled kernels), "triton" (CUDA devices; CPU
            tensors where TRITON_INTERPRET=1). The environment variable EVKERNELS_BACKEND chooses for the whole
            process.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot serve here; the message says why. An op that the chosen backend has no kernel for
            raises when called: there is no silent fallback from a chosen backend.

    Kernels take effect per dispatch key: "cpu" leaves CUDA tensors alone and the other way round. The choice is one
    for the whole process, so another thread that enters `use_backend` waits until this context ends. A backward pass
    runs on the backend that is chosen when it runs.
    """
    with _lock:
        previous = _chosen
        _choose(name)
        try:
            yield
        finally:
            _choose(previous)


def add_backend(name: str, device_type: str, kernel_of: Callable[[str], Callable | None]) -> None:
    """Makes another table of kernels choosable: `kernel_of(op)` is the kernel of `op` on `device_type`, or None."""
    _extra[name] = (device_type, kernel_of)


def has_compiled_kernel(op: str, device_type: str) -> bool:
    """True if evkernels._C holds a kernel of `op` for "cpu" or "cuda"."""
    return (op, device_type) in _compiled_kernels


def chosen() -> str | None:
    """The backend named by EVKERNELS_BACKEND or `use_backend`; None while PyTorch's dispatcher decides alone."""
    return _chosen


def serving(op: str, device_type: str) -> tuple[str, bool]:
    """The backend that `op` goes to for tensors on `device_type`, and whether it has a kernel (else it raises)."""
    table = _tables_in_front.get(device_type, {})
    if op in table:
        return _chosen or "triton", table[op] is not None
    served = has_compiled_kernel(op, device_type) or device_type.upper() in composed_keys.get(op, ())
    return (device_type if served else "reference"), True


def _choose(name: str | None) -> None:
    global _chosen, _tables_in_front
    reason = unavailable(name) if name is not None else None
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve: {reason}")
    tables = _tables(name)
    for library in _overrides:
        library._destroy()
    _overrides.clear()
    _chosen, _tables_in_front = name, tables
    for device_type, kernels in tables.items():
        library = torch.library.Library("evkernels", "IMPL", device_type.upper())
        with warnings.catch_warnings():
            # PyTorch warns that a kernel is put in front of another, which is the purpose here.
            warnings.simplefilter("ignore", UserWarning)
            for op, kernel in kernels.items():
                library.impl(op, kernel or _missing(op, name))
        _overrides.append(library)


def _tables(name: str | None) -> Tables:
    if name is None:
        return _default_tables()
    if name == "reference":
        return {"cpu": default_kernels, "cuda": default_kernels}
    if name == "triton":
        return {"cpu" if _triton_interprets() else "cuda": _triton_kernels()}
    if name in _extra:
        device_type, kernel_of = _extra[name]
        return {device_type: {op: kernel_of(op) or composed_kernels.get(op) for op in schemas}}
    return {name: {op: composed_kernels.get(op) for op in schemas if not has_compiled_kernel(op, name)}}


def _default_tables() -> Tables:
    """Where the build has no CUDA kernel of an op, a CUDA torch is served by Triton. Deciding it touches no device."""
    lacking = [op for op in schemas if not has_compiled_kernel(op, "cuda")]
    if torch.version.cuda is None or not lacking or _triton_interprets() or why_no_triton():
        return {}
    kernels = _triton_kernels()
    return {"cuda": {op: kernels[op] for op in lacking if kernels[op]}}


def _triton_kernels() -> dict[str, Callable | None]:
    from evkernels import triton_kernels

    return {op: getattr(triton_kernels, op, None) or composed_kernels.get(op) for op in schemas}


def _missing(op: str, backend: str) -> Callable:
    def kernel(*arguments):
        raise RuntimeError(f"{op} has no {backend} kernel; choose another backend for it")

    return kernel


def _no_cuda_kernels() -> str | None:
    if any(has_compiled_kernel(op, "cuda") for op in schemas):
        return None
    return "evkernels._C was built without CUDA kernels (no nvcc was found, or EVKERNELS_CUDA=0)"


def why_no_gpu() -> str | None:
    """None if there is a CUDA device, else the reason why not."""
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@cache
def why_no_triton() -> str | None:
    """None if triton can be imported, else the reason why not."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not load: {error}"
    return None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _choose_from_environment() -> None:
    name = os.environ.get("EVKERNELS_BACKEND") or None
    try:
        _choose(name)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"EVKERNELS_BACKEND={name}: {error}") from None
    if compiled_error and name is None:
        warnings.warn(
            f"the plain PyTorch references serve CPU tensors, slowly: {compiled_error} "
            "(EVKERNELS_BACKEND=reference accepts that without this warning)",
            RuntimeWarning,
            stacklevel=2,
        )


_choose_from_environment()
