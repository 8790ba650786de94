"""Boxes beside a recording: windows that end with them, and the files that RVT's data loader reads."""

import numpy as np
import pytest

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from preprocess_files import FOLDER, expected, frames, random_events, save_h5

from evkernels.__main__ import main
from evkernels.events import RecordingError
from evkernels.preprocess.labels import read_labels

BOX = np.dtype(
    [
        ("t", "<u8"),
        *((name, "<f4") for name in "xywh"),
        ("class_id", "u1"),
        ("track_id", "<u4"),
        ("class_confidence", "<f4"),
    ]
)


def boxes(times, dtype=BOX):
    table = np.zeros(len(times), dtype)
    table[dtype.names[0]] = times
    table["x"], table["y"], table["w"], table["h"] = 1, 1, 3, 2
    table["track_id"] = np.arange(len(times))
    return table


def read(tmp_path, table, first_time=0):
    np.save(tmp_path / "a_bbox.npy", table)
    return read_labels(tmp_path / "a_bbox.npy", 8, 6, first_time, 50_000, 50_000)


def test_windows_end_with_the_boxes(tmp_path):
    times = [40_000, 133_000, 133_000, 150_000, 234_001, 283_999, 484_000, 510_000]
    labels = read(tmp_path, boxes(times))
    # 150,000 and 510,000 lie between windows; the gap of four windows is divided evenly.
    assert labels.times.tolist() == [133_000, 234_001, 283_999, 484_000]
    assert labels.ends.tolist() == [83_000, 133_000, 183_500, 234_001, 283_999, 333_999, 383_999, 433_999, 484_000]
    assert labels.boxes["track_id"].tolist() == [1, 2, 4, 5, 6]
    files = {path.name: value for path, value in labels.files(tmp_path, tmp_path / "f").items()}
    assert files["labels.npz"]["objframe_idx_2_label_idx"].tolist() == [0, 2, 3, 4]
    assert files["objframe_idx_2_repr_idx.npy"].tolist() == [1, 3, 4, 8]


def test_no_window_begins_before_the_recording(tmp_path):
    assert read(tmp_path, boxes([1_050_000]), 1_000_000).ends.tolist() == [1_050_000]
    assert read(tmp_path, boxes([1_120_000]), 1_000_000).ends.tolist() == [1_070_000, 1_120_000]
    assert read(tmp_path, boxes([1_049_999]), 1_000_000) is None


def test_boxes_are_clipped_and_flat_ones_dropped(tmp_path):
    table = boxes([100_000] * 5)
    table["x"], table["w"] = [-2, 6, 9, 0, 3], [4, 10, 3, 0, 2]
    labels = read(tmp_path, table)
    assert labels.boxes["x"].tolist() == [0, 6, 3]
    assert labels.boxes["w"].tolist() == [2, 1, 2]


def test_old_name_of_the_time_and_any_order(tmp_path):
    old = np.dtype([("ts" if name == "t" else name, BOX[name]) for name in BOX.names])
    labels = read(tmp_path, boxes([150_000, 100_000], old))
    assert labels.boxes.dtype.names == BOX.names
    assert labels.boxes["track_id"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros(3), "expected boxes .* got no t, x, y, w, h"),
        (boxes([1])[["t", "x", "y", "w", "h"]], "got no class_id, class_confidence"),
        (boxes([1, 2]).reshape(2, 1), r"got shape \[2, 1\]"),
        (boxes([1.0], np.dtype([("t", "f8"), *[(n, BOX[n]) for n in BOX.names[1:]]])), "integer microseconds"),
    ],
)
def test_refuses_other_arrays(tmp_path, table, message):
    with pytest.raises(RecordingError, match=message):
        read(tmp_path, table)


def test_refuses_what_is_not_finite_or_no_array(tmp_path):
    table = boxes([1, 2])
    table["w"][0] = np.nan
    with pytest.raises(RecordingError, match="expected finite w, got 1 others"):
        read(tmp_path, table)
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(RecordingError, match=r"expected an \.npy file of boxes"):
        read_labels(tmp_path / "b.npy", 8, 6, 0, 1, 1)


def test_tree_with_labels(tmp_path, capsys):
    e = random_events(2000, 400_000, start=0)
    save_h5(tmp_path / "in" / "test" / "drive_td.dat.h5", e)
    np.save(tmp_path / "in" / "test" / "drive_bbox.npy", boxes([133_000, 133_000, 233_000]))
    run = ["preprocess", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(run) == 0
    sequence = tmp_path / "out" / "test" / "drive"
    data, ends = frames(sequence)
    assert ends.tolist() == [83_000, 133_000, 183_000, 233_000]
    assert np.array_equal(data, expected(e, ends))
    with np.load(sequence / "labels_v2" / "labels.npz", allow_pickle=False) as labels:
        assert labels["labels"]["t"].tolist() == [133_000, 133_000, 233_000]
        assert labels["objframe_idx_2_label_idx"].tolist() == [0, 2]
    assert np.load(sequence / "labels_v2" / "timestamps_us.npy").tolist() == [133_000, 233_000]
    assert np.load(sequence / FOLDER / "objframe_idx_2_repr_idx.npy").tolist() == [1, 3]
    assert main([*run, "--no-labels"]) == 1
    assert "labels True instead of False" in capsys.readouterr().err
    np.save(tmp_path / "in" / "test" / "drive_bbox.npy", np.zeros(3))
    assert main([*run, "--overwrite"]) == 2
    assert "drive_bbox.npy: expected boxes" in capsys.readouterr().err
    np.save(tmp_path / "in" / "test" / "drive_bbox.npy", boxes([7]))
    assert main([*run, "--overwrite"]) == 0
    assert "cut without labels" in " ".join(capsys.readouterr().out.split())
    assert len(frames(sequence)[0]) == 8
    assert not (sequence / FOLDER / "objframe_idx_2_repr_idx.npy").exists()
