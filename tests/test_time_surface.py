"""time_surface: the contract of every op, and what is special to this one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from contract import OpContract
from event_histograms import INTEGERS, by_index, event_lists, events, strided, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evkernels import ops, use_backend
from evkernels.backends import has_compiled_kernel
from evkernels.testing import assert_matches

NEVER = -(2**63)
US_2020 = 1_600_000_000_000_000


def eager(x, y, t, p, offsets, height, width, polarities=2, surface=None):
    """Window by window with numpy's unbuffered maximum; events out of range are left out."""
    bounds = [0, x.numel()] if offsets is None else offsets.tolist()
    x, y, t, p = (column.cpu().numpy().astype(np.int64) for column in (x, y, t, p))
    last = np.full((len(bounds) - 1, polarities, height, width), NEVER)
    if surface is not None:
        last[:] = surface.cpu().numpy().reshape(last.shape)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & np.isin(p, (-1, 0, 1))
    plane = (p > 0) * (polarities - 1)
    for window, (begin, end) in enumerate(pairwise(bounds)):
        kept = np.flatnonzero(inside[begin:end]) + begin
        np.maximum.at(last[window], (plane[kept], y[kept], x[kept]), t[kept])
    last = torch.from_numpy(last)
    return last[0] if offsets is None else last


def decayed(last, at, tau, decay, dtype):
    """`at` is one int, or one for each window."""
    at = torch.as_tensor(at).view(-1, 1, 1, 1)
    age = (at - last).clamp(min=0).to(dtype) / torch.tensor(tau, dtype=torch.float32).to(dtype)
    left = torch.exp(-age) if decay == "exponential" else (1 - age).clamp(min=0)
    return torch.where(last == NEVER, torch.zeros((), dtype=dtype), left).view(last.shape)


def latest(t, offsets):
    if offsets is None:
        return t.max() if t.numel() else 0
    return torch.tensor([t[a:b].max() if a < b else 0 for a, b in pairwise(offsets.tolist())], dtype=torch.int64)


def fused(x, y, t, p, offsets, height, width, polarities=2, surface=None, **decay):
    arguments = {"height": height, "width": width, "polarities": polarities, "surface": surface, "offsets": offsets}
    return ops.time_surface(x, y, t, p, **arguments, **decay)


class TestTimeSurface(OpContract):
    dtypes = INTEGERS
    layouts = ("contiguous", "every_second", "expanded")

    def op(self, *arguments):
        return fused(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        dtype = torch.int16 if dtype.is_floating_point else dtype
        samples = []
        for count, height, width, polarities, bounds in (
            (37, 5, 7, 2, None),
            (1, 1, 1, 1, None),
            (600, 4, 3, 1, [0, 0, 211, 212, 600, 600]),
            (200, 6, 5, 2, None),
            *[(30_000, 40, 70, 2, [0, 10_000, 29_000, 30_000])] * (large and layout == "contiguous"),
            *[(50_000, 41, 70, 2, None)] * (large and layout == "contiguous"),
        ):
            columns = events(count, height, width, dtype, start=US_2020, ordered=count != 200)
            columns = [strided(column, layout) for column in columns]
            samples.append((*columns, bounds and torch.tensor(bounds), height, width, polarities))
        return samples

    def typical(self, dtype, layout):
        return [(*events(1024, 16, 32, torch.int16), None, 16, 32, 2)]

    def empty_samples(self):
        none = events(0)
        surface = torch.arange(32).view(2, 2, 2, 4)
        windows = torch.tensor([0, 0, 0])
        return [
            (*none, None, 2, 4),
            (*none, windows, 2, 4),
            (*none, torch.tensor([0]), 2, 4),
            (*none, windows, 2, 4, 2, surface),
        ]

    @pytest.mark.parametrize("time_dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("polarities", [1, 2])
    def test_order_of_events_changes_nothing(self, backend, polarities, time_dtype):
        count = 300 if backend.is_slow else 20_000
        x, y, t, p = events(count, 20, 30, start=10**6)
        t = t.to(time_dtype)
        expected = eager(x, y, t, p, None, 20, 30, polarities)
        for order in (torch.randperm(count), torch.arange(count).flip(0)):
            check(backend, x[order], y[order], t[order], p[order], None, 20, 30, polarities)
            assert torch.equal(eager(x[order], y[order], t[order], p[order], None, 20, 30, polarities), expected)

    @pytest.mark.parametrize(
        ("coordinates", "height", "width", "polarities"),
        [
            (torch.uint16, 40, 70, 2),
            (torch.int16, 41, 30, 1),
            (torch.int64, 40, 70, 2),
            (torch.uint16, 70_000, 2, 2),
            (torch.int16, 65_536, 1, 1),
        ],
    )
    def test_rows_are_shared_by_threads(self, backend, same_threads_after, coordinates, height, width, polarities):
        """Rows of 16 bits and others, with events out of range, sorted and not, through a map, with a decay."""
        if not backend.name.startswith("cpu-"):
            pytest.skip("only the CPU kernels share rows")
        count = 200_000
        x, y, t, p = events(count, height, width, torch.int64, start=US_2020)
        # Blocks without events out of range come second.
        off = torch.where(torch.arange(count) < count // 2, torch.randint(0, 50, (count,)), 50)
        x, y, p = x + (off == 0) * width, torch.where(off == 1, height, y), (p + 2 * (off == 2)).to(torch.uint8)
        if coordinates == torch.int16:
            x, y = torch.where(off == 3, -1, x), torch.where(off == 4, -1, y)
        limit = torch.iinfo(coordinates).max
        columns = x.clamp(max=limit).to(coordinates), y.clamp(max=limit).to(coordinates), t, p
        pixel_map = torch.randint(-1, height * width, (height, width), dtype=torch.int32)
        size = {"height": height, "width": width, "polarities": polarities}
        for table in (columns, (*columns[:2], t.roll(77_777), p)):
            last = eager(*table, None, height, width, polarities)
            single = None
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(ops.time_surface(*table, **size), last)
                others = [
                    ops.time_surface(*table, **size, **more) for more in ({"tau": 900.0}, {"pixel_map": pixel_map})
                ]
                with pytest.raises(ValueError, match="events are out of range") as raised:
                    ops.time_surface(*table, **size, out_of_range="raise")
                single = single or (*others, str(raised.value))
                assert all(torch.equal(a, b) for a, b in zip(others, single[:2], strict=True))
                assert str(raised.value) == single[2]

    @pytest.mark.parametrize(
        "case", ["spread", "hot_pixel", "one_row", "two_windows", "unequal_windows", "wide", "int32"]
    )
    def test_threads_that_share_events(self, same_threads_after, case):
        """Large windows, fewer than threads: from a surface, in place, with decays and with the latest event first."""
        height, width = (3, 40_000) if case == "wide" else (90, 130)
        count = 150_000
        x, y, t, p = events(count, height, width, torch.int32, start=US_2020)
        if case == "hot_pixel":
            y = torch.where(torch.arange(count) % 4 > 0, 17, y)
        elif case == "one_row":
            y = torch.full_like(y, height - 1)
        elif case == "int32":
            t = (t - US_2020).to(torch.int32)
        x[5_000], y[120_000] = -1, height
        t = t.roll(1_000)
        bounds = {"two_windows": [0, 70_000, count], "unequal_windows": [0, 0, 140_000, count]}.get(case)
        offsets = None if bounds is None else torch.tensor(bounds)
        before = eager(*(column[::7] for column in (x, y, t - 30)), p[::7], None, height, width)
        before = before if offsets is None else before.expand(len(bounds) - 1, -1, -1, -1).contiguous()
        last = eager(x, y, t, p, offsets, height, width, 2, before)
        single = None
        for threads in (1, 2, 3, 4, 5, 9):
            torch.set_num_threads(threads)
            given = before.clone()
            ops.time_surface(x, y, t, p, height=height, width=width, offsets=offsets, surface=given, out=given)
            assert torch.equal(given, last)
            others = [
                fused(x, y, t, p, offsets, height, width, 2, before, tau=900.0),
                fused(x, y, t, p, offsets, height, width, 1, tau=900.0, decay="linear"),
                fused(x, y, t, p, offsets, height, width, 1, tau=900.0, at=US_2020),
            ]
            single = single or others
            assert all(torch.equal(a, b) for a, b in zip(others, single, strict=True))

    @pytest.mark.parametrize("t", [[5], [-3, -2, -9], [2**63 - 1, NEVER + 1, 0], [US_2020, US_2020 + 1, US_2020]])
    def test_extreme_times(self, backend, t):
        t = torch.tensor(t)
        zeros = torch.zeros_like(t)
        check(backend, zeros, zeros, t, zeros, None, 1, 2)

    def test_drops_events_out_of_range(self, backend, dtype):
        """Coordinates at and beyond both borders, the extremes of their dtype, and 2^32 + 1, which must not wrap."""
        limits = torch.iinfo(dtype)
        values = [v for v in (0, 8, 9, 10, 255, 2**32 + 1, -1, -7, limits.min, limits.max) if limits.min <= v]
        values = [v for v in values if v <= limits.max]
        pairs = [(a, b) for a in values for b in values] * 3
        x, y = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
        t = torch.arange(len(pairs))
        p = (torch.arange(len(pairs)) % 4).to(torch.int8)
        for order in (torch.arange(len(pairs)), torch.randperm(len(pairs))):
            for polarities in (1, 2):
                columns = by_index(x, order), by_index(y, order), t[order], p[order]
                check(backend, *columns, None, 9, 9, polarities)

    @pytest.mark.parametrize("values", [[0, 1], [-1, 1], [False, True], [0, 1, 2, 3, -2, 127, -128]])
    def test_polarities(self, backend, values):
        x, y, t, _ = events(70)
        for dtype in [torch.bool] if values[1] is True else [torch.int8, torch.int32, torch.int64]:
            check(backend, x, y, t, torch.tensor(values, dtype=dtype).repeat(70)[:70], None, 7, 9)

    def test_raises_on_events_out_of_range(self, backend):
        x, y, t, p = (column.to(backend.device) for column in events(100, dtype=torch.int32))
        arguments = {"height": 7, "width": 9, "out_of_range": "raise"}
        assert torch.equal(ops.time_surface(x, y, t, p, **arguments).cpu(), eager(x, y, t, p, None, 7, 9))
        x[3], x[50], y[7] = -4, 65534, 7
        for tau in (None, 10.0):
            with pytest.raises(ValueError, match=r"3 of 100 events .*width = 9, got x from -4 to 65534.*y from 0 to 7"):
                ops.time_surface(x, y, t, p, tau=tau, **arguments)

    @pytest.mark.parametrize("bounds", [None, [0, 30, 30, 100]])
    def test_goes_on_from_a_surface(self, backend, bounds):
        """Two calls equal one, whatever the order of the parts; the surface handed in keeps its values."""
        offsets = None if bounds is None else torch.tensor(bounds)
        x, y, t, p = events(100, start=US_2020, ordered=False)
        before = eager(x, y, t - 1000, p, offsets, 7, 9)
        on_device = before.to(backend.device)
        check(backend, x.flip(0), y, t, p, offsets, 7, 9, 2, before)
        check(backend, x.flip(0), y, t, p, offsets, 7, 9, 2, before.transpose(-1, -2).contiguous().transpose(-1, -2))
        columns = [column.to(backend.device) for column in (x, y, t, p)]
        result = fused(*columns, None if offsets is None else offsets.to(backend.device), 7, 9, surface=on_device)
        assert torch.equal(on_device.cpu(), before)
        assert result.data_ptr() != on_device.data_ptr()

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": torch.zeros(3)}, TypeError, "x must be of dtype .*float32"),
            ({"t": torch.zeros(4, dtype=torch.int64)}, ValueError, r"t must be \[E\] like x = \(3,\), got \(4,\)"),
            ({"height": -1}, ValueError, "height must be in"),
            ({"polarities": 3}, ValueError, r"polarities must be in \[1, 2\], got 3"),
            ({"polarities": True}, TypeError, "polarities must be an int, got bool"),
            ({"tau": 0}, ValueError, "tau must be in .*, got 0"),
            ({"tau": float("nan")}, ValueError, "tau must be in .*, got nan"),
            ({"tau": torch.ones(())}, TypeError, "tau must be a float, got Tensor"),
            ({"decay": "none"}, ValueError, "decay must be .*'none'"),
            ({"at": 5}, ValueError, "at must be None without tau"),
            ({"at": 5.0, "tau": 1.0}, TypeError, "at must be an int, got float"),
            (
                {"at": torch.zeros(2, dtype=torch.int64), "tau": 1.0},
                ValueError,
                r"at must be \[B\] = \(1,\), got \(2,\)",
            ),
            ({"surface": torch.zeros(2, 7, 9)}, TypeError, "surface must be of dtype torch.int64"),
            (
                {"surface": torch.zeros(1, 7, 9, dtype=torch.int64)},
                ValueError,
                r"surface must be \[polarities, height, width\] = \(2, 7, 9\), got \(1, 7, 9\)",
            ),
            ({"out_of_range": "clamp"}, ValueError, "out_of_range must be .*'clamp'"),
            ({"offsets": torch.tensor([0, 4])}, ValueError, "offsets must start at 0 and end at E = 3, got 0 and 4"),
        ],
    )
    def test_rejects(self, changes, error, message):
        x, y, t, p = events(3)
        arguments = {"x": x, "y": y, "t": t, "p": p, "height": 7, "width": 9}
        with pytest.raises(error, match=message):
            ops.time_surface(**{**arguments, **changes})

    def test_registered_op_checks_again_what_memory_depends_on(self):
        if not has_compiled_kernel("time_surface", "cpu"):
            pytest.skip("the compiled kernels are not built")
        forward = torch.ops.evkernels.time_surface
        with pytest.raises(RuntimeError, match="offsets must start at 0"):
            forward(*events(3), torch.tensor([0, 9, 3]), None, 2, 7, 9)
        with pytest.raises(RuntimeError, match="surface must be int64"):
            forward(*events(3), None, torch.zeros(2, 7, 8, dtype=torch.int64), 2, 7, 9)
        with pytest.raises(RuntimeError, match="at must be int64"):
            torch.ops.evkernels.decayed_time_surface(*events(3), None, None, torch.zeros(1), 2, 7, 9, 1.0, False)


class TestDecayedTimeSurface(OpContract):
    dtypes = (torch.int16, torch.uint16, torch.int64)
    layouts = ("contiguous", "every_second")

    def op(self, *arguments):
        return fused(*arguments, tau=700.0)

    def eager(self, x, y, t, p, offsets, *rest):
        return decayed(eager(x, y, t, p, offsets, *rest), latest(t, offsets), 700.0, "exponential", torch.float32)

    samples = TestTimeSurface.samples

    def empty_samples(self):
        return TestTimeSurface.empty_samples(self)[:3]

    @pytest.mark.parametrize("decay", ["exponential", "linear"])
    @pytest.mark.parametrize("tau", [1e-3, 1, 50.0, 1e4, 1e9])
    @pytest.mark.parametrize("start", [0, US_2020])
    def test_values_at_any_time(self, backend, decay, tau, start):
        """Before, within and after the events; ages from 0 to where float32 has nothing left."""
        columns = events(200, start=start, ordered=False)
        last = eager(*columns, None, 7, 9)
        on_device = [column.to(backend.device) for column in columns]
        for at in (start - 5, start + 2500, start + 5000, start + 10**6, None):
            actual = fused(*on_device, None, 7, 9, tau=tau, decay=decay, at=at)
            time = columns[2].max() if at is None else at
            exact, rounded = (decayed(last, time, tau, decay, dtype) for dtype in (torch.float64, torch.float32))
            assert_matches(actual, exact, rounded)
            assert torch.equal(actual.cpu() == 1, rounded == 1) or decay == "exponential"

    def test_microseconds_of_this_century_are_told_apart(self, backend):
        x = torch.tensor([0, 1, 2], device=backend.device)
        t = torch.tensor([0, 1, 2], device=backend.device) + US_2020
        left = fused(x, x * 0, t, x > 0, None, 1, 3, 1, tau=1.0).cpu().flatten()
        torch.testing.assert_close(left, torch.exp(torch.tensor([-2.0, -1.0, 0.0])))

    def test_without_events_a_surface_only_ages(self, backend):
        """Its own latest time is the time then, or the one that is asked for, for each window."""
        none = [column.to(backend.device) for column in events(0)]
        last = torch.tensor([[[[5, 9, NEVER]]], [[[-7, -7, -8]]]])
        offsets = torch.tensor([0, 0, 0], device=backend.device)
        for at in (None, torch.tensor([11, -3])):
            actual = fused(
                *none,
                offsets,
                1,
                3,
                1,
                last.to(backend.device),
                tau=2.0,
                at=None if at is None else at.to(backend.device),
            )
            expected = decayed(last, torch.tensor([9, -7]) if at is None else at, 2.0, "exponential", torch.float32)
            torch.testing.assert_close(actual.cpu(), expected)
            assert actual[0, 0, 0, 2] == 0

    def test_events_out_of_range_count_as_time(self, backend):
        x = torch.tensor([0, 9], device=backend.device)
        left = fused(x, x * 0, x, x * 0, None, 1, 1, 1, tau=9.0)
        assert left.item() == pytest.approx(np.exp(-1))


def check(backend, x, y, t, p, offsets, height, width, polarities=2, surface=None):
    given = [None if v is None else v.to(backend.device) for v in (x, y, t, p, offsets)]
    before = None if surface is None else surface.to(backend.device)
    actual = fused(*given, height, width, polarities, before)
    assert torch.equal(actual.cpu(), eager(x, y, t, p, offsets, height, width, polarities, surface))


class TestProperties:
    """For any events; on the CPU kernels or, without them, the reference."""

    @settings(max_examples=200, deadline=None)
    @given(event_lists(), st.sampled_from([1, 2]), st.randoms(use_true_random=False))
    def test_maximum_in_any_order(self, lists, polarities, random):
        x, y, t, p = tensors(lists)
        surface = fused(x, y, t, p, None, 3, 4, polarities)
        assert torch.equal(surface, eager(x, y, t, p, None, 3, 4, polarities))
        order = random.sample(range(len(x)), len(x))
        assert torch.equal(fused(x[order], y[order], t[order], p[order], None, 3, 4, polarities), surface)
        with use_backend("reference"):
            assert torch.equal(fused(x, y, t, p, None, 3, 4, polarities), surface)

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.lists(st.integers(0, 40), max_size=5), st.sampled_from([None, 7.0]))
    def test_batch_equals_its_windows(self, lists, cuts, tau):
        x, y, t, p = tensors(lists)
        bounds = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
        batch = fused(x, y, t, p, torch.tensor(bounds), 3, 4, tau=tau)
        for window, (begin, end) in enumerate(pairwise(bounds)):
            alone = fused(x[begin:end], y[begin:end], t[begin:end], p[begin:end], None, 3, 4, tau=tau)
            assert torch.equal(batch[window], alone)

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.integers(0, 40))
    def test_parts_one_after_the_other(self, lists, cut):
        x, y, t, p = tensors(lists)
        whole = fused(x, y, t, p, None, 3, 4)
        first, second = ([column[s] for column in (x, y, t, p)] for s in (slice(cut), slice(cut, None)))
        assert torch.equal(fused(*second, None, 3, 4, surface=fused(*first, None, 3, 4)), whole)


def load(recordings, name) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    with np.load(recordings / "npz" / f"{name}.npz") as file:
        return *(torch.from_numpy(file[key]) for key in "xytp"), int(file["height"]), int(file["width"])


@pytest.mark.parametrize("name", ["slider_depth", "dvs128_stripes", "evt3_expelliarmus", "dsec_000069"])
def test_real_recordings(recordings, name):
    *columns, height, width = load(recordings, name)
    last = eager(*columns, None, height, width)
    assert torch.equal(fused(*columns, None, height, width), last)
    tau = 30_000.0
    exact, rounded = (decayed(last, columns[2].max(), tau, "exponential", d) for d in (torch.float64, torch.float32))
    assert_matches(fused(*columns, None, height, width, tau=tau), exact, rounded)
