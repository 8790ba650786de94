"""retrieval_recall: the contract of every op, and what is special to this one."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, peak_memory

from evkernels import ops
from evkernels.testing import tensor


def eager(queries, targets, ks):
    wide = torch.promote_types(queries.dtype, torch.float32)
    similarities = F.normalize(queries.to(wide), dim=1) @ F.normalize(targets.to(wide), dim=1).T
    order = similarities.argsort(dim=1, descending=True, stable=True)
    own = torch.arange(len(order), device=order.device)[:, None]
    return torch.stack([(order[:, :k] == own).any(1).double().mean() for k in ks])


def sample(count, size, ks, dtype=torch.float32, layout="contiguous"):
    targets = tensor(count, size, dtype=dtype, layout=layout)
    return (targets + 2 * tensor(count, size, dtype=dtype, layout=layout, seed=1)).to(dtype), targets, ks


class TestRetrievalRecall(OpContract):
    layouts = ("contiguous", "sliced")

    def op(self, *arguments):
        return ops.retrieval_recall(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        small = [sample(20, 7, [1, 5, 20], **options), sample(33, 16, [2], **options)]
        return [
            *small,
            *[sample(1100, 8, [1, 5, 10], **options)] * (large and dtype == torch.float32 and layout == "contiguous"),
        ]

    def typical(self, dtype, layout):
        return [sample(1024, 16, [1, 5], dtype=dtype)]

    def tiny(self):
        return sample(5, 3, [1, 2], dtype=torch.float64)

    def empty_samples(self):
        return [(*sample(3, 0, [1, 3])[:2], [1, 3])]

    @pytest.mark.parametrize("count", [43, 1400])
    def test_several_tiles_and_ties(self, backend, monkeypatch, count):
        """Axes of one and many times: every similarity is exactly 0 or 1, most of them ties."""
        monkeypatch.setattr(importlib.import_module("evkernels.ops.retrieval_recall"), "_TILE", count // 5)
        if backend.name == "triton":
            monkeypatch.setattr(
                importlib.import_module("evkernels.triton_kernels.retrieval_recall"), "TILE", count // 5
            )
        axes = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(3))
        targets = torch.eye(5)[axes].to(backend.device)
        queries = torch.eye(5)[axes.roll(1)].to(backend.device)
        for pair in ((queries, targets), (targets, targets)):
            ks = list(range(1, count + 1, max(1, count // 40)))
            assert torch.equal(ops.retrieval_recall(*pair, ks), eager(*pair, ks))

    def test_of_equal_targets_the_first_wins(self, backend):
        same = torch.ones(4, 3, device=backend.device)
        assert ops.retrieval_recall(same, same, (1, 2, 4)).tolist() == [0.25, 0.5, 1.0]

    def test_a_similarity_that_is_no_number_is_not_found(self, backend):
        a = torch.eye(4, device=backend.device)
        b = a.clone()
        b[2, 2] = float("nan")
        assert ops.retrieval_recall(a, b, (1, 4)).tolist() == [0.75, 0.75]


def test_memory_of_many_pairs_is_a_tile():
    """All similarities of 50,000 pairs would take 10 GB."""
    queries, targets, ks = sample(50_000, 4, [1, 10])
    assert 0 < peak_memory(lambda: ops.retrieval_recall(queries, targets, ks)) < 16e6


def test_has_no_gradient():
    queries, targets, ks = sample(5, 3, [1])
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        ops.retrieval_recall(queries.requires_grad_(), targets, ks).sum().backward()


def test_rejects_what_it_cannot_take():
    a, b, _ = sample(4, 3, [1])
    for arguments, error, words in (
        ((a[0], b), ValueError, "queries must be .N, D."),
        ((a[:0], b[:0]), ValueError, "at least 1"),
        ((a, b[:3], (1,)), ValueError, "targets must be"),
        ((a, b, (5,)), ValueError, "k must be in"),
        ((a, b, (0,)), ValueError, "k must be in"),
        ((a, b, (1.0,)), TypeError, "k must be an int"),
        ((a, b.double(), (1,)), TypeError, "targets must be of dtype"),
    ):
        with pytest.raises(error, match=words):
            ops.retrieval_recall(*arguments)
