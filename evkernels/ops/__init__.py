"""The ops: functions that check their arguments and call a registered `torch.ops.evkernels` operator.

One file per op holds its whole contract. Which kernel runs is PyTorch's dispatcher's business, see
`evkernels.backends`.
"""

# Layers use it; like all ops it must be declared before the compiled kernels are loaded.
from evkernels.ops import conv_3x3 as conv_3x3
from evkernels.ops.batch_norm_activation import batch_norm_activation
from evkernels.ops.blur_soft_pool2d import blur_soft_pool2d
from evkernels.ops.channel_attention import channel_attention
from evkernels.ops.channel_rms_norm import channel_rms_norm
from evkernels.ops.contrastive_loss import contrastive_loss
from evkernels.ops.conv_gru_3x3 import conv_gru_3x3
from evkernels.ops.conv_lstm_1x1 import conv_lstm_1x1
from evkernels.ops.conv_lstm_3x3 import conv_lstm_3x3
from evkernels.ops.depthwise_conv2d import depthwise_conv2d
from evkernels.ops.event_histogram import event_histogram
from evkernels.ops.expert_router import expert_router
from evkernels.ops.gru_gates import gru_gates, gru_reset, gru_update
from evkernels.ops.learnable_time_embedding import learnable_time_embedding
from evkernels.ops.lstm_gates import lstm_gates
from evkernels.ops.normalized_mse_cosine import normalized_mse_cosine
from evkernels.ops.residual_mlp import residual_mlp
from evkernels.ops.retrieval_recall import retrieval_recall
from evkernels.ops.separable_conv2d import separable_conv2d
from evkernels.ops.separable_norm_conv2d import separable_norm_conv2d
from evkernels.ops.time_basis import time_basis
from evkernels.ops.time_surface import time_surface
from evkernels.ops.voxel_grid import voxel_grid
from evkernels.ops.window_attention import window_attention

__all__ = [
    "batch_norm_activation",
    "blur_soft_pool2d",
    "channel_attention",
    "channel_rms_norm",
    "contrastive_loss",
    "conv_gru_3x3",
    "conv_lstm_1x1",
    "conv_lstm_3x3",
    "depthwise_conv2d",
    "event_histogram",
    "expert_router",
    "gru_gates",
    "gru_reset",
    "gru_update",
    "learnable_time_embedding",
    "lstm_gates",
    "normalized_mse_cosine",
    "residual_mlp",
    "retrieval_recall",
    "separable_conv2d",
    "separable_norm_conv2d",
    "time_basis",
    "time_surface",
    "voxel_grid",
    "window_attention",
]
