"""Interleaved timing: every function of a case in rounds, each other round in reversed order.

A machine's clock, its caches' contents and its neighbours drift within seconds. What runs in the same round meets the
same conditions, so ratios are taken per round and their median is reported; times are medians with the 20 and 80 %
quantiles. On one CPU thread the processor time is what is compared, because a preempted sample costs no more of it;
with more threads or on a GPU it is the wall clock.
"""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

# At least so many undisturbed samples are needed to leave the disturbed ones out.
_ENOUGH = 4


@dataclass
class Timed:
    """A function with what must surround it, and the samples taken of it, in seconds per call."""

    function: Callable[[], object]
    surroundings: Callable[[], AbstractContextManager] = nullcontext
    repetitions: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    # Involuntary context switches during each sample.
    switches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Quantiles:
    low: float
    median: float
    high: float


def measure(
    functions: Sequence[Timed],
    *,
    device: str,
    min_time: float,
    rounds: int = 10,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Takes `rounds` samples of each function, interleaved, `min_time` seconds of each in all; calls `between` rounds.

    A sample is a loop of as many calls as it takes to last min_time / rounds.
    """
    sample = _sample_cuda if device == "cuda" else _sample_cpu
    for timed in functions:
        timed.repetitions = _repetitions(timed, sample, min_time / rounds)
    for k in range(rounds):
        for timed in functions if k % 2 == 0 else functions[::-1]:
            wall, cpu, switches = sample(timed, timed.repetitions)
            timed.wall.append(wall / timed.repetitions)
            timed.cpu.append(cpu / timed.repetitions)
            timed.switches.append(switches)
        between()


def clock_of(device: str, threads: int) -> str:
    """Which clock is compared: "cpu" (processor time) or "wall"."""
    return "cpu" if device == "cpu" and threads == 1 else "wall"


def quantiles(timed: Timed, clock: str) -> Quantiles:
    """20 %, 50 % and 80 % of the samples; by the wall clock of the undisturbed ones, if there are enough."""
    samples = getattr(timed, clock)
    if clock == "wall":
        undisturbed = [value for value, count in zip(samples, timed.switches, strict=True) if count == 0]
        samples = undisturbed if len(undisturbed) >= _ENOUGH else samples
    if len(samples) == 1:
        return Quantiles(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(samples), fifths[-1])


def speedup(ours: Timed, other: Timed, clock: str) -> float:
    """How many times faster `ours` is: the median over the rounds of the ratio within each round."""
    return statistics.median(b / a for a, b in zip(getattr(ours, clock), getattr(other, clock), strict=True))


def _repetitions(timed: Timed, sample: Callable, seconds: float) -> int:
    """Calls per sample, grown until a sample lasts `seconds`; the loop is the warm-up as well."""
    repetitions = 1
    while True:
        wall, cpu, switches = sample(timed, repetitions)
        # Time that another process took is none of the sample's: it would leave all further samples too short.
        lasted = min(wall, cpu) if switches else wall
        if lasted >= 0.9 * seconds:
            return repetitions
        wanted = math.ceil(1.1 * repetitions * seconds / max(lasted, 1e-7))
        # No further than tenfold at once: a first call is slower than the later ones, and its guess too low.
        repetitions = min(max(wanted, repetitions + 1), 10 * repetitions)


def _sample_cpu(timed: Timed, repetitions: int) -> tuple[float, float, int]:
    function = timed.function
    with timed.surroundings():
        gc.collect(0)
        gc.disable()
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repetitions):
            function()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
        gc.enable()
    return wall, cpu, switches


def _sample_cuda(timed: Timed, repetitions: int) -> tuple[float, float, int]:
    function = timed.function
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with timed.surroundings():
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        for _ in range(repetitions):
            function()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
    return start.elapsed_time(end) / 1e3, cpu, 0
