"""Where elementwise kernels find their elements: one program takes BLOCK of them, whatever rows they lie in.

A row is `inner` consecutive elements of the state: a sample if contiguous, a pixel if channels_last. Tensors with k
blocks of channels have rows k times as long (see csrc/common/rows.inl). Rows are found by one scalar 64-bit division
per program and a 32-bit one per element; a two-dimensional grid over rows would leave most of each block idle when
inner is a few channels.
"""

import triton
import triton.language as tl

# Four elements per thread of the default four warps, so that float32 accesses are 16 bytes; eight double the registers.
BLOCK = 512


@triton.jit
def row_offsets(inner, total, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of this program's elements in the state and in block 0 of a tensor with BLOCKS blocks; which exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // inner
    within = (start - first_row * inner).to(tl.int32) + tl.arange(0, BLOCK)
    row = first_row + (within // inner).to(tl.int64)
    element = start + tl.arange(0, BLOCK)
    return element, (BLOCKS - 1) * row * inner + element, element < total
