"""`python -m evkernels reconstruct`: one line for bad weights, recordings, arguments and folders."""

import builtins
import contextlib
import pickle

import numpy as np
import pytest
import torch
from small_videos import NETWORKS, one_line, run, save_checkpoints, save_recording

from evkernels import reconstruct
from evkernels.arguments import InputError
from evkernels.reconstruct import weights
from evkernels.reconstruct.weights import load_network


@pytest.fixture(autouse=True)
def _one_thread(same_threads_after):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return save_recording(tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def weights_file(folder, kind, checkpoints):
    path = folder / "weights.pth"
    whole = (checkpoints / "firenet.pth").read_bytes()
    state_dict = NETWORKS["firenet"]().state_dict()
    if kind == "missing":
        return folder / "nothing.pth"
    if kind == "folder":
        return folder
    if kind in ("empty", "text", "truncated"):
        path.write_bytes({"empty": b"", "text": b"weights", "truncated": whole[: len(whole) // 2]}[kind])
    elif kind == "code":
        torch.save({"state_dict": state_dict, "logger": Refused()}, path)
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps(Refused()))
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other network":
        torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, path)
    elif kind == "key missing":
        torch.save({name: value for name, value in state_dict.items() if "resblocks.1.conv2" not in name}, path)
    elif kind == "shape":
        torch.save(state_dict | {"net.pred.conv2d.weight": torch.zeros(1, 4, 3, 3)}, path)
    elif kind == "nan":
        torch.save(state_dict | {"net.pred.conv2d.bias": torch.tensor([float("nan")])}, path)
    return path


class Refused:
    """Something whose class a checkpoint would have to import."""


class TestBadInput:
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("missing", "no such file"),
            ("folder", "a folder"),
            ("empty", "damaged"),
            ("text", "damaged"),
            ("truncated", "damaged"),
            ("code", "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}"),
            ("old pickle", "refused"),
            ("tensor", "expected a state dict of tensors"),
            ("other network", "expected weights of firenet, e2vid, cista-tc, got the keys weight, bias"),
            ("key missing", "net.resblocks.1.conv2.weight"),
            ("shape", "net.pred.conv2d.weight"),
            ("nan", "NaN or infinities in net.pred.conv2d.bias"),
        ],
    )
    def test_weights(self, kind, message, recording, checkpoints, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(recording, "--weights", weights_file(tmp_path, kind, checkpoints), "--out", out) == 2
        assert message in one_line(capsys)
        assert not out.exists()

    def test_damaged_bytes_of_weights(self, checkpoints, tmp_path):
        """Wherever a byte is wrong, the checkpoint is loaded or refused; nothing else is raised."""
        whole, generator = (checkpoints / "firenet.pth").read_bytes(), np.random.default_rng(0)
        for _ in range(100):
            damaged = bytearray(whole)
            # The pickle is at the beginning, the archive's directory at the end.
            for place in generator.integers(0, 4000, 3) * generator.choice([1, -1], 3):
                damaged[place] = generator.integers(256)
            (tmp_path / "damaged.pth").write_bytes(damaged)
            with contextlib.suppress(InputError):
                load_network(tmp_path / "damaged.pth")

    def test_weights_of_another_network(self, recording, checkpoints, tmp_path, capsys):
        weights = checkpoints / "e2vid.pth"
        assert run(recording, "--weights", weights, "--out", tmp_path, "--model", "firenet") == 2
        assert "expected weights of firenet, got those of e2vid" in one_line(capsys)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file"),
            (b"", "empty file"),
            (b"t x y p", "recording.npz"),
            ({"t": np.zeros(0, int)}, "got none"),
            ({"x": [50] * 3}, "3 of 3 outside"),
            ({"width": 15}, "at least 16x16"),
            ({"width": 5000, "height": 5000}, "at most 4000000 pixels"),
            ({"t": [0, 1, 10**15]}, "expected at most 100000 frames"),
        ],
    )
    def test_recordings(self, content, message, checkpoints, tmp_path, capsys):
        path, out = tmp_path / "recording.npz", tmp_path / "out"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            columns = {"x": [1, 2, 3], "y": [3, 2, 1], "t": [0, 100, 200], "p": [0, 1, 1], "width": 32, "height": 32}
            if "t" in content and not len(content["t"]):
                content = {name: content["t"] for name in "xytp"}
            np.savez(path, **{name: np.array(value) for name, value in (columns | content).items()})
        assert run(path, "--weights", checkpoints / "firenet.pth", "--out", out) == 2
        assert message in one_line(capsys)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--window", "33"), "must be whole microseconds, such as 50ms, 2.5ms or 10000us, got '33'"),
            (("--window", "0ms"), "whole microseconds"),
            (("--window", "-3ms"), "--window"),
            (("--events-per-frame", "0"), "whole number of at least 1, got '0'"),
            (("--window", "3ms", "--events-per-frame", "5"), "not allowed with"),
            (("--format", "mp4"), "png"),
            (("--model", "unet"), "cista-tc"),
            (("--sensor", "346"), "must be WxH"),
            (("--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
            (("--device", "cuda:99"), "CUDA devices"),
        ],
    )
    def test_arguments(self, arguments, message, recording, checkpoints, tmp_path, capsys):
        assert run(recording, "--weights", checkpoints / "firenet.pth", "--out", tmp_path / "out", *arguments) == 2
        assert message in one_line(capsys)

    def test_every_network_can_be_named(self):
        assert set(reconstruct._MODELS) == {"auto", *weights.NETWORKS}

    def test_output_folder_that_is_a_file(self, recording, checkpoints, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run(recording, "--weights", checkpoints / "firenet.pth", "--out", tmp_path / "file") == 2
        assert "--out" in one_line(capsys)

    @pytest.mark.parametrize("library", ["rich", "PIL"])
    def test_missing_library_names_the_extra(self, library, recording, checkpoints, tmp_path, capsys, monkeypatch):
        real = builtins.__import__

        def without(name, *rest):
            if name == library:
                raise ImportError(f"No module named {name!r}")
            return real(name)

        monkeypatch.setattr("importlib.import_module", without)
        assert run(recording, "--weights", checkpoints / "firenet.pth", "--out", tmp_path) == 2
        assert "pip install 'evkernels[demo]'" in one_line(capsys)
