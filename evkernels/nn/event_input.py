"""What representation modules accept as events: one place that turns every form into columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from numpy import ndarray

    from evkernels.events import EventBatch, Events

    EventInput = Tensor | Events | EventBatch | ndarray


def columns(
    x: EventInput, y: Tensor | None, p: Tensor | None, t: Tensor | None, offsets: Tensor | None
) -> tuple[Any, ...]:
    """Columns of events in the order of the ops.

    Args:
        x: Columns [E] of a sensor beside y, p, t and offsets; or alone Events, EventBatch or a structured NumPy array,
            see `evkernels.events.EventBatch.of`. NumPy arrays become tensors on the CPU, without a copy where possible.
        y, p, t: Rows, polarities, timestamps [E].
        offsets: int64 [B + 1] or None.

    Returns:
        x, y, t, p, offsets; offsets is None for one window without a batch dimension.

    Raises:
        TypeError: if x has another type, or columns are missing or given beside a whole.
    """
    others = {"y": y, "p": p, "t": t}
    if isinstance(x, Tensor):
        missing = [name for name, column in others.items() if column is None]
        if missing:
            raise TypeError(f"events given as columns must be x, y, p, t, got no {', '.join(missing)}")
        return x, y, t, p, offsets
    from evkernels.events import EventBatch

    given = [name for name, column in {**others, "offsets": offsets}.items() if column is not None]
    if given:
        raise TypeError(f"{type(x).__name__} holds all columns, but got {', '.join(given)} beside it")
    batch = x if isinstance(x, EventBatch) else EventBatch.of([x])
    return batch.x, batch.y, batch.t, batch.p, batch.offsets if batch is x else None
