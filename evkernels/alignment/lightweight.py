"""Lightweight alignment: an adapter trained by the difference of normalised features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.alignment.base import BaseAlignmentModule, make_projector
from evkernels.alignment.config import LightweightAlignmentConfig
from evkernels.alignment.layers import BottleneckAdapter, LinearAdapter, WhiteningLayer


class LightweightAlignmentModule(BaseAlignmentModule):
    """One small adapter.

    Equivalent to::

        aligned = (adapter(x) + 0.1 * residual_proj(x)) * scale
        total_loss = mse(normalize(aligned), normalize(target)) + 0.5 * (1 - cosine(aligned, target).mean())

    State-dict keys are those of EventGPT's module.
    """

    def __init__(self, config: LightweightAlignmentConfig | None = None) -> None:
        config = config or LightweightAlignmentConfig()
        super().__init__(config)
        sizes = (config.event_dim, config.target_dim)
        if config.use_whitening:
            self.whitening = WhiteningLayer(config.event_dim)
        if config.adapter_type == "linear":
            self.adapter: nn.Module = LinearAdapter(*sizes)
        elif config.adapter_type == "mlp":
            self.adapter = make_projector(config)
        else:
            self.adapter = BottleneckAdapter(*sizes, max(1, config.hidden_dim // 4), config.dropout)
        if config.use_residual:
            self.residual_proj = nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, event_features: Tensor) -> Tensor:
        x = self.whitening(event_features) if self.config.use_whitening else event_features
        aligned = self.adapter(x)
        if self.config.use_residual:
            aligned = aligned + 0.1 * self.residual_proj(x)
        return aligned * self.scale

    def loss_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.compute_loss(batch["event_features"], batch["target_features"])

    def compute_loss(self, event_features: Tensor, target_features: Tensor) -> dict[str, Tensor]:
        """Losses "total_loss", "mse_loss" and "cosine_similarity" of pairs [B, event_dim] and [B, target_dim]."""
        event, target = self.inputs(event_features, target_features)
        mse, cosine = ops.normalized_mse_cosine(self(event), target)
        return {"total_loss": mse + 0.5 * (1 - cosine), "mse_loss": mse, "cosine_similarity": cosine.detach()}
