"""time_surface against the ways to keep the last time in PyTorch and NumPy: VGA and 720p, 1e5 to 1e7 events.

int64 is the surface of last times, float32 what an exponential decay leaves of them. Floor: the events are read once
(13 bytes each) and the surface is written once. The events are spread evenly over the sensor, which is the worst case
for caches, and sorted by time, which PyTorch's assignment through indices and NumPy's need to be right; the maxima and
ours do not.
"""

import numpy as np
import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops

NEVER = -(2**63)
TAU = 10_000.0


def cells(x, y, p, height, width):
    return (p.long() * height + y.long()) * width + x.long()


def surface_by(keep):
    """`keep` brings times into the cells of an empty surface."""

    def surface(x, y, t, p, height, width, tau):
        index, size = cells(x, y, p, height, width), 2 * height * width
        if tau is None:
            last = keep(torch.full((size,), NEVER, device=t.device), index, t)
        else:
            # Minus ages in float32: half the memory, and no second look for cells without an event.
            ages = keep(torch.full((size,), -torch.inf, device=t.device), index, (t - t.max()).float())
            last = (ages / tau).exp()
        return last.view(2, height, width)

    return surface


def amax(surface, index, values):
    return surface.scatter_reduce_(0, index, values, "amax")


def assignment(surface, index, values):
    surface[index] = values
    return surface


def numpy_maximum_at(surface, index, values):
    result = surface.cpu().numpy()
    np.maximum.at(result, index.cpu().numpy(), values.cpu().numpy())
    return torch.from_numpy(result).to(surface.device)


def numpy_assignment(surface, index, values):
    result = surface.cpu().numpy()
    result[index.cpu().numpy()] = values.cpu().numpy()
    return torch.from_numpy(result).to(surface.device)


def fused(x, y, t, p, height, width, tau):
    return ops.time_surface(x, y, t, p, height=height, width=width, tau=tau)


def inputs(shape, dtype):
    events, height, width = shape
    generator = np.random.default_rng(0)
    columns = (
        generator.integers(0, width, events).astype(np.uint16),
        generator.integers(0, height, events).astype(np.uint16),
        np.sort(generator.integers(0, 50_000, events)) + 1_600_000_000_000_000,
        generator.integers(0, 2, events).astype(np.uint8),
    )
    return *(torch.from_numpy(column) for column in columns), height, width, TAU if dtype.is_floating_point else None


BENCHMARKS = (
    Benchmark(
        op="time_surface",
        function=fused,
        eager=surface_by(amax),
        inputs=inputs,
        shapes=((10**5, 480, 640), (10**6, 480, 640), (10**7, 480, 640), (10**6, 720, 1280)),
        gate_shapes=((10**6, 480, 640),),
        tiny_shape=(500, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: 13 * shape[0] + 2 * itemsize * shape[1] * shape[2],
        items=lambda shape: shape[0],
        item="event",
        label=lambda shape: f"{shape[0]:.0e} events {shape[2]}x{shape[1]}",
        dtypes=(torch.int64, torch.float32),
        gate_dtypes=(torch.int64, torch.float32),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("assignment", lambda: surface_by(assignment)),
            Competitor("np.maximum.at", lambda: surface_by(numpy_maximum_at)),
            Competitor("np assignment", lambda: surface_by(numpy_assignment)),
        ),
    ),
)
