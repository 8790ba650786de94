"""What every op means: plain PyTorch, one file per op, same names and signatures as `evkernels.ops`.

Each file holds the forward and, where the op is differentiable, a hand-written backward. These functions are the
default kernels of the registered ops, so they also serve every device and build for which no faster kernel exists.
"""

from evkernels.reference.batch_norm_activation import batch_norm_activation, batch_norm_activation_backward
from evkernels.reference.blur_soft_pool2d import blur_soft_pool2d, blur_soft_pool2d_backward
from evkernels.reference.channel_attention import channel_attention, channel_attention_backward
from evkernels.reference.channel_rms_norm import channel_rms_norm, channel_rms_norm_backward
from evkernels.reference.contrastive_loss import (
    contrastive_loss,
    contrastive_loss_backward,
    contrastive_loss_kernel,
)
from evkernels.reference.conv_gru_3x3 import conv_gru_3x3, conv_gru_3x3_backward, conv_gru_3x3_kernel
from evkernels.reference.conv_lstm_1x1 import (
    conv_lstm_1x1,
    conv_lstm_1x1_backward,
    conv_lstm_1x1_kernel,
    kept_channels,
)
from evkernels.reference.conv_lstm_3x3 import (
    conv_3x3_input_gradient,
    conv_3x3_weight_gradient,
    conv_lstm_3x3,
    conv_lstm_3x3_backward,
    conv_lstm_3x3_kernel,
)
from evkernels.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from evkernels.reference.event_histogram import (
    event_histogram,
    event_histogram_into_kernel,
    event_histogram_kernel,
)
from evkernels.reference.expert_router import expert_router, expert_router_backward
from evkernels.reference.gru_gates import (
    gru_gates,
    gru_gates_backward,
    gru_reset,
    gru_reset_backward,
    gru_update,
    gru_update_backward,
)
from evkernels.reference.learnable_time_embedding import (
    learnable_time_embedding,
    learnable_time_embedding_backward,
)
from evkernels.reference.lstm_gates import lstm_gates, lstm_gates_backward
from evkernels.reference.normalized_mse_cosine import normalized_mse_cosine, normalized_mse_cosine_backward
from evkernels.reference.residual_mlp import residual_mlp, residual_mlp_backward
from evkernels.reference.retrieval_recall import retrieval_recall
from evkernels.reference.separable_conv2d import (
    separable_conv2d,
    separable_conv2d_backward,
    separable_conv2d_training,
)
from evkernels.reference.separable_norm_conv2d import (
    separable_norm_conv2d,
    separable_norm_conv2d_backward,
    separable_norm_conv2d_kernel,
)
from evkernels.reference.time_basis import time_basis, time_basis_backward
from evkernels.reference.time_surface import (
    decayed_time_surface_into_kernel,
    decayed_time_surface_kernel,
    time_surface,
    time_surface_into_kernel,
    time_surface_kernel,
)
from evkernels.reference.voxel_grid import (
    voxel_grid,
    voxel_grid_backward,
    voxel_grid_into_kernel,
    voxel_grid_kernel,
)
from evkernels.reference.window_attention import to_map, to_tokens, window_attention, window_attention_backward

__all__ = [
    "batch_norm_activation",
    "batch_norm_activation_backward",
    "blur_soft_pool2d",
    "blur_soft_pool2d_backward",
    "channel_attention",
    "channel_attention_backward",
    "channel_rms_norm",
    "channel_rms_norm_backward",
    "contrastive_loss",
    "contrastive_loss_backward",
    "contrastive_loss_kernel",
    "conv_3x3_input_gradient",
    "conv_3x3_weight_gradient",
    "conv_gru_3x3",
    "conv_gru_3x3_backward",
    "conv_gru_3x3_kernel",
    "conv_lstm_1x1",
    "conv_lstm_1x1_backward",
    "conv_lstm_1x1_kernel",
    "conv_lstm_3x3",
    "conv_lstm_3x3_backward",
    "conv_lstm_3x3_kernel",
    "decayed_time_surface_into_kernel",
    "decayed_time_surface_kernel",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "event_histogram",
    "event_histogram_into_kernel",
    "event_histogram_kernel",
    "expert_router",
    "expert_router_backward",
    "gru_gates",
    "gru_gates_backward",
    "gru_reset",
    "gru_reset_backward",
    "gru_update",
    "gru_update_backward",
    "kept_channels",
    "learnable_time_embedding",
    "learnable_time_embedding_backward",
    "lstm_gates",
    "lstm_gates_backward",
    "normalized_mse_cosine",
    "normalized_mse_cosine_backward",
    "residual_mlp",
    "residual_mlp_backward",
    "retrieval_recall",
    "separable_conv2d",
    "separable_conv2d_backward",
    "separable_conv2d_training",
    "separable_norm_conv2d",
    "separable_norm_conv2d_backward",
    "separable_norm_conv2d_kernel",
    "time_basis",
    "time_basis_backward",
    "time_surface",
    "time_surface_into_kernel",
    "time_surface_kernel",
    "to_map",
    "to_tokens",
    "voxel_grid",
    "voxel_grid_backward",
    "voxel_grid_into_kernel",
    "voxel_grid_kernel",
    "window_attention",
    "window_attention_backward",
]
