"""Readers on real recordings: the originals decode to their published facts, damaged ones are refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from small_recordings import LIBRARIES, need, refused

from evkernels.events import RecordingError, read

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
