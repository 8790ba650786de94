"""The published checkpoint's KAN-MAMMOTE: its keys, its Mamba block step by step, causality."""

import pytest
import torch
from torch.nn.functional import layer_norm, silu, softplus

from evkernels import nn


def mamba_step_by_step(layer, x):
    """The recurrence of the paper, one step and one inner feature's state after the other."""
    inner, rank = layer.D.numel(), layer.rank
    outputs = []
    for sequence in x:
        xs, gates = (sequence @ layer.in_proj.weight.T).split(inner, dim=1)
        state = torch.zeros(inner, layer.states, dtype=x.dtype)
        for k in range(len(sequence)):
            taps = [xs[k - 3 + j] if k - 3 + j >= 0 else torch.zeros_like(xs[0]) for j in range(4)]
            convolved = sum(layer.conv1d.weight[:, 0, j] * tap for j, tap in enumerate(taps)) + layer.conv1d.bias
            value = silu(convolved)
            low, drive, readout = (layer.x_proj.weight @ value).split([rank, layer.states, layer.states])
            step = softplus(layer.dt_proj.weight @ low + layer.dt_proj.bias)[:, None]
            state = torch.exp(-step * layer.A_log.exp()) * state + step * drive * value[:, None]
            outputs.append(layer.out_proj.weight @ ((state @ readout + layer.D * value) * silu(gates[k])))
    return torch.stack(outputs).reshape(x.shape)


class TestMamba:
    def test_is_the_recurrence(self):
        layer = nn.Mamba(6, states=3).double()
        x = torch.randn(2, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), mamba_step_by_step(layer, x))

    def test_state_dict_shapes(self):
        """Those of mamba_ssm."""
        shapes = {name: tuple(value.shape) for name, value in nn.Mamba(32).state_dict().items()}
        assert shapes == {
            "A_log": (64, 16),
            "D": (64,),
            "in_proj.weight": (128, 32),
            "conv1d.weight": (64, 1, 4),
            "conv1d.bias": (64,),
            "x_proj.weight": (34, 64),
            "dt_proj.weight": (64, 2),
            "dt_proj.bias": (64,),
            "out_proj.weight": (32, 64),
        }

    def test_steps_start_between_a_thousandth_and_a_tenth(self):
        steps = softplus(nn.Mamba(64).dt_proj.bias.detach())
        assert 0.00099 < steps.min() < 0.01
        assert 0.01 < steps.max() < 0.101

    def test_gradcheck(self):
        layer = nn.Mamba(3, states=2).double()
        x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


class TestImmediateKANMammote:
    def test_is_what_its_documentation_says(self):
        torch.manual_seed(0)
        layer, t = nn.ImmediateKANMammote(8, hidden=12).double(), torch.rand(2, 6, dtype=torch.float64)
        before = torch.cat([t[:, :1], t[:, :-1]], dim=1)
        difference = layer.k_mote_current(t)[0] - layer.k_mote_previous(before)[0]
        block = layer.c_mamba
        x = block.input_proj(layer.temporal_difference_kan["kan_layer"](difference))
        encoder = block.time_encoder
        angles = (t - before)[..., None] * encoder.freq + encoder.phase
        times = encoder.linear(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = torch.cat([x[..., :6] + times, x[..., 6:]], dim=-1)
        expected = layer_norm(mamba_step_by_step(block.mamba, x) + x, (12,))
        embedding, weights = layer(t)
        torch.testing.assert_close(embedding, expected)
        assert weights.shape == (2, 6, 4)

    def test_loads_the_keys_of_the_checkpoint(self):
        layer, other = nn.ImmediateKANMammote(), nn.ImmediateKANMammote()
        state = layer.state_dict()
        mamba = {f"c_mamba.mamba.{name}" for name in nn.Mamba(32).state_dict()}
        assert {name for name in state if name.startswith("c_mamba.")} == mamba | {
            "c_mamba.input_proj.weight",
            "c_mamba.input_proj.bias",
            "c_mamba.time_encoder.freq",
            "c_mamba.time_encoder.phase",
            "c_mamba.time_encoder.linear.weight",
            "c_mamba.time_encoder.linear.bias",
            "c_mamba.layer_norm.weight",
            "c_mamba.layer_norm.bias",
        }
        assert "temporal_difference_kan.kan_layer.spline_linear.weight" in state
        assert {name.partition(".")[0] for name in state} == {
            "k_mote_current",
            "k_mote_previous",
            "temporal_difference_kan",
            "c_mamba",
        }
        other.load_state_dict({f"immediate_fasterkan_layer.{name}": value for name, value in state.items()})
        t = torch.rand(2, 9)
        torch.testing.assert_close(other(t), layer(t), rtol=0, atol=0)

    def test_the_past_alone_counts(self):
        layer, t = nn.ImmediateKANMammote(8, hidden=8).eval(), torch.rand(2, 9)
        longer = torch.cat([t, torch.rand(2, 4)], dim=1)
        torch.testing.assert_close(layer(longer)[0][:, :9], layer(t)[0])

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
    def test_any_length(self, shape):
        embedding, weights = nn.ImmediateKANMammote(8, hidden=8)(torch.rand(shape))
        assert embedding.shape == (*shape, 8)
        assert weights.shape == (*shape, 4)

    def test_routers_see_features(self):
        layer, t = nn.ImmediateKANMammote(8, hidden=8, aux_features=3), torch.rand(2, 4)
        one, other = (layer(t, torch.full((2, 4, 3), value))[1] for value in (0.0, 5.0))
        assert not torch.allclose(one, other)

    def test_every_parameter_learns(self):
        layer = nn.ImmediateKANMammote(8, hidden=8, top=4)
        layer(torch.rand(4, 20))[0].square().sum().backward()
        without = [name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []

    def test_rejects_sizes(self):
        with pytest.raises(ValueError, match="hidden must be a multiple of 4, at least 4, got 6"):
            nn.ImmediateKANMammote(8, hidden=6)
