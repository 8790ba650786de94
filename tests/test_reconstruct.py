"""`python -m evkernels reconstruct`: its voxel grids and grey levels, what it writes, one line for bad input."""

import builtins
import contextlib
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="reconstruct needs rich (extra demo)")
pytest.importorskip("PIL", reason="reconstruct needs Pillow (extra demo)")

from PIL import Image

from evkernels import reconstruct
from evkernels.__main__ import main
from evkernels.arguments import InputError
from evkernels.events import Events, simulate
from evkernels.models import CistaTC, E2VIDRecurrent, FireNet
from evkernels.ops import voxel_grid
from evkernels.reconstruct import frame_count, job, weights
from evkernels.reconstruct.stream import IntensityRescaling, reflected, stream_images
from evkernels.reconstruct.weights import load_network

NETWORKS = {
    "firenet": lambda: FireNet(5, 4),
    "e2vid": lambda: E2VIDRecurrent(5, 3, 4, 1, norm="BN", use_upsample_conv=False),
    "cista-tc": lambda: CistaTC(4, depth=2),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def events() -> Events:
    """A simulated recording on a sensor whose sides are odd."""
    image = np.random.default_rng(0).random((60, 70)).repeat(2, 0).repeat(2, 1)
    return simulate(image, width=41, height=35, duration_us=60_000)


@pytest.fixture(scope="module")
def recording(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "small.npz"
    np.savez(path, x=events.x, y=events.y, t=events.t, p=events.p, width=41, height=35)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        torch.save({"state_dict": build().state_dict(), "epoch": 3}, folder / f"{name}.pth")
    return folder


def run(*arguments) -> int:
    """The exit code of `python -m evkernels reconstruct ARGUMENTS`."""
    try:
        return main(["reconstruct", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code


def one_line(capsys) -> str:
    """What was written to standard error, which must be one line and all there is."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("evkernels reconstruct: ")
    return captured.err


class TestVoxelGrid:
    @staticmethod
    def published_events() -> tuple[torch.Tensor, ...]:
        k = torch.arange(50)
        return (7 * k) % 6, (5 * k) % 4, 100 * k * k, (k * k % 3 == 1).long()

    @pytest.mark.parametrize(
        ("normalize", "three", "total", "weighted"),
        [
            (None, (0.0, -0.560600, 0.680133), 16.0, 1.075504),
            ("e2vid", (0.0, -0.900007, 0.411393), 0.0, 1.729588),
        ],
    )
    def test_values_of_the_original(self, normalize, three, total, weighted):
        grid = voxel_grid(*self.published_events(), bins=5, height=4, width=6, normalize=normalize)
        flat = grid.double().flatten()
        found = [*flat[[1, 60, -1]].tolist(), flat.sum().item()]
        found.append((flat * (0.1 * torch.arange(120, dtype=torch.float64)).cos()).sum().item())
        assert found == pytest.approx([*three, total, weighted], abs=4e-6)

    def test_times_since_1970_lose_nothing(self):
        x, y, t, p = self.published_events()
        grids = [voxel_grid(x, y, t + begin, p, bins=5, height=4, width=6) for begin in (0, 1_633_953_690_975_950)]
        assert torch.equal(*grids)

    @pytest.mark.parametrize("times", [[5], [5, 5, 5], []])
    def test_no_duration(self, times):
        t = torch.tensor(times, dtype=torch.int64)
        zeros, ones = torch.zeros_like(t), torch.ones_like(t)
        grid = voxel_grid(zeros, zeros, t, ones, bins=3, height=2, width=2)
        assert grid[0, 0, 0] == len(times)
        assert grid.sum() == len(times)
        assert (voxel_grid(zeros, zeros, t, ones, bins=3, height=2, width=2, normalize="e2vid") == 0).all()

    def test_normalised(self, events):
        grid = voxel_grid(*events.tensors(), bins=5, height=35, width=41)
        normal = voxel_grid(*events.tensors(), bins=5, height=35, width=41, normalize="e2vid")
        filled = normal[grid != 0].double()
        assert abs(filled.mean()) < 1e-6
        assert filled.std(correction=0) == pytest.approx(1, abs=1e-6)
        assert (normal[grid == 0] == 0).all()


class TestIntensityRescaling:
    def test_percentiles_become_black_and_white(self):
        image = torch.linspace(0.2, 0.9, 101).reshape(1, 101)
        grey = IntensityRescaling()(image)
        assert grey.dtype == np.uint8
        assert grey[0, :2].tolist() == [0, 0]
        assert grey[0, -2:].tolist() == [255, 255]
        assert 126 <= grey[0, 50] <= 129
        assert (np.diff(grey[0].astype(int)) >= 0).all()

    def test_noise_on_a_flat_scene_stays_faint(self):
        grey = IntensityRescaling()(0.5 + 0.001 * torch.randn(20, 20))
        assert int(grey.max()) - int(grey.min()) < 30

    def test_bounds_are_medians_of_the_last_images(self):
        dark, bright = (torch.linspace(0, high, 101).reshape(1, 101) for high in (0.6, 1.0))
        rescale = IntensityRescaling(images=3)
        first = rescale(dark)
        rescale(dark)
        expected = np.rint(np.clip((bright.numpy() - 0.006) / 0.588, 0, 1) * 255)
        assert np.abs(rescale(bright) - expected).max() <= 1
        rescale(bright)
        assert (rescale(dark) < first).any()

    def test_does_not_write_to_its_input(self):
        image = torch.rand(4, 4)
        before = image.clone()
        IntensityRescaling()(image)
        assert torch.equal(image, before)


class TestStream:
    @pytest.mark.parametrize("multiple", [1, 2, 8, 16])
    @pytest.mark.parametrize("size", [(16, 16), (35, 41), (33, 47)])
    def test_padding_reflects_and_crops(self, size, multiple):
        grid = torch.rand(1, 2, *size)
        padded, rows, columns = reflected(grid, multiple)
        assert all(extent % multiple == 0 for extent in padded.shape[2:])
        assert torch.equal(padded[:, :, rows, columns], grid)
        for axis, part in ((2, rows), (3, columns)):
            assert part.start - (padded.shape[axis] - part.stop) in (0, 1), "the larger half comes first"
        if rows.start:
            assert torch.equal(padded[:, :, rows.start - 1, columns], grid[:, :, 1])

    @pytest.mark.parametrize("name", NETWORKS)
    def test_images_have_the_size_of_the_sensor(self, name, events):
        torch.manual_seed(0)
        images = list(stream_images(NETWORKS[name]().eval(), events.windows(20_000)))
        assert [image.shape for image in images] == [(35, 41)] * 3
        assert all(image.isfinite().all() for image in images)

    def test_state_carries_the_past(self, events):
        model = NETWORKS["firenet"]().eval()
        first, second = list(events.windows(30_000))[:2]
        alone = next(stream_images(model, [second]))
        assert not torch.equal(list(stream_images(model, [first, second]))[1], alone)

    def test_windows_without_events(self, events):
        nothing = events.slice_time(-10, -5)
        images = list(stream_images(NETWORKS["firenet"]().eval(), [nothing, events, nothing]))
        assert all(image.isfinite().all() for image in images)


class TestVideo:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_frames(self, name, events, recording, checkpoints, tmp_path, capsys):
        out = tmp_path / "new" / "out"
        assert run(recording, "--weights", checkpoints / f"{name}.pth", "--out", out, "--window", "10ms") == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert "\x1b" not in shown.out, "escape codes where nobody is watching"
        for text in (f"{name} with ", " events/s, ", " frames/s ", "41x35", "6 frames of 10 ms", "frame_00005.png"):
            assert text in shown.out
        frames = [f"frame_{k:05d}.png" for k in range(6)]
        assert sorted(os.listdir(out)) == [".progress.pt", *frames, "preview.png", "timestamps.txt"]
        times = [float(line) for line in (out / "timestamps.txt").read_text().split()]
        assert times == pytest.approx([(events.t[0] + (k + 1) * 10_000) / 1e6 for k in range(6)], abs=1e-6)
        model = type(NETWORKS[name]()).from_state_dict(torch.load(checkpoints / f"{name}.pth")["state_dict"]).eval()
        rescale = IntensityRescaling()
        for frame, image in zip(frames, stream_images(model, events.windows(10_000)), strict=True):
            assert np.array_equal(np.asarray(Image.open(out / frame)), rescale(image))
        preview = np.asarray(Image.open(out / "preview.png"))
        assert preview.shape == (35, 82, 3)
        assert np.array_equal(preview[:, 41:, 0], np.asarray(Image.open(out / frames[-1])))

    def test_frames_of_equal_counts(self, events, recording, checkpoints, tmp_path):
        count = len(events) // 3 + 1
        weights = checkpoints / "firenet.pth"
        assert run(recording, "--weights", weights, "--out", tmp_path, "--events-per-frame", count) == 0
        times = [float(line) for line in (tmp_path / "timestamps.txt").read_text().split()]
        assert times == pytest.approx([events.t[k] / 1e6 for k in (count - 1, 2 * count - 1, -1)], abs=1e-6)

    @pytest.mark.parametrize(("window", "frames", "length"), [("20ms", 3, 20), ("0.03s", 2, 30), ("1s", 1, None)])
    def test_animation(self, window, frames, length, recording, checkpoints, tmp_path):
        weights = checkpoints / "firenet.pth"
        arguments = ("--weights", weights, "--out", tmp_path, "--format", "gif", "--window", window)
        assert run(recording, *arguments) == 0
        assert sorted(os.listdir(tmp_path)) == ["preview.png", "timestamps.txt", "video.gif"]
        with Image.open(tmp_path / "video.gif") as video:
            assert getattr(video, "n_frames", 1) == frames
            assert video.size == (41, 35)
            if length:
                assert video.info["duration"] == length

    def test_earlier_video_is_kept_unless_told(self, recording, checkpoints, tmp_path, capsys):
        arguments = (recording, "--weights", checkpoints / "firenet.pth", "--out", tmp_path)
        assert run(*arguments, "--window", "10ms") == 0
        (tmp_path / "notes.txt").write_text("mine")
        capsys.readouterr()
        assert run(*arguments, "--window", "30ms") == 2
        assert "frame_00000.png of an earlier run; --overwrite" in one_line(capsys)
        assert (tmp_path / "frame_00005.png").exists()
        assert run(*arguments, "--window", "30ms", "--overwrite") == 0
        assert sorted(os.listdir(tmp_path)) == [
            ".progress.pt", "frame_00000.png", "frame_00001.png", "notes.txt", "preview.png", "timestamps.txt",
        ]  # fmt: skip

    def test_stopped_by_the_user(self, recording, checkpoints, tmp_path, capsys, monkeypatch):
        real = job.stream_states

        def stopping(*arguments):
            images = real(*arguments)
            yield next(images)
            yield next(images)
            raise KeyboardInterrupt

        monkeypatch.setattr(job, "stream_states", stopping)
        weights = checkpoints / "firenet.pth"
        assert run(recording, "--weights", weights, "--out", tmp_path, "--window", "10ms") == 130
        assert "stopped: 2 frames" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.glob("frame*")) == ["frame_00000.png", "frame_00001.png"]
        assert len((tmp_path / "timestamps.txt").read_text().splitlines()) == 2

    @pytest.mark.parametrize("name", ["firenet", "e2vid", "cista-tc"])
    def test_killed_then_resumed_gives_the_same_video(self, name, recording, checkpoints, tmp_path, capsys):
        """After four of six frames, the state being that after each: the two that are left are made."""
        script = (
            "import os, signal, sys\n"
            "from evkernels.__main__ import main\n"
            "from evkernels.reconstruct import job\n"
            "job._PROGRESS_SECONDS = 0\n"
            "real = job.Video.add\n"
            "def add(self, *frame):\n"
            "    real(self, *frame)\n"
            "    if len(self._times) == 4:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "job.Video.add = add\n"
            "main(sys.argv[1:])\n"
        )
        weights = checkpoints / f"{name}.pth"
        arguments = [str(a) for a in (recording, "--weights", weights, "--window", "10ms", "--out")]
        killed = [sys.executable, "-c", script, "reconstruct", *arguments, str(tmp_path / "a")]
        assert subprocess.run(killed, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
        assert (tmp_path / "a" / "frame_00003.png").exists()
        assert run(*arguments, tmp_path / "a") == 2
        assert "--resume goes on" in one_line(capsys)
        assert run(*arguments[:-2], "20ms", "--out", tmp_path / "a", "--resume") == 2
        assert "window 10000 instead of 20000" in one_line(capsys)
        assert run(*arguments, tmp_path / "a", "--resume") == 0
        assert "going on after 3 frames" in capsys.readouterr().out
        assert run(*arguments, tmp_path / "b") == 0
        assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
        for path in (tmp_path / "b").iterdir():
            assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name

    def test_resume_without_anything_to_go_on_from(self, recording, checkpoints, tmp_path, capsys, monkeypatch):
        arguments = (recording, "--weights", checkpoints / "firenet.pth", "--out", tmp_path, "--window", "20ms")
        assert run(*arguments, "--resume", "--format", "gif") == 2
        assert "--resume is for numbered frames" in one_line(capsys)
        assert run(*arguments, "--resume") == 0
        assert f"--resume: {tmp_path} holds no frames to go on from" in capsys.readouterr().out
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("frame*")}
        assert run(*arguments, "--resume") == 0
        assert f"going on after {len(before)} frames" in capsys.readouterr().out
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("frame*")} == before
        assert run(*arguments[:-1], "10ms", "--resume") == 2
        assert "holds a video made with window 20000 instead of 10000" in one_line(capsys)
        (tmp_path / ".progress.pt").unlink()
        assert run(*arguments, "--resume") == 2
        assert "holds frames, and not what they were made of" in one_line(capsys)
        # Killed after the last frame: nothing is left to make.
        job.Progress({}).save(tmp_path)
        progress = torch.load(tmp_path / ".progress.pt", weights_only=True)
        frames = len(list(tmp_path.glob("frame*")))
        facts = {"weights": "x", "recording": "x", "window": 20_000, "events_per_frame": None}
        monkeypatch.setattr(reconstruct, "_record", lambda *_: facts)
        torch.save(progress | {"record": facts, "frames": frames}, tmp_path / ".progress.pt")
        assert run(*arguments, "--resume") == 0
        assert f"going on after {frames} frames" in capsys.readouterr().out
        assert len(list(tmp_path.glob("frame*"))) == frames
        torch.save(progress | {"record": facts, "frames": frames + 1}, tmp_path / ".progress.pt")
        assert run(*arguments, "--resume") == 2
        assert f"expected {frames + 1} frames" in one_line(capsys)
        (tmp_path / ".progress.pt").write_bytes(b"noise")
        capsys.readouterr()
        assert run(*arguments, "--resume") == 2
        assert "expected an earlier run's state" in one_line(capsys)
        assert run(*arguments, "--overwrite") == 0
        assert torch.load(tmp_path / ".progress.pt", weights_only=True)["record"] == facts

    def test_failing_write_leaves_no_part_of_a_picture(self, recording, checkpoints, tmp_path, capsys, monkeypatch):
        real = os.replace

        def failing(beside, path):
            if path.name == "frame_00001.png":
                raise OSError(28, "No space left on device")
            real(beside, path)

        monkeypatch.setattr(os, "replace", failing)
        weights = checkpoints / "firenet.pth"
        assert run(recording, "--weights", weights, "--out", tmp_path, "--window", "10ms") == 2
        assert (
            f"--out {tmp_path}: cannot be written to: No space left on device (frame_00001.png)"
            in capsys.readouterr().err
        )
        assert sorted(path.name for path in tmp_path.iterdir() if "frame" in path.name) == ["frame_00000.png"]

    def test_count_of_frames(self, events):
        for window in (1_000, 7_777, 60_000, 10**9):
            assert frame_count(events, window, None) == len(list(events.windows(window)))
        for count in (100, len(events) - 1, len(events), 10**9):
            assert frame_count(events, 1, count) == len(list(events.windows(count=count)))

    @pytest.mark.parametrize("name", ["firenet_convgru.pth", "cista_tc_convlstm.pth.tar"])
    def test_real_recording(self, name, recordings, tmp_path):
        weights = recordings / "checkpoints" / name
        arguments = ("--weights", weights, "--out", tmp_path, "--events-per-frame", 10_000)
        assert run(recordings / "npz" / "slider_depth.npz", *arguments) == 0
        frame = np.asarray(Image.open(recordings / "slider_depth_frames" / "frame_00000004.png").convert("L"))
        image = np.asarray(Image.open(tmp_path / "frame_00000.png"))
        last = np.asarray(Image.open(tmp_path / "frame_00004.png"))
        assert last.shape == frame.shape
        found = [np.corrcoef(frame.ravel(), value.ravel())[0, 1] for value in (image, last)]
        assert found[0] < 0.5 < 0.55 < found[1]


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
