"""Contract of `voxel_grid`: documentation, checks, schema, shape rule and gradient."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, event_columns, registration
from evkernels.reference.pixel_map import look_up
from evkernels.reference.voxel_grid import CONVENTIONS, normalize_voxel_grid

NORMALIZATIONS = ("e2vid", "dsec", "eseg")


def voxel_grid(
    x: Tensor,
    y: Tensor,
    t: Tensor,
    p: Tensor,
    *,
    bins: int,
    height: int,
    width: int,
    convention: Literal["e2vid", "tonic", "dsec", "openeb", "event_utils", "eseg", "eseg_split"] = "e2vid",
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    out_of_range: Literal["drop", "raise"] = "drop",
    normalize: Literal["e2vid", "dsec", "eseg"] | None = None,
    pixel_map: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sums of polarities per time bin and pixel, each event shared between the two bins beside its time.

    Equivalent to::

        x, y, value = x.long(), y.long(), torch.where(p > 0, 1.0, -1.0)
        position = (t - t.min()).double() * (bins - 1) / (t.max() - t.min()).clamp(min=1)
        below = position.floor().long()
        past = (position - below).float()
        grid = torch.zeros((bins + 1) * height * width)
        grid.index_add_(0, (below * height + y) * width + x, value * (1 - past))
        grid.index_add_(0, ((below + 1) * height + y) * width + x, value * past)
        grid = grid.view(bins + 1, height, width)[:bins]

    The conventions differ in the position of an event, in what happens at the ends and in the value of p = 0, which
    is -1 like that of p = -1 if nothing else is said. With q = (t - t0) / (t1 - t0), t0 and t1 being the first and the
    last time of the window:

    - "e2vid": position (bins - 1) q, as above; the last event is all in the last bin.
    - "dsec": the same, and x and y may be floating: shared between the pixels around them as well.
    - "event_utils": the same as "e2vid", but p = 0 adds 0.
    - "tonic": position bins q; what belongs beyond the last bin is lost, of the last event everything.
    - "openeb": position bins q - 1/2; a position z from -1/2 to 0 is shared as |z| would be, beyond the last bin
      everything belongs to the last bin.
    - "eseg": position floor(bins q), at most bins - 1, so that each event is in one bin; p = 0 adds 0.
    - "eseg_split": the same bins, but ON and OFF events are counted in channels of their own.

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width. For "dsec" also float32 or float64, -1 < x < width: shared
            between the two columns beside it, parts outside are lost.
        y: Rows [E], integer like x, or of the dtype of x.
        t: Timestamps [E], int64, int32, or finite float64 or float32, in any unit and order.
        p: Polarities [E], bool or any integer dtype: 1, 0 or -1, other values are out of range.
        bins: Number of time bins, 1 to 2**24.
        height: Rows of the image, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the image, likewise.
        convention: Whose voxel grid, see above.
        weight: Factor of every event [E], float32 or float64.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1]: window b is events offsets[b] to
            offsets[b + 1]. Starts with 0, ends with E, never decreases. None means one window and no batch dimension.
        out_of_range: "drop" leaves events out of range out, though they count for the first and last time. "raise"
            raises; on a GPU it waits for the result.
        normalize: Subtracts from the cells of a window that are not 0 their mean and divides by their standard
            deviation, of the population ("e2vid") or unbiased ("dsec"). Where that is 0 or undefined only the mean is
            subtracted. Cells that are 0 stay 0. "eseg" is `evkernels.nn.EventNormalization`: each channel by itself,
            over the pixels where any channel is not 0.
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] of the sensor, for integer x and y: pixel
            (x, y) adds to cell y' * width + x' = pixel_map[y, x] of the image; events of pixels whose entry is outside
            the image, such as -1, are left out and are not out of range. One table is any chain of flip, crop,
            downsampling, rectification and removal of pixels, see `evkernels.events.pixel_map`. For "dsec" also float32
            [H, W, 2] of x' and y', DSEC's rectify_map: places between pixels, shared as floating x and y are. None: the
            sensor is the image.
        out: Takes the result, which then has no gradient: contiguous, of its shape, dtype and device, no input among
            them. It is returned.

    Returns:
        [bins, height, width], or [B, bins, height, width] with `offsets`, in the dtype of `weight` or float32; twice
        the channels for "eseg_split", those of ON first. Zeros where a window has no events. Contiguous, never aliases
        the inputs.

    Raises:
        TypeError: if an argument is of another type or dtype.
        ValueError: if shapes or devices disagree, a number is out of its bounds, a name is unknown, `offsets` is no
            partition (on a GPU only looked at with out_of_range="raise"; a wrong one gives a wrong grid, never an
            invalid access), or with out_of_range="raise" if an event is out of range.
        RuntimeError: if `out` comes with an input that requires gradients.

    Deterministic on the CPU, with the same bits for any number of threads: every cell is summed in the order of the
    events, but for cells of odd bins of large windows that are sorted by time, which take what is after their bin's
    time before what is before it. On a GPU the order of the float additions varies, except under
    torch.use_deterministic_algorithms, where integers of 2**-32 are summed instead, or with a `weight` PyTorch's sorted
    index_add. Differentiable with respect to floating x, y and t (t0 and t1 included) and `weight`. Integer times are
    subtracted as integers; the division and what follows is float64 up to the share of a bin. All-equal times count as
    t1 - t0 = 1, where some of the originals divide by 0; originals that take t0 and t1 from the first and last event of
    a sorted list agree.
    Source: Rebecq et al. 2019 (arXiv:1906.07165); Zhu et al. 2019 (arXiv:1812.08156); Gehrig et al. 2021 (DSEC,
    arXiv:2103.06011); tonic; OpenEB `event_volume`; Stoffregen et al. 2020 (arXiv:2003.09078); EfficientConvLSTM.
    """
    _check(x, y, t, p, weight, convention)
    for name, value, limit in (("bins", bins, 2**24), ("height", height, 2**31 - 1), ("width", width, 2**31 - 1)):
        checks.check_int(name, value, 1, limit)
    if out_of_range not in ("drop", "raise"):
        raise ValueError(f'out_of_range must be "drop" or "raise", got {out_of_range!r}')
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f'normalize must be "e2vid", "dsec", "eseg" or None, got {normalize!r}')
    if offsets is not None:
        event_columns.check_offsets(offsets, x, look=out_of_range == "raise")
    deterministic = torch.are_deterministic_algorithms_enabled()
    sorted_sum = deterministic and weight is not None and not x.is_cpu
    needs_reference = sorted_sum or registration.needs_reference()
    records = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, y, t, weight))
    if pixel_map is not None:
        event_columns.check_pixel_map(pixel_map, x, takes_places=convention == "dsec")
    if out is not None:
        _check_out(out, x, weight, offsets, bins, height, width, convention, records)
    if (pixel_map is None and out is None) or needs_reference or records:
        # Gradients are those of the events at the places that the map gives them.
        forward = reference.voxel_grid_kernel if needs_reference else _forward
        placed_x, placed_y, outside = look_up(x, y, p, pixel_map, height, width)
        arguments = weight, offsets, bins, height, width, convention, deterministic
        grid, dropped = forward(placed_x, placed_y, t, p, *arguments)
        dropped = dropped if outside is None else outside
        grid = grid if out is None else out.copy_(grid)
    else:
        shape, dtype = _shape_and_dtype(weight, offsets, bins, height, width, convention)
        grid = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
        dropped = _into(x, y, t, p, weight, offsets, pixel_map, grid, bins, convention, deterministic)
    if out_of_range == "raise":
        event_columns.raise_if_dropped(dropped, x, y, p, height, width, pixel_map)
    if normalize is None:
        return grid
    normalized = normalize_voxel_grid(grid, normalize)
    return normalized if out is None else out.copy_(normalized)


def _check(x: Tensor, y: Tensor, t: Tensor, p: Tensor, weight: Tensor | None, convention: str) -> None:
    if convention not in CONVENTIONS:
        names = ", ".join(f'"{name}"' for name in CONVENTIONS)
        raise ValueError(f"convention must be one of {names}, got {convention!r}")
    floating = (torch.float32, torch.float64)
    if convention == "dsec" and isinstance(x, Tensor) and x.is_floating_point():
        event_columns.check_events(x, y, t, p, coordinates=floating, times=floating)
        if y.dtype != x.dtype:
            raise TypeError(f"y must be of the dtype of x, {x.dtype}, got {y.dtype}")
    else:
        event_columns.check_events(x, y, t, p, times=floating)
    if weight is not None:
        checks.check_tensor("weight", weight, floating)
        checks.check_shape("weight", weight, x.shape, "[E] like x")
        checks.check_same_device("weight", weight, "x", x)


def _check_out(out, x, weight, offsets, bins, height, width, convention, records):
    shape, dtype = _shape_and_dtype(weight, offsets, bins, height, width, convention)
    event_columns.check_out(out, x, shape, dtype)
    if records or out.requires_grad:
        raise RuntimeError("out must come without gradients: neither it nor x, y, t or weight may require them")


def _shape_and_dtype(weight, offsets, bins, height, width, convention):
    windows = () if offsets is None else (offsets.shape[0] - 1,)
    channels = 2 * bins if CONVENTIONS[convention].split else bins
    return (*windows, channels, height, width), torch.float32 if weight is None else weight.dtype


def _fake(x, y, t, p, weight, offsets, bins, height, width, convention, deterministic):
    shape, dtype = _shape_and_dtype(weight, offsets, bins, height, width, convention)
    return (
        torch.empty(shape, dtype=dtype, device=x.device),
        torch.empty((), dtype=torch.int64, device=x.device),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:10]


def _gradient(ctx, grad, grad_dropped):
    if grad is None:
        return (None,) * 11
    grad_x, grad_y, grad_t, grad_weight = reference.voxel_grid_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return grad_x, grad_y, grad_t, None, grad_weight, *(None,) * 6


_forward = registration.define(
    "voxel_grid(Tensor x, Tensor y, Tensor t, Tensor p, Tensor? weight, Tensor? offsets, SymInt bins, SymInt height,"
    " SymInt width, str convention, bool deterministic) -> (Tensor grid, Tensor dropped)",
    reference=reference.voxel_grid_kernel,
    fake=_fake,
)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)

_into = registration.define(
    "voxel_grid_into(Tensor x, Tensor y, Tensor t, Tensor p, Tensor? weight, Tensor? offsets, Tensor? pixel_map,"
    " Tensor(a!) out, SymInt bins, str convention, bool deterministic) -> Tensor dropped",
    reference=reference.voxel_grid_into_kernel,
    fake=lambda x, *rest: x.new_empty((), dtype=torch.int64),
)
registration.define_composed(_into, partial(reference.voxel_grid_into_kernel, kernel=_forward))
