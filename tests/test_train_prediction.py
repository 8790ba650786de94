"""`python -m evkernels train efficient_conv_lstm`: targets, states, losses that fall, resumed runs, TensorBoard."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("omegaconf", reason="omegaconf is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from test_train import rows, save_tree

from evkernels.__main__ import main
from evkernels.data import RandomSequences, StreamingSequences, collate
from evkernels.models import EfficientConvLSTM
from evkernels.train.prediction import grids_of
from evkernels.train.settings import load
from evkernels.train.trainer import Trainer

NAME = "efficient_conv_lstm"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Frames of 5 bins, beside which each recording has maps: NaN in the first row, else its own number."""
    folder = save_tree(tmp_path_factory.mktemp("shapes"), bins=5)
    for index, recording in enumerate(StreamingSequences(folder / "train", 3, 1).recordings):
        maps = np.full((len(recording), *recording.shape[1:]), index / 8, np.float32)
        maps[:, 0] = np.nan
        np.save(recording.folder / "depth.npy", maps)
    return folder


@pytest.fixture
def config(tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
train: {tree}/train
validate: {tree}/val
model: {{bottleneck_channels: 16, skip_lstm: false}}
steps: 4
batch_size: 2
length: 3
checkpoint_every: 2
validate_every: 100
learning_rate: 0.005
workers: 0
"""
    )
    return path


def trainer_of(config, *changes):
    return Trainer(load(NAME, config, list(changes)), torch.device("cpu"))


def test_trains_with_logs_for_tensorboard(config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    out = tmp_path / "run"
    assert main(["train", NAME, str(config), "--out", str(out), "--set", "tensorboard=true"]) == 0
    losses = rows(out / "losses.csv")
    (validation,) = rows(out / "validation.csv")
    written = {}
    for file in (out / "tensorboard").iterdir():
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                written[value.tag, event.step] = value.simple_value
    for row in losses:
        assert written["losses/loss", int(row["step"])] == pytest.approx(float(row["loss"]), rel=1e-6)
    assert written["validation/skill", 4] == pytest.approx(float(validation["skill"]), rel=1e-5)
    assert len(losses) == 4


def test_asks_for_tensorboard(config, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    arguments = ["train", NAME, str(config), "--out", str(tmp_path / "run"), "--set", "tensorboard=true"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "tensorboard=true needs the library tensorboard" in error
    assert "pip install 'evkernels[train]'" in error


@pytest.mark.parametrize("changes", [(), ("model.model_type=DENSELSTM", "sampling=random"), ("precision=bfloat16",)])
def test_a_resumed_run_has_the_same_bits(config, tmp_path, changes):
    """The dropout of DENSELSTM draws the same numbers."""
    whole, losses = trainer_of(config, *changes), []
    for batch in islice(whole.batches(), 3):
        losses.append(whole.train_step(batch))
        if whole.step == 1:
            whole.save(tmp_path / "last.ckpt")
    resumed = trainer_of(config, *changes)
    torch.manual_seed(99)
    resumed.load(tmp_path / "last.ckpt")
    assert [resumed.train_step(batch) for batch in islice(resumed.batches(), 2)] == losses[1:]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_repeating_a_batch_lowers_the_loss_below_that_of_a_constant(config):
    trainer = trainer_of(config, "steps=12", "sampling=random", "learning_rate=0.01")
    batch = next(trainer.batches())
    losses = [trainer.train_step(batch)["loss"] for _ in range(12)]
    share = (batch.frames[1:].sum(2) > 0).double().mean()
    assert losses[-1] < 0.9 * F.binary_cross_entropy(share, share)


def test_targets_are_the_events_of_the_next_frame(config):
    trainer = trainer_of(config, "saturation=2")
    batch = next(trainer.batches())
    reset, padding = batch.reset.clone(), batch.padding.clone()
    reset[1, 0] = padding[2, 1] = True
    targets = trainer.task._next_events(replace(batch, reset=reset, padding=padding))
    counts = batch.frames.long().sum(2)
    assert torch.equal(targets[0, 1], (counts[1, 1] / 2).clamp(max=1))
    assert torch.equal(targets[1, 0], (counts[2, 0] / 2).clamp(max=1))
    # No target where another recording begins, the next frame is missing, or in the next batch.
    assert targets[0, 0].isnan().all()
    assert targets[1, 1].isnan().all()
    assert targets[2].isnan().all()


def test_given_targets(config, tree):
    trainer = trainer_of(config, "targets=depth.npy", f"validate={tree}/train")
    batch = next(trainer.batches())
    number = {str(recording.folder): index for index, recording in enumerate(trainer.data.recordings)}
    pieces = trainer.data._plan()[0]
    for sample, piece in enumerate(pieces):
        assert batch.targets[:, sample, 0].isnan().all()
        assert (batch.targets[:, sample, 1:] == number[str(piece.recording.folder)] / 8).all()
    loss = trainer.task(batch, None)[0]["loss"].item()
    model = trainer.model
    model.reset_states()
    maps = model(grids_of(batch.frames).unbind(0))[0].transpose(0, 1)
    assert loss == pytest.approx(F.binary_cross_entropy(maps[:, :, 1:], batch.targets[:, :, 1:]).item(), rel=1e-4)
    result = trainer.validate()
    share = torch.tensor([0, 1 / 8, 2 / 8]).mean()
    constant = F.binary_cross_entropy(share, share).item()
    assert result["skill"] == pytest.approx(1 - result["loss"] / constant, rel=1e-3)


def test_sequences_carry_given_targets(tree):
    data = RandomSequences(tree / "train", 3, every=1, targets="depth.npy")
    batch = collate([data[0], data[len(data) - 1]])
    assert batch.targets.shape == (3, 2, 64, 64)
    assert (batch.targets[:, 1, 1:] == 2 / 8).all()
    assert batch.to("cpu").targets is not None
    assert collate([RandomSequences(tree / "train", 3, every=1)[0]]).targets is None


def test_rejects(config, tree, tmp_path, capsys):
    np.save(tmp_path / "short.npy", np.zeros((1, 64, 64)))
    for change, message in (
        ("targets=nothing.npy", "nothing.npy: expected an array"),
        (f"targets={tmp_path}/short.npy", "expected maps [B, H, W] = [6, 64, 64], got [1, 64, 64]"),
        ("length=1", "length must be at least 2 to predict the next frame, got 1"),
        ("saturation=0", "saturation must be at least 1, got 0"),
        ("num_classes=2", "num_classes"),
        ("model.width=3", "model: "),
        ("model.method=multiply", "method must be 'add' or 'concat'"),
        ("{sampling: random, batch_size: 99}", ""),
    ):
        changes = ["sampling=random", "batch_size=99"] if not message else [change]
        options = [part for text in changes for part in ("--set", text)]
        assert main(["train", NAME, str(config), "--out", str(tmp_path / "run"), *options]) == 2
        assert (message or "batch_size must be at most the 12 sequences, got 99") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{}, {"model_type": "DENSELSTM"}, {"skip_lstm": False}], ids=str)
def test_states_of_some_samples_are_reset(options):
    model = EfficientConvLSTM(width=20, height=24, bottleneck_channels=4, **options).eval().double()
    x = torch.poisson(torch.full((2, 2, 5, 24, 20), 0.3, dtype=torch.float64))
    assert model.states is None
    model.reset_states(torch.tensor([True, False]))
    model(x.unbind(0))
    states = model.states
    with torch.no_grad():
        whole = model(x.unbind(0))[0]
        model.states = states
        model.reset_states(torch.tensor([True, False]))
        for before, after in zip(tree_flatten(states)[0], tree_flatten(model.states)[0], strict=True):
            assert before[0].abs().max() > 0
            assert after[0].abs().max() == 0
            assert torch.equal(after[1], before[1])
        partly = model(x.unbind(0))[0]
        model.reset_states()
        fresh = model(x.unbind(0))[0]
    torch.testing.assert_close(partly[0], fresh[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(partly[1], whole[1], rtol=0, atol=1e-14)
