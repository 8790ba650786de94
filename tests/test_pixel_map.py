"""Maps of the sensor's pixels and results in the caller's memory, for the three ops that take events."""

import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch
from contract import to_device
from torch.utils.data import DataLoader, IterableDataset

from evkernels import nn, ops, reference
from evkernels.events import Events, crop, downsample, drop_pixels, flip_horizontal, hot_pixels, pixel_map, rectify

HEIGHT, WIDTH, BINS = 12, 17, 3
GENERATOR = np.random.default_rng(0)
MASK = GENERATOR.random((HEIGHT, WIDTH)) < 0.2
# A lens that magnifies and shifts, so that pixels leave the image on every side.
PLACES = np.stack(np.meshgrid(np.arange(WIDTH) * 1.3 - 2.2, np.arange(HEIGHT) * 1.4 - 2.6), axis=-1)
CHANGES = {
    "same": lambda events: events,
    "flip": flip_horizontal,
    "crop": partial(crop, left=3, top=2, width=9, height=5),
    "downsample": partial(downsample, factor=3),
    "mask": partial(drop_pixels, pixels=MASK),
    "rectify": partial(rectify, places=PLACES),
    "all": lambda events: flip_horizontal(downsample(crop(drop_pixels(rectify(events, PLACES), MASK), 1, 1, 13, 9), 2)),
}
OPS = {
    "event_histogram": partial(ops.event_histogram, bins=BINS),
    "event_histogram float32": partial(ops.event_histogram, bins=BINS, dtype=torch.float32),
    "voxel_grid": partial(ops.voxel_grid, bins=BINS),
    "voxel_grid eseg_split": partial(ops.voxel_grid, bins=BINS, convention="eseg_split"),
    "time_surface": ops.time_surface,
    "time_surface decayed": partial(ops.time_surface, tau=700.0),
}


def events(count, ordered=True, seed=1):
    """The first and the last event lie where no change of CHANGES drops them, so that all windows keep their times."""
    generator = np.random.default_rng(seed)
    x = generator.integers(0, WIDTH, count).astype(np.int16)
    y = generator.integers(0, HEIGHT, count).astype(np.int16)
    kept = pixel_map(CHANGES["all"], WIDTH, HEIGHT).cells.numpy()
    kept_y, kept_x = ((kept >= 0) & ~MASK).nonzero()
    inside = (kept_x >= 3) & (kept_x < 12) & (kept_y >= 2) & (kept_y < 7)
    x[[0, -1]], y[[0, -1]] = kept_x[inside][0], kept_y[inside][0]
    t = np.sort(generator.integers(1, 4999, count)) + 1_600_000_000_000_000
    t[0], t[-1] = 1_600_000_000_000_000, 1_600_000_000_005_000
    order = np.arange(count) if ordered else generator.permutation(count)
    return Events(x[order], y[order], t[order], generator.integers(0, 2, count).astype(np.uint8), WIDTH, HEIGHT)


def columns(recording, device="cpu"):
    return [torch.from_numpy(getattr(recording, name)).to(device) for name in "xytp"]


def assert_equal_or_close(actual, expected):
    """Integers are equal; floats are those of the same sums in the same order, but for how a kernel decays."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("change", "ordered"), [*((change, True) for change in CHANGES), ("all", False)])
def test_map_is_the_change_of_the_events(backend, name, change, ordered):
    recording = events(150 if backend.is_slow else 1500, ordered)
    cells, height, width = pixel_map(CHANGES[change], WIDTH, HEIGHT)
    given = {"height": height, "width": width}
    changed = CHANGES[change](recording)
    assert (changed.height, changed.width) == (height, width)
    expected = OPS[name](*columns(changed, backend.device), **given)
    mapped = OPS[name](*columns(recording, backend.device), pixel_map=cells.to(backend.device), **given)
    assert_equal_or_close(mapped, expected)
    assert mapped.any()


@pytest.mark.parametrize("name", OPS)
def test_batches_through_a_map_into_out(backend, name):
    """Windows of a batch, an empty one among them, into memory that holds something else before."""
    recording = columns(events(300 if backend.is_slow else 1500), backend.device)
    cells, height, width = pixel_map(CHANGES["all"], WIDTH, HEIGHT)
    offsets = torch.tensor([0, 100, 100, 150, len(recording[0])], device=backend.device)
    given = {"height": height, "width": width, "pixel_map": cells.to(backend.device)}
    batch = OPS[name](*recording, offsets=offsets, **given)
    for window, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if end > begin:
            alone = OPS[name](*(column[begin:end] for column in recording), **given)
            assert torch.equal(batch[window], alone)
    out = torch.full_like(batch, 7)
    version = out._version
    assert OPS[name](*recording, offsets=offsets, out=out, **given) is out
    assert torch.equal(out, batch)
    assert out._version > version
    plain = OPS[name](*recording, height=HEIGHT, width=WIDTH)
    assert torch.equal(OPS[name](*recording, height=HEIGHT, width=WIDTH, out=torch.full_like(plain, 7)), plain)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64])
def test_any_table_and_any_event_is_safe(backend, dtype):
    """Entries and coordinates far outside: left out or out of range, never an invalid access; both are told apart."""
    extremes = [torch.iinfo(dtype).min, torch.iinfo(dtype).max, 0, 1, 2, 3]
    x, y = torch.tensor(extremes, dtype=dtype).repeat(6), torch.tensor(extremes).repeat_interleave(6).to(dtype)
    t, p = torch.arange(36), torch.arange(36) % 4 - 1
    table = torch.tensor([[0, -1, 5], [6, 2**31 - 1, 3], [-(2**31), 2, 1], [4, 4, 4]], dtype=torch.int32)
    x, y, t, p, table = to_device((x, y, t, p, table), backend.device)
    inside = (x.long() >= 0) & (x.long() < 3) & (y.long() >= 0) & (y.long() < 4) & (p <= 1)
    cell = table[y.long().clamp(0, 3), x.long().clamp(0, 2)]
    kept = int((inside & (cell >= 0) & (cell < 6)).sum())
    given = {"bins": 2, "height": 2, "width": 3, "pixel_map": table}
    assert ops.event_histogram(x, y, t, p, **given).sum() == kept
    assert ops.voxel_grid(x, y, t, p, convention="eseg_split", **given).sum() == kept
    message = f"{36 - int(inside.sum())} of 36 events are out of range.*width = 3.*height = 4"
    for op in (ops.event_histogram, ops.voxel_grid):
        with pytest.raises(ValueError, match=message):
            op(x, y, t, p, out_of_range="raise", **given)
    valid = [column[inside] for column in (x.long(), y.long(), t, p)]
    assert ops.event_histogram(*valid, out_of_range="raise", **given).sum() == kept


def test_places_between_pixels(backend):
    """DSEC's rectify_map: what floating coordinates give; NaN leaves a pixel out."""
    recording = columns(events(300), backend.device)
    places = torch.from_numpy(PLACES).float()
    places[4, 5] = torch.nan
    given = {"bins": BINS, "height": HEIGHT, "width": WIDTH, "convention": "dsec"}
    mapped = ops.voxel_grid(*recording, pixel_map=places.to(backend.device), **given)
    x, y, t, p = (column.cpu() for column in recording)
    x, y = places[y.long(), x.long()].unbind(-1)
    expected = reference.voxel_grid(x.nan_to_num(-9), y.nan_to_num(-9), t, p, **given)
    torch.testing.assert_close(mapped.cpu(), expected, rtol=1e-5, atol=1e-5)
    none_is_out = {"out_of_range": "raise", "pixel_map": places.to(backend.device)}
    assert torch.equal(ops.voxel_grid(*recording, **none_is_out, **given), mapped)


def test_gradients_through_a_map(backend):
    x, y, t, p = columns(events(60), backend.device)
    cells, height, width = pixel_map(CHANGES["all"], WIDTH, HEIGHT)
    time = (t - t[0]).double().requires_grad_()
    weight = torch.rand(60, dtype=torch.float64, device=backend.device, requires_grad=True)
    tables = {"e2vid": cells, "dsec": torch.from_numpy(PLACES).float()}
    for convention, table in tables.items():
        given = {"bins": 3, "height": height, "width": width, "convention": convention}
        given["pixel_map"] = table.to(backend.device)

        def grid(time, weight, given=given):
            return ops.voxel_grid(x, y, time, p, weight=weight, **given)

        gradient = torch.autograd.grad(grid(time, weight).square().sum(), weight)[0]
        step = 1e-6 * torch.ones_like(weight)
        with torch.no_grad():
            plus, minus = (grid(time, weight + s).square().sum() for s in (step, -step))
        torch.testing.assert_close((plus - minus) / 2e-6, gradient.sum(), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="out must come without gradients"):
        ops.voxel_grid(x, y, time, p, bins=3, height=HEIGHT, width=WIDTH, out=torch.zeros(3, HEIGHT, WIDTH))


def test_surface_goes_on_in_place(backend):
    """A stream into one surface, with and without a map, is the surface of all of it."""
    recording = columns(events(300), backend.device)
    cells, height, width = pixel_map(CHANGES["all"], WIDTH, HEIGHT)
    for given in ({"height": HEIGHT, "width": WIDTH}, {"height": height, "width": width, "pixel_map": cells}):
        given = {name: value if isinstance(value, int) else value.to(backend.device) for name, value in given.items()}
        whole = ops.time_surface(*recording, **given)
        surface = ops.time_surface(*(column[:0] for column in recording), **given)
        memory = surface.data_ptr()
        for part in (slice(0, 90), slice(90, 91), slice(91, 300)):
            surface = ops.time_surface(*(column[part] for column in recording), surface=surface, out=surface, **given)
        assert torch.equal(surface, whole)
        assert surface.data_ptr() == memory


@pytest.mark.parametrize("name", OPS)
def test_compiled_graphs_write_into_out(name):
    recording = columns(events(100))
    cells, height, width = pixel_map(CHANGES["all"], WIDTH, HEIGHT)
    given = {"height": height, "width": width, "pixel_map": cells}
    expected = OPS[name](*recording, **given)

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def step(x, y, t, p, out):
        return OPS[name](x, y, t, p, out=out, **given) * 2

    out = torch.zeros_like(expected)
    assert torch.equal(step(*recording, out), expected * 2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("op", ["event_histogram", "voxel_grid", "time_surface", "decayed_time_surface"])
def test_opcheck(backend, op):
    x, y, t, p = columns(events(30), backend.device)
    table = pixel_map(CHANGES["flip"], WIDTH, HEIGHT).cells.to(backend.device)
    shapes = {"event_histogram": 2 * BINS, "voxel_grid": BINS, "time_surface": 2, "decayed_time_surface": 2}
    dtypes = {"event_histogram": torch.uint8, "time_surface": torch.int64}
    out = torch.zeros(shapes[op], HEIGHT, WIDTH, dtype=dtypes.get(op, torch.float32), device=backend.device)
    arguments = {
        "event_histogram": (None, table, out, BINS, 255),
        "voxel_grid": (None, None, table, out, BINS, "e2vid", True),
        "time_surface": (None, table, None, out),
        "decayed_time_surface": (None, table, None, None, out, 700.0, False),
    }
    torch.library.opcheck(getattr(torch.ops.evkernels, f"{op}_into").default, (x, y, t, p, *arguments[op]))


BAD = [
    ({"pixel_map": torch.zeros(3, 4)}, TypeError, "pixel_map must be of dtype torch.int32.*float32"),
    ({"pixel_map": torch.zeros(3, dtype=torch.int32)}, ValueError, r"pixel_map of cells must be \[H, W\], got \(3,\)"),
    ({"pixel_map": torch.zeros(0, 4, dtype=torch.int32)}, ValueError, r"must be \[H, W\], got \(0, 4\)"),
    ({"pixel_map": torch.zeros(3, 4, dtype=torch.int32, device="meta")}, ValueError, "pixel_map must be on the device"),
    ({"out": torch.zeros(3, HEIGHT, WIDTH, dtype=torch.int16)}, TypeError, "out must be of dtype .*, got torch.int16"),
    ({"out": "shape"}, ValueError, "out must be shaped like the result"),
    ({"out": "strides"}, ValueError, "out must be contiguous, got strides"),
]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_rejects(name, changes, error, message):
    recording = columns(events(5))
    good = OPS[name](*recording, height=HEIGHT, width=WIDTH)
    if changes.get("out") == "shape":
        changes = {"out": good[:, :-1].contiguous()}
    elif changes.get("out") == "strides":
        changes = {"out": torch.cat([good, good], dim=-1)[..., :WIDTH]}
    with pytest.raises(error, match=message):
        OPS[name](*recording, height=HEIGHT, width=WIDTH, **changes)


def test_floating_coordinates_have_no_map():
    x, y, t, p = columns(events(5))
    with pytest.raises(TypeError, match=r"x and y must be integers beside a pixel_map, got torch\.float32"):
        ops.voxel_grid(
            x.float(), y.float(), t, p, bins=2, height=3, width=3, convention="dsec",
            pixel_map=torch.zeros(HEIGHT, WIDTH, dtype=torch.int32),
        )  # fmt: skip


def test_modules_take_a_map_and_out():
    recording = events(400)
    cells, height, width = pixel_map(CHANGES["all"], WIDTH, HEIGHT)
    for module in (
        nn.StackedHistogram(BINS, height, width, pixel_map=cells),
        nn.VoxelGrid(BINS, height, width, normalize="e2vid", pixel_map=cells),
        nn.TimeSurface(height, width, tau=700.0, pixel_map=cells),
    ):
        plain = type(module)(*([BINS] * ("bins" in vars(module))), height, width)
        plain.__dict__.update({key: value for key, value in vars(module).items() if key in ("normalize", "tau")})
        result = module(recording)
        assert_equal_or_close(result, plain(CHANGES["all"](recording)))
        out = torch.empty_like(result)
        assert module(recording, out=out) is out
        assert torch.equal(out, result)
        assert module.state_dict() == {}
        assert module.to("meta").pixel_map.is_meta


def test_hot_pixels_of_a_recording_are_left_out(recordings):
    """The spinner: 3,323 of its events are on one pixel."""
    with np.load(recordings / "npz" / "evt2_expelliarmus.npz") as file:
        recording = Events(*(file[name] for name in "xytp"), int(file["width"]), int(file["height"]))
    hot = hot_pixels(recording)
    assert hot.any()
    cells, height, width = pixel_map(partial(drop_pixels, pixels=hot), recording.width, recording.height)
    given = {"bins": 1, "height": height, "width": width, "dtype": torch.int32}
    counts = ops.event_histogram(*columns(recording), **given)
    expected = torch.where(torch.from_numpy(hot), 0, counts)
    assert torch.equal(ops.event_histogram(*columns(recording), pixel_map=cells, **given), expected)


class Histograms(IterableDataset):
    """What a data loader's worker does: into memory of its own, again and again."""

    def __iter__(self):
        out = torch.empty(2 * BINS, HEIGHT, WIDTH, dtype=torch.uint8)
        for seed in range(4):
            yield ops.event_histogram(
                *columns(events(20_000, seed=seed)), bins=BINS, height=HEIGHT, width=WIDTH, out=out
            ).clone()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_forked_workers():
    """After the parent has used several threads, whose pool a fork does not inherit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = list(Histograms())
    loader = DataLoader(Histograms(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    results = list(loader)
    torch.set_num_threads(threads)
    assert len(results) == 8
    assert sum(any(torch.equal(result, one) for one in expected) for result in results) == 8
