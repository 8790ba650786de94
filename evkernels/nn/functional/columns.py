"""What the functions share: columns of events, which events count, times of windows.

Columns are checked as the ops check them; functions that hand them to an op first leave that to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evkernels.nn import event_input
from evkernels.ops import checks, event_columns
from evkernels.reference.event_histogram import window_of_event, window_times

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


def checked(
    x: EventInput,
    y: Tensor | None,
    t: Tensor | None,
    p: Tensor | None,
    offsets: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, y, t, p and offsets of events in any form.

    Raises:
        TypeError: if columns are missing, given beside a whole, or of another dtype.
        ValueError: if shapes or devices disagree, or a size is out of its bounds.
    """
    x, y, t, p, offsets = event_input.columns(x, y, p, t, offsets)
    event_columns.check_events(x, y, t, p)
    if offsets is not None:
        event_columns.check_offsets(offsets, x, look=False)
    checks.check_int("height", height, 1, 2**31 - 1)
    checks.check_int("width", width, 1, 2**31 - 1)
    return x, y, t, p, offsets


def contains(x: Tensor, y: Tensor, p: Tensor, height: int, width: int) -> Tensor:
    """Which events are within the sensor and have a polarity, bool [E]."""
    return (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)


def number_of_windows(offsets: Tensor | None) -> int:
    """B; events without offsets are one window."""
    return 1 if offsets is None else offsets.shape[0] - 1


def first_and_last(t: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """First and last time of every window [B], int64, anything where it has no events."""
    t = t.to(torch.int64)
    if offsets is None and t.shape[0]:
        return tuple(time.view(1) for time in t.aminmax())
    return window_times(t, window_of_event(t, offsets), number_of_windows(offsets))
