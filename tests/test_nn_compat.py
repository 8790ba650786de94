"""Layers under nn.compat: published values, re-implementations from the formulas, state dicts, errors."""

import copy
import pickle

import pytest
import torch
from test_nn_recurrent import assert_published, filled, wave
from torch import nn
from torch.nn.functional import conv2d, group_norm

from evkernels.nn import ConvGRUCell, ConvLSTM
from evkernels.nn.compat import eseg, raft, visioncore
from evkernels.testing import assert_matches, tensor

VISIONCORE = {
    "default": (3, 6, {}),
    "no norm": (3, 6, {"use_layer_norm": False}),
    "depthwise": (3, 6, {"use_depthwise": True}),
    "depthwise of two channels": (2, 6, {"use_depthwise": True, "k": 5}),
    "groups": (6, 6, {"use_grouped": True, "num_groups": 2}),
    "residual": (6, 6, {"use_residual": True}),
    "residual of other channels": (3, 6, {"use_residual": True}),
    "zero h0, fast phase": (3, 6, {"learnable_h0": False, "fast_phase": True}),
    "all": (6, 6, {"use_depthwise": True, "use_residual": True, "fast_phase": True, "grad_clip_val": 0.3}),
}


class PlainVisionCore(nn.Module):
    """VisionCore's ConvGRU from its formulas, one convolution of x per frame."""

    def __init__(
        self,
        in_ch,
        hid_ch,
        k=3,
        fast_phase=False,
        use_layer_norm=True,
        use_depthwise=False,
        use_grouped=False,
        num_groups=1,
        learnable_h0=True,
        use_residual=False,
        grad_clip_val=None,
    ):
        super().__init__()

        def convolution(channels, bias):
            if use_depthwise and channels >= 3:
                spatial = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False)
                return nn.Sequential(spatial, nn.Conv2d(channels, 3 * hid_ch, 1, bias=bias))
            groups = min(num_groups, channels) if use_grouped else 1
            return nn.Conv2d(channels, 3 * hid_ch, k, padding=k // 2, bias=bias, groups=groups)

        if learnable_h0:
            self.h0 = nn.Parameter(torch.zeros(1, hid_ch, 1, 1))
        self.cell = nn.Module()
        self.cell.conv_x, self.cell.conv_h = convolution(in_ch, True), convolution(hid_ch, False)
        if use_layer_norm:
            self.cell.layer_norm = nn.GroupNorm(min(32, hid_ch), 3 * hid_ch)
        self.hid_ch, self.fast_phase, self.clip = hid_ch, fast_phase, grad_clip_val
        self.add = use_residual and in_ch == hid_ch

    def forward(self, x):
        shape = (x.shape[0], self.hid_ch, *x.shape[3:])
        h = self.h0.expand(shape) if hasattr(self, "h0") else x.new_zeros(shape)
        for frame in x.unbind(2):
            q = self.cell.conv_h(h)
            if hasattr(self.cell, "layer_norm"):
                norm = self.cell.layer_norm
                q = group_norm(q, norm.num_groups, norm.weight, norm.bias, 1e-5)
            z, r, n = (self.cell.conv_x(frame) + q).chunk(3, 1)
            h = (1 - z.sigmoid()) * h + z.sigmoid() * (n + r.sigmoid() * h).tanh()
            if self.clip is not None and self.training:
                h = h.clamp(-self.clip, self.clip)
        h = h + frame if self.add else h
        return torch.cat([frame, h], 1) if self.fast_phase else h


@pytest.fixture(params=VISIONCORE)
def pair(request):
    """Our layer and the plain one with its state dict, both filled away from their neutral initial values."""
    in_ch, hid_ch, options = VISIONCORE[request.param]
    layer, plain = visioncore.ConvGRU(in_ch, hid_ch, **options), PlainVisionCore(in_ch, hid_ch, **options)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.4)
    layer.load_state_dict(plain.state_dict())
    return layer, plain


class TestVisionCore:
    @pytest.mark.parametrize(
        ("in_ch", "options", "three", "total", "weighted"),
        [
            (3, {}, (-0.567347, -0.752234, 0.287364), -35.681690, -2.307681),
            (3, {"use_layer_norm": False}, (0.903621, 0.656309, -0.128339), 31.686882, -4.744774),
            (3, {"use_depthwise": True}, (-0.316992, -0.631038, 0.580716), -40.881062, 4.673724),
            (3, {"grad_clip_val": 0.3}, (-0.164571, -0.300000, 0.193508), -18.546958, -0.047841),
            (3, {"fast_phase": True}, (0.687444, 0.720804, 0.287364), -21.811120, -6.939200),
            (
                6,
                {"use_residual": True, "use_grouped": True, "num_groups": 2},
                (-0.119510, -1.383442, 1.173302),
                -41.323151,
                1.943961,
            ),
        ],
    )
    def test_published_values(self, in_ch, options, three, total, weighted):
        y = filled(visioncore.ConvGRU(in_ch, 6, **options))(wave(0.23, 2, in_ch, 5, 4, 4))
        assert_published(y, three, total, weighted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_equals_plain_pytorch(self, pair, dtype):
        layer, plain = (module.to(dtype) for module in pair)
        x = tensor(2, layer.cell.in_channels, 5, 4, 6, dtype=dtype)
        exact = copy.deepcopy(plain).double()(x.double())
        for chunk_size in (1, 4, 9):
            assert_matches(layer(x, chunk_size=chunk_size), exact, plain(x))

    def test_gradients_equal_plain_pytorch(self, pair):
        layer, plain = (module.double() for module in pair)
        x = tensor(2, layer.cell.in_channels, 5, 4, 6, dtype=torch.float64).requires_grad_()
        # By name: two modules may keep the same parameters in another order.
        gradients = []
        for module in (layer, plain):
            module(x).square().sum().backward()
            gradients.append({"x": x.grad, **{name: value.grad for name, value in module.named_parameters()}})
            x.grad = None
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)

    def test_clamps_in_training_alone(self):
        layer = visioncore.ConvGRU(3, 6, grad_clip_val=0.1)
        x = 3 * tensor(2, 3, 5, 4, 6)
        assert layer(x).abs().max() <= 0.1
        assert layer.eval()(x).abs().max() > 0.1

    def test_cell_takes_the_convolved_input(self):
        cell = visioncore.ConvGRUCellFast(3, 6)
        twin = ConvGRUCell(3, 6, form="fast")
        twin.load_state_dict(cell.state_dict())
        x, h = tensor(2, 3, 4, 6), tensor(2, 6, 4, 6, seed=1)
        torch.testing.assert_close(cell(cell.conv_x(x), h), twin(x, h))

    def test_reset_gate_matters(self):
        """In an earlier version of the original r was computed and not used."""
        cell = visioncore.ConvGRUCellFast(3, 6)
        x_proj, h = tensor(2, 18, 4, 6).requires_grad_(), tensor(2, 6, 4, 6, seed=1)
        (gradient,) = torch.autograd.grad(cell(x_proj, h).sum(), x_proj)
        assert gradient.chunk(3, 1)[1].abs().min() > 0

    def test_parameter_counts(self):
        for options, count in (({}, 166_528), ({"use_depthwise": True}, 19_936)):
            assert sum(p.numel() for p in visioncore.ConvGRU(32, 64, **options).parameters()) == count
        assert visioncore.ConvGRU(32, 64)(torch.zeros(2, 32, 8, 16, 16)).shape == (2, 64, 16, 16)

    def test_modulator(self):
        cfg = {"feature_dim": 5, "behavior_dim": 3, "hidden_dim": 6, "beh_emb_dim": 4, "grad_clip_val": 1.0}
        layer = visioncore.ConvGRUModulator(cfg).double()
        features, behavior = tensor(2, 5, 3, 4, 6, dtype=torch.float64), tensor(2, 3, dtype=torch.float64)
        embedded = layer.beh_emb(behavior)[:, :, None, None, None].expand(2, 4, 3, 4, 6)
        gru = PlainVisionCore(9, 6, grad_clip_val=1.0).double()
        gru.load_state_dict(layer.gru.state_dict())
        h = gru(torch.cat([features, embedded], 1))
        expected = conv2d(h, layer.output_proj.weight, layer.output_proj.bias)[:, :, None]
        torch.testing.assert_close(layer(features, behavior), expected, rtol=1e-11, atol=1e-11)
        keys = {name.split(".")[0] for name in layer.state_dict()}
        assert keys == {"beh_emb", "gru", "output_proj"}
        small = visioncore.ConvGRUModulator({"feature_dim": 5, "behavior_dim": 3})
        assert (small.beh_emb.out_features, small.gru.hid_ch, small.gru.cell.kernel_size) == (16, 5, 3)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: visioncore.ConvGRU(3, 33), "divisible"),
            (lambda: visioncore.ConvGRU(3, 48), "divisible"),
            (lambda: visioncore.ConvGRU(6, 8, use_grouped=True, num_groups=4), "divisible"),
            (lambda: visioncore.ConvGRU(3, 6, 4), "kernel_size must be odd.*got 4"),
            (lambda: visioncore.ConvGRU(3, 6)(torch.zeros(2, 4, 3, 5, 5)), r"in_ch = 3 .*got \(2, 4, 3, 5, 5\)"),
            (lambda: visioncore.ConvGRU(3, 6)(torch.zeros(2, 3, 0, 5, 5)), "T at least 1"),
            (lambda: visioncore.ConvGRU(3, 6)(torch.zeros(2, 3, 1, 5, 5), 0), "chunk_size must be at least 1, got 0"),
            (
                lambda: visioncore.ConvGRUModulator({"feature_dim": 3, "behavior_dim": 2, "fast_phase": True}),
                "fast_phase must be False",
            ),
        ],
    )
    def test_rejects(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


def plain_raft(h, x, context, weights, padding):
    """One update; `weights` maps z, r, q to a convolution's weight and bias."""
    cz, cr, cq = context or (0, 0, 0)
    hx = torch.cat([h, x], 1)
    z = torch.sigmoid(conv2d(hx, *weights["z"], padding=padding) + cz)
    r = torch.sigmoid(conv2d(hx, *weights["r"], padding=padding) + cr)
    q = torch.tanh(conv2d(torch.cat([r * h, x], 1), *weights["q"], padding=padding) + cq)
    return (1 - z) * h + z * q


def plain_step(layer, h, x, context):
    for suffix in ("1", "2") if isinstance(layer, raft.SepConvGRU) else ("",):
        convolutions = {gate: getattr(layer, f"conv{gate}{suffix}") for gate in "zrq"}
        weights = {gate: (conv.weight, conv.bias) for gate, conv in convolutions.items()}
        h = plain_raft(h, x, context, weights, [side // 2 for side in weights["z"][0].shape[2:]])
    return h


RAFT = {
    "3x3": lambda: raft.ConvGRU(4, 5),
    "5x5": lambda: raft.ConvGRU(4, 5, kernel_size=5),
    "separable": lambda: raft.SepConvGRU(4, 5),
}


@pytest.fixture(params=RAFT)
def layer(request):
    return RAFT[request.param]()


class TestRAFT:
    @pytest.mark.parametrize("with_context", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_equals_plain_pytorch(self, layer, dtype, with_context):
        layer.to(dtype)
        h, x, *context = (tensor(2, c, 5, 7, dtype=dtype, seed=c + k) for k, c in enumerate((4, 5, 4, 4, 4)))
        context = tuple(context) if with_context else None
        wide = tuple(value.double() for value in context) if with_context else None
        exact = plain_step(copy.deepcopy(layer).double(), h.double(), x.double(), wide)
        assert_matches(layer(h, x, context), exact, plain_step(layer, h, x, context))

    def test_gradients(self, layer):
        layer.double()
        values = [tensor(1, c, 3, 4, dtype=torch.float64, seed=c + k) for k, c in enumerate((4, 5, 4, 4, 4))]
        values = [value.requires_grad_() for value in values]
        assert torch.autograd.gradcheck(lambda h, x, *context: layer(h, x, context), values, fast_mode=True)
        gradients = []
        for step in (layer, lambda *arguments: plain_step(layer, *arguments)):
            loss = step(values[0], values[1], values[2:]).square().sum()
            gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)

    def test_stereo_joins_its_inputs(self):
        stereo, layer = raft.StereoConvGRU(4, 5), raft.ConvGRU(4, 5)
        layer.load_state_dict(stereo.state_dict())
        h, x, *context = (tensor(2, c, 5, 7, seed=c + k) for k, c in enumerate((4, 5, 4, 4, 4)))
        torch.testing.assert_close(stereo(h, *context, x[:, :2], x[:, 2:]), layer(h, x, tuple(context)))

    def test_state_dicts(self):
        def shapes(layer):
            return {name: tuple(value.shape) for name, value in layer.state_dict().items() if "weight" in name}

        assert shapes(raft.ConvGRU()) == {f"conv{gate}.weight": (128, 448, 3, 3) for gate in "zrq"}
        across = {f"conv{gate}1.weight": (128, 448, 1, 5) for gate in "zrq"}
        assert shapes(raft.SepConvGRU()) == {**across, **{f"conv{g}2.weight": (128, 448, 5, 1) for g in "zrq"}}
        assert raft.SepConvGRU(4, 5).state_dict().keys() - shapes(raft.SepConvGRU(4, 5)).keys() == {
            f"conv{gate}{k}.bias" for gate in "zrq" for k in (1, 2)
        }

    def test_autocast_keeps_the_state_in_float32(self, layer):
        h, x, *context = (tensor(2, c, 5, 7, seed=c + k) for k, c in enumerate((4, 5, 4, 4, 4)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h_next = layer(h, x, tuple(context))
        assert h_next.dtype == torch.float32
        torch.testing.assert_close(h_next, plain_step(layer, h, x, context), rtol=0.05, atol=0.05)

    def test_rejects_even_kernels(self):
        for layer_type in (raft.ConvGRU, raft.SepConvGRU):
            with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 4"):
                layer_type(4, 5, 4)


class TestEseg:
    def test_published_values(self):
        layer = filled(eseg.ConvLSTM(3, [4, 2], 3, 2))
        assert_published(layer(wave(0.23, 2, 3, 3, 4, 4)), (-0.140110, 0.192910, -0.069396), 4.381209, 1.447323)

    def test_goes_on_where_the_last_call_ended(self):
        layer = eseg.ConvLSTM(3, 4, 3, 2)
        stateless = ConvLSTM(3, 4, 3, 2, batch_first=True, order="ifog")
        stateless.load_state_dict(layer.state_dict())
        x = tensor(2, 5, 3, 4, 6)
        expected, (h, c) = stateless(x)
        torch.testing.assert_close(torch.cat([layer(x[:, :2]), layer(x[:, 2:])], 1), expected)
        torch.testing.assert_close((torch.stack(layer.h), torch.stack(layer.c)), (h, c))
        layer.reset_hidden()
        torch.testing.assert_close(layer(x), expected)

    def test_detach_ends_the_graph(self):
        layer = eseg.ConvLSTM(3, 4, 3, 1)
        layer.detach_hidden()
        x = tensor(2, 2, 3, 4, 6).requires_grad_()
        layer(x[:, :1])
        layer.detach_hidden()
        (gradient,) = torch.autograd.grad(layer(x[:, 1:]).sum(), x)
        assert gradient[:, 0].abs().max() == 0
        assert gradient[:, 1].abs().max() > 0
        layer.detach_hidden()
        copy.deepcopy(layer)

    def test_rejects(self):
        with pytest.raises(ValueError, match="hidden_dims must hold num_layers = 3"):
            eseg.ConvLSTM(3, [4, 2], 3, 3)
        layer = eseg.ConvLSTM(3, 4, 3, 1)
        layer(tensor(2, 1, 3, 4, 6))
        for shape in ((1, 1, 3, 4, 6), (2, 1, 3, 5, 6)):
            with pytest.raises(ValueError, match=r"h must be .*, got \(2, 4, 4, 6\)"):
                layer(tensor(*shape))
        with pytest.raises(ValueError, match=r"x must be \[B, T, C, H, W\]"):
            eseg.ConvLSTM(3, 4, 3, 1)(tensor(2, 3, 4, 6))


def test_deepcopy_and_pickle(layer, pair):
    recurrent = pair[0]
    h, x, sequence = tensor(5, 4, 7, 9), tensor(5, 5, 7, 9), tensor(5, recurrent.cell.in_channels, 2, 7, 9)
    for module, inputs in ((layer, (h, x)), (recurrent, (sequence,))):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(other(*inputs), module(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["raft", "visioncore"])
def test_compiles_to_one_graph(name):
    module = raft.SepConvGRU(4, 3) if name == "raft" else visioncore.ConvGRU(3, 4, grad_clip_val=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, height, width in ((5, 7, 9), (6, 8, 10)):
        inputs = (tensor(n, 4, height, width), tensor(n, 3, height, width))
        inputs = inputs if name == "raft" else (tensor(n, 3, 2, height, width),)
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
