"""`evkernels preprocess` run again, killed, twice at once and by many workers; the memory that it takes."""

import json
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
from preprocess_files import FOLDER, events, expected, frames, random_events, save_h5, save_npz, truncated

from evkernels.__main__ import main
from evkernels.events import read
from evkernels.preprocess import pool, writer
from evkernels.preprocess.settings import Settings


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
    truncated(save_h5(tmp_path / "in" / "bad.h5", random_events(50_000, 9000)))
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
