"""EfficientConvLSTM and EConvlstm: published sizes, every combination, events and voxel grids, states, monitoring."""

import pytest
import torch
from torch import nn

import evkernels
from evkernels.models import EConvlstm, EfficientConvLSTM, EncodingHealth
from evkernels.models.efficient_conv_lstm import grid_of
from evkernels.testing import assert_matches

SIZE = (34, 46)


def model(**others) -> EfficientConvLSTM:
    torch.manual_seed(0)
    return EfficientConvLSTM(**({"height": SIZE[0], "width": SIZE[1]} | others)).eval()


def raw_events(steps: int = 3, batch: int = 2, events: int = 400, seed: int = 1) -> list[torch.Tensor]:
    """Windows [B, N, 4] of t, x, y, p; some coordinates lie outside the sensor."""
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(steps):
        t = torch.rand(batch, events, generator=generator).sort(dim=1).values * 1e4
        x, y = (torch.rand(batch, events, generator=generator) * size * 1.1 - 1 for size in reversed(SIZE))
        p = torch.randint(0, 2, (batch, events), generator=generator) * 2.0 - 1
        windows.append(torch.stack([t, x, y, p], dim=2))
    return windows


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 1_769_805),
        ({"skip_lstm": False}, 1_380_349),
        ({"model_type": "DENSELSTM"}, 7_687_181),
    ],
    ids=str,
)
def test_published_size(arguments, parameters):
    assert sum(p.numel() for p in EfficientConvLSTM(**arguments).parameters()) == parameters


def test_published_keys():
    keys = set(model().state_dict())
    assert {
        "encoder.conv5.3.weight",
        "encoder.channel_attention.4.fc.2.weight",
        "skip_convlstms.3.cells.0.conv.bias",
        "convlstm.cells.1.conv.weight",
        "decoder.decoder_layers.0.0.weight",
        "decoder.decoder_layers.3.4.running_mean",
        "final_conv.3.bias",
    } <= keys
    assert {"dense_lstm.weight_ih_l1", "fc_to_map.bias"} <= set(model(model_type="DENSELSTM").state_dict())


@pytest.mark.parametrize("method", ["add", "concat"])
@pytest.mark.parametrize("skip_lstm", [True, False])
@pytest.mark.parametrize("model_type", ["CONVLSTM", "DENSELSTM"])
def test_every_combination_runs_and_trains(model_type, skip_lstm, method):
    network = model(model_type=model_type, skip_lstm=skip_lstm, method=method).train()
    events = raw_events(steps=2)
    before = [window.clone() for window in events]
    outputs, encodings, grids = network(events, training=True)
    assert outputs.shape == (2, 2, *SIZE)
    assert encodings.shape == (2, 2, 64, 9, 11)
    assert not encodings.requires_grad
    assert [grid.shape for grid in grids] == [(2, 5, *SIZE)] * 2
    assert outputs.min() > 0
    assert outputs.max() < 1
    outputs.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(torch.equal(window, old) for window, old in zip(events, before, strict=True))


def test_voxel_grids_are_taken_as_they_are():
    network, events = model(), raw_events()
    with torch.no_grad():
        outputs, encodings, grids = network(events)
        network.reset_states()
        again, same, none = network(grids)
    assert none == []
    assert torch.equal(outputs, again)
    assert torch.equal(encodings, same)


def test_raw_events_become_the_published_grid():
    """Polarities added up at truncated coordinates, one bin per event, times scaled per sample."""
    network, (window,) = model(), raw_events(steps=1)
    _, _, (grid,) = network([window])
    expected = torch.zeros(2, 5, *SIZE)
    for sample, events in enumerate(window.tolist()):
        times = torch.tensor([event[0] for event in events])
        bins = ((times - times.min()) / (times.max() - times.min()) * 5).long().clamp(max=4).tolist()
        for time_bin, (_, x, y, p) in zip(bins, events, strict=True):
            column, row = int(min(max(x, 0), SIZE[1] - 1)), int(min(max(y, 0), SIZE[0] - 1))
            expected[sample, time_bin, row, column] += int(p)
    assert (grid != expected).double().mean() < 1e-3  # A time on the border of two bins may round either way.
    assert torch.equal(grid.sum(dim=1), expected.sum(dim=1))


def test_calls_continue_where_the_last_one_ended():
    events = raw_events()
    for kind in ({}, {"model_type": "DENSELSTM"}):
        network = model(**kind)
        with torch.no_grad():
            whole, _, _ = network(events)
            network.reset_states()
            parts = torch.cat([network(events[:1])[0], network(events[1:])[0]], dim=1)
            network.reset_states()
            restarted, _, _ = network(events[1:])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(restarted, whole[:, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["CONVLSTM", "DENSELSTM"])
def test_detached_states_allow_truncated_backpropagation(model_type):
    network = model(model_type=model_type).train()
    for window in raw_events():
        network([window])[0].mean().backward()
        network.detach_states()
    network.reset_states()
    network.detach_states()
    network([raw_events(batch=1)[0]])


def test_fused_equals_reference_over_a_hundred_steps():
    grids = [grid_of(window, *SIZE) for window in raw_events(steps=10, batch=1, events=200)]

    def outputs(dtype):
        # Most of the time would be the full bottleneck's convolutions in float64.
        network = model(bottleneck_channels=16).to(dtype)
        with torch.no_grad():
            return network([grid.to(dtype) for grid in grids] * 10)[0]

    actual = outputs(torch.float32)
    with evkernels.use_backend("reference"):
        eager, exact = outputs(torch.float32), outputs(torch.float64)
    assert_matches(actual, exact, eager)


def test_bottleneck_channels_act():
    network = model(bottleneck_channels=16).train()
    assert network(raw_events())[1].shape == (2, 3, 16, 9, 11)
    network.bottleneck_channels = 24
    outputs, encodings, _ = network(raw_events())
    assert encodings.shape == (2, 3, 24, 9, 11)
    assert outputs.shape == (2, 3, *SIZE)
    assert all(module.training for module in network.modules())


def test_gradient_clip_val_acts():
    network = model(gradient_clip_val=0.5).train()
    (1e3 * network(raw_events())[0]).sum().backward()
    before = network.clip_gradients()
    after = nn.utils.get_total_norm([p.grad for p in network.parameters()])
    assert before > 0.5
    torch.testing.assert_close(after, torch.tensor(0.5), rtol=1e-3, atol=0)


def test_monitor_sees_encodings_in_training_alone():
    health = EncodingHealth()
    network = model(monitor=health)
    network(raw_events())
    assert health.records == []
    _, encodings, _ = network.train()(raw_events(batch=2))
    (record,) = health.records
    assert record["mean"] == pytest.approx(encodings.mean().item(), abs=1e-6)
    assert record["std"] == pytest.approx(encodings.std(correction=0).item(), rel=1e-5)
    assert record["zero_ratio"] == pytest.approx((encodings.abs() < 1e-6).double().mean().item(), abs=1e-6)


def test_health_warns_of_collapse():
    health = EncodingHealth(every=2)
    with pytest.warns(RuntimeWarning, match="95% of the encodings are zero"):
        health(torch.cat([torch.zeros(95), torch.ones(5)]))
    assert health(torch.zeros(3)) is None
    assert health(torch.zeros(0)) is None
    assert len(health.records) == 1
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        EncodingHealth(every=0)


def test_errors_name_what_was_expected():
    network = model()
    with pytest.raises(ValueError, match=r"voxel grids must be \[B, 5, 34, 46\], got \(1, 5, 3, 4\)"):
        network([torch.zeros(1, 5, 3, 4)])
    with pytest.raises(ValueError, match=r"a window must be \[B, N, 4\] or \[B, 5, H, W\], got \(3, 5\)"):
        network([torch.zeros(3, 5)])
    with pytest.raises(ValueError, match="at least one window"):
        network([])
    with pytest.raises(ValueError, match="model_type must be 'CONVLSTM' or 'DENSELSTM', got 'LSTM'"):
        model(model_type="LSTM")
    with pytest.raises(ValueError, match="method must be 'add' or 'concat', got 'mean'"):
        model(method="mean")
    with pytest.raises(ValueError, match="bottleneck_channels must be at least 1, got 0"):
        network.bottleneck_channels = 0


def test_a_window_without_events():
    outputs, _, (grid,) = model()([torch.zeros(2, 0, 4)])
    assert torch.equal(grid, torch.zeros(2, 5, *SIZE))
    assert outputs.isfinite().all()


def test_econvlstm_has_mobilenets_sizes_and_keys():
    network = EConvlstm(*reversed(SIZE))
    # torchvision's mobilenet_v2().features has 2,223,872, two input channels fewer.
    assert sum(p.numel() for p in network.encoder.parameters()) == 2_223_872 + 2 * 32 * 9
    keys = set(network.state_dict())
    assert {
        "encoder.backbone.0.0.weight",
        "encoder.backbone.1.conv.1.weight",
        "encoder.backbone.17.conv.3.running_var",
        "encoder.backbone.18.1.bias",
        "skip_convlstms.3.cells.0.conv.weight",
        "convlstm.cells.1.conv.bias",
        "decoder.decoder_layers.3.2.weight",
        "final_conv.2.weight",
    } <= keys


@pytest.mark.parametrize("skip_lstm", [True, False])
def test_econvlstm_runs_trains_and_continues(skip_lstm):
    torch.manual_seed(0)
    network, events = EConvlstm(*reversed(SIZE), skip_lstm=skip_lstm), raw_events()
    outputs, encodings, grids = network(events)
    assert outputs.shape == (2, 3, *SIZE)
    assert encodings.shape == (2, 3, 128, 9, 11)
    assert len(grids) == 3
    outputs.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    network.reset_states()
    with torch.no_grad():
        whole = network(grids)[0]
        network.reset_states()
        parts = torch.cat([network(grids[:1])[0], network(grids[1:])[0]], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    network.detach_states()


@pytest.mark.parametrize("network", [EConvlstm, EfficientConvLSTM])
def test_decoder_equals_its_layers_in_training_and_evaluation(network):
    """Maps of exactly twice the size, so that nothing is interpolated."""
    torch.manual_seed(0)
    decoder = network(height=SIZE[0], width=SIZE[1]).double().decoder
    channels = [level[0].out_channels for level in decoder.decoder_layers][::-1]
    maps = [torch.randn(2, count, 32 >> k, 48 >> k, dtype=torch.float64) for k, count in enumerate(channels)]
    x = torch.randn(2, decoder.decoder_layers[0][0].in_channels, 2, 3, dtype=torch.float64)
    decoder(x, maps).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    decoder.eval()
    expected = x
    for level, skip in zip(decoder.decoder_layers, reversed(maps), strict=True):
        half = len(level) // 2
        expected = level[half:](level[:half](expected) + skip)
    torch.testing.assert_close(decoder(x, maps), expected)
    with torch.no_grad():
        torch.testing.assert_close(decoder(x, maps), expected)
