"""voxel_grid, E2VID's convention, against the published formulas, eventcv, tonic, evio and event-voxel-builder: 5 bins.

Floor: x, y, t and p are read once (13 bytes per event) and the grid is written once. eventcv's grid looks back a given
time from the last event, which is here the window's duration. What others read is built before the clock starts. tonic
and event-voxel-builder have other conventions.
"""

import numpy as np
import torch

from benchmarks.event_streams import Stream, by_window, columns, streams, structured, windows
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


@by_window
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


def published_each(given, height, width):
    grids = [published(events, height, width) for events in given]
    return grids[0] if len(grids) == 1 else torch.stack(grids)


def rows(arguments):
    x, y, t, p, offsets, height, width, _ = arguments
    # PyTorch has little more than conversions for unsigned integers.
    given = torch.stack([column.double() for column in (t - t[0], x.int(), y.int(), p)], dim=1)
    return [given[part] for part in windows(offsets, len(given))], height, width


@by_window
def bincount(x, y, t, p, height, width, one):
    cell, left, right = shares(x, y, t, p, height, width, one)
    size = (BINS + 1) * height * width
    grid = torch.bincount(cell, left, size) + torch.bincount(cell + height * width, right, size)
    return grid.float().view(BINS + 1, height, width)[:BINS]


@by_window
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


def each(function):
    """Calls a peer for each of the windows that were prepared for it."""

    def all_windows(given):
        grids = [torch.from_numpy(function(*window)) for window in given]
        return grids[0] if len(grids) == 1 else torch.stack(grids)

    return all_windows


def load_eventcv():
    import eventcv  # noqa: F401

    return each(lambda stream, duration: stream.voxel(bins=BINS, window_us=duration).numpy())


def eventcv_streams(arguments):
    import eventcv

    x, y, t, p, offsets, height, width, _ = arguments
    events = np.stack([column.cpu().numpy().astype(np.int64) for column in (x, y, t - t[0], p)], axis=1)
    given = []
    for part in (events[part] for part in windows(offsets, len(events))):
        stream = eventcv.from_numpy(part, sensor_size=(width, height), time_unit="us")
        given.append((stream, int(part[-1, 2] - part[0, 2])))
    return (given,)


def load_tonic():
    from tonic.functional import to_voxel_grid_numpy

    return each(lambda events, size: to_voxel_grid_numpy(events, size, BINS)[:, 0])


def tonic_arguments(arguments):
    x, y, t, p, offsets, height, width, _ = arguments
    table = structured((x, y, t, p))
    return ([(table[part], (width, height, 2)) for part in windows(offsets, len(table))],)


def load_evio():
    import evio

    return each(lambda events, size: evio.voxel_grid(events, BINS, size))


def evio_arguments(arguments):
    import evio

    x, y, t, p, offsets, height, width, _ = arguments
    x, y, t, p = (column.cpu().numpy() for column in (x, y, t, p))
    parts = windows(offsets, len(t))
    return ([(evio.from_arrays(x[part], y[part], t[part], p[part]), (width, height)) for part in parts],)


def load_builder():
    import event_voxel_builder  # noqa: F401

    return each(lambda builder, *events: builder.build(*events))


def builder_arguments(arguments):
    from event_voxel_builder import EventVoxelBuilder

    x, y, t, p, offsets, height, width, _ = arguments
    given = []
    for part in windows(offsets, len(t)):
        since = (t[part] - t[part][0]).cpu().numpy().astype(np.uint64)
        row, column, polarity = (values[part].cpu().numpy() for values in (y, x, p))
        builder = EventVoxelBuilder(BINS, height, width, int(since[-1]) // BINS + 1, num_threads=1)
        given.append((builder, since, row, column, 2 * polarity.astype(np.int8) - 1))
    return (given,)


def fused(x, y, t, p, offsets, height, width, one):
    return ops.voxel_grid(x, y, t, p, bins=BINS, height=height, width=width, offsets=offsets)


def inputs(stream, dtype):
    # The last one is what a float64 result is asked for by.
    return *columns(stream, DURATION_US), stream.height, stream.width, torch.ones((), dtype=dtype)


SHAPES = streams()
BENCHMARKS = (
    Benchmark(
        op="voxel_grid",
        function=fused,
        eager=index_add,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=Stream(500, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: (
            13 * shape.events + 4 * BINS * shape.windows * shape.height * shape.width
        ),
        items=lambda shape: shape.events,
        item="event",
        label=lambda shape: shape.label,
        dtypes=(torch.float32,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("E2VID", lambda: published_each, prepare=rows),
            Competitor("bincount", lambda: bincount),
            Competitor("np.add.at", lambda: numpy_add_at),
            Competitor("eventcv", load_eventcv, prepare=eventcv_streams),
            Competitor("evio", load_evio, prepare=evio_arguments),
            Competitor("tonic", load_tonic, prepare=tonic_arguments, differs="another convention"),
            Competitor("event-voxel-builder", load_builder, prepare=builder_arguments, differs="another convention"),
        ),
    ),
)
