"""The pictures of the comparison. A model has the same colour in all of them; bands are one deviation between seeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evkernels import files
from evkernels.compare_time_embeddings.analysis import LEVEL, ByLength, Pair, Summary
from evkernels.compare_time_embeddings.training import Run

_COLOURS = ("#8d96a3", "#30638e", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#3f7d20", "#a44200")
_DPI = 110
CHANCE = 0.1


def draw_training_curves(path: Path, runs: dict[str, list[Run]]) -> None:
    """Loss and accuracy over the epochs, training solid and test dashed."""
    figure = _figure(11, 5)
    losses, accuracies = figure.subplots(1, 2)
    for (name, of_model), colour in zip(runs.items(), _cycle(runs), strict=True):
        for axes, kind in ((losses, "loss"), (accuracies, "accuracy")):
            for part, line in (("train", "-"), ("test", "--")):
                values = np.array([getattr(run, f"{part}_{kind}") for run in of_model])
                epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
                mark = "o" if len(epochs) < 3 else None
                axes.plot(epochs, mean, line, marker=mark, color=colour, label=name if part == "train" else None)
                if len(values) > 1 and part == "test":
                    spread = values.std(axis=0, ddof=1)
                    axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    accuracies.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":", label="chance")
    losses.set(title="Loss", ylabel="cross-entropy")
    accuracies.set(title="Accuracy", ylabel="accuracy")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (losses, accuracies):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracies.legend(fontsize=8)
    figure.suptitle(f"Training solid, test dashed; {_seeds(runs)}")
    files.write(path, figure.savefig)


def draw_convergence(path: Path, summaries: Sequence[Summary]) -> None:
    """When each model converges, how much it overfits, how steady it ends."""
    figure = _figure(12, 4.2)
    panels = {
        "Convergence epoch\n(stays within 1 % of the run's best)": [s.convergence_epoch for s in summaries],
        "Overfitting: training minus test accuracy\n[percentage points]": [
            100 * (s.final_train_accuracy - s.final_accuracy) for s in summaries
        ],
        "Stability: deviation of the last epochs' accuracy\n[percentage points, lower is steadier]": [
            100 * s.stability for s in summaries
        ],
    }
    names = [_short(s.model) for s in summaries]
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        bars = axes.bar(names, values, color=_cycle(names))
        axes.bar_label(bars, [f"{value:.2g}" for value in values], fontsize=9, padding=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(y=0.15)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    files.write(path, figure.savefig)


def draw_temporal_patterns(path: Path, lengths: dict[str, ByLength], test_lengths: np.ndarray) -> None:
    """Accuracy by length of the sequence, the correlation of the two, and how many sequences there are."""
    figure = _figure(13, 4.4)
    by_length, correlation, samples = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    groups = next(iter(lengths.values()))
    labels = [f"{first}-{last}" for first, last in groups.ranges()]
    for (name, value), colour in zip(lengths.items(), _cycle(lengths), strict=True):
        by_length.plot(labels, value.accuracy, "o-", color=colour, label=name)
    by_length.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":", label="chance")
    by_length.set(title="Accuracy by length", xlabel="events in the sequence", ylabel="accuracy")
    by_length.yaxis.set_major_formatter(PercentFormatter(1))
    by_length.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    names = [_short(name) for name in lengths]
    values = [0 if np.isnan(value.correlation) else value.correlation for value in lengths.values()]
    bars = correlation.bar(names, values, color=_cycle(names))
    notes = ["n/a" if np.isnan(v.p_value) else f"p={v.p_value:.2g}" for v in lengths.values()]
    correlation.bar_label(bars, notes, fontsize=8, padding=2)
    correlation.axhline(0, color="black", linewidth=0.8)
    correlation.margins(y=0.2)
    if not any(values):
        correlation.set_ylim(-1, 1)
    correlation.set_title("Correlation of length and\nbeing right (first seed)", fontsize=10)
    correlation.tick_params(axis="x", labelsize=7)
    samples.hist(test_lengths, bins=30, color=_COLOURS[1])
    samples.set(title="Test sequences", xlabel="events in the sequence", ylabel="sequences")
    files.write(path, figure.savefig)


def draw_confusion(path: Path, matrices: dict[str, np.ndarray]) -> None:
    """One matrix per model, each row a true class, in percent of that class."""
    columns = min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = _figure(5.2 * columns, 4.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, counts) in zip(panels, matrices.items(), strict=False):
        percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(percent >= 0.5):
            value = percent[row, column]
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="wk"[int(value < 60)])
        axes.set(title=name, xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels, label="percent of the true class", shrink=0.6)
    files.write(path, figure.savefig)


def draw_significance(path: Path, names: Sequence[str], pairs: Sequence[Pair]) -> None:
    """p-values of all pairs, over seeds and over test images; significant ones are dark."""
    figure = _figure(11, 5)
    panels = {
        "Over seeds (Games-Howell): would training again show it?": [pair.p_seeds for pair in pairs],
        "Over test images (McNemar, Holm), first seed": [pair.p_images for pair in pairs],
    }
    shown = [_short(name) for name in names]
    for axes, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        matrix = np.full((len(names), len(names)), np.nan)
        for pair, value in zip(pairs, values, strict=True):
            a, b = names.index(pair.first), names.index(pair.second)
            matrix[a, b] = matrix[b, a] = np.nan if value is None else value
        axes.imshow(np.where(matrix < LEVEL, 1.0, 0.15), cmap="Blues", vmin=0, vmax=1.3)
        for (row, column), value in np.ndenumerate(matrix):
            text = "-" if row == column else "n/a" if np.isnan(value) else f"{value:.2g}"
            axes.text(column, row, text, ha="center", va="center", color="w" if value < LEVEL else "k")
        axes.set_xticks(range(len(names)), shown, fontsize=8)
        axes.set_yticks(range(len(names)), shown, fontsize=8)
        axes.set_title(title, fontsize=10)
    figure.suptitle(f"p-values of differences in final accuracy, corrected for all pairs; dark: below {LEVEL}")
    files.write(path, figure.savefig)


def _cycle(names) -> list[str]:
    return [_COLOURS[k % len(_COLOURS)] for k in range(len(names))]


def _short(name: str) -> str:
    return name.removesuffix("_LSTM").replace("KAN_MAMMOTE", "KAN-\nMAMMOTE")


def _seeds(runs: dict[str, list[Run]]) -> str:
    count = len(next(iter(runs.values())))
    return "one seed" if count == 1 else f"mean of {count} seeds, bands one standard deviation of the test curves"


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
