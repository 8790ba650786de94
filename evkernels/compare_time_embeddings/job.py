"""The comparison: all models with all seeds, analysis, pictures, report; one folder per configuration."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from evkernels.arguments import InputError
from evkernels.compare_time_embeddings import analysis, data, pictures, report
from evkernels.compare_time_embeddings.analysis import Summary
from evkernels.compare_time_embeddings.config import EXTENDABLE, Config
from evkernels.compare_time_embeddings.models import MODELS
from evkernels.compare_time_embeddings.training import Run, train
from evkernels.demo.terminal import Terminal

PICTURES = {
    "Training curves": "training_curves.png",
    "Convergence": "convergence_analysis.png",
    "Temporal patterns": "temporal_patterns.png",
    "Confusion matrices": "confusion_matrices.png",
    "Statistical significance": "statistical_significance.png",
}


def prepare(configs: dict[str, Config], out: Path) -> None:
    """Makes the folders, and makes sure that what is in them belongs to the same configurations.

    Raises:
        InputError: if it does not, or the folders cannot be written to.
    """
    for name, config in configs.items():
        folder = out / name
        try:
            for inner in ("checkpoints", "logs"):
                (folder / inner).mkdir(parents=True, exist_ok=True)
            before = folder / "config.json"
            if before.is_file():
                _expect_same(json.loads(before.read_text(encoding="utf-8")), config, folder)
            report.write_json(before, asdict(config))
        except (OSError, ValueError) as error:
            raise InputError(f"--out {folder}: {error}") from error


def _expect_same(before: dict, config: Config, folder: Path) -> None:
    for name, value in asdict(config).items():
        if before.get(name) != value and name not in EXTENDABLE:
            raise InputError(
                f"--out {folder}: holds a comparison with {name}={before.get(name)!r}, not {value!r}; "
                "give another folder, or the same configuration to go on with it"
            )


def compare(configs: dict[str, Config], out: Path, device: torch.device) -> None:
    """Runs all configurations; those of an ablation are listed in ablation.csv and ablation.md."""
    terminal = Terminal()
    results = {}
    for name, config in configs.items():
        if name:
            terminal.line(f"configuration {name}")
        results[name] = _compare(terminal, config, out / name, device)
    if len(results) > 1:
        _write_ablation(out, results)
        terminal.line(f"written to {out}/: ablation.csv, ablation.md")


def _compare(terminal: Terminal, config: Config, out: Path, device: torch.device) -> list[Summary]:
    with terminal.step("data"):
        dataset = data.load(config)
    terminal.line(f"{dataset.name}: {len(dataset.train):,} training, {len(dataset.test):,} test sequences")
    runs: dict[str, list[Run]] = {name: [] for name in MODELS}
    for seed in range(config.seeds):
        for name in MODELS:
            with terminal.step(f"{name}, seed {seed}", config.num_epochs) as advance:
                run = train(name, seed, config, dataset, device, out, advance)
            final, best = 100 * run.test_accuracy[-1], 100 * max(run.test_accuracy)
            terminal.line(f"  test accuracy {final:.1f} %, best {best:.1f} %")
            runs[name].append(run)
    with terminal.step("analysis, pictures and report"):
        pairs = analysis.compare(runs, dataset)
        summaries = _write(runs, pairs, config, dataset, out)
    terminal.table(report.HEADER, [report.summary_cells(s) for s in summaries], [False] * len(summaries))
    terminal.line(report.conclusion(summaries, pairs))
    terminal.line(f"written to {out}/: analysis_report.md and what it shows")
    return summaries


def _write(
    runs: dict[str, list[Run]], pairs: list[analysis.Pair], config: Config, dataset: data.Dataset, out: Path
) -> list[Summary]:
    summaries = [analysis.summarise(of_model) for of_model in runs.values()]
    lengths = {name: analysis.by_length(of_model, dataset) for name, of_model in runs.items()}
    report.write_histories(out / "training_histories.json", runs)
    report.write_summary(out, config, summaries)
    report.write_json(out / "detailed_analysis.json", analysis.detailed(runs, dataset, pairs))
    _keep_best(runs, out)
    files = [out / name for name in PICTURES.values()]
    pictures.draw_training_curves(files[0], runs)
    pictures.draw_convergence(files[1], summaries)
    pictures.draw_temporal_patterns(files[2], lengths, dataset.test.lengths.numpy())
    pictures.draw_confusion(files[3], {name: analysis.confusion(of_model, dataset) for name, of_model in runs.items()})
    pictures.draw_significance(files[4], list(runs), pairs)
    text = report.markdown(config, dataset, summaries, pairs, lengths, PICTURES)
    (out / "analysis_report.md").write_text(text, encoding="utf-8")
    return summaries


def _keep_best(runs: dict[str, list[Run]], out: Path) -> None:
    """MODEL_best.pth: the weights of the seed and epoch with the best test accuracy."""
    for name, of_model in runs.items():
        best = max(of_model, key=lambda run: max(run.test_accuracy))
        source = out / "checkpoints" / f"{best.name}_best.pth"
        (out / f"{name}_best.pth").write_bytes(source.read_bytes())


def _write_ablation(out: Path, results: dict[str, Sequence[Summary]]) -> None:
    header = ["configuration", *report.HEADER]
    with open(out / "ablation.csv", "w", newline="", encoding="utf-8") as file:
        rows = [{"configuration": name} | asdict(summary) for name, found in results.items() for summary in found]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = [[name, *report.summary_cells(summary)] for name, found in results.items() for summary in found]
    (out / "ablation.md").write_text("# Ablation\n\n" + report.table(header, lines) + "\n", encoding="utf-8")
