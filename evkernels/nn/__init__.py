"""Drop-in modules: parameters, convolutions and op calls; state-dict keys are those of the published layers."""

from evkernels.nn import compat
from evkernels.nn.attention import ChannelAttention
from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.nn.conv_lstm import ConvLSTMCell
from evkernels.nn.convert import Conversion, convert
from evkernels.nn.convolution import set_winograd
from evkernels.nn.depthwise import CausalDepthwiseConv3d, DepthwiseConv2d
from evkernels.nn.enhanced_lstm import LightweightEnhancedConvLSTM
from evkernels.nn.event_images import BinaRep, EventCountImage, EventImage, MixedDensityEventStack
from evkernels.nn.event_memories import AveragedTimeSurface, TimeOrderedRecentEvents
from evkernels.nn.event_spike_tensor import EventSpikeTensor
from evkernels.nn.faster_kan import FasterKAN
from evkernels.nn.histogram import StackedHistogram
from evkernels.nn.immediate_kan_mammote import ImmediateKANMammote, Mamba
from evkernels.nn.kan_mammote import ContinuousMambaLayer, KANMammote
from evkernels.nn.kmote import KMOTE
from evkernels.nn.normalization import EventNormalization, event_normalization
from evkernels.nn.pooling import AABlur_SE_SoftPool
from evkernels.nn.recurrent import detach
from evkernels.nn.recurrent_layers import ConvGRU, ConvLSTM
from evkernels.nn.rms_norm import RMSNorm
from evkernels.nn.rvt import DWSConvLSTM2d, PlainLSTM2d
from evkernels.nn.separable import SeparableBlock, SeparableConv2d
from evkernels.nn.time_embeddings import CombinedLeTE, LearnablePositionEmbedding, LeTE, SinCosPositionEncoding
from evkernels.nn.time_surface import TimeSurface
from evkernels.nn.voxel_grid import VoxelGrid

__all__ = [
    "KMOTE",
    "AABlur_SE_SoftPool",
    "AveragedTimeSurface",
    "BinaRep",
    "CausalDepthwiseConv3d",
    "ChannelAttention",
    "CombinedLeTE",
    "ContinuousMambaLayer",
    "ConvGRU",
    "ConvGRUCell",
    "ConvLSTM",
    "ConvLSTMCell",
    "Conversion",
    "DWSConvLSTM2d",
    "DepthwiseConv2d",
    "EventCountImage",
    "EventImage",
    "EventNormalization",
    "EventSpikeTensor",
    "FasterKAN",
    "ImmediateKANMammote",
    "KANMammote",
    "LeTE",
    "LearnablePositionEmbedding",
    "LightweightEnhancedConvLSTM",
    "Mamba",
    "MixedDensityEventStack",
    "PlainLSTM2d",
    "RMSNorm",
    "SeparableBlock",
    "SeparableConv2d",
    "SinCosPositionEncoding",
    "StackedHistogram",
    "TimeOrderedRecentEvents",
    "TimeSurface",
    "VoxelGrid",
    "compat",
    "convert",
    "detach",
    "event_normalization",
    "set_winograd",
]
