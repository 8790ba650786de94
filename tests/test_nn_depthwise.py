"""DepthwiseConv2d and CausalDepthwiseConv3d against torch.nn's convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evkernels.nn import CausalDepthwiseConv3d, DepthwiseConv2d
from evkernels.testing import assert_matches

LAYOUTS = (torch.contiguous_format, torch.channels_last)
ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid(),
}


def results(function, module, x):
    """Output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


def close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class TestDepthwiseConv2d:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate"])
    @pytest.mark.parametrize(
        ("channels", "k", "stride", "padding", "dilation"),
        [(5, 3, 1, None, 1), (17, 3, 2, None, 1), (18, 5, 1, 1, 2), (3, 5, 2, None, 2), (16, 7, 1, 0, 1),
         (1, 1, 2, None, 3), (2, 9, 1, None, 1), (4, 3, 1, 6, 4)],
    )  # fmt: skip
    def test_is_conv2d(self, channels, k, stride, padding, dilation, padding_mode, layout):
        module = DepthwiseConv2d(channels, k, stride, padding, dilation, padding_mode, dtype=torch.float64)
        padding = (k - 1) * dilation // 2 if padding is None else padding
        options = {"padding_mode": padding_mode, "dtype": torch.float64}
        plain = nn.Conv2d(channels, channels, k, stride, padding, dilation, channels, **options)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, channels, 11, 13, dtype=torch.float64).contiguous(memory_format=layout)
        close(results(module, module, x), results(plain, plain, x))
        assert module(x).is_contiguous(memory_format=layout)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation):
        module = DepthwiseConv2d(3, 3, bias=False, activation=activation).double()
        plain = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1, groups=3, bias=False), ACTIVATIONS[activation]).double()
        plain[0].load_state_dict(module.state_dict())
        x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
        close(results(module, module, x), results(plain, plain, x))

    def test_state_and_initialisation_are_those_of_conv2d(self):
        torch.manual_seed(0)
        module = DepthwiseConv2d(6, 5, 2, dilation=3)
        torch.manual_seed(0)
        plain = nn.Conv2d(6, 6, 5, 2, 6, 3, groups=6)
        assert list(module.state_dict()) == ["weight", "bias"]
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
        assert list(DepthwiseConv2d(6, 5, bias=False).state_dict()) == ["weight"]

    @pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
    def test_empty_batch_and_one_pixel(self, padding_mode):
        module = DepthwiseConv2d(3, 5, padding_mode=padding_mode)
        plain = nn.Conv2d(3, 3, 5, padding=2, groups=3, padding_mode=padding_mode)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 3, 1, 1)
        torch.testing.assert_close(module(x), plain(x))
        assert module(x[:0]).shape == (0, 3, 1, 1)

    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
    def test_copies_casts_and_compiles(self, padding_mode):
        module = DepthwiseConv2d(3, 3, 2, padding_mode=padding_mode, activation="gelu")
        x = torch.randn(2, 3, 8, 9)
        expected = module(x)
        assert torch.equal(copy.deepcopy(module)(x), expected)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert "activation='gelu'" in repr(module)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kernel_size": 4}, r"kernel_size must be odd and in \[1, 31\], got 4"),
            ({"kernel_size": 33}, r"kernel_size must be odd and in \[1, 31\], got 33"),
            ({"stride": 3}, "stride must be 1 or 2, got 3"),
            ({"dilation": 0}, "dilation must be at least 1, got 0"),
            ({"padding": -1}, "padding must be at least 0, got -1"),
            ({"padding_mode": "circular"}, "padding_mode must be one of zeros, reflect, replicate, got 'circular'"),
            ({"activation": "tanh"}, "activation must be one of none, .* got 'tanh'"),
        ],
    )
    def test_rejects(self, options, message):
        with pytest.raises(ValueError, match=message):
            DepthwiseConv2d(**{"channels": 3, "kernel_size": 3} | options)


def plain_causal(module, x):
    (height, width), span = module.border, (module.kernel_size[0] - 1) * module.dilation[0]
    x = F.pad(x, (width, width, height, height, span, 0), mode="replicate")
    return F.conv3d(x, module.weight, module.bias, module.stride, 0, module.dilation, groups=x.shape[1])


class TestCausalDepthwiseConv3d:
    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_size": 3},
            {"kernel_size": (3, 5, 5), "padding": 3, "stride": 2, "bias": False},
            {"kernel_size": (2, 3, 3), "dilation": (3, 2, 2), "padding": (2, 1)},
            {"kernel_size": (4, 1, 1), "stride": (2, 1, 1)},
            {"kernel_size": (2, 3, 3), "stride": (1, 2, 2), "dilation": (1, 2, 2)},
            {"kernel_size": (2, 3, 5)},
            {"kernel_size": (2, 2, 2)},
            {"kernel_size": 1, "stride": (1, 3, 3)},
        ],
    )
    @pytest.mark.parametrize("channels", [1, 17])
    def test_is_a_padded_conv3d(self, options, channels):
        module = CausalDepthwiseConv3d(channels, **options).double()
        x = torch.randn(2, channels, 5, 9, 8, dtype=torch.float64)
        close(results(module, module, x), results(lambda x: plain_causal(module, x), module, x))
        with torch.no_grad():
            torch.testing.assert_close(module(x), plain_causal(module, x))

    def test_growth_of_the_original(self):
        assert CausalDepthwiseConv3d(2, (3, 5, 5), padding=(3, 3))(torch.randn(1, 2, 4, 51, 51)).shape[2:] == (
            4,
            53,
            53,
        )

    def test_state_is_that_of_conv3d(self):
        state = CausalDepthwiseConv3d(4, (3, 5, 7)).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "weight": (4, 1, 3, 5, 7),
            "bias": (4,),
        }

    def test_sees_no_later_frame(self):
        module, x = CausalDepthwiseConv3d(2, 3), torch.randn(1, 2, 6, 5, 5)
        changed = x.clone()
        changed[:, :, 4:] = 7
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                assert torch.equal(module(x)[:, :, :4], module(changed)[:, :, :4])

    def test_gradcheck_compile_empty_and_casts(self):
        module = CausalDepthwiseConv3d(2, (2, 3, 3)).double()
        x = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        module = module.bfloat16()
        y = module(x.bfloat16())
        assert y.dtype == torch.bfloat16
        exact = plain_causal(copy.deepcopy(module).double(), x.bfloat16().double())
        assert_matches(y, exact, plain_causal(module, x.bfloat16()))
        assert module(x[:0].bfloat16()).shape == (0, 2, 2, 3, 2)

    @pytest.mark.parametrize("padding", [-1, (1,), (1, 1, 1)])
    def test_rejects_paddings(self, padding):
        with pytest.raises(ValueError, match="padding must be an int or"):
            CausalDepthwiseConv3d(2, 3, padding=padding)
