"""Pictures of events, for people to look at: one frame per window, and a PNG writer."""

from pathlib import Path

import numpy as np

from .container import Events
from .optional import require

_WHITE = 255
_COLOURS = np.array([[0, 0, 255], [255, 0, 0]], dtype=np.uint8)  # OFF blue, ON red


def event_frame(events: Events) -> np.ndarray:
    """Draw events on white: ON red, OFF blue; the latest event of a pixel wins.

    Args:
        events: Events in any order; of events at equal time the later in the arrays wins.

    Returns:
        uint8 [H, W, 3], a new array.
    """
    events = events.sorted()
    frame = np.full((events.height * events.width, 3), _WHITE, dtype=np.uint8)
    pixel = events.y.astype(np.int64) * events.width + events.x
    # Assignment through repeated indices has no defined order; the first of each pixel in the reversed array has.
    pixel, from_end = np.unique(pixel[::-1], return_index=True)
    frame[pixel] = _COLOURS[events.p[len(events) - 1 - from_end]]
    return frame.reshape(events.height, events.width, 3)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write an image as PNG.

    Args:
        path: File to write; replaced if it exists.
        image: uint8 [H, W, 3] or [H, W].

    Raises:
        ValueError: if the image has another type or shape, or no pixels.
        ImportError: without Pillow, which the extra `demo` brings.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ValueError(f"image must be uint8 [H, W, 3] or [H, W] with pixels, got {image.dtype} {list(image.shape)}")
    require("PIL.Image", "demo", "save_png").fromarray(image).save(path, format="PNG")
