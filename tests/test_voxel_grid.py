"""voxel_grid: the contract of every op, and what is special to this one."""

from functools import partial

import pytest
import torch
from contract import DifferentiableOpContract, to_device
from event_histograms import INTEGERS, strided
from repeated_memory import REPEATED, repeated_memory
from voxel_grids import CONVENTIONS, eager, events, fused

from evkernels import ops, reference
from evkernels.backends import has_compiled_kernel
from evkernels.nn import EventNormalization
from evkernels.testing import assert_matches


def sample(count, bins, height, width, convention, bounds, dtype, layout, sub_pixel=False, float_time=False, seed=0):
    x, y, t, p = events(count, height, width, seed=seed, dtype=dtype if sub_pixel else torch.int16)
    generator = torch.Generator().manual_seed(seed + 1)
    if float_time:
        t = (torch.rand(count, generator=generator, dtype=dtype) * 5).sort().values
    weight = torch.randn(count, generator=generator, dtype=dtype)
    x, y, weight, p = (strided(column, layout) for column in (x, y, weight, p))
    return (
        x,
        y,
        strided(t, "every_second" if layout != "contiguous" else layout),
        weight,
        p,
        bounds,
        bins,
        height,
        width,
        convention,
    )


class TestVoxelGrid(DifferentiableOpContract):
    dtypes = (torch.float32, torch.float64)
    layouts = ("contiguous", "every_second", "expanded")
    has_backward = False

    def op(self, *arguments):
        return fused(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        # Many events of one pixel: products of matrices sum them in a tree, others one after the other.
        return [partial(eager, parts=1000)]

    def samples(self, dtype, layout, large):
        rest = dtype, layout
        many = large and layout == "contiguous"
        return [
            sample(14, 3, 4, 5, "dsec", [0, 6, 14], *rest, sub_pixel=True, float_time=True),
            sample(1, 1, 1, 1, "dsec", None, *rest, sub_pixel=True, float_time=True),
            sample(37, 3, 5, 7, "openeb", None, *rest, float_time=True, seed=2),
            *[sample(30_000, 10, 20, 30, "tonic", [0, 10_000, 29_000, 30_000], *rest)] * many,
            *[sample(20_000, 5, 20, 31, "dsec", None, *rest, sub_pixel=True)] * many,
            sample(600, 2, 4, 3, "e2vid", [0, 0, 211, 212, 600, 600], *rest),
            sample(600, 4, 6, 5, "e2vid", None, *rest),
            *[sample(50_000, 5, 40, 40, "e2vid", None, *rest)] * many,
        ]

    def typical(self, dtype, layout):
        return [sample(1024, 10, 16, 32, convention, None, dtype, layout) for convention in ("e2vid", "dsec")]

    def empty_samples(self):
        none = events(0)
        weight = torch.zeros(0)
        columns = *none[:3], weight, none[3]
        floating = torch.zeros(0), torch.zeros(0), torch.zeros(0), weight, none[3]
        return [
            (*columns, None, 3, 2, 4),
            (*columns, [0, 0, 0], 3, 2, 4),
            (*columns, [0], 3, 2, 4, "eseg_split"),
            (*floating, [0, 0], 3, 2, 4, "dsec"),
        ]

    @pytest.mark.parametrize("convention", CONVENTIONS)
    @pytest.mark.parametrize("time", [torch.int64, torch.int32, torch.float64, torch.float32])
    @pytest.mark.parametrize("bins", [1, 2, 5])
    def test_conventions(self, backend, convention, time, bins):
        for bounds, ordered in ((None, True), ([0, 100, 100, 250, 300], False)):
            x, y, t, p = events(300, ordered=ordered, start=10**6, seed=bins)
            weight = torch.rand(300, generator=torch.Generator().manual_seed(3))
            for factor in (None, weight, weight.double()):
                check(backend, x, y, t.to(time), factor, p, bounds, bins, 7, 9, convention)

    @pytest.mark.parametrize("convention", CONVENTIONS)
    @pytest.mark.parametrize("duration", [1, 9, 10, 1000, 10**9, 10**15])
    def test_borders_of_bins(self, backend, convention, duration):
        """Events on the borders of the bins, at 1.6e15 us, where float32 and float64 of the raw time would be wrong."""
        t = torch.cat([torch.arange(11) * (duration // 10), torch.tensor([0, duration])]).sort().values
        x, y, _, p = events(t.numel(), 1, 3)
        check(backend, x, y, t + 1_600_000_000_000_000, None, p, None, 5, 1, 3, convention)

    @pytest.mark.parametrize("convention", CONVENTIONS)
    @pytest.mark.parametrize("t", [[5], [7, 7, 7], [-3, -2, 5], [3, 1, 2], [1, 2, 0], [0, 2**60]])
    def test_few_events(self, backend, convention, t):
        x, y, _, p = events(len(t), 2, 3)
        check(backend, x, y, torch.tensor(t), None, p, None, 4, 2, 3, convention)

    def test_times_beyond_63_bits_apart(self, backend):
        """Any bin or none, no crash."""
        for t in ([-(2**63), 0, 2**63 - 1], [2**63 - 1, -(2**63)]):
            x, y, _, p = events(len(t), 2, 3)
            grid = fused(
                *(to_device((x, y, torch.tensor(t)), backend.device)), None, p.to(backend.device), None, 4, 2, 3
            )
            assert grid.isfinite().all()

    @pytest.mark.parametrize("integer", INTEGERS)
    def test_drops_events_out_of_range(self, backend, integer):
        limits = torch.iinfo(integer)
        values = [v for v in (0, 8, 9, 10, 255, 2**32 + 1, -1, limits.min, limits.max) if limits.min <= v <= limits.max]
        pairs = [(a, b) for a in values for b in values] * 3
        x, y = (torch.tensor(column, dtype=integer) for column in zip(*pairs, strict=True))
        inside = torch.tensor([0 <= a < 9 and 0 <= b < 9 for a, b in pairs])
        t, p = torch.arange(len(pairs)), (torch.arange(len(pairs)) % 5 - 2).to(torch.int8)
        inside &= p.abs() <= 1
        # The events left out still tell the first and last time.
        kept_p = torch.where(inside, p, 2)
        expected = eager(
            torch.where(inside, x.long(), 0), torch.where(inside, y.long(), 0), t, None, kept_p, None, 3, 9, 9
        )
        columns = to_device((x, y, t, p), backend.device)
        actual, dropped = torch.ops.evkernels.voxel_grid(*columns, None, None, 3, 9, 9, "e2vid", False)
        torch.testing.assert_close(actual.cpu(), expected)
        assert dropped == (~inside).sum()

    def test_sub_pixel_events_at_the_border(self, backend):
        """Shares inside the image stay; from -1 outwards, and NaN, is out of range."""
        values = [-float("inf"), -1e9, -1.0, -0.75, 0.0, 0.25, 3.5, 4.0, 4.5, 5.0, 2.0**40, float("inf"), float("nan")]
        x = torch.tensor(values).repeat_interleave(len(values))
        y = torch.tensor(values).repeat(len(values))
        valid = (x > -1) & (x < 5) & (y > -1) & (y < 5)
        t, p = torch.arange(x.numel()), torch.ones(x.numel(), dtype=torch.bool)
        columns = to_device((x, y, t, p), backend.device)
        actual, dropped = torch.ops.evkernels.voxel_grid(*columns, None, None, 2, 5, 5, "dsec", False)
        expected = eager(torch.where(valid, x, -9), torch.where(valid, y, -9), t, None, p, None, 2, 5, 5, "dsec")
        torch.testing.assert_close(actual.cpu(), expected)
        assert dropped == (~valid).sum()

    def test_raises_on_events_out_of_range(self, backend):
        x, y, t, p = (column.to(backend.device) for column in events(100, dtype=torch.int32))
        arguments = {"bins": 2, "height": 7, "width": 9, "out_of_range": "raise"}
        ops.voxel_grid(x, y, t, p, **arguments)
        x[3], x[50], y[7] = -4, 65534, 7
        with pytest.raises(ValueError, match=r"3 of 100 events .*width = 9, got x from -4 to 65534.*y from 0 to 7"):
            ops.voxel_grid(x, y, t, p, **arguments)

    def test_unsorted_windows_between_sorted_ones(self, backend):
        order = torch.cat([torch.arange(300), 300 + torch.randperm(300), torch.arange(600, 900)])
        x, y, t, p = (column[order] for column in events(900, 4, 5))
        check(backend, x, y, t, None, p, [0, 300, 300, 600, 900], 3, 4, 5, "e2vid")

    def test_hot_pixel(self, backend):
        """Every hundredth event elsewhere; counts in hard bins are exact."""
        count = 4000 if backend.is_slow else 1_000_000
        x, t = (torch.arange(count) % 100 == 0).short(), torch.arange(count)
        columns = to_device((x, torch.zeros_like(x), t, torch.ones_like(x)), backend.device)
        grid = ops.voxel_grid(*columns, bins=4, height=1, width=2, convention="eseg")
        assert grid.sum() == count
        assert grid[:, 0, 1].tolist() == [count / 400] * 4

    def test_golden_values(self, backend):
        """Fifty events by formula, put into grids by the authors' code; sums weighted as their other golden values."""
        k = torch.arange(50)
        x, y, t, p = to_device(((7 * k) % 6, (5 * k) % 4, 100 * k * k, (k * k % 3 == 1).long()), backend.device)
        shape = {"bins": 5, "height": 4, "width": 6}
        for grid, values, total, weighted in (
            (ops.voxel_grid(x, y, t, p, **shape), (0, -0.560600, 0.680133), 16, 1.075504),
            (ops.voxel_grid(x, y, t, p, **shape, normalize="e2vid"), (0, -0.900007, 0.411393), 0, 1.729588),
            (ops.voxel_grid(x, y, t, 2 * p - 1, **shape, convention="eseg"), (0, 0, 1), 16, 3.034139),
        ):
            flat = grid.cpu().double().flatten()
            torch.testing.assert_close(flat[[1, 60, -1]].tolist(), [float(v) for v in values], rtol=0, atol=1e-6)
            assert abs(flat.sum().item() - total) < 1e-5
            assert abs((flat * torch.cos(0.1 * torch.arange(120).double())).sum().item() - weighted) < 2e-6

    @pytest.mark.parametrize("normalize", ["e2vid", "dsec"])
    def test_normalization(self, backend, normalize):
        x, y, t, p = events(60, 3, 4)
        columns = to_device((x, y, t, p), backend.device)
        offsets = torch.tensor([0, 0, 1, 20, 60], device=backend.device)
        shape = {"bins": 3, "height": 3, "width": 4, "offsets": offsets}
        raw = ops.voxel_grid(*columns, **shape)
        actual = ops.voxel_grid(*columns, **shape, normalize=normalize)
        for before, after in zip(raw.cpu(), actual.cpu(), strict=True):
            filled = before != 0
            values = before[filled]
            if len(values) > 1:
                values = (values - values.mean()) / values.std(unbiased=normalize == "dsec")
            torch.testing.assert_close(after[filled], values - values.mean(), rtol=1e-5, atol=1e-6)
            assert not after[~filled].any()

    @pytest.mark.parametrize("bounds", [None, [0, 0, 1, 20, 60]])
    def test_normalization_of_eseg_is_the_modules(self, backend, bounds):
        columns = to_device(events(60, 3, 4), backend.device)
        offsets = None if bounds is None else torch.tensor(bounds, device=backend.device)
        shape = {"bins": 3, "height": 3, "width": 4, "offsets": offsets}
        raw = ops.voxel_grid(*columns, **shape).view(-1, 3, 3, 4)
        actual = ops.voxel_grid(*columns, **shape, normalize="eseg")
        torch.testing.assert_close(actual, EventNormalization()(raw).view(actual.shape))

    @pytest.mark.parametrize("normalize", ["e2vid", "eseg"])
    def test_normalization_is_the_same_for_any_number_of_threads(self, normalize):
        columns = events(200_000, 200, 300)
        threads = torch.get_num_threads()
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.voxel_grid(*columns, bins=5, height=200, width=300, normalize=normalize))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.parametrize("convention", CONVENTIONS)
    @pytest.mark.parametrize(("height", "width"), [(200, 300), (181, 243)])
    def test_large_windows_are_the_same_for_any_number_of_threads(self, convention, height, width):
        """Two large windows, the second unsorted, and an empty one; planes of even and odd numbers of pixels."""
        dtype = torch.float32 if convention == "dsec" else torch.int16
        x, y, t, p = events(350_000, height, width, dtype=dtype)
        t[300_000] = 0
        shape = {"bins": 5, "height": height, "width": width, "convention": convention}
        offsets = torch.tensor([0, 200_000, 200_000, 350_000])
        threads = torch.get_num_threads()
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(ops.voxel_grid(x, y, t, p, **shape, offsets=offsets))
        torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results[1:])
        expected = reference.voxel_grid(x, y, t, p, **shape, offsets=offsets)
        torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_sum_of_a_window_does_not_depend_on_order_of_time(self, convention):
        """Sorted and shuffled events in the same order per pixel give the same bits on the compiled kernel; some events
        are out of range and some bins have none.
        """
        x, y, t, p = events(20_000, 20, 30)
        x[::1000] = 30
        t[9_000:] += 15_000
        rest = None, 9, 20, 30, convention
        order = (x.long() + 31 * y).argsort(stable=True)
        shuffled = fused(x[order], y[order], t[order], None, p[order], *rest)
        assert torch.equal(fused(x, y, t, None, p, *rest), shuffled)

    def test_large_sorted_windows_take_every_second_interval_first(self, backend):
        """So many events that the compiled kernel fills from the intervals between two bins: the same bits as unsorted
        events that come in that order, which are added one after the other.
        """
        if not backend.name.startswith("cpu-"):
            pytest.skip("intervals are the CPU's alone")
        x, y, t, p = events(80_000, 20, 900)
        x[::1000] = 900
        for convention, bins, shift in (("e2vid", 8, 0.0), ("tonic", 9, 0.0), ("openeb", 9, 0.5)):
            position = (t - t[0]).double() * bins / float(t[-1] - t[0]) - shift
            interval = position.floor().clamp(0 if convention == "openeb" else -1, 8)
            order = (interval % 2 == 0).long().argsort(stable=True)
            rest = None, 9, 20, 900, convention
            reordered = fused(x[order], y[order], t[order], None, p[order], *rest)
            assert torch.equal(fused(x, y, t, None, p, *rest), reordered)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_with_and_without_deterministic_algorithms(self, backend, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        x, y, t, p = events(500)
        for weight in (None, torch.rand(500)):
            check(backend, x, y, t, weight, p, [0, 500], 5, 7, 9, "tonic")

    def test_times_as_floats_or_integers(self, backend):
        x, y, t, p = to_device(events(300), backend.device)
        expected = fused(x, y, t, None, p, None, 5, 7, 9)
        assert torch.equal(fused(x, y, t.double(), None, p, None, 5, 7, 9), expected)

    @pytest.mark.slow
    def test_cells_beyond_32_bits(self):
        """The compiled CPU kernel, with 8.6 GB of output."""
        if not has_compiled_kernel("voxel_grid", "cpu"):
            pytest.skip("the compiled kernels are not built")
        x, y = torch.tensor([0, 0, 2**15 - 1, 2**15 - 1]), torch.tensor([0, 0, 2**16, 2**16])
        t, p = torch.tensor([0, 0, 9, 9]), torch.ones(4).char()
        with repeated_memory(1, 2**16 + 1, 2**15, dtype=torch.float32) as grid:
            ops.voxel_grid(x, y, t, p, bins=1, height=2**16 + 1, width=2**15, out=grid)
            assert grid.flatten()[2**31 + 2**15 - 1] == grid[0, 0, 0] == grid[0, -1, -1] == 2
            assert grid.view(-1)[: REPEATED // 4].count_nonzero() == 2

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": torch.zeros(3)}, TypeError, "x must be of dtype .*float32"),
            ({"x": torch.zeros(3), "convention": "dsec"}, TypeError, "y must be of dtype .*got torch.int16"),
            (
                {"x": torch.zeros(3), "y": torch.zeros(3).double(), "convention": "dsec"},
                TypeError,
                "y must be of the dtype",
            ),
            ({"t": torch.zeros(3, dtype=torch.float16)}, TypeError, "t must be of dtype"),
            ({"p": torch.zeros(3)}, TypeError, "p must be of dtype torch.bool or .*float32"),
            ({"t": torch.zeros(4, dtype=torch.int64)}, ValueError, r"t must be \[E\] like x = \(3,\), got \(4,\)"),
            ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[E\] like x = \(3,\), got \(4,\)"),
            ({"weight": torch.zeros(3).bfloat16()}, TypeError, "weight must be of dtype"),
            ({"weight": torch.zeros(3, device="meta")}, ValueError, "weight must be on the device of x"),
            ({"bins": 0}, ValueError, r"bins must be in \[1, 16777216\], got 0"),
            ({"height": -1}, ValueError, "height must be in"),
            ({"convention": "evlib"}, ValueError, "convention must be one of \"e2vid\", .*got 'evlib'"),
            ({"normalize": "std"}, ValueError, "normalize must be .*'std'"),
            ({"out_of_range": "clamp"}, ValueError, "out_of_range must be .*'clamp'"),
            ({"offsets": torch.tensor([0, 4])}, ValueError, "got 0 and 4"),
        ],
    )
    def test_rejects(self, changes, error, message):
        x, y, t, p = events(3)
        arguments = {"x": x, "y": y, "t": t, "p": p, "bins": 2, "height": 7, "width": 9}
        with pytest.raises(error, match=message):
            ops.voxel_grid(**{**arguments, **changes})


def check(backend, x, y, t, weight, p, bounds, *rest):
    actual = fused(*to_device((x, y, t, weight, p), backend.device), bounds, *rest).cpu()
    widened = torch.ones(x.shape, dtype=torch.float64) if weight is None else weight.double()
    assert_matches(actual, eager(x, y, t, widened, p, bounds, *rest), eager(x, y, t, weight, p, bounds, *rest))
