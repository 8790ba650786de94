"""Steps 1 and 2: histograms must be equal, every stage of the encoder must be as exact as plain PyTorch.

Each stage receives the same input, computed by the reference in float32, so that an error is that of the stage alone;
the last row is the network from end to end. The second window is the input, so that the recurrent state is not zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from evkernels import ops, use_backend
from evkernels.demo.comparison import Row, in_layout, judge, medians, running
from evkernels.demo.plain import histogram_forms, variant
from evkernels.events import Events
from evkernels.models import EventPredictor

BINS = 5
FORMS = ("fused", "fused, channels_last", "reference", "PyTorch", "PyTorch, channels_last")
_MOST_EVENTS = 2_000_000  # Histograms of longer recordings would take most of the time there is.
_SECONDS_PER_STAGE = 0.8


@dataclass
class Windows:
    """A recording cut into windows and their histograms."""

    events: list[Events]
    duration_us: int
    histograms: Tensor  # uint8 [T, 2*BINS, H, W]


def cut(events: Events, count: int) -> tuple[list[Events], int, list[str]]:
    """`count` windows of equal duration, their microseconds, and a note if the recording was shortened."""
    notes = []
    if len(events) > _MOST_EVENTS:
        part = events.slice_time(int(events.t[0]), max(int(events.t[_MOST_EVENTS]), int(events.t[0]) + count))
        notes.append(f"the recording has {len(events):,} events; the first {len(part):,} are used")
        events = part
    duration = -(-(events.duration + 1) // count)
    windows = list(events.windows(duration_us=duration))
    # The last window may be cut off entirely when the duration does not divide: it is then empty.
    nothing = events.slice_time(int(events.t[-1]) + 1, int(events.t[-1]) + 1)
    return windows + [nothing] * (count - len(windows)), duration, notes


def histograms(windows: list[Events], duration_us: int, device: torch.device, advance) -> tuple[Windows, Row]:
    """Stacked histograms of all windows with the fused op and with the reference, which must be equal."""
    columns = tuple(torch.cat(column) for column in zip(*(window.tensors(device) for window in windows), strict=True))
    lengths = torch.tensor([0] + [len(window) for window in windows], device=device)
    offsets = lengths.cumsum(0)
    height, width = windows[0].height, windows[0].width

    def fused():
        return ops.event_histogram(*columns, bins=BINS, height=height, width=width, offsets=offsets)

    result = fused()
    with use_backend("reference"):
        expected = fused()
    row = Row("event histogram", agrees=torch.equal(result, expected))
    row.error = (result.int() - expected.int()).abs().max().item()
    forms = {"fused": fused, "reference": fused, **histogram_forms(columns, offsets, BINS, height, width)}
    row.seconds = medians(forms, device, _SECONDS_PER_STAGE, advance)
    return Windows(windows, duration_us, expected), row


def region(histogram: Tensor, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the part of at most height x width with the most events, for [..., H, W]."""
    counts = histogram.flatten(0, -3).sum(0, dtype=torch.float32)[None, None]
    size = (min(height, counts.shape[2]), min(width, counts.shape[3]))
    step = tuple(max(1, extent // 4) for extent in size)
    sums = torch.nn.functional.avg_pool2d(counts, size, step)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    top, left = row * step[0], column * step[1]
    return slice(top, top + size[0]), slice(left, left + size[1])


def calibrate(model: EventPredictor, histograms: Tensor) -> None:
    """Lets the batch normalisations of a new model see the recording, so that no stage runs on dead channels."""
    with use_backend("reference"), torch.no_grad():
        model.train()
        state = None
        for histogram in histograms:
            _, state = model(histogram[None], state)
    model.eval()


def compare(model: EventPredictor, histograms: Tensor, device: torch.device, advance) -> list[Row]:
    """One row per stage of the network, errors and times, in evaluation mode.

    Args:
        model: float32, on `device`.
        histograms: The windows so far, uint8 [T, 2*BINS, H, W]; the last one is the input of the timed step.
        device: Where to run.
        advance: Called now and then, for a progress bar.
    """
    calls = {form: _calls(variant(form, model)) for form in FORMS}
    exact = _calls(copy.deepcopy(model).double())
    with torch.inference_mode():
        with use_backend("reference"):
            inputs = _inputs(model, histograms)
        return [_row(name, calls, exact, inputs[name], device, advance) for name in inputs]


def _row(name, stages_of, exact_stages, inputs, device, advance) -> Row:
    with use_backend("reference"):
        exact = exact_stages[name](*tree_map_only(Tensor, lambda v: v.double(), inputs))
    calls, results = {}, {}
    for form in FORMS:
        run, given = stages_of[form][name], in_layout(form, inputs)
        calls[form] = lambda run=run, given=given: run(*given)
        with running(form):
            results[form] = calls[form]()
    fused = [results.pop(form) for form in FORMS if form.startswith("fused")]
    row = judge(name, fused, list(results.values()), exact)
    row.seconds = medians(calls, device, _SECONDS_PER_STAGE, advance)
    return row


def _calls(model: EventPredictor) -> dict[str, Callable]:
    """The stages of the network by name; each takes tensors and returns tensors."""
    calls = {"normalisation": model.normalization}
    for index, (block, attention) in enumerate(model.encoder.stages(), 1):
        calls[f"encoder {index}"] = lambda x, block=block, attention=attention: attention(block(x))
    calls["ConvLSTM"] = model.bottleneck
    calls["decoder"] = model.decoder
    calls["whole network"] = model
    return calls


def _inputs(model: EventPredictor, histograms: Tensor) -> dict[str, tuple]:
    """What each stage receives at the last window."""
    state = None
    for histogram in histograms[:-1]:
        _, state = model(histogram[None].float(), state)
    calls = _calls(model)
    histogram = histograms[-1:].float()
    inputs, maps = {"normalisation": (histogram,)}, [model.normalization(histogram)]
    for index in range(1, len(model.encoder.stages()) + 1):
        inputs[f"encoder {index}"] = (maps[-1],)
        maps.append(calls[f"encoder {index}"](maps[-1]))
    inputs["ConvLSTM"] = (maps[-1], state)
    inputs["decoder"] = (model.bottleneck(maps[-1], state)[0], maps[1:-1])
    inputs["whole network"] = (histogram, state)
    return inputs
