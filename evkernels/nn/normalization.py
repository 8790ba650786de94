"""Normalisation of event tensors: statistics over the pixels where something happened.

Plain PyTorch: a few passes over a network's input, once per forward pass, are no bottleneck.
"""

import torch
from torch import Tensor, nn

from evkernels.reference.voxel_grid import normalize_active_pixels


def event_normalization(x: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Each channel to zero mean and unit variance over the active pixels of its sample; inactive pixels become 0.

    Equivalent to::

        mask = (x.abs().sum(dim=1, keepdim=True) > epsilon).float()
        count = mask.sum(dim=(2, 3), keepdim=True) + epsilon
        mean = x.sum(dim=(2, 3), keepdim=True) / count
        variance = (mask * (x - mean) ** 2).sum(dim=(2, 3), keepdim=True) / count
        y = (x - mean) / (variance.sqrt() + epsilon) * mask

    A pixel is active if any channel is nonzero there, so a channel's zeros at active pixels count in its statistics.

    Args:
        x: Event tensor [N, C, H, W] of any real dtype: voxel grids, histograms.
        epsilon: Threshold of activity, and what keeps divisions finite.

    Returns:
        [N, C, H, W], float32 (float64 for float64), never aliasing `x`. Zeros where a sample or channel has no events.

    Raises:
        ValueError: if `x` is not 4-dimensional.

    Differentiable; the gradient is finite where the variance is 0. Source: EfficientConvLSTM, EventNormalization.
    E2VID differs: one mean and deviation for all nonzero entries of a tensor. `voxel_grid(normalize="eseg")` does the
    same.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")
    return normalize_active_pixels(x.to(torch.promote_types(x.dtype, torch.float32)), epsilon)


class EventNormalization(nn.Module):
    """`event_normalization` as a module; it has no parameters and no state.

    Args:
        epsilon: Threshold of activity, and what keeps divisions finite.
    """

    def __init__(self, epsilon: float = 1e-8):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return event_normalization(x, self.epsilon)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"
