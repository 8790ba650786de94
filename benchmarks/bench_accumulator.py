"""EventAccumulator: a stream in packets to the surface of last times, kept from packet to packet.

Ours and plain PyTorch are asked for the surface once at the end; dv-processing's surface cannot be read but as a
picture of 8 bits, so it is not asked. Events are spread evenly over the sensor, which is the worst case for caches.
Floor: every event is read once (13 bytes).
"""

import numpy as np
import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels.events import EventAccumulator

NEVER = -(2**63)
_kept = {}


def kept(name, shape, make):
    """What a way to compute keeps from packet to packet, and from call to call: maxima do not change by that."""
    if (name, shape) not in _kept:
        _kept[name, shape] = make()
    return _kept[name, shape]


def packets(count, size):
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def fused(x, y, t, p, size, height, width):
    accumulator = kept("ours", (height, width), lambda: EventAccumulator(height, width, polarities=1, counts=False))
    columns = [column.numpy() for column in (x, y, t, p)]
    for part in packets(len(t), size):
        accumulator.push(*(column[part] for column in columns))
    return torch.from_numpy(accumulator.snapshot().times)


def amax(x, y, t, p, size, height, width):
    surface = kept("eager", (height, width), lambda: torch.full((height * width,), NEVER))
    for part in packets(len(t), size):
        surface.scatter_reduce_(0, y[part].long() * width + x[part].long(), t[part], "amax")
    return surface.view(1, height, width).clone()


def assignment(x, y, t, p, size, height, width):
    surface = kept("np", (height, width), lambda: np.full((height, width), NEVER))
    x, y, t = (column.numpy() for column in (x, y, t))
    for part in packets(len(t), size):
        surface[y[part], x[part]] = t[part]
    return torch.from_numpy(surface[None].copy())


def load_dv():
    import dv_processing  # noqa: F401

    def accept(surface, stores):
        for store in stores:
            surface.accept(store)
        return torch.zeros(0)

    return accept


def dv_stores(arguments):
    import dv_processing as dv

    x, y, t, p, size, height, width = arguments
    rows = torch.stack([column.long() for column in (t, x, y, p)], dim=1).tolist()
    stores = []
    for part in packets(len(rows), size):
        stores.append(dv.EventStore())
        for time, column, row, polarity in rows[part]:
            stores[-1].push_back(time, column, row, bool(polarity))
    return dv.TimeSurface(height, width), stores


def inputs(shape, dtype):
    events, size, height, width = shape
    generator = np.random.default_rng(0)
    columns = (
        generator.integers(0, width, events).astype(np.int16),
        generator.integers(0, height, events).astype(np.int16),
        np.sort(generator.integers(0, 50_000, events)) + 1_600_000_000_000_000,
        generator.integers(0, 2, events).astype(np.uint8),
    )
    return *(torch.from_numpy(column) for column in columns), size, height, width


def label(shape):
    return f"{shape[0]:.0e} events by {shape[1]:.0e} {shape[3]}x{shape[2]}"


SHAPES = ((10**6, 10**4, 480, 640), (10**6, 10**5, 480, 640), (10**6, 10**4, 720, 1280))
BENCHMARKS = (
    Benchmark(
        op="event_accumulator",
        function=fused,
        eager=amax,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:1],
        tiny_shape=(500, 70, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: 13 * shape[0],
        items=lambda shape: shape[0],
        item="event",
        label=label,
        dtypes=(torch.int64,),
        modes=("inference",),
        layouts=("contiguous",),
        compiles=False,
        competitors=(
            Competitor("np assignment", lambda: assignment),
            Competitor("dv-processing", load_dv, prepare=dv_stores, differs="its surface is not read"),
        ),
    ),
)
