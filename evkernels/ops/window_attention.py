"""Contract of `window_attention`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration

PARTITIONS = ("window", "grid")


def window_attention(
    qkv: Tensor, bias: Tensor | None, heads: int, window: tuple[int, int], partition: str = "window"
) -> Tensor:
    """Multi-head self-attention within the partitions of a map, which stays where it is: no copy into partitions.

    Equivalent to::

        n, height, width, _ = qkv.shape
        (rows, columns), grid = window, partition == "grid"
        down, across = (rows, columns) if grid else (height // rows, width // columns)
        x = (qkv + bias).reshape(n, down, height // down, across, width // across, heads, -1)
        order = (0, 2, 4, 5, 1, 3, 6) if grid else (0, 1, 3, 5, 2, 4, 6)
        q, k, v = x.permute(order).flatten(4, 5).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).unflatten(4, (rows, columns))
        y = y.permute((0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6)).reshape(n, height, width, -1)

    Args:
        qkv: Query, key and value head by head [N, H, W, heads * 3 * D]: what a linear layer makes of a map. float32,
            bfloat16, float16 or float64. N, H and W may be 0.
        bias: [heads * 3 * D] in the dtype of `qkv`, added to every pixel, or None. Added here it costs nothing, while
            a linear layer of PyTorch on the CPU fills its result with it first.
        heads: How many heads, at least 1.
        window: Rows and columns of a partition, of which H and W are multiples.
        partition: "window": neighbouring pixels, or "grid": pixels at equal distances over the whole map.

    Returns:
        The heads' outputs side by side [N, H, W, heads * D] in the dtype of `qkv`. Contiguous, never aliases inputs.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree, H, W are no multiples of `window`, or `partition` is neither.

    Computed in float32 (float64 for float64) and rounded once on output; scores are scaled by D**-0.5. Inputs of any
    strides; all are copied to be contiguous. Under autocast both tensors are cast to the autocast dtype. Deterministic;
    on the CPU the results and gradients have the same bits for any number of threads. Differentiable to any order; the
    gradient keeps the arguments alone and recomputes the scores; double backward, forward mode and torch.func run on
    the reference. On GPUs PyTorch's scaled_dot_product_attention serves, with its own gradient. Source: windows of Liu
    et al. 2021 (arXiv:2103.14030), grids of Tu et al. 2022 (arXiv:2204.01697), without positions.
    """
    _check(qkv, bias, heads, window, partition)
    if registration.needs_reference():
        return reference.window_attention(qkv, bias, heads, window, partition)
    return _forward(qkv, bias, heads, window, partition)


def _check(qkv, bias, heads, window, partition):
    checks.check_tensor("qkv", qkv)
    checks.check_int("heads", heads, 1, 2**31 - 1)
    if qkv.dim() != 4 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * heads):
        raise ValueError(f"qkv must be [N, H, W, {heads} * 3 * D] with D at least 1, got {tuple(qkv.shape)}")
    if len(window) != 2:
        raise ValueError(f"window must be (rows, columns), got {window!r}")
    for name, size, multiple in zip("HW", qkv.shape[1:3], window, strict=True):
        checks.check_int("window", multiple, 1, 2**31 - 1)
        if size % multiple:
            raise ValueError(f"{name} of qkv must be a multiple of the window's {multiple}, got {size}")
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, got {partition!r}")
    if bias is not None:
        autocast = torch.is_autocast_enabled(qkv.device.type)
        checks.check_tensor("bias", bias, checks.FLOATING if autocast else (qkv.dtype,))
        checks.check_same_device("bias", bias, "qkv", qkv)
        checks.check_shape("bias", bias, qkv.shape[3:], "[channels of qkv]")


def _fake(qkv, bias, heads, window, partition):
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _fake_backward(grad_output, qkv, *others):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads, ctx.window, ctx.partition = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_output):
    if grad_output is None:
        return (None,) * 5
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.window_attention_backward if torch.is_grad_enabled() else _backward
    d_qkv = backward(grad_output, *ctx.saved_tensors, ctx.heads, ctx.window, ctx.partition)
    d_bias = d_qkv.sum(dim=(0, 1, 2)) if ctx.needs_input_grad[1] else None
    return d_qkv if ctx.needs_input_grad[0] else None, d_bias, None, None, None


def _by_library(qkv, bias, heads, window, partition):
    if bias is not None:
        qkv = qkv + bias
    tokens = reference.to_tokens(qkv, window, partition)
    q, k, v = tokens.unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    return reference.to_map(F.scaled_dot_product_attention(q, k, v), qkv, window, partition)


_ARGUMENTS = "Tensor qkv, Tensor? bias, int heads, int[] window, str partition"
_forward = registration.define(
    f"window_attention({_ARGUMENTS}) -> Tensor", reference=reference.window_attention, fake=_fake
)
_backward = registration.define(
    f"window_attention_backward(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
    reference=reference.window_attention_backward,
    fake=_fake_backward,
)
# GPUs have PyTorch's own fused attention, with its own gradient.
registration.define_composed(_forward, _by_library)
registration.define_composed(_backward, reference.window_attention_backward)
registration.define_composite(_forward, _by_library, "AutogradCUDA")
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.window_attention and differentiate with create_graph=True")
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in arguments)
)
