"""EventAccumulator: equal to its definition in NumPy, packets of any form, threads, bad packets, memory, a soak.

EVKERNELS_SOAK_EVENTS sets the length of the soak; 100 million events take about a minute.
"""

import os
import resource
import sys
import threading

import numpy as np
import pytest

from evkernels import ops
from evkernels.events import EventAccumulator, Events, read
from evkernels.events import accumulator as module
from evkernels.events.accumulator import NEVER, NumpyImages

host = pytest.importorskip("evkernels._host", reason="evkernels._host is not built")
ISAS = ("baseline", "avx2", "avx512")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SOAK_EVENTS = int(os.environ.get("EVKERNELS_SOAK_EVENTS", 3_000_000))


@pytest.fixture(params=[*ISAS, "numpy"])
def implementation(request, monkeypatch):
    """Every instruction set of this processor, and what serves where nothing is compiled."""
    if request.param == "numpy":
        monkeypatch.setattr(module, "_implementation", lambda: NumpyImages)
        yield
        return
    try:
        previous = host.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    host.set_cpu_isa(previous)


def packet(count, height=7, width=9, seed=0, low=0, high=None):
    rng = np.random.default_rng(seed)
    t = rng.integers(low, 10_000 if high is None else high, count)
    return rng.integers(0, width, count), rng.integers(0, height, count), t, rng.integers(0, 2, count)


def expected(packets, height=7, width=9, polarities=2):
    counts, times = np.zeros((polarities, height, width), np.int32), np.full((polarities, height, width), NEVER)
    for x, y, t, p in packets:
        for column, row, time, polarity in zip(x.tolist(), y.tolist(), t.tolist(), p.tolist(), strict=True):
            plane = (polarity == 1) * (polarities - 1)
            counts[plane, row, column] += 1
            times[plane, row, column] = max(times[plane, row, column], time)
    return counts, times


def assert_holds(accumulator, packets, **sizes):
    counts, times = expected(packets, polarities=accumulator.polarities, **sizes)
    seen = accumulator.snapshot()
    assert (seen.counts.dtype, seen.times.dtype) == (np.int32, np.int64)
    assert np.array_equal(seen.counts, counts)
    assert np.array_equal(seen.times, times)
    assert seen.events == sum(len(columns[0]) for columns in packets)


@pytest.mark.parametrize("polarities", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1100])
def test_equals_its_definition(implementation, polarities, count):
    accumulator = EventAccumulator(7, 9, polarities=polarities)
    packets = [packet(count, seed=seed) for seed in range(3)]
    assert [accumulator.push(*columns) for columns in packets] == [count] * 3
    assert_holds(accumulator, packets)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_columns_of_any_integer_dtype(implementation, dtype):
    columns = packet(700, high=100)
    accumulator = EventAccumulator(7, 9)
    accumulator.push(*(column.astype(dtype) for column in columns))
    # Every second element, backwards, and a broadcast scalar.
    accumulator.push(*(column.astype(dtype)[::-2] for column in columns))
    accumulator.push(*(np.broadcast_to(column.astype(dtype)[:1], 5) for column in columns))
    parts = [tuple(column[part] for column in columns) for part in (slice(None), slice(None, None, -2), [0] * 5)]
    assert_holds(accumulator, parts)


@pytest.mark.parametrize("polarity", [np.array([1, -1, 0, 1], np.int8), np.array([True, False, False, True])])
def test_polarity_conventions(implementation, polarity):
    accumulator = EventAccumulator(1, 1)
    accumulator.push(np.zeros(4, np.int16), np.zeros(4, np.int16), np.arange(4), polarity)
    assert accumulator.snapshot().counts.ravel().tolist() == [2, 2]


@pytest.mark.parametrize(
    "layout",
    [
        {"names": ["x", "y", "p", "t"], "formats": ["<u2", "<u2", "<i2", "<i8"], "offsets": [0, 2, 4, 8]},
        {"names": ["timestamp", "x", "y", "on"], "formats": ["<i8", "<i2", "<i2", "?"], "itemsize": 16},
        {"names": ["t", "x", "y", "polarity"], "formats": ["<u4", "<i4", "u1", "i1"]},
        {"names": ["p", "ts", "x", "y"], "formats": ["u1", "<i8", "<u2", "<u2"], "offsets": [0, 1, 9, 11]},
    ],
)
def test_structured_arrays_of_cameras_are_read_in_place(implementation, layout):
    columns = packet(1300)
    dtype = np.dtype(layout)
    table = np.zeros(1300, dtype)
    for name, column in zip("xytp", columns, strict=True):
        table[next(field for field in dtype.names if (field[0] in ("p", "o") and name == "p") or field[0] == name)] = (
            column
        )
    accumulator = EventAccumulator(7, 9)
    accumulator.push(table)
    table.flags.writeable = False
    accumulator.push(table[::3])
    assert_holds(accumulator, [columns, tuple(column[::3] for column in columns)])


def test_events_and_tensors(implementation):
    torch = pytest.importorskip("torch")
    x, y, t, p = packet(300)
    accumulator = EventAccumulator(7, 9)
    accumulator.push(Events(x.astype(np.uint16), y.astype(np.uint16), t, p.astype(np.uint8), 9, 7))
    accumulator.push(*(torch.from_numpy(column) for column in (x, y, t, p)))
    assert_holds(accumulator, [(x, y, t, p)] * 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", 9, r"x must be in 0\.\.8, got 9 for event 600 and 1 of 700 events outside; none of the packet was added"),
        ("x", -1, r"x must be in 0\.\.8, got -1"),
        ("x", 2**31, "got 2147483648"),
        ("y", 7, r"y must be in 0\.\.6, got 7"),
        ("y", -(2**62), "y must be in"),
        ("p", 2, r"p must be in -1\.\.1, got 2 for event 600"),
        ("p", -2, "got -2"),
    ],
)
def test_a_packet_with_an_event_out_of_range_changes_nothing(implementation, name, value, message):
    good, bad = packet(700), dict(zip("xytp", packet(700, seed=1), strict=True))
    bad[name][600] = value
    accumulator = EventAccumulator(7, 9)
    accumulator.push(*good)
    with pytest.raises(ValueError, match=message):
        accumulator.push(**bad)
    assert_holds(accumulator, [good])
    dropping = EventAccumulator(7, 9, out_of_range="drop")
    assert dropping.push(**bad) == 699
    rest = tuple(np.delete(column, 600) for column in bad.values())
    assert_holds(dropping, [rest])
    assert dropping.snapshot().dropped == 1
    assert dropping.push(*(column.astype(np.int64)[::2] for column in bad.values())) == 349


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ((np.zeros(3), np.zeros(3, int), np.zeros(3, int), np.zeros(3, int)), TypeError, "x must hold integers"),
        ((np.zeros(3, bool), np.zeros(3, int), np.zeros(3, int), np.zeros(3, int)), TypeError, "x must hold integers"),
        ((np.zeros(3, int), np.zeros(3, int), np.zeros(2, int), np.zeros(3, int)), ValueError, r"t must be \[E\] like"),
        ((np.zeros((3, 1), int),) * 4, ValueError, "x must be .* one dimension"),
        ((np.zeros(3, ">i4"),) * 4, TypeError, "native byte order"),
        ((np.zeros(3, int),), TypeError, "got no y, t, p"),
        ((np.zeros(3, [("x", "i4"), ("y", "i4"), ("t", "i8")]),), ValueError, "a field p or pol"),
        ((np.zeros(3, [("x", "i4")]), np.zeros(3, int)), TypeError, "got y beside it"),
        ((np.zeros(1, int), np.zeros(1, int), np.array([2**63], np.uint64), np.zeros(1, int)), ValueError, "int64"),
        (("abc",), TypeError, "got no y, t, p"),
    ],
)
def test_bad_packets_change_nothing(columns, error, message):
    accumulator = EventAccumulator(7, 9)
    with pytest.raises(error, match=message):
        accumulator.push(*columns)
    assert_holds(accumulator, [])


def test_the_compiled_class_checks_what_memory_safety_needs():
    images = host.EventAccumulator(7, 9, 2, True, True, False)
    column = np.zeros(3, np.int64)
    for columns in ((column, column, column, column[:2]), (column[:, None],) * 4):
        with pytest.raises(ValueError, match=r"\[E\] each"):
            images.push(*columns)
    for wrong in (np.zeros(3), np.zeros(3, ">i8"), np.zeros(3, "S8")):
        with pytest.raises(TypeError):
            images.push(column, column, column, wrong)
    for sizes in ((0, 1, 2), (1, -1, 2), (2**20, 2**20, 1), (1, 1, 3)):
        with pytest.raises(ValueError, match="those of a sensor"):
            host.EventAccumulator(*sizes, True, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height must be at least 1"),
        ({"height": 2**20, "width": 2**20}, "height \\* width must be at most"),
        ({"polarities": 3}, "polarities must be 1 or 2"),
        ({"counts": False, "times": False}, "must be kept"),
        ({"out_of_range": "clip"}, "out_of_range must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EventAccumulator(**{"height": 7, "width": 9, **arguments})


def test_clearing_and_what_is_not_kept(implementation):
    first, second = packet(50), packet(60, seed=1)
    accumulator = EventAccumulator(7, 9)
    accumulator.push(*first)
    before, after = accumulator.snapshot(clear=True), accumulator.snapshot()
    assert np.array_equal(before.counts, expected([first])[0])
    assert (before.events, after.events, after.counts.sum(), after.times.max()) == (50, 0, 0, NEVER)
    accumulator.push(*second)
    assert_holds(accumulator, [second])
    before.counts[:] = -1  # A snapshot's memory is its own.
    accumulator.clear()
    assert_holds(accumulator, [])
    for kept, other in (("counts", "times"), ("times", "counts")):
        one = EventAccumulator(7, 9, **{other: False})
        one.push(*first)
        seen = one.snapshot()
        assert getattr(seen, other) is None
        assert np.array_equal(getattr(seen, kept), expected([first])[kept == "times"])
    with pytest.raises(ValueError, match="times=False"):
        EventAccumulator(7, 9, times=False).snapshot().decayed(5.0)


@pytest.mark.slow
@pytest.mark.parametrize("images", [host.EventAccumulator, NumpyImages])
def test_counters_stop_at_their_largest_value(images):
    accumulator = images(1, 1, 1, False, True, False)
    if images is NumpyImages:
        accumulator.counts[:] = 2**31 - 3
    elif SOAK_EVENTS < 10**8:
        pytest.skip("counting to 2**31 takes many seconds: set EVKERNELS_SOAK_EVENTS to 100000000 or more")
    else:
        # One event in memory, read again and again.
        accumulator.push(*(np.broadcast_to(np.uint8(0), 2**31 - 3),) * 4)
    assert accumulator.snapshot(False)[0].item() == 2**31 - 3
    accumulator.push(*(np.zeros(5, np.int64),) * 4)
    assert accumulator.snapshot(False)[0].item() == 2**31 - 1


def test_decayed_surface_is_the_op(implementation):
    torch = pytest.importorskip("torch")
    columns = packet(400, low=1_600_000_000_000_000, high=1_600_000_000_010_000)
    accumulator = EventAccumulator(7, 9)
    accumulator.push(*columns)
    x, y, t, p = (torch.from_numpy(column) for column in columns)
    for more in ({}, {"at": 1_600_000_000_020_000}, {"decay": "linear"}):
        surface = ops.time_surface(x, y, t, p, height=7, width=9, tau=3000.0, **more)
        assert np.array_equal(accumulator.snapshot().decayed(3000.0, **more), surface.numpy())


def test_recordings(recordings, implementation):
    torch = pytest.importorskip("torch")
    for name in ("evt2_expelliarmus", "aedat4_davis346", "ncars"):
        events = read(recordings / "npz" / f"{name}.npz")
        accumulator = EventAccumulator(events.height, events.width)
        for window in events.windows(count=10_007):
            accumulator.push(window)
        x, y, t, p = (torch.from_numpy(getattr(events, column).astype(np.int64)) for column in "xytp")
        sizes = {"height": events.height, "width": events.width}
        seen = accumulator.snapshot()
        counts = ops.event_histogram(x, y, t, p, bins=1, dtype=torch.int32, **sizes)
        assert np.array_equal(seen.counts, counts.numpy())
        assert np.array_equal(seen.times, ops.time_surface(x, y, t, p, **sizes).numpy())


def test_snapshots_while_packets_arrive_lose_and_repeat_nothing(implementation):
    """Every event of a packet has the packet's number as its time, so a torn packet would show."""
    accumulator = EventAccumulator(8, 8)
    cells = np.arange(64)
    packets, failures, total = 400, [], np.zeros((2, 8, 8), np.int64)

    def camera():
        for number in range(packets):
            accumulator.push(cells % 8, cells // 8, np.full(64, number), cells % 2)

    thread = threading.Thread(target=camera)
    thread.start()
    while thread.is_alive():
        seen = accumulator.snapshot(clear=True)
        total += seen.counts
        on = seen.counts[1].ravel()[1::2]
        failures += [seen] * (len(set(on.tolist())) > 1 or seen.events % 64 != 0)
    thread.join()
    total += accumulator.snapshot(clear=True).counts
    assert not failures
    assert total.sum() == packets * 64
    assert set(total.ravel().tolist()) == {0, packets}


def test_a_packet_that_is_written_to_meanwhile_corrupts_nothing():
    accumulator = EventAccumulator(16, 16)
    x, rest = np.zeros(200_000, np.int16), np.zeros(200_000, np.int16)
    stop = threading.Event()

    def spoil():
        while not stop.is_set():
            x[:] = 30_000
            x[:] = 3

    thread = threading.Thread(target=spoil)
    thread.start()
    added = 0
    for _ in range(50):
        try:
            added += accumulator.push(x, rest, rest, rest)
        except ValueError:
            continue
    stop.set()
    thread.join()
    seen = accumulator.snapshot()
    assert seen.counts.sum() == seen.events == added


@pytest.mark.slow
def test_soak():
    """A stream with snapshots from another thread: every event is in exactly one of them, memory stays what it was."""
    height, width, size = 480, 640, 50_000
    rng = np.random.default_rng(0)
    packets = [
        (
            rng.integers(0, width, size).astype(np.uint16),
            rng.integers(0, height, size).astype(np.uint16),
            rng.integers(0, 1000, size),
            rng.integers(0, 2, size).astype(np.uint8),
        )
        for _ in range(8)
    ]
    rounds = max(2, SOAK_EVENTS // (8 * size))
    accumulator = EventAccumulator(height, width)
    total, events, snapshots, done = np.zeros((2, height, width), np.int64), 0, 0, threading.Event()

    def take():
        nonlocal total, events, snapshots
        seen = accumulator.snapshot(clear=True)
        total += seen.counts
        events += seen.events
        snapshots += 1
        accumulator.snapshot().times.max()

    def look():
        while not done.wait(0.005):
            take()

    thread = threading.Thread(target=look)
    thread.start()
    before = None
    for number in range(rounds):
        for columns in packets:
            accumulator.push(*columns)
        if number == rounds // 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    done.set()
    thread.join()
    take()
    print(f"{rounds * 8 * size:,} events, {snapshots} snapshots, peak grew by {grown:,} bytes")
    assert events == rounds * 8 * size
    cells = np.concatenate([(p.astype(int) * height + y) * width + x for x, y, _, p in packets])
    once = np.bincount(cells, minlength=total.size)
    assert np.array_equal(total.ravel(), rounds * once)
    # The images of two snapshots are 14.7 MB, and the allocator rounds up; a copy of the events would be 28 MB or more.
    assert grown < 25_000_000
