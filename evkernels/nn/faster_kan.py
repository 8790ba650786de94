"""FasterKAN: layers of bumps around a grid."""

import torch
from torch import Tensor, nn


class ReflectionalSwitch(nn.Module):
    """Bumps 1 - tanh(x - g)^2 around grid points g: the basis of FasterKAN.

    Args:
        grid_min: First grid point.
        grid_max: Last grid point.
        num_grids: Number of grid points G.
    """

    def __init__(self, grid_min: float, grid_max: float, num_grids: int):
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(grid_min, grid_max, num_grids), requires_grad=False)
        # Only a key of the published checkpoints: their forward pass does not use it.
        self.inv_denominator = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.tanh(x[..., None] - self.grid)
        return (1 - bumps) * (1 + bumps)


class FasterKAN(nn.Module):
    """One layer of FasterKAN: layer norm, bumps of every feature around a grid, a linear map of them all.

    State-dict keys are those of the published code. Its hand-written gradient of the input is half the true one (it
    multiplies by `inv_denominator`, which its forward pass leaves out); this is the true one.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        grid_min: First grid point.
        grid_max: Last grid point.
        num_grids: Number of grid points.

    Plain PyTorch, not fused. Source: FasterKANLayer of faster-kan.
    """

    def __init__(
        self, in_features: int, out_features: int, grid_min: float = -2.0, grid_max: float = 2.0, num_grids: int = 8
    ):
        super().__init__()
        self.layernorm = nn.LayerNorm(in_features)
        self.rbf = ReflectionalSwitch(grid_min, grid_max, num_grids)
        self.spline_linear = nn.Linear(in_features * num_grids, out_features, bias=False)
        nn.init.xavier_uniform_(self.spline_linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))
