"""Pictures of events and of what is made of them, for people to look at, and writers of PNG and animations."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from evkernels import files

from .container import Events
from .optional import require

_WHITE = 255
_FULL_COLOUR = 95  # Percentile: hot pixels would make everything else pale.
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


def representation_frame(frame: np.ndarray, signed: bool | None = None) -> np.ndarray:
    """Draw a representation on white: what ON events left is red, what OFF events left blue, both dark.

    Args:
        frame: [C, H, W] of any real dtype: channels of OFF events, then as many of ON events (stacked histograms, event
            counts, time surfaces), or signed sums (voxel grids, mixed-density stacks). Channels are added up.
        signed: Whether values are signed sums. None: if one is negative, or C is odd.

    Returns:
        uint8 [H, W, 3]. Colour grows with the square root of the value up to the 95th percentile of what is not 0, so
        that single events are seen beside hot pixels.

    Raises:
        ValueError: if the shape is another one, a value is not finite, or C is odd and `signed` is False.
    """
    frame = np.asarray(frame, np.float64)
    if frame.ndim != 3 or frame.shape[0] == 0 or not np.isfinite(frame).all():
        raise ValueError(f"frame must be finite and [C, H, W] with C at least 1, got {list(frame.shape)}")
    if signed is None:
        signed = frame.shape[0] % 2 == 1 or bool((frame < 0).any())
    if not signed and frame.shape[0] % 2:
        raise ValueError(f"frame must have as many channels for ON events as for OFF, got {frame.shape[0]} in all")
    if signed:
        total = frame.sum(axis=0)
        off, on = np.maximum(-total, 0), np.maximum(total, 0)
    else:
        off, on = frame.reshape(2, -1, *frame.shape[1:]).sum(axis=1)
    left = np.concatenate([off[off > 0], on[on > 0]])
    full = np.percentile(left, _FULL_COLOUR) if left.size else 1.0
    off, on = np.sqrt(np.minimum(off / full, 1)), np.sqrt(np.minimum(on / full, 1))
    return np.rint(_WHITE * (1 - np.stack([off, np.maximum(off, on), on], axis=-1))).astype(np.uint8)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write an image as PNG.

    Args:
        path: File to write; if it exists, replaced by the whole new one.
        image: uint8 [H, W, 3] or [H, W].

    Raises:
        ValueError: if the image has another type or shape, or no pixels.
        ImportError: without Pillow, which the extra `demo` brings.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ValueError(f"image must be uint8 [H, W, 3] or [H, W] with pixels, got {image.dtype} {list(image.shape)}")
    picture = require("PIL.Image", "demo", "save_png").fromarray(image)
    files.write(Path(path), lambda file: picture.save(file, format="PNG"))


def save_animation(path: str | Path, frames: Iterable[np.ndarray], milliseconds: int = 50) -> None:
    """Write frames as an animation that plays again and again.

    Args:
        path: File to write, .gif, or .png or .apng for an animated PNG; if it exists, replaced by the whole new
            one.
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
    options = {"format": format, "save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    files.write(Path(path), lambda file: images[0].save(file, **options))
