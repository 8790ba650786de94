"""E2VID's voxel grid in plain PyTorch."""

import torch
from torch import Tensor


def voxel_grid(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, *, bins: int, height: int, width: int, normalize: str | None = None
) -> Tensor:
    """Sums of polarities per time bin and pixel, each event shared between the two bins beside its time.

    Equivalent to::

        value = torch.where(p > 0, 1.0, -1.0)
        position = (t - t[0]).double() * (bins - 1) / (t[-1] - t[0]).clamp(min=1)
        grid[floor(position), y, x] += value * (1 - (position - floor(position)))
        grid[floor(position) + 1, y, x] += value * (position - floor(position))

    Args:
        x, y: Columns and rows [E], integers inside the sensor.
        t: Timestamps [E], integers that never decrease.
        p: Polarities [E], positive for ON.
        bins: Number of time bins.
        height, width: Sensor size.
        normalize: "e2vid" subtracts from the cells that are not 0 their mean and divides by their standard deviation,
            of the population; where that is 0, only the mean is subtracted. Cells that are 0 stay 0.

    Returns:
        float32 [bins, height, width]; zeros without events.
    """
    grid = torch.zeros((bins + 1) * height * width, device=x.device)
    if t.numel():
        value = torch.where(p > 0, 1.0, -1.0)
        # Integers are subtracted as such: no float holds microseconds since 1970 and their differences.
        position = (t - t[0]).double() * (bins - 1) / (t[-1] - t[0]).clamp(min=1).double()
        below = position.long()
        past = (position - below).float()
        cell = (below * height + y.long()) * width + x.long()
        grid.index_add_(0, cell, value * (1 - past))
        grid.index_add_(0, cell + height * width, value * past)
    grid = grid.view(bins + 1, height, width)[:bins]
    return _normalized(grid) if normalize == "e2vid" else grid


def _normalized(grid: Tensor) -> Tensor:
    filled = grid != 0
    count = filled.sum().clamp(min=1)
    centred = torch.where(filled, grid - grid.sum() / count, 0.0)
    deviation = (centred.square().sum() / count).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)
