"""Crop, downsampling, flip and removed pixels: against a loop, on recordings and on batches alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evkernels.events import (
    EventBatch,
    Events,
    crop,
    downsample,
    drop_pixels,
    event_frame,
    flip_horizontal,
    hot_pixels,
    read,
)

SILENT = np.random.default_rng(0).random((7, 9)) < 0.4
CASES = {
    "crop": (lambda e: crop(e, 2, 1, 5, 4), lambda x, y: (x - 2, y - 1) if 2 <= x < 7 and 1 <= y < 5 else None, (5, 4)),
    "crop to all": (lambda e: crop(e, 0, 0, 9, 7), lambda x, y: (x, y), (9, 7)),
    "downsample": (lambda e: downsample(e, 2), lambda x, y: (x // 2, y // 2), (5, 4)),
    "flip": (flip_horizontal, lambda x, y: (8 - x, y), (9, 7)),
    "pixels": (lambda e: drop_pixels(e, SILENT), lambda x, y: None if SILENT[y, x] else (x, y), (9, 7)),
}


def events(count, seed=0, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 9, count).astype(dtype), rng.integers(0, 7, count).astype(dtype)
    return Events(x, y, np.sort(rng.integers(0, 50, count)), rng.integers(0, 2, count, dtype=np.uint8), 9, 7)


def rows(e):
    return list(zip(*(getattr(e, name).tolist() for name in "xytp"), strict=True))


def moved(e, change):
    places = ((change(x, y), t, p) for x, y, t, p in rows(e))
    return [(*place, t, p) for place, t, p in places if place is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32])
def test_matches_a_loop(case, count, dtype):
    function, change, sensor = CASES[case]
    e = events(count, dtype=dtype)
    before = rows(e)
    result = function(e)
    assert rows(result) == moved(e, change)
    assert (result.width, result.height) == sensor
    assert rows(e) == before


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 20), max_size=6))
def test_batch_is_the_batch_of_the_results(case, counts):
    function, _, sensor = CASES[case]
    samples = [events(count, seed) for seed, count in enumerate(counts)]
    result = function(EventBatch.of(samples, 9, 7))
    expected = EventBatch.of([function(sample) for sample in samples], *sensor)
    assert result.offsets.tolist() == expected.offsets.tolist()
    assert rows(result) == rows(expected)
    assert (result.width, result.height) == sensor


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_events_outside_of_a_batch_stay_outside(dtype):
    x = torch.tensor([0, 8, 9, 100], dtype=dtype)
    columns = (x, torch.zeros(4, dtype=dtype), torch.arange(4), torch.zeros(4, dtype=torch.uint8))
    batch = EventBatch(*columns, torch.tensor([0, 2, 4]), 9, 7)
    assert flip_horizontal(batch).x.tolist() == [8, 0, -1, -92]
    for result in (downsample(batch, 1), drop_pixels(batch, np.zeros((7, 9), bool)), crop(batch, 0, 0, 9, 7)):
        assert result.x.tolist() == [0, 8]
        assert result.offsets.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: crop(e, 5, 0, 5, 7), r"must lie in 0\.\.9, got 5 and width 5"),
        (lambda e: crop(e, -1, 0, 5, 7), r"got -1 and width 5"),
        (lambda e: crop(e, 0, 0, 9, 8), r"must lie in 0\.\.7, got 0 and height 8"),
        (lambda e: crop(e, 0, 0, 0, 1), "width must be at least 1"),
        (lambda e: downsample(e, 0), "factor must be at least 1"),
        (lambda e: drop_pixels(e, SILENT.T), r"pixels must be bool \[H, W\] = \[7, 9\], got bool \[9, 7\]"),
        (lambda e: drop_pixels(e, SILENT.astype(int)), "got int64"),
        (lambda e: flip_horizontal(EventBatch.of([e])[:0].to("cpu")), None),
        (lambda e: flip_horizontal(EventBatch(*e.tensors(), torch.tensor([0, 3]))), "must know its sensor"),
    ],
)
def test_refuses(call, message):
    if message is None:
        assert len(call(events(3))) == 0
        return
    with pytest.raises(ValueError, match=message):
        call(events(3))


def test_flip_twice_is_the_same_picture():
    e = events(200)
    assert np.array_equal(event_frame(flip_horizontal(e)), event_frame(e)[:, ::-1])


def test_hot_pixel_of_a_real_recording(recordings):
    e = read(recordings / "npz" / "evt2_expelliarmus.npz")
    hot = hot_pixels(e)
    counts = np.zeros((e.height, e.width), int)
    np.add.at(counts, (e.y, e.x), 1)
    assert hot[np.unravel_index(counts.argmax(), counts.shape)]
    assert 0 < hot.sum() < 2000
    assert len(drop_pixels(e, hot)) == counts[~hot].sum()
    assert not hot_pixels(events(0)).any()
