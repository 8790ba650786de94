"""blur_soft_pool2d: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract

from evkernels import ops
from evkernels.testing import assert_matches, tensor


def eager(x, stride=2, temperature=1.0):
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    blur = (line[:, None] * line / 16).expand(x.shape[1], 1, 3, 3)
    blurred = F.conv2d(x, blur, padding=1, groups=x.shape[1]) if x.numel() else x
    weight = (blurred / temperature).exp()
    return F.avg_pool2d(blurred * weight, 2, stride) / (F.avg_pool2d(weight, 2, stride) + 1e-6)


def sample(size, stride=2, temperature=1.0, dtype=torch.float32, layout="contiguous"):
    return tensor(*size, dtype=dtype, layout=layout, seed=1), stride, temperature


class TestBlurSoftPool2d(DifferentiableOpContract):
    # Strides and temperatures are constants of a graph.
    most_frames = 6

    def op(self, *arguments):
        return ops.blur_soft_pool2d(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        cases = [((2, 3, 5, 7), 2, 1.0), ((1, 1, 2, 2), 1, 0.5), ((2, 5, 4, 17), 1, 10.0), ((1, 2, 9, 34), 3, 2.0)]
        cases += [((3, 7, 33, 50), 2, 1.0)] * large
        return [sample(*case, dtype=dtype, layout=layout) for case in cases]

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[-1:] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample((1, 16, 16, 32), dtype=dtype, layout=layout)]

    def tiny(self):
        return sample((1, 2, 4, 5), dtype=torch.float64)

    def empty_samples(self):
        return [sample((0, 3, 4, 5))]

    @pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [20.0, 300.0, -300.0])
    def test_large_values(self, backend, half, value):
        """Exponentials of these overflow or vanish in all types but float64."""
        x = (tensor(1, 2, 7, 9, seed=3) + value).to(half)
        exact = eager(x.double())
        result = self.op(x.to(backend.device))
        # The definition's 1e-6 leaves nothing of values so far below zero.
        assert_matches(result, exact, exact.to(half))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_extreme_values_stay_in_their_windows(self, backend, value):
        x = tensor(1, 2, 16, 16, seed=1)
        expected = self.op(x.to(backend.device)).cpu()
        x[0, 1, 8, 8] = value
        changed = self.op(x.to(backend.device)).cpu()
        assert torch.equal(changed[0, 0], expected[0, 0])
        assert changed[0, 1, 3:5, 3:5].isnan().all()
        expected[0, 1, 3:5, 3:5] = changed[0, 1, 3:5, 3:5] = 0
        assert torch.equal(changed, expected)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.zeros(1, 1, 1, 4),), ValueError, "x must be .N, C, H, W. with H and W at least 2"),
            ((torch.zeros(2, 2, 2),), ValueError, "x must be"),
            ((torch.zeros(1, 1, 2, 2, dtype=torch.int64),), TypeError, "x must be of dtype"),
            ((torch.zeros(1, 1, 2, 2), 0), ValueError, "stride must be at least 1, got 0"),
            ((torch.zeros(1, 1, 2, 2), 1.0), TypeError, "stride must be an int"),
            ((torch.zeros(1, 1, 2, 2), 2, 0.0), ValueError, "temperature must be above 0"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            self.op(*arguments)
