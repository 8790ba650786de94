"""`python -m benchmarks models`: the published networks as wholes and stage by stage.

Four backends: ours, our modules on the reference backend, the plain network of the benchmark of that name, and
torch.compile of that one. Peak memory is what a fresh process's resident set grows by during its first call at that
size, after one at a tiny size. Stages are timed in inference, ours against the reference backend.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks import bench_efficient_conv_lstm, bench_firenet, bench_rvt, bench_visioncore, machine
from benchmarks.harness import Bound
from benchmarks.registry import Benchmark, Case, Provider, arguments, benchmarks
from benchmarks.timing import Timed, measure, quantiles, speedup
from evkernels import use_backend
from evkernels.models import EfficientConvLSTM

_RVT = [f"stages.{i}.{part}" for i in range(4) for part in ("downsample_cf2cl", "att_blocks.0", "lstm")]
_LSTMS = [f"skip_convlstms.{i}" for i in range(4)]
_GRUS = ["head.conv", "head.recurrent_block", "resblocks.0.conv", "resblocks.0.recurrent_block", "resblocks.1", "pred"]
# By name: shapes, the module that serves a shape, and its stages.
NETWORKS = {
    "rvt_backbone": (
        bench_rvt.SHAPES,
        lambda shape: bench_rvt._network(bench_rvt._LayerMajor, *shape[2:]),
        _RVT,
    ),
    "efficient_conv_lstm": (
        bench_efficient_conv_lstm.SHAPES,
        lambda shape: bench_efficient_conv_lstm._network(EfficientConvLSTM, *shape[2:]),
        ["encoder", *_LSTMS, "convlstm", "decoder", "final_conv"],
    ),
    "firenet": (bench_firenet.SHAPES[:1], lambda shape: bench_firenet._network, [f"net.{name}" for name in _GRUS]),
    "visioncore_modulator": (
        bench_visioncore.SHAPES[1:],
        lambda shape: bench_visioncore._network(shape[2]),
        ["gru.cell.layer_norm", "output_proj"],
    ),
}
PROVIDERS = ("ours", "reference", "eager", "compile")
MODES = ("inference", "forward+backward")


def main(argv: list[str]) -> int:
    """Measures, prints and writes Markdown; or, for a process of its own, prints one peak of memory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks models", description="Whole networks, and their stages."
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (all)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; it takes minutes for a network")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/models.md", metavar="FILE")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(_growth(*options.memory_of))
        return 0
    unknown = [name for name in options.networks if name not in NETWORKS]
    if unknown:
        print(
            f"benchmarks models: no such network: {', '.join(unknown)}; there are {', '.join(NETWORKS)}",
            file=sys.stderr,
        )
        return 2
    lines = [machine.one_line(machine.describe("cpu", options.threads)), ""]
    for name in options.networks or NETWORKS:
        for index, shape in enumerate(NETWORKS[name][0]):
            lines += _whole(name, index, shape, options) + _stages(name, shape, options.rounds)
    text = "\n".join(lines)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    return 0


def _provider(benchmark: Benchmark, name: str) -> Provider:
    if name in ("ours", "reference"):
        return Provider(name, "contiguous", benchmark.function, "cpu" if name == "ours" else "reference")
    function = benchmark.eager if name == "eager" else torch.compile(benchmark.eager, dynamic=False)
    return Provider(name, "contiguous", function, compiled=name == "compile")


def _whole(name: str, index: int, shape: tuple, options: argparse.Namespace) -> list[str]:
    benchmark = benchmarks()[name]
    names = [provider for provider in PROVIDERS if provider != "compile" or options.compile]
    lines = [f"{name} {benchmark.label(shape)}", "", "| mode | backend | ms | ours is faster | peak memory |"]
    lines.append("|---|---|---|---|---|")
    for mode in MODES:
        case = Case(benchmark, mode, shape, torch.float32)
        given = arguments(case, "contiguous", "cpu")
        bound = {provider: Bound(case, _provider(benchmark, provider), given, "cpu") for provider in names}
        timed = {provider: Timed(value.run, value.surroundings) for provider, value in bound.items()}
        measure(list(timed.values()), device="cpu", min_time=0, rounds=options.rounds)
        for provider, times in timed.items():
            command = [sys.executable, "-m", "benchmarks", "models", "--memory-of", name, str(index), mode, provider]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            ratio, milliseconds = speedup(timed["ours"], times, "cpu"), 1e3 * quantiles(times, "cpu").median
            lines.append(f"| {mode} | {provider} | {milliseconds:.1f} | {ratio:.2f}x | {int(done.stdout):,} KiB |")
    return [*lines, ""]


def _growth(name: str, index: str, mode: str, provider: str) -> int:
    """By how many KiB the process's resident set grows at most; on Linux only."""
    benchmark = benchmarks()[name]
    for shape in (benchmark.tiny_shape, NETWORKS[name][0][int(index)]):
        case = Case(benchmark, mode, shape, torch.float32)
        bound = Bound(case, _provider(benchmark, provider), arguments(case, "contiguous", "cpu"), "cpu")
        # Linux's high-water mark begins anew; getrusage's is never below that of the parent.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        with bound.surroundings():
            bound.run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A size of this process in KiB, by the name that Linux gives it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _stages(name: str, shape: tuple, rounds: int) -> list[str]:
    benchmark, (_, network, paths) = benchmarks()[name], NETWORKS[name]
    case = Case(benchmark, "inference", shape, torch.float32)
    given = arguments(case, "contiguous", "cpu")
    samples: dict[str, list[dict[str, float]]] = {"cpu": [], "reference": []}
    with torch.no_grad():
        for k in range(rounds + 1):
            for backend, taken in samples.items():
                with use_backend(backend), _clocked(network(shape), paths) as seconds:
                    benchmark.function(*given)
                # The first round warms up.
                taken += [seconds] if k else []
    lines = ["| stage, inference | ours ms | reference ms | ours is faster |", "|---|---|---|---|"]
    for path in paths:
        ours, reference = ([sample[path] for sample in taken] for taken in samples.values())
        ratio = statistics.median(b / a if a else float("nan") for a, b in zip(ours, reference, strict=True))
        milliseconds = (1e3 * statistics.median(values) for values in (ours, reference))
        lines.append(f"| {path} | {' | '.join(f'{value:.2f}' for value in milliseconds)} | {ratio:.2f}x |")
    return [*lines, ""]


@contextmanager
def _clocked(network: nn.Module, paths: list[str]) -> Iterator[dict[str, float]]:
    """Yields the processor time that is spent in each of the modules, by one step or whole sequences."""
    seconds, changed = dict.fromkeys(paths, 0.0), []
    for path in paths:
        module = network.get_submodule(path)
        for method in ("forward", "forward_sequence"):
            if hasattr(module, method):
                module.__dict__[method] = _timed(getattr(module, method), seconds, path)
                changed.append((module, method))
    try:
        yield seconds
    finally:
        for module, method in changed:
            del module.__dict__[method]


def _timed(function, seconds: dict[str, float], path: str):
    def call(*arguments, **options):
        begin = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[path] += time.process_time() - begin

    return call
