"""What the runs say: summaries per model, accuracy by length, and whether differences are more than noise.

Accuracies after the last epoch are compared, not the best ones: the best epoch is chosen by the test set. Over seeds,
all pairs by Games-Howell (Tukey's test without equal variances), which corrects for the number of pairs itself. Over
test images, for the first seed, McNemar's exact test with Holm's correction: it says whether two trained networks
differ, not whether training them again would show the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from evkernels.compare_time_embeddings.data import CLASSES, Dataset
from evkernels.compare_time_embeddings.training import Run
from evkernels.events.optional import require

LEVEL = 0.05
_LENGTH_GROUPS = 5
# Converged: from here on within this much of the best accuracy of the run.
_CONVERGED_WITHIN = 0.01
# Epochs that stability looks at: the last ones.
_LAST_SHARE = 0.2


@dataclass
class Summary:
    """One model over all seeds: means, and deviations between seeds (0 for a single seed)."""

    model: str
    parameters: int
    best_accuracy: float
    best_accuracy_std: float
    final_accuracy: float
    final_accuracy_std: float
    final_train_accuracy: float
    convergence_epoch: float  # the first from which the run stays within 1 % of its best accuracy
    stability: float  # standard deviation of the test accuracy over the last fifth of the epochs
    seconds_per_epoch: float  # median over epochs and seeds
    diverged: int = 0  # runs whose loss became no number


def summarise(runs: Sequence[Run]) -> Summary:
    """The summary of one model's runs."""
    best = np.array([max(run.test_accuracy) for run in runs])
    final = np.array([run.test_accuracy[-1] for run in runs])
    last = max(2, round(_LAST_SHARE * runs[0].epochs))
    return Summary(
        runs[0].model,
        runs[0].parameters,
        *_mean_and_deviation(best),
        *_mean_and_deviation(final),
        float(np.mean([run.train_accuracy[-1] for run in runs])),
        float(np.mean([convergence_epoch(run.test_accuracy) for run in runs])),
        float(np.mean([np.std(run.test_accuracy[-last:]) for run in runs])),
        float(np.median([seconds for run in runs for seconds in run.seconds])),
        sum(not np.isfinite(run.train_loss + run.test_loss).all() for run in runs),
    )


def convergence_epoch(accuracy: Sequence[float]) -> int:
    """The first epoch, counted from 1, from which the accuracy stays within 1 % of the best; the last if none does."""
    enough = np.array(accuracy) >= max(accuracy) - _CONVERGED_WITHIN
    below = np.flatnonzero(~enough)
    return int(below[-1]) + 2 if len(below) and below[-1] + 1 < len(accuracy) else (len(accuracy) if len(below) else 1)


@dataclass
class ByLength:
    """Accuracy of one model in groups of test sequences of similar length, all seeds together."""

    edges: list[int]  # shortest length of each group, and the longest of all
    counts: list[int]
    accuracy: list[float]
    correlation: float  # of length and being right, point-biserial; NaN where all or none are right
    p_value: float

    def ranges(self) -> list[tuple[int, int]]:
        """Shortest and longest length of each group."""
        lasts = [edge - 1 for edge in self.edges[1:-1]] + self.edges[-1:]
        return list(zip(self.edges[:-1], lasts, strict=True))


def by_length(runs: Sequence[Run], dataset: Dataset) -> ByLength:
    """Groups of equal size by length, as far as equal lengths stay together."""
    stats = require("scipy.stats", "compare", "the comparison")
    lengths, correct = dataset.test.lengths.numpy(), _correct(runs, dataset)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_GROUPS + 1), method="nearest"))
    edges = edges if len(edges) > 1 else np.array([edges[0], edges[0]])
    group = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(group, minlength=len(edges) - 1)
    accuracy = np.bincount(group, weights=correct.mean(axis=0), minlength=len(edges) - 1) / np.maximum(counts, 1)
    correlation = p_value = float("nan")
    if correct[0].min() < correct[0].max() and lengths.min() < lengths.max():
        # Of one seed: the same images under other seeds are no further observations.
        correlation, p_value = stats.pointbiserialr(correct[0], lengths)
    return ByLength(edges.tolist(), counts.tolist(), accuracy.tolist(), float(correlation), float(p_value))


@dataclass
class Pair:
    """Two models compared. p-values are None where they cannot be had."""

    first: str
    second: str
    difference: float  # of the mean final accuracies, first minus second
    interval: tuple[float, float] | None  # at 95 %, simultaneous over all pairs
    p_seeds: float | None  # Games-Howell over seeds
    p_images: float | None  # McNemar over the test images of the first seed, after Holm's correction

    def verdict(self) -> str:
        """What may be said."""
        if self.p_seeds is None:
            return "not testable over seeds: too few of them, or they do not differ"
        return "significant" if self.p_seeds < LEVEL else "within the noise of the seeds"


def compare(runs: dict[str, list[Run]], dataset: Dataset) -> list[Pair]:
    """All pairs of models."""
    stats = require("scipy.stats", "compare", "the comparison")
    names = list(runs)
    final = [np.array([run.test_accuracy[-1] for run in runs[name]]) for name in names]
    tested = None
    if len(names) > 1 and len(final[0]) > 1 and all(values.std() > 0 for values in final):
        tested = stats.tukey_hsd(*final, equal_var=False)
        interval = tested.confidence_interval(1 - LEVEL)
    pairs = list(combinations(range(len(names)), 2))
    p_images = holm([_mcnemar(stats, runs[names[a]][0], runs[names[b]][0], dataset) for a, b in pairs])
    return [
        Pair(
            names[a],
            names[b],
            float(final[a].mean() - final[b].mean()),
            (float(interval.low[a, b]), float(interval.high[a, b])) if tested else None,
            float(tested.pvalue[a, b]) if tested else None,
            p_images[k],
        )
        for k, (a, b) in enumerate(pairs)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of any false finding among all stays at the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = float(largest)
    return adjusted


def confusion(runs: Sequence[Run], dataset: Dataset) -> np.ndarray:
    """Counts over all seeds, [true class, predicted class]."""
    labels = dataset.test.labels.numpy()
    pairs = np.concatenate([labels * CLASSES + np.array(run.predictions) for run in runs])
    return np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def detailed(runs: dict[str, list[Run]], dataset: Dataset, pairs: Sequence[Pair]) -> dict:
    """Everything, as dictionaries and lists."""
    lengths = {name: asdict(by_length(of_model, dataset)) for name, of_model in runs.items()}
    return {
        "dataset": dataset.name,
        "sequences": {"train": len(dataset.train), "test": len(dataset.test)},
        "accuracy_by_length": lengths,
        "confusion": {name: confusion(of_model, dataset).tolist() for name, of_model in runs.items()},
        "pairs": [asdict(pair) | {"verdict": pair.verdict()} for pair in pairs],
    }


def _correct(runs: Sequence[Run], dataset: Dataset) -> np.ndarray:
    labels = dataset.test.labels.numpy()
    return np.stack([np.array(run.predictions) == labels for run in runs]).astype(float)


def _mcnemar(stats, first: Run, second: Run, dataset: Dataset) -> float:
    a, b = _correct([first, second], dataset)
    only_first, only_second = int((a > b).sum()), int((b > a).sum())
    disagreeing = only_first + only_second
    return float(stats.binomtest(only_first, disagreeing).pvalue) if disagreeing else 1.0


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
