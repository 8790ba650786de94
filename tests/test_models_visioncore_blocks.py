"""VisionCore's blocks: formulas, borders, initialisation, weight norm, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from visioncore_configurations import DEPTHWISE, STAGE, filled

from evkernels.models.visioncore import ConvBlock, LearnableTemporalConv, ResBlock, ResNet


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
