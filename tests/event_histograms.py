"""event_histogram as a call of positions, the same in plain PyTorch, and events for both and for other ops."""

import json
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from evkernels import ops

INTEGERS = (
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip


def eager(x, y, t, p, offsets, bins, height, width, count_cutoff=None):
    counts = eager_counts(x, y, t, p, offsets, bins, height, width)
    return counts.clamp(max=255 if count_cutoff is None else count_cutoff).to(torch.uint8)


def eager_counts(x, y, t, p, offsets, bins, height, width):
    """Counts window by window with numpy's unbuffered addition; events out of range are left out."""
    bounds = [0, x.numel()] if offsets is None else offsets.tolist()
    x, y, t, p = (column.cpu().numpy().astype(np.int64) for column in (x, y, t, p))
    counts = np.zeros((len(bounds) - 1, 2, bins, height, width), np.int64)
    for window, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        times = t[begin:end]
        since = (times - times.min()).astype(np.float32)
        span = np.float32(max(times.max() - times.min(), 1))
        time_bin = np.minimum(np.floor(since / span * np.float32(bins)), bins - 1).astype(np.int64)
        columns = x[begin:end], y[begin:end], p[begin:end]
        inside = (columns[0] >= 0) & (columns[0] < width) & (columns[1] >= 0) & (columns[1] < height)
        inside &= np.isin(columns[2], (-1, 0, 1))
        index = (columns[2] > 0, time_bin, columns[1], columns[0])
        np.add.at(counts[window], tuple(part[inside].astype(np.int64) for part in index), 1)
    shape = (2 * bins, height, width)
    return torch.from_numpy(counts).view(shape if offsets is None else (len(bounds) - 1, *shape))


def fused(x, y, t, p, offsets, bins, height, width, count_cutoff=None):
    return ops.event_histogram(
        x, y, t, p, bins=bins, height=height, width=width, count_cutoff=count_cutoff, offsets=offsets
    )


def events(count, height=7, width=9, dtype=torch.int16, start=0, duration=5000, seed=0, ordered=True):
    """Random x, y in `dtype`, t int64 and p uint8."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, width, (count,), generator=generator).to(dtype)
    y = torch.randint(0, height, (count,), generator=generator).to(dtype)
    t = torch.randint(0, duration, (count,), generator=generator) + start
    p = torch.randint(0, 2, (count,), generator=generator).to(torch.uint8)
    return x, y, t.sort().values if ordered else t, p


def strided(column: Tensor, layout: str) -> Tensor:
    if layout == "every_second":
        return torch.stack([column, column], dim=1).flatten()[1::2]
    if layout == "expanded":
        return column[:1].expand(column.shape)
    return column


def by_index(column: Tensor, order: Tensor) -> Tensor:
    """column[order] for the unsigned dtypes too, which PyTorch does not index."""
    return torch.from_numpy(column.numpy()[order.numpy()])


@st.composite
def event_lists(draw):
    """Small event lists full of duplicates, coordinates out of range and disorder."""
    count = draw(st.integers(0, 40))
    column = lambda low, high: draw(st.lists(st.integers(low, high), min_size=count, max_size=count))  # noqa: E731
    start = draw(st.sampled_from([0, -50, 1_600_000_000_000_000]))
    return column(-1, 4), column(-1, 3), [start + step for step in column(0, 30)], column(-1, 2)


def recorded(recordings, name: str) -> tuple:
    """x, y, t, p of a recording, its height and width, and the published facts of it."""
    facts = json.loads((recordings / "facts.json").read_text())[name]
    with np.load(recordings / "npz" / f"{name}.npz") as file:
        columns = [torch.from_numpy(file[key]) for key in "xytp"]
        return *columns, int(file["height"]), int(file["width"]), facts


def tensors(lists) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(column, dtype=torch.int64) for column in lists)
