"""Drop-in modules."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.normalization import EventNormalization, event_normalization
from evkernels.nn.separable import SeparableBlock, SeparableConv2d

__all__ = [
    "ChannelAttention",
    "EventNormalization",
    "SeparableBlock",
    "SeparableConv2d",
    "event_normalization",
]
