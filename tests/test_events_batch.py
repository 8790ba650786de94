"""EventBatch: what is joined and what is only viewed, windows against slices, DataLoader, modules that take it."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from evkernels import ops
from evkernels.events import EventBatch, Events, collate, read
from evkernels.nn import StackedHistogram

EPOCH = 1_633_953_690_975_950
PACKED = np.dtype([("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "u1")])  # 13 bytes: no stride torch can hold


def events(t, width=4, height=3):
    t = np.asarray(t, np.int64)
    index = np.arange(len(t))
    x, y = (index % width).astype(np.uint16), (index % height).astype(np.uint16)
    return Events(x, y, t, (index % 2).astype(np.uint8), width, height)


def table(e, dtype=PACKED, names=("x", "y", "t", "p")):
    array = np.zeros(len(e), dtype)
    for field, name in zip(dtype.names, names, strict=True):
        array[field] = getattr(e, name)
    return array


def lists(batch):
    return [[getattr(window, name).tolist() for name in "xytp"] for window in batch]


def test_of_one_recording_views_it():
    e = events([1, 5, 9])
    batch = EventBatch.of([e])
    assert (len(batch), batch.width, batch.height) == (1, 4, 3)
    for name in "xytp":
        assert np.shares_memory(getattr(batch, name).numpy(), getattr(e, name))
    assert repr(batch) == "EventBatch(1 windows, 3 events, 4x3, cpu)"


def test_of_mixed_samples_joins_them_in_order():
    a, b, c = events([1, 5, 9]), events([], width=9), events([2, 2])
    batch = EventBatch.of([a, table(b), EventBatch.of([c, a]), table(c)])
    assert batch.offsets.tolist() == [0, 3, 3, 5, 8, 10]
    assert (batch.width, batch.height) == (4, 3)
    assert lists(batch) == [[getattr(e, n).tolist() for n in "xytp"] for e in (a, b, c, a, c)]


def test_of_nothing():
    batch = EventBatch.of([])
    assert (len(batch), batch.width, batch.t.dtype) == (0, None, torch.int64)
    assert list(batch) == []


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (PACKED, "xytp"),
        (np.dtype([("x", ">i2"), ("y", ">i2"), ("p", "?"), ("t", ">u8")]), "xypt"),
        (np.dtype([("ts", "i8"), ("x", "i4"), ("y", "i4"), ("polarity", "i1")], align=True), "txyp"),
        (np.dtype([("x", "u8"), ("y", "u4"), ("p", "i8"), ("t", "i8")]), "xypt"),
        (np.dtype([("timestamp", "u4"), ("x", "u2"), ("y", "u2"), ("on", "?")]), "txyp"),
    ],
)
def test_structured_arrays_of_every_convention(dtype, names):
    e = events([3, 4, 4, 70])
    structured = table(e, dtype, names)
    assert lists(EventBatch.of([structured])) == lists(EventBatch.of([e]))
    assert lists(EventBatch.of([structured, e, structured])) == lists(EventBatch.of([e, e, e]))


def test_coordinates_beyond_int16_stay_positive():
    wide = Events(
        np.array([40000, 7], np.uint16), np.zeros(2, np.uint16), np.arange(2), np.zeros(2, np.uint8), 50000, 1
    )
    batch = EventBatch.of([wide, events([5])])
    assert (batch.x.tolist(), batch.width) == ([40000, 7, 0], 50000)
    assert EventBatch.of([table(wide)]).x.tolist() == [40000, 7]


def test_read_only_and_reversed_arrays_are_copied_silently(recwarn):
    e = events([1, 2, 3])
    e.t.setflags(write=False)
    batch = EventBatch.of([Events(e.x[::-1], e.y, e.t, e.p, 4, 3)])
    assert batch.x.tolist() == [2, 1, 0]
    batch.t.zero_()
    assert e.t.tolist() == [1, 2, 3]
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (np.zeros(3), TypeError, "got an array of float64"),
        ([1, 2], TypeError, "got list"),
        (
            np.zeros(3, [("x", "i4"), ("y", "i4"), ("t", "i8")]),
            ValueError,
            "field p or pol or polarity or on, got x, y",
        ),
        (
            np.zeros(3, [("x", "i4"), ("y", "i4"), ("t", "f8"), ("p", "i1")]),
            TypeError,
            "t must hold integers, got float",
        ),
        (np.zeros((3, 1), PACKED), ValueError, r"must be \[E\] with one dimension, got \[3, 1\]"),
    ],
)
def test_refuses_other_samples(sample, error, message):
    with pytest.raises(error, match=message):
        EventBatch.of([sample])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[0]), TypeError, r"x must be a torch\.Tensor, got list"),
        (dict(y=torch.zeros(2, 1)), ValueError, r"y must have one dimension, got \[2, 1\]"),
        (dict(p=torch.zeros(3)), ValueError, r"p must be \[E\] with E = len\(t\) = 2, got \[3\]"),
        (dict(x=torch.zeros(2, device="meta")), ValueError, "x must be on the device of t, cpu, got meta"),
        (dict(offsets=torch.tensor([0, 2], dtype=torch.int32)), ValueError, "offsets must be int64"),
        (dict(offsets=torch.zeros(0, dtype=torch.int64)), ValueError, "offsets must be int64"),
        (dict(offsets=torch.tensor([0, 1])), ValueError, "end at E = 2, got 0 to 1"),
        (dict(offsets=torch.tensor([1, 2])), ValueError, "start at 0"),
        (dict(offsets=torch.tensor([0, 2, 1, 2])), ValueError, "never decrease"),
    ],
)
def test_constructor_refuses_with_the_argument_named(change, error, message):
    columns = {name: torch.zeros(2, dtype=torch.int64) for name in "xytp"}
    with pytest.raises(error, match=message):
        EventBatch(**{**columns, "offsets": torch.tensor([0, 2]), **change})


def test_indexing_views():
    batch = EventBatch.of([events([1, 2]), events([]), events([7])])
    assert batch[-1].t.tolist() == [7]
    assert lists(batch[1:]) == lists(batch)[1:]
    assert (len(batch[1:1]), len(batch[2:0])) == (0, 0)
    assert batch[0].t.data_ptr() == batch.t.data_ptr()
    with pytest.raises(IndexError):
        batch[3]
    with pytest.raises(ValueError, match="consecutive"):
        batch[::2]


def test_to_another_device_and_back():
    batch = EventBatch.of([events([1, 2])])
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in ("x", "y", "t", "p", "offsets")} == {"meta"}
    assert (moved.width, moved.height) == (4, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: page-locked memory needs one")
def test_pins_every_column():
    batch = EventBatch.of([events([1, 2])]).pin_memory()
    assert all(getattr(batch, name).is_pinned() for name in ("x", "y", "t", "p", "offsets"))
    assert lists(batch.to("cuda").to("cpu")) == lists(batch)


# Windows of a recording.


def test_consecutive_windows_view_the_recording():
    e = events([100, 104, 131])
    batch = e.batch(duration_us=10)
    assert [window.t.tolist() for window in batch] == [[100, 104], [], [], [131]]
    assert np.shares_memory(batch.t.numpy(), e.t)
    later = e.batch(duration_us=10, start=104, number=2)
    assert [window.t.tolist() for window in later] == [[104], []]
    assert np.shares_memory(later.t.numpy(), e.t)


def test_overlapping_and_distant_windows():
    e = events([0, 10, 20, 30])
    assert [w.t.tolist() for w in e.batch(duration_us=11, stride=10)] == [[0, 10], [10, 20], [20, 30], [30]]
    assert [w.t.tolist() for w in e.batch(duration_us=5, stride=20)] == [[0], [20]]
    assert [w.t.tolist() for w in e.batch(count=3, stride=1)] == [[0, 10, 20], [10, 20, 30], [20, 30], [30]]
    assert [w.t.tolist() for w in e.batch(count=1, stride=3, start=1)] == [[10]]
    assert [w.t.tolist() for w in e.batch(duration_us=10, start=-20, number=4)] == [[], [], [0], [10]]
    assert len(e.batch(duration_us=10, start=31)) == 0
    assert len(e.batch(duration_us=10, number=0)) == 0
    assert [w.t.tolist() for w in events([]).batch(duration_us=10, number=2)] == [[], []]
    assert len(events([]).batch(count=10)) == 0


def test_bounds_at_the_ends_of_int64():
    last = np.iinfo(np.int64).max
    e = events([last - 1, last])
    assert [len(w.t) for w in e.batch(duration_us=1, number=4)] == [1, 1, 0, 0]
    assert [len(w.t) for w in e.batch(duration_us=2**70)] == [2]
    assert [len(w.t) for w in events([-last, last]).batch(duration_us=last)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one"),
        (dict(duration_us=5, count=5), ValueError, "exactly one"),
        (dict(duration_us=0), ValueError, "duration_us must be at least 1, got 0"),
        (dict(count=1.5), TypeError, "count must be an integer"),
        (dict(count=1, stride=0), ValueError, "stride must be at least 1"),
        (dict(count=1, number=-1), ValueError, "got -1"),
        (dict(duration_us=1, start=2**63), ValueError, "start must be an int64 time"),
        (dict(duration_us=1, start=-(2**62)), ValueError, r"at most 2\*\*31, got 46"),
    ],
)
def test_batch_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        events([1, 2]).batch(**arguments)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 200), max_size=40),
    st.integers(1, 50),
    st.integers(1, 60),
    st.integers(-30, 230),
)
def test_batch_equals_slices(times, duration, stride, start):
    e = events(EPOCH + np.sort(np.array(times, np.int64)))
    batch = e.batch(duration_us=duration, stride=stride, start=EPOCH + start)
    latest = max(times, default=start - 1)
    begins = [EPOCH + begin for begin in range(start, latest + 1, stride)]
    assert [w.t.tolist() for w in batch] == [e.slice_time(b, b + duration).t.tolist() for b in begins]
    same = [[getattr(w, name).tolist() for name in "xytp"] for w in e.windows(duration_us=duration)]
    assert lists(e.batch(duration_us=duration)) == same
    by_count = [[getattr(w, name).tolist() for name in "xytp"] for w in e.windows(count=duration)]
    assert lists(e.batch(count=duration)) == by_count


# Into modules and out of data loaders.


def test_every_form_gives_the_same_histogram():
    e = events(np.arange(0, 900, 9))
    module = StackedHistogram(3, 3, 4, 10)
    columns = e.tensors()
    expected = module(columns[0], columns[1], columns[3], columns[2])
    assert expected.sum() > 0
    for form in (e, table(e)):
        assert torch.equal(module(form), expected)
    assert torch.equal(module(EventBatch.of([e, e])), torch.stack([expected, expected]))
    batch = e.batch(duration_us=100)
    windows = [module(window) for window in e.windows(duration_us=100)]
    assert torch.equal(module(batch), torch.stack(windows))


def test_batch_goes_into_a_compiled_graph():
    batch = events(np.arange(0, 900, 9)).batch(duration_us=100)
    module = StackedHistogram(3, 3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch), module(batch))


def test_module_refuses_columns_beside_a_whole_and_missing_ones():
    e = events([1, 2])
    module = StackedHistogram(3, 3, 4)
    x, y, t, _ = e.tensors()
    with pytest.raises(TypeError, match="Events holds all columns, but got t beside it"):
        module(e, time=t)
    with pytest.raises(TypeError, match="x, y, p, t, got no p, t"):
        module(x, y)
    with pytest.raises(TypeError, match=r"events must be Events, .* got int"):
        module(3)


class Samples(torch.utils.data.Dataset):
    """Every kind of sample that `collate` joins, with a label."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 5

    def __getitem__(self, index):
        e = events(np.arange(index))
        sample = {"events": e, "table": table(e), "batch": EventBatch.of([e])}[self.kind]
        return sample, {"label": index, "box": np.full(2, index)}


@pytest.mark.parametrize("kind", ["events", "table", "batch"])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(kind, workers):
    loader = DataLoader(Samples(kind), batch_size=3, collate_fn=collate, num_workers=workers)
    batches = list(loader)
    assert [batch.offsets.tolist() for batch, _ in batches] == [[0, 0, 1, 3], [0, 3, 7]]
    assert batches[1][1]["label"].tolist() == [3, 4]
    assert batches[1][1]["box"].tolist() == [[3, 3], [4, 4]]
    assert batches[1][0].t.tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_pickles():
    batch = EventBatch.of([events([1, 2]), events([5])])
    assert lists(pickle.loads(pickle.dumps(batch))) == lists(batch)


def test_all_windows_of_real_recordings_in_one_call(recordings):
    for path in sorted((recordings / "npz").glob("*.npz")):
        e = read(path)
        duration = e.duration // 4 + 1
        columns = e.batch(duration_us=duration)
        assert np.shares_memory(columns.t.numpy(), e.t)
        whole = StackedHistogram(2, e.height, e.width)(columns)
        for window, histogram in zip(e.windows(duration_us=duration), whole, strict=True):
            x, y, t, p = window.tensors()
            assert torch.equal(ops.event_histogram(x, y, t, p, bins=2, height=e.height, width=e.width), histogram), (
                path.name
            )
