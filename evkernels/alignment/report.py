"""Pictures and a report of an alignment: training, retrieval curves, both kinds of features in one plane."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from evkernels import files, ops

_EVENTS, _TARGETS = "#30638e", "#edae49"
# Pairs in the picture of both kinds: more are a cloud, and t-SNE takes long.
_MOST_POINTS = 1000


def in_words(metrics: dict[str, float]) -> str:
    """Similarity and recall in one line."""
    recalls = ", ".join(f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("R@"))
    return f"cosine {metrics['cosine_similarity']:.3f}, {recalls}"


def write(
    folder: Path,
    checkpoint: str,
    metrics: dict[str, float],
    event: Tensor,
    target: Tensor,
    quality: dict[str, object],
) -> None:
    """Writes metrics.json, retrieval.png, tsne.png and report.md, of embeddings [N, D]."""
    count = len(event)
    files.write_text(folder / "metrics.json", json.dumps({**metrics, **quality, "pairs": count}, indent=1) + "\n")
    draw_retrieval(folder / "retrieval.png", event, target)
    has_plane = count >= 4
    if has_plane:
        draw_plane(folder / "tsne.png", event, target)
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    rows += [f"| {name.replace('_', ' ')} | {value} |" for name, value in quality.items() if isinstance(value, str)]
    lines = [
        "# Alignment",
        f"Checkpoint `{checkpoint}`, {count} pairs; by chance R@k is k / {count}.",
        "\n".join(["| measure | value |", "| --- | ---: |", *rows]),
        f"The acceptance rate is estimated from the cosine, {quality['estimated_acceptance_rate']:.2f}: not measured.",
        "![retrieval](retrieval.png)",
        *["![both kinds of features](tsne.png)"] * has_plane,
    ]
    files.write_text(folder / "report.md", "\n\n".join(lines) + "\n")


def draw_training(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Losses and recall over the epochs."""
    figure = _figure(10, 4)
    losses, recalls = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name in ("total_loss", "val_loss"):
        losses.plot(epochs, [row[name] for row in history], marker=".", label=name.replace("_", " "))
    for name in (name for name in history[0] if name.startswith("R@")):
        recalls.plot(epochs, [row[name] for row in history], marker=".", label=name)
    losses.set(title="Loss", xlabel="epoch")
    recalls.set(title="Recall on held-out pairs", xlabel="epoch", ylim=(0, 1))
    losses.legend()
    recalls.legend()
    files.write(path, figure.savefig)


def draw_retrieval(path: Path, event: Tensor, target: Tensor) -> None:
    """Recall at k over k, in both directions, with chance."""
    count = len(event)
    ks = sorted({round(float(k)) for k in np.geomspace(1, count, min(count, 40))})
    figure = _figure(5.5, 4)
    axes = figure.subplots()
    for title, pair, colour in (
        ("events look for targets", (event, target), _EVENTS),
        ("targets look for events", (target, event), _TARGETS),
    ):
        axes.plot(ks, ops.retrieval_recall(*pair, ks).tolist(), marker=".", color=colour, label=title)
    axes.plot(ks, [k / count for k in ks], "k:", linewidth=0.8, label="chance")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel="recall at k", title=f"Retrieval among {count} pairs")
    axes.legend()
    files.write(path, figure.savefig)


def draw_plane(path: Path, event: Tensor, target: Tensor) -> None:
    """Embeddings of both kinds in one plane, by t-SNE of their cosines; lines join pairs."""
    step = -(-len(event) // _MOST_POINTS)
    both = [F.normalize(x[::step].float(), dim=1).numpy() for x in (event.detach(), target.detach())]
    count, points = len(both[0]), np.concatenate(both)
    plane = TSNE(metric="cosine", init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=0)
    x, y = plane.fit_transform(points).T
    figure = _figure(6, 6)
    axes = figure.subplots()
    axes.plot([x[:count], x[count:]], [y[:count], y[count:]], color="0.8", linewidth=0.4, zorder=0)
    axes.scatter(x[:count], y[:count], s=10, color=_EVENTS, label="events")
    axes.scatter(x[count:], y[count:], s=10, color=_TARGETS, label="targets")
    axes.set(xticks=[], yticks=[], title=f"t-SNE of {count} pairs")
    axes.legend()
    files.write(path, figure.savefig)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
