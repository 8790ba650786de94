"""What every op means: plain PyTorch, one file per op, same names and signatures as `evkernels.ops`.

Each file holds the forward and, where the op is differentiable, a hand-written backward. These functions are the
default kernels of the registered ops, so they also serve every device and build for which no faster kernel exists.
"""

from evkernels.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from evkernels.reference.lstm_gates import lstm_gates, lstm_gates_backward

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "lstm_gates",
    "lstm_gates_backward",
]
