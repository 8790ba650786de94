"""Images of events made of the fused ops: event image, event-count image, Bina-Rep, RVT's mixed-density stack.

None of them has a kernel of its own: counting and finding the last event are the work, and the ops do it; what remains
are a few passes over an image. `mixed_density_event_stack` alone counts in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import event_input
from evkernels.nn.functional import columns
from evkernels.ops import checks
from evkernels.reference.event_histogram import window_of_event
from evkernels.reference.time_surface import NEVER

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput

Colour = tuple[int, int, int]
WHITE, BLUE, RED = (255, 255, 255), (0, 0, 255), (255, 0, 0)
# Sums of a mixed-density stack are int8.
LARGEST_SUM = 127


def event_image(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    height: int,
    width: int,
    palette: Tensor | Sequence[Colour] = (WHITE, BLUE, RED),
    offsets: Tensor | None = None,
) -> Tensor:
    """Colour image in which the last event of a pixel wins; EventGPT's picture of an event window.

    Equivalent to::

        never = torch.iinfo(torch.int64).min
        last = torch.full((2 * height * width,), never)
        off, on = last.scatter_reduce(0, (p * height + y) * width + x, t, "amax").view(2, height, width)
        index = torch.where(on >= off, 2, 1) * (torch.maximum(on, off) > never)
        image = torch.as_tensor(palette, dtype=torch.uint8)[index]

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width; or, in the place of x, y, t, p and offsets,
            `evkernels.events.Events`, `EventBatch` or a structured NumPy array with fields x, y, t, p.
        y: Rows [E], any integer dtype, 0 <= y < height.
        t: Timestamps [E], int64 or int32, in any unit and order.
        p: Polarities [E], bool or any integer dtype: 1 is ON, 0 and -1 are OFF, other values are out of range.
        height: Rows of the sensor.
        width: Columns of the sensor.
        palette: Red, green and blue, 0 to 255 each, of pixels without events, of OFF events and of ON events: three
            tuples, or uint8 [3, 3] on the device of the events.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1], see `evkernels.ops.time_surface`.

    Returns:
        uint8 [height, width, 3], or [B, height, width, 3] with `offsets` or EventBatch.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Events out of range are dropped. Deterministic: of two events of a pixel at the same time the ON event wins,
    whatever their order; EventGPT takes the later one in its arrays, and cuts the image to the largest coordinates. Not
    differentiable.
    """
    x, y, t, p, offsets = event_input.columns(x, y, p, t, offsets)
    palette = palette_of(palette, x.device)
    last = ops.time_surface(x, y, t, p, height=height, width=width, offsets=offsets)
    off, on = last.unbind(-3)
    # In bytes as long as possible, and not by indexing: 1 ms instead of 5 at 640x480.
    colour = ((on >= off).to(torch.uint8) + 1) * (torch.maximum(on, off) > NEVER)
    return nn.functional.embedding(colour.int(), palette)


def palette_of(colours: Tensor | Sequence[Colour], device: torch.device | None = None) -> Tensor:
    """Three colours as uint8 [3, 3]."""
    if isinstance(colours, Tensor):
        checks.check_tensor("palette", colours, (torch.uint8,))
        checks.check_shape("palette", colours, (3, 3), "three colours of three values")
        return colours
    if [len(colour) for colour in colours] != [3] * 3 or not all(0 <= value < 256 for c in colours for value in c):
        raise ValueError(f"colours must be red, green and blue in [0, 255], three times, got {tuple(colours)}")
    return torch.tensor(colours, dtype=torch.uint8, device=device)


def event_count_image(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    height: int,
    width: int,
    offsets: Tensor | None = None,
) -> Tensor:
    """Counts and last times of both polarities: EV-FlowNet's four channels.

    Equivalent to::

        cell = ((1 - p) * height + y) * width + x
        count = torch.bincount(cell, minlength=2 * height * width)
        since = (t - t.min()).float() / (t.max() - t.min()).clamp(min=1).float()
        last = torch.zeros(2 * height * width).scatter_reduce(0, cell, since, "amax")
        image = torch.cat([count, last]).view(4, height, width)

    Args:
        x, y, t, p, height, width, offsets: As for `event_image`.

    Returns:
        float32 [4, height, width], or [B, 4, height, width] with `offsets` or EventBatch: number of ON and of OFF
        events, up to 2**24, time of the last ON and of the last OFF event, 0 for the first event of the window to 1 for
        the last, those out of range included. Zeros where no event came.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Events out of range are dropped. Deterministic, in any order of the events. Not differentiable.
    Source: Zhu et al. 2018 (arXiv:1802.06898), section III-A.
    """
    x, y, t, p, offsets = event_input.columns(x, y, p, t, offsets)
    arguments = {"height": height, "width": width, "offsets": offsets}
    counts = ops.event_histogram(x, y, t, p, bins=1, dtype=torch.float32, **arguments)
    last = ops.time_surface(x, y, t, p, **arguments)
    first, final = (time.view(-1, 1, 1, 1) for time in columns.first_and_last(t, offsets))
    # Subtracted as integers: float32 cannot tell two microseconds of the same year apart.
    since = ((last - first).float() / (final - first).clamp(min=1).float()).view(last.shape)
    times = torch.where(last == NEVER, 0.0, since)
    return torch.cat([counts.flip(-3), times.flip(-3)], dim=-3)


def bina_rep(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    bits: int,
    height: int,
    width: int,
    frames: int = 1,
    offsets: Tensor | None = None,
) -> Tensor:
    """Bina-Rep: `bits` binary frames of consecutive times read as one number, the first as its most significant bit.

    Equivalent to::

        given = {"bins": frames * bits, "height": height, "width": width}
        binary = ops.event_histogram(x, y, t, p, count_cutoff=1, **given).view(2, frames, bits, height, width)
        number = (binary * 2 ** torch.arange(bits - 1, -1, -1)[:, None, None]).sum(dim=2)
        image = number.transpose(0, 1).float() / (2**bits - 1)

    Args:
        x, y, t, p, height, width, offsets: As for `event_image`.
        bits: Binary frames per number, 1 to 24. With 1 the result is the binary frame itself.
        frames: Results per window, one after the other in time.

    Returns:
        float32 [frames, 2, height, width] in 0 to 1, OFF before ON, or [B, frames, 2, height, width] with `offsets` or
        EventBatch.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Events out of range are dropped. Deterministic, in any order of the events. Not differentiable.
    Source: Barchid et al. 2022 (arXiv:2203.09991); the time bins are those of `evkernels.ops.event_histogram`.
    """
    check_bina_rep(bits, frames)
    x, y, t, p, offsets = event_input.columns(x, y, p, t, offsets)
    binary = ops.event_histogram(
        x, y, t, p, bins=frames * bits, height=height, width=width, count_cutoff=1, offsets=offsets
    )
    planes = binary.unflatten(-3, (2, frames, bits)).unbind(-3)
    number = planes[0].to(torch.uint8 if bits <= 8 else torch.int32)
    for plane in planes[1:]:
        number = 2 * number + plane
    return (number.float() / (2**bits - 1)).transpose(-4, -3)


def check_bina_rep(bits: int, frames: int) -> None:
    """Raises if no image can be made of so many bits and frames."""
    checks.check_int("bits", bits, 1, 24)
    checks.check_int("frames", frames, 1, 2**24 // bits)


def mixed_density_event_stack(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    bins: int,
    height: int,
    width: int,
    count_cutoff: int = LARGEST_SUM,
    offsets: Tensor | None = None,
) -> Tensor:
    """Sums of polarities over the whole window, its first half, its first quarter, ...: RVT's mixed-density stack.

    Equivalent to::

        share = (t - t.min()).float() / (t.max() - t.min()).clamp(min=1).float()
        age = share.clamp(1e-6, 1 - 1e-6).log() / math.log(1 / 2)
        cell = ((bins - age).clamp(0, bins - 1).long() * height + y) * width + x
        sums = torch.zeros(bins * height * width, dtype=torch.int32).index_add(0, cell, 2 * p.int() - 1)
        stack = sums.view(bins, height, width).cumsum(dim=0).clamp(-count_cutoff, count_cutoff).to(torch.int8)

    Args:
        x, y, t, p, height, width, offsets: As for `event_image`.
        bins: Number of sums. Bin b leaves the latest 1 - 0.5**(bins - 1 - b) of the window's time out.
        count_cutoff: Sums stop at plus and minus this value, 1 to 127.

    Returns:
        int8 [bins, height, width], or [B, bins, height, width] with `offsets` or EventBatch.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Events out of range are dropped. RVT sums in int8 and wraps beyond 127, and raises an IndexError from 33 bins on;
    here sums are exact, then limited, and the newest event stays in the last bin. Deterministic, in any order of the
    events. Not differentiable.
    Source: Gehrig and Scaramuzza 2023 (arXiv:2212.05598), `MixedDensityEventStack`.
    """
    checks.check_int("bins", bins, 1, 2**24)
    checks.check_int("count_cutoff", count_cutoff, 1, LARGEST_SUM)
    x, y, t, p, offsets = columns.checked(x, y, t, p, offsets, height, width)
    x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
    window = window_of_event(t, offsets)
    first, last = columns.first_and_last(t, offsets)
    # RVT's float32 operations in its order: they decide which bin an event on a border falls into.
    share = (t - first[window]).float() / (last - first).clamp(min=1)[window].float()
    age = torch.log(share.clamp(1e-6, 1 - 1e-6)) / math.log(1 / 2)
    time_bin = (bins - age).clamp(min=0).floor().clamp(max=bins - 1).long()

    shape = (bins, height, width) if offsets is None else (offsets.shape[0] - 1, bins, height, width)
    cells = torch.Size(shape).numel()
    cell = ((window * bins + time_bin) * height + y) * width + x
    # Dropped events go into one cell too many.
    cell = torch.where(columns.contains(x, y, p, height, width), cell, cells)
    sums = torch.zeros(cells + 1, dtype=torch.int32, device=x.device)
    sums.scatter_add_(0, cell, torch.where(p > 0, 1, -1).to(torch.int32))
    return sums[:cells].view(shape).cumsum(-3).clamp(-count_cutoff, count_cutoff).to(torch.int8)
