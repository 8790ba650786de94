"""Runs the package's CUDA kernels on the CPU; ``build.py`` says how, ``cuda_emulation.h`` what is emulated."""

from .build import NAMESPACE, define_schemas, load, load_library, sanitizer_environment

__all__ = ["NAMESPACE", "define_schemas", "load", "load_library", "sanitizer_environment"]
