"""separable_conv2d: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import (
    DifferentiableOpContract,
    gradients,
    in_plain_pytorch,
    peak_memory,
    registered_calls,
    requiring_grad,
    significant_strides,
    weighted_sum,
)

from evkernels import ops
from evkernels.testing import assert_matches, tensor

# bfloat16 in channels_last has a kernel of its own there.
WITH_AMX = True
INF = float("inf")
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def eager(
    x, depthwise_weight, pointwise_weight, depthwise_bias=None, pointwise_bias=None, stride=1, padding=None,
    activation="none", output_activation="none",
):  # fmt: skip
    padding = depthwise_weight.shape[-1] // 2 if padding is None else padding
    a = ACTIVATIONS[activation](F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1]))
    return ACTIVATIONS[output_activation](F.conv2d(a, pointwise_weight, pointwise_bias))


def sample(
    n, c, o, height, width, k=3, stride=1, padding=None, activations=("none", "none"), biases=(True, True), **options
):
    """Arguments for one call; `options` are the dtype and layout of x."""
    dtype = options.get("dtype", torch.float32)
    return (
        tensor(n, c, height, width, seed=1, **options),
        tensor(c, 1, k, k, dtype=dtype, seed=2) * 0.5,
        tensor(o, c, 1, 1, dtype=dtype, seed=3) * c**-0.5,
        tensor(c, dtype=dtype, seed=4) if biases[0] else None,
        tensor(o, dtype=dtype, seed=5) if biases[1] else None,
        stride,
        padding,
        *activations,
    )


class TestSeparableConv2d(DifferentiableOpContract):
    def op(self, *arguments):
        return ops.separable_conv2d(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # In float64 the exact result is eager's own: its long sums round as much as ours.
        large = large and dtype != torch.float64
        return [
            sample(2, 16, 6, 3, 4, activations=("silu", "gelu"), **options),
            sample(1, 1, 1, 1, 1, **options),
            sample(2, 17, 5, 3, 6, stride=2, activations=("gelu", "silu"), **options),
            sample(2, 3, 33, 5, 7, k=5, stride=2, biases=(False, True), activations=("none", "relu"), **options),
            sample(1, 4, 6, 3, 5, activations=("gelu_tanh", "sigmoid"), **options),
            # So many channels that training keeps the pointwise result.
            sample(1, 130, 7, 2, 3, activations=("relu", "silu"), **options),
            *[sample(1, 33, 5, 6, 5, k=7, padding=4, biases=(True, False), activations=("silu", "none"), **options)]
            * large,
            *[sample(1, 20, 70, 11, 27, k=5, activations=("gelu", "none"), **options)] * large,
            *[sample(2, 33, 40, 13, 30, stride=2, activations=("silu", "gelu"), **options)] * large,
        ]

    def tiny(self):
        return sample(1, 2, 2, 2, 3, activations=("silu", "gelu"), dtype=torch.float64)

    def typical(self, dtype, layout):
        return [sample(1, 64, 64, 16, 32, activations=("silu", "none"), dtype=dtype, layout=layout)]

    def empty_samples(self):
        return [sample(0, 3, 4, 5, 6, activations=("silu", "gelu"))]

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(
        ("height", "width", "k", "stride", "padding"),
        [
            (2, 400, 3, 1, 1),
            (3, 390, 3, 2, 0),
            (13, 97, 5, 1, 2),
            (300, 1, 3, 2, 1),
            (1, 1, 31, 1, 15),
            (2, 3, 5, 2, 6),
        ],
    )
    def test_tiles_cover_every_shape(self, backend, height, width, k, stride, padding, memory):
        """Rows longer and shorter than a tile, borders wider than the image. Whole numbers: sums must be exact."""
        if backend.is_slow:
            height, width, k, padding = min(height, 21), min(width, 37), min(k, 7), min(padding, 6)
        arguments = sample(2, 5, 7, height, width, k, stride, padding, layout=memory)
        arguments = [(4 * v).round() if isinstance(v, torch.Tensor) else v for v in arguments]
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        assert torch.equal(ops.separable_conv2d(*on_device).cpu(), eager(*arguments))

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("c", "o", "height", "width", "stride", "padding"),
        [
            (16, 40, 5, 40, 1, 1),
            (32, 35, 7, 37, 2, 1),
            (48, 8, 9, 33, 1, 0),
            (16, 1, 1, 1, 2, 1),
            (160, 64, 3, 3, 1, 4),
        ],
    )
    def test_tiles_of_tensor_cores(self, backend, half, memory, c, o, height, width, stride, padding):
        """Widths and channels that fill the tiles of 32, and that do not; borders wider than the image."""
        options = {"dtype": half, "layout": memory, "activations": ("silu", "relu")}
        arguments = sample(2, c, o, height, width, 3, stride, padding, **options)
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        exact = eager(*(v.double() if isinstance(v, torch.Tensor) else v for v in arguments))
        others = [eager(arguments[0].contiguous(memory_format=m), *arguments[1:])
                  for m in (torch.contiguous_format, torch.channels_last)]  # fmt: skip
        assert_matches(ops.separable_conv2d(*on_device), exact, eager(*arguments), others=others)

    @pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
    @pytest.mark.parametrize("value", [float("nan"), INF, -INF, 1e4, -1e4, 1e38, 1e-40])
    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    def test_extreme_values(self, backend, activation, value, memory):
        """One extreme value in the middle of the image: the pattern of plain PyTorch, nothing beside it."""
        arguments = sample(1, 3, 4, 9, 9, activations=(activation, "none"), layout=memory)
        arguments[0][0, 1, 4, 5] = value
        on_device = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        exact = eager(*(v.double() if isinstance(v, torch.Tensor) else v for v in arguments))
        # PyTorch's GELU of +inf is NaN in float32 NCHW, where it is oneDNN's, and +inf in all other cases.
        differs = activation == "gelu" and value in (INF, -INF) and backend.name != "reference"
        plain = exact.float() if differs else eager(*arguments)
        assert_matches(ops.separable_conv2d(*on_device), exact, plain)

    @pytest.mark.parametrize("activation", ["silu", "sigmoid"])
    def test_activations_keep_their_tails(self, backend, activation):
        """Filter and weight of one pass x through: errors relative to each value instead of the largest."""
        x, one = torch.linspace(-20, 20, 4096).reshape(1, 1, 64, 64), torch.ones(1, 1, 1, 1)
        given = [v.to(backend.device) for v in (x, one, one)]
        y = ops.separable_conv2d(*given, activation=activation).cpu()
        torch.testing.assert_close(y.double(), ACTIVATIONS[activation](x.double()), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    def test_training_keeps_the_pointwise_result(self, backend, half, memory):
        """In all dtypes that the registered operator takes, though float16 and bfloat16 do not come to it."""
        *tensors, stride, padding, activation, output_activation = sample(
            2, 129, 6, 3, 4, padding=1, activations=("gelu", "silu"), dtype=half, layout=memory
        )
        options = (stride, padding, activation, output_activation)
        given = [v.to(backend.device) for v in tensors]
        names = {overload._opname for overload, _ in registered_calls(self.op, (*requiring_grad(given), *options))}
        expected = half == torch.float32 and backend.device == "cpu"
        assert names == {"separable_conv2d_training" if expected else "separable_conv2d", "separable_conv2d_backward"}

        def expected_of(values, grad):
            values = requiring_grad(values)
            pre = eager(*values, stride, padding, activation, "none")
            y = F.silu(pre)
            return pre, y, *torch.autograd.grad(y, values, grad)

        y, pre = torch.ops.evkernels.separable_conv2d_training(*given, *options)
        grad = tensor(*y.shape, dtype=half, seed=7)
        gradient = torch.ops.evkernels.separable_conv2d_backward(
            grad.to(backend.device), *given, *options, [True] * 5, pre
        )
        assert significant_strides(pre) == significant_strides(y)
        exact = expected_of([v.double() for v in tensors], grad.double())
        others = [expected_of([v.contiguous() for v in tensors], grad)]
        assert_matches((pre, y, *gradient), exact, expected_of(tensors, grad), others=others)

    def test_opcheck_of_training(self):
        arguments = sample(1, 128, 3, 2, 2, padding=1, activations=("silu", "gelu"), dtype=torch.float64)
        for overload, given in registered_calls(self.op, requiring_grad(arguments)):
            assert overload._opname in ("separable_conv2d_training", "separable_conv2d_backward")
            torch.library.opcheck(overload, given)

    def test_training_keeps_half_of_what_plain_pytorch_keeps(self):
        arguments = requiring_grad(sample(1, 128, 128, 16, 24, activations=("silu", "silu"), layout="channels_last"))
        results = []

        def held(function):
            # The output is the caller's.
            return peak_memory(lambda: results.append(function(*arguments))) - results[-1].nbytes

        assert held(self.op) <= 0.6 * held(self.eager)

    @pytest.mark.parametrize(
        ("c", "o", "height", "width", "stride", "share"),
        [(64, 64, 33, 44, 1, 0.45), (128, 128, 33, 44, 1, 0.65), (32, 64, 65, 87, 2, 0.8), (128, 256, 33, 44, 2, 0.85)],
    )
    def test_memory_of_a_training_step(self, c, o, height, width, stride, share):
        """Share of plain PyTorch's. Output and input gradient are 2 in 5 of that at stride 1, 3 in 4 at stride 2."""
        arguments = requiring_grad(
            sample(1, c, o, height, width, stride=stride, activations=("silu", "silu"), layout="channels_last")
        )
        grad = torch.ones_like(self.op(*arguments))

        def needed(function):
            return peak_memory(lambda: torch.autograd.grad(function(*arguments), arguments[:5], grad))

        assert needed(self.op) <= share * needed(self.eager)

    @pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("stride", "k", "padding"), [(1, 3, 1), (1, 5, 0), (2, 3, 1), (2, 5, 4)])
    def test_gradient_over_units_of_rows(self, half, stride, k, padding):
        """Maps so large that the gradient of channels_last goes through them in several units, from batch to batch."""
        options = {"k": k, "stride": stride, "padding": padding, "activations": ("silu", "gelu")}
        size = (2, 64, 3, 29 * stride, 60 * stride)
        arguments = sample(*size, **options, dtype=half, layout="channels_last")
        exact, expected, others = in_plain_pytorch(self, gradients, arguments)
        assert_matches(gradients(self.op, arguments), exact, expected, others=others)

    def test_same_bits_for_any_number_of_threads(self):
        threads = torch.get_num_threads()
        several_units = sample(2, 64, 3, 40, 60, activations=("silu", "gelu"), layout="channels_last")
        small = [self.samples(torch.float32, layout, large=True)[-1] for layout in ("contiguous", "channels_last")]
        for arguments in (*small, several_units):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append([self.op(*arguments), *gradients(self.op, arguments)])
            torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("frozen", ["weights", "input", "all but the last bias"])
    def test_gradients_of_some_arguments(self, backend, frozen):
        arguments = self.tiny()
        kept = {"weights": [0], "input": [1, 2, 3, 4], "all but the last bias": [4]}[frozen]
        expected = gradients(self.eager, arguments)
        given = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in arguments]
        for k in kept:
            given[k] = given[k].detach().requires_grad_()
        weighted_sum([self.op(*given)]).backward()
        for k in range(5):
            if k in kept:
                torch.testing.assert_close(given[k].grad.cpu(), expected[k], rtol=1e-10, atol=1e-10)
            else:
                assert given[k].grad is None

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last", "transposed", "expanded"])
    def test_gradient_of_any_strides(self, backend, memory):
        arguments = requiring_grad(sample(2, 3, 4, 5, 6, activations=("silu", "gelu"), dtype=torch.float64))
        results = []
        for function, device in ((self.op, backend.device), (self.eager, "cpu")):
            given = requiring_grad([v.to(device) if isinstance(v, torch.Tensor) else v for v in arguments])
            grad = tensor(2, 4, 5, 6, dtype=torch.float64, layout=memory).to(device)
            results.append(torch.autograd.grad(function(*given), given[:5], grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-10, atol=1e-10)

    def test_autocast_casts_every_tensor(self):
        arguments = sample(1, 2, 3, 4, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.separable_conv2d(*arguments)
        narrow = [v.bfloat16() if isinstance(v, torch.Tensor) else v for v in arguments]
        assert torch.equal(y, ops.separable_conv2d(*narrow))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: (2, 3, 4)}, ValueError, r"x must be \[N, C, H, W\].*\(2, 3, 4\)"),
            ({1: (2, 1, 3, 3)}, ValueError, r"depthwise_weight must be .*C = x.shape\[1\] = 3.*\(2, 1, 3, 3\)"),
            ({1: (3, 1, 4, 4)}, ValueError, r"depthwise_weight must be .*odd.*\(3, 1, 4, 4\)"),
            ({2: (4, 2, 1, 1)}, ValueError, r"pointwise_weight must be \[O, C, 1, 1\].*\(4, 2, 1, 1\)"),
            ({2: (4, 3)}, ValueError, r"pointwise_weight must be \[O, C, 1, 1\].*\(4, 3\)"),
            ({3: (4,)}, ValueError, r"depthwise_bias must be .*\(3,\), got \(4,\)"),
            ({4: (3,)}, ValueError, r"pointwise_bias must be .*\(4,\), got \(3,\)"),
            ({5: 3}, ValueError, "stride must be 1 or 2, got 3"),
            ({6: -1}, ValueError, "padding must be at least 0, got -1"),
            ({0: (2, 3, 2, 2), 6: 0}, ValueError, "x must be at least as large as"),
            ({7: "tanh"}, ValueError, "activation must be one of .*'tanh'"),
            ({8: "swish"}, ValueError, "output_activation must be one of .*'swish'"),
            ({2: torch.zeros(4, 3, 1, 1).double()}, TypeError, "pointwise_weight must be of dtype torch.float32"),
            (
                {4: torch.zeros(4, device="meta")},
                ValueError,
                "pointwise_bias must be on the device of x, cpu, got meta",
            ),
            ({2: None}, TypeError, "pointwise_weight must be a torch.Tensor, got NoneType"),
        ],
    )
    def test_rejects(self, change, error, message):
        arguments = list(sample(2, 3, 4, 5, 6))
        for position, value in change.items():
            arguments[position] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(error, match=message):
            ops.separable_conv2d(*arguments)
