"""Contract of `learnable_time_embedding`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


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
    """Embeds timestamps by learnable Fourier series and splines, layer norm and scale: LeTE in one pass.

    Equivalent to::

        u = t[:, None] * fourier_frequency + fourier_phase
        angles = u[..., None] * torch.arange(1, fourier_weight.shape[-1] + 1)
        fourier = torch.einsum("nik,oik->no", angles.cos(), fourier_weight[0])
        fourier = fourier + torch.einsum("nik,oik->no", angles.sin(), fourier_weight[1]) + fourier_bias
        v = t[:, None] * spline_rate + spline_shift
        count = spline_weight.shape[-1]
        distance = (v[..., None] * (count - 3) / 2 - torch.arange(count) + (count - 1) / 2).abs().clamp(max=2)
        bases = torch.where(distance < 1, (4 + (3 * distance - 6) * distance**2) / 6, (2 - distance) ** 3 / 6)
        spline = v.tanh() @ base_weight.T + torch.einsum("nib,oib->no", bases, spline_weight)
        embedding = torch.cat([fourier, spline], dim=1)
        embedding = F.layer_norm(embedding, embedding.shape[1:], norm_weight, norm_bias, eps) * scale

    Args:
        t: Timestamps [N], in whatever unit the parameters are learned for. float32, bfloat16, float16 or float64; all
            other tensors have its dtype and device.
        fourier_frequency: Angle per unit of time, of each of F features [F]. F may be 0.
        fourier_phase: Angle at time 0, [F].
        fourier_weight: Mixing of the features' harmonics [2, F, F, G]: cosines and sines, output, input, harmonic 1 to
            G.
        fourier_bias: [F].
        spline_rate: Spline argument per unit of time, of each of S features [S]. S may be 0.
        spline_shift: Spline argument at time 0, [S].
        base_weight: Mixing of the arguments' tanh [S, S]: output, input.
        spline_weight: Mixing of the arguments' cubic B-spline bases [S, S, B]: output, input, basis. The bases lie on
            a uniform grid of B - 3 intervals on [-1, 1], B at least 4; beyond three intervals outside all are 0.
        norm_weight: Weight of the layer norm over the F + S outputs [F + S], or None for no layer norm.
        norm_bias: Its bias [F + S]; None if and only if `norm_weight` is.
        scale: Factors of the outputs [F + S], or None.
        eps: Added to the variance in the layer norm.

    Returns:
        embedding: [N, F + S], the Fourier features first, in the dtype of `t`. Contiguous, never aliases the inputs.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not that of `t`.
        ValueError: if shapes or devices disagree, F + S, G or B is too small, or one of norm_weight and norm_bias is
            missing.

    Computed in float32 (float64 for float64) and rounded once on output: one sine and cosine per timestamp and feature,
    accurate for angles of any size, and the harmonics from them. NaN propagates, but in the weight of a basis that is 0
    it may not be seen; an infinite spline argument has a tanh of +-1 and bases of 0. Inputs of any strides; all are
    copied to be contiguous. Under autocast everything is cast to float32, because timestamps do not survive 16 bits.
    Deterministic; on the CPU the embedding and the gradients have the same bits for any number of threads.
    Differentiable to any order in all tensors; the gradient keeps the arguments alone and recomputes. Double backward,
    forward mode and torch.func run on the reference. Source: LeTE
    (arXiv:2505.00887), its Fourier and spline parts as in the authors' CombinedLeTE.
    """
    arguments = (t, fourier_frequency, fourier_phase, fourier_weight, fourier_bias, spline_rate, spline_shift)
    arguments = (*arguments, base_weight, spline_weight, norm_weight, norm_bias, scale)
    _check(*arguments)
    if registration.needs_reference():
        return reference.learnable_time_embedding(*arguments, eps)
    return _forward(*arguments, eps)


def _check(
    t, fourier_frequency, fourier_phase, fourier_weight, fourier_bias, spline_rate, spline_shift, base_weight,
    spline_weight, norm_weight, norm_bias, scale,
):  # fmt: skip
    checks.check_tensor("t", t)
    if t.dim() != 1:
        raise ValueError(f"t must be [N], got {tuple(t.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given or both be None")
    named = {
        "fourier_frequency": fourier_frequency,
        "fourier_phase": fourier_phase,
        "fourier_weight": fourier_weight,
        "fourier_bias": fourier_bias,
        "spline_rate": spline_rate,
        "spline_shift": spline_shift,
        "base_weight": base_weight,
        "spline_weight": spline_weight,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "scale": scale,
    }
    cast = torch.is_autocast_enabled(t.device.type)
    for name, value in named.items():
        if value is not None or name not in ("norm_weight", "norm_bias", "scale"):
            checks.check_tensor(name, value, checks.FLOATING if cast else (t.dtype,))
            checks.check_same_device(name, value, "t", t)
    for name, dims in (("fourier_frequency", 1), ("fourier_weight", 4), ("spline_rate", 1), ("spline_weight", 3)):
        if named[name].dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got {tuple(named[name].shape)}")
    f, s = fourier_frequency.shape[0], spline_rate.shape[0]
    harmonics, bases = fourier_weight.shape[-1], spline_weight.shape[-1]
    if f + s == 0:
        raise ValueError("fourier_frequency [F] and spline_rate [S] must have F + S at least 1, got 0")
    if harmonics == 0:
        raise ValueError(f"fourier_weight must be [2, F, F, G] with G at least 1, got {tuple(fourier_weight.shape)}")
    if bases < 4:
        raise ValueError(f"spline_weight must be [S, S, B] with B at least 4, got {tuple(spline_weight.shape)}")
    # Without the numbers, which would tie a compiled graph to them.
    fourier, spline = "with F = fourier_frequency.shape[0]", "with S = spline_rate.shape[0]"
    checks.check_shape("fourier_phase", fourier_phase, (f,), f"[F] {fourier}")
    checks.check_shape("fourier_weight", fourier_weight, (2, f, f, harmonics), f"[2, F, F, G] {fourier}")
    checks.check_shape("fourier_bias", fourier_bias, (f,), f"[F] {fourier}")
    checks.check_shape("spline_shift", spline_shift, (s,), f"[S] {spline}")
    checks.check_shape("base_weight", base_weight, (s, s), f"[S, S] {spline}")
    checks.check_shape("spline_weight", spline_weight, (s, s, bases), f"[S, S, B] {spline}")
    for name in ("norm_weight", "norm_bias", "scale"):
        if named[name] is not None:
            checks.check_shape(name, named[name], (f + s,), f"[F + S] {fourier} and S = spline_rate.shape[0]")


def _fake(t, fourier_frequency, fourier_phase, fourier_weight, fourier_bias, spline_rate, *rest):
    return t.new_empty(t.shape[0], fourier_frequency.shape[0] + spline_rate.shape[0])


def _fake_backward(grad_embedding, *arguments):
    t, *_ = arguments
    return tuple(t.new_empty(0 if value is None else value.shape) for value in arguments[:-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_embedding):
    tensors = ctx.saved_tensors
    if grad_embedding is None:
        return (None,) * (len(tensors) + 1)
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.learnable_time_embedding_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_embedding, *tensors, ctx.eps)
    needed = ctx.needs_input_grad[: len(tensors)]
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None


_ARGUMENTS = (
    "Tensor t, Tensor fourier_frequency, Tensor fourier_phase, Tensor fourier_weight, Tensor fourier_bias, "
    "Tensor spline_rate, Tensor spline_shift, Tensor base_weight, Tensor spline_weight, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? scale, float eps"
)
_forward = registration.define(
    f"learnable_time_embedding({_ARGUMENTS}) -> Tensor",
    reference=reference.learnable_time_embedding,
    fake=_fake,
    layout_of=0,
)
_backward = registration.define(
    f"learnable_time_embedding_backward(Tensor grad_embedding, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 12)})",
    reference=reference.learnable_time_embedding_backward,
    fake=_fake_backward,
    layout_of=1,
)
# Without Triton PyTorch's own operators serve GPUs.
for _op in (_forward, _backward):
    registration.define_composed(_op, registration.default_kernels[_op._opname])
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(
    _backward, "call evkernels.ops.learnable_time_embedding and differentiate with create_graph=True"
)
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.float() if isinstance(v, Tensor) else v for v in arguments)
)
