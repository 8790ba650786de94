"""Training EfficientConvLSTM: maps given for each frame as targets, or the events of the next frame."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.data import SequenceBatch
from evkernels.models import EfficientConvLSTM
from evkernels.models.efficient_conv_lstm import BINS
from evkernels.train import processes
from evkernels.train.settings import PredictionSettings


class Prediction(nn.Module):
    """EfficientConvLSTM with the binary cross entropy of its maps.

    Args:
        settings: Of the run.
        shape: Channels, height and width of the frames: 10 channels of a stacked histogram or 5 of a voxel grid.

    Raises:
        ValueError: if the frames have other channels, or the model's arguments are wrong.
    """

    losses = ("loss",)
    measure = "skill"

    def __init__(self, settings: PredictionSettings, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        if channels not in (BINS, 2 * BINS):
            raise ValueError(
                f"frames must have {2 * BINS} channels of a stacked histogram of {BINS} bins, or {BINS} of "
                f"a voxel grid, got {channels}"
            )
        self.settings = settings
        try:
            self.network = EfficientConvLSTM(width=width, height=height, **settings.model)
        except TypeError as error:
            raise ValueError(f"model: {error}") from error

    def forward(self, batch: SequenceBatch, states: list | None) -> tuple[dict[str, Tensor] | None, Tensor, list]:
        """The mean loss, the number of pixels that it is a mean over, and the next states."""
        total, targets, states = self._total(batch, states)
        number = torch.tensor(len(targets), device=total.device)
        if not processes.total(number):
            return None, number, states
        return {"loss": total / number.clamp(min=1)}, number, states

    @torch.no_grad()
    def validate(self, batches: Iterable[SequenceBatch]) -> dict[str, float]:
        """The loss, and the "skill": by which share it is below that of the best constant map; NaN without targets."""
        states, total, number, sum_of_targets = None, 0.0, 0, 0.0
        for batch in batches:
            part, targets, states = self._total(batch, states)
            total += part.item()
            number += len(targets)
            sum_of_targets += targets.double().sum().item()
        if not number:
            return {"loss": float("nan"), "skill": float("nan")}
        mean = torch.tensor(sum_of_targets / number, dtype=torch.float64)
        constant = F.binary_cross_entropy(mean, mean).item()
        return {"loss": total / number, "skill": 1 - total / number / constant if constant else float("nan")}

    def _total(self, batch: SequenceBatch, states: list | None) -> tuple[Tensor, Tensor, list]:
        """The sum of the loss over all pixels that have a target, these targets, and the states after the sequence."""
        network = self.network
        network.states = states
        network.reset_states(batch.reset[0])
        maps, _, _ = network(grids_of(batch.frames).unbind(0))
        targets = batch.targets if self.settings.targets else self._next_events(batch)
        known = targets.isfinite()
        maps, targets = maps.transpose(0, 1)[known].float(), targets[known]
        # Autocast refuses this loss, for the sake of maps that are not float32.
        with torch.autocast(maps.device.type, enabled=False):
            return F.binary_cross_entropy(maps, targets, reduction="sum"), targets, network.states

    def _next_events(self, batch: SequenceBatch) -> Tensor:
        counts = batch.frames.float().abs().sum(2)
        targets = (counts / self.settings.saturation).clamp(max=1)
        targets = targets.masked_fill((batch.padding | batch.reset)[:, :, None, None], torch.nan)
        return torch.cat([targets[1:], torch.full_like(targets[:1], torch.nan)])


def grids_of(frames: Tensor) -> Tensor:
    """Voxel grids [T, N, 5, H, W] of signed sums, from stacked histograms [T, N, 10, H, W]; grids stay as they are."""
    frames = frames.float()
    if frames.shape[2] == BINS:
        return frames
    negative, positive = frames.unflatten(2, (2, BINS)).unbind(2)
    return positive - negative
