"""Fast ConvGRUs whose convolutions are Winograd's, `conv_3x3`, which computes them, and `convolution_3x3`."""

import pytest
import torch
import torch.nn.functional as F
from contract import weighted_sum

from evkernels import nn
from evkernels.models import FireNet
from evkernels.nn.compat.visioncore import ConvGRU, ConvGRUModulator
from evkernels.nn.convolution import activated_convolution, convolved
from evkernels.ops import library
from evkernels.ops.conv_3x3 import PackedConvolution, activated_convolution_3x3, convolution_3x3
from evkernels.reference.depthwise_conv2d import ACTIVATIONS
from evkernels.testing import assert_matches, tensor


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 3, 5, 4, 7), (1, 16, 70, 1, 1), (3, 33, 9, 6, 2), (2, 1, 1, 13, 13)])
def test_convolution_and_gradients(layout, dtype, size):
    n, inputs, outputs, height, width = size
    x = tensor(n, inputs, height, width, dtype=dtype, layout=layout).requires_grad_()
    weight = tensor(outputs, inputs, 3, 3, dtype=dtype, seed=1).requires_grad_()
    grad = tensor(n, outputs, height, width, dtype=dtype, layout=layout, seed=2)

    def results(x, weight, grad, convolve):
        y = convolve(x, weight)
        return (y, *torch.autograd.grad(y, [x, weight], grad))

    def eager(x, weight):
        return F.conv2d(x, weight, padding=1)

    exact = results(
        x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), grad.double(), eager
    )
    expected = results(x, weight, grad, eager)
    for calls in (1, 2):
        found = results(x, weight, grad, lambda x, weight, calls=calls: PackedConvolution(weight, calls)(x))
        for values in zip(found, exact, expected, strict=True):
            assert_matches(*values, times=4)


@pytest.fixture
def slow_library(monkeypatch):
    """As on a processor whose library is slow at the gradient of a weight."""
    monkeypatch.setattr(library, "HAS_AVX512", False)


def is_ours(y):
    return "evkernels" in type(y.grad_fn).__name__


class TestConvolution3x3:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [(2, 3, 5, 4, 7), (1, 8, 32, 20, 17), (3, 33, 9, 1, 2)])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_numbers_of_the_library_and_closer_gradients(self, slow_library, dtype, size, with_bias):
        n, inputs, outputs, height, width = size
        x = tensor(n, inputs, height, width, dtype=dtype, layout="channels_last").requires_grad_()
        weight = tensor(outputs, inputs, 3, 3, dtype=dtype, seed=1).requires_grad_()
        bias = tensor(outputs, dtype=dtype, seed=2).requires_grad_() if with_bias else None
        grad = tensor(n, outputs, height, width, dtype=dtype, seed=3)

        def results(convolve, *arguments):
            arguments = [None if a is None else a.detach().requires_grad_() for a in arguments]
            y = convolve(*arguments)
            return (y, *torch.autograd.grad(y, [a for a in arguments if a is not None], grad.to(y.dtype)))

        def eager(x, weight, bias):
            return F.conv2d(x, weight, bias, padding=1)

        found = results(convolution_3x3, x, weight, bias)
        assert is_ours(convolution_3x3(x, weight, bias))
        exact = results(eager, *(None if a is None else a.double() for a in (x, weight, bias)))
        for values in zip(found, exact, results(eager, x, weight, bias), strict=True):
            assert_matches(*values, times=4)

    def test_gradients_of_some_arguments(self, slow_library):
        given = [tensor(2, 3, 4, 5, layout="channels_last"), tensor(6, 3, 3, 3, seed=1), tensor(6, seed=2)]
        expected = torch.func.grad(lambda w: F.conv2d(given[0], w, given[2], padding=1).square().sum())(given[1])
        weight = given[1].requires_grad_()
        convolution_3x3(given[0], weight, given[2]).square().sum().backward()
        torch.testing.assert_close(weight.grad, expected)

    def test_library_where_it_is_not_slow_or_not_asked(self, slow_library, monkeypatch):
        x, weight = tensor(1, 3, 4, 5, layout="channels_last"), tensor(6, 3, 3, 3, seed=1).requires_grad_()
        assert is_ours(convolution_3x3(x, weight))
        assert not is_ours(convolution_3x3(x.contiguous(), weight))
        assert not is_ours(convolution_3x3(x.requires_grad_(), weight.detach()))
        assert not is_ours(convolution_3x3(x.bfloat16(), weight.bfloat16()))
        assert convolution_3x3(x[:0], weight).shape == (0, 6, 4, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert convolution_3x3(x, weight).dtype == torch.bfloat16
        monkeypatch.setattr(library, "HAS_AVX512", True)
        assert not is_ours(convolution_3x3(x, weight))
        x, weight = tensor(1, 16, 4, 5, layout="channels_last"), tensor(32, 16, 3, 3, seed=1).requires_grad_()
        assert is_ours(convolution_3x3(x, weight))
        assert not is_ours(convolution_3x3(x.bfloat16(), weight.bfloat16()))

    def test_of_plain_modules_alone(self, slow_library):
        x = tensor(1, 3, 4, 5, layout="channels_last")
        conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        assert is_ours(convolved(conv, x))
        for options in ({"padding": 0}, {"padding": 1, "stride": 2}, {"padding": 1, "groups": 3}, {"padding": "same"}):
            other = torch.nn.Conv2d(3, 6, 3, **options)
            torch.testing.assert_close(convolved(other, x), other(x))
            assert not is_ours(convolved(other, x))
        assert not is_ours(convolved(torch.nn.Sequential(conv), x))
        conv.register_forward_hook(lambda *_: torch.zeros(2))
        assert convolved(conv, x).shape == (2,)

    def test_gradcheck_opcheck_and_one_graph(self, slow_library):
        x = tensor(1, 2, 3, 4, dtype=torch.float64, layout="channels_last").requires_grad_()
        weight = tensor(2, 2, 3, 3, dtype=torch.float64, seed=1).requires_grad_()
        bias = tensor(2, dtype=torch.float64, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(convolution_3x3, (x, weight, bias))
        assert torch.autograd.gradgradcheck(convolution_3x3, (x, weight, bias))
        for winograd in (False, True):
            torch.library.opcheck(torch.ops.evkernels.convolution_3x3.default, (x, weight, bias, winograd))
        compiled = torch.compile(convolution_3x3, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight, bias), convolution_3x3(x, weight, bias))

    def test_winograd_in_both_directions(self, slow_library):
        x = tensor(2, 24, 19, 11, layout="channels_last").requires_grad_()
        weight, bias = tensor(16, 24, 3, 3, seed=1).requires_grad_(), tensor(16, seed=2).requires_grad_()
        results = []
        for winograd in (True, False):
            with torch.profiler.profile() as profile:
                y = convolution_3x3(x, weight, bias, winograd)
                gradients = torch.autograd.grad(weighted_sum([y]), [x, weight, bias])
            names = {event.name.removeprefix("evkernels::") for event in profile.events()}
            assert ({"conv_3x3_activated", "conv_3x3_input_gradient"} <= names) == winograd
            assert "conv_3x3_weight_gradient" in names
            results.append([y, *gradients])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert torch.autograd.gradgradcheck(
            lambda x, weight: convolution_3x3(x, weight, None, True),
            [
                tensor(1, 16, 18, 18, dtype=torch.float64, layout="channels_last").requires_grad_(),
                tensor(16, 16, 3, 3, dtype=torch.float64).requires_grad_(),
            ],
            fast_mode=True,
        )


class TestActivatedConvolution3x3:
    """Its loops take whole vectors of channels in channels_last as they are and copy all else."""

    @pytest.mark.parametrize("activation", list(ACTIVATIONS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    @pytest.mark.parametrize("size", [(2, 3, 5, 4, 7), (1, 16, 70, 9, 6), (3, 33, 9, 1, 2), (2, 8, 3, 12, 1)])
    def test_numbers(self, activation, dtype, layout, size):
        n, inputs, outputs, height, width = size
        arguments = [
            tensor(n, inputs, height, width, dtype=dtype, layout=layout),
            tensor(outputs, inputs, 3, 3, dtype=dtype, seed=1),
            tensor(outputs, dtype=dtype, seed=2),
            tensor(n, outputs, height, width, dtype=dtype, layout=layout, seed=3),
            None,
        ]

        def eager(x, weight, bias, residual, projection):
            y = F.conv2d(x, weight, bias, padding=1)
            y = ACTIVATIONS[activation](y if residual is None else y + residual)
            return y if projection is None else F.conv2d(y, projection.view(1, -1, 1, 1))

        wide = dtype in (torch.float32, torch.float64)
        projection = tensor(outputs, dtype=dtype, seed=4)
        for given in (arguments, (*arguments[:2], None, None, None), *[(*arguments[:4], projection)] * wide):
            found = torch.ops.evkernels.conv_3x3_activated(*given, activation)
            exact = eager(*(None if value is None else value.double() for value in given))
            assert found.dtype == dtype
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert found.shape[1] == (outputs if given[4] is None else 1)
            if dtype == torch.float64:
                torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12, check_stride=False)
            else:
                assert_matches(found, exact, eager(*given), times=4)

    @pytest.mark.parametrize("channels", [8, 16])
    def test_reads_nothing_beyond_its_maps(self, channels):
        around = torch.full((5, 7, 6, channels), torch.nan)
        around[1:-1] = tensor(3, 7, 6, channels)
        x = around[1:-1].permute(0, 3, 1, 2)
        weight = tensor(channels, channels, 3, 3, seed=1)
        found = torch.ops.evkernels.conv_3x3_activated(x, weight, None, None, None, "none")
        torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)

    def test_is_taken_where_it_pays(self):
        x, weight, bias = (
            tensor(1, 16, 20, 17, layout="channels_last"),
            tensor(16, 16, 3, 3, seed=1),
            tensor(16, seed=2),
        )

        def is_one_op(x, weight, bias=bias, residual=None, projection=None):
            with torch.profiler.profile() as profile:
                y = activated_convolution_3x3(x, weight, bias, "gelu", residual, projection=projection)
            exact = F.conv2d(x, weight, bias, padding=1)
            exact = F.gelu(exact if residual is None else exact + residual)
            if projection is not None:
                exact = F.conv2d(exact, projection.view(1, -1, 1, 1))
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
            one_op = any(event.name == "evkernels::conv_3x3_activated" for event in profile.events())
            return one_op and not y.requires_grad

        assert is_one_op(x, weight)
        assert is_one_op(x, weight, None, x)
        assert is_one_op(x, weight, projection=bias)
        assert not is_one_op(x, weight, projection=bias.clone().requires_grad_())
        assert not is_one_op(x.contiguous(), weight)
        assert not is_one_op(x.contiguous(), weight, projection=bias)
        assert not is_one_op(x[:, :, :16], weight)  # few pixels
        assert not is_one_op(x, weight[:8], bias[:8])  # few channels
        assert not is_one_op(x, weight.clone().requires_grad_())
        with torch.no_grad():
            assert is_one_op(x, weight.clone().requires_grad_())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = activated_convolution_3x3(x, weight, bias, "relu")
        assert y.dtype == torch.bfloat16

    def test_of_plain_modules_alone(self):
        conv, x = torch.nn.Conv2d(16, 16, 3, padding=1), tensor(1, 16, 20, 17, layout="channels_last")
        with torch.no_grad():
            expected = F.relu(conv(x) + x)
            torch.testing.assert_close(activated_convolution(conv, x, "relu", x), expected, rtol=1e-4, atol=1e-4)
            wide = torch.nn.Conv2d(16, 16, 5, padding=2)
            torch.testing.assert_close(activated_convolution(wide, x, "silu"), F.silu(wide(x)))
            conv.register_forward_hook(lambda *_: torch.zeros_like(x))
            assert activated_convolution(conv, x, "relu", x).equal(x.relu())

    def test_switched_off(self):
        model, grid = FireNet(5, 16).eval(), tensor(1, 5, 20, 18)
        for enabled in (True, False):
            nn.set_winograd(model, enabled)
            with torch.no_grad(), torch.profiler.profile() as profile:
                model(grid)
            names = {event.name for event in profile.events()}
            assert bool(names & {"evkernels::conv_3x3_activated", "evkernels::conv_gru_3x3"}) == enabled

    def test_errors_opcheck_and_no_gradient(self):
        op = torch.ops.evkernels.conv_3x3_activated
        x, weight = tensor(1, 4, 5, 6, layout="channels_last"), tensor(8, 4, 3, 3, seed=1)
        bias, residual = tensor(8, seed=2), tensor(1, 8, 5, 6, layout="channels_last", seed=3)
        for projection in (None, bias):
            torch.library.opcheck(op.default, (x, weight, bias, residual, projection, "silu"))
        for message, *wrong in (
            ("x must be .* of its dtype", x[:, :3], weight, bias, residual, None, "none"),
            ("bias must be", x, weight, bias[:7], residual, None, "none"),
            ("residual must be", x, weight, bias, residual[:, :, :4], None, "none"),
            ("bias must be", x, weight, bias.double(), residual, None, "none"),
            ("projection must be", x, weight, bias, residual, bias[:7], "none"),
            ("projection must be", x, weight, bias, residual, bias.double(), "none"),
            ("activation must be .* got swish", x, weight, bias, residual, None, "swish"),
        ):
            with pytest.raises(RuntimeError, match=message):
                op(*wrong)
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            op(x.requires_grad_(), weight, bias, residual, None, "none").sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_do(shape):
    x, weight = torch.zeros(shape, requires_grad=True), tensor(5, 3, 3, 3).requires_grad_()
    y = PackedConvolution(weight)(x)
    assert y.shape == (shape[0], 5, *shape[2:])
    d_x, d_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert d_x.shape == x.shape
    assert d_weight.eq(0).all()


def test_gradcheck_and_opcheck():
    x = tensor(1, 2, 3, 2, dtype=torch.float64).requires_grad_()
    weight = tensor(2, 2, 3, 3, dtype=torch.float64, seed=1).requires_grad_()
    function = lambda x, weight: PackedConvolution(weight)(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))
    _, tangent = torch.func.jvp(function, (x.detach(), weight.detach()), (x.detach(), weight.detach()))
    torch.testing.assert_close(tangent, 2 * function(x, weight))
    ops = torch.ops.evkernels
    packed = ops.conv_3x3_packed_weight(weight.detach()), ops.conv_3x3_gradient_weight(weight.detach(), 0, 2)
    torch.library.opcheck(ops.conv_3x3.default, (x, weight, *packed))
    torch.library.opcheck(ops.conv_3x3_packed_weight.default, (weight.detach(),))
    torch.library.opcheck(ops.conv_3x3_gradient_weight.default, (weight.detach(), 0, 2))


def test_nan_stays_within_two_pixels():
    x = torch.zeros(1, 3, 9, 9)
    x[0, 1, 4, 4] = torch.nan
    y = PackedConvolution(tensor(2, 3, 3, 3))(x)
    assert y[:, :, 3:6, 3:6].isnan().all()
    y[:, :, 2:7, 2:7] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options", [{}, {"layer_norm": False}, {"zoneout": 0.2}, {"stride": 2}, {"recurrent_dropout": 0.3}]
)
def test_cell_equals_its_library_form(layout, options):
    torch.manual_seed(0)
    cell = nn.ConvGRUCell(32, 32, form="fast", dtype=torch.float64, winograd=True, **options)
    cell.train("recurrent_dropout" in options)
    x = tensor(6, 32, 5, 4, dtype=torch.float64, layout=layout).unflatten(0, (3, 2)).requires_grad_()
    reset = tensor(3, 2, seed=3) > 0
    results = []
    for winograd in (True, False):
        cell.winograd = winograd
        torch.manual_seed(1)
        with torch.profiler.profile() as profile:
            output, h = cell.forward_sequence(x, None, reset)
        count = sum(event.name == "evkernels::conv_3x3" for event in profile.events())
        assert count == (3 + ("stride" not in options)) * winograd
        loss = weighted_sum([output, h])
        results.append([output, h, *torch.autograd.grad(loss, [x, *cell.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"kernel_size": 5}, {"padding_mode": "reflect"}, {"groups": 2}, {"depthwise": True}]
)
def test_options_keep_their_path(options):
    cell = nn.ConvGRUCell(32, 32, form="fast", winograd=True, **options)
    with torch.profiler.profile() as profile:
        cell.forward_sequence(tensor(2, 1, 32, 6, 5))
    assert not any(event.name == "evkernels::conv_3x3" for event in profile.events())


def test_every_backend_serves(backend):
    torch.manual_seed(0)
    cell = nn.ConvGRUCell(32, 32, form="fast", winograd=True).to(backend.device)
    x = tensor(2, 1, 32, 3, 4).to(backend.device).requires_grad_()
    results = []
    for winograd in (True, False):
        cell.winograd = winograd
        output, _ = cell.forward_sequence(x)
        results.append([output, *torch.autograd.grad(weighted_sum([output]), [x, *cell.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_streaming_equals_sequence():
    cell = nn.ConvGRUCell(32, 40, form="fast", layer_norm=False, winograd=True)
    x, h = tensor(4, 2, 32, 5, 7), None
    with torch.no_grad():
        output, _ = cell.forward_sequence(x)
        for frame, expected in zip(x, output, strict=True):
            h = cell(frame, h)
            assert h.equal(expected)


def test_a_hooked_cell_is_called_in_every_step():
    layer, x, calls = ConvGRU(32, 32, winograd=True), tensor(1, 32, 4, 5, 5), []
    expected = layer(x)
    layer.cell.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), expected)
    assert len(calls) == 3


@pytest.mark.parametrize("clip", [None, 0.5])
def test_long_modulator_is_as_accurate_as_float32(clip):
    """VisionCore's own initialisation, 100 steps, its state clamped or not."""
    torch.manual_seed(0)
    options = {"feature_dim": 32, "behavior_dim": 4, "grad_clip_val": clip}
    network = ConvGRUModulator(options)
    features, behavior = tensor(1, 32, 100, 5, 5), tensor(1, 4, seed=1)
    results = []
    for winograd, dtype in ((True, torch.float32), (False, torch.float64), (False, torch.float32)):
        network = network.to(dtype)
        network.gru.cell.winograd = winograd
        results.append(network(features.to(dtype), behavior.to(dtype)))
    assert_matches(*results, times=4)


def test_compiles_into_one_graph():
    layer = ConvGRU(32, 32, winograd=True, learnable_h0=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tensor(1, 32, 3, 4, 5)
    results = []
    for module in (layer, compiled):
        output = module(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*results)
