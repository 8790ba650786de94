"""depthwise_conv2d: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def eager(x, weight, bias=None, stride=1, padding=None, activation="none"):
    padding = weight.shape[-1] // 2 if padding is None else padding
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1]))


def sample(n, c, height, width, k=3, stride=1, padding=None, activation="none", bias=True, **options):
    """Arguments for one call; `options` are the dtype and layout of x."""
    x = tensor(n, c, height, width, seed=1, **options)
    dtype = options.get("dtype", torch.float32)
    weight = tensor(c, 1, k, k, dtype=dtype, seed=2) * 0.5
    return x, weight, tensor(c, dtype=dtype, seed=3) if bias else None, stride, padding, activation


class TestDepthwiseConv2d(DifferentiableOpContract):
    def op(self, *arguments):
        return ops.depthwise_conv2d(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # The float64 result that others are measured by is itself rounded: no long sums for float64.
        large = large and dtype != torch.float64
        return [
            sample(2, 3, 4, 5, activation="silu", **options),
            sample(1, 1, 1, 1, **options),
            sample(1, 17, 3, 6, stride=2, activation="gelu", **options),
            sample(1, 9, 4, 37, k=5, activation="gelu", **options),
            sample(1, 5, 9, 19, k=5, stride=2, bias=False, **options),
            sample(1, 2, 6, 9, k=7, stride=2, padding=4, activation="silu", **options),
            sample(1, 16, 5, 4, k=1, activation="relu", **options),
            *[sample(2, 33, 41, 50, stride=2, activation="gelu", **options)] * large,
            *[sample(2, 32, 23, 41, activation="silu", **options)] * large,
        ]

    def empty_samples(self):
        return [sample(0, 3, 4, 5, activation="silu"), sample(0, 5, 1, 1, k=5, stride=2)]

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("k", [1, 3, 5, 7])
    def test_every_border(self, k, stride, memory):
        """Maps narrower and wider than a vector and than the filter, paddings smaller and larger than it."""
        for channels, height, width in ((17, 9, 37), (16, 1, 1), (20, 7, 3), (1, 21, 50)):
            for padding in {k // 2, 0, k + 1}:
                if min(height, width) + 2 * padding < k:
                    continue
                arguments = sample(2, channels, height, width, k, stride, padding, "silu", layout=memory)
                assert_matches(ops.depthwise_conv2d(*arguments), eager(*widened(arguments)), eager(*arguments))
                exact, plain = (gradients(eager, given) for given in (widened(arguments), arguments))
                assert_matches(gradients(ops.depthwise_conv2d, arguments), exact, plain, what="gradient")

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("k", [3, 5])
    def test_infinities_reach_no_further_than_the_filter(self, k, stride, memory):
        arguments = sample(1, 17, 12, 41, k, stride, bias=False, layout=memory)
        arguments[0][0, 3, 0, 40] = float("inf")
        arguments[0][0, 5, 11, 0] = float("nan")
        assert_matches(ops.depthwise_conv2d(*arguments), eager(*widened(arguments)), eager(*arguments))
        exact, plain = (gradients(eager, given) for given in (widened(arguments), arguments))
        assert_matches(gradients(ops.depthwise_conv2d, arguments), exact, plain, what="gradient")
