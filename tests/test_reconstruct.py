"""`python -m evkernels reconstruct`: the video that it writes, stopped, killed and resumed."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_videos import NETWORKS, one_line, run, save_checkpoints, save_recording, simulated

from evkernels import reconstruct
from evkernels.events import Events
from evkernels.reconstruct import frame_count, job
from evkernels.reconstruct.stream import IntensityRescaling, stream_images

Image = pytest.importorskip("PIL.Image", reason="reconstruct needs Pillow (extra demo)")


@pytest.fixture(autouse=True)
def _one_thread(same_threads_after):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def events() -> Events:
    return simulated()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return save_recording(tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


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
