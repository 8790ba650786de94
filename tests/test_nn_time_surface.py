"""TimeSurface: one window, a stream, a batch; its place in a model."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from evkernels.events import EventBatch, Events
from evkernels.nn import TimeSurface


def events(count, height=6, width=8, duration=50_000):
    x, y = torch.randint(0, width, (count,)), torch.randint(0, height, (count,))
    return (
        x,
        y,
        torch.randint(0, 2, (count,)),
        torch.randint(0, duration, (count,)).sort().values + 1_600_000_000_000_000,
    )


def tonic(x, y, p, t, dt, tau, height=6, width=8):
    """The published computation, event by event: a slice every `dt`, all of them from one memory of last times."""
    memory = np.full((2, height, width), -np.inf)
    start, surfaces = t[0].item(), []
    for k in range(int((t[-1].item() - start) // dt)):
        in_slice = (t >= start + k * dt) & (t < start + (k + 1) * dt)
        for row in zip(p[in_slice], y[in_slice], x[in_slice], t[in_slice], strict=True):
            memory[tuple(int(value) for value in row[:3])] = int(row[3])
        surfaces.append(np.exp(-(start + (k + 1) * dt - memory) / tau))
    return torch.from_numpy(np.stack(surfaces))


def test_stream_equals_tonic():
    columns = events(500)
    start, dt = columns[3][0].item(), 7000
    expected = tonic(*columns, dt, tau=5000.0)
    module, surface = TimeSurface(6, 8, tau=5000.0), None
    for k, exact in enumerate(expected):
        chosen = (columns[3] >= start + k * dt) & (columns[3] < start + (k + 1) * dt)
        actual, surface = module.step(*(column[chosen] for column in columns), surface, at=start + (k + 1) * dt)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-7)
    assert len(expected) > 3


@pytest.mark.parametrize("tau", [None, 3000.0])
def test_step_returns_what_forward_does(tau):
    module, columns, offsets = TimeSurface(6, 8, tau, polarities=1), events(100), torch.tensor([0, 40, 40, 100])
    actual, last = module.step(*columns, offsets=offsets)
    torch.testing.assert_close(
        actual, module(*columns, offsets=offsets, at=None if tau is None else last.amax((1, 2, 3)))
    )
    assert torch.equal(last, TimeSurface(6, 8, polarities=1)(*columns, offsets=offsets))
    assert (last[1] == -(2**63)).all()
    assert actual.shape == (3, 1, 6, 8)


def test_inside_a_compiled_model():
    model, surface = nn.Conv2d(2, 4, 3), TimeSurface(6, 8, tau=1000.0)

    def run(*columns):
        return model(surface(*columns)[None])

    columns = events(100)
    expected = run(*columns)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*columns), expected)


def test_copies_and_has_no_state():
    module = TimeSurface(6, 8, 10.0, decay="linear")
    assert not module.state_dict()
    columns = events(50)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*columns), module(*columns))
    assert repr(module) == "TimeSurface(height=6, width=8, tau=10.0, polarities=2, decay='linear')"


def test_takes_events_in_every_form():
    module = TimeSurface(6, 8, tau=1000.0)
    columns = events(100)
    x, y, p, t = (column.numpy() for column in columns)
    whole = Events(x.astype(np.uint16), y.astype(np.uint16), t, p.astype(np.uint8), width=8, height=6)
    assert torch.equal(module(whole), module(*columns))
    for surface in module.step(EventBatch.of([whole, whole])):
        assert surface.shape == (2, 2, 6, 8)
