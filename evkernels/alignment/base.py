"""What the alignment modules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.alignment.config import AlignmentConfig
from evkernels.alignment.distributed import distributed_contrastive_loss
from evkernels.alignment.layers import MLP

# Rows of similarities that are looked at together.
_STRIP = 1024


class BaseAlignmentModule(nn.Module, ABC):
    """From event features [B, event_dim] to the space of the target, [B, target_dim].

    Args:
        config: Sizes and options, kept as `config`.

    A subclass has `forward(event_features)`, which is all that inference needs, and `loss_of(batch)`.
    """

    # Whether parameters exist that no loss reaches, which DistributedDataParallel must be told.
    has_unused_parameters = False

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, event_features: Tensor) -> Tensor:
        """Aligned features."""

    @abstractmethod
    def loss_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses, "total_loss" and its parts, of "event_features", "target_features" and perhaps "text_features"."""

    def after_step(self, batch: Mapping[str, Tensor]) -> None:
        """What follows an optimiser's step; nothing unless a strategy says so."""

    def align_features(self, event_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
        """Aligned event features, and the target's as they are."""
        return self(event_features), target_features

    def embed(self, event_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
        """Both kinds of features where retrieval compares them: aligned ones, unless a strategy differs."""
        return self.align_features(event_features, target_features)

    def compute_contrastive_loss(self, event: Tensor, target: Tensor, temperature: float | None = None) -> Tensor:
        """Symmetric InfoNCE at a fixed temperature, by default the configuration's, without heads."""
        return ops.contrastive_loss(event, target, 1 / (temperature or self.config.temperature))

    def loss_over_pairs(self, a: Tensor, b: Tensor, logit_scale: Tensor, queue: Tensor | None = None) -> Tensor:
        """Symmetric InfoNCE, in training over the pairs of all processes: each validates on all pairs by itself."""
        return (distributed_contrastive_loss if self.training else ops.contrastive_loss)(a, b, logit_scale, queue)

    def inputs(self, event: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The features, detached where their encoders are frozen."""
        event = event.detach() if self.config.freeze_event_encoder else event
        return event, target.detach() if self.config.freeze_target_encoder else target


def make_projector(config: AlignmentConfig) -> MLP:
    """The MLP from event features to the target's space that a configuration describes."""
    return MLP(
        config.event_dim,
        config.target_dim,
        config.hidden_dim,
        config.num_layers,
        config.dropout,
        config.use_layer_norm,
    )


@torch.no_grad()
def hardest_negatives(a: Tensor, b: Tensor) -> Tensor:
    """For every row of a [B, D] the other row of b with the largest cosine, int64 [B]; the similarities stay in strips.

    Of equal ones the first. B is at least 2.
    """
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    found = []
    for begin in range(0, len(p), _STRIP):
        cosines = p[begin : begin + _STRIP] @ q.T
        cosines.diagonal(begin).fill_(-float("inf"))
        found.append(cosines.argmax(1))
    return torch.cat(found)


def hard_negative_loss(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean cross entropy of each pair against its hardest negative alone, in both directions; 0 for a single pair."""
    if len(a) < 2:
        return (a.sum() + b.sum()) * 0
    own = F.cosine_similarity(a, b)
    of_a = F.cosine_similarity(a, b[hardest_negatives(a, b)])
    of_b = F.cosine_similarity(b, a[hardest_negatives(b, a)])
    return (F.softplus(logit_scale * (of_a - own)).mean() + F.softplus(logit_scale * (of_b - own)).mean()) / 2
