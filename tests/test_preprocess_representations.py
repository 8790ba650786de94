"""`evkernels preprocess --representation`: each against its module, windows of events, options, kills in the middle."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from preprocess_files import COLUMNS, frames, random_events, save_h5, save_npz
from test_preprocess_labels import boxes

from evkernels import nn, ops
from evkernels.__main__ import main
from evkernels.events import read
from evkernels.preprocess import windows
from evkernels.preprocess.representations import REPRESENTATIONS, folder
from evkernels.preprocess.settings import Settings

VERSION = "event_representations_v2"


def counts(e, ends):
    sizes = {"height": e.height, "width": e.width}
    return ops.event_histogram(*e.tensors(), bins=1, dtype=torch.int16, **sizes)


def averaged(e, end):
    module = nn.AveragedTimeSurface(e.height, e.width, tau=30_000)
    return module(e).flatten(1).T.reshape(98, *module.grid)


def spikes(e, end):
    torch.manual_seed(end)
    return nn.EventSpikeTensor(3, e.height, e.width, hidden=(6,))(e).detach()


# Options, the folder that they give, and what a window of events becomes.
CASES = {
    "stacked_histogram": (
        ["--bins", "4", "--count-cutoff", "3"],
        "stacked_histogram_dt=20_nbins=4",
        lambda e, end: nn.StackedHistogram(4, e.height, e.width, 3)(e),
    ),
    "mixed_density": (
        ["--count-cutoff", "32"],
        "mixeddensity_stack_dt=20_nbins=10_cutoff=32",
        lambda e, end: nn.MixedDensityEventStack(10, e.height, e.width, 32)(e),
    ),
    "voxel_grid": (
        ["--convention", "dsec", "--normalize", "dsec"],
        "voxel_grid_dt=20_nbins=5_dsec_normalize=dsec",
        lambda e, end: nn.VoxelGrid(5, e.height, e.width, "dsec", "dsec")(e),
    ),
    "time_surface": (
        ["--tau", "7ms"],
        "time_surface_dt=20_tau=7",
        lambda e, end: nn.TimeSurface(e.height, e.width, tau=7000)(e, at=end),
    ),
    "event_counts": ([], "event_counts_dt=20", counts),
    "tore": (
        ["--depth", "2"],
        "tore_dt=20_k=2",
        lambda e, end: nn.TimeOrderedRecentEvents(e.height, e.width, 2)(e, at=end),
    ),
    "hats": (["--tau", "30ms"], "hats_dt=20_tau=30", averaged),
    "est": (["--bins", "3"], "est_dt=20_nbins=3", spikes),
}


def test_every_representation_is_tested():
    assert set(CASES) == set(REPRESENTATIONS)


@pytest.mark.parametrize("name", CASES)
def test_file_equals_the_module(tmp_path, name):
    options, place, make = CASES[name]
    e = random_events(2500, 95_000, width=11, height=7)
    source = save_npz(tmp_path / "a.npz", e)
    run = ["preprocess", str(source), str(tmp_path / "out"), "--window", "20ms", "--representation", name, *options]
    assert main(run) == 0
    data, ends = frames(tmp_path / "out" / "a", f"{VERSION}/{place}")
    expected = [make(e.slice_time(end - 20_000, end + 1), end).numpy() for end in ends.tolist()]
    assert len(ends) == 5
    assert data.dtype == expected[0].dtype
    # A batch sums each window as a call of its own does, normalisation included.
    assert np.array_equal(data, np.stack(expected))
    assert data.any()


@pytest.mark.parametrize("name", CASES)
def test_real_recordings(recordings, tmp_path, name):
    options, place, make = CASES[name]
    source = recordings / "npz" / "dynamic_rotation.npz"
    run = ["preprocess", str(source), str(tmp_path), "--window", "20ms", "--representation", name, *options]
    assert main(run) == 0
    data, ends = frames(tmp_path / source.stem, f"{VERSION}/{place}")
    e = read(source)
    for frame, end in zip(data, ends.tolist(), strict=True):
        assert np.array_equal(frame, make(e.slice_time(end - 20_000, end + 1), end).numpy())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stacked_histogram", ["--tau", "5ms"], "--tau is no option of stacked_histogram"),
        ("stacked_histogram", ["--convention", "dsec"], "--convention is no option of stacked_histogram"),
        ("voxel_grid", ["--count-cutoff", "5"], "--count-cutoff is no option of voxel_grid"),
        ("time_surface", ["--bins", "5"], "--bins is no option of time_surface"),
        ("hats", ["--depth", "5"], "--depth is no option of hats"),
        ("event_counts", ["--normalize", "dsec"], "--normalize is no option of event_counts"),
        ("event_counts", ["--count-cutoff", "40000"], "of event_counts must be at most 32767, got 40000"),
        ("stacked_histogram", ["--count-cutoff", "300"], "must be at most 255, got 300"),
        ("voxel_grid", ["--convention", "none"], "invalid choice"),
        ("voxel_grid", ["--window", "5ms", "--window-events", "5"], "not allowed with"),
    ],
)
def test_options_of_another_representation_are_refused(tmp_path, capsys, name, options, message):
    source = save_npz(tmp_path / "a.npz", random_events(10, 100))
    try:
        code = main(["preprocess", str(source), str(tmp_path / "out"), "--representation", name, *options])
    except SystemExit as end:
        code = end.code
    assert code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def parts_of(cut):
    return [[getattr(part, name).tolist() for name in COLUMNS] for batch, _ in cut for part in batch]


@pytest.mark.parametrize("packet", [1, 7, 64, 100_000])
@pytest.mark.parametrize("count", [1, 13, 64, 200, 5000])
def test_windows_of_events_are_those_of_the_whole(packet, count):
    e = random_events(200, 90)
    cut = list(windows.consecutive(e.windows(count=packet), count, 5))
    assert max(len(batch) for batch, _ in cut) <= 5
    expected = list(e.windows(count=count))
    assert parts_of(cut) == [[getattr(part, name).tolist() for name in COLUMNS] for part in expected]
    assert np.concatenate([ends for _, ends in cut]).tolist() == [int(part.t[-1]) for part in expected]

    cut = list(windows.batches(e.windows(count=packet), windows.ByCount(count), 20, 2))
    ends = np.concatenate([ends for _, ends in cut]).tolist()
    assert ends == list(range(int(e.t[0]) + 20, int(e.t[-1]) + 20, 20))[: len(ends)]
    assert ends[-1] >= e.t[-1]
    last = [e.slice_time(0, end + 1).last(count) for end in ends]
    assert parts_of(cut) == [[getattr(part, name).tolist() for name in COLUMNS] for part in last]


def test_windows_of_events_hold_few_events():
    held = []
    e = random_events(5000, 100_000)
    for batch, _ in windows.batches(e.windows(count=50), windows.ByCount(30), 1000, 100):
        held.append(batch.t.untyped_storage().nbytes() // 8)
    assert max(held) <= 30 * 100 + 50


def test_files_of_windows_of_events(tmp_path):
    e = random_events(2100, 300_000, start=0)
    save_h5(tmp_path / "in" / "drive_td.h5", e)
    np.save(tmp_path / "in" / "drive_bbox.npy", boxes([133_000, 233_000]))
    run = ["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--bins", "2", "--window-events", "500"]
    assert main([*run, "--no-labels"]) == 0
    sequence = tmp_path / "out" / "drive"
    data, ends = frames(sequence, f"{VERSION}/stacked_histogram_ne=500_nbins=2")
    assert data.sum(axis=(1, 2, 3)).tolist() == [500, 500, 500, 500, 100]
    assert ends.tolist() == e.t[[499, 999, 1499, 1999, 2099]].tolist()
    assert main([*run, "--overwrite"]) == 0
    data, ends = frames(sequence, f"{VERSION}/stacked_histogram_ne=500_nbins=2")
    assert ends.tolist() == [83_000, 133_000, 183_000, 233_000]
    assert data.sum(axis=(1, 2, 3)).tolist() == [500] * 4
    assert main([*run, "--stride", "100ms"]) == 0
    data, ends = frames(sequence, f"{VERSION}/stacked_histogram_ne=500_step=100_nbins=2")
    assert ends.tolist() == [133_000, 233_000]


def test_names_are_those_of_rvt():
    assert folder(Settings.of("stacked_histogram")) == "stacked_histogram_dt=50_nbins=10"
    assert folder(Settings.of("mixed_density", count_cutoff=32)) == "mixeddensity_stack_dt=50_nbins=10_cutoff=32"
    assert folder(Settings.of("stacked_histogram", window_events=5000, stride_us=None)) == (
        "stacked_histogram_ne=5000_nbins=10"
    )


# Children end themselves by SIGKILL, which leaves no time to clean up, after half of the recording. They are forked
# from one process that has imported everything and started no threads.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_the_middle_then_run_again_gives_the_same_bytes(tmp_path):
    source = save_h5(tmp_path / "a.h5", random_events(60_000, 1_000_000, start=0, width=320, height=240))
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from evkernels.preprocess import convert\n"
        "from evkernels.preprocess.representations import REPRESENTATIONS\n"
        "from evkernels.preprocess.settings import Settings\n"
        "convert.Recording.__init__.__defaults__ = (None, 10_000)\n"
        "convert._FRAME_BYTES = 2**16\n"
        "def die(done, total):\n"
        "    if done > 30_000:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "source, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for name in REPRESENTATIONS:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        convert.convert(source, out, Settings.of(name), advance=die)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGKILL\n"
    )
    subprocess.run([sys.executable, "-c", script, source, tmp_path / "out" / "a"], check=True)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".partial"] * len(REPRESENTATIONS)
    assert sum(path.stat().st_size for path in left) > 50_000, "nothing was on the disk yet"
    for name in REPRESENTATIONS:
        for out in ("out", "whole"):
            assert main(["preprocess", str(source), str(tmp_path / out), "--representation", name]) == 0
    made = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert len(made) == 2 * len(REPRESENTATIONS)
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == made
    for path in made:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
