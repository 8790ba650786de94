"""Embeddings of time: values of the published code, its state-dict keys, and what their options do."""

import math

import pytest
import torch

from evkernels import nn

KEYS = [
    "scale_weight",
    "w1_fourier.weight",
    "w1_fourier.bias",
    "w1_spline.weight",
    "w1_spline.bias",
    "w2_fourier.fourier_weight",
    "w2_fourier.bias",
    "w2_spline.base_weight",
    "w2_spline.spline_weight",
    "w2_spline.grid",
    "layernorm.weight",
    "layernorm.bias",
]


def fill(module, start=0):
    """Parameter j, in order, becomes 0.5 * sin(0.37 * i + 0.11 * j) over its elements i."""
    with torch.no_grad():
        for j, parameter in enumerate(module.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_(0.5 * torch.sin(0.37 * index + 0.11 * (start + j)))


def digest(out):
    """Values at the second, middle and last position, sum, and sum weighted by cos(0.1 * i)."""
    flat = out.detach().flatten()
    weights = torch.cos(0.1 * torch.arange(len(flat), dtype=flat.dtype))
    return [*(flat[k].item() for k in (1, len(flat) // 2, -1)), flat.sum().item(), (flat * weights).sum().item()]


class TestCombinedLeTE:
    def test_published_values(self):
        layer = nn.CombinedLeTE(8).double()
        fill(layer)
        out = layer(torch.arange(6, dtype=torch.float64).reshape(2, 3) / 6)
        assert out.shape == (2, 3, 8)
        assert digest(out) == pytest.approx([0.037165, 0.0, -0.060495, 2.044224, 0.083970], abs=1e-6)

    def test_published_values_of_the_fourier_part(self):
        layer = nn.CombinedLeTE(4, p=1).double()
        fill(layer.w2_fourier)
        u = torch.sin(0.23 * torch.arange(12, dtype=torch.float64)).reshape(3, 4)
        assert digest(self.rows(layer, "w1_fourier", u)) == pytest.approx(
            [-0.987527, 1.017238, 2.607018, -1.340819, -2.271775], abs=1e-6
        )

    def test_published_values_of_the_spline_part(self):
        layer = nn.CombinedLeTE(4, p=0).double()
        fill(layer.w2_spline)
        v = 1.5 * torch.sin(0.23 * torch.arange(12, dtype=torch.float64)).reshape(3, 4)
        assert digest(self.rows(layer, "w1_spline", v)) == pytest.approx(
            [0.512739, -0.488895, -1.191044, 0.591522, 0.921435], abs=1e-6
        )

    def rows(self, layer, part, arguments):
        """The outputs for given arguments of the part's features: they are the shifts at time 0."""
        out = []
        for row in arguments:
            with torch.no_grad():
                getattr(layer, part).bias.copy_(row)
            out.append(layer(torch.zeros(1, dtype=torch.float64))[0])
        return torch.stack(out)

    def test_state_dict_keys_and_size(self):
        layer = nn.CombinedLeTE(32)
        assert sorted(layer.state_dict()) == sorted(KEYS)
        assert sum(p.numel() for p in layer.parameters()) == 5040
        assert layer.w2_spline.grid.shape == (16, 12)
        assert nn.LeTE is nn.CombinedLeTE

    def test_state_dict_round_trip(self):
        one, other = nn.CombinedLeTE(7), nn.CombinedLeTE(7)
        other.load_state_dict(one.state_dict())
        t = torch.rand(2, 5)
        assert torch.equal(one(t), other(t))

    def test_refuses_other_knots(self):
        state = nn.CombinedLeTE(6).state_dict()
        state["w2_spline.grid"] = state["w2_spline.grid"] * 2
        with pytest.raises(RuntimeError, match=r"spline\.grid must hold the uniform knots"):
            nn.CombinedLeTE(6).load_state_dict(state)

    def test_initial_values(self):
        layer = nn.CombinedLeTE(32)
        torch.testing.assert_close(layer.w1_fourier.weight[[0, -1], 0], torch.tensor([1.0, 1e-9]))
        assert (layer.w1_spline.bias == 0).all()
        assert layer.w2_spline.spline_weight.abs().max() <= 0.01
        assert layer.w2_spline.base_weight.abs().max() <= 0.25
        assert layer.w2_spline.base_weight.std().item() > 0.1
        assert layer.w2_fourier.fourier_weight.std().item() == pytest.approx(1 / math.sqrt(80), rel=0.1)

    @pytest.mark.parametrize("dim", [1, 5, 8])
    @pytest.mark.parametrize("p", [0, 0.3, 1])
    def test_parts_and_sizes(self, dim, p):
        layer = nn.CombinedLeTE(dim, p)
        assert (layer.fourier_dim, layer.spline_dim) == (math.floor(dim * p), dim - math.floor(dim * p))
        out = layer(torch.rand(2, 3))
        assert out.shape == (2, 3, dim)
        out.sum().backward()

    @pytest.mark.parametrize("p", [0, 1])
    def test_one_part_alone_is_not_normalised(self, p):
        layer, bare = nn.CombinedLeTE(6, p), nn.CombinedLeTE(6, p, layer_norm=False, scale=False)
        bare.load_state_dict({k: v for k, v in layer.state_dict().items() if k in bare.state_dict()})
        t = torch.rand(4)
        assert torch.equal(layer(t), bare(t))

    def test_options_leave_their_parameters_out(self):
        names = {name.partition(".")[0] for name, _ in nn.CombinedLeTE(6, layer_norm=False).named_parameters()}
        assert "layernorm" not in names
        assert "scale_weight" not in dict(nn.CombinedLeTE(6, scale=False).named_parameters())

    def test_frozen_parameters(self):
        layer = nn.CombinedLeTE(6, parameter_requires_grad=False)
        frozen = {name.partition(".")[0] for name, p in layer.named_parameters() if not p.requires_grad}
        assert frozen == {"w1_fourier", "w1_spline", "scale_weight"}
        layer(torch.rand(3)).square().sum().backward()
        assert layer.w2_spline.base_weight.grad is not None

    def test_gradcheck(self):
        layer = nn.CombinedLeTE(4).double()
        t = torch.rand(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, *_: layer(t), (t, *layer.parameters()))

    @pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (2, 3, 5), ()])
    def test_any_shape_and_integers(self, shape):
        layer = nn.CombinedLeTE(6)
        t = torch.randint(0, 784, shape)
        assert torch.equal(layer(t), layer(t.float()))
        assert layer(t).shape == (*shape, 6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, dtype):
        layer = nn.CombinedLeTE(6).to(dtype)
        assert layer(torch.rand(5)).dtype == dtype

    def test_autocast_keeps_time_in_float32(self):
        layer = nn.CombinedLeTE(6)
        t = torch.rand(5) * 1e4
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(t), layer(t).float())

    def test_compiles_to_one_graph(self):
        layer = nn.CombinedLeTE(6)
        t = torch.rand(2, 7)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(t), layer(t), rtol=0, atol=0)

    @pytest.mark.parametrize(("arguments", "message"), [((0,), "dim must be at least 1"), ((4, 1.5), "p must be in")])
    def test_rejects(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            nn.CombinedLeTE(*arguments)


class TestSinCosPositionEncoding:
    def test_values(self):
        out = nn.SinCosPositionEncoding(6, length=10)(torch.tensor([[0, 5]]))
        expected = [f(0.5 * 10000 ** (-k / 3)) for k in range(3) for f in (math.sin, math.cos)]
        assert out.shape == (1, 2, 6)
        torch.testing.assert_close(out[0, 0], torch.tensor([0.0, 1.0] * 3))
        torch.testing.assert_close(out[0, 1], torch.tensor(expected))

    def test_has_no_state(self):
        assert not nn.SinCosPositionEncoding(8).state_dict()

    @pytest.mark.parametrize("dim", [0, 1, 7])
    def test_rejects_odd_sizes(self, dim):
        with pytest.raises(ValueError, match="dim must be even"):
            nn.SinCosPositionEncoding(dim)


class TestLearnablePositionEmbedding:
    def test_is_a_table(self):
        layer = nn.LearnablePositionEmbedding(32)
        assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"position_embedding.weight": (784, 32)}
        position = torch.tensor([[0, 783]])
        assert torch.equal(layer(position), layer.position_embedding.weight[position])
