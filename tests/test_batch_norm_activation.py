"""batch_norm_activation: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract
from test_separable_conv2d import ACTIVATIONS
from test_separable_norm_conv2d import LiveNormContract, library_norm

from evkernels import ops
from evkernels.testing import tensor


def eager(x, weight, bias, projection, activation, eps, norm=library_norm):
    y = ACTIVATIONS[activation](norm(x, 0, weight, bias, eps))
    return y if projection is None else F.conv2d(y, projection.view(1, -1, 1, 1))


def sample(*size, activation="gelu", eps=1e-3, projected=False, dtype=torch.float32, layout="contiguous"):
    channels = size[1]
    x = tensor(*size, dtype=dtype, layout=layout, seed=1)
    weight, bias, projection = (tensor(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    return x, 1 + weight / 4, bias / 4, projection if projected else None, activation, eps


class TestBatchNormActivation(LiveNormContract, DifferentiableOpContract):
    layouts = ("contiguous", "channels_last", "sliced")

    def op(self, *arguments):
        return ops.batch_norm_activation(*arguments)[0]

    def eager(self, *arguments, **options):
        return eager(*arguments, **options)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # In float64 the exact result is eager's own: its long sums round as much as ours.
        large = large and dtype != torch.float64
        return [
            # Sixteen, four and two pixels side by side in a vector, and one.
            sample(2, 1, 4, 6, activation="none", **options),
            sample(2, 3, 2, 4, activation="silu", **options),
            sample(2, 8, 3, 5, **options),
            sample(3, 17, 3, 3, activation="relu", **options),
            sample(2, 3, 3, 5, projected=True, **options),
            sample(2, 8, 3, 5, activation="silu", projected=True, **options),
            # Several tasks, the last one not whole.
            *[sample(2, 8, 37, 130, **options), sample(1, 33, 40, 50, activation="sigmoid", **options)] * large,
            *[sample(2, 33, 37, 130, projected=True, **options)] * large,
        ]

    def tiny(self):
        return sample(2, 2, 2, 3, projected=True, dtype=torch.float64)

    def test_empty(self, backend):
        _, *rest = sample(1, 3, 4, 5)
        with pytest.raises(ValueError, match=r"x must be .* not empty"):
            ops.batch_norm_activation(torch.zeros(0, 3, 4, 5), *rest)

    @pytest.mark.parametrize("offset", [0, 1000])
    def test_statistics(self, backend, offset):
        """Also where sums of squares relative to zero would lose the variance."""
        x, *rest = sample(2, 4, 20, 90, layout="channels_last")
        x = x + offset
        statistics = ops.batch_norm_activation(x.to(backend.device), *(v.to(backend.device) for v in rest[:2]))[1]
        variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(statistics[0].cpu().double(), mean, rtol=2e-7, atol=1e-7)
        torch.testing.assert_close(statistics[1].cpu().double(), variance, rtol=2e-6, atol=0)
        assert not statistics.requires_grad

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_in_its_channel(self, backend, value):
        x, *rest = sample(2, 4, 5, 6, layout="channels_last")
        x[1, 2, 3, 4] = value
        isnan = self.op(x.to(backend.device), *(v.to(backend.device) for v in rest[:2]), *rest[2:]).isnan().cpu()
        assert isnan[:, 2].all()
        assert not isnan[:, [0, 1, 3]].any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.zeros(3, 4)}, r"x must be \[N, C, H, W\] and not empty, got \(3, 4\)"),
            ({0: torch.zeros(1, 3, 1, 1)}, r"a norm must see more than one value of a channel, got \(1, 3, 1, 1\)"),
            ({1: torch.zeros(4)}, r"weight must be \[C\] = \(3,\), got \(4,\)"),
            ({2: torch.zeros(3, 1)}, r"bias must be \[C\] = \(3,\), got \(3, 1\)"),
            ({3: torch.zeros(1, 3, 1, 1)}, r"projection must be \[C\] = \(3,\), got \(1, 3, 1, 1\)"),
            ({4: "tanh"}, "activation must be one of .*'tanh'"),
        ],
    )
    def test_rejects(self, change, message):
        arguments = list(sample(2, 3, 4, 5))
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises(ValueError, match=message):
            ops.batch_norm_activation(*arguments)
