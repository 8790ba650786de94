"""The ops in Triton: one file per op, functions with the names and signatures of the registered ops.

Installed as `evkernels.triton_kernels`. Importing it needs triton; with TRITON_INTERPRET=1 the kernels run on CPU
tensors.
"""

from evkernels.triton_kernels.contrastive_loss import contrastive_loss, contrastive_loss_backward
from evkernels.triton_kernels.conv_lstm_1x1 import conv_lstm_1x1
from evkernels.triton_kernels.conv_lstm_1x1_backward import conv_lstm_1x1_backward
from evkernels.triton_kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from evkernels.triton_kernels.event_histogram import event_histogram
from evkernels.triton_kernels.gru_gates import (
    gru_gates,
    gru_gates_backward,
    gru_reset,
    gru_reset_backward,
    gru_update,
    gru_update_backward,
)
from evkernels.triton_kernels.learnable_time_embedding import learnable_time_embedding
from evkernels.triton_kernels.learnable_time_embedding_backward import learnable_time_embedding_backward
from evkernels.triton_kernels.lstm_gates import lstm_gates, lstm_gates_backward
from evkernels.triton_kernels.normalized_mse_cosine import normalized_mse_cosine, normalized_mse_cosine_backward
from evkernels.triton_kernels.retrieval_recall import retrieval_recall
from evkernels.triton_kernels.separable_conv2d import separable_conv2d
from evkernels.triton_kernels.time_basis import time_basis, time_basis_backward
from evkernels.triton_kernels.time_surface import time_surface
from evkernels.triton_kernels.voxel_grid import voxel_grid

__all__ = [
    "contrastive_loss",
    "contrastive_loss_backward",
    "conv_lstm_1x1",
    "conv_lstm_1x1_backward",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "event_histogram",
    "gru_gates",
    "gru_gates_backward",
    "gru_reset",
    "gru_reset_backward",
    "gru_update",
    "gru_update_backward",
    "learnable_time_embedding",
    "learnable_time_embedding_backward",
    "lstm_gates",
    "lstm_gates_backward",
    "normalized_mse_cosine",
    "normalized_mse_cosine_backward",
    "retrieval_recall",
    "separable_conv2d",
    "time_basis",
    "time_basis_backward",
    "time_surface",
    "voxel_grid",
]
