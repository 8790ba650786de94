"""normalized_mse_cosine: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor


def eager(a, b):
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return F.mse_loss(p, q), (p * q).sum(1).mean()


def sample(rows, size, dtype=torch.float32, layout="contiguous"):
    a, noise = (tensor(rows, size, dtype=dtype, layout=layout, seed=seed) for seed in range(2))
    # So much alike that the mean cosine is not far below 1, in whose rounding its error lies.
    return a, (a + noise / 2).to(dtype)


def rolled(a, b):
    return eager(a.roll((1, 3), (0, 1)), b.roll((1, 3), (0, 1)))


def flipped(a, b):
    return eager(a.flip(0, 1), b.flip(0, 1))


class TestNormalizedMseCosine(DifferentiableOpContract):
    layouts = ("contiguous", "sliced")

    def op(self, *arguments):
        return ops.normalized_mse_cosine(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [rolled, flipped]

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        return [sample(9, 17, **options), sample(5, 33, **options), *[sample(700, 130, **options)] * large]

    def typical(self, dtype, layout):
        return [sample(16, 512, dtype=dtype)]

    def tiny(self):
        return sample(3, 4, dtype=torch.float64)

    def empty_samples(self):
        return [sample(1, 1)]

    def test_nearly_equal_rows_keep_the_accuracy_of_their_difference(self, backend):
        a = tensor(20, 64).to(backend.device)
        b = a * (3 + 1e-5 * tensor(20, 64, seed=2).to(backend.device))
        mse, _ = self.op(a, b)
        exact, _ = eager(*widened((a, b)))
        assert exact < 1e-11
        assert mse.item() == pytest.approx(exact.item(), rel=0.02)

    def test_rows_of_zeros(self, backend):
        a, b = (value.to(backend.device) for value in sample(6, 5))
        a[2], b[3] = 0, 0
        assert_matches(self.op(a, b), eager(*widened((a, b))), eager(a, b))
        assert all(d.isfinite().all() for d in gradients(self.op, (a, b)))

    def test_what_is_no_number_shows(self, backend):
        a, b = (value.to(backend.device) for value in sample(6, 35))
        b[4, 33] = float("nan")
        assert all(value.isnan() for value in self.op(a, b))

    def test_one_result_alone_is_differentiable(self, backend):
        a, b = (value.to(backend.device) for value in sample(6, 35))
        for k in range(2):
            exact = gradients(lambda *x, k=k: eager(*x)[k], widened((a, b)))
            expected = gradients(lambda *x, k=k: eager(*x)[k], (a, b))
            assert_matches(gradients(lambda *x, k=k: self.op(*x)[k], (a, b)), exact, expected)


def test_rejects_what_it_cannot_take():
    a, b = sample(4, 3)
    for arguments, error, words in (
        ((a[0], b[0]), ValueError, "a must be .N, D."),
        ((a[:, :0], b[:, :0]), ValueError, "at least 1"),
        ((a, b[:3]), ValueError, "b must be"),
        ((a, b.double()), TypeError, "b must be of dtype"),
    ):
        with pytest.raises(error, match=words):
            ops.normalized_mse_cosine(*arguments)
