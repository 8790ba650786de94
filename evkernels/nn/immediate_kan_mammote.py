"""The published KAN-MAMMOTE checkpoint's model: two K-MOTEs, FasterKAN on their difference, one Mamba block."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus

from evkernels.nn.faster_kan import FasterKAN
from evkernels.nn.kan_mammote import state_space_scan
from evkernels.nn.kmote import KMOTE


class Mamba(nn.Module):
    """A selective state-space layer with a causal convolution and a gate, as `Mamba` of mamba_ssm, with its keys.

    Args:
        dim: Size of the features.
        states: Size of the state of each inner feature.
        width: Of the causal depthwise convolution.
        expand: Inner features per feature.

    Plain PyTorch, one pass over the steps: sequences of events are some 100 long. Source: Gu and Dao 2023
    (arXiv:2312.00752).
    """

    def __init__(self, dim: int, states: int = 16, width: int = 4, expand: int = 2):
        super().__init__()
        inner, self.rank, self.states = expand * dim, math.ceil(dim / 16), states
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, width, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            # Step sizes from 0.001 to 0.1, evenly in their logarithm, through the inverse of softplus.
            steps = (torch.rand(inner) * math.log(100) + math.log(0.001)).exp()
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, dim] to [B, L, dim]; a step depends on those before it alone."""
        if x.shape[1] == 0:
            return x  # The convolution would refuse it.
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        before = self.conv1d.kernel_size[0] - 1
        x = silu(conv1d(pad(x.mT, (before, 0)), self.conv1d.weight, self.conv1d.bias, groups=x.shape[-1]).mT)
        step, drive, readout = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        step = softplus(self.dt_proj(step))[..., None]
        decay = torch.exp(-step * self.A_log.exp())
        y = state_space_scan(decay, step * drive[:, :, None] * x[..., None], readout[:, :, None])
        return self.out_proj((y + self.D * x) * silu(gate))


class ImmediateKANMammote(nn.Module):
    """KAN-MAMMOTE as in its public MNIST checkpoint.

    Equivalent to::

        before = torch.cat([t[:, :1], t[:, :-1]], dim=1)
        difference = k_mote_current(t)[0] - k_mote_previous(before)[0]
        x = c_mamba.input_proj(temporal_difference_kan.kan_layer(difference))
        x = x + pad(c_mamba.time_encoder(t - before), (0, hidden - hidden // 2))
        embedding = c_mamba.layer_norm(c_mamba.mamba(x) + x)

    Args:
        dim: Size of the K-MOTE embeddings, a multiple of 4.
        hidden: Size of the result, a multiple of 4.
        grids: Grid points of FasterKAN on [-2, 2].
        top, aux_features: Of `KMOTE`.

    State-dict keys are those of ImmediateFasterKANLayer of kan-mammote, with or without the prefix
    `immediate_fasterkan_layer.` of the model around it. Plain PyTorch but for `KMOTE`.
    """

    def __init__(self, dim: int = 32, hidden: int = 32, grids: int = 8, top: int = 2, aux_features: int = 0):
        super().__init__()
        if hidden < 4 or hidden % 4:
            raise ValueError(f"hidden must be a multiple of 4, at least 4, got {hidden}")
        self.k_mote_current = KMOTE(dim, top, aux_features)
        self.k_mote_previous = KMOTE(dim, top, aux_features)
        self.temporal_difference_kan = nn.ModuleDict({"kan_layer": FasterKAN(dim, dim, num_grids=grids)})
        self.c_mamba = _TimedMamba(dim, hidden)

    def forward(self, t: Tensor, aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds sequences of timestamps.

        Args:
            t: Timestamps [B, L].
            aux: What the routers see besides [B, L, aux_features], or None.

        Returns:
            embedding, weights: [B, L, hidden], and the first K-MOTE's router weights [B, L, 4]. A step depends on those
            before it alone, so padding at the end changes nothing before.
        """
        before = torch.cat([t[:, :1], t[:, :-1]], dim=1)
        current, weights = self.k_mote_current(t, aux)
        difference = current - self.k_mote_previous(before, aux)[0]
        return self.c_mamba(self.temporal_difference_kan["kan_layer"](difference), t - before), weights

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        outer = prefix + "immediate_fasterkan_layer."
        for name in [name for name in state_dict if name.startswith(outer)]:
            state_dict[prefix + name.removeprefix(outer)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _TimedMamba(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.input_proj = nn.Linear(dim, hidden)
        self.time_encoder = _TimeEncoder(hidden // 2)
        self.mamba = Mamba(hidden)
        self.layer_norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, elapsed: Tensor) -> Tensor:
        x, times = self.input_proj(x), self.time_encoder(elapsed)
        x = x + pad(times, (0, x.shape[-1] - times.shape[-1]))
        return self.layer_norm(self.mamba(x) + x)


class _TimeEncoder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.freq = nn.Parameter(0.1 * torch.randn(dim // 2))
        self.phase = nn.Parameter(0.1 * torch.randn(dim // 2))
        self.linear = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[..., None] * self.freq + self.phase
        return self.linear(torch.cat([angles.sin(), angles.cos()], dim=-1))
