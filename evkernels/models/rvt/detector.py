"""RVT, the recurrent detector: backbone, path aggregation, head; step by step or a sequence at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.models.rvt.backbone import MaxViTRNN, State, partition_size_of
from evkernels.models.rvt.config import arguments_of
from evkernels.models.rvt.fpn import YOLOPAFPN
from evkernels.models.rvt.head import YOLOXHead

_SIZES = {
    "base": {"embed_dim": 64, "attention": {"dim_head": 32}, "fpn_depth": 0.67},
    "small": {"embed_dim": 48, "attention": {"dim_head": 24}, "fpn_depth": 0.33},
    "tiny": {"embed_dim": 32, "attention": {"dim_head": 32}, "fpn_depth": 0.33},
}


class RVTDetector(nn.Module):
    """Recurrent Vision Transformer with the YOLOX detector.

    Equivalent to::

        maps, states = backbone(F.pad(x, ...), states)
        predictions, losses = yolox_head(fpn(maps), targets)

    Args:
        num_classes: Number of classes.
        height, width: Of the representation.
        input_channels: Of the representation, 2 * bins of a stacked histogram.
        partition_split_32: Into how many attention partitions the map at stride 32 is divided along each side.
        in_stages: The three stages of the backbone that the detector sees, finest first.
        fpn_depth: See YOLOPAFPN.
        backbone: Further arguments of MaxViTRNN.

    `forward` is one step, `forward_sequence` many, layer by layer. Inputs are padded with zeros at the bottom and
    right, which leaves boxes where they are; these are in pixels. State-dict keys are those of the published model,
    `backbone.*`, `fpn.*` and `yolox_head.*`; with 3 classes and 20 input channels "base", "small" and "tiny" have
    18,536,856, 9,870,456 and 4,405,336 parameters. Source: Gehrig and Scaramuzza 2023 (arXiv:2212.05598).
    """

    def __init__(
        self,
        num_classes: int,
        height: int,
        width: int,
        *,
        input_channels: int = 20,
        partition_split_32: int = 2,
        in_stages: Sequence[int] = (2, 3, 4),
        fpn_depth: float = 0.67,
        **backbone: Any,
    ) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.padded_size, partition_size = partition_size_of(height, width, partition_split_32)
        self.backbone = MaxViTRNN(input_channels, partition_size, **backbone)
        channels = [self.backbone.stage_dims[stage - 1] for stage in in_stages]
        self.fpn = YOLOPAFPN(channels, in_stages, fpn_depth)
        self.yolox_head = YOLOXHead(num_classes, [self.backbone.strides[stage - 1] for stage in in_stages], channels)

    @classmethod
    def published(cls, size: str, num_classes: int, height: int, width: int, **others: Any) -> "RVTDetector":
        """RVT-B, -S or -T: `size` is "base", "small" or "tiny"; `others` as in the constructor."""
        if size not in _SIZES:
            raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        return cls(num_classes, height, width, **(_SIZES[size] | others))

    @classmethod
    def from_config(cls, config: str | Path | Mapping, height: int, width: int, **others: Any) -> "RVTDetector":
        """The model of a Hydra configuration as RVT and eTraM have them.

        Args:
            config: A YAML file (needs OmegaConf: `pip install 'evkernels[train]'`) or its content; the part under
                `model` counts if there is one. What it leaves out is as in RVT-B.
            height, width: Of the representation.
            others: Arguments of the constructor that the configuration does not give, such as num_classes.

        Raises:
            ValueError: if the configuration asks for what this model does not have; the message names the key.
        """
        return cls(height=height, width=width, **(arguments_of(config) | others))

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the weights of a checkpoint of RVT or eTraM, which are under "state_dict" with keys `mdl.*`.

        Raises:
            RuntimeError: if keys or shapes differ from this model's.
        """
        weights = checkpoint.get("state_dict", checkpoint)
        self.load_state_dict({key.removeprefix("mdl."): value for key, value in weights.items()})

    def forward(
        self,
        x: Tensor,
        previous_states: Sequence[State] | None = None,
        retrieve_detections: bool = True,
        targets: Tensor | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, list[State]]:
        """One step.

        Args:
            x: Representation [N, input_channels, height, width] of any dtype.
            previous_states: What the step before returned; None to begin.
            retrieve_detections: Whether to run the detector; the backbone must see every step.
            targets: [N, M, 5], see YOLOXHead; asks for losses.

        Returns:
            predictions [N, A, 5 + num_classes] (see YOLOXHead and `postprocess`), losses, states; None for what was not
            asked for.

        Raises:
            ValueError: if a shape is none of those above.
        """
        maps, states = self.backbone(self._padded(x), previous_states)
        if not retrieve_detections:
            return None, None, states
        return *self.yolox_head(self.fpn(maps), targets), states

    def forward_sequence(
        self,
        x: Tensor,
        previous_states: Sequence[State] | None = None,
        reset: Tensor | None = None,
        labelled: Tensor | None = None,
        targets: Tensor | None = None,
        retrieve_detections: bool = True,
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, list[State]]:
        """A sequence, layer by layer; the detector sees the labelled frames alone.

        Args:
            x: [T, N, input_channels, height, width].
            previous_states: As in `forward`.
            reset: bool [T, N]; where true, the sample's states are zero before that step (a new recording begins).
            labelled: bool [T, N] of the frames to detect in; None for all.
            targets: [K, M, 5] of the K frames to detect in, in order of time, then of the sample.
            retrieve_detections: As in `forward`.

        Returns:
            predictions [K, A, 5 + num_classes], losses, states; None for what was not asked for.

        Raises:
            ValueError: if a shape is none of those above.
        """
        maps, states = self.backbone.forward_sequence(self._padded(x), previous_states, reset)
        if not retrieve_detections:
            return None, None, states
        maps = {stage: value.flatten(0, 1) if labelled is None else value[labelled] for stage, value in maps.items()}
        return *self.yolox_head(self.fpn(maps), targets), states

    def _padded(self, x: Tensor) -> Tensor:
        if x.dim() < 4 or tuple(x.shape[-2:]) != (self.height, self.width):
            raise ValueError(f"x must be [..., {self.height}, {self.width}], got {tuple(x.shape)}")
        x = x.to(self.yolox_head.obj_preds[0].weight.dtype)
        return F.pad(x, (0, self.padded_size[1] - self.width, 0, self.padded_size[0] - self.height))
