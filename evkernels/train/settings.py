"""What a training run is given, and reading it from a YAML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evkernels.arguments import InputError


@dataclass(kw_only=True)
class Settings:
    """A training run.

    Args:
        train, validate: Folders of preprocessed recordings.
        model: Arguments of the network.
        representation, downsample: Which frames of the recordings, see evkernels.data.PreprocessedRecording.
        sampling: "stream": recordings from their beginning, the state goes on from sequence to sequence. "random":
            sequences from anywhere, beginning with a zero state.
        steps: Optimiser steps.
        batch_size, length: Sequences per step, of all processes together, and frames per sequence; gradients do not
            reach beyond a sequence.
        learning_rate, weight_decay: Of AdamW. The rate rises over the first `warmup` of the steps and falls linearly.
        gradient_clip_val: Largest norm of the gradients.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        checkpoint_every, validate_every: Steps between.
        workers: Processes that read, for each that trains.
        tensorboard: Whether the logs are written for TensorBoard too.
        seed: Of weights and order.
    """

    train: str
    validate: str
    model: dict[str, Any] = field(default_factory=dict)
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
    workers: int = 2
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("sampling", ("stream", "random")),
            ("precision", ("float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        at_least_one = ("downsample", "steps", "batch_size", "length", "checkpoint_every", "validate_every")
        for name in (*at_least_one, *self._counts):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    # Further numbers that must be at least 1.
    _counts = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written into checkpoints."""
        return asdict(self)


@dataclass(kw_only=True)
class DetectorSettings(Settings):
    """A run of RVT's detector, on recordings with boxes.

    Args:
        num_classes: Classes of the boxes, counted from 0.
        model: RVT's or eTraM's Hydra configuration of the network, or `{size: tiny}`, small or base.
        confidence_threshold, nms_threshold: Of the boxes that validation looks at.
    """

    num_classes: int
    model: dict[str, Any] = field(default_factory=lambda: {"size": "tiny"})
    confidence_threshold: float = 0.001
    nms_threshold: float = 0.45

    _counts = ("num_classes",)


@dataclass(kw_only=True)
class PredictionSettings(Settings):
    """A run of EfficientConvLSTM, on stacked histograms or voxel grids of 5 bins.

    Args:
        model: Arguments of EfficientConvLSTM, such as `{model_type: CONVLSTM, skip_lstm: true}`.
        targets: Name of a file of each recording with a map between 0 and 1 for each frame, NaN where there is none,
            see evkernels.data.PreprocessedRecording. None: the events of the frame's successor, min(count /
            saturation, 1) at each pixel, which needs sequences of at least 2 frames.
        saturation: See `targets`; with 1 the target is whether there are events.
    """

    targets: str | None = None
    saturation: int = 1

    _counts = ("saturation",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is None and self.length < 2:
            raise InputError(f"length must be at least 2 to predict the next frame, got {self.length}")


# By the name of the network on the command line.
SETTINGS = {"rvt": DetectorSettings, "efficient_conv_lstm": PredictionSettings}


def load(network: str, path: Path, overrides: list[str]) -> Settings:
    """The settings of a YAML file, changed by "key=value" strings.

    Raises:
        InputError: if the file cannot be read, or a key is unknown, missing or of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SETTINGS[network]), given))
    except (OSError, YAMLError, OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
