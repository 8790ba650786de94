"""evkernels.alignment: data, metrics, diagnosis, training and checkpoints."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from evkernels import alignment
from evkernels.alignment import AlignmentDataset, LightweightAlignmentConfig

pytest.importorskip("safetensors")
from small_alignment import pairs, small


def test_dataset_maps_files_and_splits(tmp_path):
    import numpy as np
    from safetensors.torch import save_file

    data = pairs(text=True)
    event, target, text = data.batch(torch.arange(80)).values()
    np.save(tmp_path / "event_features.npy", event.numpy())
    torch.save(target, tmp_path / "target_features.pt")
    save_file({"features": text}, tmp_path / "text_features.safetensors")
    read = AlignmentDataset.from_directory(tmp_path)
    assert len(read) == 80
    assert all(torch.equal(read[7][name], data[7][name]) for name in read[7])
    first, second = read.split(0.75, seed=3)
    assert (len(first), len(second)) == (60, 20)
    together = torch.cat(
        [first.batch(torch.arange(60))["event_features"], second.batch(torch.arange(20))["event_features"]]
    )
    assert torch.equal(together.sort(0).values, event.sort(0).values)
    with pytest.raises(IndexError):
        read[80]
    with pytest.raises(ValueError, match="number of rows"):
        AlignmentDataset(event, target[:3])
    torch.save({"x": target}, tmp_path / "event_features.pt")
    (tmp_path / "event_features.npy").unlink()
    with pytest.raises(ValueError, match="expected a tensor"):
        AlignmentDataset.from_directory(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        AlignmentDataset.from_directory(tmp_path / "absent")


def test_metrics_against_plain_formulas():
    a, b = torch.randn(30, 8), torch.randn(30, 8)
    found = alignment.evaluate_alignment_comprehensive(a, a + b)
    cosines = F.cosine_similarity(a, a + b)
    assert found["cosine_similarity"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    top = (F.normalize(a, dim=1) @ F.normalize(a + b, dim=1).T).topk(5).indices
    assert found["R@5"] == pytest.approx((top == torch.arange(30)[:, None]).any(1).double().mean().item())
    assert "R@10" not in alignment.evaluate_alignment_comprehensive(a[:6], b[:6])
    with pytest.raises(ValueError, match="k must be"):
        alignment.evaluate_retrieval(a[:4], b[:4])
    good = alignment.diagnose_alignment_quality(a, a)
    assert (good["quality"], good["estimated_acceptance_rate"], good["decay"]) == ("excellent", 0.8, "slow")
    assert alignment.diagnose_alignment_quality(a, -a)["alignment_needed"] == "strong"


def test_acceptance_counts_positions_until_the_first_that_fails():
    target = torch.eye(4)[None].repeat(2, 1, 1)
    draft = target.clone()
    draft[0, 1] = torch.tensor([0.0, 0.9, 0.9, 0.0])  # cosine 0.707
    draft[1, 3] = -draft[1, 3]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = alignment.measure_feature_acceptance(draft, target, mask, thresholds=(0.7, 0.8), gamma=2)
    assert found["accept@0.80"] == pytest.approx(5 / 6)
    assert found["consecutive@0.80"] == 1.5
    assert found["speculative_rate@0.80"] == 0.75
    assert found["consecutive@0.70"] == 3
    tokens = alignment.measure_token_acceptance(draft, target, mask, top=2)
    assert tokens["token_match"] == 1
    assert tokens["consecutive_match"] == 3
    with pytest.raises(ValueError, match="valid position"):
        alignment.measure_feature_acceptance(draft, target, mask * 0)
    with pytest.raises(ValueError, match="one shape"):
        alignment.measure_feature_acceptance(draft, target[:, :2])


def test_diagnosis_thresholds():
    target = torch.eye(2)[0].repeat(1, 4, 1)
    angles = torch.tensor([0.95, 0.7, 0.5, 0.3]).acos()
    draft = torch.stack([angles.cos(), angles.sin()], -1)[None]
    positions = alignment.diagnose_positions(draft, target)
    assert positions["pattern"] == "rapid"
    assert positions["by_position"] == pytest.approx([0.95, 0.7, 0.5, 0.3], abs=1e-6)
    motion = alignment.diagnose_motion(torch.tensor([0.9, 0.9, 0.7]), torch.tensor([False, False, True]))
    assert motion["severity"] == "medium"
    evidence = alignment.diagnose_misalignment(0.4, positions, motion)
    assert (evidence["score"], evidence["max_score"], evidence["severity"]) == (5, 7, "severe")
    logits = torch.randn(3, 4, 20)
    assert alignment.compare_logits(logits, logits)["verdict"] == "good"
    assert alignment.compare_logits(logits, -8 * logits)["verdict"] == "bad"
    assert alignment.diagnose_decoder(torch.nn.Linear(20, 30), logits, logits)["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ((True, 5000, False, "good"), "Lightweight Alignment + Fine-tune"),
        ((True, 5001, True, "good"), "Contrastive Alignment"),
        ((True, 10_001, True, "best"), "Triple-Modal Alignment"),
        ((False, 10_001, True, "best"), "Reconstruction Bridging"),
        ((False, 10_001, False, "best"), "Lightweight Alignment"),
        ((True, 1000, False, "good"), "Lightweight Alignment"),
    ],
)
def test_strategies_are_chosen_as_published(arguments, strategy, capsys):
    found = alignment.auto_select_alignment_strategy(*arguments)
    assert found.name == strategy
    alignment.print_strategy_recommendation(found)
    assert strategy in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("contrastive", {"use_queue": True, "queue_size": 30}), ("lightweight", {}), ("triple_modal", {"text_dim": 7})],
)
def test_training_learns_and_resumes_to_the_bit(kind, fields, tmp_path):
    train, held_out = pairs(160, text=kind == "triple_modal").split()

    def trainer():
        kinds = alignment.trainer.TRAINERS[kind]
        return kinds(small(kind, **fields), train, held_out, learning_rate=5e-3, batch_size=32)

    whole = trainer().train(6, tmp_path / "whole.pt")
    assert whole[-1]["val_loss"] < whole[0]["val_loss"]
    assert whole[-1]["R@5"] > 3 * 5 / 32
    stopped = trainer()
    with pytest.raises(KeyboardInterrupt):
        stopped.train(6, tmp_path / "part.pt", on_epoch=lambda row: interrupt(row["epoch"] == 3))
    torch.manual_seed(99)
    resumed = trainer().train(6, tmp_path / "part.pt", resume=True)
    assert [row["total_loss"] for row in resumed] == [row["total_loss"] for row in whole]
    one, other = (alignment.load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    assert len((tmp_path / "part.csv").read_text().splitlines()) == 7
    with pytest.raises(ValueError, match="6 epochs"):
        trainer().train(7, tmp_path / "part.pt", resume=True)


def interrupt(now):
    if now:
        raise KeyboardInterrupt


def test_warm_up_and_early_stopping():
    data = pairs(40)
    trainer = alignment.ContrastiveAlignmentTrainer(small("contrastive", warmup_epochs=3), data, learning_rate=1.0)
    scheduler, rates = trainer.make_scheduler(6), []
    for _ in range(6):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.25])
    frozen = alignment.LightweightAlignmentTrainer(small("lightweight"), data, data, learning_rate=1e-30, patience=2)
    assert len(frozen.train(20)) == 3


def test_downstream_fine_tuning_reaches_the_adapter_alone():
    module, decoder, data = small("lightweight", dropout=0.0), torch.nn.Linear(10, 50), pairs()
    before = decoder.weight.clone()
    losses = alignment.LightweightAlignmentTrainer(module, data, batch_size=20).finetune(
        decoder, 20, learning_rate=1e-2
    )
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(decoder.weight, before)
    assert decoder.weight.requires_grad
    closed = small("lightweight", finetune_on_downstream=False)
    with pytest.raises(ValueError, match="finetune_on_downstream"):
        alignment.LightweightAlignmentTrainer(closed, data).finetune(decoder)


def test_checkpoints_say_what_is_wrong(tmp_path):
    path = alignment.save_checkpoint(tmp_path / "x.pt", small("lightweight"), {"note": 1})
    assert path.name == "x.safetensors"
    loaded = alignment.load_checkpoint(tmp_path / "x.pt")
    assert loaded.config == small("lightweight").config
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="expected an alignment checkpoint"):
        alignment.load_checkpoint(path)
    (tmp_path / "old.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="load_original_checkpoint"):
        alignment.load_checkpoint(tmp_path / "old.pt")


class Evil:
    """Unpickling it would call print."""

    def __reduce__(self):
        return print, ("code of the file ran",)


def test_original_checkpoints_load_without_running_code(tmp_path, monkeypatch, capfd):
    module = small("lightweight")
    # The class that the original pickles, under the original's name.
    original = types.ModuleType("feature_alignment.lightweight")
    fields = [(f.name, f.type) for f in dataclasses.fields(LightweightAlignmentConfig)]
    kind = dataclasses.make_dataclass("LightweightAlignmentConfig", fields)
    kind.__module__, original.LightweightAlignmentConfig = original.__name__, kind
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "feature_alignment", types.ModuleType("feature_alignment"))
        patched.setitem(sys.modules, original.__name__, original)
        config = kind(**dataclasses.asdict(module.config))
        content = {"model_state_dict": module.state_dict(), "config": config, "training_stats": {"loss": [1.0]}}
        torch.save(content, tmp_path / "original.pt")
    loaded = alignment.load_original_checkpoint(tmp_path / "original.pt", "lightweight")
    event = torch.randn(3, 12)
    assert torch.equal(loaded(event), module.eval()(event))
    torch.save({"model_state_dict": module.state_dict(), "config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused"):
        alignment.load_original_checkpoint(tmp_path / "evil.pt", "lightweight")
    assert "ran" not in capfd.readouterr().out
    with pytest.raises(ValueError, match="refused"):
        alignment.load_original_checkpoint(tmp_path / "original.pt", "contrastive")
