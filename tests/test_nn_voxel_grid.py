"""VoxelGrid: the published loaders' arithmetic, batches, its place in a model."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from evkernels.events import EventBatch, Events
from evkernels.nn import VoxelGrid


def events(count, height=6, width=8, duration=50_000):
    x, y = torch.randint(0, width, (count,)), torch.randint(0, height, (count,))
    return x, y, torch.randint(0, 2, (count,)), torch.randint(0, duration, (count,)).sort().values


def e2vid(x, y, pol, time, bins, height, width):
    """The published NumPy computation, step by step."""
    grid = np.zeros(bins * height * width, np.float32)
    x, y, pol, time = (column.numpy() for column in (x, y, pol, time))
    ts = (bins - 1) * (time - time[0]).astype(np.float64) / max(time[-1] - time[0], 1)
    tis = ts.astype(int)
    dts = ts - tis
    value = np.where(pol == 0, -1, pol)
    for shift, share in ((0, 1 - dts), (1, dts)):
        valid = tis + shift < bins
        np.add.at(grid, ((tis + shift) * height * width + y * width + x)[valid], (value * share)[valid])
    return torch.from_numpy(grid.reshape(bins, height, width))


def dsec(x, y, pol, time, channels, height, width):
    """The published computation: eight masked additions, then mean and unbiased deviation of what is not 0."""
    grid = torch.zeros(channels, height, width)
    t_norm = (channels - 1) * (time - time[0]).double() / (time[-1] - time[0])
    x0, y0, t0 = x.floor().int(), y.floor().int(), t_norm.floor().int()
    for xlim in (x0, x0 + 1):
        for ylim in (y0, y0 + 1):
            for tlim in (t0, t0 + 1):
                mask = (xlim < width) & (xlim >= 0) & (ylim < height) & (ylim >= 0) & (tlim < channels)
                share = (1 - (xlim - x).abs()) * (1 - (ylim - y).abs()) * (1 - (tlim - t_norm).abs())
                index = height * width * tlim.long() + width * ylim.long() + xlim.long()
                grid.put_(index[mask], ((2 * pol - 1) * share)[mask].float(), accumulate=True)
    mask = grid != 0
    grid[mask] = (grid[mask] - grid[mask].mean()) / grid[mask].std()
    return grid


@pytest.mark.parametrize("start", [0, 1_600_000_000_000_000])
def test_equals_e2vid(start):
    x, y, pol, time = events(5000)
    expected = e2vid(x, y, pol, time + start, 5, 6, 8)
    module = VoxelGrid(5, 6, 8)
    torch.testing.assert_close(module(x, y, pol, time + start), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == module.get_shape()


def test_equals_dsec():
    x, y, pol, time = events(3000)
    x, y = x + torch.rand(3000) - 0.5, y + torch.rand(3000) - 0.5
    actual = VoxelGrid(5, 6, 8, "dsec", "dsec")(x, y, pol, time)
    torch.testing.assert_close(actual, dsec(x, y, pol, time, 5, 6, 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [None, "e2vid", "dsec", "eseg"])
def test_batch_of_windows(normalize):
    module = VoxelGrid(3, 6, 8, "eseg_split", normalize)
    assert module.get_shape() == (6, 6, 8)
    x, y, pol, time = events(100)
    batch = module(x, y, pol, time, offsets=torch.tensor([0, 40, 40, 100]))
    windows = [module(*(column[a:b] for column in (x, y, pol, time))) for a, b in ((0, 40), (40, 40), (40, 100))]
    assert torch.equal(batch, torch.stack(windows))
    assert batch[1].abs().sum() == 0


def test_learns_weights_inside_a_compiled_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    grid = VoxelGrid(3, 6, 8, normalize="e2vid")

    def run(*columns):
        return model(grid(*columns)[None])

    columns = events(100)
    weight = torch.rand(100, requires_grad=True)
    expected = run(*columns, weight)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(*columns, weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), weight)[0], gradient)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("normalize", ["e2vid", "dsec", "eseg"])
def test_gradient_of_normalization(normalize):
    x, y, pol, time = events(40, 3, 4)
    x, y = x.double() + 0.3, y.double() - 0.4
    weight = torch.rand(40, dtype=torch.float64) + 0.5
    module = VoxelGrid(3, 3, 4, "dsec", normalize)
    inputs = [value.requires_grad_() for value in (x, y, weight)]
    assert torch.autograd.gradcheck(lambda x, y, weight: module(x, y, pol, time, weight), inputs)


@pytest.mark.parametrize("normalize", ["e2vid", "dsec"])
def test_windows_without_deviation_stay_finite(normalize):
    """No event, one event, and equal cells, where E2VID's and DSEC's own code divide by 0 or by NaN."""
    module = VoxelGrid(2, 2, 2, normalize=normalize)
    x, y = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1])
    pol, time = torch.ones(3, dtype=torch.long), torch.tensor([5, 7, 7])
    grid = module(x, y, pol, time, offsets=torch.tensor([0, 0, 1, 3]))
    assert not grid.any()


def test_copies_and_has_no_state():
    module = VoxelGrid(3, 6, 8, "tonic", "dsec")
    assert not module.state_dict()
    columns = events(50)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*columns), module(*columns))
    assert repr(module) == "VoxelGrid(bins=3, height=6, width=8, convention='tonic', normalize='dsec')"


def test_rejects():
    with pytest.raises(ValueError, match='convention must be one of "e2vid"'):
        VoxelGrid(3, 6, 8, "rvt")
    with pytest.raises(ValueError, match='normalize must be "e2vid", "dsec", "eseg" or None'):
        VoxelGrid(3, 6, 8, normalize="minmax")
    with pytest.raises(ValueError, match="bins must be in"):
        VoxelGrid(0, 6, 8)(*events(3))


def test_takes_events_in_every_form():
    module = VoxelGrid(5, 6, 8)
    columns = events(100)
    x, y, p, t = (column.numpy() for column in columns)
    whole = Events(x.astype(np.uint16), y.astype(np.uint16), t, p.astype(np.uint8), width=8, height=6)
    assert torch.equal(module(whole), module(*columns))
    assert torch.equal(module(EventBatch.of([whole, whole])), torch.stack([module(*columns)] * 2))
