"""conv_lstm_1x1: the contract of every op, and what is special to this one."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, requiring_grad, to_device, weighted_sum, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

# There is a form of the kernels for AMX: see conftest.py.
WITH_AMX = True


@contextmanager
def matmul_precision(precision):
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def one_product(x, h, weight, bias):
    return F.conv2d(torch.cat([x, h], dim=1), weight, bias)


def two_products(x, h, weight, bias):
    """As PlainLSTM2d and torch.nn.LSTM do it."""
    inputs = x.shape[1]
    return F.conv2d(x, weight[:, :inputs], bias) + F.conv2d(h, weight[:, inputs:])


def linear(x, h, weight, bias):
    pixels = torch.cat([h, x], dim=1).movedim(1, -1)
    weight = torch.cat([weight[:, x.shape[1] :], weight[:, : x.shape[1]]], dim=1)
    return F.linear(pixels, weight.flatten(1), bias).movedim(-1, 1)


def eager(x, h, c, weight, bias=None, reset=None, order="ifgo", save="gates", product=one_product):
    output = []
    for t in range(x.shape[0]):
        if reset is not None:
            h, c = (state.masked_fill(reset[t][:, None, None, None], 0) for state in (h, c))
        pre = product(x[t], h, weight, bias)
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


def sample(t, n, inputs, channels, height, width, bias=True, resets=False, order="ifgo", save="gates", **options):
    """Arguments for one call, x as frames; `options` are the dtype and layout of x, h and c."""
    dtype = options.get("dtype", torch.float32)
    depth = inputs + channels
    return (
        tensor(t * n, inputs, height, width, seed=1, **options),
        tensor(n, channels, height, width, seed=2, **options),
        tensor(n, channels, height, width, seed=3, **options),
        tensor(4 * channels, depth, 1, 1, dtype=dtype, seed=4) * depth**-0.5,
        tensor(4 * channels, dtype=dtype, seed=5) if bias else None,
        tensor(t, n, seed=6) > 0.5 if resets else None,
        order,
        save,
    )


def relative_error(results, exact) -> float:
    """The largest over the tensors: error over the largest exact value."""
    pairs = zip(results, exact, strict=True)
    return max(((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def kept_bytes(function, arguments) -> int:
    """Bytes that autograd keeps of a call, without those of its arguments and results."""
    kept = {}
    arguments = requiring_grad(arguments)

    def pack(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        results = function(*arguments)
    owned = {v.untyped_storage().data_ptr() for v in (*arguments, *results) if isinstance(v, torch.Tensor)}
    return sum(size for pointer, size in kept.items() if pointer not in owned)


class TestConvLSTM1x1(DifferentiableOpContract):
    precisions = ("highest", "high", "medium")

    def op(self, *arguments):
        return in_frames(ops.conv_lstm_1x1)(*arguments)

    def eager(self, *arguments):
        return in_frames(eager)(*arguments)

    def other_eagers(self):
        return [lambda *a, p=product: in_frames(eager)(*a, p) for product in (two_products, linear)]

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        # Several tasks' worth where kernels read it in place; other layouts reach them as copies.
        large = large and dtype != torch.float64 and layout in ("contiguous", "channels_last")
        return [
            sample(3, 2, 4, 6, 3, 7, **options),
            sample(1, 1, 1, 2, 5, 7, save="recompute", **options),
            sample(3, 2, 5, 17, 5, 9, resets=True, bias=False, order="fiog", **options),
            sample(2, 2, 17, 4, 6, 7, order="ifog", save="recompute", **options),
            *[sample(2, 3, 20, 33, 11, 27, resets=True, **options)] * large,
        ]

    def typical(self, dtype, layout):
        options = {"dtype": dtype, "layout": layout}
        if dtype == torch.float32:
            return [sample(2, 2, 32, 32, 16, 32, **options)] * (layout == "contiguous")
        samples = [sample(2, 2, 64, 64, 16, 32, resets=True, **options)]
        if layout == "contiguous":
            samples.append(sample(2, 2, 128, 128, 16, 32, save="recompute", **options))
        return [(*arguments[:2], arguments[2].float(), *arguments[3:]) for arguments in samples]

    def tiny(self):
        return sample(2, 2, 1, 2, 1, 2, dtype=torch.float64)

    def empty_samples(self):
        return [sample(2, 1, 0, 4, 2, 3)]

    @pytest.mark.parametrize("save", ["gates", "recompute"])
    @pytest.mark.parametrize("steps", [1, 3])
    def test_gradcheck_with_reset(self, backend, steps, save):
        arguments = sample(steps, 2, 2, 3, 1, 2, resets=True, order="oigf", save=save, dtype=torch.float64)
        arguments[5][0, 1] = True
        given = requiring_grad(to_device(arguments, backend.device))
        assert torch.autograd.gradcheck(self.op, given, check_undefined_grad=True, fast_mode=True)

    def test_both_ways_to_save_give_the_same_gradients(self, backend):
        arguments = sample(4, 2, 5, 19, 4, 7, resets=True)
        results = []
        for save in ("gates", "recompute"):
            results.append(gradients(self.op, to_device((*arguments[:-1], save), backend.device)))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("pixels", [1, 5, 6, 7, 95, 96, 97, 200])
    def test_tiles_cover_every_number_of_pixels(self, backend, pixels):
        pixels = min(pixels, 20) if backend.is_slow else pixels
        for layout in ("contiguous", "channels_last"):
            arguments = sample(2, 2, 3, 5, 1, pixels, layout=layout, dtype=torch.float64)
            arguments = [v.float() if isinstance(v, torch.Tensor) else v for v in arguments]
            result = self.op(*to_device(arguments, backend.device))
            assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments))

    @pytest.mark.parametrize(("batch", "height", "width"), [(0, 2, 3), (2, 0, 3), (2, 4, 0)])
    @pytest.mark.parametrize("save", ["gates", "recompute"])
    def test_nothing_to_do(self, backend, batch, height, width, save):
        """No samples or no pixels, which PyTorch's convolution does not take."""
        x, h = torch.empty(3, batch, 4, height, width), torch.empty(batch, 5, height, width)
        parameters = tensor(20, 9, 1, 1), tensor(20), torch.ones(3, batch, dtype=torch.bool)
        given = requiring_grad(to_device((x, h, h.clone(), *parameters), backend.device))
        output, c_last = ops.conv_lstm_1x1(*given, save=save)
        assert (output.shape, c_last.shape) == ((3, batch, 5, height, width), (batch, 5, height, width))
        weighted_sum([output, c_last]).backward()
        assert all(value.grad.eq(0).all() for value in given[:5])

    def test_equals_its_steps(self, backend, dtype):
        """A sequence has the bits of as many calls of one step."""
        frames, h, c, *rest = to_device(sample(3, 2, 5, 18, 3, 7, dtype=dtype), backend.device)
        x = frames.unflatten(0, (3, 2))
        expected, c_expected = ops.conv_lstm_1x1(x, h, c, *rest)
        for t in range(3):
            output, c = ops.conv_lstm_1x1(x[t : t + 1], h, c, *rest)
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
        output, c_last = ops.conv_lstm_1x1(*given, reset)
        zeros = torch.zeros_like(h)
        again, c_again = ops.conv_lstm_1x1(x[2:], zeros, zeros, weight, bias)
        assert torch.equal(output[2:, 1], again[:, 1])
        assert torch.equal(c_last[1], c_again[1])
        assert torch.equal(output[:, 0], ops.conv_lstm_1x1(x, zeros, zeros, weight, bias)[0][:, 0])
        weighted_sum([output, c_last]).backward()
        assert all(value.grad.isfinite().all() for value in given)
        assert given[1].grad[0].eq(0).all()
        assert given[2].grad[0].eq(0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e30])
    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    def test_extreme_values_stay_in_their_pixel(self, backend, value, memory):
        arguments = sample(3, 1, 3, 5, 4, 5, layout=memory)
        arguments[0][1, 1, 2, 3] = value
        exact, plain = self.eager(*widened(arguments)), self.eager(*arguments)
        assert_matches(self.op(*to_device(arguments, backend.device)), exact, plain)

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_wide_cell_state(self, backend, narrow):
        arguments = list(sample(3, 2, 6, 20, 5, 7, resets=True, dtype=narrow))
        arguments[2] = arguments[2].float()
        on_device = to_device(arguments, backend.device)
        result = self.op(*on_device)
        assert [part.dtype for part in result] == [narrow, torch.float32]
        eagers = [self.eager, lambda *a: in_frames(eager)(*a[:2], a[2].to(narrow), *a[3:])]
        exact = self.eager(*widened(arguments))
        others = [tuple(part.to(mine.dtype) for part, mine in zip(eagers[1](*arguments), result, strict=True))]
        assert_matches(result, exact, self.eager(*arguments), others=others)
        assert_matches(
            gradients(self.op, on_device),
            gradients(self.eager, widened(arguments)),
            gradients(self.eager, arguments),
        )

    @pytest.mark.parametrize("kept", [[0], [1], [2], [3], [4], [3, 4], [0, 1, 2]])
    def test_gradients_of_some_arguments(self, backend, kept):
        arguments = sample(3, 2, 3, 4, 2, 3, resets=True, dtype=torch.float64)
        expected = gradients(self.eager, arguments)
        given = list(to_device(arguments, backend.device))
        for k in kept:
            given[k] = given[k].detach().requires_grad_()
        weighted_sum(self.op(*given)).backward()
        for k in kept:
            torch.testing.assert_close(given[k].grad.cpu(), expected[k], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("used", [0, 1])
    def test_gradient_of_one_result(self, backend, used):
        arguments = sample(3, 2, 3, 4, 2, 3, dtype=torch.float64)
        expected = gradients(lambda *a: self.eager(*a)[used], arguments)
        actual = gradients(lambda *a: self.op(*a)[used], to_device(arguments, backend.device))
        torch.testing.assert_close([d.cpu() for d in actual], list(expected), rtol=1e-10, atol=1e-10)

    def test_nothing_is_kept_without_gradients(self):
        arguments = sample(2, 1, 3, 4, 2, 3)
        with torch.no_grad():
            results = torch.ops.evkernels.conv_lstm_1x1(*arguments[:-1], "none", "highest")
        assert [part.numel() for part in results[2:]] == [0, 0]

    def test_autocast_keeps_c_in_float32(self):
        arguments = sample(3, 2, 4, 5, 3, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, c_last = self.op(*arguments)
        narrow = [v.bfloat16() if isinstance(v, torch.Tensor) and k != 2 else v for k, v in enumerate(arguments)]
        expected, c_expected = self.op(*narrow)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
        assert torch.equal(c_last, c_expected)

    def test_channels_last_frames_stay_channels_last(self, backend):
        for layout in ("contiguous", "channels_last"):
            given = requiring_grad(to_device(sample(3, 2, 4, 5, 3, 6, layout=layout), backend.device))
            output, c_last = self.op(*given)
            form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            assert output.flatten(0, 1).is_contiguous(memory_format=form)
            assert c_last.is_contiguous(memory_format=form)

    @pytest.mark.parametrize("save", ["gates", "recompute"])
    @pytest.mark.parametrize("channels", [33, 70])
    def test_gates_of_some_channels_are_kept(self, backend, channels, save):
        """Triton's 16-bit kernels hold the weights of 64 channels at most; above they go step by step."""
        arguments = sample(2, 1, 3, channels, 1, 5, resets=True, save=save, dtype=torch.bfloat16)
        given = to_device(arguments, backend.device)
        assert_matches(self.op(*given), self.eager(*widened(arguments)), self.eager(*arguments))
        exact = gradients(self.eager, widened(arguments))
        assert_matches(gradients(self.op, given), exact, gradients(self.eager, arguments), "gradient")

    def test_long_sequence_stays_accurate(self, backend):
        steps = 20 if backend.is_slow else 1000
        arguments = sample(steps, 1, 4, 6, 1, 3)
        result = self.op(*to_device(arguments, backend.device))
        assert_matches(result, self.eager(*widened(arguments)), self.eager(*arguments))

    @pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("save", ["gates", "recompute"])
    def test_precision_bounds_the_error(self, backend, memory, save):
        """Relative to the largest value: two bfloat16 per factor are good for 2^-16, one for 2^-8, and sums add up."""
        if backend.is_slow:
            pytest.skip("float32 products are the library's on this backend")
        arguments = sample(4, 2, 36, 50, 7, 15, resets=True, layout=memory, save=save)
        exact = self.eager(*widened(arguments)), gradients(self.eager, widened(arguments))
        errors = {}
        for precision in ("highest", "high", "medium"):
            with matmul_precision(precision):
                on_device = to_device(arguments, backend.device)
                results = self.op(*on_device), gradients(self.op, on_device)
            errors[precision] = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
        for precision, bounds in {"highest": (2e-6, 4e-6), "high": (3e-5, 6e-5), "medium": (8e-3, 2e-2)}.items():
            assert all(e <= bound for e, bound in zip(errors[precision], bounds, strict=True)), errors
        if backend.name == "cpu-amx":
            assert errors["high"][0] > errors["highest"][0], "nothing was split"
            assert errors["medium"][0] > 10 * errors["high"][0], "nothing was rounded"

    def test_gradient_keeps_the_precision_of_its_forward(self, backend):
        if not backend.name.startswith("cpu-"):
            pytest.skip("the library's products follow the switch at their own time")
        arguments = to_device(sample(3, 2, 20, 33, 3, 5), backend.device)
        with matmul_precision("high"):
            expected = gradients(self.op, arguments)
            given = requiring_grad(arguments)
            loss = weighted_sum(self.op(*given))
        with matmul_precision("medium"):
            loss.backward()
        assert all(torch.equal(value.grad, d) for value, d in zip(given[:5], expected, strict=True))

    @pytest.mark.parametrize("lower", ["high", "medium"])
    def test_compiled_graph_follows_the_precision(self, lower):
        arguments = sample(2, 2, 20, 33, 3, 5)
        torch._dynamo.reset()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        for precision in ("highest", lower, "highest"):
            with matmul_precision(precision):
                torch.testing.assert_close(compiled(*arguments), self.op(*arguments), rtol=0, atol=0)

    @pytest.mark.parametrize(("save", "share"), [("gates", 0.45), ("recompute", 0.2)])
    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels", [24, 64, 128, 256])
    def test_bytes_kept_for_the_gradient(self, save, share, kind, channels):
        """Of every step, beside the arguments and results, which live on anyway."""
        arguments = sample(10, 1, channels, channels, 3, 4, dtype=kind, save=save)
        kept = kept_bytes(self.op, arguments)
        assert 0 < kept <= share * kept_bytes(self.eager, arguments)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: (2, 3, 4, 5)}, ValueError, r"x must be \[T, N, Cin, H, W\].*got \(2, 3, 4, 5\)"),
            ({0: (0, 2, 3, 4, 5)}, ValueError, r"x must be .*T at least 1, got \(0, 2, 3, 4, 5\)"),
            ({1: (2, 6, 4, 4)}, ValueError, r"h must be .* = \(2, 6, 4, 5\), got \(2, 6, 4, 4\)"),
            ({2: (2, 5, 4, 5)}, ValueError, r"c must be .* = \(2, 6, 4, 5\), got \(2, 5, 4, 5\)"),
            ({3: (24, 8, 1, 1)}, ValueError, r"weight must be .*Cin = 3, C = 6 = \(24, 9, 1, 1\), got \(24, 8, 1, 1\)"),
            ({3: (24, 9)}, ValueError, r"weight must be"),
            ({4: (6,)}, ValueError, r"bias must be .* = \(24,\), got \(6,\)"),
            ({5: torch.zeros(2, 2)}, TypeError, "reset must be of dtype torch.bool"),
            ({5: torch.zeros(2, dtype=torch.bool)}, ValueError, r"reset must be \[T, N\] = \(3, 2\), got \(2,\)"),
            ({6: "ifgg"}, ValueError, "order must hold"),
            ({7: "all"}, ValueError, "save must be 'gates' or 'recompute', got 'all'"),
            ({1: torch.zeros(2, 6, 4, 5).double()}, TypeError, "h must be of dtype torch.float32"),
            ({2: torch.zeros(2, 6, 4, 5).double()}, TypeError, "c must be of dtype torch.float32"),
            ({3: None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
            ({4: torch.zeros(24, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
        ],
    )
    def test_rejects(self, change, error, message):
        arguments = list(sample(3, 2, 3, 6, 4, 5))
        arguments[0] = arguments[0].unflatten(0, (3, 2))
        for position, value in change.items():
            arguments[position] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(error, match=message):
            ops.conv_lstm_1x1(*arguments)
