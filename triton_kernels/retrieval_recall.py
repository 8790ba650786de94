"""Recall of retrieval in Triton: tiles of cosines by a library's product, each counted in one pass.

One program takes ROWS queries and counts, over the targets of a tile, those that come before the query's own.
PyTorch's comparisons and sums would write and read a mask of the tile besides.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import launch
from torch import Tensor

from evkernels.reference.contrastive_loss import unit_rows
from evkernels.reference.retrieval_recall import share_within

# Rows and columns of a tile: four megabytes of float32.
TILE = 1024
ROWS, COLUMNS = 16, 128


@triton.jit
def retrieval_recall_kernel(
    cosines_ptr, own_ptr, ranks_ptr, offset, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adds to `ranks`; `offset` is the number of the tile's first query less that of its first target."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    cosines_ptr += first * columns
    row = tl.arange(0, ROWS)
    i = first + row
    own = tl.load(own_ptr + i, i < rows, 0.0)
    earlier = (i + offset).to(tl.int32)
    before = tl.zeros((ROWS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        cosines = tl.load(cosines_ptr + row[:, None] * columns + j[None, :], inside, -float("inf"))
        # Of equal cosines those of earlier targets count.
        is_tie = (cosines == own[:, None]) & (j[None, :] < earlier[:, None])
        before += tl.sum(((cosines > own[:, None]) | is_tie).to(tl.int32), 1)
    tl.store(ranks_ptr + i, tl.load(ranks_ptr + i, i < rows, 0) + before, i < rows)


def retrieval_recall(queries: Tensor, targets: Tensor, ks: Sequence[int]) -> Tensor:
    p, q = unit_rows(queries), unit_rows(targets)
    ranks = torch.zeros(len(p), dtype=torch.int64, device=p.device)
    owns = p.new_empty(len(p))
    for begin in range(0, len(p), TILE):
        strip = slice(begin, begin + TILE)
        # First the tile in which queries meet their own targets.
        for at in sorted(range(0, len(q), TILE), key=lambda at, begin=begin: at != begin):
            cosines = torch.mm(p[strip], q[at : at + TILE].T)
            if at == begin:
                owns[strip] = cosines.diagonal()
            programs = triton.cdiv(len(cosines), ROWS)
            launch(retrieval_recall_kernel, programs)(
                cosines, owns[strip], ranks[strip], begin - at, *cosines.shape, ROWS=ROWS, COLUMNS=COLUMNS
            )
    return share_within(ranks, owns, ks)
