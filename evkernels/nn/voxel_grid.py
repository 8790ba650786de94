"""Voxel grids as a module: the convention, sizes and normalisation of one network's input in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import event_input
from evkernels.ops.voxel_grid import NORMALIZATIONS
from evkernels.reference.voxel_grid import CONVENTIONS

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class VoxelGrid(nn.Module):
    """Sums polarities per time bin and pixel, as the network that the grid is for was trained with.

    Args:
        bins: Number of time bins, spread from the first to the last event of a window.
        height: Rows of the grid, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the grid, likewise.
        convention: Whose voxel grid: "e2vid", "tonic", "dsec", "openeb", "event_utils", "eseg" or "eseg_split". E2VID,
            its successors and most of what reads DSEC share times between two bins, and differ in polarity 0, in
            sub-pixel coordinates and at the ends of the window.
        normalize: "e2vid" or "dsec" bring the cells of a window that are not 0 to zero mean and unit deviation, of the
            population or unbiased, as those two data loaders do; "eseg" is `EventNormalization`; None leaves them.
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] as of `evkernels.events.pixel_map`: flip,
            crop, downsampling, rectification and removal of pixels in the same pass. For "dsec" also
            float32 [H, W, 2], DSEC's rectify_map. None: the sensor is the image.

    Events outside the sensor are dropped; times need not be sorted. No parameters; differentiable with respect to
    sub-pixel coordinates, floating times and weights. See `evkernels.ops.voxel_grid` for the formulas.
    """

    def __init__(
        self,
        bins: int,
        height: int,
        width: int,
        convention: str = "e2vid",
        normalize: str | None = None,
        pixel_map: Tensor | None = None,
    ):
        super().__init__()
        if convention not in CONVENTIONS:
            names = ", ".join(f'"{name}"' for name in CONVENTIONS)
            raise ValueError(f"convention must be one of {names}, got {convention!r}")
        if normalize is not None and normalize not in NORMALIZATIONS:
            raise ValueError(f'normalize must be "e2vid", "dsec", "eseg" or None, got {normalize!r}')
        self.bins = bins
        self.height = height
        self.width = width
        self.convention = convention
        self.normalize = normalize
        self.register_buffer("pixel_map", pixel_map, persistent=False)

    def forward(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        weight: Tensor | None = None,
        offsets: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The grid of one window, or of each window of a batch.

        Args:
            x: Columns [E], any integer dtype, or float32 or float64 for "dsec"; or, instead of the four columns and
                `offsets`, `evkernels.events.Events`, `EventBatch` or a structured NumPy array with fields x, y, t, p.
            y: Rows [E], like x.
            pol: Polarities [E]: 1, 0 or -1, or bool.
            time: Timestamps [E], int64, int32, float64 or float32.
            weight: Factor of every event [E], float32 or float64.
            offsets: Cuts a batch of windows out of the events, int64 [B + 1], see `evkernels.ops.voxel_grid`.
            out: Takes the result, which is then `out` itself; see `evkernels.ops.voxel_grid`.

        Returns:
            [channels, height, width], or [B, channels, height, width] with `offsets` or EventBatch, in the dtype of
            `weight` or float32.
        """
        x, y, t, p, offsets = event_input.columns(x, y, pol, time, offsets)
        return ops.voxel_grid(
            x,
            y,
            t,
            p,
            bins=self.bins,
            height=self.height,
            width=self.width,
            convention=self.convention,
            weight=weight,
            offsets=offsets,
            normalize=self.normalize,
            pixel_map=self.pixel_map,
            out=out,
        )

    def get_shape(self) -> tuple[int, int, int]:
        """Shape of one window's grid."""
        channels = 2 * self.bins if CONVENTIONS[self.convention].split else self.bins
        return channels, self.height, self.width

    def extra_repr(self) -> str:
        sizes = f"bins={self.bins}, height={self.height}, width={self.width}"
        return f"{sizes}, convention={self.convention!r}, normalize={self.normalize!r}"
