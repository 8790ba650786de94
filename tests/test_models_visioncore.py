"""VisionCore's blocks and network: formulas, keys, initialisation, configurations, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evkernels
from evkernels.models import VisionCore
from evkernels.models.visioncore import ConvBlock, LearnableTemporalConv, ResBlock, ResNet
from evkernels.nn.compat.visioncore import ConvGRUModulator
from evkernels.testing import assert_matches, tensor

STAGE = {"kernel_size": [3, 5, 5], "padding": [1, 3, 3]}
DEPTHWISE = {"conv_params": {"type": "depthwise", **STAGE}, "norm_type": "rms", "act_type": "silu"}


def configuration(kind="depthwise", weight_norm=False, **gru):
    """The published configurations: what of them says something about the network."""
    rms = {"norm_type": "rms", "norm_params": {"affine": True}, "act_type": "silu"}
    blocks = [
        {"conv_params": {"type": kind, **STAGE, "stride": 2}, "use_weight_norm": weight_norm, "pool_params": None},
        {
            "conv_params": {"type": kind, **STAGE, "stride": 1},
            "dropout": 0.1,
            "pool_params": {"type": "aablur", "stride": 2, "r": 8, "use_soft": True},
        },
        {
            "conv_params": {"type": kind, "kernel_size": [3, 3, 3], "padding": [2, 2, 2], "dilation": 2, "stride": 1},
            "dropout": 0.2,
            "pool_params": {"type": "aablur", "stride": 2, "r": 16, "use_soft": True},
        },
    ]
    network = {"final_activation": "none", "channels": [64, 128, 256], "dim": 3, "checkpointing": False}
    modulator = {"behavior_dim": 42, "feature_dim": 256, "hidden_dim": 256, "beh_emb_dim": 32, "kernel_size": 3, **gru}
    filters = {"kernel_size": 16, "num_channels": 4, "init_type": "gaussian_derivatives", "anti_aliasing": False}
    return {
        "model_type": "v1multi",
        "sampling_rate": 240,
        "initial_input_channels": 1,
        "adapter": {"type": "adapter", "params": {"grid_size": 51, "init_sigma": 1, "transform": "scale"}},
        "frontend": {"type": "learnable_temporal", "params": {**filters, "causal": True, "bias": False}},
        "convnet": {"type": "resnet", "params": {**network, "block_configs": [{**rms, **block} for block in blocks]}},
        "modulator": {"type": "convgru", "params": modulator},
        "recurrent": {"type": "none", "params": {}},
        "readout": {"type": "gaussian", "params": {"n_units": 8}},
        "output_activation": "none",
        "regularization": [{"name": "readout_sparsity", "type": "l1", "lambda": 1e-7}],
    }


GRU = {
    "use_layer_norm": True,
    "learnable_h0": True,
    "use_depthwise": False,
    "use_grouped": False,
    "num_groups": 1,
    "use_residual": False,
    "grad_clip_val": None,
}
CONFIGURATIONS = {
    "learned_res_optimized_gru": configuration(),
    "learned_res_optimized_standard_gru": configuration("standard", weight_norm=True),
    "learned_res_optimized_gru_v2": configuration(**GRU),
}


def filled(module):
    """Away from initial values that hide what they multiply."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand(parameter.shape, dtype=parameter.dtype), alpha=0.3)
    return module


def plain_convolution(x, conv, border, **options):
    return F.conv3d(F.pad(x, border, mode="replicate"), conv.weight, conv.bias, **options)


class TestConvBlock:
    @pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("stride", [1, 2, [1, 2, 2]], ids=str)
    def test_causal_depthwise(self, stride, training):
        conv = {**DEPTHWISE["conv_params"], "stride": stride}
        block = filled(ConvBlock(3, 4, 6, conv, "rms", act_type="silu").double())
        x = torch.randn(2, 4, 5, 9, 8, dtype=torch.float64, requires_grad=training)
        parts = block.components
        y = plain_convolution(x, parts["conv"].depthwise, (3, 3, 3, 3, 2, 0), stride=_tuple(stride), groups=4)
        y = parts["norm"](F.conv3d(y, parts["conv"].pointwise.weight))
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(block(x), y * y.sigmoid(), rtol=1e-10, atol=1e-12)

    def test_causal_standard_with_dilation(self):
        conv = {"kernel_size": [2, 3, 1], "padding": 2, "dilation": [3, 2, 1]}
        block = ConvBlock(3, 2, 3, conv, None, act_type="gelu").double()
        x = torch.randn(1, 2, 4, 6, 5, dtype=torch.float64)
        # Nothing is added across a kernel of size 1; without a norm there is a bias.
        y = plain_convolution(x, block.components["conv"].conv, (0, 0, 2, 2, 3, 0), dilation=(3, 2, 1))
        torch.testing.assert_close(block(x), F.gelu(y))
        assert block.components["conv"].conv.bias is not None

    @pytest.mark.parametrize("kind", ["standard", "depthwise"])
    def test_no_frame_sees_a_later_one(self, kind):
        block, x = ConvBlock(3, 2, 3, {"type": kind, **STAGE}, "rms"), torch.randn(1, 2, 6, 8, 8)
        later = x.clone()
        later[:, :, 3:] += 1
        assert torch.equal(block(x)[:, :, :3], block(later)[:, :, :3])
        assert not torch.equal(block(x)[:, :, 3:], block(later)[:, :, 3:])

    @pytest.mark.parametrize("kind", ["standard", "depthwise"])
    @pytest.mark.parametrize("dim", [2, 3])
    def test_without_causality(self, dim, kind):
        conv = {"type": kind, "kernel_size": 3, "padding": 1, "stride": 2, "dilation": 1}
        block = ConvBlock(dim, 3, 4, conv, "batch", causal=False).double().eval()
        x = torch.randn(2, 3, *[7, 6, 5][:dim], dtype=torch.float64)
        inner, function = block.components["conv"], (F.conv2d if dim == 2 else F.conv3d)
        padded = F.pad(x, (1,) * 2 * dim, mode="replicate")
        if kind == "standard":
            y = function(padded, inner.conv.weight, stride=2)
        else:
            y = function(function(padded, inner.depthwise.weight, stride=2, groups=3), inner.pointwise.weight)
        torch.testing.assert_close(block(x), (y / (1 + 1e-5) ** 0.5).relu())

    def test_order_pool_dropout_and_channels_of_splitrelu(self):
        conv = {"kernel_size": 1}
        pool = {"type": "max", "kernel_size": 2}
        order = ("act", "conv", "pool", "dropout")
        block = ConvBlock(2, 3, 4, conv, "none", act_type="splitrelu", pool_params=pool, dropout=0.5)
        assert block.output_channels == 8
        x = torch.randn(1, 3, 4, 4)
        y = F.conv2d(x, block.components["conv"].conv.weight, block.components["conv"].conv.bias)
        y = F.max_pool2d(torch.cat([y.relu(), (-y).relu()], 1), 2)
        torch.testing.assert_close(block.eval()(x), y)
        block = ConvBlock(2, 3, 4, conv, None, act_type="relu", pool_params=pool, dropout=0.5, order=order)
        dropped = block.train()(x)
        assert (dropped == 0).any()
        torch.testing.assert_close(block.eval()(x), F.max_pool2d(block.components["conv"](x.relu()), 2))

    @pytest.mark.parametrize("name", ["leakyrelu", "gelu", "mish", "swish", "bsoftplus", None])
    @pytest.mark.parametrize("norm", ["instance", "group", "rms", None])
    def test_norms_and_activations(self, norm, name):
        block, x = (
            ConvBlock(2, 2, 4, {"kernel_size": 1}, norm, act_type=name).double(),
            torch.randn(2, 2, 3, 5).double(),
        )
        y = block.components["conv"](x)
        if norm in ("instance", "group"):
            y = F.group_norm(y, 4 if norm == "instance" else 1, eps=1e-5)
        elif norm == "rms":
            y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()
        functions = {"leakyrelu": F.leaky_relu, "gelu": F.gelu, "mish": F.mish, "swish": F.silu, None: lambda y: y}
        expected = F.softplus(5 * y) / 5 if name == "bsoftplus" else functions[name](y)
        torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize("kind", ["standard", "depthwise"])
    def test_weight_norm(self, kind):
        block = ConvBlock(3, 2, 3, {"type": kind, **STAGE}, "rms", use_weight_norm=True).double()
        convolutions = [module for module in block.modules() if isinstance(module, nn.Conv3d)]
        assert len(convolutions) == (1 if kind == "standard" else 2)
        x = torch.randn(1, 2, 3, 6, 6, dtype=torch.float64)
        before = block(x)
        for module in convolutions:
            g, v = module.parametrizations.weight.parameters()
            norm = v.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            torch.testing.assert_close(module.weight, g * v / norm)
            torch.testing.assert_close(g, norm)
            with torch.no_grad():
                v *= 3
        # The length of v has no effect, that of g has.
        torch.testing.assert_close(block(x), before)
        block(x).square().sum().backward()
        for module in convolutions:
            g, v = module.parametrizations.weight.parameters()
            assert g.grad.abs().sum() > 0
            torch.testing.assert_close((v.grad * v).flatten(1).sum(1), torch.zeros(len(v), dtype=v.dtype))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"conv_params": {"kernel_size": 3, "type": "grouped"}},
                "conv_params.type must be one of 'standard', 'depth",
            ),
            ({"norm_type": "layer"}, "norm_type must be one of None, 'batch', 'instance', 'group', 'rms', got 'layer'"),
            ({"act_type": "step"}, "act_type must be one of .* got 'step'"),
            ({"pool_params": {"type": "median"}}, "pool_params.type must be one of .* got 'median'"),
            ({"pool_params": {"type": "aablur"}, "dim": 2}, "'aablur' needs dim = 3"),
            ({"dim": 1}, "dim must be 2 or 3, got 1"),
        ],
    )
    def test_rejects(self, options, message):
        with pytest.raises(ValueError, match=message):
            ConvBlock(**{"dim": 3, "in_channels": 2, "out_channels": 2, "conv_params": {"kernel_size": 3}, **options})


class TestResBlock:
    def test_crops_to_last_frames_and_to_the_middle(self):
        class Main(nn.Module):
            output_channels = 3

            def forward(self, x):
                return x[:, :, 1:, 2:9, 1:4]

        x = torch.randn(2, 3, 4, 9, 8)
        expected = x[:, :, 1:, 2:9, 1:4] + x[:, :, 1:, 1:8, 2:5]
        torch.testing.assert_close(ResBlock(Main(), nn.Identity())(x), expected)
        torch.testing.assert_close(ResBlock(Main(), nn.Identity(), nn.ReLU())(x), expected.relu())

    @pytest.mark.parametrize("channels", [1, 5])
    def test_missing_channels_are_zero(self, channels):
        x = torch.randn(2, channels, 4, 4)
        block = ResBlock(nn.Conv2d(channels, 3, 1), nn.Identity())
        y = block.main_block(x)
        y[:, :channels] += x[:, :3]
        torch.testing.assert_close(block(x), y)


class TestResNet:
    def test_starts_as_its_shortcuts_and_learns_from_there(self):
        """Also behind weight norm and with norms whose scale is called weight; a ReLU would stay at zero."""
        block = {"conv_params": STAGE, "act_type": "silu"}
        for norm in ("rms", "batch", "group"):
            for weight_norm in (False, True):
                config = {**block, "norm_type": norm, "use_weight_norm": weight_norm}
                network = ResNet({"dim": 3, "initial_channels": 4, "channels": [4, 6, 6], "block_config": config})
                x = torch.randn(2, 4, 3, 8, 8)
                y = network(x)
                torch.testing.assert_close(y, network.layers[1].shortcut(x), rtol=0, atol=0)
                (y * torch.randn_like(y)).sum().backward()
                for layer in network.layers:
                    scale = next(layer.main_block.components["norm"].parameters())
                    assert not scale.any()
                    assert scale.grad.all()

    def test_relu_does_not_start_at_zero(self):
        config = {"conv_params": STAGE, "norm_type": "rms", "act_type": "relu"}
        network = ResNet({"dim": 3, "initial_channels": 4, "channels": [4], "block_config": config})
        assert (network.layers[0].main_block.components["norm"].gamma == 1).all()

    @pytest.mark.parametrize("weight_norm", [False, True])
    def test_convolutions_have_hes_deviation(self, weight_norm):
        torch.manual_seed(0)
        block = {
            "conv_params": {"kernel_size": 3},
            "norm_type": "rms",
            "act_type": "silu",
            "use_weight_norm": weight_norm,
        }
        network = ResNet({"dim": 3, "initial_channels": 32, "channels": [32, 16], "block_config": block})
        for layer, rows in zip(network.layers, (32, 16), strict=True):
            deviation = (2 / (1 + 0.01**2) / (rows * 27)) ** 0.5
            assert layer.main_block.components["conv"].conv.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert isinstance(network.layers[0].shortcut, nn.Identity)
        assert network.layers[1].shortcut[0].weight.std().item() == pytest.approx((2 / 1.0001 / 16) ** 0.5, rel=0.1)

    def test_checkpointing_changes_nothing(self):
        config = {"dim": 3, "initial_channels": 2, "channels": [4, 4], "block_config": DEPTHWISE}
        network = filled(ResNet(config))
        again = ResNet({**config, "checkpointing": True})
        again.load_state_dict(network.state_dict())
        x = torch.randn(1, 2, 3, 8, 8)
        for model in (network, again):
            model(x).square().sum().backward()
        for a, b in zip(network.parameters(), again.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)

    def test_stem_shortcut_norm_and_activations(self):
        network = ResNet(
            {
                "dim": 2,
                "initial_channels": 1,
                "channels": [4],
                "stem_config": {
                    "out_channels": 2,
                    "conv_params": {"kernel_size": 3, "padding": 1},
                    "act_type": "splitrelu",
                },
                "block_config": {"conv_params": {"kernel_size": 3, "padding": 1, "stride": [2, 1]}, "act_type": "silu"},
                "resnet_shortcut_norm_type": "batch",
                "resnet_post_add_activation": "relu",
                "final_activation": "silu",
            }
        ).eval()
        x = torch.randn(2, 1, 6, 6)
        stem, layer = network.layers
        y = stem(x)
        assert y.shape == (2, 4, 6, 6)
        assert layer.shortcut[0].stride == (2, 1)
        torch.testing.assert_close(network(x), F.silu((layer.main_block(y) + layer.shortcut(y)).relu()))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"widths": 3}, "unknown keys widths; known are"),
            ({"channels": None}, "must have the key channels"),
            ({"block_configs": [DEPTHWISE]}, "one of the keys block_config and block_configs"),
            ({"block_config": None, "block_configs": [DEPTHWISE]}, "as many block_configs as channels, got 1 and 2"),
        ],
    )
    def test_rejects(self, config, message):
        given = {"dim": 3, "initial_channels": 2, "channels": [4, 4], "block_config": DEPTHWISE, **config}
        with pytest.raises(ValueError, match=message):
            ResNet({key: value for key, value in given.items() if value is not None})


class TestVisionCore:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("learned_res_optimized_gru", 3_934_508),
            ("learned_res_optimized_standard_gru", 5_403_136),
            ("learned_res_optimized_gru_v2", 3_934_508),
        ],
    )
    def test_published_configurations(self, name, count, tmp_path):
        omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
        omegaconf.OmegaConf.save(CONFIGURATIONS[name], tmp_path / "model.yaml")
        # Shapes alone: the orthogonal weights of the GRU take seconds.
        with torch.device("meta"):
            model = VisionCore.from_config(tmp_path / "model.yaml").eval()
        y = model.to_empty(device="cpu")(torch.randn(1, 1, 20, 51, 51), torch.randn(1, 42))
        assert y.shape == (1, 256, 1, 6, 6)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        state = model.state_dict()
        conv = "convnet.layers.0.main_block.components.conv"
        expected = {
            "frontend.temporal_conv.conv.weight": (4, 1, 16, 1, 1),
            "convnet.layers.1.main_block.components.norm.gamma": (128,),
            "convnet.layers.1.main_block.components.pool.blur": (1, 1, 3, 3),
            "convnet.layers.2.main_block.components.pool.se.1.weight": (16, 256, 1, 1, 1),
            "convnet.layers.2.shortcut.0.weight": (256, 128, 1, 1, 1),
            "modulator.beh_emb.weight": (32, 42),
            "modulator.gru.h0": (1, 256, 1, 1),
            "modulator.gru.cell.conv_x.weight": (768, 288, 3, 3),
            "modulator.output_proj.weight": (256, 256, 1, 1),
        }
        if "standard" in name:
            expected |= {f"{conv}.conv.parametrizations.weight.original0": (64, 1, 1, 1, 1)}
            expected |= {f"{conv}.conv.parametrizations.weight.original1": (64, 4, 3, 5, 5)}
        else:
            expected |= {f"{conv}.depthwise.weight": (4, 1, 3, 5, 5), f"{conv}.pointwise.weight": (64, 4, 1, 1, 1)}
        for key, shape in expected.items():
            assert state[key].shape == shape, key

    @pytest.mark.parametrize("winograd", [False, True])
    @pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
    def test_fused_matches_reference(self, training, winograd):
        torch.manual_seed(1)
        config = copy.deepcopy(CONFIGURATIONS["learned_res_optimized_gru_v2"])
        config["convnet"]["params"]["channels"] = [8, 16, 16]
        config["modulator"]["params"] |= {"feature_dim": 16, "hidden_dim": 16, "winograd": winograd}
        model = filled(VisionCore.from_config(config)).train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x, behavior = torch.randn(2, 1, 22, 25, 25), torch.randn(2, 42)

        def run(network, dtype):
            with torch.set_grad_enabled(training):
                y = network.to(dtype)(x.to(dtype), behavior.to(dtype))
            weights = [network.frontend.temporal_conv.conv.weight, network.modulator.gru.cell.conv_h.weight]
            gradients = torch.autograd.grad(y.square().sum(), weights) if training else []
            return [y.detach(), *gradients]

        actual = run(copy.deepcopy(model), torch.float32)
        with evkernels.use_backend("reference"):
            eager = run(copy.deepcopy(model), torch.float32)
            exact = run(copy.deepcopy(model), torch.float64)
        for index, values in enumerate(zip(actual, exact, eager, strict=True)):
            assert_matches(*values, what=f"result {index}", times=4 if winograd else 2)

    def test_without_frontend_and_modulator(self):
        blocks = {"dim": 3, "channels": [4], "block_config": DEPTHWISE}
        model, x = VisionCore(blocks, initial_input_channels=2), torch.randn(1, 2, 3, 8, 8)
        assert torch.equal(model(x), model.convnet(x))
        sections = {"convnet": {"type": "resnet", "params": blocks}, "frontend": {"type": "none"}}
        assert VisionCore.from_config(sections).modulator is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"recurrent": {"type": "lstm"}}, "section recurrent must be {'type': 'none'}"),
            ({"output_activation": "softplus"}, "section output_activation must be 'none', got 'softplus'"),
            ({"convnet": {"type": "vivit"}}, "convnet.type must be one of 'resnet', 'none', got 'vivit'"),
            ({"convnet": {"type": "none"}}, "section convnet must be there"),
            ({"loss": "poisson"}, "section loss is not known, got 'poisson'"),
            ({"initial_input_channels": 3}, "initial_input_channels must be 1 for a frontend, got 3"),
            (
                {"modulator": {"type": "convgru", "params": {"feature_dim": 8, "behavior_dim": 1}}},
                "convnet's 256 channels",
            ),
        ],
    )
    def test_rejects_configurations(self, change, message):
        with pytest.raises(ValueError, match=message):
            VisionCore.from_config({**CONFIGURATIONS["learned_res_optimized_gru"], **change})

    def test_needs_behavior(self):
        model = VisionCore(
            {"dim": 3, "channels": [4], "block_config": DEPTHWISE}, {"feature_dim": 4, "behavior_dim": 2}
        )
        with pytest.raises(ValueError, match=r"behavior must be given, \[N, behavior_dim\]"):
            model(torch.randn(1, 1, 3, 8, 8))


class TestModulator:
    @pytest.mark.parametrize("size", [(1, 5), (2, 2), (3, 3), (6, 7)], ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kernel_size": 5},
            {"learnable_h0": False},
            {"use_depthwise": True},
            {"use_grouped": True, "num_groups": 2},
        ],
        ids=str,
    )
    def test_what_is_the_same_everywhere_is_convolved_once(self, options, size):
        """As with the behaviour beside the features of each pixel and frame, and a state at each pixel."""
        config = {"feature_dim": 4, "hidden_dim": 6, "behavior_dim": 3, "beh_emb_dim": 2, **options}
        module = filled(ConvGRUModulator(config)).double()
        features = torch.randn(2, 4, 6, *size, dtype=torch.float64, requires_grad=True)
        behavior = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        embedded = module.beh_emb(behavior)[:, :, None, None, None].expand(-1, -1, *features.shape[2:])
        cell, h = module.gru.cell, torch.zeros(2, 6, *size, dtype=torch.float64)
        h = h if module.gru.h0 is None else module.gru.h0.expand_as(h)
        for frame in torch.cat([features, embedded], dim=1).unbind(2):
            h = cell(cell.conv_x(frame), h)
        y = module.output_proj(h)[:, :, None]
        torch.testing.assert_close(module(features, behavior), y)
        variables = (features, behavior, *module.parameters())
        gradients = [torch.autograd.grad(value.square().sum(), variables) for value in (module(features, behavior), y)]
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain)

    @pytest.mark.parametrize("options", [{}, {"use_depthwise": True}], ids=str)
    def test_a_hundred_frames_keep_to_the_reference(self, options):
        config = {"feature_dim": 4, "hidden_dim": 6, "behavior_dim": 3, "beh_emb_dim": 2, **options}
        module = filled(ConvGRUModulator(config))
        features, behavior = tensor(2, 4, 100, 6, 7), tensor(2, 3, seed=1)
        with torch.no_grad():
            actual = module(features, behavior)
            with evkernels.use_backend("reference"):
                eager, exact = module(features, behavior), module.double()(features.double(), behavior.double())
        assert_matches(actual, exact, eager)

    def test_rejects_other_channels(self):
        module = ConvGRUModulator({"feature_dim": 4, "behavior_dim": 3})
        with pytest.raises(ValueError, match=r"features must be \[B, C, T, H, W\] with C = feature_dim = 4"):
            module(torch.zeros(1, 5, 2, 3, 3), torch.zeros(1, 3))


class TestLearnableTemporalConv:
    def test_filters(self):
        layer = LearnableTemporalConv(5, 4)
        filters = layer.temporal_conv.conv.weight.flatten(1)
        torch.testing.assert_close(filters.norm(dim=1), torch.ones(4))
        t = torch.arange(5) - 2.0
        gaussian = torch.exp(-0.5 * (t / (5 / 6)) ** 2)
        torch.testing.assert_close(filters[0], gaussian / gaussian.norm())
        # Even, odd, even.
        for row, sign in zip(filters[:3], (1, -1, 1), strict=True):
            torch.testing.assert_close(row, sign * row.flip(0))
        assert (LearnableTemporalConv(3, 2, "identity").temporal_conv.conv.weight.flatten(1) == torch.eye(2, 3)).all()
        assert LearnableTemporalConv(3, 2, "random", bias=True).temporal_conv.conv.bias is not None

    def test_output_and_rejects(self):
        layer, x = LearnableTemporalConv(3, 2, "identity"), torch.randn(2, 1, 5, 3, 4)
        torch.testing.assert_close(layer(x), torch.cat([x[:, :, :3], x[:, :, 1:4]], dim=1))
        for wrong in (x[:, :, :2], x[0], x.expand(-1, 2, -1, -1, -1)):
            with pytest.raises(ValueError, match=r"x must be \[N, 1, T, H, W\] with T at least kernel_size = 3, got"):
                layer(wrong)
        with pytest.raises(ValueError, match="anti_aliasing must be one of False, got True"):
            LearnableTemporalConv(anti_aliasing=True)


def _tuple(stride):
    return stride if isinstance(stride, int) else tuple(stride)
