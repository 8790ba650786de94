"""Events: what is accepted, what is refused and how, and that windows are views that lose nothing."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evkernels.events import Events

EPOCH = 1_633_953_690_975_950  # microseconds of a real recording: float32 and int32 fail here


def events(t, x=None, y=None, p=None, width=4, height=3, dtype=np.uint16):
    t = np.asarray(t, np.int64)
    x = np.arange(len(t)) % width if x is None else x
    y = np.arange(len(t)) % height if y is None else y
    p = np.arange(len(t)) % 2 if p is None else p
    return Events(np.asarray(x, dtype), np.asarray(y, dtype), t, np.asarray(p, np.uint8), width, height)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32])
def test_accepts_every_coordinate_type_without_copying(dtype):
    x, y = np.array([0, 3], dtype), np.array([2, 0], dtype)
    t, p = np.array([5, 9], np.int64), np.array([0, 1], np.uint8)
    e = Events(x, y, t, p, 4, 3)
    assert e.x is x
    assert e.y is y
    assert e.t is t
    assert e.p is p
    assert len(e) == 2
    assert e.duration == 4
    assert e.is_sorted
    assert repr(e) == "Events(2 events, 4x3, 4 us)"


@pytest.mark.parametrize("t", [[], [7]])
def test_no_event_and_one_event(t):
    e = events(t)
    assert len(e) == len(t)
    assert e.duration == 0
    assert e.is_sorted
    assert e.sorted() is e
    assert [len(w) for w in e.windows(duration_us=10)] == [len(w) for w in e.windows(count=10)] == [1] * len(t)
    assert len(e.slice_time(0, 100)) == len(t)


def test_columns_may_be_strided():
    table = np.arange(12, dtype=np.int32).reshape(6, 2)
    e = Events(table[:, 0], table[:, 1], np.arange(12)[::2], np.zeros(12, np.uint8)[::2], 12, 12)
    assert len(e.slice_time(2, 6)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=np.array([0, 4], np.uint16)), r"x must be in 0\.\.3 \(sensor 4x3\), got 0\.\.4: 1 of 2 events"),
        (dict(y=np.array([3, 9], np.uint16)), r"y must be in 0\.\.2 \(sensor 4x3\), got 3\.\.9: 2 of 2 events"),
        (dict(x=np.array([-1, 0], np.int16)), r"x must be in 0\.\.3 .* got -1\.\.0: 1 of 2"),
        (dict(x=np.array([0, 65534], np.uint16)), r"got 0\.\.65534: 1 of 2"),
        (dict(x=np.array([0.0, 1.0])), r"x must have dtype uint16 or int16 or int32, got float64"),
        (dict(y=np.array([0, 1], np.int64)), r"y must have dtype .*, got int64"),
        (dict(t=np.array([0.0, 1.0])), r"t must have dtype int64, got float64"),
        (dict(t=np.array([0, 1], np.uint64)), r"t must have dtype int64, got uint64"),
        (dict(t=[0, 1]), r"t must be a NumPy array, got list"),
        (dict(t=np.int64(0) + np.zeros((), np.int64)), r"t must be a NumPy array|t must be \[E\]"),
        (dict(t=np.zeros((), np.int64)), r"t must be \[E\] .* got shape \(\)"),
        (dict(t=np.zeros((2, 1), np.int64)), r"t must be \[E\] with E = len\(t\) = 2, got shape \(2, 1\)"),
        (dict(x=np.zeros(3, np.uint16)), r"x must be \[E\] with E = len\(t\) = 2, got shape \(3,\)"),
        (dict(p=np.array([0, 2], np.uint8)), r"p must be 0 or 1, got up to 2: 1 of 2"),
        (dict(p=np.array([-1, 1], np.int8)), r"p must have dtype uint8, got int8"),
        (dict(p=np.array([True, False])), r"p must have dtype uint8, got bool"),
        (dict(width=0), r"width must be a positive integer, got 0"),
        (dict(height=2.0), r"height must be a positive integer, got 2\.0"),
        (dict(height=True), r"height must be a positive integer, got True"),
    ],
)
def test_refuses_with_the_argument_named(change, message):
    good = dict(
        x=np.zeros(2, np.uint16),
        y=np.zeros(2, np.uint16),
        t=np.zeros(2, np.int64),
        p=np.zeros(2, np.uint8),
        width=4,
        height=3,
    )
    with pytest.raises(ValueError, match=message):
        Events(**{**good, **change})


def test_is_frozen():
    with pytest.raises(AttributeError):
        events([1]).width = 9


def test_slice_is_half_open_and_a_view():
    e = events([10, 20, 20, 30])
    part = e.slice_time(20, 30)
    assert part.t.tolist() == [20, 20]
    assert (part.width, part.height) == (4, 3)
    assert all(np.shares_memory(getattr(part, name), getattr(e, name)) for name in "xytp")
    assert len(e.slice_time(30, 31)) == 1
    assert len(e.slice_time(31, 99)) == 0
    assert len(e.slice_time(20, 20)) == 0


def test_boundaries_are_exact_at_epoch_times():
    e = events(EPOCH + np.arange(5))
    assert e.slice_time(EPOCH + 1, EPOCH + 4).t.tolist() == [EPOCH + 1, EPOCH + 2, EPOCH + 3]
    assert [len(w) for w in e.windows(duration_us=2)] == [2, 2, 1]
    assert len(e.slice_time(-(2**70), 2**70)) == 5


def test_boundaries_at_the_ends_of_int64():
    last = np.iinfo(np.int64).max
    e = events([last - 1, last])
    assert [len(w) for w in e.windows(duration_us=1)] == [1, 1]
    assert len(e.slice_time(last, last + 1)) == 1


def test_slice_refuses_unsorted_swapped_and_float():
    with pytest.raises(ValueError, match="1 events earlier than the one before"):
        events([3, 1, 2]).slice_time(0, 9)
    with pytest.raises(ValueError, match="start must not exceed stop, got start 5 and stop 4"):
        events([3]).slice_time(5, 4)
    with pytest.raises(TypeError, match=r"start must be an integer, got 0\.5"):
        events([3]).slice_time(0.5, 4)


def test_time_windows_keep_empty_ones():
    e = events([100, 104, 131])
    assert [w.t.tolist() for w in e.windows(duration_us=10)] == [[100, 104], [], [], [131]]


def test_count_windows_keep_the_rest():
    assert [w.t.tolist() for w in events([1, 2, 3]).windows(count=2)] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, ValueError),
        (dict(duration_us=1, count=1), ValueError),
        (dict(duration_us=0), ValueError),
        (dict(count=-1), ValueError),
        (dict(duration_us=1.5), TypeError),
        (dict(count=True), TypeError),
    ],
)
def test_windows_refuse_at_the_call(arguments, error):
    with pytest.raises(error):
        events([1]).windows(**arguments)


def test_windows_refuse_unsorted():
    with pytest.raises(ValueError, match="non-decreasing"):
        events([2, 1]).windows(count=1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 200), max_size=40), st.integers(1, 50))
def test_windows_partition_the_events(times, length):
    e = events(EPOCH + np.sort(np.array(times, np.int64)))
    by_time, by_count = list(e.windows(duration_us=length)), list(e.windows(count=length))
    for windows in (by_time, by_count):
        assert [t for w in windows for t in w.t.tolist()] == e.t.tolist()
    for index, window in enumerate(by_time):
        assert np.all((window.t - e.t[0]) // length == index)
    assert all(len(w) == length for w in by_count[:-1])


def test_sorting_is_stable_and_leaves_the_input():
    e = events([5, 1, 5, 1], x=[0, 1, 2, 3])
    before = e.t.copy()
    assert not e.is_sorted
    assert e.duration == 4
    s = e.sorted()
    assert s.t.tolist() == [1, 1, 5, 5]
    assert s.x.tolist() == [1, 3, 0, 2]
    assert s.is_sorted
    assert np.array_equal(e.t, before)


def test_tensors_are_copies_of_fitting_type():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    e = events([EPOCH, EPOCH + 1])
    x, y, t, p = e.tensors()
    assert (x.dtype, y.dtype, t.dtype, p.dtype) == (torch.int16, torch.int16, torch.int64, torch.uint8)
    assert t.tolist() == e.t.tolist()
    assert x.tolist() == e.x.tolist()
    for tensor in (x, y, t, p):
        tensor.zero_()
    assert e.t.tolist() == [EPOCH, EPOCH + 1]
    assert e.x.tolist() == [0, 1]
    assert e.p.tolist() == [0, 1]


def test_tensors_do_not_wrap_on_wide_sensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, y, _, _ = events([0], x=[40000], y=[0], width=50000).tensors()
    assert x.dtype == y.dtype == torch.int32
    assert x.tolist() == [40000]
    assert events([0], x=[32767], y=[0], width=32768).tensors()[0].tolist() == [32767]


def test_import_and_work_without_optional_libraries():
    script = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'PIL', 'skimage', 'scipy', 'h5py', 'hdf5plugin', 'eventcv', 'faery'):\n"
        "    sys.modules[name] = None\n"
        "import types\n"
        "package = types.ModuleType('evkernels')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['evkernels'] = package\n"
        "import numpy as np\n"
        "from evkernels.events import simulate, event_frame, save_png\n"
        "image = np.random.default_rng(0).random((40, 40))\n"
        "assert event_frame(simulate(image, width=20, height=20)).shape == (20, 20, 3)\n"
        "for call in (simulate, lambda: save_png('never.png', np.zeros((2, 2), np.uint8))):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        assert \"pip install 'evkernels[demo]'\" in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('no error without the library')\n"
    )
    import evkernels.events as package

    folder = str(package.__path__[0]).rsplit("events", 1)[0]
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
