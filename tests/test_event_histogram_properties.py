"""event_histogram of any events, and of real recordings."""

import hashlib
from itertools import pairwise

import pytest
import torch
from event_histograms import eager, event_lists, fused, recorded, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from evkernels import ops, use_backend


class TestProperties:
    """For any events; on the CPU kernels or, without them, the reference."""

    @settings(max_examples=200, deadline=None)
    @given(event_lists(), st.integers(1, 6), st.randoms(use_true_random=False))
    def test_mass_and_permutation(self, lists, bins, random):
        x, y, t, p = tensors(lists)
        histogram = fused(x, y, t, p, None, bins, 3, 4)
        inside = (x >= 0) & (x < 4) & (y >= 0) & (y < 3) & (p <= 1)
        assert histogram.sum() == inside.sum()
        assert torch.equal(histogram, eager(x, y, t, p, None, bins, 3, 4))
        order = random.sample(range(len(x)), len(x))
        assert torch.equal(fused(x[order], y[order], t[order], p[order], None, bins, 3, 4), histogram)
        with use_backend("reference"):
            assert torch.equal(fused(x, y, t, p, None, bins, 3, 4), histogram)

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.lists(st.integers(0, 40), max_size=5))
    def test_batch_equals_its_windows(self, lists, cuts):
        x, y, t, p = tensors(lists)
        bounds = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
        batch = fused(x, y, t, p, torch.tensor(bounds), 3, 3, 4)
        for window, (begin, end) in enumerate(pairwise(bounds)):
            alone = fused(x[begin:end], y[begin:end], t[begin:end], p[begin:end], None, 3, 3, 4)
            assert torch.equal(batch[window], alone)

    @settings(max_examples=100, deadline=None)
    @given(event_lists(), st.integers(0, 40), st.integers(1, 255))
    def test_parts_add_up_and_cutoff_clamps(self, lists, cut, cutoff):
        """One time bin, where a part's own duration plays no role."""
        x, y, t, p = tensors(lists)
        whole = fused(x, y, t, p, None, 1, 3, 4)
        parts = [fused(x[s], y[s], t[s], p[s], None, 1, 3, 4) for s in (slice(cut), slice(cut, None))]
        assert torch.equal(parts[0] + parts[1], whole)
        assert torch.equal(fused(x, y, t, p, None, 1, 3, 4, cutoff), whole.clamp(max=cutoff))


RECORDINGS = (
    "slider_depth", "dynamic_rotation", "shapes_rotation", "dvs128_garfield", "dvs128_stripes", "aedat4_davis346",
    "evt2_expelliarmus", "evt3_expelliarmus", "dsec_000069", "dsec_000079", "dsec_000099", "ncars",
)  # fmt: skip


@pytest.mark.parametrize("name", RECORDINGS)
def test_real_recordings(recordings, name):
    """Equal to numpy's counts in RVT's configuration, and to the published hash of the counts per pixel."""
    x, y, t, p, height, width, facts = recorded(recordings, name)
    assert torch.equal(fused(x, y, t, p, None, 10, height, width, 10), eager(x, y, t, p, None, 10, height, width, 10))
    counts = ops.event_histogram(x, y, t, p, bins=1, height=height, width=width, dtype=torch.int32)
    assert hashlib.sha256(counts.numpy().tobytes()).hexdigest() == facts["hist_sha256"]
    assert torch.equal(fused(x, y, t, p, None, 1, height, width), counts.clamp(max=255).to(torch.uint8))
    offsets = torch.tensor([0, x.numel() // 3, x.numel()])
    assert torch.equal(fused(x, y, t, p, offsets, 5, height, width), eager(x, y, t, p, offsets, 5, height, width))
