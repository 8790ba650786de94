"""`python -m evkernels train`: losses fall, a resumed run has the bits of a whole one, mistakes are one line."""

import csv
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("omegaconf", reason="omegaconf is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from moving_shapes import save_recordings

from evkernels.__main__ import main
from evkernels.data import RandomSequences, StreamingSequences, collate
from evkernels.train.detection import targets_of
from evkernels.train.evaluation import AveragePrecision
from evkernels.train.settings import load
from evkernels.train.trainer import Trainer, _rate


def save_tree(folder, bins):
    """Recordings for training and validation, with boxes."""
    for name, count, seed in (("train", 3, 1), ("val", 1, 2)):
        save_recordings(folder / "raw" / name, count, 6, seed)
        run = ["preprocess", str(folder / "raw" / name), str(folder / name), "--bins", str(bins)]
        assert main(run) == 0
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return save_tree(tmp_path_factory.mktemp("shapes"), bins=2)


DETECTOR = """
num_classes: 2
model: {size: tiny, embed_dim: 16, attention: {dim_head: 16}, partition_split_32: 1}
"""


@pytest.fixture
def config(tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        DETECTOR
        + f"""
train: {tree}/train
validate: {tree}/val
steps: 6
batch_size: 2
length: 3
checkpoint_every: 2
validate_every: 100
learning_rate: 0.001
workers: 0
"""
    )
    return path


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def train(config, out, *changes, resume=False) -> int:
    options = [part for change in changes for part in ("--set", change)]
    return main(["train", "rvt", str(config), "--out", str(out), *options, *["--resume"] * resume])


def test_trains_and_leaves_logs_and_checkpoints(config, tmp_path):
    assert train(config, tmp_path / "run") == 0
    losses = rows(tmp_path / "run" / "losses.csv")
    assert [int(row["step"]) for row in losses] == list(range(1, 7))
    assert all(np.isfinite(float(row["loss"])) for row in losses)
    assert max(float(row["learning_rate"]) for row in losses) <= 0.001
    (validation,) = rows(tmp_path / "run" / "validation.csv")
    assert 0 <= float(validation["AP50"]) <= 1
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["step"] == 6
    assert saved["settings"]["num_classes"] == 2


@pytest.mark.parametrize("sampling", ["stream", "random"])
def test_a_resumed_run_has_the_same_bits(config, tmp_path, sampling):
    change = f"sampling={sampling}"
    assert train(config, tmp_path / "whole", change) == 0
    settings = load("rvt", config, [change])
    trainer = Trainer(settings, torch.device("cpu"))
    (tmp_path / "parts").mkdir()
    for _, batch in zip(range(3), trainer.batches(), strict=False):
        trainer.train_step(batch)
    trainer.save(tmp_path / "parts" / "last.ckpt")
    assert train(config, tmp_path / "parts", change, resume=True) == 0
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    assert rows(tmp_path / "whole" / "losses.csv")[3:] == rows(tmp_path / "parts" / "losses.csv")


@pytest.mark.parametrize("sampling", ["stream", "random"])
def test_an_epoch_begins_alike_in_a_run_and_in_a_resumed_one(config, sampling):
    # With this seed the second epoch of three recordings has another order than the first.
    trainer = Trainer(load("rvt", config, [f"sampling={sampling}", "seed=2"]), torch.device("cpu"))
    epoch = len(trainer.data) if sampling == "stream" else len(trainer.data) // trainer.settings.batch_size
    whole = [batch.frames for batch in islice(trainer.batches(), 2 * epoch)]
    trainer.step = epoch
    resumed = [batch.frames for batch in islice(trainer.batches(), epoch)]
    torch.testing.assert_close(resumed, whole[epoch:], rtol=0, atol=0)
    assert any(not torch.equal(*frames) for frames in zip(whole[:epoch], resumed, strict=True))


def test_the_rate_rises_and_falls():
    rates = [_rate(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0
    assert [_rate(step, 1, 0.5) for step in (0, 1)] == [1, 0]


def test_repeating_a_batch_lowers_the_loss(config):
    trainer = Trainer(load("rvt", config, ["steps=20", "sampling=random", "learning_rate=0.005"]), torch.device("cpu"))
    batch = next(trainer.batches())
    losses = [trainer.train_step(batch)["loss"] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision(config, precision, tmp_path):
    """Gradients are clipped without the factor of float16's losses, which a resumed run goes on with."""
    settings = load("rvt", config, [f"precision={precision}", "gradient_clip_val=0.01"])
    trainer, resumed = (Trainer(settings, torch.device("cpu")) for _ in range(2))
    trainer.scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=precision == "float16")
    assert np.isfinite(trainer.train_step(next(trainer.batches()))["loss"])
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.01, rel=0.01)
    trainer.save(tmp_path / "last.ckpt")
    resumed.load(tmp_path / "last.ckpt")
    assert resumed.scaler.get_scale() == trainer.scaler.get_scale()
    assert 0 <= trainer.validate()["AP"] <= 1


def test_batches_without_labels_carry_the_state_alone(config):
    trainer = Trainer(load("rvt", config, []), torch.device("cpu"))
    batch = next(trainer.batches())
    none = torch.zeros_like(batch.labelled)
    unlabelled = replace(batch, labelled=none, boxes=batch.boxes[:0], box_frames=batch.box_frames[:0])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    assert np.isnan(trainer.train_step(unlabelled)["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.states is not None
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_targets_are_the_boxes_of_labelled_frames(tree):
    data = RandomSequences(tree / "train", length=3)
    batch = collate([data[0], data[5]])
    targets = targets_of(batch)
    frames = batch.labelled.nonzero().tolist()
    assert len(targets) == len(frames)
    for target, frame in zip(targets, frames, strict=True):
        boxes = batch.boxes_of(*frame)
        expected = torch.cat([boxes[:, 4:5], boxes[:, :2] + boxes[:, 2:4] / 2, boxes[:, 2:4]], dim=1)
        torch.testing.assert_close(target[: len(boxes)], expected)
        assert not target[len(boxes) :].any()


def test_average_precision_of_perfect_and_of_wrong_boxes(tree):
    batch = StreamingSequences(tree / "val", 3, 1)[0]
    boxes = batch.boxes_of(0, 0)
    assert len(boxes)
    perfect = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4], torch.ones(len(boxes), 2), boxes[:, 4:5]], dim=1)
    for detections, expected in ((perfect, 1), (perfect + torch.tensor([99, 99, 99, 99, 0, 0, 0]), 0)):
        precision = AveragePrecision(2)
        precision.add(detections, boxes)
        assert precision.result() == {name: pytest.approx(expected) for name in ("AP", "AP50", "AP75")}
    assert all(np.isnan(value) for value in AveragePrecision(2).result().values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stepz=3"], "stepz"),
        (["sampling=mixed"], "sampling must be one of stream, random, got 'mixed'"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["steps=many"], "steps"),
        (["train=nowhere"], "nowhere: expected preprocessed recordings"),
        (["model={size: huge}"], "size must be one of base, small, tiny, got 'huge'"),
        (["model={head: 3}"], "model: MaxViTRNN.__init__() got an unexpected keyword argument 'head'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(config, tmp_path, capsys, more, message):
    assert train(config, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_written_over(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"not a checkpoint")
    assert train(config, tmp_path / "run") == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert train(config, tmp_path / "run", resume=True) == 2
    assert "expected a checkpoint" in capsys.readouterr().err
    torch.save({"state_dict": {}}, tmp_path / "run" / "last.ckpt")
    assert train(config, tmp_path / "run", resume=True) == 2
    assert "expected a checkpoint of this command, got: KeyError('settings')" in capsys.readouterr().err
    trainer = Trainer(load("rvt", config, ["steps=7"]), torch.device("cpu"))
    trainer.save(tmp_path / "run" / "last.ckpt")
    assert train(config, tmp_path / "run", resume=True) == 2
    assert "got another steps" in capsys.readouterr().err


def test_resume_before_the_first_checkpoint_says_that_it_begins(config, tmp_path, capsys):
    """Also where a run that was killed, or found the disk full, left half a row of its logs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "losses.csv").write_text("step,lo")
    assert train(config, tmp_path / "run", "steps=2", resume=True) == 0
    assert f"--resume: {tmp_path / 'run'} holds no last.ckpt, training begins at step 0" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run" / "losses.csv")] == ["1", "2"]
    with (tmp_path / "run" / "losses.csv").open("a") as file:
        file.write("1")
    assert train(config, tmp_path / "run", "steps=2", resume=True) == 0
    assert "holds no" not in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run" / "losses.csv")] == ["1", "2"]


def test_a_folder_that_cannot_be_written_to(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert train(config, tmp_path / "file") == 2
    assert capsys.readouterr().err == f"evkernels train: --out {tmp_path}/file: cannot be written to: it is a file\n"

    def full(beside, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert train(config, tmp_path / "run") == 2
    reason = "cannot be written to: No space left on device (last.ckpt)"
    assert capsys.readouterr().err == f"evkernels train: --out {tmp_path}/run: {reason}\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["losses.csv"]
