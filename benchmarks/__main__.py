"""`python -m benchmarks`: verifies, times, and writes JSON, a Markdown table and plots. Exit code 1 on a wrong result.

torch.compile gets an empty cache folder, so that the compile times it is reported with are those of a first use.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["models"]:
        from benchmarks import models

        return models.main(argv[1:])
    if argv[:1] == ["threads"]:
        from benchmarks import threads

        return threads.main(argv[1:])
    options = _parser().parse_args(argv)
    previous = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix="evkernels-benchmarks-") as folder:
        os.environ[_CACHE] = folder
        try:
            return _run(options)
        finally:
            os.environ.pop(_CACHE)
            if previous is not None:
                os.environ[_CACHE] = previous


def _run(options: argparse.Namespace) -> int:
    # Imported here: the cache folder must be known before torch.compile's modules are.
    import torch

    from benchmarks import machine, report
    from benchmarks.harness import Settings
    from benchmarks.registry import benchmarks

    known = benchmarks()
    problem = _problem(options, known)
    if problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    settings = Settings(
        device=options.device,
        threads=options.threads,
        min_time=options.min_time or (0.05 if options.quick else 0.3),
        rounds=6 if options.quick else 10,
    )
    facts = machine.describe(options.device, options.threads)
    print(machine.one_line(facts))
    results = _measure([known[op] for op in options.ops or known], settings, options)
    if not results:
        print("benchmarks: nothing to measure with these choices", file=sys.stderr)
        return 2
    _print(results)
    text = report.markdown(results, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(text)
    report.write_json(options.out / "results.json", results, facts, asdict(settings))
    _draw(results, options.out, machine.one_line(facts))
    if options.update_readme:
        report.update_readme(options.readme, text)
    print(f"written to {options.out}/")
    return 1 if any(result.failures for result in results) else 0


def _measure(chosen: list, settings, options: argparse.Namespace) -> list:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from benchmarks.harness import run_case
    from benchmarks.registry import cases, providers

    planned = [
        case
        for benchmark in chosen
        for case in cases(benchmark, benchmark.gate_shapes if options.quick else benchmark.shapes)
        if (not options.modes or case.mode in options.modes)
        and (not options.dtypes or case.dtype_name in options.dtypes)
    ]
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[case]}: {task.description}"),
    )
    results = []
    # No refreshing thread: its processor time would count as the providers'.
    with Progress(*columns, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=len(planned), case="")
        for case in planned:
            here, absent = providers(case, settings.device)
            here = [provider for provider in here if _wanted(provider.name, options)]
            absent = {name: reason for name, reason in absent.items() if _wanted(name, options)}

            def progress(what: str, name: str = case.name) -> None:
                bar.update(task, case=name, description=what, refresh=True)

            if here:
                results.append(run_case(case, here, absent, settings, progress))
            bar.advance(task)
    return results


def _wanted(name: str, options: argparse.Namespace) -> bool:
    if options.providers:
        return name in options.providers
    # Compiling takes longer than all else together.
    return not (options.quick and name == "compile")


def _print(results: list) -> None:
    from rich.console import Console
    from rich.table import Table

    from benchmarks import report

    table = Table(*report.COLUMNS, header_style="bold", row_styles=["", "dim"])
    for result in results:
        style = "bold red" if result.failures else "yellow" if report.losses(result) else None
        table.add_row(*report.row(result), style=style)
    # A file or pipe has no width: nothing of the table may be cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for line in report.conclusion(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _draw(results: list, folder: Path, subtitle: str) -> None:
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {error}; pip install 'evkernels[bench]'", file=sys.stderr)
        return
    plots.draw(results, folder, subtitle)


def _problem(options: argparse.Namespace, known: dict) -> str | None:
    """What is wrong with the arguments, in one line; None if nothing is."""
    import torch

    from benchmarks import report

    unknown = [op for op in options.ops if op not in known]
    if unknown:
        return f"no such op: {', '.join(unknown)}; there are {', '.join(known)}"
    offered = {"eager", "compile", "cpu", "cuda", "triton"}
    offered |= {competitor.name for benchmark in known.values() for competitor in benchmark.competitors}
    unknown = [name for name in options.providers if name not in offered]
    if unknown:
        return f"no such provider: {', '.join(unknown)}; there are {', '.join(sorted(offered))}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device"
    if options.threads < 1:
        return f"--threads must be at least 1, got {options.threads}"
    if options.min_time is not None and options.min_time <= 0:
        return f"--min-time must be more than 0 seconds, got {options.min_time}"
    if options.update_readme:
        marks = report.README_MARKS
        if not options.readme.exists() or any(mark not in options.readme.read_text() for mark in marks):
            return f"--update-readme: {options.readme} must contain the lines {marks[0]} and {marks[1]}"
    return None


def _parser() -> argparse.ArgumentParser:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Verifies the kernels, then times them.")
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="which ops (all); models for whole networks, threads for ours on several threads, see their --help",
    )
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="eager, compile, cpu, ... (all)")
    parser.add_argument("--modes", nargs="+", default=[], choices=("inference", "forward", "forward+backward"))
    parser.add_argument("--dtypes", nargs="+", default=[], metavar="DTYPE", help="float32, bfloat16, ... (all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads of PyTorch and the kernels (1)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, short samples, no torch.compile")
    parser.add_argument("--min-time", type=float, metavar="S", help="seconds of samples per provider (0.3; quick 0.05)")
    parser.add_argument("--out", type=Path, default=root / "benchmarks/results", metavar="DIR")
    parser.add_argument("--update-readme", action="store_true", help="put the table between the marks in README.md")
    parser.add_argument("--readme", type=Path, default=root / "README.md", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
