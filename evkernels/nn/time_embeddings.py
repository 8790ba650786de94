"""Embeddings of time for recurrent networks on event sequences: LeTE as one op, sines and cosines, positions."""

import math

import torch
from torch import Tensor, nn

from evkernels import ops


class FourierSeries(nn.Module):
    """Parameters of LeTE's Fourier part: harmonics of every feature, mixed into every feature.

    Args:
        dim: Number of features F.
        harmonics: Highest multiple of the angles.
    """

    def __init__(self, dim: int, harmonics: int = 5):
        super().__init__()
        weight = torch.randn(2, dim, dim, harmonics) / math.sqrt(max(dim, 1) * harmonics)
        self.fourier_weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(dim))


class Spline(nn.Module):
    """Parameters of LeTE's spline part: tanh and cubic B-spline bases of every feature, mixed into every feature.

    The published code leaves both weights uninitialised. Here the base starts as a linear layer does, the spline
    uniform in +-0.01, as KAN-MAMMOTE's copy of the layer does. `grid`, the knots, is kept for checkpoints; the op
    knows them, so a checkpoint with other knots is refused.

    Args:
        dim: Number of features S.
        intervals: Intervals of the uniform grid on [-1, 1].
    """

    def __init__(self, dim: int, intervals: int = 5):
        super().__init__()
        self.base_weight = nn.Parameter(torch.empty(dim, dim))
        self.spline_weight = nn.Parameter(torch.empty(dim, dim, intervals + 3))
        if dim:
            nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
            nn.init.uniform_(self.spline_weight, -0.01, 0.01)
        knots = torch.arange(-3, intervals + 4) * (2 / intervals) - 1
        self.register_buffer("grid", knots.expand(dim, -1).contiguous())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        grid = state_dict.get(prefix + "grid")
        if grid is not None and grid.shape == self.grid.shape:
            own = self.grid.to(grid.device, grid.dtype)
            if not own.is_meta and not torch.allclose(grid, own, rtol=0, atol=0.01):
                errors.append(f"{prefix}grid must hold the uniform knots on [-1, 1], which the layer is made for")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class CombinedLeTE(nn.Module):
    """Learnable time embedding: Fourier series and splines of scaled time, layer norm and scale, as one fused op.

    State-dict keys are those of the published code. As there, an embedding with only one of the two parts has neither
    layer norm nor scale (their parameters exist if asked for).

    Args:
        dim: Size of the embedding.
        p: Share of the Fourier part, 0 to 1: it gets floor(dim * p) features, the splines the others.
        layer_norm: Whether to normalise the embedding.
        scale: Whether to multiply it by a learnable factor per feature.
        parameter_requires_grad: False freezes the rates, shifts and factors; as published, the mixing weights and
            the norm stay trainable.

    Raises:
        ValueError: if `dim` is less than 1 or `p` is not in [0, 1].

    Source: LeTE (arXiv:2505.00887), CombinedLeTE of the authors' code.
    """

    def __init__(
        self,
        dim: int,
        p: float = 0.5,
        layer_norm: bool = True,
        scale: bool = True,
        parameter_requires_grad: bool = True,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.dim, self.p = dim, p
        self.fourier_dim = math.floor(dim * p)
        self.spline_dim = dim - self.fourier_dim
        self.w1_fourier = _rates(self.fourier_dim)
        self.w1_spline = _rates(self.spline_dim)
        self.w2_fourier = FourierSeries(self.fourier_dim)
        self.w2_spline = Spline(self.spline_dim)
        self.layernorm = nn.LayerNorm(dim) if layer_norm else None
        self.scale_weight = nn.Parameter(torch.ones(dim)) if scale else None
        if not parameter_requires_grad:
            for parameter in (*self.w1_fourier.parameters(), *self.w1_spline.parameters(), self.scale_weight):
                if parameter is not None:
                    parameter.requires_grad_(False)

    def forward(self, t: Tensor) -> Tensor:
        """Embeds timestamps.

        Args:
            t: Timestamps of any shape, in the dtype of the parameters; other dtypes are converted.

        Returns:
            [*t.shape, dim].
        """
        both = self.fourier_dim > 0 and self.spline_dim > 0
        norm = self.layernorm if both else None
        embedding = ops.learnable_time_embedding(
            t.reshape(-1).to(self.w1_fourier.weight.dtype),
            self.w1_fourier.weight.squeeze(1),
            self.w1_fourier.bias,
            self.w2_fourier.fourier_weight,
            self.w2_fourier.bias,
            self.w1_spline.weight.squeeze(1),
            self.w1_spline.bias,
            self.w2_spline.base_weight,
            self.w2_spline.spline_weight,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            self.scale_weight if both else None,
            1e-5 if norm is None else norm.eps,
        )
        return embedding.reshape(*t.shape, self.dim)

    def extra_repr(self) -> str:
        norm, scale = self.layernorm is not None, self.scale_weight is not None
        return f"{self.dim}, p={self.p}, layer_norm={norm}, scale={scale}"


LeTE = CombinedLeTE


class SinCosPositionEncoding(nn.Module):
    """Sines and cosines of scaled time in fixed frequencies, interleaved: even features sines, odd ones cosines.

    Equivalent to::

        angles = (t / length)[..., None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
        embedding = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    With positions scaled to [0, 1) most features are nearly constant: known of the published comparison, and kept.

    Args:
        dim: Size of the embedding, even.
        length: What timestamps are divided by.

    Raises:
        ValueError: if `dim` is odd or less than 2.
    """

    def __init__(self, dim: int, length: float = 784):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        self.dim, self.length = dim, length
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = (t.to(self.frequencies.dtype) / self.length)[..., None] * self.frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.dim}, length={self.length}"


class LearnablePositionEmbedding(nn.Module):
    """A learned vector for every integer position, key `position_embedding.weight`.

    Args:
        dim: Size of the embedding.
        length: Number of positions: they are 0 to `length` - 1.
    """

    def __init__(self, dim: int, length: int = 784):
        super().__init__()
        self.position_embedding = nn.Embedding(length, dim)

    def forward(self, position: Tensor) -> Tensor:
        return self.position_embedding(position)


def _rates(dim: int) -> nn.Linear:
    """A linear map of time, with rates from 1 down to 1e-9 in even steps of their logarithm."""
    linear = nn.Linear(1, dim) if dim else _EmptyLinear()
    with torch.no_grad():
        linear.weight.copy_((10 ** -torch.linspace(0, 9, dim, dtype=torch.float64))[:, None])
        linear.bias.zero_()
    return linear


class _EmptyLinear(nn.Module):
    """Linear(1, 0) without the initialisation, which warns that there is nothing to initialise."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(0, 1)), nn.Parameter(torch.empty(0))
