"""EventNormalization and ChannelAttention: values of the original modules, promises of the docstrings."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.nn import ChannelAttention, EventNormalization, event_normalization


def sine(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(0.23).sin().reshape(shape)


def fill_parameters(module: nn.Module) -> None:
    with torch.no_grad():
        for j, parameter in enumerate(module.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.5 * torch.sin(0.37 * index + 0.11 * j)).reshape(parameter.shape))


def assert_golden(
    y: Tensor, picked: tuple[float, float, float], total: float, weighted: float, atol: float = 1e-6
) -> None:
    """Elements 1, N // 2 and N - 1, the sum, and the sum weighted by cos(0.1 * i), printed with six decimals."""
    flat = y.flatten()
    actual = [flat[1], flat[flat.numel() // 2], flat[-1], flat.sum()]
    actual.append((flat * torch.arange(flat.numel(), dtype=torch.float64).mul(0.1).cos()).sum())
    expected = torch.tensor([*picked, total, weighted], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(actual), expected, rtol=0, atol=atol)


def masked_input() -> Tensor:
    x = (2 * sine(2, 5, 6, 7)).round()
    x[:, :, ::2] = 0
    return x


def straightforward(x: Tensor, epsilon: float = 1e-8) -> Tensor:
    mask = (x.abs().sum(dim=1, keepdim=True) > epsilon).to(x.dtype)
    count = mask.sum(dim=(2, 3), keepdim=True) + epsilon
    mean = x.sum(dim=(2, 3), keepdim=True) / count
    variance = (mask * (x - mean) ** 2).sum(dim=(2, 3), keepdim=True) / count
    return (x - mean) / (variance.sqrt() + epsilon) * mask


class TestEventNormalization:
    def test_values_of_the_original(self):
        y = EventNormalization()(masked_input())
        assert_golden(y, (0.0, 0.0, 0.811107), 0.0, 8.850206)

    def test_statistics_over_pixels_active_in_any_channel(self):
        x = masked_input()
        active = x.abs().sum(1) > 0
        for sample, mask in zip(event_normalization(x), active, strict=True):
            values = sample[:, mask]
            torch.testing.assert_close(values.mean(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-7)
            torch.testing.assert_close(values.var(1, correction=0), torch.ones(5, dtype=torch.float64))
            assert (sample[:, ~mask] == 0).all()

    def test_samples_do_not_mix(self):
        x = masked_input()
        together = event_normalization(x)
        assert torch.equal(together[:1], event_normalization(x[:1]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16])
    def test_result_is_float32(self, dtype):
        x = masked_input().abs().to(dtype)
        y = event_normalization(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, straightforward(x.double()).float())

    def test_zeros_and_constants_give_finite_values_and_gradients(self):
        x = torch.zeros(3, 2, 4, 5)
        x[1] = 1.0
        x[2, 0, 1, 2] = 7.0
        x.requires_grad_()
        y = event_normalization(x)
        assert (y[0] == 0).all()
        assert y.isfinite().all()
        y.square().sum().backward()
        assert x.grad.isfinite().all()

    def test_gradients(self):
        # Away from the threshold of activity the function is smooth.
        x = masked_input()[:1, :2, :, :3].clone().requires_grad_()
        inactive = x.detach().abs().sum(1, keepdim=True) == 0

        def on_active_pixels(x):
            return event_normalization(x.masked_fill(inactive, 0))

        assert torch.autograd.gradcheck(on_active_pixels, x)

    def test_empty_and_rank(self):
        assert event_normalization(torch.zeros(0, 2, 3, 4)).shape == (0, 2, 3, 4)
        with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \(2, 3, 4\)"):
            EventNormalization()(torch.zeros(2, 3, 4))

    def test_compiles_to_one_graph_and_leaves_its_input_alone(self):
        x = masked_input().float()
        before = x.clone()
        expected = event_normalization(x)
        torch.testing.assert_close(
            torch.compile(EventNormalization(), fullgraph=True, backend="aot_eager")(x), expected
        )
        assert torch.equal(x, before)


class TestChannelAttention:
    def test_values_of_the_original(self):
        module = ChannelAttention(16).double()
        fill_parameters(module)
        assert_golden(module(sine(2, 16, 3, 3)), (0.113280, 0.489452, -0.018926), 4.400435, 0.114403)

    @pytest.mark.parametrize(("channels", "reduction", "narrow"), [(16, 8, 2), (5, 8, 1), (1, 1, 1), (256, 16, 16)])
    def test_keys_and_sizes_of_the_original(self, channels, reduction, narrow):
        state = ChannelAttention(channels, reduction).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "fc.0.weight": (narrow, channels, 1, 1),
            "fc.2.weight": (channels, narrow, 1, 1),
        }

    def test_equals_pooled_convolutions(self):
        module, x = ChannelAttention(24, 4), torch.randn(2, 24, 5, 7)
        pooled = F.adaptive_avg_pool2d(x, 1)
        scale = F.conv2d(F.gelu(F.conv2d(pooled, module.fc[0].weight)), module.fc[2].weight).sigmoid()
        torch.testing.assert_close(module(x), x * scale)

    def test_trains_and_copies(self):
        module = ChannelAttention(8)
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        module(x).square().sum().backward()
        assert all(value.grad.abs().sum() > 0 for value in (x, *module.parameters()))
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), module(x))

    @pytest.mark.parametrize(("channels", "reduction", "name"), [(0, 8, "channels"), (8, 0, "reduction")])
    def test_rejects_sizes(self, channels, reduction, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ChannelAttention(channels, reduction)
