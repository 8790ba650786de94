"""Step 3: training, the fused ops and plain PyTorch in lockstep from the same weights on the same crops.

Training amplifies rounding: two right programs that add in another order drift apart. How far is measured in the same
run and not assumed: plain PyTorch, which sums in another order in each memory layout, is trained beside the reference,
and once more from weights moved by one float32 rounding. The fused run may differ from the reference
by `FACTOR` times the widest of those differences so far, plus the rounding of the loss itself. Before, the gradients
of the first step are held against float64, where the tolerance is that of the stages and a wrong backward cannot hide.

All runs take their k-th step one after the other, in alternating order, so that their times are comparable.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from evkernels.demo.comparison import Row, in_layout, judge, running, synchronize
from evkernels.demo.plain import loss, variant
from evkernels.demo.stages import region
from evkernels.models import EventPredictor

# Runs that differ by rounding alone were seen to drift up to 3 times further than one another on a recording with hot
# pixels, where rounding grows a thousandfold within 36 steps; three of them stand for all, so the limit needs room.
FACTOR = 10
_BATCH, _CROP, _UNROLL, _RATE = 4, 64, 4, 3e-3
_MOVED = "PyTorch, weights moved by one rounding"


@dataclass
class Run:
    """One training run."""

    form: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median time of a step, the first left out."""
        later = sorted(self.seconds[1:] or self.seconds)
        return later[len(later) // 2]


@dataclass
class Training:
    """All runs, what they may differ by, and the gradients of the first step."""

    runs: dict[str, Run]
    difference: list[float]  # |fused - reference| per step
    allowed: list[float]
    gradients: list[Row]
    baselines: dict[str, float]  # loss of predictions that learn nothing

    @property
    def curves_agree(self) -> bool:
        """No step of the fused run is further from the reference than allowed; NaN is."""
        return all(value <= limit for value, limit in zip(self.difference, self.allowed, strict=True))

    def speed_up(self) -> float:
        """Time per step of the best plain PyTorch over that of the fused ops."""
        plain = min(run.step_seconds for form, run in self.runs.items() if form.startswith(("reference", "PyTorch")))
        return plain / self.runs["fused"].step_seconds


def train(
    model: EventPredictor, histograms: Tensor, fused_form: str, device: torch.device, steps: int, seed: int, advance
) -> Training:
    """Trains copies of `model` to predict the next window's histogram.

    Args:
        model: float32 on `device`; left as it is.
        histograms: uint8 [T, C, H, W].
        fused_form: "fused" or "fused, channels_last", whichever the user would choose.
        device: Where to run.
        steps: Optimiser steps, each over `_UNROLL` windows of `_BATCH` crops.
        seed: Of the crops and of the perturbed runs.
        advance: Called after each step, for a progress bar.
    """
    model = copy.deepcopy(model).train()
    runs = {form: _run(form, model) for form in ("reference", "PyTorch", "PyTorch, channels_last")}
    # In the fused ops' layout, whose order of summation may be the one that matters.
    runs[_MOVED] = _run(fused_form.replace("fused", "PyTorch"), model, moved_by=seed + 1)
    runs = {"fused": _run(fused_form, model), **runs}
    batches = list(_batches(histograms, steps, seed))
    gradients = _compare_gradients(model, batches[0])
    for index, windows in enumerate(batches):
        order = list(runs.values())
        for run in order if index % 2 == 0 else reversed(order):
            _step(run, windows, device)
        advance()
    reference = runs["reference"].losses
    difference = [abs(a - b) for a, b in zip(runs["fused"].losses, reference, strict=True)]
    return Training(runs, difference, _allowed(runs, reference), gradients, _baselines(batches))


def _run(form: str, model: EventPredictor, moved_by: int | None = None) -> Run:
    """A run from the weights of `model`, each moved up or down by one rounding if `moved_by` is a seed."""
    own = variant(form, model)
    if moved_by is not None:
        generator = torch.Generator().manual_seed(moved_by)
        for parameter in own.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
            parameter.data *= 1 + signs * torch.finfo(torch.float32).eps
    return Run(form, own, torch.optim.Adam(own.parameters(), lr=_RATE))


def _batches(histograms: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Windows [_UNROLL + 1, _BATCH, C, h, w] of crops, each around an active pixel at a time when it was active.

    A batch of empty crops must not come up: normalising constant maps divides rounding errors by almost nothing, ten
    times in a row, and no two summation orders agree on the result.
    """
    generator = torch.Generator().manual_seed(seed)
    unroll = min(_UNROLL, len(histograms) - 1)
    active = histograms.amax(1).cpu().nonzero()  # window, row, column

    def crop() -> Tensor:
        window, *pixel = active[int(torch.randint(0, len(active), (), generator=generator))].tolist()
        earlier = int(torch.randint(0, unroll, (), generator=generator))
        begin = min(max(window - earlier, 0), len(histograms) - unroll - 1)
        rows, columns = (
            slice(corner, corner + _CROP)
            for corner in (
                max(0, min(place - _CROP // 2, size - _CROP))
                for place, size in zip(pixel, histograms.shape[-2:], strict=True)
            )
        )
        return histograms[begin : begin + unroll + 1, :, rows, columns]

    for _ in range(steps):
        yield torch.stack([crop() for _ in range(_BATCH)], dim=1)


def _step(run: Run, windows: Tensor, device: torch.device) -> None:
    windows = _in_layout(run.form, windows.float())
    with running(run.form):
        synchronize(device)
        begin = time.perf_counter()
        run.optimizer.zero_grad()
        total = _sequence_loss(run.model, windows)
        total.backward()
        run.optimizer.step()
        synchronize(device)
        run.seconds.append(time.perf_counter() - begin)
    run.losses.append(total.item())


def _in_layout(form: str, windows: Tensor) -> list[Tensor]:
    return [in_layout(form, window) for window in windows]


def _sequence_loss(model: nn.Module, windows: list[Tensor]) -> Tensor:
    """Mean loss over the windows but the last, from an empty state: backpropagation through time, truncated."""
    total, state = 0.0, None
    for histogram, following in pairwise(windows):
        prediction, state = model(histogram, state)
        total = total + loss(prediction, following)
    return total / (len(windows) - 1)


def _allowed(runs: dict[str, Run], reference: list[float]) -> list[float]:
    allowed, widest = [], 0.0
    others = [run.losses for form, run in runs.items() if form not in ("fused", "reference")]
    for index, value in enumerate(reference):
        widest = max([widest] + [abs(losses[index] - value) for losses in others])
        allowed.append(FACTOR * widest + 4 * torch.finfo(torch.float32).eps * abs(value))
    return allowed


def _compare_gradients(model: EventPredictor, windows: Tensor) -> list[Row]:
    """The gradients of the first step by part of the network: fused and plain PyTorch against float64."""
    fused, plain, exact = ("fused", "fused, channels_last"), ("reference", "PyTorch", "PyTorch, channels_last"), "exact"
    gradients = {}
    for form in (*fused, *plain, exact):
        dtype = torch.float64 if form == exact else torch.float32
        own = variant(form, model).to(dtype)
        with running(form):
            _sequence_loss(own, _in_layout(form, windows.to(dtype))).backward()
        gradients[form] = {name: parameter.grad for name, parameter in own.named_parameters()}

    def part_of(form: str, prefix: str) -> Tensor:
        return torch.cat([grad.flatten() for name, grad in gradients[form].items() if name.startswith(prefix)])

    parts = {f"encoder {index}": f"encoder.conv{index}." for index in range(1, 6)}
    parts |= {"attention": "encoder.channel_attention.", "ConvLSTM": "bottleneck.", "decoder": "decoder."}
    return [
        judge(
            f"gradient of {part}",
            [part_of(form, prefix) for form in fused],
            [part_of(form, prefix) for form in plain],
            part_of(exact, prefix),
        )
        for part, prefix in parts.items()
    ]


def _baselines(batches: list[Tensor]) -> dict[str, float]:
    """Losses on the same windows of two predictions that need no training."""
    pairs = [(before.float(), after) for windows in batches for before, after in pairwise(windows)]
    return {
        "predicting nothing": sum(loss(torch.zeros_like(a), b).item() for a, b in pairs) / len(pairs),
        "repeating the window before": sum(loss(a.log1p(), b).item() for a, b in pairs) / len(pairs),
    }


@torch.inference_mode()
def predict(model: nn.Module, histograms: Tensor) -> Tensor:
    """The counts that `model` expects in the window after the last of `histograms`, float32 [C, H, W]."""
    model.eval()
    state = None
    for histogram in histograms:
        prediction, state = model(histogram[None].float(), state)
    return prediction[0].expm1().clamp(min=0)


def focus(histograms: Tensor, height: int = 480, width: int = 640) -> Tensor:
    """The busiest part of at most VGA size: what the network is run on where the sensor is larger."""
    rows, columns = region(histograms, height, width)
    return histograms[..., rows, columns].contiguous()
