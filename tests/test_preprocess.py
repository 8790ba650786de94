"""`evkernels preprocess`: what is in the files, which windows, bad recordings, reruns and kills, memory, workers."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from evkernels import arguments, ops
from evkernels.__main__ import main
from evkernels.events import Events, read
from evkernels.preprocess import convert, windows, writer
from evkernels.preprocess.settings import Settings

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pool = importlib.import_module("evkernels.preprocess.pool")

EPOCH = 1_633_953_690_975_950
FOLDER = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
COLUMNS = ("x", "y", "t", "p")


def events(t, width=8, height=6, seed=0):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, size, len(t)).astype(np.uint16) for size in (width, height))
    return Events(x, y, np.asarray(t, np.int64), rng.integers(0, 2, len(t), dtype=np.uint8), width, height)


def random_events(count, duration, start=EPOCH, **sizes):
    return events(start + np.sort(np.random.default_rng(1).integers(0, duration, count)), **sizes)


def save_npz(path, e):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: getattr(e, name) for name in COLUMNS}, width=e.width, height=e.height)
    return path


def save_h5(path, e, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name in COLUMNS:
            file[f"events/{name}"] = getattr(e, name)
        file["events/width"], file["events/height"] = e.width, e.height
        for name, value in more.items():
            file[name] = value
    return path


def frames(sequence, folder=FOLDER, file="event_representations.h5"):
    """Frames and end times, read in a process that knows nothing of this package, as a data loader does."""
    script = (
        "import sys, h5py, hdf5plugin, numpy as np\n"
        "file = h5py.File(sys.argv[1], 'r')\n"
        "assert file['data'].chunks == (1, *file['data'].shape[1:])\n"
        "codes = [file['data'].id.get_create_plist().get_filter(0)[0]]\n"
        "assert codes == [32001], codes\n"
        "assert not any(name.startswith('evkernels') for name in sys.modules)\n"
        "np.save(sys.argv[2], file['data'][:])\n"
    )
    copy = sequence / "read.npy"
    subprocess.run([sys.executable, "-I", "-c", script, sequence / folder / file, copy], check=True)
    data = np.load(copy)
    copy.unlink()
    return data, np.load(sequence / folder / "timestamps_us.npy")


def expected(e, ends, window=50_000, bins=10, cutoff=255):
    """One call of the op per window of RVT's kind: both borders belong to it."""
    result = []
    for end in ends.tolist():
        x, y, t, p = e.slice_time(end - window, end + 1).tensors()
        sizes = dict(bins=bins, height=e.height, width=e.width, count_cutoff=cutoff)
        result.append(ops.event_histogram(x, y, t, p, **sizes).numpy())
    return np.stack(result)


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


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


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


def test_rerun_skips_and_other_settings_do_not_pass_for_it(tmp_path, capsys):
    source = save_npz(tmp_path / "a.npz", random_events(300, 60_000))
    run = ["preprocess", str(source), str(tmp_path / "out")]
    target = tmp_path / "out" / "a" / FOLDER / "event_representations.h5"
    assert main(run) == 0
    before = target.stat().st_mtime_ns
    assert main(run) == 0
    assert "skipped, finished before" in capsys.readouterr().out
    assert target.stat().st_mtime_ns == before
    assert main([*run, "--count-cutoff", "2"]) == 1
    assert "count_cutoff None instead of 2; --overwrite replaces it" in capsys.readouterr().err
    save_npz(source, random_events(301, 60_000))
    assert main(run) == 1
    assert "source_bytes" in capsys.readouterr().err
    assert main([*run, "--overwrite"]) == 0
    assert frames(tmp_path / "out" / "a")[0].sum() >= 301
    target.write_bytes(b"not HDF5")
    assert main(run) == 1
    assert "not of this program" in capsys.readouterr().err


def test_no_more_workers_than_recordings_left(tmp_path, capsys, monkeypatch):
    started = []

    @contextmanager
    def here(jobs, scheduler, recordings):
        started.append((jobs, scheduler, recordings))
        yield None

    monkeypatch.setattr(pool, "workers", here)
    for name in "ab":
        save_npz(tmp_path / "in" / f"{name}.npz", random_events(300, 60_000))
    run = ["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "3"]
    assert main(run) == 0
    assert main(run) == 0
    assert started == [(3, None, 2)]
    assert "2 recordings: 2 finished before" in capsys.readouterr().out
    for name in "cd":
        save_npz(tmp_path / "in" / f"{name}.npz", random_events(300, 60_000))
    assert main([*run[:-1], "2"]) == 0
    assert main([*run, "--overwrite"]) == 0
    assert started[1:] == [(2, None, 2), (3, None, 4)]


@pytest.mark.parametrize(("jobs", "recordings"), [(4, 1), (1, 4)])
def test_one_job_or_one_recording_needs_no_worker(jobs, recordings):
    with pool.workers(jobs, None, recordings) as executor:
        assert executor is None


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


def test_two_runs_do_not_write_one_file(tmp_path, capsys):
    source = save_npz(tmp_path / "a.npz", random_events(300, 60_000))
    target = tmp_path / "out" / "a" / FOLDER / "event_representations.h5"
    with writer.RepresentationWriter(target, (1, 2, 2), np.uint8, {}):
        assert main(["preprocess", str(source), str(tmp_path / "out")]) == 1
        assert "another run is writing it" in capsys.readouterr().err
        assert target.with_name(target.name + ".partial").exists()
    assert not list(target.parent.iterdir())
    assert main(["preprocess", str(source), str(tmp_path / "out")]) == 0


# Kills and memory need processes of their own.


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory):
    """250 windows of 1.2 MB of frame and 12,000 events each; beside it lies a short one, for another worker."""
    e = random_events(3_000_000, 12_500_000, start=0, width=320, height=192)
    folder = tmp_path_factory.mktemp("long") / "in"
    save_npz(folder / "short.npz", random_events(300, 60_000))
    return save_h5(folder / "long.h5", e)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, long_recording):
    """Results of the long recording, made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["preprocess", str(long_recording), str(folder)]) == 0
    return folder / "long" / FOLDER


@pytest.mark.parametrize(("jobs", "how"), [("1", signal.SIGKILL), ("2", signal.SIGKILL), ("1", signal.SIGINT)])
def test_ended_in_the_middle_then_run_again_gives_the_same_bytes(tmp_path, long_recording, whole, jobs, how):
    folder = tmp_path / "long" / FOLDER
    run = ["preprocess", str(long_recording.parent), str(tmp_path), "--jobs", jobs]
    # A session in the background of a script ignores SIGINT, and its children with it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen([sys.executable, "-m", "evkernels", *run], stdout=subprocess.DEVNULL, preexec_fn=heed)
    unfinished = folder / "event_representations.h5.partial"
    deadline = time.monotonic() + 120
    while not (unfinished.exists() and unfinished.stat().st_size > 1_000_000):
        assert child.poll() is None, "it ended before it could be ended"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(how)
    assert child.wait() == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert [path.name for path in folder.iterdir()] == ([] if how == signal.SIGINT else [unfinished.name])
    if jobs != "1":
        time.sleep(0.5)
        left = unfinished.stat().st_size
        time.sleep(0.5)
        assert unfinished.stat().st_size == left, "a worker outlived the process that started it"
    assert main([*run[:3]]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["event_representations.h5", "timestamps_us.npy"]
    for path in folder.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes()


def test_memory_does_not_grow_with_the_recording(tmp_path, long_recording):
    script = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "import h5py, hdf5plugin, torch\n"
        "from evkernels.preprocess import convert\n"
        "from evkernels.preprocess.settings import Settings\n"
        "convert.convert(Path(sys.argv[1]), Path(sys.argv[3]), Settings())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "result = convert.convert(Path(sys.argv[2]), Path(sys.argv[4]), Settings())\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([result.windows, (after - before) * 1024]))\n"
    )
    # As many events as a packet and as many windows as a batch hold, so that only the length of the other is new.
    short = save_h5(tmp_path / "short.h5", random_events(2_300_000, 9_000_000, start=0, width=320, height=192))
    paths = [str(path) for path in (short, long_recording, tmp_path / "a", tmp_path / "b")]
    done = subprocess.run([sys.executable, "-c", script, *paths], check=True, capture_output=True, text=True)
    count, growth = json.loads(done.stdout)
    assert count == 250
    # The frames of the long recording take 307 MB, its events 39 MB.
    assert growth < 40_000_000


def test_dask_cluster(tmp_path, capsys):
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    for name in ("a", "b"):
        save_npz(tmp_path / "in" / f"{name}.npz", random_events(500, 110_000))
    BAD["cut.h5"](tmp_path / "in" / "bad.h5")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    run = ["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--scheduler", cluster.scheduler_address]
    with cluster:
        assert main(run) == 2
        assert "2 written, 1 bad input" in capsys.readouterr().out.replace(
            "1 bad input, 2 written", "2 written, 1 bad input"
        )
        assert main(run) == 2
        assert "2 finished before" in capsys.readouterr().out
    for name in ("a", "b"):
        data, ends = frames(tmp_path / "out" / name)
        assert np.array_equal(data, expected(read(tmp_path / "in" / f"{name}.npz"), ends))


def test_cluster_without_workers_says_that_it_waits(capsys):
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    cluster = distributed.LocalCluster(n_workers=0, dashboard_address=None)
    with cluster, pool.workers(1, cluster.scheduler_address, 2) as executor:
        assert f"--scheduler {cluster.scheduler_address} has no workers yet" in capsys.readouterr().out
        assert executor is not None


def test_scheduler_that_does_not_answer(tmp_path, capsys, monkeypatch):
    pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    monkeypatch.setattr(pool, "_CONNECT_SECONDS", 1)
    save_npz(tmp_path / "a.npz", events([1, 2]))
    address = "tcp://127.0.0.1:9"
    assert main(["preprocess", str(tmp_path / "a.npz"), str(tmp_path / "out"), "--scheduler", address]) == 2
    assert f"--scheduler {address}: expected a Dask scheduler" in capsys.readouterr().err


class Executor:
    """Every recording ends with the next of the given outcomes."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def submit(self, function, source, *more):
        future, outcome = Future(), self.outcomes.pop(0)
        if outcome is None:
            future.cancel()
            future.set_running_or_notify_cancel()
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(function(source, *more))
        return future


def test_lost_workers_and_faults_are_told_and_others_go_on(tmp_path, capsys):
    pairs = [(save_npz(tmp_path / f"{name}.npz", random_events(300, 60_000)), tmp_path / name) for name in "abcd"]
    executor = Executor(BrokenProcessPool("gone"), None, ZeroDivisionError("a fault"), "made")
    assert pool.run(pairs, Settings(), False, lambda recordings: nullcontext(executor)) == 1
    shown = capsys.readouterr()
    assert "3 failed" in shown.out
    assert "1 written" in shown.out
    assert f"{pairs[0][0]}: its worker was lost; the same command goes on" in shown.err
    assert f"{pairs[1][0]}: its worker was lost" in shown.err
    assert f"{pairs[2][0]}: ZeroDivisionError: a fault" in shown.err


def test_progress_reaches_the_end(tmp_path):
    source = save_npz(tmp_path / "a.npz", random_events(500, 110_000))
    heard = []
    convert.convert(source, tmp_path / "out", Settings(), advance=lambda *done: heard.append(done))
    assert heard[-1] == (500, 500)
