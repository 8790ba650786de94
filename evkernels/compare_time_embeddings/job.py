"""The comparison: all models with all seeds, analysis, pictures, report; one folder per configuration."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from evkernels import arguments, files
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
    """Makes sure that what is in the folders belongs to the same configurations.

    Raises:
        InputError: if it does not.
    """
    for name, config in configs.items():
        before = out / name / "config.json"
        try:
            if before.is_file():
                _expect_same(json.loads(before.read_text(encoding="utf-8")), config, out / name)
        except (OSError, ValueError) as error:
            raise InputError(f"--out {out / name}: {error}") from error


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
    # Only now, so that wrong data leaves nothing behind.
    for inner in ("checkpoints", "logs"):
        arguments.output_folder(out / inner)
    report.write_json(out / "config.json", asdict(config))
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
    paths = [out / name for name in PICTURES.values()]
    pictures.draw_training_curves(paths[0], runs)
    pictures.draw_convergence(paths[1], summaries)
    pictures.draw_temporal_patterns(paths[2], lengths, dataset.test.lengths.numpy())
    pictures.draw_confusion(paths[3], {name: analysis.confusion(of_model, dataset) for name, of_model in runs.items()})
    pictures.draw_significance(paths[4], list(runs), pairs)
    text = report.markdown(config, dataset, summaries, pairs, lengths, PICTURES)
    files.write_text(out / "analysis_report.md", text)
    return summaries


def _keep_best(runs: dict[str, list[Run]], out: Path) -> None:
    """MODEL_best.pth: the weights of the seed and epoch with the best test accuracy."""
    for name, of_model in runs.items():
        best = max(of_model, key=lambda run: max(run.test_accuracy))
        source = out / "checkpoints" / f"{best.name}_best.pth"
        files.write(out / f"{name}_best.pth", lambda file, source=source: file.write(source.read_bytes()))


def _write_ablation(out: Path, results: dict[str, Sequence[Summary]]) -> None:
    header = ["configuration", *report.HEADER]
    rows = [{"configuration": name} | asdict(summary) for name, found in results.items() for summary in found]
    files.write_rows(out / "ablation.csv", rows)
    lines = [[name, *report.summary_cells(summary)] for name, found in results.items() for summary in found]
    files.write_text(out / "ablation.md", "# Ablation\n\n" + report.table(header, lines) + "\n")
