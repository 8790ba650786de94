"""Pictures of events, for people to look at: one frame per window, a PNG writer, and an animation writer."""

from collections.abc import Iterable
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


def save_animation(path: str | Path, frames: Iterable[np.ndarray], milliseconds: int = 50) -> None:
    """Write frames as an animation that plays again and again.

    Args:
        path: File to write, .gif, or .png or .apng for an animated PNG; replaced if it exists.
        frames: uint8 [H, W, 3] each, of one size. A GIF holds them exactly up to 256 colours per frame, and as many as
            event frames have always.
        milliseconds: Time per frame, in a GIF rounded down to tens; viewers slow down below 20.

    Raises:
        ValueError: for another ending, no frames, frames of another type or of several sizes, or a time below 1.
        ImportError: without Pillow, which the extra `demo` brings.
    """
    format = {".gif": "GIF", ".png": "PNG", ".apng": "PNG"}.get(Path(path).suffix.lower())
    if format is None:
        raise ValueError(f"path must end with .gif, .png or .apng, got {Path(path).name}")
    if milliseconds < 1:
        raise ValueError(f"milliseconds must be at least 1, got {milliseconds}")
    frames = [np.asarray(frame) for frame in frames]
    shapes = {frame.shape if frame.dtype == np.uint8 else None for frame in frames}
    if len(shapes) != 1 or None in shapes or frames[0].ndim != 3 or frames[0].shape[2] != 3 or frames[0].size == 0:
        got = ", ".join(sorted({f"{frame.dtype} {list(frame.shape)}" for frame in frames})) or "none"
        raise ValueError(f"frames must be uint8 [H, W, 3] with pixels and of one size, got {got}")
    library = require("PIL.Image", "demo", "save_animation")
    images = [library.fromarray(frame) for frame in frames]
    if format == "GIF":
        images = [image.quantize(dither=library.Dither.NONE) for image in images]
    images[0].save(path, format=format, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
