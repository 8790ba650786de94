"""Embeddings of time for recurrent networks on event sequences: LeTE, sines and cosines, positions, K-MOTE, FasterKAN.

LeTE runs as one op; the others are plain PyTorch.
"""

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


class KMOTE(nn.Module):
    """Kernel mixture of time experts (generation A): a router picks experts, each writes its quarter of the embedding.

    The experts, in the order of their quarters: sums of cosines, splines, Gaussian kernels, wavelets, each of an
    affine map of time per feature. Only the chosen experts are computed; the quarters of the others are zero.

    Args:
        dim: Size of the embedding, a multiple of 4.
        top: Number of experts chosen per timestamp, 1 to 4. Their weights are the router's, not renormalised.
        aux_features: Size of the features that the router sees beside the time; 0 for time alone.
        wavelet: "mexican_hat" or "morlet".

    Raises:
        ValueError: if `dim` is no multiple of 4, or `top` or `wavelet` is not among those above.

    Plain PyTorch, not fused. The number of timestamps per expert depends on the data, so torch.compile splits the
    graph there. State-dict keys are those of the published checkpoint. Source: K_MOTE of kan-mammote.
    """

    def __init__(self, dim: int = 128, top: int = 2, aux_features: int = 0, wavelet: str = "mexican_hat"):
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4, at least 4, got {dim}")
        if not 1 <= top <= 4:
            raise ValueError(f"top must be in [1, 4], got {top}")
        if wavelet not in ("mexican_hat", "morlet"):
            raise ValueError(f"wavelet must be mexican_hat or morlet, got {wavelet!r}")
        self.dim, self.top = dim, top
        self.router = _Router(1 + aux_features)
        bases = {
            "fourier": _CosineBasis(dim // 4),
            "spline": _SplineBasis(dim // 4),
            "rkhs_gaussian": _GaussianBasis(dim // 4),
            "wavelet": _WaveletBasis(dim // 4, wavelet),
        }
        self.experts = nn.ModuleDict({name: _Expert(dim // 4, basis) for name, basis in bases.items()})

    def forward(self, t: Tensor, aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds timestamps.

        Args:
            t: Timestamps of any shape.
            aux: What the router sees besides [*t.shape, aux_features], or None.

        Returns:
            embedding, weights: [*t.shape, dim], and the router's weights of all experts [*t.shape, 4].
        """
        column = t.reshape(-1, 1)
        seen = column if aux is None else torch.cat([column, aux.reshape(len(column), -1)], dim=1)
        weights = self.router.mlp(seen).softmax(dim=-1)
        chosen = torch.zeros_like(weights, dtype=torch.bool)
        chosen = chosen.scatter(1, weights.topk(self.top, dim=-1).indices, True)
        quarters = []
        for k, expert in enumerate(self.experts.values()):
            rows = chosen[:, k].nonzero()[:, 0]
            values = expert(column[rows]) * weights[rows, k, None]
            quarters.append(values.new_zeros(len(column), self.dim // 4).index_copy(0, rows, values))
        return torch.cat(quarters, dim=1).reshape(*t.shape, self.dim), weights.reshape(*t.shape, 4)


class _Router(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


class _Expert(nn.Module):
    """An affine map of time per feature, then the basis."""

    def __init__(self, dim: int, basis: nn.Module):
        super().__init__()
        self.alpha_weights = nn.Parameter(0.1 * torch.randn(1, dim))
        self.alpha_bias = nn.Parameter(torch.zeros(dim))
        self.basis_function = basis

    def forward(self, column: Tensor) -> Tensor:
        return self.basis_function(column * self.alpha_weights + self.alpha_bias)


class _CosineBasis(nn.Module):
    def __init__(self, dim: int, count: int = 16):
        super().__init__()
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, count + 1) + 0.1 * torch.randn(dim, count))
        self.amplitudes = nn.Parameter(torch.full((dim, count), 0.5))
        self.phases = nn.Parameter(torch.zeros(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        return (self.amplitudes * torch.cos(self.frequencies * x[..., None] + self.phases)).sum(dim=-1)


class _SplineBasis(nn.Module):
    """As published, the value is (1 - u)^3 / 6 times the third difference of four control points: no B-spline, because
    the published matrix has rank one, and u runs over the whole range instead of one segment.
    """

    def __init__(self, dim: int, count: int = 13):
        super().__init__()
        self.control_points = nn.Parameter(0.1 * torch.randn(dim, count))
        signed = torch.tensor([1.0, -3.0, 3.0, -1.0])
        self.register_buffer("knots", torch.linspace(0, 1, count + 3))
        self.register_buffer("psi_k_matrix", signed[:, None] * signed / 6)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.knots[3], self.knots[-4]
        x = x.clamp(low, high)
        u = (x - low) / (high - low)
        segment = torch.searchsorted(self.knots, x.detach().contiguous()) - 3
        segment = segment.clamp(0, self.control_points.shape[1] - 4)
        feature = torch.arange(x.shape[-1], device=x.device)[:, None]
        points = self.control_points[feature, segment[..., None] + torch.arange(4, device=x.device)]
        powers = u[..., None] ** torch.arange(4, device=x.device)
        return ((powers @ self.psi_k_matrix.to(x.dtype)) * points).sum(dim=-1)


class _GaussianBasis(nn.Module):
    def __init__(self, dim: int, count: int = 5):
        super().__init__()
        self.raw_weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.means = nn.Parameter(2 * torch.randn(dim, count))
        self.raw_stds = nn.Parameter(0.1 * torch.randn(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        distance = (x[..., None] - self.means) / (nn.functional.softplus(self.raw_stds) + 1e-6)
        return (nn.functional.softplus(self.raw_weights) * torch.exp(-0.5 * distance * distance)).sum(dim=-1)


class _WaveletBasis(nn.Module):
    def __init__(self, dim: int, wavelet: str, count: int = 8):
        super().__init__()
        self.wavelet = wavelet
        self.weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.raw_scales = nn.Parameter(0.1 * torch.randn(dim, count))
        self.translations = nn.Parameter(0.1 * torch.randn(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        s = (x[..., None] - self.translations) / (nn.functional.softplus(self.raw_scales) + 1e-6)
        wave = 1 - s * s if self.wavelet == "mexican_hat" else torch.cos(5 * s)
        return (self.weights * wave * torch.exp(-0.5 * s * s)).sum(dim=-1)
