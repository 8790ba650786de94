"""Drop-in modules."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.normalization import EventNormalization, event_normalization

__all__ = [
    "ChannelAttention",
    "EventNormalization",
    "event_normalization",
]
