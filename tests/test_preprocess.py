"""`evkernels preprocess`: what is in the files, and of which windows."""

import numpy as np
import pytest
import torch
from preprocess_files import COLUMNS, events, expected, frames, random_events, save_h5, save_npz

from evkernels.__main__ import main
from evkernels.events import Events, read
from evkernels.preprocess import convert, windows
from evkernels.preprocess.settings import Settings


def test_file_equals_the_op(tmp_path, capsys):
    e = random_events(3000, 420_000)
    save_npz(tmp_path / "in" / "a.npz", e)
    assert main(["preprocess", str(tmp_path / "in" / "a.npz"), str(tmp_path / "out"), "--count-cutoff", "3"]) == 0
    data, ends = frames(tmp_path / "out" / "a")
    assert (data.dtype, data.shape) == (np.uint8, (9, 20, 6, 8))
    assert ends.tolist() == [int(e.t[0]) + 50_000 * (k + 1) for k in range(9)]
    assert np.array_equal(data, expected(e, ends, cutoff=3))
    assert "3,000 events in 9 windows" in capsys.readouterr().out


def test_real_recordings(recordings, tmp_path):
    assert main(["preprocess", str(recordings / "npz"), str(tmp_path), "--count-cutoff", "10"]) == 0
    for path in (recordings / "npz").glob("*.npz"):
        data, ends = frames(tmp_path / path.stem)
        e = read(path)
        assert ends[-1] >= e.t[-1]
        assert np.array_equal(data, expected(e, ends, cutoff=10)), path.name


@pytest.mark.parametrize(
    ("name", "npz"), [("evt2_spinner.raw", "evt2_expelliarmus"), ("evt3_street_hd.raw", "evt3_expelliarmus")]
)
def test_camera_formats(recordings, tmp_path, name, npz):
    pytest.importorskip("eventcv", reason="eventcv is not installed")
    original, e = recordings / "original" / name, read(recordings / "npz" / f"{npz}.npz")
    sensor = f"{e.width}x{e.height}"
    run = ["preprocess", str(original), str(tmp_path), "--bins", "2", "--window", "10ms", "--sensor", sensor]
    assert main(run) == 0
    data, ends = frames(tmp_path / original.stem, "event_representations_v2/stacked_histogram_dt=10_nbins=2")
    assert np.array_equal(data, expected(e, ends, 10_000, 2))


@pytest.mark.parametrize("factor", [2, 3])
def test_downsampling_is_nearest_exact_interpolation(tmp_path, factor):
    e = random_events(4000, 120_000, width=13, height=9)
    save_npz(tmp_path / "a.npz", e)
    arguments = [str(tmp_path / "a.npz"), str(tmp_path / "out")]
    assert main(["preprocess", *arguments]) == 0
    assert main(["preprocess", *arguments, "--downsample", str(factor)]) == 0
    whole, _ = frames(tmp_path / "out" / "a")
    small, _ = frames(tmp_path / "out" / "a", file=f"event_representations_ds{factor}_nearest.h5")
    size = (9 // factor, 13 // factor)
    cut = torch.from_numpy(whole)[..., : size[0] * factor, : size[1] * factor]
    assert torch.equal(torch.from_numpy(small), torch.nn.functional.interpolate(cut, size, mode="nearest-exact"))
    assert small.sum() > 0


@pytest.mark.parametrize("packet", [1, 7, 64, 100_000])
@pytest.mark.parametrize(("window", "stride"), [(50, 50), (70, 30), (20, 45), (1, 1), (100_000, 9)])
def test_streaming_cuts_the_same_windows_as_the_whole(packet, window, stride):
    e = random_events(200, 900)
    cut = list(windows.batches(e.windows(count=packet), windows.ByTime(window), stride, 5))
    ends = np.concatenate([ends for _, ends in cut])
    assert max(len(batch) for batch, _ in cut) <= 5
    begin, last = int(e.t[0]), int(e.t[-1])
    assert ends.tolist() == list(range(begin + window, begin + window + stride * len(ends), stride))
    parts = [[getattr(part, name).tolist() for name in COLUMNS] for batch, _ in cut for part in batch]
    slices = [e.slice_time(end - window, end + 1) for end in ends.tolist()]
    assert parts == [[getattr(part, name).tolist() for name in COLUMNS] for part in slices]
    # The recording is covered, and no window is more than that takes.
    assert ends[-1] >= last or ends[-1] + stride - window > last
    assert ends[-1] - window <= last
    assert len(ends) == 1 or ends[-2] < last


@pytest.mark.parametrize("packet", [1, 3, 1000])
def test_windows_with_given_ends(packet):
    e = events([100, 110, 200, 200, 350])
    ends = np.array([50, 110, 120, 200, 900])
    cut = list(windows.batches(e.windows(count=packet), windows.ByTime(20), 20, 2, ends))
    assert [part.t.tolist() for batch, _ in cut for part in batch] == [[], [100, 110], [100, 110], [200, 200], []]
    assert np.concatenate([times for _, times in cut]).tolist() == ends.tolist()


def test_windows_without_events_are_zeros(tmp_path):
    e = events([0, 10, 400_000, 400_001])
    save_npz(tmp_path / "a.npz", e)
    assert main(["preprocess", str(tmp_path / "a.npz"), str(tmp_path / "out")]) == 0
    data, ends = frames(tmp_path / "out" / "a")
    assert data.sum(axis=(1, 2, 3)).tolist() == [2, 0, 0, 0, 0, 0, 0, 1, 2]  # t = 400,000 is a border
    assert len(ends) == 9


def test_rvt_tree_with_times_that_step_back(tmp_path, capsys):
    e = random_events(500, 120_000, start=0)
    t = e.t.copy()
    t[100:103] = t[:3]
    late = Events(e.x, e.y, t, e.p, e.width, e.height)
    save_h5(tmp_path / "in" / "train" / "drive_td.dat.h5", late)
    save_h5(tmp_path / "in" / "val" / "walk_td.h5", e, t_offset=7_000_000)
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 0
    assert "3 of 500 events are earlier than one before" in " ".join(capsys.readouterr().out.split())
    data, ends = frames(tmp_path / "in" / "out" / "train" / "drive")
    raised = Events(e.x, e.y, np.maximum.accumulate(t), e.p, e.width, e.height)
    assert np.array_equal(data, expected(raised, ends))
    shifted = Events(e.x, e.y, e.t + 7_000_000, e.p, e.width, e.height)
    data, ends = frames(tmp_path / "in" / "out" / "val" / "walk")
    assert np.array_equal(data, expected(shifted, ends))
    # Results inside the source are no recordings.
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 0
    assert "2 finished before" in capsys.readouterr().out


def test_progress_reaches_the_end(tmp_path):
    source = save_npz(tmp_path / "a.npz", random_events(500, 110_000))
    heard = []
    convert.convert(source, tmp_path / "out", Settings(), advance=lambda *done: heard.append(done))
    assert heard[-1] == (500, 500)
