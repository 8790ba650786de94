"""Event recordings before they become tensors: a container, file readers, a simulator and drawing.

Importing this package needs NumPy alone; torch, decoders and image libraries are imported by the call that needs them.
"""

from .accumulator import EventAccumulator, Snapshot
from .batch import EventBatch, collate
from .container import Events
from .draw import event_frame, representation_frame, save_animation, save_png
from .packets import Recording
from .readers import RecordingError, read
from .simulate import simulate
from .transforms import PixelMap, crop, downsample, drop_pixels, flip_horizontal, hot_pixels, pixel_map, rectify

__all__ = [
    "EventAccumulator",
    "EventBatch",
    "Events",
    "PixelMap",
    "Recording",
    "RecordingError",
    "Snapshot",
    "collate",
    "crop",
    "downsample",
    "drop_pixels",
    "event_frame",
    "flip_horizontal",
    "hot_pixels",
    "pixel_map",
    "read",
    "rectify",
    "representation_frame",
    "save_animation",
    "save_png",
    "simulate",
]
