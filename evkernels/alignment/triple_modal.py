"""Triple-modal alignment: events, images and text in one space."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.alignment.base import BaseAlignmentModule, make_projector
from evkernels.alignment.config import TripleModalAlignmentConfig
from evkernels.alignment.layers import CrossModalAttention


class TripleModalEncoder(nn.Module):
    """A projector per kind of feature into one space, attention between kinds, a scale per pair of kinds."""

    def __init__(self, config: TripleModalAlignmentConfig) -> None:
        super().__init__()
        self.config = config

        def projector(size: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(size, config.hidden_dim),
                nn.LayerNorm(config.hidden_dim),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden_dim, config.projection_dim),
            )

        self.event_projector, self.image_projector = projector(config.event_dim), projector(config.target_dim)
        self.text_projector = projector(config.text_dim) if config.use_text_alignment else None
        if config.use_cross_modal_attention:
            attention = (config.projection_dim, config.num_attention_heads, config.dropout)
            self.event_image_attention = CrossModalAttention(*attention)
            if config.use_text_alignment:
                self.event_text_attention = CrossModalAttention(*attention)
        start = math.log(1 / config.temperature)
        for pair in ("ei", "et", "it"):
            setattr(self, f"logit_scale_{pair}", nn.Parameter(torch.tensor(start)))

    def forward(
        self, event: Tensor | None = None, image: Tensor | None = None, text: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised encodings [B, projection_dim] of what is given: "event", "image", "text", "event_attended"."""
        encodings = {}
        for name, value, project in (
            ("event", event, self.event_projector),
            ("image", image, self.image_projector),
            ("text", text, self.text_projector),
        ):
            if value is not None and project is not None:
                encodings[name] = F.normalize(project(value), dim=-1)
        return encodings

    def attended(self, encodings: Mapping[str, Tensor]) -> Tensor:
        """Event encodings with a tenth of what attention finds in the image and, where there is any, the text."""
        found = self.event_image_attention(encodings["event"], encodings["image"], encodings["image"])
        if "text" in encodings:
            found = found + self.event_text_attention(encodings["event"], encodings["text"], encodings["text"])
        return F.normalize(encodings["event"] + 0.1 * found, dim=-1)


class TripleModalAlignmentModule(BaseAlignmentModule):
    """Three kinds of features in one space, and a projector from events to the image features for inference.

    Equivalent to::

        total_loss = image_loss_weight * infonce(event, image)
        total_loss += text_loss_weight * (infonce(event, text) + infonce(image, text))
        total_loss += 0.1 * mse(normalize(inference_projector(event)), normalize(image))

    The terms with text count where text is given. State-dict keys are those of EventGPT's module. Source: E-CLIP
    (arXiv:2308.03135), in EventGPT's simplification.
    """

    has_unused_parameters = True

    def __init__(self, config: TripleModalAlignmentConfig | None = None) -> None:
        config = config or TripleModalAlignmentConfig()
        super().__init__(config)
        self.triple_encoder = TripleModalEncoder(config)
        self.inference_projector = make_projector(config)

    def forward(self, event_features: Tensor) -> Tensor:
        return self.inference_projector(event_features)

    def encode(
        self, event: Tensor | None = None, image: Tensor | None = None, text: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised encodings of what is given, by name; "event_attended" where events and images are."""
        if text is not None and not self.config.use_text_alignment:
            raise ValueError("text was given, but use_text_alignment is False")
        encodings = self.triple_encoder(event, image, text)
        if self.config.use_cross_modal_attention and event is not None and image is not None:
            encodings["event_attended"] = self.triple_encoder.attended(encodings)
        return encodings

    def embed(self, event_features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
        """In the common space."""
        found = self.encode(event_features, target_features)
        return found["event"], found["image"]

    def loss_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.compute_loss(batch["event_features"], batch["target_features"], batch.get("text_features"))

    def compute_loss(
        self, event_features: Tensor, image_features: Tensor, text_features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of matching rows; "total_loss", "event_image_loss", "mse_loss" and, with text, two more."""
        event, image = self.inputs(event_features, image_features)
        encoder, config = self.triple_encoder, self.config
        if text_features is not None and not config.use_text_alignment:
            raise ValueError("text was given, but use_text_alignment is False")
        found = encoder(event, image, text_features)
        losses = {
            "event_image_loss": self.loss_over_pairs(found["event"], found["image"], encoder.logit_scale_ei.exp()),
            "mse_loss": ops.normalized_mse_cosine(self(event), image)[0],
        }
        total = config.image_loss_weight * losses["event_image_loss"] + 0.1 * losses["mse_loss"]
        if text_features is not None:
            for kind, scale in (("event", encoder.logit_scale_et), ("image", encoder.logit_scale_it)):
                loss = self.loss_over_pairs(found[kind], found["text"], scale.exp())
                losses[f"{kind}_text_loss"] = loss
                total = total + config.text_loss_weight * loss
        return {"total_loss": total, **losses}

    @torch.no_grad()
    def zero_shot_classify(self, event_features: Tensor, class_text_features: Tensor) -> Tensor:
        """The class, int64 [B], whose text [classes, text_dim] is nearest to each event feature."""
        found = self.encode(event=event_features, text=class_text_features)
        return (found["event"] @ found["text"].T).argmax(1)
