"""Reconstruction bridging: events to images by E2VID or FireNet, images to features by a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.alignment.base import BaseAlignmentModule, make_projector
from evkernels.alignment.config import ReconstructionBridgingConfig
from evkernels.reconstruct.stream import reflected
from evkernels.reconstruct.weights import load_network

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ReconstructionBridgingModule(BaseAlignmentModule):
    """Voxel grids to the features of their reconstructed images; nothing needs to be trained.

    Equivalent to::

        image, state = e2vid(grid, state)
        image = (gray_to_rgb(F.interpolate(image, size, mode="bilinear")) - mean) / std
        features = feature_projector(clip_encoder(image))

    Args:
        config: Sizes and options.
        e2vid: `FireNet`, `E2VIDRecurrent` or, with e2vid_type "custom", a module that is called like them and has
            `num_bins` and `size_multiple`; or the path of a checkpoint, whose every weight must fit.
        clip_encoder: Images [B, 3, *reconstruction_size] to features [B, D], of which no gradient is asked; see
            `evkernels.alignment.load_image_encoder`. None: the flattened images are the features.

    `feature_projector`, an MLP, is there where config.event_dim, the size of the encoder's features, is not
    config.target_dim. The network's state goes on from call to call: `reset_states` before another recording.
    """

    def __init__(
        self,
        config: ReconstructionBridgingConfig | None = None,
        e2vid: nn.Module | str | Path | None = None,
        clip_encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        config = config or ReconstructionBridgingConfig()
        super().__init__(config)
        if isinstance(e2vid, str | Path):
            e2vid = load_network(Path(e2vid))[1]
        if e2vid is None:
            raise ValueError("e2vid must be a network or the path of its weights: none are shipped or fetched")
        if e2vid.num_bins != config.num_temporal_bins:
            raise ValueError(
                f"num_temporal_bins must be the network's {e2vid.num_bins}, got {config.num_temporal_bins}"
            )
        self.e2vid = e2vid.requires_grad_(config.finetune_e2vid)
        self.clip_encoder = clip_encoder
        if isinstance(clip_encoder, nn.Module):
            clip_encoder.requires_grad_(False).eval()
        self.gray_to_rgb = nn.Conv2d(1, 3, 1, bias=False)
        nn.init.ones_(self.gray_to_rgb.weight).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_CLIP_STD).reshape(3, 1, 1), persistent=False)
        self.feature_projector: nn.Module = nn.Identity()
        if config.event_dim != config.target_dim:
            self.feature_projector = make_projector(config)
        self.hidden_state = None
        self._cache: dict[Hashable, Tensor] = {}

    def train(self, mode: bool = True) -> ReconstructionBridgingModule:
        """As of nn.Module; the encoder stays in evaluation mode, and so does a network that is not fine-tuned."""
        super().train(mode)
        if isinstance(self.clip_encoder, nn.Module):
            self.clip_encoder.eval()
        if not self.config.finetune_e2vid:
            self.e2vid.eval()
        return self

    def reset_states(self) -> None:
        """The next grid is the first of a recording."""
        self.hidden_state = None

    def detach_states(self) -> None:
        """Ends the gradient at the state."""
        self.hidden_state = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, self.hidden_state)

    def reconstruct(self, grid: Tensor, reset_state: bool = False) -> Tensor:
        """Images [B, 1, H, W] of grids [B, num_temporal_bins, H, W]; what the network needs is padded by reflection."""
        if reset_state:
            self.reset_states()
        padded, rows, columns = reflected(grid, self.e2vid.size_multiple)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.finetune_e2vid):
            image, self.hidden_state = self.e2vid(padded, self.hidden_state)
        return image[:, :, rows, columns]

    def encode_images(self, image: Tensor) -> Tensor:
        """Features [B, event_dim] of images [B, 1, H, W]."""
        size = self.config.reconstruction_size
        image = self.gray_to_rgb(F.interpolate(image, size, mode="bilinear", align_corners=False))
        if self.config.normalize_output:
            image = (image - self.mean) / self.std
        if self.clip_encoder is None:
            return image.flatten(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and image.requires_grad):
            return self.clip_encoder(image)

    def forward(
        self, event_features: Tensor, reset_state: bool = False, keys: Sequence[Hashable] | None = None
    ) -> Tensor:
        """Features [B, target_dim] of grids [B, bins, H, W], or of sequences of them [B, T, bins, H, W].

        `keys` name the samples where config.cache_reconstructions keeps their images: a sample's images are computed
        once, from a zero state.
        """
        if (keys is not None) != self.config.cache_reconstructions:
            raise ValueError("keys are what cache_reconstructions needs, and are of no use without it")
        grids = event_features if event_features.dim() == 5 else event_features[:, None]
        images = self._images(grids, reset_state) if keys is None else self._cached(grids, keys)
        if not self.config.use_temporal_aggregation:
            images = images[:, -1:]
        features = self.encode_images(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        return self.feature_projector(features)

    def loss_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Difference of the projector's output and target features; "event_features" are voxel grids."""
        mse, cosine = ops.normalized_mse_cosine(
            self(batch["event_features"], reset_state=True), batch["target_features"]
        )
        return {"total_loss": mse + 0.5 * (1 - cosine), "mse_loss": mse, "cosine_similarity": cosine.detach()}

    def self_supervised_loss(self, grids: Tensor) -> Tensor:
        """For fine-tuning without images: changes from image to image, and 0.1 of the total variation, of [B, T, ...].

        Raises:
            ValueError: if the configuration does not fine-tune, or the sequence has one grid only.
        """
        if not self.config.finetune_e2vid or grids.dim() != 5 or grids.shape[1] < 2:
            raise ValueError("needs finetune_e2vid=True and grids [B, T, bins, H, W] with T of at least 2")
        images = self._images(grids, True)
        steps = F.mse_loss(images[:, 1:], images[:, :-1])
        variation = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        return steps + 0.1 * variation

    def _images(self, grids: Tensor, reset_state: bool) -> Tensor:
        if reset_state:
            self.reset_states()
        return torch.stack([self.reconstruct(grid) for grid in grids.unbind(1)], 1)

    def _cached(self, grids: Tensor, keys: Sequence[Hashable]) -> Tensor:
        for key, sample in zip(keys, grids, strict=True):
            if key not in self._cache:
                self._cache[key] = self._images(sample[None], True)[0]
        return torch.stack([self._cache[key] for key in keys])


class RefinedReconstructionBridgingModule(ReconstructionBridgingModule):
    """The same with three convolutions behind the reconstruction: image + 0.1 * (refine(image) - image)."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.refine = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def encode_images(self, image: Tensor) -> Tensor:
        return super().encode_images(image + 0.1 * (self.refine(image) - image))
