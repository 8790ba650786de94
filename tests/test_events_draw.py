"""Pictures of events: colours, overlap, and a PNG that reads back equal."""

import numpy as np
import pytest

from evkernels.events import Events, event_frame, representation_frame, save_png

WHITE, RED, BLUE = [255, 255, 255], [255, 0, 0], [0, 0, 255]


def events(t, x, p):
    return Events(np.array(x, np.uint16), np.zeros(len(t), np.uint16), np.array(t), np.array(p, np.uint8), 3, 2)


def test_on_is_red_off_is_blue_on_white():
    frame = event_frame(events([0, 1], [0, 1], [1, 0]))
    assert frame.dtype == np.uint8
    assert frame.shape == (2, 3, 3)
    assert frame[0].tolist() == [RED, BLUE, WHITE]
    assert frame[1].tolist() == [WHITE] * 3


def test_no_events_is_white():
    assert np.all(event_frame(events(np.zeros(0, np.int64), [], [])) == 255)


def test_last_event_wins_whatever_the_order_of_the_arrays():
    assert event_frame(events([0, 1, 2], [0, 0, 0], [1, 1, 0]))[0, 0].tolist() == BLUE
    assert event_frame(events([2, 1, 0], [0, 0, 0], [1, 0, 0]))[0, 0].tolist() == RED
    assert event_frame(events([1, 1], [0, 0], [0, 1]))[0, 0].tolist() == RED


def test_matches_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (2, 500)).astype(np.int32)
    e = Events(x, y, np.sort(rng.integers(0, 50, 500)), rng.integers(0, 2, 500, dtype=np.uint8), 9, 9)
    expected = np.full((9, 9, 3), 255, np.uint8)
    for column, row, polarity in zip(e.x, e.y, e.p, strict=True):
        expected[row, column] = RED if polarity else BLUE
    assert np.array_equal(event_frame(e), expected)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7), (1, 1, 3)])
def test_png_reads_back_equal(tmp_path, shape):
    image_library = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(image_library.open(tmp_path / "a.png")), image)


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2, 3), np.uint8)]
)
def test_png_refuses_other_images(tmp_path, image):
    with pytest.raises(ValueError, match="image must be uint8"):
        save_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_representation_of_two_polarities():
    frame = np.zeros((4, 1, 5), np.uint8)
    frame[:, 0, :4] = [[4, 0, 0, 2], [0, 0, 2, 2], [0, 4, 0, 4], [0, 0, 2, 0]]  # OFF, OFF, ON, ON
    pictured = representation_frame(frame)
    assert pictured.dtype == np.uint8
    half = round(255 * (1 - 0.5**0.5))
    assert pictured[0].tolist() == [BLUE, RED, [half] * 3, [0, 0, 0], WHITE]


def test_representation_of_signed_sums():
    frame = np.zeros((2, 1, 4), np.int8)
    frame[:, 0, :3] = [[3, -2, -1], [1, -2, 0]]
    pictured = representation_frame(frame)
    assert pictured[0, [0, 1, 3]].tolist() == [RED, BLUE, WHITE]
    half = round(255 * (1 - 0.25**0.5))
    assert pictured[0, 2].tolist() == [half, half, 255]
    assert np.array_equal(representation_frame(np.abs(frame), signed=True)[0, 1], RED)
    assert np.array_equal(representation_frame(frame[:1]), representation_frame(frame[:1], signed=True))


def test_representation_without_events_is_white():
    assert (representation_frame(np.zeros((20, 2, 3), np.float32)) == 255).all()


@pytest.mark.parametrize(
    ("frame", "signed", "message"),
    [
        (np.zeros((2, 3)), None, r"C at least 1, got \[2, 3\]"),
        (np.zeros((0, 2, 3)), None, "C at least 1"),
        (np.full((2, 2, 3), np.nan), None, "must be finite"),
        (np.zeros((3, 2, 3)), False, "as many channels for ON events as for OFF, got 3"),
    ],
)
def test_representation_refuses(frame, signed, message):
    with pytest.raises(ValueError, match=message):
        representation_frame(frame, signed)
