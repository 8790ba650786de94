"""Drop-in modules: parameters and one op call each; state-dict keys are those of the published layers."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.histogram import StackedHistogram
from evkernels.nn.normalization import EventNormalization, event_normalization
from evkernels.nn.separable import SeparableBlock, SeparableConv2d

__all__ = [
    "ChannelAttention",
    "EventNormalization",
    "SeparableBlock",
    "SeparableConv2d",
    "StackedHistogram",
    "event_normalization",
]
