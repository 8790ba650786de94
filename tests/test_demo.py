"""The main job, small: what it writes, its exit codes, one line for bad input, and that it finds planted faults."""

import argparse
import builtins
import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="the demo needs rich (extra demo)")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib (extra demo)")

from evkernels import arguments, backends, demo
from evkernels.demo import comparison, pictures, stages, training
from evkernels.events import Events, simulate
from evkernels.ops.registration import default_kernels

PICTURES = ("event_frame.png", "prediction.png", "loss_curves.png", "stage_times.png")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(stages, "_SECONDS_PER_STAGE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def brief(monkeypatch):
    """Without what test_writes_report_and_pictures looks at: pictures, times, and long sequences of many crops."""
    monkeypatch.setattr(pictures, "_save", lambda figure, path: None)
    monkeypatch.setattr(stages, "medians", lambda calls, *_: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(training, "_BATCH", 1)
    monkeypatch.setattr(training, "_UNROLL", 2)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A simulated recording as a file."""
    image = np.random.default_rng(0).random((60, 70)).repeat(2, 0).repeat(2, 1)
    events = simulate(image, width=40, height=34, duration_us=60_000)
    path = tmp_path_factory.mktemp("recording") / "small.npz"
    np.savez(path, x=events.x, y=events.y, t=events.t, p=events.p, width=40, height=34)
    return path


def run(out, *arguments) -> int:
    """The exit code of `python -m evkernels demo ARGUMENTS --out OUT`."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([*map(str, arguments), "--out", str(out)]))


def one_line(capsys) -> str:
    """What was written to standard error, which must be one line and all there is."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("evkernels demo: ")
    return captured.err


def test_writes_report_and_pictures(recording, tmp_path, capsys):
    assert run(tmp_path / "new" / "out", recording, "--windows", 6, "--steps", 3) == 0
    out = tmp_path / "new" / "out"
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "**everything agreed**" in report
    for text in ("| event histogram | 0 |", "| encoder 5 |", "| ConvLSTM |", "| whole network |", "40x34", *PICTURES):
        assert text in report
    shown = capsys.readouterr()
    assert "everything agreed" in shown.out
    assert "loss curves agree" in shown.out
    assert "\x1b" not in shown.out, "escape codes where nobody is watching"
    assert shown.err == ""


def test_needs_no_recording(brief, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the simulation needs a photograph from scikit-image (extra demo)")
    assert run(tmp_path, "--sensor", "33x21", "--windows", 6, "--steps", 2) == 0
    assert "simulated camera pan" in capsys.readouterr().out


def wrong(op, change):
    """A backend of references in which the first result of `op` is changed."""

    def kernel(*arguments):
        result = default_kernels[op](*arguments)
        return change(result) if isinstance(result, torch.Tensor) else (change(result[0]), *result[1:])

    backends.add_backend("wrong", "cpu", lambda name: kernel if name == op else default_kernels.get(name))
    return backends.use_backend("wrong")


def one_more_event(histogram):
    histogram = histogram.clone()
    histogram.view(-1)[7] += 1
    return histogram


FAULTS = {
    "event_histogram": (one_more_event, "event histogram"),
    "lstm_gates": (lambda h: h * (1 + 1e-5), "ConvLSTM"),
    "separable_conv2d": (lambda y: y.where(y != y.max(), float("nan")), "encoder 1"),
    "depthwise_conv2d_backward": (lambda grad: grad * 1.001, "gradient of encoder 1"),
    "lstm_gates_backward": (lambda grad: grad * 1.0001, "gradient of ConvLSTM"),
}


@pytest.mark.parametrize("op", FAULTS)
def test_finds_planted_faults(op, brief, recording, tmp_path, capsys):
    change, where = FAULTS[op]
    with wrong(op, change):
        assert run(tmp_path, recording, "--windows", 6, "--steps", 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("DISAGREED: ")
    assert where in lines[-1]
    stage = where.removeprefix("gradient of ")
    rows = [line for line in lines if line.strip().startswith(stage) and line.endswith("NO")]
    assert rows
    assert not any("x " in row for row in rows), "a wrong result has no speed"
    assert "**DISAGREED: " in (tmp_path / "report.md").read_text()


def test_finds_diverging_loss_curves():
    runs = {form: training.Run(form, None, None, losses=list(losses)) for form, losses in (
        ("fused", (0.5, 0.4, 0.3001)), ("reference", (0.5, 0.4, 0.3)), ("PyTorch", (0.5, 0.4, 0.300001)),
    )}  # fmt: skip
    allowed = training._allowed(runs, runs["reference"].losses)
    assert allowed[2] == pytest.approx(training.FACTOR * 1e-6, rel=0.1)

    def agree(difference):
        return training.Training(runs, difference, allowed, [], {}).curves_agree

    assert agree([0.0, 0.0, 1e-6])
    assert not agree([0.0, 0.0, 1e-4])
    assert not agree([0.0, 0.0, float("nan")])


def test_nan_disagrees():
    ones = torch.ones(3)
    assert comparison.judge("", [ones], [ones], ones.double()).agrees
    assert not comparison.judge("", [ones, ones * float("nan")], [ones], ones.double()).agrees
    assert not comparison.judge("", [ones + 1e-5], [ones], ones.double()).agrees


def test_cutting_covers_every_event():
    events = simulate(np.random.default_rng(0).random((60, 70)), width=40, height=34, duration_us=60_000)
    for count in (6, 7, 59):
        windows, duration, notes = stages.cut(events, count)
        assert len(windows) == count
        assert sum(len(window) for window in windows) == len(events)
        assert all(window.duration < duration for window in windows)
        assert notes == []


def test_cutting_shortens_long_recordings(monkeypatch):
    events = simulate(np.random.default_rng(0).random((60, 70)), width=40, height=34, duration_us=60_000)
    monkeypatch.setattr(stages, "_MOST_EVENTS", 1000)
    windows, _, notes = stages.cut(events, 6)
    assert 0 < sum(len(window) for window in windows) <= 1000
    assert "the first" in notes[0]


def test_region_has_the_most_events():
    histogram = torch.zeros(2, 3, 40, 60, dtype=torch.uint8)
    histogram[..., 25:30, 42:50] = 9
    rows, columns = stages.region(histogram, 16, 20)
    assert rows.stop - rows.start == 16
    assert columns.stop - columns.start == 20
    assert histogram[..., rows, columns].sum() == histogram.sum()
    assert stages.region(histogram, 100, 100) == (slice(0, 40), slice(0, 60))


def arrays(**changes):
    given = {"x": [1, 2, 3] * 20, "y": [3, 2, 1] * 20, "t": list(range(0, 6000, 100)), "p": [0, 1, 1] * 20}
    return {name: np.array(values) for name, values in (given | {"width": 32, "height": 32} | changes).items()}


def damaged(path, kind):
    if kind == "missing":
        return path / "nothing.npz"
    if kind == "folder":
        return path
    if kind == "unknown":
        (path / "recording.mp4").write_bytes(b"x")
        return path / "recording.mp4"
    file = path / "recording.npz"
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "no archive":
        file.write_bytes(gzip.compress(b"t x y p"))
    elif kind == "truncated":
        np.savez(file, **arrays())
        file.write_bytes(file.read_bytes()[:500])
    elif kind == "no events":
        np.savez(file, **arrays(**{name: np.zeros(0, int) for name in "xytp"}))
    elif kind == "outside":
        np.savez(file, **arrays(x=[40] * 60))
    elif kind == "one instant":
        np.savez(file, **arrays(t=[5] * 60))
    elif kind == "tiny sensor":
        np.savez(file, **arrays(width=15, height=32))
    elif kind == "huge sensor":
        np.savez(file, **arrays(width=5000, height=5000))
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "a folder"),
        ("unknown", "expected one of"),
        ("empty", "empty file"),
        ("no archive", "recording.npz"),
        ("truncated", "recording.npz"),
        ("no events", "got none"),
        ("outside", "60 of 60 outside"),
        ("one instant", "within 0 microseconds"),
        ("tiny sensor", "at least 16x16"),
        ("huge sensor", "at most 4000000 pixels"),
    ],
)
def test_bad_recordings_end_in_one_line(kind, message, tmp_path, capsys):
    assert run(tmp_path / "out", damaged(tmp_path, kind)) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sensor", "10x10"], "at least 16x16"),
        (["--sensor", "2000x100"], "--sensor 2000x100"),
        (["--windows", "3"], "--windows must be at least 6, got 3"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, tmp_path, capsys):
    assert run(tmp_path, *arguments) == 2
    assert message in one_line(capsys)


def test_sensor_smaller_than_the_recording(recording, tmp_path, capsys):
    assert run(tmp_path, recording, "--sensor", "10x10") == 2
    assert "10x10" in one_line(capsys)


@pytest.mark.parametrize("text", ["346", "axb", "0x10", "-1x5", "3x4x5", ""])
def test_sensor_must_be_two_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be WxH"):
        arguments.sensor(text)


def test_output_folder_that_is_a_file(recording, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", recording) == 2
    assert f"--out {tmp_path / 'file'}: cannot be written to: it is a file" in one_line(capsys)


def test_full_disk_ends_in_one_line(recording, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "report.md"))

    monkeypatch.setattr("evkernels.demo.job.main_job", full)
    assert run(tmp_path / "out", recording) == 2
    assert "cannot be written to: No space left on device (report.md)" in one_line(capsys)


@pytest.mark.parametrize("library", ["rich", "matplotlib"])
def test_missing_library_names_the_extra(library, recording, tmp_path, capsys, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        "importlib.import_module",
        lambda name, *rest: (
            (_ for _ in ()).throw(ImportError(f"No module named {name!r}")) if name == library else real(name)
        ),
    )
    assert run(tmp_path, recording) == 2
    assert "pip install 'evkernels[demo]'" in one_line(capsys)


def test_unsorted_recordings_are_sorted_and_said_to_be(tmp_path, capsys):
    file = tmp_path / "unsorted.npz"
    np.savez(file, **arrays(t=list(range(6000, 0, -100))))
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    events, notes = demo._events(parser.parse_args([str(file)]))
    assert isinstance(events, Events)
    assert events.is_sorted
    assert "earlier than the one before" in notes[0]
