"""The simulator: deterministic, and physical where physics gives the answer."""

import numpy as np
import pytest

from evkernels.events import simulate

QUIET = dict(mismatch=0, noise_hz=0, refractory_us=0)


@pytest.fixture(scope="module")
def photograph():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    return simulate()


def textured(seed=0, size=80):
    rough = np.random.default_rng(seed).random((size // 4 + 1, size // 4 + 1))
    return np.kron(rough, np.ones((4, 4)))[:size, :size]


def small(image=None, **options):
    return simulate(
        textured() if image is None else image, **{**dict(width=40, height=30, duration_us=100_000), **options}
    )


def test_photograph_gives_a_plausible_recording(photograph):
    assert (photograph.width, photograph.height) == (240, 180)
    assert photograph.is_sorted
    assert 200_000 <= len(photograph) <= 500_000
    assert photograph.t[0] >= 0
    assert photograph.t[-1] < 200_000
    assert 0.3 < photograph.p.mean() < 0.7


def test_same_seed_same_events_other_seed_other_events():
    first, again, other = small(), small(), small(seed=1)
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in "xytp")
    assert len(first) != len(other) or not np.array_equal(first.t, other.t)


def test_image_is_not_modified_and_integer_and_float_agree():
    image = (textured() * 255).astype(np.uint8)
    before = image.copy()
    a, b = small(image), small(image / 255)
    assert np.array_equal(image, before)
    assert np.array_equal(a.t, b.t)


def test_colour_is_seen_by_its_luminance():
    grey = textured()
    green = np.stack([0 * grey, grey, 0 * grey], axis=-1)
    assert np.array_equal(small(green).t, small(grey * 0.7152).t)


def test_uniform_image_fires_noise_only():
    grey = np.full((80, 80), 128, np.uint8)
    assert len(small(grey, noise_hz=0)) == 0
    noise = small(grey, noise_hz=50)
    expected = 50 * 40 * 30 * 0.1
    assert abs(len(noise) - expected) < 5 * expected**0.5


def test_camera_at_rest_fires_nothing():
    assert len(small(velocity=(0, 0), noise_hz=0)) == 0


def test_motion_backwards_swaps_polarity():
    # Without mismatch ON and OFF thresholds are equal: reversing time turns each rise of a pixel into a fall. Counts
    # differ by what is left below the threshold at either end, at most one event per pixel.
    forward, backward = (small(velocity=(speed, 0), **QUIET) for speed in (150, -150))
    for polarity in (0, 1):
        ahead, back = np.sum(forward.p == polarity), np.sum(backward.p != polarity)
        assert abs(int(ahead) - int(back)) <= min(0.02 * ahead, 40 * 30)
    assert abs(forward.p.mean() + backward.p.mean() - 1) < 0.02


def test_mirrored_image_and_motion_mirror_the_events():
    image = textured()
    a = small(image, velocity=(150, 40), **QUIET)
    b = small(image[:, ::-1], velocity=(-150, 40), **QUIET)
    assert abs(len(a) - len(b)) <= 0.001 * len(a)
    mirrored = np.bincount(39 - b.x.astype(int), minlength=40)
    assert np.abs(np.bincount(a.x, minlength=40) - mirrored).max() <= 2


def test_doubled_threshold_reduces_events():
    assert len(small(threshold=0.4, **QUIET)) < 0.6 * len(small(threshold=0.2, **QUIET))


def test_signed_events_integrate_to_the_change_of_log_intensity():
    image = textured()
    e = small(image, velocity=(130, 0), duration_us=50_000, **QUIET)
    log_image = np.log(image + 0.02)
    room = 80 - 40

    def view(column):
        left, share = int(column), column - int(column)
        rows = log_image[(80 - 30) // 2 : (80 - 30) // 2 + 30]
        return rows[:, left : left + 40] * (1 - share) + rows[:, left + 1 : left + 41] * share

    change = view(room / 2 + 130 * 0.025) - view(room / 2 - 130 * 0.025)
    integrated = np.zeros((30, 40))
    np.add.at(integrated, (e.y, e.x), np.where(e.p == 1, 0.2, -0.2))
    assert np.abs(integrated - change).max() <= 0.2 + 1e-9


def test_times_are_interpolated_and_exact_on_a_ramp():
    # Log intensity rises by 1 per second of motion at every pixel, so the k-th event comes at 0.2 * k seconds.
    column = np.arange(200)
    image = np.tile(np.exp(column / 100 - 3) - 0.02, (8, 1))
    e = simulate(image, width=4, height=2, duration_us=900_000, velocity=(100, 0), threshold=0.2, **QUIET)
    assert len(e) == 4 * 2 * 4
    assert np.all(e.p == 1)
    assert np.abs(np.unique(e.t) - np.array([[200_000], [400_000], [600_000], [800_000]])).min(axis=0).max() <= 1


def test_several_events_per_pixel_and_step():
    image = np.where(np.arange(80) < 40, 0.0, 1.0) * np.ones((80, 1))
    e = small(image, velocity=(100, 0), **QUIET)
    _, counts = np.unique(np.stack([e.x, e.y]), axis=1, return_counts=True)
    assert counts.max() == int(np.log(1.02 / 0.02) / 0.2)


def test_refractory_period_is_kept():
    e = small(refractory_us=2000, noise_hz=0)
    pixel = e.y.astype(int) * 40 + e.x
    order = np.lexsort((e.t, pixel))
    same = np.diff(pixel[order]) == 0
    assert np.diff(e.t[order])[same].min() >= 1999  # times are floored to microseconds
    assert len(e) < len(small(refractory_us=0, noise_hz=0))


def test_long_pan_turns_back_and_stays_inside():
    e = small(duration_us=1_000_000, velocity=(300, 170))
    assert len(e) > 0
    assert e.x.max() < 40
    assert e.y.max() < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image=np.zeros((31, 40))), "image must be at least 31 x 41"),
        (dict(image=np.zeros((80, 80, 4))), r"image must be \[H0, W0\]"),
        (dict(image=np.zeros((80, 80), np.int32)), "image must be uint8 or float, got int32"),
        (dict(image=np.full((80, 80), np.nan)), "image must be finite"),
        (dict(image=np.full((80, 80), 2.0)), "in 0..1"),
        (dict(width=0), "width must be a positive integer"),
        (dict(duration_us=0.5), "duration_us must be a positive integer"),
        (dict(threshold=0), "threshold must be finite and positive"),
        (dict(threshold=float("nan")), "threshold must be finite and positive"),
        (dict(velocity=(1, float("inf"))), "velocity must be two finite numbers"),
        (dict(noise_hz=-1), "noise_hz must be finite and not negative"),
    ],
)
def test_refuses_with_the_argument_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
