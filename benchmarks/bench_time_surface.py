"""time_surface against the ways to keep the last time in PyTorch and NumPy, and against dv-processing and evio.

int64 is the surface of last times, float32 what an exponential decay leaves of them. Floor: the events are read once
(13 bytes each) and the surface is written once. The events are sorted by time, which PyTorch's assignment through
indices and NumPy's need to be right; the maxima and ours do not. dv-processing's surface is never cleared and takes
both polarities together, which is less work.

time_surface_in_place is a stream of packets on one surface of both polarities, written in place, as dv-processing's.
Every packet is a call with its checks, half of the time of one of 10,000 events: `EventAccumulator` takes less.
"""

import numpy as np
import torch

from benchmarks import bench_accumulator as stream
from benchmarks.event_streams import Stream, by_window, columns, streams, windows
from benchmarks.registry import Benchmark, Competitor
from evkernels import ops

NEVER = -(2**63)
TAU = 10_000.0


def cells(x, y, p, height, width):
    return (p.long() * height + y.long()) * width + x.long()


def surface_by(keep):
    """`keep` brings times into the cells of an empty surface."""

    @by_window
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


def last_times_only(offsets, tau):
    if offsets is not None or tau is not None:
        raise NotImplementedError("one surface of last times")


def load_dv():
    import dv_processing  # noqa: F401

    return lambda surface, store: surface.accept(store) or torch.empty(0)


def dv_arguments(arguments):
    import dv_processing

    x, y, t, p, offsets, height, width, tau = arguments
    last_times_only(offsets, tau)
    if len(t) > 2e6:
        raise NotImplementedError("its store is filled event by event from Python")
    store = dv_processing.EventStore()
    for event in zip(*(column.tolist() for column in (t, x, y, p.bool())), strict=True):
        store.push_back(*event)
    return dv_processing.TimeSurface((width, height)), store


def load_evio():
    import evio

    def surface(events, size, tau):
        return torch.from_numpy(evio.time_surface(events, tau, size))

    return lambda given: torch.stack([surface(*window) for window in given]) if len(given) > 1 else surface(*given[0])


def evio_arguments(arguments):
    import evio

    x, y, t, p, offsets, height, width, tau = arguments
    if tau is None:
        raise NotImplementedError("it always decays")
    x, y, t, p = (column.cpu().numpy() for column in (x, y, t, p))
    parts = windows(offsets, len(t))
    return ([(evio.from_arrays(x[part], y[part], t[part], p[part]), (width, height), tau) for part in parts],)


def fused(x, y, t, p, offsets, height, width, tau):
    return ops.time_surface(x, y, t, p, height=height, width=width, tau=tau, offsets=offsets)


def in_place(x, y, t, p, size, height, width):
    surface = stream.kept("in place", (height, width), lambda: torch.full((1, height, width), NEVER))
    for part in stream.packets(len(t), size):
        given = x[part], y[part], t[part], p[part]
        ops.time_surface(*given, height=height, width=width, polarities=1, surface=surface, out=surface)
    return surface


def inputs(shape, dtype):
    return *columns(shape), shape.height, shape.width, TAU if dtype.is_floating_point else None


SHAPES = streams()
BENCHMARKS = (
    Benchmark(
        op="time_surface",
        function=fused,
        eager=surface_by(amax),
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[1:2],
        tiny_shape=Stream(500, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: (
            13 * shape.events + 2 * shape.windows * itemsize * shape.height * shape.width
        ),
        items=lambda shape: shape.events,
        item="event",
        label=lambda shape: shape.label,
        dtypes=(torch.int64, torch.float32),
        gate_dtypes=(torch.int64, torch.float32),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(
            Competitor("assignment", lambda: surface_by(assignment)),
            Competitor("np.maximum.at", lambda: surface_by(numpy_maximum_at)),
            Competitor("np assignment", lambda: surface_by(numpy_assignment)),
            Competitor("evio", load_evio, prepare=evio_arguments),
            Competitor("dv-processing", load_dv, prepare=dv_arguments, differs="in place, never cleared"),
        ),
    ),
    Benchmark(
        op="time_surface_in_place",
        function=in_place,
        eager=stream.amax,
        inputs=stream.inputs,
        shapes=stream.SHAPES,
        # Packets so long that the checks of a call do not decide.
        gate_shapes=stream.SHAPES[1:2],
        tiny_shape=(500, 70, 6, 8),
        floor_bytes=lambda shape, itemsize, mode: 13 * shape[0],
        items=lambda shape: shape[0],
        item="event",
        label=stream.label,
        dtypes=(torch.int64,),
        modes=("inference",),
        layouts=("contiguous",),
        compiles=False,
        competitors=(
            Competitor("np assignment", lambda: stream.assignment),
            Competitor("dv-processing", stream.load_dv, prepare=stream.dv_stores, differs="its surface is not read"),
        ),
    ),
)
