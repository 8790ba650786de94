"""A simulated event camera panning over a photograph, for demonstrations and tests without a recording.

The model is ESIM's: log intensity is taken as linear in time between two renderings, and each pixel fires whenever it
has moved one contrast threshold from its last level, at the interpolated time, several times per step if need be.
Renderings are at most half a pixel apart, so an edge cannot jump over a pixel. All pixels of a step are computed
together; the only inner loop is over the k-th crossing of a step, which the refractory period makes sequential.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from .container import Events
from .optional import require

# Added to intensities in 0..1 before the logarithm. About five grey levels of 255: one grey level in the dark then
# stays below the default threshold, so that the quantisation of the photograph does not fire events.
_LOG_OFFSET = 0.02
_STEP_PIXELS = 0.5
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709


def simulate(
    image: np.ndarray | None = None,
    *,
    width: int = 240,
    height: int = 180,
    duration_us: int = 200_000,
    velocity: tuple[float, float] = (120.0, 50.0),
    threshold: float = 0.2,
    mismatch: float = 0.03,
    refractory_us: int = 100,
    noise_hz: float = 0.1,
    seed: int = 0,
) -> Events:
    """Events of a camera that pans over a still image.

    The view moves along a straight line through the middle of the image, reached at half time, and turns back at the
    borders; the opposite velocity is therefore the same motion backwards in time.

    Args:
        image: Photograph [H0, W0] or [H0, W0, 3], uint8 or float in 0..1, at least one pixel larger than the sensor on
            each side. None: a photograph inside scikit-image's wheel, camera.png, 512x512; nothing is downloaded.
        width, height: Sensor size in pixels.
        duration_us: Length of the recording in microseconds; 0 <= t < duration_us.
        velocity: Motion of the view over the image, columns and rows per second.
        threshold: Contrast threshold, in natural logarithm of intensity.
        mismatch: Relative standard deviation of each pixel's ON and OFF threshold, fixed over time.
        refractory_us: A pixel stays silent for this long after an event; crossings in between are lost.
        noise_hz: Background events per pixel and second, polarity at random.
        seed: Of the mismatch and of the noise.

    Returns:
        Events sorted by time. Same arguments and NumPy version, same events.

    Raises:
        ValueError: if an argument is out of range or the image too small.
        ImportError: without an image and without scikit-image, which the extra `demo` brings.

    Limits: no motion blur, no limited bandwidth of the photoreceptor, no leak, no readout delays; stored grey values
    stand for intensities (no gamma is undone); noise ignores the refractory period.
    Source: Rebecq, Gehrig, Scaramuzza: ESIM, an open event camera simulator, CoRL 2018; threshold mismatch and
    background noise as in Hu, Liu, Delbruck: v2e, CVPRW 2021 (arXiv:2006.07722).
    """
    _check(width, height, duration_us, velocity, threshold, mismatch, refractory_us, noise_hz)
    if image is None:
        image = require("skimage.data", "demo", "simulate() without an image").camera()
    log_image = np.log(_intensity(image) + _LOG_OFFSET)
    room = (log_image.shape[1] - width, log_image.shape[0] - height)
    if min(room) < 1:
        raise ValueError(
            f"image must be at least {height + 1} x {width + 1} for a sensor of {height} x {width} (rows x columns), "
            f"got {log_image.shape[0]} x {log_image.shape[1]}"
        )
    rng = np.random.default_rng(seed)
    on, off = (threshold * np.maximum(1 + mismatch * rng.standard_normal(height * width), 0.1) for _ in range(2))
    times, renderings = _pan(log_image, room, (height, width), duration_us, velocity)
    chunks = list(_crossings(times, renderings, on, off, refractory_us))
    chunks.append(_noise(rng, height * width, duration_us, noise_hz))
    time, pixel, polarity = (np.concatenate(column) for column in zip(*chunks, strict=True))
    time = np.clip(np.floor(time), 0, duration_us - 1).astype(np.int64)
    order = np.argsort(time, kind="stable")
    row, column = np.divmod(pixel[order], width)
    return Events(column.astype(np.int32), row.astype(np.int32), time[order], polarity[order], width, height)


def _crossings(times, renderings, on, off, refractory_us):
    """Yield (time, pixel, polarity) per step; `on` and `off` are thresholds [H*W]."""
    before = next(renderings)
    level = before.copy()
    last = np.full(level.shape, -np.inf)
    for start, stop in pairwise(times):
        after = next(renderings)
        rising = after > level
        step = np.where(rising, on, -off)
        crossings = ((after - level) / step).astype(np.int64)
        pixel = np.flatnonzero(crossings)
        k = 0
        while pixel.size:
            k += 1
            slope = after[pixel] - before[pixel]
            ahead = level[pixel] + k * step[pixel] - before[pixel]
            # Rounding can leave a crossing over to a step in which the pixel rests; it then fires at once.
            share = np.divide(ahead, slope, out=np.zeros_like(ahead), where=slope != 0)
            time = start + np.clip(share, 0, 1) * (stop - start)
            awake = time - last[pixel] >= refractory_us
            fired = pixel[awake]
            last[fired] = time[awake]
            yield time[awake], fired, rising[fired].astype(np.uint8)
            pixel = pixel[crossings[pixel] > k]
        level += crossings * step
        before = after


def _pan(log_image, room, sensor, duration_us, velocity):
    """Times of the renderings [S+1] in microseconds, and an iterator over the log intensities [H*W] at them."""
    seconds = duration_us * 1e-6
    steps = max(1, math.ceil(max(abs(speed) for speed in velocity) * seconds / _STEP_PIXELS))
    times = np.linspace(0, duration_us, steps + 1)
    # Distances from the middle, folded at the borders as a triangle wave.
    moved = [speed * (times - duration_us / 2) * 1e-6 + space / 2 for speed, space in zip(velocity, room, strict=True)]
    columns, rows = (
        space - np.abs(distance % (2 * space) - space) for distance, space in zip(moved, room, strict=True)
    )
    return times, (_view(log_image, column, row, sensor) for column, row in zip(columns, rows, strict=True))


def _view(log_image, column, row, sensor):
    """The part of the image under the sensor, bilinear between pixels, [H*W]."""
    height, width = sensor
    left = min(int(column), log_image.shape[1] - width - 1)
    top = min(int(row), log_image.shape[0] - height - 1)
    right_share, bottom_share = column - left, row - top
    block = log_image[top : top + height + 1, left : left + width + 1]
    block = block[:-1] * (1 - bottom_share) + block[1:] * bottom_share
    return (block[:, :-1] * (1 - right_share) + block[:, 1:] * right_share).ravel()


def _noise(rng, pixels, duration_us, noise_hz):
    count = rng.poisson(noise_hz * pixels * duration_us * 1e-6)
    polarity = rng.integers(0, 2, count, dtype=np.uint8)
    return rng.uniform(0, duration_us, count), rng.integers(0, pixels, count), polarity


def _intensity(image):
    image = np.asarray(image)
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"image must be [H0, W0] or [H0, W0, 3], got shape {list(image.shape)}")
    if image.dtype == np.uint8:
        intensity = image / 255
    elif image.dtype.kind == "f":
        intensity = image.astype(np.float64)
        if not (np.all(intensity >= 0) and np.all(intensity <= 1)):
            raise ValueError("image must be finite and in 0..1 for float types, got values outside")
    else:
        raise ValueError(f"image must be uint8 or float, got {image.dtype}")
    return intensity @ _LUMINANCE if intensity.ndim == 3 else intensity


def _check(width, height, duration_us, velocity, threshold, mismatch, refractory_us, noise_hz):
    for name, value in (("width", width), ("height", height), ("duration_us", duration_us)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if len(velocity) != 2 or not all(math.isfinite(speed) for speed in velocity):
        raise ValueError(f"velocity must be two finite numbers, got {velocity!r}")
    if not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold must be finite and positive, got {threshold!r}")
    for name, value in (("mismatch", mismatch), ("refractory_us", refractory_us), ("noise_hz", noise_hz)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
