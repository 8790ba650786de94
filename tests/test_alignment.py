"""evkernels.alignment: modules and losses of its strategies."""

import dataclasses
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from evkernels import alignment, ops
from evkernels.alignment import ContrastiveAlignmentConfig, LightweightAlignmentConfig
from evkernels.alignment.config import config_from_dict
from evkernels.alignment.layers import MLP, BottleneckAdapter, FeatureAdapter, LinearAdapter, WhiteningLayer
from evkernels.models import FireNet

pytest.importorskip("safetensors")
from small_alignment import pairs, small


def test_contrastive_loss_is_the_documented_sum():
    module = small("contrastive", dropout=0.0).eval()
    event, target = pairs().batch(torch.arange(9)).values()
    losses = module.compute_loss(event, target, return_metrics=True)
    p, q = (F.normalize(x, dim=1) for x in module.embed(event, target))
    logits, own = module.logit_scale.exp() * p @ q.T, torch.arange(9)
    infonce = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    mse = F.mse_loss(F.normalize(module(event), dim=1), F.normalize(target, dim=1))
    others = logits.detach().clone().fill_diagonal_(-math.inf)
    margin = [F.softplus(others.amax(dim) - logits.diagonal()).mean() for dim in (0, 1)]
    torch.testing.assert_close(losses["total_loss"], infonce + 0.1 * mse + 0.5 * sum(margin) / 2)
    torch.testing.assert_close(losses["logit_scale"].item(), 1 / 0.07)
    assert losses["acc_e2t"] == (logits.argmax(1) == own).double().mean()
    assert losses["acc_t2e"] == (logits.argmax(0) == own).double().mean()
    without = small("contrastive", dropout=0.0, use_hard_negatives=False).eval()
    torch.testing.assert_close(without.compute_loss(event, target)["total_loss"], infonce + 0.1 * mse)


def test_published_sizes_and_names():
    module = alignment.ContrastiveAlignmentModule()
    assert sum(parameter.numel() for parameter in module.parameters()) == 2_234_369
    names = set(module.state_dict())
    assert {"event_projector.mlp.4.weight", "event_projection_head.projection.3.bias", "logit_scale"} <= names
    assert dataclasses.asdict(ContrastiveAlignmentConfig())["queue_size"] == 65536
    assert [name for name, _ in MLP(4, 4, use_layer_norm=False).named_parameters()][-1] == "mlp.3.bias"
    assert len(MLP(4, 4, num_layers=1).mlp) == 1
    triple = small("triple_modal", text_dim=7, projection_dim=16, num_attention_heads=4)
    assert {"triple_encoder.logit_scale_ei", "triple_encoder.event_text_attention.out_proj.weight"} <= set(
        triple.state_dict()
    )


def test_queue_holds_the_latest_targets_and_counts_as_negatives():
    module = small("contrastive", use_queue=True, queue_size=20, momentum=0.5, projection_dim=6, dropout=0.0)
    data = pairs()
    for step in range(3):
        batch = data.batch(torch.arange(8) + 8 * step)
        module.after_step(batch)
    assert int(module.queue_filled) == 20
    keys = F.normalize(module.momentum_target_head.eval()(batch["target_features"]), dim=1)
    torch.testing.assert_close(module.queue[torch.arange(16, 24) % 20], keys)
    module.eval()
    full = module.loss_of(batch)["contrastive_loss"]
    p, q = module.embed(**batch)
    torch.testing.assert_close(full, ops.contrastive_loss(p, q, module.logit_scale.exp(), module.queue))
    module.queue_filled.zero_()
    assert module.loss_of(batch)["contrastive_loss"] < full


def test_queue_head_follows_with_momentum():
    module = small("contrastive", use_queue=True, queue_size=4, momentum=0.9)
    name = "projection.0.weight"
    before = module.momentum_target_head.state_dict()[name].clone()
    own = module.target_projection_head.state_dict()[name].add_(1.0)
    module.after_step(pairs().batch(torch.arange(6)))
    torch.testing.assert_close(module.momentum_target_head.state_dict()[name], 0.9 * before + 0.1 * own)
    assert not any(parameter.requires_grad for parameter in module.momentum_target_head.parameters())


def test_hardest_negatives_are_those_of_all_similarities(monkeypatch):
    monkeypatch.setattr(alignment.base, "_STRIP", 4)
    a, b = torch.randn(11, 5), torch.randn(11, 5)
    cosines = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).fill_diagonal_(-math.inf)
    assert torch.equal(alignment.hardest_negatives(a, b), cosines.argmax(1))
    assert alignment.hard_negative_loss(a[:1], b[:1], torch.tensor(3.0)) == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"momentum": 0.9}, ValueError),
        ({"queue_size": 10}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"temperature": 0.0}, ValueError),
    ],
)
def test_contrastive_options_without_effect_raise(fields, error):
    with pytest.raises(error):
        ContrastiveAlignmentConfig(**fields)


def test_other_options_without_effect_raise():
    with pytest.raises(NotImplementedError, match="text encoder"):
        alignment.TripleModalAlignmentConfig(use_prompt_tuning=True)
    with pytest.raises(NotImplementedError, match="hypere2vid"):
        alignment.ReconstructionBridgingConfig(e2vid_type="hypere2vid")
    with pytest.raises(ValueError, match="adapter_type"):
        LightweightAlignmentConfig(adapter_type="lora")
    with pytest.raises(ValueError, match="no field"):
        config_from_dict("lightweight", {"queue_size": 3})


@pytest.mark.parametrize("kind", ["linear", "mlp", "adapter"])
@pytest.mark.parametrize("fields", [{}, {"use_residual": False}, {"use_whitening": True}, {"target_dim": 12}])
def test_lightweight_output_and_loss(kind, fields):
    module = small("lightweight", adapter_type=kind, dropout=0.0, **fields).eval()
    event = pairs().batch(torch.arange(9))["event_features"]
    target = torch.randn(9, module.config.target_dim)
    x = module.whitening(event) if module.config.use_whitening else event
    expected = module.adapter(x) + (0.1 * module.residual_proj(x) if module.config.use_residual else 0)
    torch.testing.assert_close(module(event), expected)
    loss = module.compute_loss(event, target)["total_loss"]
    unit = [F.normalize(value, dim=1) for value in (expected, target)]
    torch.testing.assert_close(loss, F.mse_loss(*unit) + 0.5 * (1 - (unit[0] * unit[1]).sum(1).mean()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_adapters_begin_as_published():
    torch.testing.assert_close(LinearAdapter(3, 5)(torch.eye(3))[:, :3], torch.eye(3))
    assert not BottleneckAdapter(4, 3, 2).eval()(torch.randn(5, 4)).any()
    assert FeatureAdapter(4, 3)(torch.zeros(1, 4)).tolist() == [[0, 0, 0]]


def test_whitening_removes_correlation():
    x = torch.randn(500, 3) @ torch.tensor([[2.0, 1, 0], [0, 1, 0.5], [0, 0, 0.3]]) + 4
    layer = WhiteningLayer(3, momentum=1.0)
    layer(x)
    torch.testing.assert_close(layer.eval()(x).T.cov(), torch.eye(3), rtol=1e-3, atol=1e-3)
    assert int(layer.num_batches_tracked) == 1


def test_triple_modal_losses_and_classification():
    module = small("triple_modal", text_dim=7, projection_dim=16, num_attention_heads=4, dropout=0.0).eval()
    event, image, text = pairs(text=True).batch(torch.arange(9)).values()
    found, encoder = module.encode(event, image, text), module.triple_encoder
    losses = module.compute_loss(event, image, text)
    loss = {
        name: ops.contrastive_loss(found[a], found[b], encoder.logit_scale_ei.exp())
        for name, a, b in (("ei", "event", "image"), ("et", "event", "text"), ("it", "image", "text"))
    }
    mse = F.mse_loss(F.normalize(module(event), dim=1), F.normalize(image, dim=1))
    torch.testing.assert_close(losses["total_loss"], loss["ei"] + 0.5 * (loss["et"] + loss["it"]) + 0.1 * mse)
    torch.testing.assert_close(found["event_attended"].norm(dim=1), torch.ones(9))
    assert module.compute_loss(event, image).keys() == {"total_loss", "event_image_loss", "mse_loss"}
    expected = (found["event"] @ found["text"][:4].T).argmax(1)
    assert torch.equal(module.zero_shot_classify(event, text[:4]), expected)
    silent = small("triple_modal", use_text_alignment=False, projection_dim=16)
    with pytest.raises(ValueError, match="use_text_alignment"):
        silent.compute_loss(event, image, text)


def bridging(**fields):
    torch.manual_seed(2)
    encoder = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(12, 6))
    config = alignment.ReconstructionBridgingConfig(
        event_dim=6, target_dim=4, hidden_dim=8, reconstruction_size=[16, 16], dropout=0.0, **fields
    )
    return alignment.ReconstructionBridgingModule(config, FireNet(5, 4), encoder)


def test_reconstruction_goes_from_grids_to_features():
    module = bridging().eval()
    grids = torch.randn(2, 3, 5, 9, 11)
    features = module(grids, reset_state=True)
    image, state = None, None
    each = []
    for grid in grids.unbind(1):
        image, state = module.e2vid(grid, state)
        small_image = F.interpolate(image, (16, 16), mode="bilinear").expand(-1, 3, -1, -1)
        each.append(module.clip_encoder((small_image - module.mean) / module.std))
    torch.testing.assert_close(features, module.feature_projector(torch.stack(each).mean(0)))
    last = bridging(use_temporal_aggregation=False).eval()
    torch.testing.assert_close(last(grids, reset_state=True), last.feature_projector(each[-1]))
    assert not torch.equal(module(grids[:, 0]), module(grids[:, 0], reset_state=True))
    loss = module.train().loss_of({"event_features": grids, "target_features": torch.randn(2, 4)})["total_loss"]
    loss.backward()
    with_gradient = {name.partition(".")[0] for name, p in module.named_parameters() if p.grad is not None}
    assert with_gradient == {"feature_projector"}


def test_reconstruction_fine_tunes_caches_and_loads_strictly(tmp_path):
    module = bridging(finetune_e2vid=True)
    loss = module.self_supervised_loss(torch.randn(1, 3, 5, 8, 8))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.e2vid.parameters())
    with pytest.raises(ValueError, match="finetune_e2vid"):
        bridging().self_supervised_loss(torch.randn(1, 3, 5, 8, 8))
    cached = bridging(cache_reconstructions=True).eval()
    grids = torch.randn(2, 5, 8, 8)
    first = cached(grids, keys=["a", "b"])
    torch.testing.assert_close(cached(torch.zeros(2, 5, 8, 8), keys=["b", "a"]), first.flip(0))
    with pytest.raises(ValueError, match="keys"):
        cached(grids)
    torch.save({"state_dict": FireNet(5, 4).state_dict()}, tmp_path / "firenet.pth")
    config = alignment.ReconstructionBridgingConfig(event_dim=6, target_dim=6)
    assert isinstance(alignment.ReconstructionBridgingModule(config, tmp_path / "firenet.pth").e2vid, FireNet)
    with pytest.raises(ValueError, match="num_temporal_bins"):
        alignment.ReconstructionBridgingModule(config, FireNet(3, 4))
    with pytest.raises(ValueError, match="none are shipped"):
        alignment.ReconstructionBridgingModule(config)
    state = {"net.head.recurrent_block.x": torch.zeros(1)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(Exception, match="expected weights of FireNet"):
        alignment.ReconstructionBridgingModule(config, tmp_path / "other.pth")
    refined = alignment.RefinedReconstructionBridgingModule(config, FireNet(5, 4))
    assert refined.encode_images(torch.rand(1, 1, 8, 8)).shape == (1, 3 * 224 * 224)


def test_image_encoders_plug_in(tmp_path, monkeypatch):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"")
    seen = []

    def create_model(name, **options):
        seen.append((name, options))
        network = torch.nn.Flatten()
        network.encode_image = lambda images: images.mean((2, 3))
        return network

    for package in ("timm", "open_clip"):
        monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(create_model=create_model))
    images = torch.rand(2, 3, 4, 4)
    assert alignment.load_image_encoder("timm:vit_tiny", weights)(images).shape == (2, 48)
    assert alignment.load_image_encoder("open_clip:ViT-B-32", weights)(images).shape == (2, 3)
    assert seen[0][1]["pretrained"] is False
    assert seen[1][1]["pretrained"] == str(weights)
    for name, file in (("resnet50", weights), ("timm:x", tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"expected|must be"):
            alignment.load_image_encoder(name, file)
