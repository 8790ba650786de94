"""residual_mlp: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract

from evkernels import ops
from evkernels.testing import assert_matches, tensor

NAMES = ("x", "norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2", "scale", "eps")


def eager(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, eps):
    hidden = F.gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight1, bias1))
    return x + scale * F.linear(hidden, weight2, bias2)


def eager_backwards(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, eps):
    """The same with rows, channels and hidden layer in reversed order: plain PyTorch's sums in another order."""
    vectors = [value.flip(0) for value in (norm_weight, norm_bias, bias1, bias2, scale)]
    weights = [value.flip(0, 1) for value in (weight1, weight2)]
    y = eager(x.flip(0, -1), *vectors[:2], weights[0], vectors[2], weights[1], *vectors[3:], eps)
    return y.flip(0, -1)


def sample(size, hidden, dtype=torch.float32, layout="contiguous", eps=1e-5):
    channels = size[-1]

    def make(*shape, seed, factor=1.0):
        return tensor(*shape, dtype=dtype, layout=layout, seed=seed) * factor

    return (
        tensor(*size, dtype=dtype, layout=layout, seed=1),
        make(channels, seed=2),
        make(channels, seed=3),
        make(hidden, channels, seed=4, factor=channels**-0.5),
        make(hidden, seed=5),
        make(channels, hidden, seed=6, factor=hidden**-0.5),
        make(channels, seed=7),
        make(channels, seed=8),
        eps,
    )


class TestResidualMlp(DifferentiableOpContract):
    layouts = ("contiguous", "channels_last", "transposed", "sliced")

    def op(self, *arguments):
        return ops.residual_mlp(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [eager_backwards]

    def samples(self, dtype, layout, large):
        sizes = [((2, 3, 5, 17), 33), ((1, 2), 1), ((7, 40), 9), ((6, 16), 64)]
        # Rows of several tiles, sums in several parts.
        sizes += [((103, 2, 130), 261)] * large
        return [sample(*size, dtype, layout) for size in sizes]

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[-1:] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample((128, 32), 128, dtype, layout)]

    def tiny(self):
        return sample((2, 2, 3), 5, torch.float64, eps=1e-2)

    def empty_samples(self):
        return [sample((0, 3), 5), sample((2, 0, 4, 3), 2)]

    def test_nan_stays_in_its_row(self, backend):
        x, *rest = sample((30, 20), 40)
        expected = self.op(x, *rest)
        x[17, 3] = float("nan")
        x[4, 19] = float("inf")
        actual = self.op(x, *rest)
        others = torch.ones(30, dtype=torch.bool)
        others[[4, 17]] = False
        assert actual[[4, 17]].isnan().all()
        assert torch.equal(actual[others], expected[others])

    def test_a_mean_far_from_zero(self, backend):
        """Variances that a difference of squares would lose."""
        x, *rest = sample((50, 37), 40)
        x = 0.01 * x + 100
        exact = eager(*(value.double() if torch.is_tensor(value) else value for value in (x, *rest)))
        assert_matches(self.op(x, *rest), exact, eager(x, *rest), others=[eager_backwards(x, *rest)])

    @pytest.mark.parametrize("channels", [1, 16])
    def test_constant_rows(self, backend, channels):
        x, *rest = sample((5, channels), 8)
        x = torch.zeros_like(x) + 3
        torch.testing.assert_close(self.op(x, *rest), eager(x, *rest))

    def test_autocast_computes_in_float32(self, backend):
        arguments = [v.bfloat16() if torch.is_tensor(v) else v for v in sample((5, 16), 8)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = self.op(*arguments)
        assert torch.equal(result, self.op(*(v.float() if torch.is_tensor(v) else v for v in arguments)))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("x", torch.zeros(()), r"x must be \[..., C\] with C at least 1, got \(\)"),
            ("x", torch.zeros(4, 0), r"x must be \[..., C\] with C at least 1, got \(4, 0\)"),
            ("norm_weight", torch.zeros(3), r"norm_weight must be \[C\] = \(4,\), got \(3,\)"),
            ("weight1", torch.zeros(0, 4), r"weight1 must be \[H, C\] with H at least 1, got \(0, 4\)"),
            ("weight1", torch.zeros(7, 5), r"weight1 must be \[H, C\] = \(7, 4\), got \(7, 5\)"),
            ("weight2", torch.zeros(7, 4), r"weight2 must be \[C, H\] = \(4, 7\), got \(7, 4\)"),
            ("scale", torch.zeros(4, device="meta"), "scale must be on the device of x, cpu, got meta"),
        ],
    )
    def test_rejects_values(self, name, value, message):
        arguments = dict(zip(NAMES, sample((3, 4), 7), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.residual_mlp(**arguments | {name: value})

    def test_rejects_types(self):
        x, *rest = sample((3, 4), 7)
        with pytest.raises(TypeError, match=r"x must be of dtype .* got torch.int64"):
            ops.residual_mlp(x.long(), *rest)
        with pytest.raises(TypeError, match=r"norm_weight must be of dtype torch.float32, got torch.float64"):
            ops.residual_mlp(x, rest[0].double(), *rest[1:])
