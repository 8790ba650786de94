"""LightweightEnhancedConvLSTM as the eTraM fork of RVT publishes it."""

import torch
from torch import Tensor, nn

from evkernels.nn.rvt import DWSConvLSTM2d


class LightweightEnhancedConvLSTM(DWSConvLSTM2d):
    """DWSConvLSTM2d whose h is moved, in samples of few small objects, towards a fusion with a projection of itself.

    Equivalent to::

        h_next, c_next = DWSConvLSTM2d.forward(x, (h, c))
        if not first_step:
            density = density_estimator(x).sigmoid().mean(dim=(2, 3), keepdim=True)
            few = (density < small_object_threshold).float()
            a = temporal_attention(torch.cat([x, h], dim=1))
            fused = feature_fusion(torch.cat([h_next, small_object_enhancer(h_next)], dim=1))
            h_next = h_next + few * a * (fused - h_next)

    Args:
        dim, dws_conv, dws_conv_only_hidden, dws_conv_kernel_size, cell_update_dropout: As in DWSConvLSTM2d.
        enhancement_ratio: The projections have max(4, int(dim * enhancement_ratio)) = E channels.
        small_object_threshold: Densities below it switch the enhancement on.

    Raises:
        TypeError, ValueError: as DWSConvLSTM2d.

    The modified h is output and state; without a state nothing is added. The comparison has no gradient, so
    `density_estimator` never gets one, and features of mean zero have density 0.5: at the default threshold nothing is
    added then and none of the further weights gets a gradient. `evkernels.nn.LightweightEnhancedConvLSTM` is a design
    without these traits. State dict, beside DWSConvLSTM2d's, all 1x1 without bias: `temporal_attention.0.weight`
    [E, 2*dim, 1, 1], `temporal_attention.2.weight` [1, E, 1, 1], `density_estimator.weight` [1, dim, 1, 1],
    `small_object_enhancer.weight` [E, dim, 1, 1], `feature_fusion.weight` [dim, dim + E, 1, 1]; normal of deviation
    0.01, `density_estimator` as torch.nn.Conv2d.
    """

    def __init__(
        self,
        dim: int,
        dws_conv: bool = True,
        dws_conv_only_hidden: bool = True,
        dws_conv_kernel_size: int = 3,
        cell_update_dropout: float = 0.0,
        enhancement_ratio: float = 0.05,
        small_object_threshold: float = 0.3,
    ) -> None:
        super().__init__(dim, dws_conv, dws_conv_only_hidden, dws_conv_kernel_size, cell_update_dropout)
        self.small_object_threshold = small_object_threshold
        narrow = max(4, int(dim * enhancement_ratio))
        self.temporal_attention = nn.Sequential(
            nn.Conv2d(2 * dim, narrow, 1, bias=False), nn.ReLU(), nn.Conv2d(narrow, 1, 1, bias=False), nn.Sigmoid()
        )
        self.density_estimator = nn.Conv2d(dim, 1, 1, bias=False)
        self.small_object_enhancer = nn.Conv2d(dim, narrow, 1, bias=False)
        self.feature_fusion = nn.Conv2d(dim + narrow, dim, 1, bias=False)
        drawn = (self.temporal_attention[0], self.temporal_attention[2], self.small_object_enhancer)
        for layer in (*drawn, self.feature_fusion):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor, h_and_c_previous: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step, as DWSConvLSTM2d; without a state it is that step."""
        if h_and_c_previous is None:
            return super().forward(x)
        h, c = super().forward(x, h_and_c_previous)
        return self._enhanced(x, h, h_and_c_previous[0]), c

    def forward_sequence(self, *arguments, **keywords):
        raise NotImplementedError("a step without a state differs from one with zeros: call the layer step by step")

    def _enhanced(self, x: Tensor, h: Tensor, h_previous: Tensor) -> Tensor:
        density = self.density_estimator(x).sigmoid().mean(dim=(2, 3), keepdim=True)
        few = (density < self.small_object_threshold).to(h.dtype)
        attention = self.temporal_attention(torch.cat([x, h_previous], dim=1))
        fused = self.feature_fusion(torch.cat([h, self.small_object_enhancer(h)], dim=1))
        return h + few * attention * (fused - h)
