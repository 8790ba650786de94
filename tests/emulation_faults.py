"""The kernels of the emulation's own tests, those with planted faults among them."""

import torch
from emulation import build

SEEDS = range(20)
FAULTS = build.HERE / "faults.cu"


def planted_faults():
    """The operators of `faults.cu`, built where it changed."""
    build.load_library(build.build([FAULTS], "faults"))
    return torch.ops.evkernels_faults


def block_sums(faults, fault):
    """Whether the sums of three blocks are right."""
    x = torch.arange(3 * 256, dtype=torch.int32)
    sums = torch.zeros(3, dtype=torch.int32)
    faults.block_sum(x, sums, fault)
    return torch.equal(sums, x.view(3, 256).sum(1, dtype=torch.int32))
