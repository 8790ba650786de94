"""The results in words and tables: the same rows for the terminal and for report.md."""

import platform

import torch

import evkernels
from evkernels import backends
from evkernels.demo.comparison import RULE, Row
from evkernels.demo.training import FACTOR, Training

_ERRORS = ["error", "float32 loses", "allowed"]
STAGE_HEADER = ["stage", *_ERRORS, "fused", "reference", "best PyTorch", "speed-up", "agrees"]
GRADIENT_HEADER = ["gradients", *_ERRORS, "agrees"]
TRAINING_HEADER = ["training", "ms per step", "first loss", "last loss"]


def stage_cells(row: Row) -> list[str]:
    """One line of the table of stages."""
    plain, seconds = row.best(fused=False)
    return [
        row.name,
        *_errors(row),
        _milliseconds(row.best(fused=True)[1]),
        _milliseconds(row.seconds["reference"]),
        f"{_milliseconds(seconds)} ({plain.removeprefix('PyTorch, ')})",
        # A wrong result has no speed.
        f"{row.speed_up:.2f}x" if row.agrees else "-",
        "yes" if row.agrees else "NO",
    ]


def gradient_cells(row: Row) -> list[str]:
    """One line of the table of gradients."""
    return [row.name.removeprefix("gradient of "), *_errors(row), "yes" if row.agrees else "NO"]


def training_cells(training: Training) -> list[list[str]]:
    """All lines of the table of training runs."""
    return [
        [
            form if form != "fused" else run.form,
            f"{run.step_seconds * 1e3:.0f}",
            f"{run.losses[0]:.5f}",
            f"{run.losses[-1]:.5f}",
        ]
        for form, run in training.runs.items()
    ]


def curves_sentence(training: Training) -> str:
    """What the comparison of the loss curves gave."""
    worst = max(range(len(training.difference)), key=lambda k: training.difference[k] / training.allowed[k])
    verdict = "agree" if training.curves_agree else "DISAGREE"
    return (
        f"loss curves {verdict}: fused and reference differ by at most {max(training.difference):.1e}; closest to its "
        f"limit at step {worst + 1} with {training.difference[worst]:.1e} of {training.allowed[worst]:.1e} allowed "
        f"({FACTOR} times what rounding alone does to plain PyTorch in this run)"
    )


def speed_sentence(training: Training) -> str:
    """How much faster training is, or that it is not."""
    ratio = training.speed_up()
    return (
        f"a training step of the fused ops takes 1/{ratio:.2f} of the time of the best plain PyTorch"
        if (ratio >= 1)
        else f"a training step of the fused ops is SLOWER than the best plain PyTorch: {1 / ratio:.2f} times its time"
    )


def baselines_sentence(training: Training) -> str:
    """The losses that need no learning."""
    parts = ", ".join(f'"{name}" {value:.5f}' for name, value in training.baselines.items())
    return f"for comparison, mean losses of predictions that learn nothing: {parts}"


def served_by(device: torch.device) -> str:
    """One line about what the fused ops are here."""
    used = ("event_histogram", "separable_conv2d", "depthwise_conv2d", "lstm_gates")
    names = {op: backends.serving(op, device.type)[0] for op in used}
    if set(names.values()) == {"reference"}:
        reason = backends.compiled_error or f"{backends.chosen()} was chosen"
        return f"fused ops: there are none here, the references run everywhere and speed-ups mean nothing ({reason})"
    return "fused ops: " + ", ".join(f"{op} by {name}" for op, name in names.items())


def machine(device: torch.device) -> str:
    """One line about where this ran."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"evkernels {evkernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{device} ({where}), {torch.get_num_threads()} threads"
    )


def markdown(facts: list[str], rows: list[Row], training: Training, failures: list[str], pictures: dict) -> str:
    """The report; `pictures` maps titles to file names beside it."""
    verdict = "everything agreed" if not failures else "DISAGREED: " + "; ".join(failures)
    parts = ["# evkernels demo", f"**{verdict}**", "\n".join(f"* {fact}" for fact in facts)]
    parts += ["## Every stage against plain PyTorch", _table(STAGE_HEADER, [stage_cells(row) for row in rows])]
    parts.append(
        f"Errors are the largest over all elements, against float64; allowed is {RULE}; histograms must be equal. "
        "Times are medians of interleaved rounds, of the faster memory layout each; speed-up is the time of the best "
        "plain PyTorch, the reference included, over that of the fused ops."
    )
    parts += ["## Training", _table(GRADIENT_HEADER, [gradient_cells(row) for row in training.gradients])]
    parts += [_table(TRAINING_HEADER, training_cells(training)), curves_sentence(training).capitalize() + "."]
    parts += [speed_sentence(training).capitalize() + ".", baselines_sentence(training).capitalize() + "."]
    parts += ["## Pictures", *(f"![{title}]({name})" for title, name in pictures.items())]
    parts += ["## Where this ran", "```text", evkernels.status(), "```"]
    return "\n\n".join(parts).replace("```text\n\n", "```text\n").replace("\n\n```", "\n```") + "\n"


def _errors(row: Row) -> list[str]:
    if row.allowed == 0 and row.agrees:
        return ["0", "-", "equal"] if row.error == 0 else [f"{row.error:.1e}", "-", "0"]
    return [f"{row.error:.1e}", f"{row.float32:.1e}", f"{row.allowed:.1e}"]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.0995 else f"{seconds * 1e3:.0f} ms"


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])
