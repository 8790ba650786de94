"""conv_gru_3x3: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, requiring_grad, to_device, weighted_sum, widened

from evkernels import nn, ops
from evkernels.testing import assert_matches, tensor


def eager(x, h, weight_z, bias_z, weight_r, bias_r, weight_n, bias_n, reset=None):
    output = []
    for t in range(x.shape[0]):
        if reset is not None:
            h = h.masked_fill(reset[t][:, None, None, None], 0)
        xh = torch.cat([x[t], h.to(x.dtype)], dim=1)
        z = F.conv2d(xh, weight_z, bias_z, padding=1).sigmoid()
        r = F.conv2d(xh, weight_r, bias_r, padding=1).sigmoid()
        n = F.conv2d(torch.cat([x[t], (r * h).to(x.dtype)], dim=1), weight_n, bias_n, padding=1).tanh()
        h = ((1 - z) * h + z * n).to(h.dtype)
        output.append(h)
    return torch.stack(output)


def in_frames(function):
    """`function` with its sequence as frames [T*N, ...], four dimensions that a layout can be given to."""

    def call(frames, h, *rest):
        return function(frames.unflatten(0, (-1, h.shape[0])), h, *rest)

    return call


def sample(t, n, inputs, channels, height, width, bias=True, resets=False, **options):
    """Arguments for one call, x as frames; `options` are the dtype and layout of x and h."""
    dtype = options.get("dtype", torch.float32)
    depth = inputs + channels
    parameters = []
    for seed in (3, 5, 7):
        parameters.append(tensor(channels, depth, 3, 3, dtype=dtype, seed=seed) * (9 * depth) ** -0.5)
        parameters.append(tensor(channels, dtype=dtype, seed=seed + 1) if bias else None)
    return (
        tensor(t * n, inputs, height, width, seed=1, **options),
        tensor(n, channels, height, width, seed=2, **options),
        *parameters,
        tensor(t, n, seed=9) > 0.5 if resets else None,
    )


class TestConvGRU3x3(DifferentiableOpContract):
    # Winograd's transforms add up four numbers on the way in and four on the way out.
    times_eager = 4

    def op(self, *arguments):
        return in_frames(ops.conv_gru_3x3)(*arguments)

    def eager(self, *arguments):
        return in_frames(eager)(*arguments)

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # Several tasks' worth where kernels read it in place; other layouts reach them as copies.
        large = large and dtype != torch.float64 and layout in ("contiguous", "channels_last")
        return [
            sample(2, 2, 3, 5, 3, 6, **options),
            sample(1, 2, 6, 9, 1, 1, **options),
            # Whole vectors of channels in any instruction set: channels_last is read and written in place.
            sample(2, 2, 16, 16, 3, 5, **options),
            sample(2, 2, 16, 16, 4, 3, resets=True, **options),
            sample(2, 2, 5, 17, 5, 4, resets=True, bias=False, **options),
            *[sample(2, 3, 20, 33, 11, 19, resets=True, **options)] * large,
        ]

    def tiny(self):
        return sample(2, 1, 1, 2, 2, 1, dtype=torch.float64)

    def empty_samples(self):
        return [sample(2, 1, 0, 4, 2, 3)]

    @pytest.mark.parametrize(("batch", "height", "width"), [(0, 2, 3), (2, 0, 3), (2, 4, 0)])
    def test_nothing_to_do(self, backend, batch, height, width):
        """No samples or no pixels, which PyTorch's convolution does not take."""
        x, h = torch.empty(3, batch, 4, height, width), torch.empty(batch, 5, height, width)
        parameters = [tensor(5, 9, 3, 3), tensor(5)] * 3
        given = requiring_grad(to_device((x, h, *parameters), backend.device))
        output = ops.conv_gru_3x3(*given)
        assert output.shape == (3, batch, 5, height, width)
        weighted_sum([output]).backward()
        assert all(value.grad.eq(0).all() for value in given)

    @pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9), (7, 1), (31, 33)])
    def test_every_size_of_map(self, backend, size):
        size = tuple(min(side, 9) for side in size) if backend.is_slow else size
        for layout, *channels in (("contiguous", 3, 5), ("channels_last", 3, 5), ("channels_last", 16, 16)):
            arguments = sample(2, 2, *channels, *size, layout=layout)
            result = self.op(*to_device(arguments, backend.device))
            assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments), times=4)

    @pytest.mark.parametrize(("channels", "memory"), [((5, 18), "contiguous"), ((16, 16), "channels_last")])
    def test_equals_its_steps(self, backend, channels, memory):
        """A sequence has the bits of as many calls of one step."""
        frames, h, *rest = to_device(sample(3, 2, *channels, 3, 7, layout=memory), backend.device)
        x = frames.unflatten(0, (3, 2))
        expected = ops.conv_gru_3x3(x, h, *rest)
        for t in range(3):
            (h,) = ops.conv_gru_3x3(x[t : t + 1], h, *rest)
            assert torch.equal(h, expected[t])

    def test_reset_equals_a_new_start_even_from_nan(self, backend):
        frames, h, *parameters, _ = to_device(sample(4, 2, 3, 5, 3, 4), backend.device)
        x = frames.unflatten(0, (4, 2))
        reset = torch.zeros(4, 2, dtype=torch.bool, device=backend.device)
        reset[2, 1] = reset[0, 0] = True
        h = h.clone()
        h[0] = float("nan")
        given = requiring_grad((x, h, *parameters))
        output = ops.conv_gru_3x3(*given, reset)
        again = ops.conv_gru_3x3(x[2:], torch.zeros_like(h), *parameters)
        assert torch.equal(output[2:, 1], again[:, 1])
        weighted_sum([output]).backward()
        assert all(value.grad.isfinite().all() for value in given)
        assert given[1].grad[0].eq(0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_extreme_values_stay_near(self, backend, value):
        """They reach four pixels per step at most, in their own sample, and what they do not reach is untouched."""
        arguments = sample(1, 2, 3, 5, 12, 13)
        calm = self.op(*to_device(arguments, backend.device))
        arguments[0][0, 1, 5, 6] = value
        output = self.op(*to_device(arguments, backend.device))
        far = torch.ones(12, 13, dtype=torch.bool)
        far[1:10, 2:11] = False
        assert torch.equal(output[0, 1], calm[0, 1])
        assert torch.equal(output[0, 0][:, far], calm[0, 0][:, far])
        assert output[0, 0][self.eager(*arguments)[0, 0].isnan()].isnan().all()

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_wide_state(self, backend, narrow):
        arguments = list(sample(3, 2, 6, 20, 5, 7, resets=True, dtype=narrow))
        arguments[1] = arguments[1].float()
        result = self.op(*to_device(arguments, backend.device))
        assert result.dtype == torch.float32
        assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments))

    @pytest.mark.parametrize("inputs", [6, 16])
    def test_gradients_of_a_wide_state(self, backend, inputs):
        """Their dtypes meet where the gradients of the state are added up."""
        arguments = list(sample(3, 2, inputs, 20, 5, 7, dtype=torch.bfloat16))
        arguments[1] = arguments[1].float()
        found = gradients(self.op, to_device(arguments, backend.device))
        exact, eager = gradients(self.eager, widened(arguments)), gradients(self.eager, arguments)
        assert_matches(found, exact, eager, times=4)

    @pytest.mark.parametrize("kept", [[0], [1], [2], [3], [4], [5], [6], [7], [6, 7]])
    def test_gradients_of_some_arguments(self, backend, kept):
        arguments = sample(2, 2, 3, 4, 2, 3, resets=True, dtype=torch.float64)
        expected = gradients(self.eager, arguments)
        given = list(to_device(arguments, backend.device))
        for k in kept:
            given[k] = given[k].detach().requires_grad_()
        weighted_sum([self.op(*given)]).backward()
        for k in kept:
            torch.testing.assert_close(given[k].grad.cpu(), expected[k], rtol=1e-10, atol=1e-10)

    def test_long_sequence_stays_accurate(self, backend):
        steps = 20 if backend.is_slow else 1000
        arguments = sample(steps, 1, 4, 6, 2, 3)
        result = self.op(*to_device(arguments, backend.device))
        assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments), times=4)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: (2, 3, 4, 5)}, ValueError, r"x must be \[T, N, Cin, H, W\].*got \(2, 3, 4, 5\)"),
            ({1: (2, 6, 4, 4)}, ValueError, r"h must be .* = \(2, 6, 4, 5\), got \(2, 6, 4, 4\)"),
            ({2: (6, 9, 1, 1)}, ValueError, r"weight_z must be .*Cin = 3, C = 6 = \(6, 9, 3, 3\), got \(6, 9, 1, 1\)"),
            ({5: (5,)}, ValueError, r"bias_r must be .* = \(6,\), got \(5,\)"),
            ({8: torch.zeros(2, 2)}, TypeError, "reset must be of dtype torch.bool"),
            ({1: torch.zeros(2, 6, 4, 5).double()}, TypeError, "h must be of dtype torch.float32"),
            ({6: None}, TypeError, "weight_n must be a torch.Tensor, got NoneType"),
            ({4: torch.zeros(6, 9, 3, 3, device="meta")}, ValueError, "weight_r must be on the device of x"),
        ],
    )
    def test_rejects(self, change, error, message):
        arguments = list(sample(3, 2, 3, 6, 4, 5))
        arguments[0] = arguments[0].unflatten(0, (3, 2))
        for position, value in change.items():
            arguments[position] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(error, match=message):
            ops.conv_gru_3x3(*arguments)


class TestCellTakesIt:
    """A classic 3x3 ConvGRUCell without options is this op and equals the loop over steps."""

    @pytest.mark.parametrize("state", [True, False])
    def test_values_and_gradients_equal_the_composition(self, state):
        torch.manual_seed(0)
        results = []
        cell = nn.ConvGRUCell(3, 5, dtype=torch.float64)
        x = tensor(4, 2, 3, 3, 4, dtype=torch.float64).requires_grad_()
        begin = tensor(2, 5, 3, 4, dtype=torch.float64, seed=1) if state else None
        reset = tensor(4, 2, seed=3) > 0
        for winograd in (True, False):
            cell.winograd = winograd
            output, h = cell.forward_sequence(x, begin, reset)
            step = cell(x[0], begin)
            loss = weighted_sum([output, h, step])
            results.append([output, h, step, *torch.autograd.grad(loss, [x, *cell.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize(
        ("options", "taken"),
        [
            ({}, 2),
            ({"winograd": False}, 0),
            ({"padding_mode": "reflect"}, 0),
            ({"kernel_size": 5}, 0),
            ({"form": "fast"}, 0),
            ({"norm_groups": 1}, 0),
            ({"zoneout": 0.1}, 0),
            ({"dilation": 2}, 0),
            ({"recurrent_dropout": 0.1}, 0),
        ],
    )
    def test_cells_with_options_are_composed(self, options, taken):
        cell = nn.ConvGRUCell(3, 5, **{"winograd": True, **options})
        x = tensor(2, 1, 3, 4, 5)
        with torch.profiler.profile() as profile:
            cell.forward_sequence(x)
            cell(x[0])
        assert sum(event.name == "evkernels::conv_gru_3x3" for event in profile.events()) == taken
