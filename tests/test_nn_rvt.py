"""RVT's and eTraM's recurrent layers: published values, plain PyTorch by the formulas, keys, conversions, options."""

import copy
import pickle

import pytest
import torch
from test_nn_recurrent import assert_published, filled, wave
from torch.nn import functional

from evkernels.nn import ConvLSTMCell, DWSConvLSTM2d, LightweightEnhancedConvLSTM, PlainLSTM2d
from evkernels.nn.compat import etram
from evkernels.testing import assert_matches, tensor

DWS = {
    "depthwise on h": {},
    "1x1": {"dws_conv": False},
    "depthwise on x and h": {"dws_conv_only_hidden": False},
    "5x5": {"dws_conv_kernel_size": 5},
}
LAYERS = {
    **{
        f"dws {name}": lambda dim, options=options, **more: DWSConvLSTM2d(dim, **options, **more)
        for name, options in DWS.items()
    },
    "plain": PlainLSTM2d,
    "plain published": lambda dim, **more: PlainLSTM2d(dim, form="published", **more),
}
STATE = (wave(0.31, 2, 4, 3, 5), wave(0.17, 2, 4, 3, 5))


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def plain_step(layer, x, state):
    """One step in plain PyTorch."""
    h, c = state
    training_dropout = layer.cell_update_dropout if layer.training else 0.0
    if isinstance(layer, PlainLSTM2d):
        gates = layer.input_transform(x) + layer.hidden_transform(h)
        order = "ifgo" if layer.form == "documented" else "ifog"
    else:
        spatial = layer.conv3x3_dws
        xh = torch.cat([x, spatial(h)], 1) if layer.conv_only_hidden else spatial(torch.cat([x, h], 1))
        gates, order = layer.conv1x1(xh), "fiog"
    blocks = dict(zip(order, gates.chunk(4, 1), strict=True))
    g = blocks["g"].tanh()
    if order != "ifgo":
        g = functional.dropout(g, training_dropout)
    c = blocks["f"].sigmoid() * c + blocks["i"].sigmoid() * g
    if order == "ifgo":
        c = functional.dropout(c, training_dropout)
    return blocks["o"].sigmoid() * c.tanh(), c


class TestPublishedValues:
    @pytest.mark.parametrize(
        ("layer", "h_values", "c_values"),
        [
            (
                lambda: DWSConvLSTM2d(4),
                ((-0.212721, -0.405200, 0.062247), -1.907768, 1.395727),
                ((-0.447711, -0.940155, 0.322217), -17.398242, 6.109481),
            ),
            (
                lambda: DWSConvLSTM2d(4, dws_conv=False),
                ((0.021522, -0.176179, 0.152771), -6.460847, 2.317675),
                ((0.038122, -0.334584, 0.443596), -21.867504, 7.211790),
            ),
            (
                lambda: DWSConvLSTM2d(4, dws_conv_only_hidden=False),
                ((-0.182815, -0.317695, 0.032500), 17.089385, -1.295037),
                ((-0.725319, -1.481134, 0.389732), -2.364644, 0.651878),
            ),
            (
                lambda: PlainLSTM2d(4, form="published"),
                ((-0.024503, -0.303437, 0.089965), -7.552068, 1.621202),
                ((-0.045929, -0.631388, 0.248768), -21.300254, 4.284495),
            ),
            (
                lambda: PlainLSTM2d(4),
                ((0.071890, -0.143943, 0.085390), -2.514699, 1.304379),
                ((0.172320, -0.363124, 0.229911), -9.217383, 2.982625),
            ),
            (
                lambda: etram.LightweightEnhancedConvLSTM(4, small_object_threshold=1.0),
                ((-0.151367, -0.378677, 0.068380), -1.121631, 0.227580),
                ((-0.447711, -0.940155, 0.322217), -17.398242, 6.109481),
            ),
        ],
    )
    def test_values(self, layer, h_values, c_values):
        h, c = filled(layer())(wave(0.23, 2, 4, 3, 5), STATE)
        assert_published(h, *h_values)
        assert_published(c, *c_values)

    def test_state_dicts(self):
        def shapes(layer):
            return {name: tuple(value.shape) for name, value in layer.state_dict().items()}

        one = {"conv1x1.weight": (512, 256, 1, 1), "conv1x1.bias": (512,)}
        spatial = {"conv3x3_dws.weight": (128, 1, 3, 3), "conv3x3_dws.bias": (128,)}
        assert shapes(DWSConvLSTM2d(128, dws_conv=False)) == one
        assert shapes(DWSConvLSTM2d(128)) == {**one, **spatial}
        wide = {"conv3x3_dws.weight": (256, 1, 3, 3), "conv3x3_dws.bias": (256,)}
        assert shapes(DWSConvLSTM2d(128, dws_conv_only_hidden=False)) == {**one, **wide}
        assert shapes(PlainLSTM2d(4)) == {
            "input_transform.weight": (16, 4, 1, 1),
            "input_transform.bias": (16,),
            "hidden_transform.weight": (16, 4, 1, 1),
        }
        assert shapes(etram.LightweightEnhancedConvLSTM(128)) == {
            **one,
            **spatial,
            "temporal_attention.0.weight": (6, 256, 1, 1),
            "temporal_attention.2.weight": (1, 6, 1, 1),
            "density_estimator.weight": (1, 128, 1, 1),
            "small_object_enhancer.weight": (6, 128, 1, 1),
            "feature_fusion.weight": (128, 134, 1, 1),
        }

    def test_parameter_counts(self):
        counts = {64: 33_024, 128: 131_584, 256: 525_312}
        assert {dim: PlainLSTM2d(dim).get_parameter_count() for dim in counts} == counts
        assert sum(p.numel() for p in etram.LightweightEnhancedConvLSTM(128).parameters()) == 152_454
        assert sum(p.numel() for p in etram.LightweightEnhancedConvLSTM(128, dws_conv=False).parameters()) == 151_174


class TestFormulas:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_steps_equal_plain_pytorch(self, make, dtype):
        layer = make(6).to(dtype)
        x = tensor(2, 6, 5, 7, dtype=dtype)
        state = tuple(tensor(2, 6, 5, 7, dtype=dtype, seed=k) for k in (1, 2))
        exact = plain_step(copy.deepcopy(layer).double(), x.double(), [value.double() for value in state])
        assert_matches(layer(x, state), exact, plain_step(layer, x, state))

    @pytest.mark.parametrize(
        ("dim", "dtype", "in_one_op"),
        [(128, torch.float32, True), (129, torch.float32, False), (129, torch.bfloat16, True)],
    )
    def test_steps_behind_the_depthwise_convolution_in_one_op(self, dim, dtype, in_one_op):
        layer = DWSConvLSTM2d(dim).to(dtype)
        x, *state = (tensor(2, dim, 3, 5, dtype=dtype, seed=seed) for seed in range(3))
        with torch.no_grad(), torch.profiler.profile() as profile:
            found = layer(x, tuple(state))
        names = {event.name for event in profile.events()}
        assert ("evkernels::conv_lstm_1x1" in names, "evkernels::lstm_gates" in names) == (in_one_op, not in_one_op)
        exact = plain_step(copy.deepcopy(layer).double(), x.double(), [value.double() for value in state])
        assert_matches(found, exact, plain_step(layer, x, state))

    def test_dropout_in_training_alone(self, make):
        layer = make(6, cell_update_dropout=0.4).double()
        x, state = tensor(2, 6, 5, 7, dtype=torch.float64), [tensor(2, 6, 5, 7, dtype=torch.float64, seed=1)] * 2
        results = []
        for step in (layer, lambda *arguments: plain_step(layer, *arguments)):
            torch.manual_seed(2)
            results.append(step(x, state))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        layer.eval()
        evaluated = plain_step(layer, x, state)
        torch.testing.assert_close(layer(x, state), evaluated, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(evaluated[0], results[0][0])

    def test_sequence_reset_and_gradients(self, make):
        layer = make(3).double()
        x = tensor(3, 2, 3, 4, 5, dtype=torch.float64).requires_grad_()
        reset = torch.tensor([[False, False], [False, True], [False, False]])
        output, state = layer.forward_sequence(x, None, reset)
        expected = []
        for n, begins in ((0, [0]), (1, [0, 1])):
            h = c = torch.zeros(1, 3, 4, 5, dtype=torch.float64)
            for time in range(3):
                if time in begins:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                h, c = plain_step(layer, x[time, n : n + 1], (h, c))
                expected.append(h)
            torch.testing.assert_close((state[0][n], state[1][n]), (h[0], c[0]))
        expected = torch.cat(expected).unflatten(0, (2, 3)).transpose(0, 1)
        torch.testing.assert_close(output, expected)
        values = [x, *layer.parameters()]
        gradients = [torch.autograd.grad(part.square().sum(), values) for part in (output, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)

    def test_gradcheck(self, make):
        layer = make(2).double()
        x = tensor(1, 2, 3, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda value: layer(value, layer(value)), x, fast_mode=True)

    def test_autocast(self, make):
        layer = make(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h, c = layer(tensor(2, 4, 5, 7))
            h, c = layer(tensor(2, 4, 5, 7), (h, c))
        assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
        h.float().sum().backward()

    def test_plain_and_dws_convert_into_each_other(self):
        """Row order is all in which they differ: [W_x | W_h] with rows i, f, o, g to f, i, o, g."""
        plain = PlainLSTM2d(4, form="published")
        i, f, o, g = torch.cat([plain.input_transform.weight, plain.hidden_transform.weight], 1).chunk(4)
        b_i, b_f, b_o, b_g = plain.input_transform.bias.chunk(4)
        dws = DWSConvLSTM2d(4, dws_conv=False)
        dws.load_state_dict(
            {"conv1x1.weight": torch.cat([f, i, o, g]), "conv1x1.bias": torch.cat([b_f, b_i, b_o, b_g])}
        )
        x, state = tensor(2, 4, 3, 5), (tensor(2, 4, 3, 5, seed=1), tensor(2, 4, 3, 5, seed=2))
        torch.testing.assert_close(dws(x, state), plain(x, state))
        torch.testing.assert_close(ConvLSTMCell.from_rvt(dws.state_dict())(x, state), plain(x, state))

    def test_plain_is_initialised_as_published(self):
        layer = PlainLSTM2d(8)
        weight = layer.hidden_transform.weight[:, :, 0, 0]
        torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0, atol=1e-5)
        assert layer.input_transform.bias.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
        assert layer.input_transform.weight.abs().max() <= (6 / 40) ** 0.5


class TestEnhanced:
    @staticmethod
    def plain(layer, x, state):
        """In plain PyTorch; `state` is [(h, c), ...] from the first layer to the last."""
        states = []
        for k, (h, c) in enumerate(state):
            h, c = plain_step(layer.cells[k], x, (h, c))
            if layer.use_attention:
                h = h * 2 * layer.attention[k](torch.cat([x, h], 1)).sigmoid()
            x = h + x if layer.use_residual else h
            states.append((x, c))
        return states

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_layers": 3, "kernel_size": 5},
            {"use_attention": False},
            {"use_residual": False, "num_layers": 2},
        ],
    )
    def test_equals_plain_pytorch(self, options):
        layer = filled(LightweightEnhancedConvLSTM(6, **options))
        x = tensor(3, 2, 6, 5, 7, dtype=torch.float64)
        state, plain_state = None, [(torch.zeros_like(x[0]),) * 2] * layer.num_layers
        for frame in x:
            state = layer(frame, state)
            plain_state = self.plain(layer, frame, plain_state)
        expected = [value for pair in (plain_state[-1], *plain_state[:-1]) for value in pair]
        torch.testing.assert_close(list(state), expected, rtol=1e-11, atol=1e-11)
        gradients = [torch.autograd.grad(h.sum(), list(layer.parameters())) for h in (state[0], expected[0])]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
        assert all(gradient.abs().max() > 0 for gradient in gradients[0])

    def test_new_layer_without_residual_is_dws_conv_lstm(self):
        layer = LightweightEnhancedConvLSTM(6, use_residual=False)
        x, state = tensor(2, 6, 5, 7), (tensor(2, 6, 5, 7, seed=1), tensor(2, 6, 5, 7, seed=2))
        torch.testing.assert_close(layer(x, state), layer.cells[0](x, state))

    def test_rejects(self):
        with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
            LightweightEnhancedConvLSTM(4, num_layers=0)
        with pytest.raises(ValueError, match=r"2 \* num_layers = 4 tensors, got 2"):
            LightweightEnhancedConvLSTM(4, num_layers=2)(torch.zeros(1, 4, 3, 3), (None, None))

    def test_published_class_at_its_traits(self):
        """No enhancement in the first step; at features of mean zero none ever, and no gradient."""
        layer = etram.LightweightEnhancedConvLSTM(4)
        parent = DWSConvLSTM2d(4)
        parent.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("conv")})
        x = tensor(2, 4, 3, 5)
        torch.testing.assert_close(layer(x), parent(x))
        state = parent(x)
        assert layer.density_estimator(x).sigmoid().mean() > 0.3
        h, c = layer(x, state)
        torch.testing.assert_close((h, c), parent(x, state))
        h.sum().backward()
        assert layer.feature_fusion.weight.grad.abs().max() == 0
        assert layer.density_estimator.weight.grad is None
        layer.small_object_threshold = 1.0
        assert not torch.allclose(layer(x, state)[0], h)
        with pytest.raises(NotImplementedError, match="step by step"):
            layer.forward_sequence(x[None])


class TestModules:
    def test_state_dict_deepcopy_and_pickle(self, make):
        layer, fresh = make(4), make(4)
        x = tensor(2, 4, 5, 7)
        fresh.load_state_dict(layer.state_dict())
        for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "layer", [lambda: DWSConvLSTM2d(3), lambda: PlainLSTM2d(3), lambda: LightweightEnhancedConvLSTM(3)]
    )
    def test_compiles_to_one_graph(self, layer):
        layer = layer()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((5, 7, 8), (6, 4, 9)):
            x = tensor(size[0], 3, *size[1:])
            torch.testing.assert_close(compiled(x, compiled(x)), layer(x, layer(x)))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: DWSConvLSTM2d(4, dws_conv=1), TypeError, "dws_conv must be a bool, got int"),
            (lambda: DWSConvLSTM2d(4, dws_conv_only_hidden=None), TypeError, "dws_conv_only_hidden must be a bool"),
            (lambda: DWSConvLSTM2d(4, dws_conv_kernel_size=4), ValueError, "kernel_size must be odd.*got 4"),
            (lambda: DWSConvLSTM2d(4)(torch.zeros(1, 3, 4, 4)), ValueError, "C = in_channels = 4"),
            (lambda: PlainLSTM2d(4, form="seed"), ValueError, "form must be one of 'documented', 'published'"),
            (lambda: PlainLSTM2d(4, 1.5), ValueError, r"cell_update_dropout must be in \[0, 1\], got 1.5"),
            (
                lambda: PlainLSTM2d(4)(torch.zeros(1, 4, 3, 3), (torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 2))),
                ValueError,
                r"c must be .* = \(1, 4, 3, 3\), got \(1, 4, 3, 2\)",
            ),
        ],
    )
    def test_rejects(self, call, error, message):
        with pytest.raises(error, match=message):
            call()
