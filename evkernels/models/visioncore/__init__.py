"""VisionCore, for neurons' responses to video: a causal residual network and a behaviour-modulated ConvGRU."""

from evkernels.models.visioncore.blocks import ConvBlock, ResBlock
from evkernels.models.visioncore.network import LearnableTemporalConv, VisionCore
from evkernels.models.visioncore.resnet import ResNet

__all__ = ["ConvBlock", "LearnableTemporalConv", "ResBlock", "ResNet", "VisionCore"]
