"""`evkernels preprocess`: bad recordings, arguments, missing libraries and full disks are one line each."""

import os
import resource
import signal
import sys

import numpy as np
import pytest
from preprocess_files import events, frames, random_events, save_h5, save_npz, truncated

from evkernels import arguments
from evkernels.__main__ import main

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

BAD = {
    "empty.npz": lambda path: path.write_bytes(b""),
    "noise.h5": lambda path: path.write_bytes(os.urandom(1000)),
    "cut.h5": lambda path: truncated(save_h5(path, random_events(50_000, 9000))),
    "cut.npz": lambda path: truncated(save_npz(path, random_events(50_000, 9000))),
    "nothing.h5": lambda path: save_h5(path, random_events(0, 10)),
    "lengths.h5": lambda path: _unequal(path),
    "outside.h5": lambda path: _outside(path),
    "damaged_time.npz": lambda path: save_npz(path, events([0, 2**60])),
    "damaged_far.npz": lambda path: save_npz(path, events([0, 2**62 + 1])),
    "damaged_coordinate.npz": lambda path: save_npz(path, events([0, 1], width=60_000, height=60_000)),
}


def _unequal(path):
    save_h5(path, random_events(10, 100))
    with h5py.File(path, "a") as file:
        del file["events/x"]
        file["events/x"] = np.zeros(9, np.uint16)


def _outside(path):
    save_h5(path, random_events(10, 100))
    with h5py.File(path, "a") as file:
        file["events/x"][4] = 33014


@pytest.mark.parametrize("name", BAD)
def test_bad_recordings_are_one_line_and_exit_code_2(tmp_path, capsys, name):
    BAD[name](tmp_path / name)
    assert main(["preprocess", str(tmp_path / name), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1, shown.err
    assert f"evkernels preprocess: {tmp_path / name}: expected" in shown.err
    assert "bad input" in shown.out
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_others_of_a_directory_go_on(tmp_path, capsys, jobs):
    for name in ("a", "c"):
        save_npz(tmp_path / "in" / f"{name}.npz", random_events(300, 60_000))
    BAD["noise.h5"](tmp_path / "in" / "b.h5")
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", jobs]) == 2
    shown = capsys.readouterr()
    assert "3 recordings:" in shown.out
    assert "2 written" in shown.out
    assert "1 bad input" in shown.out
    assert shown.err.count("\n") == 1
    for name in ("a", "c"):
        assert len(frames(tmp_path / "out" / name)[0]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--jobs", "0"], "--jobs: must be a whole number of at least 1, got '0'"),
        (["--window", "50"], "must be whole microseconds, such as 50ms"),
        (["--sensor", "5by6"], "must be WxH"),
        (["--representation", "x"], "invalid choice"),
        (["--pattern", "*.nothing"], "expected recordings named *.nothing"),
        (["--bins", "100000"], "--bins must be at most 1000"),
        (["--jobs", "2", "--scheduler", "tcp://a:1"], "exclude each other"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, more, message):
    save_npz(tmp_path / "in" / "a.npz", events([1, 2]))
    try:
        code = main(["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), *more])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("library", "extra", "more"),
    [
        ("hdf5plugin", "preprocess", []),
        ("rich", "preprocess", []),
        ("distributed", "dask", ["--scheduler", "tcp://a:1"]),
    ],
)
def test_missing_library_is_named_with_its_extra(tmp_path, capsys, monkeypatch, library, extra, more):
    save_npz(tmp_path / "a.npz", events([1, 2]))
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["preprocess", str(tmp_path / "a.npz"), str(tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr().err
    assert f"needs the library {library}" in shown
    assert f"pip install 'evkernels[{extra}]'" in shown
    assert shown.count("\n") == 1


def test_no_source_and_two_recordings_of_one_name(tmp_path, capsys):
    assert main(["preprocess", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    save_npz(tmp_path / "in" / "a.npz", events([1]))
    save_h5(tmp_path / "in" / "a.h5", events([1]))
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "would share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("50ms", 50_000), ("2.5ms", 2500), ("1 s", 1_000_000), ("7us", 7), ("0.001ms", 1)]
)
def test_durations(text, value):
    assert arguments.duration(text) == value


@pytest.mark.parametrize("text", ["", "0ms", "-1ms", "0.5us", "1m", "50", "1e3us", "ms"])
def test_durations_refused(text):
    with pytest.raises(Exception, match="whole microseconds"):
        arguments.duration(text)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    source = save_npz(tmp_path / "a.npz", random_events(20_000, 600_000, width=64, height=64))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Past this size of a file, writing fails as on a full disk.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        code = main(["preprocess", str(source), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    assert f"{source}: {tmp_path / 'out' / 'a'} cannot be written to: File too large" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert main(["preprocess", str(source), str(tmp_path / "out")]) == 0
