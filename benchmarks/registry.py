"""What there is to measure: each op's description, and the cases and providers that follow from it.

A `bench_<stem>.py` holds a tuple BENCHMARKS of `Benchmark`, one per op, and nothing else needs to know about it. A
case is one (op, mode, shape, dtype); its providers are everything that can compute it here: plain PyTorch and
torch.compile in each layout, other packages, and the op itself on each backend.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from evkernels import backends

MODES = ("inference", "forward", "forward+backward")
LAYOUTS = ("contiguous", "channels_last")

Arguments = tuple[Any, ...]
Shape = tuple[Any, ...]


def unchanged(arguments: Arguments) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Competitor:
    """Another way to compute the op: a different style of PyTorch, or another package."""

    name: str
    # Returns the function; imports what it needs. An ImportError makes the competitor absent, with its text as reason.
    load: Callable[[], Callable]
    # Modes that it can serve.
    modes: tuple[str, ...] = MODES
    # What it takes, from the op's arguments: conversions to its own types are not timed.
    prepare: Callable[[Arguments], Arguments] = unchanged
    # Why its result is not the op's, where that is known: it is then timed without being compared.
    differs: str = ""


@dataclass(frozen=True)
class Benchmark:
    """How to measure one op."""

    # Name in `evkernels.ops`.
    op: str
    # The op and the best plain PyTorch, both called with what `inputs` returns; `eager` also defines the result.
    function: Callable
    eager: Callable
    # (shape, dtype) -> arguments on the CPU, contiguous.
    inputs: Callable[[Shape, torch.dtype], Arguments]
    # `eager` with the rounding that the op is allowed beyond that of its dtype, or with sums in another order, where
    # one sum may be exact by luck: its error counts as plain PyTorch's.
    rounded: Callable | None = field(default=None, kw_only=True)
    # How many times plain PyTorch's error ours may have: 4 where 3x3 convolutions are Winograd's.
    times_eager: float = field(default=2, kw_only=True)
    # Shapes to time, a subset for --quick and for the gates of the test suite, and one to verify in milliseconds.
    shapes: Sequence[Shape]
    gate_shapes: Sequence[Shape]
    tiny_shape: Shape
    # (shape, bytes per value, mode) -> the least bytes that must be read and written; likewise operations, where a
    # product and not the memory may set the limit.
    floor_bytes: Callable[[Shape, int, str], int]
    floor_flops: Callable[[Shape, str], int] | None = None
    # What a shape counts, for "ns per <item>".
    items: Callable[[Shape], int] = field(default=lambda shape: torch.Size(shape).numel())
    item: str = "element"
    label: Callable[[Shape], str] = field(default=lambda shape: "x".join(str(size) for size in shape))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    # Those in which the test suite demands that no gate shape is slower than eager; None: the first of dtypes.
    gate_dtypes: tuple[torch.dtype, ...] | None = None
    # The modes in which it does; None: all of them.
    gate_modes: tuple[str, ...] | None = None
    modes: tuple[str, ...] = MODES
    layouts: tuple[str, ...] = LAYOUTS
    competitors: tuple[Competitor, ...] = ()
    compiles: bool = True


@dataclass(frozen=True)
class Case:
    """One thing to compute, by all of its providers."""

    benchmark: Benchmark
    mode: str
    shape: Shape
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape_name(self) -> str:
        return self.benchmark.label(self.shape)

    @property
    def name(self) -> str:
        return f"{self.benchmark.op} {self.mode} {self.dtype_name} {self.shape_name}"

    @property
    def bytes(self) -> int:
        return self.benchmark.floor_bytes(self.shape, self.dtype.itemsize, self.mode)

    @property
    def flops(self) -> int:
        return self.benchmark.floor_flops(self.shape, self.mode) if self.benchmark.floor_flops else 0


@dataclass(frozen=True)
class Provider:
    """One way to compute a case, in one layout."""

    name: str
    layout: str
    function: Callable
    # The backend of `evkernels` that serves it; None for a competitor.
    backend: str | None = None
    compiled: bool = False  # by torch.compile: the name ends so
    prepare: Callable[[Arguments], Arguments] = unchanged
    differs: str = ""

    @property
    def label(self) -> str:
        return self.name if self.layout == "contiguous" else f"{self.name} {self.layout}"


def benchmarks() -> dict[str, Benchmark]:
    """Every op that has a benchmark, by name, in alphabetical order of the files."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(f"benchmarks.{stem}") for stem in stems]
    return {benchmark.op: benchmark for module in modules for benchmark in module.BENCHMARKS}


def cases(benchmark: Benchmark, shapes: Sequence[Shape]) -> list[Case]:
    return [
        Case(benchmark, mode, shape, dtype)
        for mode in benchmark.modes
        for dtype in benchmark.dtypes
        for shape in shapes
    ]


def gates(benchmark: Benchmark) -> list[Case]:
    """The cases in which ours must not be slower than eager PyTorch."""
    dtypes = benchmark.gate_dtypes or benchmark.dtypes[:1]
    modes = benchmark.gate_modes or benchmark.modes
    return [case for case in cases(benchmark, benchmark.gate_shapes) if case.dtype in dtypes and case.mode in modes]


def providers(case: Case, device: str) -> tuple[list[Provider], dict[str, str]]:
    """All that can compute `case` on `device` ("cpu" or "cuda"), and by name the reason for each that cannot."""
    benchmark = case.benchmark
    here, absent = [], {}
    competitors = [Competitor("eager", lambda: benchmark.eager), *benchmark.competitors]
    if benchmark.compiles:
        # dynamic=False: every shape gets code of its own, which is the best that torch.compile has to offer.
        competitors.append(Competitor("compile", lambda: torch.compile(benchmark.eager, dynamic=False)))
    for competitor in competitors:
        if case.mode not in competitor.modes:
            continue
        try:
            function = competitor.load()
        except ImportError as error:
            absent[competitor.name] = str(error)
            continue
        here += [
            Provider(
                competitor.name,
                layout,
                function,
                compiled=competitor.name.endswith("compile"),
                prepare=competitor.prepare,
                differs=competitor.differs,
            )
            for layout in benchmark.layouts
        ]
    for backend in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        reason = backends.unavailable(backend)
        if reason:
            absent[backend] = reason
        else:
            here += [Provider(backend, layout, benchmark.function, backend) for layout in benchmark.layouts]
    return here, absent


def arguments(case: Case, layout: str, device: str) -> Arguments:
    """The case's inputs in `layout`; floating tensors require gradients unless the mode is inference."""

    def place(value: Tensor) -> Tensor:
        if layout == "channels_last" and value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        return value.to(device).requires_grad_(value.is_floating_point() and case.mode != "inference")

    return tree_map_only(Tensor, place, case.benchmark.inputs(case.shape, case.dtype))
