"""How results and times are compared: errors against float64, medians of interleaved rounds."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from evkernels import use_backend

RULE = "twice what plain PyTorch loses in float32, plus one float32 rounding of the largest value"


@dataclass
class Row:
    """One line of the table of stages."""

    name: str
    error: float = 0.0  # of the fused ops against float64, largest over all elements
    float32: float = 0.0  # of plain PyTorch in float32 against float64
    allowed: float = 0.0
    agrees: bool = True
    seconds: dict[str, float] = field(default_factory=dict)  # form -> median

    def best(self, fused: bool) -> tuple[str, float]:
        """The fastest form of the fused ops, or of plain PyTorch including the reference."""
        return min(
            ((form, value) for form, value in self.seconds.items() if form.startswith("fused") == fused),
            key=lambda item: item[1],
        )

    @property
    def speed_up(self) -> float:
        """The fused ops against the best plain PyTorch."""
        return self.best(fused=False)[1] / self.best(fused=True)[1]


def running(form: str) -> AbstractContextManager:
    """The backend of a form: "fused..." takes the installed kernels, everything else plain PyTorch."""
    return nullcontext() if form.startswith("fused") else use_backend("reference")


def judge(name: str, fused: list, plain: list, exact) -> Row:
    """Compares results of the fused ops with those of plain PyTorch and with float64.

    Args:
        name: Of the row.
        fused: Results of the fused ops, one per memory layout: each a tensor or a nest of tensors.
        plain: Results of plain PyTorch in float32. It sums in another order in each layout, so what float32 loses is
            the most that any of them does.
        exact: The reference in float64.
    """
    row = Row(name)
    leaves = [[leaf.detach().double() for leaf in tree_flatten(value)[0]] for value in (exact, *fused, *plain)]
    for double, *results in zip(*leaves, strict=True):
        if double.numel() == 0:
            continue
        errors = [(value - double).abs().max().item() for value in results]
        lost = max(errors[len(fused) :])
        allowed = 2 * lost + torch.finfo(torch.float32).eps * double.abs().max().item()
        for error in errors[: len(fused)]:
            # A NaN compares false and so disagrees.
            agrees = error <= allowed
            # The row shows the element closest to its limit.
            if not agrees or (row.agrees and error * row.allowed >= row.error * allowed):
                row.error, row.float32, row.allowed = error, lost, allowed
            row.agrees = row.agrees and agrees
    return row


def in_layout(form: str, value):
    """`value` with its images in the memory layout that the form's name ends with."""
    if not form.endswith("channels_last"):
        return value
    return tree_map_only(
        Tensor, lambda v: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v, value
    )


def medians(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float, advance=lambda: None) -> dict:
    """Median seconds of each call, over rounds that run all of them, forwards and backwards in turn.

    A quick call is repeated within its sample, so that choosing its backend and reading the clock do not count.
    """
    with_warm_up = {form: _sample(form, call, device, 1) for form, call in calls.items()}
    repeats = {form: max(1, min(50, int(2e-3 / max(first, 1e-6)))) for form, first in with_warm_up.items()}
    samples: dict[str, list[float]] = {form: [] for form in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < 4 or (time.perf_counter() - begin < seconds and rounds < 40):
        order = list(calls) if rounds % 2 == 0 else list(reversed(calls))
        for form in order:
            samples[form].append(_sample(form, calls[form], device, repeats[form]))
        rounds += 1
        advance()
    return {form: sorted(values)[len(values) // 2] for form, values in samples.items()}


def _sample(form: str, call: Callable[[], object], device: torch.device, repeats: int) -> float:
    with running(form):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    """Waits until the device is done, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
