"""K-MOTE, FasterKAN and KAN-MAMMOTE: values of the published code, its state-dict keys, dispatch, recurrence."""

import pytest
import torch
from test_nn_time_embeddings import digest, fill

from evkernels import nn
from evkernels.nn.kan_mammote import state_space_scan
from evkernels.nn.kmote import load_balance


class TestFasterKAN:
    def test_published_values(self):
        layer = nn.FasterKAN(4, 3, num_grids=5).double()
        fill(layer)
        with torch.no_grad():
            layer.rbf.grid.copy_(torch.linspace(-2, 2, 5))
        out = layer(torch.sin(0.23 * torch.arange(12, dtype=torch.float64)).reshape(3, 4))
        assert digest(out) == pytest.approx([0.642263, 0.684533, 0.216157, 3.631755, 3.293515], abs=1e-6)

    def test_state_dict_keys(self):
        assert sorted(nn.FasterKAN(4, 3).state_dict()) == [
            "layernorm.bias",
            "layernorm.weight",
            "rbf.grid",
            "rbf.inv_denominator",
            "spline_linear.weight",
        ]

    def test_gradient_is_the_true_one(self):
        layer = nn.FasterKAN(3, 2).double()
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


class TestKMOTE:
    def test_published_values(self):
        """The first and second expert are chosen here."""
        layer = nn.KMOTE(8).double()
        fill(layer)
        embedding, weights = layer(torch.linspace(0, 1, 5, dtype=torch.float64))
        assert digest(embedding) == pytest.approx([-0.074544, 0.0, 0.0, -1.324957, 0.120098], abs=1e-6)
        assert digest(weights) == pytest.approx([0.326040, 0.034294, 0.002234, 5.0, 2.852344], abs=1e-6)

    def test_gaussians_and_wavelets(self):
        """The third and fourth quarter by their formulas, from all experts."""
        softplus = torch.nn.functional.softplus
        for wavelet in ("mexican_hat", "morlet"):
            layer = nn.KMOTE(8, top=4, wavelet=wavelet).double()
            t = torch.linspace(-2, 2, 7, dtype=torch.float64)
            embedding, weights = layer(t)
            gaussian, wave = layer.experts.rkhs_gaussian, layer.experts.wavelet
            x = (t[:, None] * gaussian.alpha_weights + gaussian.alpha_bias)[..., None]
            basis = gaussian.basis_function
            kernels = torch.exp(-(((x - basis.means) / (softplus(basis.raw_stds) + 1e-6)) ** 2) / 2)
            expected = (softplus(basis.raw_weights) * kernels).sum(-1) * weights[:, 2:3]
            torch.testing.assert_close(embedding[:, 4:6], expected)
            basis = wave.basis_function
            x = (t[:, None] * wave.alpha_weights + wave.alpha_bias)[..., None]
            s = (x - basis.translations) / (softplus(basis.raw_scales) + 1e-6)
            carrier = 1 - s**2 if wavelet == "mexican_hat" else (5 * s).cos()
            expected = (basis.weights * carrier * torch.exp(-(s**2) / 2)).sum(-1) * weights[:, 3:]
            torch.testing.assert_close(embedding[:, 6:], expected)

    @pytest.mark.parametrize("top", [1, 2, 3, 4])
    def test_unchosen_quarters_are_zero(self, top):
        layer = nn.KMOTE(16, top=top)
        embedding, weights = layer(torch.rand(3, 5) * 10)
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.topk(top).indices, True)
        quarters = embedding.reshape(3, 5, 4, 4)
        assert (quarters[~kept] == 0).all()
        assert weights.sum(-1).sub(1).abs().max() < 1e-6

    def test_only_the_gates_of_chosen_experts_are_open(self):
        layer = nn.KMOTE(16, top=1)
        rows = []
        for expert in layer.experts.values():
            expert.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[1].count_nonzero().item()))
        layer(torch.rand(20))
        assert sum(rows) == 20

    def test_state_dict_keys(self):
        keys = set(nn.KMOTE(8).state_dict())
        assert {f"router.mlp.{k}.{kind}" for k in (0, 2, 4) for kind in ("weight", "bias")} <= keys
        parts = {
            "fourier": ("frequencies", "amplitudes", "phases"),
            "spline": ("control_points", "knots", "psi_k_matrix"),
            "rkhs_gaussian": ("raw_weights", "means", "raw_stds"),
            "wavelet": ("weights", "raw_scales", "translations"),
        }
        for expert, names in parts.items():
            expected = {"alpha_weights", "alpha_bias", *(f"basis_function.{name}" for name in names)}
            assert {key.split(".", 2)[2] for key in keys if key.startswith(f"experts.{expert}.")} == expected

    def test_router_sees_features(self):
        layer = nn.KMOTE(8, aux_features=3)
        t = torch.rand(2, 4)
        one, other = (layer(t, torch.full((2, 4, 3), value))[1] for value in (0.0, 5.0))
        assert not torch.allclose(one, other)

    @pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
    def test_any_shape(self, shape):
        embedding, weights = nn.KMOTE(8)(torch.rand(shape))
        assert embedding.shape == (*shape, 8)
        assert weights.shape == (*shape, 4)

    def test_gradcheck(self):
        layer = nn.KMOTE(4, top=4).double()
        t = torch.rand(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: layer(t)[0], (t,))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dim": 6}, "dim must be a multiple of 4"),
            ({"dim": 0, "generation": "B"}, "dim must be at least 1"),
            ({"top": 0}, r"top must be in \[1, 4\], got 0"),
            ({"experts": 0}, "experts must be at least 1"),
            ({"generation": "C"}, "generation must be A or B, got 'C'"),
            ({"wavelet": "haar"}, "wavelet must be mexican_hat or morlet, got 'haar'"),
        ],
    )
    def test_rejects(self, options, message):
        with pytest.raises(ValueError, match=message):
            nn.KMOTE(**options)

    def test_inference_in_parts_is_the_same(self):
        layer = nn.KMOTE(8)
        t = torch.rand(2500)
        with torch.no_grad():
            apart = layer(t)[0]
        torch.testing.assert_close(apart, layer(t)[0])

    def test_spline_as_published(self):
        """By the published matrix on the four control points of the segment, at times that are no knots."""
        layer = nn.KMOTE(4, top=4).double()
        spline = layer.experts.spline
        with torch.no_grad():
            spline.alpha_weights.fill_(1.0)
        t = torch.linspace(0.003, 1.003, 41, dtype=torch.float64)
        embedding, weights = layer(t)
        basis = spline.basis_function
        for value, row, weight in zip(t.clamp(0.2, 0.8), embedding, weights, strict=True):
            segment = min(max(int(torch.searchsorted(basis.knots, value)) - 3, 0), 9)
            u = (value - basis.knots[3]) / (basis.knots[-4] - basis.knots[3])
            powers = u ** torch.arange(4, dtype=torch.float64)
            expected = powers @ basis.psi_k_matrix @ basis.control_points[0, segment : segment + 4]
            assert row[1].item() == pytest.approx((expected * weight[1]).item(), abs=1e-8)

    def test_more_experts_than_kinds(self):
        layer = nn.KMOTE(12, top=2, experts=6)
        assert list(layer.experts)[4:] == ["fourier_2", "spline_2"]
        embedding, weights = layer(torch.rand(5))
        assert (embedding.shape, weights.shape) == ((5, 12), (5, 6))


class TestKMOTEGenerationB:
    def layer(self, **options):
        return nn.KMOTE(6, generation="B", **options).double().eval()

    @pytest.mark.parametrize("top", [1, 2, 4])
    def test_is_the_normalised_mixture(self, top):
        layer, t = self.layer(top=top), torch.linspace(-1.5, 1.5, 11, dtype=torch.float64)
        embedding, weights = layer(t)
        largest, chosen = weights.topk(top)
        largest = largest if top == 4 else largest.softmax(-1)
        everything = torch.stack([expert(t, torch.ones_like(t)) for expert in layer.experts.values()], dim=1)
        picked = everything.gather(1, chosen[..., None].expand(-1, -1, 6))
        expected = torch.nn.functional.layer_norm((picked * largest[..., None]).sum(1), (6,))
        torch.testing.assert_close(embedding, expected)

    def test_spline_expert_is_a_cubic_spline(self):
        """SciPy's B-splines on the uniform knots."""
        interpolate = pytest.importorskip("scipy.interpolate", reason="SciPy's splines are the reference")
        expert = self.layer().experts.spline
        x = torch.linspace(-0.99, 0.99, 23, dtype=torch.float64)
        knots = -1 + 0.4 * torch.arange(-3, 9)
        spline = interpolate.BSpline(knots.double().numpy(), expert.coef[0].T.detach().numpy(), 3)(x.numpy())
        expected = expert.scale_base * torch.nn.functional.silu(x[:, None]) + torch.from_numpy(spline)
        torch.testing.assert_close(expert(x, torch.ones_like(x)), expected, rtol=1e-6, atol=1e-8)

    def test_router_is_noisy_in_training_alone(self):
        layer, t = self.layer(), torch.rand(9, dtype=torch.float64)
        assert torch.equal(layer(t)[1], layer(t)[1])
        layer.train()
        assert not torch.equal(layer(t)[1], layer(t)[1])

    def test_gradcheck(self):
        layer = self.layer(top=4)
        t = torch.rand(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: layer(t)[0], (t,))

    def test_keys(self):
        keys = set(self.layer().state_dict())
        assert {"router.router_network.0.weight", "layer_norm.weight", "experts.gaussian.alpha_weights"} <= keys
        assert {"experts.spline.coef", "experts.spline.scale_base", "experts.spline.scale_sp"} <= keys

    def test_load_balance(self):
        assert load_balance(torch.full((3, 5, 4), 0.25)).item() == pytest.approx(0, abs=1e-8)
        one = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(7, 4)
        assert load_balance(one).item() == pytest.approx(0.01 * 1.386294)


class TestStateSpaceScan:
    def test_is_the_recurrence(self):
        decay, drive, readout = (torch.rand(2, 6, 3, dtype=torch.float64) for _ in range(3))
        state, expected = torch.zeros(2, 3, dtype=torch.float64), []
        for k in range(6):
            state = decay[:, k] * state + drive[:, k]
            expected.append((state * readout[:, k]).sum(-1))
        torch.testing.assert_close(state_space_scan(decay, drive, readout), torch.stack(expected, 1))

    @pytest.mark.parametrize("length", [0, 1])
    def test_short(self, length):
        parts = (torch.rand(2, length, 3) for _ in range(3))
        assert state_space_scan(*parts).shape == (2, length)

    def test_gradcheck(self):
        parts = [torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        assert torch.autograd.gradcheck(state_space_scan, parts)


class TestKANMammote:
    def test_published_steps(self):
        """The layers one by one, the state-space model as published: step by step, step size by mean over channels."""
        torch.manual_seed(0)
        layer = nn.KANMammote(8, states=3, layers=2, published=True).double().eval()
        t = torch.rand(2, 5, dtype=torch.float64)
        now, _ = layer.k_mote(t)
        before, _ = layer.k_mote(torch.cat([t[:, :1], t[:, :-1]], dim=1))
        delta = layer.ct_mamba_block.delta_t_embedding_proj(layer.faster_kan_layer["kan_layer"](now - before))
        x = now
        for block in layer.ct_mamba_block.continuous_mamba_layers:
            processed, state, outputs = block.delta_processor(delta), torch.zeros(2, 3, dtype=torch.float64), []
            for k in range(5):
                drive, readout = block.x_proj(x[:, k]).chunk(2, dim=-1)
                step = processed[:, k].mean(-1, keepdim=True)
                state = (1 - step * block.A_log.exp()) * state + step * drive * x[:, k].mean(-1, keepdim=True)
                outputs.append((state * readout).sum(-1, keepdim=True) + block.D * x[:, k])
            x = block.norm(block.out_proj(torch.stack(outputs, 1)) + x)
            x = x + block.ffn(x)
        torch.testing.assert_close(layer(t)[0], x)

    def test_stays_bounded(self):
        """Sequences as long as those of Event-Based MNIST, on which the published steps overflow."""
        t = torch.linspace(0, 1, 2000)[None]
        for seed in range(20):
            torch.manual_seed(seed)
            assert nn.KANMammote(32)(t)[0].abs().max() < 100
        torch.manual_seed(0)
        assert not nn.KANMammote(32, published=True)(t)[0].isfinite().all()

    def test_the_past_alone_counts(self):
        layer, t = nn.KANMammote(8).eval(), torch.rand(2, 9)
        longer = torch.cat([t, torch.rand(2, 4)], dim=1)
        torch.testing.assert_close(layer(longer)[0][:, :9], layer(t)[0])

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
    def test_any_length(self, shape):
        embedding, weights = nn.KANMammote(8)(torch.rand(shape))
        assert embedding.shape == (*shape, 8)
        assert weights.shape == (*shape, 4)

    @pytest.mark.parametrize("generation", ["A", "B"])
    def test_every_parameter_learns(self, generation):
        layer = nn.KANMammote(8, top=4, generation=generation)
        embedding, weights = layer(torch.rand(4, 20))
        (embedding.square().sum() + weights[..., 0].sum()).backward()
        without = [name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []

    def test_loads_published_checkpoints(self):
        """With the aliases and the unused projection that those have."""
        layer = nn.KANMammote(8, layers=1)
        state = layer.state_dict()
        published = dict(state)
        aliases = {"k_mote.": "ct_mamba_block.kmote_layer.", "faster_kan_layer.": "ct_mamba_block.faster_kan_layer."}
        for name, alias in aliases.items():
            published |= {key.replace(name, alias, 1): v for key, v in state.items() if key.startswith(name)}
        published["ct_mamba_block.continuous_mamba_layers.0.dt_proj.weight"] = torch.zeros(8, 8)
        published["ct_mamba_block.continuous_mamba_layers.0.dt_proj.bias"] = torch.zeros(8)
        before = set(published)
        nn.KANMammote(8, layers=1).load_state_dict(published)
        assert set(published) == before
        assert "ct_mamba_block.continuous_mamba_layers.0.ffn.ffn.3.weight" in state
        assert "ct_mamba_block.continuous_mamba_layers.0.delta_processor.2.bias" in state
        assert "faster_kan_layer.kan_layer.spline_linear.weight" in state
