"""Tensors of gigabytes in little memory: every few megabytes of their addresses are the same ones."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# Bytes that are repeated, an odd number of pages: whoever keeps 32 bits of an address comes out elsewhere in them.
REPEATED = 12_289 * mmap.PAGESIZE


@contextmanager
def repeated_memory(*shape: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor whose elements are those `REPEATED` bytes before and after them, while the context lasts."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("mapping the same memory many times is tried on Linux alone")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fixed = 0x10  # MAP_FIXED
    file = os.memfd_create("repeated")
    os.ftruncate(file, REPEATED)
    elements = torch.Size(shape).numel()
    size = -(-elements * dtype.itemsize // REPEATED) * REPEATED
    # A page on both sides that must not be touched.
    whole = libc.mmap(None, size + 2 * mmap.PAGESIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    try:
        first = whole + mmap.PAGESIZE
        for place in range(first, first + size, REPEATED):
            allowed = mmap.PROT_READ | mmap.PROT_WRITE
            assert libc.mmap(place, REPEATED, allowed, mmap.MAP_SHARED | fixed, file, 0) == place
        memory = (ctypes.c_char * size).from_address(first)
        yield torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)
    finally:
        libc.munmap(whole, size + 2 * mmap.PAGESIZE)
        os.close(file)
