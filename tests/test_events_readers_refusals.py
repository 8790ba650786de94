"""Readers: files damaged in every way we know, and files that are no recordings, are refused in one line."""

import sys
import types

import numpy as np
import pytest
from small_recordings import (
    EPOCH,
    LIBRARIES,
    RAW,
    SMALL,
    assert_small,
    need,
    refused,
    text,
    write_hdf5,
    write_mat,
    write_npz,
    write_text,
    write_zip,
)

from evkernels.events import RecordingError, read


def test_missing_folder_and_unknown(tmp_path):
    refused(tmp_path / "none.npz", "no such file")
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", "a folder")
    refused(write_text(tmp_path / "a.csv"), "expected one of .npz, .txt", "'.csv'")
    refused(write_text(tmp_path / "events"), "'no ending'")


ENDINGS = [".npz", ".txt", ".zip", ".raw", ".dat", ".aedat4", ".h5", ".hdf5", ".mat"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_empty_file_and_noise(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"")
    refused(path, "an empty file")
    need(*[LIBRARIES[ending]] if ending in LIBRARIES else [])
    for seed in range(2):
        path.write_bytes(np.random.default_rng(seed).bytes(4097))
        refused(path, "expected")
    path.write_bytes(b"\n")
    refused(path, "expected")


@pytest.mark.parametrize("library", ["eventcv", "faery", "h5py", "scipy.io"])
def test_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    for ending in (ending for ending, needed in LIBRARIES.items() if needed == library):
        refused(write_text(tmp_path / f"a{ending}"), f"needs the library {library}", "pip install 'evkernels[io]'")


def test_panic_of_a_decoder_is_reported_and_an_interrupt_is_not(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    path = tmp_path / "a.raw"
    path.write_bytes(b"% evt 2.0\n")
    for error in (PanicException("index out of range\nmore"), KeyboardInterrupt()):

        def load(*arguments, error=error, **options):
            raise error

        decoder = types.ModuleType("eventcv")
        decoder.load = load
        monkeypatch.setitem(sys.modules, "eventcv", decoder)
        with pytest.raises((RecordingError, KeyboardInterrupt)) as caught:
            read(path)
        assert caught.type is (KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RecordingError)
        assert "more" not in str(caught.value)


WRITERS = [("a.npz", write_npz), ("a.zip", write_zip), ("a.h5", write_hdf5), ("a.mat", write_mat)]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=lambda value: value if isinstance(value, str) else "")
def test_cut_files_are_refused_or_read_equal(tmp_path, name, write):
    # A cut may hit padding only; what must never happen is another recording or another error.
    whole = write(tmp_path / name).read_bytes()
    path, damaged = tmp_path / f"cut{name}", 0
    for length in sorted({1, 4, 60, 200, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1}):
        path.write_bytes(whole[:length])
        try:
            assert_small(read(path))
        except RecordingError:
            damaged += 1
    assert damaged >= 6


@pytest.mark.parametrize("name", RAW)
def test_cut_words_are_refused(tmp_path, name):
    need("eventcv")
    header, payload, _ = RAW[name]
    (tmp_path / name).write_bytes(header + payload[:-1])
    refused(tmp_path / name, "whole words of", "cut short?")
    (tmp_path / name).write_bytes(header)
    refused(tmp_path / name, "expected")


@pytest.mark.parametrize("flip", range(30))
def test_flipped_bytes_in_archives_are_refused_or_harmless(tmp_path, flip):
    rng = np.random.default_rng(flip)
    for name, write in (("a.npz", write_npz), ("a.zip", write_zip)):
        content = bytearray(write(tmp_path / name).read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / name).write_bytes(content)
        try:
            events = read(tmp_path / name)
        except RecordingError:
            continue
        assert_small(events)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(x=None), ["got no x among"]),
        (dict(p=None, t=None), ["got no t, p among"]),
        (dict(t=SMALL.t[:3]), ["one length", "t [3]"]),
        (dict(zip("txyp", [np.zeros((2, 2), int)] * 4, strict=True)), ["one length [E]", "x [2, 2]"]),
        (dict(zip("txyp", [np.zeros(0, int)] * 4, strict=True)), ["expected events, got none"]),
        (dict(x=np.array([0, -1, 2, 3])), ["x in 0..65534", "-1..3: 1 of 4"]),
        (dict(y=np.array([0, 1, 2, 70000])), ["y in 0..65534", "70000"]),
        (dict(y=np.array([0, 1, 2, 2**64 - 1], np.uint64)), ["y in 0..65534"]),
        (dict(x=np.array([0.5, 1, 2, 3])), ["x in whole numbers", "1 of 4", "0.5"]),
        (dict(x=np.array([0, 1, np.nan, 3])), ["x in whole numbers", "nan"]),
        (dict(x=np.array(list("abcd"))), ["x in numbers", "<U1"]),
        (dict(t=np.array([0, 1, np.inf, 3])), ["t in finite seconds"]),
        (dict(t=np.array([0, np.nan, 2, 3])), ["t in finite seconds"]),
        (dict(t=SMALL.t.astype(float)), ["t in finite seconds below 1e11"]),
        (dict(t=np.array([0, 1, 2, 2**63], np.uint64)), ["int64 microseconds"]),
        (dict(t=np.array([True, False, True, True])), ["t in numbers, got bool"]),
        (dict(p=np.array([0, 1, 2, 3])), ["p in {0, 1} or {-1, 1}", "0, 1, 2, 3"]),
        (dict(p=np.array([-1, 0, 1, 1])), ["p in {0, 1} or {-1, 1}"]),
        (dict(p=np.array([255, 1, 1, 255], np.uint8)), ["got 1, 255"]),
        (dict(width=0, height=3), ["width and height as positive integers"]),
        (dict(width=4), ["width and height as positive integers"]),
        (dict(width=np.arange(3), height=3), ["width and height as positive integers"]),
        (dict(x=np.array([{}, 1, 2, 3], object)), ["without pickled objects"]),
    ],
)
def test_values_no_sensor_gives(tmp_path, change, expected):
    refused(write_npz(tmp_path / "a.npz", **change), *expected)


def test_npz_that_is_a_single_array(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros(4))
    refused(tmp_path / "a.npz", "a single array")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("4 3\n", ["got none"]),
        ("# nothing\n", ["got none"]),
        ("0.1 1 2\n0.2 1 2\n", ["4 columns", "got 3"]),
        ("0.1 1 2 1\n0.2 1 2", ["lines `t x y p`"]),
        ("0.1 1 2 1\n0.2 one 2 1\n", ["lines `t x y p`"]),
        ("0.1 1.5 2 1\n", ["x in whole numbers"]),
        ("0.1 -1 2 1\n", ["x in 0..65534"]),
        ("0.1 1 2 4\n", ["p in {0, 1}"]),
        ("nan 1 2 1\n", ["finite seconds"]),
        (f"{EPOCH} 1 2 1\n", ["finite seconds below 1e11"]),
        ("0 3\n0.1 1 2 1\n", ["positive integers"]),
        ("1.5 3\n0.1 1 2 1\n", ["lines `t x y p`"]),
        ("3 2\n0.1 1 2 1\n", ["sensor 3x2", "1 of 1 outside"]),
    ],
)
def test_text_that_is_no_recording(tmp_path, content, expected):
    refused(write_text(tmp_path / "a.txt", content), *expected)


def test_zip_without_one_recording(tmp_path):
    refused(write_zip(tmp_path / "a.zip", {"a.png": "x"}), "got a.png")
    refused(write_zip(tmp_path / "a.zip", {"a.txt": text(), "b.txt": text()}), "a.txt, b.txt")


def test_hdf5_that_is_no_recording(tmp_path):
    refused(write_hdf5(tmp_path / "a.h5", group="other"), "expected a group events", "other")
    refused(write_hdf5(tmp_path / "b.h5", x=None), "got no x among")
    refused(write_hdf5(tmp_path / "c.h5", t=SMALL.t / 1e6), "integer microseconds, got float64")
    refused(
        write_hdf5(tmp_path / "d.h5", **dict(zip("txyp", [np.zeros(0, int)] * 4, strict=True)), t_offset=3), "got none"
    )
    import h5py

    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["events"] = np.zeros(4)
    refused(tmp_path / "e.h5", "got no x, y, t, p")


def test_mat_that_is_no_recording(tmp_path):
    refused(write_mat(tmp_path / "a.mat", a=np.zeros((4, 4)), b=np.zeros((4, 4))), "got 2")
    refused(write_mat(tmp_path / "b.mat", a=np.zeros((4, 3))), "got 0")
    refused(write_mat(tmp_path / "c.mat", a=np.full((4, 4), 0.5)), "whole microseconds")


def test_input_file_is_not_changed(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    before = path.read_bytes()
    read(path)
    assert path.read_bytes() == before
