"""KAN-MAMMOTE: K-MOTE embeddings of time, FasterKAN on their differences, state-space layers stepped by these."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from evkernels.nn.faster_kan import FasterKAN
from evkernels.nn.kmote import KMOTE


def state_space_scan(decay: Tensor, drive: Tensor, readout: Tensor) -> Tensor:
    """A linear recurrence with diagonal decay along the sequence, read out at every step, from a state of zeros.

    Equivalent to::

        h = decay[:, k] * h + drive[:, k]  # for each step k in turn
        y[:, k] = (h * readout[:, k]).sum(-1)

    Args:
        decay: Factors of the state [B, L, ..., S].
        drive: What each step adds to the state, of the same shape.
        readout: Weights of the state in the output, of a shape that broadcasts to it.

    Returns:
        [B, L, ...]. One pass over the steps, each of S numbers per sequence; differentiable. S and L are small here (16
        and some 100), so that no parallel form pays.
    """
    state, states = torch.zeros_like(drive[:, 0]) if drive.shape[1] else None, []
    for factor, added in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = torch.addcmul(added, factor, state)
        states.append(state)
    if not states:
        return drive.new_zeros(drive.shape[:-1])
    return (torch.stack(states, dim=1) * readout).sum(dim=-1)


class ContinuousMambaLayer(nn.Module):
    """A state-space layer whose step size is learned from an embedding of the time since the step before.

    One state of `states` numbers per sequence, driven by the mean feature: h' = -exp(A_log) h + B x. The step size goes
    through a softplus and the decay over it is exact, exp(-step * exp(A_log)), so that the state stays bounded.

    Args:
        dim: Size of the features.
        states: Size of the state.
        dropout: In the feed-forward part.
        published: True takes explicit Euler steps 1 - step * exp(A_log) of any sign, as published: they grow without
            bound where the factor leaves [-1, 1], and random weights overflow within some 100 events.

    Source: ContinuousMambaLayer of kan-mammotev2 with its own state-space model, which it runs where the package
    mamba_ssm is missing. `dt_proj`, which that has and never uses, is left out; checkpoints with it load.
    """

    def __init__(self, dim: int, states: int = 16, dropout: float = 0.1, published: bool = False):
        super().__init__()
        self.published = published
        self.A_log = nn.Parameter(torch.randn(states))
        self.D = nn.Parameter(torch.randn(dim))
        self.x_proj = nn.Linear(dim, 2 * states)
        self.out_proj = nn.Linear(dim, dim)
        self.delta_processor = nn.Sequential(nn.Linear(dim, dim), nn.Softplus(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.ffn = _FeedForward(dim, dropout)

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        """Features and embeddings of the time since the step before, [B, L, dim] each, to features [B, L, dim]."""
        step = self.delta_processor(delta).mean(dim=-1, keepdim=True)
        if self.published:
            decay = 1 - step * self.A_log.exp()
        else:
            step = softplus(step)
            decay = torch.exp(-step * self.A_log.exp())
        drive, readout = self.x_proj(x).chunk(2, dim=-1)
        drive = step * drive * x.mean(dim=-1, keepdim=True)
        y = state_space_scan(decay, drive, readout)
        x = self.norm(self.out_proj(y[..., None] + self.D * x) + x)
        return x + self.ffn(x)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("dt_proj.weight", "dt_proj.bias"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class KANMammote(nn.Module):
    """KAN-MAMMOTE: an embedding of each event's time that knows the times before it.

    Equivalent to::

        embedding, weights = k_mote(t)
        before, _ = k_mote(torch.cat([t[:, :1], t[:, :-1]], dim=1))
        delta = delta_t_embedding_proj(faster_kan(embedding - before))
        for layer in continuous_mamba_layers:
            embedding = layer(embedding, delta)

    Both K-MOTE embeddings are computed at once: the second is the first, shifted by one step.

    Args:
        dim: Size of the embedding, a multiple of `experts` in generation "A".
        states: Size of the state of a state-space layer.
        layers: Number of state-space layers.
        grids: Grid points of FasterKAN on [-2, 2]. The published model has 8 whatever its configuration says.
        top, generation, experts: Of `KMOTE`.
        published: Of `ContinuousMambaLayer`: True for the arithmetic of the published model.

    State-dict keys are those of KAN_MAMOTE_Model of kan-mammotev2, without the aliases `ct_mamba_block.kmote_layer` and
    `ct_mamba_block.faster_kan_layer`; checkpoints that have them load. Plain PyTorch but for `KMOTE`.
    """

    def __init__(
        self,
        dim: int = 32,
        states: int = 16,
        layers: int = 2,
        grids: int = 8,
        top: int = 2,
        generation: str = "A",
        experts: int = 4,
        published: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.k_mote = KMOTE(dim, top, generation=generation, experts=experts)
        self.faster_kan_layer = nn.ModuleDict({"kan_layer": FasterKAN(dim, dim, num_grids=grids)})
        self.ct_mamba_block = _Block(dim, states, layers, published)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds sequences of timestamps.

        Args:
            t: Timestamps [B, L].

        Returns:
            embedding, weights: [B, L, dim], and K-MOTE's router weights [B, L, experts]. A step depends on those
            before it alone, so padding at the end changes nothing before.
        """
        embedding, weights = self.k_mote(t)
        # The first step's predecessor is itself.
        difference = pad(embedding[:, 1:] - embedding[:, :-1], (0, 0, min(1, t.shape[1]), 0))
        return self.ct_mamba_block(embedding, self.faster_kan_layer["kan_layer"](difference)), weights


class _Block(nn.Module):
    def __init__(self, dim: int, states: int, layers: int, published: bool):
        super().__init__()
        self.delta_t_embedding_proj = nn.Linear(dim, dim)
        blocks = [ContinuousMambaLayer(dim, states, published=published) for _ in range(layers)]
        self.continuous_mamba_layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, difference: Tensor) -> Tensor:
        delta = self.delta_t_embedding_proj(difference)
        for layer in self.continuous_mamba_layers:
            x = layer(x, delta)
        return x

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in [n for n in state_dict if n.startswith((prefix + "kmote_layer.", prefix + "faster_kan_layer."))]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        dropouts = nn.Dropout(dropout), nn.Dropout(dropout)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), dropouts[0], nn.Linear(4 * dim, dim), dropouts[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)
