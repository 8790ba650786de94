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
from threading import RLock

import torch

from evkernels.ops.registration import default_kernels, schemas

NAMES = ("reference", "cpu", "cuda", "triton")

_lock = RLock()
_extra: dict[str, tuple[str, Callable[[str], Callable | None]]] = {}
_overrides: list[torch.library.Library] = []
_chosen: str | None = None


def _load_compiled() -> str | None:
    """Imports evkernels._C; returns None or the reason why there are no compiled kernels."""
    try:
        importlib.import_module("evkernels._C")
    except ImportError as error:
        return f"evkernels._C is not built or does not load: {error}"
    return None


compiled_error = _load_compiled()


def unavailable(name: str) -> str | None:
    """None if the backend can serve here, else the reason why it cannot."""
    if name in _extra or name == "reference":
        return None
    if name == "cpu":
        return compiled_error
    if name == "cuda":
        return compiled_error or _no_cuda_kernels() or _no_gpu()
    if name == "triton":
        return _no_triton() or (None if _triton_interprets() else _no_gpu())
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

    Kernels take effect per dispatch key: "cpu" leaves CUDA tensors alone and the other way round.
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
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"evkernels::{op}", device_type.upper())


def _choose(name: str | None) -> None:
    global _chosen
    reason = unavailable(name) if name is not None else None
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve: {reason}")
    for library in _overrides:
        library._destroy()
    _overrides.clear()
    _chosen = name
    for device_type, kernels in _tables(name):
        library = torch.library.Library("evkernels", "IMPL", device_type.upper())
        with warnings.catch_warnings():
            # PyTorch warns that a kernel is put in front of another, which is the purpose here.
            warnings.simplefilter("ignore", UserWarning)
            for op, kernel in kernels.items():
                library.impl(op, kernel)
        _overrides.append(library)


def _tables(name: str | None) -> list[tuple[str, dict[str, Callable]]]:
    """The kernels to put in front, per device type."""
    if name is None:
        return [("cuda", _triton_kernels())] if _triton_by_default else []
    if name == "reference":
        return [("cpu", default_kernels), ("cuda", default_kernels)]
    if name == "triton":
        return [("cpu" if _triton_interprets() else "cuda", _triton_kernels())]
    if name in _extra:
        device_type, kernel_of = _extra[name]
        return [(device_type, {op: kernel_of(op) or _missing(op, name) for op in schemas})]
    return [(name, {op: _missing(op, name) for op in schemas if not has_compiled_kernel(op, name)})]


def _triton_kernels() -> dict[str, Callable]:
    from evkernels import triton_kernels

    return {op: getattr(triton_kernels, op, None) or _missing(op, "triton") for op in schemas}


def _missing(op: str, backend: str) -> Callable:
    def kernel(*arguments):
        raise RuntimeError(f"{op} has no {backend} kernel; choose another backend for it")

    return kernel


def _no_cuda_kernels() -> str | None:
    if any(has_compiled_kernel(op, "cuda") for op in schemas):
        return None
    return "evkernels._C was built without CUDA kernels (no nvcc was found, or EVKERNELS_CUDA=0)"


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# Without CUDA kernels in the build a CUDA torch is served by Triton. No device is touched to decide it.
_triton_by_default = torch.version.cuda is not None and not _no_triton() and bool(compiled_error or _no_cuda_kernels())
_choose(os.environ.get("EVKERNELS_BACKEND") or None)
