"""Definition of the voxel grids in plain PyTorch: every event becomes up to eight weighted additions to grid cells.

An event's place in time is one number, `position`, counted in bins; a convention is the scale and shift of it, what
happens at the ends, and the meaning of polarity 0. Corners, the cells that an event touches with their coefficients
and the coefficients' derivatives, serve both the forward and the hand-written backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evkernels.reference.event_histogram import window_of_event
from evkernels.reference.pixel_map import look_up


class Convention(NamedTuple):
    """How one of the published voxel grids treats time and polarity."""

    # The last event of a window is at position bins - fewer - shift, the first at -shift.
    fewer: int = 1
    shift: float = 0.0
    # Where the two bins beside a position lie outside the grid: "drop" that part, "clamp" the position (OpenEB), or
    # use the bin below only ("hard").
    ends: str = "drop"
    # Value of polarity 0.
    zero: int = -1
    # Separate channels for ON, the first `bins`, and OFF, with positive values.
    split: bool = False


CONVENTIONS = {
    "e2vid": Convention(),
    "tonic": Convention(fewer=0),
    "dsec": Convention(),
    "openeb": Convention(fewer=0, shift=0.5, ends="clamp"),
    "event_utils": Convention(zero=0),
    "eseg": Convention(fewer=0, ends="hard", zero=0),
    "eseg_split": Convention(fewer=0, ends="hard", split=True),
}


def voxel_grid(
    x, y, t, p, *, bins, height, width, convention="e2vid", weight=None, offsets=None, out_of_range="drop",
    normalize=None, pixel_map=None, out=None,
) -> Tensor:  # fmt: skip
    x, y, outside = look_up(x, y, p, pixel_map, height, width)
    grid, dropped = voxel_grid_kernel(x, y, t, p, weight, offsets, bins, height, width, convention)
    dropped = dropped if outside is None else outside
    if out_of_range == "raise" and dropped:
        raise ValueError(f"{int(dropped)} events are out of range")
    grid = grid if normalize is None else normalize_voxel_grid(grid, normalize)
    return grid if out is None else out.copy_(grid)


def voxel_grid_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, weight: Tensor | None, offsets: Tensor | None, bins: int, height: int,
    width: int, convention: str, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The grid, not normalised, and the number of dropped events []."""
    del deterministic  # index_add honours torch.use_deterministic_algorithms by itself.
    rule = CONVENTIONS[convention]
    window = window_of_event(t, offsets)
    windows = 1 if offsets is None else offsets.numel() - 1
    channels = 2 * bins if rule.split else bins
    value, valid = values_of_events(x, y, p, weight, height, width, rule)
    position = position_in_time(t, window, windows, bins, rule)[0]
    cells = windows * channels * height * width
    # What falls outside is added to one cell too many.
    grid = value.new_zeros(cells + 1)
    for cell, inside, coefficient, *_ in _corners(x, y, p, position, window, bins, height, width, rule, value.dtype):
        kept = inside & valid
        added = torch.where(kept, coefficient * value, torch.zeros_like(value))
        grid = grid.index_add(0, torch.where(kept, cell, cells), added)
    shape = (channels, height, width) if offsets is None else (windows, channels, height, width)
    return grid.narrow(0, 0, cells).view(shape), valid.logical_not().sum()


def voxel_grid_into_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, weight: Tensor | None, offsets: Tensor | None,
    pixel_map: Tensor | None, out: Tensor, bins: int, convention: str, deterministic: bool, kernel=voxel_grid_kernel,
) -> Tensor:  # fmt: skip
    """The grid, through a map of pixels, goes into `out`; returns the number of dropped events []."""
    height, width = out.shape[-2:]
    x, y, dropped = look_up(x, y, p, pixel_map, height, width)
    grid, outside = kernel(x, y, t, p, weight, offsets, bins, height, width, convention, deterministic)
    out.copy_(grid)
    return outside if dropped is None else dropped


def voxel_grid_backward(
    grad: Tensor, x: Tensor, y: Tensor, t: Tensor, p: Tensor, weight: Tensor | None, offsets: Tensor | None, bins: int,
    height: int, width: int, convention: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients with respect to x, y, t and weight; None for integers and for an absent weight."""
    rule = CONVENTIONS[convention]
    window = window_of_event(t, offsets)
    windows = 1 if offsets is None else offsets.numel() - 1
    value, valid = values_of_events(x, y, p, weight, height, width, rule)
    position, since, span, scale, first, last = position_in_time(t, window, windows, bins, rule)
    padded = torch.cat([grad.reshape(-1), grad.new_zeros(1)])
    sums = [torch.zeros_like(value) for _ in range(4)]
    for cell, inside, *factors in _corners(x, y, p, position, window, bins, height, width, rule, value.dtype):
        gathered = padded[torch.where(inside & valid, cell, padded.numel() - 1)]
        sums = [
            total if factor is None else total + factor * gathered for total, factor in zip(sums, factors, strict=True)
        ]
    grad_value, by_x, by_y, by_position = sums
    polarity = values_of_events(x, y, p, None, height, width, rule)[0].to(value.dtype)
    grad_weight = None if weight is None else grad_value * polarity
    grad_x, grad_y = ((by * value).to(x.dtype) if x.is_floating_point() else None for by in (by_x, by_y))
    if not t.is_floating_point():
        return grad_x, grad_y, None, grad_weight
    # position = (t - first) * scale / (last - first): every event moves its window's first and last one as well.
    by_since = by_position.double() * value.double() * scale / span
    by_span = torch.where(t[last] > t[first], -by_since * since / span, torch.zeros_like(by_since))
    grad_t = by_since.index_add(0, first, -by_since - by_span).index_add(0, last, by_span)
    return grad_x, grad_y, grad_t.to(t.dtype), grad_weight


def normalize_voxel_grid(grid: Tensor, form: str) -> Tensor:
    """Zero mean and unit deviation, of each sample over its cells that are not 0 or, "eseg", of each channel."""
    if form == "eseg":
        return normalize_active_pixels(grid, 1e-8)
    axes = (-1, -2, -3)
    filled = grid != 0

    def total(values):
        # One axis after the other: PyTorch splits a sum over all of them by the number of threads.
        for _ in axes:
            values = values.sum(-1)
        return values[..., None, None, None]

    count = total(filled.to(grid.dtype))
    mean = total(grid) / count.clamp(min=1)
    centred = torch.where(filled, grid - mean, torch.zeros_like(grid))
    freedom = count if form == "e2vid" else count - 1
    variance = total(centred * centred) / freedom.clamp(min=1)
    spread = (variance > 0) & (freedom > 0)
    return centred / torch.where(spread, variance, torch.ones_like(variance)).sqrt()


def normalize_active_pixels(x: Tensor, epsilon: float) -> Tensor:
    """Each channel of [..., C, H, W] over the pixels where any channel is not 0; the others become 0."""

    def total(values):
        # One axis after the other, as above.
        return values.sum(-1).sum(-1)[..., None, None]

    mask = (x.abs().sum(dim=-3, keepdim=True) > epsilon).to(x.dtype)
    count = total(mask) + epsilon
    # Masked once, before the squares: half the passes over a tensor that has long left the cache.
    y = (x - total(x) / count).mul_(mask)
    variance = total(y.square()) / count
    # The square root has no finite derivative at 0; both branches of `where` must be harmless.
    varies = variance > 0
    deviation = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
    return y / (deviation + epsilon)


def values_of_events(x, y, p, weight, height, width, rule):
    """What each event adds in all [E], and whether it is in range."""
    low = -1 if x.is_floating_point() else 0
    beyond = torch.gt if x.is_floating_point() else torch.ge
    sized = [(column if column.is_floating_point() else column.to(torch.int64)) for column in (x, y)]
    p = p.to(torch.int64)
    valid = beyond(sized[0], low) & (sized[0] < width) & beyond(sized[1], low) & (sized[1] < height)
    valid = valid & (p >= -1) & (p <= 1)
    polarity = torch.ones_like(p) if rule.split else torch.where(p == 0, rule.zero, p)
    dtype = torch.float32 if weight is None else weight.dtype
    return polarity.to(dtype) if weight is None else polarity.to(dtype) * weight, valid


def position_in_time(t, window, windows, bins, rule):
    """Position in bins, float64 [E], and its parts: t - first, last - first, scale, and those two events' indices."""
    events = torch.arange(t.numel(), device=t.device)
    time = t.double() if t.is_floating_point() else t.to(torch.int64)

    def event_of(reduce, start):
        extreme = time.detach().new_full((windows,), start).scatter_reduce(0, window, time.detach(), reduce)
        matches = torch.where(time.detach() == extreme.index_select(0, window), events, events.numel() - 1)
        found = events.new_full((windows,), events.numel()).scatter_reduce(0, window, matches, "amin")
        return found.index_select(0, window)

    limits = torch.finfo(time.dtype) if time.is_floating_point() else torch.iinfo(time.dtype)
    first, last = event_of("amin", limits.max), event_of("amax", limits.min)
    # Integers are subtracted as such: no float holds microseconds since 1970 and their differences.
    start, end = time.index_select(0, first), time.index_select(0, last)
    since, span = (time - start).double(), (end - start).double()
    span = torch.where(span > 0, span, torch.ones_like(span))
    scale = float(bins - rule.fewer)
    return since * scale / span - rule.shift, since, span, scale, first, last


def _corners(x, y, p, position, window, bins, height, width, rule, dtype):
    """(cell, inside, coefficient, its derivatives by x, y and position) of every cell that the events touch."""
    times = _beside(position, bins, rule, dtype)
    channels = 2 * bins if rule.split else bins
    for bin_index, of_time, by_position in times:
        channel = bin_index + bins * (p.to(torch.int64) <= 0) if rule.split else bin_index
        plane = window * channels + channel
        in_time = (bin_index >= 0) & (bin_index < bins)
        if not x.is_floating_point():
            cell = (plane * height + y.to(torch.int64)) * width + x.to(torch.int64)
            yield cell, in_time, of_time, None, None, by_position
            continue
        for column, of_x, by_x in _neighbours(x, width, dtype):
            for row, of_y, by_y in _neighbours(y, height, dtype):
                inside = in_time & (column >= 0) & (column < width) & (row >= 0) & (row < height)
                derivatives = by_x * of_y * of_time, of_x * by_y * of_time, of_x * of_y * by_position
                yield (plane * height + row) * width + column, inside, of_x * of_y * of_time, *derivatives


def _beside(position, bins, rule, dtype):
    """(bin, coefficient, derivative by position) of the one or two bins beside a position."""
    below = position.detach().clamp(-2, bins + 1).floor()
    one = torch.ones_like(position, dtype=dtype)
    if rule.ends == "hard":
        return [(below.clamp(max=bins - 1).long(), one, 0 * one)]
    if rule.ends == "clamp":
        below = below.clamp(0, bins - 1)
        sign = torch.where(below == bins - 1, 0.0, torch.where(position.detach() < below, -1.0, 1.0)).to(dtype)
        past = (position - below).to(dtype) * sign
    else:
        sign, past = one, (position - below).to(dtype)
    return [(below.long(), 1 - past, -sign), (below.long() + 1, past, sign)]


def _neighbours(coordinate, limit, dtype):
    """(index, coefficient, its derivative) of the two pixels beside a coordinate."""
    below = coordinate.detach().clamp(-2, limit + 1).floor()
    past = (coordinate - below).to(dtype)
    one = torch.ones_like(past)
    return [(below.long(), 1 - past, -one), (below.long() + 1, past, one)]
