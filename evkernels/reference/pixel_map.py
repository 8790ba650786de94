"""Definition of what a map of the sensor's pixels does to events before they are counted, in plain PyTorch."""

import torch
from torch import Tensor


def look_up(x: Tensor, y: Tensor, p: Tensor, pixel_map: Tensor | None, height: int, width: int):
    """Columns and rows in images of height x width, and the number of events out of range [], None without a map.

    Events that the map leaves out, and those outside the sensor, come back outside the image.
    """
    if pixel_map is None:
        return x, y, None
    x, y, p = (column.to(torch.int64) for column in (x, y, p))
    rows, columns = pixel_map.shape[:2]
    in_range = (x >= 0) & (x < columns) & (y >= 0) & (y < rows) & (p >= -1) & (p <= 1)
    found = pixel_map[torch.where(in_range, y, 0), torch.where(in_range, x, 0)]
    dropped = (~in_range).sum()
    if pixel_map.is_floating_point():
        x, y = found.unbind(-1)
        return torch.where(in_range, x, -1.0), torch.where(in_range, y, -1.0), dropped
    cell = found.to(torch.int64)
    kept = in_range & (cell >= 0) & (cell < height * width)
    return torch.where(kept, cell % width, -1), torch.where(kept, cell // width, -1), dropped
