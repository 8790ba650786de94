"""Drop-in modules: parameters, convolutions and op calls; state-dict keys are those of the published layers."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.nn.conv_lstm import ConvLSTMCell
from evkernels.nn.histogram import StackedHistogram
from evkernels.nn.normalization import EventNormalization, event_normalization
from evkernels.nn.separable import SeparableBlock, SeparableConv2d
from evkernels.nn.time_embeddings import (
    KMOTE,
    CombinedLeTE,
    FasterKAN,
    LearnablePositionEmbedding,
    LeTE,
    SinCosPositionEncoding,
)

__all__ = [
    "KMOTE",
    "ChannelAttention",
    "CombinedLeTE",
    "ConvGRUCell",
    "ConvLSTMCell",
    "EventNormalization",
    "FasterKAN",
    "LeTE",
    "LearnablePositionEmbedding",
    "SeparableBlock",
    "SeparableConv2d",
    "SinCosPositionEncoding",
    "StackedHistogram",
    "event_normalization",
]
