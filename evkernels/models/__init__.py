"""Networks built from `evkernels.nn`."""

from evkernels.models.event_encoder import EventEncoder, EventPredictor

__all__ = ["EventEncoder", "EventPredictor"]
