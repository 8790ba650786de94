"""K-MOTE at the size of LSTM classifiers of event sequences, against its published form: all experts, then the choice.

The same layer with random weights. Floor: forward reads the timestamps and writes the embedding and the router's
weights; the gradient as much again and the gradient of the timestamps. The router's products count as operations, and
some 20 for every function of a chosen expert.
"""

import torch
from torch.nn.functional import softplus

from benchmarks.registry import Benchmark
from evkernels.nn import KMOTE
from evkernels.testing import tensor

DIM, TOP, EXPERTS = 32, 2, 4
_layer = KMOTE(DIM, TOP)
_NAMES = tuple(name for name, _ in _layer.named_parameters())


def fused(t, *weights):
    return torch.func.functional_call(_layer, dict(zip(_NAMES, weights, strict=True)), (t,))


def eager(t, *weights):
    named = dict(zip(_NAMES, weights, strict=True))

    def of(expert, name):
        return named[f"experts.{expert}.basis_function.{name}"]

    def argument(expert):
        return t[:, None] * named[f"experts.{expert}.alpha_weights"] + named[f"experts.{expert}.alpha_bias"]

    def linear(x, layer):
        return torch.nn.functional.linear(x, named[f"router.mlp.{layer}.weight"], named[f"router.mlp.{layer}.bias"])

    shares = linear(linear(linear(t[:, None], 0).relu(), 2).relu(), 4).softmax(dim=-1)
    largest, chosen = shares.topk(TOP, dim=-1)
    dispatch = torch.zeros_like(shares).scatter(1, chosen, largest)
    x = argument("fourier")[..., None] * of("fourier", "frequencies") + of("fourier", "phases")
    fourier = (of("fourier", "amplitudes") * x.cos()).sum(-1)
    basis = _layer.experts.spline.basis_function.to(t.dtype)
    low, high = basis.knots[3], basis.knots[-4]
    x = argument("spline").clamp(low, high)
    points = of("spline", "control_points")
    differences = points[:, :-3] - 3 * (points[:, 1:-2] - points[:, 2:-1]) - points[:, 3:]
    segment = (torch.searchsorted(basis.knots, x.detach()) - 3).clamp(0, differences.shape[1] - 1)
    spline = (1 - (x - low) / (high - low)) ** 3 / 6 * differences.T.gather(0, segment)
    x = argument("rkhs_gaussian")[..., None] - of("rkhs_gaussian", "means")
    x = x / (softplus(of("rkhs_gaussian", "raw_stds")) + 1e-6)
    gaussian = (softplus(of("rkhs_gaussian", "raw_weights")) * torch.exp(-0.5 * x**2)).sum(-1)
    x = argument("wavelet")[..., None] - of("wavelet", "translations")
    x = x / (softplus(of("wavelet", "raw_scales")) + 1e-6)
    wavelet = (of("wavelet", "weights") * (1 - x**2) * torch.exp(-0.5 * x**2)).sum(-1)
    parts = (fourier, spline, gaussian, wavelet)
    return torch.cat([part * dispatch[:, k : k + 1] for k, part in enumerate(parts)], dim=1), shares


def backwards(t, *weights):
    """Plain PyTorch with the timestamps in reverse: the gradients' sums in another order."""
    return tuple(result.flip(0) for result in eager(t.flip(0), *weights))


def inputs(shape, dtype):
    """The router prefers other experts at other times: each is chosen for a fair share of the timestamps."""
    weights = {}
    for seed, (name, value) in enumerate(_layer.named_parameters(), 2):
        random = tensor(*value.shape, dtype=dtype, seed=seed)
        weights[name] = random * 2 * value.shape[-1] ** -0.5 if name.startswith("router") else random * 0.5
    t = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        shares = fused(4 * t - 2, *weights.values())[1]
        weights["router.mlp.4.bias"] -= shares.log().mean(dim=0)
    return 4 * t - 2, *weights.values()


def floor_bytes(shape, itemsize, mode):
    return itemsize * shape[0] * ((3 + 2 * (DIM + EXPERTS)) if mode == "forward+backward" else 1 + DIM + EXPERTS)


def floor_flops(shape, mode):
    router = 2 * (64 + 64 * 32 + 32 * EXPERTS)
    functions = 20 * DIM // EXPERTS * TOP * (16 + 5 + 8) // 3
    return shape[0] * (router + functions) * (3 if mode == "forward+backward" else 1)


SHAPES = ((19200,),)
BENCHMARKS = (
    Benchmark(
        op="kmote",
        function=fused,
        eager=eager,
        rounded=backwards,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES,
        tiny_shape=(65,),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0],
        item="timestamp",
        label=lambda shape: f"{shape[0]}x{DIM}",
        dtypes=(torch.float32,),
        layouts=("contiguous",),
    ),
)
