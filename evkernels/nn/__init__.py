"""Drop-in modules."""

from evkernels.nn.histogram import StackedHistogram

__all__ = [
    "StackedHistogram",
]
