"""Changes to where events lie: crop, downsampling, flip, rectification, removal of pixels.

Each takes Events or EventBatch and returns the same kind on new columns, never writing to the given ones; times and
polarities are only selected from. A batch stays on its device, and its windows stay windows, empty ones too. Events of
a batch that lie outside its sensor are dropped by all of them but the flip, which leaves them outside.

`pixel_map` turns any chain of them into a table that the ops read while they count, so that no events are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from .batch import EventBatch
from .container import Events, _integer, _positive

if TYPE_CHECKING:
    import torch

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


def rectify(events: Events, places: np.ndarray) -> Events:
    """Events moved to the pixels nearest to where an ideal lens would have shown them; those outside are dropped.

    Args:
        events: Events; their sensor keeps its size.
        places: float [H, W, 2], x and y for every pixel of the sensor, such as DSEC's rectify_map.

    Raises:
        ValueError: if `places` has another shape.
    """
    if places.shape != (events.height, events.width, 2):
        expected = [events.height, events.width, 2]
        raise ValueError(f"places must be [H, W, 2] = {expected}, got {list(places.shape)}")
    x, y = np.rint(places[events.y, events.x]).T
    keep = _inside(x, y, events.width, events.height)
    x, y = (np.where(keep, column, 0).astype(np.int32) for column in (x, y))
    return _selected(events, x, y, keep, (events.width, events.height))


class PixelMap(NamedTuple):
    """Where the pixels of a sensor lie in an image."""

    # int32 [H, W] of the sensor: y * width + x of the image, -1 for pixels that are left out.
    cells: torch.Tensor
    # Size of the image.
    height: int
    width: int


def pixel_map(change: Callable[[Events], Events], width: int, height: int) -> PixelMap:
    """The table of a change to where events lie, for the `pixel_map` argument of the ops and modules.

    Equivalent to::

        cells, rows, columns = pixel_map(lambda events: downsample(flip_horizontal(events), 2), 640, 480)
        histogram = event_histogram(x, y, t, p, bins=10, height=rows, width=columns, pixel_map=cells)

    which counts what the changed events would give, except that those left out still mark the window's first and last
    time.

    Args:
        change: Any chain of the functions of this file; called once, with one event per pixel of the sensor.
        width, height: Size of the sensor.

    Returns:
        PixelMap on the CPU.
    """
    import torch

    y, x = np.divmod(np.arange(width * height, dtype=np.int32), np.int32(width))
    pixels = Events(x, y, np.arange(width * height), np.zeros(width * height, np.uint8), width, height)
    changed = change(pixels)
    cells = np.full(width * height, -1, np.int32)
    # The time of a pixel's event is the pixel's number.
    cells[changed.t] = changed.y.astype(np.int32) * changed.width + changed.x
    return PixelMap(torch.from_numpy(cells.reshape(height, width)), changed.height, changed.width)


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
