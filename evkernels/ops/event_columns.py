"""Checks shared by the ops that take events as columns x, y, t, p, cut into windows by offsets."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from evkernels.ops import checks

INTEGERS = (
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip


def check_events(
    x: Tensor,
    y: Tensor,
    t: Tensor,
    p: Tensor,
    coordinates: Sequence[torch.dtype] = INTEGERS,
    times: Sequence[torch.dtype] = (),
) -> None:
    """Columns [E] of one length and device: x and y of `coordinates`, t int64, int32 or of `times`, p an integer."""
    checks.check_tensor("x", x, coordinates)
    checks.check_tensor("y", y, coordinates)
    checks.check_tensor("t", t, (torch.int64, torch.int32, *times))
    checks.check_tensor("p", p, (torch.bool, *INTEGERS))
    if x.dim() != 1:
        raise ValueError(f"x must be [E] with one dimension, got {tuple(x.shape)}")
    for name, column in (("y", y), ("t", t), ("p", p)):
        checks.check_shape(name, column, x.shape, "[E] like x")
        checks.check_same_device(name, column, "x", x)


def check_offsets(offsets: Tensor, x: Tensor, look: bool) -> None:
    """`offsets` [B + 1] cuts E events into windows; `look` reads its values on a GPU too."""
    checks.check_tensor("offsets", offsets, (torch.int64,))
    checks.check_same_device("offsets", offsets, "x", x)
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"offsets must be [B + 1] with one dimension, got {tuple(offsets.shape)}")
    # Values cannot be looked at while a graph is traced; the CPU kernel checks them again.
    if torch.compiler.is_compiling() or is_fake(offsets) or not (offsets.is_cpu or look):
        return
    first, last, steps = offsets[0].item(), offsets[-1].item(), offsets.diff()
    if first != 0 or last != x.numel():
        raise ValueError(f"offsets must start at 0 and end at E = {x.numel()}, got {first} and {last}")
    if (steps < 0).any():
        where = int((steps < 0).nonzero()[0])
        raise ValueError(f"offsets must never decrease, got {offsets[where : where + 2].tolist()} at {where}")


def one_per_window(name: str, value: object, windows: int, x: Tensor) -> Tensor:
    """A time for each window, int64 [B], from one or from an int for all."""
    if isinstance(value, Tensor):
        checks.check_tensor(name, value, (torch.int64,))
        checks.check_same_device(name, value, "x", x)
        checks.check_shape(name, value, (windows,), "[B]")
        return value
    checks.check_int(name, value, -(2**63), 2**63 - 1)
    return torch.full((windows,), value, dtype=torch.int64, device=x.device)


def check_pixel_map(pixel_map: Tensor, x: Tensor, takes_places: bool = False) -> None:
    """A map of the sensor's pixels: int32 [H, W] of cells, or, where it is taken, float32 [H, W, 2] of places."""
    checks.check_tensor("pixel_map", pixel_map, (torch.int32, *[torch.float32] * takes_places))
    checks.check_same_device("pixel_map", pixel_map, "x", x)
    if x.is_floating_point():
        raise TypeError(f"x and y must be integers beside a pixel_map, got {x.dtype}")
    size = tuple(pixel_map.shape)
    if pixel_map.is_floating_point():
        if len(size) != 3 or size[2] != 2 or 0 in size:
            raise ValueError(f"pixel_map of places must be [H, W, 2], got {size}")
    elif len(size) != 2 or 0 in size:
        raise ValueError(f"pixel_map of cells must be [H, W], got {size}")


def check_out(out: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """`out` can take the result in place."""
    checks.check_tensor("out", out, (dtype,))
    checks.check_same_device("out", out, "x", x)
    checks.check_shape("out", out, shape, "shaped like the result")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")


def raise_if_dropped(
    dropped: Tensor, x: Tensor, y: Tensor, p: Tensor, height: int, width: int, pixel_map: Tensor | None
) -> None:
    """For out_of_range="raise": with a map the limits are those of the sensor and not of the image."""
    count = int(dropped.item())
    if count:
        height, width = (height, width) if pixel_map is None else pixel_map.shape[:2]
        raise ValueError(describe_out_of_range(count, x, y, p, height, width))


def describe_out_of_range(dropped: int, x: Tensor, y: Tensor, p: Tensor, height: int, width: int) -> str:
    """The message of out_of_range="raise"."""
    limits = {"x": (x, f"0 <= x < width = {width}"), "y": (y, f"0 <= y < height = {height}"), "p": (p, "p in -1, 0, 1")}
    parts = []
    for name, (column, expected) in limits.items():
        column = column if column.is_floating_point() else column.to(torch.int64)
        low, high = (value.item() for value in column.aminmax())
        parts.append(f"{expected}, got {name} from {low} to {high}")
    return f"{dropped} of {x.numel()} events are out of range: x, y, p must be within {'; '.join(parts)}"
