"""Images made of the fused ops, each against its definition event by event."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from evkernels.events import EventBatch, Events
from evkernels.nn import BinaRep, EventCountImage, EventImage, MixedDensityEventStack

US_2020 = 1_600_000_000_000_000
HEIGHT, WIDTH = 6, 8


def events(count, duration=50_000, seed=0):
    """In order of time, which never stands still, so that the last event of a pixel is one."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, size, (count,), generator=generator) for size in (WIDTH, HEIGHT))
    t = torch.randperm(duration, generator=generator)[:count].sort().values + US_2020
    return x, y, torch.randint(0, 2, (count,), generator=generator), t


def event_image(x, y, p, t):
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for a, b, on in zip(x, y, p, strict=True):
        image[b, a] = (255, 0, 0) if on else (0, 0, 255)
    return torch.from_numpy(image)


def event_count_image(x, y, p, t):
    image = np.zeros((4, HEIGHT, WIDTH))
    for a, b, time, on in zip(x, y, t, p, strict=True):
        image[0 if on else 1, b, a] += 1
        image[2 if on else 3, b, a] = (time - t[0]) / max(t[-1] - t[0], 1)
    return torch.from_numpy(image).float()


def bina_rep(x, y, p, t, bits=3, frames=2):
    numbers = np.zeros((frames, 2, HEIGHT, WIDTH), np.int64)
    bins = bits * frames
    for a, b, time, on in zip(x, y, t, p, strict=True):
        k = min(int((time - t[0]) / max(t[-1] - t[0], 1) * bins), bins - 1)
        numbers[k // bits, on, b, a] |= 1 << (bits - 1 - k % bits)
    return torch.from_numpy(numbers / (2**bits - 1)).float()


def mixed_density(x, y, p, t, bins=5, cutoff=127, dtype=torch.int32):
    """The published computation; its counters are int8 and wrap."""
    share = ((t - t[0]) / max(t[-1] - t[0], 1)).clamp(1e-6, 1 - 1e-6)
    time_bin = (bins - torch.log(share) / math.log(1 / 2)).clamp(min=0).floor().long()
    stack = torch.zeros(bins * HEIGHT * WIDTH, dtype=dtype)
    stack.put_(x + WIDTH * (y + HEIGHT * time_bin), (2 * p - 1).to(dtype), accumulate=True)
    stack = stack.view(bins, HEIGHT, WIDTH)
    for k in reversed(range(bins)):
        stack[k] = stack[: k + 1].sum(dim=0)
    return stack.clamp(-cutoff, cutoff).to(torch.int8)


CASES = {
    "EventImage": (EventImage(HEIGHT, WIDTH), event_image),
    "EventCountImage": (EventCountImage(HEIGHT, WIDTH), event_count_image),
    "BinaRep": (BinaRep(3, HEIGHT, WIDTH, frames=2), bina_rep),
    "MixedDensityEventStack": (MixedDensityEventStack(5, HEIGHT, WIDTH), mixed_density),
}
each = pytest.mark.parametrize("name", CASES)


@each
@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_equals_its_definition(backend, name, count):
    module, definition = CASES[name]
    columns = events(count)
    expected = definition(*columns)
    module = module.to(backend.device)
    for order in (torch.arange(count), torch.randperm(count)):
        actual = module(*(column[order].to(backend.device) for column in columns)).cpu()
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    module.to("cpu")


@each
def test_batch_equals_its_windows(name):
    module, _ = CASES[name]
    columns, bounds = events(200), [0, 0, 70, 71, 200]
    batch = module(*columns, offsets=torch.tensor(bounds))
    for window, (a, b) in enumerate(pairwise(bounds)):
        assert torch.equal(batch[window], module(*(column[a:b] for column in columns)))
    assert torch.equal(batch[0], module(*events(0)))


@each
def test_drops_events_out_of_range(name):
    module, definition = CASES[name]
    x, y, p, t = events(100)
    expected = definition(x, y, p, t)
    at = torch.arange(50).repeat_interleave(2)[:50] + 20
    extra = [torch.cat([column[:50], column[at], column[50:]]) for column in (x, y, p, t)]
    extra[0][50:100:2] = WIDTH
    extra[1][51:100:2] = -1
    torch.testing.assert_close(module(*extra), expected, rtol=1e-6, atol=1e-7)


@each
def test_compiles_copies_and_has_no_state(name):
    module, _ = CASES[name]
    columns = events(100)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*columns), module(*columns))
    assert not module.state_dict()
    assert torch.equal(pickle.loads(pickle.dumps(module))(*columns), module(*columns))
    assert f"height={HEIGHT}, width={WIDTH}" in repr(module)


def test_of_two_events_at_one_time_the_on_event_wins():
    zeros = torch.zeros(2, dtype=torch.int64)
    for p in ([0, 1], [1, 0]):
        assert EventImage(1, 1, on=(9, 8, 7))(zeros, zeros, torch.tensor(p), zeros).flatten().tolist() == [9, 8, 7]


def test_counts_beyond_one_byte():
    zeros = torch.zeros(70_000, dtype=torch.int64)
    assert EventCountImage(1, 1)(zeros, zeros, zeros + 1, zeros).flatten().tolist() == [70_000, 0, 0, 0]


def test_mixed_density_golden_value():
    """Fifty events by formula, counted by RVT's code; the weights are those of its authors' other golden values."""
    k = torch.arange(50)
    module = MixedDensityEventStack(4, 4, 6)
    stack = module.construct((7 * k) % 6, (5 * k) % 4, (k * k % 3 == 1).long(), 100 * k * k).double().flatten()
    assert module.get_shape() == (4, 4, 6)
    assert module.get_torch_dtype() == torch.int8
    assert [stack[1], stack[48], stack[-1]] == [0, -3, 4]
    assert stack.sum() == 40
    weighted = (stack * torch.cos(0.1 * torch.arange(96, dtype=torch.float64))).sum()
    assert abs(weighted.item() + 1.981353) < 1e-6


def test_mixed_density_stops_where_rvt_wraps():
    x = y = torch.zeros(300, dtype=torch.int64)
    t, p = torch.arange(300), x + 1
    assert mixed_density(x, y, p, t, dtype=torch.int8)[-1, 0, 0] == 300 - 256
    assert MixedDensityEventStack(5, HEIGHT, WIDTH)(x, y, p, t)[-1, 0, 0] == 127
    assert MixedDensityEventStack(5, HEIGHT, WIDTH, 32)(x, y, p * 0, t)[-1, 0, 0] == -32
    assert MixedDensityEventStack(40, HEIGHT, WIDTH)(x, y, p, t)[-1, 0, 0] == 127


def test_rejects():
    with pytest.raises(ValueError, match=r"bits must be in \[1, 24\], got 25"):
        BinaRep(25, 4, 4)
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        MixedDensityEventStack(0, 4, 4)


@each
def test_takes_events_in_every_form(name):
    module, _ = CASES[name]
    x, y, p, t = (column.numpy() for column in events(100))
    whole = Events(x.astype(np.uint16), y.astype(np.uint16), t, p.astype(np.uint8), width=WIDTH, height=HEIGHT)
    expected = module(*events(100))
    assert torch.equal(module(whole), expected)
    assert torch.equal(module(EventBatch.of([whole, whole])), torch.stack([expected, expected]))
    with pytest.raises(TypeError, match="got no p, t"):
        module(*events(100)[:2])
