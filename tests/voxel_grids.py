"""voxel_grid as a call of positions, the same in plain PyTorch, and events for both."""

from itertools import pairwise

import torch

from evkernels import ops

CONVENTIONS = ("e2vid", "tonic", "dsec", "openeb", "event_utils", "eseg", "eseg_split")


def fused(x, y, t, weight, p, bounds, bins, height, width, convention="e2vid", **more):
    offsets = None if bounds is None else torch.tensor(bounds, device=x.device)
    return ops.voxel_grid(
        x, y, t, p, bins=bins, height=height, width=width, convention=convention, weight=weight, offsets=offsets, **more
    )


def eager(x, y, t, weight, p, bounds, bins, height, width, convention="e2vid", parts=1):
    """Window by window, as a product of dense shares of every column, row and bin: nothing in common with the op."""
    rest = bins, height, width, convention, parts
    if bounds is None:
        return window_grid(x, y, t, weight, p, *rest)
    windows = [slice(begin, end) for begin, end in pairwise(bounds)]
    grids = [window_grid(x[s], y[s], t[s], None if weight is None else weight[s], p[s], *rest) for s in windows]
    return torch.stack(grids) if grids else window_grid(x, y, t, weight, p, *rest)[None][:0]


def window_grid(x, y, t, weight, p, bins, height, width, convention, parts):
    dtype = torch.float32 if weight is None else weight.dtype
    p = p.long()
    split = convention == "eseg_split"
    if t.shape[0] == 0:
        return torch.zeros((1 + split) * bins, height, width, dtype=dtype)
    of_zero = 0 if convention in ("event_utils", "eseg") else -1
    value = torch.where((p < -1) | (p > 1), 0, torch.where(p == 0, of_zero, p))
    value = (value.abs() if split else value).to(dtype)
    in_time = time_shares(t, bins, convention).to(dtype) * (value if weight is None else value * weight)[:, None]
    if split:
        in_time = torch.cat([in_time * (p > 0)[:, None], in_time * (p <= 0)[:, None]], dim=1)
    factors = in_time, shares(y, height).to(dtype), shares(x, width).to(dtype)
    chunks = zip(*(factor.chunk(parts) for factor in factors), strict=True)
    return sum(torch.einsum("eb,eh,ew->bhw", *chunk) for chunk in chunks)


def shares(coordinate, size):
    """How much of each of `size` places belongs to a coordinate, float64 [E, size]."""
    coordinate = coordinate if coordinate.is_floating_point() else coordinate.long()
    return (1 - (coordinate.double()[:, None] - torch.arange(size)).abs()).clamp(min=0)


def time_shares(t, bins, convention):
    t = t if t.is_floating_point() else t.long()
    since, span = (t - t.min()).double(), (t.max() - t.min()).double()
    scale = bins - 1 if convention in ("e2vid", "dsec", "event_utils") else bins
    position = since * scale / torch.where(span > 0, span, torch.ones_like(span))
    if convention in ("eseg", "eseg_split"):
        if not t.is_floating_point():
            # In integers, where no quotient can be rounded up to the next bin.
            position = (t - t.min()) * bins // (t.max() - t.min()).clamp(min=1)
        return shares(position.detach().floor().clamp(max=bins - 1), bins)
    if convention == "openeb":
        position = (position - 0.5).abs().clamp(max=bins - 1)
    return shares(position, bins)


def events(count, height=7, width=9, start=0, duration=5000, seed=0, ordered=True, dtype=torch.int16):
    """Random x, y in `dtype`, sub-pixel and partly outside if that is floating, t int64 and p in -1, 0, 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        x, y = (torch.rand(count, generator=generator, dtype=dtype) * (n + 1) - 1 for n in (width, height))
    else:
        x, y = (torch.randint(0, n, (count,), generator=generator).to(dtype) for n in (width, height))
    t = torch.randint(0, duration, (count,), generator=generator) + start
    p = torch.randint(-1, 2, (count,), generator=generator).to(torch.int8)
    return x, y, t.sort().values if ordered else t, p
