"""Drop-in modules."""

from evkernels.nn.separable import SeparableBlock, SeparableConv2d

__all__ = [
    "SeparableBlock",
    "SeparableConv2d",
]
