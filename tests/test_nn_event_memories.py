"""Averaged time surfaces (HATS) and TORE volumes against their definitions, event by event, and against tonic."""

import math

import numpy as np
import pytest
import torch
from event_histograms import events

from evkernels.events import EventBatch
from evkernels.nn import AveragedTimeSurface, TimeOrderedRecentEvents

HEIGHT, WIDTH = 7, 9


def awkward_events(count=300, seed=0, ordered=True):
    """Many events at equal times, some outside the sensor, some of no polarity, near 1.6e15 us."""
    x, y, t, p = events(count, HEIGHT + 1, WIDTH + 1, duration=90, start=1_600_000_000_000_000, seed=seed)
    p = torch.where(torch.arange(count) % 31 == 7, 2, p.to(torch.int8))
    order = torch.arange(count) if ordered else torch.randperm(count)
    return x[order] - 1 * (x[order] == WIDTH) * (WIDTH + 3), y[order], t[order], p[order]


def in_range(x, y, p):
    return 0 <= x < WIDTH and 0 <= y < HEIGHT and -1 <= p <= 1


def rows_by_time(x, y, t, p):
    order = sorted(range(len(t)), key=lambda k: int(t[k]))
    return [(int(x[k]), int(y[k]), int(t[k]), int(p[k])) for k in order]


def tore(x, y, t, p, depth, at, min_time, max_time):
    ages = torch.full((2, depth, HEIGHT, WIDTH), float(max_time), dtype=torch.float64)
    for row, column, time, polarity in rows_by_time(x, y, t, p):
        if in_range(row, column, polarity):
            memory = ages[0 if polarity > 0 else 1, :, column, row]
            ages[0 if polarity > 0 else 1, :, column, row] = torch.cat([memory.new_tensor([at - time]), memory[:-1]])
    ages = ages.clamp(0, max_time)
    return ((ages + 1).log() - math.log(min_time + 1)).clamp(min=0).flatten(0, 1)


def hats(x, y, t, p, cell, size, time_window, tau):
    rows, columns, reach = -(-HEIGHT // cell), -(-WIDTH // cell), size // 2
    surfaces = torch.zeros(rows * columns, 2, size, size, dtype=torch.float64)
    memories, counts = {}, torch.zeros(rows * columns, 2, 1, 1)
    for own_x, own_y, own_t, own_p in rows_by_time(x, y, t, p):
        if not in_range(own_x, own_y, own_p):
            continue
        key = own_y // cell * columns + own_x // cell, int(own_p > 0)
        counts[key] += 1
        surfaces[key][reach, reach] += 1
        memory = memories.setdefault(key, [])
        for other_x, other_y, other_t in memory:
            dx, dy = other_x - own_x + reach, other_y - own_y + reach
            if 0 <= dx < size and 0 <= dy < size and other_t >= own_t - time_window:
                surfaces[key][dy, dx] += math.exp(-(own_t - other_t) / tau)
        memory.append((own_x, own_y, own_t))
    return surfaces / counts.clamp(min=1)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("ordered", [True, False])
def test_tore(backend, depth, ordered):
    columns = awkward_events(80 if backend.is_slow else 400, ordered=ordered)
    volume = TimeOrderedRecentEvents(HEIGHT, WIDTH, events=depth, min_time=3, max_time=40)
    x, y, t, p = (column.to(backend.device) for column in columns)
    actual = volume(x, y, p, t).cpu()
    expected = tore(*columns, depth, int(columns[2].max()), 3, 40)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)
    at = int(columns[2].min()) + 50
    actual = volume(x, y, p, t, at=at).cpu()
    torch.testing.assert_close(actual, tore(*columns, depth, at, 3, 40).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("cell", "size", "time_window"), [(3, 3, 30), (4, 1, 10**6), (20, 5, 0)])
def test_averaged_time_surface(cell, size, time_window, ordered):
    columns = awkward_events(ordered=ordered)
    module = AveragedTimeSurface(HEIGHT, WIDTH, cell, size, time_window, tau=25.0)
    actual = module(*columns[:2], columns[3], columns[2])
    expected = hats(*columns, cell, size, time_window, 25.0)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)
    assert actual.shape == (module.grid[0] * module.grid[1], 2, size, size)


def test_averaged_time_surface_is_tonics():
    functional = pytest.importorskip("tonic.functional", reason="tonic is not installed")
    x, y, t, p = events(400, HEIGHT, WIDTH, duration=3000)
    table = np.zeros(400, dtype=[("x", "<i4"), ("y", "<i4"), ("t", "<i8"), ("p", "<i4")])
    for name, column in zip("xytp", (x, y, t, p), strict=True):
        table[name] = column.numpy()
    expected = functional.to_averaged_timesurface_numpy(table, (WIDTH, HEIGHT, 2), 4, 3, 500, 700.0, "exp")
    actual = AveragedTimeSurface(HEIGHT, WIDTH, 4, 3, 500, 700.0)(table)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [TimeOrderedRecentEvents(HEIGHT, WIDTH), AveragedTimeSurface(HEIGHT, WIDTH, 4, 3)])
def test_batch_is_its_windows(module):
    """Unsorted windows, an empty one, one event."""
    x, y, t, p = awkward_events(ordered=False)
    offsets = torch.tensor([0, 120, 120, 121, 300])
    batch = module(x, y, p, t, offsets)
    for window, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if begin < end:
            alone = module(x[begin:end], y[begin:end], p[begin:end], t[begin:end])
            torch.testing.assert_close(batch[window], alone, rtol=1e-6, atol=1e-6)
    assert batch[1].unique().numel() == 1
    whole = EventBatch(x, y, t, p, offsets)
    assert torch.equal(module(whole), batch)
    assert module(x[:0], y[:0], p[:0], t[:0]).shape == batch.shape[1:]
    assert module(x[:0], y[:0], p[:0], t[:0], torch.tensor([0])).shape == (0, *batch.shape[1:])


def test_many_pairs():
    """3,000 events of one pixel are 4.5 million pairs, whose sum is known in closed form."""
    count = 3000
    zeros = torch.zeros(count, dtype=torch.int16)
    surface = AveragedTimeSurface(1, 1, 1, 1, time_window=count, tau=1e12)(zeros, zeros, zeros, torch.arange(count))
    assert surface.flatten().tolist() == pytest.approx([1 + (count - 1) / 2, 0])


@pytest.mark.parametrize("tau", [1e-3, 2.0, 1e9])
def test_long_recordings_with_short_time_constants(tau):
    """Ages of up to 10**15 time constants, near 1.6e15 us, and times that repeat: nothing overflows or is NaN."""
    generator = torch.Generator().manual_seed(0)
    x, y, p = (torch.randint(0, limit, (400,), generator=generator) for limit in (4, 3, 2))
    t = 1_600_000_000_000_000 + torch.randint(0, 40, (400,), generator=generator).cumsum(0) ** 3 // 100_000
    actual = AveragedTimeSurface(HEIGHT, WIDTH, 3, 3, time_window=10**7, tau=tau)(x, y, p, t)
    expected = hats(x, y, t, p, 3, 3, 10**7, tau)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeOrderedRecentEvents(3, 3, events=0), "events must be at least 1"),
        (lambda: TimeOrderedRecentEvents(3, 3, min_time=5, max_time=5), "min_time < max_time"),
        (lambda: AveragedTimeSurface(3, 3, 4, 2), "surface_size must be odd and at most cell_size = 4, got 2"),
        (lambda: AveragedTimeSurface(3, 3, 4, 5), "surface_size must be odd"),
        (lambda: AveragedTimeSurface(3, 3, tau=0), "tau positive"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_times_that_do_not_fit():
    t = torch.tensor([0, 2**62])
    zeros = torch.zeros(2, dtype=torch.int16)
    with pytest.raises(ValueError, match="windows times duration"):
        AveragedTimeSurface(30, 30)(zeros, zeros, zeros, t, torch.tensor([0, 1, 2]))
    alone = AveragedTimeSurface(1, 1, 1, 1)(zeros, zeros, zeros, t)
    assert alone.flatten().tolist() == [1, 0]
