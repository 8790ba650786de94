"""Event recordings before they become tensors: a container, file readers, a simulator and drawing.

Importing this package needs NumPy alone; torch, decoders and image libraries are imported by the call that needs them.
"""

from .batch import EventBatch, collate
from .container import Events
from .draw import event_frame, save_png
from .packets import Recording
from .readers import RecordingError, read
from .simulate import simulate

__all__ = [
    "EventBatch",
    "Events",
    "Recording",
    "RecordingError",
    "collate",
    "event_frame",
    "read",
    "save_png",
    "simulate",
]
