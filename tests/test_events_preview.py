"""Animations that read back equal, and `evkernels preview`."""

import numpy as np
import pytest

from evkernels.__main__ import main
from evkernels.events import Events, event_frame, read, representation_frame, save_animation
from evkernels.events.preview import preview

image_library = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def frames_of(path):
    with image_library.open(path) as image:
        result = []
        for index in range(image.n_frames):
            image.seek(index)
            result.append(np.asarray(image.convert("RGB")))
        return result, image.info


def events(count=3000, width=40, height=30):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, width, count).astype(np.uint16), rng.integers(0, height, count).astype(np.uint16)
    t = np.sort(rng.integers(0, 100_000, count)) + 1_633_953_690_975_950
    return Events(x, y, t, rng.integers(0, 2, count, dtype=np.uint8), width, height)


@pytest.mark.parametrize("ending", ["gif", "png", "apng"])
def test_animation_reads_back_equal(tmp_path, ending):
    frames = [event_frame(window) for window in events().windows(duration_us=10_000)]
    save_animation(tmp_path / f"a.{ending}", iter(frames), 70)
    found, info = frames_of(tmp_path / f"a.{ending}")
    assert len(found) == len(frames)
    assert all(np.array_equal(a, b) for a, b in zip(found, frames, strict=True))
    assert (info["duration"], info["loop"]) == (70, 0)


@pytest.mark.parametrize(
    ("name", "frames", "milliseconds", "message"),
    [
        ("a.mp4", [np.zeros((2, 2, 3), np.uint8)], 50, r"must end with \.gif, \.png or \.apng, got a\.mp4"),
        ("a.gif", [], 50, "got none"),
        ("a.gif", [np.zeros((2, 2), np.uint8)], 50, r"got uint8 \[2, 2\]"),
        ("a.gif", [np.zeros((2, 2, 3))], 50, "got float64"),
        ("a.gif", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)], 50, "of one size"),
        ("a.gif", [np.zeros((0, 2, 3), np.uint8)], 50, "with pixels"),
        ("a.gif", [np.zeros((2, 2, 3), np.uint8)], 0, "milliseconds must be at least 1"),
    ],
)
def test_animation_refuses(tmp_path, name, frames, milliseconds, message):
    with pytest.raises(ValueError, match=message):
        save_animation(tmp_path / name, frames, milliseconds)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 7, 40])
def test_preview_shows_every_event_once(count):
    e = events(500)
    frames = list(preview(e, count, 40))
    assert len(frames) == count
    length = -(-(e.duration + 1) // count)
    windows = list(e.windows(duration_us=length))
    assert sum(map(len, windows)) == len(e)
    for frame, window in zip(frames, windows, strict=False):
        assert np.array_equal(frame, event_frame(window))


def test_preview_fits_the_width():
    assert [frame.shape for frame in preview(events(), 2, 39)] == [(15, 20, 3)] * 2
    assert next(preview(events(), 2, 1)).shape == (1, 1, 3)
    with pytest.raises(ValueError, match="events must be at least 1, got 0"):
        list(preview(events(0)))


def test_command(recordings, tmp_path, capsys):
    source, out = recordings / "npz" / "evt2_expelliarmus.npz", tmp_path / "a.gif"
    assert main(["preview", str(source), str(out), "--frames", "5", "--flip", "--drop-hot-pixels"]) == 0
    shown = capsys.readouterr().out
    assert "hot pixels" in shown
    assert "5 frames of 10.001 ms, at 0.2 times real speed" in shown
    assert frames_of(out)[0][0].shape == (240, 320, 3)
    for path in (recordings / "npz").glob("*.npz"):
        assert main(["preview", str(path), str(tmp_path / f"{path.stem}.png"), "--frames", "2"]) == 0
        assert frames_of(tmp_path / f"{path.stem}.png")[0]
        assert read(path).width >= frames_of(tmp_path / f"{path.stem}.png")[0][0].shape[1]


@pytest.mark.parametrize(
    "representation", ["stacked_histogram", "mixed_density", "voxel_grid", "time_surface", "event_counts"]
)
def test_command_on_representations(tmp_path, capsys, representation):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
    e = events(2000)
    np.savez(tmp_path / "a.npz", x=e.x, y=e.y, t=e.t, p=e.p, width=e.width, height=e.height)
    made = ["preprocess", str(tmp_path / "a.npz"), str(tmp_path / "out"), "--representation", representation]
    assert main([*made, "--window", "10ms"]) == 0
    (source,) = (tmp_path / "out").rglob("event_representations.h5")
    assert main(["preview", str(source), str(tmp_path / "a.png"), "--width", "20"]) == 0
    assert "10 frames of " in capsys.readouterr().out
    with h5py.File(source) as file:
        data = file["data"][:].astype(np.float64)
    small = data.reshape(*data.shape[:2], 15, 2, 20, 2).sum(axis=(3, 5))
    found, _ = frames_of(tmp_path / "a.png")
    assert len(found) == 10
    assert all(np.array_equal(a, representation_frame(b)) for a, b in zip(found, small, strict=True))
    assert any((picture != 255).any() for picture in found)
    assert main(["preview", str(source), str(tmp_path / "b.png"), "--flip"]) == 2
    source.write_bytes(b"noise")
    assert main(["preview", str(source), str(tmp_path / "b.png")]) == 2
    assert "expected an HDF5 file with frames" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("none.npz", "a.gif", "no such file"),
        ("noise.npz", "a.gif", "expected an .npz archive"),
        ("good.npz", "a.mp4", "must end with .gif"),
        ("good.npz", "no/folder/a.gif", "No such file"),
    ],
)
def test_command_refuses_with_one_line(tmp_path, capsys, source, out, message):
    e = events(50)
    np.savez(tmp_path / "good.npz", x=e.x, y=e.y, t=e.t, p=e.p)
    (tmp_path / "noise.npz").write_bytes(b"PK noise")
    assert main(["preview", str(tmp_path / source), str(tmp_path / out)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown
    assert not (tmp_path / out).exists()
