"""event_histogram against the ways to count in PyTorch and NumPy and against evlib: 10 bins, and 1: a count image.

Floor: x, y and p are read once (5 bytes per event) and the histogram is written once; sorted times need not be read by
an algorithm that is told so. RVT's own class counts in 8 bits and wraps at 256 events per cell: there its result is
marked as wrong. What others do for a batch is a loop over its windows: on one thread, for 256 samples of N-MNIST and 10
bins, the best of PyTorch and NumPy takes 17 times as long, and evlib, whose columns are converted before the clock
starts, 6.2 times. Clearing the histograms is 0.23 of our time, with out= as well as without: if it took none, evlib
would take 8 times as long.
"""

import numpy as np
import torch

from benchmarks.event_streams import Stream, by_window, columns, streams, windows
from benchmarks.registry import Benchmark, Competitor
from evkernels import ops

BINS = 10


def cells(x, y, t, p, bins, height, width):
    time_bin = ((t - t[0]) / (t[-1] - t[0]).clamp(min=1) * bins).floor().clamp(max=bins - 1)
    return x.long() + width * (y.long() + height * (time_bin.long() + bins * p.long()))


def narrowed(counts, bins, height, width):
    return counts.clamp(max=255).to(torch.uint8).view(2 * bins, height, width)


def put(dtype):
    """RVT's style."""

    def histogram(x, y, t, p, bins, height, width):
        index = cells(x, y, t, p, bins, height, width)
        counts = torch.zeros(2 * bins * height * width, dtype=dtype, device=x.device)
        return narrowed(counts.put_(index, torch.ones_like(index, dtype=dtype), accumulate=True), bins, height, width)

    return by_window(histogram)


@by_window
def bincount(x, y, t, p, bins, height, width):
    size = 2 * bins * height * width
    return narrowed(torch.bincount(cells(x, y, t, p, bins, height, width), minlength=size), bins, height, width)


@by_window
def index_put(x, y, t, p, bins, height, width):
    counts = torch.zeros(2 * bins * height * width, dtype=torch.int32, device=x.device)
    one = torch.ones((), dtype=torch.int32, device=x.device)
    index = cells(x, y, t, p, bins, height, width)
    return narrowed(counts.index_put_((index,), one, accumulate=True), bins, height, width)


@by_window
def numpy_add_at(x, y, t, p, bins, height, width):
    counts = np.zeros(2 * bins * height * width, np.int32)
    np.add.at(counts, cells(x, y, t, p, bins, height, width).cpu().numpy(), 1)
    return narrowed(torch.from_numpy(counts).to(x.device), bins, height, width)


@by_window
def numpy_bincount(x, y, t, p, bins, height, width):
    """A count image needs no times: they are left alone where there is one bin."""
    if bins > 1:
        cell = cells(x, y, t, p, bins, height, width).cpu().numpy()
    else:
        x, y, p = (column.cpu().numpy() for column in (x, y, p))
        cell = x + np.int64(width) * (y + np.int64(height) * p)
    counts = np.bincount(cell, minlength=2 * bins * height * width)
    return torch.from_numpy(np.minimum(counts, 255).astype(np.uint8).reshape(2 * bins, height, width))


def load_evlib():
    from evlib.representations_rs import stacked_histogram_dense

    def each(given):
        histograms = [torch.from_numpy(stacked_histogram_dense(*window)[0]) for window in given]
        return histograms[0] if len(histograms) == 1 else torch.stack(histograms)

    return each


def evlib_arguments(arguments):
    """Its own integers, and the end and length of each window."""
    x, y, t, p, offsets, bins, height, width = arguments
    x, y, t, p = (column.cpu().numpy().astype(np.int64) for column in (x, y, t, p))
    given = []
    for part in windows(offsets, len(t)):
        first, last = t[part][[0, -1]]
        size = bins, 255, np.arange(height), np.arange(width), height, width
        given.append((t[part], x[part], y[part], p[part], np.array([last]), int(last - first) + 1, *size))
    return (given,)


def load_eventcv():
    import eventcv  # noqa: F401

    return lambda streams: torch.stack([torch.from_numpy(stream.count().numpy()) for stream in streams])


def eventcv_streams(arguments):
    import eventcv

    x, y, t, p, offsets, bins, height, width = arguments
    if bins > 1:
        raise NotImplementedError("it counts without bins")
    events = np.stack([column.cpu().numpy().astype(np.int64) for column in (x, y, t - t[0], p)], axis=1)
    parts = [events[part] for part in windows(offsets, len(events))]
    return ([eventcv.from_numpy(part, sensor_size=(width, height), time_unit="us") for part in parts],)


def fused(x, y, t, p, offsets, bins, height, width):
    return ops.event_histogram(x, y, t, p, bins=bins, height=height, width=width, offsets=offsets)


def inputs(stream, dtype):
    return *columns(stream), stream.bins, stream.height, stream.width


SHAPES = (*streams(BINS), *(stream for stream in streams(1) if stream.windows == 1))


BENCHMARKS = (
    Benchmark(
        op="event_histogram",
        function=fused,
        eager=put(torch.int16),
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=Stream(500, 6, 8, BINS),
        floor_bytes=lambda shape, itemsize, mode: (
            5 * shape.events + 2 * shape.windows * shape.bins * shape.height * shape.width
        ),
        items=lambda shape: shape.events,
        item="event",
        label=lambda shape: shape.label,
        dtypes=(torch.uint8,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("put_ uint8", lambda: put(torch.uint8)),
            Competitor("bincount", lambda: bincount),
            Competitor("index_put_", lambda: index_put),
            Competitor("np.add.at", lambda: numpy_add_at),
            Competitor("np.bincount", lambda: numpy_bincount),
            Competitor("evlib", load_evlib, prepare=evlib_arguments),
            Competitor("eventcv count", load_eventcv, prepare=eventcv_streams, differs="one channel, no polarities"),
        ),
    ),
)
