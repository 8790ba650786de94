"""Kernels in data loaders' workers, forked or spawned: the numbers of this process, whose threads they lack."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from evkernels.events import EventBatch, read
from evkernels.nn import StackedHistogram, TimeSurface, VoxelGrid

NAMES = ("dsec_000069", "evt2_expelliarmus", "slider_depth")
WINDOWS = 4


class Windows(Dataset):
    """Representations of windows of real recordings, which each worker reads for itself."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return len(NAMES) * WINDOWS

    def __getitem__(self, number):
        events = read(self.folder / "npz" / f"{NAMES[number // WINDOWS]}.npz")
        windows = list(events.windows(count=-(-len(events) // WINDOWS)))
        batch, sizes = EventBatch.of(windows[number % WINDOWS :][:1]), (events.height, events.width)
        modules = VoxelGrid(5, *sizes, normalize="e2vid"), StackedHistogram(4, *sizes), TimeSurface(*sizes, tau=5e4)
        return [module(batch)[0] for module in modules]


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}))
def test_workers_make_the_same_numbers(recordings, method):
    """Also where the parent has run kernels on several threads before, whose pool a fork does not inherit."""
    data, threads = Windows(recordings), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [data[number] for number in range(len(data))]
        options = {"multiprocessing_context": method, "persistent_workers": True, "timeout": 120}
        loader = DataLoader(data, batch_size=None, num_workers=2, **options)
        for _ in range(2):
            for actual, own in zip(loader, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(actual, own, strict=True))
    finally:
        torch.set_num_threads(threads)
