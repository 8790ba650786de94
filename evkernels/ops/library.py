"""What PyTorch's own library is slow at, by processor: choices between layouts and kernels look it up here."""

import torch
from torch import Tensor

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_slow_weight_gradient(weight: Tensor) -> bool:
    """Whether the library is slower than our kernel at the gradient of a 3x3 convolution's weight [Cout, Cin, 3, 3].

    In channels_last, one thread: on a Zen 3 it takes 2.3 to 6 times as long as on contiguous maps, where it is slower
    than ours already. With AVX-512 it takes 1.3 to 1.75 times as long as ours from 24 to 256 channels each way, 0.95
    times with 16, a third of it for 5 to 16 channels, and is better at 16 bits where AMX multiplies them.
    """
    if weight.device.type != "cpu":
        return False
    return not HAS_AVX512 or (weight.dtype.itemsize > 2 and weight.shape[0] * weight.shape[1] >= 512)
