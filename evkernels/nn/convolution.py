"""Plain convolutions of a model's own modules, where PyTorch's can be helped."""

from torch import Tensor, nn

from evkernels.nn.cell_options import is_plain
from evkernels.ops.conv_3x3 import activated_convolution_3x3, activated_in_place, convolution_3x3


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), of which a torch.nn.Conv2d of 3x3 that keeps the size has `convolution_3x3`'s gradient. A module that
    somebody has put in its place, parametrised or hooked is called as it is.
    """
    return convolution_3x3(x, conv.weight, conv.bias) if _keeps_size(conv) else conv(x)


def activated_convolution(
    conv: nn.Module, x: Tensor, activation: str, residual: Tensor | None = None, winograd: bool = True
) -> Tensor:
    """activation(conv(x) + residual), of which such a convolution is `activated_convolution_3x3` with `winograd`."""
    if _keeps_size(conv):
        return activated_convolution_3x3(x, conv.weight, conv.bias, activation, residual, winograd)
    return activated_in_place(conv(x), activation, residual)


def set_winograd(model: nn.Module, enabled: bool) -> None:
    """Lets the 3x3 convolutions of all layers and cells in `model` be Winograd's F(2x2, 3x3) where that is faster, or
    not.

    Its rounding error is about three times that of direct sums, and a NaN or an infinity reaches up to two pixels
    instead of one. Cells of `evkernels.nn` and the networks of `evkernels.models` that have the choice begin with it
    (`ConvGRUCell` and `ConvGRU`: as their argument `winograd` says).
    """
    for module in model.modules():
        if hasattr(module, "winograd"):
            module.winograd = enabled


def _keeps_size(conv):
    options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return is_plain(conv) and [getattr(conv, name) for name in options] == [(3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"]
