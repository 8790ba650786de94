"""The results as files: histories, summary, table, report."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import evkernels
from evkernels import files
from evkernels.compare_time_embeddings.analysis import Pair, Summary
from evkernels.compare_time_embeddings.config import Config
from evkernels.compare_time_embeddings.data import Dataset
from evkernels.compare_time_embeddings.training import Run

HEADER = ["model", "parameters", "final accuracy", "best accuracy", "converged", "stability", "s per epoch"]
PAIR_HEADER = ["pair", "difference", "95 % interval", "p over seeds", "p over images", "verdict"]
CLAIM = (
    "The published comparison (README of kan-mammotev2) names no accuracies; it promises that learned time embeddings "
    "are compared fairly, and its text suggests that LeTE and KAN-MAMMOTE, the more advanced ones, win."
)


def write_histories(path: Path, runs: dict[str, list[Run]]) -> None:
    """training_histories.json: every value of every epoch, by model and seed."""
    kept = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    histories = {name: {f"seed{r.seed}": {k: getattr(r, k) for k in kept} for r in rs} for name, rs in runs.items()}
    write_json(path, histories)


def write_json(path: Path, value) -> None:
    """JSON that any reader takes: what is no finite number is null."""
    files.write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(folder: Path, config: Config, summaries: Sequence[Summary]) -> None:
    """summary.json and results_summary.csv."""
    rows = [asdict(summary) for summary in summaries]
    write_json(folder / "summary.json", {"machine": machine(), "config": asdict(config), "models": rows})
    files.write_rows(folder / "results_summary.csv", rows)


def summary_cells(summary: Summary) -> list[str]:
    """One line of the table of models; accuracies in percent, with deviations between seeds."""
    return [
        summary.model,
        f"{summary.parameters:,}",
        _percent(summary.final_accuracy, summary.final_accuracy_std),
        _percent(summary.best_accuracy, summary.best_accuracy_std),
        f"{summary.convergence_epoch:.1f}",
        f"{100 * summary.stability:.2f}",
        f"{summary.seconds_per_epoch:.2f}",
    ]


def pair_cells(pair: Pair) -> list[str]:
    """One line of the table of pairs; differences in percentage points."""
    interval = "-" if pair.interval is None else f"{100 * pair.interval[0]:+.1f} to {100 * pair.interval[1]:+.1f}"
    return [
        f"{pair.first} - {pair.second}",
        f"{100 * pair.difference:+.1f}",
        interval,
        _p(pair.p_seeds),
        _p(pair.p_images),
        pair.verdict(),
    ]


def conclusion(summaries: Sequence[Summary], pairs: Sequence[Pair]) -> str:
    """The result in one or two sentences, no stronger than the tests."""
    best = max(summaries, key=lambda s: s.final_accuracy)
    rivals = {
        pair.second if pair.first == best.model else pair.first: pair
        for pair in pairs
        if best.model in (pair.first, pair.second)
    }
    beaten = [name for name, pair in rivals.items() if pair.p_seeds is not None and pair.verdict() == "significant"]
    untested = [name for name, pair in rivals.items() if pair.p_seeds is None]
    noise = [name for name in rivals if name not in beaten + untested]
    diverged = [f"{s.model} ({s.diverged} runs)" for s in summaries if s.diverged]
    text = f"{best.model} ends highest with {100 * best.final_accuracy:.1f} %."
    if beaten:
        text += f" It is significantly better than {', '.join(beaten)}."
    if noise:
        text += f" Its lead over {', '.join(noise)} is not more than noise, as far as these seeds can tell."
    if untested:
        text += f" Whether its lead over {', '.join(untested)} is more than noise, these seeds cannot tell."
    if diverged:
        text += f" Diverged, with a loss that is no number: {', '.join(diverged)}."
    return text


def markdown(
    config: Config, dataset: Dataset, summaries: Sequence[Summary], pairs: Sequence[Pair], lengths: dict, pictures: dict
) -> str:
    """The report; `pictures` maps titles to file names beside it."""
    changed = [f"{k}={v}" for k, v in asdict(config).items() if v != getattr(Config, k)]
    parts = ["# Time embeddings for LSTMs", f"**{conclusion(summaries, pairs)}**"]
    parts.append(
        f"* {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test sequences\n"
        f"* {config.num_epochs} epochs, {config.seeds} seeds; other than default: {', '.join(changed) or 'nothing'}\n"
        f"* {machine()}"
    )
    parts += ["## Models", table(HEADER, [summary_cells(s) for s in summaries])]
    parts.append(
        "Accuracies in percent on the test set, mean and standard deviation over seeds. Best is the best epoch of each "
        "run, chosen by the test set, so it flatters; final is after the last epoch, and all tests use it. Converged: "
        "first epoch from which a run stays within 1 % of its best. Stability: deviation of the accuracy over the last "
        "fifth of the epochs, in percentage points."
    )
    parts += ["## Differences", table(PAIR_HEADER, [pair_cells(p) for p in pairs])]
    parts.append(
        "Over seeds: Games-Howell, which corrects for the number of pairs; it answers whether training again would "
        "show the difference. Over images: McNemar's exact test on the first seed's predictions, Holm's correction; it "
        "answers only whether these two trained networks differ. Few seeds find large differences only."
    )
    columns = [f"{first} to {last}" for first, last in next(iter(lengths.values())).ranges()]
    rows = [
        [name, *(f"{100 * a:.1f}" for a in value.accuracy), _correlation(value.correlation), _p(value.p_value)]
        for name, value in lengths.items()
    ]
    parts += ["## Accuracy by number of events", table(["model", *columns, "correlation", "p"], rows)]
    parts += [CLAIM, "## Pictures", *(f"![{title}]({name})" for title, name in pictures.items())]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def machine() -> str:
    """One line about where this ran."""
    return (
        f"evkernels {evkernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


def _percent(mean: float, deviation: float) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation else "")


def _p(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _correlation(value: float) -> str:
    return "-" if value != value else f"{value:+.3f}"
