"""Three PNGs per op: speed-up bars, time against size, bandwidth against the measured copy.

Colours belong to providers and are the same in every plot; each panel is one mode and dtype.
"""

import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

from benchmarks.harness import Result

_LIMIT = {"color": "black", "linestyle": "--", "linewidth": 1}


def draw(results: Sequence[Result], folder: Path, subtitle: str) -> list[Path]:
    """Writes the plots of every op and returns their paths."""
    paths = []
    for op in dict.fromkeys(result.op for result in results):
        mine = [result for result in results if result.op == op and result.ours and result.competitors]
        if not mine:
            continue
        for name, title, panel in (
            ("speedup", "speed-up of our best over each competitor", _speedup),
            ("time", "time against size", _time),
            ("bandwidth", "bytes that must move per second", _bandwidth),
        ):
            paths.append(folder / f"{op}-{name}.png")
            _figure(mine, f"{op}: {title}", subtitle, panel, paths[-1])
    return paths


def _figure(results: list[Result], title: str, subtitle: str, panel, path: Path) -> None:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.mode, result.dtype), []).append(result)
    labels = dict.fromkeys(m.label for result in results for m in result.measurements)
    colours = dict(zip(labels, cycle(pyplot.get_cmap("tab10").colors), strict=False))
    rows = len(dict.fromkeys(mode for mode, _ in groups))
    columns = -(-len(groups) // rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1 + 6 * columns, 2 + 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, ((mode, dtype), group) in zip(axes.flat, groups.items(), strict=False):
        axis.set_title(f"{mode}, {dtype}", fontsize=10)
        panel(axis, sorted(group, key=lambda result: result.bytes), colours)
        axis.grid(True, alpha=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * columns, fontsize=8)
    figure.suptitle(f"{title}\n{textwrap.fill(subtitle, 75 * columns)}", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _speedup(axis: Axes, results: list[Result], colours: dict) -> None:
    competitors = list(dict.fromkeys(m.label for result in results for m in result.competitors))
    width = 0.8 / len(competitors)
    for k, label in enumerate(competitors):
        for position, result in enumerate(results):
            best = min(result.ours, key=lambda m: m.ms)
            if label in best.speedup:
                x = position + (k - (len(competitors) - 1) / 2) * width
                value = best.speedup[label]
                axis.bar(x, value, width, color=colours[label], label=label)
                axis.text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=5)
    axis.axhline(1, **_LIMIT)
    axis.set_xticks(range(len(results)), [result.shape for result in results], rotation=20, ha="right", fontsize=7)
    axis.set_ylabel("times faster")


def _time(axis: Axes, results: list[Result], colours: dict) -> None:
    for label, points in _series(results).items():
        sizes = [result.items for result, _ in points]
        times = [m.ms for _, m in points]
        spread = [[max(m.ms - m.ms_20, 0) for _, m in points], [max(m.ms_80 - m.ms, 0) for _, m in points]]
        ours = points[0][1].ours
        axis.errorbar(
            sizes, times, spread, marker="o" if ours else ".", lw=2 if ours else 1, color=colours[label], label=label
        )
    axis.plot([result.items for result in results], [result.limit_ms for result in results], label="limit", **_LIMIT)
    _logarithmic(axis)
    axis.set(xlabel=f"{results[0].item}s", ylabel="ms")


def _bandwidth(axis: Axes, results: list[Result], colours: dict) -> None:
    for label, points in _series(results).items():
        ours = points[0][1].ours
        axis.plot(
            [result.bytes / 1e6 for result, _ in points],
            [m.gb_per_s for _, m in points],
            marker="o" if ours else ".",
            lw=2 if ours else 1,
            color=colours[label],
            label=label,
        )
    sizes = [result.bytes / 1e6 for result in results]
    axis.plot(sizes, [result.copy_gb_per_s for result in results], label="copy", **_LIMIT)
    _logarithmic(axis)
    axis.set(xlabel="MB that must move", ylabel="GB/s")


def _logarithmic(axis: Axes) -> None:
    """Both axes, with ticks at 1, 2, 5, 10, ...; sizes written as 20, 1k, 5M."""
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_minor_locator(NullLocator())


def _series(results: list[Result]) -> dict[str, list]:
    """By label: the provider's measurement at each size."""
    series: dict[str, list] = {}
    for result in results:
        for measurement in result.measurements:
            series.setdefault(measurement.label, []).append((result, measurement))
    return series
