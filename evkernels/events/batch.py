"""Several windows or samples of events in five tensors: one op call makes the representations of all of them.

Columns are joined end to end and `offsets` say where each window begins, as in a CSR matrix: nothing is padded, and a
window without events costs one number. torch is imported by what makes tensors and not on top, because the package
must import without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .container import Events

if TYPE_CHECKING:
    import torch

_COLUMNS = ("x", "y", "t", "p")
# Field names of structured arrays, as event libraries write them.
_FIELDS = {
    "x": ("x",),
    "y": ("y",),
    "t": ("t", "ts", "time", "timestamp"),
    "p": ("p", "pol", "polarity", "on"),
}


@dataclass(frozen=True, eq=False, repr=False)
class EventBatch:
    """B windows of events without padding.

    Args:
        x: Columns [E] of the events of all windows, one after the other, any integer dtype.
        y: Rows, likewise.
        t: Timestamps, int64 or int32 [E].
        p: Polarities, bool or any integer dtype [E].
        offsets: int64 [B + 1]: window b is events offsets[b] to offsets[b + 1].
        width, height: Sensor size in pixels; None where it is not known.

    Raises:
        TypeError: if a column is no tensor.
        ValueError: if shapes or devices disagree, or on the CPU if `offsets` is no partition of the events.
    """

    x: torch.Tensor
    y: torch.Tensor
    t: torch.Tensor
    p: torch.Tensor
    offsets: torch.Tensor
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        import torch

        for name in (*_COLUMNS, "offsets"):
            column = getattr(self, name)
            if not isinstance(column, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(column).__name__}")
            if column.dim() != 1:
                raise ValueError(f"{name} must have one dimension, got {list(column.shape)}")
            if column.device != self.t.device:
                raise ValueError(f"{name} must be on the device of t, {self.t.device}, got {column.device}")
            if name != "offsets" and column.numel() != self.t.numel():
                raise ValueError(f"{name} must be [E] with E = len(t) = {self.t.numel()}, got {list(column.shape)}")
        if self.offsets.dtype != torch.int64 or self.offsets.numel() == 0:
            raise ValueError(f"offsets must be int64 [B + 1], got {self.offsets.dtype} {list(self.offsets.shape)}")
        # A look at a GPU's memory would wait for it; the ops look themselves where they are told to.
        if self.offsets.is_cpu:
            first, last = self.offsets[0].item(), self.offsets[-1].item()
            if (first, last) != (0, self.t.numel()) or bool((self.offsets.diff() < 0).any()):
                raise ValueError(
                    f"offsets must start at 0, never decrease and end at E = {self.t.numel()}, got {first} to {last}"
                )

    @classmethod
    def of(cls, samples: Sequence[Any], width: int | None = None, height: int | None = None) -> EventBatch:
        """A batch of samples, one window each.

        Args:
            samples: Events, EventBatch or structured NumPy arrays [E] with fields x, y, t (ts, time, timestamp) and
                p (pol, polarity, on); or a mixture.
            width, height: Sensor size; None: the largest among the samples, as far as they know it.

        Returns:
            EventBatch on the CPU; coordinates in uint16 become int16, or int32 where one exceeds 32767. A single
            sample's columns are views where torch can hold them (contiguous, native byte order, writable), else copies;
            several are copied once, each column into one array.

        Raises:
            TypeError: for a sample of another kind, or a field that holds no integers.
            ValueError: if a field is missing.
        """
        parts = [_parts(sample) for sample in samples]
        lengths = [length for part in parts for length in part.lengths]
        columns = [_joined([part.columns[index] for part in parts], name) for index, name in enumerate(_COLUMNS)]
        known = [part.sensor for part in parts if part.sensor != (None, None)]
        largest = [max(sizes) for sizes in zip(*known, strict=True)] or (None, None)
        return cls(*columns, _offsets(lengths), width or largest[0], height or largest[1])

    def __len__(self) -> int:
        """The number of windows."""
        return self.offsets.numel() - 1

    def __getitem__(self, index: int | slice) -> EventBatch:
        """One window, as a batch of one, or a range of windows; columns are views."""
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"windows must be consecutive, got a step of {step}")
            end = max(begin, end)
        else:
            begin = range(len(self))[index]
            end = begin + 1
        offsets = self.offsets[begin : end + 1]
        first, last = offsets[0].item(), offsets[-1].item()
        columns = (getattr(self, name)[first:last] for name in _COLUMNS)
        return EventBatch(*columns, offsets - first, self.width, self.height)

    def __iter__(self) -> Iterator[EventBatch]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        sensor = "unknown sensor" if self.width is None else f"{self.width}x{self.height}"
        return f"EventBatch({len(self)} windows, {self.t.numel()} events, {sensor}, {self.t.device})"

    def to(self, device: str | torch.device, non_blocking: bool = False) -> EventBatch:
        """The batch on another device; itself if it is there. `non_blocking` as in torch.Tensor.to."""
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EventBatch:
        """The batch in page-locked memory; torch's DataLoader calls it when told to pin."""
        return self._each(lambda column: column.pin_memory())

    def _each(self, change) -> EventBatch:
        columns = [getattr(self, name) for name in (*_COLUMNS, "offsets")]
        changed = [change(column) for column in columns]
        if all(new is old for new, old in zip(changed, columns, strict=True)):
            return self
        return EventBatch(*changed, self.width, self.height)


def collate(samples: Sequence[Any]) -> Any:
    """Collates samples for torch's DataLoader: `DataLoader(dataset, collate_fn=collate)`.

    Args:
        samples: What the dataset returns: Events, EventBatch or structured arrays, alone or inside tuples, lists and
            dictionaries beside labels of any kind that torch collates.

    Returns:
        The same structure, with an EventBatch where the events were and torch's default elsewhere.
    """
    from torch.utils.data import _utils

    default = _utils.collate.default_collate_fn_map

    def batch(group, **_):
        return EventBatch.of(group)

    def arrays(group, **kwargs):
        events = group[0].dtype.names is not None
        return EventBatch.of(group) if events else default[np.ndarray](group, **kwargs)

    # Torch walks this map in order, so what is more special comes first.
    special = {Events: batch, EventBatch: batch, np.ndarray: arrays}
    others = {kind: function for kind, function in default.items() if kind is not np.ndarray}
    return _utils.collate.collate(samples, collate_fn_map={**special, **others})


@dataclass(frozen=True)
class _Parts:
    """Columns [E] of a sample as NumPy arrays in the order x, y, t, p, and the lengths of its windows."""

    columns: tuple[np.ndarray, ...]
    lengths: Sequence[int]
    sensor: tuple[int | None, int | None]


def _parts(sample: Any) -> _Parts:
    if isinstance(sample, Events):
        columns = tuple(getattr(sample, name) for name in _COLUMNS)
        return _Parts(columns, [len(sample)], (sample.width, sample.height))
    if isinstance(sample, EventBatch):
        columns = tuple(getattr(sample, name).cpu().numpy() for name in _COLUMNS)
        return _Parts(columns, sample.offsets.diff().tolist(), (sample.width, sample.height))
    if isinstance(sample, np.ndarray) and sample.dtype.names:
        columns = tuple(_field(sample, name) for name in _COLUMNS)
        return _Parts(columns, [len(sample)], (None, None))
    kind = f"an array of {sample.dtype}" if isinstance(sample, np.ndarray) else type(sample).__name__
    raise TypeError(f"events must be Events, EventBatch or a structured array with x, y, t, p, got {kind}")


def _field(table: np.ndarray, name: str) -> np.ndarray:
    found = next((field for field in _FIELDS[name] if field in table.dtype.names), None)
    if found is None:
        raise ValueError(f"events must have a field {' or '.join(_FIELDS[name])}, got {', '.join(table.dtype.names)}")
    if table.ndim != 1:
        raise ValueError(f"events must be [E] with one dimension, got {list(table.shape)}")
    column = table[found]
    if column.dtype.kind not in ("iub" if name == "p" else "iu"):
        raise TypeError(f"{name} must hold integers, got {column.dtype}")
    # Torch computes nothing in wide unsigned types, joining them with signed ones would make floats, and the ops take
    # times in two types.
    wide = column.dtype.name in ("uint32", "uint64") or (name == "t" and column.dtype.name not in ("int32", "int64"))
    return column.astype(np.int64) if wide else column


def _joined(columns: list[np.ndarray], name: str) -> torch.Tensor:
    import torch

    if len(columns) == 1:
        column = columns[0]
    elif columns:
        column = np.concatenate(columns)
    else:
        column = np.zeros(0, {"t": np.int64, "p": np.uint8}.get(name, np.int16))
    # Torch warns of arrays it must not write to; it holds no foreign byte orders and no strides of packed fields.
    column = _signed(np.require(column, column.dtype.newbyteorder("="), ["C", "ALIGNED", "WRITEABLE"]))
    return torch.from_numpy(column)


def _signed(column: np.ndarray) -> np.ndarray:
    """The column in a dtype that PyTorch can index, compute in and pickle; the same memory unless values forbid it."""
    if column.dtype != np.uint16:
        return column
    return column.view(np.int16) if column.max(initial=0) <= np.iinfo(np.int16).max else column.astype(np.int32)


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    import torch

    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets)
