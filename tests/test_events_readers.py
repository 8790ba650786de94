"""Readers: round trips of small files written here, files damaged in every way we know, and real recordings."""

import hashlib
import json
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from evkernels.events import Events, RecordingError, read

EPOCH = 1_633_953_690_975_950  # microseconds of a real recording
SMALL = Events(
    np.array([0, 3, 2, 3], np.uint16),
    np.array([2, 0, 1, 1], np.uint16),
    np.array([EPOCH, EPOCH + 1, EPOCH + 1, EPOCH + 2_000_000]),
    np.array([1, 0, 1, 0], np.uint8),
    4,
    3,
)


def columns(**changes):
    return {**{name: getattr(SMALL, name) for name in "txyp"}, **changes}


def write_npz(path, **changes):
    np.savez(path, **{name: value for name, value in columns(**changes).items() if value is not None})
    return path


def text(t=SMALL.t, size=""):
    lines = (
        f"{s // 10**6}.{s % 10**6:06d} {x} {y} {p}" for s, x, y, p in zip(t, SMALL.x, SMALL.y, SMALL.p, strict=True)
    )
    return size + "\n".join(lines) + "\n"


def write_text(path, content=None):
    path.write_text(text() if content is None else content)
    return path


def write_zip(path, members=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members or {"events.txt": text()}).items():
            archive.writestr(name, content)
    return path


def write_hdf5(path, group="events", t_offset=None, **changes):
    h5py = pytest.importorskip("h5py", reason="h5py (extra io) is not installed")
    with h5py.File(path, "w") as file:
        for name, value in columns(**changes).items():
            if value is not None:
                file[f"{group}/{name}"] = value
        if t_offset is not None:
            file["t_offset"] = np.int64(t_offset)
    return path


def write_mat(path, **variables):
    io = pytest.importorskip("scipy.io", reason="scipy (extra io) is not installed")
    table = np.stack([SMALL.x, SMALL.y, SMALL.p * 2.0 - 1, SMALL.t], axis=1)
    io.savemat(path, variables or {"events": table, "note": "a string"})
    return path


# EVT2: 32-bit words, kind in the top 4 bits; EVT3: 16-bit words; both little-endian. Written from the format's tables.
def evt2_payload():
    words = []
    for x, y, t, p in zip(SMALL.x, SMALL.y, SMALL.t - EPOCH + (5 << 6), SMALL.p, strict=True):
        words += [8 << 28 | int(t) >> 6, int(p) << 28 | (int(t) & 63) << 22 | int(x) << 11 | int(y)]
    return struct.pack(f"<{len(words)}I", *words)


def evt3_payload():
    words = []
    for x, y, t, p in zip(SMALL.x, SMALL.y, SMALL.t - EPOCH + (5 << 12), SMALL.p, strict=True):
        words += [8 << 12 | int(t) >> 12, 6 << 12 | int(t) & 4095, int(y), 2 << 12 | int(p) << 11 | int(x)]
    return struct.pack(f"<{len(words)}H", *words)


def dat_payload():
    events = zip(SMALL.x, SMALL.y, SMALL.t - EPOCH, SMALL.p, strict=True)
    return bytes([0, 8]) + b"".join(
        struct.pack("<2I", t, int(p) << 28 | int(y) << 14 | int(x)) for x, y, t, p in events
    )


RAW = {
    "evt2.raw": (b"% evt 2.0\n% geometry 4x3\n% end\n", evt2_payload(), 5 << 6),
    "evt3.raw": (b"% format EVT3;height=3;width=4\n% evt 3.0\n% end\n", evt3_payload(), 5 << 12),
    "cd.dat": (b"% Version 2\n% Height 3\n% Width 4\n", dat_payload(), 0),
}


def need(*modules):
    for module in modules:
        pytest.importorskip(module, reason=f"{module} (extra io) is not installed")


def assert_small(events, t=SMALL.t, size=(4, 3)):
    assert np.array_equal(events.t, t)
    assert events.t.dtype == np.int64
    for name, dtype in (("x", np.uint16), ("y", np.uint16), ("p", np.uint8)):
        assert np.array_equal(getattr(events, name), getattr(SMALL, name))
        assert getattr(events, name).dtype == dtype
    assert (events.width, events.height) == size


def refused(path, *expected, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecordingError) as caught:
            read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for words in expected:
        assert words in message, message


# Round trips


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


# Refusals


def test_missing_folder_and_unknown(tmp_path):
    refused(tmp_path / "none.npz", "no such file")
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", "a folder")
    refused(write_text(tmp_path / "a.csv"), "expected one of .npz, .txt", "'.csv'")
    refused(write_text(tmp_path / "events"), "'no ending'")


ENDINGS = [".npz", ".txt", ".zip", ".raw", ".dat", ".aedat4", ".h5", ".hdf5", ".mat"]
LIBRARIES = {
    ".raw": "eventcv",
    ".dat": "eventcv",
    ".aedat4": "faery",
    ".h5": "h5py",
    ".hdf5": "h5py",
    ".mat": "scipy.io",
}


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


# Real recordings

RECORDINGS = {
    "slider_depth": ".txt",
    "dynamic_rotation": ".txt",
    "shapes_rotation": ".txt",
    "dvs128_garfield": ".mat",
    "dvs128_stripes": ".mat",
    "aedat4_davis346": ".aedat4",
    "evt2_expelliarmus": ".raw",
    "evt3_expelliarmus": ".raw",
    "ncars": ".dat",
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_original_decodes_to_its_twin(recordings, name):
    need(*[LIBRARIES[RECORDINGS[name]]] if RECORDINGS[name] in LIBRARIES else [])
    facts = json.loads((recordings / "facts.json").read_text())[name]
    events = read(recordings / facts["original"], sensor=(facts["width"], facts["height"]))
    twin = read(recordings / "npz" / f"{name}.npz")
    for column in "xytp":
        assert np.array_equal(getattr(events, column), getattr(twin, column)), column
    assert (events.width, events.height) == (twin.width, twin.height)
    assert (len(events), int(events.t[0]), int(events.t[-1])) == (facts["n"], facts["t0"], facts["t1"])
    histogram = np.zeros((2, events.height, events.width), np.int32)
    np.add.at(histogram, (events.p, events.y, events.x), 1)
    assert hashlib.sha256(histogram.tobytes()).hexdigest() == facts["hist_sha256"]


def test_every_original_is_tested(recordings):
    facts = json.loads((recordings / "facts.json").read_text())
    named = {
        name: Path(entry["original"]).suffix
        for name, entry in facts.items()
        if entry.get("hist_sha256") and entry.get("original")
    }
    assert named == RECORDINGS


def test_every_twin_reads(recordings):
    for path in sorted((recordings / "npz").glob("*.npz")):
        assert read(path).is_sorted


@pytest.mark.parametrize("name", ["davis346.aedat4", "evt2_spinner.raw", "evt3_street_hd.raw", "ncars_sample.dat"])
def test_damaged_real_recordings_are_refused(recordings, tmp_path, name):
    need(LIBRARIES[Path(name).suffix])
    whole, path = (recordings / "original" / name).read_bytes(), tmp_path / name
    path.write_bytes(whole[: len(whole) // 2 | 1])
    refused(path, "expected")
    if name.endswith("aedat4"):
        path.write_bytes(whole[:300_000] + bytes(500) + whole[300_500:])
        refused(path, "expected")
        # Damage in the header's XML can be harmless, make the decoder panic, or make it abort its process (at 700).
        twin, refusals = read(recordings / "npz" / "aedat4_davis346.npz"), 0
        for position in (140, 260, 700, 900):
            path.write_bytes(whole[:position] + b"\xe9\x82\xff" + whole[position + 3 :])
            try:
                assert np.array_equal(read(path).t, twin.t)
            except RecordingError:
                refusals += 1
        assert refusals == 3
