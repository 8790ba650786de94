"""RMSNorm and AABlur_SE_SoftPool: formulas of the originals, promises of the docstrings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_nn_event_layers import assert_golden, fill_parameters, sine

from evkernels.nn import AABlur_SE_SoftPool, RMSNorm


class TestRMSNorm:
    @pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 2, 3, 1)])
    @pytest.mark.parametrize("norm_dims", [(1,), (0,), (0, 1), (-1,)])
    def test_formula(self, shape, norm_dims):
        module, x = RMSNorm(5, norm_dims, eps=0.1).double(), torch.randn(shape, dtype=torch.float64)
        torch.nn.init.normal_(module.gamma), torch.nn.init.normal_(module.beta)
        y = x / ((x**2).mean(norm_dims, keepdim=True) + 0.1).sqrt()
        y = (y.transpose(1, -1) * module.gamma + module.beta).transpose(1, -1)
        torch.testing.assert_close(module(x), y)

    @pytest.mark.parametrize(
        ("norm_dims", "picked", "sums"),
        [
            ((1,), (0.054889, 0.054889, 0.426586), (66.991961, -7.570648)),
            ((2, 3), (0.054889, 0.054889, 0.424544), (66.982080, -8.362000)),
        ],
    )
    def test_values_of_the_original(self, norm_dims, picked, sums):
        module = RMSNorm(6, norm_dims).double()
        fill_parameters(module)
        # The original computes in float32.
        assert_golden(module(sine(2, 6, 4, 4)), picked, *sums, atol=2e-5)

    def test_keys_and_defaults_of_the_original(self):
        assert {name: value.tolist() for name, value in RMSNorm(2).state_dict().items()} == {
            "gamma": [1.0, 1.0],
            "beta": [0.0, 0.0],
        }
        assert RMSNorm(2).eps == 1e-4
        assert not RMSNorm(2, affine=False).state_dict()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_computes_in_float32(self, dtype):
        x = (torch.randn(2, 4, 3, 3) * 1000).to(dtype)
        y = RMSNorm(4).to(dtype)(x)
        assert y.dtype == dtype
        # The squares of these overflow in float16.
        assert torch.equal(y, RMSNorm(4)(x.float()).to(dtype))

    def test_rejects(self):
        with pytest.raises(TypeError, match="norm_dims must be a tuple, got int"):
            RMSNorm(3, 1)
        with pytest.raises(ValueError, match=r"x must be .* C = num_features = 3, got \(2, 4, 5\)"):
            RMSNorm(3)(torch.zeros(2, 4, 5))

    def test_gradcheck_compile_empty_and_copy(self):
        module, x = RMSNorm(3).double(), torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), copy.deepcopy(module)(x))
        assert RMSNorm(3)(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
        assert (RMSNorm(3)(torch.zeros(1, 3, 4)) == 0).all()


def plain_pool(module, x):
    """The formula of the docstring."""
    frames = x.flatten(0, 2)[:, None]
    y = F.conv2d(frames, module.blur, padding=1)
    if module.use_soft:
        weight = (y / module.temperature).exp()
        y = F.avg_pool2d(y * weight, 2, module.stride) / (F.avg_pool2d(weight, 2, module.stride) + 1e-6)
    else:
        y = F.avg_pool2d(y, 2, module.stride)
    y = y.view(*x.shape[:3], *y.shape[2:])
    return y * module.se(y)


class TestAABlurSESoftPool:
    @pytest.mark.parametrize("size", [(2, 2), (7, 9), (8, 5)])
    @pytest.mark.parametrize("options", [{}, {"stride": 1}, {"use_soft": False}, {"temperature": 10.0}, {"stride": 3}])
    def test_formula(self, options, size):
        module = AABlur_SE_SoftPool(9, **options).double()
        x = 5 * torch.randn(2, 9, 3, *size, dtype=torch.float64)
        x[0, 0] -= 40
        torch.testing.assert_close(module(x), plain_pool(module, x), rtol=1e-11, atol=1e-12)

    def test_values_of_the_original(self):
        module = AABlur_SE_SoftPool(8).double()
        fill_parameters(module)
        assert_golden(module(sine(1, 8, 2, 6, 7)), (0.232091, 0.059270, 0.194275), 4.157843, 0.433939)

    def test_keys_of_the_original(self):
        state = AABlur_SE_SoftPool(16).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "blur": (1, 1, 3, 3),
            "se.1.weight": (2, 16, 1, 1, 1),
            "se.1.bias": (2,),
            "se.3.weight": (16, 2, 1, 1, 1),
            "se.3.bias": (16,),
        }
        assert (16 * state["blur"]).int().tolist() == [[[[1, 2, 1], [2, 4, 2], [1, 2, 1]]]]
        assert AABlur_SE_SoftPool(3).se[1].out_channels == 1

    @pytest.mark.parametrize("value", [-6e4, -300.0, -88.0, 20.0, 300.0, 1000.0])
    def test_large_values_in_float16(self, value):
        """Where the formula as it is written overflows or divides zero by zero; a constant comes out as it is."""
        module = AABlur_SE_SoftPool(2, stride=2, r=1)
        torch.nn.init.zeros_(module.se[3].weight)
        x = torch.full((1, 2, 1, 8, 8), value, dtype=torch.float16, requires_grad=True)
        y = module.half()(x)
        y.float().sum().backward()
        assert x.grad.isfinite().all()
        exact = plain_pool(copy.deepcopy(module).double(), torch.full((1, 2, 1, 8, 8), min(value, 300.0)).double())
        scale = value / 300 if value > 300 else 1
        torch.testing.assert_close(y[..., 1:3, 1:3].double(), scale * exact[..., 1:3, 1:3], rtol=2e-3, atol=1e-6)

    def test_gradients(self):
        module = AABlur_SE_SoftPool(2, r=1).double()
        x = (3 * torch.randn(1, 2, 2, 4, 5, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
        assert torch.autograd.gradgradcheck(module, x)

    def test_frames_do_not_mix(self):
        module, x = AABlur_SE_SoftPool(3), torch.randn(2, 3, 4, 6, 6)
        torch.testing.assert_close(module(x)[:, :, 2:3], module(x[:, :, 2:3]))

    def test_compiles_empty_and_rejects(self):
        module, x = AABlur_SE_SoftPool(3), torch.randn(2, 3, 4, 6, 7)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        assert module(x[:0]).shape == (0, 3, 4, 3, 3)
        for wrong in (x[0], x[:, :2], x[..., :1]):
            with pytest.raises(ValueError, match=r"x must be \[N, C, T, H, W\] with C = 3 and H, W at least 2, got"):
                module(wrong)
