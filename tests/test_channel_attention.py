"""channel_attention: the contract of every op, and what is special to this one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract

from evkernels import ops
from evkernels.testing import tensor


def mean(x):
    return x.mean((2, 3), keepdim=True)


def mean_of_columns(x):
    return x.mean(3, keepdim=True).mean(2, keepdim=True)


def eager(x, reduce_weight, expand_weight, mean=mean):
    return x * F.conv2d(F.gelu(F.conv2d(mean(x), reduce_weight)), expand_weight).sigmoid()


def sample(*size, narrow=2, offset=0, dtype=torch.float32, layout="contiguous"):
    x = tensor(*size, dtype=dtype, layout=layout, seed=1)
    weights = (2 * tensor(*shape, 1, 1, dtype=dtype, seed=2) for shape in ((narrow, size[1]), (size[1], narrow)))
    # A sum would be dense: the layout is kept.
    return x + offset if offset else x, *weights


class TestChannelAttention(DifferentiableOpContract):
    def op(self, *arguments):
        return ops.channel_attention(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [partial(eager, mean=mean_of_columns)]

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        return [
            sample(1, 1, 1, 1, narrow=1, **options),
            sample(1, 3, 2, 5, narrow=3, **options),
            sample(1, 17, 5, 3, **options),
            # Several tasks of each sample, the last one not whole.
            *[sample(2, 24, 37, 130, narrow=5, **options)] * large,
        ]

    def tiny(self):
        return sample(2, 3, 2, 3, dtype=torch.float64)

    def test_empty(self, backend):
        _, *weights = sample(1, 3, 4, 5)
        with pytest.raises(ValueError, match=r"x must be .* not empty"):
            ops.channel_attention(torch.zeros(0, 3, 4, 5), *weights)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_means_of_many_pixels_beside_a_large_offset(self, backend, threads):
        x, *weights = sample(1, 8, 130, 170, offset=1000, layout="channels_last")
        # Means of 1000 and more, held small in front of the network.
        weights[0] = weights[0] / 1000
        expected = eager(x.double(), *(value.double() for value in weights))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = self.op(*(value.to(backend.device) for value in (x, *weights)))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_in_its_sample(self, backend, value):
        x, *weights = sample(2, 4, 5, 6, layout="channels_last")
        x[1, 2, 3, 4] = value
        y = self.op(*(v.to(backend.device) for v in (x, *weights))).cpu()
        assert y[0].isfinite().all()
        torch.testing.assert_close(y, eager(x, *weights), equal_nan=True)

    def test_saturated_network(self, backend):
        """Scales of exactly 0 and 1, whose gradients vanish instead of becoming NaN."""
        x, *weights = sample(2, 4, 5, 6, layout="channels_last")
        arguments = [v.to(backend.device).requires_grad_() for v in (x, weights[0] * 100, weights[1] * 1e6)]
        y = self.op(*arguments)
        torch.testing.assert_close(y.cpu(), eager(*(v.detach().cpu() for v in arguments)))
        y.sum().backward()
        assert all(v.grad.isfinite().all() for v in arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.zeros(3, 4)}, r"x must be \[N, C, H, W\] and not empty, got \(3, 4\)"),
            (
                {1: torch.zeros(2, 4, 1, 1)},
                r"reduce_weight must be \[R, C, 1, 1\] = \(2, 3, 1, 1\), got \(2, 4, 1, 1\)",
            ),
            ({1: torch.zeros(0, 3, 1, 1)}, r"reduce_weight must be \[R, C, 1, 1\] with R >= 1, got \(0, 3, 1, 1\)"),
            ({2: torch.zeros(3, 2)}, r"expand_weight must be \[C, R, 1, 1\] = \(3, 2, 1, 1\), got \(3, 2\)"),
        ],
    )
    def test_rejects(self, change, message):
        arguments = list(sample(2, 3, 4, 5))
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises(ValueError, match=message):
            ops.channel_attention(*arguments)

    def test_rejects_other_dtypes(self):
        x, reduce_weight, expand_weight = sample(2, 3, 4, 5)
        with pytest.raises(TypeError, match=r"expand_weight must .*float32.*float64"):
            ops.channel_attention(x, reduce_weight, expand_weight.double())
