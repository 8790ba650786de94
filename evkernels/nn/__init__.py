"""Drop-in modules."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.histogram import StackedHistogram
from evkernels.nn.normalization import EventNormalization, event_normalization

__all__ = [
    "ChannelAttention",
    "EventNormalization",
    "StackedHistogram",
    "event_normalization",
]
