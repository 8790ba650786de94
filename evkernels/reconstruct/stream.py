"""From windows of events to images, one after the other, and from intensities to grey levels.

A network's state is the only thing that one window leaves for the next, so a recording of any length takes the memory
of one window.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.events import Events
from evkernels.ops import voxel_grid

_PERCENTILES = (1, 99)
# What the darkest and the brightest grey level may stand for, so that noise on a flat scene stays faint.
_DARK, _BRIGHT = (0.0, 0.45), (0.55, 1.0)


def stream_images(model: nn.Module, windows: Iterable[Events], device: str | torch.device = "cpu") -> Iterator[Tensor]:
    """Reconstructs an image for every window.

    Args:
        model: `FireNet`, `E2VIDRecurrent` or `CistaTC`, or what is called like them and has `num_bins` and
            `size_multiple`; in evaluation mode and on `device`.
        windows: Consecutive windows of one sensor's recording, as `Events.windows` gives them.
        device: Where to compute.

    Returns:
        Iterator over float32 [H, W] of the sensor's size. Grids are normalised as E2VID's; where the network wants
        multiples of a size they are padded by reflection, on the upper and left side with the larger half, and the
        image is cropped.
    """
    return (image for image, _ in stream_states(model, windows, device))


def stream_states(
    model: nn.Module, windows: Iterable[Events], device: str | torch.device = "cpu", state: Any = None
) -> Iterator[tuple[Tensor, Any]]:
    """As `stream_images`, with the network's state after each image; `state` is that before the first, None zeros."""
    for window in windows:
        grid = voxel_grid(
            *window.tensors(device), bins=model.num_bins, height=window.height, width=window.width, normalize="e2vid"
        )
        padded, rows, columns = reflected(grid[None], model.size_multiple)
        with torch.inference_mode():
            image, state = model(padded, state)
        yield image[0, 0, rows, columns], state


def reflected(grid: Tensor, multiple: int) -> tuple[Tensor, slice, slice]:
    """`grid` [N, C, H, W] padded by reflection to multiples of `multiple`, and the rows and columns where it lies."""
    height, width = grid.shape[2:]
    more_rows, more_columns = -height % multiple, -width % multiple
    top, left = (more_rows + 1) // 2, (more_columns + 1) // 2
    if more_rows or more_columns:
        grid = F.pad(grid, (left, more_columns - left, top, more_rows - top), mode="reflect")
    return grid, slice(top, top + height), slice(left, left + width)


class IntensityRescaling:
    """Intensities to grey levels by bounds that follow the recent images.

    Equivalent to::

        low, high = np.percentile(image, (1, 99))
        low = median(low.clip(0, 0.45) of the last `images` images)
        high = median(high.clip(0.55, 1) of the last `images` images)
        grey = (255 * (image - low) / (high - low)).clip(0, 255)

    Args:
        images: How many images the bounds are the medians of, this one included.
        bounds: Of the images before the first.

    Source: the automatic high dynamic range of E2VID's reconstruction, with percentiles for its extremes.
    """

    def __init__(self, images: int = 10, bounds: Iterable[tuple[float, float]] = ()):
        self._bounds = deque(bounds, maxlen=images)

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Of the recent images, the oldest first."""
        return tuple((float(low), float(high)) for low, high in self._bounds)

    def __call__(self, image: Tensor) -> np.ndarray:
        """uint8 [H, W] of an image [H, W], in the order of the recording."""
        image = image.float().cpu().numpy()
        low, high = np.percentile(image, _PERCENTILES)
        self._bounds.append((np.clip(low, *_DARK), np.clip(high, *_BRIGHT)))
        low, high = np.median(self._bounds, axis=0)
        return np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
