"""Runs the package's CUDA kernels on the CPU; ``build.py`` says how, ``cuda_emulation.h`` what is emulated."""

from .build import define_schemas, load, load_library, sanitizer_environment

__all__ = ["define_schemas", "load", "load_library", "sanitizer_environment"]
