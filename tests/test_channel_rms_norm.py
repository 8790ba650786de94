"""channel_rms_norm: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients

from evkernels import ops, reference
from evkernels.testing import assert_matches, tensor


def eager(x, weight, bias, eps=1e-5):
    return (F.rms_norm(x.movedim(1, -1), x.shape[1:2], weight, eps) + bias).movedim(-1, 1)


def composed(x, weight, bias, eps=1e-5):
    shape = (-1, *(1,) * (x.dim() - 2))
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight.view(shape) + bias.view(shape)


def sample(*size, eps=1e-3, dtype=torch.float32, layout="contiguous"):
    channels = size[1]
    x = tensor(*size, dtype=dtype, layout=layout, seed=1)
    return x, 1 + tensor(channels, dtype=dtype, seed=2) / 4, tensor(channels, dtype=dtype, seed=3) / 4, eps


class TestChannelRmsNorm(DifferentiableOpContract):
    # Images, volumes and rows are different graphs.
    most_frames = 6

    def op(self, *arguments):
        return ops.channel_rms_norm(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [composed]

    def samples(self, dtype, layout, large):
        sizes = [
            # Fewer pixels than a vector has lanes, one, and one more; of channels likewise.
            (2, 3, 2, 3),
            (3, 17, 1, 1),
            (1, 2, 3, 11),
            (2, 9, 1, 17),
            (2, 5, 4, 33),
            (5, 16),
            (2, 6, 7),
            (2, 4, 2, 3, 5),
        ]
        # Several tasks, the last one not whole, of samples and of blocks of one.
        sizes += [(2, 21, 37, 53), (45, 32, 5, 7), (1, 2, 3, 90, 41)] * large
        return [sample(*size, dtype=dtype, layout=layout) for size in sizes]

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[-1:] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample(1, 16, 16, 32, dtype=dtype, layout=layout)]

    def tiny(self):
        return sample(2, 3, 2, 2, dtype=torch.float64)

    def empty_samples(self):
        return [sample(0, 3, 4, 5), sample(2, 3, 0, 5), sample(0, 2)]

    @pytest.mark.parametrize("size", [(2, 19, 3, 5, 7), (1, 16, 2, 24, 24)])
    def test_volumes_in_channels_last(self, backend, size):
        x, *rest = sample(*size)
        expected, expected_gradients = eager(x, *rest), gradients(eager, (x, *rest))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        arguments = [value.to(backend.device) if isinstance(value, torch.Tensor) else value for value in (x, *rest)]
        y = self.op(*arguments)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y.cpu(), expected)
        actual = gradients(self.op, arguments)
        torch.testing.assert_close([d.cpu() for d in actual], list(expected_gradients), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("is_last", [False, True])
    def test_float32_weights_beside_16_bits(self, backend, half, is_last):
        x, weight, bias, eps = sample(2, 19, 5, 9, layout=("contiguous", "channels_last")[is_last])
        arguments = [value.to(backend.device) for value in (x.to(half) * 1000, weight, bias)]
        y = self.op(*arguments, eps)
        assert y.dtype == half
        # The squares overflow in float16.
        assert torch.equal(y, self.op(arguments[0].float(), *arguments[1:], eps).to(half))
        d_x, d_weight, d_bias = gradients(self.op, (*arguments, eps))
        assert (d_x.dtype, d_weight.dtype, d_bias.dtype) == (half, torch.float32, torch.float32)
        expected = gradients(self.op, (arguments[0].double(), *(v.double() for v in arguments[1:]), eps))
        torch.testing.assert_close(d_weight.double(), expected[1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("is_last", [False, True])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20, 1e16, 1e-30])
    def test_extreme_values_stay_at_their_pixels(self, backend, value, is_last):
        """The square of 1e20 overflows: the pixel's scale is zero. At 1e16 that of the gradient must not vanish."""
        x, *rest = (v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in sample(2, 11, 5, 7, eps=1e-5))
        x = x.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        expected, before = self.op(x, *rest), gradients(self.op, (x, *rest))[0]
        changed = x.clone()
        changed[1, 3, 2, 6] = value
        changed[1, 4, 2, 6] = -value
        y, (d_x, *_) = self.op(changed, *rest), gradients(self.op, (changed, *rest))
        with_reference = reference.channel_rms_norm(changed, *rest)
        torch.testing.assert_close(y, with_reference, equal_nan=True)
        if value == 1e20:
            assert torch.equal(y[1, :, 2, 6], rest[1])
        if value == 1e16:
            exact = gradients(eager, (changed.double(), *(v.double() for v in rest[:2]), rest[2]))[0]
            torch.testing.assert_close(d_x.double(), exact, rtol=1e-4, atol=1e-20)
        for result, plain in ((y, expected), (d_x, before)):
            result[1, :, 2, 6] = plain[1, :, 2, 6] = 0
            assert torch.equal(result, plain)

    @pytest.mark.parametrize("is_last", [False, True])
    def test_nan_stays_at_its_pixel_of_rows_shorter_than_a_vector(self, backend, is_last):
        """These are read and written together with what follows them."""
        x, *rest = (v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in sample(3, 3, 1, 2))
        x = x.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        changed = x.clone()
        changed[1, 1, 0, 1] = float("nan")
        y, (d_x, _, d_bias) = self.op(changed, *rest), gradients(self.op, (changed, *rest))
        expected, (expected_d_x, _, expected_d_bias) = self.op(x, *rest), gradients(self.op, (x, *rest))
        assert torch.equal(d_bias, expected_d_bias)
        for result, plain in ((y, expected), (d_x, expected_d_x)):
            assert result[1, :, 0, 1].isnan().all()
            result[1, :, 0, 1] = plain[1, :, 0, 1] = 0
            assert torch.equal(result, plain)

    def test_same_bits_wherever_a_pixel_is(self):
        """Alone, at the end of a row, in a vector: a stream of single maps gives what a batch does."""
        x, *rest = sample(3, 37, 5, 13)
        whole = self.op(x, *rest)
        assert torch.equal(self.op(x[1:2, :, 2:4, :].contiguous(), *rest), whole[1:2, :, 2:4, :])

    def test_autocast_runs_in_the_dtype_of_its_input(self):
        x, *rest = sample(2, 5, 3, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self.op(x, *rest).dtype == torch.float32
            assert self.op(x.bfloat16(), *rest).dtype == torch.bfloat16

    def test_many_channels(self):
        arguments = sample(1, 1024, 6, 9)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = arguments[0].contiguous(memory_format=layout)
            exact = eager(*(v.double() if isinstance(v, torch.Tensor) else v for v in arguments))
            assert_matches(self.op(x, *arguments[1:]), exact, eager(*arguments), others=[composed(*arguments)])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: torch.zeros(3)}, ValueError, r"x must be \[N, C, ...\] with C at least 1, got \(3,\)"),
            ({0: torch.zeros(2, 0, 3)}, ValueError, r"x must be .* got \(2, 0, 3\)"),
            ({0: torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be of dtype"),
            ({1: torch.zeros(4)}, ValueError, r"weight must be \[C\] = \(3,\), got \(4,\)"),
            ({2: torch.zeros(3, dtype=torch.float64)}, TypeError, "bias must be of dtype torch.float32"),
            ({2: None}, TypeError, "bias must be a torch.Tensor, got NoneType"),
        ],
    )
    def test_rejects(self, change, error, message):
        arguments = list(sample(2, 3, 4, 5))
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises(error, match=message):
            self.op(*arguments)
