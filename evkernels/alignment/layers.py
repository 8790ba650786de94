"""Building blocks of the alignment modules, with the state-dict keys of EventGPT's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear layers with optional layer norm, activation and dropout between them; one layer is linear.

    Args:
        in_dim, out_dim, hidden_dim: Sizes.
        num_layers: Linear layers, at least 1.
        dropout, use_layer_norm, activation: What stands between them: "gelu", "relu", "silu" or "tanh".
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 512,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_layer_norm: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            norm = [nn.LayerNorm(hidden_dim)] if use_layer_norm else []
            layers += [nn.Linear(in_dim, hidden_dim), *norm, _ACTIVATIONS[activation](), nn.Dropout(dropout)]
            in_dim = hidden_dim
        self.mlp = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class ProjectionHead(nn.Module):
    """Linear, batch norm, ReLU, linear: into the space where pairs are compared. A training batch holds at least 2."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class FeatureAdapter(nn.Module):
    """A linear layer times a learnable number."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class LinearAdapter(nn.Module):
    """A linear layer that begins as the identity, as far as both sizes go."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        common = min(in_dim, out_dim)
        with torch.no_grad():
            self.linear.weight[:common].zero_()
            self.linear.weight[:common, :common].copy_(torch.eye(common))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class BottleneckAdapter(nn.Module):
    """Down, GELU, dropout, up; the way up begins at zero."""

    def __init__(self, in_dim: int, out_dim: int, bottleneck_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.down_proj = nn.Linear(in_dim, bottleneck_dim)
        self.up_proj = nn.Linear(bottleneck_dim, out_dim)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)
        nn.init.kaiming_normal_(self.down_proj.weight)
        for parameter in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(self.dropout(self.activation(self.down_proj(x))))


class WhiteningLayer(nn.Module):
    """Features without correlation, by running mean and covariance, which training batches update.

    Args:
        dim: Size of the features.
        momentum: Share of a batch in the running statistics.
        eps: Added to the variances.
    """

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_cov", torch.eye(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 1:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), self.momentum)
                self.running_cov.lerp_(torch.cov(x.T).reshape(self.running_cov.shape), self.momentum)
                self.num_batches_tracked += 1
        # A symmetric matrix: its singular vectors are its eigenvectors.
        identity = torch.eye(len(self.running_cov), dtype=x.dtype, device=x.device)
        values, vectors = torch.linalg.eigh(self.running_cov + self.eps * identity)
        return (x - self.running_mean) @ (vectors * (values.clamp_min(0) + self.eps).rsqrt()) @ vectors.T


class CrossModalAttention(nn.Module):
    """Multi-head attention of [B, T, dim] queries over keys and values of another kind; 2-d inputs are T = 1."""

    def __init__(self, dim: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = query.dim() == 2
        q, k, v = (x[:, None] if x.dim() == 2 else x for x in (query, key, value))
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out[:, 0] if flat else out
