"""python -m evkernels align: train, evaluate and diagnose, on features, on recordings and on N-MNIST."""

import json

import numpy as np
import pytest
import torch

from evkernels import alignment
from evkernels.__main__ import main
from evkernels.alignment import AlignmentDataset, save_features, windows
from evkernels.events import Events
from evkernels.reconstruct.weights import load_network

for library in ("safetensors", "sklearn", "matplotlib", "rich", "PIL"):
    pytest.importorskip(library, reason="the extra align is not installed")


def write_features(folder, count=120):
    torch.manual_seed(3)
    event, mixing = torch.randn(count, 12), torch.randn(12, 10)
    save_features(folder, {"event_features": event, "target_features": event @ mixing})


def call(*arguments):
    return main(["align", *map(str, arguments)])


FAST = ("--num_epochs", 4, "--learning_rate", 5e-3, "--set", "hidden_dim=32")


def test_features_are_trained_on_evaluated_and_diagnosed(tmp_path, capfd):
    write_features(tmp_path / "data")
    assert call("train", tmp_path / "data", "--out", tmp_path / "out", *FAST) == 0
    out = capfd.readouterr().out
    assert "Lightweight" in out
    assert "96 pairs to train on, 24 held out" in out
    folder = tmp_path / "out" / "alignment"
    assert {path.name for path in folder.iterdir()} == {
        *(f"alignment.{kind}" for kind in ("safetensors", "json", "csv", "state")),
        "training.png",
    }
    assert call("evaluate", folder / "alignment.safetensors", tmp_path / "data", "--out", tmp_path / "report") == 0
    report = tmp_path / "report" / "alignment"
    assert {path.name for path in report.iterdir()} == {"report.md", "metrics.json", "retrieval.png", "tsne.png"}
    metrics = json.loads((report / "metrics.json").read_text())
    last = json.loads((folder / "alignment.json").read_text())
    assert metrics["pairs"] == 24
    assert last["strategy"] == "lightweight"
    capfd.readouterr()
    checkpoint = ("--checkpoint", folder / "alignment.safetensors")
    assert call("diagnose", tmp_path / "data", *checkpoint) == 0
    assert f"mean cosine: {metrics['cosine_similarity']:.3f}" in capfd.readouterr().out
    assert call("diagnose", tmp_path / "data") == 2
    assert "one space" in capfd.readouterr().err


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capfd):
    write_features(tmp_path / "data")
    arguments = ("train", tmp_path / "data", "--strategy", "contrastive", *FAST, "--set", "projection_dim=8")
    assert call(*arguments, "--out", tmp_path / "whole", "--resume") == 0
    assert "holds no alignment.state, training begins at epoch 1" in capfd.readouterr().out
    epoch = alignment.AlignmentTrainer._train_epoch
    with monkeypatch.context() as patched:

        def stops(trainer):
            if len(trainer.history) == 2:
                raise KeyboardInterrupt
            return epoch(trainer)

        patched.setattr(alignment.AlignmentTrainer, "_train_epoch", stops)
        assert call(*arguments, "--out", tmp_path / "part") == 130
    assert call(*arguments, "--out", tmp_path / "part") == 2
    assert "--resume" in capfd.readouterr().err
    assert call(*arguments, "--out", tmp_path / "part", "--resume") == 0
    whole, part = (tmp_path / name / "alignment" / "alignment.safetensors" for name in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()
    assert call(*arguments, "--set", "hidden_dim=16", "--out", tmp_path / "part", "--resume") == 2
    assert "alignment.state: expected the state of such a training, got: Error(s)" in capfd.readouterr().err
    assert call(*arguments, "--out", whole) == 2
    assert f"--out {whole}: cannot be written to: it is a file" in capfd.readouterr().err


def test_durations_are_trained_one_by_one(tmp_path):
    for duration in ("200ms", "1s"):
        write_features(tmp_path / "data" / duration, 60)
    arguments = ("--durations", "200ms", "1s", "--out", tmp_path / "out", "--strategy", "triple_modal", *FAST)
    assert call("train", tmp_path / "data", *arguments, "--set", "projection_dim=8") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"alignment_200ms", "alignment_1s"}
    trained = alignment.load_checkpoint(tmp_path / "out" / "alignment_1s" / "alignment.safetensors")
    assert trained.config.use_text_alignment is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "queue_size=3"), "set use_queue=True"),
        (("--set", "nonsense=3"), "no field nonsense"),
        (("--set", "nonsense"), "KEY=VALUE"),
        (("--batch_size", 1), "2 pairs"),
        (("--device", "cuda:99"), "--device"),
        (("--held_out", "0"), "train_ratio"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capfd, arguments, words):
    write_features(tmp_path / "data", 20)
    common = ("train", tmp_path / "data", "--out", tmp_path / "out", "--strategy", "contrastive")
    assert call(*common, *arguments) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert call("train", tmp_path / "absent", "--out", tmp_path / "out") == 2


def test_windows_without_weights_say_so(tmp_path, capfd):
    (tmp_path / "a.npz").write_bytes(b"")
    assert call("train", tmp_path / "a.npz", "--out", tmp_path / "out") == 2
    assert "--weights" in capfd.readouterr().err
    arguments = ("--weights", tmp_path / "x", "--encoder", "timm:x")
    assert call("train", tmp_path / "a.npz", "--out", tmp_path / "out", *arguments) == 2
    assert "never downloaded" in capfd.readouterr().err


def test_features_of_a_window():
    x, p = np.array([0, 0, 15], np.uint16), np.array([1, 1, 0], np.uint8)
    events = Events(x=x, y=x, t=np.arange(3), p=p, width=16, height=16)
    found = windows.event_features(events, 16).reshape(2, 16, 16)
    assert found[1, 0, 0] == pytest.approx(2**0.5)
    assert found[0, 15, 15] == 1
    assert found.sum() == pytest.approx(1 + 2**0.5)
    assert windows.picture_features(torch.rand(30, 40)).mean() == pytest.approx(0, abs=1e-6)
    encoder = torch.nn.Flatten()
    assert windows.picture_features(torch.ones(3, 4), encoder=encoder).tolist() == [1] * 36


def test_blocks_of_every_recording_are_held_out():
    recording = torch.tensor([0] * 10 + [1] * 5)
    train, held = windows.held_out_blocks(recording)
    assert held.tolist() == [8, 9, 14]
    assert train.tolist() == [*range(7), 10, 11, 12]


def test_digits_are_drawn_apart():
    digits = windows.rendered_digits([3, 3, 8])
    assert digits.shape == (3, 28, 28)
    assert digits.amax() > 0.9
    assert not torch.equal(digits[0], digits[1])
    assert torch.equal(digits, windows.rendered_digits([3, 3, 8]))


def test_windows_find_their_reconstructed_frames(recordings):
    """Retrieval among windows that training has not seen: several times chance."""
    network = load_network(recordings / "checkpoints" / "firenet_convgru.pth")[1]
    read = [windows.read_recordings(recordings / "npz" / f"dvs128_{name}.npz")[0] for name in ("garfield", "stripes")]
    found = windows.recording_pairs(read, network, 10_000)
    data = AlignmentDataset(found["event_features"], found["target_features"])
    train, held_out = (data.subset(rows) for rows in windows.held_out_blocks(found["recording"]))
    torch.manual_seed(0)
    module = alignment.ContrastiveAlignmentModule(alignment.ContrastiveAlignmentConfig(event_dim=512, target_dim=256))
    history = alignment.ContrastiveAlignmentTrainer(module, train, held_out, learning_rate=1e-3).train(8)
    best = min(history, key=lambda row: row["val_loss"])
    assert len(held_out) >= 35
    assert best["R@5"] > 3 * 5 / len(held_out)
    assert best["reverse_R@5"] > 3 * 5 / len(held_out)


def test_recordings_from_the_command_line(recordings, tmp_path):
    source = recordings / "npz" / "dvs128_garfield.npz"
    options = ("--durations", "40ms", "--weights", recordings / "checkpoints" / "firenet_convgru.pth")
    assert call("train", source, *options, "--out", tmp_path / "out", "--num_epochs", 1) == 0
    checkpoint = tmp_path / "out" / "alignment_40ms" / "alignment.safetensors"
    assert call("evaluate", checkpoint, source, *options, "--out", tmp_path / "report") == 0
    assert (tmp_path / "report" / "alignment_40ms" / "tsne.png").is_file()


def test_digits_of_nmnist_find_their_drawing(recordings):
    """Recordings that training has not seen, among ten mean drawings: far above one in ten."""
    found = windows.digit_pairs(recordings / "nmnist")
    labels = found["label"]
    data = AlignmentDataset(found["event_features"], found["target_features"])
    train, held_out = data.subset(torch.arange(480)), data.subset(torch.arange(480, 600))
    torch.manual_seed(0)
    config = alignment.LightweightAlignmentConfig(event_dim=512, target_dim=256)
    module = alignment.LightweightAlignmentModule(config)
    alignment.LightweightAlignmentTrainer(module, train, held_out).train(20)
    drawings = windows.rendered_digits([digit for digit in range(10) for _ in range(8)], seed=77)
    drawings = torch.stack([windows.picture_features(x) for x in drawings]).unflatten(0, (10, 8)).mean(1)
    with torch.no_grad():
        aligned = module.eval()(held_out.batch(torch.arange(120))["event_features"])
    cosines = torch.nn.functional.cosine_similarity(aligned[:, None], drawings[None], dim=2)
    assert (cosines.argmax(1) == labels[480:]).double().mean() > 0.4
