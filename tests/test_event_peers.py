"""The conventions of other packages against those packages themselves, where they are installed."""

import numpy as np
import pytest
import torch

from evkernels import ops
from evkernels.nn import BinaRep, TimeSurface

HEIGHT, WIDTH, BINS = 11, 13, 5


def columns(count=2000, seed=0):
    """Sorted by time; the last event is the only one of its time, because tonic loses what is at the end."""
    generator = np.random.default_rng(seed)
    x, y = (generator.integers(0, size, count) for size in (WIDTH, HEIGHT))
    t = np.sort(generator.integers(0, 20_000, count))
    t[0], t[-1] = 0, 20_000
    return x, y, t, generator.integers(0, 2, count)


def tensors():
    return tuple(torch.from_numpy(column) for column in columns())


def structured():
    x, y, t, p = columns()
    table = np.empty(len(x), dtype=[("x", "<i8"), ("y", "<i8"), ("t", "<i8"), ("p", "<i8")])
    table["x"], table["y"], table["t"], table["p"] = x, y, t, p
    return table


def test_tonic_voxel_grid():
    functional = pytest.importorskip("tonic.functional", reason="tonic is not installed")
    expected = functional.to_voxel_grid_numpy(structured(), (WIDTH, HEIGHT, 2), BINS)[:, 0]
    actual = ops.voxel_grid(*tensors(), bins=BINS, height=HEIGHT, width=WIDTH, convention="tonic")
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_tonic_frame_is_the_count_image():
    functional = pytest.importorskip("tonic.functional", reason="tonic is not installed")
    expected = functional.to_frame_numpy(structured(), (WIDTH, HEIGHT, 2), n_event_bins=1)[0]
    actual = ops.event_histogram(*tensors(), bins=1, height=HEIGHT, width=WIDTH, dtype=torch.int16)
    assert torch.equal(actual, torch.from_numpy(expected))


def test_tonic_time_surfaces():
    """Its surface goes on from slice to slice, each without its end; the last event is in none."""
    functional = pytest.importorskip("tonic.functional", reason="tonic is not installed")
    expected = functional.to_timesurface_numpy(structured(), (WIDTH, HEIGHT, 2), dt=5000, tau=3000.0)
    x, y, t, p = tensors()
    assert len(expected) == 4
    for number, surface in enumerate(expected, start=1):
        before = t < 5000 * number
        columns = x[before], y[before], p[before], t[before]
        actual = TimeSurface(HEIGHT, WIDTH, tau=3000.0)(*columns, at=5000 * number)
        torch.testing.assert_close(actual, torch.from_numpy(surface).float(), rtol=1e-6, atol=1e-7)


def test_tonic_bina_rep():
    functional = pytest.importorskip("tonic.functional", reason="tonic is not installed")
    x, y, t, p = (column[::7] for column in tensors())
    counts = ops.event_histogram(x, y, t, p, bins=2 * 8, height=HEIGHT, width=WIDTH)
    frames = counts.view(2, 2 * 8, HEIGHT, WIDTH).transpose(0, 1).numpy()
    expected = functional.to_bina_rep_numpy(frames, n_frames=2, n_bits=8)
    actual = BinaRep(8, HEIGHT, WIDTH, frames=2)(x, y, p, t)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-6, atol=0)


def test_evio_voxel_grid_is_e2vids():
    evio = pytest.importorskip("evio", reason="evio is not installed")
    expected = evio.voxel_grid(evio.from_arrays(*columns()), BINS, (WIDTH, HEIGHT))
    actual = ops.voxel_grid(*tensors(), bins=BINS, height=HEIGHT, width=WIDTH)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_evio_time_surface():
    evio = pytest.importorskip("evio", reason="evio is not installed")
    expected = evio.time_surface(evio.from_arrays(*columns()), 3000.0, (WIDTH, HEIGHT))
    x, y, t, p = tensors()
    actual = TimeSurface(HEIGHT, WIDTH, tau=3000.0)(x, y, p, t)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_e2vids_own_voxel_grid():
    """As evutils ships it."""
    path = "evutils.vis.reconstructor.rpg_e2vid.utils.inference_utils"
    published = pytest.importorskip(path, reason="evutils is not installed")
    x, y, t, p = columns()
    events = np.stack([t, x, y, p], axis=1).astype(np.float64)
    expected = published.events_to_voxel_grid_pytorch(events, BINS, WIDTH, HEIGHT, torch.device("cpu"))
    actual = ops.voxel_grid(*tensors(), bins=BINS, height=HEIGHT, width=WIDTH)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_openeb_event_volume():
    path = "metavision_core_ml.preprocessing.event_to_tensor_torch"
    published = pytest.importorskip(path, reason="OpenEB is not installed")
    x, y, t, p = tensors()
    events = torch.stack([0 * x, x, y, 2 * p - 1, t], dim=1)
    window = torch.tensor([0.0]), torch.tensor([20_000.0])
    expected = published.event_volume(events, 1, HEIGHT, WIDTH, *window, BINS)[0]
    actual = ops.voxel_grid(x, y, t, p, bins=BINS, height=HEIGHT, width=WIDTH, convention="openeb")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_eseg_voxel_grid():
    published = pytest.importorskip("eseg.utils.functions", reason="eseg is not installed")
    x, y, t, p = tensors()
    p = 2 * p - 1
    events = torch.stack([t.double() / 20_000, x.double(), y.double(), p.double()], dim=1)
    expected = published.eventstovoxel(events[None], HEIGHT, WIDTH, BINS)[0]
    actual = ops.voxel_grid(x, y, t, p, bins=BINS, height=HEIGHT, width=WIDTH, convention="eseg")
    assert torch.equal(actual, expected)


def test_eventcv_voxel_grid_is_e2vids():
    """Its times are shares of a fixed window that ends with the last event: here of all of them."""
    eventcv = pytest.importorskip("eventcv", reason="eventcv is not installed")
    stream = eventcv.from_numpy(np.stack(columns(), axis=1), sensor_size=(WIDTH, HEIGHT), time_unit="us")
    expected = torch.from_numpy(stream.voxel(bins=BINS, window_us=20_000).numpy())
    actual = ops.voxel_grid(*tensors(), bins=BINS, height=HEIGHT, width=WIDTH)
    torch.testing.assert_close(actual, expected.view(actual.shape), rtol=0, atol=1e-5)


def test_evlib_stacked_histogram():
    """Equal to ours where its window, which divides one microsecond more, has the same borders of bins."""
    compiled = pytest.importorskip("evlib", reason="evlib is not installed").representations_rs
    x, y, t, p = columns()
    keep = t < 20_000
    x, y, t, p = (column[keep] for column in (x, y, t, p))
    t[-1] = 19_999
    size = np.arange(HEIGHT), np.arange(WIDTH), HEIGHT, WIDTH
    expected = compiled.stacked_histogram_dense(t, x, y, p, np.array([19_999]), 20_000, BINS, 3, *size)[0]
    # One more event, out of range, marks the window's end where evlib has it.
    x, y, t, p = (np.append(column, value) for column, value in ((x, -1), (y, 0), (t, 20_000), (p, 0)))
    given = {"bins": BINS, "height": HEIGHT, "width": WIDTH, "count_cutoff": 3}
    actual = ops.event_histogram(*(torch.from_numpy(column) for column in (x, y, t, p)), **given)
    assert torch.equal(actual, torch.from_numpy(expected))
