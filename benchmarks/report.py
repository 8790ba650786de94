"""What the results say, as JSON, as Markdown and in words: times, speed-ups, and where we are slower."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Measurement, Result
from benchmarks.machine import one_line

README_MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


@dataclass(frozen=True)
class Comparison:
    """The best of ours in one layout beside the best competitor it is measured against."""

    ours: Measurement
    other: Measurement

    @property
    def speedup(self) -> float:
        return self.ours.speedup[self.other.label]


def against_best(result: Result) -> Comparison | None:
    """Our best provider against the best competitor, each in whichever layout suits it."""
    if not result.ours or not result.competitors:
        return None
    ours = min(result.ours, key=lambda measurement: measurement.ms)
    # By the paired ratio and not by the median: the closest rival is the one with the smallest speed-up over it.
    return Comparison(ours, min(result.competitors, key=lambda other: ours.speedup[other.label]))


def losses(result: Result) -> list[Comparison]:
    """Every comparison we lose: our best against the best, and within one layout our best against its best."""
    lost = []
    overall = against_best(result)
    if overall and overall.speedup < 1:
        lost.append(overall)
    for layout in dict.fromkeys(measurement.layout for measurement in result.ours):
        ours = min((m for m in result.ours if m.layout == layout), key=lambda m: m.ms)
        rivals = [m for m in result.competitors if m.layout == layout]
        if rivals:
            comparison = Comparison(ours, min(rivals, key=lambda other: ours.speedup[other.label]))
            if comparison.speedup < 1 and comparison not in lost:
                lost.append(comparison)
    return lost


COLUMNS = ("op", "mode", "dtype", "shape", "eager", "best other", "ours", "vs eager", "vs best", "GB/s", "of limit")


def row(result: Result) -> list[str]:
    """One line of the table: milliseconds, speed-ups, bandwidth and the share of the machine's limit."""
    head = [result.op, result.mode, result.dtype, result.shape]
    if result.failures:
        return [*head, "", "", "WRONG: " + "; ".join(result.failures), "", "", "", ""]
    eager = min((m for m in result.competitors if m.name == "eager"), key=lambda m: m.ms, default=None)
    others = [m for m in result.competitors if m.name != "eager"]
    other = min(others, key=lambda m: m.ms, default=None)
    best = against_best(result)
    ours = best.ours if best else min(result.ours, key=lambda m: m.ms, default=None)
    return [
        *head,
        _time(eager),
        _time(other),
        _time(ours),
        f"{ours.speedup[eager.label]:.2f}x" if ours and eager else "",
        _ratio(best.speedup) if best else "",
        f"{ours.gb_per_s:.1f}" if ours else "",
        f"{ours.share_of_limit:.0%}" if ours else "",
    ]


def conclusion(results: Sequence[Result]) -> list[str]:
    """In sentences: what is wrong, what is missing, what differs, and where we are slower."""
    lines = [f"WRONG: {r.name}: {label}: {why}" for r in results for label, why in r.failures.items()]
    absent = {name: reason for result in results for name, reason in result.absent.items()}
    lines += [f"Not measured: {name}: {reason}" for name, reason in absent.items()]
    differing = {(r.op, m.label): m.differs for r in results for m in r.competitors if m.differs}
    lines += [f"Timed, but with another result than {op}: {label}: {why}" for (op, label), why in differing.items()]
    compiled = [m.compile_s for result in results for m in result.measurements if m.compile_s is not None]
    if compiled:
        lines.append(
            f"Not counted: torch.compile's first call, {min(compiled):.1f} to {max(compiled):.1f} s in each case."
        )
    compared = [result for result in results if against_best(result)]
    lost = [(result, comparison) for result in compared for comparison in losses(result)]
    if lost:
        cases = {result.name for result, _ in lost}
        lines.append(f"Slower than the best competitor in {len(cases)} of {len(compared)} cases:")
        lines += [
            f"  {result.name}: {comparison.ours.label} {comparison.ours.ms:.3g} ms, "
            f"{comparison.other.label} {comparison.other.ms:.3g} ms ({comparison.speedup:.2f}x)"
            for result, comparison in lost
        ]
    elif compared:
        lines.append(
            f"In none of the {len(compared)} cases slower than a competitor, over all layouts and within each."
        )
    return lines


def markdown(results: Sequence[Result], machine: dict[str, str]) -> str:
    """Machine, table and conclusion."""
    lines = [f"Machine: {one_line(machine)}.", "", _explanation(results), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(result)) + " |" for result in results]
    lines += [""]
    lines += [f"- {line.strip()}" if line.startswith("  ") else f"{line}\n" for line in conclusion(results)]
    return "\n".join(lines).rstrip() + "\n"


def write_json(path: Path, results: Sequence[Result], machine: dict[str, str], settings: dict) -> None:
    content = {"machine": machine, "settings": settings, "results": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def update_readme(path: Path, text: str) -> None:
    """Puts `text` between the two marks.

    Raises:
        ValueError: if the file does not have them, once each and in order.
    """
    begin, end = README_MARKS
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path} must contain the line {begin} and after it the line {end}, once each")
    before, after = content.partition(begin)[0], content.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}{end}{after}")


def _explanation(results: Sequence[Result]) -> str:
    clocks = {"cpu": "processor time", "wall": "wall-clock time"}
    clock = " and ".join(clocks[name] for name in sorted({result.clock for result in results}))
    return (
        f"Milliseconds per call ({clock}), medians of interleaved samples, each in its best layout; speed-ups are "
        "medians of the ratios within a round. GB/s counts the bytes that must be moved at least; the limit is a copy "
        "of as many bytes, or a matrix product of as many operations, measured in the same rounds."
    )


def _time(measurement: Measurement | None) -> str:
    return f"{measurement.ms:.3g} ({measurement.label})" if measurement else ""


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value >= 1 else f"{value:.2f}x SLOWER"
