"""event_histogram against the ways to count in PyTorch and NumPy: 10 bins, VGA and 720p, 1e5 to 1e7 events.

Floor: x, y and p are read once (5 bytes per event) and the histogram is written once; sorted times need not be read by
an algorithm that is told so. The events are spread evenly over the sensor, which is the worst case for caches. RVT's
own class counts in 8 bits and wraps at 256 events per cell, which no cell here reaches.
"""

import numpy as np
import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops

BINS = 10


def cells(x, y, t, p, height, width):
    time_bin = ((t - t[0]) / (t[-1] - t[0]).clamp(min=1) * BINS).floor().clamp(max=BINS - 1)
    return x.long() + width * (y.long() + height * (time_bin.long() + BINS * p.long()))


def narrowed(counts, height, width):
    return counts.clamp(max=255).to(torch.uint8).view(2 * BINS, height, width)


def put(dtype):
    """RVT's style."""

    def histogram(x, y, t, p, height, width):
        index = cells(x, y, t, p, height, width)
        counts = torch.zeros(2 * BINS * height * width, dtype=dtype, device=x.device)
        return narrowed(counts.put_(index, torch.ones_like(index, dtype=dtype), accumulate=True), height, width)

    return histogram


def bincount(x, y, t, p, height, width):
    size = 2 * BINS * height * width
    return narrowed(torch.bincount(cells(x, y, t, p, height, width), minlength=size), height, width)


def index_put(x, y, t, p, height, width):
    counts = torch.zeros(2 * BINS * height * width, dtype=torch.int32, device=x.device)
    one = torch.ones((), dtype=torch.int32, device=x.device)
    return narrowed(counts.index_put_((cells(x, y, t, p, height, width),), one, accumulate=True), height, width)


def numpy_add_at(x, y, t, p, height, width):
    counts = np.zeros(2 * BINS * height * width, np.int32)
    np.add.at(counts, cells(x, y, t, p, height, width).cpu().numpy(), 1)
    return narrowed(torch.from_numpy(counts).to(x.device), height, width)


def fused(x, y, t, p, height, width):
    return ops.event_histogram(x, y, t, p, bins=BINS, height=height, width=width)


def inputs(shape, dtype):
    events, height, width = shape
    generator = np.random.default_rng(0)
    columns = (
        generator.integers(0, width, events).astype(np.uint16),
        generator.integers(0, height, events).astype(np.uint16),
        np.sort(generator.integers(0, 50_000, events)) + 1_600_000_000_000_000,
        generator.integers(0, 2, events).astype(np.uint8),
    )
    return *(torch.from_numpy(column) for column in columns), height, width


BENCHMARKS = (
    Benchmark(
        op="event_histogram",
        function=fused,
        eager=put(torch.int16),
        inputs=inputs,
        shapes=((10**5, 480, 640), (10**6, 480, 640), (10**7, 480, 640), (10**6, 720, 1280)),
        gate_shapes=((10**5, 480, 640), (10**6, 480, 640)),
        tiny_shape=(500, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: 5 * shape[0] + 2 * BINS * shape[1] * shape[2],
        items=lambda shape: shape[0],
        item="event",
        label=lambda shape: f"{shape[0]:.0e} events {shape[2]}x{shape[1]}",
        dtypes=(torch.uint8,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("put_ uint8", lambda: put(torch.uint8)),
            Competitor("bincount", lambda: bincount),
            Competitor("index_put_", lambda: index_put),
            Competitor("np.add.at", lambda: numpy_add_at),
        ),
    ),
)
