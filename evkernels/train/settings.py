"""What a training run is given, and reading it from a YAML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evkernels.arguments import InputError


@dataclass
class Settings:
    """A training run.

    Args:
        train, validate: Folders of preprocessed recordings with boxes.
        num_classes: Classes of the boxes, counted from 0.
        model: RVT's or eTraM's Hydra configuration of the network, or `{size: tiny}`, small or base.
        representation, downsample: Which frames of the recordings, see evkernels.data.PreprocessedRecording.
        sampling: "stream": recordings from their beginning, the state goes on from sequence to sequence. "random":
            sequences from anywhere, beginning with a zero state.
        steps: Optimiser steps.
        batch_size, length: Sequences per step and frames per sequence; gradients do not reach beyond a sequence.
        learning_rate, weight_decay: Of AdamW. The rate rises over the first `warmup` of the steps and falls linearly.
        gradient_clip_val: Largest norm of the gradients.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        checkpoint_every, validate_every: Steps between.
        confidence_threshold, nms_threshold: Of the boxes that validation looks at.
        workers: Processes that read.
        seed: Of weights and order.
    """

    train: str
    validate: str
    num_classes: int
    model: dict[str, Any] = field(default_factory=lambda: {"size": "tiny"})
    representation: str | None = None
    downsample: int = 1
    sampling: str = "stream"
    steps: int = 10_000
    batch_size: int = 4
    length: int = 5
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    gradient_clip_val: float = 1.0
    precision: str = "float32"
    checkpoint_every: int = 500
    validate_every: int = 1000
    confidence_threshold: float = 0.001
    nms_threshold: float = 0.45
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("sampling", ("stream", "random")),
            ("precision", ("float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (
            "num_classes",
            "downsample",
            "steps",
            "batch_size",
            "length",
            "checkpoint_every",
            "validate_every",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written into checkpoints."""
        return asdict(self)


def load(path: Path, overrides: list[str]) -> Settings:
    """The settings of a YAML file, changed by "key=value" strings.

    Raises:
        InputError: if the file cannot be read, or a key is unknown, missing or of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), given))
    except (OSError, YAMLError, OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
