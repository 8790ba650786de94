"""Plain convolutions of a model's own modules, where PyTorch's can be helped."""

from torch import Tensor, nn

from evkernels.nn.cell_options import is_plain
from evkernels.ops.conv_3x3 import convolution_3x3


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), of which a 3x3 convolution that keeps the size has `convolution_3x3`'s gradient. A module that somebody
    has replaced, parametrised or hooked is called as it is.
    """
    options = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if is_plain(conv) and options == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return convolution_3x3(x, conv.weight, conv.bias)
    return conv(x)
