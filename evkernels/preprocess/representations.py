"""The representations that `preprocess` makes: a module for a batch of windows, its options, its folder's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evkernels import ops
from evkernels.events import EventBatch
from evkernels.nn import (
    AveragedTimeSurface,
    EventSpikeTensor,
    MixedDensityEventStack,
    StackedHistogram,
    TimeOrderedRecentEvents,
    TimeSurface,
    VoxelGrid,
)
from evkernels.preprocess.settings import Settings


@dataclass(frozen=True)
class Frames:
    """How frames of one size are made.

    Args:
        make: From windows and their ends to frames [B, *shape]; drops events outside the sensor.
        shape: Of a frame, [C, H, W].
        dtype: Of a frame.
    """

    make: Callable[[EventBatch, np.ndarray], Tensor]
    shape: tuple[int, int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Representation:
    """One of the choices of `--representation`.

    Args:
        frames: From settings, height and width.
        folder: How the folder's name begins, and how it ends after the windows.
        defaults: The options it has, beside those of windows, and what they are if not given.
        largest_count: What its counters hold, where it counts.
    """

    frames: Callable[[Settings, int, int], Frames]
    folder: tuple[str, Callable[[Settings], str]]
    defaults: dict[str, object]
    largest_count: int | None = None


def folder(settings: Settings) -> str:
    """Name of the representation's folder, as RVT's `ev_repr_name`."""
    begin, end = REPRESENTATIONS[settings.representation].folder
    return f"{begin}_{settings.window_name}{end(settings)}"


def _stacked_histogram(s: Settings, height: int, width: int) -> Frames:
    module = StackedHistogram(s.bins, height, width, s.count_cutoff)
    return Frames(lambda batch, ends: module(batch), module.get_shape(), torch.uint8)


def _mixed_density(s: Settings, height: int, width: int) -> Frames:
    module = MixedDensityEventStack(s.bins, height, width, s.count_cutoff)
    return Frames(lambda batch, ends: module(batch), module.get_shape(), torch.int8)


def _voxel_grid(s: Settings, height: int, width: int) -> Frames:
    module = VoxelGrid(s.bins, height, width, s.convention, s.normalize)
    return Frames(lambda batch, ends: module(batch), module.get_shape(), torch.float32)


def _time_surface(s: Settings, height: int, width: int) -> Frames:
    module = TimeSurface(height, width, tau=s.tau_us)
    return Frames(lambda batch, ends: module(batch, at=torch.from_numpy(ends)), (2, height, width), torch.float32)


def _event_counts(s: Settings, height: int, width: int) -> Frames:
    def count(batch: EventBatch, ends: np.ndarray) -> Tensor:
        return ops.event_histogram(
            batch.x,
            batch.y,
            batch.t,
            batch.p,
            bins=1,
            height=height,
            width=width,
            count_cutoff=s.count_cutoff,
            dtype=torch.int16,
            offsets=batch.offsets,
        )

    return Frames(count, (2, height, width), torch.int16)


def _tore(s: Settings, height: int, width: int) -> Frames:
    module = TimeOrderedRecentEvents(height, width, s.depth)
    shape = (2 * s.depth, height, width)
    return Frames(lambda batch, ends: module(batch, at=torch.from_numpy(ends)), shape, torch.float32)


def _hats(s: Settings, height: int, width: int) -> Frames:
    module = AveragedTimeSurface(height, width, tau=s.tau_us)
    rows, columns = module.grid
    channels = 2 * module.surface_size**2

    def image_of_cells(batch: EventBatch, ends: np.ndarray) -> Tensor:
        return module(batch).view(-1, rows, columns, channels).permute(0, 3, 1, 2)

    return Frames(image_of_cells, (channels, rows, columns), torch.float32)


def _est(s: Settings, height: int, width: int) -> Frames:
    # As many hidden units as the kernel it begins with needs: none is random, so that the same command gives the same
    # file.
    module = EventSpikeTensor(s.bins, height, width, hidden=(6,)).requires_grad_(False)
    return Frames(lambda batch, ends: module(batch), (2 * s.bins, height, width), torch.float32)


def _cutoff(s: Settings) -> str:
    return "" if s.count_cutoff is None else f"_cutoff={s.count_cutoff}"


def _tau(s: Settings) -> str:
    return f"_tau={s.tau_us / 1000:.10g}"


def _grid(s: Settings) -> str:
    return f"_nbins={s.bins}_{s.convention}" + ("" if s.normalize is None else f"_normalize={s.normalize}")


# Fields of Settings that not every representation has, and how the command line calls them.
OPTIONS = {
    "bins": "bins",
    "count_cutoff": "count-cutoff",
    "convention": "convention",
    "normalize": "normalize",
    "tau_us": "tau",
    "depth": "depth",
}

# The names of the first two are those of RVT, of which only the second tells its cutoff.
REPRESENTATIONS: dict[str, Representation] = {
    "stacked_histogram": Representation(
        _stacked_histogram,
        ("stacked_histogram", lambda s: f"_nbins={s.bins}"),
        {"bins": 10, "count_cutoff": None},
        largest_count=255,
    ),
    "mixed_density": Representation(
        _mixed_density,
        ("mixeddensity_stack", lambda s: f"_nbins={s.bins}{_cutoff(s)}"),
        {"bins": 10, "count_cutoff": None},
        largest_count=127,
    ),
    "voxel_grid": Representation(
        _voxel_grid, ("voxel_grid", _grid), {"bins": 5, "convention": "e2vid", "normalize": None}
    ),
    "time_surface": Representation(_time_surface, ("time_surface", _tau), {"tau_us": 50_000}),
    "event_counts": Representation(
        _event_counts, ("event_counts", _cutoff), {"count_cutoff": None}, largest_count=2**15 - 1
    ),
    "tore": Representation(_tore, ("tore", lambda s: f"_k={s.depth}"), {"depth": 4}),
    "hats": Representation(_hats, ("hats", _tau), {"tau_us": 1_000_000}),
    "est": Representation(_est, ("est", lambda s: f"_nbins={s.bins}"), {"bins": 9}),
}
