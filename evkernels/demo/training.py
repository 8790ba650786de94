"""Step 3: training, the fused ops and plain PyTorch in lockstep from the same weights on the same crops.

Training amplifies rounding: two right programs that add in another order drift apart. How far is measured in the same
run and not assumed: the reference is trained once more from weights moved by one float32 rounding, and plain PyTorch,
which sums in its own order in each memory layout, is trained beside them. The fused run may differ from the reference
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

FACTOR = 4
_BATCH, _CROP, _UNROLL, _RATE = 4, 64, 4, 3e-3
_MOVED = "reference, weights moved by one rounding"


@dataclass
class Run:
    """One training run."""

    form: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: tuple[Tensor, Tensor] | None = None
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
    forms = ("reference", "PyTorch", "PyTorch, channels_last", _MOVED)
    runs = {"fused": _run(fused_form, model, seed), **{form: _run(form, model, seed) for form in forms}}
    batches = list(_batches(histograms, steps, seed))
    gradients = _compare_gradients(model, batches[0][0])
    for index, (windows, begins) in enumerate(batches):
        order = list(runs.values())
        for run in order if index % 2 == 0 else reversed(order):
            _step(run, windows, begins, device)
        advance()
    reference = runs["reference"].losses
    difference = [abs(a - b) for a, b in zip(runs["fused"].losses, reference, strict=True)]
    return Training(runs, difference, _allowed(runs, reference), gradients, _baselines(batches))


def _run(form: str, model: EventPredictor, seed: int) -> Run:
    own = variant(form, model)
    if form == _MOVED:
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in own.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
            parameter.data *= 1 + signs * torch.finfo(torch.float32).eps
    return Run(form, own, torch.optim.Adam(own.parameters(), lr=_RATE))


def _batches(histograms: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, bool]]:
    """Windows [_UNROLL + 1, _BATCH, C, h, w] of crops in order of time, and whether a new sequence begins.

    Truncated backpropagation through time: the windows of one set of crops come in chunks that overlap by one, the
    last window of a chunk being the target of the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    unroll = min(_UNROLL, len(histograms) - 1)
    chunks = range(0, len(histograms) - unroll, unroll)
    crops = None
    for step in range(steps):
        begin = chunks[step % len(chunks)]
        if begin == 0:
            crops = [_crop(histograms, generator) for _ in range(_BATCH)]
        part = histograms[begin : begin + unroll + 1]
        yield torch.stack([part[..., rows, columns] for rows, columns in crops], dim=1), begin == 0


def _crop(histograms: Tensor, generator: torch.Generator) -> tuple[slice, slice]:
    """The busier of two random crops."""
    height, width = histograms.shape[-2:]
    places = []
    for _ in range(2):
        extent = []
        for size in (height, width):
            begin = int(torch.randint(0, max(1, size - _CROP + 1), (), generator=generator))
            extent.append(slice(begin, begin + min(_CROP, size)))
        places.append(tuple(extent))
    return max(places, key=lambda place: int(histograms[..., place[0], place[1]].sum()))


def _step(run: Run, windows: Tensor, begins: bool, device: torch.device) -> None:
    windows = _in_layout(run.form, windows.float())
    with running(run.form):
        synchronize(device)
        begin = time.perf_counter()
        run.optimizer.zero_grad()
        total, run.state = _sequence_loss(run.model, windows, None if begins else run.state)
        total.backward()
        run.optimizer.step()
        synchronize(device)
        run.seconds.append(time.perf_counter() - begin)
    run.losses.append(total.item())


def _in_layout(form: str, windows: Tensor) -> list[Tensor]:
    return [in_layout(form, window) for window in windows]


def _sequence_loss(model: nn.Module, windows: list[Tensor], state) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean loss over the windows but the last, and the detached state after them."""
    total = 0.0
    for histogram, following in pairwise(windows):
        prediction, state = model(histogram, state)
        total = total + loss(prediction, following)
    return total / (len(windows) - 1), tuple(value.detach() for value in state)


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
            _sequence_loss(own, _in_layout(form, windows.to(dtype)), None)[0].backward()
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


def _baselines(batches: list[tuple[Tensor, bool]]) -> dict[str, float]:
    """Losses on the same windows of two predictions that need no training."""
    pairs = [(before.float(), after) for windows, _ in batches for before, after in pairwise(windows)]
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
