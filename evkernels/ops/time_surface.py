"""Contract of `time_surface`: documentation, checks, schemas and shape rules."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, event_columns, registration
from evkernels.reference.time_surface import decayed, latest_time


def time_surface(
    x: Tensor,
    y: Tensor,
    t: Tensor,
    p: Tensor,
    *,
    height: int,
    width: int,
    polarities: Literal[1, 2] = 2,
    tau: float | None = None,
    decay: Literal["exponential", "linear"] = "exponential",
    at: int | Tensor | None = None,
    surface: Tensor | None = None,
    offsets: Tensor | None = None,
    out_of_range: Literal["drop", "raise"] = "drop",
    pixel_map: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Time of the last event at every pixel, or what is left of that event after a decay.

    Equivalent to::

        x, y, t, p = x.long(), y.long(), t.long(), (p > 0).long()
        never = torch.iinfo(torch.int64).min
        last = torch.full((polarities * height * width,), never) if surface is None else surface.flatten()
        plane = p if polarities == 2 else 0
        last = last.scatter_reduce(0, (plane * height + y) * width + x, t, "amax").view(polarities, height, width)
        if tau is not None:
            age = ((t.max() if at is None else at) - last).clamp(min=0).float() / tau
            left = torch.exp(-age) if decay == "exponential" else (1 - age).clamp(min=0)
            last = torch.where(last == never, 0, left)

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width.
        y: Rows [E], any integer dtype, 0 <= y < height.
        t: Timestamps [E], int64 or int32, in any unit and order.
        p: Polarities [E], bool or any integer dtype: 1 is ON, 0 and -1 are OFF, other values are out of range.
        height: Rows of the image, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the image, likewise.
        polarities: 2 gives OFF and ON events a surface each, in this order; 1 takes them together.
        tau: Time constant of the decay in the unit of `t`, a positive float32. None means no decay: the result is the
            time itself.
        decay: "exponential" leaves exp(-age / tau) of an event, "linear" max(0, 1 - age / tau).
        at: Time to which events decay: an int, or int64 [B] with one for each window. Events after it have age 0. None
            means the latest time of a window's events, those out of range included, and of its `surface`. Not without
            `tau`.
        surface: Result of an earlier call without `tau` to go on from, int64, shaped like the result; written to only
            if it is `out`.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1]: window b is events offsets[b] to
            offsets[b + 1]. Starts with 0, ends with E, never decreases. None means one window and no batch dimension.
        out_of_range: "drop" leaves events out of range out. "raise" raises; on a GPU it waits for the result.
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] of the sensor: pixel (x, y) is cell
            y' * width + x' = pixel_map[y, x] of the image; events of pixels whose entry is outside the image, such as
            -1, are left out and are not out of range. One table is any chain of flip, crop, downsampling, rectification
            and removal of pixels, see `evkernels.events.pixel_map`. None: the sensor is the image.
        out: Takes the result: contiguous, of its shape, dtype and device, no input among them but, without
            `tau`, `surface` itself, which then goes on in place. It is returned.

    Returns:
        [polarities, height, width], or [B, polarities, height, width] with `offsets`. Without `tau` int64, the last
        time, -2**63 where no event came. With `tau` float32 in 0 to 1, 0 where no event came. Contiguous, never
        aliases the inputs.

    Raises:
        TypeError: if an argument is of another type or dtype.
        ValueError: if shapes or devices disagree, a number is out of its bounds, `at` comes without `tau`, `offsets` is
            no partition (on a GPU only looked at with out_of_range="raise"; a wrong one gives a wrong surface, never an
            invalid access), or with out_of_range="raise" if an event is out of range.

    Deterministic; times are equal for every backend, number of threads and order of the events. Not differentiable.
    Ages are subtracted as int64, exact also near 1.6e15, and only then rounded to float32; those beyond 2**63 wrap.
    Contiguous inputs are read in place, others are copied first.
    Source: Lagorce et al. 2017, HOTS (doi:10.1109/TPAMI.2016.2574707), eq. 2 and 3, at every pixel.
    """
    event_columns.check_events(x, y, t, p)
    checks.check_int("height", height, 1, 2**31 - 1)
    checks.check_int("width", width, 1, 2**31 - 1)
    checks.check_int("polarities", polarities, 1, 2)
    if out_of_range not in ("drop", "raise"):
        raise ValueError(f'out_of_range must be "drop" or "raise", got {out_of_range!r}')
    if offsets is not None:
        event_columns.check_offsets(offsets, x, look=out_of_range == "raise")
    windows = () if offsets is None else (offsets.shape[0] - 1,)
    if surface is not None:
        checks.check_tensor("surface", surface, (torch.int64,))
        checks.check_shape("surface", surface, (*windows, polarities, height, width), _SHAPE[len(windows)])
        checks.check_same_device("surface", surface, "x", x)
    if decay not in ("exponential", "linear"):
        raise ValueError(f'decay must be "exponential" or "linear", got {decay!r}')
    shape, dtype = (*windows, polarities, height, width), torch.int64 if tau is None else torch.float32
    if pixel_map is not None:
        event_columns.check_pixel_map(pixel_map, x)
    if out is not None:
        event_columns.check_out(out, x, shape, dtype)
    in_place = pixel_map is not None or out is not None
    result = torch.empty(shape, dtype=dtype, device=x.device) if in_place and out is None else out
    if tau is None:
        if at is not None:
            raise ValueError("at must be None without tau: the last times do not depend on it")
        if in_place:
            dropped = _into(x, y, t, p, offsets, pixel_map, surface, result)
        else:
            result, dropped = _forward(x, y, t, p, offsets, surface, polarities, height, width)
    else:
        _check_tau(tau)
        at = None if at is None else event_columns.one_per_window("at", at, windows[0] if windows else 1, x)
        linear = decay == "linear"
        if in_place:
            dropped = _decayed_into(x, y, t, p, offsets, pixel_map, surface, at, result, tau, linear)
        else:
            result, dropped = _decayed(x, y, t, p, offsets, surface, at, polarities, height, width, tau, linear)
    if out_of_range == "raise":
        event_columns.raise_if_dropped(dropped, x, y, p, height, width, pixel_map)
    return result


_SHAPE = ("[polarities, height, width]", "[B, polarities, height, width]")


def _check_tau(tau: object) -> None:
    if isinstance(tau, bool) or not isinstance(tau, int | float):
        raise TypeError(f"tau must be a float, got {type(tau).__name__}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= tau <= limits.max:
        raise ValueError(f"tau must be in [{limits.tiny:.4g}, {limits.max:.4g}], got {tau}")


def _fake_of(dtype: torch.dtype):
    def fake(x, y, t, p, offsets, surface, *rest):
        polarities, height, width = rest[-5:-2] if dtype.is_floating_point else rest
        windows = () if offsets is None else (offsets.shape[0] - 1,)
        return (
            torch.empty((*windows, polarities, height, width), dtype=dtype, device=x.device),
            torch.empty((), dtype=torch.int64, device=x.device),
        )

    return fake


_EVENTS = "Tensor x, Tensor y, Tensor t, Tensor p, Tensor? offsets, Tensor? surface"
_forward = registration.define(
    f"time_surface({_EVENTS}, int polarities, SymInt height, SymInt width) -> (Tensor surface, Tensor dropped)",
    reference=reference.time_surface_kernel,
    fake=_fake_of(torch.int64),
)
_decayed = registration.define(
    f"decayed_time_surface({_EVENTS}, Tensor? at, int polarities, SymInt height, SymInt width, float tau, bool linear)"
    " -> (Tensor surface, Tensor dropped)",
    reference=reference.decayed_time_surface_kernel,
    fake=_fake_of(torch.float32),
)


def _decayed_of_times(x, y, t, p, offsets, surface, at, polarities, height, width, tau, linear):
    last, dropped = _forward(x, y, t, p, offsets, surface, polarities, height, width)
    return decayed(last, latest_time(t, offsets, surface) if at is None else at, tau, linear), dropped


# Where the memory is fast, the passes over the surface in PyTorch cost little.
registration.define_composed(_decayed, _decayed_of_times)

_MAPPED = "Tensor x, Tensor y, Tensor t, Tensor p, Tensor? offsets, Tensor? pixel_map, Tensor? surface"
_into = registration.define(
    f"time_surface_into({_MAPPED}, Tensor(a!) out) -> Tensor dropped",
    reference=reference.time_surface_into_kernel,
    fake=lambda x, *rest: x.new_empty((), dtype=torch.int64),
)
_decayed_into = registration.define(
    f"decayed_time_surface_into({_MAPPED}, Tensor? at, Tensor(a!) out, float tau, bool linear) -> Tensor dropped",
    reference=reference.decayed_time_surface_into_kernel,
    fake=lambda x, *rest: x.new_empty((), dtype=torch.int64),
)
registration.define_composed(_into, partial(reference.time_surface_into_kernel, kernel=_forward))
registration.define_composed(_decayed_into, partial(reference.decayed_time_surface_into_kernel, kernel=_decayed))
