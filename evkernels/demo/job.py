"""The four steps in order, what is said about them, and the exit code."""

from __future__ import annotations

from pathlib import Path

import torch

from evkernels import files
from evkernels.demo import pictures, report, stages, training
from evkernels.demo.comparison import Row
from evkernels.demo.terminal import Terminal
from evkernels.events import Events
from evkernels.models import EventPredictor


def main_job(
    name: str, events: Events, notes: list[str], device: torch.device, out: Path, windows: int, steps: int, seed: int
) -> int:
    """Runs the main job; 0, or 1 if anything disagreed."""
    terminal = Terminal()
    # TF32 would make float32 on a GPU mean something else for each library's convolutions.
    with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(seed)
        parts, duration, more = stages.cut(events, windows)
        facts = [
            f"recording: {name}, {len(events):,} events on {events.width}x{events.height} pixels "
            f"over {events.duration / 1e3:.1f} ms",
            f"windows: {windows} of {duration / 1e3:.2f} ms, {stages.BINS} bins each",
            report.machine(device),
            report.served_by(device),
            *notes,
            *more,
        ]
        for fact in facts:
            terminal.line(fact)
        data, rows, focused = _stages(terminal, facts, parts, duration, device)
        model = _model(device, focused)
        rows += _encoder(terminal, model, focused, device)
        _show_stages(terminal, rows)
        trained = _training(terminal, model, focused, rows[-1].best(fused=True)[0], device, steps, seed)
    failures = _failures(rows, trained)
    names = _pictures(terminal, out, data, focused, rows, trained, events)
    files.write_text(out / "report.md", report.markdown(facts, rows, trained, failures, names))
    terminal.line(f"written to {out}/: report.md, {', '.join(names.values())}")
    terminal.line("DISAGREED: " + "; ".join(failures) if failures else "everything agreed")
    return 1 if failures else 0


def _stages(terminal, facts, parts, duration, device) -> tuple[stages.Windows, list[Row], torch.Tensor]:
    with terminal.step("1/4 stacked histograms, fused against reference") as advance:
        data, row = stages.histograms(parts, duration, device, advance)
    focused = training.focus(data.histograms)
    if focused.shape != data.histograms.shape:
        height, width = focused.shape[-2:]
        facts.append(f"the network runs on the busiest {width}x{height} pixels")
        terminal.line(facts[-1])
    return data, [row], focused


def _model(device: torch.device, histograms: torch.Tensor) -> EventPredictor:
    model = EventPredictor(2 * stages.BINS).to(device)
    stages.calibrate(model, histograms[:3])
    return model


def _encoder(terminal, model, histograms, device) -> list[Row]:
    with terminal.step("2/4 encoder, fused against reference and plain PyTorch") as advance:
        return stages.compare(model, histograms[:3], device, advance)


def _show_stages(terminal: Terminal, rows: list[Row]) -> None:
    cells = [report.stage_cells(row) for row in rows]
    terminal.table(report.STAGE_HEADER, cells, [not row.agrees for row in rows])


def _training(terminal, model, histograms, fused_form, device, steps, seed) -> training.Training:
    with terminal.step("3/4 training, fused against reference and plain PyTorch", steps) as advance:
        trained = training.train(model, histograms[:-1], fused_form, device, steps, seed, advance)
    cells = [report.gradient_cells(row) for row in trained.gradients]
    terminal.table(report.GRADIENT_HEADER, cells, [not row.agrees for row in trained.gradients])
    cells = report.training_cells(trained)
    terminal.table(report.TRAINING_HEADER, cells, [False] * len(cells))
    terminal.line(report.curves_sentence(trained))
    terminal.line(report.speed_sentence(trained))
    terminal.line(report.baselines_sentence(trained))
    return trained


def _failures(rows: list[Row], trained: training.Training) -> list[str]:
    failures = [row.name for row in [*rows, *trained.gradients] if not row.agrees]
    return failures if trained.curves_agree else [*failures, "loss curves"]


def _frame(events: Events, window: Events) -> Events:
    """The window, prolonged where it holds too few events to recognise anything on so many pixels."""
    enough = min(len(events), max(len(window), events.width * events.height // 15))
    begin = min(int((events.t < window.t[0]).sum()), len(events) - enough)
    return events.slice_time(int(events.t[begin]), int(events.t[begin + enough - 1]) + 1)


def _pictures(terminal, out, data, focused, rows, trained, events) -> dict[str, str]:
    """Draws all pictures; their file names by title."""
    with terminal.step("4/4 pictures and report", 4) as advance:
        frame = _frame(events, max(data.events, key=len))
        pictures.draw_event_frame(out / "event_frame.png", frame, int(frame.t[0]) - int(events.t[0]))
        advance()
        predicted = training.predict(trained.runs["fused"].model, focused[:-1])
        last, target = (value.float().cpu().numpy() for value in (focused[-2], focused[-1]))
        pictures.draw_prediction(out / "prediction.png", last, predicted.cpu().numpy(), target, data.duration_us / 1e3)
        advance()
        pictures.draw_losses(out / "loss_curves.png", trained)
        advance()
        pictures.draw_stage_times(out / "stage_times.png", rows)
        advance()
    return {
        "Events": "event_frame.png",
        "Prediction": "prediction.png",
        "Loss curves": "loss_curves.png",
        "Stage times": "stage_times.png",
    }
