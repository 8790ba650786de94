"""Contrastive alignment: a projector into the target's space, trained by InfoNCE between projection heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.alignment.base import BaseAlignmentModule, hard_negative_loss, make_projector
from evkernels.alignment.config import ContrastiveAlignmentConfig
from evkernels.alignment.layers import ProjectionHead


class ContrastiveAlignmentModule(BaseAlignmentModule):
    """Event features into the target's space by an MLP; pairs are compared through two projection heads.

    Equivalent to::

        aligned = event_projector(event)
        p, q = event_projection_head(aligned), target_projection_head(target)
        total_loss = contrastive_loss(p, q, logit_scale.exp()) + 0.1 * mse(normalize(aligned), normalize(target))

    and, with the configuration's hard negatives, their weighted loss. 2,234,369 parameters at the defaults; state-dict
    keys are those of EventGPT's module, the queue's come beside them. Source: CEIA (arXiv:2407.06611), in EventGPT's
    simplification.
    """

    def __init__(self, config: ContrastiveAlignmentConfig | None = None) -> None:
        config = config or ContrastiveAlignmentConfig()
        super().__init__(config)
        self.event_projector = make_projector(config)
        self.event_projection_head = ProjectionHead(config.target_dim, config.projection_dim, config.hidden_dim)
        self.target_projection_head = ProjectionHead(config.target_dim, config.projection_dim, config.hidden_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        if config.use_queue:
            self.momentum_target_head = copy.deepcopy(self.target_projection_head).requires_grad_(False)
            self.register_buffer("queue", torch.zeros(config.queue_size, config.projection_dim))
            self.register_buffer("queue_position", torch.tensor(0))
            self.register_buffer("queue_filled", torch.tensor(0))

    def forward(self, event_features: Tensor) -> Tensor:
        return self.event_projector(event_features)

    def embed(self, event_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
        """Behind the projection heads, where the loss compares them."""
        return self.event_projection_head(self(event_features)), self.target_projection_head(target_features)

    def loss_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.compute_loss(batch["event_features"], batch["target_features"])

    def compute_loss(
        self, event_features: Tensor, target_features: Tensor, return_metrics: bool = False
    ) -> dict[str, Tensor]:
        """Losses of pairs [B, event_dim] and [B, target_dim].

        Returns:
            "total_loss", "contrastive_loss", "mse_loss", "logit_scale" (its exponential), "hard_negative_loss" where
            it is used; with `return_metrics` also "acc_e2t", "acc_t2e" and "cosine_similarity".
        """
        event, target = self.inputs(event_features, target_features)
        aligned = self(event)
        p, q = self.event_projection_head(aligned), self.target_projection_head(target)
        scale = self.logit_scale.exp()
        queue = self.queue[: int(self.queue_filled)].clone() if self.config.use_queue and self.queue_filled else None
        contrastive = self.loss_over_pairs(p, q, scale, queue)
        mse, cosine = ops.normalized_mse_cosine(aligned, target)
        losses = {"contrastive_loss": contrastive, "mse_loss": mse, "logit_scale": scale.detach()}
        losses["total_loss"] = contrastive + 0.1 * mse
        if self.config.use_hard_negatives:
            losses["hard_negative_loss"] = hard_negative_loss(p, q, scale)
            losses["total_loss"] = (
                losses["total_loss"] + self.config.hard_negative_weight * losses["hard_negative_loss"]
            )
        if return_metrics:
            p, q = p.detach(), q.detach()
            losses["acc_e2t"] = ops.retrieval_recall(p, q, (1,))[0]
            losses["acc_t2e"] = ops.retrieval_recall(q, p, (1,))[0]
            losses["cosine_similarity"] = cosine.detach()
        return losses

    @torch.no_grad()
    def after_step(self, batch: Mapping[str, Tensor]) -> None:
        """Moves the queue's head towards the target's, and puts the batch's targets into the queue."""
        if not self.config.use_queue:
            return
        own, momentum = self.target_projection_head.state_dict(), self.config.momentum
        for name, value in self.momentum_target_head.state_dict().items():
            value.lerp_(own[name], 1 - momentum) if value.is_floating_point() else value.copy_(own[name])
        # By running statistics, so that entries of different batches are comparable.
        keys = F.normalize(self.momentum_target_head.eval()(batch["target_features"]), dim=1)[-len(self.queue) :]
        at = (self.queue_position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[at] = keys
        self.queue_position.copy_((self.queue_position + len(keys)) % len(self.queue))
        self.queue_filled.copy_((self.queue_filled + len(keys)).clamp(max=len(self.queue)))
