"""Runs the package's CUDA kernels on the CPU, from the sources that nvcc compiles.

``load()`` after ``import evkernels.ops`` makes every op of ``csrc/*/cuda.cu`` callable on CPU tensors as
``torch.ops.evkernels_emulated.<op>``. ``cuda_emulation.h`` says what of CUDA exists, ``scheduler.h`` how threads are
run and what is reported, ``build.py`` how it is built; ``saxpy/`` is a complete example, ``faults.cuh`` holds the
planted faults.
"""

from .build import NAMESPACE, define_schemas, load, load_library, sanitizer_environment

__all__ = ["NAMESPACE", "define_schemas", "load", "load_library", "sanitizer_environment"]
