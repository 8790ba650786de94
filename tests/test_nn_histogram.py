"""StackedHistogram: RVT's arithmetic where its counters do not wrap, its interface, its place in a model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from evkernels.nn import StackedHistogram


def events(count, height=6, width=8, duration=50_000):
    x, y = torch.randint(0, width, (count,)), torch.randint(0, height, (count,))
    return x, y, torch.randint(0, 2, (count,)), torch.randint(0, duration, (count,)).sort().values


def rvt(x, y, pol, time, bins, height, width, cutoff, dtype):
    """The published computation, step by step: float32 time, counters of `dtype` that wrap, clamp."""
    normalised = (time - time[0]) / max(time[-1] - time[0], 1) * bins
    time_bin = normalised.floor().clamp(max=bins - 1).long()
    index = x.long() + width * (y.long() + height * (time_bin + bins * pol.long()))
    counts = torch.zeros(2 * bins * height * width, dtype=dtype)
    counts.put_(index, torch.ones_like(index, dtype=dtype), accumulate=True)
    return counts.clamp(0, cutoff).to(torch.uint8).view(2 * bins, height, width)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("cutoff", [None, 10, 3, 1000])
@pytest.mark.parametrize("start", [0, 1_600_000_000_000_000])
def test_equals_rvt(dtype, cutoff, start):
    x, y, pol, time = events(5000)
    module = StackedHistogram(10, 6, 8, cutoff, fastmode=dtype == torch.uint8)
    expected = rvt(x, y, pol, time + start, 10, 6, 8, min(cutoff or 255, 255), dtype)
    assert torch.equal(module.construct(x, y, pol, time + start), expected)
    assert torch.equal(module(x, y, pol, time + start), expected)
    assert expected.shape == module.get_shape()
    assert expected.dtype == module.get_torch_dtype()


@pytest.mark.parametrize("fastmode", [True, False])
def test_counters_stop_where_rvt_wraps(fastmode):
    columns = [torch.zeros(300, dtype=torch.int64)] * 3 + [torch.arange(300)]
    assert StackedHistogram(1, 1, 1, fastmode=fastmode)(*columns).flatten().tolist() == [255, 0]
    assert rvt(*columns, 1, 1, 1, 255, torch.uint8).flatten().tolist() == [44, 0]


def test_batch_of_windows():
    module = StackedHistogram(3, 6, 8)
    x, y, pol, time = events(100)
    batch = module(x, y, pol, time, offsets=torch.tensor([0, 40, 40, 100]))
    windows = [module(*(column[a:b] for column in (x, y, pol, time))) for a, b in ((0, 40), (40, 40), (40, 100))]
    assert torch.equal(batch, torch.stack(windows))
    assert batch[1].sum() == 0


def test_inside_a_compiled_model():
    model = nn.Sequential(nn.Conv2d(6, 4, 3))
    histogram = StackedHistogram(3, 6, 8)

    def run(*columns):
        return model(histogram(*columns).float()[None])

    columns = events(100)
    expected = run(*columns)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*columns), expected)


def test_copies_and_has_no_state():
    module = StackedHistogram(3, 6, 8, 10)
    assert not module.state_dict()
    columns = events(50)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(*columns), module(*columns))
    assert repr(module) == "StackedHistogram(bins=3, height=6, width=8, count_cutoff=10)"


def test_rejects():
    with pytest.raises(ValueError, match="count_cutoff must be at least 1, got 0"):
        StackedHistogram(3, 6, 8, 0)
    with pytest.raises(ValueError, match="bins must be in"):
        StackedHistogram(0, 6, 8)(*events(3))
    with pytest.raises(TypeError, match="t must be of dtype"):
        StackedHistogram(3, 6, 8)(*events(3)[:3], torch.zeros(3))
