"""Last times per cell in Triton: one program takes BLOCK events and raises their cells by int64 atomic maxima."""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import launch
from torch import Tensor

from evkernels.reference.event_histogram import window_of_event
from evkernels.reference.time_surface import NEVER

BLOCK = 1024


@triton.jit
def time_surface_keep_kernel(
    x_ptr, y_ptr, t_ptr, p_ptr, window_ptr, surface_ptr, dropped_ptr,
    events, height, width, POLARITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    event = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = event < events
    x = tl.load(x_ptr + event, mask).to(tl.int64)
    y = tl.load(y_ptr + event, mask).to(tl.int64)
    p = tl.load(p_ptr + event, mask).to(tl.int64)
    t = tl.load(t_ptr + event, mask).to(tl.int64)
    plane = tl.zeros_like(event)
    if window_ptr is not None:
        plane = tl.load(window_ptr + event, mask, other=0) * POLARITIES
    if POLARITIES == 2:
        plane += (p > 0).to(tl.int64)
    valid = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)
    tl.atomic_max(surface_ptr + (plane * height + y) * width + x, t, mask=valid, sem="relaxed")
    tl.atomic_add(dropped_ptr, tl.sum((mask & ~valid).to(tl.int64), axis=0), sem="relaxed")


def time_surface(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, surface: Tensor | None,
    polarities: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (polarities, height, width) if offsets is None else (offsets.numel() - 1, polarities, height, width)
    if surface is None:
        last = torch.full(shape, NEVER, dtype=torch.int64, device=x.device)
    else:
        last = surface.clone(memory_format=torch.contiguous_format)
    dropped = torch.zeros((), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return last, dropped
    x, y, t = x.contiguous(), y.contiguous(), t.contiguous()
    p = (p.view(torch.uint8) if p.dtype == torch.bool else p).contiguous()
    window = None if offsets is None else window_of_event(t, offsets)
    launch(time_surface_keep_kernel, triton.cdiv(x.numel(), BLOCK))(
        x, y, t, p, window, last, dropped, x.numel(), height, width, POLARITIES=polarities, BLOCK=BLOCK
    )
    return last, dropped
