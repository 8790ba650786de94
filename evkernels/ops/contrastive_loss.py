"""Contract of `contrastive_loss`: documentation, argument checks, schema, shape rule, gradient, autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor | float, queue: Tensor | None = None, symmetric: bool = True
) -> Tensor:
    """Symmetric InfoNCE of pairs of rows, normalisation included, without storing the B x B logits.

    Equivalent to::

        p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
        logits, own = logit_scale * p @ q.T, torch.arange(len(a))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    Args:
        a: Features [B, D], B of at least 1; row i belongs to row i of `b`. float32, bfloat16, float16 or float64.
        b: Features [B, D] of the other kind, dtype and device of `a`.
        logit_scale: What multiplies the cosines, 1 over the temperature (the exponential of CLIP's parameter): a
            number, or a tensor of one element in the dtype of `a`, or float32 beside 16-bit features.
        queue: Further features [Q, D] of the kind of `b`: negatives of every row of `a`, in MoCo's manner. They are
            columns of the logits that have no cross entropy of their own.
        symmetric: False for the first of the two cross entropies alone, that of `a` looking for its `b`.

    Returns:
        loss: [] in the dtype of `a`, the mean over pairs and, if symmetric, both directions.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or B is 0.

    Computed in float32 (float64 for float64) and rounded once on output; a row shorter than 1e-12 is divided by that,
    as in F.normalize. NaN propagates. On the CPU memory beyond inputs and gradients is one tile of logits and the
    normalised features; Triton keeps a strip of 1024 rows and a 16th of the logits' size; the reference stores them.
    Under autocast everything is cast to float32. Deterministic for a number of threads. Differentiable to any order in
    all tensors, the scale included; the gradient keeps the inputs and one number per row and column and computes the
    logits again, double backward, forward mode and torch.func run on the reference. For the loss over all processes of
    a group see `evkernels.alignment.distributed_contrastive_loss`. Source: Radford et al. 2021 (arXiv:2103.00020),
    figure 3; queue: He et al. 2020 (arXiv:1911.05722).
    """
    checks.check_tensor("a", a)
    if a.dim() != 2 or a.shape[0] == 0:
        raise ValueError(f"a must be [B, D] with B of at least 1, got {tuple(a.shape)}")
    if not isinstance(logit_scale, Tensor):
        wide = torch.promote_types(a.dtype, torch.float32)
        logit_scale = torch.full((), logit_scale, dtype=wide, device=a.device)
    for name, value in (("b", b), *[("queue", queue)] * (queue is not None)):
        checks.check_tensor(name, value, (a.dtype,))
        checks.check_same_device(name, value, "a", a)
    checks.check_tensor("logit_scale", logit_scale)
    checks.check_same_device("logit_scale", logit_scale, "a", a)
    checks.check_state_dtype("logit_scale", logit_scale, "a", a)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must hold one number, got {tuple(logit_scale.shape)}")
    checks.check_shape("b", b, a.shape, "[B, D] as a")
    if queue is not None and (queue.dim() != 2 or queue.shape[1] != a.shape[1]):
        raise ValueError(f"queue must be [Q, D] with D = a.shape[1] = {a.shape[1]}, got {tuple(queue.shape)}")
    logit_scale = logit_scale.reshape(())
    function = reference.contrastive_loss_kernel if registration.needs_reference() else _forward
    return function(a, b, logit_scale, queue, symmetric)[0]


def _wide_empty(a, size):
    return a.new_empty(size, dtype=torch.promote_types(a.dtype, torch.float32))


def _fake(a, b, logit_scale, queue, symmetric):
    return a.new_empty(()), _wide_empty(a, a.shape[0]), _wide_empty(a, a.shape[0] if symmetric else 0)


def _fake_backward(
    grad_loss, a, b, logit_scale, queue, rows, columns, symmetric, need_a, need_b, need_scale, need_queue
):
    return (
        a.new_empty(a.shape if need_a else 0),
        b.new_empty(b.shape if need_b else 0),
        logit_scale.new_empty(()) if need_scale else a.new_empty(0),
        queue.new_empty(queue.shape) if need_queue and queue is not None else a.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    a, b, logit_scale, queue, ctx.symmetric = inputs
    _, rows, columns = output
    ctx.save_for_backward(a, b, logit_scale, queue, rows, columns)
    ctx.mark_non_differentiable(rows, columns)


def _gradient(ctx, grad_loss, *_):
    needed = list(ctx.needs_input_grad[:4])
    if grad_loss is None:
        return (None,) * 5
    *inputs, rows, columns = ctx.saved_tensors
    backward = _backward
    if torch.is_grad_enabled():
        # With create_graph the gradient must itself be differentiable, through what the forward kept too.
        _, rows, columns = reference.contrastive_loss_kernel(*inputs, ctx.symmetric)
        backward = reference.contrastive_loss_backward
    gradients = backward(grad_loss, *inputs, rows, columns, ctx.symmetric, *needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None


_INPUTS = "Tensor a, Tensor b, Tensor logit_scale, Tensor? queue"
_forward = registration.define(
    f"contrastive_loss({_INPUTS}, bool symmetric) -> (Tensor, Tensor, Tensor)",
    reference=reference.contrastive_loss_kernel,
    fake=_fake,
)
_backward = registration.define(
    f"contrastive_loss_backward(Tensor grad_loss, {_INPUTS}, Tensor rows, Tensor columns, bool symmetric, bool need_a, "
    "bool need_b, bool need_scale, bool need_queue) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.contrastive_loss_backward,
    fake=_fake_backward,
)
# Backends without a kernel run on PyTorch's own operators.
registration.define_composed(_forward, reference.contrastive_loss_kernel)
registration.define_composed(_backward, reference.contrastive_loss_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.contrastive_loss and differentiate with create_graph=True")
registration.define_autocast(
    _forward,
    lambda dtype, a, b, logit_scale, queue, symmetric: (
        a.float(),
        b.float(),
        logit_scale.float(),
        None if queue is None else queue.float(),
        symmetric,
    ),
)
