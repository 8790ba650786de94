"""The pictures of the demo. Events are red where it became brighter (ON), blue where darker (OFF), on white."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evkernels import files
from evkernels.demo.comparison import Row
from evkernels.demo.training import Training
from evkernels.events import Events, event_frame

_DPI = 110
_FUSED, _REFERENCE, _PLAIN = "#d1495b", "#8d96a3", "#30638e"


def draw_event_frame(path: Path, events: Events, start_us: int) -> None:
    """The events where they happened; `start_us` is when the first did, on the recording's own clock."""
    # At least one pixel of the picture for each of the sensor's, or single events would be lost.
    inches = max(5.5, events.height / _DPI)
    figure = _figure(inches * events.width / events.height + 1.2, inches + 1.2)
    axes = figure.add_subplot()
    axes.imshow(event_frame(events), interpolation="nearest")
    on = int(events.p.sum())
    axes.set_title(
        f"{len(events):,} events in {events.duration / 1e3:.1f} ms, from {start_us / 1e3:.1f} ms on\n"
        f"red: {on:,} ON, blue: {len(events) - on:,} OFF"
    )
    axes.set(xlabel="column x [pixels]", ylabel="row y [pixels]")
    _save(figure, path)


def draw_prediction(path: Path, last: np.ndarray, predicted: np.ndarray, target: np.ndarray, window_ms: float) -> None:
    """What the network saw last, what it expects, what came: counts [2*bins, H, W] each."""
    height, width = target.shape[-2:]
    panels = {
        "last window seen": last,
        "predicted next window": predicted,
        "actual next window (not trained on)": target,
    }
    side_by_side = width < 2 * height
    panel = float(np.clip(4 * width / height, 2.5, 6))
    tall = panel * height / width + 0.9
    figure = _figure(3 * panel + 1.4, tall + 0.4) if side_by_side else _figure(panel + 1.4, 3 * tall + 0.4)
    axes = figure.subplots(*((1, 3) if side_by_side else (3, 1)), squeeze=False).ravel()
    # One scale for all three, so that a faint prediction looks faint.
    counts = np.stack([_by_polarity(value) for value in panels.values()])
    scale = max(1.0, float(np.percentile(counts[counts > 0.5], 95)) if (counts > 0.5).any() else 1.0)
    for axis, title, value in zip(axes, panels, counts, strict=True):
        axis.imshow(_colours(value / scale), interpolation="nearest")
        axis.set_title(f"{title}\n{value.sum():,.0f} events")
        axis.set(xlabel="column x [pixels]", ylabel="row y [pixels]")
    figure.suptitle(
        f"Windows of {window_ms:.2f} ms; red ON, blue OFF, full colour from {scale:.0f} events per pixel and window\n"
    )
    _save(figure, path)


def draw_losses(path: Path, training: Training) -> None:
    """Loss curves, and below them their distance from the reference with the limit."""
    figure = _figure(8, 7)
    curves, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    styles = {
        "reference": (_REFERENCE, "-", 5),
        "PyTorch, channels_last": (_PLAIN, "--", 2),
        "fused": (_FUSED, "-", 1.5),
    }
    steps = np.arange(1, len(training.difference) + 1)
    for form, (colour, line, width) in styles.items():
        run = training.runs[form]
        label = f"{form}: {run.step_seconds * 1e3:.0f} ms per step"
        curves.plot(steps, run.losses, line, color=colour, linewidth=width, label=label)
    for (name, value), line in zip(training.baselines.items(), (":", "-."), strict=True):
        curves.axhline(value, color="black", linewidth=0.8, linestyle=line, label=name)
    curves.set_yscale("log")
    curves.set(title="Training on the same data from the same weights", ylabel="loss, MSE of log(1 + count)")
    curves.legend(fontsize=8)
    distance.plot(steps, training.allowed, color="black", linewidth=1, label="allowed, from measured rounding")
    distance.plot(steps, training.difference, "o-", color=_FUSED, markersize=3, label="fused")
    reference = np.array(training.runs["reference"].losses)
    for (form, run), line in zip(training.runs.items(), ("", "", "s--", "^:", "v-."), strict=True):
        if line:
            gap = np.abs(np.array(run.losses) - reference)
            distance.plot(steps, gap, line, color=_PLAIN, markersize=3, linewidth=1, label=form)
    distance.set_yscale("symlog", linthresh=float(min(value for value in training.allowed)) / 10 or 1e-9)
    distance.set(xlabel="training step", ylabel="|loss - reference's|")
    distance.set_ylim(bottom=0)
    distance.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    _save(figure, path)


def draw_stage_times(path: Path, rows: list[Row]) -> None:
    """Milliseconds of every stage: fused, reference, best plain PyTorch."""
    figure = _figure(9, 0.62 * len(rows) + 1.4)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    bars = {
        "fused": (_FUSED, [row.best(fused=True)[1] for row in rows]),
        "best plain PyTorch": (_PLAIN, [row.best(fused=False)[1] for row in rows]),
        "reference": (_REFERENCE, [row.seconds["reference"] for row in rows]),
    }
    for index, (label, (colour, seconds)) in enumerate(bars.items()):
        milliseconds = [value * 1e3 for value in seconds]
        container = axes.barh(places + (index - 1) * 0.27, milliseconds, 0.25, color=colour, label=label)
        notes = [f" {row.speed_up:.1f}x" if row.agrees else " wrong" for row in rows] if label == "fused" else None
        axes.bar_label(container, notes or [f" {value:.3g}" for value in milliseconds], fontsize=7)
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set(title="Time per stage; on red, speed-up over the best plain PyTorch", xlabel="milliseconds (logarithmic)")
    axes.legend(fontsize=8)
    _save(figure, path)


def _by_polarity(counts: np.ndarray) -> np.ndarray:
    """Counts [2*bins, H, W], OFF bins first, to [2, H, W]."""
    return counts.reshape(2, -1, *counts.shape[-2:]).sum(1)


def _colours(counts: np.ndarray) -> np.ndarray:
    """OFF and ON in 0..1, [2, H, W], as red and blue taken away from white, [H, W, 3]."""
    off, on = np.clip(counts, 0, 1)
    return np.clip(np.stack([1 - off, 1 - off - on, 1 - on], axis=-1), 0, 1)


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    files.write(path, figure.savefig)
