"""Readers: round trips of small files of every format, order of times, size of the sensor."""

import subprocess
import sys

import numpy as np
import pytest
from small_recordings import (
    EPOCH,
    RAW,
    SMALL,
    assert_small,
    evt3_payload,
    need,
    refused,
    text,
    write_hdf5,
    write_mat,
    write_npz,
    write_text,
    write_zip,
)

from evkernels.events import read


def test_npz(tmp_path):
    assert_small(read(write_npz(tmp_path / "a.npz")))
    assert_small(read(write_npz(tmp_path / "a.npz", width=10, height=9)), size=(10, 9))
    assert_small(read(str(tmp_path / "a.npz"), sensor=(6, 5)), size=(6, 5))


def test_npz_float_seconds_round_to_the_nearest_microsecond(tmp_path):
    assert_small(read(write_npz(tmp_path / "a.npz", t=SMALL.t / 1e6)))
    assert read(write_npz(tmp_path / "a.npz", t=np.array([0, 0.0000014, 0.0000015001, 2]))).t.tolist() == [
        0,
        1,
        2,
        2000000,
    ]


@pytest.mark.parametrize("polarity", [SMALL.p.astype(bool), SMALL.p * 2.0 - 1, (SMALL.p.astype(np.int8) * 2 - 1)])
def test_polarities_map_to_zero_and_one(tmp_path, polarity):
    assert_small(read(write_npz(tmp_path / "a.npz", p=polarity)))


@pytest.mark.parametrize(("constant", "expected"), [(-1, 0), (0, 0), (1, 1)])
def test_one_polarity_alone(tmp_path, constant, expected):
    assert read(write_npz(tmp_path / "a.npz", p=np.full(4, constant))).p.tolist() == [expected] * 4


def test_text(tmp_path):
    assert_small(read(write_text(tmp_path / "a.txt")))
    assert_small(read(write_text(tmp_path / "a.TXT", text(size="10 9\n"))), size=(10, 9))
    assert_small(read(write_text(tmp_path / "a.txt", "# t x y p\n\n" + text(size="10 9\n") + "\n\n")), size=(10, 9))
    assert len(read(write_text(tmp_path / "a.txt", "0.5 1 2 1"))) == 1


def test_zip(tmp_path):
    assert_small(read(write_zip(tmp_path / "a.zip", {"any/name.txt": text(size="10 9\n")})), size=(10, 9))
    assert_small(read(write_zip(tmp_path / "a.zip", {"images.txt": "0.1 a.png", "events.txt": text()})))


@pytest.mark.parametrize("group", ["events", "CD/events"])
def test_hdf5(tmp_path, group):
    assert_small(read(write_hdf5(tmp_path / "a.h5", group)))
    assert_small(read(write_hdf5(tmp_path / "a.hdf5", group, width=10, height=9)), size=(10, 9))


def test_hdf5_time_offset_and_unsigned_times(tmp_path):
    t = (SMALL.t - EPOCH).astype(np.uint32)
    assert_small(read(write_hdf5(tmp_path / "a.h5", t=t, t_offset=EPOCH)))


def test_hdf5_compound_table(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py (extra io) is not installed")
    table = np.zeros(4, [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    for name in "xypt":
        table[name] = getattr(SMALL, name)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["CD/events"] = table
    assert_small(read(tmp_path / "a.hdf5"))


def test_hdf5_compressed_by_a_plugin(tmp_path):
    need("h5py", "hdf5plugin")
    script = (
        "import sys, h5py, hdf5plugin, numpy as np\n"
        "with np.load(sys.argv[1]) as columns, h5py.File(sys.argv[2], 'w') as file:\n"
        "    for name in 'xypt':\n"
        "        file.create_dataset(f'events/{name}', data=columns[name], **hdf5plugin.Blosc(cname='zstd'))\n"
    )
    arguments = [write_npz(tmp_path / "a.npz"), tmp_path / "a.h5"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    without = (
        "import sys\n"
        "sys.modules['hdf5plugin'] = None\n"
        "from evkernels.events import RecordingError, read\n"
        "try:\n"
        "    read(sys.argv[1])\n"
        "except RecordingError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, tmp_path / "a.h5"], capture_output=True, text=True, check=True
    )
    assert "needs the library hdf5plugin" in done.stdout
    assert "evkernels[io]" in done.stdout
    assert_small(read(tmp_path / "a.h5"))


def test_mat(tmp_path):
    assert_small(read(write_mat(tmp_path / "a.mat")))


@pytest.mark.parametrize("name", RAW)
def test_prophesee(tmp_path, name):
    need("eventcv")
    header, payload, first = RAW[name]
    (tmp_path / name).write_bytes(header + payload)
    assert_small(read(tmp_path / name), t=SMALL.t - EPOCH + first)
    assert_small(read(tmp_path / name, sensor=(10, 9)), t=SMALL.t - EPOCH + first, size=(10, 9))


def test_prophesee_without_a_stated_size(tmp_path):
    need("eventcv")
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n" + evt3_payload())
    assert_small(read(tmp_path / "a.raw"), t=SMALL.t - EPOCH + (5 << 12))


def test_aedat4(tmp_path):
    need("faery")
    import faery

    array = np.zeros(4, faery.EVENTS_DTYPE)
    for name, column in (("t", SMALL.t), ("x", SMALL.x), ("y", SMALL.y), ("on", SMALL.p)):
        array[name] = column
    faery.events_stream_from_array(array, (10, 9)).to_file(tmp_path / "a.aedat4")
    assert_small(read(tmp_path / "a.aedat4"), size=(10, 9))
    whole = (tmp_path / "a.aedat4").read_bytes()
    for length in (5, 100, len(whole) // 2):
        (tmp_path / "b.aedat4").write_bytes(whole[:length])
        refused(tmp_path / "b.aedat4", "AEDAT4")


# Order and the sensor


def test_unsorted_times_are_sorted_stably_with_a_count(tmp_path):
    path = write_npz(tmp_path / "a.npz", t=np.array([5, 1, 5, 0]))
    with pytest.warns(UserWarning, match=r"a\.npz: 2 of 4 events are earlier than the one before; sorted") as caught:
        events = read(path)
    assert events.t.tolist() == [0, 1, 5, 5]
    assert events.x.tolist() == [3, 3, 0, 2]
    assert caught[0].filename == __file__


def test_events_outside_the_sensor(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    refused(path, "sensor 3x2", "3 of 4 outside", "largest x 3, largest y 2", sensor=(3, 2))
    refused(write_npz(tmp_path / "b.npz", width=3, height=3), "sensor 3x3", "2 of 4 outside")
    assert_small(read(tmp_path / "b.npz", sensor=(4, 3)))


@pytest.mark.parametrize("name", RAW)
def test_events_outside_a_stated_sensor_are_not_dropped(tmp_path, name):
    need("eventcv")
    header, payload, _ = RAW[name]
    for old, new in ((b"4x3", b"3x3"), (b"width=4", b"width=3"), (b"Width 4", b"Width 3")):
        header = header.replace(old, new)
    (tmp_path / name).write_bytes(header + payload)
    refused(tmp_path / name, "sensor 3x3", "2 of 4 outside, largest x 3")


@pytest.mark.parametrize("sensor", [(4,), (0, 3), (4.0, 3), (-4, 3)])
def test_sensor_argument_is_checked(tmp_path, sensor):
    with pytest.raises(ValueError, match="sensor must be two positive integers"):
        read(write_npz(tmp_path / "a.npz"), sensor=sensor)
