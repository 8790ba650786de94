"""voxel_grid, E2VID's convention, against the published formulas and eventcv: 5 bins, VGA and 720p, 1e5 to 1e7 events.

Floor: x, y, t and p are read once (13 bytes per event) and the grid is written once. The events are spread evenly over
the sensor, which is the worst case for caches. eventcv's grid looks back a fixed time from the last event, so the
events last less than that; its stream is built before the clock starts.
"""

import numpy as np
import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops

BINS = 5
DURATION_US = 29_000


def shares(x, y, t, p, height, width, one):
    """Cell of the lower bin, and what is added to it and to the cell one plane further, in the dtype of `one`."""
    position = (BINS - 1) * (t - t[0]).double() / (t[-1] - t[0]).clamp(min=1)
    below = position.floor()
    past = (position - below).to(one.dtype)
    value = p.to(one.dtype) * 2 - 1
    cell = x.long() + width * (y.long() + height * below.long())
    return cell, value * (1 - past), value * past


def index_add(x, y, t, p, height, width, one):
    """The best of plain PyTorch: parts beyond the last bin go to a plane that is cut off, so that nothing is masked."""
    cell, left, right = shares(x, y, t, p, height, width, one)
    grid = torch.zeros((BINS + 1) * height * width, dtype=one.dtype, device=x.device)
    grid.index_add_(0, cell, left).index_add_(0, cell + height * width, right)
    return grid.view(BINS + 1, height, width)[:BINS]


def published(events, height, width):
    """The same step by step as E2VID does it, from float64 rows t, x, y, p."""
    t, x, y = events[:, 0], events[:, 1].long(), events[:, 2].long()
    position = (BINS - 1) * (t - t[0]) / (t[-1] - t[0])
    below = position.floor()
    past = (position - below).float()
    value = torch.where(events[:, 3] == 0, -1.0, events[:, 3].float())
    grid = torch.zeros(BINS * height * width, device=events.device)
    for plane, share in ((below.long(), value * (1 - past)), (below.long() + 1, value * past)):
        valid = (plane >= 0) & (plane < BINS)
        cell = x[valid] + y[valid] * width + plane[valid] * width * height
        grid.index_add_(0, cell, share[valid])
    return grid.view(BINS, height, width)


def rows(arguments):
    x, y, t, p, height, width, _ = arguments
    # PyTorch has little more than conversions for unsigned integers.
    columns = (t - t[0], x.int(), y.int(), p)
    return torch.stack([column.double() for column in columns], dim=1), height, width


def bincount(x, y, t, p, height, width, one):
    cell, left, right = shares(x, y, t, p, height, width, one)
    size = (BINS + 1) * height * width
    grid = torch.bincount(cell, left, size) + torch.bincount(cell + height * width, right, size)
    return grid.float().view(BINS + 1, height, width)[:BINS]


def numpy_add_at(x, y, t, p, height, width, one):
    """E2VID's formula for NumPy."""
    x, y, t, p = (column.cpu().numpy() for column in (x, y, t, p))
    position = (BINS - 1) * (t - t[0]).astype(np.float64) / max(t[-1] - t[0], 1)
    below = position.astype(np.int64)
    past = (position - below).astype(np.float32)
    value = p.astype(np.float32) * 2 - 1
    cell = x.astype(np.int64) + width * (y.astype(np.int64) + height * below)
    grid = np.zeros((BINS + 1) * height * width, np.float32)
    np.add.at(grid, cell, value * (1 - past))
    np.add.at(grid, cell + height * width, value * past)
    return torch.from_numpy(grid.reshape(BINS + 1, height, width)[:BINS])


def load_eventcv():
    import eventcv  # noqa: F401

    return lambda stream: torch.from_numpy(stream.voxel(bins=BINS, window_us=DURATION_US).numpy())


def eventcv_stream(arguments):
    import eventcv

    x, y, t, p, height, width, _ = arguments
    events = np.stack([column.cpu().numpy().astype(np.int64) for column in (x, y, t - t[0], p)], axis=1)
    return (eventcv.from_numpy(events, sensor_size=(width, height), time_unit="us"),)


def fused(x, y, t, p, height, width, one):
    return ops.voxel_grid(x, y, t, p, bins=BINS, height=height, width=width)


def inputs(shape, dtype):
    events, height, width = shape
    generator = np.random.default_rng(0)
    t = np.sort(generator.integers(0, DURATION_US, events)) + 1_600_000_000_000_000
    t[-1] = t[0] + DURATION_US
    columns = (
        generator.integers(0, width, events).astype(np.uint16),
        generator.integers(0, height, events).astype(np.uint16),
        t,
        generator.integers(0, 2, events).astype(np.uint8),
    )
    # The last one is what a float64 result is asked for by.
    return *(torch.from_numpy(column) for column in columns), height, width, torch.ones((), dtype=dtype)


BENCHMARKS = (
    Benchmark(
        op="voxel_grid",
        function=fused,
        eager=index_add,
        inputs=inputs,
        shapes=((10**5, 480, 640), (10**6, 480, 640), (10**7, 480, 640), (10**6, 720, 1280)),
        gate_shapes=((10**5, 480, 640), (10**6, 480, 640)),
        tiny_shape=(500, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: 13 * shape[0] + 4 * BINS * shape[1] * shape[2],
        items=lambda shape: shape[0],
        item="event",
        label=lambda shape: f"{shape[0]:.0e} events {shape[2]}x{shape[1]}",
        dtypes=(torch.float32,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("E2VID", lambda: published, prepare=rows),
            Competitor("bincount", lambda: bincount),
            Competitor("np.add.at", lambda: numpy_add_at),
            Competitor("eventcv", load_eventcv, prepare=eventcv_stream),
        ),
    ),
)
