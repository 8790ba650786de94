"""What PyTorch's own library is slow at, by processor: choices between layouts and kernels look it up here."""

import torch

# Without AVX-512 the gradient of a 3x3 convolution's weight takes 2.3 to 6 times as long in channels_last as on
# contiguous maps, of 32 channels or more (one thread of a Zen 3).
HAS_SLOW_WEIGHT_GRADIENT = torch.backends.cpu.get_cpu_capability() != "AVX512"
