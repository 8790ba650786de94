"""Drop-in modules: parameters, convolutions and op calls; state-dict keys are those of the published layers."""

from evkernels.nn.attention import ChannelAttention
from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.nn.conv_lstm import ConvLSTMCell
from evkernels.nn.convert import Conversion, convert
from evkernels.nn.depthwise import CausalDepthwiseConv3d, DepthwiseConv2d
from evkernels.nn.histogram import StackedHistogram
from evkernels.nn.normalization import EventNormalization, event_normalization
from evkernels.nn.pooling import AABlur_SE_SoftPool
from evkernels.nn.rms_norm import RMSNorm
from evkernels.nn.separable import SeparableBlock, SeparableConv2d

__all__ = [
    "AABlur_SE_SoftPool",
    "CausalDepthwiseConv3d",
    "ChannelAttention",
    "ConvGRUCell",
    "ConvLSTMCell",
    "Conversion",
    "DepthwiseConv2d",
    "EventNormalization",
    "RMSNorm",
    "SeparableBlock",
    "SeparableConv2d",
    "StackedHistogram",
    "convert",
    "event_normalization",
]
