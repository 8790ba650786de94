"""VisionCore: published sizes and keys, the fused network against the reference, its modulator, configurations."""

import copy

import pytest
import torch
from torch import nn
from visioncore_configurations import CONFIGURATIONS, DEPTHWISE, filled

import evkernels
from evkernels.models import VisionCore
from evkernels.nn.compat.visioncore import ConvGRUModulator
from evkernels.testing import assert_matches, tensor


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
