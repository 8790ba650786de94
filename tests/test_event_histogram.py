"""event_histogram: the contract of every op, and what is special to this one."""

from itertools import product

import pytest
import torch
from contract import OpContract
from event_histograms import INTEGERS, by_index, eager, eager_counts, events, fused, strided
from repeated_memory import REPEATED, repeated_memory
from torch import Tensor

from evkernels import ops
from evkernels.backends import has_compiled_kernel
from evkernels.reference.event_histogram import LARGEST_COUNT

# Widths around the limits of 16-bit columns.
WIDE = (2**15 - 1, 2**15, 40_000, 2**16 - 1, 2**16, 70_000)


class TestEventHistogram(OpContract):
    dtypes = INTEGERS
    layouts = ("contiguous", "every_second", "expanded")

    def op(self, *arguments):
        return fused(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        dtype = torch.int16 if dtype.is_floating_point else dtype
        samples = []
        for count, bins, height, width, bounds in (
            (37, 3, 5, 7, None),
            (1, 1, 1, 1, None),
            (600, 2, 4, 3, [0, 0, 211, 212, 600, 600]),
            (200, 4, 6, 5, None),
            *[(30_000, 10, 40, 70, [0, 10_000, 29_000, 30_000])] * (large and layout == "contiguous"),
            *[(50_000, 5, 40, 70, None)] * (large and layout == "contiguous"),
        ):
            columns = [strided(column, layout) for column in events(count, height, width, dtype)]
            samples.append((*columns, bounds and torch.tensor(bounds), bins, height, width))
        return samples

    def typical(self, dtype, layout):
        return [(*events(1024, 16, 32, torch.int16), bounds, 10, 16, 32) for bounds in (None, torch.tensor([0, 1024]))]

    def empty_samples(self):
        none = events(0)
        return [(*none, None, 3, 2, 4), (*none, torch.tensor([0, 0, 0]), 3, 2, 4), (*none, torch.tensor([0]), 3, 2, 4)]

    @pytest.mark.parametrize("duration", [0, 1, 9, 1000, 10**9, 1_600_000_000_000_000, 2**62])
    @pytest.mark.parametrize("bins", [1, 10, 64])
    def test_bins_of_extreme_times(self, backend, bins, duration):
        """Bin borders, float32 rounding of long durations, times that fill the window unevenly."""
        generator = torch.Generator().manual_seed(bins)
        inner = (torch.rand(200, generator=generator, dtype=torch.float64) * duration).long().clamp(0, duration)
        borders = torch.arange(bins + 1) * (duration // bins)
        t = torch.cat([inner, borders, torch.tensor([0, duration])]).sort().values + 1_600_000_000_000_000
        x, y, _, p = events(t.numel(), 1, 3)
        check(backend, x, y, t, p, None, bins, 1, 3)

    @pytest.mark.parametrize(
        "t",
        [
            [5],
            [7, 7, 7],
            [-3, -2, 5],
            [-(2**63), 2**63 - 1],
            [-(2**63), 0, 2**63 - 1],
            [2**63 - 1, -(2**63)],
            [3, 1, 2],
            [1, 2, 0],
        ],
    )
    def test_few_events(self, backend, t):
        """One event, equal times, times beyond 63 bits apart (any bin, no crash), the smallest disorder."""
        t = torch.tensor(t)
        x, y, _, p = events(t.numel(), 2, 3)
        if int(t.max()) - int(t.min()) < 2**63:
            check(backend, x, y, t, p, None, 4, 2, 3)
        else:
            actual = fused(*(v.to(backend.device) for v in (x, y, t, p)), None, 4, 2, 3)
            assert actual.sum() == t.numel()

    @pytest.mark.parametrize("time_dtype", [torch.int32, torch.int64])
    def test_unsorted_times_change_nothing(self, backend, time_dtype):
        count = 300 if backend.is_slow else 20_000
        x, y, t, p = events(count, 20, 30, start=10**6)
        t = t.to(time_dtype)
        expected = eager(x, y, t, p, None, 5, 20, 30)
        for order in (torch.randperm(count), torch.arange(count).flip(0), swapped(count, 0), swapped(count, count - 2)):
            shuffled = [column[order].to(backend.device) for column in (x, y, t, p)]
            assert torch.equal(fused(*shuffled, None, 5, 20, 30).cpu(), expected)

    def test_unsorted_windows_between_sorted_ones(self, backend):
        count = 900
        x, y, t, p = events(count, 4, 5)
        order = torch.cat([torch.arange(300), 300 + torch.randperm(300), torch.arange(600, 900)])
        check(backend, x[order], y[order], t[order], p[order], torch.tensor([0, 300, 300, 600, 900]), 3, 4, 5)

    @pytest.mark.parametrize(("height", "width"), [(3, 700), (45, 11), (33, 16), (70, 3)])
    def test_images_of_many_strips(self, backend, height, width):
        """Rows longer than a strip of a GPU kernel may be, strips that do and do not begin on whole words, and events
        out of range above, below and beside the strips.
        """
        x, y, t, p = events(1000, height, width)
        y[::37], y[5::41], x[::29], p[::31] = -1, height, width, 2
        offsets = torch.tensor([0, 400, 400, 401, 1000])
        for columns in ((x, y, t, p), (x, y, t, p.to(torch.int8))):
            check(backend, *columns, None, 2, height, width)
            check(backend, *columns, offsets, 3, height, width, 2)
        check(backend, x[1:], y[1:], t[1:], p[1:], None, 1, height, width)

    @pytest.mark.parametrize("count", [254, 255, 256, 300, 65_537])
    @pytest.mark.parametrize("cutoff", [None, 1, 10, 254])
    def test_counters_saturate(self, backend, count, cutoff):
        """All events but one on the same pixel, where RVT's uint8 counter wraps."""
        x = torch.full((count,), 2, dtype=torch.uint16)
        x[-1] = 0
        y, t = torch.zeros(count, dtype=torch.uint16), torch.arange(count)
        check(backend, x, y, t, torch.ones(count, dtype=torch.bool), None, 1, 1, 3, cutoff)

    @pytest.mark.parametrize("wide", [torch.int16, torch.int32, torch.float32])
    def test_wide_counters(self, backend, wide):
        """Beyond 255 in neighbouring cells, up to a cutoff of two bytes, and what lies between."""
        x, y, t, p = events(5_000 if backend.is_slow else 70_000, 2, 3)
        assert eager_counts(x, y, t, p, None, 1, 2, 3).max() > 300
        for bins, cutoff in ((1, None), (2, 300), (3, 1)):
            expected = eager_counts(x, y, t, p, None, bins, 2, 3)
            columns = [column.to(backend.device) for column in (x, y, t, p)]
            actual = ops.event_histogram(*columns, bins=bins, height=2, width=3, count_cutoff=cutoff, dtype=wide)
            assert actual.dtype == wide
            assert torch.equal(actual.cpu().long(), expected.clamp(max=cutoff or 2**31))

    @pytest.mark.parametrize("coordinates", [torch.int16, torch.uint16, torch.int32])
    @pytest.mark.parametrize("counter", [torch.uint8, torch.int32, torch.float32])
    def test_threads_that_share_a_window(self, same_threads_after, coordinates, counter):
        """One bin and fewer windows than threads: hot rows, events out of range, and one pixel with most events."""
        count, height, width = 150_001, 61, 83
        x, y, t, p = events(count, height, width, coordinates, ordered=False)
        y = torch.where(torch.arange(count) % 3 > 0, torch.full_like(y, 17), y)
        x[:70_000:2], y[90_000:90_100] = 5, height
        x[5_000], p[6_000] = width, 2
        if coordinates != torch.uint16:
            x[140_000], y[140_100] = -1, -1
        size = {"bins": 1, "height": height, "width": width, "dtype": counter}
        for offsets in (None, torch.tensor([0, 80_000, count]), torch.tensor([0, 0, 0, count])):
            expected = eager_counts(x, y, t, p, offsets, 1, height, width)
            for cutoff in (None, 77):
                for threads in (1, 2, 3, 5, 17):
                    torch.set_num_threads(threads)
                    actual = ops.event_histogram(x, y, t, p, count_cutoff=cutoff, offsets=offsets, **size)
                    assert torch.equal(actual.long(), expected.clamp(max=cutoff or LARGEST_COUNT[counter]))
        with pytest.raises(ValueError, match=f"{104 if coordinates != torch.uint16 else 102} of 150001 events"):
            ops.event_histogram(x, y, t, p, out_of_range="raise", **size)

    def test_threads_on_more_rows_than_int16_counts(self, same_threads_after):
        """Read as uint16, a negative y would be one of these rows."""
        count, height = 40_000, 65_535
        x, y, t, p = events(count, 1, 1, torch.int16)
        y[:300] = torch.arange(-300, 0, dtype=torch.int16)
        expected = eager_counts(x, y, t, p, None, 1, height, 1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with pytest.raises(ValueError, match=f"300 of {count} events"):
                ops.event_histogram(x, y, t, p, bins=1, height=height, width=1, dtype=torch.int32, out_of_range="raise")
            actual = ops.event_histogram(x, y, t, p, bins=1, height=height, width=1, dtype=torch.int32)
            assert torch.equal(actual.long(), expected)

    def test_two_byte_counters_saturate(self, backend):
        zeros = torch.zeros(32_769, dtype=torch.int64, device=backend.device)
        counts = ops.event_histogram(zeros, zeros, zeros, zeros, bins=1, height=1, width=3, dtype=torch.int16)
        assert counts.flatten().tolist() == [32_767, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize("values", [[0, 1], [-1, 1], [False, True], [0, 1, 2, 3, -2, 127, -128]])
    def test_polarities(self, backend, values):
        x, y, t, _ = events(70)
        for dtype in [torch.bool] if values[1] is True else [torch.int8, torch.int32, torch.int64]:
            p = torch.tensor(values, dtype=dtype).repeat(70)[:70]
            check(backend, x, y, t, p, None, 2, 7, 9)

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
            check(backend, by_index(x, order), by_index(y, order), t[order], p[order], None, 3, 9, 9)

    @pytest.mark.parametrize("coordinates", [torch.int16, torch.uint16])
    def test_wide_sensors(self, backend, coordinates):
        """Columns of 16 bits up to their last values, which mean other pixels or none when read with another sign."""
        high = torch.iinfo(coordinates).max
        values = [0, 32767, 32768, 39999, 65534, 65535, -1, 5]
        x = torch.tensor([value for value in values if value <= high] * 24)
        y = torch.arange(len(x)) % 4
        x, y = x.to(coordinates), y.to(coordinates)
        for width, polarities in (
            [(40_000, torch.int8)] if backend.is_slow else product(WIDE, (torch.int8, torch.uint8))
        ):
            p = torch.tensor([0, 1, -1, -2, 127, -128, 1, 0, 2]).repeat(22)[: len(x)].to(polarities)
            check(backend, x, y, torch.arange(len(x)), p, None, 2, 3, width)
            check(backend, y, x, torch.arange(len(x)), p, None, 2, width, 3)

    def test_counts_beyond_float32(self, backend):
        if backend.is_slow or backend.name == "reference":
            pytest.skip("17 million events take it too long")
        events = 2**24 + 3
        zero = torch.zeros(events, dtype=torch.int8)
        columns = zero, zero, zero.int(), zero
        columns = [column.to(backend.device) for column in columns]
        for dtype, largest in ((torch.int32, events), (torch.float32, 2**24), (torch.int16, 2**15 - 1)):
            counts = ops.event_histogram(*columns, bins=1, height=1, width=2, dtype=dtype)
            assert counts.flatten().tolist() == [largest, 0, 0, 0]

    def test_raises_on_events_out_of_range(self, backend):
        x, y, t, p = (column.to(backend.device) for column in events(100, dtype=torch.int32))
        arguments = {"bins": 2, "height": 7, "width": 9, "out_of_range": "raise"}
        assert torch.equal(ops.event_histogram(x, y, t, p, **arguments).cpu(), eager(x, y, t, p, None, 2, 7, 9))
        x[3], x[50], y[7] = -4, 65534, 7
        with pytest.raises(ValueError, match=r"3 of 100 events .*width = 9, got x from -4 to 65534.*y from 0 to 7"):
            ops.event_histogram(x, y, t, p, **arguments)
        shuffled = torch.randperm(100, device=x.device)
        with pytest.raises(ValueError, match="3 of 100 events"):
            ops.event_histogram(x[shuffled], y[shuffled], t[shuffled], p[shuffled], **arguments)

    @pytest.mark.slow
    @pytest.mark.parametrize("t", [[0, 1, 2, 3], [0, 3, 2, 3]], ids=["sorted", "unsorted"])
    def test_cells_beyond_32_bits(self, t):
        """The compiled CPU kernel, with 2.1 GB of output."""
        if not has_compiled_kernel("event_histogram", "cpu"):
            pytest.skip("the compiled kernels are not built")
        x, y = torch.tensor([0, 0, 2**15 - 1, 2**15 - 1]), torch.tensor([0, 0, 2**15 + 6, 2**15 + 6])
        p, shape = torch.tensor([0, 0, 1, 1]), {"bins": 1, "height": 2**15 + 7, "width": 2**15}
        with repeated_memory(2, 2**15 + 7, 2**15, dtype=torch.uint8) as histogram:
            ops.event_histogram(x, y, torch.tensor(t), p, **shape, out=histogram)
            assert histogram.numel() > 2**31
            assert histogram[0, 0, 0] == histogram[1, -1, -1] == 2
            assert histogram.view(-1)[:REPEATED].count_nonzero() == 2

    def test_golden_value(self, backend):
        """Fifty events by formula, counted by RVT's code; sums weighted as its authors' other golden values."""
        k = torch.arange(50)
        columns = ((7 * k) % 6, (5 * k) % 4, 100 * k * k, (k * k % 3 == 1).long())
        histogram = fused(*(column.to(backend.device) for column in columns), None, 5, 4, 6, 2).cpu().double().flatten()
        assert histogram.numel() == 240
        assert [histogram[1], histogram[120], histogram[-1]] == [0, 0, 1]
        assert histogram.sum() == 50
        weighted = (histogram * torch.cos(0.1 * torch.arange(240, dtype=torch.float64))).sum()
        assert abs(weighted.item() - 4.746258) < 1e-6

    def test_inside_functions_that_are_differentiated(self):
        columns = events(50)
        weight = torch.rand(6, 7, 9)
        expected = eager(*columns, None, 3, 7, 9).float()
        gradient = torch.func.grad(lambda w: (fused(*columns, None, 3, 7, 9) * w).sum())(weight)
        assert torch.equal(gradient, expected)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": torch.zeros(3)}, TypeError, "x must be of dtype .*float32"),
            ({"y": [1, 2, 3]}, TypeError, "y must be a torch.Tensor, got list"),
            ({"t": torch.zeros(3, dtype=torch.int16)}, TypeError, "t must be of dtype torch.int64 or torch.int32"),
            ({"p": torch.zeros(3)}, TypeError, "p must be of dtype torch.bool or .*float32"),
            ({"x": torch.zeros(1, 3, dtype=torch.int16)}, ValueError, r"x must be \[E\].*\(1, 3\)"),
            ({"t": torch.zeros(4, dtype=torch.int64)}, ValueError, r"t must be \[E\] like x = \(3,\), got \(4,\)"),
            ({"p": torch.zeros(3, dtype=torch.int8, device="meta")}, ValueError, "p must be on the device of x"),
            ({"bins": 0}, ValueError, r"bins must be in \[1, 16777216\], got 0"),
            ({"bins": 2.0}, TypeError, "bins must be an int, got float"),
            ({"height": -1}, ValueError, "height must be in"),
            ({"width": True}, TypeError, "width must be an int, got bool"),
            ({"count_cutoff": 256}, ValueError, r"count_cutoff must be in \[1, 255\], got 256"),
            (
                {"count_cutoff": 2**24 + 1, "dtype": torch.float32},
                ValueError,
                r"count_cutoff must be in \[1, 16777216\]",
            ),
            ({"dtype": torch.int64}, TypeError, "dtype must be torch.uint8 or .*, got torch.int64"),
            ({"dtype": "uint8"}, TypeError, "dtype must be torch.uint8 or .*, got uint8"),
            ({"count_cutoff": 0}, ValueError, "count_cutoff must be in"),
            ({"out_of_range": "clamp"}, ValueError, "out_of_range must be .*'clamp'"),
            ({"offsets": torch.tensor([0, 3], dtype=torch.int32)}, TypeError, "offsets must be of dtype torch.int64"),
            ({"offsets": torch.tensor([[0, 3]])}, ValueError, r"offsets must be \[B \+ 1\]"),
            ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, r"offsets must be \[B \+ 1\]"),
            ({"offsets": torch.tensor([1, 3])}, ValueError, "offsets must start at 0 and end at E = 3, got 1 and 3"),
            ({"offsets": torch.tensor([0, 4])}, ValueError, "got 0 and 4"),
            ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, r"never decrease, got \[2, 1\] at 1"),
        ],
    )
    def test_rejects(self, changes, error, message):
        x, y, t, p = events(3)
        arguments = {"x": x, "y": y, "t": t, "p": p, "bins": 2, "height": 7, "width": 9}
        with pytest.raises(error, match=message):
            ops.event_histogram(**{**arguments, **changes})

    def test_registered_op_checks_offsets_again(self):
        """Compiled graphs skip the look at the values of offsets."""
        if not has_compiled_kernel("event_histogram", "cpu"):
            pytest.skip("the compiled kernels are not built")
        for offsets in ([0, 4], [0, 9, 3], [-1, 3]):
            with pytest.raises(RuntimeError, match="offsets must start at 0"):
                torch.ops.evkernels.event_histogram(*events(3), torch.tensor(offsets), 2, 7, 9, 255, 8)


def check(backend, x, y, t, p, *rest):
    actual = fused(*(None if v is None else v.to(backend.device) for v in (x, y, t, p, rest[0])), *rest[1:])
    assert torch.equal(actual.cpu(), eager(x, y, t, p, *rest))


def swapped(count: int, first: int) -> Tensor:
    """Event order with `first` and the last event exchanged."""
    order = torch.arange(count)
    order[first], order[count - 1] = count - 1, first
    return order
