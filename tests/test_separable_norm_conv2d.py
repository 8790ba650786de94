"""separable_norm_conv2d: the contract of every op, and what is special to this one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, to_device
from test_separable_conv2d import ACTIVATIONS

from evkernels import ops
from evkernels.testing import tensor


def library_norm(value, groups, weight, bias, eps):
    if groups:
        return F.group_norm(value, groups, weight, bias, eps)
    return F.batch_norm(value, None, None, weight, bias, training=True, eps=eps)


def written_out_norm(value, groups, weight, bias, eps):
    grouped, dim = (value.unflatten(1, (groups, -1)), (2, 3, 4)) if groups else (value, (0, 2, 3))
    deviation = grouped - grouped.mean(dim, keepdim=True)
    normal = deviation / (deviation.square().mean(dim, keepdim=True) + eps).sqrt()
    return normal.reshape(value.shape) * weight[:, None, None] + bias[:, None, None]


def eager(
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias, output_norm_weight,
    output_norm_bias, residual=None, stride=1, padding=None, activation="none", output_activation="none", groups=0,
    output_groups=0, eps=1e-5, output_eps=1e-5, norm=library_norm, parts=None,
):  # fmt: skip
    padding = depthwise_weight.shape[-1] // 2 if padding is None else padding
    d = F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1])
    a = ACTIVATIONS[activation](norm(d, groups, norm_weight, norm_bias, eps))
    p = F.conv2d(a, pointwise_weight, pointwise_bias)
    y = ACTIVATIONS[output_activation](norm(p, output_groups, output_norm_weight, output_norm_bias, output_eps))
    y = y if residual is None else y + residual
    if parts is not None:
        parts += [d.detach(), p.detach()]
    return y


def sample(
    n, c, o, height, width, k=3, stride=1, activations=("none", "none"), groups=(0, 0), biases=(False, False),
    residual=False, eps=(1e-3, 1e-4), **options
):  # fmt: skip
    """Arguments for one call; `options` are the dtype and layout of x. Ahead of a batch norm a bias does nothing, and
    its gradient in plain PyTorch is all rounding: there is none unless asked for.
    """
    dtype = options.get("dtype", torch.float32)
    shape = (n, o, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return (
        tensor(n, c, height, width, seed=1, **options),
        tensor(c, 1, k, k, dtype=dtype, seed=2) * 0.5,
        tensor(o, c, 1, 1, dtype=dtype, seed=3) * c**-0.5,
        tensor(c, dtype=dtype, seed=4) if biases[0] else None,
        tensor(o, dtype=dtype, seed=5) if biases[1] else None,
        1 + tensor(c, dtype=dtype, seed=6) / 4,
        tensor(c, dtype=dtype, seed=7) / 4,
        1 + tensor(o, dtype=dtype, seed=8) / 4,
        tensor(o, dtype=dtype, seed=9) / 4,
        tensor(*shape, seed=10, **options) if residual else None,
        stride,
        None,
        *activations,
        *groups,
        *eps,
    )


def in_another_order(function, *arguments):
    """`function` with images turned about their diagonal: plain PyTorch's sums over pixels in another order."""

    def turned(value):
        return value.transpose(2, 3) if isinstance(value, torch.Tensor) and value.dim() == 4 else value

    return turned(function(*map(turned, arguments)))


class LiveNormContract:
    """`eager` takes the norm as its last argument by name."""

    # PyTorch traces again when a float, as eps, turns out to be a constant.
    most_frames = 6

    def other_eagers(self):
        return [partial(self.eager, norm=written_out_norm), partial(in_another_order, self.eager)]

    def test_gradients(self, backend, dtype, layout):
        if dtype != torch.float64:
            return super().test_gradients(backend, dtype, layout)
        # The gradient of a norm is a difference of sums, whose rounding the exact result shares in float64.
        for arguments in self.samples_for(backend, dtype, layout):
            actual, expected = (
                gradients(function, on)
                for function, on in ((self.op, to_device(arguments, backend.device)), (self.eager, arguments))
            )
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-13)
        return None


class TestSeparableNormConv2d(LiveNormContract, DifferentiableOpContract):
    def op(self, *arguments):
        return ops.separable_norm_conv2d(*arguments)[0]

    def eager(self, *arguments, **options):
        return eager(*arguments, **options)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # In float64 the exact result is eager's own: its long sums round as much as ours.
        large = large and dtype != torch.float64
        return [
            sample(2, 3, 3, 3, 5, activations=("none", "relu"), **options),
            sample(2, 6, 5, 4, 5, activations=("silu", "gelu"), **options),
            sample(
                2, 4, 6, 5, 7, stride=2, activations=("gelu", "silu"), groups=(2, 3), biases=(True, True), **options
            ),
            sample(
                2,
                5,
                5,
                4,
                4,
                k=5,
                activations=("relu", "none"),
                groups=(0, 1),
                biases=(False, True),
                residual=True,
                **options,
            ),
            *[sample(2, 33, 40, 37, 45, activations=("gelu", "silu"), **options)] * large,
            *[
                sample(
                    1,
                    20,
                    36,
                    11,
                    27,
                    k=5,
                    stride=2,
                    activations=("silu", "sigmoid"),
                    groups=(5, 4),
                    biases=(True, False),
                    **options,
                )
            ]
            * large,
        ]

    def tiny(self):
        arguments = sample(
            2, 2, 2, 2, 3, activations=("silu", "gelu"), groups=(1, 0), biases=(True, True), residual=True
        )
        return tuple(v.double() if isinstance(v, torch.Tensor) else v for v in arguments)

    def test_empty(self, backend):
        arguments = list(sample(1, 3, 4, 5, 6))
        arguments[0] = arguments[0][:0]
        with pytest.raises(ValueError, match="x must not be empty"):
            ops.separable_norm_conv2d(*arguments)

    def test_one_channel(self, backend):
        """In float64: in others a gradient of one number may be exact in plain PyTorch by luck."""
        arguments = sample(2, 1, 1, 2, 3, activations=("none", "relu"), dtype=torch.float64)
        on_device = to_device(arguments, backend.device)
        torch.testing.assert_close(self.op(*on_device).cpu(), self.eager(*arguments), rtol=1e-12, atol=1e-13)
        actual, expected = gradients(self.op, on_device), gradients(self.eager, arguments)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("offset", [0, 1000])
    def test_statistics(self, backend, offset):
        """As exact as the values behind them, also where sums of squares relative to zero would lose the variance."""
        arguments = list(sample(2, 3, 4, 9, 8, activations=("silu", "none"), groups=(0, 2), biases=(True, True)))
        # Without padding, whose zeros would make the variance large.
        arguments[0], arguments[11] = arguments[0] + offset, 0
        exact, plain = [], []
        eager(*(v.double() if isinstance(v, torch.Tensor) else v for v in arguments), parts=exact)
        eager(*arguments, parts=plain)
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        _, *statistics = ops.separable_norm_conv2d(*on_device)
        for actual, groups, value, rounded in zip(statistics, (0, 2), exact, plain, strict=True):
            values = value.unflatten(1, (groups, -1)) if groups else value
            dim = (2, 3, 4) if groups else (0, 2, 3)
            unit = 2 * (rounded - value).abs().max() + torch.finfo(torch.float32).eps * value.abs().max()
            mean, variance = values.mean(dim), values.var(dim, correction=0)
            assert (actual[0].cpu().squeeze(0) - mean).abs().max() <= unit
            assert (actual[1].cpu().squeeze(0) - variance).abs().max() <= 2 * unit * variance.sqrt().max() + unit**2

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_spreads_as_in_eager(self, backend, value):
        arguments = list(sample(2, 3, 4, 5, 6, activations=("silu", "silu"), groups=(3, 2)))
        arguments[0][1, 1, 2, 3] = value
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        y, expected = ops.separable_norm_conv2d(*on_device)[0].cpu(), eager(*arguments)
        assert torch.equal(y.isnan(), expected.isnan())
        assert not y[0].isnan().any()

    def test_keeps_only_what_the_documentation_says(self):
        arguments = sample(1, 8, 8, 20, 20)
        arguments[0].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, *_ = ops.separable_norm_conv2d(*arguments)
        large = {t.data_ptr() for t in saved if t.numel() >= y.numel()}
        assert len(large) == 2
        assert y.data_ptr() not in large

    def test_gradient_of_a_bias_before_a_batch_norm_is_exactly_zero(self, backend):
        for groups in ((0, 0), (0, 2)):
            arguments = sample(2, 3, 4, 5, 6, activations=("silu", "gelu"), groups=groups, biases=(True, True))
            inner, outer = gradients(self.op, to_device(arguments, backend.device))[3:5]
            assert inner.eq(0).all()
            assert outer.eq(0).all() == (groups[1] == 0)

    def test_zero_weights_have_gradients(self, backend):
        """Residual blocks begin with norms of weight zero."""
        arguments = list(sample(2, 3, 4, 5, 6, activations=("silu", "none"), biases=(True, True), dtype=torch.float64))
        arguments[5], arguments[7] = torch.zeros_like(arguments[5]), torch.zeros_like(arguments[7])
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        actual, expected = gradients(self.op, on_device), gradients(self.eager, arguments)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({2: (4, 2, 1, 1)}, r"pointwise_weight must be \[O, C, 1, 1\] with C = x.shape\[1\] = 3.*\(4, 2, 1, 1\)"),
            ({5: (4,)}, r"norm_weight must be \[C\] = \(3,\), got \(4,\)"),
            ({8: (3,)}, r"output_norm_bias must be \[O\] = \(4,\), got \(3,\)"),
            ({9: (2, 4, 5, 7)}, r"residual must be \[N, O, .* = \(2, 4, 5, 6\), got \(2, 4, 5, 7\)"),
            ({13: "tanh"}, "output_activation must be one of .*'tanh'"),
            ({14: 2}, "groups must be 0 or divide the 3 channels, got 2"),
            ({15: -1}, "output_groups must be 0 or divide the 4 channels, got -1"),
            ({0: (1, 3, 1, 1)}, "a norm must see more than one value, got groups = 0"),
        ],
    )
    def test_rejects(self, change, message):
        arguments = list(sample(2, 3, 4, 5, 6))
        for position, value in change.items():
            arguments[position] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(ValueError, match=message):
            ops.separable_norm_conv2d(*arguments)
