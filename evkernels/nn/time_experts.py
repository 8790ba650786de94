"""Experts of K-MOTE: an affine map of time per feature, then a sum of basis functions of it.

The sums over a feature's `count` functions are one product with a matrix that is zero between features: PyTorch's sums
over so short an axis take longer than the functions themselves.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus


class Expert(nn.Module):
    """Basis functions of an affine map of time per feature: [N, 1] to [N, dim]."""

    def __init__(self, dim: int, basis: nn.Module):
        super().__init__()
        self.alpha_weights = nn.Parameter(0.1 * torch.randn(1, dim))
        self.alpha_bias = nn.Parameter(torch.zeros(dim))
        self.basis_function = basis

    def forward(self, column: Tensor) -> Tensor:
        return self.basis_function(column * self.alpha_weights + self.alpha_bias)


class CosineBasis(nn.Module):
    """Cosines of learned frequencies, amplitudes and phases, `count` per feature."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, count + 1) + 0.1 * torch.randn(dim, count))
        self.amplitudes = nn.Parameter(torch.full((dim, count), 0.5))
        self.phases = nn.Parameter(torch.zeros(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        return _sums(torch.addcmul(self.phases, self.frequencies, x[..., None]).cos(), self.amplitudes)


class SplineBasis(nn.Module):
    """As published, the value is (1 - u)^3 / 6 times the third difference of four control points: no B-spline, because
    the published matrix has rank one, and u runs over the whole range instead of one segment.
    """

    def __init__(self, dim: int, count: int = 13):
        super().__init__()
        self.control_points = nn.Parameter(0.1 * torch.randn(dim, count))
        signed = torch.tensor([1.0, -3.0, 3.0, -1.0])
        self.register_buffer("knots", torch.linspace(0, 1, count + 3))
        # Only a key of the published checkpoints: what it does is written out below.
        self.register_buffer("psi_k_matrix", signed[:, None] * signed / 6)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.knots[3], self.knots[-4]
        x = x.clamp(low, high)
        u = (x - low) / (high - low)
        segment = torch.searchsorted(self.knots, x.detach().contiguous()) - 3
        points = self.control_points
        differences = points[:, :-3] - 3 * (points[:, 1:-2] - points[:, 2:-1]) - points[:, 3:]
        segment = segment.clamp(0, differences.shape[1] - 1)
        return (1 - u) ** 3 / 6 * differences.T.gather(0, segment)


class GaussianBasis(nn.Module):
    """Gaussian kernels of learned means, widths and positive weights, `count` per feature."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.raw_weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.means = nn.Parameter(2 * torch.randn(dim, count))
        self.raw_stds = nn.Parameter(0.1 * torch.randn(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        distance = _scaled(x, self.means, self.raw_stds)
        return _sums(torch.exp(-0.5 * distance * distance), softplus(self.raw_weights))


class WaveletBasis(nn.Module):
    """Mexican hats or Morlet wavelets of learned scales, translations and weights, `count` per feature."""

    def __init__(self, dim: int, wavelet: str, count: int):
        super().__init__()
        self.wavelet = wavelet
        self.weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.raw_scales = nn.Parameter(0.1 * torch.randn(dim, count))
        self.translations = nn.Parameter(0.1 * torch.randn(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        s = _scaled(x, self.translations, self.raw_scales)
        square = s * s
        wave = 1 - square if self.wavelet == "mexican_hat" else torch.cos(5 * s)
        return _sums(wave * torch.exp(-0.5 * square), self.weights)


class SplineExpert(nn.Module):
    """SiLU and cubic B-splines on [-1, 1] of time itself, [N, 1] to [N, dim]: one edge function per feature.

    The splines start as small noise: coefficients uniform in +-0.01, where the published layer fits noise of that size.
    """

    def __init__(self, dim: int, intervals: int = 5):
        super().__init__()
        self.intervals = intervals
        self.coef = nn.Parameter(torch.empty(1, dim, intervals + 3).uniform_(-0.01, 0.01))
        self.scale_base = nn.Parameter(torch.empty(1, dim).uniform_(-1, 1))
        self.scale_sp = nn.Parameter(torch.ones(1, dim))

    def forward(self, column: Tensor) -> Tensor:
        count = self.intervals + 3
        middles = torch.arange(count, dtype=column.dtype, device=column.device) - (count - 1) / 2
        distance = (column * (self.intervals / 2) - middles).abs().clamp(max=2)
        inner = (4 + (3 * distance - 6) * distance**2) / 6
        bases = torch.where(distance < 1, inner, (2 - distance) ** 3 / 6)
        return self.scale_base * silu(column) + self.scale_sp * (bases @ self.coef[0].T)


def _scaled(x: Tensor, middles: Tensor, raw_widths: Tensor) -> Tensor:
    """(x - middle) / width of every function, [N, dim, count]."""
    per_width = 1 / (softplus(raw_widths) + 1e-6)
    return torch.addcmul(-middles * per_width, per_width, x[..., None])


def _sums(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over each feature's functions: [N, dim, count] and [dim, count] to [N, dim]."""
    return values.flatten(1) @ weights.T.diag_embed().transpose(0, 1).flatten(0, 1)
