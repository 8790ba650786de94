"""Changes to where events lie: crop, downsampling, flip, removal of pixels. Of one recording or of a batch of windows.

Each takes Events or EventBatch and returns the same kind on new columns, never writing to the given ones; times and
polarities are only selected from. A batch stays on its device, and its windows stay windows, empty ones too. Events of
a batch that lie outside its sensor are dropped by all of them but the flip, which leaves them outside.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from .batch import EventBatch
from .container import Events, _integer, _positive

AnyEvents = TypeVar("AnyEvents", Events, EventBatch)


def crop(events: AnyEvents, left: int, top: int, width: int, height: int) -> AnyEvents:
    """Events of a part of the sensor, which becomes the sensor.

    Args:
        events: Events or EventBatch.
        left, top: First column and row of the part, from 0.
        width, height: Its size.

    Raises:
        ValueError: if the part is not inside the sensor, or a batch's sensor is not known.
    """
    sensor = _sensor(events)
    for name, begin, size, whole in (("width", left, width, sensor[0]), ("height", top, height, sensor[1])):
        if _integer("left or top", begin) < 0 or begin + _positive(name, size) > whole:
            raise ValueError(f"the part must lie in 0..{whole}, got {begin} and {name} {size}")
    x, y = _coordinates(events)
    keep = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return _selected(events, x - left if left else x, y - top if top else y, keep, (width, height))


def downsample(events: AnyEvents, factor: int) -> AnyEvents:
    """Events on a sensor of larger pixels: factor x factor pixels become one, and no event is lost.

    Args:
        events: Events or EventBatch.
        factor: At least 1. Where it does not divide the sensor, the last column and row of new pixels are smaller.

    Raises:
        ValueError: if the factor is smaller than 1, or a batch's sensor is not known.
    """
    factor = _positive("factor", factor)
    width, height = _sensor(events)
    x, y = _coordinates(events)
    keep = _inside(x, y, width, height)
    return _selected(events, x // factor, y // factor, keep, (-(-width // factor), -(-height // factor)))


def flip_horizontal(events: AnyEvents) -> AnyEvents:
    """Events mirrored: column x becomes width - 1 - x.

    Raises:
        ValueError: if a batch's sensor is not known.
    """
    width, height = _sensor(events)
    x, y = _coordinates(events)
    return _selected(events, width - 1 - x, y, None, (width, height))


def drop_pixels(events: AnyEvents, pixels: np.ndarray) -> AnyEvents:
    """Events of all pixels but some.

    Args:
        events: Events or EventBatch.
        pixels: bool [H, W], True for the pixels to silence, such as `hot_pixels` finds.

    Raises:
        ValueError: if `pixels` has another type or shape than the sensor, or a batch's sensor is not known.
    """
    width, height = _sensor(events)
    pixels = np.asarray(pixels)
    if pixels.dtype != np.bool_ or pixels.shape != (height, width):
        raise ValueError(f"pixels must be bool [H, W] = {[height, width]}, got {pixels.dtype} {list(pixels.shape)}")
    x, y = _coordinates(events)
    keep = _inside(x, y, width, height)
    if isinstance(events, Events):
        return _selected(events, x, y, ~pixels[y, x], (width, height))
    import torch

    # Indices of events outside are moved inside, where their value does not matter.
    silent = torch.from_numpy(pixels).to(x.device)[y.long().clamp(0, height - 1), x.long().clamp(0, width - 1)]
    return _selected(events, x, y, keep & ~silent, (width, height))


def hot_pixels(events: Events, deviations: float = 10.0) -> np.ndarray:
    """Pixels that fire far more often than the others.

    Args:
        events: A recording long enough that no pixel is busy by chance.
        deviations: How many standard deviations above the mean count of all pixels is too much.

    Returns:
        bool [H, W].
    """
    pixel = events.y.astype(np.int64) * events.width + events.x
    counts = np.bincount(pixel, minlength=events.width * events.height)
    return (counts > counts.mean() + deviations * counts.std()).reshape(events.height, events.width)


def _sensor(events: Events | EventBatch) -> tuple[int, int]:
    if events.width is None or events.height is None:
        raise ValueError("the batch must know its sensor: give width and height to EventBatch")
    return events.width, events.height


def _coordinates(events):
    """Columns and rows in types that hold the numbers of every sensor."""
    if isinstance(events, Events) or min(events.x.dtype.itemsize, events.y.dtype.itemsize) > 1:
        return events.x, events.y
    return events.x.int(), events.y.int()


def _inside(x, y, width: int, height: int):
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _selected(events, x, y, keep, sensor: tuple[int, int]):
    """The events with new coordinates where `keep`, or all of them."""
    if isinstance(events, Events):
        columns = (x, y, events.t, events.p)
        chosen = columns if keep is None or keep.all() else [column[keep] for column in columns]
        return Events(*chosen, *sensor)
    if keep is None:
        return EventBatch(x, y, events.t, events.p, events.offsets, *sensor)
    import torch

    kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    columns = (column[keep] for column in (x, y, events.t, events.p))
    return EventBatch(*columns, kept[events.offsets], *sensor)
