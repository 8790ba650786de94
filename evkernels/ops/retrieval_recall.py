"""Contract of `retrieval_recall`: documentation, argument checks, schema, shape rule; composition for GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.reference.contrastive_loss import unit_rows
from evkernels.reference.retrieval_recall import share_within

# Rows and columns of a tile of similarities: four megabytes of float32.
_TILE = 1024


def retrieval_recall(queries: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Tensor:
    """Recall at k: the share of queries whose own target is among the k targets of the largest cosine.

    Equivalent to::

        similarities = F.normalize(queries, dim=1) @ F.normalize(targets, dim=1).T
        order = similarities.argsort(dim=1, descending=True, stable=True)
        recall = torch.stack([(order[:, :k] == torch.arange(len(order))[:, None]).any(1).double().mean() for k in ks])

    Args:
        queries: Features [N, D], N of at least 1; row i belongs to row i of `targets`. float32, bfloat16, float16 or
            float64.
        targets: Features [N, D], dtype and device of `queries`.
        ks: How many targets count as found, each 1 to N.

    Returns:
        recall: float64 [len(ks)], 0 to 1, in the order of `ks`.

    Raises:
        TypeError: if a tensor or a k is of another type.
        ValueError: if shapes or devices disagree, N is 0 or a k is not in [1, N].

    Similarities are computed in float32 (float64 for float64) by tiles of 1024 x 1024, never all at once. Of equal
    similarities the earlier row comes first; equality is that of the computed numbers. Where a similarity of a pair is
    NaN, the target counts as not found. Under autocast features are cast to float32. Deterministic for a number of
    threads. Not differentiable: asking for a gradient raises.
    """
    checks.check_tensor("queries", queries)
    checks.check_tensor("targets", targets, (queries.dtype,))
    checks.check_same_device("targets", targets, "queries", queries)
    if queries.dim() != 2 or queries.shape[0] == 0:
        raise ValueError(f"queries must be [N, D] with N of at least 1, got {tuple(queries.shape)}")
    checks.check_shape("targets", targets, queries.shape, "[N, D] as queries")
    for k in ks:
        checks.check_int("k", k, 1, queries.shape[0])
    return _op(queries, targets, list(ks))


def composed(queries: Tensor, targets: Tensor, ks: Sequence[int]) -> Tensor:
    """A kernel of `retrieval_recall` for backends without one: a library's products and comparisons, tile by tile."""
    p, q = unit_rows(queries), unit_rows(targets)
    ranks, owns = [], []
    for begin in range(0, len(p), _TILE):
        rows = p[begin : begin + _TILE]
        tile = rows @ q[begin : begin + _TILE].T
        own = tile.diagonal().clone()[:, None]
        rank = torch.where(torch.ones_like(tile, dtype=torch.bool).tril(-1), tile >= own, tile > own).sum(1)
        # Of equal similarities those of earlier rows count.
        for at in range(0, len(q), _TILE):
            if at != begin:
                torch.mm(rows, q[at : at + _TILE].T, out=(tile := _sized(tile, len(rows), min(_TILE, len(q) - at))))
                rank += (tile >= own if at < begin else tile > own).sum(1)
        ranks.append(rank)
        owns.append(own[:, 0])
    return share_within(torch.cat(ranks), torch.cat(owns), ks)


def _sized(tile: Tensor, rows: int, columns: int) -> Tensor:
    return tile if tile.shape == (rows, columns) else tile.new_empty((rows, columns))


_op = registration.define(
    "retrieval_recall(Tensor queries, Tensor targets, int[] ks) -> Tensor",
    reference=reference.retrieval_recall,
    fake=lambda queries, targets, ks: queries.new_empty(len(ks), dtype=torch.float64),
)
registration.define_composed(_op, composed)
registration.forbid_gradient(_op, "ranks do not change with small changes of the features")
registration.define_autocast(_op, lambda dtype, queries, targets, ks: (queries.float(), targets.float(), ks))
