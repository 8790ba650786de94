"""voxel_grid of any events, and of real recordings by the published formula."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from event_histograms import event_lists, recorded, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from voxel_grids import CONVENTIONS, fused

from evkernels import ops, use_backend


class TestProperties:
    """For any events; on the CPU kernels or, without them, the reference."""

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.integers(1, 6), st.sampled_from(CONVENTIONS), st.lists(st.integers(0, 40), max_size=4))
    def test_matches_reference_and_windows(self, lists, bins, convention, cuts):
        x, y, t, p = tensors(lists)
        bounds = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
        batch = fused(x, y, t, None, p, bounds, bins, 3, 4, convention)
        with use_backend("reference"):
            torch.testing.assert_close(batch, fused(x, y, t, None, p, bounds, bins, 3, 4, convention))
        for window, (begin, end) in enumerate(pairwise(bounds)):
            part = slice(begin, end)
            alone = fused(x[part], y[part], t[part], None, p[part], None, bins, 3, 4, convention)
            assert torch.equal(batch[window], alone)

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.integers(1, 6), st.integers(0, 40))
    def test_mass_and_parts(self, lists, bins, cut):
        """The sum is that of the polarities; two halves of the weights add up."""
        x, y, t, p = tensors(lists)
        inside = (x >= 0) & (x < 4) & (y >= 0) & (y < 3) & (p <= 1)
        for convention in ("e2vid", "openeb", "eseg_split"):
            signs = torch.ones_like(p) if convention == "eseg_split" else torch.where(p == 1, 1, -1)
            grid = fused(x, y, t, torch.ones(len(x)).double(), p, None, bins, 3, 4, convention)
            torch.testing.assert_close(grid.sum(), signs[inside].sum().double())
            first = (torch.arange(len(x)) < cut).double()
            halves = [fused(x, y, t, part, p, None, bins, 3, 4, convention) for part in (first, 1 - first)]
            torch.testing.assert_close(halves[0] + halves[1], grid)


RECORDINGS = ("slider_depth", "dvs128_garfield", "aedat4_davis346", "evt2_expelliarmus", "evt3_expelliarmus", "ncars")


@pytest.mark.parametrize("name", RECORDINGS)
def test_real_recordings(recordings, name):
    """The published NumPy formula, float64 sums; every event counted."""
    x, y, t, p, height, width, facts = recorded(recordings, name)
    position = 4 * (t - t.min()).numpy().astype(np.float64) / max(int(t.max() - t.min()), 1)
    below = position.astype(np.int64)
    value = np.where(p.numpy() == 1, 1.0, -1.0)
    expected = np.zeros((6, height, width))
    index = y.numpy().astype(np.int64), x.numpy().astype(np.int64)
    np.add.at(expected, (below, *index), value * (1 - (position - below)))
    np.add.at(expected, (below + 1, *index), value * (position - below))
    actual = ops.voxel_grid(x, y, t, p, bins=5, height=height, width=width, out_of_range="raise")
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected[:5]), rtol=1e-5, atol=1e-4)
    counts = ops.voxel_grid(x, y, t, p, bins=5, height=height, width=width, convention="eseg_split")
    assert counts.double().sum() == facts["n"]
