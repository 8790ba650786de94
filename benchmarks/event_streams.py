"""The events that the representations are measured on: evenly spread ones, real recordings, a batch of small samples.

Evenly spread events are the worst case for caches; real ones have edges, noise and hot pixels. Recordings are read from
the folder that EVKERNELS_DATA names and are left out where there is none.
"""

import os
import zipfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

START_US = 1_600_000_000_000_000
_FOLDER = Path(os.environ.get("EVKERNELS_DATA", "no recordings"))


class Stream(NamedTuple):
    """Events of a sensor; `height` and `width` are the sensor's, `bins` those of the representation."""

    events: int
    height: int
    width: int
    bins: int = 0
    # A recording's name; empty: evenly spread.
    name: str = ""
    # More than 1: a batch of so many N-MNIST samples.
    windows: int = 1

    @property
    def label(self) -> str:
        bins = f" {self.bins} bin" if self.bins == 1 else ""
        if self.windows > 1:
            return f"{self.windows} N-MNIST samples"
        return f"{self.name or f'{self.events:.0e} events'} {self.width}x{self.height}{bins}"


def streams(bins: int = 0) -> tuple[Stream, ...]:
    """Evenly spread ones, then what is there of recordings: a street at 25 million events per second, a spinner with
    3,323 events on one pixel, and 256 samples of N-MNIST.
    """
    spread = [Stream(count, 480, 640, bins) for count in (10**5, 10**6, 10**7)] + [Stream(10**6, 720, 1280, bins)]
    recorded = {"evt3_expelliarmus": (219_596, 720, 1280), "evt2_expelliarmus": (539_481, 480, 640)}
    real = [Stream(*sizes, bins, name) for name, sizes in recorded.items() if (_FOLDER / f"npz/{name}.npz").exists()]
    if all(_archive(first).exists() for first in (1, 201)):
        real.append(Stream(sum(len(sample) for sample in _samples(256)), 34, 34, bins, windows=256))
    return (*spread, *real)


def columns(stream: Stream, duration_us: int = 50_000) -> tuple[Tensor, ...]:
    """x, y uint16, t int64, p uint8 and offsets, None for one window. `duration_us` is that of evenly spread events."""
    if stream.windows > 1:
        samples = _samples(stream.windows)
        # Five bytes per event: x, y, polarity and 23 bits of time.
        raw = np.concatenate(samples).astype(np.int64)
        x, y, t = raw[:, 0], raw[:, 1], (raw[:, 2] & 127) << 16 | raw[:, 3] << 8 | raw[:, 4]
        table = x.astype(np.uint16), y.astype(np.uint16), t, (raw[:, 2] >> 7).astype(np.uint8)
        offsets = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)
        return *(torch.from_numpy(column) for column in table), offsets
    if stream.name:
        with np.load(_FOLDER / f"npz/{stream.name}.npz") as file:
            return *(torch.from_numpy(file[name]) for name in "xytp"), None
    generator = np.random.default_rng(0)
    t = np.sort(generator.integers(0, duration_us, stream.events)) + START_US
    t[-1] = t[0] + duration_us
    x, y = (generator.integers(0, size, stream.events).astype(np.uint16) for size in (stream.width, stream.height))
    p = generator.integers(0, 2, stream.events).astype(np.uint8)
    return *(torch.from_numpy(column) for column in (x, y, t, p)), None


def by_window(function: Callable) -> Callable:
    """A function of x, y, t, p and more, called for each window of a batch: what users of others write as a loop."""

    # torch.compile would unroll the loop.
    @torch.compiler.disable
    def loop(x, y, t, p, offsets, *rest):
        parts = windows(offsets, x.shape[0])
        return torch.stack([function(x[part], y[part], t[part], p[part], *rest) for part in parts])

    def each(x, y, t, p, offsets, *rest):
        return function(x, y, t, p, *rest) if offsets is None else loop(x, y, t, p, offsets, *rest)

    return each


def structured(columns: tuple[Tensor, ...]) -> np.ndarray:
    """The events as tonic takes them."""
    types = [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "<i2")]
    table = np.empty(columns[0].shape[0], dtype=types)
    for (name, _), column in zip(types, columns, strict=True):
        table[name] = column.cpu().numpy()
    return table


def windows(offsets: Tensor | None, events: int) -> list[slice]:
    bounds = [0, events] if offsets is None else offsets.tolist()
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def _archive(first: int) -> Path:
    return _FOLDER / f"nmnist/train_{first:04}-{first + 199:04}.zip"


@cache
def _samples(count: int) -> list[np.ndarray]:
    samples = []
    for first in range(1, count + 1, 200):
        with zipfile.ZipFile(_archive(first)) as archive:
            last = min(first + 199, count)
            files = [archive.read(f"{number}.bs2") for number in range(first, last + 1)]
        samples += [np.frombuffer(file, np.uint8).reshape(-1, 5) for file in files]
    return samples
