"""What reconstruction makes of events: voxel grids, grey levels, images of a stream."""

import numpy as np
import pytest
import torch
from small_videos import NETWORKS, simulated

from evkernels.events import Events
from evkernels.ops import voxel_grid
from evkernels.reconstruct.stream import IntensityRescaling, reflected, stream_images


@pytest.fixture(autouse=True)
def _one_thread(same_threads_after):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def events() -> Events:
    return simulated()


class TestVoxelGrid:
    @staticmethod
    def published_events() -> tuple[torch.Tensor, ...]:
        k = torch.arange(50)
        return (7 * k) % 6, (5 * k) % 4, 100 * k * k, (k * k % 3 == 1).long()

    @pytest.mark.parametrize(
        ("normalize", "three", "total", "weighted"),
        [
            (None, (0.0, -0.560600, 0.680133), 16.0, 1.075504),
            ("e2vid", (0.0, -0.900007, 0.411393), 0.0, 1.729588),
        ],
    )
    def test_values_of_the_original(self, normalize, three, total, weighted):
        grid = voxel_grid(*self.published_events(), bins=5, height=4, width=6, normalize=normalize)
        flat = grid.double().flatten()
        found = [*flat[[1, 60, -1]].tolist(), flat.sum().item()]
        found.append((flat * (0.1 * torch.arange(120, dtype=torch.float64)).cos()).sum().item())
        assert found == pytest.approx([*three, total, weighted], abs=4e-6)

    def test_times_since_1970_lose_nothing(self):
        x, y, t, p = self.published_events()
        grids = [voxel_grid(x, y, t + begin, p, bins=5, height=4, width=6) for begin in (0, 1_633_953_690_975_950)]
        assert torch.equal(*grids)

    @pytest.mark.parametrize("times", [[5], [5, 5, 5], []])
    def test_no_duration(self, times):
        t = torch.tensor(times, dtype=torch.int64)
        zeros, ones = torch.zeros_like(t), torch.ones_like(t)
        grid = voxel_grid(zeros, zeros, t, ones, bins=3, height=2, width=2)
        assert grid[0, 0, 0] == len(times)
        assert grid.sum() == len(times)
        assert (voxel_grid(zeros, zeros, t, ones, bins=3, height=2, width=2, normalize="e2vid") == 0).all()

    def test_normalised(self, events):
        grid = voxel_grid(*events.tensors(), bins=5, height=35, width=41)
        normal = voxel_grid(*events.tensors(), bins=5, height=35, width=41, normalize="e2vid")
        filled = normal[grid != 0].double()
        assert abs(filled.mean()) < 1e-6
        assert filled.std(correction=0) == pytest.approx(1, abs=1e-6)
        assert (normal[grid == 0] == 0).all()


class TestIntensityRescaling:
    def test_percentiles_become_black_and_white(self):
        image = torch.linspace(0.2, 0.9, 101).reshape(1, 101)
        grey = IntensityRescaling()(image)
        assert grey.dtype == np.uint8
        assert grey[0, :2].tolist() == [0, 0]
        assert grey[0, -2:].tolist() == [255, 255]
        assert 126 <= grey[0, 50] <= 129
        assert (np.diff(grey[0].astype(int)) >= 0).all()

    def test_noise_on_a_flat_scene_stays_faint(self):
        grey = IntensityRescaling()(0.5 + 0.001 * torch.randn(20, 20))
        assert int(grey.max()) - int(grey.min()) < 30

    def test_bounds_are_medians_of_the_last_images(self):
        dark, bright = (torch.linspace(0, high, 101).reshape(1, 101) for high in (0.6, 1.0))
        rescale = IntensityRescaling(images=3)
        first = rescale(dark)
        rescale(dark)
        expected = np.rint(np.clip((bright.numpy() - 0.006) / 0.588, 0, 1) * 255)
        assert np.abs(rescale(bright) - expected).max() <= 1
        rescale(bright)
        assert (rescale(dark) < first).any()

    def test_does_not_write_to_its_input(self):
        image = torch.rand(4, 4)
        before = image.clone()
        IntensityRescaling()(image)
        assert torch.equal(image, before)


class TestStream:
    @pytest.mark.parametrize("multiple", [1, 2, 8, 16])
    @pytest.mark.parametrize("size", [(16, 16), (35, 41), (33, 47)])
    def test_padding_reflects_and_crops(self, size, multiple):
        grid = torch.rand(1, 2, *size)
        padded, rows, columns = reflected(grid, multiple)
        assert all(extent % multiple == 0 for extent in padded.shape[2:])
        assert torch.equal(padded[:, :, rows, columns], grid)
        for axis, part in ((2, rows), (3, columns)):
            assert part.start - (padded.shape[axis] - part.stop) in (0, 1), "the larger half comes first"
        if rows.start:
            assert torch.equal(padded[:, :, rows.start - 1, columns], grid[:, :, 1])

    @pytest.mark.parametrize("name", NETWORKS)
    def test_images_have_the_size_of_the_sensor(self, name, events):
        torch.manual_seed(0)
        images = list(stream_images(NETWORKS[name]().eval(), events.windows(20_000)))
        assert [image.shape for image in images] == [(35, 41)] * 3
        assert all(image.isfinite().all() for image in images)

    def test_state_carries_the_past(self, events):
        model = NETWORKS["firenet"]().eval()
        first, second = list(events.windows(30_000))[:2]
        alone = next(stream_images(model, [second]))
        assert not torch.equal(list(stream_images(model, [first, second]))[1], alone)

    def test_windows_without_events(self, events):
        nothing = events.slice_time(-10, -5)
        images = list(stream_images(NETWORKS["firenet"]().eval(), [nothing, events, nothing]))
        assert all(image.isfinite().all() for image in images)
