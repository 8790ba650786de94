"""RMSNorm over channels, as in VisionCore: `ops.channel_rms_norm`; over other dimensions plain PyTorch."""

import torch
from torch import Tensor, nn

from evkernels import ops


class RMSNorm(nn.Module):
    """Divides by the root of the mean square over some dimensions, then scales and shifts each channel.

    Equivalent to::

        y = x * torch.rsqrt(x.square().mean(norm_dims, keepdim=True) + eps)
        y = y * gamma.view(1, -1, 1, ...) + beta.view(1, -1, 1, ...)

    computed in float32 (float64 for float64) and cast to the dtype of `x`.

    Args:
        num_features: Channels C of the input [N, C, ...].
        norm_dims: Dimensions over which the mean goes, as a tuple; (1,) are the channels at each pixel.
        eps: Added to the mean square.
        affine: Whether there are `gamma` [C], at first one, and `beta` [C], at first zero.

    Raises:
        TypeError: if `norm_dims` is not a tuple.
        ValueError: if the input has not C channels.

    gamma and beta belong to dimension 1 whatever `norm_dims` is. Differentiable to any order. Source: VisionCore,
    RMSNorm; after Zhang and Sennrich 2019 (arXiv:1910.07467).
    """

    def __init__(
        self,
        num_features: int,
        norm_dims: tuple[int, ...] = (1,),
        eps: float = 1e-4,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(norm_dims, tuple):
            raise TypeError(f"norm_dims must be a tuple, got {type(norm_dims).__name__}")
        self.num_features = num_features
        self.norm_dims = norm_dims
        self.eps = eps
        if affine:
            self.gamma = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.beta = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("gamma", None)
            self.register_parameter("beta", None)

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, ...] to output of the same shape and dtype."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be [N, C, ...] with C = num_features = {self.num_features}, got {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.norm_dims == (1,) and self.gamma is not None:
            return ops.channel_rms_norm(x, self.gamma.to(dtype), self.beta.to(dtype), self.eps)
        wide = x.to(dtype)
        y = wide * torch.rsqrt(wide.square().mean(self.norm_dims, keepdim=True) + self.eps)
        if self.gamma is not None:
            shape = (1, -1) + (1,) * (x.dim() - 2)
            y = y * self.gamma.to(dtype).view(shape) + self.beta.to(dtype).view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, norm_dims={self.norm_dims}, eps={self.eps}, affine={self.gamma is not None}"
