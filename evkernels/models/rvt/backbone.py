"""RVT's recurrent backbone: four stages of strided convolution, attention within partitions, and an LSTM.

No stage sees another's future, so a sequence can run layer by layer: the convolutions and attentions of all frames as
one batch, and each LSTM through all steps in one op. That is what `forward_sequence` does; `forward` is a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evkernels.models.rvt.attention import PartitionAttentionCl
from evkernels.nn import DWSConvLSTM2d, LightweightEnhancedConvLSTM, PlainLSTM2d

State = tuple[Tensor, Tensor]

# On the CPU frames go through a stage together only as far as the largest intermediate, the MLP's hidden layer, stays
# below this many bytes. Beyond, every one of them is fresh memory from the system: five frames of RVT-T's first stage
# (40 MB) take twice as long per frame as one (8 MB).
_LARGEST_INTERMEDIATE = 8 * 2**20


class MaxViTRNN(nn.Module):
    """Event representations to maps at strides 4, 8, 16 and 32, each stage with a state of its own.

    Equivalent to::

        for stage, state in zip(stages, states):
            x = stage.downsample_cf2cl(x)
            for block in stage.att_blocks:
                x = block.att_grid(block.att_window(x))
            h, c = x, _ = stage.lstm(x, state)

    Args:
        input_channels: Channels of the representation, 2 * bins of a stacked histogram.
        partition_size: Rows and columns of an attention partition, see `partition_size_of`.
        embed_dim: Channels of the first stage.
        dim_multiplier: Channels of each stage over `embed_dim`.
        num_blocks: Pairs of window and grid attention in each stage.
        patch_size: Stride of the first stage; the others have 2.
        overlap: Whether the strided convolutions overlap (7x7 and 3x3), else their kernel is their stride.
        norm_affine: Whether the layer norm behind a convolution has parameters.
        enable_masking: Adds the learned `mask_token` that replaces masked positions of the first stage.
        use_plain_lstm: PlainLSTM2d in all stages.
        use_enhanced_convlstm: LightweightEnhancedConvLSTM in the second stage, unless `use_plain_lstm`.
        lstm: Arguments of DWSConvLSTM2d: dws_conv (False here unless given), dws_conv_only_hidden,
            dws_conv_kernel_size, cell_update_dropout; of these PlainLSTM2d takes the last.
        attention: Arguments of PartitionAttentionCl: dim_head, mlp_ratio, drop_path and others.

    Raises:
        ValueError: if `dim_multiplier` and `num_blocks` differ in length, or by the layers.

    State-dict keys are those of RVT's `backbone`: `stages.{0..3}.{downsample_cf2cl,att_blocks,lstm}.*`. The backbones
    of RVT-B, -S and -T have 64, 48 and 32 `embed_dim`, and `dim_head` 32, 24, 32. Source: Gehrig and Scaramuzza 2023
    (arXiv:2212.05598); the choice of cells is eTraM's.
    """

    def __init__(
        self,
        input_channels: int,
        partition_size: tuple[int, int],
        *,
        embed_dim: int = 64,
        dim_multiplier: Sequence[int] = (1, 2, 4, 8),
        num_blocks: Sequence[int] = (1, 1, 1, 1),
        patch_size: int = 4,
        overlap: bool = True,
        norm_affine: bool = True,
        enable_masking: bool = False,
        use_plain_lstm: bool = False,
        use_enhanced_convlstm: bool = False,
        lstm: dict | None = None,
        attention: dict | None = None,
    ) -> None:
        super().__init__()
        if len(dim_multiplier) != len(num_blocks):
            raise ValueError(
                f"dim_multiplier and num_blocks must be of one length, got {len(dim_multiplier)} and {len(num_blocks)}"
            )
        self.input_channels = input_channels
        self.partition_size = tuple(partition_size)
        self.stage_dims = tuple(embed_dim * factor for factor in dim_multiplier)
        self.strides = tuple(patch_size * 2**index for index in range(len(num_blocks)))
        lstm = {"dws_conv": False, **(lstm or {})}
        before = (input_channels, *self.stage_dims)
        self.stages = nn.ModuleList()
        for index, dim in enumerate(self.stage_dims):
            if use_plain_lstm:
                cell = PlainLSTM2d(dim, lstm.get("cell_update_dropout", 0.0))
            elif use_enhanced_convlstm and index == 1:
                cell = LightweightEnhancedConvLSTM(dim)
            else:
                cell = DWSConvLSTM2d(dim, **lstm)
            stage = RNNDetectorStage(
                DownsampleCf2Cl(before[index], dim, patch_size if index == 0 else 2, overlap, norm_affine),
                num_blocks[index],
                self.partition_size,
                cell,
                has_mask_token=enable_masking and index == 0,
                attention=attention or {},
            )
            self.stages.append(stage)

    def forward(
        self, x: Tensor, prev_states: Sequence[State] | None = None, token_mask: Tensor | None = None
    ) -> tuple[dict[int, Tensor], list[State]]:
        """One time step.

        Args:
            x: Representation [N, input_channels, H, W], H and W such that every stage's map divides into partitions.
            prev_states: (h, c) of each stage, as returned by the step before; zeros if None.
            token_mask: bool [N, H / patch_size, W / patch_size] of positions to replace by the mask token, or None.

        Returns:
            maps, states: {1: [N, C1, H/4, W/4], ..., 4: [N, C4, H/32, W/32]}, each the stage's h, and (h, c) of each
            stage, which stay in the autograd graph (see evkernels.nn.detach).

        Raises:
            ValueError: if a shape is none of those above; the message says what to pad to.
        """
        self._check(x, 4)
        maps, states = self._run(x[None], prev_states, None, token_mask)
        return {stage: value[0] for stage, value in maps.items()}, states

    def forward_sequence(
        self,
        x: Tensor,
        prev_states: Sequence[State] | None = None,
        reset: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[dict[int, Tensor], list[State]]:
        """All steps of a sequence, layer by layer: the numbers of one `forward` per step.

        Args:
            x: [T, N, input_channels, H, W].
            prev_states: As in `forward`.
            reset: bool [T, N]; where true, all states of the sample are zero before that step.
            token_mask: bool [T, N, H / patch_size, W / patch_size] or None.

        Returns:
            maps, states: as `forward`, with a leading dimension T for the maps.

        Raises:
            ValueError: as `forward`.
        """
        self._check(x, 5)
        return self._run(x, prev_states, reset, None if token_mask is None else token_mask.flatten(0, 1))

    def _run(self, x, prev_states, reset, token_mask):
        maps, states = {}, []
        for index, stage in enumerate(self.stages):
            state = None if prev_states is None else prev_states[index]
            x, state = stage(x, state, reset, token_mask if index == 0 else None)
            maps[index + 1] = x
            states.append(state)
        return maps, states

    def _check(self, x: Tensor, dimensions: int) -> None:
        if x.dim() != dimensions or x.shape[-3] != self.input_channels:
            expected = f"[{'T, ' if dimensions == 5 else ''}N, input_channels, H, W]"
            raise ValueError(f"x must be {expected} with input_channels = {self.input_channels}, got {tuple(x.shape)}")
        multiples = [size * self.strides[-1] for size in self.partition_size]
        padded = [-(-size // multiple) * multiple for size, multiple in zip(x.shape[-2:], multiples, strict=True)]
        if list(x.shape[-2:]) != padded:
            raise ValueError(
                f"H, W of x must be multiples of {multiples[0]}, {multiples[1]} (partitions of "
                f"{self.partition_size[0]} x {self.partition_size[1]} at stride {self.strides[-1]}), got "
                f"{x.shape[-2]}, {x.shape[-1]}: pad with zeros at the bottom and right to {padded[0]}, {padded[1]}"
            )


class RNNDetectorStage(nn.Module):
    """A stage of `MaxViTRNN` over frames [T, N, C, H, W]."""

    def __init__(
        self,
        downsample: nn.Module,
        num_blocks: int,
        partition_size: tuple[int, int],
        lstm: nn.Module,
        *,
        has_mask_token: bool,
        attention: dict,
    ) -> None:
        super().__init__()
        dim = lstm.dim
        self.downsample_cf2cl = downsample
        # The first attention finds its input normalised by the downsampling.
        self.att_blocks = nn.ModuleList(
            MaxVitAttentionPairCl(dim, partition_size, skip_first_norm=block == 0, **attention)
            for block in range(num_blocks)
        )
        self.lstm = lstm
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, dim)) if has_mask_token else None
        if has_mask_token:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, x: Tensor, state: State | None, reset: Tensor | None, token_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        if token_mask is not None and self.mask_token is None:
            raise ValueError("token_mask needs a backbone made with enable_masking=True")
        frames, count = x.flatten(0, 1), self._frames_at_once(x)
        masks = [None] * len(frames) if token_mask is None else token_mask.split(count)
        maps = [self._map(part, mask) for part, mask in zip(frames.split(count), masks, strict=False)]
        maps = maps[0] if len(maps) == 1 else torch.cat(maps)
        return self.lstm.forward_sequence(maps.permute(0, 3, 1, 2).unflatten(0, x.shape[:2]), state, reset)

    def _map(self, frames: Tensor, token_mask: Tensor | None) -> Tensor:
        """What the LSTM sees, [frames, H, W, C]."""
        x = self.downsample_cf2cl(frames)
        if token_mask is not None:
            x = torch.where(token_mask[..., None], self.mask_token.to(x.dtype), x)
        for block in self.att_blocks:
            x = block(x)
        return x

    def _frames_at_once(self, x: Tensor) -> int:
        total = x.shape[0] * x.shape[1]
        if x.device.type != "cpu" or total == 0:
            return max(total, 1)
        hidden = self.att_blocks[0].att_window.mlp.hidden if len(self.att_blocks) else self.lstm.dim
        stride = self.downsample_cf2cl.factor
        size = x.shape[3] // stride * (x.shape[4] // stride) * hidden * x.element_size()
        return max(1, _LARGEST_INTERMEDIATE // max(size, 1))


class MaxVitAttentionPairCl(nn.Module):
    """Attention within windows, then over grids."""

    def __init__(self, dim: int, partition_size: tuple[int, int], *, skip_first_norm: bool, **attention) -> None:
        super().__init__()
        self.att_window = PartitionAttentionCl(
            dim, "window", partition_size, skip_first_norm=skip_first_norm, **attention
        )
        self.att_grid = PartitionAttentionCl(dim, "grid", partition_size, **attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.att_grid(self.att_window(x))


class DownsampleCf2Cl(nn.Module):
    """Strided convolution and layer norm: [N, C, H, W] to [N, H / factor, W / factor, C']."""

    def __init__(self, dim_in: int, dim_out: int, factor: int, overlap: bool = True, norm_affine: bool = True) -> None:
        super().__init__()
        self.factor = factor
        kernel_size = 2 * factor - 1 if overlap else factor
        padding = kernel_size // 2 if overlap else 0
        self.conv = nn.Conv2d(dim_in, dim_out, kernel_size, stride=factor, padding=padding, bias=False)
        self.norm = nn.LayerNorm(dim_out, eps=1e-5, elementwise_affine=norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        # channels_last, so that the layer norm and the linear maps behind it find their vectors contiguous.
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


def partition_size_of(height: int, width: int, partition_split_32: int = 2) -> tuple[tuple[int, int], tuple[int, int]]:
    """RVT's rule for a sensor: the size to pad to and the partition's.

    Args:
        height, width: Of the representation.
        partition_split_32: Into how many partitions the map at stride 32 is divided, along each side.

    Returns:
        (H, W), (rows, columns): H, W the next multiples of 32 * partition_split_32, and the partition's size.

    Example: 360 x 640 with 2 is padded to 384 x 640, partitions of 6 x 10.
    """
    if partition_split_32 < 1:
        raise ValueError(f"partition_split_32 must be at least 1, got {partition_split_32}")
    multiple = 32 * partition_split_32
    padded = tuple(-(-size // multiple) * multiple for size in (height, width))
    return padded, (padded[0] // multiple, padded[1] // multiple)
