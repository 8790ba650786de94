"""`python -m benchmarks threads`: how many times faster our ops are on several threads than on one.

One process, interleaved, by the wall clock: the ratio is that of the medians of the samples in which no other process
interrupted a thread. The results must be equal to the bit.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

from benchmarks import machine
from benchmarks.harness import Bound
from benchmarks.registry import MODES, Case, arguments, benchmarks, cases, providers
from benchmarks.timing import Timed, measure, quantiles


def main(argv: list[str]) -> int:
    """Measures, prints and writes Markdown. Exit code 1 if results differ, 2 if the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks threads", description="Ours on one thread and on more.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="which ops (all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], metavar="N", help="beside one thread (2)")
    parser.add_argument("--modes", nargs="+", default=["inference"], choices=MODES, help="(inference)")
    parser.add_argument("--dtypes", nargs="+", default=[], metavar="DTYPE", help="float32, bfloat16, ... (all)")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each number of threads (30)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/threads.md", metavar="FILE")
    options = parser.parse_args(argv)
    known = benchmarks()
    unknown = [op for op in options.ops if op not in known]
    if unknown or min(options.threads) < 1 or options.rounds < 1:
        problem = f"no such op: {', '.join(unknown)}" if unknown else "--threads and --rounds must be at least 1"
        print(f"benchmarks threads: {problem}", file=sys.stderr)
        return 2
    chosen = [known[op] for op in options.ops or known]
    planned = [case for each in chosen for case in cases(each, each.gate_shapes if options.quick else each.shapes)]
    counts = list(dict.fromkeys([1, *options.threads]))
    lines = [machine.one_line(machine.describe("cpu", counts[-1])), ""]
    lines.append(
        "| op | mode | dtype | shape | " + " | ".join(f"{count} ms" for count in counts) + " | times as fast |"
    )
    lines.append("|---" * (5 + len(counts)) + "|")
    print("\n".join(lines))
    for case in planned:
        if case.mode in options.modes and (not options.dtypes or case.dtype_name in options.dtypes):
            for line in _rows(case, counts, options.rounds):
                lines.append(line)
                print(line, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    return 1 if any("WRONG" in line for line in lines) else 0


def _rows(case: Case, counts: list[int], rounds: int) -> Iterator[str]:
    """One line for each layout."""
    for provider in providers(case, "cpu")[0]:
        if provider.backend is None:
            continue
        bound = Bound(case, provider, arguments(case, provider.layout, "cpu"), "cpu")
        layout = "" if provider.layout == "contiguous" else f" {provider.layout}"
        head = f"| {case.benchmark.op} | {case.mode} | {case.dtype_name} | {case.shape_name}{layout} |"
        if not _all_equal(bound, counts):
            yield f"{head} WRONG: other bits on other numbers of threads |"
            continue
        timed = [Timed(bound.run, lambda bound=bound, count=count: _on_threads(bound, count)) for count in counts]
        measure(timed, device="cpu", min_time=0.004 * rounds, rounds=rounds)
        ms = [1e3 * quantiles(each, "wall").median for each in timed]
        ratios = ", ".join(f"{ms[0] / each:.2f}x" for each in ms[1:])
        yield f"{head} {' | '.join(f'{each:.3g}' for each in ms)} | {ratios} |"


def _all_equal(bound: Bound, counts: list[int]) -> bool:
    results = []
    for count in counts:
        with _on_threads(bound, count):
            results.append(tree_flatten(bound.run())[0])
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@contextmanager
def _on_threads(bound: Bound, count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with bound.surroundings():
            # Starts the threads that the samples find waiting.
            bound.run()
            yield
    finally:
        torch.set_num_threads(before)
