"""Definition of the learnable time embedding (LeTE): forward and hand-written backward in plain PyTorch.

Both mixing products are contractions over features, so that nothing larger than the features is held; the published
form multiplies first and sums afterwards, over [N, F, F, harmonics].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def learnable_time_embedding(
    t: Tensor,
    fourier_frequency: Tensor,
    fourier_phase: Tensor,
    fourier_weight: Tensor,
    fourier_bias: Tensor,
    spline_rate: Tensor,
    spline_shift: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    fourier = _widened(t, fourier_frequency, fourier_phase, fourier_weight, fourier_bias)
    spline = _widened(t, spline_rate, spline_shift, base_weight, spline_weight)
    norm_weight, norm_bias, scale = _widened(norm_weight, norm_bias, scale)
    embedding = torch.cat([_fourier(*fourier)[0], _spline(*spline)[0]], dim=1)
    if norm_weight is not None:
        embedding = F.layer_norm(embedding, embedding.shape[1:], norm_weight, norm_bias, eps)
    return (embedding if scale is None else embedding * scale).to(t.dtype)


def learnable_time_embedding_backward(
    grad_embedding: Tensor,
    t: Tensor,
    fourier_frequency: Tensor,
    fourier_phase: Tensor,
    fourier_weight: Tensor,
    fourier_bias: Tensor,
    spline_rate: Tensor,
    spline_shift: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors in their order; those of absent ones are empty."""
    times, frequency, rate, d_embedding = _widened(t, fourier_frequency, spline_rate, grad_embedding)
    mixing, base, coefficients = _widened(fourier_weight, base_weight, spline_weight)
    fourier, waves = _fourier(times, *_widened(fourier_frequency, fourier_phase, fourier_weight, fourier_bias))
    spline, v, bases = _spline(times, *_widened(spline_rate, spline_shift, base_weight, spline_weight))
    d_sum, *d_norm = _norm_backward(
        d_embedding, torch.cat([fourier, spline], dim=1), *_widened(norm_weight, norm_bias, scale), eps
    )
    d_fourier, d_spline = d_sum.split([fourier.shape[1], spline.shape[1]], dim=1)

    d_waves = torch.einsum("no,poik->npik", d_fourier, mixing)
    d_u = ((waves[:, 0] * d_waves[:, 1] - waves[:, 1] * d_waves[:, 0]) * _harmonics(mixing)).sum(dim=-1)
    d_bases = torch.einsum("no,oib->nib", d_spline, coefficients)
    tanh = v.tanh()
    d_v = d_spline @ base * (1 - tanh) * (1 + tanh) + (d_bases * _bases_slope(v, coefficients.shape[-1])).sum(dim=-1)
    column = times[:, None]
    gradients = (
        d_u @ frequency + d_v @ rate,
        (d_u * column).sum(dim=0),
        d_u.sum(dim=0),
        torch.einsum("no,npik->poik", d_fourier, waves),
        d_fourier.sum(dim=0),
        (d_v * column).sum(dim=0),
        d_v.sum(dim=0),
        d_spline.T @ tanh,
        torch.einsum("no,nib->oib", d_spline, bases),
        *d_norm,
    )
    return tuple(t.new_empty(0) if value is None else value.to(t.dtype) for value in gradients)


def _fourier(t: Tensor, frequency: Tensor, phase: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The Fourier part [N, F], and cosines and sines of all harmonics [N, 2, F, harmonics]."""
    angles = F.linear(t[:, None], frequency[:, None], phase)[..., None] * _harmonics(weight)
    waves = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Cosines and sines apart: one sum over both would be twice as long and round more.
    cosines, sines = (
        torch.einsum("nik,oik->no", wave, part) for wave, part in zip(waves.unbind(1), weight, strict=True)
    )
    return cosines + sines + bias, waves


def _harmonics(weight: Tensor) -> Tensor:
    return torch.arange(1, weight.shape[-1] + 1, dtype=weight.dtype, device=weight.device)


def _spline(t: Tensor, rate: Tensor, shift: Tensor, base: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The spline part [N, S], its argument v [N, S] and its bases [N, S, bases]."""
    v = F.linear(t[:, None], rate[:, None], shift)
    distance = _distances(v, weight.shape[-1]).abs()
    middle = (4 + (3 * distance - 6) * distance * distance) / 6
    bases = torch.where(distance < 1, middle, (2 - distance.clamp(max=2)) ** 3 / 6)
    return v.tanh() @ base.T + torch.einsum("nib,oib->no", bases, weight), v, bases


def _bases_slope(v: Tensor, count: int) -> Tensor:
    """The derivatives of the bases at v, [N, S, bases]."""
    signed = _distances(v, count)
    distance = signed.abs()
    outer = -signed.sign() * (2 - distance.clamp(max=2)) ** 2 / 2
    return torch.where(distance < 1, (1.5 * distance - 2) * signed, outer) * (0.5 * (count - 3))


def _distances(v: Tensor, count: int) -> Tensor:
    """From v to the middles of the cubic B-spline bases on a uniform grid over [-1, 1], in intervals, signed."""
    intervals_per_unit = 0.5 * (count - 3)
    middles = (torch.arange(count, dtype=v.dtype, device=v.device) - (1 + intervals_per_unit)) / intervals_per_unit
    return (v[..., None] - middles) * intervals_per_unit


def _norm_backward(
    d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of layer_norm(x) * scale at x, at the norm's weight and bias and at the scale."""
    d_weight = d_bias = d_scale = None
    normed = x
    if weight is not None:
        centred = x - x.mean(dim=1, keepdim=True)
        inverse = (centred.square().mean(dim=1, keepdim=True) + eps).rsqrt()
        normed = centred * inverse
    if scale is not None:
        d_scale = (d * (normed if weight is None else normed * weight + bias)).sum(dim=0)
        d = d * scale
    if weight is None:
        return d, d_weight, d_bias, d_scale
    d_weight, d_bias, d = (d * normed).sum(dim=0), d.sum(dim=0), d * weight
    d_x = (d - d.mean(dim=1, keepdim=True) - normed * (d * normed).mean(dim=1, keepdim=True)) * inverse
    return d_x, d_weight, d_bias, d_scale


def _widened(*values: Tensor | None) -> list[Tensor | None]:
    """Everything in the dtype of the computation: at least float32."""
    return [None if v is None else v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]
