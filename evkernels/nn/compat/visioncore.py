"""VisionCore's fast ConvGRU: the cell, the layer over (B, C, T, H, W), and the behaviour-modulated layer.

The cell is `evkernels.nn.ConvGRUCell(form="fast")`; what is here is the original's interface around it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.cell_options import is_plain
from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.ops.conv_3x3 import PackedConvolution


class ConvGRUCellFast(ConvGRUCell):
    """ConvGRUCell(form="fast") that takes the input already convolved.

    Equivalent to::

        z, r, n = (x_proj + layer_norm(conv_h(h))).chunk(3, dim=1)
        z, r = z.sigmoid(), r.sigmoid()
        h_next = (1 - z) * h + z * (n + r * h).tanh()

    Args:
        in_ch: Channels of x.
        hid_ch: Channels of h.
        k: Odd side of the square kernels.
        use_layer_norm: Whether there is a GroupNorm of min(32, hid_ch) groups on conv_h(h).
        use_depthwise: Each convolution of at least 3 channels is a depthwise one followed by a 1x1.
        use_grouped: Whether the convolutions, if not depthwise, are grouped.
        num_groups: Into how many groups, at most their input channels.
        winograd: As in ConvGRUCell; not in the original.

    Raises:
        ValueError: if `k` is even, 3*hid_ch is not divisible by the norm's groups (33, 40, 48, ...) or the channels are
            not by `num_groups`.

    State dict and initialisation as in ConvGRUCell(form="fast"). The original crops the centre where an even `k` makes
    sizes disagree.
    """

    def __init__(
        self,
        in_ch: int,
        hid_ch: int,
        k: int = 3,
        use_layer_norm: bool = True,
        use_depthwise: bool = False,
        use_grouped: bool = False,
        num_groups: int = 1,
        winograd: bool = False,
    ) -> None:
        options = {"depthwise": use_depthwise, "groups": num_groups if use_grouped else 1, "winograd": winograd}
        super().__init__(in_ch, hid_ch, k, "fast", layer_norm=use_layer_norm, **options)

    def forward(self, x_proj: Tensor, h: Tensor) -> Tensor:
        """conv_x(x) [N, 3*hid_ch, H, W] and h [N, hid_ch, H, W] to the next h."""
        return self._fast_step()(x_proj, h, h)


class ConvGRU(nn.Module):
    """VisionCore's ConvGRU: the last hidden state of a sequence.

    Equivalent to::

        h = h0.expand(B, hid_ch, H, W) if learnable_h0 else zeros
        for frame in x.unbind(2):
            h = cell(cell.conv_x(frame), h)
            if training and grad_clip_val is not None:
                h = h.clamp(-grad_clip_val, grad_clip_val)
        if use_residual and in_ch == hid_ch:
            h = h + frame
        y = torch.cat([frame, h], dim=1) if fast_phase else h

    Args:
        in_ch: Channels of x.
        hid_ch: Channels of h.
        k: Odd side of the square kernels.
        fast_phase: Whether the last frame is put before h.
        use_layer_norm, use_depthwise, use_grouped, num_groups: As in ConvGRUCellFast.
        learnable_h0: Whether the first state is a parameter, one value per channel.
        use_residual: Whether the last frame is added; without effect where in_ch is not hid_ch.
        grad_clip_val: Bound of the state in training, None for none. In spite of its name it clamps h, not gradients;
            these are zero where it does.
        winograd: As in ConvGRUCell; not in the original.

    Raises:
        ValueError: as ConvGRUCellFast.

    State dict: `h0` [1, hid_ch, 1, 1], zero at first, and `cell.*` of ConvGRUCellFast.
    """

    def __init__(
        self,
        in_ch: int,
        hid_ch: int,
        k: int = 3,
        fast_phase: bool = False,
        use_layer_norm: bool = True,
        use_depthwise: bool = False,
        use_grouped: bool = False,
        num_groups: int = 1,
        learnable_h0: bool = True,
        use_residual: bool = False,
        grad_clip_val: float | None = None,
        winograd: bool = False,
    ) -> None:
        super().__init__()
        self.hid_ch = hid_ch
        self.fast_phase = fast_phase
        self.use_residual = use_residual and in_ch == hid_ch
        self.grad_clip_val = grad_clip_val
        self.h0 = nn.Parameter(torch.zeros(1, hid_ch, 1, 1)) if learnable_h0 else None
        self.cell = ConvGRUCellFast(in_ch, hid_ch, k, use_layer_norm, use_depthwise, use_grouped, num_groups, winograd)

    def forward(self, x: Tensor, chunk_size: int = 4) -> Tensor:
        """Runs the sequence.

        Args:
            x: Inputs [B, in_ch, T, H, W], T at least 1.
            chunk_size: For how many frames at a time conv_x runs: less memory or fewer calls, the same result.

        Returns:
            [B, hid_ch, H, W], [B, in_ch + hid_ch, H, W] with `fast_phase`.

        Raises:
            ValueError: if `x` is not of that shape or `chunk_size` less than 1.
        """
        if x.dim() != 5 or x.shape[1] != self.cell.in_channels or x.shape[2] == 0:
            expected = f"[B, C, T, H, W] with C = in_ch = {self.cell.in_channels} and T at least 1"
            raise ValueError(f"x must be {expected}, got {tuple(x.shape)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        frames = x.permute(2, 0, 1, 3, 4)
        h = self._last_state(frames, chunk_size, self.cell.conv_x)
        if self.use_residual:
            h = h + frames[-1]
        return torch.cat([frames[-1], h], dim=1) if self.fast_phase else h

    def _last_state(self, frames: Tensor, chunk_size: int, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """The state after frames [T, B, C, H, W], of which `convolve` makes what conv_x does of x."""
        h, advance = None, self.cell
        # One step for all frames transforms the weight of conv_h once.
        if len(frames) > 1 and is_plain(self.cell, ConvGRUCellFast):
            step = self.cell._fast_step()

            def advance(x_proj, h):
                return step(x_proj, h, h)

        for chunk in frames.split(chunk_size):
            for x_proj in convolve(chunk.flatten(0, 1)).unflatten(0, chunk.shape[:2]):
                h = self._first_state(x_proj) if h is None else advance(x_proj, h)
                if self.training and self.grad_clip_val is not None:
                    h = h.clamp(-self.grad_clip_val, self.grad_clip_val)
        return h

    def _first_state(self, x_proj: Tensor) -> Tensor:
        """The state after the first step. Before it the state is the same at all pixels, and so nearly is what conv_h
        makes of it.
        """
        size = x_proj.shape[-2:]
        h = x_proj.new_zeros(1, self.hid_ch, 1, 1) if self.h0 is None else self.h0
        q = self.cell.layer_norm(of_constant(self.cell.conv_h, h.to(x_proj.dtype), self.cell.kernel_size, size))
        return ops.gru_gates(x_proj, q.expand_as(x_proj), h.expand(len(x_proj), -1, *size))


def of_constant(convolve: Callable[[Tensor], Tensor], value: Tensor, kernel_size: int, size: Sequence[int]) -> Tensor:
    """What a convolution with zero padding makes of maps [N, C, *size] that are `value` [N, C, 1, 1] everywhere.

    Only at the borders does it depend on the pixel: a map of the kernel's size has all the values.
    """
    height, width = size
    if min(size) < kernel_size:
        return convolve(value.expand(-1, -1, height, width))
    small = convolve(value.expand(-1, -1, kernel_size, kernel_size))
    for dim, length in ((2, height), (3, width)):
        middle, radius = length - kernel_size + 1, kernel_size // 2
        before, centre, after = small.split([radius, 1, radius], dim)
        shape = [-1] * 4
        shape[dim] = middle
        small = torch.cat([before, centre.expand(shape), after], dim)
    return small


class ConvGRUModulator(nn.Module):
    """Behaviour-modulated ConvGRU: an embedding of the behaviour beside the features of every pixel and frame.

    Equivalent to::

        embedded = beh_emb(behavior)[:, :, None, None, None].expand(-1, -1, T, H, W)
        y = output_proj(gru(torch.cat([features, embedded], dim=1))).unsqueeze(2)

    Args:
        cfg: feature_dim and behavior_dim; optionally hidden_dim (feature_dim), beh_emb_dim (16), kernel_size (3),
            winograd (True), and the other arguments of ConvGRU: fast_phase is refused, because output_proj takes
            hidden_dim channels.

    Raises:
        ValueError: if `cfg` asks for fast_phase, or as ConvGRU.

    State dict: `beh_emb.{weight,bias}`, `gru.*`, `output_proj.{weight,bias}`, initialised as torch.nn does.
    """

    def __init__(self, cfg: Mapping) -> None:
        super().__init__()
        options = dict(cfg)
        feature_dim, behavior_dim = options.pop("feature_dim"), options.pop("behavior_dim")
        hidden_dim = options.pop("hidden_dim", feature_dim)
        beh_emb_dim = options.pop("beh_emb_dim", 16)
        options.setdefault("winograd", True)
        if options.get("fast_phase"):
            raise ValueError("fast_phase must be False: output_proj takes hidden_dim channels")
        self.feature_dim = feature_dim
        self.beh_emb = nn.Linear(behavior_dim, beh_emb_dim)
        self.gru = ConvGRU(feature_dim + beh_emb_dim, hidden_dim, options.pop("kernel_size", 3), **options)
        self.output_proj = nn.Conv2d(hidden_dim, hidden_dim, 1)

    def forward(self, features: Tensor, behavior: Tensor) -> Tensor:
        """Features [B, feature_dim, T, H, W] and behaviour [B, behavior_dim] to [B, hidden_dim, 1, H, W]."""
        if features.dim() != 5 or features.shape[1] != self.feature_dim or features.shape[2] == 0:
            expected = f"[B, C, T, H, W] with C = feature_dim = {self.feature_dim} and T at least 1"
            raise ValueError(f"features must be {expected}, got {tuple(features.shape)}")
        embedded = self.beh_emb(behavior)[:, :, None, None]
        conv = self.gru.cell.conv_x
        if self.gru.use_residual or not is_plain(conv) or conv.groups > 1:
            embedded = embedded[..., None].expand(-1, -1, *features.shape[2:])
            return self.output_proj(self.gru(torch.cat([features, embedded], dim=1))).unsqueeze(2)
        # What is the same at all pixels and in all frames is convolved once.
        k = conv.kernel_size[0]
        weight, weight_embedded = conv.weight.tensor_split([features.shape[1]], dim=1)
        weight = weight.contiguous()
        if self.gru.cell._is_packed(conv):
            convolved = PackedConvolution(weight, calls=-(-features.shape[2] // 8))
        else:
            convolved = functools.partial(F.conv2d, weight=weight, padding=k // 2)
        added = of_constant(
            lambda x: F.conv2d(x, weight_embedded, conv.bias, padding=k // 2), embedded, k, features.shape[3:]
        )
        frames = features.permute(2, 0, 1, 3, 4)

        def convolve(x):
            return (convolved(x).unflatten(0, (-1, len(added))) + added).flatten(0, 1)

        return self.output_proj(self.gru._last_state(frames, 8, convolve)).unsqueeze(2)
