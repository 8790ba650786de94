"""conv_lstm_3x3: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, requiring_grad, to_device, weighted_sum, widened

from evkernels import nn, ops
from evkernels.testing import assert_matches, tensor


def eager(x, h, c, weight, bias=None, reset=None, order="ifgo"):
    output = []
    for t in range(x.shape[0]):
        if reset is not None:
            h, c = (state.masked_fill(reset[t][:, None, None, None], 0) for state in (h, c))
        pre = F.conv2d(torch.cat([x[t], h], dim=1), weight, bias, padding=1)
        blocks = dict(zip(order, pre.chunk(4, dim=1), strict=True))
        c = (blocks["f"].sigmoid() * c + blocks["i"].sigmoid() * blocks["g"].tanh()).to(c.dtype)
        h = (blocks["o"].sigmoid() * c.tanh()).to(x.dtype)
        output.append(h)
    return torch.stack(output), c


def in_frames(function):
    """`function` with its sequence as frames [T*N, ...], four dimensions that a layout can be given to."""

    def call(frames, h, *rest):
        return function(frames.unflatten(0, (-1, h.shape[0])), h, *rest)

    return call


def sample(t, n, inputs, channels, height, width, bias=True, resets=False, order="ifgo", **options):
    """Arguments for one call, x as frames; `options` are the dtype and layout of x, h and c."""
    dtype = options.get("dtype", torch.float32)
    depth = inputs + channels
    return (
        tensor(t * n, inputs, height, width, seed=1, **options),
        tensor(n, channels, height, width, seed=2, **options),
        tensor(n, channels, height, width, seed=3, **options),
        tensor(4 * channels, depth, 3, 3, dtype=dtype, seed=4) * (9 * depth) ** -0.5,
        tensor(4 * channels, dtype=dtype, seed=5) if bias else None,
        tensor(t, n, seed=6) > 0.5 if resets else None,
        order,
    )


class TestConvLSTM3x3(DifferentiableOpContract):
    # Winograd's transforms add up four numbers on the way in and four on the way out.
    times_eager = 4

    def op(self, *arguments):
        return in_frames(ops.conv_lstm_3x3)(*arguments)

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
            # Two gates share a vector: in any instruction set, and of the widest one fill it.
            sample(2, 1, 3, 2, 4, 5, **options),
            sample(1, 2, 4, 8, 3, 5, resets=True, order="gofi", **options),
            sample(2, 2, 5, 17, 5, 4, resets=True, bias=False, order="fiog", **options),
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
        parameters = tensor(20, 9, 3, 3), tensor(20), torch.ones(3, batch, dtype=torch.bool)
        given = requiring_grad(to_device((x, h, h.clone(), *parameters), backend.device))
        output, c_last = ops.conv_lstm_3x3(*given)
        assert (output.shape, c_last.shape) == ((3, batch, 5, height, width), (batch, 5, height, width))
        weighted_sum([output, c_last]).backward()
        assert all(value.grad.eq(0).all() for value in given[:5])

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
        frames, h, c, *rest = to_device(sample(3, 2, *channels, 3, 7, layout=memory), backend.device)
        x = frames.unflatten(0, (3, 2))
        expected, c_expected = ops.conv_lstm_3x3(x, h, c, *rest)
        for t in range(3):
            output, c = ops.conv_lstm_3x3(x[t : t + 1], h, c, *rest)
            h = output[0]
            assert torch.equal(h, expected[t])
        assert torch.equal(c, c_expected)

    def test_reset_equals_a_new_start_even_from_nan(self, backend):
        frames, h, c, weight, bias, *_ = to_device(sample(4, 2, 3, 5, 3, 4), backend.device)
        x = frames.unflatten(0, (4, 2))
        reset = torch.zeros(4, 2, dtype=torch.bool, device=backend.device)
        reset[2, 1] = reset[0, 0] = True
        h, c = h.clone(), c.clone()
        h[0] = c[0] = float("nan")
        given = requiring_grad((x, h, c, weight, bias))
        output, c_last = ops.conv_lstm_3x3(*given, reset)
        zeros = torch.zeros_like(h)
        again, c_again = ops.conv_lstm_3x3(x[2:], zeros, zeros, weight, bias)
        assert torch.equal(output[2:, 1], again[:, 1])
        assert torch.equal(c_last[1], c_again[1])
        weighted_sum([output, c_last]).backward()
        assert all(value.grad.isfinite().all() for value in given)
        assert given[1].grad[0].eq(0).all()
        assert given[2].grad[0].eq(0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_extreme_values_stay_near(self, backend, value):
        """They reach two pixels per step at most, in their own sample, and what they do not reach is untouched."""
        arguments = sample(1, 2, 3, 5, 8, 9)
        calm, _ = self.op(*to_device(arguments, backend.device))
        arguments[0][0, 1, 3, 4] = value
        output, _ = self.op(*to_device(arguments, backend.device))
        plain, _ = self.eager(*arguments)
        far = torch.ones(8, 9, dtype=torch.bool)
        far[1:6, 2:7] = False
        assert torch.equal(output[0, 1], calm[0, 1])
        assert torch.equal(output[0, 0][:, far], calm[0, 0][:, far])
        assert output[0, 0][plain[0, 0].isnan()].isnan().all()
        if abs(value) == 1e30:
            assert output.isfinite().all()

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_wide_cell_state(self, backend, narrow):
        arguments = list(sample(3, 2, 6, 20, 5, 7, resets=True, dtype=narrow))
        arguments[2] = arguments[2].float()
        result = self.op(*to_device(arguments, backend.device))
        assert [part.dtype for part in result] == [narrow, torch.float32]
        assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments))

    @pytest.mark.parametrize("kept", [[0], [1], [2], [3], [4], [3, 4]])
    def test_gradients_of_some_arguments(self, backend, kept):
        arguments = sample(2, 2, 3, 4, 2, 3, resets=True, dtype=torch.float64)
        expected = gradients(self.eager, arguments)
        given = list(to_device(arguments, backend.device))
        for k in kept:
            given[k] = given[k].detach().requires_grad_()
        weighted_sum(self.op(*given)).backward()
        for k in kept:
            torch.testing.assert_close(given[k].grad.cpu(), expected[k], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("used", [0, 1])
    def test_gradient_of_one_result(self, backend, used):
        arguments = sample(2, 2, 3, 4, 2, 3, dtype=torch.float64)
        expected = gradients(lambda *a: self.eager(*a)[used], arguments)
        actual = gradients(lambda *a: self.op(*a)[used], to_device(arguments, backend.device))
        torch.testing.assert_close([d.cpu() for d in actual], list(expected), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("strides", ["contiguous", "channels_last", "sliced"])
    def test_weight_gradient(self, backend, of, strides):
        """The op that the gradient uses where PyTorch's library is slow, also where this processor's is not."""
        for batch, outputs, inputs, hidden, height, width in (
            (2, 9, 3, 10, 4, 7),
            (1, 16, 8, 16, 1, 1),
            (3, 2, 17, 0, 9, 2),
            (1, 5, 0, 4, 2, 1),
            (0, 4, 2, 2, 3, 3),
            # Several chunks of squares: a square's places side by side, and far apart.
            (1, 9, 3, 10, 33, 35),
            (1, 100, 20, 16, 19, 17),
        ):
            channels = (outputs, inputs, hidden)
            given = [tensor(batch, count, height, width, dtype=of, layout=strides, seed=count) for count in channels]
            result, of_bias = torch.ops.evkernels.conv_3x3_weight_gradient(*to_device(given, backend.device))
            sums = given[0].to(of_bias.dtype).sum((0, 2, 3))
            torch.testing.assert_close(of_bias.cpu(), sums, rtol=1e-4, atol=1e-4)
            assert result.shape == (outputs, inputs + hidden, 3, 3)
            assert result.dtype == torch.promote_types(of, torch.float32)
            if batch:
                exact, eager = (
                    torch.nn.grad.conv2d_weight(torch.cat([x, h], 1), result.shape, grad, padding=1)
                    for grad, x, h in (widened(given), [value.to(result.dtype) for value in given])
                )
                if of == torch.float64:
                    torch.testing.assert_close(result.cpu(), exact, rtol=1e-12, atol=1e-12)
                else:
                    assert_matches(result, exact, eager, times=4)
            else:
                assert result.eq(0).all()

    def test_weight_gradient_has_the_same_bits_for_any_number_of_threads(self):
        given = [tensor(2, count, 33, 31, seed=count) for count in (40, 19, 5)]
        of_threads = []
        threads = torch.get_num_threads()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            of_threads.append(torch.ops.evkernels.conv_3x3_weight_gradient(*given))
        torch.set_num_threads(threads)
        for of_weight, of_bias in of_threads:
            assert of_weight.equal(of_threads[0][0])
            assert of_bias.equal(of_threads[0][1])

    @pytest.mark.parametrize(("first", "split", "count"), [(0, 0, 5), (3, 0, 20), (0, 16, 18), (1, 32, 32)])
    @pytest.mark.parametrize("residual", [False, True])
    def test_input_gradient(self, backend, first, split, count, residual):
        grad, weight = tensor(2, 6, 5, 7, seed=1), tensor(6, first + count + 1, 3, 3, seed=2)
        added = tensor(2, count - split, 5, 7, seed=3) if residual else None
        expected = list(F.conv_transpose2d(grad, weight, padding=1)[:, first : first + count].tensor_split([split], 1))
        expected[1] = expected[1] if added is None else expected[1] + added
        ops = torch.ops.evkernels
        grad, weight, added = to_device((grad, weight, added), backend.device)
        packed = ops.conv_3x3_gradient_weight(weight, first, count)
        results = ops.conv_3x3_input_gradient(grad, weight, packed, first, split, count, added)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), wanted, rtol=1e-4, atol=1e-4)
            assert result.is_contiguous(memory_format=torch.channels_last)

    def test_input_gradient_splits_at_whole_vectors_alone(self):
        grad, weight = tensor(1, 2, 3, 3), tensor(2, 20, 3, 3)
        packed = torch.ops.evkernels.conv_3x3_gradient_weight(weight, 0, 20)
        for split in (-16, 8, 32):
            with pytest.raises(RuntimeError, match="split must be a multiple of 16"):
                torch.ops.evkernels.conv_3x3_input_gradient(grad, weight, packed, 0, split, 20, None)
        torch.library.opcheck(
            torch.ops.evkernels.conv_3x3_input_gradient.default,
            (grad, weight, packed, 0, 16, 20, tensor(1, 4, 3, 3)),
        )

    def test_long_sequence_stays_accurate(self, backend):
        steps = 20 if backend.is_slow else 1000
        arguments = sample(steps, 1, 4, 6, 2, 3)
        result = self.op(*to_device(arguments, backend.device))
        assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments), times=4)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: (2, 3, 4, 5)}, ValueError, r"x must be \[T, N, Cin, H, W\].*got \(2, 3, 4, 5\)"),
            ({0: (0, 2, 3, 4, 5)}, ValueError, r"x must be .*T at least 1, got \(0, 2, 3, 4, 5\)"),
            ({1: (2, 6, 4, 4)}, ValueError, r"h must be .* = \(2, 6, 4, 5\), got \(2, 6, 4, 4\)"),
            ({2: (2, 5, 4, 5)}, ValueError, r"c must be .* = \(2, 6, 4, 5\), got \(2, 5, 4, 5\)"),
            ({3: (24, 9, 1, 1)}, ValueError, r"weight must be .*Cin = 3, C = 6 = \(24, 9, 3, 3\), got \(24, 9, 1, 1\)"),
            ({4: (6,)}, ValueError, r"bias must be .* = \(24,\), got \(6,\)"),
            ({5: torch.zeros(2, 2)}, TypeError, "reset must be of dtype torch.bool"),
            ({5: torch.zeros(2, dtype=torch.bool)}, ValueError, r"reset must be \[T, N\] = \(3, 2\), got \(2,\)"),
            ({6: "ifgg"}, ValueError, "order must hold"),
            ({1: torch.zeros(2, 6, 4, 5).double()}, TypeError, "h must be of dtype torch.float32"),
            ({2: torch.zeros(2, 6, 4, 5).double()}, TypeError, "c must be of dtype torch.float32"),
            ({3: None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ],
    )
    def test_rejects(self, change, error, message):
        arguments = list(sample(3, 2, 3, 6, 4, 5))
        arguments[0] = arguments[0].unflatten(0, (3, 2))
        for position, value in change.items():
            arguments[position] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(error, match=message):
            ops.conv_lstm_3x3(*arguments)


class TestCellTakesIt:
    """A 3x3 ConvLSTMCell without options is this op and equals the loop over steps."""

    @pytest.mark.parametrize("state", [True, False])
    def test_values_and_gradients_equal_the_composition(self, state):
        torch.manual_seed(0)
        results = []
        cell = nn.ConvLSTMCell(3, 16, order="fiog", dtype=torch.float64)
        x = tensor(4, 2, 3, 3, 4, dtype=torch.float64).requires_grad_()
        begin = tuple(tensor(2, 16, 3, 4, dtype=torch.float64, seed=k) for k in (1, 2)) if state else None
        reset = tensor(4, 2, seed=3) > 0
        for winograd in (True, False):
            cell.winograd = winograd
            output, (h, c) = cell.forward_sequence(x, begin, reset)
            step = cell(x[0], begin)
            loss = weighted_sum([output, h, c, *step])
            results.append([output, h, c, *step, *torch.autograd.grad(loss, [x, *cell.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize(
        ("options", "taken"),
        [
            ({}, 2),
            ({"winograd": False}, 0),
            ({"padding_mode": "reflect"}, 0),
            ({"kernel_size": 5}, 0),
            ({"peephole": True}, 0),
            ({"norm_groups": 1}, 0),
            ({"zoneout": 0.1}, 0),
            ({"dilation": 2}, 0),
            ({"activation": "hardtanh"}, 0),
            ({"zoneout_c": 0.1}, 0),
            ({"cell_dropout": 0.1}, 0),
            ({"recurrent_dropout": 0.1}, 0),
            ("autocast", 0),
            ({"hidden_channels": 8}, 2),
            ({"hidden_channels": 7}, 0),
        ],
    )
    def test_cells_with_options_are_composed(self, options, taken):
        """Of those without, sequences and single steps without gradients run in the op."""
        autocast, options = options == "autocast", {} if options == "autocast" else options
        cell = nn.ConvLSTMCell(3, **{"hidden_channels": 16, **options})
        x = tensor(2, 1, 3, 18, 20)
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, autocast):
            cell.forward_sequence(x)
            cell(x[0])
            with torch.no_grad():
                cell(x[0])
        assert sum(event.name == "evkernels::conv_lstm_3x3" for event in profile.events()) == taken

    def test_hooks_of_the_convolution_are_called(self):
        cell = nn.ConvLSTMCell(3, 16)
        calls = []
        cell.conv.register_forward_hook(lambda *given: calls.append(given))
        cell.forward_sequence(tensor(2, 1, 3, 4, 5))
        assert len(calls) == 2
