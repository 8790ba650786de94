"""Fused kernels for event-camera recurrent vision: ConvLSTM, ConvGRU, separable convolution, event representations."""

from evkernels import ops, reference
from evkernels.backends import use_backend
from evkernels.status import status

__version__ = "0.1.0"
__all__ = ["ops", "reference", "status", "use_backend"]
