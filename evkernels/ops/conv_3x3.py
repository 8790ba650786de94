"""3x3 convolutions with zero padding: PyTorch's with our gradient of the weight, one by Winograd's method whose weight
is transformed once for all steps of a sequence, and one with what follows it, for inference.

On the CPU the latter two are csrc/conv_lstm_3x3/winograd.inl's, as is the gradient of the input. The gradient of a
weight is csrc/conv_lstm_3x3/weight_gradient.inl's where the library is slower, else the library's.
"""

import torch
from torch import Tensor
from torch.nn import functional

from evkernels.ops import library, registration
from evkernels.reference.depthwise_conv2d import ACTIVATIONS


def convolution_3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, winograd: bool = False) -> Tensor:
    """`functional.conv2d(x, weight, bias, padding=1)` for a weight [Cout, Cin, 3, 3].

    Where PyTorch's gradient of the weight is slow, that is with at least 512 pairs of channels or without AVX-512, and
    x is float32 or float64 in channels_last, that gradient is our kernel's, which is closer to float64's. The numbers
    are PyTorch's, unless `winograd` lets the convolution and the gradient of x be Winograd's where that is faster:
    F(2x2, 3x3), with up to four times the rounding error. Differentiable to any order.
    """
    winograd = winograd and _pays(x, weight)
    if not _records(x, weight, bias):
        if winograd and _is_served(x, weight):
            return _activated(x, weight, bias, None, None, "none")
    elif weight.requires_grad and library.has_slow_weight_gradient(weight) and _is_served(x, weight):
        return _plain(x, weight, bias, winograd)
    return functional.conv2d(x, weight, bias, padding=1)


def activated_convolution_3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    winograd: bool = True,
    projection: Tensor | None = None,
) -> Tensor:
    """`activation(conv2d(x, weight, bias, padding=1) + residual)` for a weight [Cout, Cin, 3, 3], and with a projection
    [Cout] the sum of that times it over the channels, [N, 1, H, W].

    One op where no gradient is recorded and `winograd` is allowed and faster; else `convolution_3x3` and PyTorch's
    operators. `activation` is "none", "relu", "silu", "gelu", "gelu_tanh" or "sigmoid".
    """
    records = _records(x, weight, bias, residual, projection)
    if winograd and not records and _pays(x, weight) and _is_served(x, weight):
        return _activated(x, weight, bias, residual, projection, activation)
    y = activated_in_place(convolution_3x3(x, weight, bias, winograd), activation, residual)
    return y if projection is None else projected(y, projection)


def projected(x: Tensor, projection: Tensor) -> Tensor:
    """A 1 x 1 convolution to one map [N, 1, H, W]: for channels_last a matrix product is faster than the library's."""
    y = x.permute(0, 2, 3, 1).flatten(0, 2) @ projection
    return y.view(len(x), 1, *x.shape[2:])


def activated_in_place(y: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
    """`activation(y + residual)` of the result of a convolution, which is overwritten where no gradient needs it."""
    if residual is not None:
        y = y + residual
    if activation == "relu":
        return functional.relu(y, inplace=True)
    if activation == "gelu" and not y.requires_grad:
        return torch.ops.aten.gelu_(y)
    return ACTIVATIONS[activation](y)


def _records(*tensors):
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)


def _pays(x, weight):
    """Whether Winograd's method is faster than the library: not with fewer channels, where it transforms more than it
    saves, or fewer pixels, as transforming the weight costs what some hundred of these do.
    """
    return x.shape[1] >= 8 and x.shape[1] * weight.shape[0] >= 256 and x.numel() >= 320 * x.shape[1]


def _is_served(x, weight):
    """Whether our kernels take a convolution of x, in channels_last on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and registration.common_layout(x) == torch.channels_last
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not registration.needs_reference()
    )


class PackedConvolution:
    """`functional.conv2d(x, weight, padding=1)`, channels_last, for a weight [Cout, Cin, 3, 3] that stays.

    A weight of many calls is transformed for the gradient of their inputs too, once; that of a single call when its
    gradient is computed. Differentiable to any order; float32 or float64.
    """

    def __init__(self, weight: Tensor, calls: int = 2):
        self.weight = weight
        self.packed = ()
        if registration.needs_reference():
            return
        fixed = weight.detach()
        again = calls > 1 and torch.is_grad_enabled()
        of_gradient = torch.ops.evkernels.conv_3x3_gradient_weight(fixed, 0, weight.shape[1]) if again else None
        self.packed = _packed_weight(fixed), fixed.new_empty(0) if of_gradient is None else of_gradient

    def __call__(self, x: Tensor) -> Tensor:
        if registration.needs_reference() or not self.packed:
            return _reference(x, self.weight, *self.packed)
        return _forward(x, self.weight, *self.packed)


def _packed_size(weight):
    return 16 * ((weight.shape[0] + 63) // 64 * 64) * weight.shape[1]


def _reference_packed_weight(weight):
    return weight.new_zeros(_packed_size(weight))


def _reference(x, weight, *_):
    if x.numel() == 0:  # conv2d takes no empty images
        return x.new_zeros(len(x), len(weight), *x.shape[2:])
    return functional.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last)


def _reference_activated(x, weight, bias, residual, projection, activation):
    y = functional.conv2d(x, weight, bias, padding=1)
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    if projection is not None:
        return functional.conv2d(y, projection.view(1, -1, 1, 1)).contiguous()
    return y.contiguous(memory_format=torch.channels_last)


def _fake_activated(x, weight, bias, residual, projection, activation):
    return _fake(x, weight) if projection is None else x.new_empty((x.shape[0], 1, *x.shape[2:]))


def _fake(x, weight, *_):
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _plain_reference(x, weight, bias, winograd):
    weight = weight.contiguous(memory_format=torch.channels_last)
    return functional.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def _plain_kernel(x, weight, bias, winograd):
    if winograd:
        return _activated(x, weight, bias, None, None, "none")
    return _plain_reference(x, weight, bias, winograd)


def _plain_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.winograd = inputs[3]


def _plain_gradient(ctx, grad):
    if grad is None:
        return (None,) * 4
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    # With create_graph the gradient must itself be differentiable: PyTorch's operators compute it.
    by_library = torch.is_grad_enabled()
    mask = [need_x and (by_library or not ctx.winograd), need_weight and by_library, False]
    window = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    maps = (value.contiguous(memory_format=torch.channels_last) for value in (grad, x, weight))
    d_x, d_weight, d_bias = torch.ops.aten.convolution_backward(*maps, *window, mask) if any(mask) else (None,) * 3
    if need_x and not mask[0]:
        d_x = _input_gradient(grad, weight)
    if need_weight and not by_library:
        d_weight, d_bias = torch.ops.evkernels.conv_3x3_weight_gradient(grad, x, x[:, :0])
    elif need_bias:
        # The library would compute the weight's gradient for that of the bias.
        d_bias = grad.sum((0, 2, 3))
    return d_x, d_weight, d_bias if need_bias else None, None


def _input_gradient(grad, weight, packed=None):
    columns = weight.shape[1]
    if packed is None:
        packed = torch.ops.evkernels.conv_3x3_gradient_weight(weight, 0, columns)
    return torch.ops.evkernels.conv_3x3_input_gradient(grad, weight, packed, 0, 0, columns, None)[1]


def _setup_context(ctx, inputs, output):
    x, weight, _, packed_gradient = inputs
    ctx.save_for_backward(x, weight, packed_gradient)


def _gradient(ctx, grad):
    if grad is None:
        return (None,) * 4
    x, weight, packed = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(x.shape), weight.new_zeros(weight.shape), None, None
    d_x = d_weight = None
    window = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    # With create_graph the gradient must itself be differentiable: PyTorch's operators compute it.
    if torch.is_grad_enabled():
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *window, [need_x, need_weight, False])
        return d_x, d_weight, None, None
    if need_x:
        d_x = _input_gradient(grad, weight, packed if packed.numel() else None)
    if need_weight and library.has_slow_weight_gradient(weight):
        d_weight, _ = torch.ops.evkernels.conv_3x3_weight_gradient(grad, x, x[:, :0])
    elif need_weight:
        maps = grad.contiguous(), x.contiguous()
        d_weight = torch.ops.aten.convolution_backward(*maps, weight, *window, [False, True, False])[1]
    return d_x, d_weight, None, None


_plain = registration.define(
    "convolution_3x3(Tensor x, Tensor weight, Tensor? bias, bool winograd) -> Tensor",
    reference=_plain_reference,
    fake=_fake,
)
registration.define_composed(_plain, _plain_kernel, ("CPU", "CUDA"))
registration.define_gradient(_plain, setup_context=_plain_setup_context, backward=_plain_gradient)
_packed_weight = registration.define(
    "conv_3x3_packed_weight(Tensor weight) -> Tensor",
    reference=_reference_packed_weight,
    fake=lambda weight: weight.new_empty(_packed_size(weight)),
)
_forward = registration.define(
    "conv_3x3(Tensor x, Tensor weight, Tensor packed, Tensor packed_gradient) -> Tensor",
    reference=_reference,
    fake=_fake,
)
registration.define_composed(_packed_weight, _reference_packed_weight)
registration.define_composed(_forward, _reference)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_packed_weight, "it belongs to conv_3x3, which differentiates by its weight")
_activated = registration.define(
    "conv_3x3_activated(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? projection, str activation)"
    " -> Tensor",
    reference=_reference_activated,
    fake=_fake_activated,
)
registration.define_composed(_activated, _reference_activated)
registration.forbid_gradient(_activated, "it is for inference; activated_convolution_3x3 chooses")
