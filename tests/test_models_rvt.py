"""RVT: published sizes, keys and values; sequences equal steps; configurations, checkpoints, losses."""

import copy

import pytest
import torch
import torch.nn.functional as F

import evkernels
from evkernels.models.rvt import MaxViTRNN, RVTDetector, partition_size_of
from evkernels.models.rvt.attention import DropPath, PartitionAttentionCl
from evkernels.nn import DWSConvLSTM2d, LightweightEnhancedConvLSTM, PlainLSTM2d
from evkernels.testing import assert_matches, tensor

SMALL = {"embed_dim": 8, "attention": {"dim_head": 4}, "input_channels": 4}


def detector(**others) -> RVTDetector:
    """Maps of 2 x 2 partitions at stride 32, widths of 8 to 64, layer scales that matter."""
    torch.manual_seed(0)
    model = RVTDetector(3, 60, 100, **(SMALL | others))
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.2, 1)
    return model.eval()


def frames(*size: int, dtype=torch.float32) -> torch.Tensor:
    return tensor(*size, 4, 60, 100, dtype=dtype, seed=1)


@pytest.mark.parametrize(
    ("size", "parameters"), [("base", 18_536_856), ("small", 9_870_456), ("tiny", 4_405_336)], ids=str
)
def test_published_size(size, parameters):
    with torch.device("meta"):
        model = RVTDetector.published(size, num_classes=3, height=360, width=640)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.padded_size == (384, 640)
    assert model.backbone.partition_size == (6, 10)


def test_published_keys():
    keys = set(detector().state_dict())
    assert {
        "backbone.stages.0.downsample_cf2cl.conv.weight",
        "backbone.stages.0.downsample_cf2cl.norm.bias",
        "backbone.stages.3.att_blocks.0.att_window.self_attn.qkv.weight",
        "backbone.stages.1.att_blocks.0.att_grid.norm1.weight",
        "backbone.stages.1.att_blocks.0.att_grid.mlp.net.0.0.bias",
        "backbone.stages.1.att_blocks.0.att_grid.mlp.net.2.weight",
        "backbone.stages.2.att_blocks.0.att_window.ls2.gamma",
        "backbone.stages.2.lstm.conv1x1.weight",
        "fpn.lateral_conv0.conv.weight",
        "fpn.C3_p4.m.1.conv2.bn.running_var",
        "fpn.bu_conv1.bn.weight",
        "yolox_head.stems.2.conv.weight",
        "yolox_head.cls_convs.0.1.bn.weight",
        "yolox_head.reg_preds.1.bias",
        "yolox_head.obj_preds.2.weight",
    } <= keys
    assert not any("att_window.norm1" in key or "mask_token" in key or "conv3x3_dws" in key for key in keys)


@pytest.mark.parametrize("training", [False, True])
def test_attention_without_gradients_gives_the_same(training):
    """Its MLP is another op then, unless something is dropped."""
    layer = PartitionAttentionCl(24, "grid", (2, 3), dim_head=8, ls_init_value=0.7, drop_path=1e-9).train(training)
    x = tensor(2, 4, 9, 24)
    expected = layer(x).detach()
    with torch.no_grad():
        actual = layer(x)
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    assert layer._mlp_in_one_op(x) is False
    with torch.no_grad():
        assert layer._mlp_in_one_op(x) is not training
    assert_matches(actual, exact, expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("window", (1.993072, 2.307725, 0.065794, 129.813503, 2.899317)),
        ("grid", (1.989604, 2.308099, 0.065574, 129.841125, 2.918616)),
    ],
    ids=["window", "grid"],
)
def test_attention_gives_the_published_values(kind, expected):
    layer = PartitionAttentionCl(8, kind, (2, 3), dim_head=4).double()
    for index, parameter in enumerate(layer.parameters()):
        count = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data = (0.5 * torch.sin(0.37 * count + 0.11 * index)).reshape(parameter.shape)
    index = torch.arange(192, dtype=torch.float64)
    y = layer(torch.sin(0.23 * index).reshape(1, 4, 6, 8)).flatten()
    actual = (y[1], y[96], y[-1], y.sum(), (y * torch.cos(0.1 * index)).sum())
    assert [value.item() for value in actual] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    "cells",
    [
        {},
        {"lstm": {"dws_conv": True}},
        {"use_plain_lstm": True},
        {"use_enhanced_convlstm": True},
        {"num_blocks": (1, 2, 1, 1)},
    ],
    ids=str,
)
def test_sequence_equals_steps(cells):
    model, x = detector(**cells), frames(3, 2)
    reset = torch.tensor([[False, False], [False, True], [False, False]])
    with torch.no_grad():
        predictions, _, states = model.forward_sequence(x, reset=reset)
        state, rows = None, []
        for frame, restarted in zip(x, reset, strict=True):
            if state is not None:
                state = [tuple(v.masked_fill(restarted[:, None, None, None], 0) for v in pair) for pair in state]
            row, losses, state = model(frame, state)
            assert losses is None
            rows.append(row)
    torch.testing.assert_close(predictions, torch.cat(rows), rtol=1e-4, atol=1e-5)
    for pair, expected in zip(states, state, strict=True):
        torch.testing.assert_close(pair, expected, rtol=1e-4, atol=1e-5)


def test_a_reset_is_a_restart():
    model, x = detector().double(), frames(3, 1, dtype=torch.float64)
    with torch.no_grad():
        whole, _, _ = model.forward_sequence(x, reset=torch.tensor([[False], [False], [True]]))
        restarted, _, _ = model.forward_sequence(x[2:])
    torch.testing.assert_close(whole[2:], restarted)


def test_streaming_a_hundred_steps_keeps_to_the_reference():
    model = detector()
    x = torch.poisson(torch.full((100, 1, 4, 60, 100), 0.1), generator=torch.Generator().manual_seed(1))

    def last_map(model, x):
        return model.backbone.forward_sequence(model._padded(x))[0][4][-1]

    with torch.no_grad():
        actual = last_map(model, x)
        with evkernels.use_backend("reference"):
            eager, exact = last_map(model, x), last_map(detector().double(), x)
    assert_matches(actual, exact, eager)


def test_gradients_reach_every_parameter_and_equal_the_reference():
    targets = torch.zeros(2, 2, 5, dtype=torch.float64)
    targets[:, 0] = torch.tensor([1, 30, 30, 20, 24])
    labelled = torch.tensor([[False, True], [True, False]])

    def gradients():
        model = detector().double().train()
        _, losses, _ = model.forward_sequence(frames(2, 2, dtype=torch.float64), labelled=labelled, targets=targets)
        losses["loss"].backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    actual = gradients()
    with evkernels.use_backend("reference"):
        expected = gradients()
    assert all(value is not None for value in actual.values())
    torch.testing.assert_close(actual, expected)


def test_detector_runs_on_labelled_frames_alone():
    model, x = detector(), frames(2, 2)
    with torch.no_grad():
        everything, _, _ = model.forward_sequence(x)
        labelled = torch.tensor([[False, True], [True, False]])
        some, _, _ = model.forward_sequence(x, labelled=labelled)
        nothing, losses, states = model(x[0], retrieve_detections=False)
        # Zeros at the bottom and on the right, so that boxes stay where they are.
        maps, _ = model.backbone(F.pad(x[0], (0, 28, 0, 4)))
        padded, _ = model.yolox_head(model.fpn(maps))
    torch.testing.assert_close(some, everything[[1, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(everything[:2], padded, rtol=1e-4, atol=1e-5)
    assert nothing is None
    assert losses is None
    assert len(states) == 4


def test_cells_are_chosen_as_in_the_published_configurations():
    def kinds(**others):
        return [type(stage.lstm) for stage in detector(**others).backbone.stages]

    assert kinds() == [DWSConvLSTM2d] * 4
    assert kinds(use_plain_lstm=True, use_enhanced_convlstm=True) == [PlainLSTM2d] * 4
    enhanced = [DWSConvLSTM2d, LightweightEnhancedConvLSTM, DWSConvLSTM2d, DWSConvLSTM2d]
    assert kinds(use_enhanced_convlstm=True) == enhanced


def test_mask_token_replaces_masked_positions():
    backbone = MaxViTRNN(4, (1, 1), embed_dim=8, attention={"dim_head": 4}, enable_masking=True)
    x = tensor(2, 4, 32, 64, seed=1)
    mask = torch.zeros(2, 8, 16, dtype=torch.bool)
    mask[0] = True
    maps, _ = backbone(x, token_mask=mask)
    other, _ = backbone(x + 1, token_mask=mask)
    torch.testing.assert_close(maps[4][0], other[4][0])
    assert not torch.equal(maps[4][1], other[4][1])
    maps[4].sum().backward()
    assert backbone.stages[0].mask_token.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="enable_masking=True"):
        detector().backbone(torch.zeros(1, 4, 64, 128), token_mask=mask[:1])


def test_drop_path_drops_samples():
    layer, x = DropPath(0.25), torch.ones(4000, 2)
    dropped = layer(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert 0.2 < (dropped[:, 0] == 0).double().mean() < 0.3
    assert layer.eval()(x) is x


@pytest.mark.parametrize(
    ("sensor", "split", "padded", "partition"),
    [((360, 640), 2, (384, 640), (6, 10)), ((240, 304), 1, (256, 320), (8, 10)), ((1, 1), 1, (32, 32), (1, 1))],
)
def test_partition_size(sensor, split, padded, partition):
    assert partition_size_of(*sensor, split) == (padded, partition)


def test_errors_name_what_was_expected():
    model = detector()
    with pytest.raises(ValueError, match=r"pad with zeros at the bottom and right to 64, 128"):
        model.backbone(torch.zeros(1, 4, 60, 100))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 60, 100\], got \(1, 4, 64, 128\)"):
        model(torch.zeros(1, 4, 64, 128))
    with pytest.raises(ValueError, match=r"input_channels = 4, got \(1, 5, 64, 128\)"):
        model(torch.zeros(1, 5, 60, 100))
    with pytest.raises(ValueError, match=r"dim must be a multiple of dim_head = 32, got 8"):
        RVTDetector(3, 60, 100, embed_dim=8)
    with pytest.raises(ValueError, match="size must be one of base, small, tiny, got 'huge'"):
        RVTDetector.published("huge", 3, 60, 100)
    with pytest.raises(ValueError, match=r"targets must be \[N, M, 5\] with N = 1"):
        model(frames(1)[0][None], targets=torch.zeros(2, 1, 5))


PLAIN_LSTM = """
model:
  name: rnndet
  backbone:
    name: MaxViTRNN
    use_plain_lstm: true
    use_enhanced_convlstm: false
    input_channels: 20
    embed_dim: 64
    dim_multiplier: [1, 2, 4, 8]
    num_blocks: [1, 1, 1, 1]
    T_max_chrono_init: [4, 8, 16, 32]
    stem:
      patch_size: 4
    stage:
      downsample: {type: patch, overlap: true, norm_affine: true}
      attention: {partition_size: "???", dim_head: 32, mlp_activation: gelu, mlp_ratio: 4, ls_init_value: 1e-5}
      lstm:
        dws_conv: false
        dws_conv_only_hidden: true
        dws_conv_kernel_size: 3
        drop_cell_update: 0.1
  fpn:
    name: PAFPN
    in_stages: [2, 3, 4]
    depth: 0.33
  head:
    name: YoloX
    num_classes: 8
  postprocess:
    confidence_threshold: 0.001
    nms_threshold: 0.65
"""


def test_reads_hydra_configurations(tmp_path):
    pytest.importorskip("omegaconf")
    file = tmp_path / "plain_lstm.yaml"
    file.write_text(PLAIN_LSTM)
    model = RVTDetector.from_config(file, 360, 640, embed_dim=32)
    assert [type(stage.lstm) for stage in model.backbone.stages] == [PlainLSTM2d] * 4
    assert [stage.lstm.cell_update_dropout for stage in model.backbone.stages] == [0.1] * 4
    assert model.backbone.stage_dims == (32, 64, 128, 256)
    assert model.yolox_head.num_classes == 8
    assert len(model.fpn.C3_p4.m) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"backbone": {"stage": {"attention": {"use_torch_mha": True}}}},
            "stage.attention.use_torch_mha must be False",
        ),
        ({"fpn": {"depthwise": True}}, "fpn.depthwise must be False, got True"),
        ({"model": {"backbone": {"embed_dims": 3}}}, "backbone.embed_dims is not known"),
    ],
)
def test_refuses_configurations_it_has_no_network_for(config, message):
    with pytest.raises(ValueError, match=message):
        RVTDetector.from_config(config, 360, 640, num_classes=3)


def test_loads_lightning_checkpoints():
    model, other = detector(), detector(use_plain_lstm=True)
    saved = {"state_dict": {f"mdl.{key}": value + 1 for key, value in model.state_dict().items()}, "epoch": 3}
    before = model.backbone.stages[1].lstm.conv1x1.weight.clone()
    model.load_checkpoint(saved)
    assert torch.equal(model.backbone.stages[1].lstm.conv1x1.weight, before + 1)
    with pytest.raises(RuntimeError, match=r"lstm\.conv1x1"):
        other.load_checkpoint(saved)


def test_loss_of_frames_without_objects():
    model = detector().train()
    _, losses, _ = model(frames(2), targets=torch.zeros(2, 3, 5))
    assert losses["iou_loss"] == 0
    assert losses["cls_loss"] == 0
    assert losses["conf_loss"] > 0
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
