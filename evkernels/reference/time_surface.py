"""Definition of time surfaces in plain PyTorch: the maximum of t per cell and, where wanted, what is left of it."""

import torch
from torch import Tensor

from evkernels.reference.event_histogram import window_of_event, window_times
from evkernels.reference.pixel_map import look_up

# On a surface of last times: no event came.
NEVER = torch.iinfo(torch.int64).min


def time_surface(
    x, y, t, p, *, height, width,
    polarities=2, tau=None, decay="exponential", at=None, surface=None, offsets=None, out_of_range="drop",
    pixel_map=None, out=None,
) -> Tensor:  # fmt: skip
    x, y, outside = look_up(x, y, p, pixel_map, height, width)
    events = x, y, t, p, offsets, surface
    if tau is None:
        result, dropped = time_surface_kernel(*events, polarities, height, width)
    else:
        if at is not None:
            at = torch.as_tensor(at, device=x.device).expand(1 if offsets is None else offsets.numel() - 1)
        linear = decay == "linear"
        result, dropped = decayed_time_surface_kernel(*events, at, polarities, height, width, tau, linear)
    dropped = dropped if outside is None else outside
    if out_of_range == "raise" and dropped:
        raise ValueError(f"{int(dropped)} events are out of range")
    return result if out is None else out.copy_(result)


def time_surface_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, surface: Tensor | None,
    polarities: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The last time of every cell, int64, and the number of dropped events []."""
    x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
    window = window_of_event(t, offsets)
    shape = (polarities, height, width) if offsets is None else (offsets.numel() - 1, polarities, height, width)
    valid = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)
    plane = 2 * window + (p > 0) if polarities == 2 else window
    cell = (plane * height + y) * width + x
    # Dropped events go into one cell too many.
    cells = torch.Size(shape).numel()
    last = t.new_full((cells + 1,), NEVER)
    if surface is not None:
        last[:cells] = surface.flatten()
    last.scatter_reduce_(0, torch.where(valid, cell, cells), t, "amax")
    return last[:cells].view(shape), (~valid).sum()


def decayed_time_surface_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, surface: Tensor | None, at: Tensor | None,
    polarities: int, height: int, width: int, tau: float, linear: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    last, dropped = time_surface_kernel(x, y, t, p, offsets, surface, polarities, height, width)
    return decayed(last, latest_time(t, offsets, surface) if at is None else at, tau, linear), dropped


def time_surface_into_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, pixel_map: Tensor | None,
    surface: Tensor | None, out: Tensor, kernel=time_surface_kernel,
) -> Tensor:  # fmt: skip
    """The last times, through a map of pixels, go into `out`; returns the number of dropped events []."""
    x, y, dropped = look_up(x, y, p, pixel_map, *out.shape[-2:])
    last, outside = kernel(x, y, t, p, offsets, surface, *out.shape[-3:])
    out.copy_(last)
    return outside if dropped is None else dropped


def decayed_time_surface_into_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, pixel_map: Tensor | None,
    surface: Tensor | None, at: Tensor | None, out: Tensor, tau: float, linear: bool,
    kernel=decayed_time_surface_kernel,
) -> Tensor:  # fmt: skip
    x, y, dropped = look_up(x, y, p, pixel_map, *out.shape[-2:])
    left, outside = kernel(x, y, t, p, offsets, surface, at, *out.shape[-3:], tau, linear)
    out.copy_(left)
    return outside if dropped is None else dropped


def latest_time(t: Tensor, offsets: Tensor | None, surface: Tensor | None) -> Tensor:
    """Of every window [B]: the latest time of its events and of the surface that it goes on from."""
    t = t.to(torch.int64)
    windows = 1 if offsets is None else offsets.numel() - 1
    _, latest = window_times(t, window_of_event(t, offsets), windows)
    return latest if surface is None else torch.maximum(latest, surface.flatten(-3).amax(-1).view(-1))


def decayed(last: Tensor, at: Tensor, tau: float, linear: bool) -> Tensor:
    """What is left, at time `at` [B], of events that were 1 when they came."""
    # Subtracted as integers: float32 cannot tell two microseconds of the same year apart.
    age = (at.view(-1, 1, 1, 1) - last).clamp(min=0).float() / tau
    left = (1 - age).clamp(min=0) if linear else torch.exp(-age)
    return torch.where(last == NEVER, 0.0, left).view(last.shape)
