"""Experts of K-MOTE: an affine map of time per feature, then a sum of basis functions of it, times a gate.

Two affine maps are one, so that all but the B-splines are `ops.time_basis` with parameters made of both maps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from evkernels import ops


class Expert(nn.Module):
    """Basis functions of an affine map of time per feature, times a gate: [N] and [N] to [N, dim].

    Only rows whose gate is not 0 are computed; the others are 0.
    """

    def __init__(self, dim: int, basis: nn.Module):
        super().__init__()
        self.alpha_weights = nn.Parameter(0.1 * torch.randn(1, dim))
        self.alpha_bias = nn.Parameter(torch.zeros(dim))
        self.basis_function = basis

    def forward(self, t: Tensor, gate: Tensor) -> Tensor:
        scale, offset = self.alpha_weights[0], self.alpha_bias
        return ops.time_basis(t, gate, *self.basis_function.functions(scale[:, None], offset[:, None]))


class CosineBasis(nn.Module):
    """Cosines of learned frequencies, amplitudes and phases, `count` per feature."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, count + 1) + 0.1 * torch.randn(dim, count))
        self.amplitudes = nn.Parameter(torch.full((dim, count), 0.5))
        self.phases = nn.Parameter(torch.zeros(dim, count))

    def functions(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        """What `ops.time_basis` takes, for these functions of scale * time + offset."""
        shift = torch.addcmul(self.phases, self.frequencies, offset)
        return self.frequencies * scale, shift, self.amplitudes, "cosine"


class SplineBasis(nn.Module):
    """As published, the value is (1 - u)^3 / 6 times the third difference of four control points: no B-spline, because
    the published matrix has rank one, and u runs over the whole range instead of one segment. The knots are uniform;
    on which side of one a time falls that rounds to it may differ.
    """

    def __init__(self, dim: int, count: int = 13):
        super().__init__()
        self.control_points = nn.Parameter(0.1 * torch.randn(dim, count))
        signed = torch.tensor([1.0, -3.0, 3.0, -1.0])
        self.register_buffer("knots", torch.linspace(0, 1, count + 3))
        # Only a key of the published checkpoints: what it does is written out below.
        self.register_buffer("psi_k_matrix", signed[:, None] * signed / 6)

    def functions(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        points, low, length = self.control_points, self.knots[3], self.knots[-4] - self.knots[3]
        differences = points[:, :-3] - 3 * (points[:, 1:-2] - points[:, 2:-1]) - points[:, 3:]
        rate, shift = ((value / length).expand_as(differences) for value in (scale, offset - low))
        return rate, shift, differences, "stepped_cubic"


class GaussianBasis(nn.Module):
    """Gaussian kernels of learned means, widths and positive weights, `count` per feature."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.raw_weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.means = nn.Parameter(2 * torch.randn(dim, count))
        self.raw_stds = nn.Parameter(0.1 * torch.randn(dim, count))

    def functions(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        return *_scaled(scale, offset, self.means, self.raw_stds), softplus(self.raw_weights), "gaussian"


class WaveletBasis(nn.Module):
    """Mexican hats or Morlet wavelets of learned scales, translations and weights, `count` per feature."""

    def __init__(self, dim: int, wavelet: str, count: int):
        super().__init__()
        self.wavelet = wavelet
        self.weights = nn.Parameter(0.1 * torch.randn(dim, count))
        self.raw_scales = nn.Parameter(0.1 * torch.randn(dim, count))
        self.translations = nn.Parameter(0.1 * torch.randn(dim, count))

    def functions(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        return *_scaled(scale, offset, self.translations, self.raw_scales), self.weights, self.wavelet


class SplineExpert(nn.Module):
    """SiLU and cubic B-splines on [-1, 1] of time itself, times a gate, as `Expert`: one edge function per feature.

    The splines start as small noise: coefficients uniform in +-0.01, where the published layer fits noise of that size.
    """

    def __init__(self, dim: int, intervals: int = 5):
        super().__init__()
        self.intervals = intervals
        self.coef = nn.Parameter(torch.empty(1, dim, intervals + 3).uniform_(-0.01, 0.01))
        self.scale_base = nn.Parameter(torch.empty(1, dim).uniform_(-1, 1))
        self.scale_sp = nn.Parameter(torch.ones(1, dim))

    def forward(self, t: Tensor, gate: Tensor) -> Tensor:
        rows = gate.nonzero()[:, 0]
        values = self._edges(t[rows, None]) * gate[rows, None]
        return values.new_zeros(len(t), self.coef.shape[1]).index_copy(0, rows, values)

    def _edges(self, column: Tensor) -> Tensor:
        count = self.intervals + 3
        middles = torch.arange(count, dtype=column.dtype, device=column.device) - (count - 1) / 2
        distance = (column * (self.intervals / 2) - middles).abs().clamp(max=2)
        inner = (4 + (3 * distance - 6) * distance**2) / 6
        bases = torch.where(distance < 1, inner, (2 - distance) ** 3 / 6)
        return self.scale_base * silu(column) + self.scale_sp * (bases @ self.coef[0].T)


def _scaled(scale: Tensor, offset: Tensor, middles: Tensor, raw_widths: Tensor) -> tuple[Tensor, Tensor]:
    """Rate and shift of (scale * time + offset - middle) / width, for every function [dim, count]."""
    per_width = 1 / (softplus(raw_widths) + 1e-6)
    return scale * per_width, (offset - middles) * per_width
