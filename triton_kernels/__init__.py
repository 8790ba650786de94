"""The ops in Triton: one file per op, functions with the names and signatures of the registered ops.

Installed as `evkernels.triton_kernels`. Importing it needs triton; with TRITON_INTERPRET=1 the kernels run on CPU
tensors.
"""

from evkernels.triton_kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from evkernels.triton_kernels.event_histogram import event_histogram
from evkernels.triton_kernels.lstm_gates import lstm_gates, lstm_gates_backward

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "event_histogram",
    "lstm_gates",
    "lstm_gates_backward",
]
