"""Runs one case: verifies every provider first, then times all of them interleaved with the machine's own limits.

A provider of ours whose result is wrong is a failure and gets no time. A competitor whose result is further off than
the tolerance is timed all the same and marked: leaving a fast one out would flatter us. The limits are a copy that
moves as many bytes as the case must, and a matrix product where operations count; they run in the same rounds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from benchmarks.registry import Arguments, Case, Provider, arguments
from benchmarks.timing import Timed, clock_of, measure, quantiles, speedup
from evkernels import use_backend
from evkernels.testing import assert_matches, tensor

# A square product of this size runs at the processor's speed and takes milliseconds.
_PRODUCT_SIZE = 1024


class WrongResult(AssertionError):
    """A provider computes something else than plain PyTorch."""


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    threads: int = 1
    # Seconds of samples per provider.
    min_time: float = 0.3
    rounds: int = 10


@dataclass
class Measurement:
    """One provider's times in milliseconds, of the compared clock and its 20 and 80 % quantiles, and of both clocks."""

    name: str
    layout: str
    label: str
    ours: bool
    ms: float
    ms_20: float
    ms_80: float
    wall_ms: float
    cpu_ms: float
    ns_per_item: float
    gb_per_s: float
    share_of_limit: float
    repetitions: int
    compile_s: float | None
    # Why the result is not, or not within tolerance, that of plain PyTorch; empty if it is.
    differs: str
    # By label of a competitor: how many times faster this provider of ours is.
    speedup: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """What one case gave."""

    op: str
    mode: str
    dtype: str
    shape: str
    device: str
    items: int
    item: str
    bytes: int
    flops: int
    clock: str
    copy_gb_per_s: float = 0.0
    gflop_per_s: float | None = None
    # The least time that the measured copy and product allow for the case's bytes and operations.
    limit_ms: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)
    # By name: why a provider is not there; why one of ours is wrong.
    absent: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode} {self.dtype} {self.shape}"

    @property
    def ours(self) -> list[Measurement]:
        return [measurement for measurement in self.measurements if measurement.ours]

    @property
    def competitors(self) -> list[Measurement]:
        return [measurement for measurement in self.measurements if not measurement.ours]

    def as_dict(self) -> dict:
        return asdict(self)


class Bound:
    """A provider with its arguments: `run()` computes the case inside `surroundings()`."""

    def __init__(self, case: Case, provider: Provider, given: Arguments, device: str):
        self.case, self.provider = case, provider
        self.run = _runner(case, provider, provider.prepare(given), device)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        backend = self.provider.backend
        with torch.set_grad_enabled(self.case.mode != "inference"), use_backend(backend) if backend else nullcontext():
            yield


def _runner(case: Case, provider: Provider, given: Arguments, device: str) -> Callable:
    function = provider.function
    if case.mode != "forward+backward":
        return lambda: function(*given)
    inputs = _inputs_with_gradient(given)
    gradients = None

    def run():
        nonlocal gradients
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        if gradients is None:
            gradients = _output_gradients(results, provider.layout, device)
        return results + torch.autograd.grad(results, inputs, gradients)

    return run


def _inputs_with_gradient(given: Arguments) -> list[Tensor]:
    return [value for value in tree_flatten(given)[0] if isinstance(value, Tensor) and value.requires_grad]


def _output_gradients(results: Sequence[Tensor], layout: str, device: str) -> list[Tensor]:
    """What a network would send back: gradients in the dtype and layout of the results."""
    return [
        tensor(*result.shape, dtype=result.dtype, layout=layout, device=device, seed=100 + k)
        for k, result in enumerate(results)
    ]


class Expected:
    """The case's result by plain PyTorch on the CPU, in its own dtype and, for floating results, in float64.

    In its own dtype in every layout, because each sums in another order and one may be exact by luck.
    """

    def __init__(self, case: Case):
        self.times = case.benchmark.times_eager
        given = arguments(case, "contiguous", "cpu")
        with torch.set_grad_enabled(case.mode != "inference"):
            self.eager = self._results(case, given)
            floating = _is_floating(given)
            self.exact = self._results(case, tree_map_only(Tensor, _widened, given)) if floating else self.eager
            layouts = [layout for layout in case.benchmark.layouts if layout != "contiguous"] if floating else []
            self.others = [self._results(case, arguments(case, layout, "cpu")) for layout in layouts]
            if case.benchmark.rounded:
                self.others.append(self._results(case, given, case.benchmark.rounded))

    @staticmethod
    def _results(case: Case, given: Arguments, function: Callable | None = None) -> list[Tensor]:
        results, _ = tree_flatten((function or case.benchmark.eager)(*given))
        if case.mode == "forward+backward":
            # Rounded to the case's dtype first, so that both runs are given the same numbers.
            narrow = [result.to(case.dtype) for result in results]
            gradients = [
                value.to(result.dtype)
                for value, result in zip(_output_gradients(narrow, "contiguous", "cpu"), results, strict=True)
            ]
            results += torch.autograd.grad(results, _inputs_with_gradient(given), gradients)
        return [result.detach() for result in results]

    def verify(self, bound: Bound) -> None:
        """Raises WrongResult unless the provider's results, and gradients in that mode, are right."""
        with bound.surroundings():
            results, _ = tree_flatten(bound.run())
        results = [torch.as_tensor(value).detach().cpu() for value in results]
        try:
            assert len(results) == len(self.eager), f"{len(results)} results, expected {len(self.eager)}"
            for k, (actual, exact, eager) in enumerate(zip(results, self.exact, self.eager, strict=True)):
                if eager.is_floating_point():
                    others = [other[k] for other in self.others]
                    assert_matches(actual, exact, eager, what=f"result {k}", others=others, times=self.times)
                else:
                    _assert_equal(actual, eager, what=f"result {k}")
        except AssertionError as error:
            raise WrongResult(str(error)) from None


def _is_floating(given: Arguments) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_flatten(given)[0])


def _widened(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def _assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal values; a competitor may count in a wider type."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    different = (actual != expected).sum().item()
    assert not different, f"{what}: {different} of {expected.numel()} values differ"


def run_case(
    case: Case,
    providers: list[Provider],
    absent: dict[str, str],
    settings: Settings,
    progress: Callable[[str], None] = lambda what: None,
) -> Result:
    """Verifies and times one case. `progress` is told what is being done."""
    benchmark, device = case.benchmark, settings.device
    clock = clock_of(device, settings.threads)
    result = Result(
        op=benchmark.op,
        mode=case.mode,
        dtype=case.dtype_name,
        shape=case.shape_name,
        device=device,
        items=benchmark.items(case.shape),
        item=benchmark.item,
        bytes=case.bytes,
        flops=case.flops,
        clock=clock,
        absent=dict(absent),
    )
    if any(provider.compiled for provider in providers):
        # Code of earlier cases would count towards torch.compile's limit of recompilations.
        torch.compiler.reset()
    progress("plain PyTorch")
    expected = Expected(case)
    given = {layout: arguments(case, layout, device) for layout in dict.fromkeys(p.layout for p in providers)}
    verified: list[tuple[Provider, Timed, float | None, str]] = []
    for provider in providers:
        progress(f"verify {provider.label}")
        compile_s, differs = None, provider.differs
        try:
            bound = Bound(case, provider, given[provider.layout], device)
            if provider.compiled:
                compile_s = _seconds_of_first_call(bound)
            if not differs:
                expected.verify(bound)
        except WrongResult as error:
            if provider.backend:
                result.failures[provider.label] = str(error)
                continue
            differs = str(error)
        except Exception as error:
            # A provider that raises must not end the run of the others: its reason goes into the report.
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            (result.failures if provider.backend else result.absent)[provider.label] = reason
            continue
        verified.append((provider, Timed(bound.run, bound.surroundings), compile_s, differs))
    del expected

    limits = _limits(case, device)
    measure(
        [timed for _, timed, _, _ in verified] + limits,
        device=device,
        min_time=settings.min_time,
        rounds=settings.rounds,
        between=lambda: progress("time"),
    )
    rates = [amount / quantiles(limit, clock).median for amount, limit in zip(_amounts(case), limits, strict=True)]
    result.copy_gb_per_s = rates[0] / 1e9
    result.limit_ms = 1e3 * case.bytes / rates[0]
    if case.flops:
        result.gflop_per_s = rates[1] / 1e9
        result.limit_ms = max(result.limit_ms, 1e3 * case.flops / rates[1])
    for provider, timed, compile_s, differs in verified:
        spread = quantiles(timed, clock)
        result.measurements.append(
            Measurement(
                name=provider.name,
                layout=provider.layout,
                label=provider.label,
                ours=provider.backend is not None,
                ms=1e3 * spread.median,
                ms_20=1e3 * spread.low,
                ms_80=1e3 * spread.high,
                wall_ms=1e3 * quantiles(timed, "wall").median,
                cpu_ms=1e3 * quantiles(timed, "cpu").median,
                ns_per_item=1e9 * spread.median / max(result.items, 1),
                gb_per_s=case.bytes / spread.median / 1e9,
                share_of_limit=result.limit_ms / (1e3 * spread.median),
                repetitions=timed.repetitions,
                compile_s=compile_s,
                differs=differs,
                speedup={
                    other.label: speedup(timed, other_timed, clock)
                    for other, other_timed, _, _ in verified
                    if provider.backend and not other.backend
                },
            )
        )
    return result


def _seconds_of_first_call(bound: Bound) -> float:
    with bound.surroundings():
        start = time.perf_counter()
        bound.run()
        return time.perf_counter() - start


def _limits(case: Case, device: str) -> list[Timed]:
    """A copy that reads and writes the case's bytes and, where operations count, a matrix product in its dtype."""
    source = torch.ones(max(case.bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    limits = [Timed(lambda: target.copy_(source))]
    if case.flops:
        a, b = (tensor(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=case.dtype, device=device, seed=seed) for seed in (1, 2))
        out = torch.empty_like(a)
        limits.append(Timed(lambda: torch.mm(a, b, out=out)))
    return limits


def _amounts(case: Case) -> list[int]:
    """What each of the limits moves or computes per call."""
    copied = 2 * max(case.bytes // 2, 1)
    return [copied, 2 * _PRODUCT_SIZE**3] if case.flops else [copied]
