"""depthwise_conv2d: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def eager(x, weight, bias=None, stride=1, padding=None, activation="none", dilation=1):
    padding = (weight.shape[-1] - 1) * dilation // 2 if padding is None else padding
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1]))


def sample(n, c, height, width, k=3, stride=1, padding=None, activation="none", dilation=1, bias=True, **options):
    """Arguments for one call; `options` are the dtype and layout of x."""
    x = tensor(n, c, height, width, seed=1, **options)
    dtype = options.get("dtype", torch.float32)
    weight = tensor(c, 1, k, k, dtype=dtype, seed=2) * 0.5
    return x, weight, tensor(c, dtype=dtype, seed=3) if bias else None, stride, padding, activation, dilation


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
            # Six channels: eager's own error on the gradients of one or two biases is too often small by luck.
            sample(1, 6, 6, 9, k=7, stride=2, padding=4, activation="silu", **options),
            sample(1, 16, 5, 4, k=1, activation="relu", **options),
            sample(1, 6, 8, 21, dilation=2, activation="gelu_tanh", **options),
            sample(1, 17, 9, 6, k=5, padding=5, dilation=3, activation="sigmoid", **options),
            *[sample(2, 33, 41, 50, stride=2, activation="gelu", **options)] * large,
            *[sample(2, 32, 23, 41, activation="silu", **options)] * large,
        ]

    def typical(self, dtype, layout):
        return [sample(1, 64, 16, 32, activation=name, dtype=dtype, layout=layout) for name in ("none", "silu")]

    def tiny(self):
        return sample(1, 2, 2, 3, activation="silu", dtype=torch.float64)

    def empty_samples(self):
        return [sample(0, 3, 4, 5, activation="silu"), sample(0, 5, 1, 1, k=5, stride=2)]

    @pytest.mark.parametrize(
        ("k", "padding", "size"),
        [(1, 0, (3, 5)), (1, 2, (3, 5)), (3, 0, (3, 3)), (3, 4, (2, 5)), (5, 1, (3, 6)), (5, None, (1, 2)),
         (7, 0, (7, 8)), (7, None, (2, 3)), (31, None, (3, 2)), (31, 14, (3, 4))],
    )  # fmt: skip
    @pytest.mark.parametrize("stride", [1, 2])
    def test_filter_sizes_and_paddings(self, backend, k, padding, size, stride):
        """No padding, more than half the filter, filters larger than the image, one output pixel."""
        arguments = sample(1, 3, *size, k=k, stride=stride, padding=padding)
        exact, alike = widened(arguments), arguments
        on_device = self.on(backend, arguments)
        assert_matches(self.op(*on_device), eager(*exact), eager(*alike))
        if not (backend.is_slow and k == 31):
            assert_matches(gradients(self.op, on_device), gradients(eager, exact), gradients(eager, alike))

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(
        ("k", "dilation", "padding", "channels", "size"),
        [(1, 4, 0, 2, (3, 5)), (3, 2, None, 18, (13, 19)), (3, 3, 0, 3, (7, 8)), (3, 5, None, 17, (2, 1)),
         (3, 2, 7, 17, (1, 3)), (3, 9, None, 2, (23, 41)), (5, 2, 3, 33, (9, 12)), (7, 3, None, 3, (5, 40)),
         (31, 2, 31, 2, (2, 3))],
    )  # fmt: skip
    def test_dilations(self, backend, k, dilation, padding, channels, size, x_layout):
        """Blocks of rows cut short by the image, no padding, much padding, taps that all lie outside."""
        options = {"padding": padding, "dilation": dilation, "layout": x_layout}
        arguments = sample(1 if backend.is_slow else 2, channels, *size, k=k, **options)
        on_device = self.on(backend, arguments)
        assert_matches(self.op(*on_device), eager(*widened(arguments)), eager(*arguments))
        if not (backend.is_slow and k * k * channels > 200):
            exact, alike = gradients(eager, widened(arguments)), gradients(eager, arguments)
            assert_matches(gradients(self.op, on_device), exact, alike)

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_dilation_at_stride_2_runs_on_the_reference(self, k, x_layout):
        arguments = sample(2, 17, 12, 9, k=k, stride=2, dilation=2, activation="silu", layout=x_layout)
        y = self.op(*arguments)
        assert_matches(y, eager(*widened(arguments)), eager(*arguments))
        exact, alike = gradients(eager, widened(arguments)), gradients(eager, arguments)
        assert_matches(gradients(self.op, arguments), exact, alike)
        memory_format = torch.contiguous_format if x_layout == "contiguous" else torch.channels_last
        assert y.is_contiguous(memory_format=memory_format)
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.op(*arguments)
        half = [value.bfloat16() if torch.is_tensor(value) else value for value in arguments]
        assert torch.equal(z, self.op(*half))

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "sigmoid"])
    def test_activations_far_from_zero(self, backend, activation):
        # e^-x leaves the range of float32 between 87 and 90.
        x = [1e-30, 6.0, 30.0, 87.2, 87.4, 88.6, 88.8, 90.0, 1e15, 1e38]
        x = torch.tensor([-value for value in x] + x + [float("nan")])
        arguments = (x.repeat(5).reshape(1, 1, 5, 21), torch.ones(1, 1, 1, 1), None, 1, 0, activation)
        self.assert_like_eager(backend, arguments)
        x, *rest = self.on(backend, (arguments[0][..., :20].contiguous(), *arguments[1:]))
        (grad,) = torch.autograd.grad(self.op(x.requires_grad_(), *rest).sum(), x)
        finite = x.detach().double().clamp(-100, 100).requires_grad_()
        (expected,) = torch.autograd.grad(ACTIVATIONS[activation](finite).sum(), finite)
        torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
    def test_integers_are_exact(self, backend, x_layout, k, stride):
        """Sums of products that float32 holds exactly come out with the same bits as from plain PyTorch."""
        values = (
            tensor(*shape, layout=x_layout, seed=seed) for seed, shape in enumerate([(2, 5, 7, 9), (5, 1, k, k), (5,)])
        )
        x, weight, bias = ((4 * value).round() for value in values)
        arguments = (x, weight, bias, stride, k // 2 + 1, "relu")
        on_device = self.on(backend, arguments)
        assert torch.equal(self.op(*on_device).cpu(), eager(*arguments))
        for actual, expected in zip(gradients(self.op, on_device), gradients(eager, arguments), strict=True):
            assert torch.equal(actual.cpu(), expected)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38, 1e-40])
    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    def test_extreme_input(self, backend, value, x_layout):
        # PyTorch's float32 gelu(inf) is infinite or NaN, by the position in memory: infinities have a test below.
        k5 = "none" if abs(value) == float("inf") else "gelu"
        for k, stride, activation in ((3, 1, "relu"), (3, 2, "silu"), (5, 1, k5), (7, 2, "none"), (3, 1, "sigmoid")):
            x, *rest = sample(1, 3, 5, 11, k=k, stride=stride, activation=activation, layout=x_layout)
            x[0, 1, 2, 4] = value
            self.assert_like_eager(backend, (x, *rest))

    def test_gelu_of_infinities(self, backend):
        if backend.name == "reference":
            pytest.skip("the reference's float32 GELU is PyTorch's")
        x = torch.tensor([float("inf"), float("-inf"), 1.0, float("nan")]).repeat(20).reshape(1, 1, 1, 80)
        on_device = self.on(backend, (x, torch.ones(1, 1, 1, 1), None, 1, 0, "gelu"))
        assert_matches(self.op(*on_device), F.gelu(x.double()), F.gelu(x.double()).float())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38, 1e-40])
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_extreme_parameters(self, backend, value, name):
        """In the middle of the filter: whether padding times infinity is NaN depends on PyTorch's choice of kernel."""
        for k, activation in ((3, "silu"), (5, "relu"), (7, "none")):
            x, weight, bias, *rest = sample(1, 3, 5, 6, k=k, activation=activation)
            (weight[1, 0, k // 2, k // 2 :] if name == "weight" else bias[1:])[0] = value
            self.assert_like_eager(backend, (x, weight, bias, *rest))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_extreme_gradient(self, backend, value):
        for k, activation in ((3, "silu"), (5, "none")):
            arguments = sample(1, 2, 9, 10, k=k, activation=activation)

            def gradients_of(function, x, weight, *rest):
                tensors = [x.requires_grad_(), weight.requires_grad_()]
                y = function(*tensors, *rest)
                d_y = torch.ones_like(y)
                d_y[0, 1, 4, 5] = value
                return torch.autograd.grad(y, tensors, d_y)

            actual = gradients_of(self.op, *self.on(backend, arguments))
            exact = gradients_of(eager, *widened(arguments))
            assert_matches(actual, exact, gradients_of(eager, *arguments))

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
    def test_long_sums(self, backend, x_layout, x_dtype):
        """Every tap's gradient is a sum over the images, of terms with one sign: lost low bits add up."""
        n, height, width = (1, 33, 130) if backend.is_slow else (3, 150, 211)
        x, *rest = sample(n, 2, height, width, dtype=x_dtype, layout=x_layout)
        arguments = (x.abs(), *rest)

        def sums(function, x, *rest):
            rest = [value.requires_grad_() if torch.is_tensor(value) else value for value in rest]
            return torch.autograd.grad(function(x, *rest).sum(), rest[:2])

        actual = sums(self.op, *self.on(backend, arguments))
        assert_matches(actual, sums(eager, *widened(arguments)), sums(eager, *arguments))

    def test_gradients_have_the_same_bits_every_time(self, backend):
        arguments = self.on(backend, sample(2, 5, *((5, 33) if backend.is_slow else (40, 133)), activation="silu"))
        first, second = gradients(self.op, arguments), gradients(self.op, arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_defaults(self):
        x, weight, bias, *_ = sample(1, 3, 5, 6)
        assert torch.equal(ops.depthwise_conv2d(x, weight), ops.depthwise_conv2d(x, weight, None, 1, 1, "none"))
        assert torch.equal(ops.depthwise_conv2d(x, weight, bias), ops.depthwise_conv2d(x, weight, bias, 1, 1, "none"))

    def test_autocast_casts_every_tensor(self):
        x, weight, bias, *_ = sample(1, 3, 5, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.depthwise_conv2d(x, weight, bias.half())
        assert torch.equal(y, ops.depthwise_conv2d(*(value.bfloat16() for value in (x, weight, bias))))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"x": torch.zeros(2, 3, 5)}, r"x must be \[N, C, H, W\] with C at least 1, got \(2, 3, 5\)"),
            ({"x": torch.zeros(2, 0, 5, 7)}, r"x must be .* C at least 1, got \(2, 0, 5, 7\)"),
            ({"weight": torch.zeros(4, 1, 3, 3)}, r"weight must be .*C = x.shape\[1\] = 3.*got \(4, 1, 3, 3\)"),
            ({"weight": torch.zeros(3, 3, 3)}, r"weight must be .*got \(3, 3, 3\)"),
            ({"weight": torch.zeros(3, 1, 5, 3)}, r"weight must be .* = \(3, 1, 3, 3\), got \(3, 1, 5, 3\)"),
            ({"weight": torch.zeros(())}, r"weight must be .*got \(\)"),
            ({"weight": torch.zeros(3, 1, 4, 4)}, r"weight must be .*k odd and 1 <= k <= 31, got \(3, 1, 4, 4\)"),
            ({"weight": torch.zeros(3, 1, 33, 33)}, r"weight must be .*1 <= k <= 31, got \(3, 1, 33, 33\)"),
            ({"weight": torch.zeros(3, 1, 3, 3, device="meta")}, "weight must be on the device of x, cpu, got meta"),
            ({"bias": torch.zeros(4)}, r"bias must be \[C\] with C = x.shape\[1\] = 3 = \(3,\), got \(4,\)"),
            ({"bias": torch.zeros(3, device="meta")}, "bias must be on the device of x, cpu, got meta"),
            ({"stride": 3}, "stride must be 1 or 2, got 3"),
            ({"stride": (1, 1)}, r"stride must be 1 or 2, got \(1, 1\)"),
            ({"padding": -1}, "padding must be at least 0, got -1"),
            ({"x": torch.zeros(2, 3, 2, 7), "padding": 0}, "x must be at least as large as the 3 x 3 .* got 2 x 7"),
            ({"dilation": 0}, "dilation must be at least 1, got 0"),
            ({"padding": 0, "dilation": 3}, "x must be at least as large as the 7 x 7 filter .* got 5 x 7"),
            (
                {"activation": "tanh"},
                "activation must be one of none, relu, silu, gelu, gelu_tanh, sigmoid, got 'tanh'",
            ),
        ],
    )
    def test_rejects_values(self, changed, message):
        with pytest.raises(ValueError, match=message):
            ops.depthwise_conv2d(**self.valid() | changed)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
            ({"x": torch.zeros(2, 3, 5, 7, dtype=torch.int32)}, "x must be of dtype .* got torch.int32"),
            ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
            ({"weight": torch.zeros(3, 1, 3, 3, dtype=torch.float16)}, "weight must be of dtype torch.float32, got"),
            ({"bias": 0.0}, "bias must be a torch.Tensor, got float"),
            ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias must be of dtype torch.float32, got torch.float64"),
        ],
    )
    def test_rejects_types(self, changed, message):
        with pytest.raises(TypeError, match=message):
            ops.depthwise_conv2d(**self.valid() | changed)

    def test_does_not_differentiate_its_gradient_kernel(self):
        x, weight, bias, *_ = sample(1, 3, 5, 6)
        backward = torch.ops.evkernels.depthwise_conv2d_backward
        (grad_x, _, _) = backward(x.requires_grad_(), x, weight, bias, 1, 1, "silu", 1, True, True, True)
        with pytest.raises(RuntimeError, match="differentiate with create_graph=True"):
            grad_x.sum().backward()

    def valid(self):
        return {"x": torch.zeros(2, 3, 5, 7), "weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)}

    def on(self, backend, arguments):
        return tuple(value.to(backend.device) if torch.is_tensor(value) else value for value in arguments)

    def assert_like_eager(self, backend, arguments):
        on_device = self.on(backend, arguments)
        assert_matches(self.op(*on_device), eager(*widened(arguments)), eager(*arguments))

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("k", [1, 3, 5, 7])
    def test_vectors_of_channels_and_pixels(self, k, stride, x_layout):
        """On the CPU: maps narrower and wider than a vector and than the filter, channels that fill vectors or not."""
        for channels, height, width in ((17, 9, 37), (16, 1, 1), (20, 7, 3), (1, 21, 50)):
            for padding in {k // 2, 0, k + 1}:
                if min(height, width) + 2 * padding < k:
                    continue
                arguments = sample(2, channels, height, width, k, stride, padding, "silu", layout=x_layout)
                self.assert_like_eager_on_cpu(arguments)

    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("k", [3, 5])
    def test_infinities_reach_no_further_than_the_filter(self, k, stride, x_layout):
        """On the CPU, at the ends of rows, which vectors may overrun."""
        arguments = sample(1, 17, 12, 41, k, stride, bias=False, layout=x_layout)
        arguments[0][0, 3, 0, 40] = float("inf")
        arguments[0][0, 5, 11, 0] = float("nan")
        self.assert_like_eager_on_cpu(arguments)

    def assert_like_eager_on_cpu(self, arguments):
        assert_matches(self.op(*arguments), eager(*widened(arguments)), eager(*arguments))
        exact, plain = (gradients(eager, given) for given in (widened(arguments), arguments))
        assert_matches(gradients(self.op, arguments), exact, plain, what="gradient")
