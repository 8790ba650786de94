"""Configurations of the alignment strategies, with the field names and defaults of EventGPT's feature alignment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class AlignmentConfig:
    """What every strategy has.

    Args:
        event_dim, target_dim: Size of event features and of those they are aligned to.
        hidden_dim, num_layers, dropout, use_layer_norm: Of the projector.
        temperature: Initial temperature of contrastive losses; the scale of the logits is 1 over it.
        freeze_event_encoder, freeze_target_encoder: Whether features are detached, so that encoders in front of the
            module get no gradient.
    """

    event_dim: int = 768
    target_dim: int = 1024
    hidden_dim: int = 512
    num_layers: int = 2
    dropout: float = 0.1
    temperature: float = 0.07
    use_layer_norm: bool = True
    freeze_event_encoder: bool = False
    freeze_target_encoder: bool = True

    def __post_init__(self) -> None:
        for name in ("event_dim", "target_dim", "hidden_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@dataclass
class ContrastiveAlignmentConfig(AlignmentConfig):
    """Contrastive alignment in CEIA's manner.

    Args:
        projection_dim: Size in which pairs are compared.
        use_queue, queue_size, momentum: A queue of earlier targets as further negatives, in MoCo's manner, encoded by a
            copy of the target head that follows it with this momentum.
        use_hard_negatives, hard_negative_weight: Adds, so weighted, the cross entropy of each pair against its hardest
            negative of the batch alone. The published code declares and ignores it: False gives its loss.
        warmup_epochs: Epochs over which the trainer's learning rate rises.
    """

    projection_dim: int = 256
    queue_size: int = 65536
    momentum: float = 0.999
    use_hard_negatives: bool = True
    hard_negative_weight: float = 0.5
    warmup_epochs: int = 5
    use_queue: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_queue and (self.queue_size, self.momentum) != (65536, 0.999):
            raise ValueError("queue_size and momentum belong to the queue: set use_queue=True")
        if self.queue_size < 1 or not 0 <= self.momentum <= 1 or self.warmup_epochs < 0:
            raise ValueError("queue_size must be at least 1, momentum in [0, 1] and warmup_epochs at least 0")


@dataclass
class LightweightAlignmentConfig(AlignmentConfig):
    """A small adapter trained by differences.

    Args:
        use_residual: Adds a tenth of the features themselves, brought to the size of the target.
        use_whitening: Whitens event features by running statistics first.
        finetune_on_downstream: Whether `LightweightAlignmentTrainer.finetune` may be called.
        adapter_type: "linear", "mlp" or "adapter" (a bottleneck of hidden_dim // 4).
    """

    num_layers: int = 2
    use_residual: bool = True
    use_whitening: bool = False
    finetune_on_downstream: bool = True
    adapter_type: str = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_type not in ("linear", "mlp", "adapter"):
            raise ValueError(f"adapter_type must be linear, mlp or adapter, got {self.adapter_type!r}")


@dataclass
class TripleModalAlignmentConfig(AlignmentConfig):
    """Events, images and text in one space, in E-CLIP's manner.

    Args:
        text_dim, projection_dim: Size of text features, and of the common space.
        use_text_alignment, text_loss_weight, image_loss_weight: Which contrastive losses count how much.
        use_cross_modal_attention, num_attention_heads: Also gives attended event encodings, which no loss uses, as in
            the published code.
        use_prompt_tuning: True raises: prompts belong into a text encoder, and this module sees only its features.
    """

    text_dim: int = 512
    projection_dim: int = 256
    use_text_alignment: bool = True
    text_loss_weight: float = 0.5
    image_loss_weight: float = 1.0
    use_cross_modal_attention: bool = True
    num_attention_heads: int = 8
    use_prompt_tuning: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_prompt_tuning:
            raise NotImplementedError(
                "use_prompt_tuning needs the text encoder itself: tune prompts there and give the features of its texts"
            )
        if self.projection_dim % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide projection_dim")


@dataclass
class ReconstructionBridgingConfig(AlignmentConfig):
    """Events to images by a reconstruction network, images to features by a frozen image encoder; no pairs needed.

    Args:
        e2vid_type: "e2vid" for the networks of `evkernels.models`, "custom" for one of the caller's. "hypere2vid"
            raises: there is no such network here.
        reconstruction_size: Height and width of the images that the encoder gets.
        use_temporal_aggregation: Whether features of a sequence of windows are averaged; else the last one's count.
        num_temporal_bins: Bins of the voxel grids, which must be the network's.
        finetune_e2vid: Whether the reconstruction network gets gradients.
        cache_reconstructions: Keeps images by the keys that `forward` is given.
        normalize_output: Whether images are brought to the mean and deviation of CLIP's training images.
    """

    e2vid_type: str = "e2vid"
    reconstruction_size: tuple[int, int] = (224, 224)
    use_temporal_aggregation: bool = True
    num_temporal_bins: int = 5
    finetune_e2vid: bool = False
    cache_reconstructions: bool = False
    normalize_output: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reconstruction_size = tuple(self.reconstruction_size)
        if self.e2vid_type == "hypere2vid":
            raise NotImplementedError("e2vid_type hypere2vid: no such network here; give yours with custom")
        if self.e2vid_type not in ("e2vid", "custom"):
            raise ValueError(f"e2vid_type must be e2vid, hypere2vid or custom, got {self.e2vid_type!r}")
        if self.finetune_e2vid and self.cache_reconstructions:
            raise ValueError("cache_reconstructions keeps images, which finetune_e2vid changes: choose one")


CONFIGS: dict[str, type[AlignmentConfig]] = {
    "contrastive": ContrastiveAlignmentConfig,
    "lightweight": LightweightAlignmentConfig,
    "triple_modal": TripleModalAlignmentConfig,
    "reconstruction": ReconstructionBridgingConfig,
}


def strategy_of(config: AlignmentConfig) -> str:
    """The name of a configuration's strategy, a key of CONFIGS."""
    return next(name for name, kind in CONFIGS.items() if type(config) is kind)


def config_from_dict(strategy: str, values: dict) -> AlignmentConfig:
    """The configuration of a strategy; raises ValueError for fields that it does not have."""
    if strategy not in CONFIGS:
        raise ValueError(f"strategy must be one of {', '.join(CONFIGS)}, got {strategy!r}")
    kind = CONFIGS[strategy]
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**values)
